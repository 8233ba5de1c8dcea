"""The command `card`: the card of a dataset, written again."""

from pathlib import Path
from typing import Annotated

import typer

from builder.console.terminal import say


def card(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished dataset.")],
) -> None:
    """Write the card of a finished dataset and its pictures again."""
    from builder.card.card import write_card
    from builder.card.records import read_release
    from builder.dataset.manifest import read_manifest
    from builder.dataset.printable import counted

    write_card(directory, read_manifest(directory), release=read_release(directory))
    pictures = len(list((directory / "assets").glob("*.svg")))
    say(
        f"{directory / 'README.md'}: the card is written, with {counted(pictures, 'picture')} in {directory / 'assets'}"
    )
