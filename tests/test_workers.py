"""Several workers: the same files as one, whoever dies and whenever; and every failure is one line."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import sample_documents, write_jsonl
from test_build import data_bytes, run
from test_kill import check_kept, finished_shards

from builder.manifest import read_manifest
from builder.worker import Pool, Task

PARTITIONS = 4


@pytest.fixture(scope="module")
def ray():
    """One Ray for all builds in this process."""
    pytest.importorskip("ray")
    from builder import workers

    os.environ["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)  # for failing_actor
    workers.ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=workers.OBJECT_STORE_BYTES,
    )
    yield workers.ray
    workers.ray.shutdown()


@pytest.fixture
def recipe(make_recipe, tmp_path) -> Path:
    """Four partitions of several shards each."""
    documents = sample_documents(96)
    for part in range(PARTITIONS):
        write_jsonl(tmp_path / f"part-{part}.jsonl", documents[part * 24 : part * 24 + 24])
    return make_recipe(
        files="part-*.jsonl", output=f"shard_tokens = 400\npartitions = {PARTITIONS}"
    )


def test_two_workers_make_the_files_of_one(ray, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(recipe, tmp_path / "one")
    tokens, doing, found = [], [], []
    output = tmp_path / "two"
    run(recipe, output, max_shards=2)  # by this process, which stops in the middle of a partition
    (output / "data" / ".train-000-00002.parquet.0123abcd.partial").write_bytes(b"of a killed one")
    assert (
        run(
            recipe,
            output,
            pool=Pool(workers=2, told=doing.append),
            max_shards=3,
            found=found.append,
        ).status
        == "stopped early"
    )
    assert len(finished_shards(output)) == 5
    before = finished_shards(output)
    found.clear()
    pool = Pool(workers=2, told=doing.append)
    result = run(recipe, output, pool=pool, progress=tokens.append, found=found.append)
    assert result.status == "complete"
    check_kept(before, output)
    assert data_bytes(output) == data_bytes(tmp_path / "one")
    assert len(data_bytes(output)) > 12
    one, two = read_manifest(tmp_path / "one"), read_manifest(output)
    assert sum(found) + sum(tokens) == two["totals"]["tokens"] == one["totals"]["tokens"]
    assert [shard["file"] for shard in two["shards"]] == [shard["file"] for shard in one["shards"]]
    assert {environment["threads"] for environment in two["environments"]} == {1}
    assert sorted(path.name for path in output.iterdir()) == [
        *["README.md", "assets", "data", "manifest.json"]
    ]
    assert not list((output / "data").glob(".*"))
    assert any("loading" in line or "starting" in line for line in doing)


def test_dead_workers_are_replaced_and_bad_shards_do_not_lose_the_others(
    ray, recipe, tmp_path, monkeypatch
):
    from failing_actor import FailingActor

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(recipe, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr("builder.workers.Actor", FailingActor)
        patch.setattr("builder.workers.RETRIES", 1)
        output, notices, tokens = tmp_path / "two", [], []
        with pytest.raises(
            ValueError, match=r"worker died computing data/train-002-00001\.parquet"
        ):
            run(
                recipe,
                output,
                pool=Pool(workers=2),
                notice=notices.append,
                progress=tokens.append,
            )
    failures = [(tmp_path / f"failures-{p}").read_text().count("failed") for p in range(3)]
    assert failures == [1, 1, 2]
    assert sum(line.endswith("; trying again") for line in notices) == 3
    assert "the network is down; trying again" in notices
    expected = data_bytes(tmp_path / "one")
    finished = {file.removeprefix("data/") for file in finished_shards(output)}
    lost = {name for name in expected if "-002-" in name} - {"train-002-00000.parquet"}
    assert finished == set(expected) - lost
    records = [json.loads(p.read_text()) for p in (output / ".build" / "records").iterdir()]
    assert sum(tokens) == sum(record["tokens"] for record in records)
    before = finished_shards(output)
    assert run(recipe, output).status == "complete"  # by one process
    check_kept(before, output)
    assert data_bytes(output) == expected


def test_a_bad_document_fails_its_partition_with_its_own_error(recipe, tmp_path):
    lines = (tmp_path / "part-1.jsonl").read_text().splitlines()
    (tmp_path / "part-1.jsonl").write_text("\n".join([*lines[:15], "{", *lines[16:]]))
    notices: list[str] = []
    with pytest.raises(ValueError, match=r"part-1\.jsonl line 16 is not valid JSON"):
        run(recipe, tmp_path / "out", notice=notices.append)
    assert [line.split(" failed (")[0] for line in notices] == ["data/train-001-00002.parquet"]
    finished = [json.loads(p.read_text()) for p in (tmp_path / "out/.build/records").iterdir()]
    assert {r["partition"] for r in finished if r["exhausted"]} == {0, 2, 3}


def test_a_teacher_that_cannot_be_loaded_ends_the_build_at_once(
    ray, recipe, tmp_path, tiny_teacher_dir, make_recipe
):
    import shutil

    shutil.copytree(tiny_teacher_dir, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    broken = make_recipe(
        files="part-*.jsonl", teacher=tmp_path / "broken", output=f"partitions = {PARTITIONS}"
    )
    with pytest.raises(ValueError, match=r"^teacher broken: .* download it again"):
        run(broken, tmp_path / "out", pool=Pool(workers=2))
    assert not list((tmp_path / "out" / "data").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 5}, r"--workers is 5, but output\.partitions is 4.*use --workers 4"),
        ({"workers": 2, "gpus_per_worker": 2.0}, r"2 workers with 2 GPUs each need 4 GPUs, but Ray has 0"),
        ({"workers": 2, "gpus_per_worker": 1.0, "device": "cpu"}, r"--device cpu and --gpus-per-worker 1 contradict"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(ray, recipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "out", pool=Pool(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gone", r"a worker does not see .*part-1\.jsonl \(No such file.*machines of the cluster share"),
        ("other", r"a worker sees another .*part-1\.jsonl \(3 bytes, here [\d,]+\)"),
        ("libraries", r"a worker runs other libraries \(torch: \"1\.0\" → .*same versions"),
    ],
)  # fmt: skip
def test_a_worker_that_has_something_else_says_so(recipe, tmp_path, change, message):
    pytest.importorskip("ray")
    from builder import workers
    from builder.recipe import load_recipe
    from builder.sources import KnownSources, resolve_corpus, resolve_teacher

    loaded, known = load_recipe(recipe), KnownSources()
    (tmp_path / "out" / ".build").mkdir(parents=True)
    (tmp_path / "out" / ".build" / "plan.json").write_text("{}")
    sources = (
        resolve_corpus(loaded.corpus, tmp_path, known),
        resolve_teacher(loaded.teacher, tmp_path, known),
    )
    order = workers.make_order(loaded, {}, *sources, tmp_path / "out")
    if change == "gone":
        (tmp_path / "part-1.jsonl").unlink()
    elif change == "other":
        (tmp_path / "part-1.jsonl").write_text("{}\n")
    else:
        order = dataclasses.replace(order, libraries={**order.libraries, "torch": "1.0"})
    with pytest.raises(ValueError, match=message):
        workers.Actor(order, "cpu", 1).prepare(Task(partition=0, index=0, start=None))


def test_without_ray_the_message_says_what_to_install(recipe, tmp_path):
    code = "import sys; sys.modules['ray'] = None; from builder.cli import main; main()"
    command = [sys.executable, "-c", code, "build", recipe, "--output", tmp_path / "out"]
    for options, status in ((["--workers", "2"], 1), ([], 0)):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        if status:
            assert done.stderr.startswith("error: several workers need Ray, which is not installed")
            assert "pip install 'ray" in done.stderr
            assert not (tmp_path / "out").exists()


class Driver:
    """`logit-dataset build --workers 2` in a process of its own, and the processes that it starts."""

    def __init__(self, recipe: Path, output: Path) -> None:
        command = [sys.executable, "-m", "builder.cli", "build", recipe, "--output", output]
        self.process = subprocess.Popen(
            [*map(str, command), "--workers", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self) -> list[int]:
        """Process ids of its workers: children of the raylet, which is its child."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            children.setdefault(parent, []).append(int(path.parent.name))
        grandchildren = [
            pid for c in children.get(self.process.pid, []) for pid in children.get(c, [])
        ]
        return list(filter(_is_worker, grandchildren))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_until_complete(recipe: Path, output: Path, rng: random.Random, kills: int) -> int:
    """Build with two workers while workers and drivers are killed at random moments; returns how many, `kills` at most."""
    done, seen = 0, set()
    while True:
        before, driver = finished_shards(output), Driver(recipe, output)
        while done < kills and driver.process.poll() is None:
            if not (workers := driver.workers()):
                time.sleep(0.05)
                continue
            seen |= set(workers)
            moment, victims = time.monotonic() + rng.uniform(0, 8), [driver.process.pid, *workers]
            while time.monotonic() < moment and driver.process.poll() is None:
                time.sleep(0.05)
            victim = rng.choice(victims)
            if driver.process.poll() is None and _command(victim):
                os.kill(victim, signal.SIGKILL)
                done += 1
        out, _ = driver.process.communicate(timeout=300)
        check_kept(before, output)
        if driver.process.returncode != -signal.SIGKILL:
            assert driver.process.returncode == 0, out
            break
    deadline = time.monotonic() + 30
    while any(map(_is_worker, seen)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_worker, seen)), "a worker outlived its driver"
    return done


def _is_worker(pid: int) -> bool:
    return b"ray::Actor" in _command(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_and_drivers_killed_at_random_moments(recipe, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(recipe, tmp_path / "whole")
    kills = kill_until_complete(recipe, tmp_path / "out", random.Random(1), kills=2)
    assert kills == 2
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")
    assert not list((tmp_path / "out" / "data").glob(".*"))
