"""Datasets that pages are made of."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builder.build.build import build
from builder.recipe.file import load_recipe
from tests.build.test_chat_builds import write_recipe
from tests.chats import chatty_teacher
from tests.conftest import recipe_text, sample_documents, write_jsonl

HOSTILE = [
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">",
    "</script></main><h1>taken</h1><!-- ]]> {{ 7 * 7 }} {% raw %} ${title} `",
    "one\u202etxt.exe\u2066 two\u2029three\u0000four\u001b[31m five\u200bsix\ufeff \ttab\r\n",
    "&lt;b&gt; &amp; \" ' \\u003c <style>*{display:none}</style>",
]
"""Texts that want to be more than text."""


def build_of(directory: Path, recipe: str, rows: list[dict[str, Any]]) -> Path:
    """Build a dataset; where it lies."""
    directory.mkdir(exist_ok=True)
    write_jsonl(directory / "corpus.jsonl", rows)
    (directory / "recipe.toml").write_text(recipe, encoding="utf-8")
    build(load_recipe(directory / "recipe.toml"), directory, directory / "out")
    return directory / "out"


@pytest.fixture(scope="session")
def other_teacher(tiny_tokenizer, tiny_model, tmp_path_factory) -> Path:
    """The tiny teacher after a little training that went wrong."""
    import copy

    directory = tmp_path_factory.mktemp("other") / "other"
    model = copy.deepcopy(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += torch.randn_like(parameter) * 0.04
    model.save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pair(tiny_teacher_dir, other_teacher, tmp_path_factory) -> dict[str, Path]:
    """The same texts by two teachers, each with its top 20, draws and all probabilities. Read only."""
    base = tmp_path_factory.mktemp("pair")
    outputs = {"top": "tail_samples = 3", "all": 'top_k = "all"'}
    return {
        f"{which} {kind}": build_of(
            base / f"{which}-{kind}",
            recipe_text(teacher, "corpus.jsonl", output=output),
            sample_documents(9),
        )
        for which, teacher in (("one", tiny_teacher_dir), ("other", other_teacher))
        for kind, output in outputs.items()
    }


@pytest.fixture(scope="session")
def hostile(tiny_teacher_dir, tmp_path_factory) -> Path:
    """A dataset whose name, description, ids and texts are hostile. Read only."""
    rows = [{"id": text, "text": text} for text in HOSTILE]
    text = recipe_text(tiny_teacher_dir, "corpus.jsonl")
    text = text.replace(
        'name = "tiny"', "name = 'tiny'\ndescription = '<script>document.title = 1</script>'"
    )
    return build_of(tmp_path_factory.mktemp("hostile"), text, rows)


@pytest.fixture(scope="session")
def chatty_dir(tiny_tokenizer, tiny_model, tmp_path_factory) -> Path:
    return chatty_teacher(tiny_tokenizer, tiny_model, tmp_path_factory.mktemp("chatty") / "chatty")


@pytest.fixture(scope="session")
def chats(chatty_dir, tmp_path_factory) -> Path:
    """Chats, with distributions for completions only. Read only."""
    base = tmp_path_factory.mktemp("chats")
    recipe = write_recipe(base, chatty_dir, output="completions_only = true")
    build(load_recipe(recipe), base, base / "out")
    return base / "out"
