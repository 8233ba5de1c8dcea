"""The command `logit-dataset`, which needs more than the reader does but for `export`: `pip install "logit-dataset[build]"`."""

import sys
from importlib.util import find_spec

NEEDED = (
    *("datasets", "filelock", "jinja2", "pydantic", "tqdm", "transformers", "typer", "yaml"),
    "zstandard",
)
"""Modules of the extra `build`, besides those of the reader."""


def main() -> None:
    """Run the command line; where only the reader is installed, say what is missing, with exit status 1."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing and sys.argv[1:2] == ["export"]:
        from logit_dataset.export.__main__ import main as export

        return export(sys.argv[2:])
    if missing:
        sys.exit(
            f"error: only the reader is installed (there is no {', no '.join(missing)}); for this command, run: "
            'pip install "logit-dataset[build]"'
        )
    from builder.cli.main import main as run

    run()
