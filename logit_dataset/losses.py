"""A student's logits and a batch → a scalar loss, with the mass outside the top K treated truthfully.

In:   logits_BTV of the student (or its hidden states and its head), and a batch of `load_logits(…).batches` or of a `LogitCollator`.
Out:  mean loss over the positions that count, in nats; or the loss at each of them.

Position t of the batch holds the teacher's distribution p for the token after input_ids[t], and q = softmax(logits[:, t]) is the
student's for the same token: nothing is shifted here. `target_ids` are those tokens, shifted once, in `rows`.

The losses and their formulas are in `divergences`.

Shape suffixes: B rows, T positions, M = B · T, N positions that count, K top-k, J tail draws, V vocabulary, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from logit_dataset.divergences import LOSSES, AtStudent, AtTeacher, Loss
from logit_dataset.gather import gather_logprobs
from logit_dataset.schema import FLOAT16_MIN, temperature_column

HEAD_CHUNK_POSITIONS = 1024
"""Positions whose logits exist at once when the loss starts from hidden states."""


def distillation_loss(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    *,
    loss: Loss = "tail_bucket",
    text_weight: float = 0.0,
    temperature: float = 1.0,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """Compute (1 − w) · distillation + w · cross-entropy on the text, each a mean over the positions that count.

    The distillation counts where `mask` is True, the cross-entropy where `target_ids` is known. At a temperature T ≠ 1, both
    distributions are softmax(logits / T), and the distillation is multiplied by T² (Hinton et al. 2015, §2). The result is a scalar in
    nats, in float32 (float64 for float64 logits), and 0 if no position counts.

    Args:
        logits_BTV: the student's raw logits in float32, bfloat16, float16 or float64. Statistics are float32 (or float64).
        batch: from the loader, on the device of the logits.
        loss: see `divergences`.
        text_weight: w, 0 to 1.
        temperature: 1, or a temperature whose logsumexp the dataset stores; any above 0 for whole distributions.
        num_positions: what to divide the sums by, in place of this batch's counts. For gradient accumulation, pass the sum of
            `count_positions` over all batches of a step, so that every position has the same weight. One number divides both sums.

    Raises:
        ValueError: the batch lacks what this loss or temperature needs, or holds ids outside the student's vocabulary.
    """
    terms = _Terms.of(batch, loss, text_weight, temperature)
    logits_MV = positions_of(logits_BTV, batch, "logits")
    sums = terms.sums(logits_MV, slice(None), terms.rows_N)
    return terms.combine(sums, num_positions)


def count_positions(batch: Mapping[str, Tensor], *, loss: Loss = "tail_bucket") -> Tensor:
    """Count the positions over which `distillation_loss` averages: [2] int64, of the distillation and of the text's cross-entropy.

    Args:
        batch: as in `distillation_loss`.
        loss: as in `distillation_loss`.

    Raises:
        ValueError: the batch lacks a column that tells.
    """
    check_columns(batch)
    distilled, text = counting(batch, loss)
    return torch.stack([distilled.sum(), text.sum()])


def position_losses(
    logits_BTV: Tensor,
    batch: Mapping[str, Tensor],
    *,
    loss: Loss = "tail_bucket",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the distillation and the text's cross-entropy at each position, [B, T] each, in nats; 0 where they do not count.

    Args:
        logits_BTV, batch, loss, temperature: as in `distillation_loss`.

    Raises:
        ValueError: as in `distillation_loss`.
    """
    terms = _Terms.of(batch, loss, 0.5, temperature)
    logits_MV = positions_of(logits_BTV, batch, "logits")
    values_N = terms.at_positions(logits_MV, slice(None), terms.rows_N)
    both = [v.new_zeros(len(logits_MV)).index_put((terms.rows_N,), v) for v in values_N]
    return both[0].view(logits_BTV.shape[:2]), both[1].view(logits_BTV.shape[:2])


def distillation_loss_from_hidden(
    hidden_BTD: Tensor,
    head: Callable[[Tensor], Tensor],
    batch: Mapping[str, Tensor],
    *,
    loss: Loss = "tail_bucket",
    text_weight: float = 0.0,
    temperature: float = 1.0,
    num_positions: float | Tensor | None = None,
) -> Tensor:
    """Compute `distillation_loss` without holding [B, T, V]: the head runs on a chunk of positions, and again in the backward pass.

    Args:
        hidden_BTD: the student's last hidden states.
        head: the student's head, [n, D] → [n, V], such as `model.lm_head`. It is not called on padding.
        batch, loss, text_weight, temperature, num_positions: as in `distillation_loss`.

    Raises:
        ValueError: as in `distillation_loss`.
    """
    terms = _Terms.of(batch, loss, text_weight, temperature)
    hidden_MD = positions_of(hidden_BTD, batch, "hidden states")

    def chunk_sums(hidden_CD: Tensor, chunk: slice) -> Tensor:
        logits_CV = head(hidden_CD)
        rows_C = torch.arange(len(logits_CV), device=logits_CV.device)
        return terms.sums(logits_CV, chunk, rows_C)

    sums = []
    # Once, though no position may count: then the head's weights have gradients too, for which DDP waits.
    for start in range(0, max(1, len(terms.rows_N)), HEAD_CHUNK_POSITIONS):
        chunk = slice(start, start + HEAD_CHUNK_POSITIONS)
        hidden_CD = hidden_MD.index_select(0, terms.rows_N[chunk])
        sums.append(checkpoint(chunk_sums, hidden_CD, chunk, use_reentrant=False))
    return terms.combine(torch.stack(sums).sum(0), num_positions)


def check_columns(batch: Mapping[str, Tensor]) -> None:
    """See that a batch is one.

    Raises:
        ValueError: it lacks what every loss needs.
    """
    if missing := {"input_ids", "target_ids", "mask"} - set(batch):
        raise ValueError(
            f"the batch has no {', '.join(sorted(missing))}; take it from load_logits(…).batches(…) or a LogitCollator, which shift and mask"
        )


def counting(batch: Mapping[str, Tensor], loss: Loss) -> tuple[Tensor, Tensor]:
    """[B, T] each: where the distillation counts, and where the text does."""
    has_target = batch["target_ids"] >= 0
    return batch["mask"] & has_target if loss == "residual" else batch["mask"], has_target


def positions_of(values_BTX: Tensor, batch: Mapping[str, Tensor], what: str) -> Tensor:
    """[M, X]: what a student has at each position of a batch."""
    found, expected = tuple(values_BTX.shape), tuple(batch["input_ids"].shape)
    if found[:-1] != expected:
        raise ValueError(
            f"{what} have shape {found}, but the batch {expected}; pass those of all its positions, in its order"
        )
    return values_BTX.flatten(0, 1)


@dataclass(slots=True, kw_only=True)
class _Terms:
    """What a loss is made of: the positions that count, and the teacher there."""

    loss: Loss
    text_weight: float
    temperature: float
    rows_N: Tensor
    """Indices of the positions in B · T."""
    distilled_N: Tensor
    """Whether the distillation counts there."""
    teacher: AtTeacher

    @classmethod
    def of(
        cls, batch: Mapping[str, Tensor], loss: Loss, text_weight: float, temperature: float
    ) -> "_Terms":
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(get_args(Loss))}")
        if not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight is {text_weight}, expected 0 to 1")
        check_columns(batch)
        if loss == "tail_draws":
            _check_draws(batch, temperature)
        distilled_M, text_M = (counts.flatten() for counts in counting(batch, loss))
        if text_weight == 1:
            distilled_M = torch.zeros_like(distilled_M)
        counts_M = distilled_M | text_M if text_weight else distilled_M
        rows_N = counts_M.nonzero()[:, 0]
        return cls(
            loss=loss,
            text_weight=text_weight,
            temperature=temperature,
            rows_N=rows_N,
            distilled_N=distilled_M[rows_N],
            teacher=_teacher(batch, rows_N, loss, temperature),
        )

    def sums(self, logits_MV: Tensor, chunk: slice, rows_C: Tensor) -> Tensor:
        """[2]: the distillation and the cross-entropy, each summed over the positions of a chunk."""
        return torch.stack([v.sum() for v in self.at_positions(logits_MV, chunk, rows_C)])

    def at_positions(
        self, logits_MV: Tensor, chunk: slice, rows_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The distillation and the cross-entropy at the positions of a chunk, 0 where they do not count; a scalar 0 of what is not asked for."""
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)

        def part(values: Tensor) -> Tensor:
            return values[chunk].to(dtype) if values.is_floating_point() else values[chunk]

        values = {field.name: getattr(self.teacher, field.name) for field in fields(AtTeacher)}
        parts: dict[str, Any] = {n: part(v) for n, v in values.items() if torch.is_tensor(v)}
        teacher = replace(self.teacher, **parts)
        other_NJ = torch.cat([teacher.target_N[:, None], teacher.draws_NJ], dim=1)
        distilled = text = logits_MV.new_zeros((), dtype=dtype)
        if self.text_weight < 1:
            head_NK, tail_N, other = gather_logprobs(
                logits_MV, rows_C, teacher.head_NK, other_NJ, scale=1 / self.temperature
            )
            student = AtStudent(
                head_NK=head_NK, tail_N=tail_N, target_N=other[:, 0], draws_NJ=other[:, 1:]
            )
            loss_N = LOSSES[self.loss](teacher, student) * self.temperature**2
            distilled = loss_N.where(self.distilled_N[chunk], 0)
        if self.text_weight:
            if self.text_weight == 1 or self.temperature != 1:  # the text is learned at 1
                empty_N0 = teacher.head_NK[:, :0]
                other = gather_logprobs(logits_MV, rows_C, empty_N0, other_NJ[:, :1])[2]
            text = -other[:, 0].where(teacher.target_N >= 0, 0)
        return distilled, text

    def combine(self, sums: Tensor, num_positions: float | Tensor | None) -> Tensor:
        """The weighted mean; 0 of no positions."""
        if num_positions is None:
            counts = torch.stack([self.distilled_N.sum(), (self.teacher.target_N >= 0).sum()])
        else:
            counts = torch.as_tensor(num_positions, dtype=sums.dtype, device=sums.device)
        means = sums / (counts + (counts == 0))
        return (1 - self.text_weight) * means[0] + self.text_weight * means[1]


def _teacher(
    batch: Mapping[str, Tensor], rows_N: Tensor, loss: Loss, temperature: float
) -> AtTeacher:
    def rows(name: str) -> Tensor:
        return batch[name].flatten(0, 1)[rows_N]

    target_N = rows("target_ids").long()
    if "logprobs" in batch:
        return _whole(_float(rows("logprobs")), target_N, temperature)
    head_NK, logp_NK, logp_tail_N = (
        rows(name) for name in ("topk_indices", "topk_logprobs", "tail_logprob")
    )
    logp_NK, logp_tail_N = _float(logp_NK), _float(logp_tail_N)
    if temperature != 1:
        logp_NK, logp_tail_N = _at_temperature(batch, rows_N, logp_NK, logp_tail_N, temperature)
    has_other = "other_indices" in batch
    if has_other:  # a projection's; it has no temperatures
        head_NK = torch.cat([head_NK, rows("other_indices")[:, None]], dim=1)
        logp_NK = torch.cat([logp_NK, _float(rows("other_logprob"))[:, None]], dim=1)
    return AtTeacher(
        head_NK=head_NK,
        logp_NK=logp_NK,
        logp_tail_N=logp_tail_N,
        target_N=target_N,
        draws_NJ=rows("tail_indices").long() if loss == "tail_draws" else target_N[:, None][:, :0],
        last_is_bound=has_other,
    )


def _whole(logp_NV: Tensor, target_N: Tensor, temperature: float) -> AtTeacher:
    """A teacher of whom all is known, at any temperature: every id is listed, and there is no tail."""
    if temperature != 1:
        logp_NV = (logp_NV / temperature).log_softmax(-1)
    every_V = torch.arange(logp_NV.shape[1], device=logp_NV.device)
    return AtTeacher(
        head_NK=every_V.expand(logp_NV.shape),
        logp_NK=logp_NV,
        logp_tail_N=torch.full_like(logp_NV[:, 0], FLOAT16_MIN),
        target_N=target_N,
        draws_NJ=target_N[:, None][:, :0],
    )


def _at_temperature(
    batch: Mapping[str, Tensor],
    rows_N: Tensor,
    logp_NK: Tensor,
    logp_tail_N: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Head and tail of softmax(logits / T), from the logsumexp S_T of logits / T.

    log p_T = raw / T − S_T with raw = log p + S. The tail is 1 − Σ_h p_T, which cancels where the head holds nearly everything.
    There a bound holds that does not: with r the smallest raw logit of the head, no tail logit x is above r, so that Σ_tail exp(x / T)
    is at least (T > 1; at most, T < 1) exp(r / T − r) Σ_tail exp(x), and that last sum is exp(S) p_tail.
    """
    name = temperature_column(temperature).name
    if name not in batch or "logsumexp" not in batch:
        stored = [column for column in batch if column.startswith("logsumexp_t")]
        raise ValueError(
            f"temperature {temperature:g} was not stored (no column {name}; stored: {', '.join(stored) or 'none'}); "
            "the tail cannot be known without it. Use temperature 1, load without a projection, or build the dataset "
            f"with temperatures = [{temperature:g}]"
        )
    logsumexp_N, logsumexp_t_N = (
        batch[column].flatten(0, 1)[rows_N].double() for column in ("logsumexp", name)
    )
    raw_NK = logp_NK.double() + logsumexp_N[:, None]
    scaled_NK = raw_NK / temperature - logsumexp_t_N[:, None]
    head_N = scaled_NK.logsumexp(-1)
    tail_raw_N = logp_tail_N.double() + logsumexp_N
    gone_NK = logp_NK <= FLOAT16_MIN
    least_N = raw_NK.masked_fill(gone_NK, torch.inf).amin(-1)
    bound_N = tail_raw_N + least_N * (1 / temperature - 1) - logsumexp_t_N
    tail_N = torch.log(-torch.expm1(head_N)).where(head_N < 0, bound_N)
    tail_N = torch.maximum(tail_N, bound_N) if temperature > 1 else torch.minimum(tail_N, bound_N)
    return (
        scaled_NK.masked_fill(gone_NK, FLOAT16_MIN).to(logp_NK.dtype),
        tail_N.masked_fill(logp_tail_N <= FLOAT16_MIN, FLOAT16_MIN).to(logp_tail_N.dtype),
    )


def _float(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_draws(batch: Mapping[str, Tensor], temperature: float) -> None:
    if "logprobs" in batch:
        raise ValueError(
            "loss 'tail_draws' estimates a tail, but this batch has whole distributions, without one; use loss 'tail_bucket', "
            "which is the exact KL then"
        )
    if "tail_indices" not in batch:
        raise ValueError(
            "loss 'tail_draws' needs the column tail_indices, which this batch does not have; build the dataset with "
            "draws from the tail, or use loss 'tail_bucket'"
        )
    if temperature != 1:
        raise ValueError(
            f"loss 'tail_draws' was asked for temperature {temperature:g}, but the draws were made at 1; use "
            "temperature 1, or loss 'tail_bucket'"
        )
