"""`Guard`: which sequences are run alone, how far a row is from itself, and when that ends a build."""

from typing import Any

import pytest
import torch

from builder.capture.guard import FACTOR, MIN_TOKENS, NOISE, TOKEN_SHARE, Guard, distance
from builder.capture.pipeline import Pipeline
from builder.corpus.sequences import NO_TOKEN, Sequence
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout
from tests.conftest import TINY_VOCAB_SIZE


def sequences_of(lengths: list[int], *, is_chat: bool = False) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sequence(
            document_id=f"doc-{i}",
            chunk_index=0,
            text="",
            token_ids=torch.randint(TINY_VOCAB_SIZE, (length,), generator=generator).tolist(),
            next_token=NO_TOKEN,
            completion_mask=[t >= length // 2 for t in range(length)] if is_chat else None,
        )
        for i, length in enumerate(lengths)
    ]


def chosen(guard: Guard, batches: list[list[int]]) -> list[int | None]:
    """The lengths of the sequences that are run alone, batch by batch."""
    found = [guard.choose(sequences_of(lengths)) for lengths in batches]
    return [None if i is None else b[i] for i, b in zip(found, batches, strict=True)]


def test_the_first_batch_of_unequal_lengths_is_looked_at_and_then_less_and_less_often():
    batch = [4000] * 3 + [9]
    found = chosen(Guard(), [[5, 5], *[batch] * 100])
    assert [i for i, length in enumerate(found) if length] == [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    assert chosen(Guard(), [[5], [7, 7, 7]] * 9) == [None] * 18


def test_the_shortest_sequence_that_says_something_comes_first_and_then_others_too():
    batch = [9000, 60, 30, 9, 3]
    assert chosen(Guard(), [batch] * 3) == [9, 30, 3]  # by the padding, those that say little last
    assert chosen(Guard(), [[20, 5, 7, 2]]) == [7]
    assert chosen(Guard(), [[20, MIN_TOKENS, MIN_TOKENS - 1]]) == [MIN_TOKENS]


def test_few_tokens_are_run_twice():
    guard, batch = Guard(), [200] * 8 + [150, 100]
    found = chosen(guard, [batch] * 400)
    assert found[0] == 100
    again = sum(length for length in found if length)
    assert 100 < again <= TOKEN_SHARE * 400 * sum(batch)
    # What is too long now is not looked at, but one that is short enough is.
    assert chosen(Guard(), [[100, 50], [100, 50], [4000, 900, 10]]) == [50, None, None]
    assert chosen(Guard(), [[9000, 20], [9000, 900, 60, 30, 10]]) == [20, 30]


def test_distance_is_the_mean_of_the_column_that_is_furthest_off():
    row = {
        "topk_indices": torch.tensor([[1, 2], [3, 4]]),
        "topk_logprobs": torch.tensor([[-0.5, -3.0], [-1.0, -2.0]]).half(),
        "target_logprob": torch.tensor([-0.5, torch.nan]).half(),
        "logsumexp": torch.tensor([8.0, 9.0]),
        "tail_logprobs": torch.tensor([[-9.0], [-9.0]]).half(),
    }

    def moved(name: str, by: torch.Tensor) -> float:
        moved = {**row, name: (row[name].float() + by).to(row[name].dtype)}
        return distance(moved, row, torch.float32)

    assert distance(row, row, torch.float32) == 0
    assert moved("logsumexp", torch.tensor([0.5, 0.1])) == pytest.approx(0.3, abs=1e-5)
    assert moved("topk_logprobs", torch.tensor([[1.0], [0.0]])) == pytest.approx(0.5, abs=2e-3)
    # Rounding to float16 is no distance, and draws may be others.
    assert moved("topk_logprobs", torch.tensor(2**-12)) == 0
    assert moved("tail_logprobs", torch.tensor(3.0)) == 0
    assert moved("topk_indices", torch.tensor(1)) == 0
    # A distribution that is lost is.
    lost = {**row, "logsumexp": torch.tensor([8.0, torch.nan])}
    for pair in ((lost, row), (row, lost)):
        assert distance(*pair, torch.float32) == pytest.approx(4.5, abs=1e-5)
    # Nothing that nobody would ever see.
    low, lower = {"x": torch.tensor([-80.0])}, {"x": torch.tensor([-65504.0])}
    assert distance(lower, low, torch.float32) == 0


def test_raw_logits_of_16_bits_are_rounded_by_their_size():
    """A shift of all logits of a position is in logsumexp alone. Of the embedded teacher it was 0.1, and ended its build."""
    row = {"logsumexp": torch.tensor([20.0, 24.0]), "logsumexp_t2": torch.tensor([14.0, 15.0])}
    for dtype, bits in ((torch.bfloat16, 7), (torch.float16, 10)):
        for name in row:
            within = {**row, name: row[name] * (1 + 2.0**-bits)}
            beyond = {**row, name: row[name] * (1 + 3 * 2.0**-bits)}
            assert distance(within, row, dtype) < 1e-6
            excess = float(row[name].mean()) * 2 * 2.0**-bits
            assert distance(beyond, row, dtype) == pytest.approx(excess, rel=1e-3)
            assert distance(within, row, torch.float32) == pytest.approx(excess / 2, rel=1e-3)


class Shaky(Teacher):
    """Its kernels are not exact, depending on the shape of a batch."""

    is_shaken: Any
    by = 0.4

    def hidden(self, sequences: Any) -> torch.Tensor:
        hidden_ND = super().hidden(sequences)
        if not self.is_shaken(sequences):
            return hidden_ND
        generator = torch.Generator().manual_seed(len(sequences))
        return hidden_ND + self.by * torch.randn(hidden_ND.shape, generator=generator)


@pytest.fixture
def shaky(tiny_model, tiny_tokenizer) -> Shaky:
    Shaky.is_shaken = staticmethod(lambda _: False)
    return Shaky(tiny_model, tiny_tokenizer, device=torch.device("cpu"))


@pytest.mark.parametrize("completions_only", [False, True])
@pytest.mark.parametrize("top_k", [20, "all"])
def test_noise_is_measured_before_a_build_is_stopped(shaky, completions_only, top_k):
    layout = Layout(
        top_k=top_k,
        tail_samples=0 if top_k == "all" else 4,
        vocab_size=TINY_VOCAB_SIZE,
        completion_mask=completions_only,
        completions_only=completions_only,
    )
    sequences = sequences_of([60, 60, 44, 12, 31], is_chat=completions_only)

    def capture() -> int:
        pipeline = Pipeline(shaky, layout=layout, batch_tokens=4096)
        return sum(len(block.sequences) for block in pipeline.blocks(iter(sequences)))

    assert capture() == 5
    # Kernels for several sequences differ from those for one: that is noise, whoever shares the batch.
    shaky.is_shaken = lambda batch: len(batch) > 1
    assert capture() == 5
    # So is what kernels for many positions do: of so short a sequence, these are more copies than the batch had sequences.
    shaky.is_shaken = lambda batch: len(batch) * max(map(len, batch)) > 100
    assert capture() == 5
    # Where it is padding that makes a difference, it is not.
    shaky.is_shaken = lambda batch: len(set(map(len, batch))) > 1
    with pytest.raises(
        ValueError,
        match=r"document 'doc-3' \(chunk 0\): its log-probabilities in a batch differ from those alone by [0-9.]+ nats on average "
        r"\(noise: [0-9.e-]+; 12 tokens, beside sequences of up to 60\); set sequences\.batch_tokens = 1",
    ):
        capture()
    # A little is what arithmetic does.
    shaky.by = 1e-4
    assert capture() == 5


def test_where_there_is_no_room_to_look_a_build_goes_on(shaky, monkeypatch):
    sequences, hidden = sequences_of([60, 12]), Shaky.hidden
    alone: list[int] = []

    def cramped(self: Shaky, batch: Any) -> torch.Tensor:
        if len(batch) == 1:
            alone.append(len(batch[0]))
            raise torch.OutOfMemoryError
        return hidden(self, batch)

    monkeypatch.setattr(Shaky, "hidden", cramped)
    pipeline = Pipeline(shaky, layout=Layout(top_k=20), batch_tokens=4096)
    assert [len(block.sequences) for block in pipeline.blocks(iter(sequences))] == [2]
    assert alone == [12]
    assert pipeline.halved_batches == 0


def test_a_teacher_that_runs_sequences_one_by_one_is_not_looked_at(shaky, monkeypatch):
    monkeypatch.setattr(Guard, "choose", lambda *_: pytest.fail("there are no batches"))
    shaky.head_only = False
    pipeline = Pipeline(shaky, layout=Layout(top_k=20), batch_tokens=4096)
    assert len(list(pipeline.blocks(iter(sequences_of([9, 4]))))) == 1


def test_limits_are_those_of_the_types_that_a_recipe_may_ask_for():
    assert set(NOISE) == {torch.float32, torch.float16, torch.bfloat16}
    assert FACTOR > 1
