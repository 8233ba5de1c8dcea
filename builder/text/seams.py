"""A tokenizer → the places of a text at which its tokens do not depend on what is on the other side.

In:   the backend of a fast tokenizer.
Out:  for a place of a text, whether it is a seam: the tokens of whatever text has these four characters there (two before the place, two
      behind it) are the tokens of what is before it, and then those of what is behind it, each independent of the other side.

How:  each step of the tokenizer is asked whether it reads across.
      - Added tokens: none holds the two characters around the place one after the other, begins or ends there, or takes spaces beside it.
      - Normalizers work on a character with its marks, or by a pattern (`patterns`). Only characters count that no normalizer joins to
        their neighbours, and whose kind is the same in all versions of Unicode. What each becomes is followed through the steps.
      - Pre-tokenizers work on a character, or by a pattern.
      - The model works on one word. So a place between two words is a seam. Within a word, it is one of a BPE model whose merges make
        no token that holds the two characters one after the other: no merge crosses it, so the merges of either side are those of that
        side alone. (Llama 2 takes a whole document for one word; there, it is the place before a space.)
      What a tokenizer puts at the start of a text only (`Prepend`, `Metaspace`) is nothing to a place inside of one.
      A step that is not known here leaves no seam, and says why.

Cost: half a second for a large tokenizer, then microseconds a place.
"""

import json
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from builder.text.character_classes import category
from builder.text.patterns import Pattern, literal, parse

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Of the pre-tokenizer ByteLevel."""
BY_CHARACTER = (
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "BertNormalizer",
    "Precompiled",
    "Nmt",
    "ByteLevel",
)
"""Normalizers that work on one character with its marks."""  # fmt: skip
SPLIT_BY_CHARACTER = (
    "Digits",
    "Punctuation",
    "WhitespaceSplit",
    "BertPreTokenizer",
    "CharDelimiterSplit",
)
"""Pre-tokenizers that split at characters of a kind."""  # fmt: skip
BY_WORD = ("BPE", "Unigram", "WordPiece", "WordLevel")
"""Models that make the tokens of a word from that word alone."""

BYTE_CHARACTERS = frozenset(pre_tokenizers.ByteLevel.alphabet()) - set("ÀÁõö÷øùúûüýþÿ")
"""What stands for bytes after ByteLevel, without those that UTF-8 never has: C0, C1 and F5 to FF, which stand for themselves."""

Images = tuple[frozenset[str], ...]
"""What four characters may have become, each."""
Step = Callable[[Images], Images | None]
"""What becomes of four characters; None if it may depend on the other side of the place between the second and the third."""


class Seams:
    """Finds the seams of texts for one tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        """Look at all steps of a tokenizer; it is not changed."""
        description = json.loads(backend.to_str())
        self._known: dict[str, tuple[bool, bool]] = {}
        self.obstacle: str | None = None
        """Why there are none."""
        self.leaves_out = False
        """Whether the model leaves out bytes that it does not know. The tokens behind one, in the same word, are then said to stand as many
        bytes earlier than they do."""
        self._steps: list[Step] = []
        try:
            normalizers = list(_flat(description["normalizer"], "normalizers"))
            added = description["added_tokens"]
            normalize = _normalize_by(description["normalizer"])
            self._steps.append(_added_tokens([t for t in added if not t["normalized"]], str))
            self._steps += map(_normalizer, normalizers)
            self._steps.append(_added_tokens([t for t in added if t["normalized"]], normalize))
            splitters = list(_flat(description["pre_tokenizer"], "pretokenizers"))
            for node in splitters:
                self._steps += _pre_tokenizer(node)
            are_bytes = any(node["type"] == "ByteLevel" for node in [*normalizers, *splitters])
            self._is_never_joined = _model(description["model"], are_bytes=are_bytes)
            model = description["model"]
            self.leaves_out = model["type"] == "BPE" and model["unk_token"] not in model["vocab"]
        except _ObstacleError as error:
            self.obstacle = str(error)

    def is_seam(self, around: str, *, is_between_words: bool) -> bool:
        """Whether a place between two tokens is a seam.

        Args:
            around: the two characters before the place and the two behind it; where there are fewer, there is no seam.
            is_between_words: whether the tokens belong to different words of the pre-tokenizer.
        """
        if self.obstacle or len(around) < 4:
            return False
        if around not in self._known:
            self._known[around] = self._judge(around)
        is_free, is_never_joined = self._known[around]
        return is_free and (is_between_words or is_never_joined)

    def _judge(self, around: str) -> tuple[bool, bool]:
        """Whether no step before the model reads across the place in the middle, and whether the model never does."""
        images: Images | None = tuple(frozenset([c]) for c in around)
        if not all(map(_stands_alone, around)):
            return False, False
        for step in self._steps:
            assert images is not None
            images = step(images)
            if images is None:
                return False, False
        assert images is not None
        return True, all(self._is_never_joined(a, b) for a, b in _beside(images))


class _ObstacleError(Exception):
    """A step of the tokenizer is not known here."""


@lru_cache(maxsize=4096)
def _stands_alone(character: str) -> bool:
    """Whether no normalizer joins a character to its neighbours, whatever its version of Unicode."""
    if character.isascii():
        return character.isprintable() or character in "\n\t"  # \r\n is one grapheme
    if category(character) not in (
        "Lu",
        "Ll",
        "Lt",
        "Lm",
        "Lo",
        "Nd",
        "Pc",
        "Pd",
        "Ps",
        "Pe",
        "Pi",
        "Pf",
        "Po",
    ):
        return False  # fmt: skip
    first = unicodedata.normalize("NFKD", character)[0]
    is_of_syllable = "\u1100" <= character <= "\u11ff" or "\u1100" <= first <= "\u115f"
    is_jamo = is_of_syllable and not "\uac00" <= character <= "\ud7a3"
    is_vowel_or_end = "\u1160" <= first <= "\u11ff"
    return not (is_jamo or is_vowel_or_end or unicodedata.category(first)[0] == "M")


def _beside(images: Images) -> list[tuple[str, str]]:
    """Which characters may stand before and behind the place."""
    return [(a[-1], b[0]) for a, b in product(images[1], images[2])]


def _flat(node: Any, key: str) -> Any:
    """The steps of a normalizer or a pre-tokenizer that may be a sequence of others."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for child in node[key]:
            yield from _flat(child, key)
    else:
        yield node


def _normalize_by(node: Any) -> Callable[[str], str]:
    if node is None:
        return str
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    alone = {"version": "1.0", "added_tokens": [], "normalizer": node, "model": empty}
    backend = Tokenizer.from_str(
        json.dumps(alone | dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder")))
    )  # fmt: skip
    found: Callable[[str], str] = backend.normalizer.normalize_str
    return found


def _added_tokens(tokens: list[dict[str, Any]], normalize: Callable[[str], str]) -> Step:
    """Special ones are among them: where they are not to be found in texts, they still hide others that they overlap."""
    contents = {found for token in tokens for found in (token["content"], normalize(token["content"])) if found}  # fmt: skip
    inner = {content[i : i + 2] for content in contents for i in range(len(content) - 1)}
    # By their two characters at the place; by one, where they have no more, or another is not certain.
    starts, ends = ({c[:2] for c in contents}, {c[-2:] for c in contents})
    first, last = ({c[0] for c in contents}, {c[-1] for c in contents})
    takes_left, takes_right = (
        any(token[side] for token in tokens) for side in ("lstrip", "rstrip")
    )

    def step(images: Images) -> Images | None:
        is_certain = all(len(image) == 1 and len(next(iter(image))) == 1 for image in images)
        before, a, b, behind = (next(iter(image)) for image in images)
        for one, other in _beside(images):
            if one + other in inner:
                return None
            if (one.isspace() and takes_right) or (
                one.isspace() and other.isspace() and takes_left
            ):
                return None
            if is_certain:
                if {before + a, a} & ends or {b + behind, b} & starts:
                    return None
            elif one in last or other in first:
                return None
        return images

    return step


def _normalizer(node: dict[str, Any]) -> Step:
    kind = node["type"]
    if kind == "Prepend":
        return lambda images: images
    if kind == "Strip":
        # Spaces at the place go only if all on one side of it go; ahead of it, they must not.
        return lambda images: None if any(a.isspace() for a, _ in _beside(images)) else images
    if kind == "Replace":
        return _replace(node)
    if kind in BY_CHARACTER:
        return _mapped(_normalize_by(node))
    raise _ObstacleError(f"its normalizer {kind}")


def _mapped(change: Callable[[str], str]) -> Step:
    """Each character becomes something, and not nothing."""

    def step(images: Images) -> Images | None:
        found = tuple(frozenset(map(change, image)) for image in images)
        return found if all(all(image) for image in found) else None

    return step


def _replace(node: dict[str, Any]) -> Step:
    pattern, is_character = _pattern(node["pattern"], "normalizer"), False
    content = node["content"]
    if (text := node["pattern"].get("String")) is not None:
        is_character = len(text) == 1

    def step(images: Images) -> Images | None:
        if any(pattern.reads(a, b) for a, b in _beside(images)):
            return None
        found = []
        for image in images:
            if is_character:
                image = frozenset(string.replace(text, content) for string in image)
            elif any(map(pattern.takes, "".join(image))):
                image = image | {content}
            if not all(image):
                return None
            found.append(image)
        return tuple(found)

    return step


def _pre_tokenizer(node: dict[str, Any]) -> list[Step]:
    kind = node["type"]
    if kind in SPLIT_BY_CHARACTER:
        return []
    if kind == "Split":
        return [_split(_pattern(node["pattern"], "pre-tokenizer"))]
    if kind == "Whitespace":
        return [_split(_pattern({"Regex": r"\w+|[^\w\s]+"}, "pre-tokenizer"))]
    if kind == "Metaspace":
        return [_mapped(lambda text: text.replace(" ", node["replacement"]))]
    if kind == "ByteLevel":
        steps = [_mapped(_normalize_by({"type": "ByteLevel"}))]
        if node.get("use_regex", True):
            steps.insert(0, _split(_pattern({"Regex": GPT2_PATTERN}, "pre-tokenizer")))
        return steps
    raise _ObstacleError(f"its pre-tokenizer {kind}")


def _split(pattern: Pattern) -> Step:
    return lambda images: None if any(pattern.reads(a, b) for a, b in _beside(images)) else images


def _pattern(description: dict[str, str], where: str) -> Pattern:
    if text := description.get("String"):
        return literal(text)
    found = parse(description.get("Regex", ""))
    if found is None:
        raise _ObstacleError(f"the pattern {description} of its {where}")
    return found


def _model(model: dict[str, Any], *, are_bytes: bool) -> Callable[[str, str], bool]:
    """For two characters of a word, whether no token can hold them one after the other; `are_bytes`: they stand for bytes."""
    if model["type"] not in BY_WORD or model.get("dropout") or model.get("alpha"):
        raise _ObstacleError(
            "tokens that are drawn at random"
            if model["type"] in BY_WORD
            else f"its model {model['type']}"
        )
    if model["type"] != "BPE":
        return lambda *_: False
    vocab, bytes_ = model["vocab"], {f"<0x{byte:02X}>" for byte in range(256)}
    # Unknown characters would become one token together, were they not spelled by their bytes.
    are_all_known = (model["byte_fallback"] and vocab.keys() >= bytes_) or (
        are_bytes and vocab.keys() >= BYTE_CHARACTERS
    )
    if not are_all_known and model["unk_token"] not in vocab:
        if not are_bytes:
            raise _ObstacleError("its model, which leaves out characters that it does not know,")
        return lambda *_: False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return lambda *_: False
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    joined = {(left[-1], right[0]) for left, right in merges}
    if model["ignore_merges"]:
        joined |= {pair for token in vocab for pair in pairwise(token)}
    if any(part in bytes_ for merge in merges for part in merge):
        return lambda *_: False

    def is_never_joined(one: str, other: str) -> bool:
        are_known = are_all_known or (one in vocab and other in vocab)
        return are_known and (one, other) not in joined

    return is_never_joined
