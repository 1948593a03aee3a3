"""Measure what the table of docs/costs.md shows, and write the table: `make bench`.

What is measured stands in the other files of this folder; counted costs are in cost.py.

    python -m benchmarks                  # all rows; half an hour on two CPU cores
    python -m benchmarks --only wrn-16-4  # the rows whose names contain a word
    python -m benchmarks --table          # measures nothing: the table of stored results

Every row is a ratio against a reference that runs in turns with ours on the same cores. The
evaluation's row needs the classifier that `make quickstart` trains.
"""

from benchmarks import evaluate, loading, measure, sampling, train_step
from common import UserError, cli, files

ROWS = {  # name in benchmarks/results.json: (function, its arguments before the rounds)
    "training step, digits": (train_step.against_plain, "digits"),
    "training step, wrn-16-4": (train_step.against_plain, "wrn-16-4"),
    "training step, wrn-28-10": (train_step.against_plain, "wrn-28-10"),
    "DRA, digits": (train_step.alignment_cost, "digits"),
    "DRA, wrn-28-10": (train_step.alignment_cost, "wrn-28-10"),
    "loading": (loading.batch_time,),
    "memory": (loading.memory,),
    "sampling": (sampling.against_diffusers,),
    "features": (sampling.against_whole_pass,),
    "evaluation, digits linf": (evaluate.of_quickstart,),
}


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--rounds", type=cli.count, default=5, help="measurements of each row")
    parser.add_argument("--only", default="", help="a word that the rows' names contain")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    return parser.parse_args(argv)


def main(args):
    names = [name for name in ROWS if args.only in name]
    if not names:
        raise UserError(f"--only {args.only}: in no row's name; the rows are {'; '.join(ROWS)}")
    for name in [] if args.table else names:
        function, *arguments = ROWS[name]
        measure.record(name, function(*arguments, args.rounds))
    table = measure.table(files.read_json(measure.STORE))
    measure.write_between("python -m benchmarks", table)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
