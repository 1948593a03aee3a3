"""Will this teacher help a classifier? The verdict of extract_features.py --verdict.

A teacher can only teach what it knows. What it knows of the classes is measured by linear probes of
its features, fitted on the labels that the classifier has: its pupil. The probes are held against
those of a control, the same network with its weights shuffled, and against the pupil itself, all on
the same held-out images. Only clean accuracy is compared, not robustness. docs/verdict.md tells
whether a verdict predicts the effect of DRA.

The probes are fitted in extract_features.py; `correct` is always a bool array with an entry per
held-out image, `attacked` one per attacked image: the first of them.
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from common import UserError, cli, data, files, run, stats

ANSWERS = {  # what the page says
    "may help": "It may help",
    "cannot tell": "It cannot be told",
    "no gain expected": "No gain is to be expected",
}


MIN_IMAGES = 64  # held-out images; with fewer no difference of interest is told from chance
NOTHING = 0.05  # a lead over shuffled weights that lies below this for certain counts as none


# -------------------------------------------------------------------------- what is measured


def shuffle_weights(net, seed):
    """Put the entries of every parameter in a random order: the network forgets what it learned.

    The weights keep their distribution, so that no published family needs its own initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


@torch.no_grad()
def look_at(pupil, images, batch_size, precision, device):
    """(predicted labels (N,), penultimate features (N, D)) of a classifier, NumPy arrays.

    images: uint8 (N, H, W, C). Raises UserError where the logits are not finite.
    """
    parts = []
    for ids in data.batches_of(len(images), batch_size):
        x = data.to_x(images[ids], device)
        with run.autocast(device, precision):
            logits, features = pupil(x, with_features=True)
        if not logits.isfinite().all():
            raise UserError("--pupil: the classifier's logits are not finite")
        parts.append((logits.argmax(1).cpu(), features.float().cpu()))
    return [torch.cat(values).numpy() for values in zip(*parts)]


# ---------------------------------------------------------------------------- what it concludes


def best_place(probes, images=slice(None)):
    """(block, sigma) of the probe that is most accurate on some images; the first one of equals.

    probes: {(block, sigma): {"correct": (N,)}}. images: an index of their N images, default all.
    """
    return max(probes, key=lambda place: probes[place]["correct"][images].mean())


def correct_at_best(probes):
    """Which of the N images are right at the best place, (N,). No image has chosen its own place.

    Images of even number are judged at the place that is best on the odd ones, and the odd ones at
    that which is best on the even ones. The best place on all images would look better than it is.
    """
    even, odd = slice(0, None, 2), slice(1, None, 2)
    correct = probes[best_place(probes, odd)]["correct"].copy()
    correct[odd] = probes[best_place(probes, even)]["correct"][odd]
    return correct


def judge(probes, control, pupil=None, cka=None):
    """A dict of all that the page and the picture show.

    probes: {(block, sigma): {"correct": (N,)[, "attacked": (M,)]}} of the network. control: the
    same of the network with shuffled weights. pupil: its correct (N,), None without one. cka:
    linear CKA of the pupil's features with the network's at the best place, [value, low, high].
    """
    block, sigma = best_place(probes)
    control_block, control_sigma = best_place(control)
    correct = correct_at_best(probes)
    control_correct = correct_at_best(control)
    verdict = {
        "n": len(correct),
        "block": block,
        "sigma": sigma,
        "probe": stats.share(correct),
        "control_block": control_block,
        "control_sigma": control_sigma,
        "control": stats.share(control_correct),
        "above_control": difference(correct, control_correct),
        "noise_levels": shape_over_noise(probes, block),
    }
    attacked = probes[block, sigma].get("attacked")
    if attacked is not None:
        verdict |= {"n_attacked": len(attacked), "attacked": stats.share(attacked)}
    if pupil is not None:
        verdict |= {
            "pupil": stats.share(pupil),
            "lead": difference(correct, pupil),
            "right_and_pupil_wrong": stats.share(correct & ~pupil),
            "right_where_pupil_errs": stats.share(correct[~pupil]),
            "cka": cka,
        }
    answer, reason = conclude(verdict)
    return verdict | {"answer": answer, "reason": reason}


def conclude(verdict):
    """(the key of ANSWERS, its reason in words) that the numbers of `judge` allow."""
    _, low, high = verdict["above_control"]
    control = f"with shuffled weights {100 * verdict['control'][0]:.1f} %"
    if "lead" in verdict:
        _, lead_low, lead_high = verdict["lead"]
        pupil = f"your classifier {100 * verdict['pupil'][0]:.1f} %"
        if lead_high < 0:
            return "no gain expected", f"{pupil}; the teacher knows less than its pupil"
    if low <= 0 and high < NOTHING:
        return "no gain expected", f"{control}; it has learned nothing that a probe sees"
    if low <= 0:
        return "cannot tell", f"{control}; more held-out images would tell them apart (--val-size)"
    if "lead" not in verdict:
        return "cannot tell", f"{control}; compare with your own classifier (--pupil)"
    if lead_low <= 0:
        return "cannot tell", f"{pupil}; the difference could be chance"
    return "may help", f"{pupil}; the teacher knows more than its pupil"


def difference(a, b):
    """[share of a less that of b, low, high], both on the same images; Newcombe's interval."""
    counts = [int(images.sum()) for images in (a & b, a & ~b, b & ~a, ~a & ~b)]
    value, interval = stats.paired_difference(*counts)
    return [value, *interval]


def shape_over_noise(probes, block):
    """How a block's accuracy goes with the noise level: "peak", "falls", "rises" or "unclear".

    By arXiv 2502.05743 it peaks between the ends in a diffusion model that generalises, and falls
    from the smallest level in one that has memorised its images. A peak is told only where it lies
    above both ends by more than chance.
    """
    sigmas = sorted(sigma for name, sigma in probes if name == block)
    if len(sigmas) < 3:
        return "unclear"
    correct = [probes[block, sigma]["correct"] for sigma in sigmas]
    best = int(np.argmax([values.mean() for values in correct]))
    if best == 0:
        above_next = difference(correct[0], correct[1])
        return "falls" if above_next[1] > 0 else "unclear"
    above_first = difference(correct[best], correct[0])
    if above_first[1] <= 0:
        return "unclear"
    if best == len(sigmas) - 1:
        return "rises"
    above_last = difference(correct[best], correct[-1])
    return "peak" if above_last[1] > 0 else "unclear"


# ------------------------------------------------------------------------------------ the page


NOISE_LEVELS = {
    "peak": "it peaks at a middle level, as in diffusion models that generalise",
    "falls": "it falls from the smallest level on, as in diffusion models that have memorised; or "
    "its peak is at a still smaller level",
    "rises": "it rises up to the largest level: try larger ones",
    "unclear": "no peak can be told from chance, or too few levels were tried",
}


def percent(values, sign=""):
    """A share, or a difference of shares, with its interval, in %."""
    value, low, high = (100 * number for number in values)
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def sentence(verdict):
    """The verdict in one sentence, with its reason."""
    images = f"of {verdict['n']} held-out images"
    probe = f"the teacher's best probe classifies {100 * verdict['probe'][0]:.1f} % correctly"
    return f"{ANSWERS[verdict['answer']]}: {images} {probe}, {verdict['reason']}."


def page(verdict, about):
    """The lines of verdict.md. about: dict of settings to list at its end."""
    place = f"`{verdict['block']}`, sigma {verdict['sigma']:g}"
    control = f"`{verdict['control_block']}`, sigma {verdict['control_sigma']:g}"
    rows = [
        (f"probe of the teacher, at its best place ({place})", percent(verdict["probe"])),
        (
            f"the same with shuffled weights, at its best place ({control})",
            percent(verdict["control"]),
        ),
        ("teacher above shuffled weights, points", percent(verdict["above_control"], "+")),
    ]
    if "attacked" in verdict:
        radius = cli.threat("linf", about["eps"])
        name = f"the teacher's probe under attack, {radius}, first {verdict['n_attacked']} images"
        rows.append((name, percent(verdict["attacked"])))
    if "pupil" in verdict:
        rows += [
            ("pupil, clean", percent(verdict["pupil"])),
            ("**teacher above pupil, points**", percent(verdict["lead"], "+")),
            ("probe right and pupil wrong", percent(verdict["right_and_pupil_wrong"])),
        ]
    lines = ["# Will this teacher help?", "", f"**{sentence(verdict)}**", ""]
    lines += [f"| accuracy, % of {verdict['n']} held-out images | (95 %) |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if "pupil" in verdict:
        value, low, high = verdict["cka"]
        lines.append(
            f"| linear CKA of their features, 0 to 1 | {value:.2f} ({low:.2f} to {high:.2f}) |"
        )
    lines += [
        "",
        f"Accuracy over the noise level: {NOISE_LEVELS[verdict['noise_levels']]}",
        "(arXiv 2502.05743).",
        "",
        "![Accuracy over the noise level](verdict.png)",
        "",
        "Each half of the images is judged at the place that is best on the other half. The place",
        "named is the best on all; on the map and the picture it looks a little better than it is.",
        "The probe is linear: a teacher may know more than it shows. That a lead over the pupil",
        "makes DRA help has not been shown: where there was one (docs/verdict.md), DRA gained",
        "nothing that is significant, and on CIFAR-10 it cost robust accuracy.",
        "",
    ]
    for name, value in about.items():
        if value is not None:
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"- {name}: {words}")
    return [*lines, ""]


def check_same(about, out_dir):
    """Raises UserError where a directory has a verdict on another pupil, or of other settings.

    One without a pupil, or without an attack, may become one with it.
    """
    path = os.path.join(out_dir, "verdict.json")
    if os.path.exists(path):
        earlier = files.read_json(path).get("about")
        if not isinstance(earlier, dict):
            raise UserError(f"{path}: damaged; delete it to judge again")
        names = ("pupil_sha256", "blocks", "sigmas", "precision", "eps", "n_attacked")
        differing = [name for name in names if earlier.get(name) not in (None, about[name])]
        if differing:
            raise UserError(f"{path}: differs in {', '.join(differing)}; take another --out-dir")


def write(verdict, probes, control, about, out_dir):
    """Write verdict.json, verdict.md and verdict.png, and print the page."""
    draw(verdict, probes, control, os.path.join(out_dir, "verdict.png"))
    text = "\n".join(page(verdict, about))
    files.write_text(text, os.path.join(out_dir, "verdict.md"))
    files.write_json(verdict | {"about": about}, os.path.join(out_dir, "verdict.json"))
    print(text, end="")


def draw(verdict, probes, control, path):
    """The picture: accuracy over the noise level, a line per block; the pupil across it."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for results, style in ((control, {"color": "#BBBBBB"}), (probes, {"color": "#0072B2"})):
        for block in dict.fromkeys(block for block, _ in results):
            sigmas = sorted(sigma for name, sigma in results if name == block)
            shares = [100 * results[block, sigma]["correct"].mean() for sigma in sigmas]
            best = results is probes and block == verdict["block"]
            width = {"linewidth": 2.5, "alpha": 1.0} if best else {"linewidth": 1, "alpha": 0.6}
            axes.plot(sigmas, shares, marker="o", markersize=3, **style, **width)
    handles = [
        plt.Line2D([], [], color="#0072B2", linewidth=2.5, label=f"teacher, {verdict['block']}"),
        plt.Line2D([], [], color="#0072B2", linewidth=1, alpha=0.6, label="its other blocks"),
        plt.Line2D([], [], color="#BBBBBB", linewidth=1, label="its blocks, weights shuffled"),
    ]
    if "pupil" in verdict:
        value, low, high = (100 * number for number in verdict["pupil"])
        axes.axhspan(low, high, color="#D55E00", alpha=0.15, linewidth=0)
        handles.append(axes.axhline(value, color="#D55E00", label="the pupil, with its interval"))
    axes.set(xscale="log", xlabel="noise level sigma", ylim=(0, None))
    axes.set(ylabel=f"linear probe, % of {verdict['n']} held-out images")
    axes.legend(handles=handles, fontsize=8)
    axes.grid(alpha=0.3)
    with files.atomic(path) as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
