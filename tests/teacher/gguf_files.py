"""Tiny models as GGUF files, written as llama.cpp's converter writes them: its names, its layouts, its keys.

What each architecture does to tensors and what it says of them follows convert_hf_to_gguf.py of llama.cpp, so that reading a file
is tested against another hand than the one that reads it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "falcon": "falcon",
    "gpt2": "gpt2",
    "bloom": "bloom",
    "mamba": "mamba",
    "lfm2": "lfm2",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}
LAYER_NORM = ("stablelm", "starcoder2", "nemotron", "falcon", "gpt2", "bloom")
"""Architectures whose epsilon is not that of a root mean square."""


def write_gguf(
    path: Path,
    model: Any,
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    packed: str | None = None,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: of the file.
        model: whose class is one of ARCHITECTURES.
        keys: said of it in place of what follows from its configuration, without the architecture's name; None leaves one out.
        tensors: in place of the model's, or besides them; an empty one leaves one out.
        packed: type of the blocks in which matrices are packed, e.g. Q8_0.
    """
    import gguf

    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_keys(model.config, architecture), **(keys or {})}.items():
        full = key if key.startswith(("general.", "split.")) else f"{architecture}.{key}"
        if value is not None:
            _add(writer, full, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{i}>" for i in range(model.config.vocab_size)])
    writer.add_eos_token_id(0)
    for name, tensor in {**gguf_tensors(model, architecture), **(tensors or {})}.items():
        array = tensor.detach().float().contiguous().numpy()
        if not array.size:
            continue
        if packed and array.ndim > 1 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[packed]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def _keys(config: Any, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter says of a model, but for how its positions are scaled."""
    if architecture == "mamba":
        return {
            **{"context_length": 2**20, "embedding_length": config.hidden_size},
            **{"feed_forward_length": 0, "attention.head_count": 0},
            **{"block_count": config.num_hidden_layers, "ssm.conv_kernel": config.conv_kernel},
            **{"ssm.inner_size": config.intermediate_size, "ssm.state_size": config.state_size},
            "ssm.time_step_rank": config.time_step_rank,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        }
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    norm = "layer_norm" if architecture in LAYER_NORM else "layer_norm_rms"
    epsilons = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    inner = ("intermediate_size", "n_inner", "ffn_hidden_size")
    found: dict[str, Any] = {
        "context_length": getattr(config, "max_position_embeddings", 128),
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": next(filter(None, (getattr(config, n, None) for n in inner)), 4 * width),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{norm}_epsilon": next(getattr(config, n) for n in epsilons if hasattr(config, n)),
    }  # fmt: skip
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope:
        found["rope.freq_base"] = float(rope["rope_theta"])
    if architecture in ("llama", "phi3", "stablelm", "nemotron", "qwen35", "qwen35moe"):
        found["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1))
    if architecture in ("qwen3", "qwen3moe", "gemma2", "gemma3", "qwen35", "qwen35moe"):
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if "moe" in architecture:
        found |= {
            **{"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok},
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if architecture in ("qwen2moe", "qwen35moe"):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "stablelm":
        found["use_parallel_residual"] = config.use_parallel_residual
    if architecture == "falcon":
        found |= {"tensor_data_layout": "jploski", "attention.head_count_kv": 1}
    if architecture == "lfm2":
        is_full = [kind == "full_attention" for kind in config.layer_types]
        found |= {
            "attention.head_count_kv": [kv_heads if each else 0 for each in is_full],
            "shortconv.l_cache": config.conv_L_cache,
            "vocab_size": config.vocab_size,
        }
    if architecture in ("qwen35", "qwen35moe"):
        found |= {
            "full_attention_interval": config.layer_types.index("full_attention") + 1,
            "rope.dimension_sections": [*rope["mrope_section"], 0],
            **{"ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim},
            **{"ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads},
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        }  # fmt: skip
    return found


def gguf_tensors(model: Any, architecture: str) -> dict[str, Tensor]:
    """A model's tensors under llama.cpp's names, in its layouts."""
    import gguf

    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for part, value in _converted(name, tensor, config, architecture):
            stem, dot, suffix = part.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = part, "", ""
            target = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
            assert target, f"{part} has no name in {architecture}"
            found[f"{target}{dot}{suffix}"] = value
    return found


def _converted(
    name: str, tensor: Tensor, config: Any, architecture: str
) -> list[tuple[str, Tensor]]:
    """Names and values under which a tensor is stored."""
    is_norm = name.endswith("norm.weight")
    heads = getattr(config, "num_attention_heads", 0)
    if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        # The two halves of a rotary head are stored interleaved.
        count = heads if ".q_proj." in name else config.num_key_value_heads
        by_half = tensor.unflatten(0, (count, 2, -1))
        return [(name, by_half.transpose(1, 2).flatten(0, 2))]
    if architecture in ("gemma2", "gemma3", "nemotron") and (
        is_norm or name.endswith("layernorm.weight")
    ):
        return [(name, tensor + 1)]
    if architecture == "gpt2" and tensor.ndim == 2 and ".h." in name:
        return [(name, tensor.T)]
    if architecture == "bloom" and "query_key_value" in name:
        by_head = tensor.unflatten(0, (heads, 3, -1))
        return [(name, by_head.transpose(0, 1).flatten(0, 2))]
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", gate), (f"{stem}up_proj.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"{name}.weight", tensor)]
    if name.endswith("shared_expert_gate.weight"):
        return [(name, tensor[0])]
    if architecture == "mamba" and name.endswith("A_log"):
        return [(name, -tensor.exp())]
    if name.endswith(("conv1d.weight", ".conv.conv.weight")):
        tensor = tensor.squeeze(1)
    if architecture in ("qwen35", "qwen35moe"):
        return _qwen35(name, tensor, config)
    return [(name, tensor)]


def _qwen35(name: str, tensor: Tensor, config: Any) -> list[tuple[str, Tensor]]:
    """Norms are stored with the one that the model adds, and heads of values by turns of the heads of keys."""
    if name.endswith("norm.weight") and ".linear_attn." not in name:
        return [(name, tensor + 1)]
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    dim, query_key = config.linear_value_head_dim, 2 * keys * config.linear_key_head_dim

    def by_turns(rows: Tensor, size: int) -> Tensor:
        return rows.unflatten(0, (keys, values // keys, size)).transpose(0, 1).flatten(0, 2)

    leaf = name.split(".linear_attn.")[-1]
    if leaf == "A_log":
        return [(name, by_turns(-tensor.exp(), 1))]
    if leaf in ("dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
        name = name.replace("dt_bias", "dt_proj.bias")
        return [(name, by_turns(tensor, 1))]
    if leaf == "in_proj_z.weight":
        return [(name, by_turns(tensor, dim))]
    if leaf in ("in_proj_qkv.weight", "conv1d.weight"):
        return [(name, torch.cat([tensor[:query_key], by_turns(tensor[query_key:], dim)]))]
    if leaf == "out_proj.weight":
        return [(name, by_turns(tensor.T, dim).T)]
    return [(name, tensor)]


def rope_factors(config: Any) -> Tensor:
    """`rope_freqs.weight` as the converter computes it for Llama 3.1 and later."""
    rope = config.rope_parameters
    dim = config.head_dim
    base = rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for wavelength in 2 * np.pi * base:
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)
