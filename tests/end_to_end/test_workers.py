"""Several workers: the same files as one, whoever dies and whenever; and every failure is one line."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.build.actor import Status
from builder.build.task import Pool, Task
from builder.dataset.manifest import read_manifest
from tests.build.test_build import data_bytes, run
from tests.conftest import sample_documents, write_jsonl
from tests.end_to_end.test_kill import check_kept, finished_shards
from tests.end_to_end.test_outbox import assert_delivered, write_recipe

PARTITIONS = 4


@pytest.fixture(scope="module")
def ray():
    """One Ray for all builds in this process."""
    pytest.importorskip("ray")
    from builder.build import workers

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
    before = finished_shards(output)
    assert len(before) == 2
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


def test_workers_agree_on_the_size_of_batches_that_one_has_tried(
    ray, recipe, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text, notices = recipe.read_text(), []
    assert "batch_tokens = 256\n" in text
    recipe.write_text(text.replace("batch_tokens = 256", 'batch_tokens = "auto"'))
    run(recipe, tmp_path / "two", pool=Pool(workers=2), notice=notices.append)
    manifest = read_manifest(tmp_path / "two")
    found = manifest["recipe"]["sequences"]["batch_tokens"]
    assert [line for line in notices if f'"auto" is {found:,} for this build' in line] == notices
    recipe.write_text(text.replace("batch_tokens = 256", f"batch_tokens = {found}"))
    run(recipe, tmp_path / "one")
    assert data_bytes(tmp_path / "two") == data_bytes(tmp_path / "one")
    assert manifest["fingerprint"] == read_manifest(tmp_path / "one")["fingerprint"]


def test_dead_workers_are_replaced_and_bad_shards_do_not_lose_the_others(
    ray, recipe, tmp_path, monkeypatch
):
    from tests.end_to_end.failing_actor import FailingActor

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(recipe, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr("builder.build.workers.Actor", FailingActor)
        patch.setattr("builder.build.workers.RETRIES", 1)
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
        ({"workers": 2, "gpus_per_worker": 2.0}, r"--workers 2 with --gpus-per-worker 2 does not fit: the GPUs of Ray \(0\) are enough for 0; use a smaller"),
        ({"workers": 2, "gpus_per_worker": 1.5}, r"--gpus-per-worker is 1\.5, expected a whole number, or less than 1"),
        ({"workers": 2, "gpus_per_worker": 1.0, "device": "cpu"}, r"--device cpu and --gpus-per-worker 1 contradict"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(ray, recipe, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "out", pool=Pool(**options))


class Later:
    """A method of an actor on `OneThread`: what it returns comes when it is asked for."""

    def __init__(self, call):
        self._call = call

    def remote(self, *arguments):
        return partial(self._call, *arguments)

    def options(self, **_):
        return self


class OneThread:
    """In place of Ray: every result is ready, and computed when it is taken."""

    def __init__(self, actor):
        self._actor = actor

    def remote(self, **_):
        return lambda _: SimpleNamespace(
            remote=lambda *_: SimpleNamespace(
                **{name: Later(getattr(self._actor, name)) for name in ("prepare", "shard", "status")}
            )
        )  # fmt: skip

    def wait(self, results, timeout):
        return results, []

    def get(self, result):
        return result()

    def kill(self, actor):
        self._actor.killed += 1

    def is_initialized(self):
        return True

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 4, "GPU": 0}}]


class Dying:
    """A worker that dies some times while it loads the teacher."""

    def __init__(self, deaths: int) -> None:
        self.deaths, self.loads, self.killed = deaths, 0, 0

    def prepare(self, task):
        from ray.exceptions import RayActorError

        self.loads += 1
        if self.loads <= self.deaths:
            raise RayActorError
        return {}

    def shard(self, task):
        raise AssertionError

    def status(self):
        return Status(file=None, tokens=0, notices=[])


@pytest.mark.parametrize(
    ("deaths", "message"),
    [(8, "^Ray fails .*the cluster is gone.*run the same"), (9, "died loading the teacher")],
)
def test_a_lost_machine_is_no_bad_teacher(monkeypatch, deaths, message):
    """All of its workers die at once while they load; one that dies three times in a row is another matter."""
    pytest.importorskip("ray")
    from ray.exceptions import RaySystemError

    from builder.build import workers

    def fail(teacher):
        raise RaySystemError("the cluster is gone")

    actor, notices = Dying(deaths), []
    monkeypatch.setattr(workers, "ray", OneThread(actor))
    order = SimpleNamespace(recipe=SimpleNamespace(teacher=SimpleNamespace(tensor_parallel=None)))
    chains = SimpleNamespace(next_task=lambda: Task(partition=0, index=0, start=None), loaded=fail)
    computed = workers.compute(
        Pool(workers=4, device="cpu"),
        order,
        chains,
        progress=lambda _: None,
        notice=notices.append,
    )
    with pytest.raises(ValueError, match=message):
        list(computed)
    assert len(notices) == 8
    assert actor.killed == 4


@pytest.mark.parametrize(
    ("machines", "options", "cpus", "room"),
    [
        ([(64, 0), (8, 8)], {"workers": 8}, 1, 8),  # a head with CPUs alone
        ([(128, 0), (96, 8), (96, 8)], {"workers": 16}, 12, 16),
        ([(16, 1), (32, 8)], {"workers": 9}, 4, 9),
        ([(8, 1)], {"workers": 10, "gpus_per_worker": 0.1}, 0, 10),  # with a GPU for each, but no CPU
        ([(64, 0), (20, 1)], {"workers": 10, "gpus_per_worker": 0.1}, 2, 10),
        ([(64, 0), (32, 4)], {"workers": 8}, 8, 4),  # half of them wait
        ([(9, 2)], {"workers": 3, "gpus_per_worker": 0.6}, 4, 2),  # a part of one GPU, not of two
        ([(9, 5)], {"workers": 3, "gpus_per_worker": 2}, 4, 2),
        ([(8, 0), (4, 0)], {"workers": 3}, 4, 3),
        ([(8, 4)], {"workers": 2, "device": "cpu"}, 4, 2),
        ([(2, 0)], {"workers": 3}, 0, 3),
    ],
)  # fmt: skip
def test_cpus_are_shared_where_the_workers_run(monkeypatch, machines, options, cpus, room):
    pytest.importorskip("ray")
    from builder.build import workers

    nodes = [{"Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}} for cpu, gpu in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 1000, "GPU": 1000}})
    monkeypatch.setattr(workers.ray, "nodes", lambda: nodes)
    notices: list[str] = []
    found = workers._resources(Pool(address="auto", **options), None, notices.append)
    assert found[1] == cpus
    assert [f"are enough for {room}" in line for line in notices] == [True] * (
        room < options["workers"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gone", r"a worker cannot read .*part-1\.jsonl \(No such file.*shared by all machines of the cluster"),
        ("other", r"a worker sees a different .*part-1\.jsonl \(3 bytes, here [\d,]+\)"),
        ("as large", r"a worker sees a different .*part-1\.jsonl \(other content\)"),
        ("teacher", r"a worker sees a different .*model\.safetensors \(other content\)"),
        ("output", r"a worker sees a different .*plan\.json \(other content\)"),
        ("libraries", r"a worker runs different software \(torch: \"1\.0\" → .*same versions"),
        ("program", r"a worker runs different software \(logit-dataset: \"[0-9a-f]{12}\" → "),
        ("nothing", None),
    ],
)  # fmt: skip
def test_a_worker_that_has_something_else_says_so(
    make_recipe, tiny_teacher_dir, tmp_path, monkeypatch, change, message
):
    from builder.build import actor
    from builder.recipe.file import load_recipe
    from builder.sources.known import KnownSources
    from builder.sources.resolve import resolve

    for part in range(2):
        write_jsonl(tmp_path / f"part-{part}.jsonl", sample_documents(4))
    shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    recipe = make_recipe(files="part-*.jsonl", teacher=tmp_path / "teacher")
    loaded, known = load_recipe(recipe), KnownSources()
    (tmp_path / "out" / ".build").mkdir(parents=True)
    (tmp_path / "out" / ".build" / "plan.json").write_text("{}")
    sources = resolve(loaded, tmp_path, known)
    order = actor.make_order(loaded, sources, tmp_path / "out", known)
    corpus_file, weights = tmp_path / "part-1.jsonl", tmp_path / "teacher" / "model.safetensors"
    if change == "gone":
        corpus_file.unlink()
    elif change == "other":
        corpus_file.write_text("{}\n")
    elif change == "as large":
        corpus_file.write_text(corpus_file.read_text().replace("doc-0", "doc-9"))
    elif change == "teacher":
        weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    elif change == "output":
        (tmp_path / "out" / ".build" / "plan.json").write_text("[]")
    elif change == "libraries":
        order = dataclasses.replace(order, software={**order.software, "torch": "1.0"})
    elif change == "program":
        builder, reader = actor._packages()
        changed = Path(shutil.copytree(reader, tmp_path / "logit_dataset"))
        (changed / "a.py").touch()
        monkeypatch.setattr(actor, "_packages", lambda: [builder, changed])
    else:
        os.utime(corpus_file)  # a copy of it
    worker, task = actor.Actor(order, "cpu", 1), Task(partition=0, index=0, start=None)
    if message:
        with pytest.raises(ValueError, match=message):
            worker.prepare(task)
    else:
        assert worker.prepare(task)["vocab_size"] == 448


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # as if it were not installed
from builder.cli.main import main
for options in (["--workers", "2"], []):
    sys.argv = ["logit-dataset", *ARGUMENTS, *options]
    try:
        main()
    except SystemExit as stop:
        print("status", stop.code, file=sys.stderr, flush=True)
"""


def test_without_ray_the_message_says_what_to_install_and_all_else_works(recipe, tmp_path):
    arguments = ["build", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu"]
    code = WITHOUT_RAY.replace("ARGUMENTS", repr(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, *statuses = done.stderr.splitlines()
    assert error.startswith(
        "error: several workers need Ray, which is not installed; run: pip install 'ray"
    )
    assert statuses == ["status 1", "status None"]
    assert (tmp_path / "out" / "manifest.json").exists()


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


def kill_until_complete(recipe: Path, output: Path, victims: list[str], rng: random.Random) -> None:
    """Build with two workers, and kill some of them, and drivers, when some more shards are finished, or at once."""
    victims, seen = list(victims), set()
    while True:
        before, driver = finished_shards(output), Driver(recipe, output)
        count = len(before)
        while victims and driver.process.poll() is None:
            if not (workers := driver.workers()):
                time.sleep(0.01)
                continue
            seen |= set(workers)
            count += rng.randint(0, 8)
            while len(finished_shards(output)) < count and driver.process.poll() is None:
                time.sleep(0.005)
            assert driver.process.poll() is None, "the build was faster than its killer"
            if victims.pop() == "driver":
                driver.process.kill()
                break
            os.kill(rng.choice(workers), signal.SIGKILL)
        out, _ = driver.process.communicate(timeout=300)
        check_kept(before, output)
        if driver.process.returncode != -signal.SIGKILL:
            assert driver.process.returncode == 0, out
            break
    deadline = time.monotonic() + 30
    while any(map(_is_worker, seen)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_worker, seen)), "a worker outlived its driver"


def _is_worker(pid: int) -> bool:
    return b"ray::Actor" in _command(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("seed", [1])
def test_workers_and_drivers_killed_at_random_moments(make_recipe, tmp_path, monkeypatch, seed):
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    documents = sample_documents(400)
    for part in range(PARTITIONS):
        write_jsonl(tmp_path / f"part-{part}.jsonl", documents[part::PARTITIONS])
    recipe = make_recipe(
        files="part-*.jsonl", output=f"shard_tokens = 400\npartitions = {PARTITIONS}"
    )
    run(recipe, tmp_path / "whole")
    rng = random.Random(seed)
    kill_until_complete(recipe, tmp_path / "out", rng.sample(["worker", "driver"], 2), rng)
    assert data_bytes(tmp_path / "out") == data_bytes(tmp_path / "whole")
    assert not list((tmp_path / "out" / "data").glob(".*"))


def test_two_workers_go_straight_to_the_hub(hub, client, tiny_teacher_dir, tmp_path):
    pytest.importorskip("ray")
    recipe = write_recipe(
        tmp_path, tiny_teacher_dir, output=f"shard_tokens = 200\npartitions = {PARTITIONS}"
    )
    documents = sample_documents(26)
    for part in range(PARTITIONS):
        write_jsonl(tmp_path / f"corpus-{part}.jsonl", documents[part::PARTITIONS])
    recipe.write_text(recipe.read_text().replace("corpus.jsonl", "corpus-*.jsonl"))
    whole, output = tmp_path / "whole", tmp_path / "out"
    run(recipe, whole)
    command = ["build", recipe, "--output", output, "--workers", 2, "--device", "cpu"]
    done = client.cli(*command, "--publish-to", "org/set", "--discard-local")
    assert done.returncode == 0, done.stderr
    assert "again" not in done.stderr  # no worker died, and no request failed
    assert_delivered(hub, whole, output)
