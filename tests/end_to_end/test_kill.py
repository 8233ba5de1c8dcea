"""SIGKILL anywhere, then the same command: the same bytes, and no finished shard computed again."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from builder.dataset.manifest import read_manifest, records_of
from tests.build.test_build import data_bytes
from tests.conftest import sample_documents, write_jsonl


class Killer:
    """Talks to killed_build.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_build.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def build(self, recipe: Path, output: Path, **when: object) -> dict:
        request = {"recipe": str(recipe), "output": str(output), **when}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def killer():
    killer = Killer()
    yield killer
    killer.process.stdin.close()
    killer.process.wait(timeout=30)


@pytest.fixture
def recipe(make_recipe, corpus_file) -> Path:
    write_jsonl(corpus_file, sample_documents(40))
    return make_recipe(output="shard_tokens = 200")


def finished_shards(output: Path) -> dict[str, tuple[int, str]]:
    """File → (time of change, hash) of the shards that have a record."""
    records = (output / ".build" / "records").glob("[0-9]*.json")
    found = [json.loads(path.read_text()) for path in records]
    return {r["file"]: ((output / r["file"]).stat().st_mtime_ns, r["sha256"]) for r in found}


def check_kept(before: dict, output: Path) -> None:
    """No shard that was finished before has been written again."""
    for file, (changed, _) in before.items():
        assert (output / file).stat().st_mtime_ns == changed, f"{file} was computed twice"


def test_twenty_kills_at_random_moments(recipe, tmp_path, killer):
    assert killer.build(recipe, tmp_path / "whole")["status"] == 0
    duration = killer.build(recipe, tmp_path / "timed")["seconds"]
    expected = data_bytes(tmp_path / "whole")
    assert len(expected) > 10
    rng, kills, attempt = random.Random(7), 0, 0
    while kills < 20:
        output, patience, answer = tmp_path / f"attempt-{attempt}", 1.0, {"killed": True}
        while answer["killed"]:
            before = finished_shards(output)
            moment = rng.uniform(0.02, 0.9 * duration * patience)
            answer = killer.build(recipe, output, after_seconds=moment)
            check_kept(before, output)
            kills += answer["killed"]
            patience *= (
                1.15  # so that a slow start does not keep every attempt from its first shard
            )
        assert answer["status"] == 0
        assert data_bytes(output) == expected
        attempt += 1


@pytest.mark.parametrize("step", ["state.write_json#2:before", "state.write_json#5:after", "os.replace#7:before"])  # fmt: skip
def test_kills_of_a_build_that_has_tried_sizes_of_batches(
    recipe, make_recipe, tmp_path, killer, step
):
    options = {
        "output": "shard_tokens = 200",
        "sequences": 'max_length = 64\nbatch_tokens = "auto"',
    }
    recipe, output = make_recipe(**options), tmp_path / "out"
    assert killer.build(recipe, output, at_step=step)["killed"]
    before = finished_shards(output)
    plan = json.loads((output / ".build/plan.json").read_text())
    settled = plan["recipe"]["sequences"]["batch_tokens"]
    assert killer.build(recipe, output)["status"] == 0
    check_kept(before, output)
    manifest = read_manifest(output)
    found = manifest["recipe"]["sequences"]["batch_tokens"]
    assert type(found) is int
    assert not before or found == settled
    options["sequences"] = f"max_length = 64\nbatch_tokens = {found}"
    assert killer.build(make_recipe(**options), tmp_path / "said")["status"] == 0
    assert data_bytes(output) == data_bytes(tmp_path / "said")
    assert manifest["fingerprint"] == read_manifest(tmp_path / "said")["fingerprint"]


@pytest.mark.parametrize(
    "step",
    [
        "os.replace#1:before",  # the known sources or the plan are not yet in place
        "os.replace#4:before",  # the first shard is whole, but not renamed
        "os.replace#4:after",  # … renamed, but has no record
        "state.write_json#4:before",
        "state.write_json#4:after",  # … and has its record
        "os.replace#9:before",
        "os.replace#9:after",
        "build.write_json#1:before",  # all shards and the card are there, but not the manifest
        "build.write_json#1:after",  # the manifest is there, and .build too
    ],
)
def test_kills_at_the_steps_between_which_something_could_be_half_done(
    recipe, tmp_path, killer, step
):
    killer.build(recipe, tmp_path / "whole")
    output = tmp_path / "out"
    assert killer.build(recipe, output, at_step=step)["killed"]
    before = finished_shards(output)
    assert killer.build(recipe, output)["status"] == 0
    check_kept(before, output)
    assert data_bytes(output) == data_bytes(tmp_path / "whole")
    shards = [(r.file, r.sha256, r.rows) for r in records_of(read_manifest(output))]
    assert shards == [
        (r.file, r.sha256, r.rows) for r in records_of(read_manifest(tmp_path / "whole"))
    ]
    left = sorted(path.name for path in output.iterdir())
    assert left == ["README.md", "assets", "data", "manifest.json"]
    assert not list((output / "data").glob(".*"))


@pytest.mark.parametrize(
    "options",
    [
        "tail_samples = 6\ntemperatures = [2.0]\nhidden_states = true",
        'top_k = "all"\ntemperatures = [2.0]\nhidden_states = true',
    ],
    ids=["everything", "all"],
)
def test_a_kill_with_every_option_on(options, make_recipe, corpus_file, tmp_path, killer):
    write_jsonl(corpus_file, sample_documents(40))
    recipe = make_recipe(output=f"shard_tokens = 200\n{options}")
    killer.build(recipe, tmp_path / "whole")
    output = tmp_path / "out"
    assert killer.build(recipe, output, at_step="os.replace#9:before")["killed"]
    before = finished_shards(output)
    assert len(before) > 1
    assert killer.build(recipe, output)["status"] == 0
    check_kept(before, output)
    assert data_bytes(output) == data_bytes(tmp_path / "whole")
