"""vLLM's ``KVCacheManager``, answered by a ledger: one group of full attention.

What vLLM's scheduler asks for request by request becomes calls of :class:`kvledger.CacheManager`. vLLM hands out block
ids from 1 on (0 is its padding) and publishes blocks when they are scheduled, before the step that computes them has
run; the ledger is told which are computed, so that nobody else counts on the others.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from kvledger.adapters.vllm.blocks import Blocks, Found, Held
from kvledger.adapters.vllm.requests import NULL_BLOCKS, items_of, namespace_of, release_reason
from kvledger.config import ConfigError
from kvledger.manager.manager import CacheManager
from statemachine.errors import OutOfBlocks


def expect_expressible(config: Any, own: KVCacheManager) -> None:
    """Refuse what a ledger with one block table per request cannot express.

    Raises:
        ConfigError: naming what it is, and what to do.
    """
    kinds = [type(group.kv_cache_spec).__name__ for group in config.kv_cache_groups]
    if len(kinds) != 1 or not isinstance(config.kv_cache_groups[0].kv_cache_spec, FullAttentionSpec):
        raise ConfigError(
            f"this model's layers are cached in groups ({', '.join(kinds)}); kvledger takes models with one group of "
            "full attention: run it with vLLM's own manager"
        )
    spec = config.kv_cache_groups[0].kv_cache_spec
    if getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None):
        raise ConfigError("layers with a window or chunks in a group of full attention: run it with vLLM's own manager")
    manager = own.coordinator.single_type_managers[0]
    if manager.block_size != spec.block_size:
        raise ConfigError("context parallelism divides blocks among ranks: run it with vLLM's own manager")


class _Live:
    """A request that has blocks."""

    __slots__ = ("cached", "fills_at", "ids", "name", "told")

    def __init__(self, name: str, ids: list[int], cached: int, fills_at: int, told: int) -> None:
        self.name = name
        """In the ledger: the request's own, with a number where that is still held."""
        self.ids = ids
        """vLLM's ids, in token order."""
        self.cached = cached
        """Leading blocks that are published."""
        self.fills_at = fills_at
        """So many tokens fill the next block that is to be published."""
        self.told = told
        """Leading tokens whose content the ledger knows."""


class Pool:
    """What is asked of ``block_pool`` besides the manager itself."""

    def __init__(self, manager: LedgerKVCacheManager) -> None:
        self._manager = manager

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Give back what :meth:`LedgerKVCacheManager.pop_blocks_for_free` has handed out."""
        for held in ordered_blocks:
            if isinstance(held, Held):
                self._manager.ledger.release(held.name)

    def get_num_free_blocks(self) -> int:
        """Blocks that are free or can be evicted."""
        return self._manager.ledger.available_blocks()

    def get_usage(self) -> float:
        """Share of the blocks that somebody holds."""
        return float(self._manager.usage)


class Coordinator:
    """What the scheduler reads of ``coordinator``: constants of the one group, and how many blocks a request needs."""

    enable_partial_hash_hits = False
    num_reprefillable_tokens = 0
    full_attention_group_id = 0

    def __init__(self, manager: LedgerKVCacheManager, own: Any) -> None:
        self._manager = manager
        self.single_type_managers = own.single_type_managers
        self.eagle_group_ids = own.eagle_group_ids

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        """Blocks that a request lacks for so many tokens."""
        live = self._manager.live.get(request_id)
        table = len(live.ids) if live is not None else 0
        return max(-(-num_tokens // int(self._manager.block_size)) - table, 0)


class LedgerKVCacheManager(KVCacheManager):
    """Takes the place of ``own``, vLLM's manager of the same scheduler, and answers from a ledger.

    Args:
        ledger: with as many device blocks as vLLM has, less the one that stands for nothing.
        own: already made by the scheduler; only its constants are used from here on.
    """

    def __init__(self, ledger: CacheManager, own: KVCacheManager) -> None:
        # That of the base class is not called: it would make all blocks once more.
        self.ledger = ledger
        self.live: dict[str, _Live] = {}
        self.block_size = own.coordinator.single_type_managers[0].block_size
        self.max_model_len = own.max_model_len
        self.enable_caching = own.enable_caching
        self.enable_kv_cache_events = False
        self.use_eagle = own.use_eagle
        self.log_stats = own.log_stats
        self.metrics_collector = own.metrics_collector
        self.prefix_cache_stats = own.prefix_cache_stats
        self.mamba_shared_prefix_checkpoint = False
        self.num_kv_cache_groups = 1
        self.retained_hit_group_ids = ()
        self.kv_cache_config = own.kv_cache_config
        self.watermark_blocks = own.watermark_blocks
        self.kv_cache_event_metadata = own.kv_cache_event_metadata
        self.empty_kv_cache_blocks = Blocks([])
        self.coordinator = Coordinator(self, own.coordinator)
        self.block_pool = Pool(self)
        self._blocks = ledger.config.device_blocks
        self._again = 0
        self._asked: tuple[str, int, Any] = ("", 0, None)
        """The request that was looked up last: its name, how many tokens it had, and they."""

    # Looking up

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds."""
        return 1.0 - self.ledger.available_blocks() / self._blocks

    def get_computed_blocks(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int]:
        """How many leading tokens of a waiting request are cached; changes nothing."""
        if not self.prefix_cache_lookup_enabled(request):
            return self.empty_kv_cache_blocks, 0, 0
        limit = request.num_tokens - 1 if max_cache_hit_length is None else max_cache_hit_length
        found, _ = self.ledger.peek(
            self._tokens(request),
            items=items_of(request),
            namespace=namespace_of(request),
            max_blocks=limit // self.block_size,
        )
        if self.use_eagle and found:
            found -= 1  # the last slot of a block depends on the token after it
        return (Found(found), found * self.block_size, 0) if found else (self.empty_kv_cache_blocks, 0, 0)

    def get_computed_blocks_for_connector(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """The same; with one group no two can disagree."""
        return *self.get_computed_blocks(request, max_cache_hit_length), False

    def truncate_computed_blocks(self, blocks: KVCacheBlocks, num_computed_tokens: int) -> KVCacheBlocks:
        """A shorter hit."""
        return Found(num_computed_tokens // self.block_size)

    def estimate_cached_tokens(self, request: Request) -> int:
        """Leading tokens of a request that are published."""
        live = self.live.get(request.request_id)
        return live.cached * self.block_size if live is not None else 0

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """All blocks of a request."""
        live = self.live.get(request_id)
        return Blocks(list(live.ids)) if live is not None else self.empty_kv_cache_blocks

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """Ids of all blocks of a request, by group."""
        live = self.live.get(request_id)
        return (list(live.ids) if live is not None else [],)

    def get_block_ids_for_computed_tokens(self, request_id: str, num_computed_tokens: int) -> tuple[list[int], ...]:
        """Ids of the blocks that hold so many leading tokens, by group."""
        return (self.get_block_ids(request_id)[0][: -(-num_computed_tokens // self.block_size)],)

    # Getting room

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> KVCacheBlocks | None:
        """Room for the tokens of this step; ``None``: there is none. Publishes what the step will have computed."""
        live = self.live.get(request.request_id)
        if live is not None and num_new_tokens and not num_external_computed_tokens:
            # Nearly every decode step ends here: there is room, and no block is filled.
            after = request.num_computed_tokens + num_new_tokens
            if after < live.fills_at and after + num_lookahead_tokens <= len(live.ids) * self.block_size:
                return self.empty_kv_cache_blocks
        if not (num_new_tokens or num_external_computed_tokens or num_new_computed_tokens):
            raise ValueError("there are neither tokens to compute nor computed ones to take over")
        before = request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens
        before = min(before, self.max_model_len)
        after = before + num_new_tokens
        slots = -(-min(after + num_lookahead_tokens, self.max_model_len) // self.block_size)
        if live is None:
            waits = has_scheduled_reqs and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            reserve = (self.watermark_blocks if waits else 0) + reserved_blocks
            live = self._admit(request, num_new_computed_tokens, slots, full_sequence_must_fit, reserve)
            if live is None:
                return None
            new = live.ids[num_new_computed_tokens // self.block_size :]
        elif slots > len(live.ids):
            try:
                granted = self.ledger.allocate({live.name: slots - len(live.ids)})[live.name]
            except OutOfBlocks:
                return None
            new = [block + NULL_BLOCKS for block in granted.tolist()]
            live.ids += new
        else:
            new = []
        if not delay_cache_blocks and self.enable_caching:
            self._publish(request, live, min(after, request.num_tokens), before)
        return Blocks(new) if new else self.empty_kv_cache_blocks

    def _admit(self, request: Request, hit: int, slots: int, must_fit: bool, reserve: int) -> _Live | None:
        name = request.request_id
        if name in self.ledger.state.numbers:  # preempted a moment ago, and a step that still writes its blocks runs
            self._again += 1
            name = f"{name}#{self._again}"
        blocks = hit // self.block_size
        try:
            admission = self.ledger.admit(
                name,
                self._tokens(request),
                items=items_of(request),
                namespace=namespace_of(request),
                max_blocks=blocks,
                blocks=slots,
                must_fit=must_fit,
                reserve=reserve * self.block_size,
            )
        except OutOfBlocks:
            return None
        ids = [block + NULL_BLOCKS for block in admission.block_table.tolist()]
        live = self.live[request.request_id] = _Live(name, ids, 0, 0, request.num_tokens)
        self._published(live, admission.cached_blocks)
        return live

    def _tokens(self, request: Request) -> Any:
        """All tokens of a request as C ints (6 ns each), converted once for a lookup and the admission after it."""
        name, count, tokens = self._asked
        if name != request.request_id or count != request.num_tokens:
            tokens = memoryview(array("i", request.all_token_ids[:]))
            self._asked = (request.request_id, request.num_tokens, tokens)
        return tokens

    # Publishing

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish what is known by now of the tokens that were scheduled before."""
        live = self.live.get(request.request_id)
        if live is not None and self.enable_caching:
            self._publish(request, live, min(num_computed_tokens, request.num_tokens), num_computed_tokens)

    def _publish(self, request: Request, live: _Live, tokens: int, computed: int) -> None:
        """Publish the full blocks of so many leading tokens, of which the first ``computed`` are computed."""
        blocks = tokens // self.block_size
        if blocks <= live.cached:
            return
        generated = None
        if blocks * self.block_size > live.told:
            generated = request.all_token_ids[live.told : blocks * self.block_size]
            live.told = blocks * self.block_size
        settled = max(computed - request.num_in_flight_tokens, 0) // self.block_size
        self.ledger.cache(live.name, blocks, generated=generated, computed=min(max(settled, live.cached), blocks))
        self._published(live, blocks)

    def _published(self, live: _Live, blocks: int) -> None:
        live.cached = blocks
        live.fills_at = (blocks + 1) * self.block_size if self.enable_caching else 1 << 62

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Never called: only a connector's failed load asks for it, and :func:`take_over` refuses connectors."""
        raise NotImplementedError("blocks of a failed load")

    def reset_prefix_cache(self) -> bool:
        """Forget everything cached; refused while anybody holds a block."""
        if self.ledger.state.requests:
            return False
        self.ledger.clear()
        if self.log_stats and self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True

    # Giving back

    def free(self, request: Request) -> None:
        """A request is over, or preempted."""
        live = self.live.pop(request.request_id, None)
        if live is not None:
            self.ledger.release(live.name, release_reason(request))

    def pop_blocks_for_free(self, request: Request) -> list[Any]:
        """Free the name at once, and the blocks when :meth:`Pool.free_blocks` gets the answer: a step still writes."""
        live = self.live.pop(request.request_id, None)
        return [] if live is None else [Held(live.name)]

    # Nothing to do with one group of full attention

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """No layer skips blocks."""

    def new_step_starts(self) -> None:
        """Forget what was looked up: until the next step a request's last token may be replaced."""
        self._asked = ("", 0, None)

    def take_events(self) -> list[Any]:
        """None: ``kvledger events`` publishes them from the log."""
        return []

    def take_new_block_ids(self) -> list[int]:
        """None: no block has to be zeroed."""
        return []

    def record_blocks_for_zeroing(self, request_id: str, start_token: int) -> None:
        """No block has to be zeroed."""

    def take_kv_cache_block_copies(self) -> tuple[list[Any], list[Any]]:
        """None: nothing is copied on write."""
        return [], []

    def take_boundary_state_offloads(self) -> dict[str, list[tuple[int, int, int]]]:
        """None: there are no recurrent states."""
        return {}

    def finalize_partial_tail_offloads(self, request: Request) -> list[tuple[int, int, int]]:
        """None: there are no recurrent states."""
        return []
