"""A tiny experiment: built, asked, and one batch of it."""

import pytest
import torch

from builder.build.build import build
from builder.recipe.file import load_recipe
from examples.experiment import truth
from examples.experiment.prepare import Place
from tests.conftest import recipe_text, sample_documents, write_jsonl

NUM_KEPT = 120


@pytest.fixture(scope="module")
def place(tiny_teacher_dir, tmp_path_factory):
    """A tiny experiment, prepared."""
    work = tmp_path_factory.mktemp("experiment")
    documents = sample_documents(60)
    write_jsonl(work / "corpus.jsonl", documents)
    recipe = recipe_text(tiny_teacher_dir, "corpus.jsonl")
    (work / "recipe.toml").write_text(recipe, encoding="utf-8")
    place = Place(
        work=work,
        num_kept=NUM_KEPT,
        length=64,
        recipe=work / "recipe.toml",
        teacher=tiny_teacher_dir,
    )
    build(load_recipe(place.recipe), work, place.dataset)
    truth.write_truth(place.dataset, place.parts, num_kept=NUM_KEPT, teacher_path=place.teacher)
    return place


def whole_batch(place, seed=0):
    """One batch of training data with the whole distribution, and random logits for it."""
    data = place.data()
    batches = data.part("train").batches(batch_size=4, length=64, packed=True, seed=seed)
    batch = data.with_whole(next(iter(batches)))
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch["mask"].shape, data.vocabulary.vocab_size)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch, (2 * logits).requires_grad_()


def teachers_whole(batch):
    """[N, V] float64 probabilities."""
    return batch["whole"].double().exp()
