"""The quickstart's table (table.json) and picture (report.png), from the files that training and evaluation left.

python -m runs.report --runs out/quickstart --synthetic out/synthetic-digits
"""

import itertools
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from common import attacks, checkpoint, cli, data, models, stats
from common.synthetic import open_shards

ROWS = {"at": "AT", "at_dra": "AT+DRA", "dm_at": "DM-AT", "dm_at_dra": "DM-AT+DRA"}
KEYS = {  # of a result, that the table shows or keeps
    *("clean", "clean_interval", "robust", "robust_interval", "n", "attack", "attack_name", "norm", "eps", "version", "warnings"),
    *("seconds", "checkpoint_sha256", "batch_size", "environment"),
}
COLOURS = dict(zip(ROWS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7")))  # Okabe and Ito's palette, safe for the colour-blind


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs", default="out/quickstart", help="directory of the four runs; the report is written there")
    parser.add_argument("--synthetic", default="out/synthetic-digits", help="the synthetic set shown")
    parser.add_argument("--result", default="results-best-apgd-linf-0.15.json", help="result file of each run")
    return parser.parse_args(argv)


def table(args):
    """One dict per run: what was measured, on what, how long it took."""
    rows = []
    for run, name in ROWS.items():
        path = os.path.join(args.runs, run, args.result)
        result, settings = checkpoint.read_json(path), checkpoint.read_json(os.path.join(args.runs, run, "args.json"))
        if not KEYS <= result.keys() or result["robust"] is None:
            raise cli.UserError(f"{path}: not a result of evaluate.py with an attack (lacks {sorted(KEYS - result.keys())})")
        seconds = {"train_seconds": read_log(os.path.join(args.runs, run))[-1]["seconds"], "evaluate_seconds": result["seconds"]}
        row = {"name": name, "seed": settings.get("seed"), "val_size": settings.get("val_size")}
        row |= {key: result[key] for key in sorted(KEYS - {"environment", "version"})}
        row |= seconds | {"seconds": sum(seconds.values()), "versions": result["environment"] | {"attack": result["version"]}}
        rows.append(row)
    return rows


def read_log(run_dir):
    """The lines of a training log, at least one."""
    path = os.path.join(run_dir, "log.jsonl")
    try:
        with open(path) as file:
            lines = [json.loads(line) for line in file]
        if lines and all({"step", "loss", "clean_acc", "robust_acc", "seconds"} <= line.keys() for line in lines):
            return lines
    except FileNotFoundError:
        raise cli.UserError(f"{path}: no such file; train that run first") from None
    except (ValueError, AttributeError):
        pass
    raise cli.UserError(f"{path}: empty, or a line is no record of a validation")


def print_table(rows):
    print(f"{'':<11}{'clean':>8}{'95 % interval':>18}{'robust':>9}{'95 % interval':>18}{'training':>11}{'attack':>9}")
    for r in rows:
        clean, robust = (f"{r[k + '_interval'][0]:.1%} to {r[k + '_interval'][1]:.1%}" for k in ("clean", "robust"))
        times = f"{r['train_seconds']:>9.0f} s{r['evaluate_seconds']:>7.0f} s"
        print(f"{r['name']:<11}{r['clean']:>8.1%}{clean:>18}{r['robust']:>9.1%}{robust:>18}{times}")
    r = rows[0]
    threat = f"{r['attack_name']}, {r['norm']} {r['eps']:g}"
    print(f"n = {r['n']} test images; robust: {threat}; seed {r['seed']}; torch {r['versions']['torch']}")
    for row in rows:
        for warning in row["warnings"]:
            print(f"WARNING ({row['name']}): {warning}")


def print_pairs(args):
    """Images on which only one of two models is robust, and McNemar's exact test: the rows share their images."""
    stem = os.path.splitext(args.result)[0]
    verdicts = {run: stats.read_verdicts(os.path.join(args.runs, run, f"{stem}.npz"))["robust"] for run in ROWS}
    print("robust on one model alone, and p of McNemar's exact test (six pairs: below 0.008 is significant at 5 %)")
    for a, b in itertools.combinations(ROWS, 2):
        only_a, only_b = int((verdicts[a] & ~verdicts[b]).sum()), int((verdicts[b] & ~verdicts[a]).sum())
        print(f"  {ROWS[a]:<10}{only_a:>4}   {ROWS[b]:<10}{only_b:>4}   p = {stats.mcnemar(only_a, only_b):.2f}")


def report_png(args, rows, path):
    """Synthetic samples; clean and adversarial test images with predictions; training curves of the four runs."""
    spec = data.DATASETS["digits"]
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.4), layout="constrained")
    figure.suptitle(
        f"Digits, seed {rows[0]['seed']}: {rows[0]['attack_name']}, {rows[0]['norm']} {rows[0]['eps']:g}, {rows[0]['n']} test images: "
        + ", ".join(f"{row['name']} {row['robust']:.1%}" for row in rows),
        fontsize=11,
    )

    synthetic = open_shards(args.synthetic, spec)
    images, labels = synthetic.gather(np.arange(min(1000, len(synthetic))))
    per_class = min(12, np.bincount(labels, minlength=10).min())
    chosen = np.stack([np.flatnonzero(labels == k)[:per_class] for k in range(10)], axis=1)
    show_grid(axes[0, 0], images[chosen.ravel()], 10)
    axes[0, 0].set_title("Synthetic digits (columns: class 0 to 9)", fontsize=10)

    model, state = models.load_classifier(os.path.join(args.runs, "dm_at_dra", "best.pt"), spec, "cpu")
    images, labels = data.load_test(spec, None)
    x, y = data.to_x(images[:40]), torch.from_numpy(labels[:40])
    start = attacks.random_start(x.shape, state["norm"], state["eps"], data.stream(0, "report"))
    attack = dict(norm=state["norm"], eps=state["eps"], step_size=state["eps"] / 4, n_steps=40, loss="margin")
    x_adv = attacks.pgd(model, x, y, [start], **attack)
    with torch.no_grad():
        predicted, predicted_adv = model(x).argmax(1), model(x_adv).argmax(1)
    fooled = (predicted == y) & (predicted_adv != y)
    order = torch.argsort((~fooled).int(), stable=True)[:20].tolist()
    show_predictions(axes[0, 1], x, x_adv, y, predicted, predicted_adv, order)
    axes[0, 1].set_title(
        f"DM-AT+DRA: test images above, their adversarial versions below ({state['norm']} {state['eps']:g}, PGD-40)\n"
        f"with predictions, red where wrong; the {fooled.sum()} of the first 40 that were fooled come first",
        fontsize=9.5,
    )

    loss_axis, accuracy_axis = axes[1]
    for run, name in ROWS.items():
        log = read_log(os.path.join(args.runs, run))
        steps = [line["step"] for line in log]
        loss_axis.plot(steps, [line["loss"] for line in log], color=COLOURS[run], marker="o", markersize=3, label=name)
        accuracy_axis.plot(steps, [100 * line["robust_acc"] for line in log], color=COLOURS[run], marker="o", markersize=3, label=name)
        accuracy_axis.plot(steps, [100 * line["clean_acc"] for line in log], color=COLOURS[run], linestyle=":")
        best = max(log, key=lambda line: (line["robust_acc"], line["clean_acc"]))  # as train_at.py chooses; the first of equals
        accuracy_axis.plot(best["step"], 100 * best["robust_acc"], color=COLOURS[run], marker="*", markersize=13)
    loss_axis.set(title="Training loss", xlabel="step", ylabel="loss (DRA rows include the alignment term)")
    accuracy_axis.plot([], [], color="black", linestyle=":", label="clean")
    accuracy_axis.plot([], [], color="black", marker="*", markersize=13, linestyle="none", label="best.pt")
    title = f"Accuracy on {rows[0]['val_size']} held-out training images (solid: under PGD)"
    accuracy_axis.set(title=title, xlabel="step", ylabel="accuracy, %")
    for axis in axes[1]:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def show_grid(axis, images, columns):
    """uint8 NHWC grey images, row by row."""
    rows = len(images) // columns
    size = images.shape[1]
    grid = np.full((rows * (size + 1) + 1, columns * (size + 1) + 1), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (size + 1) + 1, (i % columns) * (size + 1) + 1
        grid[top : top + size, left : left + size] = image[..., 0]
    axis.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.axis("off")


def show_predictions(axis, x, x_adv, y, predicted, predicted_adv, order):
    """Two rows of ten pairs: clean above adversarial, predictions beneath each image."""
    axis.axis("off")
    for place, i in enumerate(order):
        left, top = (place % 10) / 10, 1 - (place // 10) * 0.5
        for image, guess, height in ((x[i, 0], predicted[i], top - 0.2), (x_adv[i, 0], predicted_adv[i], top - 0.43)):
            inset = axis.inset_axes([left + 0.005, height, 0.09, 0.17])
            inset.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            inset.set(xticks=[], yticks=[])
            inset.set_xlabel(str(guess.item()), color="black" if guess == y[i] else "red", labelpad=1, fontsize=9)


def main(args):
    rows = table(args)
    print_table(rows)
    print_pairs(args)
    checkpoint.write_json(rows, os.path.join(args.runs, "table.json"))
    report_png(args, rows, os.path.join(args.runs, "report.png"))
    print(f"{args.runs}/table.json, {args.runs}/report.png")


if __name__ == "__main__":
    cli.run(main, parse_args())
