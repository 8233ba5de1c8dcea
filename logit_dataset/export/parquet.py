"""Rows of a dataset → Parquet files that axolotl and DistillKit read with `load_dataset`.

Shape suffixes: R rows, N positions of all of them, B rows of a batch, T positions of one, X ids with weights.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logit_dataset.export.weights import Tail, listed
from logit_dataset.load import LogitDataset
from logit_dataset.rows import NO_TARGET, Array, Rows

FILE_TOKENS = 2_000_000
"""After so many the next file begins: some hundred MB."""


def axolotl_tables(data: LogitDataset, tail: Tail) -> Iterator[pa.Table]:
    """A table of prepared rows for each row group of the dataset."""
    for group in data.row_groups:
        yield axolotl_table(data.read(group), tail)


def axolotl_table(rows: Rows, tail: Tail) -> pa.Table:
    """Whole sequences. `target_mask[t]` says whether `labels[t + 1]` is learned, as the distribution at t is about that token.

    So `labels` begin with −100, and sequences that axolotl packs together do not predict each other.
    """
    ids_N, stops_R = rows.columns["input_ids"], rows.lengths_R.cumsum()
    starts_R = stops_R - rows.lengths_R
    learned_N = rows.columns.get("mask", np.ones(len(ids_N), np.bool_)).copy()
    learned_N[stops_R - 1] = False
    labels_N = np.full(len(ids_N), NO_TARGET, np.int32)
    labels_N[1:][learned_N[:-1]] = ids_N[1:][learned_N[:-1]]
    ids_NX, logw_NX = listed(rows.columns, tail)
    mask_NX = np.broadcast_to(learned_N[:, None], ids_NX.shape).astype(np.int8)
    offsets_R = np.append(0, stops_R).astype(np.int32)
    return pa.table(
        {
            "input_ids": _lists(ids_N, offsets_R),
            "attention_mask": _lists(np.ones(len(ids_N), np.int8), offsets_R),
            "labels": _lists(labels_N, offsets_R),
            "position_ids": _lists(
                (np.arange(len(ids_N)) - np.repeat(starts_R, rows.lengths_R)).astype(np.int32),
                offsets_R,
            ),
            "target_token_ids": _lists(ids_NX, offsets_R),
            "target_logprobs": _lists(logw_NX, offsets_R),
            "target_mask": _lists(mask_NX, offsets_R),
        }
    )


def distillkit_tables(
    data: LogitDataset, tail: Tail, *, length: int, packed: bool, batch_size: int = 64
) -> Iterator[pa.Table]:
    """Tables of rows of one length."""
    batches = data.batches(
        batch_size=batch_size, length=length, packed=packed, split_long=True, seed=None
    )
    for batch in batches:
        yield distillkit_table({name: values.numpy() for name, values in batch.items()}, tail)


def distillkit_table(batch: dict[str, Array], tail: Tail) -> pa.Table:
    """A batch. `labels[t]` says in DistillKit whether the distribution at t is learned, and what the position before it predicts.

    The first one of a sequence is −100: what stands before it there is another sequence, or nothing.
    """
    ids_BT, sequences_BT = batch["input_ids"], batch["sequence_ids"]
    counts_BT = batch["mask"] & (batch["position_ids"] > 0)
    flat: dict[str, Array] = {
        name: batch[name].reshape(-1, *batch[name].shape[2:])
        for name in ("topk_indices", "topk_logprobs", "tail_logprob", "tail_indices")
        if name in batch
    }
    ids_NX, logw_NX = listed(flat, tail)
    offsets_B = np.arange(len(ids_BT) + 1, dtype=np.int32) * ids_BT.shape[1]
    columns = {
        "input_ids": ids_BT.astype(np.int64),
        "attention_mask": (sequences_BT + 1).astype(np.int64),
        "labels": np.where(counts_BT, ids_BT, NO_TARGET).astype(np.int64),
    }
    return pa.table(
        {
            **{name: _lists(values.reshape(-1), offsets_B) for name, values in columns.items()},
            "token_ids": _lists(ids_NX.astype(np.int64), offsets_B),
            "top_values": _lists(logw_NX, offsets_B),
        }
    )


def write_parquet(tables: Iterator[pa.Table], directory: Path, split: str) -> int:
    """Write tables to `data/train-….parquet`, or of another split, a row group each, while the next is made; returns the number of rows."""
    (directory / "data").mkdir(exist_ok=True)
    writer, index, tokens, rows = None, 0, 0, 0
    try:
        for table in _ahead(tables):
            if writer is None:
                path = directory / "data" / f"{split}-{index:05d}.parquet"
                writer = pq.ParquetWriter(
                    path,
                    table.schema,
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=["attention_mask.list.element", "target_mask.list.element.list.element"],
                    write_statistics=False,
                )  # fmt: skip
            writer.write_table(table, row_group_size=max(1, len(table)))
            rows += len(table)
            tokens += len(table["input_ids"].combine_chunks().flatten())
            if tokens >= FILE_TOKENS:
                writer.close()
                writer, index, tokens = None, index + 1, 0
    finally:
        if writer is not None:
            writer.close()
    return rows


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    with ThreadPoolExecutor(1, thread_name_prefix="logit-dataset") as pool:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table


def _lists(values: Array, offsets: npt.NDArray[np.int32]) -> pa.ListArray:
    """[N] or [N, X] → a list a row, without a copy."""
    inner = pa.array(values.reshape(-1))
    if values.ndim == 2:
        steps = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        inner = pa.ListArray.from_arrays(pa.array(steps), inner)
    return pa.ListArray.from_arrays(pa.array(offsets), inner)
