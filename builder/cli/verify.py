"""The command `verify`: what is wrong with a dataset."""

from typing import Annotated

import typer

from builder.cli.options import DatasetArgument, Device, DeviceOption, RevisionOption, TeacherOption
from builder.cli.terminal import choose_device, local_directory, progress_bar, quiet_libraries


def verify(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    recompute: Annotated[
        int, typer.Option(min=0, help="Random rows to run through the teacher again.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(help="Chooses the random rows; a new one each time by default.")
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Keep what --recompute finds, for the card of the dataset."),
    ] = False,
    device: DeviceOption = Device.AUTO,
    teacher: TeacherOption = None,
) -> None:
    """Check hashes, schema and the invariants of every row; with --recompute also against the teacher."""
    from builder.dataset.manifest import read_manifest
    from builder.verify.verify import record_recomputation
    from builder.verify.verify import verify as run

    directory = local_directory(dataset, revision, "data/*.parquet")
    torch_device = "cpu"
    if recompute:
        quiet_libraries()
        torch_device = choose_device(device)
    with progress_bar("verify", read_manifest(directory)["totals"]["tokens"]) as bar:
        report = run(
            directory,
            recompute=recompute,
            seed=seed,
            device=torch_device,
            teacher_path=teacher,
            progress=bar.update,
        )
    for problem in report.problems:
        print(problem)
    if recomputed := report.recomputed:
        print(
            f"recomputed {recomputed['rows']} rows, {recomputed['tokens']:,} tokens (seed {recomputed['seed']}): "
            f"|Δ log-prob| max {recomputed['max_abs_error']:.2g}, mean {recomputed['mean_abs_error']:.2g}; "
            f"top-1 agreement {recomputed['top1_agreement']:.2%}; "
            f"NLL stored {recomputed['nll_stored']:.4f}, recomputed {recomputed['nll_recomputed']:.4f}"
        )
    if report.problems:
        print(f"{dataset}: {len(report.problems)} problems")
        raise typer.Exit(1)
    if record and recomputed:
        record_recomputation(directory, report, torch_device)
    print(
        f"{dataset}: {report.files} files, {report.rows:,} rows, {report.tokens:,} tokens, no problems"
    )
    at_revision = f', revision="{revision}"' if revision else ""
    print(f'next: load_dataset("{dataset}"{at_revision}, split="train").with_format("torch")')
