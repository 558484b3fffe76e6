"""``docs/benchmarks.md``, its plots and its goals, from the figures of a run: ``python -m benchmarks.page``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.figures import FIELDS, Figure, number

DOCS = Path(__file__).resolve().parents[1] / "docs"
_INTRODUCTION = """\
# Measurements

Written by `make bench` from `docs/benchmarks.json`; do not edit. Every figure is a ratio against a peer, or a floor
(the least that it could cost), of the same run; where repetitions are possible they take turns, and medians stand
here. *Ratio* says how many times better kvledger is: 2 is twice as good, 0.5 is half as good. Read ratios, not digits.

`make bench` installs the peers beside the project, `python -m benchmarks --only PART` runs one part, and every part
works alone (`python -m benchmarks.PART`). `make bench-compare BASE=<commit>` says which ratios another commit changes.
"""
_REACHED, _NOT_REACHED = "reached", "**not reached**"
_BEGIN, _END = "<!-- goals: written by make bench -->", "<!-- end of goals -->"
_ABOUT = {
    "contest": """\
vLLM's `KVCacheManager` and SGLang's trees, each in its own process, with the type of prompt that it likes best (int32
arrays here, lists for vLLM, `array('q')` for SGLang), the same requests, capacity and requests in flight for all.
Everything that a manager does is included on both sides: hashes, eviction, block tables; here the log is on. SGLang's
default tree is the one in Rust. `list` rows: all prompts come as Python lists. Streams: `benchmarks/streams.py`.""",
    "decode": """\
One more token for each running request, prompts of about 1,000 tokens, blocks of 16. vLLM publishes blocks as they
fill, SGLang when a request ends; kvledger does what the peer in the row does.""",
    "pattern": """\
Steps of a scheduler in which requests begin, get a token each, and end; prompts are lists of about 1,000 tokens, half
of them shared, blocks of 16. *Batches*: the calls of a step name all its requests. *One by one*: three calls per
request and step (`append`, `grow`, `commit`), which is the pattern of vLLM's scheduler. *In a step*: one transaction.
Where no border is crossed and nobody begins or ends, nothing is logged.""",
    "growth": """\
A full cache of so many blocks of 16 tokens, requests that evict what they cache; *longest* counts while it fills, too.
A run is what one prompt cached: with runs of one block the tree is at its worst. Memory is private memory per cached
block; SGLang and kvledger keep its tokens (kvledger 64 bytes), vLLM a hash.""",
    "lifecycle": """\
Match, allocate, cache and release beside a bare run-compressed tree that gives the same answers, without events, log,
validation or tiers: what the ledger costs. Blocks of 64 tokens.""",
    "fastdeploy": "A request through FastDeploy's interface (`kvledger.adapters.fastdeploy`), beside `CacheManager`.",
    "handoff": "From the engine's append to a worker that sees it, one way, a message every 200 µs.",
    "roundtrip": """\
From an order to its event: append, transfer worker, copy, acknowledgement, `TransferFinished`. ZeroMQ's processes only
echo a message: they decide, copy and record nothing. With more ranks than cores nobody can spin.""",
    "swap": "The transfer worker's copy beside one memcpy of the same bytes, by block bytes, layers and order of ids.",
    "replay": "Recordings of the Mooncake conversation trace (the generated sample where that is not at hand).",
    "recovery": "An engine killed with SIGKILL; the next one opens its ledger. One core.",
    "debugger": "Questions about a recording of a cache of 65,536 blocks.",
    "hitrate": """\
The conversation trace, 64 requests in flight; the bound evicts what is needed last (Belady). Hints: requests that
nobody continues are released as `final`.""",
    "interpreter": "Garbage collections, comparing and copying tokens, import.",
}


def write(report: dict[str, Any], folder: Path = DOCS) -> None:
    """Write the page, the plots of its parts, and the table of goals in ``performance.md``."""
    parts = report["parts"]
    pictures = plots.draw(parts, folder / "images")
    chapters = [_INTRODUCTION, _machines(parts), _skipped(parts)]
    for name, part in parts.items():
        chapters.append(_chapter(name, part, pictures.get(name, [])))
    (folder / "benchmarks.md").write_text("\n".join(chapters))
    performance = folder / "performance.md"
    if performance.exists():
        before, _, rest = performance.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        performance.write_text(f"{before}{_BEGIN}\n\n{goals(parts)}\n{_END}{after}")


def _machines(parts: dict[str, Any]) -> str:
    """On what, and which commit; parts that were run again may differ."""
    told: dict[str, list[str]] = {}
    for name, part in parts.items():
        machine = part["machine"]
        packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
        text = (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"Linux {machine['kernel']}, Python {machine['python']}; {packages}; kvledger {part['build']}. "
            f"Commit {part['commit']}, load {machine['load']} at the start."
            + (" A quick run: digits mean nothing." if part["quick"] else "")
        )
        told.setdefault(text, []).append(name)
    if len(told) == 1:
        return next(iter(told)) + "\n"
    return "\n".join(f"* {', '.join(names)}: {text}" for text, names in told.items()) + "\n"


def _skipped(parts: dict[str, Any]) -> str:
    verdicts = [row[-1] for row in _goals(parts)]
    reached = verdicts.count(_REACHED)
    text = f"{reached} of {len(verdicts)} goals are reached; [performance.md](performance.md) lists them by stream.\n"
    skipped = dict.fromkeys(reason for part in parts.values() for reason in part["skipped"])
    if skipped:
        text += "\nNot compared:\n" + "".join(f"\n* {reason}" for reason in skipped) + "\n"
    return text


def goals(parts: dict[str, Any]) -> str:
    """Every goal with its verdict."""
    return _table(("", "against", "kvledger", "ratio", "wanted", ""), _goals(parts))


def _goals(parts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Those of the streams beside the fastest peer, then all others; a limit is told once, whoever stands beside it."""
    streams: dict[str, list[dict[str, Any]]] = {}
    others: dict[tuple[str, str], tuple[str, ...]] = {}
    for name, part in parts.items():
        for one in part["figures"]:
            if name == "contest" and one["goal"] and not one["against"].startswith("own"):
                streams.setdefault(one["name"], []).append(one)
            elif one["goal"]:
                limit = one["least_ratio"] is None
                beside = ("", "") if limit else (one["against"], _ratio(one))
                value = f"{number(one['ours'])} {one['unit']}"
                row = f"{part['title']}: {one['name']}", beside[0], value, beside[1], one["goal"], _verdict(one)
                others[row[:2]] = row
    rows = []
    for name, group in streams.items():
        fastest = min(group, key=lambda one: one["ratio"])
        least = 20.0 if name.startswith("128 k") else 5.0
        rows.append(_goal(name, f"{fastest['against']}, the fastest peer", fastest, least))
        peers = [one for one in group if one["against"].startswith("vLLM")]
        if name.endswith("block 16") and peers:
            fastest = min(peers, key=lambda one: one["ratio"])
            rows.append(_goal(name, fastest["against"], fastest, 10.0))
    return rows + list(others.values())


def _verdict(one: dict[str, Any]) -> str:
    """Whether a figure reaches its goal, and else by how much it misses it."""
    figure = Figure(**{key: value for key, value in one.items() if key in FIELDS})
    return _REACHED if figure.reached else f"{_NOT_REACHED}, by {number(figure.missed_by)} ×"


def _goal(name: str, against: str, one: dict[str, Any], least: float) -> tuple[str, ...]:
    short = least / one["ratio"]
    verdict = _REACHED if short <= 1 else f"{_NOT_REACHED}, {number(short)} × too slow"
    value = f"{number(one['ours'])} {one['unit']}"
    return (f"Life of a request: {name}", against, value, _ratio(one), f"≥ {least:g} ×", verdict)


def _chapter(name: str, part: dict[str, Any], pictures: list[str]) -> str:
    module, _, interpreted = name.partition("-")
    about = f"As above, {interpreted}." if interpreted else _ABOUT[module]
    lines = [f"## {part['title']}\n\n{about} (`python -m benchmarks --only {name}`, {part['seconds']:.0f} s)\n"]
    if "error" in part:
        lines.append(f"It failed: {part['error']}.\n")
    lines += [f"![{picture}](images/{picture})\n" for picture in pictures]
    rows = (
        (
            one["name"],
            one["unit"],
            number(one["ours"]),
            one["against"],
            number(one["theirs"]),
            _ratio(one),
            f"{one['goal']}: {_verdict(one)}" if one["goal"] else "",
        )
        for one in part["figures"]
    )
    lines.append(_table(("", "unit", "kvledger", "against", "", "ratio", "wanted"), rows))
    if name == "contest":
        lines.append(_contestants(part))
    if name == "pattern":
        lines.append(_steps(part))
    return "\n".join(lines)


def _contestants(part: dict[str, Any]) -> str:
    """Distribution, phases and hits of everybody."""
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    differences = []
    for one in part["figures"]:
        details = one["details"]
        if "ours" not in details:
            continue
        stream = one["name"].removesuffix(", list")
        own = "kvledger, list" if one["name"].endswith(", list") else "kvledger"
        for who, spread in ((own, details["ours"]), (one["against"], details["theirs"])):
            if not who.startswith("own"):
                rows.setdefault((stream, who), _spread(spread))
        if details["hits"] != "the same blocks" and not one["against"].startswith("own"):
            differences.append(f"* {stream}, {one['against']}: {details['hits']}")
    head = ("", "", "p50", "p99", "longest call", "longest GC", "hit blocks", "admit", "cache", "grow", "finish")
    table = _table(head, ((*key, *rest) for key, rest in sorted(rows.items(), key=lambda row: _order(row[0], rows))))
    text = "µs by request, ms of the longest call and collection, and µs per request by phase (vLLM publishes while it "
    text += "allocates; what is generated is published in *finish*, by vLLM as blocks fill):\n\n" + table
    if not differences:
        return text + "\nAll contestants hit the same blocks, request by request.\n"
    return text + (
        "\nAll others hit the same blocks as kvledger, request by request. These differ, as they choose other victims: "
        "SGLang evicts whole leaves of its tree by their last use, vLLM and kvledger block by block:\n\n"
        + "\n".join(dict.fromkeys(differences))
        + "\n"
    )


def _steps(part: dict[str, Any]) -> str:
    """Distribution and hits of everybody."""
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    for one in part["figures"]:
        if not one["details"]:
            continue
        running, _, way = one["name"].partition(", ")
        for who, steps in ((f"kvledger, {way}", one["details"]["ours"]), (one["against"], one["details"]["theirs"])):
            spread = [number(steps[key]) for key in ("p50_us", "p99_us", "longest_us")]
            rows.setdefault((running, who), (*spread, f"{steps['hit_blocks']:,}"))
    table = _table(("", "", "p50", "p99", "longest", "hit blocks"), ((*key, *rest) for key, rest in rows.items()))
    return "µs of a step:\n\n" + table


def _order(key: tuple[str, str], rows: dict[tuple[str, str], Any]) -> tuple[int, int, str]:
    streams = list(dict.fromkeys(stream for stream, _ in rows))
    return streams.index(key[0]), not key[1].startswith("kvledger"), key[1]


def _spread(details: dict[str, Any]) -> tuple[str, ...]:
    return (
        number(details["p50_us"]),
        number(details["p99_us"]),
        number(details["longest_call_ms"]),
        number(details["longest_collection_ms"]),
        f"{details['hit_blocks']:,}",
        *(number(us) for us in details["phases_us"].values()),
    )


def _ratio(one: dict[str, Any]) -> str:
    return number(one["ratio"])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write(json.loads((DOCS / "benchmarks.json").read_text()))
