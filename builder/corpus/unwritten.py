"""A chat → what of it the template does not write: then the teacher would not see it, and what it says would be learned as if it had not.

In:   a chat, and a way to make its text.
Out:  nothing, or one line that names what is missing; what the recipe lets go is counted.

How:  every value of a chat gives way to a word that occurs nowhere else, and the chat is written once more. A word that then stands in the
      text is written. A value of which that is not found is changed alone; it is written if that changes the text, or if the template
      refuses it. A template may leave something out of earlier turns on purpose (reasoning): it counts as written if it is, where its
      message is the last. Of a call, the name and each argument has to be written; of a tool, its name or its description; of any other key
      of a message, and of a document, any value.

Cost: nothing for messages of role and content alone, once a role's content was seen to be written; else one rendering, and one to three for
      what that does not settle.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from builder.corpus.messages import REASONING, Chat, Message

EVERYTHING = "*"
"""Lets everything go that a template does not write."""
CALLS = ("tool_calls", "function_call")
REASONED = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)", re.DOTALL)
"""A content that holds the reasoning before an answer, and both of these."""

Render = Callable[[Chat], str]


class _Leaf(NamedTuple):
    """A value in a chat."""

    path: tuple[str | int, ...]
    part: str = ""
    """Of a content that holds both: its `reasoning`, or its `answer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """What has to be written: all of some values, or any."""

    key: str
    """What a recipe calls it that lets it go."""
    where: str
    leaves: tuple[_Leaf, ...]
    needs_all: bool = False
    message: int | None = None


class Unwritten:
    """Looks for what a template leaves out."""

    def __init__(self, text: Render, let_go: Iterable[str] = ()) -> None:
        """Prepare.

        Args:
            text: the template's text of a chat.
            let_go: keys of messages, `tools` or `documents` that may be left out, or EVERYTHING.
        """
        self._text = text
        self._let_go = frozenset(let_go)
        self._roles: set[str] = set()
        """Whose content was seen to be written."""

    def lets_go(self, key: str) -> bool:
        """Whether the recipe lets something go."""
        return bool(self._let_go & {key, EVERYTHING})

    def check(self, chat: Chat, text: str, render: Render, *, first: int = 0) -> set[str]:
        """What is left out of a chat and may be.

        Args:
            chat: what was written.
            text: how it was written.
            render: writes another chat in the same way.
            first: message from which on it is looked at.

        Raises:
            ValueError: something is left out that may not be.
        """
        items = [*self._of_messages(chat, text, first), *_of_lists(chat)]
        notes, missing = set(), []
        for item in self._not_found(items, chat, render):
            if self._decides(item, chat, text, render):
                continue
            if self._decides_last(item, chat):
                notes.add(f"{item.key} left out of earlier turns")
            elif self.lets_go(item.key):
                notes.add(f"{item.key} left out")
            else:
                missing.append(item)
        if missing:
            raise ValueError(_refusal(missing))
        return notes

    def _of_messages(self, chat: Chat, text: str, first: int) -> Iterator[_Item]:
        """What messages hold, but for contents that plainly are written."""
        for number, message in enumerate(chat.messages[first:], start=first):
            content = message["content"].strip()
            if content and not (content in text and message["role"] in self._roles):
                yield from _of_content(message["content"], number)
            for key, leaves in _of_keys(message, number):
                if leaves:
                    yield _Item(
                        key=key,
                        where=f"message {number}",
                        leaves=leaves,
                        needs_all=key in CALLS,
                        message=number,
                    )

    def _not_found(self, items: list[_Item], chat: Chat, render: Render) -> list[_Item]:
        """The items of which a text with other words does not show that they are written."""
        leaves = [leaf for item in items for leaf in item.leaves]
        if not leaves:
            return []
        others = {leaf: _other(chat, leaf, number) for number, leaf in enumerate(leaves)}
        try:
            text = render(_changed(chat, others))
        except ValueError:
            return items
        found = {leaf for leaf, other in others.items() if _word(other) in text}
        missing = []
        for item in items:
            if not (all if item.needs_all else any)(leaf in found for leaf in item.leaves):
                missing.append(item)
            elif item.key == "content" and item.message is not None:
                self._roles.add(chat.messages[item.message]["role"])
        return missing

    def _decides(self, item: _Item, chat: Chat, text: str, render: Render) -> bool:
        """Whether the text is another one with other words in an item."""
        groups = [(leaf,) for leaf in item.leaves] if item.needs_all else [item.leaves]
        for leaves in groups:
            others = {leaf: _other(chat, leaf, number) for number, leaf in enumerate(leaves)}
            with suppress(ValueError):  # it needs them, so it writes them
                if render(_changed(chat, others)) == text:
                    return False
        return True

    def _decides_last(self, item: _Item, chat: Chat) -> bool:
        if item.message is None:
            return False
        until = chat.up_to(item.message + 1)
        try:
            text = self._text(until)
        except ValueError:  # it knows no chat that ends so
            return False
        return self._decides(item, until, text, self._text)


def _refusal(missing: list[_Item]) -> str:
    keys = list(dict.fromkeys(item.key for item in missing))
    more = f" (nor {', '.join(keys[1:])})" if keys[1:] else ""
    loss = "the teacher would not see it"
    if missing[0].key in CALLS:
        loss = "an answer without them would be learned"
    return (
        f"the chat template does not write the {missing[0].key} of {missing[0].where}{more}, so {loss}; give a template that does "
        f'as sequences.chat_template = "file.jinja", or drop it: sequences.drop_unwritten = {json.dumps(keys)}'
    )


# What a chat holds


def _of_content(content: str, number: int) -> Iterator[_Item]:
    where, path = f"message {number}", ("messages", number, "content")
    parts = REASONED.fullmatch(content)
    if parts is None:
        yield _Item(key="content", where=where, leaves=(_Leaf(path),), message=number)
        return
    if parts[2]:
        leaves = (_Leaf(path, "reasoning"),)
        yield _Item(key="reasoning_content", where=f"{where} (in its content)", leaves=leaves, message=number)  # fmt: skip
    if parts[4]:
        yield _Item(key="content", where=where, leaves=(_Leaf(path, "answer"),), message=number)


def _of_keys(message: Message, number: int) -> Iterator[tuple[str, tuple[_Leaf, ...]]]:
    """Keys of a message besides role and content, and what they hold; the same reasoning under several names is one."""
    seen: list[Any] = []
    for key, value in message.items():
        path: tuple[str | int, ...] = ("messages", number)
        if key in CALLS:
            yield key, tuple(_of_calls(value, (*path, key)))
        elif key in REASONING and value not in seen:
            seen.append(value)
            same = [name for name in REASONING if message.get(name) == value]
            yield key, tuple(leaf for name in same for leaf in _leaves(value, (*path, name)))
        elif key not in ("role", "content", *REASONING):
            yield key, tuple(_leaves(value, (*path, key)))


def _of_calls(value: Any, path: tuple[str | int, ...]) -> Iterator[_Leaf]:
    """The name and the arguments of each of some calls."""
    if isinstance(value, list):
        for number, call in enumerate(value):
            yield from _of_calls(call, (*path, number))
    elif isinstance(value, dict):
        if isinstance(value.get("function"), dict):
            value, path = value["function"], (*path, "function")
        yield from _leaves(value.get("name"), (*path, "name"))
        arguments = value.get("arguments")
        is_empty = arguments is None or arguments == ""
        yield from () if is_empty else _leaves(arguments, (*path, "arguments"), with_empty=True)


def _of_lists(chat: Chat) -> Iterator[_Item]:
    """Each tool and each document."""
    for number, tool in enumerate(chat.tools or ()):
        path: tuple[str | int, ...] = ("tools", number)
        if isinstance(tool.get("function"), dict):
            tool, path = tool["function"], (*path, "function")
        named = {k: tool[k] for k in ("name", "description") if k in tool} or tool
        yield from _in_list("tools", number, named, path)
    for number, document in enumerate(chat.documents or ()):
        yield from _in_list("documents", number, document, ("documents", number))


def _in_list(key: str, number: int, value: Any, path: tuple[str | int, ...]) -> Iterator[_Item]:
    if leaves := tuple(_leaves(value, path)):
        yield _Item(key=key, where=f"the chat, number {number}", leaves=leaves)


def _leaves(
    value: Any, path: tuple[str | int, ...], *, with_empty: bool = False
) -> Iterator[_Leaf]:
    """The values in a value, but for those that say nothing: null and blanks, which an argument may be."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(item, (*path, key), with_empty=with_empty)
    elif with_empty or not (value is None or (isinstance(value, str) and not value.strip())):
        yield _Leaf(path)


# Other words


def _other(chat: Chat, leaf: _Leaf, number: int) -> Any:
    """Another value in place of one; `number` makes it the only one of its kind."""
    value: Any = {"messages": chat.messages, "tools": chat.tools, "documents": chat.documents}
    for step in leaf.path:
        value = value[step]
    word = f"q{number}x7q"
    if leaf.path[-1] == "arguments" and isinstance(value, str):
        return json.dumps({word: 1})
    if "arguments" in leaf.path or isinstance(value, str):
        return word
    return not value if isinstance(value, bool) else 71_000_017 + 1_000 * number


def _word(other: Any) -> str:
    """By what another value is found again; a truth value never is."""
    if isinstance(other, bool):
        return "\0"
    found = re.search(r"q\d+x7q", str(other))
    return found[0] if found else str(other)


def _changed(chat: Chat, others: dict[_Leaf, Any]) -> Chat:
    """The chat with other values in place of some."""

    def walk(value: Any, path: tuple[str | int, ...]) -> Any:
        if (leaf := _Leaf(path)) in others:
            return others[leaf]
        if isinstance(value, dict):
            return {key: walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, (*path, number)) for number, item in enumerate(value)]
        words = [others.get(_Leaf(path, part)) for part in ("reasoning", "answer")]
        if not any(words):
            return value
        parts = REASONED.fullmatch(value)
        assert parts is not None
        return "".join((parts[1], words[0] or parts[2], parts[3], words[1] or parts[4], parts[5]))

    return replace(
        chat,
        messages=walk(chat.messages, ("messages",)),
        tools=walk(chat.tools, ("tools",)),
        documents=walk(chat.documents, ("documents",)),
    )
