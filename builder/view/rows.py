"""A dataset and numbers of rows → these rows, with one entry a position in every column, and the best of each distribution.

In:   a manifest, where its data files are, and which rows.
Out:  `Row`s: ids and numbers as they are stored (float16 stays float16), so that a page can show the very values of the file.

How:  each row group is decoded once and only the rows asked for are kept. Datasets of completions store wide columns for some positions
      only, and datasets of whole distributions in the order of the ids; here both become the first ranks of every position, at most
      `MAX_RANKS`, and the others join the tail.

Cost: one row group is decoded at a time. What stays of a row of 512 tokens is 0.3 MB with K = 50, 5 MB with a whole vocabulary, whose
      sorting takes some seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from builder.corpus.sequences import NO_TOKEN
from builder.dataset.lookup import read_rows, what_follows
from builder.dataset.manifest import ShardRecord, records_of
from logit_dataset.files import first_line
from logit_dataset.schema import FLOAT16_MIN, Layout, columns, loss_mask

Array = npt.NDArray[Any]
Locate = Callable[[str], Path]
"""A data file's name → where it lies, fetched if need be."""

MAX_RANKS = 1000
"""That are kept of a distribution."""
_UNSHOWN = ("text", "hidden_states", "logsumexp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. T positions, K ranks (`MAX_RANKS` at most), M draws."""

    number: int
    """In the dataset, from 0."""
    id: str
    chunk_index: int
    input_ids: Array
    """[T]"""
    targets: Array
    """[T]: the token that follows each position; NO_TOKEN where that is not known."""
    learned: Array
    """[T]: the loss mask; all True in a dataset without completions."""
    completion: Array | None
    """[T]: which tokens are the completion's; None in a dataset without completions."""
    kept: Array
    """[T]: whether there is a distribution, which a dataset of completions keeps for some positions only."""
    ids: Array
    """[T, K]: by falling probability; NO_TOKEN where nothing is kept."""
    logprobs: Array
    """[T, K] float16; −65504 where nothing is kept."""
    tail_logprob: Array
    """[T] float16: of all other tokens; −65504 where there are none."""
    ranks: Array
    """[T]: rank of the token that followed, from 1; 0 where the dataset does not tell."""
    known_ranks: int
    """That the dataset tells: its top K, or the whole vocabulary."""
    target_logprob: Array
    """[T] float16; NaN where nothing follows."""
    entropy: Array
    """[T] float16, nats."""
    draws: Array
    """[T, M]: tokens drawn from the tail; NO_TOKEN where there are none."""


def load_rows(manifest: dict[str, Any], locate: Locate, numbers: list[int]) -> Iterator[Row]:
    """Rows by their numbers, one after the other.

    Args:
        manifest: of the dataset.
        locate: finds its data files.
        numbers: rising.

    Raises:
        ValueError: a file cannot be read, or its columns do not fit each other; names the file.
        OSError: a file is not there.
    """
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    names = [column.name for column in columns(layout) if not column.name.startswith(_UNSHOWN)]
    for record, first, inside in _by_file(manifest, numbers):
        path = locate(record.file)
        try:
            for number, values in zip(inside, read_rows(path, inside, names), strict=True):
                last, _ = what_follows(manifest, record.file, number, values, locate)
                yield _row(first + number, values, last, layout)
        except (pa.ArrowException, ValueError, LookupError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # such as a missing file
                raise
            raise ValueError(
                f"{record.file} cannot be read ({first_line(error)}); fetch or build the dataset again"
            ) from None


def _by_file(
    manifest: dict[str, Any], numbers: list[int]
) -> Iterator[tuple[ShardRecord, int, list[int]]]:
    """Each file that holds some of the rows, the number of its first row, and which of its own rows these are."""
    first = 0
    for record in records_of(manifest):
        inside = [n - first for n in numbers if first <= n < first + record.rows]
        if inside:
            yield record, first, inside
        first += record.rows


def _row(number: int, values: dict[str, Any], last: int, layout: Layout) -> Row:
    ids_T = np.asarray(values["input_ids"], np.int64)
    length = len(ids_T)
    completion = values.get("completion_mask")
    learned = np.ones(length, np.bool_) if completion is None else loss_mask(completion)
    kept = learned if layout.completions_only else np.ones(length, np.bool_)
    targets = np.append(ids_T[1:], last)
    known_ranks = layout.vocab_size if layout.top_k == "all" else layout.top_k
    for name, width in (
        *(("topk_indices", known_ranks), ("topk_logprobs", known_ranks)),
        *(("logprobs", known_ranks), ("tail_indices", layout.tail_samples)),
    ):
        if name in values and not len(values[name]):  # without lists, nothing says how long
            values[name] = np.empty((0, width), values[name].dtype)
    ids, logprobs, tail = _ranked(values, kept)
    draws = values.get("tail_indices", np.empty((len(ids), 0), np.int64))
    if not len(ids) == len(draws) == kept.sum():
        raise ValueError(f"row {number} has {len(ids)} distributions, expected {kept.sum()}")
    # A draw that repeats a listed token stands for none (see EXPECTATIONS in the schema).
    draws = np.where((draws[:, :, None] == ids[:, None, :]).any(-1), NO_TOKEN, draws)
    ranks = np.zeros(length, np.int64)
    ranks[kept] = _ranks(ids, targets[kept])
    row = Row(
        number=number,
        id=str(values["id"]),
        chunk_index=int(values["chunk_index"]),
        input_ids=ids_T,
        targets=targets,
        learned=learned,
        completion=completion,
        kept=kept,
        ids=_spread(ids[:, :MAX_RANKS], kept, NO_TOKEN),
        logprobs=_spread(logprobs[:, :MAX_RANKS], kept, FLOAT16_MIN),
        tail_logprob=tail,
        ranks=ranks,
        known_ranks=known_ranks,
        target_logprob=values["target_logprob"],
        entropy=values["entropy"],
        draws=_spread(draws, kept, NO_TOKEN),
    )
    for name in ("learned", "tail_logprob", "target_logprob", "entropy"):
        if len(getattr(row, name)) != length:
            raise ValueError(f"row {number} has columns of different lengths")
    return row


def _ranked(values: dict[str, Any], kept: Array) -> tuple[Array, Array, Array]:
    """[C, K] ids and log-probabilities by falling probability, and [T] that of all tokens beyond `MAX_RANKS`, or of the tail."""
    if "logprobs" not in values:
        return values["topk_indices"].astype(np.int64), values["topk_logprobs"], values["tail_logprob"]  # fmt: skip
    logprobs = values["logprobs"]
    order = np.argsort(-logprobs.astype(np.float32), axis=-1, kind="stable")
    logprobs = np.take_along_axis(logprobs, order, axis=-1)
    beyond = np.exp(logprobs[:, MAX_RANKS:].astype(np.float64)).sum(-1)
    tail = np.full(len(kept), FLOAT16_MIN, np.float16)
    tail[kept] = np.log(beyond, out=np.full(len(beyond), FLOAT16_MIN), where=beyond > 0)
    return order, logprobs, tail


def _ranks(ids: Array, targets: Array) -> Array:
    """[C]: rank of each target among its ids, from 1; 0 where it is not among them."""
    found = ids == targets[:, None]
    ranks: Array = np.where(found.any(1), found.argmax(1) + 1, 0)
    return ranks


def _spread(values_C: Array, kept: Array, nothing: float) -> Array:
    """[T, K] of [C, K]: every position has a place."""
    spread = np.full((len(kept), values_C.shape[1]), nothing, values_C.dtype)
    spread[kept] = values_C
    return spread
