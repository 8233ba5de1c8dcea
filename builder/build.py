"""The resumable loop: recipe → corpus → sequences → teacher → distribution → shards → manifest.

In:   a recipe and a directory.
Out:  in that directory `data/*.parquet`, `README.md` (the dataset card) and, last of all, `manifest.json`.

How:  shard i of a partition is a pure function of the recipe, the sources and the corpus position after shard i − 1;
      nothing else is carried over. A shard is renamed into place before its record is written to `.build/records/`, and
      one without a record does not exist. So a build that is killed anywhere goes on at the last recorded position, and its files
      are the same bytes. When the manifest stands, `.build/` is removed.
"""

import shutil
import sys
from collections import deque
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.card import write_card
from builder.manifest import FILE_NAME, ShardRecord, make_manifest, read_manifest, write_json
from builder.pipeline import Notice, Progress
from builder.recipe import Recipe, deciding, differences, without_description
from builder.sources import KnownSources, resolve_corpus, resolve_teacher
from builder.state import DISK_FULL, BuildState
from builder.worker import Computed, Pool, Task, Worker


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
    progress: Progress = lambda _: None,
    found: Progress = lambda _: None,
    notice: Notice = lambda message: print(message, file=sys.stderr),
) -> BuildResult:
    """Build a dataset, or go on with it.

    Args:
        recipe: what to build.
        base: directory at which the recipe's relative paths start.
        output: directory of the dataset.
        device: a torch device; with a pool `auto`, `cpu` or `cuda`, which is settled where the workers are.
        max_shards: stop after this many new shards.
        pool: several workers, on this machine or a cluster; None computes in this process.
        progress: told of captured tokens.
        found: told of the tokens of shards that an earlier run has finished.
        notice: told, in a line, of what the user should know (a damaged shard that is built again).

    Raises:
        ValueError: the recipe, its sources, or what stands in the directory make the build impossible.
        OSError: the disk is full or cannot be written.
    """
    if (output / FILE_NAME).exists():
        return _already_complete(recipe, base, output)
    if pool is not None:
        _need_ray()
    state = BuildState(output)
    with state.locked():
        if (output / FILE_NAME).exists():
            return _already_complete(recipe, base, output)
        known = state.known_sources()
        corpus_source = resolve_corpus(recipe.corpus, base, known)
        teacher_source = resolve_teacher(recipe.teacher, base, known)
        plan = {
            "recipe": recipe.published(),
            "corpus": corpus_source.provenance,
            "teacher": teacher_source.provenance,
        }
        state.settle("plan", deciding(plan))
        state.remember(known)
        state.sweep()
        chains = _Chains(state, recipe, max_shards=max_shards, found=found, notice=notice)
        sources = corpus_source, teacher_source
        if pool is None:
            worker = Worker(recipe, plan, *sources, device=device, progress=progress, notice=notice)
            computed = _compute_here(worker, output, chains)
        else:
            from builder import workers

            order = workers.make_order(recipe, plan, *sources, output)
            computed = workers.compute(
                pool, order, chains, device=device, progress=progress, notice=notice
            )
        with closing(computed):
            for task, outcome in computed:
                chains.take(task, outcome)
        if chains.failure is not None:
            raise chains.failure
        if chains.stopped:
            return BuildResult(status="stopped early", shards_built=chains.built, manifest=None)
        state.sweep()
        manifest = make_manifest(plan, state.read("teacher"), chains.records())
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
        state.remove()
        return BuildResult(status="complete", shards_built=chains.built, manifest=manifest)


class _Chains:
    """Which shards are there, and which can be computed next.

    Partitions are independent of each other. The shards of one are a chain: each starts where the one before ended.
    """

    def __init__(
        self,
        state: BuildState,
        recipe: Recipe,
        *,
        max_shards: int | None,
        found: Progress,
        notice: Notice,
    ) -> None:
        self._state, self._max_shards = state, max_shards
        self._found, self._notice = found, notice
        partitions = range(recipe.output.partitions)
        self._waiting = deque(Task(partition=p, index=0, start=None) for p in partitions)
        self._records: list[list[ShardRecord]] = [[] for _ in partitions]
        self._unfinished = set(partitions)
        self._given_out = self.built = 0
        self.stopped = False
        """Whether a shard was not given out because there were to be no more than `max_shards`."""
        self.failure: Exception | None = None
        """The last one; the user was told of those before."""

    def next_task(self) -> Task | None:
        """A shard to compute, of the partition that was worked on last; None if all others wait for one under way."""
        while self._waiting and not self.stopped:
            task = self._waiting.popleft()
            record = self._state.intact_record(task.partition, task.index, self._notice)
            if record is not None:
                self._found(record.tokens)
                self._follow(record)
            elif self._given_out == self._max_shards:
                self.stopped = True
            else:
                self._given_out += 1
                return task
        return None

    def loaded(self, teacher: dict[str, Any]) -> None:
        """Hear what the teacher of a worker turned out to be.

        Raises:
            ValueError: shards were built with another one.
        """
        self._state.settle("teacher", teacher)

    def take(self, task: Task, outcome: ShardRecord | Exception) -> None:
        """Make a computed shard count; where it failed, its partition is left and the others go on.

        Raises:
            OSError: the disk is full, which no other partition would survive either.
        """
        if isinstance(outcome, ShardRecord):
            self._state.add(outcome)
            self.built += 1
            self._follow(outcome)
            return
        if isinstance(outcome, OSError) and outcome.errno in DISK_FULL:
            raise outcome
        self.failure = outcome
        self._unfinished.remove(task.partition)
        if self._unfinished:
            self._notice(f"{task.file} failed ({outcome}); the other partitions go on")

    def records(self) -> list[ShardRecord]:
        """The records of all shards, in order."""
        return [record for chain in self._records for record in chain]

    def _follow(self, record: ShardRecord) -> None:
        self._records[record.partition].append(record)
        if record.exhausted:
            self._unfinished.remove(record.partition)
            return
        self._waiting.appendleft(
            Task(partition=record.partition, index=record.index + 1, start=record.position_after)
        )


def _compute_here(worker: Worker, output: Path, chains: _Chains) -> Generator[Computed]:
    """Compute shards in this process, one after the other."""
    if task := chains.next_task():
        chains.loaded(worker.prepare(task))
    while task:
        outcome: ShardRecord | Exception
        try:
            outcome = worker.shard(output, task)
        except Exception as error:
            outcome = error
        yield task, outcome
        task = chains.next_task()


def _need_ray() -> None:
    try:
        import builder.workers  # noqa: F401
    except ImportError as error:
        if error.name != "ray":
            raise
        raise ValueError(
            "several workers need Ray, which is not installed; run: pip install 'ray>=2.60', or leave out --workers, "
            "--ray-address and --gpus-per-worker"
        ) from None


def _already_complete(recipe: Recipe, base: Path, output: Path) -> BuildResult:
    manifest = read_manifest(output)
    published = recipe.published()
    for section in ("corpus", "teacher"):  # the branch that was resolved then, or its commit
        if published[section]["revision"] == manifest[section].get("commit"):
            published[section]["revision"] = manifest["recipe"][section]["revision"]
    old, new = (without_description(values) for values in (manifest["recipe"], published))
    changes = differences(old, new)
    if not changes and recipe.corpus.files:
        with suppress(ValueError):  # files that are gone do not make the dataset less finished
            source = resolve_corpus(recipe.corpus, base, KnownSources())
            changes = differences(manifest["corpus"], source.provenance, "corpus")
    if changes:
        raise ValueError(
            f"{output} holds a finished dataset of another recipe ({'; '.join(changes)}); choose another directory"
        )
    status = "already complete"
    if differences(manifest["recipe"], published):
        status = "already complete, with a new description"
        manifest["recipe"] = published
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
    shutil.rmtree(output / ".build", ignore_errors=True)
    return BuildResult(status=status, shards_built=0, manifest=manifest)
