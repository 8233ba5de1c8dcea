"""A file, a config and a class that do not agree on a tokenizer → which of them is followed, and a line that says so.

In:   the backend that tokenizer.json describes, what transformers has loaded, and the content of tokenizer_config.json.
Out:  the backend changed where another source decides (see `tokenizer`), and notices for the user.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from builder.corpus.encoder import added_around
from builder.tokenizer.files import CONFIG, FILE, check_id
from builder.tokenizer.rules import adds_prefix_space

Around = tuple[list[int], list[int]]
"""The ids that stand before and behind a text."""


def add_named(ours: Tokenizer, plain: Any, loaded: Any, declared: Mapping[str, int]) -> list[str]:
    """Add tokens that tokenizer.json does not list: those that the configuration names, and those of a class that the vocabulary has.

    Returns:
        Notices.

    Raises:
        TokenizerError: one would not get the id that the configuration says.
    """
    listed = {token.content for token in ours.get_added_tokens_decoder().values()}
    named: list[AddedToken] = [token for _, token in sorted(plain.added_tokens_decoder.items())]
    named += [
        token
        for _, token in sorted(loaded.added_tokens_decoder.items())
        if token.special and ours.token_to_id(token.content) is not None
    ]
    missing: dict[str, AddedToken] = {}
    for token in named:
        if token.content not in listed:
            missing.setdefault(token.content, token)
    new = [content for content in missing if ours.token_to_id(content) is None]
    notices = [
        f"{CONFIG} gives {content!r} the id {index}, {FILE} {found}, which is taken"
        for content, index in declared.items()
        if (found := ours.token_to_id(content)) not in (None, index)
    ][:1]
    ours.add_tokens(list(missing.values()))
    for content in new:
        check_id(ours, content, declared.get(content))
    if new:
        ids = ", ".join(f"{content!r} as {ours.token_to_id(content)}" for content in new)
        notices.append(f"{CONFIG} names tokens that {FILE} does not have; they are added: {ids}")
    return notices


def mistral(config: dict[str, Any], plain: Any, ours: Tokenizer) -> list[str]:
    """Take the pre-tokenizer that transformers puts in the file's place where a config asks for it; notices."""
    if config.get("fix_mistral_regex") is not True:
        return []
    before, found = ours.pre_tokenizer, plain.backend_tokenizer.pre_tokenizer
    if before is None or before.__getstate__() == found.__getstate__():
        return []
    ours.pre_tokenizer = found
    return [
        f"{CONFIG} sets fix_mistral_regex, so that the pre-tokenizer is not that of {FILE}, but what transformers has for it"
    ]


def forget_unknown(loaded: Any) -> None:
    """Take from a tokenizer the special tokens that its backend does not know."""

    def is_known(token: Any) -> bool:
        return token is None or loaded.backend_tokenizer.token_to_id(str(token)) is not None

    named: dict[str, Any] = loaded._special_tokens_map
    named.update({name: token if is_known(token) else None for name, token in named.items()})
    loaded._extra_special_tokens = list(filter(is_known, loaded._extra_special_tokens))


def without_dropout(backend: Tokenizer) -> list[str]:
    """Let a BPE model merge in the same way each time; notices."""
    dropout = getattr(backend.model, "dropout", None)
    if not dropout:
        return []
    backend.model.dropout = None
    return [
        f"the tokenizer leaves out merges at random (dropout {dropout:.3g}), which is for training; here it leaves out none"
    ]


def prefix_space(config: dict[str, Any], backend: Tokenizer) -> list[str]:
    """Say where the config asks for a space before a text, or for none, and the file does otherwise."""
    wish = config.get("add_prefix_space")
    if not isinstance(wish, bool) or adds_prefix_space(backend) <= {wish}:
        return []
    return [
        f"{CONFIG} sets add_prefix_space = {json.dumps(wish)}, and {FILE} does otherwise; token ids are those of {FILE}"
    ]


def settle_around(
    loaded: Any, config: dict[str, Any], around: tuple[Around, Around], theirs: Tokenizer
) -> list[str]:
    """Choose what stands around a text, and say so where file, class and config do not agree.

    Args:
        loaded: a tokenizer, whose post-processor becomes one that adds that.
        config: the content of tokenizer_config.json.
        around: what the post-processor of the file adds, and that of the class.
        theirs: the backend of the class.
    """
    backend: Tokenizer = loaded.backend_tokenizer
    notices, chosen = [], []
    keys, sides = ("add_bos_token", "add_eos_token"), ("before", "behind")
    for by_file, by_class, key, side in zip(*around, keys, sides, strict=True):
        words = [_words(backend, by_file), _words(theirs, by_class)]
        wish = config.get(key)
        is_set = isinstance(wish, bool)
        ids, here = by_file, words[0]
        same = [backend.token_to_id(theirs.id_to_token(token) or "") for token in by_class]
        known = [token for token in same if token is not None]
        if is_set and bool(by_class) is wish and len(known) == len(by_class):
            ids, here = known, words[1]
        chosen.append(ids)
        if words[0] == words[1] and (not is_set or bool(ids) is wish):
            continue
        said = [f"{FILE} puts {words[0]} {side} a text"]
        if words[0] != words[1]:
            said.append(f"{type(loaded).__name__} of transformers {words[1]}")
        if is_set:
            said.append(f"{CONFIG} sets {key} = {json.dumps(wish)}")
        notices.append(
            f"{', '.join(said)}; here it is {here}, unless sequences.{key[4:7]} says otherwise"
        )
    if list(added_around(backend)) != chosen:
        backend.post_processor = _template(*chosen)
    return notices


def _template(before: list[int], behind: list[int]) -> TemplateProcessing:
    names = [f"before{i}" for i in range(len(before))], [f"behind{i}" for i in range(len(behind))]
    single, second = ([*names[0], f"${text}", *names[1]] for text in "AB")
    tokens = list(zip([*names[0], *names[1]], [*before, *behind], strict=True))
    return TemplateProcessing(single=single, pair=[*single, *second], special_tokens=tokens)


def _words(backend: Tokenizer, ids: list[int]) -> str:
    return " ".join(repr(backend.id_to_token(token) or token) for token in ids) or "nothing"
