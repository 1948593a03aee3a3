"""Public diffusion models: a diffusers DDPM, a DiT pipeline, an NVlabs pickle, opened and used.

Random weights in the exact configurations and files; the sampling equations are checked against
diffusers' DDIM scheduler. Alone: python -m pytest tests/teachers/test_teachers.py
"""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import DIGITS

import extract_features
import generate_synthetic
from common import UserError
from generate_synthetic import check_generates
from published.datasets import DATASETS
from teachers import edm
from teachers.dit import DiT
from teachers.load import load_diffusion

CIFAR10 = DATASETS["cifar10"]

# google/ddpm-cifar10-32, as its config.json has it.
DDPM_CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
SMALL_DDPM = DDPM_CIFAR10 | {"block_out_channels": [16, 16, 16, 16], "norm_num_groups": 8}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}


@pytest.fixture(scope="module")
def ddpm_dir(tmp_path_factory):
    """Network and scheduler in one folder, as in google/ddpm-cifar10-32."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ddpm")
    diffusers.UNet2DModel(**SMALL_DDPM).save_pretrained(path)
    diffusers.DDPMScheduler(**LINEAR, variance_type="fixed_large").save_pretrained(path)
    return str(path)


@pytest.fixture(params=["ddpm", "dit"])
def model(request):
    """A DDPM and a DiT, one after the other."""
    return load_diffusion(request.getfixturevalue(f"{request.param}_dir"), "cpu")


def test_a_network_in_bf16_gives_nearly_the_same(request):
    """Features, denoised images, and images through a VAE, all of them float32 as before."""
    for name in ("ddpm_dir", "dit_dir", "diffusion_dir"):
        path = request.getfixturevalue(name)
        exact, rounded = (load_diffusion(path, "cpu", precision) for precision in ("fp32", "bf16"))
        assert {p.dtype for m in rounded.modules for p in m.parameters()} == {torch.bfloat16}
        generator = torch.Generator().manual_seed(0)
        shape = (4, exact.channels, exact.image_size, exact.image_size)
        x = torch.rand(shape, generator=generator)
        noise = torch.randn(4, *exact.noise_shape, generator=generator)
        sigma = exact.default_sigma
        pairs = []
        for model in (exact, rounded):
            with torch.no_grad():
                (features,) = model.features(x, sigma, None, [model.default_block], noise)
                denoised = model.denoise(noise, 1.0)
                pairs.append((features, denoised, model.decode(model.encode(x))))
        for found, expected in zip(*pairs):
            assert found.dtype == expected.dtype == torch.float32
            assert (found - expected).norm() < 0.05 * expected.norm()


# ------------------------------------------------------------------------ what the networks compute


def test_ddpm_cifar10_is_read_as_published(tmp_path):
    net = diffusers.UNet2DModel(**DDPM_CIFAR10)
    pipeline = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**LINEAR))
    pipeline.save_pretrained(tmp_path)  # unet/ and scheduler/
    model = load_diffusion(str(tmp_path), "cpu")
    assert sum(p.numel() for p in model.net.parameters()) == 35_746_307
    assert (model.num_classes, model.image_size, model.noise_shape) == (0, 32, (3, 32, 32))
    # The 6th decoder resnet from the bottleneck.
    assert model.default_block == "up_blocks.1.resnets.2"
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert model.default_sigma == pytest.approx(((1 - abar[11]) / abar[11]).sqrt().item(), rel=1e-4)
    x, noise = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    (features,) = model.features(x, model.default_sigma, None, [model.default_block], noise)
    assert features.shape == (1, 256) and features.isfinite().all()


def test_denoising_follows_diffusers_ddim(model):
    """Euler's method in sigma with our denoiser is DDIM: the same latents, step by step."""
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False)
    scheduler.set_timesteps(8)
    labels = torch.tensor([7, 999]) if model.num_classes else None
    x_t = torch.randn(2, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    sigmas = [model.levels[t].item() for t in scheduler.timesteps] + [0.0]
    noisy = x_t * (1 + sigmas[0] ** 2) ** 0.5
    with torch.no_grad():
        for t, sigma, next_sigma in zip(scheduler.timesteps, sigmas, sigmas[1:]):
            predicted = model.net(x_t, t.expand(2), class_labels=labels).sample[:, : x_t.shape[1]]
            step = scheduler.step(predicted, t, x_t)
            denoised = model.denoise(noisy, sigma, labels)
            assert torch.allclose(denoised, step.pred_original_sample, rtol=1e-3, atol=1e-3)
            noisy = denoised + next_sigma * (noisy - denoised) / sigma
            x_t = step.prev_sample
            expected = step.pred_original_sample if next_sigma == 0 else x_t
            scaled = noisy / (1 + next_sigma**2) ** 0.5
            assert torch.allclose(scaled, expected, rtol=1e-3, atol=1e-3)


def test_a_noise_level_between_two_steps_takes_the_nearer_one(ddpm_dir):
    model = load_diffusion(ddpm_dir, "cpu")
    asked = []
    model.net.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    sigmas = torch.tensor([1e-9, model.levels[500].item() * 1.001, 1e9])
    with torch.no_grad():
        model.denoise(torch.zeros(3, 3, 32, 32), sigmas)
    assert asked[0].tolist() == [0, 500, 999]


def test_features_are_means_of_the_block_and_the_rest_is_not_run(model):
    x = torch.rand(2, 3, model.image_size, model.image_size)
    noise = torch.randn(2, *model.noise_shape)
    is_dit = isinstance(model, DiT)
    ran = []
    outputs = {}
    for name in model.blocks:

        def hook(module, inputs, output, name=name):
            ran.append(name)
            outputs[name] = output

        model.net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        clean = 2 * x - 1
        if is_dit:
            clean = model.vae.encode(clean).latent_dist.mode() * 0.18215
        model.denoise(clean + 0.3 * noise, 0.3)
        assert ran == model.blocks  # they are listed in the order in which they run
        expected = {name: o.mean(1 if is_dit else (2, 3)) for name, o in outputs.items()}
        for name in (model.default_block, model.blocks[-1], model.blocks[0]):
            ran.clear()
            (feature,) = model.features(x, 0.3, None, [name], noise)
            assert torch.equal(feature, expected[name])
            assert ran[-1] == name and len(ran) == model.blocks.index(name) + 1


def test_dit_has_its_names_and_null_label(dit_dir):
    with torch.device("meta"):
        xl = diffusers.DiTTransformer2DModel()  # the defaults are DiT-XL/2-256's
        vae = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    model = DiT(xl, vae, torch.linspace(0.01, 150, 1000))
    assert (len(model.blocks), model.default_block) == (28, "transformer_blocks.13")
    assert (model.image_size, model.noise_shape, model.num_classes) == (256, (4, 32, 32), 1000)
    tiny = load_diffusion(dit_dir, "cpu")
    noisy = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        none = tiny.denoise(noisy, 1.0)
        assert torch.equal(none, tiny.denoise(noisy, 1.0, torch.tensor([1000, 1000])))
        assert not torch.allclose(none, tiny.denoise(noisy, 1.0, torch.tensor([3, 4])))


def test_images_of_another_size_are_resized(dit_dir):
    model = load_diffusion(dit_dir, "cpu")
    x, noise = torch.rand(1, 3, 56, 56), torch.randn(1, 4, 8, 8)
    resized = torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
    blocks = [model.default_block]
    (feature,) = model.features(x, 0.3, None, blocks, noise)
    (expected,) = model.features(resized, 0.3, None, blocks, noise)
    assert torch.equal(feature, expected)


def test_an_nvlabs_pickle_teaches_and_generates(nvlabs, tmp_path):
    torch.manual_seed(0)
    init = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 10,
        "model_type": "SongUNet",
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 2,
    }
    config = {"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": init}
    net = edm.build(config)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, config)))
    model = load_diffusion(str(nvlabs.path), "cpu")
    assert model.num_classes == 10
    assert (model.default_block, model.default_sigma) == ("dec.16x16_block1", 0.06)

    noisy = torch.randn(3, 3, 32, 32)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    y = torch.tensor([1, 9, 10])  # label 10 is none
    one_hot = torch.zeros(3, 10)
    one_hot[0, 1] = 1
    one_hot[1, 9] = 1
    net.eval()
    near = {"rtol": 1e-4, "atol": 1e-4}  # rounding, because the model is stored channels-last
    with torch.no_grad():
        labelled = model.denoise(noisy, sigma, y)
        unlabelled = model.denoise(noisy, sigma)
        assert torch.allclose(labelled, net(noisy, sigma, one_hot), **near)
        assert torch.allclose(unlabelled, net(noisy, sigma, None), **near)
    assert not torch.allclose(unlabelled, labelled, **near)
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    (features,) = model.features(x, 0.06, None, ["dec.16x16_block1"], noise)
    assert features.shape == (2, 32)

    converted = str(tmp_path / "converted")
    edm.main(edm.parse_args(["convert", str(nvlabs.path), converted]))
    again = load_diffusion(converted, "cpu")
    with torch.no_grad():
        assert torch.equal(labelled, again.denoise(noisy, sigma, y))
    argv = ["--dataset", "cifar10", "--diffusion", converted, "--guidance-scale", "2"]
    with pytest.raises(UserError, match="label dropout"):
        generate(argv, tmp_path / "x")


# ----------------------------------------------------------------------------------- use in scripts


def generate(argv, out):
    generate_synthetic.main(generate_synthetic.parse_args([*argv, "--out-dir", str(out)]))


def test_dit_generates_a_synthetic_set_of_larger_images(dit_dir, tmp_path):
    argv = ["--dataset", "imagenet", "--diffusion", dit_dir, "--guidance-scale", "2"]
    argv += ["--n-images", "6", "--n-steps", "2", "--batch-size", "3"]
    generate(argv, tmp_path / "set")
    images = np.load(tmp_path / "set" / "shard-00000-images.npy")
    labels = np.load(tmp_path / "set" / "shard-00000-labels.npy")
    assert images.shape == (6, 64, 64, 3) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.std() > 1 and (tmp_path / "set" / "samples.png").exists()


def test_noise_levels_that_the_network_does_not_know(ddpm_dir, dit_dir, tmp_path, capsys):
    """Features at them are refused; sampling leaves them out and says so."""
    model = load_diffusion(ddpm_dir, "cpu")
    # sqrt((1 - abar) / abar) at t = 0 and t = 999.
    assert model.sigma_range == pytest.approx((0.01, 157.4), rel=1e-3)
    model.check_places("t", ["mid_block"], [0.01, 1.0, 157.0])
    for sigma in (0.002, 200.0):
        with pytest.raises(UserError, match=f"t: noise level {sigma:g}, it knows 0.01 to 157.4"):
            model.check_places("t", ["mid_block"], [sigma])
    argv = ["--dataset", "imagenet", "--diffusion", dit_dir, "--n-images", "2", "--n-steps", "2"]
    generate(argv, tmp_path / "set")
    printed = capsys.readouterr().out
    assert "knows noise levels 0.01 to 157.4; sampling from 80 to 0.01" in printed
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["sampler"]["sigma_min"] == pytest.approx(0.01, rel=1e-3)


def test_extraction_by_a_ddpm(ddpm_dir, tmp_path, monkeypatch):
    """extract_features.py on CIFAR-sized images with a public kind of network."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12) % 10
    spec = dataclasses.replace(CIFAR10, read=lambda data_dir, train: (images, labels))
    monkeypatch.setitem(DATASETS, "cifar10", spec)
    argv = ["--dataset", "cifar10", "--val-size", "4", "--diffusion", ddpm_dir]
    argv += ["--blocks", "mid_block", "--sigmas", "0.1", "--out-dir", str(tmp_path / "f")]
    extract_features.main(extract_features.parse_args(argv))
    stored = np.load(tmp_path / "f" / "train-mid_block-sigma0.1.npy")
    assert stored.shape == (8, 1, 16) and np.isfinite(stored).all() and stored.std() > 0


# ------------------------------------------------------------------------------ what does not fit


def refusal(function, *args):
    with pytest.raises(UserError) as info:
        function(*args)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_what_a_network_cannot_do_is_said(ddpm_dir, tmp_path):
    model = load_diffusion(ddpm_dir, "cpu")
    model.check_teaches("t", CIFAR10, with_labels=False)
    said = refusal(check_generates, model, "g", CIFAR10, True)
    assert said == "g: trained without labels; --relabel takes those of a --classifier"
    check_generates(model, "g", CIFAR10, with_labels=False)
    said = refusal(check_generates, model, "g", DIGITS, False)
    assert said == "g: (pixels, channels, classes) = (32, 3, 0), digits has (8, 1, 10)"
    said = refusal(model.check_teaches, "t", CIFAR10, True)
    assert said == "t: a network of 0 classes, cifar10 has 10"
    said = refusal(model.check_teaches, "t", DIGITS, False)
    assert said == "t: images of 3 channels, digits has 1"
    said = refusal(model.check_places, "t", ["mid_block", "mid"], [])
    assert said.startswith("t: no block 'mid'; its blocks are down_blocks.0.resnets.0")

    diffusers.UNet2DModel(**SMALL_DDPM, num_class_embeds=10).save_pretrained(tmp_path)
    diffusers.DDPMScheduler(**LINEAR).save_pretrained(tmp_path)
    conditional = load_diffusion(str(tmp_path), "cpu")
    check_generates(conditional, "g", CIFAR10, with_labels=True)
    conditional.check_teaches("t", CIFAR10, with_labels=True)
    assert "without a null label" in refusal(conditional.check_teaches, "t", CIFAR10, False)


def broken(path, tmp_path, change):
    """The refusal of a copy of a directory after change(copy)."""
    copy = shutil.copytree(path, tmp_path / "copy")
    change(copy)
    said = refusal(load_diffusion, str(copy), "cpu")
    assert str(copy) in said
    return said


def test_broken_ddpms_are_one_line(ddpm_dir, tmp_path):
    def predicts_flow(copy):
        path = copy / "scheduler_config.json"
        path.write_text(path.read_text().replace('"epsilon"', '"flow_prediction"'))

    def other_class(copy):
        path = copy / "config.json"
        path.write_text(path.read_text().replace('"UNet2DModel"', '"UNet1DModel"'))

    def no_scheduler(copy):
        (copy / "scheduler_config.json").unlink()

    assert "flow_prediction" in broken(ddpm_dir, tmp_path / "1", predicts_flow)
    assert "UNet1DModel" in broken(ddpm_dir, tmp_path / "2", other_class)
    assert "sigma_data" in broken(ddpm_dir, tmp_path / "3", no_scheduler)


def test_broken_dits_are_one_line(dit_dir, tmp_path):
    def cut_weights(copy):
        path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def no_vae(copy):
        shutil.rmtree(copy / "vae")

    def no_scheduler(copy):
        shutil.rmtree(copy / "scheduler")

    assert "vae" in broken(dit_dir, tmp_path / "1", no_vae)
    assert "scheduler_config.json" in broken(dit_dir, tmp_path / "2", no_scheduler)
    broken(dit_dir, tmp_path / "3", cut_weights)


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_old_bin_weights_are_read_without_running_them(ddpm_dir, tmp_path):
    """Repositories that have no safetensors: .bin files, read weights-only."""
    model = load_diffusion(ddpm_dir, "cpu")
    folder = tmp_path / "old"
    net = diffusers.UNet2DModel.from_pretrained(ddpm_dir)
    net.save_pretrained(folder, safe_serialization=False)
    shutil.copy(f"{ddpm_dir}/scheduler_config.json", folder)
    old = load_diffusion(str(folder), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), old.net.parameters()))
    marker = tmp_path / "ran"
    with open(folder / "diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump(Hostile(marker), file)
    assert str(folder) in refusal(load_diffusion, str(folder), "cpu")
    assert not marker.exists()


# ----------------------------------------------------------------------------- names and identities


def test_hub_names(ddpm_dir, monkeypatch):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return ddpm_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_diffusion("hub:google/ddpm-cifar10-32", "cpu")
    assert asked == [("google/ddpm-cifar10-32", ["*.json", "*.safetensors"])]
    assert model.image_size == 32

    def unreachable(**kwargs):
        raise OSError("We couldn't connect to the hub\nmore words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = refusal(load_diffusion, "hub:google/ddpm-cifar10-32", "cpu")
    reason = "We couldn't connect to the hub"
    assert said == f"hub:google/ddpm-cifar10-32: could not be fetched ({reason})"
    said = refusal(load_diffusion, "google/ddpm-cifar10-32", "cpu")
    assert "is written hub:google/ddpm-cifar10-32" in said


def test_old_hub_repositories_are_fetched_with_their_bin_files(tmp_path, ddpm_dir, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text("{}")

    def snapshot_download(repo_id, allow_patterns):
        asked.append(allow_patterns)
        return ddpm_dir if "*.bin" in allow_patterns else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_diffusion("hub:a/b", "cpu")
    assert asked[1:] == [["*.json", "*.safetensors", "*.bin"]]


def test_sha256_is_of_the_content_and_not_of_the_place(dit_dir, tmp_path):
    def sha256_of(path):
        return load_diffusion(str(path), "cpu").sha256

    expected = sha256_of(dit_dir)
    assert len(expected) == 64
    copy = shutil.copytree(dit_dir, tmp_path / "copy")
    for name in ("README.md", "args.json", "best.safetensors", "unused.bin"):
        (copy / name).write_text("not read")
    assert sha256_of(copy) == expected

    linked = tmp_path / "linked"  # folders and files behind links
    linked.mkdir()
    for name in os.listdir(copy):
        (linked / name).symlink_to(copy / name)
    assert sha256_of(linked) == expected

    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        path = copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b" " + whole[-1:])
        if path.suffix == ".safetensors":
            flipped = bytearray(whole)
            flipped[-1] ^= 1
            path.write_bytes(flipped)
        assert sha256_of(copy) != expected
        assert sha256_of(linked) == sha256_of(copy)
        path.write_bytes(whole)
    assert sha256_of(copy) == expected


def test_sha256_covers_weights_that_an_index_names(ddpm_dir, tmp_path):
    """diffusers reads the files that the index names, whatever they are called."""
    copy = Path(shutil.copytree(ddpm_dir, tmp_path / "copy"))
    whole = next(copy.rglob("diffusion_pytorch_model.safetensors"))
    tensors = safetensors.torch.load_file(whole)
    whole.rename(whole.with_name("part-00001-of-00001.safetensors"))
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(tensors, "part-00001-of-00001.safetensors"),
    }
    path = whole.with_name("diffusion_pytorch_model.safetensors.index.json")
    path.write_text(json.dumps(index))
    before = load_diffusion(str(copy), "cpu").sha256
    tensors["conv_in.bias"] += 1
    safetensors.torch.save_file(
        tensors, whole.with_name("part-00001-of-00001.safetensors"), {"format": "pt"}
    )
    assert load_diffusion(str(copy), "cpu").sha256 != before


@pytest.mark.parametrize("change", [{"beta_end": 2.0}, {"num_train_timesteps": 10**11}])
def test_a_schedule_that_cannot_be_is_one_line(change, ddpm_dir, tmp_path):
    copy = Path(shutil.copytree(ddpm_dir, tmp_path / "copy"))
    path = next(copy.rglob("scheduler_config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="scheduler_config.json: "):
        load_diffusion(str(copy), "cpu")


def test_sha256_of_a_pickle_is_that_of_the_file(nvlabs, tmp_path):
    init = {
        "img_resolution": 8,
        "img_channels": 1,
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    config = {"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": init}
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(edm.build(config), config)))
    moved = shutil.copy(nvlabs.path, tmp_path / "moved.pkl")
    model, other = load_diffusion(str(nvlabs.path), "cpu"), load_diffusion(str(moved), "cpu")
    assert model.sha256 == other.sha256 and len(model.sha256) == 64
