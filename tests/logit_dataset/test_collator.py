"""Rows of `load_dataset`, collated, are the batches of the reader: in every format, through every loader, to the last bit."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import interleave_datasets, load_dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import (
    FrequentTokens,
    LogitCollator,
    TokenizerProjection,
    distillation_loss,
    load_logits,
)
from logit_dataset.divergences import LOSSES
from logit_dataset.rows import NO_TARGET, Rows
from tests import loopback_hub as stand_in
from tests.chats import chatty, chatty_teacher, sample_chats
from tests.conftest import TRAINING_TEXT, recipe_text, write_jsonl

CHATS = {"corpus": 'messages_column = "messages"'}
DATASETS = {
    "plain": ("top_k = 5\ntail_samples = 2", {}),
    "ids of draws": ("top_k = 1\ntail_samples = 6\ntail_logprobs = false", {}),
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
MAX_LENGTH = 120
FORMATS = ["numpy", "torch", None]


@pytest.fixture(scope="module")
def datasets(tiny_tokenizer, tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Rows shorter than 120 − 64 tokens, whose end is known, and longer ones; chats cut where no answer is left."""
    base, found = tmp_path_factory.mktemp("collated"), {}
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, base / "teacher")
    words = " ".join(TRAINING_TEXT).split()
    texts = [{"id": f"d{i}", "text": " ".join(words[i : i + 3 + i * 5 % 40])} for i in range(17)]
    for name, (output, changes) in DATASETS.items():
        write_jsonl(base / "corpus.jsonl", sample_chats(14) if changes else texts)
        text = recipe_text(
            teacher,
            "corpus.jsonl",
            output=f"{output}\nshard_tokens = 500",
            sequences=f"max_length = {48 if changes else MAX_LENGTH}",
            **changes,
        )
        (base / "recipe.toml").write_text(text)
        build(load_recipe(base / "recipe.toml"), base, base / name)
        found[name] = base / name
    return found


@pytest.fixture(scope="module")
def load(datasets, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(name, kind="numpy", **options):
        rows = load_dataset(str(datasets[name]), split="train", cache_dir=cache, **options)
        return rows.with_format(kind) if kind else rows

    return make


@pytest.fixture(scope="module")
def opened(datasets, tiny_tokenizer):
    def make(name, projection=None, **options):
        data = load_logits(datasets[name], **options)
        if projection == "frequent":
            return data.project(FrequentTokens.of(data, 90))
        if projection == "tokenizer":
            own = chatty(tiny_tokenizer)
            return data.project(TokenizerProjection(own, own))
        return data

    return make


def last_positions(batch):
    """[B, T]: the last position of every sequence."""
    sequences = torch.nn.functional.pad(batch["sequence_ids"], (0, 1), value=-1)
    return (sequences[:, 1:] != sequences[:, :-1]) & (sequences[:, :-1] >= 0)


def assert_same(found, expected):
    """The same batch; but for targets of last positions, which a row alone may not tell."""
    assert found.keys() == expected.keys() | {"labels", "attention_mask"}
    unknown = (found["target_ids"] == NO_TARGET) & last_positions(found)
    for name, values in expected.items():
        ours = found[name]
        assert ours.dtype == (values.dtype if values.dtype == torch.bool else torch.float32 if values.is_floating_point() else torch.int64)  # fmt: skip
        if name == "target_ids":
            ours, values = ours.masked_fill(unknown, 0), values.masked_fill(unknown, 0)
        assert torch.equal(ours.nan_to_num(7), values.to(ours.dtype).nan_to_num(7)), name
    return unknown


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("name", "projection", "options"),
    [
        *((name, None, {}) for name in DATASETS),
        *((name, "frequent", {}) for name in DATASETS),
        ("plain", "tokenizer", {}),
        ("kept", None, {"prompt_targets": True}),
    ],
)
def test_rows_become_the_batches_of_the_reader(load, opened, name, kind, projection, options):
    data = opened(name, projection, **options)
    collate = LogitCollator.of(data)
    loader = DataLoader(load(name, kind), batch_size=4, collate_fn=collate)
    batches = data.batches(batch_size=4, seed=None)
    known = 0
    for found, expected in zip(loader, batches, strict=True):
        unknown = assert_same(found, expected)
        known += int((last_positions(found) & ~unknown).sum())
        length = expected["sequence_ids"].ge(0).sum(1)
        assert (found["attention_mask"].sum(1) == length).all()
        long = length[:, None] >= MAX_LENGTH - 64
        assert not (unknown & ~long & found["mask"]).any()
    assert known > 3 or name.startswith(("chats", "kept"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("name", DATASETS)
def test_losses_and_gradients_are_the_same_to_the_last_digit(load, opened, name, loss, text_weight):
    if loss == "tail_draws" and name == "whole":
        pytest.skip("has no draws")
    data = opened(name)
    loader = DataLoader(load(name), batch_size=3, collate_fn=LogitCollator.of(data))
    generator = torch.Generator().manual_seed(0)
    for found, expected in zip(loader, data.batches(batch_size=3, seed=None), strict=True):
        if loss == "residual" or text_weight:  # of what follows a row, one may know more
            unknown = (found["target_ids"] != expected["target_ids"]) & last_positions(found)
            expected["target_ids"][unknown] = NO_TARGET
        logits = torch.randn(*found["input_ids"].shape, data.vocab_size, generator=generator)
        results = []
        for batch in (found, expected):
            student = logits.clone().requires_grad_()
            value = distillation_loss(student, batch, loss=loss, text_weight=text_weight)
            value.backward()
            results.append((value, student.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def sequences(batches):
    """Every sequence of some batches by what it holds, and its columns."""
    found = {}
    for batch in batches:
        for row, ids in enumerate(batch["sequence_ids"]):
            for number in range(int(ids.max()) + 1):
                (where,) = (ids == number).nonzero(as_tuple=True)
                values = {name: column[row][where] for name, column in batch.items()}
                found[*values["input_ids"].tolist(), *values["logsumexp"].tolist()] = values
    return found


@pytest.mark.parametrize("name", ["plain", "kept"])
@pytest.mark.parametrize("length", [None, 150, 40])
def test_packed_rows_hold_every_sequence_once(load, opened, name, length):
    data = opened(name)
    split = length == 40
    collate = LogitCollator.of(data, length=length, packed=True, split_long=split)
    batches = list(DataLoader(load(name), batch_size=9, collate_fn=collate))
    alone = LogitCollator.of(data, length=length if split else None, split_long=split)
    found, expected = sequences(batches), sequences(DataLoader(load(name), 1, collate_fn=alone))
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        for column in values.keys() - {"sequence_ids", "attention_mask"}:
            assert torch.equal(found[key][column].nan_to_num(), values[column].nan_to_num()), column
    for batch in batches:
        assert (
            "attention_mask" not in batch
        )  # with one, transformers would not keep sequences apart
        if length is None:
            assert len(batch["input_ids"]) == 1
            assert (batch["sequence_ids"] >= 0).all()
        else:
            assert batch["input_ids"].shape[1] == length
    if length == 150:
        full = torch.cat([batch["sequence_ids"].ge(0).float().mean(1) for batch in batches[:-1]])
        assert full.mean() > 0.75


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["plain", "kept"])
def test_labels_are_those_of_transformers(load, opened, tiny_model, name, packed):
    """Its models shift them: their loss on labels is the mean over the targets that the rows hold; packed, no sequence sees another."""
    collate = LogitCollator.of(opened(name), packed=packed)
    model = tiny_model.eval()
    for batch in DataLoader(load(name), batch_size=5, collate_fn=collate):
        keys = {"input_ids", "labels", "position_ids", "attention_mask"} & batch.keys()
        with torch.no_grad():
            result = model(**{key: batch[key] for key in keys}, use_cache=False)
            inside = batch["target_ids"].masked_fill(last_positions(batch), NO_TARGET)
            expected = cross_entropy(result.logits.flatten(0, 1), inside.flatten())
            torch.testing.assert_close(result.loss, expected)
            if packed:
                row = batch["sequence_ids"][0] == 1
                alone = model(input_ids=batch["input_ids"][:, row]).logits
                torch.testing.assert_close(result.logits[:, row], alone, atol=1e-4, rtol=1e-4)
        assert (batch["labels"] != NO_TARGET).sum() == (inside != NO_TARGET).sum()


def test_the_teacher_is_its_own_best_student(load, opened, tiny_model):
    """Aligned, the divergence is that of rounding; one position off it is large."""
    collate = LogitCollator.of(opened("whole"), packed=True, length=200)
    for batch in DataLoader(load("whole"), batch_size=6, collate_fn=collate):
        with torch.no_grad():
            logits = tiny_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        assert distillation_loss(logits, batch) < 0.005
        assert distillation_loss(logits.roll(1, 1), batch) > 1


def test_what_libraries_do_with_rows_is_theirs_to_do(load, datasets, opened):
    """Splits, filters, shuffling, interleaving, streams, and workers that are forked or spawned."""
    rows, collate = load("kept"), LogitCollator.of(opened("kept"))
    whole = sequences(DataLoader(rows, 3, collate_fn=collate))
    parts = rows.train_test_split(test_size=0.3, seed=0)
    held = [sequences(DataLoader(parts[part], 4, collate_fn=collate)) for part in parts]
    assert held[0].keys() | held[1].keys() == whole.keys()
    assert len(held[0]) + len(held[1]) == len(whole) == len(rows)
    answered = rows.filter(lambda row: row["completion_mask"][1:].any())
    assert sum(len(b["input_ids"]) for b in DataLoader(answered, 4, collate_fn=collate)) < len(rows)
    twice = interleave_datasets([rows, rows.shuffle(seed=1)], stopping_strategy="all_exhausted")
    assert sequences(DataLoader(twice.with_format("torch"), 5, collate_fn=collate)).keys() == whole.keys()  # fmt: skip
    stream = load("kept", streaming=True).shuffle(seed=2, buffer_size=5)
    assert sequences(DataLoader(stream, 3, collate_fn=collate)).keys() == whole.keys()
    for start in ("fork", "spawn"):
        loader = DataLoader(
            rows, 3, collate_fn=collate, shuffle=True, num_workers=2 if start == "fork" else 1,
            multiprocessing_context=start, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert sequences(loader).keys() == whole.keys()


class Distilling(Trainer):
    """All that a `Trainer` needs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        loss = distillation_loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("name", ["whole", "kept"])
def test_the_trainer_of_transformers_trains_and_evaluates(load, opened, tiny_model, tmp_path, name):
    """The teacher itself is the student: the loss is that of rounding, in training and evaluation, and from another student it is not."""
    parts = load(name).train_test_split(test_size=4, seed=0)
    same, other = (copy.deepcopy(tiny_model).requires_grad_(True) for _ in range(2))
    other.lm_head.weight.data.mul_(0.5)
    losses = []
    for model, columns in ((same, False), (other, False), (other, True)):
        arguments = TrainingArguments(
            tmp_path, max_steps=3, per_device_train_batch_size=3, learning_rate=0.0, logging_steps=1, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=columns,
        )  # fmt: skip
        trainer = Distilling(
            model=model, args=arguments, train_dataset=parts["train"], eval_dataset=parts["test"],
            data_collator=LogitCollator.of(opened(name)),
        )  # fmt: skip
        if columns:
            with pytest.raises(ValueError, match="unless remove_unused_columns=False"):
                trainer.train()
            continue
        trainer.train()
        trained = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        assert len(trained) == 3
        losses.append([*trained, trainer.evaluate()["eval_loss"]])
    assert max(map(abs, losses[0])) < 1e-3
    assert min(losses[1]) > 0.05


def test_a_collator_is_made_of_whatever_tells_of_a_dataset(load, datasets, opened):
    data = opened("kept")
    expected = LogitCollator.of(data)
    known = ("eos_token_id", "shortest_open", "vocab_size", "widths")
    assert [getattr(expected, name) for name in known] == [
        *(0, 48 - 64, 448),
        *({"topk_indices": 3, "topk_logprobs": 3, "tail_indices": 2, "tail_logprobs": 2, "hidden_states": 32},),
    ]  # fmt: skip
    for source in (datasets["kept"], str(datasets["kept"]), data.manifest):
        assert LogitCollator.of(source) == expected
        assert LogitCollator.of(source, length=7, packed=True).length == 7
    assert pickle.loads(pickle.dumps(expected)) == expected
    assert LogitCollator.of(opened("kept", prompt_targets=True)).prompt_targets
    alone = LogitCollator.of(load("kept"))
    assert (alone.widths, alone.eos_token_id) == (expected.widths, None)
    assert LogitCollator.of(load("kept", streaming=True)) == alone
    rows = [load("kept", None)[i] for i in range(4)]
    a, b = expected(rows), alone(rows)
    assert torch.equal(a["topk_logprobs"], b["topk_logprobs"])
    assert (b["target_ids"][last_positions(b)] == NO_TARGET).all()
    for nothing in (3, {"features": {}}, load_dataset):
        with pytest.raises(ValueError, match="does not identify a dataset"):
            LogitCollator.of(nothing)
    with pytest.raises(ValueError, match="neither a directory nor a Hub dataset name"):
        LogitCollator.of("not/a/name")
    with pytest.raises(ValueError, match=r"this dataset: manifest.json is damaged \(no 'totals'\)"):
        LogitCollator.of({"shards": []})


def test_of_a_repository_the_manifest_alone_is_fetched(datasets, opened, tmp_path):
    code = (
        "import sys\nfrom logit_dataset import LogitCollator\n"
        "print(LogitCollator.of('org/logits', revision='v1', length=9))"
    )
    with stand_in.serve() as hub:
        hub.commit("dataset", "org/logits", stand_in.directory_files(datasets["kept"]))
        hub.tag("dataset", "org/logits", "v1")
        client = stand_in.Client(hub.endpoint, tmp_path / "home")
        try:
            done = client.python(code)
            requests = list(hub.requests)
        finally:
            client.close()
    assert done.stdout.strip() == repr(LogitCollator.of(opened("kept"), length=9)), done.stderr
    assert not [request for request in requests if ".parquet" in request.path]


def test_a_batch_without_completions_has_no_distribution(load, opened):
    data = opened("kept")
    rows = load("kept", None)
    empty = [row for row in rows if not any(row["completion_mask"][1:])]
    assert len(empty) > 1
    for kind in FORMATS:
        some = list(load("kept", kind).filter(lambda row: not any(row["completion_mask"][1:])))
        batch = LogitCollator.of(data)(some)
        assert batch["topk_indices"].shape[2] == 3
        assert not batch["mask"].any()
        logits = torch.zeros(*batch["input_ids"].shape, 448, requires_grad=True)
        assert distillation_loss(logits, batch, text_weight=0.5) == 0
    with pytest.raises(ValueError, match=r"the number of values in .* is not known; make the coll"):
        LogitCollator()([{**row, **{n: [] for n in ("topk_indices", "topk_logprobs")}} for row in empty])  # fmt: skip


class Nothing:
    """A projection that finds no row that it can tell."""

    vocab_size, fingerprint = 448, ""

    def __call__(self, rows):
        columns = {name: values[:0] for name, values in rows.columns.items()}
        return Rows(lengths_R=rows.lengths_R[:0], columns=columns)


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"length": 9, "split_long": True}])
def test_a_batch_of_which_a_projection_leaves_nothing_is_padding(load, options):
    collate = LogitCollator(projection=Nothing(), **options)
    batch = collate([load("plain")[i] for i in range(3)])
    assert batch["input_ids"].shape == (1, options.get("length", 1))
    assert not batch["mask"].any()
    assert (batch["labels"] == NO_TARGET).all()
    logits = torch.zeros(*batch["input_ids"].shape, 448, requires_grad=True)
    assert distillation_loss(logits, batch) == 0


CUT = "columns are cut together or not at all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [{"input_ids": row["input_ids"]} for row in rows],
            "no tail_logprob, topk_indices, .* unless remove_unused_columns=False",
        ),
        (lambda rows: [], "there are no rows"),
        (lambda rows: [rows[0], {**rows[1], "more": 1}], "some rows have more and others do not"),
        (
            lambda rows: [rows[0], {**rows[1], "input_ids": rows[1]["input_ids"][:9]}],
            f"row 1 of .* {CUT}",
        ),
        (
            lambda rows: [{**row, "entropy": row["entropy"][:4]} for row in rows],
            f"4 positions in entropy, expected .*{CUT}",
        ),
        (
            lambda rows: [{k: v[:0] if np.ndim(v) else v for k, v in row.items()} for row in rows],
            "a row has no tokens",
        ),
        (
            lambda rows: [rows[0], {**rows[1], "topk_indices": rows[1]["topk_indices"] + 440}],
            r"topk_indices holds the id 8\d\d, expected 0 to 447",
        ),
        (
            lambda rows: [rows[0], {**rows[1], "tail_indices": rows[1]["tail_indices"] - 999}],
            "tail_indices holds the id -9[0-9]+, expected 0 to 447",
        ),
        (
            lambda rows: [rows[0], {**rows[1], "topk_logprobs": rows[1]["topk_logprobs"][:, :4]}],
            "topk_logprobs has 4, 5 values a position, expected 5",
        ),
        (
            lambda rows: [{**rows[0], "topk_logprobs": [[1.0], [1.0, 2.0]]}],
            "does not have the same number of values at every",
        ),
    ],
)
def test_what_does_not_fit_is_refused(load, opened, change, message):
    collate = LogitCollator.of(opened("plain"))
    with pytest.raises(ValueError, match=message) as caught:
        collate(change([load("plain")[i] for i in range(2)]))
    assert "\n" not in str(caught.value)


def test_options_that_make_no_sense_and_rows_that_are_too_long_are_refused(load, opened):
    for options, message in (
        ({"length": 0}, "length is 0, expected 1 or more"),
        ({"split_long": True}, "split_long needs a length"),
    ):
        with pytest.raises(ValueError, match=message):
            LogitCollator(**options)
    collate = LogitCollator.of(opened("plain"), length=10)
    with pytest.raises(ValueError, match=r"more than length = 10; choose a length of \d+ or more"):
        collate([load("plain")[2]])


def test_columns_of_others_come_along_if_they_have_a_value_a_token(load, opened):
    collate = LogitCollator.of(opened("plain"))

    def add(row):
        length = len(row["input_ids"])
        weights = np.arange(length, dtype=np.float32)
        pairs = np.stack([weights, weights], 1)
        others = {"words": ["a"] * length, "spans": [1, 2, 3], "labels": [5] * length, "score": 0.5}
        return {"weights": weights, "pairs": pairs, **others}

    batch = collate(list(load("plain").map(add).select(range(4))))
    real = batch["attention_mask"] == 1
    assert torch.equal(batch["weights"][real], batch["position_ids"][real].float())
    assert batch["pairs"].shape == (*real.shape, 2)
    assert not {"words", "spans", "score", "text", "id", "chunk_index"} & batch.keys()
    assert not (batch["labels"] == 5).all()
