"""A recipe and its corpus → the sequences of one partition of its corpus, cut into shards at the ends of documents."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from builder.capture.generation import Generator
from builder.capture.pipeline import Notice
from builder.corpus.documents import Offset
from builder.corpus.sequences import Encoder, Sequence
from builder.dataset.shards import Block
from builder.recipe import Recipe
from builder.sources.opening import open_corpus
from builder.sources.resolve import CorpusSource


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """A document that was read ahead, to be completed."""

    sequence: Sequence
    offset: Offset
    """Of the corpus after it."""
    too_long: int
    """Documents just before it that leave no room for a completion."""


class SequenceStream:
    """The sequences of one partition, cut into shards at document boundaries."""

    def __init__(
        self,
        recipe: Recipe,
        source: CorpusSource,
        encoder: Encoder,
        partition: int,
        start: Offset | None,
        *,
        reach: Callable[[int], int] = lambda _: sys.maxsize,
        notice: Notice = lambda _: None,
    ) -> None:
        """Open the corpus where an earlier shard of the partition ended, or at its beginning.

        Args:
            recipe: the recipe.
            source: of its corpus.
            encoder: makes sequences of documents.
            partition: of the corpus.
            start: offset in it; None for its beginning.
            reach: how long what begins with a prompt of some length may become (`Teacher.reach`).
            notice: told of the first prompt that leaves no room for a completion.
        """
        corpus, partitions = recipe.corpus, recipe.output.partitions
        self.partition = partition
        self.exhausted = False
        self.offset: Offset = start or {}
        self._shard_tokens = recipe.output.shard_tokens
        self._max_documents, self._max_tokens = (
            limit and _share(limit, partition, partitions)
            for limit in (corpus.max_documents, corpus.max_tokens)
        )
        self._tokens: int = start["tokens"] if start else 0
        self._num_documents: int = start["documents"] if start else 0
        self._without_rows = 0
        self._corpus = open_corpus(
            corpus,
            source,
            are_prompts=recipe.generation is not None,
            partition=partition,
            num_partitions=partitions,
            start=start,
        )
        self._documents = iter(self._corpus)
        self._pending: list[Sequence] | None = None
        self._encoder = encoder
        self.is_of_prompts = recipe.generation is not None
        self._max_length, self._reach = recipe.sequences.max_length, reach
        self._max_new_tokens = recipe.generation.max_new_tokens if recipe.generation else 0
        self._pending_prompt: _Prompt | None = None
        self._too_long_ahead = 0
        self._notice, self._has_told = notice, False
        self.prompts_too_long = 0
        """In the last shard of prompts."""

    def shard_sequences(self) -> Iterator[Sequence]:
        """The sequences of the next shard; afterwards `offset` and `exhausted` say where it ended."""
        shard_end = self._tokens + self._shard_tokens
        while self._tokens < shard_end and not self._limit_reached():
            sequences = self._pending or self._next_document()
            self._pending = None
            if sequences is None:
                break
            self._num_documents += 1
            for sequence in sequences:
                self._tokens += len(sequence.token_ids)
                yield sequence
        self.offset = self._offset()
        # Look one document ahead, so that the last shard knows that it is the last and no empty one follows. The
        # recorded offset is the one before the look, unless there was nothing to see.
        if not self._limit_reached():
            self._pending = self._next_document()
        if self._pending is None:
            self.exhausted = True
            self.offset = self._offset()

    def _next_document(self) -> list[Sequence] | None:
        """The sequences of the next document that has any; None at the end of the corpus."""
        for document in self._documents:
            if sequences := self._encoder.encode(document):
                return sequences
            self._without_rows += 1
        return None

    def shard_blocks(self, generator: Generator) -> Iterator[Block]:
        """The rows of the next shard where documents are prompts; afterwards `offset` and `exhausted` say where it ended.

        Prompts are completed a window at a time, and a shard ends with the window that reaches its tokens.
        """
        shard_end, self.prompts_too_long = self._tokens + self._shard_tokens, 0
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
            document = next(self._documents, None)
            if document is None:
                break
            sequence = self._encoder.encode_prompt(document)
            if sequence and self._end(sequence) <= self._limit(sequence):
                self._pending_prompt = _Prompt(
                    sequence=sequence, offset=self._offset(), too_long=self._too_long_ahead
                )
                self._too_long_ahead = 0
                return self._pending_prompt
            self._without_rows += 1
            if sequence:
                self._too_long_ahead += 1
                self._tell_too_long(sequence)
        return None

    def _end(self, prompt: Sequence) -> int:
        """Where the longest completion of a prompt ends."""
        return len(prompt.token_ids) + self._max_new_tokens

    def _limit(self, prompt: Sequence) -> int:
        """Where it has to end."""
        return min(self._max_length, self._reach(len(prompt.token_ids)))

    def _tell_too_long(self, prompt: Sequence) -> None:
        if self._has_told:
            return
        self._has_told = True
        length, limit = len(prompt.token_ids), self._limit(prompt)
        found = f"document {prompt.document_id!r} has {length:,} tokens"
        if limit == self._max_length:
            most = self._max_length - self._max_new_tokens
            why = f"{found}, and with sequences.max_length and generation.max_new_tokens as they are, a prompt has {most:,} at most"
        else:
            why = (
                f"{found}, and with generation.max_new_tokens = {self._max_new_tokens:,} its completion would go beyond {limit:,}, where "
                "this teacher begins to read all of it in another way (LongRoPE, dynamic NTK or sparse attention)"
            )
        self._notice(f"{why}: such documents are skipped and counted")

    def _offset(self) -> Offset:
        offset = self._corpus.offset
        moved = self._without_rows  # from those that the corpus yielded to those that were skipped
        counts = {
            "documents": offset["documents"] - moved,
            "skipped": offset["skipped"] + moved,
        }
        return {**offset, **counts, "tokens": self._tokens}

    def _limit_reached(self) -> bool:
        documents, tokens = self._max_documents, self._max_tokens
        return (documents is not None and self._num_documents >= documents) or (
            tokens is not None and self._tokens >= tokens
        )


def _share(limit: int, partition: int, partitions: int) -> int:
    """What one partition may take of a limit for all."""
    return limit * (partition + 1) // partitions - limit * partition // partitions
