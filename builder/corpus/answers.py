"""A chat → its text, and where in it the assistant's answers are.

In:   a chat, and a template that is ready to write.
Out:  text, and spans of its characters. What is uncertain is refused, with what to do.

How:  a template says it that marks answers, with {% generation %} … {% endgeneration %}. Of any other, it follows from what the teacher would
      have been asked.

      All answers of a chat: the text of the messages before an answer, with the generation prompt, must be the beginning of the text with
      the answer, and that the beginning of the whole. The answer is what stands between, with the special token that ends it and without
      white space behind that. Templates that write an earlier answer differently once the conversation goes on, or the end of the last
      one, or have no generation prompt and yet a header, are refused.

      The last answer alone: only the first of these has to hold, so that it is what the teacher meets in use. Two kinds of templates ask
      with more than they write before an answer (`<think>`). An answer that begins with that, or ends its reasoning, is written behind
      what was asked; any other stands where the template writes it, behind the part of the question that it keeps.

Cost: with marks one rendering, else three more an answer, four for the last alone.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from builder.corpus.messages import ASSISTANT, REASONING, Chat
from builder.corpus.rendering import PROBE, Renderer, Span
from builder.corpus.special_tokens import SpecialTokens, excerpt

ADVICE = 'give a template that marks the answers with {% generation %} as sequences.chat_template = "file.jinja"'
ADVICE_ALL = f'set sequences.learn = "last", which learns each answer from the conversation up to it, or {ADVICE}'
USER = {"role": "user", "content": "a"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A chat as its template writes it."""

    text: str
    answers: list[Span]
    """Characters that are the assistant's, in order."""
    chat: Chat
    """What it was made of: the chat, or the same with the reasoning of its last answer by itself."""
    render: Callable[[Chat], str]
    """Makes the text of such a chat with other words in it."""


class Answers:
    """Finds the answers of chats in their template's text."""

    def __init__(self, renderer: Renderer, special: SpecialTokens) -> None:
        """Prepare.

        Args:
            renderer: of the template.
            special: tokens that only the template may write.
        """
        self._renderer = renderer
        self._text = renderer.text
        self._special = special

    def all(self, chat: Chat, first: int) -> Written:
        """The text of a chat with its answers from message `first` on.

        Raises:
            ValueError: the template refuses it, or it cannot be told where they are.
        """
        if self._renderer.has_marks:
            return self._marked(chat, first)
        text = self._text(chat)
        numbers = [n for n, m in enumerate(chat.messages) if n >= first and m["role"] == ASSISTANT]
        answers = [self._answer(chat, number, text) for number in numbers]
        return Written(text=text, answers=answers, chat=chat, render=self._text)

    def last(self, chat: Chat) -> Written:
        """The text of a chat that ends with an answer, and that one alone.

        Raises:
            ValueError: the template refuses it, or it cannot be told where it is.
        """
        number = len(chat.messages) - 1
        if self._renderer.has_marks:
            return self._marked(chat, number)
        before = chat.up_to(number)
        base, asked = self._text(before), self._text(before, add_generation_prompt=True)
        whole = self._text(chat)
        start: int | None
        if whole.startswith(asked):
            start = len(asked)
            if base == asked:
                self._check_header(chat, whole[start:], start)
        elif written := self._continued(chat, asked):
            return written
        else:
            start = self._behind_header(chat, base, asked, whole)
        if start is None:
            raise ValueError(
                f"the chat template does not write message {number} right after its generation prompt "
                f"({_difference(asked, whole)}), so the answer's tokens cannot be identified; {ADVICE}"
            )
        span = start, self._end_of_last(chat, whole, start)
        return Written(text=whole, answers=[span], chat=chat, render=self._text)

    def end(self, before: Chat) -> str:
        """What the template writes behind an answer to a chat."""
        answers = [{"role": ASSISTANT, "content": c} for c in "ab"]
        texts = [self._text(before.of([*before.messages, answer]))[::-1] for answer in answers]
        return texts[0][: parting(*texts)][::-1]

    # With marks

    def _marked(self, chat: Chat, first: int) -> Written:
        text, spans = self._renderer.text_and_marks(chat)
        if first:
            before = chat.up_to(first)
            for asks in (False, True):
                start = self._text(before, add_generation_prompt=asks)
                if text.startswith(start):
                    spans = [span for span in spans if span[1] > len(start)]
                    break
            else:
                raise ValueError(
                    f"the chat template changes the text before message {first} when the conversation continues "
                    f"({_difference(start, text)}), so the start of that message cannot be found; {ADVICE}"
                )
        return Written(text=text, answers=spans, chat=chat, render=self._text)

    # All answers

    def _answer(self, chat: Chat, number: int, text: str) -> Span:
        """Where in the text of all messages an answer stands, by the texts of the messages up to it."""
        before = self._text(chat.up_to(number), add_generation_prompt=True)
        until = text
        if number + 1 < len(chat.messages):
            until = self._text(chat.up_to(number + 1))
        if not until.startswith(before):
            raise ValueError(
                f"the chat template does not write message {number} right after its generation prompt "
                f"({_difference(before, until)}), so the answer's tokens cannot be identified; {ADVICE_ALL}"
            )
        if not text.startswith(until):
            until = until.rstrip()
        if not text.startswith(until):
            raise ValueError(
                f"the chat template changes message {number} when the conversation continues "
                f"({_difference(until, text)}), so the teacher would not have seen this prompt; {ADVICE_ALL}"
            )
        start = len(before)
        if before == self._text(chat.up_to(number)):
            self._check_header(chat.up_to(number + 1), until[start:], start)
        if number + 1 == len(chat.messages):
            self._check_end(chat, until[start:], start)
        return start, max(start, len(until.rstrip()))

    def _check_end(self, chat: Chat, answer: str, start: int) -> None:
        """Refuses a template that writes more behind the last answer (`<|endoftext|>`) than behind any other."""
        goes_on = self._gone_on(chat)
        if goes_on is None or goes_on[start:].startswith(answer.rstrip()):
            return
        shared, content = parting(answer, goes_on[start:]), self._content(chat, answer, start)
        if content is None or content[1] <= shared:
            raise ValueError(
                f"the chat template ends the last answer differently when the conversation continues "
                f"({_difference(answer, goes_on[start:])}), so the end of an answer cannot be identified; {ADVICE_ALL}"
            )

    def _check_header(self, chat: Chat, answer: str, start: int) -> None:
        """Refuses a template that asks for nothing, and then writes more than an answer."""
        said = chat.messages[-1]["content"]
        content = self._content(chat, answer, start) if said.strip() else None
        thought, end_of_thought, _ = said.rpartition("</think>")
        before = f"{thought}{end_of_thought}".strip()
        if content is None or answer[: content[0]].strip() != before:
            raise ValueError(
                f"the chat template has no generation prompt, and writes more before message {len(chat.messages) - 1} than can be separated from the answer;"
                f" {ADVICE}"
            )

    def _content(self, chat: Chat, answer: str, start: int) -> Span | None:
        """Where in the last answer its content stands, by another word in its place; None if that does not tell.

        Reasoning that the content begins with is no part of that.

        Args:
            chat: ends with the answer.
            answer: the text of the chat from `start` on.
            start: where the answer begins, as far as it is known.
        """
        *before, message = chat.messages
        thought, end_of_thought, _ = message["content"].rpartition("</think>")
        other = {**message, "content": f"{thought}{end_of_thought}{PROBE}"}
        try:
            text = self._text(chat.of([*before, other]))[start:]
        except ValueError:
            return None
        header, found, behind = text.partition(PROBE)
        if found and answer.startswith(header) and answer.endswith(behind):
            return len(header), len(answer) - len(behind)
        return None

    # The last answer alone

    def _continued(self, chat: Chat, asked: str) -> Written | None:
        """An answer that ends the reasoning that its question begins, behind that question.

        The question ends with <think>, and may have a line's end behind it; the content may begin with both.
        """
        number, message = len(chat.messages) - 1, chat.messages[-1]
        if not asked.rstrip().endswith("<think>") or any(key in message for key in REASONING):
            return None
        thought, end_of_thought, content = message["content"].partition("</think>")
        if not end_of_thought:
            return None
        thought = thought.lstrip().removeprefix("<think>")
        if asked.endswith("\n"):
            thought = thought.lstrip("\n")
        behind = self.end(chat.up_to(number))

        def render(chat: Chat) -> str:
            question = self._text(chat.up_to(number), add_generation_prompt=True)
            answer = chat.messages[number]
            return f"{question}{answer[REASONING[0]]}</think>{answer['content']}{behind}"

        kept = {**message, REASONING[0]: thought, "content": content}
        kept_chat = chat.of([*chat.messages[:number], kept])
        text = render(kept_chat)
        end = len(text) - len(behind) + self._end_in(behind, 0)
        return Written(text=text, answers=[(len(asked), end)], chat=kept_chat, render=render)

    def _behind_header(self, chat: Chat, base: str, asked: str, whole: str) -> int | None:
        """Where an answer starts of which the template writes less before it than it asks with; None if that is not so."""
        if not (whole.startswith(base) and asked.startswith(base)):
            return None
        prompt, rest = asked[len(base) :], whole[len(base) :]
        shared = parting(prompt, rest)
        if shared and not prompt[shared:].strip():
            return len(base) + shared  # but for white space, it is what was asked
        content = self._content(chat, rest, len(base))
        header = rest[: content[0]] if content else ""
        if not header.strip() or not prompt.startswith(header.rstrip()):
            return None
        return len(base) + parting(header, prompt)

    def _end_of_last(self, chat: Chat, text: str, start: int) -> int:
        """Where the last answer ends: before what the template writes only where a text ends (`<|endoftext|>` behind `<|end|>`)."""
        answer = text[start:]
        goes_on = self._gone_on(chat)
        if goes_on is None or goes_on[start:].startswith(answer.rstrip()):
            return start + len(answer.rstrip())
        content = self._content(chat, answer, start)
        return start + self._end_in(answer, content[1] if content else None)

    def _end_in(self, answer: str, place: int | None) -> int:
        """Where an answer ends in what the template writes to the end, its own words from `place` on, where that is known."""
        answer = answer.rstrip()
        run = self._special.last_run(answer, place or 0)
        if len(run) <= 1:
            return len(answer)
        ends = self._special.first_in(self._end_of_simple())
        for first, last in run if place is not None else ():
            if self._special.first_in(answer[first:last]) == ends:
                return last
        raise ValueError(
            f"the chat template ends the last answer with {excerpt(answer[run[0][0] :])}, and differently when the conversation continues, so the end of an answer cannot be identified;"
            f" {ADVICE}"
        )

    def _end_of_simple(self) -> str:
        with suppress(ValueError):  # it may ask for a system message
            return self.end(Chat(messages=[USER]))
        return ""

    def _gone_on(self, chat: Chat) -> str | None:
        """The text of a chat with a further question; None if the template knows none."""
        try:
            return self._text(chat.of([*chat.messages, USER]))
        except ValueError:
            return None


def _difference(wanted: str, found: str) -> str:
    """Two texts from where they part."""
    place = parting(wanted, found)
    return f"{excerpt(wanted[place:])} and {excerpt(found[place:])} behind {wanted[max(0, place - 20) : place]!r}"


def parting(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
