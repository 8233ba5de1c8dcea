"""The record of a build: `manifest.json`, the only sign that a dataset is complete.

In:   the plan (the recipe and the exact sources behind it) and one record for each shard.
Out:  one JSON file with provenance, totals and the hash of every data file. It holds no tokens, user names, host names or
      absolute paths, for it is published.
"""

import hashlib
import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from builder.dataset.identity import fingerprint, row_fingerprint
from builder.dataset.manifest_model import Manifest, Shard, check
from builder.dataset.printable import one_line
from logit_dataset.schema import SCHEMA_VERSION, TRAIN

FILE_NAME = "manifest.json"
DATA_FILE = re.compile(r"data/[A-Za-z0-9_][A-Za-z0-9._-]*\.parquet")
"""Names that a manifest, which may come from anywhere, may use for a data file."""
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")

UNSAID = ("completions", "offset_before", "column_bytes", "footer_sha256", "converted", "split")
"""Fields of records that are left out where they are None."""

OF_SPLITS = (
    *("documents", "rows", "tokens", "completion_tokens", "bytes"),
    *("mean_entropy", "mean_target_nll", "teacher_perplexity"),
)
"""Totals that are given for each split, too."""

FORMER_KEYS = {"position_before": "offset_before", "position_after": "offset_after"}
"""Of records in older manifests and unfinished builds."""

MAX_MANIFEST_BYTES = 2**28
"""More than the records of 100,000 shards take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over the tokens of a shard, from which the totals of the dataset follow."""

    entropy: float = 0.0
    """Nats."""
    topk_mass: float = 0.0
    """Probability inside the top K."""
    target_nll: float = 0.0
    """−log-probability of the tokens that really follow, in nats."""
    targets: int = 0
    """Positions that have a token that follows."""
    completion_tokens: int | None = None
    """Tokens of completions; None in a dataset without a completion_mask."""
    kept: int | None = None
    """Positions of which columns of several values a token are kept; None where these are all."""

    def __add__(self, other: Self) -> Self:
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        known = {name: [v for v in values if v is not None] for name, values in both.items()}
        return type(self)(**{name: sum(values) for name, values in known.items() if values})


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What came of the prompts of a shard."""

    prompts: int = 0
    """That were completed."""
    prompts_too_long: int = 0
    """That leave no room for a completion, and were skipped."""
    completions: int = 0
    tokens: int = 0
    """Of the completions."""
    ended: int = 0
    """Completions that end with an end-of-sequence token; the others were cut at max_new_tokens."""
    corrected: int = 0
    """Tokens of greedy drafts that gave way to what the capture pass says."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What is known of a finished shard."""

    file: str
    """Path below the dataset's directory, e.g. `data/train-000-00000.parquet`."""
    sha256: str
    bytes: int
    rows: int
    tokens: int
    """Positions, special tokens included."""
    partition: int
    index: int
    offset_after: dict[str, Any]
    """Corpus offset at which the next shard of this partition starts. Where a document goes on there, it names the place in it: the id and
    `chunk_index` of the next row, as `document` and `chunk`, among others."""
    exhausted: bool
    """Whether this is the last shard of its partition."""
    sums: Sums
    halved_batches: int
    """Batches that did not fit the device's memory and were halved, which can change last bits."""
    seconds: float
    environment: dict[str, Any]
    """Libraries and hardware that computed it."""
    completions: Completions | None = None
    """None where the corpus is taken as it is."""
    offset_before: dict[str, Any] | None = None
    """Corpus offset at which it starts, {} at the beginning of a partition; None in a dataset of a schema before 1.2."""
    column_bytes: dict[str, int] | None = None
    """Compressed, of each column; None in a dataset of a schema before 1.2."""
    footer_sha256: str | None = None
    """Of the Parquet footer; None of a file whose pages have no checksums, as all were once."""
    converted: dict[str, int] | None = None
    """In how many documents something was converted or left out, by what; None where nothing was."""
    split: str | None = None
    """None in a dataset without a hold-out. Partitions of `validation` are numbered behind those of `train`."""

    @property
    def begins_within(self) -> tuple[str, int] | None:
        """Id and chunk of the row with which the shard begins, if that is the rest of a document."""
        return _rest(self.offset_before)

    @property
    def ends_within(self) -> tuple[str, int] | None:
        """Id and chunk of the row that follows the shard, if that is the rest of a document."""
        return _rest(self.offset_after)

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str = "") -> Self:
        """Rebuild a record from its JSON values; those that a later version has added are left out.

        Args:
            values: of a manifest, or of an unfinished build.
            where: their place, for the message.

        Raises:
            ValueError: values are missing or of another type, or the file name leads out of the dataset.
        """
        values = {FORMER_KEYS.get(name, name): value for name, value in values.items()}
        try:
            check(values, Shard, within=where)
        except ValueError as error:
            raise ValueError(f"not a shard record: {error}") from None
        record = cls(**{**_known(cls, values), "sums": Sums(**_known(Sums, values["sums"]))})
        if record.completions is not None:
            counts = Completions(**_known(Completions, values["completions"]))
            record = replace(record, completions=counts)
        for offset in (record.offset_before, record.offset_after):
            if offset and "chunk" in offset:
                within = offset["chunk"], offset.get("document")
                if tuple(map(type, within)) != (int, str):
                    raise ValueError(
                        f"not a shard record: {where or 'it'} names the chunk and document {one_line(repr(within), limit=80)} at an offset, "
                        "expected a number and a text"
                    )
        if not isinstance(record.file, str) or not DATA_FILE.fullmatch(record.file):
            name = one_line(repr(record.file), limit=80)
            place = f"{where}.file: " if where else ""
            raise ValueError(f"{place}shard record names {name}, expected data/*.parquet")
        return record

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        values = asdict(self)
        return {
            name: value for name, value in values.items() if name not in UNSAID or value is not None
        }


def _rest(offset: dict[str, Any] | None) -> tuple[str, int] | None:
    """Of a chat, the next row may be one of its own."""
    if not offset or not offset.get("chunk"):
        return None
    return offset["document"], offset["chunk"]


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that a dataclass has fields for."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def data_file(partition: int, index: int, split: str | None = None) -> str:
    """Path of a shard's file below the dataset's directory: in the order of their names, files are in that of their shards."""
    return f"data/{split or TRAIN}-{partition:03d}-{index:05d}.parquet"


def environment(device: str) -> dict[str, Any]:
    """Libraries and hardware of this process, without names of hosts or users."""
    import torch

    is_cuda = device.startswith("cuda")
    hardware = torch.cuda.get_device_name(device) if is_cuda else f"{platform.machine()} CPU"
    return {
        "device": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def make_manifest(
    plan: dict[str, Any], teacher: dict[str, Any], records: Iterable[ShardRecord]
) -> dict[str, Any]:
    """The manifest of a finished build.

    Args:
        plan: recipe, corpus and teacher source, all as plain JSON values.
        teacher: what the loaded teacher turned out to be (`Teacher.provenance`).
        records: of all shards, in order.
    """
    records = list(records)
    environments = []
    for record in records:
        if record.environment not in environments:
            environments.append(record.environment)
    shards = []
    for record in records:
        values = record.to_json()
        del values["environment"]
        values["sums"] = {name: v for name, v in values["sums"].items() if v is not None}
        shards.append({**values, "environment": environments.index(record.environment)})
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(plan),
        "row_fingerprint": row_fingerprint(plan),
        "recipe": plan["recipe"],
        "corpus": plan["corpus"],
        "teacher": {**plan["teacher"], **teacher},
        "totals": totals_of(records),
        "environments": environments,
        "shards": shards,
    }


def records_of(manifest: dict[str, Any]) -> list[ShardRecord]:
    """The shard records of a manifest.

    Raises:
        ValueError: they are damaged, or name files outside the dataset.
    """
    environments = dict(enumerate(manifest["environments"]))
    records = []
    for number, shard in enumerate(manifest["shards"]):
        where = f"shards[{number}]"
        place = shard.get("environment")
        if type(place) is not int or place not in environments:
            found = one_line(repr(place), limit=60)
            raise ValueError(
                f"not a shard record: {where}.environment is {found}, expected a place in environments"
            )
        values = {**shard, "environment": environments[place]}
        records.append(ShardRecord.from_json(values, where=where))
    return records


def of_split(manifest: dict[str, Any], split: str | None) -> dict[str, Any]:
    """A manifest that lists the shards of one split only; None leaves it as it is.

    Raises:
        ValueError: there is no such split.
    """
    if split is None:
        return manifest
    shards = [shard for shard in manifest["shards"] if (shard.get("split") or TRAIN) == split]
    if not shards:
        raise ValueError(f"the dataset has no split {split}: its recipe has no output.validation")
    return {**manifest, "shards": shards}


def mean_topk_mass(records: Iterable[ShardRecord]) -> float:
    """Mean probability inside the top K, of the positions that have one."""
    mass, positions = 0.0, 0
    for record in records:
        mass += record.sums.topk_mass
        positions += record.tokens if record.sums.kept is None else record.sums.kept
    return mass / max(positions, 1)


def converted_of(records: Iterable[ShardRecord]) -> dict[str, int]:
    """In how many documents something was converted or left out, by what."""
    totals: Counter[str] = Counter()
    for record in records:
        totals.update(record.converted or {})
    return dict(sorted(totals.items()))


def data_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of names and hashes of all data files: it stands for the data, whatever is said about them."""
    listing = [[shard["file"], shard["sha256"]] for shard in manifest["shards"]]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished dataset.

    Raises:
        ValueError: there is none, it is not a manifest, or it is of a schema that this version cannot read.
    """
    path = directory / FILE_NAME
    if not path.exists():
        if not directory.exists():
            raise ValueError(f"{directory} does not exist; name the directory of a finished build")
        state = (
            "an unfinished build; run the same build command to resume"
            if (directory / ".build").exists()
            else "not a logit dataset; name the directory of a finished build"
        )
        raise ValueError(f"{directory} has no {FILE_NAME}: it is {state}")
    advice = "fetch or build the dataset again"
    try:
        if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has {size:,} bytes, expected at most {MAX_MANIFEST_BYTES:,}")
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
        version = manifest["schema_version"]
        json.dumps(manifest, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{path} is damaged (it holds half of a surrogate pair, which is no character); {advice}"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{path} is damaged (its values are nested too deeply); {advice}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({_reason(error)}); {advice}") from None
    if str(version).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{path} has schema version {one_line(version, limit=60)}, but this program reads {SCHEMA_VERSION}; install the version of logit-dataset that built it"
        )
    try:
        check(manifest, Manifest)
        records_of(manifest)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    return manifest


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in line {error.lineno}, column {error.colno}"
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def write_json(path: Path, values: Any) -> None:
    """Write a small JSON file so that after a crash either the old or the new one is there, whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(json_bytes(values))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(values: Any) -> bytes:
    """JSON as this program writes it."""
    return f"{json.dumps(values, indent=1, ensure_ascii=False)}\n".encode()


def totals_of(records: list[ShardRecord]) -> dict[str, Any]:
    """The totals of a dataset, and of each of its splits, which follow from the records of all of its shards."""
    by_split: dict[str, list[ShardRecord]] = {}
    for record in records:
        if record.split:
            by_split.setdefault(record.split, []).append(record)
    splits = {split: _totals(some) for split, some in by_split.items()}
    of_splits = {
        split: {name: totals[name] for name in OF_SPLITS if name in totals}
        for split, totals in splits.items()
    }
    return {**_totals(records), **({"splits": of_splits} if of_splits else {})}


def _totals(records: list[ShardRecord]) -> dict[str, Any]:
    sums = Sums()
    for record in records:
        sums += record.sums
    tokens = sum(record.tokens for record in records)
    data_bytes = sum(record.bytes for record in records)
    seconds = sum(record.seconds for record in records)
    nll = sums.target_nll / sums.targets if sums.targets else None
    last = {record.partition: record.offset_after for record in records}
    written = [record.completions for record in records if record.completions]
    converted = converted_of(records)
    return {
        "documents": sum(offset["documents"] for offset in last.values()),
        "documents_skipped": sum(offset["skipped"] for offset in last.values()),
        "rows": sum(record.rows for record in records),
        "tokens": tokens,
        **({} if sums.completion_tokens is None else {"completion_tokens": sums.completion_tokens}),
        "bytes": data_bytes,
        "bytes_per_token": round(data_bytes / tokens, 2),
        "mean_entropy": round(sums.entropy / tokens, 4),
        "mean_topk_mass": round(mean_topk_mass(records), 4),
        "mean_target_nll": None if nll is None else round(nll, 4),
        # Beyond float64 only if the teacher rules out (−inf) a good part of what really follows.
        "teacher_perplexity": None if nll is None or nll > 700 else round(math.exp(nll), 3),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / max(seconds, 1e-3), 1),
        **({"completions": asdict(sum(written, Completions()))} if written else {}),
        **({"converted": converted} if converted else {}),
    }
