"""A selection of rows has the values that these rows have in the whole dataset, reads nothing else, and is told from any other."""

import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import FrequentTokens, TokenizerProjection, load_logits
from logit_dataset.rows import NO_TARGET
from tests import loopback_hub as stand_in
from tests.chats import chatty, chatty_teacher, sample_chats
from tests.conftest import recipe_text, sample_documents, write_jsonl
from tests.end_to_end.test_holdout import SHARE
from tests.logit_dataset.test_load import assert_same_batches, sequences

TEXT = {"output": f"top_k = 5\ntail_samples = 2\nshard_tokens = 1000\nvalidation = {SHARE}"}
CHATS = {
    "corpus": 'messages_column = "messages"',
    "output": "top_k = 3\ntail_samples = 2\nhidden_states = true\ncompletions_only = true",
}


@pytest.fixture(scope="module")
def datasets(tiny_tokenizer, tiny_model, tmp_path_factory):
    """Documents with a hold-out, in several files of several row groups; and chats of which only completions are kept."""
    base = tmp_path_factory.mktemp("selection")
    teacher = chatty_teacher(tiny_tokenizer, tiny_model, base / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builder.dataset.shards.ROW_GROUP_TOKENS", 200)
        for name, rows, changes in (
            ("text", sample_documents(120), TEXT),
            ("chats", sample_chats(15), CHATS),
        ):
            write_jsonl(base / "corpus.jsonl", rows)
            (base / "recipe.toml").write_text(recipe_text(teacher, "corpus.jsonl", **changes))
            build(load_recipe(base / "recipe.toml"), base, base / name)
    return base


@pytest.fixture(scope="module")
def data(datasets):
    found = load_logits(datasets / "text")
    assert len({group.file for group in found.row_groups}) > 2
    assert len(found.row_groups) > 5 + len({group.file for group in found.row_groups})
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("logit_dataset.batches.BUFFER_TOKENS", 700)


def rows_of(data, **options):
    """Every row of an epoch in stored order, as the batch of one row."""
    return list(data.batches(batch_size=1, seed=None, **options))


def some_rows(data):
    """Rows from both ends, a whole row group, and parts of some others."""
    starts = np.cumsum([0, *(group.num_rows for group in data.row_groups)])
    group = next(i for i, g in enumerate(data.row_groups) if i > 0 and g.num_rows > 2)
    whole = range(starts[group], starts[group + 1])
    numbers = {0, *whole, starts[group + 1], data.num_rows - 1}
    assert 4 < len(numbers) < data.num_rows // 2
    return sorted(map(int, numbers))


@pytest.mark.parametrize("projection", [None, "frequent", "tokenizer"])
@pytest.mark.parametrize(("name", "split"), [("text", "train"), ("text", "validation"), ("chats", "train")])  # fmt: skip
def test_values_are_those_of_the_rows_in_the_whole_dataset(
    datasets, tiny_tokenizer, name, split, projection
):
    data = load_logits(datasets / name, split=split)
    numbers = some_rows(data)
    if projection == "frequent":
        data = data.project(FrequentTokens.of(data, 90))
    elif projection == "tokenizer":
        own = chatty(tiny_tokenizer)
        data = data.project(TokenizerProjection(own, own, strict=False))
        if (
            name == "chats"
        ):  # their special tokens have no bytes: such rows are refused, chosen or not
            for each in (data, data.select(numbers)):
                with pytest.raises(ValueError, match="special token"):
                    rows_of(each)
            return
    expected = [rows_of(data)[number] for number in numbers]
    selected = data.select(numbers)
    assert len(selected) == selected.num_rows == len(numbers)
    assert_same_batches(rows_of(selected), expected)
    if projection is None:
        assert selected.num_tokens == sum(int((b["sequence_ids"] >= 0).sum()) for b in expected)
    counts = np.zeros(data.manifest["teacher"]["vocab_size"], np.int64)
    for number in numbers:
        counts += data.select([number]).token_counts()
    np.testing.assert_array_equal(selected.token_counts(), counts)
    assert counts.sum() == selected.num_tokens


def test_a_target_that_another_row_holds_is_known_without_that_row(data):
    lasts = [row["target_ids"][0, -1].item() for row in rows_of(data)]
    ids = [row["input_ids"][0, 0].item() for row in rows_of(data)]
    eos = data.manifest["teacher"]["eos_token_id"]
    number = next(i for i, last in enumerate(lasts[:-1]) if last not in (eos, NO_TARGET))
    assert rows_of(data.select([number]))[0]["target_ids"][0, -1] == lasts[number] == ids[number + 1]  # fmt: skip


@pytest.mark.parametrize(
    "kind", [list, tuple, set, np.array, torch.tensor, pd.Series, iter, lambda n: reversed(n)]
)
def test_numbers_come_in_any_kind_and_order(data, kind):
    numbers = some_rows(data)
    assert data.select(kind(numbers)) == data.select(numbers)
    assert data.select(kind(numbers)).selection == data.select(numbers).selection is not None


def test_all_rows_are_the_dataset_itself(data):
    assert data.select(range(len(data))) is data
    state = data.batches(batch_size=2).state_dict()
    assert state["selection"] is None


def test_a_selection_of_a_selection_counts_its_own_rows(data):
    numbers = some_rows(data)
    again = data.select(range(1, len(data), 2)).select([0, 3, 5, 6])
    assert again == data.select([1, 7, 11, 13])
    assert any(g.rows is not None and g.num_rows > 1 for g in again.row_groups)
    assert_same_batches(rows_of(again), [rows_of(data)[i] for i in (1, 7, 11, 13)])
    with pytest.raises(ValueError, match=f"row {len(numbers)}, expected 0 to {len(numbers) - 1}"):
        data.select(numbers).select([len(numbers)])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "indices are empty"),
        (np.array([], np.int64), "indices are empty"),
        ([0, -1], r"indices name the row -1, expected 0 to \d+ \(\d+ rows\)"),
        ([0, 10**6], r"indices name the row 1000000, expected 0 to"),
        (np.array([2**63 + 1], np.uint64), "indices name the row 9223372036854775809"),
        ([2**80], "indices are object of shape"),
        ([5, 3, 5], r"indices name the row 5 twice.*give np.unique\(indices\)"),
        ([True, False], r"indices are bool of shape \(2,\).*np.flatnonzero\(mask\)"),
        ([0.0, 1.0], "indices are float64 of shape"),
        ([[0, 1]], r"indices are int64 of shape \(1, 2\)"),
        ("12", "indices are <U1"),
    ],
)
def test_what_no_row_is_is_refused_in_a_line(data, indices, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.select(indices)
    assert "\n" not in str(caught.value)


def test_row_groups_without_a_chosen_row_are_not_read(datasets, data, tmp_path):
    """All bytes of the others' files are wrong from here on."""
    out = shutil.copytree(datasets / "text", tmp_path / "out")
    opened = load_logits(out)
    file = data.row_groups[-1].file
    numbers = range(sum(g.num_rows for g in data.row_groups if g.file != file), len(data))
    for path in (out / "data").glob("*.parquet"):
        if path.name not in file:
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="verify the dataset"):
        rows_of(opened)
    assert_same_batches(rows_of(opened.select(numbers)), rows_of(data)[-len(numbers) :])
    path = out / file
    footer = pq.read_metadata(path)
    start = footer.row_group(footer.num_row_groups - 1).column(0).dictionary_page_offset or footer.row_group(footer.num_row_groups - 1).column(0).data_page_offset  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(bytes(start) + content[start:])
    assert_same_batches(rows_of(opened.select([len(data) - 1])), rows_of(data)[-1:])
    with pytest.raises(ValueError, match="verify the dataset"):
        rows_of(opened.select(numbers))


@pytest.mark.parametrize("shape", [{"batch_size": 2}, {"batch_size": 2, "length": 130, "packed": True}])  # fmt: skip
def test_it_is_shuffled_shared_and_resumed_as_any_dataset(data, shape):
    selected = data.select(range(3, len(data), 2))

    def keys(batches):
        return sorted(str(s["topk_logprobs"].tolist()) for s in sequences(batches))

    expected = keys(selected.batches(**shape))
    assert len(expected) == len(selected)
    orders = [[b["input_ids"].tolist() for b in selected.batches(**shape, seed=s)] for s in (1, 2)]
    assert orders[0] != orders[1]
    parts = [keys(selected.batches(**shape, rank=rank, world_size=3)) for rank in range(3)]
    assert all(parts)
    assert sorted(key for part in parts for key in part) == expected

    whole = list(selected.batches(**shape))
    first = selected.batches(**shape)
    taken = [batch for _, batch in zip(range(3), first, strict=False)]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = pickle.loads(pickle.dumps(selected)).batches(**shape)
    resumed.load_state_dict(state)
    assert_same_batches([*taken, *resumed], whole)


def test_a_state_of_other_rows_is_refused(data):
    selected = data.select(range(9))
    states = [each.batches(batch_size=2).state_dict() for each in (data, selected)]
    for each, state in (
        (selected, states[0]),
        (data, states[1]),
        (data.select(range(1, 10)), states[1]),
        (data.select(range(8)), states[1]),
    ):
        with pytest.raises(ValueError, match="the saved state has selection = "):
            each.batches(batch_size=2).load_state_dict(state)
    older = {name: value for name, value in states[0].items() if name != "selection"}
    data.batches(batch_size=2).load_state_dict(older)  # of a version that knew no selections


def test_more_processes_than_row_groups_are_refused(data):
    with pytest.raises(
        ValueError, match=r"1 row groups cannot be shared by 2.*select rows of more"
    ):
        data.select([0, 1]).batches(batch_size=1, world_size=2)


STREAMED = """
from logit_dataset import load_logits
data = load_logits({source}).select({numbers})
print([batch["topk_logprobs"].tolist() for batch in data.batches(batch_size=1, seed=None)])
"""


def test_a_streamed_selection_asks_for_footers_and_its_own_row_groups(datasets, data, tmp_path):
    numbers = [len(data) - 2, len(data) - 1]
    with stand_in.serve() as hub:
        hub.commit("dataset", "org/logits", stand_in.directory_files(datasets / "text"))
        client = stand_in.Client(hub.endpoint, tmp_path / "home")
        try:
            source = '"org/logits", streaming=True'
            streamed = client.python(STREAMED.format(source=source, numbers=numbers))
            asked = Counter(
                request.path.partition("/data/")[2]
                for request in hub.requests
                if ".parquet" in request.path and request.method == "GET"
            )
            source = f'"{datasets / "text"}"'
            local = client.python(STREAMED.format(source=source, numbers=numbers))
        finally:
            client.close()
    assert streamed.returncode == local.returncode == 0, streamed.stderr + local.stderr
    assert streamed.stdout == local.stdout
    assert len(local.stdout) > 100
    own = data.row_groups[-1].file.removeprefix("data/")
    assert asked.pop(own) > 1
    assert len(asked) > 2
    assert set(asked.values()) == {1}
