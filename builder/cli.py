"""The command line: parse, call one function, print. Data goes to stdout, progress and notices to stderr.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from builder.cli_plan import plan as plan_command

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Capture a teacher's next-token distributions as a Hugging Face dataset, verify and read them.",
    epilog="Example: logit-dataset build dataset_cards/smollm2-135m-python-docs/recipe.toml --output out/python-docs",
)

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 and the number of the signal, as shells have it."""


class Device(StrEnum):
    """Where the teacher runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Format(StrEnum):
    """How `info` prints."""

    HUMAN = "human"
    JSON = "json"


DeviceOption = Annotated[
    Device, typer.Option(help="Where the teacher runs; auto takes a GPU if there is one.")
]
TeacherOption = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        help="The teacher's directory or GGUF file, where the recipe names a local one.",
    ),
]


DatasetArgument = Annotated[
    str, typer.Argument(help="Directory of a finished dataset, or ORG/NAME on the Hub.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Tag, branch or commit, of a dataset on the Hub.")
]


TagOption = Annotated[
    str | None, typer.Option(help="A version like v1.2.3; the next one by default.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
MessageOption = Annotated[str | None, typer.Option(help="A line for the changelog.")]
RecomputeOption = Annotated[
    int,
    typer.Option(
        "--recompute",
        min=0,
        help="Random rows to run through the teacher again before publishing, unless a result is recorded.",
    ),
]


@app.command(epilog="Example: logit-dataset build recipe.toml --output out/mine --dry-run")
def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as dataset_cards/*/recipe.toml.")],
    output: Annotated[
        Path, typer.Option(help="Directory of the dataset. An unfinished build in it goes on.")
    ],
    device: DeviceOption = Device.AUTO,
    max_shards: Annotated[
        int | None, typer.Option(min=0, help="Stop after this many new shards.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Partitions that are built at the same time, by Ray."),
    ] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster for the workers, such as auto; this machine by default."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs that each worker has to itself.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Show the resolved recipe and an estimate; write nothing.")
    ] = False,
    publish_to: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Send shards there while they are built, go on with what is there, and publish in the end.",
        ),
    ] = None,
    discard_local: Annotated[
        bool,
        typer.Option(
            "--discard-local",
            help="Delete each shard here once it is there: four stay at most, and one more for each further worker.",
        ),
    ] = False,
    tag: TagOption = None,
    private: PrivateOption = False,
    message: MessageOption = None,
    recompute: RecomputeOption = 5,
) -> None:
    """Build a dataset from a recipe, or go on with an unfinished one."""
    from builder.recipe import load_recipe

    if not publish_to and (discard_local or tag or private or message):
        raise ValueError(
            "--discard-local, --tag, --private and --message mean something only with --publish-to"
        )
    loaded = load_recipe(recipe)
    base = recipe.parent
    _quiet_libraries()
    with_ray = workers > 1 or ray_address is not None or gpus_per_worker is not None
    # Where the workers are, there may be GPUs though there is none here.
    torch_device = _torch_device(Device.AUTO if with_ray and device is Device.CUDA else device)
    if dry_run:
        from builder.estimate import estimate

        print(_format_estimate(estimate(loaded, base, device=torch_device)))
        return
    from builder.build import build as run
    from builder.delivery import deliver, local_teacher
    from builder.worker import Pool

    with _progress("build", loaded.corpus.max_tokens) as bar:
        pool = None
        if with_ray:
            pool = Pool(
                workers=workers,
                device=device.value,
                address=ray_address,
                gpus_per_worker=gpus_per_worker,
                told=bar.set_postfix_str,
            )
        options: dict[str, Any] = {
            "device": torch_device,
            "pool": pool,
            "max_shards": max_shards,
            "progress": bar.update,
            "found": partial(_start_from, bar),
            "notice": _notice,
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
        print(
            f"stopped early after {result.shards_built} new shards; run the same command to go on"
        )
        return
    totals = result.manifest["totals"]
    print(
        f"{output}: {result.status}, {totals['tokens']:,} tokens in {totals['rows']:,} rows, "
        f"{totals['bytes_per_token']} bytes a token"
    )
    if publish_to and published:
        _say_published(publish_to, *published)
        return
    following = [_program(), "verify", str(output), "--recompute", "5"]
    if teacher := local_teacher(loaded, base):
        following += ["--teacher", str(teacher)]
    print(f"next: {shlex.join(following)}")


app.command(
    "plan",
    epilog="Example: logit-dataset plan recipe.toml --tokens 1e12 --gpu h100 --parameters 8e9 --workers 64",
)(plan_command)


@app.command(epilog="Example: logit-dataset verify ORG/NAME --revision v1.0.0 --recompute 20")
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
    from builder.manifest import read_manifest
    from builder.verify import record_recomputation
    from builder.verify import verify as run

    directory = _local(dataset, revision, "data/*.parquet")
    torch_device = "cpu"
    if recompute:
        _quiet_libraries()
        torch_device = _torch_device(device)
    with _progress("verify", read_manifest(directory)["totals"]["tokens"]) as bar:
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


@app.command(epilog="Example: logit-dataset info ORG/NAME --revision v1.0.0")
def info(
    dataset: DatasetArgument,
    revision: RevisionOption = None,
    format: Annotated[
        Format, typer.Option(help="For a person, or JSON for a program.")
    ] = Format.HUMAN,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Show this row's tokens and what the teacher expected."),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(min=0, help="Show the teacher's alternatives at this position of the row."),
    ] = None,
    teacher: TeacherOption = None,
) -> None:
    """Say what a dataset is, or show a row with the teacher's alternatives."""
    from builder import info as information
    from builder.lookup import file_of_row

    directory = _local(dataset, revision)
    if row is not None:
        if format is Format.JSON:
            raise ValueError("--format json prints the summary; rows are read with load_dataset")
        _quiet_libraries()
        directory = _local(dataset, revision, file_of_row(directory, row)[0])
        if position is None:
            print(information.describe_row(directory, row, teacher_path=teacher))
        else:
            found = information.alternatives(directory, row, position, teacher_path=teacher)
            print(information.describe_position(found))
    elif position is not None:
        raise ValueError("--position needs --row")
    elif format is Format.JSON:
        import json

        print(json.dumps(information.summarize(directory), indent=1, ensure_ascii=False))
    else:
        print(information.describe(directory))


@app.command(epilog="Example: logit-dataset card out/mine")
def card(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished dataset.")],
) -> None:
    """Write the card of a finished dataset and its pictures again."""
    from builder.card import read_release, write_card
    from builder.manifest import read_manifest

    write_card(directory, read_manifest(directory), release=read_release(directory))
    print(f"{directory}/README.md")


@app.command(epilog="Example: logit-dataset publish ORG/NAME out/mine --tag v1.0.0 --dry-run")
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
        bool, typer.Option("--dry-run", help="List files, bytes and the card; change nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Publish a finished dataset as a tagged version, or go on with that."""
    from builder import hub, release

    _quiet_libraries()
    plan = release.prepare(
        name, directory, tag=tag, private=private, message=message, notice=_notice
    )
    if dry_run:
        hub.check(plan, recompute=0)
        print(release.describe(plan, with_card=True))
        return
    if not yes and not plan.is_published and sys.stdin.isatty():
        print(release.describe(plan), file=sys.stderr)
        if not typer.confirm(f"Publish {name} {plan.version.tag}?", err=True):
            raise typer.Exit(1)
    torch_device = _torch_device(device) if recompute else "cpu"
    with _progress("verify", plan.manifest["totals"]["tokens"]) as bar:
        commit = hub.publish(
            plan,
            recompute=recompute,
            device=torch_device,
            teacher_path=teacher,
            notice=_notice,
            progress=bar.update,
        )
    _say_published(name, plan.version.tag, commit, not plan.is_published)


def main() -> None:
    """Run a command. A failure is one line on stderr, and exit status 1, 2 for a wrong command line, or 130 after Ctrl-C."""
    try:
        # What this returns is the status of a typer.Exit, which typer also makes of Ctrl-C.
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except BrokenPipeError:  # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if os.environ.get("LOGIT_DATASET_TRACEBACK"):
            raise
        print(f"error: {' '.join(_explain(error).split())}", file=sys.stderr)
        status = getattr(error, "exit_code", 1)
    if status == INTERRUPTED:
        print(
            "interrupted: finished shards are safe; run the same command to go on", file=sys.stderr
        )
    sys.exit(status)


def _explain(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        command = (
            context.command_path if (context := getattr(error, "ctx", None)) else "logit-dataset"
        )
        return f"{error.format_message().rstrip('.')}; see {command} --help"
    if isinstance(error, OSError) and error.errno:
        from builder.state import DISK_FULL

        if error.errno in DISK_FULL:
            return (
                f"cannot write ({os.strerror(error.errno)}); finished shards are safe: make room, and run the same "
                "command to go on"
            )
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (not expected: LOGIT_DATASET_TRACEBACK=1 shows where it comes from)"


def _local(dataset: str, revision: str | None, *files: str) -> Path:
    """The directory of a dataset; of one on the Hub, what describes it is fetched, and these files."""
    if Path(dataset).exists():
        if revision is not None:
            raise ValueError(f"--revision is for datasets on the Hub, but {dataset} is a directory")
        return Path(dataset)
    from builder.remote import REPO_ID, fetch

    if not REPO_ID.fullmatch(dataset):
        return Path(dataset)  # and let the command say that it is not there
    _quiet_libraries()
    return fetch(dataset, revision or "main", *files)


def _say_published(name: str, tag: str, commit: str, is_new: bool) -> None:
    print(f"{name} {tag} {'is published' if is_new else 'was published already'}, commit {commit}")
    print(f'next: load_dataset("{name}", revision="{tag}", split="train")')


def _notice(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Any]:
    """A bar with tokens/s and ETA on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(
        desc=label, total=total, unit="tok", unit_scale=True, disable=None, leave=False
    ) as bar:
        yield bar


def _start_from(bar: Any, tokens: int) -> None:
    """Count tokens as done before the bar began, so that rate and ETA are those of this run."""
    if not bar.disable:
        bar.initial += tokens
        bar.n += tokens
        bar.refresh()


def _program() -> str:
    """How to call this program again: by its name, or as it was called where the name alone is not found."""
    called = Path(sys.argv[0])
    if called.name != "logit-dataset" or shutil.which(called.name):
        return "logit-dataset"
    return str(called)


def _torch_device(device: Device) -> str:
    import torch

    if device is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.CUDA and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return device.value


def _quiet_libraries() -> None:
    """Leave stderr to our own messages and bars."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import datasets
    import huggingface_hub
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Retries are announced in two lines each, which name addresses that are signed.
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.utils.logging.disable_progress_bar()


def _format_estimate(estimate: Any) -> str:
    import json

    def known(value: float | None, text: str) -> str:
        return "unknown" if value is None else text

    about = "at most" if estimate.is_most else "about"
    tokens, size, seconds = estimate.tokens, estimate.bytes, estimate.seconds
    hours = None if seconds is None else seconds / 3600
    return "\n".join(
        [
            json.dumps(estimate.plan, indent=1, ensure_ascii=False),
            f"tokens  {known(tokens, f'{about} {tokens or 0:,}')}",
            f"disk    {known(size, f'{about} {(size or 0) / 1e6:,.1f} MB')}",
            f"time    {known(hours, f'about {(hours or 0) * 60:,.1f} minutes on {estimate.device}')}",
            "nothing was written; run the command without --dry-run to build",
        ]
    )


if __name__ == "__main__":
    main()
