"""The command `build`: what a recipe describes becomes a dataset, which can be published while it is built."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from builder.console.options import (
    Device,
    DeviceOption,
    MessageOption,
    PrivateOption,
    QuietOption,
    RecomputeOption,
    TagOption,
)
from builder.console.progress import progress
from builder.console.terminal import (
    UsageError,
    choose_device,
    notice,
    program,
    quiet_libraries,
    say,
    say_json,
    say_published,
)


def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as dataset_cards/*/recipe.toml.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory of the dataset. An unfinished build in it is resumed.",
        ),
    ],
    device: DeviceOption = Device.AUTO,
    max_shards: Annotated[
        int | None, typer.Option(min=0, help="Stop after this many new shards.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Number of partitions to build at the same time, with Ray."),
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, such as auto; by default this machine."),
    ] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="GPUs per worker.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved recipe as TOML, with an estimate on stderr; write nothing.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="With --dry-run, print the plan and the estimate as JSON."),
    ] = False,
    publish_to: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Upload shards to this repository during the build, resume from it, and publish at the end.",
        ),
    ] = None,
    discard_local: Annotated[
        bool,
        typer.Option(
            "--discard-local",
            help="Delete each local shard after its upload. At most four stay, plus one for each further worker.",
        ),
    ] = False,
    tag: TagOption = None,
    private: PrivateOption = False,
    message: MessageOption = None,
    recompute: RecomputeOption = 5,
    quiet: QuietOption = False,
) -> None:
    """Build a dataset from a recipe, or resume an unfinished one."""
    from builder.dataset.printable import counted
    from builder.recipe.file import load_recipe

    if not publish_to and (discard_local or tag or private or message):
        raise UsageError(
            "--discard-local, --tag, --private and --message need --publish-to; add it, or leave them out"
        )
    if as_json and not dry_run:
        raise UsageError("--json needs --dry-run; add it, or leave --json out")
    loaded = load_recipe(recipe)
    base = recipe.parent
    quiet_libraries()
    with_ray = workers > 1 or ray_address is not None or gpus_per_worker is not None
    # Where the workers are, there may be GPUs though there is none here.
    torch_device = choose_device(Device.AUTO if with_ray and device is Device.CUDA else device)
    if dry_run:
        from builder.plan.estimate import describe, estimate

        found = estimate(loaded, base, device=torch_device)
        for line in found.notices:
            notice(line)
        if as_json:
            say_json(asdict(found))
            return
        say(found.recipe.rstrip("\n"))
        say(describe(found), to_stderr=True)
        say("nothing was written; run the command without --dry-run to build", to_stderr=True)
        return
    from builder.build.build import build as run
    from builder.build.delivery import deliver
    from builder.build.task import Pool
    from builder.sources.resolve import local_teacher

    with progress("build", loaded.corpus.max_tokens, is_quiet=quiet) as bar:
        pool = None
        if with_ray:
            pool = Pool(
                workers=workers,
                device=device.value,
                address=ray_address,
                gpus_per_worker=gpus_per_worker,
                told=bar.tell,
            )
        options: dict[str, Any] = {
            "device": torch_device,
            "pool": pool,
            "max_shards": max_shards,
            "progress": bar.update,
            "found": bar.start_from,
            "notice": notice,
            "told": bar.tell,
        }
        if publish_to:
            result, published = deliver(
                loaded,
                base,
                output,
                publish_to,
                discard=discard_local,
                tag=tag,
                private=private,
                message=message,
                recompute=recompute,
                **options,
            )
        else:
            result, published = run(loaded, base, output, **options), None
    if result.manifest is None:
        say(
            f"stopped early after {counted(result.shards_built, 'new shard')}; run the same command to resume"
        )
        return
    totals = result.manifest["totals"]
    say(
        f"{output}: {result.status}, {counted(totals['tokens'], 'token')} in {counted(totals['rows'], 'row')}, "
        f"{totals['bytes_per_token']} bytes per token"
    )
    if publish_to and published:
        say_published(publish_to, *published)
        return
    where = local_teacher(loaded.teacher, base)
    named = ["--teacher", str(where)] if where else []
    for word, *command in (("next:", "verify", str(output), "--recompute", "5"), ("or:  ", "view", str(output), "--open")):  # fmt: skip
        say(f"{word} {shlex.join([program(), *command, *named])}")
