"""The stored columns of a row, and the teacher's logits for it → how far apart they are, in nats.

The reference is a plain float64 log-softmax over the whole vocabulary; of the capture's code, nothing is shared.

Shape suffixes: T positions, C those in the loss mask, V vocabulary, K top-k, M draws from the tail, D hidden.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from builder.corpus.sequences import NO_TOKEN
from builder.teacher.model import Teacher
from logit_dataset.schema import FLOAT16_MIN, Layout, float16_rounding, temperature_column

MAX_FLOAT32_ERROR = 2e-3
"""Nats beyond float16 rounding, for a teacher run in float32: kernels differ between batch shapes and machines."""
MAX_MEAN_ERROR = 0.15
"""Mean |Δ| of a row in nats, for a teacher in 16 bits: its own rounding is about 0.05."""
MAX_BIAS = 0.01
"""|mean Δ| over all rows in nats, for a teacher in 16 bits: rounding has no direction, a renormalised tail has."""

MAX_DIVERGENCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Mean KL of a row in nats, from the teacher to the distribution that its head makes of the stored hidden states."""
REBUILT = "the distribution of hidden_states"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """One stored row, and the token that follows its last one."""

    where: str
    """File and number, for messages."""
    is_whole_document: bool
    text: str | None
    input_ids: list[int]
    next_token: int
    columns: dict[str, Tensor]
    """Every other column of one or several values a token, in its stored type; those of several may hold positions in the loss mask only."""
    mask_T: Tensor
    """[T] bool: positions of which columns of several values are there."""

    def at(self, here: slice) -> dict[str, Tensor]:
        """The columns at some positions, as float64 or int64."""
        first, stop = (int(self.mask_T[:end].sum()) for end in (here.start, here.stop))
        parts = {
            name: values[here] if values.ndim == 1 else values[first:stop]
            for name, values in self.columns.items()
        }
        return {
            name: v.double() if v.is_floating_point() else v.long() for name, v in parts.items()
        }


def compare(
    row: StoredRow, teacher: Teacher, layout: Layout, dtype: str, totals: dict[str, float]
) -> tuple[Tensor, list[str]]:
    """Δ of all stored log-probabilities of the head of a row, flat, and one line for each column that is too far from the teacher's.

    Args:
        row: of the dataset.
        teacher: to run on it.
        layout: of the dataset.
        dtype: the teacher's, which decides how far is too far.
        totals: what the statistics over all rows are made of; added to.
    """
    targets_T = torch.tensor([*row.input_ids[1:], row.next_token])
    errors: dict[str, list[Tensor]] = defaultdict(list)
    raw: list[Tensor] = []
    start = 0
    for logits_TV in teacher.logits([row.input_ids]):
        here = slice(start, start + len(logits_TV))
        start += len(logits_TV)
        logits_TV = logits_TV.cpu().double()
        logprobs_TV = logits_TV.log_softmax(-1)
        target_T = logprobs_TV.gather(1, targets_T[here].clamp(min=0)[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV.clamp(min=FLOAT16_MIN)).sum(-1)
        stored, mask_T = row.at(here), row.mask_T[here]
        known = targets_T[here] != NO_TOKEN
        compared = {
            "target_logprob": (stored["target_logprob"][known], target_T[known]),
            "entropy": (stored["entropy"], entropy_T),
            **_head(stored, logprobs_TV, layout, mask_T),
        }
        for name, (found, expected) in compared.items():
            errors[name].append(_beyond_rounding(found, expected))
        errors["logsumexp"].append(stored["logsumexp"] - logits_TV.logsumexp(-1))
        for name, error in _added(stored, logits_TV, teacher, layout, mask_T):
            errors[name].append(error)
        best_TK, expected_TK = _best(stored, logprobs_TV[mask_T])
        errors["missing from the top K"].append(best_TK - expected_TK)
        name = "logprobs" if layout.top_k == "all" else "topk_logprobs"
        found, expected = compared[name]
        raw.append((found - expected.clamp(min=FLOAT16_MIN)).flatten())
        totals["tokens"] += len(logits_TV)
        totals["targets"] += int(known.sum())
        totals["kept"] += len(best_TK)
        totals["top1"] += int((best_TK[:, 0] - expected_TK[:, 0] < 1e-9).sum())
        totals["nll_stored"] -= float(stored["target_logprob"][known].sum())
        totals["nll_recomputed"] -= float(target_T[known].sum())
    found_far = (_too_far(name, torch.cat(parts).abs(), dtype) for name, parts in errors.items())
    return torch.cat(raw), [f"{row.where}: {problem}" for problem in found_far if problem]


def _head(
    stored: dict[str, Tensor], logprobs_TV: Tensor, layout: Layout, mask_T: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The columns of the top K, or of the whole vocabulary: (stored, expected) of each."""
    if layout.top_k == "all":
        return {"logprobs": (stored["logprobs"], logprobs_TV[mask_T])}
    # Where no top K was kept, the tail is what is outside the teacher's own.
    indices_TK = logprobs_TV.topk(layout.top_k).indices
    indices_TK[mask_T] = stored["topk_indices"]
    rest_TV = logprobs_TV.scatter(1, indices_TK, -torch.inf)
    return {
        "topk_logprobs": (
            stored["topk_logprobs"],
            logprobs_TV[mask_T].gather(1, stored["topk_indices"]),
        ),
        "tail_logprob": (stored["tail_logprob"], rest_TV.logsumexp(-1)),
    }


def _added(
    stored: dict[str, Tensor],
    logits_TV: Tensor,
    teacher: Teacher,
    layout: Layout,
    mask_T: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Errors of the columns that a recipe may add."""
    logprobs_CV = logits_TV[mask_T].log_softmax(-1)
    if layout.tail_samples:
        gone_C1 = (stored["tail_logprob"][mask_T] <= FLOAT16_MIN)[:, None]
        drawn_CM = logprobs_CV.gather(1, stored["tail_indices"]).masked_fill(gone_C1, -torch.inf)
        yield "tail_logprobs", _beyond_rounding(stored["tail_logprobs"], drawn_CM)
    for temperature in layout.temperatures:
        name = temperature_column(temperature).name
        yield name, stored[name] - (logits_TV / temperature).logsumexp(-1)
    if layout.hidden_states and len(logprobs_CV):
        pieces = teacher.head(stored["hidden_states"].to(teacher.device, teacher.dtype))
        rebuilt_CV = torch.cat(list(pieces)).cpu().double().log_softmax(-1)
        yield REBUILT, _divergence(logprobs_CV, rebuilt_CV)


def _best(stored: dict[str, Tensor], logprobs_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of its own top K and of the stored one, by rank; where all are stored, of the first."""
    if "logprobs" in stored:
        stored_TV = stored["logprobs"]
        # Several may be the first once they are rounded.
        first_TV = logprobs_TV.masked_fill(stored_TV < stored_TV.amax(-1, keepdim=True), -torch.inf)
        return logprobs_TV.amax(-1, keepdim=True), first_TV.amax(-1, keepdim=True)
    indices_TK = stored["topk_indices"]
    best_TK = logprobs_TV.topk(indices_TK.shape[1]).values
    return best_TK, logprobs_TV.gather(1, indices_TK).sort(-1, descending=True).values


def _divergence(logprobs_TV: Tensor, rebuilt_TV: Tensor) -> Tensor:
    """KL(teacher ‖ rebuilt) at each position, [T]."""
    difference_TV = (logprobs_TV - rebuilt_TV).masked_fill(logprobs_TV == -torch.inf, 0)
    return (logprobs_TV.exp() * difference_TV).sum(-1)


def _too_far(name: str, errors: Tensor, dtype: str) -> str | None:
    """What to say of a column whose errors are too large."""
    if not errors.numel():
        return None
    if name == REBUILT:
        worst, limit = float(errors.mean()), MAX_DIVERGENCE[dtype]
    elif dtype == "float32":
        worst, limit = float(errors.max()), MAX_FLOAT32_ERROR
    else:
        worst, limit = float(errors.mean()), MAX_MEAN_ERROR
    if worst <= limit:
        return None
    return f"{name} is {worst:.3g} nats from the teacher's, more than {limit:g}"


def _beyond_rounding(stored: Tensor, expected: Tensor) -> Tensor:
    """How much further apart two values are than float16 rounding explains."""
    expected = expected.clamp(min=FLOAT16_MIN)
    rounding = torch.from_numpy(float16_rounding(expected.numpy()))
    return ((stored - expected).abs() - rounding).clamp(min=0)
