"""The exact KL from stored hidden states and the teacher's head: against the formula in float64, and in bounded memory."""

import copy
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import TrainingArguments

from logit_dataset import (
    LogitCollator,
    TeacherHead,
    dense_kl,
    dense_kl_from_hidden,
    load_logits,
    load_teacher_head,
)
from logit_dataset.losses import count_positions
from tests.logit_dataset.test_teacher_head import build_in


@pytest.fixture(scope="module")
def out(tiny_teacher_dir, tmp_path_factory) -> Path:
    return build_in(tmp_path_factory.mktemp("dense"), tiny_teacher_dir)


def logits_for(batch, width: int = 448, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.randn(*batch["input_ids"].shape, width, dtype=dtype) * 2


def batches_of(out: Path):
    yield next(iter(load_logits(out).batches(batch_size=4)))
    yield next(iter(load_logits(out).batches(batch_size=2, packed=True, length=128)))


def reference(logits, batch, head, temperature, text_weight):
    """Dense, in float64, written as the formula stands."""
    mask, has_text = batch["mask"], batch["target_ids"] >= 0
    weight = head.weight_VD.double()
    teacher = head.scale * batch["hidden_states"].double() @ weight.T
    if head.bias_V is not None:
        teacher = teacher + head.scale * head.bias_V.double()
    if head.softcap:
        teacher = head.softcap * torch.tanh(teacher / head.softcap)
    p = torch.softmax(teacher / temperature, -1)
    q = torch.log_softmax(logits / temperature, -1)[..., : len(weight)]
    kl = (p * (p.log() - q)).sum(-1)[mask].mean() * temperature**2
    text = torch.nn.functional.cross_entropy(
        logits[has_text], batch["target_ids"][has_text].long(), reduction="mean"
    )
    return (1 - text_weight) * kl + text_weight * text


HEADS = {
    "plain": {},
    "all": {"bias_V": torch.linspace(-1, 1, 448), "scale": 0.5, "softcap": 3.0},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("temperature", "text_weight"), [(1.0, 0.0), (2.5, 0.3), (0.7, 0.0), (1.0, 1.0)]
)
def test_value_and_gradient_are_those_of_the_formula(
    out, kind, temperature, text_weight, monkeypatch
):
    monkeypatch.setattr(
        "logit_dataset.hidden.kl.CHUNK_BYTES", 4 * 448 * 7
    )  # several chunks, the last one short
    head = TeacherHead(weight_VD=load_teacher_head(out).weight_VD, **HEADS[kind])
    for batch in batches_of(out):
        logits = logits_for(batch, 450).requires_grad_()
        options = {"temperature": temperature, "text_weight": text_weight}
        loss = dense_kl(logits, batch, head, **options)
        expected = reference(logits, batch, head, temperature, text_weight)
        (gradient,) = torch.autograd.grad(loss * 3, logits)
        (truth,) = torch.autograd.grad(expected * 3, logits)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(gradient, truth, rtol=1e-5, atol=1e-9)
        # The same by hidden states and a head, with the gradients of both.
        torch.manual_seed(4)
        states = torch.randn(*batch["input_ids"].shape, 16, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(450, 16, dtype=torch.float64, requires_grad=True)
        expected = reference(states @ weight.T, batch, head, temperature, text_weight)
        fused = dense_kl_from_hidden(
            states, partial(torch.nn.functional.linear, weight=weight), batch, head, **options
        )
        assert fused.item() == pytest.approx(expected.item(), rel=1e-6)
        for one, other in zip(
            torch.autograd.grad(fused, (states, weight)),
            torch.autograd.grad(expected, (states, weight)),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_give_the_same_within_their_rounding(out, dtype):
    head = load_teacher_head(out)
    batch = next(batches_of(out))
    logits = logits_for(batch).to(dtype).requires_grad_()
    loss = dense_kl(logits, batch, head, temperature=2.0)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, batch, head, 2.0, 0.0)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert logits.grad.dtype == dtype
    scale = exact.grad.abs().max()
    assert (logits.grad.double() - exact.grad).abs().max() < 0.01 * scale


def test_the_teacher_as_its_own_student(out, tiny_model):
    """0 where aligned; nats where shifted by one. By rows of load_dataset, and by batches."""
    head = load_teacher_head(out)
    rows = load_dataset(str(out), split="train").with_format("numpy")
    collator = LogitCollator.of(out)
    for batch in (collator(list(rows.select(range(6)))), next(batches_of(out))):
        with torch.no_grad():
            logits = tiny_model(batch["input_ids"].long()).logits
        for temperature in (1.0, 0.5, 4.0):
            kl = dense_kl(logits, batch, head, temperature=temperature)
            assert 0 <= kl.item() < 1e-4
        shifted = {**batch, "hidden_states": batch["hidden_states"].roll(1, 1)}
        assert dense_kl(logits, shifted, head).item() > 1


def test_counts_divide_as_in_the_other_losses(out):
    """Batches of any size give the mean over all positions; and nothing that counts gives 0, with gradients for all weights."""
    head = load_teacher_head(out)
    torch.manual_seed(5)
    table = torch.randn(448, 448)
    options = {"text_weight": 0.2, "temperature": 2.0}

    def loss(batch, **more):
        return dense_kl(table[batch["input_ids"].long()], batch, head, **options, **more).item()

    batches = list(load_logits(out).batches(batch_size=3, seed=None))
    count = sum(count_positions(batch) for batch in batches)
    whole = next(iter(load_logits(out).batches(batch_size=99, seed=None)))
    parts = [loss(batch, num_positions=count) for batch in batches]
    assert len(parts) > 2
    assert sum(parts) == pytest.approx(loss(whole), rel=1e-5)
    nothing = {**whole, "mask": torch.zeros_like(whole["mask"])}
    states = torch.randn(*whole["input_ids"].shape, 8, requires_grad=True)
    layer = torch.nn.Linear(8, 448)
    loss = dense_kl_from_hidden(states, layer, nothing, head)
    loss.backward()
    assert loss.item() == 0
    assert not layer.weight.grad.any()


def test_what_does_not_fit_is_one_line(out):
    head = load_teacher_head(out)
    batch = next(batches_of(out))
    logits = logits_for(batch)
    cases = [
        (logits, {k: v for k, v in batch.items() if k != "hidden_states"}, {}, "no hidden_states; build the dataset"),
        (logits[..., :400], batch, {}, "the teacher has 448 logits, the student 400"),
        (logits[:, :-1], batch, {}, "logits have shape"),
        (logits, batch, {"temperature": 0}, "temperature is 0"),
        (logits, batch, {"text_weight": 2}, "text_weight is 2"),
        (logits, {**batch, "hidden_states": batch["hidden_states"][..., :8]}, {}, "have 8 values, but this head takes 32"),
    ]  # fmt: skip
    for student, values, options, message in cases:
        with pytest.raises(ValueError, match=message):
            dense_kl(student, values, head, **options)
    with pytest.raises(ValueError, match="the teacher's head is on meta"):
        dense_kl(logits, batch, head.to("meta"))


def test_no_second_tensor_of_all_logits_exists(out, monkeypatch):
    """Memory of torch's CPU allocator at its most, beyond the student's logits where they are given: their gradient and some chunks."""
    monkeypatch.setattr("logit_dataset.hidden.kl.CHUNK_BYTES", 2**20)
    batch = next(iter(load_logits(out).batches(batch_size=64, packed=True, length=512)))
    head = TeacherHead(weight_VD=torch.randn(8192, 32))
    shape = batch["input_ids"].shape
    size = 4 * shape[0] * shape[1] * 8192
    states = torch.randn(*shape, 16, requires_grad=True)
    layer = torch.nn.Linear(16, 8192)

    def peak(run) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        events = [
            one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"
        ]
        sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
        return max(accumulate(sizes))

    fused = peak(lambda: dense_kl_from_hidden(states, layer, batch, head).backward())
    logits = layer(states).detach().requires_grad_()
    given = peak(lambda: dense_kl(logits, batch, head).backward())
    assert size == 2**25
    assert 2**20 < fused < size / 4
    assert size <= given < size * 5 / 4


# Trainers


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_trainers_learn_the_whole_distribution(out, tiny_model, tiny_tokenizer, tmp_path, kind):
    rows = load_dataset(str(out), split="train")
    head = load_teacher_head(out)
    arguments = {
        **{"output_dir": str(tmp_path), "report_to": [], "disable_tqdm": True, "use_cpu": True},
        **{"save_strategy": "no", "max_steps": 1, "logging_steps": 1, "bf16": False},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    }

    def make(model, **options):
        options |= {"temperature": 2.0, "text_weight": 0.25, "eval_dataset": rows}
        if kind == "transformers":
            from logit_dataset.trainers import DistillationTrainer

            return DistillationTrainer(model, TrainingArguments(**arguments), None, rows, **options)
        trl = pytest.importorskip("trl", reason="trl is not installed (the extra dev has it)")
        from logit_dataset.trainers import DistillationSFTTrainer

        options["processing_class"] = tiny_tokenizer
        return DistillationSFTTrainer(model, trl.SFTConfig(**arguments), None, rows, **options)

    assert abs(make(copy.deepcopy(tiny_model), teacher_head=head).evaluate()["eval_kl"]) < 1e-4
    student = copy.deepcopy(tiny_model).requires_grad_(True)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trainer = make(student, teacher_head=head)
    found = trainer.evaluate()
    batch = LogitCollator.of(rows)(list(rows.with_format("numpy")))
    logits = student(batch["input_ids"]).logits.double()
    kl = reference(logits, batch, head, 1.0, 0.0).item()
    assert kl > 0.05
    assert found["eval_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["eval_loss"] == pytest.approx(reference(logits, batch, head, 2.0, 0.25).item(), rel=1e-4)  # fmt: skip
    learned = []

    def keep(inputs, **_):
        learned.append({name: values.clone() for name, values in inputs.items()})

    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: (keep(inputs), prepare(inputs))[1]
    before = copy.deepcopy(student)
    trainer.train()
    counts = sum(count_positions(batch) for batch in learned)
    assert len(learned) == 3
    expected = sum(
        dense_kl(before(batch["input_ids"]).logits, batch, head, temperature=2.0, text_weight=0.25, num_positions=counts)
        for batch in learned
    )  # fmt: skip
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected.item(), rel=1e-3)
    with pytest.raises(ValueError, match="with a teacher_head the loss is the KL over the whole"):
        make(student, teacher_head=head, loss="residual")
