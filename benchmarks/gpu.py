"""The acceptance run on one GPU: checks of what no CPU can show, then speeds. `make gpu`.

    python -m benchmarks.gpu         # on a GPU, 9 minutes at most
    python -m benchmarks.gpu --toy   # every part at tiny size, on a CPU too: for the tests

Parts run in the order of their importance. A part whose estimated time is more than what is left is
skipped. After each part all results so far are written to --out. The exit status is 1 where a check
failed or a part raised an error. Speeds are shares of the peak of an H100 SXM, whatever the card.
"""

import functools
import gc
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import generate_synthetic
import train_at
import train_at_aux
import train_diffusion
from benchmarks import cost, measure, train_step
from common import UserError, attacks, cli, files, models, run
from evaluation import autoattack
from published.datasets import DATASETS
from teachers import edm
from teachers.load import freeze

PEAK = cost.PEAK | {"tf32": 494.7e12}  # of the same card by the same data sheet
TOLERANCE = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 1e-2}  # of a loss, relative to the CPU's in fp32
NO_GPU = "no GPU"
SKIP = "SKIP, no time left"


def parts(args):
    """(name, seconds it may take on an H100, function without arguments), most important first."""
    two = "--epochs 2 --eval-every 2 --eval-n-steps 1"
    mixed = f"{two} --loss pgd --attack apgd --attack-bn running --mixup 0.8 --cutmix 1"
    diffusion = "--train-steps 12 --eval-every 12 --channels 8 16"
    aux = train_at_aux
    small = ("wrn-16-4", "preact-18")
    step = partial(step_part, args)
    return [
        ("environment", 1, environment),
        ("equal losses", 40, partial(equal_losses, args)),
        ("no waits, DM-AT + DRA", 20, partial(no_waits, aux, two)),
        ("no waits, mixed and shuffled", 20, partial(no_waits, aux, f"{mixed} --shuffle-targets")),
        ("no waits, train_diffusion", 20, partial(no_waits, train_diffusion, diffusion)),
        step(25, "wrn-28-10", 512, "bf16"),
        step(50, "wrn-28-10", 512, "fp32"),
        step(110, "wrn-28-10", 512, "bf16", "compile"),
        step(15, "wrn-28-10", 64, "bf16"),
        step(30, "wrn-28-10", 512, "tf32"),
        ("DRA, wrn-28-10", 40, partial(alignment, args, "wrn-28-10", 128, "DDPM++")),
        ("DRA, convnext_tiny", 60, partial(alignment, args, "convnext_tiny", 64, "JiT-B/16")),
        ("AutoAttack", 20, partial(autoattack_rates, args)),
        ("generation, bf16", 15, partial(generation, args, "bf16")),
        ("generation, fp32", 30, partial(generation, args, "fp32")),
        ("equal runs", 40, partial(equal_runs, args)),
        *[step(15, model, 128, "bf16") for model in small],
        *[step(20, "wrn-28-10", 64, precision) for precision in ("fp32", "tf32")],
        step(100, "wrn-28-10", 64, "bf16", "compile"),
        *[step(60, model, 128, "bf16", "compile") for model in small],
        *[step(130, "wrn-28-10", 512, precision, "compile") for precision in ("fp32", "tf32")],
        *[step(100, "wrn-28-10", 64, precision, "compile") for precision in ("fp32", "tf32")],
    ]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=cli.non_negative, default=9, help="of all parts, at most")
    parser.add_argument("--out", type=cli.path, default="out/gpu.json", help="file of the results")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, also without a GPU")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------- what the parts share


def start(precision, deterministic=False):
    """The device, with the switches of precision and of cuDNN as the scripts set them.

    deterministic: False as in training with --no-deterministic, None as where images are attacked
    or generated.
    """
    torch.use_deterministic_algorithms(False)  # as in a new process
    _, _, device = run.start_processes(precision, deterministic)
    return device


def seconds_of(function, n=1):
    """Seconds of n calls, the GPU's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(n):
        function()
    wait()
    return time.perf_counter() - begin


def rate(network, precision, images_per_s, flop):
    """The record of a speed, and its share of the peak of an H100 SXM. flop: per image."""
    return {
        "network": network,
        "precision": precision,
        "images_per_s": images_per_s,
        "share_of_h100": images_per_s * flop / PEAK[precision],
    }


def verdict(good):
    return {"status": "passed" if good else "failed"}


def flags_of(args, model, batch_size, precision):
    """Flags of train_at.py for a row of images in memory."""
    dataset = "imagenet" if model == "convnext_tiny" else "cifar10"
    if args.toy:
        batch_size = 4
        if dataset == "cifar10":
            dataset, model = "digits", "wrn-10-1"
    flags = f"--dataset {dataset} --model {model} --batch-size {batch_size}"
    return f"{flags} --precision {precision}"


@functools.cache
def step_flop(dataset, model):
    """FLOP of a training step per image, without a teacher."""
    _, _, flop, _ = cost.training("", f"--dataset {dataset} --model {model}")
    return flop[model]


def build_network(args, name):
    """DDPM++ with ten classes, or JiT-B/16, with random weights, on the current device."""
    init = cost.DDPM | {"label_dim": 10}
    if name == "DDPM++" and args.toy:
        return train_step.small_network()
    if name == "JiT-B/16":
        if not args.toy:
            return cost.build_diffusion(name)
        init |= {"img_resolution": 64, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
    return edm.EDMNetwork(edm.build({"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": init}))


def frozen_network(args, name, device, precision):
    """build_network's, made on the device and ready for use."""
    with torch.device(device):
        network = build_network(args, name)
    freeze(network, device, precision)
    return network


@torch.no_grad()
def pass_flop(args, name):
    """FLOP of one image's pass through a diffusion network."""
    with torch.device("meta"):
        network = build_network(args, name)
        noise = torch.empty(1, *network.noise_shape)
    return cost.count(lambda: network.denoise(noise, 1.0))


# ----------------------------------------------------------------------------------------- checks


def environment():
    record = run.environment() | {"cuda": torch.version.cuda, "cudnn": NO_GPU, "gpu": NO_GPU}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        record["gpu"] = card.name
        record["memory_gib"] = card.total_memory / 2**30
        record["capability"] = f"{card.major}.{card.minor}"
        record["cudnn"] = torch.backends.cudnn.version()
    return record


def loss_of(flags, device, precision):
    """The loss of a first step with DRA and TRADES. Its inputs are the same on every device."""
    args = train_at_aux.parse_args(flags.split())
    spec = DATASETS[args.dataset]
    torch.manual_seed(0)
    model = models.build(args.model, spec)
    head = train_at_aux.alignment_head(model.num_features, 64, args)
    x = torch.rand(args.batch_size, spec.channels, spec.image_size, spec.image_size)
    y = torch.randint(spec.num_classes, (len(x),)).to(device)
    generator = torch.Generator().manual_seed(0)
    perturbation = attacks.random_start(x.shape, args.norm, args.eps, generator)
    targets = torch.randn(len(x), 64).to(device)

    model.to(device)
    head.to(device)
    twin = attacks.make_twin(model, args.attack_bn, precision)
    x = x.to(device, memory_format=torch.channels_last)
    perturbation = perturbation.to(device, memory_format=torch.channels_last)
    with run.autocast(device, precision):
        loss, _, _, feats = train_at_aux.adversarial_loss(model, twin, x, y, perturbation, args)
        loss_aux = train_at_aux.alignment_loss(head, feats, targets, args)
    return (loss + args.aux_weight * loss_aux).item()


def equal_losses(args):
    """A check: the loss on the GPU in each precision is that on the CPU in fp32."""
    flags = flags_of(args, "wrn-28-10", 16, "fp32")
    cpu = loss_of(flags, torch.device("cpu"), "fp32")
    record = {"cpu": cpu}
    for precision in TOLERANCE:
        loss = loss_of(flags, start(precision), precision)
        record[precision] = {"loss": loss, "difference": abs(loss - cpu) / abs(cpu)}
    # Written so that a loss which is not a number fails.
    good = all(record[name]["difference"] <= limit for name, limit in TOLERANCE.items())
    return record | verdict(good)


def no_waits(script, flags):
    """A check: steps 4 to 9 of the script's own loop, on digits, never wait for the GPU.

    The first three warm up. The mode ends before the log line, for which a wait is right.
    """
    advance = run.Run.advance
    on_gpu = torch.cuda.is_available()
    steps = []

    def watched_advance(training):
        advance(training)
        steps.append(training.step)
        if on_gpu:
            mode = "error" if 3 <= training.step < 10 else "default"
            torch.cuda.set_sync_debug_mode(mode)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(run.Run, "advance", watched_advance),
        redirect_stdout(io.StringIO()),
    ):
        argv = [*flags.split(), "--no-deterministic", "--out-dir", f"{folder}/run"]
        if script is train_at_aux:
            train_step.small_network().net.save_pretrained(f"{folder}/teacher")
            images, labels = train_step.random_images(DATASETS["digits"])
            np.savez(f"{folder}/synthetic.npz", image=images, label=labels)
            argv += ["--teacher", f"{folder}/teacher", "--synthetic", f"{folder}/synthetic.npz"]
        try:
            script.main(script.parse_args(argv))
            if on_gpu:
                assert_waits_are_seen()
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            run.end_processes()  # a script that was cut would keep SIGTERM to itself
    return verdict(max(steps) > 10) | {"sync_debug_mode": "error" if on_gpu else NO_GPU}


def assert_waits_are_seen():
    """Raises AssertionError where the debug mode lets a wait pass: then no_waits shows nothing."""
    number = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        number.item()
    except RuntimeError:
        return
    raise AssertionError("CUDA's debug mode does not see a wait for the GPU")


def equal_runs(args):
    """A check: two equal runs of train_at.py on digits end with the same bits. All run at once."""
    command = f"{sys.executable} train_at.py --epochs 4 --eval-every 2"
    if args.toy:
        command += " --n-train 100 --val-size 20 --batch-size 50"
    record = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in ("fp32-1", "fp32-2", "bf16-1", "bf16-2"):
            flags = f"--precision {name[:4]} --out-dir {folder}/{name}"
            words = f"{command} {flags}".split()
            pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            runs.append(subprocess.Popen(words, cwd=measure.ROOT, **pipes))
        errors = [training.communicate()[1] for training in runs]
        for training, error in zip(runs, errors):
            if training.returncode:
                last_line = error.strip().rpartition("\n")[2]
                raise RuntimeError(f"train_at.py: status {training.returncode}, {last_line}")
        for precision in ("fp32", "bf16"):
            first, second = [tensors_of(f"{folder}/{precision}-{i}/last.pt") for i in (1, 2)]
            record[precision] = all(map(torch.equal, first, second))
    return record | verdict(all(record.values()))


def tensors_of(path):
    """The tensors of a checkpoint's model, average and optimiser."""
    parts = ("model", "ema", "optimizer")
    state = files.load(path, dict.fromkeys(parts, dict))
    leaves = tree_leaves([state[part] for part in parts])
    return [leaf for leaf in leaves if torch.is_tensor(leaf)]


# ----------------------------------------------------------------------------------------- speeds


def step_part(args, seconds, model, batch_size, precision, how="eager"):
    """The part of one row of training steps."""
    name = f"step, {model}, {batch_size} images, {precision}, {how}"
    return name, seconds, partial(step_rate, args, model, batch_size, precision, how)


def step_rate(args, model, batch_size, precision, how):
    """Speed of train_at.py's step, with its batches of images in memory."""
    device = start(precision)
    flags = flags_of(args, model, batch_size, precision)
    if how == "compile":
        flags += " --compile"
    n_steps = 1 if args.toy else max(4, 1280 // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        step = train_step.our_step(train_at, flags, folder, device=device)
        seconds_of(step, 3)  # the compiler, cuDNN's trials
        step.batches.waited = 0.0
        seconds = seconds_of(step, n_steps)
    images_per_s = n_steps * step.args.batch_size / seconds
    flop = step_flop(step.args.dataset, step.args.model)
    waited = {"data_wait": step.batches.waited / seconds, "steps": n_steps}
    return rate(model, precision, images_per_s, flop) | waited


def alignment(args, model, batch_size, teacher):
    """The ratio of train_at_aux.py's step to train_at.py's, in turns, in bf16.

    Also the speeds of train_at.py's step and of the teacher's whole pass. ImageNet's images lie in
    memory here, and not in files.
    """
    device = start("bf16")
    network = frozen_network(args, teacher, device, "bf16")
    flags = flags_of(args, model, batch_size, "bf16")
    n_steps, rounds = (1, 1) if args.toy else (5, 3)
    in_memory = train_step.imagenet_in_memory(64 if args.toy else 224)
    with in_memory, tempfile.TemporaryDirectory() as folder:
        plain = train_step.our_step(train_at, flags, folder, device=device)
        aligned = train_step.our_step(train_at_aux, flags, folder, network, device)
        timers = {
            "without": partial(seconds_of, plain, n_steps),
            "with": partial(seconds_of, aligned, n_steps),
        }
        seconds = measure.alternate(timers, rounds)
        flop = step_flop(plain.args.dataset, plain.args.model)
    row = measure.compare("DRA", "AT", seconds["with"], seconds["without"], unit="the cost")
    record = {key: row[key] for key in ("ratio", "low", "high", "rounds")}
    n = plain.args.batch_size
    record |= rate(model, "bf16", n_steps * n / row["reference"], flop)
    noise = torch.randn(n, *network.noise_shape, device=device)
    with torch.no_grad():
        network.denoise(noise, 1.0)
        seconds = seconds_of(lambda: network.denoise(noise, 1.0), n_steps)
    record["teacher"] = rate(teacher, "bf16", n_steps * n / seconds, pass_flop(args, teacher))
    return record


def autoattack_rates(args):
    """Images per second that APGD-CE, its gradients counted as passes, and Square put through."""
    from pyautoattack.square import SquareAttack

    device = start("tf32", deterministic=None)
    spec = DATASETS["digits" if args.toy else "cifar10"]
    torch.manual_seed(0)
    model = models.build("wrn-10-1" if args.toy else "wrn-28-10", spec).to(device).eval()
    model.requires_grad_(False)
    n = 20 if args.toy else 200
    x = torch.rand(n, spec.channels, spec.image_size, spec.image_size, device=device)
    y = model(x).argmax(1)
    passes = 0

    def counted(images):
        nonlocal passes
        logits = model(images)
        passes += len(images) * (2 if logits.requires_grad else 1)
        return logits

    # A radius so small that no image is fooled: fooled ones leave the batch.
    settings = dict(norm="linf", eps=1e-6, seed=0)
    autoattack.apgd_ce(counted, x, y, n_steps=1, **settings)  # cuDNN's trials
    passes = 0
    seconds = seconds_of(lambda: autoattack.apgd_ce(counted, x, y, n_steps=10, **settings))
    record = {"apgd_passes_per_s": passes / seconds, "precision": "tf32", "images": n}

    square = SquareAttack(
        counted, n_queries=10 if args.toy else 100, eps=1e-6, device=device, resc_schedule=False
    )
    autoattack.skip_unchanged(square)
    passes = 0
    seconds = seconds_of(lambda: square.perturb(x, y))
    return record | {"square_queries_per_s": passes / seconds}


def generation(args, precision):
    """Speed of generate_synthetic.sample with DDPM++."""
    network = frozen_network(args, "DDPM++", start(precision, deterministic=None), precision)
    ids = np.arange(8 if args.toy else 250)
    settings = generate_synthetic.parse_args(["--n-steps", "3" if args.toy else "18"])
    warm_up = generate_synthetic.parse_args(["--n-steps", "2"])
    generate_synthetic.sample(network, ids, warm_up)
    seconds = seconds_of(lambda: generate_synthetic.sample(network, ids, settings))
    n_passes = 2 * settings.n_steps - 1
    flop = n_passes * pass_flop(args, "DDPM++")
    return rate("DDPM++", precision, len(ids) / seconds, flop) | {"steps": settings.n_steps}


# ---------------------------------------------------------------------------------------- the run


def attempt(part):
    """The record of a part; of one that raises, the first line of its error."""
    gc.collect()  # what the last part left
    torch.compiler.reset()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    try:
        record = {"status": "done"} | part()
    except Exception as error:  # whatever it is, the other parts shall run
        traceback.print_exc()
        record = {"status": "failed", "error": files.first_line(error)}
    record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else NO_GPU
    return record | {"seconds": time.monotonic() - begin}


def utilisation(records):
    """Measured shares of the peak, {family: {precision: share}}; that of the first record."""
    found = {family: {} for family in cost.SHARES}
    speeds = [*records, *[record.get("teacher", {}) for record in records]]
    for speed in speeds:
        if speed.get("network") in cost.FAMILIES:
            shares = found[cost.FAMILIES[speed["network"]]]
            shares.setdefault(speed["precision"], speed["share_of_h100"])
    return found


def in_words(value):
    """A value of a record as a part of one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(args):
    if not args.toy and not torch.cuda.is_available():
        raise UserError("no GPU: torch.cuda.is_available() is False")
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    found = {"toy": args.toy, "parts": {}, "utilisation": {}, "assumed": cost.SHARES}
    records = found["parts"]
    for name, estimate, part in parts(args):
        skip = end - time.monotonic() < estimate
        records[name] = {"status": SKIP} if skip else attempt(part)
        found["utilisation"] = utilisation(list(records.values()))
        files.write_json(found, args.out)
        print(f"{name}: {in_words(records[name])}", flush=True)

    for name in ("utilisation", "assumed"):
        print(f"{name}: {in_words(found[name])}")
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    skipped = [name for name, record in records.items() if record["status"] == SKIP]
    if failed:
        print(f"failed: {'; '.join(failed)}")
        raise SystemExit(1)
    print(f"nothing failed; skipped: {'; '.join(skipped) or 'nothing'}")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
