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
    """Where the documents come from: exactly one of `repo`, `files` and `embedded`."""

    repo: str | None = None
    """A dataset on the Hub."""
    revision: str = "main"
    """Its branch, tag or commit; resolved to a commit, which is recorded."""
    config: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Its split."""
    files: tuple[str, ...] = ()
    """Local files, globs or folders, relative to the recipe: .txt, .jsonl, .csv and .parquet, all but the last also .gz or .zst; .txt may stand
    beside .jsonl. One needs no brackets."""
    embedded: Literal["python-docs"] | None = None
    """A corpus that every Python brings: the language reference."""
    text_column: str = "text"
    """Column with the text. Where no column is named, the corpus's own of a usual name is found, and said: `text`, `messages`,
    `conversations`, or `prompt` and `completion`."""
    messages_column: str | None = None
    """Column with the messages of a chat, in place of a text: a list of {role, content}, the same as JSON text or as an object of lists, or
    ShareGPT's {from, value}."""
    prompt_column: str | None = None
    """Column with what comes before the text, or before the messages: these are then its completion, which alone is learned."""
    tools_column: OptionalColumn = None
    """Column with the tools of a chat, for its template; `tools`, if there is one; false, if that is not for the teacher."""
    documents_column: OptionalColumn = None
    """The same with documents to answer from: `documents`."""
    chat_template_kwargs_column: OptionalColumn = None
    """The same with variables of the chat template: `chat_template_kwargs`."""
    id_column: str | None = None
    """Column with the document's id; without one, the id is a hash of the text, or of the messages."""
    text_unit: Literal["file", "line"] = "file"
    """What one document of a .txt file is."""
    max_documents: Positive | None = None
    """Stop after this number of documents."""
    max_tokens: Positive | None = None
    """Stop after the document that reaches this number of tokens."""
    license: License | None = None
    """Licence of the texts, which are in the dataset; publishing needs it. The embedded corpus brings its own."""
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
            raise ValueError(f"the embedded corpus holds texts and no messages; leave out {name}")
        if self.names_content and not self.messages_column:
            for name in FOUND_COLUMNS[len(CONTENT_COLUMNS) :]:
                if getattr(self, name):
                    raise ValueError(
                        f"{name} means something only with messages_column; leave it out"
                    )
        return self

    @property
    def names_content(self) -> bool:
        """Whether the recipe says which columns hold the texts or chats; where not, they are found in the corpus."""
        return bool(self.embedded) or not self.model_fields_set.isdisjoint(CONTENT_COLUMNS)


class TeacherRecipe(_Source):
    """The language model whose distributions are captured: exactly one of `repo`, `path`, `gguf`, `python`, `embedded`."""

    repo: str | None = None
    """A model on the Hub, with safetensors weights."""
    revision: str = "main"
    """Its branch, tag or commit; resolved to a commit, which is recorded."""
    path: str | None = None
    """A local directory as `save_pretrained` writes it, relative to the recipe."""
    gguf: str | None = None
    """A local GGUF file, relative to the recipe; its weights are dequantised."""
    python: str | None = None
    """A Python file of your own, relative to the recipe, whose function `load_teacher(*weights)` returns a torch module (ids [B, T] →
    logits [B, T, V], causal) and its tokenizer. It is run."""
    weights: tuple[str, ...] = ()
    """Files with its weights, whose paths that function is given."""
    embedded: Literal["smollm2-135m-instruct"] | None = None
    """A teacher that comes as a Python package: SmolLM2-135M-Instruct, Q4_1."""
    tokenizer: str | None = None
    """Directory of the right tokenizer for a GGUF file whose own one cannot be rebuilt faithfully."""
    config: str | None = None
    """The original config.json, or its directory, for a GGUF file that does not say all of its model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the weights and of the forward pass; with `python`, float32 unless it is named. Statistics are float32 in any case."""
    head_dtype: Literal["float32", "teacher"] = "float32"
    """Type of the logits of a 16-bit teacher: in float32, the product of its head is kept as it is summed; `teacher` rounds it to `dtype`, as
    the model does by itself. Datasets from before this key are of `teacher`, and an unfinished one stays so where it is left out."""
    attention: Attention = None
    """What computes it: `sdpa`, `eager`, `flash_attention_2` (or 3, or 4), or a pinned kernel of the Hub. Unset, the best of the first two
    that the teacher's class supports; the plan and the manifest say which."""
    device_map: Literal["auto"] | None = None
    """For a teacher that is too large for one GPU: its layers are placed on all that there are, and work one after the other."""
    tensor_parallel: Annotated[int, Field(ge=2)] | None = None
    """The same, faster: each layer is split over so many GPUs, which work at the same time."""
    trust_remote_code: bool = False
    """Run code from the Hub: the model's own, from `repo`, for which `revision` has to be a full commit, or that of an attention kernel."""
    license: License | None = None
    """Licence of the teacher, which may cover its outputs; publishing needs it. The embedded one brings its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _exactly_one(self, "repo", "path", "gguf", "python", "embedded")
        _only_with(self, "python", "weights")
        if self.python and "dtype" not in self.model_fields_set:
            self.__dict__["dtype"] = "float32"  # as plain modules are
        if self.attention == OWN and not self.python:
            raise ValueError(f"attention = {OWN!r} means something only with python; leave it out")
        for name in ("attention", "device_map", "tensor_parallel"):
            if self.python and getattr(self, name) not in (None, OWN):
                raise ValueError(
                    f"{name} means nothing with python, whose code decides; leave it out"
                )
        is_kernel = self.attention not in (None, OWN, *ATTENTIONS)
        if is_kernel and not self.trust_remote_code:
            raise ValueError(
                f"attention = {self.attention!r} runs code from the Hub; set trust_remote_code = true, if you trust it"
            )
        _only_with(self, "repo", "revision", *(() if is_kernel else ("trust_remote_code",)))
        _only_with(self, "gguf", "tokenizer", "config")
        if self.device_map and self.tensor_parallel:
            raise ValueError("device_map and tensor_parallel exclude each other; leave one out")
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
    """Cut a longer document into chunks, each seen by the teacher on its own, or keep its beginning only."""
    bos: SpecialToken = "tokenizer"
    """Begin-of-sequence token before each sequence: as the tokenizer does it, always, or never."""
    eos: SpecialToken = "tokenizer"
    """End-of-sequence token after each document's last sequence: as the tokenizer does it, always, or never."""
    learn: Literal["all", "last"] = "all"
    """Of a chat, all answers from one row, or each from the conversation up to it, a row each: for templates that write an answer otherwise
    once the conversation goes on."""
    chat_template: str | None = None
    """A file with the chat template to use in place of the tokenizer's, relative to the recipe."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking = false. A chat's own come before these."""
    chat_template_date: str | None = None
    """What a template takes for today, as "2026-01-31", that writes the date."""
    drop_unwritten: tuple[str, ...] = ()
    """What of a chat may go that the template does not write, and is counted: keys of messages, "tools", "documents", or "*" for anything."""
    batch_tokens: BatchTokens = 16_384
    """Positions in a batch, padding included; with 1, each sequence runs alone. Part of the recipe, for the shape of a batch changes
    last bits. "auto" tries some sizes on the device when a build begins, and records the number that it takes."""

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
    """How the teacher writes completions, where the rows of the corpus are prompts."""

    max_new_tokens: Positive
    """Where a completion ends that has not come to an end-of-sequence token."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of the distribution that tokens are drawn from; 0 takes the most probable token. What is stored is that of temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most probable tokens only, as few as have this probability together."""
    samples: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Completions of each prompt."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws, together with the document's id: change it to draw others."""
    batch_tokens: Positive = 16_384
    """Positions of the sequences that are written at the same time, padding included: more are faster on a GPU."""

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
                    f"{name} means something only where tokens are drawn, and temperature is 0; leave it out"
                )
        return self


class OutputRecipe(Section):
    """What is stored."""

    top_k: TopK = 50
    """Most probable tokens that are kept; "all" keeps the log-probabilities of the whole vocabulary, in its order."""
    tail_samples: Annotated[int, Field(ge=0, le=1024)] = 4
    """Tokens drawn from what is outside the top K: with them, expectations over the whole distribution are unbiased."""
    tail_logprobs: bool = True
    """Keep the log-probabilities of these draws. The loss needs their ids alone, and each log-probability takes as many bytes as an id."""
    validation: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    """Share of the documents that are held out, in a split `validation` beside `train`: 0.01, for example. A document's id and `seed` decide."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws and the hold-out, together with the document's id: change it to draw others."""
    temperatures: tuple[Temperature, ...] = ()
    """Other temperatures at which the distribution is to be known."""
    hidden_states: bool = False
    """Keep the teacher's last hidden states, and its head beside the data, which makes the whole distribution of them again."""
    completions_only: bool = False
    """Keep columns of several values a token only where the next token is the completion's: prompts then cost next to nothing."""
    text: bool = True
    """Keep the `text` column."""
    profile: Literal["default", "compact"] = "default"
    """Parquet profile: `compact` saves 7 % but DuckDB cannot read its `topk_logprobs`."""
    shard_tokens: Positive = 1_000_000
    """A shard ends with the document that reaches this number of tokens (about 170 bytes each). A document of more than twice as many goes on
    in the next shard."""
    partitions: Positive = 1
    """Independent streams over the corpus's files, which can be built at the same time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k == "all" and self.tail_samples and "tail_samples" in self.model_fields_set:
            raise ValueError('top_k = "all" leaves no tail to draw from; leave out tail_samples')
        if not self.tail_logprobs and (self.top_k == "all" or not self.tail_samples):
            raise ValueError(
                "tail_logprobs = false means something only with tail_samples; leave it out"
            )
        if self.seed and not (self.tail_samples or self.validation):
            raise ValueError(
                "seed means something only with tail_samples or validation; leave it out"
            )
        if len(set(self.temperatures)) < len(self.temperatures) or 1 in self.temperatures:
            raise ValueError(
                f"temperatures are {list(self.temperatures)}, expected different ones, and not 1, which is always stored"
            )
        for temperature in self.temperatures:
            if float(f"{temperature:g}") != temperature:
                raise ValueError(
                    f"temperature {temperature} has too many digits for a column's name; give six at most"
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
            raise ValueError(f"{field} means something only with {source}; leave it out")
