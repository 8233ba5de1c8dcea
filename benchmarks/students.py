"""What a student's loss takes in memory and time beside a dense KL, and how long a small student waits for its data."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import sample
from benchmarks.memory import kernel_says
from logit_dataset import (
    FrequentTokens,
    distillation_loss,
    distillation_loss_from_hidden,
    load_logits,
)

POSITIONS, VOCABULARY, HIDDEN, TOP_K = 2_048, 49_152, 64, 50
"""Of the loss that is measured: 403 MB of float32 logits."""
KEPT, BATCH_SIZE, LENGTH, STEPS = 2_048, 4, 256, 60
"""Of the student that waits: a million parameters, batches of 1,024 tokens."""


def losses() -> dict[str, dict[str, float]]:
    """Each way from hidden states to gradients: MB at the peak above what is there before (the teacher's values too), and seconds."""
    found = {}
    for name in _WAYS:
        command = [sys.executable, "-m", "benchmarks.students", name]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(ended.stdout.splitlines()[-1])
    return found


def waiting(dataset: Path) -> dict[str, float]:
    """Share of a training step of a student of 1M parameters that is spent waiting for the next batch, after the first of all."""
    from examples.experiment.student import logits_of, make_student

    data = load_logits(dataset)
    data = data.project(FrequentTokens(data.token_counts(), KEPT))
    student = make_student(data.vocab_size, length=LENGTH, seed=0)
    optimizer = torch.optim.AdamW(student.parameters())
    batches = data.batches(
        batch_size=BATCH_SIZE, length=LENGTH, packed=True, split_long=True, seed=0
    )
    waited, steps, started = 0.0, 0, 0.0
    while steps < STEPS:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                break
            if started:
                waited += time.perf_counter() - asked
            else:
                started = time.perf_counter()
            optimizer.zero_grad()
            distillation_loss(logits_of(student, batch), batch).backward()
            optimizer.step()
            steps += 1
    step = (time.perf_counter() - started) / steps
    return {
        "milliseconds_a_step": round(1e3 * step, 1),
        "share_waiting": round(waited / steps / step, 4),
    }


def _batch() -> dict[str, Tensor]:
    """Random values in the shapes and types of a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, POSITIONS), generator=generator)
    scores = torch.rand(1, POSITIONS, TOP_K, generator=generator)
    listed = torch.randint(VOCABULARY // TOP_K, (1, POSITIONS, TOP_K), generator=generator)
    return {
        "input_ids": ids.int(),
        "target_ids": ids.roll(-1).int(),
        "mask": torch.ones(1, POSITIONS, dtype=torch.bool),
        # Distinct ids: one of each fiftieth of the vocabulary.
        "topk_indices": (listed * TOP_K + torch.arange(TOP_K)).int(),
        "topk_logprobs": (0.9 * scores).log_softmax(-1).half(),
        "tail_logprob": torch.full((1, POSITIONS), -2.3).half(),
    }


def _dense_kl(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    logq = (hidden @ weight.T).log_softmax(-1)
    logp = batch["whole"].float()
    return (logp.exp() * (logp - logq)).sum(-1).mean()


def _text(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy((hidden @ weight.T)[0], batch["target_ids"][0].long())


def _ours(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return distillation_loss(hidden @ weight.T, batch)


def _ours_from_hidden(hidden: Tensor, weight: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return distillation_loss_from_hidden(hidden, lambda chunk: chunk @ weight.T, batch)


_WAYS: dict[str, Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]] = {
    "dense KL": _dense_kl,
    "cross-entropy on text": _text,
    "tail bucket": _ours,
    "tail bucket, from hidden states": _ours_from_hidden,
}


def _run(name: str) -> None:
    """Measure one way, in a process of its own."""
    batch = _batch()
    hidden = torch.randn(1, POSITIONS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).mul_(HIDDEN**-0.5).requires_grad_()
    if name == "dense KL":
        batch["whole"] = torch.randn(1, POSITIONS, VOCABULARY).log_softmax(-1).half()

    def step() -> None:
        hidden.grad = weight.grad = None
        _WAYS[name](hidden, weight, batch).backward()

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the preparation
    before = kernel_says("VmRSS")
    step()
    peak = kernel_says("VmHWM")
    seconds = sorted(sample.seconds(step) for _ in range(3))[1]
    values: dict[str, Any] = {
        "megabytes": round((peak - before) / 1e6),
        "seconds": round(seconds, 2),
    }
    print(json.dumps(values))


if __name__ == "__main__":
    _run(sys.argv[1])
