"""The GPU's kernels, run step by step on the CPU: the same cases against the same float64 reference as the plain way, and equal draws."""

import math

import pytest
import torch

pytest.importorskip("triton")

from builder.capture import distribution, kernels
from builder.capture.draws import uniforms
from tests.capture import test_distribution as plain
from tests.capture import test_draws as draws
from tests.capture.test_distribution import random_logits, spread_targets

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the plain tests run on the GPU there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of −inf − −inf
]
DTYPES = pytest.mark.parametrize("dtype", plain.FLOATS, ids=str)


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch):
    original, calls = kernels.capture_rows, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(kernels, "capture_rows", counted)
    monkeypatch.setattr(distribution, "_has_kernels", lambda _, top_k, __: top_k != "all")
    yield
    assert calls, "this test did not come to the kernels"


@DTYPES
@pytest.mark.parametrize(
    ("vocab_size", "top_k"),
    [(4096, 1), (5003, 50), (5003, 128), (20_000, 50), (128, 128), (50, 50), (5, 2), (1, 1)],
)
def test_random_logits(vocab_size, top_k, dtype):
    plain.test_random_logits(vocab_size, top_k, dtype)


@pytest.mark.parametrize("top_k", [1, 50, 100])
@pytest.mark.parametrize("value", [0.0, -7.25, 80.0])
def test_all_equal_logits_give_the_lowest_ids(value, top_k):
    plain.test_all_equal_logits_give_the_lowest_ids(value, top_k)


@DTYPES
@pytest.mark.parametrize("top_k", [1, 50])
def test_ties_go_to_the_lower_id(top_k, dtype):
    plain.test_ties_go_to_the_lower_id(top_k, dtype)


def test_minus_zero_ties_with_zero():
    plain.test_minus_zero_ties_with_zero()


def test_ties_across_the_edge_of_the_top_k_are_cut_by_id():
    plain.test_ties_across_the_edge_of_the_top_k_are_cut_by_id()


@pytest.mark.parametrize("top_k", [1, 20, 50])
def test_masked_entries(top_k):
    plain.test_masked_entries(top_k)
    plain.test_whole_blocks_of_masked_entries(top_k)


@DTYPES
@pytest.mark.parametrize("finite", [1, 19, 20])
def test_fewer_finite_logits_than_top_k(finite, dtype):
    plain.test_fewer_finite_logits_than_top_k(finite, dtype)


@pytest.mark.parametrize("peak", [80.0, 300.0, 3e4])
@pytest.mark.parametrize("top_k", [1, 5])
def test_a_peak_does_not_make_the_tail_underflow(peak, top_k):
    plain.test_a_peak_does_not_make_the_tail_underflow(peak, top_k)


def test_edges_of_float16_and_of_texts():
    plain.test_a_tiny_tail_is_exact_where_one_minus_the_sum_would_cancel()
    plain.test_values_below_the_range_of_float16_are_clamped()
    plain.test_no_target_is_nan_and_only_there()


@DTYPES
def test_a_target_in_the_top_k_has_the_same_bits_in_both_columns(dtype):
    logits_NV = random_logits(8, 3001, seed=5).to(dtype)
    by_rank_NV = logits_NV.float().sort(dim=-1, descending=True, stable=True).indices
    found = distribution.capture([logits_NV], by_rank_NV[:, 24], top_k=50)  # a column: strided
    assert torch.equal(found["topk_indices"][:, 24], by_rank_NV[:, 24].int())
    listed_N = found["topk_logprobs"][:, 24]
    assert torch.equal(listed_N.view(torch.int16), found["target_logprob"].view(torch.int16))


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 500, 1002])
def test_nan_and_infinity_show_in_the_logsumexp_of_their_row_alone(position, poison):
    plain.test_nan_and_infinity_show_in_the_logsumexp_of_their_row_alone(
        poison, torch.float32, position, plain.TOP_20
    )


@pytest.mark.parametrize("top_k", [1, 20])
def test_a_row_of_nothing_but_minus_infinity_is_not_finite(top_k):
    plain.test_a_row_of_nothing_but_minus_infinity_is_not_finite(top_k)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 100.0])
def test_other_temperatures(temperature):
    plain.test_other_temperatures(temperature, torch.float32, 20)
    plain.test_other_temperatures_change_no_other_column()


@pytest.mark.parametrize(
    "case",
    [
        *("top 1", "masked", "one finite in the tail", "a peak inside the tail", "far apart"),
        *("peak 300: the tail is 0 in float32", "float16", "the tail within the candidates"),
    ],
)
def test_no_draw_is_in_the_head_or_ruled_out(case):
    draws.test_no_draw_is_in_the_head_or_ruled_out(case)


@pytest.mark.parametrize("case", ["masked", "ties at the edge"])
def test_evenly_spaced_numbers_give_each_token_its_share(case):
    """As for the plain way, with as many numbers as a row can have."""
    logits_NV, top_k = draws.CASES[case]
    rows = 8
    count = rows * kernels.MAX_DRAWS
    spaced = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = distribution.capture(
        [logits_NV.expand(rows, -1)],
        torch.zeros(rows, dtype=torch.long),
        top_k=top_k,
        uniforms_NM=spaced.view(rows, -1),
    )
    drawn_V = torch.bincount(found["tail_indices"].flatten(), minlength=logits_NV.shape[1])
    expected_V = count * draws.tail_of(logits_NV, found)
    assert ((drawn_V - expected_V).abs() <= 1.01 + expected_V * 1e-5).all()


@DTYPES
@pytest.mark.parametrize(("vocab_size", "top_k", "scale"), [(5003, 50, 3.0), (9_001, 20, 1.0)])
def test_draws_and_all_else_are_those_of_the_plain_way(
    vocab_size, top_k, scale, dtype, monkeypatch
):
    rows = 16
    logits_NV = random_logits(rows, vocab_size, scale=scale).to(dtype)
    targets_N = torch.tensor(spread_targets(rows, vocab_size))
    options = {
        "top_k": top_k,
        "uniforms_NM": uniforms(0, "doc", 0, num_positions=rows, count=kernels.MAX_DRAWS),
        "temperatures": (0.5, 2.0),
    }
    by_kernels = distribution.capture([logits_NV], targets_N, **options)
    monkeypatch.setattr(distribution, "_has_kernels", lambda *_: False)
    expected = distribution.capture([logits_NV], targets_N, **options)
    assert by_kernels.keys() == expected.keys()
    same = by_kernels["tail_indices"] == expected["tail_indices"]
    assert same.double().mean() >= 0.999
    for name, values in expected.items():
        assert by_kernels[name].dtype == values.dtype, name
        if name.startswith("tail_") and values.ndim == 2:
            continue
        torch.testing.assert_close(by_kernels[name], values, rtol=1e-3, atol=2e-6)
    assert torch.equal(by_kernels["topk_indices"], expected["topk_indices"])


def test_leaving_out_the_log_probabilities_of_draws_changes_no_other_column():
    logits_NV = torch.cat([random_logits(3, 2000), torch.full((1, 2000), -torch.inf)])
    logits_NV[3, :10] = 0  # nothing is outside a top 10
    options = {"top_k": 10, "uniforms_NM": uniforms(0, "doc", 0, num_positions=4, count=24)}
    targets_N = torch.tensor(spread_targets(4, 2000))
    expected = distribution.capture([logits_NV], targets_N, **options)
    found = distribution.capture([logits_NV], targets_N, draw_logprobs=False, **options)
    assert list(found) == [name for name in expected if name != "tail_logprobs"]
    for name, column in found.items():
        assert torch.equal(column, expected[name]), name
    assert (found["tail_indices"][3] == found["topk_indices"][3, -1]).all()


def test_rows_that_are_apart_in_memory_and_no_rows():
    wide_NV = random_logits(4, 2000)
    options = {"top_k": 10}
    targets_N = torch.tensor(spread_targets(4, 900))
    apart = distribution.capture([wide_NV[:, :900]], targets_N, **options)
    whole = distribution.capture([wide_NV[:, :900].contiguous()], targets_N, **options)
    for name, values in whole.items():
        assert torch.equal(apart[name], values), name
    none = distribution.capture([wide_NV[:0]], targets_N[:0], **options)
    assert none["topk_indices"].shape == (0, 10)
