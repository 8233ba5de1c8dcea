"""What there is to compute, and by whom: a shard, how that ended, and several workers.

In:   numbers, and where in the corpus a shard starts.
Out:  plain values, which also travel to other machines.

Cost: none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from builder.corpus.documents import Offset
from builder.dataset.manifest import ShardRecord, data_file
from logit_dataset.schema import TRAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A shard to compute."""

    partition: int
    index: int
    start: Offset | None
    """Where in the corpus the shard before it ended; None for the first of a partition."""
    split: str = TRAIN

    @property
    def file(self) -> str:
        """Path of its file below the dataset's directory."""
        return data_file(self.partition, self.index, self.split)


Computed = tuple[Task, ShardRecord | Exception | None]
"""A shard that was to be computed, and how that ended; None where no document of its partition is held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Several workers that Ray runs."""

    workers: int
    device: str = "auto"
    """`auto`, `cpu` or `cuda`: settled where the workers are."""
    address: str | None = None
    """Of a Ray cluster, as `ray.init` takes it; None for this machine alone."""
    gpus_per_worker: float | None = None
    """None for what device and teacher need."""
    told: Callable[[str], None] = lambda _: None
    """Called, again and again, with a few words on what each worker does."""
