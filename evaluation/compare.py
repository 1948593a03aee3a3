"""Two models on the same images: McNemar's test, and what two results of evaluate.py differ in.

Intervals are in common/stats.py.
"""

import os

import numpy as np
from scipy.stats import binomtest

from common import UserError, files
from common.cli import printable
from common.stats import paired_difference

PER_IMAGE = "a per-image file of evaluate.py"
LARGEST = 1 << 28  # bytes of a per-image file when unpacked
KINDS = {  # of NumPy dtypes: i and u are whole numbers, b is bool
    "index": "iu",
    "label": "iu",
    "clean_correct": "b",
    "robust": "b",
    "fooled_by": "iu",
}


def mcnemar(only_a, only_b):
    """p of McNemar's exact test on the images that one of two models alone gets right.

    The hypothesis: they are split evenly between the two. Arguments: numbers of images.
    """
    n = only_a + only_b
    return float(binomtest(only_a, n).pvalue) if n else 1.0


def read_verdicts(path):
    """A per-image file as a dict of arrays.

    index, label (int), clean_correct, robust (bool) and fooled_by (int) have one entry per image;
    attacks holds the attacks' names. Raises UserError where the file is missing or not such a file.
    """
    with files.reading(path, PER_IMAGE), open(path, "rb") as file:
        with np.load(file, allow_pickle=False) as archive:
            if sum(info.file_size for info in archive.zip.infolist()) > LARGEST:
                raise ValueError("too large when unpacked")
            verdicts = {name: np.asarray(archive[name]) for name in (*KINDS, "attacks")}
    if not _fits(verdicts):
        raise UserError(f"{path}: its arrays are not those of {PER_IMAGE}")
    return verdicts


def _fits(verdicts):
    n = verdicts["label"].size
    for name, kinds in KINDS.items():
        if verdicts[name].shape != (n,) or verdicts[name].dtype.kind not in kinds:
            return False
    if n == 0 or verdicts["attacks"].ndim != 1:
        return False
    fooled_by = verdicts["fooled_by"]
    n_attacks = len(verdicts["attacks"])
    agree = np.array_equal(verdicts["clean_correct"], fooled_by >= 0)
    agree = agree and np.array_equal(verdicts["robust"], fooled_by == n_attacks)
    return agree and fooled_by.min() >= -1 and fooled_by.max() <= n_attacks


def compare(path_a, path_b):
    """Print two results on the same images side by side. Raises UserError where images differ.

    Four counts of images, the paired difference with its interval, and McNemar's test.
    path_a, path_b: of .npz files, also hub:OWNER/NAME/FILE.npz.
    """
    local_a = local_verdicts(path_a)
    local_b = local_verdicts(path_b)
    a = read_verdicts(local_a)
    b = read_verdicts(local_b)
    for name in ("index", "label"):
        if not np.array_equal(a[name], b[name]):
            raise UserError(f"{path_a} and {path_b}: not the same images")
    _compare_results(local_a, local_b)

    print(f"A: {path_a}")
    print(f"B: {path_b}")
    print(f"{len(a['label'])} images")
    _print_pair("clean", a["clean_correct"], b["clean_correct"])
    if len(a["attacks"]) and len(b["attacks"]):
        _print_pair("robust", a["robust"], b["robust"])


def local_verdicts(path):
    """The path of a file of verdicts, .npz. hub:OWNER/NAME/FILE is fetched, with its result.

    Raises UserError where the hub has no such file, or where the file is damaged (check_sum).
    """
    if path.startswith("hub:"):
        owner, _, rest = path.removeprefix("hub:").partition("/")
        name, _, file = rest.partition("/")
        if not file:
            raise UserError(f"{path}: expected hub:OWNER/NAME/FILE.npz, one of its results")
        folder = files.from_hub(f"hub:{owner}/{name}", ["*.json", "*.npz"])
        local = os.path.join(folder, file)
        if not os.path.exists(local):
            there = sorted(other for other in os.listdir(folder) if other.endswith(".npz"))
            listed = ", ".join(there) or "none"
            raise UserError(f"{path}: no such file; its .npz files are {listed[:200]}")
        path = local
    files.check_sum(path)
    return path


def _compare_results(path_a, path_b):
    """Warn where the results beside two per-image files, if they are there, differ in a setting."""
    result_paths = [os.path.splitext(path)[0] + ".json" for path in (path_a, path_b)]
    if not all(os.path.exists(path) for path in result_paths):
        print("note: without the .json beside both files attack and radius are not compared")
        return
    for path in result_paths:
        files.check_sum(path)
    a, b = [files.read_json(path) for path in result_paths]
    for key in ("dataset", "image_list_sha256"):
        if a.get(key) != b.get(key):
            difference = f"{key} is {a.get(key)} and {b.get(key)}"
            raise UserError(f"{path_a} and {path_b}: not the same images, {difference}")
    settings = ("data_sha256", "attack", "settings", "version", "norm", "eps")
    settings += ("transfer_sha256", "precision", "batch_size", "seed")
    for key in settings:
        if a.get(key) != b.get(key):
            print(printable(f"WARNING: {key} differs: {a.get(key)} and {b.get(key)}"))
    for name, result in (("A", a), ("B", b)):
        warnings = result.get("warnings")
        if isinstance(warnings, list):
            for warning in warnings:
                print(printable(f"WARNING ({name}): {warning}"))


def _print_pair(name, a, b):
    """Compare the verdicts (n,) bool of two models."""
    both = int((a & b).sum())
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    neither = int((~a & ~b).sum())
    difference, (low, high) = paired_difference(both, only_a, only_b, neither)
    counts = f"both {both}, A alone {only_a}, B alone {only_b}, neither {neither}"
    interval = f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    p = f"McNemar's exact test p = {mcnemar(only_a, only_b):.3g}"
    print(f"{name:<7} A {a.mean():.2%}  B {b.mean():.2%}  ({counts})")
    print(f"        A - B {100 * difference:+.2f} points, {interval}; {p}")
