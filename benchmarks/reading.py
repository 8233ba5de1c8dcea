"""Reading a dataset: our batches against pyarrow's decoding alone, and against stock `load_dataset(...).with_format("torch")`."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Features, List, Value, load_dataset

from benchmarks import sample
from logit_dataset import load_logits


def measure(dataset: Path, *, rounds: int) -> dict[str, Any]:
    """Tokens/s into (T, K) tensors, and ratios. Every way reads all columns but the texts, from a warm file cache."""
    tokens = load_logits(dataset).num_tokens
    columns = ["input_ids", "topk_indices", "topk_logprobs", "tail_logprob", "target_logprob"]
    columns += ["logsumexp", "entropy"]
    files = sorted((dataset / "data").glob("*.parquet"))

    def decode() -> None:
        for path in files:
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                file.read_row_group(group, columns=columns)

    def batches(seed: int | None) -> None:
        for _ in load_logits(dataset).batches(batch_size=8, length=512, seed=seed, packed=True):
            pass

    with tempfile.TemporaryDirectory() as cache:
        stock = load_dataset(str(dataset), split="train", cache_dir=cache).select_columns(columns)
        nested = {
            name: List(List(Value(feature.dtype))) if name.startswith("topk") else feature
            for name, feature in stock.features.items()
        }
        as_arrays = stock.with_format("torch")
        as_lists = stock.cast(Features(nested)).with_format("torch")

        def iterate(rows: Any) -> None:
            for _ in rows:
                pass

        found = sample.rounds(
            {
                "pyarrow decode": lambda: tokens / sample.seconds(decode),
                "our batches": lambda: tokens / sample.seconds(lambda: batches(None)),
                "our batches, shuffled": lambda: tokens / sample.seconds(lambda: batches(0)),
                "load_dataset, Array2D": lambda: (
                    tokens / sample.seconds(lambda: iterate(as_arrays))
                ),
                "load_dataset, lists": lambda: tokens / sample.seconds(lambda: iterate(as_lists)),
            },
            rounds,
        )
    return {
        "tokens_per_second": {name: round(statistics.median(v)) for name, v in found.items()},
        "batches_over_decode": round(
            sample.ratio(found["our batches"], found["pyarrow decode"]), 2
        ),
        "shuffled_over_decode": round(
            sample.ratio(found["our batches, shuffled"], found["pyarrow decode"]), 2
        ),
        "shuffled_over_lists": round(
            sample.ratio(found["our batches, shuffled"], found["load_dataset, lists"]), 1
        ),
    }
