"""Local corpora as people have them: folders, texts beside JSON lines, CSV, ~, one string; and thousands of files."""

import gzip
import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from builder.plan import estimate
from builder.recipe.file import load_recipe
from builder.sources.columns import settle_columns
from builder.sources.known import KnownSources
from builder.sources.opening import open_corpus
from builder.sources.resolve import resolve, resolve_corpus

A, B, C = "A text in a file.\nIt has two lines.", "A text in a line.", "Another text: naïve, 東京."


@pytest.fixture
def built(make_recipe, cli, tmp_path):
    """Build from [corpus] lines, and return (text → id) in stored order, and the manifest."""

    def build(corpus, *, output="out", **changes):
        recipe = make_recipe(corpus=corpus, **changes)
        text = recipe.read_text().replace('files = ["corpus.jsonl"]\n', "")
        text = text if "id_column" in corpus else text.replace('id_column = "id"\n', "")
        recipe.write_text(text)
        status, _, said = cli("build", recipe, "--output", tmp_path / output, "--device", "cpu")
        if status:
            assert status == 1
            assert len(said.strip().splitlines()) == 1
            return said
        rows = [
            row
            for path in sorted((tmp_path / output / "data").glob("*.parquet"))
            for row in pq.read_table(path, columns=["id", "chunk_index", "text"]).to_pylist()
        ]
        texts: dict[str, str] = {}
        for row in rows:
            texts[row["id"]] = texts.get(row["id"], "") + row["text"]
        status, told, said = cli("verify", tmp_path / output)
        assert status == 0, told + said
        return texts

    return build


@pytest.fixture
def folder(tmp_path):
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    (texts / "a.txt").write_text(A)
    (texts / "b.jsonl").write_text(json.dumps({"body": B}) + "\n\n" + json.dumps({"body": A + B}))
    with gzip.open(texts / "more" / "c.txt.gz", "wt") as file:
        file.write(C)
    (texts / ".hidden").write_text("not this")
    return texts


@pytest.mark.parametrize("files", ['["texts"]', '"texts"', '"texts/"', '["texts/**/*.*"]'])
def test_a_folder_of_texts_beside_json_lines_is_one_corpus(built, folder, files):
    found = built(f'files = {files}\ntext_column = "body"')
    assert list(found.values()) == [A, B, A + B, C]


def test_lines_of_texts_beside_json_lines(built, folder):
    found = built('files = "texts"\ntext_column = "body"\ntext_unit = "line"')
    assert list(found.values()) == [*A.splitlines(), B, A + B, C]


def test_texts_beside_json_lines_need_no_column_named_text(built, folder):
    (folder / "b.jsonl").write_text(json.dumps({"text": B}))
    assert list(built('files = "texts"').values()) == [A, B, C]


def test_texts_are_no_chats(built, folder):
    (folder / "b.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
    )  # fmt: skip
    (folder / "t.jinja").write_text("{% for m in messages %}{{ m.role + m.content }}{% endfor %}")
    (folder / "t.jinja").rename(folder.parent / "t.jinja")
    said = built(
        'files = "texts"\nmessages_column = "messages"',
        sequences='chat_template = "t.jinja"',
    )
    assert "corpus file a.txt has no column 'messages'; its columns are text" in said


def test_a_mixed_build_that_stops_goes_on_where_it_was(built, folder, make_recipe, cli, tmp_path):
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": B * i}) for i in range(1, 12)))
    shards = {"output": "top_k = 20\nshard_tokens = 20"}
    whole = built('files = "texts"', **shards)
    recipe, parts = tmp_path / "recipe.toml", tmp_path / "parts"
    for _ in range(20):
        status, _, said = cli(
            "build", recipe, "--output", parts, "--device", "cpu", "--max-shards", 1
        )
        assert status == 0, said
        if (parts / "manifest.json").exists():
            break
    assert len(whole) == 13
    for path in sorted((tmp_path / "out" / "data").glob("*.parquet")):
        assert (parts / "data" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_with_something_else_says_how_to_name_the_rest(built, folder):
    (folder / "photo.png").write_bytes(b"png")
    said = built('files = "texts"')
    assert (
        "the folder 'texts' holds photo.png, which is not .txt, .jsonl, .csv (each also with .gz or .zst) or .parquet"
        in said
    )
    assert "name the files, such as 'texts/**/*.txt'" in said
    found = built('files = ["texts/**/*.txt", "texts/**/*.gz"]')
    assert list(found.values()) == [A, C]


def test_an_empty_folder_is_said(built, tmp_path):
    (tmp_path / "none").mkdir()
    assert "the folder 'none' contains no files; expected .txt, .jsonl" in built('files = "none"')


def test_other_formats_do_not_mix(built, folder):
    (folder / "d.csv").write_text("text\nx\n")
    assert (
        "mixes formats (csv, json, text); give files of one format (only .txt and .jsonl can be mixed)"
        in built('files = "texts"')
    )


def test_the_home_directory_is_found(built, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(built('files = "~/texts/a.txt"').values()) == [A]
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest


CSV = '\ufeffid,text,note\n007,"A ""quoted"" text,\nover lines",1\n08,NA,2\n9,,3\n10,12345,\n11,null,x\n'


def test_values_of_csv_are_the_texts_that_they_are(built, tmp_path):
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8")
    with gzip.open(tmp_path / "b.csv.gz", "wt", encoding="utf-8") as file:
        file.write(f"note,text,id\nz,Grüße,1e3\n\nz,{'long ' * 40_000},2\n")
    found = built('files = ["a.csv", "b.csv.gz"]\nid_column = "id"')
    assert found.pop("2") == "long " * 40_000
    assert found == {
        "007": 'A "quoted" text,\nover lines',
        "08": "NA",
        "10": "12345",
        "11": "null",
        "1e3": "Grüße",
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["totals"]["documents_skipped"] == 1


def test_csv_without_the_column_or_damaged_is_one_line(built, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,x\n")
    assert "a.csv has no column 'text'; its columns are id, body" in built('files = "a.csv"')
    path.write_text('text\nfine\n"never closed\n')
    assert "corpus file a.csv cannot be read" in built('files = "a.csv"')
    for text in ("text\nfine\nfine, too many\n", "text\nHello, world\n", "text,id\none\n"):
        path.write_text(text)
        said = built('files = "a.csv"')
        assert "corpus file a.csv cannot be read (line" in said
        assert "put quotation marks around a text with a comma" in said
    path.write_text("text,text\n1,2\n")
    assert "names a column twice: text, text" in built('files = "a.csv"')


def test_chats_in_csv_are_found(built, tmp_path, make_recipe):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    quoted = json.dumps(messages).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,id\n"{quoted}",7\n')
    recipe = make_recipe()
    recipe.write_text(
        recipe.read_text().replace('files = ["corpus.jsonl"]\nid_column = "id"', 'files = "a.csv"')
    )
    loaded, known = load_recipe(recipe), KnownSources()
    source = resolve_corpus(loaded.corpus, tmp_path, known)
    loaded, notices = settle_columns(loaded, source, known)
    assert loaded.corpus.messages_column == "messages"
    assert 'corpus.messages_column = "messages"' in notices[0]
    (document,) = open_corpus(loaded.corpus, source)
    assert document.messages == messages


def test_a_csv_build_that_stops_goes_on_where_it_was(built, make_recipe, cli, tmp_path):
    lines = "".join(f"{i:03},Text number {i} says something of itself.\n" for i in range(30))
    (tmp_path / "a.csv").write_text("id,text\n" + lines)
    shards = {"output": "top_k = 20\nshard_tokens = 100"}
    whole = built('files = "a.csv"\nid_column = "id"', **shards)
    assert list(whole) == [f"{i:03}" for i in range(30)]
    recipe, parts = tmp_path / "recipe.toml", tmp_path / "parts"
    for _ in range(30):
        status, _, said = cli(
            "build", recipe, "--output", parts, "--device", "cpu", "--max-shards", 1
        )
        assert status == 0, said
        if (parts / "manifest.json").exists():
            break
    for path in sorted((tmp_path / "out" / "data").glob("*.parquet")):
        assert (parts / "data" / path.name).read_bytes() == path.read_bytes()


def test_the_size_of_a_mixed_corpus_is_estimated(folder, make_recipe, tmp_path, monkeypatch):
    for i in range(40):
        (folder / f"z{i:02}.txt").write_text(C * 20)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": C * 20}) for _ in range(80)))
    recipe = make_recipe(files="texts")
    recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    loaded = load_recipe(recipe)
    sources = resolve(loaded, tmp_path, KnownSources())
    exact, _ = estimate.expect(loaded, sources)
    for sample in (20, 100):  # in the JSON lines, and among the texts after them
        monkeypatch.setattr(estimate, "SAMPLE_DOCUMENTS", sample)
        tokens, _ = estimate.expect(loaded, sources)
        assert tokens == pytest.approx(exact, rel=0.25)


def test_thousands_of_files_open_in_no_time(make_recipe, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(2000):
        (folder / f"{i:05}.txt").write_text(f"File number {i}.\n")
    recipe = make_recipe(files="many")
    recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    loaded, known = load_recipe(recipe), KnownSources()
    started = time.perf_counter()
    source = resolve_corpus(loaded.corpus, tmp_path, known)
    loaded, _ = settle_columns(loaded, source, known)
    texts = [document.text for document in open_corpus(loaded.corpus, source)]
    elapsed = time.perf_counter() - started
    assert len(texts) == 2000
    assert elapsed < 3  # 0.5 s on one core


@pytest.mark.parametrize(
    ("key", "value", "section"),
    [("max_tokens", "1e6", "corpus"), ("shard_tokens", "2.5e5", "output")],
)
def test_whole_numbers_may_be_written_as_toml_floats(make_recipe, key, value, section):
    changes = {section: f"{key} = {value}"}
    recipe = load_recipe(make_recipe(**changes))
    assert getattr(getattr(recipe, section), key) == int(float(value))
    assert type(getattr(getattr(recipe, section), key)) is int
    with pytest.raises(ValueError, match=rf"{section}\.{key}: .*\(found 1000\.5\)"):
        load_recipe(make_recipe(**{section: f"{key} = 1000.5"}))


def test_one_string_is_the_same_recipe_as_a_list(make_recipe):
    path = make_recipe()
    listed = load_recipe(path)
    path.write_text(path.read_text().replace('files = ["corpus.jsonl"]', 'files = "corpus.jsonl"'))
    assert load_recipe(path) == listed
    assert Path(listed.corpus.files[0]).name == "corpus.jsonl"
