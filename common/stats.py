"""Intervals and tests for accuracies: one model (Wilson), two models on the same images (McNemar, Newcombe), several radii."""

import os

import numpy as np
from scipy.stats import binomtest, t

from common import checkpoint
from common.cli import UserError


def wilson(n_correct, n):
    """Wilson's 95 % interval of an accuracy, [low, high]."""
    ci = binomtest(n_correct, n).proportion_ci(method="wilson")
    return [float(ci.low), float(ci.high)]


def t_interval(values):
    """[mean, low, high]: Student's 95 % interval of the mean of at least two values, such as one per seed."""
    mean = np.mean(values)
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def mcnemar(only_a, only_b):
    """p of McNemar's exact test: are the images that one model alone gets right split evenly between the two?"""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(both, only_a, only_b, neither):
    """(accuracy of A - accuracy of B, [low, high]): 95 % interval of Newcombe (1998, method 10) from the four counts of images.

    Wilson's limits of the two accuracies, combined with their correlation over the images.
    """
    n = both + only_a + only_b + neither
    a, b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    spread = ((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)) ** 0.5
    surplus = both * neither - only_a * only_b
    surplus = max(surplus - n / 2, 0) if surplus > 0 else surplus  # his continuity correction
    phi = surplus / spread if spread else 0.0

    def half(of_a, of_b):
        return max(of_a**2 - 2 * phi * of_a * of_b + of_b**2, 0) ** 0.5

    return a - b, [a - b - half(a - low_a, high_b - b), a - b + half(high_a - a, b - low_b)]


def read_verdicts(path):
    """What evaluate.py left in an .npz file, as a dict: index, label, clean_correct, robust, fooled_by per image; names of the attacks."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            if sum(info.file_size for info in found.zip.infolist()) > 1 << 28:
                raise ValueError
            arrays = {key: np.asarray(found[key]) for key in ("index", "label", "clean_correct", "robust", "fooled_by")}
            attacks = np.asarray(found["attacks"])
    except Exception:  # NumPy and zipfile let through whatever is raised over broken headers
        raise UserError(f"{path}: missing, or no per-image file of evaluate.py") from None
    n, kinds = arrays["label"].size, {"index": "iu", "label": "iu", "clean_correct": "b", "robust": "b", "fooled_by": "iu"}
    fits = all(a.shape == (n,) and a.dtype.kind in kinds[key] for key, a in arrays.items()) and attacks.ndim == 1
    if not n or not fits or not (-1 <= arrays["fooled_by"].min() and arrays["fooled_by"].max() <= len(attacks)):
        raise UserError(f"{path}: no per-image file of evaluate.py")
    return arrays | {"attacks": attacks}


def compare(path_a, path_b):
    """Print two results on the same images side by side: four counts, paired difference with its interval, McNemar's test."""
    a, b = read_verdicts(path_a), read_verdicts(path_b)
    if not all(np.array_equal(a[key], b[key]) for key in ("index", "label")):
        raise UserError(f"--compare {path_a} {path_b}: not the same images")
    settings = [os.path.splitext(path)[0] + ".json" for path in (path_a, path_b)]
    if all(map(os.path.exists, settings)):
        first, second = map(checkpoint.read_json, settings)
        for key in ("dataset", "image_list_sha256"):
            if first.get(key) != second.get(key):
                raise UserError(f"--compare {path_a} {path_b}: not the same images, {key} is {first.get(key)} and {second.get(key)}")
        for key in ("attack", "settings", "version", "norm", "eps", "batch_size", "seed"):
            if first.get(key) != second.get(key):
                print(f"WARNING: {key} differs: {first.get(key)} and {second.get(key)}")
        for name, found in (("A", first), ("B", second)):
            for warning in found["warnings"] if isinstance(found.get("warnings"), list) else []:
                print(f"WARNING ({name}): {warning}")
    print(f"A: {path_a}\nB: {path_b}\n{len(a['label'])} images")
    rows = {"clean_correct": "clean", "robust": "robust"}
    for key, name in list(rows.items())[: 2 if len(a["attacks"]) and len(b["attacks"]) else 1]:
        only_a, only_b = int((a[key] & ~b[key]).sum()), int((b[key] & ~a[key]).sum())
        both, neither = int((a[key] & b[key]).sum()), int((~a[key] & ~b[key]).sum())
        difference, (low, high) = paired_difference(both, only_a, only_b, neither)
        counts = f"both {both}, A alone {only_a}, B alone {only_b}, neither {neither}"
        print(f"{name:<7} A {a[key].mean():.2%}  B {b[key].mean():.2%}  ({counts})")
        print(f"        A - B {100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}; ", end="")
        print(f"McNemar's exact test p = {mcnemar(only_a, only_b):.3g}")


def curve_png(results, trained, path):
    """Robust accuracy against the radius, with Wilson's intervals, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = sorted(results, key=lambda r: r["eps"])
    eps, robust = [r["eps"] for r in results], np.array([100 * r["robust"] for r in results])
    low, high = (np.array([100 * r["robust_interval"][i] for r in results]) for i in (0, 1))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.errorbar(eps, robust, [robust - low, high - robust], color="#0072B2", marker="o", capsize=3, label=results[0]["attack_name"])
    axis.axhline(100 * results[0]["clean"], color="black", linestyle=":", label="clean")
    if trained[0] == results[0]["norm"]:
        axis.axvline(trained[1], color="#D55E00", linestyle="--", label="radius of the training")
    axis.set(xlabel=f"{results[0]['norm']} radius, of x in [0, 1]", ylabel="accuracy, % (bars: 95 % intervals)")
    axis.set(xlim=(0, None), ylim=(0, 101))
    axis.set_title(f"{results[0]['dataset']}, {results[0]['n']} test images")
    axis.grid(alpha=0.3)
    axis.legend()
    with checkpoint.atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    print(path)
