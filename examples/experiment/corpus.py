"""The text of the experiment, out of what every Python brings (PSF licence), and its division into parts by document.

Two kinds of documents: the 79 topics of the language reference (`pydoc_data.topics`, 113k tokens of the teacher), and the docstrings
of modules of the standard library, read from their source (the first DOCSTRING_CHARACTERS or so of each, so that none dominates). The
topics repeat each other ("special method names" holds seven others), so a paragraph stays only where it comes up first, in the longest
document: no text of one part is in another. That leaves 229 documents with 183k tokens in Python 3.11.

Documents stand in the order of a hash of their id, so that any first part of the corpus is a fair sample of it. Other versions of Python
have other texts: numbers are comparable within one only, and every result names its version.
"""

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from builder.dataset.shards import atomic_file

DOCSTRING_CHARACTERS = 1_500
"""Docstrings of a module are taken, each whole, until they are this long."""
SHORTEST_DOCSTRING = 80
SHORTEST_PARAGRAPH = 40
"""Shorter ones may come up again: headings, and lines like `import os`."""
SHORTEST_DOCUMENT = 500
NOT_DOCUMENTATION = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
PARTS = ("train", "validation", "test")


def part_of(document_id: str) -> str:
    """train (eight in ten documents), validation or test."""
    bucket = _hash(document_id) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def in_quarter(document_id: str) -> bool:
    """Whether a training document belongs to the quarter of the data that is tried too."""
    return _hash(document_id) // 10 % 4 == 0


def write_corpus(path: Path, *, max_characters: int | None = None) -> None:
    """JSON Lines with `id` and `text`; a first part of the whole, if it must not be longer than `max_characters`."""
    lines: list[str] = []
    total = 0
    for document_id, text in sorted(documents().items(), key=lambda item: _hash(item[0])):
        total += len(text)
        if max_characters is not None and total > max_characters and lines:
            break
        lines.append(json.dumps({"id": document_id, "text": text}, ensure_ascii=False) + "\n")
    with atomic_file(path) as file:
        file.write("".join(lines).encode())


def documents() -> dict[str, str]:
    """Texts by id, without what another one has said."""
    from pydoc_data.topics import topics

    found = {f"python-docs/{topic}": text for topic, text in topics.items()} | dict(_docstrings())
    seen: set[str] = set()
    unique: dict[str, str] = {}
    for document_id, text in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                kept.append(paragraph)
            if len(words) >= SHORTEST_PARAGRAPH:
                seen.add(words)
        if len(rest := "\n\n".join(kept)) >= SHORTEST_DOCUMENT:
            unique[document_id] = rest
    return unique


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = [
        [root / f"{name}.py", *(root / name).rglob("*.py")] for name in sys.stdlib_module_names
    ]
    for path in sorted(path for paths in modules for path in paths if path.exists()):
        parts = path.relative_to(root).with_suffix("").parts
        public = not any(part.startswith("_") and part != "__init__" for part in parts)
        if not public or NOT_DOCUMENTATION & set(parts):
            continue
        texts: list[str] = []
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= SHORTEST_DOCSTRING:
                    texts.append(docstring)
            if sum(map(len, texts)) >= DOCSTRING_CHARACTERS:
                yield "docstrings/" + "/".join(parts), "\n\n".join(texts)
                break


def _hash(document_id: str) -> int:
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big")
