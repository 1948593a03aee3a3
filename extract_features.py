"""Features of a frozen diffusion model: store them, probe how much of the class a linear model reads from them, attack that.

For every pair of --blocks and --sigmas, the block's output for x + sigma * n, n --n-draws fixed Gaussian draws per image,
average pooled over space: the representation that DRA aligns a classifier with (train_at_aux.py). Blocks of one sigma are taken
in one pass of the network, which is left at the last of them.

    python extract_features.py --probe                                   # digits, all blocks, four noise levels, ten seconds
    torchrun --nproc_per_node 2 extract_features.py --probe --eps 0.05   # and under attack, through noise, network and probe
    torchrun --nproc_per_node 8 extract_features.py                      # images are shared out over the processes
    python extract_features.py --blocks up_blocks.0.resnets.0 --sigmas 0.1 --save-head out/head.pt    # a classifier to attack

Writes <split>-<block>-sigma<sigma>.npy (float32, (N, draws, channels), memory-mapped) and <split>-labels.npy for the splits
train, val and test, and manifest.json. Features that were cut go on
batch by batch; probes and their attacks start again. --probe fits a logistic regression to "train",
every draw an example, and prints accuracies on "val", whose draws are averaged: choose block and sigma there, never on the test
images (--probe-split test reports); --eps adds PGD-20 on the margin in linf, on the first --n-attacked images, each seen
under the --n-draws of its stored features, and the gradient goes through all of them. probe.json and a heat map, probe.png.
--save-head writes the probe of one block and sigma as a head, to be evaluated and attacked by AutoAttack:
evaluate.py --model diffusion-head --teacher ... --checkpoint out/head.pt.
"""

import os

import numpy as np
import torch

from common import attacks, checkpoint, cli, data, diffusion, dist, generative, pictures, representations, runlog


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data and model")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument(
        "--val-size", type=cli.count, help="first training images, held out as in train_at.py (default: 200 for digits, else 1024)"
    )
    group.add_argument("--n-train", type=cli.count, help="images of the split train: the next so many (default: all others)")
    group.add_argument("--diffusion", help="directory, NVlabs .pkl or hub:OWNER/NAME (default: out/diffusion-<dataset>)")
    group = parser.add_argument_group("features")
    group.add_argument("--blocks", nargs="+", help="blocks of the network (default: all)")
    group.add_argument("--sigmas", type=cli.positive, nargs="+", default=[0.03, 0.1, 0.3, 1.0], help="noise levels, in units of [-1, 1]")
    group.add_argument("--n-draws", type=cli.count, default=1, help="draws of noise per image")
    group = parser.add_argument_group("probe")
    group.add_argument("--probe", action="store_true", help="fit and print a linear probe per (block, sigma)")
    group.add_argument("--probe-split", choices=["val", "test"], default="val", help="images that the probe's accuracy is of")
    group.add_argument("--eps", type=cli.positive, help="attack the probes, too: linf radius of x in [0, 1] (default: no attack)")
    group.add_argument("--n-attacked", type=cli.count, default=200, help="first images of the split that are attacked")
    group.add_argument("--save-head", help="file for the probe of one block and one sigma, such as out/head.pt")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=250, help="images per network call on one process")
    group.add_argument("--out-dir", help="directory of the features (default: out/features-<dataset>)")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of the noise")
    args = parser.parse_args(argv)
    args.val_size = data.DATASETS[args.dataset].val_size if args.val_size is None else args.val_size
    args.blocks, args.sigmas = args.blocks and list(dict.fromkeys(args.blocks)), list(dict.fromkeys(args.sigmas))
    parser.refuse_unused(argv, {"--eps": ("--probe", args.probe), "--n-attacked": ("--eps", args.eps)})
    if args.eps and args.eps > 1:
        parser.error(f"argument --eps: {args.eps:g}, expected at most 1, of x in [0, 1]; 8/255 is written so")
    if args.save_head and not (args.blocks and len(args.blocks) == len(args.sigmas) == 1):
        parser.error("argument --save-head: goes with one of --blocks and one of --sigmas")
    args.out_dir = args.out_dir or f"out/features-{args.dataset}"
    args.diffusion = args.diffusion or f"out/diffusion-{args.dataset}"
    return args


# ----------------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def features_of(model, images, ids, split, sigma, blocks, n_draws, seed):
    """Pooled features, one (B, draws, channels) array per block, of uint8 images; noise depends on (seed, split, id, draw) alone."""
    x = data.to_x(images, model.device)
    streams = data.id_streams(seed, f"features-{split}", ids)
    draws = []
    for _ in range(n_draws):
        features = model.features(x, sigma, None, blocks, data.normal_of(streams, model.noise_shape).to(model.device))
        if not all(f.isfinite().all() for f in features):
            raise cli.UserError(f"--sigmas {sigma:g}: the diffusion network's features are not finite")
        draws.append([f.float().cpu().numpy() for f in features])
    return [np.stack(of_block, 1) for of_block in zip(*draws)]


def fit_probe(features, labels, spec, device):
    """(weight (K, channels), bias (K,)) of a logistic regression; features (N, draws, channels), every draw is an example."""
    n, n_draws, width = features.shape
    return representations.fit_linear(features.reshape(n * n_draws, width), np.repeat(labels, n_draws), spec.num_classes, device)


def accuracy_of(weight, bias, features, labels):
    """Share of correct predictions from features (N, draws, channels) averaged over the draws."""
    logits = torch.from_numpy(np.asarray(features).mean(1)) @ weight.cpu().T + bias.cpu()
    return float((logits.argmax(1).numpy() == labels).mean())


def attacked_accuracy(model, block, sigma, weight, bias, images, labels, args):
    """Share of correct predictions on adversarial versions of the first images of the probed split: PGD-20, step eps / 4, on the margin.

    Each image is seen under the very draws of its stored features, and the gradient goes through all of them.
    """
    head = generative.DiffusionHead(model, args.n_draws, False, args.seed, block, sigma, weight.cpu(), bias.cpu())
    head = head.to(model.device).eval().requires_grad_(False)
    n_correct = 0
    for i, s in enumerate(range(0, len(images), args.batch_size)):
        x, y = data.to_x(images[s : s + args.batch_size], model.device), torch.from_numpy(labels[s : s + args.batch_size]).to(model.device)
        streams = data.id_streams(args.seed, f"features-{args.probe_split}", range(s, s + len(x)))
        draws = [data.normal_of(streams, model.noise_shape).to(model.device) for _ in range(args.n_draws)]
        head.draws = lambda x, draws=draws: draws
        start = attacks.random_start(x.shape, "linf", args.eps, data.stream(args.seed, "probe-pgd", i, model.device))
        settings = dict(norm="linf", eps=args.eps, step_size=args.eps / 4, n_steps=20, loss="margin")
        x_adv = attacks.pgd(head, x, y, [start], **settings)
        with torch.no_grad():  # an image that is wrong without an attack counts as wrong
            n_correct += int(((head(x_adv).argmax(1) == y) & (head(x).argmax(1) == y)).sum())
    return n_correct / len(images)


# ------------------------------------------------------------------------------------------------------- plumbing


def feature_path(out_dir, split, block, sigma):
    return os.path.join(out_dir, f"{split}-{block}-sigma{sigma}.npy")


def extract(model, images, split, sigma, blocks, args, rank, world_size):
    """Write the split's features at one sigma. Each rank fills its batches' rows of shared memory maps, renamed when all are done.

    Beside each map lies one with a flag per batch, set once its rows are written: work that was cut goes on from there.
    """
    paths = [feature_path(args.out_dir, split, block, sigma) for block in blocks]
    todo = [i for i, path in enumerate(paths) if not os.path.exists(path)]
    if not todo:
        return
    blocks, paths = [blocks[i] for i in todo], [paths[i] for i in todo]
    batches = np.split(np.arange(len(images)), range(args.batch_size, len(images), args.batch_size))
    if rank == 0:
        widths = [f.shape[2] for f in features_of(model, images[:1], [0], split, sigma, blocks, 1, args.seed)]
        for path, width in zip(paths, widths):
            if not os.path.exists(path + ".writing") and os.path.exists(path + ".done.writing"):
                os.unlink(path + ".done.writing")  # flags of a map that is gone
            checkpoint.map_zeros(path + ".writing", np.float32, (len(images), args.n_draws, width))
            checkpoint.map_zeros(path + ".done.writing", np.uint8, (len(batches),))
    dist.barrier()
    maps, flags = ([np.lib.format.open_memmap(path + end, "r+") for path in paths] for end in (".writing", ".done.writing"))
    mine = range(rank, len(batches), world_size)
    for i in runlog.progress(mine, rank, desc=f"{split} sigma {sigma:g}", unit="batch", leave=False):
        if all(done[i] for done in flags):
            continue
        ids = batches[i]
        for array, done, values in zip(maps, flags, features_of(model, images[ids], ids, split, sigma, blocks, args.n_draws, args.seed)):
            array[ids] = values
            done[i] = 1
    for array in maps:
        array.flush()
    dist.barrier()
    if rank == 0:
        for path in paths:
            os.replace(path + ".writing", path)
        for path in paths:
            os.unlink(path + ".done.writing")
    dist.barrier()


def report_probe(found, blocks, args, n):
    """Print the accuracies, block by sigma, and write probe.json and probe.png."""
    titles = {"accuracy": f"linear probe, accuracy on {n} {args.probe_split} images"}
    if args.eps:
        titles["attacked"] = f"the same under attack, linf {args.eps:g}, first {min(n, args.n_attacked)} images"
    width = max(map(len, blocks))
    tables = {}
    for key, title in titles.items():
        tables[key] = [[found[block, sigma][key] for sigma in args.sigmas] for block in blocks]
        print(f"{title} (rows: block, columns: sigma)")
        print(" " * width + "".join(f"{sigma:>8g}" for sigma in args.sigmas))
        for block, row in zip(blocks, tables[key]):
            print(f"{block:<{width}}" + "".join(f"{accuracy:8.1%}" for accuracy in row), flush=True)
    result = {"blocks": blocks, "sigmas": args.sigmas, **tables, "titles": titles, "environment": runlog.environment()}
    checkpoint.write_json(result, os.path.join(args.out_dir, "probe.json"))
    pictures.heat_maps(result, os.path.join(args.out_dir, "probe.png"))


def main(args):
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    model = diffusion.load_diffusion(args.diffusion, device)
    model.check_teaches(f"--diffusion {args.diffusion}", spec, with_labels=False)
    blocks = args.blocks or model.blocks
    model.check_blocks(blocks)
    model.check_sigmas(args.sigmas)
    manifest = {
        "format": 3,
        "dataset": spec.name,
        "val_size": args.val_size,
        "n_train": args.n_train,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "n_draws": args.n_draws,
        "label": "none",
        "pooling": "mean over space",
        "ids": "row i is image i of its split",
        "network_sha256": model.sha256,
    }
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    dist.barrier()
    train, val = data.load_train(spec, args.data_dir, args.val_size, args.n_train)
    splits = {"train": train, "val": val, "test": data.load_test(spec, args.data_dir)}
    labels = {split: split_labels for split, (_, split_labels) in splits.items()}
    if (args.probe or args.save_head) and len(np.unique(labels["train"])) < spec.num_classes:
        left = f"--val-size {args.val_size}" + (f" with --n-train {args.n_train}" if args.n_train else "")
        found = f"{left}: the {len(labels['train'])} images of the split train lack a class"
        raise cli.UserError(f"{found}; --probe and --save-head need all {spec.num_classes}")
    if rank == 0:
        runlog.claim_directory(args.out_dir, manifest, "manifest.json")
    dist.barrier()

    for split, (images, _) in splits.items():
        if rank == 0:
            checkpoint.write_npy(labels[split], os.path.join(args.out_dir, f"{split}-labels.npy"))
        for sigma in args.sigmas:
            extract(model, images, split, sigma, blocks, args, rank, world_size)

    def read(split, block, sigma):
        return checkpoint.open_npy(feature_path(args.out_dir, split, block, sigma), np.float32, (len(labels[split]), args.n_draws, None))

    if rank == 0 and args.save_head:
        block, sigma = args.blocks[0], args.sigmas[0]
        weight, bias = (p.cpu() for p in fit_probe(read("train", block, sigma), labels["train"], spec, device))
        accuracy = accuracy_of(weight, bias, read("val", block, sigma), labels["val"])
        head = {"dataset": spec.name, "network_sha256": model.sha256, "block": block, "sigma": sigma, "val_accuracy": accuracy}
        checkpoint.save(head | {"weight": weight, "bias": bias}, args.save_head)
        print(f"{args.save_head}: accuracy on {len(labels['val'])} validation images {accuracy:.1%}")
    if args.probe:
        found, pairs = {}, [(block, sigma) for block in blocks for sigma in args.sigmas]
        images, probed = splits[args.probe_split]
        for block, sigma in runlog.progress(pairs[rank::world_size], rank, desc="probe", unit="probe", leave=False):
            weight, bias = fit_probe(read("train", block, sigma), labels["train"], spec, device)
            row = {"accuracy": accuracy_of(weight, bias, read(args.probe_split, block, sigma), probed)}
            if args.eps:
                attacked = images[: args.n_attacked], probed[: args.n_attacked]
                row["attacked"] = attacked_accuracy(model, block, sigma, weight, bias, *attacked, args)
            found[block, sigma] = row
        found = {pair: row for part in dist.gather_objects(found) for pair, row in part.items()}
        if rank == 0:
            report_probe(found, blocks, args, len(probed))
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
