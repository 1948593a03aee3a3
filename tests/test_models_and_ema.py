"""Classifiers are what they are said to be, weights of others load; the average is an average.

Alone: python -m pytest tests/test_models_and_ema.py
"""

import copy
import dataclasses
import importlib.util
import os
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from conftest import DIGITS
from torch import nn

from common import attacks, checkpoint, cli, models
from common.ema import EMA

RGB = dataclasses.replace(DIGITS, name="rgb", image_size=32, channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
RGB64 = dataclasses.replace(RGB, image_size=64)
FEATURES = {
    **{"wrn-10-1": 64, "preact-18": 512, "vit-s-2": 384, "vit-b-2": 768},
    **{"resnet50": 2048, "convnext_tiny": 768, "convnext_base": 1024, "vit_b_16": 768, "swin_t": 768, "swin_b": 1024},
}
IMAGENET = list(FEATURES)[4:]


def robustbench(name):
    """A class from RobustBench's own file; importing the whole package would need its data-set stack."""
    root = Path(importlib.util.find_spec("robustbench").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("dm_wide_resnet", root / "model_zoo" / "architectures" / "dm_wide_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def refused(match, call, *args, **kwargs):
    """The call ends with a UserError of one line."""
    with pytest.raises(cli.UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# ---------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ["wrn-16-1", "wrn-10-2", "wrn-28-10", "wrn-70-16", "preact-18"])
def test_weights_load_strictly_in_robustbench_with_equal_logits(name):
    torch.manual_seed(0)
    ours = models.build(name, RGB).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    if name == "preact-18":
        theirs = robustbench("DMPreActResNet")(activation_fn=nn.SiLU, mean=RGB.mean, std=RGB.std).eval()
    else:
        depth, width = models.parse_model(name)
        theirs = robustbench("DMWideResNet")(depth=depth, width=width, activation_fn=nn.SiLU, mean=RGB.mean, std=RGB.std).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)  # no second copy of 267 million parameters
    x = torch.rand(1 if name == "wrn-70-16" else 2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name,keys", [("wrn-28-10", 155), ("wrn-70-16", 407), ("wrn-94-16", 551)])
def test_key_counts_of_the_published_networks(name, keys):
    depth, width = models.parse_model(name)
    with torch.device("meta"):
        assert len(models.WideResNet(depth, width, 10, RGB.mean, RGB.std).state_dict()) == keys


SIZES = [(name, size) for name in ("wrn-10-1", "preact-18") for size in (8, 28, 32, 64)]
SIZES += [("vit-s-2", 8), ("vit-s-2", 28), ("vit-b-2", 8), ("vit_b_16", 80)] + [(name, 64) for name in IMAGENET]


@pytest.mark.parametrize("name,size", SIZES)
def test_any_image_size_and_features(name, size):
    torch.manual_seed(0)
    model = models.build(name, dataclasses.replace(RGB, image_size=size, num_classes=7)).eval()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        assert logits.shape == (2, 7) and features.shape == (2, FEATURES[name]) == (2, model.num_features)
        assert torch.equal(logits, model(x)) and torch.equal(model.logits(features), logits)
        model.mean.zero_()
        assert not torch.allclose(model(x), logits)  # normalisation is inside


def test_initialisation_is_he_by_fan_out():
    torch.manual_seed(0)
    weight = models.build("wrn-16-4", RGB).layer[1].block[1].conv_0.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-28", "resnet18", "wrn-4-1", "wrn-28-0", ""])
def test_unknown_models_are_named(name):
    for call in (models.check_model, models.build):
        refused("--model .*expected wrn-.*preact-18.*vit-s-2.*swin_b", call, name, RGB64)
    refused("--model", models.parse_model, name)


def test_models_that_do_not_fit_the_images_are_refused():
    for name in FEATURES:
        models.check_model(name, RGB64)
    refused("vit-s-2: its patches of 2 pixels.* 3 x 33 x 33", models.check_model, "vit-s-2", dataclasses.replace(RGB, image_size=33))
    refused("vit_b_16: its patches of 16 pixels", models.check_model, "vit_b_16", dataclasses.replace(RGB, image_size=72))
    for name in IMAGENET:
        refused(f"--model {name}: made for RGB images.* rgb has 3 x 32 x 32", models.check_model, name, RGB)
        refused("has 1 x 64 x 64", models.check_model, name, dataclasses.replace(RGB64, channels=1))


# ------------------------------------------------------------------------------------------------------ transformers


def plain_vit(weights, x, heads):
    """Logits of a pre-norm ViT (arXiv 2010.11929, 3.1) with patch 2, image by image and head by head."""

    def norm(h, name):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(h, name):
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    logits = []
    for image in x:
        patches = [image[:, i : i + 2, j : j + 2].flatten() for i in range(0, x.shape[2], 2) for j in range(0, x.shape[3], 2)]
        tokens = torch.stack(patches) @ weights["network.conv_proj.weight"].flatten(1).T + weights["network.conv_proj.bias"]
        h = torch.cat([weights["network.class_token"][0], tokens]) + weights["network.encoder.pos_embedding"][0]
        for layer in range(sum(key.endswith("ln_1.weight") for key in weights)):
            block = f"network.encoder.layers.encoder_layer_{layer}"
            z = norm(h, f"{block}.ln_1")
            qkv = z @ weights[f"{block}.self_attention.in_proj_weight"].T + weights[f"{block}.self_attention.in_proj_bias"]
            parts = [part.chunk(heads, 1) for part in qkv.chunk(3, 1)]
            mixed = [(q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v for q, k, v in zip(*parts)]
            h = h + linear(torch.cat(mixed, 1), f"{block}.self_attention.out_proj")
            h = h + linear(F.gelu(linear(norm(h, f"{block}.ln_2"), f"{block}.mlp.0")), f"{block}.mlp.3")
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
    with torch.device("meta"):
        model = models.build(
            name, dataclasses.replace(RGB, image_size=size, channels=channels, mean=(0.5,) * channels, std=(1,) * channels)
        )
    embedding = 4 * channels * hidden + hidden + hidden + (1 + (size // 2) ** 2) * hidden
    block = 4 * hidden**2 + 4 * hidden + 2 * 4 * hidden**2 + 5 * hidden + 4 * hidden  # attention, MLP of 4 x hidden, two norms
    assert sum(p.numel() for p in model.parameters()) == embedding + 12 * block + 2 * hidden + 10 * hidden + 10
    assert {m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)} == {heads}


def test_vit_on_single_channel_images():
    torch.manual_seed(0)
    model = models.build("vit-s-2", dataclasses.replace(DIGITS, image_size=28)).eval()
    weight = model.network.conv_proj.weight
    assert weight.shape == (384, 1, 2, 2) and weight.std().item() == pytest.approx((1 / 4) ** 0.5, rel=0.05)
    with torch.no_grad():
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_attacks_have_a_gradient_at_a_vits_initialisation(loss):
    torch.manual_seed(0)
    model = models.build("vit-s-2", DIGITS).eval()
    x, y, start = 0.2 + 0.6 * torch.rand(4, 1, 8, 8), torch.arange(4), torch.rand(4, 1, 8, 8) * 0.02

    def moved():
        """The fraction of pixels that one step moves."""
        x_adv = attacks.pgd(model, x, y, [start], norm="linf", eps=0.1, step_size=0.05, n_steps=1, loss=loss)
        return (x_adv - x - start).abs().gt(0.04).float().mean().item()

    assert moved() > 0.99
    nn.init.zeros_(model.logits.weight)  # as torchvision would have it
    assert moved() == 0


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_networks_draw_no_random_numbers_in_training(name):
    torch.manual_seed(0)
    model, x = models.build(name, RGB64).train(), torch.rand(2, 3, 64, 64)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------- weights of others


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "vit_b_16", "swin_t"])
def test_torchvision_files_load_with_equal_logits(name, tmp_path):
    torch.manual_seed(0)
    size = {"image_size": 64} if name == "vit_b_16" else {}
    theirs = torchvision.models.get_model(name, num_classes=10, **size).eval()
    nn.init.normal_([m for m in theirs.modules() if isinstance(m, nn.Linear)][-1].weight)
    state = theirs.state_dict()
    if name == "vit_b_16":  # the published file has its MLPs' older names
        state = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value for key, value in state.items()}
        assert not state.keys() <= theirs.state_dict().keys()
    torch.save(state, tmp_path / "a.pth")
    ours = models.build(name, RGB64).eval()
    assert models.load_weights(ours, tmp_path / "a.pth") is True
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(torchvision.transforms.functional.normalize(x, RGB.mean, RGB.std)), rtol=1e-4, atol=1e-5)


def test_published_weights(tmp_path, monkeypatch):
    """A file in torch.hub's cache stands for the download; then there is no network; then the cache is no data."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / torchvision.models.get_model_weights("resnet50").DEFAULT.url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    theirs = torchvision.models.resnet50().state_dict()
    torch.save(theirs, cached)
    model = models.build("resnet50", dataclasses.replace(RGB64, num_classes=1000))
    assert models.load_weights(model, "torchvision") is True
    assert torch.equal(model.network.layer4[2].conv3.weight, theirs["layer4.2.conv3.weight"])
    assert torch.equal(model.logits.bias, theirs["fc.bias"])
    cached.unlink()
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(urllib.error.URLError("no network")))
    refused("--init torchvision: cannot load https://.*resnet50.*no network", models.load_weights, model, "torchvision")
    torch.save({"conv1.weight": Hostile()}, cached)
    monkeypatch.chdir(tmp_path)
    refused("--init torchvision: cannot load", models.load_weights, model, "torchvision")
    assert not os.path.exists("hostile-code-ran")
    for name in ("wrn-10-1", "vit-s-2"):
        refused("--init torchvision: .*resnet50.* only", models.load_weights, models.build(name, DIGITS), "torchvision")


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


PACKED = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": prefixed("module.", w), "epoch": 3},
    "wrapped": lambda w: {"state_dict": prefixed("model.", w | {"mean": torch.tensor(DIGITS.mean), "std": torch.tensor(DIGITS.std)})},
    "dm-at": lambda w: {
        "model_state_dict": prefixed("module.0.", w),
        "unaveraged_model_state_dict": prefixed("module.0.", {key: 0 * value for key, value in w.items()}),
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
    },
}


@pytest.mark.parametrize("packed", [*PACKED, "safetensors"])
def test_files_of_others_load(packed, tmp_path):
    theirs, weights = trained()
    path = tmp_path / ("a.safetensors" if packed == "safetensors" else "a.pt")
    safetensors.torch.save_file(weights, path) if packed == "safetensors" else torch.save(PACKED[packed](weights), path)
    ours, _ = trained(seed=2)
    assert models.load_weights(ours, path) is True
    classifier, state = models.load_classifier(path, DIGITS, "cpu", name="wrn-10-1")
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x)) and torch.equal(classifier(x), theirs(x))
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert state == {"model_name": "wrn-10-1", "dataset": "digits", "num_classes": 10, "norm": None, "eps": None}
    refused("a.(pt|safetensors): not a checkpoint of this project.*--model", models.load_classifier, path, DIGITS, "cpu")


def test_files_of_this_project_load(tmp_path):
    theirs, _ = trained()
    saved = models.portable(theirs, "wrn-10-1", DIGITS) | {"norm": "linf", "eps": 0.15, "model": trained(seed=2)[1]}
    checkpoint.save(saved, tmp_path / "last.pt")
    ours, x = trained(seed=3)[0], torch.rand(2, 1, 8, 8)
    assert models.load_weights(ours, tmp_path / "last.pt") is True
    for name in (None, "wrn-10-1"):
        classifier, state = models.load_classifier(tmp_path / "last.pt", DIGITS, "cpu", name=name)
        assert (state["norm"], state["eps"]) == ("linf", 0.15)
        with torch.no_grad():  # the averaged weights, not those of the entry "model"
            assert torch.equal(classifier(x), theirs(x)) and torch.equal(ours(x), theirs(x))
    refused("last.pt: holds a wrn-10-1, --model is wrn-10-2", models.load_classifier, tmp_path / "last.pt", DIGITS, "cpu", name="wrn-10-2")
    hundred = dataclasses.replace(DIGITS, num_classes=100)
    refused("trained on digits .10 classes", models.load_classifier, tmp_path / "last.pt", hundred, "cpu")


@pytest.mark.parametrize("name,spec", [("wrn-10-1", DIGITS), ("swin_t", RGB64)])
def test_another_class_count_keeps_the_fresh_logits(name, spec, tmp_path):
    torch.manual_seed(1)
    if name == "swin_t":
        theirs, key, head = torchvision.models.swin_t(num_classes=7), "features.0.0.weight", "head.weight"
    else:
        theirs, key, head = models.build(name, dataclasses.replace(spec, num_classes=7)), "init_conv.weight", "logits.weight"
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    ours = models.build(name, spec)
    before = copy.deepcopy(ours.logits.state_dict())
    assert models.load_weights(ours, tmp_path / "a.pt") is False
    assert torch.equal(ours.get_parameter(key if name != "swin_t" else f"network.{key}"), theirs.get_parameter(key))
    assert all(torch.equal(value, before[k]) for k, value in ours.logits.state_dict().items())
    refused("a.pt: state does not fit.*logits", models.load_classifier, tmp_path / "a.pt", spec, "cpu", name=name)
    state = theirs.state_dict()
    state.pop(key)
    torch.save(state, tmp_path / "a.pt")  # the class count is not the only difference
    refused(f"a.pt: state does not fit.*Missing.*{key}", models.load_weights, ours, tmp_path / "a.pt")
    state.pop(head)
    torch.save(state, tmp_path / "a.pt")
    refused("a.pt: state does not fit", models.load_weights, ours, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda w: {k: v for k, v in w.items() if k != "batchnorm.bias"}, "Missing key.*batchnorm.bias"),
        (lambda w: w | {"extra.weight": torch.zeros(1)}, "Unexpected key.*extra.weight"),
        (lambda w: w | {"batchnorm.bias": torch.zeros(3)}, "size mismatch for batchnorm.bias"),
        (lambda w: w | {"batchnorm.bias": torch.full((64,), torch.nan)}, "'batchnorm.bias' holds NaN or inf"),
        (lambda w: w | {"batchnorm.running_var": torch.full((64,), torch.inf)}, "'batchnorm.running_var' holds NaN or inf"),
        (lambda w: prefixed("backbone.", w), "Missing key"),
        (lambda w: trained(name="wrn-16-1")[1], "Unexpected key"),
        (lambda w: trained(name="preact-18")[1], "Missing key"),
        (lambda w: {"epoch": 3, "model": w}, "no state dict"),
        (lambda w: {"state_dict": {"a": 1}}, "no state dict"),
        (lambda w: {1: torch.zeros(1)}, "no state dict"),
        (lambda w: [1, 2], "no state dict"),
        (lambda w: torch.zeros(3), "no state dict"),
        (lambda w: w | {"a": Hostile()}, "refused.*system"),
        (lambda w: nn.Linear(2, 2), "refused.*Linear"),
    ],
)
def test_files_that_do_not_fit_are_named(change, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, weights = trained()
    torch.save(change(weights), "a.pt")
    refused(f"^a.pt: .*{match}", models.load_weights, model, "a.pt")
    refused(f"^a.pt: .*{match}", models.load_classifier, "a.pt", DIGITS, "cpu", name="wrn-10-1")
    assert not os.path.exists("hostile-code-ran")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_broken_files_are_named(suffix, tmp_path):
    model, weights = trained()
    path = tmp_path / f"a.{suffix}"
    refused(f"a.{suffix}: ", models.load_weights, model, path)
    path.mkdir()
    refused(f"a.{suffix}: ", models.load_weights, model, path)
    path.rmdir()
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(weights, path)
    content = path.read_bytes()
    for keep in (0, 1, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(f"a.{suffix}: (.*truncated|refused)", models.load_weights, model, path)
        refused(f"a.{suffix}: (.*truncated|refused)", models.load_classifier, path, DIGITS, "cpu", name="wrn-10-1")


# ---------------------------------------------------------------------------------------------------------- average


def test_ema_has_its_closed_form_and_copies_buffers():
    """After k updates: decay^k w_0 + sum_i (1 - decay) decay^(k-i) w_i; buffers equal, in storage of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema, decay, history = EMA(model), 0.9, [copy.deepcopy(model[0].weight.detach())]
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))  # moves the running statistics
        history.append(copy.deepcopy(model[0].weight.detach()))
        ema.update(model, decay)
    expected = decay**5 * history[0] + sum((1 - decay) * decay ** (5 - i) * history[i] for i in range(1, 6))
    assert torch.allclose(ema.model[0].weight, expected, atol=1e-6)
    for mine, theirs in zip(ema.model.buffers(), model.buffers()):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    ema.update(model, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), model.parameters()))
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training
