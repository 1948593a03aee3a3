"""generate_synthetic.py: guidance, by the network itself and by another one, what a sample depends
on, and the check for memorised images.

Alone: python -m pytest tests/test_generate_synthetic.py
"""

import json

import numpy as np
import pytest
import torch
from diffusers_helper import tiny_ddpm, tiny_unet
from edm2_helper import EDM2_CONFIGS, edm2_config, edm2_dir

import generate_synthetic
import train_at
from common import UserError, data, files
from common.diffusion import Diffusion
from published import memorisation, set_recipe
from published.datasets import DATASETS
from published.synthetic_set import open_shards
from published.weights import load_classifier
from teachers import sampling
from teachers.load import load_diffusion


def test_guidance_extrapolates_from_the_unconditional_denoiser(diffusion_dir):
    model = load_diffusion(diffusion_dir, "cpu")
    model.net.double()
    y = torch.tensor([0, 1, 2])
    noisy = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        conditional = model.denoise(noisy, 0.7, y)
        unconditional = model.denoise(noisy, 0.7)
        for scale in (1, 2.5, 0):
            guided = generate_synthetic.guided(model, y, scale)(noisy, 0.7)
            expected = unconditional + scale * (conditional - unconditional)
            assert torch.allclose(guided, expected, atol=1e-10)


class Gaussian:
    """The exact denoiser of classes that are normal, each around a mean of its own.

    means: (classes, C, 1, 1). As an unconditional one it has a single mean.
    """

    def __init__(self, means, std, num_classes):
        self.means = means
        self.std = std
        self.num_classes = num_classes

    def denoise(self, noisy, sigma, y=None):
        mean = self.means[0] if y is None else self.means[y]
        return (self.std**2 * noisy + sigma**2 * mean) / (self.std**2 + sigma**2)


@pytest.mark.parametrize("guide_classes", [3, 0])
def test_autoguidance_is_its_formula(guide_classes):
    """D_guide + w (D - D_guide) of known denoisers, in float64, and what is sampled with it."""
    means = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    model = Gaussian(means, 0.3, 3)
    guide_means = means + 0.2 if guide_classes else means.mean(0, keepdim=True)
    guide = Gaussian(guide_means, 0.5, guide_classes)
    y = torch.tensor([0, 1, 2, 1])
    noisy = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    own_mean = guide_means[y] if guide_classes else guide_means
    for sigma in (0.01, 0.7, 40.0):
        by_model = (0.3**2 * noisy + sigma**2 * means[y]) / (0.3**2 + sigma**2)
        by_guide = (0.5**2 * noisy + sigma**2 * own_mean) / (0.5**2 + sigma**2)
        for w in (1, 2.1, 0):
            found = generate_synthetic.guided(model, y, w, guide)(noisy, sigma)
            expected = by_guide + w * (by_model - by_guide)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    # With one deviation for both, D_w is the denoiser of the means' extrapolation.
    guide.std = 0.3
    extrapolated = Gaussian(own_mean + 2.1 * (means[y] - own_mean), 0.3, 4)
    sigmas = sampling.sigma_steps(8, 0.002, 80.0, 7.0)
    found = sampling.heun(generate_synthetic.guided(model, y, 2.1, guide), noisy, sigmas)
    each = torch.arange(4)
    expected = sampling.heun(lambda x, s: extrapolated.denoise(x, s, each), noisy, sigmas)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def generate(out, *argv):
    """Run the script for four digits; returns (images, manifest)."""
    argv = [*"--n-images 4 --n-steps 3 --out-dir".split(), str(out), *map(str, argv)]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    images = np.load(out / "shard-00000-images.npy").astype(int)
    return images, json.loads((out / "manifest.json").read_text())


def test_a_guide_is_part_of_the_set(diffusion_dir, tmp_path):
    """Its hash and held-out images stand in the manifest, and it needs no label dropout."""
    config = edm2_config(
        img_resolution=8, img_channels=1, label_dim=10, model_channels=8, channel_mult=[1, 2]
    )
    main = edm2_dir(tmp_path / "main", config)
    guide = edm2_dir(tmp_path / "guide", config, seed=1)
    uncond = edm2_dir(tmp_path / "uncond", config | {"init": config["init"] | {"label_dim": 0}})
    plain, manifest = generate(tmp_path / "0", "--diffusion", main)
    assert "guide_sha256" not in manifest
    made = [plain]
    for name in (guide, uncond, main, diffusion_dir):
        out = tmp_path / str(len(made))
        argv = ["--diffusion", main, "--guidance-scale", "2", "--guide", name]
        images, manifest = generate(out, *argv)
        assert manifest["guide_sha256"] == load_diffusion(name, "cpu").sha256
        assert manifest["sampler"]["guidance_scale"] == 2 and manifest["held_out"] == 0
        made.append(images)
    assert np.abs(made[3] - plain).max() <= 1  # guided by itself
    for images in (made[1], made[2], made[4]):
        assert np.abs(images - plain).mean() > 1
    with pytest.raises(UserError, match="guide_sha256"):
        generate(tmp_path / "1", *argv)


def test_no_noise_level_that_the_network_knows(diffusion_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Diffusion, "sigma_range", (0.02, 80.0))
    with pytest.raises(UserError, match="the networks know no noise level of 0.002 to 0.01"):
        generate(tmp_path / "out", "--diffusion", diffusion_dir, "--sigma-max", "0.01")


def test_decoded_images_that_are_not_finite_are_refused(diffusion_dir):
    """As bytes they would be black images with a label."""
    model = load_diffusion(diffusion_dir, "cpu")
    model.decode = lambda clean: clean * torch.nan
    args = generate_synthetic.parse_args(["--n-steps", "2"])
    with pytest.raises(UserError, match="samples not finite"):
        generate_synthetic.sample(model, np.arange(2), args)


def test_a_guide_bounds_what_is_asked_and_held_out(diffusion_dir):
    """Its noise levels, and the images that it has not seen, where they are fewer."""
    model, guide = load_diffusion(diffusion_dir, "cpu"), load_diffusion(diffusion_dir, "cpu")
    args = generate_synthetic.parse_args([])
    guide.sigma_range = (0.05, 40.0)
    guide.val_size = model.val_size - 1
    guide.sha256 = "of the guide"
    for pair in ((model, guide), (guide, model)):
        limits = generate_synthetic.sigma_limits(pair[0], args, pair[1])
        manifest = set_recipe.manifest_of(args, DATASETS["digits"], pair[0], limits, pair[1])
        assert limits == (0.05, 40.0) and manifest["held_out"] == guide.val_size


def test_guides_that_do_not_fit_are_one_line(diffusion_dir, dit_dir, tmp_path, capsys):
    def fails(words, guide, *argv):
        with pytest.raises(UserError) as info:
            generate(tmp_path / "out", "--guidance-scale", "2", "--guide", guide, *argv)
        message = str(info.value)
        assert message.startswith(f"{guide}: ") and "\n" not in message
        assert words in message, message
        assert not (tmp_path / "out").exists()

    own = ["--diffusion", diffusion_dir]
    sizes = edm2_dir(tmp_path / "sizes", EDM2_CONFIGS["pixels"])
    fails(f"(16, 3, 16, 16, 3), {diffusion_dir} has (8, 1, 8, 8, 10)", sizes, *own)
    tiny_ddpm(tmp_path / "classes", tiny_unet())
    fails(f"(8, 1, 8, 8, 3), {diffusion_dir} has (8, 1, 8, 8, 10)", tmp_path / "classes", *own)
    tiny_ddpm(tmp_path / "told", tiny_unet(num_class_embeds=10))
    with pytest.raises(UserError, match="--guide .*/told: a class-conditional network without"):
        relabel = ["--relabel", "--classifier", "x.pt"]
        own_guide = ["--guidance-scale", "2", "--guide", tmp_path / "told"]
        generate(tmp_path / "out", *own, *relabel, *own_guide)
    latents = edm2_config(
        "StabilityVAEEncoder", img_resolution=8, img_channels=4, label_dim=1000, model_channels=8
    )
    other = edm2_dir(tmp_path / "latents", latents)
    fails("its latents are not those", other, "--diffusion", dit_dir, "--dataset", "imagenet")
    with pytest.raises(SystemExit):
        generate_synthetic.parse_args([*own, "--guide", sizes])
    words = "--guide: does nothing here, it goes with a --guidance-scale other than 1"
    assert words in capsys.readouterr().err


def test_samples_depend_on_seed_and_id_and_on_nothing_else(diffusion_dir):
    model = load_diffusion(diffusion_dir, "cpu")

    def sample(ids, *argv):
        argv = ["--diffusion", diffusion_dir, "--n-steps", "4", *argv]
        args = generate_synthetic.parse_args(argv)
        return generate_synthetic.sample(model, np.array(ids), args)[0].astype(int)

    base = sample([3, 4, 13])
    assert np.abs(sample([4]) - base[1:2]).max() <= 1  # alone or in a batch, up to rounding
    assert (base[0] != base[2]).any()  # two images of one class
    assert (sample([3], "--seed", "1") != base[:1]).any()


def test_samples_are_those_of_the_sampler_under_all_flags(diffusion_dir):
    """Image i has the label i mod 10, which the network is told."""
    model = load_diffusion(diffusion_dir, "cpu")
    flags = "--n-steps 5 --rho 5 --sigma-min 0.01 --sigma-max 20 --guidance-scale 2 --seed 3"
    args = generate_synthetic.parse_args(["--diffusion", diffusion_dir, *flags.split()])
    ids = np.array([4, 13, 29])
    images, labels = generate_synthetic.sample(model, ids, args)
    assert labels.tolist() == [4, 3, 9]

    generators = data.id_streams(3, "generate", ids)
    y = torch.tensor([4, 3, 9])

    def denoise(noisy, sigma):
        plain = model.denoise(noisy, sigma)
        return plain + 2 * (model.denoise(noisy, sigma, y) - plain)

    noise = data.normal_of(generators, (1, 8, 8))
    ramp = torch.linspace(0, 1, 5, dtype=torch.float64)
    sigmas = (20 ** (1 / 5) + ramp * (0.01 ** (1 / 5) - 20 ** (1 / 5))) ** 5
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    with torch.no_grad():
        x = sampling.heun(denoise, noise, sigmas)
    expected = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1 and images.std() > 10


def test_the_classifier_of_a_selection_sees_images_of_its_size():
    """Images of 16 pixels are resized to the 8 of digits, all of a batch alike."""

    class Mean(torch.nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (1, 8, 8)
            return torch.nn.functional.pad(8 * x.mean((1, 2, 3))[:, None], (0, 9))

    images = np.stack([np.full((16, 16, 1), value, np.uint8) for value in (0, 102, 255)])
    found = generate_synthetic.probabilities(Mean(), images, DATASETS["digits"], "cpu", "fp32")
    for row, value in zip(found, (0.0, 0.4, 1.0)):
        assert row[0].item() == pytest.approx(np.exp(8 * value) / (np.exp(8 * value) + 9), rel=1e-4)


def test_memorisation_is_judged_by_the_images_trained_on(diffusion_dir, tmp_path, capsys):
    """Those after the held-out ones, and with --n-train or --imbalance fewer: those are farther."""
    spec = DATASETS["digits"]
    test_images, _ = data.load_test(spec, "data")
    means = []
    for n_train, imbalance in ((None, None), (50, None), (None, 20)):
        argv = ["--diffusion", diffusion_dir, "--n-images", "20", "--n-steps", "2"]
        out = tmp_path / f"{n_train}-{imbalance}"
        argv += ["--out-dir", str(out)]
        argv += ["--n-train", str(n_train)] if n_train else []
        argv += ["--imbalance", str(imbalance)] if imbalance else []
        generate_synthetic.main(generate_synthetic.parse_args(argv))
        (train, _), _ = data.load_train(spec, "data", 200, n_train, imbalance)
        mean = memorisation.two_nearest(test_images, train, "cpu")[:, 0].mean()
        assert f"test images {mean:.3f}, as of copies" in capsys.readouterr().out
        means.append(mean)
        labels = np.load(out / "shard-00000-labels.npy")
        assert np.bincount(labels).tolist() == [2] * 10  # whatever the training images are
    assert min(means[1:]) > means[0] + 0.1


def test_relabelled_images_have_the_label_that_a_classifier_predicts(
    diffusion_dir, tmp_path, capsys
):
    """The network is told none, and the classes may be out of balance; the best can be selected."""
    run = f"--epochs 1 --n-steps 1 --eval-n-steps 1 --out-dir {tmp_path}/at".split()
    train_at.main(train_at.parse_args(run))
    checkpoint = f"{tmp_path}/at/best.pt"
    flags = f"--diffusion {diffusion_dir} --n-images 30 --shard-size 20 --batch-size 10 --n-steps 2"
    argv = f"{flags} --classifier {checkpoint} --relabel --keep-fraction 0.5".split()
    argv += ["--out-dir", str(tmp_path / "set")]
    args = generate_synthetic.parse_args(argv)
    generate_synthetic.main(args)
    source = open_shards(str(tmp_path / "set"), DATASETS["digits"])
    images = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("set/*-images.npy"))])
    labels = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("set/*-labels.npy"))])

    classifier, _ = load_classifier(checkpoint, DATASETS["digits"], "cpu")
    probs = classifier.eval()(data.to_x(images)).softmax(1)
    assert np.array_equal(labels, probs.argmax(1).numpy())
    assert not np.array_equal(labels, np.arange(30) % 10)
    expected = generate_synthetic.select(probs.amax(1).detach().numpy(), labels, 0.5)
    assert np.array_equal(np.load(tmp_path / "set" / "selection.npy"), expected)
    assert source.manifest["labels_of_sha256"] == files.sha256(checkpoint)

    again = ["--out-dir", str(tmp_path / "set"), "--diffusion", diffusion_dir, "--verify", "1"]
    with pytest.raises(UserError, match="--classifier: the labels of the set are predictions"):
        generate_synthetic.main(generate_synthetic.parse_args(again))
    again += ["--classifier", checkpoint]
    generate_synthetic.main(generate_synthetic.parse_args(again))
    assert "labels  equal: 10" in capsys.readouterr().out
    generate_synthetic.main(
        generate_synthetic.parse_args(["--out-dir", str(tmp_path / "set"), "--export", "hub"])
    )
    card = (tmp_path / "set" / "README.md").read_text()
    assert f"predicted by the classifier SHA-256 `{files.sha256(checkpoint)}`" in card
    assert "--dataset digits --classifier CLASSIFIER --verify 0" in card

    model = load_diffusion(diffusion_dir, "cpu")
    noise = data.normal_of(data.id_streams(0, "generate", range(10)), (1, 8, 8))
    null = torch.full((10,), 10)

    def denoise(noisy, sigma):
        return model.denoise(noisy, sigma, null)

    with torch.no_grad():
        x = sampling.heun(denoise, noise, sampling.sigma_steps(2, 0.002, 80.0, 7.0))
    again = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images[:10], again)
