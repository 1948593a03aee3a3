"""What AutoAttack standard costs here against plain pyautoattack: the same images, attack by attack, in one run, verdicts compared.

    python benchmarks/evaluate.py --checkpoint out/quickstart/at/best.pt --norm linf
    python benchmarks/evaluate.py --model wrn-16-4 --n-images 16

Plain: their driver, given one attack, on the model as its users have it: NCHW, parameters that require gradients. Here:
common/autoattack.py on the model as evaluate.py has it: channels last, parameters frozen. Both take turns on each chunk, with
all threads, and get the images that no attack has fooled yet. With --checkpoint, a digits model, evaluate.py then does the same work on
two processes of one thread. With --model, weights and images are random, labels are the model's own, and --eps is so small
that most images withstand: what every attack costs to the end. Adds to benchmarks/evaluate.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import autoattack, checkpoint, cli, data, models, runlog  # noqa: E402

NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", help="a digits model of train_at.py")
    parser.add_argument("--model", help="instead: an untrained network on random RGB images of 32 x 32")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf", help="norm of the perturbation")
    parser.add_argument("--eps", type=cli.positive, help="radius (default: the data set's; 1e-4 for --model)")
    parser.add_argument("--n-images", type=cli.count, help="first images only (default: all 797)")
    parser.add_argument("--batch-size", type=cli.count, default=200, help="images per chunk")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.model):
        parser.error("give --checkpoint or --model")
    return args


def network(args, spec, plain):
    """The classifier as its users have it, or as evaluate.py has it."""
    if args.checkpoint:
        model = models.load_classifier(args.checkpoint, spec, "cpu")[0]
    else:
        torch.manual_seed(0)
        model = models.build(args.model, spec).eval()
    if plain:
        return model.to(memory_format=torch.contiguous_format).requires_grad_(True)
    return model.requires_grad_(False)


def run_plain(model, name, x, y, args):
    from pyautoattack import AutoAttack

    theirs = AutoAttack(model, norm=autoattack.NORMS[args.norm], eps=args.eps, seed=0, version="standard", device="cpu")
    theirs.attacks_to_run = [name]
    return theirs.run_standard_evaluation(x, y, batch_size=len(x))[0]


def main(args):
    spec = data.DATASETS["digits" if args.checkpoint else "cifar10"]
    args.eps = args.eps or (spec.eps[args.norm] if args.checkpoint else 1e-4)
    plain, ours = network(args, spec, True), network(args, spec, False)
    if args.checkpoint:
        images, labels = data.load_test(spec, None)
        n = args.n_images or len(labels)
        x, y = data.to_x(images[:n]), torch.from_numpy(labels[:n])
    else:
        n = args.n_images or 16
        x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = plain(x).argmax(1)
    autoattack.Warnings()
    seconds = {name: [0.0, 0.0] for name in NAMES}
    robust = [torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)]
    flipped = []
    for start in range(0, n, args.batch_size):
        rows = torch.arange(start, min(start + args.batch_size, n))
        with torch.no_grad():
            for verdict, model in zip(robust, (plain, ours)):
                verdict[rows] = model(x[rows]).argmax(1) == y[rows]
        for name in NAMES:
            for which in ((0, 1), (1, 0))[(start // args.batch_size) % 2]:
                left = rows[robust[which][rows]]
                begun = time.perf_counter()
                if which == 0:
                    x_adv = run_plain(plain, name, x[left], y[left], args)
                else:
                    x_adv = autoattack.attack(name, ours, x[left], y[left], norm=args.norm, eps=args.eps, seed=0)
                with torch.no_grad():
                    robust[which][left] = (plain, ours)[which](x_adv).argmax(1) == y[left]
                seconds[name][which] += time.perf_counter() - begun
            flipped += [(i, name) for i in rows[robust[0][rows] != robust[1][rows]].tolist()]
            print(f"{start:5d} {name:<8}" + "  ".join(f"{s:8.1f} s" for s in seconds[name]), flush=True)
    result = {"n": n, "robust": int(robust[0].sum()), "robust_here": int(robust[1].sum()), "flipped": flipped, "seconds": seconds}
    total = [sum(s[i] for s in seconds.values()) for i in (0, 1)]
    result["ratio"] = {name: a / b for name, (a, b) in seconds.items()} | {"total": total[0] / total[1]}
    if args.checkpoint:
        result |= two_processes(args, n, robust[0].numpy(), total[0])
    for name, (a, b) in (seconds | {"total": total}).items():
        print(f"{name:<9}{a:9.1f} s plain {b:9.1f} s here   x {a / b:.2f}")
    print({key: value for key, value in result.items() if key not in ("seconds", "ratio")})
    path = ROOT / "benchmarks" / "evaluate.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[f"{args.model or 'digits'} {args.norm}, {n} images"] = result | {"settings": vars(args) | {"environment": runlog.environment()}}
    checkpoint.write_json(known, path)


def two_processes(args, n, robust, plain_seconds):
    """The same evaluation by evaluate.py under torchrun; its seconds leave out the start of the processes, as the others do."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "result.json")
        command = [*("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluate.py")]
        command += ["--checkpoint", args.checkpoint, "--attack", "autoattack", "--norm", args.norm, "--eps", str(args.eps)]
        command += ["--n-images", str(n), "--batch-size", str(args.batch_size), "--sanity-images", "0", "--out", out]
        subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        found, result = np.load(os.path.splitext(out)[0] + ".npz"), checkpoint.read_json(out)
    flipped = np.flatnonzero(found["robust"] != robust).tolist()
    return {"two_processes": result["seconds"], "two_processes_ratio": plain_seconds / result["seconds"], "two_processes_flipped": flipped}


if __name__ == "__main__":
    cli.run(main, parse_args())
