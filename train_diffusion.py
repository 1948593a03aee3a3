"""Train a small class-conditional diffusion model, where no public one fits.

It is the source of images (DM-AT) and of representations (DRA). The network F is a diffusers
UNet2DModel under EDM's preconditioning (Karras et al., arXiv 2206.00364, table 1):

    D(x; sigma, y) = c_skip x + c_out F(c_in x; ln(sigma) / 4, y)
    L = E [ (sigma^2 + sd^2) / (sigma sd)^2 * || D(x + sigma n; sigma, y) - x ||^2 ]

over images x in [-1, 1] with labels y, n ~ N(0, I) and ln sigma ~ N(P_mean, P_std^2); sd is
--sigma-data. The label is dropped with probability --label-dropout, so that one network is both
conditional (it generates labelled images) and unconditional (its features cannot leak the label).

    python train_diffusion.py                        # digits, 2 minutes on two CPU cores
    torchrun --nproc_per_node 8 train_diffusion.py   # the same with 8 processes

Writes the averaged network to --out-dir as diffusers.UNet2DModel.from_pretrained reads it; the
layer of --self-conditioning is then left out. Running the same command again resumes. The
preconditioning stands in common/diffusion.py.
"""

import argparse
import dataclasses
import math
import os

import numpy as np
import torch

from common import UserError, cli, data, diffusion, files
from common.run import (
    Meters,
    Run,
    autocast,
    end_processes,
    make_average,
    read_once,
    save_images,
    start_processes,
    sum_over_ranks,
    update_average,
    wrap,
)
from published.datasets import DATASETS, open_dataset
from teachers import parts, sampling
from teachers.load import load_diffusion
from teachers.unet import EDMUNet

SWITCH = argparse.BooleanOptionalAction  # --flag and --no-flag


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_data_flags(parser, DATASETS).add_argument
    add("--n-labels", type=cli.count0, help="only the first so many training images have a label")
    add = parser.add_argument_group("network").add_argument
    add("--init", type=cli.path, help="weights to start from: a directory of this script")
    add(
        "--patch",
        type=cli.count,
        default=1,
        help="P: P x P pixels become the channels of one place",
    )
    add("--channels", type=cli.count, nargs="+", default=[24, 48], help="of each resolution")
    add("--layers-per-block", type=cli.count, default=1, help="residual blocks per resolution")
    what = "add the middle block's pooled output to the decoder's embedding (after DDAE++)"
    # None, not False: runs that were made before this flag existed can be resumed.
    add("--self-conditioning", action="store_true", default=None, help=what)
    add = parser.add_argument_group("loss").add_argument
    add("--p-mean", type=cli.ratio, default=-1.2, help="mean of ln sigma")
    add("--p-std", type=cli.positive, default=1.2, help="standard deviation of ln sigma")
    add("--sigma-data", type=cli.positive, default=0.5, help="assumed deviation of x in [-1, 1]")
    add("--label-dropout", type=cli.fraction, default=0.1, help="probability of the null label")
    add = parser.add_argument_group("optimisation").add_argument
    add("--train-steps", type=cli.count, default=1200, help="optimiser steps")
    add("--batch-size", type=cli.batch, default=128, help="global batch size, images")
    add("--lr", type=cli.positive, default=2e-3, help="peak learning rate of Adam, cosine to 0")
    add("--warmup-steps", type=cli.count0, default=100, help="steps of linear warm-up")
    add("--ema-decay", type=cli.fraction, default=0.995, help="per step, of the averaged network")
    add = parser.add_argument_group("run").add_argument
    add("--eval-every", type=cli.count, default=200, help="steps between validations, checkpoints")
    add("--out-dir", type=cli.path, help="run directory (default: out/diffusion-<dataset>)")
    cli.add_check_flag(add)
    cli.add_precision_flag(add)
    add("--deterministic", action=SWITCH, help="equal runs equal to the bit (on for digits)")
    add("--seed", type=cli.seed, default=0, help="seed of all randomness")
    args = parser.parse_args(argv)
    parser.check_data_flags(argv, args)
    args.out_dir = args.out_dir or f"out/diffusion-{args.dataset}"
    if args.deterministic is None:
        args.deterministic = args.dataset == "digits"
    if any(channels % 8 for channels in args.channels):
        expected = "expected multiples of 8 (the groups of GroupNorm)"
        parser.error(f"argument --channels: {args.channels}, {expected}")
    return args


# ---------------------------------------------------------------------------------- the method


def edm_loss(net, x, labels, normal, noise, args):
    """EDM's denoising loss per image (B,), averaged over pixels.

    x: clean images (B, C, H, W) in [-1, 1]. labels: (B,) int64, num_classes meaning none.
    normal: (B,), for sigma, and noise: like x; both standard normal.
    """
    sigma = (args.p_mean + args.p_std * normal).exp()
    noisy = x + sigma.view(-1, 1, 1, 1) * noise
    denoised = diffusion.edm_denoise(net, noisy, sigma, labels, args.sigma_data, args.patch)
    weight = (sigma**2 + args.sigma_data**2) / (sigma * args.sigma_data) ** 2
    return weight * ((denoised - x) ** 2).mean((1, 2, 3))


def lr_at(step, args):
    """Learning rate of a step: linear warm-up times half a cosine to 0."""
    warmup = min(1.0, (step + 1) / max(1, args.warmup_steps))
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / args.train_steps))


def ema_decay_at(step, args):
    """Decay of the average after `step` finished steps: it grows with them to --ema-decay."""
    return min(args.ema_decay, step / (9 + step))


def draw(step, x, y, mine, num_classes, args):
    """A step's randomness for images x with labels y: (labels after dropout, normal, noise).

    It is drawn for the global batch, of which x and y are the rows `mine`, so that it does not
    depend on the number of processes. As edm_loss takes it.
    """
    n = args.batch_size
    generator = data.stream(args.seed, "edm-loss", step, x.device)
    dropped = torch.rand(n, generator=generator, device=x.device) < args.label_dropout
    normal = torch.randn(n, generator=generator, device=x.device)
    noise = torch.randn(n, *x.shape[1:], generator=generator, device=x.device)
    return torch.where(dropped[mine], num_classes, y), normal[mine], noise[mine]


@torch.no_grad()
def validate(net, x, y, mine, batch_size, args):
    """Mean EDM loss on held-out images x in [0, 1], with fixed noise and their true labels.

    x, y: this rank's, which are the rows `mine` of all. batch_size: images in one pass.
    """
    generator = data.stream(args.seed, "edm-validation", 0, x.device)
    normal = torch.randn(args.val_size, generator=generator, device=x.device)
    noise = torch.randn(args.val_size, *x.shape[1:], generator=generator, device=x.device)
    all_parts = [v.split(batch_size) for v in (2 * x - 1, y, normal[mine], noise[mine])]
    losses = [edm_loss(net, *parts, args) for parts in zip(*all_parts)]
    return (sum_over_ranks(torch.cat(losses).sum()) / args.val_size).item()


def samples(net, spec, args, device):
    """Images (100, C, H, W) in [0, 1]: ten of each of the first ten classes, class by class.

    Ten in all where there are no classes. The noise is the same every time.
    """
    y = torch.arange(max(1, min(10, spec.num_classes)), device=device).repeat_interleave(10)
    shape = (len(y), spec.channels, spec.image_size, spec.image_size)
    generator = data.stream(args.seed, "grid", 0, device)
    noise = torch.randn(shape, generator=generator, device=device)

    def denoise(noisy, sigma):
        return diffusion.edm_denoise(net, noisy, sigma, y, args.sigma_data, args.patch)

    x = sampling.heun(denoise, noise, sampling.sigma_steps(18, 0.002, 80, 7))
    return (x + 1) / 2


def build_network(spec, args):
    """F of the docstring: a UNet2DModel for one label more than the data set has, the null label.

    Its config also holds what teachers.load needs to know of the training.
    """
    import diffusers

    from teachers.self_conditioned import SelfConditionedUNet

    kind = SelfConditionedUNet if args.self_conditioning else diffusers.UNet2DModel
    levels = len(args.channels)
    net = kind(
        sample_size=spec.image_size // args.patch,
        in_channels=spec.channels * args.patch**2,
        out_channels=spec.channels * args.patch**2,
        block_out_channels=args.channels,
        layers_per_block=args.layers_per_block,
        down_block_types=["DownBlock2D"] * levels,
        up_block_types=["UpBlock2D"] * levels,
        norm_num_groups=8,
        num_class_embeds=spec.num_classes + 1,
    )
    net.register_to_config(
        sigma_data=args.sigma_data,
        label_dropout=args.label_dropout,
        val_size=args.val_size,
        patch=args.patch,
        classes=spec.classes,
    )
    return net


def partly_labelled(images, labels, n_labels, null):
    """(images, labels) where the first n_labels images keep their label and others get `null`.

    Those with a label are repeated until they are about half of all: a thousand labels among fifty
    thousand images would hardly be met.
    """
    if n_labels > len(labels):
        raise UserError(f"--n-labels {n_labels}: only {len(labels)} training images")
    is_labelled = np.arange(len(labels)) < n_labels
    labels = np.where(is_labelled, labels, null)
    n_copies = len(labels) // n_labels - 2 if n_labels else 0
    copies = np.tile(np.arange(n_labels), max(0, n_copies))
    rows = np.concatenate([np.arange(len(labels)), copies])
    return images[rows], labels[rows]


def load_init(net, args, spec, rank):
    """Load the weights of --init. Returns the hash of its content; raises UserError.

    From a network without labels, every label starts as its null label.
    """
    source = load_diffusion(args.init, "cpu")
    name = f"--init {args.init}"
    if not isinstance(source, EDMUNet) or source.net.config.sigma_data != args.sigma_data:
        raise UserError(f"{name}: not of this script, or of another --sigma-data")
    if type(source.net) is not type(net):
        raise UserError(f"{name}: another network, one of them alone is of --self-conditioning")
    weights = source.net.state_dict()
    if source.num_classes:
        spec.check_classes(name, source.classes)
    else:
        null = weights["class_embedding.weight"]
        weights["class_embedding.weight"] = null.expand(spec.num_classes + 1, -1)
    parts.check_fit(weights, net.state_dict(), name)
    if source.val_size < args.val_size and rank == 0:
        print(f"note: the network of {name} may have seen the validation images")
    net.load_state_dict(weights)
    return source.sha256


# ---------------------------------------------------------------------------------- the script


def save_diffusers(net, run):
    """Write a network as diffusers reads it. config.json, which marks it as finished, is last."""
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    path = run.path("diffusion_pytorch_model.safetensors")
    files.write_safetensors(weights, path, {"format": "pt"})
    files.write_text(net.to_json_string(), run.path("config.json"))


def check(args, spec, world_size):
    """Raises UserError where flags do not fit the data set or the number of processes."""
    if args.batch_size % world_size:
        message = f"not divisible by {world_size} processes"
        raise UserError(f"--batch-size {args.batch_size}: {message}")
    if args.val_size < world_size:
        raise UserError(f"--val-size {args.val_size}: fewer images than processes ({world_size})")
    if spec.files:
        message = "too large for this script; use a public model (hub:facebook/DiT-XL-2-256)"
        raise UserError(f"--dataset {spec.name}: {message}")
    levels = len(args.channels)
    if spec.image_size % (args.patch * 2 ** (levels - 1)):
        message = f"{levels} resolutions of --patch {args.patch} do not divide"
        raise UserError(f"--channels {args.channels}: {message} {spec.image_size} pixels")


def main(args):
    # Setup: one process per GPU under torchrun, else one process.
    rank, world_size, device = start_processes(args.precision, args.deterministic)
    spec = open_dataset(args)
    check(args, spec, world_size)
    amp = autocast(device, args.precision)

    # Data: no crops; mirrored where the classes do not mind.
    train, val = read_once(
        data.load_train, spec, args.data_dir, args.val_size, args.n_train, args.imbalance
    )
    if args.n_labels == 0:  # the null label is the only one
        spec = dataclasses.replace(spec, num_classes=0, classes=())
    mine = slice(rank, None, world_size)  # this rank's rows, of a batch and of the held-out images
    x_val = data.to_x(val[0][mine], device)
    y_val = torch.from_numpy(val[1][mine]).clamp(max=spec.num_classes).to(device)
    plain = dataclasses.replace(spec, crop_padding=0, rotation=0.0)
    images, labels = train
    if args.n_labels is not None:
        images, labels = partly_labelled(images, labels, args.n_labels, spec.num_classes)
    batches = data.Batches(
        plain, (images, labels), args.batch_size, args.seed, device, rank, world_size
    )

    # Network, its average, optimiser.
    torch.manual_seed(data.seed_of(args.seed, "init"))
    net = build_network(spec, args)
    init_sha256 = load_init(net, args, spec, rank) if args.init else None
    net.to(device, memory_format=torch.channels_last)
    ema = make_average(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)

    # Resume.
    inputs = {}
    if rank == 0:
        inputs = {"data_sha256": data.sha256(train, val), "init_sha256": init_sha256}
    run = Run(__file__, args, inputs, rank, device)
    run.track(net=net, ema=ema, optimizer=optimizer)
    run.load(args.train_steps)
    if run.step == args.train_steps and (args.check or os.path.exists(run.path("config.json"))):
        if rank == 0:
            print(f"{args.out_dir}: finished, nothing to do")
        return end_processes()
    model = wrap(net)

    # Training.
    run.start(args.train_steps)
    meters = Meters()
    while run.step < args.train_steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run.step, args)
        x, y = batches(run.step)
        y, normal, noise = draw(run.step, x, y, mine, spec.num_classes, args)
        with amp:
            loss = edm_loss(model, 2 * x - 1, y, normal, noise, args).mean()

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.advance()
        update_average(ema, net, ema_decay_at(run.step, args))
        meters.update(loss=loss)

        is_last = run.step == args.train_steps or run.check_is_done()
        validate_now = run.step % args.eval_every == 0 or is_last
        stop = run.should_stop()
        if validate_now or stop:
            means = meters.means()
            run.check_finite(**means)
        if validate_now:
            with amp:
                batch_size = args.batch_size // world_size
                val_loss = validate(ema, x_val, y_val, mine, batch_size, args)
            run.check_finite(val_loss=val_loss)
            run.log(val_loss=val_loss, lr=lr_at(run.step - 1, args), **means)
            run.bar.set_postfix(loss=f"{means['loss']:.3f}", val_loss=f"{val_loss:.3f}")
        if validate_now and rank == 0:
            with amp:
                images = samples(ema, spec, args, device)
            save_images(images, run.path("samples.png"), columns=10)
        if validate_now or stop:
            run.save()
        if stop:
            break

    run.close()
    if rank == 0 and args.check:
        test = data.load_test(spec, args.data_dir)
        n_images = (len(train[1]), args.val_size, len(test[1]), 0)
        n_passes = math.ceil(args.train_steps / args.eval_every)
        run.print_check(spec, n_images, args.train_steps, n_passes)
    elif rank == 0 and run.step < args.train_steps:
        print(run.stopped_message(args.train_steps))
    elif rank == 0:
        save_diffusers(ema, run)
        n_parameters = sum(p.numel() for p in net.parameters())
        print(f"{args.out_dir}: {args.train_steps} steps done, {n_parameters} parameters")
    end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
