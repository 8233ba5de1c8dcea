"""Tokens drawn from the teacher's tail, the distribution outside the top K: by seed and document, never by chance.

In:   uniform numbers of a document, and what `distribution` has of the tail anyway.
Out:  M token ids a position, drawn with replacement in proportion to their probability.

With them the stored row gives an unbiased estimate of any expectation under the whole distribution p, exact over the top K and
sampled beyond it (Anshumann et al., Sparse Logit Sampling, ACL 2025, on why a student needs that):

    E[f] = Σ_{i in top K} p_i f(i) + p_tail / M · Σ_j f(draw_j),   p_tail = exp(tail_logprob)

How:  the cumulated distribution of the tail, in the order of the ids, is inverted in two levels: a block of ids, in the block
      an entry. Each level needs sums of at most a few thousand terms, made in float64, so that no draw depends on the rounding
      of a running sum over the vocabulary. All is relative to the tail's own largest term: a tail that is 0 in float32 next
      to the head is drawn from like any other. So the same logits give the same draws wherever they are computed, but
      where a uniform number lies within the last bit of a sum.

Shape suffixes: R positions, M draws, P padded vocabulary, B blocks, E entries of a block.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

BELOW_ONE = 1 - 2.0**-33
"""Where a rescaled uniform number ends, so that its product with a total stays below that total in float64."""


def uniforms(
    seed: int, document_id: str, chunk_index: int, *, num_positions: int, count: int
) -> Tensor:
    """[num_positions, count] float64 numbers in [0, 1) that depend on the arguments alone.

    They come from a counter-based generator (Philox, Salmon et al. 2011) on the host, so that neither batches, nor devices, nor
    interruptions change them; its raw output is the part of numpy's generators that stays the same in all versions.
    """
    key = hashlib.sha256(f"{seed} {chunk_index} {document_id}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key))
    bits = generator.random_raw(num_positions * count)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53).view(num_positions, count)


def draw(uniforms_RM: Tensor, tail_RP: Tensor, *, block_size: int) -> Tensor:
    """[R, M] ids; in a row without a tail, or with NaN, some valid place of the arguments.

    Args:
        uniforms_RM: float64 numbers in [0, 1).
        tail_RP: probabilities of the tail's tokens among themselves, by id; 0 for what is not of the tail.
        block_size: a divisor of P.
    """
    rows, padded = tail_RP.shape
    sums_RB = tail_RP.unflatten(1, (-1, block_size)).sum(-1)
    block_RM, within_RM = invert(sums_RB, uniforms_RM)
    first_R1 = torch.arange(rows, device=tail_RP.device)[:, None] * (padded // block_size)
    entries_E = tail_RP.view(-1, block_size).index_select(0, (block_RM + first_R1).flatten())
    entry, _ = invert(entries_E, within_RM.view(-1, 1))
    return block_RM * block_size + entry.view_as(block_RM)


def invert(weights_RB: Tensor, uniforms_RM: Tensor) -> tuple[Tensor, Tensor]:
    """For each uniform number, the index at which the cumulated weights exceed it, and how far inside that weight it lies.

    Never an index of weight 0, unless there are no others.
    """
    sums_RB = weights_RB.double().cumsum(-1)
    goal_RM = uniforms_RM.clamp(0, BELOW_ONE) * sums_RB[:, -1:]
    index_RM = torch.searchsorted(sums_RB, goal_RM, right=True).clamp(max=sums_RB.shape[1] - 1)
    above_RM = sums_RB.gather(1, index_RM)
    weight_RM = weights_RB.gather(1, index_RM).double()
    return index_RM, 1 - (above_RM - goal_RM) / weight_RM
