"""A ledger beside vLLM's own manager, which decides everything: what it did is recorded, and nothing is replaced.

On the scheduler's thread a call is only noted, with references; another thread tells the ledger, which takes over
vLLM's block ids one by one (:meth:`kvledger.CacheManager.adopt_blocks`) and compares what vLLM did with what it would
have done. Where they differ it writes an ``EngineDeparted``, and follows vLLM as far as a ledger can.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from array import array
from queue import SimpleQueue
from typing import Any, NamedTuple

from vllm.v1.request import Request

from kvledger.adapters.vllm.requests import NULL_BLOCKS, items_of, namespace_of, release_reason
from kvledger.manager.manager import CacheManager
from kvledger.text import logged, printable
from statemachine.errors import InvalidCommand, OutOfBlocks
from statemachine.events import ReleaseReason

MOST_BEHIND = 100_000
"""Steps that may wait to be told to the ledger; an engine that is further ahead ends its recording."""
_PATIENCE_S = 60.0
_log = logging.getLogger(__name__)


class Held(NamedTuple):
    """A request has got blocks, or has published some."""

    request: Request
    first: bool
    """Whether it had none before."""
    ids: list[int]
    """vLLM's ids of its new blocks; of all, where these are the first."""
    hit: int
    """So many of the first ones were cached."""
    tokens: int
    """It had so many tokens then."""
    cached: int
    """Leading blocks that are published."""
    computed: int
    """Leading tokens that were computed before this step."""


class Refused(NamedTuple):
    """There was no room."""

    request: Request
    new_tokens: int
    tokens: int
    computed: int
    options: dict[str, Any]


class Freed(NamedTuple):
    """A request has given its blocks back."""

    name: str
    reason: ReleaseReason


class Cleared(NamedTuple):
    """Nothing cached can be found any more."""


class Lost(NamedTuple):
    """What comes now is not recorded."""

    why: str


class Shadow:
    """Tells a ledger what has been noted, and compares."""

    def __init__(self, ledger: CacheManager, own: Any) -> None:
        self._ledger = ledger
        self._own = own
        self._block_size = ledger.config.block_size
        self._known: dict[str, int] = {}
        """Tokens of each request whose content the ledger knows."""
        self._cached: dict[str, int] = {}
        """Blocks that each request has published."""
        self.departures = 0

    def tell(self, noted: Any) -> None:
        """One note."""
        match noted:
            case Held():
                self._held(noted)
            case Refused():
                self._refused(noted)
            case Freed():
                if self._known.pop(noted.name, None) is not None:
                    self._ledger.release(noted.name, noted.reason)
            case Cleared():
                self._ledger.clear(force=True)
            case Lost():
                self._depart("", noted.why)

    def _depart(self, name: str, what: str) -> None:
        self.departures += 1
        if self.departures == 1:
            _log.warning(
                "ledger %s: vLLM departed from what it would do: %s: %s", self._ledger.name, logged(name), logged(what)
            )
        self._ledger.note_departure(name, what)

    def _held(self, noted: Held) -> None:
        name = noted.request.request_id
        ids = [id - NULL_BLOCKS for id in noted.ids]
        try:
            if noted.first:
                ids = self._begun(noted, ids)
            elif name not in self._known:
                return  # it was given up before
            self._ledger.adopt_blocks(name, ids)
            self._publish(name, noted)
        except InvalidCommand as error:
            self._depart(name, f"it is not followed any further: {error}")
            self._known.pop(name, None)
            if name in self._ledger.state.numbers:
                self._ledger.release(name, ReleaseReason.FAILED)

    def _begun(self, noted: Held, ids: list[int]) -> list[int]:
        """A request begins with what both have found; returns the blocks that it has beside."""
        request, name, ledger = noted.request, noted.request.request_id, self._ledger
        tokens, about = self._tokens(request, noted.tokens), self._about(request)
        found = 0
        if self._own.prefix_cache_lookup_enabled(request):
            found, _ = ledger.peek(tokens, max_blocks=(noted.tokens - 1) // self._block_size, **about)
            found -= bool(found and self._own.use_eagle)
        table = ledger.match(name, tokens, max_blocks=min(found, noted.hit), **about).block_table.tolist()
        same = next((at for at, pair in enumerate(zip(table, ids)) if pair[0] != pair[1]), len(table))
        if same < len(table):
            ledger.release(name, ReleaseReason.FAILED)
            ledger.match(name, tokens, max_blocks=same, **about)
            self._depart(name, f"position {same} of its block table is block {ids[same]} there and {table[same]} here")
        elif found != noted.hit:
            self._depart(name, f"{noted.hit} blocks of its prompt were cached there, {found} here")
        self._known[name] = noted.tokens
        self._cached[name] = same
        return ids[same:]

    def _publish(self, name: str, noted: Held) -> None:
        blocks, size = noted.cached, self._block_size
        if blocks <= self._cached[name]:
            return
        generated = None
        known = self._known[name]
        if blocks * size > known:
            generated = self._tokens(noted.request, blocks * size, known)
            self._known[name] = blocks * size
        computed = min(max(noted.computed // size, self._cached[name]), blocks)
        self._ledger.cache(name, blocks, generated=generated, computed=computed)
        self._cached[name] = blocks

    def _refused(self, noted: Refused) -> None:
        """vLLM had no room: the ledger is asked the same, which writes down that it has none either."""
        request, name, ledger, options = noted.request, noted.request.request_id, self._ledger, noted.options
        hit = options.get("num_new_computed_tokens", 0)
        after = noted.computed + hit + noted.new_tokens + options.get("num_lookahead_tokens", 0)
        slots = -(-min(after, self._own.max_model_len) // self._block_size)
        with contextlib.suppress(OutOfBlocks):
            if name in self._known:
                number = ledger.state.numbers[name]
                missing = slots - len(ledger.state.requests[number].table)
                if missing > ledger.available_blocks():
                    ledger.allocate({name: missing})
                self._depart(name, f"{missing} blocks were refused, {ledger.available_blocks()} are available here")
                return
            reserve = options.get("reserved_blocks", 0)
            if options.get("has_scheduled_reqs", True):
                reserve += self._own.watermark_blocks
            ledger.admit(
                name,
                self._tokens(request, noted.tokens),
                **self._about(request),
                max_blocks=hit // self._block_size,
                blocks=slots,
                must_fit=options.get("full_sequence_must_fit", False),
                reserve=reserve * self._block_size,
            )
            self._depart(name, f"it was not admitted, {ledger.available_blocks()} blocks are left here when it is")
            ledger.release(name, ReleaseReason.FAILED)

    def _tokens(self, request: Request, stop: int, start: int = 0) -> memoryview:
        return memoryview(array("i", request.all_token_ids[start:stop]))

    def _about(self, request: Request) -> dict[str, Any]:
        return {"items": items_of(request), "namespace": namespace_of(request)}


class Recorder:
    """Notes what the manager of a scheduler does, and has it told to a ledger by a thread of its own."""

    def __init__(self, scheduler: Any, ledger: CacheManager) -> None:
        self.ledger = ledger
        self._shadow = Shadow(ledger, scheduler.kv_cache_manager)
        self._queue: SimpleQueue[tuple[int, list[Any]] | threading.Event | None] = SimpleQueue()
        self._noted: list[Any] = []
        self._step = 0
        self._ended = False
        self._thread = threading.Thread(target=self._told, name=f"kvledger {ledger.name}", daemon=True)
        self._listen_to(scheduler.kv_cache_manager)
        self._count_steps(scheduler)
        self._thread.start()

    def _listen_to(self, own: Any) -> None:
        table = own.coordinator.single_type_managers[0]
        cached, tables, size = table.num_cached_block, table.req_to_blocks, table.block_size
        empty, noted = own.empty_kv_cache_blocks, self._noted
        told: dict[str, int] = {}
        allocate, cache, free, reset = own.allocate_slots, own.cache_blocks, own.free, own.reset_prefix_cache

        def allocated(request: Any, new_tokens: int, *args: Any, **options: Any) -> Any:
            new = allocate(request, new_tokens, *args, **options)
            name = request.request_id
            if new is empty and told.get(name) == cached.get(name, 0):
                return new  # nearly every decode step
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            if new is None:
                noted.append(Refused(request, new_tokens, request.num_tokens, request.num_computed_tokens, options))
                return new
            first = name not in told
            hit = options.get("num_new_computed_tokens", 0)
            ids = [block.block_id for block in tables[name]] if first else new.get_block_ids()[0]
            told[name] = now = cached.get(name, 0)
            noted.append(Held(request, first, ids, hit // size, request.num_tokens, now, computed + hit))
            return new

        def published(request: Any, tokens: int) -> None:
            cache(request, tokens)
            name = request.request_id
            now = cached.get(name, 0)
            if told.get(name, now) != now:
                told[name] = now
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                noted.append(Held(request, False, [], 0, request.num_tokens, now, computed))

        def freed(request: Any) -> None:
            free(request)
            if told.pop(request.request_id, None) is not None:
                noted.append(Freed(request.request_id, release_reason(request)))

        def cleared() -> bool:
            done: bool = reset()
            if done:
                noted.append(Cleared())
            return done

        own.allocate_slots, own.cache_blocks, own.free, own.reset_prefix_cache = allocated, published, freed, cleared

    def _count_steps(self, scheduler: Any) -> None:
        schedule, update, shutdown = scheduler.schedule, scheduler.update_from_output, scheduler.shutdown

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            self._step += 1
            output = schedule(*args, **kwargs)
            self._pass_on()
            return output

        def updated(*args: Any, **kwargs: Any) -> Any:
            outputs = update(*args, **kwargs)
            self._pass_on()
            return outputs

        def closed(*args: Any, **kwargs: Any) -> Any:
            try:
                return shutdown(*args, **kwargs)
            finally:
                self.close()

        scheduler.schedule, scheduler.update_from_output, scheduler.shutdown = scheduled, updated, closed

    def _pass_on(self) -> None:
        noted = self._noted
        if not noted:
            return
        if not self._ended:
            self._queue.put((self._step, noted.copy()))
            if self._queue.qsize() > MOST_BEHIND:
                self._end(f"nothing is recorded from step {self._step} on: it is {MOST_BEHIND:,} steps behind")
        noted.clear()

    def _end(self, why: str) -> None:
        self._ended = True
        _log.error("ledger %s: %s", self.ledger.name, printable(why))
        self._queue.put((self._step, [Lost(why)]))

    def _told(self) -> None:
        self.ledger.adopt_thread()
        try:
            while (batch := self._queue.get()) is not None:
                if isinstance(batch, threading.Event):
                    batch.set()
                    continue
                step, noted = batch
                with self.ledger.step(step):
                    for each in noted:
                        self._shadow.tell(each)
        except Exception:
            self._ended = True
            _log.exception("ledger %s: the recording has ended; the engine goes on", self.ledger.name)
        finally:
            self.ledger.close()

    @property
    def departures(self) -> int:
        """How often vLLM has done what the ledger would not have done."""
        return self._shadow.departures

    def close(self) -> None:
        """Tell the ledger what is left, and close it."""
        self._pass_on()
        self._queue.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            _log.error("ledger %s: the end of the recording was not written in time", self.ledger.name)

    def flush(self) -> None:
        """Wait until the ledger has been told everything up to now."""
        self._pass_on()
        told = threading.Event()
        self._queue.put(told)
        while self._thread.is_alive() and not told.wait(0.1):
            pass
