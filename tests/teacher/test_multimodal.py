"""Checkpoints that also read pictures: their text is what the model's own class says of it alone, from the file to the dataset."""

import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from builder.capture.decoding import Decoder
from builder.teacher.loading import load_teacher
from builder.teacher.multimodal import MODALITIES
from tests.architectures import check
from tests.conftest import sample_documents, write_jsonl
from tests.teacher.test_model import save
from tests.tiny_models import small_tokenizer, tiny_config, tiny_model

BUILT = (
    *("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "llava"),
    *("internvl", "glm4v", "kimi_k25", "gemma3", "gemma4", "llama4", "qwen3_5", "aya_vision"),
)
"""Types; of those that have a class for text alone, too, the checkpoint is one of the whole."""


@pytest.fixture
def saved(tmp_path):
    def make(name, **changes):
        model = tiny_model(tiny_config(name, **changes), AutoModelForMultimodalLM)
        return model, save(model, small_tokenizer(), tmp_path / "teacher")

    return make


def alone(model, ids):
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model = model.language_model  # without a picture, its own forward method fails
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", BUILT)
def test_a_build_holds_what_the_whole_model_says_of_each_text(
    saved, make_recipe, cli, tmp_path, name
):
    model, directory = saved(name)
    write_jsonl(tmp_path / "few.jsonl", sample_documents(5))
    recipe = make_recipe("few.jsonl", teacher=directory)
    status, _, said = cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 0, said
    status, told, said = cli(
        "verify", tmp_path / "out", "--recompute", 1000, "--teacher", directory, "--device", "cpu"
    )
    assert status == 0, told + said
    files = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(rows) > 5
    for row in rows:
        expected_TV = alone(model, row["input_ids"])
        indices_TK = torch.tensor(row["topk_indices"])
        found_TK = torch.tensor(row["topk_logprobs"], dtype=torch.float64)
        torch.testing.assert_close(
            found_TK, expected_TV.gather(1, indices_TK), atol=5e-3, rtol=1e-3
        )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    count = sum(p.numel() for p in model.parameters())
    if manifest["teacher"]["architecture"] == type(model).__name__:
        assert manifest["teacher"]["parameters"] == count


@pytest.mark.parametrize(
    "name", ["idefics3", "lfm2_vl", "video_llama_3", "mistral_large4", "voxtral"]
)
def test_rows_of_mixed_batches_are_those_of_the_model_alone(tmp_path, name):
    result = check(name, tmp_path / "teacher")
    assert (result.verdict, result.head, result.line) == ("right", "alone", "")


def test_what_reads_pictures_takes_no_memory(saved):
    model, directory = saved("mistral3")
    teacher = load_teacher(str(directory))
    tower = teacher.model.get_encoder(modality="image")
    assert sum(p.numel() for p in tower.parameters()) == 0
    whole, text = (sum(p.numel() for p in m.parameters()) for m in (model, teacher.model))
    assert whole - text == sum(p.numel() for p in model.get_encoder(modality="image").parameters())
    assert text > 10_000
    assert teacher.provenance()["parameters"] == whole


def test_the_towers_of_a_text_model_are_nobodys(saved, tiny_teacher_dir):
    teacher = load_teacher(str(tiny_teacher_dir))
    assert all(p.numel() for p in teacher.model.parameters())
    assert all(teacher.model.get_encoder(modality=m) is teacher.model for m in MODALITIES)


def test_what_is_not_causal_is_refused_for_that_reason(saved):
    _, directory = saved("paligemma")
    with pytest.raises(
        ValueError,
        match=r"^teacher: PaliGemmaForConditionalGeneration is not a causal language model: its logits at a position change",
    ):
        load_teacher(str(directory))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("t5gemma2", "T5Gemma2ForConditionalGeneration is not a causal .* but an encoder–decoder"),
        ("blip", r"BlipForConditionalGeneration does not run on text alone \(TypeError: .*pixel"),
    ],
)
def test_what_needs_a_picture_is_refused_in_a_line(saved, make_recipe, cli, tmp_path, name, why):
    _, directory = saved(name)
    recipe = make_recipe(teacher=directory)
    status, _, said = cli("build", recipe, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 1
    assert re.search(why, said), said
    assert "not expected" not in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["mistral3", "qwen2_vl"])
def test_a_weight_of_the_text_that_does_not_arrive_is_refused(saved, name):
    _, directory = saved(name)
    path = directory / "model.safetensors"
    weights = load_file(path)
    lost = next(n for n in weights if "layers.1." in n and "mlp" in n and "vis" not in n)
    save_file({n: w for n, w in weights.items() if n != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="which would be filled with random numbers"):
        load_teacher(str(directory))
    more = {**weights, lost.replace("layers.1.", "layers.7."): weights[lost].clone()}
    save_file(more, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.7\..* does not use"):
        load_teacher(str(directory))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "gemma3", "glm4v"])
def test_it_writes_with_a_cache_what_it_writes_without(saved, name):
    """Qwen-VL keeps the places of its last prompt."""
    model, directory = saved(name)
    teacher = load_teacher(str(directory))
    decoder = Decoder(teacher, temperature=0, top_p=1)
    decoder.eos_ids = frozenset()
    prompts = [[5, 9, 40], list(range(50, 67)), [7]]
    for batch in ([prompts[0]], [prompts[1]], prompts if decoder.padded else [prompts[2]]):
        for prompt, written in zip(batch, decoder.decode(batch, num_tokens=5), strict=True):
            ids = list(prompt)
            for token in written:
                assert token == int(alone(model, ids)[-1].argmax())
                ids.append(token)
        ids = prompts[1]
        found = torch.cat(list(teacher.logits([ids]))).double().log_softmax(-1)
        torch.testing.assert_close(found, alone(model, ids), atol=1e-4, rtol=1e-4)
