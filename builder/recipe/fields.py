"""Kinds of values that a recipe's keys take, beyond those that Python has."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

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
    raise ValueError("expected a column name, or false if there is none")


OptionalColumn = Annotated[str | Literal[False] | None, PlainValidator(_optional_column)]


def _batch_tokens(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise ValueError('expected a whole number of at least 1, or "auto"')


BatchTokens = Annotated[int | Literal["auto"], PlainValidator(_batch_tokens)]
