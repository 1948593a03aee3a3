"""The time of a training step of train_at.py and train_at_aux.py, data included.

How rounds are taken in turns, and stored, stands in measure.py.

against_plain: against the base recipe in plain PyTorch (benchmarks/reference.py). alignment_cost:
what DRA adds. Images are random bytes; a step calls the scripts' own functions in their order.
"""

import itertools
import os
import tempfile

import numpy as np
import torch

import train_at
import train_at_aux
import train_diffusion
from benchmarks import cost, reference
from benchmarks.measure import alternate, compare, timer
from common import data, models
from common.run import make_average, update_average
from published.datasets import DATASETS
from published.synthetic import open_synthetic
from teachers.unet import EDMUNet

CASES = {  # name: (flags of train_at.py, words, steps of one measurement)
    "digits": ("--dataset digits", "WRN-10-1, batch 128, PGD-5, digits' size", 10),
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
STEP_TARGETS = {"digits": 1.5, "wrn-16-4": 1.5, "wrn-28-10": None}
DRA_TARGETS = {"digits": 1.25, "wrn-28-10": 1.1}
N_IMAGES = 10_000


def against_plain(case, rounds):
    """A row: train_at.py's step against plain PyTorch with as many DataLoader workers as cores."""
    flags, words, n_steps = CASES[case]
    args = train_at.parse_args(flags.split())
    spec = DATASETS[args.dataset]
    with tempfile.TemporaryDirectory() as folder:
        real, synthetic = random_images(spec, folder)
        fraction = train_at.SYNTHETIC_FRACTION
        batches = reference.loader(real, synthetic, spec, args.batch_size, fraction)
        timers = {
            "ours": timer(our_step(train_at, flags, real, folder), n_steps),
            "plain": timer(reference.train_step(batches, spec, args), n_steps),
        }
        seconds = alternate(timers, rounds)
    what = f"a training step: {words}"
    target = STEP_TARGETS[case]
    return compare(what, "plain PyTorch", seconds["ours"], seconds["plain"], target)


def alignment_cost(case, rounds):
    """A row: train_at_aux.py's step against train_at.py's."""
    flags, words, n_steps = CASES[case]
    spec = DATASETS[train_at.parse_args(flags.split()).dataset]
    network = small_network() if case == "digits" else large_network()
    with tempfile.TemporaryDirectory() as folder:
        real, _ = random_images(spec, folder)
        timers = {
            "without": timer(our_step(train_at, flags, real, folder), n_steps),
            "with": timer(our_step(train_at_aux, flags, real, folder, network), n_steps),
        }
        seconds = alternate(timers, rounds)
    what = f"a step with DRA: {words}"
    target = DRA_TARGETS[case]
    against = "a step of train_at.py"
    return compare(what, against, seconds["with"], seconds["without"], target, "the cost")


def random_images(spec, folder):
    """(images, labels) of random bytes, and a synthetic set as large, also as set.npz in folder."""
    rng = np.random.default_rng(0)
    shape = (N_IMAGES, spec.image_size, spec.image_size, spec.channels)
    sets = []
    for _ in range(2):
        images = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, spec.num_classes, N_IMAGES)
        sets.append((images, labels))
    np.savez(os.path.join(folder, "set.npz"), image=sets[1][0], label=sets[1][1])
    return sets


def our_step(script, flags, real, folder, network=None):
    """A function that does one training step as `script` does it, train_at or train_at_aux.

    real: (images, labels). folder: where set.npz is. network: of train_at_aux's teacher.
    """
    args = script.parse_args([*flags.split(), "--synthetic", os.path.join(folder, "set.npz")])
    spec = DATASETS[args.dataset]
    device = torch.device("cpu")
    synthetic = open_synthetic(args.synthetic, spec)
    batches = data.make_batches(spec, real, args, device, 0, 1, synthetic)
    torch.manual_seed(0)
    model = models.build(args.model, spec).train()
    ema = make_average(model)
    trained = [model]
    if network:
        teacher = script.Teacher(network, args)
        x, y = batches(0)
        targets = teacher.targets(x, y, teacher.noise(len(y), torch.Generator()))
        head = script.alignment_head(model.num_features, targets.shape[1], args)
        trained.append(head)
    optimizer = script.make_optimizer(trained, args, device)
    numbers = itertools.count()

    def step():
        number = next(numbers)
        x, y = batches(number)
        start = script.attack_start(x, number, batches.mine, args)
        optimizer.zero_grad(set_to_none=True)
        outputs = script.adversarial_loss(model, model, x, y, start, args)
        loss = outputs[0]
        if network:
            feats = outputs[3]
            noise = teacher.noise(len(y), data.stream(args.seed, "teacher", number, device))
            targets = teacher.targets(x, y, noise)
            loss_aux = script.alignment_loss(head, feats, targets, args)
            loss = loss + args.aux_weight * loss_aux
        loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if args.clip_norm:
            parameters = model.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, args.clip_norm, grad_norm)
        optimizer.step()
        update_average(ema, model, args.ema_decay)

    return step


def small_network():
    """The diffusion network of train_diffusion.py's digits default, with random weights."""
    args = train_diffusion.parse_args([])
    net = train_diffusion.build_network(DATASETS[args.dataset], args)
    net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return EDMUNet(net)


def large_network():
    """The DDPM++ of EDM's CIFAR-10, with random weights."""
    network = cost.build_diffusion("DDPM++")
    network.net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return network
