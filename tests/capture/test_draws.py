"""Draws from the tail: who determines them, that they follow the teacher's probabilities, and that they never hit the head."""

import math

import pytest
import torch
from torch import Tensor

from builder.capture.distribution import capture
from builder.capture.draws import invert, uniforms
from logit_dataset.schema import FLOAT16_MIN

# Uniform numbers


def numbers(seed: int = 0, document: str = "doc", chunk: int = 0, **shape: int) -> Tensor:
    return uniforms(seed, document, chunk, **{"num_positions": 64, "count": 4, **shape})


def test_uniform_numbers_depend_on_seed_document_and_chunk_alone():
    assert torch.equal(numbers(), numbers())
    others = [
        *(numbers(seed=1), numbers(document="doc2"), numbers(chunk=1)),
        *(numbers(document="0 doc"), numbers(document="doc 1"), numbers(document="Grüße 🙂")),
    ]
    for other in others:
        assert not (other == numbers()).any()
    assert torch.equal(numbers(num_positions=9), numbers()[:9])


def test_uniform_numbers_are_the_same_everywhere():
    """Written down once: another platform or version of numpy that gives others would give other datasets."""
    found = uniforms(7, "The quick brown fox", 3, num_positions=2, count=2)
    expected = [0.9012953906383193, 0.6915347948272942, 0.6017417195788517, 0.4296784044784755]
    assert found.flatten().tolist() == expected


def test_uniform_numbers_are_uniform():
    found = numbers(num_positions=10_000, count=8)
    assert found.dtype == torch.float64
    assert 0 <= found.min() < found.max() < 1
    counts = torch.histc(found, bins=100, min=0, max=1).double()
    assert ((counts - 800) ** 2 / 800).sum() < 99 + 5 * math.sqrt(2 * 99)
    assert abs(torch.corrcoef(torch.stack([found[:-1, 0], found[1:, 0]]))[0, 1]) < 0.05


# Draws


def logits_with(vocab_size: int, *, seed: int = 0, scale: float = 3.0, **entries: float) -> Tensor:
    """[1, V]; entries name ids, e.g. i7=80.0."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(1, vocab_size, generator=generator) * scale
    for name, value in entries.items():
        logits_NV[0, int(name[1:])] = value
    return logits_NV


def masked(logits_NV: Tensor, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return logits_NV.masked_fill(
        torch.rand(logits_NV.shape, generator=generator) < share, -math.inf
    )


CASES = {
    "plain": (logits_with(1003), 20),
    "top 1": (logits_with(1003), 1),
    "large vocabulary": (logits_with(49_152), 50),
    "all but one": (logits_with(300), 299),
    "all but three": (logits_with(300), 297),
    "all equal": (torch.zeros(1, 777), 50),
    "ties at the edge": (torch.randn(1, 900).round(), 100),
    "masked": (masked(logits_with(2003), 0.7), 20),
    "one finite in the tail": (torch.full((1, 400), -math.inf).index_fill(1, torch.arange(90, 111), 1.0), 20),
    "peak 80": (logits_with(1003, i500=80.0), 1),
    "peak 300: the tail is 0 in float32": (logits_with(1003, i500=300.0), 1),
    "two peaks": (logits_with(1003, i500=300.0, i3=200.0), 1),
    "a peak inside the tail": (logits_with(1003, i500=300.0, i3=200.0, i900=199.0), 2),
    "far below zero": (logits_with(1003) - 2e3, 20),
    "far above zero": (logits_with(1003) + 2e3, 20),
    "far apart": (logits_with(1003, scale=300.0), 5),
    "bfloat16": (logits_with(1003).bfloat16(), 20),
    "float16": (logits_with(1003).half(), 20),
    "the tail within the candidates": (logits_with(40), 7),
}  # fmt: skip


def draws_of(logits_NV: Tensor, top_k: int, uniforms_NM: Tensor) -> dict[str, Tensor]:
    targets_N = torch.zeros(len(logits_NV), dtype=torch.long)
    return capture([logits_NV], targets_N, top_k=top_k, uniforms_NM=uniforms_NM)


def tail_of(logits_NV: Tensor, found: dict[str, Tensor]) -> Tensor:
    """[V] float64: the true distribution outside the top K."""
    rest_V = logits_NV[0].double().index_fill(0, found["topk_indices"][0].long(), -math.inf)
    return rest_V.softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_evenly_spaced_numbers_give_each_token_its_share_exactly(case):
    """The inverse of a cumulated distribution gives every token an interval as long as its probability."""
    logits_NV, top_k = CASES[case]
    count = 100_000
    spaced_1M = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[None]
    found = draws_of(logits_NV, top_k, spaced_1M)
    drawn_V = torch.bincount(found["tail_indices"][0], minlength=logits_NV.shape[1])
    expected_V = count * tail_of(logits_NV, found)
    # An interval's two ends, and float32's rounding of the logits' differences.
    steps = 2e-7 * logits_NV.double().masked_fill(logits_NV.isinf(), 0).abs().max()
    assert ((drawn_V - expected_V).abs() <= 1.01 + expected_V * (1e-5 + 4 * steps)).all()


@pytest.mark.parametrize("case", CASES)
def test_no_draw_is_in_the_head_or_ruled_out(case):
    logits_NV, top_k = CASES[case]
    edges = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-40, 1 - 2.0**-53], dtype=torch.float64)
    found = draws_of(
        logits_NV, top_k, torch.cat([edges, numbers(num_positions=500).flatten()])[None]
    )
    drawn = found["tail_indices"][0].long()
    assert not torch.isin(drawn, found["topk_indices"][0]).any()
    assert (drawn < logits_NV.shape[1]).all()
    assert (logits_NV[0, drawn] > -math.inf).all()
    expected = logits_NV[0].double().log_softmax(-1)[drawn].clamp(min=FLOAT16_MIN)
    stored = found["tail_logprobs"][0].double()
    torch.testing.assert_close(stored, expected, rtol=2**-11, atol=1e-3)


def test_a_number_that_rounding_made_one_hits_the_last_token_that_has_a_probability():
    weights_RB = torch.tensor([[0.3, 0.0, 1.7, 0.0, 0.0], [0.0, 1e-30, 0.0, 0.0, 0.0]])
    index_RM, within_RM = invert(weights_RB, torch.tensor([[0.0, 1.0], [0.0, 1.0]]).double())
    assert index_RM.tolist() == [[0, 2], [1, 1]]
    assert (within_RM[:, 0] == 0).all()
    assert (within_RM[:, 1] > 1 - 1e-9).all()


@pytest.mark.parametrize("case", ["plain", "top 1", "large vocabulary", "masked", "bfloat16"])
def test_head_and_draws_give_expectations_without_bias(case):
    logits_NV, top_k = CASES[case]
    count = 40_000
    vocab_size = logits_NV.shape[1]
    found = draws_of(logits_NV, top_k, numbers(document=case, num_positions=1, count=count))
    probs_V = logits_NV[0].double().softmax(-1)
    head, drawn = found["topk_indices"][0].long(), found["tail_indices"][0].long()
    tail = found["tail_logprob"][0].double().exp()
    values = torch.Generator().manual_seed(1)
    for f_V in (
        torch.rand(vocab_size, generator=values).double(),
        torch.linspace(0, 1, vocab_size).double() ** 3,  # would show a drift along the vocabulary
        probs_V.log().clamp(min=-1e4),
        (torch.arange(vocab_size) % 64 == 63).double(),  # … or within blocks
    ):
        estimate = (probs_V[head] * f_V[head]).sum() + tail * f_V[drawn].mean()
        error = tail * f_V[drawn].std() / math.sqrt(count)
        rounding = 2**-11 * tail * (f_V[drawn].abs().mean() + 1)
        assert abs(estimate - (probs_V * f_V).sum()) < 5 * error + rounding


@pytest.mark.parametrize(
    "case", ["plain", "large vocabulary", "peak 300: the tail is 0 in float32"]
)
def test_frequencies_pass_a_chi_square_test(case):
    logits_NV, top_k = CASES[case]
    count = 60_000
    found = draws_of(logits_NV, top_k, numbers(document=case, num_positions=1, count=count))
    expected_V = count * tail_of(logits_NV, found)
    drawn_V = torch.bincount(found["tail_indices"][0], minlength=len(expected_V)).double()
    common_V = expected_V >= 10
    expected = torch.cat([expected_V[common_V], expected_V[~common_V].sum()[None]])
    drawn = torch.cat([drawn_V[common_V], drawn_V[~common_V].sum()[None]])
    degrees = len(expected) - 1
    assert degrees > 70
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("logits_NV", "top_k"),
    [
        (logits_with(100), 100),
        (torch.full((1, 400), -math.inf).index_fill(1, torch.tensor([9, 70, 350]), 1.0), 3),
        (torch.full((1, 400), -math.inf).index_fill(1, torch.tensor([9, 70, 350]), 1.0), 20),
        (torch.zeros(1, 1), 1),
    ],
)
def test_where_there_is_no_tail_the_last_id_stands_in_and_counts_nothing(logits_NV, top_k):
    found = draws_of(logits_NV, top_k, numbers(num_positions=1))
    assert found["tail_logprob"].item() == FLOAT16_MIN
    assert found["tail_indices"].tolist() == [[found["topk_indices"][0, -1].item()] * 4]
    assert found["tail_logprobs"].tolist() == [[FLOAT16_MIN] * 4]


def test_a_tail_below_the_range_of_float16_is_still_drawn_from():
    logits_NV = logits_with(300, i7=1e6)
    found = draws_of(logits_NV, 1, numbers(num_positions=1, count=200))
    assert len(set(found["tail_indices"][0].tolist())) > 10
    assert 7 not in found["tail_indices"]
    assert (found["tail_logprobs"] == FLOAT16_MIN).all()


def test_a_drawn_target_has_the_same_bits_in_both_columns():
    logits_NV = logits_with(500).expand(400, -1)
    targets_N = torch.arange(400)
    found = capture(
        [logits_NV], targets_N, top_k=5, uniforms_NM=numbers(num_positions=400, count=50)
    )
    hits_NM = found["tail_indices"] == targets_N[:, None]
    assert hits_NM.sum() > 20
    targets_NM = found["target_logprob"][:, None].expand(hits_NM.shape)
    assert torch.equal(found["tail_logprobs"][hits_NM], targets_NM[hits_NM])


@pytest.mark.parametrize("case", CASES)
def test_leaving_out_the_log_probabilities_of_draws_changes_no_other_column(case):
    logits_NV, top_k = CASES[case]
    options = {"top_k": top_k, "uniforms_NM": numbers(num_positions=len(logits_NV), count=24)}
    expected = capture([logits_NV], torch.zeros(len(logits_NV), dtype=torch.long), **options)
    found = capture(
        [logits_NV], torch.zeros(len(logits_NV), dtype=torch.long), draw_logprobs=False, **options
    )
    assert list(found) == [name for name in expected if name != "tail_logprobs"]
    for name, column in found.items():
        assert torch.equal(column, expected[name]), name


def test_asking_for_draws_changes_no_other_column():
    logits_NV = torch.cat([CASES["plain"][0], CASES["peak 80"][0], masked(logits_with(1003), 0.99)])
    targets_N = torch.tensor([1, 2, 3])
    without = capture([logits_NV], targets_N, top_k=20)
    found = capture([logits_NV], targets_N, top_k=20, uniforms_NM=numbers(num_positions=3))
    assert set(found) - set(without) == {"tail_indices", "tail_logprobs"}
    for name, column in without.items():
        assert torch.equal(found[name], column), name
