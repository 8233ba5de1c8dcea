"""A chat and the source of a chat template → the template's text.

In:   a Chat; the template is a stranger's, as is the teacher that brings it.
Out:  text, and where in it the template marks what the assistant says.

How:  transformers' own environment for templates, in a sandbox, with two changes. `strftime_now` gives the recipe's date, or fails without
      one: the bytes of a dataset must not depend on the day. And what a template makes is bounded: its text by the size of the chat, values
      and loops within it by the numbers below. Without that, thirty characters of a template fill any memory. (How long it takes is not
      bounded.)

Cost: 0.1 to 1 ms a rendering, by the size of template and chat.
"""

import datetime
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import meta

from builder.corpus.messages import Chat

Span = tuple[int, int]

OWN_CHARACTERS = 1_000_000
"""Characters that a template may write of its own."""
TIMES_CHAT = 20
"""How often it may write what a chat holds."""
MAX_CHARACTERS = 2**25
"""Of a string in the middle of a template, and of all that `*` repeats; chats come nowhere near it."""
MAX_ITEMS = 2**22
"""Of a list there."""
MAX_STEPS = 2**20
"""Of all that `range` yields."""
MAX_BITS = 10_000
"""Of a power."""

RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
)
"""Variables of templates that are not an option's to set."""

PROBE = "q7xq"
"""A word that occurs nowhere."""

_SPENT: ContextVar[Counter[str]] = ContextVar("spent")
"""In the current rendering."""


class TooLarge(ValueError):
    """A template makes too much."""


class _NoDate(ValueError):
    """A template that asks for the day."""


class Renderer:
    """A chat template, ready to write."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """Prepare a template.

        Args:
            source: of the template, in Jinja.
            variables: the tokenizer's special tokens by their names.
            options: other variables for all chats.
            date: what the template takes for today.

        Raises:
            ValueError: it is not a template, or does not know an option.
        """
        self.source = source
        self.has_marks = False
        """Whether the template marks what is the assistant's, with {% generation %}."""
        self._variables = {**variables, **(options or {}), "strftime_now": _clock(date)}
        environment = _environment()
        try:
            parsed = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, TooLarge, RecursionError) as error:
            raise ValueError(f"the chat template is not valid ({_reason(error)})") from None
        _bound_concatenation(self._template)
        self.has_marks = any(
            isinstance(call.call, jinja2.nodes.Call)
            and isinstance(call.call.node, jinja2.nodes.ExtensionAttribute)
            and call.call.node.name == "_generation_support"
            for call in parsed.find_all(jinja2.nodes.CallBlock)
        )
        self.known = frozenset(meta.find_undeclared_variables(parsed))
        """Names of variables that the template asks for."""
        for name in options or {}:
            if name in RESERVED:
                raise ValueError(
                    f"sequences.chat_template_kwargs sets {name!r}, which a recipe must not set; leave it out"
                )
            if name not in self.known:
                raise ValueError(
                    f"sequences.chat_template_kwargs sets {name!r}, which the chat template does not use; it uses"
                    f" {', '.join(sorted(self.known - RESERVED)) or 'nothing'}"
                )
        self._takes_parts = self._probe_parts()

    def text(self, chat: Chat, *, add_generation_prompt: bool = False) -> str:
        """The template's text of a chat.

        Raises:
            ValueError: the template refuses the chat, fails, asks for a date that is not given, or (TooLarge) makes too much.
        """
        return self._render(chat, add_generation_prompt)[0]

    def text_and_marks(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text of a chat, and what of it the template marks as the assistant's.

        Raises:
            ValueError: as `text`.
        """
        return self._render(chat, False)

    def _render(self, chat: Chat, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        pieces: list[str] = []
        spans: list[Span] = []
        room = OWN_CHARACTERS + TIMES_CHAT * _size(
            [chat.messages, chat.tools, chat.documents, chat.options]
        )
        environment: Any = self._template.environment
        _SPENT.set(Counter())
        try:
            with environment.activate_tracker(pieces, spans):
                for piece in self._template.generate(
                    messages=self._messages(chat),
                    tools=chat.tools,
                    documents=chat.documents,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._variables, **chat.options},
                ):
                    room -= len(piece)
                    if room < 0:
                        raise TooLarge
                    pieces.append(piece)
        except Exception as error:  # whatever a template does
            kind = TooLarge if isinstance(error, TooLarge | MemoryError) else ValueError
            failure = kind(_explain(error))
        else:
            return "".join(pieces), spans
        if isinstance(failure, TooLarge):
            gc.collect()  # the error held all that the template had made, in a circle
        raise failure

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        """The messages as transformers hands them to a template: reasoning under each of its names."""
        from transformers.utils import chat_template_utils

        messages = [dict(message) for message in chat.messages]
        if self._takes_parts:
            for message in messages:
                if isinstance(message["content"], str):
                    message["content"] = _parts(message["content"])
        aliased: list[dict[str, Any]] = chat_template_utils._alias_reasoning_fields(messages)
        return aliased

    def _probe_parts(self) -> bool:
        """Whether the template takes a content as a list of parts only, as those of some vision models do."""
        self._takes_parts = False
        found = []
        for takes_parts in (False, True):
            self._takes_parts = takes_parts
            try:
                text = self.text(Chat(messages=[{"role": "user", "content": PROBE}]))
            except TooLarge:
                raise
            except ValueError:
                text = ""
            found.append(PROBE in text)
        return found == [False, True]


@functools.cache
def _environment() -> Any:
    """What transformers compiles templates in, with bounds on what these can make."""
    from transformers.utils import chat_template_utils

    environment = chat_template_utils._compile_jinja_template("").environment.overlay()
    environment.intercepted_binops = frozenset(("*", "+", "%", "**"))
    environment.binop_table = {
        name: _bounded(function, _CHECKS.get(name))
        for name, function in environment.binop_table.items()
    }
    environment.filters = {
        name: _bounded(function, _CHECKS.get(name))
        for name, function in environment.filters.items()
    }
    environment.globals = {**environment.globals, "range": _Range}
    environment.concat = _joined
    call = environment.call

    def bounded_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):
            _check_width(*args, **kwargs)
        return _small(call(context, function, *args, **kwargs))

    environment.call = bounded_call
    return environment


def _bounded(
    function: Callable[..., Any], check: Callable[..., None] | None = None
) -> Callable[..., Any]:
    @functools.wraps(function)  # it keeps what Jinja notes on a filter
    def call(*args: Any, **kwargs: Any) -> Any:
        if check is not None:
            check(*args, **kwargs)
        return _small(function(*args, **kwargs))

    return call


def _bound_concatenation(template: Any) -> None:
    """Bounds what `~` makes, which Jinja compiles to a call of this."""
    names = template.root_render_func.__globals__
    names["str_join"] = names["markup_join"] = lambda parts: _joined(list(map(str, parts)))


def _joined(parts: Iterable[str]) -> str:
    found = list(parts)
    _check_size(str, sum(map(len, found)))
    return "".join(found)


class _Range:
    """What templates call `range`."""

    def __init__(self, *args: int) -> None:
        self._range = range(*args)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, place: Any) -> Any:
        return self._range[place]

    def __iter__(self) -> Iterator[int]:
        for number in self._range:
            _spend("yielded", 1, MAX_STEPS)
            yield number


def _spend(what: str, amount: int, most: int) -> None:
    spent = _SPENT.get()
    spent[what] += amount
    if spent[what] > most:
        raise TooLarge


def _small(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check_size(type(value), len(value))
    return value


def _check_size(kind: type, size: int) -> None:
    if size > (MAX_CHARACTERS if issubclass(kind, str) else MAX_ITEMS):
        raise TooLarge


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_size(type(left), len(left) + len(right))


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            _check_size(type(one), len(one) * other)
            _spend("repeated", len(one) * max(other, 0), MAX_CHARACTERS)


def _check_power(left: Any, right: Any) -> None:
    are_whole = isinstance(left, int) and isinstance(right, int)
    if are_whole and left.bit_length() * right > MAX_BITS:
        raise TooLarge


def _check_width(*args: Any, **kwargs: Any) -> None:
    if any(isinstance(a, int) and a > MAX_CHARACTERS for a in (*args, *kwargs.values())):
        raise TooLarge


_CHECKS: dict[str, Callable[..., None]] = {
    "*": _check_product,
    "+": _check_sum,
    "**": _check_power,
    "center": _check_width,
    "indent": _check_width,
}
"""Before an operator or filter makes something."""


def _explain(error: Exception) -> str:
    """The line for whatever a template ends with."""
    if isinstance(error, _NoDate):
        return (
            "the chat template writes today's date, so the dataset would change from day to day; set "
            'sequences.chat_template_date = "2026-01-31", or give a template with a fixed date as sequences.chat_template'
        )
    if isinstance(error, TooLarge | MemoryError):
        return (
            f"the chat template makes more than {TIMES_CHAT} times what the chat holds plus {OWN_CHARACTERS:,} characters; give another"
            ' template as sequences.chat_template = "file.jinja"'
        )
    return (
        f"the chat template refuses it ({_reason(error)}); fix the corpus, or give another template as "
        'sequences.chat_template = "file.jinja"'
    )


def _clock(date: datetime.date | None) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        if date is None:
            raise _NoDate
        return datetime.datetime.combine(date, datetime.time()).strftime(format)

    return strftime_now


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if content else []


def _size(value: Any) -> int:
    """Characters of all strings, and one for every other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(key) + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 1


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
