"""What can be set for kvledger inside vLLM: in ``additional_config["kvledger"]`` or in the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvledger.config import ConfigError

SUPPORTED = ("0.32.", "0.33.")
"""Versions of vLLM whose scheduler is known: what it calls is private there, and changes."""


class Settings(NamedTuple):
    """How the ledger inside a vLLM engine is called, and how much of its log is kept."""

    name: str
    segment_bytes: int
    retain_bytes: int | None


_READERS: Mapping[str, Callable[[str], Any]] = {
    "name": str,
    "segment_bytes": int,
    "retain_bytes": lambda text: None if text.lower() == "all" else int(text),
}


def settings(additional: Mapping[str, Any] | None, rank: int, name: str = "") -> Settings:
    """The settings of one engine.

    ``KVLEDGER_NAME``, ``KVLEDGER_SEGMENT_BYTES`` and ``KVLEDGER_RETAIN_BYTES`` (``all`` keeps everything) come before
    what ``additional_config={"kvledger": {...}}`` says. The name, or the one that is passed, gets the data-parallel
    rank at its end.

    Raises:
        ConfigError: naming the setting.
    """
    given = dict((additional or {}).get("kvledger") or {})
    unknown = sorted(given.keys() - _READERS.keys())
    if unknown:
        raise ConfigError(f"additional_config['kvledger'] knows {', '.join(_READERS)}, not {', '.join(unknown)}")
    for key, read in _READERS.items():
        text = os.environ.get(f"KVLEDGER_{key.upper()}", given.get(key))
        if text is None:
            continue
        try:
            given[key] = read(str(text))
        except ValueError as error:
            raise ConfigError(f"kvledger's {key} in vLLM is {text!r:.80}: {error}") from error
    name = name or given.get("name", "vllm")
    return Settings(f"{name}-{rank}", given.get("segment_bytes", 16 << 20), given.get("retain_bytes", 256 << 20))


def expect_version(version: str) -> None:
    """Raises :class:`ConfigError` where vLLM is one whose scheduler is not known."""
    if not version.startswith(SUPPORTED):
        raise ConfigError(
            f"vLLM {version} is not one of {', '.join(text + 'x' for text in SUPPORTED)}: what its scheduler asks of a "
            "block manager changes between versions; run it with its own manager, or another kvledger"
        )
