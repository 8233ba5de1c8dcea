"""Splits of a token's bytes: their draws come from outside of their own top K, their losses are unbiased, and their kinds what they say."""

import json
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from examples.experiment import arms, truth
from examples.experiment import runs as program
from examples.experiment import train as trainer
from examples.experiment.report import BEGIN, END, spread
from examples.experiment.splits.draws import HEADS, MOST_DRAWS, Split
from examples.experiment.splits.frontier import FRONTIER, frontier
from examples.experiment.splits.report import target_bytes, write_frontier
from examples.experiment.splits.sizes import (
    DRAW_LOGPROB_BYTES,
    STATISTICS,
    TARGET,
    write_sizes,
)
from examples.experiment.train import Settings, train
from logit_dataset import load_logits
from tests.conftest import REPOSITORY
from tests.examples.conftest import whole_batch


def rows_of(place, split, part="train"):
    """Rows of the part in the teacher's vocabulary, as the split has them."""
    data = place.data()
    loaded = load_logits(place.parts / part)
    return [data.splits.told(split, loaded.read(group)) for group in loaded.row_groups]


@pytest.mark.parametrize("k", HEADS)
def test_draws_and_tail_are_of_what_is_outside_the_top_k(place, k):
    for rows in rows_of(place, Split(k, MOST_DRAWS)):
        listed, drawn = rows.columns["topk_indices"], rows.columns["tail_indices"]
        assert (listed.shape[1], drawn.shape[1]) == (min(k, 20), MOST_DRAWS)  # it stores 20
        assert not (listed[:, None, :] == drawn[:, :, None]).any()
        mass = np.exp(rows.columns["topk_logprobs"].astype("f8")).sum(-1)
        tail = np.exp(rows.columns["tail_logprob"].astype("f8"))
        np.testing.assert_allclose(mass + tail, 1, atol=1e-3)


@pytest.mark.parametrize("k", HEADS)
def test_draws_follow_the_teacher(place, k):
    """Σ over positions of the estimate of E[f] is that under the whole distribution, for a random f of the student's ids."""
    data = place.data()
    f_S = np.random.default_rng(k).standard_normal(data.vocabulary.vocab_size)
    errors = []
    for rows in rows_of(place, Split(k, MOST_DRAWS)):
        columns = rows.columns
        p_NS = np.exp(data.whole[columns["position"]].astype("f8"))
        place_V = data.vocabulary.place_V
        head = np.exp(columns["topk_logprobs"].astype("f8")) * f_S[place_V[columns["topk_indices"]]]
        tail = np.exp(columns["tail_logprob"].astype("f8"))
        drawn = tail * f_S[place_V[columns["tail_indices"]]].mean(-1)
        errors.append(head.sum(-1) + drawn - p_NS @ f_S)
    errors = np.concatenate(errors)
    assert abs(errors.mean()) < 4 * errors.std() / len(errors) ** 0.5 + 1e-3


def test_draws_are_fixed_by_the_document_and_nested(place):
    few, many = (rows_of(place, Split(1, m))[0].columns["tail_indices"] for m in (4, 24))
    assert (few == many[:, :4]).all()


def split_batch(place, name, seed=0):
    data = place.data()
    part = data.part("train", arms.arm_of(name).split)
    batch = next(iter(part.batches(batch_size=4, length=64, packed=True, seed=seed)))
    return data.with_whole(batch)


@pytest.mark.parametrize("name", ["0+4", "1+24", "50+4", "0+24-heavy", "0+4-damped"])
def test_the_loss_of_a_split_is_that_of_its_estimate(place, name):
    """Against p̂ made id by id in float64."""
    batch = split_batch(place, name)
    _, logits = whole_batch(place)
    mask = batch["mask"]
    p_NV = batch["whole"].double().exp()
    told_NV = torch.zeros_like(p_NV)
    weights = torch.ones(batch["tail_indices"].shape[-1], dtype=torch.float64)
    weights /= len(weights)
    if name.endswith("heavy"):
        first = arms.heavy_weight(24)
        weights[:] = (1 - first) / 23
        weights[0] = first
        assert (weights**2).sum() == pytest.approx(1 / 4)
        assert weights.sum() == pytest.approx(1)
    for n, (ids, logp) in enumerate(
        zip(batch["topk_indices"][mask], batch["topk_logprobs"][mask].double(), strict=True)
    ):
        for i, value in zip(ids.tolist(), logp.tolist(), strict=True):
            if i >= 0:
                told_NV[n, i] += np.exp(value)
        told_NV[n, -1] += batch["other_logprob"][mask][n].double().exp()
        tail = batch["tail_logprob"][mask][n].double().exp()
        for i, weight in zip(batch["tail_indices"][mask][n].tolist(), weights, strict=True):
            told_NV[n, i] += tail * weight
    if name.endswith("damped"):
        left = (4 / 24) ** 0.5
        told_NV = p_NV + left * (told_NV - p_NV)
    expected = -(told_NV * logits[mask].log_softmax(-1)).sum(-1).mean()
    loss = arms.arm_of(name).loss(logits, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_every_arm_of_the_plan_is_known_and_starts_as_all_others(place):
    streams = []
    for settings in FRONTIER.runs():
        assert settings.arm in arms.ARMS or arms.arm_of(settings.arm).split.top_k in HEADS
    for arm in ("text", "0+4", "50+24"):
        settings = Settings(
            arm=arm, data="train", seed=3, rate=1e-3, steps=4, evaluate_every=2, batch_size=2, length=64
        )  # fmt: skip
        streams.append(place.data().training(settings))
    for one, two, three in zip(*streams, strict=False):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["input_ids"], three["input_ids"])
        break
    with pytest.raises(ValueError, match="no arm '50-4'"):
        arms.arm_of("50-4")


def test_a_run_ends_where_it_gets_no_better(place, monkeypatch):
    monkeypatch.setattr(trainer, "WRITTEN_TOKENS", 3)
    values = iter([5.0, 4.0, 4.5, 4.2, 4.1, 3.0])
    monkeypatch.setattr(trainer, "cross_entropy_and_kl", lambda *_: (next(values), 0.0))
    settings = Settings(
        arm="0+4", data="quarter", seed=0, rate=1e-3, steps=60, evaluate_every=2, batch_size=2, length=64, patience=6
    )  # fmt: skip
    result = train(settings, place.data())
    assert [point["ce"] for point in result["curve"]] == [5.0, 4.0, 4.5, 4.2, 4.1]
    assert result["best_step"] == 4


def test_another_pass_writes_the_same_splits(place, tmp_path):
    truth.write_truth(place.dataset, tmp_path, num_kept=120, teacher_path=place.teacher)
    for k in HEADS:
        for name in ("draws", "tail"):
            file = f"{name}-{k}.npy"
            assert (tmp_path / file).read_bytes() == (place.parts / file).read_bytes()
    assert pq.read_table(tmp_path / "test" / "data").num_rows


@pytest.fixture(scope="module")
def sizes(place, tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "bytes.json"
    write_sizes(place, path)
    return path


def test_sizes_are_those_of_files_and_errors_those_of_estimates(place, sizes):
    found = json.loads(sizes.read_text())
    assert set(found["splits"]["0+4"]) == {"tail_indices", *STATISTICS}
    assert set(found["splits"]["1+24"]) == {*TARGET, *STATISTICS}
    of = {split: columns["tail_indices"] for split, columns in found["splits"].items()}
    assert of["0+4"] < of["0+24"] < of["0+50"] <= 4 * MOST_DRAWS + 1
    data = place.data()
    part, errors = data.part("validation", Split(0, 4)), []
    for group in part.row_groups:
        columns = part.read(group).columns
        for row, ids in zip(columns["position"], columns["tail_indices"], strict=True):
            told_V = np.bincount(ids, minlength=data.vocabulary.vocab_size) / 4
            errors.append(((told_V - np.exp(data.whole[row].astype("f8"))) ** 2).sum())
    assert found["squared_error"]["0+4"] == pytest.approx(np.mean(errors), rel=1e-3)


def result(arm, data, seed, ce):
    best = {"ce": ce, "kl": 1.0, "ece": 0.02, "entropy_rank": 0.3, "acceptance": 0.4}
    settings = {"arm": arm, "data": data, "seed": seed}
    return {"settings": settings, "best": best, "best_step": 100, "seconds": 60.0}


def test_the_report_says_what_the_results_are(sizes, tmp_path):
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    shutil.copy(sizes, results)
    ces = {"text": 5.0, "whole": 4.0, "50+4": 4.2, "1+24": 4.1, "0+24-heavy": 4.3}
    for arm, ce in ces.items():
        for seed in range(3):
            (results / f"{arm}-quarter-{seed}-rate0.002.json").write_text(
                json.dumps(result(arm, "quarter", seed, ce + seed / 100))
            )
    (results / "plan.json").write_text(json.dumps(asdict(FRONTIER)))
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    write_frontier(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n15 of ")
    assert text.endswith(f"{END}\nafter\n")
    assert "| S1 | 1 entry and 24 draws teach more than 50 entries and 4 draws |" in text
    assert "0.100 0.100 0.100 | 0 | holds |" in text
    table = text.split("### With a quarter")[1].split("###")[0]
    rows = {line.split(" | ")[0]: line.split(" | ") for line in table.splitlines()}
    row = rows["| 1 + 24"]
    assert row[3:5] == ["4.110 ± 0.010", "90% ± 0%"]
    assert rows["| 0 + 24, heavy"][4] == "70% ± 0%"
    picture = (results / "pareto.svg").read_text()
    assert ">1+24<" in picture
    assert "heavy" not in picture
    write_frontier(results, page)
    assert page.read_text() == text


def test_the_docs_say_what_the_results_are():
    results = REPOSITORY / "examples/experiment/results/splits"
    sizes = json.loads((results / "bytes.json").read_text())
    page = (REPOSITORY / "docs/splits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \+ (\d+) \| .*", page, flags=re.MULTILINE)
    assert len(rows) >= 4
    for k, m in rows:
        row = re.search(rf"^\| {k} \+ {m} \| (.*) \|$", page, flags=re.MULTILINE)
        cells = row[1].split(" | ")
        runs = [
            json.loads(path.read_text())
            for path in sorted(results.glob(f"{k}+{m}-quarter-*-rate0.002.json"))
        ]
        split = Split(int(k), int(m))
        assert cells[0] == f"{target_bytes(sizes, split):.1f}"
        size = sum(sizes["splits"][str(split)].values())
        assert cells[1] == f"{size + DRAW_LOGPROB_BYTES * split.num_draws:.1f}"
        assert cells[2:6] == [
            *(f"{size:.1f}", f"{size:.0f} GB", f"{size / 10:.1f} TB", f"{size:.1f} TB")
        ]
        assert cells[6] == f"{sizes['squared_error'][str(split)]:.4f}"
        assert cells[7] == spread([run["best"]["ce"] for run in runs])
        assert cells[8] == spread([run["best"]["kl"] for run in runs])
        assert cells[9] == ", ".join(str(run["settings"]["seed"]) for run in runs)


def test_a_plan_is_run_resumed_and_reported(place, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "WRITTEN_TOKENS", 3)
    results, page = tmp_path / "results", tmp_path / "page.md"
    plan = replace(
        FRONTIER,
        batch_size=2,
        length=64,
        steps=8,
        evaluate_every=4,
        patience=8,
        larger_rate=2e-3,
        stages=((("text", "whole", "0+4"), "quarter", (0,)), (("1+24",), "train", (0,))),
        larger=((("0+4",), "quarter", (0,)),),
    )
    frontier(plan, place, results, workers=1)
    made = {path.name for path in results.glob("*-rate0.002.json")}
    assert made == {
        f"{run}-0-rate0.002.json"
        for run in (
            *("text-quarter", "whole-quarter", "0+4-quarter", "1+24-train"),
            "0+4-quarter-larger",
        )
    }
    small, larger = (
        json.loads((results / f"0+4-quarter{name}-0-rate0.002.json").read_text())
        for name in ("", "-larger")
    )
    assert larger["parameters"] > 5 * small["parameters"]
    # Files of before there were two students do not say which, and count.
    del small["settings"]["student"]
    (results / "0+4-quarter-0-rate0.002.json").write_text(json.dumps(small))
    monkeypatch.setattr(program, "_run", lambda *_: pytest.fail("it was done"))
    frontier(plan, place, results, workers=1)
    page.write_text(f"{BEGIN}\n{END}\n")
    write_frontier(results, page)
    assert "5 of 5 runs" in page.read_text()
    assert "Not complete" not in page.read_text()
    assert "### With all data\n" in page.read_text()
    assert "### With a quarter of the data, a student of 5.3 million parameters" in page.read_text()
