"""Layer groups of a model: layers of one kind share a block table. For :attr:`kvledger.CacheConfig.groups`.

::

    from kvledger.groups import full, window

    config = CacheConfig(device_blocks=10_000, groups=(full(), window(1024, blocks=2_000, replay=1024)))

The first group is :func:`full`, whose pool are the ``device_blocks``. What each kind keeps, and what its block table
looks like: ``docs/groups.md``.
"""

from __future__ import annotations

from statemachine.state.groups import Group, Kind


def full(name: str = "full") -> Group:
    """Layers with full attention: all tokens of a request. Always the first group, and the one that is cached.

    A model without such layers names it all the same: its blocks are counted, and no memory stands behind them.
    """
    return Group(Kind.FULL, name)


def window(tokens: int, *, blocks: int, sinks: int = 0, replay: int = 0, name: str = "window") -> Group:
    """Layers that see the last ``tokens`` tokens, the one being computed included, and always the first ``sinks``.

    Args:
        tokens: a request needs ``ceil((tokens - 1 + n) / block_size) + 1`` blocks at most while ``n`` are computed.
        blocks: of the group's pool on the device.
        sinks: leading tokens that stay. (Sinks that are weights of the model, as in gpt-oss, need none.)
        replay: so many tokens before a hit are computed once more, in this group alone, so that the window is filled.
            The model says how many are enough: with several such layers above each other each of them needs a window
            more, and models that are made for it (DeepSeek V4.1) do with one window. 0: requests hit nothing.
    """
    return Group(Kind.WINDOW, name, blocks, tokens, sinks, replay)


def chunk(tokens: int, *, blocks: int, name: str = "chunk") -> Group:
    """Layers that see back to the last multiple of ``tokens`` (Llama 4).

    A hit is computed once more from there on, in this group alone; where it ends at such a border, nothing is.
    """
    return Group(Kind.CHUNK, name, blocks, tokens)


def state(*, blocks: int, per_request: int = 1, name: str = "state") -> Group:
    """Layers with a state of fixed size, such as Mamba or gated delta nets.

    Requests of a model with such layers hit nothing: no state is cached.

    Args:
        per_request: blocks that each request has: one, and one more per draft token whose state is kept apart.
    """
    return Group(Kind.STATE, name, blocks, per_request)


def scratch(*, blocks: int, per_request: int = 1, name: str = "scratch") -> Group:
    """Memory of each request that is filled by computing and never shared, such as the ring of an open group."""
    return Group(Kind.SCRATCH, name, blocks, per_request)


def static(*, blocks: int, name: str = "static") -> Group:
    """What stands fast when a request begins, such as keys and values of an encoder: ``admit(static_tokens=...)``.

    It is no part of the prompt, so whatever it is made of has to tell prompts apart: as an item, or by namespace.
    """
    return Group(Kind.STATIC, name, blocks)
