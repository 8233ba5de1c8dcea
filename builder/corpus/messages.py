"""A value of a corpus → the messages of a chat, checked.

In:   what a column holds: a list of {role, content}, and whatever else the teacher's chat template may know (tool calls, reasoning).
Out:  plain JSON values. Keys without a value are left out, for Parquet gives every message the keys of all.
"""

import json
from typing import Any

Message = dict[str, Any]

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")
"""Others are refused: a template may write a role into a special token, so that it must not be free text."""


def read_messages(value: Any) -> list[Message]:
    """The messages in a column's value; none, if it is null or empty.

    Raises:
        ValueError: it is no list of messages; says what is wrong with which of them.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(
            f"holds {type(value).__name__}, expected a list of messages with role and content"
        )
    return [_read(number, message) for number, message in enumerate(value)]


def has_answer(messages: list[Message]) -> bool:
    """Whether the assistant says anything."""
    return any(message["role"] == ASSISTANT for message in messages)


def without_last_answer(messages: list[Message]) -> list[Message]:
    """The messages up to the last that is not the assistant's; none, if all are."""
    end = len(messages)
    while end and messages[end - 1]["role"] == ASSISTANT:
        end -= 1
    return messages[:end]


def canonical(messages: list[Message]) -> str:
    """The messages as JSON that is the same for equal ones."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _read(number: int, message: Any) -> Message:
    where = f"holds a chat whose message {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {type(message).__name__}, expected an object with role and content")  # fmt: skip
    found: Message = _without_nulls(message)
    role, content = found.get("role"), found.get("content")
    if role not in ROLES:
        given = "no role" if role is None else f"the role {role!r}"
        raise ValueError(f"{where} has {given}, expected one of {', '.join(ROLES)}")
    if content is None and (found.get("tool_calls") or found.get("function_call")):
        content = found["content"] = ""
    if not isinstance(content, str):
        given = "no content" if content is None else f"{type(content).__name__} as its content"
        raise ValueError(f"{where} has {given}, expected text")
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds what is not JSON ({error})") from None
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
