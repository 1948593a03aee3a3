"""What the benchmarks share: measuring in turns, benchmarks/results.json, and README's table of it.

python benchmarks/measure.py   # writes README's table anew from benchmarks/results.json
"""

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import checkpoint, cli, runlog  # noqa: E402

STORE, README = ROOT / "benchmarks" / "results.json", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks/measure.py writes from here -->\n", "<!-- benchmarks end -->\n"


def alternate(rows, repeats, warm_up=True):
    """Seconds of every function in rows, {name: [repeats]}, called in turns so that a disturbance meets all; a first round warms up.

    A function that returns a float has taken its own time.
    """
    seconds = {name: [] for name in rows}
    for repeat in range(-1 if warm_up else 0, repeats):
        for name, run in rows.items():
            begun = time.perf_counter()
            found = run()
            if repeat >= 0:
                seconds[name].append(found if isinstance(found, float) else time.perf_counter() - begun)
    return seconds


def compare(what, against, seconds, others, target=None, at_most=False):
    """A line of the table: how many times longer `others` took than `seconds`, round by round; of a cost (at_most), the inverse."""
    ratios = [a / b for a, b in (zip(seconds, others) if at_most else zip(others, seconds))]
    found = {"what": what, "against": against, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    found |= {"n": len(ratios), "seconds": statistics.median(seconds), "seconds_against": statistics.median(others)}
    return found | {"at_most": at_most} | ({"target": target} if target else {})


def record(part, lines, **settings):
    """Lines of one benchmark into benchmarks/results.json, in place of its former ones, and onto the screen."""
    for line in lines:
        print(f"{line['what']:<70} {line['ratio']:7.2f}  ({line['low']:.2f} to {line['high']:.2f}, n = {line['n']})  {line['against']}")
    parts = checkpoint.read_json(STORE) if STORE.exists() else {}
    parts[part] = {"lines": lines, "settings": settings, "environment": runlog.environment()}
    checkpoint.write_json(parts, STORE)


def table(parts):
    """README's table."""
    rows = ["| | against | ratio | target |", "|---|---|---|---|"]
    for part in parts.values():
        for line in part["lines"]:
            ratio = f"{'costs ' if line['at_most'] else ''}{line['ratio']:.2f} ({line['low']:.2f} to {line['high']:.2f}; {line['n']})"
            if "target" in line:
                met = line["ratio"] <= line["target"] if line["at_most"] else line["ratio"] >= line["target"]
                target = f"{'at most' if line['at_most'] else 'at least'} {line['target']:g}: {'met' if met else '**missed**'}"
            else:
                target = ""
            rows.append(f"| {line['what']} | {line['against']} | {ratio} | {target} |")
    growth = next((part["settings"]["growth"] for part in parts.values() if "growth" in part["settings"]), {})
    rows += [""] * bool(growth)
    for name, of in growth.items():
        r2 = f"r2 {of['r2']:.3f}, {name} {', '.join(map(str, of['amounts']))}"
        fit = f"{1000 * of['intercept']:.1f} ms + {1000 * of['slope']:.2f} ms x {name}"
        rows.append(f"- a step of the digits' default takes {fit} ({r2})")
    kinds = {f"{e['device']}, {e['threads']} threads, torch {e['torch']}" for e in (part["environment"] for part in parts.values())}
    return "\n".join([*rows, "", f"{'; '.join(sorted(kinds))}.", ""])


def main(args):
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise cli.UserError(f"{README}: lacks the two lines between which the table stands")
    with checkpoint.atomic(README) as file:
        file.write((before + begin + table(checkpoint.read_json(STORE)) + end + after).encode())


if __name__ == "__main__":
    cli.run(main, cli.Parser(__doc__).parse_args())
