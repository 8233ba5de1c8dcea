"""Local files that a build reads → whether they are still what they were when they were hashed.

In:   the files of corpus and teacher, with size, time of change and hash of each.
Out:  nothing, or one line that says which file is another one, what has changed, and what to do.

How:  size and time of change are compared before a file is opened, and when a shard is finished with it, so that what was read in between
      was the same file; on a CPU, a teacher's weights are read from their files for as long as it lives. A file that was touched, or
      replaced by an equal one, is hashed, and passes. One whose size and time of change do not tell is found when all are hashed
      again before the manifest is written.

Cost: microseconds a file and shard; a second a GB of the last look.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

LONG_BYTES = 20 * 10**9
"""From here on, the user is told that the last look takes a while."""
BYTES_PER_SECOND = 10**9
"""Of hashing, about."""


class SourceChangedError(ValueError):
    """A file of the corpus or the teacher is not what it was when the build began."""


class Seen(NamedTuple):
    """A local file, as it was seen."""

    size: int
    changed_ns: int
    sha256: str | None
    """None for one that decides nothing."""

    def is_same(self, stat: os.stat_result) -> bool:
        """Whether a file of this size and time of change is taken for it."""
        return (self.size, self.changed_ns) == (stat.st_size, stat.st_mtime_ns)


def hash_file(path: Path) -> Seen:
    """Hash a file.

    Raises:
        SourceChangedError: it is being written.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    seen = Seen(before.st_size, before.st_mtime_ns, digest)
    if not seen.is_same(path.stat()):
        raise SourceChangedError(
            f"{path.name} changed while it was read; wait until it is completely written, and run the command again"
        )
    return seen


def deciding_files(directory: Path) -> list[Path]:
    """The files of a directory that make a model what it is: configuration, weights, tokenizer."""
    suffixes = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
    return [path for path in sorted(directory.iterdir()) if path.suffix in suffixes]


class Watch:
    """Local files that must stay what they were; of others, it says nothing."""

    def __init__(
        self,
        corpus: Iterable[Path],
        teacher: Iterable[Path],
        seen: Mapping[str, Seen],
        *,
        directories: Iterable[Path] = (),
    ) -> None:
        """Take down what the files were.

        Args:
            corpus: its files, in their order.
            teacher: its files that decide the data.
            seen: by path, as they were when they were hashed; those that are not there are not watched.
            directories: of the teacher, to which no file may be added that decides the data.
        """
        self._corpus, self._teacher = tuple(corpus), tuple(teacher)
        self._directories = tuple(directories)
        paths = (*self._corpus, *self._teacher)
        self._seen = {path: seen[str(path)] for path in paths if str(path) in seen}

    def check_corpus_file(self, number: int) -> None:
        """See that a file of the corpus is what it was; it is about to be opened.

        Raises:
            SourceChangedError: it is not.
        """
        if number < len(self._corpus):
            self._check(self._corpus[number], "corpus file")

    def check_corpus(self, first: int, last: int) -> None:
        """See that files of the corpus, from one number to another, are what they were; errors as for `check_corpus_file`."""
        for number in range(first, last + 1):
            self.check_corpus_file(number)

    def check_teacher(self) -> None:
        """See that the teacher's files are what they were; errors as for `check_corpus_file`."""
        for path in self._teacher:
            self._check(path, "teacher file")
        for directory in self._directories:
            for path in deciding_files(directory):
                if path not in self._teacher:
                    raise SourceChangedError(
                        f"teacher file {path.name} was not there when this build began; remove it and run the same command, or build in "
                        "another directory"
                    )

    def read_again(self, notice: Callable[[str], None]) -> "Look":
        """Hash all files again, each once: which of them are others than when they were first hashed."""
        total = sum(seen.size for seen in self._seen.values())
        if total > LONG_BYTES:
            notice(
                f"reading corpus and teacher again ({total / 1e9:,.0f} GB, about {total / BYTES_PER_SECOND / 60:,.0f} min) "
                "to check that they have not changed"
            )
        look = Look([], False, None)
        for path, seen in self._seen.items():
            what = "teacher file" if path in self._teacher else "corpus file"
            try:
                stat = path.stat()
                found = hash_file(path)
            except OSError as error:
                look = look._replace(error=look.error or _gone(path, what, error))
                continue
            if found.sha256 == seen.sha256:
                continue
            look = look._replace(error=look.error or _changed(path, what, seen, found.size))
            if seen.is_same(stat):  # it may have been another one at any time
                if path in self._teacher:
                    look = look._replace(is_teacher_unknown=True)
                look.unknown_corpus.extend(i for i, file in enumerate(self._corpus) if file == path)
        return look

    def _check(self, path: Path, what: str) -> None:
        seen = self._seen.get(path)
        if seen is None:
            return
        try:
            stat = path.stat()
            if seen.is_same(stat):
                return
            if stat.st_size == seen.size and (found := hash_file(path)).sha256 == seen.sha256:
                self._seen[path] = found
                return
        except OSError as error:
            raise _gone(path, what, error) from None
        raise _changed(path, what, seen, stat.st_size)


class Look(NamedTuple):
    """What a last look at all files has found."""

    unknown_corpus: list[int]
    """Numbers of corpus files that are others, though size and time of change do not tell: when they changed is not known."""
    is_teacher_unknown: bool
    """Whether a file of the teacher is such a one."""
    error: SourceChangedError | None
    """About the first file that is another one."""


def _gone(path: Path, what: str, error: OSError) -> SourceChangedError:
    return SourceChangedError(
        f"{what} {path.name} can no longer be read ({error.strerror}); finished shards are safe: restore it, and run the same command"
    )


def _changed(path: Path, what: str, seen: Seen, size: int) -> SourceChangedError:
    how = (
        "other content of the same size"
        if size == seen.size
        else f"{seen.size:,} bytes then, {size:,} now"
    )
    return SourceChangedError(
        f"{what} {path.name} has changed since it was hashed for this build ({how}); restore it and run the same command, or build from the new version in another directory"
    )
