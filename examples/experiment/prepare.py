"""Everything before the first student: corpus, dataset (built, verified), truth, and what all of that is and costs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from builder.build.build import build
from builder.dataset.manifest import environment, read_manifest, write_json
from builder.recipe.file import load_recipe
from builder.verify.verify import verify
from examples.experiment.arms import ARMS
from examples.experiment.corpus import write_corpus
from examples.experiment.train import Data, teacher_itself
from examples.experiment.truth import SAMPLES, write_truth
from logit_dataset.files import column_name
from logit_dataset.load import LogitDataset

RECIPE = Path(__file__).parent / "recipe.toml"
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the experiment keeps its files, and the size of its student's vocabulary."""

    work: Path
    num_kept: int
    length: int
    recipe: Path = RECIPE
    teacher: Path | None = None
    """Where the recipe names a directory."""

    @property
    def dataset(self) -> Path:
        """The built dataset."""
        return self.work / "dataset"

    @property
    def parts(self) -> Path:
        """The truth, and a dataset each for train, quarter, validation and test."""
        return self.work / "parts"

    def data(self) -> Data:
        """What students learn from."""
        return Data(self.dataset, self.parts, self.num_kept, self.teacher)


def prepare(place: Place, results: Path, *, max_characters: int | None, progress: Progress) -> None:
    """Make what is not there yet, and write `dataset.json` beside the results.

    Raises:
        ValueError: the dataset has problems, or the teacher does not say what it holds.
    """
    place.work.mkdir(parents=True, exist_ok=True)
    corpus = place.work / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, max_characters=max_characters)
    build(
        load_recipe(place.recipe),
        place.work,
        place.dataset,
        progress=_counted("built", progress),
        notice=progress,
    )
    if problems := verify(place.dataset).problems:
        raise ValueError(f"{place.dataset}: {problems[0]}; remove it and start again")
    write_truth(
        place.dataset,
        place.parts,
        num_kept=place.num_kept,
        teacher_path=place.teacher,
        progress=_counted("asked", progress),
    )
    if not (results / "dataset.json").exists():
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / "dataset.json", _describe(place))


def _describe(place: Place) -> dict[str, Any]:
    data, manifest = place.data(), read_manifest(place.dataset)
    parts = {name: data.part(name) for name in ("train", "quarter", "validation", "test")}
    train = parts["train"]
    rows = [train.read(group) for group in train.row_groups]
    lengths = np.concatenate([part.lengths_R for part in rows])
    ids = np.concatenate([part.columns["input_ids"] for part in rows])
    return {
        "teacher": manifest["teacher"]["name"],
        "tokens": {name: part.num_tokens for name, part in parts.items()},
        "mean_topk_mass": manifest["totals"]["mean_topk_mass"],
        "vocabulary": train.vocab_size,
        "text_outside_vocabulary": float((ids == data.frequent.other).mean()),
        "teacher_on_test": teacher_itself(data, place.length),
        "stored_bytes": {name: _stored_bytes(train, arm.columns) for name, arm in ARMS.items()},
        "api": {
            "calls": int(lengths.sum()),
            "prompt_tokens": int((lengths * (lengths + 1) // 2).sum()),
            "sampled_tokens": int(lengths.sum()) * SAMPLES,
        },
        "environment": environment("cpu"),
    }


def _stored_bytes(data: LogitDataset, columns: tuple[str, ...]) -> float | None:
    """Bytes a token in Parquet (zstd) of an arm's target; None where it has no columns of its own."""
    total = 0
    for group in data.row_groups:
        stored: pq.RowGroupMetaData = data.files.footers[group.file].row_group(group.index)
        for number in range(stored.num_columns):
            column = stored.column(number)
            if column_name(column.path_in_schema) in columns:
                total += column.total_compressed_size
    return total / data.num_tokens if columns else None


def _counted(verb: str, progress: Progress) -> Callable[[int], None]:
    """Turns numbers of tokens into a line every 5,000 or so."""
    seen = [0, 0]

    def count(tokens: int) -> None:
        seen[0] += tokens
        if seen[0] - seen[1] >= 5_000:
            seen[1] = seen[0]
            progress(f"{verb}: {seen[0]:,} tokens")

    return count
