"""`teacher.head_dtype` from a recipe file to the card: what is new, what stays as it was, and what is resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from builder.card.recipe_text import recipe_toml
from builder.dataset.identity import fingerprint, row_fingerprint
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.verify.verify import verify
from tests.build.test_build import data_bytes, read_rows, run

HALF = 'dtype = "bfloat16"'
BY_TEACHER = 'head_dtype = "teacher"'
BY_FLOAT32 = 'head_dtype = "float32"'


@pytest.fixture
def recipe(make_recipe):
    """Write the recipe file, with lines for [teacher] in place of its dtype."""

    def write(*lines: str) -> Path:
        path = make_recipe()
        path.write_text(path.read_text().replace('dtype = "float32"', "\n".join(lines)))
        return path

    return write


def as_before(manifest: dict) -> dict:
    """The plan of a manifest as code made it that knew no such key."""
    teacher = {k: v for k, v in manifest["recipe"]["teacher"].items() if k != "head_dtype"}
    source = dict(
        list(manifest["teacher"].items())[: list(manifest["teacher"]).index("architecture")]
    )
    recipe = {**manifest["recipe"], "teacher": teacher}
    return {"recipe": recipe, "corpus": manifest["corpus"], "teacher": source}


def test_by_default_and_as_it_was(recipe, tmp_path, tiny_teacher_dir):
    manifests = {}
    for name, lines in (("new", (HALF,)), ("old", (HALF, BY_TEACHER))):
        run(recipe(*lines), tmp_path / name)
        manifests[name] = read_manifest(tmp_path / name)
        report = verify(tmp_path / name, recompute=4, teacher_path=tiny_teacher_dir)
        assert not report.problems, report.problems
    new, old = manifests["new"], manifests["old"]
    assert new["recipe"]["teacher"]["head_dtype"] == new["teacher"]["head_dtype"] == "float32"
    assert (
        "bfloat16 with sdpa attention, logits in float32"
        in (tmp_path / "new/README.md").read_text()
    )
    assert "head_dtype" not in json.dumps(old)
    assert "logits in" not in (tmp_path / "old/README.md").read_text()
    for function in (fingerprint, row_fingerprint):
        assert old[function.__name__] == function(as_before(old))
        assert new[function.__name__] != old[function.__name__]
    rows = [read_rows(tmp_path / name) for name in ("new", "old")]
    assert [r["input_ids"] for r in rows[0]] == [r["input_ids"] for r in rows[1]]
    # Fewer of the log-probabilities of a position are the same: that is what it is for.
    distinct = [
        sum(len(set(entries)) for row in of for entries in row["topk_logprobs"]) for of in rows
    ]
    assert distinct[0] > 1.05 * distinct[1]


def test_in_float32_nothing_is_another_byte(recipe, tmp_path):
    found = []
    for number, lines in enumerate(((), (BY_FLOAT32,), (BY_TEACHER,))):
        output = tmp_path / str(number)
        run(recipe('dtype = "float32"', *lines), output)
        manifest = read_manifest(output)
        assert "head_dtype" not in json.dumps(manifest)
        assert manifest["fingerprint"] == fingerprint(as_before(manifest))
        found.append((manifest["fingerprint"], manifest["row_fingerprint"], data_bytes(output)))
    assert found[0] == found[1] == found[2]


def test_an_unfinished_build_of_older_code_is_resumed_to_the_same_bytes(recipe, tmp_path):
    run(recipe(HALF, BY_TEACHER), tmp_path / "whole")
    older = tmp_path / "older"
    # What such a build leaves is what code leaves that knows no such key: see `as_before`.
    assert run(recipe(HALF, BY_TEACHER), older, max_shards=1).status == "stopped early"
    plan = json.loads((older / ".build/plan.json").read_text())
    assert "head_dtype" not in json.dumps(plan)
    assert "head_dtype" not in (older / ".build/teacher.json").read_text()
    shutil.copytree(older, tmp_path / "other")
    assert run(recipe(HALF), older).status == "complete"
    assert data_bytes(older) == data_bytes(tmp_path / "whole")
    assert read_manifest(older)["fingerprint"] == read_manifest(tmp_path / "whole")["fingerprint"]
    with pytest.raises(
        ValueError, match=r'another plan \(recipe\.teacher\.head_dtype: null → "float32"\); resume that one, or choose another directory'
    ):  # fmt: skip
        run(recipe(HALF, BY_FLOAT32), tmp_path / "other")
    # Nothing is finished, nothing binds.
    shutil.rmtree(tmp_path / "other" / ".build" / "records")
    run(recipe(HALF), tmp_path / "other")
    assert read_manifest(tmp_path / "other")["teacher"]["head_dtype"] == "float32"


def test_a_finished_dataset_of_older_code_is_complete(recipe, tmp_path):
    run(recipe(HALF, BY_TEACHER), tmp_path / "out")
    assert run(recipe(HALF), tmp_path / "out").status == "already complete"
    with pytest.raises(
        ValueError, match=r"another recipe \(teacher\.head_dtype: null → \"float32\"\)"
    ):
        run(recipe(HALF, BY_FLOAT32), tmp_path / "out")


def test_a_build_that_is_killed_goes_on_in_float32(recipe, tmp_path):
    run(recipe(HALF), tmp_path / "whole")
    run(recipe(HALF), tmp_path / "parts", max_shards=1)
    run(recipe(HALF), tmp_path / "parts", max_shards=1)
    run(recipe(HALF), tmp_path / "parts")
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")


@pytest.mark.parametrize("lines", [(HALF,), (HALF, BY_TEACHER)])
def test_the_recipe_of_a_card_builds_the_same_again(recipe, tmp_path, lines):
    path = recipe(*lines)
    run(path, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    text = recipe_toml(manifest["recipe"], manifest)
    assert (BY_TEACHER in text) == (BY_TEACHER in lines)
    (tmp_path / "again.toml").write_text(text)
    again = load_recipe(tmp_path / "again.toml").published()["teacher"]
    assert again.get("head_dtype") == manifest["recipe"]["teacher"].get("head_dtype")


def test_a_manifest_that_contradicts_itself(recipe, tmp_path):
    run(recipe(HALF, BY_TEACHER), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["teacher"]["head_dtype"] = "float32"
    path.write_text(json.dumps(manifest))
    problems = verify(tmp_path / "out").problems
    assert any("teacher.head_dtype is 'float32', but recipe.teacher.head_dtype is None" in p for p in problems)  # fmt: skip


@pytest.mark.parametrize("top_k", ['"all"', "20"])
def test_hidden_states_make_the_same_distribution_again(recipe, tmp_path, tiny_teacher_dir, top_k):
    path = recipe(HALF)
    text = path.read_text().replace("top_k = 20", f"top_k = {top_k}\nhidden_states = true")
    path.write_text(text)
    run(path, tmp_path / "out")
    report = verify(tmp_path / "out", recompute=4, teacher_path=tiny_teacher_dir)
    assert not report.problems, report.problems
    if top_k == "20":
        return
    for row in read_rows(tmp_path / "out")[:5]:
        logprobs_TV = torch.tensor(row["logprobs"])
        # In bfloat16, logits of 4 and more are the same number for eights of them.
        assert all(len(set(one.tolist())) > 250 for one in logprobs_TV)
