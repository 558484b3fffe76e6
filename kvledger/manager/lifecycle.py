"""What a manager begins with: a ledger that it creates, or the one that a dead engine left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from ipc import Control, LogWriter, record_bytes
from ipc.names import check_name
from ipc.ownership import remove_objects
from ipc.writer import next_epoch, segment_bytes_for
from kvledger.config import MOST_RANKS, CacheConfig, ConfigError
from kvledger.manager.handoffs import end_pushers, end_receiving
from kvledger.manager.rebuild import Rebuilt, rebuild
from statemachine import commands
from statemachine.apply import genesis
from statemachine.decide import decide
from statemachine.events import Event, LedgerOpened
from statemachine.records import codec
from statemachine.state.state import State
from workers.pools.backends import create_pools, ids_of, reopen_pools
from workers.pools.interface import Pools
from workers.processes.supervisor import end_strays


class Beginning(NamedTuple):
    """A ledger that this process has locked, before its first event."""

    config: CacheConfig
    writer: LogWriter
    state: State
    pools: Sequence[Pools]
    events: list[Event]
    """The first transaction of this engine."""
    rebuilt: Rebuilt | None = None
    """What a dead engine has left; ``None``: the ledger is new, and the state has the first event already."""
    lost: Mapping[str, str] = MappingProxyType({})
    """Tiers whose memory is not what it was, and why."""
    differs: str = ""
    """Where the configuration has other sizes than the ledger: which. It is to be resized."""


def created(name: str, config: CacheConfig) -> Beginning:
    """Create a ledger with its pools. Raises as :meth:`CacheManager.create`."""
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"config is a CacheConfig, not {type(config).__name__}")
    writer = LogWriter.create(
        check_name(name),
        schema_hash=codec.SCHEMA_HASH,
        segment_bytes=config.segment_bytes,
        retain_bytes=config.retain_bytes,
    )
    try:
        layout = config.layout if config.ranks else None
        pools = create_pools(name, layout) if layout is not None else []
        opened = config.opened(layout.text() if layout is not None else "", ids_of(pools))
        return Beginning(config, writer, genesis(opened), pools, [opened])
    except BaseException:
        writer.close(unlink=True)
        raise


def reopened(name: str, config: CacheConfig | None, *, resizable: bool = False) -> Beginning:
    """Lock a dead engine's ledger and rebuild its state. Raises as :meth:`CacheManager.open`.

    ``resizable``: without pools, the configuration may have other numbers of blocks.
    """
    control = Control.open(check_name(name))
    try:
        control.lock()
        rebuilt = rebuild(control)
        state = rebuilt.state
        if config is None:
            config = CacheConfig.of(state.opened, rebuilt.segment_bytes)
        differs = ""
        try:
            config.expect(state.opened)
        except ConfigError as error:
            if not resizable or not _other_sizes(config, state.opened):
                raise
            differs = str(error)
        layout = config.layout if config.ranks else None
        end_strays(name, config.ranks, state.workers)
        pools, lost = reopen_pools(name, layout, state.pools) if layout is not None else ([], {})
        if lost:
            end_strays(name, config.ranks, {})
        end_pushers(name)
        end_receiving(name)  # nothing becomes free while somebody else may still write it
        epoch = next_epoch(control)
        events = decide(state, commands.StartEpoch(epoch, rebuilt.last_sequence))
        size = sum(record_bytes(len(codec.encode(event)[3])) for event in events)
        writer = LogWriter.resume(
            control,
            rebuilt.last_sequence,
            epoch=epoch,
            segment_bytes=max(config.segment_bytes, segment_bytes_for(size)),
            retain_bytes=config.retain_bytes,
        )
    except BaseException:
        control.close()
        raise
    return Beginning(config, writer, state, pools, events, rebuilt, lost, differs)


def remove(name: str) -> None:
    """Remove a dead engine's ledger, and end what it has left running.

    Raises:
        ipc.WriterAlive: an engine is running on it.
        workers.WorkerFailed, HandoffError: a process that may still write cannot be ended. Nothing was removed.
        ipc.LedgerError: it cannot be looked at.
    """
    control = Control.open(name)
    try:
        control.lock()
        end_pushers(name)
        end_receiving(name)
        end_strays(name, MOST_RANKS, {})
        remove_objects(name)
    finally:
        control.close()


def _other_sizes(config: CacheConfig, opened: LedgerOpened) -> bool:
    """Whether a ledger differs from a configuration in its number of blocks alone, and no pool has to have another."""
    sizes = {name: getattr(config, name) for name in ("device_blocks", "host_blocks", "host_staging_blocks")}
    try:
        theirs = replace(CacheConfig.of(opened, config.segment_bytes), **sizes)
        config.expect(theirs.opened(opened.layout, opened.pools))
    except ConfigError:
        return False
    return not config.ranks
