"""What runs cost: FLOP, counted on tensors without data, and H100-hours estimated from them.

    python -m benchmarks.cost                      # writes the counted table of docs/costs.md anew
    python -m benchmarks.cost --gpu out/gpu.json   # with the shares that `make gpu` measured

FLOP are 2 x MAC of convolutions and matrix products, by torch's formulae. All else (normalisation,
activations, optimiser, decoding of images, communication) is left to the utilisation: hours are
FLOP / (peak x the share of the peak that is assumed, or measured). Validation and DRA's head, less
than 0.1 % of a step, are not counted. What is measured stands in the other benchmarks.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_at
import train_at_aux
import train_diffusion
from benchmarks import measure
from common import cli, files, models
from evaluation import duration
from published.datasets import DATASETS
from teachers import edm
from teachers.dit import DiT
from teachers.edm import EDMNetwork
from teachers.edm2 import EDM2
from teachers.jit import JiT, JiTNet
from teachers.unet import EDMUNet

# One H100 SXM, dense, by NVIDIA's data sheet; fp32 without tensor cores.
PEAK = {"fp32": 67e12, "bf16": 989e12}
# Shares of the peak, by family of networks: ASSUMPTIONS. Their grounds stand in docs/costs.md.
SHARES = {
    "wide convolutions": {"fp32": 0.6, "bf16": 0.3},
    "narrow convolutions": {"fp32": 0.5, "bf16": 0.1},
    "depthwise convolutions": {"fp32": 0.3, "bf16": 0.08},
    "transformers": {"fp32": 0.5, "bf16": 0.2},
    "diffusion U-Nets": {"fp32": 0.5, "bf16": 0.1},
}
MEASURED = SHARES.keys() - {"narrow convolutions"}  # by `make gpu`
FAMILIES = {
    "wrn-28-10": "wide convolutions",
    "wrn-70-16": "wide convolutions",
    "wrn-16-4": "narrow convolutions",
    "convnext_tiny": "depthwise convolutions",
    "vit_b_16": "transformers",
    "DDPM++": "diffusion U-Nets",
    "U-Net": "diffusion U-Nets",
    "EDM2-img64-s": "diffusion U-Nets",
    "DiT-XL/2": "transformers",
    "JiT-B/16": "transformers",
    "VAE": "diffusion U-Nets",  # DiT's encoder and decoder, whose layers are a U-Net's
}
IMAGENET_SIZE = 1_281_167  # training images; for the other data sets --epoch-images is preset
# Of AutoAttack standard, for an image. A gradient of the image costs as much as a forward pass.
AUTOATTACK_PASSES = sum(
    2 * duration.PASSES[name][0] + duration.PASSES[name][1]
    for name in ("apgd-ce", "apgd-t", "fab-t", "square")
)
# Of runs/cifar10_hour.sh: what decides its costs.
HOUR_UNET = "--channels 128 256 256 256 --layers-per-block 2 --batch-size 256 --train-steps 10000"
HOUR_CLASSIFIER = "--dataset cifar10 --model wrn-16-4 --epochs 40"
HOUR_DRA = f"{HOUR_CLASSIFIER} --teacher out --block up_blocks.1.resnets.2 --sigma 0.1"
DDPM = {  # settings of EDM's DDPM++ for CIFAR-10 that differ from their defaults
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "augment_dim": 9,
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
}
EDM2_S = {  # settings of EDM2-S for 64 pixels that have no default
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
}


def rows():
    """The rows of the table: (words, images in all, {network: FLOP per image}, precisions)."""
    return [
        training("CIFAR-10 or -100, WRN-28-10", "--dataset cifar10"),
        training("the same with DRA", "--dataset cifar10", "DDPM++"),
        training("CIFAR-10 or -100, WRN-70-16", "--dataset cifar10 --model wrn-70-16"),
        training("SVHN, WRN-28-10", "--dataset svhn"),
        training("TinyImageNet, WRN-28-10", "--dataset tiny-imagenet"),
        training("ImageNet, ConvNeXt-T", "--dataset imagenet"),
        training("the same with DRA, K = 2 (default)", "--dataset imagenet", "JiT-B/16"),
        training(
            "the same with DRA, K = 5", "--dataset imagenet --teacher-every 5", "EDM2-img64-s"
        ),
        training("the same with DRA, K = 1", "--dataset imagenet --teacher-every 1", "DiT-XL/2"),
        training("ImageNet, ViT-B/16", "--dataset imagenet --model vit_b_16"),
        # Heun's method calls the network twice a step and once at the last; guidance doubles that.
        generation("1 M images of CIFAR-10, 20 steps", "DDPM++", 1_000_000, 39),
        generation("1.28 M images of ImageNet, 18 steps, guided", "DiT-XL/2", 1_280_000, 70),
        autoattack("AutoAttack of 10,000 images of CIFAR-10", "wrn-28-10", "cifar10", 10_000),
        autoattack("AutoAttack of 5,000 images of ImageNet", "convnext_tiny", "imagenet", 5_000),
        diffusion_training("The hour: its diffusion model"),
        generation("The hour: 100,000 images, 12 steps", "U-Net", 100_000, 23),
        training("The hour: AT or DM-AT, WRN-16-4", HOUR_CLASSIFIER),
        training("The hour: the same with DRA", HOUR_DRA, "U-Net"),
        autoattack("The hour: AutoAttack of 1,000 images", "wrn-16-4", "cifar10", 1_000),
    ]


class FlopCounter(TorchDispatchMode):
    """Adds up FLOP. torch's own FlopCounterMode raises an error at torch.autograd.grad."""

    flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        formula = FORMULAE.get(function.overloadpacket)
        if formula:
            self.flop += formula(*args, **kwargs, out_val=result)
        return result


def convolution_backward(grad, x, weight, *settings, out_val):
    """FLOP of a convolution's backward pass; torch's formula is wrong for grouped weights."""
    wanted = settings[-1]  # of the gradients of input, weights and bias
    one_gradient = 2 * len(grad) * weight.numel() * math.prod(grad.shape[2:])
    return one_gradient * (wanted[0] + wanted[1])


FORMULAE = {**flop_registry, torch.ops.aten.convolution_backward: convolution_backward}


def count(function):
    """FLOP of the convolutions and matrix products in function()."""
    with FlopCounter() as counter:
        function()
    return counter.flop


def classifier(name, dataset):
    """(model, x, y): a classifier in train mode and one image, on the meta device."""
    spec = DATASETS[dataset]
    with torch.device("meta"):
        model = models.build(name, spec).train()
        x = torch.empty(1, spec.channels, spec.image_size, spec.image_size)
        y = torch.zeros(1, dtype=torch.long)
    return model, x, y


def build_diffusion(name):
    """A diffusion network of FAMILIES with random weights, on the current device."""
    if name == "DDPM++":
        config = {"kind": "nvlabs-edm", "precond": "EDMPrecond", "init": DDPM}
        return EDMNetwork(edm.build(config))
    if name == "EDM2-img64-s":
        config = {"kind": "nvlabs-edm", "precond": "Precond", "init": EDM2_S}
        return EDM2(edm.build(config | {"encoder": "StandardRGBEncoder"}))
    if name == "U-Net":
        return EDMUNet(hour_unet()[0])
    if name == "JiT-B/16":
        return JiT(JiTNet(256, 3, 16, 768, 12, 12, 1000, 128, 32, 4), noise_scale=1.0)
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
    )
    transformer = DiTTransformer2DModel(out_channels=8)  # by default DiT-XL/2 at 256 pixels
    levels = torch.linspace(0.01, 150, 1000, device="cpu")  # any: they do not change the count
    network = DiT(transformer, vae, levels)
    network.to(transformer.device)
    return network


def hour_unet():
    """(network, args) of train_diffusion.py in runs/cifar10_hour.sh, on the current device."""
    flags = f"--dataset cifar10 --val-size 1024 {HOUR_UNET}"
    args = train_diffusion.parse_args(flags.split())
    return train_diffusion.build_network(DATASETS["cifar10"], args), args


def diffusion_training(words):
    """A row: train_diffusion.py in runs/cifar10_hour.sh."""
    with torch.device("meta"):
        net, args = hour_unet()
        x = torch.empty(1, 3, 32, 32)
        y = torch.zeros(1, dtype=torch.long)
        normal = torch.zeros(1)
    flop = count(lambda: train_diffusion.edm_loss(net, x, y, normal, x, args).mean().backward())
    return words, args.train_steps * args.batch_size, {"U-Net": flop}, ["fp32", "bf16"]


def training(words, flags, teacher=None):
    """A row: train_at.py, or with a teacher train_at_aux.py, with these flags."""
    script = train_at_aux if teacher else train_at
    args = script.parse_args(flags.split())
    model, x, y = classifier(args.model, args.dataset)

    def step():
        loss, *_ = script.adversarial_loss(model, model, x, y, torch.zeros_like(x), args)
        loss.backward()

    flop = {args.model: count(step)}
    if teacher:
        for name, of_target in teacher_flop(teacher, x, args).items():
            flop[name] = of_target / (args.teacher_every or 1)
    epoch_images = args.epoch_images or IMAGENET_SIZE - DATASETS["imagenet"].val_size
    n_steps = args.epochs * math.ceil(epoch_images / args.batch_size)
    return words, n_steps * args.batch_size, flop, ["fp32", "bf16"]


@torch.no_grad()
def teacher_flop(name, x, args):
    """FLOP of one image's target, {network: FLOP}; the network is left at DRA's block."""
    with torch.device("meta"):
        network = build_diffusion(name)
        noise = torch.empty(1, *network.noise_shape)
    teacher = train_at_aux.Teacher(network, args)
    encoder = count(lambda: network.encode(network.resize(x)))
    target = count(lambda: teacher.targets(x, None, noise))
    return {name: target - encoder, "VAE": encoder}


@torch.no_grad()
def generation(words, name, n, n_calls):
    """A row: n images, each by n_calls of a diffusion network."""
    with torch.device("meta"):
        network = build_diffusion(name)
        noise = torch.empty(1, *network.noise_shape)
    denoise = count(lambda: network.denoise(noise, 1.0))
    decoder = count(lambda: network.decode(noise))
    return words, n, {name: n_calls * denoise, "VAE": decoder}, ["fp32", "bf16"]


def autoattack(words, name, dataset, n):
    """A row: AutoAttack standard on n images, as if none fell: all four attacks to the end."""
    model, x, _ = classifier(name, dataset)
    return words, n, {name: AUTOATTACK_PASSES * count(lambda: model(x))}, ["fp32"]


def hours(n, flop, precision, shares):
    """Hours of one H100 for n images of {network: FLOP per image}. shares: like SHARES."""
    seconds = 0
    for name, flop_per_image in flop.items():
        rate = PEAK[precision] * shares[FAMILIES[name]][precision]
        seconds += n * flop_per_image / rate
    return seconds / 3600


def measured_shares(path):
    """SHARES with those of a result of benchmarks/gpu.py in place of the assumed ones."""
    found = files.read_json(path)
    shares = {}
    with files.reading(path, "a result of `make gpu` on a GPU"):
        if found["toy"]:
            raise ValueError("it is of toy size")
        for family, assumed in SHARES.items():
            measured = found["utilisation"][family] if family in MEASURED else {}
            shares[family] = {name: measured.get(name, share) for name, share in assumed.items()}
            if not all(0 < share < 10 for share in shares[family].values()):
                raise ValueError(f"shares of {family}")
    return shares


def table(shares=SHARES):
    """The counted table of docs/costs.md, as Markdown."""
    lines = [
        "| | GFLOP per image | EFLOP | H100-hours, fp32 | bf16 |",
        "|---|---|---|---|---|",
    ]
    for words, n, flop, precisions in rows():
        parts = [f"{name} {value / 1e9:,.0f}" for name, value in flop.items() if value]
        cells = [words, ", ".join(parts), f"{n * sum(flop.values()) / 1e18:.2f}"]
        for precision in PEAK:
            duration = hours(n, flop, precision, shares)
            digits = 1 if duration >= 1 else 2
            cells.append(f"{duration:.{digits}f}" if precision in precisions else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--gpu", type=cli.path, help="result of `make gpu`, whose shares count")
    return parser.parse_args(argv)


def main(args):
    shares = measured_shares(args.gpu) if args.gpu else SHARES
    files.write_between(measure.DOCUMENT, "python -m benchmarks.cost", f"{table(shares)}\n")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
