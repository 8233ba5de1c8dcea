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
        typer.Option(
            min=1, help="Tokens to capture, such as 1e12; by default the recipe's max_tokens."
        ),
    ] = None,
    gpu: Annotated[
        Gpu,
        typer.Option(help="The GPU; its dense peak for the dtype is from the vendor's data sheet."),
    ] = Gpu.H100,
    peak: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Peak TFLOPS of other hardware, instead of --gpu."),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="Share of the peak that the teacher reaches; by default the share measured on an H100 for its size.",
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Parameters of the teacher, such as 8e9, if its files are not local; for a mixture of experts, those active per token.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="GPUs, each with a copy of the teacher.")] = 1,
    mbit: Annotated[
        float, typer.Option(min=0.001, help="Upload speed in Mbit/s of all workers together.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Calculate GPU hours, bytes and days of a build.

    Nothing is run. docs/planning.md has the formulas and their sources.
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
