"""What an engine does with its blocks, and who calls, in a file beside the ledger: for ``kvledger check --engine``.

A ledger knows what it has granted; it cannot see what is computed. An engine that is suspected makes a :class:`Marks`,
calls its manager through :attr:`Marks.manager`, and says which positions it writes into which blocks. Without one
nothing is different and nothing costs.

An engine does not stop for it: what cannot be written ends the marks, with a line in the log of this module.

The file has one JSON list per line. The first says which ledger it is about; the others begin with what they are, the
last event of the ledger by then, and the scheduler's step; they end with the thread and its call sites, the innermost
one first.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, SupportsInt, cast

from kvledger.config import ConfigError
from kvledger.manager.manager import CacheManager
from kvledger.text import printable

FORMAT: Final = "kvledger marks 1"
CALLS: Final = frozenset(
    {
        *("match", "admit", "allocate", "grow", "cache", "commit", "extend", "append", "retract", "distrust", "trim"),
        *("give_back", "reassign", "release", "preempt", "clear", "evict", "forget", "resize", "pause", "resume"),
        "make_room",
    }
)
"""Calls that change something."""
_SUBJECTS = ("request_id", "counts", "tokens", "computed")
"""What calls call the request that they are about, or the requests with a number for each."""
_FRAMES = 3
_log = logging.getLogger(__name__)


class Marks:
    """Notes what an engine computes and reads, and who calls its manager.

    Calls may come from any thread. A context manager.

    Args:
        path: a file that is not there yet; only its owner may read it, since it holds names of requests.

    Raises:
        ConfigError: the file is there already, or cannot be made.
    """

    def __init__(self, manager: CacheManager, path: str | os.PathLike[str]) -> None:
        try:
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ConfigError(f"{os.fspath(path)} is there already: marks of another run may not be mixed in") from None
        except OSError as error:
            raise ConfigError(f"marks cannot be written to {os.fspath(path)}: {error.strerror}") from error
        self._manager = manager
        self.step = 0
        """Of the scheduler: the number that :meth:`CacheManager.step` was called with last."""
        self.manager: CacheManager = cast(CacheManager, _Noted(manager, self))
        """The same manager; calls of it are noted with who made them."""
        self._write([FORMAT, manager.name])

    def computed(
        self, request_id: str, start: SupportsInt, stop: SupportsInt, blocks: Sequence[int], row: int = -1
    ) -> None:
        """The KV of the tokens from ``start`` to ``stop`` is being written, into the blocks that hold these.

        Say it before the kernel is launched, with the ids that it gets, not with those of :meth:`block_table`.

        Args:
            blocks: device block ids, in token order, from the one that holds token ``start`` on.
            row: place of the request in its batch.
        """
        self._note("computed", request_id, int(start), int(stop), [int(block) for block in blocks], row)

    def read(self, request_id: str, blocks: Sequence[int], row: int = -1) -> None:
        """Attention reads these blocks: the beginning of the block table that the kernel gets."""
        self._note("read", request_id, [int(block) for block in blocks], row)

    def called(self, name: str, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        """A call of the manager begins."""
        first = arguments[0] if arguments else next((given[name] for name in _SUBJECTS if name in given), None)
        named = [first] if isinstance(first, str) else [*first] if isinstance(first, Mapping) else []
        self._note(name, [request for request in named if isinstance(request, str)])

    def _note(self, what: str, *values: Any) -> None:
        self._write([what, self._manager.next_sequence - 1, self.step, *values, _caller()])

    def _write(self, values: list[Any]) -> None:
        if self._file < 0:
            return
        line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
        try:
            if os.write(self._file, line) == len(line):
                return
            why = "the disk is full"
        except OSError as error:
            why = error.strerror or str(error)
        _log.error("the marks of ledger %s end here, and the engine goes on: %s", self._manager.name, printable(why))
        self.close()

    def close(self) -> None:
        """End the file; the manager stays open."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Noted:
    """Stands for a manager, and notes the calls that change something."""

    def __init__(self, manager: CacheManager, marks: Marks) -> None:
        self._noted = manager
        self._marks = marks

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._noted, name)
        if name == "step":
            value = self._steps(value)
        elif name in CALLS:
            value = self._calls(name, value)
        else:
            return value
        self.__dict__[name] = value
        return value

    def _calls(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **given: Any) -> Any:
            self._marks.called(name, arguments, given)
            return call(*arguments, **given)

        return noted

    def _steps(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(number: Any) -> Any:
            self._marks.step = int(number)
            return call(number)

        return noted

    def __enter__(self) -> CacheManager:
        self._noted.__enter__()
        return cast(CacheManager, self)

    def __exit__(self, *ended: Any) -> None:
        self._noted.__exit__(*ended)


def _caller() -> str:
    """Thread and call sites of whoever called into this module."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    sites: list[str] = []
    while frame is not None and len(sites) < _FRAMES:
        sites.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back
    return f"{threading.current_thread().name} at {' < '.join(sites)}"
