"""The time that AutoAttack standard takes here, against plain pyautoattack; verdicts compared.

The attacks stand in evaluation/autoattack.py.

    python -m benchmarks.evaluate --checkpoint out/quickstart/at/best.pt --norm linf
    python -m benchmarks.evaluate --model wrn-16-4 --n-images 16

Plain: the package's driver, one attack at a time, on the model as its users have it: NCHW, with
parameters that require gradients. Ours: evaluation/autoattack.py on the model as evaluate.py has
it: channels last, with frozen parameters. Both take turns on each chunk of images, with all
threads, and get the images that no attack has fooled yet.

With --model, weights and images are random, labels are the model's own, and --eps is so small that
most images withstand every attack to its end. Adds its row to the table of docs/costs.md.
"""

import time

import torch
from pyautoattack import AutoAttack

from benchmarks import measure
from common import cli, data, models
from evaluation import autoattack
from published.datasets import DATASETS
from published.weights import load_classifier

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
QUICKSTART = "out/quickstart/at/best.pt"


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", help="a digits classifier of train_at.py")
    group.add_argument("--model", help="an untrained network, on random RGB images of 32 x 32")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf", help="of the attack")
    parser.add_argument(
        "--eps", type=cli.positive, help="radius (default: the data set's; 1e-4 for --model)"
    )
    parser.add_argument("--n-images", type=cli.count, help="first images only (default: all 797)")
    parser.add_argument("--batch-size", type=cli.count, default=200, help="images of a chunk")
    return parser.parse_args(argv)


def of_quickstart(rounds):
    """The row of `python -m benchmarks`: one round, all test images of digits."""
    return compare(parse_args(["--checkpoint", QUICKSTART]))


def compare(args):
    """A row: AutoAttack standard here against the package's driver, with seconds by attack."""
    spec = DATASETS["digits" if args.checkpoint else "cifar10"]
    args.eps = args.eps or (spec.eps[args.norm] if args.checkpoint else 1e-4)
    plain = classifier(args, spec).to(memory_format=torch.contiguous_format)
    sides = {
        "ours": Side(autoattack.attack, classifier(args, spec).requires_grad_(False)),
        "plain": Side(attack_by_driver, plain.requires_grad_(True)),
    }
    x, y = images_to_attack(args, spec, plain)
    for side in sides.values():
        side.robust = predict(side.model, x) == y
    for chunk, rows in enumerate(torch.arange(len(y)).split(args.batch_size)):
        order = ["plain", "ours"] if chunk % 2 == 0 else ["ours", "plain"]
        for name in ATTACKS:
            for side in order:
                sides[side].run(name, x, y, rows, args)
            times = ", ".join(f"{side} {sides[side].seconds[name]:.1f} s" for side in sides)
            print(f"{rows[0]:5d} {name:<8} {times}", flush=True)

    ours, plain = sides["ours"], sides["plain"]
    totals = [sum(side.seconds.values()) for side in (ours, plain)]
    network = args.model or "digits"
    what = f"AutoAttack standard: {network}, {args.norm} {args.eps:g}, {len(y)} images"
    row = measure.compare(what, "pyautoattack's driver", totals[:1], totals[1:], target=1.5)
    # Pairs: of the package's driver, and ours.
    row["seconds"] = {name: [plain.seconds[name], ours.seconds[name]] for name in ATTACKS}
    row["n_robust"] = [plain.robust.sum().item(), ours.robust.sum().item()]
    row["n_flipped"] = (plain.robust != ours.robust).sum().item()
    return row


class Side:
    """One of the two that are compared: its attack, its model, its verdicts and its seconds."""

    def __init__(self, attack, model):
        self.attack = attack
        self.model = model
        self.robust = None  # (N,) bool
        self.seconds = dict.fromkeys(ATTACKS, 0.0)

    def run(self, name, x, y, rows, args):
        """Attack those of the images `rows` that no attack has fooled yet."""
        rows = rows[self.robust[rows]]
        start = time.perf_counter()
        x_adv = self.attack(
            name, self.model, x[rows], y[rows], norm=args.norm, eps=args.eps, seed=0
        )
        self.robust[rows] = predict(self.model, x_adv) == y[rows]
        self.seconds[name] += time.perf_counter() - start


def attack_by_driver(name, model, x, y, *, norm, eps, seed):
    """Adversarial images of one attack, by the package's own driver."""
    norm = autoattack.NORMS[norm]
    driver = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device="cpu")
    driver.attacks_to_run = [name]
    return driver.run_standard_evaluation(x, y, batch_size=len(x))[0]


def classifier(args, spec):
    """The classifier of --checkpoint or --model, in eval mode."""
    if args.checkpoint:
        return load_classifier(args.checkpoint, spec, "cpu")[0]
    torch.manual_seed(0)
    return models.build(args.model, spec).eval()


def images_to_attack(args, spec, model):
    """(x, y): test images with --checkpoint, else random images that the model labels itself."""
    if args.checkpoint:
        images, labels = data.load_test(spec, None)
        n = args.n_images or len(labels)
        return data.to_x(images[:n]), torch.from_numpy(labels[:n])
    x = torch.rand(args.n_images or 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, predict(model, x)


@torch.no_grad()
def predict(model, x):
    """Predicted classes (B,)."""
    return model(x).argmax(1)


def main(args):
    row = compare(args)
    measure.record(f"evaluation, {args.model or 'digits'} {args.norm}", row)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
