"""A pinned corpus → a stream of documents, from any recorded position.

In:   local files, or a Hub dataset at a commit; never loaded whole.
Out:  Documents, in the corpus's order, and at any time the position after the last one.

How:  `datasets` streams. A position names the file and carries the library's own state within it; for Parquet the state
      counts row groups. So resuming opens only the file in which it stopped, at the row group in which it stopped; a file
      of JSON lines is parsed again up to there, which is the price of a format without an index.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

Position = dict[str, Any]
"""JSON values: file (index), state (of `datasets` within the file), documents and skipped (counts so far)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus."""

    id: str
    text: str


def open_local(
    files: tuple[Path, ...], *, format: Literal["text", "json", "parquet"], text_unit: str
) -> IterableDataset:
    """Local files as a stream with one shard a file."""
    options = (
        {"sample_by": {"file": "document"}.get(text_unit, text_unit)} if format == "text" else {}
    )
    data_files = {"train": [str(path) for path in files]}
    return load_dataset(format, data_files=data_files, split="train", streaming=True, **options)


def open_hub(repo: str, *, commit: str, config: str | None, split: str) -> IterableDataset:
    """A Hub dataset at a commit, as a stream.

    Raises:
        ValueError: it does not exist, cannot be reached, or has no such configuration or split.
    """
    try:
        return load_dataset(repo, config, revision=commit, split=split, streaming=True)
    except DatasetNotFoundError:
        raise ValueError(
            f"corpus {repo}@{commit[:8]} does not exist on the Hub, or is private"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"corpus {repo}@{commit[:8]}: {' '.join(str(error).split())[:300]}"
        ) from None


class Corpus:
    """The documents of one partition of a corpus. Iterate over it once; `position` says how far it is."""

    def __init__(
        self,
        stream: IterableDataset,
        *,
        text_column: str,
        id_column: str | None,
        file_names: tuple[str, ...] = (),
        partition: int = 0,
        num_partitions: int = 1,
        start: Position | None = None,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            stream: from `open_local` or `open_hub`.
            text_column: column of the text.
            id_column: column of the document's id; without one, ids are hashes of the text.
            file_names: names of the stream's files for messages.
            partition: which of `num_partitions` contiguous ranges of files to read.
            start: a position that an earlier Corpus of the same stream reported.

        Raises:
            ValueError: there are fewer files than partitions.
        """
        if stream.num_shards < num_partitions:
            raise ValueError(
                f"output.partitions is {num_partitions}, but the corpus has only {stream.num_shards} files to divide"
            )
        self.stream = stream
        self._text_column = text_column
        self._id_column = id_column
        self._file_names = file_names
        self._first_file, self._end_file = (
            stream.num_shards * p // num_partitions for p in (partition, partition + 1)
        )
        start = start or {"file": self._first_file, "state": None, "documents": 0, "skipped": 0}
        self._file: int = start["file"]
        self._state: dict[str, Any] | None = start["state"]
        self._documents: int = start["documents"]
        self._skipped: int = start["skipped"]
        self._rows: IterableDataset | None = None

    @property
    def position(self) -> Position:
        """Where to go on after the last document that was yielded."""
        state = self._rows.state_dict() if self._rows is not None else self._state
        return {
            "file": self._file,
            "state": state,
            "documents": self._documents,
            "skipped": self._skipped,
        }

    @property
    def num_documents(self) -> int:
        """Documents yielded since the beginning of the partition, before `start` included."""
        return self._documents

    def __iter__(self) -> Iterator[Document]:
        """Yield documents that are not empty.

        Raises:
            ValueError: a file cannot be read as what it should be, or a column is missing or of another type.
        """
        while self._file < self._end_file:
            self._rows = self.stream.shard(self.stream.num_shards, self._file).reshard()
            if self._state is not None:
                self._rows.load_state_dict(self._state)
            yield from self._documents_of(self._rows)
            self._file += 1
            self._state = self._rows = None

    def _documents_of(self, rows: IterableDataset) -> Iterator[Document]:
        for row in self._readable(rows):
            text = self._column(row, self._text_column)
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{self._where()}: column {self._text_column!r} holds {type(text).__name__}, expected text; "
                    "set corpus.text_column to a column of strings"
                )
            if text is None or not text.strip():
                self._skipped += 1
                continue
            if self._id_column:
                identifier = str(self._column(row, self._id_column))
            else:
                identifier = hashlib.sha256(text.encode()).hexdigest()[:16]
            self._documents += 1
            yield Document(id=identifier, text=text)

    def _readable(self, rows: IterableDataset) -> Iterator[dict[str, Any]]:
        iterator = iter(rows)
        while True:
            try:
                row: dict[str, Any] = next(iterator)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self._where()} is not valid UTF-8 ({error.reason} at byte {error.start}); "
                    "convert it, or leave the file out"
                ) from None
            except (pa.ArrowException, ValueError, OSError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(f"{self._where()} cannot be read: {reason}") from None
            yield row

    def _column(self, row: dict[str, Any], name: str) -> Any:
        if name not in row:
            raise ValueError(
                f"{self._where()} has no column {name!r}; its columns are {', '.join(row)}; "
                "set corpus.text_column or corpus.id_column"
            )
        return row[name]

    def _where(self) -> str:
        if self._file < len(self._file_names):
            return f"corpus file {self._file_names[self._file]}"
        return f"corpus file number {self._file}"
