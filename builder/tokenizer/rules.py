"""Two tokenizers of the `tokenizers` library → where they follow other rules, and a text that shows it.

Rules are the parts of a tokenizer's description (its tokenizer.json) that decide the ids of a text and the text of ids: normalizer,
pre-tokenizer, model, added tokens and decoder. Options that make no difference to either are left out, so that equal rules mean equal
ids for every text. The post-processor, which puts special tokens around a text, is settled by itself.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

HARD_TEXTS = [
    "2023",
    "650841823",
    "1,000.50",
    "x²½Ⅷ٣",
    " a",
    "  a",
    "   two words",
    "a  b   c",
    "\ta\n\n b\r\n",
    "def f(x):\n    return {'a': x[0] != 1}",
    "don't I'LL",
    "naïve café",
    "é ẛ̣",
    "ﬁ Ω ﷺ",
    "東京都は、日本。",
    "가각 한글",
    "Привет, мир",
    "שלום عالم",
    "नमस्ते",
    "🙂👩\u200d👩\u200d👧\u200d👦🦕",
    "a\xa0b\u200bc",
    "Hello World!!!",
]
"""Digits, runs of spaces, leading spaces, newlines, code, scripts, combining marks, compatibility characters, emoji."""


def differing_parts(theirs: Tokenizer, ours: Tokenizer) -> list[str]:
    """The names of the parts in which the rules of two tokenizers differ, but for added tokens that ours does not know."""
    unknown = unknown_tokens(theirs, ours)
    one, other = (
        {
            "normalizer": _normal(_state(backend.normalizer)),
            "pre_tokenizer": _normal(_state(backend.pre_tokenizer)),
            "added_tokens": {
                index: token.__getstate__()
                for index, token in backend.get_added_tokens_decoder().items()
                if token.content not in unknown
            },
            "decoder": _decoder(_state(backend.decoder)),
        }
        for backend in (theirs, ours)
    )
    changes = [part for part in one if one[part] != other[part]]
    return changes if _model(theirs) == _model(ours) else [*changes, "model"]


def unknown_tokens(theirs: Tokenizer, ours: Tokenizer) -> set[str]:
    """The added tokens of one tokenizer that another one does not have at all."""
    added = theirs.get_added_tokens_decoder().values()
    return {token.content for token in added if ours.token_to_id(token.content) is None}


def example(theirs: Tokenizer, ours: Tokenizer) -> str:
    """A text of which two tokenizers make different ids, with their tokens, in words; empty where none of those at hand shows it."""
    both = (theirs, ours)
    for text in HARD_TEXTS:
        ids = [backend.encode(text, add_special_tokens=False).ids for backend in both]
        if ids[0] != ids[1]:
            tokens = [
                " ".join(str(backend.id_to_token(token)) for token in some[:8])
                for backend, some in zip(both, ids, strict=True)
            ]
            return f"{text!r} is {tokens[0]} there, {tokens[1]} here"
    return ""


def adds_prefix_space(backend: Tokenizer) -> set[bool]:
    """Whether its pre-tokenizers put a space before a text; empty where none of them has a say in it."""
    return {
        bool(node["add_prefix_space"])
        if "add_prefix_space" in node
        else node["prepend_scheme"] != "never"
        for node in _nodes(_state(backend.pre_tokenizer))
        if {"add_prefix_space", "prepend_scheme"} & node.keys()
    }


def at_rest(backend: Tokenizer) -> Tokenizer:
    """A tokenizer that neither pads nor truncates, and takes special tokens in a text for what they are."""
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def sha256(description: str) -> str:
    """The hash of a tokenizer's description, as manifests have it."""
    return hashlib.sha256(description.encode()).hexdigest()


def _state(part: Any) -> Any:
    """A part's description."""
    return None if part is None else json.loads(part.__getstate__())


def _model(backend: Tokenizer) -> tuple[dict[str, Any], bytes]:
    """A model's options, and its vocabulary and merges as they are written: parsing them would take longer than all else."""
    head, _, words = backend.model.__getstate__().partition(b',"vocab":')
    options: dict[str, Any] = json.loads(head + b"}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        options[name] = options.get(name) or None
    if options["type"] == "BPE" and (options["unk_token"] is None or _has_all_bytes(backend)):
        options["unk_token"] = options["fuse_unk"] = None  # nothing is unknown
    return options, words


def _has_all_bytes(backend: Tokenizer) -> bool:
    """Whether a BPE cuts what it does not know into bytes, and has a token for each."""
    kinds = {node.get("type") for node in _nodes(_state(backend.pre_tokenizer))}
    tokens = ByteLevel.alphabet() if "ByteLevel" in kinds else []
    if backend.model.byte_fallback:
        tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return bool(tokens) and all(backend.token_to_id(token) is not None for token in tokens)


def _decoder(node: Any) -> Any:
    # The options of a byte-level one are those of a pre-tokenizer.
    return {"type": "ByteLevel"} if node and node["type"] == "ByteLevel" else _normal(node)


def _normal(node: Any) -> Any:
    if isinstance(node, list):
        return [_normal(child) for child in node] if node and isinstance(node[0], dict) else node
    if not isinstance(node, dict):
        return node
    # `trim_offsets` only moves reported offsets.
    node = {key: _normal(value) for key, value in node.items() if key != "trim_offsets"}
    for parts in ("normalizers", "pretokenizers", "decoders"):
        if node.get("type") == "Sequence" and parts in node and len(node[parts]) < 2:
            return node[parts][0] if node[parts] else None
    return node


def _nodes(node: Any) -> Iterable[dict[str, Any]]:
    """All parts of a part."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _nodes(child)
