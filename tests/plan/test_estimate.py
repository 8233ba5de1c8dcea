"""An estimate is exact where its sample is all there is, near it elsewhere, and costs no build."""

import gzip
import io
import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from builder.build.build import build
from builder.dataset.identity import fingerprint
from builder.dataset.manifest import read_manifest
from builder.plan import estimate as module
from builder.plan.estimate import SAMPLE_DOCUMENTS, Estimate, describe, estimate
from builder.plan.storage import bytes_per_token
from builder.recipe.file import load_recipe
from tests.chats import CHATML, chatty_teacher
from tests.conftest import REPOSITORY, TRAINING_TEXT, sample_documents, write_jsonl


def estimated(recipe: Path) -> Estimate:
    return estimate(load_recipe(recipe), recipe.parent, device="cpu")


def built(recipe: Path) -> dict[str, Any]:
    output = recipe.parent / "out"
    build(load_recipe(recipe), recipe.parent, output)
    return read_manifest(output)["totals"]


@pytest.fixture(autouse=True)
def _a_known_rate(monkeypatch):
    """Half a second of matrix products is not needed here, and its result differs each time."""
    monkeypatch.setattr(module, "_tokens_per_second", lambda parameters, dtype, device: 100.0)


# --- tokens ----------------------------------------------------------------------------------------------------------------

EXACT = {
    "the whole corpus": {},
    "truncated": {"sequences": 'max_length = 16\nlong_documents = "truncate"'},
    "with end-of-sequence": {"sequences": 'eos = "always"'},
    "as many documents as the sample": {"corpus": f"max_documents = {SAMPLE_DOCUMENTS}"},
    "fewer documents": {"corpus": "max_documents = 7"},
    "a limit of tokens inside the sample": {"corpus": "max_tokens = 900"},
    "a limit at the end of a document": {"corpus": "max_tokens = 26"},
}


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_a_build_inside_the_sample_is_counted_exactly(make_recipe, corpus_file, changes):
    limited = "max_" in changes.get("corpus", "")
    documents = sample_documents(SAMPLE_DOCUMENTS + 20 if limited else SAMPLE_DOCUMENTS)
    for at in (0, 3, 30):  # blank ones do not count
        documents.insert(at, {"id": "blank", "text": " "})
    write_jsonl(corpus_file, documents)
    recipe = make_recipe(**changes)
    assert estimated(recipe).tokens == built(recipe)["tokens"]


def json_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()  # with \\u escapes


def text_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(row["text"] + "\n" for row in rows).encode()


def two_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return b"".join(map(zstandard.ZstdCompressor().compress, (content[:half], content[half:])))


def parquet(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


FORMS: dict[str, tuple[str, int, Callable[[list[dict[str, str]]], bytes]]] = {
    "jsonl": (".jsonl", 300, json_lines),
    "jsonl.gz": (".jsonl.gz", 300, lambda rows: gzip.compress(json_lines(rows))),
    "jsonl.zst": (".jsonl.zst", 300, lambda rows: two_frames(json_lines(rows))),
    "many jsonl.gz": (".jsonl.gz", 20, lambda rows: gzip.compress(json_lines(rows))),
    "parquet": (".parquet", 130, parquet),
    "lines": (".txt", 300, text_lines),
    "lines.gz": (".txt.gz", 150, lambda rows: gzip.compress(text_lines(rows))),
    "files": (".txt", 1, lambda rows: rows[0]["text"].encode()),
}
"""Suffix, rows in a file, content of a file."""


def long_texts(count: int = 300) -> list[str]:
    return [f"{TRAINING_TEXT[i % 3]} {i:05d}" for i in range(count)]


def count_tokens(tokenizer: Any, count: int = 300) -> int:
    return sum(len(tokenizer.encode(text)) for text in long_texts(count))


def write_long_corpus(base: Path, form: str, count: int = 300) -> dict[str, str]:
    """Documents of like length in one of many forms; what the recipe says of them."""
    rows = [{"id": str(i), "more": "x" * 80, "text": t} for i, t in enumerate(long_texts(count))]
    suffix, rows_per_file, content = FORMS[form]
    for first in range(0, count, rows_per_file):
        path = base / f"long-{first:05d}{suffix}"
        path.write_bytes(content(rows[first : first + rows_per_file]))
    unit = "file" if form == "files" else "line"
    own_id = "" if suffix.startswith(".txt") else "id"
    return {"files": f"long-*{suffix}", "corpus": f'text_unit = "{unit}"\nid_column = "{own_id}"'}


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_corpus_is_scaled_by_what_the_sample_is_of_it(
    make_recipe, tmp_path, tiny_tokenizer, form
):
    found = estimated(make_recipe(**write_long_corpus(tmp_path, form))).tokens
    real = count_tokens(tiny_tokenizer)
    assert found == pytest.approx(real, rel=0.05)
    assert found != real  # for it is an estimate


def test_half_of_the_rows_being_blank_is_seen(make_recipe, corpus_file, tmp_path, tiny_tokenizer):
    rows = [{"id": "", "text": text} for long in long_texts() for text in (None, long)]
    write_jsonl(corpus_file, rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for files in (corpus_file.name, "c.parquet"):
        found = estimated(make_recipe(files=files)).tokens
        assert found == pytest.approx(count_tokens(tiny_tokenizer), rel=0.05)


def test_a_compressed_file_larger_than_what_is_read_of_it(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 2**20)
    compressed = write_long_corpus(tmp_path, "jsonl.zst", 9_000)
    # In files as large as the corpus is in all of them.
    one = tmp_path / "one.jsonl.zst"
    paths = sorted(tmp_path.glob("long-*"))
    one.write_bytes(b"".join(path.read_bytes() for path in paths))
    plain = write_long_corpus(tmp_path, "jsonl", 9_000)
    expected = estimated(make_recipe(**plain)).tokens
    found = estimated(make_recipe(**compressed | {"files": one.name})).tokens
    assert found == pytest.approx(expected, rel=0.25)
    assert expected > 250_000


@pytest.mark.parametrize(
    "limit", ["max_tokens = 3000", "max_documents = 100", "max_tokens = 9_999_999"]
)
def test_limits(make_recipe, tmp_path, tiny_tokenizer, limit):
    changes = write_long_corpus(tmp_path, "jsonl")
    changes["corpus"] += f"\n{limit}"
    found = estimated(make_recipe(**changes)).tokens
    if limit == "max_tokens = 3000":
        assert found == 3000
    else:
        count = 100 if "documents" in limit else 300
        assert found == pytest.approx(count_tokens(tiny_tokenizer, count), rel=0.05)


def test_a_corpus_without_text_is_refused(make_recipe, corpus_file):
    write_jsonl(corpus_file, [{"id": "a", "text": " "}])
    with pytest.raises(
        ValueError,
        match=r"the corpus has no text \(1 null, empty or blank document\); check corpus\.text_column",
    ):
        estimated(make_recipe())


# --- what is resolved, skipped, cut and refused ---------------------------------------------------------------------------

RESOLVED = {
    "texts": {},
    "all": {"output": 'top_k = "all"\ntail_samples = 0'},
    "a 16-bit teacher": {"dtype": 'dtype = "bfloat16"'},
    "rounded": {"dtype": 'dtype = "bfloat16"\nhead_dtype = "teacher"'},
    "much": {
        "corpus": 'language = ["en"]\nlicense = "mit"\nmax_tokens = 500',
        "output": "temperatures = [2.0, 0.5]\nhidden_states = true\nseed = 3",
    },
    "written by the teacher": {"generation": "max_new_tokens = 4\ntemperature = 0"},
}


@pytest.mark.parametrize("changes", RESOLVED.values(), ids=RESOLVED)
def test_the_resolved_recipe_is_a_recipe_of_the_same_dataset(make_recipe, changes):
    dtype = changes.get("dtype", 'dtype = "float32"')
    recipe = make_recipe(**{key: lines for key, lines in changes.items() if key != "dtype"})
    recipe.write_text(recipe.read_text("utf-8").replace('dtype = "float32"', dtype))
    first = estimated(recipe)
    recipe.write_text(first.recipe, encoding="utf-8")
    again = estimated(recipe)
    assert fingerprint(again.plan) == fingerprint(first.plan)
    assert again.recipe == first.recipe
    said = tomllib.loads(first.recipe)
    assert said["sequences"]["eos"] == "tokenizer"
    assert said["teacher"]["attention"] == "sdpa"


def test_a_resolved_recipe_of_chats(tmp_path, tiny_tokenizer, tiny_model):
    chat_teacher = chatty_teacher(tiny_tokenizer, tiny_model, tmp_path / "chatty")
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    write_jsonl(tmp_path / "c.jsonl", [{"messages": row, "tools": None} for row in rows])
    template = CHATML + "{% if thinking and tag %}{% endif %}"
    (tmp_path / "own.jinja").write_text(template)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\n[corpus]\nfiles = ["c.jsonl"]\n[teacher]\npath = {json.dumps(str(chat_teacher))}\n'
        '[sequences]\nmax_length = 64\nchat_template = "own.jinja"\nchat_template_kwargs = { thinking = false, tag = [1, { "c d" = "\\u202e" }] }\n'
    )
    first = estimated(recipe)
    recipe.write_text(first.recipe, encoding="utf-8")
    again = estimated(recipe)
    assert fingerprint(again.plan) == fingerprint(first.plan)
    assert first.plan["recipe"]["corpus"]["messages_column"] == "messages"
    assert "\u202e" not in first.recipe


@pytest.mark.parametrize(("how", "told"), [("chunk", "into chunks"), ("truncate", "off")])
def test_what_is_skipped_and_cut_is_counted(make_recipe, corpus_file, how, told):
    texts = ["one", " ", TRAINING_TEXT[0] * 9, "", "two", TRAINING_TEXT[0] * 5]
    write_jsonl(corpus_file, [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    found = estimated(make_recipe(sequences=f'max_length = 32\nlong_documents = "{how}"'))
    assert (found.sample.documents, found.sample.skipped, found.sample.cut) == (6, 2, 2)
    assert describe(found).splitlines()[0] == (
        f"documents  all 6: 2 skipped (null, empty or blank), 2 cut {told} at sequences.max_length = 32"
    )


def test_a_sample_says_that_it_is_one(make_recipe, corpus_file):
    write_jsonl(corpus_file, [{"id": "blank", "text": ""}, *sample_documents(100)])
    assert describe(estimated(make_recipe())).startswith(
        f"documents  of the first {SAMPLE_DOCUMENTS + 1}: 1 skipped"
    )


REFUSED = {
    "top_k": ({"output": "top_k = 449"}, r"output\.top_k is 449, .* has 448 tokens"),
    "length": ({"sequences": "max_length = 257"}, r"max_length is 257, .* for 256 positions"),
    "partitions": ({"output": "partitions = 2"}, r"partitions is 2, .* fewer files \(1\)"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_build_refuses_is_refused_in_the_same_words(make_recipe, changes, message):
    recipe = make_recipe(**changes)
    with pytest.raises(ValueError, match=message) as of_estimate:
        estimated(recipe)
    with pytest.raises(ValueError, match=message) as of_build:
        built(recipe)
    assert str(of_estimate.value) == str(of_build.value)


# --- bytes and time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["default", "compact"])
@pytest.mark.parametrize("text", ["true", "false"])
def test_bytes_are_near_those_of_a_build(make_recipe, corpus_file, text, profile):
    words, chance = " ".join(TRAINING_TEXT).split(), random.Random(0)
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 60))) for _ in range(100)]
    write_jsonl(corpus_file, [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    output = f'shard_tokens = 100_000\ntext = {text}\nprofile = "{profile}"'
    recipe = make_recipe(output=output)
    assert estimated(recipe).bytes == pytest.approx(built(recipe)["bytes"], rel=0.25)


def test_more_is_stored_in_more_bytes(make_recipe):
    sizes = [
        estimated(make_recipe(output=output)).bytes
        for output in (
            'top_k = 10\ntext = false\nprofile = "compact"',
            "top_k = 10\ntext = false",
            "top_k = 10",
            "top_k = 50",
        )
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 163.29),
        ({"profile": "compact"}, 153.3),
        ({"tail_samples": 4}, 177.2),
        ({"top_k": 16, "tail_samples": 16, "tail_logprobs": False, "text": False}, 88.84),
        ({"hidden_states": True}, 1_231),
        ({"top_k": "all"}, 72_900),
    ],
)
def test_the_embedded_dataset_of_the_readme(changes, expected):
    """What its builds took."""
    path = REPOSITORY / "dataset_cards" / "smollm2-135m-python-docs" / "recipe.toml"
    recipe = load_recipe(path)
    changed = recipe.model_copy(update={"output": recipe.output.model_copy(update=changes)})
    found = bytes_per_token(changed, vocab_size=49_152, hidden_size=576)
    assert found == pytest.approx(expected, rel=0.03)


def test_time_is_tokens_by_the_rate_that_the_device_reaches(make_recipe, tiny_model):
    found = estimated(make_recipe())
    assert found.seconds == found.tokens / 100
    assert found.device == "cpu"


def test_parameters_are_counted_from_the_heads_of_the_files(make_recipe, tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "_tokens_per_second", lambda parameters, *_: seen.append(parameters) or 1.0
    )
    estimated(make_recipe())
    assert seen == [sum(p.numel() for p in tiny_model.parameters())]
