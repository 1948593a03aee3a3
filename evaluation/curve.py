"""A picture of one model's robust accuracy at several radii.

The results that it shows are made in evaluation/verdicts.py.
"""

import numpy as np

from common import files


def write_curve(results, trained, path):
    """Write robust accuracy against the radius, with Wilson's intervals, as a PNG.

    results: dicts of evaluation/verdicts.py, one per radius. trained: the (norm, eps) of the
    model's training, or None.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = sorted(results, key=lambda result: result["eps"])
    first = results[0]
    eps = [result["eps"] for result in results]
    robust = np.array([100 * result["robust"] for result in results])
    low = np.array([100 * result["robust_interval"][0] for result in results])
    high = np.array([100 * result["robust_interval"][1] for result in results])

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    bars = [robust - low, high - robust]
    style = {"color": "#0072B2", "marker": "o", "capsize": 3}
    axis.errorbar(eps, robust, bars, label=first["attack_name"], **style)
    axis.axhline(100 * first["clean"], color="black", linestyle=":", label="clean")
    if trained is not None and trained[0] == first["norm"]:
        style = {"color": "#D55E00", "linestyle": "--"}
        axis.axvline(trained[1], label="radius of the training", **style)
    axis.set_xlabel(f"{first['norm']} radius, of x in [0, 1]")
    axis.set_ylabel("accuracy, % (bars: 95 % intervals)")
    axis.set_xlim(0, None)
    axis.set_ylim(0, 101)
    axis.set_title(f"{first['dataset']}, {first['n']} test images")
    axis.grid(alpha=0.3)
    axis.legend()
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
