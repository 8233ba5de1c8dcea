"""Every reader that the README names yields, value for value, what pyarrow reads from the files.

Rows are compared by document and chunk, so that a reader may also shuffle and split. Nothing here imports `builder` after the
datasets are built, and one test proves in a process of its own that nothing needs to.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset, load_from_disk

from tests.conftest import TINY_VOCAB_SIZE, recipe_text, sample_documents, write_jsonl

TOP_K = 20
DTYPES = {
    "input_ids": np.int32,
    "topk_indices": np.int32,
    "topk_logprobs": np.float16,
    "tail_logprob": np.float16,
    "target_logprob": np.float16,
    "logsumexp": np.float32,
    "entropy": np.float16,
    "tail_indices": np.int32,
    "tail_logprobs": np.float16,
}
SHAPED = ("topk_indices", "topk_logprobs", "tail_indices", "tail_logprobs")
Rows = dict[tuple[str, int], dict[str, Any]]


def stored(directory: Path) -> Rows:
    """What pyarrow alone reads, by document and chunk."""
    rows: Rows = {}
    for path in sorted((directory / "data").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            assert set(row) - {"text"} == {"id", "chunk_index", *DTYPES}
            arrays = {name: np.array(row[name], dtype) for name, dtype in DTYPES.items()}
            rows[row["id"], row["chunk_index"]] = row | arrays
    return rows


def assert_rows(found: Iterable[dict[str, Any]], expected: Rows) -> None:
    """Every row once, with equal values whatever types they come in, and rectangular [T, K]."""
    missing = set(expected)
    for row in found:
        key = str(row["id"]), int(row["chunk_index"])
        missing.remove(key)
        values = expected[key]
        assert row.get("text") == values.get("text")
        for name, dtype in DTYPES.items():
            value = row[name]
            if not isinstance(value, torch.Tensor) and name in SHAPED:
                value = np.stack([np.asarray(v) for v in value])  # pandas: an array of arrays
            array = np.asarray(value)
            assert array.shape == values[name].shape, name
            assert array.dtype.kind == np.dtype(dtype).kind or array.dtype == np.float64, name
            np.testing.assert_array_equal(array.astype(dtype), values[name], err_msg=name)
            assert not np.isnan(array).any()  # this tokenizer has an end-of-sequence token
    assert not missing


@pytest.fixture(autouse=True)
def _do_not_wait(monkeypatch):
    """`datasets` sleeps for 5 seconds at each end of a shuffled stream, for the sake of an older pyarrow."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def build(tiny_teacher_dir, tmp_path_factory) -> Callable[..., Path]:
    """Build a dataset of the given documents; `changes` as in recipe_text."""

    def make(documents: list[dict[str, Any]], **changes: str) -> Path:
        from builder.build.build import build
        from builder.recipe.file import load_recipe

        base = tmp_path_factory.mktemp("readers")
        write_jsonl(base / "corpus.jsonl", documents)
        recipe = recipe_text(tiny_teacher_dir, "corpus.jsonl", **changes)
        (base / "recipe.toml").write_text(recipe, encoding="utf-8")
        build(load_recipe(base / "recipe.toml"), base, base / "out")
        return base / "out"

    return make


@pytest.fixture(scope="module")
def rows(built) -> Rows:
    return stored(built)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def dataset(built, cache):
    return load_dataset(str(built), split="train", cache_dir=cache)


@pytest.fixture
def stream(built, cache):
    return load_dataset(str(built), split="train", streaming=True, cache_dir=cache)


# --- load_dataset ----------------------------------------------------------------------------------------------------------


def test_both_ways_of_loading_yield_every_row_in_order(dataset, stream, rows):
    assert len(dataset) == len(rows) > 40
    for found in (dataset, stream):
        assert_rows(found, rows)
        assert [(row["id"], row["chunk_index"]) for row in found] == list(rows)
        assert found.features == dataset.features


def test_the_only_split_is_train(built, cache):
    assert list(load_dataset(str(built), cache_dir=cache)) == ["train"]


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "map": lambda d: d.map(lambda row: {"length": len(row["input_ids"])}),
    "map in batches": lambda d: d.map(
        lambda batch: {"length": [len(ids) for ids in batch["input_ids"]]}, batched=True, batch_size=7
    ),
    "map that rewrites": lambda d: d.map(lambda row: dict(row)),
    "shuffle": lambda d: d.shuffle(seed=3),
    "filter nothing": lambda d: d.filter(lambda row: len(row["input_ids"]) > 0),
    "in two shards": lambda d: itertools.chain(d.shard(2, 1), d.shard(2, 0)),
    "columns and back": lambda d: d.rename_column("text", "t").rename_column("t", "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("streaming", [False, True])
def test_transformed_rows_are_the_same_rows(dataset, stream, rows, name, streaming):
    found = list(TRANSFORMS[name](stream if streaming else dataset))
    assert_rows(found, rows)
    if name.startswith("map "):
        assert all(
            row.get("length", len(row["input_ids"])) == len(row["input_ids"]) for row in found
        )
    if name == "shuffle":
        assert [(row["id"], row["chunk_index"]) for row in found] != list(rows)


def test_a_small_shuffle_buffer_loses_nothing(stream, rows):
    shuffled = stream.shuffle(seed=1, buffer_size=5)
    assert_rows(shuffled, rows)
    keys = [(row["id"], row["chunk_index"]) for row in shuffled]
    assert keys != list(rows)
    shuffled.set_epoch(1)
    assert [(row["id"], row["chunk_index"]) for row in shuffled] != keys


def chosen(rows: Rows, keys: Iterable[tuple[str, int]]) -> Rows:
    return {key: rows[key] for key in keys}


def test_selections(dataset, stream, rows):
    keys = list(rows)
    numbers = [5, 0, 17, 6, 40]
    assert_rows(dataset.select(numbers), chosen(rows, [keys[i] for i in numbers]))
    assert_rows(dataset.select(range(3, 9)), chosen(rows, keys[3:9]))
    assert_rows(stream.skip(3).take(6), chosen(rows, keys[3:9]))
    for data in (dataset, stream):
        long = data.filter(lambda row: len(row["input_ids"]) == 64)
        assert_rows(long, {k: r for k, r in rows.items() if len(r["input_ids"]) == 64})
    # Of a selection of a shuffle, again: indices upon indices.
    twice = dataset.shuffle(seed=0).select(range(20)).filter(lambda row: row["chunk_index"] == 0)
    assert_rows(twice, chosen(rows, [(row["id"], row["chunk_index"]) for row in twice]))
    assert 3 < len(twice) < 20


def test_train_and_test_part_share_nothing_and_hold_all(dataset, rows):
    parts = dataset.train_test_split(test_size=0.25, seed=0)
    assert len(parts["test"]) == -(-len(rows) // 4)
    assert_rows([*parts["train"], *parts["test"]], rows)


def test_saved_to_disk_and_loaded_again(dataset, rows, tmp_path):
    dataset.shuffle(seed=0).select(range(len(rows))).save_to_disk(tmp_path / "saved", num_shards=2)
    again = load_from_disk(tmp_path / "saved")
    assert again.features == dataset.features
    assert_rows(again, rows)
    assert again.with_format("torch")[0]["topk_logprobs"].shape[1] == TOP_K


# --- formats ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_torch_yields_tensors_of_the_shapes_that_the_readme_promises(
    dataset, stream, rows, streaming
):
    formatted = (stream if streaming else dataset).with_format("torch")
    assert_rows(formatted, rows)
    for row in formatted:
        length = len(row["input_ids"])
        for name, dtype in DTYPES.items():
            value = row[name]
            assert isinstance(value, torch.Tensor)
            width = 4 if name.startswith("tail") else TOP_K
            assert value.shape == ((length, width) if name in SHAPED else (length,))
            assert value.dtype == (torch.int64 if dtype == np.int32 else torch.float32)
    shuffled = formatted.shuffle(seed=2)
    assert next(iter(shuffled))["topk_indices"].shape[1] == TOP_K


def test_numpy_yields_arrays(dataset, stream, rows):
    for formatted in (dataset.with_format("numpy"), stream.with_format("numpy")):
        assert_rows(formatted, rows)
        row = next(iter(formatted))
        for name in DTYPES:
            assert isinstance(row[name], np.ndarray)
            assert row[name].ndim == (2 if name in SHAPED else 1)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of an Arrow column, without its lists: [total T] or [total T · K], a view of its combined chunks."""
    array = column.combine_chunks()
    if isinstance(array.type, pa.ExtensionType):
        array = array.storage
    while pa.types.is_list(array.type):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=True)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_keeps_the_stored_types_and_its_numbers_are_views(dataset, stream, rows, streaming):
    formatted = (stream if streaming else dataset).with_format("arrow")
    tables = list(formatted.iter(batch_size=9))
    keys = iter(rows)
    for table in tables:
        expected = [rows[next(keys)] for _ in range(table.num_rows)]
        for name, dtype in DTYPES.items():
            numbers = flat(table[name])
            assert numbers.dtype == dtype
            tensor = torch.from_numpy(numbers)
            assert tensor.data_ptr() == numbers.ctypes.data
            wanted = np.concatenate([row[name] for row in expected])
            np.testing.assert_array_equal(tensor.reshape(wanted.shape).numpy(), wanted)
    assert next(keys, None) is None


def test_a_data_loader_with_a_collate(dataset, rows):
    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True)
            for name in DTYPES
        }
        lengths = [len(row["input_ids"]) for row in batch]
        return padded | {"key": [(r["id"], int(r["chunk_index"])) for r in batch], "T": lengths}

    loader = torch.utils.data.DataLoader(
        dataset.with_format("torch"),
        batch_size=8,
        shuffle=True,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )
    found = []
    for batch in loader:
        assert batch["topk_logprobs"].shape[::2] == (len(batch["key"]), TOP_K)
        for number, ((name, chunk), length) in enumerate(
            zip(batch["key"], batch["T"], strict=True)
        ):
            row = {column: batch[column][number, :length] for column in DTYPES}
            text = rows[name, chunk]["text"]
            found.append({"id": name, "chunk_index": chunk, "text": text, **row})
    assert_rows(found, rows)


# --- other readers ---------------------------------------------------------------------------------------------------------


def with_duckdb(directory: Path) -> Iterable[dict[str, Any]]:
    with duckdb.connect() as connection:
        return connection.sql(f"FROM '{directory}/data/*.parquet'").to_arrow_table().to_pylist()


READERS: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
    "pyarrow": lambda directory: pq.read_table(directory / "data").to_pylist(),
    "pandas": lambda directory: pandas.read_parquet(directory / "data").to_dict("records"),
    "polars": lambda directory: polars.read_parquet(directory / "data" / "*.parquet").to_dicts(),
    "polars, lazily": lambda directory: polars.scan_parquet(directory / "data").collect().to_dicts(),
    "duckdb": with_duckdb,
}  # fmt: skip


@pytest.fixture(scope="module")
def compact(build) -> Path:
    return build(sample_documents(), output='profile = "compact"')


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_of_the_default_profile(built, rows, reader):
    assert_rows(READERS[reader](built), rows)


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "duckdb"])
def test_other_readers_of_the_compact_profile(compact, rows, reader):
    assert_rows(READERS[reader](compact), rows)


def test_the_compact_profile_holds_the_same_rows_for_datasets_too(compact, rows, cache):
    for streaming in (False, True):
        found = load_dataset(str(compact), split="train", streaming=streaming, cache_dir=cache)
        assert_rows(found.with_format("torch"), rows)


def test_duckdb_cannot_read_the_log_probs_of_the_compact_profile(compact):
    """As the README says. When this fails, DuckDB has learnt it: say so there, and make `compact` the default."""
    with pytest.raises(duckdb.Error, match=r"(?i)byte.stream.split"):
        with_duckdb(compact)
    with duckdb.connect() as connection:
        query = f"SELECT sum(len(topk_indices)) FROM '{compact}/data/*.parquet'"
        assert connection.execute(query).fetchall()[0][0] > 1000  # all other columns can be read


def test_duckdb_finds_what_a_query_asks_for(built, rows):
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT id, chunk_index, list_max(list_transform(topk_logprobs, lambda l: l[1])) AS surest "
            f"FROM '{built}/data/*.parquet' WHERE id = 'doc-7' ORDER BY chunk_index"
        ).fetchall()
    expected = {k: r["topk_logprobs"][:, 0].max() for k, r in rows.items() if k[0] == "doc-7"}
    assert {(name, chunk): np.float16(value) for name, chunk, value in found} == expected


# --- the files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["default", "compact"])
def test_the_files_of_a_build_are_as_declared(built, compact, profile):
    """Small row groups, zstd, the declared encodings, a page index, no nulls; columns in order."""
    split = {"topk_indices", "tail_indices"}
    if profile == "compact":
        split |= {"topk_logprobs", "tail_logprobs"}
    for path in (compact if profile == "compact" else built).glob("data/*.parquet"):
        file = pq.ParquetFile(path)
        assert file.schema_arrow.names[-1] == "tail_logprobs"
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            names = [group.column(i).path_in_schema.split(".")[0] for i in range(group.num_columns)]
            assert names == file.schema_arrow.names
            for i, name in enumerate(names):
                column = group.column(i)
                assert column.compression == "ZSTD"
                assert ("BYTE_STREAM_SPLIT" in column.encodings) == (name in split)
                assert column.has_offset_index
        table = file.read()
        for name in table.column_names:
            array = table[name].combine_chunks()
            while True:
                assert array.null_count == 0
                if not pa.types.is_list(array.type):
                    break
                array = array.flatten()


# --- small and odd datasets ------------------------------------------------------------------------------------------------

ODD = {
    "one token": ([{"id": "a", "text": "a"}], {}, 1, TOP_K),
    "without text": (sample_documents(6), {"output": "text = false"}, None, TOP_K),
    "top_k 1": (sample_documents(6), {"output": "top_k = 1"}, None, 1),
    "the whole vocabulary": (
        sample_documents(4),
        {"output": f"top_k = {TINY_VOCAB_SIZE}"},
        None,
        TINY_VOCAB_SIZE,
    ),
}


@pytest.mark.parametrize(("documents", "changes", "length", "top_k"), ODD.values(), ids=ODD)
def test_odd_datasets_load_too(build, cache, documents, changes, length, top_k):
    directory = build(documents, **changes)
    rows = stored(directory)
    assert all(row["topk_logprobs"].shape[1] == top_k for row in rows.values())
    assert ("text" in next(iter(rows.values()))) == (
        "text = false" not in changes.get("output", "")
    )
    for reader in READERS.values():
        assert_rows(reader(directory), rows)
    for streaming in (False, True):
        found = load_dataset(str(directory), split="train", streaming=streaming, cache_dir=cache)
        assert_rows(found, rows)
        assert_rows(found.with_format("torch").shuffle(seed=0), rows)
        shape = next(iter(found.with_format("torch")))["topk_logprobs"].shape
        assert shape[1] == top_k
        assert length in (None, shape[0])


PLAIN = """
import sys
from datasets import load_dataset
for streaming in (False, True):
    data = load_dataset(sys.argv[1], split="train", streaming=streaming, cache_dir=sys.argv[2])
    row = next(iter(data.with_format("torch")))
    assert row["topk_logprobs"].shape == (len(row["input_ids"]), 20)
    print(row["id"], tuple(row["topk_indices"].shape), sum(len(row["input_ids"]) for row in data))
assert not any(name.partition(".")[0] == "builder" for name in sys.modules)
"""


def test_a_plain_process_needs_no_code_of_ours(built, rows, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PLAIN, str(built), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # where there is no package `builder`
        env={**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    tokens = sum(len(row["input_ids"]) for row in rows.values())
    length = len(rows["doc-0", 0]["input_ids"])
    assert result.stdout == f"doc-0 ({length}, 20) {tokens}\n" * 2
