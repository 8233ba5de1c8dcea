"""The schema: one list of columns, from which the Parquet types, the card's types and the tolerances follow."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Features
from hypothesis import given
from hypothesis import strategies as st

from builder.schema import (
    COLUMNS,
    FLOAT16_MIN,
    arrow_schema,
    card_features,
    columns,
    float16_rounding,
)

TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "float16": pa.float16(),
    "float32": pa.float32(),
}


@pytest.mark.parametrize("with_text", [True, False])
def test_files_hold_plain_lists_of_the_declared_types(with_text):
    schema = arrow_schema(with_text=with_text)
    assert schema.names == [c.name for c in COLUMNS if with_text or c.name != "text"]
    for column in columns(with_text=with_text):
        found, depth = schema.field(column.name).type, 0
        while pa.types.is_list(found):
            found, depth = found.value_type, depth + 1
        assert found == TYPES[column.dtype]
        assert depth == {"": 0, "T": 1, "T,K": 2}[column.shape]


@pytest.mark.parametrize("top_k", [1, 50, 448])
@pytest.mark.parametrize("with_text", [True, False])
def test_the_card_declares_the_types_of_the_files(with_text, top_k):
    features = Features._from_yaml_list(card_features(with_text=with_text, top_k=top_k))
    declared, stored = features.arrow_schema, arrow_schema(with_text=with_text)
    assert declared.names == stored.names
    for column in columns(with_text=with_text):
        found = declared.field(column.name).type
        if column.shape == "T,K":
            assert features[column.name].shape == (None, top_k)
            found = found.storage_type
        # Names of list items differ, which no reader minds.
        assert str(found).replace("item", "element") == str(stored.field(column.name).type).replace(
            "item", "element"
        )


def test_every_column_has_a_meaning_of_one_line():
    for column in COLUMNS:
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
