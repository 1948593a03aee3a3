r"""Sample a labelled synthetic set from a diffusion model, and select its best images if asked to.

How sets are read is in published/synthetic_set.py; networks and EDM's sampler are in teachers/.

Sampling is Heun's deterministic method (Karras et al., arXiv 2206.00364, algorithm 1). With
--guidance-scale w the denoiser D is replaced by the classifier-free guided one; w = 1 is off:

    D_w(x; sigma, y) = D(x; sigma, none) + w (D(x; sigma, y) - D(x; sigma, none))

With --guide another network, D_guide, stands in place of the one without a label: autoguidance
(Karras et al., arXiv 2406.02507), whose guide is a smaller or less trained network of the same
images. A guide without classes is not told the label.

    D_w(x; sigma, y) = D_guide(x; sigma, y) + w (D(x; sigma, y) - D_guide(x; sigma, y))

Image number `id` has a random generator of its own, seeded by (seed, id), and, without --relabel,
the label id % num_classes. So no image depends on another one, on the number of processes or on
where a run was interrupted. Shards that exist are skipped: the same command resumes.

With --relabel the network is told no label, and an image has the one that --classifier predicts
(Carmon et al., arXiv 1905.13736; Gowal et al., arXiv 2110.09468). That is for networks without
classes, or when labels are few. The classes of such a set are not in balance.

With --keep-fraction, the images of each class that --classifier gives the highest probability of
their label, told or predicted, are selected, as in DM-AT's sets of 1 M images (the top 20 % of each
class; Wang et al., arXiv 2302.04638). Nothing is deleted: selection.npy lists the selected rows.

    python generate_synthetic.py    # 10,000 digits, about a minute on two CPU cores
    torchrun --nproc_per_node 8 generate_synthetic.py --dataset cifar10 \
        --diffusion out/edm-cifar10-cond --n-images 1000000 --n-steps 20

The directory holds shard-00000-images.npy (uint8, NHWC), shard-00000-labels.npy (int64) and so on,
manifest.json and samples.png; memorisation.json has what the check for memorised images found.

--export hub adds a card and checksums (published/set_card.py): the directory can be uploaded then.
Whoever has the network can make any shard again, by the settings in manifest.json, and compare:

    python generate_synthetic.py --out-dir out/synthetic-digits --verify 2
"""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, cli, data, files, run
from published import memorisation, set_card, set_recipe
from published.datasets import DATASETS, open_dataset
from published.synthetic_set import allow_shards, open_shards, read_manifest, shard_paths
from published.weights import load_classifier
from teachers import sampling
from teachers.load import load_diffusion, load_guide


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = cli.add_data_flags(parser, DATASETS).add_argument
    add("--diffusion", type=cli.path, help="directory, .pkl or hub:NAME (out/diffusion-<dataset>)")

    add = parser.add_argument_group("set").add_argument
    add("--n-images", type=cli.count, default=10_000, help="images to generate")
    add("--shard-size", type=cli.count, default=2_500, help="images per shard")
    add("--keep-fraction", type=cli.fraction, help="of each class, by confidence (default: all)")
    add("--relabel", action="store_true", help="labels are the predictions of --classifier")
    what = "checkpoint (best.pt, hub:OWNER/NAME) that selects or labels"
    add("--classifier", type=cli.path, help=what)
    add("--weights", metavar="NAME", help="the set to take where --classifier holds several")

    add = parser.add_argument_group("sampler (defaults and names are EDM's)").add_argument
    add("--n-steps", type=cli.count, default=18, help="noise levels; 2 n - 1 network calls")
    add(
        "--sigma-min",
        type=cli.positive,
        default=0.002,
        help="lowest noise level, for images in [-1, 1]",
    )
    add("--sigma-max", type=cli.positive, default=80.0, help="highest noise level")
    add("--rho", type=cli.positive, default=7.0, help="exponent of the noise levels' spacing")
    add("--guidance-scale", type=cli.non_negative, default=1.0, help="w, see above; 1 is off")
    add("--guide", type=cli.path, help="network D_guide, see above: directory, .pkl or hub:NAME")

    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=cli.batch, default=250, help="images per network call on one process")
    add("--out-dir", type=cli.path, help="directory of the set (default: out/synthetic-<dataset>)")
    cli.add_precision_flag(add)
    add("--seed", type=cli.seed, default=0, help="seed of all randomness")

    add = parser.add_argument_group("instead of generating").add_argument
    add("--export", choices=["hub"], help="add a card and checksums to the finished set")
    what = "make shard K again and compare; status 1 where it differs; writes nothing"
    add("--verify", type=cli.count0, metavar="K", help=what)

    args = parser.parse_args(argv)
    parser.check_data_flags(argv, args)
    args.out_dir = args.out_dir or f"out/synthetic-{args.dataset}"
    if args.export:
        parser.check_alone(argv, "--export", "--dataset --data-dir --image-size --out-dir")
        return args
    if args.verify is not None:
        others = "--diffusion --guide --classifier --out-dir"
        if args.classifier:
            others += " --dataset --data-dir --image-size"
        parser.check_alone(argv, "--verify", others)
        return args
    args.diffusion = args.diffusion or f"out/diffusion-{args.dataset}"
    uses = {
        "--keep-fraction": ("--classifier", args.classifier),
        "--relabel": ("--classifier", args.classifier),
        "--classifier": ("--keep-fraction or --relabel", args.keep_fraction or args.relabel),
        "--weights": ("--classifier", args.classifier),
        "--guide": ("a --guidance-scale other than 1", args.guidance_scale != 1),
    }
    parser.refuse_unused(argv, uses)
    if args.relabel and args.guidance_scale != 1 and args.guide is None:
        parser.error("argument --guidance-scale: guides by a label; with --relabel give --guide")
    if args.keep_fraction == 0:
        parser.error("argument --keep-fraction: 0 would keep nothing")
    if args.sigma_min >= args.sigma_max:
        parser.error(f"--sigma-min {args.sigma_min} must lie below --sigma-max {args.sigma_max}")
    if args.rho < 0.1:
        parser.error(f"argument --rho: {args.rho}, expected at least 0.1 (EDM uses 7)")
    return args


# ---------------------------------------------------------------------------------- the method


def guided(model, y, scale, guide=None):
    """The guided denoiser D_w of the module docstring, a function of (noisy, sigma).

    y: labels (B,), None for none. scale: w. Guidance doubles the batch of each network call, or
    calls the guide.
    """

    def denoise(noisy, sigma):
        if scale == 1:
            return model.denoise(noisy, sigma, y)
        if guide is not None:
            denoised_by_guide = guide.denoise(noisy, sigma, y if guide.num_classes else None)
            difference = model.denoise(noisy, sigma, y) - denoised_by_guide
            return denoised_by_guide + scale * difference
        both_labels = torch.cat([y, torch.full_like(y, model.num_classes)])
        denoised = model.denoise(noisy.repeat(2, 1, 1, 1), sigma, both_labels)
        conditional, unconditional = denoised.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


def sigma_limits(model, args, guide=None):
    """The lowest and highest noise level: those asked for, as far as the networks know them."""
    known = [network.sigma_range for network in (model, guide) if network is not None]
    sigma_min = max(args.sigma_min, *(lowest for lowest, _ in known))
    sigma_max = min(args.sigma_max, *(highest for _, highest in known))
    return sigma_min, sigma_max


def sample(model, ids, args, guide=None, label=None):
    """Generate the images with the given ids, an int64 array (B,).

    label: a function from images to their labels; then the network is told none.
    Returns uint8 images (B, H, W, C) and int64 labels (B,). Raises UserError where samples are not
    finite.
    """
    # Drawn on the CPU, so that an image is the same on every device up to rounding.
    generators = data.id_streams(args.seed, "generate", ids)
    noise = data.normal_of(generators, model.noise_shape).to(model.device)
    y = None
    if label is None:
        y = torch.from_numpy(ids % model.num_classes).to(model.device)

    def round_sigma(sigma):
        sigma = model.round_sigma(sigma)
        return sigma if guide is None else guide.round_sigma(sigma)

    sigma_min, sigma_max = sigma_limits(model, args, guide)
    x = sampling.heun(
        guided(model, y, args.guidance_scale, guide),
        noise,
        sampling.sigma_steps(args.n_steps, sigma_min, sigma_max, args.rho),
        round_sigma,
    )
    x = model.decode(x)
    if not x.isfinite().all():  # as bytes they would be black images with a label
        reason = "samples not finite, a broken network or too large a --guidance-scale"
        raise UserError(f"--diffusion {args.diffusion}: {reason}")
    images = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return images, label(images) if y is None else y.cpu().numpy()


@torch.no_grad()
def probabilities(classifier, images, spec, device, precision):
    """The classifier's (B, K) for uint8 images (B, H, W, C), resized to the data set's size.

    Raises UserError where they are not finite.
    """
    x = data.to_x(images, device)
    size = spec.image_size
    if x.shape[-1] != size:  # sets of larger images, for training that crops and resizes
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    with run.autocast(device, precision):
        probs = classifier(x).float().softmax(1)
    if not probs.isfinite().all():  # argmax of NaN is class 0
        raise UserError("--classifier: its logits are not finite")
    return probs


def labeller(classifier, spec, device, precision):
    """A function from uint8 images (B, H, W, C) to the labels (B,) that a classifier predicts."""

    def label(images):
        probs = probabilities(classifier, images, spec, device, precision)
        return probs.argmax(1).cpu().numpy()

    return label


def confidences(source, classifier, spec, args, device, rank, world_size):
    """The classifier's probability of each image's own label: float32 (N,), on every rank.

    source: the set. Batches are shared out over ranks.
    """
    confidence = torch.zeros(len(source), device=device)
    batch_size = args.batch_size
    starts = range(rank * batch_size, len(source), world_size * batch_size)
    for start in run.progress(starts, rank, desc="select", unit="batch"):
        stop = min(start + batch_size, len(source))
        images, labels = source.gather(np.arange(start, stop))
        y = torch.from_numpy(labels).to(device)
        probs = probabilities(classifier, images, spec, device, args.precision)
        confidence[start:stop] = probs.gather(1, y[:, None])[:, 0]
    return run.sum_over_ranks(confidence).cpu().numpy()


def select(confidence, labels, keep_fraction):
    """The ceil(keep_fraction * n) images of highest confidence of each class of n: sorted rows."""
    kept = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n_kept = math.ceil(keep_fraction * len(rows) - 1e-9)  # 0.07 * 100 is above 7
        best_first = np.argsort(-confidence[rows], kind="stable")
        kept.append(rows[best_first[:n_kept]])
    return np.sort(np.concatenate(kept))


# ------------------------------------------------------------------------------------ plumbing


def check_generates(model, name, spec, with_labels):
    """Raises UserError where the network's images or classes are not those of the data set `spec`.

    name: of the network, for messages. with_labels: whether it is told their labels. Else it may
    know no classes.
    """
    image_size = spec.image_size
    if spec.files and model.image_size >= 64:
        image_size = model.image_size  # training crops and resizes such images
    own = (model.image_size, model.channels, model.num_classes)
    expected = (image_size, spec.channels, spec.num_classes)
    if with_labels and own == (*expected[:2], 0):
        raise UserError(f"{name}: trained without labels; --relabel takes those of a --classifier")
    if own != expected and (with_labels or own[:2] != expected[:2]):
        message = f"(pixels, channels, classes) = {own}, {spec.name} has {expected}"
        raise UserError(f"{name}: {message}")
    model.check_teaches(name, spec, with_labels)


def shard_ids(shard, args):
    """The ids of one shard's images, ascending."""
    start = shard * args.shard_size
    return np.arange(start, min(start + args.shard_size, args.n_images))


def is_made(out_dir, shard):
    """Whether both files of a shard exist."""
    return all(os.path.exists(path) for path in shard_paths(out_dir, shard))


def generate(model, shards, args, rank, guide=None, label=None):
    """Generate and write the given shards. label: as in sample."""
    n_images = sum(len(shard_ids(shard, args)) for shard in shards)
    with run.progress(rank=rank, desc="generate", unit="image", total=n_images) as bar:
        for shard in shards:
            ids = shard_ids(shard, args)
            images, labels = [], []
            for rows in data.batches_of(len(ids), args.batch_size):
                batch_images, batch_labels = sample(model, ids[rows], args, guide, label)
                images.append(batch_images)
                labels.append(batch_labels)
                bar.update(len(rows))
            images_path, labels_path = shard_paths(args.out_dir, shard)
            files.write_npy(np.concatenate(images), images_path)
            files.write_npy(np.concatenate(labels), labels_path)


def make_selection(classifier, args, spec, device, rank, world_size):
    """Write selection.npy and name it in manifest.json, if not yet done. All ranks call it."""
    source = open_shards(args.out_dir, spec)
    selection = {
        "keep_fraction": args.keep_fraction,
        "classifier_sha256": files.sha256(args.classifier),
    }
    if args.weights:
        selection["weights"] = args.weights
    made_before = source.manifest.get("selection", selection)
    if made_before != selection:
        message = "another selection was made there; generate into another directory"
        raise UserError(f"--out-dir {args.out_dir}: {message}")
    if "selection" in source.manifest:
        return
    confidence = confidences(source, classifier, spec, args, device, rank, world_size)
    if rank == 0:
        rows = select(confidence, np.concatenate(source.labels), args.keep_fraction)
        files.write_npy(rows, os.path.join(args.out_dir, "selection.npy"))
        manifest = source.manifest | {"selection": selection}
        files.write_json(manifest, os.path.join(args.out_dir, "manifest.json"))


def report(args, spec, train, test, device):
    """Print the number of images per class, check for memorised images, and draw samples.png.

    train, test: uint8 (N, H, W, C); None for data sets of a million files, where the check would
    take days, and pixels at 256 x 256 tell little.
    """
    source = open_shards(args.out_dir, spec)
    n_shown = min(1000 if train is None else 10_000, len(source))
    images, labels = source.gather(np.arange(n_shown))
    counts = np.bincount(labels, minlength=spec.num_classes)
    of_classes = " ".join(map(str, counts))
    if spec.num_classes > 20:
        of_classes = f"{counts.min()} to {counts.max()} of each"
    print(f"{args.out_dir}: {len(source)} images; classes of the first {n_shown}: {of_classes}")
    if train is not None:
        memorisation.check(args.out_dir, images, train, test, device)
    # A hundred evenly spaced in the order of their labels: with ten classes a row of each.
    places = np.unique(np.linspace(0, n_shown - 1, 100).astype(int))
    x = data.to_x(images[np.argsort(labels, kind="stable")[places]])
    run.save_images(x, os.path.join(args.out_dir, "samples.png"), columns=10)


# ------------------------------------------------------------------------- instead of generating


def export_hub(args):
    """Add a card and checksums to a finished set."""
    if cli.rank() != "0":
        return
    spec = open_dataset(args)
    set_card.export(args.out_dir, open_shards(args.out_dir, spec))


def load_verified(flag, path, expected, device, precision):
    """The network of a flag, of the SHA-256 `expected`; None where the set was made without one.

    Raises UserError where path is None and expected is not, or the other way round, or where it is
    another network.
    """
    if expected is None and path is None:
        return None
    if path is None or expected is None:
        there = "has" if expected else "was made without"
        raise UserError(f"{flag}: the set {there} such a network, by its manifest.json")
    network = load_diffusion(path, device, precision)
    if network.sha256 != expected:
        found = f"its SHA-256 is {network.sha256[:12]}..., the set's manifest.json has"
        raise UserError(f"{flag} {path}: another network, {found} {str(expected)[:12]}...")
    return network


def load_labeller(args, manifest, device):
    """The labeller of --classifier, which labelled the set; None where none did.

    Raises UserError where it is missing, another one, or not of use.
    """
    expected = manifest.get("labels_of_sha256")
    if (expected is None) != (args.classifier is None):
        whose = "predictions of a classifier" if expected else "those that the network was told"
        raise UserError(f"--classifier: the labels of the set are {whose}, by its manifest.json")
    if expected is None:
        return None
    if files.sha256(args.classifier) != expected:
        raise UserError(f"--classifier {args.classifier}: not the one that labelled the set")
    spec = open_dataset(args)
    weights = manifest.get("labels_of_weights")
    classifier, _ = load_classifier(args.classifier, spec, device, weights=weights)
    return labeller(classifier, spec, device, args.precision)


def verify(args):
    """Make one shard of a set again, by its manifest.json, and compare it bit for bit.

    Writes nothing. Ends with status 1 where images or labels differ, as cmp and sha256sum do.
    """
    manifest = read_manifest(args.out_dir)
    set_recipe.use_manifest(args, manifest)
    n_shards = math.ceil(args.n_images / args.shard_size)
    if args.verify >= n_shards:
        raise UserError(f"--verify {args.verify}: {args.out_dir} has shards 0 to {n_shards - 1}")
    rank, world_size, device = run.start_processes(args.precision)
    args.diffusion = args.diffusion or f"out/diffusion-{manifest.get('dataset')}"
    own = manifest.get("network_sha256")
    model = load_verified("--diffusion", args.diffusion, own, device, args.precision)
    other = manifest.get("guide_sha256")
    guide = load_verified("--guide", args.guide, other, device, args.precision)
    n = min(args.shard_size, args.n_images - args.verify * args.shard_size)
    images_path, labels_path = shard_paths(args.out_dir, args.verify)
    shape = (n, model.image_size, model.image_size, model.channels)
    images = files.open_npy(images_path, np.uint8, shape)
    labels = files.open_npy(labels_path, np.int64, (n,))
    ids = shard_ids(args.verify, args)
    label = load_labeller(args, manifest, device)

    differences = set_recipe.Differences()
    batches = data.batches_of(len(ids), args.batch_size)[rank::world_size]
    for rows in run.progress(batches, rank, desc="verify", unit="batch"):
        made_images, made_labels = sample(model, ids[rows], args, guide, label)
        differences.add(images[rows], labels[rows], made_images, made_labels)
    differences.sum_over_ranks()
    if rank == 0:
        title = f"{args.out_dir}, shard {args.verify}: images {ids[0]} to {ids[-1]}"
        print(f"{title} made again from manifest.json, {args.precision}")
        set_recipe.print_places(args.out_dir)
        differences.print(len(ids))
    run.end_processes()
    if differences.other.any():
        raise SystemExit(1)


def main(args):
    if args.export:
        return export_hub(args)
    if args.verify is not None:
        return verify(args)
    rank, world_size, device = run.start_processes(args.precision)
    spec = open_dataset(args)
    model = load_diffusion(args.diffusion, device, args.precision)
    check_generates(model, f"--diffusion {args.diffusion}", spec, with_labels=not args.relabel)
    guide = None
    if args.guide is not None:
        guide = load_guide(args.guide, model, args.precision)
        with_labels = bool(guide.num_classes) and not args.relabel
        guide.check_teaches(f"--guide {args.guide}", spec, with_labels)
    sigma_min, sigma_max = sigma_limits(model, args, guide)
    if sigma_min >= sigma_max:
        asked = f"{args.sigma_min:g} to {args.sigma_max:g}"
        raise UserError(f"--sigma-min, --sigma-max: the networks know no noise level of {asked}")
    if rank == 0 and (sigma_min, sigma_max) != (args.sigma_min, args.sigma_max):
        if guide is None:
            lowest, highest = model.sigma_range
            known = f"{args.diffusion} knows noise levels {lowest:.4g} to {highest:.4g}"
        else:
            known = "--diffusion and --guide do not know all noise levels"
        print(f"note: {known}; sampling from {sigma_max:g} to {sigma_min:g}")
    if args.guidance_scale != 1 and guide is None and model.label_dropout == 0:
        message = f"{args.diffusion} was trained without label dropout; --guide takes another"
        raise UserError(f"--guidance-scale {args.guidance_scale}: {message}")
    if rank == 0 and args.relabel:
        model.warn_of_null_label(args.diffusion)

    # Shards that could not be opened together are not generated in the first place.
    n_shards = math.ceil(args.n_images / args.shard_size)
    allow_shards(n_shards, f"--shard-size {args.shard_size}")
    train = None
    test = None
    classifier = None
    if rank == 0 and not spec.files:
        (train, _), (held_out, _) = data.load_train(
            spec, args.data_dir, args.val_size, args.n_train, args.imbalance
        )
        if model.val_size < args.val_size:  # a network that may have seen them
            train = np.concatenate([train, held_out])
        test, _ = data.load_test(spec, args.data_dir)
    if args.classifier:
        path, weights = args.classifier, args.weights
        classifier, _ = load_classifier(path, spec, device, weights=weights, flags=("--weights",))
    if rank == 0:
        run.claim_directory(
            args.out_dir,
            set_recipe.manifest_of(args, spec, model, (sigma_min, sigma_max), guide),
            name="manifest.json",
            not_compared=["selection"],
        )

    # Listed before the barrier: after it another rank may write, and the lists would differ.
    missing = [shard for shard in range(n_shards) if not is_made(args.out_dir, shard)]
    run.check_shared(os.path.join(args.out_dir, "manifest.json"))
    # Whole shards are shared out over ranks: a shard's batches are the same for any number of them.
    label = labeller(classifier, spec, device, args.precision) if args.relabel else None
    generate(model, missing[rank::world_size], args, rank, guide, label)
    run.barrier()

    if args.keep_fraction:
        make_selection(classifier, args, spec, device, rank, world_size)
    if rank == 0:
        report(args, spec, train, test, device)
    run.end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
