"""Text that somebody else chose, as it may be shown: names from clients, what other processes say, paths.

A terminal obeys some characters instead of showing them: escape sequences clear it, move the cursor or set its title;
a line break begins a line that looks like the program's own; marks that reverse the direction of writing show another
text than the one that is there. Whoever sends a request chooses its name, so none of these may get there.

Everything that shows text to people uses this: the command line, the page, log messages, spans, exported files. It
imports nothing, so that what says why an installation is broken can use it. Words: ``docs/glossary.md``.
"""

from __future__ import annotations

import json
import re

__all__ = ["logged", "printable", "printable_json"]

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)


def printable(text: str) -> str:
    r"""Escape every character that is not shown as itself, as Python writes it: ``\x1b``, ``\n``, ``\u202e``.

    The result is one line, takes up the cells that it seems to, and can be encoded. Text in any language stays as it
    is; what is printable already is returned unchanged, so that it does no harm to ask twice.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def printable_json(value: object) -> str:
    """JSON in one line of printable ASCII: what is not, names from clients too, is escaped as JSON escapes it."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def logged(value: object) -> str:
    """A value in a log message of ``key=value`` pairs: in quotation marks, as JSON, unless it is one plain word."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else printable_json(text)
