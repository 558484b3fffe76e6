"""Simulated processes: threads of which exactly one runs, taking turns where a seed says so.

A process gives up its turn between two lines of the code that shares memory (:mod:`.points`), when it
sleeps, and when it waits. It can be killed at any of these points; a killed process does nothing more, not even clean
up. Time is virtual: it advances by a microsecond per traced line, and jumps when everybody sleeps.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NoReturn

from kvledger.testing.points import is_traced, storing_lines
from kvledger.testing.weak_memory import Buffer, Order

_LINE_NS = 1_000
_FIRST_PID = 100
_MOST_POINTS = 3_000_000


class _Code:
    """A function whose lines are points. Kept by ``id``, since a code object computes its hash anew each time."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.storing = storing_lines(code)


_codes: dict[int, _Code] = {}


class Killed(BaseException):
    """Unwinds the thread of a process that was killed. What it meets on its way has no effect any more."""


class Stuck(AssertionError):
    """It does not come to an end."""


class Process:
    """One simulated process."""

    def __init__(self, schedule: Schedule, pid: int, name: str, main: Callable[[], int]) -> None:
        self.pid = pid
        self.name = name
        self.buffer = Buffer(schedule.order)
        self.started = schedule.now_ns // 1_000_000 + 1
        self.exit_code: int | None = None
        self.doomed = False
        """It was killed and does not know yet."""
        self.wake_ns = 0
        self.waits_for: Callable[[], bool] | None = None
        self.turn = threading.Lock()
        self.turn.acquire()
        self.error: BaseException | None = None
        self.lines = 0
        """Points passed."""
        self.strike_at = 0
        """It is killed at this point."""
        self.struck: list[str] = []
        """When it was: the functions it was in, innermost first."""
        self._schedule = schedule
        self._main = main
        self._traced = False
        """It is inside a function that shares memory."""
        self._frame = 0
        """Where the last point was; 0: a function ended there."""
        self._storing = True
        """Whether the line behind it can store something."""
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it still runs, or its last stores are still on their way."""
        return self.exit_code is None

    def _run(self) -> None:
        self.turn.acquire()
        code = -9
        try:
            code = self._main()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
            code = 1
        finally:
            self._schedule.ended(self, code)

    def enter(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a function that shares memory; its lines are points, and those of what it calls."""
        if self._traced:
            return function(*arguments, **options)
        self._traced = True
        sys.settrace(self._trace)
        try:
            return function(*arguments, **options)
        finally:
            sys.settrace(None)
            self._traced = False

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not is_traced(code.co_filename):
            return None
        if id(code) not in _codes:
            _codes[id(code)] = _Code(code)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self._storing or self._frame != id(frame):
            self.buffer.collect()
        self._frame = 0 if event == "return" else id(frame)
        self._storing = event != "line" or frame.f_lineno in _codes[id(frame.f_code)].storing
        self._schedule.point(self)
        return self._line


@contextmanager
def one_core() -> Iterator[None]:
    """Processes that are spawned inside share a core: handing a turn to a thread on another one costs a third more."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        yield
        return
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Schedule:
    """Runs processes one at a time. Everything that is left to chance comes from ``rng``."""

    def __init__(self, rng: random.Random, order: Order) -> None:
        self.rng = rng
        self.order = order
        self._prompt = rng.choice((0.5, 0.5, 0.1, 0.02))
        """How likely a store is made visible at a point: some machines keep them long."""
        self.now_ns = 1_000_000_000
        self.processes: dict[int, Process] = {}
        self._living: list[Process] = []
        self.running: Process | None = None
        self.points = 0
        self._left = 0
        self._done = threading.Lock()
        self._done.acquire()
        self._next_pid = _FIRST_PID
        self.crashed: Process | None = None
        """A process that ended with an error nobody expected."""

    # From outside

    def spawn(self, name: str, main: Callable[[], int]) -> Process:
        """A new process; it runs when its turn comes."""
        process = Process(self, self._next_pid, name, main)
        self._next_pid += 1
        self.processes[process.pid] = process
        self._living.append(process)
        process.thread.start()
        return process

    def run(self) -> None:
        """Let the processes run until all have ended. Raises what made one fail."""
        self._start_next()
        try:
            while not self._done.acquire(timeout=1.0):  # a Ctrl-C right before it began to wait would not wake it
                pass
        except BaseException:  # Ctrl-C: nobody may go on and meet the real system
            for process in self._living.copy():
                self.kill(process)
            self._done.acquire()
            raise
        for process in self.processes.values():
            process.thread.join()
        if self.crashed is not None:
            assert self.crashed.error is not None
            raise self.crashed.error

    # From inside a process

    def enter(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call a function that shares memory (:mod:`.points`)."""
        if self.running is None:  # before or after everything
            return function(*arguments, **options)
        return self.running.enter(function, arguments, options)

    def point(self, process: Process) -> None:
        """A place where anything may happen."""
        if process.exit_code is not None or process.doomed:
            raise Killed
        process.lines += 1
        self.points += 1
        self.now_ns += _LINE_NS
        if process.lines == process.strike_at:
            self.strike(process)
        rng = self.rng
        chance = rng.random()
        if chance < self._prompt:
            process.buffer.drain(rng)
        elif chance > 0.9:
            other = self._living[int(rng.random() * len(self._living))].buffer
            other.drain(rng)
            other.refresh(rng)
        self._left -= 1
        if self._left <= 0:
            self._pass_turn(process)

    def strike(self, process: Process) -> NoReturn:
        """Kill the running process where it stands."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            process.struck.append(frame.f_code.co_name)
            frame = frame.f_back
        self.kill(process)
        raise Killed

    def sleep(self, seconds: float) -> None:
        """The running process sleeps."""
        self._pause(None, seconds)

    def wait(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """The running process waits until the condition holds, or for ``timeout`` seconds. Returns whether it held."""
        self._pause(condition, 1e6 if timeout is None else timeout)
        return condition()

    def _pause(self, condition: Callable[[], bool] | None, seconds: float) -> None:
        process = self.current()
        process.buffer.collect()
        process.waits_for = condition
        process.wake_ns = self.now_ns + int(seconds * 1e9)
        self._pass_turn(process)
        process.waits_for = None
        process.wake_ns = 0

    def current(self) -> Process:
        """The process whose code is running. Raises :class:`Killed` in one that should not run any more."""
        process = self.running
        assert process is not None and process.thread.ident == threading.get_ident()
        if process.exit_code is not None or process.doomed:
            raise Killed
        return process

    def kill(self, process: Process) -> None:
        """SIGKILL."""
        if process.exit_code is None:
            process.doomed = True

    def ended(self, process: Process, code: int) -> None:
        """A thread has unwound. What it stored before becomes visible; its locks are given up by whoever asks."""
        if not process.doomed:
            process.buffer.collect()
        process.buffer.leave()
        process.exit_code = -9 if process.doomed else code
        self._living.remove(process)
        if process.error is not None and self.crashed is None:
            self.crashed = process
            for other in self._living:
                self.kill(other)
        self._start_next()

    def _pass_turn(self, process: Process) -> None:
        chosen = self._choose()
        if chosen is not process:
            chosen.turn.release()
            process.turn.acquire()
        if process.doomed:
            raise Killed

    def _start_next(self) -> None:
        """Wake who runs next; without anybody, all is over."""
        (self._choose().turn if self._living else self._done).release()

    def _choose(self) -> Process:
        """Who runs next."""
        living, rng = self._living, self.rng
        if self.points > _MOST_POINTS and self.crashed is None:
            self.crashed = living[0]
            self.crashed.error = Stuck(f"no end after {self.points:,} points: {[process.name for process in living]}")
            for process in living:
                self.kill(process)
        now = self.now_ns
        ready = [p for p in living if p.wake_ns <= now or p.doomed or (p.waits_for is not None and p.waits_for())]
        if not ready:
            self.now_ns = min(process.wake_ns for process in living)
            ready = [process for process in living if process.wake_ns <= self.now_ns]
        # Mostly some lines, sometimes one: races need both.
        self._left = 1 if rng.random() < 0.2 else 2 + int(rng.random() * 118)
        self.running = chosen = ready[int(rng.random() * len(ready))]
        return chosen
