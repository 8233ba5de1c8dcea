"""A table of rows → flat arrays over all of their positions, or what is wrong with their shapes.

In:   a row group, and what its columns should be.
Out:  where each row begins and ends, and every column in its stored type; those of several values a token hold positions in the loss mask
      only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from builder.dataset.shards import nested_values
from logit_dataset.schema import Layout, columns, loss_mask

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRows:
    """Some rows as flat arrays over all their positions."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int64]
    columns: dict[str, Array]
    """Every column of one or several values a token, in its stored type; those of several hold positions in the loss mask only."""
    kept: npt.NDArray[np.int64]
    """Positions that have several values, in order: all of them, but with `completions_only`."""
    left_out: npt.NDArray[np.int64]
    """The others."""

    def at(self, where: npt.NDArray[np.int64], part: slice) -> dict[str, Array]:
        """The columns that there are at a part of the positions `where`: `kept` or `left_out`."""
        stored = {n: v[where[part]] for n, v in self.columns.items() if v.ndim == 1}
        if where is self.kept:
            stored |= {n: v[part] for n, v in self.columns.items() if v.ndim == 2}
        return stored

    @classmethod
    def of(cls, table: pa.Table, layout: Layout) -> "FlatRows | str":
        """The arrays, or what is wrong with the table's shapes."""
        if any(column.null_count for column in table.columns):
            return "a value is null"
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        if not lengths.all():
            return "a row has no tokens"
        ends = lengths.cumsum()
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        is_kept = np.ones(len(row_of), np.bool_)
        if layout.completions_only:
            mask = table["completion_mask"].combine_chunks()
            if not np.array_equal(mask.value_lengths().to_numpy(), lengths):
                return "completion_mask and input_ids have different lengths"
            is_kept = loss_mask(nested_values(mask))
            is_kept[ends - 1] = False
        kept_lengths = np.bincount(row_of[is_kept], minlength=len(lengths))
        per_token = [column for column in columns(layout) if column.shape]
        for column in per_token:
            lists = table[column.name].combine_chunks()
            is_cut = column.shape.startswith("C,")
            if not np.array_equal(
                lists.value_lengths().to_numpy(), kept_lengths if is_cut else lengths
            ):
                what = "the completions of completion_mask" if is_cut else "input_ids"
                return f"{column.name} and {what} have different lengths"
            inner, width = lists.flatten(), layout.width(column)
            if inner.null_count or (
                pa.types.is_list(inner.type)
                and not (inner.value_lengths().to_numpy() == width).all()
            ):
                return f"{column.name} does not have {width} values a token"
        values = {column.name: nested_values(table[column.name]) for column in per_token}
        return cls(
            starts=ends - lengths,
            ends=ends,
            row_of=row_of,
            input_ids=values["input_ids"].astype(np.int64),
            columns=values,
            kept=np.flatnonzero(is_kept),
            left_out=np.flatnonzero(~is_kept),
        )
