"""What goes wrong around a build, seen from the command line: one clear line, a status that is not 0, nothing half-done."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from builder.dataset.manifest import read_manifest
from tests.build.test_build import data_bytes, read_rows
from tests.conftest import TRAINING_TEXT, recipe_text, run_cli, sample_documents, write_jsonl
from tests.end_to_end.test_kill import check_kept, finished_shards
from tests.loopback_hub import Client
from tests.teacher.test_model import SMALL, make_model, save, write_remote_code

COMMIT = "0" * 40


def assert_one_line(
    status: int, out: str, err: str, message: str, expected_status: int = 1
) -> None:
    assert status == expected_status, err
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err  # the dot matches no second line
    assert re.search(message, err), err
    assert not re.search(r"Traceback|\[Errno|not expected", err), err


# What a corpus can be instead of good


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


GOOD = {"id": "a", "text": "all is well"}
LONG = jsonl(*({"id": str(i), "text": f"{i * i} " * 50} for i in range(500)))
LATIN_1 = '{"id": "a", "text": "café"}\n'.encode("latin-1")
NOT_UTF_8 = (
    r"is not valid UTF-8 \(byte 0xe9 after .*'\); convert the file to UTF-8, or leave it out"
)
NO_TEXT = r"the corpus has no text \(%d null, empty or blank documents?\); check corpus.text_column"
OTHER_ID = (
    r"expected text or a whole number; set corpus.id_column to another column, or leave it out"
)
CUT = r"cannot be read \(Compressed file ended before .*\); repair it, or leave it out"
NO_FORMAT = r"cannot tell the format of 'c\.%s'; expected \.txt, \.jsonl, \.csv \(each also with \.gz or \.zst\) or \.parquet"

CORPORA: dict[str, tuple[str, bytes | None, str]] = {
    "absent": ("c.jsonl", None, r"corpus\.files: nothing matches 'c\.jsonl' \(looked in "),
    "a folder of something else": ("c.jsonl/x", b"", r"the folder 'c\.jsonl' holds x, which is not \.txt, \.jsonl"),
    "of no known format": ("c.xml", b"<text/>\n", NO_FORMAT % "xml"),
    "compressed, of no known format": ("c.gz", b"", NO_FORMAT % "gz"),
    "of nothing": ("c.jsonl", b"", NO_TEXT % 0),
    "a text of nothing": ("c.txt", b"", NO_TEXT % 1),
    "a table of nothing": ("c.parquet", parquet(pa.table({"text": pa.array([], pa.string())})), NO_TEXT % 0),
    "blank": ("c.jsonl", jsonl(*({"id": "a", "text": text} for text in (None, "", " \n"))), NO_TEXT % 3),
    "blank lines": ("c.txt", b"\n \n\t\n", NO_TEXT % 1),
    "without the column": (
        "c.jsonl",
        jsonl({"id": "a", "body": "x"}),
        r"file c\.jsonl has no column 'text'; its columns are id, body; set corpus\.text_column",
    ),
    "without the column of ids": (
        "c.parquet",
        parquet(pa.table({"text": ["x"]})),
        r"file c\.parquet has no column 'id'; its columns are text; set .*corpus\.id_column",
    ),
    "numbers": (
        "c.jsonl",
        jsonl(GOOD, {"id": "b", "text": 3}),
        r"file c\.jsonl line 2: column 'text' holds a number, expected text; set corpus\.text_column",
    ),
    "lists": (
        "c.parquet",
        parquet(pa.table({"text": [["x", "y"]]})),
        r"file c\.parquet row 1: column 'text' holds a list, expected text",
    ),
    "bytes": ("c.parquet", parquet(pa.table({"text": [b"x"]})), r"holds bytes, expected text"),
    "an id that is an object": ("c.jsonl", jsonl({"id": {}, "text": "x"}), f"holds an object, {OTHER_ID}"),
    "an id that is true": ("c.jsonl", jsonl({"id": True, "text": "x"}), f"holds true or false, {OTHER_ID}"),
    "latin-1, text": ("c.txt", "café".encode("latin-1"), r"byte 0xe9 after …'caf'.*convert the file to UTF-8"),
    "latin-1": ("c.jsonl", jsonl(GOOD) + LATIN_1, NOT_UTF_8),
    "latin-1, late": ("c.jsonl", LONG + LATIN_1, NOT_UTF_8),
    "latin-1, compressed": ("c.jsonl.gz", gzip.compress(LATIN_1), NOT_UTF_8),
    "latin-1 in a table": (
        "c.parquet",
        parquet(pa.table({"text": pa.array([LATIN_1]).view(pa.string())})),
        NOT_UTF_8,
    ),
    "broken JSON": (
        "c.jsonl",
        jsonl(GOOD, GOOD) + b'{"id": "b", "text": "cut\n',
        r"file c\.jsonl line 3 is not valid JSON \(Unterminated string.*\); expected one JSON object per line",
    ),
    "nested too deep": ("c.jsonl", b"[" * 10**5, r"line 1 is not valid JSON"),
    "a JSON list": ("c.jsonl", json.dumps([GOOD]).encode(), r"line 1 is a list; expected one JSON object per line"),
    "half a character": (
        "c.jsonl",
        jsonl(GOOD) + rb'{"id": "b", "text": "x \ud800 y"}',
        r"file c\.jsonl line 2: holds '\\ud800', half of a surrogate pair.*; replace it",
    ),
    "half a character in an id": ("c.jsonl", jsonl({"id": "\udc00", "text": "x"}), r"line 1: holds '\\udc00'"),
    "no Parquet": ("c.parquet", b"hello" * 9, r"file c\.parquet cannot be read \(Parquet magic bytes .*\); repair it"),
    "cut Parquet": ("c.parquet", parquet(pa.table({"text": ["x"]}))[:-9], r"file c\.parquet cannot be read \("),
    "an empty Parquet": ("c.parquet", b"", r"file c\.parquet cannot be read \(Parquet file size is 0 bytes\)"),
    "no gzip": ("c.jsonl.gz", jsonl(GOOD), r"file c\.jsonl\.gz cannot be read \(Not a gzipped file"),
    "cut gzip": ("c.jsonl.gz", gzip.compress(LONG)[:-99], CUT),
    "cut gzip, text": ("c.txt.gz", gzip.compress(LONG)[:-99], CUT),
    "no zstd": ("c.jsonl.zst", jsonl(GOOD), r"file c\.jsonl\.zst cannot be read \(.*; repair it"),
}  # fmt: skip


LATE = {"latin-1, late", "cut gzip"}
"""What is read before it makes shards, which stay: the build is not complete."""


@pytest.mark.parametrize("case", CORPORA)
def test_a_bad_corpus_is_one_line(cli, make_recipe, tmp_path, case):
    name, content, message = CORPORA[case]
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    recipe = make_recipe(files=name.split("/")[0])
    if ".txt" in name or (".parquet" in name and "'id'" not in message):
        recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    assert_one_line(*cli("build", recipe, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = {p.suffix for p in (tmp_path / "out").rglob("*")} & {".parquet", ".partial"}
    assert kept == ({".parquet"} if case in LATE else set())


def test_the_second_file_of_a_corpus_is_named_too(cli, make_recipe, tmp_path):
    (tmp_path / "part-0.parquet").write_bytes(parquet(pa.table({"id": ["a"], "text": ["x"]})))
    (tmp_path / "part-1.parquet").write_bytes(b"hello")
    result = cli("build", make_recipe(files="part-*.parquet"), "--output", tmp_path / "out")
    assert_one_line(*result, r"file part-1\.parquet cannot be read \(")


# What a recipe can be instead of good


def with_line(section: str, line: str) -> Callable[[str], str]:
    return lambda text: text.replace(f"[{section}]\n", f"[{section}]\n{line}\n")


def instead(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed = re.sub(old, lambda _: new, text, flags=re.MULTILINE)
        assert changed != text
        return changed

    return change


RECIPES: dict[str, tuple[Callable[[str], str | bytes | None], str]] = {
    "absent": (lambda _: None, r"no recipe at \S+/recipe\.toml; name a \.toml file"),
    "not TOML": (lambda _: "name = \n", r"line 1, column 8 is not valid TOML: "),
    "not text": (lambda _: b"\xff\xfe", r"line 1 is not UTF-8 .byte 0xff"),
    "nothing": (lambda _: "", r"'name' is missing: add it; 'corpus' is missing: add it; 'teacher' is missing: add it"),
    "a misspelt key": (instead("top_k", "topk"), r"unknown key 'output\.topk'; did you mean 'top_k'\?"),
    "an unknown key": (with_line("output", "zzz = 1"), r"unknown key 'output\.zzz'; known keys: top_k, tail_samples, tail_logprobs, "),
    "a misspelt section": (
        instead(r"\[corpus\]", "[korpus]"),
        r"'corpus' is missing: add it; unknown key 'korpus'; did you mean 'corpus'\?",
    ),
    "a missing section": (instead(r"\[teacher\](.|\n)*(?=\n\[s)", ""), r"'teacher' is missing"),
    "another type": (instead("top_k = 20", 'top_k = "20"'), r"output\.top_k: expected a whole number of at least 1, or \"all\" \(found \"20\"\)"),
    "no list": (instead(r"\[(\".*\")\]", "7"), r"corpus\.files: expected a list, such as \[\"x\"\] \(found 7\)"),
    "a value out of range": (instead("top_k = 20", "top_k = 0"), r"output\.top_k: expected a whole number of at least 1, .* \(found 0\)"),
    "an unknown value": (
        instead("float32", "fp32"),
        r"teacher\.dtype: expected 'float32', 'bfloat16' or 'float16' \(found \"fp32\"\)",
    ),
    "a name with a path": (instead('"tiny"', '"../tiny"'), r"name: expected at most 96 letters, digits"),
    "two sources": (with_line("corpus", 'repo = "a/b"'), r"exactly one of repo, files, embedded \(found repo and files\)"),
    "two sections alike": (lambda text: f"{text}[output]\n", r"is not valid TOML: .*appears twice"),
    "code from a branch": (
        instead("^path = .*", 'repo = "a/b"\ntrust_remote_code = true'),
        r"trust_remote_code runs code from the repo, so revision must be a full 40-digit commit, not 'main'",
    ),
    "code from a short commit": (
        instead("^path = .*", 'repo = "a/b"\nrevision = "abc1234"\ntrust_remote_code = true'),
        r"must be a full 40-digit commit, not 'abc1234'",
    ),
    "more partitions than documents": (
        lambda text: with_line("output", "partitions = 3")(with_line("corpus", "max_documents = 2")(text)),
        r"recipe\.toml: output\.partitions is 3, but the corpus's limit is smaller",
    ),
    "more partitions than files": (
        with_line("output", "partitions = 3"),
        r"output\.partitions is 3, but the corpus has fewer files \(1\); choose at most 1 partitions",
    ),
    "mixed formats": (
        instead(r"\[(\".*\")\]", '["*.jsonl", "*.csv"]'),
        r"corpus\.files mixes formats \(csv, json\); give files of one format \(only \.txt and \.jsonl can be mixed\)",
    ),
    "no such teacher": (instead("^path = .*", 'path = "none"'), r"teacher\.path: 'none' does not exist \(looked in "),
    "a teacher that is a file": (instead("^path = .*", 'path = "x.txt"'), r"teacher\.path: 'x\.txt' is not a directory"),
    "a GGUF that is a directory": (instead("^path = .*", 'gguf = "."'), r"teacher\.gguf: '\.' is not a file"),
    "a GGUF that is none": (
        instead("^path = .*", 'gguf = "bad.gguf"'),
        r"teacher bad\.gguf: it is not a complete GGUF file \(.*\); download it again",
    ),
    "more than the vocabulary": (
        instead("top_k = 20", "top_k = 449"),
        r"output\.top_k is 449, but the teacher's vocabulary has 448 tokens; choose a smaller top_k",
    ),
    "longer than the teacher": (
        instead("max_length = 64", "max_length = 257"),
        r"max_length is 257, but the teacher was made for 256 positions; choose a smaller max_length",
    ),
    "a token that there is not": (with_line("sequences", 'bos = "always"'), r"sequences\.bos is 'always', but .* no bos token"),
    "a teacher from afar": (
        instead("^path = .*", f'repo = "a/b"\nrevision = "{COMMIT}"'),
        r"teacher a/b: it is not in the cache, and the Hub cannot be reached; check the network, or ",
    ),
    "a corpus from afar": (
        instead("^files = .*", f'repo = "a/b"\nrevision = "{COMMIT}"'),
        r"corpus a/b@00000000: it is not in the cache, and the Hub cannot be reached; check the network, or ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe_is_one_line(cli, make_recipe, tmp_path, change, message):
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.csv").write_text("text\nhello\n")
    (tmp_path / "bad.gguf").write_text("hello")
    recipe = make_recipe()
    changed = change(recipe.read_text())
    recipe.unlink()
    if changed is not None:
        recipe.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    assert_one_line(*cli("build", recipe, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out" / "manifest.json").exists()


# What a teacher can be instead of good


def poison_a_token(teacher: Path, tokenizer) -> None:
    weights = load_file(teacher / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.encode("!")[0]] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})


def make_encoder(teacher: Path, tokenizer) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SMALL))
    save(model, tokenizer, teacher)


TEACHERS: dict[str, tuple[Callable[[Path, object], object], str]] = {
    "NaN": (poison_a_token, r"teacher bad: model\.embed_tokens\.weight holds NaN or infinite values; download the weights again"),
    "an encoder": (make_encoder, r"teacher bad: BertLMHeadModel is not a causal language model: .*use a decoder-only"),
    "another tokenizer's model": (
        lambda teacher, tokenizer: save(make_model("llama", vocab_size=390), tokenizer, teacher),
        r"teacher bad: the tokenizer has ids up to 399, but the model knows only 390 tokens",
    ),
    "code": (
        lambda teacher, _: write_remote_code(teacher, ran=teacher / "ran"),
        r"teacher bad: it needs code from its repo; set teacher\.trust_remote_code and a full commit, if you trust it",
    ),
    "no weights": (
        lambda teacher, _: (teacher / "model.safetensors").rename(teacher / "pytorch_model.bin"),
        r"teacher bad: it has no model\.safetensors, and other formats are not read .*; save the model again",
    ),
    "no configuration": (lambda teacher, _: (teacher / "config.json").unlink(), r"teacher bad: it has no config\.json with a model_type .*; name a directory"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), TEACHERS.values(), ids=TEACHERS)
def test_a_bad_teacher_is_one_line(
    cli, make_recipe, corpus_file, tmp_path, tiny_teacher_dir, tiny_tokenizer, damage, message
):
    teacher = tmp_path / "bad"
    shutil.copytree(tiny_teacher_dir, teacher)
    damage(teacher, tiny_tokenizer)
    write_jsonl(corpus_file, [GOOD, {"id": "sick", "text": "oh! no"}])
    assert_one_line(*cli("build", make_recipe(teacher=teacher), "--output", tmp_path / "out"), message)  # fmt: skip
    assert list((tmp_path / "out" / "data").iterdir()) == []
    assert not (teacher / "ran").exists()


# The command line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("biuld", r"No such command 'biuld'.* See .*--help"),
        ("build", r"Missing argument 'recipe'; see .*build --help"),
        ("build r.toml", r"Missing option '--output' / '-o'; see "),
        ("build r.toml --output o --device tpu", r"--device: expected one of 'auto', 'cpu', 'cuda', found 'tpu'"),
        ("build r.toml --output o --max-shards -1", r"--max-shards: expected at least 0"),
        ("verify d --recmopute 3", r"No such option: --recmopute.*--recompute"),
        ("info d --row first", r"--row: expected a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_status_2(cli, command, message):
    assert_one_line(*cli(*command.split()), message, expected_status=2)


def test_no_command_shows_the_help(cli):
    status, out, err = cli()
    assert (status, err) == (0, "")
    assert "Example: logit-dataset build" in out


def test_a_traceback_is_shown_only_when_asked_for(tmp_path):
    command = ["build", tmp_path / "none.toml", "--output", tmp_path / "out"]
    result = run_cli(*command)
    assert_one_line(result.returncode, result.stdout, result.stderr, "no recipe at")
    result = run_cli(*command, LOGIT_DATASET_TRACEBACK="1")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert "\nValueError: no recipe at" in result.stderr


def test_what_nobody_expected_is_one_line_too(cli, make_recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error:\n  an illegal memory access")

    monkeypatch.setattr("builder.build.build.build", fail)
    status, out, err = cli("build", make_recipe(), "--output", tmp_path / "out")
    assert (status, out) == (1, "")
    assert err == "error: RuntimeError: CUDA error: an illegal memory access (not expected: LOGIT_DATASET_TRACEBACK=1 shows where it comes from)\n"  # fmt: skip


# Finished and unfinished datasets


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return apply


def make_unfinished(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    (directory / ".build").mkdir()


DAMAGED = r"manifest\.json is damaged \(%s\); fetch or build the dataset again"
DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, r"d does not exist; name the directory of a finished build"),
    "without a manifest": (
        lambda d: (d / "manifest.json").unlink(),
        r"d has no manifest\.json: it is not a logit dataset; name the directory of a finished build",
    ),
    "unfinished": (make_unfinished, r"d has no manifest\.json: it is an unfinished build; run the same build command"),
    "cut": (lambda d: (d / "manifest.json").write_text('{"recipe": {'), DAMAGED % ".*"),
    "not text": (lambda d: (d / "manifest.json").write_bytes(b"\xff"), DAMAGED % ".*"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), DAMAGED % ".*"),
    "another JSON": (lambda d: (d / "manifest.json").write_text("{}"), DAMAGED % "no 'schema_version'"),
    "newer": (
        edit(lambda m: m.update(schema_version="2.0.0", recipe="of another shape")),
        r"has schema version 2\.0\.0, but this program reads 1\.\d+\.\d+; install the version of logit-dataset that built it",
    ),
    "without shards": (edit(lambda m: m.update(shards=[])), DAMAGED % "no shards"),
    "with half a record": (edit(lambda m: m["shards"][0].pop("rows")), DAMAGED % r"not a shard record: no 'shards\[0\]\.rows'"),
    "with a record from nowhere": (edit(lambda m: m["shards"][0].update(environment=9)), DAMAGED % ".*"),
    "without a vocabulary": (edit(lambda m: m["teacher"].pop("vocab_size")), DAMAGED % r"no 'teacher\.vocab_size'"),
    "without totals": (edit(lambda m: m.pop("totals")), DAMAGED % "no 'totals'"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_a_directory_that_is_no_dataset_is_one_line(cli, built, tmp_path, damage, message):
    directory = tmp_path / "d"
    shutil.copytree(built, directory)
    damage(directory)
    for command in (["verify"], ["info"], ["info", "--row", 0]):
        assert_one_line(*cli(*command, directory), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", 10_000], r"has rows 0 to \d\d, not 10000"),
        (["--row", 0, "--position", 64], r"row 0 has positions 0 to \d\d, not 64"),
        (
            ["--row", 0],
            r"teacher\.path: 'tiny' does not exist .*; check the path, or give it with --teacher PATH",
        ),
    ],
)
def test_a_row_that_there_is_not_is_one_line(cli, built, options, message):
    assert_one_line(*cli("info", built, *options), message)


def test_problems_are_data_and_make_verify_fail(cli, built, tmp_path):
    directory = tmp_path / "d"
    shutil.copytree(built, directory)
    victim = next((directory / "data").iterdir())
    victim.unlink()
    status, out, err = cli("verify", directory)
    assert (status, err) == (1, "")
    assert out == f"data/{victim.name}: is missing\n{directory}: 1 problem\n"


def test_a_changed_recipe_is_refused_with_the_fields(cli, make_recipe, tmp_path):
    output = tmp_path / "out"
    assert cli("build", make_recipe(), "--output", output, "--max-shards", 1)[0] == 0
    other = make_recipe(output="top_k = 10", sequences='bos = "never"')
    fields = (
        r"\(recipe\.output\.top_k: 20 → 10; recipe\.sequences\.bos: \"tokenizer\" → \"never\"\)"
    )
    message = rf"holds an unfinished build with another plan {fields}; resume that one, or choose another directory"
    assert_one_line(*cli("build", other, "--output", output), message)
    assert cli("build", make_recipe(), "--output", output)[0] == 0
    fields = fields.replace(r"recipe\.", "")
    message = rf"holds a finished dataset of another recipe {fields}; choose another directory"
    other = make_recipe(output="top_k = 10", sequences='bos = "never"')
    assert_one_line(*cli("build", other, "--output", output), message)


def test_a_recipe_that_failed_before_its_first_shard_may_be_mended(cli, make_recipe, tmp_path):
    output = tmp_path / "out"
    assert_one_line(
        *cli("build", make_recipe(output="top_k = 500"), "--output", output), "top_k is 500"
    )
    status, out, err = cli("build", make_recipe(), "--output", output)
    assert (status, err) == (0, "")
    assert "complete" in out


def test_damaged_state_of_a_build_is_named(cli, make_recipe, tmp_path):
    recipe, output = make_recipe(), tmp_path / "out"
    cli("build", recipe, "--output", tmp_path / "whole")
    cli("build", recipe, "--output", output, "--max-shards", 3)
    plan, record = (output / ".build" / name for name in ("plan.json", "records/000-00001.json"))
    content = plan.read_bytes()
    plan.write_bytes(content[:99])
    message = r"\.build/plan\.json is damaged \(.*\); start again in another directory"
    assert_one_line(*cli("build", recipe, "--output", output), message)
    plan.write_bytes(content)
    record.write_bytes(record.read_bytes()[:99])
    message = r"records/000-00001\.json is damaged \(.*\); delete it to rebuild its shard"
    assert_one_line(*cli("build", recipe, "--output", output), message)
    record.unlink()
    assert cli("build", recipe, "--output", output)[0] == 0
    assert data_bytes(output) == data_bytes(tmp_path / "whole")


# Where the output cannot go


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("corpus.jsonl", r"corpus\.jsonl cannot be written \(Not a directory: .*\); choose another directory"),
        ("corpus.jsonl/x", r"corpus\.jsonl/x cannot be written \(Not a directory: "),
        ("/proc/x", r"/proc/x cannot be written \(No such file or directory: "),
        ("/dev/null/x/y", r"/dev/null/x/y cannot be written \(Not a directory: "),
        ("mine", r"mine is not empty and holds no build; choose a new or empty directory"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_is_one_line(cli, make_recipe, tmp_path, where, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert_one_line(*cli("build", make_recipe(), "--output", tmp_path / where), message)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


# Processes: full disks, signals, two builds at a time


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A process that has everything imported, and runs each command in a fork of itself."""
    running = Client("http://127.0.0.1:9", tmp_path_factory.mktemp("home"))
    yield running
    running.close()


def build_in_child(client: Client, recipe: Path, output: Path, prepare: str = "") -> tuple:
    arguments = ["logit-dataset", "build", str(recipe), "--output", str(output)]
    result = client.python(
        f"import os, sys\n{prepare}\nsys.argv = {arguments!r}\nfrom builder.cli.main import main\nmain()"
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture(scope="module")
def many_shards(tiny_teacher_dir, tmp_path_factory) -> Path:
    """A recipe whose fourth shard is the largest of many, and whose manifest is larger still."""
    directory = tmp_path_factory.mktemp("many-shards")
    documents = sample_documents(48)
    documents[6]["text"] *= 6
    write_jsonl(directory / "corpus.jsonl", documents)
    text = recipe_text(tiny_teacher_dir, "corpus.jsonl", output="top_k = 5\nshard_tokens = 100")
    (directory / "recipe.toml").write_text(text)
    return directory / "recipe.toml"


@pytest.fixture(scope="module")
def expected(client, many_shards) -> dict[str, bytes]:
    """The data files of that recipe, built without any trouble."""
    assert build_in_child(client, many_shards, many_shards.parent / "whole")[0] == 0
    return data_bytes(many_shards.parent / "whole")


class FileLimit:
    """Files may grow to `max_bytes`: what a full disk looks like to a process, wherever there is room."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.output = directory / "out"
        self.prepare = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({max_bytes}, {max_bytes}))
"""

    def make_room(self) -> None:
        self.prepare = ""


class SmallDisk:
    """A file system of `max_bytes` in memory."""

    prepare = ""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._mount = directory / "mount"
        self._mount.mkdir()
        self.output = self._mount / "out"
        self._call("mount", "-t", "tmpfs", "-o", f"size={max_bytes}", "tmpfs", self._mount)

    def make_room(self) -> None:
        self._call("mount", "-o", "remount,size=64m", self._mount)

    def close(self) -> None:
        self._call("umount", self._mount)

    def _call(self, *command: object) -> None:
        subprocess.run([*map(str, command)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for some shards, or as good as that where this process may not mount one."""
    try:
        disk = SmallDisk(tmp_path, 150_000)
    except (OSError, subprocess.CalledProcessError):
        yield FileLimit(tmp_path, 9_000)
    else:
        yield disk
        disk.close()


def check_recorded(output: Path) -> dict:
    """The finished shards: all files, but for one that may lack its record, and counts for nothing."""
    found = finished_shards(output)
    files = {f"data/{name}" for name in data_bytes(output)}
    assert set(found) <= files
    assert len(files) <= len(found) + 1
    return found


def check_full_disk(client, recipe: Path, disk, expected: dict[str, bytes]) -> int:
    """Build until it is full, make room, go on; says how many shards there were before."""
    message = r"cannot write \(.*(space|large).*\); finished shards are safe: make room, and run the same command to resume"
    assert_one_line(*build_in_child(client, recipe, disk.output, disk.prepare), message)
    before = check_recorded(disk.output)
    assert not list(disk.output.rglob(".*.partial"))
    assert not (disk.output / "manifest.json").exists()
    disk.make_room()
    status, _, err = build_in_child(client, recipe, disk.output)
    assert (status, err) == (0, "")
    check_kept(before, disk.output)
    assert data_bytes(disk.output) == expected
    return len(before)


@pytest.mark.parametrize("what_fails", ["plan", "fourth shard", "manifest"])
def test_a_full_disk_loses_nothing(client, many_shards, expected, tmp_path, what_fails):
    manifest = many_shards.parent / "whole" / "manifest.json"
    fourth = len(list(expected.values())[3])
    nearly_a_manifest = manifest.stat().st_size - 500  # its seconds may have fewer digits next time
    assert nearly_a_manifest > max(map(len, expected.values()))
    max_bytes = {"plan": 200, "fourth shard": fourth - 1, "manifest": nearly_a_manifest}[what_fails]
    done = check_full_disk(client, many_shards, FileLimit(tmp_path, max_bytes), expected)
    assert done == {"plan": 0, "fourth shard": 3, "manifest": len(expected)}[what_fails]


def test_a_disk_that_fills_up_loses_nothing(client, many_shards, expected, small_disk):
    done = check_full_disk(client, many_shards, small_disk, expected)
    assert 0 < done < len(expected)


MOMENTS = {
    "while reading": ("builder.corpus.encoder", "Encoder.sequences", 12),
    "in the teacher": ("builder.teacher.model", "Teacher.logits", 6),
    "while writing": ("pyarrow.parquet", "ParquetWriter.write_table", 4),
    "between two shards": ("builder.build.state", "BuildState.add", 3),
}


def send_at(moment: str, number: int) -> str:
    module, name, nth = MOMENTS[moment]
    owner, method = name.split(".")
    return f"""
import itertools, signal
from {module} import {owner} as owner
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the tests run with it ignored
original, calls = owner.{method}, itertools.count(1)
def signalled(*args, **kwargs):
    if next(calls) == {nth}:
        os.kill(os.getpid(), {int(number)})
    return original(*args, **kwargs)
owner.{method} = signalled
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_loses_nothing(client, many_shards, expected, tmp_path, moment, number):
    output = tmp_path / "out"
    status, out, err = build_in_child(client, many_shards, output, send_at(moment, number))
    if number == signal.SIGINT:
        line = "interrupted: finished shards are safe; run the same command to resume\n"
        assert (status, out, err) == (130, "", line)
        assert not list(output.rglob(".*.partial"))
    else:
        assert (status, out, err) == (-signal.SIGTERM, "", "")
    before = check_recorded(output)
    assert before
    assert build_in_child(client, many_shards, output)[0] == 0
    check_kept(before, output)
    assert data_bytes(output) == expected
    assert not list(output.rglob(".*"))


def test_a_second_build_at_the_same_time_is_refused(cli, client, many_shards, expected, tmp_path):
    running, go_on, output = (tmp_path / name for name in ("running", "go-on", "out"))
    pause = f"""
import pathlib, time
from builder.build.state import BuildState
original = BuildState.add
def slow(*args):
    original(*args)
    pathlib.Path({str(running)!r}).touch()
    while not pathlib.Path({str(go_on)!r}).exists():
        time.sleep(0.01)
BuildState.add = slow
"""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build_in_child, client, many_shards, output, pause)
        try:
            while not running.exists():
                assert not first.done(), first.result()
                sleep(0.01)
            second = cli("build", many_shards, "--output", output)
        finally:
            go_on.touch()
    message = r"another process is building in .*; wait for it, or choose another directory"
    assert_one_line(*second, message)
    assert first.result()[0] == 0
    assert data_bytes(output) == expected


@pytest.mark.parametrize("method", ["write_table", "close"])
def test_a_failure_of_the_writer_is_the_failure_of_the_build(
    cli, many_shards, expected, tmp_path, monkeypatch, method
):
    original, calls = getattr(pq.ParquetWriter, method), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise pa.ArrowInvalid("out of ink")
        return original(*args, **kwargs)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, method, failing)
        assert_one_line(*cli("build", many_shards, "--output", output), "out of ink")
    before = finished_shards(output)
    assert {f"data/{name}" for name in data_bytes(output)} == set(before)
    assert len(before) < len(calls)
    assert not list(output.rglob(".*.partial"))
    assert cli("build", many_shards, "--output", output)[0] == 0
    check_kept(before, output)
    assert data_bytes(output) == expected


def test_a_reader_that_has_seen_enough_is_no_error(client, built):
    code = f"""
import os, sys
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
sys.stdout = open(1, "w", closefd=False)  # with a buffer, whatever PYTHONUNBUFFERED says
sys.argv = ["logit-dataset", "info", {str(built)!r}]
from builder.cli.main import main
main()
"""
    result = client.python(code)
    assert (result.returncode, result.stderr) == (1, "")


# Texts that are unusual, but right

ODD_TEXTS = [
    "nothing\0ness",
    "👩‍👩‍👧‍👦🙂🏳️‍🌈 é e\u0301",
    "שלום עולم \u202eمرحبا\u202c",
    "one\r\ntwo\rthree\n\n\tfour\u2028five\x0csix\x85seven",
    "2024-01-01T00:00:00Z",
    "\ufeff a mark within <eos> \ufffd",
    "  blanks around  ",
    "12345678901234567890",
]  # fmt: skip
ODD_ROWS = [{"id": f"2024-01-{i:02d}", "text": text} for i, text in enumerate(ODD_TEXTS, 1)]
ODD_LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ODD_ROWS)).encode()  # fmt: skip

ODD_FILES = {
    "odd.jsonl": ODD_LINES,
    "mark.jsonl": b"\xef\xbb\xbf" + ODD_LINES,
    "mark.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + ODD_LINES),
    "crlf.jsonl": b"\n" + ODD_LINES.replace(b"\n", b"\r\n\r\n"),
    "ragged.jsonl": ODD_LINES + jsonl({"id": "none", "text": None}, {"id": "none"}),
    "odd.jsonl.gz": gzip.compress(ODD_LINES),
    "odd.jsonl.zst": zstandard.compress(ODD_LINES),
    "odd.parquet": parquet(pa.Table.from_pylist(ODD_ROWS)),
    "large.parquet": parquet(
        pa.Table.from_pylist(ODD_ROWS).cast(pa.schema({"id": pa.large_string(), "text": pa.large_string()}))
    ),
}  # fmt: skip


def texts_of(output: Path) -> list[tuple[str, str]]:
    """(id, text) of every document, its chunks joined."""
    texts: list[tuple[str, str]] = []
    for row in read_rows(output):
        if row["chunk_index"] == 0:
            texts.append((row["id"], ""))
        assert texts[-1][0] == row["id"]
        texts[-1] = (row["id"], texts[-1][1] + row["text"])
    return texts


def assert_no_problems(cli, output: Path, teacher: Path) -> None:
    status, out, err = cli("verify", output, "--recompute", 100, "--teacher", teacher)
    assert (status, err) == (0, ""), out


@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_texts_and_ids_stay_what_they_are(cli, make_recipe, tmp_path, tiny_teacher_dir, name):
    (tmp_path / name).write_bytes(ODD_FILES[name])
    output = tmp_path / "out"
    status, _, err = cli("build", make_recipe(files=name), "--output", output)
    assert (status, err) == (0, "")
    assert texts_of(output) == [(row["id"], row["text"]) for row in ODD_ROWS]
    assert read_manifest(output)["totals"]["documents_skipped"] == 2 * (name == "ragged.jsonl")
    assert_no_problems(cli, output, tiny_teacher_dir)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("file", ["\none\n\ntwo\n", "three"]), ("line", ["one", "two", "three"])],
)
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_text_files_by_file_and_by_line(cli, make_recipe, tmp_path, unit, expected, suffix):
    for name, content in (
        ("a", b"\xef\xbb\xbf\r\none\r\n\r\ntwo\r\n"),
        ("b", b"three"),
        ("c", b" "),
    ):
        content = gzip.compress(content) if suffix == "txt.gz" else content
        (tmp_path / f"{name}.{suffix}").write_bytes(content)
    recipe = make_recipe(files=f"?.{suffix}", corpus=f'text_unit = "{unit}"')
    recipe.write_text(recipe.read_text().replace('id_column = "id"\n', ""))
    assert cli("build", recipe, "--output", tmp_path / "out")[0] == 0
    assert [text for _, text in texts_of(tmp_path / "out")] == expected  # line ends are \n


def test_compressed_files_are_not_read_in_another_encoding(cli, make_recipe, tmp_path, monkeypatch):
    """Not in the system's, in which they say something else."""
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(ODD_LINES))
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "ISO-8859-1")
    status, _, err = cli("build", make_recipe(files="c.jsonl.gz"), "--output", tmp_path / "out")
    assert (status, err) == (0, "")
    assert texts_of(tmp_path / "out") == [(row["id"], row["text"]) for row in ODD_ROWS]


def test_documents_that_share_an_id_stay_apart(
    cli, make_recipe, corpus_file, tmp_path, tiny_teacher_dir
):
    """The ids are the corpus's own, repeated or not: every document starts anew with chunk 0, and ends with <eos>."""
    short, long = TRAINING_TEXT[0][:20], " ".join(TRAINING_TEXT)
    documents = [{"id": i, "text": t} for i in ("a", "b", "a") for t in (short, long, long, short)]
    write_jsonl(corpus_file, documents)
    for shard_tokens in (1, 100_000):  # next to each other in a file, and in files of their own
        output = tmp_path / f"out-{shard_tokens}"
        recipe = make_recipe(output=f"shard_tokens = {shard_tokens}")
        assert cli("build", recipe, "--output", output)[0] == 0
        assert texts_of(output) == [(d["id"], d["text"]) for d in documents]
        status, out, err = cli("verify", output, "--recompute", 99, "--teacher", tiny_teacher_dir)
        assert (status, ", no problems\n" in out) == (0, True), out + err
        assert err.startswith("note: 10 of 12 documents have an id that one before them has (")


def test_whole_numbers_are_ids(cli, make_recipe, corpus_file, tmp_path):
    write_jsonl(corpus_file, [{"id": i, "text": "x y"} for i in (0, 1, 2**70)])
    assert cli("build", make_recipe(), "--output", tmp_path / "out")[0] == 0
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["0", "1", str(2**70)]


def test_five_megabytes_on_a_line(cli, make_recipe, corpus_file, tmp_path):
    text = TRAINING_TEXT[1] + " "
    text *= 5_000_000 // len(text.encode()) + 1
    write_jsonl(corpus_file, [{"id": "huge", "text": text}, GOOD])
    recipe = make_recipe(sequences='long_documents = "truncate"')
    assert cli("build", recipe, "--output", tmp_path / "out")[0] == 0
    huge, good = read_rows(tmp_path / "out")
    assert (len(huge["input_ids"]), good["text"]) == (64, GOOD["text"])
    assert text.startswith(huge["text"])
    assert cli("verify", tmp_path / "out")[0] == 0


# What must not be published


@pytest.mark.parametrize("absolute", [True, False])
def test_no_path_user_or_host_is_written(cli, tiny_teacher_dir, tmp_path, monkeypatch, absolute):
    user = "margarethe.mustermann"
    monkeypatch.setenv("USER", user)
    monkeypatch.setenv("LOGNAME", user)
    home = tmp_path / "home" / user
    shutil.copytree(tiny_teacher_dir, home / "models" / "tiny")
    write_jsonl(home / "corpus.jsonl", sample_documents(6))
    (home / "recipes").mkdir()
    recipe = home / "recipes" / "recipe.toml"
    base = str(home) if absolute else f"../../{user}"
    recipe.write_text(
        f'name = "tiny"\ncorpus.files = ["{base}/corpus.jsonl"]\nteacher.path = "{base}/models/tiny"\n'
        'teacher.dtype = "float32"\nsequences.max_length = 64\n'
    )
    output = home / "out"
    status, _, err = cli("build", recipe, "--output", output)
    assert (status, err) == (0, "")
    secrets = [
        user,
        str(tmp_path),
        str(tiny_teacher_dir),
        str(Path.home()),
        os.environ["PYTHONPATH"],
    ]
    if len(socket.gethostname()) > 4:
        secrets.append(socket.gethostname())
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".parquet", ".svg"}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += repr(pq.read_metadata(path).metadata).encode()
        assert [secret for secret in secrets if secret.encode() in content] == [], path.name
