"""What the page says about a block, a run, a request or a transfer: its past, and its events before and after."""

from __future__ import annotations

from typing import Any

from kvledger.debugger import Source, SourceError
from kvledger.debugger.explain.explain import MOST_FACTS, explain_block, explain_request, explain_transfer
from kvledger.debugger.explain.wording import Wording
from kvledger.debugger.source.filters import Filter, request_numbers
from kvledger.debugger.source.places import locate
from kvledger.text import printable
from statemachine.events import Tier


def explain(source: Source, type: str, id: int, at: int, *, words: bool) -> dict[str, Any]:
    """What is true of the subject after event ``at``, how it came about, and what is left out of that.

    Args:
        type: ``device`` or ``host`` for a block of that tier, ``run``, ``request`` or ``transfer``.
        words: whether token ids may be in it.

    Raises:
        SourceError: there is no such thing.
    """
    if type == "run":
        return _explain_run(source, id, at)
    if type in ("device", "host"):
        found = explain_block(source, id, Tier[type.upper()], at, words=words)
    elif type == "request":
        found = explain_request(source, f"#{id}", at, words=words)
    elif type == "transfer":
        found = explain_transfer(source, id, at)
    else:
        raise SourceError(f"{type!r} is nothing that can be explained")
    lines = [{"n": fact.sequence, "text": printable(fact.text)} for fact in found.history]
    now = [printable(text) for text in found.now]
    return {"now": now, "lines": lines, "omitted": "older facts are left out" if found.omitted else ""}


def _explain_run(source: Source, run: int, at: int) -> dict[str, Any]:
    """The newest events that name a run."""
    wanted = Filter(node=run, stop=at)
    lines: list[dict[str, Any]] = []
    spans = wanted.spans(source)
    while spans and len(lines) < MOST_FACTS:
        first, last = spans.pop()
        before = source.before(first)
        say = Wording() if before is None else Wording.after(before)
        told = [(entry, say(entry.event)) for entry in source.entries(first, last)]
        lines = [{"n": entry.sequence, "text": printable(text)} for entry, text in told if wanted(entry.event)] + lines
    omitted = "older events are left out" if spans or len(lines) > MOST_FACTS else ""
    return {"now": [], "lines": lines[-MOST_FACTS:], "omitted": omitted}


def neighbour(source: Source, type: str, id: int, at: int, *, forward: bool) -> int | None:
    """The next event after ``at`` that names the subject, or the last one before; ``None``: there is none."""
    wanted = _naming(type, id)
    spans = wanted.spans(source)
    for first, last in spans if forward else reversed(spans):
        if forward and last > at:
            for entry in source.entries(max(first, at + 1), last):
                if wanted(entry.event):
                    return entry.sequence
        elif not forward and first < at:
            found = [entry.sequence for entry in source.entries(first, min(last, at - 1)) if wanted(entry.event)]
            if found:
                return found[-1]
    return None


def find(source: Source, text: str) -> dict[str, Any]:
    """What a user typed: ``request NAME`` is the newest of that name, everything else a place in the log.

    Raises:
        SourceError: there is nothing like that; one line says what there is.
    """
    word, _, name = text.strip().partition(" ")
    if word.lower() == "request":
        return {"subject": {"type": "request", "id": request_numbers(source, name.strip())[-1]}}
    return {"n": locate(source, text.strip())}


def _naming(type: str, id: int) -> Filter:
    match type:
        case "device" | "host":
            return Filter(block=id, tier=Tier[type.upper()])
        case "run":
            return Filter(node=id)
        case "request":
            return Filter(request=f"#{id}", numbers=(id,))
        case "transfer":
            return Filter(transfer=id)
    raise SourceError(f"{type!r} is nothing that events name")
