"""``python -m tests.campaigns``: for so long, look for what no fixed example finds. Behind ``make soak``.

A campaign draws a seed, says it, and hands it to four searches: simulated crashes of one instance, of a split pair,
real processes that are killed where there is no room (:mod:`tests.campaigns.starved`), and other examples of every
property test. Whatever fails says how to repeat it, and is written as a program, but for the real processes: those do
not die twice in the same way, and what they said and recorded is kept.

The exit status tells what ended it: 0, nothing was found; 3, something was; 1, the search itself does not work, which
is a broken build and no finding.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND, BROKEN = 3, 1
_SHARES = {"simulate": 0.35, "simulate --split": 0.2, "starved": 0.2, "properties": 0.25}
"""Of the time."""
_PYTEST = ["-m", "pytest", "-m", "hypothesis", "-x", "-q", "-p", "no:cacheprovider"]


def simulate(seed: int, seconds: float, *more: str) -> int:
    """Search among simulated runs. Returns the exit status."""
    command = [
        sys.executable,
        "-m",
        "kvledger.cli",
        "simulate",
        *more,
        "--seed",
        f"{seed}",
        "--seconds",
        f"{seconds:.0f}",
    ]
    status = subprocess.run(command, cwd=ROOT).returncode
    return {0: 0, 1: FOUND}.get(status, BROKEN)


def starved(seed: int, seconds: float) -> int:
    """Kill real processes where there is no room. Returns the exit status."""
    command = [sys.executable, "-m", "tests.campaigns.starved", "--seed", f"{seed}", "--seconds", f"{seconds:.0f}"]
    status = subprocess.run(command, cwd=ROOT).returncode
    return {0: 0, 1: FOUND}.get(status, BROKEN)


def properties(seed: int, seconds: float) -> int:
    """Search among examples of the property tests, with one seed after the other. Returns the exit status."""
    begun, rounds = time.monotonic(), 0
    while not rounds or time.monotonic() - begun < seconds:
        again = [*_PYTEST, f"--hypothesis-seed={seed + rounds}", "tests"]
        environment = {**os.environ, "HYPOTHESIS_PROFILE": "campaign"}
        status = subprocess.run([sys.executable, *again], cwd=ROOT, env=environment).returncode
        if status:
            said = " ".join(["HYPOTHESIS_PROFILE=campaign", sys.executable, *again])
            print(f"FAILED: pytest says {status}\n  again: {said}", flush=True)
            return FOUND if status == 1 else BROKEN
        rounds += 1
    print(f"{rounds} times all properties, from seed {seed}, nothing broken", flush=True)
    return 0


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("--seconds", type=float, default=14_400, help="of all searches together (default: 4 hours)")
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(10**9)
    print(f"seed {seed}; again: make soak SEED={seed} SOAK_SECONDS={arguments.seconds:.0f}", flush=True)
    for what, share in _SHARES.items():
        seconds = arguments.seconds * share
        print(f"{what}, {seconds:.0f} s", flush=True)
        search = {"properties": properties, "starved": starved}.get(what)
        status = search(seed, seconds) if search else simulate(seed, seconds, *what.split()[1:])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
