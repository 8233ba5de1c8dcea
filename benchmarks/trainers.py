"""What trainers of others take: rows of `load_dataset` by a LogitCollator, and exports, in tokens/s and in CPU microseconds a token."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader

from benchmarks import sample
from logit_dataset import LogitCollator, load_logits
from logit_dataset.export.export import export

BATCH_SIZE = 8
TOKENS = 300_000
"""So many that a worker's start is small beside them."""


def measure(dataset: Path, *, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Of each way its rate, and the CPU time of all processes; the collator alone has its rows already."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        long = sample.repeated(dataset, base / "long", tokens)
        count = load_logits(long).num_tokens
        stock = load_dataset(str(long), split="train", cache_dir=str(base / "cache"))
        assert isinstance(stock, Dataset)
        rows = stock.with_format("numpy")
        collate = LogitCollator.of(long)
        batches = [[rows[i] for i in range(BATCH_SIZE)]]
        few = sum(len(row["input_ids"]) for row in batches[0])

        def alone() -> None:
            for batch in batches * (count // few):
                collate(batch)

        def by_a_worker() -> None:
            for _ in DataLoader(rows, BATCH_SIZE, shuffle=True, collate_fn=collate, num_workers=1):  # type: ignore[arg-type]
                pass

        def exported(to: Any) -> None:
            with tempfile.TemporaryDirectory(dir=base) as output:
                export(long, Path(output, "out"), to=to)

        found = sample.rounds(
            {
                "collator alone": lambda: sample.costs(alone),
                "collator, one worker": lambda: sample.costs(by_a_worker),
                "export to axolotl": lambda: sample.costs(lambda: exported("axolotl")),
                "export to distillkit": lambda: sample.costs(lambda: exported("distillkit")),
            },
            rounds,
        )
    return {
        name: {
            "tokens_per_second": round(count / statistics.median(wall for wall, _ in costs)),
            "cpu_microseconds": round(1e6 * statistics.median(cpu for _, cpu in costs) / count, 2),
        }
        for name, costs in found.items()
    }
