"""Rows go into Parquet files as they are, whole or not at all, and come back."""

import gc
import hashlib
import io
import os
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from builder.corpus.sequences import Sequence
from builder.dataset import shards
from builder.dataset.shards import Block, ShardWriter, atomic_file, file_sha256, nested_values
from logit_dataset.schema import Layout, arrow_schema, columns

EVERYTHING = {"tail_samples": 5, "temperatures": (0.5,), "hidden_states": True, "hidden_size": 6}
WHOLE = {"top_k": "all", "vocab_size": 9}


def block(*lengths: int, seed: int = 0, **layout) -> Block:
    """Rows of these lengths with values that nothing else has."""
    generator = torch.Generator().manual_seed(seed)
    wanted, total, values = Layout(**{"top_k": 3, **layout}), sum(lengths), {}
    for column in columns(wanted):
        if column.shape and column.name != "input_ids":
            shape = (total, wanted.width(column)) if "," in column.shape else (total,)
            integers = torch.randint(2**31 - 1, shape, generator=generator, dtype=torch.int32)
            floats = torch.randn(shape, generator=generator)
            dtype = getattr(torch, column.dtype)
            values[column.name] = floats.to(dtype) if dtype.is_floating_point else integers
    values["target_logprob"][-1] = torch.nan
    sequences = [
        Sequence(
            document_id=f"d{row}",
            chunk_index=row,
            text=f"text {row} ü",
            token_ids=torch.randint(2**31 - 1, (length,), generator=generator).tolist(),
            next_token=0,
        )
        for row, length in enumerate(lengths)
    ]
    return Block(sequences=sequences, distribution=values)


def write(path, *blocks: Block, profile: str = "default", **layout) -> pq.ParquetFile:
    wanted = Layout(**{"top_k": 3, **layout})
    options = {"layout": wanted, "profile": profile, "metadata": {"key": "value ü"}}
    with pa.OSFile(str(path), "wb") as sink, ShardWriter(sink, **options) as writer:
        for one in blocks:
            writer.write(one)
    return pq.ParquetFile(path)


@pytest.mark.parametrize(
    "layout",
    [
        *({"text": True}, {"text": False}, {"top_k": 1}),
        *(EVERYTHING, WHOLE, WHOLE | EVERYTHING | {"tail_samples": 0}),
    ],
)
def test_every_value_comes_back_in_its_row_bit_by_bit(tmp_path, layout):
    blocks = [block(4, 1, 7, **layout), block(1, seed=1, **layout), block(2, 2, **layout)]
    file = write(tmp_path / "x.parquet", *blocks, **layout)
    assert file.schema_arrow.equals(arrow_schema(Layout(**layout)))
    assert file.schema_arrow.metadata[b"key"] == "value ü".encode()
    table = file.read()
    sequences = [sequence for one in blocks for sequence in one.sequences]
    assert table.num_rows == len(sequences)
    assert table["id"].to_pylist() == [s.document_id for s in sequences]
    assert table["chunk_index"].to_pylist() == [s.chunk_index for s in sequences]
    assert table["input_ids"].to_pylist() == [s.token_ids for s in sequences]
    assert ("text" in table.column_names) == layout.get("text", True)
    if "text" in table.column_names:
        assert table["text"].to_pylist() == [s.text for s in sequences]
    for name in blocks[0].distribution:
        column = table[name]
        expected = torch.cat([one.distribution[name] for one in blocks]).numpy()
        found = nested_values(column)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
        assert [len(row) for row in column.to_pylist()] == [len(s.token_ids) for s in sequences]
        assert column.null_count == column.combine_chunks().flatten().null_count == 0


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((10, 10, 10), [1, 1, 1]),
        ((5, 5, 1), [2, 1]),
        ((3, 3, 3, 3, 3), [3, 2]),
        ((99,), [1]),  # a row alone may exceed the limit
        ((1, 99, 1), [1, 1, 1]),
        ((2, 99), [1, 1]),
    ],
)
def test_row_groups_have_at_most_so_many_tokens_or_one_row(
    tmp_path, monkeypatch, lengths, expected
):
    monkeypatch.setattr(shards, "ROW_GROUP_TOKENS", 10)
    whole = block(*lengths)
    file = write(tmp_path / "x.parquet", whole)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == expected
    found = nested_values(file.read()["logsumexp"])
    np.testing.assert_array_equal(found, whole.distribution["logsumexp"].numpy())


def test_a_large_k_makes_row_groups_smaller(tmp_path, monkeypatch):
    """So that 32-bit list offsets never overflow."""
    monkeypatch.setattr(shards, "MAX_LIST_VALUES", 12)
    file = write(tmp_path / "x.parquet", block(2, 2, 2, 2, top_k=3))
    assert file.num_row_groups == 2
    assert shards.MAX_LIST_VALUES == 12
    monkeypatch.undo()
    assert shards.MAX_LIST_VALUES * 4 < 2**31


@pytest.mark.parametrize("profile", ["default", "compact"])
@pytest.mark.parametrize("layout", [{}, EVERYTHING, WHOLE])
def test_compression_encodings_and_indices_are_the_declared_ones(tmp_path, profile, layout):
    blocks = [block(40, 60, **layout), block(30, **layout)]
    file = write(tmp_path / "x.parquet", *blocks, profile=profile, **layout)
    split = {"topk_indices", "tail_indices"}
    if profile == "compact":
        split |= {"topk_logprobs", "tail_logprobs", "logprobs", "hidden_states"}
    for group in range(file.num_row_groups):
        row_group = file.metadata.row_group(group)
        assert row_group.num_columns == len(columns(Layout(**layout)))
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            name = chunk.path_in_schema.removesuffix(".list.element").removesuffix(".list.element")
            assert chunk.compression == "ZSTD"
            assert chunk.has_offset_index
            assert ("BYTE_STREAM_SPLIT" in chunk.encodings) == (name in split), name
            assert chunk.has_dictionary_page == (name == "id"), name
            assert chunk.is_stats_set == (name in ("id", "chunk_index")), name


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, block(5, 6), block(7, seed=3))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert file_sha256(tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [None, b"what was there before"])
def test_a_failure_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "x.parquet"
    if old:
        path.write_bytes(old)
    with pytest.raises(error, match="at the end"), atomic_file(path) as sink:  # noqa: PT012
        writer = ShardWriter(sink, layout=Layout(top_k=3), profile="default", metadata={})
        with writer:
            writer.write(block(3))
            assert [p.name for p in tmp_path.iterdir() if p != path] == [".x.parquet.partial"]
            raise error("at the end")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_file_appears_under_its_name_only_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    (tmp_path / ".x.partial").write_bytes(b"left over from a process that was killed, and longer")
    (tmp_path / "x").write_bytes(b"old")
    with atomic_file(tmp_path / "x") as sink:
        sink.write(b"new")
        assert (tmp_path / "x").read_bytes() == b"old"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the directory


class Disk(io.BytesIO):
    """One that can be full."""

    is_full = False

    def write(self, content) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("reason", [None, ValueError("the teacher yields NaN")])
def test_a_full_disk_is_an_error_but_does_not_hide_an_earlier_one(reason):
    def write() -> None:
        disk = Disk()
        options = {"layout": Layout(), "profile": "default", "metadata": {}}
        with ShardWriter(pa.PythonFile(disk, mode="w"), **options):
            disk.is_full = True
            if reason:
                raise reason

    with pytest.raises(type(reason or OSError()), match=str(reason or "No space left")):
        write()


def test_a_writer_whose_closing_failed_is_not_closed_again_when_it_is_collected(
    tmp_path, monkeypatch
):
    """That would raise where nobody can catch it, in the middle of whatever runs then."""
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)

    def write() -> None:
        options = {"layout": Layout(), "profile": "default", "metadata": {}}
        with (
            monkeypatch.context() as patch,
            atomic_file(tmp_path / "x") as sink,
            ShardWriter(sink, **options),
        ):
            patch.setattr(pq.ParquetWriter, "close", lambda self: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        write()
    gc.collect()
    assert not raised


def test_an_interrupt_while_the_thread_starts_does_not_close_under_it(tmp_path, monkeypatch):
    """The pool does not know a thread whose start was interrupted, and so does not wait for it."""
    is_writing, events = threading.Event(), []
    start, close = threading.Thread.start, pq.ParquetWriter.close

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        is_writing.wait()
        raise KeyboardInterrupt

    def slow(*_: object) -> None:
        is_writing.set()
        time.sleep(0.2)
        events.append("written")

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(ShardWriter, "_write_block", slow)
    monkeypatch.setattr(pq.ParquetWriter, "close", lambda w: events.append("closed") or close(w))
    options = {"layout": Layout(top_k=3), "profile": "default", "metadata": {}}
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_file(tmp_path / "x") as sink,
        ShardWriter(sink, **options) as writer,
    ):
        writer.write(block(3))
    assert events == ["written", "closed"]


FLAT = [[1, 2], [3], [4, 5, 6], [7]]
NESTED = [[[1, 2], [3, 4]], [[5, 6]], [[7, 8], [9, 10], [11, 12]], [[13, 14]]]


def as_array(rows: list, depth: int, form: str) -> tuple[pa.Array | pa.ChunkedArray, list]:
    """Rows in one of the forms in which Arrow hands out columns, and the rows that are really in it."""
    type_ = pa.int32()
    for _ in range(depth):
        type_ = pa.list_(type_)
    whole = pa.array(rows, type_)
    return {
        "whole": lambda: (whole, rows),
        "slice": lambda: (whole.slice(1, 2), rows[1:3]),
        "chunks": lambda: (pa.chunked_array([whole, whole.slice(2), whole.slice(0, 1)]), [*rows, *rows[2:], rows[0]]),
        "slice of chunks": lambda: (pa.chunked_array([whole, whole]).slice(3, 3), [rows[3], rows[0], rows[1]]),
        "empty chunk first": lambda: (pa.chunked_array([whole.slice(0, 0), whole.slice(2, 1)]), rows[2:3]),
        "taken": lambda: (whole.take(pa.array([3, 0, 2])), [rows[3], rows[0], rows[2]]),
    }[form]()  # fmt: skip


FORMS = ["whole", "slice", "chunks", "slice of chunks", "empty chunk first", "taken"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "depth"), [(FLAT, 1), (NESTED, 2), ([1, 2, 3, 4], 0)])
def test_numbers_of_a_column_without_its_lists(rows, depth, form):
    column, inside = as_array(rows, depth, form)
    expected = [value for row in inside for value in row] if depth else inside
    found = nested_values(column)
    assert found.dtype == np.int32
    assert found.tolist() == expected


def test_numbers_of_a_column_without_rows():
    assert nested_values(pa.array([], pa.list_(pa.int32()))).shape == (0,)
    assert nested_values(pa.chunked_array([], pa.list_(pa.int32()))).shape == (0,)


def test_numbers_are_views_where_arrow_allows_it():
    column = pa.array(NESTED, pa.list_(pa.list_(pa.int32())))
    address = column.flatten().flatten().buffers()[1].address
    assert nested_values(column).ctypes.data == address


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "x"
    with atomic_file(path, writer="a") as first:
        first.write(b"same ")
        with atomic_file(path, writer="b") as second:
            second.write(b"same bytes")
        assert path.read_bytes() == b"same bytes"
        first.write(b"bytes")
        first.flush()
        assert path.read_bytes() == b"same bytes"
    assert path.read_bytes() == b"same bytes"
    assert list(tmp_path.iterdir()) == [path]
