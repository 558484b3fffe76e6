"""Configuration of a ledger, validated with messages that say what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

from ipc import writer
from kvledger.groups import full
from kvledger.models import Layers, ModelError, shape_of, size
from statemachine.content import namespace_key
from statemachine.errors import InvalidCommand
from statemachine.events import HostPolicy, LedgerOpened
from statemachine.state.groups import Group, Kind, impossible_groups, parse
from statemachine.state.state import MOST_BLOCKS
from workers.pools.layout import BACKENDS, KVTensor, PoolLayout

_LARGEST = 2**31 - 1
MOST_RANKS = 64
"""Each has a reader line in the log's control segment, and others need some too."""
_LARGEST_SEGMENT = 256 << 20
_OF_POOLS = ("layers", "block_bytes", "tensors", "backend", "checksums")


def _described(layers: Layers) -> str:
    """The layer group of layers of one kind, as it is written."""
    return f"window({layers.window}, blocks=...)" if layers.kind == "window" else "full()"


class ConfigError(ValueError):
    """A setting is impossible, alone or beside another; the message says what to change."""


_Member = TypeVar("_Member", bound=IntEnum)


def member_of(kind: type[_Member], value: object) -> _Member | None:
    """The member of an enumeration that is meant, itself or its name as text; ``None``: there is none of that name."""
    if isinstance(value, str):
        return kind.__members__.get(value.upper().replace("-", "_"))
    return value if isinstance(value, kind) else None


def names_of(kind: type[IntEnum]) -> str:
    """The names of an enumeration's members, for messages."""
    return ", ".join(f"{member.name.lower().replace('_', '-')!r}" for member in kind)


def _expect_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r:.80}")


@dataclass(frozen=True, kw_only=True, repr=False)
class CacheConfig:
    """Sizes and policies of one KV cache.

    Settings are what they mean once the configuration is made: a name has become a member, a share a number of blocks.

    Raises:
        ConfigError: at construction, naming the setting.
    """

    block_size: int = 16
    """Tokens per block."""
    device_blocks: int
    """Blocks of the device pool."""
    host_blocks: int = 0
    """Blocks that may reside in the host pool; 0 = no host tier."""
    host_policy: HostPolicy | str = HostPolicy.OFF
    """When blocks get a copy on the host; or its name, ``"exclusive"`` or ``"write-through"``."""
    host_staging_blocks: int | None = None
    """Host blocks on top for copies in transit; default: an eighth of ``host_blocks``."""
    backup_after: int = 1
    """Write-through copies a block out at this use of it, from 1; caching is the first. 2 or more: selective."""
    watermark_blocks: int | float = 0
    """Blocks that an admission leaves for the growth of requests that run already (nobody runs: it may take all).

    A number between 0 and 1 is a share of ``device_blocks``, rounded up: ``0.01``."""
    chunked_multimodal: bool = True
    """Whether the model can begin inside a multimodal item. If not, a match that would end in one ends before it."""
    weights: str | None = None
    """Version of the model's weights that the engine has loaded. Blocks of one version never match under another.

    ``None``: a new ledger begins without a version, one that is opened again goes on with the version in force."""
    groups: tuple[Group, ...] = ()
    """Kinds of layers, see :mod:`kvledger.groups`; first the one with full attention. None: it is the only one."""
    ranks: int = 0
    """Tensor-parallel ranks, each with a transfer worker and pools of its own; 0 = decisions and log only."""
    layers: int = 1
    block_bytes: int = 4096
    """Bytes of the keys and values of one block in one layer of one rank; with ``tensors`` it follows from them."""
    tensors: tuple[KVTensor, ...] = ()
    """The KV tensors of a layer on one rank, see :mod:`workers.pools.layout`; without any, a block is plain bytes."""
    backend: str = "numpy"
    """Whose memory the device pool is: ``numpy``, ``paddle``, ``paddle-gpu`` or ``cuda``. See ``docs/pools.md``."""
    checksums: bool = False
    """Whether workers keep a checksum of each host block and compare it before they copy the block back."""
    segment_bytes: int = 16 << 20
    """Size of one log segment in shared memory."""
    retain_bytes: int | None = 256 << 20
    """The log may keep this much before old segments go; ``None``: it keeps everything."""
    retain_seconds: float | None = None
    """No event stays in the log for longer than this, and no older state in a snapshot; ``None``: bytes alone decide.

    Holds while the engine calls ``poll()`` and workers read. What is cached is in the state, and stays there."""
    worker_backlog_bytes: int = 128 << 20
    """A transfer worker that keeps the log from giving back more than this is declared lost and replaced.

    One that has nothing to copy looks at the log four times per second: leave room for what is logged meanwhile."""
    transfer_timeout_s: float = 30.0
    """A transfer that some rank has not acknowledged by then has failed."""
    ready_timeout_s: float = field(default=30.0)
    """Workers have this long to start."""

    def __post_init__(self) -> None:
        policy = member_of(HostPolicy, self.host_policy)
        if policy is None:
            raise ConfigError(f"host_policy must be one of {names_of(HostPolicy)}, not {self.host_policy!r:.80}")
        object.__setattr__(self, "host_policy", policy)
        _expect_whole("device_blocks", self.device_blocks, 1, MOST_BLOCKS)
        if isinstance(self.watermark_blocks, float):
            if not 0 <= self.watermark_blocks < 1:
                share = "a share of device_blocks is less than 1, and a number of blocks is a whole one"
                raise ConfigError(f"watermark_blocks {self.watermark_blocks}: {share}")
            object.__setattr__(
                self, "watermark_blocks", math.ceil(round(self.watermark_blocks * self.device_blocks, 6))
            )
        for name, least, most in (
            ("block_size", 1, MOST_BLOCKS),
            ("host_blocks", 0, MOST_BLOCKS // 2),
            ("backup_after", 1, _LARGEST),
            ("watermark_blocks", 0, MOST_BLOCKS),
            ("ranks", 0, MOST_RANKS),
            ("layers", 1, _LARGEST),
            ("block_bytes", 8, _LARGEST),
            ("segment_bytes", writer.LEAST_SEGMENT_BYTES, _LARGEST_SEGMENT),
            ("worker_backlog_bytes", 1, 2**63),
        ):
            _expect_whole(name, getattr(self, name), least, most)
        if self.host_staging_blocks is not None:
            _expect_whole("host_staging_blocks", self.host_staging_blocks, 0, MOST_BLOCKS // 2)
        if self.retain_bytes is not None:
            _expect_whole("retain_bytes", self.retain_bytes, 0, 2**63)
        if self.retain_seconds is not None:
            self._expect_seconds("retain_seconds", 1)
        if self.segment_bytes % 4096:
            raise ConfigError(f"segment_bytes must be a multiple of 4096, not {self.segment_bytes}")
        for name in ("checksums", "chunked_multimodal"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r:.80}")
        if not isinstance(self.weights, str | None):
            raise ConfigError(f"weights is the version of the model's weights, a text, not {self.weights!r:.80}")
        try:
            namespace_key(weights="" if self.weights is None else self.weights)
        except InvalidCommand as error:
            raise ConfigError(f"weights is the version of the model's weights, a text: {error}") from error
        if self.block_bytes % 8:
            raise ConfigError(f"block_bytes must be a multiple of 8, not {self.block_bytes}")
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r:.80}")
        if not isinstance(self.tensors, tuple) or not all(isinstance(tensor, KVTensor) for tensor in self.tensors):
            raise ConfigError(f"tensors must be a tuple of KVTensor, not {self.tensors!r:.80}")
        if self.tensors:
            self._follow_tensors()
        if (policy == HostPolicy.OFF) != (self.host_blocks == 0):
            raise ConfigError(
                f"host_policy {policy.name.lower().replace('_', '-')} does not go with {self.host_blocks} host_blocks: "
                "give the host tier blocks and a policy (exclusive, write-through), or neither"
            )
        if self.groups:
            self._expect_groups()
        if self.watermark_blocks >= self.device_blocks:
            raise ConfigError(
                f"watermark_blocks {self.watermark_blocks} of {self.device_blocks} device_blocks: nothing could be "
                "admitted while a request runs; make it smaller"
            )
        if self.backup_after > 1 and policy != HostPolicy.WRITE_THROUGH:
            raise ConfigError(f"backup_after {self.backup_after} needs host_policy write-through")
        for name in ("transfer_timeout_s", "ready_timeout_s"):
            self._expect_seconds(name, 0)

    def _expect_seconds(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, 1e-9) <= value <= _LARGEST:
            wanted = f"at least {least} second" if least else "more than 0 seconds"
            raise ConfigError(f"{name} must be {wanted}, not {value!r:.80}")

    def _expect_groups(self) -> None:
        groups = self.groups
        if not isinstance(groups, tuple) or not all(isinstance(group, Group) for group in groups):
            raise ConfigError(f"groups is a tuple of what kvledger.groups makes, not {groups!r:.80}")
        for group in groups:
            if not isinstance(group.name, str) or any(type(number) is not int for number in group[2:]):
                raise ConfigError(f"a layer group has a name and whole numbers, not {group!r:.120}")
        if groups[0].kind != Kind.FULL or any(group.kind == Kind.FULL for group in groups[1:]):
            raise ConfigError("the first of the groups, and no other, is full(): its pool are the device_blocks")
        wrong = impossible_groups(self.side_groups, MOST_BLOCKS)
        if wrong:
            raise ConfigError(f"groups: {wrong}")
        if len(groups) > 1 and self.host_policy != HostPolicy.OFF:
            raise ConfigError("groups: layer groups live on the device alone: leave out host_blocks and host_policy")
        if len(groups) > 1 and self.ranks:
            raise ConfigError(
                "groups: the pools of layer groups are the engine's own: leave out ranks, layers and tensors"
            )

    @property
    def side_groups(self) -> str:
        """The groups beside the first one, as the ledger's first event has them."""
        return "\n".join(group.text() for group in self.groups[1:])

    def __repr__(self) -> str:
        """The settings that are not the defaults."""
        told = []
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.default is MISSING or value != setting.default:
                text = f"HostPolicy.{value.name}" if isinstance(value, HostPolicy) else repr(value)
                told.append(f"{setting.name}={text}")
        return f"CacheConfig({', '.join(told)})"

    def _follow_tensors(self) -> None:
        try:
            for tensor in self.tensors:
                tensor.check()
        except ValueError as error:
            raise ConfigError(f"tensors: {error}") from error
        names = [tensor.name for tensor in self.tensors]
        if len({*names}) < len(names):
            raise ConfigError(f"tensors: two have the same name: {', '.join(names)}")
        size = sum(tensor.block_bytes for tensor in self.tensors)
        if self.block_bytes not in (size, CacheConfig.block_bytes):
            raise ConfigError(f"block_bytes {self.block_bytes} contradicts tensors, which have {size}: leave it out")
        object.__setattr__(self, "block_bytes", size)

    @classmethod
    def for_model(
        cls,
        model: str | Path | Mapping[str, Any],
        *,
        memory: int,
        host_memory: int = 0,
        block_size: int = 16,
        ranks: int = 1,
        dtype: str | None = None,
        **settings: Any,
    ) -> CacheConfig:
        """The configuration for a model: layers, tensors and numbers of blocks from its ``config.json``.

        Args:
            model: a local ``config.json``, the folder it lies in, or what is in it. Nothing is downloaded.
            memory: bytes of device memory of one rank that the cache may take.
            host_memory: bytes of host memory of one rank for the host tier, staging blocks included.
            ranks: tensor-parallel ranks.
            dtype: element type of the cache; default: the model's own.
            settings: any others of this class; ``host_policy`` is exclusive where there is host memory.

        Raises:
            ConfigError: the model is not known, has layers of several kinds, or does not fit; it says what to do.
        """
        try:
            shape = shape_of(model, block_size=block_size, ranks=ranks, dtype=dtype)
            sizing = size(shape, block_size=block_size, memory=memory, host_memory=host_memory)
        except ModelError as error:
            raise ConfigError(str(error)) from error
        if len(shape.layers) > 1 or shape.layers[0].kind != "full":
            kinds = ", ".join(f"{layers.number} {layers.kind}" for layers in shape.layers)
            raise ConfigError(
                f"{shape.model_type!r} has layers of several kinds ({kinds}); one block table covers them all only if "
                "each keeps every token: give the configuration by hand if the engine does that (docs/pools.md), or "
                f"with groups=({', '.join(_described(layers) for layers in shape.layers)}), docs/groups.md"
            )
        if sizing.host_blocks:
            settings = {"host_policy": HostPolicy.EXCLUSIVE, **settings}
        return cls(
            block_size=block_size,
            device_blocks=sizing.device_blocks,
            host_blocks=sizing.host_blocks,
            ranks=ranks,
            layers=shape.layers[0].number,
            tensors=shape.layers[0].tensors,
            **settings,
        )

    @classmethod
    def of(cls, opened: LedgerOpened, segment_bytes: int) -> CacheConfig:
        """What a ledger says about itself. Time-outs and what is retained are not in it: they get their defaults."""
        layout = PoolLayout.parse(opened.layout) if opened.ranks else None
        sizes: dict[str, Any] = {}
        if layout is not None:
            sizes = {name: getattr(layout, name) for name in _OF_POOLS}
        return cls(
            block_size=opened.block_size,
            device_blocks=opened.device_blocks,
            host_blocks=opened.host_blocks,
            host_policy=HostPolicy(opened.host_policy),
            host_staging_blocks=opened.host_staging_blocks,
            backup_after=opened.backup_after,
            chunked_multimodal=bool(opened.chunked_multimodal),
            ranks=opened.ranks,
            segment_bytes=segment_bytes,
            groups=(full(), *parse(opened.groups)) if opened.groups else (),
            **sizes,
        )

    def expect(self, opened: LedgerOpened) -> None:
        """Check that a ledger was created with these sizes and policies.

        Raises:
            ConfigError: naming the first setting that differs.
        """
        theirs = CacheConfig.of(opened, self.segment_bytes)
        names = ["block_size", "device_blocks", "host_blocks", "host_policy", "backup_after", "staging_blocks", "ranks"]
        names += ["chunked_multimodal", "side_groups"]
        if self.ranks and theirs.ranks:
            names += _OF_POOLS
        for name in names:
            ours, there = getattr(self, name), getattr(theirs, name)
            if ours != there:
                name = {"staging_blocks": "host_staging_blocks", "side_groups": "groups"}.get(name, name)
                raise ConfigError(f"{name} is {there!r} in this ledger, not {ours!r}: open it without a configuration")

    @property
    def staging_blocks(self) -> int:
        """Host blocks for copies in transit."""
        if self.host_staging_blocks is not None:
            return self.host_staging_blocks if self.host_blocks else 0
        return -(-self.host_blocks // 8)

    @property
    def layout(self) -> PoolLayout:
        """The pools that the workers attach."""
        return PoolLayout(
            ranks=self.ranks,
            layers=self.layers,
            block_bytes=self.block_bytes,
            device_blocks=self.device_blocks,
            host_blocks=self.host_blocks + self.staging_blocks,
            tensors=self.tensors,
            backend=self.backend,
            checksums=self.checksums,
        )

    def opened(self, layout: str = "", pools: str = "") -> LedgerOpened:
        """The first event of a ledger with this configuration."""
        return LedgerOpened(
            self.block_size,
            self.device_blocks,
            self.host_blocks,
            self.staging_blocks,
            member_of(HostPolicy, self.host_policy) or HostPolicy.OFF,
            self.ranks,
            layout,
            pools,
            self.backup_after,
            self.chunked_multimodal,
            self.weights or "",
            self.side_groups,
        )
