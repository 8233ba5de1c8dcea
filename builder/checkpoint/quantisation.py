"""A teacher's quantisation, as manifest and card record it, and how many parameters it has when they are counted one by one.

In:   config.json, how the checkpoint stores each tensor, and the model as loaded.
Out:  plain JSON values, or None of a teacher that is not quantised.

A quantised teacher is another one than its original. Where it runs packed it can also compute otherwise than where its weights
were unpacked first (some methods round activations, too), so that is recorded as well.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from builder.checkpoint.arrival import quantisation_of
from builder.checkpoint.checkpoint import Stored

ESSENTIALS = (
    *("bits", "group_size", "sym", "desc_act", "zero_point", "version", "format", "checkpoint_format"),
    *("fmt", "activation_scheme", "weight_block_size", "scale_fmt", "load_in_4bit", "load_in_8bit"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_threshold", "quant_type", "nbits"),
    *("weights", "activations", "quantization_mode", "linear_class", "in_group_size", "num_codebooks"),
)  # fmt: skip
"""Of a `quantization_config`, what says how weights are stored; the rest is lists of modules, paths and kernels."""
GROUP_ESSENTIALS = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")
"""The same of each group of modules, where a method has several."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantisation by which transformers reads the weights; None if there is none that it knows."""
    from transformers.quantizers.auto import AutoHfQuantizer

    said = quantisation_of(config)
    if not said:
        return None
    try:
        known = AutoHfQuantizer.supports_quant_method(said)
    except ValueError:  # it names no method
        return None
    return str(said.get("quant_method") or "bitsandbytes") if known else None


def describe(
    model: Any, *, config: Mapping[str, Any], stored: Mapping[str, Stored], method: str | None
) -> dict[str, Any] | None:
    """The quantisation of a loaded teacher; None if its weights are stored as plain numbers."""
    packed = sorted({tensor.dtype for tensor in stored.values() if tensor.is_packed})
    is_packed_here = getattr(model, "hf_quantizer", None) is not None
    if method is None or not (packed or is_packed_here):
        return None
    said = quantisation_of(config)
    kept = {name: said[name] for name in ESSENTIALS if _is_plain(said.get(name))}
    groups = [
        {
            part: {
                name: group[part][name]
                for name in GROUP_ESSENTIALS
                if _is_plain(group[part].get(name))
            }
            for part in ("weights", "input_activations")
            if isinstance(group.get(part), dict)
        }
        for group in (said.get("config_groups") or {}).values()
        if isinstance(group, dict)
    ]
    return {
        "method": method,
        **(
            {"config": {**kept, **({"groups": groups} if groups else {})}} if kept or groups else {}
        ),
        "stored_as": packed,
        "dequantised": not is_packed_here,
    }


def _is_plain(value: Any) -> bool:
    """Whether a value is short, and not a path."""
    if isinstance(value, str):
        return len(value) <= 40 and "/" not in value and "\\" not in value
    if isinstance(value, list):
        return len(value) <= 4 and all(isinstance(entry, int | float) for entry in value)
    return isinstance(value, bool | int | float)


def count_parameters(model: Any) -> int:
    """Parameters of a model as if nothing were packed: those of its class with its configuration."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    return sum(parameter.numel() for parameter in plain.parameters())
