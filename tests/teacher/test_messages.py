"""What is said of directories that are no teacher: the true reason, in a line of the command, with what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"


def weights(directory):
    return load_file(directory / "model.safetensors")


def write(directory, tensors, name="model.safetensors"):
    save_file(tensors, directory / name, metadata={"format": "pt"})


def configure(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sentencepiece(d):
    (d / "tokenizer.json").unlink()
    (d / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (d / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def no_index(d):
    tensors = weights(d)
    (d / "model.safetensors").unlink()
    for name, part in ((FIRST, sorted(tensors)[:4]), (SECOND, sorted(tensors)[4:])):
        write(d, {key: tensors[key] for key in part}, name)
    return tensors


def missing_shard(d):
    names = sorted(no_index(d))
    index = {name: FIRST if i < 4 else SECOND for i, name in enumerate(names)}
    (d / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (d / SECOND).unlink()


def pickled(d):
    torch.save(weights(d), d / "pytorch_model.bin")
    (d / "model.safetensors").unlink()


DAMAGE = {
    "only tokenizer.model": (sentencepiece, "it has no tokenizer.json, and other vocabulary files are not read; save it with save_pretrained of a fast"),
    "shards without an index": (no_index, f"it has {FIRST}, but neither model.safetensors nor {INDEX}"),
    "a missing shard": (missing_shard, f"it lacks {SECOND}, which {INDEX} names; download it"),
    "an adapter that is not named as one": (
        lambda d: (d / "model.safetensors").rename(d / "adapter_model.safetensors"),
        "it has adapter_model.safetensors, which is an adapter's, and no model.safetensors; merge it into the model",
    ),
    "an adapter under a model's name": (
        lambda d: write(d, {LORA: torch.ones(4, 32)}),
        f"the checkpoint has {LORA}, which is an adapter's; merge it into its model, and name the result",
    ),
    "an adapter in a model": (
        lambda d: write(d, {**weights(d), LORA: torch.ones(4, 32)}),
        f"the checkpoint has {LORA}, which is an adapter's; merge it",
    ),
    "BitNet without scales": (
        lambda d: configure(d, quantization_config=BITNET),
        "config.json says that its weights are quantised by bitnet, but the checkpoint has no model.layers.0.mlp.down_proj.weight_scale and",
    ),
    "pickled weights": (pickled, "it has no model.safetensors, and other formats are not read because pickle files can run code"),
    "half a config.json": (lambda d: (d / "config.json").write_text("{"), "its config.json is not valid ("),
    "a value of another type": (lambda d: configure(d, num_attention_heads="four"), "its config.json is not valid (Validation error for field 'num_attention_heads'"),
    "a value that cannot be": (lambda d: configure(d, num_attention_heads=0), "it cannot be loaded from its files (ZeroDivisionError:"),
    "a damaged tokenizer.json": (lambda d: (d / "tokenizer.json").write_text("no"), "one of its JSON files is not valid (Expecting value"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["mine", "teacher"])
def test_a_directory_that_is_no_teacher_is_said_in_a_line(
    tiny_teacher_dir, make_recipe, cli, tmp_path, name, damage
):
    directory = shutil.copytree(tiny_teacher_dir, tmp_path / name)
    change, message = DAMAGE[damage]
    change(directory)
    recipe = make_recipe(teacher=directory)
    status, _, said = cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 1
    (line,) = said.strip().splitlines()
    assert line.startswith(f"error: {'teacher mine' if name == 'mine' else 'teacher'}: {message}")
    assert str(tmp_path) not in line
    assert "not expected" not in line


def test_what_fails_inside_the_probe_is_said_in_a_line(
    tiny_teacher_dir, make_recipe, cli, tmp_path, monkeypatch
):
    from transformers import LlamaForCausalLM

    def forward(self, input_ids=None, **_):
        raise KeyError("attention_sinks")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    status, _, said = cli("build", make_recipe(), "--output", tmp_path / "out", "--device", "cpu")
    assert status == 1
    assert said.startswith(
        "error: teacher tiny: LlamaForCausalLM does not run on text alone (KeyError: 'attention_sinks'); "
    )
    assert len(said.strip().splitlines()) == 1


def test_a_head_that_fails_alone_leaves_the_whole_model(tiny_teacher_dir, monkeypatch):
    from builder.teacher import model
    from builder.teacher.loading import load_teacher

    def fails(_):
        raise ValueError("no such body")

    monkeypatch.setattr(model, "body_of", fails)
    assert load_teacher(str(tiny_teacher_dir)).head_only is False
