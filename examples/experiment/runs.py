"""The plan of an experiment → one file of results a run, several runs at once, those that are done never again.

Each worker is a process with one thread: for a model this small a second thread would mostly wait.
"""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from builder.console.terminal import quiet_libraries
from builder.dataset.manifest import write_json
from examples.experiment.arms import ARMS
from examples.experiment.prepare import Place, prepare
from examples.experiment.train import Data, Settings, read_json, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of an experiment."""

    max_characters: int | None
    num_kept: int
    steps: int
    """With all data."""
    quarter_steps: int
    evaluate_every: int
    """With all data; with a quarter, as many times in a run."""
    batch_size: int
    length: int
    seeds: int
    rates: tuple[float, ...]
    rate_checks: tuple[str, ...]
    """Arms that are tried at the rates that were not chosen, too."""
    arms: tuple[str, ...] = (
        *("whole", "renormalised", "tail_draws", "text", "samples", "tail_bucket"),
        *("residual", "argmax", "sample"),
    )
    """Those that tell most first."""

    def settings(self, arm: str, data: str, seed: int, rate: float) -> Settings:
        """Of one run."""
        steps = self.steps if data == "train" else self.quarter_steps
        return Settings(
            arm=arm,
            data=data,
            seed=seed,
            rate=rate,
            steps=steps,
            evaluate_every=max(1, self.evaluate_every * steps // self.steps),
            batch_size=self.batch_size,
            length=self.length,
        )

    def to_choose_rate(self) -> list[Settings]:
        """The text arm at every rate: the one at which it does best is used for all arms."""
        return [self.settings("text", "train", 0, rate) for rate in self.rates]

    def to_check_rate(self) -> list[Settings]:
        """Other arms at every rate, to see whether the choice matters to them."""
        return [
            self.settings(arm, "train", 0, rate) for arm in self.rate_checks for rate in self.rates
        ]

    def runs(self, rate: float) -> Iterator[Settings]:
        """All runs at the chosen rate, the most informative first."""
        for seed in range(self.seeds):
            for data in ("train", "quarter"):
                for arm in self.arms:
                    if seed == 0 or ARMS[arm].has_seeds:
                        yield self.settings(arm, data, seed, rate)


FULL = Plan(
    max_characters=None,
    num_kept=2_048,
    steps=2_400,
    quarter_steps=1_200,
    evaluate_every=100,
    batch_size=4,
    length=256,
    seeds=3,
    rates=(1e-3, 2e-3, 4e-3),
    rate_checks=("whole",),
)
QUICK = Plan(
    max_characters=150_000,
    num_kept=1_024,
    steps=150,
    quarter_steps=100,
    evaluate_every=25,
    batch_size=4,
    length=256,
    seeds=1,
    rates=(2e-3,),
    rate_checks=(),
)


def experiment(plan: Plan, place: Place, results: Path, *, workers: int) -> None:
    """Do what is not done yet.

    Raises:
        ValueError: results of other settings are in the way, or a run went wrong.
    """
    torch.set_num_threads(workers)  # now the teacher has all cores
    prepare(place, results, max_characters=plan.max_characters, progress=say)
    torch.set_num_threads(1)
    run_all([*plan.to_choose_rate(), *plan.to_check_rate()], place, results, workers)
    rate = choose_rate(plan.to_choose_rate(), results)
    write_json(results / "plan.json", {**asdict(plan), "rate": rate})
    run_all(list(plan.runs(rate)), place, results, workers)


def choose_rate(candidates: Sequence[Settings], results: Path) -> float:
    """The learning rate of the run whose best cross-entropy on the validation documents is lowest."""

    def best(settings: Settings) -> float:
        return min(point["ce"] for point in _result(settings, results)["curve"])

    return min(candidates, key=best).rate


def run_all(runs: Sequence[Settings], place: Place, results: Path, workers: int) -> None:
    """Those whose files are not there, `workers` at once (one: in this process), each file written when its run is done."""
    missing = [
        settings for settings in dict.fromkeys(runs) if not _is_done(settings, place, results)
    ]
    if not missing:
        return
    say(f"{len(missing)} runs to do")
    if workers == 1:
        _start_worker(place)
        for settings in missing:
            say(_run(settings, place, results))
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(place,),
    ) as pool:
        futures = [pool.submit(_run, settings, place, results) for settings in missing]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                say(f"{number}/{len(missing)} {future.result()}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker_data: list[Data] = []
"""Of a worker process: opened once."""


def _start_worker(place: Place) -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    _worker_data[:] = [place.data()]


def _run(settings: Settings, place: Place, results: Path) -> str:
    """Train, unless it was done in the meantime or another process is at it: several programs may work on one plan."""
    try:
        with FileLock(results / f".{settings.name}.lock", timeout=0):
            if _is_done(settings, place, results):
                return f"{settings.name}: done by another process"
            result = train(settings, _worker_data[0], progress=_say_while_wanted)
            write_json(results / settings.name, result)
    except Timeout:
        return f"{settings.name}: another process is at it"
    best = result["best"]
    return f"{settings.name}: test ce {best['ce']:.4f} at step {result['best_step']}, {result['seconds']:.0f} s"


def _is_done(settings: Settings, place: Place, results: Path) -> bool:
    if not (results / settings.name).exists():
        return False
    found, made_of = _result(settings, results), read_json(place.parts / "made_of.json")
    if (Settings(**found["settings"]), found["made_of"]) != (settings, made_of):
        raise ValueError(
            f"{results / settings.name} is of other settings or other data (another version of Python has another "
            "corpus); move the results away, or give other --results"
        )
    return True


def _result(settings: Settings, results: Path) -> dict[str, Any]:
    return read_json(results / settings.name)


def _say_while_wanted(message: str) -> None:
    """Say it, and end this process if the one that wanted the run was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)
    say(message)


def say(message: str) -> None:
    """On the terminal, at once."""
    print(message, file=sys.stderr, flush=True)
