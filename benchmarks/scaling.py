"""Two workers of one thread each against one: how much of twice its rate they reach."""

import os
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import sample
from builder.build.build import build
from builder.build.task import Pool
from builder.dataset.manifest import read_manifest, records_of
from builder.recipe.recipe import Recipe
from builder.sources import demo

WORKERS = 2
SHARDS = 4
"""Of each partition, so that what happens between shards counts."""


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Rates in tokens/s of one worker and of two, from the start of the first shard on, and the efficiency of the two.

    Args:
        tokens: of each worker's partition.
        rounds: after one that does not count.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        lines = demo.embedded_corpus()[0].read_text(encoding="utf-8").splitlines()
        for part in range(WORKERS):  # every second document, and several times, for there are few
            text = "\n".join(lines[part::WORKERS] * (1 + tokens // 40_000))
            (base / f"part-{part}.jsonl").write_text(text, encoding="utf-8")
        found = sample.rounds(
            {
                "one": lambda: sum(_rates(base, tokens, workers=1).values()) / WORKERS,
                "two": lambda: sum(_rates(base, tokens, workers=WORKERS).values()),
            },
            rounds,
        )
    return {
        "one_tokens_per_second": round(statistics.median(found["one"])),
        "two_tokens_per_second": round(statistics.median(found["two"])),
        "efficiency": round(sample.ratio(found["two"], found["one"]) / WORKERS, 3),
    }


def _rates(base: Path, tokens: int, *, workers: int) -> dict[int, float]:
    """Tokens/s of each partition, from the start of its first shard to the end of its last, all that lies between included."""
    recipe = Recipe.model_validate(
        {
            **sample.recipe("float32", 1).model_dump(),
            "corpus": {
                "files": ("part-*.jsonl",),
                "id_column": "id",
                "max_tokens": tokens * WORKERS,
            },
            "output": {"partitions": WORKERS, "shard_tokens": max(1, tokens // SHARDS)},
        }
    )
    output = Path(tempfile.mkdtemp(dir=base)) / "out"
    build(recipe, base, output, pool=Pool(workers=workers, device="cpu"))
    spans: dict[int, list[float]] = defaultdict(list)
    counts: dict[int, int] = defaultdict(int)
    for record in records_of(read_manifest(output)):
        end = (output / record.file).stat().st_mtime
        spans[record.partition] += [end - record.seconds, end]
        counts[record.partition] += record.tokens
    return {p: count / (max(spans[p]) - min(spans[p])) for p, count in counts.items()}
