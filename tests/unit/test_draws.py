"""Draws of many generators at once equal those of NumPy's generators one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmpi.nn import draws
from psmpi.nn.draws import draw_rows


def rows_by_numpy(key, first, last, size, low, high):
    return np.stack([np.random.default_rng([*key, unit]).uniform(low, high, size) for unit in range(first, last)])


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 2**70), min_size=1, max_size=4), st.integers(0, 2**32 - 40), st.integers(1, 40),
    st.integers(1, 12), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3),
)  # fmt: skip
def test_rows_are_those_of_numpy_s_generators_to_the_bit(key, first, count, size, low, width):
    high = low + width
    rows = np.full((count, size + 1), np.nan)
    draw_rows(rows[:, :size], key, first, low, high)
    assert np.isnan(rows[:, size]).all()
    assert np.array_equal(rows[:, :size], rows_by_numpy(key, first, first + count, size, low, high))


@pytest.mark.parametrize("first", [0, 2**32 - 2000])
def test_more_units_than_step_side_by_side_are_the_same(first, monkeypatch):
    monkeypatch.setattr(draws, "SIDE", 700)
    monkeypatch.setattr(draws, "COLUMNS", 2)
    rows = np.empty((2000, 3), np.float32)
    draw_rows(rows, [3, 7], first, -0.5, 0.5)
    assert np.array_equal(rows, rows_by_numpy([3, 7], first, first + 2000, 3, -0.5, 0.5).astype(np.float32))
