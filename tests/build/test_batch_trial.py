"""`sequences.batch_tokens = "auto"`, from the command line to the manifest: settled once, then as if the recipe had said it."""

import json
import re

import pytest

from builder.capture import trial
from builder.card.recipe_text import recipe_toml
from builder.dataset.manifest import read_manifest
from tests.build.test_build import data_bytes

AUTO = 'max_length = 64\nbatch_tokens = "auto"'


@pytest.fixture
def best(monkeypatch):
    """Make a device that likes batches of some size."""

    def like(size: int) -> None:
        monkeypatch.setattr(trial, "CPU_SIZES", (64, 128, 512))
        monkeypatch.setattr(
            trial,
            "_rate",
            lambda pipeline, teacher, window, tried: 1000.0 if tried == size else 495.0,
        )
        monkeypatch.setattr(trial, "HOPELESS", 0)

    return like


def planned(output) -> int:
    plan = json.loads((output / ".build/plan.json").read_text())
    return plan["recipe"]["sequences"]["batch_tokens"]


def test_what_a_first_start_settles_is_kept(make_recipe, tiny_teacher_dir, tmp_path, cli, best):
    best(128)
    recipe, output = make_recipe(sequences=AUTO), tmp_path / "out"
    status, _, err = cli("build", recipe, "-o", output, "--max-shards", 1)
    assert status == 0
    assert re.search(r'sequences\.batch_tokens = "auto" is 128 for this build \(64: 495 tokens/s; 128: 1,000 tokens/s;', err)  # fmt: skip
    assert planned(output) == 128
    best(512)  # another machine
    status, _, err = cli("build", recipe, "-o", output)
    assert status == 0
    assert "auto" not in err
    manifest = read_manifest(output)
    assert manifest["recipe"]["sequences"]["batch_tokens"] == 128

    said = tmp_path / "said"
    assert cli("build", make_recipe(sequences=AUTO.replace('"auto"', "128")), "-o", said)[0] == 0
    assert data_bytes(said) == data_bytes(output)
    expected = read_manifest(said)
    for name in ("fingerprint", "row_fingerprint", "recipe"):
        assert manifest[name] == expected[name]
    assert "batch_tokens = 128" in recipe_toml(manifest["recipe"], manifest)

    assert "already complete" in cli("build", make_recipe(sequences=AUTO), "-o", said)[1]
    other = make_recipe(sequences=AUTO.replace('"auto"', "512"))
    status, _, err = cli("build", other, "-o", output)
    assert status == 1
    assert "batch_tokens: 128 → 512" in err
    status, out, err = cli("verify", output, "--recompute", 3, "--teacher", tiny_teacher_dir)
    assert status == 0, (out, err)


def test_before_the_first_shard_it_is_settled_anew(make_recipe, tmp_path, cli, best):
    best(128)
    recipe, output = make_recipe(sequences=AUTO), tmp_path / "out"
    assert cli("build", recipe, "-o", output, "--max-shards", 0)[0] == 0
    assert planned(output) == 128
    best(64)
    assert cli("build", recipe, "-o", output)[0] == 0
    assert read_manifest(output)["recipe"]["sequences"]["batch_tokens"] == 64


def test_what_is_said_before_there_is_a_device(make_recipe, tmp_path, cli):
    recipe = make_recipe(sequences=AUTO)
    status, out, _ = cli("plan", recipe, "--tokens", 1e9)
    assert status == 0
    assert 'batch_tokens = "auto" is chosen when the build begins' in out
    status, out, _ = cli("build", recipe, "-o", tmp_path / "out", "--dry-run")
    assert status == 0
    assert 'batch_tokens = "auto"' in out
    assert not (tmp_path / "out").exists()


def test_without_a_trial(make_recipe, tmp_path, cli, monkeypatch):
    """Where the head cannot run alone each sequence does, and no size matters; what the trial cannot do is refused."""
    from builder.teacher.model import Teacher

    probe = Teacher._probe
    monkeypatch.setattr(Teacher, "_probe", lambda self: (probe(self)[0], False))
    output = tmp_path / "out"
    status, _, err = cli("build", make_recipe(sequences=AUTO), "-o", output)
    assert status == 0
    assert "auto" not in err
    assert read_manifest(output)["recipe"]["sequences"]["batch_tokens"] == 16_384
    for options in (
        {"generation": "max_new_tokens = 8"},
        {"teacher_options": "tensor_parallel = 2"},
    ):
        status, _, err = cli("build", make_recipe(sequences=AUTO, **options), "-o", tmp_path / "no")
        assert status == 1
        assert err.count("\n") == 1
        assert "give a number" in err


def test_an_empty_corpus_is_what_it_always_was(make_recipe, tmp_path, cli):
    (tmp_path / "empty.jsonl").write_text('{"id": "a", "text": ""}\n')
    recipe = make_recipe(files="empty.jsonl", sequences=AUTO)
    status, _, err = cli("build", recipe, "-o", tmp_path / "out")
    assert status == 1
    assert "the corpus has no text" in err
