"""A data file → the rows in it that break an invariant of the schema, or do not follow each other.

In:   a file, and what its manifest says of it.
Out:  one line for each problem, added to a Report.

Cost: about 1 M tokens/s. A row group is in memory at a time, and none that unpacks to more than its size can hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from builder.card.charts import NOTHING, Measured, measure_table
from builder.dataset.manifest import ShardRecord, Sums
from builder.dataset.shards import column_bytes
from builder.dataset.tables import FlatRows
from builder.dataset.unpacking import check_unpacked_size
from builder.verify.documents import Documents
from builder.verify.invariants import (
    Array,
    broken,
    broken_completions,
    drawn_targets,
    sampled_entropy,
    surprise_beyond_entropy,
)
from logit_dataset.files import first_line
from logit_dataset.schema import Layout, arrow_schema, shortest_cut

VALUES_AT_ONCE = 2**22
"""Values of a column whose invariants are checked together: 32 MB in float64."""
DRAWS_SIGMAS, DRAWS_TOLERANCE = 6.0, 2e-3
"""How far the entropy by draws may be off in a file: standard errors, and nats a token for the rounding to float16."""
HITS_TOLERANCE = 0.05
"""Share by which following tokens may be drawn more or less often than they should: float16, and rounded logits that draws are made by."""

SURPRISE_TOLERANCE = 0.02
"""Nats a token by which completions may be more or less surprising than the entropy says: a teacher in 16 bits writes with other
rounding than it is captured with."""


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of verification."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """What is no problem, but should be known."""
    files: int = 0
    rows: int = 0
    tokens: int = 0
    measured: Measured = NOTHING
    """What the card's pictures show of the rows."""
    recomputed: dict[str, Any] | None = None


def check_shard(
    directory: Path,
    record: ShardRecord,
    manifest: Mapping[str, Any],
    report: Report,
    progress: Callable[[int], None] = lambda _: None,
    documents: Documents | None = None,
) -> bool:
    """Check the rows of one data file and add the findings to a report. Return whether all rows could be read.

    Args:
        directory: of the dataset.
        record: of the file; its hash is ignored.
        manifest: `recipe`, `teacher` and `row_fingerprint` of a manifest, and `schema_version`, if that is to be compared.
        report: receives the findings.
        progress: called with numbers of checked tokens.
        documents: has read the files before this one; None if these are unknown.
    """
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    path = directory / record.file
    alone = None if documents else Documents(manifest, is_whole=False)
    documents = documents or alone
    assert documents
    documents.begin(record)
    checker = _RowChecker(record.file, manifest, layout, documents)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if problem := _wrong_file(file, record, manifest, layout):
            report.problems.append(f"{record.file}: {problem}")
            documents.skip()
            return False
        for index in range(file.num_row_groups):
            check_unpacked_size(path, file.metadata, index)
            table = file.read_row_group(index)
            table.validate(full=True)
            before = checker.tokens
            checker.check(table)
            report.rows += table.num_rows
            progress(checker.tokens - before)
    except (pa.ArrowException, OSError, ValueError) as error:
        report.problems += checker.problems
        report.problems.append(f"{record.file}: cannot be read ({first_line(error)})")
        documents.skip()
        return False
    checker.finish(record)
    if checker.has_all_rows:
        documents.end(record)
    else:
        documents.skip()
    report.tokens += checker.tokens
    report.problems += checker.problems
    report.measured += checker.measured
    report.problems += alone.problems if alone else []
    return checker.has_all_rows


def _wrong_file(
    file: pq.ParquetFile, record: ShardRecord, manifest: Mapping[str, Any], layout: Layout
) -> str | None:
    """Why the rows of a file need not be looked at: it is another one than its record says."""
    if not file.schema_arrow.equals(arrow_schema(layout)):
        return "its columns are not those of the schema"
    metadata = file.schema_arrow.metadata or {}
    found = metadata.get(b"logit_dataset.row_fingerprint", b"").decode(errors="replace")
    if found != manifest.get("row_fingerprint"):
        return "is of another recipe, source or schema (its row_fingerprint is not the manifest's)"
    version = metadata.get(b"logit_dataset.schema", b"").decode(errors="replace")
    if version and version != manifest.get("schema_version", version):
        return f"is of schema {version}, the manifest of {manifest['schema_version']}"
    footer = file.metadata
    ids = [i for i, name in enumerate(_leaves(footer)) if name.startswith("input_ids.")]
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    tokens = sum(group.column(ids[0]).num_values for group in groups)
    for name, count, expected in (
        ("rows", footer.num_rows, record.rows),
        ("tokens", tokens, record.tokens),
    ):
        if count != expected:
            return f"has {count:,} {name}, the manifest says {expected:,}"
    if record.column_bytes is not None and (sizes := column_bytes(footer)) != record.column_bytes:
        wrong = next(n for n in {**sizes, **record.column_bytes} if sizes.get(n) != record.column_bytes.get(n))  # fmt: skip
        return f"column {wrong} takes {sizes.get(wrong)} bytes, the manifest says {record.column_bytes.get(wrong)}"
    return None


def _leaves(footer: pq.FileMetaData) -> list[str]:
    return [footer.schema.column(i).path for i in range(footer.num_columns)]


class _RowChecker:
    """Checks the rows of one file, row group by row group."""

    def __init__(
        self, file: str, manifest: Mapping[str, Any], layout: Layout, documents: Documents
    ) -> None:
        self.problems: list[str] = []
        self.tokens = 0
        self.has_all_rows = True
        """Whether the shapes of all tables were right, so that their values could be looked at."""
        self.measured = NOTHING
        self._documents = documents
        self._file = file
        self._first_row = 0
        self._sums = Sums()
        self._layout = layout
        self._surplus = self._surplus_squares = 0.0
        self._surprise = self._surprise_squares = 0.0
        self._hits = self._expected_hits = self._hits_variance = 0.0
        self._kept = self._written = 0
        self._eos: int | None = manifest["teacher"]["eos_token_id"]
        self._prefix: list[int] = manifest["teacher"]["prefix_ids"]
        self._suffix: list[int] = manifest["teacher"]["suffix_ids"]
        self._is_of_chats = bool(manifest["recipe"]["corpus"].get("messages_column"))
        self._generation: dict[str, Any] | None = manifest["recipe"].get("generation")
        self._generation_eos_ids: list[int] = manifest["teacher"].get("generation_eos_ids", [])
        self._shortest_cut = shortest_cut(manifest)
        self._ended = 0
        self._seen: set[tuple[int, str]] = set()

    def check(self, table: pa.Table) -> None:
        rows = FlatRows.of(table, self._layout)
        if isinstance(rows, str):
            self._add(0, rows)
            self.has_all_rows = False
            self._first_row += table.num_rows
            return
        ids, chunks = table["id"].to_pylist(), table["chunk_index"].to_pylist()
        self._documents.check(table, rows.ends - rows.starts, self._first_row, self._add)
        if self._generation:
            self._check_completions(rows)
        if self._prefix or self._suffix:
            self._check_special(rows, ids, chunks)
        targets = self._targets(rows, ids, chunks)
        size = max(1, VALUES_AT_ONCE // self._layout.widest)
        with np.errstate(invalid="ignore", over="ignore"):  # of forged values
            for where in (rows.kept, rows.left_out):
                for start in range(0, len(where), size):
                    part = where[start : start + size]
                    stored = rows.at(where, slice(start, start + size))
                    for wrong, message in broken(stored, targets[part], self._layout):
                        self._add_where(rows, part[np.flatnonzero(wrong)], message)
                    self._sum(stored, targets[part])
        if not self.problems:
            self.measured += measure_table(table)
        self._seen.clear()
        self.tokens += len(targets)
        self._first_row += table.num_rows

    def _check_completions(self, rows: FlatRows) -> None:
        assert self._generation
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
        self._ended += int(np.isin(rows.input_ids[rows.ends - 1], self._generation_eos_ids).sum())

    def _check_special(self, rows: FlatRows, ids: list[str], chunks: list[int]) -> None:
        """The special tokens that the manifest names stand before each text, and behind each document."""
        for row, (start, end) in enumerate(zip(rows.starts, rows.ends, strict=True)):
            of_row = rows.input_ids[start:end]
            first = len(self._prefix)
            # A template writes what a chat begins and ends with.
            if not (self._is_of_chats and chunks[row] == 0) and of_row[:first].tolist() != self._prefix:  # fmt: skip
                self._add(
                    row, f"does not begin with the tokens {self._prefix} (teacher.prefix_ids)"
                )
            goes_on = row + 1 == len(ids) or (ids[row + 1], chunks[row + 1]) == (ids[row], chunks[row] + 1)  # fmt: skip
            if not self._suffix or goes_on or self._generation or self._is_of_chats:
                continue
            is_cut = end - start >= self._shortest_cut
            if not is_cut and of_row[-len(self._suffix) :].tolist() != self._suffix:
                self._add(
                    row,
                    f"its document does not end with the tokens {self._suffix} (teacher.suffix_ids)",
                )

    def _sum(self, stored: dict[str, Array], targets: npt.NDArray[np.int64]) -> None:
        logprobs = stored.get("logprobs", stored.get("topk_logprobs"))
        entropy, target = (stored[n].astype(np.float64) for n in ("entropy", "target_logprob"))
        mask = stored.get("completion_mask")
        self._sums += Sums(
            entropy=float(entropy.sum()),
            topk_mass=0 if logprobs is None else float(np.exp(logprobs.astype(np.float64)).sum()),
            target_nll=float(-np.nansum(target)),
            targets=int((~np.isnan(target)).sum()),
            completion_tokens=None if mask is None else int(mask.sum()),
            kept=0 if logprobs is None else len(logprobs),
        )
        if logprobs is None:
            return
        self._kept += len(logprobs)
        if self._layout.tail_samples and self._layout.tail_logprobs:
            surplus = sampled_entropy(stored) - entropy
            self._surplus += float(surplus.sum())
            self._surplus_squares += float((surplus**2).sum())
        elif self._layout.tail_samples:
            found, expected, variance = (float(v.sum()) for v in drawn_targets(stored, targets))
            self._hits += found
            self._expected_hits += expected
            self._hits_variance += variance

    def finish(self, record: ShardRecord) -> None:
        if not self.has_all_rows:
            return
        limit = DRAWS_SIGMAS * self._surplus_squares**0.5 + DRAWS_TOLERANCE * self._kept
        if not abs(self._surplus) <= limit:
            self.problems.append(
                f"{self._file}: the draws are not from the tail: with them the entropy is {self._surplus / self._kept:+.3f} nats "
                f"off on average, where chance explains {limit / self._kept:.3f}"
            )
        self._check_hits()
        self._check_surprise()
        names = ["entropy", "topk_mass", "target_nll", "targets"]
        if self._layout.completion_mask:
            names.append("completion_tokens")
        if self._layout.completions_only:
            names.append("kept")
        for name in names:
            found_sum, expected_sum = (getattr(s, name) or 0 for s in (self._sums, record.sums))
            rtol, atol = (1e-6, 1e-3) if isinstance(found_sum, float) else (0, 0)
            if not np.isclose(found_sum, expected_sum, rtol=rtol, atol=atol):
                self.problems.append(
                    f"{self._file}: sum of {name} is {found_sum:.3f}, the manifest says {expected_sum:.3f}"
                )
        if record.completions and self._ended != record.completions.ended:
            self.problems.append(
                f"{self._file}: {self._ended:,} completions end with a token that ends a text, the manifest says "
                f"{record.completions.ended:,}"
            )

    def _check_hits(self) -> None:
        """Draws are the token that really follows as often as its own log-probability says: what is known of draws without theirs."""
        # Bernstein's inequality for independent draws, with the chance of DRAWS_SIGMAS standard errors; of few it allows more.
        rare = DRAWS_SIGMAS**2 / 6
        chance = rare + (rare**2 + DRAWS_SIGMAS**2 * self._hits_variance) ** 0.5
        off = abs(self._hits - self._expected_hits)
        if not off <= chance + HITS_TOLERANCE * self._expected_hits:
            self.problems.append(
                f"{self._file}: the draws are not from the tail: the token that follows was drawn {self._hits:,.0f} times, where its "
                f"probability says {self._expected_hits:,.0f}, and chance explains {chance:,.0f} more or less"
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

    def _add_where(self, rows: FlatRows, positions: Any, message: str) -> None:
        """One line for each row that has wrong positions."""
        for row, position in {int(rows.row_of[i]): int(i) for i in positions[::-1]}.items():
            if (row, message) not in self._seen:
                self._seen.add((row, message))
                self._add(row, f"{message} (position {position - int(rows.starts[row])})")

    def _targets(self, rows: FlatRows, ids: list[str], chunks: list[int]) -> npt.NDArray[np.int64]:
        """The token that follows each position, −1 where the file does not tell."""
        targets = np.append(rows.input_ids[1:], -1).astype(np.int64)
        for row, last in enumerate(rows.ends - 1):
            next_row = row + 1
            if next_row == len(ids):
                targets[last] = -1  # its next chunk, if there is one, is in the next row group
            elif ids[next_row] == ids[row] and chunks[next_row] == chunks[row] + 1:
                place = rows.starts[next_row] + len(self._prefix)
                targets[last] = rows.input_ids[place] if place < rows.ends[next_row] else -1
            elif self._eos is None or rows.ends[row] - rows.starts[row] >= self._shortest_cut:
                targets[last] = -1
            else:
                targets[last] = self._eos
        return targets
