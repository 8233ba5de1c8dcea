"""A file that is not what its manifest says, to the last bit, is an error: never other values, never a crash."""

import hashlib
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.dataset.lookup import read_row
from builder.recipe.file import load_recipe
from builder.verify.verify import verify
from logit_dataset import load_logits
from logit_dataset.files import column_name, first_line
from tests.chats import chatty_teacher, sample_chats
from tests.conftest import REPOSITORY, recipe_text, refit, write_jsonl

OLDER = REPOSITORY / "tests" / "fixtures" / "older" / "text"
"""Written without checksums."""
CHATS = {"corpus": 'messages_column = "messages"'}
KINDS = {
    "everything": "top_k = 3\ntail_samples = 2\ntemperatures = [2.0, 0.5]\nhidden_states = true",
    "kept": "top_k = 2\ntail_samples = 1\ncompletions_only = true",
    "compact": 'top_k = 4\nprofile = "compact"',
}
FLIPS = 200


@pytest.fixture(scope="module")
def datasets(tiny_tokenizer, tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Strings, booleans, numbers, lists and lists of lists; one file each, of several row groups."""
    base, found = tmp_path_factory.mktemp("kinds"), {}
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, base / "teacher")
    write_jsonl(base / "corpus.jsonl", sample_chats(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builder.dataset.shards.ROW_GROUP_TOKENS", 150)
        for name, output in KINDS.items():
            text = recipe_text(
                teacher, "corpus.jsonl", output=f"{output}\nshard_tokens = 9999", **CHATS
            )
            (base / "recipe.toml").write_text(text)
            build(load_recipe(base / "recipe.toml"), base, base / name)
            found[name] = base / name
    return found


@pytest.fixture
def copy(datasets, tmp_path):
    return lambda name: Path(shutil.copytree(datasets[name], tmp_path / name))


def only_file(dataset: Path) -> Path:
    (path,) = (dataset / "data").glob("*.parquet")
    return path


def values(dataset: Path, **options: object) -> list[dict[str, tuple]]:
    """All that the reader gives, to the bit."""
    data = load_logits(dataset, **options)
    return [
        {name: (v.dtype.str, v.shape, v.tobytes()) for name, v in rows.columns.items()}
        | {"lengths": rows.lengths_R.tolist()}
        for rows in map(data.read, data.row_groups)
    ]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_gives_other_values(copy, kind):
    """Anywhere: in pages, their headers, the page index and the footer. (All 760,000 bits of four such files were tried once.)"""
    dataset = copy(kind)
    path, expected, found = only_file(dataset), values(dataset), {"error": 0, "unused": 0}
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rng = np.random.default_rng(13)
    bits = [*rng.integers(0, 8 * footer, FLIPS // 2), *rng.integers(8 * footer, 8 * len(content), FLIPS // 2)]  # fmt: skip
    for bit in bits:
        path.write_bytes(flipped(content, int(bit)))
        try:
            assert values(dataset) == expected, f"bit {bit} gives other values"
            found["unused"] += 1
        except ValueError as error:
            message = str(error)
            found["error"] += path.name in message and "\n" not in message
    assert sum(found.values()) == FLIPS
    assert found["error"] > FLIPS / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_column_is_found_by_all_who_read_it(copy, kind):
    dataset = copy(kind)
    path = only_file(dataset)
    content, footer = path.read_bytes(), pq.read_metadata(path)
    assert footer.num_row_groups > 1
    chunks = [footer.row_group(0).column(i) for i in range(footer.num_columns)]
    rng = np.random.default_rng(0)
    for chunk in chunks:
        name, stop = column_name(chunk.path_in_schema), chunk.data_page_offset + chunk.total_compressed_size  # fmt: skip
        if chunk.has_dictionary_page:
            stop -= chunk.data_page_offset - chunk.dictionary_page_offset
        # The last half of the page: behind its header.
        start = chunk.data_page_offset + (stop - chunk.data_page_offset) // 2
        path.write_bytes(flipped(content, int(rng.integers(8 * start, 8 * stop))))
        if name != "text":
            data = load_logits(dataset)
            with pytest.raises(ValueError, match=r"row group 0: .*(CRC|crc)"):
                data.read(data.row_groups[0])
        with pytest.raises((OSError, pa.ArrowException), match=r"CRC|crc"):
            read_row(path, 0)
        report = verify(dataset)
        assert any("cannot be read" in line and "CRC" in line for line in report.problems)


def test_the_ids_are_counted_of_whole_files_only(copy):
    dataset = copy("everything")
    path = only_file(dataset)
    footer, content = pq.read_metadata(path), path.read_bytes()
    (chunk,) = (c for c in map(footer.row_group(0).column, range(footer.num_columns)) if c.path_in_schema.startswith("input_ids"))  # fmt: skip
    path.write_bytes(
        flipped(content, 8 * (chunk.data_page_offset + chunk.total_compressed_size) - 3)
    )
    with pytest.raises(ValueError, match="CRC"):
        load_logits(dataset).token_counts()


def test_every_flip_in_a_file_without_checksums_is_found_by_its_hash(tmp_path):
    dataset = Path(shutil.copytree(OLDER, tmp_path / "older"))
    path = sorted((dataset / "data").glob("*.parquet"))[0]
    content, expected = path.read_bytes(), values(dataset)
    silent = 0
    for bit in np.random.default_rng(1).integers(0, 8 * len(content), 60):
        path.write_bytes(flipped(content, int(bit)))
        with pytest.raises(ValueError, match=path.name):
            values(dataset)
        with suppress(ValueError):
            silent += values(dataset, check_hashes=False) != expected
    assert silent > 0  # or the hash were not needed


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Files that are hashed, as they are."""
    names, digest = [], hashlib.file_digest

    def noted(file, algorithm):
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr("hashlib.file_digest", noted)
    return names


def test_what_is_hashed_and_when(datasets, hashed):
    older = [path.name for path in (OLDER / "data").glob("*.parquet")]
    ours = only_file(datasets["kept"]).name
    for dataset, options, expected in (
        (OLDER, {}, older),
        (OLDER, {"check_hashes": True}, older),
        (OLDER, {"check_hashes": False}, []),
        (datasets["kept"], {}, []),
        (datasets["kept"], {"check_hashes": True}, [ours]),
    ):
        data = load_logits(dataset, **options)
        assert sorted(hashed) == sorted(expected)
        list(data.batches(batch_size=2))
        list(pickle.loads(pickle.dumps(data)).batches(batch_size=2))
        assert len(hashed) == len(expected)  # once
        hashed.clear()


def test_a_hash_that_is_asked_for_is_compared_at_once(copy):
    dataset = copy("kept")
    content = only_file(dataset).read_bytes()
    start = pq.read_metadata(only_file(dataset)).row_group(0).column(2).data_page_offset
    only_file(dataset).write_bytes(flipped(content, 8 * start + 200))  # the text, which is not read
    load_logits(dataset)
    with pytest.raises(ValueError, match=r"000.parquet has the SHA-256 .*, the manifest says"):
        load_logits(dataset, check_hashes=True)
    with pytest.raises(ValueError, match="which streaming never does"):
        load_logits("org/logits", streaming=True, check_hashes=True)


def test_pyarrow_never_sees_a_wrong_footer(copy, monkeypatch):
    """It would abort the process: of a flip in the lengths of a column's histograms, C++ throws where no Python waits."""
    dataset = copy("kept")
    path = only_file(dataset)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    expected = "(has the SHA-256|is not a Parquet file)"
    monkeypatch.setattr(pq, "read_metadata", None)
    for bit in range(8 * footer, 8 * len(content), 97):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(ValueError, match=f"{path.name}.*{expected}.*; fetch the dataset again"):
            load_logits(dataset)


def test_verify_tells_of_any_wrong_footer(copy):
    dataset = copy("kept")
    path = only_file(dataset)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for bit in range(8 * footer, 8 * len(content), 1511):
        path.write_bytes(flipped(content, bit))
        assert all(path.name in line and "\n" not in line for line in verify(dataset).problems)
        assert verify(dataset).problems


def test_verify_compares_footers_too(copy):
    dataset = copy("kept")
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["shards"][0]["footer_sha256"] = "0" * 64
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    assert any("its footer does not have the hash" in line for line in verify(dataset).problems)


def test_a_footer_longer_than_what_is_read_at_once(copy, monkeypatch):
    dataset = copy("kept")
    expected = values(dataset)
    monkeypatch.setattr("logit_dataset.files.LIKELY_FOOTER_BYTES", 100)
    assert values(dataset) == expected


def test_a_file_with_other_rows_or_tokens_than_its_record_is_refused(copy):
    dataset = copy("everything")
    path = only_file(dataset)
    table = pq.read_table(path)
    for changed in (table.slice(1), table.take([0, 0, *range(1, len(table))])):
        pq.write_table(changed, path)
        manifest = json.loads((dataset / "manifest.json").read_text())
        of_old = {name: manifest["shards"][0][name] for name in ("rows", "tokens")}
        refit(dataset)
        manifest = json.loads((dataset / "manifest.json").read_text())
        for part in (manifest["shards"][0], manifest["totals"]):
            part.update(of_old)
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=rf"has {len(changed)} rows of [\d,]+ tokens, the man"):
            load_logits(dataset)


def rewritten(dataset: Path, **columns: pa.Array) -> None:
    """A dataset whose one file has other values, by somebody who fits checksums, hashes and counts."""
    path = only_file(dataset)
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path, write_page_checksum=True)
    refit(dataset)


@pytest.mark.parametrize("name", ["input_ids", "topk_indices", "tail_indices"])
@pytest.mark.parametrize("wrong", [-1, 448, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kind", ["everything", "kept"])
def test_ids_outside_the_vocabulary_are_refused_though_all_checksums_fit(copy, kind, name, wrong):
    dataset = copy(kind)
    stored = pq.read_table(only_file(dataset))[name]
    lists = stored.to_pylist()
    lists[0][-1] = [wrong, *lists[0][-1][1:]] if name != "input_ids" else wrong
    rewritten(dataset, **{name: pa.array(lists, stored.type)})
    data = load_logits(dataset)
    with pytest.raises(ValueError, match=rf"000.parquet, row group 0: {name} holds the id {wrong}, expected 0 to 447; v"):  # fmt: skip
        data.read(data.row_groups[0])


def test_rows_without_tokens_ids_or_chunk_numbers_are_refused(copy):
    for name, value in (("id", None), ("chunk_index", None)):
        dataset = copy("everything")
        column = pq.read_table(only_file(dataset))[name]
        rewritten(dataset, **{name: pa.array([value, *column.to_pylist()[1:]], column.type)})
        data = load_logits(dataset)
        with pytest.raises(ValueError, match="a row has no tokens, no id or no chunk_index"):
            data.read(data.row_groups[0])
        shutil.rmtree(dataset)


def test_a_small_file_that_unpacks_to_far_more_than_its_manifest_says_is_refused_unread(
    copy, monkeypatch
):
    dataset = copy("everything")
    path = only_file(dataset)
    table = pq.read_table(path)
    # Three million zeros where 3 a token belong, all in the last list. A dictionary makes them 50 bytes.
    wide = table["topk_indices"].to_pylist()
    zeros = pa.repeat(pa.scalar(0, pa.int32()), 3_000_000)
    flat = pa.concat_arrays([pa.array([i for row in wide for t in row for i in t], pa.int32()), zeros])  # fmt: skip
    counts = np.array([len(t) for row in wide for t in row])
    counts[-1] += len(zeros)
    inner = pa.ListArray.from_arrays(np.append(0, counts.cumsum()).astype(np.int32), flat)
    outer = pa.ListArray.from_arrays(
        np.append(0, np.cumsum([len(row) for row in wide])).astype(np.int32), inner
    )
    pq.write_table(
        table.set_column(table.column_names.index("topk_indices"), "topk_indices", outer),
        path,
        use_dictionary=["topk_indices.list.element.list.element"],
        write_page_checksum=True,
    )
    refit(dataset)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    with pytest.raises(ValueError, match=r"row group 0: topk_indices has 3,00\d,\d+ values, exp"):
        load_logits(dataset)
    monkeypatch.setattr("logit_dataset.files.MAX_GROUP_VALUES", 200)
    with pytest.raises(
        ValueError, match=r"row group 0: \w+ has [0-9]+ values, expected 200; fetch"
    ):
        load_logits(OLDER)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what\nand why"), "what"),
        (OSError("\n what\nand why"), "what"),
        (MemoryError(), "MemoryError"),
        (pa.ArrowInvalid("\n"), "ArrowInvalid"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, line):
    assert first_line(error) == line
