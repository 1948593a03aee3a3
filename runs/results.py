"""Tables and figures of many seeds, from docs/results.json.

    python -m runs.results                     # from docs/results.json alone
    python -m runs.results --add out/evidence  # first add the runs <experiment>/<cell>/<seed>

The tables go into docs/results.md and that of the 2 x 2 into README.md, between marker lines; the
figures go into docs/. The text around the markers is written by hand. What is kept of a run stands
in runs/store.py, the table of the quickstart in runs/report.py.

How seeds and images are paired stands in runs/effects.py.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common import UserError, cli, data, files, stats
from published.datasets import DATASETS
from runs import pupils
from runs.effects import (
    MEASURES,
    accuracies,
    effect,
    markdown,
    n_seeds,
    outcomes,
    save_figure,
    shared_seeds,
    show,
)
from runs.report import COLOURS, ROWS
from runs.store import ABLATIONS, CURVE, STORE, TITLES, add_runs, by_cell, read_store

PAGE = "docs/results.md"
README = "README.md"
NAME = "python -m runs.results"  # of the lines that mark where it writes

MAIN = "digits-100"
OTHER_SPLIT = "digits-100-other"
LONG_TAIL = "digits-long-tail"
FASHION = "fashion-6400"
CIFAR = {"cifar-1000": "1,000 labels", "cifar-5000": "5,000 labels", "cifar-all": "all labels"}
CELL_COLOURS = COLOURS | {
    "shuffled": "#999999",
    "zero": "#000000",
    "at_dra,untrained": "#56B4E9",
}

IMAGES = "**synthetic images**, mean of both"
DRA = "**DRA**, mean of both"
EFFECTS = {  # name: pairs of cells (A, B); the effect is the mean of A - B over the pairs
    "synthetic images, without DRA": [("dm_at", "at")],
    "synthetic images, with DRA": [("dm_at_dra", "at_dra")],
    IMAGES: [("dm_at", "at"), ("dm_at_dra", "at_dra")],
    "DRA, without synthetic images": [("at_dra", "at")],
    "DRA, with synthetic images": [("dm_at_dra", "dm_at")],
    DRA: [("at_dra", "at"), ("dm_at_dra", "dm_at")],
    "both, against neither": [("dm_at_dra", "at")],
    "DRA, against shuffled targets": [("dm_at_dra", "shuffled")],
    "shuffled targets, against no DRA": [("shuffled", "dm_at")],
    "DRA, against an untrained teacher": [("at_dra", "at_dra,untrained")],
}

# Cells named <cell>,<difference>,...: the first seed that counts. Earlier ones chose the form.
FIRST_SEED = {"at_dra,align_loss=contrastive": 3}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--add", metavar="DIR", help="directory of runs <experiment>/<cell>/<seed> to add first"
    )
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------- tables


def accuracy_table(cells, names, measures):
    """Accuracies of the named cells; one that lacks any of the measures is left out."""
    rows = []
    for cell in names:
        samples = [accuracies(cells, cell, measure) for measure in measures]
        if all(map(len, samples)):
            rows.append([TITLES[cell], n_seeds(samples), *map(show, samples)])
    return markdown(["accuracy, %", "seeds", *(MEASURES[m] for m in measures)], rows)


def two_by_two(experiments):
    """The table of the README: the 2 x 2 of CIFAR-10 and of digits."""
    columns = {
        "CIFAR-10, clean": ("cifar-1000", "clean"),
        "CIFAR-10, robust": ("cifar-1000", "two_attacks"),
        "digits, clean": (MAIN, "clean"),
        "digits, robust": (MAIN, "autoattack"),
    }
    rows = []
    for cell in ROWS:
        samples = [
            accuracies(experiments.get(experiment, {}), cell, measure)
            for experiment, measure in columns.values()
        ]
        rows.append([TITLES[cell], *map(show, samples)])
    return markdown(["accuracy, %", *columns], rows)


def effects_table(cells, measures):
    """All effects; one that lacks any of the measures is left out."""
    rows = []
    for name, pairs in EFFECTS.items():
        samples = [effect(cells, pairs, measure) for measure in measures]
        if all(map(len, samples)):
            rows.append([name, n_seeds(samples), *(show(values, "+") for values in samples)])
    return markdown(["effect, points", "seeds", *(MEASURES[m] for m in measures)], rows)


def on_curve(experiments):
    """{number of real images: cells} that have two seeds or more of every cell of the 2 x 2."""
    curve = {}
    for size, name in CURVE.items():
        cells = experiments.get(name, {})
        if len(effect(cells, EFFECTS[IMAGES], "two_attacks")) > 1:
            curve[size] = cells
    return curve


def curve_table(curve):
    """Accuracies and effects per number of real images."""
    titles = [
        "real images",
        "seeds",
        "AT, robust",
        "DM-AT, robust",
        "images, robust",
        "DRA, robust",
        "images, clean",
        "DRA, clean",
    ]
    rows = []
    for size, cells in curve.items():
        robust = [effect(cells, EFFECTS[name], "two_attacks") for name in (IMAGES, DRA)]
        clean = [effect(cells, EFFECTS[name], "clean") for name in (IMAGES, DRA)]
        without = [show(accuracies(cells, cell, "two_attacks")) for cell in ("at", "dm_at")]
        effects = [show(values, "+") for values in robust + clean]
        rows.append([size, n_seeds(robust + clean), *without, *effects])
    return markdown(titles, rows)


def long_tail_tables(cells):
    """Accuracies and effects on the head, the first half of the classes, and on the tail."""
    _, labels = data.load_test(DATASETS["digits"], None)
    is_tail = labels >= DATASETS["digits"].num_classes / 2
    measures = ("clean", "two_attacks")

    def by_half(samples):
        n = samples[0].shape[1]  # attacked were the first test images
        return [sample[:, is_tail[:n] == tail] for tail in (False, True) for sample in samples]

    rows = []
    for cell in ROWS:
        samples = [accuracies(cells, cell, measure) for measure in measures]
        if all(map(len, samples)):
            rows.append([TITLES[cell], n_seeds(samples), *map(show, by_half(samples))])
    effect_rows = []
    for name, pairs in EFFECTS.items():
        samples = [effect(cells, pairs, measure) for measure in measures]
        if all(map(len, samples)):
            points = [show(values, "+") for values in by_half(samples)]
            effect_rows.append([name, n_seeds(samples), *points])
    titles = [f"{half}, {MEASURES[m]}" for half in ("head", "tail") for m in measures]
    lines = markdown(["accuracy, %", "seeds", *titles], rows)
    return lines + markdown(["effect, points", "seeds", *titles], effect_rows)


def settings_of(cells, name):
    """{value: cell} of an ablation, the default's among them; numbers in their order."""
    default, default_cell, _ = ABLATIONS[name]
    settings = {default: default_cell}
    for cell in cells:
        key, _, value = cell.partition("=")
        if key == name:
            settings[value] = cell
    try:
        order = sorted(settings, key=float)
    except ValueError:  # words
        order = sorted(settings)
    return {value: settings[value] for value in order}


def varied(cells):
    """{ablation: {value: cell}} where a value besides the default was attacked on three seeds.

    The first entry is the cell without what is varied.
    """
    ablations = {}
    for name, (_, default_cell, without) in ABLATIONS.items():
        settings = {f"without ({TITLES[without]})": without}
        for value, cell in settings_of(cells, name).items():
            if len(effect(cells, [(cell, default_cell)], "two_attacks")) > 2:
                settings[value] = cell
        if len(settings) > 2:
            ablations[name] = settings
    return ablations


def together(cells, names):
    """The named cells, with the seeds that were attacked in all of them.

    So a default that is lucky on some seeds is so for each of its settings.
    """
    seeds = shared_seeds([cells[name] for name in names], "two_attacks")
    return {name: {seed: cells[name][seed] for seed in seeds} for name in names}


def ablation_table(cells, ablations):
    """Points above the default. A row without what is varied stands once, if on the same seeds."""
    measures = ("held_out", "two_attacks", "clean")
    rows = []
    for name, settings in ablations.items():
        _, default_cell, without = ABLATIONS[name]
        shared = together(cells, settings.values())
        for value, cell in settings.items():
            samples = [effect(shared, [(cell, default_cell)], measure) for measure in measures]
            points = [n_seeds(samples), *(show(values, "+") for values in samples)]
            if cell == default_cell:
                points = ["", "default", "default", "default"]
            row = [f"`{name}`", value, TITLES[default_cell], *points]
            stands = any(row[1:] == other[1:] for other in rows)
            if cell != without or not stands:
                rows.append(row)
    titles = ["", "setting", "of", "seeds", *(MEASURES[measure] for measure in measures)]
    return markdown(titles, rows)


def forms_table(cells):
    """Cells <cell>,<difference>,... that were attacked: points above the cell without DRA.

    With several differences also above the form that lacks only the last one.
    """
    measures = ("held_out", "last", "two_attacks", "clean")
    rows = []
    for name in sorted(name for name in cells if "," in name):
        base, *form = name.split(",")
        title = ", ".join([TITLES[base], *(f"`{part}`" for part in form)])
        without = base.removesuffix("_dra")
        references = {TITLES[without]: without}
        if len(form) > 1:
            references[f"the same without `{form[-1]}`"] = ",".join([base, *form[:-1]])
        counted = without_choosing_seeds(cells, name)
        for reference_title, reference in references.items():
            samples = [effect(counted, [(name, reference)], measure) for measure in measures]
            if all(map(len, samples)):
                points = [show(values, "+") for values in samples]
                rows.append([title, reference_title, n_seeds(samples), *points])
    return markdown(["form", "against", "seeds", *(MEASURES[m] for m in measures)], rows)


def without_choosing_seeds(cells, name):
    """All cells without the seeds by which the form of DRA of cell `name` was chosen."""
    first = 0
    for chosen, seed in FIRST_SEED.items():
        if name.startswith(chosen):
            first = seed
    counted = {}
    for cell, seeds in cells.items():
        counted[cell] = {seed: run for seed, run in seeds.items() if seed >= first}
    return counted


# ------------------------------------------------------------------------------------ the page


def section(runs, verdicts):
    """The text of docs/results.md between the markers, from the rows of docs/results.json."""
    experiments = by_cell(runs)
    lines = cifar_tables(experiments)
    predictions = pupils.predictions_of(experiments, verdicts)
    if predictions:
        what = "What the teacher knows beyond its pupil, and what DRA gives"
        lines += [f"**Does the verdict predict?** {what}, in points.", ""]
        lines += pupils.table(predictions)
        chance = "by chance alone one row in forty gains, and one loses"
        lines += [f"A gain or loss counts where it is significant over seeds: {chance}.", ""]
        lines += pupils.gains_table(predictions)
        lines += pupils.correlations(predictions)
        picture = "The effect of DRA against the lead of the teacher's probe"
        lines += [f"![{picture}](results-pupils.png)", ""]
    cells = experiments[MAIN]
    lines += caption(cells, "**100 digits.**")
    lines += in_short(cells)
    lines += accuracy_table(cells, TITLES, MEASURES) + effects_table(cells, MEASURES)
    lines += zero_line(cells)
    picture = "Accuracies of every seed, and robust accuracy in the course of training"
    lines += [f"![{picture}](results-cells.png)", ""]
    curve = on_curve(experiments)
    if len(curve) > 1:
        title = "**More digits**; the diffusion model is trained on the same ones."
        lines += caption(cells, f"{title} Robust: APGD-CE+T.") + curve_table(curve)
        effects = "Accuracies and effects against the number of real images"
        lines += [f"![{effects}](results-curve.png)", ""]
    lines += other_split(experiments.get(OTHER_SPLIT, {}))
    long_tail = experiments.get(LONG_TAIL, {})
    if len(effect(long_tail, EFFECTS[IMAGES], "two_attacks")) > 1:
        title = "**A long tail of classes**: 178 digits, 45 of the class 0, 4 of the class 9."
        lines += caption(long_tail, f"{title} Head: classes 0 to 4, tail: 5 to 9.")
        lines += long_tail_tables(long_tail)
    ablations = varied(cells)
    if ablations:
        title = "**One setting at a time**, 100 digits; points above the default,"
        lines += caption(cells, f"{title} on the seeds that all settings have.")
        lines += ablation_table(cells, ablations)
    forms = forms_table(cells)
    if len(forms) > 3:  # more than titles
        title = "**Other forms**, 100 digits; points."
        lines += caption(cells, f"{title} Seeds by which a form was chosen do not count.") + forms
    fashion = experiments.get(FASHION, {})
    if len(effect(fashion, EFFECTS[IMAGES], "two_attacks")) > 1:
        title = "**Fashion-MNIST**, 6,400 real images, a diffusion model of 58,976."
        measures = ("held_out", "last", "clean", "two_attacks")
        lines += caption(fashion, title)
        lines += accuracy_table(fashion, TITLES, measures) + effects_table(fashion, measures)
    return "\n".join([*lines, work(runs), ""])


def cifar_tables(experiments):
    """Accuracies and effects per number of labels."""
    lines = []
    for name, cells in on_cifar(experiments).items():
        measures = ("held_out", "last", "clean", "two_attacks")
        lines += caption(cells, f"**CIFAR-10 as JPEG**, {CIFAR[name]}.")
        lines += accuracy_table(cells, TITLES, measures) + effects_table(cells, measures)
        lines += autoattack_line(cells)
        steps = course_table(cells)
        if len(steps) > 3:  # more than titles
            title = "DRA at equal steps, on held-out images, where no checkpoint is chosen"
            lines += [f"{title}; points.", "", *steps]
        courses = "Clean and robust accuracy in the course of training"
        lines += [f"![{courses}](results-{name}.png)", ""]
    return lines


def autoattack_line(cells):
    """AutoAttack beside its first two attacks, on the seeds that have it."""
    found = []
    for name, title in TITLES.items():
        seeds = shared_seeds([cells.get(name, {})], "autoattack")
        if seeds:
            robust = outcomes(cells[name], seeds, "autoattack").mean()
            upper = outcomes(cells[name], seeds, "two_attacks").mean()
            which = ", ".join(map(str, seeds))
            found.append(f"{title} {robust:.2f} (APGD-CE+T {upper:.2f}; seed {which})")
    return [f"AutoAttack, %: {', '.join(found)}.", ""] if found else []


def on_cifar(experiments):
    """{experiment: cells} of CIFAR-10 where two seeds or more of AT were attacked."""
    found = {name: experiments.get(name, {}) for name in CIFAR}
    return {
        name: cells
        for name, cells in found.items()
        if len(accuracies(cells, "at", "two_attacks")) > 1
    }


def course_table(cells):
    """The effect of DRA at every validation."""
    rows = []
    for kind, (without, with_dra) in pupils.KINDS.items():
        seeds = shared_seeds([cells.get(without, {}), cells.get(with_dra, {})], "held_out")
        if len(seeds) > 1:
            a, b = [course(cells[cell], seeds) for cell in (with_dra, without)]
            for i, step in enumerate(a[0, :, 0]):
                effects = [show((a - b)[:, i, k : k + 1], "+") for k in (1, 2)]
                rows.append([kind, f"{step:.0f}", len(seeds), *effects])
    return markdown(["DRA added to", "step", "seeds", "clean", "PGD"], rows)


def course(cell, seeds):
    """(step, clean accuracy in %, robust accuracy in %) of each validation: (seeds, n, 3)."""
    return np.array([cell[seed]["held_out"] for seed in seeds]) * [1, 100, 100]


def caption(cells, title):
    """The line above a table: what stands in it, how many images were attacked, and how."""
    attacked = [run for seeds in cells.values() for run in seeds.values() if "n" in run]
    if attacked:
        run = attacked[0]
        title += f" {run['n']} test images, {cli.threat(run['norm'], run['eps'])}."
    return [title, ""]


def in_short(cells):
    """The two effects in one sentence, where there are some."""
    samples = []
    for name in (IMAGES, DRA):
        for measure in ("autoattack", "clean"):
            samples.append(effect(cells, EFFECTS[name], measure))
    if len(samples[0]) == 0:
        return []
    images, images_clean, dra, dra_clean = [show(values, "+") for values in samples]
    robust = f"{images} points of robust accuracy under AutoAttack"
    text = f"Synthetic images: {robust}, {images_clean} of clean; DRA: {dra} and {dra_clean}"
    return [f"**{text}** (seeds: {n_seeds(samples)}).", ""]


def zero_line(cells):
    """Weight 0 against DM-AT: were the weights the same?"""
    zero = cells.get("zero", {})
    dm_at = cells.get("dm_at", {})
    seeds = zero.keys() & dm_at.keys()
    if not seeds:
        return []
    n_same = sum(zero[seed]["best_sha256"] == dm_at[seed]["best_sha256"] for seed in seeds)
    weights = "DM-AT+DRA with weight 0 ends with DM-AT's very weights"
    return [f"{weights} on {n_same} of {len(seeds)} seeds.", ""]


def other_split(cells):
    """One line on another choice of real images, where two seeds or more of it were attacked."""
    robust, clean = [
        effect(cells, [("dm_at", "at")], measure) for measure in ("two_attacks", "clean")
    ]
    if len(robust) < 2:
        return []
    title = "**Another 100 digits**, with a diffusion model of their own"
    points = f"{show(robust, '+')} points under APGD-CE+T, {show(clean, '+')} clean"
    seeds = f"({len(robust)} seeds)"
    return [f"{title}: the effect of its images, without DRA, is {points} {seeds}.", ""]


def work(runs):
    """One line on what it took."""
    train_hours = sum(run["train_seconds"] for run in runs.values()) / 3600
    attack_hours = sum(run.get("attack_seconds", 0) for run in runs.values()) / 3600
    machines = set()
    for run in runs.values():
        environment = run["environment"]
        versions = f"Python {environment['python']}, torch {environment['torch']}"
        machines.add(f"{environment['device']}, {versions}")
    attack_versions = {run["version"] for run in runs.values() if "version" in run}
    n_warned = sum(bool(run.get("warnings")) for run in runs.values())
    text = f"{len(runs)} classifiers, one CPU core each: {train_hours:.1f} hours of training, "
    text += f"{attack_hours:.1f} of attacks (by the clock, with other work beside some; "
    text += "diffusion models and their images not counted). "
    text += "; ".join(sorted(machines) + sorted(attack_versions))
    return f"{text}. Attacks that warned of a weakness of theirs: {n_warned}."


# ------------------------------------------------------------------------------------- figures


def draw_dots(axis, x, values, colour):
    """A dot per seed, and beside them the mean with its interval over seeds."""
    means = values.mean(1)
    axis.plot(np.full(len(means), x + 0.1), means, ".", color=colour, alpha=0.4)
    if len(means) > 1:
        mean, low, high = stats.t_interval(means)
        interval = [[mean - low], [high - mean]]
        axis.errorbar(x - 0.1, mean, interval, color=colour, marker="o", capsize=3)


def draw_line(axis, x, samples, **style):
    """Means of samples (seeds, images), one for each x, with their intervals over seeds, joined."""
    intervals = np.array([stats.t_interval(sample.mean(1)) for sample in samples])
    means = intervals[:, 0]
    lengths = np.abs(intervals[:, 1:] - intervals[:, :1]).T
    axis.errorbar(x, means, lengths, marker="o", capsize=3, **style)


def cells_figure(cells, path):
    """Accuracies of the cells, and the course of training."""
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1, 1, 1.3)
    )
    shown = [cell for cell in TITLES if len(accuracies(cells, cell, "autoattack"))]
    labels = [TITLES[cell].replace("+", "\n+").replace(", ", ",\n") for cell in shown]
    for axis, measure in zip(axes, ("clean", "autoattack")):
        for x, cell in enumerate(shown):
            draw_dots(axis, x, accuracies(cells, cell, measure), CELL_COLOURS[cell])
        axis.set_xticks(range(len(shown)), labels, fontsize=8)
        axis.set(ylabel="accuracy, %", title=f"test images, {MEASURES[measure]}")
    for cell in shown:
        steps, _, robust_acc = course(cells[cell], cells[cell]).mean(0).T
        style = {"color": CELL_COLOURS[cell], "marker": "o", "markersize": 3}
        axes[2].plot(steps, robust_acc, label=TITLES[cell], **style)
    title = "held-out images, PGD, mean over seeds"
    axes[2].set(xlabel="step", ylabel="accuracy, %", title=title)
    axes[2].legend(fontsize=8)
    save_figure(figure, axes, path)


def course_figure(cells, path):
    """The way of each cell through clean and robust accuracy, means over seeds."""
    figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    shown = [cell for cell in TITLES if len(cells.get(cell, {})) > 1]
    for cell in shown:
        style = {"color": CELL_COLOURS[cell], "marker": "o", "markersize": 3}
        steps, clean_acc, robust_acc = course(cells[cell], cells[cell]).mean(0).T
        axis.plot(clean_acc, robust_acc, label=TITLES[cell], **style)
        for step, x, y in zip(steps, clean_acc, robust_acc):
            place = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(f"{step:.0f}", (x, y), color=CELL_COLOURS[cell], **place)
    axis.set(xlabel="clean accuracy, %", ylabel="accuracy under PGD, %")
    axis.set_title("held-out images, mean over seeds, by step", fontsize=10)
    axis.legend(fontsize=8)
    save_figure(figure, [axis], path)


def curve_figure(curve, path):
    """Accuracies and effects against the number of real images."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    sizes = np.array(list(curve))
    for k, cell in enumerate(ROWS):
        samples = [accuracies(cells, cell, "two_attacks") for cells in curve.values()]
        x = sizes * 1.03 ** (k - 1.5)  # beside each other
        draw_line(axes[0], x, samples, color=CELL_COLOURS[cell], label=TITLES[cell])
    axes[0].set(ylabel="accuracy, %", title=MEASURES["two_attacks"])
    for axis, measure in zip(axes[1:], ("two_attacks", "clean")):
        for k, (name, colour) in enumerate({IMAGES: "#009E73", DRA: "#E69F00"}.items()):
            samples = [effect(cells, EFFECTS[name], measure) for cells in curve.values()]
            label = name.replace("**", "")
            draw_line(axis, sizes * 1.03**k, samples, color=colour, label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="points", title=f"effect on {MEASURES[measure]}")
    for axis in axes:
        axis.set(xlabel="real images", xscale="log")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    save_figure(figure, axes, path)


# ---------------------------------------------------------------------------------------- main


def main(args):
    runs, verdicts = add_runs(args.add) if args.add else read_store()
    experiments = by_cell(runs)
    if MAIN not in experiments:
        raise UserError(f"{STORE}: no run of {MAIN} yet")
    cells = experiments[MAIN]
    curve = on_curve(experiments)
    cells_figure(cells, "docs/results-cells.png")
    if len(curve) > 1:
        curve_figure(curve, "docs/results-curve.png")
    for name, cifar_cells in on_cifar(experiments).items():
        course_figure(cifar_cells, f"docs/results-{name}.png")
    predictions = pupils.predictions_of(experiments, verdicts)
    if predictions:
        pupils.figure(predictions, "docs/results-pupils.png")
    text = section(runs, verdicts)
    files.write_between(PAGE, NAME, text)
    files.write_between(README, NAME, "\n".join(two_by_two(experiments)))
    print(text)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
