"""A model as transformers has loaded it, and its checkpoint → whether it is the model that was trained.

In:   the model, transformers' report on loading it, config.json as it is written, and how the checkpoint stores each tensor.
Out:  nothing, or one line on what did not arrive.

How:  transformers fills what is missing with random numbers, drops what it has no place for, casts packed numbers as if they were
      weights, and ignores what it does not know of config.json. Each of these is another model, and none is an error to it.
      What is dropped is accepted only where it is known to change no logit.

Cost: one pass over the weights, on the device where they are.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_rope_utils import RopeParameters

from builder.checkpoint.checkpoint import Stored

HARMLESS = re.compile(
    r"(^|\.)(original_)?inv_freq$"  # compared with what config.json makes, below
    r"|(^|\.)(cos|sin)_cached$|(^|\.)position_ids$"
    r"|(^|\.)mtp(_\w+)?\."  # heads that predict further tokens
    r"|^(v_head|value_head)\."  # of a critic in reinforcement learning
)
"""Tensors that many checkpoints hold beyond the model, and on which no logit depends."""
MASK = re.compile(r"(^|\.)\w*attn(\.\w+)?\.(bias|masked_bias|causal_mask|mask)$|(^|\.)\w*attention\.(bias|masked_bias|mask)$")  # fmt: skip
"""Names of causal masks that older code stored; a bias can have such a name, too, but not the shape."""
MTP_PARTS = {"eh_proj", "enorm", "hnorm", "shared_head"}
"""Modules that make a layer one that predicts a further token: no other joins hidden states with an embedding."""
TOWERS = {
    "vision_config": r"(^|\.)(vision\w*|visual|vit|image_\w+|multi_modal_projector|mm_projector|embed_vision)(\.|$)",
    "audio_config": r"(^|\.)(audio\w*|embed_audio)(\.|$)",
    "vq_config": r"(^|\.)vqmodel\.",
}
"""What reads pictures or sound, in checkpoints whose config.json has such a section; text does not pass through it."""
SCALES = re.compile(
    r"scales?(_inv|_\d)?$|_scale\b|SCB$|absmax$|zero_points?$|qzeros$|qweight$|quant_(map|state)|weight_(packed|shape)$|amax$"
)
"""Names of what packed weights need to become numbers."""
CACHE_SCALES = re.compile(r"(^|\.)(k|v|q)(_proj)?(_cache)?_scale$")
"""Of caches that other programs store in eight bits; here nothing is cached in them."""
BARE_FP8 = ("fp8", "mxfp8")
"""Methods of quantisation that take a weight without a scale for one that was never scaled."""
LARGE = 65_536
"""Numbers of a matrix that cannot all be zero by intention."""


def check(
    model: Any,
    report: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    method: str | None,
) -> None:
    """See that all of a checkpoint arrived in a model, and nothing else.

    Args:
        model: as loaded.
        report: transformers' `output_loading_info`.
        config: config.json as it is written.
        stored: how the checkpoint holds each tensor.
        method: of quantisation, which transformers has undone or runs; None if it has done neither.

    Raises:
        ValueError: in one line, what did not, without the teacher's name.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("an adapter was put on top of it; merge them, and name the result")
    if layers := sorted(name for name in report["unexpected_keys"] if "lora_" in name):
        raise ValueError(
            f"the checkpoint has {_count(layers)}, which {'is' if len(layers) == 1 else 'are'} an adapter's; merge it into its model, "
            "and name the result"
        )
    missing = sorted(report["missing_keys"])
    if method and missing and all(SCALES.search(name) for name in missing):
        raise ValueError(
            f"config.json says that its weights are quantised by {method}, but the checkpoint has no {_count(missing)}; download it again, or "
            "remove quantization_config if its weights are not quantised"
        )
    if missing:
        raise ValueError(
            f"the checkpoint has no {_count(missing)}, which would be filled with random numbers; "
            "use a complete causal language model"
        )
    _check_packed(model, report["unexpected_keys"], config, stored, method)
    _check_unexpected(model, report["unexpected_keys"], config, stored, method)
    _check_tied(model, config)
    _check_rope(model, config)
    _check_frequencies(model, stored)


def check_values(model: Any) -> None:
    """See that weights are numbers: a type with a smaller range makes infinity of large ones, and a torn file holds zeros.

    Raises:
        ValueError: some are not, in one line, without the teacher's name.
    """
    for name, parameter in model.named_parameters():
        values: Tensor = getattr(parameter, "_local_tensor", parameter).detach()
        if (
            values.is_meta
            or not values.is_floating_point()
            or values.itemsize < 2
            or not len(values.shape)
        ):
            continue
        low, high = (float(bound) for bound in torch.aminmax(values)) if values.numel() else (0, 0)
        # A bias of −∞ rules out a part of the vocabulary.
        if low != low or high in (torch.inf, -torch.inf) or (low == -torch.inf and values.ndim > 1):
            if low == low and values.dtype == torch.float16:
                raise ValueError(
                    f'{name} holds values beyond the range of float16; use teacher.dtype = "bfloat16" or "float32"'
                )
            raise ValueError(f"{name} holds NaN or infinite values; download the weights again")
        if low == high == 0 and values.ndim > 1 and values.numel() >= LARGE:
            raise ValueError(
                f"{name} is all zeros, so its file was not completely written or downloaded; download it again"
            )


def _check_packed(
    model: Any,
    unexpected: Iterable[str],
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    method: str | None,
) -> None:
    """See that packed numbers were unpacked, by whoever knows their scales."""
    packed = {
        name: tensor
        for name, tensor in sorted(stored.items())
        if tensor.is_packed and not _is_harmless(name, tensor)
    }
    if method in BARE_FP8:
        for name, tensor in packed.items():
            stem = name.removesuffix("weight")
            names = {f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"}
            if not SCALES.search(name) and not names & stored.keys():
                raise ValueError(
                    f"{name} is stored as {tensor.dtype} and its scale is not in the checkpoint; download it again"
                )
    if method is not None:
        return
    counters = {name for name, value in model.state_dict().items() if not value.is_floating_point()}
    packed = {name: tensor for name, tensor in packed.items() if name not in counters}
    scales = [name for name in sorted(unexpected) if SCALES.search(name)]
    if not packed and not scales:
        return
    found = next((f"{n} is stored as {t.dtype}" for n, t in packed.items()), None)
    what = quantisation_of(config).get("quant_method", "no method that config.json names")
    raise ValueError(
        f"its weights are quantised by {what}, which transformers did not unpack ("
        f"{found or f'it has no place for {_count(scales)}'}); use the unquantised model, or one that transformers unpacks"
    )


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, or of its part on text; {} if there is none."""
    for part in (config, config.get("text_config") or {}):
        if isinstance(found := part.get("quantization_config"), dict):
            return found
    return {}


def _check_unexpected(
    model: Any,
    unexpected: Iterable[str],
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    method: str | None,
) -> None:
    """See that the model has a place for all that the checkpoint holds."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    beyond = _layers_beyond(unexpected, num_layers)
    towers = [pattern for section, pattern in TOWERS.items() if config.get(section)]
    dropped = [
        name
        for name in sorted(unexpected)
        if not _is_harmless(name, stored.get(name))
        and not beyond.get(name, set()) & MTP_PARTS
        and not any(re.search(pattern, name) for pattern in towers)
        and not (method and CACHE_SCALES.search(name))
    ]
    if not dropped:
        return
    if any(re.search(r"(^|\.)encoder\.", name) for name in dropped):
        advice = "use a decoder-only model"
    elif dropped[0] in beyond:
        advice = f"config.json says num_hidden_layers = {num_layers}: correct that"
    else:
        advice = "correct config.json, or use a checkpoint of this class"
    raise ValueError(
        f"the checkpoint has {_count(dropped)}, which {type(model).__name__} with this config.json does not use, so it would not be the model that was trained;"
        f" {advice}"
    )


def _layers_beyond(names: Iterable[str], num_layers: int | None) -> dict[str, set[str]]:
    """Names of layers that the model does not have → all parts of the same layer."""
    parts: dict[str, set[str]] = {}
    layer_of: dict[str, str] = {}
    for name in names:
        found = re.match(r"(.*?\b(?:layers|h|blocks)\.(\d+))\.(.+)", name)
        if found and num_layers is not None and int(found[2]) >= num_layers:
            layer_of[name] = found[1]
            parts.setdefault(found[1], set()).update(found[3].split("."))
    return {name: parts[layer] for name, layer in layer_of.items()}


def _is_harmless(name: str, tensor: Stored | None) -> bool:
    if HARMLESS.search(name):
        return True
    shape = tensor.shape if tensor else (0,)
    is_mask = len(shape) > 1 and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}
    return bool(MASK.search(name)) and (is_mask or shape in ((), (1,)))


def _check_tied(model: Any, config: Mapping[str, Any]) -> None:
    """See that weights are shared if config.json says so: where a checkpoint has others, transformers takes those."""
    says = [part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {})]
    if True not in says:
        return
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if apart := sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        raise ValueError(
            f"config.json ties {apart[0]} to {tied[apart[0]]} (tie_word_embeddings), but the checkpoint has a different {apart[0]}; set tie_word_embeddings to false if the model was trained with it, or remove it from the checkpoint"
        )


def _check_rope(model: Any, config: Mapping[str, Any]) -> None:
    """See that the model does with positions what config.json says: transformers only logs what it does not know."""
    if not type(model).__module__.startswith("transformers."):
        return
    text = {**config, **(config.get("text_config") or {})}
    said = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(said, dict):
        return
    text_config = model.config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or said
    nested = {name: value for name, value in said.items() if isinstance(value, dict)}
    # A small model need not have layers of each kind.
    layers = [v for name, v in nested.items() if name in kinds or not name.endswith("_attention")]
    layers = layers if nested else [said]
    ignored = set(text_config.ignore_keys_at_rope_validation or ())
    known = {"type", "finetuned", *RopeParameters.__annotations__, *ignored}
    for parameters in layers:
        kind = parameters.get("rope_type", parameters.get("type")) or "default"
        unknown = {
            name
            for name, value in parameters.items()
            if value is not None and name not in known and not _is_read(model, name)
        }
        if kind == "default":
            unknown |= {
                "factor",
                "short_factor",
                "long_factor",
                "low_freq_factor",
            } & parameters.keys()
            unknown -= {name for name in unknown if parameters[name] == 1}
        if unknown:
            raise ValueError(
                f"config.json's rope parameters hold {min(unknown)}, which {type(model).__name__} does not use with the type "
                f"{kind!r}; correct config.json, or use a model that transformers fully supports"
            )
        if kind not in ("default", "mrope") and not _scales_positions(model):
            raise ValueError(
                f"config.json asks for rope parameters of the type {kind!r}, which {type(model).__name__} does not have; correct "
                "config.json, or use another model"
            )


def _is_read(model: Any, name: str) -> bool:
    """Whether the model's own code names a key of its configuration."""
    import inspect

    return any(
        f'"{name}"' in inspect.getsource(sys.modules[kind.__module__])
        for kind in (type(model), type(model.config.get_text_config()))
    )


def _scales_positions(model: Any) -> bool:
    kinds: set[Any] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return bool(kinds - {None, "default"})


def _check_frequencies(model: Any, stored: Mapping[str, Stored]) -> None:
    """See that rotary frequencies which older code stored are those that the model computes."""
    if _scales_positions(model):
        return  # older code stored them before they were scaled
    buffers = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    for name, tensor in sorted(stored.items()):
        alike = [b for b in buffers if tuple(b.shape) == tensor.shape]
        if not name.endswith("inv_freq") or not alike:
            continue
        with safe_open(tensor.file, framework="pt") as file:
            value = file.get_tensor(name)
        limits = torch.finfo(value.dtype)
        rtol, atol = max(2 * limits.eps, 1e-3), max(limits.smallest_normal, 1e-12)
        if not any(torch.allclose(value.float(), b.float().cpu(), rtol, atol) for b in alike):
            raise ValueError(
                f"{name} of the checkpoint does not match rope_theta in config.json; correct config.json"
            )


def _count(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
