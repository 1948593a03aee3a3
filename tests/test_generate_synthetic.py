"""generate_synthetic.py: guidance, what a sample depends on, and the check for memorised images.

Alone: python -m pytest tests/test_generate_synthetic.py
"""

import numpy as np
import pytest
import torch

import generate_synthetic
from common import data
from published.datasets import DATASETS
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


def test_samples_depend_on_seed_id_and_churn_and_on_nothing_else(diffusion_dir):
    model = load_diffusion(diffusion_dir, "cpu")

    def sample(ids, *argv):
        argv = ["--diffusion", diffusion_dir, "--n-steps", "4", *argv]
        args = generate_synthetic.parse_args(argv)
        return generate_synthetic.sample(model, np.array(ids), args)[0].astype(int)

    base = sample([3, 4, 13])
    assert np.abs(sample([4]) - base[1:2]).max() <= 1  # alone or in a batch, up to rounding
    assert (base[0] != base[2]).any()  # two images of one class
    assert (sample([3], "--seed", "1") != base[:1]).any()
    churned = sample([3], "--s-churn", "20")
    assert (churned != base[:1]).any()
    assert (churned == sample([3], "--s-churn", "20")).all()
    assert (sample([3], "--s-churn", "20", "--s-noise", "1.5") != churned).any()
    # No noise level lies between 90 and 100.
    outside = sample([3], "--s-churn", "20", "--s-tmin", "90", "--s-tmax", "100")
    assert (outside == base[:1]).all()


def test_nearest_distances_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1100, 3, 3, 2), dtype=np.uint8)
    train = rng.integers(0, 256, (7, 3, 3, 2), dtype=np.uint8)
    train[2] = images[5]
    nearest = generate_synthetic.nearest_distances(images, train, "cpu")
    assert nearest.shape == (1100,) and nearest[5] < 2e-3
    for image, distance in zip(images[:50], nearest):
        differences = (image / 255.0 - train / 255.0).reshape(7, -1)
        slow = np.linalg.norm(differences, axis=1).min()
        assert distance.item() == pytest.approx(slow, abs=2e-3)


def test_memorisation_is_judged_by_the_images_trained_on(diffusion_dir, tmp_path, capsys):
    """Those after the held-out ones, and with --n-train only so many: fewer images are farther."""
    spec = DATASETS["digits"]
    test_images, _ = data.load_test(spec, "data")
    means = []
    for n_train in (None, 50):
        argv = ["--diffusion", diffusion_dir, "--n-images", "20", "--n-steps", "2"]
        argv += ["--val-size", "300", "--out-dir", str(tmp_path / str(n_train))]
        if n_train:
            argv += ["--n-train", str(n_train)]
        generate_synthetic.main(generate_synthetic.parse_args(argv))
        (train, _), _ = data.load_train(spec, "data", 300, n_train)
        mean = generate_synthetic.nearest_distances(test_images, train, "cpu").mean()
        assert f"test images {mean:.3f};" in capsys.readouterr().out
        means.append(mean)
    assert means[1] > means[0] + 0.1
