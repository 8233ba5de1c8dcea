"""What each option of the row costs: the rate of a build with it beside one without, and its bytes."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import sample
from builder.build.build import build
from builder.dataset.manifest import read_manifest

OPTIONS: dict[str, dict[str, object]] = {
    "4 tail draws": {"tail_samples": 4},
    "a temperature": {"temperatures": (2.0,)},
    "hidden states": {"hidden_states": True},
    "all log-probabilities": {"top_k": "all"},
}
"""Beside the plain row of 50."""


def measure(dtype: str, *, device: str, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each option: build ÷ plain build, microseconds a position more than it, bytes per token more than it."""
    with tempfile.TemporaryDirectory() as scratch:

        def seconds_and_bytes(options: dict[str, object]) -> tuple[float, float]:
            with tempfile.TemporaryDirectory(dir=scratch) as output:
                recipe = sample.recipe(dtype, tokens, **options)
                build(recipe, Path(scratch), Path(output, "out"), device=device)
                totals = read_manifest(Path(output, "out"))["totals"]
            return totals["seconds"] / totals["tokens"], totals["bytes"] / totals["tokens"]

        sizes: dict[str, float] = {}

        def seconds_a_token(name: str, options: dict[str, object]) -> float:
            seconds, sizes[name] = seconds_and_bytes(options)
            return seconds

        found = sample.rounds(
            {
                name: lambda name=name, options=options: seconds_a_token(name, options)  # type: ignore[misc]
                for name, options in {"plain": {}, **OPTIONS}.items()
            },
            rounds,
        )
    plain = found["plain"]
    results: dict[str, Any] = {
        "plain": {
            "tokens_per_second": round(1 / statistics.median(plain)),
            "bytes_a_token": round(sizes["plain"], 1),
        }
    }
    for name in OPTIONS:
        more = statistics.median(a - b for a, b in zip(found[name], plain, strict=True))
        results[name] = {
            "rate_over_plain": round(sample.ratio(plain, found[name]), 3),
            "microseconds_more": round(1e6 * more, 1),
            "bytes_more": round(sizes[name] - sizes["plain"], 1),
        }
    return results
