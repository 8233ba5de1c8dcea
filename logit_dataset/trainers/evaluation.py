"""A student's logits and a batch → sums, of which evaluation makes its metrics.

In:   logits_BTV, and a batch of a LogitCollator.
Out:  a line of sums for each row of the dataset, so that rows which processes were given twice are counted once; then metrics of all lines.

How:  every metric is a mean over positions, or a correlation over them, at temperature 1 whatever the training's:

      kl                    KL(teacher ‖ student), in nats. Of rows with draws an estimate of the whole: exact over the head, and
                            p_tail / M Σ_j (log p(id_j) − log q(id_j)) outside, which is 0 for the teacher itself. Of rows whose draws
                            have no log-probabilities, H(p, q) − H(p): the cross-entropy by draws, less the stored `entropy`, which is
                            exact. As unbiased, for both have the same mean, E p_tail / M Σ_j log p(id_j) being the tail's part of
                            −H(p). But not 0 at each position for the teacher itself: log p of the same draws does not take
                            their noise away any more: the variance is p_tail² Var_tail(log q) / M a position. Without draws, and after
                            a projection, the KL over the listed ids and the tail as one: a lower bound. Of whole distributions, and
                            with a teacher's head, exact.
      cross_entropy         of the student on the text.
      entropy               of the student's whole distribution.
      teacher_entropy       of the teacher's, as stored.
      entropy_correlation   Pearson's, over positions: how far the student is uncertain where the teacher is. 1 for the teacher itself.

Cost: one more softmax of CHUNK_POSITIONS positions at a time, beside the loss.

Shape suffixes: B rows, T positions, M = B · T, N positions that count, C those of a chunk, V vocabulary, S rows of the dataset.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from logit_dataset.divergences import Loss
from logit_dataset.hidden.head import TeacherHead
from logit_dataset.hidden.kl import position_dense_kl
from logit_dataset.losses import position_losses
from logit_dataset.schema import FLOAT16_MIN

CHUNK_POSITIONS = 256
SUMS = (
    *("loss", "loss_positions", "text", "text_positions", "kl", "positions"),
    *(
        "entropy",
        "teacher_entropy",
        "entropy²",
        "teacher_entropy²",
        "entropies",
        "entropy_positions",
    ),
)


def row_sums(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    *,
    loss: Loss,
    temperature: float,
    teacher_head: TeacherHead | None = None,
) -> Tensor:
    """[S, len(SUMS)]: sums over the positions of each row of the dataset.

    Args:
        logits_BTV: raw logits.
        batch: with `row_ids`, or else every row of it is one of the dataset.
        loss, temperature: those of the training, of `loss` alone.
        teacher_head: for the KL over the whole vocabulary, of a dataset with hidden states; then `loss` is that, too.

    Raises:
        ValueError: as in `distillation_loss`.
    """
    dtype = torch.float32 if logits_BTV.device.type == "mps" else torch.float64
    mask_BT, has_text_BT = batch["mask"], batch["target_ids"] >= 0
    if teacher_head is not None:
        loss_BT, text_BT = position_dense_kl(
            logits_BTV, batch, teacher_head, temperature=temperature
        )
    else:
        loss_BT, text_BT = position_losses(logits_BTV, batch, loss=loss, temperature=temperature)
    counted_BT = mask_BT & has_text_BT if loss == "residual" else mask_BT
    kl_BT = loss_BT if teacher_head and temperature == 1 else _kl(logits_BTV, batch, teacher_head)
    values = {
        **{"loss": loss_BT, "loss_positions": counted_BT, "text": text_BT},
        **{"text_positions": has_text_BT, "kl": kl_BT, "positions": mask_BT},
    }
    if "entropy" in batch:
        student_BT = _entropies(logits_BTV, mask_BT).to(dtype)
        teacher_BT = batch["entropy"].to(dtype).masked_fill(~mask_BT, 0)
        values |= {
            **{"entropy": student_BT, "teacher_entropy": teacher_BT},
            **{"entropy²": student_BT**2, "teacher_entropy²": teacher_BT**2},
            **{"entropies": student_BT * teacher_BT, "entropy_positions": mask_BT},
        }
    nothing_BT = torch.zeros_like(mask_BT, dtype=dtype)
    lines_MX = torch.stack([values.get(n, nothing_BT).to(dtype).flatten() for n in SUMS], dim=1)
    if "row_ids" not in batch:
        return lines_MX.view(*mask_BT.shape, -1).sum(1)
    sums_SX = lines_MX.new_zeros(len(batch["row_lengths"]), len(SUMS))
    # In padding all is 0.
    return sums_SX.index_add_(0, batch["row_ids"].flatten().clamp(min=0), lines_MX)


def metrics(sums: Tensor, *, text_weight: float) -> dict[str, float]:
    """What is reported of a whole evaluation; nothing of what no position tells.

    Args:
        sums: [len(SUMS)], over all rows.
        text_weight: of the training, for `loss`.
    """
    of = dict(zip(SUMS, sums.tolist(), strict=True))
    found: dict[str, float] = {}
    distilled = of["loss"] / max(of["loss_positions"], 1)
    text = of["text"] / max(of["text_positions"], 1)
    found["loss"] = (1 - text_weight) * distilled + text_weight * text
    if of["positions"]:
        found["kl"] = of["kl"] / of["positions"]
    if of["text_positions"]:
        found["cross_entropy"] = text
    if count := of["entropy_positions"]:
        student, teacher = of["entropy"] / count, of["teacher_entropy"] / count
        found |= {"entropy": student, "teacher_entropy": teacher}
        of_student = of["entropy²"] / count - student**2
        of_teacher = of["teacher_entropy²"] / count - teacher**2
        together = of["entropies"] / count - student * teacher
        if min(of_student, of_teacher) > 1e-12:  # a constant follows nothing
            found["entropy_correlation"] = together / math.sqrt(of_student * of_teacher)
    return found


def _kl(
    logits_BTV: Tensor, batch: Mapping[str, Tensor], teacher_head: TeacherHead | None
) -> Tensor:
    """[B, T]: see the module's docstring."""
    if teacher_head is not None:
        return position_dense_kl(logits_BTV, batch, teacher_head)[0]
    tells = "tail_logprobs" in batch or "entropy" in batch
    if "tail_indices" not in batch or "other_indices" in batch or not tells:
        return position_losses(logits_BTV, batch, loss="tail_bucket")[0]
    cross_BT = position_losses(logits_BTV, batch, loss="tail_draws")[0]
    if "tail_logprobs" not in batch:
        return cross_BT - batch["entropy"].to(cross_BT.dtype).where(batch["mask"], 0)
    head_BTK, tail_BT, draws_BTJ = (
        batch[name].to(cross_BT.dtype)
        for name in ("topk_logprobs", "tail_logprob", "tail_logprobs")
    )
    own_BT = (head_BTK.exp() * head_BTK).sum(-1)
    own_BT = own_BT + tail_BT.exp() * draws_BTJ.clamp(min=FLOAT16_MIN).mean(-1)
    return cross_BT + own_BT.where(batch["mask"], 0)


def _entropies(logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, T]: of the student's distributions, 0 outside the mask."""
    logits_MV, rows_N = logits_BTV.flatten(0, 1), mask_BT.flatten().nonzero()[:, 0]
    entropies_M = torch.zeros(len(logits_MV), dtype=torch.float32, device=logits_MV.device)
    for rows_C in rows_N.split(CHUNK_POSITIONS):
        logq_CV = logits_MV[rows_C].float().log_softmax(-1)
        # A logit of −∞ adds 0.
        entropies_M[rows_C] = -(logq_CV.exp() * logq_CV.clamp(min=FLOAT16_MIN)).sum(-1)
    return entropies_M.view(mask_BT.shape)
