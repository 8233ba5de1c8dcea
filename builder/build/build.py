"""The resumable loop: recipe → corpus → sequences → teacher → distribution → shards → manifest.

In:   a recipe and a directory.
Out:  in that directory `data/*.parquet`, `README.md` (the dataset card) and, last of all, `manifest.json`.

How:  shard i of a partition is a pure function of the recipe, the sources and the corpus offset after shard i − 1;
      nothing else is carried over. A shard is renamed into place before its record is written to `.build/records/`, and
      one without a record does not exist. So a build that is killed anywhere resumes at the last recorded offset, and its files
      are the same bytes. When the manifest stands, `.build/` is removed.
"""

import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.build.chains import Chains
from builder.build.finished import changes_since, described_anew, published_as
from builder.build.outbox import Outbox
from builder.build.state import BuildState
from builder.build.task import Computed, Pool
from builder.build.worker import Worker
from builder.capture.pipeline import Notice, Progress
from builder.card.card import keep_curves, write_card
from builder.card.licences import licences
from builder.dataset.head_file import head_record
from builder.dataset.identity import deciding
from builder.dataset.manifest import (
    FILE_NAME,
    ShardRecord,
    make_manifest,
    read_manifest,
    write_json,
)
from builder.dataset.printable import counted
from builder.recipe.recipe import Recipe
from builder.sources.columns import settle_columns
from builder.sources.known import KnownSources
from builder.sources.resolve import Sources, resolve
from logit_dataset.schema import HEAD_FILE, SCHEMA_VERSION

Planned = Callable[[dict[str, Any], Sources, bool], None]


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
    pool: Pool | None = None,
    outbox: Outbox | None = None,
    planned: Planned = lambda *_: None,
    progress: Progress = lambda _: None,
    found: Progress = lambda _: None,
    notice: Notice = lambda message: print(message, file=sys.stderr),
    told: Notice = lambda _: None,
) -> BuildResult:
    """Build a dataset, or resume an unfinished build.

    Args:
        recipe: what to build.
        base: directory from which the recipe's relative paths start.
        output: directory of the dataset.
        device: a torch device, if there is no pool.
        max_shards: stop after this many new shards.
        pool: several workers, on this machine or a cluster; None computes in this process.
        outbox: uploads finished shards; uploaded shards need not be in the directory.
        planned: called before anything is computed, with the plan, its sources, and whether no shard is finished yet. An exception that
            it raises ends the build.
        progress: called with numbers of captured tokens.
        found: called with the number of tokens in shards of an earlier run.
        notice: called with one line that the user should know, such as a damaged shard that is rebuilt.
        told: called with a description of work that takes time and yields no tokens, and with "" after it.

    Raises:
        ValueError: the recipe, its sources, or the contents of the directory make the build impossible.
        OSError: the disk is full or not writable.
    """
    if (output / FILE_NAME).exists():
        return _already_complete(recipe, base, output)
    if pool is not None:
        check_pool(pool, recipe)
    state = BuildState(output)
    with state.locked():
        if (output / FILE_NAME).exists():
            return _already_complete(recipe, base, output)
        known = state.known_sources()
        state.check_repository(outbox.repo.id if outbox else None)
        if outbox:
            outbox.open(output, state, known)
        sources = resolve(recipe, base, known)
        recipe = _as_begun(recipe, state)
        recipe, found_columns = settle_columns(recipe, sources.corpus, known)
        for line in found_columns:
            notice(line)
        plan = _settle_plan(recipe, sources, state)
        state.remember(known)
        state.refuse_strangers()
        state.sweep()
        worker = Worker(
            recipe,
            sources,
            watch=sources.watch(known.seen),
            device=device,
            progress=progress,
            notice=notice,
            told=told,
        )
        if pool is not None:
            from builder.build import workers
            from builder.build.actor import make_order
        if recipe.sequences.batch_tokens == "auto":  # and no shard is there yet
            if pool is None:
                recipe = worker.settle_batches()
            else:
                recipe = workers.settle_batches(
                    pool, make_order(recipe, sources, output, known), notice=notice
                )
            plan = _settle_plan(recipe, sources, state)
        planned(plan, sources, not state.has_shards())
        chains = Chains(state, recipe, outbox, max_shards=max_shards, found=found, notice=notice)
        if pool is None:
            computed = _compute_here(worker, output, chains)
        else:
            order = make_order(recipe, sources, output, known)
            computed = workers.compute(pool, order, chains, progress=progress, notice=notice)
        with closing(computed):
            for task, outcome in computed:
                chains.take(task, outcome)
        if outbox:
            outbox.drain()
        if chains.failure is not None:
            raise chains.failure
        if chains.stopped:
            return BuildResult(status="stopped early", shards_built=chains.built, manifest=None)
        records = chains.records()
        _check_sources(recipe, sources, known, records, state, outbox, notice)
        state.sweep()
        state.sweep_strays(records)
        manifest = make_manifest(plan, state.read("teacher"), records)
        if not chains.built and not (output / HEAD_FILE).exists():  # all shards came from elsewhere
            worker.write_teacher_head(output)
        manifest |= head_record(output, licences(manifest)["teacher"])
        if outbox and not all((output / record.file).exists() for record in records):
            keep_curves(output, manifest, outbox.curves(records))
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
        state.remove()
        return BuildResult(status="complete", shards_built=chains.built, manifest=manifest)


def _as_begun(recipe: Recipe, state: BuildState) -> Recipe:
    """The recipe with what it leaves open and an earlier run of this build has settled, which older code may have been."""
    if plan := state.settled("plan"):
        recipe = recipe.with_head_dtype(plan["recipe"]["teacher"])
        recipe = recipe.with_batch_tokens(plan["recipe"]["sequences"])
    return recipe


def _settle_plan(recipe: Recipe, sources: Sources, state: BuildState) -> dict[str, Any]:
    """The plan of a build, written down.

    Raises:
        ValueError: there are shards of another one.
    """
    plan = sources.plan(recipe)
    state.settle("plan", {**deciding(plan), "schema_version": SCHEMA_VERSION})
    return plan


def _check_sources(
    recipe: Recipe,
    sources: Sources,
    known: KnownSources,
    records: list[ShardRecord],
    state: BuildState,
    outbox: Outbox | None,
    notice: Notice,
) -> None:
    """Read all local files again, to see that they are what the manifest will say.

    Shards that may be of other content than that, because a file was changed without a trace, are deleted with their records: so what
    resumes cannot mix them with others.

    Raises:
        SourceChangedError: a file is another one.
    """
    look = sources.watch(known.seen).read_again(notice)
    if look.error is None:
        return
    unknown, num_files = set(look.unknown_corpus), len(sources.corpus.files)
    doubtful = [
        record
        for record in records
        if look.is_teacher_unknown or unknown & _files_read(record, recipe, num_files)
    ]
    if doubtful:
        if outbox:
            outbox.discard(doubtful)
        state.discard(doubtful)
        notice(
            f"deleting {counted(len(doubtful), 'finished shard')}, because a source changed at an unknown time: its size and time of change are the same"
        )
    for path in (*sources.corpus.files, *sources.teacher.files):
        known.forget(path)
    state.remember(known)
    raise look.error


def _files_read(record: ShardRecord, recipe: Recipe, num_files: int) -> set[int]:
    """The numbers of the corpus files that a shard may have been read from."""
    partitions = recipe.output.partitions
    part = record.partition % partitions
    first, end = (num_files * p // partitions for p in (part, part + 1))
    before = record.offset_before or {}
    return set(range(before.get("file", first), min(record.offset_after["file"] + 1, end)))


def _compute_here(worker: Worker, output: Path, chains: Chains) -> Generator[Computed]:
    """Compute shards in this process, one after the other."""
    if task := chains.next_task():
        chains.loaded(worker.prepare(task))
    while task:
        outcome: ShardRecord | Exception | None
        try:
            outcome = worker.shard(output, task)
        except Exception as error:
            outcome = error
        yield task, outcome
        task = chains.next_task()


def check_pool(pool: Pool, recipe: Recipe) -> None:
    """Check that a pool's workers each have a partition, and that Ray is installed.

    Raises:
        ValueError: there are fewer partitions than workers, or Ray is missing.
    """
    try:
        import builder.build.workers  # noqa: F401
    except ImportError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "several workers need Ray, which is not installed; run: pip install 'ray>=2.60', or leave out --workers, "
            "--ray-address and --gpus-per-worker"
        ) from None
    if pool.workers > (partitions := recipe.output.partitions):
        raise ValueError(
            f"--workers is {pool.workers}, but output.partitions is {partitions}, and each partition is built by one worker; use --workers {partitions}, or build with more partitions in another directory"
        )


def _already_complete(recipe: Recipe, base: Path, output: Path) -> BuildResult:
    manifest = read_manifest(output)
    if changes := changes_since(manifest, recipe, base):
        raise ValueError(
            f"{output} holds a finished dataset of another recipe ({'; '.join(changes)}); choose another directory"
        )
    status = "already complete"
    if described_anew(manifest, recipe):
        status = "already complete, with a new description"
        manifest["recipe"] = published_as(manifest, recipe)
        if "teacher_head" in manifest:
            manifest["teacher_head"]["license"] = licences(manifest)["teacher"]
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
    shutil.rmtree(output / ".build", ignore_errors=True)
    return BuildResult(status=status, shards_built=0, manifest=manifest)
