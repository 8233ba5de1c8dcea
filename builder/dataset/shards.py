"""Rows → Parquet files, each all there or not there at all; and back.

In:   Blocks: the sequences of some consecutive rows, with the distribution of all their positions.
Out:  one Parquet file a shard, written under a temporary name, fsynced, then renamed.

Sizes: see README. Columns of indices are split into byte streams before zstd (their high bytes are nearly constant); the profile
       `compact` also splits those of several float16 values a token, which DuckDB cannot read. Every page has a CRC-32: 0.005 % of the bytes.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logit_dataset.files import column_name, footer_bytes
from logit_dataset.schema import Layout, arrow_schema

if TYPE_CHECKING:  # readers of shards need neither torch nor a tokenizer
    import torch

    from builder.corpus.sequences import Sequence

ROW_GROUP_TOKENS = 32_768
"""Rows are grouped up to this many tokens: about 5 MB, so the first streamed row is cheap."""
MAX_LIST_VALUES = 2**25
"""Values of a [T, K] column in a row group, far below Arrow's 2^31 for 32-bit list offsets."""
MAX_ROW_VALUES = 2**31 - 1
"""Values that a row can have in a column: those very offsets."""
ZSTD_LEVEL = 3
OF_SEQUENCES = {"input_ids": "token_ids", "completion_mask": "completion_mask"}
"""Columns that come from attributes of a sequence; the others are of its distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive rows."""

    sequences: list["Sequence"]
    distribution: Mapping[str, "torch.Tensor"]
    """Columns of all positions of all sequences, in order, on the CPU; with `completions_only`, columns of several values a token are of
    positions in the loss mask only."""


def parquet_writer(sink: pa.NativeFile | Path, schema: pa.Schema, profile: str) -> pq.ParquetWriter:
    """A writer with the codec and encodings of a profile, `default` or `compact`."""
    split = [pa.int32(), pa.float16()] if profile == "compact" else [pa.int32()]
    encodings = {
        f"{field.name}.list.element.list.element": "BYTE_STREAM_SPLIT"
        for field in schema
        if field.type in [pa.list_(pa.list_(kind)) for kind in split]
    }
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=["id"],
        column_encoding=encodings,
        write_page_index=True,
        write_page_checksum=True,
        write_statistics=["id", "chunk_index"],
    )


def column_bytes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Compressed bytes of each column of a Parquet file."""
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column_name(column.path_in_schema)
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


class ShardWriter:
    """Writes the blocks of one shard to an open file, on a thread of its own."""

    def __init__(
        self,
        sink: pa.NativeFile,
        *,
        layout: Layout,
        profile: str,
        metadata: dict[str, str],
        seen: Callable[[Block], None] = lambda _: None,
    ) -> None:
        """Start a Parquet file.

        Args:
            sink: the file.
            layout: what the rows hold.
            profile: `default` or `compact`.
            metadata: its key–value metadata.
            seen: told of each block before it is written, on the writer's thread.
        """
        self._seen = seen
        self._schema = arrow_schema(layout).with_metadata(metadata)
        self._completions_only = layout.completions_only
        self._row_group_tokens = min(ROW_GROUP_TOKENS, MAX_LIST_VALUES // layout.widest)
        self._writer = parquet_writer(sink, self._schema, profile)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-writer")
        self._writing: Future[None] | None = None
        self._in_use = Lock()  # held while the Parquet writer works

    def write(self, block: Block | Callable[[], Block]) -> None:
        """Append rows, or the rows that a call makes, while the caller goes on; `seen` is told of them on the writer's thread.

        Waits for the block before, so that no more than two are in memory, and raises what went wrong with it.
        """
        self.finish()
        self._writing = self._thread.submit(self._make_and_write, block)

    def finish(self) -> None:
        """Wait until everything so far is written; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()

    def _make_and_write(self, block: Block | Callable[[], Block]) -> None:
        made = block if isinstance(block, Block) else block()
        self._seen(made)
        with self._in_use:
            if self._writer.is_open:
                self._write_block(made)

    def _write_block(self, block: Block) -> None:
        """Append rows, in row groups of at most ROW_GROUP_TOKENS tokens (or one row)."""
        first_row, num_tokens = 0, 0
        for row, sequence in enumerate(block.sequences):
            length = len(sequence.token_ids)
            if row > first_row and num_tokens + length > self._row_group_tokens:
                self._write_rows(block, slice(first_row, row))
                first_row, num_tokens = row, 0
            num_tokens += length
        self._write_rows(block, slice(first_row, len(block.sequences)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the footer. After a failure the file is worthless, and only its buffers are let go."""
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()
            failed = kind is not None or (self._writing is not None and self._writing.exception())
            # A Ctrl-C while the thread starts leaves one at work for which shutdown does not wait.
            with self._in_use:
                try:
                    with suppress(OSError, pa.ArrowException) if failed else nullcontext():
                        self._writer.close()
                finally:
                    # One whose closing failed would try it again when it is collected.
                    self._writer.is_open = False

    def _write_rows(self, block: Block, rows: slice) -> None:
        sequences = block.sequences[rows]
        tokens, token_offsets = _places([len(s.token_ids) for s in block.sequences], rows)
        kept, kept_offsets = tokens, token_offsets
        if self._completions_only:
            kept, kept_offsets = _places([len(s.loss_positions) for s in block.sequences], rows)
        per_row = {
            "id": [s.document_id for s in sequences],
            "chunk_index": [s.chunk_index for s in sequences],
            "text": [s.text for s in sequences],
        }
        arrays = []
        for field in self._schema:
            if field.name in per_row:
                arrays.append(pa.array(per_row[field.name], type=field.type))
            elif attribute := OF_SEQUENCES.get(field.name):
                flat = np.concatenate([getattr(s, attribute) for s in sequences])
                values = pa.array(flat, type=field.type.value_type)
                arrays.append(_lists(token_offsets, values))
            elif block.distribution[field.name].ndim == 1:
                flat = block.distribution[field.name][tokens].numpy()
                arrays.append(_lists(token_offsets, pa.array(flat)))
            else:
                values_CK = block.distribution[field.name][kept].numpy()
                arrays.append(_lists(kept_offsets, _lists_of_equal_length(values_CK)))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(sequences))


@contextmanager
def atomic_file(path: Path, *, writer: str = "") -> Iterator[pa.NativeFile]:
    """A file to write that appears under its name only when all of it is on the disk.

    Several processes may write the same file at once if each gives a `writer` of its own: the last one's stays.
    """
    partial = path.with_name(f".{path.name}{writer and '.' + writer}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink:
            yield sink
        _fsync(partial)
        os.replace(partial, path)
        _fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def footer_sha256(path: Path) -> str:
    """SHA-256 of a Parquet file's footer, in hex."""
    with path.open("rb") as file:
        return hashlib.sha256(footer_bytes(file)).hexdigest()


def nested_values(
    column: pa.ChunkedArray | pa.Array,
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The numbers of a list column, without its lists: [total T] or [total T, K], zero-copy where Arrow allows it. Where there are no
    lists, nothing says how long they would be: [0, 0]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    depth_sizes = []
    while pa.types.is_list(array.type):
        depth_sizes.append(len(array))
        array = array.flatten()
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = array.to_numpy(zero_copy_only=False)
    if len(depth_sizes) < 2:
        return values
    return values.reshape(depth_sizes[1], -1) if depth_sizes[1] else values.reshape(0, 0)


def _places(
    lengths: list[int], rows: slice
) -> tuple[slice, np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Where the values of some rows stand among those of all, and where among these the values of each begin and end."""
    start = sum(lengths[: rows.start])
    offsets = np.cumsum([0, *lengths[rows]], dtype=np.int32)
    return slice(start, start + int(offsets[-1])), offsets


def _lists(offsets: np.ndarray[tuple[int], np.dtype[np.int32]], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def _lists_of_equal_length(
    values_CK: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> pa.ListArray:
    """[C, K] numbers as C lists."""
    count, k = values_CK.shape
    flat = pa.array(values_CK.reshape(-1))
    return _lists(np.arange(0, count * k + 1, k, dtype=np.int32), flat)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
