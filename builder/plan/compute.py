"""A teacher's shape and a GPU → FLOP per token, and how much of the GPU's peak a forward pass reaches.

In:   the config.json and weights of a teacher on disk, or its number of parameters.
Out:  a Shape, and numbers that follow from it by formulas alone.

How:  a forward pass costs 2 FLOP a parameter and token, and 2 · layers · length · width more for attention (Kaplan et al. 2020,
      Scaling Laws for Neural Language Models, section 2.1 and table 1). Statistics, writing and sending hide behind it
      (README, Speed). How much of a GPU's peak that reaches was measured on an H100 (MEASURED), by the size of the teacher;
      other GPUs are taken to reach the same share of theirs.

Cost: the heads of the safetensors files are read, and no weights.
"""

import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from builder.recipe.recipe import Recipe
from builder.sources.resolve import local_teacher


class Peak(NamedTuple):
    """Matrix products of a GPU at its best, in TFLOPS: dense, that is half of what data sheets give with sparsity."""

    bits16: float
    bits32: float
    """Without TF32, which torch does not use unless it is told to."""


GPUS = {
    "a100": Peak(312, 19.5),  # NVIDIA A100 Tensor Core GPU data sheet, SXM
    "h100": Peak(989, 67),  # NVIDIA H100 Tensor Core GPU data sheet, SXM
    "h200": Peak(989, 67),  # NVIDIA H200 Tensor Core GPU data sheet, SXM
    "b200": Peak(2250, 75),  # NVIDIA Blackwell data sheet, HGX B200, an eighth of it
    "l4": Peak(121, 30.3),  # NVIDIA L4 Tensor Core GPU data sheet
    "l40s": Peak(362, 91.6),  # NVIDIA L40S data sheet
    "mi300x": Peak(1307, 163.4),  # AMD Instinct MI300X data sheet
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a teacher decides the cost of its forward pass and of what is kept."""

    parameters: float
    layers: float
    width: float
    vocab_size: int = 0
    """0 where it is not known."""
    is_guessed: bool = False
    """Whether layers and width follow from the number of parameters."""

    @classmethod
    def of(cls, parameters: float) -> "Shape":
        """A usual one: parameters = 12 · layers · width² (Kaplan et al. 2020, section 2.1), width = 128 · layers (Llama 3 8B)."""
        layers = (parameters / (12 * 128**2)) ** (1 / 3)
        return cls(parameters=parameters, layers=layers, width=128 * layers, is_guessed=True)


EMBEDDED = Shape(parameters=134_515_008, layers=30, width=576, vocab_size=49_152)
"""Of SmolLM2-135M."""

MEASURED_GPU, MEASURED_LENGTH = "h100", 1024
MEASURED = (
    (EMBEDDED, 393_543),
    (Shape(parameters=0.6e9, layers=28, width=1024, vocab_size=151_936), 174_961),
    (Shape(parameters=1.2e9, layers=16, width=2048, vocab_size=128_256), 132_971),
    (Shape(parameters=8e9, layers=36, width=4096, vocab_size=151_936), 23_667),
)
"""Teachers, smallest first, and tokens/s of their forward pass in bfloat16, body and head: random weights of Llama's shape, sequences of 64
to MEASURED_LENGTH tokens, 16,384 positions in a batch, one H100 SXM, torch 2.11."""
MEASURED_FLOAT32 = 66_700
"""The same of EMBEDDED in float32."""


def flop_per_token(shape: Shape, length: int) -> float:
    """Of a forward pass over sequences of `length` tokens."""
    return 2 * shape.parameters + 2 * shape.layers * length * shape.width


def measured_utilization(parameters: float, *, bits: int) -> float:
    """Share of its peak that an H100 reached in a forward pass of a teacher of this size; between those that were measured, by the log of it."""
    peak = GPUS[MEASURED_GPU]
    if bits == 32:
        return MEASURED_FLOAT32 * flop_per_token(EMBEDDED, MEASURED_LENGTH) / (1e12 * peak.bits32)
    points = [
        (
            math.log(shape.parameters),
            rate * flop_per_token(shape, MEASURED_LENGTH) / (1e12 * peak.bits16),
        )
        for shape, rate in MEASURED
    ]
    size = min(max(math.log(parameters), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in itertools.pairwise(points) if size <= pair[1][0])
    return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


def teacher_shape(recipe: Recipe, base: Path, parameters: float | None = None) -> Shape:
    """The shape of a recipe's teacher, from its files where they are here, else from its number of parameters.

    Raises:
        ValueError: neither is there.
    """
    teacher = recipe.teacher
    if teacher.embedded:
        return EMBEDDED
    if teacher.path and (directory := local_teacher(teacher, base)):
        config = _config(directory)
        counted = parameters or count_parameters(directory)
        if config and counted:
            return Shape(
                parameters=counted,
                layers=config["num_hidden_layers"],
                width=config["hidden_size"],
                vocab_size=config["vocab_size"],
            )
    if parameters is None:
        raise ValueError(
            "the size of the teacher is unknown without the Hub; give it, such as --parameters 8e9"
        )
    return Shape.of(parameters)


def count_parameters(directory: Path) -> int | None:
    """Parameters in the safetensors files of a directory, from their heads alone; None if there are none."""
    total = 0
    for weights in directory.glob("*.safetensors"):
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        total += sum(
            math.prod(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"
        )
    return total or None


def _config(directory: Path) -> dict[str, Any] | None:
    """A teacher's config.json, or the part that is about text, if it says what is needed."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    config = config.get("text_config", config)
    needed = {"num_hidden_layers", "hidden_size", "vocab_size"}
    return config if needed <= config.keys() else None
