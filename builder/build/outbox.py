"""Finished shards → a branch of a repository on the Hub, while the build goes on.

In:   the records of shards, as they are finished.
Out:  on the branch, `data/*.parquet`, and in `.build/` all that another machine needs to resume: the plan, the teacher, the
      commits behind branches, and the record of every shard. A record comes with its file, in one commit: a shard without a
      record does not exist on the branch either, and a record counts only while its file has the recorded hash.

How:  A thread of its own takes one shard after the other. It checks all rows as `verify` does, takes down what the card's
      pictures need, and sends the content. A commit for several of them follows; then the hashes are read back, and only then
      may a file be deleted here. What fails there fails the build.

Cost: a second for a million tokens, beside the build; a copy of the data on the network. With `discard`, no more than
      `max_local` shards are on the disk: those that wait, and those being computed.
"""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from builder.build.branch import BRANCH, Held, held_of, read_entries, read_values, small_files
from builder.build.state import DISK_FULL, BuildState
from builder.card.charts import Curves, Measured, curves_of, measure_file
from builder.dataset.identity import row_fingerprint
from builder.dataset.manifest import ShardRecord, json_bytes
from builder.dataset.printable import counted
from builder.dataset.shards import file_sha256
from builder.hub.calls import Notice, explain
from builder.hub.limits import (
    DISCARDED_TOGETHER,
    FILES_PER_COMMIT,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_LOCAL_SHARDS,
)
from builder.hub.repository import LocalFile, Moved, Repository, Tree, holds
from builder.sources.known import KnownSources
from builder.verify.rows import Report, check_shard

SENT_TOGETHER = FILES_PER_COMMIT - 5
"""With the plan, the teacher, the commits and two lists of records."""
COMMIT_SECONDS = 600
"""After which even a single shard is committed."""


class _Sent(NamedTuple):
    """A shard whose content has arrived, but which no commit holds yet."""

    record: ShardRecord
    measured: Measured
    addition: CommitOperationAdd


class Outbox:
    """Uploads finished shards, and knows which have arrived."""

    def __init__(
        self,
        repo: Repository,
        *,
        discard: bool,
        max_local: int = MAX_LOCAL_SHARDS,
        notice: Notice,
    ) -> None:
        """Store the settings; nothing is sent yet.

        Args:
            repo: a repository that exists and is writable.
            discard: delete each local file once it is in the repository.
            max_local: data files kept on disk, with `discard`.
            notice: called with one line that the user should know.
        """
        self.repo, self.discards = repo, discard
        self._max_local = max_local
        self._notice = notice
        self._changed = Condition()
        self._waiting: list[ShardRecord] = []
        self._sent: list[_Sent] = []
        self._entries: list[dict[str, Any]] = []
        """Of the branch, in the order of its lists of records."""
        self._held: Held = {}
        self._last_commit = time.monotonic()
        self._blocked = self._closing = self._abandoned = False
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._run, name="outbox", daemon=True)

    def open(self, output: Path, state: BuildState, known: KnownSources) -> None:
        """Read the branch, prepare the directory to resume from it, and start sending.

        Args:
            output: directory of the dataset.
            state: of the build there, locked.
            known: receives the commits that the branch's build resolved.

        Raises:
            ValueError: the branch belongs to something else, or the directory holds another build than the branch.
        """
        self._output, self._state, self._known = output, state, known
        refs = self.repo.refs()
        assert refs  # for it exists
        main = refs.branches["main"]
        self._head = refs.branches.get(BRANCH) or self.repo.create_branch(BRANCH, main)
        tree = self.repo.tree(self._head)
        read = partial(read_values, self.repo, self._head, tree)
        plan = read("plan")
        if plan is not None:
            state.adopt(
                f"branch {BRANCH} of {self.repo.id}",
                {"plan": plan, "teacher": read("teacher")},
            )
            known.commits |= read("known")["commits"]
            self._read_records(tree)
        elif self._head != main and not self._is_unused(main, tree):
            raise ValueError(
                f"branch {BRANCH} of {self.repo.id} holds something other than an unfinished build; delete it, or publish under "
                "another name"
            )
        if self.discards:
            state.note_repository(self.repo.id)
        self._tidy()
        self._thread.start()

    def _is_unused(self, main: str, tree: Tree) -> bool:
        """Whether nothing was ever put on the branch, though main may have moved on since it was made."""
        return self.repo.is_of_main(self._head) or self.repo.tree(main) == tree

    def held(self, partition: int, index: int) -> ShardRecord | None:
        """Return the record of a shard that is on the branch; its file need not be local."""
        found = self._held.get((partition, index))
        return found[0] if found else None

    def room(self, under_way: int = 0) -> bool:
        """Wait until another shard may be started, and return whether it may.

        If other shards are in progress, this does not wait: one of them has to be finished and handed over first.
        """
        with self._changed:
            while self.discards:
                self._check()
                if len(self._waiting) + len(self._sent) + under_way < self._max_local:
                    break
                if under_way:
                    return False
                self._blocked = True
                self._changed.notify_all()
                self._changed.wait()
            self._blocked = False
            return True

    def put(self, record: ShardRecord) -> None:
        """Hand over a finished shard whose file is in the directory.

        Raises:
            ValueError: an earlier shard could not be sent, or the Hub refuses this one.
        """
        if record.bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"{record.file} has {record.bytes / 1e9:,.1f} GB, and the Hub takes files of up to {MAX_FILE_BYTES / 1e9:.0f} GB; "
                "begin anew with a smaller output.shard_tokens"
            )
        with self._changed:
            self._check()
            if len(self._held) + len(self._sent) + len(self._waiting) >= MAX_FILES:
                raise ValueError(
                    f"{record.file} is one more than the {MAX_FILES:,} files that the Hub takes; begin anew with a larger "
                    "output.shard_tokens"
                )
            self._waiting.append(record)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every shard that was handed over is on the branch.

        Raises:
            ValueError: a shard could not be sent.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._changed:
            self._check()

    def abandon(self) -> None:
        """Send nothing more, because the build failed."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def discard(self, records: Iterable[ShardRecord]) -> None:
        """Delete shards from the branch once every shard handed over is there. Without files, their records are void.

        Raises:
            ValueError: the Hub refuses.
        """
        files = [record.file for record in records]
        for start in range(0, len(files), FILES_PER_COMMIT):
            part = files[start : start + FILES_PER_COMMIT]
            self._head = self.repo.commit(
                BRANCH,
                [CommitOperationDelete(file) for file in part],
                message=f"{counted(len(part), 'shard')} deleted, because a source has changed",
                parent=self._head,
                landed=lambda tree: not tree.keys() & set(part),  # noqa: B023 – called at once
            )

    def curves(self, records: Iterable[ShardRecord]) -> Curves:
        """Return what the card's pictures show of shards on the branch."""
        return curves_of(self._held[record.partition, record.index][1] for record in records)

    def _check(self) -> None:
        failure = self._failure
        if failure is None:
            return
        if isinstance(failure, OSError) and failure.errno in DISK_FULL:
            raise failure
        # Of others, only what is known to hold no address.
        what = failure if isinstance(failure, ValueError) else explain(failure, self.repo.id)
        raise ValueError(
            f"{what}. Finished shards are safe; the same command resumes from here"
        ) from failure

    def _read_records(self, tree: Tree) -> None:
        self._entries = read_entries(self.repo, self._head, tree)
        self._held, damaged = held_of(self._entries, tree)
        for file in damaged:
            self._notice(f"{file} on branch {BRANCH} does not match its record: building it again")

    def _tidy(self) -> None:
        """Delete here what the branch holds, or holds otherwise, and leftovers of builds that were killed."""
        held = {record.file: record.sha256 for record, _ in self._held.values()}
        recorded = self._state.recorded_files()
        for path in (self._output / "data").iterdir():
            name = f"data/{path.name}"
            if name in held:
                if self.discards or file_sha256(path) != held[name]:
                    path.unlink(missing_ok=True)
            elif self.discards and name not in recorded:
                path.unlink(missing_ok=True)  # a worker that outlived its driver may be faster

    # What the thread does

    def _run(self) -> None:
        try:
            while step := self._next_step():
                step()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_step(self) -> Any:
        """What is to be done next; waits until there is something, and is None when all is done."""
        with self._changed:
            while not self._abandoned:
                seconds_left = self._last_commit + COMMIT_SECONDS - time.monotonic()
                if self._is_commit_due(seconds_left):
                    return self._commit
                if self._waiting:
                    return partial(self._send, self._waiting[0])
                if self._closing:
                    break
                self._changed.wait(max(seconds_left, 0) if self._sent else None)
            return None

    def _is_commit_due(self, seconds_left: float) -> bool:
        if not self._sent:
            return False
        if len(self._sent) >= SENT_TOGETHER or seconds_left <= 0:
            return True
        together = DISCARDED_TOGETHER if self.discards else SENT_TOGETHER
        is_awaited = self._closing or self._blocked or len(self._sent) >= together
        return is_awaited and not self._waiting

    def _send(self, record: ShardRecord) -> None:
        """Check a shard and send its content."""
        path, report = self._output / record.file, Report()
        plan = self._state.read("plan")
        about = {
            "recipe": plan["recipe"],
            "teacher": self._state.read("teacher"),
            "row_fingerprint": row_fingerprint(plan),
        }
        check_shard(self._output, record, about, report)
        if report.problems:
            raise ValueError(f"{report.problems[0]}; it was not sent")
        measured = measure_file(path)
        addition = CommitOperationAdd(record.file, path)
        self.repo.send(addition, BRANCH)
        if addition.upload_info.sha256.hex() != record.sha256:
            raise ValueError(f"{record.file} has changed since it was finished; it was not sent")
        with self._changed:
            self._waiting.remove(record)
            self._sent.append(_Sent(record, measured, addition))
            self._changed.notify_all()

    def _commit(self) -> None:
        """Bring into the branch what was sent, read back that it is there, and discard it here."""
        batch = self._sent[:SENT_TOGETHER]
        entries = [
            *self._entries,
            *({"record": asdict(sent.record), "measured": asdict(sent.measured)} for sent in batch),
        ]
        small = {
            path: LocalFile.of(json_bytes(values))
            for path, values in small_files(
                entries, len(self._entries), self._state, self._known
            ).items()
        }
        files = {
            sent.record.file: LocalFile(self._output / sent.record.file, sent.record.bytes, sent.record.sha256)
            for sent in batch
        }  # fmt: skip
        files |= small
        names = [sent.record.file.removeprefix("data/") for sent in batch]
        try:
            head = self.repo.commit(
                BRANCH,
                [
                    *(sent.addition for sent in batch),
                    *(CommitOperationAdd(path, file.content) for path, file in small.items()),
                ],
                message=f"{counted(len(names), 'shard')}: {names[0]}{f' … {names[-1]}' if names[1:] else ''}",
                parent=self._head,
                landed=lambda tree: all(holds(tree, path, file) for path, file in files.items()),
            )
        except Moved as error:
            raise ValueError(
                f"{error}; is another machine building the same dataset? Let only one continue"
            ) from None
        there = self.repo.tree(head, list(files))
        for path, file in files.items():
            if not holds(there, path, file) or (path not in small and not there[path].sha256):
                raise ValueError(f"{path} on the Hub differs from what was sent")
        if self.discards:
            for sent in batch:
                with suppress(FileNotFoundError):
                    (self._output / sent.record.file).unlink()
        with self._changed:
            self._head, self._entries = head, entries
            self._held |= {
                (sent.record.partition, sent.record.index): (sent.record, sent.measured)
                for sent in batch
            }
            del self._sent[: len(batch)]
            self._last_commit = time.monotonic()
            self._changed.notify_all()
