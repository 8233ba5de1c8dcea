"""Where a teacher is → the files of its tokenizer, read and checked.

In:   a directory, or a repository on the Hub at a commit.
Out:  tokenizer.json as transformers would choose it, or the certainty that there is none; what lies beside it.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import get_fast_tokenizer_file

from builder.tokenizer.rules import at_rest

FILE, CONFIG, FORMER_ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"


class TokenizerError(ValueError):
    """A tokenizer is not to be had as its teacher knows it."""


def tokenizer_file(location: str, commit: str | None) -> Path | None:
    """The tokenizer.json that transformers reads; None if there is none."""
    versions = read_json(location, CONFIG, commit).get("fast_tokenizer_files")
    return _find(location, get_fast_tokenizer_file(versions) if versions else FILE, commit)


def declared_ids(location: str, commit: str | None) -> dict[str, int]:
    """Ids of added tokens by the configuration, where transformers looks for them."""
    listed = read_json(location, CONFIG, commit).get("added_tokens_decoder")
    if listed is None:
        return {str(c): int(i) for c, i in read_json(location, FORMER_ADDED, commit).items()}
    return {str(token["content"]): int(index) for index, token in listed.items()}


def read_json(location: str, name: str, commit: str | None) -> dict[str, Any]:
    """The content of a file; empty if there is none."""
    path = _find(location, name, commit)
    if path is None:
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _find(location: str, name: str, commit: str | None) -> Path | None:
    """A file of a teacher; None if there is none.

    Raises:
        TokenizerError: that cannot be known, for the Hub cannot be reached.
    """
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    known = try_to_load_from_cache(location, name, revision=commit)
    if isinstance(known, str):
        return Path(known)
    if known is _CACHED_NO_EXIST:
        return None
    try:
        return Path(hf_hub_download(location, name, revision=commit))
    except LocalEntryNotFoundError:
        raise TokenizerError(
            f"its {name} is not in the cache, and the Hub cannot be reached to see whether there is one; check the network, or use "
            "teacher.path"
        ) from None
    except EntryNotFoundError:
        return None


def as_it_is(location: str, commit: str | None) -> Any:
    """A tokenizer by the one class of transformers that keeps what tokenizer.json says, and adds what the configuration names."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(location, revision=commit or "main")
    except Exception as error:
        raise readable(error) from None


def read(content: bytes) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes.

    Raises:
        TokenizerError: it is damaged, or the library does not give its added tokens the ids that it says.
    """
    try:
        backend = at_rest(Tokenizer.from_str(content.decode()))
    except Exception as error:  # the library raises nothing narrower
        raise readable(error) from None
    for token in json.loads(content).get("added_tokens") or []:
        check_id(backend, token["content"], token["id"])
    return backend


def readable(error: Exception) -> Exception:
    """What transformers raises, as far as it is for users; else what says it in one line."""
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return TokenizerError(f"its tokenizer cannot be loaded ({reason[:150]}); download it again")


def check_id(backend: Tokenizer, content: str, index: int | None) -> None:
    """See that an added token has the id that is written down for it, for by that the teacher knows it.

    Raises:
        TokenizerError: the library, which numbers added tokens as they come, gives it another.
    """
    found = backend.token_to_id(content)
    if index not in (None, found):
        raise TokenizerError(
            f"its added token {content!r} has the id {index} in the tokenizer's files, and gets {found} when they are loaded, for added tokens "
            "are numbered as they come; give the ids before it a token in the files"
        )
