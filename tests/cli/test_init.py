"""`init`: a recipe for what a user has, which the builder takes as it is."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.recipe.file import load_recipe
from tests.conftest import run_cli, sample_documents, write_jsonl

CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
]
SHAREGPT = [{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}]  # fmt: skip


@pytest.fixture
def init(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        found: tuple[int, str, str] = cli("init", "mine", *arguments)
        return found

    return run


CORPORA: dict[str, tuple[list[dict[str, Any]], list[str], dict[str, Any]]] = {
    "text": (sample_documents(3), [], {"text_column": "text", "messages_column": None}),
    "another column": (
        [{"url": "x", "body": "Some longer text."}], [], {"text_column": "body", "messages_column": None},
    ),
    "chats": (CHATS, [], {"messages_column": "messages"}),
    "ShareGPT": (SHAREGPT, [], {"messages_column": "conversations"}),
    "chats beside texts": ([{"text": "x", **CHATS[0]}], ["--chat"], {"messages_column": "messages"}),
    "pairs": ([{"prompt": "a", "completion": "b"}], [], {"text_column": "completion", "prompt_column": "prompt"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPORA)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_are_those_of_the_files(init, tmp_path, case, suffix):
    rows, options, expected = CORPORA[case]
    if suffix == "jsonl":
        write_jsonl(tmp_path / "texts.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    status, out, _ = init("--corpus", f"texts.{suffix}", *options)
    assert status == 0
    recipe = load_recipe(tmp_path / "mine" / "recipe.toml")
    assert recipe.corpus.files == (f"../texts.{suffix}",)
    assert {key: getattr(recipe.corpus, key) for key in expected} == expected
    assert recipe.output.completions_only is ("messages_column" in expected and expected["messages_column"] is not None)  # fmt: skip
    assert out.splitlines()[0] == f"{Path('mine') / 'recipe.toml'}: written"


def test_a_folder_of_texts_becomes_a_dataset_by_the_commands_that_it_prints(
    init, tmp_path, tiny_teacher_dir
):
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(sample_documents(4)):
        (tmp_path / "texts" / f"{number}.txt").write_text(document["text"])
    status, out, _ = init("--corpus", "texts/*.txt", "--teacher", os.path.relpath(tiny_teacher_dir, tmp_path))  # fmt: skip
    assert status == 0
    command = out.splitlines()[1].removeprefix("next: ").split()
    assert command[1:] == ["build", "mine/recipe.toml", "--output", "out/mine"]
    done = run_cli(*command[1:])
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "mine" / "manifest.json").read_text())
    assert manifest["totals"]["documents"] == 4


def test_sources_on_the_hub_are_taken_by_name(init, tmp_path):
    status, _, _ = init("--corpus", "org/corpus", "--teacher", "org/teacher", "--chat")
    assert status == 0
    recipe = load_recipe(tmp_path / "mine" / "recipe.toml")
    assert (recipe.corpus.repo, recipe.teacher.repo) == ("org/corpus", "org/teacher")
    assert recipe.corpus.messages_column == "messages"


WRONG = {
    "nothing": ([], "name the corpus, such as --corpus"),
    "no such file": (["--corpus", "none.jsonl"], "nothing matches"),
    "no texts": (["--corpus", "numbers.jsonl"], r"no column of texts (columns: x)"),
    "no chats": (
        ["--corpus", "texts.jsonl", "--chat"],
        "--chat needs a column with lists of messages, but the corpus has none",
    ),
    "no teacher": (["--corpus", "texts.jsonl", "--teacher", "nowhere"], "is neither a directory"),
    "not JSON": (["--corpus", "bad.jsonl"], "bad.jsonl is not JSON lines"),
    "chats of .txt": (["--corpus", "a.txt", "--chat"], "name .jsonl or .parquet files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_line_and_writes_nothing(init, tmp_path, case):
    write_jsonl(tmp_path / "numbers.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "texts.jsonl", sample_documents(2))
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "a.txt").write_text("a")
    arguments, message = WRONG[case]
    status, out, err = init(*arguments)
    assert (status, out) == (1 if arguments else 2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "mine").exists()


def test_a_recipe_that_exists_stays(init, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", sample_documents(2))
    assert init("--corpus", "texts.jsonl")[0] == 0
    status, _, err = init("--corpus", "texts.jsonl")
    assert status == 1
    assert "exists; choose another directory, or remove it" in err


def test_csv_and_texts_beside_json_lines_have_their_columns(init, tmp_path):
    (tmp_path / "a.csv").write_text('body,n\n"Some text, and more.",1\n')
    status, _, said = init("--corpus", "a.csv")
    assert status == 0, said
    assert load_recipe(tmp_path / "mine" / "recipe.toml").corpus.text_column == "body"
    (tmp_path / "mine" / "recipe.toml").unlink()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("A text.")
    write_jsonl(folder / "b.jsonl", [{"body": "Another text.", "n": "1"}])
    status, _, said = init("--corpus", "texts")
    assert status == 0, said
    corpus = load_recipe(tmp_path / "mine" / "recipe.toml").corpus
    assert (corpus.text_column, corpus.files) == ("body", ("../texts",))
