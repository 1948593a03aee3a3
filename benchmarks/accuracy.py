"""What bf16 costs in accuracy: the paired table of docs/costs.md.

    bash runs/digits_precision.sh                # trains, attacks, and calls the line below
    python -m benchmarks.accuracy out/precision  # from runs <precision>/<seed>

What it costs in time is in train_step.py.
"""

import glob
import os

from benchmarks import measure
from common import UserError, cli, files, stats

RESULT = "results-best-apgd-linf-0.15.json"


def accuracies(directory):
    """(clean, robust) in per cent of every seed, {seed: ...}, from runs <directory>/<seed>."""
    found = {}
    for path in glob.glob(os.path.join(directory, "*", RESULT)):
        result = files.read_json(path)
        seed = os.path.basename(os.path.dirname(path))
        with files.reading(path, "a result of evaluate.py"):
            found[seed] = (100 * result["clean"], 100 * result["robust"])
    return found


def table(directory):
    """The table, as Markdown. Raises UserError where the two precisions have other seeds."""
    fp32 = accuracies(os.path.join(directory, "fp32"))
    bf16 = accuracies(os.path.join(directory, "bf16"))
    if fp32.keys() != bf16.keys() or len(fp32) < 2:
        seeds = f"{len(fp32)} runs in fp32 and {len(bf16)} in bf16"
        raise UserError(f"{directory}: {seeds}, expected at least two and of the same seeds")
    lines = [
        "| accuracy, %, mean of the seeds | fp32 | bf16 | bf16 - fp32, 95 % interval |",
        "|---|---|---|---|",
    ]
    for i, name in enumerate(("clean", "robust, APGD-CE+T")):
        means = [stats.t_interval([run[i] for run in runs.values()])[0] for runs in (fp32, bf16)]
        difference, low, high = stats.t_interval([bf16[seed][i] - fp32[seed][i] for seed in fp32])
        cells = [name, *(f"{mean:.2f}" for mean in means)]
        lines.append(f"| {' | '.join(cells)} | {difference:+.2f} ({low:+.2f} to {high:+.2f}) |")
    return "\n".join([*lines, "", f"{len(fp32)} seeds, 797 test images."])


def main(args):
    text = table(args.directory)
    print(text)
    files.write_between(measure.DOCUMENT, "python -m benchmarks.accuracy", f"{text}\n")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("directory", help="of the runs <precision>/<seed>")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
