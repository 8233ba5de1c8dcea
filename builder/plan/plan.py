"""A recipe and a number of tokens → what building that takes, on paper: GPU hours, bytes, files, commits, days.

In:   a recipe, a number of tokens, a GPU's peak and what of it is used, a number of workers, the network.
Out:  numbers that follow from these by formulas alone. Nothing is run, read from the corpus or asked of the Hub.

Compute:  a forward pass costs 2 FLOP a parameter and token, and 2 · layers · length · width more for attention (Kaplan et al. 2020,
          Scaling Laws for Neural Language Models, section 2.1 and table 1). Statistics, writing and sending hide behind it
          (README, Speed). How much of a GPU's peak that reaches was measured on an H100 (MEASURED), by the size of the teacher;
          other GPUs are taken to reach the same share of theirs.
Storage:  bytes per token as measured of the embedded dataset (`bytes_per_token`); files as the recipe cuts them.
The Hub:  its limits (`remote`), and how many shards an `outbox` brings in a commit.
"""

import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from builder.dataset.printable import as_size, duration
from builder.hub.limits import (
    COMMITS_PER_HOUR,
    DISCARDED_TOGETHER,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_LOCAL_SHARDS,
)
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
MBIT = 1000
"""Of upload a second; assumed."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a build takes, on paper."""

    tokens: int
    parameters: float
    attention_share: float
    """Of the FLOP a token."""
    flop_per_token: float
    gpu: str | None
    """None for other hardware."""
    peak_flops: float
    utilization: float
    """Share of the peak."""
    utilization_is: str
    """Where that is from: `measured`, `as others on an H100`, or `given`."""
    tokens_per_second: float
    """Of one GPU."""
    gpu_hours: float
    workers: int
    """That have something to do: no more than partitions."""
    bytes: float
    bytes_per_token: float
    shards: int
    shard_bytes: float
    commits: int
    """Of a build that discards its shards; one that keeps them needs fewer."""
    commit_hours: float
    """That have to pass until the Hub has allowed so many."""
    upload_mbit: float
    upload_hours: float
    disk_bytes: float
    """That a build needs which discards its shards."""
    hours: float
    """From beginning to end: the longest of computing, sending and committing, which go on at the same time."""
    limit: str
    """Which of them that is."""
    advice: list[str]
    """What would not work, or not help."""


def work(
    recipe: Recipe,
    base: Path,
    tokens: int | None,
    *,
    gpu: str = "h100",
    peak_tflops: float | None = None,
    utilization: float | None = None,
    parameters: float | None = None,
    workers: int = 1,
    mbit: float = MBIT,
) -> Work:
    """What building `tokens` tokens of a recipe takes.

    Args:
        recipe: what would be built.
        base: directory at which its relative paths start.
        tokens: to capture; the recipe's `max_tokens` if None.
        gpu: a key of GPUS.
        peak_tflops: of other hardware, in place of the GPU's.
        utilization: share of the peak that the build reaches; None for what was measured.
        parameters: of the teacher, where it cannot be seen.
        workers: GPUs, each with a copy of the teacher, or `tensor_parallel` of them together.
        mbit: of upload a second, for all workers together.

    Raises:
        ValueError: something is needed that neither the recipe nor the arguments say.
    """
    tokens = tokens or recipe.corpus.max_tokens
    if not tokens:
        raise ValueError("the recipe has no corpus.max_tokens; say how many with --tokens 1e9")
    shape = teacher_shape(recipe, base, parameters)
    output = recipe.output
    if shape.is_guessed and (output.top_k == "all" or output.hidden_states):
        raise ValueError(
            "what this recipe keeps depends on the teacher's config.json; make it local, and name it as teacher.path"
        )
    flop = flop_per_token(shape, recipe.sequences.max_length)
    peak = GPUS[gpu].bits32 if recipe.teacher.dtype == "float32" else GPUS[gpu].bits16
    peak_flops = 1e12 * (peak_tflops or peak)
    origin = "given"
    if utilization is None:
        bits = 32 if recipe.teacher.dtype == "float32" else 16
        utilization = measured_utilization(shape.parameters, bits=bits)
        # 8B teachers have somewhat more than 8e9 parameters.
        sizes = MEASURED[0][0].parameters, 1.1 * MEASURED[-1][0].parameters
        is_measured = sizes[0] <= shape.parameters <= sizes[1] and bits == 16
        is_here = gpu == MEASURED_GPU and peak_tflops is None
        origin = "measured" if is_measured and is_here else "as others on an H100"
    rate = peak_flops * utilization / flop
    gpu_hours = tokens / rate / 3600

    per_token = bytes_per_token(
        recipe, vocab_size=shape.vocab_size, hidden_size=0 if shape.is_guessed else int(shape.width)
    )
    shards = count_shards(recipe, tokens)
    size = tokens * per_token
    commits = math.ceil(shards / DISCARDED_TOGETHER) + 2  # the card, and main
    gpus_each = recipe.teacher.tensor_parallel or 1
    if workers < gpus_each:
        raise ValueError(
            f"--workers is {workers}, but teacher.tensor_parallel is {gpus_each}: one copy of the teacher takes so many GPUs"
        )
    copies = min(workers // gpus_each, output.partitions)
    busy = copies * gpus_each
    hours = {
        "computing": gpu_hours / busy,
        "sending": size * 8 / (mbit * 1e6) / 3600,
        "committing": (commits - 1) // COMMITS_PER_HOUR,
    }
    limit = max(hours, key=lambda name: hours[name])
    return Work(
        tokens=tokens,
        parameters=shape.parameters,
        attention_share=1 - 2 * shape.parameters / flop,
        flop_per_token=flop,
        gpu=gpu if peak_tflops is None else None,
        peak_flops=peak_flops,
        utilization=utilization,
        utilization_is=origin,
        tokens_per_second=rate,
        gpu_hours=gpu_hours,
        workers=busy,
        bytes=size,
        bytes_per_token=per_token,
        shards=shards,
        shard_bytes=size / shards,
        commits=commits,
        commit_hours=hours["committing"],
        upload_mbit=mbit,
        upload_hours=hours["sending"],
        disk_bytes=(MAX_LOCAL_SHARDS + copies - 1) * size / shards,
        hours=hours[limit],
        limit=limit,
        advice=_advice(recipe, tokens, per_token, workers - busy, limit),
    )


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


def count_shards(recipe: Recipe, tokens: int) -> int:
    """Of a build of `tokens` tokens: no more, for a shard ends with the document that reaches its number of tokens."""
    held_out = round(tokens * (recipe.output.validation or 0))
    return _count(recipe, tokens - held_out) + (_count(recipe, held_out) if held_out else 0)


def _count(recipe: Recipe, tokens: int) -> int:
    """Of one split."""
    partitions, shard_tokens = recipe.output.partitions, recipe.output.shard_tokens
    share, rest = divmod(tokens, partitions)
    larger, smaller = (max(1, math.ceil(n / shard_tokens)) for n in (share + 1, share))
    return rest * larger + (partitions - rest) * smaller


def too_many_files(recipe: Recipe, tokens: int) -> str | None:
    """Why the Hub does not take a build of `tokens` tokens, and what would do; None if its files are not too many."""
    shards, partitions = count_shards(recipe, tokens), recipe.output.partitions
    if shards <= MAX_FILES:
        return None
    if partitions > MAX_FILES:
        what = f"output.partitions has to be {MAX_FILES:_} or less"
    else:
        least = math.ceil(math.ceil(tokens / partitions) / (MAX_FILES // partitions) / 1e6)
        what = f"output.shard_tokens has to be {least * 1_000_000:_} or more"
    return f"the Hub takes {MAX_FILES:,} files, not {shards:,}: {what}"


def too_large_files(recipe: Recipe, tokens: int | None, per_token: float) -> str | None:
    """The same of files that are too large.

    Args:
        recipe: what is built.
        tokens: that are built; None if that is not known.
        per_token: bytes of each.
    """
    output = recipe.output
    shard_tokens = min(output.shard_tokens, (tokens or math.inf) / output.partitions)
    if shard_tokens * per_token <= MAX_FILE_BYTES:
        return None
    limit = f"the Hub takes files of up to {MAX_FILE_BYTES / 1e9:.0f} GB"
    if (tokens or 0) * per_token > (all_bytes := MAX_FILES * MAX_FILE_BYTES):
        return f"{limit}, so {MAX_FILES:,} of them hold {all_bytes / 1e12:.0f} TB"
    most = int(MAX_FILE_BYTES / per_token)
    return (
        f"{limit}, not {as_size(shard_tokens * per_token)}: output.shard_tokens has to be "
        f"{most // 1000 * 1000 or most:_} or less"
    )


def _advice(recipe: Recipe, tokens: int, per_token: float, idle: int, limit: str) -> list[str]:
    lines = []
    if recipe.generation:
        lines.append(
            "the teacher writes, which is not counted: a token at a time, and limited by memory rather than by FLOP"
        )
    if recipe.sequences.batch_tokens == "auto":
        lines.append(
            'sequences.batch_tokens = "auto" is settled when the build begins, by a trial of some seconds on its device'
        )
    if recipe.output.completions_only:
        lines.append(
            "bytes are counted as if all positions were kept: output.completions_only keeps fewer"
        )
    too_many = too_many_files(recipe, tokens)
    lines += filter(None, (too_many, too_large_files(recipe, tokens, per_token)))
    if idle:
        lines.append(
            f"output.partitions is {recipe.output.partitions}: {idle} of the GPUs have nothing to do"
        )
    if limit == "committing" and not too_many:
        lines.append(
            f"{COMMITS_PER_HOUR} commits an hour are all that the Hub allows: choose a larger output.shard_tokens"
        )
    return lines


def describe(work: Work) -> str:
    """What it takes, for a person."""
    gpus = f"{work.workers} GPU{'s' if work.workers > 1 else ''}"
    lines = {
        "teacher": f"{work.parameters:,.0f} parameters: {work.flop_per_token / 1e9:,.3g} GFLOP per token, "
        f"{work.attention_share:.0%} of it for attention",
        "speed": f"{work.tokens_per_second:,.0f} tokens/s: {work.utilization:.0%} ({work.utilization_is}) of {work.peak_flops / 1e12:,.4g} "
        f"TFLOPS{f' of one {work.gpu}' if work.gpu else ''}",
        "compute": f"{work.gpu_hours:,.1f} GPU hours for {work.tokens:,} tokens: {duration(3600 * work.gpu_hours / work.workers)} on {gpus}",
        "data": f"{as_size(work.bytes)}, {work.bytes_per_token:.0f} bytes per token, in {work.shards:,} shards of {as_size(work.shard_bytes)}",
        "the Hub": f"{duration(3600 * work.upload_hours)} to send at {work.upload_mbit:,.0f} Mbit/s; {work.commits:,} commits, for which "
        f"at least {duration(3600 * work.commit_hours)} have to pass",
        "disk": f"{as_size(work.disk_bytes)} with --publish-to ORG/NAME --discard-local",
        "together": f"{duration(3600 * work.hours)}: all of it goes on at the same time, and {work.limit} takes longest",
    }
    listed = [f"{key:<10}{value}" for key, value in lines.items()]
    return "\n".join([*listed, *(f"but       {line}" for line in work.advice)])


def bytes_per_token(
    recipe: Recipe, *, vocab_size: int = 0, hidden_size: int = 0, kept_share: float = 1.0
) -> float:
    """What a token takes on disk, of a teacher whose vocabulary needs two bytes.

    Those of the embedded dataset (README): an entry of the top K takes 3.0 and the rest of a token 12.

    Args:
        recipe: the recipe.
        vocab_size: of the teacher; needed where all log-probabilities are kept.
        hidden_size: of the teacher; needed where hidden states are kept.
        kept_share: share of the positions of which the columns of several values are kept.
    """
    output, per_entry = recipe.output, 2.8 if recipe.output.profile == "compact" else 3.0
    size = 10.0 + 3.5 * len(output.temperatures) + (2 if output.text else 0)
    wide = 1.8 * hidden_size if output.hidden_states else 0.0
    if output.top_k == "all":
        wide += 1.5 * vocab_size
    else:
        per_draw = 3.5 if output.tail_logprobs else 1.8
        wide += per_entry * output.top_k + per_draw * output.tail_samples
    return size + kept_share * wide


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
            "how large the teacher is cannot be seen without the Hub; say it with --parameters 8e9"
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
