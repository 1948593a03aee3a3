"""Clean and robust accuracy of a classifier: PGD, APGD-CE+T, AutoAttack; on any number of processes, resumable, with sanity checks.

    python evaluate.py --checkpoint out/train_at-digits/best.pt --attack autoattack
    torchrun --nproc_per_node 8 evaluate.py --checkpoint out/train_at-digits/best.pt --attack apgd --eps 0.05 0.1 0.15 0.2
    python evaluate.py --dataset cifar10 --checkpoint weights-best.pt --model wrn-28-10    # a file of DM-AT or RobustBench
    python evaluate.py --model diffusion-classifier --teacher out/diffusion-digits --n-images 100
    python evaluate.py --compare out/a/results-best-apgd-linf-0.15.npz out/b/results-best-apgd-linf-0.15.npz

  clean       no attack
  pgd         PGD, --n-steps with --n-restarts random restarts: a sanity check, never the number to report
  transfer    PGD-40 on the model of --transfer-from, its images tried on this one: a sanity check too
  apgd        APGD-CE then targeted APGD-DLR, the first two of AutoAttack's four: an upper bound on robust accuracy, quick
  autoattack  AutoAttack standard (Croce & Hein, arXiv 2003.01690): APGD-CE, APGD-T, FAB-T, Square
  rand        AutoAttack rand, for randomised models: APGD-CE and APGD-DLR, gradients averaged over 20 passes

apgd, autoattack and rand are the authors' own package, pyautoattack, with its constants (common/autoattack.py). An image is
robust if no attack fools the model on it. Images are attacked in chunks of --batch-size, each seeded by itself: verdicts are
those of pyautoattack called on that chunk, and depend neither on the number of processes nor on where a run was cut. The
threat model comes from this command line only; that of the training is printed where it differs.

Writes results-<checkpoint>-<attack>-<norm>-<eps>.json (with -n<n>, -seed<seed>, ... where they are given), and .npz with one
entry per image (index, label, clean_correct, robust, fooled_by), beside the checkpoint; until then, every attack of every chunk
at once in the directory .parts, from which the same command goes on. A result that exists is printed again.
"""

import dataclasses
import importlib.metadata
import os
import shutil
import time

import numpy as np
import torch
from torch import nn

from common import (
    attacks,
    autoattack,
    checkpoint,
    cli,
    data,
    diffusion,
    dist,
    generative,
    models,
    results,
    robustbench,
    runlog,
    sanity,
    stats,
)

ATTACKS = {  # --attack: (its name in tables, its parts in the order in which they run)
    "clean": ("clean", []),
    "pgd": ("PGD", ["pgd"]),
    "transfer": ("transfer (black box)", ["transfer"]),
    "apgd": ("APGD-CE+T (upper bound)", ["apgd-ce", "apgd-t"]),
    "autoattack": ("AutoAttack standard", ["apgd-ce", "apgd-t", "fab-t", "square"]),
    "rand": ("AutoAttack rand", ["apgd-ce", "apgd-dlr"]),
}
PGD_FLAGS = ("--loss", "--n-steps", "--n-restarts", "--step-size", "--eot")  # the package's attacks have constants of their own
GENERATIVE = ("diffusion-classifier", "diffusion-head")
# Flags that --export has no use for.
EVALUATION_FLAGS = ("--model", "--data-dir", "--download", "--transfer-from", "--batch-size", "--sanity-images", "--compile")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--checkpoint", help="best.pt or last.pt of train_at.py or train_at_aux.py, or with --model a file of others")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set, its test images")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument("--model", help=f"network of a checkpoint of others, such as wrn-28-10; or {' or '.join(GENERATIVE)}")
    group.add_argument("--mean", type=cli.ratio, nargs="+", help="mean that --model subtracts, per channel (default: the data set's)")
    group.add_argument("--std", type=cli.positive, nargs="+", help="deviation that --model divides by; without normalisation: 0 and 1")
    group.add_argument("--n-images", type=cli.count, help="only the first n test images (default: all)")
    group.add_argument("--image-list", help="imagenet: only those of this file, one <class folder>/<file> a line, such as RobustBench's")
    group = parser.add_argument_group("classifiers made of a diffusion model (common/generative.py)")
    group.add_argument("--teacher", help="diffusion model: directory, NVlabs .pkl or hub:OWNER/NAME")
    group.add_argument("--n-noise", type=cli.count, default=8, help="draws of noise that an image is seen under")
    group.add_argument("--fresh-noise", action="store_true", help="new noise at every pass: a randomised classifier")
    group.add_argument("--keep-classes", type=cli.count, help="of diffusion-classifier: best classes kept after a quarter of the draws")
    group = parser.add_argument_group("threat model")
    group.add_argument("--norm", choices=["linf", "l2", "l1"], default="linf", help="norm of the perturbation")
    group.add_argument("--eps", type=cli.positive, nargs="+", help="radius, or several, of x in [0, 1] (default: the data set's usual one)")
    group = parser.add_argument_group("attack")
    group.add_argument("--attack", choices=ATTACKS, default="apgd", help="see above")
    group.add_argument("--transfer-from", help="another checkpoint, whose adversarial images are tried on this model too")
    group.add_argument("--loss", choices=["margin", "ce"], default="margin", help="loss of pgd")
    group.add_argument("--n-steps", type=cli.count, default=40, help="steps of pgd")
    group.add_argument("--n-restarts", type=cli.count, default=5, help="random restarts of pgd")
    group.add_argument("--step-size", type=cli.positive, help="step of pgd, of x in [0, 1] (default: eps / 4)")
    group.add_argument("--eot", type=cli.count, default=1, help="passes whose logits pgd averages, for randomised models")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=200, help="images per chunk, the unit of the attack's seed")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of the attacks, and of a diffusion classifier's noise")
    group.add_argument("--sanity-images", type=cli.count0, default=100, help="first images that the sanity checks run on, 0 for none")
    group.add_argument("--compile", action="store_true", help="torch.compile the model; its rounding may flip an image")
    group.add_argument("--out", help="result file, .json (default: beside the checkpoint, see above)")
    group = parser.add_argument_group("instead of an evaluation")
    group.add_argument("--compare", nargs=2, metavar=("A.npz", "B.npz"), help="compare two results image by image, and end")
    group.add_argument("--export", choices=["robustbench"], help="weights and a claim for RobustBench from a finished result, and end")
    args = parser.parse_args(argv)
    if args.compare:
        parser.refuse_others(argv, "--compare")
        return args
    spec = data.DATASETS[args.dataset]
    generated = args.model in GENERATIVE
    args.randomised = args.attack == "rand" or args.fresh_noise
    uses = {flag: ("--attack pgd", args.attack == "pgd") for flag in PGD_FLAGS}
    uses |= {flag: (" or ".join(GENERATIVE), generated) for flag in ("--teacher", "--n-noise", "--fresh-noise")}
    uses |= {flag: ("--model of a checkpoint of others", args.model and not generated) for flag in ("--mean", "--std")}
    uses |= {"--keep-classes": ("--model diffusion-classifier", args.model == GENERATIVE[0])}
    uses |= {flag: ("an attack", args.attack != "clean") for flag in ("--norm", "--eps", "--transfer-from")}
    uses |= {"--checkpoint": ("every other --model", args.model != GENERATIVE[0])}
    uses |= {flag: ("an evaluation, not --export", not args.export) for flag in EVALUATION_FLAGS}
    parser.refuse_unused(argv, uses)
    if args.fresh_noise and args.attack in ("apgd", "autoattack"):
        parser.error("argument --fresh-noise: a randomised classifier needs --attack rand, or pgd with --eot")
    if not args.checkpoint and args.model != GENERATIVE[0]:
        parser.error("argument --checkpoint: required")
    if generated and not args.teacher:
        parser.error(f"argument --teacher: --model {args.model} needs a diffusion model")
    for name in ("mean", "std"):
        if getattr(args, name) and len(getattr(args, name)) not in (1, spec.channels):
            parser.error(f"argument --{name}: expected 1 or {spec.channels} numbers, one per channel of {spec.name}")
    if args.keep_classes and (args.n_noise < 4 or args.keep_classes >= spec.num_classes):
        parser.error(f"argument --keep-classes: needs --n-noise of at least 4, and less than {spec.num_classes} classes kept")
    if args.transfer_from and args.attack != "transfer" and (args.randomised or not args.sanity_images):
        parser.error("argument --transfer-from: does nothing with --sanity-images 0, --attack rand or --fresh-noise")
    if args.eps is None and args.norm not in spec.eps:
        parser.error(f"argument --eps: required, {spec.name} has no usual radius in {args.norm}")
    args.eps = list(dict.fromkeys(args.eps or [spec.eps[args.norm]]))
    if args.norm == "linf" and max(args.eps) > 1:
        parser.error(f"argument --eps: {max(args.eps):g}, expected at most 1, of x in [0, 1]; 8/255 is written so")
    if args.norm == "l1" and (args.attack in ("pgd", "transfer") or args.transfer_from):
        parser.error("argument --norm: pgd and transfer know linf and l2; take apgd or autoattack for l1")
    if args.attack == "transfer" and not args.transfer_from:
        parser.error("argument --transfer-from: required by --attack transfer")
    if args.image_list and not spec.files:
        parser.error(f"argument --image-list: the images of {args.dataset} are not files")
    if args.out and not args.out.endswith(".json"):
        parser.error(f"argument --out: expected a file that ends in .json, got '{args.out}'")
    if args.out and len(args.eps) > 1:
        parser.error("argument --out: one result; several --eps are written beside the checkpoint")
    if len({result_path(args, eps) for eps in args.eps}) < len(args.eps):
        parser.error("argument --eps: two radii that round to one name of four digits")
    return args


def result_path(args, eps):
    """Where the result at radius eps (or of "curve") goes: what a table distinguishes is in the name, the rest is compared."""
    if args.out:
        return args.out
    folder, name = os.path.split(args.checkpoint or f"out/diffusion-classifier-{args.dataset}/{args.n_noise}-draws")
    stem = f"results-{os.path.splitext(name)[0]}-{args.attack}-{args.norm}-" + (eps if eps == "curve" else f"{eps:.4g}")
    stem += (f"-keep{args.keep_classes}" if args.keep_classes else "") + ("-fresh" if args.fresh_noise else "")
    stem += ("-listed" if args.image_list else "") + (f"-n{args.n_images}" if args.n_images else "")
    return os.path.join(folder, stem + (f"-seed{args.seed}" if args.seed else "") + ".json")


# ---------------------------------------------------------------------------------------------------- the attacks


def adversarial(name, model, source, x, y, left, chunk, eps, args):
    """Adversarial images of the attack `name` for the rows `left` of a chunk (x, y) that no attack has fooled yet."""
    if name == "transfer":
        return sanity.transferred(source, x, y, args.norm, eps, args.seed)[left]
    if name == "pgd":
        generator = data.stream(args.seed, "evaluate-pgd", chunk, x.device)
        starts = [attacks.random_start(x.shape, args.norm, eps, generator) for _ in range(args.n_restarts)]
        settings = dict(norm=args.norm, eps=eps, step_size=args.step_size or eps / 4, n_steps=args.n_steps, loss=args.loss)
        return attacks.pgd(Averaged(model, args.eot) if args.eot > 1 else model, x, y, starts, **settings)[left]
    version = "rand" if args.attack == "rand" else "standard"
    return autoattack.attack(name, model, x[left], y[left], norm=args.norm, eps=eps, seed=args.seed, version=version)


class Finite(nn.Module):
    """The model, refused where a logit is not finite: argmax of NaN is class 0, such a model would look robust on that class."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        logits = self.model(x)
        if not logits.isfinite().all():
            raise cli.UserError(f"{self.name}: the model's logits are not finite")
        return logits


class Averaged(nn.Module):
    """Mean logits of n passes: what an attacker of a randomised model follows (EoT, Athalye et al., arXiv 1707.07397)."""

    def __init__(self, model, n):
        super().__init__()
        self.model, self.n = model, n

    def forward(self, x):
        return sum(self.model(x) for _ in range(self.n)) / self.n


def attack_chunk(model, source, x, y, chunk, path, heard, eps, args):
    """Attack one chunk and keep every attack's verdicts in the file `path` at once; go on from there where it exists.

    fooled_by, per image: -1 misclassified without an attack, k >= 0 fooled by the k-th attack, len(attacks) robust so far.
    """
    names = ATTACKS[args.attack][1]

    def predicted(x, use):
        torch.manual_seed(data.seed_of(args.seed, use, chunk) % 2**32)  # of a randomised model's draws
        with torch.no_grad():
            return model(x).argmax(1)

    if os.path.exists(path):
        part = results.read_chunk(path, len(y), names)
    else:
        correct = predicted(x, "evaluate-clean") == y
        fooled_by = torch.where(correct, len(names), -1).tolist()
        n_zero = int(sanity.zero_gradients(model, x, y)) if names else 0
        part = {"fooled_by": fooled_by, "seconds": [], "zero_gradients": n_zero, "warnings": []}
    fooled_by = torch.tensor(part["fooled_by"], device=x.device)
    for k in range(len(part["seconds"]), len(names)):
        begun = time.time()
        left = torch.nonzero(fooled_by == len(names)).squeeze(1)
        if len(left):
            torch.manual_seed(data.seed_of(args.seed, f"attack-{names[k]}", chunk) % 2**32)  # a resumed chunk draws what an uncut one does
            x_adv = adversarial(names[k], model, source, x, y, left, chunk, eps, args)
            x_adv = attacks.in_threat_model(x_adv, x[left], names[k], args.norm, eps)
            fooled_by[left[predicted(x_adv, f"evaluate-{names[k]}") != y[left]]] = k
        part["seconds"].append(round(time.time() - begun, 3))
        part |= {"fooled_by": fooled_by.tolist(), "warnings": sorted({*part["warnings"], *heard.drain()})}
        checkpoint.write_json(part, path)
    if not names:
        checkpoint.write_json(part, path)


def check_sanity(name, model, source, x, y, path, heard, eps, args):
    """One group of sanity checks on the first images, kept in the file `path`; nothing where that exists."""
    if os.path.exists(path):
        return
    torch.manual_seed(args.seed)
    threat = (args.norm, eps, args.seed)
    if name == "transfer":
        content = {"fooled": sanity.fooled_by_transfer(model, source, x, y, *threat).tolist()}
    elif name == "steps":
        content = {"fooled": sanity.fooled_by_more_steps(model, x, y, *threat).tolist()}
    else:
        content = {"lines": sanity.CHECKS[name](model, x, y, *threat)}
    heard.drain()
    checkpoint.write_json(content, path)


# ------------------------------------------------------------------------------------------------------- plumbing


def load_model(args, spec, device):
    """(model, what it is: a dict, (norm, eps) of its training or (None, None)); frozen, in eval mode."""
    if args.mean or args.std:
        mean, std = (tuple(values * (spec.channels // len(values))) for values in (args.mean or spec.mean, args.std or spec.std))
        spec = dataclasses.replace(spec, mean=mean, std=std)
    settings = {"mean": args.mean, "std": args.std, "compile": args.compile}
    if args.model in GENERATIVE:
        network = diffusion.load_diffusion(args.teacher, device)
        model = generative.load(args.model, network, spec, args)
        settings |= {key: getattr(args, key) for key in ("n_noise", "fresh_noise", "keep_classes")} | {"teacher_sha256": network.sha256}
        trained = (None, None)
    else:
        model, state = models.load_classifier(args.checkpoint, spec, device, args.model)
        trained = (state["norm"], state["eps"])
        if trained != (None, None) and (args.mean or args.std):
            raise cli.UserError(f"--mean, --std: {args.checkpoint} is of this project, whose classifiers hold their data set's")
    settings["checkpoint_sha256"] = checkpoint.sha256(args.checkpoint) if args.checkpoint else None
    model = torch.compile(model, dynamic=True) if args.compile else model
    return Finite(model, f"--checkpoint {args.checkpoint}" if args.checkpoint else f"--teacher {args.teacher}").eval(), settings, trained


def evaluate(model, source, settings, images, labels, n, eps, args, rank, world_size, device):
    """The result at one radius, on every rank: what is there already, or what the chunks of all ranks give."""
    names, path = ATTACKS[args.attack][1], result_path(args, eps)
    packaged = args.attack in ("apgd", "autoattack", "rand")
    request = settings | {
        "dataset": args.dataset,
        "split": "test",
        "n": n,
        "image_list_sha256": checkpoint.sha256(args.image_list) if args.image_list else None,
        "norm": args.norm,
        "eps": eps,
        "attack": args.attack,
        "attack_name": ATTACKS[args.attack][0],
        "attacks": names,
        "version": f"pyautoattack {importlib.metadata.version('pyautoattack')}" if packaged else "common/attacks.py",
        "settings": {k: getattr(args, k) for k in ("loss", "n_steps", "n_restarts", "step_size", "eot")} if args.attack == "pgd" else {},
        "transfer_sha256": checkpoint.sha256(args.transfer_from) if args.transfer_from else None,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "sanity_images": min(args.sanity_images, n),
    }
    folder, per_image_path = (os.path.splitext(path)[0] + end for end in (".parts", ".npz"))
    if os.path.exists(path):
        result = checkpoint.read_json(path)
        for key, value in request.items():
            if result.get(key) != value:
                found = f"{key} is {result.get(key)}, not {value}"
                raise cli.UserError(f"--out {path}: holds another result ({found}); move it away or name another file")
        if rank == 0 and os.path.exists(os.path.join(folder, "request.json")):  # a kill came between the result and this
            shutil.rmtree(folder)
        return result
    if rank == 0:
        if os.path.exists(per_image_path) and not os.path.exists(folder):
            raise cli.UserError(f"--out {path}: would replace {per_image_path}, whose .json is gone; move it away or name another file")
        where = {"torch": torch.__version__, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
        runlog.claim_directory(folder, request | where, "request.json", flag="--out")  # parts of two machines would be neither's result
        for target in (path, per_image_path):  # hours of work are not lost to a name that cannot be written
            open(f"{target}.writing", "wb").close()
            os.unlink(f"{target}.writing")
    dist.barrier()
    parts = [("chunk", i, os.path.join(folder, f"chunk-{i:05d}.json")) for i in range(-(-n // args.batch_size))]
    groups = list(sanity.CHECKS) if names else ["outputs"]
    if names and args.attack != "transfer" and not args.randomised:  # what they find is held against single verdicts
        groups += ["steps", "transfer"] if source else ["steps"]
    groups = groups if request["sanity_images"] else []
    parts += [("sanity", name, os.path.join(folder, f"sanity-{name}.json")) for name in groups]
    heard, begun = autoattack.Warnings(), time.time()
    for kind, name, part in runlog.progress(parts[rank::world_size], rank, desc=f"{args.attack} {eps:.4g}", unit="chunk"):
        rows = slice(name * args.batch_size, min((name + 1) * args.batch_size, n)) if kind == "chunk" else slice(request["sanity_images"])
        x, y = data.to_x(images[rows], device), torch.from_numpy(labels[rows]).to(device)
        if kind == "chunk":
            attack_chunk(model, source, x, y, name, part, heard, eps, args)
        else:
            check_sanity(name, model, source, x, y, part, heard, eps, args)
    dist.barrier()
    if rank == 0:
        result, per_image = results.merge(parts, request, labels, args, round(time.time() - begun, 1))
        with checkpoint.atomic(per_image_path) as file:
            np.savez(file, **per_image)
        checkpoint.write_json(result, path)
        shutil.rmtree(folder)
    dist.barrier()
    return checkpoint.read_json(path)


def main(args):
    if args.compare:
        return stats.compare(*args.compare)
    if args.export:
        return robustbench.export(args.checkpoint, args.dataset, [result_path(args, eps) for eps in args.eps])
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    model, settings, trained = load_model(args, spec, device)
    source = models.load_classifier(args.transfer_from, spec, device)[0] if args.transfer_from else None
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    dist.barrier()
    images, labels = data.load_test(spec, args.data_dir)
    if args.image_list:
        images, labels = data.listed(images, labels, args.image_list)
    n = len(labels) if args.n_images is None else args.n_images
    if n > len(labels):
        raise cli.UserError(f"--n-images {n}: {spec.name} has {len(labels)} test images")
    found = []
    for eps in args.eps:
        if rank == 0 and trained != (None, None) and trained != (args.norm, eps):
            print(f"note: trained against {trained[0]} {trained[1]:.4g}, evaluated against {args.norm} {eps:.4g}")
        found.append(evaluate(model, source, settings, images, labels, n, eps, args, rank, world_size, device))
        if rank == 0:
            results.print_result(found[-1], result_path(args, eps))
    if rank == 0 and len(found) > 1:
        stats.curve_png(found, trained, os.path.splitext(result_path(args, "curve"))[0] + ".png")
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
