"""Quantised teachers that transformers reads: right values, recorded as what they are, with their true number of parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builder.dataset.manifest import write_json
from builder.teacher.loading import load_teacher
from tests.teacher.conftest import Weights
from tests.teacher.test_checkpoint import assert_refused, assert_right
from tests.teacher.test_model import EXPERTS, make_model, random_sequences, whole_model_logits

BLOCK = 16
FLOAT8 = {
    "quantization_config": {
        **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"},
        **{"weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]},
    }
}


def float8(model: Any, *, without: str = "") -> Callable[[Weights], None]:
    """Store matrices as blocks of float8 with a scale each, and give the model in memory the values that these stand for."""

    def change(weights: Weights) -> None:
        for name in [n for n in weights if "proj.weight" in n]:
            rows, columns = weights[name].shape
            blocks = weights[name].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            packed = (blocks / scales).to(torch.float8_e4m3fn)
            weights[name] = packed.reshape(rows, columns)
            if name != without:
                weights[f"{name}_scale_inv"] = scales.reshape(rows // BLOCK, columns // BLOCK)
            model.get_parameter(name).data = (packed.float() * scales).reshape(rows, columns)

    return change


def assert_logits(teacher: Any, model: Any, tolerance: float = 1e-4) -> None:
    for ids in random_sequences():
        found = torch.cat(list(teacher.logits([ids]))).double()
        torch.testing.assert_close(found, whole_model_logits(model, ids), atol=tolerance, rtol=0)


def test_blocks_of_float8_are_recorded_and_right(write):
    model = make_model("llama")
    teacher = load_teacher(str(write(model, float8(model), FLOAT8)))
    assert_logits(teacher, model)
    found = teacher.provenance()
    assert found["quantisation"] == {
        "method": "fp8",
        "config": {
            **{"fmt": "e4m3", "activation_scheme": "dynamic"},
            "weight_block_size": [BLOCK, BLOCK],
        },
        "stored_as": ["F8_E4M3"],
        "dequantised": True,
    }
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads(json.dumps(found)) == found


def test_a_build_by_a_quantised_teacher_says_so(write, make_recipe, tmp_path, cli):
    model = make_model("llama")
    directory = write(model, float8(model), FLOAT8)
    out = tmp_path / "out"
    status, _, err = cli("build", make_recipe(teacher=directory), "--output", out)
    assert status == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["teacher"]["quantisation"]["method"] == "fp8"
    count = sum(p.numel() for p in model.parameters())
    assert manifest["teacher"]["parameters"] == count
    card = (out / "README.md").read_text()
    assert (
        "| quantisation | fp8 (fmt e4m3, activation_scheme dynamic, weight_block_size [16, 16]): weights are stored as F8_E4M3, "
        "unpacked before they are used |"
    ) in card.replace("\\", "")
    assert f"{count:,} parameters" in card
    assert "float32, quantised (fp8)" in cli("info", out)[1]
    rows = manifest["totals"]["rows"]
    status, output, err = cli("verify", out, "--recompute", rows, "--teacher", directory)
    assert status == 0, output + err
    assert "no problems" in output

    # Older code did not record it, and could count packed numbers.
    del manifest["teacher"]["quantisation"]
    manifest["teacher"]["parameters"] += 7
    write_json(out / "manifest.json", manifest)
    assert cli("verify", out, "--recompute", 3, "--teacher", directory)[0] == 0


def test_a_scale_that_is_lost_is_not_taken_for_one(write):
    model = make_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    directory = write(model, float8(model, without=name), FLOAT8)
    assert_refused(
        directory, rf"{name} is stored as F8_E4M3 and its scale is not in the checkpoint"
    )


def test_plain_weights_under_a_config_of_quantised_ones_are_plain(write):
    model = make_model("llama")
    assert_right(write(model, config=FLOAT8), model)


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Of four bits: a sign, two of exponent, one of fraction (OCP Microscaling Formats, version 1.0, section 5.3.3)."""


def four_bits(model: Any) -> Callable[[Weights], None]:
    """Store experts as MXFP4: 32 values of four bits share a power of two."""

    def change(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [
            n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]:
            experts, columns, rows = weights.pop(name).shape  # the model multiplies from the left
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator)
            scales = torch.randint(124, 127, (experts, rows, columns // 32), generator=generator)
            weights[f"{name}_blocks"] = blocks.to(torch.uint8)
            weights[f"{name}_scales"] = scales.to(torch.uint8)
            values = torch.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], -1).flatten(-2)
            values = values * 2.0 ** (scales[..., None] - 127)
            model.get_parameter(name).data = values.flatten(-2).transpose(1, 2).contiguous()

    return change


def test_experts_of_four_bits_are_recorded_and_right(write):
    sizes = {**EXPERTS, "hidden_size": 64, "intermediate_size": 64}
    model = make_model("gpt_oss", **sizes)
    config = {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    teacher = load_teacher(str(write(model, four_bits(model), config)))
    assert_logits(teacher, model, tolerance=1e-3)
    found = teacher.provenance()
    assert found["quantisation"] == {
        **{"method": "mxfp4", "stored_as": ["U8"]},
        "dequantised": True,
    }
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def ternary(reference: Any) -> Callable[[Weights], None]:
    """Store matrices as BitNet does: four numbers of {−1, 0, 1} in a byte, and a scale each."""

    def change(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [n for n in weights if "proj.weight" in n]:
            rows = len(weights[name])
            values = torch.randint(-1, 2, weights[name].shape, generator=generator)
            quarters = (values + 1).to(torch.uint8).reshape(4, rows // 4, -1)
            weights[name] = sum(quarter << 2 * i for i, quarter in enumerate(quarters))
            weights[f"{name}_scale"] = torch.tensor([2.5])
            module = reference.get_submodule(name.removesuffix(".weight"))
            module.forward = rounded_product(values.float(), 2.5)

    return change


def rounded_product(values: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """A linear layer as BitNet b1.58 defines it: activations are rounded to eight bits, a scale for each token."""

    def forward(x: Tensor) -> Tensor:
        steps = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x * steps).round().clamp(-128, 127) @ values.T / steps / scale

    return forward


def test_a_teacher_that_runs_packed_has_the_parameters_that_it_stands_for(write):
    model = make_model("llama")
    config = {"quantization_config": {"quant_method": "bitnet", "linear_class": "bitlinear"}}
    torch.compiler.set_stance("force_eager")  # transformers compiles its unpacking
    try:
        teacher = load_teacher(str(write(model, ternary(model), config)))
        assert_logits(teacher, model)
    finally:
        torch.compiler.set_stance("default")
    found = teacher.provenance()
    assert found["quantisation"] == {
        **{"method": "bitnet", "config": {"linear_class": "bitlinear"}},
        **{"stored_as": ["U8"], "dequantised": False},
    }
    assert sum(p.numel() for p in teacher.model.parameters()) < found["parameters"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_is_recorded_of_a_configuration_names_no_path():
    from builder.checkpoint.checkpoint import Stored
    from builder.checkpoint.quantisation import describe

    said = {
        **{
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": "/home/me/x",
        },
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "group_size": 128, "observer": "minmax"},
                "input_activations": None,
            }
        },
        "ignore": ["lm_head"] * 99,
    }
    stored = {"q_proj.weight_packed": Stored("I32", (8, 8), Path("x"))}
    model = make_model("llama")
    found = describe(
        model, config={"quantization_config": said}, stored=stored, method="compressed-tensors"
    )
    assert found == {
        "method": "compressed-tensors",
        "config": {
            "format": "pack-quantized",
            "groups": [{"weights": {"num_bits": 4, "type": "int", "group_size": 128}}],
        },
        "stored_as": ["I32"],
        "dequantised": True,
    }


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors"])
def test_a_package_that_a_quantisation_needs_is_named(write, method):
    said = {"quant_method": method, "load_in_8bit": method == "bitsandbytes", "bits": 4}
    if method == "compressed-tensors":
        del said["bits"]
    directory = write(make_model("llama"), config={"quantization_config": said})
    message = rf"quantised by {method}, which needs a package .*{method.replace('gptq', 'optimum')}"
    assert_refused(directory, message)
