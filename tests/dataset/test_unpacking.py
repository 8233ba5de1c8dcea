"""Row groups that unpack to more than their size can hold are not unpacked."""

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.card.charts import measure_file
from builder.dataset import unpacking
from builder.dataset.lookup import read_row
from builder.dataset.unpacking import check_unpacked_size
from builder.verify.verify import verify
from tests.verify.forging import lie

MANY = 1_000_000


def look_at(path: Path) -> None:
    footer = pq.read_metadata(path)
    for group in range(footer.num_row_groups):
        check_unpacked_size(path, footer, group)


BOMBS = {
    "zeros in a list": pa.array([np.zeros(MANY, np.int32)]),
    "zeros in rows": pa.array(np.zeros(2 * MANY, np.int32)),
    "a long text again and again": pa.array(["x" * 10_000] * 1_000),
    "lists without values": pa.ListArray.from_arrays(
        pa.array(np.zeros(2 * MANY + 1, np.int32)), pa.array([], pa.int32())
    ),
}


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"use_byte_stream_split": ["x"], "use_dictionary": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch, name, options):
    monkeypatch.setattr(unpacking, "MAX_BYTES", 2**22)
    if "use_byte_stream_split" in options and name != "zeros in rows":
        pytest.skip("of numbers in rows only")
    path = tmp_path / "x.parquet"
    table = pa.table({"x": BOMBS[name]})
    pq.write_table(table, path, compression="zstd", row_group_size=10**9, **options)
    assert path.stat().st_size < 50_000
    with pytest.raises(
        ValueError, match=r"row group 0 unpacks from [\d,]+ bytes to [\d,]+, which no"
    ):
        look_at(path)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY"])
def test_an_encoding_in_which_texts_repeat_each_other_is_refused(tmp_path, encoding):
    table = pa.table({"x": ["x" * 1000] * 100})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, column_encoding={"x": encoding})  # fmt: skip
    with pytest.raises(ValueError, match=f"column x is encoded as {encoding}, which is not known"):
        look_at(tmp_path / "x.parquet")


def test_pages_that_say_more_than_the_footer_are_refused(tmp_path):
    """Decoders believe the page: its count of values is a number of as many bytes as the one it replaces."""
    path = tmp_path / "x.parquet"
    count = 20_000
    pq.write_table(
        pa.table({"x": np.arange(count, dtype=np.int32)}),
        path,
        use_dictionary=False,
        compression="none",
        data_page_size=2**24,
        write_statistics=False,
    )
    look_at(path)
    content = path.read_bytes()

    def varint(value: int) -> bytes:
        value, found = 2 * value, b""
        while value > 127:
            found += bytes([value & 127 | 128])
            value >>= 7
        return found + bytes([value])

    place = content.index(varint(count))
    larger = varint(1_000_000)
    assert len(larger) == len(varint(count))
    path.write_bytes(content[:place] + larger + content[place + len(larger) :])
    with pytest.raises(ValueError, match="the pages of column x hold 1,000,000 values, the footer says 20,000"):  # fmt: skip
        look_at(path)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_page_headers_end_in_an_error_of_ours(built, tmp_path, seed):
    generator = np.random.default_rng(seed)
    path = tmp_path / "x.parquet"
    shutil.copy(next((built / "data").iterdir()), path)
    footer, content = pq.read_metadata(path), bytearray(path.read_bytes())
    column = footer.row_group(0).column(int(generator.integers(footer.num_columns)))
    start = column.dictionary_page_offset or column.data_page_offset
    for place in generator.integers(start, start + 24, 3):
        content[place] = int(generator.integers(256))
    path.write_bytes(content)
    with suppress(ValueError):
        check_unpacked_size(path, footer, 0)


def test_honest_files_pass_and_are_bounded_from_above(built, tmp_path, monkeypatch):
    for path in (built / "data").iterdir():
        footer = pq.read_metadata(path)
        with path.open("rb") as file:
            group = footer.row_group(0)
            sizes = [
                unpacking._unpacked(file, group.column(i), footer.schema.column(i))
                for i in range(group.num_columns)
            ]
        assert sum(sizes) >= pq.ParquetFile(path).read_row_group(0).nbytes
        look_at(path)
    # Wide rows of real numbers are large in any case.
    monkeypatch.setattr(unpacking, "MAX_BYTES", 2**20)
    rng = np.random.default_rng(0)
    values = pa.array(rng.standard_normal(2_000_000).astype(np.float32))
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet", compression="zstd")
    look_at(tmp_path / "x.parquet")


def test_verify_info_and_card_do_not_unpack_it(built, tmp_path, cli, monkeypatch):
    """With a manifest that says the same, so that counts agree."""
    monkeypatch.setattr(unpacking, "MAX_BYTES", 1000)
    monkeypatch.setattr(unpacking, "MAX_RATIO", 1)
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    path = next((copy / "data").iterdir())
    lines = [line for line in verify(copy).problems if "unpacks from" in line]
    assert len(lines) == len(list((copy / "data").iterdir()))
    with pytest.raises(ValueError, match="unpacks from"):
        read_row(path, 0)
    with pytest.raises(ValueError, match="unpacks from"):
        measure_file(path)


def test_counts_that_are_not_the_manifests_are_told_before_anything_is_unpacked(
    built, tmp_path, monkeypatch
):
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    lie(copy, lambda m: m["shards"][0].update(tokens=m["shards"][0]["tokens"] + 1))
    read = []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *_, **__: read.append(1))
    from builder.dataset.manifest import read_manifest, records_of
    from builder.verify.rows import Report, check_shard

    report = Report()
    manifest = read_manifest(copy)
    assert not check_shard(copy, records_of(manifest)[0], manifest, report)
    assert "tokens, the manifest says" in report.problems[0]
    assert read == []
