"""What people get wrong, through the command line: one line each, which says what was found, what was expected and what to do.

A table a kind of input: what is wrong → the whole message. DIR stands for the directory of the test.
"""

import gzip
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.recipe.file import load_recipe
from tests.conftest import recipe_text, sample_documents, write_jsonl

NOT_OURS = re.compile(
    r"Traceback|pydantic|Input should|validation error|\(\?|\[\^|\\w|NoneType|KeyError|line \d+ column \d+ \(char|\b1 (rows|documents|tokens|files|shards|characters)\b"
)
"""Words of libraries, and of regular expressions."""


def assert_says(result: tuple[int, str, str], base: Path, message: str, status: int = 1) -> None:
    """One line on stderr, whole, and nothing else."""
    found, out, err = result
    assert (found, out) == (status, "")
    assert err.replace(str(base), "DIR") == f"error: {message}\n"
    assert not NOT_OURS.search(err)


# Recipes that are not TOML

SYNTAX: dict[str, str] = {
    "name = tiny": 'DIR/r.toml line 2, column 8 is not valid TOML: `name = tiny`; put text in quotes, such as "x"',
    'name = "tiny': 'DIR/r.toml line 2, column 13 is not valid TOML: `name = "tiny`; close the text with a quote on the same line',
    'name: "tiny"': 'DIR/r.toml line 2, column 5 is not valid TOML: `name: "tiny"`; write = instead of the colon',
    'name "tiny"': 'DIR/r.toml line 2, column 6 is not valid TOML: `name "tiny"`; write a key and its value as key = value',
    "name =": "DIR/r.toml line 2, column 7 is not valid TOML: `name =`; give the key a value, or leave it out",
    "text = True": "DIR/r.toml line 2, column 8 is not valid TOML: `text = True`; write true and false in lowercase",
    "text = null": "DIR/r.toml line 2, column 8 is not valid TOML: `text = null`; TOML has no null: leave the key out",
    "name = “tiny”": "DIR/r.toml line 2, column 8 is not valid TOML: `name = “tiny”`; put text in straight quotes",
    "a = .5": "DIR/r.toml line 2, column 5 is not valid TOML: `a = .5`; write a number as 0.5 or 1_000",
    "a = 5.": "DIR/r.toml line 2, column 6 is not valid TOML: `a = 5.`; write a number as 0.5 or 1_000, and text in quotes",
    "a = 1,024": "DIR/r.toml line 2, column 6 is not valid TOML: `a = 1,024`; write a number without commas, such as 1_000_000",
    'a = "x"\na = "y"': 'DIR/r.toml line 3, column 8 is not valid TOML: `a = "y"`; this key or section appears twice; remove one',
    "[corpus]\n[teacher]\n[corpus]\n": "DIR/r.toml line 4, column 8 is not valid TOML: `[corpus]`; this key or section appears twice; remove one",
    'path = "C:\\users\\me"': 'DIR/r.toml line 2, column 13 is not valid TOML: `path = "C:\\users\\me"`; write the path with / instead of backslashes',
    'path = "C:\\models"': 'DIR/r.toml line 2, column 13 is not valid TOML: `path = "C:\\models"`; write the path with / instead of backslashes',
    'files = ["a.txt" "b.txt"]': 'DIR/r.toml line 2, column 18 is not valid TOML: `files = ["a.txt" "b.txt"]`; put commas between the values of the list, and ] after them',
    'files = ["a.txt",': 'DIR/r.toml line 2, column 18 is not valid TOML: `files = ["a.txt",`; close the list with ]',
    "kwargs = { a = 1": "DIR/r.toml line 2, column 17 is not valid TOML: `kwargs = { a = 1`; close the table with } on the same line",
    "[corpus\nrepo = 1": "DIR/r.toml line 2, column 8 is not valid TOML: `[corpus`; write a section as [name]",
    "= 3": "DIR/r.toml line 2, column 1 is not valid TOML: `= 3`; write key = value, or [section]",
    'name = "a" "b"': 'DIR/r.toml line 2, column 12 is not valid TOML: `name = "a" "b"`; write one key = value per line, and text in one pair of quotes',
    "max length = 3": "DIR/r.toml line 2, column 5 is not valid TOML: `max length = 3`; write a key and its value as key = value",
    'name = "two\nlines"': 'DIR/r.toml line 2, column 12 is not valid TOML: `name = "two`; close the text with a quote on the same line',
}


@pytest.mark.parametrize("text", SYNTAX)
def test_a_recipe_that_is_not_toml(cli, tmp_path, text):
    (tmp_path / "r.toml").write_text(f"# A recipe.\n{text}\n", encoding="utf-8")
    result = cli("build", tmp_path / "r.toml", "-o", tmp_path / "out")
    assert_says(result, tmp_path, SYNTAX[text])


# Values of recipes

VALUES: dict[tuple[str, str], str] = {
    (
        "corpus",
        "file = 'a.txt'",
    ): "DIR/recipe.toml: unknown key 'corpus.file'; did you mean 'files'?",
    (
        "corpus",
        "files = 3",
    ): 'DIR/recipe.toml: corpus.files: expected a list, such as ["x"] (found 3)',
    (
        "corpus",
        "repo = 'a/b'",
    ): "DIR/recipe.toml: corpus: give exactly one of repo, files, embedded (found repo and files)",
    (
        "corpus",
        "split = 'test'",
    ): "DIR/recipe.toml: corpus: split is valid only with repo; leave it out",
    (
        "corpus",
        "text_unit = 'paragraph'",
    ): "DIR/recipe.toml: corpus.text_unit: expected 'file' or 'line' (found \"paragraph\")",
    (
        "corpus",
        "max_tokens = 0",
    ): "DIR/recipe.toml: corpus.max_tokens: expected more than 0 (found 0)",
    (
        "corpus",
        "max_tokens = '5M'",
    ): 'DIR/recipe.toml: corpus.max_tokens: expected a whole number (found "5M")',
    (
        "corpus",
        "max_documents = 1.5",
    ): "DIR/recipe.toml: corpus.max_documents: expected a whole number (found 1.5)",
    (
        "corpus",
        "license = 'CC BY 4.0'",
    ): 'DIR/recipe.toml: corpus.license: expected a licence identifier, such as apache-2.0 or cc-by-sa-4.0 (found "CC BY 4.0")',
    (
        "corpus",
        "language = ['english']",
    ): 'DIR/recipe.toml: corpus.language.0: expected a language code of two or three lowercase letters, such as en, or the word code or multilingual (found "english")',
    (
        "corpus",
        "language = 'en'",
    ): 'DIR/recipe.toml: corpus.language: expected a list, such as ["x"] (found "en")',
    (
        "corpus",
        "text_column = 'a'\nmessages_column = 'b'",
    ): "DIR/recipe.toml: corpus: give text_column for a corpus of texts, or messages_column for one of chats, not both",
    (
        "corpus",
        "text_column = false",
    ): 'DIR/recipe.toml: corpus.text_column: expected text in quotes, such as "x" (found false)',
    (
        "corpus",
        "tools_column = true",
    ): "DIR/recipe.toml: corpus.tools_column: expected a column name, or false if there is none (found true)",
    (
        "teacher",
        "model = 'x'",
    ): "DIR/recipe.toml: unknown key 'teacher.model'; known keys: repo, revision, path, gguf, python, weights, embedded, tokenizer, config, dtype, head_dtype, attention, device_map, tensor_parallel, trust_remote_code, license",
    (
        "teacher",
        "repo = 'a/b'",
    ): "DIR/recipe.toml: teacher: give exactly one of repo, path, gguf, python, embedded (found repo and path)",
    (
        "teacher",
        "dtype = 'fp16'",
    ): "DIR/recipe.toml: teacher.dtype: expected 'float32', 'bfloat16' or 'float16' (found \"fp16\")",
    (
        "teacher",
        "dtype = 'int8'",
    ): "DIR/recipe.toml: teacher.dtype: expected 'float32', 'bfloat16' or 'float16' (found \"int8\")",
    (
        "teacher",
        "head_dtype = 'bfloat16'",
    ): "DIR/recipe.toml: teacher.head_dtype: expected 'float32' or 'teacher' (found \"bfloat16\")",
    (
        "teacher",
        "attention = 'flash'",
    ): 'DIR/recipe.toml: teacher.attention: expected one of sdpa, eager, flash_attention_2, flash_attention_3, flash_attention_4, or a kernel of the Hub with its full commit, as ORG/NAME@COMMIT (found "flash")',
    (
        "teacher",
        "attention = 'own'",
    ): "DIR/recipe.toml: teacher: attention = 'own' is valid only with python; leave it out",
    (
        "teacher",
        "device_map = 'balanced'",
    ): "DIR/recipe.toml: teacher.device_map: expected 'auto' (found \"balanced\")",
    (
        "teacher",
        "tensor_parallel = 1",
    ): "DIR/recipe.toml: teacher.tensor_parallel: expected at least 2 (found 1)",
    (
        "teacher",
        "trust_remote_code = 'yes'",
    ): 'DIR/recipe.toml: teacher.trust_remote_code: expected true or false (found "yes")',
    (
        "teacher",
        "tokenizer = 'x'",
    ): "DIR/recipe.toml: teacher: tokenizer is valid only with gguf; leave it out",
    (
        "teacher",
        "weights = ['x.pt']",
    ): "DIR/recipe.toml: teacher: weights is valid only with python; leave it out",
    (
        "sequences",
        "max_length = 4",
    ): "DIR/recipe.toml: sequences.max_length: expected at least 8 (found 4)",
    (
        "sequences",
        "max_length = '512'",
    ): 'DIR/recipe.toml: sequences.max_length: expected a whole number (found "512")',
    (
        "sequences",
        "max_length = 512.5",
    ): "DIR/recipe.toml: sequences.max_length: expected a whole number (found 512.5)",
    (
        "sequences",
        "max_len = 512",
    ): "DIR/recipe.toml: unknown key 'sequences.max_len'; did you mean 'max_length'?",
    (
        "sequences",
        "long_documents = 'split'",
    ): "DIR/recipe.toml: sequences.long_documents: expected 'chunk' or 'truncate' (found \"split\")",
    (
        "sequences",
        "bos = true",
    ): "DIR/recipe.toml: sequences.bos: expected 'tokenizer', 'always' or 'never' (found true)",
    (
        "sequences",
        "learn = 'last'",
    ): "sequences.learn is valid only with corpus.messages_column; leave it out",
    (
        "sequences",
        "chat_template_kwargs = 'x'",
    ): 'DIR/recipe.toml: sequences.chat_template_kwargs: expected a table, such as { x = 1 } (found "x")',
    (
        "sequences",
        "chat_template_date = 'today'",
    ): "DIR/recipe.toml: sequences: chat_template_date is 'today', expected a day such as \"2026-01-31\"",
    (
        "sequences",
        "batch_tokens = 0",
    ): 'DIR/recipe.toml: sequences.batch_tokens: expected a whole number of at least 1, or "auto" (found 0)',
    (
        "generation",
        "temperature = 1.0",
    ): "DIR/recipe.toml: 'generation.max_new_tokens' is missing: add it",
    (
        "generation",
        "max_new_tokens = 64",
    ): "DIR/recipe.toml: generation.max_new_tokens is 64, which leaves no room for a prompt in sequences.max_length = 64; choose a larger max_length",
    (
        "generation",
        "max_new_tokens = 8\ntemperature = 0.001",
    ): "DIR/recipe.toml: generation: temperature is 0.001, expected at least 0.01, or 0 for the most probable token",
    (
        "generation",
        "max_new_tokens = 8\ntemperature = 0\ntop_p = 0.9",
    ): "DIR/recipe.toml: generation: top_p applies only to sampling, but temperature is 0; leave it out, or raise temperature",
    (
        "generation",
        "max_new_tokens = 8\ntop_p = 0.0",
    ): "DIR/recipe.toml: generation.top_p: expected more than 0 (found 0)",
    (
        "generation",
        "max_new_tokens = 8\nsamples = 0",
    ): "DIR/recipe.toml: generation.samples: expected more than 0 (found 0)",
    ("output", "topk = 20"): "DIR/recipe.toml: unknown key 'output.topk'; did you mean 'top_k'?",
    (
        "output",
        "top_k = 2.5",
    ): 'DIR/recipe.toml: output.top_k: expected a whole number of at least 1, or "all" (found 2.5)',
    (
        "output",
        "tail_samples = 5000",
    ): "DIR/recipe.toml: output.tail_samples: expected at most 1024 (found 5000)",
    ("output", "seed = -1"): "DIR/recipe.toml: output.seed: expected at least 0 (found -1)",
    (
        "output",
        "profile = 'small'",
    ): "DIR/recipe.toml: output.profile: expected 'default' or 'compact' (found \"small\")",
    (
        "output",
        "shard_tokens = '1M'",
    ): 'DIR/recipe.toml: output.shard_tokens: expected a whole number (found "1M")',
    (
        "output",
        "partitions = 0",
    ): "DIR/recipe.toml: output.partitions: expected more than 0 (found 0)",
    (
        "output",
        "completions_only = true",
    ): "output.completions_only needs completions; set corpus.messages_column for a corpus of chats, or add [generation] to let the teacher write them",
    (
        "output",
        "temperatures = [nan]",
    ): "DIR/recipe.toml: output.temperatures.0: expected at most 100 (found NaN)",
    ("outputs", "top_k = 3"): "DIR/recipe.toml: unknown key 'outputs'; did you mean 'output'?",
}


@pytest.mark.parametrize(("section", "lines"), VALUES)
def test_a_value_that_no_recipe_has(cli, make_recipe, tmp_path, section, lines):
    if section == "teacher":
        path = make_recipe(teacher=Path("tiny"), teacher_options=lines)
        if lines.startswith("dtype"):
            path.write_text(path.read_text().replace('dtype = "float32"\n', ""))
    else:
        path = make_recipe(**{section: lines})
    result = cli("build", path, "-o", tmp_path / "out")
    assert_says(result, tmp_path, VALUES[section, lines])


# Corpora


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


CORPORA: dict[tuple[str, bytes], str] = {
    (
        "c.jsonl",
        b'{"id": "a", "txt": "x"}\n',
    ): "corpus file c.jsonl has no column 'text'; its columns are id, txt (did you mean 'txt'?); set corpus.text_column, corpus.messages_column or corpus.id_column to one of them",
    (
        "c.jsonl",
        b'{"id": "a", "text": "x"}\n{"id": "b" "text": "y"}\n',
    ): "corpus file c.jsonl line 2 is not valid JSON (Expecting ',' delimiter at column 12); expected one JSON object per line, with the key 'text'",
    (
        "c.jsonl",
        b'["a", "b"]\n',
    ): "corpus file c.jsonl line 1 is a list; expected one JSON object per line, with the key 'text'",
    (
        "c.jsonl",
        b'{"id": "a", "text": 3}\n',
    ): "corpus file c.jsonl line 1: column 'text' holds a number, expected text; set corpus.text_column to a column of strings, or corpus.messages_column to one of chats",
    (
        "c.jsonl",
        b'{"id": "a", "text": ["x"]}\n',
    ): "corpus file c.jsonl line 1: column 'text' holds a list, expected text; set corpus.text_column to a column of strings, or corpus.messages_column to one of chats",
    (
        "c.jsonl",
        b'{"id": 1.5, "text": "x"}\n',
    ): "corpus file c.jsonl line 1: column 'id' holds a number with a fraction, expected text or a whole number; set corpus.id_column to another column, or leave it out to use hashes of the text as ids",
    (
        "c.jsonl",
        b'{"id": "a", "text": "\\ud800"}\n',
    ): "corpus file c.jsonl line 1: holds '\\ud800', half of a surrogate pair, which is not a character; replace it in the corpus, for example with \\ufffd",
    (
        "c.jsonl",
        b'{"id": "a", "text": "caf\xe9"}\n',
    ): 'corpus file c.jsonl is not valid UTF-8 (byte 0xe9 after …\'": "a", "text": "caf\'); convert the file to UTF-8, or leave it out',
    (
        "c.jsonl",
        b"{'id': 'a', 'text': 'x'}\n",
    ): "corpus file c.jsonl line 1 is not valid JSON (Expecting property name enclosed in double quotes at column 2); expected one JSON object per line, with the key 'text'",
    (
        "c.jsonl",
        b'[{"id": "a", "text": "x"},\n',
    ): "corpus file c.jsonl line 1 is the beginning of a list; expected one JSON object per line, with the key 'text'",
    (
        "c.jsonl",
        b"",
    ): "the corpus has no text (it is empty); check corpus.text_column, and the files",
    (
        "c.jsonl",
        b'{"id": "a", "text": null}\n',
    ): "the corpus has no text (1 null, empty or blank document); check corpus.text_column, and the files",
    (
        "c.json",
        b'[{"text": "x"}]',
    ): "corpus.files: cannot tell the format of 'c.json'; expected .txt, .jsonl, .csv (each also with .gz or .zst) or .parquet",
    (
        "c.jsonl.gz",
        b"not gzip",
    ): "corpus file c.jsonl.gz cannot be read (Not a gzipped file (b'no')); repair it, or leave it out",
    (
        "c.jsonl.gz",
        gzip.compress(b'{"id": "a", "text": "x"}\n' * 99)[:-9],
    ): "corpus file c.jsonl.gz cannot be read (Compressed file ended before the end-of-stream marker was reached); repair it, or leave it out",
    (
        "c.jsonl.zst",
        b"not zstd",
    ): "corpus file c.jsonl.zst cannot be read (zstd decompressor error: Unknown frame descriptor); repair it, or leave it out",
    (
        "c.parquet",
        b"not parquet",
    ): "corpus file c.parquet cannot be read (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.); repair it, or leave it out",
    (
        "c.parquet",
        parquet([{"id": "a", "content": "x"}]),
    ): "corpus file c.parquet has no column 'text'; its columns are id, content; set corpus.text_column, corpus.messages_column or corpus.id_column to one of them",
    (
        "c.parquet",
        parquet([{"id": "a", "text": 3}]),
    ): "corpus file c.parquet row 1: column 'text' holds a number, expected text; set corpus.text_column to a column of strings, or corpus.messages_column to one of chats",
    (
        "c.csv",
        b"id,text\na,b,c\n",
    ): "corpus file c.csv cannot be read (line 2 has 3 values, but the first line names 2 columns; put quotation marks around a text with a comma); repair it, or leave it out",
    (
        "c.csv",
        b"id,txt\na,b\n",
    ): "corpus file c.csv has no column 'text'; its columns are id, txt (did you mean 'txt'?); set corpus.text_column, corpus.messages_column or corpus.id_column to one of them",
    (
        "c.csv",
        b'id,text\na,"b\n',
    ): "corpus file c.csv cannot be read (unexpected end of data); repair it, or leave it out",
    (
        "c.pdf",
        b"%PDF",
    ): "corpus.files: cannot tell the format of 'c.pdf'; expected .txt, .jsonl, .csv (each also with .gz or .zst) or .parquet",
}


@pytest.mark.parametrize(("name", "content"), CORPORA)
def test_a_corpus_that_cannot_be_read(cli, make_recipe, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    result = cli("build", make_recipe(files=name), "-o", tmp_path / "out", "--dry-run")
    assert_says(result, tmp_path, CORPORA[name, content])


PATTERNS: dict[str, str] = {
    "none-*.txt": "corpus.files: nothing matches 'none-*.txt' (looked in DIR); check the name (a relative path starts at the recipe's directory)",
    "folder": "corpus.files: the folder 'folder' holds b.docx, which is not .txt, .jsonl, .csv (each also with .gz or .zst) or .parquet; name the files, such as 'folder/**/*.txt'",
    "empty": "corpus.files: the folder 'empty' contains no files; expected .txt, .jsonl, .csv (each also with .gz or .zst) or .parquet",
    "~nobody-here/a.txt": "'~nobody-here/a.txt' is in the home directory of a user that does not exist on this machine; write the full path",
    'corpus.jsonl", "a.parquet': "corpus.files mixes formats (json, parquet); give files of one format (only .txt and .jsonl can be mixed)",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_files_that_are_not_there(cli, make_recipe, tmp_path, pattern):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("x")
    (tmp_path / "folder" / "b.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.parquet").write_bytes(parquet([{"id": "a", "text": "x"}]))
    result = cli("build", make_recipe(files=pattern), "-o", tmp_path / "out", "--dry-run")
    assert_says(result, tmp_path, PATTERNS[pattern])


# Teachers


def without(name: str) -> Callable[[Path], None]:
    return lambda teacher: (teacher / name).unlink()


def with_file(name: str, content: str) -> Callable[[Path], None]:
    return lambda teacher: (teacher / name).write_text(content) and None


TEACHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (
        shutil.rmtree,
        "teacher.path: 'teacher' does not exist (looked in DIR); check the path",
    ),
    "no config": (
        without("config.json"),
        "teacher: it has no config.json with a model_type that transformers knows; name a directory written by save_pretrained",
    ),
    "no weights": (
        without("model.safetensors"),
        "teacher: it has no model.safetensors, and other formats are not read because pickle files can run code; save the model again with save_pretrained",
    ),
    "no tokenizer": (
        without("tokenizer.json"),
        "teacher: it has no tokenizer.json, and other vocabulary files are not read; save it with save_pretrained of a fast tokenizer",
    ),
    "damaged config": (
        with_file("config.json", "{"),
        "teacher: its config.json is not valid (It looks like the config file at 'teacher/config.json' is not a valid JSON file.); correct it",
    ),
    "unknown type": (
        with_file("config.json", '{"model_type": "mine"}'),
        "teacher: its config.json has model_type 'mine', which transformers 5.24.0 does not know; install a newer transformers, or use another teacher",
    ),
    "damaged tokenizer": (
        with_file("tokenizer.json", "{"),
        "teacher: one of its JSON files is not valid (Expecting property name enclosed in double quotes in line 1, column 2); download it again",
    ),
    "damaged weights": (
        with_file("model.safetensors", "x"),
        "teacher: its weights are damaged (Error while deserializing header: header too small); download it again",
    ),
    "an adapter": (
        with_file("adapter_config.json", '{"base_model_name_or_path": "a/b"}'),
        'teacher: its adapter_config.json makes it an adapter, which is not a teacher without its base model; merge the two with PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("a/b"), "ADAPTER").merge_and_unload().save_pretrained("merged"), and set teacher.path to that directory, or remove adapter_config.json if the model beside it is the teacher',
    ),
}


@pytest.mark.parametrize("what", TEACHERS)
def test_a_directory_that_is_no_teacher(cli, make_recipe, tiny_teacher_dir, tmp_path, what):
    teacher = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "teacher"))
    damage, message = TEACHERS[what]
    damage(teacher)
    result = cli("build", make_recipe(teacher=Path("teacher")), "-o", tmp_path / "out")
    assert_says(result, tmp_path, message)


OTHERS: dict[str, str] = {
    'gguf = "none.gguf"': "teacher.gguf: 'none.gguf' does not exist (looked in DIR); check the path",
    'gguf = "corpus.jsonl"': "teacher.gguf: 'corpus.jsonl' is not a .gguf file; name one, or a directory as teacher.path",
    'path = "corpus.jsonl"': "teacher.path: 'corpus.jsonl' is not a directory; name a directory",
    'python = "none.py"': "teacher.python: 'none.py' does not exist (looked in DIR); check the path",
    'python = "corpus.jsonl"': "teacher.python: 'corpus.jsonl' is not a .py file; name one with a function load_teacher",
    'python = "empty.py"': "teacher empty.py: it has no function load_teacher(*weights); define one that returns a module and its tokenizer",
    'python = "wrong.py"': "teacher wrong.py: SyntaxError: invalid syntax (wrong.py, line 1); correct wrong.py",
    'python = "raises.py"': "teacher raises.py: line 2: ZeroDivisionError: division by zero; correct raises.py",
    'repo = "just-a-name"\nrevision = "0000000000000000000000000000000000000000"': "teacher just-a-name: it is not in the cache, and the Hub cannot be reached; check the network, or use teacher.path",
    'repo = "not/a/name"': "'not/a/name' is not a Hub model name; expected ORG/NAME",
    'repo = "org/none"': "cannot reach the Hub to resolve model org/none@main because HF_HUB_OFFLINE is set; unset it, give the full commit of a cached copy, or use local files",
}


@pytest.mark.parametrize("lines", OTHERS)
def test_a_teacher_that_is_none(cli, make_recipe, tmp_path, lines):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("def load_teacher(:")
    (tmp_path / "raises.py").write_text("def load_teacher():\n    return 1 / 0")
    path = make_recipe()
    path.write_text(re.sub(r'path = ".*"', lines, path.read_text()))
    result = cli("build", path, "-o", tmp_path / "out")
    assert_says(result, tmp_path, OTHERS[lines])


# The command line

CALLS: dict[str, tuple[int, str]] = {
    "build DIR/recipe.toml -o DIR/out --max-shards x": (
        2,
        "--max-shards: expected a whole number; see logit-dataset build --help",
    ),
    "build DIR/recipe.toml -o DIR/out --workers 0": (
        2,
        "--workers: expected at least 1; see logit-dataset build --help",
    ),
    "build DIR/recipe.toml -o DIR/out --device gpu": (
        2,
        "--device: expected one of 'auto', 'cpu', 'cuda', found 'gpu'; see logit-dataset build --help",
    ),
    "build DIR/recipe.toml -o DIR/out --tag v1.0.0": (
        2,
        "--discard-local, --tag, --private and --message need --publish-to; add it, or leave them out",
    ),
    "build DIR/recipe.toml -o DIR/out --json": (
        2,
        "--json needs --dry-run; add it, or leave --json out",
    ),
    "build DIR/recipe.toml DIR/out": (
        2,
        "Missing option '--output' / '-o'; see logit-dataset build --help",
    ),
    "build DIR -o DIR/out": (
        1,
        "no recipe at DIR; name a .toml file such as dataset_cards/*/recipe.toml",
    ),
    "build DIR/corpus.jsonl -o DIR/out": (
        1,
        'DIR/corpus.jsonl line 1, column 1 is not valid TOML: `{"id": "doc-0", "text": "The quick brown fox jumps over the lazy dog. A dataset…`; write key = value, or [section]',
    ),
    "build DIR/recipe.toml -o DIR": (
        1,
        "DIR is not empty and holds no build; choose a new or empty directory",
    ),
    "build DIR/recipe.toml -o DIR/corpus.jsonl": (
        1,
        "DIR/corpus.jsonl cannot be written (Not a directory: DIR/corpus.jsonl); choose another directory",
    ),
    "build DIR/recipe.toml -o DIR/out --publish-to name": (
        1,
        "'name' is not a Hub dataset name; expected ORG/NAME",
    ),
    "build DIR/recipe.toml -o DIR/out --publish-to org/name --tag 1": (
        1,
        "the recipe does not state corpus.license and teacher.license, and nobody may use a dataset without a licence; add them to the recipe and run the build command again (it rewrites only the description)",
    ),
    "plan DIR/recipe.toml": (
        1,
        "the recipe has no corpus.max_tokens; give the number of tokens, such as --tokens 1e9",
    ),
    "plan DIR/recipe.toml --tokens many": (
        2,
        "--tokens: expected a number; see logit-dataset plan --help",
    ),
    "plan DIR/recipe.toml --tokens 1e9 --gpu h99": (
        2,
        "--gpu: expected one of 'a100', 'h100', 'h200', 'b200', 'l4', 'l40s', 'mi300x', found 'h99'; see logit-dataset plan --help",
    ),
    "plan DIR/recipe.toml --tokens 1e9 --utilization 40": (
        2,
        "--utilization: expected at most 1; see logit-dataset plan --help",
    ),
    "init DIR/new": (
        2,
        "name the corpus, such as --corpus 'texts/*.txt' or --corpus ORG/NAME",
    ),
    "init DIR --corpus DIR/corpus.jsonl": (
        1,
        "DIR/recipe.toml exists; choose another directory, or remove it",
    ),
    "init DIR/new --corpus DIR/none.txt": (
        1,
        "corpus.files: nothing matches 'DIR/none.txt'; check the name (a relative path starts at the recipe's directory)",
    ),
    "init DIR/new --corpus DIR/corpus.jsonl --teacher none": (
        1,
        "--teacher 'none' is neither a directory, a .gguf file nor a model on the Hub (ORG/NAME)",
    ),
    "init DIR/new --corpus DIR/corpus.jsonl --chat": (
        1,
        "--chat needs a column with lists of messages, but the corpus has none (columns: id, text); name other files, or leave out --chat",
    ),
    "verify DIR": (
        1,
        "DIR has no manifest.json: it is not a logit dataset; name the directory of a finished build",
    ),
    "verify DIR/none": (1, "DIR/none does not exist; name the directory of a finished build"),
    "verify BUILT --revision v1.0.0": (
        2,
        "--revision is for datasets on the Hub, but BUILT is a directory; leave it out",
    ),
    "verify BUILT --recompute 2": (
        1,
        "teacher.path: 'tiny' does not exist (looked in .); check the path, or give it with --teacher PATH",
    ),
    "verify BUILT --recompute 2 --teacher DIR/none": (
        1,
        "teacher.path: 'DIR/none' does not exist; check the path, or give it with --teacher PATH",
    ),
    "verify BUILT --recompute -1": (
        2,
        "--recompute: expected at least 0; see logit-dataset verify --help",
    ),
    "info": (2, "Missing argument 'dataset'; see logit-dataset info --help"),
    "info BUILT --row 9999": (1, "BUILT has rows 0 to 42, not 9999; choose one of these"),
    "info BUILT --row 0 --position 9999 --teacher TEACHER": (
        1,
        "row 0 has positions 0 to 25, not 9999; choose one of these",
    ),
    "info BUILT --position 3": (2, "--position needs --row; name the row, such as --row 0"),
    "info BUILT --row 0 --json": (
        2,
        "--json prints the summary, and --row one row; leave one out (load_dataset reads rows)",
    ),
    "info BUILT --row -1": (2, "--row: expected at least 0; see logit-dataset info --help"),
    "view BUILT --output DIR/page.txt": (
        2,
        "--output DIR/page.txt is not an HTML file; use a name that ends in .html",
    ),
    "view BUILT --rows 0 --output DIR/page.html": (
        2,
        "--rows: expected at least 1; see logit-dataset view --help",
    ),
    "view BUILT --start 9999 --teacher TEACHER --output DIR/page.html": (
        1,
        "the dataset has rows 0 to 42, not 9999; choose one of these",
    ),
    "card DIR": (
        1,
        "DIR has no manifest.json: it is not a logit dataset; name the directory of a finished build",
    ),
    "card DIR/none": (1, "DIR/none does not exist; name the directory of a finished build"),
    "export BUILT --to trl --output DIR/x": (
        2,
        "--to: expected one of 'axolotl', 'distillkit', 'maxtext', found 'trl'; see logit-dataset export --help",
    ),
    "export BUILT --to axolotl --output DIR": (
        1,
        "DIR exists; remove it, or choose another output",
    ),
    "export BUILT --to axolotl --output DIR/x --packed": (
        1,
        "packed is only for DistillKit, and this is an export to axolotl; leave packed out",
    ),
    "export BUILT --to axolotl --output DIR/x --tail draws --length 8": (
        1,
        "axolotl takes whole sequences and packs them by itself; leave length out",
    ),
    "publish name BUILT": (1, "'name' is not a Hub dataset name; expected ORG/NAME"),
    "publish org/name DIR": (
        1,
        "DIR has no manifest.json: it is not a logit dataset; name the directory of a finished build",
    ),
    "publish org/name BUILT --tag 1.0": (
        1,
        "the recipe does not state corpus.license and teacher.license, and nobody may use a dataset without a licence; add them to the recipe and run the build command again (it rewrites only the description)",
    ),
    "publish org/name BUILT --yes": (
        1,
        "the recipe does not state corpus.license and teacher.license, and nobody may use a dataset without a licence; add them to the recipe and run the build command again (it rewrites only the description)",
    ),
    "publish BUILT org/name": (2, "BUILT is a directory; give ORG/NAME first, then the directory"),
    "publsh org/name BUILT": (
        2,
        "No such command 'publsh'. Did you mean 'publish'? See logit-dataset --help",
    ),
    "publish org/name BUILT --recompute x": (
        2,
        "--recompute: expected a whole number; see logit-dataset publish --help",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_cannot_be(cli, make_recipe, built, tiny_teacher_dir, tmp_path, call):
    make_recipe()
    places = {"DIR": tmp_path, "BUILT": built, "TEACHER": tiny_teacher_dir}
    arguments = [re.sub("|".join(places), lambda m: str(places[m[0]]), a) for a in shlex.split(call)]  # fmt: skip
    status, message = CALLS[call]
    code, out, err = cli(*arguments)
    assert_says((code, out, err.replace(str(built), "BUILT")), tmp_path, message, status)


# What the Hub does not take

HUB: dict[str, tuple[int, str]] = {
    "publish other/name OUT --yes --recompute 0": (
        1,
        "the token may not write to other/name (you don't have the rights to write to this namespace); use a token with write access to it, or publish under another name. Nothing was published; the same command resumes from here",
    ),
    "publish org/name OUT --yes --recompute 0 --tag 1.0": (
        1,
        "'1.0' is not a version like v1.2.3; use --tag v1.0.0",
    ),
    "publish org/name OUT --yes --recompute 0 --tag v1": (
        1,
        "'v1' is not a version like v1.2.3; use --tag v1.0.0",
    ),
    "publish org/name OUT --yes --recompute 1": (
        1,
        "teacher.path: 'tiny' does not exist (looked in .); check the path, or give it with --teacher PATH",
    ),
    "info org/none": (
        1,
        "there is no directory 'org/none', and the Hub has no dataset 'org/none' that you can read; check the name, and log in if it is private",
    ),
    "verify org/none --revision v9.9.9": (
        1,
        "there is no directory 'org/none', and the Hub has no dataset 'org/none' that you can read; check the name, and log in if it is private",
    ),
    "view org/none@v1.0.0 --revision v1.0.0": (
        2,
        "org/none@v1.0.0 names a revision, and --revision names another; leave one out",
    ),
    "export org/none --to axolotl --output DIR/x": (
        1,
        "there is no directory 'org/none', and the Hub has no dataset of that name that you can read; check the name, and log in if it is private",
    ),
}


@pytest.fixture(scope="module")
def licensed(tiny_teacher_dir, tmp_path_factory):
    """A finished dataset that may be published. Read only."""
    base = tmp_path_factory.mktemp("licensed")
    write_jsonl(base / "corpus.jsonl", sample_documents(4))
    licences = {"corpus": 'license = "mit"', "teacher": 'license = "mit"'}
    (base / "recipe.toml").write_text(recipe_text(tiny_teacher_dir, "corpus.jsonl", **licences))
    build(load_recipe(base / "recipe.toml"), base, base / "out")
    return base / "out"


@pytest.mark.parametrize("call", HUB)
def test_a_publication_that_cannot_be(client, hub, licensed, tmp_path, call):
    places = {"DIR": tmp_path, "OUT": licensed}
    arguments = [re.sub("|".join(places), lambda m: str(places[m[0]]), a) for a in shlex.split(call)]  # fmt: skip
    result = client.cli(*arguments, *(["--device", "cpu"] if call.startswith("publish") else []))
    status, message = HUB[call]
    found = (result.returncode, result.stdout, result.stderr.replace(str(licensed), "OUT"))
    assert_says(found, tmp_path, message, status)
    assert not hub.repos


# Datasets that somebody has changed


def with_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        path = dataset / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DATASETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a damaged manifest": (
        with_file("manifest.json", "{"),
        "DIR/set/manifest.json is damaged (Expecting property name enclosed in double quotes in line 1, column 2); fetch or build the dataset again",
    ),
    "another JSON": (
        with_file("manifest.json", "[]"),
        "DIR/set/manifest.json is damaged (it is not a JSON object); fetch or build the dataset again",
    ),
    "no manifest": (
        without("manifest.json"),
        "DIR/set has no manifest.json: it is not a logit dataset; name the directory of a finished build",
    ),
    "no shards": (
        with_manifest(shards=None),
        "DIR/set/manifest.json is damaged (shards: expected a list, found null); fetch or build the dataset again",
    ),
    "a later schema": (
        with_manifest(schema_version="9.0.0"),
        "DIR/set/manifest.json has schema version 9.0.0, but this program reads 1.2.0; install the version of logit-dataset that built it",
    ),
    "totals of another type": (
        with_manifest(totals=3),
        "DIR/set/manifest.json is damaged (totals: expected an object, found 3); fetch or build the dataset again",
    ),
}


@pytest.mark.parametrize("what", DATASETS)
def test_a_dataset_that_is_none(cli, built, tmp_path, what):
    damage, message = DATASETS[what]
    damage(Path(shutil.copytree(built, tmp_path / "set")))
    assert_says(cli("info", tmp_path / "set"), tmp_path, message)


def test_there_are_as_many_as_the_project_asks_for():
    tables = (SYNTAX, VALUES, CORPORA, PATTERNS, TEACHERS, OTHERS, CALLS, HUB, DATASETS)
    assert sum(map(len, tables)) >= 120
