"""A stored row, and a run of the teacher on it → how far apart they are, in nats.

In:   the columns of a row, and the teacher's logits.
Out:  a Reading, what would have been stored of these logits, before it is rounded; and the errors of the stored columns against one, or of
      one Reading against another.

The reference is a plain float64 log-softmax over the whole vocabulary; of the capture's code, nothing is shared.

Shape suffixes: T positions, C those in the loss mask, P either, V vocabulary, K top-k, M draws from the tail, E entries that are compared, D hidden.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from builder.corpus.sequences import NO_TOKEN
from logit_dataset.schema import FLOAT16_MIN, Layout, float16_rounding, temperature_column

REBUILT = "the distribution of hidden_states"
MISSING = "missing from the top K"
OUTSIDE = "target_logprob of tokens outside the top K"
FIRST = "log-probability of the first choice"

VALUES_AT_ONCE = 2**22
"""Logits that are compared at once: 32 MB in float64."""
SAMPLED = 64
"""Of whole distributions, entries of each position that runs of the teacher are compared in: half of them the first, half random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """One stored row, and the token that follows its last one."""

    where: str
    """File and number, for messages."""
    document_id: str
    chunk_index: int
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

    @property
    def targets(self) -> list[int]:
        """The token that follows each position; NO_TOKEN where that is not known."""
        return [*self.input_ids[1:], self.next_token]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Of one column at some positions, [P] each."""

    largest: Tensor
    """Largest |Δ| at a position, beyond what rounding to the stored type explains."""
    mean: Tensor
    """Mean of these."""
    signed: Tensor
    """Mean Δ at a position, rounding included."""

    @classmethod
    def of(cls, stored: Tensor, expected: Tensor, *, rounded: bool = True) -> "Errors":
        """Of values [P] or [P, …].

        Args:
            stored: values.
            expected: what they should be.
            rounded: whether the stored ones were rounded to float16.
        """
        if not stored.numel():
            nothing = stored.new_zeros(0)
            return cls(largest=nothing, mean=nothing, signed=nothing)
        stored, expected = (v.reshape(len(v), -1).clamp(min=FLOAT16_MIN) for v in (stored, expected))  # fmt: skip
        difference = stored - expected
        beyond = difference.abs()
        if rounded:
            rounding = torch.from_numpy(float16_rounding(expected.numpy()))
            beyond = (beyond - rounding).clamp(min=0)
        return cls(largest=beyond.amax(-1), mean=beyond.mean(-1), signed=difference.mean(-1))

    def at(self, chosen: Tensor) -> "Errors":
        """At some of the positions."""
        parts = (self.largest[chosen], self.mean[chosen], self.signed[chosen])
        return Errors(largest=parts[0], mean=parts[1], signed=parts[2])


@dataclass(slots=True, kw_only=True)
class Reading:
    """What one run of the teacher says of a row."""

    columns: dict[str, Tensor]
    """By the names of stored ones, at the stored ids; `logprobs` at the ids of `entries`."""
    own_ids_CK: Tensor
    """Its own top K, or first choice."""
    best_CK: Tensor
    """Their log-probabilities."""
    at_reference_CK: Tensor
    """Those of the ids that it is compared with, by rank."""
    at_first_C: Tensor
    """That of the first of these ids."""
    errors: dict[str, Errors] = field(default_factory=dict)
    """Of the stored columns against it, where that was asked for."""
    raw_abs_sum: float = 0.0
    raw_abs_max: float = 0.0
    raw_count: int = 0
    """|Δ| of stored log-probabilities of the head, with rounding."""


Watch = Callable[[Tensor, slice, dict[str, Tensor], Tensor], None]
"""Sees the logits of some positions [n, V] in float64, which positions these are, the stored columns there, and which are in the mask."""


def read(
    row: StoredRow,
    pieces: Iterable[Tensor],
    layout: Layout,
    *,
    reference: Reading | None = None,
    compare: bool = False,
    watch: Watch = lambda *_: None,
) -> Reading:
    """What a run of the teacher says of a row.

    Args:
        row: of the dataset.
        pieces: raw logits [n, V] of consecutive positions, all of the row's.
        layout: of the dataset.
        reference: the reading whose top K this one's log-probabilities are wanted of; None takes the stored one.
        compare: whether to compare the stored columns with it.
        watch: told of all logits.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    errors: dict[str, list[Errors]] = defaultdict(list)
    entries_CE = entries(row, layout)
    targets_T = torch.tensor(row.targets)
    found = Reading(
        columns={},
        own_ids_CK=_none(),
        best_CK=_none(),
        at_reference_CK=_none(),
        at_first_C=_none(),
    )
    start = kept = 0
    for logits_TV in _small(pieces):
        here = slice(start, start + len(logits_TV))
        mask_T, stored = row.mask_T[here], row.at(here)
        there = slice(kept, kept + int(mask_T.sum()))
        start, kept = here.stop, there.stop
        watch(logits_TV, here, stored, mask_T)
        logprobs_TV = logits_TV.log_softmax(-1)
        now = _columns(logits_TV, logprobs_TV, stored, targets_T[here], mask_T, layout)
        if compare:
            for name, error in _errors(stored, now, targets_T[here], mask_T, layout).items():
                errors[name].append(error)
            _add_raw(found, stored, now)
        if layout.top_k == "all":
            now["logprobs"] = now["logprobs"].gather(1, entries_CE[there])
        kept_CV = logprobs_TV[mask_T]
        best_CK, at_CK = _best(stored, kept_CV)
        own_CK = kept_CV.topk(best_CK.shape[1]).indices
        first_C = at_CK[:, 0] if layout.top_k == "all" else now["topk_logprobs"][:, 0]
        if reference is not None:
            at_CK = kept_CV.gather(1, reference.own_ids_CK[there])
            first_C, at_CK = at_CK[:, 0], at_CK.sort(-1, descending=True).values
        for name, values in now.items():
            parts[name].append(values)
        parts["own"].append(own_CK)
        parts["best"].append(best_CK)
        parts["at"].append(at_CK)
        parts["first"].append(first_C)
        if compare:
            errors[MISSING].append(Errors.of(best_CK, at_CK, rounded=False))
    joined = {name: torch.cat(values) for name, values in parts.items()}
    found.own_ids_CK, found.best_CK = joined.pop("own"), joined.pop("best")
    found.at_reference_CK, found.at_first_C = joined.pop("at"), joined.pop("first")
    found.columns = joined
    found.errors = {name: _joined(some) for name, some in errors.items()}
    return found


def between(row: StoredRow, one: Reading, other: Reading, layout: Layout) -> dict[str, Errors]:
    """Errors of a reading against another one, as if it had been stored: what the teacher differs from itself by.

    Args:
        row: that was read twice.
        one: read with `other` as its reference.
        other: read before.
        layout: of the dataset.
    """
    targets_T, columns = torch.tensor(row.targets), dict(one.columns)
    if layout.top_k != "all":
        columns["topk_indices"] = row.columns["topk_indices"].long()
    found = _errors(columns, other.columns, targets_T, row.mask_T, layout, rounded=False)
    found[MISSING] = Errors.of(one.best_CK, one.at_reference_CK, rounded=False)
    return {name: error for name, error in found.items() if len(error.largest)}


def entries(row: StoredRow, layout: Layout) -> Tensor:
    """[C, E] ids in which runs of the teacher are compared: the stored top K, or of whole distributions the first and random others."""
    if layout.top_k != "all":
        return row.columns["topk_indices"].long()
    logprobs_CV = row.columns["logprobs"]
    count, size = logprobs_CV.shape
    half = min(SAMPLED // 2, size)
    generator = torch.Generator().manual_seed(0)
    random_CE = torch.randint(size, (count, half), generator=generator)
    return torch.cat([logprobs_CV.float().topk(half, -1).indices, random_CE], -1)


def coarse_divergence(one: Reading, other: Reading) -> Tensor:
    """[C] KL(other ‖ one) over the compared entries alone, which is a little less than that of the whole distributions."""
    name = "logprobs" if "logprobs" in one.columns else "topk_logprobs"
    p_CE, q_CE = other.columns[name], one.columns[name]
    rest = [(-torch.expm1(v.logsumexp(-1).clamp(max=0))).clamp(min=1e-12).log() for v in (p_CE, q_CE)]  # fmt: skip
    inside_C = (p_CE.exp() * (p_CE - q_CE).nan_to_num(0, 0, 0)).sum(-1)
    return (inside_C + rest[0].exp() * (rest[0] - rest[1])).clamp(min=0)


def divergence(logprobs_TV: Tensor, rebuilt_TV: Tensor) -> Errors:
    """KL(teacher ‖ rebuilt) at each position."""
    difference_TV = (logprobs_TV - rebuilt_TV).masked_fill(logprobs_TV == -torch.inf, 0)
    found_T = (logprobs_TV.exp() * difference_TV).sum(-1)
    return Errors(largest=found_T.abs(), mean=found_T.abs(), signed=found_T)


def _columns(
    logits_TV: Tensor,
    logprobs_TV: Tensor,
    stored: dict[str, Tensor],
    targets_T: Tensor,
    mask_T: Tensor,
    layout: Layout,
) -> dict[str, Tensor]:
    """What would have been stored of some positions, but at the stored ids."""
    found = {
        "target_logprob": logprobs_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0],
        "entropy": -(logprobs_TV.exp() * logprobs_TV.clamp(min=FLOAT16_MIN)).sum(-1),
        "logsumexp": logits_TV.logsumexp(-1),
    }
    kept_CV = logprobs_TV[mask_T]
    if layout.top_k == "all":
        found["logprobs"] = kept_CV
    else:
        # Where no top K was kept, the tail is what is outside the teacher's own.
        indices_TK = logprobs_TV.topk(layout.top_k).indices
        indices_TK[mask_T] = stored["topk_indices"]
        found["topk_logprobs"] = kept_CV.gather(1, stored["topk_indices"])
        found["tail_logprob"] = logprobs_TV.scatter(1, indices_TK, -torch.inf).logsumexp(-1)
    if layout.tail_samples and layout.tail_logprobs:
        gone_C1 = (stored["tail_logprob"][mask_T] <= FLOAT16_MIN)[:, None]
        drawn_CM = kept_CV.gather(1, stored["tail_indices"])
        found["tail_logprobs"] = drawn_CM.masked_fill(gone_C1, -torch.inf)
    for temperature in layout.temperatures:
        name = temperature_column(temperature).name
        found[name] = (logits_TV / temperature).logsumexp(-1)
    return found


def _errors(
    stored: dict[str, Tensor],
    expected: dict[str, Tensor],
    targets_T: Tensor,
    mask_T: Tensor,
    layout: Layout,
    *,
    rounded: bool = True,
) -> dict[str, Errors]:
    """Errors of all columns, and of two parts of them that a forger would bend."""
    found = {}
    for name, values in expected.items():
        is_float16 = rounded and not name.startswith("logsumexp")
        chosen = (targets_T != NO_TOKEN) if name == "target_logprob" else slice(None)
        found[name] = Errors.of(stored[name][chosen], values[chosen], rounded=is_float16)
    if layout.top_k == "all":
        return found
    found[FIRST] = Errors.of(stored["topk_logprobs"][:, :1], expected["topk_logprobs"][:, :1], rounded=rounded)  # fmt: skip
    listed_C = (stored["topk_indices"] == targets_T[mask_T][:, None]).any(-1)
    outside_C = ~listed_C & (targets_T[mask_T] != NO_TOKEN)
    pair = (values["target_logprob"][mask_T][outside_C] for values in (stored, expected))
    found[OUTSIDE] = Errors.of(*pair, rounded=rounded)
    return found


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


def _add_raw(found: Reading, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    name = "logprobs" if "logprobs" in expected else "topk_logprobs"
    raw = (stored[name] - expected[name].clamp(min=FLOAT16_MIN)).abs()
    if raw.numel():
        found.raw_abs_sum += float(raw.sum())
        found.raw_abs_max = max(found.raw_abs_max, float(raw.max()))
        found.raw_count += raw.numel()


def _small(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The logits in float64 on the CPU, in smaller pieces."""
    for piece_TV in pieces:
        for logits_TV in piece_TV.split(max(1, VALUES_AT_ONCE // piece_TV.shape[1])):
            yield logits_TV.cpu().double()


def _joined(parts: list[Errors]) -> Errors:
    return Errors(
        largest=torch.cat([part.largest for part in parts]),
        mean=torch.cat([part.mean for part in parts]),
        signed=torch.cat([part.signed for part in parts]),
    )


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.long)
