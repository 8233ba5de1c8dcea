"""What arrives of a checkpoint is the model that was trained, or the teacher is refused in one line.

Each checkpoint is saved with `save_pretrained`, changed in its files in one way, and loaded by `load_teacher` with its defaults.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from builder.recipe.file import load_recipe
from builder.sources.known import KnownSources
from builder.sources.resolve import resolve_teacher
from builder.teacher.loading import load_teacher
from tests.conftest import REPOSITORY, run_cli
from tests.teacher.conftest import Weights
from tests.teacher.test_model import (
    GROUPED,
    make_model,
    random_sequences,
    randomize,
    whole_model_logits,
)

Q = "model.layers.0.self_attn.q_proj.weight"
FLOAT8 = torch.float8_e4m3fn


def assert_refused(directory: Path, pattern: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load_teacher(str(directory), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert message.startswith(f"teacher {directory.name}: ")
    assert str(directory.parent) not in message


def assert_right(directory: Path, model: Any) -> None:
    teacher = load_teacher(str(directory))
    sequences = random_sequences()
    found = torch.cat(list(teacher.logits(sequences))).double()
    expected = torch.cat([whole_model_logits(model, ids) for ids in sequences])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "quantisation" not in teacher.provenance()
    assert teacher.provenance()["parameters"] == sum(p.numel() for p in model.parameters())


# Weights that need scales


def as_float8(scale: str | None) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [n for n in weights if "proj" in n]:
            weights[name] = weights[name].to(FLOAT8)
            if scale:
                weights[name.replace("weight", scale)] = torch.ones(())

    return change


def as_int8(weights: Weights) -> None:
    for name in [n for n in weights if "proj" in n]:
        rows = weights[name].abs().amax(1)
        weights[name.replace("weight", "weight_scale")] = rows / 127
        weights[name] = (weights[name] / rows[:, None] * 127).to(torch.int8)


def as_packed(weights: Weights) -> None:
    for name in [n for n in weights if "proj" in n]:
        weights[name] = torch.zeros(weights[name].shape, dtype=torch.uint8)


PACKED = {
    "modelopt": (
        as_float8("weight_scale"),
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        r"quantised by modelopt, .* did not unpack \(model\S+ is stored as F8_E4M3\); use the unquantised",
    ),
    "static float8": (as_float8("input_scale"), None, r"by no method that config\.json names.*F8_E4M3"),
    "lost config": (as_float8(None), None, r"by no method that config\.json names.* F8_E4M3"),
    "int8": (as_int8, None, r"by no method .* stored as I8"),
    "uint8": (as_packed, None, r"by no method .* stored as U8"),
    "scales alone": (
        lambda weights: weights.update({Q.replace("weight", "weight_scale"): torch.ones(1)}),
        None,
        r"has no place for model\.layers\.0\.self_attn\.q_proj\.weight_scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_packed_weights_that_nobody_unpacked_are_refused(write, case):
    weights, config, message = PACKED[case]
    assert_refused(write(make_model("llama"), weights, config), message)


# Weights without a place


def extra(**tensors: Tensor) -> Callable[[Weights], None]:
    return lambda weights: weights.update(tensors)


def biases(weights: Weights) -> None:
    for name in [n for n in weights if "self_attn" in n]:
        weights[name.replace("weight", "bias")] = torch.ones(len(weights[name]))


HOMELESS = {
    "biases": (biases, None, r"self_attn\.k_proj\.bias and 7 more, .* LlamaForCausalLM .* correct config"),
    "norms of heads": (
        extra(**{"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        None,
        r"self_attn\.q_norm\.weight, which LlamaForCausalLM .* does not use",
    ),
    "further layers": (None, {"num_hidden_layers": 1}, r"num_hidden_layers = 1: correct that"),
    "an adapter in it": (
        extra(**{"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)}),
        None,
        r"lora_A.* adapter's; merge it into its model",
    ),
    "a classifier": (
        extra(**{"score.weight": torch.ones(2, 32)}),
        None,
        r"has score\.weight, which",
    ),
    "a bias that is named like a mask": (
        extra(**{"model.layers.0.self_attn.bias": torch.ones(32)}),
        None,
        r"self_attn\.bias, which",
    ),
    "a layer that is no head of further tokens": (
        extra(**{"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}),
        None,
        r"model\.layers\.2\.mlp\.up_proj\.weight, .* num_hidden_layers = 2",
    ),
}  # fmt: skip


def test_a_model_of_more_layers_than_its_checkpoint_is_refused(write):
    directory = write(make_model("llama"), config={"num_hidden_layers": 3})
    assert_refused(directory, r"has no model\.layers\.2\.\S+ and \d+ more, .* random numbers")


@pytest.mark.parametrize("change", ["fewer in config", "one is missing"])
def test_experts_that_do_not_arrive_are_refused(write, change):
    def without_one(weights: Weights) -> None:
        (name,) = [n for n in weights if ".0." in n and n.endswith("experts.1.w1.weight")]
        del weights[name]

    is_fewer = change == "fewer in config"
    directory = write(
        make_model("mixtral"),
        None if is_fewer else without_one,
        {"num_local_experts": 3} if is_fewer else None,
    )
    assert_refused(directory, "its weights have other shapes than its config")


@pytest.mark.parametrize("case", HOMELESS)
def test_weights_that_have_no_place_are_refused(write, case):
    weights, config, message = HOMELESS[case]
    assert_refused(write(make_model("llama"), weights, config), message)


def test_a_decoder_without_its_encoder_is_refused(write):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **{"vocab_size": 448, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 16},
        **{"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0},
        **{"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0},
        **{"suppress_tokens": None, "begin_suppress_tokens": None},
    )
    model = WhisperForConditionalGeneration(config)
    assert_refused(write(model), r"model\.encoder\.\S+ and \d+ more, .* use a decoder-only model")


def masks(weights: Weights) -> None:
    for layer in range(2):
        stem = f"transformer.h.{layer}.attn."
        weights[f"{stem}bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril()
        weights[f"{stem}masked_bias"] = torch.tensor(-1e4)


def frequencies(dtype: torch.dtype) -> Callable[[Weights], None]:
    value = (10_000.0 ** (-torch.arange(0, 8, 2) / 8)).to(dtype)
    return extra(
        **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": value.clone() for i in range(2)}
    )


HARMLESS = {
    "masks": ("gpt2", masks),
    "frequencies": ("llama", frequencies(torch.float32)),
    "rounded frequencies": ("llama", frequencies(torch.float16)),
    "positions": ("llama", extra(**{"model.position_ids": torch.arange(128)[None]})),
    "a head of further tokens": ("llama", extra(**{"mtp.fc.weight": torch.ones(32, 64)})),
    "a layer of further tokens": (
        "llama",
        extra(
            **{
                "model.layers.2.eh_proj.weight": torch.ones(32, 64),
                "model.layers.2.mlp.up_proj.weight": torch.ones(64, 32),
            }
        ),
    ),
    "a head of values": ("llama", extra(**{"v_head.summary.weight": torch.ones(1, 32)})),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_no_logit_is_left_out(write, case):
    family, weights = HARMLESS[case]
    model = make_model(family)
    assert_right(write(model, weights), model)


# config.json and the checkpoint contradict each other


def test_a_head_of_its_own_is_not_shared(write):
    directory = write(make_model("llama"), config={"tie_word_embeddings": True})
    assert_refused(
        directory,
        r"lm_head\.weight to model\.embed_tokens\.weight .* has a different lm_head\.weight; set",
    )


def test_a_head_that_is_the_same_is_shared(write):
    model = make_model("llama", tie_word_embeddings=True)
    copied = lambda weights: weights.update(  # noqa: E731
        {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    )
    assert_right(write(model, copied), model)


def test_a_head_that_is_not_shared_is_missing(write):
    directory = write(
        make_model("llama", tie_word_embeddings=True), config={"tie_word_embeddings": False}
    )
    assert_refused(directory, r"no lm_head\.weight, .* random numbers")


ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
LINEAR = {"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}
ROPES = {
    "unknown type": ("llama", {"rope_type": "spiral", "factor": 2.0}, r"config\.json cannot be read .*spiral"),
    "lacks a key": ("llama", {"rope_type": "yarn"}, r"config\.json cannot be read .*factor"),
    "unknown key": (
        "llama",
        {"rope_type": "linear", "factor": 2.0, "attn_temperature": 0.5},
        r"hold attn_temperature, which LlamaForCausalLM does not use with the type 'linear'",
    ),
    "scaled, but of no type": ("llama", {"factor": 8.0}, r"hold factor, which .* type 'default'"),
    "of a model without": ("gpt2", {"rope_type": "linear", "factor": 2.0}, r"'linear', which GPT2LMHead"),
    "of one with fixed positions": (
        "gptj", {"rope_type": "linear", "factor": 2.0}, r"'linear', which GPTJForCausalLM does not have"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_positions_that_config_asks_for_are_not_ignored(write, case):
    family, rope, message = ROPES[case]
    if family == "gptj":
        config = AutoConfig.for_model(
            "gptj", vocab_size=448, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64
        )
        model = randomize(AutoModelForCausalLM.from_config(config))
    else:
        model = make_model(family)
    assert_refused(write(model, config={"rope_scaling": rope, "rope_parameters": None}), message)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "linear", "factor": 2.0}),
        ("llama", {"type": "dynamic", "factor": 2.0, "finetuned": True}),
        ("llama", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "truncate": False}),
        ("qwen3", {"type": "default"}),
        ("gemma3_text", {"full_attention": LINEAR, "sliding_attention": ROPE}),
    ],
)
def test_positions_that_the_model_knows_are_taken(write, family, rope):
    known = {k: v for k, v in rope.items() if k != "finetuned"}
    if "full_attention" not in known:  # of which two layers of Gemma 3 have none
        known = {**ROPE, **known, "rope_type": known.pop("type", known.get("rope_type"))}
    model = make_model(family, rope_parameters=known)
    assert_right(write(model, config={"rope_scaling": rope, "rope_parameters": None}), model)


def test_frequencies_that_are_not_those_of_config_are_refused(write):
    stored = extra(
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": 500_000.0
            ** (-torch.arange(0, 8, 2) / 8)
        }
    )
    assert_refused(
        write(make_model("llama"), stored), r"inv_freq .* does not match rope_theta in config\.json"
    )


# Values


def test_values_beyond_float16_are_refused_and_work_in_bfloat16(write):
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] = 1e5
    directory = write(model)
    assert_refused(
        directory,
        r"mlp\.down_proj\.weight .* range of float16; use .* \"bfloat16\"",
        dtype="float16",
    )
    assert load_teacher(str(directory), dtype="bfloat16").dtype == torch.bfloat16
    assert_right(directory, model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_no_numbers_are_refused(write, value):
    model = make_model("llama")
    model.model.embed_tokens.weight.data[447, 3] = value  # of a token that no probe may meet
    assert_refused(write(model), r"embed_tokens\.weight holds NaN or infinite values; download")


def test_a_bias_may_rule_out_tokens(write):
    model = make_model("phi")
    model.lm_head.bias.data[400:] = -torch.inf
    assert load_teacher(str(write(model))).head_only


def test_a_file_that_was_not_written_to_the_end_is_refused(write):
    model = make_model("llama", hidden_size=256, head_dim=64, intermediate_size=256)
    zeros = lambda weights: weights["model.layers.1.mlp.up_proj.weight"].zero_()  # noqa: E731
    assert_refused(write(model, zeros), r"layers\.1\.mlp\.up_proj\.weight is all zeros")


# Files


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "t_base",
    "r": 4,
    "task_type": "CAUSAL_LM",
}


def pretend_peft(directory: Path, *, asked: Path) -> Path:
    """A package that can be found as peft, and leaves a trace when it is imported."""
    (directory / "peft").mkdir(parents=True)
    (directory / "peft" / "__init__.py").write_text(
        f"import pathlib\npathlib.Path({str(asked)!r}).touch()\n__version__ = '0.99.0'\n"
    )
    (directory / "peft-0.99.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: peft\nVersion: 0.99.0\n"
    (directory / "peft-0.99.0.dist-info" / "METADATA").write_text(metadata)
    return directory


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_refused_though_peft_could_load_it(write, tmp_path, make_recipe, has_model):
    directory = write(make_model("llama"))
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if not has_model:
        (directory / "config.json").unlink()
        (directory / "model.safetensors").unlink()
    packages = pretend_peft(tmp_path / "packages", asked=tmp_path / "asked")
    done = run_cli(
        *("build", make_recipe(teacher=directory), "--output", tmp_path / "out"),
        PYTHONPATH=f"{packages}:{REPOSITORY}",
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: teacher tiny: its adapter_config.json makes it an adapter")
    assert (
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("t_base"), "ADAPTER")'
        in line
    )
    assert '.merge_and_unload().save_pretrained("merged")' in line
    assert ("remove adapter_config.json" in line) is has_model
    assert not (tmp_path / "asked").exists()
    assert not list((tmp_path / "out").glob("data/*"))


def test_an_adapter_in_a_directory_is_refused_before_its_files_are_hashed(write, make_recipe):
    directory = write(make_model("llama"))
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    recipe, known = load_recipe(make_recipe(teacher=directory)), KnownSources()
    with pytest.raises(ValueError, match="makes it an adapter"):
        resolve_teacher(recipe.teacher, directory, known)
    assert not known.hashes


def test_an_adapter_on_the_hub_is_refused(write, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(write(make_model("llama")), snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    missing = (
        cache / "models--org--tiny" / ".no_exist" / commit
    )  # what the Hub was asked for in vain
    missing.mkdir(parents=True)
    for name in (
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "chat_template.jinja",
        "adapter_config.json",
    ):
        if not (snapshot / name).exists():
            (missing / name).touch()
    assert load_teacher("org/tiny", commit=commit).head_only
    (missing / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    with pytest.raises(
        ValueError, match=r'teacher org/tiny: .* adapter.*from_pretrained\("base"\)'
    ):
        load_teacher("org/tiny", commit=commit)


def test_weights_of_a_repository_are_looked_at_as_well(write, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache"
    snapshot = cache / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(write(make_model("llama"), as_float8(None)), snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    with pytest.raises(ValueError, match=r"teacher org/tiny: .* F8_E4M3"):
        load_teacher("org/tiny", commit=commit)


def shards(directory: Path) -> list[Path]:
    """A directory's weights in two files with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    where = {}
    for file, half in zip(files, halves, strict=True):
        save_file({n: weights[n] for n in half}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return [directory / file for file in files]


def test_shards_are_read_by_their_index(write):
    model = make_model("llama")
    directory = write(model)
    first, second = shards(directory)
    assert_right(directory, model)
    second.unlink()
    assert_refused(directory, r"lacks model-00002-of-00002\.safetensors, which .*index\.json names")
    (directory / "model.safetensors.index.json").unlink()
    assert_refused(
        directory, r"has model-00001-of-00002\.safetensors, but neither .* download the index"
    )
    first.unlink()
    (directory / "model.gguf").touch()
    assert_refused(
        directory, r"has no model\.safetensors, but model\.gguf; name that file as teacher\.gguf"
    )


def test_two_models_in_a_directory_are_refused(write):
    directory = write(make_model("llama"))
    whole = (directory / "model.safetensors").read_bytes()
    shards(directory)
    (directory / "model.safetensors").write_bytes(whole)
    assert_refused(
        directory, r"names model-00001-of-00002\.safetensors, so there may be two models"
    )


def test_a_weight_in_two_files_is_refused(write):
    directory = write(make_model("llama"))
    first, second = shards(directory)
    weights = load_file(second)
    weights["lm_head.weight"] = torch.zeros(448, 32)
    assert "lm_head.weight" in load_file(first)
    save_file(weights, second, metadata={"format": "pt"})
    assert_refused(directory, r"00001-of-00002\.\w+ and model-00002\S+ both hold lm_head\.weight")


def test_a_vocabulary_that_is_not_read_is_named(write):
    directory = write(make_model("llama"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert_refused(directory, r"has no tokenizer\.json, and other vocabulary files are not read")


def test_a_distributed_checkpoint_is_refused(write):
    directory = write(make_model("llama"))
    (directory / "shard-00000-model-00000-of-00001.safetensors").touch()
    assert_refused(directory, r"shard-00000-\S+ is a part of a distributed checkpoint")


def test_a_teacher_in_a_directory_of_that_name_is_said_once(write):
    directory = write(make_model("llama"), as_float8(None), name="teacher")
    with pytest.raises(ValueError, match=r"^teacher: its weights are quantised"):
        load_teacher(str(directory))


def test_what_reads_pictures_is_left_out(write):
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    config = Llama4Config(
        text_config={
            **{**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
            **{"intermediate_size_mlp": 64, "attention_chunk_size": 64},
        },
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3},
            **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            **{"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
        },
    )
    model = randomize(Llama4ForConditionalGeneration(config))
    assert_right(write(model), model.language_model)
