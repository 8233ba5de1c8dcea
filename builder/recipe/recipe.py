"""A whole recipe: its sections, what must hold between them, and what of it a plan and a manifest record."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from builder.recipe.sections import (
    FOUND_COLUMNS,
    OF_CHATS,
    CorpusRecipe,
    GenerationRecipe,
    OutputRecipe,
    Section,
    SequencesRecipe,
    TeacherRecipe,
)
from builder.recipe.wording import problems
from logit_dataset.schema import SPLITS, TRAIN, VALIDATION

UNSAID = {
    "corpus": (
        *("prompt_column", "tools_column", "documents_column", "chat_template_kwargs_column"),
    ),
    "teacher": ("device_map", "tensor_parallel", "config", "python", "weights"),
    "sequences": ("learn", "chat_template_kwargs", "chat_template_date", "drop_unwritten"),
    "output": ("validation", "tail_logprobs"),
}
"""Fields that a plan holds only if the recipe sets them to other values than their defaults: they are younger than the fingerprints of some
datasets."""


class Recipe(Section):
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
        for split in self.splits:
            limits = self.limits(split)
            if not any(limit is not None and limit < self.output.partitions for limit in limits):
                continue
            if split == VALIDATION and (few := min(n for n in limits if n is not None)) < 1:
                raise ValueError(
                    f"output.validation = {self.output.validation:g} of the corpus's limit is {few}, which leaves nothing to hold out; choose "
                    "a larger max_documents or max_tokens, or leave out validation"
                )
            what = "" if len(self.splits) == 1 else f" of the split {split}"
            raise ValueError(
                f"output.partitions is {self.output.partitions}, but the corpus's limit{what} is smaller; choose fewer partitions, or a larger max_documents or max_tokens"
            )
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """Of the dataset."""
        return SPLITS if self.output.validation else (TRAIN,)

    def limits(self, split: str) -> tuple[int | None, int | None]:
        """The documents and the tokens of a split at most: its share of the corpus's limits."""
        share = self.output.validation or 0.0
        held_out = [limit and round(limit * share) for limit in self._limits]
        if split == VALIDATION:
            return held_out[0], held_out[1]
        rest = [
            limit and limit - (out or 0) for limit, out in zip(self._limits, held_out, strict=True)
        ]
        return rest[0], rest[1]

    @property
    def _limits(self) -> tuple[int | None, int | None]:
        return self.corpus.max_documents, self.corpus.max_tokens

    @model_validator(mode="after")
    def _batches_can_be_tried(self) -> Self:
        if self.sequences.batch_tokens == "auto" and self.teacher.tensor_parallel:
            raise ValueError(
                'sequences.batch_tokens = "auto" tries sizes that may not fit in memory, and a teacher split over processes (teacher.tensor_parallel) cannot recover from that; give a number'
            )
        return self

    @model_validator(mode="after")
    def _prompts_fit(self) -> Self:
        if self.generation is None:
            return self
        if self.sequences.batch_tokens == "auto":
            raise ValueError(
                'sequences.batch_tokens = "auto" is chosen with texts of the corpus, but with [generation] the teacher writes the texts; give a number'
            )
        if self.teacher.tensor_parallel:
            raise ValueError(
                "a teacher split over processes (teacher.tensor_parallel) cannot generate; use teacher.device_map, or leave "
                "out [generation]"
            )
        if self.teacher.python:
            raise ValueError(
                "a teacher of your own code (teacher.python) cannot generate; use another teacher, or leave out [generation]"
            )
        if self.generation.max_new_tokens >= self.sequences.max_length:
            raise ValueError(
                f"generation.max_new_tokens is {self.generation.max_new_tokens}, which leaves no room for a prompt in "
                f"sequences.max_length = {self.sequences.max_length}; choose a larger max_length"
            )
        for name, value in (("long_documents", "truncate"), ("eos", "always")):
            if getattr(self.sequences, name) == value:
                raise ValueError(
                    f"sequences.{name} is {value!r}, but prompts are neither truncated nor ended with a token; leave it out, or leave out [generation]"
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
                "corpus.prompt_column is for corpora that hold completions, but with [generation] the teacher writes them; name the column of prompts in corpus.text_column"
                " or corpus.messages_column"
            )
        if is_of_chats and self.sequences.eos != "tokenizer":
            raise ValueError(
                "sequences.eos has no effect with corpus.messages_column, because the chat template ends a chat; leave it out"
            )
        for name in OF_CHATS:
            if not is_of_chats and getattr(self.sequences, name) != _default(self.sequences, name):
                raise ValueError(
                    f"sequences.{name} is valid only with corpus.messages_column; leave it out"
                )
        if self.sequences.learn == "last" and self.generation:
            raise ValueError(
                'sequences.learn = "last" selects answers of the corpus, but with [generation] the teacher writes them; leave it out'
            )
        if self.output.completions_only and not (
            is_of_chats or corpus.prompt_column or self.generation
        ):
            raise ValueError(
                "output.completions_only needs completions; set corpus.messages_column for a corpus of chats, or add [generation] to let the teacher write them"
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
            raise ValueError(problems(error, type(self))) from None

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

    def with_batch_tokens(self, sequences: dict[str, Any]) -> "Recipe":
        """The recipe with the size of batches of one that was published, where it leaves that to a trial.

        Args:
            sequences: that one's section.
        """
        if self.sequences.batch_tokens != "auto":
            return self
        values = self.model_dump(exclude_unset=True)
        values["sequences"]["batch_tokens"] = sequences["batch_tokens"]
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


def is_below(path: str) -> bool:
    """Whether a path stays below the directory at which it starts."""
    parts = Path(path)
    return not (parts.is_absolute() or ".." in parts.parts or path.startswith("~"))


def _default(section: BaseModel, field: str) -> Any:
    return type(section).model_fields[field].get_default(call_default_factory=True)


def _portable(path: str) -> str:
    """What of a path can be published: all of it only if it stays below the recipe's directory."""
    return path if is_below(path) else Path(path).name
