"""JiT: the network against plain formulae, its scale of noise, and its files.

Alone: python -m pytest tests/teachers/test_jit.py
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from flow_helper import jit_checkpoint, jit_reference, jit_tensors
from torch import nn

import generate_synthetic
import train_at_aux
from common import UserError
from teachers import jit
from teachers.load import load_diffusion


def convert(*paths):
    jit.main(jit.parse_args(["convert", *map(str, paths)]))


@pytest.fixture(scope="module")
def jit_dir(tmp_path_factory):
    """A converted JiT of 10 classes, for grey images of 8 x 8. Not to be changed."""
    folder = tmp_path_factory.mktemp("jit")
    torch.save(jit_checkpoint(jit_tensors()), folder / "checkpoint-last.pth")
    convert(folder / "checkpoint-last.pth", folder / "out")
    return folder / "out"


def with_noise_scale(jit_dir, folder, noise_scale):
    """A copy of a converted JiT whose noise has another scale."""
    shutil.copytree(jit_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | {"noise_scale": noise_scale}
    (folder / "config.json").write_text(json.dumps(config))
    return load_diffusion(str(folder), "cpu")


# ------------------------------------------------------------------------ what the network computes


@pytest.mark.parametrize("patch, heads, channels", [(4, 3, 1), (2, 2, 3)])
@pytest.mark.parametrize("label", [1, 10])
def test_the_network_is_the_reference(patch, heads, channels, label, tmp_path):
    tensors = jit_tensors(patch=patch, heads=heads, channels=channels)
    torch.save(jit_checkpoint(tensors), tmp_path / "JiT.pth")
    net, _ = jit.read_checkpoint(str(tmp_path / "JiT.pth"))
    x = torch.randn(1, channels, 8, 8, dtype=torch.float64)
    for t in (0.01, 0.6, 1.0):
        expected, _ = jit_reference(tensors, x[0].numpy(), t, label)
        with torch.no_grad():
            found = net.double()(x, torch.tensor([t], dtype=torch.float64), torch.tensor([label]))
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "size, patch, width, depth, heads, bottleneck, start, n_parameters",
    [
        (256, 16, 768, 12, 12, 128, 4, 131_320_320),
        (512, 32, 1024, 24, 16, 128, 8, 461_796_320),
        (256, 16, 1280, 32, 16, 256, 10, 952_842_048),
    ],
)
def test_published_sizes(size, patch, width, depth, heads, bottleneck, start, n_parameters):
    """JiT-B/16, JiT-L/32 and JiT-H/16, as the public code counts them."""
    assert jit.CONTEXT_START[depth] == start
    with torch.device("meta"):
        net = jit.JiTNet(size, 3, patch, width, depth, heads, 1000, bottleneck, 32, start)
    assert sum(p.numel() for p in net.parameters()) == n_parameters


class Clean(nn.Module):
    """The exact expectation of clean ~ N(0, std^2), where the noise has a scale."""

    def __init__(self, std, noise_scale):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.std = std
        self.noise_scale = noise_scale
        self.told = []

    def forward(self, x_t, t, labels):
        self.told.append((t, labels))
        t = t.view(-1, 1, 1, 1)
        variance = t**2 * self.std**2 + (1 - t) ** 2 * self.noise_scale**2  # of x_t
        return t * self.std**2 / variance * x_t


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_the_clean_image_on_the_scale_of_sigma(noise_scale, jit_dir, tmp_path):
    """D = E[clean | clean + sigma * noise], in closed form, at t = c / (c + sigma)."""
    model = with_noise_scale(jit_dir, tmp_path / "m", noise_scale)
    model.net = Clean(0.7, noise_scale)
    noisy = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    for sigma in (1e-3, 0.05, 1.0, 7.0, 80.0):
        expected = noisy * 0.7**2 / (0.7**2 + sigma**2)
        torch.testing.assert_close(model.denoise(noisy, sigma), expected, rtol=1e-9, atol=1e-9)
        t, labels = model.net.told[-1]
        torch.testing.assert_close(t, torch.full_like(t, noise_scale / (noise_scale + sigma)))
        assert labels.tolist() == [10] * 4  # the null label


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_denoising_with_labels_and_without(noise_scale, jit_dir, tmp_path):
    model = with_noise_scale(jit_dir, tmp_path / "m", noise_scale)
    noisy, sigma = torch.randn(1, 1, 8, 8), 0.4
    t = noise_scale / (noise_scale + sigma)
    for label, y in ((2, torch.tensor([2])), (10, None)):
        expected, _ = jit_reference(jit_tensors(), t * noisy[0].double().numpy(), t, label)
        with torch.no_grad():
            found = model.denoise(noisy, sigma, y)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- as teacher and generator


def test_features_are_those_of_a_plain_hook_without_class_tokens(jit_dir):
    model = load_diffusion(str(jit_dir), "cpu")
    assert model.blocks == [f"blocks.{i}" for i in range(12)]
    assert (model.default_block, model.default_sigma) == ("blocks.5", 1.0)
    assert (model.num_classes, model.label_dropout, model.image_size) == (10, 0.1, 8)
    x, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    names = ["blocks.11", "blocks.3", "blocks.4"]
    with torch.no_grad():
        found = model.features(x, 0.5, None, names, noise)
    for i in range(2):
        x_t = (2 * x[i] - 1 + 0.5 * noise[i]).double().numpy() / 1.5
        _, blocks = jit_reference(jit_tensors(), x_t, 1 / 1.5, 10)
        for features, number in zip(found, (11, 3, 4)):
            tokens = blocks[number]
            assert len(tokens) == 4 + 5 * (number >= 4)
            expected = tokens[-4:].mean(0)
            np.testing.assert_allclose(features[i].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_it_generates_and_teaches(jit_dir, tmp_path):
    argv = f"--diffusion {jit_dir} --n-images 4 --n-steps 2 --guidance-scale 2 --out-dir"
    args = generate_synthetic.parse_args([*argv.split(), str(tmp_path / "set")])
    generate_synthetic.main(args)
    assert np.load(tmp_path / "set" / "shard-00000-images.npy").shape == (4, 8, 8, 1)
    argv = f"--teacher {jit_dir} --epochs 1 --epoch-images 8 --batch-size 4 --n-steps 1"
    argv += " --block blocks.5 --eval-n-steps 1 --out-dir"
    train_at_aux.main(train_at_aux.parse_args([*argv.split(), str(tmp_path / "run")]))
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_bf16_is_nearly_the_same(jit_dir):
    noisy = torch.randn(4, 1, 8, 8)
    exact = load_diffusion(str(jit_dir), "cpu").denoise(noisy, 1.0)
    rounded = load_diffusion(str(jit_dir), "cpu", "bf16").denoise(noisy, 1.0)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


# -------------------------------------------------------------------------------------------- files


def test_ways_in_which_weights_are_saved(jit_dir, tmp_path):
    """As the public code saves them, bare with its names, and bare; converted twice."""
    noisy = torch.randn(2, 1, 8, 8)
    expected = load_diffusion(str(jit_dir), "cpu").denoise(noisy, 1.0)
    published = jit_checkpoint(jit_tensors())
    for number, content in enumerate((published, published["model_ema1"], jit_tensors())):
        torch.save(content, tmp_path / "JiT.pth")
        for _ in range(2):
            convert(tmp_path / "JiT.pth", tmp_path / str(number))
        found = load_diffusion(str(tmp_path / str(number)), "cpu").denoise(noisy, 1.0)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size, noise_scale", [(32, 1.0), (256, 1.0), (512, 2.0)])
def test_the_noise_scale_follows_the_size(size, noise_scale, tmp_path):
    torch.save(jit_tensors(size=size, patch=size // 2), tmp_path / "JiT.pth")
    _, config = jit.read_checkpoint(str(tmp_path / "JiT.pth"))
    assert (config["size"], config["noise_scale"]) == (size, noise_scale)


def refused(call, *words):
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and len(message) < 400, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("pos_embed"), "not a checkpoint of JiT ('pos_embed')"),
        (lambda t: t.pop("blocks.1.mlp.w3.bias"), "missing keys: blocks.1.mlp.w3.bias"),
        (lambda t: t.update(more=torch.ones(1)), "unexpected keys: more"),
        (lambda t: t.update(pos_embed=torch.ones(1, 9, 5)), "expected 1x9x24"),
        (lambda t: t.update({"final_layer.linear.bias": torch.ones(16) / 0}), "is not finite"),
        (lambda t: t.update(step=3), "is no tensor"),
        (lambda t: t.update(pos_embed=torch.ones(1).expand(1, 9**9, 1)), "more numbers than"),
        (lambda t: t.update({"blocks.12.x": torch.ones(1)}), "13 blocks, expected 12, 24 or 32"),
        (lambda t: t.clear(), "not a checkpoint of JiT"),
    ],
)
def test_damaged_weights_are_one_line(change, words, tmp_path):
    tensors = jit_tensors()
    change(tensors)
    path = tmp_path / "JiT.pth"
    torch.save(jit_checkpoint(tensors), path)
    refused(lambda: convert(path, tmp_path / "out"), f"{path}: ", words)
    assert not (tmp_path / "out").exists()


def test_other_files_are_one_line(tmp_path):
    out, path = tmp_path / "out", tmp_path / "checkpoint-last.pth"
    refused(lambda: convert(path, out), f"{path}: no such file")
    torch.save(jit_checkpoint(jit_tensors()), path)
    refused(lambda: load_diffusion(str(path), "cpu"), "python -m teachers.jit convert")
    refused(lambda: convert(path, tmp_path), "holds checkpoint-last.pth, not a conversion of")
    path.write_bytes(path.read_bytes()[:-500])
    refused(lambda: convert(path, out), f"{path}: truncated, broken")


def test_a_checkpoint_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "JiT.pth"
    for content in ({"model_ema1": Hostile()}, jit_checkpoint(jit_tensors()) | {"x": Hostile()}):
        torch.save(content, path)
        refused(lambda: convert(path, tmp_path / "out"), str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("width", None, "config.json: width is None, expected a whole number from 1 to 100000"),
        ("heads", 4, "width 24, heads 4: cannot be divided"),  # pairs of rows and columns
        ("size", 6, "size 6, patch 4"),
        ("context", 6, "in_context_posemb is 1x5x24, expected 1x6x24"),
        ("context_start", 0, "context_start is 0"),
        ("noise_scale", 0, "noise_scale is 0, expected a number from 0.01 to 100"),
        ("noise_scale", None, "noise_scale is None"),
        ("noise_scale", float("nan"), "noise_scale is nan"),
    ],
)
def test_damaged_settings_are_one_line(name, value, words, jit_dir, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(jit_dir / "model.safetensors")
    config = json.loads((jit_dir / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: load_diffusion(str(tmp_path), "cpu"), str(tmp_path), words)
