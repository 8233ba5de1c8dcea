"""The command `plan`: what a build takes, on paper."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from builder.console.terminal import say, say_json


class Gpu(StrEnum):
    """Those whose data sheets are known here."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"
    L4 = "l4"
    L40S = "l40s"
    MI300X = "mi300x"


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as dataset_cards/*/recipe.toml.")],
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="To capture, such as 1e12; the recipe's max_tokens by default."),
    ] = None,
    gpu: Annotated[
        Gpu, typer.Option(help="Whose peak its maker's data sheet gives: dense, for the dtype.")
    ] = Gpu.H100,
    peak: Annotated[
        float | None,
        typer.Option(min=1e-6, help="TFLOPS of other hardware, in place of the GPU's."),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="Share of the peak that the teacher reaches; by default what an H100 did with one of its size.",
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Of the teacher, such as 8e9, if its files are not here; of experts, those that a token uses.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="GPUs, each with a copy of the teacher.")] = 1,
    mbit: Annotated[
        float, typer.Option(min=0.001, help="Of upload a second, for all workers together.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Calculate GPU hours, bytes and days of a build.

    Nothing is run. docs/planning.md has the formulas, and their sources.
    """
    from dataclasses import asdict

    from builder.plan.plan import describe, work
    from builder.recipe.file import load_recipe

    found = work(
        load_recipe(recipe),
        recipe.parent,
        None if tokens is None else round(tokens),
        gpu=gpu.value,
        peak_tflops=peak,
        utilization=utilization,
        parameters=parameters,
        workers=workers,
        mbit=mbit,
    )
    if as_json:
        say_json(asdict(found))
    else:
        say(describe(found))
