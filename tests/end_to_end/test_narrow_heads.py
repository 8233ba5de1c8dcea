"""A dataset of one exact entry and many draws goes through every door that one of a top 50 does."""

import numpy as np
import pytest
import torch
from datasets import load_dataset

from builder.build.build import build
from builder.capture.draws import uniforms
from builder.recipe.file import load_recipe
from logit_dataset import FrequentTokens, LogitCollator, distillation_loss, load_logits
from tests.conftest import recipe_text, sample_documents, write_jsonl

DRAWS = 24


@pytest.fixture(scope="module")
def base(tiny_teacher_dir, tmp_path_factory):
    """The dataset, and one that keeps the whole distributions of the same texts."""
    base = tmp_path_factory.mktemp("narrow")
    write_jsonl(base / "corpus.jsonl", sample_documents(12))
    for name, output in (
        ("narrow", f"top_k = 1\ntail_samples = {DRAWS}"),
        ("whole", 'top_k = "all"'),
    ):
        text = recipe_text(tiny_teacher_dir, "corpus.jsonl", output=output)
        (base / f"{name}.toml").write_text(text)
        build(load_recipe(base / f"{name}.toml"), base, base / name)
    return base


def test_the_commands_say_what_is_there(base, tiny_teacher_dir, tmp_path, cli):
    made, teacher = base / "narrow", ["--teacher", tiny_teacher_dir]
    for arguments, expected in (
        (["verify", made, "--recompute", "3", *teacher], "100.00% of draws agree"),
        (["info", made], "24 draws from the tail"),
        (["info", made, "--row", "0", *teacher], "teacher expected"),
        (["info", made, "--row", "0", "--position", "2", *teacher], "such as"),
        (["card", made], ""),
        (["view", made, "--output", tmp_path / "page.html", *teacher], ""),
        (["plan", base / "narrow.toml", "--tokens", "1e9"], "GB"),
        (["export", made, "--output", tmp_path / "axolotl", "--to", "axolotl"], "tail draws"),
        (["export", made, "--output", tmp_path / "kit", "--to", "distillkit"], "tail draws"),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, (arguments, err)
        assert expected in out + err, (arguments, out, err)
    assert (
        "the most probable token with its true log-probability, the mass of all others"
        in (made / "README.md").read_text()
    )


def batch_of(dataset):
    return next(iter(load_logits(dataset).batches(batch_size=8, length=64, seed=None)))


def test_its_loss_is_unbiased(base):
    """Over all positions: Σ of its cross-entropies is that of the whole distributions, but for the noise of the draws."""
    narrow, whole = batch_of(base / "narrow"), batch_of(base / "whole")
    assert torch.equal(narrow["input_ids"], whole["input_ids"])
    vocab_size = whole["logprobs"].shape[-1]
    logits = torch.randn(
        *whole["mask"].shape, vocab_size, generator=torch.Generator().manual_seed(1)
    )
    logq = logits.log_softmax(-1)
    expected = -(whole["logprobs"].float().exp() * logq).sum(-1)[whole["mask"]]
    found = distillation_loss(logits, narrow, loss="tail_draws")
    # A draw's log q has a standard deviation of about 1 here.
    noise = 4 / (DRAWS * len(expected)) ** 0.5
    assert abs(found.item() - expected.mean().item()) < noise


def test_its_draws_are_those_of_the_seed_and_outside_the_top_1(base):
    data, whole = load_logits(base / "narrow"), load_logits(base / "whole")
    columns, all_of = (d.read(d.row_groups[0]).columns for d in (data, whole))
    top_N1, drawn_NM = columns["topk_indices"], columns["tail_indices"]
    assert (top_N1.shape[1], drawn_NM.shape[1]) == (1, DRAWS)
    assert not (drawn_NM == top_N1).any()
    table = load_dataset(str(base / "narrow"), split="train")
    length = len(table[0]["input_ids"])
    p_TV = np.exp(all_of["logprobs"][:length].astype("f8"))
    np.put_along_axis(p_TV, top_N1[:length], 0, axis=1)
    ends_TV = p_TV.cumsum(-1) / p_TV.sum(-1, keepdims=True)
    u_TM = uniforms(0, table[0]["id"], 0, num_positions=length, count=DRAWS).numpy()
    ids_TM = np.stack(
        [np.searchsorted(e, u, side="right") for e, u in zip(ends_TV, u_TM, strict=True)]
    )
    assert (
        ids_TM == drawn_NM[:length]
    ).mean() > 0.97  # float16 of the whole distribution moves some


def test_small_vocabularies_and_collators_take_it(base):
    data = load_logits(base / "narrow")
    projection = FrequentTokens.of(data, 50)
    batch = next(iter(data.project(projection).batches(batch_size=4, length=64, seed=None)))
    logits = torch.zeros(*batch["mask"].shape, 51, requires_grad=True)
    loss = distillation_loss(logits, batch, loss="tail_draws")
    # Of an even student every cross-entropy is log 51, if no mass was lost.
    assert loss.item() == pytest.approx(np.log(51), abs=2e-3)
    rows = load_dataset(str(base / "narrow"), split="train").with_format("torch")
    collated = LogitCollator.of(base / "narrow")([rows[i] for i in range(4)])
    logits = torch.zeros(*collated["mask"].shape, data.vocab_size)
    loss = distillation_loss(logits, collated, loss="tail_draws")
    assert loss.item() == pytest.approx(np.log(data.vocab_size), abs=2e-3)
