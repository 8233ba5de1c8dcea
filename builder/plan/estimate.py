"""A recipe → what building it will take: tokens, bytes, time. Reads a sample of the corpus, and writes nothing.

How:  tokens are counted on the first documents and scaled by the size of the corpus, where that is known. Bytes and FLOP a token
      are those of `plan`, without attention; a FLOP takes what it takes in a matrix product on this device, and measured builds
      ran at about 60 % of that.
"""

import gzip
import io
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq
import torch
import zstandard

from builder.corpus.documents import Corpus, Document
from builder.corpus.encoder import Encoder
from builder.plan.plan import bytes_per_token, count_parameters
from builder.recipe.recipe import Recipe
from builder.sources.columns import settle_columns
from builder.sources.opening import make_encoder, open_corpus
from builder.sources.resolve import (
    CorpusSource,
    KnownSources,
    Sources,
    TeacherSource,
    resolve,
)
from builder.teacher.loading import load_tokenizer
from builder.text.files import TextFiles

SAMPLE_DOCUMENTS = 50
SAMPLE_TOKENS = 200_000
"""Of a longer document, no more are counted."""
SAMPLE_BYTES = 8 * 2**20
"""How much of a compressed file is read to learn how well it is compressed."""
EFFICIENCY = 0.6
"""Share of a plain matrix product's rate that a whole build reached (embedded teacher, float32, two cores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build will take; None where it cannot be known beforehand."""

    plan: dict[str, Any]
    """The resolved recipe."""
    tokens: int | None
    bytes: int | None
    seconds: float | None
    device: str
    is_most: bool
    """Whether it will be no more than that: completions may end early."""


def estimate(recipe: Recipe, base: Path, *, device: str) -> Estimate:
    """Estimate a build without touching its directory.

    Raises:
        ValueError: as `build`, for what can be seen before the teacher is loaded.
    """
    sources = resolve(recipe, base, KnownSources())
    recipe, _ = settle_columns(recipe, sources.corpus, KnownSources())
    tokens, per_token = expect(recipe, sources)
    parameters = _count_parameters(sources.teacher)
    rate = _tokens_per_second(parameters, recipe.teacher.dtype, device) if parameters else None
    return Estimate(
        plan=sources.plan(recipe),
        tokens=tokens,
        bytes=None if tokens is None or per_token is None else round(tokens * per_token),
        # How fast a teacher writes depends on how many completions it writes at once, and on where they end.
        seconds=tokens / rate if tokens and rate and not recipe.generation else None,
        device=device,
        is_most=recipe.generation is not None,
    )


def expect(recipe: Recipe, sources: Sources) -> tuple[int | None, float | None]:
    """Tokens of a build, and what each takes on the disk; None for what cannot be known beforehand.

    Raises:
        ValueError: as `build`, for what can be seen before the teacher is loaded.
    """
    recipe, _ = settle_columns(recipe, sources.corpus, KnownSources())
    tokens, kept_share = _count_tokens(recipe, sources)
    if not recipe.output.completions_only:
        kept_share = 1.0
    sizes = _sizes(recipe, sources.teacher)
    if sizes is None:
        return tokens, None
    return tokens, bytes_per_token(recipe, kept_share=kept_share, **sizes)


def _count_tokens(recipe: Recipe, sources: Sources) -> tuple[int | None, float]:
    """Tokens of a build, counted where the sample is all of it, else scaled from the sample; and the share of positions in the loss mask."""
    corpus, teacher = recipe.corpus, sources.teacher
    tokenizer = load_tokenizer(
        teacher.location,
        commit=teacher.commit,
        tokenizer=teacher.tokenizer,
        weights=teacher.weights,
    )
    encoder = make_encoder(recipe, tokenizer, sources.template)
    documents = open_corpus(corpus, sources.corpus, are_prompts=recipe.generation is not None)
    num_documents = num_rows = num_tokens = num_kept = 0
    for document in documents:
        if num_documents == SAMPLE_DOCUMENTS:
            break
        num_documents += 1
        num_rows = num_documents + documents.offset["skipped"]
        found, kept = _tokens_of(document, encoder, recipe)
        num_tokens += found
        num_kept += kept
        if num_documents == corpus.max_documents or num_tokens >= (corpus.max_tokens or math.inf):
            return num_tokens, num_kept / max(num_tokens, 1)
    else:
        if not num_tokens and recipe.generation:
            raise ValueError(
                "the corpus has no prompt that leaves room for generation.max_new_tokens; choose a larger sequences.max_length"
            )
        if not num_tokens:
            column = "messages_column" if corpus.messages_column else "text_column"
            what = "chat with an answer" if corpus.messages_column else "text"
            raise ValueError(f"the corpus has no {what}; check corpus.{column}")
        return num_tokens, num_kept / num_tokens
    share = _share_of_corpus(num_rows, documents, recipe, sources.corpus)
    whole = share and round(num_tokens / share)
    most = corpus.max_documents and round(num_tokens / num_documents * corpus.max_documents)
    known = [n for n in (whole, most, corpus.max_tokens) if n]
    return min(known, default=None), num_kept / max(num_tokens, 1)


def _tokens_of(document: Document, encoder: Encoder, recipe: Recipe) -> tuple[int, int]:
    """Tokens of the rows of a document, and positions in the loss mask among them; at most, where the teacher completes it."""
    how = recipe.generation
    if how is None:
        tokens = kept = characters = 0
        for sequence in encoder.sequences(document):
            tokens += len(sequence.token_ids)
            kept += len(sequence.loss_positions)
            characters += len(sequence.text)
            if tokens >= SAMPLE_TOKENS and not (document.messages or encoder.truncates):
                share = characters / document.length
                return round(tokens / share), round(kept / share)
        return tokens, kept
    prompt = encoder.encode_prompt(document, recipe.sequences.max_length)
    if prompt is None or (len(prompt.token_ids) + how.max_new_tokens > recipe.sequences.max_length):
        return 0, 0
    length = len(prompt.token_ids) + how.max_new_tokens
    return how.samples * length, how.samples * how.max_new_tokens


def _share_of_corpus(
    num_rows: int, documents: Corpus, recipe: Recipe, source: CorpusSource
) -> float | None:
    """Which part of the corpus its first rows are; None where the Hub does not say how many there are."""
    if not isinstance(documents.stream, TextFiles) and source.format == "hub":
        splits = documents.stream.info.splits or {}
        examples: int | None = getattr(splits.get(recipe.corpus.split), "num_examples", None)
        return num_rows / examples if examples else None
    if source.format == "parquet":
        total: int = sum(pq.read_metadata(path).num_rows for path in source.files)
        return num_rows / total
    sizes = [path.stat().st_size for path in source.files]
    if source.format == "lines":
        return _share_of_files(documents) / sum(sizes)
    if source.format == "text" and recipe.corpus.text_unit == "file":
        return sum(sizes[:num_rows]) / sum(sizes)
    lines = itertools.chain.from_iterable(_open(path) for path in source.files)
    size = sum(len(line) for line in itertools.islice(lines, num_rows))
    return size / (sum(sizes) * _expansion(max(source.files, key=lambda path: path.stat().st_size)))


def _share_of_files(documents: Corpus) -> float:
    """Bytes of texts and JSON lines up to where a corpus has been read."""
    stream, offset = documents.stream, documents.offset
    assert isinstance(stream, TextFiles)
    number: int = offset["file"]
    path = stream.files[number]
    before = sum(file.stat().st_size for file in stream.files[:number])
    if stream.unit_of(number) == "file":
        return before + path.stat().st_size
    with _open(path) as lines:
        read = sum(len(line) for line in itertools.islice(lines, offset["row"]))
    return before + read / _expansion(path)


def _expansion(path: Path) -> float:
    """Bytes that a byte of a compressed file stands for, from its beginning."""
    if path.suffix not in (".gz", ".zst"):
        return 1.0
    with path.open("rb") as raw:
        stream, size = _open(path, raw), 0
        while size < SAMPLE_BYTES and (content := stream.read(2**16)):
            size += len(content)
        return size / raw.tell()


def _open(path: Path, raw: BinaryIO | None = None) -> BinaryIO:
    raw = raw or path.open("rb")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_size=2**13)
        return cast(BinaryIO, io.BufferedReader(reader))
    return raw


def _sizes(recipe: Recipe, source: TeacherSource) -> dict[str, int] | None:
    """Vocabulary and hidden size where they matter; None if the teacher has no config.json to tell them."""
    from transformers import AutoConfig

    if recipe.output.top_k != "all" and not recipe.output.hidden_states:
        return {}
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
    return count_parameters(Path(source.location))


def _tokens_per_second(parameters: int, dtype: str, device: str) -> float:
    """Rate of a teacher of this size, from what matrix products reach on this device."""
    return EFFICIENCY * product_flops(dtype, device) / (2 * parameters)


def product_flops(dtype: str, device: str) -> float:
    """FLOP a second that a plain matrix product reaches; takes a second."""
    size = 4096 if device.startswith("cuda") else 1024
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    products, started = 0, 0.0
    for warm_up in (True, False):
        started, products = time.perf_counter(), 0
        while time.perf_counter() - started < (0.1 if warm_up else 0.5):
            (matrix @ matrix)[0, 0].item()
            products += 1
    return products * 2 * size**3 / (time.perf_counter() - started)
