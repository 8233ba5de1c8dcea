"""A finished build → a tagged version on the Hub.

How:  1. The build is verified, and random rows are run through the teacher again, or were before.
      2. Its files go to a branch of their own, in commits of FILES_PER_COMMIT. What has arrived is never sent again.
      3. The branch is read back: size and hash of every file, and rows through stock `load_dataset`.
      4. One commit copies it to main, on the server and only if main is still what it was; one tag names that commit.

      Until step 4, users see the former version. Killed anywhere, the same command resumes; a tag is never moved.

      Data files that are not in the directory any more, but on the branch or in the former version just as the manifest says, need
      not be sent. They were verified before they were (`outbox`); rows to recompute and to read back come from the Hub.
"""

import hashlib
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

from builder.card.records import read_verification
from builder.dataset.manifest import ShardRecord, records_of
from builder.dataset.printable import as_size, counted
from builder.dataset.shards import atomic_file
from builder.hub.calls import Notice
from builder.hub.limits import FILES_PER_COMMIT
from builder.hub.release import Plan, stale
from builder.hub.repository import LocalFile, Tree, holds
from builder.verify.verify import record_recomputation, verify
from logit_dataset.schema import TRAIN, splits_of

READ_BACK_BYTES = 2 * 10**9
"""Of the data files whose rows are read back and compared; beyond it, a choice of files. All hashes are compared."""


def publish(
    plan: Plan,
    *,
    recompute: int = 5,
    device: str = "cpu",
    teacher_path: Path | None = None,
    notice: Notice,
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Carry out a plan of `prepare`. Return the commit behind the tag.

    Args:
        plan: from `prepare`.
        recompute: number of random rows for the re-scoring pass, unless a result is already recorded.
        device: a torch device for the re-scoring pass.
        teacher_path: directory or GGUF file of the teacher, if the recipe names a local one.
        notice: called with one line per step.
        progress: called with numbers of verified tokens.

    Raises:
        ValueError: the dataset has problems, the Hub refuses or fails, or somebody else published first. Unless the message says
            otherwise, users see nothing of it, and the same command resumes.
    """
    repo, tag = plan.repo, plan.version.tag
    repo.check_login()
    if plan.is_published:
        _clean_up(plan, notice)
        return repo.tagged(tag)
    check(plan, recompute=recompute, device=device, teacher_path=teacher_path, progress=progress)
    files = _write_release(plan)
    try:
        repo.create(private=plan.private)
        main = plan.main or repo.head("main")
        work = _upload(plan, files, main, notice)
        notice(f"reading {len(files)} files back")
        try:
            _read_back(plan, files, work)
        except ValueError as error:
            if plan.elsewhere():  # the branch holds what is nowhere else
                raise ValueError(_how_to_mend(plan, error)) from None
            with suppress(ValueError):
                repo.delete_branch(plan.branch)  # to be gathered anew; what is whole stays sent
            raise
        main = _put_on_main(plan, files, main, work)
    except ValueError as error:
        raise ValueError(
            f"{error}. Nothing was published; the same command resumes from here"
        ) from None
    try:
        if not _is_right(repo.tree(main), files):
            raise ValueError(f"commit {main[:12]} does not hold what was sent")
        repo.tag(tag, main, message=_title(plan))
    except ValueError as error:
        raise ValueError(
            f"{error}. main of {repo.id} was changed, but is not tagged as {tag}; the same command resumes from here"
        ) from None
    _clean_up(plan, notice)
    return main


def check(
    plan: Plan,
    *,
    recompute: int,
    device: str = "cpu",
    teacher_path: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Verify the dataset and record the re-scoring pass over random rows, unless one is already recorded.

    Raises:
        ValueError: the dataset has problems; the message names the first ones.
    """
    known = read_verification(plan.directory, plan.manifest)
    count = 0 if known and known["rows"] >= min(recompute, plan.manifest["totals"]["rows"]) else recompute  # fmt: skip
    try:
        report = verify(
            plan.directory,
            recompute=count,
            device=device,
            teacher_path=teacher_path,
            progress=progress,
            trust_remote_code=True,  # as when it was built
            elsewhere={
                path: partial(plan.repo.open, path, commit)
                for path, commit in plan.elsewhere().items()
            },
        )
    except (httpx2.HTTPError, pa.ArrowException) as error:
        found = f"rows to recompute cannot be read from {plan.repo.id} ({type(error).__name__})"
        raise ValueError(_how_to_mend(plan, found)) from None
    if report.problems:
        more = f" (and {len(report.problems) - 3} more)" if len(report.problems) > 3 else ""
        raise ValueError(
            f"{plan.directory} is not published because it has problems: {'; '.join(report.problems[:3])}{more}"
        )
    if report.recomputed:
        record_recomputation(plan.directory, report, device)


def _how_to_mend(plan: Plan, problem: object) -> str:
    return f"{problem}; if this persists, delete the damaged files from branch {plan.branch}, and resume the build in an empty directory to rebuild them"


def _clean_up(plan: Plan, notice: Notice) -> None:
    try:
        plan.repo.delete_branch(plan.branch)
    except ValueError as error:
        notice(
            f"branch {plan.branch} of {plan.repo.id} could not be deleted, which does no harm: {error}"
        )


def _write_release(plan: Plan) -> dict[str, LocalFile]:
    """Make the directory what the repository will be, so that both hold the same card."""
    files = plan.files()
    for path, file in files.items():
        if isinstance(file.content, bytes):
            (plan.directory / path).parent.mkdir(exist_ok=True)
            with atomic_file(plan.directory / path) as sink:
                sink.write(file.content)
    return files


def _upload(plan: Plan, files: dict[str, LocalFile], main: str, notice: Notice) -> str:
    """Bring the working branch to hold the files: its commit.

    huggingface_hub hashes a file as it sends it, so one that has changed since it was verified is found when read back.
    """
    repo, branch = plan.repo, plan.branch
    head = repo.create_branch(branch, main)
    there = repo.tree(head)
    gone = stale(there, files)
    missing = [path for path, file in files.items() if not holds(there, path, file)]
    size = sum(files[path].size for path in missing)
    notice(
        f"sending {len(missing):,} of {counted(len(files), 'file')}, {as_size(size)}, to {repo.id}"
    )
    for start in range(0, max(len(missing), 1 if gone else 0), FILES_PER_COMMIT):
        batch = missing[start : start + FILES_PER_COMMIT]
        deletions = gone if start == 0 else []

        def landed(tree: Tree, batch: list[str] = batch, deletions: list[str] = deletions) -> bool:
            return all(holds(tree, path, files[path]) for path in batch) and not (
                tree.keys() & set(deletions)
            )

        head = repo.commit(
            branch,
            [
                *(CommitOperationAdd(path, files[path].content) for path in batch),
                *(CommitOperationDelete(path, is_folder=False) for path in deletions),
            ],
            message=f"Files of {plan.version.tag}",
            parent=head,
            landed=landed,
        )
        if (sent := start + len(batch)) < len(missing):
            sent_size = as_size(sum(files[path].size for path in missing[:sent]))
            notice(
                f"sent {sent:,} of {counted(len(missing), 'file')}, {sent_size} of {as_size(size)}"
            )
    return head


def _put_on_main(plan: Plan, files: dict[str, LocalFile], main: str, work: str) -> str:
    """One commit on main that makes it hold what the working branch holds: its hash.

    Files are copied on the server, from the commit that was read back; so nothing is sent twice, and what a file on
    this machine has become in the meantime does not matter.
    """
    there = plan.repo.tree(main)
    if _is_right(there, files):
        return main
    return plan.repo.commit(
        "main",
        [
            *(
                CommitOperationCopy(path, path, src_revision=work)
                for path, file in files.items()
                if not holds(there, path, file)
            ),
            *(CommitOperationDelete(path, is_folder=False) for path in stale(there, files)),
        ],
        message=_title(plan),
        parent=main,
        landed=lambda tree: _is_right(tree, files),
    )


def _is_right(tree: Tree, files: dict[str, LocalFile]) -> bool:
    return not stale(tree, files) and all(holds(tree, p, file) for p, file in files.items())


def _title(plan: Plan) -> str:
    return f"{plan.version.tag}: {'; '.join(plan.release['changelog'][0]['changes'])[:200]}"


def _read_back(plan: Plan, files: dict[str, LocalFile], commit: str) -> None:
    """Compare what has arrived with what was sent: every size and hash, and rows as any user would load them.

    Raises:
        ValueError: something differs; names the file.
    """
    there = plan.repo.tree(commit)
    wrong = [path for path, file in files.items() if not holds(there, path, file)]
    if wrong or (wrong := stale(there, files)):
        raise ValueError(f"{wrong[0]} on the Hub differs from what was sent")
    try:
        _compare_rows(plan, commit)
    except (OSError, httpx2.HTTPError, pa.ArrowException, DatasetGenerationError) as error:
        raise ValueError(
            f"load_dataset cannot read what was sent to {plan.repo.id} ({type(error).__name__})"
        ) from None


def _compare_rows(plan: Plan, commit: str) -> None:
    for split in splits_of(plan.manifest):
        records = [r for r in records_of(plan.manifest) if (r.split or TRAIN) == split]
        _compare_split(plan, commit, split, records)


def _compare_split(plan: Plan, commit: str, split: str, records: list[ShardRecord]) -> None:
    dataset = load_dataset(plan.repo.id, revision=commit, split=split, streaming=True)
    dataset = dataset.with_format("arrow")
    if dataset.num_shards != len(records):
        raise ValueError(
            f"load_dataset finds {dataset.num_shards} files of {split}, expected {len(records)}"
        )
    elsewhere = plan.elsewhere()
    for index in _chosen(records):
        record = records[index]
        if record.file in elsewhere:
            with plan.repo.open(record.file, commit) as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != record.sha256:
                    raise ValueError(f"{record.file} has other bytes on the Hub than were sent")
        opened = (
            plan.repo.open(record.file, commit)
            if record.file in elsewhere
            else plan.directory / record.file
        )
        rows = dataset.shard(len(records), index).iter(batch_size=64)
        expected = pq.ParquetFile(opened, page_checksum_verification=True).iter_batches(
            batch_size=64
        )
        if _digests(rows) != _digests(pa.Table.from_batches([batch]) for batch in expected):
            raise ValueError(f"{record.file} has other rows on the Hub than were sent")


def _chosen(records: list[Any]) -> list[int]:
    """Indices of files to read back: all, or the first, the last and random others of READ_BACK_BYTES in total."""
    order = list(range(1, len(records) - 1))
    random.shuffle(order)
    chosen: list[int] = []
    size = 0
    for index in dict.fromkeys([0, len(records) - 1, *order]):
        size += records[index].bytes
        if chosen and size > READ_BACK_BYTES:
            break
        chosen.append(index)
    return sorted(chosen)


def _digests(tables: Iterable[pa.Table]) -> dict[str, str]:
    """A hash of each column's values, however they are cut into tables and whether or not Arrow knows them as arrays."""
    digests: dict[str, Any] = {}

    def add(name: str, content: bytes) -> None:
        digests.setdefault(name, hashlib.sha256()).update(content)

    for table in tables:
        for name in table.column_names:
            column = table[name].combine_chunks()
            if isinstance(column, pa.ExtensionArray):
                column = column.storage
            while pa.types.is_list(column.type):
                name += " length"
                add(name, column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
            if pa.types.is_string(column.type):
                for value in column.to_pylist():
                    add(name, f"{len(value)} {value}".encode())
            else:
                add(f"{name} {column.type}", column.to_numpy(zero_copy_only=False).tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}
