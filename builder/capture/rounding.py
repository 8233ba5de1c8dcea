"""Rounded logits → rows of numbers that are right where it matters.

In:   a piece of a 16-bit head's logits, with the way to those in float32 (`teacher.precision.Rounded`), and the best of each row.
Out:  the K largest and the next, in float32; and the entries that are to stand in the rows in place of rounded ones.

How:  more entries than K are made in float32 and put in their places, so that everything that is then computed of a row comes from the
      same numbers: the top K, the target, the tail (what is outside the top K, a part of it in float32), the log-partition, the
      draws. All the rest keeps its rounding, up and down alike, of which a sum over the tail has next to nothing left.

      The K largest are exact, too: an entry that was left rounded is no larger than the least of those that were made right, and
      off by no more than the largest rounding that was seen among these, and a quarter. Where that could reach the K-th, or a
      target from outside does, the whole row is made in float32.

Cost: of the embedded teacher in bfloat16 (72 entries for a top K of 50) 9 of 620 µs a position on two cores. A row as a whole takes
      6 ms: one of 1,100 needed it with 64 entries, and none of 3,364 with 72. Log-probabilities, which rounding moves by 0.034
      nats on average, are then within 10⁻⁵ of those of float64, beyond what float16 does to them; the log-partition within 10⁻⁴,
      where it was off by 0.02.

Shape suffixes: N positions, R those worked on at once, U unsure ones, V vocabulary (P padded), K top-k, C entries in float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from builder.capture.ranking import WIDE, ids_of, keys_of, largest, values_of
from builder.teacher.precision import Rounded

LEAST_BEST = 72
"""Entries of a row that are made in float32, at least."""
BEST_BEYOND = 0.4
"""And by how much more than K, as a share of it."""
SLACK = 1.25
"""Times the largest rounding that was seen in a row: one of 72 entries is this near to the largest possible one in all but 10⁻⁶ of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """What is known in float32 of rows of rounded logits."""

    top_NK: Tensor
    """The K + 1 largest logits (K, if there are no more), by falling value."""
    top_ids_NK: Tensor
    """Of these, equal ones by lower id."""
    ids_NC: Tensor
    logits_NC: Tensor
    """Of these ids."""
    whole_U: Tensor
    """Rows of which all is known."""
    whole_UV: Tensor

    def put(self, x_RP: Tensor, rows: slice) -> None:
        """Write it over the rounded logits of some of the rows."""
        x_RP.scatter_(1, self.ids_NC[rows], self.logits_NC[rows])
        here = ((self.whole_U >= rows.start) & (self.whole_U < rows.stop)).nonzero()[:, 0]
        if len(here):
            x_RP[self.whole_U[here] - rows.start, : self.whole_UV.shape[1]] = self.whole_UV[here]


def best_count(top_k: int, vocab_size: int) -> int:
    """How many of the best entries of a row of rounded logits are made in float32."""
    return min(vocab_size, max(LEAST_BEST, top_k + math.ceil(top_k * BEST_BEYOND)))


def refine(
    piece: Rounded, rounded_NC: Tensor, best_NC: Tensor, targets_N: Tensor, top_k: int
) -> Refined:
    """The largest logits of a piece, and what else has to be right of it.

    Args:
        piece: rounded logits.
        rounded_NC: the `best_count` largest ones of each row, by falling value.
        best_NC: their ids.
        targets_N: ids that have to be right, too; or −1.
        top_k: K.
    """
    size, count = piece.logits_NV.shape[1], best_NC.shape[1]
    wanted = min(top_k + 1, count)
    targets_N1 = targets_N.clamp(min=0)[:, None]
    ids_NC = torch.cat([best_NC, targets_N1], dim=1)
    before_NC = torch.cat([rounded_NC, piece.logits_NV.gather(1, targets_N1).float()], dim=1)
    # What the model's own code masks stays masked.
    picked_NC = piece.pick(slice(0, len(targets_N)), ids_NC)
    after_NC = torch.where(before_NC == -torch.inf, before_NC, picked_NC)
    keys_NK = keys_of(after_NC[:, :count], best_NC).topk(wanted).values
    top_NK, top_ids_NK = values_of(keys_NK), ids_of(keys_NK)
    off_N = (after_NC - before_NC).abs().nan_to_num(nan=0.0).amax(-1)
    is_outside_N = (best_NC != targets_N1).all(-1)
    target_N = after_NC[:, -1].masked_fill(~is_outside_N, -torch.inf)
    reach_N = torch.maximum(rounded_NC[:, -1] + SLACK * off_N, target_N)
    is_unsure_N = (reach_N > -torch.inf) & (reach_N >= top_NK[:, top_k - 1]) & (count < size)
    unsure_U = is_unsure_N.nonzero()[:, 0]
    whole_UV = after_NC.new_empty(0, size)
    if len(unsure_U):
        whole_UV = piece.whole(unsure_U)
        padded_UP = functional.pad(whole_UV, (0, -size % WIDE), value=-torch.inf)
        top_NK[unsure_U], top_ids_NK[unsure_U] = largest(padded_UP, wanted)
    return Refined(
        top_NK=top_NK,
        top_ids_NK=top_ids_NK,
        ids_NC=ids_NC,
        logits_NC=after_NC,
        whole_U=unsure_U,
        whole_UV=whole_UV,
    )
