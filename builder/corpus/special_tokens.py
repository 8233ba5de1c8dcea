"""The text of a chat → token ids, in which special tokens are the template's and never a message's.

In:   a chat, the text that the chat template makes of it, and a way to render it once more with other strings.
Out:  token ids, and where each stands in the text.

How:  where a message holds what looks like a special token (or is, begins or ends with a part of one), the chat is rendered once more
      with marks around that, as transformers does it for its `sanitize_control_tokens`, to learn which are the template's; these are
      then replaced by characters that no text holds, for which a copy of the tokenizer knows the same tokens. Added tokens that are not
      special (`<think>`) are taken as in texts, but for those that the template writes around turns: where a template marks turns
      with them, a message cannot.
      What is said of messages holds for tools, documents and options of the corpus, too.

Keys. A template may sort them, so that a mark on one alone would move it: all keys of such an object get the same. It may also look
      for keys that it knows, such as `name` of a function: those of messages and of JSON schemas get none.

Cost: nothing where no message holds anything like it, else one rendering and one more tokenization.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from builder.corpus.encoder import backend_copy
from builder.corpus.messages import Chat
from builder.corpus.rendering import Span

OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Around what looks like a special token in a message; one alone keeps what stands on both sides apart."""
FIRST_STAND_IN = 0xF0100
"""Private characters from here on stand for the template's own special tokens."""
STAND_INS = re.compile("[\U000f0000-\U000fffff]")

KNOWN_KEYS = frozenset(
    (
        *("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "function"),
        *("arguments", "id", "index", "type", "text", "title", "url", "source"),
        *("reasoning_content", "reasoning", "thinking", "refusal"),
        # of JSON schemas, and of the functions that they describe
        *("description", "parameters", "properties", "required", "items", "enum", "default"),
        *("nullable", "strict", "format", "pattern", "const", "examples", "return", "returns"),
        *("anyOf", "oneOf", "allOf", "not", "additionalProperties", "minimum", "maximum"),
        *("minLength", "maxLength", "minItems", "maxItems", "uniqueItems"),
        *("$schema", "$ref", "$defs", "definitions"),
    )
)
"""Keys that templates look for by name; a special token is none of them."""

Render = Callable[[Chat], str]


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

    def holds(self, content: str) -> bool:
        """Whether a string is a token that only the template may write."""
        return content in self._stand_ins

    def last_run(self, text: str, start: int) -> list[Span]:
        """The tokens with which a text ends that only the template may write, white space between them left out.

        Args:
            text: of the template.
            start: where in it the run may begin at the earliest.
        """
        found: list[Span] = []
        end = len(text)
        while (end := len(text[:end].rstrip())) > start:
            endings = (c for c in self._controls.values() if text.endswith(c, start, end))
            longest = max(endings, key=len, default="")
            if not longest:
                break
            found.insert(0, (end - len(longest), end))
            end -= len(longest)
        return found

    def encode(self, chat: Chat, text: str, render: Render) -> tuple[list[int], list[Span]]:
        """Token ids of a chat, and where each stands in its text.

        Args:
            chat: what the template is given.
            text: what it makes of that.
            render: makes the text of another chat.

        Raises:
            ValueError: the template or the tokenizer have no way to write what a message holds.
        """
        suspicious = list(filter(self._is_suspicious, _said(chat)))
        if not suspicious:
            encoding = self._backend.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        if STAND_INS.search(text):
            raise ValueError(
                "a message holds private-use characters and text that looks like a special token; remove one of the two"
            )
        with_stand_ins, origin = self._stand_in(self._render_marked(chat, text, render, suspicious))
        encoding = self._renamed.encode(with_stand_ins, add_special_tokens=False)
        ids = [self._ids_of_renamed.get(token, token) for token in encoding.ids]
        found_controls = sum(token in self._controls for token in ids)
        if found_controls != len(STAND_INS.findall(with_stand_ins)):
            raise ValueError(
                "a message holds text that looks like a special token, and this tokenizer cannot write it as plain text; fix the corpus"
            )
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]

    def _render_marked(self, chat: Chat, text: str, render: Render, suspicious: list[str]) -> str:
        """The text with marks around what looks special in messages.

        An option that a template compares with words of its own bears none at its edges.
        """
        failure: ValueError | None = None
        for mark_option in (self._mark, self._mark_whole):
            try:
                marked = render(_Marker(chat, self._mark, mark_option).marked())
            except ValueError as error:  # it takes no other strings
                failure = error
                continue
            if re.sub(f"[{OPEN}{CLOSE}]", "", marked) == text:
                return marked
            failure = None
        why = f" ({failure})" if failure else ""
        raise ValueError(
            f"a message holds {excerpt(suspicious[0])}, which looks like a special token, and the chat template does not write it as "
            f"it is{why}; fix the corpus, or give a template that does as sequences.chat_template"
        )

    def _is_suspicious(self, text: str) -> bool:
        """Whether a string holds what looks like a special token, or could become a part of one."""
        return bool(self._looks_special.search(text)) or self._mark_edges(text) != text

    def _mark(self, text: str) -> str:
        return self._mark_whole(self._mark_edges(text))

    def _mark_whole(self, text: str) -> str:
        """Marks special tokens, but no parts of one."""
        return self._looks_special.sub(f"{OPEN}\\g<0>{CLOSE}", text)

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


class _Marker:
    """Puts marks on the strings of a chat, on equal ones the same."""

    def __init__(
        self, chat: Chat, mark: Callable[[str], str], mark_option: Callable[[str], str]
    ) -> None:
        self._chat = chat
        self._mark = mark
        self._mark_option = mark_option
        self._moved = {  # keys of an object in which one bears a mark
            key
            for value in _written(chat)
            for keys in _objects(value)
            if self._bears_a_mark(keys)
            for key in keys
        }

    def marked(self) -> Chat:
        """The chat with marks."""
        chat = self._chat
        return replace(
            chat,
            messages=[
                {
                    key if key in KNOWN_KEYS else self._mark(key): item
                    if key == "role"
                    else self._with_marks(item)
                    for key, item in message.items()
                }
                for message in chat.messages
            ],
            tools=self._with_marks(chat.tools),
            documents=self._with_marks(chat.documents),
            options={
                key: _with_strings(item, self._mark_option) for key, item in chat.options.items()
            },
        )

    def _bears_a_mark(self, keys: Iterable[str]) -> bool:
        return any(self._mark(key) != key for key in keys if key not in KNOWN_KEYS)

    def _with_marks(self, value: Any) -> Any:
        if isinstance(value, dict):
            change = self._marked_text if self._bears_a_mark(value) else str
            return {change(key): self._with_marks(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._with_marks(item) for item in value]
        return self._marked_text(value) if isinstance(value, str) else value

    def _marked_text(self, text: str) -> str:
        marked = self._mark(text)
        return OPEN + marked.removeprefix(OPEN) if text in self._moved else marked


def _written(chat: Chat) -> Iterable[Any]:
    """What a template may write of a chat, but for roles and options."""
    for message in chat.messages:
        yield from (item for key, item in message.items() if key != "role")
    yield from (chat.tools, chat.documents)


def _said(chat: Chat) -> Iterable[str]:
    """All strings that a template may write of a chat, but for roles and for keys that it knows."""
    for message in chat.messages:
        yield from (key for key in message if key not in KNOWN_KEYS)
    for value in (*_written(chat), list(chat.options.values())):
        yield from _strings(value)


def _objects(value: Any) -> Iterable[dict[str, Any]]:
    """All objects in a value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in KNOWN_KEYS:
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
