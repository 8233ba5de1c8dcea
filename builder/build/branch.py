"""The branch of an unfinished build on the Hub → what it holds, and the small files that go with a commit to it.

In:   a repository, the commit at which the branch stands, and its files.
Out:  the plan, the teacher and the commits behind branches; the record of each shard whose file has the recorded hash; and the same as
      small files to be sent.

How:  records are in lists of RECORDS_PER_FILE, in the order in which shards were sent. Only the last list grows.

Cost: a request for each small file.
"""

import json
from pathlib import Path
from typing import Any

from builder.build.state import BuildState
from builder.card.charts import Measured
from builder.dataset.identity import fingerprint
from builder.dataset.manifest import ShardRecord, records_of
from builder.hub.repository import Repository, Tree
from builder.sources.known import KnownSources

BRANCH = "logit-dataset-build"

Held = dict[tuple[int, int], tuple[ShardRecord, Measured]]
"""Partition and index of shards that are on the branch → their records, and what the card's pictures show of them."""

RECORDS = ".build/records/"
RECORDS_PER_FILE = 100
"""One file for each would be thousands of requests for a machine that resumes."""


def is_branch_of(repo: Repository, head: str | None, manifest: dict[str, Any]) -> bool:
    """Whether the branch, which stands at `head` if it is there, is of the build that a finished dataset comes from."""
    path = repo.download(".build/plan.json", head) if head else None
    try:
        plan = _json(path) if path else {}
        if plan.pop("schema_version", None) != manifest["schema_version"]:
            return False
        return fingerprint(plan) == str(manifest["fingerprint"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def is_left_over(repo: Repository, head: str | None, manifest: dict[str, Any]) -> bool:
    """Whether the branch holds nothing but the shards of a finished dataset, all of them just as they are there.

    One that holds fewer may be of a build that makes them anew, which is not to be lost.
    """
    if head is None or not is_branch_of(repo, head, manifest):
        return False
    sent: set[tuple[str, str]] = set()
    try:
        for path in repo.tree(head):
            if path.startswith(RECORDS) and (found := repo.download(path, head)):
                records = [entry["record"] for entry in _json(found)]
                sent |= {(record["file"], record["sha256"]) for record in records}
    except (ValueError, LookupError, TypeError):
        return False
    return sent >= {(record.file, record.sha256) for record in records_of(manifest)}


def read_values(repo: Repository, head: str, tree: Tree, name: str) -> Any:
    """The values of a small file of the branch; None if it is not there.

    Raises:
        ValueError: it is damaged.
    """
    path = f".build/{name}.json"
    found = repo.download(path, head) if path in tree else None
    try:
        return _json(found) if found else None
    except ValueError as error:
        raise ValueError(
            f"{path} on branch {BRANCH} of {repo.id} is damaged ({error}); delete the branch to start again"
        ) from None


def read_entries(repo: Repository, head: str, tree: Tree) -> list[dict[str, Any]]:
    """The lists of records of the branch, one after the other.

    Raises:
        ValueError: one is damaged.
    """
    entries: list[dict[str, Any]] = []
    for path in sorted(path for path in tree if path.startswith(RECORDS)):
        name = path.removeprefix(".build/").removesuffix(".json")
        entries += read_values(repo, head, tree, name)
    return entries


def held_of(entries: list[dict[str, Any]], tree: Tree) -> tuple[Held, list[str]]:
    """The shards whose files are there as recorded, and the files of those that are not."""
    held: Held = {}
    damaged: dict[tuple[int, int], str] = {}
    for entry in entries:
        record = ShardRecord.from_json(entry["record"])
        place, there = (record.partition, record.index), tree.get(record.file)
        if there and (there.sha256, there.size) == (record.sha256, record.bytes):
            held[place] = record, Measured(**entry["measured"])
            damaged.pop(place, None)
        elif place not in held:
            damaged[place] = record.file
    return held, list(damaged.values())


def small_files(
    entries: list[dict[str, Any]], num_before: int, state: BuildState, known: KnownSources
) -> dict[str, Any]:
    """Path → values of the small files that go with a commit: what no earlier one has brought.

    Args:
        entries: of all shards that are there after the commit.
        num_before: how many of them were there before.
        state: of the build.
        known: what the build has resolved.
    """
    first = num_before // RECORDS_PER_FILE
    files: dict[str, Any] = {
        f"{RECORDS}{number:05d}.json": entries[
            number * RECORDS_PER_FILE : (number + 1) * RECORDS_PER_FILE
        ]
        for number in range(first, -(-len(entries) // RECORDS_PER_FILE))
    }
    if not num_before:
        files[".build/plan.json"] = state.read("plan")
        files[".build/teacher.json"] = state.read("teacher")
        # Never the hashes that it knows, for they stand beside paths of this machine.
        files[".build/known.json"] = {"commits": known.commits}
    return files


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
