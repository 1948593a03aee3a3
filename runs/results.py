"""What the experiments found: from their runs to docs/results.json, and from that file to README's tables and the figures in docs/.

python -m runs.results                     # README's results and the figures, from docs/results.json alone
python -m runs.results --add out/evidence  # first take in the runs <experiment>/<cell>/<seed> below a directory

A run is taken in once it was trained to its end, with its attack if its best.pt was attacked; taken in again, it replaces what was kept
under that name. Kept is what its own files say: settings other than the script's defaults, accuracies, times, versions, and every test
image's verdict, a digit: 0 wrong without an attack, k fell to the k-th attack, one more than there are attacks: withstood them all.

Two 95 % intervals. Over seeds: Student's, of a value per seed; it is of these test images. Over seeds and images: both are samples and
crossed (every seed meets the same images); it holds for other images of their kind. Differences of two cells are taken seed by seed and
image by image. Cells of a seed have the same initial weights, and each random stream starts alike; those that differ in DRA alone also have
the same batches, crops and attack starts. All seeds share the split, the diffusion model and its images: their chance is in no interval.
"""

import glob
import itertools
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t

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
    "zero": ("DM-AT+DRA, weight 0", "#000000"),
}
OTHER_SPLIT = "digits-100-other"
MAY_DIFFER = {"aux_weight", "shuffle_targets", "synthetic", "synthetic_fraction", "synthetic_sha256", "teacher", "teacher_sha256"}
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
MEASURES = {
    "held_out": "held out, PGD-20",
    "last": "the same, last step",
    "clean": "clean",
    "two_attacks": "APGD-CE+T",
    "autoattack": "AutoAttack",
}
WITHSTOOD = {"clean": 1, "two_attacks": 3, "autoattack": 5}  # the least verdict that counts
ABLATIONS = {  # cells <name>=<setting> of MAIN: (the default, the cell that has it, the cell without what is varied)
    "aux_weight": ("1", "dm_at_dra", "dm_at"),
    "align": ("adv", "dm_at_dra", "dm_at"),
    "align_loss": ("cosine", "dm_at_dra", "dm_at"),
    "sigma": ("0.1", "dm_at_dra", "dm_at"),
    "block": ("up_blocks.0.resnets.0", "dm_at_dra", "dm_at"),
    "teacher_label": ("none", "dm_at_dra", "dm_at"),
    "teacher_steps": ("200", "dm_at_dra", "dm_at"),
    "teacher_images": ("100", "dm_at_dra", "dm_at"),
    "n_images": ("10000", "dm_at", "at"),
    "synthetic_fraction": ("0.7", "dm_at", "at"),
    "diffusion_steps": ("200", "dm_at", "at"),
    "diffusion_seed": ("0", "dm_at", "at"),
    "guidance_scale": ("1", "dm_at", "at"),
    "loss": ("trades", "dm_at", "at"),
}
OTHER_IMAGES = {"n_images", "diffusion_steps", "diffusion_seed", "guidance_scale"}  # ablations with a synthetic set of their own
OTHER_TEACHER = {"teacher_steps", "teacher_images"}
CHOSEN_ON = {"at_dra,align_loss=contrastive": 3}  # form of DRA: the seeds below this one chose it and do not count


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--add", metavar="DIR", help="directory of runs <experiment>/<cell>/<seed> to take in first")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------- from runs to docs/results.json


def read_run(folder):
    """What is kept of a run directory; None where it is not trained to its end."""
    settings = checkpoint.read_json(f"{folder}/args.json")
    if not os.path.exists(f"{folder}/best.pt"):
        return None
    script = {"train_at.py": train_at, "train_at_aux.py": train_at_aux}.get(settings.get("script"))
    if not script:
        raise cli.UserError(f"{folder}: no run of train_at.py or train_at_aux.py")
    log = read_log(folder)
    if len(log) < -(-settings["epochs"] // settings["eval_every"]):
        return None
    defaults = json.loads(json.dumps(vars(script.parse_args(["--dataset", settings["dataset"]]))))  # tuples as lists, as in the file
    environment = checkpoint.read_json(f"{folder}/env.json")
    kept = {
        "script": settings["script"],
        "seed": settings["seed"],
        "settings": {k: settings[k] for k in sorted(settings) if k not in ("script", "seed") and settings[k] != defaults.get(k)},
        "held_out": [[line["step"], line["clean_acc"], line["robust_acc"]] for line in log],
        "best_sha256": checkpoint.sha256(f"{folder}/best.pt"),
        "train_seconds": log[-1]["seconds"],
        "environment": {key: environment[key] for key in ("device", "python", "torch", "numpy", "commit")},
    }
    return kept | read_attack(folder, settings, kept["best_sha256"])


def read_attack(folder, settings, best_sha256):
    """What is kept of the attack on a run's best.pt with the training's norm and radius, on the first test images: of AutoAttack
    where there is one (its first two attacks are those of apgd), else of apgd; {} where there is neither."""
    for attack in ("autoattack", "apgd"):
        paths = sorted(glob.glob(f"{glob.escape(folder)}/results-best-{attack}-*.json"))
        results = {path: checkpoint.read_json(path) for path in paths}
        wanted = {"norm": settings["norm"], "eps": settings["eps"], "attack": attack, "image_list_sha256": None, "transfer_sha256": None}
        wanted |= {"seed": 0, "settings": {}}
        fitting = [path for path, result in results.items() if all(result[key] == value for key, value in wanted.items())]
        if len(fitting) > 1:
            raise cli.UserError(f"{' and '.join(fitting)}: which of them counts? Move the other away")
        if fitting:
            result = results[fitting[0]]
            if result["checkpoint_sha256"] != best_sha256:
                raise cli.UserError(f"{fitting[0]}: of another checkpoint than {folder}/best.pt; attack that one")
            found = stats.read_verdicts(f"{os.path.splitext(fitting[0])[0]}.npz")
            if not np.array_equal(found["index"], np.arange(result["n"])):
                raise cli.UserError(f"{fitting[0]}: not of the first {result['n']} test images")
            kept = {key: result[key] for key in ("attack", "version", "norm", "eps", "n", "warnings")}
            verdicts = "".join(map(str, found["fooled_by"] + 1))
            return kept | {"attack_seconds": round(sum(result["seconds_by_attack"].values()), 1), "verdicts": verdicts}
    return {}


def take_in(root):
    """Every trained run below a directory into docs/results.json; returns all runs."""
    runs = checkpoint.read_json(STORE)["runs"] if os.path.exists(STORE) else {}
    folders = [os.path.dirname(path) for path in sorted(glob.glob(f"{glob.escape(root)}/*/*/*/args.json"))]
    if not folders:
        raise cli.UserError(f"--add {root}: no runs <experiment>/<cell>/<seed> there")
    found = {os.path.relpath(folder, root): read_run(folder) for folder in folders}
    runs |= {name: run for name, run in found.items() if run}
    by_cell(runs)  # raises where they do not belong together, before anything is written
    with checkpoint.atomic(STORE) as file:  # a line per run, so that a change reads as one
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(runs[name])}" for name in sorted(runs))
        file.write(f'{{"runs": {{\n{lines}\n}}}}\n'.encode())
    print(f"{STORE}: {len(runs)} runs; below {root} {sum(map(bool, found.values()))} trained, {len(found)} begun")
    return runs


def by_cell(runs):
    """{experiment: {cell: {seed: run}}}. UserError where runs stand side by side that cannot be compared."""
    found = {}
    for name, run in sorted(runs.items()):
        experiment, cell, seed = name.split("/")
        if str(run["seed"]) != seed:
            raise cli.UserError(f"{name}: a run with --seed {run['seed']}")
        check_name(name, cell, run["settings"])
        found.setdefault(experiment, {}).setdefault(cell, {})[int(seed)] = run
    for experiment, cells in found.items():
        for cell, seeds in cells.items():
            agree(f"{experiment}/{cell}", [run["settings"] for run in seeds.values()])
        agree(experiment, [{k: run[k] for k in ("norm", "eps", "n")} for seeds in cells.values() for run in seeds.values() if "n" in run])
        comparable(experiment, {cell: next(iter(seeds.values())) for cell, seeds in cells.items()})
    for size, experiment in CURVE.items():
        sizes = {run["settings"].get("n_train") for seeds in found.get(experiment, {}).values() for run in seeds.values()}
        if sizes - {size}:
            raise cli.UserError(f"{experiment}: runs with --n-train {sizes}")
    return found


def check_name(name, cell, settings):
    """UserError where a cell's name is of no known form, or says another setting than its run has."""
    base, *form = cell.split(",")
    key, _, value = base.partition("=")
    if base not in CELLS and (form or key not in ABLATIONS):
        raise cli.UserError(f"{name}: neither a cell ({', '.join(CELLS)}), with ,<form> or without, nor a setting ({', '.join(ABLATIONS)})")
    if base not in CELLS and value == ABLATIONS[key][0]:
        raise cli.UserError(f"{name}: the default; its cell is {ABLATIONS[key][1]}")
    for part in form or [base]:
        key, _, value = part.partition("=")
        if key in settings and value != (f"{settings[key]:g}" if isinstance(settings[key], float) else str(settings[key])):
            raise cli.UserError(f"{name}: a run with {key} {settings[key]}")


def comparable(experiment, runs):
    """UserError where cells {name: run} of an experiment differ in more than is theirs to differ in."""
    named = {cell: {part.partition("=")[0] for part in cell.split(",")} for cell in runs}
    of_dra = set(vars(train_at_aux.parse_args([]))) - set(vars(train_at.parse_args([])))
    order = sorted(runs, key=lambda cell: cell not in CELLS)  # a setting is compared with a cell that has the defaults
    for cell, run in runs.items():
        alike = next(other for other in order if runs[other]["script"] == run["script"])
        for other, leave in ((alike, set()), (order[0], of_dra)):
            leave = leave | MAY_DIFFER | named[cell] | named[other]
            kept = [{key: value for key, value in runs[of]["settings"].items() if key not in leave} for of in (other, cell)]
            agree(f"{experiment}/{cell}", kept)
    for key, other in (("synthetic_sha256", OTHER_IMAGES), ("teacher_sha256", OTHER_TEACHER)):
        settings = [run["settings"] for cell, run in runs.items() if not named[cell] & other]
        agree(experiment, [{key: of[key]} for of in settings if key in of])


def agree(name, settings):
    for other in settings[1:]:
        if differ := sorted(key for key in settings[0] | other if settings[0].get(key) != other.get(key)):
            raise cli.UserError(f"{STORE}, {name}: its runs differ in {', '.join(differ)}; keep the lines of one kind")


# --------------------------------------------------------------------------------------------------------- statistics


def has(run, measure):
    return measure in ("held_out", "last") or "verdicts" in run and (measure != "autoattack" or run["attack"] == "autoattack")


def outcomes(cell, seeds, measure):
    """(seeds, images): 100 where the best checkpoint is right; of held-out images only their mean is kept, (seeds, 1). The mean is in %."""
    if measure in ("held_out", "last"):
        courses = [[100 * robust for _, _, robust in cell[seed]["held_out"]] for seed in seeds]
        return np.array([[max(course) if measure == "held_out" else course[-1]] for course in courses])
    return np.array([[100.0 * (int(v) >= WITHSTOOD[measure]) for v in cell[seed]["verdicts"]] for seed in seeds])


def effect(cells, pairs, measure):
    """Mean of A - B over pairs of cells, of every seed that all of them have: (seeds, images), (0, 1) without a seed. B None: A alone."""
    named = [cells.get(name, {}) for pair in pairs for name in pair if name]
    seeds = sorted(set.intersection(*({seed for seed, run in cell.items() if has(run, measure)} for cell in named)))
    if not seeds:
        return np.zeros((0, 1))
    return np.mean([outcomes(cells[a], seeds, measure) - (outcomes(cells[b], seeds, measure) if b else 0) for a, b in pairs], 0)


def accuracies(cells, cell, measure):
    return effect(cells, [(cell, None)], measure)


def over_seeds_and_images(values):
    """Half the width of a 95 % interval of the mean of (seeds, images), both random: the variance that a two-way layout gives (mean
    squares; a negative component counts as 0), with Satterthwaite's degrees of freedom."""
    n_seeds, n_images = values.shape
    by_seed, by_image = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = ((values - by_seed - by_image + values.mean()) ** 2).sum() / ((n_seeds - 1) * (n_images - 1))
    of_seeds = max(n_images * by_seed.var(ddof=1), rest)
    of_images = max(n_seeds * by_image.var(ddof=1), rest)
    total = of_seeds + of_images - rest
    if total == 0:
        return 0.0
    freedom = total**2 / (of_seeds**2 / (n_seeds - 1) + of_images**2 / (n_images - 1) + rest**2 / ((n_seeds - 1) * (n_images - 1)))
    return t.ppf(0.975, freedom) * (total / values.size) ** 0.5


def show(values, sign=""):
    """Mean ± half the interval over seeds (over seeds and images, never less)."""
    if len(values) < 2:
        return f"{values.mean():{sign}.1f}" if len(values) else "-"
    mean, low, _ = stats.t_interval(values.mean(1))
    both = f" ({max(over_seeds_and_images(values), mean - low):.1f})" if values.shape[1] > 1 else ""
    return f"{mean:{sign}.1f} ± {mean - low:.1f}{both}"


# --------------------------------------------------------------------------------------------------- tables and figures


def markdown(titles, rows):
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def n_seeds(found):
    """Of several measures: "10", or "10 or 3" where not all of a cell's runs were attacked."""
    return " or ".join(map(str, sorted({len(values) for values in found}, reverse=True)))


def cells_table(cells, measures):
    """Every cell's accuracies and, below, the effects."""
    found = {name: [accuracies(cells, cell, m) for m in measures] for cell, (name, _) in CELLS.items()}
    rows = [[name, n_seeds(of), *map(show, of)] for name, of in found.items() if len(of[-1])]
    lines = markdown(["accuracy, %", "seeds", *(MEASURES[m] for m in measures)], rows)
    found = {name: [effect(cells, pairs, m) for m in measures] for name, pairs in EFFECTS.items()}
    rows = [[name, n_seeds(of), *(show(values, "+") for values in of)] for name, of in found.items() if len(of[-1])]
    return lines + markdown(["effect, points", "seeds", *(MEASURES[m] for m in measures)], rows)


def on_curve(experiments):
    """{number of real images: cells} with two seeds or more of every cell of the 2 x 2."""
    found = {size: experiments[name] for size, name in CURVE.items() if name in experiments}
    return {size: cells for size, cells in found.items() if len(effect(cells, EFFECTS[IMAGES], "two_attacks")) > 1}


def curve_table(curve):
    rows = []
    for size, cells in curve.items():
        of = [effect(cells, EFFECTS[what], measure) for measure in ("two_attacks", "clean") for what in (IMAGES, DRA)]
        alone = [show(accuracies(cells, cell, "two_attacks")) for cell in ("at", "dm_at")]
        rows.append([size, n_seeds(of), *alone, *(show(values, "+") for values in of)])
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


def varied(cells):
    """{ablation: {setting: cell}} of settings attacked on three seeds or more, where one is not the default; first the cell without it."""
    found = {}
    for name, (_, cell, without) in ABLATIONS.items():
        settings = {s: c for s, c in settings_of(cells, name).items() if len(effect(cells, [(c, cell)], "two_attacks")) > 2}
        if len(settings) > 1:
            found[name] = {f"without ({CELLS[without][0]})": without} | settings
    return found


def together(cells, names):
    """The named cells with the seeds that were attacked in all of them: a default that is lucky or not is so for each of its settings."""
    seeds = sorted(set.intersection(*({seed for seed, run in cells[name].items() if has(run, "two_attacks")} for name in names)))
    return {name: {seed: cells[name][seed] for seed in seeds} for name in names}


def ablation_table(cells, ablations):
    rows = []
    for name, settings in ablations.items():
        _, reference, without = ABLATIONS[name]
        shared = together(cells, settings.values())
        for setting, cell in settings.items():
            of = [effect(shared, [(cell, reference)], measure) for measure in ("held_out", "two_attacks", "clean")]
            found = [n_seeds(of), *(show(values, "+") for values in of)] if cell != reference else ["", *["default"] * 3]
            row = [f"`{name}`", setting, CELLS[reference][0], *found]
            if cell != without or row[1:] not in [other[1:] for other in rows]:  # what is without stands once, if on the same seeds
                rows.append(row)
    return markdown(["", "setting", "of", "seeds", *(MEASURES[m] for m in ("held_out", "two_attacks", "clean"))], rows)


def forms_table(cells):
    """Cells <cell>,<what differs>,...: against the cell without DRA, and against the form that lacks only what differs last."""
    rows = []
    for name in sorted(name for name in cells if "," in name):
        base, *form = name.split(",")
        title = ", ".join([CELLS[base][0], *(f"`{part.removeprefix('variant=')}`" for part in form)])
        without = base.removesuffix("_dra")
        references = {CELLS[without][0]: without}
        if len(form) > 1:
            references[f"the same without `{form[-1]}`"] = ",".join([base, *form[:-1]])
        first = max((first for chosen, first in CHOSEN_ON.items() if name.startswith(chosen)), default=0)
        counted = {cell: {seed: run for seed, run in seeds.items() if seed >= first} for cell, seeds in cells.items()}
        for against, reference in references.items():
            of = [effect(counted, [(name, reference)], measure) for measure in ("held_out", "last", "two_attacks", "clean")]
            if len(of[0]):
                rows.append([title, against, n_seeds(of), *(show(values, "+") for values in of)])
    return markdown(["form", "against", "seeds", *(MEASURES[m] for m in ("held_out", "last", "two_attacks", "clean"))], rows)


def other_split(experiments):
    """One line on the synthetic images' effect with another choice of real images, where two seeds or more of it were attacked."""
    of = [effect(experiments.get(OTHER_SPLIT, {}), [("dm_at", "at")], measure) for measure in ("two_attacks", "clean")]
    if len(of[0]) < 2:
        return []
    robust, clean = (show(values, "+") for values in of)
    text = f"**Another 100 digits**, with a diffusion model of their own: the effect of its images, without DRA, is {robust} points"
    return [f"{text} under APGD-CE+T, {clean} clean ({len(of[0])} seeds).", ""]


def work(runs):
    """One line on what it took."""
    hours = [sum(run.get(key, 0) for run in runs.values()) / 3600 for key in ("train_seconds", "attack_seconds")]
    kinds = sorted({f"{e['device']}, Python {e['python']}, torch {e['torch']}" for e in (run["environment"] for run in runs.values())})
    versions = sorted({run["version"] for run in runs.values() if "version" in run})
    warnings = sum(bool(run.get("warnings")) for run in runs.values())
    text = f"{len(runs)} classifiers, one CPU core each: {hours[0]:.1f} hours of training, {hours[1]:.1f} of attacks"
    text += " (by the clock, with other work beside some; diffusion models and their images not counted)."
    return f"{text} {'; '.join(kinds + versions)}. Attacks that warned of a weakness of theirs: {warnings}."


def dots(axis, x, values, colour):
    """A dot per seed, and beside them the mean with its interval over seeds."""
    found = values.mean(1)
    axis.plot(np.full(len(found), x + 0.1), found, ".", color=colour, alpha=0.4)
    if len(found) > 1:
        mean, low, high = stats.t_interval(found)
        axis.errorbar(x - 0.1, mean, [[mean - low], [high - mean]], color=colour, marker="o", capsize=3)


def line(axis, x, samples, **style):
    """Means of samples (seeds, images), one for each x, with their intervals over seeds, joined."""
    found = np.array([stats.t_interval(sample.mean(1)) for sample in samples])
    axis.errorbar(x, found[:, 0], np.abs(found[:, 1:] - found[:, :1]).T, marker="o", capsize=3, **style)


def cells_figure(cells, path):
    """Accuracies of the cells, and the course of training."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1, 1, 1.3))
    shown = {cell: look for cell, look in CELLS.items() if len(accuracies(cells, cell, "autoattack"))}
    for axis, measure in zip(axes, ("clean", "autoattack")):
        for x, (cell, (_, colour)) in enumerate(shown.items()):
            dots(axis, x, accuracies(cells, cell, measure), colour)
        axis.set_xticks(range(len(shown)), [name.replace("+", "\n+").replace(", ", ",\n") for name, _ in shown.values()], fontsize=8)
        axis.set(ylabel="accuracy, %", title=f"test images, {MEASURES[measure]}")
    for cell, (name, colour) in shown.items():
        course = np.array([run["held_out"] for run in cells[cell].values()])  # (seeds, validations, [step, clean, robust])
        axes[2].plot(course[0, :, 0], 100 * course[..., 2].mean(0), color=colour, marker="o", markersize=3, label=name)
    axes[2].set(xlabel="step", ylabel="accuracy, %", title="held-out images, PGD-20, mean over seeds")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    save(figure, path)


def curve_figure(curve, path):
    """Accuracies and effects against the number of real images."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    sizes = np.array(list(curve))
    for k, (cell, (name, colour)) in enumerate(itertools.islice(CELLS.items(), 4)):
        samples = [accuracies(cells, cell, "two_attacks") for cells in curve.values()]
        line(axes[0], sizes * 1.03 ** (k - 1.5), samples, color=colour, label=name)
    axes[0].set(ylabel="accuracy, %", title=MEASURES["two_attacks"])
    for axis, measure in zip(axes[1:], ("two_attacks", "clean")):
        for k, (what, colour) in enumerate({IMAGES: "#009E73", DRA: "#E69F00"}.items()):
            samples = [effect(cells, EFFECTS[what], measure) for cells in curve.values()]
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


def ablation_figure(cells, name, settings, path):
    """Accuracies of every setting, a dot per seed."""
    default, reference, without = ABLATIONS[name]
    cells = together(cells, settings.values())
    figure, axes = plt.subplots(1, 2, figsize=(4 + 1.3 * len(settings), 3.6), layout="constrained")
    for axis, measure in zip(axes, ("two_attacks", "clean")):
        for x, cell in enumerate(settings.values()):
            colour = {reference: "#D55E00", without: "#999999"}.get(cell, "#0072B2")
            dots(axis, x, effect(cells, [(cell, reference)], measure), colour)
        axis.axhline(0, color="black", linewidth=0.8)
        labels = [setting.replace(" ", "\n").replace(".resnets", "\n.resnets") for setting in settings]
        axis.set_xticks(range(len(settings)), labels, fontsize=8)
        axis.set(ylabel="points above the default", title=f"{CELLS[reference][0]}, {MEASURES[measure]}", xlabel=f"{name} (0: {default})")
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure, path):
    with checkpoint.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def caption(cells, what):
    """One line above a table: what stands in it, and how many images were attacked, and how."""
    attacked = [run for seeds in cells.values() for run in seeds.values() if "n" in run]
    return [what + "".join(f" {run['n']} test images, {run['norm']} {run['eps']}." for run in attacked[:1]), ""]


def section(runs):
    """The lines of README between the marks, from the runs of docs/results.json."""
    experiments = by_cell(runs)
    cells, curve = experiments[MAIN], on_curve(experiments)
    ablations, forms = varied(cells), forms_table(cells)
    lines = in_short(cells) + caption(cells, "**100 digits.**") + cells_table(cells, list(MEASURES)) + zero_line(cells)
    lines += ["![Accuracies of every seed, and robust accuracy in the course of training](docs/results-cells.png)", ""]
    if len(curve) > 1:
        lines += caption(cells, "**More digits**; the diffusion model is trained on the same ones. Robust: APGD-CE+T.") + curve_table(curve)
        lines += ["![Accuracies and effects against the number of real images](docs/results-curve.png)", ""]
    lines += other_split(experiments)
    if ablations:
        what = "**One setting at a time**, 100 digits; points above the default, on the seeds that all settings have."
        lines += caption(cells, what) + ablation_table(cells, ablations)
        lines += [*(f"![Settings of {name}](docs/ablation-{name}.png)" for name in ablations), ""]
    if len(forms) > 3:
        what = "**Other forms**, 100 digits; points. Seeds by which a form was chosen do not count."
        lines += caption(cells, what) + forms
    if len(effect(experiments.get(SECOND, {}), EFFECTS[IMAGES], "two_attacks")) > 1:
        lines += caption(experiments[SECOND], "**Fashion-MNIST**, 6,400 real images, a diffusion model of 58,976.")
        lines += cells_table(experiments[SECOND], ["held_out", "last", "clean", "two_attacks"])
    return "\n".join([*lines, work(runs), ""])


def in_short(cells):
    """The two effects in one sentence."""
    of = {(what, measure): effect(cells, EFFECTS[what], measure) for what in (IMAGES, DRA) for measure in ("autoattack", "clean")}
    images, images_clean, dra, dra_clean = (show(values, "+") for values in of.values())
    if not len(of[IMAGES, "autoattack"]):
        return []
    text = f"**Synthetic images: {images} points of robust accuracy under AutoAttack, {images_clean} of clean; DRA: {dra} and {dra_clean}**"
    return [f"{text} (seeds: {n_seeds(of.values())}).", ""]


def zero_line(cells):
    """Weight 0 against DM-AT: were the weights the same?"""
    pairs = [(run, cells["dm_at"][seed]) for seed, run in cells.get("zero", {}).items() if seed in cells.get("dm_at", {})]
    same = sum(a["best_sha256"] == b["best_sha256"] for a, b in pairs)
    return [f"DM-AT+DRA with weight 0 ends with DM-AT's very weights on {same} of {len(pairs)} seeds.", ""] if pairs else []


def main(args):
    runs = take_in(args.add) if args.add else checkpoint.read_json(STORE)["runs"]
    with open(README) as file:
        before, begin, rest = file.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise cli.UserError(f"{README}: lacks the two lines between which the results stand")
    experiments = by_cell(runs)
    if MAIN not in experiments:
        raise cli.UserError(f"{STORE}: no run of {MAIN} yet")
    cells_figure(experiments[MAIN], "docs/results-cells.png")
    if len(on_curve(experiments)) > 1:
        curve_figure(on_curve(experiments), "docs/results-curve.png")
    for name, settings in varied(experiments[MAIN]).items():
        ablation_figure(experiments[MAIN], name, settings, f"docs/ablation-{name}.png")
    with checkpoint.atomic(README) as file:
        file.write((before + begin + section(runs) + end + after).encode())
    print(section(runs))


if __name__ == "__main__":
    cli.run(main, parse_args())
