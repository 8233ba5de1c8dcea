"""Shards go to the Hub while they are built: few on the disk, none lost, and a new machine goes on from the branch."""

import io
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError

from builder.build.branch import BRANCH
from builder.build.build import build
from builder.dataset.manifest import read_manifest, records_of
from builder.hub.calls import explain
from builder.recipe.file import load_recipe
from tests import loopback_hub as stand_in
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.hub.test_publish import (
    LICENSED,
    TROUBLES,
    assert_nothing_planted,
    assert_one_line,
    dataset_files,
    once,
)
from tests.loopback_hub import Cut, Refusal

STEPS = {
    "branch": ("POST", f"/branch/{BRANCH}$"),
    "preupload": ("POST", f"/preupload/{BRANCH}$"),
    "batch": ("POST", "/objects/batch$"),
    "put": ("PUT", "/storage/"),
    "verify": ("POST", "/verify/"),
    "commit": ("POST", f"/commit/{BRANCH}$"),
    "reading back": ("POST", "/paths-info/"),
    "rows to recompute": ("GET", r"/resolve/.*\.parquet$"),
    "commit on main": ("POST", "/commit/main$"),
    "tag": ("POST", "/tag/"),
    "removal of the branch": ("DELETE", "/branch/"),
}


SHARDS = 10


def write_recipe(base: Path, teacher_dir: Path, **changes: str) -> Path:
    """A recipe of SHARDS shards."""
    base.mkdir(exist_ok=True)
    write_jsonl(base / "corpus.jsonl", sample_documents(26))
    sections = {**LICENSED, "output": "shard_tokens = 200", **changes}
    path = base / "recipe.toml"
    path.write_text(recipe_text(teacher_dir, "corpus.jsonl", **sections))
    return path


@pytest.fixture(scope="module")
def recipe(tiny_teacher_dir, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_teacher_dir)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The dataset as a plain build makes it."""
    output = tmp_path_factory.mktemp("whole") / "out"
    build(load_recipe(recipe), recipe.parent, output)
    return output


@pytest.fixture
def deliver(client, recipe):
    """`logit-dataset build … --publish-to …`, with shards discarded."""

    def run(output: Path, *options: object, repo: str = "org/set", recipe: Path = recipe):
        command = ("build", recipe, "--output", output, "--publish-to", repo, "--discard-local")
        return client.cli(*command, "--device", "cpu", *options)

    return run


def assert_delivered(hub, whole: Path, output: Path, repo: str = "org/set") -> None:
    """One tag on main, whose data are those of a plain build; nothing of `.build`, and no data in the directory."""
    found = hub.repos["dataset", repo]
    assert list(found.tags) == ["v1.0.0"]
    assert found.tags["v1.0.0"] == found.branches["main"]
    assert list(found.branches) == ["main"]
    files = dataset_files(hub, "v1.0.0", repo)
    assert {p: c for p, c in files.items() if p.startswith("data/")} == data_files(whole)
    of_recomputing = {"verification.json", "assets/line.svg"}
    expected = {*stand_in.directory_files(whole), "release.json", *of_recomputing}
    assert files.keys() == expected
    left = stand_in.directory_files(output)
    assert left.pop(".curves.json")
    assert left == {p: c for p, c in files.items() if not p.startswith("data/")}


def data_files(directory: Path) -> dict[str, bytes]:
    return stand_in.directory_files(directory / "data", "data/")


def on_branch(hub, repo: str = "org/set") -> dict[str, bytes]:
    return dataset_files(hub, BRANCH, repo)


def records_on_branch(hub, repo: str = "org/set") -> list[dict]:
    files = sorted(p for p in on_branch(hub, repo) if p.startswith(".build/records/"))
    return [entry["record"] for p in files for entry in json.loads(on_branch(hub, repo)[p])]


def assert_branch_is_consistent(hub, whole: Path, repo: str = "org/set") -> None:
    """Every file has its record and every record its file, and the files are those of a plain build."""
    files = {p: c for p, c in on_branch(hub, repo).items() if p.startswith("data/")}
    assert {record["file"] for record in records_on_branch(hub, repo)} == files.keys()
    expected = data_files(whole)
    assert {p: c for p, c in expected.items() if p in files} == files


def commits(hub, branch: str, repo: str = "org/set") -> list[str]:
    requests = [r for r in hub.requests if r.method == "POST" and f"{repo}/commit/" in r.path]
    return [r.path for r in requests if r.path.endswith(f"/commit/{branch}")]


WATCHED = """
import os, sys
from builder.cli.main import main
from builder.build import outbox
peak = 0

def watch(event, arguments):
    # The moment before a finished shard gets its name is the one at which the directory is fullest.
    global peak
    if event == "os.rename" and os.path.basename(folder := os.path.dirname(arguments[0])) == "data":
        peak = max(peak, len(os.listdir(folder)))

sys.addaudithook(watch)
sys.argv = ["logit-dataset", *ARGUMENTS]
try:
    main()
finally:
    print("peak", peak, file=sys.stderr)
"""


def test_there_are_never_more_than_four_shards_on_the_disk(hub, client, recipe, whole, tmp_path):
    def slow(request):
        if request.method == "PUT":
            time.sleep(0.1)  # several times what computing a shard takes

    hub.faults.append(slow)
    arguments = ["build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set"]
    arguments += ["--discard-local", "--device", "cpu"]
    result = client.python(f"ARGUMENTS = {[str(a) for a in arguments]!r}\n{WATCHED}")
    assert result.returncode == 0, result.stderr
    assert_delivered(hub, whole, tmp_path / "out")
    assert int(re.search(r"peak (\d+)", result.stderr)[1]) == 4
    assert len(data_files(whole)) == SHARDS
    assert len(commits(hub, BRANCH)) <= SHARDS / 2 + 1  # two or more at a time, and the card
    assert len(commits(hub, "main")) == 1
    out, done, following = result.stdout.splitlines()
    assert re.match(r".*: complete, [\d,]+ tokens in \d+ rows, ", out)
    sha = hub.repos["dataset", "org/set"].tags["v1.0.0"]
    assert done == f"org/set v1.0.0 is published, commit {sha}"
    assert following == 'next: load_dataset("org/set", revision="v1.0.0", split="train")'
    assert_nothing_planted(hub, tmp_path / "out", result)
    assert_nothing_planted(hub, recipe)  # nor where the corpus is
    record = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert record["rows"] == 5
    assert record["max_abs_error"] < 0.01


def test_the_card_is_that_of_a_dataset_that_was_published_whole(hub, client, deliver, recipe, tmp_path):  # fmt: skip
    assert deliver(tmp_path / "sent").returncode == 0
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "sent", plain)
    (plain / ".curves.json").unlink()
    for path, content in dataset_files(hub, "v1.0.0").items():
        (plain / path).write_bytes(content)
    before = stand_in.directory_files(plain)
    for directory in (plain, tmp_path / "sent"):
        assert client.cli("card", directory).returncode == 0
        after = stand_in.directory_files(directory)
        assert {p: before[p] for p in after if p != ".curves.json"} == {
            p: c for p, c in after.items() if p != ".curves.json"
        }


def test_a_new_machine_goes_on_from_the_branch_alone(hub, deliver, whole, tmp_path):
    built = []
    for number, shards in enumerate((1, 3, 4)):
        result = deliver(tmp_path / f"machine-{number}", "--max-shards", shards)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"stopped early after {shards} new shard{'s' * (shards > 1)}; run the same command to resume\n"  # fmt: skip
        assert_branch_is_consistent(hub, whole)
        built.append(len(records_on_branch(hub)))
        assert not data_files(tmp_path / f"machine-{number}")
        shutil.rmtree(tmp_path / f"machine-{number}")
    assert built == [1, 4, 8]
    assert not hub.repos["dataset", "org/set"].tags
    assert deliver(tmp_path / "last").returncode == 0
    assert_delivered(hub, whole, tmp_path / "last")
    assert len(hub.arrived) == len(set(hub.arrived)) == SHARDS


def test_the_size_of_batches_that_was_tried_is_that_of_all_machines_and_versions(
    hub, deliver, tiny_teacher_dir, tmp_path
):
    def write(documents: int) -> Path:
        name = tmp_path / f"recipe-{documents}"
        name.mkdir()
        limit = f"{LICENSED['corpus']}\nmax_documents = {documents}"
        auto = 'max_length = 64\nbatch_tokens = "auto"'
        return write_recipe(name, tiny_teacher_dir, sequences=auto, corpus=limit)

    recipe = write(8)
    tried = deliver(tmp_path / "a", "--max-shards", 1, recipe=recipe)
    assert tried.returncode == 0, tried.stderr
    found = re.search(r'batch_tokens = "auto" is ([\d,]+) for this build', tried.stderr)[1]
    for directory, documents, tag in (("b", 8, "v1.0.0"), ("c", 12, "v1.1.0")):
        recipe = recipe if documents == 8 else write(documents)
        result = deliver(tmp_path / directory, recipe=recipe)
        assert result.returncode == 0, result.stderr
        assert "for this build" not in result.stderr
        manifest = json.loads(dataset_files(hub, tag)["manifest.json"])
        assert manifest["recipe"]["sequences"]["batch_tokens"] == int(found.replace(",", ""))
    again = deliver(tmp_path / "d", recipe=recipe)
    assert again.returncode == 0, again.stderr
    assert "built already" in again.stdout


def test_a_new_machine_takes_the_commits_that_the_branch_knows(
    hub, deliver, tiny_teacher_dir, tmp_path
):
    """The corpus and the teacher have moved on since."""

    def corpus(text: str) -> dict[str, bytes]:
        rows = [{"id": row["id"], "text": row["text"] + text} for row in sample_documents(26)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return {"data/train-00000-of-00001.parquet": sink.getvalue()}

    first = hub.commit("dataset", "org/corpus", corpus(""))
    hub.commit("model", "org/tiny", stand_in.directory_files(tiny_teacher_dir))
    recipe = write_recipe(tmp_path, tiny_teacher_dir)
    text = re.sub(r"^files = .*", 'repo = "org/corpus"', recipe.read_text(), flags=re.M)
    recipe.write_text(re.sub(r"^path = .*", 'repo = "org/tiny"', text, flags=re.M))
    assert deliver(tmp_path / "one", "--max-shards", 2, recipe=recipe).returncode == 0
    assert_nothing_planted(hub, tmp_path / "one")
    hub.commit("dataset", "org/corpus", corpus(" And more."))
    hub.commit("model", "org/tiny", {"config.json": b"{}"})
    result = deliver(tmp_path / "two", recipe=recipe)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "two")
    assert manifest["corpus"]["commit"] == first
    assert manifest["totals"]["documents"] == 26


def test_when_all_is_done_the_same_command_says_so_anywhere(hub, deliver, client, recipe, tmp_path):
    assert deliver(tmp_path / "out", "--tag", "v1.0.0").returncode == 0
    repo = hub.repos["dataset", "org/set"]
    before = (dict(repo.tags), dict(repo.branches), list(hub.arrived))
    last = next(c for c, message in reversed(repo.messages.items()) if message == "Files of v1.0.0")
    repo.branches[BRANCH] = last  # left over
    for output in (tmp_path / "out", tmp_path / "new"):
        for options in ((), ("--tag", "v1.0.0")):
            result = deliver(output, *options)
            assert result.returncode == 0, result.stderr
            assert f"org/set v1.0.0 was published already, commit {repo.tags['v1.0.0']}" in result.stdout  # fmt: skip
    assert (dict(repo.tags), dict(repo.branches), list(hub.arrived)) == before
    assert not (tmp_path / "new").exists()
    # A new description is a new version, for which the data are not needed here.
    text = recipe.read_text().replace('name = "tiny"', 'name = "tiny"\ndescription = "Anew."')
    described = recipe.with_name("described.toml")
    described.write_text(text)
    assert client.cli("build", described, "--output", tmp_path / "out").returncode == 0
    result = client.cli("publish", "org/set", tmp_path / "out", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "org/set v1.0.1 is published" in result.stdout
    assert "Anew." in dataset_files(hub, "v1.0.1")["README.md"].decode()
    assert list(hub.arrived) == before[2]


def test_a_new_licence_or_description_is_a_new_version(hub, deliver, recipe, tmp_path):
    assert deliver(tmp_path / "out").returncode == 0
    arrived = list(hub.arrived)
    text = recipe.read_text().replace('name = "tiny"', 'name = "tiny"\ndescription = "Anew."')
    described = tmp_path / "described.toml"
    text = re.sub(r'license = "[^"]*"', 'license = "cc-by-sa-4.0"', text)
    described.write_text(text.replace('"corpus.jsonl"', f'"{recipe.parent}/corpus.jsonl"'))
    message = r"org/set v1\.0\.0 has the same data, and only the description differs \(.*description: null.*; run this command"
    assert_one_line(deliver(tmp_path / "new", recipe=described), message)
    assert not (tmp_path / "new").exists()
    result = deliver(tmp_path / "out", recipe=described)
    assert "org/set v1.0.1 is published" in result.stdout, result.stderr
    card = dataset_files(hub, "v1.0.1")["README.md"].decode()
    assert "Anew." in card
    assert "cc-by-sa-4.0" in card
    assert hub.arrived == arrived
    again = deliver(tmp_path / "out", recipe=described)
    assert "org/set v1.0.1 was published already" in again.stdout, again.stderr


def test_the_branch_of_another_build_is_left_alone(hub, deliver, tiny_teacher_dir, tmp_path):
    """A smaller version is out, or lies ready; meanwhile another machine builds a larger one."""
    small, medium, large = (
        write_recipe(tmp_path / str(n), tiny_teacher_dir, corpus=f"{LICENSED['corpus']}\nmax_documents = {n}")
        for n in (3, 6, 12)
    )  # fmt: skip
    assert deliver(tmp_path / "small", recipe=small).returncode == 0
    build(load_recipe(medium), medium.parent, tmp_path / "medium")
    assert deliver(tmp_path / "large", "--max-shards", 2, recipe=large).returncode == 0
    before = on_branch(hub)
    again = deliver(tmp_path / "small", recipe=small)
    assert "org/set v1.0.0 was published already" in again.stdout
    between = deliver(tmp_path / "medium", recipe=medium)
    assert "org/set v1.1.0 is published" in between.stdout, between.stderr
    assert on_branch(hub) == before
    last = deliver(tmp_path / "large", recipe=large)
    assert "org/set v1.2.0 is published" in last.stdout, last.stderr
    assert list(hub.repos["dataset", "org/set"].branches) == ["main"]


def test_a_branch_that_was_made_and_never_used_is_no_hindrance(
    hub, deliver, tiny_teacher_dir, tmp_path
):
    """A build was killed before its first shard was sent, and main has moved on since."""
    small, large = (
        write_recipe(tmp_path / str(n), tiny_teacher_dir, corpus=f"{LICENSED['corpus']}\nmax_documents = {n}")
        for n in (3, 6)
    )  # fmt: skip
    assert deliver(tmp_path / "small", recipe=small).returncode == 0
    repo = hub.repos["dataset", "org/set"]
    repo.branches[BRANCH] = repo.branches["main"]
    hub.commit("dataset", "org/set", {**repo.commits[repo.branches["main"]], "LICENSE": b"theirs"})
    result = deliver(tmp_path / "large", recipe=large)
    assert "org/set v1.1.0 is published" in result.stdout, result.stderr
    assert list(repo.branches) == ["main"]
    assert dataset_files(hub, "v1.1.0")["LICENSE"] == b"theirs"
    assert read_manifest(tmp_path / "large")["totals"]["documents"] == 6


def test_a_branch_that_is_left_over_is_no_hindrance(hub, deliver, tiny_teacher_dir, tmp_path):
    """Its build is published, but it could not be removed."""
    small, large = (
        write_recipe(tmp_path / str(n), tiny_teacher_dir, corpus=f"{LICENSED['corpus']}\nmax_documents = {n}")
        for n in (3, 6)
    )  # fmt: skip
    refuse = happening("removal of the branch", Refusal(403, {}))
    hub.faults.append(refuse)
    result = deliver(tmp_path / "small", recipe=small)
    assert f"branch {BRANCH} of org/set could not be deleted, which does no harm" in result.stderr
    assert ".build/plan.json" in on_branch(hub)
    result = deliver(tmp_path / "large", recipe=large)
    assert "org/set v1.1.0 is published" in result.stdout, result.stderr
    assert list(hub.repos["dataset", "org/set"].branches) == ["main"]


def test_a_dataset_that_is_built_anew_is_not_taken_for_what_is_left_over(
    hub, deliver, whole, tmp_path
):
    assert deliver(tmp_path / "out").returncode == 0
    anew = ("--tag", "v2.0.0")
    assert deliver(tmp_path / "anew", *anew, "--max-shards", 2).returncode == 0
    before = on_branch(hub)
    again = deliver(tmp_path / "again")
    assert "org/set v1.0.0 was published already" in again.stdout, again.stderr
    assert on_branch(hub) == before
    last = deliver(tmp_path / "last", *anew)
    assert "org/set v2.0.0 is published" in last.stdout, last.stderr
    assert list(hub.repos["dataset", "org/set"].branches) == ["main"]


def test_a_tag_that_is_too_small_is_refused_before_anything_is_computed(
    hub, deliver, tiny_teacher_dir, tmp_path
):
    def write(name: str, documents: int = 6, **changes: str) -> Path:
        corpus = f"{LICENSED['corpus']}\nmax_documents = {documents}"
        return write_recipe(tmp_path / name, tiny_teacher_dir, corpus=corpus, **changes)

    assert deliver(tmp_path / "out", recipe=write("first")).returncode == 0
    before = list(hub.arrived)
    narrow, fewer, more = write("narrow", output="top_k = 10"), write("fewer", 5), write("more", 7)
    result = deliver(tmp_path / "1", "--tag", "v1.1.0", recipe=narrow)
    assert_one_line(result, r"v1\.1\.0 is too small a step from v1\.0\.0: .*recipe\.output\..*, which needs a new major version; use --tag v2\.0\.0")  # fmt: skip
    result = deliver(tmp_path / "2", "--tag", "v1.1.0", recipe=fewer)
    assert_one_line(result, r"v1\.1\.0 is too small a step .*1 document fewer.*--tag v2\.0\.0")
    assert list(hub.repos["dataset", "org/set"].branches) == ["main"]
    result = deliver(tmp_path / "3", "--tag", "v1.0.1", "--max-shards", 0, recipe=more)
    assert result.returncode == 0
    assert "--tag v1.0.1 is right only if the data are those of v1.0.0; if the build adds rows, use --tag v1.1.0" in result.stderr  # fmt: skip
    (more.parent / "corpus.jsonl").write_text((more.parent / "corpus.jsonl").read_text() + "\n")
    result = deliver(tmp_path / "4", "--tag", "v1.1.0", recipe=more)
    assert_one_line(result, r"v1\.1\.0 is too small a step .*corpus\.files.*--tag v2\.0\.0")
    assert hub.arrived == before
    assert not data_files(tmp_path / "4")
    result = deliver(tmp_path / "3", "--tag", "v2.0.0", recipe=more)
    assert "org/set v2.0.0 is published" in result.stdout, result.stderr


LIMITED = """
import sys
from builder.build import outbox
from builder.plan import storage
from builder.cli.main import main
modules = {"storage": storage, "outbox": outbox}
for module, name, value in LIMITS:
    setattr(modules[module], name, value)
sys.argv = ["logit-dataset", *ARGUMENTS]
main()
"""


@pytest.mark.parametrize(
    ("limits", "message", "sent"),
    [
        ([("storage", "MAX_FILES", 3), ("outbox", "MAX_FILES", 3)], r"data/train-000-00003\.parquet is one more than the 3 files that the Hub takes; begin anew with a larger output\.shard_tokens", 3),
        ([("storage", "MAX_FILE_BYTES", 1000)], r"the Hub takes files of up to 0 GB, not 17\.2 kB: output\.shard_tokens must be 11 or less", 0),
        ([("outbox", "MAX_FILE_BYTES", 1000)], r"data/train-000-00000\.parquet has 0\.0 GB, and the Hub takes files of up to 0 GB; begin anew with a smaller", 0),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_take_is_not_built_for_weeks(
    hub, client, recipe, tmp_path, limits, message, sent
):
    arguments = ["build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set"]
    arguments += ["--device", "cpu"]
    names = f"ARGUMENTS, LIMITS = {[str(a) for a in arguments]!r}, {limits}"
    result = client.python(f"{names}\n{LIMITED}")
    assert_one_line(result, message)
    assert ("estimated from the first documents: the Hub takes 3 files, not " in result.stderr) == (sent == 3)  # fmt: skip
    assert len(hub.arrived) <= sent
    begun = tmp_path / "out" / ".build" / "teacher.json"
    assert begun.exists() == (limits[-1][0] == "outbox")


@pytest.mark.parametrize(("error", "why"), [("ValueError", "why not"), ("KeyError", "KeyError")])
def test_an_estimate_that_fails_stops_nothing(client, recipe, hub, tmp_path, error, why):
    """Such as of a teacher whose tokenizer comes with code of its own."""
    arguments = ["build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set"]
    arguments += ["--device", "cpu", "--max-shards", 1]
    code = f"""
import sys
from builder.cli import main as cli
from builder.build import delivery
def expect(*_):
    raise {error}("why not")
delivery.expect = expect
sys.argv = ["logit-dataset", *{[str(a) for a in arguments]!r}]
cli.main()
"""
    result = client.python(code)
    assert result.returncode == 0, result.stderr
    assert f"the size of the dataset cannot be estimated ({why})" in result.stderr
    assert len(records_on_branch(hub)) == 1


def test_what_would_fail_in_the_end_fails_at_once(
    hub, deliver, client, recipe, tiny_teacher_dir, tmp_path
):
    output = tmp_path / "out"
    unlicensed = write_recipe(tmp_path / "unlicensed", tiny_teacher_dir, corpus="")
    refusals = [
        (deliver(output, recipe=unlicensed), r"the recipe does not state corpus\.license"),
        (deliver(output, repo="somewhere"), "'somewhere' is not a Hub dataset name"),
        (deliver(output, "--tag", "1.0"), r"'1\.0' is not a version like v1\.2\.3"),
        (deliver(output, repo="other/set"), "the token may not write to other/set"),
        (deliver(output, "--message", "x" * 501), "--message has 501 characters"),
    ]
    many = write_recipe(
        tmp_path / "many", tiny_teacher_dir, corpus=f"{LICENSED['corpus']}\nmax_tokens = 2_000_001"
    )
    refusals.append(
        (
            deliver(output, recipe=many),
            "the Hub takes 10,000 files, not 10,001: output.shard_tokens must be",
        )
    )
    hub.is_token_valid = False
    refusals.append((deliver(output), "the Hub does not accept the token"))
    hub.is_token_valid = True
    for result, message in refusals:
        assert_one_line(result, message)
    assert not hub.repos
    for option in ("--discard-local", "--private"):
        result = client.cli("build", recipe, "--output", output, option)
        assert_one_line(result, r"--discard-local, .* need --publish-to")
    hub.commit("dataset", "org/set", {"data.csv": b"1"})
    assert_one_line(deliver(output), r"org/set holds something other .*data\.csv")
    hub.commit("dataset", "org/set", {})
    hub.commit("dataset", "org/set", {"notes.txt": b"1"}, branch=BRANCH)
    assert_one_line(deliver(output), f"branch {BRANCH} of org/set holds something other")
    assert on_branch(hub) == {"notes.txt": b"1"}
    assert not data_files(output) if output.exists() else True


def test_another_recipe_is_refused_with_the_fields(hub, deliver, tiny_teacher_dir, tmp_path):
    assert deliver(tmp_path / "out", "--max-shards", 2).returncode == 0
    before = on_branch(hub)
    other = write_recipe(tmp_path / "other", tiny_teacher_dir, output="top_k = 10")
    message = (
        rf"branch {BRANCH} of org/set holds an unfinished build with another plan \(recipe\.output\.shard_tokens: 200 → "
        r"300; recipe\.output\.top_k: 20 → 10\); resume that one, delete it, or choose another repository"
    )
    assert_one_line(deliver(tmp_path / "new", recipe=other), message)
    assert_one_line(deliver(tmp_path / "out", recipe=other), r"another plan \(recipe\.output")
    assert on_branch(hub) == before


def test_shards_that_are_elsewhere_are_not_built_again_by_mistake(
    hub, deliver, client, recipe, whole, tmp_path
):
    output = tmp_path / "out"
    assert deliver(output, "--max-shards", 2).returncode == 0
    message = r"shards of .* are in org/set and no longer here; add --publish-to org/set"
    assert_one_line(client.cli("build", recipe, "--output", output), message)
    assert_one_line(deliver(output, repo="org/another"), message)
    assert deliver(output).returncode == 0
    assert_delivered(hub, whole, output)


def test_leftovers_of_a_kill_take_no_room(hub, deliver, whole, tmp_path):
    """Shards that were committed but not yet deleted, one that was renamed but had no record, and half of one."""
    output = tmp_path / "out"
    assert deliver(output, "--max-shards", 3).returncode == 0
    for path, content in list(data_files(whole).items())[:5]:
        (output / path).write_bytes(content)
    (output / "data" / ".train-000-00005.parquet.partial").write_bytes(b"half")
    assert deliver(output, "--max-shards", 0).returncode == 0
    assert not list((output / "data").iterdir())
    assert deliver(output).returncode == 0
    assert_delivered(hub, whole, output)


def test_a_build_that_was_begun_here_is_sent_and_kept_if_asked(hub, client, recipe, whole, tmp_path):  # fmt: skip
    output = tmp_path / "out"
    command = ("build", recipe, "--output", output, "--device", "cpu")
    assert client.cli(*command, "--max-shards", 6).returncode == 0
    before = data_files(output)
    assert len(before) == 6
    result = client.cli(*command, "--publish-to", "org/set")
    assert result.returncode == 0, result.stderr
    assert len(commits(hub, BRANCH)) <= 3
    assert data_files(output) == data_files(whole)
    assert stand_in.directory_files(output) == dataset_files(hub, "v1.0.0")
    assert len(hub.arrived) == len(set(hub.arrived)) == SHARDS
    # And where all is here already, nothing but publishing is left.
    assert client.cli(*command, "--publish-to", "org/set").returncode == 0


def test_two_machines_at_one_branch(hub, deliver, whole, tmp_path):
    """The second one comes while the first one builds: it is the first that has to stop."""
    theirs = []

    def intrude(request):
        if request.path.endswith(f"/commit/{BRANCH}") and not theirs:
            theirs.append(True)
            files = {**on_branch(hub), ".build/plan.json": b"{}"}
            hub.commit("dataset", "org/set", files, branch=BRANCH)

    hub.faults.append(intrude)
    result = deliver(tmp_path / "out")
    assert_one_line(
        result,
        rf"branch {BRANCH} of org/set was moved by someone else .*another machine building the same dataset\? Let only one "
        r"continue\. Finished shards are safe",
    )
    assert on_branch(hub)[".build/plan.json"] == b"{}"
    assert not records_on_branch(hub)
    assert data_files(tmp_path / "out")


PATIENT = """
import sys, time
from builder.cli.main import main
time.sleep = lambda seconds: sys.stderr.write(f"slept {seconds}\\n")  # in one piece
sys.argv = ["logit-dataset", *ARGUMENTS]
main()
"""


@pytest.fixture
def deliver_fast(client, recipe):
    """The same command, where waiting takes no time but is told."""

    def run(output: Path):
        arguments = ["build", recipe, "--output", output, "--publish-to", "org/set"]
        arguments += ["--discard-local", "--device", "cpu"]
        return client.python(f"ARGUMENTS = {[str(a) for a in arguments]!r}\n{PATIENT}")

    return run


def happening(step: str, answer):
    return once(STEPS[step], answer)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_is_survived_at_every_step(hub, deliver_fast, whole, tmp_path, trouble):
    faults = {step: happening(step, TROUBLES[trouble]) for step in STEPS}
    hub.faults += faults.values()
    result = deliver_fast(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [step for step, fault in faults.items() if not fault.seen] == []
    assert_delivered(hub, whole, tmp_path / "out")
    assert len(hub.arrived) == len(set(hub.arrived)) == SHARDS
    slept = [float(line.split()[1]) for line in result.stderr.splitlines() if "slept" in line]
    assert len(slept) >= len(STEPS)
    if trouble == "429":
        assert min(slept) >= 7


def test_an_answer_that_is_lost_is_not_a_thing_done_twice(hub, deliver_fast, whole, tmp_path):
    losses = {step: happening(step, Cut) for step in STEPS}
    hub.losses += losses.values()
    result = deliver_fast(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [step for step, loss in losses.items() if not loss.seen] == []
    assert_delivered(hub, whole, tmp_path / "out")
    assert len(set(hub.arrived)) == SHARDS
    assert len(hub.arrived) <= SHARDS + 1  # the one whose arrival nobody heard of


def test_it_outlives_an_hour_without_commits_and_then_says_so(hub, deliver_fast, whole, tmp_path):
    """As where the Hub's hourly limit is reached."""
    refused: list = []

    def limit(request):
        if request.path.endswith(f"/commit/{BRANCH}") and len(refused) < limit.times:
            refused.append(request)
            return Refusal(429, {})
        return None

    hub.faults.append(limit)
    limit.times = 12
    result = deliver_fast(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert_delivered(hub, whole, tmp_path / "out")
    assert "the Hub answers 429: trying again in 300 s" in result.stderr

    refused.clear()
    hub.repos.clear()
    limit.times = 10**6
    result = deliver_fast(tmp_path / "other")
    assert_one_line(result, "the Hub's rate limit is reached; wait a few minutes.*Finished shards are safe; the same command resumes")  # fmt: skip
    waited = [int(s) for s in re.findall(r"trying again in (\d+) s", result.stderr)]
    assert sum(waited) > 3600
    assert data_files(tmp_path / "other")


def test_publishing_in_the_end_is_as_patient_as_building(hub, deliver_fast, whole, tmp_path):
    """The Hub counts commits by the hour, and a build that discards its shards has made many."""
    refused: list = []

    def limit(request):
        if request.path.endswith("/commit/main") and len(refused) < 6:
            refused.append(request)
            return 429 if len(refused) % 2 else 520  # which Python has no name for
        return None

    hub.faults.append(limit)
    result = deliver_fast(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(refused) == 6
    assert_delivered(hub, whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (520, None, "the Hub answers 520; try again later"),  # which Python has no name for
        (500, "see https://hub.example", "the Hub answers 500 Internal Server Error; try again later"),
        (403, "Storage limit reached", "the token may not write to org/set (Storage limit reached); use a token with write"),
    ],
)  # fmt: skip
def test_what_the_hub_says_is_told_without_addresses(status, said, expected):
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example/secret"))
    error = HfHubHTTPError("https://hub.example/secret", response=response, server_message=said)
    assert explain(error, "org/set").startswith(expected)


LOSING_XET = """
import sys, time
import huggingface_hub._commit_api as commit_api
from builder.cli.main import main
time.sleep = lambda seconds: None
original, calls = commit_api._upload_files, 0
def upload(**options):
    global calls
    calls += 1
    if calls in FAILING:
        raise ERROR("Server error: 503, domain: https://cas.example/v1/xorbs?sig=SECRET")
    return original(**options)
commit_api._upload_files = upload
"""


@pytest.mark.parametrize("error", ["ConnectionError", "TimeoutError", "KeyError"])
def test_what_xet_raises_is_survived_and_never_printed(hub, client, recipe, whole, tmp_path, error):
    arguments = ["build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set"]
    arguments += ["--discard-local", "--device", "cpu"]
    code = f"sys.argv = ['logit-dataset', *{[str(a) for a in arguments]!r}]\nmain()"
    lasting = client.python(f"ERROR, FAILING = {error}, range(2, 99)\n{LOSING_XET}{code}")
    reason = {"KeyError": r"uploading failed \(KeyError\)"}
    message = reason.get(error, rf"the Hub cannot be reached \(the connection failed \({error}\)\)")
    assert_one_line(lasting, rf"{message}.*\. Finished shards are safe; the same command resumes")
    assert "SECRET" not in lasting.stderr + lasting.stdout
    if error not in reason:
        passing = client.python(f"ERROR, FAILING = {error}, (2, 3)\n{LOSING_XET}{code}")
        assert passing.returncode == 0, passing.stderr
        assert "SECRET" not in passing.stderr
        assert f"the connection failed ({error}): trying again in 1 s" in passing.stderr
        assert_delivered(hub, whole, tmp_path / "out")


def test_a_shard_that_changes_before_it_is_sent_stops_the_build_and_is_built_again(
    hub, deliver, whole, tmp_path
):
    output = tmp_path / "out"

    def change(request):
        # Its upload has been announced: its rows were checked, and are now changed on the disk.
        if request.path.endswith(f"/preupload/{BRANCH}") and not change.victim:
            change.victim = min((output / "data").glob("*.parquet"))
            content = bytearray(change.victim.read_bytes())
            content[100] ^= 1
            change.victim.write_bytes(content)

    change.victim = None
    hub.faults.append(change)
    result = deliver(output)
    assert_one_line(result, r"data/train-000-00000\.parquet has changed since it was finished; it was not sent\. Finished")  # fmt: skip
    assert not [p for p in on_branch(hub) if p.startswith("data/")]
    result = deliver(output)
    assert result.returncode == 0, result.stderr
    assert "data/train-000-00000.parquet does not have the hash in its record: building it again" in result.stderr  # fmt: skip
    assert_delivered(hub, whole, output)


def test_rows_that_break_an_invariant_are_never_sent(hub, client, recipe, tmp_path):
    """A build that computes wrongly stops at its first shard, not after a week."""
    code = """
import sys
import builder.capture.pipeline
from builder.cli.main import main
original = builder.capture.pipeline.capture
def wrong(*args, **kwargs):
    found = original(*args, **kwargs)
    found["tail_logprob"] = found["tail_logprob"] * 0.5
    return found
builder.capture.pipeline.capture = wrong
"""
    arguments = ["build", recipe, "--output", tmp_path / "out", "--publish-to", "org/set", "--device", "cpu"]  # fmt: skip
    code += f"sys.argv = ['logit-dataset', *{[str(a) for a in arguments]!r}]\nmain()"
    assert_one_line(client.python(code), r"data/train-000-00000\.parquet row \d+: .*do not sum to 1.*; it was not sent")  # fmt: skip
    assert not hub.arrived


def test_a_file_on_the_branch_that_is_not_what_its_record_says_is_built_again(
    hub, deliver, whole, tmp_path
):
    assert deliver(tmp_path / "out", "--max-shards", 4).returncode == 0
    files = on_branch(hub)
    del files["data/train-000-00001.parquet"]
    files["data/train-000-00002.parquet"] += b"?"
    hub.commit("dataset", "org/set", files, branch=BRANCH)
    result = deliver(tmp_path / "new")
    assert result.returncode == 0, result.stderr
    for index in (1, 2):
        assert f"data/train-000-0000{index}.parquet on branch {BRANCH} does not match its record: building it again" in result.stderr  # fmt: skip
    assert_delivered(hub, whole, tmp_path / "new")
    assert len(records_of(read_manifest(tmp_path / "new"))) == SHARDS


ENDS_ELSEWHERE = """
import sys, time
from builder.cli.main import main
from builder.build.outbox import Outbox
from builder.build.stream import SequenceStream
begin, put = SequenceStream.__init__, Outbox.put

def begin_another(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    self._shard_tokens = TOKENS

def put_and_wait(self, record):
    put(self, record)
    time.sleep(1)  # until it is sent

SequenceStream.__init__, Outbox.put = begin_another, put_and_wait
sys.argv = ["logit-dataset", *ARGUMENTS]
main()
"""


@pytest.mark.parametrize("tokens", [50, 10**6])
def test_a_shard_that_ends_elsewhere_when_it_is_built_again_is_never_sent(
    hub, client, recipe, deliver, tmp_path, tokens
):
    """Before the next one, or behind all of them: documents would be there twice, or not at all."""
    assert deliver(tmp_path / "out", "--max-shards", 4).returncode == 0
    files = on_branch(hub)
    del files["data/train-000-00001.parquet"]
    hub.commit("dataset", "org/set", files, branch=BRANCH)
    arrived = list(hub.arrived)
    arguments = ["build", recipe, "--output", tmp_path / "new", "--publish-to", "org/set"]
    arguments += ["--discard-local", "--device", "cpu"]
    names = f"ARGUMENTS, TOKENS = {[str(a) for a in arguments]!r}, {tokens}"
    assert_one_line(
        client.python(f"{names}\n{ENDS_ELSEWHERE}"),
        r"data/train-000-00002\.parquet does not start where the shard before it ends.*start again",
    )
    assert (hub.arrived, on_branch(hub)) == (arrived, files)
    assert not list((tmp_path / "new" / ".build" / "records").iterdir())


DELIVERED = """
from pathlib import Path
from builder.build.delivery import deliver
from builder.recipe.file import load_recipe
recipe = Path(RECIPE)
try:
    deliver(load_recipe(recipe), recipe.parent, Path(OUTPUT), "org/set", discard=True, recompute=RECOMPUTE, notice=print)
except ValueError as error:
    raise SystemExit(f"error: {error}")
"""


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        (0, r"data/train-000-\d+\.parquet has other bytes on the Hub than were sent"),
        (999, "rows to recompute cannot be read from org/set"),
    ],
)
def test_what_is_nowhere_else_is_not_thrown_away(
    hub, client, recipe, deliver, whole, tmp_path, recompute, message
):
    """Large file storage lies; the branch stays, for it holds all other shards, and nobody else does."""
    hub.damage.append(lambda content: content[:-400] + bytes(300) + content[-100:])
    names = f"RECIPE, OUTPUT, RECOMPUTE = {str(recipe)!r}, {str(tmp_path / 'out')!r}, {recompute}"
    assert_one_line(
        client.python(f"{names}\n{DELIVERED}"),
        rf"{message}.*; if this persists, delete the damaged files from branch {BRANCH}, and resume the build in an empty",
    )
    assert not hub.repos["dataset", "org/set"].tags
    expected = data_files(whole)
    sound = {p: c for p, c in on_branch(hub).items() if p not in expected or c == expected[p]}
    assert len(sound) == len(on_branch(hub)) - 1
    hub.commit("dataset", "org/set", sound, branch=BRANCH)
    assert deliver(tmp_path / "new").returncode == 0
    assert_delivered(hub, whole, tmp_path / "new")


def test_seven_kills_at_random_requests(hub, client, deliver, whole, tmp_path):
    rng, kills, attempt = random.Random(5), 0, 0

    def kill_at(number: int, *, after: bool):
        count = 0

        def fault(_):
            nonlocal count
            count += 1
            if count == number:
                os.kill(int(client.pid_file.read_text()), signal.SIGKILL)
                raise Cut

        (hub.losses if after else hub.faults).append(fault)

    while kills < 7:
        repo, status, machine = f"org/set{attempt}", -signal.SIGKILL, 0
        hub.arrived.clear()
        while status == -signal.SIGKILL:
            output = tmp_path / f"{attempt}-{machine}"
            kill_at(rng.randint(1, 110), after=rng.random() < 0.5)
            status = deliver(output, repo=repo).returncode
            hub.settle()
            hub.faults.clear()
            hub.losses.clear()
            if status == -signal.SIGKILL:
                kills += 1
                if BRANCH in hub.repos.get(("dataset", repo), stand_in.Repo("dataset", "")).branches:  # fmt: skip
                    assert_branch_is_consistent(hub, whole, repo)
                if output.exists() and not (output / "manifest.json").exists():
                    assert len(list((output / "data").iterdir())) <= 4
                machine += rng.random() < 0.5  # else the same one goes on
        assert status == 0
        found = hub.repos["dataset", repo]
        assert list(found.tags) == ["v1.0.0"]
        assert list(found.branches) == ["main"]
        data = {p: c for p, c in dataset_files(hub, "v1.0.0", repo).items() if p.startswith("data/")}  # fmt: skip
        assert data == data_files(whole)
        attempt += 1


def test_more_workers_than_partitions_are_refused_before_anything_is_made(hub, deliver, tmp_path):
    pytest.importorskip("ray")
    result = deliver(tmp_path / "out", "--workers", "9")
    assert_one_line(result, r"--workers is 9, but output\.partitions is 1.*use --workers 1")
    assert ("dataset", "org/set") not in hub.repos


def test_no_row_is_recomputed_where_none_is_asked_for(hub, deliver, tmp_path):
    assert deliver(tmp_path / "out", "--recompute", "0").returncode == 0
    files = dataset_files(hub, "v1.0.0")
    assert "verification.json" not in files
    assert "--recompute" in files["README.md"].decode()


def test_nothing_is_deleted_here_that_the_hub_does_not_have_as_it_was_sent(hub, deliver, tmp_path):
    spoiled: list[str] = []

    def spoil(request):
        if request.method == "POST" and "/paths-info/" in request.path and not spoiled:
            found = hub.repos["dataset", "org/set"]
            files = found.commits[found.branches[BRANCH]]
            spoiled.append(next(name for name in files if name.startswith("data/")))
            files[spoiled[0]] = bytes(len(files[spoiled[0]]))

    hub.faults.append(spoil)
    assert_one_line(deliver(tmp_path / "out"), "on the Hub differs from what was sent")
    assert (tmp_path / "out" / spoiled[0]).exists()
