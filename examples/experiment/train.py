"""One run: an arm, an amount of data, a seed → how good the student became. A pure function of its settings and the data.

What all runs share: the initial weights and the order of the data (both of the seed), the steps, the optimiser, and the rule for
length. The learning rate is constant after a short warm-up, and it is the exponential average of the weights that is measured (0.98 a step):
so a point in the middle of a run is as good as the end of a run that was planned to stop there, and taking the best point (by the
cross-entropy on the validation documents) is fair to an arm that overfits early. The test documents are looked at twice, at that point
and at the end, and decide nothing.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.experiment.arms import Batch, StudentVocabulary, arm_of
from examples.experiment.measure import cross_entropy_and_kl, measure
from examples.experiment.splits.draws import Split, SplitDraws
from examples.experiment.student import logits_of, make_student, write_on
from examples.experiment.truth import student_vocabulary
from logit_dataset import load_logits
from logit_dataset.load import LogitDataset

AVERAGE, WARMUP_STEPS, MAX_NORM = 0.98, 50, 1.0
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
PROMPTS = ("The with statement", "Return a list of", "If the file does not exist,")
WRITTEN_TOKENS, TEMPERATURE = 48, 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that decides a run, beside the data."""

    arm: str
    data: str
    """`train` or `quarter`."""
    seed: int
    rate: float
    steps: int
    evaluate_every: int
    batch_size: int
    length: int
    patience: int | None = None
    """Stop after so many steps without a lower cross-entropy on the validation documents; None never stops early."""
    student: str = "small"
    """One of `student.SIZES`."""

    @property
    def name(self) -> str:
        """Of its file of results."""
        student = "" if self.student == "small" else f"-{self.student}"
        return f"{self.arm}-{self.data}{student}-{self.seed}-rate{self.rate:g}.json"


class Data:
    """The parts that `truth.write_truth` has written, in the student's vocabulary."""

    def __init__(
        self, dataset: Path, parts: Path, num_kept: int, teacher: Path | None = None
    ) -> None:
        """Open them; batches are read when they are asked for."""
        self._parts, self._teacher = parts, teacher
        self.made_of = read_json(parts / "made_of.json")
        """What the data are: only runs of the same can be compared."""
        self.frequent = student_vocabulary(dataset, num_kept)
        self.whole = np.load(parts / "whole.npy", mmap_mode="r")
        self.splits = SplitDraws(parts)
        self.manifest = load_logits(parts / "train").manifest
        self.vocabulary = StudentVocabulary(self.frequent, self.manifest["teacher"]["vocab_size"])

    def part(self, name: str, split: Split | None = None) -> LogitDataset:
        """A part as the loader has it, or as it would have a dataset of another split."""
        vocabulary = self.vocabulary
        if split:
            told = partial(self.splits.told, split)
            vocabulary = StudentVocabulary(self.frequent, len(vocabulary.place_V), told)
        return load_logits(self._parts / name).project(vocabulary)

    def training(self, settings: Settings) -> Iterator[Batch]:
        """Batches without end, packed; only those of arms that need it have `whole`."""
        arm = arm_of(settings.arm)
        batches = self.part(settings.data, arm.split).batches(
            batch_size=settings.batch_size,
            length=settings.length,
            packed=True,
            split_long=True,
            seed=settings.seed,
        )
        while True:
            for batch in batches:
                yield self.with_whole(batch) if arm.needs_whole else batch

    def held_out(self, name: str, length: int) -> list[Batch]:
        """All batches of a part, with `whole`."""
        batches = self.part(name).batches(
            batch_size=8, length=length, packed=True, split_long=True, seed=None
        )
        return [self.with_whole(batch) for batch in batches]

    def with_whole(self, batch: Batch) -> Batch:
        """The batch with [N, V] log-probabilities of the teacher at the positions in its mask."""
        rows = self.whole[batch["position"][batch["mask"]].numpy()]
        return {**batch, "whole": torch.from_numpy(rows)}

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's."""
        from builder.dataset.lookup import dataset_tokenizer

        return dataset_tokenizer(self.manifest, self._teacher)


def train(
    settings: Settings, data: Data, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Train a student and measure it: settings, curve, and the test documents at the best point and the last."""
    started, loss_of = time.perf_counter(), arm_of(settings.arm).loss
    student = make_student(
        data.vocabulary.vocab_size,
        length=settings.length,
        seed=settings.seed,
        size=settings.student,
    )
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, 1, WARMUP_STEPS)
    validation = data.held_out("validation", settings.length)
    logits = partial(_real_logits, averaged.module)
    curve: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    recent: list[float] = []
    batches = data.training(settings)
    for step in range(1, settings.steps + 1):
        batch = next(batches)
        loss = loss_of(logits_of(student, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM)
        optimizer.step()
        warmup.step()
        averaged.update_parameters(student)
        recent.append(loss.item())
        if step % settings.evaluate_every == 0 or step == settings.steps:
            if not np.isfinite(recent[-1]):
                raise ValueError(f"{settings.name}: the loss is {recent[-1]} at step {step}")
            ce, kl = cross_entropy_and_kl(logits, validation)
            if not curve or ce < min(point["ce"] for point in curve):
                best = copy.deepcopy(averaged.module.state_dict())
            curve.append({"step": step, "loss": float(np.mean(recent)), "ce": ce, "kl": kl})
            recent.clear()
            progress(f"{settings.name}: step {step}, validation ce {ce:.4f}, kl {kl:.4f}")
            lowest = min(curve, key=lambda point: point["ce"])["step"]
            if settings.patience is not None and step - lowest >= settings.patience:
                break
    test = data.held_out("test", settings.length)
    last_metrics = measure(logits, test)
    averaged.module.load_state_dict(best)
    return {
        "settings": asdict(settings),
        "made_of": data.made_of,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "curve": curve,
        "best_step": min(curve, key=lambda point: point["ce"])["step"],
        "best": measure(logits, test),
        "last": last_metrics,
        "written": _written(averaged.module, data, settings),
        "seconds": round(time.perf_counter() - started, 1),
    }


def teacher_itself(data: Data, length: int) -> dict[str, float]:
    """The same numbers of the teacher: what no student of it can be expected to beat by much."""
    return measure(lambda batch: batch["whole"].float(), data.held_out("test", length))


def read_json(path: Path) -> dict[str, Any]:
    """A file of results, or of what data are made of."""
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _real_logits(student: Any, batch: Batch) -> Tensor:
    return logits_of(student, batch)[batch["mask"]]


def _written(student: Any, data: Data, settings: Settings) -> dict[str, str]:
    written, kept = {}, data.frequent.kept
    for number, prompt in enumerate(PROMPTS):
        ids = data.vocabulary.place_V[data.tokenizer(prompt, add_special_tokens=False).input_ids]
        drawn = write_on(
            student,
            ids.tolist(),
            num_tokens=min(WRITTEN_TOKENS, settings.length - len(ids)),
            seed=number,
            temperature=TEMPERATURE,
        )
        written[prompt] = data.tokenizer.decode(kept[drawn].tolist())
    return written
