"""A finished dataset → two pictures for its card: probability against k, and how sure the teacher is.

In:   the Parquet files of a dataset.
Out:  Curves, and from them SVG texts. SVG, because it is small, deterministic text that a Hub card shows like any picture, and
      because drawing it takes no library; no scripts, no fonts to fetch, a white ground for readers in dark mode.

Cost: two columns are read once, about 1 M tokens/s, in row groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builder.dataset.shards import nested_values
from builder.dataset.unpacking import check_unpacked_size

MAX_K = 1000
"""Where the curve ends for whole distributions."""
BIN_NATS = 0.5
"""Width of a bar in the distribution of entropy."""
MAX_NATS = 65504.0
"""The largest float16."""
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 620, 50, 250
"""The plot within the picture."""
BLUE, GREY, RED = "#1d4ed8", "#94a3b8", "#c2410c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """What the pictures show."""

    mass: list[float]
    """Mean probability of the k most probable tokens, for k = 1 … K, or MAX_K where all are stored."""
    entropy_shares: list[float]
    """Share of positions whose entropy lies in [i, i + 1) · BIN_NATS."""
    mean_entropy: float
    """Nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Sums over the positions of some files, from which the curves follow: plain JSON values."""

    mass: list[float]
    """Probability of each rank."""
    positions: int
    """Whose top K is there: with `completions_only` not all."""
    entropies: list[int]
    """Positions whose entropy lies in [i, i + 1) · BIN_NATS."""
    entropy: float
    """Nats."""
    tokens: int

    def __add__(self, other: Self) -> Self:
        return type(self)(
            mass=[a + b for a, b in zip_longest(self.mass, other.mass, fillvalue=0.0)],
            positions=self.positions + other.positions,
            entropies=[a + b for a, b in zip_longest(self.entropies, other.entropies, fillvalue=0)],
            entropy=self.entropy + other.entropy,
            tokens=self.tokens + other.tokens,
        )


NOTHING = Measured(mass=[], positions=0, entropies=[], entropy=0.0, tokens=0)


def measure(files: Iterable[Path]) -> Curves:
    """The curves over all positions of some Parquet files."""
    return curves_of(map(measure_file, files))


def curves_of(parts: Iterable[Measured]) -> Curves:
    """The curves over all positions of files that were measured one by one."""
    total = sum(parts, NOTHING)
    return Curves(
        mass=[float(value) for value in np.cumsum(total.mass) / max(total.positions, 1)],
        entropy_shares=[count / total.tokens for count in total.entropies],
        mean_entropy=total.entropy / total.tokens,
    )


def measure_file(path: Path) -> Measured:
    """The sums over one Parquet file.

    Raises:
        ValueError: a row group unpacks to more than any dataset's does.
    """
    file, total = pq.ParquetFile(path, page_checksum_verification=True), NOTHING
    name = "logprobs" if "logprobs" in file.schema_arrow.names else "topk_logprobs"
    for group in range(file.num_row_groups):
        check_unpacked_size(path, file.metadata, group)
        total += measure_table(file.read_row_group(group, columns=[name, "entropy"]))
    return total


def measure_table(table: pa.Table) -> Measured:
    """The sums over one row group."""
    if "logprobs" in table.column_names:
        logprobs_NK = np.sort(nested_values(table["logprobs"]), axis=-1)[:, : -MAX_K - 1 : -1]
    else:
        logprobs_NK = nested_values(table["topk_logprobs"])
    # Whatever a damaged file holds, the pictures have a place for it.
    entropy = np.nan_to_num(nested_values(table["entropy"]).astype(np.float64), posinf=MAX_NATS)
    return Measured(
        # A row group can be without a completion, and has no K then.
        mass=np.exp(logprobs_NK.astype(np.float64)).sum(0).tolist() if len(logprobs_NK) else [],
        positions=len(logprobs_NK),
        entropies=np.bincount((entropy.clip(0, MAX_NATS) / BIN_NATS).astype(np.int64)).tolist(),
        entropy=float(entropy.sum()),
        tokens=len(entropy),
    )


def mass_svg(curves: Curves) -> str:
    """Probability inside the k most probable tokens against k, on a logarithmic axis."""
    top_k = len(curves.mass)
    span = np.log(top_k) if top_k > 1 else 1.0

    def x(k: int) -> float:
        return LEFT + (RIGHT - LEFT) * float(np.log(k) / span)

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share

    points = " ".join(f"{x(k):.1f},{y(m):.1f}" for k, m in enumerate(curves.mass, start=1))
    total = curves.mass[-1]
    parts = _frame(
        f"The top {top_k} tokens hold {total:.1%} of the teacher’s probability, its first choice {curves.mass[0]:.0%}",
        "k: tokens kept, most probable first",
    )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += _level(y(share), f"{share:.0%}")
    parts += [
        f'<polygon points="{x(1):.1f},{BOTTOM} {points} {RIGHT},{BOTTOM}" fill="{BLUE}" opacity="0.15"/>',
        f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>',
    ]
    for k in marks(top_k):
        share = curves.mass[k - 1]
        anchor = "start" if k == 1 else "end" if k == top_k else "middle"
        # Above the curve while there is room, else below it.
        label_y = y(share) - 9 if share < 0.88 else y(share) + 20
        parts += [
            f'<circle cx="{x(k):.1f}" cy="{y(share):.1f}" r="3.5" fill="{BLUE}"/>',
            f'<text x="{x(k):.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{share:.0%}</text>',
            f'<text x="{x(k):.1f}" y="{BOTTOM + 18}" text-anchor="{anchor}">{k}</text>',
        ]
    return _finish(parts)


def entropy_svg(curves: Curves) -> str:
    """Share of positions against the entropy of the teacher's distribution."""
    shares = curves.entropy_shares
    highest = max(shares)
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if highest <= 5 * step)
    top = step * max(1, np.ceil(highest / step - 1e-9))
    width = (RIGHT - LEFT) / len(shares)

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share / float(top)

    parts = _frame(
        f"How sure the teacher is: {shares[0]:.0%} of positions are nearly certain, below {BIN_NATS} nats",
        "entropy of the next token in nats (0: certain; 0.7: two equal choices; 2.3: ten; 4.6: a hundred)",
    )
    for i in range(round(float(top) / step) + 1):
        parts += _level(y(i * step), f"{i * step:.0%}")
    for i, share in enumerate(shares):
        parts.append(
            f'<rect x="{LEFT + i * width + 1:.1f}" y="{y(share):.1f}" width="{width - 2:.1f}" '
            f'height="{BOTTOM - y(share):.1f}" fill="{BLUE}" opacity="0.85"/>'
        )
    every = max(1, round(len(shares) * BIN_NATS / 10))
    for nats in range(0, int(len(shares) * BIN_NATS) + 1, every):
        x = LEFT + nats / BIN_NATS * width
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{nats}</text>')
    mean = LEFT + curves.mean_entropy / BIN_NATS * width
    anchor, shift = ("start", 6) if mean < (LEFT + RIGHT) / 2 else ("end", -6)
    parts += [
        f'<line x1="{mean:.1f}" y1="{TOP}" x2="{mean:.1f}" y2="{BOTTOM}" stroke="{RED}" stroke-width="2"/>',
        f'<text x="{mean + shift:.1f}" y="{TOP - 6}" text-anchor="{anchor}" fill="{RED}">'
        f"mean {curves.mean_entropy:.2f}</text>",
    ]
    return _finish(parts)


def marks(top_k: int) -> list[int]:
    """The values of k that are shown: 1, 2, 5, 10, … and K itself."""
    steps = [m * 10**e for e in range(7) for m in (1, 2, 5) if m * 10**e < 0.8 * top_k]
    return [*steps, top_k]


def _frame(title: str, x_label: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="#334155" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="12" y="24" font-size="14" font-weight="bold" fill="#0f172a">{escape(title)}</text>',
        f'<text x="{(LEFT + RIGHT) // 2}" y="{BOTTOM + 38}" text-anchor="middle">{escape(x_label)}</text>',
    ]


def _level(y: float, label: str) -> list[str]:
    return [
        f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="{GREY}" stroke-width="0.5"/>',
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
    ]


def _finish(parts: list[str]) -> str:
    return "\n".join([*parts, "</svg>"]) + "\n"
