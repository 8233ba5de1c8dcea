"""GGUF teachers: what a file says of its model arrives, or the file is refused in one line.

Files are written by another hand than the one that reads them (`gguf_files`), and loaded by `load_teacher` with its defaults.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from builder.recipe.file import load_recipe
from builder.teacher.loading import load_teacher
from tests.teacher.gguf_files import rope_factors, write_gguf
from tests.teacher.test_model import random_sequences, randomize, save, whole_model_logits

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TOKENS = {"vocab_size": 448, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
SIZES = {
    **{**TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
HEADS = {**SIZES, "head_dim": 16}
EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "shared_expert_intermediate_size": 64,
}
GEMMA = {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8}
HYBRID = {
    **{**HEADS, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mistral": {**HEADS, "sliding_window": None},
    "qwen2": SIZES,
    "qwen2_moe": {**SIZES, **EXPERTS},
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **EXPERTS, "norm_topk_prob": True, "mlp_only_layers": []},
    "gemma2": {**GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {**SIZES, "partial_rotary_factor": 0.75, "sliding_window": 8},
    "stablelm": {**SIZES, "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "starcoder2": {**SIZES, "rope_theta": 99_999.0},
    "nemotron": {**SIZES, "partial_rotary_factor": 0.5},
    "falcon": {
        **{**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "max_position_embeddings": 128,
    },
    "gpt2": {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mamba": {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": {
        **{**SIZES, "block_auto_adjust_ff_dim": False},
        "layer_types": ["conv", "full_attention"],
    },
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {**HYBRID, **EXPERTS},
}


def make(family: str, **changes: Any) -> Any:
    """A random model whose norms and biases are not what they are without training."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def load(tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def load(path: Path, **options: Any) -> Any:
        return load_teacher(str(path), tokenizer=str(tmp_path / "tokenizer"), **options)

    return load


def assert_right(teacher: Any, model: Any, *, is_exact: bool = True) -> None:
    sequences = random_sequences()
    found = torch.cat(list(teacher.logits(sequences))).double()
    expected = torch.cat([whole_model_logits(model, ids) for ids in sequences])
    if is_exact:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    else:
        assert (found - expected).abs().max() > 0.01


def assert_refused(load: Callable[..., Any], path: Path, pattern: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert message.startswith(f"teacher {path.name}: ")
    assert str(path.parent) not in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_each_architecture_is_the_model_that_was_stored(tmp_path, load, family):
    model = make(family)
    teacher = load(write_gguf(tmp_path / "tiny.gguf", model))
    assert_right(teacher, model)
    assert "quantisation" not in teacher.provenance()
    assert teacher.provenance()["parameters"] == sum(p.numel() for p in model.parameters())


# What a file says besides sizes

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0},
    "original_max_position_embeddings": 32,
}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN_KEYS = {
    **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    "rope.scaling.original_context_length": 32,
}
LONG, SHORT = [1.0 + i for i in range(8)], [1.0 + i / 8 for i in range(8)]
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "long_factor": LONG, "short_factor": SHORT},
    "attention_factor": 1.3,
}
GEMMA3_ROPE = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

SAID: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear, llama": ("llama", {"rope_parameters": LINEAR}, LINEAR_KEYS),
    "linear, its old key": ("llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "linear, qwen2": ("qwen2", {"rope_parameters": LINEAR}, LINEAR_KEYS),
    "linear, gemma3": ("gemma3_text", {"num_hidden_layers": 6, "rope_parameters": GEMMA3_ROPE}, LINEAR_KEYS),
    "none": ("llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "yarn, llama": ("llama", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn, qwen2": ("qwen2", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn, qwen3": ("qwen3", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn of other slopes": (
        "qwen2",
        {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "yarn of another attention": (
        "qwen2",
        {"rope_parameters": {**YARN, "attention_factor": 0.5 * (1 + 0.1 * math.log(4))}},
        {**YARN_KEYS, "rope.scaling.attn_factor": 0.5},
    ),
    "base of frequencies": ("starcoder2", {"rope_theta": 1e6}, {}),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 36}, {"attention.scale": 1 / 6}),
    "query scale of Gemma 2 27B": (
        "gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}, {}
    ),
    "query scale of Gemma 3 27B": (
        "gemma3_text", {"num_hidden_layers": 62, "head_dim": 32, "query_pre_attn_scalar": 16}, {}
    ),
    "soft-caps": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}, {}),
    "soft-cap of Gemma 3": (
        "gemma3_text", {"final_logit_softcapping": 2.0}, {"final_logit_softcapping": 2.0}
    ),
    "window": ("gemma3_text", {"sliding_window": 4}, {}),
    "pattern of windows": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
        {"attention.sliding_window_pattern": [True, False]},
    ),
    "window of Phi 3": ("phi3", {"sliding_window": 4}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "width of heads": ("llama", {"head_dim": 32}, {"attention.key_length": 32, "attention.value_length": 32}),
    "width of heads of Qwen 3": ("qwen3", {"head_dim": 32}, {}),
    "no biases": ("stablelm", {"use_qkv_bias": False}, {}),
    "parallel": ("stablelm", {"use_parallel_residual": True}, {}),
    "head of its own": ("gpt2", {"tie_word_embeddings": False}, {}),
    "shared head": ("qwen2", {"tie_word_embeddings": True}, {}),
    "usual scale": ("llama", {}, {"attention.scale": 0.25}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_a_file_says_of_its_model_arrives(tmp_path, load, case):
    family, changes, keys = SAID[case]
    model = make(family, **changes)
    assert_right(load(write_gguf(tmp_path / "tiny.gguf", model, keys=keys)), model)


@pytest.mark.parametrize(
    "case",
    ["linear, qwen2", "linear, gemma3", "yarn, llama", "query scale", "yarn of other slopes"],
)
def test_what_a_file_says_makes_a_difference(tmp_path, load, case):
    """So that the test above cannot pass by chance."""
    family, changes, keys = SAID[case]
    model = make(family, **changes)
    without = write_gguf(tmp_path / "tiny.gguf", model, keys=dict.fromkeys(keys))
    assert_right(load(without), model, is_exact=False)


def test_factors_of_frequencies_arrive(tmp_path, load):
    model = make("llama", rope_parameters=LLAMA3)
    factors = {"rope_freqs.weight": rope_factors(model.config)}
    assert factors["rope_freqs.weight"].unique().numel() > 2  # none, all, and in between
    teacher = load(write_gguf(tmp_path / "tiny.gguf", model, tensors=factors))
    assert_right(teacher, model)
    assert teacher.max_length == 128
    assert_right(load(write_gguf(tmp_path / "without.gguf", model)), model, is_exact=False)


def test_factors_for_short_and_long_sequences_arrive(tmp_path, load):
    changes = {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}
    model = make("phi3", **changes, rope_parameters={**LONGROPE, **changes})
    factors = {
        "rope_factors_long.weight": torch.tensor(LONG),
        "rope_factors_short.weight": torch.tensor(SHORT),
    }
    keys = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.3}
    teacher = load(write_gguf(tmp_path / "tiny.gguf", model, keys=keys, tensors=factors))
    for length in (32, 40):
        (ids,) = random_sequences((length,))
        found = torch.cat(list(teacher.logits([ids]))).double()
        torch.testing.assert_close(found, whole_model_logits(model, ids), atol=1e-4, rtol=0)


def test_a_name_does_not_make_a_model_another_one(tmp_path, load):
    """transformers takes a file named so for one whose windows have a length that it does not say."""
    model = make("llama")
    assert_right(
        load(write_gguf(tmp_path / "tiny.gguf", model, keys={"general.name": "mistral"})), model
    )


# What has no place

NO_HOME: dict[str, tuple[str, dict[str, Any], str]] = {
    "window of an architecture without": (
        "llama", {"attention.sliding_window": 8}, r"llama\.attention\.sliding_window = 8, .* teacher\.config"
    ),
    "unknown scaling": (
        "llama", {"rope.scaling.type": "spiral"}, r"llama\.rope\.scaling\.type = spiral, .* teacher\.config"
    ),
    "scaling of Phi 3": ("phi3", LINEAR_KEYS, r"phi3\.rope\.scaling\.type = linear"),
    "part of a head": ("llama", {"rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8"),
    "attention of linear scaling": (
        "qwen2", {**LINEAR_KEYS, "rope.scaling.attn_factor": 0.5}, r"rope\.scaling\.attn_factor = 0\.5"
    ),
    "extrapolation of YaRN": (
        "qwen2", {**YARN_KEYS, "rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor"
    ),
    "logarithm of YaRN": (
        "qwen2", {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier = 0\.1"
    ),
    "soft-cap of an architecture without": ("qwen2", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping"),
    "scale of logits": ("llama", {"logit_scale": 0.5}, r"llama\.logit_scale = 0\.5"),
    "scale of queries": ("llama", {"attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5"),
    "widths of layers": ("qwen2", {"feed_forward_length": [96, 96]}, r"feed_forward_length"),
    "experts of Llama": ("llama", {"expert_count": 4}, r"llama\.expert_count = 4"),
    "not causal": ("llama", {"attention.causal": False}, r"not causal"),
    "groups of heads of Falcon": ("falcon", {"attention.head_count_kv": 2}, r"falcon\.attention\.head_count_kv = 2"),
    "gates of experts": ("qwen3_moe", {"expert_gating_func": 2}, r"expert_gating_func = 2"),
    "an adapter": ("llama", {"general.type": "adapter"}, r"type 'adapter', not a model; merge"),
    "a part": ("llama", {"split.count": 3}, r"one of 3 parts; join them with"),
    "no size": ("llama", {"attention.head_count": None}, r"does not say llama\.attention\.head_count"),
    "other sizes": ("llama", {"attention.head_count_kv": 4}, r"other shapes than its configuration"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_HOME)
def test_what_has_no_place_is_refused(tmp_path, load, case):
    family, keys, message = NO_HOME[case]
    assert_refused(load, write_gguf(tmp_path / "tiny.gguf", make(family), keys=keys), message)


TENSORS: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
    "a bias": ("qwen2", {"blk.1.attn_output.bias": torch.ones(64)}, r"blk\.1\.attn_output\.bias, which Qwen2F"),
    "norms of heads": ("qwen2", {"blk.0.attn_q_norm.weight": torch.ones(16)}, r"attn_q_norm\.weight, which"),
    "a further layer": ("llama", {"blk.2.attn_norm.weight": torch.ones(64)}, r"blk\.2\.attn_norm\.weight, which"),
    "a head that is shared": ("gemma2", {"output.weight": torch.ones(448, 64)}, r"output\.weight, which"),
    "experts": ("llama", {"blk.0.ffn_up_exps.weight": torch.ones(4, 96, 64)}, r"blk\.0\.ffn_up_exps\.weight"),
    "a tensor of a newer reader": ("lfm2", {"blk.0.attn_sinks.weight": torch.ones(4)}, r"attn_sinks\.weight"),
    "one kind of factors": ("phi3", {"rope_factors_long.weight": torch.ones(6)}, r"rope_factors_long\) with other"),
    "factors without rotation": ("gpt2", {"rope_freqs.weight": torch.ones(8)}, r"factors of rotary frequencies"),
    "a missing norm": ("llama", {"blk.1.ffn_norm.weight": torch.ones(0)}, r"no tensor for model\.layers\.1\.post_att"),
    "missing biases": ("qwen2", {"blk.1.attn_q.bias": torch.ones(0)}, r"no tensor for model\.layers\.1\.self_attn\.q_"),
    "missing embeddings": ("llama", {"token_embd.weight": torch.ones(0)}, r"no token_embd\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_without_a_place_or_a_place_without_a_tensor_is_refused(tmp_path, load, case):
    family, tensors, message = TENSORS[case]
    path = write_gguf(tmp_path / "tiny.gguf", make(family), tensors=tensors)
    assert_refused(load, path, message)


def test_an_architecture_that_is_not_known_to_be_right_is_refused(tmp_path, load, monkeypatch):
    monkeypatch.setitem(write_gguf.__globals__["ARCHITECTURES"], "llama", "gpt-oss")
    model = make("llama")
    monkeypatch.setattr(
        "tests.teacher.gguf_files.gguf_tensors", lambda *_: {"token_embd.weight": torch.ones(4, 4)}
    )
    path = write_gguf(tmp_path / "tiny.gguf", model)
    assert_refused(
        load,
        path,
        r"architecture 'gpt-oss', whose GGUF files .* \(known: bloom, .*use the model's safe",
    )


# The original config.json decides


def config_of(model: Any, directory: Path) -> Path:
    model.config.save_pretrained(directory)
    return directory


def test_the_original_config_says_what_the_file_does_not(tmp_path, load):
    model = make("mistral", sliding_window=8)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    assert_right(load(path), model, is_exact=False)
    directory = config_of(model, tmp_path / "original")
    for config in (directory, directory / "config.json"):
        teacher = load(path, config=str(config))
        assert teacher.provenance()["architecture"] == "MistralForCausalLM"
        assert_right(teacher, model)


def test_the_original_config_decides_where_the_file_is_not_understood(tmp_path, load):
    model = make("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, keys={"rope.scaling.type": "spiral"})
    assert_right(load(path, config=str(config_of(model, tmp_path / "original"))), model)


def test_the_part_on_text_of_an_original_config_is_enough(tmp_path, load):
    from transformers import Gemma3Config

    model = make("gemma3_text", query_pre_attn_scalar=36)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    Gemma3Config(text_config=model.config.to_dict()).save_pretrained(tmp_path / "original")
    assert_right(load(path, config=str(tmp_path / "original")), model)


def test_an_original_config_has_to_agree_with_factors_of_the_file(tmp_path, load):
    model = make("llama", rope_parameters=LLAMA3)
    factors = {"rope_freqs.weight": rope_factors(model.config)}
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors=factors)
    assert_right(load(path, config=str(config_of(model, tmp_path / "right"))), model)
    wrong = config_of(make("llama"), tmp_path / "wrong")
    assert_refused(load, path, r"factors .* are not those of teacher\.config", config=str(wrong))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {}, r"teacher\.config is of the type 'qwen2', .* 'llama', which is 'llama' or 'mistral'"),
        ("llama", {"attention_bias": True}, r"no tensor for model\.layers\.0\.self_attn\.\w+\.bias and \d+ more"),
        ("llama", {"num_hidden_layers": 1}, r"has blk\.1\.\S+ and \d+ more, which"),
        ("llama", {"intermediate_size": 64}, r"other shapes than its configuration says"),
    ],
)  # fmt: skip
def test_an_original_config_of_another_model_is_refused(tmp_path, load, family, changes, message):
    path = write_gguf(tmp_path / "tiny.gguf", make("llama"))
    config = config_of(make(family, **changes), tmp_path / "other")
    assert_refused(load, path, message, config=str(config))


def test_an_original_config_that_is_none_is_refused(tmp_path, load):
    path = write_gguf(tmp_path / "tiny.gguf", make("llama"))
    (tmp_path / "config.json").write_text("{}")
    assert_refused(
        load, path, r"teacher\.config cannot be read", config=str(tmp_path / "config.json")
    )


# Recipes, manifests and cards


def recipe_of(make_recipe: Any, tmp_path: Path, **keys: str) -> Path:
    lines = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
    path: Path = make_recipe(teacher_options=f'{lines}\ntokenizer = "tokenizer"')
    text = path.read_text().splitlines()
    path.write_text("\n".join(line for line in text if not line.startswith('path = "')) + "\n")
    return path


def test_a_build_by_a_gguf_teacher_with_a_config(
    tmp_path, make_recipe, tiny_tokenizer, cli, monkeypatch
):
    model = make("mistral", sliding_window=8)
    write_gguf(tmp_path / "tiny.gguf", model, packed="Q8_0")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    config_of(model, tmp_path / "original")
    out = tmp_path / "out"
    recipe = recipe_of(make_recipe, tmp_path, gguf="tiny.gguf", config="original")
    status, _, err = cli("build", recipe, "--output", out)
    assert status == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["recipe"]["teacher"]["config"] == "original"
    assert manifest["teacher"]["architecture"] == "MistralForCausalLM"
    assert len(manifest["teacher"]["config_sha256"]) == 64
    assert manifest["teacher"]["quantisation"] == {
        **{"method": "gguf", "stored_as": ["Q8_0"]},
        "dequantised": True,
    }
    assert manifest["teacher"]["parameters"] == sum(p.numel() for p in model.parameters())
    card = (out / "README.md").read_text().replace("\\", "")
    assert (
        "| quantisation | gguf: weights are stored as Q8_0, unpacked before they are used |" in card
    )
    assert 'config = "original"' in card
    assert "beside the files that it names" in card
    monkeypatch.chdir(tmp_path)
    status, output, err = cli("verify", out, "--recompute", manifest["totals"]["rows"])
    assert status == 0, output + err
    config_of(make("llama"), tmp_path / "original")
    status, output, err = cli("verify", out, "--recompute", 1)
    assert status == 1
    assert "not the dataset's: teacher.config_sha256" in err


def test_a_config_is_pinned_by_its_content(tmp_path, make_recipe, tiny_tokenizer):
    from builder.dataset.identity import fingerprint
    from builder.sources.known import KnownSources
    from builder.sources.resolve import resolve

    model = make("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    directory = config_of(model, tmp_path / "original")

    def found(**keys: str) -> str:
        recipe = load_recipe(recipe_of(make_recipe, tmp_path, gguf="tiny.gguf", **keys))
        return fingerprint(resolve(recipe, tmp_path, KnownSources()).plan(recipe))

    spelled = ["original", "original/config.json", str(directory), "./original"]
    same = {found(config=path) for path in spelled}
    assert len(same) == 1
    assert found() not in same
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert found(config="original") not in same


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gguf": "tiny.gguf", "config": "nowhere"}, r"teacher\.config: 'nowhere' does not exist"),
        (
            {"gguf": "tiny.gguf", "config": "tokenizer"},
            r"teacher\.config: 'tokenizer/config\.json' does not",
        ),
        ({"path": "tokenizer", "config": "tokenizer"}, r"config is valid only with gguf"),
    ],
)
def test_a_config_that_is_not_there_is_refused(
    tmp_path, make_recipe, tiny_tokenizer, cli, keys, message
):
    write_gguf(tmp_path / "tiny.gguf", make("llama"))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of(make_recipe, tmp_path, **keys)
    if "path" in keys:
        recipe.write_text(recipe.read_text().replace("[teacher]", '[teacher]\npath = "tokenizer"'))
        recipe.write_text(recipe.read_text().replace('tokenizer = "tokenizer"\n', ""))
    status, out, err = cli("build", recipe, "--output", tmp_path / "out")
    assert (status, out) == (1, "")
    assert re.search(message, err)
    assert not list((tmp_path / "out").glob("data/*"))


@pytest.mark.parametrize("packed", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_packed_file_is_recorded_as_what_it_is(tmp_path, load, packed):
    import gguf

    model = make("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, packed=packed)
    kind = gguf.GGMLQuantizationType[packed]
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "q_proj" not in name and "k_proj" not in name:
            blocks = gguf.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.dequantize(blocks, kind))
        elif parameter.ndim > 1:  # whose rows are stored in another order
            blocks = [gguf.quantize(row[None].detach().numpy(), kind) for row in parameter]
            rows = [torch.from_numpy(gguf.dequantize(block, kind)) for block in blocks]
            parameter.data = torch.cat(rows)
    teacher = load(path)
    assert_right(teacher, model)
    found = teacher.provenance()
    assert found["quantisation"] == {"method": "gguf", "stored_as": [packed], "dequantised": True}
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_loaded_file_can_be_saved(tmp_path, load, tiny_tokenizer):
    """As the embedded teacher is, once."""
    model = make("llama")
    teacher = load(write_gguf(tmp_path / "tiny.gguf", model, packed="Q8_0"))
    directory = save(teacher.model, tiny_tokenizer, tmp_path / "saved")
    again = load_teacher(str(directory))
    assert_right(again, teacher.model)
    assert "quantisation" not in again.provenance()
