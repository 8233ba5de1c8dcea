"""Which split of a token's bytes teaches most: the runs, in the order of what they tell, and what was claimed before the first.

Each arm is a split K + M: K exact entries and M draws from outside of them (`draws`). All of the machinery is that of the nine arms:
the same parts, students, optimiser and rule for the best point. Runs end where the validation documents have not got better for
a while, so that no arm is cut off while it still learns.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from builder.dataset.manifest import write_json
from examples.experiment.claims import Claim, better, share_of_gap
from examples.experiment.prepare import Place, prepare
from examples.experiment.runs import run_all, say
from examples.experiment.train import Settings

Stage = tuple[tuple[str, ...], str, tuple[int, ...]]
"""(arms, data, seeds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """The runs, in their order."""

    rate: float
    """What the text chose among the nine arms."""
    batch_size: int
    length: int
    steps: int
    """With all data, at most; with a quarter half as many, and half the patience."""
    evaluate_every: int
    patience: int
    stages: tuple[Stage, ...]
    larger_rate: float
    """The larger student's: less, as is its share of a weight in a sum over twice as many. Not tuned."""
    larger: tuple[Stage, ...]
    """The runs of the larger student, after all others."""

    def runs(self) -> list[Settings]:
        """All runs, in their order."""
        return [
            self.settings(arm, data, seed, student)
            for student, stages in (("small", self.stages), ("larger", self.larger))
            for arms, data, seeds in stages
            for seed in seeds
            for arm in arms
        ]

    def settings(self, arm: str, data: str, seed: int, student: str = "small") -> Settings:
        """Of one run."""
        parts = 1 if data == "train" else 2
        return Settings(
            arm=arm,
            data=data,
            seed=seed,
            rate=self.rate if student == "small" else self.larger_rate,
            steps=self.steps // parts,
            evaluate_every=max(1, self.evaluate_every // parts),
            batch_size=self.batch_size,
            length=self.length,
            patience=self.patience // parts,
            student=student,
        )


FIRST = ("text", "whole", "50+4", "1+24", "50+24")
SECOND = ("9+15", "0+24", "4+20", "0+50", "16+16", "1+8", "0+4", "0+24-heavy")
THIRD = ("4+8", "50+8", "16+32", "0+4-damped", "50+4-text", "1+24-text")
FRONTIER = SplitPlan(
    rate=2e-3,
    batch_size=4,
    length=256,
    steps=6_000,
    evaluate_every=100,
    patience=400,
    stages=(
        ((*FIRST, *SECOND), "quarter", (0,)),
        (FIRST, "quarter", (1, 2)),
        (("9+15", "0+24"), "quarter", (1, 2)),
        (FIRST, "train", (0,)),
        (("0+4", "0+24-heavy"), "quarter", (1, 2)),
        (THIRD, "quarter", (0,)),
        (FIRST, "train", (1, 2)),
        (("4+20", "0+50", "16+16", "1+8", *THIRD), "quarter", (1, 2)),
        ((*SECOND, *THIRD), "train", (0, 1, 2)),
    ),
    larger_rate=1e-3,
    larger=(
        (("text", "whole", "50+4", "16+16"), "quarter", (0, 1, 2)),
        (("text", "whole", "50+4", "16+16"), "train", (0, 1, 2)),
    ),
)


def _ids_explain(get: Any) -> float:
    ce = {arm: get(arm, "quarter")["best"]["ce"] for arm in ("0+4", "0+24", "0+24-heavy")}
    return float((ce["0+4"] - ce["0+24-heavy"]) / (ce["0+4"] - ce["0+24"]))


CLAIMS = {
    "S1": Claim(
        text="1 entry and 24 draws teach more than 50 entries and 4 draws",
        number="cross-entropy of 50 + 4 − that of 1 + 24, a quarter",
        **better("1+24", "50+4", "quarter"),
    ),
    "S2": Claim(
        text="So do 9 entries and 15 draws",
        number="cross-entropy of 50 + 4 − that of 9 + 15, a quarter",
        **better("9+15", "50+4", "quarter"),
    ),
    "S3": Claim(
        text="20 more draws beside the same 50 entries teach more",
        number="cross-entropy of 50 + 4 − that of 50 + 24, a quarter",
        **better("50+24", "50+4", "quarter"),
    ),
    "S4": Claim(
        text="1 entry and 24 draws are nearly as good as the whole distribution",
        number="share of the gap text → whole distribution that they close, a quarter",
        needs=tuple((arm, "quarter") for arm in ("text", "1+24", "whole")),
        value=lambda get: share_of_gap(get, "1+24", "quarter"),
        bound=0.9,
    ),
    "S5": Claim(
        text="Draws need no head: 24 draws from the whole distribution teach more than 50 entries and 4 draws",
        number="cross-entropy of 50 + 4 − that of 0 + 24, a quarter",
        **better("0+24", "50+4", "quarter"),
    ),
    "S6": Claim(
        text="It is the number of ids at a position that counts, and not the covariance of the error",
        number="share of what 24 draws gain on 4 that 24 draws with the covariance of 4 gain, a quarter",
        needs=tuple((arm, "quarter") for arm in ("0+4", "0+24", "0+24-heavy")),
        value=_ids_explain,
        bound=0.5,
    ),
    "S7": Claim(
        text="1 entry and 24 draws teach more than 50 entries and 4 draws with all data, too",
        number="cross-entropy of 50 + 4 − that of 1 + 24, all data",
        **better("1+24", "50+4", "train"),
    ),
    "S8": Claim(
        text="A larger student, too, learns more from 16 entries and 16 draws than from 50 and 4",
        number="cross-entropy of 50 + 4 − that of 16 + 16, a quarter, the larger student",
        **better("16+16", "50+4", "quarter, larger"),
    ),
}
"""S1 to S7 were written before the first run, after a pilot by others (another corpus size and student, one or two seeds) that said S1 to S3;
S8 after the small students, in which 16 + 16 was the better one in each of three seeds, and before the first larger one."""


def frontier(plan: SplitPlan, place: Place, results: Path, *, workers: int) -> None:
    """Do what is not done yet.

    Raises:
        ValueError: results of other settings are in the way, or a run went wrong.
    """
    torch.set_num_threads(workers)
    results.mkdir(parents=True, exist_ok=True)
    prepare(place, results, max_characters=None, progress=say)
    torch.set_num_threads(1)
    write_json(results / "plan.json", asdict(plan))
    run_all(plan.runs(), place, results, workers)
