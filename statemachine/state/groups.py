"""Layer groups: layers of one kind share a block table, and each kind has rules of its own.

Group 0 are the layers with full attention; they are what the prefix tree is about. Beside them a ledger may have *side
groups*, each with a pool of its own on the device. A *windowed* group (window, chunk) has a table of the same positions
as that of group 0, of which only those are filled that the next token can still see; the others have blocks by the
request, whatever its length.

``n`` tokens are *settled* when they are computed and no step in flight will compute them again. From then on nobody
looks at what stands before :meth:`Group.dead`, except at the sinks.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

MOST_GROUPS: Final = 15
"""Side groups of a ledger."""
MOST_TOKENS: Final = 1 << 31
NOTHING: Final = -1
"""In a block table: there is no block at this position."""
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")


class Kind(IntEnum):
    """What layers of a group keep of a request."""

    FULL = 0
    """All tokens."""
    WINDOW = 1
    """The last ``size`` tokens, and the first ``sinks``."""
    CHUNK = 2
    """The tokens from the last multiple of ``size`` on."""
    STATE = 3
    """One state of fixed size, after exactly so many tokens: ``size`` blocks for it and for those of drafts."""
    SCRATCH = 4
    """``size`` blocks that are rebuilt by computing."""
    STATIC = 5
    """What stands fast when the request begins, such as the keys and values of an encoder."""


class Group(NamedTuple):
    """A kind of layers. See the functions of :mod:`kvledger.groups`, which make them."""

    kind: Kind
    name: str
    blocks: int = 0
    """Of the group's pool on the device; those of group 0 are ``device_blocks``."""
    size: int = 0
    """Tokens of a window or chunk; blocks of a state or of scratch."""
    sinks: int = 0
    """Leading tokens that a window always sees."""
    replay: int = 0
    """Tokens before a hit that are computed again, to fill the window; 0: a request with this group hits nothing."""

    @property
    def windowed(self) -> bool:
        """Whether its block table has the positions of group 0's."""
        return self.kind in (Kind.WINDOW, Kind.CHUNK)

    def kept(self, block_size: int) -> int:
        """Leading blocks that hold sinks, which no window leaves."""
        return -(-self.sinks // block_size)

    def dead(self, settled: int) -> int:
        """So many leading tokens (sinks apart) nobody looks at once ``settled`` tokens are."""
        if self.kind == Kind.WINDOW:
            return max(settled - self.size + 1, 0)
        return settled // self.size * self.size if self.kind == Kind.CHUNK else 0

    def resumed(self, tokens: int) -> int:
        """From which token on a hit of ``tokens`` has to be computed again, as far as this group is concerned."""
        if self.kind == Kind.WINDOW:
            return max(tokens - self.replay, 0) if self.replay else 0
        if self.kind == Kind.CHUNK:
            return tokens // self.size * self.size
        return 0 if self.kind == Kind.STATE else tokens

    def most(self, computing: int, block_size: int) -> int:
        """Blocks that a request needs at most while ``computing`` tokens are computed at once."""
        if not self.windowed:
            return self.size
        if self.kind == Kind.CHUNK:
            return -(-(self.size + computing) // block_size) + (self.size % block_size > 0)
        return -(-(self.size - 1 + computing) // block_size) + 1 + self.kept(block_size)

    def text(self) -> str:
        """The group as a line of :attr:`statemachine.events.LedgerOpened.groups`."""
        return f"{self.kind.name.lower()} {self.name} {self.blocks} {self.size} {self.sinks} {self.replay}"

    def wrong(self, most_blocks: int) -> str:
        """What is impossible about it; empty: nothing is."""
        name = f"layer group {self.name!r}"
        if not 0 < len(self.name) <= 40 or not _NAME.issuperset(self.name):
            return f"the name of a layer group has 1 to 40 of a-z, 0-9, _ and -, not {self.name!r:.80}"
        if not 0 < self.blocks <= most_blocks:
            return f"blocks of {name} must be a whole number from 1 to {most_blocks}, not {self.blocks}"
        if self.kind != Kind.STATIC and not 0 < self.size < (MOST_TOKENS if self.windowed else self.blocks + 1):
            what = "tokens" if self.windowed else f"blocks per request, of the {self.blocks} in its pool"
            return f"the size of {name} must be a whole number of {what} from 1, not {self.size}"
        if not 0 <= self.sinks < MOST_TOKENS or not 0 <= self.replay < MOST_TOKENS:
            return f"sinks and replay of {name} must be whole numbers of tokens from 0"
        if self.sinks and self.replay:
            return f"{name} replays {self.replay} tokens before a hit, which does not bring its {self.sinks} sinks back"
        return ""


def resumption(groups: tuple[Group, ...], tokens: int) -> int:
    """From which token on a hit of ``tokens`` has to be computed again so that every group has what it needs.

    Chunks come last, and again while one moves the beginning: what is computed again begins at a border of each.
    """
    start = min([group.resumed(tokens) for group in groups if group.kind != Kind.CHUNK], default=tokens)
    before = -1
    while start != before:
        before = start
        start = min([group.resumed(start) for group in groups if group.kind == Kind.CHUNK], default=start)
    return start


def parse(text: str) -> tuple[Group, ...]:
    """The side groups of a ledger. Raises :class:`ValueError`."""
    groups = []
    for line in text.splitlines():
        kind, name, *numbers = line.split(" ")
        blocks, size, sinks, replay = map(int, numbers)
        groups.append(Group(Kind[kind.upper()], name, blocks, size, sinks, replay))
    return tuple(groups)


def impossible_groups(text: str, most_blocks: int) -> str:
    """What is wrong with the side groups of a ledger; empty if nothing is."""
    try:
        groups = parse(text)
    except (ValueError, KeyError) as error:
        return f"layer groups cannot be read: {error}"
    if len(groups) > MOST_GROUPS:
        return f"a ledger has {MOST_GROUPS} layer groups beside group 0 at most, not {len(groups)}"
    if "\n".join(group.text() for group in groups) != text or any(group.kind == Kind.FULL for group in groups):
        return "layer groups are not written as they should be"
    names = [group.name for group in groups]
    if len({*names}) < len(names):
        return f"two layer groups have the same name: {', '.join(names)}"
    return next((wrong for group in groups if (wrong := group.wrong(most_blocks))), "")
