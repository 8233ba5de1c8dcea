"""The command `init`: a recipe to begin with."""

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from builder.console.terminal import UsageError, program, quiet_libraries, say


def init(
    directory: Annotated[Path, typer.Argument(help="Directory for recipe.toml.")] = Path(),
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Files of texts or chats, or a dataset on the Hub; repeatable."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A directory, a GGUF file or a model on the Hub; by default the embedded one."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The corpus holds chats.")] = False,
) -> None:
    """Write a commented recipe for your own files and teacher."""
    from builder.plan.starter import starter
    from builder.recipe.file import load_recipe

    if not corpus:
        raise UsageError("name the corpus, such as --corpus 'texts/*.txt' or --corpus ORG/NAME")
    path = directory / "recipe.toml"
    if path.exists():
        raise ValueError(f"{path} exists; choose another directory, or remove it")
    quiet_libraries()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip("-._") or "mine"
    text = starter(corpus, teacher, name=name, base=directory, is_chat=chat)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    load_recipe(path)
    say(text, to_stderr=True)
    say(f"{path}: written")
    say(f"next: {shlex.join([program(), 'build', str(path), '--output', f'out/{name}'])}")
