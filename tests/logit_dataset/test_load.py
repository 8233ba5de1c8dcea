"""Batches hold what the files hold, once an epoch, in any shape; they resume exactly; the wrong dataset is refused."""

import json
import math
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from builder.build.build import build
from builder.recipe.file import load_recipe
from logit_dataset import load_logits
from logit_dataset.rows import NO_TARGET, Ends, _target_ids, _values
from logit_dataset.schema import SCHEMA_VERSION
from tests import loopback_hub as stand_in
from tests.conftest import TINY_VOCAB_SIZE, TRAINING_TEXT, recipe_text, refit, write_jsonl

PER_TOKEN = [
    *["input_ids", "topk_indices", "topk_logprobs", "tail_logprob"],
    *["target_logprob", "logsumexp", "entropy"],
]


@pytest.fixture(scope="module")
def built(tiny_teacher_dir, tmp_path_factory):
    """A dataset of several shards in which no two rows are the same."""
    base, words = tmp_path_factory.mktemp("distinct"), " ".join(TRAINING_TEXT).split()
    shuffler = random.Random(0)
    documents = [
        {"id": f"doc-{i}", "text": " ".join(shuffler.choices(words, k=5 + 11 * (i % 7)))}
        for i in range(24)
    ]
    write_jsonl(base / "corpus.jsonl", documents)
    (base / "recipe.toml").write_text(recipe_text(tiny_teacher_dir, "corpus.jsonl"))
    build(load_recipe(base / "recipe.toml"), base, base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def stored(built):
    """All rows as plain Python, in stored order, by another way than the loader's."""
    files = sorted((built / "data").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def data(built):
    return load_logits(built)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, though the dataset is small."""
    monkeypatch.setattr("logit_dataset.batches.BUFFER_TOKENS", 700)


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def sequences(batches):
    """Every sequence of every batch: a mapping of column to array, without padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            ids = batch["sequence_ids"][row]
            for number in range(int(ids.max()) + 1):
                where = (ids == number).nonzero()[:, 0]
                assert torch.equal(where, torch.arange(len(where)) + where[0])
                found.append({name: values[row][where].numpy() for name, values in batch.items()})
    return found


def key(sequence):
    return tuple(sequence["topk_logprobs"].ravel().tolist())


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


@pytest.mark.parametrize("shape", [{}, {"length": 80}, {"length": 150, "packed": True}])
def test_an_epoch_holds_every_row_once_with_the_values_and_types_of_the_file(data, stored, shape):
    found = sequences(data.batches(batch_size=4, **shape))
    assert len(found) == len(stored) == data.num_rows
    assert sum(len(s["input_ids"]) for s in found) == data.num_tokens
    by_key = {key({"topk_logprobs": np.array(row["topk_logprobs"])}): row for row in stored}
    assert len({key(s) for s in found}) == len(by_key)
    for sequence in found:
        row = by_key[key(sequence)]
        for name in PER_TOKEN:
            np.testing.assert_array_equal(sequence[name], np.array(row[name]).astype(np.float64))
        assert sequence["mask"].all()
        np.testing.assert_array_equal(sequence["position_ids"], np.arange(len(row["input_ids"])))
    types = {name: values.dtype for name, values in next(iter(data.batches(batch_size=2))).items()}
    for name in ("input_ids", "topk_indices", "target_ids", "position_ids", "sequence_ids"):
        assert types[name] == torch.int32
    for name in ("topk_logprobs", "tail_logprob", "target_logprob", "entropy"):
        assert types[name] == torch.float16
    assert (types["logsumexp"], types["mask"]) == (torch.float32, torch.bool)


def test_shapes_and_padding(data):
    for batch in data.batches(batch_size=4, length=150, packed=True):
        assert batch["topk_indices"].shape == (*batch["input_ids"].shape, 20)
        assert batch["input_ids"].shape[1] == 150
        padding = ~batch["mask"]
        assert torch.equal(padding, batch["sequence_ids"] == -1)
        assert (batch["target_ids"][padding] == NO_TARGET).all()
    widths = {batch["input_ids"].shape[1] for batch in data.batches(batch_size=1)}
    assert len(widths) > 2
    full = [b["mask"].float().mean() for b in data.batches(batch_size=4, length=150, packed=True)]
    assert np.mean(full[:-1]) > 0.85


def test_targets_are_the_tokens_that_follow_in_the_document(data, stored):
    """Against whole documents, put together again; and the teacher's own log-prob of the target, wherever it is listed."""
    documents, follows = {}, {}
    for row in stored:
        documents.setdefault(row["id"], []).extend(row["input_ids"])
    for name, ids in documents.items():
        assert name not in follows
        follows[name] = [*ids[1:], data.manifest["teacher"]["eos_token_id"]]
    starts = dict.fromkeys(documents, 0)
    expected = {}
    for row in stored:
        start = starts[row["id"]]
        starts[row["id"]] += len(row["input_ids"])
        expected[key({"topk_logprobs": np.array(row["topk_logprobs"])})] = follows[row["id"]][
            start : starts[row["id"]]
        ]
    unknown, listed = 0, 0
    for sequence in sequences(data.batches(batch_size=3)):
        targets, known = sequence["target_ids"], sequence["target_ids"] != NO_TARGET
        assert known[:-1].all()
        unknown += int(not known[-1])
        np.testing.assert_array_equal(targets[known], np.array(expected[key(sequence)])[known])
        inside = sequence["topk_indices"] == targets[:, None]
        at_rank = (sequence["topk_logprobs"] * inside).sum(-1)
        hit = inside.any(-1)
        listed += hit.sum()
        np.testing.assert_array_equal(at_rank[hit], sequence["target_logprob"][hit])
    assert listed > 50
    assert unknown == len(data.row_groups)  # what follows the last row of a row group is not in it


def test_targets_of_chunks_with_a_prefix_and_of_truncated_documents():
    table = pa.table(
        {
            "id": ["a", "a", "b", "c", "c"],
            "chunk_index": pa.array([0, 1, 0, 0, 2], pa.int32()),
        }
    )
    ids = np.array([1, 10, 11, 1, 12, 1, 13, 1, 14, 1, 15], np.int32)
    lengths = np.array([3, 2, 2, 2, 2])
    ends = Ends(eos_token_id=9, num_prefix_ids=1, shortest_cut=math.inf)
    found = _target_ids(table, ids, lengths, ends)
    assert found.tolist() == [10, 11, 12, 12, 9, 13, 9, 14, 9, 15, NO_TARGET]
    cut = Ends(eos_token_id=9, num_prefix_ids=1, shortest_cut=3)
    whole = table.set_column(1, "chunk_index", pa.array([0] * 5, pa.int32()))
    assert _target_ids(whole, ids, lengths, cut)[[2, 4]].tolist() == [NO_TARGET, 9]
    no_eos = Ends(eos_token_id=None, num_prefix_ids=1, shortest_cut=math.inf)
    assert _target_ids(table, ids, lengths, no_eos)[[2, 4]].tolist() == [12, NO_TARGET]


def test_a_sliced_list_gives_its_own_values():
    nested = pa.array([[[1, 2], [3, 4]], [[5, 6]], [[7, 8], [9, 10]]]).slice(1)
    assert _values(nested, "x").tolist() == [[5, 6], [7, 8], [9, 10]]
    flags = pa.array([[True, False, True], [False]])
    assert _values(flags.slice(1), "x").tolist() == [False]
    with pytest.raises(ValueError, match="x does not have the same number of values"):
        _values(pa.array([[[1, 2], [3]]]), "x")
    with pytest.raises(ValueError, match="x holds a null"):
        _values(pa.array([[1, None]]), "x")


def test_columns_that_the_schema_does_not_know_are_in_the_batch_if_they_are_numbers(copy):
    for path in (copy / "data").glob("*.parquet"):
        table = pq.read_table(path)
        lengths = table["input_ids"].combine_chunks().value_lengths().to_pylist()
        extra = {
            "is_quoted": [[t % 2 == 0 for t in range(n)] for n in lengths],
            "neighbours": [[[t, t + 1] for t in range(n)] for n in lengths],
            "messages": [["user", "hello"] for _ in lengths],
        }
        for name, values in extra.items():
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, path)
    refit(copy)
    batch = next(iter(load_logits(copy).batches(batch_size=2)))
    assert "messages" not in batch
    mask, position = batch["mask"], batch["position_ids"]
    assert batch["is_quoted"].dtype == torch.bool
    assert torch.equal(batch["is_quoted"], (position % 2 == 0) & mask)
    assert torch.equal(batch["neighbours"][mask][:, 1], position[mask] + 1)


def test_a_packed_batch_leaks_nothing_through_transformers(data, tiny_model):
    """Given position_ids, no attention mask and no cache, each sequence has the logits that it has alone."""
    batch = next(iter(data.batches(batch_size=2, length=200, packed=True)))
    assert batch["sequence_ids"].max() >= 2
    with torch.inference_mode():
        together = tiny_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        leaking = tiny_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"]
        ).logits
        for row, number in ((0, 1), (0, 2), (1, 1)):
            where = batch["sequence_ids"][row] == number
            alone = tiny_model(input_ids=batch["input_ids"][row][where][None]).logits[0]
            torch.testing.assert_close(together[row][where], alone, atol=1e-4, rtol=1e-4)
            # If this is no more so, we need not warn of it: in `Batches`, in the README and in the example.
            assert (leaking[row][where] - alone).abs().max() > 0.1


def test_the_order_depends_on_seed_and_epoch_only(data, stored):
    def order(batches):
        return [key(sequence) for sequence in sequences(batches)]

    batches = data.batches(batch_size=4, seed=7)
    first, second = order(batches), order(batches)
    assert first != second
    assert sorted(first) == sorted(second)
    again = data.batches(batch_size=4, seed=7)
    assert [order(again), order(again)] == [first, second]
    assert order(data.batches(batch_size=4, seed=8)) != first
    as_stored = [key({"topk_logprobs": np.array(row["topk_logprobs"])}) for row in stored]
    assert order(data.batches(batch_size=4, seed=None)) == as_stored


def test_files_and_rows_are_both_shuffled_anew_in_every_epoch(data, monkeypatch):
    one_group = replace(data, row_groups=data.row_groups[:1]).batches(batch_size=1)
    assert [key(s) for s in sequences(one_group)] != [key(s) for s in sequences(one_group)]
    monkeypatch.setattr("logit_dataset.batches.BUFFER_TOKENS", 1)
    batches, orders = data.batches(batch_size=4), []
    for _ in range(2):
        orders.append([group.file for block in batches._blocks() for group in block])
        list(batches)
    assert orders[0] != orders[1]
    assert len(set(orders[0])) > 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_rows(data, world_size):
    parts = [
        [key(s) for s in sequences(data.batches(batch_size=2, rank=rank, world_size=world_size))]
        for rank in range(world_size)
    ]
    assert all(parts)
    everything = [key(s) for s in sequences(data.batches(batch_size=2))]
    assert sorted(key for part in parts for key in part) == sorted(everything)


@pytest.mark.parametrize(
    "shape", [{"batch_size": 3}, {"batch_size": 2, "length": 70, "packed": True, "rank": 1}]
)
def test_it_resumes_at_the_exact_next_batch(data, shape):
    shape = {"world_size": 1 + shape.get("rank", 0), **shape}
    whole = data.batches(**shape)
    expected = list(whole)
    num_first = len(expected)
    expected += list(whole)
    assert num_first > 3
    for stop in range(1, num_first + 2):
        batches = data.batches(**shape)
        taken, state = 0, batches.state_dict()
        while taken < stop:
            for _ in batches:
                taken += 1
                state = json.loads(json.dumps(batches.state_dict()))
                if taken == stop:
                    break
        resumed = data.batches(**shape)
        resumed.load_state_dict(state)
        rest = list(resumed)
        if stop < num_first:
            rest += list(resumed)
        assert_same_batches(rest, expected[stop:])


def test_a_state_of_other_batches_is_refused(data):
    state = data.batches(batch_size=4).state_dict()
    with pytest.raises(ValueError, match="saved state has batch_size = 4, these batches 5"):
        data.batches(batch_size=5).load_state_dict(state)
    with pytest.raises(ValueError, match="saved state has fingerprint = 'other'"):
        data.batches(batch_size=4).load_state_dict({**state, "fingerprint": "other"})


def test_long_rows_are_refused_or_split(data, stored):
    longest = max(len(row["input_ids"]) for row in stored)
    with pytest.raises(ValueError, match=r"more than length = 10; choose a length of \d+ or more"):
        list(data.batches(batch_size=4, length=10))
    pieces = sequences(data.batches(batch_size=4, length=10, split_long=True, packed=True))
    assert sum(len(piece["input_ids"]) for piece in pieces) == data.num_tokens
    assert max(len(piece["input_ids"]) for piece in pieces) == 10 < longest
    assert all(piece["position_ids"][0] == 0 for piece in pieces)


def test_what_makes_no_sense_is_refused(data):
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "packed": True}, "packed and split_long need a length"),
        ({"batch_size": 1, "seed": -1}, "seed is -1, expected 0 or more, or None"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"batch_size": 1, "world_size": 99}, "row groups cannot be shared by 99 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            data.batches(**options)


def test_it_is_a_torch_dataset_for_one_process(data):
    batches = data.batches(batch_size=4)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    assert_same_batches(list(loader), list(data.batches(batch_size=4)))
    with pytest.raises(ValueError, match="use num_workers=0"):
        list(torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1))


def test_it_says_in_a_line_what_it_is(data, stored):
    sha256 = data.manifest["teacher"]["sha256"]
    start = f"<{len(stored)} rows, {data.num_tokens:,} tokens, 448 logits; teacher tiny@{sha256}; "
    assert repr(data).startswith(start + "input_ids, topk_indices, ")


def test_token_counts(data, stored):
    ids = [token for row in stored for token in row["input_ids"]]
    expected = np.bincount(ids, minlength=TINY_VOCAB_SIZE)
    np.testing.assert_array_equal(data.token_counts(), expected)


def test_what_is_required_is_accepted_or_refused_with_both_values(built, data, tiny_tokenizer):
    teacher = data.manifest["teacher"]
    padding = tiny_tokenizer.backend_tokenizer.__class__.from_str(
        tiny_tokenizer.backend_tokenizer.to_str()
    )
    padding.enable_padding(length=7)
    for name in ("tiny", teacher["sha256"], f"tiny@{teacher['sha256']}"):
        load_logits(
            built,
            require_teacher=name,
            require_tokenizer=padding,
            require_vocab_size=TINY_VOCAB_SIZE,
        )
    load_logits(built, require_tokenizer=teacher["tokenizer_sha256"])
    other = SimpleNamespace(backend_tokenizer=changed_tokenizer(tiny_tokenizer))
    for options, message in (
        ({"require_teacher": "large"}, rf"teacher tiny@{teacher['sha256']}, but large is required"),
        ({"require_tokenizer": other}, f"SHA-256 {teacher['tokenizer_sha256']}, but [0-9a-f]+ is"),
        ({"require_tokenizer": "0" * 64}, f"SHA-256 {teacher['tokenizer_sha256']}, but 000"),
        ({"require_tokenizer": SimpleNamespace()}, "SimpleNamespace is not a fast tokenizer"),
        ({"require_vocab_size": 50}, "vocabulary of 448 logits, but 50 is required"),
        ({"revision": "v1"}, "is a directory, which has no revision"),
    ):
        with pytest.raises(ValueError, match=message):
            load_logits(built, **options)


def changed_tokenizer(tokenizer):
    backend = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens(["another"])
    return backend


def change_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_damaged_dataset_is_refused_at_once(copy, built):
    def refused(message, *, refitted=False):
        if refitted:
            refit(copy)
        with pytest.raises(ValueError, match=message) as caught:
            load_logits(copy)
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)
        shutil.copytree(built, copy)

    first, second = sorted((copy / "data").glob("*.parquet"))[:2]
    size = first.stat().st_size
    first.unlink()
    refused(f"{first.name} is missing")
    first.write_bytes(first.read_bytes()[:-100])
    refused(f"{first.name} has {size - 100:,} bytes, the manifest says {size:,}; fetch")
    first.write_bytes(first.read_bytes()[:-100] + bytes(100))
    refused(f"{first.name} cannot be read")
    table = pq.read_table(first)
    index = table.column_names.index("topk_logprobs")
    wider = table.set_column(
        index,
        "topk_logprobs",
        table["topk_logprobs"].cast(pa.list_(pa.list_(pa.float32()))),
    )
    for changed, message in (
        (wider, "topk_logprobs is list<element: list<element: float>>, expected list<item: list"),
        (table.drop_columns("tail_logprob"), "column tail_logprob is nothing, expected list"),
        (table.drop_columns("id"), "column id is nothing, expected string"),
        (table.rename_columns({"chunk_index": "id"}), "two columns have the same name"),
    ):
        pq.write_table(changed, first)
        refused(message, refitted=True)
    pq.write_table(table.replace_schema_metadata({"logit_dataset.row_fingerprint": "abc"}), second)
    refused(f"{second.name} belongs to the build abc, the manifest is of", refitted=True)
    change_manifest(copy, lambda m: m["shards"][0].update(file="data/../../secret.parquet"))
    refused("names the file 'data/../../secret.parquet', expected data")
    change_manifest(copy, lambda m: m.update(schema_version="2.0.0"))
    refused(f"schema version 2.0.0, but this program reads {SCHEMA_VERSION}")
    change_manifest(copy, lambda m: m.pop("teacher"))
    refused(r"manifest.json is damaged \(no teacher\)")
    (copy / "manifest.json").write_text("{")
    refused("manifest.json is damaged")
    (copy / "manifest.json").unlink()
    refused("it is not a finished logit dataset")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"].pop(), "it says 40 rows in all, and 34 by file"),
        (lambda m: m["shards"].append(m["shards"][0]), "it names a file twice"),
        (lambda m: m["totals"].update(rows=400), "it says 400 rows in all, and 40 by file"),
        (lambda m: m["totals"].pop("rows"), "no 'rows'"),
        (lambda m: m["shards"][0].pop("tokens"), "no 'tokens'"),
        (lambda m: m["shards"][0].update(bytes="1"), "has bytes = '1'"),
        (lambda m: m["shards"].insert(0, None), "'NoneType' object is not subscriptable"),
        (lambda m: m["teacher"].update(vocab_size="448"), "its vocab_size is '448'"),
        (lambda m: m["teacher"].pop("prefix_ids"), "no 'prefix_ids'"),
        (lambda m: m["recipe"].pop("output"), "no 'output'"),
        (lambda m: m["recipe"]["output"].update(top_k="twenty"), "not supported"),
        (lambda m: m.update(recipe=[]), "list indices must be integers"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(copy, change, message):
    change_manifest(copy, change)
    with pytest.raises(ValueError, match=rf"manifest.json is damaged \(.*{message}") as caught:
        load_logits(copy)
    assert "\n" not in str(caught.value)


def test_what_fails_while_reading_ahead_fails_the_consumer(copy):
    data = load_logits(copy)
    path = sorted((copy / "data").glob("*.parquet"))[-1]
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    batches = iter(data.batches(batch_size=2, seed=None))
    next(batches)
    with pytest.raises(ValueError, match=f"{path.name}, row group 0: .*; verify the dataset"):
        list(batches)


READ_FROM_THE_HUB = """
import hashlib, pickle
from logit_dataset import load_logits
data = pickle.loads(pickle.dumps(load_logits("org/logits", revision="v1", streaming={streaming})))
digest = hashlib.sha256()
for batch in data.batches(batch_size=3, length=150, packed=True):
    for name, values in sorted(batch.items()):
        digest.update(name.encode() + values.numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_hub_at_a_revision_downloaded_or_streamed_is_as_the_directory(built, tmp_path):
    """In a process of its own, with the stock client."""
    code = READ_FROM_THE_HUB
    with stand_in.serve() as hub:
        hub.commit("dataset", "org/logits", stand_in.directory_files(built))
        hub.tag("dataset", "org/logits", "v1")
        hub.commit("dataset", "org/logits", {"README.md": b"moved on"})
        client = stand_in.Client(hub.endpoint, tmp_path / "home")
        try:
            streamed = client.python(code.format(streaming=True))
            requests = [request for request in hub.requests if ".parquet" in request.path]
            assert all(request.range for request in requests if request.method == "GET")
            assert not (tmp_path / "home" / "hub").exists()
            downloaded = client.python(code.format(streaming=False))
            local = client.python(
                code.format(streaming=False).replace('"org/logits", revision="v1"', f'"{built}"')
            )
            missing = [
                client.python(f"from logit_dataset import load_logits; load_logits({arguments})")
                for arguments in (
                    '"org/none"',
                    '"org/none", streaming=True',
                    '"org/logits", revision="v9"',
                    '"org/logits"',
                    '"not a/name/at all"',
                )
            ]
        finally:
            client.close()
    assert streamed.returncode == downloaded.returncode == 0, streamed.stderr + downloaded.stderr
    assert len(local.stdout) == 65, local.stderr
    assert streamed.stdout == downloaded.stdout == local.stdout
    for result, message in zip(
        missing,
        (
            "the Hub has no dataset of that name that you can read",
            "the Hub has no dataset of that name that you can read",
            "dataset 'org/logits' has no revision 'v9' on the Hub",
            "org/logits has no manifest.json: it is not a finished logit dataset",
            "is neither a directory nor a Hub dataset name",
        ),
        strict=True,
    ):
        assert f"ValueError: {message}" in result.stderr or message in result.stderr, result.stderr
