"""What a benchmark says: figures, each a ratio against a peer or a floor of the same run."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing measured, beside the same thing at a peer, or at a floor: the least that it could cost."""

    name: str
    unit: str
    ours: float
    against: str
    """Whose ``theirs`` is."""
    theirs: float
    ratios: list[float]
    """How many times better ours is (below 1: worse), by repetition."""
    least_ratio: float | None = None
    """The goal, if it is a ratio."""
    at_most: float | None = None
    """The goal, if it is a limit on ``ours``."""
    at_least: float | None = None
    """The goal, if ``ours`` must not be below."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The median of the repetitions."""
        return statistics.median(self.ratios)

    @property
    def goal(self) -> str:
        """The goal in words; empty: none."""
        wanted = []
        if self.least_ratio is not None:
            wanted.append(f"≥ {self.least_ratio:g} ×")
        if self.at_most is not None:
            wanted.append(f"≤ {self.at_most:,g}")
        if self.at_least is not None:
            wanted.append(f"≥ {self.at_least:,g}")
        return ", ".join(wanted)

    @property
    def reached(self) -> bool:
        """Whether the goal is reached; true without one."""
        return (
            (self.least_ratio is None or self.ratio >= self.least_ratio)
            and (self.at_most is None or self.ours <= self.at_most)
            and (self.at_least is None or self.ours >= self.at_least)
        )

    @property
    def missed_by(self) -> float:
        """How many times better it would have to be to reach its goal; at most 1 where it is reached."""
        factors = [0.0]
        if self.least_ratio is not None:
            factors.append(self.least_ratio / self.ratio)
        if self.at_most is not None:
            factors.append(self.ours / self.at_most)
        if self.at_least is not None:
            factors.append(self.at_least / self.ours)
        return max(factors)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the rest."""
        return {**asdict(self), "ratio": self.ratio, "goal": self.goal, "reached": self.reached}


FIELDS = frozenset(one.name for one in fields(Figure))


def faster(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios of costs, repetition by repetition."""
    return [other / own for own, other in zip(ours, theirs, strict=True)]


def figure_of(
    name: str, unit: str, ours: Sequence[float], against: str, theirs: Sequence[float], **more: Any
) -> Figure:
    """A figure from costs by repetition (less is better)."""
    return Figure(
        name=name,
        unit=unit,
        ours=statistics.median(ours),
        against=against,
        theirs=statistics.median(theirs),
        ratios=faster(ours, theirs),
        **more,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the others does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def number(value: float) -> str:
    """Three digits are enough."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def verdict(figure: Figure) -> str:
    """``reached``, ``not reached`` and by how much, or nothing."""
    if not figure.goal:
        return ""
    return "reached" if figure.reached else f"not reached, by {number(figure.missed_by)} ×"


def show(title: str, figures: Sequence[Figure], skipped: Sequence[str] = ()) -> None:
    """Print them."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("", "unit", "kvledger", "against", "", "ratio", "wanted", ""):
        table.add_column(name, justify="right" if name in ("kvledger", "ratio") else "left")
    for one in figures:
        table.add_row(
            one.name,
            one.unit,
            number(one.ours),
            one.against,
            number(one.theirs),
            number(one.ratio),
            one.goal,
            verdict(one),
        )
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    for reason in skipped:
        console.print(f"skipped: {reason}")


def alone(title: str, figures: Callable[[bool], tuple[list[Figure], list[str]]]) -> None:
    """``python -m benchmarks.NAME [--quick]`` for a benchmark without other arguments."""
    unknown = [argument for argument in sys.argv[1:] if argument != "--quick"]
    if unknown:
        sys.exit(f"usage: python -m benchmarks.NAME [--quick], not {' '.join(unknown)}")
    show(title, *figures("--quick" in sys.argv))


def machine() -> dict[str, Any]:
    """What it was measured on; nothing that names the machine."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "processor": cpu[1].strip() if cpu else platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


_PACKAGES = ("numpy", "xxhash", "crc32c", "pyzmq", "torch", "vllm", "sglang")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that was measured; ``+`` if files were changed since."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
