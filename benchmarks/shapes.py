"""Teachers of real shapes with random weights, and capture by the size of the vocabulary: what a GPU shows, with nothing to download.

How:  ids are random, sequences have 64 to 1,024 tokens. `loop` is the pipeline with all that a build does on the device and for the way
      back, without corpus, tokenizer and writer. All calls of a shape take turns, and what is told is the median of the rounds.

      Of random weights, distributions are nearly flat. What that changes: a top K has more ties, and a tail more mass.

      Capture is told in µs a row, and as the rate at which the logits would be read if they were read once, beside that of a copy.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import sample
from builder.capture.distribution import capture
from builder.capture.draws import uniforms
from builder.capture.pipeline import Pipeline
from builder.corpus.sequences import NO_TOKEN, Sequence, length_sorted_batches
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout

TOP_K, DRAWS = 50, 4
LENGTHS = (64, 1024)
BATCH_TOKENS = 16_384

LLAMA = {"tie_word_embeddings": True, "max_position_embeddings": 2048, "bos_token_id": None}
SHAPES: dict[str, dict[str, Any]] = {
    "135M, V 49,152": {
        **{"model_type": "llama", **LLAMA, "vocab_size": 49_152, "hidden_size": 576},
        **{"intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tokens": 262_144},
    },
    "0.6B, V 151,936": {
        **{"model_type": "llama", **LLAMA, "vocab_size": 151_936, "hidden_size": 1024},
        **{"intermediate_size": 3072, "num_hidden_layers": 28},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        "tokens": 98_304,
    },
    "1.2B, V 128,256": {
        **{"model_type": "llama", **LLAMA, "vocab_size": 128_256, "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tokens": 98_304},
    },
    "8B, V 151,936": {
        **{"model_type": "llama", **LLAMA, "vocab_size": 151_936, "hidden_size": 4096},
        **{"intermediate_size": 12_288, "num_hidden_layers": 36, "tie_word_embeddings": False},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tokens": 32_768},
    },
    "7B of 64 experts, V 50,304": {
        **{"model_type": "olmoe", "vocab_size": 50_304, "hidden_size": 2048},
        **{"intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 8},
        **{"max_position_embeddings": 2048, "tokens": 65_536},
    },
}
"""Configurations, and how many tokens a call takes."""
VOCABULARIES = (49_152, 128_256, 152_064, 262_144)
LOGITS_BYTES = 256 * 2**20
"""In one piece, as the teacher makes them on a GPU."""

TINY: dict[str, dict[str, Any]] = {
    "tiny, V 3,001": {
        **{"model_type": "llama", **LLAMA, "vocab_size": 3_001, "hidden_size": 32},
        **{"intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tokens": 300},
    },
    "tiny, 4 experts, V 1,000": {
        **{"model_type": "olmoe", "vocab_size": 1_000, "hidden_size": 32},
        **{"intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 2048, "tokens": 300},
    },
}
"""Elsewhere than on a GPU, to see that all of it runs."""
TINY_VOCABULARIES, TINY_LOGITS_BYTES, TINY_LENGTHS = (1_000, 3_001), 2**18, (8, 40)


def measure(device: str, rounds: int) -> dict[str, Any]:
    """Rates of all shapes, and of capture by vocabulary."""
    is_gpu = device.startswith("cuda")
    shapes = SHAPES if is_gpu else TINY
    return {
        "copy_gigabytes_per_second": round(copy_rate(device, LOGITS_BYTES if is_gpu else 2**22)),
        "capture": {
            f"V {size:,}": capture_of(size, device, LOGITS_BYTES if is_gpu else TINY_LOGITS_BYTES)
            for size in (VOCABULARIES if is_gpu else TINY_VOCABULARIES)
        },
        "tokens_per_second": {
            name: of_shape(dict(shape), device, rounds, LENGTHS if is_gpu else TINY_LENGTHS)
            for name, shape in shapes.items()
        },
    }


def copy_rate(device: str, size: int) -> float:
    """GB a second that a copy reads and writes together."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device) / 1e9


def capture_of(vocab_size: int, device: str, logits_bytes: int) -> dict[str, dict[str, float]]:
    """What each way to treat random logits takes a row: in µs, and as the rate of reading them once."""
    generator = torch.Generator(device).manual_seed(0)
    rows = max(1, logits_bytes // (2 * vocab_size))
    logits_NV = torch.empty(rows, vocab_size, device=device, dtype=torch.bfloat16)
    logits_NV.normal_(0, 3, generator=generator)
    logits32_NV = logits_NV.float()[: max(1, rows // 2)]
    targets_N = torch.randint(vocab_size, (rows,), device=device, generator=generator)
    uniforms_NM = uniforms(0, "", 0, num_positions=rows, count=24).to(device)
    top_k = min(TOP_K, vocab_size)

    def ours(pieces_NV: Tensor, draws: int) -> Callable[[], object]:
        count = len(pieces_NV)
        chosen_NM = uniforms_NM[:count, :draws].contiguous() if draws else None
        return lambda: capture([pieces_NV], targets_N[:count], top_k=top_k, uniforms_NM=chosen_NM)

    calls: dict[str, tuple[Tensor, Callable[[], object]]] = {
        "one read (amax)": (logits_NV, lambda: logits_NV.amax(-1)),
        "ours": (logits_NV, ours(logits_NV, 0)),
        f"ours, {DRAWS} draws": (logits_NV, ours(logits_NV, DRAWS)),
        "ours, 24 draws": (logits_NV, ours(logits_NV, 24)),
        "ours, float32": (logits32_NV, ours(logits32_NV, 0)),
        f"ours, float32, {DRAWS} draws": (logits32_NV, ours(logits32_NV, DRAWS)),
        "log_softmax and topk": (
            logits32_NV,
            lambda: logits32_NV.log_softmax(-1).topk(top_k),
        ),
    }
    found = {}
    for name, (given_NV, call) in calls.items():
        taken = seconds(call, device)
        size = given_NV.numel() * given_NV.itemsize
        found[name] = {
            "microseconds_a_row": float(f"{1e6 * taken / len(given_NV):.4g}"),
            "gigabytes_per_second": float(f"{size / taken / 1e9:.4g}"),
        }
    return found


def of_shape(
    shape: dict[str, Any], device: str, rounds: int, lengths: tuple[int, int]
) -> dict[str, float]:
    """Rates of one teacher in tokens/s: forward pass, the pipeline without and with draws, the loop that one would write."""
    tokens: int = shape.pop("tokens")
    plain, teacher = make_teachers(shape, device)
    vocab_size: int = shape["vocab_size"]
    sequences = random_sequences(tokens, vocab_size, lengths)
    total = sum(len(sequence.token_ids) for sequence in sequences)

    def rate(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: total / once(call, device)

    found = sample.rounds(
        {
            "forward": rate(lambda: forward(plain, sequences)),
            "forward, float32 head": rate(lambda: forward(teacher, sequences)),
            "loop": rate(lambda: loop(teacher, sequences, 0)),
            f"loop, {DRAWS} draws": rate(lambda: loop(teacher, sequences, DRAWS)),
            "naive loop": rate(lambda: naive(plain, sequences)),
        },
        rounds,
    )
    rates: dict[str, float] = {name: round(statistics.median(of)) for name, of in found.items()}
    rates["loop with draws ÷ forward"] = round(
        sample.ratio(found[f"loop, {DRAWS} draws"], found["forward"]), 3
    )
    if device.startswith("cuda"):
        del plain, teacher
        gc.collect()
        torch.cuda.empty_cache()
    return rates


def make_teachers(shape: dict[str, Any], device: str) -> tuple[Teacher, Teacher]:
    """A random model in bfloat16, as it rounds its logits and with them in float32."""
    options = {**shape, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    plain, exact = (
        Teacher(model, tokenizer, device=torch.device(device), head_dtype=head_dtype)
        for head_dtype in ("teacher", "float32")
    )
    return plain, exact


def random_sequences(tokens: int, vocab_size: int, lengths: tuple[int, int]) -> list[Sequence]:
    """Sequences of random ids, `tokens` of them together, or a few more."""
    generator = torch.Generator().manual_seed(0)
    made: list[Sequence] = []
    while tokens > 0:
        length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        made.append(
            Sequence(
                document_id=f"{len(made)}",
                chunk_index=0,
                text="",
                token_ids=ids,
                next_token=NO_TOKEN,
            )
        )
        tokens -= length
    return made


def forward(teacher: Teacher, sequences: list[Sequence]) -> None:
    """Body and head on the real positions; nothing is kept."""
    for batch in batches(teacher, sequences):
        for _ in teacher.rounded([sequences[i].token_ids for i in batch]):
            pass


def batches(teacher: Teacher, sequences: list[Sequence]) -> Iterator[list[int]]:
    """As the pipeline makes them."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    yield from length_sorted_batches(lengths, BATCH_TOKENS, teacher.reach)


def loop(teacher: Teacher, sequences: list[Sequence], draws: int) -> None:
    """The pipeline: all statistics, and on the host."""
    layout = Layout(top_k=TOP_K, tail_samples=draws)
    pipeline = Pipeline(teacher, layout=layout, batch_tokens=BATCH_TOKENS)
    for _ in pipeline.blocks(iter(sequences)):
        pass


@torch.inference_mode()
def naive(teacher: Teacher, sequences: list[Sequence]) -> None:
    """The loop that one would write: padded batches, log_softmax in float32, topk, lists."""
    for batch in batches(teacher, sequences):
        longest = max(len(sequences[i].token_ids) for i in batch)
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, i in enumerate(batch):
            ids = sequences[i].token_ids
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        logits_BTV = teacher.model(
            input_ids=ids_BT.to(teacher.device),
            attention_mask=mask_BT.to(teacher.device),
            use_cache=False,
        ).logits
        top = logits_BTV.float().log_softmax(-1).topk(TOP_K)
        for row, i in enumerate(batch):
            length = len(sequences[i].token_ids)
            top.indices[row, :length].tolist()
            top.values[row, :length].tolist()


def once(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, with all that it has launched."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def seconds(call: Callable[[], object], device: str) -> float:
    """The same, the median of five after two that do not count."""
    return statistics.median([once(call, device) for _ in range(7)][2:])


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
