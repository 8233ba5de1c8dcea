"""Completions written, captured and stored, against `model.generate` alone on the same prompts and in the same batches."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import sample
from builder.build.build import build
from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import length_sorted_batches
from builder.dataset.manifest import read_manifest
from builder.recipe.recipe import Recipe
from builder.sources import demo
from builder.teacher.model import Teacher

NEW_TOKENS, PROMPT_CHARACTERS = 96, 160


def measure(dtype: str, *, device: str, prompts: int, rounds: int) -> dict[str, Any]:
    """Rates in written tokens/s, drawn and greedy, and ratios to `model.generate`."""
    teacher = sample.load(dtype, device)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        texts = _write_prompts(base, prompts)
        encoder = Encoder(teacher.tokenizer, max_length=sample.MAX_LENGTH, long_documents="chunk")
        found = sample.rounds(
            {
                "generate, drawn": lambda: generate(teacher, encoder, texts, is_greedy=False),
                "build, drawn": lambda: build_rate(dtype, device, base, temperature=1.0),
                "generate, greedy": lambda: generate(teacher, encoder, texts, is_greedy=True),
                "build, greedy": lambda: build_rate(dtype, device, base, temperature=0.0),
            },
            rounds,
        )
    return {
        "tokens_per_second": {name: round(statistics.median(v), 1) for name, v in found.items()},
        **{
            f"build_over_generate_{how}": round(
                sample.ratio(found[f"build, {how}"], found[f"generate, {how}"]), 3
            )
            for how in ("drawn", "greedy")
        },
    }


def generate(teacher: Teacher, encoder: Encoder, texts: list[str], *, is_greedy: bool) -> float:
    """Tokens/s that `model.generate` writes, end-of-sequence tokens included; nothing is kept."""
    eos = teacher.tokenizer.eos_token_id
    started, written = time.perf_counter(), 0
    documents = [Document(id="", text=text) for text in texts]
    prompts = [p.token_ids for p in map(encoder.encode_prompt, documents) if p]
    room = [len(ids) + NEW_TOKENS for ids in prompts]
    for batch in length_sorted_batches(room, sample.BATCH_TOKENS):
        length = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), length), eos)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]) :] = 1
        drawn = {} if is_greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        found = teacher.model.generate(
            ids.to(teacher.device),
            attention_mask=mask.to(teacher.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=not is_greedy,
            pad_token_id=eos,
            **drawn,
        )
        for new in found[:, length:].tolist():
            written += new.index(eos) + 1 if eos in new else len(new)
    return written / (time.perf_counter() - started)


def build_rate(dtype: str, device: str, base: Path, *, temperature: float) -> float:
    """Tokens/s of the completions of a build: written, captured, stored, fsynced, hashed."""
    output = Path(tempfile.mkdtemp(dir=base)) / "out"
    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "corpus": {"files": ("prompts.jsonl",)},
            "teacher": {"embedded": "smollm2-135m-instruct", "dtype": dtype},
            "sequences": {"max_length": sample.MAX_LENGTH, "batch_tokens": sample.BATCH_TOKENS},
            "generation": {
                "temperature": temperature,
                "max_new_tokens": NEW_TOKENS,
                "batch_tokens": sample.BATCH_TOKENS,
            },
            "output": {"top_k": sample.TOP_K, "tail_samples": 0},
        }
    )
    build(recipe, base, output, device=device)
    totals = read_manifest(output)["totals"]
    return float(totals["completions"]["tokens"] / totals["seconds"])


def _write_prompts(base: Path, count: int) -> list[str]:
    """The beginnings of some paragraphs of the embedded corpus."""
    path, _ = demo.embedded_corpus()
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        paragraphs = json.loads(line)["text"].split("\n\n")
        texts += [p[:PROMPT_CHARACTERS] for p in paragraphs if len(p) > PROMPT_CHARACTERS]
    texts = texts[:: max(1, len(texts) // count)][:count]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (base / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return texts
