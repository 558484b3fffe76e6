"""Signals: a small named array of 64-bit words in shared memory, each with one writer, and a short text beside them.

A worker says here that it is ready, or why it is not, and that it still lives.
"""

from __future__ import annotations

from ipc import memory
from ipc.errors import LogCorrupt
from ipc.fence import make_fence
from ipc.ownership import identity_of, remove_object

WORDS = 64
_TEXT_BYTES = 3584
_BYTES = WORDS * 8 + _TEXT_BYTES


class Signals:
    """``words[i]`` may be read by anybody and written by one process. Raises: see :mod:`ipc.memory`."""

    def __init__(
        self, name: str, *, create: bool = False, read_only: bool = False, identity: int | None = None
    ) -> None:
        self.name = name
        self.identity = identity_of(name) if identity is None else identity
        """Of the ledger that it belongs to; default: the one that is there now."""
        if create:
            self._map = memory.create(name, _BYTES, identity=self.identity)
        else:
            self._map = memory.attach(name, write=not read_only, identity=self.identity)
        if len(self._map) != _BYTES:
            self._map.close()
            raise LogCorrupt(name, 0, f"signals have {_BYTES} bytes")
        self._buffer = memoryview(self._map)
        self.words = self._buffer.cast("Q")
        self._release, self._acquire = make_fence()

    @property
    def text(self) -> str:
        """What the writer has to say; read it after the word that announces it."""
        self._release()
        self._acquire()
        return bytes(self._buffer[WORDS * 8 :]).partition(b"\0")[0].decode(errors="replace")

    @text.setter
    def text(self, text: str) -> None:
        data = text.encode()[: _TEXT_BYTES - 1].ljust(_TEXT_BYTES, b"\0")
        self._buffer[WORDS * 8 :] = data
        self._release()
        self._acquire()

    def close(self, *, remove: bool = False) -> None:
        """Unmap, and remove if asked to."""
        self.words.release()
        self._buffer.release()
        self._map.close()
        if remove:
            remove_object(self.name, self.identity)
