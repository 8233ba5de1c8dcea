"""Teachers' tokenizers from the Hub: tokenizer.json at the commit decides, is fetched once, and is found in the cache."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from builder.dataset.manifest import read_manifest
from tests.conftest import write_jsonl
from tests.loopback_hub import directory_files
from tests.tokenizer_files import HARD_DOCUMENTS, content, write_tokenizer

OFFLINE = """
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = True
"""
LOAD = """
from builder.teacher.loading import load_tokenizer
tokenizer = load_tokenizer({repo!r}, commit={commit!r})
print(tokenizer.logit_dataset_origin.source, tokenizer.backend_tokenizer.encode("a 2023").ids)
"""


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer transformers rebuilds by other rules."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=900, num_attention_heads=2, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher", "llama3", "GPT2Tokenizer")
    return tmp_path / "teacher"


def by_file(text: str) -> list[int]:
    backend = Tokenizer.from_str(content("llama3"))
    backend.encode_special_tokens = True
    return list(backend.encode(text).ids)


def fetched(hub: Any, name: str) -> list[str]:
    """How a file was asked for."""
    return [r.method for r in hub.requests if r.path.partition("?")[0].endswith(f"/{name}")]


def test_stored_ids_are_those_of_the_file_at_the_commit(hub, client, teacher, tmp_path):
    first = hub.commit("model", "org/hard", directory_files(teacher))
    write_tokenizer(teacher, "gpt2", "GPT2Tokenizer")
    hub.commit("model", "org/hard", directory_files(teacher))
    write_jsonl(tmp_path / "hard.jsonl", [{"text": text} for text in HARD_DOCUMENTS])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "hard"\n[corpus]\nfiles = ["hard.jsonl"]\n'
        f'[teacher]\nrepo = "org/hard"\nrevision = "{first}"\ndtype = "float32"\n'
        "[sequences]\nmax_length = 512\n[output]\ntop_k = 2\n"
    )
    done = client.cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert [row["input_ids"] for row in rows] == [by_file(text) for text in HARD_DOCUMENTS]
    assert read_manifest(tmp_path / "out")["teacher"]["tokenizer_source"] == "tokenizer.json"
    assert "GPT2Tokenizer with other rules" in done.stderr
    assert fetched(hub, "tokenizer.json").count("GET") == 1

    # Once it is in the cache, nothing is asked for, and nothing is needed.
    hub.requests.clear()
    load = LOAD.format(repo="org/hard", commit=first)
    for code in (load, OFFLINE + load):
        done = client.python(code)
        assert done.stdout == f"tokenizer.json {by_file('a 2023')}\n", done.stderr
    assert fetched(hub, "tokenizer.json") == []


def test_a_file_that_is_not_there_is_asked_for_no_more_than_by_transformers(hub, client, teacher):
    model = json.loads((teacher / "tokenizer.json").read_text())["model"]
    (teacher / "tokenizer.json").unlink()
    (teacher / "vocab.json").write_text(json.dumps(model["vocab"]))
    (teacher / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    commit = hub.commit("model", "org/older", directory_files(teacher))
    load = LOAD.format(repo="org/older", commit=commit)
    done = client.python(load)
    assert done.stdout.startswith("GPT2Tokenizer of transformers "), done.stderr
    assert len(fetched(hub, "tokenizer.json")) == 1
    assert client.python(OFFLINE + load).stdout == done.stdout


def test_offline_a_cache_in_which_the_file_may_be_missing_is_refused(hub, client, teacher):
    """transformers would convert what else there is, by other rules, without a word."""
    model = json.loads((teacher / "tokenizer.json").read_text())["model"]
    (teacher / "vocab.json").write_text(json.dumps(model["vocab"]))
    (teacher / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    commit = hub.commit("model", "org/partly", directory_files(teacher))
    names = ["config.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
    done = client.python(
        f"from huggingface_hub import hf_hub_download\nfor name in {names}:\n"
        f"    hf_hub_download('org/partly', name, revision='{commit}')"
    )
    assert done.returncode == 0, done.stderr
    done = client.python(OFFLINE + LOAD.format(repo="org/partly", commit=commit))
    assert done.returncode == 1
    message = r"teacher org/partly: its tokenizer\.json is not in the cache, and the Hub cannot be"
    assert re.search(message, done.stderr)
