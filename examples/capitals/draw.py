"""Draw what the teacher expected at one position of a dataset, as an SVG bar chart.

Example: python examples/capitals/draw.py out/capitals 0 4 examples/capitals/paris.svg
"""

import sys
from html import escape
from pathlib import Path

import numpy as np

from builder.dataset.info import alternatives
from builder.dataset.spelling import signs

BAR_WIDTH, ROW_HEIGHT, LABEL_WIDTH = 420, 24, 110


def draw(directory: Path, row: int, position: int, shown: int = 8) -> str:
    """The chart: the `shown` most probable tokens, the other ones of the top K, and the tail."""
    found = alternatives(directory, row, position)
    rest = float(np.sum(found.probabilities[shown:]))
    bars = [
        *((found.tokens[i], float(found.probabilities[i]), i == found.rank) for i in range(shown)),
        (f"ranks {shown + 1}–{len(found.tokens)}", rest, False),
        ("all others", found.tail, False),
    ]
    height = ROW_HEIGHT * (len(bars) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" '
        f'font-family="sans-serif" font-size="14">',
        f'<rect width="640" height="{height}" fill="white"/>',
        f'<text x="12" y="22" font-weight="bold">“{escape(found.context)} …”</text>',
    ]
    for i, (label, probability, really_followed) in enumerate(bars):
        y = ROW_HEIGHT * (i + 1.5)
        width = max(BAR_WIDTH * probability, 1)
        colour = "#c2410c" if really_followed else "#94a3b8" if i >= shown else "#1d4ed8"
        seen = label.strip() or "".join(
            signs(label, in_line=True)
        )  # a token of spaces has a name, too
        note = "  ← really followed" if really_followed else ""
        parts += [
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 12}" text-anchor="end">{escape(seen)}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="16" fill="{colour}"/>',
            f'<text x="{LABEL_WIDTH + width + 6:.1f}" y="{y + 12}">{probability:.1%}{note}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    directory, row, position, target = sys.argv[1:]
    Path(target).write_text(draw(Path(directory), int(row), int(position)), encoding="utf-8")
