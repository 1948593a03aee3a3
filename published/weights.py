"""Weights of classifiers from files: this project's, DM-AT's, RobustBench's, torchvision's.

The networks stand in common/models.py. A file is data: nothing in it is ever run.
"""

import dataclasses
import math

import torch
import torchvision

from common import UserError, files
from common.models import TORCHVISION, TorchvisionClassifier, build, describe

# The entries under which files keep a state dict, the first that is there counts: best.pt and
# last.pt of this project, DM-AT, many others. A file may also be a bare state dict.
CONTAINERS = ("weights", "ema", "model_state_dict", "state_dict")

# What wrappers put before every name: DataParallel around a Sequential (DM-AT), DataParallel or
# DistributedDataParallel, the wrappers of RobustBench and others.
PREFIXES = ("module.0.", "module.", "model.")

# What best.pt and last.pt say of a classifier, beside its weights.
DESCRIPTION = {"model_name": str, "dataset": str, "num_classes": int, "norm": str, "eps": float}


def load_weights(model, path):
    """Initialise a classifier of `build`, in place, from a file or the word `torchvision`.

    A file: best.pt or last.pt of this project (the averaged weights), or a state dict of others,
    .safetensors or of torch.save, with the names of RobustBench or torchvision; see CONTAINERS and
    PREFIXES. `torchvision`: the published ImageNet weights, downloaded once.
    Returns True; False where the file's class count is another, so that the last layer keeps its
    initialisation.
    Raises UserError where the file is missing, broken, would run code, has any other difference, or
    holds NaN or inf.
    """
    content = _published(model) if path == "torchvision" else _read(path)
    weights = _find_weights(content, model, path)
    fresh = model.logits.state_dict(prefix="logits.")
    head = weights.get("logits.weight")
    same_classes = head is None or head.shape[:1] == fresh["logits.weight"].shape[:1]
    if not same_classes:
        weights = weights | fresh
    files.load_state(model, weights, path)
    return same_classes


def load_classifier(path, spec, device, name=None):
    """(classifier, what its file says) of best.pt or last.pt; frozen and in eval mode.

    spec: the data set that it must have been trained on. name: its architecture; with it any file
    that load_weights reads will do. Such a file does not say how it was trained: `norm` and `eps`
    are None then.
    Raises UserError where the file is none of these, or is of another data set, class count or
    architecture.
    """
    content = _read(path, device)
    if isinstance(content, dict) and "model_name" in content:
        about = content
        _check_description(about, spec, name, path)
    elif name is not None:
        about = describe(name, spec) | {"norm": None, "eps": None}
    else:
        missing = "no entry 'model_name', and no model is named for its weights"
        raise UserError(f"{path}: not a checkpoint of this project, {missing}")
    if "mean" in about:
        spec = dataclasses.replace(spec, mean=tuple(about["mean"]), std=tuple(about["std"]))
    try:
        model = build(about["model_name"], spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    files.load_state(model, _find_weights(content, model, path), path)
    return model.to(device).eval().requires_grad_(False), about


def _check_description(about, spec, name, path):
    """Raises UserError where a checkpoint of ours is damaged, or of another data set or model."""
    for entry, kind in DESCRIPTION.items():
        if not isinstance(about.get(entry), kind):
            message = f"its entry '{entry}' is missing or no {kind.__name__}"
            raise UserError(f"{path}: not a checkpoint of this project, {message}")
    if about["norm"] not in ("linf", "l2") or not 0 <= about["eps"] < math.inf:
        raise UserError(f"{path}: damaged, its norm is {about['norm']}, its eps {about['eps']}")
    if name not in (None, about["model_name"]):
        raise UserError(f"{path}: holds a {about['model_name']}, not a {name}")
    dataset = about["dataset"]
    num_classes = about["num_classes"]
    if (dataset, num_classes) != (spec.name, spec.num_classes):
        expected = f"not on {spec.name} ({spec.num_classes} classes)"
        raise UserError(f"{path}: trained on {dataset} ({num_classes} classes), {expected}")
    if about.get("image_size", spec.image_size) != spec.image_size:
        sizes = f"{about['image_size']} pixels, --image-size is {spec.image_size}"
        raise UserError(f"{path}: trained on images of {sizes}")
    spec.check_classes(path, about.get("classes"))


def _read(path, device="cpu"):
    """What a file holds: tensors, numbers and strings, never code."""
    if str(path).endswith(".safetensors"):
        return files.read_safetensors(path, device)
    return files.load(path, {}, device)


def _published(model):
    """The state dict that torchvision publishes for the network of a classifier."""
    name = getattr(model, "published", None)
    if name is None:
        raise UserError(f"torchvision: publishes weights for {', '.join(TORCHVISION)} only")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with files.reading(f"torchvision: {weights.url}", "a file of weights"):
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)


def _find_weights(content, model, path):
    """The state dict in the content of a file, under the names of `model`, checked to be finite.

    Whether its names and shapes are those of the model is not checked here.
    """
    weights = content
    for entry in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            weights = content[entry]
            break
    if not _is_state_dict(weights):
        places = f"neither bare nor under {', '.join(CONTAINERS)}"
        raise UserError(f"{path}: no state dict (names and tensors), {places}")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
            break
    _check_normalisation(weights, model, path)
    weights = _rename(weights, model)
    own = model.state_dict()
    for key, value in weights.items():
        is_dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        same_kind = key not in own or own[key].is_floating_point() == value.is_floating_point()
        if not is_dense or value.is_complex() or not same_kind:
            raise UserError(f"{path}: '{key}' is {value.dtype}, expected a dense tensor of floats")
        if not value.isfinite().all():
            raise UserError(f"{path}: '{key}' holds NaN or inf: the logits are not finite")
    return weights


def _is_state_dict(value):
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) and torch.is_tensor(entry) for key, entry in value.items())


def _check_normalisation(weights, model, path):
    """Raises UserError where a file brings another mean or std than the model's.

    RobustBench's classes keep them beside the weights.
    """
    for key in ("mean", "std"):
        if key not in weights:
            continue
        in_file = weights[key].flatten().cpu().float()
        in_model = getattr(model, key).flatten().cpu()
        if len(in_file) != len(in_model) or not torch.allclose(in_file, in_model, atol=1e-3):
            values = [round(value, 4) for value in in_file.tolist()[:3]]
            expected = [round(value, 4) for value in in_model.tolist()]
            raise UserError(f"{path}: normalises by a {key} of {values}, expected {expected}")


def _rename(weights, model):
    """The weights under the names of `model`, without the normalisation."""
    has_own_names = any(key.startswith("network.") for key in weights)
    if (
        "linear.weight" in weights
    ):  # the ResNet-18 of public CIFAR code, such as AutoAttack's example
        weights = {_torchvision_name(key): value for key, value in weights.items()}
    renamed = {}
    for key, value in weights.items():
        if key in ("mean", "std"):
            continue
        if isinstance(model, TorchvisionClassifier) and not has_own_names:
            if key.startswith(f"{model.head}."):
                key = "logits." + key.removeprefix(f"{model.head}.")
            else:
                key = f"network.{key}"
        renamed[key] = value
    return renamed


def _torchvision_name(key):
    """The name that torchvision has for a parameter of public CIFAR code's ResNet-18."""
    key = key.replace(".shortcut.", ".downsample.")
    return f"fc.{key.removeprefix('linear.')}" if key.startswith("linear.") else key
