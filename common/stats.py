"""Intervals of a mean, of an accuracy and of a difference of two, for tables, pictures, results."""

import numpy as np
from scipy.stats import binomtest, t


def wilson(n_correct, n):
    """Wilson's 95 % interval of an accuracy, [low, high]."""
    ci = binomtest(n_correct, n).proportion_ci(method="wilson")
    return [float(ci.low), float(ci.high)]


def paired_difference(both, only_a, only_b, neither):
    """(accuracy of A - accuracy of B, [low, high]) with a 95 % interval, from four counts.

    The interval is Newcombe's (1998, method 10): Wilson's limits of the two accuracies, combined
    with the correlation phi of the two over the images, which is corrected for continuity.
    """
    n = both + only_a + only_b + neither
    a = (both + only_a) / n
    b = (both + only_b) / n
    low_a, high_a = wilson(both + only_a, n)
    low_b, high_b = wilson(both + only_b, n)

    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    surplus = both * neither - only_a * only_b
    if surplus > 0:
        surplus = max(surplus - n / 2, 0)
    phi = surplus / product**0.5 if product else 0.0

    def distance(in_a, in_b):
        return max(in_a**2 - 2 * phi * in_a * in_b + in_b**2, 0) ** 0.5

    low = a - b - distance(a - low_a, high_b - b)
    high = a - b + distance(high_a - a, b - low_b)
    return a - b, [low, high]


def t_interval(values):
    """[mean, low, high]: Student's 95 % interval of the mean of at least two values."""
    mean = np.mean(values)
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def share(correct):
    """[share, low, high] of the images that are correct, bool (N,); Wilson's. [0, 0, 1] of none."""
    if len(correct) == 0:
        return [0.0, 0.0, 1.0]
    return [float(correct.mean()), *wilson(int(correct.sum()), len(correct))]
