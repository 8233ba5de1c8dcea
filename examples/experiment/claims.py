"""What was claimed before the first run, and how it turned out.

A claim is about a number that each seed yields, which must be above a bound. It holds if it is in every seed, it is refuted if the mean over
seeds is not, and it is undecided otherwise, or as long as there are fewer seeds than MIN_SEEDS. Arms that are run with one seed only
are compared within that seed.

Numbers are those of the test documents at the best point of a run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan, nan
from statistics import mean
from typing import Any

MIN_SEEDS = 3
Results = Mapping[tuple[str, str], Mapping[int, dict[str, Any]]]
"""(arm, data) → seed → the result of a run, all at the chosen rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Something that can turn out wrong."""

    text: str
    number: str
    """What must be above the bound, in words."""
    needs: tuple[tuple[str, str], ...]
    value: Callable[[Any], float]
    """Of one seed: a function from (arm, data) to the result."""
    bound: float = 0.0
    min_seeds: int = MIN_SEEDS

    def values(self, results: Results) -> list[float]:
        """By seed, of those that have all that is needed."""
        seeds = set.intersection(*(set(results.get(need, {})) for need in self.needs))
        return [
            self.value(lambda arm, data, seed=seed: results[arm, data][seed])
            for seed in sorted(seeds)
        ]

    def verdict(self, results: Results) -> str:
        """holds, refuted or undecided."""
        values = self.values(results)
        if not values or len(values) < self.min_seeds:
            return "undecided: too few seeds so far"
        if any(map(isnan, values)):
            return "undecided: text was as good as the whole distribution"
        if min(values) > self.bound:
            return "holds"
        return "undecided: seeds differ" if mean(values) > self.bound else "**refuted**"


def share_of_gap(get: Any, arm: str, data: str) -> float:
    """How much of the way from the text to the whole distribution an arm goes; NaN where that is no way down."""
    ce = {name: get(name, data)["best"]["ce"] for name in ("text", arm, "whole")}
    gap = ce["text"] - ce["whole"]
    # Of a negative gap, an arm that is worse than both would have a share of more than all.
    return float((ce["text"] - ce[arm]) / gap) if gap > 0 else nan


def better(arm: str, than: str, data: str, metric: str = "ce", **options: Any) -> dict[str, Any]:
    """Fields of a claim that one arm is better than another."""

    def value(get: Any) -> float:
        return float(get(than, data)["best"][metric] - get(arm, data)["best"][metric])

    return {"needs": ((arm, data), (than, data)), "value": value, **options}


def _steps_saved(get: Any) -> float:
    text = get("text", "train")["curve"]
    goal = min(point["ce"] for point in text)
    taken = next(p["step"] for p in text if p["ce"] <= goal)
    reached = [p["step"] for p in get("tail_draws", "train")["curve"] if p["ce"] <= goal]
    return float(taken - reached[0]) if reached else float("-inf")


CLAIMS = {
    "1a": Claim(
        text="A student learns more from top 50 and 4 tail draws than from text",
        number="cross-entropy of text − that of tail draws, full data",
        **better("tail_draws", "text", "train"),
    ),
    "1b": Claim(
        text="… with a quarter of the data, too",
        number="the same with a quarter",
        **better("tail_draws", "text", "quarter"),
    ),
    "2": Claim(
        text="The fewer the data, the more the distribution is worth",
        number="(text − whole distribution) with a quarter, minus the same with all",
        needs=tuple((arm, data) for arm in ("text", "whole") for data in ("train", "quarter")),
        value=lambda get: (
            (get("text", "quarter")["best"]["ce"] - get("whole", "quarter")["best"]["ce"])
            - (get("text", "train")["best"]["ce"] - get("whole", "train")["best"]["ce"])
        ),
    ),
    "3a": Claim(
        text="A truthful tail beats the renormalised top 50: with 4 draws",
        number="cross-entropy of renormalised − that of tail draws, full data",
        **better("tail_draws", "renormalised", "train"),
    ),
    "3b": Claim(
        text="A truthful tail beats the renormalised top 50: with a bucket",
        number="cross-entropy of renormalised − that of tail bucket, full data",
        **better("tail_bucket", "renormalised", "train"),
    ),
    "4": Claim(
        text="Top 50 and 4 draws are nearly as good as the whole distribution",
        number="share of the gap text → whole that they close, full data",
        needs=tuple((arm, "train") for arm in ("text", "tail_draws", "whole")),
        value=lambda get: share_of_gap(get, "tail_draws", "train"),
        bound=0.9,
    ),
    "5": Claim(
        text="So are fifty samples, which by an API cost a prompt a token",
        number="share of the gap that they close, full data",
        needs=tuple((arm, "train") for arm in ("text", "samples", "whole")),
        value=lambda get: share_of_gap(get, "samples", "train"),
        bound=0.9,
    ),
    "6a": Claim(
        text="The renormalised top 50 makes students overconfident: calibration",
        number="ECE of renormalised − that of tail draws, full data",
        **better("tail_draws", "renormalised", "train", "ece"),
    ),
    "6b": Claim(
        text="The renormalised top 50 makes students overconfident: entropy",
        number="entropy of tail draws − that of renormalised, in nats, full data",
        **better("renormalised", "tail_draws", "train", "entropy_gap"),
    ),
    "7": Claim(
        text="Fifty samples of a position are worth more than one",
        number="cross-entropy of one sample − that of fifty, full data, one seed",
        **better("samples", "sample", "train", min_seeds=1),
    ),
    "8": Claim(
        text="The student of tail draws is where that of text will be at its best after fewer steps",
        number="steps saved to text's best validation cross-entropy, full data",
        needs=(("text", "train"), ("tail_draws", "train")),
        value=_steps_saved,
    ),
}
