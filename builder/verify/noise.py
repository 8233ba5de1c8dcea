"""How far a teacher differs from itself → how far stored values may differ from it.

In:   the errors of stored values, and those of the teacher against itself on the same rows.
Out:  one line for each column of a row, or of all rows, that is further away than the teacher's own noise explains.

In float32, kernels of different batches and machines differ by far less than a rounded float16 shows, and a fixed limit does. In 16 bits
a forward pass rounds at every step, and how depends on batch, kernel and device. That noise is measured in each run (the floor), and
limits are multiples of it. Of the embedded teacher in bfloat16, with eight rows of up to 512 tokens (|Δ log p| of the top 50, in nats):

    the same rows in another batch, same machine       mean 0.002   max 0.49    one row in eight is computed by other kernels
    the same weights in float32: the floor             mean 0.054   max 0.99
    four other ways to compute the same in bfloat16    mean 0.065   max 0.74    other instruction sets, eager attention, as on a GPU

So another batch tells too little, and the float32 run of the same weights is what others are measured by: from device to device the
mean grows by 1.2 and the largest error of a column by up to 1.8 of it. The limits are twice and three times the floor.

A shift of a column is noticed below its noise, for noise has no direction: the mean over positions may be off by BIAS_SIGMAS of their
standard error. Of those four ways, rows are off by up to 4 (positions of a row are not independent).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from builder.corpus.sequences import length_sorted_batches
from builder.teacher.model import Teacher
from builder.verify.comparison import (
    MISSING,
    REBUILT,
    Errors,
    Reading,
    StoredRow,
    between,
    coarse_divergence,
    read,
)
from logit_dataset.schema import Layout

MAX_FLOAT32_ERROR = 2e-3
"""Nats beyond float16 rounding, for a teacher run in float32: kernels differ between batch shapes and machines."""
MAX_FLOAT32_DIVERGENCE = 1e-3
"""Mean KL of a row in nats, from the teacher in float32 to the distribution that its head makes of the stored hidden states."""

LARGEST_TIMES, MEAN_TIMES = 3.0, 2.0
"""Of the floor."""
RMS_TIMES = 3.0
"""Of the root mean square, which the largest of few values is taken to be at least."""
BIAS_SIGMAS, BIAS_TIMES, LEAST_BIAS = 8.0, 2.0, 0.002
"""Standard errors, times the floor's own bias, and nats, which may come together."""
LEAST_ERROR = 1e-3
"""Nats, in 16 bits: storage as float16 alone moves values by that on average."""

TOLD_APART = 0.5
"""Of the distance that the teacher has in 16 bits: values nearer than that to the teacher in float32 were not computed in 16 bits."""
LEAST_DISTANCE_TO_TELL = 1e-4
"""Nats beyond rounding to float16, below which that cannot be told."""

LEAST = {"bfloat16": 1.0, "float16": 0.125}
"""Where the teacher cannot be run in float32, the floor is at least that of the embedded one, to this scale."""
_EMBEDDED = {"largest": 1.0, "position": 0.33, "mean": 0.06, "spread": 0.12}

NO_BIAS = (MISSING, REBUILT)
"""Errors that have one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFloor:
    """What the teacher differs from itself by, in one column, over all rows that were read."""

    largest: float
    """Nats, of one entry."""
    position: float
    """Mean of a position, at most."""
    mean: float
    """Mean of a row, at most."""
    average: float
    """Mean of all positions."""
    spread: float
    """Standard deviation of the signed means of positions."""
    bias: float
    """|mean| of these."""

    @classmethod
    def of(cls, rows: list[Errors]) -> "ColumnFloor":
        """Of the errors of some rows."""
        largest, mean, signed = (
            torch.cat([getattr(errors, name) for errors in rows]) for name in ("largest", "mean", "signed")
        )  # fmt: skip
        return cls(
            largest=max(_top(largest), RMS_TIMES * _rms(largest)),
            position=max(_top(mean), RMS_TIMES * _rms(mean)),
            mean=max(_average(errors.mean) for errors in rows),
            average=_average(mean),
            spread=_rms(signed - signed.mean()) if len(signed) else 0.0,
            bias=abs(_average(signed)),
        )

    @property
    def largest_limit(self) -> float:
        """Nats that an entry may be off."""
        return LARGEST_TIMES * self.largest + LEAST_ERROR

    @property
    def mean_limit(self) -> float:
        """Nats that the entries of a row may be off on average."""
        return MEAN_TIMES * self.mean + LEAST_ERROR

    def at_least(self, dtype: str) -> "ColumnFloor":
        """This one, or that of the embedded teacher, whichever is higher."""
        scale = LEAST[dtype]
        values = {name: max(getattr(self, name), scale * v) for name, v in _EMBEDDED.items()}
        return replace(self, **values)


Floor = dict[str, ColumnFloor]


class Noise:
    """Measures how far a teacher in 16 bits differs from itself on some rows, and judges what is stored of them by it."""

    def __init__(
        self,
        rows: list[StoredRow],
        alone: list[Reading],
        layout: Layout,
        teacher: Teacher,
        *,
        batch_tokens: int,
    ) -> None:
        """Run the teacher on the rows in batches of several; afterwards it is not needed any more.

        Args:
            rows: of the dataset.
            alone: what the teacher says of each alone, with the errors of what is stored.
            layout: of the dataset.
            teacher: in 16 bits.
            batch_tokens: positions in a batch, padding included.
        """
        self._rows, self._alone, self._layout = rows, alone, layout
        self._dtype = str(teacher.dtype).removeprefix("torch.")
        self._head = "logprobs" if layout.top_k == "all" else "topk_logprobs"
        self._dtypes = {name: tensor.dtype for name, tensor in teacher.model.state_dict().items()}
        self._together = self._read_together(teacher, batch_tokens)
        self._distances = (0.0, 0.0)
        """Mean |Δ| beyond rounding, from the teacher in float32, of what is stored and of what it says in 16 bits."""
        self._is_exact = False
        self.notices: list[str] = []
        self.floor: Floor = {}

    def measure(self, open_in_float32: Callable[[], Teacher]) -> None:
        """Run the teacher in float32, with its own weights and with those that it has in 16 bits.

        Args:
            open_in_float32: loads it; a ValueError says why it cannot be, and the noise is that of batches then.
        """
        try:
            exact = open_in_float32()
        except ValueError as error:
            self.floor = {
                name: column.at_least(self._dtype)
                for name, column in floor_of(self._together).items()
            }
            self.notices.append(
                f"the teacher could not be run in float32 ({error}), so that its noise in {self._dtype} was measured by batches alone, "
                "and is taken to be that of the embedded teacher at least"
            )
            return
        self._is_exact = True
        self._distances = self._mean_distances(exact)
        _round_weights(exact, self._dtypes)
        self.floor = floor_of(
            [
                self._against(row, exact.logits([row.input_ids]), alone)
                for row, alone in zip(self._rows, self._alone, strict=True)
            ]
        )

    def problems(self) -> Iterator[str]:
        """One line for each row that is further from the teacher than its noise explains, and for all rows."""
        for row, alone, together in zip(self._rows, self._alone, self._together, strict=True):
            if self._is_exact and (lines := list(too_far(together, self.floor))):
                yield (
                    f"{row.where}: what the teacher says of it depends on what shares its batch, so that it cannot be judged: in another "
                    f"batch, {lines[0]}"
                )
            for line in too_far(alone.errors, self.floor):
                yield f"{row.where}: {line}"
        yield from shifted([alone.errors for alone in self._alone], self.floor)
        stored, own = self._distances
        if own > LEAST_DISTANCE_TO_TELL and stored < TOLD_APART * own:
            yield (
                f"the manifest says {self._dtype}, but log-probabilities are those of the teacher in float32: beyond rounding, {stored:.1g} "
                f"nats from them on average, where {self._dtype} is {own:.1g}"
            )

    def _read_together(self, teacher: Teacher, batch_tokens: int) -> list[dict[str, Errors]]:
        """What the teacher says of all rows in batches of several, against what it says of each alone.

        A batch that would hold one row only is filled with the beginning of that row.
        """
        lengths = [len(row.input_ids) for row in self._rows]
        found: dict[int, dict[str, Errors]] = {}
        for batch in length_sorted_batches(lengths, batch_tokens, teacher.reach):
            ids = [self._rows[i].input_ids for i in batch]
            filling = []
            if len(batch) == 1:
                half = ids[0][: len(ids[0]) // 2 + 1]
                filling = [
                    half if teacher.reach(len(half)) == teacher.reach(len(ids[0])) else ids[0]
                ]
            parts = _of_each(teacher.logits([*ids, *filling]), [len(one) for one in ids])
            for i, pieces in zip(batch, parts, strict=True):
                found[i] = self._against(self._rows[i], pieces, self._alone[i])
        return [found[i] for i in range(len(self._rows))]

    def _against(
        self, row: StoredRow, pieces: Iterator[Tensor], alone: Reading
    ) -> dict[str, Errors]:
        reading = read(row, pieces, self._layout, reference=alone)
        errors = between(row, reading, alone, self._layout)
        if self._layout.hidden_states:
            values_C = coarse_divergence(reading, alone)
            errors[REBUILT] = Errors(largest=values_C, mean=values_C, signed=values_C)
        return errors

    def _mean_distances(self, exact: Teacher) -> tuple[float, float]:
        stored, own = [], []
        for row, alone in zip(self._rows, self._alone, strict=True):
            found = read(row, exact.logits([row.input_ids]), self._layout, compare=True)
            stored.append(found.errors[self._head].mean)
            own.append(Errors.of(alone.columns[self._head], found.columns[self._head]).mean)
        return _average(torch.cat(stored)), _average(torch.cat(own))


def floor_of(rows: list[dict[str, Errors]]) -> Floor:
    """The floor of each column, over the errors of all rows."""
    names = dict.fromkeys(name for errors in rows for name in errors)
    return {name: ColumnFloor.of([errors[name] for errors in rows if name in errors]) for name in names}  # fmt: skip


def too_far_in_float32(errors: Mapping[str, Errors]) -> Iterator[str]:
    """What to say of each column of a row that is too far from the teacher in float32."""
    for name, found in errors.items():
        worst, limit = _top(found.largest), MAX_FLOAT32_ERROR
        if name == REBUILT:
            worst, limit = _average(found.mean), MAX_FLOAT32_DIVERGENCE
        if not worst <= limit:
            yield f"{name} is {worst:.3g} nats from the teacher's, more than {limit:g}"


def too_far(errors: Mapping[str, Errors], floor: Floor) -> Iterator[str]:
    """What to say of each column of a row that is further from the teacher than its noise explains."""
    for name, found in errors.items():
        if name not in floor or not len(found.largest):
            continue
        noise = floor[name]
        for values, limit, what in (
            (found.largest, noise.largest_limit, ""),
            (found.mean, LARGEST_TIMES * noise.position + LEAST_ERROR, " on average"),
        ):
            worst, place = _top(values), int(values.nan_to_num(torch.inf).argmax())
            if not worst <= limit:
                kept = "" if name != REBUILT else " of those kept"
                yield (
                    f"{name} is {worst:.3g} nats from the teacher's{what} at position {place}{kept}, where its own noise is "
                    f"{noise.largest if not what else noise.position:.2g}"
                )
                break
        else:
            worst = _average(found.mean)
            if not worst <= noise.mean_limit:
                yield f"{name} is {worst:.3g} nats from the teacher's on average, where its own noise is {noise.mean:.2g}"
            else:
                yield from _shifted(name, found, noise)


def shifted(rows: list[dict[str, Errors]], floor: Floor) -> Iterator[str]:
    """What to say of each column that is off in one direction, over all rows."""
    for name, noise in floor.items():
        parts = [errors[name].signed for errors in rows if name in errors]
        if parts:
            signed = torch.cat(parts)
            yield from _shifted(name, Errors(largest=signed, mean=signed, signed=signed), noise)


def _shifted(name: str, found: Errors, noise: ColumnFloor) -> Iterator[str]:
    if name in NO_BIAS or not len(found.signed):
        return
    bias, count = _average(found.signed), len(found.signed)
    limit = BIAS_SIGMAS * noise.spread / count**0.5 + BIAS_TIMES * noise.bias + LEAST_BIAS
    if not abs(bias) <= limit:
        yield f"{name} is {bias:+.3f} nats off on average over {count:,} positions, where noise explains {limit:.2g}"


def _top(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _average(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0


def _of_each(pieces: Iterator[Tensor], lengths: list[int]) -> Iterator[Iterator[Tensor]]:
    """The logits of each of several sequences, from those of all; each has to be taken to its end before the next."""
    rest: list[Tensor] = []

    def take(length: int) -> Iterator[Tensor]:
        while length:
            piece_TV = rest.pop() if rest else next(pieces)
            taken_TV = piece_TV[:length]
            if len(taken_TV) < len(piece_TV):
                rest.append(piece_TV[length:])
            length -= len(taken_TV)
            yield taken_TV

    for length in lengths:
        yield take(length)


def _round_weights(teacher: Teacher, dtypes: dict[str, torch.dtype]) -> None:
    """Give a teacher in float32 the weights that it has in 16 bits."""
    for name, tensor in teacher.model.state_dict().items():
        if (dtype := dtypes.get(name)) not in (None, tensor.dtype) and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
