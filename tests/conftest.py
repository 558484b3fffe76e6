"""Hypothesis profiles, failing examples as programs, and the promise that no test leaves anything in shared memory."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings

from ipc.names import SHM
from tests.failing import write_programs

settings.register_profile(  # the same examples for everybody: a test run draws no lots
    "same",
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(  # others with each seed (pytest --hypothesis-seed); tests.campaigns draws and prints them
    "campaign", settings.get_profile("same"), max_examples=50, stateful_step_count=100, derandomize=False
)
settings.register_profile(  # for the mutation check: more examples, and no look for a smaller one
    "mutants",
    settings.get_profile("same"),
    max_examples=500,
    phases=[Phase.explicit, Phase.generate, Phase.target],
)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; some tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = ours()
    yield
    assert not ours() - before


@pytest.fixture(autouse=True)
def nothing_changed_for_others() -> Iterator[None]:
    """A command that a test runs in this process leaves everything as it was for the tests after it."""
    before = what_is_shared()
    yield
    assert what_is_shared() == before


def what_is_shared() -> dict[str, object]:
    return {
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "folder": os.getcwd(),
        "cores": os.sched_getaffinity(0),
        "environment": {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "limits": [resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)],
    }


def ours() -> set[str]:
    """Objects of this process: every test puts its process id into the names of its ledgers.

    Parts that are numbers count segments and events: another test's ``audit-7.1.42`` is none of process 42.
    """
    mine = re.compile(rf"(?<!\d){os.getpid()}(?!\d)")
    return {
        name for name in os.listdir(SHM) if any(mine.search(part) for part in name.split(".") if not part.isdecimal())
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """An example that has failed is written out as a program, and the report says where it is."""
    report = yield
    if call.when == "call" and call.excinfo is not None:
        for path in write_programs(item, call.excinfo.value):
            report.sections.append(("the failing example as a program", f"python {path}"))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest: else one test process works on it when the others have ended."""
    items.sort(key=lambda item: "test_native" not in item.nodeid)
