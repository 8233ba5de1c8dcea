"""The invariants hold for whatever the teacher may say, and each is tight enough to be of use."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.capture.distribution import capture
from builder.capture.draws import uniforms
from builder.verify.invariants import broken, drawn_targets, sampled_entropy
from builder.verify.rows import _RowChecker
from logit_dataset.schema import Layout
from tests.capture.test_distribution import random_logits, rows_of_logits


def stored_of(logits_NV, targets, layout: Layout) -> dict[str, np.ndarray]:
    """The columns as they would be read back."""
    uniforms_NM = uniforms(
        0, "doc", 0, num_positions=len(logits_NV), count=max(layout.tail_samples, 1)
    )
    found = capture(
        [logits_NV],
        torch.tensor(targets),
        top_k=layout.top_k,
        temperatures=layout.temperatures,
        uniforms_NM=uniforms_NM if layout.tail_samples else None,
    )
    input_ids = np.zeros(len(logits_NV), np.int32)
    return {"input_ids": input_ids} | {name: column.numpy() for name, column in found.items()}


def wrong(stored: dict[str, np.ndarray], targets, layout: Layout) -> list[str]:
    with np.errstate(all="ignore"):
        return [line for mask, line in broken(stored, np.array(targets), layout) if mask.any()]


@settings(max_examples=200, deadline=None)
@given(
    rows_of_logits(),
    st.sampled_from([0, 1, 5]),
    st.lists(st.sampled_from([0.1, 0.3, 0.9, 1.1, 2.0, 5.0, 100.0]), max_size=3, unique=True),
    st.booleans(),
)
def test_nothing_that_a_teacher_says_breaks_an_invariant(row, tail_samples, temperatures, whole):
    logits_NV, target, top_k = row
    layout = Layout(
        top_k="all" if whole else top_k,
        tail_samples=0 if whole else tail_samples,
        temperatures=tuple(temperatures),
        vocab_size=logits_NV.shape[1],
    )
    stored = stored_of(logits_NV, [target], layout)
    assert wrong(stored, [target], layout) == []


LAYOUT = Layout(top_k=20, tail_samples=4, temperatures=(0.5, 2.0), vocab_size=1003)


@pytest.mark.parametrize("temperature", LAYOUT.temperatures)
@pytest.mark.parametrize("by", [-0.5, 0.5])
def test_a_log_partition_that_is_half_a_nat_off_is_found(temperature, by):
    targets = list(range(50))
    stored = stored_of(random_logits(50, 1003), targets, LAYOUT)
    assert wrong(stored, targets, LAYOUT) == []
    stored[f"logsumexp_t{temperature:g}"] += np.float32(by)
    expected = [f"logsumexp_t{temperature:g} does not fit the stored distribution"]
    assert wrong(stored, targets, LAYOUT) == expected


def test_a_draw_that_is_more_probable_than_the_whole_tail_is_found():
    logits_NV = -torch.arange(1003.0)[None]  # a tail of 0.58 times the K-th
    stored = stored_of(logits_NV, [5], LAYOUT)
    stored["tail_logprobs"][0] = stored["tail_logprob"][0] + np.float16(0.1)
    assert wrong(stored, [5], LAYOUT) == ["a draw is more probable than the whole tail"]


def test_the_entropy_by_draws_is_right_on_average():
    logits_NV = random_logits(1, 1003).expand(4000, -1)
    stored = stored_of(logits_NV, [0] * 4000, LAYOUT)
    estimate = sampled_entropy(stored)
    error = estimate.std() / np.sqrt(len(estimate))
    assert error > 1e-4
    assert abs(estimate.mean() - float(stored["entropy"][0])) < 4 * error + 1e-3


def test_the_token_that_follows_is_drawn_as_often_as_its_probability_says():
    """Of a teacher that knows something: its own draws fit, draws of others do not."""
    layout = Layout(top_k=4, tail_samples=24, vocab_size=1003)
    logits_NV = random_logits(2000, 1003, scale=2.0)
    generator = torch.Generator().manual_seed(5)
    targets = logits_NV.softmax(-1).multinomial(1, generator=generator)[:, 0].numpy()
    targets[:3] = -1
    stored = stored_of(logits_NV, targets, layout)
    stored["tail_logprob"][3] = -65504
    found, expected, variance = (v.sum() for v in drawn_targets(stored, targets))
    assert expected > 100
    assert abs(found - expected) < 5 * variance**0.5
    p_NV = logits_NV.double().softmax(-1).numpy()
    np.put_along_axis(p_NV, stored["topk_indices"], 0, axis=1)
    tail_NV = p_NV / p_NV.sum(-1, keepdims=True)
    outside = tail_NV[np.arange(2000), targets]
    outside[:4] = 0
    assert expected == pytest.approx(24 * outside.sum(), rel=0.01)
    assert variance == pytest.approx(24 * (outside * (1 - outside)).sum(), rel=0.01)
    for forged in (
        np.random.default_rng(0).integers(1003, size=(2000, 24)),
        np.roll(stored["tail_indices"], 1, axis=0),
    ):
        found, *_ = (v.sum() for v in drawn_targets(stored | {"tail_indices": forged}, targets))
        assert abs(found - expected) > 8 * variance**0.5


@pytest.mark.parametrize(
    ("hits", "expected", "variance", "is_chance"),
    [
        # Six standard errors are 585, the bound is 6 + √(36 + 36 · 9,500) = 591, and 5 % of rounding are 500.
        (11_080, 10_000, 9_500, True),
        (11_100, 10_000, 9_500, False),
        (8_920, 10_000, 9_500, True),
        (8_900, 10_000, 9_500, False),
        # Of few, more than six standard errors may be chance.
        (18, 2, 2, True),
        (19, 2, 2, False),
        (0, 0, 0, True),
        (13, 0, 0, False),
        (float("nan"), 10, 9, False),
    ],
)
def test_how_far_the_hits_of_a_file_may_be_off(hits, expected, variance, is_chance):
    checker = SimpleNamespace(problems=[], _file="train.parquet")
    checker._hits, checker._expected_hits, checker._hits_variance = hits, expected, variance
    _RowChecker._check_hits(checker)
    assert (not checker.problems) is is_chance
