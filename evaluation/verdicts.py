"""The files of an evaluation: parts that its processes leave, and one result made of them.

A part is one chunk of images under attack, or one group of sanity checks. The result is a JSON file
with the numbers, and beside it an .npz file with one verdict per image. Comparing two results is in
evaluation/compare.py; the attacks are in evaluate.py.
"""

import glob
import os
import shutil
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, cli, files, run
from common.stats import wilson
from evaluation import compare, sanity
from evaluation.autoattack import NORMS
from evaluation.requests import ATTACKS

# ------------------------------------------------------------------------------------- paths


class Part(NamedTuple):
    """One unit of work, done by one process."""

    kind: str  # "chunk" or "check"
    name: int | str  # number of the chunk, or name of the group of checks
    path: str  # of the JSON file that keeps it
    rows: slice  # of the images


def folder_of_parts(path):
    """The directory of the parts of the result file `path`."""
    return os.path.splitext(path)[0] + ".parts"


def request_path(path):
    """The file in the directory of the parts that says of which request they are."""
    return os.path.join(folder_of_parts(path), "request.json")


def per_image_path(path):
    """The file of verdicts per image that belongs to the result file `path`."""
    return os.path.splitext(path)[0] + ".npz"


def parts_of(path, request, checks):
    """All Parts of the result file `path`: the groups of checks by name, then the chunks.

    Checks take their images at once. Where memory is too small for that, it shows before the hours.
    """
    folder = folder_of_parts(path)
    n = request["n"]
    batch_size = request["batch_size"]
    parts = []
    for name in checks:
        rows = slice(0, request["sanity_images"])
        parts.append(Part("check", name, os.path.join(folder, f"sanity-{name}.json"), rows))
    for number, start in enumerate(range(0, n, batch_size)):
        rows = slice(start, min(start + batch_size, n))
        part_path = os.path.join(folder, f"chunk-{number:05d}.json")
        parts.append(Part("chunk", number, part_path, rows))
    return parts


# ------------------------------------------------------------------------- beginning and end


def read_finished(path, request):
    """The result that `path` holds.

    Raises UserError where it is not the one requested, damaged, or does not fit its verdicts.
    """
    result = files.read_json(path)
    for key, value in request.items():
        if result.get(key) != value:
            difference = f"{key} is {result.get(key)}, not {value}"
            raise UserError(f"{path}: holds another result ({difference}); move it away")
    check_finished(result, path)
    return result


def claim_parts(path, request, device):
    """Claim the directory of parts for a request, and see that the result can be written.

    request: dict of all that the result depends on. Parts of two machines would be neither's, so
    device and version of PyTorch are compared, too. Hours of work shall not be lost to a name that
    cannot be written. Raises UserError where the directory holds parts of another request, or a
    per-image file whose result is gone would be replaced.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    request = request | {"torch": torch.__version__, "device": gpu or device.type}
    _check_orphan(path)
    folder = folder_of_parts(path)
    flag = "parts of the result"
    run.claim_directory(folder, request, "request.json", flag=flag, remedy="move it away")
    for target in (path, per_image_path(path)):
        trial = f"{target}.writing"
        open(trial, "wb").close()
        os.unlink(trial)


def check_place(path, request, device):
    """Raises UserError where the result file `path`, or parts of it, are of another request."""
    if os.path.exists(path):
        read_finished(path, request)
    elif os.path.exists(request_path(path)):
        claim_parts(path, request, device)
    else:
        _check_orphan(path)


def _check_orphan(path):
    if os.path.exists(per_image_path(path)) and not os.path.exists(folder_of_parts(path)):
        orphan = f"would replace {per_image_path(path)}, whose .json is gone"
        raise UserError(f"{path}: {orphan}; move it away")


def write_result(path, result, per_image):
    """Write a result and its arrays per image; its parts are deleted."""
    with files.atomic(per_image_path(path)) as file:
        np.savez(file, **per_image)
    files.write_json(result, path)
    shutil.rmtree(folder_of_parts(path))


def remove_parts(path):
    """Delete the parts of a finished result, which a kill may have left."""
    if os.path.exists(request_path(path)):
        shutil.rmtree(folder_of_parts(path))


# ------------------------------------------------------------------------------ reading parts


def read_chunk(path, n, attacks):
    """What evaluate.attack_chunk left in a file, a dict of these entries.

    fooled_by: list of n verdicts. seconds: list with a number for each attack that is done.
    zero_gradients: int. warnings: list of texts. attacks: names of all attacks, in their order.
    Raises UserError where the file is damaged.
    """
    chunk = files.read_json(path)
    fits = (
        _is_list(chunk.get("fooled_by"), int)
        and len(chunk["fooled_by"]) == n
        and set(chunk["fooled_by"]) <= set(range(-1, len(attacks) + 1))
        and _is_list(chunk.get("seconds"), float)
        and len(chunk["seconds"]) <= len(attacks)
        and _is_list(chunk.get("warnings"), str)
        and isinstance(chunk.get("zero_gradients"), int)
    )
    if not fits:
        raise UserError(f"{path}: damaged, no chunk of {n} images; delete it to attack it again")
    return chunk


def read_check(path, name, n):
    """What sanity.run_check left in a file. Raises UserError where it is damaged."""
    check = files.read_json(path)
    if name in sanity.COMPARED:
        fooled = check.get("fooled")
        fits = _is_list(fooled, bool) and len(fooled) == n
    else:
        fits = _are_outcomes(check.get("lines"))
    if not fits:
        raise UserError(f"{path}: damaged, no check of {n} images; delete it to run it again")
    return check


def _is_list(values, kind):
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _are_outcomes(lines):
    """Whether a value that was read is a list of outcomes, as sanity.outcome makes them."""
    return _is_list(lines, dict) and all(
        isinstance(line.get(key), kind) for line in lines for key, kind in sanity.OUTCOME.items()
    )


def _is_environment(environment):
    """Whether a dict that was read has what is shown of run.environment."""
    is_text = all(isinstance(environment.get(key), str) for key in ("torch", "device"))
    return is_text and _is_list(environment.get("command"), str)


def _are_classes(rows, attacks):
    """Whether a value that was read is a list of rows as _by_class makes them."""
    kinds = {"class": str, "n": int, "clean": float} | ({"robust": float} if attacks else {})
    return _is_list(rows, dict) and all(
        isinstance(row.get(key), kind) for row in rows for key, kind in kinds.items()
    )


# ------------------------------------------------------------------------- one result of all

FINISHED = {  # entries of a result, beside the lists that are checked further
    "attack": str,
    "attack_name": str,
    "attacks": list,
    "batch_size": int,
    "checkpoint": str,
    "checkpoint_sha256": str | None,
    "clean": float,
    "clean_correct": int,
    "clean_interval": list,
    "data_sha256": str,
    "dataset": str,
    "environment": dict,
    "eps": float,
    "n": int,
    "norm": str,
    "precision": str,
    "robust": float | None,
    "robust_correct": int | None,
    "robust_interval": list | None,
    "sanity_images": int,
    "seconds": float,
    "seed": int,
    "settings": dict,
    "version": str,
}


def merge(parts, request, labels, *, classes, checkpoint, randomised, seconds):
    """(result, arrays per image) of all parts, which all processes have finished.

    request: dict of all that the result depends on, which becomes a part of it. labels: (n,).
    classes: their names, () where they have none.
    randomised: whether the model is meant to be. seconds: since this run began.
    """
    n = request["n"]
    attacks = request["attacks"]
    chunks = []
    checks = {}
    for part in parts:
        if part.kind == "chunk":
            size = part.rows.stop - part.rows.start
            chunks.append(read_chunk(part.path, size, attacks))
        else:
            checks[part.name] = read_check(part.path, part.name, request["sanity_images"])

    fooled_by = np.concatenate([chunk["fooled_by"] for chunk in chunks]).astype(np.int8)
    clean_correct = fooled_by >= 0
    robust = fooled_by == len(attacks)
    n_clean = int(clean_correct.sum())
    n_robust = int(robust.sum())
    n_zero = sum(chunk["zero_gradients"] for chunk in chunks)
    outcomes = _outcomes(checks, request, fooled_by, n_zero, randomised)
    failed = [line for line in outcomes if not line["ok"]]
    warnings = [f"check failed: {line['check']} ({line['found']})" for line in failed]
    seconds_by_attack = {}
    for k, name in enumerate(attacks):
        seconds_by_attack[name] = round(sum(chunk["seconds"][k] for chunk in chunks), 1)

    result = request | {
        "checkpoint": checkpoint,
        "clean": n_clean / n,
        "clean_interval": wilson(n_clean, n),
        "clean_correct": n_clean,
        "robust": n_robust / n if attacks else None,
        "robust_interval": wilson(n_robust, n) if attacks else None,
        "robust_correct": n_robust if attacks else None,
        "by_class": _by_class(classes, labels, clean_correct, robust if attacks else None),
        "zero_gradients": n_zero,
        "sanity": outcomes,
        "warnings": warnings + _package_warnings(chunks),
        "seconds": seconds,
        "seconds_by_attack": seconds_by_attack,
        "environment": run.environment(),
    }
    per_image = {
        "index": np.arange(n),
        "label": labels,
        "clean_correct": clean_correct,
        "robust": robust,
        "fooled_by": fooled_by,
        "attacks": np.array(attacks, str),
    }
    return result, per_image


def results_of(folder, digests):
    """({file name: result}, names of results of other weights) of the results-*.json in a folder.

    digests: the SHA-256 of the files that hold the weights. A result for which a set of a file was
    chosen by name is of other weights, too. The verdicts beside a result are counted again.
    Raises UserError where a result is damaged, or its verdicts are missing or another's.
    """
    results = {}
    others = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "results-*.json"))):
        result = files.read_json(path)
        name = os.path.basename(path)
        if result.get("checkpoint_sha256") in digests and result.get("weights") is None:
            check_finished(result, path)
            results[name] = result
        else:
            others.append(name)
    return results, others


def check_finished(result, path):
    """Raises UserError where the result of a file lacks an entry, or does not fit its verdicts."""
    for key, kinds in FINISHED.items():
        if not isinstance(result.get(key), kinds):
            found = f"its entry '{key}' is missing or damaged"
            raise UserError(f"{path}: {found}; move it away and evaluate again")
    _, attacks = ATTACKS.get(result["attack"], (None, result["attacks"]))
    fits = {
        "norm": result["norm"] in NORMS,
        "attacks": result["attacks"] == attacks,
        "environment": _is_environment(result["environment"]),
        "by_class": _are_classes(result.get("by_class", []), result["attacks"]),
    }
    for key, fits_here in fits.items():
        if not fits_here:
            found = f"its entry '{key}' is damaged"
            raise UserError(f"{path}: {found}; move it away and evaluate again")
    if not _are_outcomes(result["sanity"]) or not _is_list(result["warnings"], str):
        raise UserError(f"{path}: its sanity checks are damaged; move it away and evaluate again")
    counted = compare.read_verdicts(per_image_path(path))
    if counted["attacks"].tolist() != result["attacks"]:
        raise UserError(f"{per_image_path(path)}: of another result, with other attacks")
    robust = int(counted["robust"].sum()) if result["attacks"] else None
    found = [len(counted["label"]), int(counted["clean_correct"].sum()), robust]
    expected = [result["n"], result["clean_correct"], result["robust_correct"]]
    if found != expected:
        counts = f"(images, right, robust) are {found} there and {expected} in {path}"
        raise UserError(f"{per_image_path(path)}: of another result, {counts}")
    for key, count in (("clean", found[1]), ("robust", robust)):
        expected = [None, None]
        if count is not None:
            expected = [count / found[0], wilson(count, found[0])]
        if [result[key], result[f"{key}_interval"]] != expected:
            raise UserError(f"{path}: its {key} accuracy is not that of its verdicts")


def _by_class(classes, labels, clean_correct, robust):
    """A dict for each class that has a name and images: class, n, clean and robust accuracy.

    robust: (N,), None without an attack.
    """
    rows = []
    for label, name in enumerate(classes):
        mine = labels == label
        if mine.any():
            row = {"class": name, "n": int(mine.sum()), "clean": float(clean_correct[mine].mean())}
            if robust is not None:
                row["robust"] = float(robust[mine].mean())
            rows.append(row)
    return rows


def _outcomes(checks, request, fooled_by, n_zero, randomised):
    """Outcomes of all sanity checks, those that compare with the attack's verdicts included."""
    n = request["n"]
    n_checked = request["sanity_images"]
    attacks = request["attacks"]
    robust = fooled_by == len(attacks)
    outcomes = []
    for name in sanity.CHECKS:
        if name in checks:
            outcomes += checks[name]["lines"]
    if randomised:
        outcomes = [_expect_randomness(line) for line in outcomes]

    few = max(1, 0.002 * n)  # as many as another random start may fool
    if "earlier_attacks" in request:
        withstood = int((fooled_by >= len(request["earlier_attacks"])).sum())
        n_more = withstood - int(robust.sum())
        text = f"{n_more} of {n}; {withstood / n:.2%} robust before, {robust.mean():.2%} now"
        check = "the adaptive check fools hardly any more"
        outcomes.append(sanity.outcome(check, n_more <= few, text))
    elif attacks:
        check = "hardly any image has a zero gradient"
        outcomes.append(sanity.outcome(check, n_zero <= 0.01 * n, f"{n_zero} of {n}"))
    square = "Square fools hardly any that gradients did not"
    for name, check, allowed in (
        ("steps", "APGD-CE of 300 steps fools hardly any more", 0.01 * n_checked),
        ("transfer", "transfer fools no more", 0),
        ("square", square, 0.01 * n_checked),
    ):
        if name in checks:
            n_more = int((np.array(checks[name]["fooled"]) & robust[:n_checked]).sum())
            text = f"{n_more} of {int(robust[:n_checked].sum())} that count as robust"
            if n_more:
                text += f"; {(robust.sum() - n_more) / n:.2%} robust without them"
            outcomes.append(sanity.outcome(check, n_more <= allowed, text))
    if "square" in attacks and "earlier_attacks" not in request:
        n_square = int((fooled_by == attacks.index("square")).sum())
        outcomes.append(sanity.outcome(square, n_square <= few, f"{n_square} of {n}"))
    return outcomes


def _expect_randomness(line):
    """Of a model that is meant to be randomised, equal logits are what is suspect."""
    if line["check"] != sanity.DETERMINISTIC:
        return line
    return sanity.outcome(sanity.RANDOM, not line["ok"], line["found"])


def _package_warnings(chunks):
    """Lines on what pyautoattack warned of, and in how many chunks."""
    n_chunks = Counter()
    for chunk in chunks:
        kinds = set()
        for text in chunk["warnings"]:
            # The package's text has a number in it, which differs from chunk to chunk.
            kinds.add("points of zero gradient" if "zero gradient" in text else text)
        n_chunks.update(kinds)
    return sorted(
        f"pyautoattack: {kind} (in {count} of {len(chunks)} chunks)"
        for kind, count in n_chunks.items()
    )


def print_result(result, path):
    """Print the warnings, accuracies and sanity checks of a result."""
    n = result["n"]
    for warning in result["warnings"]:
        print(f"WARNING: {warning}")
    _print_accuracy("clean", result["clean"], result["clean_interval"], n)
    if result["attacks"]:
        name = f"{result['attack_name']}, {cli.threat(result['norm'], result['eps'])}"
        remark = "   WARNING: see above" if result["warnings"] else ""
        _print_accuracy(name, result["robust"], result["robust_interval"], n, remark)
    if result.get("by_class"):
        kind = "robust" if result["attacks"] else "clean"
        worst = min(result["by_class"], key=lambda row: row[kind])
        name = cli.printable(worst["class"])
        print(f"worst class: {name}, {worst[kind]:.2%} {kind}, n = {worst['n']}")
    if result["sanity_images"]:
        print(f"sanity checks on the first {result['sanity_images']} images")
    else:
        print("sanity checks (--sanity-images 0)")
    for line in result["sanity"]:
        state = "ok" if line["ok"] else "FAILED"
        print(f"  {state:<7}{line['check']:<48}{line['found']}")
    print(f"{result['seconds']:.0f} s; {path}", flush=True)


def _print_accuracy(name, accuracy, interval, n, remark=""):
    low, high = interval
    spread = f"95 % interval {low:.2%} to {high:.2%}"
    print(f"{name:<40} {accuracy:7.2%}   {spread}   n = {n}{remark}")
