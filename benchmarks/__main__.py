"""The whole suite: ``python -m benchmarks``, which is what ``make bench`` runs, with kvledger compiled.

Runs every part in this order, keeps all raw figures as JSON, and writes ``docs/benchmarks.md`` and its plots from them.
A part that fails is named with its error, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import figures as f
from benchmarks import page
from benchmarks.field import without_native

PARTS = {
    "contest": "Whole life of a request",
    "decode": "Decode steps",
    "pattern": "Scheduler's pattern",
    "growth": "Growth",
    "lifecycle": "Life cycle beside a bare tree",
    "lifecycle-interpreted": "Life cycle, interpreted",
    "fastdeploy": "FastDeploy drop-in",
    "handoff": "Hand-off",
    "roundtrip": "Round trip",
    "swap": "Swap bandwidth",
    "replay": "Replay and seek",
    "replay-interpreted": "Replay, interpreted",
    "recovery": "Recovery",
    "debugger": "Debugger",
    "hitrate": "Hit rates",
    "interpreter": "Interpreter",
}
"""Module → title; each has ``figures(quick)``, and works alone. ``-interpreted``: without the compiled build."""
_INTERPRETED = "-interpreted"
_JSON = page.DOCS / "benchmarks.json"


def run(name: str, quick: bool) -> dict[str, Any]:
    """One part in a process of its own: what it leaves behind is nobody else's."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks", "--part", name, *(["--quick"] if quick else [])]
    environment = dict(os.environ)
    if name.endswith(_INTERPRETED):
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(without_native(path))
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    seconds = round(time.perf_counter() - begun, 1)
    if process.returncode:
        return {
            "figures": [],
            "skipped": [],
            "build": "",
            "seconds": seconds,
            "error": f"exit code {process.returncode}",
        }
    return {**json.loads(process.stdout.splitlines()[-1]), "seconds": seconds}


def part(name: str, quick: bool) -> None:
    """In that process: measure, and print the figures as the last line."""
    logging.disable(logging.WARNING)  # a log without a follower that writes snapshots grows, and says so
    made, skipped = importlib.import_module(f"benchmarks.{name.removesuffix(_INTERPRETED)}").figures(quick)
    build = "compiled" if importlib.import_module("kvledger").is_compiled() else "interpreted"
    print(json.dumps({"figures": [one.as_dict() for one in made], "skipped": skipped, "build": build}))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks.")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: does everything work?")
    parser.add_argument(
        "--only", metavar="PART[,PART]", help=f"some of {', '.join(PARTS)}; the others stay as they were"
    )
    parser.add_argument("--json", type=Path, default=_JSON, help="where the raw figures go (default: %(default)s)")
    parser.add_argument("--no-page", action="store_true", help="write no docs/benchmarks.md and no plots")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.part, options.quick)
        return 0
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.quick and not options.no_page and options.json == _JSON:
        parser.error("figures of --quick are not for docs/: add --no-page and --json FILE")
    report: dict[str, Any] = {"parts": {}}
    if options.only and options.json.exists():
        report = json.loads(options.json.read_text())
    head, machine = f.commit(), f.machine()
    for name in names:
        print(f"{PARTS[name]} ...", flush=True)
        result = run(name, options.quick)
        report["parts"][name] = {
            "title": PARTS[name],
            "commit": head,
            "machine": machine,
            "quick": options.quick,
            **result,
        }
        f.show(
            f"{PARTS[name]}, {result['seconds']:g} s",
            [f.Figure(**{key: value for key, value in one.items() if key in f.FIELDS}) for one in result["figures"]],
            result["skipped"],
        )
        if error := result.get("error"):
            print(f"{name} failed: {error}", flush=True)
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if not options.no_page:
        page.write(report)
    return int(any("error" in report["parts"][name] for name in names))


if __name__ == "__main__":
    sys.exit(main())
