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
    """The files of an unfinished build in `.build/`: the plan, shard records, and a lock."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._directory = output / ".build"
        self._elsewhere: str | None = None
        """Where there are shards of this build besides those in the directory."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against a second build.

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
        """Return what earlier runs resolved."""
        return (
            KnownSources(**self.read("known")) if self._path("known").exists() else KnownSources()
        )

    def remember(self, known: KnownSources) -> None:
        """Store what was resolved, for later runs."""
        write_json(self._path("known"), asdict(known))

    def settle(self, name: str, values: dict[str, Any]) -> None:
        """Store a value that must not change once there are shards.

        Raises:
            ValueError: an earlier run stored another value and built shards with it.
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
        """Continue a build some or all of whose shards are elsewhere.

        Args:
            elsewhere: where they are, for messages.
            settled: the values settled there, by name.

        Raises:
            ValueError: the directory holds shards of another build.
        """
        for name, values in settled.items():
            self.settle(name, values)
        self._elsewhere = elsewhere

    def note_repository(self, repo: str) -> None:
        """Record the repository that holds the shards, because local files will be deleted."""
        write_json(self._path("repository"), {"repo": repo})

    def check_repository(self, repo: str | None) -> None:
        """Check that a build is resumed with the repository that holds its shards.

        Raises:
            ValueError: the shards are in a repository that was not named.
        """
        if self._path("repository").exists() and (there := self.read("repository")["repo"]) != repo:
            raise ValueError(
                f"shards of {self._output} are in {there} and no longer here; add --publish-to {there} --discard-local, or "
                "build in another directory"
            )

    def read(self, name: str) -> dict[str, Any]:
        """Return what `settle` stored."""
        return _read(self._path(name), "start again in another directory")

    def settled(self, name: str) -> dict[str, Any] | None:
        """Return the same, if there are shards that were built with it."""
        return self.read(name) if self.has_shards() and self._path(name).exists() else None

    def has_shards(self) -> bool:
        """Return whether any shard was finished, here or elsewhere."""
        return bool(self._elsewhere) or any((self._directory / "records").glob("*.json"))

    def record(self, partition: int, index: int) -> ShardRecord | None:
        """Return the record of a shard, whatever the state of its file."""
        path = self._record_path(partition, index)
        if not path.exists():
            return None
        return ShardRecord.from_json(_read(path, "delete it to rebuild its shard"))

    def intact_record(
        self, partition: int, index: int, notice: Callable[[str], None]
    ) -> ShardRecord | None:
        """Return the record of a shard if its file is unchanged, else None."""
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
        """Return the local files of all records, intact or not."""
        paths = (self._directory / "records").glob("*.json")
        return {_read(path, "delete it to rebuild its shard")["file"] for path in paths}

    def add(self, record: ShardRecord) -> None:
        """Record a finished shard.

        Raises:
            ValueError: the shard replaces a damaged one but ends elsewhere in the corpus, or its file is missing.
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
        """Delete shards and their records."""
        for record in records:
            self._record_path(record.partition, record.index).unlink(missing_ok=True)
            (self._output / record.file).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete partial files of killed processes. A process that still writes one fails when it finishes."""
        for partial in (*self._output.glob(f".{HEAD_FILE}.*.partial"), *(self._output / "data").glob(".*.partial")):  # fmt: skip
            partial.unlink(missing_ok=True)
        if not self.has_shards():  # it may be of another teacher
            (self._output / HEAD_FILE).unlink(missing_ok=True)

    def refuse_strangers(self) -> None:
        """Check that `data/` holds only shards of this program, because readers take every file in it for the dataset.

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
        """Delete the state of the build; the manifest replaces it."""
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
