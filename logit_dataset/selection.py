"""Numbers of rows → the row groups that hold them, and of each which of its rows.

In:   row groups in stored order, and numbers of rows, counted from 0 through all of them.
Out:  those row groups that hold one of them, in stored order; and of a row group that was decoded, the chosen rows.

How:  a row group is decoded as a whole or not at all. So a row's last target is what it is in the whole dataset, whether the row that it is from
      is chosen or not. How many tokens the chosen rows have, by which blocks are made, only the lengths of the rows tell.

Cost: `input_ids` are read of each row group of which a part is chosen, sixteen at a time.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from logit_dataset.rows import RowGroup, Rows


def row_numbers(indices: Iterable[int], num_rows: int) -> npt.NDArray[np.int64]:
    """Numbers of rows in rising order.

    Args:
        indices: in any order.
        num_rows: of the dataset.

    Raises:
        ValueError: there are none, one is not the number of a row, or is given twice.
    """
    numbers = np.asarray(indices if hasattr(indices, "__array__") else list(indices))
    if not numbers.size:
        raise ValueError("indices are empty; give the number of one row or more")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"indices are {numbers.dtype} of shape {numbers.shape}, expected a list of row numbers; np.flatnonzero(mask) gives those of a "
            "mask"
        )
    numbers = np.sort(numbers)
    for wrong in numbers[[0, -1]]:
        if not 0 <= wrong < num_rows:
            raise ValueError(
                f"indices name the row {wrong}, expected 0 to {num_rows - 1} ({num_rows:,} rows)"
            )
    if (repeated := numbers[1:][numbers[1:] == numbers[:-1]]).size:
        raise ValueError(
            f"indices name the row {repeated[0]} twice, but an epoch holds a row once; give np.unique(indices)"
        )
    return numbers.astype(np.int64)


def groups_of(
    numbers: npt.NDArray[np.int64],
    row_groups: Sequence[RowGroup],
    lengths_of: Callable[[RowGroup], npt.NDArray[np.int64]],
) -> tuple[RowGroup, ...]:
    """The row groups that hold some rows, and these rows alone.

    Args:
        numbers: from `row_numbers`.
        row_groups: in stored order.
        lengths_of: reads the lengths of the rows of one.
    """
    starts = np.cumsum([0, *(group.num_rows for group in row_groups)])
    bounds = np.searchsorted(numbers, starts).tolist()

    def chosen(index: int) -> RowGroup:
        group = row_groups[index]
        rows = numbers[bounds[index] : bounds[index + 1]] - starts[index]
        if len(rows) == group.num_rows:
            return group
        num_tokens = int(lengths_of(group)[rows].sum())
        in_file = rows if group.rows is None else np.array(group.rows)[rows]
        return replace(
            group, num_rows=len(rows), num_tokens=num_tokens, rows=tuple(in_file.tolist())
        )

    held = [i for i in range(len(row_groups)) if bounds[i] < bounds[i + 1]]
    with ThreadPoolExecutor(16) as pool:
        return tuple(pool.map(chosen, held))


def fingerprint_of(row_groups: Sequence[RowGroup]) -> str:
    """Equal only for the same rows, however they were chosen."""
    lines = (f"{group.file} {group.index} {group.rows}\n" for group in row_groups)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def chosen_rows(rows: Rows, chosen: Sequence[int]) -> Rows:
    """Some of the rows, in stored order, in memory of their own: the row group's is then free."""
    is_chosen_R = np.isin(np.arange(len(rows.lengths_R)), chosen)
    is_chosen_N = np.repeat(is_chosen_R, rows.lengths_R)
    columns = {name: values[is_chosen_N] for name, values in rows.columns.items()}
    return Rows(lengths_R=rows.lengths_R[is_chosen_R], columns=columns)
