"""Train a small class-conditional diffusion model where no public one fits: the source of images and of representations.

The network F is a diffusers UNet2DModel under EDM preconditioning (Karras et al., arXiv 2206.00364, table 1),

    D(x; sigma, y) = c_skip x + c_out F(c_in x; ln(sigma) / 4, y),
    L = E_{x, y, n, sigma} [ (sigma^2 + sd^2) / (sigma sd)^2 * || D(x + sigma n; sigma, y) - x ||^2 ],  ln sigma ~ N(P_mean, P_std^2),

with x in [-1, 1]. The label is dropped with probability --label-dropout, so that the one network is conditional (it
generates labelled images) and unconditional (it gives DRA representations that cannot leak the label).

    python train_diffusion.py                        # digits, about 2 minutes on two CPU cores; into out/diffusion-digits
    torchrun --nproc_per_node 8 train_diffusion.py   # the same with 8 processes

The averaged network is saved with save_pretrained: diffusers.UNet2DModel.from_pretrained("out/diffusion-digits") reads it.
Running the same command again resumes.
"""

import dataclasses
import math
import os
import shutil

import safetensors
import torch

from common import checkpoint, cli, data, diffusion, dist, runlog
from common.ema import EMA


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument(
        "--val-size", type=cli.count, help="first training images, held out here as in train_at.py (default: 200 for digits, else 1024)"
    )
    group.add_argument("--n-train", type=cli.count, help="train on the next so many images only (default: all others)")
    group = parser.add_argument_group("network")
    group.add_argument("--channels", type=cli.count, nargs="+", default=[24, 48], help="channels of each resolution, multiples of 8")
    group.add_argument("--layers-per-block", type=cli.count, default=1, help="residual blocks per resolution")
    group = parser.add_argument_group("loss")
    group.add_argument("--p-mean", type=cli.ratio, default=-1.2, help="mean of ln sigma")
    group.add_argument("--p-std", type=cli.positive, default=1.2, help="standard deviation of ln sigma")
    group.add_argument("--sigma-data", type=cli.positive, default=0.5, help="assumed standard deviation of the data in [-1, 1]")
    group.add_argument("--label-dropout", type=cli.fraction, default=0.1, help="probability of training on the null label")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--train-steps", type=cli.count, default=1200, help="optimiser steps")
    group.add_argument("--batch-size", type=cli.count, default=128, help="global batch size, images")
    group.add_argument("--lr", type=cli.positive, default=2e-3, help="peak learning rate of Adam, cosine to 0")
    group.add_argument("--warmup-steps", type=cli.count0, default=100, help="steps of linear warm-up")
    group.add_argument("--ema-decay", type=cli.fraction, default=0.995, help="decay per step of the averaged network")
    group = parser.add_argument_group("run")
    group.add_argument("--eval-every", type=cli.count, default=200, help="steps between validation, sample grid and checkpoint")
    group.add_argument("--out-dir", help="run directory (default: out/diffusion-<dataset>)")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of all randomness")
    args = parser.parse_args(argv)
    args.val_size = data.DATASETS[args.dataset].val_size if args.val_size is None else args.val_size
    args.out_dir = args.out_dir or f"out/diffusion-{args.dataset}"
    if any(c % 8 for c in args.channels):
        parser.error(f"argument --channels: {args.channels}, expected multiples of 8 (the groups of GroupNorm)")
    return args


# ----------------------------------------------------------------------------------------------------- the method


def edm_loss(net, x, labels, normal, noise, p_mean, p_std, sigma_data):
    """EDM's denoising loss per image, (B,), averaged over pixels.

    x: clean images in [-1, 1], (B, C, H, W). labels: (B,), num_classes meaning none. normal: (B,) and noise: like x, standard normal.
    """
    sigma = (p_mean + p_std * normal).exp()
    denoised = diffusion.edm_denoise(net, x + sigma.view(-1, 1, 1, 1) * noise, sigma, labels, sigma_data)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * ((denoised - x) ** 2).mean((1, 2, 3))


def lr_at(step, args):
    """Linear warm-up, then cosine to 0: a pure function of the step."""
    warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
    return args.lr * warm * 0.5 * (1 + torch.tensor(torch.pi * step / args.train_steps, dtype=torch.float64).cos().item())


def draw(args, step, y, shape, num_classes, device):
    """The step's randomness for the global batch: (labels with dropout, ln-sigma normals, noise)."""
    generator = data.stream(args.seed, "edm-loss", step, device)
    dropped = torch.rand(shape[0], generator=generator, device=device) < args.label_dropout
    normal = torch.randn(shape[0], generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    return torch.where(dropped, num_classes, y), normal, noise


@torch.no_grad()
def validate(net, x, y, args):
    """Mean EDM loss on held-out images with fixed noise and their true labels."""
    generator = data.stream(args.seed, "edm-validation", 0, x.device)
    normal = torch.randn(len(y), generator=generator, device=x.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return edm_loss(net, 2 * x - 1, y, normal, noise, args.p_mean, args.p_std, args.sigma_data).mean().item()


def samples(net, spec, args, device):
    """Images in [0, 1], (100, C, H, W): ten of each of the first ten classes, class by class, from the same noise every time."""
    y = torch.arange(min(10, spec.num_classes), device=device).repeat_interleave(10)
    shape = (len(y), spec.channels, spec.image_size, spec.image_size)
    noise = torch.randn(shape, generator=data.stream(args.seed, "grid", 0, device), device=device)
    x = diffusion.heun(
        lambda noisy, sigma: diffusion.edm_denoise(net, noisy, sigma, y, args.sigma_data), noise, diffusion.sigma_steps(18, 0.002, 80, 7)
    )
    return (x + 1) / 2


def build_network(spec, args):
    """F of the docstring: a UNet2DModel with a label more than the data set has, and what load_diffusion needs in its config."""
    import diffusers

    levels = len(args.channels)
    net = diffusers.UNet2DModel(
        sample_size=spec.image_size,
        in_channels=spec.channels,
        out_channels=spec.channels,
        block_out_channels=args.channels,
        layers_per_block=args.layers_per_block,
        down_block_types=["DownBlock2D"] * levels,
        up_block_types=["UpBlock2D"] * levels,
        norm_num_groups=8,
        num_class_embeds=spec.num_classes + 1,
    )
    net.register_to_config(sigma_data=args.sigma_data, label_dropout=args.label_dropout, val_size=args.val_size)
    return net


def save_diffusers(net, out_dir):
    """Write config.json and the weights as diffusers reads them; config.json, which marks a finished model, comes last."""
    folder = os.path.join(out_dir, "model.writing")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    try:
        net.save_pretrained(folder)
    except safetensors.SafetensorError as error:  # what a full disk raises here
        raise cli.UserError(f"{folder}: {error}") from None
    for name in sorted(os.listdir(folder), reverse=True):
        os.replace(os.path.join(folder, name), os.path.join(out_dir, name))
    os.rmdir(folder)


# ------------------------------------------------------------------------------------------------------- plumbing


def main(args):
    rank, world_size, device = dist.setup()
    if args.batch_size % world_size:
        raise cli.UserError(f"--batch-size {args.batch_size}: not divisible by {world_size} processes")
    spec = data.DATASETS[args.dataset]
    if spec.files:
        raise cli.UserError(f"--dataset {spec.name}: too large for this script; use a public model (hub:facebook/DiT-XL-2-256)")
    if spec.image_size % 2 ** (len(args.channels) - 1):
        raise cli.UserError(f"--channels {args.channels}: {len(args.channels)} resolutions do not divide {spec.image_size} pixels")

    # Data: no crops; mirrored where the data set's classes do not mind.
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    dist.barrier()
    (images, labels), (val_images, val_labels) = data.load_train(spec, args.data_dir, args.val_size, args.n_train)
    x_val, y_val = data.to_x(val_images, device), torch.from_numpy(val_labels).to(device)
    batches = data.Batches(
        images, labels, None, 0, args.batch_size, dataclasses.replace(spec, crop_padding=0, rotation=0.0), args.seed, device
    )

    # Network, average, optimiser.
    torch.manual_seed(data.seed_of(args.seed, "init"))
    net = build_network(spec, args).to(device, memory_format=torch.channels_last)
    ema = EMA(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    ddp = dist.wrap(net)

    # Resume.
    if rank == 0:
        runlog.claim_directory(args.out_dir, runlog.identity_of("train_diffusion.py", args))
    dist.barrier()
    start_step, last_path = 0, os.path.join(args.out_dir, "last.pt")
    loss_sum, n_summed = torch.zeros((), device=device), 0  # since the last validation
    if os.path.exists(last_path):
        entries = {"step": int, "net": dict, "ema": dict, "optimizer": dict, "loss_sum": torch.Tensor, "n_summed": int}
        state = checkpoint.load(last_path, entries, device)
        checkpoint.load_state(net, state["net"], last_path)
        checkpoint.load_state(ema.model, state["ema"], last_path)
        checkpoint.load_state(optimizer, state["optimizer"], last_path)
        start_step, n_summed = state["step"], state["n_summed"]
        loss_sum += state["loss_sum"] if rank == 0 else 0
    if start_step == args.train_steps and os.path.exists(os.path.join(args.out_dir, "config.json")):
        if rank == 0:
            print(f"{args.out_dir}: finished, nothing to do")
        return dist.teardown()

    log = runlog.RunLog(args.out_dir, start_step) if rank == 0 else runlog.NullLog()
    stopping, done = dist.catch_sigterm(device), start_step
    bar = runlog.progress(range(start_step, args.train_steps), rank, desc="diffusion", initial=start_step, total=args.train_steps)
    for step in bar:
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr_at(step, args)
        x, y = batches(step)
        y, normal, noise = draw(args, step, y, x.shape, spec.num_classes, device)
        x, y, normal, noise = (t[rank::world_size] for t in (x, y, normal, noise))
        losses = edm_loss(ddp, 2 * x - 1, y, normal, noise, args.p_mean, args.p_std, args.sigma_data)

        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), float("inf"))
        if not torch.isfinite(grad_norm):
            raise cli.not_finite(step, last_path)
        optimizer.step()
        ema.update(net, min(args.ema_decay, (1 + step) / (10 + step)))
        loss_sum += losses.detach().sum()
        n_summed += 1

        done, stop = step + 1, stopping()
        validated = done % args.eval_every == 0 or done == args.train_steps
        if validated:
            loss_mean = (dist.sum_over_ranks(loss_sum) / (n_summed * args.batch_size)).item()
            if rank == 0:
                val_loss = validate(ema.model, x_val, y_val, args)
                if not math.isfinite(val_loss) or not all(t.isfinite().all() for t in net.state_dict().values()):
                    raise cli.not_finite(step, last_path)
                log.write(done, loss=loss_mean, val_loss=val_loss, lr=lr_at(step, args))
                bar.set_postfix(loss=f"{loss_mean:.3f}", val_loss=f"{val_loss:.3f}")
                runlog.save_images(samples(ema.model, spec, args, device), os.path.join(args.out_dir, "samples.png"), columns=10)
            loss_sum.zero_()
            n_summed = 0
        if validated or stop:
            dist.sum_over_ranks(loss_sum)
            if rank == 0:
                state = {"step": done, "net": net.state_dict(), "ema": ema.model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(state | {"loss_sum": loss_sum, "n_summed": n_summed}, last_path)
            dist.barrier()
        if stop:
            break

    log.close()
    if rank == 0 and done < args.train_steps:
        print(f"{args.out_dir}: stopped by SIGTERM after step {done} of {args.train_steps}; the same command goes on")
    elif rank == 0:
        save_diffusers(ema.model, args.out_dir)
        print(f"{args.out_dir}: {args.train_steps} steps done, {sum(p.numel() for p in net.parameters())} parameters")
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
