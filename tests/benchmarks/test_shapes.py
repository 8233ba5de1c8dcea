"""The section for GPUs, in its tiny form: it runs, and compares what it says."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import shapes
from tests.conftest import REPOSITORY


def test_it_runs_from_the_command_line_without_a_gpu(tmp_path):
    output = tmp_path / "bench.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--only", "shapes", "--device", "cpu"),
            *("--rounds", "1", "--output", str(output)),
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["shapes"]
    assert set(found["tokens_per_second"]) == set(shapes.TINY)
    for name, rates in found["tokens_per_second"].items():
        assert f"random weights, {name}" in done.stdout
        assert {"forward", "loop", "loop, 4 draws", "naive loop"} <= set(rates)
        assert all(value > 0 for value in rates.values())
    for size in shapes.TINY_VOCABULARIES:
        ways = found["capture"][f"V {size:,}"]
        for way in ways.values():
            # Both say the same of the same rows.
            row_bytes = way["gigabytes_per_second"] * 1e3 * way["microseconds_a_row"]
            itemsize = row_bytes / size
            assert min(abs(itemsize - 2), abs(itemsize - 4)) < 0.7, way


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_the_shapes_are_models_of_their_sizes(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in shapes.SHAPES[name].items() if key != "tokens"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(shape.pop("model_type"), **shape)
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    said = name.split(",")[0].split()[0]
    expected = float(said[:-1]) * {"M": 1e6, "B": 1e9}[said[-1]]
    assert parameters == pytest.approx(expected, rel=0.08)
    assert f"V {shape['vocab_size']:,}" in name


def test_both_teachers_have_the_same_weights():
    shape = {key: value for key, value in shapes.TINY["tiny, V 3,001"].items() if key != "tokens"}
    plain, exact = shapes.make_teachers(shape, "cpu")
    assert plain.model is exact.model
    assert (plain.head_dtype, exact.head_dtype) == (None, "float32")


def test_sequences_have_the_lengths_and_ids_that_were_asked_for():
    made = shapes.random_sequences(2_000, 77, (8, 40))
    lengths = [len(sequence.token_ids) for sequence in made]
    assert 2_000 <= sum(lengths) < 2_040
    assert (min(lengths), max(lengths)) == (8, 40)
    ids = {token for sequence in made for token in sequence.token_ids}
    assert (min(ids), max(ids)) == (0, 76)
