"""A regular expression → which two characters it can read one after the other.

In:   the pattern of a pre-tokenizer or a normalizer, in the syntax of Oniguruma.
Out:  a Pattern, or None where it is more than is understood here (look-behind, anchors, references, a match of nothing).

How:  each place of the pattern that reads a character is a test, and a test follows another if the pattern can read a character by one
      and the next by the other, lookaheads included (Glushkov's construction; a repetition of any number stands for all numbers).
      If no test that takes a character `before` is followed by one that takes `after`, then no attempt to match that begins ahead of a
      place between the two reads beyond it: there, `after` is the same as the end of the text. So what is matched ahead of the place
      does not depend on what is behind it. Behind it, the search goes on as at the beginning of a text.
      Where it is not certain whether a test takes a character, it is said to take it.

Cost: microseconds a pair of characters.
"""

from dataclasses import dataclass

from builder.text.character_classes import (
    Test,
    all_of,
    any_of,
    between,
    is_digit,
    is_space,
    is_word,
    negated,
    of_property,
    one_of,
)

ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}


@dataclass(frozen=True, slots=True)
class Pattern:
    """Tests, and which follow each other."""

    tests: tuple[Test, ...]
    pairs: frozenset[tuple[int, int]]

    def reads(self, before: str, after: str) -> bool:
        """Whether an attempt to match may read two characters one after the other."""
        behind = {i for i, test in enumerate(self.tests) if test(after) is not False}
        ahead = {i for i, test in enumerate(self.tests) if test(before) is not False}
        return any(first in ahead and second in behind for first, second in self.pairs)

    def takes(self, character: str) -> bool:
        """Whether a match may hold a character."""
        return any(test(character) is not False for test in self.tests)


def literal(text: str) -> Pattern:
    """The pattern of a text that stands for itself.

    Raises:
        ValueError: it is empty.
    """
    if not text:
        raise ValueError("an empty text matches nothing")
    pairs = frozenset((i, i + 1) for i in range(len(text) - 1))
    return Pattern(tuple(one_of(c, ignore_case=False) for c in text), pairs)


def parse(source: str) -> Pattern | None:
    """The pattern of a regular expression; None where it is more than is understood here."""
    parser = _Parser(source)
    try:
        whole = parser.alternatives(ignore_case=False)
    except _UnknownError:
        return None
    if whole.may_be_empty or parser.place < len(source):
        return None
    return Pattern(tuple(parser.tests), frozenset(parser.pairs))


class _UnknownError(Exception):
    """The pattern holds what is not understood here."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a pattern: with which tests it can begin and end, and whether it can match nothing."""

    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    may_be_empty: bool = True


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.place = 0
        self.tests: list[Test] = []
        self.pairs: set[tuple[int, int]] = set()

    def alternatives(self, *, ignore_case: bool) -> _Part:
        parts = [self._sequence(ignore_case)]
        while self._take("|"):
            parts.append(self._sequence(ignore_case))
        return _Part(
            frozenset().union(*(part.first for part in parts)),
            frozenset().union(*(part.last for part in parts)),
            any(part.may_be_empty for part in parts),
        )

    def _sequence(self, ignore_case: bool) -> _Part:
        whole = _Part()
        while self.place < len(self.source) and self.source[self.place] not in "|)":
            part = self._repeated(self._atom(ignore_case))
            self.pairs |= {(one, other) for one in whole.last for other in part.first}
            whole = _Part(
                whole.first | part.first if whole.may_be_empty else whole.first,
                whole.last | part.last if part.may_be_empty else part.last,
                whole.may_be_empty and part.may_be_empty,
            )
        return whole

    def _repeated(self, part: _Part) -> _Part:
        """With the quantifiers behind it; lazy and possessive ones read no more than others."""
        while self.place < len(self.source):
            if self._take("?"):
                part = _Part(part.first, part.last, True)
                continue
            if self._take("*"):
                least = 0
            elif self._take("+"):
                least = 1
            elif (counts := self._counts()) is not None:
                least = counts
            else:
                break
            self.pairs |= {(one, other) for one in part.last for other in part.first}
            part = _Part(part.first, part.last, part.may_be_empty or not least)
        return part

    def _counts(self) -> int | None:
        """The least number of a `{least,most}`; None if there is none here."""
        end = self.source.find("}", self.place)
        if self.source[self.place] != "{" or end < 0:
            return None
        least, _, most = self.source[self.place + 1 : end].partition(",")
        if not all(
            number == "" or (number.isascii() and number.isdigit()) for number in (least, most)
        ):
            return None
        if not (least or most):
            return None
        self.place = end + 1
        return int(least or 0)

    def _atom(self, ignore_case: bool) -> _Part:
        character = self._next()
        if character == "(":
            return self._group(ignore_case)
        if character == "[":
            return self._test(self._set(ignore_case))
        if character == "\\":
            return self._test(self._escape(ignore_case))
        if character == ".":
            return self._test(lambda c: c != "\n")
        if character in "^$*+?":
            raise _UnknownError
        return self._test(one_of(character, ignore_case=ignore_case))

    def _group(self, ignore_case: bool) -> _Part:
        is_ahead = False
        if self._take("?"):
            if self._take("i:"):
                ignore_case = True
            elif self._take("=") or self._take("!"):
                is_ahead = True
            elif not (self._take(":") or self._take(">")):
                raise _UnknownError
        part = self.alternatives(ignore_case=ignore_case)
        if not self._take(")"):
            raise _UnknownError
        # What is behind a lookahead is read from where it began, not from where it ended.
        return _Part(part.first, frozenset(), True) if is_ahead else part

    def _test(self, test: Test) -> _Part:
        self.tests.append(test)
        only = frozenset([len(self.tests) - 1])
        return _Part(only, only, False)

    def _escape(self, ignore_case: bool) -> Test:
        """What stands behind a backslash, in a set or outside of one."""
        character = self._next()
        if character in "sSdDwW":
            found = {"s": is_space, "d": is_digit, "w": is_word}[character.lower()]
            return negated(found) if character.isupper() else found
        if character in "pP":
            if not self._take("{"):
                raise _UnknownError
            is_negated = self._take("^") != (character == "P")
            end = self.source.find("}", self.place)
            if end < 0:
                raise _UnknownError
            name, self.place = self.source[self.place : end], end + 1
            test = of_property(name)
            # `\p{Lu}` that ignores case takes lower case, too.
            return (lambda _: None) if ignore_case else negated(test) if is_negated else test
        if character in "xu":
            return one_of(self._code_point(character), ignore_case=ignore_case)
        if character in ESCAPES:
            return one_of(ESCAPES[character], ignore_case=ignore_case)
        if character.isascii() and character.isalnum():
            raise _UnknownError
        return one_of(character, ignore_case=ignore_case)

    def _code_point(self, kind: str) -> str:
        if kind == "x" and self._take("{"):
            end = self.source.find("}", self.place)
            digits, after = self.source[self.place : end], end + 1
        else:
            after = self.place + (2 if kind == "x" else 4)
            digits = self.source[self.place : after]
        try:
            found = chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise _UnknownError from None
        self.place = after
        return found

    def _set(self, ignore_case: bool) -> Test:
        """The characters between brackets, in which others may stand, or sets joined by &&."""
        is_negated = self._take("^")
        if self.source[self.place : self.place + 1] in ("]", ":"):
            raise _UnknownError  # a bracket that may stand for itself, or a class of POSIX
        joined: list[list[Test]] = [[]]
        while not self._take("]"):
            if self._take("&&"):
                joined.append([])
            elif self._take("["):
                joined[-1].append(self._set(ignore_case))
            else:
                joined[-1].append(self._member(ignore_case))
        test = all_of([any_of(tests) for tests in joined])
        return negated(test) if is_negated else test

    def _member(self, ignore_case: bool) -> Test:
        """A character, a range of characters or a class in a set."""
        begin = self.place
        low = self._next()
        if low == "\\":
            test = self._escape(ignore_case)
            low = self._single(begin)
            if not low:
                return test
        if self.source[self.place : self.place + 1] != "-" or self.source[self.place + 1 :][:1] in (
            "]",
            "",
        ):
            return one_of(low, ignore_case=ignore_case)
        self.place += 1
        begin = self.place
        high = self._next()
        if high == "\\":
            self._escape(ignore_case)
            high = self._single(begin)
        if not high or high == "[" or high < low:
            raise _UnknownError
        return between(low, high, ignore_case=ignore_case)

    def _single(self, begin: int) -> str:
        """The one character that an escape which began there stands for; empty for a class."""
        kind = self.source[begin + 1]
        if kind in "sSdDwWpP":
            return ""
        if kind in ESCAPES:
            return ESCAPES[kind]
        if kind in "xu":
            digits = self.source[begin + 2 : self.place].strip("{}")
            return chr(int(digits, 16))
        return kind

    def _next(self) -> str:
        if self.place >= len(self.source):
            raise _UnknownError
        self.place += 1
        return self.source[self.place - 1]

    def _take(self, text: str) -> bool:
        found = self.source.startswith(text, self.place)
        self.place += len(text) if found else 0
        return found
