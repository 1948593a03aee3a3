"""Accuracies and effects over seeds and test images, from rows of docs/results.json.

A cell is a dict {seed: row}. There are two 95 % intervals. The one over seeds is Student's, of one
value per seed, and holds for these test images. The one over seeds and images takes both as random
samples, crossed, since all seeds meet the same images; it holds for other images of their kind. The
difference of two cells is taken seed by seed and image by image. Cells of one seed have the same
initial weights and the same random streams; cells that differ in DRA alone have the same batches,
crops and attack starts too. All seeds share the split, the diffusion model and its images: no
interval covers their chance.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t

from common import files, stats

MEASURES = {
    "held_out": "held out, PGD",
    "last": "the same, last step",
    "clean": "clean",
    "two_attacks": "APGD-CE+T",
    "autoattack": "AutoAttack",
}
HELD_OUT = ("held_out", "last")  # measured in training; the others on test images
LEAST_VERDICT = {"clean": 1, "two_attacks": 3, "autoattack": 5}  # that counts as right


def has(run, measure):
    """Whether a run was measured so."""
    if measure in HELD_OUT:
        return True
    if "verdicts" not in run:
        return False
    return measure != "autoattack" or run["attack"] == "autoattack"


def shared_seeds(cells, measure):
    """The seeds, ascending, for which each of the cells {seed: run} has the measure."""
    measured = [{seed for seed, run in cell.items() if has(run, measure)} for cell in cells]
    return sorted(set.intersection(*measured))


def outcomes(cell, seeds, measure):
    """Accuracies of a cell in %, an array (seeds, images): 100 where best.pt is right, else 0.

    Of held-out images only their mean is kept: (seeds, 1).
    """
    rows = []
    for seed in seeds:
        run = cell[seed]
        if measure in HELD_OUT:
            course = [100 * robust_acc for _, _, robust_acc in run["held_out"]]
            rows.append([max(course) if measure == "held_out" else course[-1]])
        else:
            right = [int(verdict) >= LEAST_VERDICT[measure] for verdict in run["verdicts"]]
            rows.append([100.0 * value for value in right])
    return np.array(rows)


def accuracies(cells, cell, measure):
    """The `outcomes` of all seeds that a cell has; (0, 1) where there is none."""
    seeds = shared_seeds([cells.get(cell, {})], measure)
    return outcomes(cells[cell], seeds, measure) if seeds else np.zeros((0, 1))


def effect(cells, pairs, measure):
    """The mean of A - B over pairs of cells (A, B), in points: an array (seeds, images).

    It is of the seeds that all these cells have; (0, 1) where there is none.
    """
    used = [cells.get(name, {}) for pair in pairs for name in pair]
    seeds = shared_seeds(used, measure)
    if not seeds:
        return np.zeros((0, 1))
    pair_differences = []
    for a, b in pairs:
        difference = outcomes(cells[a], seeds, measure) - outcomes(cells[b], seeds, measure)
        pair_differences.append(difference)
    return np.mean(pair_differences, 0)


def over_seeds_and_images(values):
    """Half the width of a 95 % interval of the mean of (seeds, images), both random.

    The variance is that of a two-way layout, from mean squares, where a negative component counts
    as 0; the degrees of freedom are Satterthwaite's.
    """
    n_seeds, n_images = values.shape
    seed_means = values.mean(1, keepdims=True)
    image_means = values.mean(0, keepdims=True)
    residuals = values - seed_means - image_means + values.mean()
    rest_freedom = (n_seeds - 1) * (n_images - 1)
    rest = (residuals**2).sum() / rest_freedom
    seeds = max(n_images * seed_means.var(ddof=1), rest)
    images = max(n_seeds * image_means.var(ddof=1), rest)
    total = seeds + images - rest
    if total == 0:
        return 0.0
    freedom = total**2 / (
        seeds**2 / (n_seeds - 1) + images**2 / (n_images - 1) + rest**2 / rest_freedom
    )
    return t.ppf(0.975, freedom) * (total / values.size) ** 0.5


def show(values, sign=""):
    """The mean ± half its interval over seeds; in brackets, over seeds and images.

    The second is raised to the first where it is smaller. values: (seeds, images). sign: "+" for
    effects.
    """
    if len(values) == 0:
        return "-"
    if len(values) == 1:
        return f"{values.mean():{sign}.1f}"
    mean, low, _ = stats.t_interval(values.mean(1))
    half = mean - low
    text = f"{mean:{sign}.1f} ± {half:.1f}"
    if values.shape[1] > 1:
        text += f" ({max(over_seeds_and_images(values), half):.1f})"
    return text


def markdown(titles, rows):
    """The lines of a table, and an empty one."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [*lines, ""]


def n_seeds(samples):
    """The number of seeds: "10", or "10 or 3" where some measures were taken on fewer of them."""
    counts = {len(values) for values in samples}
    return " or ".join(map(str, sorted(counts, reverse=True)))


def save_figure(figure, axes, path):
    """Write a figure, with a grid behind its axes."""
    for axis in axes:
        axis.grid(alpha=0.3)
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
