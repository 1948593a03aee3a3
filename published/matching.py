"""Which tensors of a file are the weights of a network: by their names and shapes.

A file may hold several sets of weights, in dicts and lists of any depth, and a set may have any
prefix before its names. All names of the network must be there under one prefix, and nothing else.
Names under other prefixes are another network's.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch

from common import UserError, cli, pickles
from common.models import TorchvisionClassifier

# What others call the normalisation that they keep beside the weights. BatchNorm's is running_mean.
NORMALISATION = {
    "mean": re.compile(r"(?!running_)(\w+_)?(means?|mu)"),
    "std": re.compile(r"(?!running_)(\w+_)?(stds?|sds?|sigma)"),
}
COUNTERS = ("num_batches_tracked", "n_averaged")  # old files lack them, and they change no logit
AVERAGED = re.compile(
    "(model|net|weights|state)?(ema|swa|avg|average|averaged)(model|net|weights)?"
)
OPTIMIZER = re.compile("(?<![a-z])optim(i[sz]ers?)?(?![a-z])")  # whose tensors are of no use here
MAX_DEPTH = 8  # of dicts in dicts
MAX_DICTS = 100_000
MAX_LENGTH = 1000  # of a name


# ------------------------------------------------------------------------------- what a file holds


@dataclass(eq=False)
class Set:
    """A dict that holds tensors. name: its path in the file; "." is the file's outermost dict."""

    name: str
    tensors: dict


@dataclass
class Match:
    """A set, read under a prefix and a naming scheme, and how it differs from a model."""

    of: Set
    prefix: str
    scheme: dict  # {name in the file, without the prefix: name of the model}
    n_found: int
    missing: list = ()  # all three: names in the file
    unexpected: list = ()
    misfits: list = ()  # names of another shape

    @property
    def name(self):
        return f"{self.of.name}:{self.prefix}"

    @property
    def is_complete(self):
        return not self.missing and not self.misfits

    def weights(self):
        """The tensors under the names of the model."""
        return {own: self.of.tensors[self.prefix + key] for key, own in self.scheme.items()}

    def equals(self, other):
        """Whether both are the same numbers."""
        ours, theirs = self.weights(), other.weights()
        return all(
            is_plain(ours[key])
            and is_plain(theirs[key])
            and ours[key].dtype == theirs[key].dtype
            and torch.equal(ours[key], theirs[key])
            for key in ours
        )


def sets_of(content, path):
    """Every Set in the content of a file, those further out first."""
    found = []
    pending = [((), content)]
    for n, (place, node) in enumerate(pending):
        if n > MAX_DICTS:
            raise UserError(f"{path}: more than {MAX_DICTS} dicts and lists in one another")
        tensors = {}
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, list | tuple) and normalisation(key) and _are_numbers(value):
                value = torch.tensor(value)
            if key in ("mean", "std") and {"mean", "std"} <= node.keys():
                if type(value) in (int, float):
                    value = torch.tensor([float(value)])
                if isinstance(value, pickles.Object):
                    kind = "its numbers are not read: save a list or a tensor"
                    raise UserError(f"{path}: '{key}' is a {value.name}, {kind}")
            if torch.is_tensor(value) and (isinstance(key, str) or not isinstance(node, dict)):
                tensors[str(key)] = value  # a list of tensors fits no network, but will be told
            elif isinstance(value, dict | list | tuple) and len(place) < MAX_DEPTH:
                if not OPTIMIZER.search(str(key).lower()):
                    pending.append(((*place, str(key)), value))
        if tensors:
            found.append(Set(".".join(place) or ".", tensors))
    return found


def _are_numbers(values):
    return all(type(value) in (int, float) and abs(value) < 1e30 for value in values)


def _schemes(model):
    """The names that files may have for the weights of a model: a list of {theirs: its own}."""
    own = {key: key for key in model.state_dict() if not key.endswith(COUNTERS)}
    if not isinstance(model, TorchvisionClassifier):
        return [own]
    torchvision_names = {}
    for key in own:
        theirs = key.removeprefix("network.")
        if key.startswith("logits."):
            theirs = f"{model.head}.{key.removeprefix('logits.')}"
        torchvision_names[theirs] = key
    schemes = [torchvision_names, own]
    for rename in (_cifar_name, _older_vit_name):
        renamed = {rename(key): own_key for key, own_key in torchvision_names.items()}
        if renamed not in schemes:
            schemes.append(renamed)
    return schemes


def _cifar_name(key):
    """The name in the ResNets of public CIFAR code, such as AutoAttack's example."""
    return re.sub("^fc[.]", "linear.", key.replace(".downsample.", ".shortcut."))


def _older_vit_name(key):
    """The name in torchvision's published files of vision transformers."""
    return key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


def is_plain(value):
    """Whether a tensor is dense and has its numbers here."""
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized


def normalisation(key):
    """mean or std, where a name, of whatever prefix, is that of a normalisation."""
    last = str(key).rpartition(".")[2]
    return next((kind for kind, names in NORMALISATION.items() if names.fullmatch(last)), None)


def is_beside(key):
    """Whether a name is of a normalisation or a counter, which are no weights."""
    return key.endswith(COUNTERS) or normalisation(key) is not None


# ------------------------------------------------------------------------- what fits the network


def _best_matches(sets, model, other_classes):
    """The matches that have most names of the model: all of its names, if there is such a one.

    other_classes: whether the last layer may have another class count.
    """
    schemes = _schemes(model)
    matches = [Match(max(sets, key=lambda one: len(one.tensors)), "", schemes[0], 0)]
    for one in sets:
        for scheme in schemes:
            found = Counter()  # how many of the model's names are there after each prefix
            for key in [key for key in one.tensors if len(key) < MAX_LENGTH]:
                for start in [0] + [dot.end() for dot in re.finditer("[.]", key)]:
                    found[key[:start]] += key[start:] in scheme
            matches += [Match(one, prefix, scheme, n) for prefix, n in found.items() if n]
    most = max(match.n_found for match in matches)
    best = [match for match in matches if match.n_found == most]
    own = model.state_dict()
    for match in best:
        # Another whole network under a longer prefix is not a part of this one.
        inner = {other.prefix for other in best if other.of is match.of} - {match.prefix}
        inner = tuple(inner) if most == len(match.scheme) else ()
        _find_differences(match, own, inner, other_classes)
    return best


def _find_differences(match, own, inner, other_classes):
    """Fill in what a match lacks, has too much, or has in another shape than the state dict `own`.

    inner: prefixes of other networks in the same set.
    """
    match.missing = [key for key in match.scheme if match.prefix + key not in match.of.tensors]
    match.unexpected = []
    match.misfits = []
    inner = tuple(prefix for prefix in inner if prefix.startswith(match.prefix))
    for key, value in match.of.tensors.items():
        if not key.startswith(match.prefix) or key.startswith(inner) or is_beside(key):
            continue
        name = match.scheme.get(key.removeprefix(match.prefix))
        if name is None:
            match.unexpected.append(key)
            continue
        skip = int(other_classes and name.startswith("logits."))
        if value.shape[skip:] != own[name].shape[skip:] or value.dim() != own[name].dim():
            match.misfits.append(key)


def find(content, model, path, weights, other_classes, flags):
    """(every Set in the content of a file, the Match of the one that fits the model).

    A single averaged one is preferred, and a note says so. The arguments are those of
    published.weights.load_classifier and _best_matches. Raises UserError.
    """
    sets = sets_of(content, path) if isinstance(content, dict | list | tuple) else []
    if all(is_beside(key) for one in sets for key in one.tensors):
        message = f"{path}: no state dict (names and tensors) for the {model.name}"
        if isinstance(content, dict) and content:
            message += f"; its entries are {listed([str(key) for key in content])}"
        raise UserError(message)
    asked, prefix = _named(sets, weights, path)
    matches = _best_matches(asked, model, other_classes=False)
    if other_classes and not any(match.is_complete for match in matches):
        matches = _best_matches(asked, model, other_classes=True)
    complete = [match for match in matches if match.is_complete]
    if not complete:
        raise UserError(_misfit_message(path, model, sets, matches[0]))
    if prefix is not None:
        known = listed([match.name for match in complete], 8)
        complete = [match for match in complete if match.prefix == prefix]
        if not complete:
            raise UserError(f"{path}: --weights {weights}: does not fit, expected one of {known}")
    different = []  # equal copies are one
    for match in complete:
        if not any(match.equals(other) for other in different):
            different.append(match)
    labels = [_label(match, different) for match in different]
    ranks = [_rank(match) for match in different]
    best = ranks.index(max(ranks))
    if ranks.count(ranks[best]) > 1:
        advice = "save one of them alone"
        if "--weights" in flags:
            advice = "choose with --weights"
        found = f"{len(different)} sets of weights fit the {model.name}, not one is the average"
        raise UserError(f"{path}: {found}; {advice}: {listed(labels, 8)}")
    if different[best].unexpected:
        raise UserError(_misfit_message(path, model, sets, different[best]))
    others = labels[:best] + labels[best + 1 :]
    if ranks[best] < 1:  # an average that does not fit shall not be missed
        fitting = [match.of for match in complete]
        others += [one.name for one in asked if _rank_of(one.name) > 0 and one not in fitting]
    _note(path, complete, different[best], labels[best], others)
    return sets, different[best]


def _named(sets, weights, path):
    """(the sets that --weights names, the prefix that it names or None); without it all sets."""
    if weights is None:
        return sets, None
    for one in sets:
        if weights == one.name:
            return [one], None
        if weights.startswith(f"{one.name}:"):
            return [one], weights.removeprefix(f"{one.name}:")
    raise UserError(f"{path}: --weights {weights}: not there, expected one of {_sizes(sets)}")


def _label(match, matches):
    """What --weights calls a match: the name of its set, with the prefix where that has several."""
    alone = sum(other.of is match.of for other in matches) == 1
    return match.of.name if alone else match.name


def _rank_of(name):
    """1 for what is called an average, -1 for what is said to be none, 0 for what says nothing."""
    words = {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    averaged = any(AVERAGED.fullmatch(word) for word in words)
    if words & {"unaveraged", "unavg"} or (
        averaged and words & {"non", "no", "not", "without", "wo"}
    ):
        return -1
    return int(averaged)


def _rank(match):
    """The same of a match. The average of torch.optim.swa_utils has a counter beside it."""
    counters = [key for key in match.of.tensors if key.endswith("n_averaged")]
    counted = any(match.prefix.startswith(key.removesuffix("n_averaged")) for key in counters)
    return 1 if counted else _rank_of(match.name)


def _note(path, complete, chosen, label, others):
    """Say on rank 0 which weights are taken, where there are others, or names of others."""
    prefixes = tuple(match.prefix for match in complete if match.of is chosen.of)
    tensors = chosen.of.tensors
    outside = [key for key in tensors if not key.startswith(prefixes) and not is_beside(key)]
    said = []
    if others:
        said.append(f"takes {listed([label])}, not {listed(others)}")
    if outside:
        said.append(f"leaves out {len(outside)} tensors beside it, such as {listed(outside[:1])}")
    if said and cli.rank() == "0":
        print(f"note: {path}: {'; '.join(said)}")


def _misfit_message(path, model, sets, match):
    """One line: the first differences of the best match, and what the file holds."""
    tensors = match.of.tensors
    said = [f"Missing key {listed([match.prefix + key])}" for key in match.missing[:1]]
    said += [f"Unexpected key {listed([key])}" for key in match.unexpected[:1]]
    if not said:
        key = match.misfits[0]
        own = match.scheme[key.removeprefix(match.prefix)]
        found = f"found {tuple(tensors[key].shape)}"
        expected = f"expected {tuple(model.state_dict()[own].shape)}"
        said = [f"size mismatch for {own}, {found}, {expected}"]
    place = match.name if match.prefix else match.of.name
    difference = f"{', '.join(said)} (best match {listed([place])})"
    return f"{path}: state does not fit the {model.name}: {difference}; holds {_sizes(sets)}"


def _sizes(sets):
    largest = sorted(sets, key=lambda one: -len(one.tensors))
    return listed([f"{one.name[:60]} ({len(one.tensors)} tensors)" for one in largest])


def listed(names, most=3):
    """A few names out of a file for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(cli.printable(name)[:80] for name in names[:most]) + more
