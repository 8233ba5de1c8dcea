"""The command `verify`: what is wrong with a dataset."""

from typing import Annotated, Any

import typer

from builder.console.options import (
    DatasetArgument,
    Device,
    DeviceOption,
    QuietOption,
    RevisionOption,
    TeacherOption,
)
from builder.console.progress import progress
from builder.console.terminal import (
    choose_device,
    local_directory,
    quiet_libraries,
    say,
)

FILES = ("data/*.parquet", "assets/*.svg", ".huggingface.yaml", "dataset_infos.json")
"""Of a dataset on the Hub, besides those that describe it: the last two would change what `load_dataset` reads."""


def verify(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    recompute: Annotated[
        int, typer.Option(min=0, help="Number of random rows to recompute with the teacher.")
    ] = 0,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed that chooses the random rows; by default a new one each time."),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Save the result of --recompute for the card."),
    ] = False,
    device: DeviceOption = Device.AUTO,
    teacher: TeacherOption = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run code from the teacher's repository, if the manifest asks for it.",
        ),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Check files, manifest, card and every row of a dataset.

    With --recompute, run the teacher again on random rows and compare. One line per problem goes to stdout, and the exit status is 1 if
    there is any. Notes, which are not problems, go to stderr.

    Anyone who can change a file can also change its hash. Even so, verify without the teacher finds: a manifest that contradicts itself;
    values that break an invariant of the schema; rows, chunks or documents that are missing, repeated or out of order by offsets and
    counts; ids that are not the hash of their text; a card that loads something else, or states other types, sizes or licences.

    With --recompute, it also finds, in the recomputed rows: values that satisfy every invariant but are not the teacher's; tokens that do
    not match the text; draws or completions that do not match the seed; values computed in another dtype.

    It does not find: rows that were forged with these checks in mind and are not recomputed; documents that were left out, replaced or
    exchanged with all counts adjusted; differences within a column's rounding, or below the noise of 16 bits; a wrong completion_mask of
    a chat, whose messages are not in the dataset; texts that differ from the corpus; wrong texts without --recompute, if ids are not their
    hashes. It cannot check plain statements: device, versions, seconds, license, verification.json, release.json. The owner may edit the
    card below its head, so a difference there is a note.
    """
    from builder.dataset.manifest import read_manifest
    from builder.dataset.printable import counted, one_line
    from builder.verify.verify import record_recomputation
    from builder.verify.verify import verify as run

    directory = local_directory(dataset, revision, *FILES)
    torch_device = "cpu"
    if recompute:
        quiet_libraries()
        torch_device = choose_device(device)
    with progress("verify", read_manifest(directory)["totals"]["tokens"], is_quiet=quiet) as bar:
        report = run(
            directory,
            recompute=recompute,
            seed=seed,
            device=torch_device,
            teacher_path=teacher,
            progress=bar.update,
            trust_remote_code=trust_remote_code,
            told=bar.tell,
        )
    for problem in report.problems:
        say(one_line(problem))
    for note in report.notices:
        say(f"note: {one_line(note)}", to_stderr=True)
    if recomputed := report.recomputed:
        say(_recomputed(recomputed))
    if report.problems:
        say(f"{dataset}: {counted(len(report.problems), 'problem')}")
        raise typer.Exit(1)
    if record and recomputed:
        record_recomputation(directory, report, torch_device)
    say(
        f"{dataset}: {counted(report.files, 'file')}, {counted(report.rows, 'row')}, "
        f"{counted(report.tokens, 'token')}, no problems"
    )
    at_revision = f', revision="{revision}"' if revision else ""
    say(f'next: load_dataset("{dataset}"{at_revision}, split="train").with_format("torch")')


def _recomputed(found: dict[str, Any]) -> str:
    """What the teacher said when it was run again, in a line, with what is allowed."""
    from builder.dataset.printable import counted

    limit = found["limit"]
    largest, mean = f"max {found['max_abs_error']:.2g}", f"mean {found['mean_abs_error']:.2g}"
    if noise := found.get("floor"):
        largest += (
            f" (noise floor {noise['max_abs_error']:.2g}, limit {limit['max_beyond_rounding']:.2g})"
        )
        mean += f" (noise floor {noise['mean_abs_error']:.2g}, limit {limit['mean_abs_error']:.2g})"
    else:
        mean += f", beyond float16 rounding {found['max_beyond_rounding']:.2g} (limit {limit['max_beyond_rounding']:.2g})"
    drawn = ""
    if "draws_agree" in found:
        drawn = f"; {found['draws_agree']:.2%} of draws agree (limit {limit['draws_agree']:.1%})"
    return (
        f"recomputed {counted(found['rows'], 'row')}, {counted(found['tokens'], 'token')} (seed {found['seed']}): "
        f"|Δ log-prob| {largest}, {mean}; top-1 agreement {found['top1_agreement']:.2%}{drawn}; "
        f"NLL stored {found['nll_stored']:.4f}, recomputed {found['nll_recomputed']:.4f}"
    )
