"""A failing example becomes a program that fails in the same way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
BROKEN = """
import enum
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

class Way(enum.Enum):
    GOOD = 1
    BAD = 2

@pytest.fixture
def limit(tmp_path):
    return 2

@given(st.lists(st.integers()), st.sampled_from(Way), st.data())
def test_drawn(limit, numbers, way, data):
    more = data.draw(st.integers(3, 9), label="more of them")
    assert len(numbers) <= limit or more < 3, "too many numbers"

@given(st.lists(st.integers(0, 5), min_size=2).map(lambda some: np.array(some, np.int32)))
def test_array(tokens):
    assert tokens.sum() < 5, "too much"

class Machine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 3))
    def start(self, size):
        self.size = size

    @rule(way=st.sampled_from(Way), data=st.binary())
    def step(self, way, data):
        assert way != Way.BAD, "a bad step"

def test_machine():
    case = Machine.TestCase
    case.settings = settings.default
    case("runTest").runTest()
"""


def python(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{where}", "HYPOTHESIS_PROFILE": "same"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.mark.parametrize(
    ("test", "said"), [("drawn", "too many numbers"), ("array", "too much"), ("machine", "a bad step")]
)
def test_what_fails_becomes_a_program_that_fails(test: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nfrom tests import failing\nfailing.FOLDER = Path('x')\n"
    )
    (tmp_path / "broken.py").write_text(BROKEN)
    found = python("-m", "pytest", "-p", "tests.conftest", f"broken.py::test_{test}", where=tmp_path)
    assert found.returncode == 1 and "Failing test case" in found.stdout, found.stdout + found.stderr
    (program,) = (tmp_path / "x").iterdir()
    assert f"python x/{program.name}" in found.stdout
    ran = python(str(program), where=tmp_path)
    assert ran.returncode == 1 and said in ran.stdout and "1 failed" in ran.stdout, ran.stdout + ran.stderr
    assert "Failing test case" not in ran.stdout, "nothing is looked for: the example is in the program"
