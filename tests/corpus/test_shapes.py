"""The shapes in which people keep chats: converted, and said; what is none of them is refused."""

import json
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, Json, List, Value

from builder.corpus.rows import Columns, NotRead, Said, read_row
from builder.corpus.shapes import read_messages, read_objects, read_options

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HI]
LISTS = {"role": ["user", "assistant"], "content": ["Hi", "Hello."]}

SHAPES: dict[str, tuple[Any, set[str]]] = {
    "messages": (HI, set()),
    "JSON text": (json.dumps(HI), {"JSON text"}),
    "object of lists": (LISTS, {"object of lists"}),
    "ShareGPT": (SHAREGPT, {"ShareGPT"}),
    "ShareGPT as JSON text": (json.dumps(SHAREGPT), {"ShareGPT", "JSON text"}),
    "ShareGPT as an object of lists": (
        {"from": ["human", "gpt"], "value": ["Hi", "Hello."]},
        {"ShareGPT", "object of lists"},
    ),
    "parts": (PARTS, {"content of text parts"}),
    "parts with nulls": (
        [{**m, "content": [{**m["content"][0], "image_url": None}]} for m in PARTS],
        {"content of text parts"},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arrow", [False, True])
def test_every_shape_is_the_same_chat(shape, arrow):
    value, converted = SHAPES[shape]
    assert read_messages(value, arrow=arrow) == (HI, converted)


def test_several_parts_are_one_text():
    content = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (message,), _ = read_messages([{"role": "user", "content": content}])
    assert message["content"] == "a b"


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *(("system", "system"), ("human", "user"), ("user", "user"), ("gpt", "assistant")),
        *(("assistant", "assistant"), ("tool", "tool"), ("observation", "tool")),
        *(("chatgpt", "assistant"), ("bing", "assistant"), ("function_response", "tool")),
    ],
)
def test_speakers_of_sharegpt(speaker, role):
    found, _ = read_messages([{"from": speaker, "value": "x", "weight": None, "role": None}])
    assert found == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("speaker", ["function_call", "tool_call"])
def test_calls_of_sharegpt(speaker):
    call = {"name": "f", "arguments": {"a": None}}
    expected = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    for value in (json.dumps(call), json.dumps([call]), call):
        assert read_messages([{"from": speaker, "value": value}])[0] == [expected]


WRONG = {
    "text": ("hello", r"holds text, expected a list of messages with role and content"),
    "a number": (3, r"holds a number, expected a list"),
    "an object": ({"role": "user"}, r"holds an object, expected a list of messages"),
    "JSON text of an object": ('{"a": 1}', r"holds text, expected a list of messages"),
    "lists of different lengths": ({"role": ["user"], "content": ["a", "b"]}, r"lists that have different lengths \(1 of role, 2 of content\)"),
    "strings": (["hello"], r"message 0 is text, expected an object"),
    "another speaker": ([{"from": "narrator", "value": "x"}], r"message 0 is from 'narrator', expected one of human, user"),
    "a speaker of lists": ([{"from": ["human"], "value": "x"}], r"message 0 is from \['human'\]"),
    "a call that is none": ([{"from": "function_call", "value": "f(x)"}], r"message 0 is a function_call without a name"),
    "no answer at all": ([{"role": "assistant", "text": "x"}], r"message 0 has no content, expected text"),
    "no question": ([{"role": "user", "content": None}], r"message 0 has no content, expected text"),
    "a number as content": ([{"role": "user", "content": 3}], r"message 0 has a number as its content"),
    "an image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"a part of content with the type 'image', expected only text"),
    "a part without a type": ([{"role": "user", "content": [{"text": "x"}]}], r"a part of content with no type"),
    "a part that is text": ([{"role": "user", "content": ["x"]}], r"a part of content with no type"),
    "more in a part": ([{"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}], r"with type, text, cache, expected type and text"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_chat_is_refused(case):
    value, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_messages(value)


# Nulls


CALL = {"type": "function", "id": None, "function": {"name": "f", "arguments": {"a": None, "b": 1}}}


def test_nulls_of_json_are_the_corpus_s_own():
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [CALL]}
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read_messages([message])[0] == [expected]
    assert read_messages(json.dumps([message]), arrow=True)[0] == [expected]
    assert read_objects([CALL], "tools")[0] == [CALL]
    assert read_options({"a": None})[0] == {"a": None}


def test_nulls_of_arrow_are_left_out_and_said():
    """They may be the corpus's own, or those of keys that other rows have."""
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]  # fmt: skip
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [c]}]} for c in calls]
    found = pa.Table.from_pylist(rows).to_pylist()
    assert found[0]["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    for row, call in zip(found, calls, strict=True):
        messages, converted = read_messages(row["messages"], arrow=True)
        assert messages[0]["tool_calls"] == [call]
        assert converted == {"nulls of Arrow left out"}
    tools, converted = read_objects([{"name": "f", "strict": None}], "tools", arrow=True)
    assert (tools, converted) == ([{"name": "f"}], {"nulls of Arrow left out"})


def test_nulls_of_the_type_json_stay(tmp_path):
    features = {
        "messages": List(
            {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
        ),
        "tools": List(Json()),
    }
    messages = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, HI[0]]
    from datasets import Features, load_dataset

    rows = [{"messages": messages, "tools": [CALL]}]
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "a.parquet")
    stream = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)  # fmt: skip
    (row,) = stream
    found = read_row(row, Columns(messages="messages", tools="tools"), features=stream.features)
    assert found.messages == [messages[0], HI[0]]
    assert found.tools == [CALL]
    assert found.notes == ()


# What else a chat is given


@pytest.mark.parametrize("value", [None, [], "", " ", "[]"])
def test_no_tools_are_none(value):
    assert read_objects(value, "tools")[0] is None


def test_tools_and_options_may_be_json_text():
    assert read_objects(json.dumps([CALL]), "tools") == ([CALL], {"JSON text"})
    assert read_options('{"a": null}') == ({"a": None}, {"JSON text"})


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda v: read_objects(v, "tools"), "a tool", r"holds text that is not JSON, expected a list of tools, each an object"),
        (lambda v: read_objects(v, "documents"), ["a"], r"holds a list, expected a list of documents"),
        (lambda v: read_objects(v, "tools"), {"a": 1}, r"holds an object, expected a list of tools"),
        (read_options, ["a"], r"holds a list, expected an object with variables of the template"),
    ],
)  # fmt: skip
def test_what_is_none_of_these_is_refused(read, value, message):
    with pytest.raises(ValueError, match=message):
        read(value)


CHATS = Columns(messages="m")


def test_a_row_with_tools_that_the_recipe_does_not_name_is_refused():
    for name, key in (("tools", "tools_column"), ("documents", "documents_column"), ("chat_template_kwargs", "chat_template_kwargs_column")):  # fmt: skip
        row = {"m": HI, name: [{"name": "f"}] if name != "chat_template_kwargs" else {"a": 1}}
        with pytest.raises(NotRead, match=rf'column \'{name}\' is for the chat template.*set corpus\.{key} = "{name}", or to false'):  # fmt: skip
            read_row(row, CHATS)
    off = Columns(messages="m", tools=False, documents=False, options=False)
    assert read_row(row, off) == Said(content=read_row({"m": HI}, CHATS).content, messages=HI)
    assert read_row({"m": HI, "tools": [], "documents": None}, CHATS) is not None


def test_tools_are_part_of_what_a_row_is_known_by():
    columns = Columns(messages="m", tools="t")
    found = [read_row({"m": HI, "t": tools}, columns) for tools in (None, [{"name": "f"}], [{"name": "g"}])]  # fmt: skip
    assert len({said.content for said in found}) == 3
    assert found[0].content == read_row({"m": HI}, CHATS).content


# Prompts and completions


def test_a_prompt_and_its_completion():
    columns = Columns(text="completion", prompt="prompt")
    found = read_row({"prompt": "2+2?", "completion": " 4"}, columns)
    assert (found.text, found.prompt_length) == ("2+2? 4", 4)
    assert read_row({"prompt": "", "completion": "4"}, columns).prompt_length == 0
    other = read_row({"prompt": "2+2? ", "completion": "4"}, columns)
    assert other.text == found.text
    assert other.content != found.content
    for row in ({"prompt": None, "completion": "4"}, {"prompt": "2", "completion": None}, {"prompt": "2", "completion": " "}):  # fmt: skip
        assert read_row(row, columns) is None
    with pytest.raises(NotRead, match=r"column 'prompt' holds a list, expected text"):
        read_row({"prompt": HI, "completion": "4"}, columns)


def test_a_prompt_and_its_completion_as_messages():
    columns = Columns(messages="completion", prompt="prompt")
    found = read_row({"prompt": HI[:1], "completion": HI[1:]}, columns)
    assert (found.messages, found.learn_from) == (HI, 1)
    examples = read_row({"prompt": [*HI, *HI[:1]], "completion": HI[1:]}, columns)
    assert examples.learn_from == 3
    assert read_row({"prompt": HI, "completion": HI[:1]}, columns) is None, "no answer in it"
    assert read_row({"prompt": None, "completion": HI[1:]}, columns) is None
    with pytest.raises(NotRead, match=r"column 'prompt' holds text, expected a list of messages"):
        read_row({"prompt": "Hi", "completion": HI[1:]}, columns)


def test_null_answers_are_nothing_to_learn():
    null = {"role": "assistant", "content": None}
    for messages in ([HI[0], null], [*HI, HI[0], null], [HI[0], null, *HI]):
        assert read_row({"m": messages}, CHATS) is None
        assert read_row({"m": messages}, CHATS, features=None) is None
    assert read_row({"m": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}]}, CHATS) is None  # fmt: skip
    assert read_row({"m": [HI[0], null]}, CHATS, are_prompts=True).messages == HI[:1]
    assert read_row({"m": [HI[0], null, *HI]}, CHATS, are_prompts=True) is None
    thought = {**null, "reasoning_content": "x"}
    assert read_row({"m": [HI[0], thought]}, CHATS).messages[1]["content"] == ""
