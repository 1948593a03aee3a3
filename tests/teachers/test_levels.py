"""Networks that know a ladder of noise levels alone are sampled on its levels.

Alone: python -m pytest tests/teachers/test_levels.py
"""

import numpy as np
import pytest
import torch
from diffusers_helper import tiny_ddpm
from edm_helper import EDM_CONFIGS, random_edm

import generate_synthetic
from teachers import edm, sampling
from teachers.load import load_diffusion


def test_iddpm_rounds_to_the_nearest_of_its_levels():
    model = edm.EDMNetwork(random_edm("iddpm"))
    levels = model.net.u.tolist()  # falling, the last is 0
    assert model.sigma_range == (levels[-2], levels[0])
    for higher, lower in zip(levels[:-1], levels[1:-1]):
        assert model.round_sigma(lower) == lower
        assert model.round_sigma(lower + 0.49 * (higher - lower)) == lower
        assert model.round_sigma(lower + 0.51 * (higher - lower)) == higher
    assert model.round_sigma(1e9) == levels[0]


@pytest.mark.parametrize("name", sorted(EDM_CONFIGS.keys() - {"iddpm"}))
def test_other_edm_networks_round_nothing(name):
    model = edm.EDMNetwork(random_edm(name))
    assert model.round_sigma(0.1234567890123) == 0.1234567890123


def test_a_ddpm_rounds_to_the_level_of_the_step_that_it_is_told(tmp_path):
    tiny_ddpm(tmp_path / "m")
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    for sigma in np.geomspace(*model.sigma_range, 300):
        rounded = model.round_sigma(float(sigma))
        _, t = model._scaled(torch.zeros(1, 1, 8, 8), torch.tensor([sigma]))
        assert rounded == model.levels[t].item()
        assert model.round_sigma(rounded) == rounded


def reference(denoise, noise, levels, sigmas, churn, fresh):
    """Algorithm 2 of arXiv 2206.00364, every level replaced by the nearest of `levels`."""

    def nearest(sigma):
        return levels[np.abs(levels - sigma).argmin()]

    steps = [nearest(sigma) for sigma in sigmas[:-1]] + [0.0]
    n_steps = len(sigmas) - 1
    x = noise * steps[0]
    for i in range(n_steps):
        gamma = min(churn / n_steps, np.sqrt(2) - 1) if 0.05 <= steps[i] <= 50 else 0
        raised = nearest(steps[i] * (1 + gamma))
        x = x + np.sqrt(raised**2 - steps[i] ** 2) * 1.003 * fresh
        d = (x - denoise(x, raised)) / raised
        x_next = x + (steps[i + 1] - raised) * d
        if steps[i + 1] > 0:
            d_next = (x_next - denoise(x_next, steps[i + 1])) / steps[i + 1]
            x_next = x + (steps[i + 1] - raised) * (d + d_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_the_sampler_takes_the_networks_levels(churn):
    model = edm.EDMNetwork(random_edm("iddpm"))
    generator = torch.Generator().manual_seed(0)
    noise, fresh = torch.randn(2, 1, 2, 8, 8, generator=generator, dtype=torch.float64)
    sigmas = sampling.sigma_steps(9, max(0.002, model.sigma_range[0]), 80, 7)
    with torch.no_grad():
        expected = reference(
            model.denoise, noise, model.net.u.double().numpy(), sigmas.tolist(), churn, fresh
        )
    sampled = sampling.heun(
        model.denoise, noise, sigmas, churn, (0.05, 50), 1.003, lambda: fresh, model.round_sigma
    )
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("churn", ["0", "10"])
def test_generation_tells_a_ddpm_its_own_levels(churn, tmp_path, monkeypatch):
    tiny_ddpm(tmp_path / "m")
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    told = []
    denoise = model.denoise

    def spied(noisy, sigma, y):
        told.append(sigma)
        return denoise(noisy, sigma, y)

    monkeypatch.setattr(model, "denoise", spied)
    args = generate_synthetic.parse_args(["--n-steps", "7", "--s-churn", churn])
    images, _ = generate_synthetic.sample(model, np.arange(2), args)
    assert images.shape == (2, 8, 8, 1) and len(told) == 13
    assert set(told) <= set(model.levels.tolist())
