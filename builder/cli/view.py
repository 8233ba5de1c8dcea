"""The command `view`: a page on which one sees what the teacher expected."""

import os
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from builder.console.options import DatasetArgument, RevisionOption, SplitOption, TeacherOption
from builder.console.terminal import UsageError, local_directory, quiet_libraries, say

if TYPE_CHECKING:
    from builder.view.view import Viewed


def view(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 20,
    start: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First row to show. By default, rows are spread over the dataset, or over its first file if it is on the Hub.",
        ),
    ] = None,
    split: SplitOption = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A second dataset of the same rows to compare with: a directory or ORG/NAME@REV."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("view.html"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    teacher: TeacherOption = None,
) -> None:
    """Write a page of texts and the teacher's predictions.

    The page is one HTML file. It shows each token with the teacher's predictions for its place.
    """
    from builder.dataset.printable import as_size, counted
    from builder.dataset.shards import atomic_file
    from builder.view.view import page

    _check_output(output)
    quiet_libraries()
    found = page(
        _viewed(dataset, revision),
        rows=rows,
        start=start,
        split=split,
        against=_viewed(against, None) if against else None,
        teacher_path=teacher,
    )
    with atomic_file(output) as sink:
        sink.write(found.html)
    say(
        f"{output}: {counted(found.rows, 'row')}, {counted(found.tokens, 'token')}, {as_size(len(found.html))}"
    )
    if not (open_page and webbrowser.open(output.absolute().as_uri())):
        say(f"next: open {output} in a browser")


def _check_output(output: Path) -> None:
    """See that a page can be written there, before it is made.

    Raises:
        UsageError: the name is not one of a page.
        ValueError: nothing can be written there.
    """
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise UsageError(f"--output {output} is not an HTML file; use a name that ends in .html")
    if not output.parent.is_dir():
        raise ValueError(
            f"--output {output}: there is no directory {output.parent}; create it, or name another one"
        )
    if not os.access(output.parent, os.W_OK):
        raise ValueError(
            f"--output {output}: {output.parent} cannot be written to; name another directory"
        )


def _viewed(dataset: str, revision: str | None) -> "Viewed":
    """A dataset by its directory or its name on the Hub, which may end in @ and a revision."""
    from builder.view.view import Viewed

    name, at, pinned = dataset.partition("@")
    if Path(dataset).exists() or not at:
        name = dataset
    elif revision is not None:
        raise UsageError(f"{dataset} names a revision, and --revision names another; leave one out")
    else:
        revision = pinned
    directory = local_directory(name, revision)
    is_here = directory == Path(name)

    def locate(file: str) -> Path:
        # The directory of a dataset on the Hub is that of a commit, to which all of its files then belong.
        return (directory if is_here else local_directory(name, directory.name, file)) / file

    return Viewed(directory=directory, locate=locate, is_here=is_here)
