"""Rows of a dataset and another dataset → the same rows there, and how far apart the two distributions are.

In:   `Row`s of the one, manifest and files of the other.
Out:  `Against`: what the other says of the tokens that are shown, its own first choices, and the KL divergence at each position.

How:  rows are found by document and chunk, and must hold the same tokens. KL(one ‖ other) is computed over events: each token whose
      probability both are known to give, and all others together. Joining events never raises a divergence, so that this is the
      least that the true one can be. float16 moves it by about 0.001.

Cost: the columns `id` and `chunk_index` of the other's files, until all rows are found; 0.1 ms a position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def same_rows(rows: Sequence[Row], manifest: dict[str, Any], locate: Locate) -> list[int]:
    """The numbers of the other dataset's rows that are the same chunks of the same documents, in the order of these.

    A row of the same number is preferred, for ids need not be unique; then the first one counts.

    Raises:
        ValueError: it lacks one of them.
    """
    found: dict[int, int] = {}
    missing = {row.number: (row.id, row.chunk_index) for row in rows}
    for is_same_number in (True, False):
        first = 0
        for record in records_of(manifest):
            numbers = range(first, first + record.rows)
            first += record.rows
            if not missing or (is_same_number and not any(n in missing for n in numbers)):
                continue
            for number, place in zip(numbers, _places(locate(record.file), record.file), strict=True):  # fmt: skip
                candidates = [number] if is_same_number else list(missing)
                for ours in [n for n in candidates if missing.get(n) == place]:
                    found[ours] = number
                    del missing[ours]
    for name, chunk in missing.values():
        raise ValueError(
            f"the dataset to compare with has no chunk {chunk} of document {one_line(name, limit=60)!r}; "
            "compare datasets of the same corpus, or choose other rows with --start"
        )
    return [found[row.number] for row in rows]


def _places(path: Path, name: str) -> Iterator[tuple[str, int]]:
    """Document and chunk of each row of a file."""
    try:
        table = pq.read_table(path, columns=["id", "chunk_index"], page_checksum_verification=True)
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({first_line(error)})") from None
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def load_same_rows(rows: Sequence[Row], manifest: dict[str, Any], locate: Locate) -> list[Against]:
    """What another dataset says of the same rows.

    Raises:
        ValueError: it lacks one of them, or has other tokens there.
    """
    numbers = same_rows(rows, manifest, locate)
    loaded = load_rows(manifest, locate, sorted(set(numbers)))
    others = {other.number: other for other in loaded}
    found = []
    for row, number in zip(rows, numbers, strict=True):
        if not np.array_equal(row.input_ids, others[number].input_ids):
            raise ValueError(
                f"chunk {row.chunk_index} of document {one_line(row.id, limit=60)!r} has other tokens in the dataset to compare "
                "with; two datasets can be compared if tokenizer and max_length are the same"
            )
        found.append(compare(row, others[number]))
    return found


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
