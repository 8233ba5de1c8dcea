"""A student on held-out text → numbers, all over the student's vocabulary.

ce            cross-entropy on the token that really follows, nats
ce_top_k      the same, where that token is in the teacher's top K; only if there are such tokens, here and in the next two
ce_tail       where the student has it, but the top K has not
ce_other      where it is one of those that the student knows as `other`
tail_mass_gap mean of the student's mass outside of top K and `other`, minus the teacher's
kl            KL(teacher ‖ student), from the whole distribution, nats
ece           expected calibration error: |accuracy − confidence| of the student's most probable token against the text, in
              15 bins of equal width, weighted by their positions (Guo et al. 2017)
accuracy      how often that token really follows
entropy_gap   mean of the student's entropy minus the teacher's, nats
entropy_rank  Spearman's rank correlation of the two
acceptance    mean of Σ min(p, q) over the ids: how often the teacher would accept a token that the student proposes, in speculative
              decoding (Leviathan et al. 2023, §3.2)

Shape suffixes: N positions, V student's vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.experiment.arms import Batch

BINS = 15
PLACES = TOP_K, TAIL, OTHER = "top_k", "tail", "other"
"""Where an id stands at a position."""
Logits = Callable[[Batch], Tensor]


@torch.inference_mode()
def measure(logits: Logits, batches: Sequence[Batch]) -> dict[str, float]:
    """All of them. `logits` makes [N, V] of a batch, at the positions in its mask; `batch["whole"]` is the teacher there."""
    parts: list[list[Tensor]] = []
    for batch in batches:
        logq_NV, logp_NV = logits(batch).log_softmax(-1), batch["whole"].float()
        p_NV = logp_NV.exp()
        target_N = batch["target_ids"][batch["mask"]].long()
        known_N = target_N >= 0
        confidence_N, guess_N = logq_NV.max(-1)
        place_NV = _places(batch, p_NV.shape)
        tail_NV = place_NV == PLACES.index(TAIL)
        parts.append(
            [
                -logq_NV[known_N].gather(1, target_N[known_N][:, None])[:, 0],
                (p_NV * (logp_NV - logq_NV)).sum(-1),
                confidence_N.exp()[known_N],
                (guess_N == target_N)[known_N].float(),
                -(logq_NV.exp() * logq_NV).sum(-1),
                -(p_NV * logp_NV).sum(-1),
                place_NV[known_N].gather(1, target_N[known_N][:, None])[:, 0],
                ((logq_NV.exp() - p_NV) * tail_NV).sum(-1),
                torch.minimum(logq_NV.exp(), p_NV).sum(-1),
            ]
        )
    ce, kl, confidence, right, student, teacher, place, tail_gap, accepted = (
        torch.cat(values).double().numpy() for values in zip(*parts, strict=True)
    )
    return {
        "ce": float(ce.mean()),
        **{
            f"ce_{name}": float(ce[place == number].mean())
            for number, name in enumerate(PLACES)
            if number in place
        },
        "tail_mass_gap": float(tail_gap.mean()),
        "kl": float(kl.mean()),
        "ece": calibration_error(confidence, right),
        "accuracy": float(right.mean()),
        "entropy_gap": float((student - teacher).mean()),
        "entropy_rank": rank_correlation(student, teacher),
        "acceptance": float(accepted.mean()),
    }


def _places(batch: Batch, shape: tuple[int, int]) -> Tensor:
    """[N, V]: the number in PLACES of each id."""
    place_NV = torch.full(shape, PLACES.index(TAIL))
    top_NK = batch["topk_indices"][batch["mask"]].long()
    other_N1 = batch["other_indices"][batch["mask"]].long()[:, None]
    place_NV.scatter_(1, top_NK.where(top_NK >= 0, other_N1), PLACES.index(TOP_K))
    return place_NV.scatter_(1, other_N1, PLACES.index(OTHER))


@torch.inference_mode()
def cross_entropy_and_kl(logits: Logits, batches: Sequence[Batch]) -> tuple[float, float]:
    """The first two alone, for the curve of a training."""
    sums, counts = np.zeros(2), np.zeros(2)
    for batch in batches:
        logq_NV, logp_NV = logits(batch).log_softmax(-1), batch["whole"].float()
        target_N = batch["target_ids"][batch["mask"]].long()
        known_N = target_N >= 0
        ce_N = -logq_NV[known_N].gather(1, target_N[known_N][:, None])
        kl_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
        sums += [float(ce_N.double().sum()), float(kl_N.double().sum())]
        counts += [len(ce_N), len(kl_N)]
    ce, kl = sums / counts
    return float(ce), float(kl)


def calibration_error(confidence_N: npt.NDArray[Any], right_N: npt.NDArray[Any]) -> float:
    """Σ over bins of |Σ right − Σ confidence| / N."""
    bins_N = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins_N, weights=right_N - confidence_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def rank_correlation(a_N: npt.NDArray[Any], b_N: npt.NDArray[Any]) -> float:
    """Spearman's: the correlation of ranks (entropies of float32 hardly ever tie, so ties are not averaged)."""
    ranks = [np.argsort(np.argsort(values)) for values in (a_N, b_N)]
    return float(np.corrcoef(*ranks)[0, 1])
