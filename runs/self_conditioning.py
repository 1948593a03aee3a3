"""The table of runs/digits_self_conditioning.sh: networks without and with self-conditioning.

    python -m runs.self_conditioning out/self-conditioning

Means over seeds, and the mean difference, paired by seed, ± half of its 95 % interval (Student's).
"""

import glob
import json
import os

import numpy as np

from common import UserError, cli, files, stats
from runs.effects import markdown

KINDS = ("plain", "conditioned")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("root", type=cli.path, help="directory of <kind>/<seed>, <kind>-features")
    return parser.parse_args(argv)


def measured(root, kind, seed):
    """{title: value} of one network: its last validation loss, and its probes in %."""
    log = files.read_text(f"{root}/{kind}/{seed}/log.jsonl")
    probe = files.read_json(f"{root}/{kind}-features/{seed}/probe.json")
    values = {"EDM loss, held out": json.loads(log.splitlines()[-1])["val_loss"]}
    for block, row in zip(probe["blocks"], probe["accuracy"]):
        for sigma, accuracy in zip(probe["sigmas"], row):
            values[f"probe of {block}, sigma {sigma:g}, %"] = 100 * accuracy
    return values


def table(root):
    """The lines of the table, of the seeds that both kinds of networks have."""
    finished = []
    for kind in KINDS:
        paths = glob.glob(f"{glob.escape(root)}/{kind}-features/*/probe.json")
        finished.append({os.path.basename(os.path.dirname(path)) for path in paths})
    seeds = sorted(set.intersection(*finished))
    if len(seeds) < 2:
        raise UserError(f"{root}: {len(seeds)} seeds of both kinds are finished, expected two")
    runs = [[measured(root, kind, seed) for seed in seeds] for kind in KINDS]
    rows = []
    for title in runs[0][0]:
        plain, conditioned = [np.array([run[title] for run in of_kind]) for of_kind in runs]
        digits = 1 if title.endswith("%") else 4
        mean, low, _ = stats.t_interval(conditioned - plain)
        means = [f"{values.mean():.{digits}f}" for values in (plain, conditioned)]
        rows.append([title, len(seeds), *means, f"{mean:+.{digits}f} ± {mean - low:.{digits}f}"])
    return markdown(["", "seeds", "plain", "self-conditioned", "difference"], rows)


def main(args):
    print("\n".join(table(args.root)))


if __name__ == "__main__":
    cli.run_script(main, parse_args())
