"""Chats as people have them, end to end: a file, a recipe, a build, and what is in it; with templates as those of models that people use."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from tokenizers import AddedToken

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Document
from builder.dataset.info import describe
from builder.dataset.manifest import read_manifest, records_of
from builder.teacher.loading import load_tokenizer
from builder.verify.verify import verify
from tests.build.test_build import data_bytes, read_rows, run
from tests.chats import CHATML, chatty
from tests.conftest import recipe_text, write_jsonl
from tests.corpus.test_answers import CALLED, CHATS, INLINE, REASONED
from tests.end_to_end.test_kill import check_kept, finished_shards
from tests.end_to_end.test_kill import killer as killer
from tests.loopback_hub import card_errors
from tests.templates import EXTRA_TOKENS, MOVING, THINKS

TOOLS = [{"name": "weather"}]
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="session")
def teacher(tiny_tokenizer, tiny_model, tmp_path_factory) -> Path:
    """Its tokenizer knows the tokens of all templates; it brings CHATML."""
    directory = tmp_path_factory.mktemp("teacher") / "chatty"
    tokenizer = chatty(tiny_tokenizer)
    tokenizer.add_tokens(
        [AddedToken(c, special=c == "<return>", normalized=False) for c in EXTRA_TOKENS]
    )
    tiny_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def build(teacher, tmp_path):
    """Build a corpus of some rows: build(rows, sections as in recipe_text, template=…) → its directory."""
    count = iter(range(99))

    def built(rows: Any, /, template: str | None = None, **changes: str) -> Path:
        base = tmp_path / str(next(count))
        base.mkdir()
        return base / "out" if run(recipe(base, rows, template, **changes), base / "out") else base

    def recipe(base: Path, rows: Any, template: str | None, **changes: str) -> Path:
        if isinstance(rows, pa.Table):
            pq.write_table(rows, base / "corpus.parquet")
        else:
            write_jsonl(base / "corpus.jsonl", rows)
        if template is not None:
            (base / "template.jinja").write_text(template, encoding="utf-8")
            lines = f'chat_template = "template.jinja"\n{changes.get("sequences", "")}'
            changes["sequences"] = lines.strip()
        changes.setdefault("sequences", "max_length = 256")
        if "max_length" not in changes["sequences"]:
            changes["sequences"] += "\nmax_length = 256"
        name = "corpus.parquet" if isinstance(rows, pa.Table) else "corpus.jsonl"
        text = recipe_text(teacher, name, **changes)
        if not any("id" in row for row in (rows if isinstance(rows, list) else [])):
            text = text.replace('id_column = "id"\n', "")
        (base / "recipe.toml").write_text(text, encoding="utf-8")
        return base / "recipe.toml"

    built.recipe = recipe
    return built


def answer_of(row: dict[str, Any], tokenizer: Any) -> str:
    """What the row's tokens in the mask spell."""
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    return str(tokenizer.decode([i for i, said in pairs if said], skip_special_tokens=False))


def texts(output: Path, teacher: Path) -> list[tuple[str, str]]:
    """Text and answer of each row."""
    tokenizer = load_tokenizer(str(teacher))
    return [(row["text"], answer_of(row, tokenizer)) for row in read_rows(output)]


# Shapes

ONE = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n", "Hello.<|im_end|>")  # fmt: skip
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HI]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
LISTS = {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "messages": ({"messages": HI}, {}),
    "ShareGPT": ({"conversations": SHAREGPT}, {"ShareGPT": 2}),
    "parts": ({"messages": PARTS}, {"content of text parts": 2}),
    "JSON text": ({"messages": json.dumps(HI)}, {"JSON text": 2}),
    "lists": ({"messages": LISTS}, {"object of lists": 2}),
    "prompt and completion": ({"prompt": HI[:1], "completion": HI[1:]}, {}),
}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_builds_the_same_and_is_said(build, teacher, shape, format):
    row, converted = SHAPES[shape]
    null = dict.fromkeys(row)
    rows = [row, null, row]
    output = build(pa.Table.from_pylist(rows) if format == "parquet" else rows)
    assert texts(output, teacher) == [ONE, ONE]
    totals = read_manifest(output)["totals"]
    assert totals.get("converted", {}) == converted
    assert (totals["documents"], totals["documents_skipped"]) == (2, 1)
    report = verify(output, recompute=5, teacher_path=teacher, seed=0)
    assert report.problems == []
    card = (output / "README.md").read_text()
    assert card_errors(card) == []
    for name, count in converted.items():
        assert f"| converted | {name} (in {count}) |" in card
        assert f"converted  {name} (in {count})" in describe(output)
    assert ("converted" in card) is bool(converted)


def test_a_null_answer_is_skipped_and_counted(build, teacher):
    rows = [{"messages": [HI[0], {"role": "assistant", "content": None}]}, {"messages": HI}]
    for table in (rows, pa.Table.from_pylist(rows)):
        output = build(table)
        assert texts(output, teacher) == [ONE]
        totals = read_manifest(output)["totals"]
        assert (totals["documents"], totals["documents_skipped"]) == (1, 1)


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        ("The quick brown fox", " jumps over.", " jumps over."),
        ("The quick brown f", "ox jumps.", None),
        ("", "The dog.", "The dog."),
        ("Grüße aus ", "München 🙂", None),
    ],
)
def test_a_completion_of_texts_is_learned_from_its_first_character(build, teacher, prompt, completion, learned):  # fmt: skip
    """A token across the border is the completion's."""
    changes = {"output": "completions_only = true", "sequences": 'eos = "always"\nmax_length = 64'}
    output = build([{"prompt": prompt, "completion": completion}], **changes)
    (row,) = read_rows(output)
    tokenizer = load_tokenizer(str(teacher))
    encoding = tokenizer(prompt + completion, return_offsets_mapping=True, add_special_tokens=False)
    assert row["text"] == prompt + completion
    assert row["input_ids"] == [*encoding["input_ids"], tokenizer.eos_token_id]
    expected = [end > len(prompt) for _, end in encoding["offset_mapping"]]
    assert row["completion_mask"] == [*expected, True]
    said = answer_of(row, tokenizer).removesuffix("<eos>")
    assert said.endswith(completion)
    assert learned in (said, None)
    assert verify(output, recompute=1, teacher_path=teacher, seed=0).problems == []
    card = (output / "README.md").read_text()
    assert "it is true for the tokens of the completion" in card
    assert "chat" not in card.split("## Load it")[1].split("## Where it comes from")[0]
    names: dict = {}
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(output))  # fmt: skip
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["row"]["completion_mask"].tolist() == row["completion_mask"]


def test_long_prompts_and_completions_are_cut_with_their_mask(build, teacher):
    pair = {"prompt": "The quick brown fox. " * 9, "completion": "The lazy dog. " * 9}
    (whole,) = read_rows(build([pair]))
    parts = read_rows(build([pair], sequences="max_length = 16"))
    assert [i for row in parts for i in row["input_ids"]] == whole["input_ids"]
    assert [m for row in parts for m in row["completion_mask"]] == whole["completion_mask"]
    changes = {"sequences": 'max_length = 16\nlong_documents = "truncate"'}
    short = {"prompt": "The", "completion": " fox"}
    output = build([pair, short], **changes)
    assert [row["text"] for row in read_rows(output)] == ["The fox"]
    assert read_manifest(output)["totals"]["documents_skipped"] == 1


# What a template is given

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "unit": None}}}  # fmt: skip
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "20"},
        {"role": "assistant", "content": "20."},
    ],
    "tools": TOOLS,
}
LAST = 'learn = "last"'


def test_tools_and_null_arguments_reach_the_teacher(build, teacher):
    options = f'{LAST}\ndrop_unwritten = ["name"]'
    output = build([WITH_TOOLS, {"messages": HI}], THINKS, sequences=options)
    manifest = read_manifest(output)
    assert manifest["recipe"]["corpus"]["tools_column"] == "tools"
    assert manifest["totals"]["converted"] == {"name left out": 1}
    theirs = load_tokenizer(str(teacher)).apply_chat_template(
        WITH_TOOLS["messages"], tools=TOOLS, chat_template=THINKS, tokenize=False
    )
    found = texts(output, teacher)
    assert found[1][0] == theirs
    assert json.dumps(TOOLS[0]) in found[0][0]
    assert '{"name": "weather", "arguments": {"city": "Paris", "unit": null}}' in found[0][1]
    assert "tools" not in found[2][0]
    with pytest.raises(ValueError, match=r"does not write the name of message 2"):
        build([WITH_TOOLS], THINKS, sequences=LAST)
    with pytest.raises(ValueError, match=r"does not write the tool_calls of message 1 \(nor name, tools\)"):  # fmt: skip
        build([WITH_TOOLS])
    output = build([WITH_TOOLS], corpus="tools_column = false", sequences='drop_unwritten = ["*"]')
    assert read_manifest(output)["totals"]["converted"] == {"name left out": 1, "tool_calls left out": 1}  # fmt: skip


def test_nulls_of_parquet_are_left_out_and_said(build, teacher):
    """Where the corpus holds messages as JSON text, they are its own."""
    options = f'{LAST}\ndrop_unwritten = ["name"]'
    output = build(pa.Table.from_pylist([WITH_TOOLS]), THINKS, sequences=options)
    assert '"arguments": {"city": "Paris"}' in texts(output, teacher)[0][1]
    assert read_manifest(output)["totals"]["converted"] == {"name left out": 1, "nulls of Arrow left out": 1}  # fmt: skip
    as_text = {key: json.dumps(value) for key, value in WITH_TOOLS.items()}
    output = build(pa.Table.from_pylist([as_text]), THINKS, sequences=options)
    assert '"arguments": {"city": "Paris", "unit": null}' in texts(output, teacher)[0][1]


def test_tools_that_come_late_are_refused_where_nothing_was_said_of_them(build):
    rows = [{"messages": HI}] * 120 + [{"messages": HI, "tools": TOOLS}]
    with pytest.raises(ValueError, match=r'^corpus file corpus\.jsonl line 121: column \'tools\' is for the chat template, and the recipe does not name it; set corpus\.tools_column = "tools", or to false'):  # fmt: skip
        build(rows)
    build(rows, corpus="tools_column = false")


def test_options_of_the_recipe_and_of_rows(build, teacher):
    source = MOVING["thinks first"]
    options = f"{LAST}\nchat_template_kwargs = {{ enable_thinking = false }}"
    rows = [{"messages": HI}, {"messages": HI, "chat_template_kwargs": {"enable_thinking": True}}]
    output = build(rows, source, sequences=options)
    asked = [text.split("assistant\n")[1] for text, _ in texts(output, teacher)]
    said = [answer for _, answer in texts(output, teacher)]
    assert asked == ["<think>\n\n</think>\n\nHello.<|im_end|>\n"] * 2
    assert said == ["Hello.<|im_end|>", "\n</think>\n\nHello.<|im_end|>"]
    manifest = read_manifest(output)
    assert manifest["recipe"]["sequences"]["chat_template_kwargs"] == {"enable_thinking": False}
    card = (output / "README.md").read_text()
    assert "chat_template_kwargs = { enable_thinking = false }" in card
    from builder.recipe.file import load_recipe

    shown = card.split("```toml\n")[1].split("```")[0]
    (output / "shown.toml").write_text(shown.replace('path = "chatty"', f'path = "{teacher}"'))
    assert load_recipe(output / "shown.toml").sequences.chat_template_kwargs == {"enable_thinking": False}  # fmt: skip
    for other in ("", f"{LAST}\nchat_template_kwargs = {{ enable_thinking = true }}"):
        another = build(rows[:1], source, sequences=other or LAST)
        assert read_manifest(another)["fingerprint"] != manifest["fingerprint"]


def test_documents_reach_the_teacher(build, teacher):
    source = "{% for d in documents or [] %}{{ d.text + '\n' }}{% endfor %}" + CHATML
    output = build([{"messages": HI, "documents": [{"title": "", "text": "The fox"}]}], source)
    assert texts(output, teacher)[0][0].startswith("The fox\n<|im_start|>")
    with pytest.raises(ValueError, match=r"column 'documents' is for the chat template"):
        build([{"messages": HI, "documents": ["The fox"]}])


# Templates

FAMILIES = {
    name: [
        *CHATS.values(),
        *((REASONED | INLINE | CALLED).values() if name.startswith("thinks") else ()),
    ]
    for name in MOVING
}


@pytest.mark.parametrize("name", MOVING)
def test_two_turns_build_with_every_family_a_row_an_answer(build, teacher, name, tmp_path):
    source, chats = MOVING[name], FAMILIES[name]
    dated = 'chat_template_date = "2026-01-31"' if "strftime" in source else ""
    rows = [{"id": f"chat {i}", "messages": chat} for i, chat in enumerate(chats)]
    if "tools" in source:
        rows = [{**row, "tools": TOOLS} for row in rows]
    with pytest.raises(ValueError, match=r'set sequences\.learn = "last"'):
        build(rows, source, sequences=dated)
    options = {"sequences": f"{LAST}\n{dated}", "output": "completions_only = true\nshard_tokens = 150"}  # fmt: skip
    output = build(rows, source, **options)
    assert verify(output, recompute=500, teacher_path=teacher, seed=0).problems == []
    manifest = read_manifest(output)
    assert manifest["totals"]["documents"] == len(rows)

    chat = ChatTemplate(load_tokenizer(str(teacher)), source, learn="last", date=datetime.date(2026, 1, 31))  # fmt: skip
    expected = [
        (turn.id, chat(turn))
        for row in rows
        for turn in chat.turns(
            Document(id=row["id"], messages=row["messages"], tools=row.get("tools"))
        )
    ]
    found = read_rows(output)
    assert [row["id"] for row in found] == [name for name, _ in expected]
    assert len({row["id"] for row in found}) == len(found)
    for row, (_, tokens) in zip(found, expected, strict=True):
        assert (row["text"], row["input_ids"], row["completion_mask"]) == (tokens.text, tokens.ids, tokens.completion_mask)  # fmt: skip
        assert len(row["topk_indices"]) == sum(tokens.completion_mask[1:]), "prompts are not kept"
    card = (output / "README.md").read_text()
    assert card_errors(card) == []
    assert "each answer in a row of its own, with the conversation up to it" in card
    dataset = load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == len(found)


@pytest.mark.parametrize("shard_tokens", [10, 60])
def test_a_build_that_is_killed_anywhere_has_each_answer_once(build, killer, tmp_path, teacher, shard_tokens):  # fmt: skip
    """A shard ends within the answers of a chat only where that is longer than two shards."""
    rows = [{"id": f"c{i}", "messages": CHATS["three turns"]} for i in range(6)]
    options = {"sequences": LAST, "output": f"shard_tokens = {shard_tokens}"}
    base = tmp_path / "killed"
    base.mkdir()
    recipe = build.recipe(base, rows, THINKS, **options)
    assert killer.build(recipe, tmp_path / "whole")["status"] == 0
    files = [read_rows_of(tmp_path / "whole", record.file) for record in records_of(read_manifest(tmp_path / "whole"))]  # fmt: skip
    assert len(files) > 2
    assert [name for ids in files for name in ids] == [f"c{i}/{j}" for i in range(6) for j in range(3)]  # fmt: skip
    assert all(len(ids) % 3 == 0 for ids in files) is (shard_tokens == 60)
    output = tmp_path / "parts"
    assert killer.build(recipe, output, at_step="os.replace#5:before")["killed"]
    before = finished_shards(output)
    assert killer.build(recipe, output)["status"] == 0
    check_kept(before, output)
    assert data_bytes(output) == data_bytes(tmp_path / "whole")
    totals = [read_manifest(path)["totals"] for path in (output, tmp_path / "whole")]
    assert totals[0]["documents"] == totals[1]["documents"] == 6
    assert totals[0]["rows"] == 18
    assert not verify(output, recompute=18, teacher_path=teacher).problems


def read_rows_of(output: Path, file: str) -> list[str]:
    ids: list[str] = pq.read_table(output / file, columns=["id"])["id"].to_pylist()
    return ids


def test_what_was_converted_does_not_depend_on_interruptions(build, tmp_path):
    rows = [{"id": str(i), "messages": json.dumps(CHATS["two turns"]) if i % 2 else CHATS["two turns"]} for i in range(9)]  # fmt: skip
    base = tmp_path / "base"
    base.mkdir()
    recipe = build.recipe(base, rows, None, output="shard_tokens = 40")
    run(recipe, tmp_path / "whole")
    while run(recipe, tmp_path / "parts", max_shards=1).status == "stopped early":
        pass
    whole, parts = (read_manifest(tmp_path / name) for name in ("whole", "parts"))
    assert whole["totals"]["converted"] == parts["totals"]["converted"] == {"JSON text": 4}
    counts = [[s.get("converted") for s in m["shards"]] for m in (whole, parts)]
    assert counts[0] == counts[1]
    assert {"JSON text": 1} in counts[0]


def test_prompts_for_the_teacher_are_chats_of_every_shape(build, teacher):
    """Their last answer is not asked for, and what is converted is counted once for all samples."""
    rows = [{"conversations": SHAREGPT}, {"conversations": [SHAREGPT[0], {"from": "gpt", "value": None}]}]  # fmt: skip
    output = build(rows, generation="max_new_tokens = 4\nsamples = 2")
    manifest = read_manifest(output)
    assert manifest["totals"]["converted"] == {"ShareGPT": 2}
    asked = ONE[0].split("Hello")[0]
    assert [row["text"].startswith(asked) for row in read_rows(output)] == [True] * 4


def test_the_embedded_cases_of_a_wrong_template_write_nothing(build, tmp_path):
    huge = "{{ 'x' * 1000000000 }}" + CHATML
    with pytest.raises(ValueError, match=r"the chat template makes more than 20 times") as caught:
        build([{"messages": HI}], huge)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/out/data/*"))
