"""A recipe and a number of tokens → what building that takes, on paper: GPU hours, bytes, files, commits, days.

In:   a recipe, a number of tokens, a GPU's peak and what of it is used, a number of workers, the network.
Out:  numbers that follow from these by formulas alone. Nothing is run, read from the corpus or asked of the Hub.

How:  computing (`compute`), sending, and committing at the rate that the Hub allows (`limits`) go on at the same time, so that the
      longest of them decides. Bytes and files are those of `storage`; how many shards come in a commit, an `outbox` says.

Cost: none, but the heads of a local teacher's weights.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from builder.dataset.printable import as_size, counted, duration
from builder.hub.limits import COMMITS_PER_HOUR, DISCARDED_TOGETHER, MAX_LOCAL_SHARDS
from builder.plan.compute import (
    GPUS,
    MEASURED,
    MEASURED_GPU,
    flop_per_token,
    measured_utilization,
    teacher_shape,
)
from builder.plan.storage import bytes_per_token, count_shards, too_large_files, too_many_files
from builder.recipe.recipe import Recipe

MBIT = 1000
"""Of upload a second; assumed."""


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
        raise ValueError(
            "the recipe has no corpus.max_tokens; give the number of tokens, such as --tokens 1e9"
        )
    shape = teacher_shape(recipe, base, parameters)
    output = recipe.output
    if shape.is_guessed and (output.top_k == "all" or output.hidden_states):
        raise ValueError(
            "the size of a row depends on the teacher's config.json, which is not local; download the teacher, and set teacher.path"
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
            f"--workers is {workers}, but teacher.tensor_parallel is {gpus_each}, the GPUs of one copy of the teacher; use at least {gpus_each} workers"
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


def _advice(recipe: Recipe, tokens: int, per_token: float, idle: int, limit: str) -> list[str]:
    lines = []
    if recipe.generation:
        lines.append(
            "the time that the teacher takes to generate is not included: it generates one token at a time, limited by memory rather than by FLOP"
        )
    if recipe.sequences.batch_tokens == "auto":
        lines.append(
            'sequences.batch_tokens = "auto" is chosen when the build begins, by a trial of a few seconds on its device'
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
            f"{COMMITS_PER_HOUR} commits per hour are the Hub's limit: choose a larger output.shard_tokens"
        )
    return lines


def describe(work: Work) -> str:
    """What it takes, for a person."""
    gpus = counted(work.workers, "GPU")
    lines = {
        "teacher": f"{work.parameters:,.0f} parameters: {work.flop_per_token / 1e9:,.3g} GFLOP per token, "
        f"{work.attention_share:.0%} of it for attention",
        "speed": f"{work.tokens_per_second:,.0f} tokens/s: {work.utilization:.0%} ({work.utilization_is}) of {work.peak_flops / 1e12:,.4g} "
        f"TFLOPS{f' of one {work.gpu}' if work.gpu else ''}",
        "compute": f"{work.gpu_hours:,.1f} GPU hours for {work.tokens:,} tokens: {duration(3600 * work.gpu_hours / work.workers)} on {gpus}",
        "data": f"{as_size(work.bytes)}, {work.bytes_per_token:.0f} bytes per token, in {counted(work.shards, 'shard')} of {as_size(work.shard_bytes)}",
        "the Hub": f"{duration(3600 * work.upload_hours)} to send at {work.upload_mbit:,.0f} Mbit/s; {counted(work.commits, 'commit')}, which take at least {duration(3600 * work.commit_hours)}"
        f"",
        "disk": f"{as_size(work.disk_bytes)} with --publish-to ORG/NAME --discard-local",
        "together": f"{duration(3600 * work.hours)}: all steps run at the same time, and {work.limit} takes longest",
    }
    listed = [f"{key:<10}{value}" for key, value in lines.items()]
    return "\n".join([*listed, *(f"but       {line}" for line in work.advice)])
