"""Sample a labelled synthetic set from a diffusion model into memory-mappable shards.

Deterministic Heun sampling (Karras et al., arXiv 2206.00364, algorithm 2), with classifier-free guidance if asked for:

    D_w(x; sigma, y) = D(x; sigma, none) + w (D(x; sigma, y) - D(x; sigma, none)),   w = --guidance-scale, 1 means off.

Image `id` has label id % num_classes and a random generator of its own, seeded by (seed, id): no image depends on another,
on the number of processes or on where a run was cut. Shards that exist are skipped: running the command again resumes.
With --keep-fraction, the images of each class that --classifier gives the highest probability of their own label are
selected (selection.npy), as in DM-AT's 1 M sets (top 20 % per class; Wang et al., arXiv 2302.04638).

    python generate_synthetic.py                                     # 10,000 digits, about a minute on two CPU cores
    torchrun --nproc_per_node 8 generate_synthetic.py --dataset cifar10 --diffusion out/edm-cifar10-cond --n-images 1000000 --n-steps 20

The directory: shard-00000-images.npy (uint8, NHWC), shard-00000-labels.npy (int64), manifest.json, samples.png.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, cli, data, diffusion, dist, models, runlog
from common.synthetic import allow_open_files, open_shards, shard_paths


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data and model")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set that the model was trained on")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument(
        "--val-size", type=cli.count0, help="first training images, held out as in train_at.py (default: 200 for digits, else 1024)"
    )
    group.add_argument("--n-train", type=cli.count, help="the next so many are those it was trained on (default: all others)")
    group.add_argument("--diffusion", help="directory, NVlabs .pkl or hub:OWNER/NAME (default: out/diffusion-<dataset>)")
    group = parser.add_argument_group("set")
    group.add_argument("--n-images", type=cli.count, default=10_000, help="images to generate")
    group.add_argument("--shard-size", type=cli.count, default=2_500, help="images per shard")
    group.add_argument("--keep-fraction", type=cli.fraction, help="fraction of each class to select by confidence (default: keep all)")
    group.add_argument("--classifier", help="checkpoint (best.pt) whose confidence selects")
    group = parser.add_argument_group("sampler")
    group.add_argument("--n-steps", type=cli.count, default=18, help="noise levels; the network is called 2 n - 1 times")
    group.add_argument("--sigma-min", type=cli.positive, default=0.002, help="lowest noise level, in units of [-1, 1]")
    group.add_argument("--sigma-max", type=cli.positive, default=80.0, help="highest noise level")
    group.add_argument("--rho", type=cli.positive, default=7.0, help="exponent of the noise levels' spacing")
    group.add_argument("--guidance-scale", type=cli.non_negative, default=1.0, help="classifier-free guidance w; 1 is off")
    group.add_argument("--s-churn", type=cli.non_negative, default=0.0, help="stochasticity; 0 is deterministic")
    group.add_argument("--s-tmin", type=cli.non_negative, default=0.05, help="lowest noise level that is churned")
    group.add_argument("--s-tmax", type=cli.positive, default=50.0, help="highest noise level that is churned")
    group.add_argument("--s-noise", type=cli.positive, default=1.003, help="standard deviation of the churned noise")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=250, help="images per network call on one process")
    group.add_argument("--out-dir", help="directory of the set (default: out/synthetic-<dataset>)")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of all randomness")
    args = parser.parse_args(argv)
    args.val_size = data.DATASETS[args.dataset].val_size if args.val_size is None else args.val_size
    args.out_dir = args.out_dir or f"out/synthetic-{args.dataset}"
    args.diffusion = args.diffusion or f"out/diffusion-{args.dataset}"
    if (args.keep_fraction is None) != (args.classifier is None):
        parser.error("--keep-fraction and --classifier go together")
    if args.keep_fraction == 0:
        parser.error("argument --keep-fraction: 0 would keep nothing")
    if args.sigma_min >= args.sigma_max:
        parser.error(f"--sigma-min {args.sigma_min} must lie below --sigma-max {args.sigma_max}")
    if args.s_tmin > args.s_tmax:
        parser.error(f"--s-tmin {args.s_tmin} lies above --s-tmax {args.s_tmax}: nothing would be churned")
    if args.rho < 0.1:
        parser.error(f"argument --rho: {args.rho}, expected at least 0.1 (EDM uses 7)")
    return args


# ----------------------------------------------------------------------------------------------------- the method


def guided(model, y, scale):
    """The denoiser (noisy, sigma) -> D_w of the module docstring; one network call, or one of twice the batch."""
    if scale == 1:
        return lambda noisy, sigma: model.denoise(noisy, sigma, y)
    none = torch.full_like(y, model.num_classes)

    def denoise(noisy, sigma):
        conditional, unconditional = model.denoise(noisy.repeat(2, 1, 1, 1), sigma, torch.cat([y, none])).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


def sample(model, ids, args):
    """uint8 images (B, H, W, C) and int64 labels (B,) of the given global ids."""
    generators = data.id_streams(args.seed, "generate", ids)

    def noise():  # drawn on the CPU, so that an image is the same on every device up to rounding
        return data.normal_of(generators, model.noise_shape).to(model.device)

    y = torch.from_numpy(ids % model.num_classes).to(model.device)
    x = diffusion.heun(
        guided(model, y, args.guidance_scale),
        noise(),
        diffusion.sigma_steps(args.n_steps, args.sigma_min, args.sigma_max, args.rho),
        args.s_churn,
        (args.s_tmin, args.s_tmax),
        args.s_noise,
        noise,
    )
    if not x.isfinite().all():  # as bytes they would be black images with a label
        raise cli.UserError(f"--diffusion {args.diffusion}: samples not finite, a broken network or too large a --guidance-scale")
    x = model.decode(x)
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy()


@torch.no_grad()
def confidences(synthetic, classifier, size, batch_size, device, rank, world_size):
    """The classifier's probability of each image's own label, float32 (N,); it sees `size` pixels; batches are shared out over ranks."""
    confidence = torch.zeros(len(synthetic), device=device)
    starts = range(rank * batch_size, len(synthetic), world_size * batch_size)
    for start in runlog.progress(starts, rank, desc="select", unit="batch"):
        rows = np.arange(start, min(start + batch_size, len(synthetic)))
        images, labels = synthetic.gather(rows)
        x = data.to_x(images, device)
        if x.shape[-1] != size:  # sets of larger images, for training that crops and resizes
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        probs = classifier(x).softmax(1)
        confidence[start : start + len(rows)] = probs.gather(1, torch.from_numpy(labels).to(device)[:, None])[:, 0]
    return dist.sum_over_ranks(confidence).cpu().numpy()


def select(confidence, labels, keep_fraction):
    """Rows, ascending, of the ceil(keep_fraction * n_class) images of each class with the highest confidence."""
    kept = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        best = rows[np.argsort(-confidence[rows], kind="stable")]
        kept.append(best[: int(np.ceil(keep_fraction * len(rows)))])
    return np.sort(np.concatenate(kept))


def nearest_distances(images, train, device):
    """l2 distance, in units of x in [0, 1], of each image to its nearest neighbour in `train`: (N,). Both uint8 NHWC."""
    images, nearest = torch.from_numpy(images).flatten(1).to(device).float() / 255, []
    for chunk in torch.from_numpy(train).flatten(1).split(1000):
        nearest.append(torch.cdist(images, chunk.to(device).float() / 255).amin(1))
    return torch.stack(nearest).amin(0).cpu()


# ------------------------------------------------------------------------------------------------------- plumbing


def manifest_of(args, spec, model):
    """Everything that the shards' bytes depend on; "selection" is added when images have been selected."""
    sampler = ("n_steps", "sigma_min", "sigma_max", "rho", "guidance_scale", "s_churn", "s_tmin", "s_tmax", "s_noise", "batch_size")
    return {
        "format": 2,
        "dataset": spec.name,
        "n": args.n_images,
        "ids": [0, args.n_images],
        "label": "id % num_classes",
        "num_classes": spec.num_classes,
        "image_shape": [model.image_size, model.image_size, model.channels],
        "shard_size": args.shard_size,
        "seed": args.seed,
        "network_sha256": model.sha256,
        "held_out": model.val_size,
        "sampler": {name: getattr(args, name) for name in sampler},
    }


def main(args):
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    model = diffusion.load_diffusion(args.diffusion, device)
    model.check_generates(f"--diffusion {args.diffusion}", spec)
    asked, (low, high) = (args.sigma_min, args.sigma_max), model.sigma_range
    args.sigma_min, args.sigma_max = max(args.sigma_min, low), min(args.sigma_max, high)
    if rank == 0 and asked != (args.sigma_min, args.sigma_max):
        print(f"note: {args.diffusion} knows noise levels {low:.4g} to {high:.4g}; sampling from {args.sigma_max:g} to {args.sigma_min:g}")
    if args.guidance_scale != 1 and model.label_dropout == 0:
        raise cli.UserError(f"--guidance-scale {args.guidance_scale}: {args.diffusion} was trained without label dropout")
    n_shards = -(-args.n_images // args.shard_size)
    allow_open_files(4 * n_shards, args.out_dir)  # shards that could not be opened together are not generated in the first place
    train = test = classifier = None
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    if rank == 0 and not spec.files:  # for the memorisation check
        (train, _), _ = data.load_train(spec, args.data_dir, args.val_size, args.n_train)
        test, _ = data.load_test(spec, args.data_dir)
    if args.classifier:
        classifier, _ = models.load_classifier(args.classifier, spec, device)
    if rank == 0:
        runlog.claim_directory(args.out_dir, manifest_of(args, spec, model), "manifest.json", later=["selection"])
    # Listed before the barrier: after it, another rank may already be writing, and the lists would differ.
    shards = [s for s in range(n_shards) if not all(map(os.path.exists, shard_paths(args.out_dir, s)))]
    dist.barrier()

    # Generate: whole shards are shared out over ranks, so that a shard's batches are the same for any number of them.
    todo = sum(min(args.shard_size, args.n_images - s * args.shard_size) for s in shards[rank::world_size])
    with runlog.progress(rank=rank, desc="generate", unit="image", total=todo) as bar:
        for shard in shards[rank::world_size]:
            ids = np.arange(shard * args.shard_size, min((shard + 1) * args.shard_size, args.n_images))
            parts = []
            for batch in np.split(ids, range(args.batch_size, len(ids), args.batch_size)):
                parts.append(sample(model, batch, args))
                bar.update(len(batch))
            images_path, labels_path = shard_paths(args.out_dir, shard)
            checkpoint.write_npy(np.concatenate([images for images, _ in parts]), images_path)
            checkpoint.write_npy(np.concatenate([labels for _, labels in parts]), labels_path)
    dist.barrier()

    if classifier is not None:
        synthetic = open_shards(args.out_dir, spec)
        how = {"keep_fraction": args.keep_fraction, "classifier_sha256": checkpoint.sha256(args.classifier)}
        if synthetic.manifest.get("selection", how) != how:
            raise cli.UserError(f"--out-dir {args.out_dir}: another selection was made there; generate into another directory")
        if "selection" not in synthetic.manifest:
            confidence = confidences(synthetic, classifier, spec.image_size, args.batch_size, device, rank, world_size)
            if rank == 0:
                rows = select(confidence, np.concatenate(synthetic.labels), args.keep_fraction)
                checkpoint.write_npy(rows, os.path.join(args.out_dir, "selection.npy"))
                checkpoint.write_json(synthetic.manifest | {"selection": how}, os.path.join(args.out_dir, "manifest.json"))
    if rank == 0:
        report(args, spec, train, test, device)
    dist.teardown()


def report(args, spec, train, test, device):
    """Check for memorisation against `train` (uint8 NHWC; `test` for comparison), count classes, draw samples."""
    synthetic = open_shards(args.out_dir, spec)
    images, labels = synthetic.gather(np.arange(min(10_000 if train is not None else 1000, len(synthetic))))
    counts = np.bincount(labels, minlength=spec.num_classes)
    print(f"{args.out_dir}: {len(synthetic)} images; classes of the first {len(labels)}: {' '.join(map(str, counts))}")
    if train is not None:  # in a million files it would take days, and pixels tell little at 256 x 256
        generated, held_out = nearest_distances(images, train, device), nearest_distances(test, train, device)
        print(
            "nearest training image, mean l2 distance (memorised images lie near 0): "
            f"generated {generated.mean():.3f}, test images {held_out.mean():.3f}; generated below 0.1: {(generated < 0.1).sum()}"
        )
    first = [np.flatnonzero(labels == k)[:10] for k in range(min(10, spec.num_classes))]
    runlog.save_images(data.to_x(images[np.concatenate(first)]), os.path.join(args.out_dir, "samples.png"), columns=10)


if __name__ == "__main__":
    cli.run(main, parse_args())
