"""What a GGUF file says of its model, each key of which is taken or refused.

In:   the fields of a file, and names and shapes of its tensors.
Out:  values of single keys, rotary positions among them, as transformers' configurations have them.

How:  a key that nobody asked for is one that is not understood, and the file is refused for it. What a file does not say is what
      llama.cpp does without it (src/llama-model.cpp, `load_hparams`), which need not be transformers' default.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAYS_NOTHING = (
    "tensor_data_layout",
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
)
"""Keys that change no logit by themselves: the shape of tensors says it, or another key makes use of it."""
ALWAYS, LONG, SHORT = FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
"""Tensors that belong to the configuration: what rotary frequencies are divided by."""


@dataclass(slots=True)
class Metadata:
    """The fields of a file, which notes what was asked for."""

    architecture: str
    fields: Mapping[str, Any]
    """Key → value."""
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor → its shape as torch has it."""
    factors: Mapping[str, list[float]]
    """Factors of rotary frequencies, by the name of their tensor."""
    taken: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """What the file says of this architecture."""
        self.taken.add(key)
        return self.fields.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """The same of what it has to say.

        Raises:
            ValueError: it does not.
        """
        if (value := self.take(key)) is None:
            raise ValueError(f"the file does not say {self.architecture}.{key}; convert it again")
        return value

    def check_taken(self) -> None:
        """See that nothing was overlooked.

        Raises:
            ValueError: the file says something of the model that is not understood here.
        """
        prefix = f"{self.architecture}."
        said = {key.removeprefix(prefix) for key in self.fields if key.startswith(prefix)}
        if rest := sorted(said - self.taken - set(SAYS_NOTHING)):
            raise no_home(f"{prefix}{rest[0]} = {self.fields[prefix + rest[0]]}")


def no_home(what: str) -> ValueError:
    """The error of a file that says what its model cannot be told."""
    return ValueError(
        f"it says {what}, which the model made from it does not support; name the original config.json as teacher.config, or use "
        "the model's safetensors files"
    )


def whole(metadata: Metadata, key: str, value: Any = None) -> int:
    """A number that a file has to say, one for all layers."""
    value = metadata.need(key) if value is None else value
    if not isinstance(value, int):
        raise no_home(f"{metadata.architecture}.{key} = {str(value)[:40]}")
    return value


def epsilon(metadata: Metadata) -> float:
    """What is added to norms, of whichever kind they are."""
    found = [
        metadata.take(f"attention.{name}_epsilon") for name in ("layer_norm_rms", "layer_norm")
    ]
    if not any(found):
        raise ValueError("the file does not say what is added to norms; convert it again")
    return float(found[0] or found[1])


def rope_parameters(
    metadata: Metadata, values: dict[str, Any], *, is_partial: bool
) -> dict[str, Any]:
    """Rotary positions: base, the part of a head that is rotated, and how frequencies are scaled."""
    name, head_dim = metadata.architecture, values["head_dim"]
    theta = float(metadata.take("rope.freq_base", 10_000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = metadata.take("rope.dimension_count", head_dim)
    if is_partial:
        share = rotated / head_dim
        if int(head_dim * share) != rotated:  # as transformers counts
            share = math.nextafter(share, 1)
        rope["partial_rotary_factor"] = share
    elif rotated != head_dim:
        raise no_home(f"{name}.rope.dimension_count = {rotated}")

    factor = metadata.take("rope.scaling.factor", metadata.take("rope.scale_linear")) or 1.0
    kind = metadata.take("rope.scaling.type", "longrope" if LONG in metadata.factors else "linear")
    attention = metadata.take(
        "rope.scaling.attn_factor", metadata.take("rope.scaling.yarn_attn_factor")
    )
    context = values["max_position_embeddings"]
    before = metadata.take("rope.scaling.original_context_length", context)
    if metadata.factors:
        return rope | _factors(metadata, kind, factor, before, attention, context)
    if kind == "yarn":
        return rope | _yarn(metadata, factor, before, attention)
    if kind not in ("linear", "none"):
        raise no_home(f"{name}.rope.scaling.type = {kind}")
    if attention not in (None, 1):
        raise no_home(f"{name}.rope.scaling.attn_factor = {attention}")
    is_scaled = kind == "linear" and factor != 1
    return rope | ({"rope_type": "linear", "factor": float(factor)} if is_scaled else {})


def _factors(
    metadata: Metadata,
    kind: str,
    factor: float,
    before: int,
    attention: float | None,
    context: int,
) -> dict[str, Any]:
    """By what each frequency is divided: one factor for all lengths (Llama 3.1 and later), or one for long sequences (Phi-3)."""
    found = metadata.factors
    if set(found) == {LONG, SHORT} and kind == "longrope" and factor == 1:
        return {
            "rope_type": "longrope",
            "long_factor": found[LONG],
            "short_factor": found[SHORT],
            "original_max_position_embeddings": before,
            "attention_factor": 1.0 if attention is None else float(attention),
        }
    if set(found) == {ALWAYS} and kind in ("linear", "none") and factor == 1 and attention in (None, 1):  # fmt: skip
        return {
            "rope_type": "longrope",
            "long_factor": found[ALWAYS],
            "short_factor": found[ALWAYS],
            "original_max_position_embeddings": context,
            "factor": 1.0,
            "attention_factor": 1.0,
        }
    raise no_home(f"factors of rotary frequencies ({', '.join(sorted(found))}) with other scaling")


def _yarn(
    metadata: Metadata, factor: float, before: int, attention: float | None
) -> dict[str, Any]:
    if metadata.take("rope.scaling.yarn_ext_factor", 1) not in (1, -1):
        raise no_home(f"{metadata.architecture}.rope.scaling.yarn_ext_factor")
    # https://arxiv.org/abs/2309.00071: attention is scaled by 0.1 ln(factor) + 1.
    attention_factor = (1.0 if attention is None else float(attention)) * (
        1 + 0.1 * math.log(factor)
    )
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": before,
        "beta_fast": float(metadata.take("rope.scaling.yarn_beta_fast", 32)),
        "beta_slow": float(metadata.take("rope.scaling.yarn_beta_slow", 1)),
        "attention_factor": attention_factor,
    }
