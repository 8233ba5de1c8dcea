"""A worker in a process of its own, which may be on another machine: what it is told, and what it has to find there.

In:   an order, which the driver makes of what it has resolved; then one shard after the other.
Out:  records of shards, and how far it is, at any time.

How:  the bytes of a shard depend on libraries, this program, corpus and teacher. What comes from the Hub or from a package is pinned.
      Local files have to be the driver's: one of the same size and time of change is taken for the same (as on a disk that machines
      share), any other is hashed. So no machine computes with other weights that happen to lie at the same path.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from builder.build.task import Task
from builder.build.worker import Worker
from builder.dataset.identity import differences
from builder.dataset.manifest import LIBRARIES, ShardRecord
from builder.dataset.shards import file_sha256
from builder.recipe.recipe import Recipe
from builder.sources.changes import Seen, hash_file
from builder.sources.known import KnownSources
from builder.sources.resolve import Sources, resolve_corpus, resolve_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What every worker is told: the plan, and what it must find where it runs."""

    recipe: Recipe
    sources: Sources
    output: Path
    files: dict[str, Seen]
    """By their paths, those that must be the same at every worker."""
    software: dict[str, str]


def make_order(recipe: Recipe, sources: Sources, output: Path, known: KnownSources) -> Order:
    """An order, with local files as they are here; `known` has the hashes of those that decide the data."""
    plan_file = output.resolve() / ".build" / "plan.json"
    paths: list[Path] = []
    if not recipe.corpus.embedded:
        paths += sources.corpus.files
    if not (recipe.teacher.embedded or recipe.teacher.repo):
        teacher = sources.teacher
        for place in filter(
            None, (teacher.location, teacher.tokenizer, teacher.config, *(teacher.weights or ()))
        ):
            path = Path(place)
            paths += [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return Order(
        recipe=recipe,
        sources=sources,
        output=output.resolve(),
        files={
            str(plan_file): _seen(plan_file, file_sha256(plan_file)),
            **{str(path): known.seen.get(str(path)) or _seen(path, None) for path in paths},
        },
        software=_software(),
    )


def _seen(path: Path, sha256: str | None) -> Seen:
    stat = path.stat()
    return Seen(stat.st_size, stat.st_mtime_ns, sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a worker is."""

    file: str | None
    """Of the shard that it computes, or computed last."""
    tokens: int
    """Captured of that."""
    notices: list[str]
    """New ones."""


class Actor:
    """A worker in a process of its own, which says how far it is while it computes."""

    def __init__(self, order: Order, device: str, threads: int) -> None:
        """Do nothing that can fail: what `prepare` raises reaches the user as it is."""
        torch.set_num_threads(threads)
        self._order = order
        self._device = device
        self._file: str | None = None
        self._tokens = 0
        self._notices: list[str] = []

    @cached_property
    def _worker(self) -> Worker:
        order = self._order
        if changes := differences(order.software, _software()):
            raise ValueError(
                f"a worker runs different software ({'; '.join(changes)}), which could change the data; install the same "
                "versions on all machines"
            )
        seen, sources = _check_files(order.files), _sources_here(order)
        return Worker(
            order.recipe,
            sources,
            watch=sources.watch(seen),
            device=self._device,
            progress=self._count,
            notice=self._notices.append,
        )

    def prepare(self, task: Task) -> dict[str, Any]:
        """As `Worker.prepare`, once it is sure that this machine has what the driver's has."""
        self._check_device()
        return self._worker.prepare(task)

    def _check_device(self) -> None:
        if self._device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                "a worker's torch finds no CUDA device; use --device cpu, or install a CUDA build of torch there"
            )

    def settle_batches(self) -> tuple[Recipe, list[str]]:
        """As `Worker.settle_batches`, and what there is to say of it."""
        self._check_device()
        return self._worker.settle_batches(), self.status().notices

    def shard(self, task: Task) -> ShardRecord | None:
        """As `Worker.shard`."""
        self._file, self._tokens = task.file, 0
        return self._worker.shard(self._order.output, task)

    def status(self) -> Status:
        """Answers while a shard is computed."""
        notices, self._notices[:] = list(self._notices), []
        return Status(file=self._file, tokens=self._tokens, notices=notices)

    def _count(self, tokens: int) -> None:
        self._tokens += tokens


def _software() -> dict[str, str]:
    """Versions of libraries, and what stands for this program: the hash of its own text."""
    digest = hashlib.sha256()
    for package in _packages():
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent)} {file_sha256(path)}\n".encode())
    libraries = {name: version(name) for name in LIBRARIES}
    return {**libraries, "logit-dataset": digest.hexdigest()[:12]}


def _packages() -> list[Path]:
    """The directories of this program."""
    specs = [find_spec(name) for name in ("builder", "logit_dataset")]
    return [Path(spec.origin).parent for spec in specs if spec and spec.origin]


def _check_files(files: dict[str, Seen]) -> dict[str, Seen]:
    """See that files are here what they are for the driver: those that decide the data, as they were seen here."""
    seen: dict[str, Seen] = {}
    for name, there in files.items():
        path = Path(name)
        try:
            here = _seen(path, there.sha256)
            if here.size == there.size and here != there and there.sha256:
                here = hash_file(path)
        except OSError as error:
            raise ValueError(
                f"a worker cannot read {name} ({error.strerror}); corpus, teacher and --output must be at paths shared by all machines of the cluster"
                ", or come from the Hub"
            ) from None
        if (here.size, here.sha256) != (there.size, there.sha256):
            found = (
                f"{here.size:,} bytes, here {there.size:,}"
                if here.size != there.size
                else "other content"
            )
            raise ValueError(
                f"a worker sees a different {name} ({found}); corpus, teacher and --output must be at paths shared by all machines of the cluster"
                ", and must not change during a build"
            )
        if here.sha256:
            seen[name] = here
    return seen


def _sources_here(order: Order) -> Sources:
    """The sources of an order, where those that come as Python packages are the worker's own."""
    recipe, known, here = order.recipe, KnownSources(), order.sources
    if recipe.corpus.embedded:
        here = replace(here, corpus=resolve_corpus(recipe.corpus, Path(), known))
    if recipe.teacher.embedded:
        here = replace(here, teacher=resolve_teacher(recipe.teacher, Path(), known))
    changes = differences(order.sources.plan(recipe), here.plan(recipe))
    if changes:
        raise ValueError(
            f"a worker has a different embedded corpus or teacher ({'; '.join(changes)}); install the same versions of Python and "
            "packages on all machines"
        )
    return here
