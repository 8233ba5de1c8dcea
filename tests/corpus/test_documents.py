"""Every local format is read in order, lazily, and goes on from any position as if it had not stopped."""

import gzip
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from builder.build.stream import open_corpus
from builder.corpus.documents import PARQUET_BATCH_ROWS, Corpus, Document
from builder.recipe.sections import CorpusRecipe
from builder.sources.known import KnownSources
from builder.sources.resolve import resolve_corpus

TEXTS = [
    [None, "Grüße", "", "one  two ", "  \t", "1999-12-31"],
    ["", None],  # a file without a document
    ["naïve\u2028café\x85\x0c\x1f", "2024-01-01T00:00:00Z", "東京 👩‍👩‍👧‍👦", "same", "same", " "],
]
"""What three files hold: blank ones at the beginning, in between and at the end, and what other readers take for dates
or for ends of lines."""

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as the file's name says; of a .txt, each row is a line."""
    kind, _, compression = path.name.partition(".")[2].partition(".")
    if kind == "parquet":
        schema = pa.schema({"id": pa.string(), "text": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
        return
    lines = (
        [row["text"] or "" for row in rows]
        if kind == "txt"
        else [json.dumps(row, ensure_ascii=False) for row in rows]
    )
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(COMPRESS[f".{compression}" if compression else ""](content))


def open_files(base: Path, *files: str, start: Any = None, partition=(0, 1), **keys: Any) -> Corpus:
    recipe = CorpusRecipe(files=files, **keys)
    source = resolve_corpus(recipe, base, KnownSources())
    number, count = partition
    return open_corpus(recipe, source, partition=number, num_partitions=count, start=start)


def write_corpus(base: Path, suffix: str) -> dict[str, Any]:
    """TEXTS as three files, and the recipe's keys to read them."""
    for number, texts in enumerate(TEXTS):
        rows = [{"id": f"{number}-{row}", "text": text} for row, text in enumerate(texts)]
        write_file(base / f"part-{number}{suffix}", rows)
    return {"text_unit": "line"} if ".txt" in suffix else {"id_column": "id"}


SUFFIXES = [
    f"{kind}{compression}"
    for kind in (".jsonl", ".ndjson", ".txt")
    for compression in COMPRESS
]  # fmt: skip
SUFFIXES.append(".parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_documents_come_in_order_and_blank_ones_are_counted(tmp_path, suffix):
    keys = write_corpus(tmp_path, suffix)
    corpus = open_files(tmp_path, f"part-*{suffix}", **keys)
    found = list(corpus)
    expected = [
        (f"{number}-{row}", text)
        for number, texts in enumerate(TEXTS)
        for row, text in enumerate(texts)
        if text and text.strip()
    ]
    assert [document.text for document in found] == [text for _, text in expected]
    if "id_column" in keys:
        assert [document.id for document in found] == [identifier for identifier, _ in expected]
    else:  # a hash of the text, stable: it may never change, for published ids are such
        assert found[0].id == "f83e039796c6453a"
        assert found[-1].id == found[-2].id != found[0].id
    assert corpus.offset["documents"] == len(expected)
    assert corpus.offset["skipped"] == sum(map(len, TEXTS)) - len(expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_position_goes_on_exactly_there(tmp_path, suffix):
    keys = write_corpus(tmp_path, suffix)

    def go_on(start: Any) -> Corpus:
        return open_files(tmp_path, f"part-*{suffix}", start=start, **keys)

    whole = go_on(None)
    steps = [(document, json.loads(json.dumps(whole.offset))) for document in whole]
    assert len(steps) == 8
    start = None
    for number, (expected, offset_after) in enumerate(steps):
        corpus = go_on(start)
        documents = iter(corpus)
        assert next(documents) == expected
        # Rebuilding a damaged shard compares where it ends with where it once ended.
        assert corpus.offset == offset_after
        # Twice from here: all the rest, and then document by document.
        rest = go_on(offset_after)
        assert list(rest) == [document for document, _ in steps[number + 1 :]]
        assert rest.offset == whole.offset
        start = json.loads(json.dumps(corpus.offset))


@pytest.mark.parametrize("stop", [1, PARQUET_BATCH_ROWS, PARQUET_BATCH_ROWS + 1, 2500, 3000, 3001])
def test_positions_in_a_large_row_group(tmp_path, stop):
    """`datasets` reads it in batches."""
    table = pa.table({"text": [f"text {i}" for i in range(6000)]})
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=3000)
    first = open_files(tmp_path, "large.parquet")
    read = [document.text for document in itertools.islice(first, stop)]
    rest = open_files(tmp_path, "large.parquet", start=json.loads(json.dumps(first.offset)))
    assert read + [document.text for document in rest] == table["text"].to_pylist()


@pytest.mark.parametrize("num_files", [3, 7])
@pytest.mark.parametrize("num_partitions", [1, 2, 3])
def test_partitions_cover_every_document_once_and_in_order(tmp_path, num_files, num_partitions):
    for number in range(num_files):
        write_file(tmp_path / f"{number}.jsonl", [{"text": f"{number} {row}"} for row in range(3)])
    parts = [
        [d.text for d in open_files(tmp_path, "*.jsonl", partition=(number, num_partitions))]
        for number in range(num_partitions)
    ]
    assert all(parts)
    assert list(itertools.chain(*parts)) == [
        f"{number} {row}" for number in range(num_files) for row in range(3)
    ]


def test_more_partitions_than_files_are_refused(tmp_path):
    write_corpus(tmp_path, ".jsonl")
    with pytest.raises(
        ValueError, match=r"output\.partitions is 4, but the corpus has fewer files \(3\)"
    ):
        open_files(tmp_path, "*.jsonl", partition=(0, 4))


def test_files_are_read_in_the_order_of_the_recipe_and_of_names_and_once(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b/deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n\r\nis one document\n")
    found = [d.text for d in open_files(tmp_path, "b/**/*.txt", "a.txt", "b/2.txt")]
    order = ["b/10.txt", "b/2.txt", "b/deep/c.txt", "a.txt"]
    assert found == [f"{name}\n\nis one document\n" for name in order]


@pytest.mark.parametrize(
    ("rows", "ids"),
    [
        (['{"id": 7, "text": "a"}', '{"id": "x", "text": "b"}'], ["7", "x"]),
        (['{"id": 9007199254740993, "text": "a"}'], ["9007199254740993"]),
        (['{"id": "2024-01-01", "text": "a"}', '{"id": "007", "text": "b"}'], ["2024-01-01", "007"]),
        # Where a document has no id of its own: sha256 of its text.
        (['{"id": null, "text": "a"}', '{"id": "", "text": "a"}'], ["ca978112ca1bbdca"] * 2),
        (['{"id": "first", "text": "z"}', '{"text": "a"}'], ["first", "ca978112ca1bbdca"]),
    ],
)  # fmt: skip
def test_ids_are_the_corpus_s_own_else_a_hash(tmp_path, rows, ids):
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert [document.id for document in open_files(tmp_path, "a.jsonl", id_column="id")] == ids


def test_integer_ids_of_parquet(tmp_path):
    pq.write_table(pa.table({"n": [3, None], "body": ["a", "b"]}), tmp_path / "a.parquet")
    corpus = open_files(tmp_path, "a.parquet", id_column="n", text_column="body")
    assert [*corpus] == [Document(id="3", text="a"), Document(id="3e23e8160039594a", text="b")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": None}, {"text": "x"}),
        ({"text": "x", "meta": 1}, {"text": "y", "meta": {"a": [1]}}),
        ({"text": "x", "meta": 1}, {"text": "y"}),
        ({"text": "x"}, {"text": "y", "meta": 1}),
        ({"meta": 1, "text": "x"}, {"text": "y", "meta": "z"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_columns_may_differ_from_file_to_file(tmp_path, suffix, first, second):
    for name, row in (("0", first), ("1", second)):
        if suffix == ".jsonl":
            write_file(tmp_path / f"{name}.jsonl", [row])
        else:
            types = {"text": pa.string()} if row["text"] is None else None
            pq.write_table(
                pa.Table.from_pylist([row], types and pa.schema(types)),
                tmp_path / f"{name}.parquet",
            )
    texts = [document.text for document in open_files(tmp_path, f"*{suffix}")]
    assert texts == [row["text"] for row in (first, second) if row["text"]]


def test_a_parquet_file_without_rows_is_passed_over(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "1.parquet")
    assert [document.text for document in open_files(tmp_path, "*.parquet")] == ["a"]


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n\r\n{"text": "x"}')
    assert [document.text for document in open_files(tmp_path, "a.txt")] == ["hello"]
    corpus = open_files(tmp_path, "a.jsonl")
    assert [document.text for document in corpus] == ["hello", "x"]
    assert corpus.offset["skipped"] == 0


LINES = b"".join(b'{"text": "line %d %s"}\n' % (i, struct.pack(">Q", i).hex().encode() * 60) for i in range(40_000))  # fmt: skip


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_nothing_is_read_that_is_not_asked_for(tmp_path, compression):
    """The end of this file of 40 MB is missing, which only a reader who goes there can know."""
    content = COMPRESS[compression](LINES)
    (tmp_path / f"a.jsonl{compression}").write_bytes(content[: len(content) * 9 // 10])
    corpus = open_files(tmp_path, "*")
    documents = iter(corpus)
    assert next(documents).text.startswith("line 0 ")
    with pytest.raises(
        ValueError, match=rf"corpus file a\.jsonl{compression} .*(cannot be read|not valid JSON) \("
    ):
        for _ in documents:
            pass
    assert corpus.offset["documents"] > 10_000


def test_a_flipped_bit_of_a_compressed_file_is_found(tmp_path):
    content = bytearray(gzip.compress(b'{"text": "a"}\n' * 99))
    content[-6] ^= 1
    (tmp_path / "0.jsonl.gz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"corpus file 0\.jsonl\.gz cannot be read \(CRC check failed"
    ):
        list(open_files(tmp_path, "*"))


def test_a_broken_second_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "2.parquet")
    with pytest.raises(ValueError, match=r"corpus file 1\.parquet cannot be read \("):
        list(open_files(tmp_path, "0.parquet", "1.parquet"))
    with pytest.raises(ValueError, match=r"corpus file 2\.parquet cannot be read \(.*text"):
        list(open_files(tmp_path, "0.parquet", "2.parquet"))
    with pytest.raises(ValueError, match=r"2\.parquet has no column 'text'; its columns are body"):
        list(open_files(tmp_path, "2.parquet"))


def test_a_column_that_only_later_rows_lack_counts_as_blank(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"other": 1}\n{"text": "b"}\n')
    corpus = open_files(tmp_path, "a.jsonl")
    assert [document.text for document in corpus] == ["a", "b"]
    assert corpus.offset["skipped"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["none-*.txt"], r"nothing matches 'none-\*\.txt' \(looked in .*\)"),
        (["a.txt", "a.csv"], r"mixes formats \(csv, text\); give files of one format"),
        (["a.tsv"], r"cannot tell the format of 'a\.tsv'; expected \.txt, \.jsonl, \.csv \("),
        (["a.parquet.gz"], r"cannot tell the format of 'a\.parquet\.gz'"),
        (["a.gz"], r"cannot tell the format of 'a\.gz'"),
        (["folder"], r"the folder 'folder' contains no files"),
    ],
)
def test_files_that_cannot_be_a_corpus_are_refused(tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "a.csv", "a.tsv", "a.parquet.gz", "a.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"corpus\.files: {message}|corpus\.files {message}"):
        open_files(tmp_path, *files)
