"""What the teacher and the student say at N positions → how far apart they are, at each position, in nats.

Kinds, with h the listed ids (the head), p_tail and q_tail the mass of all others, R = p_tail, y the token that really follows:

tail_bucket         KL(p ‖ q) over K + 1 events, the tail being one: Σ_h p (log p − log q) + p_tail (log p_tail − log q_tail).
                    A lower bound of the whole KL. The "ghost token" of Anshumann et al., Sparse Logit Sampling, ACL 2025.
tail_draws          cross-entropy H(p, q) = −Σ_h p log q − p_tail/m Σ_j log q(id_j), with m ids drawn from the teacher's tail.
                    Unbiased, value and gradient; subtract the mean of `entropy` for the KL.
residual            KL(p′ ‖ q), p′ = p on the head, plus R on y. Ibid., where the missing mass goes to the
                    ground truth. Positions without a known y are left out.
renormalised_top_k  KL(p / Σ_h p ‖ q) over the head: the usual top-K distillation. **Biased**: it teaches that there is no tail, and
                    a student that is right is moved away from the truth. Here for comparison. 0 where no id is listed.
reverse_kl          KL(q ‖ p) over the K + 1 events; Gu et al., MiniLLM, ICLR 2024, on a coarser support: a lower bound.
                    A token that the teacher rules out counts as e^−65504, so mass on it costs 65504 nats a unit.
jensen_shannon      ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q), over the K + 1 events; Agarwal et al., GKD, ICLR 2024, with β = ½.

After a projection one listed id, `other`, is known by a lower bound only: the tail may hold more of it. Over events the loss is then the least
divergence from q to any p that agrees with what is known; a coarser support's, so still a lower bound. For an f-divergence that p divides what
is known of `other` and the tail together as q does, as far as the bound allows (data-processing inequality; convexity where it does not).
The other losses take the bound for the probability, and the whole tail for that of ids that are not listed.

Where the dataset has whole distributions every id is listed, nothing is outside, and tail_bucket is the KL itself.

Stored log-probabilities are rounded to float16 (11 bits), so Σ p = 1 ± 1e-3; nothing is renormalised to hide that. −65504 stands
for −inf: such an id has no mass, adds 0 to every expectation under p, and makes no NaN.

Shape suffixes: N positions, K top-k, J tail draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logit_dataset.schema import FLOAT16_MIN

Loss = Literal[
    "tail_bucket",
    "tail_draws",
    "residual",
    "renormalised_top_k",
    "reverse_kl",
    "jensen_shannon",
]


@dataclass(slots=True, kw_only=True)
class AtTeacher:
    """The teacher at N positions. Probabilities of −65504 are exactly 0."""

    head_NK: Tensor
    """Ids; negative where a place is empty."""
    logp_NK: Tensor
    logp_tail_N: Tensor
    target_N: Tensor
    draws_NJ: Tensor
    """Ids drawn from the tail; J = 0 for the losses that need none."""
    last_is_bound: bool = False
    """Whether the last of the head is `other`, of which the tail may hold more."""


@dataclass(slots=True, kw_only=True)
class AtStudent:
    """The student's log-probabilities at the same positions."""

    head_NK: Tensor
    tail_N: Tensor
    target_N: Tensor
    draws_NJ: Tensor


def _tail_bucket(teacher: AtTeacher, student: AtStudent) -> Tensor:
    logp, logq = _events(teacher, student)
    return _mean_under(logp, logp - logq)


def _tail_draws(teacher: AtTeacher, student: AtStudent) -> Tensor:
    share_N1 = teacher.logp_tail_N.exp()[:, None] / student.draws_NJ.shape[1]
    tail_N = (share_N1 * -student.draws_NJ.masked_fill(share_N1 == 0, 0)).sum(-1)
    return _mean_under(teacher.logp_NK, -student.head_NK) + tail_N


def _residual(teacher: AtTeacher, student: AtStudent) -> Tensor:
    is_target_NK = teacher.head_NK == teacher.target_N[:, None]
    residual_N1 = teacher.logp_tail_N[:, None]
    raised_NK = torch.logaddexp(teacher.logp_NK, residual_N1).where(is_target_NK, teacher.logp_NK)
    outside_N = teacher.logp_tail_N.masked_fill(is_target_NK.any(-1), FLOAT16_MIN)
    logp = torch.cat([raised_NK, outside_N[:, None]], dim=1)
    return _mean_under(logp, logp - torch.cat([student.head_NK, student.target_N[:, None]], dim=1))


def _renormalised_top_k(teacher: AtTeacher, student: AtStudent) -> Tensor:
    logp_NK = teacher.logp_NK.log_softmax(-1)
    # Where a projection found a place for nothing that is listed, empty places would share the mass.
    logp_NK = logp_NK.masked_fill(teacher.logp_NK <= FLOAT16_MIN, FLOAT16_MIN)
    return _mean_under(logp_NK, logp_NK - student.head_NK)


def _reverse_kl(teacher: AtTeacher, student: AtStudent) -> Tensor:
    logp, logq = _events(teacher, student)
    return _mean_under(logq, logq - logp)


def _jensen_shannon(teacher: AtTeacher, student: AtStudent) -> Tensor:
    logp, logq = _events(teacher, student)
    mixture = torch.logaddexp(logp, logq) - math.log(2)
    return (_mean_under(logp, logp - mixture) + _mean_under(logq, logq - mixture)) / 2


LOSSES: dict[Loss, Callable[[AtTeacher, AtStudent], Tensor]] = {
    "tail_bucket": _tail_bucket,
    "tail_draws": _tail_draws,
    "residual": _residual,
    "renormalised_top_k": _renormalised_top_k,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}
"""Each: the teacher and the student at N positions → the loss at each of them."""


def _events(teacher: AtTeacher, student: AtStudent) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the K + 1 events, [N, K + 1] each: the listed ids, and all others together."""
    logp = torch.cat([teacher.logp_NK, teacher.logp_tail_N[:, None]], dim=1)
    logq = torch.cat([student.head_NK, student.tail_N[:, None]], dim=1)
    if teacher.last_is_bound:
        logp = torch.cat([logp[:, :-2], _least(logp[:, -2:], logq.detach()[:, -2:])], dim=1)
    return logp, logq


def _least(logp_N2: Tensor, logq_N2: Tensor) -> Tensor:
    """`other`, of which at least so much is known, and the tail, divided as the student divides them if that is possible."""
    both_N = torch.logaddexp(logp_N2[:, 0], logp_N2[:, 1])
    odds_N = logq_N2[:, 0] - logq_N2[:, 1]
    divided_N2 = both_N[:, None] + logsigmoid(torch.stack([odds_N, -odds_N], dim=1))
    agrees_N1 = divided_N2[:, :1] >= logp_N2[:, :1]
    return divided_N2.clamp(min=FLOAT16_MIN).where(agrees_N1, logp_N2)


def _mean_under(logp: Tensor, values: Tensor) -> Tensor:
    """Σ p · value, where 0 · ∞ is 0, in the gradient too."""
    p = logp.exp()
    return (p * values.masked_fill(p == 0, 0)).sum(-1)
