"""One thread that does things in order, behind the back of the one that hands them out.

Not an executor of ``concurrent.futures``: a signal handler that raises (Ctrl-C) inside its ``submit`` or a future's
``result`` leaves their locks held or released twice, and waiting for them then takes for ever. Here handing out and
waiting are single calls into C, which no handler can interrupt half-way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """Something that is being done."""

    def __init__(self, work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self._work: tuple[Callable[..., T], tuple[Any, ...]] | None = (work, arguments)
        self._value: T
        self._error: BaseException | None = None
        self._finished = False
        self._bell = threading.Lock()
        self._bell.acquire()

    def run(self) -> None:
        """Do it, in the thread."""
        assert self._work is not None
        work, arguments = self._work
        self._work = None  # a mapping among them may be waiting for nobody to look at it any more
        try:
            self._value = work(*arguments)
        except BaseException as error:
            self._error = error
        self._finished = True
        self._bell.release()

    def exception(self) -> BaseException | None:
        """What it raised, once it is done."""
        while not self._finished:
            self._bell.acquire(timeout=1.0)
        return self._error

    def result(self) -> T:
        """What it returned, once it is done; raises what it raised."""
        if (error := self.exception()) is not None:
            raise error
        return self._value


class Background:
    """Does what is submitted, one after the other. A program that ends does not wait for it."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[..., T], *arguments: Any) -> Task[T]:
        """Have ``work(*arguments)`` done."""
        task = Task(work, arguments)
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """Wait until all is done; nothing may be submitted any more."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
            del task
