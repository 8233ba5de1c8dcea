"""The schema: one list of columns, from which the Parquet types, the card's types and the tolerances follow."""

import math

import numpy as np
import pyarrow as pa
import pytest
from datasets import Features
from hypothesis import given
from hypothesis import strategies as st

from logit_dataset.schema import (
    COLUMNS,
    FLOAT16_MIN,
    HIDDEN_STATES,
    LOGPROBS,
    TAIL_DRAWS,
    Layout,
    arrow_schema,
    card_features,
    columns,
    float16_rounding,
    shortest_cut,
    temperature_column,
)

TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "float16": pa.float16(),
    "float32": pa.float32(),
}


SIZES = {"vocab_size": 448, "hidden_size": 32}
OPTIONS = {"temperatures": (0.5, 2.0), "hidden_states": True, **SIZES}
LAYOUTS = [
    *(Layout(), Layout(text=False), Layout(top_k=1, tail_samples=1), Layout(top_k=448)),
    Layout(top_k=1, tail_samples=24, tail_logprobs=False, **OPTIONS),
    *(Layout(top_k=20, tail_samples=4, **OPTIONS), Layout(top_k="all", **OPTIONS)),
]
OPTIONAL = (LOGPROBS, *TAIL_DRAWS, temperature_column(2.0), HIDDEN_STATES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_hold_plain_lists_of_the_declared_types(layout):
    schema = arrow_schema(layout)
    assert schema.names == [column.name for column in columns(layout)]
    for column in columns(layout):
        found, depth = schema.field(column.name).type, 0
        while pa.types.is_list(found):
            found, depth = found.value_type, depth + 1
        assert found == TYPES[column.dtype]
        assert depth == {"": 0, "T": 1}.get(column.shape, 2)


def test_the_columns_are_those_that_were_asked_for():
    core = [column.name for column in COLUMNS]
    assert [c.name for c in columns(Layout())] == core
    assert [c.name for c in columns(Layout(text=False))] == [n for n in core if n != "text"]
    added = ["tail_indices", "tail_logprobs", "logsumexp_t0.5", "logsumexp_t2", "hidden_states"]
    assert [c.name for c in columns(LAYOUTS[-2])] == [*core, *added]
    added.remove("tail_logprobs")
    assert [c.name for c in columns(LAYOUTS[-3])] == [*core, *added]
    assert [c.name for c in columns(Layout(top_k="all", vocab_size=448))] == [
        *("id", "chunk_index", "text", "input_ids", "logprobs"),
        *("target_logprob", "logsumexp", "entropy"),
    ]


def test_a_layout_is_read_from_a_manifest():
    output = {"top_k": 20, "text": True, "profile": "default"}
    recipe = {"corpus": {"text_column": "text"}, "output": output}
    teacher = {"vocab_size": 448, "architecture": "x"}
    # What is not named is off: schema 1.0 had no such names.
    assert Layout.of(recipe, teacher) == Layout(top_k=20, vocab_size=448)
    output |= {"tail_samples": 4, "temperatures": [0.5, 2], "hidden_states": True}
    found = Layout.of(recipe, teacher | {"hidden_size": 32})
    assert found == Layout(top_k=20, tail_samples=4, **OPTIONS)
    without = Layout.of({**recipe, "output": output | {"tail_logprobs": False}}, teacher)
    assert "tail_logprobs" not in {column.name for column in columns(without)}
    widths = {column.name: found.width(column) for column in columns(found)}
    assert widths["topk_indices"] == widths["topk_logprobs"] == 20
    assert widths["tail_indices"] == 4
    assert widths["logsumexp_t2"] == widths["entropy"] == 1
    assert widths["hidden_states"] == found.widest == 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_card_declares_the_types_of_the_files(layout):
    features = Features._from_yaml_list(card_features(layout))
    declared, stored = features.arrow_schema, arrow_schema(layout)
    assert declared.names == stored.names
    for column in columns(layout):
        found = declared.field(column.name).type
        if "," in column.shape:
            assert features[column.name].shape == (None, layout.width(column))
            found = found.storage_type
        # Names of list items differ, which no reader minds.
        assert str(found).replace("item", "element") == str(stored.field(column.name).type).replace(
            "item", "element"
        )


def test_every_column_has_a_meaning_of_one_line():
    for column in (*COLUMNS, *OPTIONAL):
        assert column.meaning
        assert "\n" not in column.meaning
        assert "|" not in column.meaning  # it stands in a table


def test_the_lowest_value_is_that_of_float16():
    assert np.finfo(np.float16).min == FLOAT16_MIN


def distance(value: float) -> float:
    return abs(float(np.float16(value)) - value)


@given(st.floats(-65504, 65504))
def test_no_value_moves_further_than_float16_rounding_says(value):
    assert distance(value) <= float16_rounding(np.array([value]))[0]


@pytest.mark.parametrize("power", range(-26, 16))
def test_float16_rounding_is_half_of_numpy_s_spacing(power):
    """And is reached, half-way between two neighbours."""
    below = np.float16(1.5 * 2.0**power)
    spacing = float(np.spacing(below))
    middle = float(below) + spacing / 2
    rounding = float16_rounding(np.array([middle, -middle]))
    assert rounding.tolist() == [spacing / 2] * 2
    assert distance(middle) == spacing / 2


def test_float16_rounding_below_the_smallest_number_is_half_of_it():
    assert float16_rounding(np.array([1e-30])) == float(np.spacing(np.float16(0))) / 2


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"), [("chunk", [], math.inf), ("truncate", [1, 2], 1024 - 2 - 64)]
)
def test_from_which_length_on_a_row_may_be_a_cut_document(mode, suffix, expected):
    sequences = {"long_documents": mode, "max_length": 1024}
    manifest = {"recipe": {"sequences": sequences}, "teacher": {"suffix_ids": suffix}}
    assert shortest_cut(manifest) == expected
