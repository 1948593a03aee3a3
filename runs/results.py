"""What the experiments found: from their runs to docs/results.json, and from that file to README's tables and the figures in docs/.

python -m runs.results                     # README's results and the figures, from docs/results.json alone
python -m runs.results --add out/evidence  # first take in the runs <experiment>/<cell>/<seed> below a directory

A run is taken in once its best.pt was attacked (cell `zero`: once it was trained); taken in again, it replaces what was kept of that
name. Kept is what its own files say: settings other than the script's defaults, accuracies, times, versions.

Intervals are Student's, 95 %, over seeds. Differences of two cells are paired by seed: the same batches, crops, attack starts and
initial weights. All seeds share the split, the diffusion model with its images, and the test images, whose own chance they leave out.
"""

import glob
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import train_at
import train_at_aux
from common import checkpoint, cli, stats
from runs.report import read_log

STORE, README = "docs/results.json", "README.md"
BEGIN, END = "<!-- runs/results.py writes from here -->\n", "<!-- to here -->\n"
MAIN = "digits-100"
CURVE = {100: "digits-100", 200: "digits-200", 300: "digits-300", 500: "digits-500"}  # number of real images: experiment
SECOND = "fashion-6400"
CELLS = {  # (name in tables, colour: Okabe and Ito's palette, safe for the colour-blind)
    "at": ("AT", "#0072B2"),
    "at_dra": ("AT+DRA", "#E69F00"),
    "dm_at": ("DM-AT", "#009E73"),
    "dm_at_dra": ("DM-AT+DRA", "#CC79A7"),
    "shuffled": ("DM-AT+DRA, targets shuffled", "#999999"),
}
IMAGES, DRA = "**synthetic images**, mean of both", "**DRA**, mean of both"
EFFECTS = {  # name: pairs of cells; the effect is the mean of A - B over the pairs
    "synthetic images, without DRA": [("dm_at", "at")],
    "synthetic images, with DRA": [("dm_at_dra", "at_dra")],
    IMAGES: [("dm_at", "at"), ("dm_at_dra", "at_dra")],
    "DRA, without synthetic images": [("at_dra", "at")],
    "DRA, with synthetic images": [("dm_at_dra", "dm_at")],
    DRA: [("at_dra", "at"), ("dm_at_dra", "dm_at")],
    "both, against neither": [("dm_at_dra", "at")],
    "DRA, against shuffled targets": [("dm_at_dra", "shuffled")],
    "shuffled targets, against no DRA": [("shuffled", "dm_at")],
}
MEASURES = {"validation": "held out, PGD-20", "clean": "clean", "two_attacks": "APGD-CE+T", "autoattack": "AutoAttack"}
ABLATIONS = {  # cells <name>=<setting> of MAIN: (the default, the cell that has it, the cell without what is varied)
    "aux_weight": ("1", "dm_at_dra", "dm_at"),
    "align": ("adv", "dm_at_dra", "dm_at"),
    "sigma": ("0.1", "dm_at_dra", "dm_at"),
    "block": ("up_blocks.0.resnets.0", "dm_at_dra", "dm_at"),
    "teacher_images": ("100", "dm_at_dra", "dm_at"),
    "teacher_steps": ("200", "dm_at_dra", "dm_at"),
    "teacher_label": ("none", "dm_at_dra", "dm_at"),
    "n_images": ("10000", "dm_at", "at"),
    "synthetic_fraction": ("0.7", "dm_at", "at"),
    "diffusion_steps": ("200", "dm_at", "at"),
    "guidance_scale": ("1", "dm_at", "at"),
    "loss": ("trades", "dm_at", "at"),
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--add", metavar="DIR", help="directory of runs <experiment>/<cell>/<seed> to take in first")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------- from runs to docs/results.json


def read_run(folder):
    """What is kept of a run directory; None where it is not finished."""
    settings = checkpoint.read_json(f"{folder}/args.json")
    attacked = glob.glob(f"{glob.escape(folder)}/results-best-autoattack-*.json") + glob.glob(
        f"{glob.escape(folder)}/results-best-apgd-*.json"
    )
    if not os.path.exists(f"{folder}/best.pt") or not (attacked or settings.get("aux_weight") == 0):
        return None
    log = read_log(folder)
    if len(log) < -(-settings["epochs"] // settings["eval_every"]):
        return None
    script = {"train_at.py": train_at, "train_at_aux.py": train_at_aux}[settings["script"]]
    defaults = json.loads(json.dumps(vars(script.parse_args(["--dataset", settings["dataset"]]))))  # tuples as lists, as in the file
    environment = checkpoint.read_json(f"{folder}/env.json")
    kept = {
        "script": settings["script"],
        "settings": {key: settings[key] for key in sorted(defaults) if key in settings and settings[key] != defaults[key]},
        "validation": [[line["step"], line["clean_acc"], line["robust_acc"]] for line in log],
        "best_sha256": checkpoint.sha256(f"{folder}/best.pt"),
        "train_seconds": log[-1]["seconds"],
        "environment": {key: environment[key] for key in ("device", "python", "torch", "numpy", "commit")},
    }
    if attacked:
        result = checkpoint.read_json(attacked[0])  # AutoAttack's, where there is one: its first two attacks are those of apgd
        if result["checkpoint_sha256"] != kept["best_sha256"]:
            raise cli.UserError(f"{attacked[0]}: of another checkpoint than {folder}/best.pt; attack that one")
        fooled_by = stats.read_verdicts(f"{os.path.splitext(attacked[0])[0]}.npz")["fooled_by"]
        survived = {"clean": 0, "two_attacks": 2} | ({"autoattack": 4} if result["attack"] == "autoattack" else {})
        kept |= {"n": result["n"]} | {measure: int((fooled_by >= k).sum()) for measure, k in survived.items()}
        kept |= {"attack": result["version"], "attack_seconds": sum(result["seconds_by_attack"].values()), "warnings": result["warnings"]}
    return kept


def take_in(root):
    """Every finished run below a directory into docs/results.json."""
    runs = checkpoint.read_json(STORE)["runs"] if os.path.exists(STORE) else {}
    folders = [os.path.dirname(path) for path in sorted(glob.glob(f"{root}/*/*/*/args.json"))]
    found = {os.path.relpath(folder, root): read_run(folder) for folder in folders}
    runs |= {name: run for name, run in found.items() if run}
    with checkpoint.atomic(STORE) as file:  # a line per run, so that a change reads as one
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs))
        file.write(f'{{"runs": {{\n{lines}\n}}}}\n'.encode())
    print(f"{STORE}: {len(runs)} runs; below {root} {sum(map(bool, found.values()))} finished, {len(found)} begun")


def by_cell(runs):
    """{experiment: {cell: {seed: run}}}."""
    found = {}
    for name, run in runs.items():
        experiment, cell, seed = name.split("/")
        found.setdefault(experiment, {}).setdefault(cell, {})[int(seed)] = run
    return found


# --------------------------------------------------------------------------------------------------------- statistics


def accuracy(run, measure):
    """In %: of the best checkpoint; on held-out images for `validation`, else on the test images. None where it was not measured."""
    if measure == "validation":
        return 100 * max(robust for _, _, robust in run["validation"])
    return 100 * run[measure] / run["n"] if measure in run else None


def accuracies(cell, measure):
    """Those of a cell's seeds, (seeds,)."""
    return np.array([accuracy(cell[seed], measure) for seed in sorted(cell) if accuracy(cell[seed], measure) is not None])


def effect(cells, pairs, measure):
    """Mean of A - B over the pairs of cells, in points, of every seed that all of them have: (seeds,)."""
    named = {name: cells.get(name, {}) for pair in pairs for name in pair}
    seeds = sorted(set.intersection(*({s for s, run in cell.items() if accuracy(run, measure) is not None} for cell in named.values())))
    rows = [[accuracy(named[a][seed], measure) - accuracy(named[b][seed], measure) for a, b in pairs] for seed in seeds]
    return np.array(rows).reshape(len(seeds), len(pairs)).mean(1)


def show(found, sign=""):
    """Mean (low to high) of a value per seed."""
    if len(found) < 2:
        return f"{found[0]:{sign}.1f}" if len(found) else "-"
    return "{:{s}.1f} ({:{s}.1f} to {:{s}.1f})".format(*stats.t_interval(found), s=sign)


# --------------------------------------------------------------------------------------------------- tables and figures


def markdown(titles, rows):
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def cells_table(cells, measures):
    """Every cell's accuracies and, below, the effects: of all seeds that a measure has, two numbers where they differ."""
    shown = [(name, cells[cell]) for cell, (name, _) in CELLS.items() if cell in cells]
    lines = markdown(
        ["", "seeds", *(MEASURES[m] for m in measures)],
        [[name, n_seeds([accuracies(cell, m) for m in measures]), *(show(accuracies(cell, m)) for m in measures)] for name, cell in shown],
    )
    found = {name: [effect(cells, pairs, m) for m in measures] for name, pairs in EFFECTS.items()}
    rows = [[name, n_seeds(of), *(show(values, "+") for values in of)] for name, of in found.items() if len(of[0])]
    return lines + markdown(["effect, points", "seeds", *(MEASURES[m] for m in measures)], rows)


def n_seeds(found):
    return " or ".join(map(str, sorted({len(values) for values in found}, reverse=True)))


def curve_table(experiments):
    rows = []
    for size, name in CURVE.items():
        if name in experiments:
            cells = experiments[name]
            of = [effect(cells, EFFECTS[what], measure) for measure in ("two_attacks", "clean") for what in (IMAGES, DRA)]
            rows.append(
                [size, len(of[0]), *(show(accuracies(cells[cell], "two_attacks")) for cell in ("at", "dm_at")), *(show(v, "+") for v in of)]
            )
    titles = ["AT, robust", "DM-AT, robust", "images, robust", "DRA, robust", "images, clean", "DRA, clean"]
    return markdown(["real images", "seeds", *titles], rows)


def settings_of(cells, name):
    """{setting: cell} of an ablation, the default's among them; numbers in their order."""
    default, cell, _ = ABLATIONS[name]
    found = {key.partition("=")[2]: key for key in cells if key.startswith(f"{name}=")} | {default: cell}
    try:
        return {key: found[key] for key in sorted(found, key=float)}
    except ValueError:  # words
        return dict(sorted(found.items()))


def ablation_table(cells, names):
    rows = []
    for name in names:
        default, _, reference = ABLATIONS[name]
        for setting, cell in settings_of(cells, name).items():
            found = [effect(cells, [(cell, reference)], measure) for measure in ("validation", "two_attacks", "clean")]
            mark = " (default)" if setting == default else ""
            rows.append([f"{name} {setting}{mark}", f"against {CELLS[reference][0]}", n_seeds(found), *(show(v, "+") for v in found)])
    return markdown(["setting", "points", "seeds", *(MEASURES[m] for m in ("validation", "two_attacks", "clean"))], rows)


def work(runs):
    """One line on what it took."""
    hours = [sum(run.get(key, 0) for run in runs.values()) / 3600 for key in ("train_seconds", "attack_seconds")]
    kinds = sorted({f"{e['device']}, Python {e['python']}, torch {e['torch']}" for e in (run["environment"] for run in runs.values())})
    attacks = sorted({run["attack"] for run in runs.values() if "attack" in run})
    return f"{len(runs)} runs; {hours[0]:.1f} core-hours of training, {hours[1]:.1f} of attacks; {'; '.join(kinds + attacks)}."


def dots(axis, x, found, colour):
    """A dot per seed, and beside them the mean with its interval."""
    axis.plot(np.full(len(found), x + 0.1), found, ".", color=colour, alpha=0.4)
    if len(found) > 1:
        mean, low, high = stats.t_interval(found)
        axis.errorbar(x - 0.1, mean, [[mean - low], [high - mean]], color=colour, marker="o", capsize=3)


def line(axis, x, samples, **style):
    """Means of samples (an array of seeds for each x) with their intervals, joined."""
    found = np.array([stats.t_interval(sample) for sample in samples])
    axis.errorbar(x, found[:, 0], np.abs(found[:, 1:] - found[:, :1]).T, marker="o", capsize=3, **style)


def cells_figure(cells, path):
    """Accuracies of the cells, and the course of training."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1, 1, 1.3))
    shown = {cell: look for cell, look in CELLS.items() if cell in cells}
    for axis, measure in zip(axes, ("clean", "autoattack")):
        for x, (cell, (_, colour)) in enumerate(shown.items()):
            dots(axis, x, accuracies(cells[cell], measure), colour)
        axis.set_xticks(range(len(shown)), [name.replace("+", "\n+").replace(", ", ",\n") for name, _ in shown.values()], fontsize=8)
        axis.set(ylabel="accuracy, %", title=f"797 test images, {MEASURES[measure]}")
    for cell, (name, colour) in shown.items():
        course = np.array([run["validation"] for run in cells[cell].values()])  # (seeds, validations, [step, clean, robust])
        axes[2].plot(course[0, :, 0], 100 * course[..., 2].mean(0), color=colour, marker="o", markersize=3, label=name)
    axes[2].set(xlabel="step", ylabel="accuracy, %", title="500 held-out images, PGD-20, mean over seeds")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, path)


def curve_figure(experiments, path):
    """Accuracies and effects against the number of real images."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    sizes = np.array([size for size, name in CURVE.items() if name in experiments])
    of = [experiments[CURVE[size]] for size in sizes]
    for k, (cell, (name, colour)) in enumerate(list(CELLS.items())[:4]):
        line(axes[0], sizes * 1.03 ** (k - 1.5), [accuracies(cells[cell], "two_attacks") for cells in of], color=colour, label=name)
    axes[0].set(ylabel="accuracy, %", title=MEASURES["two_attacks"])
    for axis, measure in zip(axes[1:], ("two_attacks", "clean")):
        for k, (what, colour) in enumerate({IMAGES: "#009E73", DRA: "#E69F00"}.items()):
            samples = [effect(cells, EFFECTS[what], measure) for cells in of]
            line(axis, sizes * 1.03**k, samples, color=colour, label=what.replace("**", ""))
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="points", title=f"effect on {MEASURES[measure]}")
    for axis in axes:
        axis.set(xlabel="real images", xscale="log")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    save(figure, path)


def ablation_figure(cells, name, path):
    """Difference of every setting to the cell without what is varied."""
    default, _, reference = ABLATIONS[name]
    settings = settings_of(cells, name)
    figure, axes = plt.subplots(1, 2, figsize=(4 + 1.1 * len(settings), 3.6), layout="constrained")
    for axis, measure in zip(axes, ("two_attacks", "clean")):
        for x, (setting, cell) in enumerate(settings.items()):
            dots(axis, x, effect(cells, [(cell, reference)], measure), "#D55E00" if setting == default else "#0072B2")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(settings)), settings)
        axis.set(ylabel=f"points above {CELLS[reference][0]}", title=f"{MEASURES[measure]}", xlabel=f"{name} (red: the default)")
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure, path):
    with checkpoint.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def varied(cells):
    """The ablations that have another setting than the default."""
    return [name for name in ABLATIONS if len(settings_of(cells, name)) > 1]


def section(runs):
    """The lines of README between the marks, from the runs of docs/results.json."""
    experiments = by_cell(runs)
    main_cells = experiments[MAIN]
    names = varied(main_cells)
    lines = [*in_short(main_cells), *cells_table(main_cells, list(MEASURES)), *zero_line(main_cells)]
    lines += ["![Accuracies of every seed, and robust accuracy in the course of training](docs/results-cells.png)", ""]
    if sum(name in experiments for name in CURVE.values()) > 1:
        lines += [*curve_table(experiments), "![Accuracies and effects against the number of real images](docs/results-curve.png)", ""]
    if names:
        lines += [*ablation_table(main_cells, names), *(f"![Settings of {name}](docs/ablation-{name}.png)" for name in names), ""]
    if SECOND in experiments:
        lines += cells_table(experiments[SECOND], ["clean", "two_attacks"])
    return "\n".join([*lines, work(runs), ""])


def in_short(cells):
    """The two effects in one sentence."""
    of = {(what, measure): effect(cells, EFFECTS[what], measure) for what in (IMAGES, DRA) for measure in ("autoattack", "clean")}
    images, images_clean, dra, dra_clean = (show(values, "+") for values in of.values())
    text = f"**Synthetic images: {images} points of robust accuracy under AutoAttack, {images_clean} of clean; DRA: {dra} and {dra_clean}**"
    return [f"{text} ({n_seeds(of.values())} seeds).", ""]


def zero_line(cells):
    """Weight 0 against DM-AT: were the weights the same?"""
    same = [run["best_sha256"] == cells["dm_at"][seed]["best_sha256"] for seed, run in cells.get("zero", {}).items()]
    return [f"DM-AT+DRA with weight 0 ends with DM-AT's very weights on {sum(same)} of {len(same)} seeds.", ""]


def main(args):
    if args.add:
        take_in(args.add)
    runs = checkpoint.read_json(STORE)["runs"]
    experiments = by_cell(runs)
    cells_figure(experiments[MAIN], "docs/results-cells.png")
    if sum(name in experiments for name in CURVE.values()) > 1:
        curve_figure(experiments, "docs/results-curve.png")
    for name in varied(experiments[MAIN]):
        ablation_figure(experiments[MAIN], name, f"docs/ablation-{name}.png")
    with open(README) as file:
        before, begin, rest = file.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise cli.UserError(f"{README}: lacks the two lines between which the results stand")
    with checkpoint.atomic(README) as file:
        file.write((before + begin + section(runs) + end + after).encode())
    print(section(runs))


if __name__ == "__main__":
    cli.run(main, parse_args())
