"""Verification finds what is wrong: damaged files, broken invariants, and datasets forged to pass both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.dataset.manifest import read_manifest, records_of, write_json
from builder.recipe.file import load_recipe
from builder.verify.recompute import recompute_rows
from builder.verify.verify import verify
from tests.verify.forging import Row, forge, refit

FIRST = "data/train-000-00000.parquet"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def problems(directory: Path, teacher: Path | None = None, recompute: int = 0) -> list[str]:
    report = verify(directory, recompute=recompute, teacher_path=teacher, seed=1)
    return report.problems


def test_a_good_dataset_has_no_problems_even_recomputed(built, tiny_teacher_dir):
    report = verify(built, recompute=15, teacher_path=tiny_teacher_dir, seed=0)
    assert report.problems == []
    totals = read_manifest(built)["totals"]
    assert (report.rows, report.tokens) == (totals["rows"], totals["tokens"])
    assert report.recomputed["rows"] == 15
    assert report.recomputed["top1_agreement"] == 1.0
    assert report.recomputed["max_abs_error"] < 8e-3  # half a float16 step at −16 is 0.004
    assert report.recomputed["nll_stored"] == pytest.approx(
        report.recomputed["nll_recomputed"], abs=2e-3
    )


def test_a_file_of_another_recipe_or_schema_is_named(copy):
    path = copy / FIRST
    metadata = {"logit_dataset.row_fingerprint": "0" * 64}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    refit(copy)
    assert problems(copy) == [
        f"{FIRST}: is of another recipe, source or schema (its row_fingerprint is not the manifest's)"
    ]


@pytest.mark.parametrize("eos", ["never", "always"])
@pytest.mark.parametrize("max_length", [31, 130])
@pytest.mark.parametrize("long_documents", ["chunk", "truncate"])
def test_a_good_dataset_has_no_problems_where_documents_are_cut(
    make_recipe, tmp_path, tiny_teacher_dir, long_documents, max_length, eos
):
    """Some of these cuts are moved in front of a character, so that a cut row is shorter than max_length."""
    sequences = f'long_documents = "{long_documents}"\nmax_length = {max_length}\neos = "{eos}"'
    recipe = make_recipe(sequences=sequences)
    build(load_recipe(recipe), tmp_path, tmp_path / "out")
    assert problems(tmp_path / "out", tiny_teacher_dir, recompute=100) == []


def test_forging_without_a_change_stays_undetected(copy, tiny_teacher_dir):
    """So that the tests below show that it is the change that is found."""
    forge(copy, lambda rows: None)
    assert problems(copy, tiny_teacher_dir, recompute=10) == []


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_a_cut_a_missing_and_an_extra_file_are_named(copy):
    files = sorted((copy / "data").iterdir())
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(files[1].read_bytes()[:-9])
    files[2].unlink()
    shutil.copy(files[3], copy / "data" / "train-999-00000.parquet")
    found = "\n".join(problems(copy))
    assert f"{FIRST}: its content does not have the hash" in found
    assert "data/train-000-00001.parquet: has" in found
    assert "data/train-000-00002.parquet: is missing" in found
    assert "data/train-999-00000.parquet: is not in the manifest" in found


def test_a_card_with_wrong_counts_is_found(copy):
    card = (copy / "README.md").read_text()
    rows = read_manifest(copy)["totals"]["rows"]
    (copy / "README.md").write_text(
        card.replace(f"num_examples: {rows}", f"num_examples: {rows + 1}")
    )
    assert problems(copy) == [
        f"README.md: dataset_info.splits[0].num_examples is {rows + 1}, the manifest makes it {rows}; `logit-dataset card DIR` writes "
        "it again"
    ]
    (copy / "README.md").unlink()
    assert "README.md: is missing" in problems(copy)[0]


def test_a_manifest_that_leads_out_of_the_directory_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "data/../../secret.parquet"
    write_json(copy / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"expected data/\*\.parquet"):
        verify(copy)


def test_other_columns_are_found(copy):
    path = copy / FIRST
    pq.write_table(pq.read_table(path).drop_columns(["entropy"]), path)
    assert any("its columns are not those of the schema" in p for p in problems(copy))


# --- invariants: each change is signed, and each must be found without the teacher -----------------------------------------


def at(name: str, value: Any, row: int = 1, position: int = 2) -> Callable[[list[Row]], None]:
    def change(rows: list[Row]) -> None:
        rows[row][name][position] = value

    return change


def swap_ranks(rows: list[Row]) -> None:
    for name in ("topk_indices", "topk_logprobs"):
        rows[1][name][2, [0, 5]] = rows[1][name][2, [5, 0]]


def repeat_an_id(rows: list[Row]) -> None:
    rows[1]["topk_indices"][2, 7] = rows[1]["topk_indices"][2, 6]


def renormalise_only(rows: list[Row]) -> None:
    for row in rows:
        logprobs = row["topk_logprobs"].astype(float)
        row["topk_logprobs"] = (logprobs - np.log(np.exp(logprobs).sum(-1, keepdims=True))).astype(
            np.float16
        )


def shorten_a_column(rows: list[Row]) -> None:
    rows[1]["entropy"] = rows[1]["entropy"][:-1]


def drop_a_rank(rows: list[Row]) -> None:
    for row in rows:
        row["topk_indices"], row["topk_logprobs"] = (
            row["topk_indices"][:, :-1],
            row["topk_logprobs"][:, :-1],
        )


def shift_targets(rows: list[Row]) -> None:
    for row in rows:
        row["target_logprob"] = np.roll(row["target_logprob"], 1)


def shift_tokens(rows: list[Row]) -> None:
    for row in rows:
        row["input_ids"] = np.roll(row["input_ids"], 1)


def lose_a_chunk(rows: list[Row]) -> None:
    third = [i for i, row in enumerate(rows) if row["chunk_index"] == 2]
    del rows[third[0] - 1 : third[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("input_ids", 448), "input_ids outside 0 … 447 (position 2)"),
        (at("topk_indices", -1), "topk_indices outside 0 … 447 (position 2)"),
        (repeat_an_id, "an id stands twice in topk_indices (position 2)"),
        (swap_ranks, "topk_logprobs rise with rank (position 2)"),
        (at("topk_logprobs", np.nan), "topk_logprobs is not finite (position 2)"),
        (at("topk_logprobs", 0.5), "a log-probability is above 0 (position 2)"),
        (at("tail_logprob", -0.25), "top K and tail do not sum to 1 (position 2)"),
        (at("tail_logprob", -np.inf), "tail_logprob is not finite (position 2)"),
        (at("target_logprob", -0.0078), "target_logprob"),
        (at("target_logprob", np.nan), "target_logprob is NaN (position 2)"),
        (at("entropy", 0.0), "entropy does not fit the stored distribution (position 2)"),
        (at("entropy", 12.0), "entropy does not fit the stored distribution (position 2)"),
        (at("logsumexp", np.inf), "logsumexp is not finite (position 2)"),
    ],
)
def test_one_broken_value_is_named_with_file_row_and_position(copy, change, message):
    forge(copy, change, all_files=False)
    found = problems(copy)
    assert any(p.startswith(f"{FIRST} row 1: ") and message in p for p in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renormalise_only, "top K and tail do not sum to 1"),
        (shift_targets, "target_logprob differs from the target's own entry in the top K"),
        (shift_tokens, "target_logprob"),
        (shorten_a_column, "entropy and input_ids have different lengths"),
        (drop_a_rank, "topk_indices does not have 20 values a token"),
        (lose_a_chunk, "does not follow chunk"),
    ],
)
def test_a_broken_column_is_found_without_the_teacher(copy, change, message):
    forge(copy, change, all_files=False)
    found = problems(copy)
    assert any(message in p for p in found), found


# --- forgeries that obey every invariant: only the teacher can tell --------------------------------------------------------


def set_targets(row: Row) -> None:
    """Make target_logprob agree with the (forged) top K, wherever the target is listed; else put it just below."""
    for t in range(len(row["input_ids"]) - 1):
        listed = np.flatnonzero(row["topk_indices"][t] == row["input_ids"][t + 1])
        below = min(row["topk_logprobs"][t, -1], row["target_logprob"][t])
        row["target_logprob"][t] = row["topk_logprobs"][t, listed[0]] if len(listed) else below
    row["target_logprob"][-1] = min(row["topk_logprobs"][-1, -1], row["target_logprob"][-1])
    for t in [len(row["input_ids"]) - 1]:
        listed = np.flatnonzero(row["topk_indices"][t] == 0)
        if len(listed):
            row["target_logprob"][t] = row["topk_logprobs"][t, listed[0]]


def entropy_of_stored(row: Row) -> np.ndarray:
    stored = np.concatenate([row["topk_logprobs"], row["tail_logprob"][:, None]], axis=-1).astype(
        float
    )
    return -(np.exp(stored) * stored).sum(-1).astype(np.float16)


def renormalised(rows: list[Row]) -> None:
    for row in rows:
        logprobs = row["topk_logprobs"].astype(float)
        logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
        row["topk_logprobs"] = logprobs.astype(np.float16)
        row["tail_logprob"][:] = row["tail_logprobs"][:] = -65504
        row["tail_indices"][:] = row["topk_indices"][:, -1:]
        row["entropy"] = -(np.exp(logprobs) * logprobs).sum(-1).astype(np.float16)
        set_targets(row)


DISTRIBUTION = (
    *("topk_indices", "topk_logprobs", "tail_logprob", "target_logprob", "logsumexp", "entropy"),
    *("tail_indices", "tail_logprobs"),
)


def shifted(rows: list[Row]) -> None:
    for row in rows:
        for name in DISTRIBUTION:
            row[name] = np.roll(row[name], 1, axis=0)
        set_targets(row)


def swapped_documents(rows: list[Row]) -> None:
    length = min(len(row["input_ids"]) for row in rows)
    first = {name: rows[0][name][:length].copy() for name in DISTRIBUTION}
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        for name in DISTRIBUTION:
            row[name][:length] = (following or first)[name][:length]
        set_targets(row)


def hotter(rows: list[Row]) -> None:
    """Temperature 1.25, correctly normalised over head and tail."""
    for row in rows:
        stored = (
            np.concatenate([row["topk_logprobs"], row["tail_logprob"][:, None]], axis=-1) / 1.25
        )
        stored = stored.astype(float)
        total = np.log(np.exp(stored).sum(-1, keepdims=True))
        stored -= total
        row["tail_logprobs"] = (row["tail_logprobs"] / 1.25 - total).astype(np.float16)
        row["topk_logprobs"] = stored[:, :-1].astype(np.float16)
        row["tail_logprob"] = stored[:, -1].astype(np.float16)
        row["entropy"] = entropy_of_stored(row)
        set_targets(row)


def other_tokens(rows: list[Row]) -> None:
    """The right log-probs on ids that are all one too high."""
    for row in rows:
        for name in ("topk_indices", "tail_indices"):
            row[name] = (row[name] + 1) % 448
        set_targets(row)


@pytest.mark.parametrize("change", [renormalised, shifted, swapped_documents, hotter, other_tokens])
def test_a_forgery_that_obeys_the_invariants_is_found_by_recomputing(
    copy, tiny_teacher_dir, change
):
    forge(copy, change)
    unnoticed = [p for p in problems(copy) if "entropy" not in p and "target" not in p]
    assert unnoticed == []
    manifest = read_manifest(copy)
    _, found = recompute_rows(
        copy,
        manifest,
        records_of(manifest),
        count=5,
        seed=3,
        device="cpu",
        teacher_path=tiny_teacher_dir,
    )
    assert (
        len([p for p in found if "topk_logprobs is" in p and "nats from the teacher's" in p]) == 5
    )


def test_a_renormalised_dataset_of_a_16_bit_teacher_is_found(
    make_recipe, tmp_path, tiny_teacher_dir
):
    from builder.build.build import build
    from builder.recipe.file import load_recipe

    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', 'dtype = "bfloat16"'))
    build(load_recipe(recipe), tmp_path, tmp_path / "out")
    report = verify(tmp_path / "out", recompute=20, teacher_path=tiny_teacher_dir, seed=2)
    assert report.problems == []
    assert report.recomputed["max_abs_error"] > 0
    forge(tmp_path / "out", renormalised)
    assert verify(tmp_path / "out", recompute=20, teacher_path=tiny_teacher_dir, seed=2).problems


def test_another_text_than_the_tokens_say_is_found(copy, tiny_teacher_dir):
    def change(rows):
        for row in rows:
            row["text"] = row["text"].upper()

    forge(copy, change)
    found = problems(copy, tiny_teacher_dir, recompute=20)
    assert any(
        "input_ids are not what the teacher's tokenizer makes of the text" in p for p in found
    )


def test_another_teacher_or_tokenizer_is_refused(copy, tiny_teacher_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher_dir, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"not the dataset's: teacher\.sha256"):
        verify(copy, recompute=1, teacher_path=other)
    with pytest.raises(ValueError, match="give it with --teacher PATH"):
        verify(copy, recompute=1)
