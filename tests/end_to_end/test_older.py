"""What older code built reads, verifies, resumes and publishes as before."""

import json
import shutil
from pathlib import Path

import pytest

from builder.dataset.manifest import read_manifest
from logit_dataset import distillation_loss, load_logits
from tests.conftest import REPOSITORY, run_cli

OLDER = REPOSITORY / "tests" / "fixtures" / "older"
TEACHER = OLDER / "teacher"


@pytest.fixture
def older(tmp_path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "older"))


@pytest.mark.parametrize("name", ["text", "chats", "written"])
def test_verified_with_its_teacher(name):
    done = run_cli("verify", OLDER / name, "--recompute", 3, "--teacher", TEACHER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", no problems\n" in done.stdout


@pytest.mark.parametrize(("name", "rows", "tokens"), [("text", 13, 622), ("chats", 12, 593), ("written", 4, 72)])  # fmt: skip
def test_read(name, rows, tokens):
    data = load_logits(OLDER / name)
    assert (data.num_rows, data.num_tokens) == (rows, tokens)
    (batch,) = data.batches(batch_size=rows, seed=None)
    logits = batch["target_ids"].new_zeros((*batch["input_ids"].shape, data.vocab_size)).float()
    assert 0 < distillation_loss(logits, batch) < 10


def test_an_unfinished_build_is_resumed_to_the_same_bytes(older):
    output = older / "unfinished"
    done = run_cli("build", older / "text.toml", "--output", output, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "building it again" not in done.stderr
    old, new = read_manifest(OLDER / "text"), read_manifest(output)
    for key in ("fingerprint", "row_fingerprint", "schema_version"):
        assert old[key] == new[key]
    assert [s["sha256"] for s in old["shards"]][:2] == [s["sha256"] for s in new["shards"]][:2]
    assert [s["tokens"] for s in old["shards"]] == [s["tokens"] for s in new["shards"]]


def test_files_with_and_without_checksums_make_one_dataset(older):
    output = older / "unfinished"
    damaged = output / "data" / "train-000-00001.parquet"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = run_cli("build", older / "text.toml", "--output", output, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "00001.parquet does not have the hash in its record: building it again" in done.stderr
    shards = read_manifest(output)["shards"]
    assert ["footer_sha256" in shard for shard in shards] == [False, True, True]
    done = run_cli("verify", output, "--recompute", 3, "--teacher", TEACHER)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = []
    for dataset in (OLDER / "text", output):
        data = load_logits(dataset, check_hashes=True)
        rows.append([data.read(group).columns["input_ids"].tolist() for group in data.row_groups])
    assert rows[0] == rows[1]


def test_a_finished_one_is_complete_by_its_recipe(older):
    before = json.loads((older / "text" / "manifest.json").read_text())
    done = run_cli("build", older / "text.toml", "--output", older / "text", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "already complete" in done.stdout
    assert json.loads((older / "text" / "manifest.json").read_text()) == before


def test_published(hub, client, older):
    done = client.cli("publish", "org/older", older / "chats", "--recompute", 0, "--yes")
    assert done.returncode == 0, done.stderr
    assert "org/older v1.0.0 is published" in done.stdout
