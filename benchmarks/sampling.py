"""The time that images and features of a diffusion network take.

How rounds are taken in turns, and stored, stands in measure.py.

against_diffusers: generate_synthetic.py's sampler against a scheduler and loop of diffusers, on the
network of train_diffusion.py's digits default. against_whole_pass: features, for which the network
is left at the block, against a pass through all of it, on the DDPM++ of EDM's CIFAR-10. Weights are
random.
"""

import numpy as np
import torch

import generate_synthetic
from benchmarks.measure import alternate, compare, timer
from benchmarks.train_step import large_network, small_network

N_IMAGES = 250
N_STEPS = 18
N_CALLS = 2 * N_STEPS - 1  # of the network: Heun's method takes two a step, and one at the last


def against_diffusers(rounds):
    """A row: our sampler against diffusers' own, with as many calls of the network."""
    model = small_network()
    plain = small_network()
    plain.net.to(memory_format=torch.contiguous_format)
    args = generate_synthetic.parse_args(["--n-steps", str(N_STEPS)])
    ids = np.arange(N_IMAGES)
    timers = {
        "ours": timer(lambda: generate_synthetic.sample(model, ids, args)),
        "diffusers": timer(lambda: sample_by_diffusers(plain)),
    }
    seconds = alternate(timers, rounds)
    what = f"{N_IMAGES} digits, {N_CALLS} network calls"
    against = "diffusers' scheduler and loop, as many calls"
    return compare(what, against, seconds["ours"], seconds["diffusers"])


@torch.no_grad()
def sample_by_diffusers(model):
    """Images as a pipeline of diffusers makes them: a scheduler's step after each network call."""
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    scheduler.set_timesteps(N_CALLS)
    y = torch.arange(N_IMAGES) % model.num_classes
    x = torch.randn(N_IMAGES, *model.noise_shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = model.net(scaled, t.expand(N_IMAGES), class_labels=y).sample
        x = scheduler.step(output, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def against_whole_pass(rounds):
    """A row: features at the default block against a whole pass of the network."""
    model = large_network()
    sigma = model.default_sigma
    block = model.default_block
    x = torch.rand(4, 3, 32, 32)
    noise = torch.randn(4, 3, 32, 32)
    timers = {
        "features": timer(lambda: model.features(x, sigma, None, [block], noise)),
        "whole": timer(lambda: model.denoise(model.encode(x) + sigma * noise, sigma)),
    }
    seconds = alternate(timers, rounds)
    what = f"features of a DDPM++ at {block}"
    return compare(what, "a whole pass", seconds["features"], seconds["whole"])
