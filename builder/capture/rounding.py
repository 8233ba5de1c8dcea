"""Rounded logits → rows of numbers that are right where it matters.

In:   rows of a 16-bit head's logits, and the way to those in float32 (`teacher.precision.Rounded`).
Out:  the same rows, in which the best entries and the target's stand in float32; and the K largest.

How:  more entries than K are made in float32 and put in their places, so that everything that is then computed of a row comes from the
      same numbers: the top K, the target, the tail (what is outside the top K, a part of it in float32), the log-partition, the
      draws. All the rest keeps its rounding, up and down alike, of which a sum over the tail has next to nothing left.

      The K largest are exact, too: an entry that was left rounded is no larger than the least of those that were made right, and
      off by no more than the largest rounding that was seen among these, and a quarter. Where that could reach the K-th, or a
      target from outside does, the whole row is made in float32.

Cost: of the embedded teacher in bfloat16 (72 entries for a top K of 50) some 30 of 1,500 µs a position on one core. A row as a whole
      takes 6 ms: one of 1,100 needed it with 64 entries, and none of 3,364 with 72. Log-probabilities, which rounding moves by 0.034
      nats on average, are then within 10⁻⁵ of those of float64, beyond what float16 does to them; the log-partition within 10⁻⁴,
      where it was off by 0.02.

Shape suffixes: R positions, P padded vocabulary, V vocabulary, K top-k, C entries in float32.
"""

import math

import torch
from torch import Tensor

from builder.capture.ranking import ids_of, keys_of, largest, values_of
from builder.teacher.precision import Rounded

LEAST_BEST = 72
"""Entries of a row that are made in float32, at least."""
BEST_BEYOND = 0.4
"""And by how much more than K, as a share of it."""
SLACK = 1.25
"""Times the largest rounding that was seen in a row: one of 72 entries is this near to the largest possible one in all but 10⁻⁶ of rows."""


def refine(
    x_RP: Tensor, piece: Rounded, rows: slice, targets_R: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The K largest logits of some rows of a piece and their ids, by falling value, equal ones by lower id: [R, K] each.

    Args:
        x_RP: rounded logits of these rows in float32, padded with −inf; made right.
        piece: whose rows they are.
        rows: which.
        targets_R: ids that have to be right, too; or −1.
        top_k: K.
    """
    size = piece.logits_NV.shape[1]
    count = min(size, max(LEAST_BEST, top_k + math.ceil(top_k * BEST_BEYOND)))
    rounded_RC, best_RC = largest(x_RP, count)
    targets_R1 = targets_R.clamp(min=0)[:, None]
    ids_RC = torch.cat([best_RC, targets_R1], dim=1)
    before_RC = torch.cat([rounded_RC, x_RP.gather(1, targets_R1)], dim=1)
    # What the model's own code masks stays masked.
    after_RC = torch.where(before_RC == -torch.inf, before_RC, piece.pick(rows, ids_RC))
    x_RP.scatter_(1, ids_RC, after_RC)
    keys_RK = keys_of(after_RC[:, :count], best_RC).topk(top_k).values
    top_RK, top_ids_RK = values_of(keys_RK), ids_of(keys_RK)
    if count == size:
        return top_RK, top_ids_RK
    off_R = (after_RC - before_RC).abs().nan_to_num(nan=0.0).amax(-1)
    is_outside_R = (best_RC != targets_R1).all(-1)
    target_R = after_RC[:, -1].masked_fill(~is_outside_R, -torch.inf)
    reach_R = torch.maximum(rounded_RC[:, -1] + SLACK * off_R, target_R)
    unsure_R = ((reach_R > -torch.inf) & (reach_R >= top_RK[:, -1])).nonzero()[:, 0]
    if len(unsure_R):
        x_RP[unsure_R, :size] = piece.whole(unsure_R + rows.start)
        top_RK[unsure_R], top_ids_RK[unsure_R] = largest(x_RP[unsure_R], top_k)
    return top_RK, top_ids_RK
