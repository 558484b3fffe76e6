"""The shape of the KV pools: how many blocks of how many bytes, in how many layers, on how many ranks."""

from __future__ import annotations

import json
from typing import NamedTuple, Self

import xxhash


class PoolLayout(NamedTuple):
    """What engine and workers must agree on. ``block_bytes``: keys and values of one block in one layer of one rank."""

    ranks: int
    layers: int
    block_bytes: int
    device_blocks: int
    host_blocks: int

    def text(self) -> str:
        """As it is written into the log and handed to workers."""
        return json.dumps(self._asdict(), separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From :meth:`text`. Raises ``ValueError`` for anything else."""
        try:
            return cls(**{name: int(value) for name, value in json.loads(text).items()})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a pool layout: {text!r}") from error

    @property
    def fingerprint(self) -> int:
        """Differs when anything differs."""
        return xxhash.xxh3_64_intdigest(self.text().encode())
