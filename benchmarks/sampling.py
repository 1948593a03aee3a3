"""Images and features of a diffusion network: against diffusers' own loop, a whole pass, and float64.

    python benchmarks/sampling.py

The networks are train_diffusion.py's digits default, for float64 trained for 200 steps, and the DDPM++ of EDM's CIFAR-10 (as NVlabs' file
has it) with random weights.
"""

import tempfile

import numpy as np
import torch
from measure import alternate, compare, record  # first: it finds the project
from train_step import big_teacher, tiny_teacher

import generate_synthetic
import train_diffusion
from common import cli, data, diffusion

N_STEPS = 18


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=cli.count, default=5, help="measurements of each row")
    return parser.parse_args(argv)


@torch.no_grad()
def pipeline(model, batch_size, calls):
    """Images as a pipeline of diffusers makes them: a scheduler's step after each network call. `calls` of them."""
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    scheduler.set_timesteps(calls)
    y = torch.arange(batch_size) % model.num_classes
    x = torch.randn(batch_size, *model.noise_shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = model.net(scheduler.scale_model_input(x, t), t.expand(batch_size), class_labels=y).sample
        x = scheduler.step(output, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def in_float64(model, noise, y, sigmas):
    """The sampler with its state in float64 and only the network in float32, as EDM's code has it."""

    def denoise(noisy, sigma):
        return model.denoise(noisy.float(), sigma, y).double()

    return diffusion.heun(denoise, noise.double(), sigmas)


def main(args):
    spec, calls = data.DATASETS["digits"], 2 * N_STEPS - 1
    small, plain = tiny_teacher(spec), tiny_teacher(spec)
    plain.net.to(memory_format=torch.contiguous_format)
    flags = generate_synthetic.parse_args(["--n-steps", str(N_STEPS)])
    ids, sigmas = np.arange(250), diffusion.sigma_steps(N_STEPS, flags.sigma_min, flags.sigma_max, flags.rho)
    rows = {
        "ours": lambda: generate_synthetic.sample(small, ids, flags),
        "plain": lambda: pipeline(plain, len(ids), calls),
    }
    what, loop = f"250 digits, {calls} network calls", "diffusers' scheduler and loop, as many calls"
    lines = [compare(what, loop, *alternate(rows, args.repeats).values())]

    big = big_teacher()
    x, more = torch.rand(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    rows = {
        "features": lambda: big.features(x, big.default_sigma, None, [big.default_block], more),
        "whole": lambda: big.denoise(big.encode(x) + big.default_sigma * more, big.default_sigma),
    }
    with torch.no_grad():
        seconds = alternate(rows, args.repeats)
    lines.append(compare(f"features of a DDPM++ at {big.default_block}", "a whole pass", seconds["features"], seconds["whole"]))

    with tempfile.TemporaryDirectory() as folder:
        train_diffusion.main(train_diffusion.parse_args(["--train-steps", "200", "--out-dir", folder]))
        trained, found = diffusion.load_diffusion(folder, "cpu"), {}
    noise, y = torch.randn(250, *trained.noise_shape), torch.arange(250) % 10
    rows = {
        "float32": lambda: found.update(float32=diffusion.heun(lambda x, sigma: trained.denoise(x, sigma, y), noise, sigmas)),
        "float64": lambda: found.update(float64=in_float64(trained, noise, y, sigmas)),
    }
    with torch.no_grad():
        seconds = alternate(rows, args.repeats)
    eight_bits = [(found[name].double() * 127.5 + 128).clamp(0, 255).to(torch.uint8) for name in ("float32", "float64")]
    unequal = (eight_bits[0] != eight_bits[1]).double().mean().item()
    largest = (found["float32"].double() - found["float64"]).abs().max().item()
    what = f"250 digits, state in float32: {unequal:.2%} of the bytes differ, the images by at most {largest:.0e}"
    lines.append(compare(what, "state in float64, network in float32", seconds["float32"], seconds["float64"]))
    record("sampling", lines)


if __name__ == "__main__":
    cli.run(main, parse_args())
