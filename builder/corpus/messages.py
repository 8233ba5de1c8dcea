"""The messages of a chat, checked, and what else its template is given: a Chat.

In:   a list of {role, content}, and whatever else the teacher's chat template may know (tool calls, reasoning).
Out:  plain JSON values. A key of a message without a value is left out, as transformers does it; below that, values are as they stand.
      An answer that is null stays None, for its reader to skip.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, Any]

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")
"""Others are refused: a template may write a role into a special token, so that it must not be free text."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages hold what was thought before an answer; transformers gives templates each under all of these names."""
INSTEAD_OF_CONTENT = ("tool_calls", "function_call", *REASONING)
TEXT_PARTS = "content of text parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a chat template is given."""

    messages: list[Message]
    tools: list[Any] | None = None
    """JSON schemas of functions that the assistant can call."""
    documents: list[Any] | None = None
    """What the assistant is to answer from."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other variables of the template, such as `enable_thinking`."""

    def of(self, messages: list[Message]) -> "Chat":
        """The same with other messages."""
        return replace(self, messages=messages)

    def up_to(self, number: int) -> "Chat":
        """The same with as many messages."""
        return self.of(self.messages[:number])


def check_messages(values: list[Any]) -> tuple[list[Message], set[str]]:
    """The messages in a list of them, and what of them was converted.

    Raises:
        ValueError: one is none; says which, and what is wrong with it.
    """
    converted: set[str] = set()
    return [_check(number, message, converted) for number, message in enumerate(values)], converted


def has_answer(messages: list[Message]) -> bool:
    """Whether the assistant says anything."""
    return any(message["role"] == ASSISTANT for message in messages)


def has_null_answer(messages: list[Message]) -> bool:
    """Whether an answer is null: there is nothing to learn, nor to go on from."""
    return any(message["content"] is None for message in messages)


def without_last_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last that is not the assistant's; none, if all are."""
    end = len(messages)
    while end and messages[end - 1]["role"] == ASSISTANT:
        end -= 1
    return messages[:end]


def split_reasoning(message: Message) -> tuple[str, str] | None:
    """Reasoning and answer of a content that begins with <think>…</think>; None, if it does not, or reasoning is given by itself."""
    content = message["content"]
    before, end, answer = content.partition("</think>")
    if not end or not before.lstrip().startswith("<think>") or any(k in message for k in REASONING):
        return None
    return before.lstrip().removeprefix("<think>"), answer


KINDS: dict[Any, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number with a fraction",
    str: "text",
    list: "a list",
    dict: "an object",
}


def canonical(value: Any) -> str:
    """Messages, or other JSON values, as JSON that is the same for equal ones."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    for kinds, words in KINDS.items():
        if isinstance(value, kinds):
            return words
    return type(value).__name__


def _check(number: int, message: Any, converted: set[str]) -> Message:
    where = f"holds a chat whose message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {kind_of(message)}, expected an object with role and content")  # fmt: skip
    found: Message = {key: value for key, value in message.items() if value is not None}
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        given = "no role" if role is None else f"the role {role!r}"
        raise ValueError(f"{where} has {given}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = found["content"] = _join_parts(content, where)
        converted.add(TEXT_PARTS)
    if content is None and any(found.get(key) for key in INSTEAD_OF_CONTENT):
        content = found["content"] = ""
    if content is None and role == ASSISTANT and "content" in message:
        found["content"] = None
    elif not isinstance(content, str):
        given = "no content" if content is None else f"{kind_of(content)} as its content"
        raise ValueError(f"{where} has {given}, expected text")
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds a value that JSON cannot express ({error})") from None
    return found


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts, one behind the other."""
    texts = []
    for part in parts:
        found = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if found.get("type") != "text":
            given = f"the type {found['type']!r}" if "type" in found else "no type"
            raise ValueError(f"{where} has a part of content with {given}, expected only text")
        if set(found) != {"type", "text"} or not isinstance(found["text"], str):
            raise ValueError(
                f"{where} has a part of content with {', '.join(found)}, expected type and text"
            )
        texts.append(found["text"])
    return "".join(texts)
