"""Intervals against their closed forms. Alone: python -m pytest tests/common/test_stats.py"""

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
