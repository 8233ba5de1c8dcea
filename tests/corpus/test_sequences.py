"""`Encoder` on any text with tokenizers of several makes, and batches of sequences of like length."""

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from builder.corpus.documents import Document
from builder.corpus.encoder import Encoder, backend_copy
from builder.corpus.sequences import NO_TOKEN, Sequence, length_sorted_batches

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog. A dataset of distributions, token by token.",
    "Grüße aus München – naïve café, 東京 and Москва; שלום عالم 👩‍👩‍👧‍👦🙂 12345 67890",
]
TRICKY = [
    "👩‍👩‍👧‍👦",  # seven code points, 25 bytes
    "🙂🙃",
    "e\u0301o\u0308\u0323",  # combining marks
    "שלום عالم",  # right to left
    "\x00",
    "\u3000",  # ideographic space
    "\u2581",  # Metaspace's own sign
    "ﬃ ㍿ İ ß",  # grow under NFKC, or when lower-cased
    "  \n\t\r\n ",
    "The quick brown fox",
    "<eos>",
    "</s><s>[SEP]<|endoftext|>",
    "東京",
    "\ufffd",
    "\u0b95\u0bcd\u0bb7",
    " ",
]
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(TRICKY), max_size=12).map("".join)


def byte_level(**options: Any) -> PreTrainedTokenizerFast:
    """Like GPT-2's: bytes, offsets trimmed of spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def gpt2_like() -> PreTrainedTokenizerFast:
    return byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def without_eos() -> PreTrainedTokenizerFast:
    return byte_level()


def llama_like(pre_tokenizer: Any, normalizer: Any) -> PreTrainedTokenizerFast:
    """Like Llama 2's: Metaspace, byte fallback, and <s> before every text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(
        TRAINING_TEXT[:1] * 4, trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama_metaspace() -> PreTrainedTokenizerFast:
    return llama_like(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None)


def llama_normalizer() -> PreTrainedTokenizerFast:
    """The older form: no pre-tokenizer, so that a whole document is one word."""
    return llama_like(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT's: lower case, drops spaces, [CLS] before and [SEP] after a text."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special_tokens = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=special_tokens, show_progress=False
    )
    backend.train_from_iterator(TRAINING_TEXT * 4, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


def compatibility_composed() -> PreTrainedTokenizerFast:
    """Bytes after NFKC: one character of the text may become several tokens of several characters."""
    tokenizer = byte_level(eos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


MAKERS = (
    gpt2_like,
    without_eos,
    llama_metaspace,
    llama_normalizer,
    word_piece,
    compatibility_composed,
)
BYTE_LEVEL = ("tiny", "gpt2_like", "without_eos")


@pytest.fixture(scope="module")
def tokenizers_by_name(tiny_tokenizer: Any) -> dict[str, Any]:
    return {"tiny": tiny_tokenizer, **{maker.__name__: maker() for maker in MAKERS}}


every_tokenizer = pytest.mark.parametrize("name", ["tiny", *(maker.__name__ for maker in MAKERS)])
any_text = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def encode(tokenizer: Any, text: str, max_length: int, **options: Any) -> list[Sequence]:
    options = {"long_documents": "chunk", "bos": "never", "eos": "never", **options}
    encoder = Encoder(tokenizer, max_length=max_length, **options)
    return encoder.encode(Document(id="the id", text=text))


def ids_of_the_whole(tokenizer: Any, text: str) -> list[int]:
    """What transformers itself says, special tokens in the text taken as text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@every_tokenizer
@any_text
@given(text=TEXTS, max_length=st.integers(2, 20))
def test_chunks_join_to_the_document(tokenizers_by_name, name, text, max_length):
    tokenizer = tokenizers_by_name[name]
    sequences = encode(tokenizer, text, max_length)
    expected = ids_of_the_whole(tokenizer, text)
    assert [i for sequence in sequences for i in sequence.token_ids] == expected
    if expected:
        assert "".join(sequence.text for sequence in sequences) == text
    assert all(1 <= len(sequence.token_ids) <= max_length for sequence in sequences)
    assert [sequence.chunk_index for sequence in sequences] == list(range(len(sequences)))
    assert {sequence.document_id for sequence in sequences} <= {"the id"}
    eos = NO_TOKEN if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    following = [sequence.token_ids[0] for sequence in sequences[1:]]
    if sequences:
        assert [sequence.next_token for sequence in sequences] == [*following, eos]


@pytest.mark.parametrize("name", BYTE_LEVEL)
@any_text
@given(text=TEXTS, max_length=st.integers(12, 24))
def test_a_chunk_spells_its_text_and_cuts_no_character(tokenizers_by_name, name, text, max_length):
    tokenizer = tokenizers_by_name[name]
    for sequence in encode(tokenizer, text, max_length):
        assert sequence.text
        assert tokenizer.decode(sequence.token_ids, skip_special_tokens=False) == sequence.text


@pytest.mark.parametrize("name", ["llama_metaspace", "llama_normalizer"])
@any_text
@given(text=TEXTS.map(lambda text: re.sub("[\ufffd▁]", "", text)), max_length=st.integers(12, 24))
def test_fallback_bytes_of_a_character_stay_together(tokenizers_by_name, name, text, max_length):
    tokenizer = tokenizers_by_name[name]
    for sequence in encode(tokenizer, text, max_length):
        decoded = tokenizer.decode(sequence.token_ids)
        prefixes = (
            ("", " ") if sequence.chunk_index == 0 else ("",)
        )  # both put a space before a text
        assert decoded in {prefix + sequence.text for prefix in prefixes}


@every_tokenizer
@any_text
@given(text=TEXTS, max_length=st.integers(4, 12))
def test_truncating_keeps_the_first_chunk_and_what_really_follows(
    tokenizers_by_name, name, text, max_length
):
    tokenizer = tokenizers_by_name[name]
    chunks = encode(tokenizer, text, max_length)
    assert encode(tokenizer, text, max_length, long_documents="truncate") == chunks[:1]


@every_tokenizer
@any_text
@given(text=TEXTS, max_length=st.integers(4, 12))
def test_special_tokens_stand_around_the_text_and_count(tokenizers_by_name, name, text, max_length):
    tokenizer = tokenizers_by_name[name]
    if tokenizer.eos_token_id is None or tokenizer.bos_token_id is None:
        return
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sequences = encode(tokenizer, text, max_length, bos="always", eos="always")
    plain = encode(tokenizer, text, max_length - 2)
    assert [sequence.text for sequence in sequences] == [sequence.text for sequence in plain]
    for index, (sequence, content) in enumerate(zip(sequences, plain, strict=True)):
        is_last = index == len(plain) - 1
        assert sequence.token_ids == [bos, *content.token_ids, *([eos] if is_last else [])]
        assert sequence.next_token == (eos if is_last else plain[index + 1].token_ids[0])
        assert len(sequence.token_ids) <= max_length


@pytest.mark.parametrize(
    ("name", "bos", "eos", "before", "after"),
    [
        ("tiny", "tokenizer", "tokenizer", [], []),
        ("tiny", "tokenizer", "always", [], ["<eos>"]),
        ("gpt2_like", "tokenizer", "tokenizer", [], []),
        ("gpt2_like", "always", "never", ["<|endoftext|>"], []),
        ("llama_metaspace", "tokenizer", "tokenizer", ["<s>"], []),
        ("llama_metaspace", "always", "always", ["<s>"], ["</s>"]),
        ("llama_metaspace", "never", "tokenizer", [], []),
        ("llama_normalizer", "tokenizer", "never", ["<s>"], []),
        ("word_piece", "tokenizer", "tokenizer", ["[CLS]"], ["[SEP]"]),
        ("word_piece", "never", "never", [], []),
        ("without_eos", "tokenizer", "tokenizer", [], []),
    ],
)
def test_which_special_tokens_are_added(tokenizers_by_name, name, bos, eos, before, after):
    tokenizer = tokenizers_by_name[name]
    text = "the quick dog over a token of 東京 and 12345 lazy foxes"
    (sequence,) = encode(tokenizer, text, 100, bos=bos, eos=eos)
    tokens = tokenizer.convert_ids_to_tokens(sequence.token_ids)
    assert tokens == [*before, *tokenizer.tokenize(text), *after]
    assert sequence.text == text
    first, *middle, last = encode(tokenizer, text, 5, bos=bos, eos=eos)
    assert middle
    assert all(chunk.token_ids[: len(before)] == first.token_ids[: len(before)] for chunk in middle)
    assert (
        last.token_ids[len(last.token_ids) - len(after) :]
        == sequence.token_ids[len(sequence.token_ids) - len(after) :]
    )


def template(single: str) -> Any:
    tokens = [("[CLS]", 1), ("[SEP]", 2)]
    return processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=tokens)


POST_PROCESSORS = [
    (None, [], []),
    (processors.ByteLevel(trim_offsets=True), [], []),
    (template("[CLS] $A"), [1], []),
    (template("$A [SEP]"), [], [2]),
    (template("[CLS] [SEP] $A:1 [SEP] [CLS]"), [1, 2], [2, 1]),
    (template("[CLS] $A [SEP]"), [1], [2]),
    (processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)), [1], [2]),
    (processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)), [1], [2]),
    (processors.Sequence([processors.ByteLevel(), template("[CLS] $A")]), [1], []),
]


@pytest.mark.parametrize(("processor", "before", "behind"), POST_PROCESSORS)
def test_special_tokens_are_those_of_the_post_processor_whatever_letters_there_are(
    processor, before, behind
):
    """A vocabulary of DNA has no "a", with which one could try."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "G": 3, "T": 4}
    for unknown in ("[UNK]", None):
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
        if processor:
            backend.post_processor = processor
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="[CLS]", eos_token="[SEP]"
        )
        (sequence,) = encode(tokenizer, "GTTG", 12, bos="tokenizer", eos="tokenizer")
        assert sequence.token_ids == [*before, 3, 4, 4, 3, *behind]
        (bare,) = encode(tokenizer, "GTTG", 12, bos="never", eos="never")
        assert bare.token_ids == [3, 4, 4, 3]


@pytest.mark.parametrize(("single", "times"), [("[CLS]", 0), ("$A [SEP] $A", 2)])
def test_a_post_processor_that_does_not_write_a_text_once_is_refused(single, times):
    tokenizer = word_piece()
    tokenizer.backend_tokenizer.post_processor = template(single)
    with pytest.raises(ValueError, match=f"writes a text {times} times into a sequence"):
        encode(tokenizer, "a", 12, bos="tokenizer", eos="tokenizer")


@pytest.mark.parametrize(
    ("name", "wish"), [("tiny", "bos"), ("without_eos", "bos"), ("without_eos", "eos")]
)
def test_asking_for_a_token_that_the_tokenizer_lacks_is_refused(tokenizers_by_name, name, wish):
    with pytest.raises(
        ValueError, match=rf"sequences\.{wish} is 'always', but .* has no {wish} token"
    ):
        encode(tokenizers_by_name[name], "a", 8, **{wish: "always"})


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("tiny", "<eos>"),
        ("gpt2_like", "<|endoftext|>"),
        ("llama_metaspace", "</s>"),
        ("llama_normalizer", "<s>"),
        ("word_piece", "[SEP]"),
    ],
)
def test_a_document_cannot_spell_a_special_token(tokenizers_by_name, name, special):
    tokenizer = tokenizers_by_name[name]
    special_id = tokenizer.convert_tokens_to_ids(special)
    text = f"A text{special} that ends {special}"
    assert special_id in tokenizer.encode(text, add_special_tokens=False)
    (sequence,) = encode(tokenizer, text, 500)
    assert sequence.text == text
    assert not set(sequence.token_ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert special_id in tokenizer.encode(text, add_special_tokens=False), (
        "the original is as before"
    )


@every_tokenizer
def test_a_document_without_tokens_has_no_sequences(tokenizers_by_name, name):
    assert encode(tokenizers_by_name[name], "", 8, eos="tokenizer", bos="tokenizer") == []


def test_spaces_that_make_no_tokens_have_no_sequences(tokenizers_by_name):
    assert encode(tokenizers_by_name["word_piece"], " \n\t\x00", 8) == []


@pytest.mark.parametrize("name", ["tiny", "gpt2_like", "llama_metaspace", "llama_normalizer"])
@pytest.mark.parametrize("max_length", [1, 2, 3])
def test_a_character_longer_than_a_chunk_is_cut_and_ends(tokenizers_by_name, name, max_length):
    tokenizer = tokenizers_by_name[name]
    text = "a🦕🦕 b"
    sequences = encode(tokenizer, text, max_length)
    assert [i for s in sequences for i in s.token_ids] == ids_of_the_whole(tokenizer, text)
    assert "".join(sequence.text for sequence in sequences) == text
    assert all(1 <= len(sequence.token_ids) <= max_length for sequence in sequences)


def test_a_cut_moves_back_to_the_start_of_a_character(tiny_tokenizer):
    assert len(tiny_tokenizer.encode("ab")) == 2
    assert len(tiny_tokenizer.encode("🦕")) == 3
    first, second = encode(tiny_tokenizer, "ab🦕", 4)
    assert (first.text, second.text) == ("ab", "🦕")
    assert first.next_token == second.token_ids[0]
    assert [len(s.token_ids) for s in encode(tiny_tokenizer, "🦕🦕🦕", 8)] == [6, 3]


def test_special_tokens_that_leave_no_room_are_refused(tokenizers_by_name):
    with pytest.raises(ValueError, match="max_length is 2, but special tokens alone take 2"):
        encode(tokenizers_by_name["word_piece"], "a", 2, bos="tokenizer", eos="tokenizer")


def test_a_token_of_spaces_belongs_to_its_own_chunk_although_offsets_are_trimmed():
    tokenizer = gpt2_like()
    sequences = encode(tokenizer, "The quick   brown fox \n jumps", 4)
    for sequence in sequences:
        assert tokenizer.decode(sequence.token_ids) == sequence.text


def test_a_tokenizer_that_pads_or_truncates_by_itself_is_not_changed_by_it(tiny_tokenizer):
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    text = "The quick brown fox jumps over the lazy dog."
    (sequence,) = encode(tokenizer, text, 500)
    assert sequence.token_ids == tiny_tokenizer.encode(text)


def test_targets_are_the_ids_moved_by_one_and_the_next_token():
    sequence = Sequence(
        document_id="", chunk_index=0, text="", token_ids=[5, 6, 7], next_token=NO_TOKEN
    )
    assert sequence.targets == [6, 7, NO_TOKEN]


@pytest.mark.parametrize(
    ("name", "repeated"),
    [("tiny", "The quick brown fox jumps over 🦕. "), ("llama_normalizer", "東京abcdefghij🦕")],
    ids=["words", "one word"],
)
def test_five_megabytes_on_one_line(tokenizers_by_name, name, repeated):
    """Thousands of chunks: one more pass over the document for each of them would take an hour."""
    text = repeated * (5_000_000 // len(repeated.encode()))
    sequences = encode(tokenizers_by_name[name], text, 1024)
    assert "".join(sequence.text for sequence in sequences) == text
    lengths = [len(sequence.token_ids) for sequence in sequences]
    assert len(lengths) > 1000
    assert max(lengths) <= 1024
    assert min(lengths[:-1]) > 1024 - 4
    assert [s.next_token for s in sequences[:-1]] == [s.token_ids[0] for s in sequences[1:]]


LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 1000))
def test_batches_hold_every_sequence_once_within_the_limit_longest_first(lengths, batch_tokens):
    batches = length_sorted_batches(lengths, batch_tokens)
    assert all(batches)
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for number, batch in enumerate(batches, 1):
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= batch_tokens or len(batch) == 1
        if number < len(batches):  # no room was left for one more
            assert (len(batch) + 1) * longest > batch_tokens
    assert length_sorted_batches(lengths, batch_tokens) == batches


def test_batches_by_example():
    assert length_sorted_batches([3, 10, 3, 7, 1], 14) == [[1], [3, 0], [2, 4]]
    assert length_sorted_batches([5, 5, 5], 10) == [[0, 1], [2]]
    assert length_sorted_batches([50], 10) == [[0]]
    assert length_sorted_batches([], 10) == []


def test_a_token_that_is_called_like_a_setting_keeps_its_id():
    vocab = {"a": 0, "trim_offsets": 1, "b": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert backend_copy(tokenizer, match_special=False).encode("b trim_offsets").ids == [2, 1]
