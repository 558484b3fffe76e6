"""The mutation check in short: three planted faults are found, and every other one could still be planted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants import ROOT, NotInTheCode, all_mutants, mutant, mutated
from tests.mutants.__main__ import IGNORED, PAGE, isolation, page, plant

MUTANTS = {each.name: each for each in all_mutants()}
SHORT = [
    "the writer does not fence before the hint",
    "a match does not pin its runs",
    "two fields of an event change places",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("mutants") / "tree"
    shutil.copytree(ROOT, copy, ignore=IGNORED)
    return copy


@pytest.mark.parametrize("name", SHORT)
def test_it_is_found(name: str, tree: Path) -> None:
    verdict = plant(MUTANTS[name], tree, isolation())
    assert verdict.caught_by.startswith("tests/"), verdict


def test_what_changes_nothing_survives(tree: Path) -> None:
    harmless = mutant(
        "harmless",
        "ipc/record.py",
        "TXN_BEGIN: Final = 1\n",
        "TXN_BEGIN: Final = 1  # one\n",
        "tests/statemachine/test_codec.py::test_unknown_kind",
    )
    verdict = plant(harmless, tree, isolation())
    assert not verdict.caught_by and not verdict.trouble, verdict
    assert (tree / "ipc/record.py").read_text() == (ROOT / "ipc/record.py").read_text()


def test_a_test_that_does_not_exist_finds_nothing(tree: Path) -> None:
    wrong = mutant(
        "wrong",
        "ipc/record.py",
        "TXN_BEGIN: Final = 1\n",
        "TXN_BEGIN: Final = 3\n",
        "tests/statemachine/test_codec.py::test_nothing",
    )
    verdict = plant(wrong, tree, isolation())
    assert not verdict.caught_by and "not found" in verdict.trouble


def test_all_can_be_planted() -> None:
    """The tables are in step with the code: every text is there exactly once, and what replaces it is Python."""
    assert len(MUTANTS) == len(all_mutants()) > 100
    for each in MUTANTS.values():
        for edit in each.edits:
            compile(mutated(edit), edit.file, "exec")
        for test in each.tests:
            assert (ROOT / test.partition("::")[0]).exists(), test
    with pytest.raises(NotInTheCode, match="0 times"):
        mutated(mutant("gone", "ipc/record.py", "no such text", "").edits[0])


def test_the_page_lists_them_all() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.mutants --write"
