"""A text of any length → its tokens, some at a time: the same as of the whole, in memory that does not grow with it.

In:   the parts of a text, one after the other, and the backend of a fast tokenizer.
Out:  Pieces: consecutive parts of the text with their tokens.

How:  the tokenizer sees a window of WINDOW characters. A piece of it ends at a seam (`seams`), a place at which its tokens do not depend
      on what is behind it; the next window begins there, with LEAD characters before it, whose tokens are dropped. So what a tokenizer
      does at the start and the end of a text happens at those of the text only. Windows overlap by OVERLAP characters or more, whose
      tokens are compared: where they are not the same, or a window has no two seams, it grows.
      A text of no more than a window is tokenized as it is, and so is all of a text for whose tokenizer no seam is known.

Cost: about 200 bytes a character of a window, 15 MB; 2 % more tokens than those of the text are made.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from builder.text.seams import Seams

WINDOW = 2**16
"""Characters that the tokenizer sees at once."""
LEAD = 64
"""Characters before a window, of which it sees how the text goes on."""
OVERLAP = 512
"""Characters in which the tokens of two windows have to be the same."""
BYTES_PER_CHARACTER = 200
"""Of memory that tokenizing takes, measured."""
LARGE_WINDOW = 2**22
"""From here on, the user is told of a window: it takes a gigabyte."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a text that begins at a seam, or is the whole, and the tokens of it."""

    start: int
    """Where in the text it begins, in characters."""
    before: str = ""
    """The two characters before it, as far as there are any."""
    text: str
    ids: Ints
    starts: Ints
    """Where in the text each token begins."""
    stops: Ints
    """Where in the text each token ends."""
    ends: Ints
    """Where in the text the tokens up to each one have ended."""
    are_first: npt.NDArray[np.bool_]
    """Which tokens are the first of a word of the pre-tokenizer."""
    completion_mask: npt.NDArray[np.bool_] | None = None
    """Of a chat."""

    def last_seam(self, before: int, seams: Seams) -> int | None:
        """The last token, of those up to number `before`, that begins behind a seam; None if there is none but the piece's start.

        Where the model leaves out what it does not know, a gap between two tokens need not be the end of a word, so that none is a seam.
        """
        for token in range(min(before, len(self.ids) - 1), 0, -1):
            place = int(self.ends[token - 1])
            around = self._around(place - self.start)
            gap = int(self.starts[token]) - place
            if gap < 0 or (gap and seams.leaves_out):
                continue
            if seams.is_seam(around, is_between_words=bool(self.are_first[token])):
                return token
        return None

    def _around(self, place: int) -> str:
        """The two characters on both sides of a place, as far as there are any."""
        if place >= 2:
            return self.text[place - 2 : place + 2]
        beginning, middle = self.before + self.text[:4], len(self.before) + place
        return beginning[max(0, middle - 2) : middle + 2]

    def up_to(self, end: int) -> "Piece":
        """The piece that ends at a seam, with the tokens before number `end`."""
        stop = int(self.ends[end - 1])
        return Piece(
            start=self.start,
            before=self.before,
            text=self.text[: stop - self.start],
            ids=self.ids[:end],
            starts=self.starts[:end],
            stops=self.stops[:end],
            ends=self.ends[:end],
            are_first=self.are_first[:end],
        )

    def then(self, other: "Piece") -> "Piece":
        """This one and the next one in one."""
        return Piece(
            start=self.start,
            before=self.before,
            text=self.text + other.text,
            ids=np.concatenate([self.ids, other.ids]),
            starts=np.concatenate([self.starts, other.starts]),
            stops=np.concatenate([self.stops, other.stops]),
            ends=np.concatenate([self.ends, other.ends]),
            are_first=np.concatenate([self.are_first, other.are_first]),
        )


@dataclass(frozen=True, slots=True)
class _Window:
    """What the tokenizer has seen at once."""

    piece: Piece
    """From the seam on at which it begins; its end need not be one."""
    is_clean: bool
    """Whether no token crosses the place at which it begins."""
    is_last: bool
    """Whether the text ends with it."""


class Pieces:
    """Tokenizes texts with one tokenizer."""

    def __init__(
        self, backend: Tokenizer, *, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        """Prepare.

        Args:
            backend: adds no special tokens, neither pads nor truncates, and reports untrimmed offsets.
            notice: told, in a line, of texts that take much memory.
        """
        self._backend = backend
        self._notice = notice
        self._told = False

    @cached_property
    def seams(self) -> Seams:
        """The seams of this tokenizer."""
        return Seams(self._backend)

    def whole(self, texts: SequenceOf[str]) -> list[Piece]:
        """Each of some texts as one piece, as `of` gives it; all of them are tokenized at once, on all cores.

        Args:
            texts: of WINDOW characters or fewer.
        """
        encodings = self._encode(texts)
        return [_piece(e, text, 0, 0)[0] for e, text in zip(encodings, texts, strict=True)]

    def _encode(self, texts: SequenceOf[str]) -> list[Encoding]:
        """The tokenizer's, without Python's lock, which its method for a single text would hold."""
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def of(self, parts: Iterable[str], *, start: int = 0, name: str = "") -> Iterator[Piece]:
        """The pieces of a text from a seam on.

        Args:
            parts: of the text, from its beginning.
            start: a seam, or 0.
            name: of the text, for notices.

        Raises:
            ValueError: `start` is no seam.
        """
        text = _Text(parts)
        text.forget(max(0, start - LEAD))
        size = WINDOW
        window = self._window(text, start, size, name)
        if not window.is_clean:
            raise ValueError(
                f"{name} no longer has a token boundary at character {start:,}; the corpus or a library "
                "has changed: start again in another directory"
            )
        while not window.is_last:
            seams = self._two_seams(window.piece)
            if seams is not None:
                end, proof = seams
                stop, proven = (int(window.piece.ends[token - 1]) for token in seams)
                following = self._window(text, stop, proven - stop + WINDOW, name)
                if _agree(window.piece, end, proof, following):
                    yield window.piece.up_to(end)
                    text.forget(stop - LEAD)
                    window, size = following, WINDOW
                    continue
            size *= 2
            window = self._window(text, window.piece.start, size, name)
        yield window.piece

    def _window(self, text: "_Text", start: int, size: int, name: str) -> _Window:
        """What the tokenizer makes of `size` characters from `start` on, all of them where it has no seams."""
        begin = max(0, start - LEAD)
        content = text.read(begin, start + size)
        if not text.is_whole and self.seams.obstacle:
            content = text.read(begin, None)
        if len(content) > LARGE_WINDOW and not self._told:
            self._told = True
            why = "because they contain no place to cut" if not self.seams.obstacle else (
                f"as a whole, because it is unknown where a text can be cut with {self.seams.obstacle} of this tokenizer"
            )  # fmt: skip
            self._notice(
                f"{name} is tokenized {len(content):,} characters at a time, {why}: that takes "
                f"{len(content) * BYTES_PER_CHARACTER / 1e9:,.0f} GB of memory or more"
            )
        (encoding,) = self._encode([content])
        piece, is_clean = _piece(encoding, content, begin, start)
        return _Window(piece, is_clean, text.is_whole)

    def _two_seams(self, piece: Piece) -> tuple[int, int] | None:
        """The tokens behind two seams: the one at which a piece can end, and a later one, which proves that words up to there are whole."""
        proof = piece.last_seam(len(piece.ids), self.seams)
        if proof is None:
            return None
        end = piece.last_seam(proof - 1, self.seams)
        while end is not None and piece.ends[proof - 1] - piece.ends[end - 1] < OVERLAP:
            earlier = piece.last_seam(end - 1, self.seams)
            if earlier is None:
                break
            end = earlier
        return None if end is None else (end, proof)


def _piece(encoding: Encoding, content: str, begin: int, start: int) -> tuple[Piece, bool]:
    """The part from `start` on of a text that begins at `begin`, with its tokens; and whether no token crosses the place `start`."""
    ids = np.array(encoding.ids, np.int64)
    # From a flat iterator, in half the time that an array of tuples takes.
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids))
    spans = flat.reshape(-1, 2) + begin
    words = np.array(encoding.word_ids, np.int64)
    first = int(np.argmax(spans[:, 0] >= start)) if len(ids) else 0
    if len(ids) and spans[first, 0] < start:
        first = len(ids)
    is_clean = bool((spans[:first, 1] <= start).all() and (spans[first:, 0] >= start).all())
    are_first = np.ones(len(ids), np.bool_)
    are_first[1:] = words[1:] != words[:-1]
    piece = Piece(
        start=start,
        before=content[: start - begin][-2:],
        text=content[start - begin :],
        ids=ids[first:],
        starts=spans[first:, 0],
        stops=spans[first:, 1],
        ends=np.maximum.accumulate(spans[first:, 1]) if first < len(ids) else spans[first:, 1],
        are_first=are_first[first:],
    )
    return piece, is_clean


class _Text:
    """A text that is read part by part, and forgotten up to where it is not needed any more."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = iter(parts)
        self._held = ""
        self._start = 0
        self.is_whole = False
        """Whether the last reading came to the end."""

    def read(self, begin: int, end: int | None) -> str:
        """The characters between two places, or up to the end of the text."""
        ahead = [self._held]
        length = self._start + len(self._held)
        while end is None or length <= end:
            part = next(self._parts, None)
            if part is None:
                break
            ahead.append(part)
            length += len(part)
        self._held = "".join(ahead)
        self.is_whole = end is None or length <= end
        return self._held[begin - self._start : None if end is None else end - self._start]

    def forget(self, until: int) -> None:
        """Let go what is before a place."""
        while self._start + len(self._held) < until:
            part = next(self._parts, None)
            if part is None:
                break
            self._start, self._held = self._start + len(self._held), part
        if until > self._start:
            self._held, self._start = self._held[until - self._start :], until


def _agree(piece: Piece, end: int, proof: int, following: _Window) -> bool:
    """Whether the window that begins at token `end` of a piece has its tokens up to number `proof`."""
    there, count = following.piece, proof - end
    return following.is_clean and all(
        np.array_equal(ours[end:proof], theirs[:count])
        for ours, theirs in (
            (piece.ids, there.ids),
            (piece.starts, there.starts),
            (piece.stops, there.stops),
        )
    )
