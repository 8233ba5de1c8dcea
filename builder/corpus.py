"""A pinned corpus → a stream of documents, from any recorded position.

In:   local files, or a Hub dataset at a commit; never loaded whole.
Out:  Documents, in the corpus's order, and at any time the position after the last one.

How:  `datasets` streams. A position names the file and carries the library's own state within it; for Parquet the state
      counts row groups. So resuming opens only the file in which it stopped, at the row group in which it stopped; a file
      of lines is read again up to there, which is the price of a format without an index.

      JSON lines are streamed as lines and parsed here, one by one. The library's own JSON reader guesses types by the
      10 MB, and turns strings that look like dates into dates: an id "2024-01-01" would become "2024-01-01 00:00:00".
"""

import codecs
import hashlib
import json
import locale
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from zstandard import ZstdError

Position = dict[str, Any]
"""JSON values: file (index), row (how many of its rows are read), state (of `datasets` within the file), documents and
skipped (counts so far)."""

PARQUET_BATCH_ROWS = 1_000
"""Rows decoded at once. Left to itself, `datasets` takes a row group, and fails on an empty one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus."""

    id: str
    text: str


def open_local(
    files: tuple[Path, ...], *, format: Literal["text", "json", "parquet"], text_unit: str
) -> IterableDataset:
    """Local files as a stream with one shard a file; of JSON lines, a row is the line.

    Raises:
        ValueError: the first Parquet file is none, or compressed files would be read in another encoding than UTF-8.
    """
    options: dict[str, Any] = {}
    if format == "parquet":
        options["batch_size"] = PARQUET_BATCH_ROWS
    elif format == "text" and text_unit == "file":
        options["sample_by"] = "document"
    is_compressed = any(path.suffix in (".gz", ".zst") for path in files)
    encoding = locale.getpreferredencoding(do_setlocale=False)
    if is_compressed and codecs.lookup(encoding).name != "utf-8":
        # `datasets` forgets the encoding of compressed files, so that of the system would silently apply.
        raise ValueError(
            f"compressed files would be read as {encoding}, the encoding of this system; run again with PYTHONUTF8=1 "
            "in the environment"
        )
    with _one_line(f"corpus file {files[0].name}"):  # of which `datasets` reads the schema now
        return load_dataset(
            {"json": "text"}.get(format, format),
            data_files={"train": [str(path) for path in files]},
            split="train",
            streaming=True,
            **options,
        )


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
    except ConnectionError:
        raise ValueError(
            f"corpus {repo}@{commit[:8]}: it is not in the cache, and the Hub cannot be reached to fetch it; "
            "check the network, or use corpus.files"
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
        format: Literal["hub", "text", "json", "parquet"] = "hub",
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
            format: what the stream's rows are; those of `json` are lines, each an object whose keys are the columns.
            file_names: names of the stream's files for messages.
            partition: which of `num_partitions` contiguous ranges of files to read.
            start: a position that an earlier Corpus of the same stream reported.

        Raises:
            ValueError: there are fewer files than partitions.
        """
        if stream.num_shards < num_partitions:
            raise ValueError(
                f"output.partitions is {num_partitions}, but the corpus has only {stream.num_shards} files to "
                "divide; choose fewer"
            )
        self.stream = stream
        self._text_column = text_column
        self._id_column = id_column
        self._format = format
        self._file_names = file_names
        self._first_file, self._end_file = (
            stream.num_shards * p // num_partitions for p in (partition, partition + 1)
        )
        beginning = {
            "file": self._first_file,
            "row": 0,
            "state": None,
            "documents": 0,
            "skipped": 0,
        }
        start = start or beginning
        self._file: int = start["file"]
        self._row: int = start["row"]
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
            "row": self._row,
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
            with _one_line(self._where(), self._advice()):  # Parquet files are opened here
                self._rows = self.stream.shard(self.stream.num_shards, self._file).reshard()
            if self._state is not None:
                self._rows.load_state_dict(self._state)
            yield from self._documents_of(self._rows)
            self._file, self._row = self._file + 1, 0
            self._state = self._rows = None

    def _documents_of(self, rows: IterableDataset) -> Iterator[Document]:
        for row in self._readable(rows):
            text = self._column(row, self._text_column)
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{self._where_exactly()}: column {self._text_column!r} holds {type(text).__name__}, expected text; "
                    "set corpus.text_column to a column of strings"
                )
            if text is None or not text.strip():
                self._skipped += 1
                continue
            identifier = self._identifier(row, text)
            self._documents += 1
            yield Document(id=identifier, text=text)

    def _identifier(self, row: dict[str, Any], text: str) -> str:
        """The document's id, once it is known that it and the text can be written as UTF-8."""
        found = self._column(row, self._id_column) if self._id_column else None
        if self._id_column and (
            not isinstance(found, str | int) or isinstance(found, bool) or found == ""
        ):
            kind = "nothing" if found in (None, "") else type(found).__name__
            raise ValueError(
                f"{self._where_exactly()}: column {self._id_column!r} holds {kind}, expected text or a whole number; "
                "set corpus.id_column to another column, or leave it out to have hashes of the text as ids"
            )
        try:
            content = text.encode()
            str(found).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self._where_exactly()}: holds {error.object[error.start]!r}, half of a surrogate pair, which is no "
                "character; replace it in the corpus (by \\ufffd, for instance)"
            ) from None
        return str(found) if self._id_column else hashlib.sha256(content).hexdigest()[:16]

    def _readable(self, rows: IterableDataset) -> Iterator[dict[str, Any]]:
        iterator = iter(rows)
        while True:
            with _one_line(self._where(), self._advice()):
                row: dict[str, Any] | None = next(iterator, None)
            if row is None:
                return
            self._row += 1
            if self._row == 1 and self._format in ("text", "json"):
                row["text"] = row["text"].removeprefix("\ufeff")  # a byte order mark is no text
            if self._format != "json":
                yield row
            elif line := row["text"].strip():
                yield self._parse(line)

    def _parse(self, line: str) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error})"
        else:
            if isinstance(values, dict):
                return values
            reason = f"a JSON {type(values).__name__}"
        raise ValueError(
            f"{self._where_exactly()} is {reason}; expected one JSON object a line, with the key {self._text_column!r}"
        )

    def _column(self, row: dict[str, Any], name: str) -> Any:
        if name in row:
            return row[name]
        if self._format == "json" and self._row > 1:
            return None  # JSON lines often leave out what is null
        raise ValueError(
            f"{self._where()} has no column {name!r}; its columns are {', '.join(row)}; "
            "set corpus.text_column or corpus.id_column"
        )

    def _where(self) -> str:
        if self._file < len(self._file_names):
            return f"corpus file {self._file_names[self._file]}"
        return f"corpus file number {self._file}"

    def _where_exactly(self) -> str:
        return f"{self._where()} {'line' if self._format == 'json' else 'row'} {self._row:,}"

    def _advice(self) -> str:
        is_local = bool(self._file_names)
        return (
            "mend it or leave it out"
            if is_local
            else "check the network, and run the command again"
        )


@contextmanager
def _one_line(where: str, advice: str = "mend it or leave it out") -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the file and says what to do.

    Raises:
        ValueError: the line.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode(errors="replace")
        raise ValueError(
            f"{where} is not valid UTF-8 (byte 0x{error.object[error.start]:02x} after …{before!r}); "
            "convert it, or leave it out"
        ) from None
    except (pa.ArrowException, ValueError, OSError, EOFError, zlib.error, ZstdError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where} cannot be read ({reason}); {advice}") from None
