"""A recipe and its corpus → the sequences of one partition of its corpus, cut into shards.

In:   a corpus, from an offset on.
Out:  the sequences of one shard after the other, each with its documents' place in the corpus.

How:  documents are read, and short texts of them tokenized, on a thread of their own, up to AHEAD batches of them; what they are, or what
      is wrong with them, counts when their turn has come. A batch of texts is tokenized at once, on all cores.

A shard ends with the document that reaches `shard_tokens`. Only a document of more than twice that by itself is cut: with the row with which
the shard holds so many tokens of it; it goes on in the next shard. So no shard has more than three times `shard_tokens`, and a row.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields

from builder.capture.ahead import Ahead
from builder.capture.generation import Generator
from builder.capture.pipeline import Notice
from builder.corpus.documents import Corpus, Document, Offset
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Place, Rows, Sequence
from builder.dataset.shards import Block
from builder.recipe.recipe import Recipe
from builder.sources.holdout import split_of
from builder.sources.opening import open_corpus
from builder.sources.resolve import CorpusSource
from builder.text.pieces import Piece
from logit_dataset.schema import TRAIN

LONG_DOCUMENT = 2
"""Shards' worth of tokens by which a document is cut. Former versions cut none, so that this many keep most shards what they were."""
BATCH_CHARACTERS = 2**17
"""Of texts that are tokenized at once: 26 MB while they are."""
FIRST_CHARACTERS = 2**13
"""Of the first such batch, so that a small corpus is not read to its end first; each further one is twice as large, up to that."""
BATCH_DOCUMENTS = 512
"""That are read at once, at most."""
BATCH_OTHERS = 16
"""Chats and long texts that are read at once, at most: how large a chat is, is not known."""
AHEAD = 4
"""Batches that are read ahead: of some 130,000 tokens, so that the next shard has its first ones when it begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A document of the corpus, or its end."""

    document: Document | None
    whole: Piece | None
    """Its tokens, where they were made ahead."""
    offset: Offset
    """Of the corpus behind it."""
    offset_of_last: Offset
    """To read it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A document that was read ahead, to be completed."""

    sequence: Sequence
    offset: Offset
    """Of the corpus after it."""
    too_long: int
    """Documents just before it that leave no room for a completion."""


@dataclass(slots=True, kw_only=True)
class _Document:
    """A document of which there are sequences left."""

    rows: Rows
    ahead: Sequence | None
    """The next sequence, where it was looked at."""
    is_begun: bool
    """Whether an earlier shard holds its beginning."""
    offset: Offset
    """Of the corpus, to read it again."""

    def sequences(self) -> Iterator[Sequence]:
        """Those that are left."""
        if self.ahead:
            sequence, self.ahead = self.ahead, None
            yield sequence
        yield from self.rows


class SequenceStream:
    """The sequences of one partition, cut into shards."""

    def __init__(
        self,
        recipe: Recipe,
        source: CorpusSource,
        encoder: Encoder,
        partition: int,
        start: Offset | None,
        *,
        split: str = TRAIN,
        opening: Callable[[int], None] = lambda _: None,
        reach: Callable[[int], int] = lambda _: sys.maxsize,
        notice: Notice = lambda _: None,
    ) -> None:
        """Open the corpus where an earlier shard of the partition ended, or at its beginning.

        Args:
            recipe: the recipe.
            source: of its corpus.
            encoder: makes sequences of documents.
            partition: of the dataset: those of `train` are those of the corpus, and behind them are as many of `validation`.
            start: offset in it; None for its beginning.
            split: of the dataset, whose documents alone are read.
            opening: told the number of each file before it is opened.
            reach: how long what begins with a prompt of some length may become (`Teacher.reach`).
            notice: told of the first prompt that leaves no room for a completion.
        """
        corpus, partitions = recipe.corpus, recipe.output.partitions
        self.partition, self.split = partition, split
        self.part = part = partition % partitions
        """Of the corpus."""
        self.exhausted = False
        self.offset: Offset = start or {}
        self._shard_tokens = recipe.output.shard_tokens
        self._max_documents, self._max_tokens = (
            limit and _share(limit, part, partitions) for limit in recipe.limits(split)
        )
        self._tokens: int = start["tokens"] if start else 0
        self._num_documents: int = start["documents"] if start else 0
        self._without_rows = 0
        self._corpus = open_corpus(
            corpus,
            source,
            are_prompts=recipe.generation is not None,
            partition=part,
            num_partitions=partitions,
            start=start,
            opening=opening,
            keeps=_keeps(recipe, split),
            counts_blank=split == TRAIN,  # blank ones belong to no split, and are counted once
        )
        self._read_offset = self._corpus.offset
        """Behind the last document that was taken."""
        self._first_file: int = self._read_offset["file"]
        left = None if self._max_tokens is None else self._max_tokens - self._tokens
        self._documents = _read_ahead(self._corpus, encoder, left)
        self._pending: _Document | None = None
        self._place = _place_in(start)
        """At which the first document goes on, where one does."""
        self._encoder = encoder
        self.is_of_prompts = recipe.generation is not None
        self._max_length, self._reach = recipe.sequences.max_length, reach
        self._max_new_tokens = recipe.generation.max_new_tokens if recipe.generation else 0
        self._pending_prompt: _Prompt | None = None
        self._too_long_ahead = 0
        self._notice, self._has_told = notice, False
        self.prompts_too_long = 0
        """In the last shard of prompts."""

    @property
    def passed_over(self) -> int:
        """Documents of the other split that were read so far."""
        return self._corpus.passed_over

    @property
    def files_read(self) -> tuple[int, int]:
        """The numbers of the first and the last file that the last shard was read from, or that were looked into behind it."""
        return self._first_file, self._read_offset["file"]

    def shard_sequences(self) -> Iterator[Sequence]:
        """The sequences of the next shard; afterwards `offset` and `exhausted` say where it ended."""
        shard_end, self._first_file = self._tokens + self._shard_tokens, self._read_offset["file"]
        while self._tokens < shard_end:
            document, self._pending = self._pending, None
            if document is None and (self._place or not self._limit_reached()):
                document = self._next_document()
            if document is None:
                break
            self._num_documents += not document.is_begun
            document_end = self._tokens + LONG_DOCUMENT * self._shard_tokens
            for sequence in document.sequences():
                self._tokens += len(sequence.token_ids)
                yield sequence
                if self._tokens >= document_end and (place := document.rows.place):
                    self._go_on(document, place)
                    return
        self.offset = self._offset()
        # Look one document ahead, so that the last shard knows that it is the last and no empty one follows. The
        # recorded offset is the one before the look, unless there was nothing to see.
        if not self._limit_reached():
            self._pending = self._next_document()
        if self._pending is None:
            self.exhausted = True
            self.offset = self._offset()

    def _go_on(self, document: _Document, place: Place) -> None:
        """End the shard within a document, of which there is more, and begin the next one with that."""
        document.is_begun = True
        self._pending = document
        self.offset = {**document.offset, "tokens": self._tokens, **asdict(place)}
        self.exhausted = self._has_tokens()

    def _next_document(self) -> _Document | None:
        """The next document that has sequences; None at the end of the corpus."""
        while (read := self._take()) and read.document:
            place, self._place = self._place, None
            rows = self._encoder.sequences(read.document, place, whole=read.whole)
            if first := next(rows, None):
                return _Document(
                    rows=rows,
                    ahead=first,
                    is_begun=place is not None,
                    offset=self._offset(read.offset_of_last),
                )
            self._without_rows += 1
        return None

    def _take(self) -> _Read | None:
        """The next document; None, or a read of none, at the end of the corpus."""
        read = next(self._documents, None)
        if read:
            self._read_offset = read.offset
        return read

    def shard_blocks(self, generator: Generator) -> Iterator[Block]:
        """The rows of the next shard where documents are prompts; afterwards `offset` and `exhausted` say where it ended.

        Prompts are completed a window at a time, and a shard ends with the window that reaches its tokens.
        """
        shard_end, self.prompts_too_long = self._tokens + self._shard_tokens, 0
        self._first_file = self._read_offset["file"]
        while self._tokens < shard_end and not self._limit_reached():
            left = None if self._max_tokens is None else self._max_tokens - self._tokens
            window = self._window(generator, left)
            if not window:
                break
            prompts = [prompt.sequence for prompt in window]
            block, count = generator.complete(prompts, max_tokens=left)
            self._tokens += len(block.distribution["logsumexp"])
            self.offset = {**window[count - 1].offset, "tokens": self._tokens}
            self._num_documents = self.offset["documents"]
            self.prompts_too_long += sum(prompt.too_long for prompt in window[:count])
            yield block
        # Look ahead as above. Documents that are no prompts at the end of the corpus belong to the last shard.
        if self._limit_reached():
            self.exhausted = True
        elif self._look_ahead() is None:
            self.exhausted = True
            self.prompts_too_long += self._too_long_ahead
            self.offset = self._offset()

    def _window(self, generator: Generator, left: int | None) -> list[_Prompt]:
        """The prompts that are completed together: of a shard's tokens, and no more than `left` can need."""
        window: list[_Prompt] = []
        limit, room, least = min(generator.window_tokens, self._shard_tokens), 0, 0
        while (prompt := self._look_ahead()) and (left is None or least < left):
            room += generator.room(prompt.sequence)
            if window and room > limit:
                break
            least += generator.samples * (len(prompt.sequence.token_ids) + 1)
            window.append(prompt)
            self._pending_prompt = None
        return window

    def _look_ahead(self) -> _Prompt | None:
        """The next prompt; where there is none, the documents that were too long stay counted in `_too_long_ahead`."""
        if self._pending_prompt:
            return self._pending_prompt
        limit = self._max_documents
        while limit is None or self._offset()["documents"] < limit:
            read = self._take()
            if read is None or read.document is None:
                break
            document = read.document
            sequence = self._encoder.encode_prompt(document, self._max_length)
            if sequence and self._end(sequence) <= self._limit(sequence):
                self._pending_prompt = _Prompt(
                    sequence=sequence, offset=self._offset(), too_long=self._too_long_ahead
                )
                self._too_long_ahead = 0
                return self._pending_prompt
            self._without_rows += 1
            if sequence:
                self._too_long_ahead += 1
                self._tell_too_long(sequence, is_all=document.length <= len(sequence.text))
        return None

    def _end(self, prompt: Sequence) -> int:
        """Where the longest completion of a prompt ends."""
        return len(prompt.token_ids) + self._max_new_tokens

    def _limit(self, prompt: Sequence) -> int:
        """Where it has to end."""
        return min(self._max_length, self._reach(len(prompt.token_ids)))

    def _tell_too_long(self, prompt: Sequence, *, is_all: bool) -> None:
        if self._has_told:
            return
        self._has_told = True
        length, limit = len(prompt.token_ids), self._limit(prompt)
        found = (
            f"document {prompt.document_id!r} has {length:,} tokens{'' if is_all else ' or more'}"
        )
        if limit == self._max_length:
            most = self._max_length - self._max_new_tokens
            why = f"{found}, but with this sequences.max_length and generation.max_new_tokens a prompt can have at most {most:,}"
        else:
            why = f"{found}, and with generation.max_new_tokens = {self._max_new_tokens:,} its completion would go beyond position {limit:,}, where this teacher changes how it reads the whole sequence (LongRoPE, dynamic NTK or sparse attention)"
        self._notice(f"{why}: such documents are skipped and counted")

    def _offset(self, offset: Offset | None = None) -> Offset:
        offset = offset or self._read_offset
        moved = self._without_rows  # from those that the corpus yielded to those that were skipped
        counts = {
            "documents": offset["documents"] - moved,
            "skipped": offset["skipped"] + moved,
        }
        return {**offset, **counts, "tokens": self._tokens}

    def _limit_reached(self) -> bool:
        documents = self._max_documents
        return self._has_tokens() or (documents is not None and self._num_documents >= documents)

    def _has_tokens(self) -> bool:
        """Whether the limit of tokens is reached, which also holds within a document."""
        return self._max_tokens is not None and self._tokens >= self._max_tokens


def _read_ahead(corpus: Corpus, encoder: Encoder, tokens: int | None) -> Iterator[_Read]:
    """The documents of a corpus, and its end; what reading one raises is raised when its turn has come."""
    with closing(Ahead(_batches(corpus, encoder, tokens), depth=AHEAD, name="corpus")) as batches:
        for batch, error in batches:
            yield from batch
            if error:
                raise error


def _batches(
    corpus: Corpus, encoder: Encoder, tokens_left: int | None
) -> Iterator[tuple[list[_Read], Exception | None]]:
    """Some documents at a time, and what came in place of the one behind them; one at a time where the tokens may suffice."""
    documents = iter(corpus)
    is_end = False
    made, size = 0, FIRST_CHARACTERS
    while not is_end:
        found: list[tuple[Document, Offset, Offset]] = []
        error: Exception | None = None
        room = 1.0
        while room > 0:
            try:
                document = next(documents, None)
            except Exception as one:
                error, is_end = one, True
                break
            if document is None:
                is_end = True
                break
            found.append((document, corpus.offset, corpus.offset_of_last))
            is_text = document.messages is None and document.long_text is None
            room -= (
                max(document.length / size, 1 / BATCH_DOCUMENTS) if is_text else 1 / BATCH_OTHERS
            )
        tokens = encoder.whole([document for document, _, _ in found])
        made += sum(len(whole.ids) for whole in tokens if whole)
        is_enough = tokens_left is not None and made >= tokens_left
        size = 1 if is_enough else min(2 * size, BATCH_CHARACTERS)
        reads = [
            _Read(document=document, whole=whole, offset=offset, offset_of_last=last)
            for (document, offset, last), whole in zip(found, tokens, strict=True)
        ]
        if is_end and error is None:
            end = corpus.offset
            reads.append(_Read(document=None, whole=None, offset=end, offset_of_last=end))
        yield reads, error
        # One that is larger than a batch takes the place of others, so that no more characters are held.
        yield from [([], None)] * min(AHEAD, int(-room))


def _place_in(offset: Offset | None) -> Place | None:
    """Where a document goes on at an offset of the corpus; None where one begins."""
    if not offset or "chunk" not in offset:
        return None
    return Place(**{field.name: offset[field.name] for field in fields(Place)})


def _keeps(recipe: Recipe, split: str) -> Callable[[str], bool] | None:
    """Whether a document is of a split, by its id; None where there is one split."""
    share, seed = recipe.output.validation, recipe.output.seed
    if share is None:
        return None
    return lambda document_id: split_of(document_id, share=share, seed=seed) == split


def _share(limit: int, partition: int, partitions: int) -> int:
    """What one partition may take of a limit for all."""
    return limit * (partition + 1) // partitions - limit * partition // partitions
