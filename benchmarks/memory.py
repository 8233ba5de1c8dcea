"""Peak memory of a build above the teacher's weights. Every case runs in a process of its own, whose peak the kernel keeps."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = {
    # name: (vocabulary, longest sequence, tokens)
    "V 49k, 512 long, 10k tokens": (49_152, 512, 10_000),
    "V 49k, 512 long, 100k tokens": (49_152, 512, 100_000),
    "V 152k, 512 long, 30k tokens": (151_936, 512, 30_000),
    "V 152k, 8192 long, 30k tokens": (151_936, 8_192, 30_000),
}


def measure() -> dict[str, float]:
    """MB above the loaded teacher for each case. The teacher is small and random: what is counted does not depend on it."""
    found = {}
    for name, case in CASES.items():
        command = [sys.executable, "-m", "benchmarks.memory", *map(str, case)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(ended.stdout.splitlines()[-1])["megabytes"]
    return found


def _run(vocab_size: int, max_length: int, tokens: int) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from benchmarks.sample import BATCH_TOKENS
    from builder.build.build import build
    from builder.recipe.recipe import Recipe
    from builder.sources import demo
    from builder.teacher import ranks as module

    prepared, _ = demo.embedded_teacher()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        tokenizer = AutoTokenizer.from_pretrained(prepared)
        tokenizer.save_pretrained(base / "teacher")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=8_192,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base / "teacher")
        text = "\n\n".join(
            json.loads(line)["text"]
            for line in demo.embedded_corpus()[0].read_text(encoding="utf-8").splitlines()
        )
        (base / "corpus.jsonl").write_text(
            "".join(json.dumps({"text": text[: len(text) // 4]}) + "\n" for _ in range(16)),
            encoding="utf-8",
        )
        recipe = Recipe.model_validate(
            {
                "name": "memory",
                "corpus": {"files": ("corpus.jsonl",), "max_tokens": tokens},
                "teacher": {"path": "teacher", "dtype": "bfloat16"},
                "sequences": {
                    "max_length": max_length,
                    "batch_tokens": max(BATCH_TOKENS, max_length),
                },
                "output": {"shard_tokens": 50_000},
            }
        )
        loaded: dict[str, int] = {}

        load = module.load_teacher

        def load_and_look(*args: Any, **kwargs: Any) -> Any:
            teacher = load(*args, **kwargs)
            loaded["bytes"] = kernel_says("VmRSS")
            return teacher

        module.load_teacher = load_and_look
        build(recipe, base, base / "out")
        peak = kernel_says("VmHWM")
        print(json.dumps({"megabytes": round((peak - loaded["bytes"]) / 1e6)}))


def kernel_says(name: str) -> int:
    """Bytes that this process has (VmRSS) or had at most (VmHWM). getrusage would count those of its parent before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    _run(*map(int, sys.argv[1:]))
