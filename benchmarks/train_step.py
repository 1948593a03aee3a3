"""The time of a training step of train_at.py and train_at_aux.py, and of its batches alone.

How rounds are taken in turns, and stored, stands in measure.py; the plain PyTorch code that is
measured against, in reference.py. Images are random bytes; a step calls the scripts' own functions
in their order.
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

CPU = torch.device("cpu")
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
N_IMAGES = 50_000  # real ones, and as many synthetic ones
N_BATCHES = 50


def against_plain(case, target, rounds):
    """A row: train_at.py's step against plain PyTorch with as many DataLoader workers as cores."""
    flags, words, n_steps = CASES[case]
    args = train_at.parse_args(flags.split())
    spec = DATASETS[args.dataset]
    with tempfile.TemporaryDirectory() as folder:
        timers = {
            "ours": timer(our_step(train_at, flags, folder), n_steps),
            "plain": timer(reference.train_step(plain_batches(args), spec, args), n_steps),
        }
        seconds = alternate(timers, rounds)
    what = f"a training step: {words}"
    return compare(what, "plain PyTorch", seconds["ours"], seconds["plain"], target)


def alignment_cost(case, target, rounds):
    """A row: train_at_aux.py's step against train_at.py's."""
    flags, words, n_steps = CASES[case]
    network = small_network() if case == "digits" else large_network()
    with tempfile.TemporaryDirectory() as folder:
        timers = {
            "without": timer(our_step(train_at, flags, folder), n_steps),
            "with": timer(our_step(train_at_aux, flags, folder, network), n_steps),
        }
        seconds = alternate(timers, rounds)
    what = f"a step with DRA: {words}"
    against = "a step of train_at.py"
    return compare(what, against, seconds["with"], seconds["without"], target, "the cost")


def batch_time(target, rounds):
    """A row: our batches against torchvision's, image by image in DataLoader workers."""
    flags = "--dataset cifar10"
    args = train_at.parse_args(flags.split())
    with tempfile.TemporaryDirectory() as folder:
        batches, _ = our_batches(train_at, flags, folder)
        numbers = itertools.count()

        def plain():
            # The workers end with the loader. They would run ahead while ours is measured.
            loader = plain_batches(args)
            for _ in range(5):
                next(loader)
            return timer(lambda: next(loader), N_BATCHES)()

        ours = timer(lambda: batches(next(numbers)), N_BATCHES)
        seconds = alternate({"ours": ours, "plain": plain}, rounds)
    what = f"a mixed, augmented batch of {args.batch_size}, 32 x 32"
    against = f"torchvision, image by image, {os.cpu_count()} workers"
    return compare(what, against, seconds["ours"], seconds["plain"], target)


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


def our_batches(script, flags, folder):
    """(batches, arguments) of `script` with these flags; its synthetic set is put into folder."""
    path = os.path.join(folder, f"{script.__name__}.npz")
    args = script.parse_args([*flags.split(), "--synthetic", path])
    spec = DATASETS[args.dataset]
    real = random_images(spec)
    np.savez(path, image=real[0], label=real[1])
    synthetic = open_synthetic(args.synthetic, spec)
    return data.make_batches(spec, real, args, CPU, 0, 1, synthetic), args


def our_step(script, flags, folder, network=None):
    """A function that does one training step as `script` does it, train_at or train_at_aux.

    folder: as in our_batches. network: of train_at_aux's teacher.
    """
    batches, args = our_batches(script, flags, folder)
    torch.manual_seed(0)
    model = models.build(args.model, DATASETS[args.dataset]).train()
    ema = make_average(model)
    trained = [model]
    if network:
        teacher = script.Teacher(network, args)
        x, y = batches(0)
        targets = teacher.targets(x, y, teacher.noise(len(y), torch.Generator()))
        head = script.alignment_head(model.num_features, targets.shape[1], args)
        trained.append(head)
    optimizer = script.make_optimizer(trained, args, CPU)
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
            noise = teacher.noise(len(y), data.stream(args.seed, "teacher", number, CPU))
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
