"""The command `export` where only the reader is installed: `python -m logit_dataset.export DATASET --to axolotl --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from logit_dataset.export.export import Trainer, export
from logit_dataset.export.weights import Tail
from logit_dataset.schema import SPLITS


def main(arguments: Sequence[str] | None = None) -> None:
    """Export; a failure is one line on stderr, and exit status 1."""
    parser = argparse.ArgumentParser(prog="export", description=export.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("dataset", help="directory of a dataset, or ORG/NAME on the Hub")
    parser.add_argument("--to", required=True, choices=get_args(Trainer))
    parser.add_argument("--output", required=True, type=Path, help="a directory to make")
    parser.add_argument("--revision", help="tag, branch or commit on the Hub")
    parser.add_argument("--tail", choices=get_args(Tail), help="the best possible by default")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--packed", action="store_true", help="several sequences a row")
    parser.add_argument("--split", choices=SPLITS, help="the only one to write")
    given = vars(parser.parse_args(arguments))
    try:
        print(export(given.pop("dataset"), given.pop("output"), **given))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
