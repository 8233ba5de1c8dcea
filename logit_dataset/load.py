"""A directory or a Hub repository → a LogitDataset that is known to be what the trainer asked for.

In:   a local build, a downloaded version, or the name of a repository with a revision.
Out:  a LogitDataset. Its `batches` read row groups straight from Parquet, from the disk or (streaming) from the Hub.

How:  the manifest is read and compared with what is required; then every file's footer (64 kB, sixteen at a time), so that a file that is
      missing, cut off, of another schema or of another build is found at once, and not at some step of the training.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logit_dataset.batches import Batches
from logit_dataset.rows import Ends, Projection, RowGroup, Rows, read_rows, token_columns
from logit_dataset.schema import SCHEMA_VERSION, Layout
from logit_dataset.tokenizer_check import check_tokenizer

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LogitDataset:
    """A dataset that was found to be what was required. Made by `load_logits`."""

    manifest: dict[str, Any]
    row_groups: tuple[RowGroup, ...]
    """Of all files, in stored order."""
    columns: list[str]
    """Columns with values a token; all of them are in a batch."""
    open_file: Callable[[str], pq.ParquetFile]
    projection: Projection | None = None
    prompt_targets: bool = False
    """Whether `target_ids` outside completions are kept."""

    def __repr__(self) -> str:
        return (
            f"<{self.num_rows:,} rows, {self.num_tokens:,} tokens, {self.vocab_size:,} logits; "
            f"teacher {'@'.join(_teacher_names(self.manifest))}; {', '.join(self.columns)}>"
        )

    @property
    def layout(self) -> Layout:
        """What its rows hold."""
        return Layout.of(self.manifest["recipe"], self.manifest["teacher"])

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def num_tokens(self) -> int:
        """Positions, each with a distribution."""
        return sum(group.num_tokens for group in self.row_groups)

    @property
    def vocab_size(self) -> int:
        """Logits that a student needs: the teacher's, or those of the projection."""
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
    ) -> Batches:
        """Batches of `batch_size` rows of tensors, in stored types; see `Batches` for what is in them.

        Args:
            batch_size: rows of a batch.
            length: T of every batch; None pads to the longest row of each.
            packed: fill each row with several sequences, up to `length`.
            split_long: cut a sequence longer than `length` into pieces. The teacher has seen what stands before a piece, the student
                has not. Otherwise such a sequence is an error.
            seed: of the shuffling, 0 or more, which is another one in every epoch; None keeps the stored order.
            rank: of this process.
            world_size: number of processes. Each gets other row groups. Their numbers of batches differ, so processes that wait for each
                other must train for a number of steps and go on into the next epoch each for itself (`while …: for batch in batches`).
                A loader that divides batches among processes itself, as accelerate's does, is not for these: it would divide one rank's.

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
            },
            batch_size=batch_size,
            length=length,
            packed=packed,
            split_long=split_long,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def project(self, projection: Projection) -> "LogitDataset":
        """The same dataset in the vocabulary of a student."""
        return replace(self, projection=projection)

    def token_counts(self) -> npt.NDArray[np.int64]:
        """[V]: how often each id of the teacher's vocabulary stands in the texts. Reads `input_ids` only."""
        counts = np.zeros(self.manifest["teacher"]["vocab_size"], dtype=np.int64)
        for group in self.row_groups:
            table = self.open_file(group.file).read_row_group(group.index, columns=["input_ids"])
            ids = table["input_ids"].combine_chunks().flatten().to_numpy()
            counts += np.bincount(ids, minlength=len(counts))
        return counts

    def read(self, group: RowGroup) -> Rows:
        """Decode one row group, and project it.

        Raises:
            ValueError: the file cannot be read, or its values do not fit each other; names the file.
        """
        try:
            file = self.open_file(group.file)
            rows = read_rows(
                file,
                group.index,
                self.columns,
                Ends.of(self.manifest),
                prompt_targets=self.prompt_targets,
            )
        except (pa.ArrowException, ValueError, OSError, _http_error()) as error:
            raise ValueError(
                f"{group.file}, row group {group.index}: {_first_line(error)}; verify the dataset"
            ) from error
        return self.projection(rows) if self.projection else rows


def load_logits(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    streaming: bool = False,
    require_teacher: str | None = None,
    require_tokenizer: Any = None,
    require_vocab_size: int | None = None,
    prompt_targets: bool = False,
) -> LogitDataset:
    """Open a logit dataset.

    Args:
        path_or_repo: directory of a dataset, or its name on the Hub.
        revision: tag, branch or commit on the Hub; the main branch, if None.
        streaming: read from the Hub while training; otherwise it is downloaded first.
        require_teacher: repository, name, commit, `repository@commit` or file hash of the teacher that you expect.
        require_tokenizer: the fast tokenizer that you expect, the path of its tokenizer.json, or the SHA-256 that a manifest has of it.
            (AutoTokenizer may rebuild a tokenizer so that it is another one than its file; the path is always right.)
        require_vocab_size: number of logits that you expect the teacher to have.
        prompt_targets: of a dataset with completions, keep the text of prompts in `target_ids`, so that a text_weight teaches it too;
            distributions are learned for completions in any case.

    Raises:
        ValueError: there is no such dataset, it is damaged, or it is not what was required (names both values); or the tokenizer given
            is no fast one, or no file.
    """
    directory = Path(path_or_repo)
    if directory.is_dir():
        if revision or streaming:
            raise ValueError(
                f"{directory} is a directory, which has no revision and needs no streaming"
            )
        source: Callable[[str], Any] = lambda name: str(directory / name)  # noqa: E731
    else:
        source = _hub_source(str(path_or_repo), revision, streaming=streaming)
    where = f"{path_or_repo}@{revision}" if revision else str(path_or_repo)
    manifest = _read_manifest(source, where)
    _check_requirements(manifest, where, require_teacher, require_tokenizer, require_vocab_size)
    names = [_safe_name(shard["file"], where) for shard in manifest["shards"]]
    with ThreadPoolExecutor(16) as pool:
        footers = dict(
            zip(names, pool.map(lambda name: _footer(source, name, manifest), names), strict=True)
        )
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    row_groups = tuple(
        RowGroup(
            file=name,
            index=index,
            num_rows=footer.row_group(index).num_rows,
            num_tokens=_num_tokens(footer.row_group(index)),
        )
        for name, footer in footers.items()
        for index in range(footer.num_row_groups)
    )
    return LogitDataset(
        manifest=manifest,
        row_groups=row_groups,
        columns=token_columns(footers[names[0]].schema.to_arrow_schema(), layout),
        open_file=lambda name: pq.ParquetFile(source(name), metadata=footers[name]),
        prompt_targets=prompt_targets,
    )


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


def _read_manifest(source: Callable[[str], Any], where: str) -> dict[str, Any]:
    try:
        file = source(MANIFEST)
        content = Path(file).read_bytes() if isinstance(file, str) else file.read()
        manifest: dict[str, Any] = json.loads(content)
        version = str(manifest["schema_version"])
        missing = {"fingerprint", "row_fingerprint", "recipe", "teacher", "shards"} - set(manifest)
    except FileNotFoundError:
        raise ValueError(f"{where} has no {MANIFEST}: it is not a finished logit dataset") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {MANIFEST} is damaged ({error}); fetch it again") from None
    except (OSError, _http_error()) as error:
        raise ValueError(
            f"{where}: {MANIFEST} cannot be read ({_first_line(error)}); try again"
        ) from None
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; install the matching version"
        )
    if missing or not manifest["shards"]:
        raise ValueError(f"{where}: {MANIFEST} is damaged (no {', '.join(sorted(missing))})")
    return manifest


def _safe_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"data/[\w.-]+\.parquet", name):
        raise ValueError(f"{where}: its manifest names the file {name!r}, expected data/*.parquet")
    return name


def _footer(source: Callable[[str], Any], name: str, manifest: dict[str, Any]) -> pq.FileMetaData:
    try:
        footer = pq.ParquetFile(source(name)).metadata
    except FileNotFoundError:
        raise ValueError(f"{name} is missing; fetch the dataset again") from None
    except (pa.ArrowException, OSError, _http_error()) as error:
        raise ValueError(
            f"{name} cannot be read ({_first_line(error)}); fetch the dataset again"
        ) from None
    try:
        layout = Layout.of(manifest["recipe"], manifest["teacher"])
        token_columns(footer.schema.to_arrow_schema(), layout)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; it is not of schema {SCHEMA_VERSION}") from None
    found = (footer.metadata or {}).get(b"logit_dataset.row_fingerprint", b"").decode()
    if found != manifest["row_fingerprint"]:
        raise ValueError(
            f"{name} belongs to the build {found[:12] or 'of an unknown recipe'}, the manifest is of "
            f"{manifest['row_fingerprint'][:12]}; fetch the dataset again"
        )
    return footer


def _num_tokens(row_group: pq.RowGroupMetaData) -> int:
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return next(int(c.num_values) for c in columns if c.path_in_schema.startswith("input_ids."))


def _hub_source(repo: str, revision: str | None, *, streaming: bool) -> Callable[[str], Any]:
    """File names → local paths or open remote files, all of the one commit behind the revision."""
    from huggingface_hub import HfApi, HfFileSystem, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if not streaming:
            patterns = ["data/*.parquet", MANIFEST]
            directory = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
            return lambda name: str(Path(directory) / name)
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
    except (OSError, _http_error()) as error:
        raise ValueError(
            f"there is no directory {repo!r}, and the Hub cannot be reached ({_first_line(error)})"
        ) from None
    hub = HfFileSystem()
    return lambda name: hub.open(f"datasets/{repo}@{commit}/{name}", "rb")


def _http_error() -> type[Exception]:
    """What a broken connection to the Hub raises, and every status that is an error; HF_HUB_OFFLINE is an OSError.

    huggingface_hub's own error inherits from that of the library by which it speaks HTTP: requests, httpx or httpx2, by its version.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
