"""A chat → its text as the teacher's chat template writes it, its tokens, and which of them are the assistant's.

In:   messages, and a tokenizer with a chat template (or another template in its place).
Out:  Tokens: exactly what stands in the template's text, with a completion_mask.

Mask. A token is the completion's if any of its characters is. Which characters are the assistant's,

      - a template says that marks them, with {% generation %} … {% endgeneration %};
      - of any other, it follows from what the teacher would have been asked: the text of the messages before an answer, with the
        generation prompt, must be the beginning of the text with the answer, and that the beginning of the whole. The answer is what
        stands between, with the special token that ends it and without white space behind that. Templates that write an earlier
        answer differently once the conversation goes on, or the end of the last one, or have no generation prompt and yet a header, are refused.

Special tokens are those that the template writes; of what a message says, nothing becomes one (`special_tokens`).

Cost: one rendering with marks in the template, else three more an answer.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from builder.corpus.documents import Document
from builder.corpus.messages import ASSISTANT, Message
from builder.corpus.sequences import Tokens
from builder.corpus.special_tokens import Span, SpecialTokens, excerpt

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""In a template: what follows is the assistant's."""
ADVICE = 'give a template that marks the answers with {% generation %} as sequences.chat_template = "file.jinja"'


class ChatTemplate:
    """Turns chats into tokens."""

    def __init__(
        self, tokenizer: Any, source: str | None = None, *, is_of_prompts: bool = False
    ) -> None:
        """Prepare a tokenizer and its chat template.

        Args:
            tokenizer: a fast transformers tokenizer.
            source: a template in place of its own.
            is_of_prompts: whether chats end where the assistant is asked to speak, and the template does ask it.

        Raises:
            ValueError: there is no template, or it is not one.
        """
        self._is_of_prompts = is_of_prompts
        self.source = _own_template(tokenizer) if source is None else source
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._check_syntax()
        self._special = SpecialTokens(tokenizer, self.source, self._around_turns())

    def __call__(self, document: Document) -> Tokens:
        """The tokens of a chat.

        Raises:
            ValueError: the template refuses it, it cannot be told which tokens are the assistant's, or what is a special token; names
                the document, and says what to do.
        """
        messages = document.messages
        assert messages is not None
        try:
            if self._is_of_prompts:
                text = self._ask(messages)
                ids, offsets = self._encode(messages, text)
                return Tokens(text=text, ids=ids, offsets=offsets)
            self._check_calls(messages)
            text, answers = self._render_with_answers(messages)
            ids, offsets = self._encode(messages, text)
            mask = _overlaps(offsets, answers)
            if not any(mask):
                raise ValueError(f"the chat template marks no token as the assistant's; {ADVICE}")
        except ValueError as error:
            raise ValueError(f"document {document.id!r}: {error}") from None
        return Tokens(text=text, ids=ids, offsets=offsets, completion_mask=mask)

    @property
    def ends(self) -> list[int]:
        """The special token that the template writes behind an answer, if it writes one: where a teacher that answers has to stop."""
        user = {"role": "user", "content": "a"}
        with suppress(ValueError):  # it may ask for a system message
            texts = [self._text([user, {"role": ASSISTANT, "content": c}])[::-1] for c in "ab"]
            behind = texts[0][: _parting(*texts)][::-1]
            return self._special.first_in(behind)
        return []

    # What the template writes

    def _ask(self, messages: list[Message]) -> str:
        """The text of a chat up to where the assistant is asked to speak."""
        asked = self._text(messages, add_generation_prompt=True)
        if asked == self._text(messages):
            answered = self._text([*messages, {"role": ASSISTANT, "content": "a"}])
            if not answered.startswith(asked) or not answered[len(asked) :].lstrip().startswith(
                "a"
            ):
                raise ValueError(
                    f"the chat template has no generation prompt, and writes more before an answer, so that the teacher would not be "
                    f"asked for one; {ADVICE}"
                )
        return asked

    def _check_calls(self, messages: list[Message]) -> None:
        """Refuses calls of tools that the template leaves out: what would be learned is an answer without them."""
        for number, message in enumerate(messages):
            calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
            bare = {key: value for key, value in message.items() if key not in calls}
            with suppress(ValueError):  # it needs them, so it writes them
                if calls and self._text([*messages[:number], bare]) == self._text(
                    messages[: number + 1]
                ):
                    break
        else:
            return
        raise ValueError(
            f"the chat template does not write the {calls[0]} of message {number}, so that an answer without them would be learned; "
            f"{ADVICE}"
        )

    def _render_with_answers(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The text of a chat, and where in it the assistant's answers are."""
        if MARKS.search(self.source):
            return self._render(messages, marks=True)
        text = self._text(messages)
        answers = []
        for number, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                answers.append(self._answer(messages, number, text))
        return text, answers

    def _answer(self, messages: list[Message], number: int, text: str) -> Span:
        """Where in the text of all messages an answer stands, by the texts of the messages up to it."""
        before = self._text(messages[:number], add_generation_prompt=True)
        until = text
        if number + 1 < len(messages):
            until = self._text(messages[: number + 1])
        if not until.startswith(before):
            raise ValueError(
                f"the chat template does not write message {number} behind what it asks the assistant with "
                f"({_difference(before, until)}), so that it cannot be told which tokens are the answer; {ADVICE}"
            )
        if not text.startswith(until):
            until = until.rstrip()
        if not text.startswith(until):
            raise ValueError(
                f"the chat template writes message {number} differently when the conversation goes on "
                f"({_difference(until, text)}), so that the teacher would not have been asked like this; {ADVICE}"
            )
        start, content = len(before), messages[number]["content"].strip()
        has_prompt = before != self._text(messages[:number])
        if not has_prompt and not (content and until[start:].lstrip().startswith(content)):
            raise ValueError(
                f"the chat template has no generation prompt, and writes more before message {number} than can be told from "
                f"the answer; {ADVICE}"
            )
        if number + 1 == len(messages):
            self._check_end(messages, until[start:], start, content)
        return start, max(start, len(until.rstrip()))

    def _check_end(self, messages: list[Message], answer: str, start: int, content: str) -> None:
        """Refuses a template that writes more behind the last answer (`<|endoftext|>`) than behind any other."""
        try:
            text = self._text([*messages, {"role": "user", "content": "a"}])[start:]
        except ValueError:
            return  # it knows no further question
        shared = answer[: _parting(answer, text)]
        if content in shared and not text.startswith(answer.rstrip()):
            raise ValueError(
                f"the chat template ends the last answer differently when the conversation goes on ({_difference(answer, text)}), so "
                f"that it cannot be told what ends an answer; {ADVICE}"
            )

    def _text(self, messages: list[Message], **options: bool) -> str:
        return self._render(messages, **options)[0]

    def _render(
        self, messages: list[Message], *, marks: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                # No function, so that calling it fails: the bytes of a dataset must not depend on the day.
                **{**self._variables, "strftime_now": "today's date"},
            )
        except Exception as error:  # whatever a template does
            if "strftime_now" in self.source and isinstance(error, TypeError):
                raise ValueError(
                    "the chat template writes today's date, so that a build would not end as it began; give a template with a "
                    'fixed date as sequences.chat_template = "file.jinja"'
                ) from None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"the chat template refuses it ({reason}); mend the corpus, or give another template as "
                'sequences.chat_template = "file.jinja"'
            ) from None
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    def _check_syntax(self) -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render_jinja_template(conversations=[], chat_template=self.source)
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid ({error})") from None

    def _encode(self, messages: list[Message], text: str) -> tuple[list[int], list[Span]]:
        render = partial(self._text, add_generation_prompt=self._is_of_prompts)
        return self._special.encode(messages, text, render)

    def _around_turns(self) -> Iterable[str]:
        """What the template writes around the turns of some chats: up to where it asks for an answer, and behind an answer.

        Not what it writes before an answer without having asked (`<think>`), which messages hold themselves.
        """
        system, user = ({"role": role, "content": "a"} for role in ("system", "user"))
        answer = {"role": ASSISTANT, "content": "0123456789"}
        for messages in (
            *([user], [system, user], [user, answer], [system, user, answer]),
            [user, answer, user],
        ):
            try:
                text = self._text(messages, add_generation_prompt=messages[-1] is user)
            except ValueError:
                continue  # it knows no such chat
            yield text.rpartition(answer["content"])[2]


def _own_template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise ValueError(
            'the teacher\'s tokenizer has no chat template; give one as sequences.chat_template = "file.jinja"'
        ) from None


def _overlaps(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens have a character in any of the spans, which are in order."""
    mask, current = [], 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        mask.append(current < len(spans) and end > spans[current][0])
    return mask


def _difference(wanted: str, found: str) -> str:
    """Two texts from where they part."""
    place = _parting(wanted, found)
    return f"{excerpt(wanted[place:])} and {excerpt(found[place:])} behind {wanted[max(0, place - 20) : place]!r}"


def _parting(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
