"""Surprise → one of eight colours: the one scale of the card's line of text and of the page that `view` writes.

Lightness alone tells the colours apart, and what stands on one can be read (WCAG 2.2, 1.4.3), in a light and in a dark page.
"""

from dataclasses import dataclass

SURPRISE_BOUNDS = (0.1, 0.5, 1, 2, 3, 5, 8)
"""Nats: of the seven upper ones of eight colours."""


@dataclass(frozen=True, slots=True)
class Colour:
    """A ground, and what is written on it."""

    ground: str
    ink: str


LIGHT = (
    *(Colour("transparent", "#1c1b22"), Colour("#fff8e3", "#1c1b22"), Colour("#ffefc4", "#1c1b22")),
    *(Colour("#fee09d", "#1c1b22"), Colour("#fdc67e", "#1c1b22"), Colour("#f7a06a", "#1c1b22")),
    *(Colour("#c2476f", "#fff"), Colour("#6f1d7d", "#fff")),
)
DARK = (
    *(Colour("transparent", "#e9e7f0"), Colour("#292340", "#e9e7f0"), Colour("#382758", "#e9e7f0")),
    *(Colour("#50296a", "#e9e7f0"), Colour("#742f6e", "#e9e7f0"), Colour("#a63c65", "#fff")),
    *(Colour("#f08c4c", "#14101c"), Colour("#fde06a", "#14101c")),
)


def level(value: float, bounds: tuple[float, ...]) -> int:
    """Which of the colours a value has."""
    return sum(value > bound for bound in bounds)


def style_sheet() -> str:
    """The colours as CSS: variables --v0 … and --on0 …, and elements <i> of each level."""
    variables = [
        " ".join(f"--v{i}: {c.ground}; --on{i}: {c.ink};" for i, c in enumerate(colours))
        for colours in (LIGHT, DARK)
    ]
    rules = [
        f'i[data-v="{i}"] {{ --v: var(--v{i}); background: var(--v); color: var(--on{i}); }}'
        for i in range(1, len(LIGHT))
    ]
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {variables[1]} }} }}"
    return "\n".join([f":root {{ {variables[0]} }}", dark, *rules, ""])
