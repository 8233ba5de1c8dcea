"""The datasets that `reader_check` reads: every option that changes a column or its encoding. Run by `make test-reader`."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from builder.build.build import build
from builder.recipe.file import load_recipe
from builder.teacher.model import Teacher
from tests.build.test_chat_builds import chat_teacher, write_recipe  # noqa: F401 – a fixture
from tests.capture.test_completions import ALL, KEPT, MASKS, make_rows
from tests.capture.test_completions import dataset as dataset_of
from tests.conftest import TRAINING_TEXT, recipe_text, write_jsonl
from tests.logit_dataset.test_vocabulary import train_tokenizer

OUT = Path(os.environ["READER_DATASETS"])


def distinct():
    words = " ".join(TRAINING_TEXT).split()
    shuffler = random.Random(0)
    return [
        {"id": f"doc-{i}", "text": " ".join(shuffler.choices(words, k=5 + 11 * (i % 7)))}
        for i in range(24)
    ]


EVERYTHING = "tail_samples = 6\nseed = 3\ntemperatures = [2.0, 0.5]\nhidden_states = true"
CHOICES = {
    "plain": "",
    "everything": EVERYTHING,
    "compact": f'{EVERYTHING}\nprofile = "compact"\ntext = false',
    "whole": 'top_k = "all"\ntemperatures = [3]',
    "whole_compact": 'top_k = "all"\ntemperatures = [3]\nprofile = "compact"',
}


@pytest.mark.parametrize("name", CHOICES)
def test_texts(name, tiny_teacher_dir, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", distinct() if name == "plain" else distinct()[:10])
    options = {"output": CHOICES[name]} if CHOICES[name] else {}
    (tmp_path / "recipe.toml").write_text(recipe_text(tiny_teacher_dir, "corpus.jsonl", **options))
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, tmp_path / "out")
    shutil.copytree(tmp_path / "out", OUT / name)


@pytest.mark.parametrize("name", ["chats", "chats_kept"])
def test_chats(name, chat_teacher, tmp_path):  # noqa: F811
    output = "temperatures = [2.0]\nhidden_states = true\n"
    if name == "chats_kept":
        output += "completions_only = true"
    path = write_recipe(tmp_path, chat_teacher, output=output, sequences="max_length = 48")
    build(load_recipe(path), tmp_path, tmp_path / "out")
    shutil.copytree(tmp_path / "out", OUT / name)


def test_masks(tiny_model, tiny_tokenizer, monkeypatch):
    teacher = Teacher(tiny_model, tiny_tokenizer, device=torch.device("cpu"))
    monkeypatch.setattr("builder.dataset.shards.ROW_GROUP_TOKENS", 12)
    for name, layout in (("masks", ALL), ("masks_kept", KEPT)):
        dataset_of(OUT / name, teacher, layout, make_rows(MASKS * 4))


def test_tokenizers(tiny_tokenizer):
    student = train_tokenizer(300, text=TRAINING_TEXT[1:])
    (OUT / "teacher.tokenizer.json").write_text(tiny_tokenizer.backend_tokenizer.to_str())
    (OUT / "student.tokenizer.json").write_text(student.to_str())
