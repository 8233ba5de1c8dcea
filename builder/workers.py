"""Shards on several processes at once, on this machine or on a cluster: Ray starts, watches and replaces the workers.

In:   chains of shards, and how many workers.
Out:  each shard's record, or the error with which it failed for the last time, in the order in which they end.

How:  a worker is a Ray actor that loads the teacher once and then computes one shard after the other, with the code that a
      single process runs. Ray restarts an actor whose process or machine dies, and gives it the same shard again; a shard
      that fails is tried RETRIES more times. The driver alone writes records. So whatever dies, and whenever, what counts
      is a whole file; two workers that compute the same shard, because one was given up too early, write the same bytes.

Cost: a worker needs its own teacher in memory, and about five seconds to start.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray prints what happens to its processes to stdout; what matters of it comes as an exception, too.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from builder.manifest import LIBRARIES, ShardRecord
from builder.pipeline import Notice, Progress
from builder.recipe import Recipe, differences
from builder.sources import (
    CorpusSource,
    KnownSources,
    TeacherSource,
    resolve_corpus,
    resolve_teacher,
)
from builder.worker import Computed, Pool, Task, Worker

RETRIES = 2
"""How often a shard is tried again after its worker died or it failed: enough for a lost machine, few for a bad shard."""
POLL_SECONDS = 0.5
"""Between two questions to the workers how far they are."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that is started here: little more than the least it takes, since only records go through it."""
LISTED_WORKERS = 4
"""So many workers are listed one by one on the progress bar; of more, only the numbers."""


class Chains(Protocol):
    """What gives out the shards to compute; see `build`."""

    def next_task(self) -> Task | None:
        """A shard to compute, or None while all others wait for one under way."""

    def loaded(self, teacher: dict[str, Any]) -> None:
        """Hear what the teacher of a worker turned out to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What every worker is told: the plan, and what it must find where it runs."""

    recipe: Recipe
    plan: dict[str, Any]
    corpus_source: CorpusSource
    teacher_source: TeacherSource
    output: Path
    files: dict[str, int]
    """Path → bytes, of what must be the same at every worker."""
    libraries: dict[str, str]


def make_order(
    recipe: Recipe,
    plan: dict[str, Any],
    corpus_source: CorpusSource,
    teacher_source: TeacherSource,
    output: Path,
) -> Order:
    """An order, with the sizes of local files as they are here."""
    paths = [output.resolve() / ".build" / "plan.json"]
    if not recipe.corpus.embedded:
        paths += corpus_source.files
    if not (recipe.teacher.embedded or recipe.teacher.repo):
        for place in filter(None, (teacher_source.location, teacher_source.tokenizer)):
            path = Path(place)
            paths += [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return Order(
        recipe=recipe,
        plan=plan,
        corpus_source=corpus_source,
        teacher_source=teacher_source,
        output=output.resolve(),
        files={str(path): path.stat().st_size for path in paths},
        libraries=_libraries(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a worker is."""

    process: int
    tokens: int
    """Captured of the shard under way."""
    notices: list[str]
    """New ones."""


class Actor:
    """A worker in a process of its own, which says how far it is while it computes."""

    def __init__(self, order: Order, device: str, threads: int) -> None:
        """Do as little as possible: a failure here would be tried again for ever."""
        torch.set_num_threads(threads)
        self._order = order
        self._device = device
        self._tokens = 0
        self._notices: list[str] = []

    @cached_property
    def _worker(self) -> Worker:
        order = self._order
        if changes := differences(order.libraries, _libraries()):
            raise ValueError(
                f"a worker runs other libraries ({'; '.join(changes)}), which could change the data; install the same "
                "versions on all machines"
            )
        _check_files(order.files)
        corpus_source, teacher_source = _embedded_here(order)
        return Worker(
            order.recipe,
            order.plan,
            corpus_source,
            teacher_source,
            device=self._device,
            progress=self._count,
            notice=self._notices.append,
        )

    def prepare(self, task: Task) -> dict[str, Any]:
        """As `Worker.prepare`, once it is sure that this machine has what the driver's has."""
        if self._device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                "a worker's torch finds no CUDA device; use --device cpu, or install a CUDA build of torch there"
            )
        return self._worker.prepare(task)

    def shard(self, task: Task) -> ShardRecord:
        """As `Worker.shard`."""
        self._tokens = 0
        return self._worker.shard(self._order.output, task)

    def status(self) -> Status:
        """Answers while a shard is computed."""
        notices, self._notices[:] = list(self._notices), []
        return Status(process=os.getpid(), tokens=self._tokens, notices=notices)

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


def compute(
    pool: Pool, order: Order, chains: Chains, *, device: str, progress: Progress, notice: Notice
) -> Generator[Computed]:
    """Compute shards with the workers of a pool.

    Args:
        pool: how many workers, and where.
        order: what they build.
        chains: what gives out the shards.
        device: `auto`, `cpu` or `cuda`.
        progress: told of captured tokens, and of lost ones as a negative number.
        notice: told of workers that died, and what workers have to say.

    Raises:
        ValueError: there are more workers than partitions or resources, Ray cannot be reached, or a worker cannot load the
            teacher.
    """
    partitions = order.recipe.output.partitions
    if pool.workers > partitions:
        raise ValueError(
            f"--workers is {pool.workers}, but output.partitions is {partitions}, and the shards of a partition are built one "
            f"after the other; use --workers {partitions}, or begin a dataset with more partitions in another directory"
        )
    first = chains.next_task()
    if first is None:
        return
    with _ray(pool):
        crew = _Crew(pool, order, device=device, progress=progress, notice=notice)
        try:
            yield from crew.compute(chains, first)
        finally:
            crew.dismiss()


class _Crew:
    """The workers of a pool, and what each is doing."""

    def __init__(
        self, pool: Pool, order: Order, *, device: str, progress: Progress, notice: Notice
    ) -> None:
        self._told, self._progress, self._notice = pool.told, progress, notice
        device, cpus, gpus = _resources(pool, order.recipe, device, notice)
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cpus))
        start = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            concurrency_groups={"status": 1},
        )(Actor)
        self._actors = [start.remote(order, device, threads) for _ in range(pool.workers)]
        self._heard: dict[int, Status] = {}
        self._asked: dict[int, Any] = {}
        self._counted = [0] * pool.workers
        """Tokens of the shard under way that were reported as progress."""
        self._under_way: dict[Any, tuple[int, Task | None]] = {}
        """Result to come → (worker, its shard); no shard while it loads the teacher."""

    def compute(self, chains: Chains, first: Task) -> Generator[Computed]:
        waiting: Task | None = first
        for worker, actor in enumerate(self._actors):
            call = actor.prepare.options(max_task_retries=RETRIES)
            self._under_way[call.remote(first)] = (worker, None)
        idle: list[int] = []
        while self._under_way:
            done, _ = ray.wait(list(self._under_way), timeout=POLL_SECONDS)
            for result in done:
                worker, task = self._under_way.pop(result)
                idle.insert(0, worker)  # it has the place open at which its partition goes on
                if task is None:
                    chains.loaded(_get(result, "a worker died while it loaded the teacher"))
                else:
                    yield task, self._outcome(result, worker, task)
            while idle and (task := waiting or chains.next_task()):
                waiting = None
                self._start(idle.pop(0), task)
            if idle and not any(task for _, task in self._under_way.values()):
                return  # there is nothing left to do for workers that still load
            self._look_around()

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            ray.kill(actor)

    def _start(self, worker: int, task: Task) -> None:
        self._counted[worker] = 0
        call = self._actors[worker].shard.options(max_task_retries=RETRIES, retry_exceptions=True)
        self._under_way[call.remote(task)] = (worker, task)

    def _outcome(self, result: Any, worker: int, task: Task) -> ShardRecord | Exception:
        try:
            record: ShardRecord = _get(result, f"the worker that computed {task.file} died")
        except Exception as error:
            self._count(worker, 0)
            return error
        self._count(worker, record.tokens)
        return record

    def _look_around(self) -> None:
        """Ask every worker how far it is, without waiting for the answers."""
        tasks = dict(self._under_way.values())
        for worker, actor in enumerate(self._actors):
            question = self._asked.get(worker)
            if question is not None:
                if not ray.wait([question], timeout=0)[0]:
                    continue
                with suppress(RayActorError):  # it has died, and Ray will restart it
                    self._hear(worker, tasks.get(worker), ray.get(question))
            self._asked[worker] = actor.status.options(concurrency_group="status").remote()
        self._told(self._describe(tasks))

    def _hear(self, worker: int, task: Task | None, status: Status) -> None:
        before, self._heard[worker] = self._heard.get(worker), status
        if before and before.process != status.process:
            again = f"; {task.file} is computed again" if task else ""
            self._notice(f"worker {worker} died and was started anew{again}")
        for line in status.notices:
            self._notice(f"worker {worker}: {line}")
        if task:
            self._count(worker, status.tokens)

    def _count(self, worker: int, tokens: int) -> None:
        """Report how many tokens of its shard a worker has captured."""
        self._progress(tokens - self._counted[worker])
        self._counted[worker] = tokens

    def _describe(self, tasks: dict[int, Task | None]) -> str:
        doing = []
        for worker in range(len(self._actors)):
            if worker not in tasks:
                doing.append("idle")
            elif task := tasks[worker]:
                doing.append(Path(task.file).stem.removeprefix("train-"))
            else:
                doing.append("loading" if worker in self._heard else "starting")
        if len(doing) <= LISTED_WORKERS:
            return " ".join(doing)
        names = ["starting", "loading", "idle"]
        numbers = {name: doing.count(name) for name in names}
        numbers["computing"] = len(doing) - sum(numbers.values())
        return ", ".join(f"{number} {name}" for name, number in numbers.items() if number)


def _get(result: Any, death: str) -> Any:
    """A worker's result.

    Raises:
        Exception: what the worker raised.
        ValueError: it did not survive its retries.
    """
    try:
        return ray.get(result)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, Exception) else RuntimeError(str(cause)) from None
    except RayError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{death} {RETRIES + 1} times, perhaps for want of memory ({reason}); use fewer --workers, or a smaller "
            "sequences.batch_tokens in a new dataset"
        ) from None


@contextmanager
def _ray(pool: Pool) -> Iterator[None]:
    """A connection to Ray: the one that this process has, one to a cluster, or a Ray of its own that ends with it."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": pool.address}
    if pool.address is None:
        options = {
            "address": "local",
            "num_cpus": max(torch.get_num_threads(), pool.workers),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"reach Ray at {pool.address!r}" if pool.address else "start Ray"
        raise ValueError(f"cannot {where} ({' '.join(str(error).split())[:300]})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _resources(pool: Pool, recipe: Recipe, device: str, notice: Notice) -> tuple[str, int, float]:
    """Device, CPUs and GPUs of each worker.

    Raises:
        ValueError: what was asked for contradicts itself, or this machine does not have it.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_there = sum(node.get("GPU", 0) for node in nodes)
    if device == "auto":
        device = (
            "cuda"
            if pool.gpus_per_worker or (gpus_there and pool.gpus_per_worker is None)
            else "cpu"
        )
    gpus = pool.gpus_per_worker
    if gpus is None:
        gpus = float(device == "cuda")
    if (device == "cuda") != (gpus > 0):
        raise ValueError(
            f"--device {device} and --gpus-per-worker {gpus:g} contradict each other; leave one out"
        )
    if (needed := gpus * pool.workers) > gpus_there:
        shortage = f"{pool.workers} workers with {gpus:g} GPUs each need {needed:g} GPUs, but Ray has {gpus_there:g}"
        if pool.address is None:
            raise ValueError(f"{shortage}; use fewer --workers, or --gpus-per-worker")
        notice(f"{shortage}: going on with those that fit, and waiting for more")
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    shares = range(1, max(cpus, default=0) + 1)
    fitting = [share for share in shares if sum(count // share for count in cpus) >= pool.workers]
    return device, max(fitting, default=0), gpus


def _libraries() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _check_files(files: dict[str, int]) -> None:
    for name, size in files.items():
        try:
            found = Path(name).stat().st_size
        except OSError as error:
            raise ValueError(
                f"a worker does not see {name} ({error.strerror}); corpus, teacher and --output must be at paths that all "
                "machines of the cluster share, or come from the Hub"
            ) from None
        if found != size:
            raise ValueError(
                f"a worker sees another {name} ({found:,} bytes, here {size:,}); corpus, teacher and --output must be at "
                "paths that all machines of the cluster share"
            )


def _embedded_here(order: Order) -> tuple[CorpusSource, TeacherSource]:
    """The sources of an order, where those that come as Python packages are the worker's own."""
    known, corpus_source, teacher_source = KnownSources(), order.corpus_source, order.teacher_source
    if order.recipe.corpus.embedded:
        corpus_source = resolve_corpus(order.recipe.corpus, Path(), known)
    if order.recipe.teacher.embedded:
        teacher_source = resolve_teacher(order.recipe.teacher, Path(), known)
    changes = [
        *differences(order.corpus_source.provenance, corpus_source.provenance, "corpus"),
        *differences(order.teacher_source.provenance, teacher_source.provenance, "teacher"),
    ]
    if changes:
        raise ValueError(
            f"a worker has another embedded corpus or teacher ({'; '.join(changes)}); install the same versions of Python and "
            "packages on all machines"
        )
    return corpus_source, teacher_source
