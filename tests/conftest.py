"""Hypothesis profiles, and the promise that no test leaves anything in shared memory."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings

from ipc.names import SHM

settings.register_profile(
    "short", max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("campaign", settings.get_profile("short"), max_examples=5_000, stateful_step_count=100)
settings.register_profile(  # for the mutation check: the same examples each time, and no look for a smaller one
    "mutants",
    settings.get_profile("short"),
    max_examples=500,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.target],
)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = ours()
    yield
    assert not ours() - before


def ours() -> set[str]:
    """Objects of this process: every test puts its process id into the names of its ledgers."""
    mine = re.compile(rf"(?<!\d){os.getpid()}(?!\d)")
    return {name for name in os.listdir(SHM) if mine.search(name)}
