"""Weights of classifiers from files: this project's, DM-AT's, RobustBench's, torchvision's, ...

The networks stand in common/models.py, how weights are found in a file in published/matching.py. A
file is data: nothing in it is ever run.
"""

import dataclasses
import json
import math
import os

import torch
import torchvision

from common import UserError, files
from common.models import TORCHVISION, build, describe
from published import matching
from published.matching import is_beside, is_plain, listed, normalisation

# What best.pt, last.pt and best.safetensors say of a classifier, beside its weights.
DESCRIPTION = {"model_name": str, "dataset": str, "num_classes": int, "norm": str, "eps": float}

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of torchvision's published weights
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(model, path, weights=None):
    """Initialise a classifier of `build`, in place, from a file or the word `torchvision`.

    A file: best.pt or last.pt of this project, or one of others, .safetensors or of torch.save,
    with the names of RobustBench, torchvision or public CIFAR code; or a folder or hub:OWNER/NAME
    (files.local_weights).
    `torchvision`: the published ImageNet weights, downloaded once. weights: name of the set to
    take, such as `model`, where several fit and none, or several, are averaged.
    Returns True; False where the file's class count is another, so that the last layer keeps its
    initialisation.
    Raises UserError where the file is missing, broken, would run code, has any other difference, or
    holds NaN or inf.
    """
    content, about = (_published(model), {}) if path == "torchvision" else _read(path)
    named = about.get("model_name")
    if about.keys() >= DESCRIPTION.keys() and named != model.name:
        raise UserError(f"{path}: is a {named}, expected a {model.name}, see --model")
    flags = ("--weights",)
    state = _find_weights(content, model, path, weights, flags, other_classes=True)
    fresh = model.logits.state_dict(prefix="logits.")
    counts = [len(state[key]) for key in fresh]
    if len(set(counts)) > 1:
        raise UserError(f"{path}: its last layer has {counts[0]} classes and {counts[1]} biases")
    same_classes = counts[0] == len(fresh["logits.weight"])
    if not same_classes:
        state = state | fresh
    files.load_state(model, state, path)
    return same_classes


def normalised_as(spec, path):
    """The Spec of a folder with the mean and deviation that weights to start from were made for.

    path: as for load_weights. Where its file does not say, and of other data sets, the Spec stays.
    """
    if spec.name != "folder":
        return spec
    if path == "torchvision":
        return dataclasses.replace(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    content, about = _read(path)
    found = {}
    for one in [about] + [one.tensors for one in matching.sets_of(content, path)]:
        for key, value in one.items():
            kind = normalisation(key)
            numbers = value.flatten().tolist() if torch.is_tensor(value) else value
            if kind and isinstance(numbers, list) and len(numbers) == spec.channels:
                found.setdefault(kind, tuple(map(float, numbers)))
    return dataclasses.replace(spec, **found) if len(found) == 2 else spec


def with_normalisation(spec, mean, std):
    """The data set's Spec with another mean and deviation, of one number or one per channel."""
    if mean is not None:
        spec = dataclasses.replace(spec, mean=tuple(mean * (spec.channels // len(mean))))
    if std is not None:
        spec = dataclasses.replace(spec, std=tuple(std * (spec.channels // len(std))))
    return spec


def load_classifier(path, spec, device, name=None, weights=None, flags=()):
    """(classifier, what its file says) of a checkpoint of this project; frozen and in eval mode.

    spec: the data set that it must have been trained on. name: its architecture; with it any file
    that load_weights reads will do. Such a file does not say how it was trained: `norm` and `eps`
    are None then. weights: as for load_weights. flags: --model and --weights, where the script has
    them for this file.
    Raises UserError where the file is none of these, or is of another data set, class count or
    architecture.
    """
    content, about = _read(path)
    # The settings of others may have a model_name, too.
    if "model_name" in about and (name is None or about.keys() >= DESCRIPTION.keys()):
        _check_description(about, spec, name, path)
    elif name is not None:
        about = describe(name, spec) | {"norm": None, "eps": None}
    else:
        missing = "no entry 'model_name'"
        if "--model" in flags:
            missing += ", and no model is named for its weights, see --model"
        else:
            missing += "; a best.pt or last.pt of this project is needed here"
        raise UserError(f"{path}: not a checkpoint of this project, {missing}")
    if "mean" in about:
        spec = dataclasses.replace(spec, mean=tuple(about["mean"]), std=tuple(about["std"]))
    try:
        if about["norm"] is not None:  # a damaged file may name a network larger than memory
            _check_size(about["model_name"], spec, os.path.getsize(files.local_weights(path)))
        model = build(about["model_name"], spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    files.load_state(model, _find_weights(content, model, path, weights, flags), path)
    return model.to(device).eval().requires_grad_(False), about


def description_of(about, spec):
    """What a checkpoint of this project says of its network, without what else it holds.

    about: load_classifier's, of a checkpoint on the data set `spec`. It is what best.safetensors
    has in its header; of an old checkpoint, which says less, what it lacks is the data set's.
    """
    whole = about if "mean" in about else describe(about["model_name"], spec) | about
    entries = ("classes", "image_size", "mean", "std", "norm", "eps")
    return {key: whole[key] for key in ("model_name", "dataset", "num_classes", *entries)}


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
    if spec.mean is None or "mean" in about:
        _check_normalisation_of_ours(about, spec, path)
    if about.get("image_size", spec.image_size) != spec.image_size:
        sizes = f"{about['image_size']} pixels, --image-size is {spec.image_size}"
        raise UserError(f"{path}: trained on images of {sizes}")
    spec.check_classes(path, about.get("classes"))


def _check_size(name, spec, n_bytes):
    """Raises UserError where a file of n_bytes lacks a gigabyte or more of the network `name`.

    Such a network is not built. Of a smaller one, the first difference is told later.
    """
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in build(name, spec).parameters())
    if 2 * n_parameters > n_bytes + 2**30:  # two bytes a number, as in bfloat16
        raise UserError(f"too small for the {name} that it names, of {n_parameters:,} numbers")


def _check_normalisation_of_ours(about, spec, path):
    """Raises UserError where a checkpoint's mean, std, image_size or classes are damaged."""
    numbers = []
    for entry in ("mean", "std"):
        values = about.get(entry)
        if not isinstance(values, list) or len(values) != spec.channels:
            raise UserError(f"{path}: damaged, its {entry} is not {spec.channels} numbers")
        numbers += values
    sound = all(isinstance(number, float) and math.isfinite(number) for number in numbers)
    if not sound or min(about["std"]) <= 0:
        raise UserError(f"{path}: damaged, its mean is {about['mean']}, its std {about['std']}")
    classes = about.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: damaged, its classes are no list of names")


def _read(path):
    """(what a file holds, the dict in which it would describe itself): data, never code."""
    local = str(files.local_weights(path))
    if local.endswith(".safetensors"):
        content = files.read_safetensors(local)
        try:
            about = json.loads(files.read_safetensors_metadata(local).get("classifier", ""))
        except ValueError:
            about = {}
        if isinstance(about, dict):
            _check_config(files.config_beside(local), about, local)
    else:
        content = about = files.load(local, {})
    return content, about if isinstance(about, dict) else {}


def _check_config(config, about, path):
    """Raises UserError where the config.json beside a file of ours describes another network."""
    for key in config.keys() & about.keys():
        if config[key] != about[key]:
            difference = f"its {key} is {about[key]}, config.json beside it has {config[key]}"
            raise UserError(f"{path}: {difference}"[:300])


def _published(model):
    """The state dict that torchvision publishes for the network of a classifier."""
    name = getattr(model, "published", None)
    if name is None:
        raise UserError(f"torchvision: publishes weights for {', '.join(TORCHVISION)} only")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with files.reading(f"torchvision: {weights.url}", "a file of weights"):
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)


def _find_weights(content, model, path, weights, flags, other_classes=False):
    """The state dict in the content of a file, checked. The arguments are those of matching.find.

    Counters, such as num_batches_tracked, are the model's.
    """
    sets, found = matching.find(content, model, path, weights, other_classes, flags)
    _check_normalisation(sets, found, model, path, flags)
    state = model.state_dict() | found.weights()
    _check_tensors(state, model, path)
    return state


def _check_normalisation(sets, chosen, model, path, flags):
    """Raises UserError where a file brings another mean or std than the model's.

    RobustBench's classes and others keep them beside the weights, under any prefix. A dict around
    the weights, or one of nothing else, may have them, too, a number per channel.
    """
    brought = list(chosen.of.tensors.items())
    for one in sets:
        around = one.name == "." or chosen.of.name.startswith(f"{one.name}.")
        if around or all(is_beside(key) for key in one.tensors):
            for key, value in one.tensors.items():  # others are some metric's mean
                n = value.shape.numel()
                if value.dim() and (n == model.mean.numel() or (n == 1 and key in ("mean", "std"))):
                    brought.append((key, value))
    for key, value in brought:
        kind = normalisation(key)
        if kind is None:
            continue
        in_model = getattr(model, kind).flatten().cpu()
        fits = is_plain(value) and not value.is_complex()
        in_file = value.flatten().float() if fits else torch.empty(0)
        fits = len(in_file) in (1, len(in_model))
        if not fits or not torch.allclose(in_file.expand_as(in_model), in_model, atol=1e-3):
            values = [round(value, 4) for value in in_file.tolist()[:3]]
            expected = [round(value, 4) for value in in_model.tolist()]
            advice = ", see --mean and --std" if "--model" in flags else ""
            found = f"'{listed([key])}' normalises by a {kind} of {values}"
            raise UserError(f"{path}: {found}, expected {expected}{advice}")


def _check_tensors(state, model, path):
    """Raises UserError where a tensor is of another kind than the model's, or not finite."""
    for key, own in model.state_dict().items():
        value = state[key]
        kinds = FLOATS if own.is_floating_point() else (own.dtype,)
        if not is_plain(value) or value.dtype not in kinds:
            raise UserError(f"{path}: '{key}' is {value.dtype}, expected a dense tensor of floats")
        if not value.isfinite().all():
            raise UserError(f"{path}: '{key}' holds NaN or inf: the logits are not finite")
        if not own.is_floating_point() and not torch.equal(value, own):
            raise UserError(f"{path}: '{key}' is an index of another network")
