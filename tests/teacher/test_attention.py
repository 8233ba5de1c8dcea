"""Which attention a recipe leads to: the best that a class supports where it leaves that open, and no code that it does not name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_flash_attention_utils as flash
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils
from transformers.integrations import hub_kernels

from builder.dataset.identity import fingerprint
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from builder.recipe.sections import TeacherRecipe
from builder.sources.known import KnownSources
from builder.sources.opening import open_teacher
from builder.sources.resolve import resolve, resolve_teacher
from builder.teacher import attention as module
from builder.teacher.loading import load_teacher
from builder.verify.verify import verify
from tests.build.test_build import data_bytes, run
from tests.teacher.test_model import make_model, save, write_gguf, write_remote_code

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KERNEL = f"kernels-community/flash-attn3@{COMMIT}"


@pytest.fixture
def gemma2(tmp_path, tiny_tokenizer) -> Path:
    """A teacher of a class that supports eager attention only."""
    return save(make_model("gemma2"), tiny_tokenizer, tmp_path / "gemma2")


def test_unset_is_the_best_that_the_class_supports_and_stands_in_plan_and_manifest(
    make_recipe, tmp_path, gemma2
):
    recipe = make_recipe(teacher=gemma2)
    assert load_recipe(recipe).teacher.attention is None
    run(recipe, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["recipe"]["teacher"]["attention"] == manifest["teacher"]["attention"] == "eager"
    assert "with eager attention" in (tmp_path / "out" / "README.md").read_text()
    report = verify(tmp_path / "out", recompute=5, teacher_path=gemma2)
    assert not report.problems
    assert run(recipe, tmp_path / "out").status == "already complete"
    # Saying it makes no other dataset.
    said = make_recipe(teacher=gemma2, teacher_options='attention = "eager"')
    assert run(said, tmp_path / "out").status == "already complete"
    run(said, tmp_path / "said")
    assert read_manifest(tmp_path / "said")["fingerprint"] == manifest["fingerprint"]
    assert data_bytes(tmp_path / "said") == data_bytes(tmp_path / "out")


def test_where_sdpa_is_the_best_plans_and_fingerprints_are_what_they_were(make_recipe):
    lines = ("", 'attention = "sdpa"')
    recipes = [load_recipe(make_recipe(teacher_options=line)) for line in lines]
    base = make_recipe().parent
    plans = [resolve(recipe, base, KnownSources()).plan(recipe) for recipe in recipes]
    assert plans[0] == plans[1]
    assert plans[0]["recipe"]["teacher"]["attention"] == "sdpa"
    assert fingerprint(plans[0]) == fingerprint({**plans[0], "recipe": recipes[0].published()})


def test_what_a_class_does_not_support_is_refused_with_what_it_does(gemma2):
    with pytest.raises(
        ValueError,
        match=r'^teacher gemma2: Gemma2ForCausalLM has no "sdpa" attention; use teacher\.attention = "eager", or leave it out$',
    ):
        load_teacher(str(gemma2), attention="sdpa")
    assert load_teacher(str(gemma2)).provenance()["attention"] == "eager"


def test_an_interrupted_build_goes_on_with_the_attention_that_it_began_with(
    make_recipe, tmp_path, gemma2, monkeypatch
):
    """Though a newer transformers may support a better one."""
    recipe = make_recipe(teacher=gemma2)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts", max_shards=1)
    monkeypatch.setattr(module, "class_of", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr("builder.teacher.loading.class_of", lambda *_, **__: None)
    run(recipe, tmp_path / "parts")
    assert data_bytes(tmp_path / "parts") == data_bytes(tmp_path / "whole")


def test_another_model_in_the_same_place_is_asked_anew(tmp_path, tiny_tokenizer, gemma2):
    recipe, known = TeacherRecipe(path=str(gemma2)), KnownSources()
    assert resolve_teacher(recipe, Path(), known).attention == "eager"
    save(make_model("llama"), tiny_tokenizer, gemma2)
    assert resolve_teacher(recipe, Path(), known).attention == "sdpa"


def test_a_gguf_file_says_its_class_too(tmp_path, tiny_tokenizer):
    path = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), tiny_tokenizer, rule="gpt-2")
    recipe = TeacherRecipe(gguf=str(path))
    source = resolve_teacher(recipe, Path(), KnownSources())
    assert source.attention == "sdpa"
    assert open_teacher(recipe, source, device="cpu").provenance()["attention"] == "sdpa"


def test_what_cannot_be_read_is_left_to_what_loads_it(tmp_path, tiny_tokenizer):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "strange")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    assert module.best_attention(str(directory)) == "sdpa"
    with pytest.raises(ValueError, match=r"^teacher strange: "):
        load_teacher(str(directory))


# No code but what a recipe names


def test_asking_for_the_class_runs_no_code_of_the_repo(tmp_path, tiny_tokenizer):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "remote")
    write_remote_code(directory, ran=tmp_path / "ran")
    assert module.best_attention(str(directory)) == "sdpa"
    assert not (tmp_path / "ran").exists()


THEIR_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
class TheirConfig(LlamaConfig):
    model_type = "unheard_of"
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
    _supports_sdpa = False
"""


def test_the_class_of_code_that_a_recipe_trusts_is_asked(tmp_path, tiny_tokenizer):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "remote")
    write_remote_code(directory, ran=tmp_path / "ran")
    (directory / "code.py").rename(directory / "theirs.py")
    (directory / "theirs.py").write_text(THEIR_CODE)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "theirs.TheirConfig",
        "AutoModelForCausalLM": "theirs.TheirModel",
    }
    (directory / "config.json").write_text(json.dumps(config))
    assert module.best_attention(str(directory), trust_remote_code=True) == "eager"


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """As if the package `kernels` were installed: what is fetched from the Hub with it."""
    fetched: list[str] = []

    def get_kernel(name: str, **_: Any) -> None:
        fetched.append(name)
        raise AssertionError(f"{name} would be run")

    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    for place in (hub_kernels, modeling_utils):
        monkeypatch.setattr(place, "is_kernels_available", lambda *_: True)
    return fetched


@pytest.mark.parametrize("version", [2, 3])
def test_a_flash_attention_that_is_not_installed_is_not_fetched(
    tmp_path, tiny_tokenizer, kernels, version
):
    directory = save(make_model("llama"), tiny_tokenizer, tmp_path / "llama")
    with pytest.raises(
        ValueError,
        match=rf"^teacher llama: teacher\.attention is 'flash_attention_{version}', whose package is not installed",
    ):
        load_teacher(str(directory), attention=f"flash_attention_{version}", dtype="bfloat16")
    assert kernels == []


def test_a_flash_attention_that_a_class_replaces_by_a_kernel_is_refused(
    tmp_path, tiny_tokenizer, kernels, monkeypatch
):
    available = {"general_availability_check": lambda: True}
    monkeypatch.setitem(flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX, 2, available)
    model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("flint"))]
    with pytest.raises(
        ValueError,
        match=r"FlintForCausalLM runs with kernels-community/.* which a recipe cannot pin",
    ):
        module.check_attention("flash_attention_2", model_class)
    with pytest.raises(ValueError, match=r"MambaForCausalLM has no flash attention; leave"):
        module.check_attention(
            KERNEL, AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("mamba"))]
        )
    assert kernels == []


def test_a_kernel_is_code_that_a_recipe_names_pins_and_trusts(make_recipe, tiny_teacher_dir, monkeypatch):  # fmt: skip
    def recipe(lines: str) -> TeacherRecipe:
        return load_recipe(make_recipe(teacher_options=lines)).teacher

    with pytest.raises(ValueError, match=r"runs code from the Hub; set trust_remote_code = true"):
        recipe(f'attention = "{KERNEL}"')
    for name in ("kernels-community/flash-attn3", KERNEL[:-1], "flash", "flash_attention_1", "a@b"):
        with pytest.raises(ValueError, match=r"or a kernel of the Hub with its full commit"):
            recipe(f'attention = "{name}"\ntrust_remote_code = true')

    asked: dict[str, Any] = {}

    def from_pretrained(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    trusted = recipe(f'attention = "{KERNEL}"\ntrust_remote_code = true')
    source = resolve_teacher(trusted, Path(), KnownSources())
    with pytest.raises(ValueError, match=r"^teacher tiny: enough"):
        open_teacher(trusted, source, device="cpu")
    assert asked["attn_implementation"] == KERNEL
    assert asked["allow_all_kernels"] is True
    assert asked["trust_remote_code"] is False  # the directory's own code is not meant
