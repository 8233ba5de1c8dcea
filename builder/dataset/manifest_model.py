"""What a manifest has to hold, as models: its keys and their types, for whoever reads one that may come from anywhere.

In:   the JSON values of a manifest.
Out:  nothing, or one line that names the key and says what was expected there.

What is listed is what some command reads. Keys that are not listed are of no concern here, so that a later version may add some.
"""

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from builder.dataset.printable import one_line


def _matches(pattern: str, what: str) -> Callable[[str], str]:
    def look(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"expected {what}")
        return value

    return look


Count = Annotated[int, Field(ge=0, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
"""What an int32 column can hold."""
Seconds = Annotated[float, Field(ge=0)]
Digest = Annotated[str, AfterValidator(_matches("[0-9a-f]{64}", "64 hexadecimal digits"))]
"""SHA-256."""
Split = Literal["train", "validation"]
Version = Annotated[
    str, AfterValidator(_matches(r"\d{1,9}(\.\d{1,9}){2}", "a version such as 1.2.0"))
]


def _top_k(value: Any) -> Any:
    if value == "all" or (type(value) is int and 0 < value < 2**31):
        return value
    raise ValueError('expected a whole number of at least 1, or "all"')


class _Section(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class RecipeCorpus(_Section):
    """`recipe.corpus`."""

    repo: str | None = None
    config: str | None = None
    split: str | None = None
    files: list[str]
    embedded: str | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    id_column: str | None = None
    max_documents: Count | None = None
    max_tokens: Count | None = None
    license: str | None = None
    language: list[str] = []


class RecipeTeacher(_Section):
    """`recipe.teacher`."""

    repo: str | None = None
    path: str | None = None
    gguf: str | None = None
    python: str | None = None
    weights: list[str] = []
    tokenizer: str | None = None
    embedded: str | None = None
    dtype: str
    head_dtype: str | None = None
    license: str | None = None


class RecipeSequences(_Section):
    """`recipe.sequences`."""

    max_length: Annotated[int, Field(ge=1, lt=2**31)]
    long_documents: str
    chat_template: str | None = None
    batch_tokens: Count


class RecipeGeneration(_Section):
    """`recipe.generation`."""

    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    samples: Annotated[int, Field(ge=1)]
    seed: Count


class RecipeOutput(_Section):
    """`recipe.output`."""

    top_k: Annotated[int | Literal["all"], PlainValidator(_top_k)]
    tail_samples: Annotated[int, Field(ge=0, lt=2**16)] = 0
    tail_logprobs: bool = True
    seed: Count = 0
    temperatures: list[Annotated[float, Field(gt=0)]] = []
    hidden_states: bool = False
    completions_only: bool = False
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None
    text: bool
    shard_tokens: Count
    partitions: Annotated[int, Field(ge=1, lt=2**31)] = 1


class PublishedRecipe(_Section):
    """`recipe`."""

    name: str
    description: str | None = None
    corpus: RecipeCorpus
    teacher: RecipeTeacher
    sequences: RecipeSequences
    generation: RecipeGeneration | None = None
    output: RecipeOutput


class CorpusFile(_Section):
    """One of `corpus.files`."""

    sha256: str


class Corpus(_Section):
    """`corpus`: what its texts were read from."""

    repo: str | None = None
    name: str | None = None
    commit: str | None = None
    sha256: str | None = None
    files: Annotated[list[CorpusFile], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        _one_of(self, "repo", "name", "files")
        _one_of(self, "commit", "sha256", "files")
        return self


class Teacher(_Section):
    """`teacher`: what was loaded, and from where."""

    repo: str | None = None
    name: str | None = None
    commit: str | None = None
    sha256: str | None = None
    package: str | None = None
    version: str | None = None
    weights_sha256: list[Digest] = []
    architecture: str
    parameters: Count
    dtype: str
    head_dtype: str | None = None
    attention: str
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    hidden_size: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tokenizer_vocab_size: Count
    tokenizer_sha256: Digest
    eos_token_id: TokenId | None
    prefix_ids: list[TokenId]
    suffix_ids: list[TokenId]
    generation_eos_ids: list[TokenId] = []
    chat_template_sha256: str | None = None

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        _one_of(self, "repo", "name")
        _one_of(self, "commit", "sha256")
        return self


class CompletionCounts(_Section):
    """What came of prompts: of a shard, or of all of them."""

    prompts: Count
    prompts_too_long: Count
    completions: Count
    tokens: Count
    ended: Count
    corrected: Count


class SplitTotals(_Section):
    """One of `totals.splits`."""

    documents: Count
    rows: Annotated[int, Field(ge=1, lt=2**63)]
    tokens: Annotated[int, Field(ge=1, lt=2**63)]
    bytes: Count
    teacher_perplexity: float | None


class Totals(_Section):
    """`totals`."""

    documents: Count
    documents_skipped: Count
    rows: Annotated[int, Field(ge=1, lt=2**63)]
    tokens: Annotated[int, Field(ge=1, lt=2**63)]
    completion_tokens: Count | None = None
    bytes: Count
    bytes_per_token: float
    mean_entropy: float
    mean_topk_mass: float
    teacher_perplexity: float | None
    seconds: Seconds
    tokens_per_second: float
    completions: CompletionCounts | None = None
    splits: dict[Split, SplitTotals] | None = None


class Environment(_Section):
    """One of `environments`."""

    device: str


class ShardSums(_Section):
    """`sums` of a shard."""

    entropy: float
    topk_mass: float
    target_nll: float
    targets: Count
    completion_tokens: Count | None = None
    kept: Count | None = None


class Shard(_Section):
    """The record of a shard, as it is kept while a dataset is built."""

    file: Any
    """Looked at by whoever is to open it."""
    sha256: Digest
    bytes: Count
    rows: Annotated[int, Field(ge=1, lt=2**63)]
    tokens: Annotated[int, Field(ge=1, lt=2**63)]
    partition: Annotated[int, Field(ge=0, lt=2**31)]
    index: Annotated[int, Field(ge=0, lt=2**31)]
    offset_before: dict[str, Any] | None = None
    offset_after: dict[str, Any]
    exhausted: bool
    sums: ShardSums
    halved_batches: Count
    seconds: Seconds
    environment: Any
    completions: CompletionCounts | None = None
    column_bytes: dict[str, Count] | None = None
    split: Split | None = None


class TeacherHead(_Section):
    """`teacher_head`: what is said of `teacher_head.safetensors`."""

    sha256: Digest
    bytes: Count
    dtype: str
    has_bias: bool
    scale: float
    softcap: float | None
    license: str | None


class Manifest(_Section):
    """A manifest, all but its `shards`, each of which is a `Shard` whose environment is a place in `environments`."""

    schema_version: Version
    fingerprint: Digest
    row_fingerprint: Digest | None = None
    recipe: PublishedRecipe
    corpus: Corpus
    teacher: Teacher
    teacher_head: TeacherHead | None = None
    totals: Totals
    environments: Annotated[list[Environment], Field(min_length=1)]
    shards: list[dict[str, Any]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.shards:
            raise ValueError("no shards")
        top_k, size = self.recipe.output.top_k, self.teacher.vocab_size
        if top_k != "all" and top_k > size:
            raise ValueError(f"recipe.output.top_k is {top_k}, teacher.vocab_size only {size}")
        if self.recipe.output.hidden_states and self.teacher.hidden_size is None:
            raise ValueError("recipe.output.hidden_states is true, but there is no teacher.hidden_size")  # fmt: skip
        if self.teacher_head and not self.recipe.output.hidden_states:
            raise ValueError("there is a teacher_head, but recipe.output.hidden_states is not true")
        corpus = self.recipe.corpus
        has_completions = corpus.messages_column or corpus.prompt_column or self.recipe.generation
        if self.recipe.output.completions_only and not has_completions:
            raise ValueError("recipe.output.completions_only is true, but there are no completions")
        if self.recipe.generation and not self.totals.completions:
            raise ValueError("there is a recipe.generation, but no totals.completions")
        has_splits = self.totals.splits is not None and len(self.totals.splits) == 2
        if bool(self.recipe.output.validation) != has_splits:
            raise ValueError("recipe.output.validation and totals.splits do not say the same of splits")  # fmt: skip
        return self


def check(values: Any, model: type[BaseModel], *, within: str = "") -> None:
    """See that JSON values are what a model says.

    Args:
        values: of a manifest, or a part of one.
        model: of the same.
        within: key of the part, for the message.

    Raises:
        ValueError: they are not; names the first wrong key, what was found, and what was expected.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(_explain(problem, within)) from None


def _one_of(section: BaseModel, *names: str) -> None:
    if not any(getattr(section, name) for name in names):
        raise ValueError(f"expected one of {', '.join(names)}")


def _explain(problem: Any, within: str) -> str:
    parts = [within] if within else []
    for part in problem["loc"]:
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1] if parts else ''}[{part}]"]
        elif part not in ("int", "literal['all']"):
            parts.append(one_line(part, limit=60))
    where = ".".join(parts)
    if problem["type"] == "missing":
        return f"no {where!r}"
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}".replace("input should be", "expected")
    message = message.split(" or instance of")[0].replace("dictionary", "object")
    message = message.replace("expected a valid object", "expected an object")
    message = message.replace("expected a valid integer", "expected a whole number")
    message = message.replace("expected a valid", "expected a")
    if isinstance(problem["input"], dict | list):
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, found {one_line(json.dumps(problem['input'], ensure_ascii=False, default=repr), limit=60)}"
