"""The row of a logit dataset: its columns, their types, and what position t means.

One row is one sequence: a whole document, or one chunk of a long one. Rows carry no padding, and no
document shares a row with another. T is the number of tokens in the row and K the recipe's top_k; of what a recipe may
add, M are its tail_samples, V is the vocabulary of the teacher's logits and D the size of its hidden states.

ALIGNMENT. Position t holds the teacher's distribution for the token that follows input_ids[t].
Nothing is shifted on disk. So for the text "The capital of France is Paris":

    t                 0      1          2     3         4
    input_ids[t]      The    ▁capital   ▁of   ▁France   ▁is
    distribution t    ...    ▁of ...    ...   ▁is ...   ▁Paris 0.77, ▁the 0.06, ...
    target t          ▁capital ▁of     ▁France ▁is      ▁Paris

At the last position, the target is the document's next token where the sequence is cut from a longer
document, else the tokenizer's end-of-sequence token. If the tokenizer has none, nothing follows, and
target_logprob is NaN there (the only NaN that is ever stored). Nor is it known what follows a completion that the teacher wrote,
whether an end-of-sequence token or a limit ended it: target_logprob is NaN at the last position of all such rows.

COMPLETIONS. completion_mask says of each token whether it was written by the assistant of a chat, or by the teacher itself, or
belongs to the completion of a prompt that the corpus holds: it is about input_ids[t] and not about what follows. So a completion is learned from the distributions at the positions t with
completion_mask[t+1], which is the loss mask; with one answer in a row, they begin at the last token of its prompt:

    t                    0      1          2     3         4       5       6
    input_ids[t]         The    ▁capital   ▁of   ▁France   ?       ▁Paris  <end>
    completion_mask[t]   no     no         no    no        no      yes     yes
    distribution t                                         ▁Paris  <end>
    loss mask            no     no         no    no        yes     yes     no

The last position is never in it: no token of the row follows it. With `completions_only`, columns of several values a token
hold the C positions in the loss mask and no others, one after the other: [C,K] for [T,K]. Columns of one value a token are whole.

EXPECTATIONS. The head is exact and the tail is sampled, so that for any f over the vocabulary this is unbiased:

    E[f] = Σ_k exp(topk_logprobs[k]) f(topk_indices[k]) + exp(tail_logprob) / M · Σ_m f(tail_indices[m])

Where nothing is outside the top K (K = V, or all others ruled out), there is nothing to draw: tail_indices repeat the K-th id, and
tail_logprob and tail_logprobs are −65504, so that such draws count for nothing. A recipe can leave out tail_logprobs: the formula does not
need them, and tail_logprob alone says which draws count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = "1.2.0"
TRAIN, VALIDATION = SPLITS = ("train", "validation")

Shape = Literal["", "T", "T,K", "T,M", "T,V", "T,D", "C,K", "C,M", "C,V", "C,D"]
"""Shape of one row's value: a scalar, one value a token, or several values a token, or a position in the loss mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the dataset."""

    name: str
    dtype: Literal["string", "bool", "int32", "float16", "float32"]
    shape: Shape
    meaning: str
    """One line for the dataset card and the README."""


INPUT_IDS = Column(name="input_ids", dtype="int32", shape="T", meaning="the teacher's token ids")
COLUMNS: tuple[Column, ...] = (
    Column(
        name="id",
        dtype="string",
        shape="",
        meaning="stable document id: the corpus's own, else a hash of the document's text",
    ),
    Column(name="chunk_index", dtype="int32", shape="", meaning="0, 1, … within a document"),
    Column(name="text", dtype="string", shape="", meaning="the text of exactly these tokens"),
    INPUT_IDS,
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
        meaning="logsumexp of the raw logits: raw logit = log-probability + logsumexp",
    ),
    Column(
        name="entropy",
        dtype="float16",
        shape="T",
        meaning="entropy of the full distribution, in nats",
    ),
)
"""Of a dataset with `top_k = K` and nothing else."""

COMPLETION_MASK = Column(
    name="completion_mask",
    dtype="bool",
    shape="T",
    meaning="whether this token is the completion's: written by the assistant, or by the teacher itself",
)

LOGPROBS = Column(
    name="logprobs",
    dtype="float16",
    shape="T,V",
    meaning="log-probabilities of the whole vocabulary, in the order of its ids",
)
TAIL_DRAWS = (
    Column(
        name="tail_indices",
        dtype="int32",
        shape="T,M",
        meaning="M tokens drawn, with replacement, from the distribution outside the top K",
    ),
    Column(
        name="tail_logprobs",
        dtype="float16",
        shape="T,M",
        meaning="the true log-probabilities of the drawn tokens",
    ),
)
HIDDEN_STATES = Column(
    name="hidden_states",
    dtype="float16",
    shape="T,D",
    meaning="the teacher's last hidden state, which its head turns into logits",
)


def temperature_column(temperature: float) -> Column:
    """The column that makes the distribution at another temperature known: softmax(logits / T)."""
    t = f"{temperature:g}"
    return Column(
        name=f"logsumexp_t{t}",
        dtype="float32",
        shape="T",
        meaning=f"logsumexp of logits/{t}, so log p there = (log-probability + logsumexp)/{t} − logsumexp_t{t}",
    )


_OF_KEPT: dict[Shape, Shape] = {"T,K": "C,K", "T,M": "C,M", "T,V": "C,V", "T,D": "C,D"}

FLOAT16_MIN = -65504.0
"""Log-probabilities below this (−inf among them) are stored as this value, float16's lowest."""

HEAD_FILE = "teacher_head.safetensors"
"""The teacher's last layer, beside the data of a dataset with hidden states."""

MAX_CHARACTER_TOKENS = 64
"""More tokens than any character takes: bytes make it 4, and no normaliser writes one as more than 18."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the rows of a dataset hold."""

    text: bool = True
    top_k: int | Literal["all"] = 50
    tail_samples: int = 0
    tail_logprobs: bool = True
    """Whether draws have their log-probabilities beside them."""
    temperatures: tuple[float, ...] = ()
    hidden_states: bool = False
    completion_mask: bool = False
    completions_only: bool = False
    """Columns of several values a token hold positions in the loss mask only."""
    vocab_size: int = 0
    """V; needed with `top_k = "all"`."""
    hidden_size: int = 0
    """D; needed with hidden states."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any], teacher: Mapping[str, Any]) -> Self:
        """The layout that a recipe asks for.

        Args:
            recipe: as plain values; what it does not name is off.
            teacher: what the loaded teacher is (`Teacher.provenance`).
        """
        output = recipe["output"]
        return cls(
            text=output["text"],
            top_k=output["top_k"],
            tail_samples=output.get("tail_samples", 0),
            tail_logprobs=output.get("tail_logprobs", True),
            temperatures=tuple(map(float, output.get("temperatures", ()))),
            hidden_states=output.get("hidden_states", False),
            completion_mask=any(map(recipe["corpus"].get, ("messages_column", "prompt_column")))
            or is_generated(recipe),
            completions_only=output.get("completions_only", False),
            vocab_size=teacher["vocab_size"],
            hidden_size=teacher.get("hidden_size") or 0,
        )

    def width(self, column: Column) -> int:
        """How many values a token has in a column."""
        top_k = self.vocab_size if self.top_k == "all" else self.top_k
        sizes = {"K": top_k, "M": self.tail_samples, "V": self.vocab_size, "D": self.hidden_size}
        return sizes.get(column.shape[2:], 1)

    @property
    def widest(self) -> int:
        """The most values that a token has in a column: what memory and Arrow's offsets depend on."""
        return max(self.width(column) for column in columns(self))


def columns(layout: Layout) -> tuple[Column, ...]:
    """The columns of a dataset, in their order."""
    found = [column for column in COLUMNS if layout.text or column.name != "text"]
    if layout.completion_mask:
        found.insert(found.index(INPUT_IDS) + 1, COMPLETION_MASK)
    if layout.top_k == "all":
        first = found.index(next(column for column in found if column.shape == "T,K"))
        found = [c for c in found if c.shape != "T,K" and c.name != "tail_logprob"]
        found.insert(first, LOGPROBS)
    if layout.tail_samples:
        found += TAIL_DRAWS if layout.tail_logprobs else TAIL_DRAWS[:1]
    found += map(temperature_column, layout.temperatures)
    if layout.hidden_states:
        found.append(HIDDEN_STATES)
    if layout.completions_only:
        found = [replace(c, shape=_OF_KEPT.get(c.shape, c.shape)) for c in found]
    return tuple(found)


def loss_mask(completion_mask: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Loss mask [T]: where the next token of the row is the completion's (see COMPLETIONS)."""
    mask = np.asarray(completion_mask, dtype=np.bool_)
    return np.append(mask[1:], False)[: len(mask)]


def arrow_schema(layout: Layout) -> pa.Schema:
    """The Arrow schema of every Parquet file: plain nested lists that any reader understands."""
    fields = []
    for column in columns(layout):
        arrow_type = pa.type_for_alias({"float16": "halffloat"}.get(column.dtype, column.dtype))
        for _ in filter(None, column.shape.split(",")):
            arrow_type = pa.list_(arrow_type)
        fields.append(pa.field(column.name, arrow_type))
    return pa.schema(fields)


def card_features(layout: Layout) -> list[dict[str, object]]:
    """The card's YAML `dataset_info.features`.

    Columns of several values a token are declared as Array2D((None, K)): stock `load_dataset` then yields (T, K) or (C, K) tensors,
    many times faster than from nested lists, while the Parquet files stay plain.
    """
    features: list[dict[str, object]] = []
    for column in columns(layout):
        if column.shape == "":
            features.append({"name": column.name, "dtype": column.dtype})
        elif "," not in column.shape:
            features.append({"name": column.name, "list": column.dtype})
        else:
            array = {"shape": [None, layout.width(column)], "dtype": column.dtype}
            features.append({"name": column.name, "dtype": {"array2_d": array}})
    return features


def float16_rounding(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The most by which storing as float16 can move each value: half a unit of its last of 11 bits."""
    _, exponents = np.frexp(values)
    rounding: npt.NDArray[np.float64] = np.ldexp(1.0, np.maximum(exponents - 12, -25))
    return rounding


def is_generated(recipe: Mapping[str, Any]) -> bool:
    """Whether the corpus holds prompts, which the teacher completes."""
    return bool(recipe.get("generation"))


def shortest_cut(manifest: Mapping[str, Any]) -> float:
    """The length from which on a row may be the beginning of a longer document, the rest of which was left out.

    Any, where the teacher wrote the end of a row, for what would follow is not known.
    """
    if manifest["recipe"]["sequences"]["long_documents"] == "truncate" or is_generated(
        manifest["recipe"]
    ):
        return shortest_open(manifest)
    return float("inf")


def shortest_open(manifest: Mapping[str, Any]) -> float:
    """The length from which on the row alone does not tell what follows it: its document may go on, in another row or in none.

    Any, where the teacher wrote the end of a row.
    """
    if is_generated(manifest["recipe"]):
        return 0
    # A cut that would fall inside a character is made before it, and no suffix stands after a cut.
    longest: int = manifest["recipe"]["sequences"]["max_length"] - len(
        manifest["teacher"]["suffix_ids"]
    )
    return longest - MAX_CHARACTER_TOKENS


def splits_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits of a dataset: `train` alone, where there is no hold-out."""
    named = {shard.get("split") or TRAIN for shard in manifest["shards"]}
    return tuple(split for split in SPLITS if split in named)
