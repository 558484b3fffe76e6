"""What engines and their tests look at in the drop-in: live, read-only views of the ledger's state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvledger.adapters.fastdeploy.cache_data import BlockNode
from kvledger.adapters.fastdeploy.split import SplitInstance
from kvledger.adapters.fastdeploy.views import View, leaf_view, node_map, root_view
from statemachine.content import words_of
from statemachine.errors import InvalidCommand


class LookedAt(SplitInstance):
    """The maps of FastDeploy's manager, looked up in the ledger whenever they are asked. See the subclass."""

    @property
    def radix_tree_root(self) -> BlockNode:
        """The root of the prefix tree, a live view."""
        return root_view(self._manager.state)

    @property
    def node_map(self) -> Mapping[int, BlockNode]:
        """All cached blocks by node id, a live view."""
        return node_map(self._manager.state)

    @property
    def req_leaf_map(self) -> Mapping[str, BlockNode]:
        """By request: the last cached block of its path, a live view."""
        state = self._manager.state
        return View(
            self._live.keys,
            lambda req_id: leaf_view(state, state.requests[state.numbers[req_id]].leaf),
            self._live.__len__,
        )

    @property
    def leaf_req_map(self) -> Mapping[BlockNode, set[str]]:
        """By last block: the requests whose path ends there."""
        found: dict[BlockNode, set[str]] = {}
        for req_id, leaf in self.req_leaf_map.items():
            found.setdefault(leaf, set()).add(req_id)
        return found

    @property
    def cache_info(self) -> Mapping[str, tuple[BlockNode, int]]:
        """By request: the last node of its path, and the tokens that are cached."""
        size = self._block_size
        return View(
            self._live.keys,
            lambda req_id: (self.req_leaf_map[req_id], self._manager.cached_blocks(req_id) * size),
            self._live.__len__,
        )

    @property
    def unfilled_req_block_map(self) -> Mapping[str, list[int]]:
        """By request: its own blocks that are not cached."""
        own = {req_id: self._request(req_id).private().tolist() for req_id in self._live}
        return {req_id: blocks for req_id, blocks in own.items() if blocks}

    # How content is named

    def cal_block_hash(self, block: Any) -> bytes:
        """The key of a block of tokens among the ``children`` of the node before it: its content words."""
        return bytes(words_of(block))

    def hash_block_features(self, input_ids: Any, extra_keys: Sequence[object] = ()) -> str:
        """A name for tokens and the items in them: equal content of whatever types has equal names.

        The ledger compares content and looks nothing up by this.
        """
        digest = hashlib.sha256(words_of(input_ids))
        for key in extra_keys:
            text = str(key).encode()
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()

    def get_block_hash_extra_keys(
        self, request: Any, start_idx: int, end_idx: int, mm_idx: int
    ) -> tuple[int, list[object]]:
        """``(first item that may reach into the next block, hashes of the items in this one)``.

        The block has the tokens from ``start_idx`` to before ``end_idx``; items before ``mm_idx`` are passed over.

        Raises:
            InvalidCommand: the block has no tokens, or hashes and positions are not as many.
        """
        inputs = getattr(request, "multimodal_inputs", None) or {}
        positions, hashes = inputs.get("mm_positions") or [], inputs.get("mm_hashes") or []
        if not positions or "mm_hashes" not in inputs:
            return mm_idx, []
        if not 0 <= start_idx < end_idx or len(positions) != len(hashes):
            raise InvalidCommand(
                f"no block from {start_idx} to {end_idx} with {len(positions)} positions and {len(hashes)} hashes"
            )
        keys: list[object] = []
        for index in range(mm_idx, len(positions)):
            begin, end = positions[index].offset, positions[index].offset + positions[index].length
            if begin >= end_idx:
                return index, keys
            if end > start_idx:
                keys.append(hashes[index])
            if end > end_idx:
                return index, keys
        return max(mm_idx, len(positions) - 1), keys

    def _revert_match_blocks(
        self,
        request: Any,
        matched_token_num: int,
        block_size: int,
        chunk_idx: int,
        match_node_ids: list[int],
        matche_nodes: list[BlockNode],
        match_gpu_block_ids: list[int],
        match_cpu_block_ids: list[int],
        gpu_match_token_num: int,
        cpu_match_token_num: int,
        swap_node_ids: list[int],
    ) -> tuple[int, int, BlockNode]:
        """Take from the end of a match the blocks that reach into item ``chunk_idx``, in the lists themselves.

        Returns the tokens that stay matched on the device and on the host, and the last node. The ledger's own matches
        end before an item already where ``disable_chunked_mm_input`` says so.
        """
        inside = matched_token_num - request.multimodal_inputs["mm_positions"][chunk_idx].offset
        for _ in range(min(-(-inside // block_size), len(matche_nodes))):
            node = matche_nodes.pop()
            if node.node_id in match_node_ids:
                match_node_ids.remove(node.node_id)
            if node.block_id in match_gpu_block_ids and node.node_id not in swap_node_ids:
                match_gpu_block_ids.remove(node.block_id)
                gpu_match_token_num -= block_size
            elif match_cpu_block_ids:  # from the end as well: they are in the order of the path
                match_cpu_block_ids.pop()
                cpu_match_token_num -= block_size
            if node.node_id in swap_node_ids:
                swap_node_ids.remove(node.node_id)
        return gpu_match_token_num, cpu_match_token_num, matche_nodes[-1] if matche_nodes else self.radix_tree_root
