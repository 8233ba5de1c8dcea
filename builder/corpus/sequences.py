"""Pieces of a document with their tokens → sequences for the teacher, and batches of sequences of like length.

In:   the pieces of a document (`text.pieces`), or a chat as one.
Out:  one sequence, or several chunks of at most max_length tokens, one after the other; together their texts are the document again. At any
      time, the place in the document at which the next one starts.

How:  a cut never falls inside a character (one code point may be several tokens), so each chunk's text is exactly what its tokens spell.
      Of a chat, the first chunk starts as the template starts it; later ones start with what the tokenizer puts before a text.
      A place is a function of the document alone: the last seam (`text.seams`) before the sequence, and the tokens from there to it. So
      going on reads a text up to there again, and tokenizes next to nothing again.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from builder.corpus.documents import Document
from builder.text.pieces import Piece
from builder.text.seams import Seams
from logit_dataset.schema import loss_mask

NO_TOKEN = -1
"""Stands for the next token where nothing follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One future row: what the teacher sees, and what follows it."""

    document_id: str
    chunk_index: int
    text: str
    token_ids: list[int]
    next_token: int
    """The token after the last one: the document's, where it was cut, else end-of-sequence, else NO_TOKEN."""
    completion_mask: list[bool] | None = None
    """Which tokens are the completion's; None in a corpus of texts."""
    notes: tuple[str, ...] = ()
    """Of the first sequence of a document: what was converted in that, or left out of it."""

    @property
    def targets(self) -> list[int]:
        """The token that really follows each position."""
        return [*self.token_ids[1:], self.next_token]

    @property
    def loss_positions(self) -> list[int]:
        """The positions whose next token is in the row, and the completion's."""
        return np.flatnonzero(loss_mask(self.completion_mask or [])).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What sequences are like."""

    max_length: int
    """In tokens, special ones included."""
    prefix: list[int]
    """Special tokens before each sequence."""
    suffix: list[int]
    """Special tokens behind each document."""
    eos: int
    """What follows a document; NO_TOKEN where nothing does."""
    truncates: bool
    """Whether a document is its first sequence only."""
    are_chats: bool
    """Whether a document brings its own prefix."""
    seams: Callable[[], Seams]
    """Of the tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a document one of its sequences starts."""

    document: str
    """Its `document_id`."""
    chunk: int
    """Its `chunk_index`."""
    sequence: int
    """Sequences of the document before it."""
    character: int
    """A place in the text, at it or before it, from which on the document can be tokenized without what is before."""
    token: int
    """Tokens from there to the sequence."""


class Rows(Protocol):
    """The sequences of a document, one after the other."""

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences that are left."""

    def __next__(self) -> Sequence:
        """The next one."""

    @property
    def place(self) -> Place | None:
        """Where the next one starts; None if there is none."""


class Turns:
    """The sequences of a chat."""

    def __init__(self, sequences: list[Sequence], start: Place | None) -> None:
        self._sequences = sequences
        self._at = start.sequence if start else 0
        if start and self.place != start:
            raise ValueError(_no_place(start))

    def __iter__(self) -> "Turns":
        return self

    def __next__(self) -> Sequence:
        if self._at == len(self._sequences):
            raise StopIteration
        self._at += 1
        return self._sequences[self._at - 1]

    @property
    def place(self) -> Place | None:
        """Where the next one starts."""
        if self._at >= len(self._sequences):
            return None
        first = self._sequences[self._at]
        return Place(
            document=first.document_id,
            chunk=first.chunk_index,
            sequence=self._at,
            character=0,
            token=0,
        )


class Chunks:
    """The sequences of a text, or of a chat as one text, cut from the pieces of it."""

    def __init__(
        self, form: Form, document: Document, pieces: Iterator[Piece], start: Place | None
    ) -> None:
        self._form, self._document, self._pieces = form, document, pieces
        self._parts: list[Piece] = []
        """Pieces, of which the first holds the next sequence's first token."""
        self._held: Piece | None = None
        """All of them in one."""
        self._at, self._number, self._text_at = 0, 0, 0
        self._is_all = False
        """Whether the document ends with what is held."""
        if start is None:
            return
        self._at, self._number, self._text_at = start.token, start.chunk, start.character
        self._fill(1)
        # The first piece holds it, for there is no seam between the place and the sequence.
        is_there = self._held and self._at == start.token and len(self._held.ids) > start.token
        if document.id != start.document or not is_there:
            raise ValueError(_no_place(start))
        if start.token:
            assert self._held
            self._text_at = int(self._held.ends[start.token - 1])

    def __iter__(self) -> "Chunks":
        return self

    def __next__(self) -> Sequence:
        form, number = self._form, self._number
        prefix = [] if form.are_chats and number == 0 else form.prefix
        room = form.max_length - len(prefix) - len(form.suffix)
        self._fill(room + 1)
        held, start = self._held, self._at
        if held is None or start >= len(held.ids):
            raise StopIteration
        end = _cut(start, start + room, held)
        is_last = end == len(held.ids)
        text_end = held.start + len(held.text) if is_last else int(held.ends[end - 1])
        suffix = form.suffix if is_last else []
        sequence = Sequence(
            document_id=self._document.id,
            chunk_index=number,
            text=held.text[self._text_at - held.start : text_end - held.start],
            token_ids=[*prefix, *held.ids[start:end].tolist(), *suffix],
            next_token=form.eos if is_last else int(held.ids[end]),
            completion_mask=self._mask(slice(start, end), len(prefix), len(suffix)),
        )
        self._at, self._number, self._text_at = end, number + 1, text_end
        if form.truncates:
            self._pieces, self._held, self._is_all = iter(()), None, True
            if sequence.completion_mask is not None and not sequence.loss_positions:
                raise StopIteration
        return sequence

    def _mask(self, where: slice, before: int, behind: int) -> list[bool] | None:
        """Which tokens are the completion's; those that end a text end its completion, too."""
        held, prompt_length = self._held, self._document.prompt_length
        assert held
        if held.completion_mask is not None:
            mask: list[bool] = held.completion_mask[where].tolist()
        elif prompt_length is not None:  # a token across the border is the completion's
            mask = (held.stops[where] > prompt_length).tolist()
        else:
            return None
        return [False] * before + mask + [True] * behind

    @property
    def place(self) -> Place | None:
        """Where the next one starts."""
        self._fill(1)
        if self._held is None or self._at >= len(self._held.ids):
            return None
        # What decides a seam is the two characters behind it, too.
        while self._text_at + 2 > self._held.start + len(self._held.text) and self._take():
            pass
        token = self._held.last_seam(self._at, self._form.seams()) or 0
        return Place(
            document=self._document.id,
            chunk=self._number,
            sequence=self._number,
            character=int(self._held.ends[token - 1]) if token else self._held.start,
            token=self._at - token,
        )

    def _fill(self, count: int) -> None:
        """Hold so many tokens from the next sequence's first one on, as far as there are more."""
        while self._held is None or len(self._held.ids) < self._at + count:
            if not self._take():
                return

    def _take(self) -> bool:
        """Hold one more piece, and let go those before the next sequence; whether there was one more."""
        piece = None if self._is_all else next(self._pieces, None)
        if piece is None:
            self._is_all = True
            return False
        self._parts.append(piece)
        while len(self._parts) > 1 and self._at >= len(self._parts[0].ids):
            self._at -= len(self._parts.pop(0).ids)
        self._held = self._parts[0]
        for part in self._parts[1:]:
            self._held = self._held.then(part)
        return True


def _no_place(place: Place) -> str:
    return f"document {place.document!r} no longer has chunk {place.chunk}; the corpus or a library has changed: start again in another directory"


def length_sorted_batches(
    lengths: SequenceOf[int], batch_tokens: int, reach: Callable[[int], int] = lambda _: 0
) -> list[list[int]]:
    """Indices of sequences in batches of at most `batch_tokens` positions, padding included, longest first.

    A sequence longer than batch_tokens is a batch of its own.

    Args:
        lengths: of the sequences.
        batch_tokens: positions in a batch, padding included.
        reach: of a length; sequences share a batch only if it is the same (`Teacher.reach`). It does not fall with the length.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if (
            not batches
            or (len(batches[-1]) + 1) * longest > batch_tokens
            or reach(lengths[index]) != reach(longest)
        ):
            batches.append([])
        batches[-1].append(index)
    return batches


def _cut(start: int, limit: int, piece: Piece) -> int:
    """Where the chunk that starts at token `start` ends: at most `limit`, and not inside a character."""
    if limit >= len(piece.ids):
        return len(piece.ids)
    end = limit
    while end > start and piece.starts[end] < piece.ends[end - 1]:
        end -= 1
    return end if end > start else limit  # a single character longer than a chunk has to be cut
