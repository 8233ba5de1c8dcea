"""One TOML file → a frozen, validated Recipe: everything that decides the bytes of a dataset.

What a run may choose freely (device, output directory, when to stop early) is a flag of the command line and not here.
"""

import datetime
import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

Positive = Annotated[int, Field(gt=0)]
SpecialToken = Literal["tokenizer", "always", "never"]
License = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$")]
"""An identifier as the Hub and SPDX use them, e.g. `apache-2.0`, `cc-by-sa-3.0`, `odc-by`."""
Language = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]
"""ISO 639 code, or one of the Hub's two special values."""
Temperature = Annotated[float, Field(ge=0.1, le=100)]


MIN_SAMPLER_TEMPERATURE = 0.01
"""Below it, logits would leave the range of float32."""


def _top_k(value: Any) -> Any:
    if value == "all" or (type(value) is int and value > 0):
        return value
    raise ValueError('expected a whole number of at least 1, or "all"')


KERNEL = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}(:\w+)?", re.ASCII)
"""A kernel of the Hub, pinned: `ORG/NAME@commit`, and the name of a function where transformers needs one."""


def _attention(value: Any) -> Any:
    if (
        value is None
        or value in (*ATTENTIONS, OWN)
        or (type(value) is str and KERNEL.fullmatch(value))
    ):
        return value
    raise ValueError(
        f"expected one of {', '.join(ATTENTIONS)}, or a kernel of the Hub with its full commit, as ORG/NAME@COMMIT"
    )


OWN = "own"
"""Stands in plans and manifests for the attention of a teacher that is the user's code."""
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
Attention = Annotated[str | None, PlainValidator(_attention)]
TopK = Annotated[int | Literal["all"], PlainValidator(_top_k)]


def _optional_column(value: Any) -> Any:
    if value is None or value is False or (isinstance(value, str) and value):
        return value
    raise ValueError("expected a column's name, or false where there is none")


OptionalColumn = Annotated[str | Literal[False] | None, PlainValidator(_optional_column)]

UNSAID = {
    "corpus": (
        *("prompt_column", "tools_column", "documents_column", "chat_template_kwargs_column"),
    ),
    "teacher": ("device_map", "tensor_parallel", "config", "python", "weights"),
    "sequences": ("learn", "chat_template_kwargs", "chat_template_date", "drop_unwritten"),
}
"""Fields that a plan holds only if the recipe sets them to other values than their defaults: they are younger than the fingerprints of some
datasets."""
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


EXPECTED = {
    "string_type": 'text in quotes, such as "x"',
    "string_too_long": "at most {max_length:,} characters",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": 'a list, such as ["x"]',
    "dict_type": "a table, such as {{ x = 1 }}",
    "model_type": "a section of keys and values",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
"""What a value should be, by the kind of problem that pydantic reports."""
PATTERNS = {
    "name": "a name as the Hub takes it: letters, digits, '.', '-' and '_', at most 96, the first a letter or digit",
    "license": "an identifier of a licence, such as apache-2.0 or cc-by-sa-4.0",
    "language": "a code of two or three small letters, such as en, or code, or multilingual",
}
"""What a text should be, by the key."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


_AnySection = TypeVar("_AnySection", bound=_Section)


class _Source(_Section):
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


class SequencesRecipe(_Section):
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
    batch_tokens: Positive = 16_384
    """Positions in a batch, padding included; with 1, each sequence runs alone. Part of the recipe, for the shape of a batch changes
    last bits."""

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


class GenerationRecipe(_Section):
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


class OutputRecipe(_Section):
    """What is stored."""

    top_k: TopK = 50
    """Most probable tokens that are kept; "all" keeps the log-probabilities of the whole vocabulary, in its order."""
    tail_samples: Annotated[int, Field(ge=0, le=1024)] = 4
    """Tokens drawn from what is outside the top K: with them, expectations over the whole distribution are unbiased."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws, together with the document's id: change it to draw others."""
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
        if self.seed and not self.tail_samples:
            raise ValueError("seed means something only with tail_samples; leave it out")
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


class Recipe(_Section):
    """A dataset, fully described."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    """Short name, as in a Hub repository."""
    description: Annotated[str, Field(max_length=2000)] | None = None
    """A sentence or two for the top of the dataset card: plain text."""
    corpus: CorpusRecipe
    teacher: TeacherRecipe
    sequences: SequencesRecipe = SequencesRecipe()
    generation: GenerationRecipe | None = None
    """Have the teacher complete each document; without it, documents are captured as they are."""
    output: OutputRecipe = OutputRecipe()

    @model_validator(mode="after")
    def _limits_can_be_shared(self) -> Self:
        limits = [self.corpus.max_documents, self.corpus.max_tokens]
        if any(limit and limit < self.output.partitions for limit in limits):
            raise ValueError(
                f"output.partitions is {self.output.partitions}, which is more than the corpus's limit can be divided into"
            )
        return self

    @model_validator(mode="after")
    def _prompts_fit(self) -> Self:
        if self.generation is None:
            return self
        if self.teacher.tensor_parallel:
            raise ValueError(
                "a teacher that is split over processes (teacher.tensor_parallel) cannot write; use teacher.device_map, or leave "
                "out [generation]"
            )
        if self.teacher.python:
            raise ValueError(
                "a teacher of your own code (teacher.python) cannot write, for it has no generate; leave out [generation]"
            )
        if self.generation.max_new_tokens >= self.sequences.max_length:
            raise ValueError(
                f"generation.max_new_tokens is {self.generation.max_new_tokens}, which leaves no room for a prompt in "
                f"sequences.max_length = {self.sequences.max_length}; choose a larger max_length"
            )
        for name, value in (("long_documents", "truncate"), ("eos", "always")):
            if getattr(self.sequences, name) == value:
                raise ValueError(
                    f"sequences.{name} is {value!r}, but prompts are neither cut nor ended; leave it out, or leave out "
                    "[generation]"
                )
        return self

    @model_validator(mode="after")
    def _completions_are_known(self) -> Self:
        corpus = self.corpus
        if not corpus.names_content:
            return self  # it is found out later what they are
        is_of_chats = corpus.messages_column is not None
        if corpus.prompt_column and self.generation:
            raise ValueError(
                "corpus.prompt_column is for completions that the corpus holds, and with [generation] the teacher writes them; name the "
                "prompts as corpus.text_column or corpus.messages_column"
            )
        if is_of_chats and self.sequences.eos != "tokenizer":
            raise ValueError(
                "sequences.eos means nothing with corpus.messages_column, for the chat template ends a chat; leave it out"
            )
        for name in OF_CHATS:
            if not is_of_chats and getattr(self.sequences, name) != _default(self.sequences, name):
                raise ValueError(
                    f"sequences.{name} means something only with corpus.messages_column; leave it out"
                )
        if self.sequences.learn == "last" and self.generation:
            raise ValueError(
                'sequences.learn = "last" is about answers of the corpus, and with [generation] the teacher writes them; leave it out'
            )
        if self.output.completions_only and not (
            is_of_chats or corpus.prompt_column or self.generation
        ):
            raise ValueError(
                "output.completions_only needs completions: of a corpus of chats (give corpus.messages_column), or by the teacher "
                "(give [generation])"
            )
        return self

    def with_columns(self, columns: dict[str, Any]) -> "Recipe":
        """The recipe with names for columns that it leaves open.

        Raises:
            ValueError: it asks for something that such a corpus does not have.
        """
        values = self.model_dump(exclude_unset=True)
        values["corpus"] |= {
            name: value
            for name, value in columns.items()
            if name in FOUND_COLUMNS and name not in self.corpus.model_fields_set
        }
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            raise ValueError(_problems(error)) from None

    def with_head_dtype(self, teacher: dict[str, Any]) -> "Recipe":
        """The recipe with the head's type of one that was published, where it leaves that open.

        Args:
            teacher: that one's section; one that older code wrote says nothing of it.
        """
        if "head_dtype" in self.teacher.model_fields_set:
            return self
        values = self.model_dump(exclude_unset=True)
        values["teacher"]["head_dtype"] = teacher.get("head_dtype", "teacher")
        return type(self).model_validate(values)

    def published(self, *, attention: str | None = "sdpa") -> dict[str, Any]:
        """The recipe as plain JSON values for manifest and card, paths that lead elsewhere cut to their last part.

        Args:
            attention: stands there where the recipe leaves it open, for it decides last bits: what was resolved, which for most
                teachers is sdpa.
        """
        values = self.model_dump(mode="json")
        values["teacher"]["attention"] = self.teacher.attention or attention
        if self.generation is None:
            del values["generation"]  # so that recipes that know nothing of it are the same as ever
        if self.output.top_k == "all":
            values["output"]["tail_samples"] = 0  # the default of a recipe that says nothing of it
        if self.teacher.dtype == "float32" or self.teacher.head_dtype == "teacher":
            del values["teacher"]["head_dtype"]  # as before there was this key
        for section, fields in UNSAID.items():
            model = getattr(self, section)
            for field in fields:
                if getattr(model, field) == _default(model, field):
                    del values[section][field]
        values["corpus"]["files"] = [_portable(path) for path in self.corpus.files]
        for field in ("path", "gguf", "python", "tokenizer", "config"):
            if values["teacher"].get(field):
                values["teacher"][field] = _portable(values["teacher"][field])
        if self.teacher.weights:
            values["teacher"]["weights"] = [_portable(path) for path in self.teacher.weights]
        if self.sequences.chat_template:
            values["sequences"]["chat_template"] = _portable(self.sequences.chat_template)
        return values


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        ValueError: not TOML, or not a valid recipe; names every wrong key with what was expected.
        OSError: the file cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(
            f"no recipe at {path}; name a .toml file such as dataset_cards/*/recipe.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    try:
        # JSON mode, since TOML and JSON share lists where Recipe has tuples.
        return Recipe.model_validate_json(json.dumps(_as_meant(values), default=str))
    except ValidationError as error:
        raise ValueError(f"{path}: {_problems(error)}") from None


def _as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """What TOML makes of what people write: 1e6 is a float there, and one file no list."""
    meant = {}
    for name, section in values.items():
        if isinstance(section, dict):
            section = {
                key: int(value) if isinstance(value, float) and value.is_integer() else value
                for key, value in section.items()
            }
            for key in ("files", "weights"):
                if isinstance(section.get(key), str):
                    section[key] = [section[key]]
        meant[name] = section
    return meant


def _problems(error: ValidationError) -> str:
    return "; ".join(_explain(problem) for problem in error.errors(include_url=False))


def _default(section: BaseModel, field: str) -> Any:
    return type(section).model_fields[field].get_default(call_default_factory=True)


def read_section(model: type[_AnySection], values: Any, where: str) -> _AnySection:
    """A section of a recipe in a manifest.

    Raises:
        ValueError: it asks for something that this version does not know; names the key.
    """
    try:
        # JSON mode, since a manifest has lists where a recipe has tuples.
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join([where, *map(str, problem["loc"])])
        raise ValueError(
            f"manifest.json: {path}: {_expected(problem)}, so that its teacher cannot be run; install the version that built the dataset"
        ) from None


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


def _portable(path: str) -> str:
    """What of a path can be published: all of it only if it stays below the recipe's directory."""
    return path if is_below(path) else Path(path).name


def is_below(path: str) -> bool:
    """Whether a path stays below the directory at which it starts."""
    parts = Path(path)
    return not (parts.is_absolute() or ".." in parts.parts or path.startswith("~"))


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in problem["loc"][:-1]:
            annotation = section.model_fields[part].annotation
            section = next(
                iter(get_args(annotation)), annotation
            )  # of a section that may be absent
        names = list(section.model_fields)
        near = difflib.get_close_matches(problem["loc"][-1], names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where!r} is missing"
    given = "" if isinstance(problem["input"], dict) else f" (found {_shown(problem['input'])})"
    return f"{where}: {_expected(problem)}{given}"


def _expected(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if words := EXPECTED.get(problem["type"]):
        message = f"expected {words.format(**problem.get('ctx', {}))}"
    elif problem["type"] == "string_pattern_mismatch":
        named = [str(part) for part in problem["loc"] if part in PATTERNS]
        message = f"expected {PATTERNS[named[-1]]}"
    return str(message)


def _shown(value: Any) -> str:
    """A value as TOML writes it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
