"""Rows → four pictures: how sure the teacher is, how much the first k tokens hold, where the text's token stands, and calibration.

In:   the rows that a page shows; of chats and completions, the positions in the loss mask.
Out:  `Chart`s: a sentence that says what the picture shows, and SVG whose colours are the page's, in its light and its dark form.

How:  the bounds of bins are the same on every page, so that two pages can be compared by eye. Calibration is of the first choice
      (Guo et al. 2017, section 3): in ten bins of its probability, how often it was the token that followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from builder.corpus.sequences import NO_TOKEN
from builder.view.rows import Row

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 38, 312, 12, 156
"""The plot within the picture."""
ENTROPY_BOUNDS = tuple(i / 2 for i in range(15))
"""Nats; the last bin is open."""
RANK_BOUNDS = (1, 2, 3, 6, 11, 21, 51)
CALIBRATION_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture and what it says."""

    title: str
    says: str
    """A sentence with the numbers."""
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Positions:
    """Values of positions that are learned, one after the other."""

    entropy: Floats
    mass: Floats
    """[K]: mean probability of the first k tokens."""
    first: Floats
    """[N]: probability of the first choice, where it is known what followed."""
    hit: Floats
    """[N]: 1 where that is what followed."""
    ranks: npt.NDArray[np.int64]
    """[N]: of what followed; 0 outside."""
    known_ranks: int


def draw(rows: Sequence[Row]) -> list[Chart]:
    """The four pictures; none where no position is learned."""
    positions = _positions(rows)
    if positions is None:
        return []
    drawn = [_entropy(positions), _mass(positions)]
    return [*drawn, _rank(positions), _calibration(positions)] if len(positions.ranks) else drawn


def _positions(rows: Sequence[Row]) -> _Positions | None:
    used = [row.learned & row.kept for row in rows]
    if not any(map(np.any, used)):
        return None
    followed = [where & (row.targets != NO_TOKEN) for row, where in zip(rows, used, strict=True)]

    def values(name: str, masks: list[npt.NDArray[np.bool_]]) -> Floats:
        pairs = zip(rows, masks, strict=True)
        return np.concatenate([getattr(row, name)[where] for row, where in pairs]).astype(float)

    ranks = values("ranks", followed).astype(np.int64)
    return _Positions(
        entropy=values("entropy", used),
        mass=np.cumsum(np.exp(values("logprobs", used)).mean(0)),
        first=np.exp(values("logprobs", followed)[:, 0]),
        hit=(ranks == 1).astype(float),
        ranks=ranks,
        known_ranks=rows[0].known_ranks,
    )


def _entropy(positions: _Positions) -> Chart:
    bounds = np.array([*ENTROPY_BOUNDS, np.inf])
    shares = np.histogram(positions.entropy.clip(0), bounds)[0] / len(positions.entropy)
    mean = float(positions.entropy.mean())
    labels = [f"{low:g}" for low in ENTROPY_BOUNDS]
    labels[-1] += "+"
    shown = [label if i % 2 == 0 else "" for i, label in enumerate(labels)]
    return Chart(
        title="How sure the teacher is",
        says=f"{mean:.2f} nats of entropy on average, as of {np.exp(mean):.1f} equal choices; "
        f"{shares[0]:.0%} of positions have less than half a nat.",
        svg=_bars("Share of positions by entropy", shares, shown, "entropy in nats"),
    )


def _mass(positions: _Positions) -> Chart:
    mass = positions.mass
    count = len(mass)
    span = np.log(count) if count > 1 else 1.0

    def x(k: int) -> float:
        return LEFT + (RIGHT - LEFT) * float(np.log(k) / span)

    points = " ".join(f"{x(k):.1f},{_y(m):.1f}" for k, m in enumerate(mass, start=1))
    shown = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= count]
    parts = [
        *_levels(1.0),
        f'<polygon class="area" points="{x(1):.1f},{BOTTOM} {points} {x(count):.1f},{BOTTOM}"/>',
        f'<polyline class="line" points="{points}"/>',
        *(_label(x(k), BOTTOM + 14, str(k)) for k in shown),
    ]
    parts += [f'<circle class="dot" cx="{x(k):.1f}" cy="{_y(mass[k - 1]):.1f}" r="2.5"/>' for k in shown]  # fmt: skip
    ten = f", the first ten {mass[9]:.0%}" if count > 10 else ""
    return Chart(
        title="What the first tokens hold",
        says=f"The first choice holds {mass[0]:.0%} of the probability{ten}, the first {count:,} {mass[-1]:.1%}.",
        svg=_picture("Probability of the first k tokens", parts, "k, most probable first"),
    )


def _rank(positions: _Positions) -> Chart:
    ranks, top_k = positions.ranks, positions.known_ranks
    bounds = [bound for bound in RANK_BOUNDS if bound <= top_k] + [top_k + 1]
    shares = np.histogram(ranks[ranks > 0], bounds)[0] / len(ranks)
    outside = float((ranks == 0).mean())
    labels = [
        f"{low}" if high == low + 1 else f"{low}–{high - 1}" for low, high in pairwise(bounds)
    ]
    says = f"The token that followed was the first choice in {shares[0]:.0%} of positions"
    if outside:
        says += f", and outside the top {top_k} in {outside:.1%}"
        shares, labels = np.append(shares, outside), [*labels, "outside"]
    return Chart(
        title="Where the text’s token stands",
        says=f"{says}.",
        svg=_bars("Share of positions by rank", shares, labels, "rank of the token that followed"),
    )


def _calibration(positions: _Positions) -> Chart:
    bins = np.minimum((positions.first * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    sure = np.bincount(bins, positions.first, minlength=CALIBRATION_BINS)
    right = np.bincount(bins, positions.hit, minlength=CALIBRATION_BINS)
    error = float(np.abs(sure - right).sum() / len(bins))

    def x(share: float) -> float:
        return LEFT + (RIGHT - LEFT) * share

    parts = [
        *_levels(1.0),
        f'<line class="guide" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{TOP}"/>',
        *(_label(x(i / 4) - 9 * (i == 4), BOTTOM + 14, f"{i / 4:.0%}") for i in range(5)),
    ]
    for count, mean, hits in zip(counts, sure, right, strict=True):
        if count:
            size = 2 + 7 * float(np.sqrt(count / counts.max()))
            parts.append(
                f'<circle class="spot" cx="{x(mean / count):.1f}" cy="{_y(hits / count):.1f}" r="{size:.1f}"/>'
            )
    gap = float(positions.first.mean() - positions.hit.mean())
    lean = "more" if gap > 0 else "less"
    return Chart(
        title="Calibration on this text",
        says=f"The first choice gets {positions.first.mean():.0%} and is right in {positions.hit.mean():.0%}: "
        f"{100 * abs(gap):.1f} points {lean} sure than right; calibration error {error:.1%}.",
        svg=_picture(
            "How often the first choice is right, by its probability; on the line, as often as it says",
            parts,
            "probability of the first choice",
        ),
    )


def _bars(title: str, shares: Floats, labels: list[str], axis: str) -> str:
    highest = float(shares.max())
    top = next(top for top in (0.08, 0.12, 0.2, 0.4, 0.6, 0.8, 1.0) if highest <= top + 1e-9)
    width = (RIGHT - LEFT) / len(shares)
    parts = _levels(top)
    for i, (share, label) in enumerate(zip(shares, labels, strict=True)):
        x, y = LEFT + i * width, _y(float(share) / top)
        parts.append(
            f'<rect class="bar" x="{x + 1.5:.1f}" y="{y:.1f}" width="{width - 3:.1f}" height="{BOTTOM - y:.1f}">'
            f"<title>{share:.1%}</title></rect>"
        )
        parts.append(_label(x + width / 2, BOTTOM + 14, label))
    return _picture(title, parts, axis)


def _y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * float(share)


def _levels(top: float) -> list[str]:
    parts = []
    for i in range(5):
        y = _y(i / 4)
        parts += [
            f'<line class="level" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>',
            f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{f"{top * i / 4:.1%}".replace(".0%", "%")}</text>',
        ]
    return parts


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _picture(title: str, parts: list[str], axis: str) -> str:
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            *parts,
            _label((LEFT + RIGHT) / 2, BOTTOM + 29, axis),
            "</svg>",
        ]
    )
