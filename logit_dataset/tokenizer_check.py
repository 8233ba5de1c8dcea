"""A tokenizer that a trainer expects → whether it is the one of which a dataset has the ids.

In:   what a manifest says of the teacher, and a fast tokenizer, a tokenizer.json, or a hash.
Out:  nothing, or an error that says how to get at the right one.

How:  tokenizers are the same if their descriptions are, but for padding and truncation. A tokenizer.json is also known by the hash of
      the file, since transformers may add to what it says, and other versions of the `tokenizers` library may write it otherwise.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

FILE = "tokenizer.json"
AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The class of transformers that takes a tokenizer.json as it is, by both of its names."""
WAYS_OUT = "use the teacher's tokenizer, or project the dataset onto yours"


def check_tokenizer(teacher: dict[str, Any], where: str, wanted: Any) -> None:
    """See that a dataset's ids are those of a tokenizer.

    Args:
        teacher: what the manifest says of it.
        where: name of the dataset.
        wanted: a fast tokenizer, a path (of a tokenizer.json, or of the directory with it), or a SHA-256 that a manifest has.

    Raises:
        ValueError: they are not, or it is no fast tokenizer, or there is no such file.
    """
    known = {teacher["tokenizer_sha256"], teacher.get("tokenizer_file_sha256")}
    advice = WAYS_OUT
    if isinstance(wanted, str) and re.fullmatch("[0-9a-fA-F]{64}", wanted):
        found = {wanted.lower()}
    elif isinstance(wanted, (str, Path)):
        found = _hashes_of_file(Path(wanted))
    else:
        found = {_sha256(plain_tokenizer(wanted))}
        name = type(wanted).__name__
        advice = f"if it is the teacher's, give the path of its {FILE}; else {WAYS_OUT}"
        if hasattr(wanted, "backend_tokenizer") and name not in AS_IT_IS:
            advice = (
                f"transformers makes a {name} anew, and may leave out rules of {FILE}: give the path of that file, or load it with "
                f"PreTrainedTokenizerFast.from_pretrained; else {WAYS_OUT}"
            )
    if not found & known:
        raise ValueError(
            f"{where} has a tokenizer with SHA-256 {teacher['tokenizer_sha256']}, but {' or '.join(sorted(found))} is required; {advice}"
        )


def plain_tokenizer(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer's backend, without the padding and truncation that a trainer may have set.

    Raises:
        ValueError: it is no fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; give one of the `tokenizers` library, or one of transformers "
            "that has a backend_tokenizer"
        )
    plain = type(backend).from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def _hashes_of_file(path: Path) -> set[str]:
    """The hash of a tokenizer.json, and of what the `tokenizers` library, if there is one, makes of it."""
    file = path / FILE if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError:
        raise ValueError(
            f"require_tokenizer is {str(path)!r}, which is neither a SHA-256 nor a {FILE} or a directory with one"
        ) from None
    hashes = {hashlib.sha256(content).hexdigest()}
    try:
        from tokenizers import Tokenizer
    except ImportError:  # a dataset that knows the file's hash needs none
        return hashes
    try:
        return {*hashes, _sha256(plain_tokenizer(Tokenizer.from_str(content.decode())))}
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no {FILE} ({reason[:100]})") from None


def _sha256(plain: Any) -> str:
    return hashlib.sha256(plain.to_str().encode()).hexdigest()
