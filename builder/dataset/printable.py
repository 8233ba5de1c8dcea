"""Text from outside → text that a terminal shows and does nothing with; numbers → how people read them.

In:   names, ids, texts and messages that may come from anybody's dataset.
Out:  the same, with what could steer a terminal or turn a line around written as an escape (`\\x1b`, `\\u202e`).

How:  by Unicode category: control characters, format characters (marks of direction among them), line and paragraph separators, and
      halves of surrogate pairs. The two joiners that emoji and some scripts are written with stay.
"""

import re
import unicodedata

_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"
_SUSPECT = re.compile(r"[^ -~]")


def one_line(text: object, *, limit: int | None = None) -> str:
    """A text as a single line.

    Args:
        text: anything that has a string.
        limit: characters to show at most; the rest becomes `…`.
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[: limit - 1]}…"
    return _SUSPECT.sub(lambda match: _shown(match[0]), shown)


def lines(text: object) -> str:
    """A text of several lines, which stay."""
    return "\n".join(map(one_line, str(text).split("\n")))


def json_lines(text: str) -> str:
    """JSON whose strings hold no such character: each is written as JSON's own escape, so that the values are the same."""
    return _SUSPECT.sub(lambda match: _as_json(match[0]), text)


def counted(number: int, noun: str) -> str:
    """A number of things: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_size(size: float) -> str:
    """A number of bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """A time."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:,.1f} days"


def steers(character: str) -> bool:
    """Whether a character may do something to a terminal, or to the text around it, rather than be shown."""
    return unicodedata.category(character) in _STEERING and character not in _JOINERS


def _shown(character: str) -> str:
    if not steers(character):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"  # fmt: skip


def _as_json(character: str) -> str:
    if character == "\n" or not steers(character):
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
