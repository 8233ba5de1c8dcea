"""Two pictures as SVG, drawn here: curves over steps, and dots with whiskers. Readable on white and on black."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 34, 46
INK, GRID = "#767676", "#76767640"
COLOURS = (
    *("#666666", "#b07aa1", "#9c755f", "#4e79a7", "#e15759", "#f28e2b", "#edc948", "#59a14f"),
    "#2f9e9e",
)

Points = Sequence[tuple[float, float]]


def curves(lines: Mapping[str, tuple[str, Points]], *, title: str, x: str, y: str) -> str:
    """One line a name, in (colour, points); its name stands at its end."""
    xs = [point[0] for _, points in lines.values() for point in points]
    ys = [point[1] for _, points in lines.values() for point in points]
    # A student that knows nothing yet would press all that matters into a corner.
    low, high = min(ys), min(max(ys), min(ys) + 1.2)
    x_of = _scale(0, max(xs), LEFT, WIDTH - RIGHT)
    y_of = _scale(low - 0.03, high, HEIGHT - BOTTOM, TOP)
    parts = _axes(x_of, y_of, _ticks(0, max(xs)), _ticks(low, high), x, y)
    ends = []
    for name, (colour, points) in lines.items():
        shown = [(x_of(a), y_of(b)) for a, b in points if b <= high]
        if not shown:
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in shown)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends.append((shown[-1][1], name, colour))
    height = float("-inf")
    for end, name, colour in sorted(ends):
        height = max(end, height + 14)  # names that would lie on each other move down
        parts.append(_text(WIDTH - RIGHT + 8, height + 4, name, colour))
    return _svg(title, parts)


def dots(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    colours: Mapping[str, str],
    *,
    title: str,
    x: str,
) -> str:
    """A row a name; in it a dot for the mean of each group, small ones for its values, and a whisker over their range."""
    values = [v for groups in rows.values() for group in groups.values() for v in group]
    margin = (max(values) - min(values)) * 0.05 or 0.1
    x_of = _scale(min(values) - margin, max(values) + margin, LEFT + 130, WIDTH - 30)
    y_of = _scale(-0.5, len(rows) - 0.5, TOP, HEIGHT - BOTTOM)
    parts = _axes(x_of, y_of, _ticks(min(values), max(values)), [], x, "")
    for number, (name, groups) in enumerate(rows.items()):
        parts.append(_text(LEFT + 120, y_of(number) + 4, name, INK, "end"))
        for place, (group, found) in enumerate(groups.items()):
            if not found:
                continue
            height = y_of(number + (place - (len(groups) - 1) / 2) * 0.3)
            low, high = x_of(min(found)), x_of(max(found))
            mark = f'stroke="{colours[group]}" stroke-width="2"'
            parts.append(f'<path d="M{low:.1f} {height:.1f}H{high:.1f}" {mark}/>')
            centre = x_of(sum(found) / len(found))
            parts.append(_circle(centre, height, 5, colours[group]))
            parts += [_circle(x_of(value), height, 2, colours[group]) for value in found]
    for place, (group, colour) in enumerate(colours.items()):
        parts.append(_text(WIDTH - 30 - 150 * place, TOP - 16, "● " + group, colour, "end"))
    return _svg(title, parts)


def pareto(
    points: Mapping[str, tuple[float, Sequence[float]]], *, title: str, x: str, y: str
) -> str:
    """A dot a name at (cost, mean of its values), small ones for the values, and a line through those that no cheaper one is above."""
    costs = [cost for cost, _ in points.values()]
    values = [value for _, of in points.values() for value in of]
    margin = (max(values) - min(values)) * 0.08 or 0.1
    x_of = _scale(0, max(costs) * 1.05, LEFT, WIDTH - 30)
    y_of = _scale(min(values) - margin, max(values) + margin, HEIGHT - BOTTOM, TOP)
    parts = _axes(
        x_of, y_of, _ticks(0, max(costs)), _ticks(min(values), max(values)), x, y, WIDTH - 30
    )
    best, edge = float("-inf"), []
    named: list[tuple[float, float]] = []
    centres = [(x_of(cost), y_of(sum(of) / len(of))) for cost, of in points.values()]
    for name, (cost, of) in sorted(points.items(), key=lambda point: point[1][0]):
        centre = sum(of) / len(of)
        if centre > best:
            best = centre
            edge.append(f"{x_of(cost):.1f},{y_of(centre):.1f}")
        colour = COLOURS[3] if len(of) > 1 else COLOURS[0]
        parts.append(_circle(x_of(cost), y_of(centre), 5, colour))
        parts += [_circle(x_of(cost), y_of(value), 2, colour) for value in of if len(of) > 1]
        named.append(_beside(x_of(cost), y_of(centre), named, centres))
        parts.append(_text(*named[-1], name, colour))
    line = f'<polyline points="{" ".join(edge)}" fill="none" stroke="{GRID}" stroke-width="3"/>'
    return _svg(title, [line, *parts])


def _beside(
    x: float, y: float, names: Sequence[tuple[float, float]], dots: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Where the name of a dot starts: at its side, where it hits no other name (of up to 40 by 12) and no other dot."""
    places = [(x + side, y + step) for step in (-6, 16, 30, -20) for side in (8, -42)]

    def is_free(place: tuple[float, float]) -> bool:
        left, bottom = place
        return not any(abs(left - a) < 40 and abs(bottom - b) < 12 for a, b in names) and not any(
            -6 < a - left < 42 and -16 < b - bottom < 6 for a, b in dots
        )

    return next(filter(is_free, places), places[0])


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return start + (value - low) / span * (stop - start)

    return at


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, eight or so at most."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    step = next(step * f for f in (0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 8)
    first = -(-low // step)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step) + 1)]


def _axes(
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x: str,
    y: str,
    end: float = WIDTH - RIGHT,
) -> list[str]:
    parts = []
    left, right = (LEFT, end) if y_ticks else (LEFT + 130, WIDTH - 30)
    for tick in x_ticks:
        parts.append(f'<path d="M{x_of(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{GRID}"/>')
        parts.append(_text(x_of(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", INK, "middle"))
    for tick in y_ticks:
        parts.append(f'<path d="M{left} {y_of(tick):.1f}H{right}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, y_of(tick) + 4, f"{tick:g}", INK, "end"))
    parts.append(_text((left + right) / 2, HEIGHT - 8, x, INK, "middle"))
    if y:
        parts.append(_text(8, TOP - 10, y, INK))
    return parts


def _circle(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>\n",
        ]
    )
