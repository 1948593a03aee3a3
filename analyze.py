"""What the representations of classifiers and of a diffusion model look like: rank, spread, frequencies, sparseness, similarity.

    python analyze.py --model at=out/quickstart/at/best.pt --model dm_at_dra=out/quickstart/dm_at_dra/best.pt --teacher out/diffusion-digits
    torchrun --nproc_per_node 2 analyze.py --model at=out/a/best.pt --model at=out/b/best.pt --model dra=out/c/best.pt

Of every model, on test images (common/representations.py has the formulae):

  accuracy       clean; under PGD-20 on the margin, at the radius and at a third of it
  rank           RankMe and stable rank of the penultimate features, and their singular values
  spread         uniformity on the unit sphere; alignment of clean and adversarial (PGD-20 on the margin) versions of an image
  frequencies    magnitude of the Fourier transform of d margin / d x, by radius; share above a quarter of a cycle per pixel
  sparseness     error of a top-k sparse autoencoder, over the features' variance; --sae-seeds of them
  dimension      accuracy of the classifier's own last layer from the first k principal components of the training images' features
  margin         logit margin, length of its gradient in the norm dual to the attack's, and their quotient, a first-order distance
  similarity     linear CKA of every pair

One NAME given several times is one kind of model trained with several seeds. --teacher adds a frozen diffusion model as a row: the pooled
output of one block at one noise level, averaged over --n-noise draws, under a logistic regression fitted to training images; its
alignment is also that of two draws. Intervals are 95 %: over seeds (Student's t) where a name has several, else over images (and, of
the sparse autoencoder, over its seeds).

Writes analysis.json, analysis.md, one PNG per analysis and analysis.png into --out-dir. What is computed of a model is kept in
parts/, model by model, named by the hash of all that it depends on, the code of the metrics included: the same command goes on with
the models that are left, and another set of models reuses those that are there.
"""

import functools
import hashlib
import json
import os

import numpy as np
import torch

from common import attacks, checkpoint, cli, data, diffusion, dist, generative, models, pictures, representations, runlog, stats
from common.representations import N_GROUPS, by_group, half_samples, interval, means

METRICS = {  # of a model: (title in the table, format)
    "clean": ("clean", "{:.1%}"),
    "robust": ("robust", "{:.1%}"),
    "robust_third": ("robust at a third of the radius", "{:.1%}"),
    "rank_me": ("RankMe", "{:.1f}"),
    "stable_rank": ("stable rank", "{:.2f}"),
    "uniformity": ("uniformity", "{:.2f}"),
    "alignment": ("alignment, adversarial", "{:.3f}"),
    "alignment_draws": ("alignment, noise", "{:.3f}"),
    "high_frequencies": ("high frequencies", "{:.1%}"),
    "sae": ("SAE error", "{:.3f}"),
    "dimension": ("classification dimension", "{:.1f}"),
    "margin": ("margin", "{:.2f}"),
    "gradient": ("gradient", "{:.1f}"),
    "distance": ("distance", "{:.3f}"),
}
MAX_FIT = 10_000  # training images that principal components, autoencoders and the teacher's last layer are fitted to
DUAL = {"linf": 1, "l2": 2}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT", help="a classifier; give it once per model")
    group.add_argument("--teacher", help="a diffusion model: directory, NVlabs .pkl or hub:OWNER/NAME")
    group.add_argument("--block", help="block of the teacher (default: DRA's)")
    group.add_argument("--sigma", type=cli.positive, help="its noise level, in units of [-1, 1] (default: DRA's)")
    group.add_argument("--n-noise", type=cli.count, default=4, help="draws of noise that its features are averaged over")
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set, its test images")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--val-size", type=cli.count, help="first training images, left out of all fits (default: the data set's)")
    group.add_argument("--n-images", type=cli.count, default=10_000, help="first test images, at most")
    group.add_argument("--n-attacked", type=cli.count, default=256, help="of these the first, attacked too")
    group.add_argument("--norm", choices=DUAL, default="linf", help="norm of the attack")
    group.add_argument("--eps", type=cli.positive, help="its radius, of x in [0, 1] (default: the data set's usual one)")
    group = parser.add_argument_group("sparse autoencoder")
    group.add_argument("--sae-latents", type=cli.count, default=256, help="latents")
    group.add_argument("--sae-k", type=cli.count, default=8, help="of these active for an image")
    group.add_argument("--sae-steps", type=cli.count, default=3000, help="steps of 256 features")
    group.add_argument("--sae-seeds", type=cli.count, default=3, help="autoencoders per model")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=256, help="images per pass")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of noise, attacks and autoencoders")
    group.add_argument("--out-dir", default="out/analysis", help="directory of the results")
    args = parser.parse_args(argv)
    spec = data.DATASETS[args.dataset]
    args.models = [tuple(text.partition("=")[::2]) for text in args.model]
    if not args.models and not args.teacher:
        parser.error("argument --model: give at least one, or --teacher")
    for name, path in args.models:
        if not name or not path or name == "teacher" or not name.replace("_", "").replace("-", "").isalnum():
            parser.error(f"argument --model: expected NAME=CHECKPOINT, the name of letters, digits, - and _, got '{name}={path}'")
    if len(set(args.models)) < len(args.models):
        parser.error("argument --model: the same model twice")
    parser.refuse_unused(argv, {flag: ("--teacher", args.teacher) for flag in ("--block", "--sigma", "--n-noise")})
    if args.sae_k > args.sae_latents:
        parser.error(f"argument --sae-k: {args.sae_k} of {args.sae_latents} latents")
    if args.eps is None and args.norm not in spec.eps:
        parser.error(f"argument --eps: required, {spec.name} has no usual radius in {args.norm}")
    args.eps = args.eps or spec.eps[args.norm]
    if args.norm == "linf" and args.eps > 1:
        parser.error(f"argument --eps: {args.eps:g}, expected at most 1, of x in [0, 1]; 8/255 is written so")
    args.val_size = spec.val_size if args.val_size is None else args.val_size
    return args


# ------------------------------------------------------------------------------------------------- one model, measured


def batches_of(images, ids, args, device):
    """x in [0, 1] of the uint8 images of these numbers, batch by batch."""
    for part in np.split(ids, range(args.batch_size, len(ids), args.batch_size)):
        yield data.to_x(images[part], device)


@torch.no_grad()
def features_of(model, images, ids, args, device, path=None):
    """Penultimate features (N, D) float32 of the uint8 images of these numbers: in memory, or in the file `path` mapped."""
    shape = len(ids), model.logits.in_features
    features = checkpoint.map_zeros(path, np.float32, shape) if path else np.empty(shape, np.float32)
    for i, x in enumerate(batches_of(images, ids, args, device)):
        features[i * args.batch_size :][: len(x)] = model(x, with_features=True)[1].float().cpu().numpy()
    return features


def margin_gradients(model, x, y):
    """(margin z_y - max of the others (B,), its gradient (B, C, H, W)): unlike the cross-entropy's, it does not vanish on sure images."""
    x = x.clone().requires_grad_(True)
    margin = -attacks.attack_losses(model(x), y, "margin")
    return margin.detach(), torch.autograd.grad(margin.sum(), x)[0]


def attacked(model, images, labels, eps, args, device):
    """PGD-20, step eps / 4, on the margin, of the first images, those with labels.

    Returns (features of the images, of their adversarial versions, which are correct, which stay so), a row per image.
    """
    clean, adversarial, correct, robust = [], [], [], []
    for i, s in enumerate(range(0, len(labels), args.batch_size)):
        rows = slice(s, min(s + args.batch_size, len(labels)))
        x, y = data.to_x(images[rows], device), torch.from_numpy(labels[rows]).to(device)
        start = attacks.random_start(x.shape, args.norm, eps, data.stream(args.seed, "analyze-pgd", i, device))
        attack = dict(norm=args.norm, eps=eps, step_size=eps / 4, n_steps=20, loss="margin")
        x_adv = attacks.pgd(model, x, y, [start], **attack)
        with torch.no_grad():
            (logits, features), (logits_adv, features_adv) = (model(part, with_features=True) for part in (x, x_adv))
        right = logits.argmax(1) == y
        clean.append(features.cpu().numpy())
        adversarial.append(features_adv.cpu().numpy())
        correct.append(right.cpu().numpy())
        robust.append((right & (logits_adv.argmax(1) == y)).cpu().numpy())
    return tuple(map(np.concatenate, (clean, adversarial, correct, robust)))


def pixel_values(model, images, labels, args, device):
    """(B, 5 + rings) of each batch: whether it is correct, whether the margin has a gradient, margin, length of its gradient, their
    quotient (0 without a gradient), the gradient's spectrum."""
    for i, x in enumerate(batches_of(images, np.arange(len(labels)), args, device)):
        y = torch.from_numpy(labels[i * args.batch_size :][: len(x)]).to(device)
        margin, gradient = margin_gradients(model, x, y)
        margin, length = margin.double(), gradient.flatten(1).double().norm(p=DUAL[args.norm], dim=1)
        distance = torch.where(length > 0, margin / length, 0.0)
        columns = torch.stack([margin > 0, length > 0, margin, length, distance], 1)
        yield torch.cat([columns, representations.spectrum(gradient)], 1).cpu().numpy()


def measure(name, model, splits, args, device, path):
    """What the table and the pictures show of a model, numbers and lists by name; the test images' features go into the file `path`.

    Raises UserError, which calls the model `name`, where there is nothing to measure: features or gradients that tell no images apart.
    """
    (fit_images, fit_ids, _), (images, labels) = splits
    weight, bias = (p.detach().double().cpu().numpy() for p in (model.logits.weight, model.logits.bias))
    features = features_of(model, images, np.arange(len(labels)), args, device, path)
    fit_features = features_of(model, fit_images, fit_ids, args, device)
    found = {"dim": features.shape[1]}

    moments = representations.moments(features)
    values = representations.singular_values(moments, np.arange(N_GROUPS))
    if not values[0] > 1e-6 * np.linalg.norm(moments[1].sum(0)) / len(labels) ** 0.5:
        raise cli.UserError(f"{name}: its features are not finite, or the same for all images")
    if args.sae_k >= features.shape[1]:
        raise cli.UserError(f"--sae-k {args.sae_k}: expected less than the {features.shape[1]} features of {name}")
    found["singular_values"] = (values / values[0]).tolist()

    def ranks(groups):
        values = representations.singular_values(moments, groups)
        return [representations.rank_me(values), representations.stable_rank(values)]

    found["rank_me"], found["stable_rank"] = zip(*half_samples(ranks))

    kernel = representations.kernel_sums(features)
    found["uniformity"] = half_samples(lambda groups: representations.uniformity(kernel, groups))
    first = model, images, labels[: args.n_attacked]
    clean, adversarial, correct, robust = attacked(*first, args.eps, args, device)
    for key, withstood in {"robust": robust, "robust_third": attacked(*first, args.eps / 3, args, device)[3]}.items():
        found[key] = [withstood.mean(), *stats.wilson(int(withstood.sum()), len(withstood))]
    of_attacked = {"alignment": representations.squared_distances(clean, adversarial)}
    if isinstance(model, generative.DiffusionHead):
        of_attacked["alignment_draws"] = representations.squared_distances(*two_draws(model, images, len(clean), args, device))
    for key, values in of_attacked.items():
        found[key] = half_samples(functools.partial(mean_of, by_group([values]), 0))
    found["embedding"] = embedding(clean, adversarial, args.seed) | {
        "label": labels[: args.n_attacked].tolist(),
        "fooled": (correct & ~robust).tolist(),
    }

    sums = by_group(pixel_values(model, images, labels, args, device))
    n_correct, n_zero = int(sums[:, 1].sum()), len(labels) - int(sums[:, 2].sum())
    if n_zero == len(labels):
        raise cli.UserError(f"{name}: the margin's gradient is zero on all images")
    found["clean"], found["zero_gradients"] = [n_correct / len(labels), *stats.wilson(n_correct, len(labels))], n_zero
    found["margin"], found["gradient"] = (half_samples(functools.partial(mean_of, sums, column)) for column in (2, 3))
    found["distance"] = half_samples(lambda groups: sums[groups, 5].sum() / max(sums[groups, 2].sum(), 1))
    curve = means(sums, np.arange(N_GROUPS))[5:]
    found["saliency"] = (curve / curve.sum()).tolist()
    size = data.DATASETS[args.dataset].image_size
    found["high_frequencies"] = half_samples(lambda groups: representations.high_share(means(sums, groups)[5:], size))

    basis, mean = representations.principal_components(fit_features)
    counts = representations.dimension_counts(features, labels, weight, bias, basis, mean)
    found["dimension"] = half_samples(lambda groups: representations.classification_dimension(counts, groups))
    found["dimension_curve"] = (counts.sum(0) / len(labels)).tolist()

    scale = np.sqrt(np.square(fit_features - mean).mean())
    fit_x = torch.from_numpy((fit_features - mean) / scale).float().to(device)
    seeds = range(args.seed, args.seed + args.sae_seeds)
    saes = [representations.train_sae(fit_x, args.sae_latents, args.sae_k, args.sae_steps, seed) for seed in seeds]
    test_mean = torch.from_numpy((moments[1].sum(0) / len(labels) - mean) / scale).float().to(device)

    @torch.no_grad()
    def errors():
        for start in range(0, len(features), args.batch_size):
            x = torch.from_numpy((features[start : start + args.batch_size] - mean) / scale).float().to(device)
            yield torch.stack([(centre - x).square().sum(1) for centre in (test_mean, *(sae(x) for sae in saes))], 1).cpu().numpy()

    left = by_group(errors())  # columns: number of images, variance, error of each autoencoder
    value, low, high = half_samples(lambda groups: left[groups, 2:].sum() / left[groups, 1].sum() / len(saes))
    found["sae_by_seed"] = (left[:, 2:].sum(0) / left[:, 1].sum()).tolist()
    of_seeds = interval([{"sae": [error]} for error in found["sae_by_seed"]], "sae") if len(saes) > 1 else [value, value]
    half = np.hypot((high - low) / 2, (of_seeds[-1] - of_seeds[0]))
    found["sae"] = [value, value - half, value + half]
    return found


def mean_of(sums, column, groups):
    return means(sums, groups)[column]


@torch.no_grad()
def two_draws(model, images, n, args, device):
    """Features of the first n images under a draw of noise of each image's own, and under another."""
    for draw in range(2):
        parts = []
        for i, x in enumerate(batches_of(images, np.arange(n), args, device)):
            streams = data.id_streams(args.seed, f"analyze-draw-{draw}", i * args.batch_size + np.arange(len(x)))
            parts.append(model.features(x, data.normal_of(streams, model.diffusion.noise_shape).to(device)))
        yield torch.cat(parts).float().cpu().numpy()


def embedding(clean, adversarial, seed):
    """{"pca": (2 n, 2), "tsne": (2 n, 2)} of unit features, the clean images first. The PCA is the clean ones'."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    both = representations.unit(np.concatenate([clean, adversarial]))
    pca = PCA(2, random_state=seed).fit(both[: len(clean)]).transform(both)
    tsne = TSNE(2, perplexity=min(30, len(both) / 4), init="pca", random_state=seed).fit_transform(both)
    return {"pca": pca.round(4).tolist(), "tsne": tsne.round(3).tolist()}


# ----------------------------------------------------------------------------------------------------- all models


@torch.no_grad()
def teacher_classifier(network, block, sigma, fit, spec, args, device):
    """The diffusion model's block as a classifier: a logistic regression on its features of the training images `fit`."""
    images, ids, labels = fit

    def with_head(weight, bias):
        head = generative.DiffusionHead(network, args.n_noise, False, args.seed, block, sigma, weight.cpu(), bias.cpu())
        return head.to(device).eval().requires_grad_(False)

    noise = torch.zeros(1, *network.noise_shape, device=device)
    width = network.features(data.to_x(images[ids[:1]], device), sigma, None, [block], noise)[0].shape[1]
    headless = with_head(torch.zeros(spec.num_classes, width), torch.zeros(spec.num_classes))
    with torch.enable_grad():
        fitted = representations.fit_linear(features_of(headless, images, ids, args, device), labels, spec.num_classes, device)
    return with_head(*fitted)


def read_part(stem, n):
    """(what measure found of a model, its features (n, D) mapped): the files that main wrote."""
    row = checkpoint.read_json(f"{stem}.json")
    wanted = METRICS.keys() - {"alignment_draws"} | {"dim", "singular_values", "saliency", "dimension_curve", "embedding"}
    if not wanted <= row.keys():
        raise cli.UserError(f"{stem}.json: lacks {', '.join(sorted(wanted - row.keys()))}; delete it, it will be made again")
    return row, checkpoint.open_npy(f"{stem}.npy", np.float32, (n, row["dim"]))


def similarities(features):
    """CKA of every pair of feature arrays and the half-width of its 95 % interval over the images: two symmetric lists of lists."""
    found, half = np.eye(len(features)), np.zeros((len(features), len(features)))
    for i in range(len(features)):
        own = representations.moments(features[i])
        for j in range(i):
            pair = own, representations.moments(features[j]), representations.moments(features[i], features[j])
            value, low, _ = half_samples(lambda groups, pair=pair: representations.cka(*pair, groups), n_draws=50)
            found[i, j] = found[j, i] = value
            half[i, j] = half[j, i] = value - low
    return found.tolist(), half.tolist()


def markdown(result):
    """The table: a column per name, a row per metric, and below it what they are of."""
    found = result["models"]
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    lines.append("| models, features | " + " | ".join(f"{len(rows)}, {rows[0]['dim']}" for rows in found.values()) + " |")
    for key, (title, form) in METRICS.items():
        of = [interval(rows, key) for rows in found.values()]
        if any(of):
            cells = [f"{form.format(v[0])} ({form.format(v[1])} to {form.format(v[2])})" if v else "-" for v in of]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{pictures.caption(result)}.\n"


def main(args):
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    train, _ = data.load_train(spec, args.data_dir, args.val_size)
    images, labels = data.load_test(spec, args.data_dir)
    n, n_train = min(len(labels), args.n_images), len(train[1])
    if n_train < 2 * N_GROUPS:
        raise cli.UserError(f"--val-size {args.val_size}: leaves {n_train} training images, the fits need at least {2 * N_GROUPS}")
    fit_ids = np.sort(np.random.default_rng(0).permutation(n_train)[:MAX_FIT])  # training images may be sorted by class
    splits = (train[0], fit_ids, train[1][fit_ids]), (images, labels[:n])
    if min(n, args.n_attacked) < 2 * N_GROUPS:
        raise cli.UserError(f"--n-images, --n-attacked: intervals need at least {2 * N_GROUPS} images, there are {min(n, args.n_attacked)}")
    network = None
    if args.teacher:
        network = diffusion.load_diffusion(args.teacher, device)
        network.check_teaches(f"--teacher {args.teacher}", spec, with_labels=False)
        block, sigma = args.block or network.default_block, args.sigma or network.default_sigma
        network.check_blocks([block])
        network.check_sigmas([sigma])

    # What is computed of a model has its file, by the hash of all that it depends on. Models are shared out over the processes.
    other = ("models", "model", "out_dir", "data_dir", "teacher", "block", "sigma", "n_noise")
    settings = {key: value for key, value in vars(args).items() if key not in other} | {"image_size": spec.image_size}
    jobs, identities = list(args.models), [{"checkpoint_sha256": checkpoint.sha256(path)} for _, path in args.models]
    if network:
        jobs.append(("teacher", args.teacher))
        identities.append({"network_sha256": network.sha256, "block": block, "sigma": sigma, "n_noise": args.n_noise})
    code = {f"{os.path.basename(file)}_sha256": checkpoint.sha256(file) for file in (__file__, representations.__file__)}
    requests = [code | {"n": n, "torch": torch.__version__, "device": device.type} | settings | of for of in identities]
    digests = [hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16] for request in requests]
    for i, (job, digest) in enumerate(zip(jobs, digests)):
        if (job[0], digest) in [(name, of) for (name, _), of in zip(jobs[:i], digests)]:
            raise cli.UserError(f"--model {job[0]}={job[1]}: the same model as another one of that name, seeds must differ")
    folder = os.path.join(args.out_dir, "parts")
    if rank == 0:
        runlog.claim_directory(folder, {"script": "analyze.py"}, "parts.json")
    stems = [os.path.join(folder, digest) for digest in digests]
    todo = [stems.index(stem) for stem in dict.fromkeys(stems) if not all(os.path.exists(stem + end) for end in (".json", ".npy"))]
    dist.barrier()
    for i in runlog.progress(todo[::-1][rank::world_size], rank, desc="analyze", unit="model"):  # the teacher, the slowest, first
        name, path = jobs[i]
        if name == "teacher":
            model = teacher_classifier(network, block, sigma, splits[0], spec, args, device)
        else:
            model = models.load_classifier(path, spec, device)[0]
        found = measure(f"{name} ({path})", model, splits, args, device, f"{stems[i]}.npy.writing")
        os.replace(f"{stems[i]}.npy.writing", f"{stems[i]}.npy")
        checkpoint.write_json(requests[i] | found, f"{stems[i]}.json")
    dist.barrier()

    if rank == 0:
        result = {"settings": settings, "environment": runlog.environment(), "models": {}}
        parts = [read_part(stem, n) for stem in stems]
        for (name, path), (row, _) in zip(jobs, parts):
            result["models"].setdefault(name, []).append({"path": path} | row)
        for name, rows in result["models"].items():
            if len({row["dim"] for row in rows}) > 1:
                found = " and ".join(str(row["dim"]) for row in rows)
                raise cli.UserError(f"--model {name}: models of {found} features; give those of one kind of network one name")
            if rows[0]["dim"] * 5 > n:
                print(
                    f"note: {n} images for the {rows[0]['dim']} features of {name}: ranks are low and similarities high for want of images"
                )
        order = [(name, features) for name in result["models"] for (of, _), (_, features) in zip(jobs, parts) if of == name]
        matrix, half = similarities([features for _, features in order])
        result["cka"] = {"names": [name for name, _ in order], "matrix": matrix, "half_interval": half}
        checkpoint.write_json(result, os.path.join(args.out_dir, "analysis.json"))
        with checkpoint.atomic(os.path.join(args.out_dir, "analysis.md")) as file:
            file.write(markdown(result).encode())
        print(markdown(result), end="")
        pictures.draw(result, args.out_dir)
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
