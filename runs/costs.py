"""What the rows of runs/*.sh cost: FLOP, counted on the meta device, and from them an ESTIMATE of GPU-hours.

    python -m runs.costs                       # every script with estimates
    python -m runs.costs runs/cifar10.sh       # one of them
    python -m runs.costs --update              # and writes the estimates into the scripts' comments

A row is one command of a run script, read by that command's own parser: steps, attack, precision and model cannot drift.
FLOP are 2 x MAC of convolutions and matrix products; all else (normalisation, activations, optimiser, decoding of images,
communication) is left to the utilisation, an assumption, as the hours are: FLOP / (peak x utilisation). The scripts turn TF32
off, so "fp32" is the peak without tensor cores. Training is counted as train_at.py and train_at_aux.py do it: `step_parts`.
"""

import functools
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import extract_features
import generate_synthetic
import train_at
import train_at_aux
import train_diffusion
from common import cli, data, diffusion, edm, models

ROOT = Path(__file__).resolve().parent.parent
# Dense, SXM boards, as NVIDIA's data sheets have them.
PEAKS = ["H100:fp32=67", "H100:bf16=989", "A100:fp32=19.5", "A100:bf16=312"]
ESTIMATE = re.compile(r"# estimate: ([\d.,]+) H100-hours")
# Images to train (those held out for validation included) and to test.
N_IMAGES = {
    **{"digits": (1_000, 797), "fashion-mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)},
    **{"svhn": (73_257, 26_032), "tiny-imagenet": (100_000, 10_000), "imagenet": (1_281_167, 50_000)},
}
# AutoAttack standard: iterations of APGD and FAB, target classes of their targeted versions, queries of Square.
AA_ITERATIONS, AA_TARGETS, AA_QUERIES = 100, 9, 5000
RAND_PASSES, TRANSFER_STEPS = 20, 40
CLASSIFIERS = [
    *(("wrn-28-10", "cifar10"), ("wrn-70-16", "cifar10"), ("preact-18", "cifar10"), ("vit-b-2", "cifar10"), ("vit-s-2", "cifar10")),
    *(("wrn-28-10", "tiny-imagenet"), ("convnext_tiny", "imagenet"), ("vit_b_16", "imagenet"), ("swin_b", "imagenet")),
]
# Constructor arguments of NVlabs' (and DM-AT's) networks that differ from common/edm.py's defaults.
_DDPMPP = dict(img_resolution=32, img_channels=3, model_type="SongUNet", augment_dim=9, model_channels=128, channel_mult=[2, 2, 2])
EDM_FILES = {
    "edm-cifar10-32x32-uncond-vp.pkl": _DDPMPP,
    "edm-cifar10-32x32-cond-vp.pkl": _DDPMPP | {"label_dim": 10},
    "edm-cifar100-cond-32x32-cond-vp.pkl": _DDPMPP | {"label_dim": 100},
    "edm-imagenet-64x64-cond-adm.pkl": dict(img_resolution=64, img_channels=3, model_type="DhariwalUNet", label_dim=1000),
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("scripts", nargs="*", help="run scripts (default: those in runs/ with estimates)")
    parser.add_argument("--peak-tflops", nargs="+", metavar="GPU:PRECISION=TFLOPS", default=PEAKS, help="peaks, in place of or beside")
    parser.add_argument("--utilisation", type=cli.positive, default=0.35, help="share of the peak that is reached: an assumption")
    parser.add_argument("--update", action="store_true", help="write the H100-hours into the scripts' comments `# estimate: ...`")
    args = parser.parse_args(argv)
    args.peaks = {}
    for text in [*PEAKS, *args.peak_tflops]:
        match = re.fullmatch(r"([\w-]+):(fp32|bf16)=(\d+(?:\.\d+)?)", text)
        if not match or float(match[3]) == 0:
            parser.error(f"argument --peak-tflops: '{text}', expected such as H100:bf16=989")
        args.peaks.setdefault(match[1], {})[match[2]] = float(match[3]) * 1e12
    for gpu, peaks in args.peaks.items():
        if len(peaks) < 2:
            parser.error(f"argument --peak-tflops: {gpu} needs both fp32 and bf16")
    return args


# --------------------------------------------------------------------------------------------------- counting FLOP


def _convolution_backward(grad_shape, x_shape, w_shape, *rest, out_shape=None):
    """FLOP of a convolution's backward pass. torch's own formula is wrong for the weights of grouped convolutions."""
    transposed, output_mask = rest[-4], rest[-1]
    positions = math.prod((x_shape if transposed else grad_shape)[2:])
    return 2 * grad_shape[0] * math.prod(w_shape) * positions * (output_mask[0] + output_mask[1])


def count(function):
    """FLOP of the convolutions and matrix products in function(). No torch.autograd.grad of a forward pass inside: torch refuses."""
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Passes:
    """FLOP per image of a network: forward; gradient of the input alone, after it; gradient of the weights, after it."""

    forward: int
    gradient: int
    backward: int
    num_features: int = 0


def passes_of(network, x):
    """The Passes of a network on the batch x, which may be on the meta device."""
    network.train()  # in eval mode torch may take a fused attention that is not counted
    x = x.detach().requires_grad_(True)
    forward = count(lambda: network(x))
    network.requires_grad_(False)
    output = network(x).sum()
    gradient = count(lambda: torch.autograd.grad(output, x))
    network.requires_grad_(True)
    output = network(x.detach()).sum()
    backward = count(output.backward)
    return Passes(*(n // len(x) for n in (forward, gradient, backward)), getattr(network, "num_features", 0))


@functools.cache
def classifier_passes(model, dataset):
    """The Passes of a classifier by the names of --model and --dataset."""
    spec = data.DATASETS[dataset]
    with torch.device("meta"):
        return passes_of(models.build(model, spec), torch.empty(1, spec.channels, spec.image_size, spec.image_size))


@functools.cache
def head_flop(num_features, width, num_targets):
    """FLOP per image of train_at_aux.py's alignment head: forward, and backward to its weights and to the feature."""
    with torch.device("meta"):
        head, features = train_at_aux.alignment_head(num_features, width, num_targets), torch.empty(1, num_features, requires_grad=True)
    output = head(features).sum()
    return count(lambda: head(features)) + count(output.backward)


# ------------------------------------------------------------------------------------------------ diffusion networks


def published(name):
    """The diffusion model, of random weights on the current device, that a public name stands for; None for any other name."""
    import diffusers

    if os.path.basename(name) in EDM_FILES:
        init = EDM_FILES[os.path.basename(name)]
        return diffusion.EDMNetwork(edm.build({"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": init}))
    with torch.device("cpu"):  # both have DDPM's linear schedule
        abar = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02).alphas_cumprod.double()
        levels = ((1 - abar) / abar).sqrt()
    if name == "hub:google/ddpm-cifar10-32":
        kinds = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
        how = dict(down_block_types=kinds, up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])
        how |= dict(sample_size=32, block_out_channels=[128, 256, 256, 256], attention_head_dim=None, downsample_padding=0)
        return diffusion.DDPM(diffusers.UNet2DModel(**how), levels)
    if name == "hub:facebook/DiT-XL-2-256":  # DiTTransformer2DModel's defaults are DiT-XL/2's at 256 pixels
        kinds = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
        vae = diffusers.AutoencoderKL(**kinds, block_out_channels=[128, 256, 512, 512], layers_per_block=2)
        return diffusion.DiT(diffusers.DiTTransformer2DModel(out_channels=8), vae, levels)
    return None


def own_network(args):
    """The model that train_diffusion.py would train with the parsed arguments `args`."""
    return diffusion.EDMUNet(train_diffusion.build_network(data.DATASETS[args.dataset], args))


class Network:
    """A diffusion model on the meta device, and what its parts cost."""

    def __init__(self, model):
        self.model, self.cuts = model, {}
        for module in model.modules:
            module.eval().requires_grad_(False)
        self.x = torch.empty(1, model.channels, model.image_size, model.image_size, device="meta")
        self.noise = torch.empty(1, *model.noise_shape, device="meta")

    @torch.no_grad()
    def cut(self, block):
        """(FLOP of Diffusion.features, which leaves the network at the block; the feature's length)."""
        if block not in self.cuts:
            found = []
            flop = count(lambda: found.extend(self.model.features(self.x, self.model.default_sigma, None, [block], self.noise)))
            self.cuts[block] = flop, found[0].shape[1]
        return self.cuts[block]

    @functools.cached_property
    def whole(self):
        """FLOP of one network call, without the encoder and decoder of a latent model."""
        with torch.no_grad():
            return count(lambda: self.model.denoise(self.noise, 1.0))

    @functools.cached_property
    def encoder(self):
        with torch.no_grad():
            return count(lambda: self.model.encode(self.x))

    @functools.cached_property
    def decoder(self):
        with torch.no_grad():
            return count(lambda: self.model.decode(self.noise))

    @functools.cached_property
    def training(self):
        """FLOP of one image in train_diffusion.py: forward and backward."""
        self.model.net.train().requires_grad_(True)
        loss = self.model.denoise(self.noise, 1.0).sum()
        flop = self.whole + count(loss.backward)
        self.model.net.eval().requires_grad_(False)
        return flop


@functools.cache
def public_network(name):
    """The Network of `published`, or None."""
    with torch.device("meta"):
        model = published(name)
    return model and Network(model)


# --------------------------------------------------------------------------------------------------- what a row costs


@dataclass
class Row:
    """One command. flop: {"fp32": FLOP, "bf16": FLOP} of the whole run, in GPU work, start-up counted for one GPU."""

    name: str
    unit: str  # what `per_image` is of
    forward: float  # one forward pass of the network
    per_image: float
    flop: dict = field(default_factory=lambda: {"fp32": 0, "bf16": 0})
    dra: float | None = None  # a step's cost with DRA over that without, less 1

    @property
    def total(self):
        return sum(self.flop.values())

    def hours(self, peaks, utilisation):
        return sum(flop / (peaks[precision] * utilisation) for precision, flop in self.flop.items()) / 3600


def train_steps(args):
    """Optimiser steps of train_at.py and train_at_aux.py."""
    images = args.epoch_images or args.n_train or N_IMAGES[args.dataset][0] - args.val_size
    return args.epochs * math.ceil(images / args.batch_size)


def step_parts(args, passes, teacher=None, head=None):
    """FLOP per image of one training step by its parts: adversarial_loss of train_at.py or, given teacher and head, train_at_aux.py.

    The clean pass serves the attack's KL as its reference; the attack computes no weight gradients.
    """
    train, parts = passes.forward + passes.backward, {}
    aligned = args.align if teacher is not None else "adv"
    if args.loss != "pgd":
        parts["clean"] = train
    elif aligned != "adv":
        parts["clean, for DRA"] = train
    if args.loss != "standard":
        parts["attack"] = args.n_steps * (passes.forward + passes.gradient)
        if args.attack == "apgd":  # the loss at its last point
            parts["attack"] += passes.forward
        elif args.loss == "trades" and args.attack_bn == "running":  # a reference in the attack's own mode
            parts["attack"] += passes.forward
        parts["adversarial"] = train
    if teacher is not None:
        parts["teacher"] = teacher
        parts["head"] = head * (2 if aligned == "both" else 1)
    return parts


def training_row(args, aux, networks):
    passes = classifier_passes(args.model, args.dataset)
    teacher = head = None
    if aux:
        network = find(networks, args.teacher, "--teacher")
        teacher, width = network.cut(args.block or network.model.default_block)
        head = head_flop(passes.num_features, args.head_width, width)
    parts = step_parts(args, passes, teacher, head)
    step = sum(parts.values())
    row = Row(args.out_dir, "image and step", passes.forward, step)
    row.flop[args.precision] += step * args.batch_size * train_steps(args)
    validations = math.ceil(args.epochs / args.eval_every)
    validation = args.eval_n_steps * (passes.forward + passes.gradient) + 2 * passes.forward
    row.flop["fp32"] += validations * args.val_size * validation  # outside autocast, whatever --precision
    if aux:
        row.dra = step / sum(step_parts(args, passes).values()) - 1
        n_train = N_IMAGES[args.dataset][0]
        row.flop["fp32"] += validations * args.val_size * passes.forward  # validation_alignment
        row.flop["fp32"] += teacher * (min(10_000, n_train - args.val_size) + args.val_size)  # teacher_mean, val_targets
    return row


def generation_row(args, networks, classifiers):
    network = find(networks, args.diffusion, "--diffusion")
    calls = (2 * args.n_steps - 1) * (1 if args.guidance_scale == 1 else 2)
    row = Row(args.out_dir, "image", network.whole, calls * network.whole + network.decoder)
    if args.classifier:
        model = made_by(classifiers, os.path.dirname(args.classifier), "--classifier")
        row.per_image += classifier_passes(model, args.dataset).forward
    row.flop["fp32"] = row.per_image * args.n_images
    return row


def evaluation_row(args, classifiers):
    """As if every image were robust, so that every attack runs on it to the end; sanity checks are not counted."""
    if args.model in evaluate.GENERATIVE:
        raise cli.UserError(f"evaluate.py --model {args.model}: its cost is not known here")
    folder = os.path.dirname(args.checkpoint)
    passes = classifier_passes(args.model or made_by(classifiers, folder, "--checkpoint"), args.dataset)
    row = Row(f"{folder}, {args.attack}", "robust image", passes.forward, attack_flop(args, passes))
    row.flop["fp32"] = row.per_image * (args.n_images or N_IMAGES[args.dataset][1]) * len(args.eps)
    return row


def attack_flop(args, passes):
    """FLOP of an attack of evaluate.py on one image that withstands it."""
    step = passes.forward + passes.gradient
    apgd = (AA_ITERATIONS + 1) * step
    flop = {
        "clean": passes.forward,
        "pgd": args.n_restarts * args.eot * (args.n_steps * step + passes.forward),
        "transfer": TRANSFER_STEPS * step + passes.forward,
        "apgd": (1 + AA_TARGETS) * apgd,  # APGD-CE and APGD-T
        "rand": 2 * RAND_PASSES * apgd,  # APGD-CE and APGD-DLR
    }
    fab = AA_TARGETS * AA_ITERATIONS * (step + passes.forward)
    return flop.get(args.attack, flop["apgd"] + fab + AA_QUERIES * passes.forward)


def extraction_row(args, networks):
    network = find(networks, args.diffusion, "--diffusion")
    last = max(args.blocks or network.model.blocks, key=network.model.blocks.index)
    cut, _ = network.cut(last)
    row = Row(args.out_dir, "image", network.whole, cut * len(args.sigmas))
    row.flop["fp32"] = row.per_image * sum(N_IMAGES[args.dataset])
    return row


def diffusion_row(args, network):
    row = Row(args.out_dir, "image and step", network.whole, network.training)
    samples = min(10, data.DATASETS[args.dataset].num_classes) * 10 * (2 * 18 - 1)
    row.flop["fp32"] = row.per_image * args.batch_size * args.train_steps
    row.flop["fp32"] += math.ceil(args.train_steps / args.eval_every) * (args.val_size + samples) * network.whole
    return row


def made_by(classifiers, folder, flag):
    """The --model of the command above that trains into the folder."""
    if folder not in classifiers:
        raise cli.UserError(f"{flag} {folder}: no command above it trains there")
    return classifiers[folder]


def find(networks, name, flag):
    """The Network of a directory that the script makes, of an NVlabs file, or of the hub."""
    network = networks.get(name) or public_network(name)
    if network is None:
        raise cli.UserError(f"{flag} {name}: neither made by a command above it, nor one of the published networks known here")
    return network


# ------------------------------------------------------------------------------------------------------- run scripts


def commands(path):
    """(line number, script, argv) of every command that stands by itself at the start of a line of a run script."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise cli.UserError(f"{path}: not a readable run script ({error})") from None
    for number, line in enumerate(lines):
        match = re.match(r"(?:torchrun --nproc_per_node \d+|python) (-m common\.edm|\w+\.py)( .*)?$", line.split("  #")[0].rstrip())
        if match:
            yield number, match[1].removeprefix("-m ").removesuffix(".py"), shlex.split(match[2] or "")


def rows_of(path):
    """[(line number, Row)] of the commands of a run script that cost anything, in their order."""
    rows, networks, classifiers = [], {}, {}  # directories that commands made so far: diffusion networks, classifiers' names
    for number, script, argv in commands(path):
        if script == "common.edm":
            args = edm.parse_args(argv)
            networks[args.out_dir] = find({}, args.network, "convert")
        elif script in ("train_at", "train_at_aux"):
            args = (train_at if script == "train_at" else train_at_aux).parse_args(argv)
            classifiers[args.out_dir] = args.model
            rows.append((number, training_row(args, script == "train_at_aux", networks)))
        elif script == "train_diffusion":
            args = train_diffusion.parse_args(argv)
            with torch.device("meta"):
                networks[args.out_dir] = Network(own_network(args))
            rows.append((number, diffusion_row(args, networks[args.out_dir])))
        elif script == "generate_synthetic":
            rows.append((number, generation_row(generate_synthetic.parse_args(argv), networks, classifiers)))
        elif script == "extract_features":
            rows.append((number, extraction_row(extract_features.parse_args(argv), networks)))
        elif script == "evaluate":
            rows.append((number, evaluation_row(evaluate.parse_args(argv), classifiers)))
    return rows


def digits(value, n=3):
    """A positive number in n significant digits, without an exponent: 0.123, 12.3, 1,230."""
    return f"{float(f'{value:.{n}g}'):,.{max(0, n - 1 - math.floor(math.log10(value)))}f}"


def update(path, rows, peaks, utilisation):
    """Write the rows' H100-hours into their lines' comments."""
    lines = Path(path).read_text().splitlines()
    for number, row in rows:
        estimate = f"# estimate: {digits(row.hours(peaks['H100'], utilisation))} H100-hours"
        found = ESTIMATE.search(lines[number])
        lines[number] = ESTIMATE.sub(estimate, lines[number]) if found else f"{lines[number]}  {estimate}"
    Path(path).write_text("\n".join(lines) + "\n")


def print_networks():
    print("\nClassifiers, GFLOP per image (2 x MAC):\n")
    print("| network | pixels | forward | input gradient, after it | weight gradients, after it |\n|---|---|---|---|---|")
    for model, dataset in CLASSIFIERS:
        passes = classifier_passes(model, dataset)
        numbers = " | ".join(digits(n / 1e9, 4) for n in (passes.forward, passes.gradient, passes.backward))
        print(f"| {model} | {data.DATASETS[dataset].image_size} | {numbers} |")
    print("\nDiffusion networks, GFLOP per image (2 x MAC):\n")
    print("| network | DRA's default block | up to it, encoder included | whole network | encoder | decoder |\n|---|---|---|---|---|---|")
    for name in [*EDM_FILES, "hub:google/ddpm-cifar10-32", "hub:facebook/DiT-XL-2-256"]:
        network = public_network(name)
        parts = [network.cut(network.model.default_block)[0], network.whole, network.encoder, network.decoder]
        numbers = " | ".join(digits(n / 1e9, 4) if n else "-" for n in parts)
        print(f"| {name} | {network.model.default_block} | {numbers} |")


def print_rows(path, rows, args):
    titles = " | ".join(f"one {gpu}, hours, ESTIMATE" for gpu in args.peaks)
    print(f"\n{path}:\n")
    print(f"| row | GFLOP (2 x MAC), one forward pass | GFLOP, all passes | per | DRA adds | PFLOP, whole run | {titles} |")
    print("|---" * (6 + len(args.peaks)) + "|")
    lines = {}  # the numbers of a row: the names of all rows that share them
    for _, row in rows:
        dra = f"{row.dra:.1%}" if row.dra is not None else ""
        hours = " | ".join(digits(row.hours(peaks, args.utilisation)) for peaks in args.peaks.values())
        numbers = f"{digits(row.forward / 1e9, 4)} | {digits(row.per_image / 1e9, 4)} | {row.unit}"
        lines.setdefault(f"{numbers} | {dra} | {digits(row.total / 1e15)} | {hours}", []).append(row.name)
    for numbers, names in lines.items():
        print(f"| {'; '.join(names[:3])}{f'; and {len(names) - 3} more' if len(names) > 3 else ''} | {numbers} |")
    if rows:
        total = sum(row.total for _, row in rows)
        hours = " | ".join(digits(sum(row.hours(peaks, args.utilisation) for _, row in rows)) for peaks in args.peaks.values())
        print(f"| all {len(rows)} rows | | | | | {digits(total / 1e15)} | {hours} |")


def main(args):
    scripts = args.scripts or [p for p in sorted((ROOT / "runs").glob("*.sh")) if "# estimate: " in p.read_text()]
    peaks = ", ".join(f"{gpu} {precision} {peak / 1e12:g}" for gpu, of in args.peaks.items() for precision, peak in of.items())
    print(f"Hours are ESTIMATES, not measured: FLOP / (peak x {args.utilisation:g}); peaks in TFLOP/s: {peaks}.")
    print("Evaluation is counted as if every test image were robust, without its sanity checks.")
    print_networks()
    for path in scripts:
        rows = rows_of(path)
        print_rows(os.path.relpath(path), rows, args)
        if args.update:
            update(path, rows, args.peaks, args.utilisation)


if __name__ == "__main__":
    cli.run(main, parse_args())
