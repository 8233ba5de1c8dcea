"""Random rows of a dataset → how far they are from what the teacher says when it is run on them again.

The comparison shares only the teacher's forward pass with the capture: the reference here is a plain float64
log-softmax over the whole vocabulary, one sequence at a time.

Shape suffixes: T positions, V vocabulary, K top-k, M draws from the tail, D hidden.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from builder.corpus import Document
from builder.manifest import ShardRecord
from builder.ranks import load
from builder.recipe import SequencesRecipe, TeacherRecipe, differences
from builder.schema import FLOAT16_MIN, Layout, float16_rounding, shortest_cut, temperature_column
from builder.sequences import NO_TOKEN, Encoder
from builder.shards import nested_values
from builder.sources import KnownSources, TeacherSource, resolve_teacher
from builder.teacher import Teacher, load_tokenizer

MAX_FLOAT32_ERROR = 2e-3
"""Nats beyond float16 rounding, for a teacher run in float32: kernels differ between batch shapes and machines."""
MAX_MEAN_ERROR = 0.15
"""Mean |Δ| of a row in nats, for a teacher in 16 bits: its own rounding is about 0.05."""
MAX_BIAS = 0.01
"""|mean Δ| over all rows in nats, for a teacher in 16 bits: rounding has no direction, a renormalised tail has."""

MAX_DIVERGENCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Mean KL of a row in nats, from the teacher to the distribution that its head makes of the stored hidden states."""
REBUILT = "the distribution of hidden_states"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One stored row, and the token that follows its last one."""

    file: str
    number: int
    is_whole_document: bool
    text: str | None
    input_ids: list[int]
    next_token: int
    columns: dict[str, Tensor]
    """Every other column of one or several values a token, in its stored type."""


def recompute_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    *,
    count: int,
    seed: int,
    device: str,
    teacher_path: Path | None,
    elsewhere: Mapping[str, Callable[[], Any]] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Run the teacher on `count` random rows: (statistics over all of them, one line for each problem).

    Raises:
        ValueError: the teacher at hand is not the one that the manifest names.
    """
    source = teacher_source(manifest, teacher_path)
    recipe = TeacherRecipe.model_validate(manifest["recipe"]["teacher"])
    teacher = load(recipe, source, device=device)
    found = teacher.provenance()
    recorded = {key: manifest["teacher"].get(key) for key in found}
    if changes := differences(recorded, found, "teacher"):
        raise ValueError(f"the teacher at hand is not the dataset's: {'; '.join(changes)}")

    sequences = SequencesRecipe.model_validate(manifest["recipe"]["sequences"])
    encoder = Encoder(
        teacher.tokenizer,
        max_length=sequences.max_length,
        long_documents=sequences.long_documents,
        bos=sequences.bos,
        eos=sequences.eos,
    )
    layout = Layout.of(manifest["recipe"]["output"], manifest["teacher"])
    problems: list[str] = []
    errors: list[Tensor] = []
    totals: dict[str, float] = defaultdict(float)
    for row in _choose_rows(directory, manifest, records, count, seed, elsewhere or {}):
        where = f"{row.file} row {row.number}"
        if row.text is not None and row.is_whole_document:
            encoded = encoder.encode(Document(id="", text=row.text))
            if encoded[0].token_ids != row.input_ids:
                problems.append(
                    f"{where}: input_ids are not what the teacher's tokenizer makes of the text"
                )
        errors.append(_compare(row, teacher, layout, where, recipe.dtype, problems, totals))
    all_errors = torch.cat(errors)
    if recipe.dtype != "float32" and abs(bias := float(all_errors.mean())) > MAX_BIAS:
        problems.append(
            f"log-probabilities are {bias:+.3f} nats off on average over all recomputed rows"
        )
    statistics = {
        "rows": len(errors),
        "seed": seed,
        "tokens": int(totals["tokens"]),
        "max_abs_error": float(all_errors.abs().max()),
        "mean_abs_error": float(all_errors.abs().mean()),
        "top1_agreement": totals["top1"] / totals["tokens"],
        "nll_stored": totals["nll_stored"] / max(totals["targets"], 1),
        "nll_recomputed": totals["nll_recomputed"] / max(totals["targets"], 1),
    }
    return statistics, problems


def teacher_source(manifest: dict[str, Any], teacher_path: Path | None = None) -> TeacherSource:
    """Where to load a dataset's teacher from.

    Raises:
        ValueError: it cannot be found, or is another one than the manifest names.
    """
    values = dict(manifest["recipe"]["teacher"])
    if teacher_path is not None:
        if not (values["path"] or values["gguf"]):
            raise ValueError(
                "--teacher is for datasets of a local teacher; this one's is found by its name"
            )
        values["gguf" if values["gguf"] else "path"] = str(teacher_path.absolute())
    if values["repo"]:
        values["revision"] = manifest["teacher"]["commit"]
    try:
        source = resolve_teacher(TeacherRecipe.model_validate(values), Path(), KnownSources())
    except ValueError as error:
        hint = "; name it with --teacher PATH" if values["path"] or values["gguf"] else ""
        raise ValueError(f"{error}{hint}") from None
    recorded = {key: manifest["teacher"].get(key) for key in source.provenance}
    changes = differences(recorded, source.provenance, "teacher")
    if changes := [change for change in changes if not change.startswith("teacher.name")]:
        raise ValueError(f"the teacher at hand is not the dataset's: {'; '.join(changes)}")
    return source


def dataset_tokenizer(manifest: dict[str, Any], teacher_path: Path | None = None) -> Any:
    """The tokenizer of a dataset's teacher.

    Raises:
        ValueError: it cannot be found, or is another one than the manifest names.
    """
    source = teacher_source(manifest, teacher_path)
    return load_tokenizer(source.location, commit=source.commit, tokenizer=source.tokenizer)


def what_follows(
    manifest: dict[str, Any], file: Any, number: int, row: dict[str, Any]
) -> tuple[int, bool]:
    """The token after the last one of a row, and whether the document certainly ends with the row.

    The token is NO_TOKEN where nothing follows, or where it is not known because the document may have been cut short.
    """
    try:
        following = read_row(file, number + 1, columns=["id", "chunk_index", "input_ids"])
    except IndexError:  # a file ends with a document
        following = {"id": None}
    if (following["id"], following.get("chunk_index")) == (row["id"], row["chunk_index"] + 1):
        return int(following["input_ids"][len(manifest["teacher"]["prefix_ids"])]), False
    if len(row["input_ids"]) >= shortest_cut(manifest):
        return NO_TOKEN, False
    eos = manifest["teacher"]["eos_token_id"]
    return NO_TOKEN if eos is None else int(eos), True


def _choose_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    count: int,
    seed: int,
    elsewhere: Mapping[str, Callable[[], Any]],
) -> list[_Row]:
    total = sum(record.rows for record in records)
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    rows, first = [], 0
    for record in records:
        numbers = [number - first for number in chosen if first <= number < first + record.rows]
        first += record.rows
        for number in numbers:
            opened = elsewhere.get(record.file, partial(Path, directory / record.file))
            values = read_row(opened(), number)
            next_token, is_end = what_follows(manifest, opened(), number, values)
            rows.append(
                _Row(
                    file=record.file,
                    number=number,
                    is_whole_document=is_end and values["chunk_index"] == 0,
                    text=values.get("text"),
                    input_ids=values["input_ids"],
                    next_token=next_token,
                    columns={
                        name: torch.from_numpy(column.copy())
                        for name, column in values.items()
                        if isinstance(column, np.ndarray)
                    },
                )
            )
    return rows


def read_row(file: Any, number: int, columns: list[str] | None = None) -> dict[str, Any]:
    """One row of a Parquet file (a path or an open file): strings and numbers as such, token ids as a list, the rest as arrays.

    Raises:
        IndexError: the file has no such row.
    """
    parquet = pq.ParquetFile(file)
    for group in range(parquet.num_row_groups):
        if number < parquet.metadata.row_group(group).num_rows:
            return _row_values(parquet.read_row_group(group, columns=columns).slice(number, 1))
        number -= parquet.metadata.row_group(group).num_rows
    raise IndexError(number)


def _row_values(table: pa.Table) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type) and name != "input_ids":
            values[name] = nested_values(column)
        else:
            values[name] = column.to_pylist()[0]
    return values


def _compare(
    row: _Row,
    teacher: Teacher,
    layout: Layout,
    where: str,
    dtype: str,
    problems: list[str],
    totals: dict[str, float],
) -> Tensor:
    """Δ of all stored log-probabilities of the head of a row, flat; adds to `problems` and `totals`."""
    targets_T = torch.tensor([*row.input_ids[1:], row.next_token])
    errors: dict[str, list[Tensor]] = defaultdict(list)
    raw: list[Tensor] = []
    start = 0
    for logits_TV in teacher.logits([row.input_ids]):
        here = slice(start, start + len(logits_TV))
        start += len(logits_TV)
        logits_TV = logits_TV.cpu().double()
        logprobs_TV = logits_TV.log_softmax(-1)
        target_T = logprobs_TV.gather(1, targets_T[here].clamp(min=0)[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV.clamp(min=FLOAT16_MIN)).sum(-1)
        stored = {
            name: values[here].double() if values.is_floating_point() else values[here].long()
            for name, values in row.columns.items()
        }
        known = targets_T[here] != NO_TOKEN
        compared = {
            "target_logprob": (stored["target_logprob"][known], target_T[known]),
            "entropy": (stored["entropy"], entropy_T),
            **_head(stored, logprobs_TV, layout),
        }
        for name, (found, expected) in compared.items():
            errors[name].append(_beyond_rounding(found, expected))
        errors["logsumexp"].append(stored["logsumexp"] - logits_TV.logsumexp(-1))
        hidden_TD = row.columns["hidden_states"][here] if layout.hidden_states else None
        for name, error in _added(stored, hidden_TD, logits_TV, teacher, layout):
            errors[name].append(error)
        best_TK, expected_TK = _best(stored, logprobs_TV)
        errors["missing from the top K"].append(best_TK - expected_TK)
        name = "logprobs" if layout.top_k == "all" else "topk_logprobs"
        found, expected = compared[name]
        raw.append((found - expected.clamp(min=FLOAT16_MIN)).flatten())
        totals["tokens"] += len(logits_TV)
        totals["targets"] += int(known.sum())
        totals["top1"] += int((best_TK[:, 0] - expected_TK[:, 0] < 1e-9).sum())
        totals["nll_stored"] -= float(stored["target_logprob"][known].sum())
        totals["nll_recomputed"] -= float(target_T[known].sum())
    for name, parts in errors.items():
        if problem := _too_far(name, torch.cat(parts).abs(), dtype):
            problems.append(f"{where}: {problem}")
    return torch.cat(raw)


def _head(
    stored: dict[str, Tensor], logprobs_TV: Tensor, layout: Layout
) -> dict[str, tuple[Tensor, Tensor]]:
    """The columns of the top K, or of the whole vocabulary: (stored, expected) of each."""
    if layout.top_k == "all":
        return {"logprobs": (stored["logprobs"], logprobs_TV)}
    indices_TK = stored["topk_indices"]
    rest_TV = logprobs_TV.scatter(1, indices_TK, -torch.inf)
    return {
        "topk_logprobs": (stored["topk_logprobs"], logprobs_TV.gather(1, indices_TK)),
        "tail_logprob": (stored["tail_logprob"], rest_TV.logsumexp(-1)),
    }


def _added(
    stored: dict[str, Tensor],
    hidden_TD: Tensor | None,
    logits_TV: Tensor,
    teacher: Teacher,
    layout: Layout,
) -> Iterator[tuple[str, Tensor]]:
    """Errors of the columns that a recipe may add."""
    logprobs_TV = logits_TV.log_softmax(-1)
    if layout.tail_samples:
        gone_T1 = (stored["tail_logprob"] <= FLOAT16_MIN)[:, None]
        drawn_TM = logprobs_TV.gather(1, stored["tail_indices"]).masked_fill(gone_T1, -torch.inf)
        yield "tail_logprobs", _beyond_rounding(stored["tail_logprobs"], drawn_TM)
    for temperature in layout.temperatures:
        name = temperature_column(temperature).name
        yield name, stored[name] - (logits_TV / temperature).logsumexp(-1)
    if hidden_TD is not None:
        pieces = teacher.head(hidden_TD.to(teacher.device, teacher.dtype))
        rebuilt_TV = torch.cat(list(pieces)).cpu().double().log_softmax(-1)
        yield REBUILT, _divergence(logprobs_TV, rebuilt_TV)


def _best(stored: dict[str, Tensor], logprobs_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of its own top K and of the stored one, by rank; where all are stored, of the first."""
    if "logprobs" in stored:
        stored_TV = stored["logprobs"]
        # Several may be the first once they are rounded.
        first_TV = logprobs_TV.masked_fill(stored_TV < stored_TV.amax(-1, keepdim=True), -torch.inf)
        return logprobs_TV.amax(-1, keepdim=True), first_TV.amax(-1, keepdim=True)
    indices_TK = stored["topk_indices"]
    best_TK = logprobs_TV.topk(indices_TK.shape[1]).values
    return best_TK, logprobs_TV.gather(1, indices_TK).sort(-1, descending=True).values


def _divergence(logprobs_TV: Tensor, rebuilt_TV: Tensor) -> Tensor:
    """KL(teacher ‖ rebuilt) at each position, [T]."""
    difference_TV = (logprobs_TV - rebuilt_TV).masked_fill(logprobs_TV == -torch.inf, 0)
    return (logprobs_TV.exp() * difference_TV).sum(-1)


def _too_far(name: str, errors: Tensor, dtype: str) -> str | None:
    """What to say of a column whose errors are too large."""
    if not errors.numel():
        return None
    if name == REBUILT:
        worst, limit = float(errors.mean()), MAX_DIVERGENCE[dtype]
    elif dtype == "float32":
        worst, limit = float(errors.max()), MAX_FLOAT32_ERROR
    else:
        worst, limit = float(errors.mean()), MAX_MEAN_ERROR
    if worst <= limit:
        return None
    return f"{name} is {worst:.3g} nats from the teacher's, more than {limit:g}"


def _beyond_rounding(stored: Tensor, expected: Tensor) -> Tensor:
    """How much further apart two values are than float16 rounding explains."""
    expected = expected.clamp(min=FLOAT16_MIN)
    rounding = torch.from_numpy(float16_rounding(expected.numpy()))
    return ((stored - expected).abs() - rounding).clamp(min=0)
