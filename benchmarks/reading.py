"""Reading a dataset: our batches against pyarrow's decoding alone, and against stock `load_dataset(...).with_format("torch")`.

Decoding and batches are measured on a long dataset, that has been opened: opening takes as long as reading 5,000 tokens, and the first of a
pass's blocks is waited for. Both use all cores. CPU time tells which of them does more, wall time also how well the work is shared.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Features, List, Value, load_dataset

from benchmarks import sample
from logit_dataset import load_logits

TOKENS = 1_000_000


def measure(dataset: Path, *, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Tokens/s into (T, K) tensors, and ratios. Every way reads all columns but the texts, from a warm file cache."""
    short = load_logits(dataset).num_tokens
    columns = ["input_ids", "topk_indices", "topk_logprobs", "tail_logprob", "target_logprob"]
    columns += ["logsumexp", "entropy"]

    def decode() -> None:
        for path in sorted((long / "data").glob("*.parquet")):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                file.read_row_group(group, columns=columns)

    def batches(seed: int | None) -> None:
        for _ in data.batches(batch_size=8, length=512, seed=seed, packed=True):
            pass

    with tempfile.TemporaryDirectory() as scratch:
        long = sample.repeated(dataset, Path(scratch) / "long", tokens)
        data = load_logits(long)
        stock = load_dataset(str(dataset), split="train", cache_dir=scratch).select_columns(columns)
        nested = {
            name: List(List(Value(feature.dtype))) if name.startswith("topk") else feature
            for name, feature in stock.features.items()
        }
        as_arrays = stock.with_format("torch")
        as_lists = stock.cast(Features(nested)).with_format("torch")

        def iterate(rows: Any) -> None:
            for _ in rows:
                pass

        costs = sample.rounds(
            {
                "pyarrow decode": lambda: sample.costs(decode),
                "our batches": lambda: sample.costs(lambda: batches(None)),
                "our batches, shuffled": lambda: sample.costs(lambda: batches(0)),
                "load_dataset, Array2D": lambda: sample.costs(lambda: iterate(as_arrays)),
                "load_dataset, lists": lambda: sample.costs(lambda: iterate(as_lists)),
            },
            rounds,
        )
    counts = {name: short if "load_dataset" in name else data.num_tokens for name in costs}
    rates = {name: [counts[name] / wall for wall, _ in v] for name, v in costs.items()}
    cpu = {name: [1e6 * used / counts[name] for _, used in v] for name, v in costs.items()}

    def ratio(of: dict[str, list[float]], over: str, under: str, digits: int = 2) -> float:
        return round(sample.ratio(of[over], of[under]), digits)

    return {
        "tokens_per_second": {name: round(statistics.median(v)) for name, v in rates.items()},
        "cpu_microseconds": {name: round(statistics.median(v), 3) for name, v in cpu.items()},
        "batches_over_decode": ratio(rates, "our batches", "pyarrow decode"),
        "shuffled_over_decode": ratio(rates, "our batches, shuffled", "pyarrow decode"),
        "decode_over_batches_cpu": ratio(cpu, "pyarrow decode", "our batches"),
        "decode_over_shuffled_cpu": ratio(cpu, "pyarrow decode", "our batches, shuffled"),
        "shuffled_over_lists": ratio(rates, "our batches, shuffled", "load_dataset, lists", 1),
    }
