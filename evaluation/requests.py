"""What an evaluation is asked for: its attacks, the name of its result, all that it depends on.

args: the flags of evaluate.py, parsed. How results are written and read is in
evaluation/verdicts.py.
"""

import importlib.metadata
import os

from common import files
from evaluation import adaptive

ATTACKS = {  # --attack: (its name in tables, its attacks in the order in which they run)
    "clean": ("clean", []),
    "pgd": ("PGD", ["pgd"]),
    "transfer": ("transfer (black box)", ["transfer"]),
    "apgd": ("APGD-CE+T (upper bound)", ["apgd-ce", "apgd-t"]),
    "autoattack": ("AutoAttack standard", ["apgd-ce", "apgd-t", "fab-t", "square"]),
    "rand": ("AutoAttack rand", ["apgd-ce", "apgd-dlr"]),
}


def is_randomised(args):
    """Whether the model is meant to give other logits at every pass."""
    return args.attack == "rand" or args.fresh_noise


def result_path(args, radius):
    """Where the result at a radius goes, or the "curve" or "report" of all of them, as .json.

    What a table tells apart is in the name. All else is compared with what the file holds.
    """
    if args.out:
        return args.out
    if args.checkpoint and args.checkpoint.startswith("hub:"):
        name = args.checkpoint.rpartition("/")[2]
        folder = f"out/{name}"
    elif args.checkpoint and os.path.isdir(args.checkpoint):  # a published folder: not into it
        folder, name = os.path.split(os.path.abspath(args.checkpoint))
        folder = os.path.relpath(folder)
    elif args.checkpoint:
        folder, name = os.path.split(os.path.splitext(args.checkpoint)[0])
    else:
        folder = f"out/diffusion-classifier-{args.dataset}"
        name = f"{args.n_noise}-draws"
    if radius == "report":
        stem = f"report-{name}"
        if args.attack != "apgd":
            stem += f"-{args.attack}"
        if args.norm != "linf":
            stem += f"-{args.norm}"
    else:
        radius = radius if radius == "curve" else f"{radius:.4g}"
        stem = f"results-{name}-{args.attack}-{args.norm}-{radius}"
    if radius in ("report", "curve") and args.eps is not None:
        radii = [f"{eps:.4g}" for eps in sorted(set(args.eps))]
        if len(radii) > 8:  # a name has 255 bytes
            radii = [radii[0], "to", radii[-1], str(len(radii))]
        stem += "-" + "-".join(radii)
    if args.keep_classes:
        stem += f"-keep{args.keep_classes}"
    if args.fresh_noise:
        stem += "-fresh"
    if args.image_list:
        stem += "-listed"
    if args.n_images:
        stem += f"-n{args.n_images}"
    if args.seed:
        stem += f"-seed{args.seed}"
    return os.path.join(folder, f"{stem}.json")


def request_at(eps, args, settings, n, data_sha256):
    """A dict of all that the result at a radius depends on.

    settings: those of the model. n: number of images, data_sha256: of their content.
    """
    attack_name, names = ATTACKS[args.attack]
    version = "common/attacks.py"
    if args.attack in ("apgd", "autoattack", "rand"):
        version = f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    attack_settings = {}
    if args.attack == "pgd":
        flags = ("loss", "n_steps", "n_restarts", "step_size", "eot")
        attack_settings = {name: getattr(args, name) for name in flags}
    return settings | {
        "dataset": args.dataset,
        "split": "test",
        "n": n,
        "data_sha256": data_sha256,
        "image_list_sha256": files.sha256(args.image_list) if args.image_list else None,
        "norm": args.norm,
        "eps": eps,
        "attack": args.attack,
        "attack_name": attack_name,
        "attacks": names,
        "version": version,
        "settings": attack_settings,
        "transfer_sha256": files.sha256(args.transfer_from) if args.transfer_from else None,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "sanity_images": min(args.sanity_images, n),
    }


def request_after(request, layers):
    """The request of a result that goes on from the one of `request` with other backward passes.

    layers: what evaluation/adaptive.py finds in the model.
    """
    return request | {
        "attack": f"{request['attack']}-adaptive",
        "attack_name": f"{request['attack_name']} + adaptive",
        "attacks": request["attacks"] + adaptive.attack_names(layers),
        "earlier_attacks": request["attacks"],
        "layers": layers,
    }


def check_names(args):
    """The groups of sanity checks that fit the evaluation, names of evaluation/sanity.py."""
    if args.sanity_images == 0:
        return []
    if args.attack == "autoattack-adaptive":  # has run Square on all images
        return ["gradients"]
    if args.attack == "apgd-adaptive":
        return ["gradients", "square"]
    if args.attack == "clean":
        return ["outputs"]
    names = ["outputs", "curve", "surface"]
    # What these find is held against single verdicts, which a randomised model has not.
    if args.attack != "transfer" and not is_randomised(args):
        names.append("steps")
        if args.transfer_from:
            names.append("transfer")
    return names
