"""Random rows of a dataset → how far they are from what the teacher says when it is run on them again.

The comparison shares only the teacher's forward pass with the capture: the reference here is a plain float64
log-softmax over the whole vocabulary, one sequence at a time.

Shape suffixes: T positions, C those that were kept, V vocabulary, K top-k, M draws from the tail, D hidden.
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
from builder.generation import spell_completion
from builder.loading import load_tokenizer
from builder.manifest import ShardRecord
from builder.ranks import load
from builder.recipe import SequencesRecipe, TeacherRecipe, differences
from builder.schema import (
    FLOAT16_MIN,
    Layout,
    columns,
    float16_rounding,
    is_generated,
    kept_positions,
    shortest_cut,
    temperature_column,
)
from builder.sequences import NO_TOKEN, Encoder, backend_copy
from builder.shards import nested_values
from builder.sources import KnownSources, TeacherSource, resolve_teacher
from builder.teacher import Teacher

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
    """Every other column of one or several values a token, in its stored type; those of several may hold kept positions only."""
    kept_T: Tensor
    """[T] bool: positions of which columns of several values are there."""

    def at(self, here: slice) -> dict[str, Tensor]:
        """The columns at some positions, as float64 or int64."""
        first, stop = (int(self.kept_T[:end].sum()) for end in (here.start, here.stop))
        parts = {
            name: values[here] if values.ndim == 1 else values[first:stop]
            for name, values in self.columns.items()
        }
        return {
            name: v.double() if v.is_floating_point() else v.long() for name, v in parts.items()
        }


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

    spells = _spelling_of(manifest, teacher.tokenizer)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    problems: list[str] = []
    errors: list[Tensor] = []
    totals: dict[str, float] = defaultdict(float)
    elsewhere = elsewhere or {}
    for row in _choose_rows(directory, manifest, records, count, seed, layout, elsewhere):
        where = f"{row.file} row {row.number}"
        if row.text is not None and row.is_whole_document and not spells(row.text, row.input_ids):
            problems.append(
                f"{where}: input_ids are not what the teacher's tokenizer makes of the text"
            )
        if row.text is not None and is_generated(manifest["recipe"]):
            problems += _check_prompt(row, spells, teacher, where)
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
        "top1_agreement": totals["top1"] / max(totals["kept"], 1),
        "nll_stored": totals["nll_stored"] / max(totals["targets"], 1),
        "nll_recomputed": totals["nll_recomputed"] / max(totals["targets"], 1),
    }
    return statistics, problems


def _spelling_of(manifest: dict[str, Any], tokenizer: Any) -> Callable[[str, list[int]], bool]:
    """Whether some token ids are those of a whole document's text, or of a prompt's.

    Of a chat, special tokens in the text are these, unless a message holds what looks like one: then the text alone does not tell,
    and any ids are taken.
    """
    sequences = SequencesRecipe.model_validate(manifest["recipe"]["sequences"])
    if manifest["recipe"]["corpus"].get("messages_column"):
        backend, added = backend_copy(tokenizer, match_special=True), tokenizer.added_tokens_decoder

        def spells_chat(text: str, ids: list[int]) -> bool:
            found = backend.encode(text, add_special_tokens=False).ids
            counts = [sum(token in added for token in some) for some in (found, ids)]
            return found == ids or counts[0] != counts[1]

        return spells_chat
    encoder = Encoder(
        tokenizer,
        max_length=sequences.max_length,
        long_documents=sequences.long_documents,
        bos=sequences.bos,
        eos=sequences.eos,
    )
    if is_generated(manifest["recipe"]):
        return lambda text, ids: _prompt_ids(encoder, text) == ids
    return lambda text, ids: encoder.encode(Document(id="", text=text))[0].token_ids == ids


def _prompt_ids(encoder: Encoder, text: str) -> list[int]:
    prompt = encoder.encode_prompt(Document(id="", text=text))
    return prompt.token_ids if prompt else []


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


def _check_prompt(
    row: _Row, spells: Callable[[str, list[int]], bool], teacher: Teacher, where: str
) -> list[str]:
    """Whether a prompt and its completion by the teacher are what the text says."""
    num_prompt = int((~row.columns["completion_mask"].bool()).sum())
    written = spell_completion(teacher.tokenizer, row.input_ids, num_prompt)
    assert row.text is not None
    if not row.text.endswith(written):
        return [f"{where}: the text does not end with what the completion's tokens spell"]
    if not spells(row.text[: len(row.text) - len(written)], row.input_ids[:num_prompt]):
        return [f"{where}: input_ids are not what the teacher's tokenizer makes of the prompt"]
    return []


def _choose_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    count: int,
    seed: int,
    layout: Layout,
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
                    columns=_tensors(values, layout),
                    kept_T=_kept(values, layout),
                )
            )
    return rows


def _tensors(values: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    tensors = {}
    for column in columns(layout):
        if column.shape and column.name != "input_ids":
            array: np.ndarray[Any, Any] = values[column.name].copy()
            if "," in column.shape:
                array = array.reshape(-1, layout.width(column))  # where none is kept, too
            tensors[column.name] = torch.from_numpy(array)
    return tensors


def _kept(values: dict[str, Any], layout: Layout) -> Tensor:
    mask = np.ones(len(values["input_ids"]), np.bool_)
    return torch.from_numpy(
        kept_positions(values["completion_mask"]) if layout.completions_only else mask
    )


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
        stored, kept_T = row.at(here), row.kept_T[here]
        known = targets_T[here] != NO_TOKEN
        compared = {
            "target_logprob": (stored["target_logprob"][known], target_T[known]),
            "entropy": (stored["entropy"], entropy_T),
            **_head(stored, logprobs_TV, layout, kept_T),
        }
        for name, (found, expected) in compared.items():
            errors[name].append(_beyond_rounding(found, expected))
        errors["logsumexp"].append(stored["logsumexp"] - logits_TV.logsumexp(-1))
        for name, error in _added(stored, logits_TV, teacher, layout, kept_T):
            errors[name].append(error)
        best_TK, expected_TK = _best(stored, logprobs_TV[kept_T])
        errors["missing from the top K"].append(best_TK - expected_TK)
        name = "logprobs" if layout.top_k == "all" else "topk_logprobs"
        found, expected = compared[name]
        raw.append((found - expected.clamp(min=FLOAT16_MIN)).flatten())
        totals["tokens"] += len(logits_TV)
        totals["targets"] += int(known.sum())
        totals["kept"] += len(best_TK)
        totals["top1"] += int((best_TK[:, 0] - expected_TK[:, 0] < 1e-9).sum())
        totals["nll_stored"] -= float(stored["target_logprob"][known].sum())
        totals["nll_recomputed"] -= float(target_T[known].sum())
    for name, parts in errors.items():
        if problem := _too_far(name, torch.cat(parts).abs(), dtype):
            problems.append(f"{where}: {problem}")
    return torch.cat(raw)


def _head(
    stored: dict[str, Tensor], logprobs_TV: Tensor, layout: Layout, kept_T: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The columns of the top K, or of the whole vocabulary: (stored, expected) of each."""
    if layout.top_k == "all":
        return {"logprobs": (stored["logprobs"], logprobs_TV[kept_T])}
    # Where no top K was kept, the tail is what is outside the teacher's own.
    indices_TK = logprobs_TV.topk(layout.top_k).indices
    indices_TK[kept_T] = stored["topk_indices"]
    rest_TV = logprobs_TV.scatter(1, indices_TK, -torch.inf)
    return {
        "topk_logprobs": (
            stored["topk_logprobs"],
            logprobs_TV[kept_T].gather(1, stored["topk_indices"]),
        ),
        "tail_logprob": (stored["tail_logprob"], rest_TV.logsumexp(-1)),
    }


def _added(
    stored: dict[str, Tensor],
    logits_TV: Tensor,
    teacher: Teacher,
    layout: Layout,
    kept_T: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Errors of the columns that a recipe may add."""
    logprobs_CV = logits_TV[kept_T].log_softmax(-1)
    if layout.tail_samples:
        gone_C1 = (stored["tail_logprob"][kept_T] <= FLOAT16_MIN)[:, None]
        drawn_CM = logprobs_CV.gather(1, stored["tail_indices"]).masked_fill(gone_C1, -torch.inf)
        yield "tail_logprobs", _beyond_rounding(stored["tail_logprobs"], drawn_CM)
    for temperature in layout.temperatures:
        name = temperature_column(temperature).name
        yield name, stored[name] - (logits_TV / temperature).logsumexp(-1)
    if layout.hidden_states and len(logprobs_CV):
        pieces = teacher.head(stored["hidden_states"].to(teacher.device, teacher.dtype))
        rebuilt_CV = torch.cat(list(pieces)).cpu().double().log_softmax(-1)
        yield REBUILT, _divergence(logprobs_CV, rebuilt_CV)


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
