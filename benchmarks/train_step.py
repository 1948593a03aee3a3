"""The time of a training step of train_at.py and train_at_aux.py, and of its batches alone.

How rounds are taken in turns, and stored, stands in measure.py; the plain PyTorch code that is
measured against, in reference.py. Images are random bytes; a step calls the scripts' own functions
in their order.
"""

import dataclasses
import itertools
import os
import tempfile
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import torch

import train_at
import train_at_aux
import train_diffusion
from benchmarks import cost, reference
from benchmarks.measure import alternate, compare, timer
from common import attacks, data, models
from common.run import Meters, autocast, make_average, update_average
from published.datasets import DATASETS
from published.synthetic import open_synthetic
from teachers.load import freeze
from teachers.unet import EDMUNet

CPU = torch.device("cpu")
CASES = {  # name: (flags of train_at.py, words, steps of one measurement)
    "digits": ("--dataset digits", "WRN-10-1, batch 128, PGD-5, digits' size", 10),
    "wrn-10-2": (
        "--dataset cifar10 --model wrn-10-2 --batch-size 128 --n-steps 5",
        "WRN-10-2, batch 128, PGD-5, 32 x 32",
        2,
    ),
    "wrn-16-4": (
        "--dataset cifar10 --model wrn-16-4 --batch-size 32",
        "WRN-16-4, batch 32, PGD-10, 32 x 32",
        1,
    ),
    "wrn-28-10": (
        "--dataset cifar10 --model wrn-28-10 --batch-size 8",
        "WRN-28-10, batch 8, PGD-10, 32 x 32",
        1,
    ),
}
CONVNEXT = "--dataset imagenet --model convnext_tiny --precision bf16"
N_IMAGES = 50_000  # real ones, and as many synthetic ones


def against_plain(case, precision, target, rounds):
    """A row: train_at.py's step against plain PyTorch in fp32, a DataLoader worker per core."""
    flags, words, n_steps = CASES[case]
    flags = f"{flags} --precision {precision}"
    args = train_at.parse_args(flags.split())
    spec = DATASETS[args.dataset]
    with tempfile.TemporaryDirectory() as folder:
        timers = {
            "ours": timer(our_step(train_at, flags, folder), n_steps),
            "plain": timer(reference.train_step(plain_batches(args), spec, args), n_steps),
        }
        seconds = alternate(timers, rounds)
    what = f"a training step in {precision}: {words}"
    return compare(what, "plain PyTorch, fp32", seconds["ours"], seconds["plain"], target)


def alignment_cost(case, every, target, rounds):
    """A row: train_at_aux.py's step against train_at.py's. every: K of --teacher-every."""
    flags, words, n_steps = CASES[case]
    network = small_network() if case == "digits" else cost.build_diffusion("DDPM++")
    freeze(network, CPU)
    what = f"a step with DRA, K = {every}: {words}"
    return compare_alignment(what, network, every, flags, n_steps, target, rounds)


def imagenet_alignment_cost(teacher, every, target, rounds):
    """A row: the same of ImageNet's size. teacher: a name that cost.build_diffusion knows."""
    network = cost.build_diffusion(teacher)
    freeze(network, CPU, "bf16")
    flags = "--dataset imagenet --model convnext_tiny --precision bf16 --batch-size 10"
    what = f"a step with DRA in bf16, {teacher}, K = {every}: ConvNeXt-T, PGD-2, 224 x 224"
    with imagenet_in_memory():
        return compare_alignment(what, network, every, flags, 1, target, rounds)


def compare_alignment(what, network, every, flags, n_steps, target, rounds):
    """A row: n_steps steps of train_at_aux.py with a teacher against those of train_at.py."""
    with tempfile.TemporaryDirectory() as folder:
        plain = our_step(train_at, flags, folder)
        aligned = our_step(train_at_aux, f"{flags} --teacher-every {every}", folder, network)
        timers = {"without": timer(plain, n_steps), "with": timer(aligned, n_steps)}
        seconds = alternate(timers, rounds)
    against = "a step of train_at.py"
    return compare(what, against, seconds["with"], seconds["without"], target, "the cost")


@contextmanager
def imagenet_in_memory(image_size=224):
    """ImageNet has 100 random images, which lie in memory and not in files."""
    spec = DATASETS["imagenet"]
    spec = dataclasses.replace(spec, batches=None, image_size=image_size)
    with (
        mock.patch.dict(DATASETS, imagenet=spec),
        mock.patch.dict(globals(), N_IMAGES=100),
    ):
        yield


def target_speed(how, target, rounds):
    """A row: a target of DiT-XL/2 with its VAE in bf16, eager or compiled, against fp32, eager."""
    timers = {}
    for name, precision in (("ours", "bf16"), ("reference", "fp32")):
        network = cost.build_diffusion("DiT-XL/2")
        freeze(network, CPU, precision)
        if name == "ours" and how == "compiled":
            network.compile()
        x = torch.rand(4, 3, 256, 256)
        noise = torch.randn(4, *network.noise_shape)
        block = [network.default_block]
        sigma = network.default_sigma
        timers[name] = timer(partial(network.features, x, sigma, None, block, noise))
    with torch.no_grad():
        seconds = alternate(timers, rounds)
    what = f"targets of DiT-XL/2 and its VAE, bf16, {how}, 4 images"
    return compare(what, "fp32, eager", seconds["ours"], seconds["reference"], target)


def loader_wait(case, target, rounds):
    """A row: the share of train_at.py's step in which it waits for its batch."""
    flags, words, n_steps = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        step = our_step(train_at, flags, folder)
        steps = timer(step, 5 * n_steps)
        steps()  # warms up
        seconds = []
        waited = []
        for _ in range(rounds):
            step.batches.waited = 0.0
            seconds.append(steps())
            waited.append(step.batches.waited)
    return compare(f"waiting for a batch: {words}", "", waited, seconds, target, "of the step")


def random_images(spec):
    """(images, labels) of random bytes, as common/data.py has those of the data set `spec`."""
    rng = np.random.default_rng(0)
    shape = (N_IMAGES, spec.image_size, spec.image_size, spec.channels)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, spec.num_classes, N_IMAGES)
    return images, labels


def plain_batches(args):
    """The batches of reference.py, for the arguments of train_at.py."""
    spec = DATASETS[args.dataset]
    images = random_images(spec)
    fraction = train_at.SYNTHETIC_FRACTION
    return reference.loader(images, images, spec, args.batch_size, fraction)


def our_batches(script, flags, folder, device=CPU):
    """(batches, arguments) of `script` with these flags; its synthetic set is put into folder."""
    path = os.path.join(folder, f"{script.__name__}.npz")
    args = script.parse_args([*flags.split(), "--synthetic", path])
    spec = DATASETS[args.dataset]
    real = random_images(spec)
    np.savez(path, image=real[0], label=real[1])
    synthetic = open_synthetic(args.synthetic, spec)
    return data.make_batches(spec, real, args, device, 0, 1, synthetic), args


def our_step(script, flags, folder, network=None, device=CPU):
    """A function that does one training step as `script` does it, train_at or train_at_aux.

    folder: as in our_batches. network: of train_at_aux's teacher. The function has the attributes
    batches and args.
    """
    batches, args = our_batches(script, flags, folder, device)
    amp = autocast(device, args.precision)
    torch.manual_seed(0)
    model = models.build(args.model, DATASETS[args.dataset]).to(device).train()
    ema = make_average(model)
    twin = attacks.make_twin(model, args.attack_bn, args.precision)
    trained = [model]
    if network:
        teacher = script.Teacher(network, args)
        x, y = batches(0)
        targets = teacher.targets(x, y, teacher.noise(len(y), args.seed, "teacher", 0))
        head = script.alignment_head(model.num_features, targets.shape[1], args).to(device)
        trained.append(head)
    optimizer = script.make_optimizer(trained, args)
    if args.compile:
        model.compile()
    meters = Meters()
    numbers = itertools.count()

    def step():
        number = next(numbers)
        x, y = batches(number)
        start = script.attack_start(x, number, batches.mine, args)
        start = start.contiguous(memory_format=torch.channels_last)
        attacks.update_twin(twin, model)
        optimizer.zero_grad(set_to_none=True)
        if network:
            kth = slice(None, None, args.teacher_every)
            noise = teacher.noise(len(y), args.seed, "teacher", number)
            targets = teacher.targets(x[kth], y[kth], noise[kth])
        with amp:
            loss, metrics, _, *more = script.adversarial_loss(model, twin, x, y, start, args)
            if network:
                feats = [f[kth] for f in more[0]]
                loss_aux = script.alignment_loss(head, feats, targets, args)
                loss = loss + args.aux_weight * loss_aux
        loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if args.clip_norm:
            parameters = model.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_norm, grad_norm)
        optimizer.step()
        update_average(ema, model, args.ema_decay)
        meters.update(loss=loss, grad_norm=grad_norm, **metrics)

    step.batches = batches
    step.args = args
    return step


def small_network():
    """The diffusion network of train_diffusion.py's digits default, with random weights."""
    args = train_diffusion.parse_args(["--val-size", str(DATASETS["digits"].val_size)])
    return EDMUNet(train_diffusion.build_network(DATASETS[args.dataset], args))
