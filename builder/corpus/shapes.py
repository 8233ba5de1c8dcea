"""The shapes in which people keep chats → lists of messages, tools, documents and options of a template.

In:   a column's value: a list of messages, such a list as JSON text or as an object of lists, or ShareGPT's `from` and `value`.
Out:  plain JSON values, checked, and the names of the conversions that it took, for the manifest.

Nulls. JSON text says which values are null, so there they stay (but for keys of a message, which transformers drops). Arrow gives every
       object of a column the keys of all, with null for those that it does not have. The two cannot be told apart, so of such objects nulls
       are left out, which is what TRL does, and it is counted. A column of the type `Json` of `datasets`, or of JSON text, keeps them.
"""

import json
from typing import Any

from builder.corpus.messages import ASSISTANT, Message, check_messages, kind_of

SHAREGPT = "ShareGPT"
JSON_TEXT = "JSON text"
OBJECT_OF_LISTS = "object of lists"
NULLS = "nulls of Arrow left out"
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose value is a call, or several, as JSON text."""
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", *CALLS), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}

Converted = tuple[Any, set[str]]
"""A value, and the names of the conversions that made it."""


def read_messages(value: Any, *, arrow: Any = False) -> tuple[list[Message], set[str]]:
    """The messages in a column's value, none if it is null or empty; and what was converted.

    Args:
        value: of the column.
        arrow: False where nulls are the corpus's own; else the column's feature in `datasets`, or True where it is not known.

    Raises:
        ValueError: it is no list of messages; says what is wrong with which of them.
    """
    if value is None:
        return [], set()
    given, converted = value, set[str]()
    if isinstance(value, str):
        value, arrow, converted = _parse(value), False, {JSON_TEXT}
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value, more = _transpose(value), {OBJECT_OF_LISTS}
        converted |= more
    if not isinstance(value, list):
        raise ValueError(
            f"holds {kind_of(given)}, expected a list of messages with role and content"
        )
    if arrow is not False:
        value, more = _without_nulls_below(value, arrow)
        converted |= more
    if any(map(_is_sharegpt, value)):
        value = [_from_sharegpt(number, message) for number, message in enumerate(value)]
        converted.add(SHAREGPT)
    messages, more = check_messages(value)
    return messages, converted | more


def read_objects(value: Any, what: str, *, arrow: Any = False) -> tuple[list[Any] | None, set[str]]:
    """Tools, or documents: a list of objects, or such a list as JSON text; None if it is null or empty.

    Raises:
        ValueError: it is something else.
    """
    value, converted = _plain(value, arrow)
    if value is None or value == []:
        return None, set()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"holds {_name(value)}, expected a list of {what}, each an object")
    return value, converted


def read_options(value: Any, *, arrow: Any = False) -> tuple[dict[str, Any], set[str]]:
    """Variables of a chat template: an object, or one as JSON text.

    Raises:
        ValueError: it is something else.
    """
    value, converted = _plain(value, arrow)
    if value is None:
        return {}, set()
    if not isinstance(value, dict):
        raise ValueError(f"holds {_name(value)}, expected an object with variables of the template")
    return value, converted


def looks_like_messages(value: Any) -> bool:
    """Whether a column's value can be a chat; that it is a right one is not said."""
    if isinstance(value, str):
        value = _parse(value) if value.lstrip()[:1] in ("[", "{") else None
    if isinstance(value, dict):
        keys = set(value)
        is_of_lists = bool(value) and all(isinstance(item, list) for item in value.values())
        return is_of_lists and ({"role", "content"} <= keys or {"from", "value"} <= keys)
    return isinstance(value, list) and any(
        isinstance(item, dict) and ("role" in item or _is_sharegpt(item)) for item in value
    )


def _plain(value: Any, arrow: Any) -> Converted:
    if isinstance(value, str):
        if not value.strip():
            return None, set()
        return _parse(value), {JSON_TEXT}
    return without_nulls(value, arrow) if arrow is not False else (value, set())


def _parse(text: str) -> Any:
    """What a text says as JSON; the text itself, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _transpose(value: dict[str, list[Any]]) -> list[Any]:
    lengths = {key: len(column) for key, column in value.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} of {key}" for key, count in lengths.items())
        raise ValueError(f"holds an object of lists that have different lengths ({found})")
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def without_nulls(value: Any, feature: Any = True) -> Converted:
    """A value of Arrow without the nulls in its objects; those of the type `Json` are the corpus's own.

    Args:
        value: anything that JSON has.
        feature: its type in `datasets`, or True where it is not known.
    """
    found = set[str]()
    kept = _walk(value, feature, found)
    return kept, found


def _walk(value: Any, feature: Any, found: set[str]) -> Any:
    if type(feature).__name__ == "Json":
        return value
    if isinstance(value, dict):
        if None in value.values():
            found.add(NULLS)
        return {k: _walk(v, _inner(feature, k), found) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_walk(item, _inner(feature, 0), found) for item in value]
    return value


def _inner(feature: Any, key: str | int) -> Any:
    if isinstance(feature, dict):
        return feature.get(key, True)
    if isinstance(feature, list):
        return feature[0] if feature else True
    return getattr(feature, "feature", True)


def _without_nulls_below(messages: list[Any], feature: Any) -> Converted:
    """As `without_nulls`, but keys of messages keep theirs, and a part of content is no reason to say so."""
    kept, found = [], set[str]()
    for message in messages:
        if not isinstance(message, dict):
            kept.append(message)
            continue
        inner = _inner(feature, 0)
        if isinstance(feature, dict):  # an object of lists
            inner = {key: _inner(item, 0) for key, item in feature.items()}
        new = {}
        for key, item in message.items():
            new[key], more = without_nulls(item, _inner(inner, key))
            found |= more if key != "content" else set()
        kept.append(new)
    return kept, found


def _is_sharegpt(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("from") is not None
        and "value" in message
        and message.get("role") is None
    )


def _from_sharegpt(number: int, message: Any) -> Any:
    if not _is_sharegpt(message):
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value", "role")}
    speaker, said = message["from"], message["value"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise ValueError(
            f"holds a chat whose message {number} is from {speaker!r}, expected one of {', '.join(SHAREGPT_ROLES)}"
        )
    if speaker not in CALLS or said is None:
        return {"role": SHAREGPT_ROLES[speaker], "content": said, **_without(rest, "content")}
    calls = _parse(said) if isinstance(said, str) else said
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ValueError(
            f"holds a chat whose message {number} is a {speaker} without a name, expected JSON text with name and arguments"
        )
    tool_calls = [{"type": "function", "function": call} for call in calls]
    return {"role": ASSISTANT, "content": "", "tool_calls": tool_calls, **_without(rest, "content")}


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _name(value: Any) -> str:
    return "text that is not JSON" if isinstance(value, str) else kind_of(value)
