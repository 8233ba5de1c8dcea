"""A finished dataset → everything that is wrong with it.

In:   the directory of a dataset.
Out:  one line for each problem, naming file and row. None means: the files are those of the manifest, every row obeys the
      invariants of the schema, and (if asked) random rows are what the teacher says when it is run again.

Cost: about 1 M tokens/s for hashes and invariants; recomputing costs what capturing cost.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from builder.card import VERIFICATION, read_release, write_card
from builder.manifest import (
    ShardRecord,
    Sums,
    data_digest,
    environment,
    read_manifest,
    records_of,
    truncated_length,
    write_json,
)
from builder.schema import COLUMNS, FLOAT16_MIN, arrow_schema, float16_rounding
from builder.shards import file_sha256, nested_values

Floats = npt.NDArray[np.float64]

MASS_TOLERANCE = 1e-3
"""Of Σ exp(top K) + exp(tail) = 1, or what rounding to float16 can do at worst, if that is more."""
ENTROPY_TOLERANCE = 0.02
"""Nats: float16 rounding of the entropy itself and of the stored part."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What verification found."""

    problems: list[str] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    tokens: int = 0
    recomputed: dict[str, Any] | None = None


def verify(
    directory: Path,
    *,
    recompute: int = 0,
    device: str = "cpu",
    teacher_path: Path | None = None,
    seed: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Check a dataset against its manifest, the schema's invariants and, on request, its teacher.

    Args:
        directory: of a finished dataset.
        recompute: number of random rows to run through the teacher again.
        device: where to recompute.
        teacher_path: directory or GGUF file of the teacher, where the recipe names a local one.
        seed: chooses the random rows; a new one each time, if None.
        progress: told of checked tokens.

    Raises:
        ValueError: there is no readable manifest, or the teacher at hand is not the dataset's.
    """
    manifest = read_manifest(directory)
    records = records_of(manifest)
    report = Report(files=len(records))
    _check_files(directory, records, report)
    _check_card(directory, manifest, report)
    for record in records:
        if (directory / record.file).exists():
            _check_shard(directory, record, manifest, report, progress)
    if recompute and not report.problems:
        from builder.recompute import recompute_rows

        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        report.recomputed, problems = recompute_rows(
            directory,
            manifest,
            records,
            count=recompute,
            seed=seed,
            device=device,
            teacher_path=teacher_path,
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


def _check_files(directory: Path, records: list[ShardRecord], report: Report) -> None:
    listed = {record.file for record in records}
    for path in sorted((directory / "data").glob("*.parquet")):
        if f"data/{path.name}" not in listed:
            report.problems.append(f"data/{path.name}: is not in the manifest")
    for record in records:
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


def _check_shard(
    directory: Path,
    record: ShardRecord,
    manifest: dict[str, Any],
    report: Report,
    progress: Callable[[int], None],
) -> None:
    with_text = manifest["recipe"]["output"]["text"]
    try:
        file = pq.ParquetFile(directory / record.file)
        if not file.schema_arrow.equals(arrow_schema(with_text=with_text)):
            report.problems.append(f"{record.file}: its columns are not those of the schema")
            return
        checker = _RowChecker(record.file, manifest)
        for index in range(file.num_row_groups):
            table = file.read_row_group(index)
            checker.check(table)
            report.rows += table.num_rows
            progress(len(nested_values(table["input_ids"])))
        checker.finish(record)
    except (pa.ArrowException, OSError) as error:
        report.problems.append(f"{record.file}: cannot be read ({str(error).splitlines()[0]})")
        return
    report.tokens += checker.tokens
    report.problems += checker.problems


class _RowChecker:
    """Checks the rows of one file, row group by row group."""

    def __init__(self, file: str, manifest: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self.tokens = 0
        self._file = file
        self._first_row = 0
        self._sums = Sums()
        self._top_k: int = manifest["recipe"]["output"]["top_k"]
        self._vocab_size: int = manifest["teacher"]["vocab_size"]
        self._eos: int | None = manifest["teacher"]["eos_token_id"]
        self._prefix: list[int] = manifest["teacher"]["prefix_ids"]
        self._truncated_length = truncated_length(manifest)
        self._previous: tuple[str, int] | None = None

    def check(self, table: pa.Table) -> None:
        rows = _Rows.of(table, self._top_k)
        if isinstance(rows, str):
            self._add(0, rows)
            return
        self._check_order(table["id"].to_pylist(), table["chunk_index"].to_pylist())
        self._check_ids(rows)
        self._check_values(rows)
        self._check_targets(rows, table)
        valid = ~np.isnan(rows.target)
        self._sums += Sums(
            entropy=float(rows.entropy.sum()),
            topk_mass=float(np.exp(rows.logprobs).sum()),
            target_nll=float(-rows.target[valid].sum()),
            targets=int(valid.sum()),
        )
        self.tokens += len(rows.input_ids)
        self._first_row += table.num_rows

    def finish(self, record: ShardRecord) -> None:
        for name, found, expected in (
            ("rows", self._first_row, record.rows),
            ("tokens", self.tokens, record.tokens),
        ):
            if found != expected:
                self.problems.append(
                    f"{self._file}: has {found:,} {name}, the manifest says {expected:,}"
                )
        for name in ("entropy", "topk_mass", "target_nll"):
            found_sum, expected_sum = getattr(self._sums, name), getattr(record.sums, name)
            if not np.isclose(found_sum, expected_sum, rtol=1e-6, atol=1e-3):
                self.problems.append(
                    f"{self._file}: sum of {name} is {found_sum:.3f}, the manifest says {expected_sum:.3f}"
                )

    def _add(self, row: int, message: str) -> None:
        self.problems.append(f"{self._file} row {self._first_row + row}: {message}")

    def _add_where(self, rows: "_Rows", wrong: Any, message: str) -> None:
        """One line for each row that has wrong positions."""
        positions = np.flatnonzero(wrong)
        for row, position in {int(rows.row_of[i]): int(i) for i in positions[::-1]}.items():
            self._add(row, f"{message} (position {position - int(rows.starts[row])})")

    def _check_order(self, ids: list[str], chunks: list[int]) -> None:
        for row, current in enumerate(zip(ids, chunks, strict=True)):
            if current[1] != 0 and self._previous != (current[0], current[1] - 1):
                self._add(
                    row,
                    f"chunk {current[1]} of {current[0]!r} does not follow chunk {current[1] - 1}",
                )
            self._previous = current

    def _check_ids(self, rows: "_Rows") -> None:
        for name, ids in (("input_ids", rows.input_ids[:, None]), ("topk_indices", rows.indices)):
            outside = ((ids < 0) | (ids >= self._vocab_size)).any(-1)
            self._add_where(rows, outside, f"{name} outside 0 … {self._vocab_size - 1}")
        ordered = np.sort(rows.indices, axis=-1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        self._add_where(rows, repeated, "an id stands twice in topk_indices")

    def _check_values(self, rows: "_Rows") -> None:
        for name, values in (
            ("topk_logprobs", rows.logprobs),
            ("tail_logprob", rows.tail[:, None]),
            ("entropy", rows.entropy[:, None]),
            ("logsumexp", rows.logsumexp[:, None]),
        ):
            self._add_where(rows, ~np.isfinite(values).all(-1), f"{name} is not finite")
        self._add_where(rows, (rows.logprobs > 0).any(-1), "a log-probability is above 0")
        self._add_where(
            rows, (np.diff(rows.logprobs, axis=-1) > 0).any(-1), "topk_logprobs rise with rank"
        )
        stored = np.concatenate([rows.logprobs, rows.tail[:, None]], axis=-1)
        mass = np.exp(stored)
        rounding = (mass * float16_rounding(stored)).sum(-1)
        wrong_mass = ~(np.abs(mass.sum(-1) - 1) <= np.maximum(MASS_TOLERANCE, rounding + 1e-4))
        self._add_where(rows, wrong_mass, "top K and tail do not sum to 1")
        # What is stored, with the tail as one bucket, has less entropy than the truth, but not by more than an even tail.
        bucketed = -(mass * np.maximum(stored, FLOAT16_MIN)).sum(-1)
        spread = mass[:, -1] * np.log(max(self._vocab_size - self._top_k, 1))
        wrong_entropy = ~(
            (rows.entropy >= bucketed - ENTROPY_TOLERANCE)
            & (rows.entropy <= bucketed + spread + ENTROPY_TOLERANCE)
        )
        self._add_where(rows, wrong_entropy, "entropy does not fit the stored distribution")

    def _check_targets(self, rows: "_Rows", table: pa.Table) -> None:
        targets = self._targets(rows, table["id"].to_pylist(), table["chunk_index"].to_pylist())
        known = targets >= 0
        self._add_where(rows, known & np.isnan(rows.target), "target_logprob is NaN")
        self._add_where(rows, rows.target > 0, "target_logprob is above 0")
        listed = rows.indices == targets[:, None]
        inside = listed.any(-1) & known
        at_rank = np.take_along_axis(rows.logprobs, listed.argmax(-1)[:, None], axis=-1)[:, 0]
        self._add_where(
            rows,
            inside & (at_rank != rows.target),
            "target_logprob differs from the target's own entry in the top K",
        )
        above = known & ~inside & (rows.target > rows.logprobs[:, -1])
        self._add_where(
            rows, above, "target_logprob of a token outside the top K is above the K-th"
        )

    def _targets(self, rows: "_Rows", ids: list[str], chunks: list[int]) -> npt.NDArray[np.int64]:
        """The token that follows each position, −1 where the file does not tell."""
        targets = np.append(rows.input_ids[1:], -1).astype(np.int64)
        for row, last in enumerate(rows.ends - 1):
            next_row = row + 1
            if next_row == len(ids):
                targets[last] = -1  # its next chunk, if there is one, is in the next row group
            elif ids[next_row] == ids[row] and chunks[next_row] == chunks[row] + 1:
                targets[last] = rows.input_ids[rows.starts[next_row] + len(self._prefix)]
            elif self._eos is None or rows.ends[row] - rows.starts[row] >= self._truncated_length:
                targets[last] = -1
            else:
                targets[last] = self._eos
        return targets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The columns of some rows as flat arrays over all their positions."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    logprobs: Floats
    tail: Floats
    target: Floats
    logsumexp: Floats
    entropy: Floats

    @classmethod
    def of(cls, table: pa.Table, top_k: int) -> "_Rows | str":
        """The arrays, or what is wrong with the table's shapes."""
        if any(column.null_count for column in table.columns):
            return "a value is null"
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        if not lengths.all():
            return "a row has no tokens"
        ends = lengths.cumsum()
        for column in COLUMNS:
            if not column.shape:
                continue
            lists = table[column.name].combine_chunks()
            if not np.array_equal(lists.value_lengths().to_numpy(), lengths):
                return f"{column.name} and input_ids have different lengths"
            inner = lists.flatten()
            if inner.null_count or (
                column.shape == "T,K" and not (inner.value_lengths().to_numpy() == top_k).all()
            ):
                return f"{column.name} does not have {top_k} values a token"
        floats = {
            name: nested_values(table[name]).astype(np.float64)
            for name in ("topk_logprobs", "tail_logprob", "target_logprob", "logsumexp", "entropy")
        }
        return cls(
            starts=ends - lengths,
            ends=ends,
            row_of=np.repeat(np.arange(len(lengths)), lengths),
            input_ids=nested_values(table["input_ids"]).astype(np.int64),
            indices=nested_values(table["topk_indices"]).astype(np.int64),
            logprobs=floats["topk_logprobs"],
            tail=floats["tail_logprob"],
            target=floats["target_logprob"],
            logsumexp=floats["logsumexp"],
            entropy=floats["entropy"],
        )
