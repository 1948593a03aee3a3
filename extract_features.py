"""Features of a frozen diffusion model: store them, fit linear probes to them, attack the probes.

What a block and its features are stands in common/diffusion.py, other metrics in analyze.py.

For every pair of --blocks and --sigmas: the block's output for x + sigma * n, averaged over space,
for --n-draws fixed draws of Gaussian noise n per image. This is the representation that DRA aligns
a classifier with (train_at_aux.py).

    python extract_features.py --probe    # digits, all blocks, four noise levels, ten seconds
    torchrun --nproc_per_node 2 extract_features.py --probe --eps 0.05    # under attack, too
    torchrun --nproc_per_node 8 extract_features.py    # images are shared out over processes
    python extract_features.py --blocks up_blocks.0.resnets.0 --sigmas 0.1 --save-head out/head.pt

Writes <split>-<block>-sigma<sigma>.npy (float32, (N, draws, channels)) and <split>-labels.npy for
the splits train, val and test, and manifest.json. An extraction that was interrupted goes on batch
by batch; probes and their attacks start again.

--probe fits a logistic regression to "train", each draw an example, and prints the accuracy on
"val", whose features are averaged over draws. Choose block and sigma there, never on test images,
which --probe-split test reports. --eps adds PGD-20 on the margin in linf; the attack sees an image
under all draws of its stored features. Writes probe.json and a heat map, probe.png. --save-head
writes the probe of one block and sigma, which evaluate.py attacks as a classifier (evaluate.py
--model diffusion-head --teacher ... --checkpoint out/head.pt).

--verdict says beforehand whether DRA with this network may help a classifier: the probes on "val",
those of the network with its weights shuffled, and, with --pupil, the classifier itself. Writes
verdict.md, a page with its picture, and verdict.json (analysis/verdict.py).

    python extract_features.py --n-train 100 --val-size 500 --verdict --pupil out/at/best.pt
"""

import argparse
import math
import os
import shlex

import numpy as np
import torch

from analysis import metrics, verdict
from analysis.probes import report
from common import UserError, attacks, cli, data, files, run
from published.datasets import DATASETS, open_dataset, spec_of
from published.weights import load_classifier
from teachers import classifier, load

SIGMAS = [0.03, 0.1, 0.3, 1.0]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_data_flags(parser, DATASETS).add_argument
    add("--diffusion", type=cli.path, help="directory, .pkl or hub:NAME (out/diffusion-<dataset>)")
    add = parser.add_argument_group("features").add_argument
    add("--blocks", nargs="+", help="blocks of the network (default: all)")
    add(
        "--sigmas",
        type=cli.positive,
        nargs="+",
        default=SIGMAS,
        help="noise levels, for images in [-1, 1]",
    )
    add("--n-draws", type=cli.count, default=1, help="draws of noise per image")
    add = parser.add_argument_group("probe").add_argument
    add("--probe", action="store_true", help="fit a linear probe per block and sigma")
    add("--probe-split", choices=["val", "test"], default="val", help="images to probe")
    add("--eps", type=cli.positive, help="attack the probes: linf radius (default: no attack)")
    add("--n-attacked", type=cli.count, default=200, help="first images to attack")
    add("--save-head", type=cli.path, help="file for one probe, such as out/head.pt")
    add = parser.add_argument_group("verdict").add_argument
    add("--verdict", action="store_true", help="probe, and tell whether DRA may help")
    add("--pupil", type=cli.path, help="best.pt of the classifier that DRA is meant for")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=cli.batch, default=250, help="images per network call")
    add("--out-dir", type=cli.path, help="directory (default: out/features-<dataset>)")
    cli.add_precision_flag(add)
    add("--seed", type=cli.seed, default=0, help="seed of the noise")
    args = parser.parse_args(argv)
    parser.check_data_flags(argv, args)
    if args.blocks:
        args.blocks = list(dict.fromkeys(args.blocks))
    args.sigmas = list(dict.fromkeys(args.sigmas))
    args.out_dir = args.out_dir or f"out/features-{args.dataset}"
    args.diffusion = args.diffusion or f"out/diffusion-{args.dataset}"
    args.probe = args.probe or args.verdict
    uses = {
        "--eps": ("--probe or --verdict", args.probe),
        "--n-attacked": ("--eps", args.eps),
        "--probe-split": ("--probe without --verdict", args.probe and not args.verdict),
        "--pupil": ("--verdict", args.verdict),
    }
    parser.refuse_unused(argv, uses)
    parser.check_radius("--eps", args.eps, "linf", spec_of(args))
    if args.save_head and not (args.blocks and len(args.blocks) == len(args.sigmas) == 1):
        parser.error("argument --save-head: goes with one of --blocks and one of --sigmas")
    return args


# ------------------------------------------------------------------------------------ the method


@torch.no_grad()
def features_of(model, images, ids, split, sigma, blocks, args):
    """Pooled features of uint8 images: an array (B, draws, channels) per block.

    The noise of an image depends on the seed, the split, its id and the draw alone.
    """
    x = data.to_x(images, model.device)
    by_draw = []
    for noise in draws_of(model, split, ids, args):
        features = model.features(x, sigma, None, blocks, noise)
        if not all(part.isfinite().all() for part in features):
            raise UserError(f"--sigmas {sigma:g}: the diffusion network's features are not finite")
        by_draw.append([part.float().cpu().numpy() for part in features])
    return [np.stack(draws, 1) for draws in zip(*by_draw)]


def draws_of(model, split, ids, args):
    """--n-draws tensors (B, *noise_shape) of standard normal noise for these images."""
    streams = data.id_streams(args.seed, f"features-{split}", ids)
    for _ in range(args.n_draws):
        yield data.normal_of(streams, model.noise_shape).to(model.device)


def fit_probe(block, sigma, labels, spec, args):
    """A logistic regression on the stored features of training images, each draw an example.

    Returns a dict: block, sigma, weight (K, channels), bias (K,).
    """
    features = read_features("train", block, sigma, len(labels), args)
    examples = features.reshape(-1, features.shape[2])
    repeated = np.repeat(labels, args.n_draws)
    weight, bias = metrics.fit_linear(examples, repeated, spec.num_classes)
    return {"block": block, "sigma": sigma, "weight": weight, "bias": bias}


def is_correct(probe, split, labels, args):
    """Which predictions (N,) from a split's stored features, averaged over draws, are right."""
    features = read_features(split, probe["block"], probe["sigma"], len(labels), args)
    logits = torch.from_numpy(features.mean(1)) @ probe["weight"].T + probe["bias"]
    return logits.argmax(1).numpy() == labels


class StoredDrawsHead(classifier.DiffusionHead):
    """A probe as a classifier that sees its images under the draws of their stored features."""

    stored_draws = ()  # a tensor (B, *noise_shape) per draw, for the images of the next pass

    def draws(self, x):
        return self.stored_draws


def resists(model, probe, images, labels, args):
    """Which images (N,) are right with and without PGD-20 on the margin, step eps / 4.

    images: of the probed split. labels: (N,) of its first images, those that are attacked.
    """
    head = StoredDrawsHead(model, n_noise=args.n_draws, fresh=False, seed=args.seed, **probe)
    head.to(model.device).eval().requires_grad_(False)
    settings = dict(norm="linf", eps=args.eps, step_size=args.eps / 4, n_steps=20, loss="margin")
    parts = []
    for i, ids in enumerate(data.batches_of(len(labels), args.batch_size)):
        x = data.to_x(images[ids], model.device)
        y = torch.from_numpy(labels[ids]).to(model.device)
        head.stored_draws = list(draws_of(model, args.probe_split, ids, args))
        generator = data.stream(args.seed, "probe-pgd", i, model.device)
        start = attacks.random_start(x.shape, "linf", args.eps, generator)
        x_adv = attacks.pgd(head, x, y, start, **settings)
        with torch.no_grad():
            correct = (head(x).argmax(1) == y) & (head(x_adv).argmax(1) == y)
        parts.append(correct.cpu().numpy())
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------- plumbing


def feature_path(split, block, sigma, args):
    return os.path.join(args.out_dir, f"{split}-{block}-sigma{sigma}.npy")


def read_features(split, block, sigma, n, args):
    """The features (n, draws, channels) that `extract` wrote, mapped."""
    path = feature_path(split, block, sigma, args)
    features = files.open_npy(path, np.float32, (n, args.n_draws, None))
    if not np.isfinite(features.sum(dtype=np.float64)):
        raise UserError(f"{path}: damaged, not finite; delete it to extract it again")
    return features


def extract(model, images, split, sigma, blocks, args, rank, world_size):
    """Write the split's features at one sigma.

    Ranks fill the rows of their batches in shared memory maps, which get their names when all is
    done. A second map has a flag per batch, set when its rows are written: an extraction that was
    interrupted goes on from there.
    """
    path_of = {block: feature_path(split, block, sigma, args) for block in blocks}
    blocks = [block for block in blocks if not os.path.exists(path_of[block])]
    paths = [path_of[block] for block in blocks]
    if not blocks:
        return
    batches = data.batches_of(len(images), args.batch_size)
    if rank == 0:
        examples = features_of(model, images[:1], [0], split, sigma, blocks, args)
        for path, (example,) in zip(paths, examples):
            make_maps(path, (len(images), *example.shape), len(batches))
    run.barrier()
    maps = [np.lib.format.open_memmap(f"{path}.writing", "r+") for path in paths]
    flags = [np.lib.format.open_memmap(f"{path}.done.writing", "r+") for path in paths]
    own = range(rank, len(batches), world_size)
    for i in run.progress(own, rank, desc=f"{split} sigma {sigma:g}", unit="batch", leave=False):
        if all(done[i] for done in flags):
            continue
        ids = batches[i]
        features = features_of(model, images[ids], ids, split, sigma, blocks, args)
        for array, done, values in zip(maps, flags, features):
            array[ids] = values
            done[i] = 1
    for array in maps:
        array.flush()
    run.barrier()
    if rank == 0:
        for path in paths:
            os.replace(f"{path}.writing", path)
            os.unlink(f"{path}.done.writing")
    run.barrier()


def make_maps(path, shape, n_batches):
    """Make the map of the features and that of the flags, or check those that are there."""
    if not os.path.exists(f"{path}.writing") and os.path.exists(f"{path}.done.writing"):
        os.unlink(f"{path}.done.writing")  # flags of a map that is gone
    make_zeros(f"{path}.writing", np.float32, shape)
    make_zeros(f"{path}.done.writing", np.uint8, (n_batches,))


def make_zeros(path, dtype, shape):
    """Make an .npy array of zeros, to be mapped for writing. One that exists must fit.

    Its space is taken first, because on a full disk a write to a map ends the process.
    """
    if not os.path.exists(path):
        dtype = np.dtype(dtype)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        with files.atomic(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell() + dtype.itemsize * math.prod(shape)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    files.open_npy(path, dtype, shape)


def save_head(model, labels, spec, args):
    """Write the probe of the one block and sigma as a file that teachers.classifier.load reads."""
    probe = fit_probe(args.blocks[0], args.sigmas[0], labels["train"], spec, args)
    accuracy = float(is_correct(probe, "val", labels["val"], args).mean())
    head = {
        "dataset": spec.name,
        "classes": list(spec.classes),
        "network_sha256": model.sha256,
        "precision": model.precision,
        "val_accuracy": accuracy,
        **probe,
    }
    files.make_directory(os.path.dirname(os.path.abspath(args.save_head)), "--save-head")
    files.save(head, args.save_head)
    n = len(labels["val"])
    print(f"{args.save_head}: accuracy on {n} validation images {accuracy:.1%}")


def check_classes(labels, spec, args):
    """Raises UserError where the training labels lack a class."""
    if len(np.unique(labels)) == spec.num_classes:
        return
    flags = f"--val-size {args.val_size}"
    if args.n_train:
        flags += f" with --n-train {args.n_train}"
    lack = f"the {len(labels)} images of the split train lack a class"
    raise UserError(f"{flags}: {lack}; --probe and --save-head need all {spec.num_classes}")


def extract_all(model, splits, blocks, manifest, args, rank, world_size):
    """Claim --out-dir and write the features and labels of all splits.

    splits: {name: (images, labels)}. A verdict needs no test images.
    """
    if rank == 0:
        run.claim_directory(args.out_dir, manifest, "manifest.json")
    run.check_shared(os.path.join(args.out_dir, "manifest.json"))
    for split, (images, labels) in splits.items():
        if args.verdict and split == "test":
            continue
        if rank == 0:
            files.write_npy(labels, os.path.join(args.out_dir, f"{split}-labels.npy"))
        for sigma in args.sigmas:
            extract(model, images, split, sigma, blocks, args, rank, world_size)


def measure_probes(model, splits, blocks, spec, args, rank, world_size):
    """{(block, sigma): what its probe does on the images of --probe-split}, on every rank.

    That is "correct", bool (N,), its mean "accuracy" and, with --eps, "attacked", bool (M,).
    """
    images, labels = splits[args.probe_split]
    pairs = [(block, sigma) for block in blocks for sigma in args.sigmas]
    own = pairs[rank::world_size]
    probes = {}
    for block, sigma in run.progress(own, rank, desc="probe", unit="probe", leave=False):
        probe = fit_probe(block, sigma, splits["train"][1], spec, args)
        correct = is_correct(probe, args.probe_split, labels, args)
        results = {"correct": correct, "accuracy": correct.mean()}
        if args.eps:
            results["attacked"] = resists(model, probe, images, labels[: args.n_attacked], args)
        probes[block, sigma] = results
    gathered = {}
    for part in run.gather_objects(probes):
        gathered.update(part)
    return gathered


def load_pupil(args, spec, train, val, rank, device):
    """The classifier of --pupil, None without one.

    Raises UserError where its run had other labels or other held-out images.
    """
    if args.pupil is None:
        return None
    pupil, _ = load_classifier(args.pupil, spec, device)
    path = os.path.join(os.path.dirname(args.pupil), "args.json")
    if os.path.isfile(args.pupil) and os.path.exists(path):
        settings = files.read_json(path)
    else:  # a published model has the arguments of its training in its config.json
        path = args.pupil
        settings = files.config_beside(files.local_weights(path)).get("training")
    settings = settings if isinstance(settings, dict) else {}
    digest = settings.get("data_sha256")
    own = run.once(data.sha256, train, val)
    if digest is None and rank == 0:
        print("note: nothing beside --pupil tells whether it had these training images")
    if digest not in (None, own):
        flags = ("val_size", "n_train", "imbalance")
        its = ", ".join(f"{flag} {settings.get(flag)}" for flag in flags)
        message = f"trained or validated on other images than these; {path} has {its}"
        raise UserError(f"--pupil {args.pupil}: {message}")
    return pupil


def about_verdict(spec, teacher, args):
    """What a verdict says of itself: a dict of settings and versions."""
    environment = run.environment()
    imbalance = f", --imbalance {args.imbalance:g}" if args.imbalance else ""
    of_teacher = "none, it was trained without"
    if teacher.num_classes:
        of_teacher = "it was trained with some, of perhaps more images than the probe"
    seen = teacher.val_size < args.val_size
    return {
        "teacher": args.diffusion,
        "labels of the teacher": of_teacher,
        "held-out images": "perhaps seen by the teacher" if seen else "not seen by the teacher",
        "pupil": args.pupil,
        "pupil_sha256": files.sha256(args.pupil) if args.pupil else None,
        "data set": spec.name,
        "labels": f"those of {args.n_train or 'all'} training images{imbalance}",
        "blocks": args.blocks or "all",
        "sigmas": args.sigmas,
        "precision": args.precision,
        "eps": args.eps,
        "n_attacked": args.n_attacked if args.eps else None,
        "command": shlex.join(environment["command"]),
        "commit": environment["commit"] or "not recorded",
        "torch": environment["torch"],
        "device": environment["device"],
    }


def write_verdict(probes, control, pupil, val, about, args, device):
    """Write the verdict. probes, control: of measure_probes, of the network and of its control."""
    images, labels = val
    correct = None
    cka = None
    if pupil is not None:
        predicted, features = verdict.look_at(
            pupil, images, args.batch_size, args.precision, device
        )
        correct = predicted == labels
        block, sigma = verdict.best_place(probes)
        of_teacher = read_features("val", block, sigma, len(labels), args).mean(1)
        cka = metrics.cka_interval(of_teacher, features)
    judged = verdict.judge(probes, control, correct, cka)
    verdict.write(judged, probes, control, about, args.out_dir)


def main(args):
    rank, world_size, device = run.start_processes(args.precision)
    spec = open_dataset(args)
    model = load.load_diffusion(args.diffusion, device, args.precision)
    model.check_teaches(f"--diffusion {args.diffusion}", spec, with_labels=False)
    if rank == 0:
        model.warn_of_null_label(args.diffusion)
    blocks = args.blocks or model.blocks
    model.check_places(f"--diffusion {args.diffusion}", blocks, args.sigmas)
    train, val = run.read_once(
        data.load_train, spec, args.data_dir, args.val_size, args.n_train, args.imbalance
    )
    test = run.read_once(data.load_test, spec, args.data_dir)
    splits = {"train": train, "val": val, "test": test}
    labels = {split: split_labels for split, (_, split_labels) in splits.items()}
    if args.probe or args.save_head:
        check_classes(labels["train"], spec, args)
    if args.verdict and args.val_size < verdict.MIN_IMAGES:
        raise UserError(f"--val-size {args.val_size}: --verdict needs {verdict.MIN_IMAGES} or more")
    pupil = load_pupil(args, spec, train, val, rank, device)
    if args.verdict:
        about = about_verdict(spec, model, args)
        verdict.check_same(about, args.out_dir)

    manifest = {
        "format": 3,
        "dataset": spec.name,
        "val_size": args.val_size,
        "n_train": args.n_train,
        "imbalance": args.imbalance,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "n_draws": args.n_draws,
        "label": "none",
        "pooling": "mean over space",
        "ids": "row i is image i of its split",
        "precision": args.precision,
        "network_sha256": model.sha256,
    }
    if rank == 0:
        manifest["data_sha256"] = data.sha256(*splits.values())
    extract_all(model, splits, blocks, manifest, args, rank, world_size)
    if args.save_head and rank == 0:
        save_head(model, labels, spec, args)
    if args.probe:
        probes = measure_probes(model, splits, blocks, spec, args, rank, world_size)
        if rank == 0:
            settings = {name: getattr(args, name) for name in ("precision", "eps", "out_dir")}
            report(probes, blocks, args.sigmas, split=args.probe_split, **settings)
    if args.verdict:
        verdict.shuffle_weights(model.net, args.seed)
        folder = os.path.join(args.out_dir, "shuffled")
        shuffled = argparse.Namespace(**vars(args) | {"out_dir": folder, "eps": None})
        manifest["weights"] = "shuffled"
        extract_all(model, splits, blocks, manifest, shuffled, rank, world_size)
        control = measure_probes(model, splits, blocks, spec, shuffled, rank, world_size)
        if rank == 0:
            write_verdict(probes, control, pupil, val, about, args, device)
    run.end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
