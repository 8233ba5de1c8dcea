"""Completions: which tokens are theirs, which positions are kept for them, and that a student learns the same either way."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from builder.capture.distribution import concatenate
from builder.capture.pipeline import Pipeline
from builder.corpus.sequences import Sequence
from builder.dataset.shards import ShardWriter, nested_values
from builder.teacher.model import Teacher
from logit_dataset import FrequentTokens, TokenizerProjection, distillation_loss, load_logits
from logit_dataset.divergences import LOSSES
from logit_dataset.rows import EMPTY, Rows
from logit_dataset.schema import (
    FLOAT16_MIN,
    Layout,
    arrow_schema,
    card_features,
    columns,
    loss_mask,
)
from tests.conftest import TINY_VOCAB_SIZE, TRAINING_TEXT, refit

OPTIONS = {"top_k": 6, "tail_samples": 2, "temperatures": (2.0,), "hidden_states": True}
SIZES = {"vocab_size": TINY_VOCAB_SIZE, "hidden_size": 32}
ALL = Layout(completion_mask=True, **OPTIONS, **SIZES)
KEPT = Layout(completion_mask=True, completions_only=True, **OPTIONS, **SIZES)
WIDE = ("topk_indices", "topk_logprobs", "tail_indices", "tail_logprobs", "hidden_states")
END = 0
"""The tiny tokenizer's <eos>."""


def test_the_worked_example_of_the_schema():
    """The ▁capital ▁of ▁France ? | ▁Paris <end>"""
    mask = [False, False, False, False, False, True, True]
    assert loss_mask(mask).tolist() == [False, False, False, False, True, True, False]
    assert loss_mask([True]).tolist() == [False]
    assert loss_mask([]).tolist() == []


@given(st.lists(st.booleans(), max_size=30))
def test_kept_positions_are_those_before_a_completion_s_token(mask):
    expected = [t + 1 < len(mask) and mask[t + 1] for t in range(len(mask))]
    assert loss_mask(mask).tolist() == expected
    sequence = Sequence(
        document_id="",
        chunk_index=0,
        text="",
        token_ids=[1] * len(mask),
        next_token=0,
        completion_mask=mask,
    )
    assert sequence.loss_positions == [t for t, is_kept in enumerate(expected) if is_kept]


def test_the_layouts_differ_in_shapes_only():
    assert [c.name for c in columns(ALL)] == [c.name for c in columns(KEPT)]
    assert arrow_schema(ALL).equals(arrow_schema(KEPT))
    assert card_features(ALL) == card_features(KEPT)
    shapes = {a.name: (a.shape, b.shape) for a, b in zip(columns(ALL), columns(KEPT), strict=True)}
    assert {name for name, (a, b) in shapes.items() if a != b} == set(WIDE)
    assert shapes["hidden_states"] == ("T,D", "C,D")
    assert shapes["completion_mask"] == ("T", "T")
    assert all(KEPT.width(c) == ALL.width(c) for c in columns(ALL))
    assert KEPT.width(next(c for c in columns(KEPT) if c.name == "topk_indices")) == 6
    names = [c.name for c in columns(ALL)]
    assert names.index("completion_mask") == names.index("input_ids") + 1
    assert "completion_mask" not in [c.name for c in columns(Layout(**OPTIONS, **SIZES))]


def make_rows(masks: list[list[bool]], seed: int = 0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [
        Sequence(
            document_id=f"d{i}",
            chunk_index=0,
            text=f"text {i}",
            token_ids=rng.integers(1, 400, len(mask)).tolist(),
            next_token=END,
            completion_mask=mask,
        )
        for i, mask in enumerate(masks)
    ]


MASKS = [
    [False] * 5 + [True] * 7,
    [False] * 9,  # a prompt alone
    [True] * 6,  # a completion from the first token on
    [False, True] * 8,
    [False] * 20 + [True],
    [True] + [False] * 3,  # what is left of a completion whose beginning is in the chunk before
    [False],
    [False] * 3 + [True] * 30 + [False] * 2 + [True] * 4 + [False],
]


@pytest.fixture(scope="module")
def teacher(tiny_model, tiny_tokenizer) -> Teacher:
    return Teacher(tiny_model, tiny_tokenizer, device=torch.device("cpu"))


def blocks_of(teacher: Teacher, layout: Layout, rows: list[Sequence]) -> list:
    return list(Pipeline(teacher, layout=layout, batch_tokens=40).blocks(iter(rows)))


def test_the_pipeline_keeps_the_same_values_at_kept_positions(teacher):
    rows = make_rows(MASKS * 3)
    whole, kept = (blocks_of(teacher, layout, rows) for layout in (ALL, KEPT))
    assert len(whole) == len(kept) > 1
    all_of, kept_of = (concatenate([b.distribution for b in blocks]) for blocks in (whole, kept))
    where = np.concatenate([loss_mask(row.completion_mask) for row in rows])
    assert 0 < where.sum() < len(where)
    for name, values in all_of.items():
        expected = values[torch.from_numpy(where)] if name in WIDE else values
        assert torch.equal(kept_of[name].nan_to_num(), expected.nan_to_num()), name


def write(path, teacher, layout, rows) -> pq.ParquetFile:
    options = {"layout": layout, "profile": "default", "metadata": {}}
    with pa.OSFile(str(path), "wb") as sink, ShardWriter(sink, **options) as writer:
        for block in blocks_of(teacher, layout, rows):
            writer.write(block)
    return pq.ParquetFile(path)


def test_files_hold_the_rows_of_kept_positions(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("builder.dataset.shards.ROW_GROUP_TOKENS", 30)
    rows = make_rows(MASKS)
    whole = write(tmp_path / "whole.parquet", teacher, ALL, rows).read().to_pylist()
    file = write(tmp_path / "kept.parquet", teacher, KEPT, rows)
    assert file.num_row_groups > 2
    for row, full, kept in zip(rows, whole, file.read().to_pylist(), strict=True):
        assert kept["completion_mask"] == full["completion_mask"] == row.completion_mask
        for name in full:
            expected = [full[name][t] for t in row.loss_positions] if name in WIDE else full[name]
            assert kept[name] == expected, name


def test_a_row_group_without_any_kept_position_can_be_read():
    nothing = pa.chunked_array([pa.array([[], []], pa.list_(pa.list_(pa.int32())))])
    assert nested_values(nothing).shape == (0, 0)


# The student


def dataset(directory, teacher, layout, rows):
    """What the student needs of a dataset."""
    (directory / "data").mkdir(parents=True)
    write(directory / "data" / "train-000-00000.parquet", teacher, layout, rows)
    output = {"text": True, "top_k": layout.top_k, "tail_samples": layout.tail_samples}
    output |= {"temperatures": [2.0], "hidden_states": True}
    output |= {"completions_only": layout.completions_only}
    manifest = {
        "schema_version": "1.2.0",
        **{"fingerprint": "f", "row_fingerprint": ""},
        "recipe": {
            "corpus": {"messages_column": "messages"},
            "sequences": {"long_documents": "chunk", "max_length": 64},
            "output": output,
        },
        "teacher": {**SIZES, "name": "x", "sha256": "x", "eos_token_id": END}
        | {"prefix_ids": [], "suffix_ids": [], "tokenizer_sha256": "x"},
        "shards": [{"file": "data/train-000-00000.parquet"}],
        "totals": {},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    refit(directory)
    return directory


@pytest.fixture(scope="module")
def pair(teacher, tmp_path_factory):
    """The same rows, whole and with positions in the loss mask only; several row groups, of which some have none."""
    base, rows = tmp_path_factory.mktemp("pair"), make_rows(MASKS * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builder.dataset.shards.ROW_GROUP_TOKENS", 12)
        return tuple(
            dataset(base / name, teacher, layout, rows)
            for name, layout in (("whole", ALL), ("kept", KEPT))
        )


SHAPES = [
    {"batch_size": 3},
    {"batch_size": 2, "length": 64, "packed": True},
    {"batch_size": 2, "length": 7, "packed": True, "split_long": True},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_says_where_the_next_token_is_the_completion_s(pair, shape):
    expected = {tuple(row.token_ids): row for row in make_rows(MASKS * 4)}
    seen = 0
    for path in pair:
        for batch in load_logits(path).batches(**{**shape, "length": shape.get("length")}):
            if shape.get("split_long"):
                break
            for ids, mask, targets, which in zip(
                batch["input_ids"],
                batch["mask"],
                batch["target_ids"],
                batch["sequence_ids"],
                strict=True,
            ):
                for number in range(int(which.max()) + 1):
                    where = which == number
                    row = expected[tuple(ids[where].tolist())]
                    wanted = loss_mask(row.completion_mask)
                    assert mask[where].tolist() == wanted.tolist()
                    followers = np.where(wanted, [*row.token_ids[1:], 0], -100)
                    assert targets[where].tolist() == followers.tolist()
                    seen += 1
            assert not batch["mask"][batch["sequence_ids"] < 0].any()
    assert seen == (0 if shape.get("split_long") else 2 * len(MASKS) * 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_targets", [False, True])
def test_what_counts_is_the_same_in_both_layouts(pair, shape, prompt_targets):
    whole, kept = (load_logits(path, prompt_targets=prompt_targets) for path in pair)
    counted = known = 0
    for full, part in zip(whole.batches(**shape), kept.batches(**shape), strict=True):
        assert full.keys() == part.keys()
        mask = full["mask"]
        counted += int(mask.sum())
        for name in full:
            if name in WIDE:
                assert torch.equal(full[name][mask], part[name][mask]), name
                nothing = {"topk_indices": EMPTY}.get(name, 0)
                nothing = FLOAT16_MIN if name.endswith("logprobs") else nothing
                has_token = part["sequence_ids"] >= 0
                assert (part[name][~mask & has_token] == nothing).all()
            else:
                assert torch.equal(full[name].nan_to_num(), part[name].nan_to_num()), name
        known += int((full["target_ids"] >= 0).sum())
        assert (full["target_ids"][mask] >= 0).all()
    assert counted == sum(len(row.loss_positions) for row in make_rows(MASKS * 4))
    assert (known > counted) is prompt_targets


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("prompt_targets", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_loss_and_gradient_are_the_same_in_both_layouts(
    pair, kind, temperature, prompt_targets, projected
):
    if temperature != 1 and (projected or kind == "tail_draws"):
        return
    found = []
    for path in pair:
        data = load_logits(path, prompt_targets=prompt_targets)
        if projected:
            data = data.project(FrequentTokens(data.token_counts(), 400))
        generator, parts = torch.Generator().manual_seed(0), []
        for batch in data.batches(batch_size=3):
            shape = (*batch["input_ids"].shape, data.vocab_size)
            logits = torch.randn(shape, generator=generator, requires_grad=True)
            loss = distillation_loss(
                logits, batch, loss=kind, temperature=temperature, text_weight=0.25
            )
            loss.backward()
            parts += [loss.detach(), logits.grad]
        found.append(parts)
    for a, b in zip(*found, strict=True):
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        if (
            prompt_targets
        ):  # at a prompt, one sums over the vocabulary in two parts, the other in one
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    assert sum(float(part.abs().sum()) for part in found[0]) > 1


def test_a_prompt_has_no_gradient(pair):
    data = load_logits(pair[1])
    for batch in data.batches(batch_size=4):
        logits = torch.randn(*batch["input_ids"].shape, data.vocab_size, requires_grad=True)
        distillation_loss(logits, batch, text_weight=0.5).backward()
        assert torch.equal(logits.grad.abs().sum(-1) > 0, batch["mask"])


def test_a_state_says_which_targets_it_was_made_with(pair):
    with_prompts, without = (load_logits(pair[0], prompt_targets=p) for p in (True, False))
    state = with_prompts.batches(batch_size=2).state_dict()
    with pytest.raises(ValueError, match="the saved state has prompt_targets = True"):
        without.batches(batch_size=2).load_state_dict(state)
    old = {k: v for k, v in state.items() if k != "prompt_targets"}
    without.batches(batch_size=2).load_state_dict(old)  # of a time that knew no completions


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_any_masks_come_back_at_their_places(masks):
    from logit_dataset.rows import _learned, at_their_places

    lengths = np.array([len(mask) for mask in masks])
    table = pa.table({"completion_mask": pa.array(masks)})
    learned, counts = _learned(table, lengths)
    expected = [loss_mask(mask) for mask in masks]
    assert learned.tolist() == np.concatenate(expected).tolist()
    assert counts.tolist() == [int(kept.sum()) for kept in expected]
    values = np.arange(1, 2 * counts.sum() + 1, dtype=np.float16).reshape(-1, 2)
    placed = at_their_places(values, learned, "topk_logprobs")
    assert np.array_equal(placed[learned], values)
    assert (placed[~learned] == FLOAT16_MIN).all()


# The student's own vocabulary


def projected(student_of, masks: list[list[bool]], ids: list[int], prompt_targets: bool):
    """Rows of one text as the loader gives them, in another tokenizer's tokens."""
    lengths = np.array([len(mask) for mask in masks])
    learned = np.concatenate([loss_mask(mask) for mask in masks])
    rng = np.random.default_rng(0)
    n = int(lengths.sum())
    targets = np.append(ids[1:], -100).astype(np.int32)
    targets[lengths.cumsum() - 1] = -100
    columns = {
        "input_ids": np.array(ids, np.int32),
        "completion_mask": np.concatenate(masks),
        "mask": learned,
        "target_ids": targets if prompt_targets else np.where(learned, targets, np.int32(-100)),
        "topk_indices": np.where(learned[:, None], rng.permuted(np.tile(np.arange(1, 7), (n, 1)), axis=1), EMPTY).astype(np.int32),
        "topk_logprobs": np.where(learned[:, None], -2.0, FLOAT16_MIN).repeat(6, 1).astype(np.float16),
        "tail_logprob": np.full(n, -1.5, np.float16),
        "entropy": np.ones(n, np.float16),
    }  # fmt: skip
    return student_of(Rows(lengths_R=lengths, columns=columns))


@pytest.mark.parametrize("prompt_targets", [False, True])
def test_the_same_tokenizer_leaves_masks_and_targets_as_they_are(tiny_tokenizer, prompt_targets):
    ids = tiny_tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    mask = [t % 5 in (2, 3) for t in range(len(ids))]
    same = TokenizerProjection(tiny_tokenizer, tiny_tokenizer)
    found = projected(same, [mask], ids, prompt_targets)
    assert found.columns["input_ids"].tolist() == ids
    assert found.columns["completion_mask"].tolist() == mask
    assert found.columns["mask"].tolist() == loss_mask(mask).tolist()
    known = [True] * (len(ids) - 1) + [False] if prompt_targets else loss_mask(mask)
    expected = np.where(known, [*ids[1:], 0], -100)
    assert found.columns["target_ids"].tolist() == expected.tolist()
    assert (found.columns["topk_indices"][~loss_mask(mask)] == EMPTY).all()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_student_s_token_is_the_completion_s_if_a_byte_of_it_is(
    tiny_tokenizer, small_tokenizer, data
):
    text = data.draw(st.sampled_from(TRAINING_TEXT))
    ids = tiny_tokenizer.encode(text)
    size = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    mask = data.draw(size)
    projection = TokenizerProjection(tiny_tokenizer, small_tokenizer)
    found = projected(projection, [mask], ids, prompt_targets=False).columns
    spelled = [len(projection._teacher.bytes[i]) for i in ids]
    flags = np.repeat(mask, spelled)
    sizes = [len(projection._student.bytes[i]) for i in found["input_ids"]]
    ends = np.cumsum(sizes)
    expected = [bool(flags[end - size : end].any()) for size, end in zip(sizes, ends, strict=True)]
    assert found["completion_mask"].tolist() == expected
    teacher_ends = np.cumsum(spelled).tolist()
    for m, end in enumerate(ends):
        t = teacher_ends.index(end) if end in teacher_ends else None
        assert found["mask"][m] == (t is not None and loss_mask(mask)[t])
        if found["mask"][m]:
            assert found["target_ids"][m] == found["input_ids"][m + 1]
    # A target that counts is a completion's; the first token of a row is nobody's target.
    for m, target in enumerate(found["target_ids"][:-1]):
        assert (target != -100) == bool(flags[ends[m] : ends[m + 1]].any())


@pytest.fixture(scope="module")
def small_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT[1:] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_special_token_within_a_row_is_refused_and_one_at_its_ends_is_not(
    tiny_tokenizer, small_tokenizer
):
    projection = TokenizerProjection(tiny_tokenizer, small_tokenizer)
    ids = tiny_tokenizer.encode("The quick brown fox")
    mask = [False, *([True] * len(ids))]
    found = projected(projection, [mask], [*ids, END], prompt_targets=False)
    assert found.columns["completion_mask"].any()
    middle = [*ids[:3], END, *ids[3:]]
    with pytest.raises(ValueError, match=r"special tokens between others.*use FrequentTokens"):
        projected(projection, [mask], middle, prompt_targets=False)


@pytest.mark.parametrize("stray", [END, 447])
def test_a_row_in_which_a_teacher_has_drawn_what_has_no_bytes_is_left_out(
    tiny_tokenizer, small_tokenizer, stray
):
    """A special token, or a logit that is no token's: the other rows are as they would be alone."""
    projection = TokenizerProjection(tiny_tokenizer, small_tokenizer)
    ids = tiny_tokenizer.encode("The quick brown fox")
    mask = [False, *([True] * (len(ids) - 1))]
    alone = projected(projection, [mask], ids, prompt_targets=False)
    strayed = [*ids[:3], stray, *ids[3:]]
    found = projected(projection, [[False, *mask], mask], [*strayed, *ids], prompt_targets=False)
    assert found.lengths_R.tolist() == alone.lengths_R.tolist()
    for name in ("input_ids", "target_ids", "mask", "completion_mask"):
        np.testing.assert_array_equal(found.columns[name], alone.columns[name])
