"""The section `host` times functions by their names."""

import pytest

from benchmarks.host import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_timed_exists(stage):
    owner, name = STAGES[stage]
    assert callable(getattr(owner, name))
