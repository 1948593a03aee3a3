"""RobustBench (Croce et al., arXiv 2010.09670): the weights in its layout, and the entry that its leaderboard asks for."""

import os
import re

import torch

from common import checkpoint, data, models
from common.cli import UserError, ratio
from common.synthetic import SyntheticSet

THREATS = {"linf": "Linf", "l2": "L2"}
RADII = {("cifar10", "linf"): "8/255", ("cifar100", "linf"): "8/255", ("imagenet", "linf"): "4/255", ("cifar10", "l2"): "0.5"}
N_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}


def export(path, dataset, results):
    """Write robustbench/<dataset>/<threat>/<name>.pt and .json beside the checkpoint `path` from its one finished result.

    The .pt file is a bare state dict under RobustBench's names, without the normalisation, which its classes hold: its
    load_model finds it there with model_dir=.../robustbench. The .json has the fields of its model_info; what only the authors know
    is null. Images that a diffusion model generated count as no additional data there, with a footnote that says how many; a
    training that began from other weights (--init) may have seen more: then additional_data is null, too.
    Raises UserError where the leaderboard has no such data set or radius, or the result is not AutoAttack standard on all its images.
    """
    spec = data.DATASETS[dataset]
    if len(results) != 1:
        raise UserError("--export robustbench: give one --eps")
    result = checkpoint.read_json(results[0])
    key = (dataset, result.get("norm"))
    if key not in RADII or abs(result["eps"] - ratio(RADII[key])) > 1e-6:
        listed = ", ".join(f"{d} {n} {e}" for (d, n), e in RADII.items())
        found = f"{dataset} {result.get('norm')} {result.get('eps')}"
        raise UserError(f"--export robustbench: {found} is on no leaderboard; those are {listed}")
    if result["attack"] != "autoattack" or result["n"] != N_IMAGES[dataset] or result["checkpoint_sha256"] != checkpoint.sha256(path):
        wanted = f"AutoAttack standard on {N_IMAGES[dataset]} images of this very checkpoint"
        raise UserError(f"--export robustbench: {results[0]} is {result['attack_name']} on {result['n']} images, expected {wanted}")
    if result["sanity_images"] == 0 or (spec.files and not result["image_list_sha256"]):
        raise UserError(f"--export robustbench: {results[0]} lacks sanity checks (--sanity-images) or, of ImageNet, --image-list")
    model, state = models.load_classifier(path, spec, "cpu")
    run = os.path.dirname(os.path.abspath(path))
    settings = checkpoint.read_json(os.path.join(run, "args.json"))
    n_generated = 0
    if settings.get("synthetic"):
        sources = settings["synthetic"]
        n_generated = len(SyntheticSet([sources] if isinstance(sources, str) else sources, spec))
    claim = {
        **dict.fromkeys(("link", "name", "authors")),
        "additional_data": None if settings.get("init") else False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": None,
        "architecture": architecture(state["model_name"]),
        "eps": RADII[key],
        "clean_acc": f"{100 * result['clean']:.2f}",
        "reported": f"{100 * result['robust']:.2f}",
        "autoattack_acc": f"{100 * result['robust']:.2f}",
        "footnote": f"It uses additional {amount(n_generated)} synthetic images in training." if n_generated else None,
        "unreliable": bool(result["warnings"]),
    }
    stem = os.path.join(run, "robustbench", dataset, THREATS[result["norm"]], os.path.basename(run))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with checkpoint.atomic(f"{stem}.pt") as file:
        torch.save(weights, file)
    checkpoint.write_json(claim, f"{stem}.json")
    for warning in result["warnings"]:
        print(f"WARNING: {warning}: the claim says unreliable")
    print(f"{stem}.pt, {stem}.json; fill in: {', '.join(key for key, value in claim.items() if value is None and key != 'footnote')}")
    if settings.get("synthetic") or settings.get("teacher"):
        print(f"additional_data: true, if the diffusion model has seen other images than {dataset}'s")


def architecture(name):
    """wrn-28-10 -> WideResNet-28-10, as the leaderboard writes it."""
    return re.sub("^wrn", "WideResNet", name).replace("preact-18", "PreActResNet-18")


def amount(n):
    """1000000 -> 1M, 358000 -> 358k, 999 -> 999."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)
