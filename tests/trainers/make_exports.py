"""What the checks of other trainers read: a dataset with draws and hidden states, its exports, and its teacher. Run by `make test-trainers`."""

import os
import shutil
from pathlib import Path

from builder.build.build import build
from builder.recipe import load_recipe
from logit_dataset.export.export import export
from tests.conftest import recipe_text, sample_documents, write_jsonl

OUT = Path(os.environ["TRAINER_EXPORTS"])
OUTPUT = "top_k = 64\ntail_samples = 8\nhidden_states = true"
EXPORTS = [
    *[("axolotl", "none"), ("axolotl", "draws")],
    *[("distillkit", "bucket"), ("distillkit", "draws")],
]


def test_exports(tiny_teacher_dir, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", sample_documents())
    (tmp_path / "recipe.toml").write_text(
        recipe_text(tiny_teacher_dir, "corpus.jsonl", output=OUTPUT)
    )
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, tmp_path / "out")
    shutil.copytree(tmp_path / "out", OUT / "dataset")
    shutil.copytree(tiny_teacher_dir, OUT / "teacher")
    for to, tail in EXPORTS:
        export(OUT / "dataset", OUT / f"{to}-{tail}", to=to, tail=tail)
