"""The stored values of some positions → which positions break which invariant of the schema.

In:   the columns of N positions as flat arrays in their stored types, and the tokens that follow where they are known; of positions that
      were not kept, the columns of one value a token.
Out:  pairs of a mask [N] and a line on what is wrong where it is true.

All of it holds for every true distribution, within the rounding of the stored types; nothing here needs the teacher.

Shape suffixes: N positions, K top-k (or the whole vocabulary), M draws from the tail.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from logit_dataset.schema import FLOAT16_MIN, Layout, float16_rounding, temperature_column

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_] | np.bool_

MASS_TOLERANCE = 1e-3
"""Of Σ exp(top K) + exp(tail) = 1, or what rounding to float16 can do at worst, if that is more."""
ENTROPY_TOLERANCE = 0.02
"""Nats: float16 rounding of the entropy itself and of the stored part."""
FLOAT32_ROUNDING = 1e-6
"""Relative, of a logsumexp: some units of a float32's last digit."""


def broken(stored: dict[str, Array], targets_N: Ints, layout: Layout) -> Iterator[tuple[Mask, str]]:
    """What is wrong, and where.

    Args:
        stored: every column of one or several values a token, or of one value only.
        targets_N: the token that follows each position, negative where that is not known.
        layout: of the dataset.
    """
    columns: dict[str, Floats] = {}
    ids: dict[str, Ints] = {}
    for name, values in stored.items():
        if values.dtype == np.bool_:
            continue
        if np.issubdtype(values.dtype, np.integer):
            ids[name] = values.astype(np.int64).reshape(len(values), -1)
        else:
            columns[name] = values.astype(np.float64)
    for name, ids_NK in ids.items():
        outside = ((ids_NK < 0) | (ids_NK >= layout.vocab_size)).any(-1)
        yield outside, f"{name} outside 0 … {layout.vocab_size - 1}"
    for name, values in columns.items():
        if name != "target_logprob":
            yield ~np.isfinite(values).reshape(len(values), -1).all(-1), f"{name} is not finite"
    yield columns["target_logprob"] > 0, "target_logprob is above 0"
    known = targets_N >= 0
    yield known & np.isnan(columns["target_logprob"]), "target_logprob is NaN"
    if not stored.keys() & {"logprobs", "topk_logprobs"}:
        yield from _not_kept(columns, layout)
        return
    if layout.top_k == "all":
        yield from _whole(columns, np.clip(targets_N, 0, layout.vocab_size - 1), known)
    else:
        yield from _top_k(columns, ids["topk_indices"], layout)
        yield from _target(columns, ids["topk_indices"], targets_N)
    if layout.tail_samples:
        yield from _draws(columns, ids, targets_N, layout)
    for temperature in layout.temperatures:
        yield _temperature(columns, temperature, layout)


def broken_completions(
    stored: dict[str, Array],
    starts_R: Ints,
    ends_R: Ints,
    *,
    generation: Mapping[str, Any],
    eos_ids: Sequence[int],
) -> Iterator[tuple[Mask, str]]:
    """What is wrong, and where, with completions that the teacher wrote.

    Args:
        stored: every column of one or several values a token, of whole rows.
        starts_R: where each row begins.
        ends_R: where each row ends.
        generation: the recipe's section.
        eos_ids: tokens that end a completion.
    """
    ids_N, mask_N = stored["input_ids"], stored["completion_mask"].astype(bool)
    is_last_N = np.zeros(len(ids_N), bool)
    is_last_N[ends_R - 1] = True
    is_first_N = np.zeros(len(ids_N), bool)
    is_first_N[starts_R] = True
    next_is_written_N = np.append(mask_N[1:], False) & ~is_last_N
    yield is_first_N & mask_N, "the row begins with its completion"
    yield is_last_N & ~mask_N, "the row does not end with its completion"
    yield mask_N & ~next_is_written_N & ~is_last_N, "the completion is interrupted"
    known_N = ~np.isnan(stored["target_logprob"].astype(np.float64))
    yield is_last_N & known_N, "target_logprob is there, but nothing follows a completion"

    limit = generation["max_new_tokens"]
    lengths_N = np.repeat(np.add.reduceat(mask_N.astype(np.int64), starts_R), ends_R - starts_R)
    yield is_last_N & (lengths_N > limit), f"the completion is longer than {limit} tokens"
    is_end_N = np.isin(ids_N, eos_ids) & mask_N
    yield is_end_N & ~is_last_N, "the completion goes on after the token that ends it"
    is_cut_N = is_last_N & ~is_end_N & (lengths_N < limit)
    yield is_cut_N, f"the completion ends before {limit} tokens, and with none that ends it"

    if generation["temperature"] == 0:
        positions = np.flatnonzero(next_is_written_N)
        wrong_N = np.zeros(len(ids_N), bool)
        wrong_N[positions] = ~_is_choice(stored, positions, ids_N[positions + 1])
        yield wrong_N, "the completion was written greedily, but not with the most probable token"


def surprise_beyond_entropy(stored: dict[str, Array]) -> Floats:
    """How much more surprising than the entropy says each token of the completions was, in nats; of whole rows that begin with a prompt.

    Of tokens that are drawn from the stored distribution itself, this is 0 on average.
    """
    before_N = np.append(stored["completion_mask"][1:].astype(bool), False)
    target_C, entropy_C = (
        stored[name][before_N].astype(np.float64) for name in ("target_logprob", "entropy")
    )
    surplus: Floats = -target_C - entropy_C
    return surplus


def _is_choice(stored: dict[str, Array], positions: Ints, following_C: Array) -> Mask:
    """Whether the token that follows each position is the first of the stored distribution there."""
    name = "logprobs" if "logprobs" in stored else "topk_indices"
    values_CK = stored[name]
    if len(values_CK) == len(stored["input_ids"]):  # else they are of these positions only
        values_CK = values_CK[positions]
    if name == "topk_indices":
        found: Mask = values_CK[:, 0] == following_C
        return found
    # Several may be the first once they are rounded.
    following_C1 = following_C[:, None].astype(np.int64).clip(0, values_CK.shape[1] - 1)
    at_following_C = np.take_along_axis(values_CK, following_C1, -1)[:, 0]
    highest: Mask = at_following_C == values_CK.max(-1)
    return highest


def sampled_entropy(stored: dict[str, Array]) -> Floats:
    """[N]: what top K and draws say of the entropy: on average over draws, the entropy itself."""
    names = ("topk_logprobs", "tail_logprob", "tail_logprobs")
    head_NK, tail_N, draws_NM = (stored[name].astype(np.float64) for name in names)
    estimate: Floats = -(np.exp(head_NK) * head_NK).sum(-1) - np.exp(tail_N) * draws_NM.mean(-1)
    return estimate


def drawn_targets(stored: dict[str, Array], targets_N: Ints) -> tuple[Floats, Floats, Floats]:
    """How often the token that follows was drawn, how often it is on average, and the variance of that, [N] each.

    Of a token outside the top K, each draw is it with the probability target_logprob − tail_logprob says. A draw is made without a look
    at the token that follows, so that over many positions the two are the same but for chance: what ids alone tell of draws.
    """
    target_N, tail_N = (stored[name].astype(np.float64) for name in ("target_logprob", "tail_logprob"))  # fmt: skip
    targets_N1 = targets_N[:, None]
    counts_N = (targets_N >= 0) & (tail_N > FLOAT16_MIN) & ~np.isnan(target_N)
    counts_N &= ~(stored["topk_indices"] == targets_N1).any(-1)
    draws_NM = stored["tail_indices"]
    share_N = np.exp(np.minimum(target_N - tail_N, 0), where=counts_N, out=np.zeros(len(counts_N)))
    found_N = np.where(counts_N, (draws_NM == targets_N1).sum(-1), 0.0)
    num_draws = draws_NM.shape[1]
    return found_N, num_draws * share_N, num_draws * share_N * (1 - share_N)


def _not_kept(columns: dict[str, Floats], layout: Layout) -> Iterator[tuple[Mask, str]]:
    entropy_N = columns["entropy"]
    yield entropy_N < 0, "entropy is below 0"
    yield entropy_N > np.log(layout.vocab_size) + ENTROPY_TOLERANCE, "entropy is above log V"
    if layout.top_k == "all":
        return
    tail_N = columns["tail_logprob"]
    yield tail_N > 0, "tail_logprob is above 0"
    tail_mass_N = np.exp(tail_N)
    head_mass_N = np.maximum(1 - tail_mass_N, 0)
    head_N = np.log(np.maximum(head_mass_N, np.finfo(np.float64).tiny))
    # Head and tail alone have less entropy than all events, but not by more than an even head and an even tail have.
    least_N = -tail_mass_N * tail_N - head_mass_N * head_N
    most_N = (
        least_N
        + head_mass_N * np.log(layout.top_k)
        + tail_mass_N * np.log(max(_tail_size(layout), 1))
    )
    fits = (entropy_N >= least_N - ENTROPY_TOLERANCE) & (entropy_N <= most_N + ENTROPY_TOLERANCE)
    yield ~fits, "entropy does not fit the stored tail"


def _top_k(
    columns: dict[str, Floats], indices_NK: Ints, layout: Layout
) -> Iterator[tuple[Mask, str]]:
    ordered = np.sort(indices_NK, axis=-1)
    yield (ordered[:, 1:] == ordered[:, :-1]).any(-1), "an id stands twice in topk_indices"
    head_NK, tail_N1 = columns["topk_logprobs"], columns["tail_logprob"][:, None]
    yield (head_NK > 0).any(-1), "a log-probability is above 0"
    yield (np.diff(head_NK, axis=-1) > 0).any(-1), "topk_logprobs rise with rank"
    # With the tail as one bucket there is less entropy than in truth, but not by more than an even tail has.
    spread_N = np.exp(tail_N1[:, 0]) * np.log(max(_tail_size(layout), 1))
    events = np.concatenate([head_NK, tail_N1], axis=-1)
    yield from _mass_and_entropy(events, spread_N, columns["entropy"], "top K and tail")


def _whole(columns: dict[str, Floats], targets_N: Ints, known: Mask) -> Iterator[tuple[Mask, str]]:
    logprobs_NV = columns["logprobs"]
    yield (logprobs_NV > 0).any(-1), "a log-probability is above 0"
    yield from _mass_and_entropy(
        logprobs_NV, np.zeros(len(logprobs_NV)), columns["entropy"], "probabilities"
    )
    at_target_N = np.take_along_axis(logprobs_NV, targets_N[:, None], axis=-1)[:, 0]
    differs = known & (at_target_N != columns["target_logprob"])
    yield differs, "target_logprob differs from the target's own entry in logprobs"


def _mass_and_entropy(
    events_NK: Floats, spread_N: Floats, entropy_N: Floats, what: str
) -> Iterator[tuple[Mask, str]]:
    mass_NK = np.exp(events_NK)
    rounding_N = (mass_NK * float16_rounding(events_NK)).sum(-1)
    tolerance_N = np.maximum(MASS_TOLERANCE, rounding_N + 1e-4)
    yield ~(np.abs(mass_NK.sum(-1) - 1) <= tolerance_N), f"{what} do not sum to 1"
    least_N = -(mass_NK * np.maximum(events_NK, FLOAT16_MIN)).sum(-1)
    fits = (entropy_N >= least_N - ENTROPY_TOLERANCE) & (
        entropy_N <= least_N + spread_N + ENTROPY_TOLERANCE
    )
    yield ~fits, "entropy does not fit the stored distribution"


def _target(
    columns: dict[str, Floats], indices_NK: Ints, targets_N: Ints
) -> Iterator[tuple[Mask, str]]:
    head_NK, target_N = columns["topk_logprobs"], columns["target_logprob"]
    listed_NK = indices_NK == targets_N[:, None]
    known = targets_N >= 0
    inside = listed_NK.any(-1) & known
    at_rank_N = np.take_along_axis(head_NK, listed_NK.argmax(-1)[:, None], axis=-1)[:, 0]
    differs = inside & (at_rank_N != target_N)
    yield differs, "target_logprob differs from the target's own entry in the top K"
    above = known & ~inside & (target_N > head_NK[:, -1])
    yield above, "target_logprob of a token outside the top K is above the K-th"


def _draws(
    columns: dict[str, Floats], ids: dict[str, Ints], targets_N: Ints, layout: Layout
) -> Iterator[tuple[Mask, str]]:
    drawn_NM = ids["tail_indices"]
    head_NK, tail_N1 = columns["topk_logprobs"], columns["tail_logprob"][:, None]
    row_N1 = np.arange(len(drawn_NM))[:, None] * layout.vocab_size
    listed_NM = np.isin(drawn_NM + row_N1, ids["topk_indices"] + row_N1)
    # Where there is no tail, the K-th id stands for a draw.
    stands_in_NM = (tail_N1 <= FLOAT16_MIN) & (drawn_NM == ids["topk_indices"][:, -1:])
    yield (listed_NM & ~stands_in_NM).any(-1), "a draw from the tail is in the top K"
    if not layout.tail_logprobs:
        return
    logprobs_NM = columns["tail_logprobs"]
    gone_NM = (tail_N1 <= FLOAT16_MIN) & (logprobs_NM > FLOAT16_MIN)
    yield gone_NM.any(-1), "a draw has a probability, but the tail has none"
    yield (logprobs_NM > head_NK[:, -1:]).any(-1), "a draw from the tail is above the K-th"
    slack_NM = float16_rounding(logprobs_NM) + float16_rounding(tail_N1)
    slack_NM += 1e-4 + FLOAT32_ROUNDING * np.abs(columns["logsumexp"])[:, None]
    yield (logprobs_NM > tail_N1 + slack_NM).any(-1), "a draw is more probable than the whole tail"
    is_target_NM = drawn_NM == targets_N[:, None]
    differs_NM = is_target_NM & ~listed_NM & (logprobs_NM != columns["target_logprob"][:, None])
    yield differs_NM.any(-1), "the target was drawn, but with another log-probability"
    order_NM = drawn_NM.argsort(-1)
    same_NM = np.diff(np.take_along_axis(drawn_NM, order_NM, -1)) == 0
    change_NM = np.diff(np.take_along_axis(logprobs_NM, order_NM, -1)) != 0
    yield (same_NM & change_NM).any(-1), "an id was drawn twice, with two log-probabilities"


def _temperature(
    columns: dict[str, Floats], temperature: float, layout: Layout
) -> tuple[Mask, str]:
    """Bounds on the logsumexp S_β of β · logits, β = 1 / T, by what is stored at temperature 1.

    S_β − β S_1 = log Σ p^β. Over the top K that sum is known. Over n tail tokens of mass q, none above the K-th probability r, it lies
    between q r^(β−1), for p^(β−1) is monotone in p, and n^(1−β) q^β, by the inequality of power means; equal at β = 1.
    """
    name, beta = temperature_column(temperature).name, 1 / temperature
    found_N = columns[name] - beta * columns["logsumexp"]
    head_NK = columns["logprobs" if layout.top_k == "all" else "topk_logprobs"]
    logs_NK = beta * head_NK
    sum_N = _logsumexp(logs_NK)
    slack_N = (np.exp(logs_NK - sum_N[:, None]) * beta * float16_rounding(head_NK)).sum(-1)
    slack_N += 1e-4 + FLOAT32_ROUNDING * (
        np.abs(columns[name]) + beta * np.abs(columns["logsumexp"])
    )
    lower_N = upper_N = sum_N
    if layout.top_k != "all":
        tail_N, least_N = columns["tail_logprob"], head_NK[:, -1]
        by_least_N = tail_N + (beta - 1) * least_N
        by_means_N = (1 - beta) * np.log(max(_tail_size(layout), 1)) + beta * tail_N
        lower_N = np.logaddexp(sum_N, np.minimum(by_least_N, by_means_N))
        upper_N = np.logaddexp(sum_N, np.maximum(by_least_N, by_means_N))
        share_N = -np.expm1(sum_N - upper_N)
        slack_N += share_N * (1 + beta) * (float16_rounding(tail_N) + float16_rounding(least_N))
    wrong = ~((found_N >= lower_N - slack_N) & (found_N <= upper_N + slack_N))
    return wrong, f"{name} does not fit the stored distribution"


def _tail_size(layout: Layout) -> int:
    return 0 if layout.top_k == "all" else layout.vocab_size - layout.top_k


def _logsumexp(values_NK: Floats) -> Floats:
    max_N1 = values_NK.max(-1, keepdims=True)
    total: Floats = np.log(np.exp(values_NK - max_N1).sum(-1)) + max_N1[:, 0]
    return total
