"""The pipeline: order, batches in flight, a device that runs out of memory, and the packed way back to the host."""

import pytest
import torch

from builder.capture import pipeline as module
from builder.capture.distribution import Distribution, capture
from builder.capture.draws import uniforms
from builder.capture.pipeline import Pipeline, pack, unpack
from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Sequence
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout
from tests.conftest import sample_documents

TOP_K = 20
LAYOUT = Layout(top_k=TOP_K, tail_samples=4, temperatures=(2.0,))


@pytest.fixture(scope="module")
def teacher(tiny_model, tiny_tokenizer) -> Teacher:
    return Teacher(tiny_model, tiny_tokenizer, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def sequences(tiny_tokenizer) -> list[Sequence]:
    encoder = Encoder(tiny_tokenizer, max_length=64, long_documents="chunk")
    documents = [Document(**document) for document in sample_documents(30)]
    return [sequence for document in documents for sequence in encoder.encode(document)]


def run(teacher: Teacher, sequences: list[Sequence], **options) -> tuple[Pipeline, list]:
    pipeline = Pipeline(teacher, layout=LAYOUT, **{"batch_tokens": 128, **options})
    return pipeline, list(pipeline.blocks(iter(sequences)))


def alone(teacher: Teacher, sequence: Sequence) -> Distribution:
    logits = teacher.logits([sequence.token_ids])
    uniforms_NM = uniforms(
        0,
        sequence.document_id,
        sequence.chunk_index,
        num_positions=len(sequence.token_ids),
        count=LAYOUT.tail_samples,
    )
    return capture(
        logits,
        torch.tensor(sequence.targets),
        top_k=TOP_K,
        uniforms_NM=uniforms_NM,
        temperatures=LAYOUT.temperatures,
    )


def assert_each_equals_alone(teacher: Teacher, blocks: list) -> None:
    for block in blocks:
        start = 0
        for sequence in block.sequences:
            end = start + len(sequence.token_ids)
            expected = alone(teacher, sequence)
            for name in expected:
                found = block.distribution[name][start:end]
                wanted = expected[name]
                if name in ("topk_indices", "tail_indices"):
                    assert (found == wanted).float().mean() > 0.98
                elif name == "tail_logprobs":
                    assert (found - wanted).abs().le(8e-3).float().mean() > 0.98
                else:
                    torch.testing.assert_close(found, wanted, atol=8e-3, rtol=0, equal_nan=True)
            start = end
        assert start == len(block.distribution["logsumexp"])


@pytest.mark.parametrize("batches_in_flight", [0, 1, 3])
def test_blocks_come_in_order_and_every_position_is_its_own(
    teacher, sequences, monkeypatch, batches_in_flight
):
    monkeypatch.setattr(module, "BATCHES_IN_FLIGHT", batches_in_flight)
    seen = []
    _, blocks = run(teacher, sequences, progress=seen.append)
    assert len(blocks) > 2
    assert [s for block in blocks for s in block.sequences] == sequences
    assert sum(seen) == sum(len(s.token_ids) for s in sequences)
    assert_each_equals_alone(teacher, blocks)


def test_no_sequences_make_no_block(teacher):
    assert run(teacher, [])[1] == []


class Cramped:
    """A teacher whose device holds only so many positions, padding included."""

    def __init__(self, teacher: Teacher, room: int) -> None:
        self._teacher, self._room = teacher, room
        self.device = self.logits_device = teacher.device
        self.dtype, self.head_only, self.reach = teacher.dtype, True, teacher.reach
        self.sizes: list[int] = []

    def rounded(self, sequences):
        size = len(sequences) * max(map(len, sequences))
        if size > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.sizes.append(size)
        yield from self._teacher.rounded(sequences)


def test_running_out_of_memory_halves_the_batch_and_goes_on(teacher, sequences):
    notices: list[str] = []
    cramped = Cramped(teacher, room=70)
    pipeline, blocks = run(cramped, sequences, batch_tokens=512, notice=notices.append)
    assert [s for block in blocks for s in block.sequences] == sequences
    assert_each_equals_alone(teacher, blocks)
    assert max(cramped.sizes) <= 70
    assert pipeline.halved_batches == len(notices) > 0
    assert "half as many" in notices[0]
    assert "batch_tokens" in notices[0]


def test_a_sequence_that_does_not_fit_alone_is_an_error_that_says_what_to_do(teacher, sequences):
    with pytest.raises(
        ValueError, match=r"single sequence of \d+ tokens .* smaller sequences\.max_length"
    ):
        run(Cramped(teacher, room=30), sequences)


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_packing_and_unpacking_changes_no_bit(top_k):
    torch.manual_seed(0)
    logits = torch.randn(7, 100) * 4
    uniforms_NM = uniforms(0, "doc", 0, num_positions=7, count=5)
    options = {"uniforms_NM": uniforms_NM, "temperatures": (2.0,)}
    original = capture([logits], torch.tensor([-1, *range(6)]), top_k=top_k, **options)
    original["hidden_states"] = torch.randn(7, 3).half()
    packed = pack(original)
    assert packed.dtype == torch.uint8
    assert packed.ndim == 1
    assert packed.numel() == 7 * (6 * top_k + 2 * 3 + 4 + 6 * 5 + 4 + 2 * 3)
    copied = unpack(packed, like=original)
    assert set(copied) == set(original)
    for name in original:
        before, after = original[name], copied[name]
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        assert torch.equal(
            after.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8)
        )
