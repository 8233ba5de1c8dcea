"""A data file → the rows in it that break an invariant of the schema, or do not follow each other.

In:   a file, and what its manifest says of it.
Out:  one line for each problem, added to a Report.

Cost: about 1 M tokens/s. A row group is in memory at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from builder.dataset.manifest import ShardRecord, Sums
from builder.dataset.shards import nested_values
from builder.verify.invariants import (
    Array,
    broken,
    broken_completions,
    sampled_entropy,
    surprise_beyond_entropy,
)
from logit_dataset.schema import Layout, arrow_schema, columns, loss_mask, shortest_cut

VALUES_AT_ONCE = 2**22
"""Values of a column whose invariants are checked together: 32 MB in float64."""
DRAWS_SIGMAS, DRAWS_TOLERANCE = 6.0, 2e-3
"""How far the entropy by draws may be off in a file: standard errors, and nats a token for the rounding to float16."""

SURPRISE_TOLERANCE = 0.02
"""Nats a token by which completions may be more or less surprising than the entropy says: a teacher in 16 bits writes with other
rounding than it is captured with."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What verification found."""

    problems: list[str] = field(default_factory=list)
    files: int = 0
    rows: int = 0
    tokens: int = 0
    recomputed: dict[str, Any] | None = None


def check_shard(
    directory: Path,
    record: ShardRecord,
    manifest: Mapping[str, Any],
    report: Report,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Check the rows of one data file, and add what is found to a report.

    Args:
        directory: of the dataset.
        record: of the file, whose hash is not looked at.
        manifest: `recipe`, `teacher` and `row_fingerprint` of one.
        report: added to.
        progress: told of checked tokens.
    """
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    try:
        file = pq.ParquetFile(directory / record.file, page_checksum_verification=True)
        if not file.schema_arrow.equals(arrow_schema(layout)):
            report.problems.append(f"{record.file}: its columns are not those of the schema")
            return
        found = (file.schema_arrow.metadata or {}).get(b"logit_dataset.row_fingerprint", b"")
        if found.decode(errors="replace") != manifest.get("row_fingerprint"):
            report.problems.append(
                f"{record.file}: is of another recipe, source or schema (its row_fingerprint is not the manifest's)"
            )
            return
        checker = _RowChecker(record.file, manifest, layout)
        for index in range(file.num_row_groups):
            table = file.read_row_group(index)
            checker.check(table)
            report.rows += table.num_rows
            progress(len(nested_values(table["input_ids"])))
        checker.finish(record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        report.problems.append(f"{record.file}: cannot be read ({str(error).splitlines()[0]})")
        return
    report.tokens += checker.tokens
    report.problems += checker.problems


class _RowChecker:
    """Checks the rows of one file, row group by row group."""

    def __init__(self, file: str, manifest: Mapping[str, Any], layout: Layout) -> None:
        self.problems: list[str] = []
        self.tokens = 0
        self._file = file
        self._first_row = 0
        self._sums = Sums()
        self._layout = layout
        self._surplus = self._surplus_squares = 0.0
        self._surprise = self._surprise_squares = 0.0
        self._kept = self._written = 0
        self._eos: int | None = manifest["teacher"]["eos_token_id"]
        self._prefix: list[int] = manifest["teacher"]["prefix_ids"]
        self._generation: dict[str, Any] | None = manifest["recipe"].get("generation")
        self._generation_eos_ids: list[int] = manifest["teacher"].get("generation_eos_ids", [])
        self._shortest_cut = shortest_cut(manifest)
        self._previous: tuple[str, int] | None = None
        self._seen: set[tuple[int, str]] = set()

    def check(self, table: pa.Table) -> None:
        rows = _Rows.of(table, self._layout)
        if isinstance(rows, str):
            self._add(0, rows)
            return
        ids, chunks = table["id"].to_pylist(), table["chunk_index"].to_pylist()
        self._check_order(ids, chunks)
        if self._generation:
            for wrong, message in broken_completions(
                rows.columns,
                rows.starts,
                rows.ends,
                generation=self._generation,
                eos_ids=self._generation_eos_ids,
            ):
                self._add_where(rows, np.flatnonzero(wrong), message)
            surprise = surprise_beyond_entropy(rows.columns)
            self._surprise += float(np.nansum(surprise))
            self._surprise_squares += float(np.nansum(surprise**2))
            self._written += len(surprise)
        targets = self._targets(rows, ids, chunks)
        size = max(1, VALUES_AT_ONCE // self._layout.widest)
        with np.errstate(invalid="ignore", over="ignore"):  # of forged values
            for where in (rows.kept, rows.left_out):
                for start in range(0, len(where), size):
                    part = where[start : start + size]
                    stored = rows.at(where, slice(start, start + size))
                    for wrong, message in broken(stored, targets[part], self._layout):
                        self._add_where(rows, part[np.flatnonzero(wrong)], message)
                    self._sum(stored)
        self._seen.clear()
        self.tokens += len(targets)
        self._first_row += table.num_rows

    def _sum(self, stored: dict[str, Array]) -> None:
        logprobs = stored.get("logprobs", stored.get("topk_logprobs"))
        entropy, target = (stored[n].astype(np.float64) for n in ("entropy", "target_logprob"))
        mask = stored.get("completion_mask")
        self._sums += Sums(
            entropy=float(entropy.sum()),
            topk_mass=0 if logprobs is None else float(np.exp(logprobs.astype(np.float64)).sum()),
            target_nll=float(-np.nansum(target)),
            targets=int((~np.isnan(target)).sum()),
            completion_tokens=None if mask is None else int(mask.sum()),
        )
        if logprobs is None:
            return
        self._kept += len(logprobs)
        if self._layout.tail_samples:
            surplus = sampled_entropy(stored) - entropy
            self._surplus += float(surplus.sum())
            self._surplus_squares += float((surplus**2).sum())

    def finish(self, record: ShardRecord) -> None:
        for name, found, expected in (
            ("rows", self._first_row, record.rows),
            ("tokens", self.tokens, record.tokens),
        ):
            if found != expected:
                self.problems.append(
                    f"{self._file}: has {found:,} {name}, the manifest says {expected:,}"
                )
        limit = DRAWS_SIGMAS * self._surplus_squares**0.5 + DRAWS_TOLERANCE * self._kept
        if not abs(self._surplus) <= limit:
            self.problems.append(
                f"{self._file}: the draws are not from the tail: with them the entropy is {self._surplus / self._kept:+.3f} nats "
                f"off on average, where chance explains {limit / self._kept:.3f}"
            )
        self._check_surprise()
        names = ["entropy", "topk_mass", "target_nll"]
        if self._layout.completion_mask:
            names.append("completion_tokens")
        for name in names:
            found_sum, expected_sum = (getattr(s, name) or 0 for s in (self._sums, record.sums))
            if not np.isclose(found_sum, expected_sum, rtol=1e-6, atol=1e-3):
                self.problems.append(
                    f"{self._file}: sum of {name} is {found_sum:.3f}, the manifest says {expected_sum:.3f}"
                )

    def _check_surprise(self) -> None:
        """Completions that were drawn from the stored distribution itself are as surprising as its entropy says."""
        generation = self._generation
        if not generation or generation["temperature"] != 1 or generation["top_p"] != 1:
            return
        limit = DRAWS_SIGMAS * self._surprise_squares**0.5 + SURPRISE_TOLERANCE * self._written
        if not abs(self._surprise) <= limit:
            self.problems.append(
                f"{self._file}: the completions were not drawn from the stored distributions: their tokens are "
                f"{self._surprise / self._written:+.3f} nats more surprising than the entropy says, where chance explains "
                f"{limit / self._written:.3f}"
            )

    def _add(self, row: int, message: str) -> None:
        self.problems.append(f"{self._file} row {self._first_row + row}: {message}")

    def _add_where(self, rows: "_Rows", positions: Any, message: str) -> None:
        """One line for each row that has wrong positions."""
        for row, position in {int(rows.row_of[i]): int(i) for i in positions[::-1]}.items():
            if (row, message) not in self._seen:
                self._seen.add((row, message))
                self._add(row, f"{message} (position {position - int(rows.starts[row])})")

    def _check_order(self, ids: list[str], chunks: list[int]) -> None:
        for row, current in enumerate(zip(ids, chunks, strict=True)):
            if current[1] != 0 and self._previous != (current[0], current[1] - 1):
                self._add(
                    row,
                    f"chunk {current[1]} of {current[0]!r} does not follow chunk {current[1] - 1}",
                )
            self._previous = current

    def _targets(self, rows: "_Rows", ids: list[str], chunks: list[int]) -> npt.NDArray[np.int64]:
        """The token that follows each position, −1 where the file does not tell."""
        targets = np.append(rows.input_ids[1:], -1).astype(np.int64)
        for row, last in enumerate(rows.ends - 1):
            next_row = row + 1
            if next_row == len(ids):
                targets[last] = -1  # its next chunk, if there is one, is in the next row group
            elif ids[next_row] == ids[row] and chunks[next_row] == chunks[row] + 1:
                targets[last] = rows.input_ids[rows.starts[next_row] + len(self._prefix)]
            elif self._eos is None or rows.ends[row] - rows.starts[row] >= self._shortest_cut:
                targets[last] = -1
            else:
                targets[last] = self._eos
        return targets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some rows as flat arrays over all their positions."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int64]
    columns: dict[str, Array]
    """Every column of one or several values a token, in its stored type; those of several hold positions in the loss mask only."""
    kept: npt.NDArray[np.int64]
    """Positions that have several values, in order: all of them, but with `completions_only`."""
    left_out: npt.NDArray[np.int64]
    """The others."""

    def at(self, where: npt.NDArray[np.int64], part: slice) -> dict[str, Array]:
        """The columns that there are at a part of the positions `where`: `kept` or `left_out`."""
        stored = {n: v[where[part]] for n, v in self.columns.items() if v.ndim == 1}
        if where is self.kept:
            stored |= {n: v[part] for n, v in self.columns.items() if v.ndim == 2}
        return stored

    @classmethod
    def of(cls, table: pa.Table, layout: Layout) -> "_Rows | str":
        """The arrays, or what is wrong with the table's shapes."""
        if any(column.null_count for column in table.columns):
            return "a value is null"
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        if not lengths.all():
            return "a row has no tokens"
        ends = lengths.cumsum()
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        is_kept = np.ones(len(row_of), np.bool_)
        if layout.completions_only:
            mask = table["completion_mask"].combine_chunks()
            if not np.array_equal(mask.value_lengths().to_numpy(), lengths):
                return "completion_mask and input_ids have different lengths"
            is_kept = loss_mask(nested_values(mask))
            is_kept[ends - 1] = False
        kept_lengths = np.bincount(row_of[is_kept], minlength=len(lengths))
        per_token = [column for column in columns(layout) if column.shape]
        for column in per_token:
            lists = table[column.name].combine_chunks()
            is_cut = column.shape.startswith("C,")
            if not np.array_equal(
                lists.value_lengths().to_numpy(), kept_lengths if is_cut else lengths
            ):
                what = "the completions of completion_mask" if is_cut else "input_ids"
                return f"{column.name} and {what} have different lengths"
            inner, width = lists.flatten(), layout.width(column)
            if inner.null_count or (
                pa.types.is_list(inner.type)
                and not (inner.value_lengths().to_numpy() == width).all()
            ):
                return f"{column.name} does not have {width} values a token"
        values = {column.name: nested_values(table[column.name]) for column in per_token}
        return cls(
            starts=ends - lengths,
            ends=ends,
            row_of=row_of,
            input_ids=values["input_ids"].astype(np.int64),
            columns=values,
            kept=np.flatnonzero(is_kept),
            left_out=np.flatnonzero(~is_kept),
        )
