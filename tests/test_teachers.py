"""Public diffusion models: a diffusers DDPM, a DiT pipeline, an NVlabs pickle. Alone: python -m pytest tests/test_teachers.py

Random weights in the exact configurations and files; the sampling equations are checked against diffusers' DDIM scheduler.
"""

import dataclasses
import json
import os
import pickle
import shutil

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import DIGITS

import extract_features
import generate_synthetic
from common import cli, data, diffusion, edm

# google/ddpm-cifar10-32, as its config.json has it.
DDPM_CIFAR10 = dict(
    sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=[128, 256, 256, 256],
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=32,
)  # fmt: skip
LINEAR = dict(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
SMALL = DDPM_CIFAR10 | dict(block_out_channels=[16, 16, 16, 16], norm_num_groups=8)
CIFAR10 = data.DATASETS["cifar10"]


@pytest.fixture(scope="module")
def ddpm_dir(tmp_path_factory):
    """Network and scheduler in one folder, as in google/ddpm-cifar10-32."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ddpm")
    diffusers.UNet2DModel(**SMALL).save_pretrained(path)
    diffusers.DDPMScheduler(**LINEAR, variance_type="fixed_large").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def dit_dir(tmp_path_factory):
    """facebook/DiT-XL-2-256's kind, tiny: 4 blocks, 64 pixels, 8 x 8 latents."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(2, 8, 4, 8, num_layers=4, sample_size=8, patch_size=2, num_embeds_ada_norm=1000)
    for p in net.parameters():  # diffusers starts the last layers with zeros
        torch.nn.init.normal_(p, std=0.2)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    vae = diffusers.AutoencoderKL(block_out_channels=[8, 8, 8, 8], norm_num_groups=4, sample_size=64, scaling_factor=0.18215, **blocks)
    path = tmp_path_factory.mktemp("dit")
    diffusers.DiTPipeline(net, vae, diffusers.DDIMScheduler(**LINEAR, clip_sample=False)).save_pretrained(path)
    return str(path)


def test_ddpm_cifar10_is_read_as_published(tmp_path):
    net = diffusers.UNet2DModel(**DDPM_CIFAR10)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**LINEAR)).save_pretrained(tmp_path)  # unet/ and scheduler/
    model = diffusion.load_diffusion(str(tmp_path), "cpu")
    assert sum(p.numel() for p in model.net.parameters()) == 35_746_307
    assert (model.num_classes, model.image_size, model.noise_shape) == (0, 32, (3, 32, 32))
    assert model.default_block == "up_blocks.1.resnets.2"  # the 6th decoder resnet from the bottleneck
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert model.default_sigma == pytest.approx(((1 - abar[11]) / abar[11]).sqrt().item(), rel=1e-4)
    features = model.features(torch.rand(1, 3, 32, 32), model.default_sigma, None, [model.default_block], torch.randn(1, 3, 32, 32))
    assert features[0].shape == (1, 256) and features[0].isfinite().all()


@pytest.mark.parametrize("kind", ["ddpm", "dit"])
def test_denoising_follows_diffusers_ddim(kind, ddpm_dir, dit_dir):
    """Euler's method in sigma with our denoiser is DDIM: same latents as diffusers' scheduler, step by step."""
    model = diffusion.load_diffusion(ddpm_dir if kind == "ddpm" else dit_dir, "cpu")
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False)
    scheduler.set_timesteps(8)
    labels = torch.tensor([7, 999]) if kind == "dit" else None
    x_t = torch.randn(2, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    sigmas = [model.levels[t].item() for t in scheduler.timesteps] + [0.0]
    noisy = x_t * (1 + sigmas[0] ** 2) ** 0.5
    with torch.no_grad():
        for t, sigma, following in zip(scheduler.timesteps, sigmas, sigmas[1:]):
            eps = model.net(x_t, t.expand(2), class_labels=labels).sample[:, : x_t.shape[1]]
            step = scheduler.step(eps, t, x_t)
            denoised = model.denoise(noisy, sigma, labels)
            if following == 0:
                expected = step.pred_original_sample
            else:
                expected = step.prev_sample
            assert torch.allclose(denoised, step.pred_original_sample, rtol=1e-3, atol=1e-3)
            noisy = denoised + following * (noisy - denoised) / sigma
            x_t = step.prev_sample
            scaled = noisy / (1 + following**2) ** 0.5
            assert torch.allclose(scaled, expected, rtol=1e-3, atol=1e-3)


def test_a_noise_level_between_two_steps_takes_the_nearer_one(ddpm_dir):
    model = diffusion.load_diffusion(ddpm_dir, "cpu")
    asked = []
    model.net.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    with torch.no_grad():
        model.denoise(torch.zeros(3, 3, 32, 32), torch.tensor([1e-9, model.levels[500].item() * 1.001, 1e9]))
    assert asked[0].tolist() == [0, 500, 999]


@pytest.mark.parametrize("kind", ["ddpm", "dit"])
def test_features_are_means_of_the_block_and_the_rest_is_not_run(kind, ddpm_dir, dit_dir):
    model = diffusion.load_diffusion(ddpm_dir if kind == "ddpm" else dit_dir, "cpu")
    x, noise = torch.rand(2, 3, model.image_size, model.image_size), torch.randn(2, *model.noise_shape)
    ran, whole = [], {}
    for name in model.blocks:
        hook = lambda module, inputs, output, name=name: (ran.append(name), whole.update({name: output}))[0]  # noqa: E731
        model.net.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        clean = 2 * x - 1 if kind == "ddpm" else model.vae.encode(2 * x - 1).latent_dist.mode() * 0.18215
        model.denoise(clean + 0.3 * noise, 0.3)
        assert ran == model.blocks  # they are listed in the order in which they run
        expected = {n: o.mean((2, 3)) if kind == "ddpm" else o.mean(1) for n, o in whole.items()}
        for name in (model.default_block, model.blocks[-1], model.blocks[0]):
            ran.clear()
            (feature,) = model.features(x, 0.3, None, [name], noise)
            assert torch.equal(feature, expected[name]) and ran[-1] == name and len(ran) == model.blocks.index(name) + 1


def test_dit_has_its_names_and_null_label(dit_dir):
    with torch.device("meta"):
        xl = diffusers.DiTTransformer2DModel()  # the defaults are DiT-XL/2-256's
        vae = diffusers.AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    model = diffusion.DiT(xl, vae, torch.linspace(0.01, 150, 1000))
    assert (len(model.blocks), model.default_block) == (28, "transformer_blocks.13")
    assert (model.image_size, model.noise_shape, model.num_classes) == (256, (4, 32, 32), 1000)
    tiny = diffusion.load_diffusion(dit_dir, "cpu")
    noisy = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        none = tiny.denoise(noisy, 1.0)
        assert torch.equal(none, tiny.denoise(noisy, 1.0, torch.tensor([1000, 1000])))
        assert not torch.allclose(none, tiny.denoise(noisy, 1.0, torch.tensor([3, 4])))


def test_images_of_another_size_are_resized(dit_dir):
    model = diffusion.load_diffusion(dit_dir, "cpu")
    x, noise = torch.rand(1, 3, 56, 56), torch.randn(1, 4, 8, 8)
    resized = torch.nn.functional.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
    a, b = (model.features(images, 0.3, None, [model.default_block], noise)[0] for images in (x, resized))
    assert torch.equal(a, b)


def test_dit_generates_a_synthetic_set_of_larger_images(dit_dir, tmp_path):
    argv = [
        "--dataset",
        "imagenet",
        "--diffusion",
        dit_dir,
        "--n-images",
        "6",
        "--n-steps",
        "2",
        "--batch-size",
        "3",
        "--guidance-scale",
        "2",
    ]
    generate_synthetic.main(generate_synthetic.parse_args([*argv, "--out-dir", str(tmp_path / "set")]))
    images, labels = np.load(tmp_path / "set" / "shard-00000-images.npy"), np.load(tmp_path / "set" / "shard-00000-labels.npy")
    assert images.shape == (6, 64, 64, 3) and labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.std() > 1 and (tmp_path / "set" / "samples.png").exists()


def test_an_nvlabs_pickle_teaches_and_generates(nvlabs, tmp_path):
    torch.manual_seed(0)
    init = dict(
        img_resolution=32, img_channels=3, label_dim=10, model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=2
    )
    config = {"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": init}
    net, path = edm.build(config), nvlabs.path
    path.write_bytes(pickle.dumps(nvlabs.content(net, config)))
    model = diffusion.load_diffusion(str(path), "cpu")
    assert (model.num_classes, model.default_block, model.default_sigma) == (10, "dec.16x16_block1", 0.06)
    noisy, sigma, y = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1, 9, 10])
    one_hot = torch.zeros(3, 10)
    one_hot[0, 1] = one_hot[1, 9] = 1  # label 10 is none
    with torch.no_grad():
        # To rounding: the model is stored channels-last.
        assert torch.allclose(model.denoise(noisy, sigma, y), net.eval()(noisy, sigma, one_hot), rtol=1e-4, atol=1e-4)
        assert torch.allclose(model.denoise(noisy, sigma), net(noisy, sigma, None), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.denoise(noisy, sigma), model.denoise(noisy, sigma, y), rtol=1e-4, atol=1e-4)
    features = model.features(torch.rand(2, 3, 32, 32), 0.06, None, ["dec.16x16_block1"], torch.randn(2, 3, 32, 32))
    assert features[0].shape == (2, 32)
    edm.main(edm.parse_args(["convert", str(path), str(tmp_path / "converted")]))
    again = diffusion.load_diffusion(str(tmp_path / "converted"), "cpu")
    with torch.no_grad():
        assert torch.equal(model.denoise(noisy, sigma, y), again.denoise(noisy, sigma, y))
    with pytest.raises(cli.UserError, match="label dropout"):
        run = [
            "--dataset",
            "cifar10",
            "--diffusion",
            str(tmp_path / "converted"),
            "--guidance-scale",
            "2",
            "--out-dir",
            str(tmp_path / "x"),
        ]
        generate_synthetic.main(generate_synthetic.parse_args(run))


def test_what_a_network_cannot_do_is_said(ddpm_dir, tmp_path):
    model = diffusion.load_diffusion(ddpm_dir, "cpu")
    model.check_teaches("t", CIFAR10, with_labels=False)
    for check, words in (
        (lambda: model.check_generates("g", CIFAR10), "g: (pixels, channels, classes) = (32, 3, 0)"),
        (lambda: model.check_teaches("t", CIFAR10, with_labels=True), "0 classes"),
        (lambda: model.check_teaches("t", DIGITS, with_labels=False), "3 channels"),
    ):
        with pytest.raises(cli.UserError) as error:
            check()
        assert words in str(error.value)
    diffusers.UNet2DModel(**SMALL, num_class_embeds=10).save_pretrained(tmp_path)
    diffusers.DDPMScheduler(**LINEAR).save_pretrained(tmp_path)
    conditional = diffusion.load_diffusion(str(tmp_path), "cpu")
    conditional.check_generates("g", CIFAR10)
    conditional.check_teaches("t", CIFAR10, with_labels=True)
    with pytest.raises(cli.UserError, match="without a null label"):
        conditional.check_teaches("t", CIFAR10, with_labels=False)


def test_noise_levels_outside_of_the_networks_are_refused_or_left_out(ddpm_dir, dit_dir, tmp_path, capsys):
    model = diffusion.load_diffusion(ddpm_dir, "cpu")
    assert model.sigma_range == pytest.approx((0.01, 157.4), rel=1e-3)  # sqrt((1 - abar) / abar) at t = 0 and t = 999
    model.check_sigmas([0.01, 1.0, 157.0])
    for sigma in (0.002, 200.0):
        with pytest.raises(cli.UserError, match="the network knows 0.01 to 157.4"):
            model.check_sigmas([sigma])
    argv = ["--dataset", "imagenet", "--diffusion", dit_dir, "--n-images", "2", "--n-steps", "2", "--out-dir", str(tmp_path / "set")]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    assert "knows noise levels 0.01 to 157.4; sampling from 80 to 0.01000" in capsys.readouterr().out
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["sampler"]["sigma_min"] == pytest.approx(0.01, rel=1e-3)


def broken(path, tmp_path, change):
    copy = shutil.copytree(path, tmp_path / "copy")
    change(copy)
    with pytest.raises(cli.UserError) as error:
        diffusion.load_diffusion(str(copy), "cpu")
    assert "copy" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_broken_directories_are_one_line(ddpm_dir, dit_dir, tmp_path):
    def predicts_v(copy):
        path = copy / "scheduler_config.json"
        path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))

    def other_class(copy):
        path = copy / "config.json"
        path.write_text(path.read_text().replace('"UNet2DModel"', '"UNet1DModel"'))

    assert "v_prediction" in broken(ddpm_dir, tmp_path / "1", predicts_v)
    assert "UNet1DModel" in broken(ddpm_dir, tmp_path / "2", other_class)
    assert "sigma_data" in broken(ddpm_dir, tmp_path / "3", lambda copy: (copy / "scheduler_config.json").unlink())
    assert "vae" in broken(dit_dir, tmp_path / "4", lambda copy: shutil.rmtree(copy / "vae"))
    assert "scheduler_config.json" in broken(dit_dir, tmp_path / "5", lambda copy: shutil.rmtree(copy / "scheduler"))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    broken(dit_dir, tmp_path / "6", lambda copy: (copy / weights).write_bytes((copy / weights).read_bytes()[:-100]))


class Hostile:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_old_bin_weights_are_read_without_running_them(ddpm_dir, tmp_path):
    """Repositories that have no safetensors: .bin files, read weights-only."""
    model = diffusion.load_diffusion(ddpm_dir, "cpu")
    folder = tmp_path / "old"
    diffusers.UNet2DModel.from_pretrained(ddpm_dir).save_pretrained(folder, safe_serialization=False)
    shutil.copy(f"{ddpm_dir}/scheduler_config.json", folder)
    old = diffusion.load_diffusion(str(folder), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.net.parameters(), old.net.parameters()))
    marker = tmp_path / "ran"
    with open(folder / "diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump(Hostile(marker), file)
    with pytest.raises(cli.UserError, match="old: not a readable diffusion model"):
        diffusion.load_diffusion(str(folder), "cpu")
    assert not marker.exists()


def test_hub_names(ddpm_dir, monkeypatch):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return ddpm_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = diffusion.load_diffusion("hub:google/ddpm-cifar10-32", "cpu")
    assert asked == [("google/ddpm-cifar10-32", ["*.json", "*.safetensors"])] and model.image_size == 32

    def unreachable(**kwargs):
        raise OSError("We couldn't connect to the hub\nmore words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(cli.UserError, match=r"^hub:google/ddpm-cifar10-32: could not be fetched \(We couldn't connect to the hub\)$"):
        diffusion.load_diffusion("hub:google/ddpm-cifar10-32", "cpu")
    with pytest.raises(cli.UserError, match="is written hub:google/ddpm-cifar10-32"):
        diffusion.load_diffusion("google/ddpm-cifar10-32", "cpu")


def test_extraction_by_a_ddpm(ddpm_dir, tmp_path, monkeypatch):
    """extract_features.py on CIFAR-sized images with a public kind of network: one file per block and noise level."""
    rng = np.random.default_rng(0)
    made = {train: (rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 10) for train in (True, False)}
    spec = dataclasses.replace(CIFAR10, read=lambda data_dir, train: made[train])
    monkeypatch.setitem(data.DATASETS, "cifar10", spec)
    argv = ["--dataset", "cifar10", "--val-size", "4", "--diffusion", ddpm_dir, "--blocks", "mid_block", "--sigmas", "0.1"]
    extract_features.main(extract_features.parse_args([*argv, "--out-dir", str(tmp_path / "f")]))
    stored = np.load(tmp_path / "f" / "train-mid_block-sigma0.1.npy")
    assert stored.shape == (8, 1, 16) and np.isfinite(stored).all() and stored.std() > 0
