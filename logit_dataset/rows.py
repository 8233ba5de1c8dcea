"""One row group of a Parquet file → Rows: flat arrays over all its positions, views of Arrow's memory in the stored types.

This is the one place where anything is shifted: `target_ids[t]` is the token that follows input_ids[t]. The distribution at t is about
that same token, so neither needs a shift later. The last position of a row is about the document's next token, or its end:

    row 0, document d, chunk 0     The    capital  of
    target_ids                     capital  of     France      ← the first token of row 1, chunk 1 of d
    row 1, document d, chunk 1     France  is
    target_ids                     is      <eos>               ← the document ends: the next row is another document
    last row of the row group      ...     NO_TARGET           ← what follows is not in this row group; <eos>, if the row is too
                                                                 short to have been cut

The distribution at a last position counts in every case; only its token can be unknown (a row in a hundred or so).

Of a dataset with a completion_mask, only what is about a completion's token of the same row counts: `mask` is the completion_mask, moved by
one here, and False at the last position of a row. What the file has at these positions only is put at its place; elsewhere stands
nothing: −1 for an id of the top K, −65504 for a log-probability, 0 for all else.

Shape suffixes: R rows, N positions of all of them, K values a position.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logit_dataset.schema import (
    COMPLETION_MASK,
    FLOAT16_MIN,
    Layout,
    arrow_schema,
    loss_mask,
    shortest_cut,
    shortest_open,
)
from logit_dataset.schema import columns as all_columns

NO_TARGET = -100
"""In `target_ids`, where it is not known which token follows; what torch's cross-entropy ignores."""

EMPTY = -1
"""In `topk_indices`: a place without a token."""
LOGPROBS = (
    *("topk_logprobs", "tail_logprob", "tail_logprobs", "target_logprob", "logprobs"),
    "other_logprob",  # of a projection
)
NO_PROBABILITY = dict.fromkeys(LOGPROBS, FLOAT16_MIN)
NOTHING = {"topk_indices": EMPTY, **NO_PROBABILITY}
"""What stands at positions that have a token and no distribution; 0 in other columns."""
IDS = ("input_ids", "topk_indices", "tail_indices")
"""Columns of the teacher's token ids."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some rows, one after the other."""

    lengths_R: npt.NDArray[np.int64]
    columns: dict[str, Array]
    """Each [N] or [N, K]: `target_ids`, and every column of the file that has a value a token. Of a dataset with completions also
    `mask`: where the distribution is about one of their tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """One row group of one file, or some rows of it."""

    file: str
    index: int
    num_rows: int
    num_tokens: int
    rows: tuple[int, ...] | None = None
    """Which of its rows, if not all; the numbers are of these."""


class Projection(Protocol):
    """Turns rows of the teacher's vocabulary into rows of a student's."""

    vocab_size: int
    """Logits that the student needs."""
    fingerprint: str
    """Equal only for projections that do the same."""

    def __call__(self, rows: Rows) -> Rows:
        """New rows; those that come in are left as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What a manifest says of how rows begin and end, and of positions that are left out."""

    eos_token_id: int | None
    num_prefix_ids: int
    """Special tokens at the start of every row."""
    shortest_cut: float
    """A row of this length or more may have been cut from a longer document, of which the rest is not there."""
    shortest_open: float = 0.0
    """A row of this length or more may go on in the next one."""
    kept_widths: dict[str, int] = field(default_factory=dict)
    """Columns that hold positions in the loss mask only, and how many values they have there."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Ends":
        """Read from a manifest."""
        kept_widths = {}
        if manifest["recipe"].get("output", {}).get("completions_only"):
            layout = Layout.of(manifest["recipe"], manifest["teacher"])
            kept_widths = {c.name: layout.width(c) for c in all_columns(layout) if "C," in c.shape}
        return cls(
            eos_token_id=manifest["teacher"]["eos_token_id"],
            num_prefix_ids=len(manifest["teacher"]["prefix_ids"]),
            shortest_cut=shortest_cut(manifest),
            shortest_open=shortest_open(manifest),
            kept_widths=kept_widths,
        )


def token_columns(schema: pa.Schema, layout: Layout) -> list[str]:
    """The columns that have one value or several values a token, in the file's order.

    Raises:
        ValueError: a column of the layout that is read (all but the text) is not there or is of another type, or two have one name.
    """
    if len(names := set(schema.names)) < len(schema.names):
        raise ValueError("two columns have the same name")
    for expected in arrow_schema(layout):
        found = schema.field(expected.name).type if expected.name in names else "nothing"
        if expected.name != "text" and not _same_lists(found, expected.type):
            raise ValueError(f"column {expected.name} is {found}, expected {expected.type}")
    return [field.name for field in schema if _is_per_token(field.type)]


def read_rows(
    file: pq.ParquetFile,
    row_group: int,
    columns: list[str],
    ends: Ends,
    *,
    vocab_size: int,
    prompt_targets: bool = False,
) -> Rows:
    """Decode one row group.

    Args:
        file: of a dataset.
        row_group: its number.
        columns: from `token_columns`.
        ends: of the dataset.
        vocab_size: V; an id that is not below it would be looked up outside of a student's logits.
        prompt_targets: keep `target_ids` outside completions, too.

    Raises:
        ValueError: a value is null, an id is outside the vocabulary, or columns do not fit each other.
    """
    table = file.read_row_group(row_group, columns=["id", "chunk_index", *columns])
    lengths = _lists(table, "input_ids").value_lengths()
    lengths_R = lengths.to_numpy().astype(np.int64)
    if not lengths_R.all() or table["id"].null_count or table["chunk_index"].null_count:
        raise ValueError("a row has no tokens, no id or no chunk_index")
    values: dict[str, Array] = {}
    learned_N, learned_R = _learned(table, lengths_R)
    for name in columns:
        lists = _lists(table, name)
        is_cut = name in ends.kept_widths
        expected = pa.array(learned_R, pa.int32()) if is_cut else lengths
        if not lists.value_lengths().equals(expected):
            what = "the completions of completion_mask" if is_cut else "input_ids"
            raise ValueError(f"{name} and {what} have different lengths")
        values[name] = _values(lists, name)
        if name in IDS:
            _check_ids(values[name], name, vocab_size)
        if is_cut:
            values[name] = at_their_places(
                values[name].reshape(-1, ends.kept_widths[name]), learned_N, name
            )
    values["target_ids"] = _target_ids(table, values["input_ids"], lengths_R, ends)
    if COMPLETION_MASK.name in columns:
        values["mask"] = learned_N
        if not prompt_targets:
            values["target_ids"] = np.where(learned_N, values["target_ids"], np.int32(NO_TARGET))
    return Rows(lengths_R=lengths_R, columns=values)


def _check_ids(ids: Array, name: str, vocab_size: int) -> None:
    """See that all are of the vocabulary: of 0 to 2^31 − 1 negative ones are none, and are beyond it as numbers without a sign."""
    if ids.size and int(ids.view(np.uint32).max()) >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)].flat[0]
        raise ValueError(f"{name} holds the id {wrong}, expected 0 to {vocab_size - 1}")


def _learned(
    table: pa.Table, lengths_R: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """[N]: where the distribution is about a completion's token of its row, all True without a completion_mask; [R]: how often."""
    if COMPLETION_MASK.name not in table.column_names:
        return np.ones(lengths_R.sum(), np.bool_), lengths_R
    lists = _lists(table, COMPLETION_MASK.name)
    if not np.array_equal(lists.value_lengths(), lengths_R):
        raise ValueError("completion_mask and input_ids have different lengths")
    return learned(_values(lists, COMPLETION_MASK.name), lengths_R)


def learned(
    mask_N: Array, lengths_R: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Where distributions are about a completion's token of the same row, of rows one after the other.

    Args:
        mask_N: their completion_mask.
        lengths_R: their lengths.

    Returns:
        [N] whether each position's is, [R] how many of a row.
    """
    learned_N = loss_mask(mask_N)
    learned_N[lengths_R.cumsum() - 1] = False  # the next token is the next row's
    row_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    return learned_N, np.bincount(row_N[learned_N], minlength=len(lengths_R))


def at_their_places(values_CK: Array, learned_N: npt.NDArray[np.bool_], name: str) -> Array:
    """[N, K]: values of the positions that have them; elsewhere no token (`EMPTY`) with no probability, or zeros."""
    nothing = NOTHING.get(name, 0)
    values_NK = np.full((len(learned_N), values_CK.shape[1]), nothing, values_CK.dtype)
    values_NK[learned_N] = values_CK
    return values_NK


def _target_ids(
    table: pa.Table, input_ids_N: Array, lengths_R: npt.NDArray[np.int64], ends: Ends
) -> Array:
    """[N] int32: the token that follows each position, NO_TARGET where it is not known."""
    targets_N = np.empty_like(input_ids_N)
    targets_N[:-1] = input_ids_N[1:]
    stops_R = lengths_R.cumsum()
    ids, chunks = (table[name].combine_chunks() for name in ("id", "chunk_index"))
    same = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    goes_on = same & (np.diff(chunks.to_numpy()) == 1)
    last = np.full(len(lengths_R), NO_TARGET, dtype=targets_N.dtype)
    if ends.eos_token_id is not None:
        last[:] = ends.eos_token_id
        last[lengths_R >= ends.shortest_cut] = NO_TARGET
        last[-1:][lengths_R[-1:] >= ends.shortest_open] = NO_TARGET
    last[:-1][goes_on] = input_ids_N[stops_R[:-1][goes_on] + ends.num_prefix_ids]
    targets_N[stops_R - 1] = last
    return targets_N


def _lists(table: pa.Table, name: str) -> pa.ListArray:
    column = table[name]
    lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if lists.null_count:
        raise ValueError(f"{name} holds a null")
    return lists


def _values(lists: pa.ListArray, name: str) -> Array:
    """[N] or [N, K]. `flatten` honours the offset of a slice; `.values` would not."""
    inner = lists.flatten()
    shape: tuple[int, ...] = ()
    if pa.types.is_list(inner.type):
        widths = np.diff(inner.offsets)
        if inner.null_count or (len(widths) and (widths != widths[0]).any()):
            raise ValueError(f"{name} does not have the same number of values at every position")
        shape = (len(inner), int(widths[0]) if len(widths) else 0)
        inner = inner.flatten()
    if inner.null_count:
        raise ValueError(f"{name} holds a null")
    # Arrow packs booleans into bits; all else is a view.
    values: Array = inner.to_numpy(zero_copy_only=not pa.types.is_boolean(inner.type))
    return values.reshape(shape) if shape else values


def _is_per_token(kind: pa.DataType) -> bool:
    """Whether a column is lists of numbers, or lists of lists of numbers."""
    value = kind.value_type if pa.types.is_list(kind) else None
    value = value.value_type if value and pa.types.is_list(value) else value
    is_number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return value is not None and any(check(value) for check in is_number)


def _same_lists(found: Any, expected: pa.DataType) -> bool:
    """Whether two list types agree but for the names of their elements."""
    while pa.types.is_list(expected):
        if not isinstance(found, pa.DataType) or not pa.types.is_list(found):
            return False
        found, expected = found.value_type, expected.value_type
    return bool(found == expected)
