"""NVlabs' EDM: our networks against slow plain references, and its pickles read without running anything in them.

Alone: python -m pytest tests/test_edm.py
"""

import copyreg
import io
import json
import math
import os
import pickle
import random

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import python
from torch import nn

from common import cli, edm

SONG = dict(model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
ADM = dict(model_type="DhariwalUNet", model_channels=32, channel_mult=[2, 4], num_blocks=1, attn_resolutions=[8], channel_mult_emb=1)
NCSN = dict(embedding_type="fourier", channel_mult_noise=2, resample_filter=[1, 3, 3, 1])


def config(precond, **init):
    return {"kind": "nvlabs-edm", "precond": precond, "init": dict(img_resolution=8, img_channels=2) | init}


# Every preconditioner, and every variant of both networks.
CONFIGS = {
    "vp": config("VPPrecond", label_dim=3, augment_dim=9, **SONG),
    "ve": config("VEPrecond", encoder_type="residual", augment_dim=9, **NCSN, **SONG),
    "edm": config("EDMPrecond", label_dim=3, sigma_data=0.6, encoder_type="skip", decoder_type="skip", **SONG),
    "adm": config("EDMPrecond", label_dim=3, augment_dim=9, **ADM),
    "iddpm": config("iDDPMPrecond", M=50, **ADM),
}


def random_net(name, dtype=torch.float64):
    """A network of CONFIGS whose every parameter is random: the initial zeros and ones would hide errors."""
    torch.manual_seed(0)
    net = edm.build(CONFIGS[name]).to(dtype).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5) + (p.dim() == 1))
    return net


def inputs(net, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, net.img_channels, net.img_resolution, net.img_resolution, generator=generator, dtype=dtype)
    labels = F.one_hot(torch.tensor([0, 2, 1]), 3).to(dtype) if net.label_dim else None
    return noisy, torch.tensor([0.03, 1.0, 30.0], dtype=dtype), labels


# -------------------------------------------------------------------------------------------------- plain references


def slow_down(x, taps, pad):
    """Every output pixel as a weighted sum, by loops; pixels outside the image are 0."""
    k = np.outer(taps, taps) / sum(taps) ** 2
    size = (x.shape[-1] + 2 * pad - len(taps)) // 2 + 1
    y = np.zeros((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            for a in range(len(taps)):
                for b in range(len(taps)):
                    row, column = 2 * i + a - pad, 2 * j + b - pad
                    if 0 <= row < x.shape[-1] and 0 <= column < x.shape[-1]:
                        y[:, :, i, j] += k[a, b] * x[:, :, row, column]
    return y


def slow_up(x, taps):
    """The transpose of slow_down, times 4: every input pixel spreads over the outputs that would read it."""
    k, pad, size = 4 * np.outer(taps, taps) / sum(taps) ** 2, (len(taps) - 1) // 2, 2 * x.shape[-1]
    y = np.zeros((*x.shape[:2], size, size))
    for i in range(x.shape[-1]):
        for j in range(x.shape[-1]):
            for a in range(len(taps)):
                for b in range(len(taps)):
                    row, column = 2 * i + a - pad, 2 * j + b - pad
                    if 0 <= row < size and 0 <= column < size:
                        y[:, :, row, column] += k[a, b] * x[:, :, i, j]
    return y


class Reference:
    """A network's forward pass over its state dict, driven by the names of the tensors, from field.md G."""

    def __init__(self, model, adm, taps=(1, 1)):
        self.sd, self.adm, self.taps = {k: v.numpy() for k, v in model.state_dict().items()}, adm, taps
        self.enc, self.dec = list(model.enc), list(model.dec)

    def tensor(self, name):
        return torch.from_numpy(self.sd[name])

    def linear(self, name, x):
        return x @ self.sd[f"{name}.weight"].T + self.sd.get(f"{name}.bias", 0)

    def conv(self, name, x, mode=None):
        """Resample by loops, then correlate with the kernel as a sum of shifted images, then add the bias."""
        x = slow_down(x, self.taps, (len(self.taps) - 1) // 2) if mode == "down" else slow_up(x, self.taps) if mode == "up" else x
        if f"{name}.weight" not in self.sd:
            return x
        weight, bias = self.sd[f"{name}.weight"], self.sd[f"{name}.bias"]
        pad = weight.shape[-1] // 2 + (1 if mode == "fused" else 0)
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        size = x.shape[-1] - weight.shape[-1] + 1
        shifts = ((a, b) for a in range(weight.shape[-1]) for b in range(weight.shape[-1]))
        y = sum(np.einsum("oc,ncij->noij", weight[:, :, a, b], x[:, :, a : a + size, b : b + size]) for a, b in shifts)
        y = slow_down(y, self.taps, 0) if mode == "fused" else y
        return y + bias[:, None, None]

    def norm(self, name, x, eps):
        groups = x.reshape(len(x), min(32, x.shape[1] // 4), -1)
        groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + eps)
        return groups.reshape(x.shape) * self.sd[f"{name}.weight"][:, None, None] + self.sd[f"{name}.bias"][:, None, None]

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
        has_skip = any(key.startswith(f"{name}.skip.") for key in self.sd)
        x = (h + (self.conv(f"{name}.skip", x, mode) if has_skip else x)) * scale
        if f"{name}.qkv.weight" in self.sd:
            heads = x.shape[1] // 64 if self.adm else 1
            qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x, eps))
            q, k, v = (qkv.reshape(len(x), heads, -1, 3, x.shape[2] * x.shape[3])[:, :, :, i] for i in range(3))
            weights = np.exp(np.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(q.shape[2]))
            weights /= weights.sum(3, keepdims=True)
            x = (self.conv(f"{name}.proj", np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)) + x) * scale
        return x

    def embedding(self, noise, labels):
        n = self.sd["map_layer0.weight"].shape[1]
        if "map_noise.freqs" in self.sd:
            frequencies = 2 * math.pi * self.sd["map_noise.freqs"]
        else:
            frequencies = np.array([10000 ** (-i / (n / 2 - (0 if self.adm else 1))) for i in range(n // 2)])
        angles = noise[:, None] * frequencies
        halves = [np.cos(angles), np.sin(angles)]
        emb = np.concatenate(halves if self.adm else halves[::-1], 1)
        if self.adm:
            emb = self.linear("map_layer1", silu(self.linear("map_layer0", emb)))
            return silu(emb if labels is None else emb + self.linear("map_label", labels))
        emb = emb if labels is None else emb + self.linear("map_label", labels * math.sqrt(labels.shape[1]))
        return silu(self.linear("map_layer1", silu(self.linear("map_layer0", emb))))

    def __call__(self, x, noise, labels):
        emb, side, skips, total = self.embedding(noise, labels), x, [], 0
        for key in self.enc:
            name, kind = f"enc.{key}", key.split("_", 1)[1]
            if kind == "aux_down":
                side = self.conv(name, side, "down")
            elif kind == "aux_skip":
                x = skips[-1] = x + self.conv(name, side)
            elif kind == "aux_residual":
                x = skips[-1] = side = (x + self.conv(name, side, "fused")) / math.sqrt(2)
            else:
                x = self.conv(name, x) if kind == "conv" else self.block(name, x, emb, "down" if kind == "down" else None)
                skips.append(x)
        for key in self.dec:
            name, kind = f"dec.{key}", key.split("_", 1)[1]
            if kind == "aux_up":
                total = self.conv(name, total, "up")
            elif kind == "aux_norm":
                normed = silu(self.norm(name, x, 1e-6))
            elif kind == "aux_conv":
                total = total + self.conv(name, normed)
            else:
                x = np.concatenate([x, skips.pop()], 1) if kind.startswith("block") else x
                x = self.block(name, x, emb, "up" if kind == "up" else None)
        assert not skips
        return self.conv("out_conv", silu(self.norm("out_norm", x, 1e-5))) if self.adm else total


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 4, 4, 2, 1]])
def test_resampling_is_the_filter_by_loops(taps):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for mode, expected in (("down", slow_down(x.numpy(), taps, (len(taps) - 1) // 2)), ("up", slow_up(x.numpy(), taps))):
        layer = edm._ResamplingConv(4, 4, 0, mode, taps).double()
        assert not list(layer.parameters()) and layer.resample_filter.shape == (1, 1, len(taps), len(taps))
        torch.testing.assert_close(layer(x), torch.from_numpy(expected), rtol=0, atol=1e-6)  # 1/64 is exact, 1/196 a float32
    if taps == [1, 1]:
        torch.testing.assert_close(edm._ResamplingConv(4, 4, 0, "down", taps).double()(x), F.avg_pool2d(x, 2))
        torch.testing.assert_close(edm._ResamplingConv(4, 4, 0, "up", taps).double()(x), F.interpolate(x, scale_factor=2.0))
    else:  # a constant stays constant away from the border
        up = edm._ResamplingConv(4, 4, 0, "up", taps).double()(torch.ones_like(x))[:, :, 4:-4, 4:-4]
        torch.testing.assert_close(up, torch.ones_like(up))


def test_fused_is_the_kernel_before_the_filter():
    layer = edm._ResamplingConv(2, 4, 3, "fused", [1, 3, 3, 1]).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    wide = F.conv2d(x, layer.weight, padding=2).detach().numpy()
    expected = torch.from_numpy(slow_down(wide, [1, 3, 3, 1], 0)) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == (2, 4, 3, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_network_is_the_reference(name):
    """Every block, the embedding, the wiring of skips and auxiliary images, in float64."""
    net = random_net(name)
    init = CONFIGS[name]["init"]
    reference = Reference(net.model, init["model_type"] == "DhariwalUNet", init.get("resample_filter", [1, 1]))
    x, sigma, labels = inputs(net)
    with torch.no_grad():
        output = net.model(x, sigma.log(), labels)
    expected = reference(x.numpy(), sigma.log().numpy(), None if labels is None else labels.numpy())
    torch.testing.assert_close(output, torch.from_numpy(expected), rtol=1e-8, atol=1e-8)
    assert output.std() > 0.1


def test_dropout_and_label_dropout_in_training_alone():
    net = edm.build(config("EDMPrecond", label_dim=3, label_dropout=0.5, dropout=0.0, **SONG))
    x, sigma, labels = inputs(net, torch.float32)
    assert net.label_dropout == 0.5
    with torch.no_grad():
        full, empty = net.eval()(x, sigma, labels), net(x, sigma)
        assert torch.equal(full, net(x, sigma, labels)) and torch.equal(empty, net(x, sigma, torch.zeros(3, 3)))
        torch.manual_seed(0)
        dropped = [net.train()(x, sigma, labels)[0] for _ in range(20)]
    kept = [torch.allclose(d, full[0], atol=1e-5) for d in dropped]
    assert 3 < sum(kept) < 17 and all(k or torch.allclose(d, empty[0], atol=1e-5) for k, d in zip(kept, dropped))
    net = edm.build(config("EDMPrecond", dropout=0.5, **SONG)).train()
    assert not torch.equal(net(x, sigma), net(x, sigma)) and torch.equal(net.eval()(x, sigma), net(x, sigma))


# --------------------------------------------------------------------------------------------------- published shapes

CIFAR = dict(img_resolution=32, img_channels=3, augment_dim=9, model_type="SongUNet", channel_mult=[2, 2, 2])
PUBLISHED = {
    "ddpmpp-uncond": ("VPPrecond", CIFAR, 55.7e6),
    "ddpmpp-cond": ("EDMPrecond", CIFAR | {"label_dim": 10}, 55.7e6),
    "ncsnpp-cond": ("VEPrecond", CIFAR | NCSN | {"label_dim": 10, "encoder_type": "residual"}, 56.4e6),
    "adm-64": ("EDMPrecond", dict(img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet"), 295.9e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    precond, init, parameters = PUBLISHED[name]
    with torch.device("meta"):
        net = edm.build(config(precond, **init))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=1e-3)
    adm, aux, levels = name == "adm-64", name == "ncsnpp-cond", len(net.model.sizes)
    sizes, n = [f"{net.img_resolution >> i}x{net.img_resolution >> i}" for i in range(levels)], 3 if adm else 4
    blocks = []
    for size in sizes:
        blocks += [f"enc.{size}_{'conv' if size == sizes[0] else 'down'}"] + [f"enc.{size}_block{i}" for i in range(n)]
    for size in sizes[::-1]:
        blocks += [f"dec.{size}_in0", f"dec.{size}_in1"] if size == sizes[-1] else [f"dec.{size}_up"]
        blocks += [f"dec.{size}_block{i}" for i in range(n + 1)]
    assert net.blocks == blocks
    ran = []
    for block in blocks:
        net.get_submodule(f"model.{block}").register_forward_hook(lambda m, i, o, block=block: ran.append(block))
    label = None if net.label_dim == 0 else torch.zeros(2, net.label_dim, device="meta")
    x = torch.zeros(2, 3, net.img_resolution, net.img_resolution, device="meta")
    assert net(x, torch.ones(2, device="meta"), label).shape == x.shape and ran == blocks
    keys = set(net.state_dict())
    attended = [b for b in blocks if f"model.{b}.qkv.weight" in keys]
    if adm:
        assert attended == [b for b in blocks if b[4:].startswith(("32x", "16x", "8x")) and ("_block" in b or "in0" in b)]
        assert {"model.out_norm.weight", "model.out_conv.bias", "model.enc.32x32_down.skip.resample_filter"} <= keys
        assert not {"model.enc.32x32_down.skip.weight", "model.map_label.bias"} & keys
    else:
        assert attended == [f"enc.16x16_block{i}" for i in range(4)] + ["dec.8x8_in0", "dec.16x16_block4"]
        assert {"model.enc.16x16_down.skip.weight", "model.dec.32x32_aux_norm.weight", "model.map_layer0.bias"} <= keys
        assert "model.map_augment.bias" not in keys and ("model.map_label.bias" in keys) == (net.label_dim > 0)
    assert ("model.map_noise.freqs" in keys) == ("model.enc.16x16_aux_residual.resample_filter" in keys) == aux
    assert sum("resample_filter" in key for key in keys) == 2 * 2 * (levels - 1) + (levels - 1) * aux


# ---------------------------------------------------------------------------------------------------- preconditioning


@pytest.mark.parametrize("name", CONFIGS)
def test_preconditioning_is_table_1(name):
    net = random_net(name)
    noisy, sigmas, labels = inputs(net)
    with torch.no_grad():
        fast = net(noisy, sigmas, labels)
        for i, s in enumerate(sigmas.tolist()):
            c_skip, c_out, c_in = 1.0, -s, 1 / math.sqrt(s**2 + 1)
            if net.kind == "EDMPrecond":
                sd = CONFIGS[name]["init"].get("sigma_data", 0.5)
                total = s**2 + sd**2
                c_skip, c_out, c_in, c_noise = sd**2 / total, s * sd / math.sqrt(total), 1 / math.sqrt(total), math.log(s) / 4
            elif net.kind == "VEPrecond":
                c_out, c_in, c_noise = s, 1.0, math.log(s / 2)
            elif net.kind == "VPPrecond":
                low, high = 0.0, 10.0  # t by bisection of sigma(t), which grows
                for _ in range(100):
                    t = (low + high) / 2
                    low, high = (t, high) if math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1 < s**2 else (low, t)
                c_noise = 999 * t
            else:
                c_noise = 49 - min(range(51), key=lambda j: abs(net.u[j].item() - s))
            x = noisy[i : i + 1]
            output = net.model(c_in * x, torch.tensor([c_noise], dtype=x.dtype), None if labels is None else labels[i : i + 1])
            torch.testing.assert_close(fast[i : i + 1], c_skip * x + c_out * output[:, :2], rtol=1e-6, atol=1e-7)


def test_iddpm_levels_are_table_1():
    u = edm.build(config("iDDPMPrecond", **ADM)).u.double()
    abar = [math.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2 for j in range(1001)]
    assert u.shape == (1001,) and u[1000] == 0 and (u.diff() < 0).all()
    for j in range(1, 1001):  # (u_j^2 + 1) / (u_{j-1}^2 + 1) is the ratio of alpha bars
        assert ((u[j] ** 2 + 1) / (u[j - 1] ** 2 + 1)).item() == pytest.approx(max(abar[j - 1] / abar[j], 0.001), rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_that_knows_the_answer(name):
    """With an inner network that returns what the paper trains it towards, the denoised image is the clean one, for any sigma."""
    net = random_net(name)
    noisy, sigmas, labels = inputs(net)
    clean, s = noisy, sigmas.view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2), dtype=clean.dtype)

    class Oracle(nn.Module):
        map_layer0 = net.model.map_layer0

        def forward(self, x, c_noise, labels):
            if net.kind != "EDMPrecond":  # predict the noise, with sign of c_out
                return torch.cat([-noise if net.kind == "VEPrecond" else noise, torch.full_like(noise, 7.0)], 1)
            sd2 = CONFIGS[name]["init"].get("sigma_data", 0.5) ** 2
            root = (s**2 + sd2).sqrt()
            assert ((x * root - clean - s * noise).abs() < 1e-9).all()
            return (clean - sd2 / root**2 * (clean + s * noise)) / (s * sd2**0.5 / root)

    net.model = Oracle()
    torch.testing.assert_close(net(clean + s * noise, sigmas, labels), clean, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- pickles of NVlabs


class OldPickler(pickle._Pickler):
    """Spells numpy's scalar as numpy 1 did."""

    def save_global(self, thing, name=None):
        if getattr(thing, "__module__", "") == "numpy._core.multiarray":
            self.save("numpy.core.multiarray")
            self.save("scalar")
            self.write(pickle.STACK_GLOBAL)
        else:
            super().save_global(thing, name)


def refused(path, *words):
    with pytest.raises(cli.UserError) as info:
        edm.read_pickle(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", CONFIGS)
def test_pickle_to_network_and_back(name, nvlabs, tmp_path, capsys):
    """Read from a pickle, and through convert and load: the outputs are bit-equal to the source network's."""
    net = random_net(name, torch.float32)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, CONFIGS[name])))
    config, read = edm.read_pickle(nvlabs.path)
    state = read.state_dict()
    assert config == CONFIGS[name] == json.loads(json.dumps(config))
    copy = edm.build(config).eval()
    copy.load_state_dict(state)
    out = tmp_path / "out"
    for _ in range(2):  # the same again is no error
        edm.main(edm.parse_args(["convert", str(nvlabs.path), str(out)]))
    line = capsys.readouterr().out.splitlines()[0]
    for word in (net.kind, "8 x 8", "2 channels", f"{net.label_dim} classes", "enc.8x8_conv", "dec.8x8_block1"):
        assert word in line
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    loaded, stored = edm.load(out)
    assert stored.items() > config.items() and len(stored["pickle_sha256"]) == 64
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        for other in (copy, loaded):
            assert torch.equal(other(*inputs(net, torch.float32)), net(*inputs(net, torch.float32)))
    assert not nvlabs.marker.exists()


def test_other_spellings(nvlabs):
    """numpy 1's names, numpy numbers and tuples as arguments, all arguments by position, half precision, shared and strided tensors."""
    net = random_net("vp", torch.float32).half()
    net.model.enc["8x8_block0"].norm0.bias = net.model.enc["8x8_block0"].norm0.weight
    conv = net.model.enc["8x8_conv"]
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last))
    content = nvlabs.content(net, CONFIGS["vp"])
    content["ema"]._init_args = (np.int64(8), 2, 3, False, np.float64(19.9), 0.1, np.int32(1000), np.float32(1e-5), "SongUNet")
    content["ema"]._init_kwargs = dict(augment_dim=9, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    file = io.BytesIO()
    OldPickler(file, 4).dump(content)
    assert b"numpy.core.multiarray" in file.getvalue() and b"numpy._core" not in file.getvalue()
    nvlabs.path.write_bytes(file.getvalue())
    config, read = edm.read_pickle(nvlabs.path)
    state = read.state_dict()
    assert config["init"] == CONFIGS["vp"]["init"] | dict(
        use_fp16=False, beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=np.float32(1e-5).item()
    )
    for key, value in net.state_dict().items():
        assert state[key].dtype == torch.float32 and state[key].is_contiguous() and torch.equal(state[key], value.float())


def test_an_infinite_sigma_max_is_left_out(nvlabs):
    """It is EDMPrecond's default, and JSON has no word for it."""
    net = random_net("adm", torch.float32)
    infinite = config("EDMPrecond", **CONFIGS["adm"]["init"], sigma_max=math.inf)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, infinite)))
    assert edm.read_pickle(nvlabs.path)[0] == CONFIGS["adm"]


# ---------------------------------------------------------------------------------------------------- hostile pickles


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def text(string):
    return pickle.SHORT_BINUNICODE + bytes([len(string)]) + string.encode()


def named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


MODULE_DICT = named("torch.nn.modules.container", "ModuleDict") + b")\x81"  # an instance
RECONSTRUCT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
STORAGE, TENSOR = named("torch.storage", "_load_from_bytes"), named("torch._utils", "_rebuild_tensor_v2")
ENTRIES = text("_init_args") + b")" + text("_init_kwargs") + b"}" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules")
DEEP = b")" + pickle.TUPLE1 * 200_000

STREAMS = {  # name: (opcodes after the protocol, words of the refusal)
    "global": (b"cos\nsystem\n.", ["asks for os.system;"]),
    "stack global": (named("os", "system") + b".", ["asks for os.system;"]),
    "terminal codes": (named("os\x1b[2J\n", "system") + b".", ["asks for os\\x1b[2J\\n.system;"]),
    "eval": (named("builtins", "eval") + b".", ["asks for builtins.eval;"]),
    "getattr": (named("builtins", "getattr") + b".", ["asks for builtins.getattr;"]),
    "set": (named("builtins", "set") + b".", ["asks for builtins.set;"]),
    "torch.load": (named("torch.serialization", "load") + b".", ["asks for torch.serialization.load;"]),
    "torch.hub": (named("torch", "hub.load") + b".", ["asks for torch.hub.load;"]),
    "lookalike": (named("torch.nnx", "Module") + b".", ["asks for torch.nnx.Module;"]),
    "lookalike dict": (named("collections", "defaultdict") + b".", ["asks for collections.defaultdict;"]),
    "dotted": (named("torch.nn", "functional.os.system") + b".", ["asks for torch.nn.functional.os.system;"]),
    "dotted ours": (named("torch_utils", "persistence._reconstruct_persistent_obj") + b".", ["asks for torch_utils."]),
    "dotted builtins": (named("torch.nn", "Module.__init__.__globals__") + b".", ["asks for torch.nn.Module.__init__.__globals__;"]),
    "reconstructor": (named("copyreg", "_reconstructor") + b".", ["asks for copyreg._reconstructor;"]),
    "codec": (named("_codecs", "encode") + b".", ["asks for _codecs.encode;"]),
    "call of a torch.nn class": (named("torch.nn", "Linear") + b"K\x01K\x01\x86R.", ["cannot be called"]),
    "call of an object": (MODULE_DICT + b")R.", ["cannot be called"]),
    "call of a text": (text("print") + b")R.", ["cannot be called"]),
    "call without a tuple": (RECONSTRUCT + b"]R.", ["cannot be called"]),
    "wrong arguments": (RECONSTRUCT + b")R.", ["argument"]),
    "meta is a number": (RECONSTRUCT + b"K\x01\x85R.", ["not a readable"]),
    "meta of no class": (RECONSTRUCT + b"}(" + text("type") + text("function") + b"u\x85R.", ["not a readable"]),
    "new object of a function": (STORAGE + b")\x81.", ["no known class"]),
    "new object of a text": (text("x") + b")\x81.", ["no known class"]),
    "new object with arguments": (named("torch.nn", "Linear") + b"K\x01\x85\x81.", ["no known class"]),
    "build on a function": (TENSOR + b"N}" + text("__defaults__") + b")s\x86b.", ["a state for"]),
    "build on a class": (named("torch.nn", "Module") + b"}" + text("forward") + text("x") + b"sb.", ["a state for"]),
    "build on a dict": (named("collections", "OrderedDict") + b")R}b.", ["a state for"]),
    "build twice": (MODULE_DICT + b"}b}b.", ["a state for"]),
    "build on a number": (b"K\x01}b.", ["a state for"]),
    "entry of a list": (b"]K\x00K\x01s.", ["an entry of"]),
    "entry of a tuple": (b"}" + DEEP + b"K\x01s.", ["an entry of"]),
    "entries of tuples": (b"}(" + DEEP + b"K\x01u.", ["an entry of"]),
    "odd entries": (b"}(" + text("x") + b"u.", ["an entry of"]),
    "deep in a dict": (b"}" + text("ema") + DEEP + b"s.", ["'ema'"]),
    "extension 1": (b"\x82\x01.", ["EXT1"]),
    "extension 2": (b"\x83\x01\x00.", ["EXT2"]),
    "extension 4": (b"\x84\x01\x00\x00\x00.", ["EXT4"]),
    "persistent id": (b"Pid\n.", ["PERSID"]),
    "binary persistent id": (text("id") + b"Q.", ["BINPERSID"]),
    "instance": (b"(" + text("x") + b"ios\nsystem\n.", ["INST"]),
    "object": (b"(" + named("collections", "OrderedDict") + b"o.", ["OBJ"]),
    "new object, extended": (named("torch.nn", "Linear") + b")}\x92.", ["NEWOBJ_EX"]),
    "a memo that fills memory": (b"Nr\xff\xff\xff\x7f.", ["LONG_BINPUT"]),
    "buffer": (b"\x97.", ["NEXT_BUFFER"]),
    "unknown opcode": (b"\xff.", ["0xff"]),
    "no text": (b"\x8c\x01\xff.", ["invalid start byte"]),
    "huge text": (b"\x8e" + b"\xff" * 7 + b"\x00.", ["not a readable"]),
    "huge frame": (b"\x95" + b"\xff" * 7 + b"\x00.", ["not a readable"]),
    "empty stack": (b"R.", ["not a readable"]),
    "missing memo": (b"h\x07.", ["not a readable"]),
    "number": (b"K\x01.", ["'ema'"]),
    "no ema": (b"}.", ["'ema'"]),
    "numpy object": (named("numpy", "dtype") + text("O8") + b"\x85R.", ["numpy dtype 'O8'"]),
    "numpy number of no bytes": (
        named("numpy._core.multiarray", "scalar") + b"N" + pickle.SHORT_BINBYTES + b"\x00\x86R.",
        ["not a readable"],
    ),
    "module in itself": (
        b"}" + text("ema") + MODULE_DICT + pickle.MEMOIZE + b"}(" + ENTRIES + b"}" + text("a") + b"h\x00sub" + b"s.",
        ["'a.' is no module, or one that has occurred before"],
    ),
    "tensor of no storage": (TENSOR + b"NK\x00))t.", ["not a readable"]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_streams(name, tmp_path):
    opcodes, words = STREAMS[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + opcodes)
    refused(path, *words)


def test_nothing_hostile_runs(nvlabs):
    """Calls hidden in every part of a file that is otherwise NVlabs', each of which plain pickle would run."""
    net, marker = random_net("vp", torch.float32), nvlabs.marker
    touch = Calls(os.system, f"touch {marker}")
    python_touch = Calls(eval, f"open({str(marker)!r}, 'w')")
    pickle.loads(pickle.dumps(touch))
    assert marker.exists()  # so the mine is live
    marker.unlink()

    def storage_of(thing):
        file = io.BytesIO()
        torch.save(thing, file, _use_new_zipfile_serialization=False)
        return Calls(torch.storage._load_from_bytes, file.getvalue())

    def zipped(thing):
        file = io.BytesIO()
        torch.save(thing, file)
        return Calls(torch.storage._load_from_bytes, file.getvalue())

    bombs = [(touch, "posix.system"), (python_touch, "eval"), (storage_of(touch), "posix.system"), (zipped([touch]), "posix.system")]
    bombs += [(storage_of({"a": python_touch}), "eval"), (Calls(torch.load, str(marker)), "torch.serialization.load")]
    bombs += [(Calls(torch.storage._load_from_bytes, pickle.dumps(touch)), "not a readable"), (Calls(exec, "1"), "builtins.exec")]
    for bomb, word in bombs:
        for place in ("top", "entry", "attribute", "argument", "state"):
            content = nvlabs.content(net, CONFIGS["vp"])
            if place == "top":
                content = bomb
            elif place == "entry":
                content["loss_fn"] = bomb
            elif place == "attribute":
                content["ema"].secret = bomb
            elif place == "argument":
                content["ema"]._init_kwargs["dropout"] = bomb
            else:
                content["ema"]._modules["model"]._modules["enc"]._modules["8x8_conv"]._parameters["weight"] = bomb
            for protocol in (2, 5):
                nvlabs.path.write_bytes(pickle.dumps(content, protocol))
                refused(nvlabs.path, *([word] if protocol > 2 else []))
    copyreg.add_extension("posix", "system", 77)
    try:
        nvlabs.path.write_bytes(pickle.dumps(touch))
        refused(nvlabs.path, "EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 77)
    assert not marker.exists()


def test_old_protocols_are_refused_by_name(tmp_path):
    for protocol in range(6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(Calls(os.system, "true"), protocol))
        refused(tmp_path / "x.pkl", "asks for posix.system; only the tensors and arguments of an NVlabs EDM network are read")


def change(path, value):
    """A change of a content: the thing at `path` (dict keys and attributes) becomes `value`, or value(old)."""

    def apply(content):
        thing = content
        for step in path[:-1]:
            thing = thing[step] if isinstance(thing, dict) else getattr(thing, step)
        old = thing.get(path[-1]) if isinstance(thing, dict) else getattr(thing, path[-1])
        new = value(old) if callable(value) else value
        if isinstance(thing, dict):
            thing[path[-1]] = new
        else:
            object.__setattr__(thing, path[-1], new)

    return apply


INIT, WEIGHT = ("ema", "_init_kwargs"), ("ema", "_modules", "model", "_modules", "map_layer0", "_parameters", "weight")
INNER = ("ema", "_modules", "model", "_modules")
DEFECTS = {
    "class": (change(("ema", "name"), "EDMLoss"), ["'EDMLoss', expected EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond"]),
    "ema is a tensor": (change(("ema",), torch.zeros(2)), ["'ema'"]),
    "no arguments": (change(("ema", "_init_kwargs"), None), ["arguments are missing"]),
    "too many arguments": (change(("ema", "_init_args"), tuple(range(20))), ["too many"]),
    "model_type": (change((*INIT, "model_type"), "UNet"), ["model_type is 'UNet', expected SongUNet or DhariwalUNet"]),
    "model_type list": (change((*INIT, "model_type"), ["SongUNet"]), ["model_type is a list"]),
    "unknown argument": (change((*INIT, "channels"), 5), ["unknown argument 'channels' of VPPrecond"]),
    "other network's": (change((*INIT, "model_type"), "DhariwalUNet"), ["tensor model.map_label.weight"]),
    "argument text": (change((*INIT, "label_dim"), "3"), ["label_dim is '3', expected a whole number from 0"]),
    "argument bool": (change((*INIT, "num_blocks"), True), ["num_blocks is True"]),
    "argument fraction": (change((*INIT, "model_channels"), 8.0), ["model_channels is 8.0, expected a whole number"]),
    "argument nan": (change((*INIT, "dropout"), math.nan), ["dropout is nan"]),
    "argument negative": (change((*INIT, "augment_dim"), -1), ["augment_dim is -1"]),
    "argument of a dict": (change((*INIT, "dropout"), {"a": 1}), ["dropout is a dict"]),
    "argument not bool": (change((*INIT, "use_fp16"), 1), ["use_fp16 is 1, expected True or False"]),
    "endless blocks": (change((*INIT, "num_blocks"), 10**6), ["num_blocks is 1000000, expected a whole number from 1 to 64"]),
    "endless channels": (change((*INIT, "model_channels"), 10**6), ["not a readable"]),
    "endless levels": (change((*INIT, "channel_mult"), [1] * 17), ["channel_mult"]),
    "no levels": (change((*INIT, "channel_mult"), []), ["channel_mult"]),
    "text levels": (change((*INIT, "channel_mult"), "12"), ["channel_mult is '12', expected a list"]),
    "odd image": (change(("ema", "_init_args"), (9, 2)), ["9 pixels"]),
    "odd filter": (change((*INIT, "resample_filter"), [1, 2, 1]), ["filter [1, 2, 1]"]),
    "few channels": (change((*INIT, "model_channels"), 2), ["no network"]),
    "encoder": (change((*INIT, "encoder_type"), "none"), ["encoder_type is 'none', expected standard or skip or residual"]),
    "missing tensor": (change(WEIGHT, None), ["'model.map_layer0.weight' is missing"]),
    "unexpected tensor": (change((*WEIGHT[:-1], "extra"), torch.zeros(1)), ["'model.map_layer0.extra' is unexpected"]),
    "shape": (change(WEIGHT, torch.zeros(8, 32)), ["model.map_layer0.weight is torch.float32 (8, 32), expected floating-point (32, 8)"]),
    "integers": (change(WEIGHT, torch.zeros(32, 8, dtype=torch.int32)), ["torch.int32 (32, 8)"]),
    "not finite": (change(WEIGHT, lambda old: old.detach() * math.nan), ["model.map_layer0.weight is not finite"]),
    "too large for float32": (change(WEIGHT, lambda old: old.detach().double() * 1e300), ["not finite"]),
    "larger than its storage": (change(WEIGHT, torch.zeros(1).expand(32, 8)), ["larger than its storage of 1"]),
    "number for a tensor": (change(WEIGHT, 7), ["model.map_layer0.weight' is 7, expected a tensor"]),
    "text for a module": (change((*INNER, "map_layer0"), "x"), ["'model.map_layer0.' is no module"]),
    "module twice": (lambda content: content["ema"]._modules.update(again=content["ema"]._modules["model"]), ["'again.'"]),
    "no parameters": (change(("ema", "_parameters"), None), ["not a readable"]),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_one_line(name, nvlabs):
    apply, words = DEFECTS[name]
    content = nvlabs.content(random_net("vp", torch.float32), CONFIGS["vp"])
    apply(content)
    nvlabs.path.write_bytes(pickle.dumps(content))
    refused(nvlabs.path, *words)


def test_deep_modules(nvlabs):
    """Ten thousand modules in one another: no stack overflows."""
    names = [text(name) for name in ("type", "class", "class_name", "EDMPrecond", "state")]
    start = RECONSTRUCT + b"}(" + b"".join(names) + b"}(" + ENTRIES + b"}" + text("a")
    deep = start * 10_000 + b"N" + b"suu\x85R" * 10_000
    nvlabs.path.write_bytes(b"\x80\x04}" + text("ema") + deep + b"s.")
    refused(nvlabs.path, "recursion")


def test_damaged_files(nvlabs):
    """Cut anywhere, or with any byte changed: a UserError or a valid network, and never anything else."""
    tiny = config(
        "EDMPrecond", model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[], channel_mult_emb=1
    )
    content = nvlabs.content(edm.build(tiny), tiny)
    good, chance = pickle.dumps(content), random.Random(0)
    nvlabs.path.write_bytes(good)
    edm.read_pickle(nvlabs.path)
    ends = [*range(40), *(chance.randrange(len(good)) for _ in range(60)), len(good) - 1]
    for end in ends:
        nvlabs.path.write_bytes(good[:end])
        refused(nvlabs.path)
    read = 0
    for _ in range(220):
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] = chance.randrange(256)
        nvlabs.path.write_bytes(bad)
        try:
            read_config, network = edm.read_pickle(nvlabs.path)
        except cli.UserError as error:
            assert str(error).startswith(f"{nvlabs.path}: ") and "\n" not in str(error)
        else:
            edm.build(read_config).load_state_dict(network.state_dict())
            read += 1
    assert 20 < read < 200
    assert not nvlabs.marker.exists()


# ------------------------------------------------------------------------------------------------ the command and load


@pytest.fixture
def converted(nvlabs, tmp_path):
    """(pickle, directory) of a converted network."""
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(random_net("vp", torch.float32), CONFIGS["vp"])))
    edm.main(edm.parse_args(["convert", str(nvlabs.path), str(tmp_path / "out")]))
    return nvlabs.path, tmp_path / "out"


def convert_fails(capsys, monkeypatch, argv, *words):
    monkeypatch.setattr("sys.argv", ["edm.py"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        cli.run(edm.main, edm.parse_args([str(a) for a in argv]))
    lines = capsys.readouterr().err.splitlines()
    assert info.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def test_convert_errors_are_one_line(converted, tmp_path, capsys, monkeypatch):
    path, out = converted
    weights, other = (out / "model.safetensors").read_bytes(), tmp_path / "other"
    hostile, text_file = tmp_path / "hostile.pkl", tmp_path / "notes.pkl"
    hostile.write_bytes(pickle.dumps(Calls(os.system, "true")))
    text_file.write_text("notes")
    for argv, words in [
        ([], ["required"]),
        (["export", path, other], ["convert"]),
        (["convert", path], ["OUT_DIR"]),
        (["convert", tmp_path / "none.pkl", other], ["none.pkl", "No such file"]),
        (["convert", tmp_path, other], [str(tmp_path), "directory"]),
        (["convert", hostile, other], ["hostile.pkl", "posix.system"]),
        (["convert", text_file, other], ["notes.pkl"]),
        (["convert", path, text_file], ["notes.pkl"]),
        (["convert", path, tmp_path], [str(tmp_path), "holds"]),
    ]:
        convert_fails(capsys, monkeypatch, argv, *words)
        assert not other.exists()
    (out / "config.json").write_text(json.dumps({"kind": "vit"}))
    convert_fails(capsys, monkeypatch, ["convert", path, out], str(out), "holds config.json")
    assert (out / "model.safetensors").read_bytes() == weights and json.loads((out / "config.json").read_text()) == {"kind": "vit"}


def test_a_failed_write_leaves_no_config(converted, tmp_path, capsys, monkeypatch):
    """config.json is written last, and what a killed conversion leaves is no obstacle."""
    path, _ = converted
    other = tmp_path / "other"
    monkeypatch.setattr(safetensors.torch, "save", lambda state: b"x" / 0)
    with pytest.raises(TypeError):
        edm.main(edm.parse_args(["convert", str(path), str(other)]))
    assert os.listdir(other) == []
    monkeypatch.undo()
    (other / "model.safetensors.writing").write_bytes(b"half")
    edm.main(edm.parse_args(["convert", str(path), str(other)]))
    assert sorted(os.listdir(other)) == ["config.json", "model.safetensors"]


def test_load_defects_are_one_line(converted):
    _, out = converted
    weights, text_config = (out / "model.safetensors").read_bytes(), (out / "config.json").read_text()
    tensors, good = safetensors.torch.load(weights), json.loads(text_config)

    def fails(*words, config=good, weights=weights):
        for name, value in (("config.json", config), ("model.safetensors", weights)):
            (out / name).unlink(missing_ok=True)
            if value is not None:
                (out / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        with pytest.raises(cli.UserError) as info:
            edm.load(out)
        assert str(info.value).startswith(str(out)) and "\n" not in str(info.value)
        for word in words:
            assert word in str(info.value)

    def saved(**changes):
        return safetensors.torch.save({k: v for k, v in (tensors | changes).items() if v is not None})

    bias = "model.map_layer0.bias"
    fails("config.json: no such file", config=None)
    fails("config.json", config=b"{")
    fails("'VPPrecond'", config=good | {"kind": "diffusers"})
    fails("'vp'", config=good | {"precond": "vp"})
    fails("a list", config=good | {"init": good["init"] | {"num_blocks": [1]}})
    fails("img_channels is None", config=good | {"init": {"img_resolution": 8}})
    fails("tensor", config=good | {"init": good["init"] | {"model_channels": 12}})
    fails("model.safetensors", weights=None)
    fails("model.safetensors", weights=b"")
    for end in (4, 100, len(weights) // 2, len(weights) - 1):
        fails("model.safetensors", weights=weights[:end])
    fails(f"'{bias}' is missing", weights=saved(**{bias: None}))
    fails("'more' is unexpected", weights=saved(more=torch.zeros(1)))
    fails(bias, "(5,)", "(32,)", weights=saved(**{bias: torch.zeros(5)}))
    fails(bias, "int64", weights=saved(**{bias: torch.zeros(32, dtype=torch.int64)}))
    fails(bias, "not finite", weights=saved(**{bias: torch.full((32,), math.inf)}))
    with pytest.raises(cli.UserError):
        edm.load(out / "none")


def test_command(nvlabs, tmp_path):
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(random_net("adm", torch.float32), CONFIGS["adm"])))
    done = python("-m", "common.edm", "convert", nvlabs.path, tmp_path / "out")
    assert len(done.stdout.splitlines()) == 1 and "EDMPrecond around DhariwalUNet" in done.stdout and done.stderr == ""
