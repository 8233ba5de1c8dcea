"""A stored row and the teacher's tokenizer → whether its text and its tokens are the same.

In:   a row, and the chunks before and behind it, if it is one of several.
Out:  one line for each thing that is wrong.

How:  the tokens of a whole document are what the encoder makes of its text. A chunk is a part of that: its text is encoded between
      those of its neighbours, and its tokens must stand there. Where that differs, at the borders of what was read or because a message
      of a chat holds what looks like a special token, both are spelled by the tokenizer and compared as texts, and only tokens
      near a border may be others.
"""

from dataclasses import dataclass
from typing import Any

from builder.capture.generation import spell_completion
from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder, Tokens, backend_copy
from builder.recipe.file import read_section
from builder.recipe.sections import SequencesRecipe
from logit_dataset.schema import is_generated

BORDER_TOKENS = 64
"""Within which the words at the border of a text may be cut otherwise than in the midst of a document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelled:
    """A row as its text and its tokens."""

    text: str
    input_ids: list[int]
    chunk_index: int
    is_end: bool
    """Whether its document is known to end with it."""
    num_prompt: int = 0
    """Tokens before a completion by the teacher."""


class Speller:
    """Knows how a dataset's texts become tokens."""

    def __init__(self, manifest: dict[str, Any], tokenizer: Any) -> None:
        """Prepare.

        Args:
            manifest: of the dataset.
            tokenizer: its teacher's.

        Raises:
            ValueError: the special tokens that the manifest names are not those of this tokenizer.
        """
        recipe = manifest["recipe"]
        sequences = read_section(SequencesRecipe, recipe["sequences"], "recipe.sequences")
        self._tokenizer = tokenizer
        self._is_of_chats = bool(recipe["corpus"].get("messages_column"))
        self._is_generated = is_generated(recipe)
        self._backend = backend_copy(tokenizer, match_special=self._is_of_chats)
        self._added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._encoder = Encoder(
            tokenizer,
            max_length=sequences.max_length,
            long_documents=sequences.long_documents,
            bos=sequences.bos,
            eos="never" if self._is_generated else sequences.eos,
            chats=_NoChats() if self._is_of_chats else None,
        )
        self._prefix, self._suffix = self._encoder.prefix, self._encoder.suffix
        for name, found in (("prefix_ids", self._prefix), ("suffix_ids", self._suffix)):
            if found != manifest["teacher"][name]:
                raise ValueError(
                    f"the teacher at hand is not the dataset's: teacher.{name}: {manifest['teacher'][name]} → {found}"
                )

    def problems(
        self, row: Spelled, before: Spelled | None = None, after: Spelled | None = None
    ) -> list[str]:
        """What is wrong with a row, one line each.

        Args:
            row: of the dataset.
            before: the chunk before it, if there is one.
            after: the chunk behind it, if there is one.
        """
        if self._is_generated:
            return self._check_completion(row)
        if before is None and after is None and row.is_end and row.chunk_index == 0:
            is_right = self._spells_document(row)
        else:
            is_right = self._spells_chunk(row, before, after)
        return (
            [] if is_right else ["input_ids are not what the teacher's tokenizer makes of the text"]
        )

    def _spells_document(self, row: Spelled) -> bool:
        if self._is_of_chats:
            return self._spells_chat(row.text, row.input_ids)
        sequences = self._encoder.encode(Document(id="", text=row.text))
        return bool(sequences) and sequences[0].token_ids == row.input_ids

    def _spells_chat(self, text: str, ids: list[int]) -> bool:
        found = self._ids(text)
        return found == ids or (
            self._may_look_special(found, ids) and self._says_the_same(text, ids)
        )

    def _spells_chunk(self, row: Spelled, before: Spelled | None, after: Spelled | None) -> bool:
        """Whether the tokens of a chunk are those of its text within its document's."""
        texts = [part.text if part else "" for part in (before, row, after)]
        encoding = self._backend.encode("".join(texts), add_special_tokens=False)
        start, stop = len(texts[0]), len(texts[0]) + len(texts[1])
        places = [i for i, (place, _) in enumerate(encoding.offsets) if start <= place < stop]
        found = encoding.ids[places[0] : places[-1] + 1] if places else []
        bodies = [self._body(row)]
        if after is None and not row.is_end and self._suffix == bodies[0][-len(self._suffix) :]:
            bodies.append(bodies[0][: -len(self._suffix)])  # it may have been cut there, or not
        is_whole = (before or row.chunk_index == 0) and (after or row.is_end)
        return any(self._is_spelled(row.text, found, ids, squeeze=not is_whole) for ids in bodies)

    def _is_spelled(self, text: str, found: list[int], ids: list[int], *, squeeze: bool) -> bool:
        if found == ids:
            return True
        return self._says_the_same(text, ids, squeeze=squeeze) and (
            self._may_look_special(found, ids) or _agree_inside(found, ids)
        )

    def _check_completion(self, row: Spelled) -> list[str]:
        """Whether a prompt and its completion by the teacher are what the text says."""
        ids = row.input_ids
        written = spell_completion(self._tokenizer, ids, row.num_prompt)
        if not row.text.endswith(written):
            return ["the text does not end with what the completion's tokens spell"]
        text, prompt = row.text[: len(row.text) - len(written)], ids[: row.num_prompt]
        if self._is_of_chats:
            is_right = self._spells_chat(text, prompt)
        else:
            encoded = self._encoder.encode_prompt(Document(id="", text=text))
            is_right = encoded is not None and encoded.token_ids == prompt
        return (
            []
            if is_right
            else ["input_ids are not what the teacher's tokenizer makes of the prompt"]
        )

    def _body(self, row: Spelled) -> list[int]:
        """The tokens of a row without those that the encoder puts around a text."""
        first = 0 if self._is_of_chats and row.chunk_index == 0 else len(self._prefix)
        last = len(self._suffix) if row.is_end else 0
        return row.input_ids[first : len(row.input_ids) - last]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _may_look_special(self, found: list[int], ids: list[int]) -> bool:
        """Whether a message may hold what looks like a special token, which is then the text that it is."""
        counts = [sum(token in self._added for token in some) for some in (found, ids)]
        return self._is_of_chats and counts[0] != counts[1]

    def _says_the_same(self, text: str, ids: list[int], *, squeeze: bool = True) -> bool:
        """Whether tokens spell a text, or what is left of it behind the tokenizer's normaliser; spaces apart, if `squeeze`."""
        spelled, again = self._spell(ids), self._spell(self._ids(text))
        if squeeze:
            text, spelled, again = (_squeezed(one) for one in (text, spelled, again))
        return spelled in (text, again)

    def _spell(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


def _agree_inside(found: list[int], ids: list[int]) -> bool:
    """Whether two ways to cut a text differ near its ends only."""
    inner = ids[BORDER_TOKENS:-BORDER_TOKENS]
    places = (i for i, token in enumerate(found) if inner and token == inner[0])
    return not inner or any(found[i : i + len(inner)] == inner for i in places)


def _squeezed(text: str) -> str:
    return "".join(text.split())


class _NoChats:
    """Stands for the chat template: messages are not in a dataset, so that nothing is rendered."""

    def turns(self, document: Document) -> list[Document]:
        """None."""
        raise AssertionError

    def __call__(self, document: Document) -> Tokens:
        """None."""
        raise AssertionError
