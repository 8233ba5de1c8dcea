"""The teacher's head beside the data: what is published, and what students learn from it and hidden states."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builder.build.build import build
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.teacher.model import Teacher
from builder.verify.verify import verify
from logit_dataset import (
    load_logits,
    load_teacher_head,
)
from logit_dataset.schema import HEAD_FILE
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.tiny_models import small_tokenizer, tiny_config, tiny_model

OUTPUT = "hidden_states = true\ntemperatures = [2.0]"


def build_in(base: Path, checkpoint: Path, /, **changes: str) -> Path:
    base.mkdir(parents=True, exist_ok=True)
    write_jsonl(base / "corpus.jsonl", sample_documents(12))
    (base / "recipe.toml").write_text(
        recipe_text(checkpoint, "corpus.jsonl", **{"output": OUTPUT, **changes})
    )
    notices: list[str] = []
    build(load_recipe(base / "recipe.toml"), base, base / "out", notice=notices.append)
    (base / "notices").write_text("\n".join(notices))
    return base / "out"


def save(base: Path, family: str, **changes) -> Path:
    """A checkpoint as `save_pretrained` writes it, whose logits are large enough for caps to matter."""
    torch.manual_seed(1)
    model = tiny_model(tiny_config(family, **changes))
    layer = model.get_output_embeddings()
    layer.weight.data.normal_(0, 0.6)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.normal_(0, 0.5)
    model.save_pretrained(base / "teacher")
    small_tokenizer().save_pretrained(base / "teacher")
    return base / "teacher"


@pytest.fixture(scope="module")
def out(tiny_teacher_dir, tmp_path_factory) -> Path:
    return build_in(tmp_path_factory.mktemp("head"), tiny_teacher_dir)


def reference_logits(teacher: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(ids).logits


FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "phi": {},  # with a bias
    "gpt2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_are_the_teacher_s_logits(family, tmp_path):
    teacher = save(tmp_path, family, **FAMILIES[family])
    out = build_in(tmp_path / "x", teacher)
    assert HEAD_FILE not in (tmp_path / "x" / "notices").read_text()
    head, record = load_teacher_head(out), read_manifest(out)["teacher_head"]
    expected = FAMILIES[family]
    assert head.softcap == record["softcap"] == expected.get("final_logit_softcapping")
    scale = expected.get("logit_scale") or 1 / expected.get("logits_scaling", 1)
    assert head.scale == record["scale"] == scale
    assert (head.bias_V is not None) == record["has_bias"] == (family == "phi")
    batch = next(iter(load_logits(out).batches(batch_size=4, seed=None)))
    for ids, mask, states in zip(batch["input_ids"], batch["mask"], batch["hidden_states"], strict=True):  # fmt: skip
        truth = reference_logits(teacher, ids[None][:, mask].long())[0]
        found = head(states[mask].double())
        assert (found - truth).abs().max() < 2e-3 * max(1, float(truth.abs().max()))
    assert verify(out).problems == []


def test_a_head_that_is_no_formula_is_left_out_with_a_line(tmp_path):
    teacher = save(tmp_path, "llama")

    class Tempered(torch.nn.Linear):
        def forward(self, hidden):
            logits = super().forward(hidden)
            return logits + 0.05 * logits.sin()

    original = Teacher.__init__

    def wrapped(self, model, *arguments, **options):
        layer = Tempered(*reversed(model.lm_head.weight.shape), bias=False)
        layer.weight = model.lm_head.weight
        model.lm_head = layer
        original(self, model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "__init__", wrapped)
        out = build_in(tmp_path / "x", teacher)
    line = (tmp_path / "x" / "notices").read_text()
    assert f"{HEAD_FILE} is left out: LlamaForCausalLM does more to its logits than" in line
    assert not (out / HEAD_FILE).exists()
    assert "teacher_head" not in read_manifest(out)
    assert verify(out).problems == []
    with pytest.raises(ValueError, match=f"has no {HEAD_FILE}; it comes with"):
        load_teacher_head(out)


# What the builder publishes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_head_is_published_in_its_own_dtype(tiny_teacher_dir, tmp_path, dtype):
    out = build_in(tmp_path, tiny_teacher_dir, teacher=f'dtype = "{dtype}"')
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher_dir, dtype=getattr(torch, dtype))
    tensors = load_file(out / HEAD_FILE)
    assert tensors.keys() == {"weight", "logit_scale"}
    assert torch.equal(tensors["weight"], model.lm_head.weight)
    assert torch.equal(load_teacher_head(out).weight_VD, model.lm_head.weight)
    assert read_manifest(out)["teacher_head"]["dtype"] == dtype
    assert verify(out, recompute=3, teacher_path=tiny_teacher_dir).problems == []


def test_a_build_that_is_resumed_has_the_same_head(out, tiny_teacher_dir, tmp_path):
    recipe, base = tmp_path / "recipe.toml", tmp_path
    for name in ("recipe.toml", "corpus.jsonl"):
        shutil.copy(out.parent / name, base / name)
    build(load_recipe(recipe), base, base / "out", max_shards=1)
    written = (base / "out" / HEAD_FILE).stat()
    assert (base / "out" / HEAD_FILE).read_bytes() == (out / HEAD_FILE).read_bytes()
    # Killed when all shards were there: no worker has a reason to load the teacher but the head.
    build(load_recipe(recipe), base, base / "out", max_shards=99)
    assert written.st_size == (base / "out" / HEAD_FILE).stat().st_size
    assert read_manifest(base / "out")["teacher_head"] == read_manifest(out)["teacher_head"]
    assert (base / "out" / HEAD_FILE).read_bytes() == (out / HEAD_FILE).read_bytes()


def test_shards_of_a_version_that_wrote_no_head_get_one(out, tmp_path, monkeypatch):
    base = tmp_path
    for name in ("recipe.toml", "corpus.jsonl"):
        shutil.copy(out.parent / name, base / name)
    recipe = load_recipe(base / "recipe.toml")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("builder.build.build.make_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, base, base / "out")
    (base / "out" / HEAD_FILE).unlink()
    (base / "out" / f".{HEAD_FILE}.abc.partial").write_bytes(b"half")
    build(recipe, base, base / "out")
    assert (base / "out" / HEAD_FILE).read_bytes() == (out / HEAD_FILE).read_bytes()
    assert read_manifest(base / "out")["teacher_head"] == read_manifest(out)["teacher_head"]
    assert not list((base / "out").glob(".*.partial"))


def test_a_head_of_a_teacher_with_which_nothing_was_built_does_not_stay(out, tmp_path):
    base = tmp_path
    for name in ("recipe.toml", "corpus.jsonl"):
        shutil.copy(out.parent / name, base / name)
    recipe = load_recipe(base / "recipe.toml")
    build(recipe, base, base / "out", max_shards=0)
    (base / "out" / HEAD_FILE).write_bytes(b"of another teacher")
    build(recipe, base, base / "out")
    assert (base / "out" / HEAD_FILE).read_bytes() == (out / HEAD_FILE).read_bytes()


def test_without_hidden_states_there_is_no_head(tiny_teacher_dir, tmp_path):
    out = build_in(tmp_path, tiny_teacher_dir, output="")
    assert not (out / HEAD_FILE).exists()
    assert "teacher_head" not in read_manifest(out)
    assert "teacher_head" not in (out / "README.md").read_text()


def test_licence_is_said_and_follows_a_new_description(tiny_teacher_dir, tmp_path, cli):
    licences = {name: f'license = "{value}"' for name, value in (("corpus", "mit"), ("teacher", "gemma"))}  # fmt: skip
    out = build_in(tmp_path, tiny_teacher_dir)
    assert read_manifest(out)["teacher_head"]["license"] is None
    assert "licence not stated" in cli("info", out)[1]
    text = recipe_text(tiny_teacher_dir, "corpus.jsonl", output=OUTPUT, **licences)
    (tmp_path / "recipe.toml").write_text(text)
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, out)
    assert read_manifest(out)["teacher_head"]["license"] == "gemma"
    head = "head       teacher_head.safetensors makes the teacher's logits of these: 0.1 MB, float32, licence gemma\n"
    assert head in cli("info", out)[1]
    card = (out / "README.md").read_text()
    assert "`teacher_head.safetensors` (0.1 MB, float32) is the last layer of the teacher" in card
    assert "logits = hidden_states · weightᵀ. It is a part" in card
    assert "under the teacher’s licence: **gemma**." in card
    assert verify(out).problems == []
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["teacher_head"]["license"] = "mit"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert f"{HEAD_FILE}: is under mit, the teacher under gemma" in verify(out).problems


# What is found


@pytest.fixture
def copy(out, tmp_path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "copy"))


@pytest.mark.parametrize("place", [0, 4, 9, 60, -1, -2000])
def test_any_flipped_byte_is_found(copy, place):
    content = bytearray((copy / HEAD_FILE).read_bytes())
    content[place] ^= 1
    (copy / HEAD_FILE).write_bytes(content)
    line = f"{HEAD_FILE}: its content does not have the hash in the manifest"
    assert verify(copy).problems == [line]
    with pytest.raises(ValueError, match="cannot be used \\(its content does not have the hash"):
        load_teacher_head(copy)


def refit(copy: Path) -> None:
    content = (copy / HEAD_FILE).read_bytes()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["teacher_head"] |= {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_whatever_stands_in_its_header_is_one_line(copy):
    """Of a file that anybody may have made, with a hash that fits."""
    content = (copy / HEAD_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    wrong = {
        "dtype": {"weight": {**header["weight"], "dtype": "I8"}},
        "shape": {"weight": {**header["weight"], "shape": [448, 33]}},
        "negative": {"weight": {**header["weight"], "shape": [-448, -32]}},
        "huge": {"weight": {**header["weight"], "shape": [2**70, 1]}},
        "beyond": {"weight": {**header["weight"], "data_offsets": [8, 10**9]}},
        "other": {"more": header["logit_scale"]},
        "none": {"weight": None},
        "list": {"weight": [1]},
    }
    for change in wrong.values():
        text = json.dumps({**header, **change}).encode()
        changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
        (copy / HEAD_FILE).write_bytes(changed)
        refit(copy)
        with pytest.raises(ValueError, match=rf"^\S+: {HEAD_FILE} cannot be used \(.*\); fetch it"):
            load_teacher_head(copy)
        assert any(problem.startswith(HEAD_FILE) for problem in verify(copy).problems)
    for text in (b"", b"[" * 60_000, b"\xff{}"):
        (copy / HEAD_FILE).write_bytes(len(text).to_bytes(8, "little") + text + content)
        refit(copy)
        with pytest.raises(ValueError, match="cannot be used"):
            load_teacher_head(copy)


def test_another_head_with_a_hash_that_fits_is_found_by_what_it_makes(copy):
    tensors = load_file(copy / HEAD_FILE)
    for name, change in {
        "another": {"weight": tensors["weight"].roll(1, 0)},
        "a little": {"weight": tensors["weight"] * 1.1},
        "transformed": {"logit_softcap": torch.tensor(5.0, dtype=torch.float64)},
    }.items():
        save_file({**tensors, **change}, copy / HEAD_FILE)
        refit(copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["teacher_head"]["softcap"] = 5.0 if "logit_softcap" in change else None
        (copy / "manifest.json").write_text(json.dumps(manifest))
        found = verify(copy).problems
        assert len(found) == 1, (name, found)
        assert "nats from what is stored, more than 0.001" in found[0]


def test_a_missing_head_is_found(copy):
    (copy / HEAD_FILE).unlink()
    assert verify(copy).problems == [f"{HEAD_FILE}: is missing"]
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is missing; fetch it again"):
        load_teacher_head(copy)
