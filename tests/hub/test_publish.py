"""A finished build → a tagged version, with the stock client and real HTTP, against a stand-in of the Hub on this machine."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from builder.build.build import build
from builder.dataset.manifest import read_manifest
from builder.hub.versions import Version, choose, compare
from builder.recipe.file import load_recipe
from logit_dataset.schema import SCHEMA_VERSION
from tests import loopback_hub as stand_in
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.loopback_hub import TOKEN, USER, Cut, Refusal

LICENSED = {
    "corpus": 'license = "cc-by-4.0"\nlanguage = ["en", "no"]',
    "teacher": 'license = "apache-2.0"',
}


def build_dataset(base: Path, teacher_dir: Path, **changes: str) -> Path:
    """A finished, licensed build in `base`/out."""
    base.mkdir(exist_ok=True)
    write_jsonl(base / "corpus.jsonl", sample_documents(40))
    sections = {key: f"{LICENSED.get(key, '')}\n{changes.get(key, '')}".strip() for key in {*LICENSED, *changes}}  # fmt: skip
    (base / "recipe.toml").write_text(recipe_text(teacher_dir, "corpus.jsonl", **sections))
    build(load_recipe(base / "recipe.toml"), base, base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def small(tiny_teacher_dir, tmp_path_factory):
    """Rows of the first 20 documents. Read only."""
    return build_dataset(
        tmp_path_factory.mktemp("small") / "x", tiny_teacher_dir, corpus="max_documents = 20"
    )


@pytest.fixture(scope="module")
def large(tiny_teacher_dir, tmp_path_factory):
    """Rows of all 40. Read only."""
    return build_dataset(tmp_path_factory.mktemp("large") / "x", tiny_teacher_dir)


@pytest.fixture
def out(small, tmp_path):
    """A copy of `small` that may be written to."""
    return Path(shutil.copytree(small, tmp_path / "out"))


@pytest.fixture
def publish(client, tiny_teacher_dir):
    """`logit-dataset publish …`, quickly: without recomputing, unless asked."""

    def run(repo: str, directory: Path, *options: object):
        if "--recompute" not in options:
            options = (*options, "--recompute", 0)
        return client.cli("publish", repo, directory, "--device", "cpu", *options)

    return run


def dataset_files(hub, revision: str, repo: str = "org/set") -> dict[str, bytes]:
    found = hub.repos["dataset", repo]
    return {
        path: content
        for path, content in found.commits[found.resolve(revision)].items()
        if path != ".gitattributes"
    }


def local_files(directory: Path) -> dict[str, bytes]:
    return stand_in.directory_files(directory)


def assert_published(hub, directory: Path, tag: str, repo: str = "org/set") -> None:
    """One tag on main, with just the files of the directory, and no working branch."""
    found = hub.repos["dataset", repo]
    assert found.resolve(tag) == found.branches["main"]
    assert list(found.branches) == ["main"]
    assert dataset_files(hub, tag, repo) == local_files(directory)


def assert_one_line(result, pattern: str) -> None:
    assert result.returncode in (1, 2), result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0] == result.stderr.splitlines()[-1]
    assert re.search(pattern, errors[0]), errors[0]
    assert "Traceback" not in result.stderr


def large_requests(hub) -> list[str]:
    return [r.path.rpartition("/")[2] for r in hub.requests if r.method == "PUT"]


COMPARE = """
import sys
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

def plain(rows):
    return [{k: np.asarray(v).tobytes() if k != "text" and k != "id" else v for k, v in row.items()} for row in rows]

local = pa.concat_tables(pq.read_table(p) for p in sorted(__import__("pathlib").Path(DIRECTORY, "data").glob("*")))
local = local.replace_schema_metadata(None)
types = {"input_ids": np.int32, "topk_indices": np.int32, "topk_logprobs": np.float16, "chunk_index": np.int32, "logsumexp": np.float32}
def typed(row):
    return {k: v if k in ("id", "text") else np.asarray(v, types.get(k, np.float16)) for k, v in row.items()}
expected = plain(map(typed, local.to_pylist()))
whole = load_dataset("org/set", revision="v1.0.0", split="train")
assert plain(map(typed, whole)) == expected
streamed = load_dataset("org/set", revision="v1.0.0", split="train", streaming=True)
assert plain(map(typed, streamed)) == expected
row = whole.with_format("torch")[0]
assert row["topk_indices"].shape == (len(row["input_ids"]), 20)
assert "builder" not in sys.modules
print(len(expected))
"""


def test_a_finished_build_becomes_a_tag_that_stock_load_dataset_reads(
    hub, publish, out, tmp_path, tiny_teacher_dir
):
    teacher = ("--teacher", tiny_teacher_dir)
    result = publish("org/set", out, "--tag", "v1.0.0", "--recompute", 3, *teacher)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        'next: load_dataset("org/set", revision="v1.0.0", split="train")'
    )
    assert_published(hub, out, "v1.0.0")
    assert {p.name for p in out.iterdir()} == {
        *["README.md", "manifest.json", "release.json", "verification.json", "assets", "data"]
    }
    record = json.loads((out / "verification.json").read_text())
    assert record["rows"] == 3
    assert record["max_abs_error"] < 0.01
    assert f"seed {record['seed']}" in (out / "README.md").read_text()
    assert read_manifest(out)["totals"]["rows"] > 20

    environment = {**os.environ, **stand_in.environment(hub.endpoint, tmp_path / "home")}
    del environment["PYTHONPATH"]
    code = f"DIRECTORY = {str(out)!r}\n{COMPARE}"
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) == read_manifest(out)["totals"]["rows"]


def test_a_dry_run_lists_files_bytes_and_the_card_and_changes_nothing(hub, publish, out):
    before = local_files(out)
    result = publish("org/set", out, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not hub.repos
    assert {request.method for request in hub.requests} == {"GET"}
    assert local_files(out) == before
    assert "org/set v1.0.0, the first version: " in result.stdout
    for path in ("README.md", "manifest.json", "assets/mass.svg", "data/train-000-00000.parquet"):
        assert re.search(rf"^ *[\d,]+  send    {re.escape(path)}$", result.stdout, flags=re.M), path
    total = sum(int(n.replace(",", "")) for n in re.findall(r"^ *([\d,]+)  send ", result.stdout, flags=re.M))  # fmt: skip
    assert f"{total:,}  bytes to send" in result.stdout
    assert 'load_dataset("org/set", revision="v1.0.0", split="train")' in result.stdout


def test_a_second_version_sends_only_what_changed_and_removes_what_is_gone(
    hub, publish, small, large, tmp_path
):
    first, second = (
        Path(shutil.copytree(source, tmp_path / name))
        for source, name in ((small, "first"), (large, "second"))
    )
    assert publish("org/set", first).returncode == 0
    repo = hub.repos["dataset", "org/set"]
    kept = {**repo.commits[repo.branches["main"]], "LICENSE": b"their own"}
    hub.commit("dataset", "org/set", kept)
    before = set(hub.arrived)

    result = publish("org/set", second, "--message", "Now with *all* documents")
    assert result.returncode == 0, result.stderr
    assert "org/set v1.1.0 is published" in result.stdout
    files = dataset_files(hub, "v1.1.0")
    assert files.pop("LICENSE") == b"their own"
    assert files == local_files(second)
    assert dataset_files(hub, "v1.0.0") == local_files(first)
    shared = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (first / "data").iterdir()}
    shared &= {hashlib.sha256(p.read_bytes()).hexdigest() for p in (second / "data").iterdir()}
    assert len(shared) >= 3
    assert not shared & set(hub.arrived[len(before) :])
    card = (second / "README.md").read_text()
    assert re.search(r"### v1\.1\.0 \(.*\n\n- Now with \\\*all\\\* documents\n- \d+ rows were added.*\n\n### v1\.0\.0", card)  # fmt: skip

    again = Path(shutil.copytree(small, tmp_path / "again"))
    result = publish("org/set", again, "--tag", "v1.2.0")
    assert_one_line(result, r"v1\.2\.0 is too small a step from v1\.1\.0: .*rows have changed.* --tag v2\.0\.0")  # fmt: skip
    result = publish("org/set", again)
    assert result.returncode == 0, result.stderr
    files = dataset_files(hub, "v2.0.0")
    assert files.pop("LICENSE") == b"their own"
    assert files == local_files(again)
    assert len(repo.messages) == 6  # two a version


def test_versions_that_cannot_be(hub, publish, out, small, tmp_path):
    assert publish("org/set", out, "--tag", "v1.0.0").returncode == 0
    before = dict(hub.repos["dataset", "org/set"].tags)
    again = publish("org/set", out, "--tag", "v1.0.0")
    assert (again.returncode, again.stdout.splitlines()[0][:41]) == (
        0,
        "org/set v1.0.0 was published already, com",
    )
    other = Path(shutil.copytree(small, tmp_path / "other"))
    result = publish("org/set", other, "--tag", "v1.0.0", "--message", "another try")
    assert_one_line(
        result, r"v1\.0\.0 is published already, and .* never changed; .* --tag v1\.0\.1"
    )
    assert_one_line(publish("org/set", other, "--tag", "1.1", "--message", "x"), r"'1\.1' is not a version like v1\.2\.3")  # fmt: skip
    assert hub.repos["dataset", "org/set"].tags == before
    assert publish("org/set", other, "--message", "better words").returncode == 0
    assert_published(hub, other, "v1.0.1")
    assert hub.arrived == sorted(set(hub.arrived), key=hub.arrived.index)


def test_large_files_go_in_parts(hub, publish, out):
    hub.part_bytes = 5_000
    assert publish("org/set", out).returncode == 0
    assert_published(hub, out, "v1.0.0")
    assert sum("part=" in r.path for r in hub.requests if r.method == "PUT") > 10


def test_what_is_not_fit_to_be_published(hub, publish, out, built):
    assert_one_line(
        publish("org/set", built),
        r"the recipe does not state corpus\.license and teacher\.license, .* add them to the recipe",
    )
    victim = out / "data" / "train-000-00001.parquet"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    assert_one_line(publish("org/set", out), r"it has problems: data/train-000-00001\.parquet: .* hash")  # fmt: skip
    assert_one_line(publish("somewhere", out), "'somewhere' is not a Hub dataset name; expected ORG/NAME")  # fmt: skip
    assert not hub.repos
    hub.commit("dataset", "org/set", {"data.csv": b"1,2"})
    assert_one_line(publish("org/set", out), r"org/set holds something other .*data\.csv")
    assert list(hub.repos["dataset", "org/set"].branches) == ["main"]


def test_private_means_private(hub, publish, out):
    assert publish("org/set", out, "--private").returncode == 0
    assert hub.repos["dataset", "org/set"].private
    hub.repos["dataset", "org/set"].private = False
    assert_one_line(publish("org/set", out, "--private"), "org/set exists and is public")


ASKED = """
import io, sys
from builder.cli.main import main
sys.stdin = io.StringIO(ANSWER)
sys.stdin.isatty = lambda: True
sys.argv = ["logit-dataset", "publish", "org/set", DIRECTORY, "--device", "cpu", "--recompute", "0"]
main()
"""


def test_on_a_terminal_it_asks(hub, client, out):
    for answer, status in (("n\n", 1), ("y\n", 0)):
        assert not hub.repos
        result = client.python(f"DIRECTORY, ANSWER = {str(out)!r}, {answer!r}\n{ASKED}")
        assert result.returncode == status, result.stderr
        assert "bytes to send, in" in result.stderr
        assert "Publish org/set v1.0.0?" in result.stderr
    assert_published(hub, out, "v1.0.0")


def test_a_former_version_of_another_schema_needs_a_major_step(hub, publish, out):
    assert publish("org/set", out).returncode == 0
    repo = hub.repos["dataset", "org/set"]
    files = dict(repo.commits[repo.branches["main"]])
    manifest = json.loads(files["manifest.json"]) | {"schema_version": "0.9.0"}
    files["manifest.json"] = json.dumps(manifest).encode()
    hub.commit("dataset", "org/set", files)
    hub.tag("dataset", "org/set", "v1.1.0")
    result = publish("org/set", out)
    assert result.returncode == 0, result.stderr
    assert list(repo.tags) == ["v1.0.0", "v1.1.0", "v2.0.0"]
    assert "the manifest of v1.1.0 has another schema" in (out / "README.md").read_text()


PATIENT = """
import sys, time
from builder.cli.main import main
time.sleep = lambda seconds: sys.stderr.write(f"slept {seconds}\\n")  # in one piece
sys.argv = ["logit-dataset", "publish", "org/set", DIRECTORY, "--device", "cpu", "--recompute", "0"]
main()
"""


@pytest.fixture
def publish_fast(client):
    """The same command, where waiting takes no time but is told: `slept 2`."""

    def run(directory: Path):
        return client.python(f"DIRECTORY = {str(directory)!r}\n{PATIENT}")

    return run


STEPS = {
    "whoami": ("GET", "/api/whoami-v2$"),
    "refs": ("GET", "/refs$"),
    "create": ("POST", "/api/repos/create$"),
    "branch": ("POST", "/branch/publish-v1.0.0$"),
    "preupload": ("POST", "/preupload/publish-v1.0.0$"),
    "batch": ("POST", "/objects/batch$"),
    "put": ("PUT", "/storage/"),
    "verify": ("POST", "/verify/"),
    "commit on the working branch": ("POST", "/commit/publish-v1.0.0$"),
    "tree": ("GET", "/tree/"),
    "data read back": ("GET", r"/resolve/.*\.parquet$"),
    "commit on main": ("POST", "/commit/main$"),
    "tag": ("POST", "/tag/"),
    "removal of the working branch": ("DELETE", "/branch/"),
}


def once(step: tuple[str, str], answer):
    """A fault or loss that happens the first time that a step is taken."""
    method, pattern = step
    seen: list = []

    def happen(request):
        if request.method == method and re.search(pattern, request.path.split("?")[0]) and not seen:
            seen.append(request)
            if isinstance(answer, type):
                raise answer
            return answer
        return None

    happen.seen = seen
    return happen


TROUBLES = {"429": Refusal(429, {"Retry-After": "7"}), "500": 500, "503": 503, "reset": Cut}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_is_survived_at_every_step(hub, publish_fast, out, trouble):
    faults = {step: once(STEPS[step], TROUBLES[trouble]) for step in STEPS}
    hub.faults += faults.values()
    result = publish_fast(out)
    assert result.returncode == 0, result.stderr
    assert [step for step, fault in faults.items() if not fault.seen] == []
    assert_published(hub, out, "v1.0.0")
    assert len(hub.arrived) == len(set(hub.arrived))
    slept = [float(line.split()[1]) for line in result.stderr.splitlines() if "slept" in line]
    assert len(slept) >= len(STEPS)
    if trouble == "429":
        assert min(slept) >= 7  # as long as the Hub asked for, everywhere
    assert_nothing_planted(hub, out, result)


def test_an_answer_that_is_lost_is_not_a_thing_done_twice(hub, publish_fast, out):
    losses = {step: once(STEPS[step], Cut) for step in STEPS}
    hub.losses += losses.values()
    result = publish_fast(out)
    assert result.returncode == 0, result.stderr
    assert [step for step, loss in losses.items() if not loss.seen] == []
    assert_published(hub, out, "v1.0.0")
    assert len(hub.repos["dataset", "org/set"].messages) == 2


LASTING = {
    "commit on main": r"the Hub answers 503 Service Unavailable.*try again later\. Nothing was published; the same command resumes",
    "tag": r"the Hub answers 503 .* main of org/set was changed, but is not tagged as v1\.0\.0; the same command resumes",
}


@pytest.mark.parametrize("step", LASTING)
def test_trouble_that_lasts_is_one_line_and_the_next_run_goes_on(hub, publish_fast, out, step):
    method, pattern = STEPS[step]
    hub.faults.append(lambda r: 503 if r.method == method and re.search(pattern, r.path) else None)
    assert_one_line(publish_fast(out), LASTING[step])
    repo = hub.repos["dataset", "org/set"]
    assert not repo.tags
    hub.faults.clear()
    assert publish_fast(out).returncode == 0
    assert_published(hub, out, "v1.0.0")
    assert len(hub.arrived) == len(set(hub.arrived))
    assert len(repo.messages) == 2


def test_a_file_that_arrives_with_other_bytes_is_found_and_sent_again(hub, publish, out):
    hub.damage.append(lambda content: content[:-400] + bytes(300) + content[-100:])
    result = publish("org/set", out)
    assert_one_line(result, r"(load_dataset cannot read what was sent|has other rows).*Nothing was published")  # fmt: skip
    repo = hub.repos["dataset", "org/set"]
    assert not repo.tags
    assert list(repo.commits[repo.branches["main"]]) == [".gitattributes"]
    assert list(repo.branches) == ["main"]
    before = len(hub.arrived)
    assert publish("org/set", out).returncode == 0
    assert_published(hub, out, "v1.0.0")
    assert len(hub.arrived) == before + 1


def test_main_gets_what_was_read_back_whatever_the_file_has_become(hub, publish, out):
    before = local_files(out / "data")
    first, *_, last = sorted(before)

    def change(request):
        if request.method == "GET" and request.path.endswith(last):
            (out / "data" / first).write_bytes(b"changed")

    hub.faults.append(change)
    assert publish("org/set", out).returncode == 0
    assert (out / "data" / first).read_bytes() == b"changed"
    sent = dataset_files(hub, "v1.0.0")
    assert {name: sent[f"data/{name}"] for name in before} == before


@pytest.mark.parametrize("branch", ["main", "publish-v1.0.0"])
def test_a_branch_moved_by_someone_else_stops_it_before_anything_shows(hub, publish, out, branch):
    step = {"main": "data read back", "publish-v1.0.0": "commit on the working branch"}[branch]
    intruder = once(STEPS[step], None)

    def move(request):
        before = len(intruder.seen)
        intruder(request)
        if len(intruder.seen) > before:
            repo = hub.repos["dataset", "org/set"]
            theirs = {**repo.commits[repo.branches[branch]], "notes.txt": b"mine"}
            hub.commit("dataset", "org/set", theirs, branch=branch)

    hub.faults.append(move)
    assert_one_line(
        publish("org/set", out),
        rf"branch {branch} of org/set was moved by someone else in the meantime\. Nothing was published",
    )
    repo = hub.repos["dataset", "org/set"]
    assert not repo.tags
    assert set(repo.commits[repo.branches["main"]]) <= {".gitattributes", "notes.txt"}
    if branch == "main":  # theirs now; without a manifest, it is not taken over
        hub.commit("dataset", "org/set", {})
    assert publish("org/set", out).returncode == 0
    assert dataset_files(hub, "v1.0.0") == local_files(out)


def test_a_token_that_is_not_accepted(hub, publish, out):
    hub.is_token_valid = False
    assert_one_line(publish("org/set", out), "the Hub does not accept the token .*hf auth login")
    hub.is_token_valid = True
    expiry = once(STEPS["put"], None)

    def expire(request):
        expiry(request)
        hub.is_token_valid = not expiry.seen

    hub.faults.append(expire)
    result = publish("org/set", out)
    assert_one_line(result, "the Hub does not accept the token .*Nothing was published")
    assert not hub.repos["dataset", "org/set"].tags
    hub.faults.clear()
    hub.is_token_valid = True
    assert publish("org/set", out).returncode == 0
    assert_published(hub, out, "v1.0.0")
    assert len(hub.arrived) == len(set(hub.arrived))


def test_a_repository_of_another_owner(hub, publish, out):
    message = r"the token may not write to other/set \(.*rights to write.*\); use a token with write access"
    assert_one_line(publish("other/set", out), message)
    assert not hub.repos
    theirs = {".gitattributes": b""}
    hub.commit("dataset", "other/set", theirs)
    assert_one_line(publish("other/set", out), message)
    repo = hub.repos["dataset", "other/set"]
    assert (list(repo.branches), repo.tags, len(repo.commits)) == (["main"], {}, 1)


def test_twenty_kills_at_random_requests(hub, client, publish, small, tmp_path):
    rng, kills, attempt = random.Random(4), 0, 0

    def kill_at(number: int, *, after: bool):
        count = 0

        def fault(_):
            nonlocal count
            count += 1
            if count == number:
                os.kill(int(client.pid_file.read_text()), signal.SIGKILL)
                raise Cut

        (hub.losses if after else hub.faults).append(fault)

    while kills < 20:
        out = Path(shutil.copytree(small, tmp_path / f"{attempt}"))
        repo, status = f"org/set{attempt}", -signal.SIGKILL
        hub.arrived.clear()
        while status == -signal.SIGKILL:
            number = rng.randint(1, 56)  # of about 50
            kill_at(number, after=rng.random() < 0.5)
            status = publish(repo, out).returncode
            kills += status == -signal.SIGKILL
            hub.settle()
            hub.faults.clear()
            hub.losses.clear()
        assert status == 0
        assert_published(hub, out, "v1.0.0", repo)
        assert list(hub.repos["dataset", repo].tags) == ["v1.0.0"]
        assert len(hub.arrived) == len(set(hub.arrived)), "a file was sent twice"
        assert len(hub.repos["dataset", repo].messages) == 2
        attempt += 1


def planted(hub, *paths: Path) -> list[str]:
    secrets = [TOKEN, USER, "127.0.0.1", f":{hub.endpoint.rpartition(':')[2]}", str(Path.home()) + "/"]  # fmt: skip
    secrets += [str(path) for path in paths]
    return [*secrets, socket.gethostname()] if len(socket.gethostname()) > 4 else secrets


def assert_nothing_planted(hub, out: Path, *results) -> None:
    secrets = planted(hub)
    for result in results:
        assert [s for s in secrets if s in result.stdout + result.stderr] == []
    for files in hub.repos["dataset", "org/set"].commits.values():
        for path, content in files.items():
            found = [s for s in [*secrets, str(out), str(out.parent)] if s.encode() in content]
            assert found == [], path


def test_nothing_but_the_manifests_files_is_sent_and_nothing_planted_shows(hub, publish, out):
    for name in ("notes.txt", ".build/plan.json", "data/.train.partial", ".env", "assets/me.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(TOKEN)
    result = publish("org/set", out)
    assert result.returncode == 0, result.stderr
    sent = dataset_files(hub, "v1.0.0")
    expected = {"README.md", "manifest.json", "release.json", "assets/mass.svg", "assets/entropy.svg"}  # fmt: skip
    assert sent.keys() == expected | {shard["file"] for shard in read_manifest(out)["shards"]}
    assert_nothing_planted(hub, out, result)


def test_readers_see_what_it_is_without_its_data_and_can_verify_it(
    hub, client, publish, out, tiny_teacher_dir
):
    assert publish("org/set", out).returncode == 0
    hub.requests.clear()
    result = client.cli("info", "org/set", "--revision", "v1.0.0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == client.cli("info", out).stdout
    assert not [r for r in hub.requests if r.path.endswith(".parquet")]
    assert json.loads(client.cli("info", "org/set", "--format", "json").stdout)["name"] == "tiny"
    row = client.cli("info", "org/set", "--row", 1, "--teacher", tiny_teacher_dir)
    assert {r.path.rpartition("/")[2] for r in hub.requests if r.path.endswith(".parquet")} == {
        "train-000-00000.parquet"
    }
    assert row.stdout == client.cli("info", out, "--row", 1, "--teacher", tiny_teacher_dir).stdout
    assert row.returncode == 0

    options = ("--recompute", 2, "--seed", 1, "--teacher", tiny_teacher_dir, "--device", "cpu")
    result = client.cli("verify", "org/set", "--revision", "v1.0.0", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no problems" in result.stdout
    assert 'next: load_dataset("org/set", revision="v1.0.0", split="train")' in result.stdout
    repo = hub.repos["dataset", "org/set"]
    files = dict(repo.commits[repo.branches["main"]])
    name = "data/train-000-00001.parquet"
    files[name] = files[name][:-1] + b"?"
    hub.commit("dataset", "org/set", files, branch="tampered")
    result = client.cli("verify", "org/set", "--revision", "tampered")
    assert (result.returncode, f"{name}: its content does not have the hash" in result.stdout) == (1, True)  # fmt: skip

    for arguments, message in (
        (("info", "org/none"), "there is no directory 'org/none', and the Hub has no dataset 'org/none'"),
        (("info", "org/set", "--revision", "v9.0.0"), "dataset 'org/set' has no revision 'v9.0.0'"),
        (("info", out, "--revision", "v1.0.0"), "--revision is for datasets on the Hub"),
    ):  # fmt: skip
        assert_one_line(client.cli(*arguments), message)
    hub.commit("dataset", "org/plain", {"README.md": b"---\nlicense: mit\n---\n"})
    assert_one_line(
        client.cli("verify", "org/plain"), "'org/plain' on the Hub has no manifest.json"
    )


def test_the_card_is_valid_and_its_snippets_run_as_pasted(hub, client, publish, out):
    assert publish("org/set", out).returncode == 0
    card = (out / "README.md").read_text()
    assert stand_in.card_errors(card) == []
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 3
    code = "\n".join(snippets)
    result = client.python(
        f"{code}\nfrom huggingface_hub import DatasetCard\ncard = DatasetCard.load('org/set')\ncard.validate()\n"
        "assert card.data.license == 'other' and card.data.language == ['en', 'no']\nprint(float(loss.detach()))"
    )
    assert result.returncode == 0, result.stderr
    assert "(T" not in result.stdout
    row = pq.read_table(out / "data" / "train-000-00000.parquet").slice(0, 1).to_pylist()[0]
    T = len(row["input_ids"])
    assert result.stdout.splitlines()[:2] == [f"torch.Size([{T}])", f"torch.Size([{T}, 20]) torch.Size([{T}, 20])"]  # fmt: skip
    assert 0 < float(result.stdout.splitlines()[-1]) < 8  # a cross-entropy: the dataset has draws


def test_the_version_follows_from_the_manifests(small, large):
    old, new = read_manifest(small), read_manifest(large)
    added = new["totals"]["rows"] - old["totals"]["rows"]
    assert compare(old, old) == ("patch", ["the data files are the same"])
    assert compare(old, new) == ("minor", [f"{added} rows were added, the others are the same"])
    step, reasons = compare(new, old)
    assert (step, "is gone" in reasons[0]) == ("major", True)
    for path, value, reason in (
        ("recipe.output.top_k", 10, "recipe.output.top_k: 20 → 10"),
        ("teacher.tokenizer_sha256", "0", "teacher.tokenizer_sha256: "),
        ("teacher.dtype", "bfloat16", 'teacher.dtype: "float32" → "bfloat16"'),
        ("schema_version", "2.0.0", f'schema_version: "{SCHEMA_VERSION}" → "2.0.0"'),
        ("shards.0.sha256", "0" * 64, "data/train-000-00000.parquet has other content"),
    ):
        changed = json.loads(json.dumps(new))
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        at = changed
        for key in parents:
            at = at[key]
        at[last] = value
        changed["shards"][0]["sha256"] = "0" * 64
        step, reasons = compare(old, changed)
        assert step == "major"
        assert reason in reasons[0]


def test_versions_are_numbers_not_texts():
    assert Version.parse("v1.10.0") > Version.parse("v1.9.9")
    for name in ("1.0.0", "v1.0", "v01.0.0", "v1.0.0-rc1", "v1.0.0 ", "v١.0.0", "main"):
        assert Version.parse(name) is None
    assert choose(None, {"v1.9.0", "v1.10.0"}, Version(1, 9, 0), "minor", []).tag == "v1.10.1"
    assert choose("v0.1.0", set(), None, "major", []).tag == "v0.1.0"
    with pytest.raises(ValueError, match=r"v1\.3\.1 is too small a step from v1\.3\.0: rows were added \(why\)"):  # fmt: skip
        choose("v1.3.1", {"v1.3.0"}, Version(1, 3, 0), "minor", ["why"])


LOAD_HEAD = """
import torch
from pathlib import Path
from huggingface_hub.constants import HF_HUB_CACHE
from logit_dataset import load_teacher_head
cached = lambda: {path for path in Path(HF_HUB_CACHE).rglob("*") if path.is_symlink()}
before = cached()
head = load_teacher_head("org/set", revision="v1.0.0")
files = {path.name for path in cached() - before}
assert "teacher_head.safetensors" in files and not any("parquet" in name for name in files), files
assert torch.equal(head.weight_VD, load_teacher_head(DIRECTORY).weight_VD) and head.scale == 1
"""


def test_the_head_of_a_teacher_is_published_and_fetched_only_when_asked_for(hub, publish, client, tiny_teacher_dir, tmp_path):  # fmt: skip
    out = build_dataset(
        tmp_path / "x",
        tiny_teacher_dir,
        corpus="max_documents = 8",
        output="hidden_states = true",
    )
    assert "teacher_head.safetensors" in publish("org/set", out, "--dry-run").stdout
    result = publish("org/set", out)
    assert result.returncode == 0, result.stderr
    assert_published(hub, out, "v1.0.0")
    assert "teacher_head.safetensors" in dataset_files(hub, "v1.0.0")
    loaded = client.python(LOAD_HEAD.replace("DIRECTORY", repr(str(out))))
    assert loaded.returncode == 0, loaded.stderr
    # A next version without hidden states does not keep the old head.
    plain = build_dataset(tmp_path / "y", tiny_teacher_dir, corpus="max_documents = 8")
    assert publish("org/set", plain).returncode == 0
    assert "teacher_head.safetensors" not in dataset_files(hub, "v2.0.0")
    missing = client.python(
        "from logit_dataset import load_teacher_head\n"
        "try: load_teacher_head('org/set', revision='v2.0.0')\n"
        "except ValueError as error: print(error)"
    )
    assert "org/set@v2.0.0 has no teacher_head.safetensors; it comes with" in missing.stdout


def test_a_damaged_head_is_not_published(hub, publish, tiny_teacher_dir, tmp_path):
    out = build_dataset(
        tmp_path / "x",
        tiny_teacher_dir,
        corpus="max_documents = 8",
        output="hidden_states = true",
    )
    head = bytearray((out / "teacher_head.safetensors").read_bytes())
    head[-1] ^= 1
    (out / "teacher_head.safetensors").write_bytes(head)
    assert_one_line(publish("org/set", out), "teacher_head.safetensors: its content does not have")
    assert ("dataset", "org/set") not in hub.repos


def test_a_long_way_to_the_hub_is_told_in_bytes(client, hub, out):
    code = f"""
import sys
from builder.cli.main import main
from builder.hub import publish
publish.FILES_PER_COMMIT = 2
sys.argv = ["logit-dataset", "publish", "org/set", {str(out)!r}, "--device", "cpu", "--recompute", "0"]
main()
"""
    result = client.python(code)
    assert result.returncode == 0, result.stderr
    sizes = r"\d+(?:\.\d)? [kM]?B"
    total, whole = re.search(
        rf"sending (\d+) of \1 files, ({sizes}), to org/set", result.stderr
    ).groups()
    said = re.findall(
        rf"sent (\d+) of {total} files, {sizes} of {re.escape(whole)}\n", result.stderr
    )
    assert said == [str(sent) for sent in range(2, int(total), 2)]
    assert_published(hub, out, "v1.0.0")
