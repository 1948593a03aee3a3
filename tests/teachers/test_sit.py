"""SiT: the network against plain formulae, its velocity as a denoiser, and its files.

Alone: python -m pytest tests/teachers/test_sit.py
"""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from flow_helper import sit_reference, sit_tensors, tiny_vae
from torch import nn

import generate_synthetic
import train_at_aux
from common import UserError
from teachers import sit
from teachers.load import load_diffusion


def convert(*paths):
    sit.main(sit.parse_args(["convert", *map(str, paths)]))


@pytest.fixture(scope="module")
def sit_dir(tmp_path_factory):
    """A converted SiT of 3 classes, on latents of 4 x 4 and images of 8 x 8. Not to be changed."""
    folder = tmp_path_factory.mktemp("sit")
    tiny_vae(folder / "vae")
    torch.save(sit_tensors(), folder / "SiT.pt")
    convert(folder / "SiT.pt", folder / "vae", folder / "out")
    return folder / "out"


# ------------------------------------------------------------------------ what the network computes


@pytest.mark.parametrize("patch, out_channels", [(2, 8), (1, 4)])
@pytest.mark.parametrize("label", [1, 3])
def test_the_network_is_the_reference(patch, out_channels, label, tmp_path):
    tensors = sit_tensors(patch=patch, out_channels=out_channels)
    torch.save(tensors, tmp_path / "SiT.pt")
    net, _ = sit.read_checkpoint(str(tmp_path / "SiT.pt"))
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    for t in (0.01, 0.6, 1.0):
        expected, _ = sit_reference(tensors, x[0].numpy(), t, label)
        with torch.no_grad():
            found = net.double()(x, torch.tensor([t], dtype=torch.float64), torch.tensor([label]))
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_sit_xl_has_the_published_size():
    with torch.device("meta"):
        net = sit.SiTNet(32, 4, 8, 2, 1152, 28, 16, 1000)
    assert sum(p.numel() for p in net.parameters()) == 675_129_632  # as the public code counts
    tensors = net.state_dict()
    assert tensors["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert {name.partition(".")[0] for name in tensors} == set(
        "x_embedder t_embedder y_embedder pos_embed blocks final_layer".split()
    )


class Velocity(nn.Module):
    """The exact velocity of clean ~ N(0, std^2), in twice the channels. The rest is not used."""

    def __init__(self, std):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.std = std
        self.told = []

    def forward(self, x_t, t, labels):
        self.told.append((t, labels))
        t = t.view(-1, 1, 1, 1)
        variance = t**2 * self.std**2 + (1 - t) ** 2  # of x_t
        clean = t * self.std**2 / variance * x_t
        noise = (1 - t) / variance * x_t
        return torch.cat([clean - noise, torch.full_like(x_t, float("nan"))], 1)


def test_the_velocity_on_the_scale_of_sigma(sit_dir):
    """D = E[clean | clean + sigma * noise], in closed form, at t = 1 / (1 + sigma)."""
    model = load_diffusion(str(sit_dir), "cpu")
    model.net = Velocity(0.7)
    noisy = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    for sigma in (1e-3, 0.05, 1.0, 7.0, 80.0):
        expected = noisy * 0.7**2 / (0.7**2 + sigma**2)
        torch.testing.assert_close(model.denoise(noisy, sigma), expected, rtol=1e-9, atol=1e-9)
        t, labels = model.net.told[-1]
        torch.testing.assert_close(t, torch.full_like(t, 1 / (1 + sigma)))
        assert labels.tolist() == [3] * 4  # the null label
    sigmas = torch.tensor([1e-3, 0.1, 2.0, 80.0])
    model.denoise(noisy, sigmas, torch.tensor([0, 1, 2, 3]))
    assert model.net.told[-1][0].tolist() == pytest.approx((1 / (1 + sigmas)).tolist())
    assert model.net.told[-1][1].tolist() == [0, 1, 2, 3]
    # In float32 the difference 1 - t would have lost three digits here.
    model.net.forward = lambda x_t, t, labels: torch.ones(4, 8, 4, 4)
    found = model.denoise(torch.zeros(4, 4, 4, 4), 1e-4)
    torch.testing.assert_close(found, torch.full_like(found, 1e-4 / (1 + 1e-4)), rtol=1e-6, atol=0)


def test_denoising_with_labels_and_without(sit_dir):
    model = load_diffusion(str(sit_dir), "cpu")
    noisy, sigma = torch.randn(1, 4, 4, 4), 0.4
    t = 1 / (1 + sigma)
    for label, y in ((2, torch.tensor([2])), (3, None)):
        velocity, _ = sit_reference(sit_tensors(), t * noisy[0].double().numpy(), t, label)
        expected = t * noisy[0].numpy() + (1 - t) * velocity[:4]
        with torch.no_grad():
            found = model.denoise(noisy, sigma, y)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- as teacher and generator


def test_features_are_those_of_a_plain_hook(sit_dir):
    model = load_diffusion(str(sit_dir), "cpu")
    assert model.blocks == ["blocks.0", "blocks.1"]
    assert (model.default_block, model.default_sigma) == ("blocks.0", pytest.approx(1 / 3))
    assert (model.num_classes, model.label_dropout, model.image_size) == (3, 0.1, 8)
    x, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        found = model.features(x, 0.5, None, ["blocks.1", "blocks.0"], noise)
        latents = model.vae.encode(2 * x - 1).latent_dist.mean * 0.18215
    for i in range(2):
        x_t = (latents[i] + 0.5 * noise[i]).double().numpy() / 1.5
        _, blocks = sit_reference(sit_tensors(), x_t, 1 / 1.5, 3)
        for features, tokens in zip(found, blocks[::-1]):
            np.testing.assert_allclose(features[i].numpy(), tokens.mean(0), rtol=1e-4, atol=1e-4)


def test_images_are_generated(sit_dir):
    model = load_diffusion(str(sit_dir), "cpu")
    args = generate_synthetic.parse_args(["--n-steps", "3", "--guidance-scale", "1.5"])
    images, labels = generate_synthetic.sample(model, np.arange(4), args)
    assert images.shape == (4, 8, 8, 3) and labels.tolist() == [0, 1, 2, 0]
    assert not (images[0] == images[3]).all()


def test_it_generates_and_teaches(tmp_path):
    tiny_vae(tmp_path / "vae", channels=1)
    torch.save(sit_tensors(num_classes=10), tmp_path / "SiT.pt")
    convert(tmp_path / "SiT.pt", tmp_path / "vae", tmp_path / "sit")
    argv = f"--diffusion {tmp_path}/sit --n-images 4 --n-steps 2 --out-dir {tmp_path}/set"
    generate_synthetic.main(generate_synthetic.parse_args(argv.split()))
    assert np.load(tmp_path / "set" / "shard-00000-images.npy").shape == (4, 8, 8, 1)
    argv = f"--teacher {tmp_path}/sit --epochs 1 --epoch-images 8 --batch-size 4 --n-steps 1"
    argv += f" --block blocks.0 --eval-n-steps 1 --out-dir {tmp_path}/run"
    train_at_aux.main(train_at_aux.parse_args(argv.split()))
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_bf16_is_nearly_the_same(sit_dir):
    noisy = torch.randn(4, 4, 4, 4)
    exact = load_diffusion(str(sit_dir), "cpu").denoise(noisy, 1.0)
    model = load_diffusion(str(sit_dir), "cpu", "bf16")
    rounded = model.denoise(noisy, 1.0)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


# -------------------------------------------------------------------------------------------- files


def test_ways_in_which_weights_are_saved(sit_dir, tmp_path):
    """Bare, under `ema` beside what a training saves, in half precision, converted twice."""
    tensors = sit_tensors()
    noisy = torch.randn(2, 4, 4, 4)
    expected = load_diffusion(str(sit_dir), "cpu").denoise(noisy, 1.0)
    training = {"ema": tensors, "model": {}, "args": argparse.Namespace(model="SiT-S/2")}
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for number, content in enumerate((tensors, training, halves)):
        torch.save(content, tmp_path / "SiT.pt")
        for _ in range(2):
            convert(tmp_path / "SiT.pt", sit_dir / "vae", tmp_path / str(number))
        found = load_diffusion(str(tmp_path / str(number)), "cpu").denoise(noisy, 1.0)
        assert torch.equal(found, expected) or content is halves
        assert torch.allclose(found, expected, atol=0.1)


def refused(call, *words):
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and len(message) < 400, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("pos_embed"), "not a checkpoint of SiT ('pos_embed')"),
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), "missing keys: blocks.1.mlp.fc1.bias"),
        (lambda t: t.update(more=torch.ones(1)), "unexpected keys: more"),
        (lambda t: t.update(pos_embed=torch.ones(1, 9, 5)), "expected 1x9x384"),
        (lambda t: t.update(pos_embed=torch.ones(4)), "not a checkpoint of SiT"),
        (lambda t: t.update({"final_layer.linear.bias": torch.ones(32).long()}), "floating-point"),
        (lambda t: t.update({"final_layer.linear.bias": torch.ones(32) / 0}), "is not finite"),
        (lambda t: t.update(step=3), "its entry step is no tensor"),
        (lambda t: t.update(pos_embed=torch.ones(1).expand(1, 9**9, 1)), "more numbers than"),
        (lambda t: t.update({"x_embedder.proj.weight": torch.ones(5, 4, 2, 2)}), "width 5, expect"),
        (lambda t: t.clear(), "not a checkpoint of SiT"),
    ],
)
def test_damaged_weights_are_one_line(change, words, sit_dir, tmp_path):
    tensors = sit_tensors()
    change(tensors)
    path = tmp_path / "SiT.pt"
    torch.save(tensors, path)
    refused(lambda: convert(path, sit_dir / "vae", tmp_path / "out"), f"{path}: ", words)
    assert not (tmp_path / "out").exists()


def test_other_files_are_one_line(sit_dir, tmp_path):
    vae, out, path = sit_dir / "vae", tmp_path / "out", tmp_path / "SiT.pt"
    refused(lambda: convert(path, vae, out), f"{path}: no such file")
    torch.save([1], path)
    refused(lambda: convert(path, vae, out), f"{path}: expected tensors by name")
    torch.save(sit_tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    refused(lambda: convert(path, vae, out), f"{path}: truncated, broken")
    path.write_bytes(whole)
    refused(lambda: convert(path, tmp_path / "none", out), "none/config.json: no such file")
    refused(lambda: convert(path, vae, tmp_path), "holds SiT.pt, not a conversion of")
    refused(lambda: convert(path, vae, path), "is a file, expected a directory")
    other = tmp_path / "other"
    tiny_vae(other / "vae", channels=1)
    config = (other / "vae" / "config.json").read_bytes()
    refused(lambda: convert(path, vae, other), "holds vae, not a conversion of")
    assert (other / "vae" / "config.json").read_bytes() == config
    refused(lambda: load_diffusion(str(path), "cpu"), "python -m teachers.sit convert")


def test_a_checkpoint_runs_nothing(sit_dir, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "SiT.pt"
    for content in ({"ema": Hostile()}, sit_tensors() | {"x": Hostile()}):
        torch.save(content, path)
        refused(lambda: convert(path, sit_dir / "vae", tmp_path / "out"), str(path))
    path.write_bytes(pickle.dumps(Hostile()))
    refused(lambda: convert(path, sit_dir / "vae", tmp_path / "out"), str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("width", None, "config.json: width is None, expected a whole number from 1 to 100000"),
        ("depth", 10**9, "depth is 1000000000, expected a whole number from 1 to 1000"),
        ("heads", 7, "width 384, heads 7: cannot be divided"),
        ("size", 5, "size 5, patch 2"),
        ("size", 8, "pos_embed is 1x4x384, expected 1x16x384"),
        ("channels", 3, "x_embedder.proj.weight is 384x4x2x2, expected 384x3x2x2"),
        ("out_channels", True, "out_channels is True"),
        ("num_classes", "3", "num_classes is '3'"),
        ("kind", "sat", "no diffusers network"),
    ],
)
def test_damaged_settings_are_one_line(name, value, words, sit_dir, tmp_path):
    for part in ("model.safetensors", "vae"):
        (tmp_path / part).symlink_to(sit_dir / part)
    config = json.loads((sit_dir / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), str(tmp_path), words)


def test_the_vae_must_fit(sit_dir, tmp_path):
    for part in ("model.safetensors", "config.json"):
        (tmp_path / part).symlink_to(sit_dir / part)
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), f"{tmp_path}/vae/config.json: no such")
    tensors = sit_tensors(channels=3, out_channels=6)
    torch.save(tensors, tmp_path / "SiT.pt")
    convert(tmp_path / "SiT.pt", sit_dir / "vae", tmp_path / "other")
    refused(lambda: load_diffusion(f"{tmp_path}/other", "cpu"), "latent_channels is 4, expected 3")
