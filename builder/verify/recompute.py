"""Random rows of a dataset → how far they are from what the teacher says when it is run on them again.

The comparison shares only the teacher's forward pass with the capture. It takes one sequence at a time.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from builder.capture.generation import spell_completion
from builder.corpus.documents import Document
from builder.corpus.sequences import Encoder, backend_copy
from builder.dataset.identity import teacher_differences
from builder.dataset.lookup import read_row, teacher_source, what_follows
from builder.dataset.manifest import ShardRecord
from builder.recipe import SequencesRecipe, TeacherRecipe
from builder.sources.opening import open_teacher
from builder.teacher.model import Teacher
from builder.verify.comparison import MAX_BIAS, StoredRow, compare
from logit_dataset.schema import Layout, columns, is_generated, loss_mask


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
    teacher = open_teacher(recipe, source, device=device)
    _check_teacher(manifest["teacher"], teacher)
    spells = _spelling_of(manifest, teacher.tokenizer)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    problems: list[str] = []
    errors: list[Tensor] = []
    totals: dict[str, float] = defaultdict(float)
    elsewhere = elsewhere or {}
    for row in _choose_rows(directory, manifest, records, count, seed, layout, elsewhere):
        if row.text is not None and row.is_whole_document and not spells(row.text, row.input_ids):
            problems.append(
                f"{row.where}: input_ids are not what the teacher's tokenizer makes of the text"
            )
        if row.text is not None and is_generated(manifest["recipe"]):
            problems += _check_prompt(row, row.text, spells, teacher)
        row_errors, row_problems = compare(row, teacher, layout, recipe.dtype, totals)
        errors.append(row_errors)
        problems += row_problems
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


def _check_teacher(recorded: dict[str, Any], teacher: Teacher) -> None:
    """See that a loaded teacher is what a manifest says.

    Raises:
        ValueError: it is not; where token ids are not the teacher's own, how that came about.
    """
    found = teacher.provenance()
    recorded = {key: value for key, value in recorded.items() if key in found}
    origin = teacher.origin
    if origin and origin.replaced_sha256 == recorded.get("tokenizer_sha256"):
        if origin.keeps_ids:  # and says otherwise what makes none
            for key in ("tokenizer_sha256", "tokenizer_vocab_size"):
                found[key] = recorded.get(key)
        else:
            raise ValueError(
                "the dataset was built by a version that took the tokenizer as transformers makes it, so that its token ids may be others than "
                f"those that the teacher knows; build it again ({'; '.join(origin.notices)})"
            )
    if changes := [f"teacher.{change}" for change in teacher_differences(recorded, found)]:
        raise ValueError(f"the teacher at hand is not the dataset's: {'; '.join(changes)}")


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


def _check_prompt(
    row: StoredRow, text: str, spells: Callable[[str, list[int]], bool], teacher: Teacher
) -> list[str]:
    """Whether a prompt and its completion by the teacher are what the text says."""
    num_prompt = int((~row.columns["completion_mask"].bool()).sum())
    written = spell_completion(teacher.tokenizer, row.input_ids, num_prompt)
    if not text.endswith(written):
        return [f"{row.where}: the text does not end with what the completion's tokens spell"]
    if not spells(text[: len(text) - len(written)], row.input_ids[:num_prompt]):
        return [f"{row.where}: input_ids are not what the teacher's tokenizer makes of the prompt"]
    return []


def _choose_rows(
    directory: Path,
    manifest: dict[str, Any],
    records: list[ShardRecord],
    count: int,
    seed: int,
    layout: Layout,
    elsewhere: Mapping[str, Callable[[], Any]],
) -> list[StoredRow]:
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
                StoredRow(
                    where=f"{record.file} row {number}",
                    is_whole_document=is_end and values["chunk_index"] == 0,
                    text=values.get("text"),
                    input_ids=values["input_ids"],
                    next_token=next_token,
                    columns=_tensors(values, layout),
                    mask_T=torch.from_numpy(_mask(values, layout)),
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


def _mask(values: dict[str, Any], layout: Layout) -> npt.NDArray[np.bool_]:
    if layout.completions_only:
        return loss_mask(values["completion_mask"])
    return np.ones(len(values["input_ids"]), np.bool_)
