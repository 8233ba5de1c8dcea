"""Our export in axolotl's own collators, kernel and loss: the teacher as its own student. Run by `make test-trainers`, in axolotl's environment."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from axolotl.integrations.kd.collator import (
    DataCollatorForKD,
    KDBatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss
from axolotl.integrations.kd.topk_logprob.forward_kl import loss as top_k_loss
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

IN = Path(os.environ["TRAINER_EXPORTS"])


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(IN / "teacher", dtype=torch.float32)


@pytest.fixture(params=["one by one", "packed"])
def batch(request):
    """A function: name of an export → a batch, as axolotl makes it."""
    tokenizer = AutoTokenizer.from_pretrained(IN / "teacher")
    tokenizer.pad_token = tokenizer.eos_token

    def made(tail):
        rows = list(load_dataset(str(IN / f"axolotl-{tail}"), split="train").select(range(12)))
        if request.param == "packed":
            rows = [rows[i : i + 3] for i in range(0, 12, 3)]
            return KDBatchSamplerDataCollatorForSeq2Seq(tokenizer)(rows)
        return DataCollatorForKD(tokenizer)(rows)

    return made


def hidden_states(teacher, batch):
    """Sequences that are packed do not see each other, by `position_ids`, as axolotl's patched attention has it."""
    inputs = {name: torch.as_tensor(batch[name]) for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        return teacher.model(**inputs, use_cache=False).last_hidden_state


def by_kernel(teacher, batch, hidden, shift=0):
    kernel = LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        temperature=1.0,
        beta=0.0,
        compiled=False,
        compute_ce_loss=False,
        normalize_topk=False,
    )
    ids, logprobs, mask = (batch[f"target_{what}"] for what in ("token_ids", "logprobs", "mask"))
    total = kernel(
        teacher.lm_head.weight.detach(),
        hidden,
        ids.roll(shift, 1),
        logprobs.roll(shift, 1),
        mask,
        torch.as_tensor(batch["labels"]),
    )
    return total / (mask[..., 0] > 0).sum()


def test_the_teacher_has_nothing_to_learn_and_one_position_off_much(teacher, batch, capsys):
    found = batch("none")
    hidden = hidden_states(teacher, found)
    aligned, shifted = by_kernel(teacher, found, hidden), by_kernel(teacher, found, hidden, 1)
    with capsys.disabled():
        print(
            f"\naxolotl {version('axolotl')}, kernel: KL {aligned:.6f}, one position off {shifted:.2f}"
        )
    assert abs(aligned) < 0.005
    assert shifted > 1
    ids, logprobs, mask = (found[f"target_{what}"] for what in ("token_ids", "logprobs", "mask"))
    count = int((mask[..., 0] > 0).sum())
    logits = teacher.lm_head(hidden).detach()
    assert abs(top_k_loss(logits, ids, logprobs, mask, count)) < 0.005


def test_with_draws_the_tail_is_pushed_nowhere(teacher, batch, capsys):
    gradients = {}
    for tail in ("none", "draws"):
        found = batch(tail)
        mask = found["target_mask"]
        logits = teacher.lm_head(hidden_states(teacher, found)).detach().requires_grad_()
        listed = [found[f"target_{what}"] for what in ("token_ids", "logprobs", "mask")]
        top_k_loss(logits, *listed, int((mask[..., 0] > 0).sum())).backward()
        outside = torch.ones_like(logits).scatter_(2, listed[0][..., :64], 0)
        gradients[tail] = float((logits.grad * outside).sum())
    with capsys.disabled():
        print(f"\naxolotl, gradient on the tail: {gradients['none']:+.3f} without draws, {gradients['draws']:+.4f} with them")  # fmt: skip
    assert gradients["none"] > 0.02
    assert abs(gradients["draws"]) < 0.002
