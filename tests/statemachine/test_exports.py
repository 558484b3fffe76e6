"""What the state machine offers is listed once, and is there."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import statemachine


def test_every_room_is_listed() -> None:
    rooms = {module.name for module in pkgutil.iter_modules(statemachine.__path__)}
    assert set(statemachine.__all__) == rooms
    for room in rooms:
        assert f"``{room}``" in (statemachine.__doc__ or "") or room in ("errors", "hashing"), room


@pytest.mark.parametrize("room", ["apply", "check", "decide"])
def test_what_is_listed_is_there_and_told(room: str) -> None:
    module = importlib.import_module(f"statemachine.{room}")
    for name in module.__all__:
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{room}.{name} says nothing of itself"
    told = {name for name, value in vars(module).items() if callable(value) and value.__module__ == module.__name__}
    assert {name for name in told if not name.startswith("_")} <= set(module.__all__)
