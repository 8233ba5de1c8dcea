"""A checkpoint that also reads pictures or sound → the class that reads its text, without the weights of what does not.

In:   config.json; then the model as transformers has loaded it.
Out:  the family of classes that loads it; the same model, whose towers hold no numbers.

How:  most such checkpoints exist only as a whole (Mistral 3, Qwen-VL, Kimi K2.5), and their text alone is right in their own class
      only, for it decides how positions are counted. So that class runs, on token ids and nothing else. Text does not pass through the
      towers that read pictures and sound. Their weights are taken from the checkpoint and looked at like all others; then their
      memory is given back, before the model moves to its device. The layers between tower and text stay, for they are small.

      A tower whose weights are gone cannot be passed by mistake: shapes do not fit.

Cost: the towers are read from the disk.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

MODALITIES = ("image", "video", "audio")


def family_of(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The class of transformers that finds a model for a configuration: that of causal models, if it knows it."""
    named = getattr(config, "auto_map", {}) if trust_remote_code else {}
    is_causal = (
        "AutoModelForCausalLM" in named or type(config) in AutoModelForCausalLM._model_mapping
    )
    is_multimodal = type(config) in AutoModelForMultimodalLM._model_mapping
    return AutoModelForMultimodalLM if is_multimodal and not is_causal else AutoModelForCausalLM


def empty_towers(model: Any) -> bool:
    """Give back the memory of what reads pictures and sound; whether there is such a part.

    Raises:
        ValueError: the model takes no token ids.
    """
    try:
        kept = {model.get_input_embeddings().weight, *_head_weights(model)}
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"{type(model).__name__} is not a causal language model: it takes no token ids; use a decoder-only model"
        ) from None
    is_cut = False
    for tower in _towers(model):
        parameters = list(tower.parameters())
        if not kept.isdisjoint(parameters):
            continue
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            is_cut = True
    return is_cut


def _head_weights(model: Any) -> set[Any]:
    head = model.get_output_embeddings()
    return set() if head is None else set(head.parameters())


def _towers(model: Any) -> list[nn.Module]:
    if not hasattr(model, "get_encoder"):
        return []
    found = [model.get_encoder(modality=modality) for modality in MODALITIES]
    # Where there is none, it is the model, or what the model is based on.
    return [part for part in found if isinstance(part, nn.Module) and not _holds_text(model, part)]


def _holds_text(model: Any, part: nn.Module) -> bool:
    embeddings = model.get_input_embeddings()
    return part is model or any(module is embeddings for module in part.modules())
