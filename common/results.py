"""From the files that the processes of evaluate.py leave, chunk by chunk and check by check, to one result and its table."""

import numpy as np

from common import checkpoint, runlog, sanity, stats
from common.cli import UserError


def read_chunk(path, n, names):
    """What attack_chunk left in a file: verdicts of n images after the attacks that `seconds` is of, in the order of `names`."""
    part = checkpoint.read_json(path)
    try:
        kinds = isinstance(part["zero_gradients"], int) and all(isinstance(text, str) for text in part["warnings"])
        fits = len(part["fooled_by"]) == n and set(part["fooled_by"]) <= {*range(-1, len(names) + 1)}
        if kinds and fits and len([s for s in part["seconds"] if s >= 0]) <= len(names):
            return part
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged, no chunk of {n} images; delete it, and it is attacked again")


def read_check(path, name, n):
    """What check_sanity left in a file: {"fooled": n truth values} of "steps" and "transfer", {"lines": [...]} of the others."""
    part = checkpoint.read_json(path)
    try:
        if name in ("steps", "transfer"):
            fits = len(part["fooled"]) == n and set(part["fooled"]) <= {True, False}
        else:
            fits = all((type(a["check"]), type(a["ok"]), type(a["found"])) == (str, bool, str) for a in part["lines"])
        if fits:
            return part
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged, no check of {n} images; delete it, and it runs again")


def merge(parts, request, labels, args, seconds):
    """(result, per-image arrays) of the files that all processes left."""
    names, n, n_checked = request["attacks"], request["n"], request["sanity_images"]
    sizes = [min(args.batch_size, n - start) for start in range(0, n, args.batch_size)]
    chunks = [read_chunk(path, size, names) for size, (_, _, path) in zip(sizes, parts)]
    fooled_by = np.concatenate([chunk["fooled_by"] for chunk in chunks]).astype(np.int8)
    clean_correct, robust = fooled_by >= 0, fooled_by == len(names)
    groups = {name: read_check(path, name, n_checked) for kind, name, path in parts if kind == "sanity"}
    lines = [line for name in sanity.CHECKS if name in groups for line in groups[name]["lines"]]
    n_zero = sum(chunk["zero_gradients"] for chunk in chunks)
    if names:
        lines.append(sanity.line("hardly any image has a zero gradient", n_zero <= 0.01 * n, f"{n_zero} of {n}"))
    for name, check in {"steps": "APGD-CE of 300 steps fools hardly any more", "transfer": "transfer fools no more"}.items():
        if name in groups:
            found = int((np.array(groups[name]["fooled"]) & robust[:n_checked]).sum())
            ok = found <= (0.01 * n_checked if name == "steps" else 0)
            without = f"; {(robust.sum() - found) / n:.2%} robust without them" if found else ""
            lines.append(sanity.line(check, ok, f"{found} of {n_checked} that count as robust{without}"))
    if "square" in names:
        found = int((fooled_by == names.index("square")).sum())
        lines.append(sanity.line("Square fools hardly any that gradients did not", found <= max(1, 0.002 * n), f"{found} of {n}"))
    if args.randomised:
        lines = [sanity.line(sanity.RANDOM, not a["ok"], a["found"]) if a["check"] == sanity.DETERMINISTIC else a for a in lines]
    heard = [{"points of zero gradient" if "zero gradient" in m else m for m in chunk["warnings"]} for chunk in chunks]
    warnings = {f"pyautoattack: {m} (in {sum(m in of for of in heard)} of {len(heard)} chunks)" for m in set().union(*heard)}
    failed = [f"check failed: {line['check']} ({line['found']})" for line in lines if not line["ok"]]
    result = request | {
        "checkpoint": args.checkpoint or args.teacher,
        "clean": clean_correct.mean(),
        "clean_interval": stats.wilson(int(clean_correct.sum()), n),
        "clean_correct": int(clean_correct.sum()),
        "robust": robust.mean() if names else None,
        "robust_interval": stats.wilson(int(robust.sum()), n) if names else None,
        "robust_correct": int(robust.sum()) if names else None,
        "zero_gradients": n_zero,
        "sanity": lines,
        "warnings": failed + sorted(warnings),
        "seconds": seconds,
        "seconds_by_attack": {name: round(sum(chunk["seconds"][k] for chunk in chunks), 1) for k, name in enumerate(names)},
        "environment": runlog.environment(),
    }
    per_image = {"index": np.arange(n), "label": labels[:n], "clean_correct": clean_correct, "robust": robust, "fooled_by": fooled_by}
    return result, per_image | {"attacks": np.array(names, str)}


def print_result(result, path):
    for warning in result["warnings"]:
        print(f"WARNING: {warning}")
    rows = {"clean": "clean", "robust": f"{result['attack_name']}, {result['norm']} {result['eps']:.4g}"}
    for key, name in list(rows.items())[: 2 if result["attacks"] else 1]:
        low, high = result[f"{key}_interval"]
        suspect = "   WARNING: see above" if key == "robust" and result["warnings"] else ""
        print(f"{name:<40} {result[key]:7.2%}   95 % interval {low:.2%} to {high:.2%}   n = {result['n']}{suspect}")
    print("sanity checks " + (f"on the first {result['sanity_images']} images" if result["sanity_images"] else "(--sanity-images 0)"))
    for line in result["sanity"]:
        print(f"  {'ok' if line['ok'] else 'FAILED':<7}{line['check']:<48}{line['found']}")
    print(f"{result['seconds']:.0f} s; {path}", flush=True)
