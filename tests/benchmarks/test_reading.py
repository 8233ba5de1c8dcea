"""The sections `reading` and `trainers` read what they say, all of it, and tell rates of every way."""

import torch

from benchmarks import reading, sample, trainers
from logit_dataset import load_logits


def test_a_repeated_dataset_holds_the_rows_again_and_again(built, tmp_path):
    data = load_logits(built)
    long = load_logits(sample.repeated(built, tmp_path / "long", 2 * data.num_tokens + 1))
    assert (long.num_rows, long.num_tokens) == (3 * data.num_rows, 3 * data.num_tokens)
    rows, more = ([b["topk_logprobs"] for b in d.batches(batch_size=1, seed=None)] for d in (data, long))  # fmt: skip
    assert len(more) == 3 * len(rows)
    assert all(torch.equal(a, b) for a, b in zip(rows * 3, more, strict=True))


def test_costs_count_the_time_of_processes_that_were_started(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7))'])"
    wall, cpu = sample.costs(lambda: exec(code))
    assert wall > 0.05
    assert cpu > 0.05


def test_every_way_has_a_rate_and_a_cost(built):
    found = reading.measure(built, rounds=1, tokens=1)
    assert set(found["tokens_per_second"]) == set(found["cpu_microseconds"])
    assert len(found["tokens_per_second"]) == 5
    assert all(value > 0 for value in found["tokens_per_second"].values())
    found = trainers.measure(built, rounds=1, tokens=1)
    assert len(found) == 4
    assert all(way["tokens_per_second"] > 0 < way["cpu_microseconds"] for way in found.values())
