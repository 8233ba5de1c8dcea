"""Shards on several processes at once, on this machine or on a cluster: Ray starts, watches and replaces the workers.

In:   chains of shards, and how many workers.
Out:  each shard's record, or the error with which it failed for the last time, in the order in which they end.

How:  a worker is a Ray actor that loads the teacher once and then computes one shard after the other, with the code that a
      single process runs. One whose process or machine dies is replaced, and its shard is tried again, RETRIES times at
      most, by whichever worker is free. The driver alone writes records. So whatever dies, and whenever, what counts is a
      whole file; two workers that compute the same shard, because one was given up too early, write the same bytes.

      Ray's own retries are not used: the last of them fails at once if the actor is still being restarted.

Cost: a worker needs its own teacher in memory, and about five seconds to start.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray prints what happens to its processes to stdout; what matters of it comes as an exception, too.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from builder.build.actor import Actor, Order, Status
from builder.build.task import Computed, Pool, Task
from builder.capture.pipeline import Notice, Progress
from builder.dataset.manifest import ShardRecord
from builder.recipe.recipe import Recipe
from builder.sources.changes import SourceChangedError
from logit_dataset.files import first_line

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


def compute(
    pool: Pool, order: Order, chains: Chains, *, progress: Progress, notice: Notice
) -> Generator[Computed]:
    """Compute shards with the workers of a pool.

    Args:
        pool: how many workers, and where.
        order: what they build.
        chains: what gives out the shards.
        progress: told of captured tokens, and of lost ones as a negative number.
        notice: told of workers that died, and what workers have to say.

    Raises:
        ValueError: there are more workers than resources, Ray cannot be reached or fails, or a worker cannot load the teacher.
    """
    first = chains.next_task()
    if first is None:
        return
    with _ray(pool):
        crew = _Crew(pool, order, progress=progress, notice=notice)
        try:
            yield from crew.compute(chains, first)
        except RayError as error:
            raise ValueError(
                f"Ray fails ({' '.join(str(error).split())[:300]}); finished shards are safe: run the same command to resume"
            ) from None
        finally:
            crew.dismiss()


def settle_batches(pool: Pool, order: Order, *, notice: Notice) -> Recipe:
    """As `Worker.settle_batches`, by a worker that ends with it.

    Raises:
        ValueError: as `compute`, or the worker dies.
    """
    with _ray(pool):
        pool.told("trying sizes of batches")
        actor = _start(pool, order, notice)()
        try:
            recipe, lines = ray.get(actor.settle_batches.remote())
        except RayError as error:
            outcome = _error(error, "trying sizes of batches")
            raise outcome from None
        finally:
            ray.kill(actor)
            pool.told("")
        for line in lines:
            notice(line)
        return recipe  # type: ignore[no-any-return]


class _Crew:
    """The workers of a pool, and what each is doing."""

    def __init__(self, pool: Pool, order: Order, *, progress: Progress, notice: Notice) -> None:
        self._told, self._progress, self._notice = pool.told, progress, notice
        self._new_actor = _start(pool, order, notice)
        self._actors = [self._new_actor() for _ in range(pool.workers)]
        self._under_way: dict[Any, tuple[int, Task | None]] = {}
        """Result to come → (worker, its shard); no shard while it loads the teacher."""
        self._again: deque[Task] = deque()
        """Shards to try again."""
        self._tries: Counter[str] = Counter()
        """Failures by file; under "worker 3" how often this one died loading the teacher since it last did."""
        self._questions: dict[int, Any] = {}
        """Worker → its status to come."""
        self._counted = [0] * pool.workers
        """Tokens of the shard under way that were reported as progress."""

    def compute(self, chains: Chains, first: Task) -> Generator[Computed]:
        """Compute the shards that `chains` gives out, `first` before all others."""
        self._again.append(first)
        idle: list[int] = []
        for worker in range(len(self._actors)):
            self._prepare(worker, first)
        while self._under_way:
            done, _ = ray.wait(list(self._under_way), timeout=POLL_SECONDS)
            for result in done:
                worker, task = self._under_way.pop(result)
                outcome = self._outcome(result, worker, task)
                if isinstance(outcome, _Died):
                    self._actors[worker] = self._new_actor()
                    self._prepare(worker, task or first)
                else:
                    idle.insert(0, worker)  # it has the place open at which its partition continues
                if task is None:
                    self._take_loaded(chains, f"worker {worker}", outcome)
                elif isinstance(
                    outcome, ShardRecord | SourceChangedError | None
                ) or not self._try_again(task, outcome):
                    yield task, outcome
            while idle and (task := self._next_task(chains)):
                worker = idle.pop(0)
                self._under_way[self._actors[worker].shard.remote(task)] = (worker, task)
            if idle and not any(task for _, task in self._under_way.values()):
                return  # there is nothing left to do for workers that still load
            self._look_around()

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            with suppress(RayError):  # it has no Ray any more
                ray.kill(actor)

    def _prepare(self, worker: int, task: Task) -> None:
        self._under_way[self._actors[worker].prepare.remote(task)] = (worker, None)

    def _next_task(self, chains: Chains) -> Task | None:
        return self._again.popleft() if self._again else chains.next_task()

    def _outcome(self, result: Any, worker: int, task: Task | None) -> Any:
        """What a worker returned, or the exception with which it ended."""
        outcome: Any
        try:
            outcome = ray.get(result)
        except RayError as error:
            outcome = _error(error, f"computing {task.file}" if task else "loading the teacher")
        self._count(worker, outcome.tokens if isinstance(outcome, ShardRecord) else 0)
        self._counted[worker] = 0
        return outcome

    def _take_loaded(self, chains: Chains, worker: str, outcome: Any) -> None:
        """Hear of a worker that has loaded the teacher, or could not.

        Raises:
            Exception: it could not; only the death of a worker is tried again.
        """
        if not isinstance(outcome, Exception):
            self._tries[worker] = 0
            chains.loaded(outcome)
        elif not isinstance(outcome, _Died) or not self._count_try(worker, outcome):
            raise outcome

    def _try_again(self, task: Task, error: Exception) -> bool:
        """Put a shard that failed back, unless that was its last try."""
        if again := self._count_try(task.file, error):
            self._again.append(task)
        return again

    def _count_try(self, name: str, error: Exception) -> bool:
        self._tries[name] += 1
        if self._tries[name] > RETRIES:
            return False
        self._notice(f"{error}; trying again")
        return True

    def _look_around(self) -> None:
        """Ask every worker how far it is, without waiting for the answers."""
        tasks = dict(self._under_way.values())
        for worker, actor in enumerate(self._actors):
            question = self._questions.get(worker)
            if question is not None:
                if not ray.wait([question], timeout=0)[0]:
                    continue
                with suppress(RayError):  # it has died, which is heard from its shard
                    self._hear(worker, tasks.get(worker), ray.get(question))
            self._questions[worker] = actor.status.options(concurrency_group="status").remote()
        self._told(self._describe(tasks))

    def _hear(self, worker: int, task: Task | None, status: Status) -> None:
        for line in status.notices:
            self._notice(f"worker {worker}: {line}")
        if task and task.file == status.file:
            self._count(worker, status.tokens)

    def _count(self, worker: int, tokens: int) -> None:
        """Report how many tokens of its shard a worker has captured."""
        self._progress(tokens - self._counted[worker])
        self._counted[worker] = tokens

    def _describe(self, tasks: dict[int, Task | None]) -> str:
        doing = []
        for worker in range(len(self._actors)):
            task = tasks.get(worker)
            name = Path(task.file).stem.removeprefix("train-") if task else ""
            doing.append(name or ("loading" if worker in tasks else "idle"))
        if len(doing) <= LISTED_WORKERS:
            return " ".join(doing)
        numbers = {name: doing.count(name) for name in ("loading", "idle")}
        numbers["computing"] = len(doing) - sum(numbers.values())
        return ", ".join(f"{number} {name}" for name, number in numbers.items() if number)


class _Died(ValueError):
    """The process or machine of a worker died."""


def _start(pool: Pool, order: Order, notice: Notice) -> Callable[[], Any]:
    """What starts a worker of a pool."""
    device, cpus, gpus = _resources(pool, order.recipe.teacher.tensor_parallel, notice)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cpus))
    start = ray.remote(num_cpus=cpus, num_gpus=gpus, concurrency_groups={"status": 1})(Actor)
    return partial(start.remote, order, device, threads)


def _error(error: RayError, doing: str) -> Exception:
    """What a worker raised, or that it died of what it was doing."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, Exception) and not isinstance(cause, RayError):
            return cause
        return RuntimeError(str(error).strip().splitlines()[-1])  # below its traceback
    return _Died(f"a worker died {doing}, possibly out of memory ({first_line(error)})")


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
    except (
        Exception
    ) as error:  # Ray raises all kinds, a bare Exception where it takes too long to start
        where = f"reach Ray at {pool.address!r}" if pool.address else "start Ray"
        raise ValueError(
            f"cannot {where} ({' '.join(str(error).split())[:300]}); finished shards are safe: run the same command to resume"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _resources(pool: Pool, ranks: int | None, notice: Notice) -> tuple[str, int, float]:
    """Device, CPUs and GPUs of each worker.

    Raises:
        ValueError: what was asked for contradicts itself, or this machine does not have it.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus_there = sum(node.get("GPU", 0) for node in nodes)
    device = pool.device
    if device == "auto":
        device = (
            "cuda"
            if pool.gpus_per_worker or (gpus_there and pool.gpus_per_worker is None)
            else "cpu"
        )
    gpus = pool.gpus_per_worker
    if gpus is None:
        gpus = float(ranks or 1) if device == "cuda" else 0.0
    if (device == "cuda") != (gpus > 0):
        raise ValueError(
            f"--device {device} and --gpus-per-worker {gpus:g} contradict each other; leave one out"
        )
    if gpus and ranks and gpus != ranks:
        raise ValueError(
            f"teacher.tensor_parallel is {ranks}, but --gpus-per-worker is {gpus:g}; leave out --gpus-per-worker"
        )
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"--gpus-per-worker is {gpus:g}, expected a whole number, or less than 1")
    places = [_places(node.get("GPU", 0), gpus) if gpus else pool.workers for node in nodes]
    if (room := sum(places)) < pool.workers:
        shortage = f"--workers {pool.workers} with --gpus-per-worker {gpus:g} does not fit: the GPUs of Ray ({gpus_there:g}) are enough for {room}"
        if pool.address is None:
            raise ValueError(f"{shortage}; use a smaller --workers or --gpus-per-worker")
        notice(f"{shortage}: continuing with those that fit, and waiting for more")
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    return device, _cpu_share(cpus, places, min(pool.workers, room)), gpus


def _places(gpus_there: float, gpus: float) -> int:
    """Workers for which a machine has GPUs: a part of one is never put together from two."""
    if gpus >= 1:
        return int(gpus_there // gpus)
    return int(gpus_there) * int(1 / gpus + 1e-9)  # 1 // 0.1 is 9


def _cpu_share(cpus: list[int], places: list[int], workers: int) -> int:
    """The most CPUs that each of some workers can have so that all of them start.

    Args:
        cpus: of each machine.
        places: workers for which each machine has GPUs.
        workers: that are to start; 0 where there is no machine for any of them yet.

    Returns:
        0 if there are fewer CPUs than workers.
    """

    def fit(share: int) -> int:
        return sum(min(c // share, p) for c, p in zip(cpus, places, strict=True))

    shares = range(1, max(cpus, default=0) + 1)
    return max((share for share in shares if fit(share) >= max(workers, 1)), default=0)
