"""Measure what the table of docs/costs.md shows, and write the table: `make bench`.

What is measured stands in the other files of this folder; counted costs are in cost.py.

    python -m benchmarks                  # all rows; 45 minutes on two CPU cores
    python -m benchmarks --only wrn-16-4  # the rows whose names contain a word

Every row is a ratio against a reference that runs in turns with ours on the same cores. The
evaluation's rows need the classifier that `make quickstart` trains.
"""

from benchmarks import evaluate, measure, train_step
from common import UserError, cli, files

ROWS = {  # name in benchmarks/results.json: (function, its arguments, the target last)
    "training step, digits": (train_step.against_plain, "digits", "fp32", 1.5),
    "training step, digits in bf16": (train_step.against_plain, "digits", "bf16", 1.5),
    "training step, wrn-10-2": (train_step.against_plain, "wrn-10-2", "bf16", 1.5),
    "training step, wrn-16-4": (train_step.against_plain, "wrn-16-4", "bf16", 1.5),
    "training step, wrn-28-10": (train_step.against_plain, "wrn-28-10", "bf16", None),
    "DRA, digits": (train_step.alignment_cost, "digits", 1, 1.25),
    "DRA, digits, every 4th": (train_step.alignment_cost, "digits", 4, None),
    "DRA, wrn-28-10": (train_step.alignment_cost, "wrn-28-10", 1, 1.08),
    "DRA, convnext_tiny, JiT": (train_step.imagenet_alignment_cost, "JiT-B/16", 2, 1.25),
    "DRA, convnext_tiny, EDM2": (train_step.imagenet_alignment_cost, "EDM2-img64-s", 5, 1.25),
    "DRA, convnext_tiny, DiT": (train_step.imagenet_alignment_cost, "DiT-XL/2", 1, None),
    "targets of DiT, bf16": (train_step.target_speed, "eager", None),
    "targets of DiT, compiled": (train_step.target_speed, "compiled", None),
    "waiting, digits": (train_step.loader_wait, "digits", 0.02),
    "waiting, wrn-10-2": (train_step.loader_wait, "wrn-10-2", 0.02),
    "evaluation, digits linf": (evaluate.against_driver, "linf", 0.15, 1.5),
    "evaluation, digits l2": (evaluate.against_driver, "l2", 0.5, 1.5),
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--rounds", type=cli.count, default=5, help="measurements of each row")
    parser.add_argument("--only", default="", help="a word that the rows' names contain")
    return parser.parse_args(argv)


def main(args):
    names = [name for name in ROWS if args.only in name]
    if not names:
        raise UserError(f"--only {args.only}: in no row's name; the rows are {'; '.join(ROWS)}")
    if any(ROWS[name][0] is evaluate.against_driver for name in names):
        evaluate.check_quickstart()
    for name in names:
        function, *arguments = ROWS[name]
        measure.record(name, function(*arguments, args.rounds))
    table = measure.table(files.read_json(measure.STORE))
    files.write_between(measure.DOCUMENT, "python -m benchmarks", f"{table}\n")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
