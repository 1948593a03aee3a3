"""The quickstart's table (table.json) and picture (report.png), of one seed of four runs.

    python -m runs.report --runs out/quickstart --synthetic out/synthetic-digits

Everything is read from the files that training and evaluation left. The tables of many seeds are
made by runs/results.py.
"""

import itertools
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from common import UserError, attacks, cli, data, files
from evaluation import compare
from published.datasets import DATASETS
from published.synthetic_set import open_shards
from published.weights import load_classifier

ROWS = {"at": "AT", "at_dra": "AT+DRA", "dm_at": "DM-AT", "dm_at_dra": "DM-AT+DRA"}
COLOURS = {  # Okabe and Ito's palette, safe for the colour-blind
    "at": "#0072B2",
    "at_dra": "#E69F00",
    "dm_at": "#009E73",
    "dm_at_dra": "#CC79A7",
}
SHOWN = {  # what the table takes from a result
    "attack",
    "attack_name",
    "batch_size",
    "checkpoint_sha256",
    "clean",
    "clean_interval",
    "eps",
    "n",
    "norm",
    "robust",
    "robust_interval",
    "warnings",
}
KEYS = SHOWN | {"environment", "seconds", "version"}
LOGGED = {"step", "loss", "clean_acc", "robust_acc", "seconds"}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--runs", default="out/quickstart", help="directory of the four runs, and of the report"
    )
    parser.add_argument(
        "--synthetic", default="out/synthetic-digits", help="the synthetic set shown"
    )
    parser.add_argument(
        "--result", default="results-best-apgd-linf-0.15.json", help="result file of each run"
    )
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------- table


def read_log(run_dir):
    """The lines of a training log, a list of dicts; at least one."""
    path = os.path.join(run_dir, "log.jsonl")
    text = files.read_text(path, "the log of a trained run")
    with files.reading(path, "a log, a JSON object in every line"):
        lines = [json.loads(line) for line in text.splitlines()]
    complete = [isinstance(line, dict) and LOGGED <= line.keys() for line in lines]
    if not lines or not all(complete):
        raise UserError(f"{path}: empty, or a line is no record of a validation")
    return lines


def table(args):
    """One dict per run: what was measured, on what, how long it took."""
    rows = []
    for run, name in ROWS.items():
        folder = os.path.join(args.runs, run)
        path = os.path.join(folder, args.result)
        result = files.read_json(path)
        settings = files.read_json(os.path.join(folder, "args.json"))
        if not KEYS <= result.keys() or result["robust"] is None:
            missing = f"lacks {sorted(KEYS - result.keys())}"
            raise UserError(f"{path}: not a result of evaluate.py with an attack ({missing})")
        train_seconds = read_log(folder)[-1]["seconds"]
        row = {
            "name": name,
            "seed": settings.get("seed"),
            "val_size": settings.get("val_size"),
            **{key: result[key] for key in sorted(SHOWN)},
            "train_seconds": train_seconds,
            "evaluate_seconds": result["seconds"],
            "seconds": train_seconds + result["seconds"],
            "versions": result["environment"] | {"attack": result["version"]},
        }
        rows.append(row)
    return rows


def print_table(rows):
    """Print accuracies with their intervals, times, and what was attacked."""
    titles = f"{'':<11}{'clean':>8}{'95 % interval':>18}{'robust':>9}{'95 % interval':>18}"
    print(f"{titles}{'training':>11}{'attack':>9}")
    for row in rows:
        clean = interval(row["clean_interval"])
        robust = interval(row["robust_interval"])
        accuracies = f"{row['clean']:>8.1%}{clean:>18}{row['robust']:>9.1%}{robust:>18}"
        times = f"{row['train_seconds']:>9.0f} s{row['evaluate_seconds']:>7.0f} s"
        print(f"{row['name']:<11}{accuracies}{times}")
    first = rows[0]
    run = f"seed {first['seed']}; torch {first['versions']['torch']}"
    print(f"n = {first['n']} test images; robust: {threat(first)}; {run}")
    for row in rows:
        for warning in row["warnings"]:
            print(f"WARNING ({row['name']}): {warning}")


def interval(limits):
    """Such as "71.0% to 77.0%"."""
    low, high = limits
    return f"{low:.1%} to {high:.1%}"


def threat(row):
    """The attack of a row, such as "APGD-CE+T, linf 0.15"."""
    return f"{row['attack_name']}, {cli.threat(row['norm'], row['eps'])}"


def print_pairs(args):
    """Print on how many images only one of two models is robust, and McNemar's exact p.

    The four rows are paired: they are of the same test images.
    """
    name = f"{os.path.splitext(args.result)[0]}.npz"
    robust = {}
    for run in ROWS:
        robust[run] = compare.read_verdicts(os.path.join(args.runs, run, name))["robust"]
    title = "robust on one model alone, and p of McNemar's exact test"
    print(f"{title} (six pairs: below 0.008 is significant at 5 %)")
    for a, b in itertools.combinations(ROWS, 2):
        only_a = int((robust[a] & ~robust[b]).sum())
        only_b = int((robust[b] & ~robust[a]).sum())
        p = compare.mcnemar(only_a, only_b)
        print(f"  {ROWS[a]:<10}{only_a:>4}   {ROWS[b]:<10}{only_b:>4}   p = {p:.2g}")


# ------------------------------------------------------------------------------------- picture


def report_png(args, rows, path):
    """Draw synthetic digits, attacked test images with predictions, and the training curves."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.4), layout="constrained")
    first = rows[0]
    robust = ", ".join(f"{row['name']} {row['robust']:.1%}" for row in rows)
    attacked = f"{threat(first)}, {first['n']} test images"
    figure.suptitle(f"Digits, seed {first['seed']}: {attacked}: {robust}", fontsize=11)
    draw_synthetic(axes[0, 0], args.synthetic)
    draw_attacked(axes[0, 1], os.path.join(args.runs, "dm_at_dra", "best.pt"))
    draw_curves(axes[1], args.runs, first["val_size"])
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)


def draw_synthetic(axis, path):
    """A column of synthetic digits per class."""
    source = open_shards(path, DATASETS["digits"])
    images, labels = source.gather(np.arange(min(1000, len(source))))
    per_class = min(12, np.bincount(labels, minlength=10).min())
    columns = [np.flatnonzero(labels == label)[:per_class] for label in range(10)]
    draw_grid(axis, images[np.stack(columns, axis=1).ravel()], 10)
    axis.set_title("Synthetic digits (columns: class 0 to 9)", fontsize=10)


def draw_grid(axis, images, n_columns):
    """Grey images, uint8 (N, H, H, 1), row by row."""
    n_rows = len(images) // n_columns
    pitch = images.shape[1] + 1  # an image and a line
    grid = np.full((n_rows * pitch + 1, n_columns * pitch + 1), 128, np.uint8)
    for i, image in enumerate(images):
        top = (i // n_columns) * pitch + 1
        left = (i % n_columns) * pitch + 1
        grid[top : top + pitch - 1, left : left + pitch - 1] = image[..., 0]
    axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.axis("off")


def draw_attacked(axis, checkpoint):
    """Twenty of the first 40 test images, attacked by PGD-40, those that fool the model first."""
    spec = DATASETS["digits"]
    model, state = load_classifier(checkpoint, spec, "cpu")
    norm = state["norm"]
    eps = state["eps"]
    images, labels = data.load_test(spec, None)
    x = data.to_x(images[:40])
    y = torch.from_numpy(labels[:40])
    start = attacks.random_start(x.shape, norm, eps, data.stream(0, "report"))
    x_adv = attacks.pgd(
        model, x, y, start, norm=norm, eps=eps, step_size=eps / 4, n_steps=40, loss="margin"
    )
    with torch.no_grad():
        predicted = model(x).argmax(1)
        predicted_adv = model(x_adv).argmax(1)
    fooled = (predicted == y) & (predicted_adv != y)
    order = torch.argsort((~fooled).int(), stable=True)[:20].tolist()
    axis.axis("off")
    for place, i in enumerate(order):
        row, column = divmod(place, 10)
        for image, prediction, height in (
            (x[i, 0], predicted[i], 0.8),
            (x_adv[i, 0], predicted_adv[i], 0.57),
        ):
            inset = axis.inset_axes([column / 10 + 0.005, height - row * 0.5, 0.09, 0.17])
            inset.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            inset.set(xticks=[], yticks=[])
            colour = "black" if prediction == y[i] else "red"
            inset.set_xlabel(str(prediction.item()), color=colour, labelpad=1, fontsize=9)
    attack = f"({cli.threat(norm, eps)}, PGD-40)"
    title = f"DM-AT+DRA: test images above, their adversarial versions below {attack}\n"
    title += f"with predictions, red where wrong; the {fooled.sum()} of the first 40 "
    axis.set_title(f"{title}that were fooled come first", fontsize=9.5)


def draw_curves(axes, runs, val_size):
    """Training loss and accuracy on held-out images of the four runs."""
    loss_axis, accuracy_axis = axes
    for run, name in ROWS.items():
        colour = COLOURS[run]
        log = read_log(os.path.join(runs, run))
        steps = [line["step"] for line in log]
        loss = [line["loss"] for line in log]
        clean = [100 * line["clean_acc"] for line in log]
        robust = [100 * line["robust_acc"] for line in log]
        style = {"color": colour, "marker": "o", "markersize": 3, "label": name}
        loss_axis.plot(steps, loss, **style)
        accuracy_axis.plot(steps, robust, **style)
        accuracy_axis.plot(steps, clean, color=colour, linestyle=":")
        # As train_at.py chooses best.pt: the first of equals.
        best = max(log, key=lambda line: (line["robust_acc"], line["clean_acc"]))
        star = {"color": colour, "marker": "*", "markersize": 13}
        accuracy_axis.plot(best["step"], 100 * best["robust_acc"], **star)
    loss_label = "loss (DRA rows include the alignment term)"
    loss_axis.set(title="Training loss", xlabel="step", ylabel=loss_label)
    star = {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none"}
    accuracy_axis.plot([], [], color="black", linestyle=":", label="clean")
    accuracy_axis.plot([], [], label="best.pt", **star)
    title = f"Accuracy on {val_size} held-out training images (solid: under PGD)"
    accuracy_axis.set(title=title, xlabel="step", ylabel="accuracy, %")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)


# ---------------------------------------------------------------------------------------- main


def main(args):
    rows = table(args)
    print_table(rows)
    print_pairs(args)
    files.write_json(rows, os.path.join(args.runs, "table.json"))
    report_png(args, rows, os.path.join(args.runs, "report.png"))
    print(f"{args.runs}/table.json, {args.runs}/report.png")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
