"""The command `info`: what a dataset is, or what is in one of its rows."""

from enum import StrEnum
from typing import Annotated

import typer

from builder.console.options import DatasetArgument, RevisionOption, SplitOption, TeacherOption
from builder.console.terminal import UsageError, local_directory, quiet_libraries, say, say_json


class Format(StrEnum):
    """How `info` prints."""

    HUMAN = "human"
    JSON = "json"


def info(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    format: Annotated[
        Format, typer.Option(help="The former spelling of --json.", hidden=True)
    ] = Format.HUMAN,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Show this row's tokens with the teacher's predictions."),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(min=0, help="Show the teacher's predictions at this position of the row."),
    ] = None,
    split: SplitOption = None,
    teacher: TeacherOption = None,
) -> None:
    """Describe a dataset, or show one of its rows.

    A row is shown token by token, with the teacher's predictions.
    """
    from builder.dataset import info as information
    from builder.dataset.lookup import file_of_row

    as_json = as_json or format is Format.JSON
    directory = local_directory(dataset, revision)
    if row is not None:
        if as_json:
            raise UsageError(
                "--json prints the summary, and --row one row; leave one out (load_dataset reads rows)"
            )
        quiet_libraries()
        directory = local_directory(dataset, revision, file_of_row(directory, row, split)[0])
        if position is None:
            say(information.describe_row(directory, row, split=split, teacher_path=teacher))
        else:
            found = information.alternatives(
                directory, row, position, split=split, teacher_path=teacher
            )
            say(information.describe_position(found))
    elif position is not None:
        raise UsageError("--position needs --row; name the row, such as --row 0")
    elif as_json:
        say_json(information.summarize(directory))
    else:
        say(information.describe(directory))
