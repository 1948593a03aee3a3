"""NVlabs' EDM: our networks against slow plain references, and how their files are opened.

Hostile pickles are in test_pickles.py. Alone: python -m pytest tests/teachers/test_edm.py
"""

import io
import json
import math
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import python
from edm_helper import ADM, EDM_CONFIGS, NCSN, edm_config, random_edm
from torch import nn

from common import UserError, cli, files
from teachers import edm
from teachers.load import freeze


def inputs(net, dtype=torch.float64):
    """(noisy, sigma, one-hot labels or None) of three images."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, net.img_channels, net.img_resolution, net.img_resolution)
    noisy = torch.randn(shape, generator=generator, dtype=dtype)
    sigma = torch.tensor([0.03, 1.0, 30.0], dtype=dtype)
    labels = None
    if net.label_dim:
        labels = F.one_hot(torch.tensor([0, 2, 1]), 3).to(dtype)
    return noisy, sigma, labels


# -------------------------------------------------------------------------------- plain references


def slow_down(x, taps, pad):
    """Every output pixel as a weighted sum, by loops; pixels outside the image are 0."""
    kernel = np.outer(taps, taps) / sum(taps) ** 2
    size_in = x.shape[-1]
    size_out = (size_in + 2 * pad - len(taps)) // 2 + 1
    y = np.zeros((*x.shape[:2], size_out, size_out))
    for i, j in np.ndindex(size_out, size_out):
        for a, b in np.ndindex(kernel.shape):
            row, column = 2 * i + a - pad, 2 * j + b - pad
            if 0 <= row < size_in and 0 <= column < size_in:
                y[:, :, i, j] += kernel[a, b] * x[:, :, row, column]
    return y


def slow_up(x, taps):
    """The transpose of slow_down, times 4: every input pixel spreads over what would read it."""
    kernel = 4 * np.outer(taps, taps) / sum(taps) ** 2
    pad = (len(taps) - 1) // 2
    size_in = x.shape[-1]
    size_out = 2 * size_in
    y = np.zeros((*x.shape[:2], size_out, size_out))
    for i, j in np.ndindex(size_in, size_in):
        for a, b in np.ndindex(kernel.shape):
            row, column = 2 * i + a - pad, 2 * j + b - pad
            if 0 <= row < size_out and 0 <= column < size_out:
                y[:, :, row, column] += kernel[a, b] * x[:, :, i, j]
    return y


def silu(x):
    return x / (1 + np.exp(-x))


class Reference:
    """A network's forward pass over its state dict, driven by the names of the tensors."""

    def __init__(self, model, adm, taps=(1, 1)):
        self.state = {key: value.numpy() for key, value in model.state_dict().items()}
        self.adm = adm
        self.taps = taps
        self.enc = list(model.enc)
        self.dec = list(model.dec)

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0)

    def conv(self, name, x, mode=None):
        """Resample by loops, then add up shifted images times the kernel, then add the bias."""
        if mode == "down":
            x = slow_down(x, self.taps, (len(self.taps) - 1) // 2)
        if mode == "up":
            x = slow_up(x, self.taps)
        if f"{name}.weight" not in self.state:
            return x
        weight = self.state[f"{name}.weight"]
        width = weight.shape[-1]
        pad = width // 2 + (1 if mode == "fused" else 0)
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        size = x.shape[-1] - width + 1
        y = 0
        for a, b in np.ndindex(width, width):
            shifted = x[:, :, a : a + size, b : b + size]
            y = y + np.einsum("oc,ncij->noij", weight[:, :, a, b], shifted)
        if mode == "fused":
            y = slow_down(y, self.taps, 0)
        return y + self.state[f"{name}.bias"][:, None, None]

    def norm(self, name, x, eps):
        groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        std = np.sqrt(groups.var(2, keepdims=True) + eps)
        normed = ((groups - groups.mean(2, keepdims=True)) / std).reshape(x.shape)
        weight = self.state[f"{name}.weight"][:, None, None]
        return normed * weight + self.state[f"{name}.bias"][:, None, None]

    def attention(self, name, x, eps):
        heads = x.shape[1] // 64 if self.adm else 1
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x, eps))
        qkv = qkv.reshape(len(x), heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        weights = np.exp(np.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(q.shape[2]))
        weights /= weights.sum(3, keepdims=True)
        attended = np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
        return self.conv(f"{name}.proj", attended)

    def block(self, name, x, emb, mode):
        eps, scale = (1e-5, 1.0) if self.adm else (1e-6, math.sqrt(0.5))
        h = self.conv(f"{name}.conv0", silu(self.norm(f"{name}.norm0", x, eps)), mode)
        e = self.linear(f"{name}.affine", emb)[:, :, None, None]
        if self.adm:
            half = e.shape[1] // 2
            h = self.norm(f"{name}.norm1", h, eps) * (1 + e[:, :half]) + e[:, half:]
        else:
            h = self.norm(f"{name}.norm1", h + e, eps)
        h = self.conv(f"{name}.conv1", silu(h))
        if any(key.startswith(f"{name}.skip.") for key in self.state):
            x = self.conv(f"{name}.skip", x, mode)
        x = (h + x) * scale
        if f"{name}.qkv.weight" in self.state:
            x = (self.attention(name, x, eps) + x) * scale
        return x

    def embedding(self, noise, labels):
        n = self.state["map_layer0.weight"].shape[1]
        last = n / 2 if self.adm else n / 2 - 1
        frequencies = np.array([10000 ** (-i / last) for i in range(n // 2)])
        if "map_noise.freqs" in self.state:
            frequencies = 2 * math.pi * self.state["map_noise.freqs"]
        angles = noise[:, None] * frequencies
        if self.adm:
            emb = np.concatenate([np.cos(angles), np.sin(angles)], 1)
            emb = self.linear("map_layer1", silu(self.linear("map_layer0", emb)))
            return silu(emb if labels is None else emb + self.linear("map_label", labels))
        emb = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        if labels is not None:
            emb = emb + self.linear("map_label", labels * math.sqrt(labels.shape[1]))
        return silu(self.linear("map_layer1", silu(self.linear("map_layer0", emb))))

    def __call__(self, x, noise, labels):
        emb = self.embedding(noise, labels)
        side = x
        skips = []
        for key in self.enc:
            name = f"enc.{key}"
            kind = key.split("_", 1)[1]
            if kind == "aux_down":
                side = self.conv(name, side, "down")
            elif kind == "aux_skip":
                x = skips[-1] = x + self.conv(name, side)
            elif kind == "aux_residual":
                x = skips[-1] = side = (x + self.conv(name, side, "fused")) / math.sqrt(2)
            else:
                if kind == "conv":
                    x = self.conv(name, x)
                else:
                    x = self.block(name, x, emb, "down" if kind == "down" else None)
                skips.append(x)
        total = 0
        for key in self.dec:
            name = f"dec.{key}"
            kind = key.split("_", 1)[1]
            if kind == "aux_up":
                total = self.conv(name, total, "up")
            elif kind == "aux_norm":
                normed = silu(self.norm(name, x, 1e-6))
            elif kind == "aux_conv":
                total = total + self.conv(name, normed)
            else:
                if kind.startswith("block"):
                    x = np.concatenate([x, skips.pop()], 1)
                x = self.block(name, x, emb, "up" if kind == "up" else None)
        assert not skips
        return self.conv("out_conv", silu(self.norm("out_norm", x, 1e-5))) if self.adm else total


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 4, 4, 2, 1]])
def test_resampling_is_the_filter_by_loops(taps):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    down = edm._ResamplingConv(4, 4, 0, "down", taps).double()
    up = edm._ResamplingConv(4, 4, 0, "up", taps).double()
    assert not list(down.parameters()) and down.resample_filter.shape[2:] == (len(taps), len(taps))
    expected_down = torch.from_numpy(slow_down(x.numpy(), taps, (len(taps) - 1) // 2))
    expected_up = torch.from_numpy(slow_up(x.numpy(), taps))
    # 1/64 is exact, 1/196 a float32.
    torch.testing.assert_close(down(x), expected_down, rtol=0, atol=1e-6)
    torch.testing.assert_close(up(x), expected_up, rtol=0, atol=1e-6)
    if taps == [1, 1]:
        torch.testing.assert_close(down(x), F.avg_pool2d(x, 2))
        torch.testing.assert_close(up(x), F.interpolate(x, scale_factor=2.0))
    else:  # a constant stays constant away from the border
        inner = up(torch.ones_like(x))[:, :, 4:-4, 4:-4]
        torch.testing.assert_close(inner, torch.ones_like(inner))


def test_fused_is_the_kernel_before_the_filter():
    layer = edm._ResamplingConv(2, 4, 3, "fused", [1, 3, 3, 1]).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    wide = F.conv2d(x, layer.weight, padding=2).detach().numpy()
    expected = torch.from_numpy(slow_down(wide, [1, 3, 3, 1], 0)) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("name", EDM_CONFIGS)
def test_network_is_the_reference(name):
    """Every block, the embedding, the wiring of skips and auxiliary images, in float64."""
    net = random_edm(name)
    init = EDM_CONFIGS[name]["init"]
    adm = init["model_type"] == "DhariwalUNet"
    reference = Reference(net.model, adm, init.get("resample_filter", [1, 1]))
    x, sigma, labels = inputs(net)
    with torch.no_grad():
        output = net.model(x, sigma.log(), labels)
    labels = None if labels is None else labels.numpy()
    expected = torch.from_numpy(reference(x.numpy(), sigma.log().numpy(), labels))
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
    assert output.std() > 0.1


# -------------------------------------------------------------------------------- published shapes

CIFAR = {
    "img_resolution": 32,
    "img_channels": 3,
    "augment_dim": 9,
    "model_type": "SongUNet",
    "channel_mult": [2, 2, 2],
}
NCSN_CIFAR = CIFAR | NCSN | {"label_dim": 10, "encoder_type": "residual"}
IMAGENET = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
}
PUBLISHED = {  # name: (preconditioning, arguments, number of parameters)
    "ddpmpp-uncond": ("VPPrecond", CIFAR, 55.7e6),
    "ddpmpp-cond": ("EDMPrecond", CIFAR | {"label_dim": 10}, 55.7e6),
    "ncsnpp-cond": ("VEPrecond", NCSN_CIFAR, 56.4e6),
    "adm-64": ("EDMPrecond", IMAGENET, 295.9e6),
}


def published(name):
    precond, init, n_parameters = PUBLISHED[name]
    with torch.device("meta"):
        net = edm.build(edm_config(precond, **init))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(n_parameters, rel=1e-3)
    return net


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_blocks(name):
    """Their names, and that they run in that order."""
    net = published(name)
    n_blocks = 3 if name == "adm-64" else 4
    sizes = [
        f"{net.img_resolution >> i}x{net.img_resolution >> i}" for i in range(len(net.model.sizes))
    ]
    expected = []
    for size in sizes:
        expected.append(f"enc.{size}_conv" if size == sizes[0] else f"enc.{size}_down")
        expected += [f"enc.{size}_block{i}" for i in range(n_blocks)]
    for size in reversed(sizes):
        lowest = [f"dec.{size}_in0", f"dec.{size}_in1"]
        expected += lowest if size == sizes[-1] else [f"dec.{size}_up"]
        expected += [f"dec.{size}_block{i}" for i in range(n_blocks + 1)]
    assert net.blocks == expected

    ran = []
    for block in net.blocks:

        def hook(module, inputs, output, block=block):
            ran.append(block)

        net.get_submodule(f"model.{block}").register_forward_hook(hook)
    x = torch.zeros(2, 3, net.img_resolution, net.img_resolution, device="meta")
    label = torch.zeros(2, net.label_dim, device="meta") if net.label_dim else None
    assert net(x, torch.ones(2, device="meta"), label).shape == x.shape
    assert ran == net.blocks


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tensors(name):
    net = published(name)
    keys = {key.removeprefix("model.") for key in net.state_dict()}
    attended = [block for block in net.blocks if f"{block}.qkv.weight" in keys]
    is_ncsn = name == "ncsnpp-cond"
    if name == "adm-64":
        sizes = ("32x", "16x", "8x")
        places = ("_block", "in0")
        expected = [
            b for b in net.blocks if b[4:].startswith(sizes) and any(p in b for p in places)
        ]
        assert attended == expected
        assert {"out_norm.weight", "out_conv.bias", "enc.32x32_down.skip.resample_filter"} <= keys
        assert not {"enc.32x32_down.skip.weight", "map_label.bias"} & keys
    else:
        encoder = [f"enc.16x16_block{i}" for i in range(4)]
        assert attended == [*encoder, "dec.8x8_in0", "dec.16x16_block4"]
        assert {"enc.16x16_down.skip.weight", "dec.32x32_aux_norm.weight"} <= keys
        assert "map_layer0.bias" in keys and "map_augment.bias" not in keys
        assert ("map_label.bias" in keys) == (net.label_dim > 0)
    assert ("map_noise.freqs" in keys) == is_ncsn
    assert ("enc.16x16_aux_residual.resample_filter" in keys) == is_ncsn
    n_filters = sum("resample_filter" in key for key in keys)
    assert n_filters == (len(net.model.sizes) - 1) * (5 if is_ncsn else 4)


# ---------------------------------------------------------------------------------- preconditioning


def vp_time(sigma):
    """t by bisection of sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, which grows."""
    low, high = 0.0, 10.0
    for _ in range(100):
        t = (low + high) / 2
        if math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1 < sigma**2:
            low = t
        else:
            high = t
    return t


def table_1(net, name, s):
    """(c_skip, c_out, c_in, c_noise) of a noise level."""
    if net.kind == "EDMPrecond":
        sd = EDM_CONFIGS[name]["init"].get("sigma_data", 0.5)
        root = math.sqrt(s**2 + sd**2)
        return sd**2 / root**2, s * sd / root, 1 / root, math.log(s) / 4
    if net.kind == "VEPrecond":
        return 1.0, s, 1.0, math.log(s / 2)
    if net.kind == "VPPrecond":
        c_noise = 999 * vp_time(s)
    else:
        c_noise = 49 - min(range(51), key=lambda j: abs(net.u[j].item() - s))
    return 1.0, -s, 1 / math.sqrt(s**2 + 1), c_noise


@pytest.mark.parametrize("name", EDM_CONFIGS)
def test_preconditioning_is_table_1(name):
    net = random_edm(name)
    noisy, sigmas, labels = inputs(net)
    with torch.no_grad():
        batch = net(noisy, sigmas, labels)
        for i, sigma in enumerate(sigmas.tolist()):
            c_skip, c_out, c_in, c_noise = table_1(net, name, sigma)
            x = noisy[i : i + 1]
            label = None if labels is None else labels[i : i + 1]
            output = net.model(c_in * x, torch.tensor([c_noise], dtype=x.dtype), label)
            expected = c_skip * x + c_out * output[:, :2]
            torch.testing.assert_close(batch[i : i + 1], expected, rtol=1e-6, atol=1e-7)


def test_iddpm_levels_are_table_1():
    u = edm.build(edm_config("iDDPMPrecond", **ADM)).u.double()
    abar = [math.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2 for j in range(1001)]
    assert u.shape == (1001,) and u[1000] == 0 and (u.diff() < 0).all()
    for j in range(1, 1001):  # (u_j^2 + 1) / (u_{j-1}^2 + 1) is the ratio of alpha bars
        ratio = ((u[j] ** 2 + 1) / (u[j - 1] ** 2 + 1)).item()
        assert ratio == pytest.approx(max(abar[j - 1] / abar[j], 0.001), rel=1e-4)


@pytest.mark.parametrize("name", EDM_CONFIGS)
def test_a_network_that_knows_the_answer(name):
    """With F as the paper trains it to be, the denoised image is the clean one, for any sigma."""
    net = random_edm(name)
    clean, sigmas, labels = inputs(net)
    s = sigmas.view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=clean.dtype)
    sd2 = EDM_CONFIGS[name]["init"].get("sigma_data", 0.5) ** 2

    class Oracle(nn.Module):
        map_layer0 = net.model.map_layer0

        def forward(self, x, c_noise, labels):
            if net.kind != "EDMPrecond":  # predict the noise, with the sign of c_out
                predicted = -noise if net.kind == "VEPrecond" else noise
                return torch.cat([predicted, torch.full_like(noise, 7.0)], 1)
            root = (s**2 + sd2).sqrt()
            assert ((x * root - clean - s * noise).abs() < 1e-9).all()
            return (clean - sd2 / root**2 * (clean + s * noise)) / (s * sd2**0.5 / root)

    net.model = Oracle()
    torch.testing.assert_close(net(clean + s * noise, sigmas, labels), clean, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------- pickles of NVlabs


class OldPickler(pickle._Pickler):
    """Spells numpy's scalar as numpy 1 did."""

    def save_global(self, thing, name=None):
        if getattr(thing, "__module__", "") == "numpy._core.multiarray":
            self.save("numpy.core.multiarray")
            self.save("scalar")
            self.write(pickle.STACK_GLOBAL)
        else:
            super().save_global(thing, name)


def write_pickle(nvlabs, name="vp"):
    """Write a network of EDM_CONFIGS as NVlabs would, and return it."""
    net = random_edm(name, torch.float32)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, EDM_CONFIGS[name])))
    return net


def convert(path, out):
    edm.main(edm.parse_args(["convert", str(path), str(out)]))


@pytest.mark.parametrize("name", EDM_CONFIGS)
def test_pickle_to_network_and_back(name, nvlabs, tmp_path, capsys):
    """Read from a pickle, and converted and loaded: outputs are bit-equal to the source's."""
    net = write_pickle(nvlabs, name)
    config, read = edm.read_pickle(nvlabs.path)
    assert config == EDM_CONFIGS[name] == json.loads(json.dumps(config))
    copy = edm.build(config).eval()
    copy.load_state_dict(read.state_dict())
    out = tmp_path / "out"
    convert(nvlabs.path, out)
    convert(nvlabs.path, out)  # the same again is no error
    line = capsys.readouterr().out.splitlines()[0]
    for words in (net.kind, "8 x 8", "2 channels", f"{net.label_dim} classes", "enc.8x8_conv"):
        assert words in line
    assert line.endswith("to dec.8x8_block1")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    loaded, stored = edm.load(out)
    assert stored.items() > config.items() and len(stored["pickle_sha256"]) == 64
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = inputs(net, torch.float32)
    with torch.no_grad():
        assert torch.equal(copy(*x), net(*x))
        assert torch.equal(loaded(*x), net(*x))
    assert not nvlabs.marker.exists()


def test_other_spellings(nvlabs):
    """numpy 1's names, numpy numbers and tuples as arguments, all arguments by position, half
    precision, shared and strided tensors.
    """
    net = random_edm("vp", torch.float32).half()
    norm = net.model.enc["8x8_block0"].norm0
    norm.bias = norm.weight
    conv = net.model.enc["8x8_conv"]
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last))
    content = nvlabs.content(net, EDM_CONFIGS["vp"])
    sizes = (np.int64(8), 2, 3, False)
    schedule = (np.float64(19.9), 0.1, np.int32(1000), np.float32(1e-5))
    content["ema"]._init_args = (*sizes, *schedule, "SongUNet")
    content["ema"]._init_kwargs = {
        "augment_dim": 9,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    }
    file = io.BytesIO()
    OldPickler(file, 4).dump(content)
    assert b"numpy.core.multiarray" in file.getvalue() and b"numpy._core" not in file.getvalue()
    nvlabs.path.write_bytes(file.getvalue())
    config, read = edm.read_pickle(nvlabs.path)
    defaults = {
        "use_fp16": False,
        "beta_d": 19.9,
        "beta_min": 0.1,
        "M": 1000,
        "epsilon_t": np.float32(1e-5).item(),
    }
    assert config["init"] == EDM_CONFIGS["vp"]["init"] | defaults
    state = read.state_dict()
    for key, value in net.state_dict().items():
        assert state[key].dtype == torch.float32 and state[key].is_contiguous()
        assert torch.equal(state[key], value.float())


def test_an_infinite_sigma_max_is_left_out(nvlabs):
    """It is EDMPrecond's default, and JSON has no word for it."""
    net = random_edm("adm", torch.float32)
    infinite = edm_config("EDMPrecond", **EDM_CONFIGS["adm"]["init"], sigma_max=math.inf)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, infinite)))
    assert edm.read_pickle(nvlabs.path)[0] == EDM_CONFIGS["adm"]


def replace(thing, path, value):
    """The thing at `path` (dict keys and attributes) becomes `value`."""
    for step in path[:-1]:
        thing = thing[step] if isinstance(thing, dict) else getattr(thing, step)
    if isinstance(thing, dict):
        thing[path[-1]] = value
    else:
        object.__setattr__(thing, path[-1], value)


NETWORK = ("ema", "_modules", "model", "_modules")
LAYER = (*NETWORK, "map_layer0", "_parameters")
WEIGHT = (*LAYER, "weight")

# Constructor arguments that cannot be: (name, value, words of the refusal).
ARGUMENTS = [
    ("model_type", "UNet", "model_type is 'UNet', expected SongUNet or DhariwalUNet"),
    ("model_type", ["SongUNet"], "model_type is a list"),
    ("model_type", "DhariwalUNet", "weights do not fit"),
    ("channels", 5, "unknown argument 'channels' of VPPrecond around a SongUNet"),
    ("label_dim", "3", "label_dim is '3', expected a whole number from 0 to 1000000"),
    ("num_blocks", True, "num_blocks is True"),
    ("num_blocks", 10**6, "num_blocks is 1000000, expected a whole number from 1 to 64"),
    ("model_channels", 8.0, "model_channels is 8.0, expected a whole number from 1"),
    ("model_channels", 10**6, "weights do not fit"),
    ("model_channels", 2, "no network"),
    ("dropout", math.nan, "dropout is nan, expected a number from 0"),
    ("dropout", {"a": 1}, "dropout is a dict"),
    ("augment_dim", -1, "augment_dim is -1"),
    ("use_fp16", 1, "use_fp16 is 1, expected True or False"),
    ("channel_mult", [1] * 17, "channel_mult is a list, expected a list of at most 16"),
    ("channel_mult", [], "channel_mult"),
    ("channel_mult", "12", "channel_mult is '12', expected a list"),
    ("resample_filter", [1, 2, 1], "filter [1, 2, 1]"),
    ("encoder_type", "none", "is 'none', expected standard or skip or residual"),
]
DEFECTS = [  # (place, value, words of the refusal)
    (("ema", "name"), "EDMLoss", "'EDMLoss', expected EDMPrecond, VPPrecond, VEPrecond, iDDPMPrec"),
    (("ema",), torch.zeros(2), "'ema'"),
    (("ema", "_init_kwargs"), None, "arguments are missing"),
    (("ema", "_init_args"), tuple(range(20)), "too many"),
    (("ema", "_init_args"), (9, 2), "9 pixels"),
    (("ema", "_parameters"), None, "not a readable"),
    (WEIGHT, None, "missing keys: model.map_layer0.weight"),
    (
        (*LAYER, "extra"),
        torch.zeros(1),
        "unexpected keys: model.map_layer0.extra",
    ),
    (WEIGHT, torch.zeros(8, 32), "model.map_layer0.weight is 8x32, expected 32x8"),
    (
        WEIGHT,
        torch.zeros(32, 8, dtype=torch.int32),
        "model.map_layer0.weight is not of floating-point numbers",
    ),
    (WEIGHT, torch.full((32, 8), math.nan), "model.map_layer0.weight is not finite"),
    (WEIGHT, torch.full((32, 8), 1e300, dtype=torch.float64), "not finite"),  # in float32
    (WEIGHT, torch.zeros(1).expand(32, 8), "larger than its storage of 1"),
    (WEIGHT, 7, "model.map_layer0.weight' is 7, expected a tensor"),
    ((*NETWORK, "map_layer0"), "x", "'model.map_layer0.' is no module"),
]
DEFECTS += [(("ema", "_init_kwargs", name), value, words) for name, value, words in ARGUMENTS]


def refused(path, words):
    with pytest.raises(UserError) as info:
        edm.read_pickle(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    assert words in message, message


@pytest.mark.parametrize("place, value, words", DEFECTS)
def test_defects_are_one_line(place, value, words, nvlabs):
    content = nvlabs.content(random_edm("vp", torch.float32), EDM_CONFIGS["vp"])
    replace(content, place, value)
    nvlabs.path.write_bytes(pickle.dumps(content))
    refused(nvlabs.path, words)


def test_a_module_that_occurs_twice_is_refused(nvlabs):
    content = nvlabs.content(random_edm("vp", torch.float32), EDM_CONFIGS["vp"])
    content["ema"]._modules["again"] = content["ema"]._modules["model"]
    nvlabs.path.write_bytes(pickle.dumps(content))
    refused(nvlabs.path, "'again.' is no module, or one that has occurred before")


# ---------------------------------------------------------------------------- the command and load


@pytest.fixture
def converted(nvlabs, tmp_path):
    """(pickle, directory) of a converted network."""
    write_pickle(nvlabs)
    convert(nvlabs.path, tmp_path / "out")
    return nvlabs.path, tmp_path / "out"


def test_convert_errors_are_one_line(converted, tmp_path, capsys, monkeypatch):
    path, out = converted
    weights = (out / "model.safetensors").read_bytes()
    other = tmp_path / "other"
    text_file = tmp_path / "notes.pkl"
    text_file.write_text("notes")
    monkeypatch.setattr("sys.argv", ["edm.py"])

    def fails(argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as info:
            cli.run_script(edm.main, edm.parse_args([str(word) for word in argv]))
        lines = capsys.readouterr().err.splitlines()
        assert info.value.code == 2 and len(lines) == 1, lines
        for word in words:
            assert word in lines[0], lines[0]
        assert not other.exists()

    fails([], "required")
    fails(["export", path, other], "convert")
    fails(["convert", path], "OUT_DIR")
    fails(["convert", tmp_path / "none.pkl", other], "none.pkl", "no such file")
    fails(["convert", tmp_path, other], str(tmp_path), "directory")
    fails(["convert", text_file, other], "notes.pkl")
    fails(["convert", path, text_file], "notes.pkl", "expected a directory")
    fails(["convert", path, tmp_path], str(tmp_path), "holds")
    (out / "config.json").write_text(json.dumps({"kind": "vit"}))
    fails(["convert", path, out], str(out), "holds config.json")
    assert (out / "model.safetensors").read_bytes() == weights
    assert json.loads((out / "config.json").read_text()) == {"kind": "vit"}


def test_a_failed_write_leaves_no_config(converted, tmp_path, monkeypatch):
    """config.json is written last, and what a killed conversion leaves is no obstacle."""
    path, _ = converted
    other = tmp_path / "other"

    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(files, "write_safetensors", fails)
    with pytest.raises(ZeroDivisionError):
        convert(path, other)
    assert os.listdir(other) == []
    monkeypatch.undo()
    (other / "model.safetensors.writing").write_bytes(b"half")
    convert(path, other)
    assert sorted(os.listdir(other)) == ["config.json", "model.safetensors"]


def test_load_defects_are_one_line(converted):
    _, out = converted
    good_weights = (out / "model.safetensors").read_bytes()
    good_config = json.loads((out / "config.json").read_text())
    tensors = safetensors.torch.load(good_weights)

    def fails(*words, config=good_config, weights=good_weights):
        if isinstance(config, dict):
            config = json.dumps(config).encode()
        for name, content in (("config.json", config), ("model.safetensors", weights)):
            (out / name).unlink(missing_ok=True)
            if content is not None:
                (out / name).write_bytes(content)
        with pytest.raises(UserError) as info:
            edm.load(out)
        assert str(info.value).startswith(str(out)) and "\n" not in str(info.value)
        for word in words:
            assert word in str(info.value)

    def saved(name, tensor):
        return safetensors.torch.save(tensors | {name: tensor})

    fails("config.json: no such file", config=None)
    fails("config.json", config=b"{")
    fails("'VPPrecond'", config=good_config | {"kind": "diffusers"})
    fails("'vp'", config=good_config | {"precond": "vp"})
    fails("a list", config=good_config | {"init": good_config["init"] | {"num_blocks": [1]}})
    fails("img_channels is None", config=good_config | {"init": {"img_resolution": 8}})
    init = good_config["init"] | {"model_channels": 12}
    fails("weights do not fit", config=good_config | {"init": init})
    fails("model.safetensors: no such file", weights=None)
    fails("model.safetensors", weights=b"")
    for end in (4, 100, len(good_weights) // 2, len(good_weights) - 1):
        fails("model.safetensors", weights=good_weights[:end])
    bias = "model.map_layer0.bias"
    fails(f"{bias} is 5, expected 32", weights=saved(bias, torch.zeros(5)))
    fails(bias, "not of floating-point", weights=saved(bias, torch.zeros(32, dtype=torch.int64)))
    fails(bias, "not finite", weights=saved(bias, torch.full((32,), math.inf)))
    fails("unexpected keys: more", weights=saved("more", torch.zeros(1)))
    del tensors[bias]
    fails(f"missing keys: {bias}", weights=safetensors.torch.save(tensors))
    with pytest.raises(UserError):
        edm.load(out / "none")


def test_command(nvlabs, tmp_path):
    write_pickle(nvlabs, "adm")
    done = python("-m", "teachers.edm", "convert", nvlabs.path, tmp_path / "out")
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert "EDMPrecond around DhariwalUNet" in done.stdout


@pytest.mark.parametrize("name", EDM_CONFIGS)
def test_bf16_rounds_the_network_alone(name):
    """Noise levels, their codes and the preconditioning stay float32: in bf16 the code of a
    fourier embedding would be off by whole turns. What is left is the rounding of F's layers.
    """
    model = edm.EDMNetwork(random_edm(name, torch.float32))
    noisy = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 1.0, 40.0):
        expected = model.denoise(noisy * sigma, sigma)
        in_bf16 = edm.EDMNetwork(random_edm(name, torch.float32))
        freeze(in_bf16, "cpu", "bf16")
        assert {p.dtype for p in in_bf16.net.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in in_bf16.net.buffers()} <= {torch.float32}
        found = in_bf16.denoise(noisy * sigma, sigma)
        assert found.dtype == torch.float32
        error = (found - expected).norm() / (expected - noisy * sigma).norm()
        assert error < 0.03
