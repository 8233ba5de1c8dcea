"""What a recipe names → the exact thing it stands for: a commit on the Hub, or files with their hashes.

In:   a recipe, and the directory at which its relative paths start.
Out:  Sources: plain values that say where to read from, and their provenance, which enters the fingerprint.

How:  what was asked of the Hub and hashed before is taken from KnownSources (see `known`); paths are found by `files`.

Cost: that of `known`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.recipe.fields import OWN
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe, SequencesRecipe, TeacherRecipe
from builder.sources import demo
from builder.sources.changes import Seen, Watch, deciding_files
from builder.sources.files import CorpusFormat, corpus_files, existing, expand_home, format_of
from builder.sources.known import KnownSources


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
    files = corpus_files(recipe.files, base)
    formats = {format_of(path) for path in files}
    if formats == {"text", "json"}:
        formats = {"lines"}
    if len(formats) > 1:
        raise ValueError(
            f"corpus.files mixes formats ({', '.join(sorted(formats))}); give files of one format (only .txt and .jsonl can be mixed)"
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
        directory = existing(base, recipe.path, "teacher.path", "directory")
        from builder.checkpoint.checkpoint import refuse_adapter  # which loads torch

        refuse_adapter(str(directory))
        directories.append(directory)
        location, sha256 = str(directory), _tree_sha256(directory, known)
        provenance = {"kind": "directory", "name": directory.name, "sha256": sha256}
    elif recipe.python:
        return _python_teacher(recipe, base, known)
    else:
        assert recipe.gguf
        file = existing(base, recipe.gguf, "teacher.gguf", "file")
        if file.suffix != ".gguf":
            raise ValueError(
                f"teacher.gguf: {recipe.gguf!r} is not a .gguf file; name one, or a directory as teacher.path"
            )
        files.append(file)
        location = str(file)
        provenance = {"kind": "gguf", "name": file.name, "sha256": known.sha256(file)}
        if recipe.tokenizer:
            beside = existing(base, recipe.tokenizer, "teacher.tokenizer", "directory")
            directories.append(beside)
            tokenizer = str(beside)
            provenance["tokenizer_files_sha256"] = _tree_sha256(beside, known)
        if recipe.config:
            is_directory = (base / expand_home(recipe.config)).is_dir()
            path = f"{recipe.config}/config.json" if is_directory else recipe.config
            original = existing(base, path, "teacher.config", "file")
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
    code = existing(base, recipe.python, "teacher.python", "file")
    if code.suffix != ".py":
        raise ValueError(
            f"teacher.python: {recipe.python!r} is not a .py file; name one with a function load_teacher"
        )
    weights = [existing(base, path, "teacher.weights", "file") for path in recipe.weights]
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
    path = existing(base, recipe.chat_template, "sequences.chat_template", "file")
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


def _check_not_here(repo: str, key: str) -> None:
    """The libraries read a directory of the working directory rather than a Hub repository of the same name."""
    if Path(repo).exists():
        raise ValueError(
            f"{repo!r} is to come from the Hub, but there is a directory of this name here, which would be read instead; "
            f"run from another directory, or name it as {key}"
        )


def _tree_sha256(directory: Path, known: KnownSources) -> str:
    """One hash of the names and contents of the files that make a model: configuration, weights, tokenizer."""
    digest = hashlib.sha256()
    for path in deciding_files(directory):
        digest.update(f"{path.name} {known.sha256(path)}\n".encode())
    return digest.hexdigest()
