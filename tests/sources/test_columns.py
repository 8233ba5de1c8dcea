"""Columns that a recipe leaves open are found where there is no doubt, and said; a build of them is that of a recipe that names them."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.recipe.recipe import Recipe
from builder.sources.columns import settle_columns
from builder.sources.known import KnownSources
from builder.sources.resolve import resolve_corpus
from tests.build.test_build import data_bytes, run
from tests.chats import chatty_teacher
from tests.conftest import recipe_text, write_jsonl

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
GENERATION = "max_new_tokens = 8"


@pytest.fixture(scope="module")
def teacher(tiny_tokenizer, tiny_model, tmp_path_factory) -> Path:
    return chatty_teacher(tiny_tokenizer, tiny_model, tmp_path_factory.mktemp("teacher") / "chatty")


@pytest.fixture
def settle(teacher, tmp_path):
    def settled(
        rows: list[dict[str, Any]], *, format: str = "jsonl", **changes: str
    ) -> tuple[Recipe, list[str]]:
        path = write(tmp_path, rows, format)
        changes.setdefault("corpus", "max_documents = 99")
        text = recipe_text(teacher, path.name, **changes).replace('id_column = "id"\n', "")
        (tmp_path / "recipe.toml").write_text(text)
        recipe = load_recipe(tmp_path / "recipe.toml")
        known = KnownSources()
        source = resolve_corpus(recipe.corpus, tmp_path, known)
        found = settle_columns(recipe, source, known)
        assert settle_columns(recipe, source, known) == found
        assert settle_columns(found[0], source, known)[0] == found[0]
        return found

    return settled


def write(directory: Path, rows: list[dict[str, Any]], format: str) -> Path:
    path = directory / f"corpus.{format}"
    if format == "jsonl":
        return write_jsonl(path, rows)
    if format == "txt":
        path.write_text("Some text.")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


FOUND: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "a text": ({"id": "a", "text": "Hi"}, {}, {"text_column": "text"}),
    "messages": ({"messages": HI}, {}, {"messages_column": "messages"}),
    "messages as JSON text": ({"messages": json.dumps(HI)}, {}, {"messages_column": "messages"}),
    "conversations": ({"conversations": SHAREGPT}, {}, {"messages_column": "conversations"}),
    "conversation": ({"conversation": HI}, {}, {"messages_column": "conversation"}),
    "texts": ({"prompt": "2+2?", "completion": " 4"}, {}, {"prompt_column": "prompt", "text_column": "completion"}),
    "chats": ({"prompt": HI[:1], "completion": HI[1:]}, {}, {"prompt_column": "prompt", "messages_column": "completion"}),
    "a prompt beside messages": ({"prompt": "Hi", "prompt_id": "x", "messages": HI}, {}, {"messages_column": "messages"}),
    "tools": ({"messages": HI, "tools": [{"name": "f"}]}, {}, {"messages_column": "messages", "tools_column": "tools"}),
    "no tools here": ({"messages": HI, "tools": None, "chat_template_kwargs": {"a": 1}}, {}, {"messages_column": "messages", "tools_column": "tools", "chat_template_kwargs_column": "chat_template_kwargs"}),
    "documents": ({"messages": HI, "documents": [{"title": "a", "text": "b"}]}, {}, {"messages_column": "messages", "documents_column": "documents"}),
    "tools beside a named column": ({"chat": HI, "tools": []}, {"corpus": 'messages_column = "chat"'}, {"messages_column": "chat", "tools_column": "tools"}),
    "tools that are not for the teacher": ({"messages": HI, "tools": [{"name": "f"}]}, {"corpus": "tools_column = false"}, {"messages_column": "messages", "tools_column": False}),
    "tools of another name": ({"messages": HI, "functions": [{"name": "f"}]}, {"corpus": 'tools_column = "functions"'}, {"messages_column": "messages", "tools_column": "functions"}),
    "tools of texts": ({"text": "Hi", "tools": "hammer"}, {}, {"text_column": "text"}),
    "prompts to answer": ({"prompt": "2+2?", "completion": " 4"}, {"generation": GENERATION}, {"text_column": "prompt"}),
    "chats to answer": ({"prompt": HI[:1]}, {"generation": GENERATION}, {"messages_column": "prompt"}),
}  # fmt: skip


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", FOUND)
def test_columns_of_usual_names_are_found_and_said(settle, case, format):
    row, changes, expected = FOUND[case]
    recipe, told = settle([row], format=format, **changes)
    names = [name for name in type(recipe.corpus).model_fields if name.endswith("_column")]
    found = {name: getattr(recipe.corpus, name) for name in names}
    defaults = {"text_column": "text", **dict.fromkeys(names, None)}
    assert found == {**defaults, "text_column": "text", **expected}
    assert len(told) <= 1
    said = {key for line in told for key in re.findall(r"corpus\.(\w+) = ", line)}
    named = {key for key in expected if key in changes.get("corpus", "")}
    assert said == {key for key in expected if expected[key] != "text"} - named
    assert recipe.published()["corpus"].items() >= expected.items()


def test_text_files_are_texts(settle):
    recipe, told = settle([], format="txt")
    assert (recipe.corpus.text_column, recipe.corpus.messages_column, told) == ("text", None, [])


def test_a_text_is_taken_as_ever_and_chats_beside_it_are_said(settle):
    recipe, told = settle([{"text": "Hi", "messages": HI}])
    assert (recipe.corpus.text_column, recipe.corpus.messages_column) == ("text", None)
    assert told == ['found in the corpus: corpus.text_column = "text", though the corpus has messages, too']  # fmt: skip


def test_it_looks_further_than_the_first_row(settle):
    rows = [{"messages": None}, {"messages": HI}, {"messages": HI, "tools": [{"name": "f"}]}]
    recipe, _ = settle(rows)
    assert (recipe.corpus.messages_column, recipe.corpus.tools_column) == ("messages", "tools")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"messages": HI, "conversations": HI}, {}, r'set corpus\.messages_column = "messages", or corpus\.messages_column = "conversations"'),
        ({"messages": HI, "prompt": "a", "completion": "b"}, {}, r'messages_column = "messages", or corpus\.prompt_column = "prompt" with corpus\.text_column = "completion"'),
        ({"messages": HI, "prompt": "a"}, {"generation": GENERATION}, r'messages_column = "messages", or corpus\.text_column = "prompt"'),
        ({"prompt": "a", "completion": "b"}, {"sequences": 'learn = "last"'}, r"sequences\.learn is valid only with corpus\.messages_column"),
        ({"text": "a"}, {"corpus": 'tools_column = "tools"'}, r"tools_column is valid only with messages_column"),
        ({"messages": HI}, {"sequences": 'eos = "always"'}, r"sequences\.eos has no effect with corpus\.messages_column"),
    ],
)  # fmt: skip
def test_what_is_in_doubt_or_cannot_be_is_one_line(settle, row, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        settle([row], **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [{"body": "Hi"}, {"prompt": "Hi"}, {"completion": "Hi"}, {"prompt": "a", "completion": HI}, {"conversations": "Hi"}, {"messages": 3}],
)  # fmt: skip
def test_where_nothing_is_found_the_missing_text_is_said(settle, row, tmp_path):
    settle([row])
    with pytest.raises(ValueError, match=r"has no column 'text'; its columns are .*; set corpus\.text_column, corpus\.messages"):  # fmt: skip
        run(tmp_path / "recipe.toml", tmp_path / "out")


def test_a_corpus_that_cannot_be_read_is_said_by_its_reader(settle, tmp_path):
    settle([{"text": "x"}])
    (tmp_path / "corpus.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"^corpus file corpus\.jsonl line 1 is not valid JSON"):
        run(tmp_path / "recipe.toml", tmp_path / "out")


def test_a_build_that_finds_its_columns_is_the_build_of_a_recipe_that_names_them(teacher, tmp_path, capfd):  # fmt: skip
    rows = [{"conversations": SHAREGPT, "tools": None}] * 12
    path = write(tmp_path, rows, "jsonl")
    named = 'messages_column = "conversations"\ntools_column = "tools"'
    recipes = {}
    for name, corpus in (("open", "max_documents = 99"), ("named", f"max_documents = 99\n{named}")):
        text = recipe_text(teacher, path.name, corpus=corpus, output="shard_tokens = 60\ncompletions_only = true")  # fmt: skip
        recipes[name] = tmp_path / f"{name}.toml"
        recipes[name].write_text(text.replace('id_column = "id"\n', ""))
    while run(recipes["open"], tmp_path / "open", max_shards=1).status == "stopped early":
        pass
    run(recipes["named"], tmp_path / "named")
    assert data_bytes(tmp_path / "open") == data_bytes(tmp_path / "named")
    manifests = [read_manifest(tmp_path / name) for name in recipes]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    assert manifests[0]["recipe"] == manifests[1]["recipe"]
    for recipe in recipes.values():
        for name in recipes:
            assert run(recipe, tmp_path / name).status == "already complete"
    path.unlink()
    assert run(recipes["open"], tmp_path / "named").status == "already complete"
    card = (tmp_path / "open" / "README.md").read_text()
    assert 'messages_column = "conversations"' in card
    assert "ShareGPT" in card


def test_the_command_says_what_was_found(cli, teacher, tmp_path):
    path = write(tmp_path, [{"messages": HI}], "jsonl")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(teacher, path.name).replace('id_column = "id"\n', ""))
    status, out, err = cli("build", recipe, "--output", tmp_path / "x", "--dry-run")
    assert status == 0
    assert 'messages_column = "messages"' in out
    assert err.startswith('found in the corpus: corpus.messages_column = "messages"\n')
    status, _, err = cli("build", recipe, "--output", tmp_path / "x")
    assert status == 0
    assert 'found in the corpus: corpus.messages_column = "messages"' in err
