"""A teacher's distribution → ids with log-weights, for losses that know a top K and nothing else.

Such a loss takes Σ_i w_i f(id_i) for the expectation of f. With a tail of M draws, the weights of the head are its probabilities, and each
draw's is p_tail / M: then that sum is an unbiased estimate of the expectation under the whole distribution, and the weights sum to 1. Of a
KL that is the cross-entropy, and so the gradient. Its other part, Σ w log w, is a constant, but not the teacher's entropy: such a KL is
not 0 for the teacher itself. Without the draws it teaches that there is no tail.

Shape suffixes: N positions, K ids of the head, M draws, X = K or K + M ids with weights.
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from logit_dataset.rows import Array
from logit_dataset.schema import FLOAT16_MIN

Tail = Literal["draws", "bucket", "none"]
"""What becomes of the mass outside the top K: `draws` as above; `bucket`: the trainer makes one event of all that is missing; `none`: lost."""
NO_WEIGHT = np.float32(-1e9)
"""No probability, as a number that makes no NaN."""
LEAST_BUCKET = 2e-6
"""What a bucket holds at least: log(1 − Σ) of a trainer has to be finite in float32."""


def listed(
    columns: Mapping[str, Array], tail: Tail
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The ids [N, X] and their log-weights [N, X]; id 0 with NO_WEIGHT where nothing is.

    Args:
        columns: of a dataset's rows, [N, …]; `tail_indices` for draws.
        tail: see Tail. With a bucket, head and tail are made to sum to 1, which rounding to float16 may have missed.
    """
    ids_NK, logp_NK = columns["topk_indices"], columns["topk_logprobs"]
    tail_N = columns["tail_logprob"].astype(np.float32)
    num_draws = columns["tail_indices"].shape[1] if tail == "draws" else 0
    top_k = ids_NK.shape[1]
    ids_NX = np.empty((len(ids_NK), top_k + num_draws), np.int32)
    logw_NX = np.empty(ids_NX.shape, np.float32)
    ids_NX[:, :top_k], logw_NX[:, :top_k] = ids_NK, logp_NK
    gone_NK = logw_NX[:, :top_k] <= FLOAT16_MIN
    if tail == "bucket":
        bucket_N = np.maximum(np.exp(tail_N), np.float32(LEAST_BUCKET))
        logw_NX -= np.log(np.exp(logw_NX).sum(-1) + bucket_N)[:, None]
    if num_draws:
        ids_NX[:, top_k:] = columns["tail_indices"]
        logw_NX[:, top_k:] = (tail_N - np.float32(math.log(num_draws)))[:, None]
        nothing_N = tail_N <= FLOAT16_MIN
        ids_NX[nothing_N, top_k:], logw_NX[nothing_N, top_k:] = 0, NO_WEIGHT
    if gone_NK.any():
        ids_NX[:, :top_k][gone_NK], logw_NX[:, :top_k][gone_NK] = 0, NO_WEIGHT
    return ids_NX, logw_NX
