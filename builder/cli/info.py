"""The command `info`: what a dataset is, or what is in one of its rows."""

from enum import StrEnum
from typing import Annotated

import typer

from builder.cli.options import DatasetArgument, RevisionOption, TeacherOption
from builder.cli.terminal import local_directory, quiet_libraries, say, say_json


class Format(StrEnum):
    """How `info` prints."""

    HUMAN = "human"
    JSON = "json"


def info(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    format: Annotated[
        Format, typer.Option(help="For a person, or JSON for a program.")
    ] = Format.HUMAN,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Show this row's tokens and what the teacher expected."),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(min=0, help="Show the teacher's alternatives at this position of the row."),
    ] = None,
    teacher: TeacherOption = None,
) -> None:
    """Say what a dataset is, or show a row with the teacher's alternatives."""
    from builder.dataset import info as information
    from builder.dataset.lookup import file_of_row

    directory = local_directory(dataset, revision)
    if row is not None:
        if format is Format.JSON:
            raise ValueError("--format json prints the summary; rows are read with load_dataset")
        quiet_libraries()
        directory = local_directory(dataset, revision, file_of_row(directory, row)[0])
        if position is None:
            say(information.describe_row(directory, row, teacher_path=teacher))
        else:
            found = information.alternatives(directory, row, position, teacher_path=teacher)
            say(information.describe_position(found))
    elif position is not None:
        raise ValueError("--position needs --row")
    elif format is Format.JSON:
        say_json(information.summarize(directory))
    else:
        say(information.describe(directory))
