"""What a build does beside the teacher: read, tokenized, batched, put in order, written, fsynced, hashed; with canned statistics in the
pipeline's place, so that nothing waits for a device.

CPU time is counted by thread: of all of the process, of the main thread, and of each stage where it runs. What runs on torch's or Arrow's
own threads is of the process only, so `other` holds it.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import sample
from builder.build import worker
from builder.build.build import build
from builder.capture import pipeline, windows
from builder.capture.distribution import Distribution
from builder.capture.guard import Guard
from builder.corpus.documents import Corpus
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Chunks
from builder.dataset import shards
from builder.dataset.manifest import read_manifest
from builder.recipe.recipe import Recipe
from builder.sources import demo
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout

CANNED_TOKENS = 8_192
"""Positions of which there are true statistics, used again and again: more than a page of the file holds."""
TOKENS = 1_500_000
MAX_LENGTH, BATCH_TOKENS, SHARD_TOKENS = 1024, 16_384, 500_000
DRAWS = 4
STAGES: dict[str, tuple[Any, str]] = {
    "read": (Corpus, "__iter__"),
    "tokenize": (Encoder, "whole"),
    "cut": (Chunks, "__next__"),
    "batches": (pipeline.Pipeline, "batch"),
    "launch": (pipeline.Pipeline, "_launch"),
    "order": (windows, "_in_order"),
    "sums": (worker, "_sums"),
    "write": (shards.ShardWriter, "_write_block"),
    "hash": (worker, "file_sha256"),
}
"""Functions whose CPU time, on whatever thread, is a stage's."""
CLOCKS = {
    "wall": time.perf_counter,
    "all": time.process_time,
    "main thread": time.thread_time,
}


def measure(*, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Tokens/s, and CPU microseconds a token, with draws and without."""
    teacher = sample.load("bfloat16", "cpu")
    found: dict[str, Any] = {"tokens": tokens, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        _write_corpus(base / "corpus.jsonl", tokens)
        for name, draws in (("with draws", DRAWS), ("without draws", 0)):
            with _canned(teacher, draws):
                taken = [_build(base, tokens, draws) for _ in range(rounds + 1)][1:]
            found[name] = {
                label: round(statistics.median(one[label] for one in taken), 3)
                for label in taken[0]
            }
    return found


def _build(base: Path, tokens: int, draws: int) -> dict[str, float]:
    """Rate and CPU microseconds a token of one build."""
    clock: dict[str, float] = {}
    whole: dict[str, float] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=base) as output:
        for label, (owner, name) in STAGES.items():
            stack.enter_context(sample.timed(owner, name, clock, label, now=time.thread_time))
        for label, now in CLOCKS.items():
            stack.enter_context(sample.timed(worker.Worker, "shard", whole, label, now=now))
        build(_recipe(tokens, draws), base, Path(output, "out"))
        count = read_manifest(Path(output, "out"))["totals"]["tokens"]
    of_token = {label: 1e6 * value / count for label, value in (whole | clock).items()}
    stages = sum(of_token[label] for label in STAGES)
    return {
        "tokens/s": 1e6 / of_token.pop("wall"),
        "all": of_token.pop("all"),
        "main thread": of_token.pop("main thread"),
        **of_token,
        "others' threads": 1e6 * whole["all"] / count - stages,
    }


def _recipe(tokens: int, draws: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "host",
            "corpus": {"files": ("corpus.jsonl",), "id_column": "id", "max_tokens": tokens},
            "teacher": {"embedded": "smollm2-135m-instruct", "dtype": "bfloat16"},
            "sequences": {"max_length": MAX_LENGTH, "batch_tokens": BATCH_TOKENS},
            "output": {
                "top_k": sample.TOP_K,
                "tail_samples": draws,
                "shard_tokens": SHARD_TOKENS,
            },
        }
    )


def _write_corpus(path: Path, tokens: int) -> None:
    """The embedded corpus again and again, until there are enough tokens: of four characters or more, by far."""
    lines = demo.embedded_corpus()[0].read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    length = number = 0
    with path.open("w", encoding="utf-8") as file:
        while length < 5 * tokens:
            document = documents[number % len(documents)]
            file.write(json.dumps({"id": f"{number}", "text": document["text"]}) + "\n")
            length, number = length + len(document["text"]), number + 1


@contextmanager
def _canned(teacher: Teacher, draws: int) -> Iterator[None]:
    """Have builds use a loaded teacher that computes nothing, and statistics that it computed before."""
    layout = Layout.of(_recipe(1, draws).published(), teacher.provenance())
    runner = pipeline.Pipeline(teacher, layout=layout, batch_tokens=sample.BATCH_TOKENS)
    blocks = [
        block.distribution
        for block in runner.blocks(iter(sample.sequences(teacher, CANNED_TOKENS)))
    ]
    known = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    count = len(known["logsumexp"])
    room = {
        name: column.repeat(1 + BATCH_TOKENS // count + 1, *[1] * (column.ndim - 1))
        for name, column in known.items()
    }
    at = 0

    def capture(pieces: Iterator[Tensor], targets_N: Tensor, **_: object) -> Distribution:
        nonlocal at
        list(pieces)
        at = (at + len(targets_N)) % count
        return {name: column[at : at + len(targets_N)] for name, column in room.items()}

    def logits(ids: list[list[int]]) -> Iterator[Tensor]:
        teacher.hidden(ids)
        return iter(())

    with (
        patch.object(teacher, "_body", lambda input_ids, use_cache: (input_ids[..., None],)),
        patch.object(teacher, "logits", logits),
        patch.object(teacher, "rounded", logits),
        patch.object(pipeline, "capture", capture),
        patch.object(Guard, "choose", lambda *_: None),
        patch.object(worker, "open_teacher", lambda *_, **__: teacher),
    ):
        yield
