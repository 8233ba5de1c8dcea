"""The command line: parse, call one function, print. Data goes to stdout, progress and notices to stderr.

Each command is a file beside this one. Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from builder.cli.build import build
from builder.cli.card import card
from builder.cli.export import export
from builder.cli.info import info
from builder.cli.init import init
from builder.cli.plan import plan
from builder.cli.publish import publish
from builder.cli.verify import verify
from builder.cli.view import view

app = typer.Typer(
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Capture a teacher's next-token distributions as a Hugging Face dataset, verify and read them.",
    epilog="\b\nExample: logit-dataset build recipe.toml --output out/mine",
)
EXAMPLES: dict[Callable[..., None], str] = {
    init: "init mine --corpus 'texts/*.txt'",
    build: "build recipe.toml --output out/mine --dry-run",
    plan: "plan recipe.toml --tokens 1e12 --gpu h100 --parameters 8e9 --workers 64",
    verify: "verify ORG/NAME --revision v1.0.0 --recompute 20",
    info: "info ORG/NAME --revision v1.0.0",
    view: "view out/mine --rows 20 --against out/other --output page.html",
    card: "card out/mine",
    export: "export ORG/NAME --to axolotl --output out/axolotl",
    publish: "publish ORG/NAME out/mine --dry-run",
}
"""Of every command, in the order of the help. They are not wrapped there, so that they can be pasted."""
for command, example in EXAMPLES.items():
    app.command(epilog=f"\b\nExample: logit-dataset {example}")(command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"logit-dataset {version('logit-dataset')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 and the number of the signal, as shells have it."""


def main() -> None:
    """Run a command. A failure is one line on stderr, and exit status 1, 2 for a wrong command line, or 130 after Ctrl-C."""
    try:
        # What this returns is the status of a typer.Exit, which typer also makes of Ctrl-C.
        status = app(sys.argv[1:] or ["--help"], prog_name="logit-dataset", standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except BrokenPipeError:  # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if os.environ.get("LOGIT_DATASET_TRACEBACK"):
            raise
        from builder.dataset.printable import one_line

        print(f"{_red('error:')} {one_line(' '.join(_explain(error).split()))}", file=sys.stderr)
        status = getattr(error, "exit_code", 1)
    if status == INTERRUPTED:
        print(
            "interrupted: finished shards are safe; run the same command to resume", file=sys.stderr
        )
    sys.exit(status)


def _red(word: str) -> str:
    """In colour on a terminal, unless NO_COLOR is set (https://no-color.org) or the terminal can do nothing."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return word if is_plain or not sys.stderr.isatty() else typer.style(word, fg="red", bold=True)


WORDS = (
    (r"^Invalid value for '(\S+)'( / '\S+')?: ", r"\1: "),
    (r"Input should be a valid integer.*", "expected a whole number"),
    (r"Input should be a valid number.*", "expected a number"),
    (r"Input should be greater than or equal to", "expected at least"),
    (r"Input should be less than or equal to", "expected at most"),
    (r"Value error, '(.*)' is not one of (.*)$", r"expected one of \2, found '\1'"),
)
"""What typer says, and what we say."""


def _explain(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        command = (
            context.command_path if (context := getattr(error, "ctx", None)) else "logit-dataset"
        )
        message = error.format_message().rstrip(".")
        for theirs, ours in WORDS:
            message = re.sub(theirs, ours, message)
        return f"{message}{' See' if message.endswith('?') else '; see'} {command} --help"
    if isinstance(error, OSError) and error.errno:
        from builder.build.state import DISK_FULL

        if error.errno in DISK_FULL:
            return (
                f"cannot write ({os.strerror(error.errno)}); finished shards are safe: make room, and run the same "
                "command to resume"
            )
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (not expected: LOGIT_DATASET_TRACEBACK=1 shows where it comes from)"
