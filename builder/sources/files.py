"""The paths of a recipe → files that exist, and the format of a corpus of files.

In:   names, patterns or folders as a recipe has them, and the directory at which relative ones start.
Out:  absolute paths, each once, in the order in which they are read.

Cost: folders are listed; no file is read.
"""

import glob
from pathlib import Path
from typing import Literal

from builder.text.files import COMPRESSED, JSON_LINES, suffix_of

CorpusFormat = Literal["hub", "text", "json", "lines", "parquet", "csv"]

_FORMATS: dict[str, CorpusFormat] = {
    ".txt": "text",
    **dict.fromkeys(JSON_LINES, "json"),
    ".parquet": "parquet",
    ".csv": "csv",
}
KINDS = ".txt, .jsonl, .csv (each also with .gz or .zst) or .parquet"


def corpus_files(patterns: tuple[str, ...], base: Path) -> tuple[Path, ...]:
    """The files that patterns name, each once, in their order; of a folder, all files below it of a format that is known.

    Raises:
        ValueError: nothing matches a pattern, or a folder holds something else, too.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        full = base / expand_home(pattern)
        if full.is_dir():
            found = _files_below(full, pattern)
        else:
            found = [Path(path) for path in sorted(glob.glob(str(full), recursive=True))]
            found = [path for path in found if path.is_file()]
        if not found:
            raise ValueError(
                f"corpus.files: nothing matches {pattern!r}{_looked_in(pattern, base)}; check the name (a relative path starts at the recipe's directory)"
            )
        files |= dict.fromkeys(path.resolve() for path in found)
    return tuple(files)


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder and its folders, hidden ones apart.

    Raises:
        ValueError: none of them, or only a part, is of a format that is known.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part[0] == "." for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise ValueError(
            f"corpus.files: the folder {pattern!r} contains no files; expected {KINDS}"
        )
    if others := [path for path in found if _known_format(path) is None]:
        ending = next((f"*{p.suffix}" for p in found if _known_format(p)), "*.txt")
        raise ValueError(
            f"corpus.files: the folder {pattern!r} holds {others[0].name}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, "
            f"which {'is' if len(others) == 1 else 'are'} not {KINDS}; name the files, such as {str(Path(pattern) / '**' / ending)!r}"
        )
    return found


def _known_format(path: Path) -> CorpusFormat | None:
    found = _FORMATS.get(suffix_of(path))
    return None if found == "parquet" and path.suffix in COMPRESSED else found


def format_of(path: Path) -> CorpusFormat:
    """The format of a file, by its name.

    Raises:
        ValueError: it is none that is known.
    """
    if (found := _known_format(path)) is None:
        raise ValueError(f"corpus.files: cannot tell the format of {path.name!r}; expected {KINDS}")
    return found


def _looked_in(path: str, base: Path) -> str:
    return "" if Path(path).is_absolute() else f" (looked in {base or '.'})"


def existing(base: Path, path: str, key: str, kind: Literal["file", "directory"]) -> Path:
    """The one file or directory that a key of the recipe names.

    Raises:
        ValueError: it does not exist, or is not of this kind.
    """
    full = base / expand_home(path)
    if not full.exists():
        raise ValueError(f"{key}: {path!r} does not exist{_looked_in(path, base)}; check the path")
    if full.is_dir() is not (kind == "directory"):
        raise ValueError(f"{key}: {path!r} is not a {kind}; name a {kind}")
    return full.resolve()


def expand_home(path: str) -> Path:
    """A path whose ~ is replaced by the home directory.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path!r} is in the home directory of a user that does not exist on this machine; write the full path"
        ) from None
