"""What all measurements share: the recipe, the sequences that it gives, clocks, and a description of the machine."""

import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from builder.build.stream import SequenceStream
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Sequence
from builder.dataset.manifest import environment, read_manifest
from builder.recipe.recipe import Recipe
from builder.sources import demo
from builder.sources.opening import make_encoder
from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher

T = TypeVar("T")
MAX_LENGTH, BATCH_TOKENS, TOP_K = 512, 4096, 50


def recipe(dtype: str, tokens: int, **output: object) -> Recipe:
    """The embedded recipe, cut to some tokens."""
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "corpus": {"embedded": "python-docs", "max_tokens": tokens},
            "teacher": {"embedded": "smollm2-135m-instruct", "dtype": dtype},
            "sequences": {"max_length": MAX_LENGTH, "batch_tokens": BATCH_TOKENS},
            "output": {"top_k": TOP_K, "tail_samples": 0, **output},
        }
    )


def load(dtype: str, device: str) -> Teacher:
    """The embedded teacher, as it runs by itself: in 16 bits with rounded logits."""
    directory, _ = demo.embedded_teacher()
    return load_teacher(str(directory), dtype=dtype, device=device, head_dtype="teacher")


def sequences(teacher: Teacher, tokens: int) -> list[Sequence]:
    """The sequences of the recipe, in the corpus's order."""
    from builder.sources.known import KnownSources
    from builder.sources.resolve import resolve_corpus

    cut = recipe("float32", tokens)
    source = resolve_corpus(cut.corpus, Path(), KnownSources())
    encoder: Encoder = make_encoder(cut, teacher.tokenizer)
    return list(SequenceStream(cut, source, encoder, 0, None).shard_sequences())


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def costs(call: Callable[[], object]) -> tuple[float, float]:
    """How long a call takes, and how much CPU time of this process and of those that it started and ended, in seconds."""

    def cpu() -> float:
        of_children = os.times()[2:4]  # in hundredths of a second; this process's clock is finer
        return time.process_time() + sum(of_children)

    before, started = cpu(), time.perf_counter()
    call()
    return time.perf_counter() - started, cpu() - before


def repeated(dataset: Path, output: Path, tokens: int) -> Path:
    """A dataset whose files are those of another again and again, until it has as many tokens: a long one that is soon built."""
    manifest = read_manifest(dataset)
    count = -(-tokens // manifest["totals"]["tokens"])
    (output / "data").mkdir(parents=True)
    shards = []
    for copy in range(count):
        for shard in manifest["shards"]:
            name = shard["file"].replace("-", f"-{copy:03d}-", 1)
            (output / name).hardlink_to((dataset / shard["file"]).resolve())
            shards.append({**shard, "file": name})
    totals = {n: manifest["totals"][n] * count for n in ("rows", "tokens", "bytes")}
    changed = {**manifest, "shards": shards, "totals": {**manifest["totals"], **totals}}
    write_json(output / "manifest.json", changed)
    card = re.sub(
        r"((?:num_bytes|num_examples|download_size|dataset_size): )(\d+)",
        lambda found: f"{found[1]}{int(found[2]) * count}",
        (dataset / "README.md").read_text(encoding="utf-8"),
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    return output


def rounds(calls: dict[str, Callable[[], T]], count: int) -> dict[str, list[T]]:
    """Run the calls in turn, `count` times after one warm-up: what each returned, round by round."""
    found: dict[str, list[T]] = {name: [] for name in calls}
    for round_number in range(count + 1):
        for name, call in calls.items():
            value = call()
            if round_number:
                found[name].append(value)
    return found


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios, round by round: what drifts hits both sides alike."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextmanager
def timed(
    owner: object,
    name: str,
    clock: dict[str, float],
    label: str,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Add the time spent in a function or generator, on whatever thread, while this lasts, to `clock[label]`."""
    original = getattr(owner, name)
    lock = threading.Lock()

    def clocked(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = now()
        try:
            return call(*args, **kwargs)
        finally:
            taken = now() - started
            with lock:
                clock[label] = clock.get(label, 0.0) + taken

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = clocked(original, *args, **kwargs)
        end = object()
        return (
            iter(lambda: clocked(next, result, end), end) if hasattr(result, "__next__") else result
        )

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


def machine(device: str) -> dict[str, object]:
    """Processor, cores, device and versions, without names of hosts or users."""
    return {"processor": _processor(), "cores": os.cpu_count(), **environment(device)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, values: object) -> None:
    """Write results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
