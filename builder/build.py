"""The resumable loop: recipe → corpus → sequences → teacher → distribution → shards → manifest.

In:   a recipe and a directory.
Out:  in that directory `data/*.parquet`, `README.md` (the dataset card) and, last of all, `manifest.json`.

How:  shard i of a partition is a pure function of the recipe, the sources and the corpus position after shard i − 1;
      nothing else is carried over. A shard is renamed into place before its record is written to `.build/records/`, and
      one without a record does not exist. So a build that is killed anywhere goes on at the last recorded position, and its files
      are the same bytes. When the manifest stands, `.build/` is removed.
"""

import itertools
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.card import write_card
from builder.chats import ChatTemplate
from builder.corpus import Position
from builder.decoding import Decoder
from builder.generation import Generator
from builder.manifest import (
    FILE_NAME,
    Completions,
    ShardRecord,
    Sums,
    environment,
    make_manifest,
    read_manifest,
    write_json,
)
from builder.pipeline import Notice, Pipeline, Progress
from builder.recipe import (
    CorpusRecipe,
    Recipe,
    deciding,
    differences,
    row_fingerprint,
    without_description,
)
from builder.schema import SCHEMA_VERSION, Layout
from builder.sequences import Encoder
from builder.shards import MAX_ROW_VALUES, Block, ShardWriter, atomic_file, file_sha256
from builder.sources import (
    CorpusSource,
    KnownSources,
    TeacherSource,
    read_chat_template,
    resolve_corpus,
    resolve_teacher,
    template_provenance,
)
from builder.state import BuildState
from builder.stream import SequenceStream, make_encoder
from builder.teacher import Teacher, load_teacher

SUM_VALUES = 2**22
"""Log-probabilities that are summed at once: 32 MB in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """How a call of `build` ended."""

    status: str
    """`complete`, `stopped early`, or `already complete` (and what was done nevertheless)."""
    shards_built: int
    manifest: dict[str, Any] | None


def build(
    recipe: Recipe,
    base: Path,
    output: Path,
    *,
    device: str = "cpu",
    max_shards: int | None = None,
    progress: Progress = lambda _: None,
    found: Progress = lambda _: None,
    notice: Notice = lambda message: print(message, file=sys.stderr),
) -> BuildResult:
    """Build a dataset, or go on with it.

    Args:
        recipe: what to build.
        base: directory at which the recipe's relative paths start.
        output: directory of the dataset.
        device: a torch device.
        max_shards: stop after this many new shards.
        progress: told of captured tokens.
        found: told of the tokens of shards that an earlier run has finished.
        notice: told, in a line, of what the user should know (a damaged shard that is built again).

    Raises:
        ValueError: the recipe, its sources, or what stands in the directory make the build impossible.
        OSError: the disk is full or cannot be written.
    """
    if (output / FILE_NAME).exists():
        return _already_complete(recipe, base, output)
    state = BuildState(output)
    with state.locked():
        if (output / FILE_NAME).exists():
            return _already_complete(recipe, base, output)
        known = state.known_sources()
        corpus_source = resolve_corpus(recipe.corpus, base, known)
        teacher_source = resolve_teacher(recipe.teacher, base, known)
        template = read_chat_template(recipe.sequences, base)
        plan = {
            "recipe": recipe.published(),
            "corpus": corpus_source.provenance,
            "teacher": teacher_source.provenance | template_provenance(template),
        }
        state.settle("plan", deciding(plan))
        state.remember(known)
        work = _ShardBuilder(
            recipe,
            plan,
            corpus_source,
            teacher_source,
            template,
            device=device,
            progress=progress,
            notice=notice,
        )
        built, records = 0, []
        for partition in range(recipe.output.partitions):
            position: Position | None = None
            for index in itertools.count():
                record = state.intact_record(partition, index, notice)
                if record is None:
                    if built == max_shards:
                        return BuildResult(
                            status="stopped early", shards_built=built, manifest=None
                        )
                    state.settle("teacher", work.teacher_provenance())
                    record = work.shard(output, partition, index, position)
                    state.add(record)
                    built += 1
                else:
                    found(record.tokens)
                records.append(record)
                position = record.position_after
                if record.exhausted:
                    break
        manifest = make_manifest(plan, state.read("teacher"), records)
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
        state.remove()
        return BuildResult(status="complete", shards_built=built, manifest=manifest)


def _already_complete(recipe: Recipe, base: Path, output: Path) -> BuildResult:
    manifest = read_manifest(output)
    published = recipe.published()
    for section in ("corpus", "teacher"):  # the branch that was resolved then, or its commit
        if published[section]["revision"] == manifest[section].get("commit"):
            published[section]["revision"] = manifest["recipe"][section]["revision"]
    # What a schema before 1.2 had no name for was off.
    output_then = {"completions_only": False, **manifest["recipe"]["output"]}
    recorded = {**manifest["recipe"], "output": output_then}
    old, new = (without_description(values) for values in (recorded, published))
    changes = differences(old, new)
    with suppress(ValueError):  # as with files of a corpus
        template = template_provenance(read_chat_template(recipe.sequences, base))
        built = {key: manifest["teacher"].get(key) for key in template}
        changes += differences(built, template, "teacher")
    if not changes and recipe.corpus.files:
        with suppress(ValueError):  # files that are gone do not make the dataset less finished
            source = resolve_corpus(recipe.corpus, base, KnownSources())
            changes = differences(manifest["corpus"], source.provenance, "corpus")
    if changes:
        raise ValueError(
            f"{output} holds a finished dataset of another recipe ({'; '.join(changes)}); choose another directory"
        )
    status = "already complete"
    if differences(recorded, published):
        status = "already complete, with a new description"
        manifest["recipe"] = published
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
    shutil.rmtree(output / ".build", ignore_errors=True)
    return BuildResult(status=status, shards_built=0, manifest=manifest)


class _ShardBuilder:
    """Computes shards. Holds what is worth keeping between them: the teacher, and the open corpus."""

    def __init__(
        self,
        recipe: Recipe,
        plan: dict[str, Any],
        corpus_source: CorpusSource,
        teacher_source: TeacherSource,
        template: str | None,
        *,
        device: str,
        progress: Progress,
        notice: Notice,
    ) -> None:
        self._recipe = recipe
        self._corpus_source = corpus_source
        self._teacher_source = teacher_source
        self._template = template
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
        recipe, source = self._recipe.teacher, self._teacher_source
        teacher = load_teacher(
            source.location,
            commit=source.commit,
            tokenizer=source.tokenizer,
            dtype=recipe.dtype,
            attention=recipe.attention,
            device=self._device,
            trust_remote_code=recipe.trust_remote_code,
        )
        _check_fit(self._recipe, teacher)
        return teacher

    @cached_property
    def encoder(self) -> Encoder:
        """The way from documents to sequences of the recipe and the teacher's tokenizer."""
        return make_encoder(self._recipe, self.teacher.tokenizer, self._template)

    @cached_property
    def layout(self) -> Layout:
        """What the rows hold."""
        return Layout.of(self._recipe.published(), self.teacher.provenance())

    @cached_property
    def decoder(self) -> Decoder | None:
        """The teacher as it writes; None where it does not."""
        recipe = self._recipe.generation
        if recipe is None:
            return None
        return Decoder(self.teacher, temperature=recipe.temperature, top_p=recipe.top_p)

    def teacher_provenance(self) -> dict[str, Any]:
        """What the loaded teacher is, what is put around its sequences, and where those end that it writes."""
        special: dict[str, Any] = {
            "prefix_ids": self.encoder.prefix,
            "suffix_ids": self.encoder.suffix,
        }
        if self.decoder:
            special["generation_eos_ids"] = sorted(self.decoder.eos_ids)
        chats = self.encoder.chats
        template = chats.source if isinstance(chats, ChatTemplate) else None
        return self.teacher.provenance() | special | template_provenance(template)

    def shard(
        self, output: Path, partition: int, index: int, start: Position | None
    ) -> ShardRecord:
        """Compute one shard and write its file."""
        started = time.perf_counter()
        name = f"data/train-{partition:03d}-{index:05d}.parquet"
        if (
            self._stream is None
            or self._stream.partition != partition
            or self._stream.position != start
        ):
            self._stream = SequenceStream(
                self._recipe,
                self._corpus_source,
                self.encoder,
                partition,
                start,
                notice=self._notice,
            )
        stream, rows, tokens, sums = self._stream, 0, 0, Sums()
        pipeline = self._pipeline()
        generator = self._generator(pipeline)
        if generator:
            blocks = stream.shard_blocks(generator)
        else:
            blocks = pipeline.blocks(stream.shard_sequences())
        with (
            atomic_file(output / name) as sink,
            ShardWriter(
                sink,
                layout=self.layout,
                profile=self._recipe.output.profile,
                metadata=self._metadata,
            ) as writer,
        ):
            for block in blocks:
                writer.write(block)
                rows += len(block.sequences)
                tokens += len(block.distribution["logsumexp"])
                sums += _sums(block, self.layout)
            if not rows:
                raise ValueError(_nothing_in(self._recipe.corpus, stream))
        return ShardRecord(
            file=name,
            sha256=file_sha256(output / name),
            bytes=(output / name).stat().st_size,
            rows=rows,
            tokens=tokens,
            partition=partition,
            index=index,
            position_after=stream.position,
            exhausted=stream.exhausted,
            sums=sums,
            halved_batches=(generator or pipeline).halved_batches,
            seconds=round(time.perf_counter() - started, 3),
            environment=environment(self._device),
            completions=Completions(**generator.counts, prompts_too_long=stream.prompts_too_long)
            if generator
            else None,
        )

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            self.teacher,
            layout=self.layout,
            seed=self._recipe.output.seed,
            batch_tokens=self._recipe.sequences.batch_tokens,
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


def _nothing_in(recipe: CorpusRecipe, stream: SequenceStream) -> str:
    """Why there is no row."""
    skipped, partition = stream.position["skipped"], stream.partition
    where = f"partition {partition} of the corpus" if partition else "the corpus"
    if stream.prompts_too_long:
        return (
            f"{where} has no prompt that leaves room for generation.max_new_tokens ({stream.prompts_too_long} are too long); "
            "choose a larger sequences.max_length"
        )
    if stream.is_of_prompts:
        return f"{where} has no prompt ({skipped} are null, empty or blank); check its column in [corpus]"
    if recipe.messages_column:
        return (
            f"{where} has no chat to learn from ({skipped} without an answer, or with the first one beyond sequences.max_length); "
            "check corpus.messages_column"
        )
    return (
        f"{where} has no text ({skipped} null, empty or blank documents); check corpus.text_column"
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
    widest = Layout.of(recipe.published(), teacher.provenance()).widest
    if max_length * widest > MAX_ROW_VALUES:
        raise ValueError(
            f"a row of sequences.max_length = {max_length} tokens would hold {max_length * widest:,} values in one column, more "
            f"than the {MAX_ROW_VALUES:,} that Arrow's lists can; choose a smaller max_length or top_k"
        )


def _sums(block: Block, layout: Layout) -> Sums:
    distribution = block.distribution
    nll = -distribution["target_logprob"].double()
    logprobs = distribution.get("topk_logprobs", distribution.get("logprobs"))
    assert logprobs is not None
    rows = max(1, SUM_VALUES // logprobs.shape[1])
    return Sums(
        entropy=float(distribution["entropy"].double().sum()),
        topk_mass=sum(float(part.double().exp().sum()) for part in logprobs.split(rows)),
        target_nll=float(nll.nansum()),
        targets=int((~nll.isnan()).sum()),
        completion_tokens=sum(sum(s.completion_mask or ()) for s in block.sequences)
        if layout.completion_mask
        else None,
        kept=len(logprobs) if layout.completions_only else None,
    )
