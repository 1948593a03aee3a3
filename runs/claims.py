"""The paper's claims on representations against analysis.json of analyze.py: a Markdown table, claims.md beside it.

python -m runs.claims --analysis out/analysis-digits

The models are named standard, at, at_dra, dm_at, dm_at_dra, each with the same seeds in the same order, and teacher. Differences of two
kinds of classifiers are paired by seed; the teacher is one network, to whose differences both sides' intervals over images are added, in
quadrature. "yes" and "no": the 95 % interval (Student's t) lies on the claimed, or the other, side of 0; where the claim is that two
differ, either side is a yes. Not corrected for the number of claims.
"""

import os

import numpy as np

from common import checkpoint, cli
from common.representations import interval

KINDS = ("standard", "at", "at_dra", "dm_at", "dm_at_dra", "teacher")
CLAIMS = [  # (what is claimed, metric, A, B, sign of A - B that is claimed, 0 for either)
    ("Diffusion features are diverse: higher rank than a standard classifier's", "rank_me", "teacher", "standard", 1),
    ("The same, as a share of the number of features", "rank_share", "teacher", "standard", 1),
    ("They are partly robust: more accurate under attack than a standard classifier", "robust", "teacher", "standard", 1),
    ("The same, at a third of the radius", "robust_third", "teacher", "standard", 1),
    ("Their saliency has less of the high frequencies than a standard classifier's", "high_frequencies", "teacher", "standard", -1),
    ("So has a robust classifier's", "high_frequencies", "at", "standard", -1),
    ("Synthetic images lower the rank", "rank_me", "dm_at", "at", -1),
    ("The same, with DRA", "rank_me", "dm_at_dra", "at_dra", -1),
    ("DRA lowers the sparse autoencoder's error", "sae", "at_dra", "at", -1),
    ("The same, with synthetic images", "sae", "dm_at_dra", "dm_at", -1),
    ("DRA raises the classification dimension", "dimension", "at_dra", "at", 1),
    ("The same, with synthetic images", "dimension", "dm_at_dra", "dm_at", 1),
    ("(not claimed) DRA changes the rank", "rank_me", "at_dra", "at", 0),
    ("(not claimed) The same, with synthetic images", "rank_me", "dm_at_dra", "dm_at", 0),
    ("Images and representations act differently: A and B differ in rank", "rank_me", "dm_at", "at_dra", 0),
    ("In the sparse autoencoder's error", "sae", "dm_at", "at_dra", 0),
    ("In the classification dimension", "dimension", "dm_at", "at_dra", 0),
    ("(check) DRA brings features nearer to the teacher's: CKA", "teacher_cka", "at_dra", "at", 1),
    ("(check) The same, with synthetic images", "teacher_cka", "dm_at_dra", "dm_at", 1),
]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--analysis", default="out/analysis-digits", help="--out-dir of analyze.py")
    return parser.parse_args(argv)


def kind_of(settings):
    """The name of a training run, one of KINDS, from its args.json."""
    if settings.get("loss") == "standard":
        return "standard"
    return ("dm_at" if settings.get("synthetic") else "at") + ("_dra" if settings.get("script") == "train_at_aux.py" else "")


def judge(result, metric, a, b, sign):
    """(value of A, value of B, [difference, low, high], yes | no | not resolved)."""
    found = {name: np.array([row[metric] for row in result["models"][name]]) for name in (a, b)}  # (seeds, [value, low, high])
    difference, low, high = interval([{"d": [value]} for value in found[a][:, 0] - found[b][:, 0]], "d")
    of_images = [(found[name][:, 2] - found[name][:, 1]).mean() / 2 for name in (a, b)] if "teacher" in (a, b) else []
    half = np.linalg.norm([(high - low) / 2, *of_images])
    verdict = "not resolved" if not abs(difference) > half else "yes" if sign == 0 or sign * difference > 0 else "no"
    return found[a][:, 0].mean(), found[b][:, 0].mean(), [difference, difference - half, difference + half], verdict


def main(args):
    path = os.path.join(args.analysis, "analysis.json")
    result = checkpoint.read_json(path)
    sizes = {name: len(rows) for name, rows in result.get("models", {}).items()}
    n_seeds = sizes.get("at", 0)
    if sizes != dict.fromkeys(KINDS[:-1], n_seeds) | {"teacher": 1} or n_seeds < 2:
        raise cli.UserError(
            f"{path}: expected one teacher, and {', '.join(KINDS[:-1])} with as many models each, at least 2, found {sizes}"
        )
    seeds = {}
    for name in KINDS[:-1]:
        runs = [os.path.join(os.path.dirname(row["path"]), "args.json") for row in result["models"][name]]
        settings = [checkpoint.read_json(run) for run in runs]
        for run, of in zip(runs, settings):
            if kind_of(of) != name:
                raise cli.UserError(f"{run}: is of a run of the kind {kind_of(of)}, given as {name}")
        seeds[name] = [of.get("seed") for of in settings]
        if seeds[name] != seeds["standard"] or len(set(seeds[name])) < n_seeds:
            raise cli.UserError(
                f"{path}: the seeds of standard are {seeds['standard']}, those of {name} {seeds[name]}; expected the same, all different"
            )
    rows = [row for of in result["models"].values() for row in of]  # in the order of the similarities
    teacher = result["cka"]["names"].index("teacher")
    for row, similarities in zip(rows, result["cka"]["matrix"]):
        row["rank_share"], row["teacher_cka"] = [value / row["dim"] for value in row["rank_me"]], [similarities[teacher]]
    lines = ["| claim | measured | A | B | A - B (95 %) | agrees |", "|---" * 6 + "|"]
    for text, metric, a, b, sign in CLAIMS:
        value_a, value_b, (mean, low, high), verdict = judge(result, metric, a, b, sign)
        measured = f"{metric}: {a} - {b}"
        lines.append(f"| {text} | {measured} | {value_a:.3g} | {value_b:.3g} | {mean:+.3g} ({low:+.3g} to {high:+.3g}) | {verdict} |")
    text = "\n".join(lines) + f"\n\n{n_seeds} seeds, {rows[0]['n']} test images.\n"
    with checkpoint.atomic(os.path.join(args.analysis, "claims.md")) as file:
        file.write(text.encode())
    print(text, end="")


if __name__ == "__main__":
    cli.run(main, parse_args())
