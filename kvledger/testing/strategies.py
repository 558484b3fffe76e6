"""Hypothesis strategies: prompts that share prefixes, as real traffic does, and what an engine does with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from statemachine.events import ReleaseReason


class Admit(NamedTuple):
    """A request arrives. ``extra``: blocks beyond its prompt."""

    tokens: npt.NDArray[np.int32]
    extra: int


class Release(NamedTuple):
    """The request that has been running for ``age`` admissions (modulo those that run) ends."""

    age: int
    reason: ReleaseReason
    final: bool


class Poll(NamedTuple):
    """The engine lets its transfers come in."""


Step = Admit | Release | Poll


@st.composite
def prompts(draw: st.DrawFn, *, block_size: int, max_blocks: int = 8, words: int = 3) -> npt.NDArray[np.int32]:
    """Prompts ``int32[tokens]``, made of few different blocks, so that any two are likely to share a prefix.

    The last block may be partial.
    """
    blocks = draw(st.lists(st.integers(1, words), min_size=1, max_size=max_blocks))
    short = draw(st.integers(0, block_size - 1))
    tokens = np.repeat(np.array(blocks, np.int32), block_size)
    return tokens[: len(tokens) - short]


def steps(*, block_size: int, max_blocks: int = 8) -> st.SearchStrategy[Step]:
    """One thing that an engine does. Draw a list of them and apply each to the manager under test."""
    return st.one_of(
        st.builds(Admit, prompts(block_size=block_size, max_blocks=max_blocks), st.integers(0, 2)),
        st.builds(Admit, prompts(block_size=block_size, max_blocks=max_blocks), st.integers(0, 2)),
        st.builds(Release, st.integers(0, 64), st.sampled_from(ReleaseReason), st.booleans()),
        st.builds(Poll),
    )
