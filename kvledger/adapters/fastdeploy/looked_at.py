"""What engines and their tests look at in the drop-in: live, read-only views of the ledger's state."""

from __future__ import annotations

from collections.abc import Mapping

from kvledger.adapters.fastdeploy.cache_data import BlockNode
from kvledger.adapters.fastdeploy.split import SplitInstance
from kvledger.adapters.fastdeploy.views import View, leaf_view, node_map, root_view


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
            lambda req_id: leaf_view(state, state.requests[state.keys[req_id]].leaf),
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
