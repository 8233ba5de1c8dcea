"""Rendering: what transformers makes of a chat, on the recipe's day, and no more than so much of it."""

import datetime
import time
import tracemalloc
from typing import Any

import pytest

from builder.corpus.chats import ChatTemplate
from builder.corpus.documents import Document
from builder.corpus.messages import Chat
from builder.corpus.rendering import Renderer
from tests.chats import CHATML, chatty
from tests.corpus.test_answers import CHATS, DATE, TOOLS, rendered, rows_of
from tests.templates import DATED, MOVING, PARTS, STEADY, THINKS, THINKS_FIRST

MESSAGES = CHATS["two turns"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    return chatty(tiny_tokenizer)


@pytest.mark.parametrize("name", {**STEADY, **MOVING})
@pytest.mark.parametrize("asks", [False, True])
def test_it_writes_what_transformers_writes(tokenizer, name, asks):
    source = {**STEADY, **MOVING}[name]
    renderer = Renderer(source, tokenizer.special_tokens_map, date=DATE)
    tools = TOOLS if "call>" in source and "tools" in source else None
    found = renderer.text(Chat(messages=MESSAGES, tools=tools), add_generation_prompt=asks)
    assert found == rendered(tokenizer, source, MESSAGES, add_generation_prompt=asks)


def test_reasoning_is_found_under_each_of_its_names(tokenizer):
    for key in ("reasoning_content", "reasoning", "thinking"):
        messages = [MESSAGES[0], {**MESSAGES[1], key: "I think."}]
        found = Renderer(THINKS, {}).text(Chat(messages=messages, tools=TOOLS))
        assert "<think>\nI think.\n</think>" in found
        assert found == rendered(tokenizer, THINKS, messages)


# What is fixed by the recipe


def test_the_day_is_the_recipe_s(tokenizer):
    (row,) = rows_of(tokenizer, DATED, CHATS["one turn"])
    assert "Today Date: 31 Jan 2026" in row.text
    with pytest.raises(ValueError, match=r'writes today\'s date.*set sequences\.chat_template_date = "2026-01-31", or give a template with a fixed date'):  # fmt: skip
        ChatTemplate(tokenizer, DATED)(Document(id="x", messages=MESSAGES))
    asks_whether = DATED.replace("strftime_now(", "(strftime_now if strftime_now is defined else none)(")  # fmt: skip
    (row,) = rows_of(tokenizer, asks_whether, CHATS["one turn"])
    assert "31 Jan 2026" in row.text


def test_options_are_the_recipe_s_and_a_chat_s_own_come_first(tokenizer):
    source = "{{ '<|im_start|>' if deep else '' }}" + CHATML

    def starts(recipe: dict[str, Any], own: dict[str, Any]) -> bool:
        chats = ChatTemplate(tokenizer, source, options=recipe)
        text = chats(Document(id="x", messages=MESSAGES, options=own)).text
        return text.startswith("<|im_start|><|im_start|>")

    assert not starts({}, {})
    assert starts({"deep": True}, {})
    assert starts({}, {"deep": True})
    assert not starts({"deep": True}, {"deep": False})


def test_options_that_a_template_does_not_ask_for_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"sets 'enable_thought', which the chat template does not use; it uses .*enable_thinking"):  # fmt: skip
        ChatTemplate(tokenizer, THINKS_FIRST, options={"enable_thought": False})
    with pytest.raises(ValueError, match=r"sets 'messages', which a recipe must not set"):
        ChatTemplate(tokenizer, THINKS_FIRST, options={"messages": []})
    document = Document(id="x", messages=CHATS["one turn"], options={"deep": True})
    with pytest.raises(ValueError, match=r"document 'x': .*does not use 'deep'.*drop_unwritten = \[\"deep\"\]"):  # fmt: skip
        ChatTemplate(tokenizer, CHATML)(document)
    for name in ("messages", "add_generation_prompt", "strftime_now"):
        odd = Document(id="x", messages=CHATS["one turn"], options={name: True})
        with pytest.raises(ValueError, match=rf"sets '{name}' for its template, which a chat must not set"):  # fmt: skip
            ChatTemplate(tokenizer, CHATML, let_go=["*"])(odd)
    found = ChatTemplate(tokenizer, CHATML, let_go=["deep"])(document)
    assert found.notes == ("deep left out",)


def test_tools_have_a_template_of_their_own_where_a_tokenizer_brings_one(tiny_tokenizer):
    tokenizer = chatty(tiny_tokenizer)
    with_tools = "{{ (tools | tojson) + '\n' }}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": with_tools}
    chats = ChatTemplate(tokenizer)
    plain = chats(Document(id="x", messages=MESSAGES))
    found = chats(Document(id="x", messages=MESSAGES, tools=TOOLS))
    assert found.text == tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False)
    assert found.text.endswith(plain.text)
    assert plain.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_documents_are_written_where_a_template_does(tokenizer):
    source = (
        "{% for d in documents or [] %}{{ d.title + ': ' + d.text + '\n' }}{% endfor %}" + CHATML
    )
    documents = [{"title": "The fox", "text": "jumps"}]
    found = ChatTemplate(tokenizer, source)(
        Document(id="x", messages=MESSAGES, documents=documents)
    )
    assert found.text.startswith("The fox: jumps\n<|im_start|>")
    with pytest.raises(ValueError, match=r"does not write the documents of the chat, number 0"):
        ChatTemplate(tokenizer, CHATML)(Document(id="x", messages=MESSAGES, documents=documents))


def test_contents_are_parts_where_a_template_takes_nothing_else():
    assert Renderer(PARTS, {})._takes_parts
    for source in (CHATML, THINKS, DATED):
        assert not Renderer(source, {}, date=DATE)._takes_parts
    both = PARTS.replace("{% for part in message.content %}", "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}").replace("{% endif %}{% endfor %}{{ '<|im_end|>", "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>")  # fmt: skip
    assert not Renderer(both, {})._takes_parts


# What is bounded

GIGABYTE = 1_000_000_000
TOO_MUCH = {
    "repeated": f"{{{{ 'x' * {GIGABYTE} }}}}",
    "repeated from the left": f"{{{{ {GIGABYTE} * 'x' }}}}",
    "a list": f"{{{{ ([0] * {GIGABYTE}) | length }}}}",
    "in loops": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "joined": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "added": "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "a list added": "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "a block": "{% set x %}{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}{{ x }}",
    "replaced": "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "a width": f"{{{{ 'x' | center({GIGABYTE}) }}}}",
    "a width by a method": f"{{{{ 'x'.ljust({GIGABYTE}) }}}}",
    "a power": "{{ (10 ** 1000000000) is number }}",
    "a block in loops": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}{% endset %}",
    "a block of long strings": "{% set s = 'x' * 1000000 %}{% set x %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endset %}{{ x }}",
    "messages": "{% for i in range(99) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_template_that_makes_a_gigabyte_is_one_line(tokenizer, case):
    """And takes a fraction of that."""
    messages = [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "y"}]
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"makes more than 20 times what the chat holds plus 1,000,000 characters|is not valid") as caught:  # fmt: skip
            ChatTemplate(tokenizer, TOO_MUCH[case] + CHATML)(Document(id="x", messages=messages))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 250_000_000, peak
    assert time.monotonic() - started < 60


def test_a_long_chat_is_no_gigabyte(tokenizer):
    messages = [{"role": "user", "content": "The quick brown fox. " * 100_000}, {"role": "assistant", "content": "y"}]  # fmt: skip
    found = Renderer(CHATML, {}).text(Chat(messages=messages))
    assert len(found) > 2_000_000


def test_options_cannot_make_more_room(tokenizer):
    source = CHATML + "{% for i in range(99) %}{{ 'x' * 100000 }}{% endfor %}"
    with pytest.raises(ValueError, match="makes more than 20 times"):
        Renderer(source, {}, options={}, date=datetime.date(2026, 1, 1)).text(Chat(messages=MESSAGES))  # fmt: skip
