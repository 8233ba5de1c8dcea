"""A directory or a Hub repository → a LogitDataset that is known to be what the trainer asked for.

In:   a local build, a downloaded version, or the name of a repository with a revision.
Out:  a LogitDataset. Its `batches` read row groups straight from Parquet, from the disk or (streaming) from the Hub.

How:  the manifest is read and compared with what is required; then every file's footer (128 kB, sixteen at a time), so that a file that is
      missing, cut off, of another schema or of another build is found at once, and not at some step of the training. (`files` says what
      is checked, and when.)
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logit_dataset.batches import Batches
from logit_dataset.files import (
    Commit,
    DifferentFile,
    Directory,
    FileRecord,
    Files,
    Source,
    check_footer,
    first_line,
    read_footer,
    row_groups,
)
from logit_dataset.rows import Ends, Projection, RowGroup, Rows, read_rows, token_columns
from logit_dataset.schema import SCHEMA_VERSION, TRAIN, Layout
from logit_dataset.selection import chosen_rows, fingerprint_of, groups_of, row_numbers
from logit_dataset.tokenizer_check import check_tokenizer

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LogitDataset:
    """A dataset that passed the checks of `load_logits`, which makes it."""

    manifest: dict[str, Any]
    row_groups: tuple[RowGroup, ...]
    """Row groups of all files, in stored order."""
    columns: list[str]
    """Columns with values per token, all of which are in a batch."""
    files: Files
    split: str = TRAIN
    """The split to which the files belong."""
    projection: Projection | None = None
    prompt_targets: bool = False
    """Whether `target_ids` outside completions are kept."""
    selection: str | None = None
    """Fingerprint of the selected rows; None if all rows of the split are selected."""

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return (
            f"<{self.num_rows:,} rows, {self.num_tokens:,} tokens, {self.vocab_size:,} logits; "
            f"teacher {'@'.join(_teacher_names(self.manifest))}; {', '.join(self.columns)}>"
        )

    @property
    def layout(self) -> Layout:
        """The columns of the rows."""
        return Layout.of(self.manifest["recipe"], self.manifest["teacher"])

    @property
    def num_rows(self) -> int:
        """Number of rows; each is one sequence."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def num_tokens(self) -> int:
        """Number of positions in all rows."""
        return sum(group.num_tokens for group in self.row_groups)

    @property
    def vocab_size(self) -> int:
        """Number of logits that a student needs: the teacher's, or the projection's."""
        if self.projection:
            return self.projection.vocab_size
        return int(self.manifest["teacher"]["vocab_size"])

    def batches(
        self,
        *,
        batch_size: int,
        length: int | None = None,
        packed: bool = False,
        split_long: bool = False,
        seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
        int64_targets: bool = False,
    ) -> Batches:
        """Iterate over batches of `batch_size` rows, as tensors in stored types. `Batches` describes their contents.

        Args:
            batch_size: rows per batch.
            length: T of every batch; None pads to the longest row of each batch.
            packed: fill each row with several sequences, up to `length`.
            split_long: cut sequences longer than `length` into pieces; otherwise they are an error. The teacher saw the text before a piece,
                the student does not.
            seed: seed of the shuffle, 0 or more; each epoch has its own order. None keeps the stored order.
            rank: index of this process.
            world_size: number of processes. Each reads its own row groups, so the numbers of batches differ. Processes that synchronise
                must train for a fixed number of steps and start the next epoch independently (`while …: for batch in batches`). Don't add
                a loader that divides batches among processes, as accelerate's does: it would divide the batches of one rank.
            int64_targets: give `target_ids` in int64, as torch's cross-entropy requires.

        Raises:
            ValueError: an argument is out of range or contradicts another, or there are more processes than row groups.
        """
        return Batches(
            row_groups=self.row_groups,
            read=self.read,
            widest=self.layout.widest,
            identity={
                "fingerprint": self.manifest["fingerprint"],
                "projection": self.projection.fingerprint if self.projection else None,
                "prompt_targets": self.prompt_targets or None,  # as states of before have it
                "split": None if self.split == TRAIN else self.split,
                "selection": self.selection,
            },
            batch_size=batch_size,
            length=length,
            packed=packed,
            split_long=split_long,
            seed=seed,
            rank=rank,
            world_size=world_size,
            int64_targets=int64_targets,
        )

    def project(self, projection: Projection) -> "LogitDataset":
        """Return this dataset in a student's vocabulary."""
        return replace(self, projection=projection)

    def select(self, indices: Iterable[int]) -> "LogitDataset":
        """Return a dataset of some of the rows; this one does not change. Values, including targets, are those of the whole dataset.

        Rows stay in stored order, whatever the order of `indices`; `seed` shuffles them in `batches`. Row groups without a selected row are
        never read, and ranks share the remaining ones. A state saved with other rows is refused.

        Args:
            indices: row numbers from 0, in any order: a range, a list, or an array. Use `np.flatnonzero` for a mask.

        Raises:
            ValueError: there are no indices, one is negative or no row number, or one is repeated.
        """
        numbers = row_numbers(indices, self.num_rows)
        if len(numbers) == self.num_rows:
            return self
        groups = groups_of(
            numbers, self.row_groups, lambda group: self._read(group, ["input_ids"]).lengths_R
        )
        return replace(self, row_groups=groups, selection=fingerprint_of(groups))

    def token_counts(self) -> npt.NDArray[np.int64]:
        """Count how often each id of the teacher's vocabulary occurs in the texts, [V]. Only `input_ids` are read."""
        counts = np.zeros(self.manifest["teacher"]["vocab_size"], dtype=np.int64)
        for group in self.row_groups:
            rows = self._read(group, ["input_ids"])
            counts += np.bincount(rows.columns["input_ids"], minlength=len(counts))
        return counts

    def read(self, group: RowGroup) -> Rows:
        """Decode one row group and project it.

        Raises:
            ValueError: the file cannot be read, is damaged, or its values are inconsistent; the message names the file.
        """
        rows = self._read(group, self.columns)
        return self.projection(rows) if self.projection else rows

    def _read(self, group: RowGroup, columns: list[str]) -> Rows:
        try:
            rows = read_rows(
                self.files.open(group.file),
                group.index,
                columns,
                Ends.of(self.manifest),
                vocab_size=self.manifest["teacher"]["vocab_size"],
                prompt_targets=self.prompt_targets,
            )
            rows = rows if group.rows is None else chosen_rows(rows, group.rows)
            found = len(rows.lengths_R), int(rows.lengths_R.sum())
            if found != (group.num_rows, group.num_tokens):
                raise ValueError("it holds other numbers of rows and tokens than its footer says")
        except (pa.ArrowException, ValueError, OSError, http_error()) as error:
            raise ValueError(
                f"{group.file}, row group {group.index}: {first_line(error)}; verify the dataset"
            ) from error
        return rows


def load_logits(
    path_or_repo: str | Path,
    *,
    split: str = TRAIN,
    revision: str | None = None,
    streaming: bool = False,
    require_teacher: str | None = None,
    require_tokenizer: Any = None,
    require_vocab_size: int | None = None,
    prompt_targets: bool = False,
    check_hashes: bool | None = None,
) -> LogitDataset:
    """Open a logit dataset.

    Args:
        path_or_repo: directory of a dataset, or its name on the Hub.
        split: `train`, or `validation` for the held-out split, if there is one.
        revision: tag, branch or commit on the Hub; None: the main branch.
        streaming: read from the Hub while training. Otherwise the dataset is downloaded first.
        require_teacher: the teacher that you expect, as repository, name, commit, `repository@commit` or file hash.
        require_tokenizer: the tokenizer that you expect, as a fast tokenizer, the path of its tokenizer.json, or the SHA-256 of that
            file in a manifest. Prefer the path: the tokenizer that AutoTokenizer makes can differ from its file.
        require_vocab_size: the number of teacher logits that you expect.
        prompt_targets: for a dataset with completions, keep prompt tokens in `target_ids`, so that text_weight applies to them too.
            Distributions are learned for completions only, in any case.
        check_hashes: whether to read every local file now and compare its SHA-256 with the manifest. None: only files of older datasets,
            whose pages have no checksums. Hashing takes a second for 1.8 GB on one core, in every process that loads the dataset. Streamed
            files are not hashed.

    Raises:
        ValueError: the dataset does not exist, is damaged, or is not the one required (the message names both values); or the given
            tokenizer is not a fast one, or its file does not exist.
    """
    if check_hashes and streaming:
        raise ValueError(
            "check_hashes reads files as a whole, which streaming never does; leave one of the two out"
        )
    where = f"{path_or_repo}@{revision}" if revision else str(path_or_repo)
    source = _source(path_or_repo, revision, streaming=streaming, split=split)
    manifest = _read_manifest(source, where)
    records = _of_split(check_manifest(manifest, where), split, where)
    _check_requirements(manifest, where, require_teacher, require_tokenizer, require_vocab_size)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(
            lambda record: _footer(source, record, layout, manifest, check_hashes), records
        )
        footers = {record.file: footer for record, footer in zip(records, found, strict=True)}
    return LogitDataset(
        manifest=manifest,
        row_groups=tuple(group for name in footers for group in row_groups(name, footers[name])),
        columns=token_columns(footers[records[0].file].schema.to_arrow_schema(), layout),
        files=Files(source, footers),
        split=split,
        prompt_targets=prompt_targets,
    )


def load_manifest(path_or_repo: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Read the manifest of a dataset and no other file.

    Args:
        path_or_repo: directory of a dataset, or its name on the Hub.
        revision: tag, branch or commit on the Hub; None: the main branch.

    Raises:
        ValueError: the dataset does not exist, or its manifest is damaged.
    """
    where = f"{path_or_repo}@{revision}" if revision else str(path_or_repo)
    is_here = Path(path_or_repo).is_dir()
    manifest = _read_manifest(_source(path_or_repo, revision, streaming=not is_here), where)
    check_manifest(manifest, where)
    return manifest


def _of_split(records: list[FileRecord], split: str, where: str) -> list[FileRecord]:
    if found := [record for record in records if record.split == split]:
        return found
    there = " and ".join(dict.fromkeys(record.split for record in records))
    raise ValueError(
        f"{where} has no split {split!r}, it has {there}; a hold-out is made by output.validation in the recipe"
    )


def _source(
    path_or_repo: str | Path, revision: str | None, *, streaming: bool, split: str = TRAIN
) -> Source:
    directory = Path(path_or_repo)
    if not directory.is_dir():
        return _hub_source(str(path_or_repo), revision, streaming=streaming, split=split)
    if revision or streaming:
        raise ValueError(
            f"{directory} is a directory, which has no revision and needs no streaming"
        )
    return Directory(directory)


def _check_requirements(
    manifest: dict[str, Any],
    where: str,
    teacher: str | None,
    tokenizer: Any,
    vocab_size: int | None,
) -> None:
    found = manifest["teacher"]
    if teacher is not None:
        name, pin = _teacher_names(manifest)
        if teacher not in (name, pin, f"{name}@{pin}"):
            raise ValueError(f"{where} has the teacher {name}@{pin}, but {teacher} is required")
    if tokenizer is not None:
        check_tokenizer(found, where, tokenizer)
    if vocab_size is not None and vocab_size != found["vocab_size"]:
        raise ValueError(
            f"{where} has a vocabulary of {found['vocab_size']:,} logits, but {vocab_size:,} is required"
        )


def _teacher_names(manifest: dict[str, Any]) -> tuple[str, str]:
    """Its name, and what pins it."""
    found = manifest["teacher"]
    return found.get("repo") or found["name"], found.get("commit") or found["sha256"]


def _read_manifest(source: Source, where: str) -> dict[str, Any]:
    try:
        file = source.open(MANIFEST)
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        manifest: dict[str, Any] = json.loads(content)
        version = str(manifest["schema_version"])
        missing = {"fingerprint", "row_fingerprint", "recipe", "teacher", "shards"} - set(manifest)
    except FileNotFoundError:
        raise ValueError(f"{where} has no {MANIFEST}: it is not a finished logit dataset") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {MANIFEST} is damaged ({error}); fetch it again") from None
    except (OSError, http_error()) as error:
        raise ValueError(
            f"{where}: {MANIFEST} cannot be read ({first_line(error)}); try again"
        ) from None
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{where} has schema version {version}, but this program reads {SCHEMA_VERSION}; install the matching version"
        )
    if missing or not manifest["shards"]:
        raise ValueError(f"{where}: {MANIFEST} is damaged (no {', '.join(sorted(missing))})")
    return manifest


def check_manifest(manifest: dict[str, Any], where: str) -> list[FileRecord]:
    """Return what a manifest says of each file.

    Args:
        manifest: of a dataset.
        where: the dataset's name, for messages.

    Raises:
        ValueError: the manifest is incomplete or contradicts itself.
    """
    try:
        for shard in manifest["shards"]:
            if not re.fullmatch(r"data/[\w.-]+\.parquet", str(shard["file"])):
                raise ValueError(f"it names the file {shard['file']!r}, expected data/*.parquet")
        records = [FileRecord.of(shard) for shard in manifest["shards"]]
        if len({record.file for record in records}) < len(records):
            raise ValueError("it names a file twice")
        for name in ("rows", "tokens"):
            total, found = manifest["totals"][name], sum(getattr(r, name) for r in records)
            if total != found:
                raise ValueError(f"it says {total!r} {name} in all, and {found:,} by file")
        if not isinstance(manifest["teacher"]["vocab_size"], int):
            raise ValueError(f"its vocab_size is {manifest['teacher']['vocab_size']!r}")
        _ = Layout.of(manifest["recipe"], manifest["teacher"]).widest, Ends.of(manifest)
        _teacher_names(manifest)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{where}: {MANIFEST} is damaged ({reason}); fetch it again") from None
    return records


def _footer(
    source: Source,
    record: FileRecord,
    layout: Layout,
    manifest: dict[str, Any],
    check_hashes: bool | None,
) -> pq.FileMetaData:
    name = record.file
    try:
        footer = read_footer(source, record, check_hashes=check_hashes)
        check_footer(footer, record, layout, str(manifest["row_fingerprint"]))
    except DifferentFile as error:
        raise ValueError(f"{error}; fetch the dataset again") from None
    except FileNotFoundError:
        raise ValueError(f"{name} is missing; fetch the dataset again") from None
    except (pa.ArrowException, ValueError, OSError, http_error()) as error:
        raise ValueError(
            f"{name} cannot be read ({first_line(error)}); fetch the dataset again"
        ) from None
    return footer


def _hub_source(repo: str, revision: str | None, *, streaming: bool, split: str) -> Source:
    """File names → local paths or open remote files, all of the one commit behind the revision."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if not streaming:
            # Of a hold-out, no more is fetched; what there was before there were any may have other names.
            files = "data/*.parquet" if split == TRAIN else f"data/{split}-*.parquet"
            patterns = [files, MANIFEST]
            directory = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
            return Directory(Path(directory))
        commit = HfApi().dataset_info(repo, revision=revision).sha
    except HFValidationError:
        raise ValueError(
            f"{repo!r} is neither a directory nor a Hub dataset name (ORG/NAME)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no directory {repo!r}, and the Hub has no dataset of that name that you can read; check the name, "
            "and log in if it is private"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"dataset {repo!r} has no revision {revision!r} on the Hub") from None
    except (OSError, http_error()) as error:
        raise ValueError(
            f"there is no directory {repo!r}, and the Hub cannot be reached ({first_line(error)})"
        ) from None
    return Commit(repo, str(commit))


def http_error() -> type[Exception]:
    """What a broken connection to the Hub raises, and every status that is an error; HF_HUB_OFFLINE is an OSError.

    huggingface_hub's own error inherits from that of the library by which it speaks HTTP: requests, httpx or httpx2, by its version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
