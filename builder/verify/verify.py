"""A finished dataset → everything that is wrong with it.

In:   the directory of a dataset.
Out:  one line for each problem, naming file and row. None means: the files are those of the manifest, every row obeys the
      invariants of the schema, and (if asked) random rows are what the teacher says when it is run again.

Cost: about 1 M tokens/s for hashes and invariants; recomputing costs what capturing cost.
"""

import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.card.card import VERIFICATION, read_release, write_card
from builder.dataset.manifest import (
    ShardRecord,
    data_digest,
    environment,
    read_manifest,
    records_of,
    write_json,
)
from builder.dataset.shards import file_sha256, footer_sha256
from builder.verify.rows import Report, check_shard


def verify(
    directory: Path,
    *,
    recompute: int = 0,
    device: str = "cpu",
    teacher_path: Path | None = None,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    elsewhere: Mapping[str, Callable[[], Any]] | None = None,
) -> Report:
    """Check a dataset against its manifest, the schema's invariants and, on request, its teacher.

    Args:
        directory: of a finished dataset.
        recompute: number of random rows to run through the teacher again.
        device: where to recompute.
        teacher_path: directory or GGUF file of the teacher, where the recipe names a local one.
        seed: chooses the random rows; a new one each time, if None.
        progress: told of checked tokens.
        elsewhere: opens data files that are not in the directory, of which only rows to recompute are read: somebody else
            compares their hashes, and has checked all of their rows when they were there.

    Raises:
        ValueError: there is no readable manifest, or the teacher at hand is not the dataset's.
    """
    manifest = read_manifest(directory)
    records = records_of(manifest)
    elsewhere = elsewhere or {}
    here = [record for record in records if record.file not in elsewhere]
    report = Report(files=len(records))
    _check_files(directory, records, here, report)
    _check_card(directory, manifest, report)
    for record in here:
        if (directory / record.file).exists():
            check_shard(directory, record, manifest, report, progress)
    if recompute and not report.problems:
        from builder.verify.recompute import recompute_rows

        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        report.recomputed, problems = recompute_rows(
            directory,
            manifest,
            records,
            count=recompute,
            seed=seed,
            device=device,
            teacher_path=teacher_path,
            elsewhere=elsewhere,
        )
        report.problems += problems
    return report


def record_recomputation(directory: Path, report: Report, device: str) -> None:
    """Keep what recomputing found, with date, hardware and libraries, in `verification.json`, and show it in the card."""
    manifest = read_manifest(directory)
    values = {
        "data": data_digest(manifest),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(device),
        **(report.recomputed or {}),
    }
    write_json(directory / VERIFICATION, values)
    write_card(directory, manifest, release=read_release(directory))


def _check_files(
    directory: Path, records: list[ShardRecord], here: list[ShardRecord], report: Report
) -> None:
    listed = {record.file for record in records}
    for path in sorted((directory / "data").glob("*.parquet")):
        if f"data/{path.name}" not in listed:
            report.problems.append(f"data/{path.name}: is not in the manifest")
    for record in here:
        path = directory / record.file
        if not path.exists():
            report.problems.append(f"{record.file}: is missing")
        elif path.stat().st_size != record.bytes:
            report.problems.append(
                f"{record.file}: has {path.stat().st_size:,} bytes, the manifest says {record.bytes:,}"
            )
        elif file_sha256(path) != record.sha256:
            report.problems.append(
                f"{record.file}: its content does not have the hash in the manifest"
            )
        elif record.footer_sha256 and footer_sha256(path) != record.footer_sha256:
            report.problems.append(
                f"{record.file}: its footer does not have the hash in the manifest"
            )


def _check_card(directory: Path, manifest: dict[str, Any], report: Report) -> None:
    """The counts in the card's YAML: `load_dataset` refuses a dataset where they are wrong."""
    import yaml

    path = directory / "README.md"
    try:
        head = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        found = head["dataset_info"]["splits"][0]["num_examples"]
    except (OSError, LookupError, TypeError, yaml.YAMLError):
        report.problems.append(
            "README.md: is missing or has no dataset_info, so tensors will not load"
        )
        return
    if found != manifest["totals"]["rows"]:
        report.problems.append(
            f"README.md: says {found} rows, the manifest {manifest['totals']['rows']}"
        )
