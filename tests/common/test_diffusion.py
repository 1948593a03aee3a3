"""EDM's preconditioning and sampler against formulae.

Alone: python -m pytest tests/common/test_diffusion.py
"""

import math

import diffusers
import pytest
import torch

from common import diffusion
from teachers import sampling


def test_preconditioning_is_edms():
    """D = c_skip x + c_out F(c_in x; ln(sigma)/4), table 1 of the paper, image by image."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=[8, 16],
        down_block_types=["DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D"],
        norm_num_groups=4,
        num_class_embeds=4,
    ).double()
    noisy = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    sigmas = torch.tensor([0.03, 1.0, 30.0], dtype=torch.float64)
    labels = torch.tensor([0, 2, 3])
    sd = 0.5
    with torch.no_grad():
        batch = diffusion.edm_denoise(net, noisy, sigmas, labels, sd)
        for i, sigma in enumerate(sigmas.tolist()):
            c_skip = sd**2 / (sigma**2 + sd**2)
            c_out = sigma * sd / math.sqrt(sigma**2 + sd**2)
            c_in = 1 / math.sqrt(sigma**2 + sd**2)
            c_noise = torch.tensor(math.log(sigma) / 4, dtype=torch.float64)
            x = noisy[i : i + 1]
            output = net(c_in * x, c_noise, class_labels=labels[i : i + 1]).sample
            expected = c_skip * x + c_out * output
            assert torch.allclose(batch[i : i + 1], expected, rtol=1e-10, atol=1e-12)


def gaussian_denoiser(std):
    """The exact denoiser of N(0, std^2) data: E[x | noisy]."""
    return lambda noisy, sigma: noisy * (std**2 / (std**2 + sigma**2))


def heun_error(n_steps, std=0.6):
    """Relative error against the solution x(0) = x(sigma_max) * std / sqrt(std^2 + sigma_max^2)."""
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = sampling.sigma_steps(n_steps, 0.002, 80, 7)
    sampled = sampling.heun(gaussian_denoiser(std), noise, sigmas)
    exact = noise * 80 * std / math.sqrt(std**2 + 80**2)
    return ((sampled - exact).norm() / exact.norm()).item()


def test_heun_solves_the_gaussian_case_at_second_order():
    errors = [heun_error(n_steps) for n_steps in (32, 64, 128)]
    assert errors[2] < 1e-3
    for coarse, fine in zip(errors, errors[1:]):
        assert 3.5 < coarse / fine < 4.5  # halving the step quarters the error


def test_heun_calls_the_network_2n_minus_1_times():
    calls = []
    denoise = gaussian_denoiser(0.5)

    def counted(noisy, sigma):
        calls.append(sigma)
        return denoise(noisy, sigma)

    sampling.heun(counted, torch.ones(1, 1, 1, 1), sampling.sigma_steps(18, 0.002, 80, 7))
    assert len(calls) == 35
    assert calls[0] == pytest.approx(80) and calls[-1] == pytest.approx(0.002)


def test_noise_levels_are_those_of_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7)
    scheduler.set_timesteps(18)
    sigmas = sampling.sigma_steps(18, 0.002, 80, 7)
    assert torch.allclose(sigmas, scheduler.sigmas.double(), rtol=1e-5)


def test_one_step_is_taken_at_the_highest_level():
    assert sampling.sigma_steps(1, 0.002, 80, 7).tolist() == pytest.approx([80, 0])
