"""Intervals against their closed forms. Alone: python -m pytest tests/common/test_stats.py"""

import numpy as np
import pytest
from scipy.stats import t

from common import stats


def test_wilson_interval():
    """(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)"""
    k, n, z = 640, 797, 1.959963984540054
    p = k / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low = (p + z * z / (2 * n) - half) / (1 + z * z / n)
    high = (p + z * z / (2 * n) + half) / (1 + z * z / n)
    assert stats.wilson(k, n) == pytest.approx([low, high])


def test_t_interval():
    """mean +- t s / sqrt(n), here with s = 1 and n = 3."""
    half = t.ppf(0.975, 2) / 3**0.5
    assert stats.t_interval([4, 5, 6]) == pytest.approx([5, 5 - half, 5 + half])


def test_paired_difference_of_newcombe():
    """His example of 50 pairs, 36 + 12 against 36 + 2: 0.2000, 0.0569 to 0.3404 by method 10."""
    difference, interval = stats.paired_difference(36, 12, 2, 0)
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx([0.0569, 0.3404], abs=5e-5)
    swapped, mirrored = stats.paired_difference(36, 2, 12, 0)
    assert swapped == -difference
    assert mirrored == pytest.approx([-interval[1], -interval[0]])
    assert stats.paired_difference(10, 0, 0, 0)[0] == 0


def test_paired_interval_covers():
    """95 % nominal: the true difference of simulated pairs lies inside 92 to 98 % of the time."""
    rng = np.random.default_rng(0)
    shares = np.array([0.75, 0.09, 0.06, 0.10])
    n_inside = 0
    for counts in rng.multinomial(200, shares, 400):
        low, high = stats.paired_difference(*counts.tolist())[1]
        n_inside += low <= shares[1] - shares[2] <= high
    assert 0.92 <= n_inside / 400 <= 0.98
