"""The build against the teacher's forward pass alone, and against the loop that one would write; and where the time goes."""

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks import sample
from builder.build.build import build
from builder.capture import distribution, windows
from builder.corpus.documents import Corpus
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Sequence, length_sorted_batches
from builder.dataset.manifest import read_manifest
from builder.dataset.shards import ShardWriter
from builder.plan.compute import EMBEDDED, flop_per_token
from builder.plan.estimate import product_flops
from builder.teacher import model
from builder.teacher.model import Teacher


def measure(dtype: str, *, device: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Rates in tokens/s and ratios of forward pass, build and naive loop on the same sequences."""
    teacher = sample.load(dtype, device)
    sequences = sample.sequences(teacher, tokens)
    total = sum(len(sequence.token_ids) for sequence in sequences)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        found = sample.rounds(
            {
                "forward": lambda: total / forward(teacher, sequences),
                "build": lambda: total / build_seconds(dtype, device, tokens, base),
                "naive": lambda: total / naive(teacher, sequences, base),
            },
            rounds,
        )
        shares = stages(dtype, device, tokens, base)
    rate = statistics.median(found["forward"])
    flops = rate * flop_per_token(EMBEDDED, sample.MAX_LENGTH)
    return {
        "tokens": total,
        "forward_tokens_per_second": round(statistics.median(found["forward"])),
        "build_tokens_per_second": round(statistics.median(found["build"])),
        "forward_over_product": round(flops / product_flops(dtype, device), 3),
        "naive_tokens_per_second": round(statistics.median(found["naive"])),
        "build_over_forward": round(sample.ratio(found["build"], found["forward"]), 3),
        "build_over_forward_rounds": [
            round(b / f, 3) for b, f in zip(found["build"], found["forward"], strict=True)
        ],
        "build_over_naive": round(sample.ratio(found["build"], found["naive"]), 3),
        "stages": shares,
    }


def forward(teacher: Teacher, sequences: list[Sequence]) -> float:
    """Seconds of body and head on the real positions of the batches that the build makes; nothing is kept."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    started = time.perf_counter()
    for batch in length_sorted_batches(lengths, sample.BATCH_TOKENS):
        for _ in teacher.logits([sequences[i].token_ids for i in batch]):
            pass
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def build_seconds(dtype: str, device: str, tokens: int, base: Path) -> float:
    """Seconds from the first document to the shard's record: read, tokenized, captured, written, fsynced, hashed."""
    output = Path(tempfile.mkdtemp(dir=base)) / "out"
    build(sample.recipe(dtype, tokens), base, output, device=device)
    return float(read_manifest(output)["totals"]["seconds"])


def naive(teacher: Teacher, sequences: list[Sequence], base: Path) -> float:
    """Seconds of the loop that one would write: padded batches, log_softmax in float32, topk, lists, Dataset, Parquet."""
    started = time.perf_counter()
    rows = []
    with torch.inference_mode():
        for first in range(0, len(sequences), sample.BATCH_TOKENS // sample.MAX_LENGTH):
            batch = sequences[first : first + sample.BATCH_TOKENS // sample.MAX_LENGTH]
            longest = max(len(sequence.token_ids) for sequence in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, sequence in enumerate(batch):
                ids[i, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
                mask[i, : len(sequence.token_ids)] = 1
            logits = teacher.model(
                input_ids=ids.to(teacher.device), attention_mask=mask.to(teacher.device)
            ).logits
            top = logits.float().log_softmax(-1).topk(sample.TOP_K)
            for i, sequence in enumerate(batch):
                length = len(sequence.token_ids)
                rows.append(
                    {
                        "id": sequence.document_id,
                        "text": sequence.text,
                        "input_ids": sequence.token_ids,
                        "topk_indices": top.indices[i, :length].tolist(),
                        "topk_logprobs": top.values[i, :length].tolist(),
                    }
                )
    Dataset.from_list(rows).to_parquet(str(base / "naive.parquet"))
    return time.perf_counter() - started


def stages(dtype: str, device: str, tokens: int, base: Path) -> dict[str, float]:
    """Share of a build's time by stage. On a GPU, whose work is not waited for, only the sum is meaningful. What runs on other threads takes
    none of the time of the one that launches."""
    clock: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, label in (
            (Corpus, "__iter__", "corpus (own thread)"),
            (Encoder, "whole", "tokenize (own thread)"),
            (Teacher, "hidden", "body"),
            (model, "_apply", "head"),
            (distribution, "_capture_top", "statistics"),
            (windows, "_in_order", "order (writer's thread)"),
            (ShardWriter, "_write_block", "write (own thread)"),
        ):
            stack.enter_context(sample.timed(owner, name, clock, label))
        total = build_seconds(dtype, device, tokens, base)
    clock["other"] = total - sum(v for label, v in clock.items() if "thread" not in label)
    return {label: round(value / total, 4) for label, value in clock.items()}
