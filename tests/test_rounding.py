"""The comparisons of tests that allow rounding can fail."""

import numpy as np
import pytest
from rounding import assert_same_picture, same_arrays, same_values

PICTURE = np.full((50, 50, 3), 100, np.uint8)


def changed(values: int, levels: int) -> np.ndarray:
    picture = PICTURE.copy()
    picture.reshape(-1)[:values] += np.uint8(levels)
    return picture


def test_pictures() -> None:
    for alike in (changed(7500, 1), changed(7, 4)):
        assert_same_picture(alike, PICTURE)
    for other in (changed(8, 2), changed(1, 5), PICTURE[:40], PICTURE.astype(np.int16)):
        with pytest.raises(AssertionError):
            assert_same_picture(other, PICTURE)


def test_values_and_arrays() -> None:
    assert same_values({"a": [1.0 + 1e-7]}, {"a": [1.0]})
    for found in ({"a": [1.0001]}, {"a": [True]}, {"a": [1.0, 1.0]}, {"b": [1.0]}, {"a": 1}, [1.0]):
        assert not same_values(found, {"a": [1.0]})
    row = np.array([1.0, -2.0], np.float32)
    assert same_arrays(row + np.float32(1e-6), row)
    for other in (row.astype(float), row[:1], row + np.float32(1e-3), -row):
        assert not same_arrays(other, row)
    assert not same_arrays(np.array([1, 2]), np.array([1, 3]))
