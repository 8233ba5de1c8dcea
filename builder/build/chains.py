"""The shards that are there, on the disk or on the branch → those that can be computed next.

In:   the state of a build, the recipe, and each shard that was computed.
Out:  tasks, one after the other; at the end, the records of all shards in order.

How:  partitions are independent of each other. The shards of one are a chain: each starts where the one before ended. Where a shard fails,
      its chain is left, and the others go on.

Cost: none; a finished shard's file is hashed when its chain comes to it.
"""

from collections import deque
from typing import Any

from builder.build.outbox import Outbox
from builder.build.state import DISK_FULL, BuildState
from builder.build.task import Task
from builder.capture.pipeline import Notice, Progress
from builder.dataset.identity import teacher_differences
from builder.dataset.manifest import ShardRecord
from builder.recipe.recipe import Recipe
from builder.sources.changes import SourceChangedError
from logit_dataset.schema import TRAIN, VALIDATION


class Chains:
    """Which shards are there, and which can be computed next."""

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
            f"{record.file} does not start where the shard before it ends, which was rebuilt (on other hardware or with other libraries?); start again in another directory, without the shards on this build's branch"
        )
