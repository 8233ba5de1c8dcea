"""A chat and the source of a chat template → the template's text.

In:   a Chat; the template is a stranger's, as is the teacher that brings it.
Out:  text, and where in it the template marks what the assistant says.

How:  transformers' own environment for templates, in a sandbox, with two changes. `strftime_now` gives the recipe's date, or fails without
      one: the bytes of a dataset must not depend on the day. And what a template makes is bounded: its text by the size of the chat, a value
      within it by MAX_VALUE. Without that, thirty characters of a template fill any memory.

Cost: 0.1 to 1 ms a rendering, by the size of template and chat.
"""

import datetime
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import meta

from builder.corpus.messages import Chat

Span = tuple[int, int]

OWN_CHARACTERS = 1_000_000
"""Characters that a template may write of its own."""
TIMES_CHAT = 20
"""How often it may write what a chat holds."""
MAX_VALUE = 2**26
"""Characters of a string, or items of a list, in the middle of a template; no chat that fits a memory comes near it."""
MAX_POWER_BITS = 10_000

RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
)
"""Variables of templates that are not an option's to set."""

PROBE = "q7xq"


class _TooLarge(ValueError):
    """A template that makes too much."""


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
        except (jinja2.TemplateError, _TooLarge, RecursionError) as error:
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
                    f"sequences.chat_template_kwargs sets {name!r}, which is not a recipe's to set; leave it out"
                )
            if name not in self.known:
                raise ValueError(
                    f"sequences.chat_template_kwargs sets {name!r}, which the chat template does not ask for; "
                    f"it asks for {', '.join(sorted(self.known - RESERVED)) or 'nothing'}"
                )
        self._takes_parts = self._probe_parts()

    def text(self, chat: Chat, *, add_generation_prompt: bool = False) -> str:
        """The template's text of a chat.

        Raises:
            ValueError: the template refuses the chat, fails, asks for a date that is not given, or makes too much.
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
                        raise _TooLarge
                    pieces.append(piece)
        except _NoDate:
            raise ValueError(
                "the chat template writes today's date, so that a build would not end as it began; set "
                'sequences.chat_template_date = "2026-01-31", or give a template with a fixed date as sequences.chat_template'
            ) from None
        except _TooLarge:
            raise ValueError(
                f"the chat template makes more than {TIMES_CHAT} times what the chat holds, and {OWN_CHARACTERS:,} characters more; "
                'give another template as sequences.chat_template = "file.jinja"'
            ) from None
        except Exception as error:  # whatever a template does
            raise ValueError(
                f"the chat template refuses it ({_reason(error)}); mend the corpus, or give another template as "
                'sequences.chat_template = "file.jinja"'
            ) from None
        return "".join(pieces), spans

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
            except ValueError:
                text = ""
            found.append(PROBE in text)
        return found == [False, True]


@functools.cache
def _environment() -> Any:
    """What transformers compiles templates in, with bounds on what these can make."""
    from transformers.utils import chat_template_utils

    environment = chat_template_utils._compile_jinja_template("").environment.overlay()
    operators = dict(environment.binop_table)
    environment.intercepted_binops = frozenset(("*", "+", "%", "**"))
    environment.binop_table = {
        **operators,
        "*": _bounded(operators["*"], _check_product),
        "**": _bounded(operators["**"], _check_power),
        "+": _bounded(operators["+"]),
        "%": _bounded(operators["%"]),
    }
    call = environment.call

    def bounded_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str):
            _check_width(*args, **kwargs)
        return _small(call(context, function, *args, **kwargs))

    environment.call = bounded_call
    environment.filters = {
        name: _bounded(f, _check_width if name in ("center", "indent") else None)
        for name, f in environment.filters.items()
    }
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
    for name in ("str_join", "markup_join"):
        join = names[name]
        names[name] = lambda parts, join=join: _small(join(_counted(parts)))


def _counted(parts: Iterable[Any]) -> list[Any]:
    found = list(parts)
    if sum(len(part) for part in found if isinstance(part, str)) > MAX_VALUE:
        raise _TooLarge
    return found


def _small(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_VALUE:
        raise _TooLarge
    return value


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        is_sized = isinstance(one, str | list | tuple) and isinstance(other, int)
        if is_sized and len(one) * other > MAX_VALUE:
            raise _TooLarge


def _check_power(left: Any, right: Any) -> None:
    are_whole = isinstance(left, int) and isinstance(right, int)
    if are_whole and left.bit_length() * right > MAX_POWER_BITS:
        raise _TooLarge


def _check_width(*args: Any, **kwargs: Any) -> None:
    if any(isinstance(a, int) and a > MAX_VALUE for a in (*args, *kwargs.values())):
        raise _TooLarge


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
