"""A loaded teacher → its last layer as a formula that others can apply to stored hidden states, or why it has none.

In:   a teacher that comes apart into a body and a head.
Out:  a TeacherHead: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), or without the cap.

How:  there is no table of architectures. W and b are those of the model's output layer; the scale follows from the model's logits of some
      hidden states, and is then the number of the configuration (v, 1/v or v/w) that it comes next to, so that it is the same on every
      machine; a cap is one of the numbers there that are named so. What is found is compared with the model's own code, on hidden
      states as they are and larger ones, at which a cap that was missed, or any other nonlinearity, stands out.

Shape suffixes: N positions, V vocabulary, D hidden.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from builder.teacher.model import PROBE_LENGTHS, PROBE_TOLERANCE, Teacher
from builder.teacher.precision import TOLERANCE, error
from logit_dataset.hidden.head import DTYPES, TeacherHead

LARGE_LOGITS = 200.0
"""Of the larger hidden states: caps are 30 to 50, and scales leave a tenth to a sixteenth of a logit."""
SAME_SCALE = 1e-4
"""Relative distance from the scale that logits show to that of the configuration."""


@torch.inference_mode()
def last_layer(teacher: Teacher) -> TeacherHead:
    """The last layer of a teacher, with weights where the teacher has them.

    Raises:
        ValueError: it is not a linear layer with a scale and a cap, or its weights are not at hand; says what it is.
    """
    name = type(teacher.model).__name__
    layer = teacher.model.get_output_embeddings()
    if not teacher.head_only or not isinstance(layer, nn.Module):
        raise ValueError(f"{name} has no output layer of its own")
    weight_VD, bias_V = getattr(layer, "weight", None), getattr(layer, "bias", None)
    for tensor in (weight_VD, bias_V):
        if tensor is not None and (type(tensor.data) is not Tensor or tensor.is_meta):
            raise ValueError(f"the weights of the output layer of {name} are spread or offloaded")
    if weight_VD is None or weight_VD.ndim != 2 or weight_VD.dtype not in DTYPES.values():
        raise ValueError(f"the output layer of {name} has packed weights")
    head = TeacherHead(weight_VD=weight_VD.data, bias_V=None if bias_V is None else bias_V.data)
    if (head.vocab_size, head.hidden_size) != (teacher.vocab_size, teacher.hidden_size):
        raise ValueError(f"the output layer of {name} does not make all of its logits")
    generator = torch.Generator().manual_seed(2)
    vocab = teacher.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocab, (PROBE_LENGTHS[0],), generator=generator).tolist()
    hidden_ND = teacher.hidden([ids]).half().to(teacher.dtype)  # as it is stored
    plain_NV = _by(head, hidden_ND)
    larger_ND = hidden_ND * max(1.0, LARGE_LOGITS / float(plain_NV.abs().max()))
    for softcap in (None, *_caps(teacher.model.config)):
        scale = _scale(
            _linear_part(_of(teacher, hidden_ND), softcap), plain_NV, teacher.model.config
        )
        if scale is None:
            continue
        found = replace(head, scale=scale, softcap=softcap)
        if all(_is_same(teacher, found, some_ND) for some_ND in (hidden_ND, larger_ND)):
            return found
    raise ValueError(
        f"{name} does more to its logits than a linear layer, a scale and a soft-cap can say"
    )


def _of(teacher: Teacher, hidden_ND: Tensor) -> Tensor:
    return torch.cat([piece.double() for piece in teacher.head(hidden_ND)])


def _by(head: TeacherHead, hidden_ND: Tensor) -> Tensor:
    return head(hidden_ND.to(head.weight_VD.device).double())


def _is_same(teacher: Teacher, head: TeacherHead, hidden_ND: Tensor) -> bool:
    expected_NV, found_NV = _of(teacher, hidden_ND), _by(head, hidden_ND)
    is_exact = teacher.head_dtype == "float32" or teacher.dtype.itemsize >= 4
    limit = TOLERANCE if is_exact else PROBE_TOLERANCE[teacher.dtype]
    is_finite = bool(expected_NV.isfinite().all() and found_NV.isfinite().all())
    return is_finite and error(found_NV.to(expected_NV.device), expected_NV) <= limit


def _linear_part(logits_NV: Tensor, softcap: float | None) -> Tensor:
    """Logits before they were capped."""
    if softcap is None:
        return logits_NV
    inside_NV = (logits_NV / softcap).clamp(-1 + 1e-6, 1 - 1e-6)
    return softcap * inside_NV.atanh()


def _scale(logits_NV: Tensor, plain_NV: Tensor, config: Any) -> float | None:
    """The number of a configuration by which plain logits were multiplied; None if there is no such number."""
    plain_NV = plain_NV.to(logits_NV.device)
    shown = float((logits_NV * plain_NV).sum() / (plain_NV * plain_NV).sum())
    near = (v for v in _numbers_of(config) if abs(v - shown) <= SAME_SCALE * abs(shown))
    return next(near, None)


def _caps(config: Any) -> list[float]:
    found = {float(v) for key, v in _items(config.to_dict()) if "cap" in key and v > 0}
    return sorted(found)


def _numbers_of(config: Any) -> Iterator[float]:
    """1, then every number, its inverse, and every quotient."""
    found = sorted({float(value) for _, value in _items(config.to_dict()) if value})
    yield 1.0
    yield from found
    yield from (1 / value for value in found)
    yield from (one / other for one in found for other in found)


def _items(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _items(value, str(name))
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield key, values
