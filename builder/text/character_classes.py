r"""A class of characters in a regular expression → whether it holds a character, where that is certain.

In:   a character, a range, a property such as `\p{Lu}`, or classes joined by and, or and not.
Out:  a Test: a function of a character that answers yes, no, or None where versions of Unicode or libraries differ.

Cost: a lookup per character; the categories of 4,096 characters are kept.
"""

import unicodedata
from collections.abc import Callable
from functools import lru_cache

Verdict = bool | None
"""Whether a test takes a character; None where that is not certain."""
Test = Callable[[str], Verdict]

SCRIPTS = frozenset(
    [
        "arabic",
        "armenian",
        "bengali",
        "bopomofo",
        "cyrillic",
        "devanagari",
        "ethiopic",
        "georgian",
        "greek",
        "gujarati",
        "gurmukhi",
        "han",
        "hangul",
        "hebrew",
        "hiragana",
        "kannada",
        "katakana",
        "khmer",
        "lao",
        "malayalam",
        "mongolian",
        "myanmar",
        "oriya",
        "sinhala",
        "tamil",
        "telugu",
        "thai",
        "tibetan",
    ]
)
"""Names of properties that no ASCII character has."""
MAJOR = {"letter": "l", "mark": "m", "number": "n", "punctuation": "p", "symbol": "s"}
CATEGORIES = frozenset(
    [
        "lu",
        "ll",
        "lt",
        "lm",
        "lo",
        "mn",
        "mc",
        "me",
        "nd",
        "nl",
        "no",
        "pc",
        "pd",
        "ps",
        "pe",
        "pi",
        "pf",
        "po",
        "sm",
        "sc",
        "sk",
        "so",
        "zs",
        "zl",
        "zp",
        "cc",
        "cf",
    ]
)


@lru_cache(maxsize=4096)
def category(character: str) -> str | None:
    """The general category of a character; None if it is not the same in all versions of Unicode that a library may follow."""
    now = unicodedata.category(character)
    return now if unicodedata.ucd_3_2_0.category(character) == now else None


def one_of(character: str, *, ignore_case: bool) -> Test:
    """A character that stands for itself."""
    return between(character, character, ignore_case=ignore_case)


def between(low: str, high: str, *, ignore_case: bool) -> Test:
    """A range of characters, the last one included."""
    if not ignore_case:
        return lambda c: low <= c <= high
    if not high.isascii():
        return lambda _: None

    def test(character: str) -> Verdict:
        if not character.isascii():  # ſ is a kind of s, and ß of ss
            return None if any(c.isascii() for c in character.casefold()) else False
        return any(low <= c <= high for c in (character, character.lower(), character.upper()))

    return test


def negated(test: Test) -> Test:
    """All characters that another test does not take."""

    def opposite(character: str) -> Verdict:
        found = test(character)
        return None if found is None else not found

    return opposite


def any_of(tests: list[Test]) -> Test:
    """All characters that at least one test takes."""

    def test(character: str) -> Verdict:
        found = {test(character) for test in tests}
        return True if True in found else None if None in found else False

    return test


def all_of(tests: list[Test]) -> Test:
    """The characters that every test takes."""

    def test(character: str) -> Verdict:
        found = {test(character) for test in tests}
        return False if False in found else None if None in found else True

    return test


def is_space(character: str) -> Verdict:
    r"""The class \s."""
    if character in "\t\n\v\f\r\x85":
        return True
    kind = category(character)
    return None if kind is None else kind[0] == "Z"


def is_digit(character: str) -> Verdict:
    r"""The class \d."""
    kind = category(character)
    return None if kind is None else kind == "Nd"


def is_word(character: str) -> Verdict:
    r"""The class \w."""
    kind = category(character)
    if kind is None or kind in ("Nl", "No", "So", "Cf"):  # some of these are alphabetic
        return None
    return kind[0] in "LM" or kind in ("Nd", "Pc")


def of_property(name: str) -> Test:
    r"""The characters of a property of Unicode, such as `Lu` in `\p{Lu}`."""
    name = "".join(c for c in name.lower() if c not in " _-")
    name = MAJOR.get(name, name)
    if name in SCRIPTS:
        return lambda c: False if c.isascii() else None
    if name not in CATEGORIES and name not in set("lmnpsz"):
        return lambda _: None

    def test(character: str) -> Verdict:
        kind = category(character)
        return None if kind is None else kind.lower().startswith(name)

    return test
