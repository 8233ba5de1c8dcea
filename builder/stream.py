"""A resolved recipe → the sequences of one partition of its corpus, cut into shards at the ends of documents."""

from collections.abc import Iterator
from typing import Any

from builder.chats import ChatTemplate
from builder.corpus import Corpus, Position, open_hub, open_local
from builder.recipe import CorpusRecipe, Recipe
from builder.sequences import Encoder, Sequence
from builder.sources import CorpusSource


class SequenceStream:
    """The sequences of one partition, cut into shards at document boundaries."""

    def __init__(
        self,
        recipe: Recipe,
        source: CorpusSource,
        encoder: Encoder,
        partition: int,
        start: Position | None,
    ) -> None:
        """Open the corpus where an earlier shard of the partition ended, or at its beginning."""
        corpus, partitions = recipe.corpus, recipe.output.partitions
        self.partition = partition
        self.exhausted = False
        self.position: Position = start or {}
        self._shard_tokens = recipe.output.shard_tokens
        self._max_documents, self._max_tokens = (
            limit and _share(limit, partition, partitions)
            for limit in (corpus.max_documents, corpus.max_tokens)
        )
        self._tokens: int = start["tokens"] if start else 0
        self._num_documents: int = start["documents"] if start else 0
        self._without_rows = 0
        self._corpus = open_corpus(
            corpus, source, partition=partition, num_partitions=partitions, start=start
        )
        self._documents = iter(self._corpus)
        self._pending: list[Sequence] | None = None
        self._encoder = encoder

    def shard_sequences(self) -> Iterator[Sequence]:
        """The sequences of the next shard; afterwards `position` and `exhausted` say where it ended."""
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
        self.position = self._position()
        # Look one document ahead, so that the last shard knows that it is the last and no empty one follows. The
        # recorded position is the one before the look, unless there was nothing to see.
        if not self._limit_reached():
            self._pending = self._next_document()
        if self._pending is None:
            self.exhausted = True
            self.position = self._position()

    def _next_document(self) -> list[Sequence] | None:
        """The sequences of the next document that has any; None at the end of the corpus."""
        for document in self._documents:
            if sequences := self._encoder.encode(document):
                return sequences
            self._without_rows += 1
        return None

    def _position(self) -> Position:
        position = self._corpus.position
        moved = self._without_rows  # from those that the corpus yielded to those that were skipped
        counts = {
            "documents": position["documents"] - moved,
            "skipped": position["skipped"] + moved,
        }
        return {**position, **counts, "tokens": self._tokens}

    def _limit_reached(self) -> bool:
        documents, tokens = self._max_documents, self._max_tokens
        return (documents is not None and self._num_documents >= documents) or (
            tokens is not None and self._tokens >= tokens
        )


def open_corpus(
    recipe: CorpusRecipe,
    source: CorpusSource,
    *,
    partition: int = 0,
    num_partitions: int = 1,
    start: Position | None = None,
) -> Corpus:
    """The documents of one partition of a resolved corpus, from a position on."""
    id_column = "id" if recipe.embedded else recipe.id_column
    content_column = recipe.messages_column or recipe.text_column
    if source.format == "hub":
        assert recipe.repo
        assert source.commit
        rows = open_hub(recipe.repo, commit=source.commit, config=recipe.config, split=recipe.split)
    else:
        rows = open_local(
            source.files,
            format=source.format,
            text_unit=recipe.text_unit,
            columns=tuple(dict.fromkeys(filter(None, (content_column, id_column)))),
        )
    return Corpus(
        rows,
        text_column=recipe.text_column,
        messages_column=recipe.messages_column,
        id_column=id_column,
        format=source.format,
        file_names=tuple(path.name for path in source.files),
        partition=partition,
        num_partitions=num_partitions,
        start=start,
    )


def make_encoder(recipe: Recipe, tokenizer: Any, template: str | None = None) -> Encoder:
    """The encoder that a recipe asks for, with the chat template that it names, if any.

    Raises:
        ValueError: as `Encoder` and, where the corpus is one of chats, `ChatTemplate`.
    """
    sequences = recipe.sequences
    return Encoder(
        tokenizer,
        max_length=sequences.max_length,
        long_documents=sequences.long_documents,
        bos=sequences.bos,
        eos=sequences.eos,
        chats=ChatTemplate(tokenizer, template) if recipe.corpus.messages_column else None,
    )


def _share(limit: int, partition: int, partitions: int) -> int:
    """What one partition may take of a limit for all."""
    return limit * (partition + 1) // partitions - limit * partition // partitions
