"""A corpus → the columns that a recipe leaves open: found where there is no doubt, and said.

In:   a recipe that names no column of texts or of chats, or none of tools, and its pinned corpus.
Out:  the same recipe with names for them, which plan and manifest hold as if the recipe had named them.

How:  the first rows say what its columns are. `text` is taken where there is one, as ever; else the only one of `messages`, `conversations`,
      `conversation`, or `prompt` with `completion` (with [generation], `prompt`). Where there are several, the recipe has to say which.

Cost: a hundred rows are read, at the first start of a build.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow.parquet as pq

from builder.corpus.documents import open_hub, open_local
from builder.corpus.rows import USUAL_NAMES
from builder.corpus.shapes import looks_like_messages
from builder.recipe.recipe import Recipe
from builder.recipe.sections import CorpusRecipe
from builder.sources.known import KnownSources
from builder.sources.resolve import CorpusSource
from builder.text.files import is_json_lines

CHATS = ("messages", "conversations", "conversation")
PROMPT, COMPLETION = "prompt", "completion"

USUAL = frozenset(("text", *CHATS, PROMPT, COMPLETION, *USUAL_NAMES.values()))
ROWS = 100
"""Rows that are looked at."""

Kind = Literal["text", "chat", "objects", "other", "null"]


def settle_columns(
    recipe: Recipe, source: CorpusSource, known: KnownSources
) -> tuple[Recipe, list[str]]:
    """A recipe that names its columns, and a line on those that were found.

    Args:
        recipe: which may leave them open.
        source: of its corpus.
        known: what an earlier run has found, and what this one does.

    Raises:
        ValueError: it cannot be told which columns are meant, or the recipe asks for something that such a corpus does not have.
    """
    corpus = recipe.corpus
    if corpus.embedded:
        return recipe, []
    needs_extras = corpus.messages_column is not None or not corpus.names_content
    is_open = [key for key in USUAL_NAMES if getattr(corpus, key) is None]
    if corpus.names_content and not (needs_extras and is_open):
        return recipe, []
    key = json.dumps([source.provenance, corpus.config, corpus.split], sort_keys=True)
    if key not in known.columns:
        known.columns[key] = _look(corpus, source)
    kinds = known.columns[key]
    found: dict[str, Any] = {}
    if not corpus.names_content:
        found = _content(kinds, is_generated=recipe.generation is not None)
    told = [f"corpus.{key} = {json.dumps(name)}" for key, name in found.items() if name != "text"]
    if corpus.messages_column or "messages_column" in found:
        for key in is_open:
            if USUAL_NAMES[key] in kinds and _is_for_templates(key, kinds[USUAL_NAMES[key]]):
                found[key] = USUAL_NAMES[key]
                told.append(f"corpus.{key} = {json.dumps(USUAL_NAMES[key])}")
    if not corpus.names_content and found.get("text_column") == "text":
        told = []
        if others := [name for name in CHATS if kinds.get(name) == "chat"]:
            told = [
                f'corpus.text_column = "text", though the corpus has {" and ".join(others)}, too'
            ]
    notices = [f"found in the corpus: {', '.join(told)}"] if told else []
    return recipe.with_columns(found), notices


def _content(kinds: dict[str, str], *, is_generated: bool) -> dict[str, Any]:
    """Names for the columns of texts or chats."""
    if "text" in kinds:
        return {"text_column": "text"}
    found: list[dict[str, Any]] = [
        {"messages_column": name} for name in CHATS if kinds.get(name) == "chat"
    ]
    prompt, completion = kinds.get(PROMPT), kinds.get(COMPLETION)
    name = {"text": "text_column", "chat": "messages_column"}.get(prompt or "")
    if name and is_generated:
        found.append({name: PROMPT})
    elif name and completion in (prompt, "null"):
        found.append({"prompt_column": PROMPT, name: COMPLETION})
    if len(found) > 1:
        listed = ", or ".join(
            " with ".join(f"corpus.{key} = {json.dumps(name)}" for key, name in some.items())
            for some in found
        )
        raise ValueError(f"several columns of the corpus could hold the texts; set {listed}")
    return found[0] if found else {"text_column": "text"}


def _is_for_templates(key: str, kind: str) -> bool:
    """Whether a column of a usual name is what that says; what is not, its reader refuses with a line."""
    return key != "documents_column" or kind in ("objects", "null")


def _look(corpus: CorpusRecipe, source: CorpusSource) -> dict[str, str]:
    """What the columns of usual names are, by the first rows; nothing where these cannot be read, which a reader will say better."""
    kinds: dict[str, str] = {}
    try:
        for row in itertools.islice(_rows(corpus, source), ROWS):
            for name in USUAL.intersection(row):
                if kinds.get(name, "null") == "null":
                    kinds[name] = _kind(row[name])
        if source.format == "parquet":  # columns that only later files have
            for path in source.files[1:]:
                for name in USUAL.intersection(pq.read_schema(path).names):
                    kinds.setdefault(name, "null")
    except Exception:  # whatever a damaged file comes to
        return {}
    return kinds


def _rows(corpus: CorpusRecipe, source: CorpusSource) -> Iterator[dict[str, Any]]:
    if source.format == "hub":
        assert corpus.repo
        assert source.commit
        yield from open_hub(
            corpus.repo, commit=source.commit, config=corpus.config, split=corpus.split
        )
    elif source.format == "parquet":
        names = tuple(USUAL.intersection(pq.read_schema(source.files[0]).names))
        yield from open_local(source.files[:1], format="parquet", text_unit="file", columns=names)
    elif source.format == "csv":
        yield from open_local(source.files, format="csv", text_unit="line", columns=())
    elif source.format in ("json", "lines"):
        # Beside them, texts of files go where these have theirs.
        files = tuple(path for path in source.files if is_json_lines(path))
        for line in open_local(files, format="json", text_unit="line", columns=()):
            if text := line["text"].removeprefix("\ufeff").strip():
                row = json.loads(text)
                yield row if isinstance(row, dict) else {}
    else:
        yield {"text": ""}


def _kind(value: Any) -> Kind:
    if value is None:
        return "null"
    if looks_like_messages(value):
        return "chat"
    if isinstance(value, str):
        return "text"
    is_of_objects = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return "objects" if is_of_objects and value else "null" if value == [] else "other"
