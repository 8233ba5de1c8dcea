"""Statistics of rounded logits: every stored value against float64 from the same hidden states, and the rare rows."""

import math

import pytest
import torch
from torch import Tensor

from builder.capture import distribution, rounding
from builder.capture.distribution import Distribution, capture
from builder.capture.draws import uniforms
from builder.teacher.model import Teacher
from builder.teacher.precision import Rounded
from logit_dataset.schema import FLOAT16_MIN
from tests.capture.test_distribution import half_spacing
from tests.teacher.test_model import make_model, random_sequences

CPU = torch.device("cpu")
VOCAB_SIZE, TOP_K, DRAWS = 3_001, 50, 4
SOFT_CAP = 5.0


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def teacher(request, tiny_tokenizer) -> Teacher:
    """In bfloat16; that of Gemma 2 has a soft-cap."""
    model = make_model(request.param, vocab_size=VOCAB_SIZE)
    return Teacher(model.to(torch.bfloat16), tiny_tokenizer, device=CPU)


def exact_logits(teacher: Teacher, sequences: list[list[int]]) -> Tensor:
    weight_VD = teacher.model.lm_head.weight.double()
    logits_NV = teacher.hidden(sequences).double() @ weight_VD.T
    if teacher.model.config.model_type == "gemma2":
        return SOFT_CAP * torch.tanh(logits_NV / SOFT_CAP)
    return logits_NV


def targets_of(sequences: list[list[int]]) -> Tensor:
    return torch.tensor([t for ids in sequences for t in [*ids[1:], -1]])


def captured(
    teacher: Teacher,
    sequences: list[list[int]],
    *,
    top_k: int = TOP_K,
    by: str = "rounded",
    **options: bool,
) -> Distribution:
    targets = targets_of(sequences)
    return capture(
        getattr(teacher, by)(sequences),
        targets,
        top_k=top_k,
        uniforms_NM=uniforms(0, "doc", 0, num_positions=len(targets), count=DRAWS),
        temperatures=(0.5, 2.0),
        **options,
    )


def assert_near(found: Tensor, expected: Tensor, beyond: float) -> None:
    """Float16 as near as it can be, and `beyond` nats."""
    expected = expected.clamp(min=FLOAT16_MIN)
    assert ((found.double() - expected).abs() <= half_spacing(expected) + beyond).all()


@pytest.mark.parametrize("top_k", [1, 50, 100, 600])
def test_every_value_is_near_that_of_the_hidden_states(teacher, top_k):
    sequences = random_sequences((33, 64, 17, 40, 1))
    logits_NV = exact_logits(teacher, sequences)
    found = captured(teacher, sequences, top_k=top_k)
    logprobs_NV = logits_NV.log_softmax(-1)
    ids_NK = found["topk_indices"].long()
    best_NK = logprobs_NV.topk(top_k).values
    # Entries of the list are the largest in their order, but for those that float32 cannot tell apart.
    torch.testing.assert_close(logprobs_NV.gather(1, ids_NK), best_NK, atol=2e-4, rtol=0)
    assert all(len(set(row)) == top_k for row in ids_NK.tolist())
    # The tail keeps its rounding, which moves the sum over all a little.
    assert_near(found["topk_logprobs"], logprobs_NV.gather(1, ids_NK), 2e-3)
    torch.testing.assert_close(
        found["logsumexp"].double(), logits_NV.logsumexp(-1), atol=2e-3, rtol=0
    )
    tail_N = logprobs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    assert_near(found["tail_logprob"], tail_N, 0.02)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    assert_near(found["entropy"], entropy_N, 0.01)
    targets_N = targets_of(sequences)
    has_target = targets_N >= 0
    target_N = logprobs_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    assert_near(found["target_logprob"][has_target], target_N[has_target], 2e-3)
    assert found["target_logprob"][~has_target].isnan().all()
    drawn_NM = found["tail_indices"].long()
    without = captured(teacher, sequences, top_k=top_k, draw_logprobs=False)
    assert set(found) - set(without) == {"tail_logprobs"}
    assert all(
        torch.equal(values, found[name])
        for name, values in without.items()
        if name != "target_logprob"
    )
    assert_near(found["tail_logprobs"], logprobs_NV.gather(1, drawn_NM), 2e-3)
    assert (found["tail_logprobs"] <= found["topk_logprobs"][:, -1:]).all()
    assert not (drawn_NM[:, :, None] == ids_NK[:, None]).any()
    mass_N = found["topk_logprobs"].double().exp().sum(-1) + found["tail_logprob"].double().exp()
    torch.testing.assert_close(mass_N, torch.ones_like(mass_N), atol=1e-3, rtol=0)
    for t in (0.5, 2.0):
        expected_N = (logits_NV / t).logsumexp(-1)
        torch.testing.assert_close(
            found[f"logsumexp_t{t:g}"].double(), expected_N, atol=4e-3, rtol=0
        )


def test_it_is_better_than_rounded_logits_by_far(tiny_tokenizer):
    model = make_model("llama", vocab_size=VOCAB_SIZE).to(torch.bfloat16)
    sequences = random_sequences((64,))
    errors = {}
    for how in ("float32", "teacher"):
        teacher = Teacher(model, tiny_tokenizer, device=CPU, head_dtype=how)
        logprobs_NV = exact_logits(teacher, sequences).log_softmax(-1)
        found = captured(teacher, sequences)
        ids_NK = found["topk_indices"].long()
        wanted_NK = logprobs_NV.gather(1, ids_NK)
        beyond = (found["topk_logprobs"] - wanted_NK).abs() - half_spacing(wanted_NK)
        errors[how] = float(beyond.clamp(min=0).mean())
    assert errors["float32"] < errors["teacher"] / 20


def test_draws_are_those_of_all_logits_in_float32(tiny_tokenizer):
    model = make_model("llama", vocab_size=VOCAB_SIZE).to(torch.bfloat16)
    teacher = Teacher(model, tiny_tokenizer, device=CPU)
    sequences = random_sequences((100, 90, 60))
    rounded, exact = (captured(teacher, sequences, by=by) for by in ("rounded", "logits"))
    assert (rounded["tail_indices"] == exact["tail_indices"]).float().mean() > 0.8
    assert (rounded["topk_indices"] == exact["topk_indices"]).float().mean() > 0.999


def piece_of(exact_NV: Tensor, dtype: torch.dtype = torch.bfloat16) -> Rounded:
    """Rounded logits whose exact ones are given: hidden states are the rows' numbers."""

    def pick(rows_R: Tensor, ids_RC: Tensor) -> Tensor:
        return exact_NV[rows_R[:, 0].long()].gather(1, ids_RC).float()

    return Rounded(
        logits_NV=exact_NV.to(dtype),
        hidden_ND=torch.arange(len(exact_NV))[:, None],
        picker=pick,
        all_of=lambda rows_R: exact_NV[rows_R[:, 0].long()].float(),
    )


def best(exact_NV: Tensor, top_k: int) -> Tensor:
    return exact_NV.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


@pytest.mark.parametrize("top_k", [1, 7, 50, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_of_rounded_logits_are_told_apart_however_many(top_k, dtype):
    torch.manual_seed(0)
    # Hundreds that round to the same few values, so that none of them can be left out.
    exact_NV = torch.rand(9, 5_003, dtype=torch.float64) * 10
    exact_NV[:, 1_000:1_400] = 20 + torch.rand(9, 400, dtype=torch.float64) / 16
    found = capture([piece_of(exact_NV, dtype)], torch.full((9,), 3), top_k=top_k)
    assert torch.equal(found["topk_indices"].long(), best(exact_NV, top_k))
    torch.testing.assert_close(
        found["logsumexp"].double(), exact_NV.logsumexp(-1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(("step", "anew"), [(0.015, []), (0.001, [5])])
def test_without_doubt_no_row_is_made_anew(monkeypatch, step, anew):
    """Between the 50th and the 72nd are 0.3 nats, more than rounding to sixteenths can move; or 0.02."""
    counted: list[int] = []

    def whole(piece: Rounded, rows_R: Tensor) -> Tensor:
        counted.append(len(rows_R))
        return piece.all_of(piece.hidden_ND[rows_R])

    monkeypatch.setattr(Rounded, "whole", whole)
    exact_NV = 30 - step * torch.arange(2_000).double().repeat(5, 1)
    exact_NV = exact_NV[:, torch.randperm(2_000, generator=torch.Generator().manual_seed(0))]
    found = capture([piece_of(exact_NV)], torch.full((5,), -1), top_k=50)
    assert counted == anew
    assert torch.equal(found["topk_indices"].long(), best(exact_NV, 50))


def test_a_target_from_outside_that_is_larger_than_the_kth(monkeypatch):
    monkeypatch.setattr(rounding, "SLACK", 0.0)
    exact_NV = torch.linspace(40, 0, 300, dtype=torch.float64)[None].clone()
    piece = piece_of(exact_NV)
    exact_NV[0, 200] = 39.95  # rounding has never moved anything as far; a broken head could
    found = capture([piece], torch.tensor([200]), top_k=5)
    assert torch.equal(found["topk_indices"].long(), best(exact_NV, 5))
    assert 200 in found["topk_indices"]


@pytest.mark.parametrize("finite", [0, 1, 19, 20, 71, 72, 73])
def test_fewer_finite_logits_than_are_looked_at(finite):
    torch.manual_seed(finite)
    exact_NV = torch.full((4, 500), -torch.inf, dtype=torch.float64)
    exact_NV[:, 37 : 37 + finite] = torch.randn(4, finite, dtype=torch.float64) * 5
    found = capture([piece_of(exact_NV)], torch.full((4,), 40), top_k=20)
    assert torch.equal(found["topk_indices"].long(), best(exact_NV, 20))
    if finite:
        expected = exact_NV.log_softmax(-1)[:, 40].clamp(min=FLOAT16_MIN)
        assert_near(found["target_logprob"], expected, 1e-5)
    else:
        assert not found["logsumexp"].isfinite().any()


@pytest.mark.parametrize("place", [3, 250])
def test_nan_is_seen(place):
    exact_NV = torch.randn(3, 500, dtype=torch.float64)
    exact_NV[1, place] = torch.nan
    found = capture([piece_of(exact_NV)], torch.tensor([1, 2, 3]), top_k=20)
    assert found["logsumexp"].isfinite().tolist() == [True, False, True]


def test_beyond_the_range_of_float16_the_exact_ones_count():
    exact_NV = torch.randn(2, 300, dtype=torch.float64)
    exact_NV[0, 7] = 70_000.0
    found = capture([piece_of(exact_NV, torch.float16)], torch.tensor([7, 7]), top_k=5)
    assert found["logsumexp"].isfinite().all()
    assert int(found["topk_indices"][0, 0]) == 7
    assert math.isclose(float(found["logsumexp"][0]), 70_000.0, rel_tol=1e-6)


@pytest.mark.parametrize("rows_at_once", [2, 3, 8])
def test_rows_worked_on_apart_are_those_of_a_whole_piece(monkeypatch, rows_at_once):
    """Some of them, anywhere in the piece, are made in float32 as a whole."""
    generator = torch.Generator().manual_seed(0)
    exact_NV = torch.randn(11, 1_000, dtype=torch.float64, generator=generator) * 5
    for row in (1, 4, 5, 10):  # more that round to the same values than are looked at
        exact_NV[row, 300:500] = 20 + torch.rand(200, dtype=torch.float64, generator=generator) / 16
    targets_N = torch.arange(11) * 90
    numbers_NM = uniforms(0, "doc", 0, num_positions=11, count=DRAWS)

    def found() -> Distribution:
        options = {"top_k": 20, "uniforms_NM": numbers_NM, "temperatures": (2.0,)}
        return capture([piece_of(exact_NV)], targets_N, **options)

    whole = found()
    monkeypatch.setattr(distribution, "CPU_WORKSPACE_BYTES", 4 * 1_024 * rows_at_once)
    apart = found()
    assert torch.equal(apart["topk_indices"].long(), best(exact_NV, 20))
    for name, values in whole.items():
        assert torch.equal(apart[name], values), name
