"""The metadata of a GGUF file → the configuration of the model that llama.cpp would run from it.

In:   what a file says (`gguf_metadata`).
Out:  a configuration of transformers.

How:  transformers itself reads little more than sizes, and takes its own defaults for the rest: scaled and partial rotary positions,
      soft-caps, sliding windows, the scale of queries, biases. Here all of it is read.

Only architectures are here whose tensors transformers is known to convert rightly: tests write each of them in llama.cpp's way.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from builder.checkpoint.gguf_metadata import Metadata, epsilon, no_home, rope_parameters, whole

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
LARGE_GEMMAS = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose queries llama.cpp scales by the model's width per head, and not by a head's own."""
TOKENS = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "padding",
    "unk_token_id": "unknown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How to read the files of one."""

    model_type: str
    """Of transformers."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Further keys → attributes of the configuration."""
    epsilon: str = "rms_norm_eps"
    """The attribute that holds what is added to a norm."""
    special: Callable[[Metadata, dict[str, Any]], dict[str, Any]] | None = None
    """What depends on more than one key."""
    whole: Callable[[Metadata], dict[str, Any]] | None = None
    """All of the configuration, of one that is no usual transformer."""
    is_rotary: bool = True
    is_partial: bool = False
    """Whether the model can rotate a part of each head only."""
    also: tuple[str, ...] = ()
    """Other model types of transformers with the same tensors, which a config.json may ask for."""


def make_config(metadata: Metadata) -> PreTrainedConfig:
    """The configuration that a file describes.

    Raises:
        ValueError: it is of an architecture that is not known here, or says of the model what is not understood.
    """
    known = architecture(metadata.architecture)
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in metadata.shapes}
    values |= {name: metadata.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS.items()}  # fmt: skip
    if "token_embd.weight" not in metadata.shapes:
        raise ValueError("it has no token_embd.weight; use a complete file")
    values["vocab_size"] = metadata.shapes["token_embd.weight"][0]
    if metadata.factors and (known.whole or not known.is_rotary):
        raise no_home(f"factors of rotary frequencies ({min(metadata.factors)})")
    if known.whole:
        values |= known.whole(metadata)
        metadata.check_taken()
        return AutoConfig.for_model(known.model_type, **values)
    for key, name in {**SIZES, **known.names}.items():
        values[name] = whole(metadata, key)
    kv_heads = metadata.take("attention.head_count_kv", values["num_attention_heads"])
    values["num_key_value_heads"] = whole(metadata, "attention.head_count_kv", kv_heads)
    values[known.epsilon] = epsilon(metadata)
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    values["head_dim"] = metadata.take("attention.key_length", head_dim)
    if metadata.take("attention.value_length", values["head_dim"]) != values["head_dim"]:
        raise no_home(f"{metadata.architecture}.attention.value_length")
    if not metadata.take("attention.causal", True):
        raise ValueError("the model is not causal; use a decoder-only model")
    if known.is_rotary:
        values["rope_parameters"] = rope_parameters(metadata, values, is_partial=known.is_partial)
    if known.special:
        values |= known.special(metadata, values)
    _check_scale(metadata, values)
    metadata.check_taken()
    if "head_dim" not in CONFIG_MAPPING[known.model_type].__dataclass_fields__:
        if values["head_dim"] != head_dim:
            raise no_home(f"{metadata.architecture}.attention.key_length = {values['head_dim']}")
        del values["head_dim"]
    return AutoConfig.for_model(known.model_type, **values)


def architecture(name: str) -> Architecture:
    """How to read the files of an architecture.

    Raises:
        ValueError: that is not known.
    """
    if name not in ARCHITECTURES:
        raise ValueError(
            f"it is of the architecture {name!r}, whose GGUF files are not known to be read correctly (known:"
            f" {', '.join(sorted(ARCHITECTURES))}); use the model's safetensors files"
        )
    return ARCHITECTURES[name]


def _check_scale(metadata: Metadata, values: Mapping[str, Any]) -> None:
    """See that queries are scaled as the model does it: by 1/√(width of a head), or as its configuration says."""
    scale = metadata.take("attention.scale")
    usual = values.get("query_pre_attn_scalar", values["head_dim"]) ** -0.5
    if scale and not math.isclose(scale, usual, rel_tol=1e-5):
        raise no_home(f"{metadata.architecture}.attention.scale = {scale}")


def _has(metadata: Metadata, *names: str) -> bool:
    """Whether there is such a tensor in the first layer."""
    return any(f"blk.0.{name}" in metadata.shapes for name in names)


def _llama(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": _has(metadata, "attn_q.bias", "attn_output.bias"),
        "mlp_bias": _has(metadata, "ffn_up.bias", "ffn_gate.bias", "ffn_down.bias"),
    }


def _qwen3(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {"attention_bias": _has(metadata, "attn_q.bias", "attn_output.bias")}


def _qwen2moe(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    is_normal = metadata.take("expert_weights_norm", False)
    return {"qkv_bias": _has(metadata, "attn_q.bias"), "norm_topk_prob": is_normal}


def _qwen3moe(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    is_normal = metadata.take("expert_weights_norm", True)
    return _qwen3(metadata, values) | {"norm_topk_prob": is_normal, "mlp_only_layers": []}


def _gemma(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    """Of Gemma 2 and 3."""
    name, layers = metadata.architecture, values["num_hidden_layers"]
    is_second = name == "gemma2"
    scalar: float = values["head_dim"]
    if layers == LARGE_GEMMAS[name]:
        scalar = values["hidden_size"] / values["num_attention_heads"]
    if scale := metadata.take("attention.scale"):
        scalar = scale**-2
    if abs(scalar - round(scalar)) > 1e-3 * scalar or round(scalar) < 1:
        raise no_home(f"{name}.attention.scale = {scale}")
    caps = {
        "attn_logit_softcapping": metadata.take("attn_logit_softcapping", 50.0 if is_second else None),
        "final_logit_softcapping": metadata.take("final_logit_softcapping", 30.0 if is_second else None),
    }  # fmt: skip
    found: dict[str, Any] = {
        **caps,
        "query_pre_attn_scalar": round(scalar),
        "sliding_window": metadata.take("attention.sliding_window", 4096),
        "attention_bias": _has(metadata, "attn_q.bias", "attn_output.bias"),
    }
    pattern = metadata.take("attention.sliding_window_pattern", 2 if is_second else 6)
    is_sliding = (
        [bool((layer + 1) % pattern) for layer in range(layers)]
        if isinstance(pattern, int)
        else pattern
    )
    if len(is_sliding) != layers:
        raise no_home(f"{name}.attention.sliding_window_pattern of {len(is_sliding)} layers")
    found["layer_types"] = [
        "sliding_attention" if each else "full_attention" for each in is_sliding
    ]
    if not is_second:
        local = float(metadata.take("rope.freq_base_swa", 10_000.0))
        found["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return found


def _phi3(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    rope = values["rope_parameters"]
    if rope["rope_type"] not in ("default", "longrope"):
        raise no_home(f"phi3.rope.scaling.type = {rope['rope_type']}")
    before = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    window = metadata.take("attention.sliding_window")
    return {"original_max_position_embeddings": before, "sliding_window": window or None}


def _stablelm(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    is_parallel = not _has(metadata, "ffn_norm.weight")
    if metadata.take("use_parallel_residual", is_parallel) != is_parallel:
        raise no_home("stablelm.use_parallel_residual")
    return {"use_qkv_bias": _has(metadata, "attn_q.bias"), "use_parallel_residual": is_parallel}


def _starcoder2(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {"use_bias": _has(metadata, "attn_q.bias")}


def _nemotron(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": _has(metadata, "attn_q.bias"),
        "mlp_bias": _has(metadata, "ffn_up.bias"),
    }


def _falcon(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    if values["num_key_value_heads"] != 1:
        # llama.cpp's converter changed the order of heads, and transformers does not change it back.
        raise no_home(f"falcon.attention.head_count_kv = {values['num_key_value_heads']}")
    return {
        "ffn_hidden_size": values["intermediate_size"],
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


def _gpt2(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    return {"n_inner": values["intermediate_size"]}


def _bloom(metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    if values["intermediate_size"] != 4 * values["hidden_size"]:
        raise no_home(f"bloom.feed_forward_length = {values['intermediate_size']}")
    return {"n_layer": values["num_hidden_layers"], "n_head": values["num_attention_heads"]}


def _mamba(metadata: Metadata) -> dict[str, Any]:
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "ssm.dt_b_c_rms"):  # fmt: skip
        if metadata.take(key, 0):
            raise no_home(f"mamba.{key}")
    metadata.taken.add("context_length")
    width, inner = whole(metadata, "embedding_length"), whole(metadata, "ssm.inner_size")
    found = {
        "hidden_size": width,
        "expand": inner // width,
        "num_hidden_layers": whole(metadata, "block_count"),
        "conv_kernel": whole(metadata, "ssm.conv_kernel"),
        "state_size": whole(metadata, "ssm.state_size"),
        "time_step_rank": whole(metadata, "ssm.time_step_rank"),
        "layer_norm_epsilon": epsilon(metadata),
        "use_conv_bias": _has(metadata, "ssm_conv1d.bias"),
        "use_bias": _has(metadata, "ssm_in.bias"),
    }
    if inner % width:
        raise no_home(f"mamba.ssm.inner_size = {inner}")
    return found


def _hybrid(metadata: Metadata) -> dict[str, Any]:
    """Of architectures whose configuration transformers makes itself, of all that it reads."""
    from transformers.integrations.gguf.gguf_config_mapping import get_gguf_config

    class Read(dict[str, Any]):
        """Fields, which notes what was asked for."""

        def __getitem__(self, key: str) -> Any:
            metadata.take(key.removeprefix(f"{metadata.architecture}."))
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            metadata.take(key.removeprefix(f"{metadata.architecture}."))
            return super().get(key, default)

    fields = Read({**metadata.fields, "tokenizer.ggml.tokens": metadata.shapes["token_embd.weight"][0]})  # fmt: skip
    try:
        values = get_gguf_config(fields, tuple(metadata.shapes))
    except KeyError as error:
        raise ValueError(f"the file does not say {error.args[0]}; convert it again") from None
    del values["model_type"], values["architectures"]
    if (size := metadata.take("attention.value_length")) not in (None, values.get("head_dim")):
        raise no_home(f"{metadata.architecture}.attention.value_length = {size}")
    return values


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
ARCHITECTURES = {
    "llama": Architecture(model_type="llama", special=_llama, also=("mistral",)),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        names={
            **_EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        special=_qwen2moe,
    ),
    "qwen3": Architecture(model_type="qwen3", special=_qwen3),
    "qwen3moe": Architecture(model_type="qwen3_moe", names=_EXPERTS, special=_qwen3moe),
    "gemma2": Architecture(model_type="gemma2", special=_gemma),
    "gemma3": Architecture(model_type="gemma3_text", special=_gemma),
    "phi3": Architecture(model_type="phi3", special=_phi3, is_partial=True),
    "stablelm": Architecture(
        model_type="stablelm", epsilon="layer_norm_eps", special=_stablelm, is_partial=True
    ),
    "starcoder2": Architecture(
        model_type="starcoder2", epsilon="norm_epsilon", special=_starcoder2
    ),
    "nemotron": Architecture(
        model_type="nemotron", epsilon="norm_eps", special=_nemotron, is_partial=True
    ),
    "falcon": Architecture(model_type="falcon", epsilon="layer_norm_epsilon", special=_falcon),
    "gpt2": Architecture(
        model_type="gpt2", epsilon="layer_norm_epsilon", special=_gpt2, is_rotary=False
    ),
    "bloom": Architecture(
        model_type="bloom", epsilon="layer_norm_epsilon", special=_bloom, is_rotary=False
    ),
    "mamba": Architecture(model_type="mamba", whole=_mamba),
    "lfm2": Architecture(model_type="lfm2", whole=_hybrid),
    "qwen35": Architecture(model_type="qwen3_5_text", whole=_hybrid),
    "qwen35moe": Architecture(model_type="qwen3_5_moe_text", whole=_hybrid),
}
