"""Our export in DistillKit's own program, by the configuration of the README beside it. Run by `make test-trainers`, in its environment."""

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from distillkit import main
from distillkit.configuration import DistillationRunConfig
from distillkit.trainer import DistillationTrainer
from transformers import AutoModelForCausalLM

IN = Path(os.environ["TRAINER_EXPORTS"])


def configuration(export, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)[1]
    values = yaml.safe_load(text)
    values["dataset"]["train_dataset"]["repo_id"] = str(export)
    return values | {
        "model": str(IN / "teacher"),
        "output_path": str(tmp_path / "student"),
        "training_args": values["training_args"]
        | {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.0}
        | {"report_to": [], "bf16": False, "use_cpu": True, "save_strategy": "no"},
    }


def losses(config, monkeypatch):
    """What it reports of its loss while it trains."""
    found = []

    def log(self, values, *_, **__):
        found.extend(value for name, value in values.items() if name.startswith("distillation_loss"))  # fmt: skip

    monkeypatch.setattr(DistillationTrainer, "log", log)
    main.do_distill(DistillationRunConfig.model_validate(config))
    assert len(found) == 3
    return torch.tensor(found)


@pytest.mark.parametrize("tail", ["bucket", "draws"])
def test_the_teacher_has_nothing_to_learn_and_one_position_off_much(tail, tmp_path, monkeypatch, capsys):  # fmt: skip
    export = IN / f"distillkit-{tail}"
    config = configuration(export, tmp_path)
    aligned = losses(config, monkeypatch)
    shifted_path = tmp_path / "shifted"
    rows = load_dataset(str(export), split="train")

    def shift(row):
        return {name: row[name][-1:] + row[name][:-1] for name in ("token_ids", "top_values")}

    shifted_path.mkdir()
    rows.map(shift, features=rows.features).to_parquet(shifted_path / "train.parquet")
    config["dataset"]["train_dataset"]["repo_id"] = str(shifted_path)
    shifted = losses(config, monkeypatch)
    with capsys.disabled():
        print(f"\nDistillKit {version('distillkit')}, tail {tail}: loss {aligned.mean():.6f}, one position off {shifted.mean():.2f}")  # fmt: skip
    if tail == "bucket":
        assert aligned.abs().max() < 0.005
    assert (shifted - aligned).min() > 1


def test_with_draws_the_tail_is_pushed_nowhere(tmp_path, capsys):
    gradients = {}
    teacher = AutoModelForCausalLM.from_pretrained(IN / "teacher", dtype=torch.float32)
    for tail, missing in (("bucket", "zero"), ("draws", "zero")):
        export = IN / f"distillkit-{tail}"
        config = configuration(export, tmp_path)
        config["loss_functions"][0]["missing_probability_handling"] = missing
        config = DistillationRunConfig.model_validate(config)
        batch = main.collate_packed_batch(
            list(load_dataset(str(export), split="train").select(range(4)))
        )
        size = teacher.config.vocab_size
        signal = main.create_signal_source(config, size).get_signal(batch)
        loss_function = DistillationTrainer.__init__.__globals__["create_loss_func"](
            config.loss_functions[0]
        )
        with torch.no_grad():
            outputs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        outputs.logits = outputs.logits.clone().requires_grad_()
        mask = (batch["labels"] >= 0)[..., None]
        loss_function(outputs, signal, mask=mask).backward()
        outside = torch.ones_like(outputs.logits).scatter_(2, signal.sparse_ids[..., :64], 0)
        gradients[tail] = float((outputs.logits.grad * outside).sum())
    with capsys.disabled():
        print(f"\nDistillKit, gradient on the tail: {gradients['bucket']:+.3f} with the top 64 alone, {gradients['draws']:+.4f} with draws")  # fmt: skip
    assert gradients["bucket"] > 0.02
    assert abs(gradients["draws"]) < 0.002
