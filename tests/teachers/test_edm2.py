"""NVlabs' EDM2: our networks against a slow plain reference, and how their files are opened.

Alone: python -m pytest tests/teachers/test_edm2.py
"""

import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from edm2_helper import (
    EDM2_CONFIGS,
    LATENTS,
    edm2_config,
    edm2_content,
    edm2_dir,
    random_edm2,
)

import generate_synthetic
from common import UserError
from teachers import edm, edm2
from teachers.load import freeze, load_diffusion


def inputs(net, dtype=torch.float64):
    """(noisy, sigma, labels) of three images."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, net.img_channels, net.img_resolution, net.img_resolution)
    noisy = torch.randn(shape, generator=generator, dtype=dtype)
    sigma = torch.tensor([0.03, 1.0, 30.0], dtype=dtype)
    return noisy, sigma, torch.tensor([0, 2, 1])


def one_hot(net, labels):
    """Labels (B,) as the network takes them; a label that is no class is all zeros."""
    classes = torch.arange(net.label_dim)
    return (labels[:, None] == classes).double()


# -------------------------------------------------------------------------------- a plain reference


def normalized(x, axes):
    """x over 1e-4 plus its root mean square along axes."""
    return x / (1e-4 + np.sqrt((x**2).mean(axes, keepdims=True)))


def silu(x):
    return x / (1 + np.exp(-x)) / 0.596


def mixed(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


class Reference:
    """The network's forward pass over its state dict, driven by the names of the tensors."""

    def __init__(self, unet):
        self.state = {key: value.numpy() for key, value in unet.state_dict().items()}
        self.enc = list(unet.enc)
        self.dec = list(unet.dec)

    def layer(self, name, x):
        """A linear layer, or the sum of shifted images times the kernel; 0 outside the image."""
        weight = self.state[f"{name}.weight"]
        weight = np.stack([normalized(w, None) / math.sqrt(w.size) for w in weight])
        if weight.ndim == 2:
            return x @ weight.T
        width = weight.shape[-1]
        pad = width // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        size = x.shape[-1] - width + 1
        y = 0
        for a, b in np.ndindex(width, width):
            y = y + np.einsum(
                "oc,ncij->noij", weight[:, :, a, b], x[:, :, a:, b:][..., :size, :size]
            )
        return y

    def attention(self, name, x):
        heads = x.shape[1] // 64
        qkv = self.layer(f"{name}.attn_qkv", x)
        qkv = qkv.reshape(len(x), heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = (normalized(qkv[:, :, :, i], 2) for i in range(3))
        weights = np.exp(np.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(q.shape[2]))
        weights /= weights.sum(3, keepdims=True)
        attended = np.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
        return self.layer(f"{name}.attn_proj", attended)

    def block(self, name, x, emb):
        has_skip = f"{name}.conv_skip.weight" in self.state
        if name.endswith("_down"):
            x = (
                x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
            ) / 4
        if name.endswith("_up"):
            x = x.repeat(2, 2).repeat(2, 3)
        if name.startswith("enc"):
            x = normalized(self.layer(f"{name}.conv_skip", x) if has_skip else x, 1)
        y = self.layer(f"{name}.conv_res0", silu(x))
        scale = 1 + self.state[f"{name}.emb_gain"] * self.layer(f"{name}.emb_linear", emb)
        y = self.layer(f"{name}.conv_res1", silu(y * scale[:, :, None, None]))
        if name.startswith("dec") and has_skip:
            x = self.layer(f"{name}.conv_skip", x)
        x = mixed(x, y, 0.3)
        if f"{name}.attn_qkv.weight" in self.state:
            x = mixed(x, self.attention(name, x), 0.3)
        return x.clip(-256, 256)

    def __call__(self, x, noise, labels):
        angles = noise[:, None] * self.state["emb_fourier.freqs"] + self.state["emb_fourier.phases"]
        emb = self.layer("emb_noise", math.sqrt(2) * np.cos(angles))
        if "emb_label.weight" in self.state:
            own = self.layer("emb_label", labels * math.sqrt(labels.shape[1]))
            emb = mixed(emb, own, 0.5)
        emb = silu(emb)
        x = np.concatenate([x, np.ones_like(x[:, :1])], 1)
        skips = []
        for key in self.enc:
            is_conv = key.endswith("_conv")
            x = self.layer(f"enc.{key}", x) if is_conv else self.block(f"enc.{key}", x, emb)
            skips.append(x)
        for key in self.dec:
            if "_block" in key:
                skip = skips.pop()
                n_x, n_skip = x.shape[1], skip.shape[1]
                c = math.sqrt((n_x + n_skip) / 0.5)
                parts = [c / math.sqrt(n_x) * 0.5 * x, c / math.sqrt(n_skip) * 0.5 * skip]
                x = np.concatenate(parts, 1)
            x = self.block(f"dec.{key}", x, emb)
        assert not skips
        return self.state["out_gain"] * self.layer("out_conv", x)


@pytest.mark.parametrize("name", EDM2_CONFIGS)
def test_network_is_the_reference(name):
    """Blocks, attention, embedding and the wiring of skips, with labels and without, in float64."""
    net = random_edm2(EDM2_CONFIGS[name])
    x, sigma, y = inputs(net)
    for labels in (one_hot(net, y), one_hot(net, y + 9)):
        output = net.unet(x, sigma.log(), labels)
        expected = Reference(net.unet)(x.numpy(), sigma.log().numpy(), labels.numpy())
        torch.testing.assert_close(output, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
        assert output.std() > 0.1


def test_activations_are_cut_off_at_256():
    net = random_edm2(EDM2_CONFIGS["pixels"])
    x, sigma, y = inputs(net)
    block = net.unet.dec["16x16_block0"]
    emb = torch.randn(3, 128, dtype=torch.float64)
    x = torch.randn(3, 64 + 32, 16, 16, dtype=torch.float64)
    assert block(1e5 * x, emb).abs().max() == 256
    assert block(x, emb).abs().max() < 50


@pytest.mark.parametrize("name", EDM2_CONFIGS)
def test_preconditioning_is_edms(name):
    net = random_edm2(EDM2_CONFIGS[name])
    noisy, sigmas, y = inputs(net)
    labels = one_hot(net, y)
    batch = net(noisy, sigmas, labels)
    sd = EDM2_CONFIGS[name]["init"].get("sigma_data", 0.5)
    for i, s in enumerate(sigmas.tolist()):
        root = math.sqrt(s**2 + sd**2)
        x = noisy[i : i + 1]
        c_noise = torch.tensor([math.log(s) / 4], dtype=x.dtype)
        output = net.unet(x / root, c_noise, labels[i : i + 1])
        expected = sd**2 / root**2 * x + s * sd / root * output
        torch.testing.assert_close(batch[i : i + 1], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(net(noisy, sigmas), net(noisy, sigmas, torch.zeros(3, net.label_dim)))


# --------------------------------------------------------------------------------- published shapes


@pytest.mark.parametrize(
    "channels, millions", [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_published_sizes_and_names(channels, millions):
    """Those of the paper's table, XS to XXL. Those of img64 differ in the channels of images."""
    with torch.device("meta"):
        config = {
            "kind": "nvlabs-edm",
            "precond": "Precond",
            "encoder": LATENTS,
            "init": {
                "img_resolution": 64,
                "img_channels": 4,
                "label_dim": 1000,
                "model_channels": channels,
                "dropout": 0.1,
            },
        }
        net = edm.build(config)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=0.01)
    blocks = []
    for size in ("64x64", "32x32", "16x16", "8x8"):
        blocks.append(f"enc.{size}_conv" if size == "64x64" else f"enc.{size}_down")
        blocks += [f"enc.{size}_block{i}" for i in range(3)]
    for size in ("8x8", "16x16", "32x32", "64x64"):
        blocks += [f"dec.{size}_in0", f"dec.{size}_in1"] if size == "8x8" else [f"dec.{size}_up"]
        blocks += [f"dec.{size}_block{i}" for i in range(4)]
    assert net.blocks == blocks
    attends = [name for name in blocks if hasattr(net.unet.get_submodule(name), "attn_qkv")]
    lower = [name for name in blocks if "16x16_block" in name or "8x8_block" in name]
    assert sorted(attends) == sorted([*lower, "dec.8x8_in0"])
    names = {name for name, _ in net.named_parameters()} | {name for name, _ in net.named_buffers()}
    gains = {"unet.out_gain", *(f"unet.{name}.emb_gain" for name in blocks[1:])}
    assert gains == {name for name in names if name.endswith("gain")}
    fourier = ("unet.emb_fourier", "logvar_fourier")
    assert {f"{name}.{part}" for name in fourier for part in ("freqs", "phases")} <= names
    assert {"unet.emb_noise.weight", "unet.emb_label.weight", "logvar_linear.weight"} <= names
    assert edm2.EDM2(net).default_block == "dec.16x16_block1"


# --------------------------------------------------------------------------- as all scripts see it


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    """Folders of converted networks by the names of EDM2_CONFIGS."""
    folder = tmp_path_factory.mktemp("edm2")
    return {name: edm2_dir(folder / name, config) for name, config in EDM2_CONFIGS.items()}


@pytest.mark.parametrize("name", EDM2_CONFIGS)
def test_denoised_images_and_features_are_the_networks(name, dirs):
    model = load_diffusion(dirs[name], "cpu")
    net = model.net
    assert model.label_dropout == 0 and model.has_null_label
    assert model.num_classes == (0 if name == "uncond" else 3)
    assert model.image_size == (64 if name == "latents" else 16) and model.channels == 3
    assert model.default_sigma == (0.17 if name == "latents" else 0.06)
    noisy, sigma, y = inputs(net, torch.float32)
    labels = one_hot(net, y).float()
    expected = net(noisy, sigma, labels)
    if model.num_classes:
        assert torch.equal(model.denoise(noisy, sigma, y), expected)
        none = torch.full((3,), 3)
        assert torch.equal(model.denoise(noisy, sigma, none), net(noisy, sigma))
    assert torch.equal(model.denoise(noisy, sigma), net(noisy, sigma))

    x = torch.rand(3, 3, model.image_size, model.image_size)
    outputs = {}
    handles = []
    for block in model.blocks:

        def hook(module, inputs, output, block=block):
            outputs[block] = output.mean((2, 3))

        handles.append(net.unet.get_submodule(block).register_forward_hook(hook))
    y = y if model.num_classes else None
    with torch.no_grad():
        model.denoise(model.encode(x) + 0.3 * noisy, 0.3, y)
    for handle in handles:
        handle.remove()
    assert list(outputs) == model.blocks  # they ran in that order
    with torch.no_grad():
        found = model.features(x, 0.3, y, model.blocks, noisy)
        (last,) = model.features(x, 0.3, y, [model.default_block], noisy)
    for block, features in zip(model.blocks, found):
        assert torch.equal(features, outputs[block])
    assert torch.equal(last, outputs[model.default_block])


def test_latents_are_whitened_and_of_pixels_from_0_to_1(dirs):
    model = load_diffusion(dirs["latents"], "cpu")
    assert model.noise_shape == (4, 8, 8)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([5.81, 3.25, 0.12, -2.15]).view(4, 1, 1)
    std = torch.tensor([4.17, 4.62, 3.71, 3.28]).view(4, 1, 1)
    with torch.no_grad():
        raw = model.vae.encode(x).latent_dist.mean
        torch.testing.assert_close(model.encode(x), (raw - mean) / std / 2)
        clean = torch.randn(2, 4, 8, 8)
        pixels = model.vae.decode(clean * 2 * std + mean).sample  # 0 to 1
        torch.testing.assert_close((model.decode(clean) + 1) / 2, pixels)


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_bf16_rounds_the_network_alone(name):
    """Noise levels, their codes and norms of weights stay float32."""
    config = EDM2_CONFIGS[name]
    model = edm2.EDM2(random_edm2(config, torch.float32))
    in_bf16 = edm2.EDM2(random_edm2(config, torch.float32))
    freeze(in_bf16, "cpu", "bf16")
    assert {p.dtype for p in in_bf16.net.parameters()} == {torch.bfloat16}
    noisy = torch.randn(3, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.05, 1.0, 40.0):
        expected = model.denoise(noisy * sigma, sigma)
        found = in_bf16.denoise(noisy * sigma, sigma)
        assert found.dtype == torch.float32
        error = (found - expected).norm() / (expected - noisy * sigma).norm()
        assert error < 0.03


@pytest.mark.parametrize("encoder", ["StandardRGBEncoder", LATENTS])
def test_generates_a_synthetic_set(encoder, tmp_path):
    channels = 4 if encoder == LATENTS else 3
    resolution = 8 if encoder == LATENTS else 64
    config = edm2_config(
        encoder,
        img_resolution=resolution,
        img_channels=channels,
        label_dim=1000,
        model_channels=8,
    )
    path = edm2_dir(tmp_path / "net", config)
    argv = ["--dataset", "imagenet", "--diffusion", path, "--n-images", "3", "--n-steps", "2"]
    out = tmp_path / "set"
    argv += ["--batch-size", "2", "--out-dir", str(out)]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    images = np.load(out / "shard-00000-images.npy")
    assert images.shape == (3, 64, 64, 3) and images.std() > 5
    assert json.loads((out / "manifest.json").read_text())["network_sha256"]


# -------------------------------------------------------------------------------- pickles of NVlabs


def write(nvlabs, name="pixels", half=False, protocol=4):
    """Write a network of EDM2_CONFIGS as NVlabs would, and return it."""
    net = random_edm2(EDM2_CONFIGS[name], torch.float16 if half else torch.float32)
    content = edm2_content(nvlabs, net, EDM2_CONFIGS[name])
    nvlabs.path.write_bytes(pickle.dumps(content, protocol))
    return net


def convert(path, out):
    edm.main(edm.parse_args(["convert", str(path), str(out)]))


@pytest.mark.parametrize("name", EDM2_CONFIGS)
def test_pickle_to_network_and_back(name, nvlabs, tmp_path, capsys):
    """Read from a pickle, and converted and loaded: outputs are bit-equal to the source's."""
    net = write(nvlabs, name)
    config, read = edm.read_pickle(nvlabs.path)
    assert config == EDM2_CONFIGS[name] == json.loads(json.dumps(config))
    out = tmp_path / "out"
    convert(nvlabs.path, out)
    convert(nvlabs.path, out)  # the same again is no error
    lines = capsys.readouterr().out.splitlines()
    size = "8 x 8, 4 channels" if name == "latents" else "16 x 16, 3 channels"
    assert f"EDM2, {size}, {net.label_dim} classes" in lines[0]
    notes = [line for line in lines if "put the VAE stabilityai/sd-vae-ft-mse into" in line]
    assert len(notes) == (2 if name == "latents" else 0)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    loaded, stored = edm.load(out)
    assert stored.items() > config.items() and len(stored["pickle_sha256"]) == 64
    noisy, sigma, y = inputs(net, torch.float32)
    for network in (read.eval(), loaded):
        found = network(noisy, sigma, one_hot(net, y).float())
        assert torch.equal(found, net(noisy, sigma, one_hot(net, y).float()))
    if name != "latents":
        model = load_diffusion(str(nvlabs.path), "cpu")
        torch.testing.assert_close(model.denoise(noisy, sigma), net(noisy, sigma))
    assert not nvlabs.marker.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_half_precision_and_protocols(protocol, nvlabs):
    """Published files are float16; the encoder's numpy arrays are written in two ways."""
    net = write(nvlabs, "latents", half=True, protocol=protocol)
    state = edm.read_pickle(nvlabs.path)[1].state_dict()
    for key, value in net.state_dict().items():
        assert state[key].dtype == torch.float32 and torch.equal(state[key], value.float())


def test_a_vae_that_is_there_first_is_no_obstacle(nvlabs, dirs, tmp_path, capsys):
    write(nvlabs, "latents")
    out = tmp_path / "out"
    out.mkdir()
    os.symlink(os.path.join(dirs["latents"], "vae"), out / "vae")
    convert(nvlabs.path, out)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert load_diffusion(str(out), "cpu").image_size == 64


def test_files_without_an_encoder_are_of_pixels(nvlabs):
    config = EDM2_CONFIGS["uncond"]
    content = edm2_content(nvlabs, random_edm2(config, torch.float32), config)
    del content["encoder"]
    nvlabs.path.write_bytes(pickle.dumps(content))
    assert edm.read_pickle(nvlabs.path)[0] == config


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refused(path, *words):
    with pytest.raises(UserError) as info:
        edm.read_pickle(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("place", ["entry", "encoder", "array", "argument", "attribute", "weight"])
def test_nothing_hostile_runs(place, nvlabs):
    """A call in every part of a file that is otherwise NVlabs', which pickle would run."""
    config = EDM2_CONFIGS["latents"]
    content = edm2_content(nvlabs, random_edm2(config, torch.float32), config)
    ema = content["ema"]
    touch = Calls(os.system, f"touch {nvlabs.marker}")
    for bomb, name in ((touch, "posix.system"), (Calls(eval, "1"), "builtins.eval")):
        if place == "entry":
            content["loss_fn"] = bomb
        elif place == "encoder":
            content["encoder"] = bomb
        elif place == "array":
            content["encoder"].scale = bomb
        elif place == "argument":
            ema._init_kwargs["dropout"] = bomb
        elif place == "attribute":
            ema._modules["unet"]._modules["enc"]._modules["8x8_conv"].secret = bomb
        else:
            ema._modules["unet"]._parameters["out_gain"] = bomb
        for protocol in (2, 4, 5):
            nvlabs.path.write_bytes(pickle.dumps(content, protocol))
            # Protocol 2 spells NumPy's bytes as a call of its own, which comes before.
            refused(nvlabs.path, "asks for", *[name] * (protocol > 2))
    assert not nvlabs.marker.exists()


def test_an_array_of_objects_is_not_unpacked(nvlabs):
    config = EDM2_CONFIGS["latents"]
    content = edm2_content(nvlabs, random_edm2(config, torch.float32), config)
    content["encoder"].scale = np.array([Calls(os.system, f"touch {nvlabs.marker}")], object)
    nvlabs.path.write_bytes(pickle.dumps(content))
    refused(nvlabs.path)
    assert not nvlabs.marker.exists()


ARGUMENTS = [
    ("label_balance", 0.5, "unknown argument 'label_balance' of Precond"),
    ("model_type", "SongUNet", "unknown argument 'model_type' of Precond"),
    ("model_channels", 48, "weights do not fit"),
    ("model_channels", 129, "cannot be divided among"),
    ("channel_mult", [1] * 6, "16 pixels, 6 levels cannot be halved"),
    ("attn_resolutions", "8", "attn_resolutions is '8', expected a list"),
    ("label_dim", 4, "unet.emb_label.weight is 128x3, expected 128x4"),
    ("logvar_channels", 0, "logvar_channels is 0, expected a whole number from 1"),
    ("sigma_data", math.nan, "sigma_data is nan, expected a number above 0"),
    ("sigma_data", 0, "sigma_data is 0, expected a number above 0"),
]


@pytest.mark.parametrize("name, value, words", ARGUMENTS)
def test_wrong_arguments_are_one_line(name, value, words, nvlabs):
    content = edm2_content(
        nvlabs, random_edm2(EDM2_CONFIGS["pixels"], torch.float32), EDM2_CONFIGS["pixels"]
    )
    content["ema"]._init_kwargs[name] = value
    nvlabs.path.write_bytes(pickle.dumps(content))
    refused(nvlabs.path, words)


def test_wrong_encoders_are_one_line(nvlabs):
    config = EDM2_CONFIGS["pixels"]
    content = edm2_content(nvlabs, random_edm2(config, torch.float32), config)

    def fails(words, encoder, **attributes):
        if isinstance(encoder, str):
            encoder = nvlabs.wrap(torch.nn.Module(), name=encoder, **attributes)
        nvlabs.path.write_bytes(pickle.dumps(content | {"encoder": encoder}))
        refused(nvlabs.path, words)

    fails("its encoder is 'Other', expected StandardRGBEncoder or StabilityVAEEncoder", "Other")
    fails("its encoder is 5, expected an object", 5)
    fails("arguments of its own", LATENTS, _init_kwargs={"final_std": 1})
    fails("3 channels of latents, expected 4", LATENTS)


def test_a_missing_or_wrong_vae_is_one_line(nvlabs, dirs, tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as info:
            load_diffusion(str(path), "cpu")
        assert str(info.value).startswith(str(path)) and "\n" not in str(info.value)
        return str(info.value)

    write(nvlabs, "latents")
    said = refusal(nvlabs.path)
    assert "on latents" in said and "python -m teachers.edm convert" in said and "vae/" in said
    convert(nvlabs.path, tmp_path / "none")
    said = refusal(tmp_path / "none")
    assert "vae/config.json: no such file, expected the VAE stabilityai/sd-vae-ft-mse" in said
    edm2_dir(tmp_path / "three", EDM2_CONFIGS["latents"], vae_channels=3)
    assert "latent_channels is 3, expected 4" in refusal(tmp_path / "three")


def test_the_vae_is_part_of_the_hash(dirs, tmp_path):
    edm2_dir(tmp_path / "same", EDM2_CONFIGS["latents"])
    first = load_diffusion(dirs["latents"], "cpu").sha256
    assert load_diffusion(str(tmp_path / "same"), "cpu").sha256 == first
    config = tmp_path / "same" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert load_diffusion(str(tmp_path / "same"), "cpu").sha256 != first
