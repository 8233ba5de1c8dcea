"""A teacher on its device, and the beginning of a corpus → how many positions a batch should have.

In:   the teacher, what is to be stored, and sequences as a build would take them.
Out:  a size of batches, with the rates of those that were tried.

How:  small batches leave a fast device waiting for the next launch, and large ones gain nothing or lose, at a size that depends on the
      device and on the teacher. So some sizes are tried, from the smallest up. Of each, a window is taken as a build takes it, and the
      middle one of its length-sorted batches runs through the capture again and again, one in flight while the next is launched; the
      padding of the whole window counts. Of the sizes whose rate is within TOLERANCE of the best, the smallest is taken: it needs
      the least memory. One that does not fit in memory ends the trial, and so does the time.

Cost: about MAX_SECONDS at most, unless compiling or a quarter of the smallest size takes longer; and reading the sample.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from builder.capture.pipeline import Pipeline
from builder.corpus.sequences import Sequence, length_sorted_batches
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout

CUDA_SIZES = (4_096, 16_384, 32_768, 65_536)
CPU_SIZES = (1_024, 4_096, 16_384)
TOLERANCE = 0.03
"""Of a rate, which is noise or not worth the memory."""
HOPELESS = 0.9
"""Of the best rate: a size below is the last one that is tried."""
MAX_SECONDS = 10.0
"""For all sizes together."""
SIZE_SECONDS = 0.5
"""A size is measured at least so long; one that takes longer for a single run is not run again."""
MAX_SAMPLE_TOKENS = 262_144
"""Of the corpus, that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How a trial went."""

    batch_tokens: int
    """The size that was taken."""
    rates: dict[int, float | None]
    """Size → tokens/s of what was tried; None where it does not fit in memory."""

    def __str__(self) -> str:
        tried = [
            f"{size:,}: {f'{rate:,.0f} tokens/s' if rate else 'does not fit in memory'}"
            for size, rate in self.rates.items()
        ]
        why = f" ({'; '.join(tried)})" if tried else ", untried: this teacher is slow at any size"
        return f'sequences.batch_tokens = "auto" is {self.batch_tokens:,} for this build{why}'


def try_sizes(
    teacher: Teacher,
    sequences: Iterator[Sequence],
    *,
    layout: Layout,
    sizes: tuple[int, ...] | None = None,
) -> Trial:
    """Find the size of batches at which a teacher is fastest.

    Args:
        teacher: whose head runs alone; others take one sequence at a time, whatever the size.
        sequences: of a shard; they are taken as far as they are needed. At least one.
        layout: what is to be stored.
        sizes: to try, in positions, from the smallest; None for those that suit the device.

    Raises:
        ValueError: what the sequences raise.
    """
    is_cuda = teacher.device.type == "cuda"
    sizes = sizes or (CUDA_SIZES if is_cuda else CPU_SIZES)
    sample: list[Sequence] = []
    rates: dict[int, float | None] = {}
    started, best = time.perf_counter(), 0.0
    # A quarter of the smallest one tells whether there is time for it, and has compiled what is to be compiled.
    for size in (sizes[0] // 4, *sizes):
        spent = time.perf_counter() - started
        if best and spent + (2 if is_cuda else 1) * size / best > MAX_SECONDS:
            break
        pipeline = Pipeline(teacher, layout=layout, batch_tokens=size)
        _extend(sample, sequences, min(pipeline.window_tokens, MAX_SAMPLE_TOKENS))
        try:
            found = _rate(pipeline, teacher, _first(sample, pipeline.window_tokens), size)
        except torch.OutOfMemoryError:
            rates[size] = None
            break
        best = max(best, found)
        if size >= sizes[0]:
            rates[size] = found
            are_all_in_one = size >= min(pipeline.window_tokens, sum(map(_length, sample)))
            if are_all_in_one or found < HOPELESS * best:
                break
    if is_cuda:
        torch.cuda.empty_cache()
    fitting = {size: found for size, found in rates.items() if found}
    least = (1 - TOLERANCE) * max(fitting.values(), default=0.0)
    chosen = next((size for size, found in fitting.items() if found >= least), sizes[0])
    return Trial(batch_tokens=chosen, rates=rates)


def _rate(pipeline: Pipeline, teacher: Teacher, window: list[Sequence], size: int) -> float:
    """Tokens a second over a window, by the batch in its middle."""
    lengths = list(map(_length, window))
    batches = length_sorted_batches(lengths, size, teacher.reach)
    positions = [len(batch) * lengths[batch[0]] for batch in batches]
    middle = (len(batches) - 1) // 2
    is_cuda = teacher.device.type == "cuda"
    seconds = _seconds(pipeline, [window[i] for i in batches[middle]], is_cuda=is_cuda)
    return sum(lengths) * positions[middle] / (sum(positions) * seconds)


def _seconds(pipeline: Pipeline, sequences: list[Sequence], *, is_cuda: bool) -> float:
    """What a batch takes, of several in a row."""
    batch = pipeline.batch(sequences)
    for is_counted in (
        not is_cuda,
        True,
    ):  # what a GPU runs for the first time may have to be compiled
        started = time.perf_counter()
        pipeline.start(batch)()
        if (elapsed := time.perf_counter() - started) > SIZE_SECONDS and is_counted:
            return elapsed
    started, runs = time.perf_counter(), 0
    arrive = pipeline.start(batch)
    while time.perf_counter() - started < SIZE_SECONDS:
        following = pipeline.start(batch)
        arrive()
        arrive, runs = following, runs + 1
    arrive()
    return (time.perf_counter() - started) / (runs + 1)


def _extend(sample: list[Sequence], sequences: Iterator[Sequence], tokens: int) -> None:
    """Take more sequences, until the sample has so many tokens."""
    have = sum(map(_length, sample))
    while have < tokens and (sequence := next(sequences, None)):
        sample.append(sequence)
        have += _length(sequence)


def _first(sample: list[Sequence], tokens: int) -> list[Sequence]:
    """The first window of a sample."""
    window: list[Sequence] = []
    room = tokens
    for sequence in sample:
        room -= _length(sequence)
        if window and room < 0:
            break
        window.append(sequence)
    return window


def _length(sequence: Sequence) -> int:
    return len(sequence.token_ids)
