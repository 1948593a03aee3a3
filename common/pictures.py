"""The pictures of analyze.py (one PNG per analysis, and analysis.png with all of them but the embedding) and of probes."""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

from common import checkpoint  # noqa: E402
from common.representations import interval  # noqa: E402

# Okabe and Ito's palette, safe for the colour-blind; lines differ by their dashes, too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2, 2, 2)))
MARKERS = "osD^vP*Xp"


def draw(result, out_dir):
    """Write all pictures of the `result` of analyze.py and print their names."""
    kinds = enumerate(result["models"])
    styles = {name: dict(color=COLOURS[i % 8], linestyle=DASHES[(i + i // 8) % 8], marker=MARKERS[i % 9]) for i, name in kinds}
    panels = {
        **{"rank": rank, "spread": spread, "frequencies": frequencies, "sparseness": sparseness},
        **{"dimension": dimension, "margin": margin, "distance": distance, "similarity": similarity},
    }
    for name, panel in panels.items():
        figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
        panel(axis, result, styles)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        save(figure, os.path.join(out_dir, f"{name}.png"))
    figure, axes = plt.subplots(4, 2, figsize=(12.5, 18), layout="constrained")
    for axis, panel in zip(axes.flat, panels.values()):
        panel(axis, result, styles)
    legend(figure, result, styles)
    save(figure, os.path.join(out_dir, "analysis.png"))
    embedding(result, os.path.join(out_dir, "embedding.png"))


def save(figure, path):
    with checkpoint.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    print(path)


def curves(axis, result, styles, key, x_of):
    """One line per name, the mean over its models; a band between the extremes where there are several."""
    for name, rows in result["models"].items():
        lines = np.array([row[key] for row in rows])
        x = x_of(lines.shape[1])
        axis.plot(x, lines.mean(0), label=name, **styles[name] | {"marker": None})
        if len(rows) > 1:
            axis.fill_between(x, lines.min(0), lines.max(0), color=styles[name]["color"], alpha=0.15, linewidth=0)


def bars(axis, result, styles, key):
    """One bar per name, with its interval."""
    found = {name: interval(rows, key) for name, rows in result["models"].items()}
    for i, (name, (value, low, high)) in enumerate(found.items()):
        axis.bar(i, value, color=styles[name]["color"], alpha=0.8)
        axis.errorbar(i, value, [[value - low], [high - value]], color="black", capsize=4)
    axis.set_xticks(range(len(found)), found, rotation=20, ha="right", fontsize=8)


def rank(axis, result, styles):
    curves(axis, result, styles, "singular_values", lambda n: np.arange(1, n + 1))
    axis.set(xlabel="number of the singular value", ylabel="size, of the largest (log scale)", yscale="log")
    axis.set_ylim(max(axis.get_ylim()[0], 1e-4), 1.2)
    axis.set_title("Spectrum of the features: a slow fall is a high rank", fontsize=10)
    axis.grid(alpha=0.3)


def crosses(axis, result, styles, key_x, key_y):
    """One point per name, with its intervals."""
    for name, rows in result["models"].items():
        (x, *x_range), (y, *y_range) = interval(rows, key_x), interval(rows, key_y)
        lengths = [[[v - low], [high - v]] for v, (low, high) in ((x, x_range), (y, y_range))]
        axis.errorbar(x, y, lengths[1], lengths[0], capsize=3, label=name, **styles[name] | {"linestyle": "none"})
    axis.grid(alpha=0.3)


def plain_ticks(of):
    """1, 2, 5, 10, ... as they are on a logarithmic axis."""
    of.set_major_locator(LogLocator(subs=(1, 2, 5)))
    of.set_major_formatter("{x:g}")
    of.set_minor_formatter(NullFormatter())


def spread(axis, result, styles):
    crosses(axis, result, styles, "alignment", "uniformity")
    axis.set(xlabel="alignment: squared distance of clean and adversarial features (log scale)", ylabel="uniformity", xscale="log")
    plain_ticks(axis.xaxis)
    axis.set_title("Left: closer under attack; down: more spread on the sphere", fontsize=10)


def margin(axis, result, styles):
    crosses(axis, result, styles, "margin", "gradient")
    axis.set(
        xlabel="margin of the logits", ylabel=f"length of its gradient, dual to {result['settings']['norm']} (log scale)", yscale="log"
    )
    plain_ticks(axis.yaxis)
    axis.set_title("Margin and its gradient, means over test images", fontsize=10)


def frequencies(axis, result, styles):
    curves(axis, result, styles, "saliency", lambda n: np.arange(n) / result["settings"]["image_size"])
    axis.axvline(0.25, color="grey", linewidth=1, linestyle=":")
    axis.set(
        xlabel="frequency, cycles per pixel (dotted: above are the high ones)",
        ylabel="mean magnitude at this radius, summing to 1",
        ylim=(0, None),
    )
    axis.set_title("Frequencies of the margin's gradient", fontsize=10)
    axis.grid(alpha=0.3)


def sparseness(axis, result, styles):
    bars(axis, result, styles, "sae")
    settings = result["settings"]
    axis.set_ylabel("error / variance of the test features")
    axis.set_title(
        f"Sparse autoencoder, {settings['sae_k']} of {settings['sae_latents']} latents: what they leave unexplained", fontsize=10
    )


def dimension(axis, result, styles):
    curves(axis, result, styles, "dimension_curve", np.arange)
    for name, rows in result["models"].items():
        axis.axvline(interval(rows, "dimension")[0], color=styles[name]["color"], linewidth=0.8, linestyle=styles[name]["linestyle"])
    axis.set(xlabel="principal components kept (vertical lines: 99 % of the accuracy)", ylabel="accuracy of the last layer", ylim=(0, 1.02))
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, None)
    axis.set_title("Classification dimension", fontsize=10)
    axis.grid(alpha=0.3)


def distance(axis, result, styles):
    bars(axis, result, styles, "distance")
    eps, norm = result["settings"]["eps"], result["settings"]["norm"]
    axis.axhline(eps, color="grey", linestyle=":")
    axis.set_ylabel(f"margin / length of its gradient, {norm}")
    axis.set_title(f"First-order distance to the boundary (dotted: radius, {eps:.3g})", fontsize=10)


def similarity(axis, result, styles):
    names, kinds = result["cka"]["names"], list(result["models"])
    mean, half = (_by_kind(np.array(result["cka"][key]), names, kinds) for key in ("matrix", "half_interval"))
    axis.imshow(mean, vmin=0, vmax=1, cmap="cividis")
    for i, j in np.argwhere(~np.isnan(mean)):
        colour = "white" if mean[i, j] < 0.6 else "black"
        axis.text(j, i, f"{mean[i, j]:.2f}\n±{half[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right", fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_title("Linear CKA of different models, 95 % over images", fontsize=10)


def _by_kind(matrix, names, kinds):
    """Mean over the pairs of different models of two kinds; NaN where there is none."""
    names, different = np.array(names), ~np.eye(len(names), dtype=bool)
    masks = [[different & (names[:, None] == a) & (names == b) for b in kinds] for a in kinds]
    return np.array([[matrix[mask].mean() if mask.any() else np.nan for mask in row] for row in masks])


def caption(result):
    """What the numbers of a result are of, in one sentence."""
    rows, settings = next(iter(result["models"].values())), result["settings"]
    attack = f"{settings['norm']} {settings['eps']:.3g}, PGD-20, first {settings['n_attacked']}"
    return f"{settings['dataset']}, {rows[0]['n']} test images; attack: {attack}; intervals: 95 %, over models where there are several"


def legend(figure, result, styles):
    handles = [plt.Line2D([], [], linewidth=3, markersize=8, **style) for style in styles.values()]
    labels = [
        f"{name}: {len(rows)} model{'s' * (len(rows) > 1)}, {rows[0]['dim']} features, RankMe {interval(rows, 'rank_me')[0]:.1f}"
        for name, rows in result["models"].items()
    ]
    text = f"{caption(result)}; bands: extremes"
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=12, title=text, title_fontsize=12, frameon=False)


def heat_maps(result, path):
    """Accuracy of probes, block by noise level: one map per entry of result["titles"]."""
    figure, axes = plt.subplots(
        1,
        len(result["titles"]),
        figsize=(1 + 5 * len(result["titles"]), 1.5 + 0.4 * len(result["blocks"])),
        layout="constrained",
        squeeze=False,
    )
    for axis, (key, title) in zip(axes[0], result["titles"].items()):
        values = 100 * np.array(result[key])
        axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if value < 60 else "black")
        axis.set_xticks(range(len(result["sigmas"])), [f"{sigma:g}" for sigma in result["sigmas"]])
        axis.set_yticks(range(len(result["blocks"])), result["blocks"] if key == "accuracy" else [""] * len(result["blocks"]), fontsize=8)
        axis.set_xlabel("noise level sigma")
        axis.set_title(f"{title}, %", fontsize=9)
    save(figure, path)


def embedding(result, path):
    """Penultimate features of the first model of each name in two dimensions: clean, adversarial, and those that are fooled."""
    kinds = list(result["models"].items())
    columns = min(3, len(kinds))
    bands = -(-len(kinds) // columns)  # of two rows, PCA above t-SNE
    figure, axes = plt.subplots(2 * bands, columns, figsize=(4.2 * columns, 8 * bands), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, (name, rows) in enumerate(kinds):
        found = rows[0]["embedding"]
        label, fooled = np.array(found["label"]), np.array(found["fooled"])
        for row, (key, title) in enumerate((("pca", "PCA"), ("tsne", "t-SNE"))):
            axis, points = axes[2 * (place // columns) + row, place % columns], np.array(found[key])
            clean, adversarial = points[: len(label)], points[len(label) :]
            axis.scatter(*clean.T, c="#0072B2", s=12, alpha=0.5, linewidth=0, label="clean")
            axis.scatter(*adversarial[~fooled].T, c="#E69F00", s=12, alpha=0.6, linewidth=0, label="adversarial")
            axis.scatter(*adversarial[fooled].T, c="black", s=26, marker="x", linewidth=1, label="adversarial, fooled")
            for k in np.unique(label) if len(np.unique(label)) <= 20 else []:
                axis.text(*np.median(clean[label == k], axis=0), str(k), fontsize=15, weight="bold", ha="center", va="center")
            axis.axis("on")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {title}: {fooled.mean():.0%} fooled", fontsize=13)
    axes[0, 0].legend(fontsize=10, loc="best")
    settings = result["settings"]
    attack = f"{settings['norm']} {settings['eps']:.3g}, PGD-20"
    figure.supxlabel(f"First model of each name, {len(label)} test images; attack: {attack}; digits: median of a class", fontsize=12)
    save(figure, path)
