"""A recipe → what building it will take: tokens, bytes, time. Reads a sample of the corpus, and writes nothing.

How:  tokens are counted on the first documents and scaled by the size of the corpus, where that is known. Bytes and FLOP a token
      are those of `storage` and `compute`, without attention; a FLOP takes what it takes in a matrix product on this device, and measured builds
      ran at about 60 % of that.
"""

import gzip
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq
import torch
import zstandard

from builder.card.recipe_text import resolved_toml
from builder.corpus.documents import Corpus, Document, check_partitions, readable
from builder.corpus.encoder import Encoder
from builder.dataset.printable import as_size, counted, duration
from builder.plan.compute import count_parameters
from builder.plan.fit import check_fit
from builder.plan.storage import bytes_per_token
from builder.recipe.recipe import Recipe
from builder.sources.columns import settle_columns
from builder.sources.known import KnownSources
from builder.sources.opening import make_encoder, open_corpus
from builder.sources.resolve import CorpusSource, Sources, TeacherSource, resolve
from builder.teacher.attention import config_of
from builder.teacher.lengths import max_length_of
from builder.teacher.loading import load_tokenizer
from builder.text.files import TextFiles

Notice = Callable[[str], None]

SAMPLE_DOCUMENTS = 50
SAMPLE_TOKENS = 200_000
"""Of a longer document, no more are counted."""
SAMPLE_BYTES = 8 * 2**20
"""How much of a compressed file is read to learn how well it is compressed."""
EFFICIENCY = 0.6
"""Share of a plain matrix product's rate that a whole build reached (embedded teacher, float32, two cores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The first documents of a corpus."""

    documents: int
    """That were looked at, skipped ones among them."""
    skipped: int
    """Of these, documents that give no row."""
    cut: int
    """Of these, documents that are longer than a sequence: cut into chunks, or off, as the recipe says."""
    tokens: int
    kept_share: float
    """Share of the positions that are in the loss mask."""
    is_all: bool
    """Whether a build has no other documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build will take; None where it cannot be known beforehand."""

    plan: dict[str, Any]
    """The resolved recipe, and the exact corpus and teacher behind it."""
    recipe: str
    """The resolved recipe as TOML."""
    sample: Sample
    tokens: int | None
    bytes: int | None
    seconds: float | None
    device: str
    is_most: bool
    """Whether it will be no more than that: completions may end early."""
    notices: list[str]
    """What a build would say, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """What a teacher's configuration says of it."""

    vocab_size: int
    hidden_size: int
    max_length: int | None


def estimate(recipe: Recipe, base: Path, *, device: str) -> Estimate:
    """Estimate a build without touching its directory.

    Raises:
        ValueError: as in `build`, for everything that can be checked before the teacher is loaded.
    """
    known = KnownSources()
    sources = resolve(recipe, base, known)
    recipe, notices = settle_columns(recipe, sources.corpus, known)
    sizes = _sizes(recipe, sources.teacher)
    if sizes:
        check_fit(recipe, **asdict(sizes))
    sample, tokens = _count_tokens(recipe, sources, notices.append)
    per_token = _bytes_per_token(recipe, sample, sizes)
    parameters = _count_parameters(sources.teacher)
    rate = _tokens_per_second(parameters, recipe.teacher.dtype, device) if parameters else None
    return Estimate(
        plan=sources.plan(recipe),
        recipe=resolved_toml(recipe, sources),
        sample=sample,
        tokens=tokens,
        bytes=None if tokens is None or per_token is None else round(tokens * per_token),
        # How fast a teacher writes depends on how many completions it writes at once, and on where they end.
        seconds=tokens / rate if tokens and rate and not recipe.generation else None,
        device=device,
        is_most=recipe.generation is not None,
        notices=notices,
    )


def expect(recipe: Recipe, sources: Sources) -> tuple[int | None, float | None]:
    """Estimate the tokens of a build and its bytes per token on disk; None for what is unknown in advance.

    Raises:
        ValueError: as in `build`, for everything that can be checked before the teacher is loaded.
    """
    recipe, _ = settle_columns(recipe, sources.corpus, KnownSources())
    sample, tokens = _count_tokens(recipe, sources)
    return tokens, _bytes_per_token(recipe, sample, _sizes(recipe, sources.teacher))


def describe(found: Estimate) -> str:
    """Describe in plain text what a build takes."""
    about = "at most " if found.is_most else "" if found.sample.is_all else "about "
    lines = {
        "documents": _documents(found),
        "tokens": None if found.tokens is None else f"{about}{found.tokens:,}",
        "disk": None
        if found.bytes is None
        else f"{'at most' if found.is_most else 'about'} {as_size(found.bytes)}",
        "time": None
        if found.seconds is None
        else f"about {duration(max(1, found.seconds))} on {found.device}",
    }
    return "\n".join(f"{key:<11}{value or 'unknown'}" for key, value in lines.items())


def _documents(found: Estimate) -> str:
    """How many documents are skipped or cut."""
    sample, recipe = found.sample, found.plan["recipe"]
    looked_at = (
        f"all {sample.documents:,}" if sample.is_all else f"of the first {sample.documents:,}"
    )
    reason = (
        "without an answer to learn"
        if recipe["corpus"].get("messages_column")
        else "null, empty or blank"
    )
    if found.is_most:
        reason = "blank, or too long to be completed"
    parts = [f"{sample.skipped:,} skipped ({reason})" if sample.skipped else "none skipped"]
    if not found.is_most:
        how = "off" if recipe["sequences"]["long_documents"] == "truncate" else "into chunks"
        where = f"cut {how} at sequences.max_length = {recipe['sequences']['max_length']:,}"
        parts.append(f"{f'{sample.cut:,}' if sample.cut else 'none'} {where}")
    return f"{looked_at}: {', '.join(parts)}"


def _bytes_per_token(recipe: Recipe, sample: Sample, sizes: _Sizes | None) -> float | None:
    output = recipe.output
    if sizes is None and (output.top_k == "all" or output.hidden_states):
        return None
    return bytes_per_token(
        recipe,
        kept_share=sample.kept_share if output.completions_only else 1.0,
        vocab_size=sizes.vocab_size if sizes else 0,
        hidden_size=sizes.hidden_size if sizes else 0,
    )


def _count_tokens(
    recipe: Recipe, sources: Sources, notice: Notice = lambda _: None
) -> tuple[Sample, int | None]:
    """The first documents, and the tokens of a build: counted where these are all of it, else scaled."""
    corpus, teacher = recipe.corpus, sources.teacher
    documents = open_corpus(corpus, sources.corpus, are_prompts=recipe.generation is not None)
    check_partitions(documents.stream, recipe.output.partitions)
    tokenizer = load_tokenizer(
        teacher.location,
        commit=teacher.commit,
        tokenizer=teacher.tokenizer,
        weights=teacher.weights,
    )
    encoder = make_encoder(recipe, tokenizer, sources.template, notice=notice)
    num_documents = num_tokens = num_kept = num_empty = num_cut = num_blank = 0
    is_all = True
    for document in documents:
        if num_documents == SAMPLE_DOCUMENTS:
            is_all = False
            break
        num_documents += 1
        num_blank = documents.offset["skipped"]
        found, kept, is_cut = _tokens_of(document, encoder, recipe)
        num_tokens += found
        num_kept += kept
        num_empty += not found
        num_cut += is_cut
        if num_documents == corpus.max_documents or num_tokens >= (corpus.max_tokens or math.inf):
            break
    else:
        num_blank = documents.offset["skipped"]
        _check_not_empty(num_tokens, num_blank, recipe)
    sample = Sample(
        documents=num_documents + num_blank,
        skipped=num_blank + num_empty,
        cut=num_cut,
        tokens=num_tokens,
        kept_share=num_kept / max(num_tokens, 1),
        is_all=is_all,
    )
    if is_all:
        return sample, num_tokens
    share = _share_of_corpus(sample.documents, documents, recipe, sources.corpus)
    whole = share and round(num_tokens / share)
    most = corpus.max_documents and round(num_tokens / num_documents * corpus.max_documents)
    known = [n for n in (whole, most, corpus.max_tokens) if n]
    return sample, min(known, default=None)


def _check_not_empty(num_tokens: int, num_blank: int, recipe: Recipe) -> None:
    if num_tokens:
        return
    if recipe.generation:
        raise ValueError(
            "the corpus has no prompt that leaves room for generation.max_new_tokens; choose a larger sequences.max_length"
        )
    column = "messages_column" if recipe.corpus.messages_column else "text_column"
    what = "chat with an answer" if recipe.corpus.messages_column else "text"
    found = counted(num_blank, "null, empty or blank document") if num_blank else "it is empty"
    raise ValueError(f"the corpus has no {what} ({found}); check corpus.{column}, and the files")


def _tokens_of(document: Document, encoder: Encoder, recipe: Recipe) -> tuple[int, int, bool]:
    """Tokens of the rows of a document, positions in the loss mask among them, and whether it is longer than a row; at most, where the
    teacher completes it.
    """
    how = recipe.generation
    if how is None:
        tokens = kept = characters = 0
        is_cut = False
        for sequence in encoder.sequences(document):
            tokens += len(sequence.token_ids)
            kept += len(sequence.loss_positions)
            characters += len(sequence.text)
            is_cut = is_cut or encoder.is_cut(sequence)
            if tokens >= SAMPLE_TOKENS and not (document.messages or encoder.truncates):
                share = characters / document.length
                return round(tokens / share), round(kept / share), True
        return tokens, kept, is_cut
    prompt = encoder.encode_prompt(document, recipe.sequences.max_length)
    if prompt is None or (len(prompt.token_ids) + how.max_new_tokens > recipe.sequences.max_length):
        return 0, 0, False
    length = len(prompt.token_ids) + how.max_new_tokens
    return how.samples * length, how.samples * how.max_new_tokens, False


def _share_of_corpus(
    num_rows: int, documents: Corpus, recipe: Recipe, source: CorpusSource
) -> float | None:
    """Which part of the corpus its first rows are; None where the Hub does not say how many there are."""
    if not isinstance(documents.stream, TextFiles) and source.format == "hub":
        splits = documents.stream.info.splits or {}
        examples: int | None = getattr(splits.get(recipe.corpus.split), "num_examples", None)
        return num_rows / examples if examples else None
    if source.format == "parquet":
        total = 0
        for path in source.files:
            with readable(f"corpus file {path.name}"):
                total += pq.read_metadata(path).num_rows
        return num_rows / total
    sizes = [path.stat().st_size for path in source.files]
    if source.format == "lines":
        return _share_of_files(documents) / sum(sizes)
    if source.format == "text" and recipe.corpus.text_unit == "file":
        return sum(sizes[:num_rows]) / sum(sizes)
    lines = itertools.chain.from_iterable(_lines(path) for path in source.files)
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
    read = sum(len(line) for line in itertools.islice(_lines(path), offset["row"]))
    return before + read / _expansion(path)


def _expansion(path: Path) -> float:
    """Bytes that a byte of a compressed file stands for, from its beginning."""
    if path.suffix not in (".gz", ".zst"):
        return 1.0
    with readable(f"corpus file {path.name}"), path.open("rb") as raw:
        stream, size = _open(path, raw), 0
        while size < SAMPLE_BYTES and (content := stream.read(2**16)):
            size += len(content)
        return size / raw.tell()


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file; what is wrong with it names it."""
    with readable(f"corpus file {path.name}"), _open(path) as lines:
        yield from lines


def _open(path: Path, raw: BinaryIO | None = None) -> BinaryIO:
    raw = raw or path.open("rb")
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_size=2**13)
        return cast(BinaryIO, io.BufferedReader(reader))
    return raw


def _sizes(recipe: Recipe, source: TeacherSource) -> _Sizes | None:
    """Of a teacher, by its configuration; None if it has none, or one that cannot be read, of which loading says more."""
    if recipe.teacher.python:
        return None
    try:
        config = config_of(
            source.location,
            source.commit,
            recipe.teacher.trust_remote_code and recipe.teacher.repo is not None,
            source.config,
        )
        text = config.get_text_config(decoder=True)
        return _Sizes(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            max_length=max_length_of(config),
        )
    except Exception:  # whatever reading a stranger's file comes to
        return None


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
