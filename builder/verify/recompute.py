"""Random rows of a dataset → how far they are from what the teacher says when it is run on them again.

The comparison shares only the teacher's forward pass with the capture.

How:  each row alone, in the dtype of the dataset. In float32 that is all. In 16 bits the noise of the teacher is measured on the same
      rows: against itself in batches, and against the same weights in float32, which is loaded in its place.

Cost: a forward pass in float32; in 16 bits two, and up to two more in float32 with twice the memory. Without room for that, limits are
      wider, and a notice says so.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.corpus.sequences import NO_TOKEN
from builder.dataset.identity import teacher_differences
from builder.dataset.lookup import teacher_source
from builder.dataset.manifest import ShardRecord
from builder.dataset.telling import Row, telling_position
from builder.recipe.file import read_section
from builder.recipe.sections import TeacherRecipe
from builder.sources.opening import open_teacher
from builder.sources.resolve import TeacherSource
from builder.teacher.model import Teacher
from builder.verify.choosing import choose_rows
from builder.verify.comparison import REBUILT, Errors, Reading, StoredRow, divergence, read
from builder.verify.noise import MAX_FLOAT32_ERROR, Floor, Noise, too_far_in_float32
from builder.verify.sampling import LEAST_SHARE, Completion, Distances, TailDraws, too_few
from builder.verify.spelling import Speller
from logit_dataset.files import first_line
from logit_dataset.schema import Layout, is_generated

ROOM = 1.25
"""Times the weights in float32, which have to fit into memory."""


@dataclass(slots=True, kw_only=True)
class _Found:
    """What came of running the teacher on all rows."""

    alone: list[Reading] = field(default_factory=list)
    distances: list[list[Distances]] = field(default_factory=list)
    """Of the draws of each row."""
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    floor: Floor | None = None


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
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Run the teacher on `count` random rows. Return statistics over all of them, and one line per problem.

    Raises:
        ValueError: the teacher at hand is not the one that the manifest names, or needs code that is not trusted.
    """
    recipe = read_section(TeacherRecipe, manifest["recipe"]["teacher"], "recipe.teacher")
    if recipe.trust_remote_code and not trust_remote_code:
        raise ValueError(
            f"the manifest asks for code from {recipe.repo}, and may come from anybody; if you trust that code, use --trust-remote-code"
        )
    # What was used, where what was asked for could not be had.
    used = "float32" if manifest["teacher"].get("head_dtype") else "teacher"
    recipe = recipe.model_copy(update={"head_dtype": used})
    source = teacher_source(manifest, teacher_path)
    teacher = open_teacher(recipe, source, device=device)
    _check_teacher(manifest["teacher"], teacher)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    rows = list(
        choose_rows(directory, manifest, records, count=count, seed=seed, elsewhere=elsewhere or {})
    )
    found = _Found()
    speller = Speller(manifest, teacher.tokenizer)
    for row in rows:
        if row.spelled:
            lines = speller.problems(row.spelled, row.before, row.after)
            found.problems += [f"{row.stored.where}: {line}" for line in lines]
    stored = [row.stored for row in rows]
    for one in stored:
        _read_alone(one, teacher, layout, manifest["recipe"], found)
    told = stored if layout.text else []  # the card of a dataset without texts shows none
    example = telling_position([_telling(one) for one in told], teacher.tokenizer)
    if recipe.dtype == "float32":
        for one, reading in zip(stored, found.alone, strict=True):
            lines = list(too_far_in_float32(reading.errors))
            found.problems += [f"{one.where}: {line}" for line in lines]
    else:
        batch_tokens = manifest["recipe"]["sequences"]["batch_tokens"]
        noise = Noise(stored, found.alone, layout, teacher, batch_tokens=batch_tokens)
        num_parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
        del teacher  # so that there is room for it in float32
        noise.measure(partial(_open_in_float32, recipe, source, device, num_parameters))
        found.problems += noise.problems()
        found.notices += noise.notices
        found.floor = noise.floor
    found.problems += _judge_draws(stored, found.distances, recipe.dtype)
    statistics = _statistics(stored, found, seed, recipe.dtype, layout)
    return {**statistics, **({"example": example} if example else {})}, found.problems


def _telling(row: StoredRow) -> Row:
    values = {name: column.numpy() for name, column in row.columns.items()}
    return Row(
        values={"input_ids": row.input_ids, **values},
        targets=row.targets,
        kept_T=row.mask_T.numpy(),
    )


# Runs of the teacher


def _check_teacher(recorded: dict[str, Any], teacher: Teacher) -> None:
    """See that a loaded teacher is what a manifest says.

    Raises:
        ValueError: it is not; where token ids are not the teacher's own, how that came about.
    """
    found = teacher.provenance()
    if "quantisation" not in recorded and "quantisation" in found:
        # Older code did not record it, and counted packed numbers.
        for key in ("quantisation", "parameters"):
            del found[key]
    if recorded.get("hidden_size") is None:
        found["hidden_size"] = None  # older versions could not run every head alone
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


def _read_alone(
    row: StoredRow, teacher: Teacher, layout: Layout, recipe: dict[str, Any], found: _Found
) -> None:
    """Run the teacher on a row alone, and compare what is stored with it."""
    draws: list[Any] = []
    tail = completion = None
    if layout.tail_samples:
        tail = TailDraws(
            seed=recipe["output"].get("seed", 0),
            document_id=row.document_id,
            chunk_index=row.chunk_index,
            mask_T=row.mask_T,
            layout=layout,
        )
        draws.append(tail)
    if is_generated(recipe) and recipe["generation"]["temperature"]:
        completion = Completion(
            generation=recipe["generation"],
            row_id=row.document_id,
            input_ids=row.input_ids,
            mask_T=row.columns["completion_mask"].bool(),
        )
        draws.append(completion)
    rebuilt: list[Errors] = []

    def watch(logits_TV: Tensor, here: slice, stored: dict[str, Tensor], mask_T: Tensor) -> None:
        if tail:
            tail.see(logits_TV, stored, mask_T)
        if completion:
            completion.see(logits_TV, here.start)
        if layout.hidden_states and mask_T.any():
            hidden_CD = stored["hidden_states"].to(teacher.device, teacher.dtype)
            head_CV = torch.cat([piece.cpu().double() for piece in teacher.head(hidden_CD)])
            logprobs_CV = logits_TV[mask_T].log_softmax(-1)
            rebuilt.append(divergence(logprobs_CV, head_CV.log_softmax(-1)))

    reading = read(row, _pieces(teacher, row, layout), layout, compare=True, watch=watch)
    if rebuilt:
        parts = [torch.cat([getattr(e, n) for e in rebuilt]) for n in ("largest", "mean", "signed")]
        reading.errors[REBUILT] = Errors(largest=parts[0], mean=parts[1], signed=parts[2])
    found.alone.append(reading)
    found.distances.append([draw.distances() for draw in draws])


def _pieces(teacher: Teacher, row: StoredRow, layout: Layout) -> Iterator[Tensor]:
    """The logits of a row alone. The head is asked again for stored hidden states, so that all pieces are there before."""
    pieces = teacher.logits([row.input_ids])
    return iter(list(pieces)) if layout.hidden_states else pieces


def _open_in_float32(
    recipe: TeacherRecipe, source: TeacherSource, device: str, parameters: int
) -> Teacher:
    """The same teacher in float32.

    Raises:
        ValueError: it has no room, or cannot be loaded so; says why.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if recipe.tensor_parallel:
        raise ValueError("it is split over processes")
    need, free = ROOM * 4 * parameters, _free_bytes(device, spread=recipe.device_map is not None)
    if free is not None and need > free:
        raise ValueError(f"it would take {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free")
    attention = "sdpa" if recipe.attention == "flash_attention_2" else recipe.attention
    exact = recipe.model_copy(update={"dtype": "float32", "attention": attention})
    try:
        teacher = open_teacher(exact, source, device=device)
    except (torch.OutOfMemoryError, RuntimeError, TypeError) as error:
        raise ValueError(first_line(error)) from None
    if teacher.dtype != torch.float32:
        raise ValueError(f"it stays in {str(teacher.dtype).removeprefix('torch.')}")
    return teacher


def _free_bytes(device: str, *, spread: bool) -> int | None:
    """Memory that there is for a model; None where that is not known."""
    if device.startswith("cuda"):
        devices = range(torch.cuda.device_count()) if spread else [torch.device(device)]
        return sum(torch.cuda.mem_get_info(one)[0] for one in devices)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


# What is too far


def _judge_draws(
    rows: list[StoredRow], distances: list[list[Distances]], dtype: str
) -> Iterator[str]:
    """Whether draws are those that seed, document and position make of the teacher's distributions."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row, of_row in zip(rows, distances, strict=True):
        for found in of_row:
            agreeing, count = found.agree(dtype), len(found.values)
            totals[found.what][0] += agreeing
            totals[found.what][1] += count
            if too_few(agreeing, count, dtype):
                yield (
                    f"{row.where}: {count - agreeing} of {count} draws of {found.what} are not those of the seed, the document and the "
                    "teacher's distribution"
                )
    for what, (agreeing, count) in totals.items():
        if too_few(agreeing, count, dtype):
            yield (
                f"{count - agreeing:,} of {count:,} draws of {what} in all recomputed rows are not those of the seed, the documents and the "
                "teacher's distributions"
            )


def _statistics(
    rows: list[StoredRow], found: _Found, seed: int, dtype: str, layout: Layout
) -> dict[str, Any]:
    """What is told and recorded of all rows."""
    totals: dict[str, float] = defaultdict(float)
    for row, reading in zip(rows, found.alone, strict=True):
        known = torch.tensor(row.targets) != NO_TOKEN
        totals["tokens"] += len(row.input_ids)
        totals["targets"] += int(known.sum())
        totals["nll_stored"] -= float(row.columns["target_logprob"].double()[known].sum())
        totals["nll_recomputed"] -= float(reading.columns["target_logprob"][known].sum())
        totals["kept"] += len(reading.best_CK)
        if len(reading.best_CK):
            behind_C = reading.best_CK[:, 0] - reading.at_first_C
            totals["top1"] += int((behind_C < 1e-9).sum())
    count = sum(reading.raw_count for reading in found.alone)
    draws = [one for of_row in found.distances for one in of_row]
    num_draws = sum(len(one.values) for one in draws)
    values: dict[str, Any] = {
        "rows": len(rows),
        "seed": seed,
        "tokens": int(totals["tokens"]),
        "max_abs_error": max((reading.raw_abs_max for reading in found.alone), default=0.0),
        "mean_abs_error": sum(reading.raw_abs_sum for reading in found.alone) / max(count, 1),
        "top1_agreement": totals["top1"] / max(totals["kept"], 1),
        "nll_stored": totals["nll_stored"] / max(totals["targets"], 1),
        "nll_recomputed": totals["nll_recomputed"] / max(totals["targets"], 1),
        "notices": found.notices,
    }
    head = "logprobs" if layout.top_k == "all" else "topk_logprobs"
    largest = [reading.errors[head].largest for reading in found.alone if head in reading.errors]
    values["max_beyond_rounding"] = max((float(v.max()) for v in largest if len(v)), default=0.0)
    limit = {"max_beyond_rounding": MAX_FLOAT32_ERROR}
    if found.floor:
        noise = found.floor[head]
        values["floor"] = {"max_abs_error": noise.largest, "mean_abs_error": noise.average}
        limit = {"max_beyond_rounding": noise.largest_limit, "mean_abs_error": noise.mean_limit}
    if num_draws:
        values["draws_agree"] = sum(one.agree(dtype) for one in draws) / num_draws
        limit["draws_agree"] = LEAST_SHARE[dtype]
    return {**values, "limit": limit}
