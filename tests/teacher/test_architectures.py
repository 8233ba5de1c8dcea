"""Some of the types that `python -m tests.architectures` sweeps, and what it says of those that are not right."""

import csv
import sys
from pathlib import Path

import pytest
import transformers

from builder.capture import pipeline
from builder.teacher import model as teacher_module
from builder.teacher.lengths import ANYWHERE
from tests import architectures
from tests.architectures import NAMES, check
from tests.conftest import REPOSITORY

SAMPLE = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"], "sdpa"),
    **dict.fromkeys(["gpt2", "gpt_neox", "opt", "olmo2", "cohere2", "deepseek_v3"], "sdpa"),
    **dict.fromkeys(["llama4_text", "falcon_h1", "bart", "phi3+longrope"], "sdpa"),
    **dict.fromkeys(["llama+dynamic", "deepseek_v32"], "sdpa"),
    **dict.fromkeys(["gemma2", "gpt_oss", "bloom", "mpt", "mamba", "mamba2"], "eager"),
    **dict.fromkeys(["falcon_mamba", "rwkv", "xlstm"], "eager"),
}
"""With the attention that is best for each."""
APART = {
    "phi3+longrope": "2 4",
    "llama+dynamic": "1 1 4",
    "deepseek_v32": "1 1 4",
}
"""How many documents share a batch, where not all may."""


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_of_a_mixed_batch_is_what_the_model_says_of_it_alone(name, tmp_path):
    result = check(name, tmp_path / "teacher")
    assert (result.verdict, result.line) == ("right", "")
    assert (result.attention, result.head) == (SAMPLE[name], "alone")
    assert result.batches == APART.get(name, "6")


@pytest.mark.parametrize("name", APART)
def test_the_sweep_finds_what_depends_on_the_batch(name, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "reach_of", lambda _: ANYWHERE)
    result = check(name, tmp_path / "teacher")
    assert (result.verdict, result.batches) == ("wrong", "6")
    assert float(result.error) > 0.1


def test_what_is_refused_says_why(tmp_path):
    result = check("xlnet", tmp_path / "teacher")
    assert result.verdict == "refused"
    assert "XLNetLMHeadModel is not a causal language model" in result.line


def verdicts(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# transformers ")
    return {row["name"]: row["verdict"] for row in csv.DictReader(lines[1:])}


def test_the_command_writes_a_csv_and_fails_where_one_is_wrong_or_crashes(
    tmp_path, monkeypatch, capsys
):
    def main(*names: str) -> tuple[int, dict[str, str]]:
        path = tmp_path / "found.csv"
        monkeypatch.setattr(sys, "argv", ["x", "--csv", str(path), "--only", *names])
        status = architectures.main()
        return status, verdicts(path)

    assert main("llama", "reformer") == (0, {"llama": "right", "reformer": "refused"})
    assert capsys.readouterr().out.endswith("1 right, 1 refused\n")
    monkeypatch.setattr(teacher_module, "reach_of", lambda _: ANYWHERE)
    assert main("llama+dynamic") == (1, {"llama+dynamic": "wrong"})
    monkeypatch.setattr(pipeline, "capture", lambda *_, **__: sys.exit(3))  # the process ends
    assert main("llama") == (1, {"llama": "crash"})


def test_what_the_sweep_found_is_all_types_and_none_that_is_wrong():
    path = REPOSITORY / "tests" / "architectures.csv"
    found = verdicts(path)
    assert set(found.values()) == {"right", "refused", "not tiny"}
    assert list(found.values()).count("right") > 240
    if f"# transformers {transformers.__version__}," in path.read_text():
        assert found.keys() == set(NAMES)
    assert {name for name, verdict in found.items() if verdict == "right"} >= set(SAMPLE)
