"""Signals: a small named array of 64-bit words in shared memory, each with one writer, and a short text beside them.

A worker says here that it is ready, or why it is not, and that it still lives.
"""

from __future__ import annotations

from ipc import memory
from ipc.fence import make_fence
from ipc.names import unlink

WORDS = 64
_TEXT_BYTES = 3584


class Signals:
    """``words[i]`` may be read by anybody and written by one process. Raises: see :mod:`ipc.memory`."""

    def __init__(self, name: str, *, create: bool = False, read_only: bool = False) -> None:
        self.name = name
        self._map = memory.create(name, 4096) if create else memory.attach(name, write=not read_only)
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
            unlink(self.name)
