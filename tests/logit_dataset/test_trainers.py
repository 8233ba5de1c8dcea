"""The teacher as its own student has nothing to learn; one position off, much. Through the trainers that users take."""

import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import FrequentTokens, LogitCollator, distillation_loss, load_logits
from logit_dataset.losses import count_positions, position_losses
from logit_dataset.trainers import DistillationTrainer
from tests.conftest import REPOSITORY, TINY_VOCAB_SIZE, recipe_text, sample_documents, write_jsonl

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
DISTRIBUTION = ("topk_indices", "topk_logprobs", "tail_logprob", "tail_indices", "tail_logprobs")
DISTRIBUTION += ("entropy",)
TRAINERS = ["transformers", "trl"]


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (the extra dev has it)")


@pytest.fixture(scope="module")
def drawn(tiny_teacher_dir, tmp_path_factory):
    """A dataset with draws from the tail, of rows of 20 to 64 tokens."""
    base = tmp_path_factory.mktemp("drawn")
    write_jsonl(base / "corpus.jsonl", sample_documents())
    text = recipe_text(
        tiny_teacher_dir, "corpus.jsonl", output="top_k = 8\ntail_samples = 8\nshard_tokens = 300"
    )
    (base / "recipe.toml").write_text(text)
    build(load_recipe(base / "recipe.toml"), base, base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def rows(drawn, tmp_path_factory):
    return load_dataset(str(drawn), split="train", cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def off_by_one(rows):
    """As if position t held what follows position t + 1."""

    def moved(row):
        return {name: row[name][1:] + row[name][:1] for name in DISTRIBUTION}

    return rows.map(moved, features=rows.features, load_from_cache_file=False)


@pytest.fixture
def teacher(tiny_model):
    return copy.deepcopy(tiny_model).requires_grad_(True)


@pytest.fixture
def student(teacher):
    generator = torch.Generator().manual_seed(1)
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    return teacher


@pytest.fixture
def make(tmp_path, tiny_tokenizer):
    """A trainer of either kind: make("trl", model, rows, arguments={…}, …)."""

    def made(kind, model, rows, *, arguments=None, **options):
        arguments = {"output_dir": str(tmp_path / "student"), **QUIET, **(arguments or {})}
        if kind == "transformers":
            return DistillationTrainer(model, TrainingArguments(**arguments), None, rows, **options)
        pytest.importorskip("trl", reason="trl is not installed (the extra dev has it)")
        from trl import SFTConfig

        from logit_dataset.trainers import DistillationSFTTrainer

        arguments = {"bf16": False, **arguments}
        options = {"processing_class": tiny_tokenizer, **options}
        return DistillationSFTTrainer(model, SFTConfig(**arguments), None, rows, **options)

    return made


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_teacher_is_its_own_best_student(make, teacher, rows, off_by_one, kind):
    arguments = {"per_device_eval_batch_size": 5}
    trainer = make(kind, teacher, rows, arguments=arguments, eval_dataset=rows)
    found = trainer.evaluate()
    assert abs(found["eval_kl"]) < 0.005
    assert found["eval_entropy_correlation"] > 0.9999
    assert found["eval_entropy"] == pytest.approx(found["eval_teacher_entropy"], abs=1e-3)
    wrong = trainer.evaluate(off_by_one.with_format("numpy"))
    assert wrong["eval_kl"] > 1
    assert wrong["eval_entropy_correlation"] < 0.9


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_teacher_stays_where_it_is_and_is_moved_by_data_that_are_not(
    make, teacher, rows, off_by_one, kind
):
    """What is learned, not only what is reported: the gradient of a step is nothing, or it is not."""
    norms = []
    for data in (rows, off_by_one):
        arguments = {"max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1}
        trainer = make(kind, copy.deepcopy(teacher), data, arguments=arguments, loss="tail_bucket")
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] < 0.01 * norms[1]


def test_a_trainer_only_to_evaluate(teacher, rows, tmp_path):
    arguments = TrainingArguments(str(tmp_path), **QUIET)
    some = {"a": rows.select(range(5))}
    for options in ({}, {"eval_dataset": some}, {"data_collator": LogitCollator.of(rows)}):
        trainer = DistillationTrainer(teacher, arguments, **options)
        found = trainer.evaluate(some)
        assert abs(found["eval_a_kl"]) < 0.005
    assert trainer.predict(rows.select(range(5))).metrics["test_kl"] == found["eval_a_kl"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_students_learn(make, student, rows, kind):
    arguments = {"num_train_epochs": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    trainer = make(kind, student, rows, arguments=arguments, eval_dataset={"a": rows, "b": rows})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_a_kl"] < 0.7 * before["eval_a_kl"]
    assert after["eval_b_kl"] == after["eval_a_kl"]
    assert after["eval_a_entropy_correlation"] > before["eval_a_entropy_correlation"]


def dense(model, rows):
    """The true KL and entropies at all positions, in float64, with the teacher's own logits: what evaluation estimates."""
    from transformers import AutoModelForCausalLM

    found = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (
                m(ids).logits[0].double().log_softmax(-1)
                for m in (AutoModelForCausalLM.from_pretrained(model[0]), model[1])
            )
        found.append(torch.stack([(p.exp() * (p - q)).sum(-1), -(q.exp() * q).sum(-1), -(p.exp() * p).sum(-1)]))  # fmt: skip
    return torch.cat(found, dim=1)


def test_evaluation_says_what_is_true(make, student, rows, tiny_teacher_dir):
    found = make("transformers", student, rows, eval_dataset=rows).evaluate()
    kl_N, student_N, teacher_N = dense((tiny_teacher_dir, student.eval()), rows)
    # 8 of 448 ids are listed, and 8 drawn: an estimate, but a bound would be far below.
    assert found["eval_kl"] == pytest.approx(kl_N.mean().item(), rel=0.05)
    bound = position_losses_of(student, rows)
    assert bound < 0.7 * found["eval_kl"]
    assert found["eval_entropy"] == pytest.approx(student_N.mean().item(), rel=1e-5)
    assert found["eval_teacher_entropy"] == pytest.approx(teacher_N.mean().item(), rel=1e-3)
    expected = np.corrcoef(student_N, teacher_N)[0, 1]
    assert found["eval_entropy_correlation"] == pytest.approx(expected, abs=1e-3)


def position_losses_of(model, rows):
    batch = LogitCollator.of(rows)([*rows.with_format("numpy")])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss, text = position_losses(logits, batch, loss="tail_bucket")
    whole = distillation_loss(logits, batch, loss="tail_bucket", text_weight=0.3)
    counts = count_positions(batch, loss="tail_bucket")
    assert whole.item() == pytest.approx((0.7 * loss.sum() / counts[0] + 0.3 * text.sum() / counts[1]).item(), rel=1e-5)  # fmt: skip
    return (loss.sum() / counts[0]).item()


@pytest.mark.parametrize("collator", [{}, {"packed": True, "length": 64}, {"packed": True}, {"length": 30, "split_long": True}, {"packed": True, "length": 30, "split_long": True}])  # fmt: skip
def test_evaluation_does_not_depend_on_batches(make, teacher, rows, collator):
    """However rows are cut, packed and put together; but where they are cut, the student sees less than the teacher has."""
    found = []
    for batch_size in (1, 7, 64):
        arguments = {"per_device_eval_batch_size": batch_size}
        trainer = make("transformers", teacher, rows, arguments=arguments, loss="tail_bucket", text_weight=0.2)  # fmt: skip
        trainer.data_collator = LogitCollator.of(rows, **collator, number_rows=True)
        metrics = trainer.evaluate(rows.with_format("numpy"))
        keys = [k for k in metrics if "second" not in k and "time" not in k]
        found.append([metrics[key] for key in keys])
        assert ("split_long" in collator) == (metrics["eval_kl"] > 0.005)
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-4, atol=1e-6)


def trained(make, kind, model, rows, *, batch_size, accumulate, steps=1, **options):
    """A copy of the model after steps of plain gradient descent, and what was logged."""
    arguments = {
        **{"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulate},
        **{"max_steps": steps, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0},
        **{"lr_scheduler_type": "constant", "logging_steps": 1, **options.pop("arguments", {})},
    }
    model = copy.deepcopy(model)
    trainer = make(kind, model, rows, arguments=arguments, **options)
    trainer.train()
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("options", [{}, {"loss": "residual", "text_weight": 0.3}])
def test_gradients_accumulate_to_the_mean_over_all_positions(make, student, rows, kind, options):
    """Rows of different lengths, at once or one by one: the same step, and the same loss."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    assert max(lengths) > 2 * min(lengths)
    at_once, whole = trained(make, kind, student, rows, batch_size=6, accumulate=1, **options)
    in_parts, parts = trained(make, kind, student, rows, batch_size=1, accumulate=6, **options)
    assert parts == pytest.approx(whole, rel=1e-5)
    for name, before in student.named_parameters():
        moved = [dict(model.named_parameters())[name] - before for model in (at_once, in_parts)]
        assert moved[0].any()
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-6)


def test_a_step_is_that_of_the_loss_by_hand(make, student, rows):
    first = rows.select(range(6))
    model, _ = trained(
        make, "transformers", student, first, batch_size=6, accumulate=1, text_weight=0.3
    )
    batch = LogitCollator.of(rows)([*first.with_format("numpy")])
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    distillation_loss(logits, batch, loss="tail_draws", text_weight=0.3).backward()
    for name, before in student.named_parameters():
        moved = dict(model.named_parameters())[name] - before
        torch.testing.assert_close(moved, -0.1 * before.grad, rtol=1e-3, atol=1e-6)


RUN = """
import json, sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from logit_dataset.trainers import DistillationTrainer
data, student, output, size = sys.argv[1:]
rows = load_dataset(data, split="train")
trainer = DistillationTrainer(
    AutoModelForCausalLM.from_pretrained(student),
    TrainingArguments(output, per_device_train_batch_size=int(size), per_device_eval_batch_size=int(size),
        max_steps=3, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"),
    train_dataset=rows, eval_dataset=rows.select(range(11)), text_weight=0.2, loss="residual")
trainer.train()
found = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    open(output + "/found.json", "w").write(json.dumps([trainer.state.log_history, found]))
"""


def test_two_processes_learn_what_one_learns(student, drawn, tmp_path):
    """Losses, evaluation (eleven rows, of which batches for two do not come out even) and weights."""
    from transformers import AutoModelForCausalLM

    student.save_pretrained(tmp_path / "student")
    (tmp_path / "run.py").write_text(RUN)
    results = []
    for processes, size in ((1, 4), (2, 2)):
        output = tmp_path / f"with-{processes}"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = [tmp_path / "run.py", drawn, tmp_path / "student", output, size]
        done = subprocess.run(
            [sys.executable, *launch, *map(str, arguments)],
            **{"env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "timeout": 300},
            **{"capture_output": True, "text": True, "check": False},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        log, found = json.loads((output / "found.json").read_text())
        losses = [line["loss"] for line in log if "loss" in line]
        metrics = {name: value for name, value in found.items() if "second" not in name and "time" not in name}  # fmt: skip
        results.append((losses, metrics, AutoModelForCausalLM.from_pretrained(output)))
    (losses, metrics, one), (of_two, metrics_of_two, two) = results
    assert len(losses) == 3
    np.testing.assert_allclose(of_two, losses, rtol=0, atol=1e-5)
    assert metrics_of_two == pytest.approx(metrics, abs=1e-5)
    for name, values in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], values, rtol=0, atol=1e-5)


def test_a_run_goes_on_at_the_exact_next_batch(make, student, rows, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 5, "seed": 3}
    options = {"batch_size": 3, "accumulate": 2, "steps": 9}
    whole, losses = trained(make, "transformers", student, rows, **options, arguments=arguments)
    trainer = make(
        "transformers",
        copy.deepcopy(student),
        rows,
        arguments={
            **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 9},
            **{"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0},
            **{"lr_scheduler_type": "constant", "logging_steps": 1, **arguments},
        },
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "student" / "checkpoint-5"))
    again = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert again == pytest.approx(losses, rel=1e-6)
    for name, values in whole.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], values)


@needs("peft")
@pytest.mark.parametrize("kind", TRAINERS)
def test_adapters_learn_and_nothing_else_does(make, student, rows, tmp_path, kind):
    from peft import LoraConfig, PeftModel

    before = copy.deepcopy(student.state_dict())
    arguments = {"num_train_epochs": 3, "learning_rate": 2e-2, "activation_checkpointing": True}
    trainer = make(
        *(kind, student, rows),
        arguments=arguments,
        eval_dataset=rows,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.99 * first
    trainer.save_model(str(tmp_path / "adapter"))
    student = PeftModel.from_pretrained(copy.deepcopy(student), str(tmp_path / "adapter"))
    base = trainer.model.unload().state_dict()
    for name, values in before.items():
        assert torch.equal(base[name], values), name


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}]
)
def test_lower_precision_and_compiled_models_give_nearly_the_same(
    make, student, rows, kind, arguments
):
    _, plain = trained(make, kind, student, rows, batch_size=4, accumulate=1, steps=2)
    _, other = trained(make, kind, student, rows, batch_size=4, accumulate=1, steps=2, arguments=arguments)  # fmt: skip
    assert other == pytest.approx(plain, rel=1e-2 if "bf16" in arguments else 1e-5)


def test_packed_sequences_do_not_see_each_other(make, student, rows, tmp_path):
    apart, _ = trained(make, "transformers", student, rows.select(range(4)), batch_size=4, accumulate=1)  # fmt: skip
    collator = LogitCollator.of(rows, packed=True)
    model = copy.deepcopy(student)
    trainer = DistillationTrainer(
        model,
        TrainingArguments(
            str(tmp_path),
            **{"max_steps": 1, "per_device_train_batch_size": 4, "optim": "sgd"},
            **{"learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
            **QUIET,
        ),
        collator,
        rows.select(range(4)),
    )
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 1
    trainer.train()
    for name, values in apart.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], values, rtol=1e-4, atol=1e-6)


def test_what_would_let_packed_sequences_see_each_other_is_refused(make, student, rows):
    trainer = make("transformers", student, rows)
    trainer.data_collator = LogitCollator.of(rows, packed=True, length=100, number_rows=True)
    student.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="keeps packed sequences apart in batches of one row only"):
        trainer.evaluate(rows.with_format("numpy"))

    class Simple(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Embedding(TINY_VOCAB_SIZE, TINY_VOCAB_SIZE)

        def forward(self, input_ids):
            return self.weight(input_ids)

    trainer = make("transformers", Simple(), rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_kl"] > 0.01  # any module from ids to logits
    trainer.data_collator = LogitCollator.of(rows, packed=True, length=100, number_rows=True)
    with pytest.raises(ValueError, match="takes no position_ids"):
        trainer.evaluate()


def test_a_small_vocabulary(make, rows, drawn):
    from transformers import LlamaConfig, LlamaForCausalLM

    projection = FrequentTokens.of(load_logits(drawn), 60)
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    arguments = {"num_train_epochs": 3, "learning_rate": 1e-2}
    trainer = make("transformers", LlamaForCausalLM(config), rows, arguments=arguments, eval_dataset=rows, projection=projection)  # fmt: skip
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert 0 < trainer.evaluate()["eval_kl"] < 0.8 * before


def test_a_mixture_of_experts_is_balanced(make, rows):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        **{"vocab_size": TINY_VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"num_local_experts": 4, "output_router_logits": True},
    )
    model, losses = MixtralForCausalLM(config), []
    for coefficient in (0.0, 10.0):
        model.config.router_aux_loss_coef = coefficient
        for batch_size, accumulate in ((6, 1), (3, 2)):
            losses += trained(make, "transformers", model, rows, batch_size=batch_size, accumulate=accumulate)[1]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (
        losses[2] - losses[0] > 10
    )  # at least 1 if experts are balanced, times 10; with two per token, 2
    assert losses[3] == pytest.approx(losses[2], rel=0.02)


def test_streamed_rows(make, student, drawn, tmp_path, rows):
    stream = load_dataset(str(drawn), split="train", streaming=True, cache_dir=str(tmp_path))
    _, losses = trained(make, "transformers", student, stream, batch_size=4, accumulate=2, steps=2)
    _, expected = trained(make, "transformers", student, rows, batch_size=4, accumulate=2, steps=2, arguments={"train_sampling_strategy": "sequential"})  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_would_be_lost_without_a_word_is_refused(make, student, rows, drawn, kind):
    with pytest.raises(ValueError, match="train_dataset holds ready batches"):
        make(kind, student, load_logits(drawn).batches(batch_size=2))
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1"):
        make(kind, student, rows, arguments={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="compute_loss_func would be of no effect"):
        make(kind, student, rows, compute_loss_func=max)
    trainer = make(kind, student, rows.remove_columns(["tail_logprob"]), arguments={"max_steps": 1})
    with pytest.raises(ValueError, match="the rows have no tail_logprob"):
        trainer.train()


@needs("trl")
@pytest.mark.parametrize("name", ["packing", "padding_free", "assistant_only_loss"])
def test_what_trl_does_to_texts_is_refused(make, student, rows, name):
    with pytest.raises(ValueError, match=f"{name} would lose the distributions"):
        make("trl", student, rows, arguments={name: True})


@needs("trl")
def test_trl_wants_its_own_arguments(student, rows):
    from logit_dataset.trainers import DistillationSFTTrainer

    with pytest.raises(ValueError, match=r"args is TrainingArguments, expected a trl\.SFTConfig"):
        DistillationSFTTrainer(student, TrainingArguments("out", **QUIET), None, rows)


def test_loaders_that_lose_batches_are_refused(drawn):
    batches = load_logits(drawn).batches(batch_size=2, seed=None)
    expected = len(list(batches))
    thinned = DataLoader(batches, batch_size=3, collate_fn=lambda several: several[0])
    with pytest.raises(ValueError, match="batch_size=3 would collate several of them into one"):
        list(thinned)
    for loader in (DataLoader(batches, batch_size=None), DataLoader(batches, 1, collate_fn=lambda one: one[0])):  # fmt: skip
        assert len(list(loader)) == expected


@pytest.mark.parametrize("dispatch", [True, False])
def test_accelerate_does_not_divide_batches(drawn, dispatch, monkeypatch):
    """In one process that has been told of a second."""
    from accelerate.data_loader import prepare_data_loader

    batches = load_logits(drawn).batches(batch_size=2)
    loader = DataLoader(batches, batch_size=1, collate_fn=lambda one: one[0])
    options = {"put_on_device": dispatch, "device": torch.device("cpu")}
    prepared = prepare_data_loader(loader, num_processes=2, process_index=0, dispatch_batches=dispatch, **options)  # fmt: skip
    if dispatch:  # it asks the state itself
        monkeypatch.setattr(prepared.state, "num_processes", 2)
    with pytest.raises(
        ValueError, match="accelerate would divide the batches of one process among 2"
    ):
        next(iter(prepared))
    monkeypatch.undo()
    alone = prepare_data_loader(loader, num_processes=1, process_index=0, **options)
    assert len(list(itertools.islice(alone, 3))) == 3


def test_trainers_are_imported_only_when_asked_for():
    code = "import sys, logit_dataset.trainers as t; dir(t); assert not {'transformers', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
