"""Intervals and tests of accuracies against closed forms and published values. Alone: python -m pytest tests/test_stats.py"""

import json
import math
import zipfile

import numpy as np
import pytest

from common import cli, stats


def test_wilson_interval():
    """Closed form: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    k, n, z = 640, 797, 1.959963984540054
    p = k / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [(p + z * z / (2 * n) + s * half) / (1 + z * z / n) for s in (-1, 1)]
    assert stats.wilson(k, n) == pytest.approx(expected)


def test_mcnemar_is_the_binomial_test():
    """p = 2 sum_{k <= min} C(n, k) / 2^n over the n images that one model alone gets right."""
    assert stats.mcnemar(0, 0) == 1 and stats.mcnemar(4, 4) == 1
    assert stats.mcnemar(3, 10) == stats.mcnemar(10, 3) == pytest.approx(2 * sum(math.comb(13, k) for k in range(4)) / 2**13)


def test_paired_difference_of_newcombe():
    """His example of 50 pairs, 36 + 12 against 36 + 2: 0.2000, 0.0569 to 0.3404 by method 10."""
    difference, interval = stats.paired_difference(36, 12, 2, 0)
    assert difference == pytest.approx(0.2) and interval == pytest.approx([0.0569, 0.3404], abs=5e-5)
    swapped, mirrored = stats.paired_difference(36, 2, 12, 0)
    assert swapped == -difference and mirrored == pytest.approx([-interval[1], -interval[0]])
    assert stats.paired_difference(10, 0, 0, 0)[0] == 0


def test_paired_interval_covers():
    """95 % nominal: over simulated pairs of correlated verdicts, the true difference lies inside 92 to 98 % of the time."""
    rng = np.random.default_rng(0)
    shares = np.array([0.75, 0.09, 0.06, 0.10])
    inside = 0
    for counts in rng.multinomial(200, shares, 2000):
        low, high = stats.paired_difference(*counts.tolist())[1]
        inside += low <= shares[1] - shares[2] <= high
    assert 0.92 <= inside / 2000 <= 0.98


@pytest.fixture
def results(tmp_path):
    """Two results on the same ten images."""
    paths = []
    for name, robust in (("a", "1110001111"), ("b", "1011001110")):
        verdict = np.array([c == "1" for c in robust])
        path = tmp_path / f"{name}.npz"
        clean_correct = verdict | (np.arange(10) == 4)
        arrays = {"index": np.arange(10), "label": np.arange(10), "clean_correct": clean_correct, "robust": verdict}
        np.savez(path, **arrays, fooled_by=clean_correct.astype(np.int8) + verdict - 1, attacks=["pgd"])
        (tmp_path / f"{name}.json").write_text(json.dumps({"dataset": "digits", "eps": 0.15, "seed": 0}))
        paths.append(path)
    return paths


def test_compare_prints_counts_interval_and_p(results, capsys):
    stats.compare(*map(str, results))
    printed = capsys.readouterr().out
    assert "robust  A 70.00%  B 60.00%  (both 5, A alone 2, B alone 1, neither 2)" in printed
    low, high = stats.paired_difference(5, 2, 1, 2)[1]
    assert f"A - B +10.00 points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}; McNemar's exact test p = 1" in printed
    assert "WARNING" not in printed
    results[1].with_suffix(".json").write_text(json.dumps({"dataset": "digits", "eps": 0.1, "seed": 0}))
    stats.compare(*map(str, results))
    assert "WARNING: eps differs: 0.15 and 0.1" in capsys.readouterr().out
    results[1].with_suffix(".json").write_text(json.dumps({"dataset": "digits", "eps": 0.15, "seed": 0, "warnings": ["check failed"]}))
    stats.compare(*map(str, results))
    assert "WARNING (B): check failed" in capsys.readouterr().out
    results[1].with_suffix(".json").write_text(json.dumps({"dataset": "cifar10"}))
    with pytest.raises(cli.UserError, match="not the same images, dataset is digits and cifar10"):
        stats.compare(*map(str, results))


def test_without_an_attack_clean_accuracies_alone_are_compared(results, capsys):
    with np.load(results[0]) as found:
        np.savez(results[1], **dict(found) | {"attacks": np.array([], str), "fooled_by": found["clean_correct"] - np.int8(1)})
    stats.compare(*map(str, results))
    printed = capsys.readouterr().out
    assert "clean   A" in printed and "robust" not in printed


def test_what_cannot_be_compared_is_one_line(results, tmp_path):
    with np.load(results[0]) as found:
        arrays = dict(found)
    other = tmp_path / "c.npz"
    for change, match in (
        ({"label": np.zeros(10, int)}, "not the same images"),
        ({"index": np.arange(10) + 1}, "not the same images"),
        ({"robust": np.ones(9, bool)}, "no per-image file"),
        ({"robust": np.ones(10)}, "no per-image file"),
        ({"fooled_by": np.full(10, 2)}, "no per-image file"),
        ({"fooled_by": np.zeros(10)}, "no per-image file"),
        ({"attacks": np.array("pgd")}, "no per-image file"),
    ):
        np.savez(other, **arrays | change)
        with pytest.raises(cli.UserError, match=match):
            stats.compare(str(results[0]), str(other))
    whole = results[0].read_bytes()
    other.write_bytes(whole[:100])
    encrypted, unknown, header = (tmp_path / f"{name}.npz" for name in ("encrypted", "unknown", "header"))
    place = whole.index(b"PK\1\2") + 8
    encrypted.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    unknown.write_bytes(whole[: place + 2] + b"\x63" + whole[place + 3 :])
    with zipfile.ZipFile(header, "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x04\x00(\n\n\n")
    for path in (other, tmp_path / "nowhere.npz", encrypted, unknown, header):
        with pytest.raises(cli.UserError, match="missing, or no per-image file"):
            stats.compare(str(results[0]), str(path))
