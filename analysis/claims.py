"""The paper's claims on representations, judged by what analyze.py has measured.

The measurements are made by analyze.py, their formulae stand in analysis/metrics.py.

    python -m analysis.claims --analysis out/analysis-digits

Reads analysis.json and writes a Markdown table, claims.md, beside it. The models are named
standard, at, at_dra, dm_at, dm_at_dra, each with the same seeds in the same order, and teacher.

The difference of two kinds of classifiers is a mean over seeds, with Student's interval of the
paired differences. There is only one teacher: to its differences the mean intervals over images of
both sides are added, in quadrature. "yes" means that the 95 % interval lies on the claimed side of
0, "no" on the other. Where the claim is only that two differ, either side is a yes. The intervals
are not corrected for the number of claims.
"""

import os

import numpy as np

from common import UserError, cli, files
from common.stats import t_interval

TRAINED = ("standard", "at", "at_dra", "dm_at", "dm_at_dra")  # kinds of training runs
MORE, LESS, OTHER = 1, -1, 0  # the claimed sign of A - B
CLAIMS = {  # (metric, A, is claimed to be, than B): in words
    ("rank_me", "teacher", MORE, "standard"): (
        "Diffusion features are diverse: higher rank than a standard classifier's"
    ),
    ("rank_share", "teacher", MORE, "standard"): "The same, as a share of the number of features",
    ("robust", "teacher", MORE, "standard"): (
        "They are partly robust: more accurate under attack than a standard classifier"
    ),
    ("robust_third", "teacher", MORE, "standard"): "The same, at a third of the radius",
    ("high_frequencies", "teacher", LESS, "standard"): (
        "Their saliency has less of the high frequencies than a standard classifier's"
    ),
    ("high_frequencies", "at", LESS, "standard"): "So has a robust classifier's",
    ("rank_me", "dm_at", LESS, "at"): "Synthetic images lower the rank",
    ("rank_me", "dm_at_dra", LESS, "at_dra"): "The same, with DRA",
    ("sae", "at_dra", LESS, "at"): "DRA lowers the sparse autoencoder's error",
    ("sae", "dm_at_dra", LESS, "dm_at"): "The same, with synthetic images",
    ("dimension", "at_dra", MORE, "at"): "DRA raises the classification dimension",
    ("dimension", "dm_at_dra", MORE, "dm_at"): "The same, with synthetic images",
    ("rank_me", "at_dra", OTHER, "at"): "(not claimed) DRA changes the rank",
    ("rank_me", "dm_at_dra", OTHER, "dm_at"): "(not claimed) The same, with synthetic images",
    ("rank_me", "dm_at", OTHER, "at_dra"): (
        "Images and representations act differently: A and B differ in rank"
    ),
    ("sae", "dm_at", OTHER, "at_dra"): "In the sparse autoencoder's error",
    ("dimension", "dm_at", OTHER, "at_dra"): "In the classification dimension",
    ("teacher_cka", "at_dra", MORE, "at"): (
        "(check) DRA brings features nearer to the teacher's: CKA"
    ),
    ("teacher_cka", "dm_at_dra", MORE, "dm_at"): "(check) The same, with synthetic images",
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--analysis", default="out/analysis-digits", help="--out-dir of analyze.py")
    return parser.parse_args(argv)


def kind_of(settings):
    """Which of TRAINED a training run is, from its args.json."""
    if settings.get("loss") == "standard":
        return "standard"
    kind = "dm_at" if settings.get("synthetic") else "at"
    if settings.get("script") == "train_at_aux.py":
        kind += "_dra"
    return kind


def check_models(models, path):
    """Raises UserError unless the rows by name are those of one teacher and of equal seeds."""
    sizes = {name: len(rows) for name, rows in models.items()}
    n_seeds = sizes.get("at", 0)
    expected = dict.fromkeys(TRAINED, n_seeds) | {"teacher": 1}
    if sizes != expected or n_seeds < 2:
        wanted = f"one teacher, and {', '.join(TRAINED)} with as many models each, at least 2"
        raise UserError(f"{path}: expected {wanted}, found {sizes}")
    seeds = {}
    for name in TRAINED:
        seeds[name] = []
        for row in models[name]:
            args_path = os.path.join(os.path.dirname(row["path"]), "args.json")
            settings = files.read_json(args_path)
            kind = kind_of(settings)
            if kind != name:
                raise UserError(f"{args_path}: is of a run of the kind {kind}, given as {name}")
            seeds[name].append(settings.get("seed"))
        if seeds[name] != seeds["standard"] or len(set(seeds[name])) < n_seeds:
            both = f"the seeds of standard are {seeds['standard']}, those of {name} {seeds[name]}"
            raise UserError(f"{path}: {both}; expected the same, all different")


def add_metrics(result):
    """Add to every row the rank per feature and the similarity to the teacher."""
    rows = [row for of_name in result["models"].values() for row in of_name]
    teacher = result["cka"]["names"].index("teacher")
    for row, similarities in zip(rows, result["cka"]["matrix"]):  # both in the same order
        row["rank_share"] = [value / row["dim"] for value in row["rank_me"]]
        row["teacher_cka"] = [similarities[teacher]]


def judge(models, metric, a, sign, b):
    """(value of A, value of B, [A - B, low, high], "yes", "no" or "not resolved")."""
    measured_a = np.array([row[metric] for row in models[a]])  # (seeds, [value, low, high])
    measured_b = np.array([row[metric] for row in models[b]])
    differences = measured_a[:, 0] - measured_b[:, 0]
    difference, _, high = t_interval(differences)
    half_widths = [high - difference]
    if "teacher" in (a, b):
        for measured in (measured_a, measured_b):
            half_widths.append((measured[:, 2] - measured[:, 1]).mean() / 2)
    half_width = np.linalg.norm(half_widths)
    if not abs(difference) > half_width:
        verdict = "not resolved"
    elif sign == OTHER or sign * difference > 0:
        verdict = "yes"
    else:
        verdict = "no"
    bounds = [difference, difference - half_width, difference + half_width]
    return measured_a[:, 0].mean(), measured_b[:, 0].mean(), bounds, verdict


def main(args):
    path = os.path.join(args.analysis, "analysis.json")
    result = files.read_json(path)
    models = result.get("models", {})
    check_models(models, path)
    add_metrics(result)
    lines = ["| claim | measured | A | B | A - B (95 %) | agrees |", "|---" * 6 + "|"]
    for (metric, a, sign, b), claim in CLAIMS.items():
        value_a, value_b, (mean, low, high), verdict = judge(models, metric, a, sign, b)
        values = f"{value_a:.3g} | {value_b:.3g} | {mean:+.3g} ({low:+.3g} to {high:+.3g})"
        lines.append(f"| {claim} | {metric}: {a} - {b} | {values} | {verdict} |")
    about = f"{len(models['at'])} seeds, {models['at'][0]['n']} test images."
    text = "\n".join([*lines, "", about, ""])
    files.write_text(text, os.path.join(args.analysis, "claims.md"))
    print(text, end="")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
