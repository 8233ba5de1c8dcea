"""A dataset of one exact entry and many draws goes through every door that one of a top 50 does."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from builder.build.build import build
from builder.capture.draws import uniforms
from builder.dataset.manifest import read_manifest
from builder.recipe.file import load_recipe
from logit_dataset import FrequentTokens, LogitCollator, distillation_loss, load_logits
from logit_dataset.trainers.evaluation import metrics, row_sums
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.verify.forging import forge
from tests.verify.test_verify import problems

DRAWS = 24
NARROW = ("narrow", "ids")
"""With the log-probabilities of draws, and without."""


@pytest.fixture(scope="module")
def base(tiny_teacher_dir, tmp_path_factory):
    """The dataset, and one that keeps the whole distributions of the same texts."""
    base = tmp_path_factory.mktemp("narrow")
    write_jsonl(base / "corpus.jsonl", sample_documents(12))
    for name, output in (
        ("narrow", f"top_k = 1\ntail_samples = {DRAWS}"),
        ("ids", f"top_k = 1\ntail_samples = {DRAWS}\ntail_logprobs = false"),
        ("whole", 'top_k = "all"'),
    ):
        text = recipe_text(tiny_teacher_dir, "corpus.jsonl", output=output)
        (base / f"{name}.toml").write_text(text)
        build(load_recipe(base / f"{name}.toml"), base, base / name)
    return base


@pytest.mark.parametrize("name", NARROW)
def test_the_commands_say_what_is_there(base, tiny_teacher_dir, tmp_path, cli, name):
    made, teacher = base / name, ["--teacher", tiny_teacher_dir]
    for arguments, expected in (
        (["verify", made, "--recompute", "3", *teacher], "100.00% of draws agree"),
        (["info", made], f"24 draws from the tail{'' if name == 'narrow' else ', ids alone'}\n"),
        (["info", made, "--row", "0", *teacher], "teacher expected"),
        (["info", made, "--row", "0", "--position", "2", *teacher], "such as"),
        (["card", made], ""),
        (["view", made, "--output", tmp_path / "page.html", *teacher], ""),
        (["plan", base / f"{name}.toml", "--tokens", "1e9"], "GB"),
        (
            ["build", base / f"{name}.toml", "--output", tmp_path / "none", "--dry-run"],
            f"tail_logprobs = {str(name == 'narrow').lower()}\n",
        ),
        (["export", made, "--output", tmp_path / "axolotl", "--to", "axolotl"], "tail draws"),
        (["export", made, "--output", tmp_path / "kit", "--to", "distillkit"], "tail draws"),
    ):
        code, out, err = cli(*arguments)
        assert code == 0, (arguments, err)
        assert expected in out + err, (arguments, out, err)
    card = (made / "README.md").read_text()
    assert "the most probable token with its true log-probability, the mass of all others" in card
    assert ("`tail_logprobs`" in card) is (name == "narrow")
    assert ("repeat its last id at −65504" in card) is (name == "narrow")
    assert ("tail_logprobs = false" in card) is (name == "ids")


def batch_of(dataset):
    return next(iter(load_logits(dataset).batches(batch_size=8, length=64, seed=None)))


def test_without_their_log_probabilities_all_else_is_the_same(base):
    narrow, ids = (
        pq.read_table(base / name / "data").drop_columns("id") for name in ("narrow", "ids")
    )
    assert ids.equals(narrow.drop_columns("tail_logprobs"))
    bytes_of = [read_manifest(base / name)["totals"]["bytes_per_token"] for name in ("narrow", "ids")]  # fmt: skip
    assert bytes_of[0] - bytes_of[1] > DRAWS


@pytest.mark.parametrize("to", ["axolotl", "distillkit", "maxtext"])
def test_exports_are_the_same_to_the_byte(base, tmp_path, cli, to):
    files = []
    for name in NARROW:
        code, _, err = cli("export", base / name, "--output", tmp_path / name, "--to", to)
        assert code == 0, err
        found = (path for path in (tmp_path / name).rglob("*") if path.is_file())
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in found})
        assert files[-1].pop(Path("README.md"))  # which names the dataset
    assert files[0]
    assert files[0] == files[1]


def test_the_teacher_gives_their_log_probabilities_back(base, tiny_model):
    """As the docs say."""
    narrow, ids = (
        load_dataset(str(base / name), split="train").with_format("torch") for name in NARROW
    )
    for stored, row in zip(narrow, ids, strict=True):
        with torch.no_grad():
            logprobs = tiny_model(row["input_ids"][None]).logits[0].log_softmax(-1)
        found = logprobs.gather(-1, row["tail_indices"])
        torch.testing.assert_close(found, stored["tail_logprobs"], atol=6e-3, rtol=0)


def test_evaluation_by_ids_alone_is_unbiased(base):
    """KL of any student, beside that of the whole distributions; and of the teacher itself, where it is 0."""
    ids, whole = batch_of(base / "ids"), batch_of(base / "whole")
    teacher = whole["logprobs"].float()
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    kls = []
    for logits in (teacher, teacher + noise, noise):
        sums = row_sums(logits, ids, loss="tail_draws", temperature=1.0)
        found = metrics(sums.sum(0), text_weight=0.0)["kl"]
        logq = logits.log_softmax(-1)
        p_NV = teacher[whole["mask"]].exp()
        expected = (p_NV * (teacher - logq)[whole["mask"]]).sum(-1).mean().item()
        # The standard error that the docstring of `evaluation` says: p_tail² Var_tail(log q) / M a position.
        tail_NV = p_NV.scatter(1, ids["topk_indices"][whole["mask"]].long(), 0)
        mass_N = tail_NV.sum(-1)
        q_NV, tail_NV = logq[whole["mask"]], tail_NV / mass_N[:, None]
        mean_N = (tail_NV * q_NV).sum(-1)
        variance_N = mass_N**2 * ((tail_NV * q_NV**2).sum(-1) - mean_N**2) / DRAWS
        error = (variance_N.sum().sqrt() / len(variance_N)).item()
        assert abs(found - expected) < 4 * error + 2e-3
        bound = distillation_loss(logits, ids, loss="tail_bucket").item()
        kls.append((found, expected, bound))
    assert abs(kls[0][1]) < 1e-4
    for found, _, bound in kls[1:]:
        assert bound < 0.8 * found  # which is what was reported without the draws


def test_evaluation_by_ids_alone_counts_the_loss_mask_alone(base):
    """Positions outside of it, as prompts are, have an entropy too."""
    ids = batch_of(base / "ids")
    some = ids["mask"] & (torch.arange(ids["mask"].shape[1]) % 2 == 0)
    batch = {**ids, "mask": some}
    assert (ids["entropy"][ids["mask"] & ~some] > 0).any()
    vocab_size = batch_of(base / "whole")["logprobs"].shape[-1]
    logits = torch.randn(*some.shape, vocab_size, generator=torch.Generator().manual_seed(2))
    sums = row_sums(logits, batch, loss="tail_draws", temperature=1.0)
    found = metrics(sums.sum(0), text_weight=0.0)["kl"]
    expected = (
        distillation_loss(logits, batch, loss="tail_draws") - ids["entropy"][some].double().mean()
    )
    assert abs(found - expected.item()) < 1e-3


def uniform_draws(rows):
    generator = np.random.default_rng(0)
    for row in rows:
        drawn = generator.integers(447, size=row["tail_indices"].shape)
        row["tail_indices"] = (drawn + (drawn >= row["topk_indices"])).astype(np.int32)


def the_token_that_follows(rows):
    for row in rows:
        follows = np.append(row["input_ids"][1:], 0)[:, None]
        free = follows != row["topk_indices"]
        row["tail_indices"][:] = np.where(free, follows, row["tail_indices"])


def draws_of_the_first(rows):
    for row in rows:
        row["tail_indices"][:, 1:] = row["tail_indices"][:, :1]


def draws_of_another_position(rows):
    for row in rows:
        moved = np.roll(row["tail_indices"], 1, 0)
        row["tail_indices"] = np.where(moved == row["topk_indices"], row["tail_indices"], moved)


def a_listed_draw(rows):
    rows[1]["tail_indices"][2, 3] = rows[1]["topk_indices"][2, 0]


@pytest.mark.parametrize(
    ("change", "message", "recomputed"),
    [
        (a_listed_draw, "a draw from the tail is in the top K (position 2)", ""),
        (the_token_that_follows, "the draws are not from the tail", ""),
        # This teacher knows nothing of what follows: its own draws are it no more often than others are.
        (uniform_draws, "", "are not those of the seed"),
        (draws_of_another_position, "", "are not those of the seed"),
        (draws_of_the_first, "", "are not those of the seed"),
    ],
)
def test_verify_finds_draws_that_are_others_by_their_ids(
    base, tiny_teacher_dir, tmp_path, change, message, recomputed
):
    shutil.copytree(base / "ids", tmp_path / "forged")
    assert problems(tmp_path / "forged") == []
    forge(tmp_path / "forged", change)
    found = problems(tmp_path / "forged")
    assert any(message in line for line in found) if message else found == []
    found = problems(tmp_path / "forged", tiny_teacher_dir, recompute=4)
    assert any(recomputed in line for line in found)


@pytest.mark.parametrize("name", NARROW)
def test_its_loss_is_unbiased(base, name):
    """Over all positions: Σ of its cross-entropies is that of the whole distributions, but for the noise of the draws."""
    narrow, whole = batch_of(base / name), batch_of(base / "whole")
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


@pytest.mark.parametrize("name", NARROW)
def test_small_vocabularies_and_collators_take_it(base, name):
    data = load_logits(base / name)
    projection = FrequentTokens.of(data, 50)
    batch = next(iter(data.project(projection).batches(batch_size=4, length=64, seed=None)))
    logits = torch.zeros(*batch["mask"].shape, 51, requires_grad=True)
    loss = distillation_loss(logits, batch, loss="tail_draws")
    # Of an even student every cross-entropy is log 51, if no mass was lost.
    assert loss.item() == pytest.approx(np.log(51), abs=2e-3)
    rows = load_dataset(str(base / name), split="train").with_format("torch")
    collated = LogitCollator.of(base / name)([rows[i] for i in range(4)])
    logits = torch.zeros(*collated["mask"].shape, data.vocab_size)
    loss = distillation_loss(logits, collated, loss="tail_draws")
    assert loss.item() == pytest.approx(np.log(data.vocab_size), abs=2e-3)
