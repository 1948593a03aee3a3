"""Comparing two results: tests and intervals against closed forms and published values.

Alone: python -m pytest tests/evaluation/test_compare.py
"""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common import UserError, stats
from evaluation import compare


def test_mcnemar_is_the_binomial_test():
    """p = 2 sum_{k <= min} C(n, k) / 2^n over the n images that one model alone gets right."""
    assert compare.mcnemar(0, 0) == 1
    assert compare.mcnemar(4, 4) == 1
    expected = 2 * sum(math.comb(13, k) for k in range(4)) / 2**13
    assert compare.mcnemar(3, 10) == pytest.approx(expected)
    assert compare.mcnemar(10, 3) == compare.mcnemar(3, 10)


def write_result(path, **changes):
    settings = {"dataset": "digits", "eps": 0.15, "seed": 0} | changes
    path.with_suffix(".json").write_text(json.dumps(settings))


@pytest.fixture
def pair(tmp_path):
    """The per-image files of two results on the same ten images, with their results beside them."""
    paths = []
    for name, bits in (("a", "1110001111"), ("b", "1011001110")):
        robust = np.array([bit == "1" for bit in bits])
        clean_correct = robust | (np.arange(10) == 4)
        path = tmp_path / f"{name}.npz"
        np.savez(
            path,
            index=np.arange(10),
            label=np.arange(10),
            clean_correct=clean_correct,
            robust=robust,
            fooled_by=clean_correct.astype(np.int8) + robust - 1,
            attacks=["pgd"],
        )
        write_result(path)
        paths.append(path)
    return paths


def test_compare_prints_counts_interval_and_p(pair, capsys):
    compare.compare(*map(str, pair))
    printed = capsys.readouterr().out
    assert "robust  A 70.00%  B 60.00%  (both 5, A alone 2, B alone 1, neither 2)" in printed
    assert "clean   A 80.00%  B 70.00%  (both 6, A alone 2, B alone 1, neither 1)" in printed
    low, high = stats.paired_difference(5, 2, 1, 2)[1]
    interval = f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    assert f"A - B +10.00 points, {interval}; McNemar's exact test p = 1" in printed
    assert "WARNING" not in printed


def test_compare_warns_of_other_settings_and_of_warnings(pair, capsys):
    write_result(pair[1], eps=0.1)
    compare.compare(*map(str, pair))
    assert "WARNING: eps differs: 0.15 and 0.1" in capsys.readouterr().out
    keys = ("attack", "settings", "version", "norm", "batch_size", "precision", "seed")
    for key in (*keys, "transfer_sha256"):
        write_result(pair[1], **{key: "other"})
        compare.compare(*map(str, pair))
        assert f"WARNING: {key} differs: " in capsys.readouterr().out
    write_result(pair[1], data_sha256="ab")  # such as the same files, decoded at another size
    compare.compare(*map(str, pair))
    assert "WARNING: data_sha256 differs: None and ab" in capsys.readouterr().out
    write_result(pair[1], warnings=["check failed"])
    compare.compare(*map(str, pair))
    assert "WARNING (B): check failed" in capsys.readouterr().out
    write_result(pair[1], warnings=["\x1b[2J"])
    compare.compare(*map(str, pair))
    assert "WARNING (B): \\x1b[2J\n" in capsys.readouterr().out
    Path(pair[1]).with_suffix(".json").unlink()
    compare.compare(*map(str, pair))
    assert "note: without the .json beside both files attack and radius" in capsys.readouterr().out
    write_result(pair[1], dataset="cifar10")
    with pytest.raises(UserError, match="not the same images, dataset is digits and cifar10"):
        compare.compare(*map(str, pair))
    write_result(pair[0])
    write_result(pair[1], image_list_sha256="ab")
    with pytest.raises(UserError, match="not the same images, image_list_sha256 is None and ab"):
        compare.compare(*map(str, pair))


def test_without_an_attack_clean_accuracies_alone_are_compared(pair, capsys):
    with np.load(pair[0]) as archive:
        arrays = dict(archive)
    arrays["attacks"] = np.array([], str)
    arrays["robust"] = arrays["clean_correct"]
    arrays["fooled_by"] = arrays["clean_correct"] - np.int8(1)
    np.savez(pair[1], **arrays)
    compare.compare(*map(str, pair))
    printed = capsys.readouterr().out
    assert "clean   A" in printed
    assert "robust" not in printed


@pytest.mark.parametrize(
    "change,match",
    [
        ({"label": np.zeros(10, int)}, "not the same images"),
        ({"index": np.arange(10) + 1}, "not the same images"),
        ({"robust": np.ones(9, bool)}, "c.npz: its arrays are not those of a per-image file"),
        ({"robust": np.ones(10)}, "c.npz: its arrays"),
        ({"fooled_by": np.full(10, 2)}, "c.npz: its arrays"),
        ({"fooled_by": np.zeros(10)}, "c.npz: its arrays"),
        ({"attacks": np.array("pgd")}, "c.npz: its arrays"),
        ({"robust": np.ones(10, bool)}, "c.npz: its arrays"),
        ({"clean_correct": np.ones(10, bool)}, "c.npz: its arrays"),
    ],
)
def test_other_images_and_other_arrays_are_refused(change, match, pair, tmp_path):
    with np.load(pair[0]) as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "c.npz", **arrays | change)
    with pytest.raises(UserError, match=match):
        compare.compare(str(pair[0]), str(tmp_path / "c.npz"))


def test_damaged_files_are_one_line(pair, tmp_path):
    """Cut, encrypted, compressed in an unknown way, and with headers that cannot be."""
    whole = pair[0].read_bytes()
    entry = whole.index(b"PK\1\2") + 8  # flags of the first entry, then its kind of compression
    damaged = {
        "cut": whole[:100],
        "encrypted": whole[:entry] + b"\1" + whole[entry + 1 :],
        "unknown": whole[: entry + 2] + b"\x63" + whole[entry + 3 :],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        for name in (*compare.KINDS, "attacks"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x04\x00(\n\n\n")
    for name in (*damaged, "header"):
        with pytest.raises(UserError, match=f"{name}.npz: .*not a per-image file"):
            compare.compare(str(pair[0]), str(tmp_path / f"{name}.npz"))
    with pytest.raises(UserError, match="nowhere.npz: no such file, expected a per-image file"):
        compare.compare(str(pair[0]), str(tmp_path / "nowhere.npz"))
