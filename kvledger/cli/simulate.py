"""``kvledger simulate``."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvledger import is_compiled
from kvledger.cli.exits import FAILED, INTERRUPTED, CommandFailed
from kvledger.cli.terminal import line, note, say, working


def simulate(
    seed: Annotated[int, typer.Option(min=0, help="First seed; a failing run names its own")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="So many seeds from there on")] = 1_000,
    seconds: Annotated[float | None, typer.Option(min=0, help="Go on with further seeds for so long instead")] = None,
    split: Annotated[bool, typer.Option("--split", help="An instance that prefills and one that decodes")] = False,
) -> None:
    """Run engine, workers and a follower in one process on weakly ordered memory, with crashes; verify everything.

    With --split a prefill and a decode instance and their pushers. Each seed draws traffic, faults and schedule. The
    same seed does the same thing. A run that fails is made smaller; the command that repeats it is printed, and the
    smaller run is written as a program, simulate-SEED.py, into the working directory.
    """
    from kvledger.testing.points import INTERPRETED_ONLY
    from kvledger.testing.runs import AnyPlan, SimulationFailed, simulate_or_shrink
    from kvledger.testing.schedule import one_core
    from kvledger.testing.simulator import Plan
    from kvledger.testing.split import SplitPlan

    if is_compiled():
        raise CommandFailed(INTERPRETED_ONLY)
    draw: Callable[[int], AnyPlan] = SplitPlan.draw if split else Plan.draw
    begun = time.monotonic()
    number = points = kills = engines = verified = 0
    interrupted = False
    with one_core(), _unheard(), working("simulating") as say_now:
        while not interrupted and (time.monotonic() - begun < seconds if seconds is not None else number < runs):
            try:
                outcome = simulate_or_shrink(draw(seed + number))
            except SimulationFailed as error:
                first, *more = str(error).splitlines() or [""]
                say("FAILED", f"seed {seed + number}: {first}")
                for text in more:
                    note(text)
                program = Path(f"simulate-{'split-' if split else ''}{seed + number}.py")
                with contextlib.suppress(OSError):  # the message has the plan, too
                    program.write_text(error.program())
                    note(f"  the same as a program: python {program}")
                raise typer.Exit(FAILED) from error
            except KeyboardInterrupt:
                interrupted = True
                continue
            number += 1
            points += outcome.points
            kills += outcome.kills
            engines += outcome.engines
            verified += outcome.verified_bytes
            if not number % 20:
                say_now(f"{number:,} runs, {number / (time.monotonic() - begun):.0f} per second")
    rate = number / (time.monotonic() - begun)
    line(
        f"{number:,} runs from seed {seed} ({rate:.0f} per second): {points:,} points of schedule, {kills:,} kills, "
        f"{engines:,} engines, {verified:,} bytes verified, nothing broken"
    )
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Silence for what a simulated operator would be told, and only meanwhile: a test runs commands in its process."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
