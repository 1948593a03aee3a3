"""Clean and robust accuracy of a checkpoint on the test images: PGD with restarts, APGD-CE+T, or AutoAttack.

    python evaluate.py --checkpoint out/train_at-digits/best.pt --attack autoattack
    torchrun --nproc_per_node 8 evaluate.py --checkpoint out/train_at-digits/best.pt --attack apgd
    python evaluate.py --dataset cifar10 --checkpoint weights-best.pt --model wrn-28-10    # a file of DM-AT or RobustBench

  clean       no attack
  pgd         PGD, --n-steps with --n-restarts random restarts: a sanity check, never the number to report
  apgd        APGD-CE then targeted APGD-DLR, the first two of AutoAttack's four: an upper bound on robust accuracy, quick
  autoattack  AutoAttack standard (Croce & Hein, arXiv 2003.01690): APGD-CE, APGD-T, FAB-T, Square

apgd and autoattack are the authors' own package, pyautoattack, with its constants. An image counts as robust if no attack
fools the model on it. Images are attacked in chunks of --batch-size, each seeded by itself: verdicts are those of
pyautoattack called on that chunk, and do not depend on the number of processes. The threat model comes from this command
line only; that of the training is printed where it differs.

Writes results-<checkpoint>-<attack>-<norm>-<eps>.json (with -n<n> and -seed<seed> where they are given), and .npz with one
entry per image (index, label, clean_correct, robust, fooled_by), beside the checkpoint. A result that exists is printed
again, not computed again.
"""

import importlib.metadata
import logging
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from common import attacks, checkpoint, cli, data, dist, models, runlog

ATTACKS = {  # --attack: (its name in tables, its parts in the order in which they run)
    "clean": ("clean", []),
    "pgd": ("PGD", ["pgd"]),
    "apgd": ("APGD-CE+T (upper bound)", ["apgd-ce", "apgd-t"]),
    "autoattack": ("AutoAttack standard", ["apgd-ce", "apgd-t", "fab-t", "square"]),
}


PGD_FLAGS = ("--loss", "--n-steps", "--n-restarts", "--step-size")  # the package's attacks have constants of their own


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--checkpoint", required=True, help="best.pt or last.pt of train_at.py or train_at_aux.py")
    group.add_argument("--dataset", choices=data.DATASETS, default="digits", help="data set, its test images")
    group.add_argument("--data-dir", default="data", help="where data sets lie (digits needs none)")
    group.add_argument("--download", action="store_true", help="fetch the data set into --data-dir first")
    group.add_argument("--model", help="network of a checkpoint of others, such as wrn-28-10 for a file of DM-AT or RobustBench")
    group.add_argument("--n-images", type=cli.count, help="only the first n test images (default: all)")
    group.add_argument("--image-list", help="imagenet: only those of this file, one <class folder>/<file> a line, such as RobustBench's")
    group = parser.add_argument_group("threat model")
    group.add_argument("--norm", choices=["linf", "l2"], default="linf", help="norm of the perturbation")
    group.add_argument("--eps", type=cli.positive, help="radius, of x in [0, 1] (default: the data set's usual one)")
    group = parser.add_argument_group("attack")
    group.add_argument("--attack", choices=ATTACKS, default="apgd", help="see above")
    group.add_argument("--loss", choices=["margin", "ce"], default="margin", help="loss of pgd")
    group.add_argument("--n-steps", type=cli.count, default=40, help="steps of pgd")
    group.add_argument("--n-restarts", type=cli.count, default=5, help="random restarts of pgd")
    group.add_argument("--step-size", type=cli.positive, help="step of pgd, of x in [0, 1] (default: eps / 4)")
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=cli.count, default=200, help="images per chunk, the unit of the attack's seed")
    group.add_argument("--seed", type=cli.seed, default=0, help="seed of the attacks")
    group.add_argument("--out", help="result file, .json (default: beside the checkpoint, see above)")
    args = parser.parse_args(argv)
    parser.refuse_unused(argv, {flag: ("--attack pgd", args.attack == "pgd") for flag in PGD_FLAGS})
    args.eps = data.DATASETS[args.dataset].eps[args.norm] if args.eps is None else args.eps
    args.step_size = args.eps / 4 if args.step_size is None else args.step_size
    folder, name = os.path.split(args.checkpoint)
    stem = f"results-{os.path.splitext(name)[0]}-{args.attack}-{args.norm}-{args.eps:.4g}"
    stem += (
        ("-listed" if args.image_list else "")
        + (f"-n{args.n_images}" if args.n_images else "")
        + (f"-seed{args.seed}" if args.seed else "")
    )
    args.out = args.out or os.path.join(folder, f"{stem}.json")
    if args.image_list and not data.DATASETS[args.dataset].files:
        parser.error(f"argument --image-list: the images of {args.dataset} are not files")
    if not args.out.endswith(".json"):
        parser.error(f"argument --out: expected a file that ends in .json, got '{args.out}'")
    return args


# ---------------------------------------------------------------------------------------------------- the attacks


def attack_chunk(model, x, y, chunk, args):
    """Verdicts of one chunk: (fooled_by (B,) int8, seconds per attack).

    fooled_by: -1 misclassified without an attack, k >= 0 fooled by the k-th attack, len(attacks) robust.
    """
    with torch.no_grad():
        logits = model(x)
    if not logits.isfinite().all():  # argmax of NaN is class 0: such a model would look robust on that class
        raise cli.UserError(f"--checkpoint {args.checkpoint}: the model's logits are not finite")
    correct = logits.argmax(1) == y
    names = ATTACKS[args.attack][1]
    fooled_by = torch.where(correct, len(names), -1).to(torch.int8)
    seconds = []
    for k, name in enumerate(names):
        begun = time.time()
        left = torch.nonzero(fooled_by == len(names)).squeeze(1)
        if len(left):
            x_adv = run_pgd(model, x, y, chunk, args)[left] if name == "pgd" else run_autoattack(model, name, x[left], y[left], args)
            with torch.no_grad():
                fooled = model(x_adv).argmax(1) != y[left]
            check_threat_model(x_adv, x[left], name, args)
            fooled_by[left[fooled]] = k
        seconds.append(time.time() - begun)
    return fooled_by, seconds


def run_pgd(model, x, y, chunk, args):
    """Adversarial images of PGD, the restart that fools the model where there is one."""
    generator = data.stream(args.seed, "evaluate-pgd", chunk, x.device)
    starts = [attacks.random_start(x.shape, args.norm, args.eps, generator) for _ in range(args.n_restarts)]
    attack = dict(norm=args.norm, eps=args.eps, step_size=args.step_size, n_steps=args.n_steps, loss=args.loss)
    return attacks.pgd(model, x, y, starts, **attack)


def run_autoattack(model, name, x, y, args):
    """Adversarial images of one of AutoAttack standard's attacks, in one batch, as pyautoattack's own driver would run it."""
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2"}[args.norm]
    adversary = AutoAttack(model, norm=norm, eps=args.eps, seed=args.seed, version="standard", device=x.device)
    adversary.attacks_to_run = [name]
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]


def check_threat_model(x_adv, x, name, args):
    """An attack that left the ball or [0, 1] would understate robustness: refuse its verdicts."""
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax() if args.norm == "linf" else delta.norm(dim=1).amax()
    if not (size <= args.eps * (1 + 1e-5) + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1):
        raise RuntimeError(f"{name} left the threat model: {args.norm} {size:.6f} of {args.eps}, pixels {x_adv.min()} to {x_adv.max()}")


def count_zero_gradients(model, x, y):
    """Images whose loss has no gradient at all: a sign of gradient masking, which white-box attacks cannot see through."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return (gradient.flatten(1).abs().amax(1) == 0).sum()


# ------------------------------------------------------------------------------------------------------- plumbing


class WarningsOfAutoAttack(logging.Handler):
    """Collects what pyautoattack warns of (randomised model, probabilities instead of logits, zero gradients, ...)."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        logger = logging.getLogger("auto-attack")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record):
        if record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())


def interval(n_correct, n):
    """Wilson's 95 % interval of a fraction."""
    ci = binomtest(n_correct, n).proportion_ci(method="wilson")
    return [ci.low, ci.high]


def print_result(result, path):
    for warning in result["warnings"]:
        print(f"WARNING: {warning}")
    rows = {"clean": "clean", "robust": f"{result['attack_name']}, {result['norm']} {result['eps']:.4g}"}
    for key, name in list(rows.items())[: 2 if result["attacks"] else 1]:
        low, high = result[f"{key}_interval"]
        print(f"{name:<40} {result[key]:7.2%}   95 % interval {low:.2%} to {high:.2%}   n = {result['n']}")
    print(f"{result['seconds']:.0f} s; {path}")


def main(args):
    rank, world_size, device = dist.setup()
    spec = data.DATASETS[args.dataset]
    model, state = models.load_classifier(args.checkpoint, spec, device, args.model)
    if rank == 0:
        data.prepare(spec, args.data_dir, args.download)
    dist.barrier()
    images, labels = data.load_test(spec, args.data_dir)
    if args.image_list:
        images, labels = data.listed(images, labels, args.image_list)
    n = len(labels) if args.n_images is None else args.n_images
    if n > len(labels):
        raise cli.UserError(f"--n-images {n}: {spec.name} has {len(labels)} test images")
    chunks = [(i, slice(i * args.batch_size, min((i + 1) * args.batch_size, n))) for i in range(-(-n // args.batch_size))]
    attack_name, names = ATTACKS[args.attack]
    package = f"pyautoattack {importlib.metadata.version('pyautoattack')}"
    request = {
        "checkpoint_sha256": checkpoint.sha256(args.checkpoint),
        "dataset": spec.name,
        "split": "test",
        "n": n,
        "image_list_sha256": checkpoint.sha256(args.image_list) if args.image_list else None,
        "norm": args.norm,
        "eps": args.eps,
        "attack": args.attack,
        "attack_name": attack_name,
        "attacks": names,
        "version": package if args.attack in ("apgd", "autoattack") else "common/attacks.py",
        "settings": {k: getattr(args, k) for k in ("loss", "n_steps", "n_restarts", "step_size")} if args.attack == "pgd" else {},
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    if os.path.exists(args.out):
        result = checkpoint.read_json(args.out)
        for key, value in request.items():
            if result.get(key) != value:
                raise cli.UserError(f"--out {args.out}: holds another result ({key} is {result.get(key)}, not {value}); name another file")
        if rank == 0:
            print_result(result, args.out)
        return dist.teardown()

    per_image_path = os.path.splitext(args.out)[0] + ".npz"
    if rank == 0:  # hours of work are not lost to a place that cannot be written
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        for path in (args.out, per_image_path):
            open(f"{path}.writing", "wb").close()
            os.unlink(f"{path}.writing")
    trained = (state["norm"], state["eps"])
    if rank == 0 and trained != (None, None) and trained != (args.norm, args.eps):
        print(f"note: trained against {trained[0]} {trained[1]:.4g}, evaluated against {args.norm} {args.eps:.4g}")
    heard = WarningsOfAutoAttack()
    begun = time.time()
    fooled_by = torch.zeros(n, dtype=torch.int32, device=device)  # filled by the rank that owns the chunk, then summed
    seconds = torch.zeros(len(names), dtype=torch.float64, device=device)
    n_zero = torch.zeros((), dtype=torch.int64, device=device)
    mine = chunks[rank::world_size]
    with runlog.progress(rank=rank, desc=args.attack, unit="image", total=sum(rows.stop - rows.start for _, rows in mine)) as bar:
        for chunk, rows in mine:
            x, y = data.to_x(images[rows], device), torch.from_numpy(labels[rows]).to(device)
            verdicts, chunk_seconds = attack_chunk(model, x, y, chunk, args)
            fooled_by[rows] = verdicts.int()
            seconds += torch.tensor(chunk_seconds, dtype=torch.float64, device=device)
            n_zero += count_zero_gradients(model, x, y)
            bar.update(len(y))
    for tensor in (fooled_by, seconds, n_zero):
        dist.sum_over_ranks(tensor)

    messages = sorted(set().union(*dist.gather_objects(heard.messages)))

    if rank == 0:
        fooled_by = fooled_by.cpu().numpy().astype(np.int8)
        clean_correct, robust = fooled_by >= 0, fooled_by == len(names)
        if n_zero > 0.01 * n:
            messages.append(f"{n_zero} of {n} images have a zero gradient: gradient masking, robust accuracy may be overstated")
        result = request | {
            "checkpoint": args.checkpoint,
            "clean": clean_correct.mean(),
            "clean_interval": interval(int(clean_correct.sum()), n),
            "clean_correct": int(clean_correct.sum()),
            "robust": robust.mean() if names else None,
            "robust_interval": interval(int(robust.sum()), n) if names else None,
            "robust_correct": int(robust.sum()) if names else None,
            "zero_gradients": int(n_zero),
            "warnings": messages,
            "seconds": round(time.time() - begun, 1),
            "seconds_by_attack": dict(zip(names, seconds.cpu().numpy().round(1).tolist())),
            "environment": runlog.environment(),
        }
        per_image = {"index": np.arange(n), "label": labels[:n], "clean_correct": clean_correct, "robust": robust, "fooled_by": fooled_by}
        with checkpoint.atomic(per_image_path) as file:
            np.savez(file, **per_image, attacks=np.array(names, str))
        checkpoint.write_json(result, args.out)
        print_result(result, args.out)
    dist.teardown()


if __name__ == "__main__":
    cli.run(main, parse_args())
