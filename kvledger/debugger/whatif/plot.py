"""Hit rates over capacity as a picture (SVG). Needs the extra ``plot``: matplotlib, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvledger.debugger.export.output import CannotWrite, complete
from kvledger.text import printable


class Line(NamedTuple):
    """One line of the picture."""

    label: str
    capacities: Sequence[int]
    """Device blocks."""
    rates: Sequence[float]
    """Hit rates, 0 to 1."""


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """Draw hit rates over capacity. The file appears when it is complete.

    Raises:
        CannotWrite
    """
    if path.suffix != ".svg":
        raise CannotWrite(f"{path} does not end in .svg, which is what is drawn")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise CannotWrite("drawing needs matplotlib: pip install 'kvledger[plot]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        marker = "" if len(line.capacities) > 30 else "o"
        axes.plot(line.capacities, line.rates, marker=marker, markersize=4, label=printable(line.label))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("device blocks")
    axes.set_ylabel("hit rate")
    axes.set_title(printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    with complete(path, replace=True) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
