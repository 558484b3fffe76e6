"""Temporary."""

from statemachine.events import Event


def sentence(event: Event) -> str:
    """What the event says."""
    parts = []
    for name, value in zip(event._fields, event):
        if isinstance(value, bytes) or not value:
            continue
        text = repr(value) if isinstance(value, (int, str)) else str(list(value)[:6])
        parts.append(f"{name} {text}")
    return ", ".join(parts)
