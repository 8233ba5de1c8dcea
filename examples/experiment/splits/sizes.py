"""What a token takes on disk: every split with the builder's own writer, and the ids of draws in the encodings that stock readers know.

    python -m examples.experiment.splits.sizes      after the experiment has made its data; a minute of one core

In:   the quarter of the training documents, with the draws of every split.
Out:  `bytes.json` beside the results on splits: bytes per token of each column; the squared error of each split's estimate; and, by way
      of writing ids, bytes per token and nanoseconds of one core per token, to write and to read. CPU time, so that other programs on
      the machine count little.

Shape suffixes: N positions, V student's vocabulary, K top-k, M draws.
"""

import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from builder.dataset.manifest import environment, write_json
from builder.dataset.shards import ROW_GROUP_TOKENS, ZSTD_LEVEL, column_bytes, parquet_writer
from examples.experiment.arms import arm_of
from examples.experiment.prepare import Place
from examples.experiment.splits.draws import Array, Split, SplitDraws, nested
from examples.experiment.splits.frontier import FRONTIER
from examples.experiment.train import Data
from logit_dataset import load_logits
from logit_dataset.rows import Rows

STATISTICS = ("input_ids", "target_logprob", "logsumexp", "entropy")
"""Columns of one value a token that every split has."""
TARGET = ("topk_indices", "topk_logprobs", "tail_logprob", "tail_indices")
"""Columns that the loss of a split reads."""
DRAW_LOGPROB_BYTES = 1.6
"""Of a draw's entry in `tail_logprobs`, which no loss reads: what the experiment's own dataset takes beside its 50 entries."""
LEVELS = (1, ZSTD_LEVEL, 9, 19)
WAYS: dict[str, dict[str, Any]] = {
    "PLAIN": {},
    "BYTE_STREAM_SPLIT": {"column_encoding": "BYTE_STREAM_SPLIT"},
    "DELTA_BINARY_PACKED": {"column_encoding": "DELTA_BINARY_PACKED"},
    "dictionary": {"use_dictionary": True},
}
PART = "quarter"


def write_sizes(place: Place, path: Path) -> None:
    """Measure, and write the numbers."""
    data = load_logits(place.parts / PART)
    rows = [data.read(group) for group in data.row_groups]
    draws = SplitDraws(place.parts)
    arms = (arm_of(settings.arm) for settings in FRONTIER.runs())
    splits = sorted({arm.split for arm in arms if arm.split}, key=lambda s: (s.top_k, s.num_draws))
    found = {
        "tokens": data.num_tokens,
        "splits": {
            str(split): split_bytes([draws.told(split, part) for part in rows], split)
            for split in splits
        },
        "squared_error": {str(split): squared_error(place.data(), split) for split in splits},
        "ways": [
            {"ids": name, **way}
            for name, split, is_sorted in (
                ("24 draws beside 1 entry, as drawn", Split(1, 24), False),
                ("24 draws beside 1 entry, sorted", Split(1, 24), True),
                ("50 entries, by rank", Split(50, 0), False),
            )
            for way in ways(_ids(rows, draws, split, is_sorted))
        ],
        "environment": environment("cpu"),
    }
    write_json(path, found)


def split_bytes(rows: list[Rows], split: Split) -> dict[str, float]:
    """Bytes per token of each column, written as the builder writes it."""
    names = [n for n in TARGET if split.top_k or (not n.startswith("topk") and n != "tail_logprob")]
    lengths = np.concatenate([part.lengths_R for part in rows])
    table = pa.table(
        {
            name: nested(np.concatenate([part.columns[name] for part in rows]), lengths)
            for name in (*STATISTICS, *names)
        }
    )
    sink = io.BytesIO()
    with parquet_writer(pa.PythonFile(sink), table.schema, "default") as writer:
        for start, stop in _groups(lengths):
            writer.write_table(table.slice(start, stop - start))
    sizes = column_bytes(pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata)
    return {name: size / int(lengths.sum()) for name, size in sizes.items()}


def squared_error(data: Data, split: Split) -> float:
    """Mean of ‖p̂ − p‖² over the validation documents, in the student's vocabulary."""
    part, errors = data.part("validation", split), []
    for group in part.row_groups:
        columns = part.read(group).columns
        error_NV = -np.exp(data.whole[columns["position"]], dtype=np.float32)
        places_N1 = np.arange(len(error_NV))[:, None]
        listed_NK = columns["topk_indices"]
        mass_NK = np.where(listed_NK >= 0, np.exp(columns["topk_logprobs"], dtype=np.float32), 0)
        np.add.at(error_NV, (places_N1, listed_NK), mass_NK)
        error_NV[:, -1] += np.exp(columns["other_logprob"])
        share_N1 = np.exp(columns["tail_logprob"], dtype=np.float32)[:, None] / split.num_draws
        drawn_NM = columns["tail_indices"]
        np.add.at(error_NV, (places_N1, drawn_NM), np.broadcast_to(share_N1, drawn_NM.shape))
        errors.append((error_NV.astype(np.float64) ** 2).sum(-1))
    return float(np.concatenate(errors).mean())


def ways(ids_NM: Array) -> list[dict[str, Any]]:
    """Bytes per token, and nanoseconds of one core per token to write and to read, of ids in each encoding and level."""
    lists = pa.table({"ids": nested(ids_NM, np.full(1, len(ids_NM)))})
    found = []
    for encoding, options in WAYS.items():
        if "column_encoding" in options:
            options = {"column_encoding": {"ids.list.element.list.element": options["column_encoding"]}}  # fmt: skip
        for level in LEVELS:
            sink = io.BytesIO()
            started = time.process_time()
            pq.write_table(
                lists,
                pa.PythonFile(sink),
                compression="zstd",
                compression_level=level,
                **{"use_dictionary": False, **options},
            )
            written = time.process_time()
            pq.read_table(pa.BufferReader(sink.getvalue()), use_threads=False)
            read = time.process_time()
            found.append(
                {
                    "encoding": encoding,
                    "level": level,
                    "bytes": sink.tell() / len(ids_NM),
                    "write_ns": round(1e9 * (written - started) / len(ids_NM)),
                    "read_ns": round(1e9 * (read - written) / len(ids_NM)),
                }
            )
    return found


def _ids(rows: list[Rows], draws: SplitDraws, split: Split, is_sorted: bool) -> Array:
    name = "tail_indices" if split.num_draws else "topk_indices"
    ids_NM = np.concatenate([draws.told(split, part).columns[name] for part in rows])
    ids_NM = ids_NM[:ROW_GROUP_TOKENS]
    return np.sort(ids_NM, axis=-1) if is_sorted else ids_NM


def _groups(lengths: Array) -> list[tuple[int, int]]:
    """Rows of a row group each, of up to ROW_GROUP_TOKENS tokens."""
    number_R = (lengths.cumsum() - 1) // ROW_GROUP_TOKENS
    starts = np.flatnonzero(np.diff(number_R, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(lengths)], strict=True))


if __name__ == "__main__":
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "out/experiment")
    write_sizes(Place(work=work, num_kept=2_048, length=256), work / "results/splits/bytes.json")
