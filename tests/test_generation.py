"""Completions by the teacher itself, end to end: right numbers, greedy and drawn, cut and resumed, verified, loaded, published."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINING_TEXT, write_jsonl
from datasets import load_dataset
from test_build import data_bytes, float64_reference, read_rows, run
from test_kill import check_kept, finished_shards, killer  # noqa: F401
from test_verify import Row, forge, problems

from builder import generation
from builder.decoding import Decoder
from builder.estimate import estimate
from builder.info import describe, describe_row
from builder.manifest import read_manifest, records_of
from builder.recipe import Recipe, fingerprint, load_recipe
from builder.student import load_logits
from builder.verify import verify

GREEDY = "temperature = 0\nmax_new_tokens = 24"
DRAWN = "max_new_tokens = 24"


def prompts(count: int = 14) -> list[dict]:
    return [{"id": f"p-{i}", "text": TRAINING_TEXT[i % 3][: 7 + 5 * (i % 9)]} for i in range(count)]


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", prompts())


def completions(row: dict) -> list[int]:
    return [
        token
        for token, is_written in zip(row["input_ids"], row["completion_mask"], strict=True)
        if is_written
    ]


def written(output: Path) -> dict[str, list[int]]:
    return {row["id"]: completions(row) for row in read_rows(output)}


def not_the_captured_choice(output: Path) -> list[tuple[str, int]]:
    """Rows and positions at which what was written is not the first of what is stored."""
    found = []
    for row in read_rows(output):
        mask, first = row["completion_mask"], row["completion_mask"].index(True)
        for t in range(first - 1, len(mask) - 1):
            if "topk_indices" in row:
                # Where only completions are kept, their distributions begin at the prompt's last token.
                is_cut = len(row["topk_indices"]) < len(mask)
                choice = row["topk_indices"][t - (first - 1) * is_cut][0]
                if choice != row["input_ids"][t + 1]:
                    found.append((row["id"], t))
            elif row["logprobs"][t][row["input_ids"][t + 1]] < max(row["logprobs"][t]):
                found.append((row["id"], t))
    return found


# What is stored


def test_what_is_stored_are_the_teachers_distributions_of_prompt_and_completion(
    make_recipe, tmp_path, tiny_model, tiny_tokenizer
):
    run(make_recipe(generation=f"{DRAWN}\ntemperature = 0.7\ntop_p = 0.8"), tmp_path / "out")
    texts = {prompt["id"]: prompt["text"] for prompt in prompts()}
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == list(texts)
    for row in rows:
        ids, prompt = row["input_ids"], texts[row["id"]]
        prompt_ids = tiny_tokenizer.encode(prompt)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert row["completion_mask"] == [t >= len(prompt_ids) for t in range(len(ids))]
        assert row["chunk_index"] == 0
        assert row["text"] == tiny_tokenizer.decode(ids)
        assert row["text"].startswith(prompt)
        expected = float64_reference(tiny_model, ids, 0, top_k=20)
        assert np.isnan(row["target_logprob"][-1])  # nothing is known to follow
        for name in ("topk_logprobs", "tail_logprob", "target_logprob", "logsumexp", "entropy"):
            found, wanted = np.array(row[name], float), expected[name]
            if name == "target_logprob":
                found, wanted = found[:-1], wanted[:-1]
            step = 0 if name == "logsumexp" else np.spacing(np.abs(wanted).astype(np.float16)) / 2
            assert (np.abs(found - wanted) <= 2e-3 + step).all(), name


def test_a_completion_ends_with_the_token_that_ends_it_or_at_max_new_tokens(make_recipe, tmp_path):
    recipe = make_recipe(generation="max_new_tokens = 40\nsamples = 6", sequences="max_length = 80")
    run(recipe, tmp_path / "out")
    manifest, rows = read_manifest(tmp_path / "out"), read_rows(tmp_path / "out")
    eos = manifest["teacher"]["generation_eos_ids"]
    assert eos == [0]
    ended = 0
    for row in rows:
        ids = completions(row)
        assert 0 < len(ids) <= 40
        assert not set(ids[:-1]) & set(eos)
        assert len(ids) == 40 or ids[-1] in eos
        ended += ids[-1] in eos
    assert 0 < ended < len(rows)
    assert manifest["totals"]["completions"] == {
        "prompts": 14,
        "prompts_too_long": 0,
        "completions": len(rows),
        "tokens": sum(len(completions(row)) for row in rows),
        "ended": ended,
        "corrected": 0,
    }
    assert manifest["totals"]["documents"] == 14


def test_a_list_of_ends_is_respected_and_recorded(make_recipe, tmp_path, tiny_teacher_dir):
    run(make_recipe(generation=DRAWN), tmp_path / "plain")
    ends = sorted({ids[3] for ids in written(tmp_path / "plain").values() if len(ids) > 3})[:3]
    teacher = tmp_path / "chatty"
    shutil.copytree(tiny_teacher_dir, teacher)
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    run(make_recipe(teacher=teacher, generation=DRAWN), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["teacher"]["generation_eos_ids"] == sorted({0, *ends})
    for name, ids in written(tmp_path / "plain").items():
        end = next((i + 1 for i, token in enumerate(ids) if token in {0, *ends}), len(ids))
        assert written(tmp_path / "out")[name] == ids[:end]


# Greedy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "output", ["", 'top_k = "all"', "completions_only = true\nhidden_states = true"]
)
def test_every_greedy_token_is_the_first_of_what_is_stored(
    dtype, output, make_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "FIRST_DRAFT_TOKENS", 7)
    monkeypatch.setattr(generation, "SHORTEST_DRAFT_TOKENS", 5)
    write_jsonl(tmp_path / "corpus.jsonl", prompts(30))
    recipe = make_recipe(generation=f"{GREEDY}\nbatch_tokens = 300", output=output or "top_k = 20")
    recipe.write_text(recipe.read_text().replace('"float32"', f'"{dtype}"'))
    run(recipe, tmp_path / "out")
    assert not_the_captured_choice(tmp_path / "out") == []
    corrected = read_manifest(tmp_path / "out")["totals"]["completions"]["corrected"]
    assert corrected == 0 if dtype == "float32" else corrected > 3


def test_a_verifier_that_looks_away_would_let_wrong_tokens_pass(make_recipe, tmp_path, monkeypatch):
    """So that the test above shows that the capture pass decides, and not that nothing is ever in doubt."""
    monkeypatch.setattr(generation, "_choices", lambda found, following: following)
    write_jsonl(tmp_path / "corpus.jsonl", prompts(30))
    recipe = make_recipe(generation=GREEDY)
    recipe.write_text(recipe.read_text().replace('"float32"', '"bfloat16"'))
    run(recipe, tmp_path / "out")
    assert not_the_captured_choice(tmp_path / "out")
    found = problems(tmp_path / "out")
    assert any("was written greedily, but not with the most probable token" in p for p in found)


CHOICES = {
    "greedy": (GREEDY, "tail_samples = 0"),
    "greedy, everything": (
        GREEDY,
        "tail_samples = 3\nseed = 2\ntemperatures = [2.0]\nhidden_states = true",
    ),
    "greedy, all": (GREEDY, 'top_k = "all"'),
    "drawn": (DRAWN, ""),
    "drawn, everything": (
        f"{DRAWN}\ntemperature = 0.8\ntop_p = 0.9\nseed = 5\nsamples = 3",
        'tail_samples = 3\ntemperatures = [2.0]\nhidden_states = true\nprofile = "compact"\ntext = false',
    ),
    "drawn, all": (f"{DRAWN}\nsamples = 2", 'top_k = "all"\nhidden_states = true'),
    "one token": ("max_new_tokens = 1\nsamples = 2", ""),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_resumes_to_the_same_bytes_verifies_and_loads(
    choice, make_recipe, tmp_path, tiny_teacher_dir
):
    how, output = CHOICES[choice]
    output = f"shard_tokens = 90\n{output}"
    recipe = make_recipe(generation=f"{how}\nbatch_tokens = 150", output=output)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe, whole)
    while run(recipe, parts, max_shards=1).status == "stopped early":
        pass
    assert data_bytes(parts) == data_bytes(whole)
    assert len(data_bytes(whole)) > 1
    report = verify(whole, recompute=8, teacher_path=tiny_teacher_dir, seed=0)
    assert report.problems == []
    assert report.recomputed["mean_abs_error"] < 2e-3
    dataset = load_dataset(str(whole), split="train", cache_dir=str(tmp_path / "cache"))
    row = dataset.with_format("torch")[0]
    assert row["completion_mask"].dtype == torch.bool
    assert row["completion_mask"].shape == row["input_ids"].shape
