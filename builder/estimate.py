"""A recipe → what building it will take: tokens, bytes, time. Reads a sample of the corpus, and writes nothing.

How:  tokens are counted on the first documents and scaled by the size of the corpus, where that is known. The teacher costs
      2 FLOP a parameter and token (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1), at the rate that a
      matrix product reaches on this device; measured builds ran at about 60 % of that.
"""

import itertools
import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from builder.recipe import Recipe
from builder.schema import Layout, columns
from builder.sources import (
    CorpusSource,
    KnownSources,
    TeacherSource,
    resolve_corpus,
    resolve_teacher,
)
from builder.stream import make_encoder, open_corpus
from builder.teacher import load_tokenizer

SAMPLE_DOCUMENTS = 50
EFFICIENCY = 0.6
"""Share of a plain matrix product's rate that a whole build reached (embedded teacher, float32, two cores)."""

BYTES_A_VALUE = {"int32": 1.7, "float16": 1.4, "float32": 3.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build will take; None where it cannot be known beforehand."""

    plan: dict[str, Any]
    """The resolved recipe."""
    tokens: int | None
    bytes: int | None
    seconds: float | None
    device: str


def estimate(recipe: Recipe, base: Path, *, device: str) -> Estimate:
    """Estimate a build without touching its directory.

    Raises:
        ValueError: as `build`, for what can be seen before the teacher is loaded.
    """
    corpus_source = resolve_corpus(recipe.corpus, base, KnownSources())
    teacher_source = resolve_teacher(recipe.teacher, base, KnownSources())
    tokens = _count_tokens(recipe, corpus_source, teacher_source)
    parameters = _count_parameters(teacher_source)
    rate = _tokens_per_second(parameters, recipe.teacher.dtype, device) if parameters else None
    per_token = _bytes_per_token(recipe, teacher_source)
    return Estimate(
        plan={
            "recipe": recipe.published(),
            "corpus": corpus_source.provenance,
            "teacher": teacher_source.provenance,
        },
        tokens=tokens,
        bytes=round(tokens * per_token) if tokens and per_token else None,
        seconds=tokens / rate if tokens and rate else None,
        device=device,
    )


def _count_tokens(
    recipe: Recipe, corpus_source: CorpusSource, teacher_source: TeacherSource
) -> int | None:
    corpus = recipe.corpus
    tokenizer = load_tokenizer(
        teacher_source.location, commit=teacher_source.commit, tokenizer=teacher_source.tokenizer
    )
    encoder = make_encoder(recipe.sequences, tokenizer)
    documents = open_corpus(corpus, corpus_source)
    num_documents = num_tokens = num_bytes = 0
    is_whole_corpus = True
    for document in itertools.islice(documents, SAMPLE_DOCUMENTS + 1):
        if num_documents == SAMPLE_DOCUMENTS:
            is_whole_corpus = False
            break
        num_documents += 1
        num_tokens += sum(len(sequence.token_ids) for sequence in encoder.encode(document))
        num_bytes += len(document.text.encode())
    if not num_documents:
        raise ValueError("the corpus has no text in its first file; check corpus.text_column")
    if is_whole_corpus:
        expected: int | None = num_tokens
    elif corpus_source.format == "hub":
        splits = documents.stream.info.splits or {}
        examples = splits[corpus.split].num_examples if corpus.split in splits else None
        expected = examples and round(num_tokens / num_documents * examples)
    else:
        size = sum(path.stat().st_size for path in corpus_source.files)
        expected = round(num_tokens / num_bytes * size)
    limits = [corpus.max_tokens]
    if corpus.max_documents:
        limits.append(round(num_tokens / num_documents * corpus.max_documents))
    return min((n for n in [expected, *limits] if n), default=None)


def _bytes_per_token(recipe: Recipe, teacher_source: TeacherSource) -> float | None:
    """Of the default profile, by what the embedded teacher's columns take after compression."""
    output = recipe.published()["output"]
    sizes = {"vocab_size": 0, "hidden_size": 0}
    if output["top_k"] == "all" or output["hidden_states"]:
        found = _sizes(teacher_source)
        if found is None:
            return None
        sizes = found
    layout = Layout.of(output, sizes)
    values = {
        name: sum(layout.width(c) for c in columns(layout) if c.dtype == name and c.shape)
        for name in BYTES_A_VALUE
    }
    text = 5 if layout.text else 0
    return text + sum(BYTES_A_VALUE[name] * count for name, count in values.items())


def _sizes(source: TeacherSource) -> dict[str, int] | None:
    """Vocabulary and hidden size, where the teacher has a config.json to tell them."""
    from transformers import AutoConfig

    if Path(source.location).is_file():
        return None
    config = AutoConfig.from_pretrained(
        source.location, revision=source.commit, trust_remote_code=False
    ).get_text_config()
    return {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}


def _count_parameters(source: TeacherSource) -> int | None:
    """Parameters of the teacher from its files' heads, without loading or downloading weights."""
    if source.commit is not None:
        from huggingface_hub import get_safetensors_metadata
        from huggingface_hub.errors import NotASafetensorsRepoError

        try:
            counts = get_safetensors_metadata(
                source.location, revision=source.commit
            ).parameter_count
        except NotASafetensorsRepoError:
            return None
        return sum(counts.values())
    path = Path(source.location)
    if path.is_file():
        return None
    total = 0
    for weights in path.glob("*.safetensors"):
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        for name, tensor in head.items():
            if name != "__metadata__":
                total += int(torch.Size(tensor["shape"]).numel())
    return total or None


def _tokens_per_second(parameters: int, dtype: str, device: str) -> float:
    """Rate of a teacher of this size, from a second of matrix products on this device."""
    size = 4096 if device.startswith("cuda") else 1024
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    products, started = 0, 0.0
    for warm_up in (True, False):
        started, products = time.perf_counter(), 0
        while time.perf_counter() - started < (0.1 if warm_up else 0.5):
            (matrix @ matrix)[0, 0].item()
            products += 1
    flops = products * 2 * size**3 / (time.perf_counter() - started)
    return EFFICIENCY * flops / (2 * parameters)
