"""Correction for many tests, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vzip.results.stats import difference_p, holm


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 count 4, 3, 2 and 1 times: 0.04, 0.06, 0.06 (not 0.06), 0.06 (not 0.04)."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


def test_a_difference_of_two_spreads_is_the_normal_ones() -> None:
    draws = np.array([-1.0, 1.0] * 500) / np.sqrt(1000 / 999)  # of spread 1
    assert difference_p(1.959964, draws, 900) == pytest.approx(0.05, abs=1e-4)
    assert difference_p(0.0, np.zeros(5), 0) == difference_p(0.0, draws, 9) == 1.0
    # One question, or three that all differ: no draw differs from another, and yet nothing is known.
    assert [difference_p(0.1, np.full(5, 0.1), apart) for apart in (1, 3, 6)] == [1.0, 0.25, 1 / 32]
    assert difference_p(1.959964, draws, 4) == 0.125
    assert difference_p(1.959964, np.array([*draws, np.nan]), 900) == pytest.approx(0.05, abs=1e-4)
