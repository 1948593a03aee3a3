"""Training steps, data included, of train_at.py and train_at_aux.py against plain PyTorch and against themselves.

    python benchmarks/train_step.py                 # all; about ten minutes on two CPU cores
    python benchmarks/train_step.py --only digits   # the parts whose names contain a word

Images are random bytes. Steps are those of the scripts' own functions, in their order. Against: the base recipe in plain PyTorch
(benchmarks/reference.py, as many DataLoader workers as cores, which fetch some batches ahead while the others are measured); the
rates of a large matrix product and of a wide convolution on the same cores, by counted FLOP; a step of train_at.py, for DRA. With
--profile: where the time of the first step goes, by torch.profiler.
"""

import math
import os
import tempfile

import numpy as np
import reference
import torch
from measure import alternate, compare, record  # first: it finds the project

import train_at
import train_at_aux
from common import attacks, cli, data, diffusion, dist, models, synthetic
from common.ema import EMA
from runs import costs

CASES = {  # name: flags of train_at.py, of what it is a step, and how many are one measurement
    "digits": (["--dataset", "digits"], "WRN-10-1, batch 128, PGD-5, digits' size", 10),
    "wrn-16-4": (["--dataset", "cifar10", "--model", "wrn-16-4", "--batch-size", "32"], "WRN-16-4, batch 32, PGD-10, 32 x 32", 1),
    "wrn-28-10": (["--dataset", "cifar10", "--model", "wrn-28-10", "--batch-size", "8"], "WRN-28-10, batch 8, PGD-10, 32 x 32", 1),
}
TARGETS = {"digits": 1.5, "wrn-16-4": 1.5, "wrn-28-10": None}
DDPMPP = "edm-cifar10-32x32-uncond-vp.pkl"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=cli.count, default=7, help="measurements of each row; those of WRN-28-10: half as many")
    parser.add_argument("--only", default="", help="a word that the parts' names contain")
    parser.add_argument("--profile", metavar="CASE", choices=CASES, help="print a profile of this case's step and end")
    return parser.parse_args(argv)


def made(folder, spec, n):
    """Random images and labels, and a synthetic set of as many in `folder`."""
    rng = np.random.default_rng(0)
    shape = (n, spec.image_size, spec.image_size, spec.channels)
    parts = [(rng.integers(0, 256, shape, np.uint8), rng.integers(0, spec.num_classes, n)) for _ in range(2)]
    np.savez(os.path.join(folder, "set.npz"), image=parts[1][0], label=parts[1][1])
    return parts


def our_step(script, argv, real, folder, teacher=None, whole=False):
    """A function that does one step as the script's main does; `whole`: the diffusion network is run to its end."""
    args = script.parse_args([*argv, "--synthetic", os.path.join(folder, "set.npz")])
    spec = data.DATASETS[args.dataset]
    batches = data.Batches(*real, synthetic.SyntheticSet(args.synthetic, spec), args.synthetic_fraction, args.batch_size, spec, 0, "cpu")
    torch.manual_seed(0)
    model = models.build(args.model, spec).train()
    if args.compile:
        model.compile()
    ema, parts, counter = EMA(model), [model], iter(range(10**9))
    if teacher:
        args.block, args.sigma = args.block or teacher.default_block, args.sigma or teacher.default_sigma
        x, y = batches(0)
        targets = run_whole if whole else script.teacher_targets
        width = targets(teacher, x, y, torch.randn(len(x), *teacher.noise_shape), 0, args).shape[1]
        parts.append(train_at_aux.alignment_head(model.num_features, args.head_width, width))
    optimizer = torch.optim.SGD(
        models.parameter_groups(parts, args.weight_decay, biases=True), args.lr, momentum=args.momentum[1], nesterov=True
    )

    def step():
        number = next(counter)
        x, y = batches(number)
        start = attacks.random_start(x.shape, args.norm, args.eps, data.stream(0, "attack", number))
        optimizer.zero_grad(set_to_none=True)
        loss, *_, aligned = script.adversarial_loss(model, model, x, y, start, args)
        if teacher:
            noise = torch.randn(len(x), *teacher.noise_shape, generator=data.stream(0, "teacher", number))
            loss = loss + args.aux_weight * (1 - script.alignment(parts[1], aligned, targets(teacher, x, y, noise, 0, args)))
        loss.backward()
        for part in parts:
            torch.nn.utils.clip_grad_norm_(part.parameters(), args.clip_norm or math.inf)
        optimizer.step()
        ema.update(model, 0.995)

    return step


@torch.no_grad()
def run_whole(teacher, x, y, noise, mean, args):
    """The targets of a pass that goes on to the network's last block."""
    return teacher.features(x, args.sigma, None, [args.block, teacher.blocks[-1]], noise)[0] - mean


def tiny_teacher(spec):
    """The diffusion network of train_diffusion.py's digits default, with random weights."""
    import diffusers

    levels = dict(block_out_channels=[24, 48], down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, layers_per_block=1)
    size = dict(sample_size=spec.image_size, in_channels=spec.channels, out_channels=spec.channels, num_class_embeds=spec.num_classes + 1)
    net = diffusers.UNet2DModel(**size, **levels, norm_num_groups=8)
    net.register_to_config(sigma_data=0.5, label_dropout=0.1)
    return diffusion.EDMUNet(net.to(memory_format=torch.channels_last).eval().requires_grad_(False))


def big_teacher():
    teacher = costs.published(DDPMPP)
    teacher.net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return teacher


def times(n, step):
    def steps():
        for _ in range(n):
            step()

    return steps


def against_plain(case, repeats):
    """Lines: train_at.py's step against plain PyTorch, and against a matrix product's rate; with --compile against without."""
    argv, what, n = CASES[case]
    args = train_at.parse_args(argv)
    spec = data.DATASETS[args.dataset]
    with tempfile.TemporaryDirectory() as folder:
        real, made_set = made(folder, spec, 10_000)
        loader = reference.loader(real, made_set, spec, args.batch_size, train_at.SYNTHETIC_FRACTION, os.cpu_count())
        plain = (args.model, spec, args.n_steps, args.eps, args.step_size, args.beta, args.label_smoothing, args.clip_norm)
        matrix, image = torch.randn(2048, 2048), torch.randn(32, 640, 8, 8).to(memory_format=torch.channels_last)
        convolution = torch.nn.Conv2d(640, 640, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
        rows = {
            "ours": times(n, our_step(train_at, argv, real, folder)),
            "plain": times(n, reference.train(loader, *plain)),
            "product": times(10, lambda: matrix @ matrix),
            "convolution": times(10, lambda: convolution(image)),
            "compiled": times(n, our_step(train_at, [*argv, "--compile"], real, folder)),
        }
        seconds = alternate(rows, repeats)
    flop = n * args.batch_size * sum(costs.step_parts(args, costs.classifier_passes(args.model, args.dataset)).values())
    at_that_rate = [flop / (10 * 2 * 2048**3) * s for s in seconds["product"]]
    at_the_other = [flop / (10 * 2 * image.numel() * 640 * 9) * s for s in seconds["convolution"]]
    share = 0.9 if case == "wrn-28-10" else None
    return [
        compare(f"training step, {what}", "plain PyTorch", seconds["ours"], seconds["plain"], TARGETS[case]),
        compare("the same with `--compile` (`--compile` is off by default)", "plain PyTorch", seconds["compiled"], seconds["plain"]),
        compare("its FLOP per second", "a product of 2,048 x 2,048 matrices", seconds["ours"], at_that_rate, share),
        compare("its FLOP per second", "a 3 x 3 convolution, 640 channels, forward", seconds["ours"], at_the_other),
    ]


def alignment_cost(case, repeats):
    """Lines: train_at_aux.py's step against train_at.py's, the diffusion network left at the block and run whole."""
    argv, what, n = CASES[case]
    spec = data.DATASETS[train_at.parse_args(argv).dataset]
    teacher, limit = (tiny_teacher(spec), 1.25) if case == "digits" else (big_teacher(), 1.10)
    with tempfile.TemporaryDirectory() as folder:
        real, _ = made(folder, spec, 10_000)
        rows = {"without": times(n, our_step(train_at, argv, real, folder))}
        rows |= {key: times(n, our_step(train_at_aux, argv, real, folder, teacher, key == "whole")) for key in ("cut", "whole")}
        seconds = alternate(rows, repeats)
    of = f"a step with DRA, {what}"
    return [
        compare(of, "a step of train_at.py", seconds["cut"], seconds["without"], limit, at_most=True),
        compare(f"{of}, the diffusion network run whole", "a step of train_at.py", seconds["whole"], seconds["without"], at_most=True),
    ]


def profile(case):
    """Where the time of train_at.py's step goes."""
    argv, *_ = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        step = our_step(train_at, argv, made(folder, data.DATASETS[train_at.parse_args(argv).dataset], 10_000)[0], folder)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def main(args):
    dist.setup()
    if args.profile:
        return profile(args.profile)
    parts = [("training step", case, against_plain) for case in CASES] + [("DRA", case, alignment_cost) for case in ("digits", "wrn-28-10")]
    chosen = [part for part in parts if args.only in f"{part[0]}, {part[1]}"]
    if not chosen:
        raise cli.UserError(f"--only {args.only}: in none of {'; '.join(f'{part}, {case}' for part, case, _ in parts)}")
    for part, case, lines in chosen:
        repeats = args.repeats if case != "wrn-28-10" else max(args.repeats // 2, 2)
        record(f"{part}, {case}", lines(case, repeats), repeats=repeats)


if __name__ == "__main__":
    cli.run(main, parse_args())
