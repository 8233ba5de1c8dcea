"""The training programs run as they are, and their students learn; a small vocabulary suffices for a teacher of 49,152."""

import ast
import copy
import importlib.util
import json
import re
import runpy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from builder.capture.distribution import capture
from builder.corpus.sequences import Sequence
from builder.dataset.shards import Block, ShardWriter, atomic_file
from logit_dataset import distillation_loss, load_logits
from logit_dataset.schema import SCHEMA_VERSION, Layout
from tests.conftest import REPOSITORY, refit


def example(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRAINERS = ["train_trainer", "train_trl", "train_lightning"]


@pytest.mark.parametrize("name", ["train_plain", *TRAINERS])
def test_examples_are_programs_of_their_own(name):
    tree = ast.parse((REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module.split(".")[0] in ("builder", "logit_dataset")
    }
    assert "logit_dataset" in ours <= {"logit_dataset", "logit_dataset.trainers"}


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


@pytest.fixture
def run(monkeypatch):
    """A program as `python examples/….py …` runs it: what it has defined at its end."""

    def done(name, *arguments):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        return runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"))

    return done


@pytest.fixture
def student_dir(tiny_model, tiny_tokenizer, tmp_path):
    """Of the teacher's size, and ignorant."""
    model = copy.deepcopy(tiny_model).requires_grad_(True)  # as a teacher, it is frozen
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    for each in (model, tiny_tokenizer):
        each.save_pretrained(tmp_path / "ignorant")
    return tmp_path / "ignorant"


@pytest.mark.parametrize("name", TRAINERS)
def test_programs_with_trainers_are_short_and_know_no_shapes(name):
    tree = ast.parse((REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8"))
    text = ast.unparse(tree.body[1:])
    lines = (REPOSITORY / "examples" / f"{name}.py").read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 25
    assert not re.search(r"shape|view|squeeze|pad|flatten|cat\b|stack|shift|\[:,|-100", text)


def test_a_student_of_the_trainer_learns_and_is_saved(run, built, tmp_path):
    log = run("train_trainer", built, tmp_path)["trainer"].state.log_history
    found = [line for line in log if "eval_kl" in line]
    assert found[-1]["eval_kl"] < found[0]["eval_kl"]
    assert found[-1]["eval_entropy_correlation"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 448


@torch.no_grad()
def distance(model, dataset):
    """Of a student to its teacher, with any batch size."""
    batches = load_logits(dataset).batches(batch_size=8)
    return sum(distillation_loss(model(b["input_ids"]).logits, b) for b in batches)


def test_a_student_of_trl_learns_by_adapters(run, built, student_dir, tmp_path):
    for package in ("trl", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra dev has it)")
    from peft import PeftModel

    trainer = run("train_trl", built, student_dir, tmp_path / "out")["trainer"]
    first, last = (AutoModelForCausalLM.from_pretrained(student_dir) for _ in range(2))
    last = PeftModel.from_pretrained(last, str(tmp_path / "out"))
    assert trainer.state.global_step > 5
    assert distance(last, built) < 0.99 * distance(first, built)


def test_a_student_of_lightning_learns(run, built, student_dir, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed (the extra dev has it)")
    run("train_lightning", built, student_dir, tmp_path / "out")
    first, last = map(AutoModelForCausalLM.from_pretrained, (student_dir, tmp_path / "out"))
    assert distance(last, built) < 0.99 * distance(first, built)


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
