"""Shards go to the Hub while they are built: few on the disk, none lost, and a new machine goes on from the branch."""

from pathlib import Path

import pytest
from conftest import recipe_text, sample_documents, write_jsonl
from test_publish import LICENSED


@pytest.fixture(scope="module")
def recipe(tiny_teacher_dir, tmp_path_factory) -> Path:
    """Of a dozen shards."""
    base = tmp_path_factory.mktemp("recipe")
    write_jsonl(base / "corpus.jsonl", sample_documents(40))
    sections = {**LICENSED, "output": "shard_tokens = 200"}
    path = base / "recipe.toml"
    path.write_text(recipe_text(tiny_teacher_dir, "corpus.jsonl", **sections))
    return path


@pytest.fixture
def deliver(client, recipe):
    def run(output: Path, *options: object, repo: str = "org/set"):
        command = ("build", recipe, "--output", output, "--publish-to", repo, "--discard-local")
        return client.cli(*command, "--device", "cpu", *options)

    return run


def test_x(hub, deliver, tmp_path):
    import time

    t = time.time()
    result = deliver(tmp_path / "out")
    print(time.time() - t, len(hub.requests))
    assert result.returncode == 0, result.stderr
    print(result.stdout, result.stderr)
    repo = hub.repos["dataset", "org/set"]
    print(repo.branches, repo.tags, repo.messages, list(repo.commits[repo.tags["v1.0.0"]]))
    for c in repo.commits.values():
        print(sorted(c))
    print([str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")])
    for r in hub.requests:
        print(r.method, r.path[:110])
    assert 0
