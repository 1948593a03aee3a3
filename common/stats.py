"""Intervals of a mean and of an accuracy, for tables, pictures and results.

Comparing two models image by image stands in evaluation/compare.py.
"""

import numpy as np
from scipy.stats import binomtest, t


def wilson(n_correct, n):
    """Wilson's 95 % interval of an accuracy, [low, high]."""
    ci = binomtest(n_correct, n).proportion_ci(method="wilson")
    return [float(ci.low), float(ci.high)]


def t_interval(values):
    """[mean, low, high]: Student's 95 % interval of the mean of at least two values."""
    mean = np.mean(values)
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [mean, mean - half, mean + half]
