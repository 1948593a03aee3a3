"""Features of a frozen diffusion model: store them, and probe how much of the class a linear model reads from them.

For every pair of --blocks and --sigmas, the block's output for x + sigma * n, n one fixed Gaussian draw per image, average
pooled over space: the representation that DRA aligns a classifier with (train_at_aux.py). Blocks of one sigma are taken in
one pass of the network, which is left at the last of them.

    python extract_features.py --probe                                   # digits, all blocks, four noise levels, ten seconds
    torchrun --nproc_per_node 8 extract_features.py                      # images are shared out over the processes
    python extract_features.py --blocks up_blocks.0.resnets.0 --sigmas 0.1 --save-head out/head.pt    # a classifier to attack

Writes <split>-<block>-sigma<sigma>.npy (float32, (N, channels), memory-mapped) and <split>-labels.npy for the splits train,
val and test, and manifest.json. Files that are complete are skipped. --probe fits scikit-learn's logistic regression on
"train" and prints accuracies on "val": choose block and sigma there, never on the test images (--probe-split test reports).
--save-head writes the probe of one block and sigma as a head, to be evaluated and attacked end to end, through the network:
evaluate.py --model diffusion-head --teacher ... --checkpoint out/head.pt.
"""

import os

import numpy as np
import torch

from common import checkpoint, cli, data, diffusion, dist, runlog


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data and model")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument(
        "--val-size", type=cli.count, help="first training images, held out as in train_at.py (default: 200 for digits, else 1024)"
    )
    group.add_argument("--diffusion", help="directory, NVlabs .pkl or hub:OWNER/NAME (default: out/diffusion-<dataset>)")
    group = parser.add_argument_group("features")
    group.add_argument("--blocks", nargs="+", help="blocks of the network (default: all)")
    group.add_argument("--sigmas", type=cli.positive, nargs="+", default=[0.03, 0.1, 0.3, 1.0], help="noise levels, in units of [-1, 1]")
    group = parser.add_argument_group("probe")
    group.add_argument("--probe", action="store_true", help="fit and print a linear probe per (block, sigma)")
    group.add_argument("--probe-split", choices=["val", "test"], default="val", help="images that the probe's accuracy is of")
    group.add_argument("--save-head", help="file for the probe of one block and one sigma, such as out/head.pt")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=250, help="images per network call on one process")
    group.add_argument("--out-dir", help="directory of the features (default: out/features-<dataset>)")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    args = parser.parse_args(argv)
    args.val_size = data.DATASETS[args.dataset].val_size if args.val_size is None else args.val_size
    args.blocks, args.sigmas = args.blocks and list(dict.fromkeys(args.blocks)), list(dict.fromkeys(args.sigmas))
    if args.save_head and not (args.blocks and len(args.blocks) == len(args.sigmas) == 1):
        parser.error("argument --save-head: goes with one of --blocks and one of --sigmas")
    args.out_dir = args.out_dir or f"out/features-{args.dataset}"
    args.diffusion = args.diffusion or f"out/diffusion-{args.dataset}"
    return args


# ----------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def features_of(model, images, ids, split, sigma, blocks, seed):
    """Pooled features, one (B, channels) array per block, of uint8 images; an image's noise depends on (seed, split, id) alone."""
    x = data.to_x(images, model.device)
    noise = data.normal_of(data.id_streams(seed, f"features-{split}", ids), model.noise_shape)
    features = model.features(x, sigma, None, blocks, noise.to(model.device))
    if not all(f.isfinite().all() for f in features):
        raise cli.UserError(f"--sigmas {sigma:g}: the diffusion network's features are not finite")
    return [f.float().cpu().numpy() for f in features]


def fit_probe(features, labels):
    """A logistic regression fitted to standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features, labels)


def linear_layer(fitted):
    """(weight (K, channels), bias (K,)) float32 of a fitted probe, its standardisation folded in."""
    scaler, regression = fitted[0], fitted[1]
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


# ------------------------------------------------------------------------------------------------------- plumbing


def feature_path(out_dir, split, block, sigma):
    return os.path.join(out_dir, f"{split}-{block}-sigma{sigma}.npy")


def extract(model, images, split, sigma, blocks, args, rank, world_size):
    """Write the split's features at one sigma. Each rank fills its batches' rows of shared memory maps, renamed when all are done."""
    paths = [feature_path(args.out_dir, split, block, sigma) for block in blocks]
    todo = [i for i, path in enumerate(paths) if not os.path.exists(path)]
    if not todo:
        return
    blocks, paths = [blocks[i] for i in todo], [paths[i] for i in todo]
    batches = np.split(np.arange(len(images)), range(args.batch_size, len(images), args.batch_size))
    if rank == 0:
        widths = [f.shape[1] for f in features_of(model, images[:1], [0], split, sigma, blocks, args.seed)]
        for path, width in zip(paths, widths):
            np.lib.format.open_memmap(path + ".writing", "w+", np.float32, (len(images), width)).flush()
    dist.barrier()
    maps = [np.lib.format.open_memmap(path + ".writing", "r+") for path in paths]
    for ids in runlog.progress(batches[rank::world_size], rank, desc=f"{split} sigma {sigma:g}", unit="batch", leave=False):
        for array, values in zip(maps, features_of(model, images[ids], ids, split, sigma, blocks, args.seed)):
            array[ids] = values
    for array in maps:
        array.flush()
    dist.barrier()
    if rank == 0:
        for path in paths:
            os.replace(path + ".writing", path)
    dist.barrier()


def main(args):
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    model = diffusion.load_diffusion(args.diffusion, device)
    model.check_teaches(f"--diffusion {args.diffusion}", spec, with_labels=False)
    blocks = args.blocks or model.blocks
    model.check_blocks(blocks)
    model.check_sigmas(args.sigmas)
    manifest = {
        "format": 2,
        "dataset": spec.name,
        "val_size": args.val_size,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "label": "none",
        "pooling": "mean over space",
        "ids": "row i is image i of its split",
        "network_sha256": model.sha256,
    }
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    dist.barrier()
    train, val = data.load_train(spec, args.data_dir, args.val_size)
    splits = {"train": train, "val": val, "test": data.load_test(spec, args.data_dir)}
    labels = {split: split_labels for split, (_, split_labels) in splits.items()}
    if (args.probe or args.save_head) and len(np.unique(labels["train"])) < spec.num_classes:
        raise cli.UserError(
            f"--val-size {args.val_size}: a class has no training image left, --probe and --save-head need all {spec.num_classes}"
        )
    if rank == 0:
        runlog.claim_directory(args.out_dir, manifest, "manifest.json")
    dist.barrier()

    for split, (images, _) in splits.items():
        if rank == 0:
            checkpoint.write_npy(labels[split], os.path.join(args.out_dir, f"{split}-labels.npy"))
        for sigma in args.sigmas:
            extract(model, images, split, sigma, blocks, args, rank, world_size)

    def read(split, block, sigma):
        return checkpoint.open_npy(feature_path(args.out_dir, split, block, sigma), np.float32, (len(labels[split]), None))

    if rank == 0 and args.save_head:
        block, sigma = args.blocks[0], args.sigmas[0]
        fitted = fit_probe(read("train", block, sigma), labels["train"])
        accuracy = fitted.score(read("val", block, sigma), labels["val"])
        weight, bias = linear_layer(fitted)
        head = {"dataset": spec.name, "network_sha256": model.sha256, "block": block, "sigma": sigma, "val_accuracy": accuracy}
        checkpoint.save(head | {"weight": weight, "bias": bias}, args.save_head)
        print(f"{args.save_head}: accuracy on {len(labels['val'])} validation images {accuracy:.1%}")
    if rank == 0 and args.probe:
        print(f"linear probe, accuracy on {len(labels[args.probe_split])} {args.probe_split} images (rows: block, columns: sigma)")
        width = max(map(len, blocks))
        print(" " * width + "".join(f"{sigma:>8g}" for sigma in args.sigmas))
        for block in blocks:
            row = []
            for sigma in args.sigmas:
                fitted = fit_probe(read("train", block, sigma), labels["train"])
                row.append(fitted.score(read(args.probe_split, block, sigma), labels[args.probe_split]))
            print(f"{block:<{width}}" + "".join(f"{accuracy:8.1%}" for accuracy in row), flush=True)
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
