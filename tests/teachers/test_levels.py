"""Networks that know a ladder of noise levels alone are sampled on its levels.

Alone: python -m pytest tests/teachers/test_levels.py
"""

import math

import numpy as np
import pytest
import torch
from data_helper import refused
from diffusers_helper import tiny_ddpm, tiny_unet
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


def test_vp_knows_the_levels_of_its_times():
    """sigma of t = 1e-5 and of t = 1, between which c_noise is 999 t."""
    model = edm.EDMNetwork(random_edm("vp"))
    lowest, highest = model.sigma_range
    assert lowest == pytest.approx(math.sqrt(math.exp(9.95e-10 + 1e-6) - 1), rel=1e-9)
    assert highest == pytest.approx(math.sqrt(math.exp(9.95 + 0.1) - 1), rel=1e-9)
    told = model.net._coefficients(torch.tensor([lowest, highest], dtype=torch.float64))[3]
    assert told.tolist() == pytest.approx([999e-5, 999], rel=1e-6)


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


def reference(denoise, noise, levels, sigmas):
    """Algorithm 1 of arXiv 2206.00364, every level replaced by the nearest of `levels`."""

    def nearest(sigma):
        return levels[np.abs(levels - sigma).argmin()]

    steps = [nearest(sigma) for sigma in sigmas[:-1]] + [0.0]
    x = noise * steps[0]
    for i in range(len(sigmas) - 1):
        d = (x - denoise(x, steps[i])) / steps[i]
        x_next = x + (steps[i + 1] - steps[i]) * d
        if steps[i + 1] > 0:
            d_next = (x_next - denoise(x_next, steps[i + 1])) / steps[i + 1]
            x_next = x + (steps[i + 1] - steps[i]) * (d + d_next) / 2
        x = x_next
    return x


def test_the_sampler_takes_the_networks_levels():
    model = edm.EDMNetwork(random_edm("iddpm"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 8, 8, generator=generator, dtype=torch.float64)
    sigmas = sampling.sigma_steps(9, max(0.002, model.sigma_range[0]), 80, 7)
    with torch.no_grad():
        expected = reference(model.denoise, noise, model.net.u.double().numpy(), sigmas.tolist())
    sampled = sampling.heun(model.denoise, noise, sigmas, model.round_sigma)
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-9)


def test_generation_tells_a_ddpm_its_own_levels(tmp_path, monkeypatch):
    tiny_ddpm(tmp_path / "m")
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    told = []
    denoise = model.denoise

    def spied(noisy, sigma, y):
        told.append(sigma)
        return denoise(noisy, sigma, y)

    monkeypatch.setattr(model, "denoise", spied)
    args = generate_synthetic.parse_args(["--n-steps", "7"])
    images, _ = generate_synthetic.sample(model, np.arange(2), args)
    assert images.shape == (2, 8, 8, 1) and len(told) == 13
    assert set(told) <= set(model.levels.tolist())


@pytest.mark.parametrize("which", ["both", "the network", "the guide"])
def test_a_guided_sampler_takes_the_levels_of_the_ladder(which, tmp_path, diffusion_dir):
    """Whichever of the two has one. Both are told the same."""
    tiny_ddpm(tmp_path / "m", tiny_unet(num_class_embeds=10))
    model = load_diffusion(str(tmp_path / "m"), "cpu")
    other = load_diffusion(str(tmp_path / "m") if which == "both" else diffusion_dir, "cpu")
    pair = (other, model) if which == "the guide" else (model, other)
    told = {}
    for network in pair:
        told[network] = []
        denoise = network.denoise

        def spied(noisy, sigma, y, network=network, denoise=denoise):
            told[network].append(sigma)
            return denoise(noisy, sigma, y)

        network.denoise = spied
    args = generate_synthetic.parse_args(["--n-steps", "7"])
    args.guidance_scale = 2.0
    generate_synthetic.sample(pair[0], np.arange(2), args, pair[1])
    assert told[model] == told[other] and len(told[model]) == 13
    assert set(told[model]) <= set(model.levels.tolist())


def test_a_guide_of_another_ladder_is_one_line(tmp_path):
    """Between its levels one of the two would be told another noise level than there is."""
    for name, beta_end in (("m", 0.02), ("guide", 0.03)):
        tiny_ddpm(tmp_path / name, tiny_unet(num_class_embeds=10), beta_end=beta_end)
    argv = ["--diffusion", str(tmp_path / "m"), "--guidance-scale", "2"]
    argv += ["--guide", str(tmp_path / "guide"), "--out-dir", str(tmp_path / "set")]
    words = f"{tmp_path}/guide: its noise levels are not those of {tmp_path}/m (near "
    refused(lambda: generate_synthetic.main(generate_synthetic.parse_args(argv)), words)
    assert not (tmp_path / "set").exists()
