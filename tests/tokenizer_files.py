"""Kinds of tokenizers that teachers have, as tokenizer.json files that were trained here, and a page of text that is hard to cut."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.conftest import TRAINING_TEXT

BOS, EOS = "<s>", "</s>"
SPECIAL = ["<unk>", BOS, EOS]
VOCAB_SIZE = 700
"""Of each kind, at most."""

CORPUS = [
    *TRAINING_TEXT,
    " ".join(str(i * 37 % 1_000_000) for i in range(4000)),
    "def f(x):\n    return x\n\n\n  if  x:   \n\t\tpass\n" * 20,
    "don't you'll WE'RE  two   spaces    four e\u0301 é ﬁ 가각 東京都 🙂 Привет नमस्ते " * 20,
]

HARD_DOCUMENTS = [
    "In 2023 it cost 650841823 dollars, 1,000.50 or x²½Ⅷ٣.",
    " one space before, 12 345",
    "   three spaces  before\n\n\n and  runs   of    spaces     within ",
    "\n\na newline\r\nfirst\tand tabs\t\tthen 007",
    "def f(x):\n    if x[0] != 1:\n        return {'a': x}  # 2 + 2\n",
    "don't, I'LL, they're — “quoted” 'S",
    "naïve cafe\u0301 \u1e9b\u0323 ﬁne \u2126 ﷺ a\u00a0b\u200bc",
    "東京都は、日本。가각 한글 Привет, мир 12",
    "שלום عالم नमस्ते 🙂👩‍👩‍👧‍👦🦕 e\u0301",
    f"a text with {EOS} and {BOS} in it, and <unk>",
]
"""Digits, spaces, newlines, code, apostrophes, normal forms, scripts, emoji, and what looks like special tokens."""

GPT4_LIKE = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CJK = r"[一-龥぀-ゟ゠-ヿ]+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def around(before: bool, behind: bool) -> processors.TemplateProcessing:
    """A post-processor that puts BOS before a text, EOS behind it, both or neither."""
    single = " ".join([BOS] * before + ["$A"] + [EOS] * behind)
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[(BOS, 1), (EOS, 2)]
    )


def byte_level(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, trainers.BpeTrainer, initial_alphabet=alphabet)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def sentencepiece(pre_tokenizer: Any, normalizer: Any, *, strip: int = 1) -> Tokenizer:
    """A BPE with byte fallback, as converted from a sentencepiece model."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    _train(trained, trainers.BpeTrainer, limit_alphabet=80)
    learned = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [p for p in sorted(learned["vocab"], key=learned["vocab"].get) if p not in SPECIAL]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.add_special_tokens(SPECIAL)
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", strip, 0)] * bool(strip))])
    backend.post_processor = around(True, False)
    return backend


def metaspace(scheme: str) -> Tokenizer:
    """As newer conversions of Llama 2 and Mistral."""
    return sentencepiece(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False), None)


def unigram() -> Tokenizer:
    """As T5's and XLM-RoBERTa's: a Unigram model behind NFKC, EOS behind a text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    _train(backend, trainers.UnigramTrainer, unk_token="<unk>")
    backend.post_processor = around(False, True)
    return backend


def word_piece() -> Tokenizer:
    """As BERT's, but it keeps case."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _train(backend, trainers.WordPieceTrainer)
    backend.post_processor = processors.BertProcessing((EOS, 2), (BOS, 1))
    return backend


def _train(backend: Tokenizer, trainer: Any, **options: Any) -> None:
    options = {"special_tokens": SPECIAL, "show_progress": False, **options}
    backend.train_from_iterator(CORPUS, trainer(vocab_size=VOCAB_SIZE - 256, **options) if trainer is not trainers.BpeTrainer else trainer(vocab_size=VOCAB_SIZE - 256 * ("limit_alphabet" in options), **options))  # fmt: skip


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 with a space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "llama3": lambda: byte_level(pre_tokenizers.Sequence([_split(GPT4_LIKE), BYTES])),
    "qwen": lambda: byte_level(
        pre_tokenizers.Sequence([_split(GPT4_LIKE.replace("{1,3}", "")), BYTES]), normalizers.NFC()
    ),
    "deepseek": lambda: byte_level(
        pre_tokenizers.Sequence([_split(r"\p{N}{1,3}"), _split(CJK), _split(GPT4_LIKE), BYTES]),
        normalizers.Sequence([]),
    ),
    "mistral": lambda: metaspace("first"),
    "always a space": lambda: metaspace("always"),
    "never a space": lambda: metaspace("never"),
    "llama2": lambda: sentencepiece(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "gemma": lambda: sentencepiece(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), strip=0
    ),
    "unigram": unigram,
    "word piece": word_piece,
}
"""Named after models that have one like it."""


@cache
def content(kind: str) -> str:
    """A tokenizer.json of a kind."""
    return KINDS[kind]().to_str()


def write_tokenizer(
    directory: Path, kind: str, class_name: str | None = None, /, **config: Any
) -> Path:
    """Write a tokenizer as a checkpoint has it: tokenizer.json of a kind, and a tokenizer_config.json that names a class.

    Returns:
        Path of tokenizer.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}
    if class_name:
        names["tokenizer_class"] = class_name
    path = directory / "tokenizer.json"
    path.write_text(content(kind), encoding="utf-8")
    text = json.dumps({key: v for key, v in {**names, **config}.items() if v is not ...})
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return path
