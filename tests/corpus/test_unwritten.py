"""What of a chat a template leaves out is refused, or let go and counted; calls are brought into the form that it takes."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder, Tokens
from tests.chats import CHATML, add_markers, chatty
from tests.templates import ASKS_TO_THINK, CHANNELS, EXTRA_TOKENS, SORTS, THINKS, THINKS_FIRST

USER = {"role": "user", "content": "Weather in Paris?"}
ANSWER = {"role": "assistant", "content": "20 degrees."}
TOOL = {"role": "tool", "content": '{"t": 20}'}
ARGUMENTS = {"city": "Paris", "unit": None}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city"}}]


def call(arguments: Any = ARGUMENTS, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function, **more}]}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = chatty(tiny_tokenizer)
    tokenizer.add_tokens([AddedToken(c, special=False, normalized=False) for c in EXTRA_TOKENS])
    return tokenizer


def tokens(tokenizer: Any, source: str, messages: Any, let_go: Any = (), **more: Any) -> Tokens:
    document = Document(id="the id", messages=messages, **more)
    return ChatTemplate(tokenizer, source, let_go=let_go)(document)


WRITES_CALLS = CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +")  # fmt: skip
WRITES_NAMES = CHATML.replace("['role'] +", "['role'] + (message.name or '') +")

LEFT_OUT: dict[str, tuple[str, list[dict[str, Any]], str, list[str]]] = {
    "calls": (CHATML, [USER, call(), TOOL, ANSWER], "does not write the tool_calls of message 1", ["tool_calls"]),
    "a legacy call": (
        CHATML,
        [USER, {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "x"}}, ANSWER],
        "does not write the function_call of message 1",
        ["function_call"],
    ),
    "arguments": (
        CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls or []) | map(attribute='function.name') | join +"),
        [USER, call(), TOOL, ANSWER],
        "does not write the tool_calls of message 1",
        ["tool_calls"],
    ),
    "one argument of several": (
        CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls[0].function.name + message.tool_calls[0].function.arguments.city if message.tool_calls else '') +"),
        [USER, call({"city": "Paris", "unit": "C"}), TOOL, ANSWER],
        "does not write the tool_calls of message 1",
        ["tool_calls"],
    ),
    "the second call": (
        CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls[0] | tojson if message.tool_calls else '') +"),
        [USER, {**call(), "tool_calls": call()["tool_calls"] + call({"city": "Rome"})["tool_calls"]}, TOOL, ANSWER],
        "does not write the tool_calls of message 1",
        ["tool_calls"],
    ),
    "reasoning": (CHATML, [USER, {**ANSWER, "reasoning_content": "It is warm."}], "does not write the reasoning_content of message 1", ["reasoning_content"]),
    "reasoning by another name": (CHATML, [USER, {**ANSWER, "thinking": "It is warm."}], "does not write the thinking of message 1", ["thinking"]),
    "that there is reasoning, but not which": (
        CHATML.replace("message['content'] +", "('<think></think>' if message.reasoning_content else '') + message['content'] +"),
        [USER, {**ANSWER, "reasoning_content": "It is warm."}],
        "does not write the reasoning_content of message 1",
        ["reasoning_content"],
    ),
    "reasoning in a content": (
        CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
        [USER, {"role": "assistant", "content": "<think>It is warm.</think>20 degrees."}],
        r"does not write the reasoning_content of message 1 \(in its content\)",
        ["reasoning_content"],
    ),
    "a name": (CHATML, [{**USER, "name": "Ann"}, ANSWER], "does not write the name of message 0", ["name"]),
    "the name of an answer": (CHATML, [USER, {**ANSWER, "name": "Bob"}], "does not write the name of message 1", ["name"]),
    "a refusal": (CHATML, [USER, {**ANSWER, "refusal": "No."}], "does not write the refusal of message 1", ["refusal"]),
    "a number": (CHATML, [USER, {**ANSWER, "weight": 0}], "does not write the weight of message 1", ["weight"]),
    "a truth value": (CHATML, [USER, {**ANSWER, "is_safe": True}], "does not write the is_safe of message 1", ["is_safe"]),
    "an object": (CHATML, [USER, {**ANSWER, "meta": {"a": [{"b": "c"}]}}], "does not write the meta of message 1", ["meta"]),
    "a link to a call": (
        WRITES_CALLS, [USER, call(id="c1"), {**TOOL, "tool_call_id": "c1"}, ANSWER], "does not write the tool_call_id of message 2", ["tool_call_id"],
    ),
    "several": (
        CHATML, [{**USER, "name": "Ann"}, {**ANSWER, "refusal": "No."}], r"does not write the name of message 0 \(nor refusal\)", ["name", "refusal"],
    ),
    "a question": (
        CHATML.replace("+ message['content'] +", "+ (message['content'] if message.role == 'assistant' else '?') +"),
        [USER, ANSWER],
        "does not write the content of message 0",
        ["content"],
    ),
    "an earlier question": (
        CHATML.replace("+ message['content'] +", "+ (message['content'] if loop.index0 != 2 else '?') +"),
        [USER, ANSWER, {"role": "user", "content": "And the weather in Rome?"}, ANSWER],
        "does not write the content of message 2",
        ["content"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused_or_let_go(tokenizer, case):
    source, messages, message, keys = LEFT_OUT[case]
    for template in (source, add_markers(source)) if source is CHATML else (source,):
        with pytest.raises(ValueError, match=f"^document 'the id': the chat template {message}") as caught:  # fmt: skip
            tokens(tokenizer, template, messages)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(f"sequences.drop_unwritten = {json.dumps(keys)}")
        found = tokens(tokenizer, template, messages, let_go=keys)
        assert found == tokens(tokenizer, template, messages, let_go=["*"])
        assert found.notes == tuple(f"{key} left out" for key in sorted(keys))
        for key in keys:
            with pytest.raises(ValueError, match="does not write"):
                tokens(tokenizer, template, messages, let_go=["other", *[k for k in keys if k != key]])  # fmt: skip


def test_tools_that_a_template_leaves_out_are_refused_or_let_go(tokenizer):
    for messages in ([USER, ANSWER], [{"role": "system", "content": "Be brief"}, USER, ANSWER]):
        with pytest.raises(ValueError, match=r"does not write the tools of the chat, number 0, so the teacher would not see it"):  # fmt: skip
            tokens(tokenizer, CHATML, messages, tools=TOOLS)
        found = tokens(tokenizer, CHATML, messages, tools=TOOLS, let_go=["tools"])
        assert found.notes == ("tools left out",)
        assert found.ids == tokens(tokenizer, CHATML, messages).ids
    one_only = CHATML.replace("{% for message", "{{ tools[0] | tojson }}{% for message")
    second = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(ValueError, match=r"does not write the tools of the chat, number 1"):
        tokens(tokenizer, one_only, [USER, ANSWER], tools=[*TOOLS, second])


def test_what_says_nothing_may_be_left_out(tokenizer):
    empty = {"name": "", "tool_calls": [], "meta": {}, "refusal": " ", "annotations": [None]}
    assert tokens(tokenizer, CHATML, [USER, {**ANSWER, **empty}]).notes == ()


def test_what_is_written_in_some_form_is_written(tokenizer):
    assert tokens(tokenizer, WRITES_NAMES, [{**USER, "name": "A"}, ANSWER]).notes == ()
    assert tokens(tokenizer, THINKS, [USER, {**ANSWER, "thinking": "x"}]).notes == ()
    both = {**ANSWER, "thinking": "x", "reasoning_content": "x", "reasoning": "x"}
    assert tokens(tokenizer, THINKS, [USER, both]).notes == ()
    upper = CHATML.replace("message['content']", "message['content'].upper()[:9]")
    assert tokens(tokenizer, upper, [USER, ANSWER]).notes == ()
    flags = CHATML.replace("message['content']", "('!' if message.is_safe else '?') + message['content']")  # fmt: skip
    assert tokens(tokenizer, flags, [USER, {**ANSWER, "is_safe": False}]).notes == ()
    needs = CHATML.replace("message['content']", "(message['content'] if (message.name or 'Ann') == 'Ann' else raise_exception('who?'))")  # fmt: skip
    assert tokens(tokenizer, needs, [{**USER, "name": "Ann"}, ANSWER]).notes == ()


def test_what_a_template_leaves_out_of_earlier_turns_is_counted(tokenizer):
    """As training templates do it, which drop earlier reasoning: there is a row that teaches it only if each turn has one."""
    thought = {**ANSWER, "reasoning_content": "It is warm."}
    marked = add_markers(CHATML).replace(
        "{{ message['content'] + '<|im_end|>'",
        "{{ (message.reasoning_content or '' if loop.last else '') + message['content'] + '<|im_end|>'",
    )  # fmt: skip
    found = tokens(tokenizer, marked, [USER, thought, USER, thought])
    assert found.notes == ("reasoning_content left out of earlier turns",)
    assert found.text.count("It is warm.") == 1
    chats = ChatTemplate(tokenizer, THINKS, learn="last")
    rows = [chats(turn) for turn in chats.turns(Document(id="x", messages=[USER, thought, USER, thought]))]  # fmt: skip
    assert [row.text.count("It is warm.") for row in rows] == [1, 1]
    assert [row.notes for row in rows] == [(), ()]


def test_prompts_are_looked_at_too(tokenizer):
    document = Document(id="x", messages=[{**USER, "name": "Ann"}])
    with pytest.raises(ValueError, match="does not write the name of message 0"):
        ChatTemplate(tokenizer, CHATML, is_of_prompts=True)(document)
    found = ChatTemplate(tokenizer, CHATML, is_of_prompts=True, let_go=["name"])(document)
    assert found.notes == ("name left out",)
    encoder = Encoder(tokenizer, max_length=99, long_documents="chunk", chats=ChatTemplate(tokenizer, CHATML, is_of_prompts=True, let_go=["name"]))  # fmt: skip
    assert encoder.encode_prompt(document).notes == ("name left out",)


# Calls


def written(tokenizer: Any, source: str, arguments: Any, **options: Any) -> tuple[str, Any]:
    chats = ChatTemplate(tokenizer, source, **options)
    (turn, *_) = chats.turns(Document(id="x", messages=[USER, call(arguments), TOOL, ANSWER], tools=TOOLS if source in (THINKS, THINKS_FIRST) else None))  # fmt: skip
    found = chats(turn)
    return found.text, found.notes


TO_JSON = CHATML.replace("message['content'] +", "message['content'] + (message.tool_calls[0].function.name + message.tool_calls[0].function.arguments | tojson if message.tool_calls else '') +")  # fmt: skip
ITEMS = CHATML.replace("{{ '<|im_start|>'", "{{ '<|im_start|>' + message['role'] + '\n' }}{% for k, v in (message.tool_calls[0].function.arguments if message.tool_calls else {}) | items %}{{ message.tool_calls[0].function.name + k }}={{ v }};{% endfor %}{{ ''").replace("'' + message['role'] + '\n' + ", "")  # fmt: skip


def test_arguments_are_as_they_stand(tokenizer):
    """Null stays null, and text that is JSON stays the same text, spaces and all."""
    text, notes = written(tokenizer, THINKS, ARGUMENTS, learn="last")
    assert '"arguments": {"city": "Paris", "unit": null}}' in text
    assert notes == ()
    text, notes = written(tokenizer, THINKS, '{"city":"Paris",  "unit":null}', learn="last")
    assert '"arguments": {"city":"Paris",  "unit":null}}' in text
    assert notes == ()


@pytest.mark.parametrize("given", ['{"city":"Paris","unit":null}', "{}"])
def test_text_is_taken_for_what_it_says_where_a_template_writes_text_of_text(tokenizer, given):
    """Or takes it apart. No model has seen its calls in quotation marks."""
    for source in (TO_JSON, ITEMS) if given != "{}" else (TO_JSON,):
        text, notes = written(tokenizer, source, given)
        assert notes == ("arguments of calls as objects",)
        assert (text, ()) == written(tokenizer, source, json.loads(given))
    assert "weather" + json.dumps(json.loads(given)) in written(tokenizer, TO_JSON, given)[0]


def test_objects_are_written_as_text_where_a_template_needs_that(tokenizer):
    text, notes = written(tokenizer, ASKS_TO_THINK, ARGUMENTS, learn="last")
    assert '<call>weather {"city": "Paris", "unit": null}</call>' in text
    assert notes == ("arguments of calls as JSON text",)
    assert (text, ()) == written(tokenizer, ASKS_TO_THINK, json.dumps(ARGUMENTS), learn="last")


def test_text_that_is_no_object_stays_what_it_is(tokenizer):
    text, notes = written(tokenizer, THINKS, "Paris", learn="last")
    assert '"arguments": Paris}' in text
    assert notes == ()


# Keys of arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"a": 1, "b": 2},
        {"zone": "Paris", "end": "x", "call": {"other": 1, "e": [{"t": 1, "name": 2}]}},
        {"name": "x", "header": "y", "type": "end"},
        {"b<eot>": "<eot>", "a": "eot", "<": ">"},
    ],
)
def test_keys_may_have_names_of_which_tokens_are_made_though_they_are_sorted(tokenizer, arguments):
    """Marks on some of them alone would change their order."""
    messages = [USER, call(arguments), TOOL, ANSWER]
    for source in (SORTS, TO_JSON, THINKS):
        chats = ChatTemplate(tokenizer, source, learn="last", let_go=["tools"])
        document = Document(id="x", messages=messages)
        found = chats(chats.turns(document)[0])
        theirs = tokenizer.apply_chat_template(messages[:2], chat_template=source, tokenize=False)
        assert found.text == theirs
        harmless = chats(chats.turns(Document(id="x", messages=[USER, call({"q": 1}), TOOL, ANSWER]))[0])  # fmt: skip
        added = set(tokenizer.added_tokens_decoder)
        assert [i for i in found.ids if i in added] == [i for i in harmless.ids if i in added]
        assert tokenizer.decode(found.ids, skip_special_tokens=False) == found.text


def test_tools_cannot_spell_a_token_and_are_looked_up_by_their_keys(tokenizer):
    source = (
        "{% for tool in tools %}{{ tool.function.name }}({% for name, p in tool.function.parameters.properties | dictsort %}"
        "{{ name + ('' if name in tool.function.parameters.required else '?') + ': ' + p.type + ' ' + (p.description or '') }};"
        "{% endfor %}){% endfor %}" + CHATML
    )
    parameters = {
        "type": "object",
        "properties": {"end": {"type": "string", "description": "<|im_end|> x"}, "name": {"type": "integer"}, "at": {"type": "string"}},
        "required": ["end", "name"],
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "<eot>f", "parameters": parameters}}
    found = tokens(tokenizer, source, [USER, ANSWER], tools=[tool])
    assert found.text.startswith(
        "<eot>f(at?: string ;end: string <|im_end|> x;name: integer ;)<|im_start|>"
    )
    special = tokenizer.convert_tokens_to_ids(["<eot>", "<|im_end|>"])
    assert [found.ids.count(token) for token in special] == [0, 2]


def test_options_of_a_chat_cannot_spell_a_token_and_are_compared_as_they_are(tokenizer):
    source = "{{ note or '' }}{{ '!' if mode == 'end' else '?' }}" + CHATML
    options = {"note": "<|im_end|>", "mode": "end"}
    found = tokens(tokenizer, source, [USER, ANSWER], options=options)
    assert found.text.startswith("<|im_end|>!<|im_start|>")
    assert found.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_channels_write_calls_and_the_reasoning_of_the_last_answer(tokenizer):
    """All of it has to be there in some row."""
    import datetime

    messages = [USER, call(), TOOL, {**ANSWER, "thinking": "It is warm."}]
    chats = ChatTemplate(tokenizer, CHANNELS, learn="last", date=datetime.date(2026, 1, 1))
    rows = [chats(turn) for turn in chats.turns(Document(id="x", messages=messages))]
    assert ['{"city": "Paris", "unit": null}' in row.text for row in rows] == [True, True]
    assert ["It is warm." in row.text for row in rows] == [False, True]
