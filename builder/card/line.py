"""A line of text around a position that was recomputed → a picture in which every token has the colour of its surprise.

In:   tokens as they stand in the text, and the surprise of each, in nats.
Out:  SVG as in charts.py, with nothing in it but rectangles and text; and what it shows, in words.

How:  letters are put on a grid of columns, so that every token fills its rectangle, whatever font a reader has. Lines break between words.
      Text from outside is escaped; control characters and marks of direction become signs.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from builder.card.charts import WIDTH
from builder.card.colours import LIGHT, SURPRISE_BOUNDS, level
from builder.card.example import token_text
from builder.dataset.spelling import columns, signs

COLUMNS, LINES = 72, 3
CELL, FONT, PITCH = 8.5, 14, 27
"""Width of a column, size of its letters, and from line to line."""
LEFT, TOP = 14, 46
MAX_WORD = 24
"""Columns: longer ones are broken."""
QUIET = "#334155"
TITLE = "How little the teacher expected each token of the text"


@dataclass(frozen=True, slots=True)
class _Cell:
    """A token, or a part of one, in its place."""

    text: str
    token: int
    line: int
    column: int
    width: int


def line_svg(line: dict[str, Any]) -> str:
    """The picture: some lines of text, a key to the colours below, and the token that followed outlined."""
    cells = list(_laid_out(line["tokens"], is_cut=line["is_cut"]))
    height = TOP + PITCH * (1 + max((cell.line for cell in cells), default=0)) + 38
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{QUIET}" role="img">',
        f"<title>{TITLE}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14" font-weight="bold" fill="#0f172a">{TITLE}</text>',
    ]
    is_leftward = _runs_leftward(line["tokens"])
    for cell in cells:
        surprise = line["surprises"][cell.token] if cell.token >= 0 else None
        colour = LIGHT[0 if surprise is None else level(surprise, SURPRISE_BOUNDS)]
        column = COLUMNS - cell.column - cell.width if is_leftward else cell.column
        x, y, width = LEFT + column * CELL, TOP + cell.line * PITCH, cell.width * CELL
        edge = ' stroke="#0f172a" stroke-width="2"' if cell.token == line["followed"] else ""
        if edge or colour is not LIGHT[0]:
            ground = "white" if colour is LIGHT[0] else colour.ground
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{PITCH - 5}" rx="3" fill="{ground}"{edge}/>'
            )
        if cell.text.strip():
            parts.append(
                f'<text x="{x:.1f}" y="{y + 16}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{FONT}" '
                f'textLength="{width:.1f}" fill="{colour.ink}">{escape(cell.text)}</text>'
            )
    return "\n".join([*parts, *_key(height - 26), "</svg>"]) + "\n"


def words_of(line: dict[str, Any]) -> str:
    """What the picture shows, in words, as Markdown."""
    shown = {cell.token for cell in _laid_out(line["tokens"], is_cut=line["is_cut"])}
    known = [i for i in sorted(shown) if i >= 0 and line["surprises"][i] is not None]
    text = f"{TITLE}, in {len(shown - {-1})} tokens of a row"
    if not known:
        return text
    by_surprise = sorted(known, key=lambda i: -float(line["surprises"][i]))
    least = [_with_chance(line, i) for i in by_surprise[:3]]
    listed = f"{', '.join(least[:-1])} and {least[-1]}" if len(least) > 1 else least[0]
    followed = _with_chance(line, line["followed"])
    return f"{text}. Least expected were {listed}. The outlined token is the one that followed: {followed}"


def _with_chance(line: dict[str, Any], index: int) -> str:
    token, surprise = token_text(line["tokens"][index]), line["surprises"][index]
    if surprise is None:
        return token
    chance = math.exp(-surprise)
    return f"{token} ({'under 0.1%' if chance < 0.001 else f'{chance:.1%}'})"


def _laid_out(tokens: Sequence[str], *, is_cut: bool) -> Iterator[_Cell]:
    """Tokens, in lines as far as there is room; −1 is the sign that something stands before them."""
    texts = [_visible(text) for text in tokens]
    at = 0
    if is_cut:
        yield _Cell("…", -1, 0, 0, 1)
        at = 1
    for i, text in enumerate(texts):
        word = _width_of_word(tokens, texts, i)
        if at % COLUMNS + word > COLUMNS:
            at += -at % COLUMNS
        while text:
            if at >= COLUMNS * LINES:
                return
            part = _fitting(text, COLUMNS - at % COLUMNS)
            if not part:  # a wide character in the last column
                at += -at % COLUMNS
                continue
            width = max(1, columns(part))
            yield _Cell(part, i, at // COLUMNS, at % COLUMNS, width)
            at, text = at + width, text[len(part) :]


def _width_of_word(tokens: Sequence[str], texts: Sequence[str], first: int) -> int:
    """Of a token and those behind it in the same word; of the token alone, if that is no word to be kept whole."""
    width = 0
    for i in range(first, len(tokens)):
        if i > first and (tokens[i][:1].isspace() or tokens[i - 1][-1:].isspace()):
            break
        width += max(1, columns(texts[i]))
        if width > MAX_WORD:
            return min(MAX_WORD, max(1, columns(texts[first])))
    return width


def _fitting(text: str, room: int) -> str:
    """As many characters as there is room for, with the marks on the last of them."""
    used = 0
    for i, character in enumerate(text):
        used += columns(character)
        if used > room:
            return text[:i]
    return text


def _visible(text: str) -> str:
    """A token as it is shown: signs for what cannot be seen, and for what SVG cannot hold."""
    if not text:
        return "‥"  # its character began before
    shown = "".join(signs(text)).replace("\n", "").replace("\t", "")  # whose signs are there
    return "".join(_of_xml(character) for character in shown)


def _of_xml(character: str) -> str:
    """A character of which XML loses nothing: spaces side by side are one there, and two characters are none."""
    if unicodedata.category(character) == "Zs":
        return "\xa0"
    return f"\\u{ord(character):04x}" if character in "\ufffe\uffff" else character


def _runs_leftward(tokens: Sequence[str]) -> bool:
    """Whether the first letter with a direction is one of those that are written from right to left."""
    kinds = (unicodedata.bidirectional(c) for c in "".join(tokens))
    return next((kind for kind in kinds if kind in ("L", "R", "AL")), "L") != "L"


def _key(y: int) -> list[str]:
    """The colours, from low to high."""
    labels = [f"≤ {SURPRISE_BOUNDS[0]}", *map(str, SURPRISE_BOUNDS[1:]), f"> {SURPRISE_BOUNDS[-1]}"]
    parts = [f'<text x="{LEFT}" y="{y + 14}">surprise, −log p in nats</text>']
    for i, (colour, label) in enumerate(zip(LIGHT, labels, strict=True)):
        x, fill = LEFT + 150 + i * 46, "white" if i == 0 else colour.ground
        edge = f' stroke="{QUIET}" stroke-width="0.5"' if i == 0 else ""
        parts += [
            f'<rect x="{x}" y="{y}" width="46" height="20" fill="{fill}"{edge}/>',
            f'<text x="{x + 23}" y="{y + 14}" text-anchor="middle" fill="{colour.ink}">{escape(label)}</text>',
        ]
    return parts
