"""The row of a logit dataset: its columns, their types, and what position t means.

One row is one sequence: a whole document, or one chunk of a long one. Rows carry no padding, and no
document shares a row with another. T is the number of tokens in the row and K the recipe's top_k.

ALIGNMENT. Position t holds the teacher's distribution for the token that follows input_ids[t].
Nothing is shifted on disk. So for the text "The capital of France is Paris":

    t                 0      1          2     3         4
    input_ids[t]      The    ▁capital   ▁of   ▁France   ▁is
    distribution t    ...    ▁of ...    ...   ▁is ...   ▁Paris 0.77, ▁the 0.06, ...
    target t          ▁capital ▁of     ▁France ▁is      ▁Paris

At the last position, the target is the document's next token where the sequence is cut from a longer
document, else the tokenizer's end-of-sequence token. If the tokenizer has none, nothing follows, and
target_logprob is NaN there (the only NaN that is ever stored).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = "1.0.0"

Shape = Literal["", "T", "T,K"]
"""Shape of one row's value: a scalar, one value a token, or K values a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the dataset."""

    name: str
    dtype: Literal["string", "int32", "float16", "float32"]
    shape: Shape
    meaning: str
    """One line for the dataset card and the README."""


COLUMNS = (
    Column(
        name="id",
        dtype="string",
        shape="",
        meaning="stable document id: the corpus's own, else a hash of the document's text",
    ),
    Column(name="chunk_index", dtype="int32", shape="", meaning="0, 1, … within a document"),
    Column(name="text", dtype="string", shape="", meaning="the text of exactly these tokens"),
    Column(name="input_ids", dtype="int32", shape="T", meaning="the teacher's token ids"),
    Column(
        name="topk_indices",
        dtype="int32",
        shape="T,K",
        meaning="the K most probable next tokens, by falling probability, ties by lower id",
    ),
    Column(
        name="topk_logprobs",
        dtype="float16",
        shape="T,K",
        meaning="their true log-probabilities, never renormalised",
    ),
    Column(
        name="tail_logprob",
        dtype="float16",
        shape="T",
        meaning="log of the probability mass outside the top K",
    ),
    Column(
        name="target_logprob",
        dtype="float16",
        shape="T",
        meaning="log-probability of the token that really follows, inside the top K or not",
    ),
    Column(
        name="logsumexp",
        dtype="float32",
        shape="T",
        meaning="log-partition of the raw logits: raw logit = log-probability + logsumexp",
    ),
    Column(
        name="entropy",
        dtype="float16",
        shape="T",
        meaning="entropy of the full distribution, in nats",
    ),
)

FLOAT16_MIN = -65504.0
"""Log-probabilities below this (−inf among them) are stored as this value, float16's lowest."""


def columns(*, with_text: bool) -> tuple[Column, ...]:
    """The columns of a dataset whose recipe keeps the text, or drops it."""
    return tuple(column for column in COLUMNS if with_text or column.name != "text")


def arrow_schema(*, with_text: bool) -> pa.Schema:
    """The Arrow schema of every Parquet file: plain nested lists that any reader understands."""
    fields = []
    for column in columns(with_text=with_text):
        arrow_type = pa.type_for_alias({"float16": "halffloat"}.get(column.dtype, column.dtype))
        for _ in filter(None, column.shape.split(",")):
            arrow_type = pa.list_(arrow_type)
        fields.append(pa.field(column.name, arrow_type))
    return pa.schema(fields)


def card_features(*, with_text: bool, top_k: int) -> list[dict[str, object]]:
    """The card's YAML `dataset_info.features`.

    [T, K] columns are declared as Array2D((None, K)): stock `load_dataset` then yields (T, K) tensors, many
    times faster than from nested lists, while the Parquet files stay plain.
    """
    features: list[dict[str, object]] = []
    for column in columns(with_text=with_text):
        if column.shape == "":
            features.append({"name": column.name, "dtype": column.dtype})
        elif column.shape == "T":
            features.append({"name": column.name, "list": column.dtype})
        else:
            shape = [None, top_k]
            features.append(
                {
                    "name": column.name,
                    "dtype": {"array2_d": {"shape": shape, "dtype": column.dtype}},
                }
            )
    return features


def float16_rounding(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The most by which storing as float16 can move each value: half a unit of its last of 11 bits."""
    _, exponents = np.frexp(values)
    rounding: npt.NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 12, -25))
    return rounding
