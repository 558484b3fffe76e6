"""Files that appear when they are complete, readable by their owner only: they may hold what users wrote."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotWrite(OSError):
    """A file cannot be written; one line says why."""


@contextmanager
def complete(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary name to write to, which becomes ``path`` at the end; after an error nothing is left of it.

    Raises:
        CannotWrite: there is such a file (unless ``replace``), or the folder or the disk does not take it.
    """
    if path.is_dir() or (path.exists() and not replace):
        raise CannotWrite(f"{path} exists: remove it, or choose another name")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and not isinstance(error, CannotWrite):
            raise CannotWrite(f"cannot write {path}: {error.strerror or error}") from error
        raise
