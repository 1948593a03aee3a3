"""The fewest passes of the network to a robust accuracy, by Student's test over ten seeds.

    bash runs/speedrun.sh                       # trains, attacks, and calls the last line
    python -m runs.speedrun                     # from docs/speedrun.json alone
    python -m runs.speedrun --add out/speedrun  # first add the runs <data set>/<recipe>/<seed>

Writes the tables of docs/speedrun.md. A recipe may change the settings FREE of the base, and no
other. It reaches the target where its mean over the seeds 0 to 9 is above it, by Student's
one-sided test with p < 0.01 / number of recipes beside the base, which sets the target. Its cost is
the number of passes in training: a pass is a forward or a backward pass of one image. Validation is
not counted in passes; it is in the seconds.
"""

import glob
import os
import statistics

from scipy.stats import ttest_1samp

from common import UserError, cli, files
from published.datasets import DATASETS
from runs import effects, store

PAGE = "docs/speedrun.md"
STORE = "docs/speedrun.json"  # {"<data set>/<recipe>/<seed>": row}, rows as in runs/store.py
TARGETS = {"digits": 82.0, "cifar10": 14.5}  # robust accuracy in %, APGD-CE+T
N_IMAGES = {"digits": 797, "cifar10": 500}  # first test images, that are attacked
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
    "weight_decay",
    "clip_norm",
    "ema_decay",
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


def read_runs(root):
    """{"<data set>/<recipe>/<seed>": row} of the runs below a directory.

    Raises UserError where there is none, or one is not trained to its end or not attacked.
    """
    rows = {}
    for path in sorted(glob.glob(f"{glob.escape(root)}/*/*/*/args.json")):
        folder = os.path.dirname(path)
        row = store.read_run(folder)
        if row is None or "verdicts" not in row:
            raise UserError(
                f"{folder}: not trained to its end, or not attacked; repeat its command"
            )
        rows["/".join(folder.split(os.sep)[-3:])] = row
    if not rows:
        raise UserError(f"--add {root}: no runs <data set>/<recipe>/<seed> there")
    return rows


def check_row(name, row):
    """Raises UserError where a run is not of this table, or was not attacked as it should be."""
    dataset, _, seed = name.split("/")
    if dataset not in TARGETS:
        raise UserError(f"{name}: expected a data set of {', '.join(TARGETS)}")
    if (row["script"], row["settings"]["dataset"]) != ("train_at.py", dataset):
        raise UserError(f"{name}: expected a run of train_at.py on {dataset}")
    if str(row["seed"]) != seed:
        raise UserError(f"{name}: a run with --seed {row['seed']}")
    if row["seed"] not in SEEDS:
        raise UserError(f"{name}: expected the seeds {SEEDS[0]} to {SEEDS[-1]} and no others")
    if row["warnings"]:
        raise UserError(f"{name}: its attack warned: {row['warnings'][0]}")
    attack = ("linf", DATASETS[dataset].eps["linf"], N_IMAGES[dataset])
    if (row["norm"], row["eps"], row["n"]) != attack:
        expected = f"{cli.threat(*attack[:2])} on {attack[2]} images"
        found = f"{cli.threat(row['norm'], row['eps'])} on {row['n']}"
        raise UserError(f"{name}: attacked with {found}, expected {expected}")


def by_recipe(rows):
    """{data set: {recipe: [row of each seed]}}. rows: of read_runs.

    Raises UserError where a run does not belong in the table or differs from the base in what is
    not FREE; and where a recipe has runs of several settings or one seed alone.
    """
    recipes = {}
    for name, row in sorted(rows.items()):
        check_row(name, row)
        dataset, recipe, _ = name.split("/")
        of_seeds = recipes.setdefault(dataset, {}).setdefault(recipe, [])
        if of_seeds and store.differences(of_seeds[0], row):
            differing = ", ".join(store.differences(of_seeds[0], row))
            raise UserError(f"{name}: differs from the seed before it in {differing}")
        of_seeds.append(row)
    for dataset, of_dataset in recipes.items():
        if FIRST not in of_dataset:
            raise UserError(f"{dataset}: no runs {dataset}/{FIRST}/<seed>")
        for recipe, of_seeds in of_dataset.items():
            if len(of_seeds) < 2:
                raise UserError(f"{dataset}/{recipe}: one seed, expected at least two")
            differing = store.differences(of_dataset[FIRST][0], of_seeds[0], FREE)
            if differing:
                message = f"in {', '.join(differing)}, which a recipe may not change"
                raise UserError(f"{dataset}/{recipe}: differs from {FIRST} {message}")
            most = len(of_dataset[FIRST][0]["held_out"])
            if len(of_seeds[0]["held_out"]) > most:
                message = f"validates more often than {FIRST} ({most} times)"
                raise UserError(f"{dataset}/{recipe}: {message}")
        cells = {name: dict(enumerate(of_seeds)) for name, of_seeds in of_dataset.items()}
        store.check_attacks(dataset, cells)
    return recipes


def flags(base, row):
    """What a recipe changes of the base, as flags."""
    words = []
    for name in store.differences(base, row):
        value = row["settings"][name]
        written = cli.number(value) if isinstance(value, float) else str(value)
        words += [f"--{name.replace('_', '-')}", written]
    return " ".join(words)


def table(recipes, target):
    """The lines of the Markdown table, the cheapest recipe last. recipes: {name: rows of seeds}."""
    base = recipes[FIRST][0]
    n_others = len(recipes) - 1
    titles = ["recipe", "passes", "of the base", "seconds", "clean, %", "robust, %"]
    titles += [f"p of {target:g} %"]
    lines = []
    for name, rows in sorted(recipes.items(), key=lambda item: -passes(item[1][0])):
        cell = {row["seed"]: row for row in rows}
        clean = effects.outcomes(cell, cell, "clean")
        robust = effects.outcomes(cell, cell, "two_attacks").mean(1)
        outcome = "sets the target"
        if name != FIRST:
            p = ttest_1samp(robust, target, alternative="greater").pvalue
            reached = p < LARGEST_P / n_others and len(rows) == len(SEEDS)
            outcome = f"{p:.2g}, {'**reached**' if reached else 'not reached'}"
        line = [
            name if name == FIRST else f"{name}: `{flags(base, rows[0])}`",
            f"{passes(rows[0]) / 1e6:.2f} M",
            f"{passes(rows[0]) / passes(base):.0%}",
            f"{statistics.mean(row['train_seconds'] for row in rows):.0f}",
            f"{clean.mean():.1f}",
            f"{robust.mean():.2f} ± {robust.std(ddof=1):.2f} ({len(rows)})",
            outcome,
        ]
        lines.append(line)
    where = {
        f"{row['environment']['device']}, torch {row['environment']['torch']}"
        for rows in recipes.values()
        for row in rows
    }
    remark = f"± is the standard deviation over (n) seeds. {'; '.join(sorted(where))}."
    if n_others:
        remark += f" Reached: p below {LARGEST_P} / {n_others}, the number of recipes but the base."
    return [*effects.markdown(titles, lines), remark]


def main(args):
    rows = files.read_json(STORE) if os.path.exists(STORE) else {}
    if args.add:
        rows |= read_runs(args.add)
    recipes = by_recipe(rows)  # raises before anything is written
    files.write_text(store.as_json(rows) + "\n", STORE)
    for dataset, of_dataset in recipes.items():
        text = "\n".join(table(of_dataset, TARGETS[dataset]))
        print(text)
        files.write_between(PAGE, f"python -m runs.speedrun, {dataset}", f"{text}\n")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--add", type=cli.path, help="directory of runs <data set>/<recipe>/<seed>")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
