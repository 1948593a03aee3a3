"""Does the verdict on a teacher predict what DRA gives? A table and a figure.

A verdict (extract_features.py --verdict) is made before DRA is trained: by how much the teacher's
linear probe, fitted on the labels that a classifier has, is above that classifier, its pupil. The
pupil is a run of AT; it stands for those of DM-AT, too.
"""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import spearmanr

from common import UserError, stats
from runs import store
from runs.effects import effect, markdown, save_figure, show

EXPERIMENTS = {  # of docs/results.json, perhaps with a form of DRA's cells: (data, labels)
    "cifar-1000": ("CIFAR-10", "1,000"),
    "cifar-1000,untrained": ("CIFAR-10", "1,000, untrained teacher"),
    "cifar-5000": ("CIFAR-10", "5,000"),
    "cifar-all": ("CIFAR-10", "48,976"),
    "digits-100": ("digits", "100"),
    "digits-200": ("digits", "200"),
    "digits-500": ("digits", "500"),
    "digits-800": ("digits", "800"),
    "digits-long-tail": ("digits", "178, long tail"),
    "fashion-6400": ("Fashion-MNIST", "6,400"),
}
KINDS = {"AT": ("at", "at_dra"), "DM-AT": ("dm_at", "dm_at_dra")}  # without DRA, and with it
MEASURES = {"clean": "clean accuracy", "two_attacks": "accuracy under APGD-CE+T"}
STATISTICS = {  # of a verdict
    "lead": "teacher's probe above the pupil",
    "above_control": "teacher's probe above the same with shuffled weights",
    "right_where_pupil_errs": "teacher's probe, where the pupil is wrong",
    "cka": "CKA of teacher and pupil",
    "pupil": "the pupil's clean accuracy, for comparison",
}
COLOURS = {"CIFAR-10": "#0072B2", "digits": "#E69F00", "Fashion-MNIST": "#009E73"}


@dataclass
class Prediction:
    """A verdict, and what DRA gave to one kind of classifier."""

    data: str
    labels: str
    kind: str  # of KINDS
    verdict: dict  # of analysis/verdict.py
    effects: dict  # of DRA in points, {measure: (seeds, images)}

    @property
    def lead(self):
        """[points of the probe above the pupil, low, high]."""
        return [100 * share for share in self.verdict["lead"]]


def predictions_of(experiments, verdicts):
    """A Prediction for every experiment with a verdict whose DRA was attacked on two seeds.

    Raises UserError where the verdict is on other labels or on another teacher than that of the
    runs. Rows that are too old to tell their teacher (the hash is a list) are taken.
    """
    predictions = []
    for experiment, (data, labels) in EXPERIMENTS.items():
        name, comma, form = experiment.partition(",")
        cells = experiments.get(name, {})
        for kind, (without, with_dra) in KINDS.items():
            with_dra += comma + form
            effects = {
                measure: effect(cells, [(with_dra, without)], measure) for measure in MEASURES
            }
            if experiment in verdicts and len(effects["clean"]) > 1:
                verdict = verdicts[experiment]
                for run in cells[with_dra].values():
                    if any(run["settings"].get(key) != verdict[key] for key in store.LABELS):
                        raise UserError(f"{experiment}: the verdict is on other labels")
                    teacher = run["settings"].get("teacher_sha256")
                    if isinstance(teacher, str) and teacher != verdict["network_sha256"]:
                        raise UserError(f"{experiment}: the verdict is on another teacher")
                predictions.append(Prediction(data, labels, kind, verdict, effects))
    return predictions


def table(predictions):
    """The lines of the table, the pupil furthest behind its teacher first."""
    titles = ["data", "labels", "weights shuffled", "teacher", "attacked", "pupil (AT)"]
    titles += ["teacher ahead by", "DRA may help?", "DRA added to", "seeds", "clean", "APGD-CE+T"]
    rows = []
    for prediction in sorted(predictions, key=lambda prediction: -prediction.lead[0]):
        verdict = prediction.verdict
        row = [prediction.data, prediction.labels]
        row += [
            f"{100 * verdict[name][0]:.1f}" for name in ("control", "probe", "attacked", "pupil")
        ]
        lead, low, high = prediction.lead
        row += [f"{lead:+.1f} ({low:+.1f} to {high:+.1f})", verdict["answer"], prediction.kind]
        row += [len(prediction.effects["clean"])]
        row += [show(prediction.effects[name], "+") for name in MEASURES]
        rows.append(row)
    return markdown(titles, rows)


def gains_table(predictions):
    """The lines of a table: for each answer of the verdict, in how many rows DRA gained or lost."""
    rows = []
    for answer in dict.fromkeys(prediction.verdict["answer"] for prediction in predictions):
        told = [prediction for prediction in predictions if prediction.verdict["answer"] == answer]
        row = [answer, len(told)]
        for measure in MEASURES:
            effects = [prediction.effects[measure].mean(1) for prediction in told]
            intervals = [stats.t_interval(of_seeds) for of_seeds in effects]
            gains = sum(low > 0 for _, low, _ in intervals)
            losses = sum(high < 0 for _, _, high in intervals)
            row.append(f"{gains} gained, {losses} lost")
        rows.append(row)
    return markdown(["DRA may help?", "rows", "clean", "APGD-CE+T"], sorted(rows))


def correlations(predictions):
    """The lines of a table: Spearman's correlation of each statistic with the effects.

    Without a p: the verdicts of a data set are not independent.
    """
    rows = []
    for statistic, name in STATISTICS.items():
        predicted = [prediction.verdict[statistic][0] for prediction in predictions]
        row = [name]
        for measure in MEASURES:
            measured = [prediction.effects[measure].mean() for prediction in predictions]
            constant = len(set(predicted)) == 1 or len(set(measured)) == 1
            row.append("-" if constant else f"{spearmanr(predicted, measured).statistic:+.2f}")
        rows.append(row)
    titles = [f"rank correlation over {len(predictions)} rows"]
    return markdown([*titles, "clean", "APGD-CE+T"], rows)


def figure(predictions, path):
    """The effect of DRA against the teacher's lead, with intervals over seeds."""
    drawing, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for axis, measure in zip(axes, MEASURES):
        draw(axis, predictions, measure)
    for data in dict.fromkeys(prediction.data for prediction in predictions):
        axes[0].plot([], [], "o", color=COLOURS[data], label=f"{data} (with its labels)")
    for marker, kind in (("o", "AT"), ("s", "DM-AT")):
        axes[0].plot([], [], marker, color="black", label=f"added to {kind}")
    axes[0].legend(fontsize=8)
    save_figure(drawing, axes, path)


def draw(axis, predictions, measure):
    """One effect against the lead: a point with its interval per prediction."""
    for prediction in predictions:
        lead = prediction.lead[0]
        mean, low, high = stats.t_interval(prediction.effects[measure].mean(1))
        marker = "o" if prediction.kind == "AT" else "s"
        style = {"color": COLOURS[prediction.data], "marker": marker, "capsize": 3}
        axis.errorbar(lead, mean, [[mean - low], [high - mean]], **style)
        if prediction.kind == "AT":  # that of DM-AT stands at the same lead
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(prediction.labels, (lead, mean), **place)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="teacher's probe above the pupil, points")
    axis.set(ylabel="points", title=f"effect of DRA on {MEASURES[measure]}")
