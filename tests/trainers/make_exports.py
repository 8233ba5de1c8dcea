"""What the checks of other trainers read: a dataset with draws and hidden states, its exports, and its teacher. Run by `make test-trainers`."""

import copy
import os
import shutil
from pathlib import Path

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset.export.export import export
from tests.conftest import recipe_text, sample_documents, write_jsonl

OUT = Path(os.environ["TRAINER_EXPORTS"])
OUTPUT = "top_k = 64\ntail_samples = 8\nhidden_states = true"
EXPORTS = [
    *[("axolotl", "none"), ("axolotl", "draws")],
    *[("distillkit", "bucket"), ("distillkit", "draws")],
]


def test_exports(tiny_model, tiny_tokenizer, tmp_path):
    # DistillKit cuts a student's logits to the tokenizer's ids.
    teacher = copy.deepcopy(tiny_model)
    teacher.resize_token_embeddings(len(tiny_tokenizer))
    teacher.lm_head.weight.data *= 1.5  # so that one position off is far off
    for part in (teacher, tiny_tokenizer):
        part.save_pretrained(OUT / "teacher")
    write_jsonl(tmp_path / "corpus.jsonl", sample_documents())
    (tmp_path / "recipe.toml").write_text(
        recipe_text((OUT / "teacher").resolve(), "corpus.jsonl", output=OUTPUT)
    )
    build(load_recipe(tmp_path / "recipe.toml"), tmp_path, tmp_path / "out")
    shutil.copytree(tmp_path / "out", OUT / "dataset")
    for to, tail in EXPORTS:
        export(OUT / "dataset", OUT / f"{to}-{tail}", to=to, tail=tail)
