"""What makes blocks equal, in full: images by all their bytes, namespaces as they are, weights across restarts."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from kvledger import CacheConfig, CacheManager, CallTooLarge, InvalidCommand, Item, Tier, namespace_key
from kvledger.config import ConfigError
from statemachine.content import versioned, words_of

PROMPT = np.arange(64, dtype=np.int32)


def colliding() -> list[bytes]:
    """Two names that begin alike, and whose first content words are the same."""
    seen: dict[bytes, bytes] = {}
    for number in itertools.count():
        name = b"sixteen bytes are" + number.to_bytes(4, "little")
        word = words_of([0], items=[Item(name, 0, 1)]).tobytes()
        if seen.setdefault(word, name) != name:
            return [seen[word], name]
    raise AssertionError


COLLIDING = colliding()
PAIRS = {
    "two addresses": (Item(b"https://example.com/cat.png", 16, 32), Item(b"https://example.com/dog.png", 16, 32)),
    "two of one request": (Item(b"chatcmpl-0123456789-image-0", 16, 32), Item(b"chatcmpl-0123456789-image-1", 16, 32)),
    "short names": (Item(b"1", 0, 20), Item(b"2", 0, 20)),
    "one position": (Item(COLLIDING[0], 16, 1), Item(COLLIDING[1], 16, 1)),
    "from the last position of a block on": (Item(COLLIDING[0], 15, 40), Item(COLLIDING[1], 15, 40)),
    "another length": (Item(COLLIDING[0], 15, 40), Item(COLLIDING[0], 15, 41)),
    "two in one block": (Item(COLLIDING[0], 30, 1), Item(COLLIDING[1], 30, 1)),
}


@contextmanager
def ledger(**settings: object) -> Iterator[CacheManager]:
    config = CacheConfig(**{"block_size": 16, "device_blocks": 64, **settings})  # type: ignore[arg-type]
    with CacheManager.create(f"content-{os.getpid()}", config) as manager:
        yield manager


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("namespace", [b"", b"salt"])
def test_another_image_matches_up_to_where_it_begins(pair: str, namespace: bytes) -> None:
    before = [Item(COLLIDING[0], 29, 1)] if pair == "two in one block" else []
    first, second = PAIRS[pair]
    with ledger() as manager:
        manager.admit("first", PROMPT, items=[*before, first], namespace=namespace)
        manager.cache("first")
        manager.release("first")
        assert manager.admit("again", PROMPT, items=[*before, first], namespace=namespace).cached_blocks == 3
        assert manager.admit("other", PROMPT, items=[*before, second], namespace=namespace).cached_blocks == (
            first.offset // 16
        )
        manager.cache("other")
        manager.release("again")
        manager.release("other")
        for item in (first, second):  # both are cached now, side by side
            assert sum(manager.peek(PROMPT, items=[*before, item], namespace=namespace, max_blocks=99)) == 4


def test_an_image_that_comes_later_counts_in_full() -> None:
    with ledger(block_size=4) as manager:
        for key, digest in zip("ab", COLLIDING, strict=True):
            manager.admit(key, [1, 2, 3, 4, 5, 6], blocks=4)
            manager.append(key, [0, 0, 0, 7], items=[Item(digest, 0, 3)])
            manager.append(key, 8)
            with pytest.raises(InvalidCommand, match="cut"):
                manager.retract(key, 3)
            manager.append(key, [9])
            manager.commit({key: 8})
            manager.commit({key: 12})
            manager.release(key)
        for digest in COLLIDING:
            text = [1, 2, 3, 4, 5, 6, 0, 0, 0, 7, 8, 9]
            assert sum(manager.peek(text, items=[Item(digest, 6, 3)], max_blocks=99)) == 3
        assert sum(manager.peek([1, 2, 3, 4, 5, 6, 0, 0, 0, 7, 8, 9], items=[Item(b"third", 6, 3)], max_blocks=99)) == 1


def test_what_goes_on_between_chunks_ends_before_an_image_that_must_not_be_cut() -> None:
    tokens, items = np.zeros(40, np.int32), [Item(bytes(range(32)), 6, 20)]  # positions 6 to 25
    with ledger(block_size=4, device_blocks=32, chunked_multimodal=False) as manager:
        manager.match("waits", tokens, items=items)
        manager.admit("computes", tokens, items=items)
        manager.cache("computes")
        manager.release("computes")
        manager.evict(Tier.DEVICE, 6)  # pressure takes the end of the path: what is left ends inside the image
        assert manager.extend("waits").cached_blocks == 1


def test_whether_a_model_begins_inside_an_image_is_not_forgotten() -> None:
    with ledger(chunked_multimodal=False) as manager:
        name = manager.name
        items = [Item(b"image", 0, 20)]
        manager.admit("a", PROMPT[:33], items=items)
        manager.cache("a")
        manager.release("a")
        manager.close(keep=True)
        with pytest.raises(ConfigError, match="chunked_multimodal is False in this ledger"):
            CacheManager.open(name, CacheConfig(block_size=16, device_blocks=64))
        with CacheManager.open(name) as again:
            assert again.admit("b", PROMPT[:30], items=items).cached_blocks == 0, "the image ends in the second block"
            assert again.admit("c", PROMPT[:33], items=items).cached_blocks == 2


def die_after_loading(name: str, weights: str) -> None:
    """In a process of its own: cache under the first weights, load others, die."""
    pid = os.fork()
    if not pid:
        try:
            manager = CacheManager.create(name, CacheConfig(device_blocks=100, block_size=4))
            manager.admit("a", list(range(20)))
            manager.cache("a")
            manager.release("a")
            manager.pause()
            manager.resume(weights=weights)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_the_weights_in_force_outlive_their_engine() -> None:
    name = f"weights-{os.getpid()}"
    die_after_loading(name, "v2")
    config = CacheConfig(device_blocks=100, block_size=4)
    with CacheManager.open(name, config) as manager:
        assert manager.state.weights == "v2" and manager.peek(range(20), max_blocks=99) == (0, 0)
        manager.admit("b", range(20))
        manager.cache("b")
        manager.release("b")
        manager.close(keep=True)
    with CacheManager.open(name, CacheConfig(device_blocks=100, block_size=4, weights="v3")) as manager:
        assert manager.state.weights == "v3" and manager.peek(range(20), max_blocks=99) == (0, 0)
        manager.close(keep=True)
    with CacheManager.open(name, CacheConfig(device_blocks=100, block_size=4, weights="v3")) as manager:
        assert manager.state.weights == "v3"
        manager.close(keep=True)
    with CacheManager.open(name, CacheConfig(device_blocks=100, block_size=4, weights="v2")) as manager:
        assert manager.peek(range(20), max_blocks=99) == (5, 0), "the engine says that it has loaded these again"
        manager.close(keep=True)
    with CacheManager.open(name, CacheConfig(device_blocks=100, block_size=4, weights="")) as manager:
        assert manager.peek(range(20), max_blocks=99) == (5, 0), "those that the ledger began with"


def test_no_namespace_passes_for_other_weights() -> None:
    with ledger(block_size=4) as manager:
        for key, namespace in (("raw", versioned("v2", b"")), ("lora", versioned("v2", namespace_key(lora="x")))):
            manager.admit(key, range(8), namespace=namespace)
            manager.cache(key)
            manager.release(key)
        manager.pause()
        manager.resume(weights="v2")
        assert (
            manager.peek(range(8), max_blocks=99)
            == manager.peek(range(8), namespace=namespace_key(lora="x"), max_blocks=99)
            == (0, 0)
        )
        manager.admit("own", range(8))
        manager.cache("own")
        manager.release("own")
        manager.pause()
        manager.resume(weights="")
        assert manager.peek(range(8), namespace=versioned("v2", b""), max_blocks=99) == (2, 0), (
            "its own, from the beginning"
        )
        manager.clear()
        manager.pause()
        manager.resume(weights="v2")
        manager.admit("own", range(8))
        manager.cache("own")
        manager.release("own")
        manager.pause()
        manager.resume(weights="")
        assert manager.peek(range(8), namespace=versioned("v2", b""), max_blocks=99) == (0, 0)


@pytest.mark.parametrize("weights", [7, b"v2", "\ud800"])
def test_weights_are_named_by_a_text(weights: object) -> None:
    with pytest.raises(ConfigError, match="weights"):
        CacheConfig(device_blocks=4, weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [4096, 8192, 61440])
def test_a_segment_that_the_log_refuses_is_refused_by_the_configuration(size: int) -> None:
    with pytest.raises(ConfigError, match="segment_bytes"):
        CacheConfig(device_blocks=4, segment_bytes=size)
    with ledger(segment_bytes=65536) as manager:
        with pytest.raises(CallTooLarge, match=r"a prompt has up to about 3,\d\d\d new tokens here"):
            manager.admit("long", range(5000), blocks=1)
        manager.admit("short", range(1000))


def test_cleared_namespaces_that_others_hold_are_no_list_to_search() -> None:
    with ledger(block_size=4) as manager:
        for number in range(8):
            manager.admit(f"r{number}", [1, 2, 3, 4, 5], namespace=str(number).encode())
            manager.cache(f"r{number}")
        manager.clear(force=True)
        held = [root.words for root in manager.state.retired]
        assert isinstance(manager.state.retired, dict) and len(held) == 8
        for number in (3, 0, 7):
            manager.release(f"r{number}")
            held.remove(str(number).encode())
            manager.evict(Tier.DEVICE, 100)
            assert [root.words for root in manager.state.retired] == held
