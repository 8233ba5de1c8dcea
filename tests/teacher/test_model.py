"""`Teacher` on tiny random models of many families against the plain whole model, and what it refuses."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from builder.capture.distribution import Distribution, capture
from builder.teacher import model as teacher_module
from builder.teacher.loading import load_teacher, load_tokenizer
from builder.teacher.model import Teacher
from tests.conftest import TINY_VOCAB_SIZE

CPU = torch.device("cpu")
LENGTHS = (33, 5, 17, 1)
"""Longer than the sliding windows, shorter than the probes of the teacher, and a single token."""
TOP_K = 20

SMALL = {
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma2": {**GROUPED, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {**GROUPED, "sliding_window": 8},
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "cohere2": {**GROUPED, "logit_scale": 0.25, "sliding_window": 8},
    "gpt2": {
        **{k: SMALL[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")},
        **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    },
    "gpt_neox": SMALL,
    "mistral": {**GROUPED, "sliding_window": 8},
    "mixtral": EXPERTS,
    "qwen3_moe": {
        **{**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []},
    },
    "gpt_oss": {**EXPERTS, "sliding_window": 8},
    "mamba": {
        **{k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        **{"state_size": 8, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
    },
    "phi": SMALL,
    "phi3": {**SMALL, "sliding_window": 8},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": SMALL,
    "bloom": {**SMALL, "n_layer": 2, "n_head": 4},
    "olmo2": GROUPED,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for a second thread, for long where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(family: str, **changes: Any) -> Any:
    """A random model whose distributions are peaked, so that scales and soft-caps matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    return randomize(AutoModelForCausalLM.from_config(config))


def randomize(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def make_teacher(tiny_tokenizer: Any) -> Callable[[Any], Teacher]:
    return lambda model: Teacher(model, tiny_tokenizer, device=CPU)


def random_sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Sequences that hold id 0, which is also the padding."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        torch.randint(TINY_VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in lengths
    ]
    sequences[0][1] = sequences[0][-1] = 0
    return sequences


def whole_model_logits(model: Any, ids: list[int]) -> Tensor:
    """[T, V] of one sequence alone, as anyone would compute them."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double()


def capture_all(teacher: Teacher, sequences: list[list[int]], targets: list[int]) -> Distribution:
    return capture(teacher.logits(sequences), torch.tensor(targets), top_k=TOP_K)


def float16_half_spacing(values: Tensor) -> Tensor:
    return 2.0 ** (torch.frexp(values.abs().clamp(min=2.0**-14)).exponent.double() - 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_column_equals_the_whole_model_alone(family, make_teacher):
    model = make_model(family)
    teacher = make_teacher(model)
    assert teacher.head_only
    assert teacher.vocab_size == TINY_VOCAB_SIZE

    sequences = random_sequences()
    targets = [target for ids in sequences for target in (*ids[1:], 7)]
    found = capture_all(teacher, sequences, targets)

    logits_NV = torch.cat([whole_model_logits(model, ids) for ids in sequences])
    logprobs_NV = logits_NV.log_softmax(-1)
    top = logprobs_NV.topk(TOP_K)
    assert logits_NV.std() > 0.3, "too flat to notice a missing scale"
    found_ids = found["topk_indices"].long()
    expected = {
        "topk_logprobs": top.values,
        "tail_logprob": logprobs_NV.scatter(1, found_ids, -torch.inf).logsumexp(-1),
        "target_logprob": logprobs_NV.gather(1, torch.tensor(targets)[:, None])[:, 0],
        "entropy": -(logprobs_NV.exp() * logprobs_NV).sum(-1),
    }
    for name, wanted in expected.items():
        error = (found[name].double() - wanted).abs() - float16_half_spacing(wanted)
        assert error.max() <= 2e-3, f"{name} is off by {error.max():.3g}"
    torch.testing.assert_close(
        found["logsumexp"].double(), logits_NV.logsumexp(-1), atol=2e-3, rtol=0
    )
    # The ids may only differ where two log-probabilities are nearly the same.
    assert (logprobs_NV.gather(1, found_ids) - top.values).abs().max() < 1e-3
    assert (found_ids == top.indices).double().mean() > 0.99


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "mamba", "gpt2", "opt", "bloom"])
def test_values_do_not_depend_on_the_rest_of_the_batch(family, make_teacher):
    teacher = make_teacher(make_model(family))
    mine = random_sequences((9,), seed=1)[0]
    alone = torch.cat(list(teacher.logits([mine])))
    for others in (random_sequences((40, 3), seed=2), random_sequences((9,), seed=3)):
        before = torch.cat(list(teacher.logits([*others, mine])))
        after = torch.cat(list(teacher.logits([mine, *others])))
        assert (before[-9:] - alone).abs().max() < 1e-4 * alone.std()
        assert (after[:9] - alone).abs().max() < 1e-4 * alone.std()


def test_logits_come_in_order_and_in_pieces_of_bounded_size(make_teacher, monkeypatch):
    teacher = make_teacher(make_model("llama"))
    sequences = random_sequences((33, 5, 17, 1, 28))
    (whole_NV,) = teacher.logits(sequences)
    max_bytes = 20 * TINY_VOCAB_SIZE * 4
    monkeypatch.setattr(teacher_module, "CPU_LOGITS_BYTES", max_bytes)
    pieces = list(teacher.logits(sequences))
    assert len(pieces) == 6  # of 16 rows: the largest multiple of 8 that fits
    assert all(piece.numel() * piece.element_size() <= max_bytes for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces), whole_NV, atol=1e-5, rtol=1e-5)


def test_the_whole_model_yields_pieces_of_bounded_size_too(make_teacher, monkeypatch):
    teacher = make_teacher(make_model_without_head())
    sequences = random_sequences((33, 5, 17))
    whole_NV = torch.cat(list(teacher.logits(sequences)))
    max_bytes = 8 * TINY_VOCAB_SIZE * 4
    monkeypatch.setattr(teacher_module, "CPU_LOGITS_BYTES", max_bytes)
    pieces = list(teacher.logits(sequences))
    assert len(pieces) == 5 + 1 + 3
    assert all(piece.numel() * piece.element_size() <= max_bytes for piece in pieces)
    assert torch.equal(torch.cat(pieces), whole_NV)


def test_the_head_runs_over_real_positions_only(make_teacher):
    teacher = make_teacher(make_model("llama"))
    rows = []
    teacher.model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape))
    list(teacher.logits(random_sequences((33, 5, 17, 1))))
    assert rows == [(1, 56, 32)]


class ScaledHead(LlamaForCausalLM):
    """Its forward method knows whether it starts from ids, so its head differs when it runs alone."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = 3 * torch.tanh(output.logits / 3)
        return output


def make_model_without_head() -> Any:
    torch.manual_seed(0)
    return randomize(ScaledHead(AutoConfig.for_model("llama", **FAMILIES["llama"])))


def test_a_head_that_differs_when_alone_falls_back_to_the_whole_model(make_teacher):
    model = make_model_without_head()
    teacher = make_teacher(model)
    assert teacher.head_only is False
    sequences = random_sequences()
    found = torch.cat(list(teacher.logits(sequences))).double()
    expected = torch.cat([whole_model_logits(model, ids) for ids in sequences])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert expected.abs().max() <= 3


class LeakyBatch(LlamaForCausalLM):
    """Reads its batch backwards in time, one position: what a bidirectional layer would do, in small."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is not None:
            input_ids = torch.cat([input_ids[:, :1], input_ids[:, 2:], input_ids[:, 1:2]], dim=1)
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_model_that_sees_one_token_ahead_is_refused(make_teacher):
    model = randomize(LeakyBatch(AutoConfig.for_model("llama", **FAMILIES["llama"])))
    with pytest.raises(ValueError, match="LeakyBatch is not a causal language model"):
        make_teacher(model)


def test_an_encoder_is_refused(make_teacher):
    config = AutoConfig.for_model("bert", **SMALL)
    model = randomize(AutoModelForCausalLM.from_config(config))
    with pytest.raises(
        ValueError, match=r"BertLMHeadModel is not a causal language model: .* use a decoder-only"
    ):
        make_teacher(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_weights_with_nan_are_refused(family, make_teacher):
    model = make_model(family)
    model.base_model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaN or infinite in torch\.float32.*teacher\.dtype"):
        make_teacher(model)


def test_vocabulary_masked_with_minus_infinity_is_not_mistaken_for_damage(make_teacher):
    model = make_model("phi")  # its head has a bias
    model.lm_head.bias.data[400:] = -torch.inf
    teacher = make_teacher(model)
    assert teacher.head_only
    found = capture_all(teacher, random_sequences((5,)), [1, 2, 3, 4, 447])
    assert found["logsumexp"].isfinite().all()
    assert (found["topk_indices"] < 400).all()


def test_a_tokenizer_with_ids_that_the_model_does_not_know_is_refused(make_teacher):
    with pytest.raises(ValueError, match=r"ids up to 399, but the model knows only 390 tokens"):
        make_teacher(make_model("llama", vocab_size=390))
    make_teacher(make_model("llama", vocab_size=400))


def test_a_slow_tokenizer_is_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="SimpleNamespace is not a fast tokenizer"):
        Teacher(make_model("llama"), slow, device=CPU)


def test_a_model_keeps_no_gradients_and_no_dropout(make_teacher):
    model = make_model("gpt2").train()
    teacher = make_teacher(model)
    first, second = (torch.cat(list(teacher.logits(random_sequences()))) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_bfloat16_stays_near_float32(family, make_teacher):
    model = make_model(family)
    half = make_teacher(copy.deepcopy(model).to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.head_only
    sequences = random_sequences()
    full_NV = torch.cat(list(make_teacher(model).logits(sequences))).log_softmax(-1)
    pieces = list(half.logits(sequences))
    assert all(piece.dtype == torch.float32 for piece in pieces)
    half_NV = torch.cat(pieces).log_softmax(-1)
    assert (full_NV - half_NV).abs().mean() < 0.1
    assert (full_NV.argmax(-1) == half_NV.argmax(-1)).float().mean() > 0.85


def test_provenance_is_plain_json_and_says_what_runs(make_teacher, tiny_tokenizer):
    model = make_model("llama")
    found = make_teacher(model).provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["dtype"] == "float32"
    assert (found["vocab_size"], found["tokenizer_vocab_size"]) == (TINY_VOCAB_SIZE, 400)
    assert found["eos_token_id"] == tiny_tokenizer.eos_token_id == 0
    assert len(found["tokenizer_sha256"]) == 64


def test_max_length_is_what_the_configuration_says(make_teacher):
    assert make_teacher(make_model("llama")).max_length == 128
    assert make_teacher(make_model("gpt2")).max_length == 128
    assert make_teacher(make_model("mamba")).max_length is None


# Loading from a directory


def save(model: Any, tokenizer: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_saved_teacher_loads_as_it_was(tmp_path, tiny_tokenizer, dtype, attention):
    model = make_model("qwen3")
    directory = save(model, tiny_tokenizer, tmp_path / "teacher")
    teacher = load_teacher(str(directory), dtype=dtype, attention=attention)
    assert teacher.provenance()["dtype"] == dtype
    assert teacher.provenance()["attention"] == attention
    assert teacher.head_only
    sequences = random_sequences()
    found = torch.cat(list(teacher.logits(sequences))).float()
    expected = torch.cat([whole_model_logits(model, ids) for ids in sequences]).float()
    assert (found - expected).abs().mean() < (1e-4 if dtype == "float32" else 0.1)
    ids = load_tokenizer(str(directory)).encode("The quick fox")
    assert (
        ids == teacher.tokenizer.encode("The quick fox") == tiny_tokenizer.encode("The quick fox")
    )


def test_a_checkpoint_without_its_head_is_refused(tmp_path, tiny_tokenizer):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "headless")
    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"teacher headless: .* no lm_head\.weight, .* random numbers"
    ) as caught:
        load_teacher(str(directory))
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_not_missing(tmp_path, tiny_tokenizer):
    model = make_model("llama", tie_word_embeddings=True)
    directory = save(model, tiny_tokenizer, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert load_teacher(str(directory)).head_only


def assert_refused_in_one_line(directory: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load_teacher(str(directory))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith(f"teacher {directory.name}: ")


def test_pickled_weights_are_refused(tmp_path, tiny_tokenizer):
    model = make_model("llama")
    directory = save(model, tiny_tokenizer, tmp_path / "pickled")
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    assert_refused_in_one_line(directory, r"model\.safetensors")


def test_an_encoder_decoder_is_refused(tmp_path, tiny_tokenizer):
    config = AutoConfig.for_model("t5", vocab_size=448, d_model=32, d_kv=8, d_ff=64, num_layers=1)
    config.save_pretrained(tmp_path / "t5")
    tiny_tokenizer.save_pretrained(tmp_path / "t5")
    assert_refused_in_one_line(tmp_path / "t5", "not a causal language model")


def test_an_encoder_directory_is_refused(tmp_path, tiny_tokenizer):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SMALL))
    directory = save(randomize(model), tiny_tokenizer, tmp_path / "bert")
    assert_refused_in_one_line(directory, "not a causal language model")


def write_remote_code(directory: Path, *, ran: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = "unheard_of"
    config["auto_map"] = {
        "AutoConfig": "code.TheirConfig",
        "AutoModelForCausalLM": "code.TheirModel",
        "AutoTokenizer": ["code.TheirTokenizer", "code.TheirTokenizer"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["code.Theirs", "code.Theirs"]}
    tokenizer_config["tokenizer_class"] = "Theirs"
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "code.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")


def test_code_from_the_repo_is_not_run_unless_asked_for(tmp_path, tiny_tokenizer, monkeypatch):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "remote")
    write_remote_code(directory, ran=tmp_path / "ran")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked, either
    assert_refused_in_one_line(directory, r"set teacher\.trust_remote_code and a full commit")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(str(directory))
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_a_model_or_a_tokenizer_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "empty").mkdir()
    assert_refused_in_one_line(tmp_path / "empty", r"config\.json|model")
    model = make_model("llama")
    model.save_pretrained(tmp_path / "mute")
    assert_refused_in_one_line(tmp_path / "mute", "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [("truncated", "its weights are damaged"), ("other shapes", "its weights have other shapes")],
)
def test_damaged_weights_are_refused(tmp_path, tiny_tokenizer, damage, message):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "damaged")
    path = directory / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        weights = load_file(path)
        weights["model.norm.weight"] = torch.ones(31)
        save_file(weights, path, metadata={"format": "pt"})
    assert_refused_in_one_line(directory, f"{message}.* download it again")


VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
LONGEST: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": (GROUPED, 128),
    "gemma3": (
        {
            "text_config": {**GROUPED, "sliding_window": 8, "max_position_embeddings": 96},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
        96,
    ),
    "gpt2": ({**FAMILIES["gpt2"], "n_positions": 64}, 64),
    "mpt": ({"vocab_size": TINY_VOCAB_SIZE, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48}, 48),
    "bloom": ({**FAMILIES["bloom"], "max_position_embeddings": None, "seq_length": 80}, 80),
    "mamba": (FAMILIES["mamba"], None),
}  # fmt: skip


@pytest.mark.parametrize("family", LONGEST)
def test_the_longest_sequence_is_read_wherever_a_config_has_it(tmp_path, tiny_tokenizer, family):
    values, expected = LONGEST[family]
    config = AutoConfig.for_model(family, **values)
    model = randomize(AutoModelForCausalLM.from_config(config))
    attention = "sdpa" if model._supports_sdpa else "eager"
    teacher = load_teacher(str(save(model, tiny_tokenizer, tmp_path / "t")), attention=attention)
    assert teacher.max_length == expected


def test_sequences_longer_than_a_nested_config_allows_are_refused(
    tmp_path, tiny_tokenizer, make_recipe, cli
):
    model = randomize(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **LONGEST["gemma3"][0]))
    )
    directory = save(model, tiny_tokenizer, tmp_path / "gemma")
    recipe = make_recipe(teacher=directory, sequences="max_length = 97\nbatch_tokens = 97")
    status, _, said = cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 1
    assert "sequences.max_length is 97, but the teacher was made for 96 positions" in said
    recipe = make_recipe(teacher=directory, sequences="max_length = 96\nbatch_tokens = 96")
    status, _, said = cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 0, said


# Loading from a GGUF file


def write_gguf(path: Path, model: Any, tokenizer: Any, *, rule: str | None) -> Path:
    """A Llama as llama.cpp would store it in float32, with the pre-tokenization rule that it names."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)

    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    unused = [f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 1)]
    tokens += [*unused, "<|endoftext|>"]  # transformers adds it where it is missing
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([1 if 0 < i < len(bpe["vocab"]) else 3 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(0)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {
        **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
        **{"model.layers": "blk", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up"},
        **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.gate_proj": "ffn_gate"},
        **{"self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"},
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    }
    for name, tensor in model.state_dict().items():
        for part, num_heads in heads.items():
            if part in name:  # llama.cpp stores the two halves of a rotary head interleaved
                by_half = tensor.unflatten(0, (num_heads, 2, -1))
                tensor = by_half.transpose(1, 2).flatten(0, 2)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_teacher_is_the_model_that_was_stored(tmp_path, tiny_tokenizer):
    model = make_model("llama")
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer, rule="gpt-2")
    teacher = load_teacher(str(path))
    assert teacher.head_only
    sequences = random_sequences()
    found = torch.cat(list(teacher.logits(sequences))).double()
    expected = torch.cat([whole_model_logits(model, ids) for ids in sequences])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    text = "The quick café, 東京 12345"
    assert teacher.tokenizer.encode(text) == tiny_tokenizer.encode(text)
    assert load_tokenizer(str(path)).encode(text) == tiny_tokenizer.encode(text)


def test_a_gguf_by_the_rule_of_smollm_takes_every_digit_alone(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule="smollm")
    assert len(tiny_tokenizer.tokenize("12345")) < 5
    assert load_tokenizer(str(path)).tokenize("12345") == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("rule", ["qwen2", None])
def test_a_gguf_by_an_unknown_rule_is_refused(tmp_path, tiny_tokenizer, rule):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule=rule)
    message = rf"tiny\.gguf tokenizes by the rule '{rule or 'none'}', which cannot .* set teacher\.tokenizer"
    for load in (load_teacher, load_tokenizer):
        with pytest.raises(ValueError, match=message) as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_a_gguf_by_an_unknown_rule_works_with_a_tokenizer_beside_it(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule="qwen2")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    teacher = load_teacher(str(path), tokenizer=str(tmp_path / "tokenizer"), dtype="bfloat16")
    assert len(teacher.tokenizer) == 400
    assert teacher.dtype == torch.bfloat16
    assert teacher.head_only


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_without_the_packages_for_it_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install gguf accelerate"):
        load_teacher(str(tmp_path / "any.gguf"))


LARGE_TENSOR = """
import re, sys

import torch

from builder.teacher.loading import load_teacher

load_teacher(sys.argv[1])
large = torch.ones(2**24)
place = large.data_ptr() + 2**24
for region in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    if region:
        start, end = (int(x, 16) for x in region.split()[0].split("-"))
        if start <= place < end:
            print("hg" in region[region.index("VmFlags") :].split())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="pages are described in /proc")
@pytest.mark.parametrize(("setting", "asked"), [(None, "True"), ("0", "False")])
def test_with_a_teacher_large_tensors_ask_for_huge_pages(tiny_teacher_dir, setting, asked):
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if setting is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = setting
    command = [sys.executable, "-c", LARGE_TENSOR, str(tiny_teacher_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.strip() == asked
