"""A pinned corpus → a stream of documents, from any recorded offset.

In:   local files, or a Hub dataset at a commit; never loaded whole.
Out:  Documents, in the corpus's order, and at any time the offset after the last one.

How:  `datasets` streams Parquet files and the Hub's datasets, `text.files` all others. An offset is a file, a row group in it (the only one,
      but in Parquet) and a row in that; within a long document also a place in it (`sequences`). So resuming opens only the file in which
      it stopped, and reads a row group of it, or a file of lines, again up to the place. It is not the library's own state, which
      differs between a run that was resumed and one that was not.
      JSON lines are parsed here: `datasets` would guess one type a column from the first file, so that an id like "2024-01-01" becomes
      a date, and a column that is null or of another type elsewhere ends the build. With CSV it would also read 007 as a number, NA as
      nothing, and a line with a comma too many as one of shifted columns.
"""

import csv
import difflib
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from zstandard import ZstdError

from builder.corpus.messages import Message, kind_of
from builder.corpus.rows import Columns, NotRead, Said, read_row
from builder.text.files import PART, LongText, TextFiles
from logit_dataset.files import first_line

LocalFormat = Literal["text", "json", "lines", "parquet", "csv"]
"""Of local files; `lines` are texts beside JSON lines."""
PARQUET_BATCH_ROWS = 1000
"""Documents of a local Parquet file in memory at once; by default it would be a row group, however large."""

Offset = dict[str, Any]
"""Numbers of file, row group and row to read next, and documents and skipped, the counts so far. Where a document goes on, its row is read
again: then there is the place in it, too (`sequences.Place`), and it is counted already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of the corpus, or one chat."""

    id: str
    text: str = ""
    prompt_length: int | None = None
    """Characters of the text before a completion; None where nothing is one."""
    messages: list[Message] | None = None
    """Of a chat; its text is what a chat template makes of them."""
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """What else a chat gives to its template: see `Chat`."""
    learn_from: int = 0
    """Of a chat, the message from which on answers are learned."""
    checked: int = 0
    """Messages that were looked at with an earlier turn of the same chat."""
    notes: tuple[str, ...] = ()
    """What was converted in it."""
    long_text: LongText | None = None
    """Of a text that is too long to be held."""

    @property
    def length(self) -> int:
        """Of the text, in characters."""
        return len(self.text) if self.long_text is None else self.long_text.length

    def parts(self) -> Iterator[str]:
        """The text, part by part."""
        if self.long_text is not None:
            return self.long_text.parts()
        starts = range(0, len(self.text), PART)
        return (self.text[start : start + PART] for start in starts)


def open_local(
    files: tuple[Path, ...],
    *,
    format: LocalFormat,
    text_unit: Literal["file", "line"],
    columns: tuple[str, ...],
) -> IterableDataset | TextFiles:
    """Local files as a stream with one shard a file: JSON lines as lines of text, of Parquet files only `columns`.

    Raises:
        ValueError: the first Parquet file cannot be read or lacks a column.
    """
    if format != "parquet":
        return TextFiles(files=files, unit=text_unit)
    _check_parquet(files[0], columns)
    return load_dataset(
        "parquet",
        data_files={"train": [str(path) for path in files]},
        split="train",
        streaming=True,
        columns=list(columns),
        batch_size=PARQUET_BATCH_ROWS,
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
            f"corpus {repo}@{commit[:8]}: it is not in the cache, and the Hub cannot be reached; check"
            " the network, or use corpus.files"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"corpus {repo}@{commit[:8]}: {' '.join(str(error).split())[:300]}"
        ) from None


def check_partitions(stream: IterableDataset | TextFiles, num_partitions: int) -> None:
    """See that each partition has a file to read.

    Raises:
        ValueError: there are fewer files than partitions.
    """
    if stream.num_shards < num_partitions:
        raise ValueError(
            f"output.partitions is {num_partitions}, but the corpus has fewer files ({stream.num_shards}); choose at most "
            f"{stream.num_shards} partitions"
        )


class Corpus:
    """The documents of one partition of a corpus. Iterate over it once; `offset` says how far it is."""

    def __init__(
        self,
        stream: IterableDataset | TextFiles,
        *,
        columns: Columns,
        without_last_answer: bool = False,
        format: LocalFormat | Literal["hub"] = "hub",
        file_names: tuple[str, ...] = (),
        partition: int = 0,
        num_partitions: int = 1,
        start: Offset | None = None,
        opening: Callable[[int], None] = lambda _: None,
        keeps: Callable[[str], bool] | None = None,
        counts_blank: bool = True,
    ) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            stream: from `open_local` or `open_hub`.
            columns: what columns mean; where there is none of ids, or it is null, these are hashes of the text, or of the chat.
            without_last_answer: end each chat where the assistant is to speak next, so that it is a prompt.
            format: what the stream's rows are; those of JSON lines are objects whose keys are the columns.
            file_names: names of the stream's files for messages.
            partition: which of `num_partitions` contiguous ranges of files to read.
            start: an offset that an earlier Corpus of the same stream reported.
            opening: told the number of each file before it is opened; what it raises ends the reading.
            keeps: says of a document's id whether it is one of those to read; the others are passed over, and counted in `passed_over`.
                None reads all.
            counts_blank: whether documents without content count as skipped.

        Raises:
            ValueError: there are fewer files than partitions.
        """
        check_partitions(stream, num_partitions)
        self.stream = stream
        self._columns = columns
        self._without_last_answer = without_last_answer
        self._format = format
        self._file_names = file_names
        first_file, self._end_file = (
            stream.num_shards * p // num_partitions for p in (partition, partition + 1)
        )
        start = start or dict.fromkeys(("row_group", "row", "documents", "skipped"), 0)
        self._file: int = start.get("file", first_file)
        self._row_group: int = start["row_group"]
        self._row: int = start["row"]
        # A document that goes on was counted, and is counted again when it is read again.
        self._documents: int = start["documents"] - ("chunk" in start)
        self._skipped: int = start["skipped"]
        self._opening = opening
        self._keeps, self._counts_blank = keeps, counts_blank
        self.passed_over = 0
        """Documents that are not to be read."""

    @property
    def offset(self) -> Offset:
        """Where to resume after the last document that was yielded."""
        return {
            "file": self._file,
            "row_group": self._row_group,
            "row": self._row,
            "documents": self._documents,
            "skipped": self._skipped,
        }

    @property
    def offset_of_last(self) -> Offset:
        """Where to read the last document that was yielded again."""
        return {**self.offset, "row": self._row - 1}

    def __iter__(self) -> Iterator[Document]:
        """Yield documents that are not empty; of chats those with an answer, or with something to be answered.

        Raises:
            ValueError: a file cannot be read as what it should be, or a column is missing or of another type.
        """
        while self._file < self._end_file:
            is_first_row = self._row_group == self._row == 0
            for row in self._rows_of_file():
                if is_first_row:
                    self._check_columns(row)
                    is_first_row = False
                document = self._document(row)
                if document is None:
                    self._skipped += self._counts_blank
                    continue
                if self._keeps and not self._keeps(document.id):
                    self.passed_over += 1
                    continue
                self._documents += 1
                yield document
            self._file, self._row_group = self._file + 1, 0

    def _document(self, row: dict[str, Any]) -> Document | None:
        text = row.get(self._columns.text if self._format == "lines" else "text")
        if isinstance(text, LongText):
            return None if text.is_blank else Document(id=text.sha256[:16], long_text=text)
        try:
            said = read_row(
                row,
                self._columns,
                are_prompts=self._without_last_answer,
                features=False if isinstance(self.stream, TextFiles) else self.stream.features,
            )
        except NotRead as error:
            raise ValueError(f"{self._where_exactly()}: {error}") from None
        if said is None:
            return None
        return Document(
            id=self._identify(row, said),
            text=said.text,
            prompt_length=said.prompt_length,
            messages=said.messages,
            tools=said.tools,
            documents=said.documents,
            options=said.options,
            learn_from=said.learn_from,
            notes=said.notes,
        )

    def _rows_of_file(self) -> Iterator[dict[str, Any]]:
        """The rows of the current file from the current place on."""
        for row in self._stream_of_file():
            stream = self.stream
            if not isinstance(stream, TextFiles) or stream.is_csv(self._file):
                yield row
                continue
            if self._row == 1 and stream.unit_of(self._file) == "line":
                row["text"] = row["text"].removeprefix("\ufeff")  # a byte order mark is no text
            if not stream.is_json(self._file):
                # Beside other files, the text stands where these have theirs.
                yield {self._columns.text: row["text"]} if self._format == "lines" else row
            elif line := row["text"].strip():
                yield self._parse(line)

    def _stream_of_file(self) -> Iterator[dict[str, Any]]:
        self._opening(self._file)
        if isinstance(self.stream, TextFiles):
            yield from self._rest_of(iter(self.stream.rows(self._file)))
            self._row = 0
            return
        with readable(self._where(), self._advice()):
            row_groups = self.stream.shard(self.stream.num_shards, self._file).reshard()
        while self._row_group < row_groups.num_shards:
            yield from self._rest_of(iter(row_groups.shard(row_groups.num_shards, self._row_group)))
            self._row_group, self._row = self._row_group + 1, 0

    def _rest_of(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of a file or row group from the current place on."""
        with readable(self._where(), self._advice()):
            next(itertools.islice(rows, self._row, self._row), None)  # what an earlier run has read
        while True:
            with readable(self._where(), self._advice()):
                row = next(rows, None)
            if row is None:
                return
            self._row += 1
            yield row

    def _parse(self, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not valid JSON ({error.msg} at column {error.colno})"
            if line.startswith("["):
                reason = "the beginning of a list"
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error})"
        else:
            if isinstance(row, dict):
                return row
            reason = kind_of(row)
        raise ValueError(
            f"{self._where_exactly()} is {reason}; expected one JSON object per line, with the key {self._columns.needed[0]!r}"
        )

    def _identify(self, row: dict[str, Any], said: Said) -> str:
        """The document's id, once it is known that it and what the row says can be written as UTF-8."""
        own = row.get(self._columns.id) if self._columns.id else None
        if not isinstance(own, str | int | None) or isinstance(own, bool):
            raise ValueError(
                f"{self._where_exactly()}: column {self._columns.id!r} holds {kind_of(own)}, expected text or a whole "
                "number; set corpus.id_column to another column, or leave it out to use hashes of the text as ids"
            )
        try:
            content = said.content.encode()
            str(own).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self._where_exactly()}: holds {error.object[error.start]!r}, half of a surrogate pair, which is not a character; replace it in the corpus, for example with \\ufffd"
            ) from None
        return hashlib.sha256(content).hexdigest()[:16] if own in (None, "") else str(own)

    def _check_columns(self, row: dict[str, Any]) -> None:
        for name in self._columns.needed:
            if name not in row:
                raise ValueError(f"{self._where()} {_no_column(name, row)}")

    def _where(self) -> str:
        if self._file < len(self._file_names):
            return f"corpus file {self._file_names[self._file]}"
        return f"corpus file number {self._file}"

    def _where_exactly(self) -> str:
        """With the line, or the row within its row group."""
        if isinstance(self.stream, TextFiles) and self.stream.is_json(self._file):
            return f"{self._where()} line {self._row:,}"
        group = f" of row group {self._row_group:,}" if self._row_group else ""
        return f"{self._where()} row {self._row:,}{group}"

    def _advice(self) -> str:
        if self._format == "hub":
            return "check the network, and run the command again"
        return "repair it, or leave it out"


@contextmanager
def readable(where: str, advice: str = "repair it, or leave it out") -> Iterator[None]:
    """Turn whatever a reader raises into one line that names the file and says what to do.

    Raises:
        ValueError: the line.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode(errors="replace")
        raise ValueError(
            f"{where} is not valid UTF-8 (byte 0x{error.object[error.start]:02x} after …{before!r}); convert the file to UTF-8, or leave it out"
        ) from None
    except (
        pa.ArrowException,
        ValueError,
        OSError,
        EOFError,
        csv.Error,
        zlib.error,
        ZstdError,
    ) as error:
        raise ValueError(f"{where} cannot be read ({first_line(error)}); {advice}") from None


def _check_parquet(path: Path, columns: tuple[str, ...]) -> None:
    with readable(f"corpus file {path.name}"):
        found = pq.read_schema(path).names
    for name in columns:
        if name not in found:
            raise ValueError(f"corpus file {path.name} {_no_column(name, found)}")


def _no_column(name: str, found: Iterable[str]) -> str:
    names = list(found)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"has no column {name!r}; its columns are {', '.join(names) or 'none'}{guess}; "
        "set corpus.text_column, corpus.messages_column or corpus.id_column to one of them"
    )
