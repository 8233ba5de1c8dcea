"""Projections lose no mass and make none up; the identity changes nothing; what they say is true of the text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from logit_dataset import FrequentTokens, TokenizerProjection, distillation_loss, load_logits
from logit_dataset.rows import NO_TARGET, Rows
from tests.conftest import TINY_VOCAB_SIZE, TRAINING_TEXT

V = 30


@pytest.fixture(scope="module")
def data(built):
    return load_logits(built)


def make_rows(seed, num_positions, top_k, vocab_size, *, draws=0):
    """Random rows of a teacher, and its full distribution [N, V]."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (num_positions, vocab_size))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logp, axis=-1)
    listed = np.take_along_axis(logp, order[:, :top_k], -1)
    rest = np.exp(np.take_along_axis(logp, order[:, top_k:], -1))
    columns = {
        "input_ids": generator.integers(0, vocab_size, num_positions).astype(np.int32),
        "target_ids": generator.integers(0, vocab_size, num_positions).astype(np.int32),
        "topk_indices": order[:, :top_k].astype(np.int32),
        "topk_logprobs": listed.astype(np.float16),
        "tail_logprob": np.log(np.maximum(rest.sum(-1), 1e-300)).clip(-65504).astype(np.float16),
        "target_logprob": np.zeros(num_positions, np.float16),
        "logsumexp": np.zeros(num_positions, np.float32),
        "entropy": np.ones(num_positions, np.float16),
    }
    columns["target_ids"][-1] = NO_TARGET
    if draws:
        picked = [
            generator.choice(order[n, top_k:], draws, p=rest[n] / rest[n].sum())
            for n in range(num_positions)
        ]
        columns["tail_indices"] = np.array(picked, np.int32)
        columns["tail_logprobs"] = np.take_along_axis(logp, columns["tail_indices"], -1)
    return Rows(lengths_R=np.array([num_positions]), columns=columns), logp


def mass(columns):
    listed = np.exp(columns["topk_logprobs"].astype(np.float64)).sum(-1)
    other = np.exp(columns["other_logprob"]) if "other_logprob" in columns else 0
    return listed + other + np.exp(columns["tail_logprob"].astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, V), st.integers(0, V))
def test_frequent_tokens_conserve_mass_and_keep_what_is_listed(seed, num_positions, top_k, kept):
    rows, _ = make_rows(seed, num_positions, top_k, V)
    before = {name: values.copy() for name, values in rows.columns.items()}
    counts = np.random.default_rng(seed).integers(0, 9, V)
    projection = FrequentTokens(counts, kept)
    found = projection(rows).columns
    np.testing.assert_allclose(mass(found), mass(before), rtol=1e-6)
    np.testing.assert_equal(rows.columns, before)  # the rows that came in are not changed
    chosen = sorted(np.argsort(-counts, kind="stable")[:kept].tolist())
    assert projection.kept.tolist() == chosen
    place = {teacher: student for student, teacher in enumerate(chosen)}
    for n in range(num_positions):
        for teacher, student, was, now in zip(
            before["topk_indices"][n],
            found["topk_indices"][n],
            before["topk_logprobs"][n],
            found["topk_logprobs"][n],
            strict=True,
        ):
            assert student == place.get(teacher, -1)
            assert now == (was if teacher in place else -65504)
        assert found["input_ids"][n] == place.get(before["input_ids"][n], kept)
        target = before["target_ids"][n]
        assert found["target_ids"][n] == (place.get(target, kept) if target >= 0 else NO_TARGET)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V))
def test_all_tokens_are_the_identity(seed, top_k):
    rows, _ = make_rows(seed, 5, top_k, V)
    found = FrequentTokens(np.zeros(V), V)(rows).columns
    assert set(rows.columns) - set(found) == {"target_logprob", "logsumexp"}
    assert (found.pop("other_indices") == V).all()
    assert (found.pop("other_logprob") == -65504).all()
    for name, values in found.items():
        np.testing.assert_array_equal(values, rows.columns[name])


def test_frequent_tokens_that_must_be_kept():
    projection = FrequentTokens([5, 0, 3, 4], 2, always_keep=[1])
    assert (projection.kept.tolist(), projection.other, projection.vocab_size) == ([0, 1], 2, 3)
    with pytest.raises(ValueError, match=r"num_kept is 9, expected 0 .* to 4"):
        FrequentTokens([5, 0, 3, 4], 9)
    with pytest.raises(ValueError, match=r"num_kept is 1, expected 2 \(always_keep\)"):
        FrequentTokens([5, 0, 3, 4], 1, always_keep=[1, 2])
    with pytest.raises(ValueError, match=r"names the id 4, but .* has the ids 0 to 3"):
        FrequentTokens([5, 0, 3, 4], 2, always_keep=[1, 4])


def test_frequent_tokens_of_a_dataset_keep_the_end_of_a_sequence(data):
    eos = data.manifest["teacher"]["eos_token_id"]
    counts = data.token_counts()
    assert counts[eos] == 0  # it stands in no text, so that it would have no place
    projection = FrequentTokens.of(data, 50, always_keep=[7])
    expected = FrequentTokens(counts, 50, always_keep=[7, eos])
    assert projection.fingerprint == expected.fingerprint
    assert eos in projection.kept
    targets = [b["target_ids"] for b in data.project(projection).batches(batch_size=4)]
    assert any((ids == projection.kept.tolist().index(eos)).any() for ids in targets)
    assert FrequentTokens.of(data, 10**6).vocab_size == TINY_VOCAB_SIZE + 1


def small_batch(kept, *, seed=0, num_positions=6, top_k=5, draws=0):
    """A projected batch of one row, float64 logits of a student, and the teacher summed up into its ids, [N, kept + 1]."""
    rows, logp = make_rows(seed, num_positions, top_k, V, draws=draws)
    projection = FrequentTokens(np.arange(V), kept)
    batch = {n: torch.from_numpy(v)[None] for n, v in projection(rows).columns.items()}
    batch["mask"] = torch.ones(1, num_positions, dtype=torch.bool)
    whole = np.zeros((num_positions, kept + 1))
    np.add.at(whole.T, projection._map_V, np.exp(logp).T)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, num_positions, kept + 1, generator=generator, dtype=torch.float64)
    return batch, logits.requires_grad_(), torch.from_numpy(whole)


def test_draws_stay_unbiased_in_the_small_vocabulary():
    """The mean over many draws is the cross-entropy with the teacher summed up into the student's ids."""
    batch, logits, whole = small_batch(12, num_positions=4, draws=4000)
    expected = -(whole * logits[0].log_softmax(-1)).sum(-1).mean()
    assert abs(distillation_loss(logits, batch, loss="tail_draws") - expected) < 0.01
    assert abs(distillation_loss(logits, batch, loss="renormalised_top_k") - expected) > 0.1


def known_target(batch, kept):
    """[N, kept + 1] float64: what is listed, with the listed mass of all that has no place at `other`; and the tail [N]."""
    ids, logp = batch["topk_indices"][0].long(), batch["topk_logprobs"][0].double()
    target = torch.zeros(len(ids), kept + 1, dtype=torch.float64)
    target.scatter_add_(1, ids.clamp(min=0), logp.exp())
    target[:, kept] += batch["other_logprob"][0].double().exp()
    return target, batch["tail_logprob"][0].double().exp()


@pytest.mark.parametrize("kept", [0, 3, 12, V])
@pytest.mark.parametrize("kind", ["renormalised_top_k", "residual"])
def test_other_has_its_share_of_a_target_that_is_projected(kind, kept):
    """Renormalised, or with the residual on what follows, in the teacher's vocabulary first, and projected then."""
    batch, logits, _ = small_batch(kept)
    target, tail = known_target(batch, kept)
    counted = slice(None)
    if kind == "residual":
        follows = batch["target_ids"][0].long()
        counted = follows >= 0
        target[counted] = target[counted].scatter_add(
            1, follows[counted][:, None], tail[counted][:, None]
        )
    else:
        target = target / target.sum(-1, keepdim=True)
    logq = logits[0].log_softmax(-1)
    expected = (target.xlogy(target) - target * logq).sum(-1)[counted].mean()
    loss = distillation_loss(logits, batch, loss=kind)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    got, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 3, 12, V])
@pytest.mark.parametrize("kind", ["tail_bucket", "reverse_kl", "jensen_shannon"])
def test_events_have_the_least_divergence_that_agrees_with_what_is_known(kind, kept):
    """Against a search over all ways to divide the tail between `other` and the ids that are not listed."""
    batch, logits, whole = small_batch(kept)
    target, tail = known_target(batch, kept)
    listed = torch.zeros_like(target, dtype=torch.bool)
    ids = batch["topk_indices"][0].long()
    listed.scatter_(1, ids.where(ids >= 0, kept), True)
    listed[:, kept] = True
    q = logits[0].softmax(-1).detach()
    ways = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]

    def divergence(p, q):
        mixture = (p + q) / 2
        return {
            "tail_bucket": p.xlogy(p / q),
            "reverse_kl": q.xlogy(q / p),
            "jensen_shannon": (p.xlogy(p / mixture) + q.xlogy(q / mixture)) / 2,
        }[kind].nan_to_num()  # 0 log (0 / 0)

    found = divergence(target, q).where(listed, 0)[:, :kept].sum(-1)
    rest = q.masked_fill(listed, 0).sum(-1)
    for n in range(len(target)):
        other = divergence(target[n, kept] + ways * tail[n], q[n, kept])
        unlisted = divergence(tail[n] * (1 - ways), rest[n])
        found[n] += (other + unlisted).min()
    loss = distillation_loss(logits, batch, loss=kind)
    assert loss.item() == pytest.approx(found.mean().item(), abs=1e-6)
    assert loss < divergence(whole, q).sum(-1).mean() + 1e-3
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, batch, loss=kind), logits, atol=1e-6
    )


def test_a_student_in_the_small_vocabulary_learns_how_likely_other_is():
    """Logits fitted to the bucket: `other` gets what is known of it, and no listed id is moved for that."""
    batch, logits, _ = small_batch(3, num_positions=2)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        distillation_loss(logits, batch, loss="tail_bucket").backward()
        optimizer.step()
    target, tail = known_target(batch, 3)
    q = logits[0].softmax(-1).detach()
    assert (q[:, 3] > target[:, 3] - 1e-3).all()
    assert (q[:, 3] < target[:, 3] + tail + 1e-3).all()
    ids = batch["topk_indices"][0].long()
    for n in range(2):
        kept = ids[n][ids[n] >= 0]
        torch.testing.assert_close(q[n, kept], target[n, kept], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kept", [0, 3, V])
def test_whole_distributions_are_summed_up_exactly(kept):
    rows, logp = make_rows(0, 5, 4, V)
    columns = {name: rows.columns[name] for name in ("input_ids", "target_ids", "entropy")}
    columns["logprobs"] = logp.astype(np.float16)
    columns["logprobs"][0, V - 1] = -65504
    whole = Rows(lengths_R=rows.lengths_R, columns=columns)
    projection = FrequentTokens(np.arange(V), kept)
    found = projection(whole).columns
    assert set(found) == set(columns)
    stored = columns["logprobs"].astype(np.float64)
    expected = np.zeros((5, kept + 1))
    np.add.at(expected.T, projection._map_V, np.exp(stored).T)
    np.testing.assert_allclose(np.exp(found["logprobs"]), expected, rtol=1e-6)
    np.testing.assert_array_equal(found["logprobs"][:, :-1], stored[:, projection.kept])
    assert np.isfinite(found["logprobs"]).all()


def test_whole_distributions_are_not_projected_onto_another_tokenizer(tiny_tokenizer):
    rows = Rows(lengths_R=np.array([1]), columns={"logprobs": np.zeros((1, 400), np.float16)})
    with pytest.raises(ValueError, match="build the dataset with a top_k, or use FrequentTokens"):
        TokenizerProjection(tiny_tokenizer, tiny_tokenizer)(rows)


def test_a_temperature_is_refused_after_a_projection(data):
    projected = data.project(FrequentTokens(data.token_counts(), 100))
    batch = next(iter(projected.batches(batch_size=2)))
    with pytest.raises(ValueError, match="load without a projection"):
        distillation_loss(torch.zeros(*batch["input_ids"].shape, 101), batch, temperature=2.0)


def test_a_projected_dataset_gives_projected_batches_and_its_own_state(data):
    projection = FrequentTokens(data.token_counts(), 100, always_keep=[0])
    assert (data.vocab_size, data.project(projection).vocab_size) == (TINY_VOCAB_SIZE, 101)
    plain = data.batches(batch_size=3, length=150, packed=True)
    small = data.project(projection).batches(batch_size=3, length=150, packed=True)
    for before, after in zip(plain, small, strict=True):
        mask = before["mask"]
        assert torch.equal(mask, after["mask"])
        mapped = torch.from_numpy(projection._map_V)[before["input_ids"].long()]
        assert torch.equal(mapped[mask], after["input_ids"][mask])
        assert int(after["topk_indices"].max()) <= 100
    with pytest.raises(ValueError, match="saved state has projection = None"):
        small.load_state_dict(plain.state_dict())


def train_tokenizer(size, *, text=TRAINING_TEXT, normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(text) * 4, trainer)
    return backend


class WithEnd:
    """What `TokenizerProjection` knows of a fast tokenizer of transformers."""

    def __init__(self, backend, eos_token_id=0):
        self.backend_tokenizer, self.eos_token_id = backend, eos_token_id


def test_the_same_tokenizer_is_the_identity(data, tiny_tokenizer):
    projection = TokenizerProjection(tiny_tokenizer, tiny_tokenizer)
    assert projection.coverage == 1.0
    own = len(tiny_tokenizer)
    for group in data.row_groups[:2]:
        rows = data.read(group)
        found = projection(rows)
        np.testing.assert_array_equal(found.lengths_R, rows.lengths_R)
        before, after = rows.columns, found.columns
        assert after["mask"].all()
        np.testing.assert_array_equal(after["input_ids"], before["input_ids"])
        chunk_ends = before["target_ids"] != after["target_ids"]
        assert (after["target_ids"][chunk_ends] == NO_TARGET).all()
        assert chunk_ends.sum() < len(rows.lengths_R)
        # The tiny teacher has 448 logits, and 48 of them are of no token: their mass has no bytes and joins the tail.
        listed = before["topk_indices"] < own
        for n in range(len(listed)):
            was = dict(
                zip(
                    before["topk_indices"][n][listed[n]].tolist(),
                    before["topk_logprobs"][n][listed[n]].tolist(),
                    strict=True,
                )
            )
            now = dict(
                zip(
                    after["topk_indices"][n].tolist(),
                    after["topk_logprobs"][n].tolist(),
                    strict=True,
                )
            )
            assert {token: now[token] for token in was} == pytest.approx(was, abs=1e-5)
        np.testing.assert_allclose(mass(after), mass(before), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(257, 400), seed=st.integers(0, 10**6))
def test_another_tokenizer_conserves_mass_and_spells_the_same_bytes(size, seed, teacher_tokenizer):
    student = train_tokenizer(size, text=TRAINING_TEXT[seed % 3 :])
    projection = TokenizerProjection(teacher_tokenizer, WithEnd(student))
    text = " ".join(np.random.default_rng(seed).permutation(" ".join(TRAINING_TEXT).split()))
    ids = teacher_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    rows, _ = make_rows(seed, len(ids), 8, 400)
    rows.columns["input_ids"] = np.array(ids, np.int32)
    rows.columns["target_ids"] = np.array([*ids[1:], 0], np.int32)
    found = projection(rows).columns
    assert found["input_ids"].tolist() == student.encode(text).ids
    assert found["target_ids"].tolist() == [*found["input_ids"][1:].tolist(), 0]

    teacher_bytes, student_bytes = projection._teacher.bytes, projection._student.bytes
    teacher_ends = np.cumsum([len(teacher_bytes[i]) for i in ids])
    student_ends = np.cumsum([len(student_bytes[i]) for i in found["input_ids"]])
    np.testing.assert_array_equal(found["mask"], np.isin(student_ends, teacher_ends))
    assert found["mask"][-1]
    assert (found["topk_indices"][~found["mask"]] == -1).all()
    assert (found["tail_logprob"][~found["mask"]] == -65504).all()
    for m in np.flatnonzero(found["mask"]):
        t = int(np.flatnonzero(teacher_ends == student_ends[m])[0])
        expected = {}
        for token, logprob in zip(
            rows.columns["topk_indices"][t], rows.columns["topk_logprobs"][t], strict=True
        ):
            place = int(projection._map_V[token])
            if place >= 0:
                assert place == 0 or teacher_bytes[token].startswith(student_bytes[place])
                expected[place] = expected.get(place, 0) + float(np.exp(np.float64(logprob)))
        listed = found["topk_indices"][m] >= 0
        got = dict(
            zip(
                found["topk_indices"][m][listed].tolist(),
                np.exp(found["topk_logprobs"][m][listed].astype(np.float64)).tolist(),
                strict=True,
            )
        )
        assert got == pytest.approx(expected, rel=1e-5)
        assert (np.diff(found["topk_logprobs"][m]) <= 0).all()
        assert mass(found)[m] == pytest.approx(mass(rows.columns)[t], rel=1e-5)


@pytest.fixture(scope="module")
def teacher_tokenizer(tiny_tokenizer):
    return tiny_tokenizer


def word_tokenizer(words):
    """A byte-level tokenizer whose tokens are all bytes, and these words by their merges."""
    vocabulary = {
        token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault(word[:end], len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def test_whose_mass_goes_where():
    """teacher: the, then; student: th, thexy. What begins "the" may go on as "thexy", which only the student has as a token."""
    teacher, student = word_tokenizer(["then", "walked"]), word_tokenizer(["thexy", "wal"])
    projection = TokenizerProjection(WithEnd(teacher), WithEnd(student))
    loose = TokenizerProjection(WithEnd(teacher), WithEnd(student), strict=False)

    def goes(word, projection=projection):
        place = int(projection._map_V[teacher.token_to_id(word)])
        return None if place < 0 else student.id_to_token(place)

    assert goes("the") is None  # "thexy" begins so
    assert goes("the", loose) == "the"
    assert goes("then") == "the"
    assert goes("th") == "th"  # a teacher that meant "thexy" would have said "the"
    assert goes("walked") == "wal"
    assert goes("z") == "z"
    assert projection._map_V[0] == 0  # the end of a sequence


def test_a_normalising_tokenizer_is_refused_and_half_a_character_is_left_out(teacher_tokenizer):
    rows, _ = make_rows(0, 6, 4, 400)
    ids = teacher_tokenizer.backend_tokenizer.encode("The quick").ids
    rows.columns["input_ids"] = np.array((ids * 6)[:6], np.int32)
    lower = train_tokenizer(300, normalizer=normalizers.Lowercase())
    with pytest.raises(ValueError, match="does not spell a text as it is"):
        TokenizerProjection(teacher_tokenizer, WithEnd(lower))(rows)
    half = teacher_tokenizer.backend_tokenizer.token_to_id("Ã")  # the first byte of é
    rows.columns["input_ids"][-1] = half
    two = Rows(lengths_R=np.array([2, 4]), columns=rows.columns)
    found = TokenizerProjection(teacher_tokenizer, WithEnd(train_tokenizer(300)))(two)
    assert len(found.lengths_R) == 1
    assert all(len(values) == found.lengths_R[0] for values in found.columns.values())


def test_a_sentencepiece_vocabulary_is_understood():
    teacher = word_tokenizer(["Ġquick", "The"])
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for token in ("▁", "T", "h", "e", "▁T", "▁Th", "▁The", "q", "▁q"):
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "q")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    projection = TokenizerProjection(WithEnd(teacher), WithEnd(backend, None))

    def goes(word):
        place = int(projection._map_V[teacher.token_to_id(word)])
        return None if place < 0 else backend.id_to_token(place)

    assert goes("Ġquick") == "▁q"
    assert goes("Ã") == "<0xC3>"
    ids = teacher.encode("The quick").ids
    rows, _ = make_rows(0, len(ids), 4, 400)
    rows.columns["input_ids"] = np.array(ids, np.int32)
    found = projection(rows).columns
    assert [backend.id_to_token(i) for i in found["input_ids"][:3]] == ["▁The", "▁q", "<0x75>"]
    assert found["mask"][0]
    assert not found["mask"][1]

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="cannot tell the bytes of this tokenizer's tokens"):
        TokenizerProjection(WithEnd(teacher), words)


def test_logits_without_a_token_are_in_no_students_way(tiny_tokenizer):
    """A teacher whose logits are more than its tokens, as Qwen's."""
    assert len(tiny_tokenizer) < TINY_VOCAB_SIZE
    rows, _ = make_rows(0, 5, 8, TINY_VOCAB_SIZE)
    ids = tiny_tokenizer.backend_tokenizer.encode("The quick brown fox").ids
    rows.columns["input_ids"] = np.array(ids[:5], np.int32)
    rows.columns["topk_indices"][:, 0] = TINY_VOCAB_SIZE - 1
    found = TokenizerProjection(tiny_tokenizer, tiny_tokenizer)(rows).columns
    np.testing.assert_allclose(mass(found), mass(rows.columns), rtol=1e-5)
