"""Whole builds on a GPU in bfloat16: two are equal, a killed one is resumed, memory may run out, and the CPU verifies them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from builder.dataset.manifest import read_manifest
from builder.verify.verify import verify
from tests.build.test_build import data_bytes, run
from tests.chats import chatty_teacher, sample_chats
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.gpu.device import DEVICE, needs_cuda

pytestmark = pytest.mark.gpu
KINDS = {
    "plain": {},
    "all": {"output": 'top_k = "all"'},
    "hidden states": {"output": "hidden_states = true\ntemperatures = [2.0]"},
    "many draws": {"output": "tail_samples = 24"},
}


@pytest.fixture
def recipe(make_recipe, corpus_file):
    """Write a recipe for the tiny teacher in bfloat16."""

    def write(documents: int = 40, shard_tokens: int = 300, **changes: str) -> Path:
        write_jsonl(corpus_file, sample_documents(documents))
        output = f"{changes.pop('output', '')}\nshard_tokens = {shard_tokens}"
        path = make_recipe(output=output, **changes)
        path.write_text(path.read_text().replace('"float32"', '"bfloat16"'))
        return path

    return write


def check(output: Path, teacher: Path) -> None:
    """What was built there is right by the teacher on the CPU, too."""
    manifest = read_manifest(output)
    assert manifest["teacher"]["head_dtype"] == "float32"
    for device in dict.fromkeys((DEVICE, "cpu")):
        report = verify(output, recompute=6, device=device, teacher_path=teacher, seed=0)
        assert not report.problems, report.problems


@pytest.mark.parametrize("kind", KINDS)
def test_two_builds_are_equal_and_right(recipe, tmp_path, tiny_teacher_dir, kind):
    path = recipe(**KINDS[kind])
    for name in ("one", "two"):
        run(path, tmp_path / name, device=DEVICE)
    assert data_bytes(tmp_path / "one") == data_bytes(tmp_path / "two")
    check(tmp_path / "one", tiny_teacher_dir)


def test_a_killed_build_is_resumed_to_the_same_bytes(recipe, tmp_path):
    path = recipe(documents=100, shard_tokens=150)
    run(path, tmp_path / "whole", device=DEVICE)
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "builder.cli", "build", str(path), "--output", str(output), "--device", DEVICE]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list((output / ".build" / "records").glob("*.json"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not (output / "manifest.json").exists()
    run(path, output, device=DEVICE)
    assert data_bytes(output) == data_bytes(tmp_path / "whole")


@needs_cuda
def test_out_of_memory_halves_the_batch_and_goes_on(recipe, tmp_path, tiny_teacher_dir):
    # Of a tiny teacher, only large batches take memory that can be measured.
    path = recipe(
        documents=4_000, shard_tokens=10**6, sequences="max_length = 64\nbatch_tokens = 200_000"
    )
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 80 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)  # fmt: skip
    notices: list[str] = []
    try:
        run(path, tmp_path / "out", device=DEVICE, notice=notices.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("half as many" in line for line in notices), notices
    assert read_manifest(tmp_path / "out")["shards"][0]["halved_batches"] > 0
    check(tmp_path / "out", tiny_teacher_dir)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_the_teacher_writes(recipe, tmp_path, tiny_teacher_dir, temperature):
    path = recipe(generation=f"max_new_tokens = 12\ntemperature = {temperature}")
    for name in ("one", "two"):
        run(path, tmp_path / name, device=DEVICE)
    assert data_bytes(tmp_path / "one") == data_bytes(tmp_path / "two")
    check(tmp_path / "one", tiny_teacher_dir)


def test_chats(tmp_path, tiny_tokenizer, tiny_model):
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, tmp_path / "chatty")
    write_jsonl(tmp_path / "chats.jsonl", sample_chats())
    text = recipe_text(
        teacher,
        "chats.jsonl",
        corpus='messages_column = "messages"',
        output="completions_only = true",
    )
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace('"float32"', '"bfloat16"'))
    run(path, tmp_path / "out", device=DEVICE)
    check(tmp_path / "out", teacher)
