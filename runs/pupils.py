"""Does DRA help where the teacher knows more than its pupil? A table and a figure.

A pupil is a classifier without DRA, of AT or DM-AT. What its teacher knows is measured by a linear
probe of the features that DRA takes, fitted on the labels that the pupil has.
"""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common import stats
from runs.effects import accuracies, effect, markdown, save_figure, show

EXPERIMENTS = {  # of docs/results.json: (data, labels)
    "cifar-1000": ("CIFAR-10", "1,000"),
    "cifar-5000": ("CIFAR-10", "5,000"),
    "cifar-all": ("CIFAR-10", "48,976"),
    "digits-100": ("digits", "100"),
    "digits-200": ("digits", "200"),
    "digits-500": ("digits", "500"),
    "fashion-6400": ("Fashion-MNIST", "6,400"),
}
PUPILS = {"AT": ("at", "at_dra"), "DM-AT": ("dm_at", "dm_at_dra")}  # without DRA, and with it
COLOURS = {"CIFAR-10": "#0072B2", "digits": "#E69F00", "Fashion-MNIST": "#009E73"}


@dataclass
class Pupil:
    """A kind of classifier in an experiment. Accuracies in %, effects in points."""

    data: str
    labels: str
    kind: str
    teacher: float  # accuracy of the probe
    untrained: float | None  # the same of the network before its training
    clean: np.ndarray  # accuracies without DRA, (seeds, images)
    effects: dict  # of DRA, {"clean", "two_attacks": (seeds, images)}

    @property
    def ahead(self):
        """Points by which the teacher's probe is above the pupil's clean accuracy."""
        return self.teacher - self.clean.mean()


def probed(probe, settings):
    """Accuracy, in %, of a stored probe at the block and noise level that a run of DRA took."""
    row = probe["blocks"].index(settings["block"])
    column = probe["sigmas"].index(settings["sigma"])
    return 100 * probe["accuracy"][row][column]


def pupils_of(experiments, probes):
    """A list of the Pupils whose teacher was probed and whose DRA was attacked on two seeds."""
    pupils = []
    for experiment, (data, labels) in EXPERIMENTS.items():
        cells = experiments.get(experiment, {})
        for kind, (without, with_dra) in PUPILS.items():
            pair = [(with_dra, without)]
            effects = {name: effect(cells, pair, name) for name in ("clean", "two_attacks")}
            if experiment not in probes or len(effects["clean"]) < 2:
                continue
            settings = next(iter(cells[with_dra].values()))["settings"]
            untrained = probes.get(f"{experiment}-untrained")
            pupil = Pupil(
                data=data,
                labels=labels,
                kind=kind,
                teacher=probed(probes[experiment], settings),
                untrained=probed(untrained, settings) if untrained else None,
                clean=accuracies(cells, without, "clean"),
                effects=effects,
            )
            pupils.append(pupil)
    return pupils


def table(pupils):
    """The lines of the table, the pupil furthest behind its teacher first."""
    titles = ["data", "labels", "pupil", "untrained teacher's probe", "teacher's probe"]
    titles += ["pupil, clean", "teacher ahead by", "seeds", "DRA, clean", "DRA, APGD-CE+T"]
    rows = []
    for pupil in sorted(pupils, key=lambda pupil: -pupil.ahead):
        untrained = "-" if pupil.untrained is None else f"{pupil.untrained:.1f}"
        row = [pupil.data, pupil.labels, pupil.kind, untrained, f"{pupil.teacher:.1f}"]
        row += [show(pupil.clean), f"{pupil.ahead:+.1f}", len(pupil.effects["clean"])]
        row += [show(pupil.effects[name], "+") for name in ("clean", "two_attacks")]
        rows.append(row)
    return markdown(titles, rows)


def figure(pupils, path):
    """The effect of DRA against the teacher's lead, with intervals over seeds."""
    drawing, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    names = {"clean": "clean accuracy", "two_attacks": "accuracy under APGD-CE+T"}
    for axis, (measure, name) in zip(axes, names.items()):
        for pupil in pupils:
            mean, low, high = stats.t_interval(pupil.effects[measure].mean(1))
            marker = "o" if pupil.kind == "AT" else "s"
            style = {"color": COLOURS[pupil.data], "marker": marker, "capsize": 3}
            axis.errorbar(pupil.ahead, mean, [[mean - low], [high - mean]], **style)
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(pupil.labels, (pupil.ahead, mean), **place)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel="teacher's probe above the pupil's clean accuracy, points")
        axis.set(ylabel="points", title=f"effect of DRA on {name}")
    for data in dict.fromkeys(pupil.data for pupil in pupils):
        axes[0].plot([], [], "o", color=COLOURS[data], label=f"{data} (with its labels)")
    for marker, kind in (("o", "AT"), ("s", "DM-AT")):
        axes[0].plot([], [], marker, color="black", label=f"pupil of {kind}")
    axes[0].legend(fontsize=8)
    save_figure(drawing, axes, path)
