"""RobustBench (Croce et al., arXiv 2010.09670): weights in its layout, and its leaderboard's entry.

The evaluation that both rest on is evaluate.py's; the layout of our classifiers' weights is that of
RobustBench's classes already (common/models.py).
"""

import os
import re

from common import UserError, files
from common.cli import ratio
from evaluation import verdicts

THREATS = {"linf": "Linf", "l2": "L2"}
RADII = {  # of the leaderboards, as they are written there
    ("cifar10", "linf"): "8/255",
    ("cifar100", "linf"): "8/255",
    ("imagenet", "linf"): "4/255",
    ("cifar10", "l2"): "0.5",
}
N_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}


def read_result(path, checkpoint, spec):
    """A finished result of a checkpoint. Raises UserError where no leaderboard would take it, or
    where it is not that of the verdicts beside it.
    """
    result = files.read_json(path)
    verdicts.check_finished(result, path)
    _check_result(result, path, checkpoint, spec)
    return result


def export(result, checkpoint, spec, model, model_name):
    """Write the weights and the leaderboard's entry for a finished result of a checkpoint.

    They are robustbench/<dataset>/<threat>/<run>.pt and .json beside the checkpoint. The .pt file
    is a bare state dict under RobustBench's names, without the normalisation, which its classes
    hold: its load_model finds it with model_dir=.../robustbench. The .json has the fields of its
    model_info; null is what only the authors know.

    Generated images count as no additional data there, with a footnote on their number. A training
    that began from other weights (--init) may have seen more: its additional_data is null too.
    result: of read_result. checkpoint: path of the model's best.pt, with args.json beside it.
    Raises UserError where that does not say how many images were generated.
    """
    dataset = spec.name
    run_dir = os.path.dirname(os.path.abspath(checkpoint))
    settings = files.read_json(os.path.join(run_dir, "args.json"))
    n_synthetic = settings.get("n_synthetic")
    if not isinstance(n_synthetic, int):
        raise UserError(f"{checkpoint}: args.json beside it lacks 'n_synthetic'")
    footnote = None
    if n_synthetic:
        footnote = f"It uses additional {amount(n_synthetic)} synthetic images in training."
    entry = {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None if settings.get("init") else False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": None,
        "architecture": architecture(model_name),
        "eps": RADII[dataset, result["norm"]],
        "clean_acc": f"{100 * result['clean']:.2f}",
        "reported": f"{100 * result['robust']:.2f}",
        "autoattack_acc": f"{100 * result['robust']:.2f}",
        "footnote": footnote,
        "unreliable": bool(result["warnings"]),
    }

    folder = os.path.join(run_dir, "robustbench", dataset, THREATS[result["norm"]])
    os.makedirs(folder, exist_ok=True)
    stem = os.path.join(folder, os.path.basename(run_dir))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    files.save(weights, f"{stem}.pt")
    files.write_json(entry, f"{stem}.json")

    for warning in result["warnings"]:
        print(f"WARNING: {warning}: the entry says unreliable")
    unknown = [key for key, value in entry.items() if value is None and key != "footnote"]
    print(f"{stem}.pt, {stem}.json; fill in: {', '.join(unknown)}")
    if n_synthetic or settings.get("teacher"):
        condition = f"if the diffusion model has seen other images than {dataset}'s"
        print(f"additional_data: true, {condition}")


def _check_result(result, path, checkpoint, spec):
    """Raises UserError where no leaderboard would accept the result."""
    norm = result.get("norm")
    eps = result.get("eps")
    radius = RADII.get((spec.name, norm))
    if radius is None or abs(eps - ratio(radius)) > 1e-6:
        known = [f"{name} {norm} {radius}" for (name, norm), radius in RADII.items()]
        message = f"{spec.name} {norm} {eps} is on no leaderboard; those are {', '.join(known)}"
        raise UserError(f"{path}: {message}")
    n = N_IMAGES[spec.name]
    complete = result["attack"] == "autoattack" and result["n"] == n
    if not complete or result["checkpoint_sha256"] != files.sha256(checkpoint):
        actual = f"{result['attack_name']} on {result['n']} images"
        expected = f"AutoAttack standard on {n} images of this very checkpoint"
        raise UserError(f"{path}: is {actual}, expected {expected}")
    if result["precision"] == "bf16":
        raise UserError(f"{path}: in bf16, expected --precision fp32 or tf32, as published figures")
    if result["sanity_images"] < 100:
        found = f"--sanity-images was {result['sanity_images']}"
        raise UserError(f"{path}: lacks sanity checks, {found}, expected 100 or more")
    if spec.files and not result["image_list_sha256"]:
        raise UserError(f"{path}: lacks an --image-list, RobustBench's {n} images of {spec.name}")


def architecture(name):
    """wrn-28-10 -> WideResNet-28-10, as the leaderboard writes it."""
    return re.sub("^wrn", "WideResNet", name).replace("preact-18", "PreActResNet-18")


def amount(n):
    """1000000 -> 1M, 358000 -> 358k, 999 -> 999."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)
