"""Files or a dataset, and a teacher → a recipe to begin with.

In:   what a user has, as named on the command line.
Out:  a commented recipe whose columns are those of the corpus, and which the builder takes.

How:  the first rows of a local corpus say what its columns are. Where none has a usual name, the one with the longest texts is taken.
"""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from builder.corpus.documents import open_local
from builder.corpus.shapes import looks_like_messages
from builder.recipe.sections import CorpusRecipe, SequencesRecipe
from builder.sources.known import KnownSources
from builder.sources.resolve import CorpusSource, resolve_corpus
from builder.text.files import is_json_lines

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
EMBEDDED = "smollm2-135m-instruct"
DEFAULT_LENGTH = SequencesRecipe().max_length
ROWS = 20
"""Rows that are looked at."""
USUAL = ("text", "messages", "conversations", "conversation", "prompt", "completion")


def starter(
    corpus: list[str], teacher: str | None, *, name: str, base: Path, is_chat: bool = False
) -> str:
    """A recipe as TOML.

    Args:
        corpus: paths or globs of files, or one dataset on the Hub.
        teacher: a directory, a GGUF file, or a model on the Hub; None for the embedded one.
        name: of the dataset.
        base: directory of the recipe, from which its paths start.
        is_chat: whether the corpus holds chats.

    Raises:
        ValueError: there is no such file, or it has no column of texts, or of chats where these are asked for.
    """
    where, columns, is_chat = _corpus(corpus, base, is_chat)
    lines = [
        "# Decides every byte of a dataset. docs/recipe.md has all keys.",
        f"name = {json.dumps(name)}",
        "",
        "[corpus]",
        *where,
        *columns,
        "# max_tokens = 1_000_000         # stop early",
        '# license = "cc-by-4.0"          # of the texts; publishing needs it',
        "",
        "[teacher]",
        *_teacher(teacher, base),
        "",
        "[sequences]",
        f"max_length = {_length(teacher):<18} # tokens that the teacher sees at once",
    ]
    lines.append(
        '# batch_tokens = "auto"           # tries on the device what is fastest, when the build begins'
    )
    if is_chat:
        lines.append('# learn = "last"                # for templates that rewrite earlier answers, such as Qwen3\'s')  # fmt: skip
    lines += [
        "",
        "[output]",
        "top_k = 50",
        "tail_samples = 4                # sampled tail tokens: losses are unbiased with them",
    ]
    if is_chat:
        lines.append("completions_only = true         # distributions of the answers alone: prompts cost next to nothing")  # fmt: skip
    return "\n".join(lines) + "\n"


def _corpus(corpus: list[str], base: Path, is_chat: bool) -> tuple[list[str], list[str], bool]:
    """The lines that say where it is, those that name its columns, and whether these are chats."""
    if len(corpus) == 1 and REPO_ID.fullmatch(corpus[0]) and not Path(corpus[0]).exists():
        column = ['messages_column = "messages"'] if is_chat else ['# text_column = "text"']
        return [f"repo = {json.dumps(corpus[0])}", '# config = "…"'], column, is_chat
    files = [_relative(path, base) for path in corpus]
    source = resolve_corpus(CorpusRecipe(files=(corpus[0],)), Path(), KnownSources())
    rows = _first_rows(source)
    columns, found = _columns(rows, source, is_chat)
    return [f"files = {json.dumps(files, ensure_ascii=False)}"], columns, found


def _columns(
    rows: list[dict[str, Any]], source: CorpusSource, is_chat: bool
) -> tuple[list[str], bool]:
    if source.format == "text":
        if is_chat:
            raise ValueError(
                "--chat needs a column with lists of messages, but .txt files have none; name .jsonl or .parquet files"
            )
        return ['text_unit = "file"              # or "line": a document per line'], False
    names = list(dict.fromkeys(name for row in rows for name in row))
    chats = [name for name in names if any(looks_like_messages(row.get(name)) for row in rows)]
    texts = {
        name: sum(len(row[name]) for row in rows if isinstance(row.get(name), str))
        for name in names
        if name not in chats and any(isinstance(row.get(name), str) for row in rows)
    }
    listed = ", ".join(names) or "none"
    if is_chat or (chats and "text" not in texts):
        if not chats:
            raise ValueError(
                f"--chat needs a column with lists of messages, but the corpus has none (columns: {listed}); name other files, or leave out --chat"
            )
        chosen = next((name for name in USUAL if name in chats), chats[0])
        return [f"messages_column = {json.dumps(chosen)}"], True
    if not texts:
        raise ValueError(f"the corpus has no column of texts (columns: {listed}); name other files")
    if "text" not in texts and {"prompt", "completion"} <= set(texts):
        return ['text_column = "completion"', 'prompt_column = "prompt"'], False
    chosen = "text" if "text" in texts else max(texts, key=lambda name: texts[name])
    others = [name for name in names if name != chosen]
    comment = f"    # others: {', '.join(others)}" if others else ""
    return [f"text_column = {json.dumps(chosen)}{comment}"], False


def _first_rows(source: CorpusSource) -> list[dict[str, Any]]:
    path = source.files[0]
    if source.format == "parquet":
        batch = next(pq.ParquetFile(path).iter_batches(batch_size=ROWS), None)
        return batch.to_pylist() if batch is not None else []
    if source.format == "csv":
        records = open_local(source.files[:1], format="csv", text_unit="line", columns=())
        return list(itertools.islice(records, ROWS))
    if source.format not in ("json", "lines"):
        return []
    files = tuple(file for file in source.files if is_json_lines(file))
    lines = open_local(files, format="json", text_unit="line", columns=())
    try:
        rows = [json.loads(line["text"]) for line in itertools.islice(lines, ROWS) if line["text"].strip()]  # fmt: skip
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name} is not JSON lines ({error.msg} at column {error.colno}); expected one JSON object per line"
        ) from None
    return [row for row in rows if isinstance(row, dict)]


def _teacher(teacher: str | None, base: Path) -> list[str]:
    if teacher is None:
        return [
            f'embedded = "{EMBEDDED}"',
            'dtype = "float32"               # on a GPU, "bfloat16" is faster',
        ]
    path = Path(teacher)
    lines = ['dtype = "bfloat16"', '# license = "apache-2.0"         # of the model; publishing needs it']  # fmt: skip
    if path.suffix == ".gguf" and path.is_file():
        return [f"gguf = {json.dumps(_relative(teacher, base))}", *lines]
    if path.is_dir():
        return [f"path = {json.dumps(_relative(teacher, base))}", *lines]
    if REPO_ID.fullmatch(teacher):
        return [f"repo = {json.dumps(teacher)}", *lines]
    raise ValueError(
        f"--teacher {teacher!r} is neither a directory, a .gguf file nor a model on the Hub (ORG/NAME)"
    )


def _length(teacher: str | None) -> int:
    """Tokens of a sequence: the default, or all that the teacher was made for."""
    config = Path(teacher or "") / "config.json"
    if teacher is None or not config.is_file():
        return DEFAULT_LENGTH
    values = json.loads(config.read_text(encoding="utf-8"))
    limit = {**values, **(values.get("text_config") or {})}.get("max_position_embeddings")
    return min(DEFAULT_LENGTH, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_LENGTH


def _relative(path: str, base: Path) -> str:
    """A path or glob, as it is written in a recipe in `base`."""
    if Path(path).is_absolute() or path.startswith("~"):
        return path
    return Path(os.path.relpath(path, base)).as_posix()
