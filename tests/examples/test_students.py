"""The two training programs run as they are, and their students learn; a small vocabulary suffices for a teacher of 49,152."""

import ast
import copy
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from builder.capture.distribution import capture
from builder.corpus.sequences import Sequence
from builder.dataset.shards import Block, ShardWriter, atomic_file
from logit_dataset import load_logits
from logit_dataset.schema import SCHEMA_VERSION, Layout
from tests.conftest import REPOSITORY, refit


def example(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["train_plain", "train_trainer"])
def test_examples_are_programs_of_their_own(name):
    tree = ast.parse((REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module.split(".")[0] in ("builder", "logit_dataset")
    }
    assert ours == {"logit_dataset"}


@pytest.mark.parametrize("kind", ["tail_bucket", "residual"])
def test_a_plain_student_learns(built, kind):
    losses = example("train_plain").main(
        [str(built), "--loss", kind, "--steps", "40", "--length", "64", "--vocabulary", "300"]
    )
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_plain_student_goes_on_where_it_was_stopped(built, tmp_path, monkeypatch):
    module, optimizer = example("train_plain"), torch.optim.AdamW
    options = [str(built), "--length", "64", "--vocabulary", "100", "--steps"]
    whole = module.main([*options, "10"])
    options = ["--every", "4", "--checkpoint", str(tmp_path / "student.pt"), *options]

    class Stopped(optimizer):
        steps = 0

        def step(self, *arguments):
            super().step(*arguments)
            Stopped.steps += 1
            if Stopped.steps == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr("torch.optim.AdamW", Stopped)
    with pytest.raises(KeyboardInterrupt):
        module.main([*options, "10"])
    monkeypatch.undo()
    rest = module.main([*options, "2"]) + module.main([*options, "4"])
    np.testing.assert_allclose(rest, whole[4:], rtol=1e-5)


def test_a_student_of_the_trainer_learns_and_is_saved(built, tmp_path):
    from transformers import AutoModelForCausalLM

    losses = example("train_trainer").main(
        [str(built), str(tmp_path), "--steps", "40", "--length", "64", "--width", "32"]
    )
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 448


@pytest.fixture
def student(tiny_model):
    """Of the teacher's size, and ignorant."""
    model = copy.deepcopy(tiny_model).requires_grad_(True)  # as a teacher, it is frozen
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def trained(built, output, model, *, batch_size, accumulate, steps):
    """A copy of the model after steps of plain gradient descent, unpacked; and the lengths of what each call of the loss was about."""
    from transformers import TrainingArguments

    calls = []

    class Counting(example("train_trainer").DistillationTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            calls.append(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, *arguments, **options)

    options = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        gradient_accumulation_steps=accumulate,
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"},
        **{"max_grad_norm": 0, "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    )
    model = copy.deepcopy(model)
    trainer = Counting(
        model=model,
        args=options,
        batches=load_logits(built).batches(batch_size=batch_size),
        loss="tail_bucket",
        text_weight=0.0,
    )
    trainer.train()
    return model, calls


def test_gradients_accumulate_to_the_mean_over_all_positions(built, student, tmp_path):
    """Rows of different lengths, at once or one by one: the same step."""
    at_once, _ = trained(built, tmp_path, student, batch_size=4, accumulate=1, steps=1)
    in_parts, lengths = trained(built, tmp_path, student, batch_size=1, accumulate=4, steps=1)
    assert max(lengths) > 2 * min(lengths)
    for name, before in student.named_parameters():
        moved = [dict(model.named_parameters())[name] - before for model in (at_once, in_parts)]
        assert moved[0].any()
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-6)


def test_no_step_of_the_trainer_is_cut_short_by_the_end_of_an_epoch(built, student, tmp_path):
    num_batches = len(list(load_logits(built).batches(batch_size=16)))
    assert num_batches % 2 == 1
    _, calls = trained(built, tmp_path, student, batch_size=16, accumulate=2, steps=4)
    assert len(calls) == 8 > 2 * num_batches


def test_a_run_of_the_trainer_goes_on_at_the_exact_next_batch(built, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    module, seen = example("train_trainer"), []
    loss = module.DistillationTrainer.compute_loss

    def compute_loss(self, model, inputs, *arguments, **options):
        seen.append(inputs["input_ids"])
        return loss(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(module.DistillationTrainer, "compute_loss", compute_loss)
    sizes = ["--length", "64", "--width", "16"]
    options = [str(built), str(tmp_path), *sizes, "--steps", "7", "--accumulate", "2"]
    losses = module.main([*options, "--save-every", "5"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole_seen = [seen.pop(0) for _ in range(len(seen))]
    assert len(whole_seen) == 14
    shutil.rmtree(tmp_path / "checkpoint-7")
    assert module.main([*options, "--resume"]) == losses
    assert len(seen) == 4
    assert all(map(torch.equal, seen, whole_seen[10:]))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, values in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], values)


def write_synthetic(directory, *, num_tokens, vocab_size, top_k, row_length=256, spread=4.0):
    """A dataset of random rows without a teacher: a few hundred ids make up the text, as in a real one."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(vocab_size, (400,), generator=generator)
    logits_NV = spread * torch.randn(64, vocab_size, generator=generator)
    logits_NV[:, common] += spread
    lengths = [row_length] * (num_tokens // row_length)
    ids_N = common[torch.randint(400, (sum(lengths),), generator=generator)]
    captured = capture([logits_NV], torch.zeros(64, dtype=torch.long), top_k=top_k)
    picked_N = ids_N % 64  # the distribution depends on the last token: something to learn
    distribution = {name: column[picked_N] for name, column in captured.items()}
    sequences = [
        Sequence(document_id=f"d{i}", chunk_index=0, text="", token_ids=ids.tolist(), next_token=2)
        for i, ids in enumerate(ids_N.split(row_length))
    ]
    (directory / "data").mkdir(parents=True)
    file, fingerprint = "data/train-000-00000.parquet", "synthetic"
    metadata = {"logit_dataset.row_fingerprint": fingerprint}
    with (
        atomic_file(directory / file) as sink,
        ShardWriter(
            sink, layout=Layout(top_k=top_k), profile="default", metadata=metadata
        ) as writer,
    ):
        writer.write(Block(sequences=sequences, distribution=distribution))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "row_fingerprint": fingerprint,
        "recipe": {
            "corpus": {},
            "sequences": {"max_length": row_length, "long_documents": "chunk"},
            "output": {"text": True, "top_k": top_k},
        },
        "teacher": {
            **{"name": "synthetic", "sha256": "0", "vocab_size": vocab_size},
            **{"tokenizer_sha256": "0", "eos_token_id": 2, "prefix_ids": [], "suffix_ids": []},
        },
        "shards": [{"file": file}],
        "totals": {},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    refit(directory)


def test_under_a_million_parameters_learn_from_a_vocabulary_of_49152(tmp_path, capsys):
    write_synthetic(tmp_path / "big", num_tokens=2_048, vocab_size=49_152, top_k=50)
    losses = example("train_plain").main([str(tmp_path / "big"), "--steps", "12"])
    assert "752,928 parameters" in capsys.readouterr().out
    assert losses[-1] < 0.7 * losses[0]
