"""EDM's sampler (Karras et al., arXiv 2206.00364), for any denoiser.

Guidance, and the noise of an image, stand in generate_synthetic.py.
"""

import torch


def sigma_steps(n_steps, sigma_min, sigma_max, rho):
    """EDM's noise levels, equation 5: n_steps values from sigma_max to sigma_min, then 0.

    Returns float64 (n_steps + 1,). One step alone is taken at sigma_max.
    """
    ramp = torch.linspace(0, 1, n_steps, dtype=torch.float64)
    first = sigma_max ** (1 / rho)
    last = sigma_min ** (1 / rho)
    sigmas = (first + ramp * (last - first)) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun(denoise, noise, sigmas, round_sigma=float):
    """EDM's deterministic sampler, algorithm 1: images in [-1, 1] but for the network's error.

    denoise: a function (noisy, sigma as a number) -> denoised, called twice a step and once at the
    last. noise: standard normal (B, C, H, W), as the images. sigmas: from sigma_steps.
    round_sigma: of a network that knows a ladder of noise levels alone, the function that gives the
    nearest of them. Between its levels it would be told another noise level than there is.
    """
    sigmas = [round_sigma(sigma) for sigma in sigmas[:-1].tolist()] + [0.0]
    x = noise * sigmas[0]
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoise(x, sigma)) / sigma
        x_next = x + (next_sigma - sigma) * slope
        if next_sigma > 0:
            slope_next = (x_next - denoise(x_next, next_sigma)) / next_sigma
            slope = (slope + slope_next) / 2
            x_next = x + (next_sigma - sigma) * slope
        x = x_next
    return x
