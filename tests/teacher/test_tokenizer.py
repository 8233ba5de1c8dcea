"""Token ids are those of tokenizer.json, whatever class a config names; and what else decides what a teacher's tokenizer is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from builder.dataset.manifest import read_manifest
from tests.conftest import write_jsonl
from tests.tokenizer_files import HARD_DOCUMENTS, KINDS, content, write_tokenizer

CLASSES = (
    *(None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast"),
    *("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "CohereTokenizer"),
    *("CodeLlamaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer", "BertTokenizer", "CTRLTokenizer"),
    "NoSuchTokenizer",
)
"""Rebuilt by other rules, taken as they are, not to be loaded with any of the files, written in Python, unknown."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for all kinds of tokenizers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=900, num_attention_heads=2, num_key_value_heads=1, **sizes)
    directory = tmp_path_factory.mktemp("weights")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def make_teacher(weights: Path, tmp_path: Path) -> Any:
    def make(kind: str, class_name: str | None = None, /, **config: Any) -> Path:
        directory = tmp_path / "teacher"
        write_tokenizer(directory, kind, class_name, **config)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).exists():
                (directory / name).hardlink_to(weights / name)
        return directory

    return make


RECIPE = """
name = "hard"
[corpus]
files = ["hard.jsonl"]
[teacher]
path = "teacher"
dtype = "float32"
[sequences]
max_length = 512
{sequences}
[output]
top_k = 2
"""

@pytest.fixture
def build(cli: Any, tmp_path: Path) -> Any:
    """Build the page of hard texts by the command: rows, manifest, and what was said."""
    import pyarrow.parquet as pq

    number = iter(range(10**6))

    def run(sequences: str = "") -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        write_jsonl(tmp_path / "hard.jsonl", [{"text": text} for text in HARD_DOCUMENTS])
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPE.format(sequences=sequences), encoding="utf-8")
        output = tmp_path / f"out{next(number)}"
        status, _, said = cli("build", recipe, "--output", output, "--device", "cpu")
        assert status == 0, said
        table = pq.read_table(output / "data", columns=["input_ids", "text"])
        return table.to_pylist(), read_manifest(output), said

    return run


def ids_by_the_file(directory: Path) -> list[list[int]]:
    """What the `tokenizers` library makes of the page by tokenizer.json alone; what looks like special tokens is text."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.encode_special_tokens = True
    return [backend.encode(text).ids for text in HARD_DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_ids_are_those_of_the_file_whatever_class_is_named(make_teacher, build, kind):
    for class_name in CLASSES:
        directory = make_teacher(kind, class_name)
        rows, manifest, _ = build()
        assert [row["text"] for row in rows] == HARD_DOCUMENTS
        assert [row["input_ids"] for row in rows] == ids_by_the_file(directory), class_name
        assert manifest["teacher"]["tokenizer_source"] == "tokenizer.json"
