"""A corpus of chats, end to end: read, built, stopped and gone on with, verified, shown, loaded, learned from, published."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Document
from builder.dataset.info import describe
from builder.dataset.manifest import read_manifest, records_of
from builder.plan.estimate import bytes_per_token
from builder.recipe.file import load_recipe
from builder.teacher.loading import load_tokenizer
from builder.verify.verify import verify
from logit_dataset import distillation_loss, load_logits
from logit_dataset.schema import Layout, arrow_schema, columns, loss_mask
from tests import loopback_hub as stand_in
from tests.build.test_build import data_bytes, read_rows, run
from tests.chats import CHATML, LLAMA_3, MARKED, chatty_teacher, sample_chats
from tests.conftest import TINY_VOCAB_SIZE, recipe_text, write_jsonl
from tests.end_to_end.test_kill import check_kept, finished_shards
from tests.end_to_end.test_kill import killer as killer
from tests.loopback_hub import Client, card_errors
from tests.verify.forging import Row, forge, refit, rows_of
from tests.verify.test_verify import problems

CORPUS = 'messages_column = "messages"'
CHOICES = {
    "mask alone": "tail_samples = 0",
    "completions only": "completions_only = true",
    "everything": "completions_only = true\ntemperatures = [2.0]\nhidden_states = true",
    "everything, everywhere": "temperatures = [2.0]\nhidden_states = true",
    "compact and without text": 'completions_only = true\nprofile = "compact"\ntext = false',
    "all": 'completions_only = true\ntop_k = "all"\nhidden_states = true',
    "all, everywhere": 'top_k = "all"',
}
SEQUENCES = {
    "chunks": "max_length = 40",
    "truncated": 'max_length = 40\nlong_documents = "truncate"',
    "marked": 'max_length = 40\nchat_template = "marked.jinja"',
}


@pytest.fixture(scope="session")
def chat_teacher(tiny_tokenizer, tiny_model, tmp_path_factory) -> Path:
    return chatty_teacher(tiny_tokenizer, tiny_model, tmp_path_factory.mktemp("teacher") / "chatty")


def write_recipe(
    base: Path, teacher_dir: Path, rows: list[dict] | None = None, /, **changes: str
) -> Path:
    write_jsonl(base / "corpus.jsonl", sample_chats() if rows is None else rows)
    (base / "marked.jinja").write_text(MARKED["llama 3"], encoding="utf-8")
    changes["corpus"] = f"{CORPUS}\n{changes.get('corpus', '')}".strip()
    text = recipe_text(teacher_dir, "corpus.jsonl", **changes)
    (base / "recipe.toml").write_text(text, encoding="utf-8")
    return base / "recipe.toml"


@pytest.fixture
def recipe_of(chat_teacher, tmp_path):
    def make(rows: list[dict] | None = None, /, **changes: str) -> Path:
        return write_recipe(tmp_path, chat_teacher, rows, **changes)

    return make


@pytest.fixture(scope="module")
def pair(chat_teacher, tmp_path_factory) -> dict[str, Path]:
    """The same chats with all positions, and with those of completions only. Read only."""
    found = {}
    for name, output in (("whole", ""), ("kept", "completions_only = true")):
        base = tmp_path_factory.mktemp(name)
        options = f"temperatures = [2.0]\nhidden_states = true\n{output}"
        run(write_recipe(base, chat_teacher, output=options, sequences="max_length = 48"), base / "out")  # fmt: skip
        found[name] = base / "out"
    return found


def expected_rows(teacher: Path, source: str = CHATML) -> dict[str, Any]:
    chats = ChatTemplate(load_tokenizer(str(teacher)), source)
    return {
        row["id"]: chats(Document(id=row["id"], messages=row["messages"])) for row in sample_chats()
    }


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_builds_resumes_to_the_same_bytes_verifies_and_loads(
    choice, sequences, recipe_of, tmp_path, chat_teacher
):
    if sequences != "chunks" and choice not in ("completions only", "mask alone"):
        return
    recipe = recipe_of(output=CHOICES[choice], sequences=SEQUENCES[sequences])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe, whole)
    while run(recipe, parts, max_shards=1).status == "stopped early":
        pass
    assert data_bytes(parts) == data_bytes(whole)
    assert len(data_bytes(whole)) > 1
    assert (
        read_manifest(parts)["totals"]["documents"] == read_manifest(whole)["totals"]["documents"]
    )

    report = verify(whole, recompute=8, teacher_path=chat_teacher, seed=0)
    assert report.problems == []
    assert report.recomputed["top1_agreement"] == 1

    manifest = read_manifest(whole)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    assert layout.completion_mask
    dataset = load_dataset(str(whole), split="train", cache_dir=str(tmp_path / "cache"))
    streamed = load_dataset(str(whole), split="train", streaming=True).with_format("torch")
    for row, other in zip(dataset.with_format("torch"), streamed, strict=True):
        assert list(row) == list(other) == [column.name for column in columns(layout)]
        length, kept = len(row["input_ids"]), int(loss_mask(row["completion_mask"]).sum())
        assert row["completion_mask"].dtype == torch.bool
        for column in columns(layout):
            if column.shape:
                first = {"C": kept, "T": length}[column.shape[0]]
                width = (layout.width(column),) if "," in column.shape else ()
                assert row[column.name].shape == (first, *width), column.name

    # What the rows hold is what the encoder, tested elsewhere, says.
    source = MARKED["llama 3"] if sequences == "marked" else CHATML
    masks: dict[str, list] = {}
    ids: dict[str, list] = {}
    for row in read_rows(whole):
        masks.setdefault(row["id"], []).extend(row["completion_mask"])
        ids.setdefault(row["id"], []).extend(row["input_ids"])
        assert any(loss_mask(row["completion_mask"])) or sequences != "truncated"
    expected = expected_rows(chat_teacher, source)
    skipped = len(expected) - len(ids)
    assert manifest["totals"]["documents_skipped"] == skipped
    assert (skipped > 0) is (sequences == "truncated")
    for name, found in ids.items():
        assert found == expected[name].ids[: len(found)]
        assert masks[name] == expected[name].completion_mask[: len(found)]
        assert len(found) == len(expected[name].ids) or sequences == "truncated"
    total = sum(sum(mask) for mask in masks.values())
    assert manifest["totals"]["completion_tokens"] == total


def test_prompts_cost_next_to_nothing(pair):
    sizes = {name: read_manifest(path)["totals"]["bytes"] for name, path in pair.items()}
    assert sizes["kept"] < 0.8 * sizes["whole"]
    rows = {name: read_rows(path) for name, path in pair.items()}
    for whole, kept in zip(rows["whole"], rows["kept"], strict=True):
        where = np.flatnonzero(loss_mask(whole["completion_mask"]))
        for name, values in whole.items():
            is_wide = name in ("topk_indices", "topk_logprobs", "tail_indices", "tail_logprobs", "hidden_states")  # fmt: skip
            assert str(kept[name]) == str([values[t] for t in where] if is_wide else values), name


def test_a_student_learns_exactly_the_same_from_both(pair):
    whole, kept = (load_logits(path) for path in pair.values())
    counted = 0
    for full, part in zip(whole.batches(batch_size=4), kept.batches(batch_size=4), strict=True):
        logits = torch.randn(*full["input_ids"].shape, TINY_VOCAB_SIZE)
        losses = [
            distillation_loss(logits, batch, loss=kind, text_weight=0.2)
            for batch in (full, part)
            for kind in ("tail_bucket", "tail_draws")
        ]
        assert losses[0] > 0.1
        assert torch.equal(losses[0], losses[2])
        assert torch.equal(losses[1], losses[3])
        counted += int(full["mask"].sum())
    rows = read_rows(pair["whole"])
    assert counted == sum(int(loss_mask(row["completion_mask"]).sum()) for row in rows) > 100


@pytest.mark.parametrize("name", ["whole", "kept"])
def test_the_card_is_valid_and_its_python_runs_as_pasted(pair, name, monkeypatch):
    monkeypatch.chdir(pair[name].parent)
    card = (pair[name] / "README.md").read_text()
    assert card_errors(card) == []
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        exec(compile(snippet.replace("path/to/this/directory", "out"), "README.md", "exec"), names)
    row, kept = names["row"], names["kept"]
    assert kept.tolist() == np.flatnonzero(loss_mask(row["completion_mask"])).tolist()
    assert len(names["row"]["topk_indices"]) == len(kept) == len(names["draws"])
    assert 0.1 < names["loss"].item() < 20
    assert names["trainer"].state.global_step == 10
    shape = "C,K" if name == "kept" else "T,K"
    assert f"| `topk_indices` | int32 [{shape}] |" in card
    assert "| `completion_mask` | bool [T] |" in card
    totals = read_manifest(pair[name])["totals"]
    assert f"| of completions | {totals['completion_tokens']:,} tokens, " in card
    assert "| chat template | the tokenizer’s own, SHA-256 `" in card


def test_info_says_what_completions_there_are(cli, pair, chat_teacher):
    described = describe(pair["kept"])
    count = read_manifest(pair["kept"])["totals"]["completion_tokens"]
    assert f"of these   {count:,} tokens in completions, " in described
    assert "stored     top 20 and tail, for completions only; 4 draws" in described
    assert "only" not in describe(pair["whole"])
    rows = read_rows(pair["kept"])
    number = next(i for i, row in enumerate(rows) if any(loss_mask(row["completion_mask"])))
    first = int(np.flatnonzero(loss_mask(rows[number]["completion_mask"]))[0])
    where = ("--row", number, "--teacher", chat_teacher)
    shown = {p: cli("info", path, *where)[1] for p, path in pair.items()}
    lines = [shown[p].splitlines() for p in ("whole", "kept")]
    assert lines[0][2 + first] == lines[1][2 + first]
    assert "(not kept)" in lines[1][2]
    assert "(not kept)" not in shown["whole"]
    at = [cli("info", path, *where, "--position", first)[1] for path in pair.values()]
    assert at[0] == at[1] != ""
    status, _, err = cli("info", pair["kept"], *where, "--position", 0)
    assert status == 1
    assert f"stores no distribution at position 0, because the next token is not part of a completion; choose a position before a completion's token, the first of which is {first}" in err  # fmt: skip


# Verification


@pytest.fixture
def copy(pair, tmp_path):
    return Path(shutil.copytree(pair["kept"], tmp_path / "copy"))


def test_forging_without_a_change_stays_undetected(copy, chat_teacher):
    forge(copy, lambda rows: None)
    assert problems(copy, chat_teacher, recompute=30) == []


def kept_row(rows: list[Row]) -> Row:
    return next(row for row in rows if len(row["topk_indices"]) > 3)


def longer_mask(rows: list[Row]) -> None:
    row = kept_row(rows)
    row["completion_mask"] = np.append(row["completion_mask"], True)


def move_the_mask(rows: list[Row]) -> None:
    row = kept_row(rows)
    row["completion_mask"] = np.zeros_like(row["completion_mask"])


def lose_a_position(rows: list[Row]) -> None:
    row = kept_row(rows)
    row["tail_indices"] = row["tail_indices"][1:]


def shift_the_mask(rows: list[Row]) -> None:
    """Everything has the right length, but is about other tokens."""
    for row in rows:
        mask = row["completion_mask"]
        if len(mask) > 2 and not mask[-1] and mask[1:].any() and not mask[:2].any():
            row["completion_mask"] = np.append(mask[1:], False)


def lower_a_tail(rows: list[Row]) -> None:
    rows[0]["tail_logprob"][0] = -30.0  # nothing but head, in a prompt
    rows[0]["entropy"][0] = 4.0  # more than log 20


def lower_an_entropy(rows: list[Row]) -> None:
    rows[0]["entropy"][0] = -0.5


def break_a_kept_one(rows: list[Row]) -> None:
    kept_row(rows)["topk_logprobs"][2, 0] = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (longer_mask, "completion_mask and input_ids have different lengths"),
        (move_the_mask, "topk_indices and the completions of completion_mask have different lengths"),
        (lose_a_position, "tail_indices and the completions of completion_mask have different lengths"),
        (shift_the_mask, "target_logprob"),
        (lower_a_tail, "entropy does not fit the stored tail (position 0)"),
        (lower_an_entropy, "entropy is below 0 (position 0)"),
        (break_a_kept_one, "a log-probability is above 0"),
    ],
)  # fmt: skip
def test_what_is_broken_is_found_without_the_teacher(copy, change, message):
    forge(copy, change, all_files=False)
    found = problems(copy)
    assert any(message in p for p in found), found


def test_a_broken_position_is_named_by_its_place_in_the_row(copy):
    forge(copy, break_a_kept_one, all_files=False)
    rows = rows_of(copy, "data/train-000-00000.parquet")
    number = next(i for i, row in enumerate(rows) if len(row["topk_indices"]) > 3)
    position = np.flatnonzero(loss_mask(rows[number]["completion_mask"]))[2]
    expected = f"row {number}: a log-probability is above 0 (position {position})"
    assert any(expected in p for p in problems(copy))


def test_a_wrong_count_of_completions_is_found(copy):
    manifest = read_manifest(copy)
    manifest["shards"][0]["sums"]["completion_tokens"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert any("sum of completion_tokens is" in p for p in problems(copy))


def other_tail(rows: list[Row]) -> None:
    for row in rows:
        left_out = ~loss_mask(row["completion_mask"])
        row["tail_logprob"][left_out] -= np.float16(0.1)


def other_words(rows: list[Row]) -> None:
    for row in rows:
        row["text"] = (
            row["text"].replace("fox", "fux").replace("What", "Wath").replace("The", "Teh")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_tail, "tail_logprob is"),
        (other_words, "input_ids are not what the teacher's tokenizer makes of the text"),
    ],
)
def test_what_obeys_the_invariants_is_found_by_recomputing(copy, chat_teacher, change, message):
    forge(copy, change)
    assert problems(copy) == []
    found = problems(copy, chat_teacher, recompute=60)
    assert any(message in p for p in found), found


# Stopping


def test_a_kill_with_chats(recipe_of, tmp_path, killer):
    recipe = recipe_of(
        output="completions_only = true\nhidden_states = true\nshard_tokens = 200",
        sequences='max_length = 48\nlong_documents = "truncate"',
    )
    assert killer.build(recipe, tmp_path / "whole")["status"] == 0
    for step in ("os.replace#4:after", "os.replace#7:before"):
        output = tmp_path / step.replace(":", "-")
        assert killer.build(recipe, output, at_step=step)["killed"]
        before = finished_shards(output)
        assert killer.build(recipe, output)["status"] == 0
        check_kept(before, output)
        assert data_bytes(output) == data_bytes(tmp_path / "whole")
        totals = [read_manifest(path)["totals"] for path in (output, tmp_path / "whole")]
        for name in ("documents", "documents_skipped", "tokens", "completion_tokens"):
            assert totals[0][name] == totals[1][name]
    assert totals[0]["documents_skipped"] > 0


def test_another_template_is_another_dataset(recipe_of, tmp_path):
    recipe = recipe_of(sequences=SEQUENCES["marked"])
    template = tmp_path / "marked.jinja"
    assert run(recipe, tmp_path / "out", max_shards=1).status == "stopped early"
    original = template.read_text()
    template.write_text(original.replace("\n\n", "\n"))
    with pytest.raises(ValueError, match=r"unfinished build with another plan \(teacher\.chat_template_sha256"):  # fmt: skip
        run(recipe, tmp_path / "out")
    template.write_text(original)
    assert run(recipe, tmp_path / "out").status == "complete"
    assert run(recipe, tmp_path / "out").status == "already complete"
    fingerprint = read_manifest(tmp_path / "out")["fingerprint"]
    template.write_text(original.replace("\n\n", "\n"))
    with pytest.raises(ValueError, match=r"of another recipe \(teacher\.chat_template_sha256"):
        run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "other")
    assert read_manifest(tmp_path / "other")["fingerprint"] != fingerprint
    template.unlink()
    assert run(recipe, tmp_path / "out", max_shards=0).status == "already complete"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| chat template | marked.jinja, SHA-256 `" in card.replace("\\", "")
    assert 'chat_template = "marked.jinja"' in card
    assert "beside the files that it names" in card


def test_the_template_of_the_tokenizer_is_recorded(pair):
    teacher = read_manifest(pair["whole"])["teacher"]
    import hashlib

    assert teacher["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert (teacher["prefix_ids"], teacher["suffix_ids"]) == ([], [])


# The corpus


def test_every_format_gives_the_same_chats(chat_teacher, tmp_path):
    """Parquet gives every message the keys of all."""
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "The fox"}, {"role": "assistant", "content": "jumps", "name": "x"}]},
        {"id": "b", "messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "4", "reasoning": [{"type": "function"}]}]},
        {"id": "c", "messages": []},
        {"id": "d", "messages": None},
        {"id": "e", "messages": [{"role": "user", "content": "no answer"}]},
    ]  # fmt: skip
    write_jsonl(tmp_path / "c.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = {}
    for name in ("c.jsonl", "c.parquet"):
        recipe = tmp_path / "recipe.toml"
        let_go = 'drop_unwritten = ["name", "reasoning"]'
        recipe.write_text(
            recipe_text(chat_teacher, name, corpus=f"{CORPUS}\nid_column = 'id'", sequences=let_go)
        )
        run(recipe, tmp_path / name.replace(".", "-"))
        output = tmp_path / name.replace(".", "-")
        found[name] = [
            {k: row[k] for k in ("id", "text", "input_ids", "completion_mask")}
            for row in read_rows(output)
        ]
        totals = read_manifest(output)["totals"]
        assert (totals["documents"], totals["documents_skipped"]) == (2, 3)
        # Without a column of ids, these are hashes of the messages, whatever the format.
        assert totals["converted"] == {"name left out": 1, "reasoning left out": 1}
        text = recipe_text(chat_teacher, name, corpus=CORPUS, sequences=let_go)
        recipe.write_text(text.replace('id_column = "id"\n', ""))
        run(recipe, tmp_path / f"{output.name}-hashed")
        found[name].append([row["id"] for row in read_rows(tmp_path / f"{output.name}-hashed")])
    assert found["c.jsonl"] == found["c.parquet"]
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in found["c.jsonl"][-1])


def chat(*messages: Any) -> dict[str, Any]:
    return {"id": "x", "messages": list(messages)}


GOOD = chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
WRONG = {
    "text": ({"id": "x", "messages": "hello"}, r"holds text, expected a list of messages with role and content"),
    "an object": ({"id": "x", "messages": {"role": "user"}}, r"holds an object, expected a list of messages"),
    "a list of strings": (chat("hello"), r"holds a chat whose message 0 is text, expected an object with role and content"),
    "no role": (chat(GOOD["messages"][0], {"content": "x"}), r"message 1 has no role, expected one of system, developer, user"),
    "another role": (chat({"role": "human", "content": "x"}), r"message 0 has the role 'human', expected one of"),
    "a role that is no text": (chat({"role": 3, "content": "x"}), r"message 0 has the role 3"),
    "a role that is none": (chat({"role": "<|im_end|>", "content": "x"}), r"has the role '<\|im_end\|>'"),
    "another speaker": (chat({"from": "narrator", "value": "x"}), r"message 0 is from 'narrator', expected one of human"),
    "no content": (chat({"role": "user"}), r"message 0 has no content, expected text"),
    "an image": (chat({"role": "user", "content": [{"type": "image", "image": "x"}]}), r"message 0 has a part of content with the type 'image'"),
    "half a character": (chat(*GOOD["messages"], {"role": "user", "content": "\ud800"}), r"holds '\\ud800', half of a surrogate pair"),
    "no such column": ({"id": "x", "text": "x"}, r"has no column 'messages'; its columns are id, text; set .*corpus\.messages_column"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_chat_is_one_line_with_file_and_line(case, recipe_of, tmp_path):
    row, message = WRONG[case]
    rows = [row] if case == "no such column" else [GOOD, GOOD, row]
    where = "" if case == "no such column" else " line 3: "
    with pytest.raises(ValueError, match=rf"^corpus file corpus\.jsonl{where}.*{message}") as caught:  # fmt: skip
        run(recipe_of(rows), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out" / "data").glob("*.parquet"))


def test_a_corpus_without_an_answer_is_an_error(recipe_of, tmp_path):
    nothing = [chat({"role": "user", "content": "x"}), chat(), {"id": "y", "messages": None}]
    with pytest.raises(
        ValueError, match=r"the corpus has no chat to learn from \(3 without an answer, with"
    ):
        run(recipe_of(nothing), tmp_path / "out")


def test_a_last_chat_that_makes_no_row_makes_no_empty_shard(recipe_of, tmp_path):
    long = chat({"role": "user", "content": "fox " * 90}, {"role": "assistant", "content": "b"})
    recipe = recipe_of(
        [GOOD, long, GOOD, long, long],
        sequences='max_length = 32\nlong_documents = "truncate"',
        output="shard_tokens = 8",
    )
    run(recipe, tmp_path / "out")
    totals = read_manifest(tmp_path / "out")["totals"]
    assert (totals["documents"], totals["documents_skipped"], totals["rows"]) == (2, 3, 2)
    assert [record.rows for record in records_of(read_manifest(tmp_path / "out"))] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": 'text_column = "body"'}, r"give text_column .* or messages_column .*, not both"),
        ({"sequences": 'eos = "always"'}, r"sequences\.eos has no effect with corpus\.messages_column"),
        ({"sequences": 'chat_template = "nothing.jinja"'}, r"sequences\.chat_template: 'nothing\.jinja' does not exist"),
        ({"sequences": 'chat_template = "latin.jinja"'}, r"'latin\.jinja' is not UTF-8 text"),
        ({"sequences": 'chat_template = "broken.jinja"'}, r"the chat template is not valid"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused(changes, message, recipe_of, tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "broken.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=message) as caught:
        run(recipe_of(**changes), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "completions_only = true"}, r"completions_only needs completions; set corpus\.messages_column for a corpus of chats"),
        ({"sequences": 'chat_template_date = "2026-01-31"'}, r"chat_template_date is valid only with corpus\.messages_column"),
        ({"sequences": 'learn = "last"'}, r"learn is valid only with corpus\.messages_column"),
        ({"sequences": 'drop_unwritten = ["name"]'}, r"drop_unwritten is valid only with corpus\.messages_column"),
    ],
)  # fmt: skip
def test_what_needs_chats_is_refused_without(changes, message, make_recipe, tmp_path):
    """At once where the recipe names its column, else as soon as the corpus has been looked at."""
    with pytest.raises(ValueError, match=message):
        load_recipe(make_recipe(corpus='text_column = "text"', **changes))
    with pytest.raises(ValueError, match=message):
        run(make_recipe(**changes), tmp_path / "out")
    assert not list((tmp_path / "out" / "data").glob("*"))


def test_a_teacher_without_a_chat_template_is_one_line(cli, tiny_teacher_dir, tmp_path):
    recipe = write_recipe(tmp_path, tiny_teacher_dir)
    for options in ([], ["--dry-run"]):
        status, _, err = cli("build", recipe, "--output", tmp_path / "out", *options)
        assert status == 1
        assert err.startswith("error: the teacher's tokenizer has no chat template; give one as")
        assert len(err.splitlines()) == 1


# Estimates, and a version on the Hub


def test_an_estimate_knows_what_prompts_do_not_cost(cli, recipe_of, tmp_path):
    sizes = {}
    for name, output in (("whole", "tail_samples = 4"), ("kept", "completions_only = true")):
        recipe = recipe_of(output=output)
        status, out, err = cli("build", recipe, "--output", tmp_path / "x", "--dry-run")
        assert status == 0, err
        assert 'messages_column = "messages"' in out
        _, out, _ = cli("build", recipe, "--output", tmp_path / "x", "--dry-run", "--json")
        sizes[name] = json.loads(out)["bytes"]
    assert sizes["kept"] < sizes["whole"]
    recipe = load_recipe(recipe_of(output="completions_only = true"))
    assert bytes_per_token(recipe, kept_share=0.0) == 12
    assert bytes_per_token(recipe, kept_share=1.0) == pytest.approx(12 + 20 * 3 + 14)


def test_a_published_version_loads_and_verifies(recipe_of, tmp_path, chat_teacher, monkeypatch):
    recipe = recipe_of(output="completions_only = true", corpus='license = "cc0-1.0"', teacher='license = "mit"')  # fmt: skip
    run(recipe, tmp_path / "out")
    with stand_in.serve() as hub:
        client = Client(hub.endpoint, tmp_path / "home")
        try:
            options = ("--device", "cpu", "--recompute", 3, "--teacher", chat_teacher, "--yes")
            result = client.cli("publish", "org/chats", tmp_path / "out", *options)
            assert result.returncode == 0, result.stderr
            where = ("org/chats", "--revision", "v1.0.0")
            result = client.cli("verify", *where, "--recompute", 2, "--device", "cpu", "--teacher", chat_teacher)  # fmt: skip
            assert result.returncode == 0, result.stdout + result.stderr
            assert "no problems" in result.stdout
            assert "tokens in completions" in client.cli("info", *where).stdout
            repo = hub.repos["dataset", "org/chats"]
            files = repo.commits[repo.resolve("v1.0.0")]
        finally:
            client.close()
    for name, content in files.items():
        path = tmp_path / "fetched" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    again, local = (load_logits(tmp_path / name) for name in ("fetched", "out"))
    for a, b in zip(again.batches(batch_size=3), local.batches(batch_size=3), strict=True):
        assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


def test_rows_of_a_layout_without_completions_are_as_before(built):
    manifest = read_manifest(built)
    layout = Layout.of(manifest["recipe"], manifest["teacher"])
    assert not layout.completion_mask
    names = arrow_schema(layout).names
    assert "completion_mask" not in names
    assert "completion_tokens" not in manifest["totals"]
    assert not {"completion_tokens", "kept"} & manifest["shards"][0]["sums"].keys()
    assert "completion" not in (built / "README.md").read_text()


def test_a_dataset_of_schema_1_1_is_read_verified_and_known_to_be_complete(
    built, tmp_path, tiny_teacher_dir
):
    base = tmp_path / "base"
    shutil.copytree(built.parent, base)
    manifest = read_manifest(base / "out")
    manifest["schema_version"] = "1.1.0"
    for section, name in (
        *(("corpus", "messages_column"), ("sequences", "chat_template")),
        ("output", "completions_only"),
    ):
        del manifest["recipe"][section][name]
    (base / "out" / "manifest.json").write_text(json.dumps(manifest))
    refit(base / "out")  # the fingerprints are those of that schema, in the files too
    before = (base / "out" / "manifest.json").read_bytes()
    assert problems(base / "out", tiny_teacher_dir, recompute=5) == []
    batches = [list(load_logits(path).batches(batch_size=4)) for path in (base / "out", built)]
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in b)
    assert run(base / "recipe.toml", base / "out").status == "already complete"
    assert (base / "out" / "manifest.json").read_bytes() == before
    assert "schema 1.1.0" in describe(base / "out")


def test_a_llama_3_template_with_bos_is_not_doubled(recipe_of, tmp_path):
    recipe = recipe_of(sequences='max_length = 64\nchat_template = "llama.jinja"')
    (tmp_path / "llama.jinja").write_text(LLAMA_3)
    run(recipe, tmp_path / "out")
    begin = read_rows(tmp_path / "out")[0]["input_ids"][0]
    for row in read_rows(tmp_path / "out"):
        assert row["input_ids"].count(begin) == (1 if row["chunk_index"] == 0 else 0)
        assert row["text"].startswith("<begin>") is (row["chunk_index"] == 0)
