"""`capture` against a float64 reference that sorts in plain Python, and the invariants of what is stored."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builder.capture import distribution
from builder.capture.distribution import Distribution, capture, concatenate
from builder.capture.draws import uniforms
from logit_dataset.schema import FLOAT16_MIN

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Everything that can be asked for, of three positions.
TOP_20 = {
    "top_k": 20,
    "temperatures": (0.5, 2.0),
    "uniforms_NM": uniforms(0, "doc", 0, num_positions=3, count=4),
}
ALL = {"top_k": "all", "temperatures": (0.5, 2.0)}
FLOAT16_NAMES = ("topk_logprobs", "tail_logprob", "target_logprob", "entropy")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small only wait for a second thread, for long where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def log_sum_exp(values: list[float]) -> float:
    peak = max(values, default=-math.inf)
    if peak == -math.inf:
        return -math.inf
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def reference(logits: list[float], target: int, top_k: int) -> dict:
    """Every statistic of one row by its definition, in Python's floats; not yet clamped to float16's range."""
    by_rank = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    logsumexp = log_sum_exp(logits)
    logprobs = [logit - logsumexp for logit in logits]
    return {
        "topk_indices": by_rank[:top_k],
        "topk_logprobs": [logprobs[i] for i in by_rank[:top_k]],
        "tail_logprob": log_sum_exp([logits[i] for i in by_rank[top_k:]]) - logsumexp,
        "target_logprob": logprobs[target] if target >= 0 else math.nan,
        "logsumexp": logsumexp,
        "entropy": -math.fsum(math.exp(p) * p for p in logprobs if p > -math.inf),
    }


def half_spacing(values: Tensor) -> Tensor:
    """Largest error of rounding to float16."""
    exponent = torch.frexp(values.abs().double().clamp(min=2.0**-14)).exponent
    return 2.0 ** (exponent.double() - 12)


def float32_rounding(logits_NV: Tensor) -> Tensor:
    """[N]; float32's steps grow with the logits."""
    return 1e-5 + 2e-7 * logits_NV.double().masked_fill(logits_NV.isinf(), 0).abs().amax(-1)


def assert_equals_reference(logits_NV: Tensor, targets: list[int], top_k: int) -> Distribution:
    found = capture([logits_NV], torch.tensor(targets), top_k=top_k)
    rows = [
        reference(row, target, top_k)
        for row, target in zip(logits_NV.double().tolist(), targets, strict=True)
    ]
    expected = {name: torch.tensor([row[name] for row in rows]).double() for name in rows[0]}
    assert torch.equal(found["topk_indices"].double(), expected["topk_indices"])
    rounding_N = float32_rounding(logits_NV)
    for name in FLOAT16_NAMES:
        stored, wanted = found[name].double(), expected[name].clamp(min=FLOAT16_MIN)
        assert found[name].dtype == torch.float16, name
        assert torch.equal(stored.isnan(), wanted.isnan()), name
        rounding = rounding_N[:, None] if wanted.ndim == 2 else rounding_N
        error = ((stored - wanted).abs() - half_spacing(wanted) - rounding).nan_to_num()
        assert error.max() <= 0, f"{name} is {error.max():.3g} beyond the rounding of its type"
    assert found["topk_indices"].dtype == torch.int32
    assert found["logsumexp"].dtype == torch.float32
    torch.testing.assert_close(
        found["logsumexp"].double(), expected["logsumexp"], rtol=1e-5, atol=1e-5
    )
    return found


def random_logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def spread_targets(num_rows: int, vocab_size: int) -> list[int]:
    return [(i * 7919) % vocab_size for i in range(num_rows)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "top_k"),
    [
        (4096, 1),
        (4096, 50),
        (4096, 1000),
        (5003, 1),  # prime: the last block is not full
        (5003, 50),
        (5003, 1000),
        (49_152, 50),
        (777, 777),
        (512, 512),
        (50, 50),
        (5, 2),
        (1, 1),
    ],
)
def test_random_logits(vocab_size, top_k, dtype):
    num_rows = 2 if vocab_size > 10_000 else 6
    logits_NV = random_logits(num_rows, vocab_size).to(dtype)
    assert_equals_reference(logits_NV, spread_targets(num_rows, vocab_size), top_k)


@pytest.mark.parametrize("top_k", [1, 50, 1000])
@pytest.mark.parametrize("value", [0.0, -7.25, 80.0])
def test_all_equal_logits_give_the_lowest_ids(value, top_k):
    found = assert_equals_reference(torch.full((2, 1003), value), [0, 1002], top_k)
    assert found["topk_indices"][0].tolist() == list(range(top_k))
    assert found["entropy"][0].item() == pytest.approx(math.log(1003), abs=4e-3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("top_k", [1, 50, 333])
def test_ties_go_to_the_lower_id(top_k, dtype):
    generator = torch.Generator().manual_seed(1)
    logits_NV = torch.randint(-2, 3, (8, 1501), generator=generator).to(dtype)
    assert_equals_reference(logits_NV, spread_targets(8, 1501), top_k)


def test_minus_zero_ties_with_zero():
    logits_NV = torch.where(torch.arange(700) % 3 == 0, 0.0, -0.0)[None]
    logits_NV[0, 600:] = -1.0
    found = assert_equals_reference(logits_NV, [1], 50)
    assert found["topk_indices"][0].tolist() == list(range(50))


def test_ties_across_the_edge_of_the_top_k_are_cut_by_id():
    logits_NV = torch.zeros(1, 4096)
    best = [4095, 4000, 2048, 17]
    logits_NV[0, best] = 5.0
    logits_NV[0, [9, 3000]] = 6.0
    found = assert_equals_reference(logits_NV, [0], 4)
    assert found["topk_indices"][0].tolist() == [9, 3000, 17, 2048]


@pytest.mark.parametrize("top_k", [1, 20, 50, 2003])
def test_masked_entries(top_k):
    vocab_size = 2003
    generator = torch.Generator().manual_seed(2)
    masked = torch.rand(4, vocab_size, generator=generator) < 0.7
    logits_NV = random_logits(4, vocab_size, seed=2).masked_fill(masked, -torch.inf)
    assert_equals_reference(logits_NV, spread_targets(4, vocab_size), top_k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("finite", [1, 19, 20])
def test_fewer_finite_logits_than_top_k(finite, dtype):
    """The rest of the list is filled by the lowest masked ids at float16's lowest value; no tail is left."""
    top_k, vocab_size = 20, 1000
    logits_NV = torch.full((1, vocab_size), -torch.inf)
    logits_NV[0, torch.arange(finite) * 47 + 60] = torch.arange(finite) * 0.5
    found = assert_equals_reference(logits_NV.to(dtype), [0], top_k)
    assert found["topk_logprobs"][0].isfinite().all()
    assert found["topk_indices"][0, finite:].tolist() == list(range(top_k - finite))
    assert found["topk_logprobs"][0, finite:].tolist() == [FLOAT16_MIN] * (top_k - finite)
    assert found["tail_logprob"].item() == FLOAT16_MIN
    assert found["target_logprob"].item() == FLOAT16_MIN


@pytest.mark.parametrize("top_k", [1, 50, 1003])
def test_whole_blocks_of_masked_entries(top_k):
    """A block of nothing but −inf makes no NaN, be it searched or not, first or last."""
    logits_NV = random_logits(3, 1003, seed=3)
    width = distribution.WIDE
    logits_NV[0, :width] = -torch.inf
    logits_NV[1, 1003 // width * width - width :] = -torch.inf
    logits_NV[2, width : 3 * width] = -torch.inf
    assert_equals_reference(logits_NV, [0, 1002, 500], top_k)


@pytest.mark.parametrize("peak", [80.0, 300.0, 1000.0, 3e4])
@pytest.mark.parametrize("top_k", [1, 5])
def test_a_peak_does_not_make_the_tail_underflow(peak, top_k):
    """exp(−300) is 0 in float32, but the tail's logarithm is an ordinary number."""
    logits_NV = random_logits(3, 2000, seed=4, scale=1.0)
    for row, position in enumerate((0, 777, 1999)):
        logits_NV[row, position] = peak
    found = assert_equals_reference(logits_NV, [0, 0, 0], top_k)
    assert (found["tail_logprob"].float() + peak).abs().max() < 10 + peak * 2**-11
    assert (found["entropy"] >= 0).all()


def test_a_tiny_tail_is_exact_where_one_minus_the_sum_would_cancel():
    logits_NV = torch.full((1, 1000), -25.0)
    logits_NV[0, :50] = torch.linspace(0, 3, 50)
    found = assert_equals_reference(logits_NV, [999], 50)
    log_mass = math.log(950) - 25 - torch.linspace(0, 3, 50).double().logsumexp(0).item()
    assert found["tail_logprob"].item() == pytest.approx(log_mass, abs=0.01)


def test_values_below_the_range_of_float16_are_clamped():
    logits_NV = torch.zeros(1, 300)
    logits_NV[0, 7] = 1e6
    found = assert_equals_reference(logits_NV, [3], 10)
    assert found["topk_logprobs"][0].tolist() == [0.0, *[FLOAT16_MIN] * 9]
    assert found["tail_logprob"].item() == FLOAT16_MIN
    assert found["target_logprob"].item() == FLOAT16_MIN


def test_no_target_is_nan_and_only_there():
    found = capture([random_logits(4, 600)], torch.tensor([-1, 5, -1, 599]), top_k=10)
    assert found["target_logprob"].isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_target_in_the_top_k_has_the_same_bits_in_both_columns(dtype):
    logits_NV = random_logits(64, 3001, seed=5).to(dtype)
    for rank in (0, 1, 24, 49):
        by_rank_NV = logits_NV.float().sort(dim=-1, descending=True, stable=True).indices
        targets_N = by_rank_NV[:, rank]
        found = capture([logits_NV], targets_N, top_k=50)
        matches_NK = found["topk_indices"] == targets_N[:, None]
        assert (matches_NK.sum(-1) == 1).all()
        listed_N = found["topk_logprobs"][matches_NK]
        assert torch.equal(listed_N.view(torch.int16), found["target_logprob"].view(torch.int16))


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("position", [0, 500, 1002])
@pytest.mark.parametrize("options", [TOP_20, ALL], ids=["top 20", "all"])
def test_nan_and_infinity_show_in_the_logsumexp_of_their_row_alone(
    poison, dtype, position, options
):
    logits_NV = random_logits(3, 1003).to(dtype)
    clean = capture([logits_NV], torch.tensor([1, 2, 3]), **options)
    logits_NV[1, position] = poison
    found = capture([logits_NV], torch.tensor([1, 2, 3]), **options)
    assert found["logsumexp"].isfinite().tolist() == [True, False, True]
    for name in found:
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]]), name


@pytest.mark.parametrize("top_k", [1, 20, 333])
def test_a_row_of_nothing_but_minus_infinity_is_not_finite(top_k):
    logits_NV = random_logits(2, 333)
    logits_NV[0] = -torch.inf
    found = capture([logits_NV], torch.tensor([0, 0]), top_k=top_k)
    assert found["logsumexp"].isfinite().tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 3 * 4 * 1024, 2**26])
@pytest.mark.parametrize("options", [TOP_20, ALL], ids=["top 20", "all"])
def test_the_size_of_the_workspace_changes_nothing(monkeypatch, workspace_bytes, dtype, options):
    logits_NV = random_logits(17, 1003, seed=6).to(dtype)
    targets_N = torch.tensor(spread_targets(17, 1003))
    if "uniforms_NM" in options:
        uniforms_NM = uniforms(0, "doc", 0, num_positions=17, count=4)
        options = options | {"uniforms_NM": uniforms_NM}
    expected = capture([logits_NV], targets_N, **options)
    monkeypatch.setattr(distribution, "CPU_WORKSPACE_BYTES", workspace_bytes)
    for pieces in ([logits_NV], logits_NV.split([1, 5, 11])):
        found = capture(pieces, targets_N, **options)
        assert set(found) == set(expected)
        for name in found:
            assert torch.equal(found[name], expected[name]), name


def test_concatenate_keeps_the_order_of_the_parts():
    logits_NV, targets_N = random_logits(9, 400), torch.tensor(spread_targets(9, 400))
    whole = capture([logits_NV], targets_N, top_k=7)
    parts = [
        capture([logits_NV[start:stop]], targets_N[start:stop], top_k=7)
        for start, stop in ((0, 4), (4, 5), (5, 9))
    ]
    joined = concatenate(parts)
    assert list(joined) == list(whole)
    for name in whole:
        assert torch.equal(joined[name], whole[name]), name
    alone = concatenate(parts[1:2])
    assert torch.equal(alone["topk_indices"], whole["topk_indices"][4:5])


def test_the_input_is_left_as_it_was():
    logits_NV = random_logits(3, 512)
    before = logits_NV.clone()
    capture([logits_NV], torch.tensor([1, 2, 3]), top_k=50)
    assert torch.equal(logits_NV, before)


# The whole distribution, and other temperatures


def assert_whole_equals_reference(logits_NV: Tensor, targets: list[int]) -> None:
    found = capture([logits_NV], torch.tensor(targets), top_k="all")
    assert set(found) == {"logprobs", "target_logprob", "logsumexp", "entropy"}
    logprobs_NV = logits_NV.double().log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp(min=-1e30)).sum(-1)
    rounding_N = float32_rounding(logits_NV)
    wanted = {"logprobs": logprobs_NV.clamp(min=FLOAT16_MIN), "entropy": entropy_N}
    for name, expected in wanted.items():
        assert found[name].dtype == torch.float16
        assert found[name].shape == expected.shape
        rounding = rounding_N[:, None] if expected.ndim == 2 else rounding_N
        error = (found[name].double() - expected).abs() - half_spacing(expected) - rounding
        assert error.max() <= 0, f"{name} is {error.max():.3g} beyond the rounding of its type"
    logsumexp_N = logits_NV.double().logsumexp(-1)
    torch.testing.assert_close(found["logsumexp"].double(), logsumexp_N, rtol=1e-5, atol=1e-5)
    rows_N = torch.arange(len(targets))
    assert torch.equal(found["target_logprob"], found["logprobs"][rows_N, torch.tensor(targets)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 777, 5003])
def test_the_whole_distribution(vocab_size, dtype):
    logits_NV = random_logits(6, vocab_size).to(dtype)
    assert_whole_equals_reference(logits_NV, spread_targets(6, vocab_size))


@pytest.mark.parametrize("peak", [80.0, 300.0, 3e4])
def test_the_whole_of_a_peaked_or_masked_distribution(peak):
    logits_NV = random_logits(3, 1003, seed=7)
    logits_NV[0, 500] = peak
    logits_NV[1, 200:900] = -torch.inf
    logits_NV[2] -= 2 * peak
    assert_whole_equals_reference(logits_NV, [500, 3, 1002])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 5.0, 100.0])
@pytest.mark.parametrize("top_k", [20, "all"])
def test_other_temperatures(temperature, dtype, top_k):
    logits_NV = random_logits(5, 2003, seed=8).to(dtype)
    logits_NV[1, 77] = 300.0
    logits_NV[2, 100:1900] = -torch.inf
    logits_NV[3] += 1000.0
    logits_NV[4] = 0.0
    found = capture([logits_NV], torch.zeros(5).long(), top_k=top_k, temperatures=(temperature,))
    stored_N = found[f"logsumexp_t{temperature:g}"]
    assert stored_N.dtype == torch.float32
    expected_N = (logits_NV.double() / temperature).logsumexp(-1)
    rounding_N = 1e-5 + 2e-7 * expected_N.abs()
    assert ((stored_N.double() - expected_N).abs() <= rounding_N).all()
    # What it is for: the true log-probabilities at that temperature, within float16's rounding of those at 1.
    listed = found.get("topk_indices", torch.arange(2003).expand(5, -1)).long()
    logprobs_NK = found["logprobs" if top_k == "all" else "topk_logprobs"].double()
    rebuilt_NK = (logprobs_NK + found["logsumexp"].double()[:, None]) / temperature
    rebuilt_NK -= stored_N.double()[:, None]
    exact_NK = (logits_NV.double() / temperature).log_softmax(-1).gather(1, listed)
    slack_NK = (half_spacing(logprobs_NK) + 2e-6 * logits_NV[3, 0].double()) / temperature
    kept_NK = logprobs_NK > FLOAT16_MIN
    assert ((rebuilt_NK - exact_NK).abs() <= slack_NK + 1e-4)[kept_NK].all()


def test_other_temperatures_change_no_other_column():
    logits_NV = random_logits(3, 1003)
    targets_N = torch.tensor([1, 2, 3])
    plain = capture([logits_NV], targets_N, top_k=20)
    found = capture([logits_NV], targets_N, **TOP_20)
    for name, column in plain.items():
        assert torch.equal(found[name], column), name


@st.composite
def rows_of_logits(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """One row, a target and a top_k: plain, tied, masked, peaked, in any type."""
    vocab_size = draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits_V = torch.randn(vocab_size, generator=generator)
    logits_V *= draw(st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]))
    if draw(st.booleans()):
        logits_V = logits_V.round()
    masked_share = draw(st.sampled_from([0.0, 0.0, 0.5, 0.98]))
    logits_V[torch.rand(vocab_size, generator=generator) < masked_share] = -torch.inf
    logits_V[draw(st.integers(0, vocab_size - 1))] = draw(st.sampled_from([-50.0, 0.0, 20.0, 90.0]))
    dtype = draw(st.sampled_from(FLOATS))
    top_k = draw(st.integers(1, vocab_size))
    return logits_V.to(dtype)[None], draw(st.integers(-1, vocab_size - 1)), top_k


@settings(max_examples=150, deadline=None)
@given(rows_of_logits())
def test_any_row_equals_the_reference_and_keeps_the_invariants(row):
    logits_NV, target, top_k = row
    found = assert_equals_reference(logits_NV, [target], top_k)
    assert_invariants(found, logits_NV)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1e5, 6e4, width=32) | st.just(-math.inf), min_size=1, max_size=40),
    st.data(),
)
def test_any_floats_equal_the_reference(values, data):
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.floats(-50, 50, width=32))
    top_k = data.draw(st.integers(1, len(values)))
    target = data.draw(st.integers(0, len(values) - 1))
    logits_NV = torch.tensor([values])
    assert_invariants(assert_equals_reference(logits_NV, [target], top_k), logits_NV)


def assert_invariants(found: Distribution, logits_NV: Tensor) -> None:
    vocab_size = logits_NV.shape[1]
    logprobs = torch.cat([found["topk_logprobs"][0], found["tail_logprob"]]).double()
    probs, rounding = logprobs.exp(), half_spacing(logprobs) + float32_rounding(logits_NV)
    sum_rounding = (probs * rounding.expm1()).sum().item()
    assert probs.sum().item() == pytest.approx(1, abs=max(1e-3, sum_rounding))
    assert (found["topk_logprobs"][0].diff() <= 0).all()
    ids = found["topk_indices"][0].tolist()
    assert len(set(ids)) == len(ids)
    assert min(ids) >= 0
    assert max(ids) < vocab_size
    tolerance = (probs * (logprobs.abs() + 1) * rounding.expm1()).sum() + 1e-4
    tolerance += half_spacing(found["entropy"][0]) + float32_rounding(logits_NV)[0]
    # The tail as one bucket: a coarser distribution has less entropy.
    assert found["entropy"][0].double() >= -(probs * logprobs).sum() - tolerance
    assert found["entropy"][0].double() <= math.log(vocab_size) + tolerance
