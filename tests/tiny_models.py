"""A type that transformers knows → its default configuration, made tiny, and a random model of it.

How:  fields are made small by their names (`RULES`), and where that is not enough, by type (`EXCEPTIONS`). Windows, chunks, blocks and
      numbers of positions that are attended to become smaller than a document of 40 tokens, so that they matter.
"""

import re
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 288
"""Bytes, and a few ids that the tokenizer does not know."""
BORDER = 30
"""A length at which variants change."""

RULES: dict[str, int] = {
    r"vocab_size(_per_layer_input)?": VOCAB_SIZE,
    r"hidden_size|d_model|n_embd|dim|embed_dim|dim_model|word_embed_proj_dim|embedding_size|emb_dim|lru_width|hidden_size_global": 32,
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(de|en)coder_layers|num_blocks": 2,
    r"num_attention_heads|n_heads?|num_heads|(num_)?(de|en)coder_attention_heads": 4,
    r"((v_|global_|qk_nope_|qk_rope_)?head|rotary)_dim|dim_head|kv_channels|d_kv": 8,
    r"(shared_expert_)?intermediate_size(_mlp)?|(de|en)coder_ffn_dim|ffn_dim|ffn_hidden_size|n_inner|dim_ff|d_ff": 64,
    r"(moe|expert)_(ffn_)?(intermediate_size|hidden_size)|(moe_)?shared_(expert_)?intermediate_size": 32,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts": 2,
    r"n_group|topk_group|num_expert_group|first_k_dense_replace": 1,
    r"(q|kv|o)_lora_rank": 16,
    r"(sliding_|attention_|local_)?window(_size)?|sliding_window_size|local_attention(_window_len)?": 8,
    r"(attention_|mamba_)?chunk_size|index_block_size": 8,
    r"block_size": 4,
    r"num_random_blocks|index_topk_blocks": 2,
    r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|context_length": 128,
    r"linear_num_(key|value)_heads": 2,
    r"linear_(key|value)_head_dim|state_size|mamba_d_state": 8,
    r"index_head_dim": 8,
    r"index_n_heads": 2,
    r"index_topk|keep_window_size": 24,  # what is run at load attends to all of itself
}
"""Names of fields, and the value that a tiny model has there. What is None or a list stays as it is."""

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
QWEN4_EXP = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "heads_per_ngram": 2},
    **{"ngram_vocab_size_base": 64, "split_ngram_parts": 2, "eos_token_id": 0},
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
"""Positions in three directions, for heads of eight."""
OF_MROPE = {"text_config": {"rope_parameters": MROPE}}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glmga", "glm_ocr"], OF_MROPE),
    **dict.fromkeys(["qwen2_5_omni_thinker", "paddleocr_vl"], OF_MROPE),
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": PLAIN, "full_attention": PLAIN},
        "logit_scale": 1.0,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": 64}},
    "glm4v_moe": {"text_config": {"head_dim": 16, "rope_parameters": MROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 12,
    },
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
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32]}},
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
    "mistral4": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "step3p7": {"text_config": {"sliding_window": 8}},
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

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "big_bird+original_full": ("big_bird", {"attention_type": "original_full"}),
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
        {"rope_parameters": {"sliding_attention": PLAIN, "full_attention": LONGROPE}},
    ),
    **{
        f"{name}+dynamic": (name, {"max_position_embeddings": BORDER, "rope_parameters": DYNAMIC})
        for name in ("llama", "qwen2", "mistral", "falcon")
    },
    "gemma3_text+dynamic": (
        "gemma3_text",
        {
            "max_position_embeddings": BORDER,
            "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        },
    ),
}
"""Types in other configurations, most of which change values with the length of a batch: name → type, what else it needs."""


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


def tiny_model(config: PreTrainedConfig, family: Any = AutoModelForCausalLM) -> Any:
    """A random model of the class that a family of classes has for it, whose distributions are peaked, so that scales and soft-caps matter."""
    torch.manual_seed(0)
    model = family.from_config(config)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            std = float(parameter.detach().float().std())
            if parameter.ndim > 1 and 0 < std < 0.1:
                parameter.data.normal_(0, 0.3)
    return model.eval()
