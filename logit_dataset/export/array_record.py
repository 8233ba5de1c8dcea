"""Batches of a dataset → ArrayRecord files of tf.train.Example that MaxText reads (`offline_data_dir`).

How:  a tf.train.Example is a map of names to lists, in the wire format of protocol buffers, which is written here: 50 ids a token are too
      many for the classes of protobuf. Needs the package array_record, which is there for Linux.

Shape suffixes: B rows of a batch, T positions of one, K ids of the head.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from logit_dataset.export.weights import listed
from logit_dataset.load import LogitDataset
from logit_dataset.rows import Array

FILE_RECORDS = 1_000
BATCH_SIZE = 16
FLOATS, INTEGERS = 2, 3
"""Numbers of the fields float_list and int64_list of a tf.train.Feature."""


def maxtext_records(data: LogitDataset, *, length: int) -> Iterator[dict[str, Array]]:
    """A record for every packed row of `length` tokens; `targets` are the tokens that follow, in segment 0 where nothing is learned."""
    batches = data.batches(
        batch_size=BATCH_SIZE, length=length, packed=True, split_long=True, seed=None
    )
    for tensors in batches:
        batch = {name: values.numpy() for name, values in tensors.items()}
        shape = batch["topk_indices"].shape
        flat = {n: v.reshape(-1, *v.shape[2:]) for n, v in batch.items()}
        ids_NK, logp_NK = listed(flat, "none")
        segments_BT = batch["sequence_ids"] + 1
        is_learned_BT = batch["mask"] & (batch["target_ids"] >= 0)
        columns = {
            "inputs": batch["input_ids"],
            "inputs_position": batch["position_ids"],
            "inputs_segmentation": segments_BT,
            "targets": np.where(is_learned_BT, batch["target_ids"], 0),
            "targets_position": batch["position_ids"],
            "targets_segmentation": np.where(is_learned_BT, segments_BT, 0),
            "top_k_indices": ids_NK.reshape(shape),
            "top_k_logits": logp_NK.reshape(shape),
        }
        for row in range(shape[0]):
            yield {name: values[row].reshape(-1) for name, values in columns.items()}


def write_array_records(records: Iterator[Mapping[str, Array]], directory: Path) -> int:
    """Write records to `teacher_top_k_part_….array_record`; returns their number.

    Raises:
        ValueError: the package array_record is not installed.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise ValueError(
            f"MaxText's files need the package array_record ({error}); pip install array_record"
        ) from None
    writer, number = None, 0
    try:
        for record in records:
            if number % FILE_RECORDS == 0:
                if writer is not None:
                    writer.close()
                name = f"teacher_top_k_part_{number // FILE_RECORDS:05d}.array_record"
                writer = ArrayRecordWriter(str(directory / name), "group_size:1")
            assert writer is not None
            writer.write(example_bytes(record))
            number += 1
    finally:
        if writer is not None:
            writer.close()
    return number


def example_bytes(record: Mapping[str, Array]) -> bytes:
    """A tf.train.Example: integers, 0 or more, as int64_list, all else as float_list."""
    features = b""
    for name, values in record.items():
        if values.dtype.kind in "iu":
            kind, packed = INTEGERS, _varints(values)
        else:
            kind, packed = FLOATS, values.astype("<f4").tobytes()
        feature = _field(kind, _field(1, packed))
        features += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, features)


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: its number and kind, its length, itself."""
    head = _varints(np.array([number << 3 | 2, len(content)]))
    return head + content


def _varints(values: npt.NDArray[np.integer]) -> bytes:
    """Numbers from 0 to 2^31 − 1, seven bits a byte, the lowest first; all bytes of a number but its last have the eighth bit set."""
    rest_N = values.astype(np.uint32)
    num_bytes = max(1, -(-int(rest_N.max(initial=0)).bit_length() // 7))
    bytes_NB = np.empty((len(rest_N), num_bytes), np.uint8)
    is_used_NB = np.empty(bytes_NB.shape, np.bool_)
    is_used_NB[:, 0] = True
    for place in range(num_bytes):
        bytes_NB[:, place] = rest_N & 0x7F
        rest_N >>= 7
        if place + 1 < num_bytes:
            is_used_NB[:, place + 1] = rest_N > 0
            bytes_NB[:, place] |= is_used_NB[:, place + 1].view(np.uint8) << 7
    return bytes_NB[is_used_NB].tobytes()
