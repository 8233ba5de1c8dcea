"""A dataset → random rows of it, each with the chunks before and behind it.

In:   a manifest, its shard records, and the data files.
Out:  rows as tensors, the token that follows each, and texts and tokens of their neighbours in the document.

Cost: the row groups of three rows for each.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from builder.dataset.lookup import follow, goes_on, read_row
from builder.dataset.manifest import ShardRecord
from builder.verify.comparison import StoredRow
from builder.verify.spelling import Spelled
from logit_dataset.schema import Layout, columns, loss_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A row to recompute."""

    stored: StoredRow
    spelled: Spelled | None
    """None where the dataset has no texts."""
    before: Spelled | None
    after: Spelled | None


def choose_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    *,
    count: int,
    seed: int,
    elsewhere: Mapping[str, Callable[[], Any]],
) -> Iterator[Chosen]:
    """Random rows, in the order of the dataset.

    Args:
        directory: of the dataset.
        manifest: of the dataset.
        records: its shards.
        count: of rows; all of them, if there are fewer.
        seed: chooses them.
        elsewhere: opens data files that are not in the directory.
    """
    rows = _Rows(directory, manifest, records, elsewhere)
    total = sum(record.rows for record in records)
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    first = 0
    for place, record in enumerate(records):
        for number in chosen:
            if first <= number < first + record.rows:
                yield rows.at(place, number - first)
        first += record.rows


class _Rows:
    """Opens the files of a dataset for single rows."""

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        records: list[ShardRecord],
        elsewhere: Mapping[str, Callable[[], Any]],
    ) -> None:
        self._directory, self._manifest, self._records = directory, manifest, records
        self._elsewhere = elsewhere
        self._layout = Layout.of(manifest["recipe"], manifest["teacher"])
        self._texts = ["id", "chunk_index", "input_ids", *(["text"] if self._layout.text else [])]

    def at(self, place: int, number: int) -> Chosen:
        """A row of the file of a record."""
        record = self._records[place]
        values = read_row(self._open(record), number)
        before = self._neighbour(place, number - 1) if values["chunk_index"] else None
        after = self._neighbour(place, number + 1)
        is_last = after is None and number + 1 == record.rows
        next_token, is_end = follow(
            self._manifest, values, after, is_cut_off=is_last and record.ends_within is not None
        )
        stored = StoredRow(
            where=f"{record.file} row {number}",
            document_id=values["id"],
            chunk_index=values["chunk_index"],
            input_ids=values["input_ids"],
            next_token=next_token,
            columns=_tensors(values, self._layout),
            mask_T=torch.from_numpy(_mask(values, self._layout)),
        )
        beside = [before, after if after and goes_on(values, after) else None]
        texts: list[Spelled | None] = [None, None, None]
        if self._layout.text:
            texts = [_spelled(row, is_end=is_end) if row else None for row in (values, *beside)]
        return Chosen(stored=stored, spelled=texts[0], before=texts[1], after=texts[2])

    def _neighbour(self, place: int, number: int) -> dict[str, Any] | None:
        """A row before or behind one, in the same file or the next of its partition."""
        record = self._records[place]
        if 0 <= number < record.rows:
            return read_row(self._open(record), number, self._texts)
        place += 1 if number > 0 else -1
        if not 0 <= place < len(self._records):
            return None
        other = self._records[place]
        if other.partition != record.partition:
            return None
        return read_row(self._open(other), 0 if number > 0 else other.rows - 1, self._texts)

    def _open(self, record: ShardRecord) -> Any:
        open_file = self._elsewhere.get(record.file)
        return open_file() if open_file else self._directory / record.file


def _spelled(values: dict[str, Any], *, is_end: bool) -> Spelled:
    mask = values.get("completion_mask")
    return Spelled(
        text=values["text"],
        input_ids=values["input_ids"],
        chunk_index=values["chunk_index"],
        is_end=is_end,
        num_prompt=0 if mask is None else int((~mask.astype(bool)).sum()),
    )


def _tensors(values: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    tensors = {}
    for column in columns(layout):
        if column.shape and column.name != "input_ids":
            array: np.ndarray[Any, Any] = values[column.name].copy()
            if "," in column.shape:
                array = array.reshape(-1, layout.width(column))  # where none is kept, too
            tensors[column.name] = torch.from_numpy(array)
    return tensors


def _mask(values: dict[str, Any], layout: Layout) -> npt.NDArray[np.bool_]:
    if layout.completions_only:
        return loss_mask(values["completion_mask"])
    return np.ones(len(values["input_ids"]), np.bool_)
