"""A teacher's directory or repository → how its files store each tensor; what is no whole model is refused.

In:   a directory, or a repository of the Hub whose files are in the cache.
Out:  the name of each tensor → its type and shape, and the file that holds it.

How:  the head of a safetensors file is JSON that says this of every tensor, so no weight is read. What is looked for first is
      what transformers would act upon without a word: an adapter, which it applies if the package peft is installed.

Cost: some milliseconds a file; one question to the Hub per repository.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ADAPTER = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a distributed checkpoint, which transformers prefers to any other that lies beside them."""
MAX_HEAD_BYTES = 100_000_000
"""Of the safetensors format."""

PACKED = re.compile(r"F[468]_\w+|F4|[IU](8|16)|[IU]32")
"""Types, as safetensors names them, in which no model computes: what they hold needs scales, or has to be unpacked."""


class Stored(NamedTuple):
    """How a file holds a tensor."""

    dtype: str
    """As safetensors names it: F32, BF16, F8_E4M3, U8, …"""
    shape: tuple[int, ...]
    file: Path

    @property
    def is_packed(self) -> bool:
        """Whether its numbers are not yet those of a weight."""
        return PACKED.fullmatch(self.dtype) is not None


def named(location: str) -> str:
    """A teacher in a message: by its repository, or by the name of its directory or file, never by where that is."""
    path = Path(location)
    name = path.name if path.is_absolute() else location
    return "teacher" if name == "teacher" else f"teacher {name}"


def refuse_adapter(location: str, *, commit: str | None = None) -> None:
    """See that a directory or repository holds a model, and not something to be put on top of another one.

    transformers would load an adapter together with a base that nobody pinned, or leave it out where peft is not installed.

    Raises:
        ValueError: it has an adapter_config.json.
    """
    path = _file(location, ADAPTER, commit, ask=True)
    if path is None:
        return
    try:
        base = str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        base = "BASE"
    base = Path(base).name if Path(base).is_absolute() else base
    base = base if base.isprintable() and len(base) < 100 and '"' not in base else "BASE"
    beside = _file(location, "config.json", commit, ask=False) is not None
    raise ValueError(
        f"{named(location)}: its {ADAPTER} makes it an adapter, which is not a teacher without its base model; merge the two with "
        f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "ADAPTER").merge_and_unload()'
        f'.save_pretrained("merged"), and set teacher.path to that directory'
        f"{f', or remove {ADAPTER} if the model beside it is the teacher' if beside else ''}"
    )


def refuse_ambiguous(location: str) -> None:
    """See that it is clear which files of a directory are its weights.

    Raises:
        ValueError: it is not.
    """
    directory = Path(location)
    if not directory.is_dir():
        return
    if files := sorted(p.name for p in directory.iterdir() if DISTRIBUTED.fullmatch(p.name)):
        raise ValueError(
            f"{named(location)}: {files[0]} is a part of a distributed checkpoint, which is not read; load it where it was "
            "trained, and save the whole model with save_pretrained"
        )
    if not (directory / WEIGHTS).exists():
        return
    if others := sorted(set(_indexed(directory / INDEX)) - {WEIGHTS}):
        raise ValueError(
            f"{named(location)}: it has {WEIGHTS}, and an {INDEX} that names {others[0]}, so there may be two models in it; "
            "remove the one that is not the teacher"
        )


def explain_missing(location: str) -> str | None:
    """Why a directory has no weights that are read, in a line; None of a repository, or if that is not the trouble."""
    directory = Path(location)
    if not directory.is_dir() or (directory / WEIGHTS).exists():
        return None
    if (directory / INDEX).exists():
        missing = [name for name in _indexed(directory / INDEX) if not (directory / name).exists()]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"it lacks {missing[0]}{more}, which {INDEX} names; download it" if missing else None
    if parts := sorted(path.name for path in directory.glob("*.safetensors")):
        if all(part.startswith("adapter") for part in parts):
            return f"it has {parts[0]}, which is an adapter's, and no {WEIGHTS}; merge it into the model that it belongs to, and name the result"
        return (
            f"it has {parts[0]}, but neither {WEIGHTS} nor {INDEX}, which would say what belongs to the model; download the "
            "index, too, or save the model again with save_pretrained"
        )
    if ggufs := sorted(path.name for path in directory.glob("*.gguf")):
        return f"it has no {WEIGHTS}, but {ggufs[0]}; name that file as teacher.gguf"
    return None


def read_heads(location: str, *, commit: str | None = None) -> dict[str, Stored]:
    """How the weights of a directory, or of a repository that has just been loaded, are stored.

    Raises:
        ValueError: two files hold a tensor of the same name.
    """
    stored: dict[str, Stored] = {}
    for file in _weight_files(location, commit):
        for name, entry in _head(file).items():
            if name in stored:
                raise ValueError(
                    f"{named(location)}: {stored[name].file.name} and {file.name} both hold {name}, so there may be two models in it; "
                    "remove the one that is not the teacher"
                )
            if name != "__metadata__":
                stored[name] = Stored(str(entry["dtype"]), tuple(entry["shape"]), file)
    return stored


def read_config(location: str, *, commit: str | None = None) -> dict[str, Any]:
    """config.json as it is written, before transformers makes something of it."""
    path = _file(location, "config.json", commit, ask=False)
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _weight_files(location: str, commit: str | None) -> Iterator[Path]:
    name = read_config(location, commit=commit).get("transformers_weights") or WEIGHTS
    whole = _file(location, name, commit, ask=False)
    if whole is not None and not name.endswith(".index.json"):
        yield whole
        return
    index = whole or _file(location, INDEX, commit, ask=False)
    for shard in _indexed(index) if index else ():
        if (path := _file(location, shard, commit, ask=False)) is not None:
            yield path


def _indexed(path: Path) -> list[str]:
    """The files that an index names, each once."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, LookupError, AttributeError):
        return []
    return sorted({name for name in names if isinstance(name, str)})


def _head(file: Path) -> dict[str, Any]:
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        if length > MAX_HEAD_BYTES:
            raise ValueError(f"{file.name} is not a safetensors file; download it again")
        head: dict[str, Any] = json.loads(source.read(length))
    return head


def _file(location: str, name: str, commit: str | None, *, ask: bool) -> Path | None:
    """A file of a directory or repository, if it is there; of a repository, from the cache or, on demand, from the Hub."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not ask:
        found = try_to_load_from_cache(location, name, revision=commit)
        return Path(found) if isinstance(found, str) else None
    try:
        return Path(hf_hub_download(location, name, revision=commit))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        # It is not there, or the Hub cannot be asked; then what cannot be read of the model says so.
        return None
