"""The pictures of analyze.py and of the probes of extract_features.py.

What the numbers mean stands in analysis/metrics.py.
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.metrics import interval
from common import files
from common.cli import threat

# Okabe and Ito's palette, safe for the colour-blind; lines differ by their dashes, too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
DASHES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 1)),
    (0, (8, 2, 2, 2)),
)
MARKERS = "osD^vP*Xp"


def draw(result, out_dir):
    """Write one PNG per analysis, and analysis.png with all of them but the embedding.

    result: the content of analysis.json. Prints the names of the files.
    """
    styles = {}
    for i, name in enumerate(result["models"]):
        styles[name] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
    panels = (rank, spread, frequencies, sparseness, dimension, margin, distance, similarity)
    for panel in panels:
        figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
        panel(axis, result, styles)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        save(figure, os.path.join(out_dir, f"{panel.__name__}.png"))
    figure, axes = plt.subplots(4, 2, figsize=(12.5, 18), layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        panel(axis, result, styles)
    legend(figure, result, styles)
    save(figure, os.path.join(out_dir, "analysis.png"))
    embedding(result, os.path.join(out_dir, "embedding.png"))


def save(figure, path):
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    print(path)


def caption(result):
    """One sentence on what the numbers are of."""
    first_rows = next(iter(result["models"].values()))
    images = f"{result['settings']['dataset']}, {first_rows[0]['n']} test images"
    n_attacked = min(first_rows[0]["n"], result["settings"]["n_attacked"])
    attack = f"{attack_name(result)}, first {n_attacked}"
    intervals = "intervals: 95 %, over models where there are several"
    return f"{images}; attack: {attack}; {intervals}"


def attack_name(result):
    settings = result["settings"]
    return f"{threat(settings['norm'], settings['eps'])}, PGD-20"


def legend(figure, result, styles):
    handles = []
    labels = []
    for name, rows in result["models"].items():
        models = "1 model" if len(rows) == 1 else f"{len(rows)} models"
        rank_me, *_ = interval(rows, "rank_me")
        labels.append(f"{name}: {models}, {rows[0]['dim']} features, RankMe {rank_me:.1f}")
        handles.append(plt.Line2D([], [], linewidth=3, markersize=8, **styles[name]))
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=2,
        fontsize=12,
        title=f"{caption(result)}; bands: extremes",
        title_fontsize=12,
        frameon=False,
    )


# --------------------------------------------------------------------------------- kinds of panel


def curves(axis, result, styles, key, x_of):
    """A line per name, the mean over its models; a band between the extremes of several models.

    x_of: function from the number of points to their x.
    """
    for name, rows in result["models"].items():
        lines = np.array([row[key] for row in rows])
        x = x_of(lines.shape[1])
        style = {**styles[name], "marker": None}
        axis.plot(x, lines.mean(0), label=name, **style)
        if len(rows) > 1:
            low, high = lines.min(0), lines.max(0)
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def bars(axis, result, styles, key):
    """A bar per name, with its interval."""
    for i, (name, rows) in enumerate(result["models"].items()):
        value, low, high = interval(rows, key)
        axis.bar(i, value, color=styles[name]["color"], alpha=0.8)
        axis.errorbar(i, value, [[value - low], [high - value]], color="black", capsize=4)
    name_ticks(axis, list(result["models"]))


def crosses(axis, result, styles, key_x, key_y):
    """A point per name, with its intervals."""
    for name, rows in result["models"].items():
        x, x_low, x_high = interval(rows, key_x)
        y, y_low, y_high = interval(rows, key_y)
        x_lengths = [[x - x_low], [x_high - x]]
        y_lengths = [[y - y_low], [y_high - y]]
        style = {**styles[name], "linestyle": "none"}
        axis.errorbar(x, y, y_lengths, x_lengths, capsize=3, label=name, **style)
    axis.grid(alpha=0.3)


def name_ticks(axis, names):
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)


def plain_ticks(axis):
    """1, 2, 5, 10, ... written out on a logarithmic x or y axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def write_cell(axis, i, j, text, is_dark, fontsize):
    """Write a text into row i, column j of a heat map."""
    colour = "white" if is_dark else "black"
    axis.text(j, i, text, ha="center", va="center", fontsize=fontsize, color=colour)


# ----------------------------------------------------------------------------------------- panels


def rank(axis, result, styles):
    curves(axis, result, styles, "singular_values", lambda n: np.arange(1, n + 1))
    axis.set_xlabel("number of the singular value")
    axis.set_ylabel("size, of the largest (log scale)")
    axis.set_yscale("log")
    axis.set_ylim(max(axis.get_ylim()[0], 1e-4), 1.2)
    axis.set_title("Spectrum of the features: a slow fall is a high rank", fontsize=10)
    axis.grid(alpha=0.3)


def spread(axis, result, styles):
    crosses(axis, result, styles, "alignment", "uniformity")
    axis.set_xlabel("alignment: squared distance of clean and adversarial features (log scale)")
    axis.set_ylabel("uniformity")
    axis.set_xscale("log")
    plain_ticks(axis.xaxis)
    axis.set_title("Left: closer under attack; down: more spread on the sphere", fontsize=10)


def frequencies(axis, result, styles):
    size = result["settings"]["image_size"]
    curves(axis, result, styles, "saliency", lambda n: np.arange(n) / size)
    axis.axvline(0.25, color="grey", linewidth=1, linestyle=":")
    axis.set_xlabel("frequency, cycles per pixel (dotted: above are the high ones)")
    axis.set_ylabel("mean magnitude at this radius, summing to 1")
    axis.set_ylim(0, None)
    axis.set_title("Frequencies of the margin's gradient", fontsize=10)
    axis.grid(alpha=0.3)


def sparseness(axis, result, styles):
    bars(axis, result, styles, "sae")
    axis.set_ylabel("error / variance of the test features")
    latents = f"{result['settings']['sae_k']} of {result['settings']['sae_latents']} latents"
    axis.set_title(f"Sparse autoencoder, {latents}: what they leave unexplained", fontsize=10)


def dimension(axis, result, styles):
    curves(axis, result, styles, "dimension_curve", np.arange)
    for name, rows in result["models"].items():
        style = {**styles[name], "marker": None}
        axis.axvline(interval(rows, "dimension")[0], linewidth=0.8, **style)
    axis.set_xlabel("principal components kept (vertical lines: 99 % of the accuracy)")
    axis.set_ylabel("accuracy of the last layer")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, None)
    axis.set_ylim(0, 1.02)
    axis.set_title("Classification dimension", fontsize=10)
    axis.grid(alpha=0.3)


def margin(axis, result, styles):
    crosses(axis, result, styles, "margin", "gradient")
    axis.set_xlabel("margin of the logits")
    axis.set_ylabel(f"length of its gradient, dual to {result['settings']['norm']} (log scale)")
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.set_title("Margin and its gradient, means over test images", fontsize=10)


def distance(axis, result, styles):
    bars(axis, result, styles, "distance")
    norm, eps = result["settings"]["norm"], result["settings"]["eps"]
    axis.axhline(eps, color="grey", linestyle=":")
    axis.set_ylabel(f"margin / length of its gradient, {norm}")
    title = f"First-order distance to the boundary (dotted: {threat(norm, eps)})"
    axis.set_title(title, fontsize=10)


def similarity(axis, result, styles):
    cka = result["cka"]
    names = list(result["models"])
    mean = mean_by_name(np.array(cka["matrix"]), cka["names"], names)
    half = mean_by_name(np.array(cka["half_interval"]), cka["names"], names)
    axis.imshow(mean, vmin=0, vmax=1, cmap="cividis")
    for i, j in np.argwhere(~np.isnan(mean)):
        text = f"{mean[i, j]:.2f}\n±{half[i, j]:.2f}"
        write_cell(axis, i, j, text, mean[i, j] < 0.6, fontsize=8)
    name_ticks(axis, names)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("Linear CKA of different models, 95 % over images", fontsize=10)


def mean_by_name(matrix, model_names, names):
    """Means of a matrix over the pairs of different models of two names; NaN without a pair.

    matrix: a row and a column per model. model_names: the name of each.
    """
    model_names = np.array(model_names)
    different = ~np.eye(len(model_names), dtype=bool)
    means = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            pairs = different & (model_names[:, None] == a) & (model_names == b)
            if pairs.any():
                means[i, j] = matrix[pairs].mean()
    return means


# ------------------------------------------------------------------------- pictures of their own


def embedding(result, path):
    """Features of the first model of each name in two dimensions: PCA above t-SNE."""
    models = result["models"]
    n_columns = min(3, len(models))
    n_bands = -(-len(models) // n_columns)  # of two rows of panels each
    figure, axes = plt.subplots(
        nrows=2 * n_bands,
        ncols=n_columns,
        figsize=(4.2 * n_columns, 8 * n_bands),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, (name, rows) in enumerate(models.items()):
        band, column = divmod(place, n_columns)
        points = rows[0]["embedding"]
        label = np.array(points["label"])
        fooled = np.array(points["fooled"])
        for row, (key, method) in enumerate((("pca", "PCA"), ("tsne", "t-SNE"))):
            axis = axes[2 * band + row, column]
            classes = result["settings"].get("classes")
            scatter(axis, np.array(points[key]), label, fooled, classes)
            axis.set_title(f"{name}, {method}: {fooled.mean():.0%} fooled", fontsize=13)
    axes[0, 0].legend(fontsize=10, loc="best")
    images = f"First model of each name, {len(label)} test images"
    text = f"{images}; attack: {attack_name(result)}; name: median of a class"
    figure.supxlabel(text, fontsize=12)
    save(figure, path)


def scatter(axis, points, label, fooled, names):
    """Clean images, adversarial ones, and those of them that are fooled.

    points: (2 N, 2), the clean ones first. label, fooled: (N,). names: of the classes; without
    them, their numbers stand in the picture.
    """
    clean = points[: len(label)]
    adversarial = points[len(label) :]
    dot = {"linewidth": 0, "s": 12}
    cross = {"linewidth": 1, "s": 26, "marker": "x"}
    withstood = adversarial[~fooled]
    axis.scatter(*clean.T, c="#0072B2", alpha=0.5, label="clean", **dot)
    axis.scatter(*withstood.T, c="#E69F00", alpha=0.6, label="adversarial", **dot)
    axis.scatter(*adversarial[fooled].T, c="black", label="adversarial, fooled", **cross)
    classes = np.unique(label)
    if len(classes) <= 20:
        centred = {"ha": "center", "va": "center"}
        for k in classes:
            x, y = np.median(clean[label == k], axis=0)
            name = names[k] if names else str(k)
            axis.text(x, y, name, fontsize=15, weight="bold", parse_math=False, **centred)
    axis.axis("on")
    axis.set(xticks=[], yticks=[])


def heat_maps(result, path):
    """Accuracies of probes, block by noise level, a map per entry of result["titles"].

    result: the content of probe.json.
    """
    titles = result["titles"]
    blocks = result["blocks"]
    figure, axes = plt.subplots(
        ncols=len(titles),
        figsize=(1 + 5 * len(titles), 1.5 + 0.4 * len(blocks)),
        layout="constrained",
        squeeze=False,
    )
    for column, (key, title) in enumerate(titles.items()):
        axis = axes[0, column]
        percent = 100 * np.array(result[key])
        axis.imshow(percent, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(percent):
            write_cell(axis, i, j, f"{value:.1f}", value < 60, fontsize=9)
        axis.set_xticks(range(len(result["sigmas"])), [f"{sigma:g}" for sigma in result["sigmas"]])
        axis.set_xlabel("noise level sigma")
        names = blocks if column == 0 else [""] * len(blocks)
        axis.set_yticks(range(len(blocks)), names, fontsize=8)
        axis.set_title(f"{title}, %", fontsize=9)
    save(figure, path)
