"""Stored hidden states and the teacher's head → the KL over the whole vocabulary, where no distribution of the teacher was stored.

In:   a student's logits or hidden states, a batch of a dataset with `hidden_states`, and its `TeacherHead`.
Out:  KL(p ‖ q) in nats, exact, at any temperature: p = softmax(y / τ) with the logits y that the head makes of the hidden states, and
      q = softmax(z / τ) with those of the student. Nothing is shifted: position t of both is about the token after input_ids[t].

How:  the teacher's logits exist for a chunk of positions only, and are made again in the backward pass. With g the gradient that comes in,

          ∂/∂z = g / τ · (q − p),  and for the text's cross-entropy  g · (softmax(z) − 1 at the target).

Cost: CHUNK_BYTES for each of three tensors [C, V] in float32 beside the student's logits and their gradient; `dense_kl_from_hidden` has no
      logits beyond those of a chunk either. A product with the teacher's head per position more in the backward pass, in `dense_kl`, and
      one with each head, in `dense_kl_from_hidden`.

Shape suffixes: B rows, T positions, M = B · T, N positions that count, C those of a chunk, V vocabulary, D hidden of the teacher, E of the student.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from logit_dataset.hidden.head import TeacherHead
from logit_dataset.losses import check_columns, counting, positions_of

CHUNK_BYTES = 2**26
"""Of the logits of a chunk in float32."""


def dense_kl(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    teacher_head: TeacherHead,
    *,
    text_weight: float = 0.0,
    temperature: float = 1.0,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """Compute (1 − w) · τ² · KL + w · cross-entropy on the text: `distillation_loss` with the exact forward KL over the whole vocabulary.

    Args:
        logits_BTV: the student's raw logits, for at least the teacher's vocabulary. The teacher gives further ids no probability.
        batch: with `hidden_states`, on the device of the logits.
        teacher_head: of the same dataset, from `load_teacher_head`, on the device of the logits.
        text_weight: w, 0 to 1.
        temperature: τ, any above 0.
        num_positions: as in `distillation_loss`; `count_positions` gives it.

    Raises:
        ValueError: the batch has no hidden states, or the head belongs to another dataset or is on another device.
    """
    chosen = _Chosen(batch, teacher_head, text_weight, temperature)
    logits_MV = positions_of(logits_BTV, batch, "logits")
    kl_N, text_N = chosen.values(logits_MV, slice(None), chosen.rows_N, keep=False)
    return chosen.combine(torch.stack([kl_N.sum(), text_N.sum()]), num_positions)


def position_dense_kl(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    teacher_head: TeacherHead,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute τ² · KL and the text's cross-entropy at each position, [B, T] each, in nats; 0 where they do not count.

    Args:
        logits_BTV, batch, teacher_head, temperature: as in `dense_kl`.

    Raises:
        ValueError: as in `dense_kl`.
    """
    chosen = _Chosen(batch, teacher_head, 0.5, temperature)
    logits_MV = positions_of(logits_BTV, batch, "logits")
    values_N = chosen.values(logits_MV, slice(None), chosen.rows_N, keep=False)
    both = [v.new_zeros(len(logits_MV)).index_put((chosen.rows_N,), v) for v in values_N]
    return both[0].view(logits_BTV.shape[:2]), both[1].view(logits_BTV.shape[:2])


def dense_kl_from_hidden(
    hidden_BTE: Tensor,
    head: Callable[[Tensor], Tensor],
    batch: Mapping[str, Tensor],
    teacher_head: TeacherHead,
    *,
    text_weight: float = 0.0,
    temperature: float = 1.0,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """Compute `dense_kl` without holding [B, T, V]: both heads run on a chunk of positions, and again in the backward pass.

    Args:
        hidden_BTE: the student's last hidden states.
        head: the student's head, [n, E] → [n, V], such as `model.lm_head`. It is not called on padding.
        batch, teacher_head, text_weight, temperature, num_positions: as in `dense_kl`.

    Raises:
        ValueError: as in `dense_kl`.
    """
    chosen = _Chosen(batch, teacher_head, text_weight, temperature)
    hidden_ME = positions_of(hidden_BTE, batch, "hidden states")
    size = _chunk_positions(teacher_head.vocab_size)

    def chunk_sums(hidden_CE: Tensor, chunk: slice) -> Tensor:
        logits_CV = head(hidden_CE)
        rows_C = torch.arange(len(logits_CV), device=logits_CV.device)
        return torch.stack([v.sum() for v in chosen.values(logits_CV, chunk, rows_C, keep=True)])

    sums = []
    # Once, though no position may count: then the head's weights have gradients too, for which DDP waits.
    for start in range(0, max(1, len(chosen.rows_N)), size):
        chunk = slice(start, start + size)
        hidden_CE = hidden_ME.index_select(0, chosen.rows_N[chunk])
        sums.append(checkpoint(chunk_sums, hidden_CE, chunk, use_reentrant=False))
    return chosen.combine(torch.stack(sums).sum(0), num_positions)


def _chunk_positions(vocab_size: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocab_size))


class _Chosen:
    """The positions that count, and what is known of the teacher there."""

    def __init__(
        self,
        batch: Mapping[str, Tensor],
        teacher_head: TeacherHead,
        text_weight: float,
        temperature: float,
    ) -> None:
        if not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight is {text_weight}, expected 0 to 1")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, expected a number above 0")
        check_columns(batch)
        if "hidden_states" not in batch:
            raise ValueError(
                "the batch has no hidden_states; build the dataset with [output] hidden_states = true, or use distillation_loss"
            )
        if "other_indices" in batch:
            raise ValueError(
                "the batch is in another vocabulary than the teacher's head; load it without a projection"
            )
        distilled_M, text_M = (counts.flatten() for counts in counting(batch, "tail_bucket"))
        if text_weight == 1:
            distilled_M = torch.zeros_like(distilled_M)
        counts_M = distilled_M | text_M if text_weight else distilled_M
        self.rows_N = counts_M.nonzero()[:, 0]
        self._distilled_N = distilled_M[self.rows_N]
        hidden_MD = batch["hidden_states"].flatten(0, 1)
        self._hidden_ND = hidden_MD.index_select(0, self.rows_N)
        target_N = batch["target_ids"].flatten()[self.rows_N].long()
        self._target_N = target_N if text_weight else torch.full_like(target_N, -1)
        self._head, self._text_weight, self._temperature = teacher_head, text_weight, temperature

    def values(
        self, logits_MV: Tensor, chunk: slice, rows_C: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """τ² · KL and cross-entropy at the positions of a chunk, 0 where they do not count."""
        weight_VD = self._head.weight_VD
        if weight_VD.device != logits_MV.device:
            raise ValueError(
                f"the teacher's head is on {weight_VD.device}, the student's logits on {logits_MV.device}; move it once: "
                f"head = head.to({str(logits_MV.device)!r})"
            )
        if logits_MV.shape[1] < self._head.vocab_size:
            raise ValueError(
                f"the teacher has {self._head.vocab_size} logits, the student {logits_MV.shape[1]}; give it the teacher's vocabulary"
            )
        target_C = self._target_N[chunk]
        if not target_C.is_cuda and target_C.numel() and int(target_C.max()) >= logits_MV.shape[1]:
            raise ValueError(
                f"the batch names token id {int(target_C.max())}, but the student has {logits_MV.shape[1]} logits"
            )
        kl_C, text_C = _DenseKL.apply(  # type: ignore[no-untyped-call]
            logits_MV,
            rows_C,
            self._hidden_ND[chunk],
            self._distilled_N[chunk],
            target_C,
            self._head,
            self._temperature,
            keep,
        )
        return kl_C * self._temperature**2, text_C

    def combine(self, sums: Tensor, num_positions: float | Tensor | None) -> Tensor:
        """The weighted mean; 0 of no positions."""
        if num_positions is None:
            counts = torch.stack([self._distilled_N.sum(), (self._target_N >= 0).sum()])
        else:
            counts = torch.as_tensor(num_positions, dtype=sums.dtype, device=sums.device)
        means = sums / (counts + (counts == 0))
        return (1 - self._text_weight) * means[0] + self._text_weight * means[1]


class _DenseKL(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_MV: Tensor,
        rows_N: Tensor,
        hidden_ND: Tensor,
        distilled_N: Tensor,
        target_N: Tensor,
        head: TeacherHead,
        temperature: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """`keep` the teacher's probabilities for the backward pass: of one chunk, whose logits do not outlive it."""
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        kl_N = torch.zeros(len(rows_N), dtype=dtype, device=logits_MV.device)
        text_N = torch.zeros_like(kl_N)
        kept = []
        for chunk in _chunks(len(rows_N), len(rows_N) if keep else _chunk_positions(head.vocab_size)):  # fmt: skip
            logits_CV = logits_MV.index_select(0, rows_N[chunk]).to(dtype)
            text_N[chunk] = _cross_entropy(logits_CV, target_N[chunk])
            logq_CV = _log_softmax(logits_CV, temperature)[:, : head.vocab_size]
            logp_CV = _log_softmax(_teacher_logits(head, hidden_ND[chunk], dtype), temperature)
            p_CV = logp_CV.exp()
            # A logit of −∞ that the teacher does not expect either adds 0.
            logq_CV.clamp_(min=torch.finfo(dtype).min)
            kl_C = logp_CV.sub_(logq_CV).mul_(p_CV).sum(-1)
            kl_N[chunk] = kl_C.where(distilled_N[chunk], 0)
            if keep:
                kept.append(p_CV)
        ctx.save_for_backward(logits_MV, rows_N, hidden_ND, distilled_N, target_N, *kept)
        ctx.head, ctx.temperature = head, temperature
        return kl_N, text_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_kl_N, g_text_N = gradients
        logits_MV, rows_N, hidden_ND, distilled_N, target_N, *kept = ctx.saved_tensors
        head, temperature, dtype = ctx.head, ctx.temperature, g_kl_N.dtype
        g_kl_N = (g_kl_N / temperature).where(distilled_N, 0)
        has_text_N = target_N >= 0
        grad_MV = torch.zeros_like(logits_MV)
        for chunk in _chunks(len(rows_N), len(rows_N) if kept else _chunk_positions(head.vocab_size)):  # fmt: skip
            logits_CV = logits_MV.index_select(0, rows_N[chunk]).to(dtype)
            text_C = g_text_N[chunk].where(has_text_N[chunk], 0)
            text_CV = None
            if has_text_N.is_cuda or has_text_N[chunk].any():
                text_CV = _log_softmax(logits_CV.clone(), 1.0).exp_().mul_(text_C[:, None])
                text_CV.scatter_add_(1, target_N[chunk, None].clamp(min=0), -text_C[:, None])
            grad_CV = _log_softmax(logits_CV, temperature).exp_()
            if kept:
                p_CV = kept[0]
            else:
                teacher_CV = _teacher_logits(head, hidden_ND[chunk], dtype)
                p_CV = _log_softmax(teacher_CV, temperature).exp_()
            grad_CV[:, : head.vocab_size] -= p_CV
            grad_CV.mul_(g_kl_N[chunk, None])
            if text_CV is not None:
                grad_CV += text_CV
            grad_MV.index_copy_(0, rows_N[chunk], grad_CV.to(grad_MV.dtype))
        return grad_MV, None, None, None, None, None, None, None


def _teacher_logits(head: TeacherHead, hidden_CD: Tensor, dtype: torch.dtype) -> Tensor:
    return head(hidden_CD.to(dtype))


def _log_softmax(logits_CV: Tensor, temperature: float) -> Tensor:
    """Overwrites its argument, which is in float32 or float64."""
    if temperature != 1:
        logits_CV.div_(temperature)
    return logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))


def _cross_entropy(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """At temperature 1; 0 where there is no target."""
    at_target_C = logits_CV.gather(1, target_C[:, None].clamp(min=0))[:, 0]
    return (logits_CV.logsumexp(-1) - at_target_C).where(target_C >= 0, 0)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]
