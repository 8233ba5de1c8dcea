"""Padding has no probability, for our losses and for those of others; batches go into other processes."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import FrequentTokens, TokenizerProjection, distillation_loss, load_logits
from logit_dataset.divergences import LOSSES
from logit_dataset.rows import NO_TARGET
from tests.chats import chatty, chatty_teacher, sample_chats
from tests.conftest import TINY_VOCAB_SIZE, recipe_text, write_jsonl

CHATS = {"corpus": 'messages_column = "messages"'}
DATASETS = {
    "plain": ("top_k = 5\ntail_samples = 2", {}),
    "chats": (
        "top_k = 3\ntail_samples = 2\ntemperatures = [2.0, 0.5]\nhidden_states = true",
        CHATS,
    ),
    "kept": ("top_k = 3\ntail_samples = 2\nhidden_states = true\ncompletions_only = true", CHATS),
    "kept, ids of draws": (
        "top_k = 1\ntail_samples = 6\ntail_logprobs = false\ncompletions_only = true",
        CHATS,
    ),
    "whole": ('top_k = "all"\ntail_samples = 0', {}),
}
NOTHING = {
    **dict.fromkeys(("input_ids", "topk_indices", "tail_indices", "other_indices"), 0),
    **dict.fromkeys(("topk_logprobs", "tail_logprob", "tail_logprobs"), -65504),
    **dict.fromkeys(("logprobs", "target_logprob", "other_logprob"), -65504),
    **dict.fromkeys(("entropy", "logsumexp", "logsumexp_t2", "logsumexp_t0.5", "hidden_states"), 0),
    **{"completion_mask": False, "mask": False, "target_ids": NO_TARGET, "sequence_ids": -1},
}
SHAPES = [{}, {"length": 130}, {"length": 200, "packed": True}]


@pytest.fixture(scope="module")
def datasets(tiny_tokenizer, tiny_model, tmp_path_factory) -> dict[str, Path]:
    base, found = tmp_path_factory.mktemp("padding"), {}
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, base / "teacher")
    chats = sample_chats(7)
    texts = [{"id": c["id"], "text": c["messages"][-1]["content"] * (1 + i)} for i, c in enumerate(chats)]  # fmt: skip
    for name, (output, changes) in DATASETS.items():
        write_jsonl(base / "corpus.jsonl", chats if changes else texts)
        (base / "recipe.toml").write_text(
            recipe_text(teacher, "corpus.jsonl", output=output, **changes)
        )
        build(load_recipe(base / "recipe.toml"), base, base / name)
        found[name] = base / name
    return found


@pytest.fixture
def opened(datasets, tiny_tokenizer):
    """A dataset by name, projected or not."""

    def make(name, projection=None, **options):
        data = load_logits(datasets[name], **options)
        if projection == "frequent":
            return data.project(FrequentTokens.of(data, 90))
        if projection == "tokenizer":
            own = chatty(tiny_tokenizer)
            return data.project(TokenizerProjection(own, own))
        return data

    return make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "projection"),
    [
        *((name, None) for name in DATASETS),
        *((name, "frequent") for name in DATASETS),
        ("plain", "tokenizer"),
    ],
)
def test_every_column_of_padding_holds_nothing(opened, name, projection, shape):
    data, seen = opened(name, projection), 0
    for batch in data.batches(batch_size=3, **shape):
        padding = batch["sequence_ids"] == -1
        seen += int(padding.sum())
        for column, values in batch.items():
            if column == "position_ids":
                row = padding[:, 1:] & padding[:, :-1]
                assert (values.diff(dim=1)[row] == 1).all()
            else:
                assert (values[padding] == NOTHING[column]).all(), column
        assert not torch.isnan(batch["target_logprob"][padding]).any() if "target_logprob" in batch else True  # fmt: skip
    assert seen > 50


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "projection", "options"),
    [
        ("plain", None, {}),
        ("plain", "frequent", {}),
        ("plain", "tokenizer", {}),
        ("chats", None, {"prompt_targets": True}),
        ("kept", "frequent", {"prompt_targets": True}),
        ("whole", None, {}),
    ],
)
def test_what_stands_in_padding_changes_no_loss_and_no_gradient(
    opened, name, projection, options, loss, text_weight
):
    if loss == "tail_draws" and (name == "whole" or projection == "tokenizer"):
        pytest.skip("has no draws")
    data = opened(name, projection, **options)
    generator = torch.Generator().manual_seed(0)
    for batch in data.batches(batch_size=3, length=200, packed=True):
        padding = batch["sequence_ids"] == -1
        other = {key: values.clone() for key, values in batch.items()}
        for key in other.keys() - {"mask", "target_ids"}:
            other[key][padding] = 1
        logits = torch.randn(*padding.shape, data.vocab_size, generator=generator)
        found = []
        for one in (batch, other):
            student = logits.clone().requires_grad_()
            value = distillation_loss(student, one, loss=loss, text_weight=text_weight)
            value.backward()
            assert not student.grad[padding].any()
            assert student.grad.isfinite().all()
            found.append((value, student.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def losses_of_others(logits, batch):
    """What people write by hand: no mask, or one by which they multiply."""
    logq, listed = logits.log_softmax(-1), batch["topk_logprobs"].float()
    head = logq.gather(-1, batch["topk_indices"].long())
    tail = batch["tail_logprob"].float()
    rest = torch.log1p(-head.exp().sum(-1).clamp(max=1 - 1e-6))
    nll = -batch["target_logprob"].float()
    mask = (batch["target_ids"] != NO_TARGET) & ~nll.isnan()
    return {
        "forward KL over the top K": (listed.exp() * (listed - head)).sum(),
        "and the tail": (tail.exp() * (tail - rest)).sum(),
        "teacher's NLL, masked": (nll.nan_to_num() * mask).sum(),
        "mass": listed.exp().sum() + tail.exp().sum(),
        "text": cross_entropy(logits.flatten(0, 1), batch["target_ids"].flatten(), reduction="sum"),
        "draws": -(tail.exp()[..., None] / 2 * logq.gather(-1, batch["tail_indices"].long())).sum(),
    }


def test_losses_of_others_count_nothing_in_padding(opened):
    data = opened("plain")
    embedding = torch.randn(data.vocab_size, data.vocab_size, generator=torch.Generator().manual_seed(0))  # fmt: skip
    sums = []
    for shape in ({"batch_size": 1}, {"batch_size": 4}, {"batch_size": 2, "length": 200, "packed": True}):  # fmt: skip
        parts = [
            losses_of_others(embedding[batch["input_ids"].long()], batch)
            for batch in data.batches(**shape, seed=None, int64_targets=True)
        ]
        sums.append({name: sum(float(part[name]) for part in parts) for name in parts[0]})
    for other in sums[1:]:
        assert other == pytest.approx(sums[0], rel=1e-5)
    assert sums[0]["mass"] == pytest.approx(data.num_tokens, rel=1e-3)


def test_targets_in_int64_are_the_same(opened):
    data = opened("chats")
    for narrow, wide in zip(data.batches(batch_size=3), data.batches(batch_size=3, int64_targets=True), strict=True):  # fmt: skip
        assert (narrow["target_ids"].dtype, wide["target_ids"].dtype) == (torch.int32, torch.int64)
        assert all(torch.equal(narrow[key].nan_to_num(), wide[key].nan_to_num()) for key in narrow)
    state = data.batches(batch_size=3).state_dict()
    data.batches(batch_size=3, int64_targets=True).load_state_dict(state)  # it is the same place


class OwnRows(torch.utils.data.Dataset):
    """Somebody's dataset on top of ours, in workers that are started anew."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data.row_groups)

    def __getitem__(self, number):
        return torch.from_numpy(self.data.read(self.data.row_groups[number]).columns["input_ids"])


@pytest.mark.parametrize("projection", [None, "frequent", "tokenizer"])
def test_datasets_and_batches_are_pickled_with_their_place(opened, projection):
    data = opened("plain", projection)
    batches = data.batches(batch_size=2)
    first = next(iter(batches))
    there = pickle.loads(pickle.dumps(batches))
    rest, expected = list(there), list(batches)
    assert len(rest) == len(expected) > 1
    for a, b in zip(rest, expected, strict=True):
        assert all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in first)
    again = pickle.loads(pickle.dumps(data))
    assert repr(again) == repr(data)
    assert again.vocab_size == (91 if projection == "frequent" else data.vocab_size)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_workers_that_are_spawned_read_the_same(opened):
    data = opened("plain")
    assert data.vocab_size == TINY_VOCAB_SIZE
    loader = torch.utils.data.DataLoader(
        OwnRows(data), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.cat([OwnRows(data)[i] for i in range(len(data.row_groups))]))
