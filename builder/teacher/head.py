"""A causal language model → its body, and its head as something that runs alone.

Out:  the module that turns ids into hidden states; and a view of the model, with the same weights, whose body hands over the hidden
      states that it is given, so that the model's own forward method applies its head to them, with all that belongs to it.

How:  the body is the module that `base_model_prefix` names, or `model` where it names none (Llama 4). Some forward methods call a part of
      the body instead of the body (`model.decoder` of OPT and of BART's family), and some read the body's attributes (multipliers of
      Falcon-H1): the stand-in has those. Whether all of that is right, `Teacher` finds out.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


def body_of(model: Any) -> nn.Module:
    """What turns ids into last hidden states.

    Raises:
        AttributeError: there is no such module.
    """
    body: nn.Module = model.get_submodule(_body_name(model))
    return body


def head_of(model: Any) -> Any:
    """A view of the model that shares its weights, whose body hands over given hidden states.

    Raises:
        AttributeError: it has no body that could be replaced.
    """
    name = _body_name(model)
    head = copy.copy(model)
    # accelerate puts a method of its own on a model that is spread over devices, which would run the original's body.
    head.__dict__.pop("forward", None)
    head._modules = {**model._modules, name: _Handover(model._modules[name])}
    return head


def _body_name(model: Any) -> str:
    for name in (model.base_model_prefix, "model"):
        if name in model._modules:
            return str(name)
    raise AttributeError(
        f"{type(model).__name__} has no body by the name of {model.base_model_prefix}"
    )


class _Handover(nn.Module):
    """Stands where a body was, and returns the hidden states that it is given as inputs_embeds. What else it is asked for, is the body's."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.__dict__["_body"] = body  # not as a part of its own

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_Handed":
        return _Handed(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_body"], name)
        return _Handover(value) if name == "decoder" else value


class _Handed(BaseModelOutput):
    """A body's output that answers None for whatever else a head may ask for (router logits, caches, …)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
