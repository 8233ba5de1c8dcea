"""What an unfinished build keeps in `.build/`: its plan, a record of every finished shard, and a lock.

A shard without a record does not exist, and a record counts only while its file has the recorded hash. Everything here is
small JSON, replaced as a whole or not at all.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock

from builder.dataset.identity import differences, teacher_differences
from builder.dataset.manifest import ShardRecord, write_json
from builder.dataset.shards import file_sha256
from builder.sources.known import KnownSources
from logit_dataset.schema import HEAD_FILE, SPLITS

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that every further shard would end with, too."""
OWN_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{3,}}-\d{{5,}}\.parquet", re.ASCII)
"""Names of `dataset.manifest.data_file`."""


class BuildState:
    """What an unfinished build keeps in `.build/`: the plan, shard records, and a lock."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._directory = output / ".build"
        self._elsewhere: str | None = None
        """Where there are shards of this build besides those in the directory."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second build.

        Raises:
            ValueError: another process is building here, or the directory holds something else.
        """
        try:
            if (
                not self._directory.exists()
                and self._output.exists()
                and any(self._output.iterdir())
            ):
                raise ValueError(
                    f"{self._output} is not empty and holds no build; choose a new or empty directory"
                )
            (self._directory / "records").mkdir(parents=True, exist_ok=True)
            (self._output / "data").mkdir(exist_ok=True)
        except (NotADirectoryError, FileExistsError, FileNotFoundError, PermissionError) as error:
            raise ValueError(
                f"{self._output} cannot be written ({error.strerror}: {error.filename}); choose another directory"
            ) from None
        lock = filelock.FileLock(self._directory / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(
                f"another process is building in {self._output}; wait for it, or choose another directory"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def known_sources(self) -> KnownSources:
        """What earlier runs resolved."""
        return (
            KnownSources(**self.read("known")) if self._path("known").exists() else KnownSources()
        )

    def remember(self, known: KnownSources) -> None:
        """Keep what was resolved for later runs."""
        write_json(self._path("known"), asdict(known))

    def settle(self, name: str, values: dict[str, Any]) -> None:
        """Write down something that may not change once there are shards.

        Raises:
            ValueError: an earlier run wrote down something else, and built with it.
        """
        if not self.has_shards() or not self._path(name).exists():
            write_json(self._path(name), values)
        elif changes := teacher_differences(self.read(name), values):
            raise ValueError(
                f"{self._elsewhere or self._output} holds an unfinished build with another {name} ({'; '.join(changes)}); "
                f"resume that one, {'delete it, ' if self._elsewhere else ''}or choose another "
                f"{'repository' if self._elsewhere else 'directory'}"
            )

    def adopt(self, elsewhere: str, settled: dict[str, dict[str, Any]]) -> None:
        """Go on with a build whose shards, or some of them, are elsewhere.

        Args:
            elsewhere: where, for messages.
            settled: what was settled there, by name.

        Raises:
            ValueError: the directory holds shards of another build.
        """
        for name, values in settled.items():
            self.settle(name, values)
        self._elsewhere = elsewhere

    def note_repository(self, repo: str) -> None:
        """Remember that shards will be deleted here, because a repository holds them."""
        write_json(self._path("repository"), {"repo": repo})

    def check_repository(self, repo: str | None) -> None:
        """See that a build is resumed where its shards are.

        Raises:
            ValueError: they are in a repository that was not named.
        """
        if self._path("repository").exists() and (there := self.read("repository")["repo"]) != repo:
            raise ValueError(
                f"shards of {self._output} are in {there} and no longer here; add --publish-to {there} --discard-local, or "
                "build in another directory"
            )

    def read(self, name: str) -> dict[str, Any]:
        """What `settle` wrote down."""
        return _read(self._path(name), "start again in another directory")

    def settled(self, name: str) -> dict[str, Any] | None:
        """The same, if there are shards that hold to it."""
        return self.read(name) if self.has_shards() and self._path(name).exists() else None

    def has_shards(self) -> bool:
        """Whether any was finished, here or elsewhere."""
        return bool(self._elsewhere) or any((self._directory / "records").glob("*.json"))

    def record(self, partition: int, index: int) -> ShardRecord | None:
        """The record of a shard, whatever has become of its file."""
        path = self._record_path(partition, index)
        if not path.exists():
            return None
        return ShardRecord.from_json(_read(path, "delete it to rebuild its shard"))

    def intact_record(
        self, partition: int, index: int, notice: Callable[[str], None]
    ) -> ShardRecord | None:
        """The record of a shard whose file is what it was, else None."""
        record = self.record(partition, index)
        if record is None:
            return None
        file = self._output / record.file
        if not file.exists():
            problem = "is missing"
        elif file.stat().st_size != record.bytes:
            problem = f"has {file.stat().st_size:,} bytes, its record says {record.bytes:,}"
        elif file_sha256(file) != record.sha256:
            problem = "does not have the hash in its record"
        else:
            return record
        notice(f"{record.file} {problem}: building it again")
        return None

    def recorded_files(self) -> set[str]:
        """The files of all records here, intact or not."""
        paths = (self._directory / "records").glob("*.json")
        return {_read(path, "delete it to rebuild its shard")["file"] for path in paths}

    def add(self, record: ShardRecord) -> None:
        """Make a shard count.

        Raises:
            ValueError: it replaces a damaged shard, but ends elsewhere in the corpus than that did; or its file is not here.
        """
        try:
            size = (self._output / record.file).stat().st_size
        except OSError:
            size = None
        if size != record.bytes:
            found = "is not there" if size is None else f"has {size:,} bytes, not {record.bytes:,}"
            raise ValueError(
                f"a worker has finished {record.file}, but in {self._output} it {found}; --output must be at a path that all "
                "machines share"
            )
        path = self._record_path(record.partition, record.index)
        if path.exists():
            old = ShardRecord.from_json(_read(path, "delete it"))
            if changes := differences(old.offset_after, record.offset_after):
                raise ValueError(
                    f"{record.file} was built again but ends elsewhere in the corpus ({'; '.join(changes)}); "
                    "the corpus or a library has changed: start again in another directory"
                )
        write_json(path, record.to_json())

    def discard(self, records: Iterable[ShardRecord]) -> None:
        """Have shards not exist any more."""
        for record in records:
            self._record_path(record.partition, record.index).unlink(missing_ok=True)
            (self._output / record.file).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what killed processes left half-written. One that still writes there fails when it is done."""
        for partial in (*self._output.glob(f".{HEAD_FILE}.*.partial"), *(self._output / "data").glob(".*.partial")):  # fmt: skip
            partial.unlink(missing_ok=True)
        if not self.has_shards():  # it may be of another teacher
            (self._output / HEAD_FILE).unlink(missing_ok=True)

    def refuse_strangers(self) -> None:
        """See that `data/` holds nothing but shards of this program, for readers take all of it for the dataset.

        Raises:
            ValueError: it holds another Parquet file.
        """
        for path in sorted((self._output / "data").glob("*.parquet")):
            if not OWN_FILE.fullmatch(path.name):
                raise ValueError(
                    f"{self._output}/data holds {path.name}, which is not a shard of this build but would be read as part of the dataset; move it elsewhere"
                )

    def sweep_strays(self, records: Iterable[ShardRecord]) -> None:
        """Delete the shards that are no part of the finished dataset: an earlier plan's, from before anything was recorded, or those of a
        process that outlived its driver. A shard without a record does not exist.

        Raises:
            ValueError: as `refuse_strangers`.
        """
        self.refuse_strangers()
        kept = {record.file for record in records}
        for path in (self._output / "data").glob("*.parquet"):
            if f"data/{path.name}" not in kept:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything: the manifest has taken over."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _record_path(self, partition: int, index: int) -> Path:
        return self._directory / "records" / f"{partition:03d}-{index:05d}.json"


def _read(path: Path, advice: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    return values
