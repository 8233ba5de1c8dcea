"""A row of a corpus → what it says: a text, a prompt and its completion, or a chat with its tools.

In:   a row, and the names of the columns that count.
Out:  Said, or nothing, where a row is null, empty or blank, or a chat without an answer.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from builder.corpus.messages import (
    Message,
    canonical,
    has_answer,
    has_null_answer,
    kind_of,
    without_last_answer,
)
from builder.corpus.shapes import read_messages, read_objects, read_options

Features = dict[str, Any] | Literal[False] | None
"""Types of the columns where the corpus is Arrow's, None if these are not known; False where it is JSON."""
OptionalColumn = str | Literal[False] | None
"""A column's name; False where one of the usual name is none; None where there is to be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What the columns of a corpus mean."""

    text: str = "text"
    messages: str | None = None
    """In place of a text."""
    prompt: str | None = None
    """What comes before the text, or the messages, which are then a completion."""
    tools: OptionalColumn = None
    documents: OptionalColumn = None
    options: OptionalColumn = None
    id: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that every row has."""
        found = (self.prompt, self.messages or self.text, self.id)
        return tuple(dict.fromkeys(name for name in found if name))

    @property
    def all(self) -> tuple[str, ...]:
        """Columns that are looked at."""
        return (*self.needed, *(name for name in self.for_templates.values() if name))

    @property
    def for_templates(self) -> dict[str, OptionalColumn]:
        """Those that a chat template is given, by the key of the recipe that names them."""
        return {
            "tools_column": self.tools,
            "documents_column": self.documents,
            "chat_template_kwargs_column": self.options,
        }


USUAL_NAMES = {
    "tools_column": "tools",
    "documents_column": "documents",
    "chat_template_kwargs_column": "chat_template_kwargs",
}
"""What such columns are called by those who use transformers and TRL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a row says."""

    content: str
    """By which it is known: its text, or all of a chat as JSON."""
    text: str = ""
    prompt_length: int | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    learn_from: int = 0
    notes: tuple[str, ...] = ()


class NotRead(ValueError):
    """A value that is not what its column should hold."""

    def __init__(self, column: str, what: str, advice: str) -> None:
        super().__init__(f"column {column!r} {what}; {advice}")


def read_row(
    row: dict[str, Any],
    columns: Columns,
    *,
    are_prompts: bool = False,
    features: Features = False,
) -> Said | None:
    """What a row says; None if there is nothing to learn from it, or to be answered.

    Args:
        row: of the corpus.
        columns: what its columns mean.
        are_prompts: end a chat where the assistant is to speak next.
        features: of the corpus.

    Raises:
        NotRead: a column holds something else.
    """
    if columns.messages is None:
        return _text(row, columns)
    return _Reader(row, columns, features).chat(are_prompts)


def _text(row: dict[str, Any], columns: Columns) -> Said | None:
    parts: list[str | None] = []
    for name in (columns.prompt, columns.text):
        value = row.get(name) if name else ""
        if value is not None and not isinstance(value, str):
            raise NotRead(
                str(name),
                f"holds {kind_of(value)}, expected text",
                "set corpus.text_column to a column of strings, or corpus.messages_column to one of chats",
            )
        parts.append(value)
    prompt, text = parts
    if prompt is None or text is None or not text.strip():
        return None
    if columns.prompt is None:
        return Said(content=text, text=text)
    return Said(content=canonical(parts), text=prompt + text, prompt_length=len(prompt))


class _Reader:
    """Reads the columns of a chat."""

    def __init__(
        self,
        row: dict[str, Any],
        columns: Columns,
        features: Features,
    ) -> None:
        self._row = row
        self._columns = columns
        self._features = features
        self._notes: dict[str, None] = {}

    def chat(self, are_prompts: bool) -> Said | None:
        columns = self._columns
        assert columns.messages is not None
        before = self._messages(columns.prompt) if columns.prompt else []
        messages = self._messages(columns.messages)
        if are_prompts:
            messages = without_last_answer(messages)
        if not messages or (columns.prompt and not before) or has_null_answer([*before, *messages]):
            return None
        if not are_prompts and not has_answer(messages):
            return None
        extras: dict[str, Any] = {
            "tools": self._value(columns.tools, read_objects, "tools"),
            "documents": self._value(columns.documents, read_objects, "documents"),
            "options": self._value(columns.options, read_options) or {},
        }
        for key, name in columns.for_templates.items():
            usual = USUAL_NAMES[key]
            if name is None and self._row.get(usual) not in (None, [], {}, ""):
                raise NotRead(
                    usual,
                    "is for the chat template, and the recipe does not name it",
                    f'set corpus.{key} = "{usual}", or to false if the teacher should not see it',
                )
        given = {key: value for key, value in extras.items() if value}
        said: Any = [*before, *messages]
        if given or before:
            said = [said, given, len(before)]
        return Said(
            content=canonical(said),
            messages=[*before, *messages],
            learn_from=len(before),
            notes=tuple(self._notes),
            **extras,
        )

    def _messages(self, name: str) -> list[Message]:
        value: list[Message] = self._value(
            name, read_messages, advice="fix the corpus, or set corpus.messages_column to another column"
        )  # fmt: skip
        return value

    def _value(
        self, name: OptionalColumn, read: Any, *more: Any, advice: str = "fix the corpus"
    ) -> Any:
        if not name:
            return None
        arrow = self._features
        if self._features is not False:
            arrow = (self._features or {}).get(name, True)
        try:
            value, converted = read(self._row.get(name), *more, arrow=arrow)
        except ValueError as error:
            raise NotRead(name, str(error), advice) from None
        self._notes |= dict.fromkeys(sorted(converted))
        return value
