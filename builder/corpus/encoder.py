"""A document → its sequences, as the teacher's tokenizer, its special tokens and, for chats, a template make them.

In:   a document and the teacher's fast tokenizer; for chats, what makes tokens of one (`chats`).
Out:  one sequence, or several chunks of at most max_length tokens (`sequences`).

How:  a text is tokenized in pieces (`text.pieces`), so that a long one is never tokenized at once. Text in a document that looks like a
      special token is tokenized as the plain text that it is: a document cannot end itself.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from builder.corpus.documents import Document
from builder.corpus.sequences import NO_TOKEN, Chunks, Form, Place, Rows, Sequence, Turns
from builder.text import pieces as pieces_module
from builder.text.pieces import Piece, Pieces

NO_ID = 2**32 - 1
"""The largest that the `tokenizers` library can hold: the id of no token."""


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
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare a fast transformers tokenizer.

        Args:
            tokenizer: the teacher's.
            max_length: longest sequence in tokens, special tokens included.
            long_documents: cut longer documents into chunks, or keep their beginning only.
            bos: whether each sequence starts with the begin-of-sequence token.
            eos: whether each document ends with the end-of-sequence token.
            chats: what makes tokens of a document, where documents are chats; it puts special tokens around them.
            notice: told, in a line, of documents that take much memory.

        Raises:
            ValueError: a special token is asked for that the tokenizer does not have, or the special tokens
                leave no room for text.
        """
        backend = backend_copy(tokenizer, match_special=False)
        self._pieces = Pieces(backend, notice=notice)
        self.chats = chats
        own_prefix, own_suffix = added_around(backend)
        self.prefix = _choose("bos", bos, own_prefix, tokenizer.bos_token_id)
        self.suffix = [] if chats else _choose("eos", eos, own_suffix, tokenizer.eos_token_id)
        num_special = len(self.prefix) + len(self.suffix)
        if num_special >= max_length:
            raise ValueError(
                f"sequences.max_length is {max_length}, but special tokens alone take {num_special}; choose a larger max_length"
            )
        self._form = Form(
            max_length=max_length,
            prefix=self.prefix,
            suffix=self.suffix,
            eos=NO_TOKEN if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id),
            truncates=long_documents == "truncate",
            are_chats=chats is not None,
            seams=lambda: self._pieces.seams,
        )

    def whole(self, documents: SequenceOf[Document]) -> list[Piece | None]:
        """The tokens of texts, made at once on all cores; None for what is not tokenized as a whole: chats, and long texts."""
        are_short = [
            self.chats is None and d.long_text is None and d.length <= pieces_module.WINDOW
            for d in documents
        ]
        texts = [d.text for d, is_short in zip(documents, are_short, strict=True) if is_short]
        found = iter(self._pieces.whole(texts))
        return [next(found) if is_short else None for is_short in are_short]

    def sequences(
        self, document: Document, start: Place | None = None, *, whole: Piece | None = None
    ) -> Rows:
        """The sequences of one document, one after the other, from one of them on; none if it has no tokens, or is truncated before anything
        that is to be learned.

        Args:
            document: a text or a chat.
            start: the sequence's place; None for the first one.
            whole: the document's tokens, where `whole` has made them.

        Raises:
            ValueError: it is a chat of which no tokens, or no mask, can be made; or no sequence starts at that place.
        """
        if self.chats is None:
            if whole is None or start is not None:
                return Chunks(self._form, document, self._pieces_of(document, start), start)
            return Chunks(self._form, document, iter([whole]), None)
        found: list[Sequence] = []
        notes = dict.fromkeys(document.notes)
        for turn in self.chats.turns(document):
            tokens = self.chats(turn)
            if sequences := list(Chunks(self._form, turn, iter([_piece(tokens)]), None)):
                found += sequences
                notes |= dict.fromkeys(tokens.notes)
        if found and notes:
            found[0] = replace(found[0], notes=tuple(notes))
        return Turns(found, start)

    @property
    def truncates(self) -> bool:
        """Whether a document is its first sequence only."""
        return self._form.truncates

    def is_cut(self, sequence: Sequence) -> bool:
        """Whether a sequence ends before its document does."""
        return sequence.next_token != self._form.eos

    def encode(self, document: Document) -> list[Sequence]:
        """All sequences of one document; errors as for `sequences`."""
        return list(self.sequences(document))

    def encode_prompt(self, document: Document, max_tokens: int | None = None) -> Sequence | None:
        """A document as it stands before its completion: whole, and not ended; None if it has no tokens.

        Args:
            document: a text or a chat.
            max_tokens: of a text that has more, what comes behind the piece with the first of these may be left out.

        Raises:
            ValueError: it is a chat of which no tokens can be made.
        """
        text, notes = "", dict.fromkeys(document.notes)
        ids = [] if self.chats else list(self.prefix)
        num_special = len(ids)
        if self.chats:
            tokens = self.chats(document)
            text, ids = tokens.text, tokens.ids
            notes |= dict.fromkeys(tokens.notes)
        else:
            for piece in self._pieces_of(document, None):
                text += piece.text
                ids += piece.ids.tolist()
                if max_tokens is not None and len(ids) > max_tokens:
                    break
        if len(ids) == num_special:
            return None
        return Sequence(
            document_id=document.id,
            chunk_index=0,
            text=text,
            token_ids=ids,
            next_token=NO_TOKEN,
            notes=tuple(notes),
        )

    def _pieces_of(self, document: Document, start: Place | None) -> Iterator[Piece]:
        name = f"document {document.id!r}"
        return self._pieces.of(document.parts(), start=start.character if start else 0, name=name)


def _piece(tokens: Tokens) -> Piece:
    """A whole chat."""
    spans = np.array(tokens.offsets, np.int64).reshape(-1, 2)
    mask = tokens.completion_mask
    return Piece(
        start=0,
        text=tokens.text,
        ids=np.array(tokens.ids, np.int64),
        starts=spans[:, 0],
        stops=spans[:, 1],
        ends=np.maximum.accumulate(spans[:, 1]),
        are_first=np.zeros(len(spans), np.bool_),
        completion_mask=None if mask is None else np.array(mask, np.bool_),
    )


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
    for step in ("pre_tokenizer", "post_processor", "decoder"):
        _keep_spaces(description[step])
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
            f"the tokenizer's post-processor writes a text {ids.count(NO_ID)} times into a sequence, expected once; fix tokenizer.json"
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
            f"sequences.{name} is 'always', but the teacher's tokenizer has no {name} token; use 'tokenizer' or 'never'"
        )
    return [int(token_id)]
