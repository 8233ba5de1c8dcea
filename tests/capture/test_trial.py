"""Which size of batches a trial takes: by measured rates, within memory and time."""

import itertools

import pytest
import torch

from builder.capture import trial
from builder.capture.trial import try_sizes
from builder.corpus.sequences import Sequence
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout

LAYOUT = Layout(top_k=5)
SIZES = (64, 256, 1024)


@pytest.fixture
def teacher(tiny_model, tiny_tokenizer) -> Teacher:
    return Teacher(tiny_model, tiny_tokenizer, device=torch.device("cpu"))


def sequences(count: int, length: int = 16):
    for number in range(count):
        yield Sequence(document_id=f"doc-{number}", chunk_index=0, text="", token_ids=list(range(1, length + 1)), next_token=2)  # fmt: skip


@pytest.fixture
def seconds(monkeypatch):
    """Canned seconds for each number of positions; what is really run is noted."""

    def can(of) -> list[int]:
        ran = []

        def fake(pipeline, batch, *, is_cuda):
            pipeline.start(pipeline.batch(batch))()
            ran.append(sum(len(sequence.token_ids) for sequence in batch))
            return of(ran[-1])

        monkeypatch.setattr(trial, "_seconds", fake)
        return ran

    return can


@pytest.mark.parametrize(
    ("overhead", "slope", "taken"),
    [
        (0.001, 0.0, 1024),  # a device that only waits for launches: the larger the better
        (0.0, 0.001, 64),  # one that computes all the time: the smallest, which needs least memory
        (0.01, 0.001, 1024),
        (0.001, 0.001, 256),  # within 3 % of the best
    ],
)
def test_the_smallest_of_the_fastest_is_taken(teacher, seconds, overhead, slope, taken):
    ran = seconds(lambda positions: overhead + slope * positions / 10)
    found = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert ran == [16, *SIZES]
    assert found.batch_tokens == taken
    for size in SIZES:
        assert found.rates[size] == pytest.approx(size / (overhead + slope * size / 10))
    assert f'"auto" is {taken:,} for this build (64: ' in str(found)


def test_a_larger_size_that_is_slower_ends_the_trial(teacher, seconds):
    ran = seconds(lambda positions: positions / (1000 if positions <= 64 else 500))
    found = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert ran == [16, 64, 256]
    assert found.batch_tokens == 64


def test_padding_of_the_whole_window_counts(teacher, monkeypatch):
    def fake(pipeline, batch, *, is_cuda):
        return 0.001 * len(batch) * max(len(sequence.token_ids) for sequence in batch)

    monkeypatch.setattr(trial, "_seconds", fake)
    lengths = itertools.cycle([40, *[20] * 30])
    rows = (next(sequences(1, length)) for length in lengths)
    found = try_sizes(teacher, rows, layout=LAYOUT, sizes=(80,))
    # A window of 8 · 80 tokens: 40 and 20 together, seven batches of four, and one left.
    assert found.rates[80] == pytest.approx(1000 * 640 / (80 + 7 * 80 + 20))


def test_a_size_that_does_not_fit_is_not_taken_and_ends_the_trial(teacher, seconds, monkeypatch):
    ran = seconds(lambda positions: 0.001)
    hidden, asked = teacher.rounded, []

    def cramped(ids):
        asked.append(sum(map(len, ids)))
        if asked[-1] > 64:
            raise torch.OutOfMemoryError("out of memory")
        return hidden(ids)

    monkeypatch.setattr(teacher, "rounded", cramped)
    found = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert (ran, asked) == ([16, 64], [16, 64, 256])
    assert found.batch_tokens == 64
    assert found.rates[256] is None
    assert "256: does not fit in memory" in str(found)
    monkeypatch.setattr(teacher, "rounded", lambda ids: cramped([[0] * 100]))
    nothing = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert nothing.batch_tokens == 64  # the build halves, or says what does not fit


def test_no_more_is_tried_than_there_is_time_or_corpus_for(teacher, seconds):
    ran = seconds(lambda positions: positions / 64 * 0.8 * trial.MAX_SECONDS)
    slow = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert ran == [16, 64]
    assert slow.batch_tokens == 64
    ran = seconds(lambda positions: positions * trial.MAX_SECONDS)
    slower = try_sizes(teacher, sequences(2000), layout=LAYOUT, sizes=SIZES)
    assert (ran, slower.batch_tokens) == ([16], 64)
    assert "untried: this teacher is slow at any size" in str(slower)
    ran = seconds(lambda positions: 0.001)
    small = try_sizes(teacher, sequences(10), layout=LAYOUT, sizes=SIZES)
    assert ran == [16, 64, 160]  # all ten in one batch; larger sizes would make the same one
    assert small.batch_tokens == 256


def test_for_real(teacher):
    found = try_sizes(teacher, sequences(600), layout=LAYOUT, sizes=SIZES)
    assert found.batch_tokens in SIZES
    assert all(rate > 0 for rate in found.rates.values())
