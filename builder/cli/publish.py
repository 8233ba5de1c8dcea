"""The command `publish`: a finished dataset becomes a version on the Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from builder.console.options import (
    Device,
    DeviceOption,
    MessageOption,
    PrivateOption,
    QuietOption,
    RecomputeOption,
    TagOption,
    TeacherOption,
)
from builder.console.progress import progress
from builder.console.terminal import (
    UsageError,
    choose_device,
    notice,
    quiet_libraries,
    say,
    say_published,
)


def publish(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Dataset repository on the Hub.")],
    directory: Annotated[Path, typer.Argument(help="Directory of a finished dataset.")],
    tag: TagOption = None,
    private: PrivateOption = False,
    message: MessageOption = None,
    recompute: RecomputeOption = 5,
    device: DeviceOption = Device.AUTO,
    teacher: TeacherOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, sizes and the card; change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a finished dataset as a tagged version.

    Run the same command again to resume.
    """
    from builder.hub import publish as hub
    from builder.hub import release

    if Path(name).is_dir() and not directory.exists():
        raise UsageError(f"{name} is a directory; give ORG/NAME first, then the directory")
    quiet_libraries()
    plan = release.prepare(
        name, directory, tag=tag, private=private, message=message, notice=notice
    )
    if dry_run:
        hub.check(plan, recompute=0)
        say(release.describe(plan, with_card=True))
        return
    if not yes and not plan.is_published and sys.stdin.isatty():
        say(release.describe(plan), to_stderr=True)
        if not typer.confirm(f"Publish {name} {plan.version.tag}?", err=True):
            raise typer.Exit(1)
    torch_device = choose_device(device) if recompute else "cpu"
    with progress("verify", plan.manifest["totals"]["tokens"], is_quiet=quiet) as bar:
        commit = hub.publish(
            plan,
            recompute=recompute,
            device=torch_device,
            teacher_path=teacher,
            notice=notice,
            progress=bar.update,
        )
    say_published(name, plan.version.tag, commit, not plan.is_published)
