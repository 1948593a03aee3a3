"""What the representations of classifiers and of a diffusion model look like.

    python analyze.py --model at=out/quickstart/at/best.pt \\
        --model at_dra=out/quickstart/at_dra/best.pt --teacher out/diffusion-digits

Of every model, on test images (analysis/metrics.py has the formulae):

  accuracy      clean; under PGD-20 on the margin, at the radius and at a third of it
  rank          RankMe and stable rank of the penultimate features, and their singular values
  spread        uniformity on the unit sphere; alignment of the clean and the adversarial version
                of an image (PGD-20 on the margin)
  frequencies   magnitude of the Fourier transform of d margin / d x, by radius; the share above a
                quarter of a cycle per pixel
  sparseness    error of --sae-seeds top-k sparse autoencoders over the features' variance
  dimension     accuracy of the classifier's own last layer from the first k principal components
                of the training images' features
  margin        margin of the logits, length of its gradient in the norm dual to the attack's, and
                their quotient, a first-order distance to the decision boundary
  similarity    linear CKA of every pair of models

A NAME that is given several times is one kind of model trained with several seeds. --teacher adds
a frozen diffusion model: a logistic regression, fitted to training images, on the pooled output of
one block at one noise level, averaged over --n-noise draws. Its alignment is also measured between
two draws. Intervals are 95 %: over seeds (Student's t) where a name has several, else over images
(for the sparse autoencoder, over images and its seeds).

Writes analysis.json, analysis.md, one PNG per analysis and analysis.png into --out-dir. What is
measured of a model is kept in parts/, under the hash of all that it depends on, the code of the
metrics included. The same command goes on with the models that are missing there, and another set
of models uses those that are there. torchrun shares the models out over processes.
"""

import argparse
import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from analysis import metrics, pictures
from analysis.metrics import ALL_GROUPS, N_GROUPS, half_samples, mean_interval, ratio_interval
from common import UserError, attacks, cli, data, files, run, stats
from published.datasets import DATASETS, open_dataset, spec_of
from published.weights import load_classifier
from teachers import classifier, load

METRICS = {  # of a model: (title in the table, format)
    "clean": ("clean", "{:.1%}"),
    "robust": ("robust", "{:.1%}"),
    "robust_third": ("robust at a third of the radius", "{:.1%}"),
    "rank_me": ("RankMe", "{:.1f}"),
    "stable_rank": ("stable rank", "{:.2f}"),
    "uniformity": ("uniformity", "{:.2f}"),
    "alignment": ("alignment, adversarial", "{:.3f}"),
    "alignment_draws": ("alignment, noise", "{:.3f}"),  # of the teacher alone
    "high_frequencies": ("high frequencies", "{:.1%}"),
    "sae": ("SAE error", "{:.3f}"),
    "dimension": ("classification dimension", "{:.1f}"),
    "margin": ("margin", "{:.2f}"),
    "gradient": ("gradient", "{:.1f}"),
    "distance": ("distance", "{:.3f}"),
}
CURVES = ("singular_values", "saliency", "dimension_curve", "embedding")  # for the pictures
DUAL = {"linf": 1, "l2": 2}  # order of the norm that is dual to the attack's
MAX_FIT = 10_000  # training images for components, autoencoders and the teacher's last layer
MIN_IMAGES = 2 * N_GROUPS  # intervals need two images of each group


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add(
        "--model",
        action="append",
        type=named_checkpoint,
        default=[],
        metavar="NAME=CHECKPOINT",
        help="a classifier, best.pt or hub:OWNER/NAME; give it once per model",
    )
    add("--teacher", type=cli.path, help="diffusion model: directory, .pkl or hub:OWNER/NAME")
    add("--block", help="block of the teacher (default: DRA's)")
    add("--sigma", type=cli.positive, help="its noise level (default: DRA's)")
    add("--n-noise", type=cli.count, default=4, help="draws to average over")
    add = cli.add_data_flags(parser, DATASETS).add_argument
    add("--n-images", type=cli.count, default=10_000, help="first test images")
    add("--n-attacked", type=cli.count, default=256, help="the first ones to attack")
    add("--norm", choices=DUAL, default="linf", help="norm of the attack")
    add("--eps", type=cli.positive, help="its radius (default: the usual)")
    add = parser.add_argument_group("sparse autoencoder").add_argument
    add("--sae-latents", type=cli.count, default=256, help="latents")
    add("--sae-k", type=cli.count, default=8, help="latents active at once")
    add("--sae-steps", type=cli.count, default=3000, help="steps of 256 features")
    add("--sae-seeds", type=cli.count, default=3, help="autoencoders per model")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=cli.batch, default=256, help="images per pass")
    cli.add_precision_flag(add, on_gpu="tf32")
    add("--seed", type=cli.seed, default=0, help="seed of all that is drawn")
    add("--out-dir", type=cli.path, default="out/analysis", help="directory of the results")
    args = parser.parse_args(argv)
    parser.check_data_flags(argv, args)
    spec = spec_of(args)
    if not args.model and not args.teacher:
        parser.error("argument --model: give at least one, or --teacher")
    if len(set(args.model)) < len(args.model):
        parser.error("argument --model: the same model twice")
    with_teacher = ("--teacher", args.teacher)
    parser.refuse_unused(argv, dict.fromkeys(("--block", "--sigma", "--n-noise"), with_teacher))
    if args.sae_k > args.sae_latents:
        parser.error(f"argument --sae-k: {args.sae_k} of {args.sae_latents} latents")
    if args.eps is None and args.norm not in spec.eps:
        parser.error(f"argument --eps: required, {spec.name} has no usual radius in {args.norm}")
    args.eps = args.eps or spec.eps[args.norm]
    parser.check_radius("--eps", args.eps, args.norm, spec)
    return args


def named_checkpoint(text):
    """argparse type: NAME=CHECKPOINT, as a tuple (name, path)."""
    name, _, path = text.partition("=")
    letters = name.replace("_", "").replace("-", "")
    if not letters.isalnum() or not path or name == "teacher":
        expected = "NAME=CHECKPOINT, the name of letters, digits, - and _, and not 'teacher'"
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return name, cli.path(path)


# ------------------------------------------------------------------------ what is measured


def measure(name, model, fit, test, args, device):
    """(row, features (N, D) float32): what the table and the pictures show of a model.

    row: a dict, in which the METRICS are [value, low, high]. fit: (images, ids, labels) of training
    images. test: (images, labels). Images are uint8 (N, H, W, C).
    Raises UserError, which calls the model `name`, where there is nothing to measure: features or
    gradients are the same for all images.
    """
    fit_images, fit_ids, _ = fit
    images, labels = test
    labels_attacked = labels[: args.n_attacked]
    with run.autocast(device, args.precision):
        features = features_of(model, images, np.arange(len(labels)), args, device)
        fit_features = features_of(model, fit_images, fit_ids, args, device)
        check_features(name, features, args.sae_k)
        clean, adversarial, correct, robust = attack(
            model, images, labels_attacked, args.eps, args, device
        )
        *_, robust_third = attack(model, images, labels_attacked, args.eps / 3, args, device)
        margins, lengths, spectra = margin_gradients(model, images, labels, args, device)
    kernel = metrics.kernel_sums(features)
    has_gradient = lengths > 0
    if not has_gradient.any():
        raise UserError(f"{name}: the margin's gradient is zero on all images")
    distances = np.zeros_like(margins)
    distances[has_gradient] = margins[has_gradient] / lengths[has_gradient]

    row = {
        "dim": features.shape[1],
        "clean": stats.share(margins > 0),
        "robust": stats.share(robust),
        "robust_third": stats.share(robust_third),
        **measure_rank(features),
        "uniformity": half_samples(lambda groups: metrics.uniformity(kernel, groups)),
        "alignment": mean_interval(metrics.squared_distances(clean, adversarial)),
        **measure_frequencies(spectra, spec_of(args).image_size),
        **measure_sparseness(features, fit_features, args, device),
        **measure_dimension(model.logits, features, labels, fit_features),
        "margin": mean_interval(margins),
        "gradient": mean_interval(lengths),
        "zero_gradients": int((~has_gradient).sum()),
        "distance": ratio_interval(distances, has_gradient),
        "embedding": {
            **metrics.embedding(clean, adversarial, args.seed),
            "label": labels_attacked.tolist(),
            "fooled": (correct & ~robust).tolist(),
        },
    }
    if isinstance(model, classifier.DiffusionHead):
        first = draw_features(model, images, len(clean), 0, args, device)
        second = draw_features(model, images, len(clean), 1, args, device)
        row["alignment_draws"] = mean_interval(metrics.squared_distances(first, second))
    return row, features


def check_features(name, features, sae_k):
    """Raises UserError where features (N, D) are the same for all images, or too few."""
    width = features.shape[1]
    values = metrics.singular_values(metrics.moments(features), ALL_GROUPS)
    length_of_mean = np.linalg.norm(features.mean(0, dtype=np.float64))
    if not values[0] > 1e-6 * length_of_mean * len(features) ** 0.5:
        raise UserError(f"{name}: its features are not finite, or the same for all images")
    if sae_k >= width:
        raise UserError(f"--sae-k {sae_k}: expected less than the {width} features of {name}")


def measure_rank(features):
    """Singular values over the largest one, RankMe and stable rank of features (N, D)."""
    moments = metrics.moments(features)
    values = metrics.singular_values(moments, ALL_GROUPS)

    def ranks(groups):
        values = metrics.singular_values(moments, groups)
        return [metrics.rank_me(values), metrics.stable_rank(values)]

    rank_me, stable_rank = zip(*half_samples(ranks))
    return {
        "singular_values": (values / values[0]).tolist(),
        "rank_me": rank_me,
        "stable_rank": stable_rank,
    }


def measure_frequencies(spectra, size):
    """Mean spectrum, summing to 1, and share of the high frequencies.

    spectra: (N, rings) of the margin's gradients. size: of the images, in pixels.
    """
    curve = spectra.mean(0)

    def high_share(groups):
        return metrics.high_share(metrics.group_mean(spectra, groups), size)

    return {
        "saliency": (curve / curve.sum()).tolist(),
        "high_frequencies": half_samples(high_share),
    }


def measure_dimension(last_layer, features, labels, fit_features):
    """Accuracy of the last layer from k components, and the classification dimension."""
    weight = last_layer.weight.detach().double().cpu().numpy()
    bias = last_layer.bias.detach().double().cpu().numpy()
    basis, mean = metrics.principal_components(fit_features)
    counts = metrics.dimension_counts(features, labels, weight, bias, basis, mean)
    return {
        "dimension_curve": (counts.sum(0) / len(labels)).tolist(),
        "dimension": half_samples(lambda groups: metrics.classification_dimension(counts, groups)),
    }


def measure_sparseness(features, fit_features, args, device):
    """Error of sparse autoencoders over the variance of the test features, overall and by seed."""
    mean = fit_features.mean(0, dtype=np.float64)
    scale = np.sqrt(np.square(fit_features - mean).mean())

    def scaled(values):
        return torch.from_numpy((values - mean) / scale).float().to(device)

    x = scaled(features)
    x_fit = scaled(fit_features)
    variances = (x - scaled(features.mean(0, dtype=np.float64))).square().sum(1)
    variances = variances.double().cpu().numpy()
    errors = []
    for seed in range(args.seed, args.seed + args.sae_seeds):
        sae = metrics.train_sae(x_fit, args.sae_latents, args.sae_k, args.sae_steps, seed)
        with torch.no_grad():
            errors.append((sae(x) - x).square().sum(1).double().cpu().numpy())
    value, _, high = ratio_interval(np.mean(errors, 0), variances)
    half_width = high - value
    by_seed = (np.sum(errors, 1) / variances.sum()).tolist()
    if args.sae_seeds > 1:
        mean_of_seeds, _, high = stats.t_interval(by_seed)
        half_width = float(np.hypot(half_width, high - mean_of_seeds))
    return {"sae": [value, value - half_width, value + half_width], "sae_by_seed": by_seed}


# ----------------------------------------------------------------------------- passes of a model


@torch.no_grad()
def features_of(model, images, ids, args, device):
    """Penultimate features (N, D) float32 of the uint8 images of these numbers."""
    parts = []
    for batch in data.batches_of(len(ids), args.batch_size):
        _, features = model(data.to_x(images[ids[batch]], device), with_features=True)
        parts.append(features.float().cpu())
    return torch.cat(parts).numpy()


def attack(model, images, labels, eps, args, device):
    """PGD-20 on the margin, step eps / 4, of the first images, as many as labels.

    Returns features (N, D) of the images and of their adversarial versions, and two bool arrays
    (N,): which images are correct, and which are so with and without the attack.
    """
    parts = []
    for i, batch in enumerate(data.batches_of(len(labels), args.batch_size)):
        x = data.to_x(images[batch], device)
        y = torch.from_numpy(labels[batch]).to(device)
        generator = data.stream(args.seed, "analyze-pgd", i, device)
        start = attacks.random_start(x.shape, args.norm, eps, generator)
        settings = dict(norm=args.norm, eps=eps, step_size=eps / 4, n_steps=20, loss="margin")
        x_adv = attacks.pgd(model, x, y, start, **settings)
        with torch.no_grad():
            logits, features = model(x, with_features=True)
            logits_adv, features_adv = model(x_adv, with_features=True)
        correct = logits.argmax(1) == y
        robust = correct & (logits_adv.argmax(1) == y)
        parts.append((features, features_adv, correct, robust))
    return [torch.cat(values).cpu().numpy() for values in zip(*parts)]


def margin_gradients(model, images, labels, args, device):
    """Margins z_y - max of the others (N,), and the lengths (N,) in the dual norm and spectra
    (N, rings) of their gradients in x. All are float64.

    Unlike the cross-entropy's, the margin's gradient does not vanish where the model is sure.
    """
    parts = []
    for batch in data.batches_of(len(labels), args.batch_size):
        x = data.to_x(images[batch], device).requires_grad_(True)
        y = torch.from_numpy(labels[batch]).to(device)
        margin = -attacks.attack_losses(model(x), y, "margin")
        (gradient,) = torch.autograd.grad(margin.sum(), x)
        length = gradient.flatten(1).double().norm(p=DUAL[args.norm], dim=1)
        parts.append((margin.detach().double(), length, metrics.spectrum(gradient)))
    return [torch.cat(values).cpu().numpy() for values in zip(*parts)]


@torch.no_grad()
def draw_features(model, images, n, draw, args, device):
    """Features (n, D) of the teacher for the first images, each under its own noise.

    draw: a number; another one gives other noise.
    """
    parts = []
    for batch in data.batches_of(n, args.batch_size):
        streams = data.id_streams(args.seed, f"analyze-draw-{draw}", batch)
        noise = data.normal_of(streams, model.diffusion.noise_shape).to(device)
        parts.append(model.features(data.to_x(images[batch], device), noise).float().cpu())
    return torch.cat(parts).numpy()


def teacher_classifier(diffusion, teacher, fit, spec, args, device):
    """A block of the diffusion model as a classifier: a logistic regression on its features.

    teacher: of load_teacher. fit: (images, ids, labels) of training images.
    """
    images, ids, labels = fit

    draws = dict(n_noise=args.n_noise, fresh=False, seed=args.seed)
    place = dict(block=teacher["block"], sigma=teacher["sigma"])

    def with_head(weight, bias):
        head = classifier.DiffusionHead(diffusion, weight=weight, bias=bias, **place, **draws)
        return head.to(device).eval().requires_grad_(False)

    noise = torch.zeros(1, *diffusion.noise_shape, device=device)
    with torch.no_grad():
        x = data.to_x(images[ids[:1]], device)
        (one,) = diffusion.features(x, teacher["sigma"], None, [teacher["block"]], noise)
    weight = torch.zeros(spec.num_classes, one.shape[1])
    unfitted = with_head(weight, torch.zeros(spec.num_classes))
    features = features_of(unfitted, images, ids, args, device)
    return with_head(*metrics.fit_linear(features, labels, spec.num_classes))


# ------------------------------------------------------------------------------------ all models


@dataclass
class Job:
    """One model. request: all that its numbers depend on. stem: its part's path, no ending."""

    name: str
    path: str
    request: dict
    stem: str

    def is_done(self):
        return os.path.exists(f"{self.stem}.json") and os.path.exists(f"{self.stem}.npy")


def jobs_of(args, shared, teacher):
    """A Job per model, in the order of the command line, the teacher last.

    shared: dict of what the numbers of all models depend on. teacher: dict of what those of the
    teacher depend on besides, or None without one.
    Raises UserError where a name has the same model twice.
    """
    named = [(name, path, {"checkpoint_sha256": files.sha256(path)}) for name, path in args.model]
    if teacher:
        named.append(("teacher", args.teacher, teacher))
    jobs = []
    for name, path, identity in named:
        request = shared | identity
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        stem = os.path.join(args.out_dir, "parts", digest)
        if any((job.name, job.stem) == (name, stem) for job in jobs):
            same = "the same model as another one of that name, seeds must differ"
            raise UserError(f"--model {name}={path}: {same}")
        jobs.append(Job(name, path, request, stem))
    return jobs


def read_part(job):
    """(row, features (N, D), mapped): what main wrote of a model."""
    row = files.read_json(f"{job.stem}.json")
    lacking = {"dim", *METRICS, *CURVES} - {"alignment_draws"} - row.keys()
    if lacking:
        names = ", ".join(sorted(lacking))
        raise UserError(f"{job.stem}.json: lacks {names}; delete it, it will be made again")
    shape = (job.request["n"], row["dim"])
    return row, files.open_npy(f"{job.stem}.npy", np.float32, shape)


def collect(jobs):
    """(rows by name, similarities): what was measured of all models.

    Raises UserError where models of one name have features of different sizes.
    """
    rows = {}
    features = {}
    for job in jobs:
        row, job_features = read_part(job)
        rows.setdefault(job.name, []).append({"path": job.path, **row})
        features.setdefault(job.name, []).append(job_features)
    for name in features:
        sizes = [row["dim"] for row in rows[name]]
        if len(set(sizes)) > 1:
            different = " and ".join(str(size) for size in sizes)
            wanted = "give those of one kind of network one name"
            raise UserError(f"--model {name}: models of {different} features; {wanted}")
        n = rows[name][0]["n"]
        if n < 5 * sizes[0]:
            few = f"{n} images for the {sizes[0]} features of {name}"
            print(f"note: {few}: ranks are low and similarities high for want of images")
    names = [name for name in features for _ in features[name]]
    matrix, half = similarities(sum(features.values(), []))
    return rows, {"names": names, "matrix": matrix, "half_interval": half}


def similarities(features):
    """CKA of every pair of feature arrays, and half the width of its 95 % interval over images.

    Both are symmetric matrices, as lists of lists.
    """
    matrix = np.eye(len(features))
    half = np.zeros((len(features), len(features)))
    for i, a in enumerate(features):
        for j, b in enumerate(features[:i]):
            value, low, _ = metrics.cka_interval(a, b)
            matrix[i, j] = matrix[j, i] = value
            half[i, j] = half[j, i] = value - low
    return matrix.tolist(), half.tolist()


def markdown(result):
    """The table: a column per name, a row per metric, and below it the caption."""
    rows_by_name = result["models"]
    sizes = [f"{len(rows)}, {rows[0]['dim']}" for rows in rows_by_name.values()]
    lines = [
        f"| | {' | '.join(rows_by_name)} |",
        "|---" * (len(rows_by_name) + 1) + "|",
        f"| models, features | {' | '.join(sizes)} |",
    ]
    for key, (title, form) in METRICS.items():
        cells = []
        for rows in rows_by_name.values():
            cell = "-"
            if key in rows[0]:
                value, low, high = (form.format(x) for x in metrics.interval(rows, key))
                cell = f"{value} ({low} to {high})"
            cells.append(cell)
        if set(cells) != {"-"}:
            lines.append(f"| {title} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"{table}\n\n{pictures.caption(result)}.\n"


def load_images(spec, args):
    """(fit, test) as `measure` takes them."""
    train, _ = run.read_once(
        data.load_train, spec, args.data_dir, args.val_size, args.n_train, args.imbalance
    )
    images, labels = run.read_once(data.load_test, spec, args.data_dir)
    n_train = len(train[1])
    if n_train < MIN_IMAGES:
        few = f"the fits need at least {MIN_IMAGES} training images, there are {n_train}"
        raise UserError(f"--val-size, --n-train, --imbalance: {few}")
    n_least = min(len(labels), args.n_images, args.n_attacked)
    if n_least < MIN_IMAGES:
        few = f"intervals need at least {MIN_IMAGES} test images, there are {n_least}"
        raise UserError(f"--dataset {spec.name}, --n-images, --n-attacked: {few}")
    # Training images may be sorted by class: the fits take random ones.
    fit_ids = np.sort(np.random.default_rng(0).permutation(n_train)[:MAX_FIT])
    fit = train[0], fit_ids, train[1][fit_ids]
    return fit, (images, labels[: args.n_images])


def load_teacher(spec, args, device, rank):
    """(diffusion model, dict of what its features depend on) of --teacher; two None without it."""
    if not args.teacher:
        return None, None
    diffusion = load.load_diffusion(args.teacher, device, args.precision)
    diffusion.check_teaches(f"--teacher {args.teacher}", spec, with_labels=False)
    if rank == 0:
        diffusion.warn_of_null_label(args.teacher)
    teacher = {
        "network_sha256": diffusion.sha256,
        "block": diffusion.default_block if args.block is None else args.block,
        "sigma": args.sigma or diffusion.default_sigma,
        "n_noise": args.n_noise,
    }
    diffusion.check_places(f"--teacher {args.teacher}", [teacher["block"]], [teacher["sigma"]])
    return diffusion, teacher


def main(args):
    rank, world_size, device = run.start_processes(args.precision)
    spec = open_dataset(args)
    fit, test = load_images(spec, args)
    diffusion, teacher = load_teacher(spec, args, device, rank)

    # What is measured of a model has its files, named by the hash of all that it depends on.
    not_shared = ("model", "teacher", "block", "sigma", "n_noise", "out_dir")
    not_shared += ("data_dir", "download", "ignore_checksum")
    settings = {key: value for key, value in vars(args).items() if key not in not_shared}
    settings |= {"image_size": spec.image_size, "classes": spec.classes}
    shared = {
        **settings,
        "data_sha256": run.once(data.sha256, (fit[0], fit[2]), test),
        "n": len(test[1]),
        "torch": torch.__version__,
        "device": device.type,
        "analyze.py_sha256": files.sha256(__file__),
        "metrics.py_sha256": files.sha256(metrics.__file__),
        "attacks.py_sha256": files.sha256(attacks.__file__),
    }
    jobs = jobs_of(args, shared, teacher)
    parts = os.path.join(args.out_dir, "parts")
    if rank == 0:
        run.claim_directory(parts, {"script": "analyze.py"}, "parts.json")
    # Jobs of one stem share their files. The teacher, the slowest, comes first. All ranks list
    # what is missing before the first of them writes anything.
    missing = {job.stem: job for job in reversed(jobs) if not job.is_done()}
    run.check_shared(os.path.join(parts, "parts.json"))

    own = list(missing.values())[rank::world_size]
    for job in run.progress(own, rank, desc="analyze", unit="model"):
        if job.name == "teacher":
            model = teacher_classifier(diffusion, teacher, fit, spec, args, device)
        else:
            model, _ = load_classifier(job.path, spec, device)
        row, features = measure(f"{job.name} ({job.path})", model, fit, test, args, device)
        files.write_npy(features, f"{job.stem}.npy")
        files.write_json(job.request | row, f"{job.stem}.json")
    run.barrier()

    if rank == 0:
        rows, cka = collect(jobs)
        environment = run.environment()
        result = {"settings": settings, "environment": environment, "models": rows, "cka": cka}
        files.write_json(result, os.path.join(args.out_dir, "analysis.json"))
        files.write_text(markdown(result), os.path.join(args.out_dir, "analysis.md"))
        print(markdown(result), end="")
        pictures.draw(result, args.out_dir)
    run.end_processes()


if __name__ == "__main__":
    cli.run_script(main, parse_args())
