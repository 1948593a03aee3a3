"""How long an evaluation will take, and whether it can begin: evaluate.py --check."""

import time

import torch

from common import attacks, run
from evaluation import adaptive, sanity

PASSES = {  # of an image that withstands an attack: (with gradient, without)
    "apgd-ce": (101, 0),
    "apgd-t": (909, 0),
    "apgd-dlr": (101, 0),
    "fab-t": (900, 900),
    "square": (0, 5000),
    "transfer": (40, 1),
}
PASSES |= {f"{kind}-ce": PASSES["apgd-ce"] for kind in adaptive.KINDS}
PASSES |= {f"{kind}-t": PASSES["apgd-t"] for kind in adaptive.KINDS}
EOT = 20  # passes that the attacks of rand average
# The same of an image of the sanity checks.
SANITY_PASSES = {
    "outputs": (0, 3),
    "curve": (5 * (sanity.CURVE_STEPS + 1), 10),
    "surface": (1, 2),
    "gradients": ((1 + len(adaptive.KINDS)) * (sanity.MARGIN_STEPS + 1), 0),
    "steps": (sanity.LONG_STEPS + 1, 2),
    "square": (0, sanity.SQUARE_QUERIES),
    "transfer": (40, 1),
}


def print_check(model, x, y, work, n_images, spec, args, world_size):
    """Pass images x (B, C, H, W) with labels y (B,), as many as ever at once, through the model.

    Tells what the evaluation will take. work: (names of attacks, names of sanity checks) of each
    result that is not finished. n_images: of the whole evaluation.
    """
    for _ in range(2):  # the first one warms up
        start_time = time.time()
        x.requires_grad_(True)
        losses = attacks.attack_losses(model(x), y, "margin")
        torch.autograd.grad(losses.sum(), x)[0].sum().item()
        with_gradient = time.time() - start_time
        start_time = time.time()
        with torch.no_grad():
            n_correct = int((model(x).argmax(1) == y).sum())
        without = time.time() - start_time
    passes = PASSES | {"pgd": (args.n_restarts * args.n_steps * args.eot, args.n_restarts)}
    times = EOT if args.attack == "rand" else 1

    def seconds_of(passes):
        n_with, n_without = passes
        return (n_with * with_gradient + n_without * without) / len(x)

    n_chunks = -(-n_images // args.batch_size)
    n_rounds = -(-n_chunks // world_size)
    seconds = 0.0
    for names, checks in work:
        of_image = seconds_of((0, 1)) + times * sum(seconds_of(passes[name]) for name in names)
        seconds += of_image * n_rounds * min(args.batch_size, n_images)
        n_checked = min(args.sanity_images, n_images)
        of_checks = [seconds_of(SANITY_PASSES[name]) * n_checked for name in checks]
        seconds += max([sum(of_checks) / world_size, *of_checks])  # each is one process's
    print(f"data      {n_images:,} test images in {n_chunks:,} chunks")
    print(f"classes   {run.describe_classes(spec)}")
    print(f"model     {n_correct} of the first {len(x)} images right without an attack")
    print(f"memory    {run.peak_memory(x.device)}")
    print(f"time      {run.in_words(seconds)} if no image falls, less where many do")
    print("nothing is wrong, and nothing was written but the cache")
