"""Which ratios changed between two commits: ``python -m benchmarks.compare --base COMMIT``, or of two JSON files.

Only ratios are compared, each against a peer or a floor of its own run, so that a slower machine or a busy minute does
not count. With ``--base`` the working tree and the other commit (with the benchmarks of the working tree) take turns.
A ratio is *worse* if its median fell by more than a tenth, and by more than the repetitions differ among themselves.
Exit code: 0 nothing is worse, 1 something is, 2 wrong use, or nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.figures import number

_ROOT = Path(__file__).resolve().parents[1]
_PARTS = "contest,decode,lifecycle,replay"
_TOLERANCE = 0.1
_ROUNDS = 2

Ratios = dict[tuple[str, str, str], list[float]]
"""By part, name and opponent: a ratio per repetition."""


class CannotMeasure(Exception):
    """The benchmarks did not run; what they said stands above."""


class Change(NamedTuple):
    """One ratio that is not what it was."""

    part: str
    name: str
    against: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        """Below 1: worse."""
        return self.after / self.before


def ratios_of(report: dict[str, Any]) -> Ratios:
    """All ratios of a report of ``python -m benchmarks``."""
    return {
        (part, one["name"], one["against"]): one["ratios"]
        for part, content in report["parts"].items()
        for one in content["figures"]
    }


def changes(before: Ratios, after: Ratios) -> list[Change]:
    """What changed by more than the noise, the worst first. What only one side has is left out."""
    found = []
    for key in before.keys() & after.keys():
        change = Change(*key, statistics.median(before[key]), statistics.median(after[key]))
        noise = max(_TOLERANCE, _spread(before[key]), _spread(after[key]))
        if not 1 - noise <= change.factor <= 1 / (1 - min(noise, 0.9)):
            found.append(change)
    return sorted(found, key=lambda change: change.factor)


def _spread(ratios: list[float]) -> float:
    """Half of the range, as a share of the median."""
    return (max(ratios) - min(ratios)) / statistics.median(ratios) / 2


def measured(base: str, parts: str, rounds: int, quick: bool) -> tuple[Ratios, Ratios]:
    """Run the parts in both trees, by turns."""
    before: Ratios = {}
    after: Ratios = {}
    with tempfile.TemporaryDirectory(prefix="kvledger-bench-") as folder:
        other = Path(folder) / "base"
        other.mkdir()
        archive = subprocess.run(["git", "archive", base], cwd=_ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(other)], input=archive, check=True)
        shutil.rmtree(other / "benchmarks", ignore_errors=True)
        shutil.copytree(_ROOT / "benchmarks", other / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        for turn in range(rounds):
            sides = [(other, before), (_ROOT, after)]
            for tree, ratios in sides if turn % 2 == 0 else sides[::-1]:
                path = Path(folder) / "figures.json"
                path.unlink(missing_ok=True)
                command = [sys.executable, "-m", "benchmarks", "--no-page", "--only", parts, "--json", str(path)]
                subprocess.run(command + ["--quick"] * quick, cwd=tree, stdout=subprocess.DEVNULL)
                if not path.exists():
                    raise CannotMeasure(f"python -m benchmarks --only {parts} measured nothing in {tree}")
                for key, more in ratios_of(json.loads(path.read_text())).items():
                    ratios.setdefault(key, []).extend(more)
    return before, after


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare ratios of two commits.")
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="two files of python -m benchmarks --json")
    parser.add_argument("--base", metavar="COMMIT", help="measure this commit and the working tree")
    parser.add_argument("--only", default=_PARTS, metavar="PART[,PART]", help="with --base (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=_ROUNDS, help="with --base: how often each (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="with --base: does it work? Digits mean nothing")
    options = parser.parse_args()
    if (options.base is None) == (len(options.files) != 2):
        parser.error("give two JSON files, or --base COMMIT")
    if options.base:
        named = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}"], cwd=_ROOT, capture_output=True
        )
        if named.returncode:
            parser.error(f"there is no commit {options.base}")
        if options.rounds < 1:
            parser.error(f"--rounds is a whole number from 1, not {options.rounds}")
        try:
            before, after = measured(options.base, options.only, options.rounds, options.quick)
        except CannotMeasure as error:
            parser.error(str(error))
    else:
        try:
            before, after = (ratios_of(json.loads(path.read_text())) for path in options.files)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"not a report of python -m benchmarks: {error}")
    return _tell(before, after)


def _tell(before: Ratios, after: Ratios) -> int:
    found = changes(before, after)
    table = Table(box=None, pad_edge=False)
    for name in ("part", "figure", "against", "before", "after", ""):
        table.add_column(name)
    for change in found:
        words = f"{change.factor:.2f} × {'worse' if change.factor < 1 else 'better'}"
        row = change.part, change.name, change.against, number(change.before), number(change.after), words
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    both = len(before.keys() & after.keys())
    alone = len(before.keys() ^ after.keys())
    print(f"{both - len(found)} of {both} ratios are what they were; {alone} are on one side only")
    return int(any(change.factor < 1 for change in found))


if __name__ == "__main__":
    sys.exit(main())
