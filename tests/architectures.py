"""Every causal type that transformers maps, tiny and random: is a row of a mixed batch what the model says of it alone?

In:   `python -m tests.architectures [--csv FILE] [--only NAME …]`
Out:  one line a type: right, refused (with the line that a user would see), wrong, crash, or cannot be made tiny (with the reason);
      the same as CSV. It exits with 1 if any is wrong or crashes.

How:  the default configuration of a type is made tiny by the names of its fields (`RULES`, and `EXCEPTIONS` by type), and random weights
      are saved with `save_pretrained`, together with a small tokenizer. `load_teacher` loads that with a recipe's defaults, and the
      pipeline of a build captures documents of very different lengths in as few batches as it may. The truth is the model's own class,
      on one document at a time, by no code of ours, in float32. Each type has a process of its own, so one that dies is only one.

Cost: about two seconds a type on one core: eight minutes for all.
"""

import argparse
import copy
import csv
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 288
"""Bytes, and a few ids that the tokenizer does not know."""
LENGTHS = (40, 13, 5, 1, 33, 21)
"""Of the documents: beyond every window and chunk of the tiny models, and down to a single token."""
BORDER = 30
"""Where models change with the length of their sequences: between the longest documents and the others."""
TIMEOUT_SECONDS = 120

RULES: dict[str, int] = {
    r"(text_|src_|n_)?vocab_size(_per_layer_input)?|n_vocab|vocab_size_per_layer_input": VOCAB_SIZE,
    r"hidden_size|d_model|n_embd|dim|embed_dim|dim_model|word_embed_proj_dim|embedding_size|emb_dim|lru_width|hidden_size_global": 32,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|num_blocks": 2,
    r"num_attention_heads|n_heads?|num_heads|(num_)?(de|en)coder_attention_heads": 4,
    r"(head|v_head|global_head|qk_nope_head|qk_rope_head|kv_channels|dim_head|rotary)_?(dim)?|kv_channels|d_kv": 8,
    r"(shared_expert_)?intermediate_size(_mlp)?|(de|en)coder_ffn_dim|ffn_dim|ffn_hidden_size|n_inner|dim_ff|d_ff": 64,
    r"(moe|expert)_(ffn_)?(intermediate_size|hidden_size)|(moe_)?shared_(expert_)?intermediate_size": 32,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts": 2,
    r"n_group|topk_group|num_expert_group|first_k_dense_replace": 1,
    r"(q|kv|o)_lora_rank": 16,
    r"(sliding_|attention_|local_)?window(_size)?|sliding_window_size|attention_chunk_size|chunk_size|mamba_chunk_size": 8,
    r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|context_length": 128,
    r"linear_num_(key|value)_heads": 2,
    r"linear_(key|value)_head_dim|state_size|mamba_d_state": 8,
    r"index_head_dim": 8,
    r"index_n_heads": 2,
    r"index_topk": 24,  # the shorter documents, and what is run at load, see all of themselves
}
"""Names of fields, and the value that a tiny model has there. What is None or a list stays as it is."""

QWEN4_EXP = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "heads_per_ngram": 2},
    **{"ngram_vocab_size_base": 64, "split_ngram_parts": 2, "eos_token_id": 0},
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(
            ["sliding_attention", "full_attention"], {"rope_type": "default", "rope_theta": 1e4}
        ),
        "logit_scale": 1.0,
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB_SIZE},
    "inkling2_text": {"unpadded_vocab_size": VOCAB_SIZE},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What else a type needs to be tiny, or to be more than its default configuration."""

LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": BORDER},
    **{"short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0]},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}+longrope": (
            name,
            {"original_max_position_embeddings": BORDER, "rope_parameters": LONGROPE},
        )
        for name in ("phi3", "minicpm3", "llama", "qwen3_moe", "olmo2")
    },
    "phimoe+longrope": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5}},
    ),
    "gemma3_text+longrope": (
        "gemma3_text",
        {"rope_parameters": {**BY_LAYER, "full_attention": LONGROPE}},
    ),
    **{
        f"{name}+dynamic": (name, {"max_position_embeddings": BORDER, "rope_parameters": DYNAMIC})
        for name in ("llama", "qwen2", "mistral", "falcon")
    },
    "gemma3_text+dynamic": (
        "gemma3_text",
        {
            "max_position_embeddings": BORDER,
            "rope_parameters": {**BY_LAYER, "full_attention": DYNAMIC},
        },
    ),
}
"""Types in a configuration whose values change with the length of a batch: name → type, what else it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How it went with one type."""

    name: str
    verdict: str
    """`right`, `refused`, `wrong`, `crash` or `not tiny`."""
    architecture: str = ""
    attention: str = ""
    head: str = ""
    """`alone`, or `whole` where every sequence runs alone, through the whole model."""
    batches: str = ""
    """How many documents shared each batch."""
    error: str = ""
    """Largest |Δ log-probability| beyond float16 rounding, in nats."""
    line: str = ""
    """Why, where it is not right."""
    seconds: str = ""


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and <eos>."""
    vocab = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration of a type, made tiny."""
    config_class = CONFIG_MAPPING[model_type]
    values = _shrunk(config_class())
    for name, value in {**EXCEPTIONS.get(model_type, {}), **changes}.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            value = {**values[name], **value}
        values[name] = value
    return config_class(**values)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that are to be other than by default."""
    values: dict[str, Any] = {}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = {"model_type": part.model_type, **_shrunk(part)}
    own = config.to_dict()
    for name, value in own.items():
        if type(value) is not int or name in values:
            continue
        if name.endswith("token_id") or name.endswith("token_index"):
            if value >= VOCAB_SIZE:
                values[name] = VOCAB_SIZE - 1
            continue
        for pattern, tiny in RULES.items():
            if re.fullmatch(pattern, name):
                values[config.attribute_map.get(name, name)] = tiny
                break
    if own.get("is_decoder") is False:
        values["is_decoder"] = True
    heads, groups = (own.get(f"num_{part}_heads") for part in ("attention", "key_value"))
    if type(groups) is int:
        values["num_key_value_heads"] = 4 if groups == heads else 2
    if kinds := own.get("layer_types"):
        different = list(dict.fromkeys(kinds))
        values["layer_types"] = different if len(different) > 1 else different * 2
        values["num_hidden_layers"] = len(values["layer_types"])
    return values


def tiny_model(config: PreTrainedConfig) -> Any:
    """A random model whose distributions are peaked, so that scales and soft-caps matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            std = float(parameter.float().std())
            if parameter.ndim > 1 and 0 < std < 0.1:
                parameter.data.normal_(0, 0.3)
    return model.eval()


def documents() -> list[list[int]]:
    """Token ids of some documents."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in LENGTHS]


def check(name: str, directory: Path) -> Result:
    """Build, save and load a tiny model of a type (or variant), and compare."""
    from builder.teacher.loading import load_teacher

    model_type, changes = VARIANTS.get(name, (name, {}))
    try:
        config = tiny_config(model_type, **changes)
        model = tiny_model(config)
        with torch.inference_mode():
            expected = [_alone(model, ids) for ids in documents()]
        model.save_pretrained(directory)
        config.save_pretrained(directory)  # of the whole, where the model is a part of it
        small_tokenizer().save_pretrained(directory)
    except Exception as error:
        return Result(name=name, verdict="not tiny", line=_line(error))
    found = {"name": name, "architecture": type(model).__name__}
    try:
        teacher = load_teacher(str(directory))
        found["attention"] = teacher.provenance()["attention"]
        found["head"] = "alone" if teacher.head_only else "whole"
        sizes, logprobs_NV = _captured(teacher)
        found["batches"] = " ".join(map(str, sizes))
    except ValueError as error:
        return Result(**found, verdict="refused", line=_line(error))
    except Exception as error:
        return Result(**found, verdict="crash", line=f"{type(error).__name__}: {_line(error)}")
    expected_NV = torch.cat(expected).double().log_softmax(-1).clamp(min=-65504)
    rounding = 2.0 ** (torch.frexp(expected_NV).exponent.double() - 12)
    error = float(((logprobs_NV.double() - expected_NV).abs() - rounding).max())
    spread = float(torch.cat(expected).std())
    verdict = "right" if error <= 2e-3 and spread > 0.3 else "wrong"
    return Result(
        **found, verdict=verdict, error=f"{max(error, 0):.2g}", line=f"spread {spread:.2g}"
    )


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] of one document, of a model that has seen no other."""
    return copy.deepcopy(model)(torch.tensor([ids]), use_cache=False).logits[0]


def _captured(teacher: Any) -> tuple[list[int], torch.Tensor]:
    """What a build keeps of the documents: how many shared each batch, and all log-probabilities."""
    from builder.capture.pipeline import Pipeline
    from builder.corpus.sequences import NO_TOKEN, Sequence
    from logit_dataset.schema import Layout

    layout = Layout(top_k="all", vocab_size=teacher.vocab_size)
    pipeline = Pipeline(teacher, layout=layout, batch_tokens=4096)
    sequences = [
        Sequence(document_id=str(i), chunk_index=0, text="", token_ids=ids, next_token=NO_TOKEN)
        for i, ids in enumerate(documents())
    ]
    sizes: list[int] = []
    original = teacher.logits

    def logits(batch: Any) -> Any:
        sizes.append(len(batch))
        return original(batch)

    teacher.logits = logits
    blocks = list(pipeline.blocks(iter(sequences)))
    return sizes, torch.cat([block.distribution["logprobs"] for block in blocks])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def in_a_process(name: str) -> Result:
    """`check` in a fork of this process."""
    started = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(TIMEOUT_SECONDS)
        with tempfile.TemporaryDirectory() as directory, open(write, "w") as pipe:
            result = check(name, Path(directory) / "teacher")
            csv.writer(pipe).writerow(asdict(result).values())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        rows = list(csv.reader(pipe))
    _, status = os.waitpid(child, 0)
    if not rows:
        return Result(name=name, verdict="crash", line=f"its process ended with status {status}")
    values = dict(zip([f.name for f in fields(Result)], rows[0], strict=True))
    return Result(**{**values, "seconds": f"{time.monotonic() - started:.1f}"})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write all results there")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these types, rather than all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    import builder.capture.pipeline
    import builder.teacher.loading  # noqa: F401

    names = arguments.only or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]
    results = []
    for name in names:
        results.append(result := in_a_process(name))
        print(
            f"{result.name:28}{result.verdict:9}{result.attention:8}{result.head:6}{result.batches:14}{result.error:9}{result.line}",
            flush=True,
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Result)])
            writer.writeheader()
            writer.writerows(asdict(result) for result in results)
    counts = Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(bool(counts["wrong"] + counts["crash"]))


if __name__ == "__main__":
    sys.exit(main())
