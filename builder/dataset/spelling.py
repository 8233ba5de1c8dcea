"""Token ids → texts that stand where the tokens stand, and nothing in them does anything to the text around it.

In:   a tokenizer and the ids of a row.
Out:  a text for each token, which together are the row's text; and, of any text, which of its characters are to be shown as signs.

How:  as streaming servers do it: a token's text is by how much the decoded text grows. Where a character takes several tokens, it
      stands at the first of them and the others are empty; bytes that make none are spelled as in <0xE2>. Control characters and marks of direction become signs that name them.

Cost: one decoding of a few tokens a token: 10,000 tokens take 0.15 s.
"""

import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from builder.dataset.info import spell_token
from builder.dataset.printable import one_line, steers

MAX_GROUP = 16
"""Tokens after which a character that is not complete is given up: no tokenizer takes more for one."""
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_KEPT = "\n\t"
"""Signs that stand beside the character, which still does what it does."""


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; "" for those that only go on with the character of the token before.

    Args:
        tokenizer: of the teacher.
        ids: of a row.
    """
    found = [""] * len(ids)
    before = start = (
        0  # tokens from `before` are the context of those from `start`, which wait for a whole character
    )
    for stop in range(1, len(ids) + 1):
        grown = _growth(tokenizer, ids[before:stop], start - before)
        is_open = grown is None or grown.endswith("\ufffd")
        if is_open and stop < len(ids) and stop - start < MAX_GROUP:
            continue
        if is_open or ("\ufffd" in str(grown) and stop - start > 1):  # bytes of no character
            found[start:stop] = [spell_token(tokenizer, token) for token in ids[start:stop]]
        else:
            found[start] = grown or ""
        before, start = start, stop
    return found


def _growth(tokenizer: Any, ids: list[int], known: int) -> str | None:
    """By what the text of the first `known` ids grows with the others; None where it changes instead."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    before, after = decode(ids[:known]), decode(ids)
    return after[len(before) :] if after.startswith(before) else None


def columns(text: str) -> int:
    """How wide a text is where every letter has one width: characters of East Asia and emoji have two, marks on a letter none."""
    marks = ("Mn", "Me", "Cf")
    return sum(
        0 if unicodedata.category(c) in marks else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def signs(text: str, *, in_line: bool = False) -> list[str]:
    """A text cut into parts, by turns one to be shown as it is and one that is a sign for a character that cannot be seen.

    Args:
        text: anything.
        in_line: for a place where no line may break and every space counts.
    """
    parts = [""]
    for character in text:
        if in_line and unicodedata.category(character) == "Zs":
            parts += ["␣" if character == " " else f"\\u{ord(character):04x}", ""]
        elif character in _SIGNS or steers(character):
            kept = character if character in _KEPT and not in_line else ""
            parts += [_SIGNS.get(character) or one_line(character), kept]
        else:
            parts[-1] += character
    return parts


class Strings:
    """The spellings of tokens, each once, numbered in the order in which they are asked for."""

    def __init__(self, spell: Callable[[int], str]) -> None:
        self._spell = spell
        self._numbers: dict[int, int] = {}

    def number(self, token: int) -> int:
        """Of a token's spelling."""
        return self._numbers.setdefault(token, len(self._numbers))

    def __iter__(self) -> Iterator[list[str]]:
        """The spellings, as parts (see `signs`)."""
        return (signs(self._spell(token), in_line=True) for token in self._numbers)
