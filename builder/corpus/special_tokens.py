"""The text of a chat → token ids, in which special tokens are the template's and never a message's.

In:   the messages, the text that the chat template makes of them, and a way to render them once more with other strings.
Out:  token ids, and where each stands in the text.

How:  where a message holds what looks like a special token (or is, begins or ends with a part of one), the chat is rendered once more
      with marks around that, as transformers does it for its `sanitize_control_tokens`, to learn which are the template's; these are
      then replaced by characters that no text holds, for which a copy of the tokenizer knows the same tokens. Added tokens that are not
      special (`<think>`) are taken as in texts, but for those that the template writes around turns: where a template marks turns
      with them, a message cannot.

Cost: nothing where no message holds anything like it, else one rendering and one more tokenization.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from builder.corpus.messages import Message
from builder.corpus.sequences import backend_copy

OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Around what looks like a special token in a message; one alone keeps what stands on both sides apart."""
FIRST_STAND_IN = 0xF0100
"""Private characters from here on stand for the template's own special tokens."""
STAND_INS = re.compile("[\U000f0000-\U000fffff]")

Span = tuple[int, int]
Render = Callable[[list[Message]], str]


class SpecialTokens:
    """Tells the special tokens of a chat template from what its messages say."""

    def __init__(self, tokenizer: Any, template: str, around_turns: Iterable[str]) -> None:
        """Find the tokens that only the template may write.

        Args:
            tokenizer: a fast transformers tokenizer.
            template: source of the chat template.
            around_turns: what it writes around the turns of some chats; none, where it refuses those.
        """
        self._backend = backend_copy(tokenizer, match_special=True)
        self._controls = self._find_controls(tokenizer, template, list(around_turns))
        stand_ins = {
            content: chr(FIRST_STAND_IN + i) for i, content in enumerate(self._controls.values())
        }
        self._stand_ins = stand_ins
        self._renamed = backend_copy(tokenizer, match_special=True, renamed=stand_ins)
        # Renaming some tokens moves the ids of others.
        self._ids_of_renamed = {
            self._renamed.token_to_id(stand_ins.get(added.content, added.content)): token
            for token, added in tokenizer.added_tokens_decoder.items()
        }
        longest_first = sorted(self._controls.values(), key=len, reverse=True)
        self._looks_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._beginnings = {c[:n] for c in longest_first for n in range(1, len(c))}
        self._endings = {c[n:] for c in longest_first for n in range(1, len(c))}

    def first_in(self, text: str) -> list[int]:
        """The first token of a text that only the template may write, if there is one."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token in self._controls][:1]

    def _find_controls(
        self, tokenizer: Any, template: str, around_turns: list[str]
    ) -> dict[int, str]:
        """Tokens that only the template may write: id → content."""
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        turns = {
            token
            for text in around_turns
            for token in self._backend.encode(text, add_special_tokens=False).ids
        }
        if not around_turns:  # it may ask for other roles, or for several turns
            turns = {token for token, value in added.items() if value.content in template}
        return {
            token: value.content
            for token, value in added.items()
            if value.special or (token in turns and not value.content.isspace())
        }

    def encode(
        self, messages: list[Message], text: str, render: Render
    ) -> tuple[list[int], list[Span]]:
        """Token ids of a chat, and where each stands in its text.

        Args:
            messages: of the chat.
            text: what the template makes of them.
            render: makes the text of other messages.

        Raises:
            ValueError: the template or the tokenizer have no way to write what a message holds.
        """
        if not any(map(self._is_suspicious, _said(messages))):
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        if STAND_INS.search(text):
            raise ValueError(
                "a message holds private characters beside what looks like a special token; leave out either"
            )
        marked = render([_marked(message, self._mark) for message in messages])
        if re.sub(f"[{OPEN}{CLOSE}]", "", marked) != text:
            found = next(filter(self._is_suspicious, _said(messages)))
            raise ValueError(
                f"a message holds {excerpt(found)}, which looks like a special token, and the chat template does not write it as it "
                "is; mend the corpus, or give a template that does as sequences.chat_template"
            )
        with_stand_ins, origin = self._stand_in(marked)
        encoding = self._renamed.encode(with_stand_ins, add_special_tokens=False)
        ids = [self._ids_of_renamed.get(token, token) for token in encoding.ids]
        found_controls = sum(token in self._controls for token in ids)
        if found_controls != len(STAND_INS.findall(with_stand_ins)):
            raise ValueError(
                "a message holds what looks like a special token, and this tokenizer has no other way to write it; mend the corpus"
            )
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]

    def _is_suspicious(self, text: str) -> bool:
        """Whether a string holds what looks like a special token, or could become a part of one."""
        return bool(self._looks_special.search(text)) or self._mark_edges(text) != text

    def _mark(self, text: str) -> str:
        return self._looks_special.sub(f"{OPEN}\\g<0>{CLOSE}", self._mark_edges(text))

    def _mark_edges(self, text: str) -> str:
        """Keeps the first and the last word from being a part of a special token; templates may strip the space around them."""
        core = text.strip()
        start = text.index(core)
        before, behind = text[:start], text[start + len(core) :]
        longest = max(map(len, self._beginnings), default=0)
        lengths = range(1, min(longest, len(core)) + 1)
        is_within = bool(core) and any(core in control for control in self._controls.values())
        first = OPEN if is_within or any(core[:n] in self._endings for n in lengths) else ""
        last = OPEN if any(core[-n:] in self._beginnings for n in lengths) else ""
        return f"{before}{first}{core}{last}{behind}"

    def _stand_in(self, marked: str) -> tuple[str, list[int]]:
        """The text with stand-ins for the template's special tokens, and for each place in it the place in the text.

        In `hidden`, all that looks special in a message is OPEN: what is still found there is the template's.
        """
        hidden, place = "", 0
        places: list[int] = []
        for part in re.split(f"({OPEN}[^{OPEN}{CLOSE}]*{CLOSE}|[{OPEN}{CLOSE}])", marked):
            if part in (OPEN, CLOSE):
                hidden += OPEN
                places.append(place)
                continue
            is_said = part.startswith(OPEN)
            length = len(part) - 2 if is_said else len(part)
            hidden += OPEN * length if is_said else part
            places += range(place, place + length)
            place += length
        places.append(place)
        text = re.sub(f"[{OPEN}{CLOSE}]", "", marked)
        encoding = self._backend.encode(hidden, add_special_tokens=False)
        pieces: list[str] = []
        origin: list[int] = []
        done = 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in self._controls:
                continue
            content = self._controls[token]
            # A token may take the white space around it; that is the tokenizer's to find again.
            inside = hidden.find(content, start, end)
            begin = places[start if inside < 0 else inside]
            stop = places[end if inside < 0 else inside + len(content)]
            pieces += [text[done:begin], self._stand_ins[content]]
            origin += [*range(done, begin), begin]
            done = stop
        pieces.append(text[done:])
        origin += [*range(done, len(text)), len(text)]
        return "".join(pieces), origin


def _said(messages: list[Message]) -> Iterable[str]:
    """All strings of some messages but their roles, which are known."""
    for message in messages:
        yield from message
        yield from _strings([item for key, item in message.items() if key != "role"])


def _marked(message: Message, change: Callable[[str], str]) -> Message:
    """A message with all strings changed that `_said` yields."""
    return {
        change(key): item if key == "role" else _with_strings(item, change)
        for key, item in message.items()
    }


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _with_strings(item, change) for key, item in value.items()}
    return value


def excerpt(text: str) -> str:
    """The beginning of a text, quoted, for messages."""
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
