"""What a recipe names → the exact thing it stands for: a commit on the Hub, or files with their hashes.

In:   a recipe, and the directory at which its relative paths start.
Out:  Sources: plain values that say where to read from, and their provenance, which enters the fingerprint.

Cost: a local file is hashed once (about 1 GB/s); a later run of the same build trusts an unchanged size and time of change.
"""

import glob
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from builder.recipe.fields import OWN
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe, SequencesRecipe, TeacherRecipe
from builder.sources import demo
from builder.sources.changes import Seen, Watch, deciding_files, hash_file
from builder.text.files import COMPRESSED, JSON_LINES, suffix_of

CorpusFormat = Literal["hub", "text", "json", "lines", "parquet", "csv"]

_FORMATS: dict[str, CorpusFormat] = {
    ".txt": "text",
    **dict.fromkeys(JSON_LINES, "json"),
    ".parquet": "parquet",
    ".csv": "csv",
}
KINDS = ".txt, .jsonl, .csv or .parquet (all but the last also with .gz or .zst)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSource:
    """A pinned corpus."""

    format: CorpusFormat
    files: tuple[Path, ...] = ()
    """Local files in the order in which they are read."""
    commit: str | None = None
    """Commit of a Hub dataset."""
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSource:
    """A pinned teacher."""

    location: str
    """Hub repository, local directory, or GGUF file."""
    commit: str | None = None
    """Commit of a Hub repository."""
    tokenizer: str | None = None
    """Directory of the tokenizer, where it is not at `location`."""
    config: str | None = None
    """A config.json that decides for a GGUF file."""
    weights: tuple[str, ...] | None = None
    """Files that a Python file is given; None for all other teachers."""
    attention: str
    """As the recipe says, else the best that the teacher's class supports."""
    files: tuple[Path, ...] = ()
    """Local files that make it what it is."""
    directories: tuple[Path, ...] = ()
    """Local directories of which all such files are among them."""
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that a recipe names, pinned."""

    corpus: CorpusSource
    teacher: TeacherSource
    template: str | None
    """Text of the chat template that the recipe names, if any."""

    def watch(self, seen: Mapping[str, Seen]) -> Watch:
        """A watch over the local files among them, which were seen like this when they were hashed."""
        return Watch(
            self.corpus.files, self.teacher.files, seen, directories=self.teacher.directories
        )

    def plan(self, recipe: Recipe) -> dict[str, Any]:
        """What is built, as plain values: the recipe, and the exact corpus and teacher behind it."""
        return {
            "recipe": recipe.published(attention=self.teacher.attention),
            "corpus": self.corpus.provenance,
            "teacher": self.teacher.provenance | template_provenance(self.template),
        }


@dataclass(slots=True)
class KnownSources:
    """What an earlier run of the same build resolved, so that resuming neither asks the Hub nor reads the files again."""

    commits: dict[str, str] = field(default_factory=dict)
    """`repo@revision` → commit."""
    hashes: dict[str, list[Any]] = field(default_factory=dict)
    """Path → [bytes, time of change in ns, sha256]."""
    attentions: dict[str, str] = field(default_factory=dict)
    """Teacher, pinned → its attention where the recipe leaves it open, so that a newer transformers does not choose another one."""
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of a corpus, its columns and what they are."""

    def commit(
        self, recipe: CorpusRecipe | TeacherRecipe, repo_type: Literal["dataset", "model"]
    ) -> str:
        """The commit behind a branch or tag, asked of the Hub once in a build.

        Raises:
            ValueError: the Hub cannot be reached, or has no such repository or revision.
        """
        repo, revision = recipe.repo, recipe.revision
        assert repo
        if recipe.is_pinned:
            return revision
        key = f"{repo_type} {repo}@{revision}"
        if key not in self.commits:
            self.commits[key] = _commit_on_hub(repo, revision, repo_type)
        return self.commits[key]

    def sha256(self, path: Path) -> str:
        """The hash of a file's content."""
        known = self.hashes.get(str(path))
        if known is None or not Seen(*known).is_same(path.stat()):
            self.hashes[str(path)] = known = list(hash_file(path))
        return str(known[2])

    @property
    def seen(self) -> dict[str, Seen]:
        """The files that were hashed, by their paths."""
        return {path: Seen(*values) for path, values in self.hashes.items()}

    def forget(self, path: Path) -> None:
        """Have a file hashed again, whatever its size and time of change say."""
        self.hashes.pop(str(path), None)

    def attention(
        self,
        recipe: TeacherRecipe,
        location: str,
        config: str | None,
        provenance: dict[str, Any],
    ) -> str:
        """What computes a teacher's attention: what the recipe says, else the best that its class supports."""
        if recipe.attention:
            return recipe.attention
        key = " ".join([location, *map(str, provenance.values())])
        if key not in self.attentions:
            from builder.teacher.attention import best_attention  # which loads transformers

            self.attentions[key] = best_attention(
                location,
                commit=provenance.get("commit"),
                trust_remote_code=recipe.trust_remote_code and recipe.repo is not None,
                config=config,
            )
        return self.attentions[key]


def resolve(recipe: Recipe, base: Path, known: KnownSources) -> Sources:
    """Pin all that a recipe names.

    Raises:
        ValueError: as `resolve_corpus`, `resolve_teacher` and `read_chat_template`.
    """
    return Sources(
        corpus=resolve_corpus(recipe.corpus, base, known),
        teacher=resolve_teacher(recipe.teacher, base, known),
        template=read_chat_template(recipe.sequences, base),
    )


def resolve_corpus(recipe: CorpusRecipe, base: Path, known: KnownSources) -> CorpusSource:
    """Pin the corpus of a recipe whose relative paths start at `base`.

    Raises:
        ValueError: no such files, an unknown or mixed format, or the Hub does not know the dataset.
    """
    if recipe.repo:
        _check_not_here(recipe.repo, "corpus.files")
        commit = known.commit(recipe, "dataset")
        provenance = {"kind": "hub", "repo": recipe.repo, "commit": commit}
        return CorpusSource(format="hub", commit=commit, provenance=provenance)
    if recipe.embedded:
        path, provenance = demo.embedded_corpus()
        return CorpusSource(
            format="json", files=(path,), provenance={"kind": "embedded", **provenance}
        )
    files = _expand(recipe.files, base)
    formats = {_format(path) for path in files}
    if formats == {"text", "json"}:
        formats = {"lines"}
    if len(formats) > 1:
        raise ValueError(
            f"corpus.files mixes formats ({', '.join(sorted(formats))}); give files of one format, or .txt beside .jsonl"
        )
    root = files[0].parent
    while not all(path.is_relative_to(root) for path in files):
        root = root.parent
    listing = [
        {"file": path.relative_to(root).as_posix(), "sha256": known.sha256(path)} for path in files
    ]
    return CorpusSource(
        format=formats.pop(), files=files, provenance={"kind": "files", "files": listing}
    )


def resolve_teacher(recipe: TeacherRecipe, base: Path, known: KnownSources) -> TeacherSource:
    """Pin the teacher of a recipe whose relative paths start at `base`.

    Raises:
        ValueError: no such directory or file, it holds an adapter, or the Hub does not know the model.
    """
    commit = tokenizer = config = None
    files: list[Path] = []
    directories: list[Path] = []
    provenance: dict[str, Any]
    if recipe.repo:
        _check_not_here(recipe.repo, "teacher.path")
        location, commit = recipe.repo, known.commit(recipe, "model")
        provenance = {"kind": "hub", "repo": recipe.repo, "commit": commit}
    elif recipe.embedded:
        directory, package = demo.embedded_teacher()
        location, provenance = str(directory), {"kind": "package", **package}
    elif recipe.path:
        directory = _existing(base, recipe.path, "teacher.path", "directory")
        from builder.checkpoint.checkpoint import refuse_adapter  # which loads torch

        refuse_adapter(str(directory))
        directories.append(directory)
        location, sha256 = str(directory), _tree_sha256(directory, known)
        provenance = {"kind": "directory", "name": directory.name, "sha256": sha256}
    elif recipe.python:
        return _python_teacher(recipe, base, known)
    else:
        assert recipe.gguf
        file = _existing(base, recipe.gguf, "teacher.gguf", "file")
        if file.suffix != ".gguf":
            raise ValueError(
                f"teacher.gguf: {recipe.gguf!r} is not a .gguf file; name one, or a directory as teacher.path"
            )
        files.append(file)
        location = str(file)
        provenance = {"kind": "gguf", "name": file.name, "sha256": known.sha256(file)}
        if recipe.tokenizer:
            beside = _existing(base, recipe.tokenizer, "teacher.tokenizer", "directory")
            directories.append(beside)
            tokenizer = str(beside)
            provenance["tokenizer_files_sha256"] = _tree_sha256(beside, known)
        if recipe.config:
            is_directory = (base / expand_home(recipe.config)).is_dir()
            path = f"{recipe.config}/config.json" if is_directory else recipe.config
            original = _existing(base, path, "teacher.config", "file")
            files.append(original)
            config = str(original)
            provenance["config_sha256"] = known.sha256(original)
    return TeacherSource(
        location=location,
        commit=commit,
        tokenizer=tokenizer,
        config=config,
        attention=known.attention(recipe, location, config, provenance),
        files=(*files, *(file for directory in directories for file in deciding_files(directory))),
        directories=tuple(directories),
        provenance=provenance,
    )


def _python_teacher(recipe: TeacherRecipe, base: Path, known: KnownSources) -> TeacherSource:
    """Pin a teacher that is code of the user's. It is not run here."""
    assert recipe.python
    code = _existing(base, recipe.python, "teacher.python", "file")
    if code.suffix != ".py":
        raise ValueError(
            f"teacher.python: {recipe.python!r} is not a .py file; name one with a function load_teacher"
        )
    weights = [_existing(base, path, "teacher.weights", "file") for path in recipe.weights]
    return TeacherSource(
        location=str(code),
        attention=OWN,
        weights=tuple(map(str, weights)),
        files=(code, *weights),
        provenance={
            "kind": "python",
            "name": code.name,
            "sha256": known.sha256(code),
            "weights_sha256": [known.sha256(path) for path in weights],
        },
    )


def read_chat_template(recipe: SequencesRecipe, base: Path) -> str | None:
    """The chat template that a recipe names, if any.

    Raises:
        ValueError: there is no such file, or it is not text.
    """
    if recipe.chat_template is None:
        return None
    path = _existing(base, recipe.chat_template, "sequences.chat_template", "file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"sequences.chat_template: {path.name!r} is not UTF-8 text; expected a Jinja template"
        ) from None


def local_teacher(recipe: TeacherRecipe, base: Path) -> Path | None:
    """Where a recipe's teacher is, if it is a directory or file of the user's: of Python code, that file."""
    path = recipe.path or recipe.gguf or recipe.python
    return base / expand_home(path) if path else None


def template_provenance(template: str | None) -> dict[str, str]:
    """What pins a chat template that the recipe names; that of the tokenizer is pinned with it."""
    if template is None:
        return {}
    return {"chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()}


def expand_home(path: str) -> Path:
    """A path whose ~ is replaced by the home directory.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path!r} is below the home directory of a user that this machine does not have; write the whole path"
        ) from None


def _check_not_here(repo: str, key: str) -> None:
    """The libraries read a directory of the working directory rather than a Hub repository of the same name."""
    if Path(repo).exists():
        raise ValueError(
            f"{repo!r} is to come from the Hub, but there is a directory of this name here, which would be read instead; "
            f"run from another directory, or name it as {key}"
        )


def _commit_on_hub(repo: str, revision: str, repo_type: Literal["dataset", "model"]) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().repo_info(repo, revision=revision, repo_type=repo_type).sha
    except HFValidationError:
        raise ValueError(f"{repo!r} is not a Hub {repo_type} name; expected ORG/NAME") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub has no {repo_type} {repo!r} that you can read; check the name, and log in if it is private"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_type} {repo!r} has no revision {revision!r} on the Hub") from None
    except OfflineModeIsEnabled:
        raise ValueError(
            f"cannot reach the Hub to resolve {repo_type} {repo}@{revision}, since HF_HUB_OFFLINE is set; unset it, "
            "give the full commit of what is in the cache, or use local files"
        ) from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"cannot reach the Hub to resolve {repo_type} {repo}@{revision} ({_first_line(error)}); "
            "check the network, or use local files"
        ) from None
    assert commit
    return commit


def _expand(patterns: tuple[str, ...], base: Path) -> tuple[Path, ...]:
    """The files that patterns name, each once, in their order; of a folder, all files below it of a format that is known."""
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
                f"corpus.files: nothing matches {pattern!r}{_looked_in(pattern, base)}; check the name, and that the path starts at the recipe"
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
        raise ValueError(f"corpus.files: the folder {pattern!r} holds no file; expected {KINDS}")
    if others := [path for path in found if _known_format(path) is None]:
        ending = next((f"*{p.suffix}" for p in found if _known_format(p)), "*.txt")
        raise ValueError(
            f"corpus.files: the folder {pattern!r} holds {others[0].name}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, "
            f"which {'is' if len(others) == 1 else 'are'} not {KINDS}; name the files, as {str(Path(pattern) / '**' / ending)!r}"
        )
    return found


def _known_format(path: Path) -> CorpusFormat | None:
    found = _FORMATS.get(suffix_of(path))
    return None if found == "parquet" and path.suffix in COMPRESSED else found


def _format(path: Path) -> CorpusFormat:
    if (found := _known_format(path)) is None:
        raise ValueError(f"corpus.files: cannot tell the format of {path.name!r}; expected {KINDS}")
    return found


def _looked_in(path: str, base: Path) -> str:
    return "" if Path(path).is_absolute() else f" (looked in {base or '.'})"


def _existing(base: Path, path: str, key: str, kind: Literal["file", "directory"]) -> Path:
    full = base / expand_home(path)
    if not full.exists():
        raise ValueError(f"{key}: {path!r} does not exist{_looked_in(path, base)}")
    if full.is_dir() is not (kind == "directory"):
        raise ValueError(f"{key}: {path!r} is not a {kind}")
    return full.resolve()


def _tree_sha256(directory: Path, known: KnownSources) -> str:
    """One hash of the names and contents of the files that make a model: configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in deciding_files(directory):
        digest.update(f"{path.name} {known.sha256(path)}\n".encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
