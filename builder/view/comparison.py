"""Rows of a dataset and another dataset → the same rows there, and how far apart the two distributions are.

In:   `Row`s of the one, manifest and files of the other.
Out:  `Against`: what the other says of the tokens that are shown, its own first choices, and the KL divergence at each position.

How:  rows are found by document and chunk, and must hold the same tokens. KL(one ‖ other) is computed over events: each token whose
      probability both are known to give, and all others together. Joining events never raises a divergence, so that this is the
      least that the true one can be. float16 moves it by about 0.001.

Cost: the columns `id` and `chunk_index` of the other's files, until all rows are found; 0.1 ms a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from builder.corpus.sequences import NO_TOKEN
from builder.dataset.manifest import records_of
from builder.dataset.printable import one_line
from builder.view.rows import Array, Locate, Row, load_rows
from logit_dataset.files import first_line
from logit_dataset.schema import FLOAT16_MIN

FIRST = 5
"""Of the other's choices, shown for themselves."""
MAX_SHARE_OF_TAIL = 0.9
"""A target that holds more of its tail stays in it: what is left would be float16's rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What another dataset says at the positions of a row."""

    logprobs: Array
    """[T, K] float16: of the tokens that the one lists; NaN where the other does not list them."""
    ids: Array
    """[T, FIRST or fewer]: the other's own first choices; NO_TOKEN where it keeps nothing."""
    own_logprobs: Array
    """[T, FIRST or fewer] float16, of these."""
    target_logprob: Array
    """[T] float16."""
    entropy: Array
    """[T] float16."""
    divergence: Array
    """[T] float32: KL in nats, at least; NaN where one of the two keeps nothing."""


def same_rows(
    rows: Sequence[tuple[str, int]], manifest: dict[str, Any], locate: Locate
) -> list[int]:
    """The numbers of the other dataset's rows that are the same chunks of the same documents, in the order of these.

    Raises:
        ValueError: it lacks one of them.
    """
    found: dict[tuple[str, int], int] = {}
    wanted, first = set(rows), 0
    for record in records_of(manifest):
        if len(found) == len(wanted):
            break
        try:
            table = pq.read_table(locate(record.file), columns=["id", "chunk_index"])
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{record.file} cannot be read ({first_line(error)})") from None
        for i, place in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
            if place in wanted:
                found.setdefault(place, first + i)
        first += record.rows
    for place in rows:
        if place not in found:
            raise ValueError(
                f"the dataset to compare with has no chunk {place[1]} of document {one_line(place[0], limit=60)!r}; "
                "compare datasets of the same corpus, or choose other rows with --start"
            )
    return [found[place] for place in rows]


def load_same_rows(rows: Sequence[Row], manifest: dict[str, Any], locate: Locate) -> list[Against]:
    """What another dataset says of the same rows.

    Raises:
        ValueError: it lacks one of them, or has other tokens there.
    """
    numbers = same_rows([(row.id, row.chunk_index) for row in rows], manifest, locate)
    by_number = dict(zip(numbers, rows, strict=True))
    found: dict[int, Against] = {}
    for other in load_rows(manifest, locate, sorted(by_number)):
        row = by_number[other.number]
        if not np.array_equal(row.input_ids, other.input_ids):
            raise ValueError(
                f"chunk {row.chunk_index} of document {one_line(row.id, limit=60)!r} has other tokens in the dataset to compare "
                "with; two datasets can be compared if tokenizer and max_length are the same"
            )
        found[other.number] = compare(row, other)
    return [found[number] for number in numbers]


def compare(row: Row, other: Row) -> Against:
    """What the other says of the positions of a row with the same tokens."""
    divergence = np.full(len(row.input_ids), np.nan, np.float32)
    theirs = np.full(row.ids.shape, np.nan, np.float16)
    for t in np.flatnonzero(row.kept & other.kept):
        _, here, there = np.intersect1d(
            row.ids[t], other.ids[t], assume_unique=True, return_indices=True
        )
        theirs[t, here] = other.logprobs[t, there]
        divergence[t] = _divergence(_Events.at(row, int(t)), _Events.at(other, int(t)))
    return Against(
        logprobs=theirs,
        ids=other.ids[:, :FIRST],
        own_logprobs=other.logprobs[:, :FIRST],
        target_logprob=other.target_logprob,
        entropy=other.entropy,
        divergence=divergence,
    )


@dataclass(frozen=True, slots=True)
class _Events:
    """A distribution as far as it is known."""

    tokens: Array
    """[E]: those listed, and the one that followed."""
    logs: npt.NDArray[np.float64]
    """[E]: their log-probabilities."""
    rest: float
    """Probability of all others."""

    @classmethod
    def at(cls, row: Row, t: int) -> "_Events":
        tokens, logs = row.ids[t], row.logprobs[t].astype(np.float64)
        rest = float(np.exp(np.float64(row.tail_logprob[t])))
        target, log = int(row.targets[t]), float(row.target_logprob[t])
        if (
            target != NO_TOKEN
            and np.exp(log) < MAX_SHARE_OF_TAIL * rest
            and not (tokens == target).any()
        ):
            tokens, logs = np.append(tokens, target), np.append(logs, log)
            rest -= float(np.exp(log))
        return cls(tokens, logs, rest)


def _divergence(one: _Events, other: _Events) -> float:
    """KL(one ‖ other) over the tokens that both know, and one event for all others."""
    _, here, there = np.intersect1d(
        one.tokens, other.tokens, assume_unique=True, return_indices=True
    )
    p, q = one.logs[here], other.logs[there]
    total = float((np.exp(p) * (p - q)).sum())
    rest, other_rest = (
        events.rest + float(np.exp(np.delete(events.logs, common)).sum())
        for events, common in ((one, here), (other, there))
    )
    if rest > 0:
        total += rest * (np.log(rest) - (np.log(other_rest) if other_rest > 0 else FLOAT16_MIN))
    return max(0.0, total)  # float16 may have made it a little less
