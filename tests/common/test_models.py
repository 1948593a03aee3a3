"""Classifiers are what they are said to be, and weights of others load.

Alone: python -m pytest -n 0 tests/common/test_models.py
"""

import copy
import dataclasses
import os
import re
import urllib.error

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from conftest import DIGITS
from robustbench_helper import robustbench_class
from torch import nn

from common import UserError, attacks, files, models
from published.weights import load_classifier, load_weights

RGB = dataclasses.replace(
    DIGITS,
    name="rgb",
    image_size=32,
    channels=3,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
)
RGB64 = dataclasses.replace(RGB, image_size=64)
FEATURES = {
    "wrn-10-1": 64,
    "preact-18": 512,
    "resnet-18": 512,
    "vit-s-2": 384,
    "vit-b-2": 768,
    "resnet50": 2048,
    "convnext_tiny": 768,
    "convnext_base": 1024,
    "vit_b_16": 768,
    "swin_t": 768,
    "swin_b": 1024,
}
TORCHVISION = list(FEATURES)[5:]


def resized(spec, size, **changes):
    return dataclasses.replace(spec, image_size=size, **changes)


def refused(match, call, *args, **kwargs):
    """The call ends with a UserError of one line."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# ------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("name", ["wrn-16-1", "wrn-10-2", "wrn-28-10", "preact-18"])
def test_weights_load_strictly_in_robustbench_with_equal_logits(name):
    torch.manual_seed(0)
    ours = models.build(name, RGB).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    options = {"activation_fn": nn.SiLU, "mean": RGB.mean, "std": RGB.std}
    if name == "preact-18":
        theirs = robustbench_class("DMPreActResNet")(**options).eval()
    else:
        depth, width = models.wrn_size(name)
        theirs = robustbench_class("DMWideResNet")(depth=depth, width=width, **options).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,keys", [("wrn-28-10", 155), ("wrn-70-16", 407), ("wrn-94-16", 551)])
def test_key_counts_of_the_published_networks(name, keys):
    depth, width = models.wrn_size(name)
    with torch.device("meta"):
        assert len(models.WideResNet(depth, width, 10, RGB.mean, RGB.std).state_dict()) == keys


CONVOLUTIONAL = ("wrn-10-1", "preact-18", "resnet-18")
SIZES = [(name, size) for name in CONVOLUTIONAL for size in (8, 28, 32, 64)]
SIZES += [("vit-s-2", 8), ("vit-s-2", 28), ("vit-b-2", 8), ("vit_b_16", 80)]
SIZES += [(name, 64) for name in TORCHVISION]


@pytest.mark.parametrize("name,size", SIZES)
def test_any_image_size_and_features(name, size):
    torch.manual_seed(0)
    model = models.build(name, resized(RGB, size, num_classes=7)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert model.num_features == FEATURES[name]
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        assert logits.shape == (2, 7) and features.shape == (2, FEATURES[name])
        assert torch.equal(logits, model(x))
        assert torch.equal(model.logits(features), logits)
        model.mean.zero_()
        assert not torch.allclose(model(x), logits)  # normalisation is inside


def test_initialisation_is_he_by_fan_out():
    torch.manual_seed(0)
    weight = models.build("wrn-16-4", RGB).layer[1].block[1].conv_0.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-28", "resnet18", "wrn-4-1", "wrn-28-0", ""])
def test_unknown_models_are_named(name):
    for call in (models.check_model, models.build):
        refused("model .*expected wrn-.*preact-18.*vit-s-2.*swin_b", call, name, RGB64)
    refused("model '", models.wrn_size, name)


def test_models_that_do_not_fit_the_images_are_refused():
    for name in FEATURES:
        models.check_model(name, RGB64)
    patches = "vit-s-2': its patches of 2 pixels.* 3 x 33 x 33"
    refused(patches, models.check_model, "vit-s-2", resized(RGB, 33))
    patches = "vit_b_16': its patches of 16 pixels"
    refused(patches, models.check_model, "vit_b_16", resized(RGB, 72))
    for name in TORCHVISION:
        made_for = f"model '{name}': made for RGB images.* rgb has 3 x 32 x 32"
        refused(made_for, models.check_model, name, RGB)
        refused("has 1 x 64 x 64", models.check_model, name, resized(RGB, 64, channels=1))


def test_no_weight_decay_on_batchnorm_and_biases():
    model = models.build("resnet-18", DIGITS)
    head = nn.Linear(3, 2)
    norms = [p for n, p in model.named_parameters() if re.search(r"bn\d|downsample.1", n)]
    biases = [model.logits.bias, head.bias]
    everything = [*model.parameters(), *head.parameters()]
    for decay_biases, without in ((True, norms), (False, norms + biases)):
        decayed, spared = models.parameter_groups([model, head], 0.1, decay_biases)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
        without = set(without)
        assert set(spared["params"]) == without
        # In the order of the modules: the optimiser's state in last.pt has no names.
        assert decayed["params"] == [p for p in everything if p not in without]
        assert spared["params"] == [p for p in everything if p in without]


# ------------------------------------------------------------------------------------- transformers


def plain_vit(weights, x, heads):
    """Logits of a pre-norm ViT with patch 2, image by image and head by head.

    arXiv 2010.11929, section 3.1.
    """

    def norm(h, name):
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return h * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(h, name):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attention(z, name):
        qkv = z @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
        q, k, v = (part.chunk(heads, 1) for part in qkv.chunk(3, 1))
        mixed = []
        for q_head, k_head, v_head in zip(q, k, v):
            scores = q_head @ k_head.T / q_head.shape[1] ** 0.5
            mixed.append(scores.softmax(1) @ v_head)
        return linear(torch.cat(mixed, 1), f"{name}.out_proj")

    n_layers = sum(key.endswith("ln_1.weight") for key in weights)
    projection = weights["network.conv_proj.weight"].flatten(1)
    logits = []
    for image in x:
        patches = []
        for i in range(0, x.shape[2], 2):
            for j in range(0, x.shape[3], 2):
                patches.append(image[:, i : i + 2, j : j + 2].flatten())
        tokens = torch.stack(patches) @ projection.T + weights["network.conv_proj.bias"]
        h = torch.cat([weights["network.class_token"][0], tokens])
        h = h + weights["network.encoder.pos_embedding"][0]
        for layer in range(n_layers):
            block = f"network.encoder.layers.encoder_layer_{layer}"
            h = h + attention(norm(h, f"{block}.ln_1"), f"{block}.self_attention")
            hidden = F.gelu(linear(norm(h, f"{block}.ln_2"), f"{block}.mlp.0"))
            h = h + linear(hidden, f"{block}.mlp.3")
        logits.append(linear(norm(h, "network.encoder.ln")[0], "logits"))
    return torch.stack(logits)


def test_vit_is_its_equations():
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(8, 2, 3, 2, 16, 64, num_classes=10)
    model = models.TorchvisionClassifier(network, RGB.mean, RGB.std).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        expected = plain_vit(model.state_dict(), (x - model.mean) / model.std, heads=2)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name,hidden,heads", [("vit-s-2", 384, 6), ("vit-b-2", 768, 12)])
@pytest.mark.parametrize("channels,size", [(1, 28), (3, 32)])
def test_vit_sizes(name, hidden, heads, channels, size):
    colors = {"channels": channels, "mean": (0.5,) * channels, "std": (1,) * channels}
    with torch.device("meta"):
        model = models.build(name, resized(RGB, size, **colors))
    n_tokens = 1 + (size // 2) ** 2
    embedding = (4 * channels + 1) * hidden + hidden + n_tokens * hidden
    attention = 4 * hidden**2 + 4 * hidden
    mlp = 2 * 4 * hidden**2 + 5 * hidden
    norms = 4 * hidden
    last = 2 * hidden + 10 * hidden + 10
    expected = embedding + 12 * (attention + mlp + norms) + last
    assert sum(p.numel() for p in model.parameters()) == expected
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert {module.num_heads for module in attentions} == {heads}


def test_vit_on_single_channel_images():
    torch.manual_seed(0)
    model = models.build("vit-s-2", dataclasses.replace(DIGITS, image_size=28)).eval()
    weight = model.network.conv_proj.weight
    assert weight.shape == (384, 1, 2, 2)
    assert weight.std().item() == pytest.approx((1 / 4) ** 0.5, rel=0.05)
    with torch.no_grad():
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_attacks_have_a_gradient_at_a_vits_initialisation(loss):
    torch.manual_seed(0)
    model = models.build("vit-s-2", DIGITS).eval()
    x = 0.2 + 0.6 * torch.rand(4, 1, 8, 8)
    y = torch.arange(4)
    start = torch.rand(4, 1, 8, 8) * 0.02
    attack = {"norm": "linf", "eps": 0.1, "step_size": 0.05, "n_steps": 1, "loss": loss}

    def moved():
        """The fraction of pixels that one step moves."""
        x_adv = attacks.pgd(model, x, y, start, **attack)
        return (x_adv - x - start).abs().gt(0.04).float().mean().item()

    assert moved() > 0.99
    nn.init.zeros_(model.logits.weight)  # as torchvision would have it
    assert moved() == 0


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_networks_draw_no_random_numbers_in_training(name):
    torch.manual_seed(0)
    model = models.build(name, RGB64).train()
    x = torch.rand(2, 3, 64, 64)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------- weights of others


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "vit_b_16", "swin_t"])
def test_torchvision_files_load_with_equal_logits(name, tmp_path):
    torch.manual_seed(0)
    options = {"image_size": 64} if name == "vit_b_16" else {}
    theirs = torchvision.models.get_model(name, num_classes=10, **options).eval()
    nn.init.normal_([m for m in theirs.modules() if isinstance(m, nn.Linear)][-1].weight)
    state = theirs.state_dict()
    if name == "vit_b_16":  # the published file has its MLPs' older names
        older = {}
        for key, value in state.items():
            key = key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")
            older[key] = value
        assert older.keys() != state.keys()
        state = older
    torch.save(state, tmp_path / "a.pth")
    ours = models.build(name, RGB64).eval()
    assert load_weights(ours, tmp_path / "a.pth") is True
    x = torch.rand(2, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(x, RGB.mean, RGB.std)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(normalised), rtol=1e-4, atol=1e-5)


def test_published_weights(tmp_path, monkeypatch):
    """A file in torch.hub's cache stands for the download; then there is no network or no data."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet50").DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    theirs = torchvision.models.resnet50().state_dict()
    torch.save(theirs, cached)
    model = models.build("resnet50", resized(RGB, 64, num_classes=1000))
    assert load_weights(model, "torchvision") is True
    assert torch.equal(model.network.layer4[2].conv3.weight, theirs["layer4.2.conv3.weight"])
    assert torch.equal(model.logits.bias, theirs["fc.bias"])

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    cached.unlink()
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    lost = "^torchvision: https://.*resnet50.*no network"
    refused(lost, load_weights, model, "torchvision")
    torch.save({"conv1.weight": Hostile()}, cached)
    monkeypatch.chdir(tmp_path)
    hostile = "^torchvision: https://.*not a file of weights"
    refused(hostile, load_weights, model, "torchvision")
    assert not os.path.exists("hostile-code-ran")
    for name in ("wrn-10-1", "vit-s-2"):
        other = models.build(name, DIGITS)
        refused("^torchvision: .*resnet50.* only", load_weights, other, "torchvision")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


def trained(seed=1, name="wrn-10-1"):
    """A classifier of digits and its state dict."""
    torch.manual_seed(seed)
    model = models.build(name, DIGITS).eval()
    return model, {key: value.contiguous() for key, value in model.state_dict().items()}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def negated(weights):
    """Weights that no file may be read by: the ones that were not averaged."""
    return {key: -value for key, value in weights.items()}


def packed_by_robustbench(weights):
    normalisation = {"mean": torch.tensor(DIGITS.mean), "std": torch.tensor(DIGITS.std)}
    return {"state_dict": prefixed("model.", weights | normalisation)}


def packed_by_dm_at(weights):
    return {
        "model_state_dict": prefixed("module.0.", weights),
        "unaveraged_model_state_dict": prefixed("module.0.", negated(weights)),
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        "epoch": 3,
    }


PACKED = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": prefixed("module.", weights), "epoch": 3},
    "robustbench": packed_by_robustbench,
    "dm-at": packed_by_dm_at,
    "ema": lambda weights: {"ema": weights, "model": negated(weights)},
}


@pytest.mark.parametrize("packed", [*PACKED, "safetensors"])
def test_files_of_others_load(packed, tmp_path):
    theirs, weights = trained()
    if packed == "safetensors":
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(weights, path)
    else:
        path = tmp_path / "a.pt"
        torch.save(PACKED[packed](weights), path)
    ours, _ = trained(seed=2)
    assert load_weights(ours, path) is True
    classifier, about = load_classifier(path, DIGITS, "cpu", name="wrn-10-1")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(classifier(x), theirs(x))
    assert not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    assert about == about | {
        "model_name": "wrn-10-1",
        "dataset": "digits",
        "num_classes": 10,
        "norm": None,
        "eps": None,
    }
    nameless = "a.(pt|safetensors): not a checkpoint of this project.*a best.pt or last.pt"
    refused(nameless, load_classifier, path, DIGITS, "cpu")


def test_files_with_the_names_of_public_cifar_code_load(tmp_path):
    theirs, weights = trained(name="resnet-18")
    renamed = {}
    for key, value in weights.items():
        key = key.removeprefix("network.").replace("logits.", "linear.")
        renamed[key.replace("downsample.", "shortcut.")] = value
    assert {"conv1.weight", "layer2.0.shortcut.1.bias", "linear.weight"} <= renamed.keys()
    torch.save(renamed, tmp_path / "a.pt")
    ours, _ = trained(seed=2, name="resnet-18")
    assert load_weights(ours, tmp_path / "a.pt") is True
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_files_of_this_project_load(file, tmp_path):
    """The averaged weights of last.pt are its entry "ema"; its "model" is not averaged."""
    path = tmp_path / file
    theirs, weights = trained()
    content = models.describe("wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.15, "step": 3}
    if file == "best.pt":
        content["weights"] = weights
    else:
        content["model"] = trained(seed=2)[1]
        content["ema"] = weights
    files.save(content, path)
    ours, _ = trained(seed=3)
    x = torch.rand(2, 1, 8, 8)
    assert load_weights(ours, path) is True
    for name in (None, "wrn-10-1"):
        classifier, about = load_classifier(path, DIGITS, "cpu", name=name)
        assert (about["norm"], about["eps"], about["step"]) == ("linf", 0.15, 3)
        with torch.no_grad():
            assert torch.equal(classifier(x), theirs(x))
            assert torch.equal(ours(x), theirs(x))
    other_model = f"{file}: holds a wrn-10-1, not a wrn-10-2"
    refused(other_model, load_classifier, path, DIGITS, "cpu", name="wrn-10-2")
    other_classes = dataclasses.replace(DIGITS, num_classes=100)
    refused("trained on digits .10 classes", load_classifier, path, other_classes, "cpu")
    for entry in ("model_name", "eps"):
        files.save(content | {entry: None}, path)
        refused(f"'{entry}' is missing or no", load_classifier, path, DIGITS, "cpu")
    files.save(models.describe("wrn-10", DIGITS) | {"norm": "l2", "eps": 0.5}, path)
    refused(f"{file}: model 'wrn-10': expected", load_classifier, path, DIGITS, "cpu")
    files.save(models.describe("wrn-10-1", DIGITS) | {"norm": "l2", "eps": 0.5}, path)
    refused(f"{file}: no state dict", load_classifier, path, DIGITS, "cpu")


@pytest.mark.parametrize("name,spec", [("wrn-10-1", DIGITS), ("swin_t", RGB64)])
def test_another_class_count_keeps_the_fresh_logits(name, spec, tmp_path):
    path = tmp_path / "a.pt"
    torch.manual_seed(1)
    if name == "swin_t":
        theirs = torchvision.models.swin_t(num_classes=7)
        key, own_key, head = "features.0.0.weight", "network.features.0.0.weight", "head.weight"
    else:
        theirs = models.build(name, dataclasses.replace(spec, num_classes=7))
        key, own_key, head = "init_conv.weight", "init_conv.weight", "logits.weight"
    state = theirs.state_dict()
    torch.save(state, path)
    ours = models.build(name, spec)
    before = copy.deepcopy(ours.logits.state_dict())
    assert load_weights(ours, path) is False
    assert torch.equal(ours.get_parameter(own_key), theirs.get_parameter(key))
    for entry, value in ours.logits.state_dict().items():
        assert torch.equal(value, before[entry])
    misfit = "a.pt: state does not fit"
    refused(f"{misfit}.*logits", load_classifier, path, spec, "cpu", name=name)
    state.pop(key)  # the class count is not the only difference
    torch.save(state, path)
    refused(f"{misfit}.*Missing.*{key}", load_weights, ours, path)
    state.pop(head)
    torch.save(state, path)
    refused(misfit, load_weights, ours, path)


def without_a_bias(weights):
    return {key: value for key, value in weights.items() if key != "batchnorm.bias"}


NOT_FITTING = {
    "lacks": (without_a_bias, "Missing key.*batchnorm.bias"),
    "more": (lambda w: w | {"extra.weight": torch.zeros(1)}, "Unexpected key.*extra.weight"),
    "size": (lambda w: w | {"batchnorm.bias": torch.zeros(3)}, "mismatch for batchnorm.bias"),
    "prefix": (lambda w: prefixed("a.", w) | {"a.init_conv.weight": 0}, "Missing key a.init_conv"),
    "deeper": (lambda w: trained(name="wrn-16-1")[1], "Unexpected key"),
    "another": (lambda w: trained(name="preact-18")[1], "Missing key"),
    "NaN": (
        lambda w: w | {"batchnorm.bias": torch.full((64,), torch.nan)},
        "'batchnorm.bias' holds NaN or inf",
    ),
    "inf": (
        lambda w: w | {"batchnorm.running_var": torch.full((64,), torch.inf)},
        "'batchnorm.running_var' holds NaN or inf",
    ),
    "mean": (
        lambda w: w | {"mean": torch.tensor([0.5])},
        "normalises by a mean of .0.5., expected",
    ),
    "colors": (lambda w: w | {"std": torch.ones(3)}, "normalises by a std of .1.0, 1.0, 1.0."),
    "no tensors": (lambda w: {"state_dict": {"a": 1}}, "no state dict"),
    "no names": (lambda w: {1: torch.zeros(1)}, "no state dict"),
    "list": (lambda w: [1, 2], "no state dict"),
    "tensor": (lambda w: torch.zeros(3), "no state dict"),
    "code": (lambda w: w | {"a": Hostile()}, "refused.*system"),
    "module": (lambda w: nn.Linear(2, 2), "refused.*Linear"),
}


@pytest.mark.parametrize("case", NOT_FITTING)
def test_files_that_do_not_fit_are_named(case, tmp_path, monkeypatch):
    change, match = NOT_FITTING[case]
    monkeypatch.chdir(tmp_path)
    model, weights = trained()
    torch.save(change(weights), "a.pt")
    refused(f"^a.pt: .*{match}", load_weights, model, "a.pt")
    refused(f"^a.pt: .*{match}", load_classifier, "a.pt", DIGITS, "cpu", name="wrn-10-1")
    assert not os.path.exists("hostile-code-ran")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_broken_files_are_named(suffix, tmp_path):
    model, weights = trained()
    path = tmp_path / f"a.{suffix}"
    refused(f"a.{suffix}: no such file", load_weights, model, path)
    path.mkdir()
    refused(f"a.{suffix}: ", load_weights, model, path)
    path.rmdir()
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(weights, path)
    content = path.read_bytes()
    broken = f"a.{suffix}: (.*truncated|refused)"
    for keep in (0, 1, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(broken, load_weights, model, path)
        refused(broken, load_classifier, path, DIGITS, "cpu", name="wrn-10-1")


@pytest.mark.parametrize("damage", ["int64", "complex64", "sparse", "meta"])
def test_tensors_of_another_kind_are_refused(damage, tmp_path):
    """Integers would be rounded into the weights in silence, the others end in a traceback."""
    model, weights = trained()
    key = "logits.weight"
    weights[key] = {
        "int64": lambda tensor: tensor.long(),
        "complex64": lambda tensor: tensor.to(torch.complex64),
        "sparse": lambda tensor: tensor.to_sparse(),
        "meta": lambda tensor: tensor.to("meta"),
    }[damage](weights[key])
    torch.save(weights, tmp_path / "a.pt")
    refused("'logits.weight' is .*expected a dense tensor", load_weights, model, tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"norm": "l7"}, {"eps": float("nan")}, {"eps": -1.0}])
def test_a_threat_model_that_cannot_be_is_refused(change, tmp_path):
    model, weights = trained()
    content = models.describe("wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.1, "weights": weights}
    torch.save(content | change, tmp_path / "a.pt")
    refused("damaged, its norm is", load_classifier, tmp_path / "a.pt", DIGITS, "cpu")
