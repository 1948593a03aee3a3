"""What the benchmarks share: measuring in turns, their store, and the tables of docs/costs.md.

What is measured stands in train_step and evaluate. All of them run from the project's
root, by `python -m benchmarks`.
"""

import statistics
import time
from pathlib import Path

from common import files, run

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "benchmarks" / "results.json"
DOCUMENT = ROOT / "docs" / "costs.md"


def timer(step, n=1):
    """A function that calls step() n times and returns the seconds that this took."""

    def seconds():
        start = time.perf_counter()
        for _ in range(n):
            step()
        return time.perf_counter() - start

    return seconds


def alternate(timers, rounds):
    """Seconds of every timer, {name: [seconds of each round]}.

    They are called in turns, so that a disturbance of the machine meets all of them. A first round
    warms up and is not counted.
    """
    seconds = {name: [] for name in timers}
    for _ in range(rounds + 1):
        for name, seconds_of in timers.items():
            seconds[name].append(seconds_of())
    return {name: values[1:] for name, values in seconds.items()}


def compare(what, against, ours, reference, target=None, unit="as fast"):
    """A row of the table: the ratio of two lists of seconds, round by round.

    unit: "as fast", the reference's over ours, and target is the least ratio wanted; or "the cost",
    ours over the reference's, and target is the largest one; "of the step" likewise, as a share.
    """
    if unit == "as fast":
        ratios = [b / a for a, b in zip(ours, reference)]
    else:
        ratios = [a / b for a, b in zip(ours, reference)]
    return {
        "what": what,
        "against": against,
        "unit": unit,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": len(ratios),
        "ours": statistics.median(ours),
        "reference": statistics.median(reference),
        "target": target,
    }


def record(name, row):
    """Put a row into benchmarks/results.json, in place of its former self, and print it."""
    against = f", against {row['against']}" if row["against"] else ""
    print(f"{row['what']}: {_ratio(row)} ({_range(row)}){against}", flush=True)
    rows = files.read_json(STORE) if STORE.exists() else {}
    rows[name] = {**row, "environment": run.environment()}
    files.write_json(rows, STORE)


def table(rows):
    """The Markdown table of docs/costs.md. rows: those of benchmarks/results.json."""
    lines = [
        "| | against | median | range | rounds | target |",
        "|---|---|---|---|---|---|",
    ]
    machines = set()
    for row in rows.values():
        cells = [
            row["what"],
            row["against"],
            _ratio(row),
            _range(row) if row["rounds"] > 1 else "",
            str(row["rounds"]),
            _verdict(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        where = row["environment"]
        machines.add(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    return "\n".join([*lines, "", f"Machine: {'; '.join(sorted(machines))}."])


def _ratio(row):
    if row["unit"] == "of the step":
        return f"{row['ratio']:.2%} of the step"
    return f"{row['ratio']:.2f} times {row['unit']}"


def _range(row):
    form = "{:.2%} to {:.2%}" if row["unit"] == "of the step" else "{:.2f} to {:.2f}"
    return form.format(row["low"], row["high"])


def _verdict(row):
    if row["target"] is None:
        return ""
    if row["unit"] == "as fast":
        bound = "at least"
        met = row["ratio"] >= row["target"]
    else:
        bound = "at most"
        met = row["ratio"] <= row["target"]
    form = "{:.0%}" if row["unit"] == "of the step" else "{:g}"
    return f"{bound} {form.format(row['target'])}: {'met' if met else '**missed**'}"
