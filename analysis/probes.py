"""The tables of linear probes over block and noise level (extract_features.py --probe)."""

import os

import numpy as np

from analysis import pictures
from common import files, run
from common.cli import threat


def report(probes, blocks, sigmas, *, split, precision, eps, out_dir):
    """Print accuracies, block by sigma, and write probe.json and probe.png.

    probes: {(block, sigma): {"accuracy": share, "correct": (N,)[, "attacked": (M,)]}}. split,
    precision: of the probed images, and of the network. eps: of the attack, None without one.
    """
    first = probes[blocks[0], sigmas[0]]
    n = len(first["correct"])
    titles = {"accuracy": f"linear probe, accuracy on {n} {split} images"}
    if eps:
        n_attacked = len(first["attacked"])
        titles["attacked"] = (
            f"the same under attack, {threat('linf', eps)}, first {n_attacked} images"
        )
    width = max(len(block) for block in blocks)
    tables = {}
    for key, title in titles.items():
        print(f"{title} (rows: block, columns: sigma)")
        print(" " * width + "".join(f"{sigma:>8g}" for sigma in sigmas))
        tables[key] = []
        for block in blocks:
            row = [float(np.mean(probes[block, sigma][key])) for sigma in sigmas]
            tables[key].append(row)
            print(f"{block:<{width}}" + "".join(f"{accuracy:8.1%}" for accuracy in row), flush=True)
    result = {
        "blocks": blocks,
        "sigmas": sigmas,
        "split": split,
        "n": n,
        "precision": precision,
        **tables,
        "titles": titles,
        "environment": run.environment(),
    }
    files.write_json(result, os.path.join(out_dir, "probe.json"))
    pictures.heat_maps(result, os.path.join(out_dir, "probe.png"))
