"""Rows as they came out of a batch, and the same rows run alone → an error where a row depends on its batch.

In:   the batches of a build, as they come back.
Out:  nothing; or ValueError, which names the document.

How:  that a row does not depend on what shares its batch is tested for every architecture that transformers knows
      (`tests.architectures`), and `Teacher.reach` keeps apart what must not be together. This looks at what really happens, for models
      and kernels that nobody has tried. Of some batches of unequal lengths, one of the shorter sequences is run again by itself: first
      the shortest, which has the most padding, then others, too. Stored values are compared at all of its positions: the mean |Δ| of
      the column that is furthest off. Where that is more than NOISE, the noise is measured: the same sequence in a batch of as many
      positions, of itself alone. The build stops where the row is more than FACTOR times as far off as that.

Cost: of the first batch of unequal lengths a short sequence; of the second, third, fifth, eighth and so on one that keeps all of them
      together below TOKEN_SHARE of all tokens. Of 10,000 batches, 19 sequences are run twice. The data are the same without it.
"""

import torch
from torch import Tensor

from builder.capture.distribution import Distribution
from builder.corpus.sequences import Sequence
from logit_dataset.schema import float16_rounding

NOISE = {torch.float32: 2e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Mean |Δ| of a row in nats that needs no explanation: in float32 what `verify` forgives each value, in bfloat16 what rounding does to a
forward pass (the embedded teacher against itself in float32: 0.056), in float16, which has three bits more, less."""
LOGSUMEXP_ROUNDING = {dtype: torch.finfo(dtype).eps for dtype in NOISE}
"""Of its size, what of |Δ logsumexp| needs no explanation either: it is of raw logits, whose rounding grows with them, and most of it is the
same for all logits of a position, so that log-probabilities do not show it (the embedded teacher in bfloat16 at 12 positions, in a batch
and alone: 0.102, log-probabilities 0.033; either against float32: 0.107 and 0.094)."""
FACTOR = 4
"""What is more than NOISE has to be so many times the noise that was measured, to be an error."""
MIN_TOKENS = 8
"""A shorter sequence says little."""
TOKEN_SHARE = 0.005
"""Of all tokens so far, those that may be run twice; the first time it does not count."""
LOWEST = -30.0
"""Log-probabilities below are taken for this one."""


class Guard:
    """Chooses, now and then, a sequence of a build that is to be run alone."""

    def __init__(self) -> None:
        self._due, self._then = 1, 2
        self._mixed = self._checks = self._tokens = self._again = 0

    def choose(self, sequences: list[Sequence]) -> int | None:
        """The one of a batch that is to be run alone, if any."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        self._tokens += sum(lengths)
        shorter = [i for i, length in enumerate(lengths) if length < max(lengths)]
        if not shorter:
            return None
        self._mixed += 1
        if self._mixed < self._due:
            return None
        # From the one with the most padding to that with the least. Some effects begin beyond a length.
        shorter.sort(key=lambda i: (lengths[i] < MIN_TOKENS, abs(lengths[i] - MIN_TOKENS)))
        if self._checks:
            room = TOKEN_SHARE * self._tokens - self._again
            shorter = [i for i in shorter if lengths[i] <= room]
            if not shorter:
                return None
        chosen = shorter[(len(shorter) - 1) * (self._checks % 3) // 2]
        self._checks += 1
        self._again += lengths[chosen]
        while self._due <= self._mixed:
            self._due, self._then = self._then, self._due + self._then
        return chosen


def distance(found: Distribution, expected: Distribution, dtype: torch.dtype) -> float:
    """Mean |Δ| of one row in nats, beyond the rounding of what is stored, in the column that is furthest off.

    Log-probabilities of a top K are compared by their ranks, so that ties do not count.

    Args:
        found: the row.
        expected: the same row, computed otherwise.
        dtype: of the teacher, which rounds `logsumexp`.
    """
    worst = 0.0
    for name, values in found.items():
        if not values.is_floating_point() or name in ("tail_logprobs", "hidden_states"):
            continue
        differences = (_bounded(values) - _bounded(expected[name])).abs()
        if values.dtype == torch.float16:
            rounding = torch.from_numpy(float16_rounding(_bounded(expected[name]).numpy()))
            differences = (differences - 2 * rounding).clamp(min=0)
        elif name.startswith("logsumexp"):
            rounding = LOGSUMEXP_ROUNDING[dtype] * _bounded(expected[name]).abs()
            differences = (differences - rounding).clamp(min=0)
        if differences.numel():
            worst = max(worst, float(differences.mean()))
    return worst


def _bounded(values: Tensor) -> Tensor:
    """Values in float64 that can be subtracted. NaN stands where no token follows, on both sides."""
    return values.double().nan_to_num(nan=0.0).clamp(min=LOWEST)
