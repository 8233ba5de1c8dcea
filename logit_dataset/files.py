"""What a manifest says of a dataset's files → open Parquet files that are found to be just that.

In:   a directory or a commit on the Hub, and the manifest.
Out:  Parquet files, each compared with its record; what differs is an error that names the file, and is never read as other values.

How:  1. At the start, of every file: its size, and the SHA-256 of its footer, which says where everything is. Then what the footer says: columns,
         build, rows, tokens and number of values, before anything is unpacked.
      2. Whenever a page is read, from the disk or the Hub: the CRC-32 that was written with it.
      3. A file of an older dataset has neither 2 nor a footer's hash in its record. Instead the SHA-256 of the whole file is compared at
         the start. One that is streamed is never here as a whole, so that it is known by its size and numbers only.

Cost: 1 is one request of 128 kB a file; 2 a twentieth of the time of decoding; 3 a second for 1.8 GB on a core.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from logit_dataset.rows import RowGroup, token_columns
from logit_dataset.schema import SCHEMA_VERSION, SPLITS, TRAIN, Column, Layout, columns

LIKELY_FOOTER_BYTES = 2**17
"""Read at once: what most footers have at most."""

MAX_GROUP_VALUES = 2**27
"""Values of a column that a row group may have: 512 MB of int32, four times what is ever written unless one row has more. And bytes of
its ids of documents."""


class Source(Protocol):
    """Where the files of a dataset are. Has to survive pickling: the processes of a DataLoader get it so."""

    def open(self, name: str) -> Any:
        """The path of a file, or the file itself, open for reading."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Files on the disk."""

    path: Path

    def open(self, name: str) -> str:
        """The path of a file."""
        return str(self.path / name)


class Commit:
    """Files of a commit on the Hub, read there."""

    def __init__(self, repo: str, commit: str) -> None:
        """Ask for nothing yet."""
        self.repo, self.commit = repo, commit
        self._hub: Any = None

    def open(self, name: str) -> Any:
        """A file to read from anywhere in it, without fetching all of it."""
        if self._hub is None:
            from huggingface_hub import HfFileSystem

            self._hub = HfFileSystem()
        return self._hub.open(f"datasets/{self.repo}@{self.commit}/{name}", "rb")

    def __reduce__(self) -> tuple[Any, ...]:
        return Commit, (self.repo, self.commit)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest says of a data file, as far as a reader compares it."""

    file: str
    sha256: str
    bytes: int
    rows: int
    tokens: int
    footer_sha256: str | None = None
    """None of a file whose pages have no checksums."""
    split: str = TRAIN

    @classmethod
    def of(cls, shard: Mapping[str, Any]) -> Self:
        """Read from a shard's record.

        Raises:
            ValueError: a value is missing or makes no sense.
        """
        for name in ("bytes", "rows", "tokens"):
            if not isinstance(shard[name], int) or shard[name] < 1:
                raise ValueError(f"{shard['file']!r} has {name} = {shard[name]!r}")
        hashes = {"sha256": shard["sha256"], "footer_sha256": shard.get("footer_sha256")}
        for name, value in hashes.items():
            if not isinstance(value, str) and (name == "sha256" or value is not None):
                raise ValueError(f"{shard['file']!r} has {name} = {value!r}")
        numbers = {name: shard[name] for name in ("bytes", "rows", "tokens")}
        split = shard.get("split") or TRAIN
        if split not in SPLITS:
            raise ValueError(f"{shard['file']!r} has split = {split!r}")
        return cls(file=shard["file"], split=split, **hashes, **numbers)


class DifferentFile(ValueError):
    """A file is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class Files:
    """The data files of a dataset, by their names."""

    source: Source
    footers: Mapping[str, pq.FileMetaData]

    def open(self, name: str) -> pq.ParquetFile:
        """A file to read row groups from; each page is compared with its checksum.

        Raises:
            OSError: it cannot be read.
        """
        return pq.ParquetFile(
            self.source.open(name), metadata=self.footers[name], page_checksum_verification=True
        )


def read_footer(
    source: Source, record: FileRecord, *, check_hashes: bool | None = None
) -> pq.FileMetaData:
    """The footer of a file that has the size and hashes of its record.

    Args:
        source: where the file is.
        record: of the file.
        check_hashes: whether a file on the disk must have its record's hash; None for one whose pages have no checksums.

    Raises:
        DifferentFile: it has another size or hash.
        OSError, ValueError: it cannot be read.
    """
    name, opened = record.file, source.open(record.file)
    if check_hashes is None:
        check_hashes = record.footer_sha256 is None
    with Path(opened).open("rb") if isinstance(opened, str) else opened as file:
        size = file.seek(0, os.SEEK_END)
        if size != record.bytes:
            raise DifferentFile(f"{name} has {size:,} bytes, the manifest says {record.bytes:,}")
        if check_hashes and isinstance(source, Directory):
            file.seek(0)
            _compare(name, hashlib.file_digest(file, "sha256").hexdigest(), record.sha256)
        footer = footer_bytes(file)
    if record.footer_sha256 is not None:
        # Before it is parsed: pyarrow does not survive every wrong one.
        _compare(f"{name}'s footer", hashlib.sha256(footer).hexdigest(), record.footer_sha256)
    return pq.read_metadata(pa.BufferReader(footer))


def footer_bytes(file: IO[bytes]) -> bytes:
    """The end of a Parquet file: its metadata, their length, and what marks it as one.

    Raises:
        ValueError: it is not a Parquet file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LIKELY_FOOTER_BYTES))
    end = file.read(LIKELY_FOOTER_BYTES)
    length = int.from_bytes(end[-8:-4], "little") + 8
    if end[-4:] != b"PAR1" or length > size:
        raise ValueError("it is not a Parquet file, or not all of one")
    if length > len(end):
        file.seek(size - length)
        end = file.read(length)
    return end[-length:]


def _compare(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise DifferentFile(
            f"{what} has the SHA-256 {found[:12]}…, the manifest says {expected[:12]}…"
        )


def check_footer(
    footer: pq.FileMetaData, record: FileRecord, layout: Layout, row_fingerprint: str
) -> None:
    """Compare a file with what the manifest says of it, as far as its footer tells.

    Args:
        footer: of the file.
        record: of the file.
        layout: of the dataset.
        row_fingerprint: of the build.

    Raises:
        DifferentFile: it is another file, or damaged, or more would be unpacked than the manifest says.
    """
    try:
        problem = _difference(footer, record, layout, row_fingerprint)
    except (ValueError, LookupError, OSError, pa.ArrowException) as error:  # of a damaged footer
        problem = f"cannot be read ({first_line(error)})"
    if problem:
        raise DifferentFile(f"{record.file} {problem}")


def row_groups(name: str, footer: pq.FileMetaData) -> list[RowGroup]:
    """The row groups of a file, in stored order."""
    leaf = _leaves(footer)["input_ids"]
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    return [
        RowGroup(
            file=name,
            index=index,
            num_rows=group.num_rows,
            num_tokens=group.column(leaf).num_values,
        )
        for index, group in enumerate(groups)
    ]


def first_line(error: BaseException) -> str:
    """Of its message; its type, if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _leaves(footer: pq.FileMetaData) -> dict[str, int]:
    """Where the values of each column are."""
    return {column_name(footer.schema.column(i).path): i for i in range(footer.num_columns)}


def column_name(path: str) -> str:
    """The column whose values are at a path of a Parquet file: `logsumexp_t0.5` of `logsumexp_t0.5.list.element`."""
    return re.sub(r"(\.list\.(element|item))+$", "", path)


def _difference(
    footer: pq.FileMetaData, record: FileRecord, layout: Layout, row_fingerprint: str
) -> str | None:
    try:
        known = token_columns(footer.schema.to_arrow_schema(), layout)
    except ValueError as error:
        return f"is not of schema {SCHEMA_VERSION}: {first_line(error)}"
    found = (footer.metadata or {}).get(b"logit_dataset.row_fingerprint", b"").decode()
    if found != row_fingerprint:
        return f"belongs to the build {found[:12] or 'of an unknown recipe'}, the manifest is of {row_fingerprint[:12]}"
    groups = row_groups(record.file, footer)
    rows, tokens = sum(g.num_rows for g in groups), sum(g.num_tokens for g in groups)
    if (rows, tokens) != (record.rows, record.tokens):
        return f"has {rows:,} rows of {tokens:,} tokens, the manifest says {record.rows:,} of {record.tokens:,}"
    of_layout, leaves = {column.name: column for column in columns(layout)}, _leaves(footer)
    for group in groups:
        for name in ("id", "chunk_index", *known):
            chunk = footer.row_group(group.index).column(leaves[name])
            least, most = _limits(of_layout.get(name), group, layout)
            if not least <= chunk.num_values <= most:
                return (
                    f"is damaged, row group {group.index}: {name} has {chunk.num_values:,} values, expected "
                    f"{'' if least == most else f'{least:,} to '}{most:,}"
                )
            if name == "id" and chunk.total_uncompressed_size > MAX_GROUP_VALUES:
                return (
                    f"is not read, row group {group.index}: its ids take {chunk.total_uncompressed_size:,} bytes, at most "
                    f"{MAX_GROUP_VALUES:,} are unpacked"
                )
    return None


def _limits(column: Column | None, group: RowGroup, layout: Layout) -> tuple[int, int]:
    """How many values a column of a row group can have, at least and at most; `column` is None of one that the schema does not know."""
    if column is None:
        return 0, MAX_GROUP_VALUES
    number = group.num_tokens * layout.width(column) if column.shape else group.num_rows
    is_cut = column.shape.startswith("C")
    if is_cut:  # of some rows nothing is kept, and an empty list counts as a value
        number += group.num_rows
    if group.num_rows > 1:
        number = min(number, MAX_GROUP_VALUES)
    return 0 if is_cut else number, number
