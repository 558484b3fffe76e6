"""Draws docs/images/block-tables.svg and top.svg (``python docs/pictures.py``) from what kvledger answers."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kvledger import CacheConfig, CacheManager

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
CELL, GAP, LEFT = 44, 8, 96
SHARED, FIRST, SECOND, FREE = "#90a4ae", "#4db6ac", "#ffb74d", "#eceff1"


def block_tables() -> str:
    """Two requests with the same beginning in a pool of twelve blocks."""
    shared = [*range(12)]
    config = CacheConfig(block_size=4, device_blocks=12)
    with CacheManager.create(f"pictures-{os.getpid()}", config) as manager:
        manager.admit("A", [*shared, *range(100, 107)])
        manager.commit({"A": 19})
        manager.admit("B", [*shared, *range(200, 210)])
        tables = {"A": manager.block_table("A").tolist(), "B": manager.block_table("B").tolist()}
    common = {*tables["A"]} & {*tables["B"]}
    colours = dict.fromkeys(tables["A"], FIRST) | dict.fromkeys(tables["B"], SECOND)
    colours |= dict.fromkeys(common, SHARED)
    width = LEFT + 12 * (CELL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 290" font-family="sans-serif" font-size="15">',
        f'<rect width="{width}" height="290" fill="#fff"/>',
    ]
    for row, (name, table) in enumerate(tables.items()):
        parts.append(f'<text x="8" y="{38 + 60 * row}">request {name}</text>')
        for at, block in enumerate(table):
            parts += _cell(LEFT + at * (CELL + GAP), 10 + 60 * row, str(block), colours[block])
    parts.append('<text x="8" y="178">device pool</text>')
    for block in range(12):
        parts += _cell(LEFT + block * (CELL + GAP), 150, str(block), colours.get(block, FREE))
    key = ((SHARED, "cached, held by both"), (FIRST, "of A"), (SECOND, "of B"), (FREE, "free"))
    for at, (colour, text) in enumerate(key):
        x = LEFT + (0, 200, 290, 380)[at]
        parts += [f'<rect x="{x}" y="228" width="16" height="16" fill="{colour}"/>']
        parts += [f'<text x="{x + 22}" y="242">{text}</text>']
    parts.append(
        f'<text x="{LEFT}" y="275">A block table names blocks in token order; where they lie does not matter.</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, text: str, colour: str) -> list[str]:
    return [
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="4" fill="{colour}" stroke="#546e7a"/>',
        f'<text x="{x + CELL / 2}" y="{y + 28}" text-anchor="middle">{text}</text>',
    ]


def top() -> str:
    """``kvledger top`` beside the engine of the quickstart."""
    sys.path.insert(0, str(ROOT))
    from examples.quickstart.__main__ import start_engine, stop

    engine = start_engine("demo", 30)
    try:
        printed = subprocess.run(
            [sys.executable, "-m", "kvledger.cli", "top", "demo", "--once"],
            env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "88"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    finally:
        stop(engine)
    console = Console(record=True, width=88, file=io.StringIO())
    console.print(Text.from_ansi(printed.rstrip()))
    drawn = console.export_svg(title="kvledger top demo")
    return re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # fonts of the reader's own, not from the network


if __name__ == "__main__":
    (IMAGES / "block-tables.svg").write_text(block_tables())
    (IMAGES / "top.svg").write_text(top())
