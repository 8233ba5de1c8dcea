"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where the teacher runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Split(StrEnum):
    """A part of a dataset with a hold-out."""

    TRAIN = "train"
    VALIDATION = "validation"


DeviceOption = Annotated[
    Device, typer.Option(help="Where the teacher runs; auto takes a GPU if there is one.")
]
TeacherOption = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        help="The teacher's directory, GGUF file or Python file, where the recipe names a local one. A Python file is run.",
    ),
]

DatasetArgument = Annotated[
    str, typer.Argument(help="Directory of a finished dataset, or ORG/NAME on the Hub.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Tag, branch or commit, of a dataset on the Hub.")
]

SplitOption = Annotated[
    Split | None,
    typer.Option(help="Count rows within this split; by default those of train come first."),
]

QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="LOGIT_DATASET_QUIET",
        help="No progress on stderr; notices and errors stay.",
    ),
]

TagOption = Annotated[
    str | None, typer.Option(help="A version like v1.2.3; the next one by default.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str | None, typer.Option(help="A line for the changelog.")]
RecomputeOption = Annotated[
    int,
    typer.Option(
        "--recompute",
        min=0,
        help="Random rows to run through the teacher again before publishing, unless a result is recorded.",
    ),
]
