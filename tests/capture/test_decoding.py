"""`Decoder` against loops and distributions written for clarity: greedy and drawn tokens, padding, caches, ends."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from builder.capture.decoding import Decoder
from builder.capture.draws import uniforms
from builder.teacher.model import Teacher
from tests.conftest import TINY_VOCAB_SIZE
from tests.teacher.test_model import FAMILIES, make_model, random_sequences, whole_model_logits

CPU = torch.device("cpu")
PROMPTS = random_sequences((9, 3, 14, 1))
STEPS = 12


@pytest.fixture
def make_decoder(tiny_tokenizer):
    def make(model, *, temperature=1.0, top_p=1.0, dtype=torch.float32, eos=None):
        teacher = Teacher(model.to(dtype), tiny_tokenizer, device=CPU)
        teacher.model.generation_config = GenerationConfig(eos_token_id=eos)
        return Decoder(teacher, temperature=temperature, top_p=top_p)

    return make


def warped(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that is to be drawn from, in float64, written for clarity."""
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    needed = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = np.zeros_like(probs)
    kept[order[:needed]] = probs[order[:needed]]
    return kept / kept.sum()


def written_alone(model, prompt, numbers, temperature, top_p, eos_ids) -> list[int]:
    """The whole model on the whole text at every step; each draw inverts the distribution as one would by hand."""
    ids = list(prompt)
    for number in numbers:
        logits = whole_model_logits(model, ids)[-1].numpy()
        if number is None:
            token = int(logits.argmax())
        else:
            cumulated = np.cumsum(warped(logits, temperature, top_p))
            token = int(np.searchsorted(cumulated, number * cumulated[-1], side="right"))
        ids.append(token)
        if token in eos_ids:
            break
    return ids[len(prompt) :]


def numbers_of(count: int, steps: int = STEPS) -> torch.Tensor:
    rows = [uniforms(7, f"doc-{i}", -1, num_positions=steps, count=1)[:, 0] for i in range(count)]
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_its_forward_pass_says(family, make_decoder):
    model = make_model(family)
    decoder = make_decoder(model, temperature=1.5, top_p=0.9)
    prompts = PROMPTS if decoder.padded else [PROMPTS[0]] * 4
    numbers = numbers_of(len(prompts))
    expected = [
        written_alone(model, prompt, row, 1.5, 0.9, {0})
        for prompt, row in zip(prompts, numbers.tolist(), strict=True)
    ]
    assert decoder.decode(prompts, num_tokens=STEPS, uniforms_BS=numbers) == expected
    greedy = [written_alone(model, prompt, [None] * STEPS, 1, 1, {0}) for prompt in prompts]
    assert decoder.decode(prompts, num_tokens=STEPS) == greedy


def test_a_prompt_is_completed_in_a_batch_as_it_is_alone(tiny_model, make_decoder):
    decoder = make_decoder(tiny_model)
    numbers = numbers_of(len(PROMPTS))
    together = decoder.decode(PROMPTS, num_tokens=STEPS, uniforms_BS=numbers)
    alone = [
        decoder.decode([prompt], num_tokens=STEPS, uniforms_BS=row[None])[0]
        for prompt, row in zip(PROMPTS, numbers, strict=True)
    ]
    assert decoder.padded
    assert together == alone


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 0.8), (1.0, 0.5)])
def test_tokens_are_drawn_as_often_as_the_exact_distribution_says(
    temperature, top_p, tiny_model, make_decoder
):
    decoder = make_decoder(tiny_model, temperature=temperature, top_p=top_p)
    count = 4000
    drawn = decoder.decode(
        [PROMPTS[0]] * count, num_tokens=1, uniforms_BS=numbers_of(count, steps=1)
    )
    logits = whole_model_logits(tiny_model, PROMPTS[0])[-1].numpy()
    expected = count * warped(logits, temperature, top_p)
    found = np.bincount([ids[0] for ids in drawn], minlength=TINY_VOCAB_SIZE)
    assert found[expected == 0].sum() == 0
    rare = expected < 5
    observed = np.append(found[~rare], found[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert freedom >= 3
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_a_completion_ends_with_any_token_that_ends_a_text(tiny_model, make_decoder):
    numbers = numbers_of(len(PROMPTS), steps=60)
    endless = make_decoder(tiny_model)
    assert endless.eos_ids == {0}  # the tokenizer's
    free = endless.decode(PROMPTS, num_tokens=60, uniforms_BS=numbers)
    ends = sorted({free[0][5], free[1][9]} - {0})
    decoder = make_decoder(tiny_model, eos=ends)
    assert decoder.eos_ids == {0, *ends}
    for ids, longer in zip(
        decoder.decode(PROMPTS, num_tokens=60, uniforms_BS=numbers), free, strict=True
    ):
        first = next((i for i, token in enumerate(longer) if token in decoder.eos_ids), 59)
        assert ids == longer[: first + 1]


def test_of_a_models_generation_config_only_the_ends_count(tiny_model, make_decoder):
    decoder = make_decoder(tiny_model)
    expected = decoder.decode(PROMPTS, num_tokens=STEPS)
    drawn = decoder.decode(PROMPTS, num_tokens=STEPS, uniforms_BS=numbers_of(4))
    tiny_model.generation_config = GenerationConfig(
        eos_token_id=0, repetition_penalty=1.8, top_k=2, temperature=0.1, do_sample=True,
        suppress_tokens=[expected[0][0]],
    )  # fmt: skip
    try:
        bent = Decoder(decoder.teacher, temperature=1.0, top_p=1.0)
        assert bent.decode(PROMPTS, num_tokens=STEPS) == expected
        assert bent.decode(PROMPTS, num_tokens=STEPS, uniforms_BS=numbers_of(4)) == drawn
        assert tiny_model.generation_config.repetition_penalty == 1.8
    finally:
        tiny_model.generation_config = GenerationConfig(eos_token_id=0)


def test_padding_and_caches_are_left_out_where_they_change_what_is_written(make_decoder):
    model = make_model("llama")
    forward = model.forward

    def without_mask(*args, attention_mask=None, **kwargs):
        return forward(*args, **kwargs)

    model.forward = without_mask
    decoder = make_decoder(model)
    assert not decoder.padded
    model.forward = lambda input_ids, **_: forward(input_ids, use_cache=False)
    decoder = make_decoder(model)
    prompts = [PROMPTS[0]] * 2
    expected = written_alone(model, PROMPTS[0], [None] * STEPS, 1, 1, {0})
    assert decoder.decode(prompts, num_tokens=STEPS) == [expected] * 2


def test_a_teacher_that_writes_other_than_it_reads_is_refused(make_decoder):
    model = make_model("llama")
    forward = model.forward

    def turned(logits_to_keep=0, **kwargs):
        output = forward(**kwargs)
        if logits_to_keep:
            output.logits = -output.logits
        return output

    model.forward = turned
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot generate: its outputs step by step differ"
    ):
        make_decoder(model)


def test_a_text_whose_distribution_is_none_comes_back_as_none(tiny_model, make_decoder):
    decoder = make_decoder(tiny_model)
    embeddings = tiny_model.get_input_embeddings().weight
    before = embeddings[5].clone()
    try:
        embeddings.data[5] = torch.nan
        found = decoder.decode(
            [[1, 2, 3], [5, 3]], num_tokens=1, uniforms_BS=numbers_of(2, steps=1)
        )
    finally:
        embeddings.data[5] = before
    assert found[1] is None
    assert found[0] is not None


# Drafts


def test_a_drafter_goes_on_as_the_model_does_whatever_was_given_up_and_left_the_batch(make_decoder):
    """Sequences of very different lengths that end, come back, lose their ends and get other tokens in the middle."""
    model = make_model("llama")
    decoder = make_decoder(model)
    sequences = [list(ids) for ids in random_sequences((40, 1, 17, 5, 29))]
    drafter = decoder.drafter(len(sequences), room=90)
    counts_of_rounds = [(3, 12, 0, 7, 1), (0, 0, 9, 2, 4), (5, 0, 0, 0, 6), (1, 8, 2, 0, 3)]
    for number, counts in enumerate(counts_of_rounds):
        drafts = drafter.extend(sequences, list(counts))
        for ids, draft, count in zip(sequences, drafts, counts, strict=True):
            assert draft == written_alone(model, ids, [None] * count, 1, 1, set())
            ids += draft
            # A correction in the draft, or before it, behind which all may be new or as it was.
            if count and (place := len(ids) - 1 - (number + count) % 4) > 0:
                ids[place] = (ids[place] + 1) % TINY_VOCAB_SIZE
                del ids[place + 1 + number % 2 :]
    found = drafter.logits(sequences)
    expected = torch.stack([whole_model_logits(model, ids)[-1] for ids in sequences])
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=0)


def test_a_drafter_writes_nothing_behind_an_end(make_decoder):
    """All at once, one after the other, and as the first token."""
    model = make_model("llama")
    prompts = [list(ids) for ids in PROMPTS]
    free = [written_alone(model, ids, [None] * STEPS, 1, 1, set()) for ids in prompts]
    for ends in ({ids[0] for ids in free}, {free[0][0], free[2][5]}):
        decoder = make_decoder(model, eos=sorted(ends))
        drafts = decoder.drafter(4, room=40).extend(prompts, [STEPS] * 4)
        for ids, draft in zip(free, drafts, strict=True):
            end = next((i + 1 for i, token in enumerate(ids) if token in ends), STEPS)
            assert draft == ids[:end]
