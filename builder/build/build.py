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
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.build.outbox import Outbox
from builder.build.state import DISK_FULL, BuildState
from builder.build.worker import Computed, Pool, Task, Worker
from builder.capture.pipeline import Notice, Progress
from builder.card.card import keep_curves, write_card
from builder.card.licences import licences
from builder.dataset.head_file import head_record
from builder.dataset.identity import (
    deciding,
    differences,
    teacher_differences,
    without_description,
)
from builder.dataset.manifest import (
    FILE_NAME,
    ShardRecord,
    make_manifest,
    read_manifest,
    write_json,
)
from builder.recipe.recipe import Recipe
from builder.sources.changes import SourceChangedError
from builder.sources.columns import settle_columns
from builder.sources.known import KnownSources
from builder.sources.resolve import (
    Sources,
    read_chat_template,
    resolve,
    resolve_corpus,
    template_provenance,
)
from logit_dataset.schema import HEAD_FILE, SCHEMA_VERSION, TRAIN, VALIDATION

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
    """Build a dataset, or resume it.

    Args:
        recipe: what to build.
        base: directory at which the recipe's relative paths start.
        output: directory of the dataset.
        device: a torch device, where there is no pool.
        max_shards: stop after this many new shards.
        pool: several workers, on this machine or a cluster; None computes in this process.
        outbox: sends finished shards away; those that have arrived need not be in the directory.
        planned: told of the plan and its sources, and whether no shard is finished yet, before anything is computed; what it
            raises ends the build.
        progress: told of captured tokens.
        found: told of the tokens of shards that an earlier run has finished.
        notice: told, in a line, of what the user should know (a damaged shard that is built again).
        told: what is done at the moment, where that takes time and yields no tokens; "" afterwards.

    Raises:
        ValueError: the recipe, its sources, or what stands in the directory make the build impossible.
        OSError: the disk is full or cannot be written.
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
        chains = _Chains(state, recipe, outbox, max_shards=max_shards, found=found, notice=notice)
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


class _Chains:
    """Which shards are there, and which can be computed next.

    Partitions are independent of each other. The shards of one are a chain: each starts where the one before ended.
    """

    def __init__(
        self,
        state: BuildState,
        recipe: Recipe,
        outbox: Outbox | None,
        *,
        max_shards: int | None,
        found: Progress,
        notice: Notice,
    ) -> None:
        self._state, self._outbox, self._max_shards = state, outbox, max_shards
        self._found, self._notice = found, notice
        partitions = range(recipe.output.partitions)
        behind = {TRAIN: 0, VALIDATION: len(partitions)}
        # The hold-out comes first: that there is nothing in it is better known before the rest is computed.
        self._waiting = deque(
            Task(partition=behind[split] + p, index=0, start=None, split=split)
            for split in reversed(recipe.splits)
            for p in partitions
        )
        self._records: list[list[ShardRecord]] = [[] for _ in self._waiting]
        self._unfinished = {task.partition for task in self._waiting}
        self._share = recipe.output.validation
        self._given_out = self._under_way = self.built = 0
        self._teacher: dict[str, Any] = {}
        self.stopped = False
        """Whether a shard was not given out because there were to be no more than `max_shards`."""
        self.failure: Exception | None = None
        """The first one; the user is told of the others."""

    def next_task(self) -> Task | None:
        """A shard to compute, of the partition that was worked on last; None if all others wait for one under way."""
        outbox = self._outbox
        while self._waiting and not self.stopped:
            task = self._waiting.popleft()
            record = outbox.held(task.partition, task.index) if outbox else None
            if record is not None:
                _check_follows(record, task)
                self._found(record.tokens)
                self._follow(record)
            elif record := self._state.intact_record(task.partition, task.index, self._notice):
                _check_follows(record, task)
                self._check_next(record)
                self._found(record.tokens)
                if outbox:
                    outbox.put(record)
                self._follow(record)
            elif self._given_out == self._max_shards:
                self.stopped = True
            elif outbox and not outbox.room(self._under_way):
                self._waiting.appendleft(task)
                return None
            else:
                self._given_out += 1
                self._under_way += 1
                return task
        return None

    def loaded(self, teacher: dict[str, Any]) -> None:
        """Hear what the teacher of a worker turned out to be.

        Raises:
            ValueError: another worker's is another one, or shards were built with another one.
        """
        if self._teacher and (changes := teacher_differences(self._teacher, teacher)):
            raise ValueError(
                f"two workers have loaded different teachers ({'; '.join(changes)}); install the same versions on all machines"
            )
        self._teacher = teacher
        self._state.settle("teacher", teacher)

    def take(self, task: Task, outcome: ShardRecord | Exception | None) -> None:
        """Make a computed shard count; where it failed, its partition is left and the others continue.

        Raises:
            ValueError: it does not fit those that are there, or no document of the corpus is held out.
            SourceChangedError, OSError: a file has changed or the disk is full, which no other partition would survive either.
        """
        self._under_way -= 1
        if isinstance(outcome, ShardRecord):
            self._check_next(outcome)
            self._state.add(outcome)
            self.built += 1
            if self._outbox:
                self._outbox.put(outcome)
            self._follow(outcome)
            return
        if outcome is None:
            self._given_out -= 1  # no shard, so that it counts for none of `max_shards`, whenever it is found again
            self._unfinished.remove(task.partition)
            self._check_held_out()
            return
        if isinstance(outcome, OSError) and outcome.errno in DISK_FULL:
            raise outcome
        if isinstance(outcome, SourceChangedError):
            raise outcome
        if self.failure is None:
            self.failure = outcome
        self._unfinished.remove(task.partition)
        if self._unfinished:
            self._notice(f"{task.file} failed ({outcome}); the other partitions continue")
        elif outcome is not self.failure:
            self._notice(f"{task.file} failed ({outcome})")

    def records(self) -> list[ShardRecord]:
        """The records of all shards, in order."""
        return [record for chain in self._records for record in chain]

    def _check_held_out(self) -> None:
        """Refuse a corpus that is too small for the share."""
        first = len(self._records) // 2
        if not any(self._records[first:]) and all(p < first for p in self._unfinished):
            raise ValueError(
                f"output.validation = {self._share:g} holds out no document of the corpus, which is too small for it; choose a larger share "
                "or another output.seed, or leave validation out"
            )

    def _check_next(self, record: ShardRecord) -> None:
        """See that a shard ends where the next one starts, if that is there: before it counts, and before it is sent."""
        place = record.partition, record.index + 1
        following = self._outbox.held(*place) if self._outbox else None
        if following := following or self._state.record(*place):
            end = None if record.exhausted else record.offset_after
            _check_follows(following, Task(partition=place[0], index=place[1], start=end))

    def _follow(self, record: ShardRecord) -> None:
        self._records[record.partition].append(record)
        if record.exhausted:
            self._unfinished.remove(record.partition)
            return
        self._waiting.appendleft(
            Task(
                partition=record.partition,
                index=record.index + 1,
                start=record.offset_after,
                split=record.split or TRAIN,
            )
        )


def _check_follows(record: ShardRecord, task: Task) -> None:
    """Refuses a finished shard behind one that was built again and ends elsewhere than before: documents would be lost, or twice there."""
    if record.offset_before not in (None, task.start or {}):
        raise ValueError(
            f"{record.file} starts elsewhere in the corpus than the shard before it ends, which was built again (on other hardware, "
            "or with other libraries?); start anew in another directory, and without the shards of this build's branch"
        )


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
            f"{len(doubtful)} finished shards are deleted, for it is not known when it changed: its size and time of change are the same"
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


def _compute_here(worker: Worker, output: Path, chains: _Chains) -> Generator[Computed]:
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
    """See that so many workers can do something, and that there is what runs them.

    Raises:
        ValueError: there are fewer partitions, or no Ray.
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
            f"--workers is {pool.workers}, but output.partitions is {partitions}, and the shards of a partition are built one "
            f"after the other; use --workers {partitions}, or begin a dataset with more partitions in another directory"
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
        manifest["recipe"] = _published_as(manifest, recipe)
        if "teacher_head" in manifest:
            manifest["teacher_head"]["license"] = licences(manifest)["teacher"]
        write_card(output, manifest)
        write_json(output / FILE_NAME, manifest)
    shutil.rmtree(output / ".build", ignore_errors=True)
    return BuildResult(status=status, shards_built=0, manifest=manifest)


def changes_since(manifest: dict[str, Any], recipe: Recipe, base: Path) -> list[str]:
    """In what the data of a finished dataset differ from what a recipe asks for, one line for each field."""
    published = _published_as(manifest, recipe)
    old, new = (without_description(values) for values in (_recorded(manifest), published))
    changes = differences(old, new)
    with suppress(ValueError):  # as with files of a corpus
        template = template_provenance(read_chat_template(recipe.sequences, base))
        built = {key: manifest["teacher"].get(key) for key in template}
        changes += differences(built, template, "teacher")
    if not changes and recipe.corpus.files:
        with suppress(ValueError):  # files that are gone do not make the dataset less finished
            source = resolve_corpus(recipe.corpus, base, KnownSources())
            changes = differences(manifest["corpus"], source.provenance, "corpus")
    return changes


def described_anew(manifest: dict[str, Any], recipe: Recipe) -> list[str]:
    """In what a recipe that asks for the data of a finished dataset differs from that one's, one line for each field."""
    return differences(_recorded(manifest), _published_as(manifest, recipe))


def _recorded(manifest: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a manifest; what a schema before 1.2 had no name for was off."""
    output = {"completions_only": False, **manifest["recipe"]["output"]}
    return {**manifest["recipe"], "output": output}


def _published_as(manifest: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values, with what was resolved then: attention, columns, and the branch where it names its commit."""
    attention = manifest["recipe"]["teacher"].get("attention", "sdpa")
    recipe = recipe.with_columns(manifest["recipe"]["corpus"])
    recipe = recipe.with_head_dtype(manifest["recipe"]["teacher"])
    recipe = recipe.with_batch_tokens(manifest["recipe"]["sequences"])
    published = recipe.published(attention=attention)
    for section in ("corpus", "teacher"):
        if published[section]["revision"] == manifest[section].get("commit"):
            published[section]["revision"] = manifest["recipe"][section]["revision"]
    return published
