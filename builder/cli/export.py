"""The command `export`: a dataset in the format of another trainer."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from builder.console.options import DatasetArgument, RevisionOption, Split
from builder.console.terminal import say


class Trainer(StrEnum):
    """Who reads the output."""

    AXOLOTL = "axolotl"
    DISTILLKIT = "distillkit"
    MAXTEXT = "maxtext"


class Tail(StrEnum):
    """What becomes of the mass outside the top K."""

    DRAWS = "draws"
    BUCKET = "bucket"
    NONE = "none"


def export(
    dataset: DatasetArgument,
    to: Annotated[Trainer, typer.Option(help="The trainer that will read the output.")],
    output: Annotated[Path, typer.Option(help="Directory to create.")],
    revision: RevisionOption = None,
    tail: Annotated[
        Tail | None,
        typer.Option(
            help="How to export the mass outside the top K: as sampled ids, as one bucket, or not at all; by default the best that the trainer "
            "and the dataset support."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per row, for DistillKit and MaxText; by default the recipe's max_length.",
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="For DistillKit, pack several sequences into each row.")
    ] = False,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Write this split only. By default, axolotl and DistillKit get all splits, and MaxText gets train."
        ),
    ] = None,
) -> None:
    """Convert a dataset for another trainer.

    Trainers are axolotl, DistillKit and MaxText. A README in the output says how to use it and what is lost.
    """
    from logit_dataset.export.export import export as write

    how = {"length": length, "packed": packed, "revision": revision, "split": split}
    say(write(dataset, output, to=to.value, tail=tail.value if tail else None, **how))  # type: ignore[arg-type]
