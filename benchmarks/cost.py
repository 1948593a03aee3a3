"""What runs cost: FLOP, counted on tensors without data, and H100-hours estimated from them.

    python -m benchmarks.cost   # writes the counted table of docs/costs.md anew

FLOP are 2 x MAC of convolutions and matrix products. All else (normalisation, activations,
optimiser, decoding of images, communication) is left to the utilisation: hours are FLOP / (peak x
the share of the peak that is assumed). What is measured stands in the other benchmarks.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_at
import train_at_aux
from benchmarks import measure
from common import cli, models
from published.datasets import DATASETS
from teachers import edm
from teachers.dit import DiT
from teachers.edm import EDMNetwork

# One H100 SXM, dense, by NVIDIA's data sheet; fp32 without tensor cores.
PEAK = {"fp32": 67e12, "bf16": 989e12}
# Shares of the peak, by family of networks: ASSUMPTIONS. Their grounds stand in docs/costs.md.
UTILISATION = {
    "wide convolutions": {"fp32": 0.6, "bf16": 0.3},
    "depthwise convolutions": {"fp32": 0.3, "bf16": 0.08},
    "transformers": {"fp32": 0.5, "bf16": 0.2},
    "diffusion U-Nets": {"fp32": 0.5, "bf16": 0.1},
}
FAMILY = {
    "wrn-28-10": "wide convolutions",
    "wrn-70-16": "wide convolutions",
    "convnext_tiny": "depthwise convolutions",
    "vit_b_16": "transformers",
    "DDPM++": "diffusion U-Nets",
    "ADM": "diffusion U-Nets",
    "DiT-XL/2": "transformers",
    "VAE": "diffusion U-Nets",  # DiT's encoder and decoder, whose layers are a U-Net's
}
IMAGENET_SIZE = 1_281_167  # training images; for the other data sets --epoch-images is preset


def rows():
    """The rows of the table."""
    return [
        training("CIFAR-10 or -100, WRN-28-10, 400 epochs", "--dataset cifar10"),
        training("the same with DRA, DDPM++", "--dataset cifar10", "DDPM++"),
        training("CIFAR-10 or -100, WRN-70-16", "--dataset cifar10 --model wrn-70-16"),
        training("the same with DRA, DDPM++", "--dataset cifar10 --model wrn-70-16", "DDPM++"),
        training("SVHN, WRN-28-10", "--dataset svhn"),
        training("TinyImageNet, WRN-28-10", "--dataset tiny-imagenet"),
        training("the same with DRA, ADM", "--dataset tiny-imagenet", "ADM"),
        training("ImageNet, ConvNeXt-T, 50 epochs", "--dataset imagenet"),
        training("the same with DRA, DiT-XL/2", "--dataset imagenet", "DiT-XL/2"),
        training("ImageNet, ViT-B/16", "--dataset imagenet --model vit_b_16"),
        generation("1 M images of CIFAR-10, DDPM++, 20 steps", "DDPM++", 1_000_000, 20),
        generation("20 M images", "DDPM++", 20_000_000, 20),
        generation("50 M images", "DDPM++", 50_000_000, 20),
        generation("1.28 M images of ImageNet, DiT-XL/2, guided", "DiT-XL/2", 1_280_000, 18, True),
        autoattack("AutoAttack, WRN-28-10, 10,000 images", "wrn-28-10", "cifar10", 10_000),
        autoattack("AutoAttack, WRN-70-16, 10,000 images", "wrn-70-16", "cifar10", 10_000),
        autoattack("AutoAttack, ConvNeXt-T, 5,000 images", "convnext_tiny", "imagenet", 5_000),
    ]


# ------------------------------------------------------------------------------------- counting


def convolution_backward(grad_shape, x_shape, w_shape, *rest, out_shape=None):
    """FLOP of a convolution's backward pass; torch's formula is wrong for grouped weights.

    rest: the settings; the last one says which gradients (input, weights, bias) are wanted.
    """
    wanted = rest[-1]
    one_gradient = 2 * grad_shape[0] * math.prod(w_shape) * math.prod(grad_shape[2:])
    return one_gradient * (wanted[0] + wanted[1])


def count(function):
    """FLOP of the convolutions and matrix products in function()."""
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Passes:
    """FLOP per image: a forward pass; after it the input's gradient alone, or all the weights'."""

    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def attack_step(self):
        return self.forward + self.input_gradient

    @property
    def training(self):
        return self.forward + self.weight_gradient


def passes_of(model, x):
    """The Passes of a model on a batch x of one image, which may be on the meta device."""
    model.train()  # in eval mode torch may take a fused attention, which is not counted
    x = x.detach().requires_grad_(True)
    forward = count(lambda: model(x))
    model.requires_grad_(False)
    output = model(x).sum()
    input_gradient = count(lambda: torch.autograd.grad(output, x))
    model.requires_grad_(True)
    output = model(x.detach()).sum()
    weight_gradient = count(output.backward)
    return Passes(forward, input_gradient, weight_gradient)


@functools.cache
def classifier(name, dataset):
    """(Passes, length of the feature) of a classifier by the names of --model and --dataset."""
    spec = DATASETS[dataset]
    with torch.device("meta"):
        model = models.build(name, spec)
        x = torch.empty(1, spec.channels, spec.image_size, spec.image_size)
    return passes_of(model, x), model.num_features


def head_flop(num_features, num_targets, args):
    """FLOP per image of DRA's head: forward, and backward to its weights and to the feature."""
    width = args.head_width
    macs = num_features * width + width * width + width * num_targets
    return 3 * 2 * macs


# --------------------------------------------------------------------------- diffusion networks

NVLABS = {  # settings of EDM's networks that differ from their defaults
    "DDPM++": {  # for CIFAR-10
        "img_resolution": 32,
        "img_channels": 3,
        "model_type": "SongUNet",
        "augment_dim": 9,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
    },
    "ADM": {  # for ImageNet of 64 x 64 pixels
        "img_resolution": 64,
        "img_channels": 3,
        "model_type": "DhariwalUNet",
        "label_dim": 1000,
    },
}


def build_diffusion(name):
    """A common.diffusion.Diffusion with random weights, on the current device."""
    if name in NVLABS:
        config = {"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": NVLABS[name]}
        return EDMNetwork(edm.build(config))
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
    )
    transformer = DiTTransformer2DModel(out_channels=8)  # by default DiT-XL/2 at 256 pixels
    levels = torch.linspace(0.01, 150, 1000, device="cpu")  # any: they do not change the count
    return DiT(transformer, vae, levels)


@functools.cache
@torch.no_grad()
def diffusion_flop(name):
    """FLOP per image of a diffusion network by its name: {part: FLOP} and its feature's length.

    Parts: "cut", the network up to its default block; "whole"; "encoder" and "decoder" of its
    latents, 0 where there are none.
    """
    with torch.device("meta"):
        network = build_diffusion(name)
        x = torch.empty(1, network.channels, network.image_size, network.image_size)
        noise = torch.empty(1, *network.noise_shape)
    for module in network.modules:
        module.eval()
    feats = []

    def take_features():
        feats.extend(network.features(x, 1.0, None, [network.default_block], noise))

    encoder = count(lambda: network.encode(x))
    flop = {
        "cut": count(take_features) - encoder,
        "whole": count(lambda: network.denoise(noise, 1.0)),
        "encoder": encoder,
        "decoder": count(lambda: network.decode(noise)),
    }
    return flop, feats[0].shape[1]


# ------------------------------------------------------------------------------------- the runs


@dataclass
class Row:
    """A run. attack, loss, diffusion: FLOP per image, as docs/costs.md explains them.

    work: {family: FLOP of the whole run}. validation: the same of training's validation, which
    train_at.py computes in fp32 whatever its precision; None where the script has no --precision.
    """

    words: str
    work: dict
    attack: int = 0
    loss: int = 0
    diffusion: int = 0
    validation: dict | None = None

    def hours(self, precision):
        """Hours of one H100 by the assumed utilisation."""
        return hours(self.work, precision) + hours(self.validation or {}, "fp32")


def hours(work, precision):
    """Hours of one H100 for work, {family: FLOP}."""
    seconds = 0
    for family, flop in work.items():
        seconds += flop / (PEAK[precision] * UTILISATION[family][precision])
    return seconds / 3600


def step_flop(args, passes):
    """(FLOP of the attack, FLOP of the loss) per image of a step of train_at.py."""
    attack = args.n_steps * passes.attack_step
    if args.attack == "apgd":
        attack += passes.forward  # the loss of its last point
    n_passes = 2 if args.loss == "trades" else 1
    return attack, n_passes * passes.training


def validation_flop(args, passes):
    """FLOP per held-out image of one validation of train_at.py."""
    return args.eval_n_steps * passes.attack_step + 2 * passes.forward


def autoattack_flop(passes):
    """FLOP of AutoAttack standard on an image that withstands it: all four attacks to the end."""
    n_targets = 9
    n_steps = 100
    n_queries = 5000
    apgd = (1 + n_targets) * (n_steps + 1) * passes.attack_step  # APGD-CE and APGD-T
    fab = n_targets * n_steps * (passes.attack_step + passes.forward)
    square = n_queries * passes.forward
    return apgd + fab + square


def training(words, flags, teacher=None):
    """A row: train_at.py, or with a teacher train_at_aux.py, with these flags. No start-up."""
    script = train_at_aux if teacher else train_at
    args = script.parse_args(flags.split())
    passes, num_features = classifier(args.model, args.dataset)
    attack, loss = step_flop(args, passes)
    validation = validation_flop(args, passes)
    diffusion = 0
    images = args.epoch_images or IMAGENET_SIZE - args.val_size
    n = args.epochs * math.ceil(images / args.batch_size) * args.batch_size
    work = Counter({FAMILY[args.model]: n * (attack + loss)})
    if teacher:
        flop, num_targets = diffusion_flop(teacher)
        head = head_flop(num_features, num_targets, args)
        diffusion = flop["cut"] + flop["encoder"] + head
        validation += passes.forward  # the alignment of held-out images
        work[FAMILY[teacher]] += n * (flop["cut"] + head)
        work[FAMILY["VAE"]] += n * flop["encoder"]
    n_held_out = math.ceil(args.epochs / args.eval_every) * args.val_size
    validation = {FAMILY[args.model]: n_held_out * validation}
    return Row(words, work, attack, loss, diffusion, validation)


def generation(words, name, n, n_steps, guided=False):
    """A row: n images by a diffusion network and Heun's method; guidance doubles the calls."""
    flop, _ = diffusion_flop(name)
    n_calls = (2 * n_steps - 1) * (2 if guided else 1)
    network = n_calls * flop["whole"]
    work = Counter({FAMILY[name]: n * network})
    work[FAMILY["VAE"]] += n * flop["decoder"]
    return Row(words, work, diffusion=network + flop["decoder"])


def autoattack(words, model, dataset, n):
    """A row: AutoAttack standard on n images, as if none fell."""
    passes, _ = classifier(model, dataset)
    attack = autoattack_flop(passes)
    return Row(words, {FAMILY[model]: n * attack}, attack=attack)


# ------------------------------------------------------------------------------------ the table


def digits(value):
    """A number in three significant digits, without an exponent: 0.123, 12.3, 1,230; "" for 0."""
    if value == 0:
        return ""
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(rounded)))
    return f"{rounded:,.{decimals}f}"


def table():
    """The counted table of docs/costs.md, and what is assumed, as Markdown."""
    lines = [
        "| | attack | loss | diffusion | EFLOP | validation | H100-hours, fp32 | bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        validation = sum((row.validation or {}).values())
        flop = sum(row.work.values()) + validation
        cells = [
            row.words,
            digits(row.attack / 1e9),
            digits(row.loss / 1e9),
            digits(row.diffusion / 1e9),
            digits(flop / 1e18),
            f"{validation / flop:.0%}" if row.validation else "",
            digits(row.hours("fp32")),
            digits(row.hours("bf16")) if row.validation else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    shares = [f"{name} {u['fp32']:.0%} and {u['bf16']:.0%}" for name, u in UTILISATION.items()]
    lines.append("")
    lines.append("Shares of the peak that are assumed, in fp32 and in bf16:")
    lines.append(f"{'; '.join(shares)}.")
    return "\n".join(lines)


def main(args):
    measure.write_between("python -m benchmarks.cost", table())


if __name__ == "__main__":
    cli.run_script(main, cli.Parser(__doc__).parse_args())
