"""One process against two, one thread each, on digits; and how a training step's time grows with images, attack steps and width.

    python benchmarks/scaling.py

The time of work is the difference between a long and a short run of the same script: start-up, the same in both, drops out.
Efficiency is the time on one process over twice that on two. Training shares each batch between the processes and waits for the
slower at every step; generation, extraction and evaluation share out images and wait for nothing.
"""

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
from measure import ROOT, alternate, compare, record  # first: it finds the project
from train_step import made, our_step, times

import train_at
from common import cli, data
from runs import costs

SCRIPTS = {  # script: (flags, flag that sets the amount of work, short and long, least efficiency)
    "train_at.py": (["--eval-every", "99", "--eval-n-steps", "1"], "--epochs", ("1", "16"), None),
    "generate_synthetic.py": (["--shard-size", "250", "--diffusion"], "--n-images", ("500", "4500"), 0.85),
    "extract_features.py": (["--batch-size", "50", "--n-draws", "4", "--diffusion"], "--sigmas", ("1", ".1 .2 .3 .4 .5 .6 .7 .8 .9"), 0.85),
    "evaluate.py": (["--attack", "pgd", "--batch-size", "100", "--checkpoint"], "--n-steps", ("10", "80"), 0.85),
}
AMOUNTS = {"images": (32, 64, 128, 256), "attack steps": (1, 5, 10, 20), "GFLOP": (1, 2, 3, 4)}  # the last by WRN-10's width


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=cli.count, default=3, help="measurements of each row")
    return parser.parse_args(argv)


def launch(script, *argv, ranks=1):
    """Seconds of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    begun = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *launcher, script, *argv], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def work(script, folder, number, ranks):
    """Seconds of a long run less those of a short one."""
    flags, amount, sizes, _ = SCRIPTS[script]
    given = {"--diffusion": [f"{folder}/diffusion"], "--checkpoint": [f"{folder}/at/best.pt"]}.get(flags[-1], [])
    seconds = []
    for size in sizes:
        out = [] if script == "evaluate.py" else ["--out-dir", f"{folder}/{script}-{next(number)}"]
        for name in os.listdir(f"{folder}/at"):  # evaluate.py keeps what is finished
            if name.startswith("results"):
                os.unlink(f"{folder}/at/{name}")
        seconds.append(launch(script, *flags, *given, amount, *size.split(), *out, ranks=ranks))
    return seconds[1] - seconds[0]


def efficiencies(repeats):
    with tempfile.TemporaryDirectory() as folder:
        launch("train_diffusion.py", "--train-steps", "3", "--out-dir", f"{folder}/diffusion")
        launch("train_at.py", "--epochs", "30", "--eval-every", "30", "--out-dir", f"{folder}/at")
        number, lines = itertools.count(), []
        for script, (*_, least) in SCRIPTS.items():
            rows = {ranks: functools.partial(work, script, folder, number, ranks) for ranks in (1, 2)}
            seconds = alternate(rows, repeats, warm_up=False)
            halves = [s / 2 for s in seconds[1]]
            lines.append(compare(f"efficiency of two processes, `{script}`", "one, of one thread too", seconds[2], halves, least))
    return lines


def growth(repeats):
    """How the seconds of train_at.py's step grow on digits: a line in images, in attack steps, and in counted FLOP by width."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        real, _ = made(folder, data.DATASETS["digits"], 10_000)
        for name, amounts in AMOUNTS.items():
            flags = {"images": "--batch-size {}", "attack steps": "--n-steps {}", "GFLOP": "--model wrn-10-{}"}[name]
            argvs = [flags.format(amount).split() for amount in amounts]
            if name == "GFLOP":
                parsed = [train_at.parse_args(argv) for argv in argvs]
                flop = [a.batch_size * sum(costs.step_parts(a, costs.classifier_passes(a.model, "digits")).values()) for a in parsed]
                amounts = [round(f / 1e9, 1) for f in flop]
            seconds = alternate({a: times(5, our_step(train_at, argv, real, folder)) for a, argv in zip(amounts, argvs)}, repeats)
            medians = [np.median(seconds[a]) / 5 for a in amounts]
            slope, intercept = np.polyfit(amounts, medians, 1)
            r2 = np.corrcoef(amounts, medians)[0, 1] ** 2
            found[name] = {"amounts": amounts, "seconds": medians, "slope": slope, "intercept": intercept, "r2": r2}
    return found


def main(args):
    record("growth", [], growth=growth(2 * args.repeats))
    record("scaling", efficiencies(args.repeats))


if __name__ == "__main__":
    cli.run(main, parse_args())
