"""A recipe says everything that decides the bytes, and a wrong one says what is wrong with it."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from builder.dataset.identity import DESCRIPTIVE, PINNED, differences, fingerprint, row_fingerprint
from builder.recipe.file import load_recipe
from builder.recipe.recipe import Recipe
from builder.recipe.sections import (
    OF_CHATS,
    CorpusRecipe,
    GenerationRecipe,
    OutputRecipe,
    SequencesRecipe,
    TeacherRecipe,
)
from builder.sources.known import KnownSources
from builder.sources.resolve import resolve_corpus, resolve_teacher
from docs import reference
from tests.conftest import REPOSITORY

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALLEST = 'name = "x"\n[corpus]\nfiles = ["a.txt"]\n[teacher]\npath = "t"\n'
SECTIONS = {
    "corpus": CorpusRecipe,
    "teacher": TeacherRecipe,
    "sequences": SequencesRecipe,
    "generation": GenerationRecipe,
    "output": OutputRecipe,
}


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_defaults(tmp_path):
    assert load(tmp_path, SMALLEST).model_dump() == {
        "name": "x",
        "description": None,
        "corpus": {
            "repo": None,
            "revision": "main",
            "config": None,
            "split": "train",
            "files": ("a.txt",),
            "embedded": None,
            "text_column": "text",
            "messages_column": None,
            "prompt_column": None,
            "tools_column": None,
            "documents_column": None,
            "chat_template_kwargs_column": None,
            "id_column": None,
            "text_unit": "file",
            "max_documents": None,
            "max_tokens": None,
            "license": None,
            "language": (),
        },
        "teacher": {
            "repo": None,
            "revision": "main",
            "path": "t",
            "gguf": None,
            "python": None,
            "weights": (),
            "embedded": None,
            "tokenizer": None,
            "config": None,
            "dtype": "bfloat16",
            "head_dtype": "float32",
            "attention": None,
            "device_map": None,
            "tensor_parallel": None,
            "trust_remote_code": False,
            "license": None,
        },
        "sequences": {
            "max_length": 1024,
            "long_documents": "chunk",
            "bos": "tokenizer",
            "eos": "tokenizer",
            "learn": "all",
            "chat_template": None,
            "chat_template_kwargs": {},
            "chat_template_date": None,
            "drop_unwritten": (),
            "batch_tokens": 16_384,
        },
        "generation": None,
        "output": {
            "top_k": 50,
            "tail_samples": 4,
            "tail_logprobs": True,
            "validation": None,
            "seed": 0,
            "temperatures": (),
            "hidden_states": False,
            "completions_only": False,
            "text": True,
            "profile": "default",
            "shard_tokens": 1_000_000,
            "partitions": 1,
        },
    }


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_the_docs_have_an_example_of_every_key_and_it_is_valid(section, tmp_path):
    fields = (SECTIONS[section] if section else Recipe).model_fields
    examples = reference.EXAMPLES[section]
    assert [key for key in fields if key not in SECTIONS] == list(examples)
    for key, toml in examples.items():
        smallest = {"": 'name = "x"', "corpus": "files = ['x']", "teacher": "path = 't'"}
        if (
            section in ("generation", "output", "sequences") and key in OF_CHATS
        ) or key == "completions_only":
            smallest["corpus"] += "\nmessages_column = 'messages'"
        lines = toml.replace("; ", "\n")
        smallest[section] = lines if key != "description" else f'name = "x"\n{lines}'
        path = tmp_path / f"{key}.toml"
        path.write_text(
            "\n".join(f"[{name}]\n{text}" if name else text for name, text in smallest.items())
        )
        recipe = load_recipe(path)
        found = getattr(recipe, section) if section else recipe
        assert key in found.model_fields_set


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("*/*/recipe.toml")), ids=lambda path: path.parent.name
)
def test_shipped_recipes_are_published_as_they_are_written(path):
    """That they are valid at all, test_hub checks."""
    recipe = load_recipe(path)
    published = recipe.published(attention=None)
    assert Recipe.model_validate_json(json.dumps(published)) == recipe
    assert recipe.published() == {
        **published,
        "teacher": {**published["teacher"], "attention": "sdpa"},
    }


# --- what is wrong ---------------------------------------------------------------------------------------------------------

FILES = '[corpus]\nfiles = ["a"]\n'
PATH = '[teacher]\npath = "t"\n'
WRONG = {
    "x = ": r"line 1, column 4 is not valid TOML: ",
    "": r"'name' is missing: add it; 'corpus' is missing: add it; 'teacher' is missing: add it",
    f'name = "x y"\n{FILES}{PATH}': r"name: expected at most 96 letters, digits, .* \(found .x y.\)",
    f'name = "../x"\n{FILES}{PATH}': r"name: expected at most 96 letters, digits, .* \(found .\.\./x.\)",
    f'name = "x"\ncorpus = 3\n{PATH}': r"corpus: expected a section of keys and values \(found 3\)",
    f'name = "x"\n[corpus]\n{PATH}': r"corpus: give exactly one of repo, files, embedded \(found none\)",
    f'name = "x"\n[corpus]\nfiles = []\n{PATH}': r"corpus: give exactly one of .* \(found none\)",
    f'name = "x"\n{FILES}repo = "a/b"\n{PATH}': r"corpus: give exactly one of .* \(found repo and files\)",
    f'name = "x"\n{FILES}split = "test"\n{PATH}': r"corpus: split is valid only with repo; leave it out",
    f'name = "x"\n{FILES}config = "en"\n{PATH}': r"corpus: config is valid only with repo; leave it out",
    f'name = "x"\n{FILES}revision = "v1"\n{PATH}': r"corpus: revision is valid only with repo; leave",
    f'name = "x"\n[corpus]\nfiles = 7\n{PATH}': r"corpus\.files: expected a list, such as \[.x.\] \(found 7\)",
    f'name = "x"\n{FILES}max_documents = 0\n{PATH}': r"max_documents: expected more than 0 \(found 0\)",
    f'name = "x"\n{FILES}max_tokens = -5\n{PATH}': r"corpus\.max_tokens: expected more than 0",
    f'name = "x"\n{FILES}text_unit = "page"\n{PATH}': r"text_unit: expected 'file' or 'line' \(found .page.\)",
    f'name = "x"\n{FILES}[teacher]\n': r"teacher: give exactly one of repo, path, gguf, python, embedded \(found none\)",
    f"{SMALLEST}gguf = 'm.gguf'": r"teacher: give exactly one of .* \(found path and gguf\)",
    f"{SMALLEST}tokenizer = 't'": r"teacher: tokenizer is valid only with gguf; leave it out",
    f"{SMALLEST}config = 't'": r"teacher: config is valid only with gguf; leave it out",
    f"{SMALLEST}revision = 'v1'": r"teacher: revision is valid only with repo; leave it out",
    f"{SMALLEST}trust_remote_code = true": r"teacher: trust_remote_code is valid only with repo",
    f"{SMALLEST}dtype = 'int8'": r"teacher\.dtype: expected 'float32', .* \(found .int8.\)",
    f'name = "x"\n{FILES}[teacher]\nrepo = "a/b"\ntrust_remote_code = true\n': r"full 40-digit commit, not 'main'",
    f'name = "x"\n{FILES}[teacher]\nrepo = "a/b"\nrevision = "{COMMIT[:8]}"\ntrust_remote_code = true\n':
        rf"full 40-digit commit, not '{COMMIT[:8]}'",
    f"{SMALLEST}attention = 'fast'": r"teacher\.attention: expected one of sdpa, .*, or a kernel of the Hub .* \(found .fast.\)",
    f"{SMALLEST}[sequences]\nbatch_tokens = 0": r'batch_tokens: expected a whole number of at least 1, or "auto" \(found 0\)',
    f"{SMALLEST}[sequences]\nmax_length = 7": r"max_length: expected at least 8 \(found 7\)",
    f"{SMALLEST}[sequences]\nbos = true": r"bos: expected 'tokenizer', 'always' or 'never' \(found true\)",
    f"{SMALLEST}[sequences]\nlearn = 'first'": r"learn: expected 'all' or 'last' \(found .first.\)",
    f"{SMALLEST}[sequences]\nchat_template_date = '31 Jan'": r"chat_template_date is '31 Jan', expected a day such as",
    f'name = "x"\n{FILES}tools_column = true\n{PATH}': r"corpus\.tools_column: expected a column name, or false .* \(found true\)",
    f'name = "x"\n{FILES}text_column = "t"\ntools_column = "u"\n{PATH}': r"tools_column is valid only with messages_column",
    f'name = "x"\n{FILES}messages_column = "m"\n{PATH}[sequences]\nlearn = "last"\n[generation]\nmax_new_tokens = 2':
        r"sequences\.learn = \"last\" selects answers of the corpus",
    f'name = "x"\n{FILES}prompt_column = "p"\n{PATH}[generation]\nmax_new_tokens = 2':
        r"corpus\.prompt_column is for corpora that hold completions",
    'name = "x"\n[corpus]\nembedded = "python-docs"\nprompt_column = "p"\n' + PATH: r"holds texts, not messages; leave out prompt_column",
    f"{SMALLEST}[output]\ntop_k = 0": r"output\.top_k: expected .* at least 1, or \"all\" \(found 0\)",
    f"{SMALLEST}[output]\ntop_k = 5.5": r"output\.top_k: expected a whole number .* \(found 5\.5\)",
    f"{SMALLEST}[output]\ntop_k = '5'": r"output\.top_k: expected a whole number .* \(found .5.\)",
    f"{SMALLEST}[output]\ntext = 1": r"output\.text: expected true or false \(found 1\)",
    f"{SMALLEST}[output]\nprofile = 'big'": r"profile: expected 'default' or 'compact' \(found .big.\)",
    f'name = "x"\n{FILES}max_documents = 2\n{PATH}[output]\npartitions = 3':
        r"output\.partitions is 3, but the corpus's limit is smaller; choose fewer partitions",
    # Everything that is wrong is said at once.
    f"{SMALLEST}[sequences]\nmax_lenght = 9\n[output]\ntop_k = -1":
        r"unknown key 'sequences\.max_lenght'; did you mean 'max_length'\?; output\.top_k: expected a whole",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, text)
    assert str(raised.value).startswith(f"{tmp_path / 'recipe.toml'}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_every_misspelt_key_suggests_the_right_one(tmp_path, section):
    fields = list((SECTIONS[section] if section else Recipe).model_fields)
    for field in fields:
        misspelt = f"{field[:-1]}_{field[-1]}"
        values = {"name": "x", "corpus": {"files": ["a"]}, "teacher": {"path": "t"}}
        (values.setdefault(section, {}) if section else values)[misspelt] = 1
        with pytest.raises(ValueError, match="unknown key") as raised:
            load(tmp_path, to_toml(values))
        where = f"{section}.{misspelt}" if section else misspelt
        assert f"unknown key '{where}'; did you mean '{field}'?" in str(raised.value)
    values["output"] = {"zzz": 1}
    with pytest.raises(
        ValueError,
        match=r"'output\.zzz'; known keys: top_k, tail_samples, tail_logprobs, validation, seed, ",
    ):
        load(tmp_path, to_toml(values))


def to_toml(values: dict[str, Any]) -> str:
    """Scalars before sections."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in section.items())]
    return "\n".join(lines)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*none\.toml; name a \.toml file such as"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.toml line 1 is not UTF-8"):
        load_recipe(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("revision", "expected"),
    [(COMMIT, True), (COMMIT[:39], False), (COMMIT.upper(), False), ("g" * 40, False), ("", False)],
)
def test_what_a_commit_is(revision, expected):
    assert CorpusRecipe(repo="org/set", revision=revision).is_pinned == expected


# --- fingerprint -----------------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "corpus.repo": "other/corpus",
    "corpus.config": "de",
    "corpus.split": "test",
    "corpus.embedded": None,
    "corpus.text_column": "body",
    "corpus.messages_column": "messages",
    "corpus.prompt_column": "prompt",
    "corpus.tools_column": "tools",
    "corpus.documents_column": False,
    "corpus.chat_template_kwargs_column": "chat_template_kwargs",
    "corpus.id_column": "id",
    "corpus.text_unit": "line",
    "corpus.max_documents": 9,
    "corpus.max_tokens": 9,
    "teacher.repo": "other/teacher",
    "teacher.embedded": None,
    "teacher.dtype": "float32",
    "teacher.attention": "eager",
    "teacher.trust_remote_code": True,
    "teacher.device_map": "auto",
    "teacher.tensor_parallel": 2,
    "sequences.max_length": 1023,
    "sequences.long_documents": "truncate",
    "sequences.bos": "never",
    "sequences.eos": "always",
    "sequences.learn": "last",
    "sequences.chat_template_kwargs": {"enable_thinking": False},
    "sequences.chat_template_date": "2026-01-31",
    "sequences.drop_unwritten": ("name",),
    "sequences.batch_tokens": 16_383,
    "generation.max_new_tokens": 99,
    "generation.temperature": 0.5,
    "generation.top_p": 0.5,
    "generation.samples": 2,
    "generation.seed": 1,
    "generation.batch_tokens": 16_383,
    "output.top_k": 49,
    "output.tail_samples": 0,
    "output.tail_logprobs": False,
    "output.seed": 1,
    "output.validation": 0.01,
    "output.temperatures": (2.0,),
    "output.hidden_states": True,
    "output.completions_only": True,
    "output.text": False,
    "output.profile": "compact",
    "output.shard_tokens": 999_999,
    "output.partitions": 2,
    "teacher.head_dtype": "teacher",
}
"""Another value for every field that changes bytes, or could. One that is added to the recipe has to be added here."""

BASE = Recipe(
    name="x",
    corpus=CorpusRecipe(embedded="python-docs"),
    teacher=TeacherRecipe(embedded="smollm2-135m-instruct"),
)


def plan(recipe: Recipe, **sources: str) -> dict[str, Any]:
    kept = {"corpus": {"sha256": "a" * 64}, "teacher": {"sha256": "b" * 64}}
    return {"recipe": recipe.published(), **kept, **{k: {"sha256": v} for k, v in sources.items()}}


def changed(field: str, value: Any) -> Recipe:
    section, name = field.split(".")
    before = getattr(BASE, section) or GenerationRecipe(max_new_tokens=100)
    values = before.model_copy(update={name: value})
    return BASE.model_copy(update={section: values})


def test_every_field_changes_the_fingerprint_but_what_is_pinned_or_descriptive():
    fields = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    pinned = {f"{name}.{key}" for name, keys in PINNED.items() for key in keys}
    descriptive = {f"{name}.{key}" for name, keys in DESCRIPTIVE.items() if name for key in keys}
    assert pinned | descriptive < fields
    assert set(OTHER) == fields - pinned - descriptive
    assert set(Recipe.model_fields) == {*DESCRIPTIVE[""], *SECTIONS}

    found = {field: fingerprint(plan(changed(field, value))) for field, value in OTHER.items()}
    found["nothing"] = fingerprint(plan(BASE))
    found["corpus content"] = fingerprint(plan(BASE, corpus="c" * 64))
    found["teacher content"] = fingerprint(plan(BASE, teacher="c" * 64))
    assert len(set(found.values())) == len(found)
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in found.values())

    for field in pinned | descriptive:
        value = ("x",) if field in ("corpus.files", "corpus.language") else "x"
        assert fingerprint(plan(changed(field, value))) == found["nothing"], field
    renamed = BASE.model_copy(update={"name": "y", "description": "z"})
    assert fingerprint(plan(renamed)) == found["nothing"]


def test_only_what_decides_each_row_changes_the_fingerprint_of_rows():
    rows = {field: row_fingerprint(plan(changed(field, value))) for field, value in OTHER.items()}
    base = row_fingerprint(plan(BASE))
    assert {field for field, value in rows.items() if value == base} == {
        *("corpus.max_documents", "corpus.max_tokens")
    }


def test_the_schema_version_changes_the_fingerprint():
    before = fingerprint(plan(BASE))
    assert fingerprint(plan(BASE), "9.0.0") != before


def test_a_fingerprint_does_not_depend_on_how_paths_are_spelled(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("c/a.txt", "c/b.txt", "t/config.json", "tok/tokenizer.json", "m.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(files: tuple[str, ...], **teacher: str) -> str:
        recipe = BASE.model_copy(
            update={"corpus": CorpusRecipe(files=files), "teacher": TeacherRecipe(**teacher)}
        )
        base, known = tmp_path / "c" / "..", KnownSources()
        sources = {
            "corpus": resolve_corpus(recipe.corpus, base, known).provenance,
            "teacher": resolve_teacher(recipe.teacher, base, known).provenance,
        }
        return fingerprint({"recipe": recipe.published(), **sources})

    files = [("c/a.txt", "c/b.txt"), ("c/*.txt",), ("./c/../c/*.txt",), (f"{tmp_path}/c/*.txt",), ("~/c/*.txt",)]  # fmt: skip
    paths = ["t", "./t", f"{tmp_path}/t", "~/t"]
    assert len({found(f, path=p) for f, p in itertools.product(files, paths)}) == 1
    ggufs = [{"gguf": "m.gguf"}, {"gguf": f"{tmp_path}/m.gguf"}]
    assert len({found(files[0], **gguf) for gguf in ggufs}) == 1
    toks = [{**gguf, "tokenizer": p} for gguf in ggufs for p in ("tok", f"{tmp_path}/tok")]
    with_tokenizer = {found(files[0], **teacher) for teacher in toks}
    assert len(with_tokenizer) == 1

    assert found(("c/b.txt", "c/a.txt"), path="t") != found(files[0], path="t")  # the order counts
    before = found(files[0], path="t")
    (tmp_path / "tok" / "tokenizer.json").write_text("another")
    assert found(files[0], **toks[0]) not in with_tokenizer
    (tmp_path / "t" / "config.json").write_text("another")
    after = found(files[0], path="t")
    (tmp_path / "c" / "a.txt").write_text("another")
    assert len({before, after, found(files[0], path="t")}) == 3


# --- what is published -----------------------------------------------------------------------------------------------------


def test_no_absolute_path_is_published(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for prefix in (f"{tmp_path}/secret/", "~/secret/"):
        for teacher in ({"path": "x"}, {"gguf": "x", "tokenizer": "y", "config": "z"}):
            recipe = Recipe(
                name="x",
                corpus=CorpusRecipe(files=(f"{prefix}a-*.txt", "b/c.txt", "../secret/d.txt")),
                teacher=TeacherRecipe(**{key: prefix + value for key, value in teacher.items()}),
            )
            published = recipe.published()
            assert published["corpus"]["files"] == ["a-*.txt", "b/c.txt", "d.txt"]
            assert {k: v for k, v in published["teacher"].items() if k in teacher} == teacher
            text = json.dumps(published)
            assert "secret" not in text
            assert str(tmp_path) not in text
            assert Recipe.model_validate_json(text).published() == published


def test_a_home_of_nobody_is_refused(tmp_path):
    corpus = CorpusRecipe(files=("~nobody-of-this-name/a.txt",))
    with pytest.raises(ValueError, match=r"'~nobody-of-this-name/a\.txt' is in the home dir"):
        resolve_corpus(corpus, tmp_path, KnownSources())


@pytest.mark.parametrize(
    ("resolve", "section"),
    [(resolve_corpus, CorpusRecipe(repo="org/x")), (resolve_teacher, TeacherRecipe(repo="org/x"))],
)
def test_a_directory_of_the_name_of_a_hub_repository_is_refused(
    tmp_path, monkeypatch, resolve, section
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'org/x' is to come from the Hub, but there is a direct"):
        resolve(section, tmp_path, KnownSources())


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [1]}}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 2, "c": 2}}, ["a.b: 1 → 2"]),
        ({"b": 1, "a": None}, {"b": 2, "a": "x"}, ['a: null → "x"', "b: 1 → 2"]),
        ({}, {"new": True}, ["new: null → true"]),
        ({"gone": {"x": 1}}, {}, ['gone: {"x": 1} → null']),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] → [2, 1]"]),
        ({"a": "ü" * 99}, {"a": 1}, [f'a: "{"ü" * 75} … → 1']),
    ],
)
def test_differences(old, new, lines):
    assert differences(old, new) == lines
