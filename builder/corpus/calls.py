"""Calls of tools → the same with their arguments as the template takes them: an object, or JSON text.

In:   a chat, whose arguments are what the corpus holds: an object as transformers documents it, or text as OpenAI has it.
Out:  as they are, unless the template cannot: it writes text of text (`tojson`, where the model has seen an object), or fails.

Cost: nothing without calls; two renderings for the first chat that has some, then none: templates do not change their minds.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from builder.corpus.messages import Chat, Message

AS_OBJECTS = "arguments of calls as objects"
AS_TEXT = "arguments of calls as JSON text"
PROBE = '{"q7xq": 1}'

Change = Callable[[Any], Any]


class Arguments:
    """Brings the arguments of calls into the form that a template takes."""

    def __init__(self, text: Callable[[Chat], str]) -> None:
        """Prepare; `text` makes the template's text of a chat."""
        self._text = text
        self._takes_text: bool | None = None
        self._takes_objects: bool | None = None

    def fit(self, chat: Chat) -> tuple[Chat, set[str]]:
        """A chat whose calls the template can write, and whether that is another form than the corpus's."""
        given = {type(arguments) for arguments in _arguments(chat)}
        if str in given:
            if self._takes_text is None:
                self._takes_text = self._probe(chat, lambda a: PROBE if isinstance(a, str) else a, _parsed)  # fmt: skip
            if self._takes_text is False:
                parsed = _with_arguments(chat, _parsed)
                return parsed, {AS_OBJECTS} if parsed != chat else set()
        if dict in given:
            if self._takes_objects is None:
                self._takes_objects = self._probe(chat, lambda a: a, _written)
            if self._takes_objects is False:
                return _with_arguments(chat, _written), {AS_TEXT}
        return chat, set()

    def _probe(self, chat: Chat, as_is: Change, otherwise: Change) -> bool | None:
        """Whether a form is right as it is, or the other one is; None if the template refuses the chat in both."""
        with suppress(ValueError):
            probed = _with_arguments(chat, as_is)
            text = self._text(probed)
            if PROBE not in list(_arguments(probed)):
                return True
            return PROBE in text
        with suppress(ValueError):
            self._text(_with_arguments(chat, otherwise))
            return False
        return None


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return [*(calls if isinstance(calls, list) else ()), message.get("function_call")]


def _arguments(chat: Chat) -> list[Any]:
    """The arguments of all calls."""
    found: list[Any] = []

    def note(arguments: Any) -> Any:
        found.append(arguments)
        return arguments

    _with_arguments(chat, note)
    return found


def _with_arguments(chat: Chat, change: Change) -> Chat:
    return chat.of([_message(message, change) for message in chat.messages])


def _message(message: Message, change: Change) -> Message:
    if not any(_calls(message)):
        return message
    found = dict(message)
    if isinstance(message.get("tool_calls"), list):
        found["tool_calls"] = [_call(call, change) for call in message["tool_calls"]]
    if "function_call" in message:
        found["function_call"] = _call(message["function_call"], change)
    return found


def _call(call: Any, change: Change) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _parsed(arguments: Any) -> Any:
    """Text as the object that it says, if it says one."""
    if isinstance(arguments, str):
        with suppress(ValueError):
            found = json.loads(arguments)
            if isinstance(found, dict):
                return found
    return arguments


def _written(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
