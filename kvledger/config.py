"""Configuration of a ledger, validated with messages that say what to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from statemachine.events import HostPolicy, LedgerOpened
from workers.layout import BACKENDS, KVTensor, PoolLayout

_LARGEST_ID = 2**31 - 1
_OF_POOLS = ("layers", "block_bytes", "tensors", "backend")


class ConfigError(ValueError):
    """A setting is impossible, alone or beside another; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes and policies of one KV cache.

    Raises:
        ConfigError: at construction, naming the setting.
    """

    block_size: int = 16
    """Tokens per block."""
    device_blocks: int
    """Blocks of the device pool."""
    host_blocks: int = 0
    """Blocks that may reside in the host pool; 0 = no host tier."""
    host_policy: HostPolicy = HostPolicy.OFF
    host_staging_blocks: int | None = None
    """Host blocks on top for copies in transit; default: an eighth of ``host_blocks``."""
    backup_after: int = 1
    """Write-through copies a block out at its so-manieth use; caching it is the first. 2 or more: selective."""
    watermark_blocks: int = 0
    """Blocks that an admission leaves for the growth of requests that run already (nobody runs: it may take all)."""
    chunked_multimodal: bool = True
    """Whether the model can begin inside a multimodal item. If not, a match that would end in one ends before it."""
    weights: str = ""
    """Version of the model's weights that the engine begins with (or has loaded when it opens the ledger again)."""
    ranks: int = 0
    """Tensor-parallel ranks, each with a transfer worker and pools of its own; 0 = decisions and log only."""
    layers: int = 1
    block_bytes: int = 4096
    """Bytes of the keys and values of one block in one layer of one rank; with ``tensors`` it follows from them."""
    tensors: tuple[KVTensor, ...] = ()
    """The KV tensors of a layer on one rank, see :mod:`workers.layout`; without any, a block is plain bytes."""
    backend: str = "numpy"
    """Whose memory the device pool is: ``numpy``, ``paddle``, ``paddle-gpu`` or ``cuda``. See ``docs/pools.md``."""
    segment_bytes: int = 16 << 20
    """Size of one log segment in shared memory."""
    retain_bytes: int | None = 256 << 20
    """The log may keep this much before old segments go; ``None``: it keeps everything."""
    transfer_timeout_s: float = 30.0
    """A transfer that some rank has not acknowledged by then has failed."""
    ready_timeout_s: float = field(default=30.0)
    """Workers have this long to start."""

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 1),
            ("device_blocks", 1),
            ("host_blocks", 0),
            ("backup_after", 1),
            ("watermark_blocks", 0),
            ("ranks", 0),
            ("layers", 1),
            ("block_bytes", 8),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_ID:
                raise ConfigError(f"{name} must be a whole number from {least} to {_LARGEST_ID}, not {value!r}")
        if self.host_staging_blocks is not None and not 0 <= self.host_staging_blocks <= _LARGEST_ID:
            raise ConfigError(f"host_staging_blocks must be 0 or more, not {self.host_staging_blocks!r}")
        if self.block_bytes % 8:
            raise ConfigError(f"block_bytes must be a multiple of 8, not {self.block_bytes}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        if self.tensors:
            self._follow_tensors()
        if (self.host_policy == HostPolicy.OFF) != (self.host_blocks == 0):
            raise ConfigError(
                f"host_policy {self.host_policy.name.lower()} does not go with {self.host_blocks} host_blocks: "
                "give the host tier blocks and a policy (exclusive, write-through), or neither"
            )
        for name in ("transfer_timeout_s", "ready_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, not {getattr(self, name)!r}")

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
    def of(cls, opened: LedgerOpened, segment_bytes: int) -> CacheConfig:
        """What a ledger says about itself. Time-outs and ``retain_bytes`` are not in it: they get their defaults."""
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
            ranks=opened.ranks,
            segment_bytes=segment_bytes,
            **sizes,
        )

    def expect(self, opened: LedgerOpened) -> None:
        """Check that a ledger was created with these sizes and policies.

        Raises:
            ConfigError: naming the first setting that differs.
        """
        theirs = CacheConfig.of(opened, self.segment_bytes)
        names = ["block_size", "device_blocks", "host_blocks", "host_policy", "backup_after", "staging_blocks", "ranks"]
        if self.ranks and theirs.ranks:
            names += _OF_POOLS
        for name in names:
            ours, there = getattr(self, name), getattr(theirs, name)
            if ours != there:
                name = "host_staging_blocks" if name == "staging_blocks" else name
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
        )

    def opened(self, layout: str = "", pools: str = "") -> LedgerOpened:
        """The first event of a ledger with this configuration."""
        return LedgerOpened(
            self.block_size,
            self.device_blocks,
            self.host_blocks,
            self.staging_blocks,
            self.host_policy,
            self.ranks,
            layout,
            pools,
            self.backup_after,
        )
