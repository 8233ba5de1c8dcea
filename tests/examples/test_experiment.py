"""The experiment in miniature: what its teacher's pass writes, that its losses are what they say, resuming, and the report."""

import json
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import REPOSITORY, sample_documents
from tests.examples.conftest import NUM_KEPT, teachers_whole, whole_batch

sys.path.insert(0, str(REPOSITORY))

from filelock import FileLock

from examples.experiment import arms, corpus, measure, truth
from examples.experiment import runs as program
from examples.experiment import train as trainer
from examples.experiment.claims import CLAIMS
from examples.experiment.report import BEGIN, END, spread, write_report
from examples.experiment.train import train
from logit_dataset import load_logits

SMALL = {"steps": 6, "evaluate_every": 3, "batch_size": 2, "length": 64}


# The corpus


def test_no_paragraph_of_the_corpus_is_in_two_documents():
    seen = {}
    for name, text in corpus.documents().items():
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= corpus.SHORTEST_PARAGRAPH:
                assert seen.setdefault(words, name) == name
    parts = [corpus.part_of(name) for name in set(seen.values())]
    assert 0.7 < parts.count("train") / len(parts) < 0.9
    assert min(parts.count("test"), parts.count("validation")) >= 15


def test_the_quick_corpus_has_all_parts(tmp_path):
    corpus.write_corpus(tmp_path / "quick.jsonl", max_characters=program.QUICK.max_characters)
    names = [json.loads(line)["id"] for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert {corpus.part_of(name) for name in names} == set(corpus.PARTS)
    assert any(corpus.in_quarter(name) for name in names if corpus.part_of(name) == "train")


def test_a_shorter_corpus_is_the_beginning_of_the_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "documents", lambda: {f"d{i}": "x" * 100 for i in range(50)})
    corpus.write_corpus(tmp_path / "all.jsonl")
    corpus.write_corpus(tmp_path / "some.jsonl", max_characters=1_000)
    whole, some = (
        (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("all", "some")
    )
    assert len(whole) == 50
    assert some == whole[:10]


# The pass of the teacher


def test_parts_share_no_document_and_miss_none(place):
    ids = {
        part: set(pq.read_table(place.parts / part / "data")["id"].to_pylist())
        for part in (*corpus.PARTS, "quarter")
    }
    assert all(ids.values())
    assert ids["quarter"] < ids["train"]
    assert not ids["train"] & ids["test"]
    assert not ids["train"] & ids["validation"]
    assert ids["train"] | ids["test"] | ids["validation"] == {d["id"] for d in sample_documents(60)}


def test_the_whole_distribution_is_that_of_the_dataset(place):
    """Its sum is 1; at the listed ids that have a place, it has the stored values; `other` is the rest."""
    data = place.data()
    for part in (*corpus.PARTS, "quarter"):
        for group in load_logits(place.parts / part).row_groups:
            rows = data.part(part).read(group).columns
            logp_NS = data.whole[rows["position"]]
            np.testing.assert_allclose(np.exp(logp_NS.astype("f8")).sum(-1), 1, atol=1e-3)
            listed = rows["topk_indices"] >= 0
            assert listed.any()
            found = np.take_along_axis(logp_NS, np.maximum(rows["topk_indices"], 0), axis=1)
            np.testing.assert_allclose(
                found[listed].astype("f4"), rows["topk_logprobs"][listed].astype("f4"), atol=0.02
            )
            at_other = np.exp(logp_NS[:, -1].astype("f8"))
            assert (at_other > np.exp(rows["other_logprob"]) - 1e-3).all()


def test_draws_are_those_of_the_teacher_and_the_tail_is_outside_the_list(place):
    table = pq.read_table(place.parts / "train" / "data")
    assert table["samples"][0].as_py()[0] != table["samples"][1].as_py()[0]
    for row in table.slice(0, 5).to_pylist():
        for listed, drawn in zip(row["topk_indices"], row["tail_indices"], strict=True):
            assert not set(listed) & set(drawn)
            assert len(drawn) == 4


def test_draws_are_unbiased_and_never_of_mass_zero():
    logp = torch.tensor([[0.5, 0.0, 0.2, 0.0, 0.3, 0.0]]).log()
    uniform = torch.from_numpy(np.random.default_rng(0).random((1, 200_000)))
    counts = np.bincount(truth.draw(logp, uniform)[0], minlength=6) / 200_000
    np.testing.assert_allclose(counts, [0.5, 0, 0.2, 0, 0.3, 0], atol=0.004)
    edges = torch.tensor([[0.0, 0.5, 1 - 1e-16]], dtype=torch.float64)
    assert truth.draw(logp, edges).tolist() == [[0, 2, 4]]
    unnormalised = truth.draw(logp - 100, uniform)
    assert (unnormalised == truth.draw(logp, uniform)).mean() > 0.9999


def test_a_dataset_of_another_teacher_is_refused(place, tmp_path):
    dataset = tmp_path / "dataset"
    shutil.copytree(place.dataset, dataset)
    path = next(iter(sorted((dataset / "data").iterdir())))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["topk_logprobs"][0][0] -= 0.25
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(ValueError, match=r"topk_logprobs is 0\.2\d+ nats beyond rounding"):
        truth.write_truth(
            dataset, tmp_path / "parts", num_kept=NUM_KEPT, teacher_path=place.teacher
        )


def test_truth_goes_on_where_it_stopped_and_refuses_another_vocabulary(place, tmp_path):
    class Stop(Exception):
        pass

    done = []

    def stop(tokens):
        done.append(tokens)
        if len(done) == 2:
            raise Stop

    parts = tmp_path / "parts"
    with pytest.raises(Stop):
        truth.write_truth(
            place.dataset, parts, num_kept=NUM_KEPT, teacher_path=place.teacher, progress=stop
        )
    with pytest.raises(ValueError, match="another dataset or vocabulary"):
        truth.write_truth(place.dataset, parts, num_kept=NUM_KEPT - 1, teacher_path=place.teacher)
    rest = []
    truth.write_truth(
        place.dataset, parts, num_kept=NUM_KEPT, teacher_path=place.teacher, progress=rest.append
    )
    assert len(rest) == len(list((place.dataset / "data").iterdir())) - 2
    for name in ("whole.npy", "quarter/data/train-000-00000.parquet"):
        assert (parts / name).read_bytes() == (place.parts / name).read_bytes()


# The arms


def test_the_oracle_is_the_dense_cross_entropy(place):
    batch, logits = whole_batch(place)
    logq = logits[batch["mask"]].log_softmax(-1)
    expected = -(teachers_whole(batch) * logq).sum(-1).mean()
    loss = arms.whole(logits, {**batch, "whole": batch["whole"].double()})
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["samples", "tail_draws"])
def test_drawn_targets_are_unbiased_estimates_of_the_oracle(place, kind):
    """Drawn anew 400 times, their mean gradient is that of the whole distribution."""
    batch, logits = whole_batch(place)
    mask = batch["mask"]
    whole_NV = teachers_whole(batch)
    expected = torch.autograd.grad(arms.whole(logits, batch), logits)[0]
    rng = torch.Generator().manual_seed(1)
    losses, total = [], torch.zeros_like(logits)
    rest_NV = whole_NV.clone()
    listed_NK = batch["topk_indices"][mask].long()
    for column in listed_NK.T:  # what is left for the tail: whatever is not listed
        here = column >= 0
        rest_NV[here] = rest_NV[here].scatter(1, column[here][:, None], 0.0)
    rest_NV[:, -1] = (rest_NV[:, -1] - batch["other_logprob"][mask].exp()).clamp(min=0)
    for _ in range(400):
        drawn = dict(batch)
        if kind == "samples":
            ids = torch.multinomial(whole_NV, truth.SAMPLES, replacement=True, generator=rng)
            drawn["samples"] = batch["samples"].clone()
            drawn["samples"][mask] = ids.int()
        else:
            ids = torch.multinomial(rest_NV, 4, replacement=True, generator=rng)
            drawn["tail_indices"] = batch["tail_indices"].clone()
            drawn["tail_indices"][mask] = ids.int()
        loss = arms.ARMS[kind].loss(logits, drawn)
        losses.append(loss.item())
        total += torch.autograd.grad(loss, logits)[0]
    assert np.mean(losses) == pytest.approx(arms.whole(logits, batch).item(), abs=5e-3)
    error = (total / 400 - expected).norm() / expected.norm()
    assert error < 0.05


def test_hard_arms_learn_from_the_teacher_and_not_from_the_text(place):
    batch, logits = whole_batch(place)
    logq = logits[batch["mask"]].log_softmax(-1)
    argmax = teachers_whole(batch).argmax(-1)
    first = batch["topk_indices"][batch["mask"]][:, 0].long()
    argmax = first.where(first >= 0, place.data().frequent.other)
    sample = batch["samples"][batch["mask"]][:, 0].long()
    for name, ids in {"argmax": argmax, "sample": sample}.items():
        expected = -logq.gather(1, ids[:, None]).mean()
        torch.testing.assert_close(
            arms.ARMS[name].loss(logits, batch).double(), expected, rtol=0, atol=1e-5
        )
    known = batch["target_ids"] >= 0
    targets = batch["target_ids"][known].long()[:, None]
    text = -logits[known].log_softmax(-1).gather(1, targets).mean()
    torch.testing.assert_close(arms.text(logits, batch).double(), text, rtol=0, atol=1e-5)


# Measuring


def test_measures_of_the_teacher_as_its_own_student(place):
    data = place.data()
    batches = data.held_out("test", 64)
    numbers = measure.measure(lambda batch: batch["whole"].float(), batches)
    assert abs(numbers["kl"]) < 1e-3
    assert abs(numbers["entropy_gap"]) < 1e-3
    assert numbers["entropy_rank"] > 0.999
    ce, kl = measure.cross_entropy_and_kl(lambda batch: batch["whole"].float(), batches)
    assert ce == pytest.approx(numbers["ce"], abs=1e-6)
    assert kl == pytest.approx(numbers["kl"], abs=1e-6)


def test_cross_entropy_is_told_by_where_the_token_stands(place):
    batch, _ = whole_batch(place)
    other, mask = place.data().frequent.other, batch["mask"]
    top_NK = batch["topk_indices"][mask]
    expected, targets = defaultdict(list), []
    for number, (logq_V, top_K) in enumerate(zip(batch["whole"], top_NK.tolist(), strict=True)):
        listed = [i for i in top_K if i >= 0]
        rest = sorted({*range(NUM_KEPT)} - {*listed})
        where, ids = (("top_k", listed), ("tail", rest), ("other", [other]))[number % 3]
        targets.append(ids[number % len(ids)] if ids else -100)
        if ids:
            expected[where].append(-logq_V.double().log_softmax(-1)[targets[-1]].item())
    batch["target_ids"] = batch["target_ids"].clone()
    batch["target_ids"][mask] = torch.tensor(targets, dtype=torch.int32)
    numbers = measure.measure(lambda batch: batch["whole"].float(), [batch])
    assert set(expected) == {"top_k", "tail", "other"}
    for where, values in expected.items():
        assert numbers[f"ce_{where}"] == pytest.approx(np.mean(values), abs=1e-5)
    assert abs(numbers["tail_mass_gap"]) < 1e-6
    flat = measure.measure(lambda batch: torch.zeros(batch["whole"].shape), [batch])
    in_tail = [NUM_KEPT - sum(i >= 0 for i in top_K) for top_K in top_NK.tolist()]
    tail_mass = 1 - mass_outside_the_tail(batch, other)
    expected_gap = np.mean(in_tail) / (NUM_KEPT + 1) - tail_mass
    assert flat["tail_mass_gap"] == pytest.approx(expected_gap, abs=1e-5)


def mass_outside_the_tail(batch, other):
    """Mean mass of its top K that the student has, and of `other`."""
    sums = [
        sum(p_V[i] for i in {*top_K, other} if i >= 0)
        for p_V, top_K in zip(
            batch["whole"].double().exp().numpy(),
            batch["topk_indices"][batch["mask"]].tolist(),
            strict=True,
        )
    ]
    totals = batch["whole"].double().exp().sum(-1).numpy()
    return np.mean(np.array(sums) + 1 - totals)


def test_calibration_error_of_known_cases():
    confidence = np.array([0.9] * 10 + [0.3] * 10)
    right = np.array([1] * 9 + [0] + [1] * 6 + [0] * 4)
    assert measure.calibration_error(confidence, right) == pytest.approx(0.15)
    assert measure.rank_correlation(np.array([1.0, 5, 3]), np.array([2.0, 9, 4])) == pytest.approx(
        1
    )


# Running and reporting


def small_plan(**changes):
    plan = replace(
        program.QUICK,
        num_kept=NUM_KEPT,
        rates=(2e-3, 1e-2),
        rate_checks=("whole",),
        quarter_steps=SMALL["steps"],
        arms=("whole", "text", "tail_draws"),
        **SMALL,
    )
    return replace(plan, **changes)


def test_a_run_is_a_function_of_its_settings(place):
    settings = small_plan().settings("tail_draws", "quarter", 1, 2e-3)
    first, second = (train(settings, place.data()) for _ in range(2))
    for result in (first, second):
        del result["seconds"]
    assert first == second
    assert train(replace(settings, seed=2), place.data())["best"] != first["best"]


def test_all_arms_start_from_the_same_weights_and_see_the_same_batches(place):
    from examples.experiment.student import make_student

    a, b = (make_student(NUM_KEPT + 1, length=64, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    settings = small_plan().settings("text", "train", 3, 2e-3)
    streams = [place.data().training(replace(settings, arm=arm)) for arm in ("text", "whole")]
    for _, one, other in zip(range(4), *streams, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert "whole" not in one
        assert len(other["whole"]) == other["mask"].sum()


@pytest.fixture(autouse=True, scope="module")
def _write_little():
    before, trainer.WRITTEN_TOKENS = trainer.WRITTEN_TOKENS, 3
    yield
    trainer.WRITTEN_TOKENS = before


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    page = results.parent / f"{results.name}.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n", encoding="utf-8")
    program.experiment(small_plan(), place, results, workers=1)
    return results, page


def test_resuming_skips_what_is_done_and_does_what_is_not(place, finished, monkeypatch, tmp_path):
    results = shutil.copytree(finished[0], tmp_path / "results")
    names = {path.name for path in results.glob("*-rate*.json")}
    assert len(names) == 8  # three arms with all and a quarter, two of them at another rate, too
    (results / "tail_draws-quarter-0-rate0.002.json").unlink(missing_ok=True)
    (results / "tail_draws-quarter-0-rate0.01.json").unlink(missing_ok=True)
    done = []
    monkeypatch.setattr(program, "_run", lambda s, *_: done.append(s.name) or s.name)
    program.experiment(small_plan(), place, results, workers=1)
    assert [name[:18] for name in done] == ["tail_draws-quarter"]


def test_runs_in_processes_of_their_own_give_the_same(place, finished, tmp_path):
    plan = small_plan()
    program.run_all(plan.to_choose_rate(), place, tmp_path, workers=2)
    for settings in plan.to_choose_rate():
        one, other = (
            json.loads((results / settings.name).read_text()) for results in (finished[0], tmp_path)
        )
        assert one["curve"] == other["curve"]


def test_a_run_that_another_process_is_at_is_left_to_it(place, tmp_path, capsys):
    settings = small_plan().settings("text", "train", 0, 2e-3)
    with FileLock(tmp_path / f".{settings.name}.lock"):
        program.run_all([settings], place, tmp_path, workers=1)
    assert "another process is at it" in capsys.readouterr().err
    assert not (tmp_path / settings.name).exists()


def test_results_of_other_settings_are_not_mixed_in(place, finished):
    with pytest.raises(ValueError, match="is of other settings or other data"):
        program.experiment(small_plan(steps=7), place, finished[0], workers=1)


def test_results_of_other_data_are_not_mixed_in(place, finished, tmp_path):
    results = shutil.copytree(finished[0], tmp_path / "results")
    settings = small_plan().to_choose_rate()[0]
    result = json.loads((results / settings.name).read_text())
    result["made_of"]["dataset"] = "another"
    (results / settings.name).write_text(json.dumps(result))
    with pytest.raises(ValueError, match="other data"):
        program.run_all([settings], place, results, workers=1)


def test_the_report_renders_what_is_there(finished):
    results, page = finished
    write_report(results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "stale" not in text
    for number, (name, arm) in enumerate(arms.ARMS.items(), 1):
        times = 3 if name in small_plan().arms else 1  # two tables of results, and that of costs
        assert text.count(f"| {number} {arm.title} |") == times
    for name in ("curves", "arms"):
        assert (results / f"{name}.svg").read_text().endswith("</svg>\n")
    write_report(results, page)
    assert page.read_text(encoding="utf-8") == text


def test_the_page_finds_its_pictures_from_anywhere(finished, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    write_report(finished[0], page)
    pictures = re.findall(r"!\[.*\]\((.*)\)", page.read_text(encoding="utf-8"))
    assert [(tmp_path / picture).is_file() for picture in pictures] == [True, True]


def fake(ce, curve=((1, 9.0),)):
    points = [{"step": step, "ce": value, "kl": 0.0} for step, value in curve]
    return {"best": {"ce": ce, "ece": 0.0, "entropy_gap": 0.0}, "curve": points}


def test_verdicts():
    claim = CLAIMS["1a"]
    texts = {seed: fake(5.0) for seed in range(3)}

    def verdict(*values):
        return claim.verdict(
            {("text", "train"): texts, ("tail_draws", "train"): dict(enumerate(map(fake, values)))}
        )

    assert verdict(4.9, 4.8, 4.9) == "holds"
    assert verdict(4.9, 4.8, 5.1) == "undecided: seeds differ"
    assert verdict(5.1, 5.2, 4.9) == "**refuted**"
    assert verdict(4.9, 4.8) == "undecided: too few seeds so far"


def test_where_text_is_as_good_as_the_whole_distribution_there_is_no_share():
    """Each arm is worse than text; (text − arm) / (text − whole) would be 2."""
    results = {
        (arm, "train"): {seed: fake(ce) for seed in range(3)}
        for arm, ce in {"text": 5.0, "tail_draws": 5.2, "whole": 5.1}.items()
    }
    assert CLAIMS["4"].verdict(results) == "undecided: text was as good as the whole distribution"
    assert spread(CLAIMS["4"].values(results)) == "–"


def test_share_and_steps():
    results = {
        ("text", "train"): {s: fake(5.0, [(50, 5.2), (100, 5.0), (150, 5.1)]) for s in range(3)},
        ("tail_draws", "train"): {s: fake(4.55, [(50, 4.9), (100, 4.6)]) for s in range(3)},
        ("whole", "train"): {s: fake(4.5) for s in range(3)},
    }
    assert CLAIMS["4"].values(results) == pytest.approx([0.9] * 3)
    assert CLAIMS["8"].values(results) == [50, 50, 50]
    assert CLAIMS["5"].values(results) == []


def test_the_docs_say_what_the_results_are():
    results = REPOSITORY / "examples" / "experiment" / "results"
    rate = json.loads((results / "plan.json").read_text())["rate"]
    page = (REPOSITORY / "docs" / "experiment.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| .*\d \|$", line)]
    assert len(rows) == len(arms.ARMS)
    for (name, arm), row in zip(arms.ARMS.items(), rows, strict=True):
        best = {
            data: [
                json.loads(path.read_text())["best"]
                for path in sorted(results.glob(f"{name}-{data}-*-rate{rate:g}.json"))
            ]
            for data in ("train", "quarter")
        }
        assert len(best["train"]) == len(best["quarter"]) == (3 if arm.has_seeds else 1)
        assert row[1] == f"{arm.raw_bytes:,}"
        assert row[2] == spread([run["ce"] for run in best["train"]])
        assert row[3] == spread([run["ce"] for run in best["quarter"]])
        assert row[4] == f"{spread([run['kl'] for run in best['train']])} |"
