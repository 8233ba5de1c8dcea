"""The sections of a recipe: every key with its type, its default and what it does, and what must hold within a section.

docs/recipe.md is made from the docstrings.
"""

import datetime
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from builder.recipe.fields import (
    ATTENTIONS,
    MIN_SAMPLER_TEMPERATURE,
    OWN,
    Attention,
    BatchTokens,
    Language,
    License,
    OptionalColumn,
    Positive,
    SpecialToken,
    Temperature,
    TopK,
)

OF_CHATS = (
    "learn",
    "chat_template",
    "chat_template_kwargs",
    "chat_template_date",
    "drop_unwritten",
)
"""Fields of sequences that are about chats."""

CONTENT_COLUMNS = ("text_column", "messages_column", "prompt_column")
FOUND_COLUMNS = (
    *CONTENT_COLUMNS,
    *("tools_column", "documents_column", "chat_template_kwargs_column"),
)
"""Fields that are found in the corpus, where the recipe leaves them open."""


class Section(BaseModel):
    """Keys and values: all known, of the right types, never changed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class _Source(Section):
    """A section that may name a repository of the Hub."""

    repo: str | None = None
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit, which needs no resolving."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


class CorpusRecipe(_Source):
    """Where the documents come from. Give exactly one of `repo`, `files` and `embedded`."""

    repo: str | None = None
    """A dataset on the Hub."""
    revision: str = "main"
    """Its branch, tag or commit; resolved to a commit, which is recorded."""
    config: str | None = None
    """Its configuration, if it has several."""
    split: str = "train"
    """Its split."""
    files: tuple[str, ...] = ()
    """Local files, globs or folders, relative to the recipe. Formats are .txt, .jsonl, .csv and .parquet; all but Parquet may also end in
    .gz or .zst. .txt and .jsonl may be mixed. A single path needs no brackets."""
    embedded: Literal["python-docs"] | None = None
    """The corpus that comes with Python: the language reference."""
    text_column: str = "text"
    """Column with the text. If the recipe names no column, the build looks for one with a common name and reports it: `text`, `messages`,
    `conversations`, or `prompt` and `completion`."""
    messages_column: str | None = None
    """Column with the messages of a chat, instead of a text: a list of {role, content}, the same as JSON text or as an object of lists, or
    ShareGPT's {from, value}."""
    prompt_column: str | None = None
    """Column with the prompt. The text, or the messages, are then its completion, and only the completion is learned."""
    tools_column: OptionalColumn = None
    """Column with the tools of a chat, for its template. By default `tools`, if there is one; false hides it from the teacher."""
    documents_column: OptionalColumn = None
    """Column with the documents that a chat refers to, for its template. By default `documents`, as above."""
    chat_template_kwargs_column: OptionalColumn = None
    """Column with variables of the chat template. By default `chat_template_kwargs`, as above."""
    id_column: str | None = None
    """Column with the document's id. Without it, the id is a hash of the text or of the messages."""
    text_unit: Literal["file", "line"] = "file"
    """Whether a .txt file is one document, or one document per line."""
    max_documents: Positive | None = None
    """Stop after this number of documents."""
    max_tokens: Positive | None = None
    """Stop after the document that reaches this number of tokens."""
    license: License | None = None
    """Licence of the texts, which the dataset contains. Required for publishing; the embedded corpus sets its own."""
    language: tuple[Language, ...] = ()
    """Languages of the texts, for the card."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self, "repo", "files", "embedded")
        _only_with(self, "repo", "revision", "config", "split")
        if self.messages_column and self.text_column != "text":
            raise ValueError(
                "give text_column for a corpus of texts, or messages_column for one of chats, not both"
            )
        if (self.messages_column or self.prompt_column) and self.embedded:
            name = "messages_column" if self.messages_column else "prompt_column"
            raise ValueError(f"the embedded corpus holds texts, not messages; leave out {name}")
        if self.names_content and not self.messages_column:
            for name in FOUND_COLUMNS[len(CONTENT_COLUMNS) :]:
                if getattr(self, name):
                    raise ValueError(f"{name} is valid only with messages_column; leave it out")
        return self

    @property
    def names_content(self) -> bool:
        """Whether the recipe says which columns hold the texts or chats; where not, they are found in the corpus."""
        return bool(self.embedded) or not self.model_fields_set.isdisjoint(CONTENT_COLUMNS)


class TeacherRecipe(_Source):
    """The language model whose distributions are captured. Give exactly one of `repo`, `path`, `gguf`, `python` and `embedded`."""

    repo: str | None = None
    """A model on the Hub, with safetensors weights."""
    revision: str = "main"
    """Its branch, tag or commit; resolved to a commit, which is recorded."""
    path: str | None = None
    """A local directory as `save_pretrained` writes it, relative to the recipe."""
    gguf: str | None = None
    """A local GGUF file, relative to the recipe; its weights are dequantised."""
    python: str | None = None
    """A Python file of your own, relative to the recipe. Its function `load_teacher(*weights)` returns a causal torch module (ids [B, T] →
    logits [B, T, V]) and its tokenizer. The build runs this file."""
    weights: tuple[str, ...] = ()
    """Files with its weights. Their paths are the arguments of `load_teacher`."""
    embedded: Literal["smollm2-135m-instruct"] | None = None
    """A teacher that comes as a Python package: SmolLM2-135M-Instruct, Q4_1."""
    tokenizer: str | None = None
    """Directory of the original tokenizer, for a GGUF file whose own tokenizer cannot be rebuilt faithfully."""
    config: str | None = None
    """The original config.json, or its directory, for a GGUF file that does not describe its model completely."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights and of the forward pass. With `python`, the default is float32. Statistics are always float32."""
    head_dtype: Literal["float32", "teacher"] = "float32"
    """Type of a 16-bit teacher's logits. `float32` keeps the unrounded sums of its head; `teacher` rounds them to `dtype`, as the model itself
    does. Datasets built before this key existed count as `teacher`; an unfinished one stays so if the key is not set."""
    attention: Attention = None
    """Attention implementation: `sdpa`, `eager`, `flash_attention_2` (or 3, or 4), or a pinned kernel from the Hub. By default `sdpa` if the
    teacher's class supports it, else `eager`. The plan and the manifest record it."""
    device_map: Literal["auto"] | None = None
    """For a teacher too large for one GPU: places whole layers on all visible GPUs, which work one after the other."""
    tensor_parallel: Annotated[int, Field(ge=2)] | None = None
    """For a teacher too large for one GPU: splits each layer over this number of GPUs, which work at the same time and are faster."""
    trust_remote_code: bool = False
    """Run code from the Hub: the model's own code from `repo`, with a full commit as `revision`, or the code of an attention kernel."""
    license: License | None = None
    """Licence of the teacher, which may cover its outputs. Required for publishing; the embedded teacher sets its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one(self, "repo", "path", "gguf", "python", "embedded")
        _only_with(self, "python", "weights")
        if self.python and "dtype" not in self.model_fields_set:
            self.__dict__["dtype"] = "float32"  # as plain modules are
        if self.attention == OWN and not self.python:
            raise ValueError(f"attention = {OWN!r} is valid only with python; leave it out")
        for name in ("attention", "device_map", "tensor_parallel"):
            if self.python and getattr(self, name) not in (None, OWN):
                raise ValueError(
                    f"{name} has no effect with python, because your code decides; leave it out"
                )
        is_kernel = self.attention not in (None, OWN, *ATTENTIONS)
        if is_kernel and not self.trust_remote_code:
            raise ValueError(
                f"attention = {self.attention!r} runs code from the Hub; set trust_remote_code = true if you trust it"
            )
        _only_with(self, "repo", "revision", *(() if is_kernel else ("trust_remote_code",)))
        _only_with(self, "gguf", "tokenizer", "config")
        if self.device_map and self.tensor_parallel:
            raise ValueError("device_map and tensor_parallel cannot be combined; leave one out")
        if self.gguf and (self.device_map or self.tensor_parallel):
            raise ValueError(
                "a GGUF teacher runs on one device; leave out device_map and tensor_parallel"
            )
        if self.trust_remote_code and self.repo and not self.is_pinned:
            raise ValueError(
                "trust_remote_code runs code from the repo, so revision must be a full 40-digit commit, "
                f"not {self.revision!r}"
            )
        return self


class SequencesRecipe(Section):
    """How a document becomes sequences."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence in tokens, special tokens included."""
    long_documents: Literal["chunk", "truncate"] = "chunk"
    """Cut a longer document into chunks, which the teacher sees independently, or keep only its beginning."""
    bos: SpecialToken = "tokenizer"
    """Begin-of-sequence token before each sequence: as the tokenizer adds it, always, or never."""
    eos: SpecialToken = "tokenizer"
    """End-of-sequence token after each document's last sequence: as the tokenizer adds it, always, or never."""
    learn: Literal["all", "last"] = "all"
    """`all`: one row per chat, with all its answers. `last`: one row per answer, with the conversation before it, for templates that rewrite an
    answer when the conversation continues."""
    chat_template: str | None = None
    """File with the chat template to use instead of the tokenizer's, relative to the recipe."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking = false. A chat's own variables override these."""
    chat_template_date: str | None = None
    """The date that a chat template writes as today, such as "2026-01-31"."""
    drop_unwritten: tuple[str, ...] = ()
    """Parts of a chat that the template may omit: keys of messages, "tools", "documents", or "*" for anything. Omissions are counted."""
    batch_tokens: BatchTokens = 16_384
    """Positions per batch, padding included; with 1, each sequence runs alone. It is a recipe key because batch size changes the last bits of
    results. "auto" tries several sizes on the device when a build begins and records the chosen one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.chat_template_date is not None:
            try:
                datetime.date.fromisoformat(self.chat_template_date)
            except ValueError:
                raise ValueError(
                    f'chat_template_date is {self.chat_template_date!r}, expected a day such as "2026-01-31"'
                ) from None
        return self


class GenerationRecipe(Section):
    """How the teacher writes completions. The rows of the corpus are then prompts."""

    max_new_tokens: Positive
    """Longest completion in tokens. A completion ends earlier at an end-of-sequence token."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Sampling temperature; 0 takes the most probable token. The stored distribution is always that of temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw only from the smallest set of most probable tokens whose total probability reaches this value."""
    samples: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Completions per prompt."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler, together with the document's id. Change it to get other completions."""
    batch_tokens: Positive = 16_384
    """Positions of the sequences generated at the same time, padding included. Larger values are faster on a GPU."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.temperature < MIN_SAMPLER_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature:g}, expected at least {MIN_SAMPLER_TEMPERATURE:g}, or 0 for the most "
                "probable token"
            )
        for name in ("top_p", "samples", "seed"):
            if (
                not self.temperature
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(
                    f"{name} applies only to sampling, but temperature is 0; leave it out, or raise temperature"
                )
        return self


class OutputRecipe(Section):
    """What is stored."""

    top_k: TopK = 50
    """Number of most probable tokens to keep per position. "all" keeps the log-probabilities of the whole vocabulary, in the order of its ids."""
    tail_samples: Annotated[int, Field(ge=0, le=1024)] = 4
    """Sampled tail tokens per position, drawn from outside the top K. They make expectations over the whole distribution unbiased."""
    tail_logprobs: bool = True
    """Keep the log-probabilities of the sampled tail tokens. The loss needs only their ids, and each log-probability takes as many bytes as an id."""
    validation: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """Share of the documents to hold out in a split `validation`, for example 0.01. A document's id and `seed` decide."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws and the hold-out, together with the document's id. Change it for other draws and another hold-out."""
    temperatures: tuple[Temperature, ...] = ()
    """Further temperatures at which to store the logsumexp, so that the distribution is known there, too."""
    hidden_states: bool = False
    """Keep the teacher's last hidden states, and store its head beside the data. Together they give the whole distribution."""
    completions_only: bool = False
    """Keep columns with several values per token only at positions in the loss mask. Prompts then cost almost nothing."""
    text: bool = True
    """Keep the `text` column."""
    profile: Literal["default", "compact"] = "default"
    """Parquet profile. `compact` saves 7 %, but DuckDB cannot read its `topk_logprobs`."""
    shard_tokens: Positive = 1_000_000
    """A shard ends with the document that reaches this number of tokens, at about 170 bytes per token. A document of more than twice this
    number continues in the next shard."""
    partitions: Positive = 1
    """Number of independent ranges of the corpus's files, which can be built at the same time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == "all" and self.tail_samples and "tail_samples" in self.model_fields_set:
            raise ValueError('top_k = "all" leaves no tail to draw from; leave out tail_samples')
        if not self.tail_logprobs and (self.top_k == "all" or not self.tail_samples):
            raise ValueError("tail_logprobs = false is valid only with tail_samples; leave it out")
        if self.seed and not (self.tail_samples or self.validation):
            raise ValueError("seed is valid only with tail_samples or validation; leave it out")
        if len(set(self.temperatures)) < len(self.temperatures) or 1 in self.temperatures:
            raise ValueError(
                f"temperatures are {list(self.temperatures)}, expected distinct values other than 1, which is always stored"
            )
        for temperature in self.temperatures:
            if float(f"{temperature:g}") != temperature:
                raise ValueError(
                    f"temperature {temperature} has too many digits for a column name; give at most six"
                )
        return self


def _exactly_one(section: BaseModel, *fields: str) -> None:
    given = [field for field in fields if getattr(section, field)]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"give exactly one of {', '.join(fields)} (found {found})")


def _only_with(section: BaseModel, source: str, *fields: str) -> None:
    for field in fields:
        default = type(section).model_fields[field].default
        if not getattr(section, source) and getattr(section, field) != default:
            raise ValueError(f"{field} is valid only with {source}; leave it out")
