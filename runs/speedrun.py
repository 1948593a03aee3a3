"""Robust accuracy per hour: the recipe that reaches a robust accuracy with the fewest passes.

    bash runs/speedrun.sh                       # trains, attacks, and calls the line below
    python -m runs.speedrun out/speedrun  # from runs <data set>/<recipe>/<seed>

Writes the tables of docs/speedrun.md. A recipe may change the settings FREE of the base, and no
other. It reaches the target where its mean over the seeds 0 to 9 is above it, by Student's
one-sided test with p < 0.01 / number of recipes. Its cost is the number of passes in training: a
pass is a forward or a backward pass of one image. Validation is not counted in passes; it is in the
seconds.
"""

import glob
import os
import statistics

from scipy.stats import ttest_1samp

from common import UserError, cli
from published.datasets import DATASETS
from runs import effects, store
from runs.results import write_between

PAGE = "docs/speedrun.md"
TARGETS = {"digits": 82.0}  # robust accuracy in %, APGD-CE+T
N_IMAGES = {"digits": 797}  # first test images, that are attacked
FREE = {
    "loss",
    "beta",
    "label_smoothing",
    "mixup",
    "cutmix",
    "n_steps",
    "step_size",
    "optimizer",
    "epochs",
    "epoch_images",
    "batch_size",
    "lr",
    "warmup_fraction",
    "momentum",
    "betas",
    "final_lr",
    "weight_decay",
    "clip_norm",
    "bn_momentum",
    "ema_decay",
    "eval_every",
}
FIRST = "base"  # the recipe that the others are compared with
SEEDS = list(range(10))  # these and no others: nobody chooses seeds, or adds some until it fits
LARGEST_P = 0.01  # over all recipes of a table together


def passes_per_image(settings):
    """Forward and backward passes of an image in a training step, by the settings of train_at.py.

    Two in each step of PGD, two for the loss of the image, two for that of its attacked double. The
    clean logits that TRADES' attack refers to are those of the loss. Other attacks are not FREE.
    """
    attack = 2 * settings["n_steps"]
    return {"standard": 2, "pgd": attack + 2, "trades": attack + 4}[settings["loss"]]


def passes(row):
    """Passes of a whole training. row: of runs/store.py."""
    n_steps = row["held_out"][-1][0]
    return n_steps * row["settings"]["batch_size"] * passes_per_image(row["settings"])


def read_recipes(directory, dataset):
    """{recipe: [row of each seed]} from the runs <recipe>/<seed>, as runs/store.py reads them.

    Raises UserError where a run is of another script, data set or seed than it should be, was not
    attacked as it should be, or differs from the base in what is not FREE; and where a recipe has
    runs of several settings or one seed alone.
    """
    attack = (DATASETS[dataset].eps["linf"], N_IMAGES[dataset])
    recipes = {}
    for path in sorted(glob.glob(f"{glob.escape(directory)}/*/*/args.json")):
        folder = os.path.dirname(path)
        name, seed = folder.split(os.sep)[-2:]
        row = store.read_run(folder)
        if row is None or "verdicts" not in row:
            raise UserError(
                f"{folder}: not trained to its end, or not attacked; repeat its command"
            )
        trained = row["script"], row["settings"]["dataset"]
        if trained != ("train_at.py", dataset):
            raise UserError(f"{folder}: expected a run of train_at.py on {dataset}")
        if str(row["seed"]) != seed:
            raise UserError(f"{folder}: a run with --seed {row['seed']}")
        if row["seed"] not in SEEDS:
            raise UserError(f"{folder}: expected the seeds {SEEDS[0]} to {SEEDS[-1]} and no others")
        if row["warnings"]:
            raise UserError(f"{folder}: its attack warned: {row['warnings'][0]}")
        if (row["norm"], row["eps"], row["n"]) != ("linf", *attack):
            expected = f"{cli.threat('linf', attack[0])} on {attack[1]} images"
            found = f"{cli.threat(row['norm'], row['eps'])} on {row['n']}"
            raise UserError(f"{folder}: attacked with {found}, expected {expected}")
        rows = recipes.setdefault(name, [])
        if rows and store.differences(rows[0], row):
            differing = ", ".join(store.differences(rows[0], row))
            raise UserError(f"{folder}: differs from the seed before it in {differing}")
        rows.append(row)
    if FIRST not in recipes:
        raise UserError(f"{directory}: no runs {FIRST}/<seed> there")
    for name, rows in recipes.items():
        if len(rows) < 2:
            raise UserError(f"{directory}/{name}: one seed, expected at least two")
        differing = store.differences(recipes[FIRST][0], rows[0], FREE)
        if differing:
            message = (
                f"differs from {FIRST} in {', '.join(differing)}, which a recipe may not change"
            )
            raise UserError(f"{directory}/{name}: {message}")
    return recipes


def flags(base, row):
    """What a recipe changes of the base, as flags."""
    words = []
    for name in store.differences(base, row):
        value = row["settings"][name]
        values = value if isinstance(value, list) else [value]
        written = [cli.number(v) if isinstance(v, float) else str(v) for v in values]
        words += [f"--{name.replace('_', '-')}", *written]
    return " ".join(words)


def table(recipes, target):
    """The lines of the Markdown table, the cheapest recipe last. recipes: of read_recipes."""
    base = recipes[FIRST][0]
    titles = ["recipe", "passes", "of the base", "seconds", "clean, %", "robust, %"]
    titles += [f"p of {target:g} %"]
    lines = []
    for name, rows in sorted(recipes.items(), key=lambda item: -passes(item[1][0])):
        cell = {row["seed"]: row for row in rows}
        clean = effects.outcomes(cell, cell, "clean")
        robust = effects.outcomes(cell, cell, "two_attacks").mean(1)
        p = ttest_1samp(robust, target, alternative="greater").pvalue
        reached = p < LARGEST_P / len(recipes) and len(rows) == len(SEEDS)
        change = f"`{flags(base, rows[0])}`" if name != FIRST else "the defaults"
        line = [
            f"{name}: {change}",
            f"{passes(rows[0]) / 1e6:.2f} M",
            f"{passes(rows[0]) / passes(base):.0%}",
            f"{statistics.mean(row['train_seconds'] for row in rows):.0f}",
            f"{clean.mean():.1f}",
            f"{robust.mean():.2f} ± {robust.std(ddof=1):.2f} ({len(rows)})",
            f"{p:.2g}, {'**reached**' if reached else 'not reached'}",
        ]
        lines.append(line)
    where = {
        f"{row['environment']['device']}, torch {row['environment']['torch']}"
        for rows in recipes.values()
        for row in rows
    }
    limit = f"Reached: p below {LARGEST_P} / {len(recipes)}, the number of recipes"
    remark = f"± is the standard deviation over (n) seeds. {limit}. {'; '.join(sorted(where))}."
    return [*effects.markdown(titles, lines), remark]


def markers(name):
    """The two lines of the page between which the table of a data set stands."""
    return f"<!-- runs/speedrun.py, {name} -->\n", f"<!-- end of {name} -->\n"


def main(args):
    directories = {name: os.path.join(args.directory, name) for name in TARGETS}
    found = {name: path for name, path in directories.items() if os.path.isdir(path)}
    if not found:
        raise UserError(f"{args.directory}: no runs of {' or '.join(TARGETS)} there")
    for name, path in found.items():
        text = "\n".join(table(read_recipes(path, name), TARGETS[name]))
        print(text)
        write_between(PAGE, markers(name), f"{text}\n")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("directory", help="of the runs <data set>/<recipe>/<seed>")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
