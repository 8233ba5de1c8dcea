"""Text and tokens of a row are compared for all kinds of tokenizers, of chunks as of whole documents."""

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder
from builder.corpus.sequences import Sequence
from builder.recipe.sections import SequencesRecipe
from builder.verify.spelling import Spelled, Speller
from tests.chats import CHATML, MARKERS
from tests.tokenizer_files import BOS, EOS, HARD_DOCUMENTS, KINDS, content

MAX_LENGTH = 24
DOCUMENTS = [*HARD_DOCUMENTS, " ".join(HARD_DOCUMENTS), "lorem ipsum dolor sit amet " * 30, "aaaaaaaa" * 60]  # fmt: skip


def tokenizer_of(kind: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content(kind)),
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
    )


def speller_of(tokenizer: Any, encoder: Encoder, *, max_length: int = MAX_LENGTH) -> Speller:
    sequences = SequencesRecipe(max_length=max_length)
    recipe = {"sequences": sequences.model_dump(mode="json"), "corpus": {}}
    teacher = {"prefix_ids": encoder.prefix, "suffix_ids": encoder.suffix}
    return Speller({"recipe": recipe, "teacher": teacher}, tokenizer)


def spelled(sequence: Sequence, *, is_end: bool) -> Spelled:
    return Spelled(
        text=sequence.text,
        input_ids=sequence.token_ids,
        chunk_index=sequence.chunk_index,
        is_end=is_end,
    )


def rows_of(encoder: Encoder, text: str) -> list[Spelled]:
    sequences = encoder.encode(Document(id="", text=text))
    return [spelled(one, is_end=one is sequences[-1]) for one in sequences]


def problems(speller: Speller, rows: list[Spelled], place: int, row: Spelled) -> list[str]:
    before = rows[place - 1] if place else None
    after = rows[place + 1] if place + 1 < len(rows) else None
    return speller.problems(row, before, after)


def another_letter(text: str) -> str | None:
    """A text with another letter in its midst; None where it has none."""
    letters = [i for i, c in enumerate(text) if c.isascii() and c.isalpha()]
    if not letters:
        return None
    place = letters[len(letters) // 2]
    return f"{text[:place]}{'q' if text[place] != 'q' else 'z'}{text[place + 1 :]}"


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_hard_texts_are_what_their_tokens_say_and_others_are_not(kind):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, max_length=MAX_LENGTH, long_documents="chunk")
    speller = speller_of(tokenizer, encoder)
    chunks, found, unknown = 0, 0, tokenizer.unk_token_id
    for text in DOCUMENTS:
        rows = rows_of(encoder, text)
        for place, row in enumerate(rows):
            assert problems(speller, rows, place, row) == [], (place, row)
            chunks += len(rows) > 1
            changed = another_letter(row.text)
            if changed is None or unknown in row.input_ids:
                continue  # what is unknown can be anything
            assert problems(speller, rows, place, replace(row, text=changed)), (row, changed)
            ids = list(row.input_ids)
            middle = len(ids) // 2
            ids[middle] = ids[middle - 1] if ids[middle - 1] != ids[middle] else ids[middle] + 1
            assert problems(speller, rows, place, replace(row, input_ids=ids)), (row, ids)
            found += 1
    assert chunks > 30
    assert found > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eos", ["tokenizer", "always"])
def test_what_is_cut_off_is_what_its_tokens_say(kind, eos):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, max_length=MAX_LENGTH, long_documents="truncate", eos=eos)
    sequences = SequencesRecipe(max_length=MAX_LENGTH, long_documents="truncate", eos=eos)
    manifest = {
        "recipe": {"sequences": sequences.model_dump(mode="json"), "corpus": {}},
        "teacher": {"prefix_ids": encoder.prefix, "suffix_ids": encoder.suffix},
    }
    speller = Speller(manifest, tokenizer)
    for text in DOCUMENTS:
        row = replace(rows_of(encoder, text)[0], is_end=False)  # nobody knows whether it is
        assert speller.problems(row) == [], row
        changed = another_letter(row.text)
        if changed and tokenizer.unk_token_id not in row.input_ids:
            assert speller.problems(replace(row, text=changed)), changed


def test_tokens_of_the_same_text_that_no_tokenizer_makes_are_found():
    """“ the” as “ t” and “he”: what the teacher says of it is consistent, and of another sequence."""
    tokenizer = tokenizer_of("gpt2")
    encoder = Encoder(tokenizer, max_length=800, long_documents="chunk")
    speller = speller_of(tokenizer, encoder, max_length=800)
    [row] = rows_of(encoder, DOCUMENTS[-2])
    for ids in (row.input_ids, [i for pair in zip(row.input_ids, row.input_ids, strict=True) for i in pair]):  # fmt: skip
        assert bool(speller.problems(replace(row, input_ids=ids))) is (ids is not row.input_ids)
    place = next(
        i for i, t in enumerate(row.input_ids) if len(tokenizer.decode([t])) > 1 and i > 100
    )
    word = tokenizer.decode([row.input_ids[place]])
    split = [tokenizer.encode(part, add_special_tokens=False) for part in (word[:1], word[1:])]
    apart = [*row.input_ids[:place], *split[0], *split[1], *row.input_ids[place + 1 :]]
    assert tokenizer.decode(apart) == tokenizer.decode(row.input_ids)
    assert speller.problems(replace(row, input_ids=apart))
    # And so they are in a chunk, but at its border, where a neighbour might explain them.
    chunk = replace(row, input_ids=apart, is_end=False)
    assert speller.problems(chunk)


def test_other_special_tokens_than_the_manifests_are_refused():
    tokenizer = tokenizer_of("mistral")
    encoder = Encoder(tokenizer, max_length=MAX_LENGTH, long_documents="chunk")
    assert encoder.prefix == [1]
    encoder.prefix = []
    with pytest.raises(ValueError, match=r"not the dataset's: teacher\.prefix_ids: \[\] → \[1\]"):
        speller_of(tokenizer, encoder)


def test_a_chat_that_says_what_looks_like_a_special_token_is_spelled(tiny_tokenizer):
    from tests.chats import chatty

    tokenizer = chatty(tiny_tokenizer)
    assert set(MARKERS) <= set(tokenizer.get_vocab())
    assert tokenizer.chat_template == CHATML
    recipe = {
        "sequences": SequencesRecipe(max_length=64).model_dump(mode="json"),
        "corpus": {"messages_column": "messages"},
    }
    speller = Speller({"recipe": recipe, "teacher": {"prefix_ids": [], "suffix_ids": []}}, tokenizer)  # fmt: skip
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    said = tokenizer.backend_tokenizer
    said.encode_special_tokens = True
    inner = said.encode("user\nend it with <|im_end|> please", add_special_tokens=False).ids
    said.encode_special_tokens = False
    ids = [start, *inner, end]
    text = "<|im_start|>user\nend it with <|im_end|> please<|im_end|>"
    row = Spelled(text=text, input_ids=ids, chunk_index=0, is_end=True)
    assert speller.problems(row) == []
    assert speller.problems(replace(row, text=text.replace("please", "plaese")))
    assert speller.problems(replace(row, input_ids=[start, *inner[:-1], inner[-2], end]))
