"""A finished dataset → everything that is wrong with it.

In:   the directory of a dataset, which may come from anybody.
Out:  problems and notices, one line each, naming file and row. No problem means: the manifest agrees with itself, the files are those of
      the manifest, every row obeys the invariants of the schema, rows are whole documents in their order, the card loads what the
      manifest says, and (if asked) random rows are what the teacher says when it is run again.

Limits: whoever can change a file can make hashes fit. What then is found only with the teacher, or not at all, stands in the command's
      help; each kind is an attack in tests/verify/test_attacks.py.

Cost: about 1 M tokens/s for hashes and invariants; recomputing costs what capturing cost, in 16 bits four times that.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from builder.card.card import write_card
from builder.card.charts import Curves, curves_of
from builder.card.licences import licences
from builder.card.records import VERIFICATION, read_curves, read_release
from builder.dataset.head_file import describe, mean_divergence, open_head
from builder.dataset.manifest import (
    ShardRecord,
    data_digest,
    environment,
    read_manifest,
    records_of,
    write_json,
)
from builder.dataset.printable import counted
from builder.dataset.shards import file_sha256, footer_sha256
from builder.verify.card import check_card
from builder.verify.documents import Documents
from builder.verify.manifest import check_manifest, is_of_later_schema
from builder.verify.noise import MAX_FLOAT32_DIVERGENCE
from builder.verify.rows import Report, check_shard
from logit_dataset.files import first_line
from logit_dataset.schema import HEAD_FILE

MAX_ROUNDED_DIVERGENCE = 0.02
"""Mean KL in nats from stored distributions to those of the published head, where the teacher's own logits were rounded to 16 bits."""


def verify(
    directory: Path,
    *,
    recompute: int = 0,
    device: str = "cpu",
    teacher_path: Path | None = None,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    elsewhere: Mapping[str, Callable[[], Any]] | None = None,
    trust_remote_code: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check a dataset against its manifest, the schema's invariants and, on request, its teacher.

    Args:
        directory: of a finished dataset.
        recompute: number of random rows for the re-scoring pass through the teacher.
        device: a torch device for the re-scoring pass.
        teacher_path: directory or GGUF file of the teacher, if the recipe names a local one.
        seed: selects the random rows; None for new ones each time.
        progress: called with numbers of checked tokens.
        elsewhere: opens data files that are not in the directory. Only rows to recompute are read from them: the caller compares their
            hashes, and checked all of their rows while they were local.
        trust_remote_code: whether code from the teacher's repository may run, if the manifest asks for it.
        told: called with a description of work other than checking tokens.

    Raises:
        ValueError: there is no readable manifest, or the teacher at hand is not the dataset's.
    """
    manifest = read_manifest(directory)
    records = records_of(manifest)
    elsewhere = elsewhere or {}
    here = [record for record in records if record.file not in elsewhere]
    report = Report(files=len(records))
    report.problems += check_manifest(manifest, records)
    if is_of_later_schema(manifest):
        report.notices.append(
            f"manifest.json: is of schema {manifest['schema_version']}, later than this program's, so that fingerprints were not compared"
        )
    _check_files(directory, records, here, report)
    curves = _check_rows(directory, manifest, here, report, progress)
    if "teacher_head" in manifest:
        report.problems += (
            f"{HEAD_FILE}: {problem}"
            for problem in _check_head(directory, manifest, [] if report.problems else here)
        )
    if len(here) < len(records):
        curves = read_curves(directory, manifest)
    check_card(directory, manifest, curves, report)
    if recompute and not report.problems:
        from builder.verify.recompute import recompute_rows

        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        told(f"recomputing {counted(min(recompute, report.rows), 'row')}")
        report.recomputed, problems = recompute_rows(
            directory,
            manifest,
            records,
            count=recompute,
            seed=seed,
            device=device,
            teacher_path=teacher_path,
            elsewhere=elsewhere,
            trust_remote_code=trust_remote_code,
        )
        report.problems += problems
        report.notices += report.recomputed.pop("notices")
    return report


def record_recomputation(directory: Path, report: Report, device: str) -> None:
    """Store the result of the re-scoring pass in `verification.json`, with date, hardware and libraries, and show it in the card."""
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
    for record in {record.file: record for record in here}.values():
        path = directory / record.file
        if not path.is_file():
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


def _check_head(
    directory: Path, manifest: dict[str, Any], records: list[ShardRecord]
) -> Iterator[str]:
    """Whether the teacher's head is the manifest's, and makes the stored distributions of the stored hidden states in some data files."""
    record, teacher = manifest["teacher_head"], manifest["teacher"]
    if record["license"] != (licence := licences(manifest)["teacher"]):
        yield f"is under {record['license']}, the teacher under {licence}"
    try:
        head = open_head(directory, record)
    except FileNotFoundError:
        yield "is missing"
        return
    except (ValueError, OSError) as error:
        yield first_line(error)
        return
    found = {**describe(head), "size": (head.vocab_size, head.hidden_size)}
    said = {**record, "size": (teacher["vocab_size"], teacher["hidden_size"])}
    for name, value in found.items():
        if said[name] != value:
            yield f"its {name} is {value}, the manifest says {said[name]}"
            return
    divergence = mean_divergence(head, [directory / one.file for one in records])
    is_exact = "float32" in (teacher.get("head_dtype"), teacher["dtype"])
    limit = MAX_FLOAT32_DIVERGENCE if is_exact else MAX_ROUNDED_DIVERGENCE
    if not divergence <= limit:
        yield f"what it makes of stored hidden states is {divergence:.3g} nats from what is stored, more than {limit:g}"


def _check_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    report: Report,
    progress: Callable[[int], None],
) -> Curves | None:
    """Check the rows of all files here: what the card's pictures show of them, if nothing is wrong."""
    documents, before = Documents(manifest), len(report.problems)
    readable = []
    for record in records:
        if not (directory / record.file).is_file():
            documents.skip()
        elif check_shard(directory, record, manifest, report, progress, documents):
            readable.append(record)
    report.problems += documents.finish()
    if notice := documents.repeated(directory, readable):
        report.notices.append(notice)
    if len(report.problems) > before or len(readable) < len(records):
        return None
    return curves_of([report.measured]) if records else None
