"""Raw logits of a student → the few log-probabilities that a loss needs, without a second [B, T, V].

In:   logits_MV in any float type; for N of the M positions a list of distinct ids (the head) and some other ids.
Out:  log q of every head id, of everything outside the head together (the tail), and of the other ids, in float32
      (float64 for float64 logits).

How:  one autograd function, in chunks of a few positions. The tail is a log-sum-exp over the logits that remain when those of
      the head are taken out: a sum of positive terms, right however small it is, where log(1 − Σ q) would cancel.
      The backward pass computes the exponentials again. With g the gradients that come in, G their sum over all outputs and
      S the log-sum-exp of the tail's logits z:

          ∂/∂z_i = (g_tail − G q_tail) exp(z_i − S)  outside the head,  g_i − G q_i  inside,  + g_j at each other id j.

Cost: the gradient of the logits, in their own type, is the only new [M, V]; a chunk takes CHUNK_BYTES.

Shape suffixes: M positions of the logits, N those that count, C those of a chunk, K head ids, J other ids, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**21
"""Logits worked on at once on a CPU: they stay in its last-level cache."""
DEVICE_CHUNK_BYTES = 2**28
"""The same on any other device, which a chunk must fill."""


def gather_logprobs(
    logits_MV: Tensor, rows_N: Tensor, head_NK: Tensor, other_NJ: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax(scale · logits) of N positions.

    Args:
        logits_MV: raw logits.
        rows_N: which of the M positions count.
        head_NK: distinct ids; a negative one marks an empty place, whose log-probability is −inf.
        other_NJ: any ids, inside the head or not, repeated or not; negative as above.
        scale: 1 / temperature.

    Returns:
        log q of the head [N, K], of the tail [N] (−inf where the head is everything), of the other ids [N, J].

    Raises:
        ValueError: an id is outside the logits. (With CUDA, where looking would be waiting, its own assertion fails.)
    """
    vocab_size = logits_MV.shape[1]
    for ids in (head_NK, other_NJ):
        if not ids.is_cuda and ids.numel() and int(ids.max()) >= vocab_size:
            raise ValueError(
                f"the batch names token id {int(ids.max())}, but the student has {vocab_size} logits; give it the "
                "teacher's vocabulary, or load batches with a projection onto its own"
            )
    outputs: tuple[Tensor, Tensor, Tensor] = _GatherLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_MV, rows_N, head_NK, other_NJ, scale
    )
    return outputs


class _GatherLogprobs(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, rows_N: Tensor, head_NK: Tensor, other_NJ: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        head = torch.empty(head_NK.shape, dtype=dtype, device=logits_MV.device)
        tail, other = head.new_empty(len(rows_N)), head.new_empty(other_NJ.shape)
        tail_logsumexp = torch.empty_like(tail)
        for chunk in _chunks(logits_MV, len(rows_N)):
            logits_CV, head_CK, other_CJ = _prepare(
                logits_MV, rows_N[chunk], head_NK[chunk], other_NJ[chunk], scale
            )
            head_logits_CK, other_logits_CJ = (
                logits_CV.gather(1, head_CK),
                logits_CV.gather(1, other_CJ),
            )
            logits_CV.scatter_(1, head_CK, -torch.inf)
            tail_C = _logsumexp_in_place(logits_CV)
            total_C = torch.logaddexp(head_logits_CK.logsumexp(-1), tail_C)
            head[chunk] = head_logits_CK - total_C[:, None]
            other[chunk] = other_logits_CJ - total_C[:, None]
            tail[chunk], tail_logsumexp[chunk] = tail_C - total_C, tail_C
        ctx.save_for_backward(logits_MV, rows_N, head_NK, other_NJ, head, tail, tail_logsumexp)
        ctx.scale = scale
        return head, tail, other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g_head_NK, g_tail_N, g_other_NJ = gradients
        logits_MV, rows_N, head_NK, other_NJ, logq_head_NK, logq_tail_N, tail_logsumexp_N = (
            ctx.saved_tensors
        )
        total_N = g_head_NK.sum(-1) + g_tail_N + g_other_NJ.sum(-1)
        g_tail_N = g_tail_N - total_N * logq_tail_N.exp()
        g_head_NK = g_head_NK - total_N[:, None] * logq_head_NK.exp()
        shift_N = tail_logsumexp_N.clamp(min=torch.finfo(tail_logsumexp_N.dtype).min)
        grad_MV = torch.zeros_like(logits_MV)
        for chunk in _chunks(logits_MV, len(rows_N)):
            logits_CV, head_CK, other_CJ = _prepare(
                logits_MV, rows_N[chunk], head_NK[chunk], other_NJ[chunk], ctx.scale
            )
            logits_CV.sub_(shift_N[chunk, None]).exp_().mul_(g_tail_N[chunk, None])
            logits_CV.scatter_(1, head_CK, g_head_NK[chunk])
            logits_CV.scatter_add_(1, other_CJ, g_other_NJ[chunk])
            grad_CV = logits_CV[:, :-1].mul_(ctx.scale)
            grad_MV.index_copy_(0, rows_N[chunk], grad_CV.to(grad_MV.dtype))
        return grad_MV, None, None, None, None


def _prepare(
    logits_MV: Tensor, rows_C: Tensor, head_CK: Tensor, other_CJ: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's scaled logits with one more column of −inf, to which empty places point, and nothing else."""
    num_rows, vocab_size = len(rows_C), logits_MV.shape[1]
    dtype = torch.promote_types(logits_MV.dtype, torch.float32)
    logits_CV = torch.empty(num_rows, vocab_size + 1, dtype=dtype, device=logits_MV.device)
    logits_CV[:, :-1] = logits_MV.index_select(0, rows_C)
    if scale != 1.0:
        logits_CV.mul_(scale)
    logits_CV[:, -1] = -torch.inf
    # The id V, of a student with one logit too few, moves on to where there is no column.
    head_CK, other_CJ = (
        (ids + (ids >= vocab_size)).long().where(ids >= 0, vocab_size)
        for ids in (head_CK, other_CJ)
    )
    return logits_CV, head_CK, other_CJ


def _logsumexp_in_place(values_CV: Tensor) -> Tensor:
    """log Σ exp over the last axis; overwrites its argument."""
    maximum_C1 = values_CV.amax(-1, keepdim=True).clamp(min=torch.finfo(values_CV.dtype).min)
    return values_CV.sub_(maximum_C1).exp_().sum(-1).log() + maximum_C1[:, 0]


def _chunks(logits_MV: Tensor, num_rows: int) -> list[slice]:
    chunk_bytes = CHUNK_BYTES if logits_MV.device.type == "cpu" else DEVICE_CHUNK_BYTES
    size = max(1, chunk_bytes // (4 * logits_MV.shape[1]))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
