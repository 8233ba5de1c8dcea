"""Logits of 16-bit teachers in float32: against the product in float64, for many families, and where it cannot be had."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, LlamaForCausalLM

from builder.capture.decoding import Decoder
from builder.teacher import model as teacher_module
from builder.teacher import precision
from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher
from builder.teacher.precision import Rounded
from tests.teacher.test_model import FAMILIES, ScaledHead, make_model, random_sequences, randomize
from tests.teacher.test_ranks import split_teacher

CPU = torch.device("cpu")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "llama": lambda x: x,
    "gemma2": lambda x: 5.0 * torch.tanh(x / 5.0),
    "granite": lambda x: x / 4.0,
    "cohere": lambda x: x * 0.25,
    "gpt2": lambda x: x,
    "phi": lambda x: x,  # with a bias
    "bloom": lambda x: x,
    "mamba": lambda x: x,
}
"""What each does to the product, as its paper says."""


@pytest.fixture
def save(tiny_tokenizer, tmp_path) -> Callable[[Any], Path]:
    def write(model: Any) -> Path:
        model.save_pretrained(tmp_path / "teacher")
        tiny_tokenizer.save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return write


def load(directory: Path, dtype: torch.dtype, **options: Any) -> Teacher:
    return load_teacher(str(directory), dtype=str(dtype).removeprefix("torch."), **options)


def exact(teacher: Teacher, hidden_ND: Tensor, family: str = "llama") -> Tensor:
    """The head in float64, by its definition."""
    linear = teacher.model.get_output_embeddings()
    # Mamba's code rounds float32 hidden states to the dtype of the head first.
    product_NV = hidden_ND.to(linear.weight.dtype).double() @ linear.weight.double().T
    if linear.bias is not None:
        product_NV += linear.bias.double()
    return AFTER[family](product_NV)


def largest_error(logits_NV: Tensor, expected_NV: Tensor) -> float:
    return float((logits_NV.double() - expected_NV).abs().max() / expected_NV.std())


@HALVES
@pytest.mark.parametrize("family", AFTER)
def test_logits_are_those_of_the_product_before_it_is_rounded(family, dtype, save):
    directory = save(make_model(family))
    teacher, plain = load(directory, dtype), load(directory, dtype, head_dtype="teacher")
    assert (teacher.head_dtype, plain.head_dtype) == ("float32", None)
    assert teacher.provenance() == {**plain.provenance(), "head_dtype": "float32"}
    assert teacher.notices == plain.notices
    sequences = random_sequences()
    hidden_ND = teacher.hidden(sequences)
    assert torch.equal(hidden_ND, plain.hidden(sequences))
    expected_NV = exact(teacher, hidden_ND, family)
    found_NV, rounded_NV = (torch.cat(list(t.logits(sequences))) for t in (teacher, plain))
    # Mamba's code makes float32 of what is rounded.
    own_dtype = torch.float32 if family == "mamba" else dtype
    assert (found_NV.dtype, rounded_NV.dtype) == (torch.float32, own_dtype)
    assert largest_error(found_NV, expected_NV) < 1e-4
    assert largest_error(rounded_NV, expected_NV) > 1e-3  # what this is about
    assert torch.equal(torch.cat(list(teacher.head(hidden_ND))), found_NV)


@HALVES
@pytest.mark.parametrize("family", AFTER)
def test_single_logits_are_the_same(family, dtype, save):
    teacher = load(save(make_model(family)), dtype)
    sequences = random_sequences()
    expected_NV = exact(teacher, teacher.hidden(sequences), family)
    generator = torch.Generator().manual_seed(0)
    start = 0
    for piece in teacher.rounded(sequences):
        assert isinstance(piece, Rounded)
        rows = slice(1, len(piece.logits_NV))
        ids_RC = torch.randint(expected_NV.shape[1], (rows.stop - 1, 9), generator=generator)
        wanted_RV = expected_NV[start + 1 : start + rows.stop]
        error = largest_error(piece.pick(rows, ids_RC), wanted_RV.gather(1, ids_RC))
        assert error < 1e-4
        rows_R = torch.tensor([3, 1])
        assert largest_error(piece.whole(rows_R), expected_NV[start + rows_R]) < 1e-4
        start += rows.stop
    assert start == len(expected_NV)


@pytest.mark.parametrize("product", [precision.by_residual, precision.by_float32])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@HALVES
def test_products(product, rows, dtype):
    torch.manual_seed(0)
    inputs, weights = torch.randn(rows, 200).to(dtype), torch.randn(3001, 200).to(dtype)
    expected = precision.by_float64(inputs, weights)
    torch.testing.assert_close(expected, inputs.double() @ weights.double().T)
    assert largest_error(product(inputs, weights), expected) < 1e-4
    assert largest_error(inputs @ weights.T, expected) > 1e-3


@HALVES
def test_the_call_for_cuda_is_one_that_torch_knows(dtype):
    with FakeTensorMode():  # shapes and types alone, for there is no GPU
        inputs, weights = torch.empty(5, 8, dtype=dtype), torch.empty(30, 8, dtype=dtype)
        found = precision.by_out_dtype(inputs.to("meta"), weights.to("meta"))
    assert (found.shape, found.dtype) == ((5, 30), torch.float32)
    assert precision.products_for(torch.device("cuda"))[0] is precision.by_out_dtype
    assert precision.by_out_dtype not in precision.products_for(CPU)


def test_a_teacher_in_float32_is_what_it_was(save):
    directory = save(make_model("gemma2"))
    one, other = (load(directory, torch.float32, head_dtype=d) for d in ("float32", "teacher"))
    assert one.head_dtype is None
    assert one.provenance() == other.provenance()
    assert "head_dtype" not in one.provenance()
    sequences = random_sequences()
    for a, b in zip(one.rounded(sequences), other.logits(sequences), strict=True):
        assert torch.equal(a, b)


class RoundingHead(LlamaForCausalLM):
    """Its own code rounds what its head yields."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.to(self.dtype)
        return output


class BiasedHead(LlamaForCausalLM):
    """Its own code does something else with each token of the vocabulary."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(self.config.vocab_size) / 100
        return output


def make(kind: Any) -> Any:
    torch.manual_seed(0)
    return randomize(kind(AutoConfig.for_model("llama", **FAMILIES["llama"]))).to(torch.bfloat16)


def test_where_a_model_rounds_by_itself_it_is_said(tiny_tokenizer):
    teacher = Teacher(make(RoundingHead), tiny_tokenizer, device=CPU)
    assert teacher.head_dtype is None
    assert "head_dtype" not in teacher.provenance()
    (line,) = teacher.notices
    assert line.startswith("the head of RoundingHead does not run in float32 here")
    assert "rounded to bfloat16" in line
    asked_for_it = Teacher(make(RoundingHead), tiny_tokenizer, device=CPU, head_dtype="teacher")
    assert asked_for_it.notices == ()
    sequences = random_sequences()
    for a, b in zip(teacher.rounded(sequences), asked_for_it.logits(sequences), strict=True):
        assert torch.equal(a, b)


def test_a_head_that_is_in_float32_by_itself_is_left_alone(tiny_tokenizer):
    class OwnFloat32(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.model(*args, **kwargs)
            output.logits = self.lm_head(output.last_hidden_state.float())
            return output

    model = make(OwnFloat32)
    model.lm_head = model.lm_head.float()
    teacher = Teacher(model, tiny_tokenizer, device=CPU)
    assert teacher.dtype == torch.bfloat16
    assert (teacher.head_dtype, teacher.notices) == (None, ())
    (piece,) = teacher.rounded(random_sequences())
    assert piece.dtype == torch.float32


def test_want_of_memory_is_no_reason_to_round(tiny_tokenizer, monkeypatch):
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(precision, "by_float64", full)
    with pytest.raises(torch.OutOfMemoryError):
        Teacher(make(LlamaForCausalLM), tiny_tokenizer, device=CPU)


def test_packed_weights_stay_with_their_own_product(tiny_tokenizer):
    model = make(LlamaForCausalLM)

    class Packed(torch.nn.Linear):
        """What a package for quantised weights puts there."""

    model.lm_head.__class__ = Packed
    assert precision.output_layer(model) is None
    teacher = Teacher(model, tiny_tokenizer, device=CPU)
    assert teacher.head_dtype is None
    assert len(teacher.notices) == 1


def test_a_head_with_more_than_elementwise_code_is_run_as_a_whole(tiny_tokenizer):
    teacher = Teacher(make(BiasedHead), tiny_tokenizer, device=CPU)
    assert teacher.head_dtype == "float32"
    sequences = random_sequences()
    (piece,) = teacher.rounded(sequences)
    assert isinstance(piece, Tensor)
    bias_V = torch.arange(piece.shape[1]).double() / 100
    assert largest_error(piece, exact(teacher, teacher.hidden(sequences)) + bias_V) < 1e-4


def test_a_model_that_does_not_come_apart(tiny_tokenizer):
    model = make(ScaledHead)
    teacher = Teacher(copy.deepcopy(model), tiny_tokenizer, device=CPU)
    assert (teacher.head_only, teacher.head_dtype) == (False, "float32")
    (ids,) = random_sequences((33,))
    (found_NV,) = teacher.rounded([ids])
    with torch.inference_mode():
        hidden_ND = model.model(torch.tensor([ids])).last_hidden_state[0]
    expected_NV = 3 * torch.tanh(exact(teacher, hidden_ND) / 3)
    assert found_NV.dtype == torch.float32
    assert largest_error(found_NV, expected_NV) < 1e-4


def test_a_way_that_is_wrong_is_not_used(tiny_tokenizer, monkeypatch):
    def half_as_good(input_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return (input_ND @ weight_VD.T).float()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    ways = (broken, half_as_good, precision.by_float32)
    monkeypatch.setattr(precision, "products_for", lambda _: ways)
    teacher = Teacher(make(LlamaForCausalLM), tiny_tokenizer, device=CPU)
    assert teacher._exact.product is precision.by_float32
    monkeypatch.setattr(precision, "products_for", lambda _: ways[:2])
    assert Teacher(make(LlamaForCausalLM), tiny_tokenizer, device=CPU).head_dtype is None


def test_spread_over_devices(tiny_tokenizer):
    model = make(LlamaForCausalLM)
    plain = Teacher(copy.deepcopy(model), tiny_tokenizer, device=CPU)
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]  # fmt: skip
    spread = dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    teacher = Teacher(spread, tiny_tokenizer, device=CPU)
    assert teacher.head_dtype == "float32"
    sequences = random_sequences()
    for a, b in zip(teacher.logits(sequences), plain.logits(sequences), strict=True):
        assert torch.equal(a, b)


def test_split_over_processes(save):
    directory = save(make_model("llama"))
    plain, split = load(directory, torch.bfloat16), split_teacher(directory, dtype="bfloat16")
    assert split.head_dtype == "float32"
    assert split.provenance() == plain.provenance()
    hidden_ND = plain.hidden(random_sequences())
    expected_NV = exact(plain, hidden_ND)
    (found_NV,) = split.head(hidden_ND)
    assert found_NV.dtype == torch.float32
    assert largest_error(found_NV, expected_NV) < 1e-4
    assert all(isinstance(piece, Tensor) for piece in split.rounded(random_sequences()))


def test_memory_is_bounded_by_what_logits_take(save, monkeypatch):
    teacher = load(save(make_model("llama")), torch.bfloat16)
    monkeypatch.setattr(teacher_module, "CPU_LOGITS_BYTES", 448 * 4 * 16)
    sequences = random_sequences()
    assert [len(piece) for piece in teacher.logits(sequences)][:2] == [16, 16]
    assert [len(piece.logits_NV) for piece in teacher.rounded(sequences)][:1] == [32]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_it_writes_with_the_same_logits(family, tiny_tokenizer):
    model = make_model(family).to(torch.bfloat16)
    teacher = Teacher(model, tiny_tokenizer, device=CPU)
    decoder = Decoder(teacher, temperature=0, top_p=1)
    (ids,) = random_sequences((17,))
    with torch.inference_mode():
        found_NV = decoder._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    expected_NV = torch.cat(list(teacher.logits([ids])))
    assert found_NV.dtype == torch.float32
    best_N8 = expected_NV.topk(8).indices
    found_N8, expected_N8 = found_NV.gather(1, best_N8), expected_NV.gather(1, best_N8)
    torch.testing.assert_close(found_N8, expected_N8, atol=1e-3, rtol=0)
    assert (found_NV.argmax(-1) == expected_NV.argmax(-1)).all()
    assert model.generation_config is not decoder._model.generation_config


def test_layers_further_inside_are_found():
    inner = torch.nn.Linear(4, 9, bias=False).to(torch.bfloat16)
    model = torch.nn.Module()
    model.text = torch.nn.Module()
    model.text.lm_head = inner
    found = precision.output_layer(
        SimpleNamespace(get_output_embeddings=lambda: inner, named_modules=model.named_modules)
    )
    assert found.path == ("text", "lm_head")
    view = precision.with_product(model, found, precision.by_float32)
    inputs = torch.randn(3, 4).to(torch.bfloat16)
    assert view.text.lm_head(inputs).dtype == torch.float32
    assert model.text.lm_head(inputs).dtype == torch.bfloat16
