"""One shard of a plan → its file and its record: what a worker does, in this process or in another one.

In:   a plan, and where a shard starts in the corpus.
Out:  the shard's file, renamed into place, and its record, which is for the caller to keep.

How:  a shard is a pure function of the recipe, the sources and its start. So it does not matter who computes it, or whether
      two do: each writes under a temporary name of its own, and what it renames into place are the same bytes.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.corpus import Position
from builder.distribution import Distribution
from builder.manifest import ShardRecord, Sums, environment
from builder.pipeline import Notice, Pipeline, Progress
from builder.ranks import load
from builder.recipe import Recipe, row_fingerprint
from builder.schema import SCHEMA_VERSION, Layout
from builder.sequences import Encoder
from builder.shards import MAX_ROW_VALUES, ShardWriter, atomic_file, file_sha256
from builder.sources import CorpusSource, TeacherSource
from builder.stream import SequenceStream, make_encoder
from builder.teacher import Teacher

SUM_VALUES = 2**22
"""Log-probabilities that are summed at once: 32 MB in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A shard to compute."""

    partition: int
    index: int
    start: Position | None
    """Where in the corpus the shard before it ended; None for the first of a partition."""

    @property
    def file(self) -> str:
        """Path of its file below the dataset's directory."""
        return f"data/train-{self.partition:03d}-{self.index:05d}.parquet"


Computed = tuple[Task, ShardRecord | Exception]
"""A shard that was to be computed, and how that ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Several workers that Ray runs."""

    workers: int
    device: str = "auto"
    """`auto`, `cpu` or `cuda`: settled where the workers are."""
    address: str | None = None
    """Of a Ray cluster, as `ray.init` takes it; None for this machine alone."""
    gpus_per_worker: float | None = None
    """None for what device and teacher need."""
    told: Callable[[str], None] = lambda _: None
    """Called, again and again, with a few words on what each worker does."""


class Worker:
    """Computes shards. Holds what is worth keeping between them: the teacher, and the open corpus."""

    def __init__(
        self,
        recipe: Recipe,
        plan: dict[str, Any],
        corpus_source: CorpusSource,
        teacher_source: TeacherSource,
        *,
        device: str,
        progress: Progress,
        notice: Notice,
    ) -> None:
        """Prepare to compute; the teacher is loaded when it is first needed.

        Args:
            recipe: what is built.
            plan: the recipe and its sources as they were resolved.
            corpus_source: where the documents come from.
            teacher_source: where the teacher comes from.
            device: a torch device.
            progress: told of captured tokens.
            notice: told, in a line, of what the user should know.
        """
        self._recipe = recipe
        self._corpus_source = corpus_source
        self._teacher_source = teacher_source
        self._device = device
        self._progress = progress
        self._notice = notice
        self._metadata = {
            "logit_dataset.schema": SCHEMA_VERSION,
            "logit_dataset.row_fingerprint": row_fingerprint(plan),
        }
        self._stream: SequenceStream | None = None

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded when first needed."""
        teacher = load(self._recipe.teacher, self._teacher_source, device=self._device)
        _check_fit(self._recipe, teacher)
        return teacher

    @cached_property
    def encoder(self) -> Encoder:
        """The way from documents to sequences of the recipe and the teacher's tokenizer."""
        return make_encoder(self._recipe.sequences, self.teacher.tokenizer)

    @cached_property
    def layout(self) -> Layout:
        """What the rows hold."""
        return Layout.of(self._recipe.published()["output"], self.teacher.provenance())

    def prepare(self, task: Task) -> dict[str, Any]:
        """Load the teacher and open the corpus for a first task, without reading it.

        Returns:
            What the loaded teacher is, and what is put around its sequences.

        Raises:
            ValueError: no shard can be computed, for the teacher cannot be loaded or does not fit the recipe, or the
                corpus cannot be opened.
        """
        self._stream = self._stream_for(task)
        special = {"prefix_ids": self.encoder.prefix, "suffix_ids": self.encoder.suffix}
        return self.teacher.provenance() | special

    def shard(self, output: Path, task: Task) -> ShardRecord:
        """Compute one shard and write its file below the directory `output`.

        Raises:
            ValueError: its part of the corpus cannot be read or is empty, or the teacher fails on it.
            OSError: the disk is full or cannot be written.
        """
        started = time.perf_counter()
        file = output / task.file
        stream, self._stream = self._stream_for(task), None
        rows, tokens, sums = 0, 0, Sums()
        pipeline = Pipeline(
            self.teacher,
            layout=self.layout,
            seed=self._recipe.output.seed,
            batch_tokens=self._recipe.sequences.batch_tokens,
            progress=self._progress,
            notice=self._notice,
        )
        with (
            atomic_file(file, writer=secrets.token_hex(4)) as sink,
            ShardWriter(
                sink,
                layout=self.layout,
                profile=self._recipe.output.profile,
                metadata=self._metadata,
            ) as writer,
        ):
            for block in pipeline.blocks(stream.shard_sequences()):
                writer.write(block)
                rows += len(block.sequences)
                tokens += len(block.distribution["logsumexp"])
                sums += _sums(block.distribution)
            if not rows:
                skipped = stream.position["skipped"]
                where = (
                    f"partition {task.partition} of the corpus" if task.partition else "the corpus"
                )
                raise ValueError(
                    f"{where} has no text ({skipped} null, empty or blank documents); "
                    "check corpus.text_column"
                )
        self._stream = stream
        return ShardRecord(
            file=task.file,
            sha256=file_sha256(file),
            bytes=file.stat().st_size,
            rows=rows,
            tokens=tokens,
            partition=task.partition,
            index=task.index,
            position_after=stream.position,
            exhausted=stream.exhausted,
            sums=sums,
            halved_batches=pipeline.halved_batches,
            seconds=round(time.perf_counter() - started, 3),
            environment=environment(self._device),
        )

    def _stream_for(self, task: Task) -> SequenceStream:
        """The corpus from where the shard starts: as the shard before left it, or opened anew."""
        stream = self._stream
        if stream and (stream.partition, stream.position) == (task.partition, task.start):
            return stream
        return SequenceStream(
            self._recipe, self._corpus_source, self.encoder, task.partition, task.start
        )


def _check_fit(recipe: Recipe, teacher: Teacher) -> None:
    output, max_length = recipe.output, recipe.sequences.max_length
    if output.top_k != "all" and output.top_k > teacher.vocab_size:
        raise ValueError(
            f"output.top_k is {output.top_k}, but the teacher's vocabulary has {teacher.vocab_size} tokens; "
            "choose a smaller top_k"
        )
    if teacher.max_length and max_length > teacher.max_length:
        raise ValueError(
            f"sequences.max_length is {max_length}, but the teacher was made for {teacher.max_length} "
            "positions; choose a smaller max_length"
        )
    if output.hidden_states and not teacher.head_only:
        raise ValueError(
            f"output.hidden_states is true, but {type(teacher.model).__name__} does not come apart into a body and a head; "
            "set it to false"
        )
    widest = Layout.of(recipe.published()["output"], teacher.provenance()).widest
    if max_length * widest > MAX_ROW_VALUES:
        raise ValueError(
            f"a row of sequences.max_length = {max_length} tokens would hold {max_length * widest:,} values in one column, more "
            f"than the {MAX_ROW_VALUES:,} that Arrow's lists can; choose a smaller max_length or top_k"
        )


def _sums(distribution: Distribution) -> Sums:
    nll = -distribution["target_logprob"].double()
    logprobs = distribution.get("topk_logprobs", distribution.get("logprobs"))
    assert logprobs is not None
    rows = max(1, SUM_VALUES // logprobs.shape[1])
    return Sums(
        entropy=float(distribution["entropy"].double().sum()),
        topk_mass=sum(float(part.double().exp().sum()) for part in logprobs.split(rows)),
        target_nll=float(nll.nansum()),
        targets=int((~nll.isnan()).sum()),
    )
