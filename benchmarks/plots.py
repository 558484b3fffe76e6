"""The pictures of ``docs/benchmarks.md``, as SVG."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_COLOURS = ("#0b6e99", "#d9730d", "#9b9a97", "#6940a5", "#ad1a72", "#dfab01", "#0f7b6c", "#e03e3e")


def draw(parts: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Draw what there are figures for; returns file names by part."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "kvledger",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    folder.mkdir(exist_ok=True)
    made: dict[str, list[str]] = {}
    for name, picture in (("contest", _contest), ("decode", _decode), ("growth", _growth), ("hitrate", _hit_rates)):
        if name in parts and parts[name]["figures"]:
            made[name] = picture(parts[name]["figures"], folder)
    return made


def _save(figure: Any, folder: Path, name: str) -> str:
    import matplotlib.pyplot as plt

    figure.savefig(folder / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return name


def _contest(figures: list[dict[str, Any]], folder: Path) -> list[str]:
    """µs per request, a group of bars per stream, a picture per block size."""
    import matplotlib.pyplot as plt

    made = []
    sizes = sorted({int(found[1]) for one in figures if (found := re.search(r"block (\d+)(, list)?$", one["name"]))})
    for size in sizes:
        costs: dict[str, dict[str, float]] = {}
        for one in figures:
            stream, _, rest = one["name"].partition(f", block {size}")
            if rest == ", list" and one["against"] == "own int32":
                costs.setdefault(stream, {"kvledger": one["theirs"]})["kvledger, list"] = one["ours"]
            elif not rest and stream != one["name"]:
                costs.setdefault(stream, {"kvledger": one["ours"]})[one["against"]] = one["theirs"]
        names = list(dict.fromkeys(name for group in costs.values() for name in group))
        names.sort(key=lambda name: not name.startswith("kvledger"))
        figure, axes = plt.subplots(figsize=(8, 3.2))
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            places = [number + (index - (len(names) - 1) / 2) * width for number in range(len(costs))]
            heights = [group.get(name, 0.0) for group in costs.values()]
            axes.bar(places, heights, width, label=name, color=_COLOURS[index % len(_COLOURS)])
        axes.set_yscale("log")
        axes.set_xticks(range(len(costs)), list(costs))
        axes.set_ylabel("µs per request")
        axes.set_title(f"whole life of a request, blocks of {size} tokens (logarithmic)", loc="left")
        axes.set_ylim(10, 8 * max(cost for group in costs.values() for cost in group.values()))
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
        made.append(_save(figure, folder, f"benchmarks-requests-{size}.svg"))
    return made


def _lines(
    series: dict[str, list[tuple[float, float]]], folder: Path, name: str, words: tuple[str, str, str]
) -> list[str]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3))
    for index, (who, points) in enumerate(series.items()):
        points = sorted(dict(points).items())
        across, up = [x for x, _ in points], [y for _, y in points]
        axes.plot(across, up, marker="o", markersize=4, label=who, color=_COLOURS[index % len(_COLOURS)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    title, axes_x, axes_y = words
    axes.set_title(title, loc="left")
    axes.set_xlabel(axes_x)
    axes.set_ylabel(axes_y)
    axes.legend(frameon=False, fontsize=8)
    return [_save(figure, folder, name)]


def _decode(figures: list[dict[str, Any]], folder: Path) -> list[str]:
    series: dict[str, list[tuple[float, float]]] = {}
    for one in figures:
        running, _, how = one["name"].partition(" running, ")
        count = float(running.replace(",", ""))
        series.setdefault(f"kvledger, {how}", []).append((count, one["ours"]))
        series.setdefault(f"{one['against']}, {how}", []).append((count, one["theirs"]))
    return _lines(series, folder, "benchmarks-decode.svg", ("a decode step", "running requests", "µs per step"))


def _growth(figures: list[dict[str, Any]], folder: Path) -> list[str]:
    series: dict[str, list[tuple[float, float]]] = {}
    for one in figures:
        blocks, _, rest = one["name"].partition(" blocks, runs of 32, p50")
        if rest or blocks == one["name"]:
            continue
        count = float(blocks.replace(",", ""))
        series.setdefault("kvledger", []).append((count, one["ours"]))
        if not one["against"].startswith("own"):
            series.setdefault(one["against"], []).append((count, one["theirs"]))
    words = ("a request of 32 blocks into a full cache", "blocks cached", "µs per request, p50")
    return [] if len(series.get("kvledger", ())) < 2 else _lines(series, folder, "benchmarks-growth.svg", words)


def _hit_rates(figures: list[dict[str, Any]], folder: Path) -> list[str]:
    import matplotlib.pyplot as plt

    series: dict[str, list[tuple[float, float]]] = {}
    for one in figures:
        blocks, _, hints = one["name"].partition(" blocks, ")
        count = float(blocks.replace(",", ""))
        series.setdefault(f"kvledger, {hints}", []).append((count, one["ours"]))
        series.setdefault(one["against"], []).append((count, one["theirs"]))
    figure, axes = plt.subplots(figsize=(8, 3))
    for index, (who, points) in enumerate(series.items()):
        axes.plot(*zip(*points), marker="o", markersize=4, label=who, color=_COLOURS[index])
    axes.set_ylim(0)
    axes.set_title("hit rate", loc="left")
    axes.set_xlabel("blocks of the device pool")
    axes.set_ylabel("% of the prompts' blocks")
    axes.legend(frameon=False, fontsize=8)
    return [_save(figure, folder, "benchmarks-hit-rates.svg")]
