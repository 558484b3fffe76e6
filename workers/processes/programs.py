"""Starting Python programs of this project: the same code that runs here, and nothing that lies in the way."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])


def python(*program: str) -> list[str]:
    """The command that runs ``-m module arguments`` (or ``-c code``) with this interpreter.

    ``-P``: without it Python looks for modules in the current directory first, and would run whatever ``workers.py``
    or ``numpy.py`` the engine happens to have been started beside.
    """
    return [sys.executable, "-P", *program]


def environment() -> dict[str, str]:
    """This process's environment, in which the packages are found as they were found here.

    Where they are not installed but lie in a directory that this process alone was told of, it comes last.
    """
    known = [os.environ.get("PYTHONPATH", ""), *site.getsitepackages(), site.getusersitepackages()]
    found = {os.path.realpath(folder) for text in known for folder in text.split(os.pathsep) if folder}
    if _ROOT in found:
        return dict(os.environ)
    path = [entry for entry in (os.environ.get("PYTHONPATH"), _ROOT) if entry]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
