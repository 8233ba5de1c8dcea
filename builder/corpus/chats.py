"""A chat → its text as the teacher's chat template writes it, its tokens, and which of them are the assistant's.

In:   a document that is a chat, and a tokenizer with a chat template (or another template in its place).
Out:  Tokens: exactly what stands in the template's text, with a completion_mask.

How:  `answers` finds the assistant's characters; a token is the completion's if any of its characters is. `special_tokens` makes the tokens:
      special ones are those that the template writes, and of what a message says, nothing becomes one. `unwritten` refuses what the template
      leaves out of a chat, `calls` brings arguments into the form that it takes.
      All answers of a chat are learned from one text, or each from the conversation up to it (`turns`): some templates write an answer
      otherwise as soon as the conversation goes on, and the teacher has to be asked as it is in use.

Cost: renderings of the template, a tenth of a millisecond to one each: see there.
"""

import datetime
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from builder.corpus.answers import ADVICE, USER, Answers, Written
from builder.corpus.calls import Arguments
from builder.corpus.documents import Document
from builder.corpus.encoder import Tokens
from builder.corpus.messages import ASSISTANT, REASONING, Chat, split_reasoning
from builder.corpus.rendering import RESERVED, Renderer, Span, TooLarge
from builder.corpus.special_tokens import SpecialTokens
from builder.corpus.unwritten import Unwritten


class ChatTemplate:
    """Turns chats into tokens."""

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        *,
        is_of_prompts: bool = False,
        learn: Literal["all", "last"] = "all",
        options: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        let_go: Iterable[str] = (),
    ) -> None:
        """Prepare a tokenizer and its chat template.

        Args:
            tokenizer: a fast transformers tokenizer.
            source: a template in place of its own.
            is_of_prompts: whether chats end where the assistant is asked to speak, and the template does ask it.
            learn: all answers of a chat from one text, or each as the last of its conversation.
            options: variables of the template, for all chats.
            date: what the template takes for today.
            let_go: what of a chat the template may leave out (`Unwritten`).

        Raises:
            ValueError: there is no template, it is not one, or it does not know an option.
        """
        self.source = _own_template(tokenizer) if source is None else source
        self._is_of_prompts = is_of_prompts
        self._learns_last = learn == "last"
        self._renderer = Renderer(
            self.source, tokenizer.special_tokens_map, options=options, date=date
        )
        self._special = SpecialTokens(tokenizer, self.source, self._around_turns())
        self._answers = Answers(self._renderer, self._special)
        self._unwritten = Unwritten(self._renderer.text, let_go)
        self._arguments = Arguments(self._renderer.text)
        self._of_tools: ChatTemplate | None = None
        """Of chats with tools, where the tokenizer has a template for these."""
        own = getattr(tokenizer, "chat_template", None)
        if source is None and isinstance(own, dict) and "tool_use" in own:
            self._of_tools = ChatTemplate(
                tokenizer,
                own["tool_use"],
                is_of_prompts=is_of_prompts,
                learn=learn,
                options=options,
                date=date,
                let_go=let_go,
            )

    def turns(self, document: Document) -> list[Document]:
        """The documents of which rows are made: a chat itself, or one for each of its answers, which end with it."""
        messages = document.messages
        if not self._learns_last or messages is None:
            return [document]
        numbers = [n for n, m in enumerate(messages) if m["role"] == ASSISTANT]
        starts = [0, *(number + 1 for number in numbers)]
        learned = [
            (n, s) for n, s in zip(numbers, starts, strict=False) if n >= document.learn_from
        ]
        first = [0] + [start for _, start in learned[1:]]
        return [
            replace(
                document,
                id=f"{document.id}/{index}",
                messages=messages[: number + 1],
                learn_from=number,
                checked=checked,
            )
            for index, ((number, _), checked) in enumerate(zip(learned, first, strict=True))
        ]

    def __call__(self, document: Document) -> Tokens:
        """The tokens of a chat.

        Raises:
            ValueError: the template refuses it or leaves something out, it cannot be told which tokens are the assistant's, or what is a
                special token; names the document, and says what to do.
        """
        if document.tools and self._of_tools:
            return self._of_tools(document)
        try:
            return self._tokens(document)
        except ValueError as error:
            raise ValueError(f"document {document.id!r}: {error}") from None

    @property
    def ends(self) -> list[int]:
        """The special token that the template writes behind an answer, if it writes one: where a teacher that answers has to stop."""
        with suppress(ValueError):  # it may ask for a system message
            return self._special.first_in(self._answers.end(Chat(messages=[USER])))
        return []

    def _tokens(self, document: Document) -> Tokens:
        assert document.messages is not None
        chat, notes = self._arguments.fit(
            Chat(
                messages=document.messages,
                tools=document.tools,
                documents=document.documents,
                options=self._options(document),
            )
        )
        notes |= {f"{name} left out" for name in document.options if name not in chat.options}
        if self._is_of_prompts:
            text = self._ask(chat)
            written = Written(text=text, answers=[], chat=chat, render=self._question)
        elif self._learns_last:
            written = self._answers.last(chat)
        else:
            written = self._answers.all(chat, document.learn_from)
        ids, offsets = self._encode(written)
        mask = None if self._is_of_prompts else _overlaps(offsets, written.answers)
        if mask is not None and not any(mask):
            raise ValueError(f"the chat template marks no token as the assistant's; {ADVICE}")
        notes |= self._unwritten.check(
            written.chat, written.text, written.render, first=document.checked
        )
        return Tokens(
            text=written.text,
            ids=ids,
            offsets=offsets,
            completion_mask=mask,
            notes=tuple(sorted(notes)),
        )

    def _options(self, document: Document) -> dict[str, Any]:
        """Those variables of a document that the template asks for.

        Raises:
            ValueError: it asks for others only, and the recipe lets none go.
        """
        found = {}
        for name, value in document.options.items():
            if name in RESERVED:
                raise ValueError(
                    f"the chat sets {name!r} for its template, which a chat must not set; fix the corpus, or set "
                    "corpus.chat_template_kwargs_column = false"
                )
            if name in self._renderer.known:
                found[name] = value
            elif not self._unwritten.lets_go(name):
                raise ValueError(
                    f"the chat template does not use {name!r}, which the chat sets; give a template that does as "
                    f'sequences.chat_template = "file.jinja", or drop it: sequences.drop_unwritten = ["{name}"]'
                )
        return found

    def _question(self, chat: Chat) -> str:
        return self._renderer.text(chat, add_generation_prompt=True)

    def _ask(self, chat: Chat) -> str:
        """The text of a chat up to where the assistant is asked to speak."""
        asked = self._question(chat)
        if asked == self._renderer.text(chat):
            answer = {"role": ASSISTANT, "content": "a"}
            answered = self._renderer.text(chat.of([*chat.messages, answer]))
            rest = answered[len(asked) :].lstrip()
            if not answered.startswith(asked) or not rest.startswith("a"):
                raise ValueError(
                    f"the chat template has no generation prompt, and writes more before an answer, so the teacher would not be prompted for one;"
                    f" {ADVICE}"
                )
        return asked

    def _encode(self, written: Written) -> tuple[list[int], list[Span]]:
        """Token ids, and where each stands in the text.

        Of answers that begin with their reasoning, it is given to the template by itself, where that makes no other text: then the tags around
        it are the template's, and may be special.
        """
        chat = written.chat
        if self._special.holds("<think>") or self._special.holds("</think>"):
            for strip in ("\n", None):
                apart = chat.of([_with_reasoning(message, strip) for message in chat.messages])
                with suppress(ValueError):
                    if apart != chat and written.render(apart) == written.text:
                        chat = apart
                        break
        return self._special.encode(chat, written.text, written.render)

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
                text = self._renderer.text(
                    Chat(messages=messages), add_generation_prompt=messages[-1] is user
                )
            except TooLarge:
                raise
            except ValueError:
                continue  # it knows no such chat
            yield text.rpartition(answer["content"])[2]


def _with_reasoning(message: dict[str, Any], strip: str | None) -> dict[str, Any]:
    """An answer with what was thought before it by itself."""
    found = split_reasoning(message) if message["role"] == ASSISTANT else None
    if found is None:
        return message
    reasoning, content = found
    return {**message, REASONING[0]: reasoning.strip(strip), "content": content.lstrip(strip)}


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
