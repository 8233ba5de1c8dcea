"""Documents → sequences of token ids for the teacher, and batches of sequences of like length.

In:   a document and the teacher's fast tokenizer; for chats, what makes tokens of one (`chats`).
Out:  one sequence, or several chunks of at most max_length tokens. Together their texts are the document again.

How:  a document is tokenized once and whole; chunks are slices of that. A cut never falls inside a character (one code point
      may be several tokens), so each chunk's text is exactly what its tokens spell. Text in a document that looks like a
      special token is tokenized as the plain text that it is: a document cannot end itself.
      Of a chat, the first chunk starts as the template starts it; later ones start with what the tokenizer puts before a text.
"""

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from builder.corpus.documents import Document
from logit_dataset.schema import loss_mask

NO_TOKEN = -1
"""Stands for the next token where nothing follows."""
NO_ID = 2**32 - 1
"""The largest that the `tokenizers` library can hold: the id of no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One future row: what the teacher sees, and what follows it."""

    document_id: str
    chunk_index: int
    text: str
    token_ids: list[int]
    next_token: int
    """The token after the last one: the document's, where it was cut, else end-of-sequence, else NO_TOKEN."""
    completion_mask: list[bool] | None = None
    """Which tokens are the completion's; None in a corpus of texts."""
    notes: tuple[str, ...] = ()
    """Of the first sequence of a document: what was converted in that, or left out of it."""

    @property
    def targets(self) -> list[int]:
        """The token that really follows each position."""
        return [*self.token_ids[1:], self.next_token]

    @property
    def loss_positions(self) -> list[int]:
        """The positions whose next token is in the row, and the completion's."""
        return np.flatnonzero(loss_mask(self.completion_mask or [])).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A whole document, tokenized."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Where in the text each token stands."""
    completion_mask: list[bool] | None = None
    notes: tuple[str, ...] = ()
    """What was converted, or left out."""


class Chats(Protocol):
    """What makes tokens of chats."""

    def turns(self, document: Document) -> list[Document]:
        """The documents of which rows are made."""

    def __call__(self, document: Document) -> Tokens:
        """The tokens of one of them."""


class Encoder:
    """Turns documents into sequences."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        long_documents: Literal["chunk", "truncate"],
        bos: Literal["tokenizer", "always", "never"] = "tokenizer",
        eos: Literal["tokenizer", "always", "never"] = "tokenizer",
        chats: Chats | None = None,
    ) -> None:
        """Prepare a fast transformers tokenizer.

        Args:
            tokenizer: the teacher's.
            max_length: longest sequence in tokens, special tokens included.
            long_documents: cut longer documents into chunks, or keep their beginning only.
            bos: whether each sequence starts with the begin-of-sequence token.
            eos: whether each document ends with the end-of-sequence token.
            chats: what makes tokens of a document, where documents are chats; it puts special tokens around them.

        Raises:
            ValueError: a special token is asked for that the tokenizer does not have, or the special tokens
                leave no room for text.
        """
        self._backend = backend_copy(tokenizer, match_special=False)
        self.chats = chats
        own_prefix, own_suffix = added_around(self._backend)
        self.prefix = _choose("bos", bos, own_prefix, tokenizer.bos_token_id)
        self.suffix = [] if chats else _choose("eos", eos, own_suffix, tokenizer.eos_token_id)
        self._eos = NO_TOKEN if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
        self._max_length, num_special = max_length, len(self.prefix) + len(self.suffix)
        if num_special >= max_length:
            raise ValueError(
                f"sequences.max_length is {max_length}, but special tokens alone take {num_special}"
            )
        self._truncate = long_documents == "truncate"

    def encode(self, document: Document) -> list[Sequence]:
        """The sequences of one document; none if it has no tokens, or is truncated before anything that is to be learned.

        Raises:
            ValueError: it is a chat of which no tokens, or no mask, can be made.
        """
        if self.chats is None:
            return self._sequences(document, self._tokens(document))
        found: list[Sequence] = []
        notes = dict.fromkeys(document.notes)
        for turn in self.chats.turns(document):
            tokens = self.chats(turn)
            if sequences := self._sequences(turn, tokens):
                found += sequences
                notes |= dict.fromkeys(tokens.notes)
        if found and notes:
            found[0] = replace(found[0], notes=tuple(notes))
        return found

    def _sequences(self, document: Document, tokens: Tokens) -> list[Sequence]:
        ids, ends = tokens.ids, _character_ends(tokens.offsets)
        sequences: list[Sequence] = []
        start, text_start = 0, 0
        while start < len(ids):
            prefix = [] if self.chats and start == 0 else self.prefix
            room = self._max_length - len(prefix) - len(self.suffix)
            end = _cut(start, start + room, tokens.offsets, ends)
            is_last = end == len(ids)
            text_end = len(tokens.text) if is_last else ends[end - 1]
            mask = None
            if tokens.completion_mask is not None:
                mask = [False] * len(prefix) + tokens.completion_mask[start:end]
                mask += [True] * len(self.suffix) if is_last else []  # it ends the completion
            sequences.append(
                Sequence(
                    document_id=document.id,
                    chunk_index=len(sequences),
                    text=tokens.text[text_start:text_end],
                    token_ids=[*prefix, *ids[start:end], *(self.suffix if is_last else [])],
                    next_token=self._eos if is_last else ids[end],
                    completion_mask=mask,
                )
            )
            if self._truncate:
                break
            start, text_start = end, text_end
        is_learned = any(sequence.loss_positions for sequence in sequences[:1])
        if self._truncate and tokens.completion_mask is not None and not is_learned:
            return []
        return sequences

    def encode_prompt(self, document: Document) -> Sequence | None:
        """A document as it stands before its completion: whole, and not ended; None if it has no tokens.

        Raises:
            ValueError: it is a chat of which no tokens can be made.
        """
        tokens = self.chats(document) if self.chats else self._tokens(document)
        if not tokens.ids:
            return None
        return Sequence(
            document_id=document.id,
            chunk_index=0,
            text=tokens.text,
            token_ids=[*([] if self.chats else self.prefix), *tokens.ids],
            next_token=NO_TOKEN,
            notes=tuple(dict.fromkeys((*document.notes, *tokens.notes))),
        )

    def _tokens(self, document: Document) -> Tokens:
        encoding = self._backend.encode(document.text, add_special_tokens=False)
        mask = None
        if document.prompt_length is not None:  # a token across the border is the completion's
            mask = [end > document.prompt_length for _, end in encoding.offsets]
        return Tokens(
            text=document.text,
            ids=encoding.ids,
            offsets=encoding.offsets,
            completion_mask=mask,
        )


def length_sorted_batches(
    lengths: SequenceOf[int], batch_tokens: int, reach: Callable[[int], int] = lambda _: 0
) -> list[list[int]]:
    """Indices of sequences in batches of at most `batch_tokens` positions, padding included, longest first.

    A sequence longer than batch_tokens is a batch of its own.

    Args:
        lengths: of the sequences.
        batch_tokens: positions in a batch, padding included.
        reach: of a length; sequences share a batch only if it is the same (`Teacher.reach`). It does not fall with the length.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if (
            not batches
            or (len(batches[-1]) + 1) * longest > batch_tokens
            or reach(lengths[index]) != reach(longest)
        ):
            batches.append([])
        batches[-1].append(index)
    return batches


def _cut(start: int, limit: int, offsets: list[tuple[int, int]], ends: list[int]) -> int:
    """Where the chunk that starts at token `start` ends: at most `limit`, and not inside a character."""
    if limit >= len(offsets):
        return len(offsets)
    end = limit
    while end > start and offsets[end][0] < ends[end - 1]:
        end -= 1
    return end if end > start else limit  # a single character longer than a chunk has to be cut


def _character_ends(offsets: list[tuple[int, int]]) -> list[int]:
    """For each token, the end of the text that all tokens up to it have touched."""
    ends, furthest = [], 0
    for _, end in offsets:
        furthest = max(furthest, end)
        ends.append(furthest)
    return ends


def backend_copy(
    tokenizer: Any, *, match_special: bool, renamed: Mapping[str, str] | None = None
) -> Tokenizer:
    """A copy of a fast tokenizer's backend that reports untrimmed offsets, and neither pads nor truncates.

    Args:
        tokenizer: a fast transformers tokenizer.
        match_special: whether special tokens in a text are these, or the text that they are.
        renamed: other strings for which some of its added tokens are to stand; their ids change, too.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    _keep_spaces(description)
    for token in description["added_tokens"]:
        token["content"] = (renamed or {}).get(token["content"], token["content"])
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = not match_special
    copy.no_padding()
    copy.no_truncation()
    return copy


def _keep_spaces(node: Any) -> None:
    """`trim_offsets` only moves reported offsets off the spaces that a token holds; it never changes an id."""
    if isinstance(node, dict):
        if "trim_offsets" in node:
            node["trim_offsets"] = False
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _keep_spaces(child)


def added_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer's post-processor puts before a text, and those behind it.

    Raises:
        ValueError: it leaves the text out, or repeats it.
    """
    if backend.post_processor is None:
        return [], []
    # A tokenizer with one word, to which it does what it does to all others; no vocabulary needs to have a certain letter for that.
    probe = Tokenizer(WordLevel({"a": NO_ID}, unk_token="a"))
    probe.post_processor = backend.post_processor
    ids: list[int] = probe.encode("a").ids
    if ids.count(NO_ID) != 1:
        raise ValueError(
            f"the tokenizer's post-processor writes a text {ids.count(NO_ID)} times into a sequence, expected once; mend tokenizer.json"
        )
    place = ids.index(NO_ID)
    return ids[:place], ids[place + 1 :]


def _choose(name: str, wish: str, own: list[int], token_id: int | None) -> list[int]:
    if wish == "tokenizer":
        return own
    if wish == "never":
        return []
    if token_id is None:
        raise ValueError(
            f"sequences.{name} is 'always', but the teacher's tokenizer has no {name} token"
        )
    return [int(token_id)]
