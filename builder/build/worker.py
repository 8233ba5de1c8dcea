"""One shard of a plan → its file and its record: what a worker does, in this process or in another one.

In:   a plan, and where a shard starts in the corpus.
Out:  the shard's file, renamed into place, and its record, which is for the caller to keep.

How:  a shard is a pure function of the recipe, the sources and its start. So it does not matter who computes it, or whether
      two do: each writes under a temporary name of its own, and what it renames into place are the same bytes.
"""

import gc
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable
from collections.abc import Generator as Generates
from contextlib import closing
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from builder.build.stream import SequenceStream
from builder.build.task import Task
from builder.capture.decoding import Decoder
from builder.capture.generation import Generator
from builder.capture.guard import Guard
from builder.capture.pipeline import Notice, Pipeline, Progress
from builder.capture.trial import try_sizes
from builder.corpus.chats import ChatTemplate
from builder.corpus.encoder import Encoder
from builder.dataset.head_file import write_head
from builder.dataset.identity import row_fingerprint
from builder.dataset.manifest import Completions, ShardRecord, Sums, environment
from builder.dataset.printable import counted
from builder.dataset.shards import (
    Block,
    ShardWriter,
    atomic_file,
    column_bytes,
    file_sha256,
    footer_sha256,
)
from builder.plan.fit import check_fit
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe, SequencesRecipe
from builder.sources.changes import Watch
from builder.sources.opening import make_encoder, open_teacher
from builder.sources.resolve import Sources, template_provenance
from builder.teacher.last_layer import last_layer
from builder.teacher.model import Teacher
from logit_dataset.schema import HEAD_FILE, SCHEMA_VERSION, VALIDATION, Layout

SUM_VALUES = 2**20
"""Log-probabilities that are summed at once: 8 MB in float64."""


class Worker:
    """Computes shards, and keeps the teacher and the open corpus between them."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        *,
        watch: Watch,
        device: str,
        progress: Progress,
        notice: Notice,
        told: Notice = lambda _: None,
    ) -> None:
        """Prepare to compute. The teacher is loaded at first use.

        Args:
            recipe: what to build.
            sources: of the recipe.
            watch: over their local files.
            device: a torch device.
            progress: called with numbers of captured tokens.
            notice: called with one line that the user should know.
            told: called with a description of work that takes time and yields no tokens, and with "" after it.
        """
        self._recipe = recipe
        self._sources = sources
        self._watch = watch
        self._device = device
        self._progress = progress
        self._notice = notice
        self._told = told
        self._stream: SequenceStream | None = None
        self._guard = Guard()
        self._has_written_head = False

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded when first needed."""
        self._watch.check_teacher()
        self._told("loading the teacher")
        teacher = open_teacher(self._recipe.teacher, self._sources.teacher, device=self._device)
        self._told("")
        self._watch.check_teacher()
        check_fit(
            self._recipe,
            vocab_size=teacher.vocab_size,
            hidden_size=teacher.hidden_size,
            max_length=teacher.max_length,
        )
        if self._recipe.output.hidden_states and not teacher.head_only:
            raise ValueError(
                f"output.hidden_states is true, but {type(teacher.model).__name__} cannot be split into a body and a head; set it to false"
            )
        for line in teacher.notices:
            self._notice(line)
        if not teacher.head_only:
            self._notice(_slow_head(self._recipe, teacher))
        return teacher

    def write_teacher_head(self, output: Path) -> None:
        """Write the teacher's last layer beside the data, where hidden states are stored: the same bytes by every worker.

        Where it cannot be said in a formula, there is a line, and no file.
        """
        if not self._recipe.output.hidden_states or self._has_written_head:
            return
        self._has_written_head = True
        try:
            head = last_layer(self.teacher)
        except ValueError as error:
            self._notice(f"{HEAD_FILE} is left out: {error}; hidden states are still stored")
            return
        write_head(output, head)

    @cached_property
    def encoder(self) -> Encoder:
        """The way from documents to sequences of the recipe and the teacher's tokenizer."""
        return make_encoder(
            self._recipe, self.teacher.tokenizer, self._sources.template, notice=self._notice
        )

    @cached_property
    def layout(self) -> Layout:
        """What the rows hold."""
        return Layout.of(self._recipe.published(), self.teacher.provenance())

    def settle_batches(self) -> Recipe:
        """The recipe, in which the size of batches is a number: where it leaves that open, some are tried, which takes the teacher and seconds.

        Raises:
            ValueError: as `prepare`, or the beginning of the corpus cannot be read.
        """
        if self._recipe.sequences.batch_tokens != "auto":
            return self._recipe
        chosen = SequencesRecipe().batch_tokens
        sequences = self._stream_for(Task(partition=0, index=0, start=None)).shard_sequences()
        first = next(sequences, None) if self.teacher.head_only else None
        if first:  # what has none fails later, and where each sequence runs alone, no size matters
            self._told("trying sizes of batches")
            trial = try_sizes(self.teacher, chain([first], sequences), layout=self.layout)
            self._told("")
            self._notice(str(trial))
            chosen = trial.batch_tokens
        self._recipe = self._recipe.with_batch_tokens({"batch_tokens": chosen})
        return self._recipe

    @cached_property
    def decoder(self) -> Decoder | None:
        """The teacher as it writes; None where it does not."""
        recipe = self._recipe.generation
        if recipe is None:
            return None
        chats = self.encoder.chats
        return Decoder(
            self.teacher,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            ends=chats.ends if isinstance(chats, ChatTemplate) else (),
        )

    def prepare(self, task: Task) -> dict[str, Any]:
        """Load the teacher and open the corpus for a first task, without reading it.

        Returns:
            What the loaded teacher is, what is put around its sequences, and where those end that it writes.

        Raises:
            ValueError: no shard can be computed, for the teacher cannot be loaded or does not fit the recipe, or the
                corpus cannot be opened.
        """
        self._stream = self._stream_for(task)
        encoder = self.encoder
        special: dict[str, Any] = {"prefix_ids": encoder.prefix, "suffix_ids": encoder.suffix}
        if self.decoder:
            special["generation_eos_ids"] = sorted(self.decoder.eos_ids)
            if self.decoder.drafts:  # which rounds otherwise than what older code wrote: an unfinished build of that is refused
                special["greedy_drafts"] = "cached"
        template = encoder.chats.source if isinstance(encoder.chats, ChatTemplate) else None
        return self.teacher.provenance() | special | template_provenance(template)

    def shard(self, output: Path, task: Task) -> ShardRecord | None:
        """Compute one shard and write its file below `output`. Return None if the shard belongs to the held-out split and no document is held out.

        Raises:
            ValueError: the shard's part of the corpus cannot be read or is empty, or the teacher fails on it.
            OSError: the disk is full or not writable.
        """
        try:
            return self._shard(output, task)
        except _NothingHeldOut:
            return None
        except Exception as error:
            _forget_locals(error)
            if self._recipe.teacher.tensor_parallel:
                self._forget_teacher()
            raise

    def _forget_teacher(self) -> None:
        """Have it loaded anew for the next shard: the processes over which it is split may be out of step."""
        for name in ("teacher", "encoder", "layout", "decoder"):
            self.__dict__.pop(name, None)
        self._stream = None
        gc.collect()  # a model may hold itself in a circle, and two have no room on a GPU

    def _shard(self, output: Path, task: Task) -> ShardRecord:
        started = time.perf_counter()
        self.write_teacher_head(output)
        file = output / task.file
        stream, self._stream = self._stream_for(task), None
        totals = _Totals(self.layout)
        pipeline = self._pipeline()
        generator = self._generator(pipeline)
        with (
            closing(self._blocks(stream, pipeline, generator)) as blocks,
            atomic_file(file, writer=secrets.token_hex(4)) as sink,
            ShardWriter(
                sink,
                layout=self.layout,
                profile=self._recipe.output.profile,
                metadata={
                    "logit_dataset.schema": SCHEMA_VERSION,
                    "logit_dataset.row_fingerprint": row_fingerprint(
                        self._sources.plan(self._recipe)
                    ),
                },
                seen=totals.add,
            ) as writer,
        ):
            for block in blocks:
                writer.write(block)
            writer.finish()
            # Before the file counts: what was read for it was what was hashed.
            self._watch.check_corpus(*stream.files_read)
            self._watch.check_teacher()
            if not totals.rows:
                if task.split == VALIDATION and stream.passed_over:
                    raise _NothingHeldOut
                raise ValueError(_nothing_in(self._recipe.corpus, stream))
        self._stream = stream
        return ShardRecord(
            file=task.file,
            sha256=file_sha256(file),
            bytes=file.stat().st_size,
            rows=totals.rows,
            tokens=totals.tokens,
            partition=task.partition,
            index=task.index,
            offset_before=task.start or {},
            offset_after=stream.offset,
            exhausted=stream.exhausted,
            sums=totals.sums,
            halved_batches=(generator or pipeline).halved_batches,
            seconds=round(time.perf_counter() - started, 3),
            environment=environment(self._device),
            completions=Completions(**generator.counts, prompts_too_long=stream.prompts_too_long)
            if generator
            else None,
            column_bytes=column_bytes(pq.read_metadata(file)),
            footer_sha256=footer_sha256(file),
            converted=dict(sorted(totals.converted.items())) or None,
            split=task.split if self._recipe.output.validation else None,
        )

    def _blocks(
        self, stream: SequenceStream, pipeline: Pipeline, generator: Generator | None
    ) -> Generates[Block | Callable[[], Block]]:
        """The blocks of the next shard, or what puts each in order, which is for the writer's thread."""
        if generator:
            yield from stream.shard_blocks(generator)
            return
        with closing(pipeline.windows(stream.shard_sequences())) as windows:
            for window in windows:
                yield window.block

    def _pipeline(self) -> Pipeline:
        batch_tokens = self._recipe.sequences.batch_tokens
        assert isinstance(batch_tokens, int)  # or `settle_batches` was not called
        return Pipeline(
            self.teacher,
            layout=self.layout,
            seed=self._recipe.output.seed,
            batch_tokens=batch_tokens,
            guard=self._guard,
            # What is written is counted while it is written.
            progress=(lambda _: None) if self.decoder else self._progress,
            notice=self._notice,
        )

    def _generator(self, pipeline: Pipeline) -> Generator | None:
        recipe = self._recipe.generation
        if recipe is None or self.decoder is None:
            return None
        return Generator(
            self.decoder,
            pipeline,
            layout=self.layout,
            is_greedy=recipe.temperature == 0,
            max_new_tokens=recipe.max_new_tokens,
            samples=recipe.samples,
            seed=recipe.seed,
            batch_tokens=recipe.batch_tokens,
            progress=self._progress,
            notice=self._notice,
        )

    def _stream_for(self, task: Task) -> SequenceStream:
        """The corpus from where the shard starts: as the shard before left it, or opened anew."""
        stream = self._stream
        if stream and (stream.partition, stream.offset) == (task.partition, task.start):
            return stream
        return SequenceStream(
            self._recipe,
            self._sources.corpus,
            self.encoder,
            task.partition,
            task.start,
            split=task.split,
            opening=self._watch.check_corpus_file,
            reach=self.teacher.reach,
            notice=self._notice,
        )


class _NothingHeldOut(Exception):
    """All documents of a partition are of the other split."""


class _Totals:
    """What a shard's record says of its rows."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.rows = self.tokens = 0
        self.sums = Sums()
        self.converted: Counter[str] = Counter()

    def add(self, block: Block) -> None:
        """Count the rows of one more block."""
        self.rows += len(block.sequences)
        self.tokens += len(block.distribution["logsumexp"])
        self.sums += _sums(block, self._layout)
        self.converted.update(note for s in block.sequences for note in s.notes)


def _forget_locals(error: BaseException) -> None:
    """Let go what the failed calls held, such as a teacher and its batches: an error may be kept until the build ends."""
    errors = [error]
    for one in errors:
        traceback.clear_frames(one.__traceback__)
        errors += [e for e in (one.__cause__, one.__context__) if e and e not in errors]


def _nothing_in(recipe: CorpusRecipe, stream: SequenceStream) -> str:
    """Why there is no row."""
    skipped, partition = stream.offset["skipped"], stream.part
    where = f"partition {partition} of the corpus" if partition else "the corpus"
    if stream.passed_over:
        return (
            f"{where} has no document for the split {stream.split} ({stream.passed_over} in the other split, {skipped} skipped); "
            "choose another output.validation or output.seed, or fewer output.partitions"
        )
    if stream.prompts_too_long:
        return (
            f"{where} has no prompt that leaves room for generation.max_new_tokens ({stream.prompts_too_long} too long); "
            "choose a larger sequences.max_length, or a smaller max_new_tokens"
        )
    if stream.is_of_prompts:
        return (
            f"{where} has no prompt ({skipped} null, empty or blank); check its column in [corpus]"
        )
    if recipe.messages_column:
        return (
            f"{where} has no chat to learn from ({skipped} without an answer, with a null one, or with the first one beyond sequences.max_length); "
            "check corpus.messages_column"
        )
    return f"{where} has no text ({counted(skipped, 'null, empty or blank document')}); check corpus.text_column"


def _slow_head(recipe: Recipe, teacher: Teacher) -> str:
    """What it costs that a teacher's head cannot run alone."""
    max_length = recipe.sequences.max_length
    size = max_length * teacher.vocab_size * teacher.dtype.itemsize
    return (
        f"{type(teacher.model).__name__} cannot be split into a body and a head: each sequence runs through the whole model by itself, whatever batch_tokens is, and its logits take"
        f" {size / 1e9:,.2g} GB at sequences.max_length = {max_length:,}"
    )


def _sums(block: Block, layout: Layout) -> Sums:
    """By numpy, beside the teacher: see `capture.windows`."""
    columns = {name: values.numpy() for name, values in block.distribution.items()}
    nll = -columns["target_logprob"].astype(np.float64)
    logprobs = columns.get("topk_logprobs", columns.get("logprobs"))
    assert logprobs is not None
    rows = max(1, SUM_VALUES // logprobs.shape[1])
    parts = (logprobs[i : i + rows] for i in range(0, len(logprobs), rows))
    return Sums(
        entropy=float(columns["entropy"].sum(dtype=np.float64)),
        topk_mass=sum(float(np.exp(part, dtype=np.float64).sum()) for part in parts),
        target_nll=float(np.nansum(nll)),
        targets=int(np.count_nonzero(~np.isnan(nll))),
        completion_tokens=sum(sum(s.completion_mask or ()) for s in block.sequences)
        if layout.completion_mask
        else None,
        kept=len(logprobs) if layout.completions_only else None,
    )
