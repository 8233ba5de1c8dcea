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
    Device, typer.Option(help="Device of the teacher; auto uses a GPU if there is one.")
]
TeacherOption = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        help="The teacher's directory, GGUF file or Python file, if the recipe names a local one. A Python file is run.",
    ),
]

DatasetArgument = Annotated[
    str, typer.Argument(help="Directory of a finished dataset, or ORG/NAME on the Hub.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Tag, branch or commit of a dataset on the Hub.")
]

SplitOption = Annotated[
    Split | None,
    typer.Option(help="Count rows within this split. By default, rows of train come first."),
]

QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        envvar="LOGIT_DATASET_QUIET",
        help="Hide progress on stderr; notices and errors stay.",
    ),
]

TagOption = Annotated[
    str | None, typer.Option(help="A version such as v1.2.3; by default the next one.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str | None, typer.Option(help="A line for the changelog.")]
RecomputeOption = Annotated[
    int,
    typer.Option(
        "--recompute",
        min=0,
        help="Number of random rows to recompute with the teacher before publishing, unless a result is recorded.",
    ),
]
