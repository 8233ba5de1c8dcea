"""Tokenizers of all kinds that models come with, trained on a few lines."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.corpus.test_sequences import TRAINING_TEXT, llama_like, word_piece

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
TEXT = [
    *TRAINING_TEXT,
    "def f(x):\n    return x  # ok\n\n\nclass A:\n\tpass\n",
    "don't we'll they're  1234567 \n\n 12, leading.  Trailing  ",
    "東京 大阪。 東京、\n http://x.y/z?a=1",
] * 4


def bytes_after(*before: Any, regex: bool = False, prefix: bool = False, **options: Any) -> Any:
    """ByteLevel behind other pre-tokenizers, as most models have it."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    return bpe(pre_tokenizers.Sequence([*before, last]), **options)


def bpe(
    pre_tokenizer: Any, normalizer: Any = None, added: tuple[Any, ...] = (), **options: Any
) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens(list(added))
    return backend


def without(unknown: str, backend: Tokenizer) -> Tokenizer:
    """A vocabulary that lacks some bytes, as SmolLM2's does: the model leaves them out of the tokens of a text."""
    found = json.loads(backend.to_str())
    model = found["model"]
    model["merges"] = [pair for pair in model["merges"] if not set("".join(pair)) & set(unknown)]
    left = [token for token in model["vocab"] if not set(token) & set(unknown)]
    model["vocab"] = {token: number for number, token in enumerate(left)}
    found["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(found))


def unigram(pre_tokenizer: Any, *normalizer: Any) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(list(normalizer))
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def of_llama(pre_tokenizer: Any, normalizer: Any) -> Tokenizer:
    backend: Tokenizer = llama_like(pre_tokenizer, normalizer).backend_tokenizer
    return backend


ADDED = (
    AddedToken("<think>", normalized=False),
    AddedToken("fox", single_word=True, normalized=False),
    AddedToken("[X]", lstrip=True, normalized=False),
    AddedToken("[Y]", rstrip=True),
    AddedToken("ab"),
)
SPACES = tuple(AddedToken(" " * count) for count in range(2, 6))

CUT: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: bytes_after(regex=True),
    "prefix space": lambda: bytes_after(regex=True, prefix=True),
    "llama3": lambda: bytes_after(split(LLAMA3)),
    "gpt4o": lambda: bytes_after(split(GPT4O)),
    "bloom": lambda: bytes_after(split(BLOOM)),
    "falcon": lambda: bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                split("[0-9][0-9][0-9]"),
            ]
        )
    ),
    "smollm": lambda: bytes_after(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "smollm, some bytes unknown": lambda: without(
        "Ąäåç®", bytes_after(pre_tokenizers.Digits(individual_digits=True), regex=True)
    ),
    "digits, some bytes unknown": lambda: without(
        "å", bytes_after(pre_tokenizers.Digits(individual_digits=True))
    ),
    "llama3, some letters unknown": lambda: without("aoä®å", bytes_after(split(LLAMA3))),
    "deepseek": lambda: bytes_after(
        split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK)
    ),
    "NFC": lambda: bytes_after(regex=True, normalizer=normalizers.NFC()),
    "NFKC": lambda: bytes_after(regex=True, normalizer=normalizers.NFKC()),
    "added spaces": lambda: bytes_after(regex=True, normalizer=normalizers.NFC(), added=SPACES),
    "added tokens": lambda: bytes_after(split(LLAMA3), added=ADDED),
    "merged with previous": lambda: bytes_after(split(r"\s+", "merged_with_previous")),
    "merged with next": lambda: bytes_after(split(r"\s+", "merged_with_next")),
    "removed": lambda: bytes_after(split("[,.]", "removed")),
    "ignore merges": lambda: bytes_after(split(LLAMA3), ignore_merges=True),
    "llama2, Metaspace": lambda: of_llama(
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None
    ),
    "llama2, Prepend": lambda: of_llama(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "gemma": lambda: of_llama(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    ),
    "bert": lambda: word_piece().backend_tokenizer,
    "unigram": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "t5": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        normalizers.NFKC(),
        normalizers.Replace(Regex(" {2,}"), " "),
    ),
    "xlm-r": lambda: unigram(
        pre_tokenizers.Metaspace(),
        normalizers.Nmt(),
        normalizers.NFKC(),
        normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ),
    "albert": lambda: unigram(
        pre_tokenizers.Metaspace(),
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Strip(),
    ),
}
"""Those whose texts can be cut."""
WHOLE: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "scripts": (lambda: bytes_after(pre_tokenizers.UnicodeScripts()), "pre-tokenizer UnicodeScripts"),
    "fixed length": (lambda: bytes_after(pre_tokenizers.FixedLength(3)), "pre-tokenizer FixedLength"),
    "word boundaries": (lambda: bytes_after(split(r"\b")), r"the pattern .*b.* of its pre-tokenizer"),
    "unknown characters": (lambda: bpe(pre_tokenizers.Whitespace()), "its model, which leaves out characters"),
    "dropout": (lambda: bytes_after(regex=True, dropout=0.1), "tokens that are drawn at random"),
}  # fmt: skip
"""Those of which it is not known where, and why."""
