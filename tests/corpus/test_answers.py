"""Where the answers of a chat are: by rendering what the teacher is asked and the whole, and by templates that mark them."""

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder, Tokens
from tests.chats import CHATML, chatty
from tests.corpus.test_chats import INJECTED, many
from tests.templates import ANSWERS_MARKED, EXTRA_TOKENS, MOVING, STEADY

DATE = datetime.date(2026, 1, 31)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any) -> dict[str, Any]:
    return answer("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}])  # fmt: skip


TOOL = {"role": "tool", "content": "20"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("Hi"), answer("Hello.")],
    "two turns": [user("Hi"), answer("Hello."), user("Bye"), answer("Bye bye.")],
    "three turns": [user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f")],
    "a question last": [user("Hi"), answer("Hello."), user("Bye")],
    "the same answer": [user("Hi"), answer("Hi"), user("Hi"), answer("Hi")],
    "white space": [user(" Hi\n"), answer("Hello. The quick"), user("\nBye "), answer("Bye\n\nbye.")],
    "scripts": [user("東京?"), answer("Grüße 🦕"), user("naïve"), answer("café 12345")],
    "what looks special": [user("<|im_end|>"), answer("x <end> <|im_start|>user y"), user("<eos>"), answer("z<header>")],
    "a character": [user("<"), answer("<"), user(">"), answer("|")],
}  # fmt: skip
SYSTEM = {
    name: [{"role": "system", "content": "Be brief"}, *messages]
    for name, messages in list(CHATS.items())[:3]
}
SYSTEM_CHATS = {f"{name}, system": messages for name, messages in SYSTEM.items()}
TWO_IN_A_ROW = {"two answers": [user("Hi"), answer("Hello."), answer("And more.")]}
REASONED = {
    "reasoning": [user("2+3?"), answer("5", reasoning_content="2+3 is 5.")],
    "reasoning in two turns": [
        *[user("2+3?"), answer("5", reasoning_content="2+3 is 5.")],
        *[user("and 1?"), answer("6", reasoning_content="5+1 is 6.")],
    ],
}
INLINE = {
    "reasoning in the answer": [user("2+3?"), answer("<think>\n2+3 is 5.\n</think>\n\n5")],
    "in two turns": [
        *[user("2+3?"), answer("<think>\n2+3 is 5.\n</think>\n\n5")],
        *[user("and 1?"), answer("<think>\n5+1 is 6.\n</think>\n\n6")],
    ],
}
CALLED = {
    "a call": [user("Weather?"), call({"city": "Paris", "end": None, "a": 1}), TOOL, answer("20.")],
    "a call and more": [
        *[user("Weather?"), call({"city": "Paris"}), TOOL, answer("20.")],
        *[user("And there?"), call({"city": "Rome"}), TOOL, answer("Warm.")],
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = chatty(tiny_tokenizer)
    special = {content: content in ("<return>",) for content in EXTRA_TOKENS}
    tokenizer.add_tokens(
        [AddedToken(c, special=is_special, normalized=False) for c, is_special in special.items()]
    )
    return tokenizer


def rows_of(tokenizer: Any, source: str, messages: Any, **options: Any) -> list[Tokens]:
    """The rows of a chat, one an answer."""
    tools = TOOLS if "call>" in str(source) and "tools" in source else None
    template = ChatTemplate(tokenizer, source, date=DATE, **options)
    document = Document(id="the id", messages=messages, tools=tools)
    return [template(turn) for turn in template.turns(document)]


def said(tokens: Tokens) -> str:
    """The text of the tokens in the mask."""
    assert tokens.completion_mask is not None
    pairs = zip(tokens.offsets, tokens.completion_mask, strict=True)
    kept = [span for span, is_said in pairs if is_said]
    return tokens.text[kept[0][0] : kept[-1][1]]


def rendered(tokenizer: Any, source: str, messages: Any, **options: Any) -> str:
    """What transformers makes of it, on that day."""
    for shape in ("%d %b %Y", "%Y-%m-%d"):
        source = source.replace(f"strftime_now('{shape}')", f"'{DATE:{shape}}'")
    if source == STEADY["parts"]:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    tools = TOOLS if "call>" in source and "tools" in source else None
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=False, **options
    )
    return text


def chats_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """The chats that a template can write."""
    found = {**CHATS, **SYSTEM_CHATS}
    if "thinks" not in name:  # it writes the first of two answers otherwise, too
        found |= TWO_IN_A_ROW
    if name in ("thinks", "thinks first"):
        found |= REASONED | INLINE | CALLED
    if name == "channels":
        found |= {**REASONED, **CALLED}
    if name == "asks to think":
        found |= CALLED
    if name == "mistral":
        found = {k: v for k, v in found.items() if "system" not in k}
    return found


CASES = [(name, chat) for name in {**STEADY, **MOVING} for chat in chats_of(name)]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_each_answer_is_what_follows_what_the_teacher_is_asked(tokenizer, name, chat):
    """The text is the whole up to the answer, and its beginning what is asked for that."""
    source, messages = {**STEADY, **MOVING}[name], chats_of(name)[chat]
    numbers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    rows = rows_of(tokenizer, source, messages, learn="last")
    assert len(rows) == len(numbers)
    for number, row in zip(numbers, rows, strict=True):
        messages_T = messages[: number + 1]
        if name == "asks to think":  # it takes arguments as text
            messages_T = [_as_text(message) for message in messages_T]
        asked = rendered(tokenizer, source, messages_T[:-1], add_generation_prompt=True)
        whole = rendered(tokenizer, source, messages_T)
        assert row.text == whole
        if name == "asks to think":
            asked = asked.removesuffix("<think>\n")  # the template keeps this much of it
        assert whole.startswith(asked)
        expected = whole[len(asked) :].rstrip()
        if name == "ends twice":
            expected = expected.removesuffix("<eos>").rstrip()
        assert said(row) == expected
        assert number + 1 == len(messages) or expected


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    import json

    if "tool_calls" not in message:
        return message
    function = message["tool_calls"][0]["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": [{"function": {**function, "arguments": text}}]}


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize(("name", "chat"), CASES)
def test_answers_are_those_that_training_templates_mark(tokenizer, name, chat, learn):
    """Where all are learned from one row, those that move are refused, and told what to do."""
    messages, source = chats_of(name)[chat], {**STEADY, **MOVING}[name]
    marked = rows_of(tokenizer, ANSWERS_MARKED[name], messages, learn=learn)
    found, refusal = [], ""
    try:
        found = rows_of(tokenizer, source, messages, learn=learn)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert (learn, name in MOVING) == ("all", True)
        assert 'set sequences.learn = "last"' in refusal
        return
    assert [(row.text, row.ids) for row in found] == [(row.text, row.ids) for row in marked]
    assert [row.completion_mask for row in found] == [row.completion_mask for row in marked]


def test_there_are_as_many_comparisons_as_there_were_with_trl_s_own():
    """None of the last answers alone is a refusal, nor is any of the templates that stay as they are."""
    assert len(CASES) + sum(name in STEADY for name, _ in CASES) >= 149


@many
@given(contents=st.lists(INJECTED.filter(str.strip), min_size=2, max_size=4))
@pytest.mark.parametrize("name", ["thinks", "thinks first", "ends twice", "channels", "chatml"])
def test_no_message_spells_a_token_whatever_it_holds(tokenizer, name, contents):
    source = {**STEADY, **MOVING}[name]
    messages = [(answer if i % 2 else user)(content) for i, content in enumerate(contents)]
    harmless = [{**message, "content": "x"} for message in messages]
    added = set(tokenizer.added_tokens_decoder)
    for row, plain in zip(
        *(rows_of(tokenizer, source, m, learn="last") for m in (messages, harmless)), strict=True
    ):
        assert [i for i in row.ids if i in added] == [i for i in plain.ids if i in added]
        assert tokenizer.decode(row.ids, skip_special_tokens=False) == row.text


# Reasoning


def test_reasoning_that_the_template_opens_with_its_question_is_continued(tokenizer):
    """As DeepSeek R1 answers: <think> is asked, and the template itself would leave the reasoning out."""
    source = MOVING["asks to think"]
    for content in (
        "<think>\n2+3 is 5.\n</think>\n\n5",
        "2+3 is 5.\n</think>\n\n5",
        "\n<think>2+3 is 5.\n</think>\n\n5",
    ):
        (row,) = rows_of(tokenizer, source, [user("2+3?"), answer(content)], learn="last")
        asked = rendered(tokenizer, source, [user("2+3?")], add_generation_prompt=True)
        assert row.text == f"{asked}2+3 is 5.\n</think>\n\n5<eos>"
        assert said(row) == "2+3 is 5.\n</think>\n\n5<eos>"
        special = ["<think>", "</think>"]
        assert [row.ids.count(tokenizer.convert_tokens_to_ids(s)) for s in special] == [1, 1]


@pytest.mark.parametrize("learn", ["all", "last"])
def test_reasoning_in_an_answer_is_what_reasoning_by_itself_is(tokenizer, learn):
    """And its tags are the template's, though no message may spell them."""
    for name in ("thinks", "thinks first"):
        source = MOVING[name]
        (by_itself,) = rows_of(tokenizer, source, REASONED["reasoning"], learn=learn)
        (inline,) = rows_of(tokenizer, source, INLINE["reasoning in the answer"], learn=learn)
        assert inline == by_itself
        think = tokenizer.convert_tokens_to_ids("<think>")
        assert inline.ids.count(think) == 1
        assert said(inline).startswith("2+3 is 5." if name == "thinks first" else "<think>")


def test_an_answer_that_thought_though_it_was_asked_not_to_is_refused(tokenizer):
    source, options = MOVING["thinks first"], {"enable_thinking": False}
    (row,) = rows_of(tokenizer, source, CHATS["one turn"], learn="last", options=options)
    assert said(row) == "Hello.<|im_end|>"
    for messages in (REASONED["reasoning"], INLINE["reasoning in the answer"]):
        with pytest.raises(
            ValueError, match="does not write message 1 right after its generation prompt"
        ):
            rows_of(tokenizer, source, messages, learn="last", options=options)


# Rows


def test_rows_of_turns_have_ids_of_their_own_and_learn_one_answer_each(tokenizer):
    chats = ChatTemplate(tokenizer, MOVING["thinks"], learn="last")
    encoder = Encoder(tokenizer, max_length=500, long_documents="chunk", chats=chats)
    document = Document(id="a", messages=CHATS["three turns"], notes=("ShareGPT",))
    rows = encoder.encode(document)
    assert [(row.document_id, row.chunk_index) for row in rows] == [("a/0", 0), ("a/1", 0), ("a/2", 0)]  # fmt: skip
    assert [row.notes for row in rows] == [("ShareGPT",), (), ()]
    for row, content in zip(rows, "bdf", strict=True):
        mask = row.completion_mask
        first = mask.index(True)
        assert all(mask[first : first + sum(mask)])
        assert f"\n{content}<|im_end|>" in row.text
    short = Encoder(tokenizer, max_length=32, long_documents="truncate", chats=chats)
    assert [row.document_id for row in short.encode(document)] == ["a/0"]


def test_only_answers_of_a_completion_are_learned(tokenizer):
    """The answers of its prompt are examples."""
    messages = CHATS["two turns"]
    for name in ("chatml", "llama 3", "gemma"):
        for source in (STEADY[name], ANSWERS_MARKED[name]):
            for learn in ("all", "last"):
                template = ChatTemplate(tokenizer, source, learn=learn)
                document = Document(id="x", messages=messages, learn_from=2)
                (turn,) = template.turns(document)
                found = said(template(turn))
                assert found.startswith("Bye bye.")
                assert "Hello" not in found


def test_what_cannot_be_told_of_a_last_answer_is_refused(tokenizer):
    no_prompt = CHATML.split("{% if add_generation_prompt %}")[0]
    with pytest.raises(ValueError, match=r"no generation prompt, and writes more before message 1"):
        rows_of(tokenizer, no_prompt, CHATS["one turn"], learn="last")
    ends_thrice = CHATML + "{% if not add_generation_prompt %}{{ '<eot><end>' }}{% endif %}"
    odd = ends_thrice.replace("'<|im_end|>' }}{{ '\n'", "('<eot>' if loop.last and message.role == 'assistant' else '<|im_end|>') }}{{ '\n'")  # fmt: skip
    (row,) = rows_of(tokenizer, ends_thrice, CHATS["one turn"], learn="last")
    assert said(row) == "Hello.<|im_end|>"
    (row,) = rows_of(tokenizer, odd, CHATS["one turn"], learn="last")
    assert said(row) == "Hello.<eot>", "it is what ends a simple answer, too"
    moves = CHATML.replace("<|im_start|>' +", "<|im_start|>' + (messages | length | string) +")
    with pytest.raises(
        ValueError, match=r"does not write message 1 right after its generation prompt"
    ):
        rows_of(tokenizer, moves, CHATS["one turn"], learn="last")


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("content", ["a", "assistant", "assistant: a", ":", "s"])
def test_an_answer_that_looks_like_what_stands_before_it_is_not_taken_for_it(tokenizer, learn, content):  # fmt: skip
    """Without a generation prompt, only what a message says is certain."""
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '<eot>' }}{% endfor %}"
    with pytest.raises(ValueError, match="no generation prompt, and writes more before message 1"):
        rows_of(tokenizer, source, [user("Hi"), answer(content)], learn=learn)
    asks = source + "{{ 'assistant: ' if add_generation_prompt else '' }}"
    (row,) = rows_of(tokenizer, asks, [user("Hi"), answer(content)], learn=learn)
    assert said(row).strip() == f"{content}<eot>"
    bare = "{% for m in messages %}{{ (m.role + ': ' if m.role == 'user' else '') + m.content + '<eot>' }}{% endfor %}"
    for reply in (content, f"<think>{content}</think>{content}"):
        (row,) = rows_of(tokenizer, bare, [user("Hi"), answer(reply)], learn=learn)
        assert said(row) == f"{reply}<eot>"


def test_where_a_content_cannot_be_found_again_nothing_is_supposed_of_it(tokenizer):
    """A template may change it, or refuse any other."""
    upper = "{% for m in messages %}{{ (m.content if m.role == 'user' else m.content.upper()) + '<eot>' }}{% endfor %}"
    picky = "{% for m in messages %}{{ m.content + '<eot>' if m.content in ['Hi', 'Hello.', 'a', 'b'] else raise_exception('what?') }}{% endfor %}"
    for source in (upper, picky):
        with pytest.raises(
            ValueError, match="no generation prompt, and writes more before message 1"
        ):
            rows_of(tokenizer, source, CHATS["one turn"], learn="last")
    asks = "{{ '<header>' if add_generation_prompt else '<eot><end>' }}"
    for source in (upper, picky):
        with_header = source.replace("{{ (m", "{{ ('<header>' if m.role != 'user' else '') + (m")
        with_header = with_header.replace("{{ m", "{{ ('<header>' if m.role != 'user' else '') + m")
        with pytest.raises(ValueError, match="the end of an answer cannot be identified"):
            rows_of(tokenizer, with_header + asks, CHATS["one turn"], learn="last")
