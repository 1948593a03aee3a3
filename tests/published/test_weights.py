"""Checkpoints of others: their containers, prefixes and settings, and what is refused of them.

Alone: python -m pytest -n 0 tests/published/test_weights.py
"""

import argparse
import collections
import dataclasses
import datetime
import glob
import io
import json
import os
import pathlib
import pickle
import random
import re
import sys
import types

import huggingface_hub
import numpy as np
import pyautoattack
import pytest
import safetensors.torch
import torch
from conftest import DIGITS
from torch import nn

import analyze
import evaluate
import generate_synthetic
import train_at
import train_at_aux
from common import UserError, cli, files, models
from published.datasets import DATASETS
from published.weights import load_classifier, load_weights

RGB64 = dataclasses.replace(
    DIGITS, name="rgb", image_size=64, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
)
NETWORKS = {"wrn-10-1": DIGITS, "preact-18": DIGITS, "resnet-18": DIGITS, "resnet50": RGB64}
CONTAINERS = (
    "optimized_model state_dict model net model_state_dict ema ema_state_dict state_dict_ema "
    "model_ema ema_model params weights swa averaged checkpoint generator best"
).split()
PREFIXES = (
    "module. _orig_mod. model. net. network. backbone. 0. 1. attacker.model. student. f. "
    "_forward_module."
).split()
PRINTED = re.compile(r"Traceback|Error|object at 0x|NoneType|RuntimeError|torch\.Size|'\w+' object")


def refused(match, call, *args, **kwargs):
    """The call ends with a UserError of one readable line, which is returned."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    assert not PRINTED.search(message), message
    return message


def theirs(name="wrn-10-1", seed=1):
    """(classifier, its weights under the names of others)."""
    torch.manual_seed(seed)
    model = models.build(name, NETWORKS[name]).eval()
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer.uniform_(0.5, 1.5)
    weights = {}
    for key, value in model.state_dict().items():
        if name.startswith("resnet"):
            head = "linear." if name == "resnet-18" else "fc."
            key = key.removeprefix("network.").replace("logits.", head)
        if name == "resnet-18":
            key = key.replace(".downsample.", ".shortcut.")
        weights[key] = value.contiguous().clone()
    return model, weights


@pytest.fixture(scope="module")
def networks():
    """{name: (classifier, its weights under the names of others, images, their logits)}."""
    made = {}
    for name, spec in NETWORKS.items():
        model, weights = theirs(name)
        x = torch.rand(2, spec.channels, spec.image_size, spec.image_size)
        with torch.no_grad():
            made[name] = (model, weights, x, model(x))
    return made


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def negated(weights):
    return {key: -value for key, value in weights.items()}


def counted(weights):
    return {key: v for key, v in weights.items() if not key.endswith("num_batches_tracked")}


def loaded(content, path, name="wrn-10-1", weights=None):
    """The classifier that load_weights makes of a saved content, once load_classifier agreed."""
    torch.save(content, path)
    model = models.build(name, NETWORKS[name]).eval()
    assert load_weights(model, path, weights) is True
    other, _ = load_classifier(path, NETWORKS[name], "cpu", name=name, weights=weights)
    for (key, ours), again in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(ours, again), key
    return model


def assert_is(model, name, networks):
    """The model has the logits of the network."""
    _, _, x, logits = networks[name]
    with torch.no_grad():
        assert torch.equal(model(x), logits)


# ------------------------------------------------------------------------- containers and prefixes


def settings(rng):
    """Something that others keep beside the weights, without a tensor."""
    return rng.choice(
        [
            {"epoch": 3, "arch": "resnet", "lr": 0.1, "done": True, "none": None},
            {"acc": np.float64(0.5), "best": np.int64(3), "curve": np.arange(3.0)},
            {"args": argparse.Namespace(lr=0.1, path=pathlib.Path("/tmp"))},
            {"history": [{"loss": 0.1}, (1, 2)], "numpy_rng": np.random.RandomState(0).get_state()},
            {"meta": collections.defaultdict(list, a=[1]), "when": datetime.datetime(2024, 1, 1)},
        ]
    )


def tensors_beside(rng):
    """Something that holds tensors and is no network."""
    moments = {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}
    return rng.choice(
        [
            {
                "optimizer": {
                    "state": {0: moments, 1: moments},
                    "param_groups": [{"params": [0, 1]}],
                }
            },
            {"rng": torch.get_rng_state(), "cuda": [torch.zeros(3)]},
            {"scheduler": {"last": torch.tensor(3)}, "accuracy": torch.tensor(0.5)},
            {"metrics": {"mean": torch.tensor(0.9), "std": torch.tensor(0.1)}},
            {"losses": {"mean": [0.9, 0.8, 0.7, 0.6], "std": torch.rand(4)}},
        ]
    )


def composed(weights, spec, rng, depth, n_prefixes):
    """The weights as someone might have saved them: (content, its description for a failure)."""
    prefix = "".join(rng.choice(PREFIXES) for _ in range(n_prefixes))
    content = prefixed(prefix, weights if rng.random() < 0.5 else counted(weights))
    if rng.random() < 0.3:
        content["n_averaged"] = torch.tensor(7)
    if rng.random() < 0.4:
        means, stds = rng.choice([("mean", "std"), ("new_mean", "new_std"), ("mu", "sigma")])
        place = rng.choice([prefix, "", "normalize.", f"{prefix}normalizer."])
        content[place + means] = torch.tensor(spec.mean).view(1, -1, 1, 1)
        content[place + stds] = torch.tensor(spec.std).view(1, -1, 1, 1)
    if rng.random() < 0.5:
        content |= settings(rng)
    names = [rng.choice(CONTAINERS) for _ in range(depth)]
    for name in reversed(names):
        beside = tensors_beside(rng) if rng.random() < 0.7 else {}
        content = settings(rng) | beside | {name: content}
        if rng.random() < 0.2:
            content = collections.OrderedDict(content)
    return content, f"{'.'.join(names)}:{prefix}"


@pytest.mark.parametrize(
    "name, seed", [("wrn-10-1", s) for s in range(8)] + [(n, 0) for n in list(NETWORKS)[1:]]
)
def test_every_composition_loads(name, seed, networks, tmp_path):
    rng = random.Random(seed)
    sizes = [(depth, n) for depth in range(4) for n in range(4)]
    for depth, n_prefixes in sizes if name == "wrn-10-1" else rng.sample(sizes, 3):
        content, place = composed(networks[name][1], NETWORKS[name], rng, depth, n_prefixes)
        print(place)
        assert_is(loaded(content, tmp_path / "a.pt", name), name, networks)


def drop(weights, rng):
    del weights[rng.choice([key for key in weights if not key.endswith("tracked")])]


def add(weights, rng):
    key = rng.choice(list(weights))
    weights[key.rpartition(".")[0] + ".extra"] = torch.zeros(3)


def rename(weights, rng):
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    weights[f"{key}_"] = weights.pop(key)


def reshape(weights, rng):
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    weights[key] = torch.cat([weights[key], weights[key]])
    weights[key] = weights[key][None] if rng.random() < 0.5 else weights[key]


def move(weights, rng):
    """Under another prefix than the others."""
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    weights[f"other.{key}"] = weights.pop(key)


def spoil(weights, rng):
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    weights[key] = torch.full_like(weights[key], rng.choice([float("nan"), float("inf")]))


def retype(weights, rng):
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    kinds = [lambda t: t.long(), lambda t: t.to(torch.complex64), lambda t: t.to("meta")]
    kinds += [lambda t: t.to_sparse(), lambda t: t.to(torch.float8_e4m3fn), lambda t: t > 0]
    weights[key] = rng.choice(kinds)(weights[key])


def shift(weights, rng):
    """Another normalisation."""
    key = rng.choice(["mean", "std", "new_mean", "new_std", "mu", "sigma", "pixel_mean"])
    values = rng.choice([[0.9], [0.9, 0.9, 0.9], [], [float("nan")]])
    weights[rng.choice(["", "normalize.", "module.0."]) + key] = torch.tensor(values)


def untensor(weights, rng):
    key = rng.choice([key for key in weights if not key.endswith("tracked")])
    weights[key] = rng.choice([None, 3, "x", [1.0], {"weight": torch.zeros(1)}, np.zeros(3)])


DAMAGES = {
    drop: "does not fit the wrn-10-1: Missing key",
    add: "does not fit the wrn-10-1: Unexpected key .*extra",
    rename: "Missing key .*, Unexpected key .*_ .best match",
    reshape: "size mismatch for .*, found .*, expected",
    move: "Missing key .*; holds .* tensors",
    spoil: "holds NaN or inf",
    retype: "expected a dense tensor of floats|asks for torch._utils._rebuild",
    shift: "normalises by a (mean|std) of .*, expected",
    untensor: "does not fit the wrn-10-1: Missing key",
}


@pytest.mark.parametrize("change", DAMAGES)
def test_every_damaged_one_is_one_line(change, networks, tmp_path):
    rng = random.Random(change.__name__)
    path = tmp_path / "a.pt"
    for _ in range(8):
        damaged = dict(networks["wrn-10-1"][1])
        change(damaged, rng)
        content, place = composed(damaged, DIGITS, rng, rng.randrange(4), rng.randrange(4))
        print(place)
        torch.save(content, path)
        model = models.build("wrn-10-1", DIGITS)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        said = f"a.pt: .*({DAMAGES[change]})"
        refused(said, load_weights, model, path)
        refused(said, load_classifier, path, DIGITS, "cpu", name="wrn-10-1")
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), "half loaded"


def test_the_resnet_of_autoattacks_package(tmp_path):
    (path,) = glob.glob(f"{os.path.dirname(pyautoattack.__file__)}/examples/model_test.pt")
    spec = dataclasses.replace(DATASETS["cifar10"], mean=(0.0,) * 3, std=(1.0,) * 3)
    saved = torch.load(path, map_location="cpu", weights_only=True)
    torch.save({"net": prefixed("module.", saved), "acc": np.float64(1)}, tmp_path / "a.pt")
    for file in (path, tmp_path / "a.pt"):
        model, _ = load_classifier(file, spec, "cpu", name="resnet-18")
        assert torch.equal(model.logits.weight, saved["linear.weight"])
        shortcut = model.network.layer2[0].downsample[0].weight
        assert torch.equal(shortcut, saved["layer2.0.shortcut.0.weight"])


def packed_by_robustness(weights, spec=DIGITS):
    """A file of MadryLab's package: the network twice, each with its normalisation."""
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    normalisation = {"new_mean": mean.view(-1, 1, 1), "new_std": std.view(-1, 1, 1)}
    state = prefixed("module.normalizer.", normalisation) | prefixed("module.model.", weights)
    state |= prefixed("module.attacker.normalize.", normalisation)
    state |= prefixed("module.attacker.model.", weights)
    return {"model": state, "optimizer": {"state": {}}, "epoch": 3, "nat_prec1": torch.tensor(90.0)}


def test_the_doubled_copy_of_robustness_is_one(networks, tmp_path, capsys):
    weights = networks["resnet-18"][1]
    model = loaded(packed_by_robustness(weights), tmp_path / "a.pt", "resnet-18")
    assert_is(model, "resnet-18", networks)
    assert capsys.readouterr().out == ""
    other = dataclasses.replace(DIGITS, mean=(0.5,))
    torch.save(packed_by_robustness(weights, other), tmp_path / "a.pt")
    expected = "'module.normalizer.new_mean' normalises by a mean of .0.5., expected"
    refused(expected, load_weights, model, tmp_path / "a.pt")


NORMALISATIONS = {
    "in the set": lambda w, value: {"model": {"module.0.mean": value} | prefixed("module.1.", w)},
    "outside of the prefix": lambda w, value: {"normalize.sigma": value} | prefixed("net.", w),
    "around the set": lambda w, value: {"mean": value, "net": {"state_dict": w}},
    "a list": lambda w, value: {"std": value.flatten().tolist(), "net": w},
    "a dict of its own": lambda w, value: {"state_dict": w, "normalizer": {"new_std": value}},
    "in the settings": lambda w, value: {"data": {"mean": value.flatten().tolist()}, "net": w},
}


@pytest.mark.parametrize("place", NORMALISATIONS)
def test_a_wrong_normalisation_is_found(place, networks, tmp_path):
    weights = networks["wrn-10-1"][1]
    packed = NORMALISATIONS[place]
    torch.save(packed(weights, torch.tensor([[0.77]])), tmp_path / "a.pt")
    model = models.build("wrn-10-1", DIGITS)
    refused("normalises by a (mean|std) of .0.77., exp", load_weights, model, tmp_path / "a.pt")
    kind = "mean" if "mean" in str(packed({}, torch.zeros(1, 1))) else "std"
    right = torch.tensor(getattr(DIGITS, kind)).view(1, -1)
    assert_is(loaded(packed(weights, right), tmp_path / "a.pt"), "wrn-10-1", networks)


def test_counters_do_not_matter(networks, tmp_path):
    weights = networks["wrn-10-1"][1]
    averaged = torch.optim.swa_utils.AveragedModel(networks["wrn-10-1"][0]).state_dict()
    assert "n_averaged" in averaged
    for content in (counted(weights), averaged, {"swa_model": averaged}):
        assert_is(loaded(content, tmp_path / "a.pt"), "wrn-10-1", networks)
    broken = weights | {"batchnorm.num_batches_tracked": torch.zeros(3)}
    assert_is(loaded(broken, tmp_path / "a.pt"), "wrn-10-1", networks)


def test_half_precision_old_formats_and_every_protocol_load(networks, tmp_path):
    model, weights, x, logits = networks["wrn-10-1"]
    beside = {"acc": np.float64(0.5), "args": argparse.Namespace(a=1)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        content = {key: v.to(dtype) if "tracked" not in key else v for key, v in weights.items()}
        for protocol in (2, 3, 4, 5):
            for zipped in (True, False):
                for extra in ({}, beside):
                    options = {"_use_new_zipfile_serialization": zipped}
                    options["pickle_protocol"] = protocol
                    torch.save({"model": content} | extra, tmp_path / "a.pt", **options)
                    ours = models.build("wrn-10-1", DIGITS).eval()
                    assert load_weights(ours, tmp_path / "a.pt")
                    for key, value in ours.state_dict().items():
                        if "tracked" not in key:
                            assert torch.equal(value, content[key].float()), (dtype, protocol, key)


def test_parameters_and_views_are_read_beside_settings(networks, tmp_path):
    """Parameters, transposed tensors, and two tensors of one storage, in PyTorch's two formats."""
    model, weights, _, _ = networks["wrn-10-1"]
    content = {key: nn.Parameter(v) if v.is_floating_point() else v for key, v in weights.items()}
    both = torch.randn(2, 64)
    content["batchnorm.weight"], content["batchnorm.bias"] = both[0], both[1]
    content["logits.weight"] = weights["logits.weight"].T.contiguous().T
    for zipped in (True, False):
        whole = {"model": content, "args": argparse.Namespace()}
        torch.save(whole, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        ours = models.build("wrn-10-1", DIGITS)
        load_weights(ours, tmp_path / "a.pt")
        assert torch.equal(ours.batchnorm.weight, both[0])
        assert torch.equal(ours.batchnorm.bias, both[1])
        assert torch.equal(ours.logits.weight, weights["logits.weight"])


# ------------------------------------------------------------------------- several sets of weights


AVERAGED = {
    "ema": lambda raw, average: ({"model": raw, "ema": average}, "ema", "model"),
    "swa": lambda raw, average: ({"net": raw, "swa_model": average}, "swa_model", "net"),
    "deeper": lambda raw, average: (
        {"checkpoint": {"model": raw, "state_dict_ema": {"state_dict": average}}},
        "checkpoint.state_dict_ema.state_dict",
        "checkpoint.model",
    ),
    "prefixes": lambda raw, average: (
        {"state_dict": prefixed("model.", raw) | prefixed("model_ema.module.", average)},
        "state_dict:model_ema.module.",
        "state_dict:model.",
    ),
    "counter": lambda raw, average: (
        {"model": raw, "best": prefixed("module.", average) | {"n_averaged": torch.tensor(3)}},
        "best",
        "model",
    ),
    "within": lambda raw, average: (raw | prefixed("ema.", average), ".:ema.", ".:"),
    "one word": lambda raw, average: ({"emamodel": average, "net": raw}, "emamodel", "net"),
    "unaveraged": lambda raw, average: (
        {"unaveraged_state_dict": raw, "state_dict": average},
        "state_dict",
        "unaveraged_state_dict",
    ),
    "camel": lambda raw, average: ({"modelEMA": average, "model": raw}, "modelEMA", "model"),
}


@pytest.mark.parametrize("case", AVERAGED)
def test_the_averaged_set_is_taken_and_a_note_says_so(case, networks, tmp_path, capsys):
    average = networks["wrn-10-1"][1]
    content, taken, other = AVERAGED[case](theirs(seed=2)[1], average)
    model = loaded(content, tmp_path / "a.pt")
    assert_is(model, "wrn-10-1", networks)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"note: {tmp_path}/a.pt: takes {taken}, not {other}"] * 2
    raw = loaded(content, tmp_path / "a.pt", weights=other)
    assert torch.equal(raw.logits.weight, theirs(seed=2)[1]["logits.weight"])
    assert_is(loaded(content, tmp_path / "a.pt", weights=taken), "wrn-10-1", networks)


def test_notes_are_printed_on_rank_0_only(networks, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    weights = networks["wrn-10-1"][1]
    loaded({"model": negated(weights), "ema": weights}, tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


AMBIGUOUS = {
    "none averaged": lambda a, b: ({"model": a, "teacher": b}, "model, teacher"),
    "both averaged": lambda a, b: ({"ema": a, "swa": b}, "ema, swa"),
    "schema": lambda a, b: ({"schema": a, "model": b}, "schema, model"),
    "prefixes": lambda a, b: (
        {"state_dict": prefixed("student.", a) | prefixed("teacher.", b)},
        "state_dict:student., state_dict:teacher.",
    ),
    "bare and prefix": lambda a, b: (a | prefixed("teacher.", b), ".:, .:teacher."),
    "a list": lambda a, b: ({"models": [a, b]}, "models.0, models.1"),
    "one with more": lambda a, b: (
        {"model": a | {"extra.weight": torch.zeros(1)}, "teacher": b},
        "model, teacher",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_sets_ask_for_a_name(case, networks, tmp_path):
    weights = networks["wrn-10-1"][1]
    content, names = AMBIGUOUS[case](theirs(seed=2)[1], weights)
    path = tmp_path / "a.pt"
    torch.save(content, path)
    model = models.build("wrn-10-1", DIGITS)
    said = refused("2 sets of weights fit the wrn-10-1", load_weights, model, path)
    assert said.endswith(f"choose with --weights: {names}")
    args = (path, DIGITS, "cpu", "wrn-10-1")
    assert refused("2 sets", load_classifier, *args).endswith(f"save one of them alone: {names}")
    last = names.split(", ")[-1]
    chosen = models.build("wrn-10-1", DIGITS)
    load_weights(chosen, path, last)
    assert torch.equal(chosen.logits.weight, weights["logits.weight"])
    refused("--weights nowhere: not there, expected one of", load_weights, model, path, "nowhere")
    elsewhere = last.partition(":")[0] + ":nowhere."
    expected = "nowhere.: does not fit, expected one of"
    refused(expected, load_weights, model, path, elsewhere)


def test_an_averaged_set_that_does_not_fit_is_not_passed_over(networks, tmp_path):
    weights = networks["wrn-10-1"][1]
    content = {"model": weights, "ema": weights | {"extra": torch.zeros(1)}}
    torch.save(content, tmp_path / "a.pt")
    model = models.build("wrn-10-1", DIGITS)
    assert load_weights(model, tmp_path / "a.pt") is True  # equal copies, the first of which fits
    content["ema"] = negated(weights) | {"extra": torch.zeros(1)}
    torch.save(content, tmp_path / "a.pt")
    refused("Unexpected key extra .best match ema", load_weights, model, tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt", "model")


def test_an_average_of_some_weights_alone_is_told(networks, tmp_path, capsys):
    weights = networks["wrn-10-1"][1]
    shadow = {key: -value for key, value in weights.items() if "running" not in key}
    content = {"model": weights, "ema": {"shadow": shadow, "decay": 0.99}}
    assert_is(loaded(content, tmp_path / "a.pt"), "wrn-10-1", networks)
    assert "takes model, not ema.shadow" in capsys.readouterr().out


def test_last_pt_of_this_project_says_what_it_takes(networks, tmp_path, capsys):
    _, weights, x, logits = networks["wrn-10-1"]
    content = models.describe("wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.15, "step": 3}
    files.save(content | {"model": negated(weights), "ema": weights}, tmp_path / "last.pt")
    model, about = load_classifier(tmp_path / "last.pt", DIGITS, "cpu")
    assert about["step"] == 3
    assert_is(model, "wrn-10-1", networks)
    assert "last.pt: takes ema, not model" in capsys.readouterr().out


def test_names_of_another_network_beside_it_are_told(networks, tmp_path, capsys):
    weights = prefixed("model.", networks["wrn-10-1"][1])
    content = weights | {"projector.weight": torch.zeros(3), "projector.bias": torch.zeros(3)}
    assert_is(loaded({"state_dict": content}, tmp_path / "a.pt"), "wrn-10-1", networks)
    note = "leaves out 2 tensors beside it, such as projector.weight"
    assert note in capsys.readouterr().out


# ------------------------------------------------------------------------------------- what is said


def test_a_misfit_says_what_the_file_holds(networks, tmp_path):
    weights = prefixed("module.", networks["wrn-10-1"][1])
    weights["module.bn.weight"] = weights.pop("module.batchnorm.weight")
    torch.save({"net": weights, "ema": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    model = models.build("wrn-10-1", DIGITS)
    said = refused("state does not fit the wrn-10-1", load_weights, model, tmp_path / "a.pt")
    assert "Missing key module.batchnorm.weight, Unexpected key module.bn.weight" in said
    assert f"(best match net:module.); holds net ({len(weights)} tensors), ema (1 tensors)" in said
    torch.save({"net": 1, "epoch": 2}, tmp_path / "a.pt")
    refused("no state dict .*its entries are net, epoch", load_weights, model, tmp_path / "a.pt")
    torch.save({"net": networks["resnet-18"][1]}, tmp_path / "a.pt")
    said = refused("does not fit the wrn-10-1: Missing key", load_weights, model, tmp_path / "a.pt")
    assert "holds net (" in said
    content = networks["wrn-10-1"][1] | {"batchnorm.bias": torch.zeros(3)}
    torch.save(content, tmp_path / "a.pt")
    expected = r"size mismatch for batchnorm.bias, found \(3,\), expected \(64,\)"
    refused(expected, load_weights, model, tmp_path / "a.pt")


def test_a_last_layer_of_two_class_counts_is_refused(networks, tmp_path):
    weights = networks["wrn-10-1"][1] | {"logits.bias": torch.zeros(7)}
    torch.save(weights, tmp_path / "a.pt")
    model = models.build("wrn-10-1", DIGITS)
    refused("has 10 classes and 7 biases", load_weights, model, tmp_path / "a.pt")
    torch.save(weights | {"logits.weight": torch.zeros(7, 64)}, tmp_path / "a.pt")
    assert load_weights(model, tmp_path / "a.pt") is False


def test_names_out_of_a_file_cannot_break_the_line(networks, tmp_path):
    hostile = "\x1b[2J\n" + "x" * 5000
    model = models.build("wrn-10-1", DIGITS)
    weights = networks["wrn-10-1"][1]
    for content in (
        {hostile: {hostile: torch.zeros(1)}},
        {hostile: weights | {hostile: torch.zeros(1)}},
        weights | {f"{hostile}.mean": torch.zeros(1)},
        {hostile: weights, hostile + "2": negated(weights)},
        {"." * 100_000: torch.zeros(1)},
    ):
        torch.save(content, tmp_path / "a.pt")
        said = refused("a.pt: ", load_weights, model, tmp_path / "a.pt")
        assert said.isprintable()


def failed(module, argv, monkeypatch, capsys):
    """The one line with which a script ends."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run_script(module.main, module.parse_args([str(word) for word in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def two(networks, tmp_path):
    """A file of two networks, neither of which is the average, and that of this project."""
    weights = networks["wrn-10-1"][1]
    content = {"model": theirs(seed=2)[1], "teacher": weights}
    torch.save(content, tmp_path / "two.pt")
    described = models.describe("wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.15}
    files.save(described | content, tmp_path / "own-two.pt")
    files.save(described | {"weights": weights}, tmp_path / "best.pt")
    return tmp_path


def test_hints_fit_the_flag(two, diffusion_dir, monkeypatch, capsys):
    def hint(module, *argv):
        return failed(module, argv, monkeypatch, capsys)

    foreign, own = two / "two.pt", two / "own-two.pt"
    needed = "two.pt: not a checkpoint of this project, no entry 'model_name'; a best.pt or last.pt"
    assert "see --model" in hint(evaluate, "--checkpoint", foreign)
    transfer = ["--checkpoint", two / "best.pt", "--attack", "transfer", "--transfer-from"]
    assert needed in hint(evaluate, *transfer, foreign)
    assert "save one of them alone: model, teacher" in hint(evaluate, *transfer, own)
    select = ["--diffusion", diffusion_dir, "--keep-fraction", 0.5, "--out-dir", two / "set"]
    select += ["--n-images", 10, "--classifier"]
    assert needed in hint(generate_synthetic, *select, foreign)
    named = "choose with --weights: model, teacher"
    assert named in hint(generate_synthetic, *select, own)
    measured = ["--out-dir", two / "analysis", "--model"]
    assert needed in hint(analyze, *measured, f"a={foreign}")
    assert "save one of them alone" in hint(analyze, *measured, f"a={own}")
    assert named in hint(evaluate, "--checkpoint", own)
    evaluated = ["--checkpoint", foreign, "--model", "wrn-10-1"]
    assert named in hint(evaluate, *evaluated)
    shifted = {"mean": torch.tensor([0.77])} | torch.load(foreign)["teacher"]
    torch.save(shifted, foreign)
    assert "see --mean and --std" in hint(evaluate, *evaluated)
    for script in (train_at, train_at_aux):
        alone = hint(script, "--weights", "model")
        assert "--weights: does nothing here, it goes with --init" in alone
    assert "--weights: does nothing" in hint(generate_synthetic, "--weights", "model")
    generative = ["--model", "diffusion-classifier", "--teacher", "x", "--weights", "model"]
    assert "--weights: does nothing" in hint(evaluate, *generative)


# ---------------------------------------------------------------------- --weights in the scripts


def test_the_choice_is_part_of_a_result(two, monkeypatch, capsys):
    def argv(*more, out="a.json"):
        flags = ["--checkpoint", two / "own-two.pt", "--attack", "clean", "--out", two / out]
        return [str(word) for word in [*flags, "--n-images", 100, *more]]

    def result(*more, out):
        evaluate.main(evaluate.parse_args(argv(*more, out=out)))
        return json.loads((two / out).read_text())

    one = result("--weights", "model", out="a.json")
    other = result("--weights", "teacher", out="b.json")
    assert (one["weights"], other["weights"]) == ("model", "teacher")
    own = ["--checkpoint", two / "best.pt", "--attack", "clean", "--out", two / "c.json"]
    own = [str(word) for word in [*own, "--n-images", 100]]
    evaluate.main(evaluate.parse_args(own))
    best = json.loads((two / "c.json").read_text())
    assert best["clean_correct"] == other["clean_correct"] and best["weights"] is None
    said = failed(evaluate, argv("--weights", "teacher"), monkeypatch, capsys)
    assert "holds another result (weights is model, not teacher)" in said


@pytest.mark.parametrize("script", [train_at, train_at_aux])
def test_the_choice_is_part_of_a_run(script, two, diffusion_dir, monkeypatch, capsys):
    argv = "--epochs 1 --n-train 100 --n-steps 1 --eval-n-steps 1 --lr 1e-9 --out-dir".split()
    argv += [str(two / "run"), "--init", str(two / "two.pt")]
    if script is train_at_aux:
        argv += ["--teacher", diffusion_dir, "--block", "mid_block"]
    assert "choose with --weights" in failed(script, argv, monkeypatch, capsys)
    argv += ["--weights"]
    script.main(script.parse_args([*argv, "teacher"]))
    assert json.loads((two / "run" / "args.json").read_text())["weights"] == "teacher"
    taken = files.load(two / "run" / "last.pt", {})["model"]["logits.weight"]
    expected = torch.load(two / "two.pt")["teacher"]["logits.weight"]
    torch.testing.assert_close(taken, expected, atol=1e-3, rtol=1e-3)
    said = failed(script, [*argv, "model"], monkeypatch, capsys)
    assert "weights is teacher there, model here" in said


def test_the_choice_is_part_of_a_synthetic_set(two, diffusion_dir, monkeypatch, capsys):
    argv = ["--diffusion", diffusion_dir, "--n-images", 20, "--n-steps", 2, "--keep-fraction", 0.5]
    argv += ["--classifier", two / "own-two.pt", "--out-dir", two / "set", "--weights"]
    argv = [str(word) for word in argv]
    generate_synthetic.main(generate_synthetic.parse_args([*argv, "teacher"]))
    manifest = json.loads((two / "set" / "manifest.json").read_text())
    assert manifest["selection"]["weights"] == "teacher"
    said = failed(generate_synthetic, [*argv, "model"], monkeypatch, capsys)
    assert "another selection" in said


# --------------------------------------------------------------- settings beside the weights, code


def module_of(name, **classes):
    """A module with classes, to be pickled under its name."""
    module = types.ModuleType(name)
    for key, thing in classes.items():
        thing.__module__, thing.__qualname__, thing.__name__ = name, key, key
        setattr(module, key, thing)
    return module


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for packages of settings, while a test pickles; they are gone when it reads."""

    class Node:
        def __init__(self):
            self._content = {"lr": 0.1}
            self._metadata = {"type": object}

    made = {
        "easydict": module_of("easydict", EasyDict=type("EasyDict", (dict,), {})),
        "yacs.config": module_of("yacs.config", CfgNode=type("CfgNode", (dict,), {})),
        "omegaconf.dictconfig": module_of("omegaconf.dictconfig", DictConfig=Node),
        "ml_collections.config_dict": module_of(
            "ml_collections.config_dict", ConfigDict=type("ConfigDict", (), {})
        ),
        "utils.config": module_of("utils.config", TrainConfig=type("TrainConfig", (), {})),
        "evil": module_of("evil", Payload=type("Payload", (), {})),
    }
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    for name in made:
        assert name not in sys.modules or sys.modules[name] is made[name]


def with_attributes(thing):
    thing.lr = 0.1
    return thing


SETTINGS = {
    "numpy scalar": lambda p: np.float64(0.5),
    "numpy integer": lambda p: np.int32(5),
    "numpy array": lambda p: np.zeros((2, 3)),
    "numpy strings": lambda p: np.array(["a", "b"]),
    "numpy rng": lambda p: np.random.get_state(),
    "numpy generator": lambda p: np.random.default_rng(0),
    "python rng": lambda p: random.getstate(),
    "torch rng": lambda p: [torch.get_rng_state()],
    "namespace": lambda p: argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/a")),
    "simple namespace": lambda p: types.SimpleNamespace(a=types.SimpleNamespace(b=1)),
    "path": lambda p: pathlib.Path("/a/b"),
    "defaultdict": lambda p: collections.defaultdict(list, a=[1]),
    "ordered": lambda p: collections.OrderedDict(a=1),
    "counter": lambda p: collections.Counter("abc"),
    "versions": lambda p: torch.__version__,
    "deque": lambda p: collections.deque([1, 2], maxlen=3),
    "datetime": lambda p: datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "timedelta": lambda p: datetime.timedelta(seconds=3),
    "sets": lambda p: [{1, 2}, frozenset("a"), b"bytes", bytearray(b"x"), 2**70, -(2**2000)],
    "types": lambda p: [int, dict, torch.float32, torch.device("cpu"), torch.Size([1])],
    "easydict": lambda p: with_attributes(p["easydict"].EasyDict(lr=0.1)),
    "yacs": lambda p: with_attributes(p["yacs.config"].CfgNode(lr=0.1)),
    "omegaconf": lambda p: p["omegaconf.dictconfig"].DictConfig(),
    "ml_collections": lambda p: with_attributes(p["ml_collections.config_dict"].ConfigDict()),
    "a script's own": lambda p: with_attributes(p["utils.config"].TrainConfig()),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_beside_the_weights_do_not_hinder(kind, packages, networks, tmp_path, monkeypatch):
    weights = networks["wrn-10-1"][1]
    content = {"epoch": 3, "settings": SETTINGS[kind](packages), "state_dict": weights, "end": 1}
    for protocol in (2, 4):
        torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
        for name in packages:  # as on a machine without the package
            monkeypatch.delitem(sys.modules, name)
        model = models.build("wrn-10-1", DIGITS).eval()
        load_weights(model, tmp_path / "a.pt")
        assert_is(model, "wrn-10-1", networks)
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)


def test_weights_within_a_dict_of_settings_are_found(packages, networks, tmp_path):
    weights = networks["wrn-10-1"][1]
    for outer in (packages["easydict"].EasyDict, lambda **k: collections.defaultdict(dict, k)):
        content = outer(acc=np.float64(0.1), net=outer(state_dict=weights))
        assert_is(loaded(content, tmp_path / "a.pt"), "wrn-10-1", networks)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Sets:
    """Pickles as an object of a listed class whose state asks for code."""

    def __reduce__(self):
        return argparse.Namespace, (), {"x": Calls(os.system, "touch ran")}


CODE = {
    "os.system": (lambda p: Calls(os.system, "touch ran"), "asks for posix.system"),
    "eval": (lambda p: Calls(eval, "open('ran', 'w')"), "asks for (builtins.)?eval"),
    "exec": (lambda p: Calls(exec, "open('ran', 'w')"), "asks for (builtins.)?exec"),
    "getattr": (lambda p: Calls(getattr, {}, "keys"), "asks for (builtins.)?getattr"),
    "a mere name": (lambda p: os.system, "asks for posix.system"),
    "hidden in settings": (lambda p: [np.float64(1), Sets()], "asks for posix.system"),
    "torch.load": (lambda p: Calls(torch.load, "x"), "asks for torch.serialization.load"),
    "a function of numpy": (lambda p: Calls(np.load, "x"), "asks for numpy"),
    "a module": (lambda p: nn.Linear(2, 2), "holds a pickled torch.nn.modules.linear.Linear, not"),
    "an unknown class": (lambda p: p["evil"].Payload(), "holds a pickled evil.Payload, not its"),
}


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(kind, zipped, packages, networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = CODE[kind]
    weights = networks["wrn-10-1"][1]
    model = models.build("wrn-10-1", DIGITS)
    for protocol in (2, 4):
        for content in (make(packages), {"acc": np.float64(1), "a": make(packages), "w": weights}):
            options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
            torch.save(content, "a.pt", **options)
            refused(f"^a.pt: refused, {words}", load_weights, model, "a.pt")
    with open("a.pt", "wb") as file:
        pickle.dump({"a": make(packages)}, file)
    refused("^a.pt: refused", load_weights, model, "a.pt")
    assert not os.path.exists("ran")


def test_a_torchscript_program_is_refused_by_name(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    model = models.build("wrn-10-1", DIGITS)
    refused("refused, holds a TorchScript program, not", load_weights, model, tmp_path / "a.pt")


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.fixture
def our_reader(monkeypatch):
    """PyTorch's own reader refuses everything, so that ours is asked."""

    def refuse(*args, **kwargs):
        raise pickle.UnpicklingError("refused")

    monkeypatch.setattr(torch, "load", refuse)


def test_damaged_pickles_are_one_line(our_reader, tmp_path):
    """Flipped and cut bytes: refused, or read; a tensor is never larger than its file."""
    rng = random.Random(0)
    path = tmp_path / "a.pt"
    small = {"w": torch.arange(3.0), "b": torch.zeros(2, 2, dtype=torch.int64)}
    beside = {"args": argparse.Namespace(a=1), "n": np.float64(1), "s": {1}, "t": (1, 2.0, None)}
    whole = [
        saved({"model": small} | beside, pickle_protocol=p, _use_new_zipfile_serialization=z)
        for p in (2, 4)
        for z in (True, False)
    ]
    n_read = 0
    for _ in range(1500):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            value = files.load(path, {})
            n_read += isinstance(value, dict) and isinstance(value.get("model"), dict)
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 600
            assert "Traceback" not in message
    assert n_read > 100


def hostile(opcodes):
    """An old file of torch.save whose main pickle has the given opcodes."""
    heads = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join(heads) + b"\x80\x04" + opcodes + b"." + pickle.dumps([], 2)


FLOATS = b"(\x8c\x07storage" + b"\x8c\x05torch\x8c\x0cFloatStorage\x93"
REBUILD = b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93"
NAMESPACE = b"\x8c\x08argparse\x8c\x09Namespace\x93"
STREAMS = {
    "a storage larger than the file": FLOATS
    + b"\x8c\x010\x8c\x03cpu\x8a\x06\xff\xff\xff\xff\xff\x0ftQ",
    "a storage without a size": FLOATS + b"\x8c\x010\x8c\x03cpuNtQ",
    "another persistent object": b"\x8c\x06moduleQ",
    "a persistent tuple": b"(\x8c\x06module\x8c\x01xtQ",
    "a tensor of no storage": REBUILD + b"(NK\x00))t" + b"R",
    "defaults of a function": REBUILD + b"}\x8c\x0c__defaults__)sb",
    "a state for a number": b"K\x01}b",
    "a call of a text": b"\x8c\x05print)R",
    "a call of an object": NAMESPACE + b")R)R",
    "a call without a tuple": NAMESPACE + b"]R",
    "a dotted name": b"\x8c\x08argparse\x8c\x0cNamespace.os\x93",
    "a name without a text": b"NN\x93",
    "no mark": b"K\x01u",
    "an empty stack": b"R",
    "extension": b"\x82\x01",
    "buffer": b"\x97",
    "missing memo": b"h\x07",
    "huge": b"\x8e" + b"\xff" * 7 + b"\x00",
    "deep key": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
    "list": b"]K\x01a",
    "number": b"K\x01",
}


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_streams(name, our_reader, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(hostile(STREAMS[name]))
    model = models.build("wrn-10-1", DIGITS)
    words = "truncated, broken, or not|asks for argparse.Namespace.os|no state dict .* for the wrn"
    refused(f"a.pt: .*({words})", load_weights, model, path)


def test_dicts_without_end_are_refused(tmp_path):
    """A dict in itself, and a small file that is a tree of a billion dicts."""
    model = models.build("wrn-10-1", DIGITS)
    circle = {"weight": torch.zeros(1)}
    circle["self"] = circle
    torch.save(circle, tmp_path / "a.pt")
    refused("a.pt: state does not fit", load_weights, model, tmp_path / "a.pt")
    tree = {"weight": torch.zeros(1)}
    for _ in range(9):
        tree = {str(i): tree for i in range(10)}
    torch.save(tree, tmp_path / "a.pt")
    refused("a.pt: more than 100000 dicts", load_weights, model, tmp_path / "a.pt")
    deep = {"weight": torch.zeros(1)}
    for _ in range(200):
        deep = {"a": deep}
    torch.save(deep, tmp_path / "a.pt")
    refused("a.pt: no state dict", load_weights, model, tmp_path / "a.pt")


# ---------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(name, {file: content}): a repository of that name, for a faked snapshot_download."""
    repositories = {}
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        if repo_id not in repositories:
            raise OSError("Repository not found\nmore words")
        return str(repositories[repo_id])

    def make(name, contents):
        folder = tmp_path / "hub" / name
        for file, tensors in contents.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            metadata = tensors.pop("metadata", None)
            safetensors.torch.save_file(tensors, folder / file, metadata)
        folder.mkdir(parents=True, exist_ok=True)
        repositories[name] = folder
        return f"hub:{name}"

    make.asked = asked
    files._hub_weights.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    yield make
    files._hub_weights.cache_clear()


def described(weights):
    about = models.describe("wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.15}
    return weights | {"metadata": {"classifier": json.dumps(about)}}


def test_weights_of_the_hub(hub, networks):
    weights = networks["wrn-10-1"][1]
    only = hub("them/only", {"sub/weights.safetensors": prefixed("module.", weights)})
    main = {"model.safetensors": dict(weights), "other.safetensors": negated(weights)}
    main = hub("them/main", main)
    for name in (only, main):
        model = models.build("wrn-10-1", DIGITS).eval()
        load_weights(model, name)
        assert_is(model, "wrn-10-1", networks)
    assert hub.asked[0] == ("them/only", ["*.json", "*.safetensors"])
    assert files.sha256(main) == files.sha256(files.local_weights(main))
    several = {"a.safetensors": dict(weights), "b.safetensors": dict(weights)}
    several = hub("them/several", several)
    nothing = hub("them/none", {})
    expected = "expected model.safetensors, or one file alone"
    refused(f"several: .*a.safetensors, b.safetensors; {expected}", load_weights, model, several)
    refused(f"none: its .safetensors files are none; {expected}", load_weights, model, nothing)
    lost = "^hub:them/lost: could not be fetched .Repository not found.$"
    refused(lost, load_weights, model, "hub:them/lost")
    refused(lost, load_classifier, "hub:them/lost", DIGITS, "cpu")


def test_best_safetensors_says_what_it_is(hub, networks, tmp_path):
    """So that a run can be put on the hub, and read wherever a best.pt is."""
    weights = networks["wrn-10-1"][1]
    name = hub("them/own", {"best.safetensors": described(dict(weights))})
    model, about = load_classifier(name, DIGITS, "cpu")
    assert (about["norm"], about["eps"], about["model_name"]) == ("linf", 0.15, "wrn-10-1")
    assert_is(model, "wrn-10-1", networks)
    argv = "--epochs 1 --n-train 100 --n-steps 1 --eval-n-steps 1 --out-dir".split()
    train_at.main(train_at.parse_args([*argv, str(tmp_path / "run")]))
    pair = [
        load_classifier(tmp_path / "run" / f, DIGITS, "cpu")
        for f in ("best.pt", "best.safetensors")
    ]
    assert pair[1][1] == {key: pair[0][1][key] for key in pair[1][1]}
    for ours, again in zip(*[model.state_dict().values() for model, _ in pair]):
        assert torch.equal(ours, again)


def test_hub_names_in_the_scripts(hub, networks, two, diffusion_dir, monkeypatch, capsys):
    monkeypatch.chdir(two)
    weights = networks["wrn-10-1"][1]
    name = hub("them/robust-1.5", {"model.safetensors": described(dict(weights))})
    digest = files.sha256(name)
    argv = ["--checkpoint", name, "--attack", "clean", "--n-images", "50"]
    evaluate.main(evaluate.parse_args(argv))
    (written,) = glob.glob("out/robust-1.5/*.json")
    assert os.path.basename(written).startswith("results-robust-1.5-clean")
    result = json.loads(open(written).read())
    assert (result["checkpoint"], result["checkpoint_sha256"]) == (name, digest)

    argv = ["--checkpoint", str(two / "best.pt"), "--attack", "transfer", "--transfer-from", name]
    argv += ["--n-images", "20", "--sanity-images", "0", "--out", str(two / "t.json")]
    evaluate.main(evaluate.parse_args(argv))
    assert json.loads((two / "t.json").read_text())["transfer_sha256"] == digest

    argv = "--epochs 1 --n-train 100 --n-steps 1 --eval-n-steps 1 --out-dir run --init".split()
    train_at.main(train_at.parse_args([*argv, name]))
    assert json.loads(open("run/args.json").read())["init_sha256"] == digest

    argv = ["--diffusion", diffusion_dir, "--n-images", "20", "--n-steps", "2", "--out-dir", "set"]
    argv += ["--keep-fraction", "0.5", "--classifier", name]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    selection = json.loads(open("set/manifest.json").read())["selection"]
    assert selection["classifier_sha256"] == digest

    argv = ["--model", f"them={name}", "--n-images", "50", "--n-attacked", "10"]
    jobs = analyze.jobs_of(analyze.parse_args(argv), {}, None)
    assert jobs[0].request == {"checkpoint_sha256": digest}
    lost = ["--checkpoint", "hub:them/lost"]
    assert "could not be fetched" in failed(evaluate, lost, monkeypatch, capsys)
