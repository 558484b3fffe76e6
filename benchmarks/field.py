"""The contestants, each in a process of its own, taking turns.

Nobody's imports, garbage or threads disturb another; while one works, the others wait for their pipe. A package that is
not there or does not work is skipped with its reason.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers import ENTRIES, NOT_COMPARED, Entry


class Field:
    """Starts the contestants. ``entries`` are those that worked, ``skipped`` says why the others do not take part."""

    def __init__(self, entries: Sequence[Entry] = ENTRIES) -> None:
        self.entries: list[Entry] = []
        self.skipped: list[str] = list(NOT_COMPARED)
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        self._turn = 0
        context = multiprocessing.get_context("spawn")
        missing = set()
        started = []
        for entry in entries:
            if entry.peer and not _installed(entry.peer):
                missing.add(entry.peer)
                continue
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(entry, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((entry, process, ours))
        for entry, process, ours in started:
            try:
                problem = ours.recv()
            except EOFError:
                problem = "its process died while it was imported"
            if problem:
                self.skipped.append(f"{entry.name}: {problem}")
                process.join()
            else:
                self.entries.append(entry)
                self._pipes.append(ours)
                self._processes.append(process)
        self.skipped += [f"{name}: not installed (make bench installs it)" for name in sorted(missing)]

    def turn(self, work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """``work(entry, *arguments)`` by every contestant, one after the other; who begins changes from turn to turn.

        Returns results by name. One that fails is left out from then on, with its reason.
        """
        order = list(zip(self.entries, self._pipes))
        self._turn += 1
        start = self._turn % len(order)
        results = {}
        for entry, pipe in order[start:] + order[:start]:
            pipe.send((work, arguments))
            try:
                good, result = pipe.recv()
            except EOFError:
                good, result = False, "its process died"
            if good:
                results[entry.name] = result
            elif not entry.peer:
                raise RuntimeError(f"{entry.name}: {result}")
            else:
                self.skipped.append(f"{entry.name}: {result}")
                index = self.entries.index(entry)
                del self.entries[index], self._pipes[index]
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


class Pauses:
    """The longest garbage collection while it was watching."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self.total_ms = 0.0
        self._begun = 0

    def _note(self, phase: str, _: dict[str, int]) -> None:
        now = time.perf_counter_ns()
        if phase == "start":
            self._begun = now
        else:
            took = (now - self._begun) / 1e6
            self.longest_ms = max(self.longest_ms, took)
            self.total_ms += took

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()  # what an engine does when it has started
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note)
        gc.unfreeze()


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def without_native(path: Sequence[str]) -> list[str]:
    """A module search path without the compiled build (``make native``)."""
    return [folder for folder in path if Path(folder).name != "native"]


def _serve(entry: Entry, pipe: Any) -> None:
    if entry.name.endswith("interpreted"):
        sys.path[:] = without_native(sys.path)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.disable(logging.WARNING)  # a log without a follower that writes snapshots grows, and says so
    if entry.peer:  # what they print when they find no GPU is not ours to show
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.dup2(null, 1)
    try:
        importlib.import_module(entry.module)
    except Exception as error:
        pipe.send(f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    pipe.send("")
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, work(entry, *arguments)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))
