"""docs/results.json: what is kept of a run, and which runs may stand side by side.

The tables and figures are made of it by runs/results.py.

A run is added once it was trained to its end, with the attack on its best.pt if there was one.
Added again, it replaces the row of its name, <experiment>/<cell>/<seed>. A row holds what the run's
own files say: all its settings, accuracies, times, versions, and the verdict on every test image,
one digit each: 0 is wrong without an attack, k is fooled by the k-th attack, and one more than the
number of attacks is robust to all of them.

Beside the runs stand verdicts on their teachers: what extract_features.py --verdict --pupil left in
verdict-<experiment>.

Settings are compared as they are; nothing is filled in from the defaults of today's scripts.
- Paths, and what else a resumed run may change (common/run.py), are kept and not compared.
- Rows made before a flag existed lack it. ADDED_LATER says what such a row did.
- Rows made before a hash was recorded (data_sha256) lack it. A hash is compared only where both
  rows have it.
- Any other setting that is absent in one of two rows counts as None there. Rows of train_at.py and
  train_at_aux.py are compared with each other in the settings that both scripts have.
"""

import glob
import json
import os

import numpy as np

from common import UserError, files
from common.run import NOT_COMPARED
from evaluation import compare
from evaluation.verdicts import check_finished, per_image_path
from runs.report import ROWS, read_log

STORE = "docs/results.json"

# Number of real images: experiment.
CURVE = {size: f"digits-{size}" for size in (100, 200, 300, 500, 800)}

TITLES = {  # of cells; others are variations of these
    **ROWS,
    "shuffled": "DM-AT+DRA, targets shuffled",
    "zero": "DM-AT+DRA, weight 0",
    "at_dra,untrained": "AT+DRA, untrained teacher",
}

# Cells named <setting>=<value>: the default value, the cell that has it, and the cell
# without what is varied.
ABLATIONS = {
    "aux_weight": ("1", "dm_at_dra", "dm_at"),
    "align": ("adv", "dm_at_dra", "dm_at"),
    "align_loss": ("cosine", "dm_at_dra", "dm_at"),
    "sigma": ("0.1", "dm_at_dra", "dm_at"),
    "block": ("up_blocks.0.resnets.0", "dm_at_dra", "dm_at"),
    "teacher_label": ("none", "dm_at_dra", "dm_at"),
    "teacher_steps": ("200", "dm_at_dra", "dm_at"),
    "teacher_images": ("100", "dm_at_dra", "dm_at"),
    "n_images": ("10000", "dm_at", "at"),
    "synthetic_fraction": ("0.7", "dm_at", "at"),
    "diffusion_steps": ("200", "dm_at", "at"),
    "diffusion_seed": ("0", "dm_at", "at"),
    "guidance_scale": ("1", "dm_at", "at"),
    "loss": ("trades", "dm_at", "at"),
}

# The settings that say which labels, and which held-out images, a run or a verdict has.
LABELS = ("dataset", "val_size", "n_train", "imbalance")
# Flags that older rows lack, with the value that describes what those runs did.
ADDED_LATER = {
    "train_at.py": {"deterministic": True},
    "train_at_aux.py": {"align_loss": "cosine", "deterministic": True, "teacher_every": 1},
}
# What cells of one experiment may differ in.
VARIED = {
    "aux_weight",
    "n_synthetic",
    "shuffle_targets",
    "synthetic_fraction",
    "synthetic_sha256",
    "teacher_sha256",
}
# Ablations that have another synthetic set, or another teacher, than the rest of the experiment.
OTHER_INPUT = {
    "synthetic_sha256": {"n_images", "diffusion_steps", "diffusion_seed", "guidance_scale"},
    "teacher_sha256": {"teacher_steps", "teacher_images", "untrained"},
}


# ----------------------------------------------------------------------------- reading of runs


def read_run(folder):
    """The row of a run directory, a dict; None where the run is not trained to its end.

    Raises UserError where a file is missing or broken, or the run is of another script.
    """
    settings = files.read_json(f"{folder}/args.json")
    if not os.path.exists(f"{folder}/best.pt"):
        return None
    script = settings.pop("script", None)
    if script not in ADDED_LATER:
        raise UserError(f"{folder}: no run of train_at.py or train_at_aux.py")
    log = read_log(folder)
    n_validations = -(-settings["epochs"] // settings["eval_every"])
    if len(log) < n_validations:
        return None
    environment = files.read_json(f"{folder}/env.json")
    versions = ("device", "python", "torch", "numpy", "commit")
    best_sha256 = files.sha256(f"{folder}/best.pt")
    return {
        "script": script,
        "seed": settings.pop("seed"),
        "settings": dict(sorted(settings.items())),
        "held_out": [[line["step"], line["clean_acc"], line["robust_acc"]] for line in log],
        "best_sha256": best_sha256,
        "train_seconds": log[-1]["seconds"],
        "environment": {key: environment.get(key) for key in versions},
        **read_attack(folder, settings, best_sha256),
    }


def read_attack(folder, settings, best_sha256):
    """What a row keeps of the attack on best.pt; {} where there was none.

    That is AutoAttack where it was run (its first two attacks are those of apgd), else apgd, with
    the norm and radius of the training, on the first test images.
    """
    paths = attack_results(folder, settings, "autoattack")
    if not paths:
        paths = attack_results(folder, settings, "apgd")
    if not paths:
        return {}
    if len(paths) > 1:
        raise UserError(f"{' and '.join(paths)}: which of them counts? Move the other away")
    path = paths[0]
    result = files.read_json(path)
    if result["checkpoint_sha256"] != best_sha256:
        expected = f"{folder}/best.pt; attack that one"
        raise UserError(f"{path}: of another checkpoint than {expected}")
    check_finished(result, path)
    verdicts = compare.read_verdicts(per_image_path(path))
    if not np.array_equal(verdicts["index"], np.arange(result["n"])):
        raise UserError(f"{path}: not of the first {result['n']} test images")
    return {
        "attack": result["attack"],
        "version": result["version"],
        "norm": result["norm"],
        "eps": result["eps"],
        "n": result["n"],
        "precision": result["precision"],
        "batch_size": result["batch_size"],
        "test_sha256": result["data_sha256"],
        "warnings": result["warnings"],
        "attack_seconds": round(sum(result["seconds_by_attack"].values()), 1),
        "verdicts": "".join(str(attack + 1) for attack in verdicts["fooled_by"]),
    }


def attack_results(folder, settings, attack):
    """Paths of a run's results with one attack that has the training's norm and radius."""
    expected = {
        "attack": attack,
        "norm": settings["norm"],
        "eps": settings["eps"],
        "image_list_sha256": None,
        "transfer_sha256": None,
        "seed": 0,
        "settings": {},
    }
    paths = []
    for path in sorted(glob.glob(f"{glob.escape(folder)}/results-best-{attack}-*.json")):
        result = files.read_json(path)
        if all(result.get(key) == value for key, value in expected.items()):
            paths.append(path)
    return paths


def read_verdict(folder):
    """What is kept of a directory of extract_features.py --verdict, a dict.

    Raises UserError where no pupil was looked at, or no probe was attacked.
    """
    verdict = files.read_json(f"{folder}/verdict.json")
    manifest = files.read_json(f"{folder}/manifest.json")
    if "pupil" not in verdict:
        raise UserError(f"{folder}/verdict.json: of no pupil, give --pupil")
    if "attacked" not in verdict:
        raise UserError(f"{folder}/verdict.json: of no attacked probe, give --eps")
    kept = {key: value for key, value in verdict.items() if key != "about"}
    kept["pupil_sha256"] = verdict["about"]["pupil_sha256"]
    return kept | {key: manifest[key] for key in (*LABELS, "network_sha256")}


def read_store():
    """(rows of runs {name: row}, verdicts {experiment: verdict}) of docs/results.json."""
    stored = files.read_json(STORE)
    return stored["runs"], stored.get("verdicts", {})


def add_runs(root):
    """Write every trained run, and the verdicts, below a directory into docs/results.json.

    A run that is not attacked yet does not take the place of a row that is. Returns what
    read_store does.
    """
    rows, verdicts = read_store() if os.path.exists(STORE) else ({}, {})
    paths = sorted(glob.glob(f"{glob.escape(root)}/*/*/*/args.json"))
    if not paths:
        raise UserError(f"--add {root}: no runs <experiment>/<cell>/<seed> there")
    n_trained = 0
    for path in paths:
        folder = os.path.dirname(path)
        name = os.path.relpath(folder, root)
        row = read_run(folder)
        if row is None:
            continue
        n_trained += 1
        if "verdicts" in row or "verdicts" not in rows.get(name, {}):
            rows[name] = row
    by_cell(rows)  # raises where they do not belong together, before anything is written
    for path in sorted(glob.glob(f"{glob.escape(root)}/verdict-*/verdict.json")):
        folder = os.path.dirname(path)
        verdicts[os.path.basename(folder).removeprefix("verdict-")] = read_verdict(folder)
    text = f'{{"runs": {as_json(rows)},\n"verdicts": {as_json(verdicts)}}}\n'
    files.write_text(text, STORE)
    counts = f"below {root} {n_trained} trained, {len(paths)} begun"
    print(f"{STORE}: {len(rows)} runs; {counts}")
    return rows, verdicts


def as_json(rows):
    """A dict as JSON, an entry a line: `git diff` shows what changed."""
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    return "{\n" + ",\n".join(lines) + "\n}"


# ------------------------------------------------------------------- which runs can be compared


def by_cell(runs):
    """Sort rows {name: run} into {experiment: {cell: {seed: run}}}.

    Raises UserError where runs stand side by side that cannot be compared.
    """
    experiments = {}
    for name, run in sorted(runs.items()):
        experiment, cell, seed = name.split("/")
        if str(run["seed"]) != seed:
            raise UserError(f"{name}: a run with --seed {run['seed']}")
        check_name(name, cell, run["settings"])
        experiments.setdefault(experiment, {}).setdefault(cell, {})[int(seed)] = run
    for experiment, cells in experiments.items():
        for cell, seeds in cells.items():
            first, *others = seeds.values()
            for run in others:
                check_same(f"{experiment}/{cell}", differences(first, run))
        check_attacks(experiment, cells)
        check_cells(experiment, cells)
    for size, experiment in CURVE.items():
        for seeds in experiments.get(experiment, {}).values():
            for run in seeds.values():
                n_train = run["settings"].get("n_train")
                if n_train != size:
                    raise UserError(f"{experiment}: a run with --n-train {n_train}")
    return experiments


def check_name(name, cell, settings):
    """Raises UserError where a cell's name has no known form, or says another setting."""
    base, *form = cell.split(",")
    key, _, value = base.partition("=")
    if base not in TITLES and (form or key not in ABLATIONS):
        cells = f"a cell ({', '.join(TITLES)}), with ,<form> or without"
        raise UserError(f"{name}: neither {cells}, nor a setting ({', '.join(ABLATIONS)})")
    if base not in TITLES and value == ABLATIONS[key][0]:
        raise UserError(f"{name}: the default; its cell is {ABLATIONS[key][1]}")
    if cell in TITLES:
        mixed = cell == "zero" or bool(settings.get("synthetic"))
        shuffled = bool(settings.get("shuffle_targets"))
        found = (mixed, shuffled, settings.get("aux_weight") == 0)
        if found != (not cell.startswith("at"), cell == "shuffled", cell == "zero"):
            raise UserError(f"{name}: its images, targets or weight are not those of {cell}")
    for part in form or [base]:
        key, _, value = part.partition("=")
        if key not in settings:
            continue
        setting = settings[key]
        written = f"{setting:g}" if isinstance(setting, float) else str(setting)
        if value != written:
            raise UserError(f"{name}: a run with {key} {setting}")


def check_attacks(experiment, cells):
    """Raises UserError where the attacks on an experiment's runs differ in more than their name.

    Rows of before the last three settings were recorded lack them.
    """
    runs = [run for seeds in cells.values() for run in seeds.values() if "n" in run]
    for key in ("norm", "eps", "n", "precision", "batch_size", "test_sha256"):
        if len({run[key] for run in runs if key in run}) > 1:
            check_same(experiment, [key])


def check_cells(experiment, cells):
    """Raises UserError where cells differ in more than their names say and VARIED allows.

    Each is compared with the first cell, and with the first one of the same script.
    """
    runs = {cell: next(iter(seeds.values())) for cell, seeds in cells.items()}
    named = {cell: {part.partition("=")[0] for part in cell.split(",")} for cell in cells}
    # Cells of default settings first: a setting is compared with one of them.
    order = sorted(runs, key=lambda cell: cell not in TITLES)
    for cell, run in runs.items():
        same_script = [other for other in order if runs[other]["script"] == run["script"]]
        for other in (same_script[0], order[0]):
            may_differ = VARIED | named[cell] | named[other]
            check_same(f"{experiment}/{cell}", differences(runs[other], run, may_differ))
    for key, other_input in OTHER_INPUT.items():
        shared = [run for cell, run in runs.items() if not named[cell] & other_input]
        hashes = [run["settings"][key] for run in shared if run["settings"].get(key) is not None]
        if any(digest != hashes[0] for digest in hashes):
            check_same(experiment, [key])


def check_same(name, differing):
    """Raises UserError where the list of differing settings is not empty."""
    if differing:
        message = f"its runs differ in {', '.join(differing)}; keep the lines of one kind"
        raise UserError(f"{STORE}, {name}: {message}")


def differences(first, second, may_differ=()):
    """The settings in which two runs differ, sorted; the module docstring says what is compared."""
    a = ADDED_LATER[first["script"]] | first["settings"]
    b = ADDED_LATER[second["script"]] | second["settings"]
    in_both = a.keys() & b.keys()
    names = in_both if first["script"] != second["script"] else a.keys() | b.keys()
    differing = []
    for name in sorted(names - {*NOT_COMPARED, *may_differ}):
        unknown = name.endswith("_sha256") and name not in in_both
        if not unknown and a.get(name) != b.get(name):
            differing.append(name)
    return differing
