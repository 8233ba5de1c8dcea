"""Liger's fused JSD as the example uses it, against `dense_kl_from_hidden`. Run by `make test-trainers`, in axolotl's environment."""

import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from transformers import AutoModelForCausalLM

from logit_dataset import dense_kl_from_hidden, load_logits, load_teacher_head

IN = Path(os.environ["TRAINER_EXPORTS"])
EXAMPLE = Path(__file__).parent / "train_liger.py"


def run(student, steps, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(IN / "dataset"), str(student), str(steps)])
    return runpy.run_path(str(EXAMPLE))["losses"]


def test_the_example_finds_nothing_to_learn_for_the_teacher_and_teaches_others(tmp_path, monkeypatch, capsys):  # fmt: skip
    (aligned,) = run(IN / "teacher", 1, monkeypatch)
    student = AutoModelForCausalLM.from_pretrained(IN / "teacher", dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1)
    student.save_pretrained(tmp_path / "student")
    losses = run(tmp_path / "student", 40, monkeypatch)
    with capsys.disabled():
        print(f"\nLiger {version('liger-kernel')}: KL {aligned:.6f}; a student {losses[0]:.2f} → {losses[-1]:.2f}")  # fmt: skip
    assert abs(aligned) < 0.005
    assert losses[-1] < 0.8 * losses[0]


def test_it_gives_the_loss_and_the_gradients_of_ours(capsys):
    head = load_teacher_head(IN / "dataset")
    batch = next(iter(load_logits(IN / "dataset").batches(batch_size=8)))
    mask = batch["mask"]
    torch.manual_seed(0)
    hidden = torch.randn(*mask.shape, 24, requires_grad=True)
    weight = torch.randn(head.vocab_size, 24, requires_grad=True)
    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)  # fmt: skip
    states = batch["hidden_states"][mask].float()
    theirs = jsd(hidden[mask], weight, states, head.weight_VD, torch.zeros(len(states), dtype=torch.long))  # fmt: skip
    ours = dense_kl_from_hidden(hidden, lambda h: h @ weight.T, batch, head)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (theirs, ours)]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    shifted = batch | {"hidden_states": batch["hidden_states"].roll(1, 1)}
    teacher = AutoModelForCausalLM.from_pretrained(IN / "teacher", dtype=torch.float32)
    with torch.no_grad():
        own = teacher.model(batch["input_ids"].long()).last_hidden_state[mask]
        labels = torch.zeros(len(own), dtype=torch.long)
    off = jsd(own, teacher.lm_head.weight.detach().requires_grad_(), shifted["hidden_states"][mask].float(), head.weight_VD, labels)  # fmt: skip
    with capsys.disabled():
        print(f"\nLiger, one position off: {off.item():.2f}")
    assert off > 1
