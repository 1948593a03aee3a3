"""The run scripts: what a command reads from out/, another one of the file has made."""

import importlib
import json
import os

import pytest
from data_helper import write_jpeg
from test_commands import run_recorded

from common import UserError
from published.datasets import DATASETS
from runs import results, self_conditioning, store

# Arguments that name a file or a directory that is read, whole or with =SHARE behind it.
READ = ("checkpoint", "classifier", "teacher", "diffusion", "synthetic", "pupil")


def parsed(words):
    """The arguments of a recorded command line of python or torchrun, as its script has them."""
    if words[1] == "-m":
        return importlib.import_module(words[2]).parse_args(words[3:])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(words[script].removesuffix(".py"))
    return module.parse_args(words[script + 1 :])


@pytest.mark.parametrize(
    "names",
    [
        ["cifar10"],
        ["cifar100"],
        ["svhn"],
        ["tiny_imagenet"],
        ["imagenet"],
        ["cifar10_small", "verdicts"],
        ["cifar10_small", "analysis_cifar10"],
        ["speedrun"],
    ],
)
def test_what_is_read_has_been_made(names, tmp_path):
    """By the commands of shell files, of which the later ones say that they come second."""
    made = set()
    read = set()
    commands = []
    for name in names:
        (tmp_path / name).mkdir()
        commands += run_recorded(f"{name}.sh", tmp_path / name)
    for words in commands:
        args = parsed(words)
        made.add(getattr(args, "out_dir", None))
        for argument in READ:
            values = getattr(args, argument, None) or []
            for value in [values] if isinstance(values, str) else values:
                path = value.split("=")[0]
                read.add(os.path.dirname(path) if path.endswith(".pt") else path)
    missing = {path for path in read if path.startswith("out/")} - made
    assert read and not missing


TOY = {  # flags behind those of a command; of a flag given twice, the last counts
    "train_diffusion.py": "--channels 8 8 8 8 --layers-per-block 2 --train-steps 2 --batch-size 8",
    "generate_synthetic.py": "--n-images 20 --shard-size 10 --n-steps 2 --batch-size 10",
    "train_at.py": "--model wrn-10-1 --epochs 1 --eval-every 1 --epoch-images 16 --batch-size 8"
    " --n-steps 1 --eval-n-steps 1",
    "evaluate.py": "--n-images 6 --batch-size 6 --sanity-images 0",
}
TOY["train_at_aux.py"] = f"{TOY['train_at.py']} --head-width 16"


def test_the_hour_at_toy_size(tmp_path, monkeypatch):
    """Every command of runs/cifar10_hour.sh, in its order, on a small CIFAR-10."""
    folders = tmp_path / "data"
    for split, n in (("train", 6), ("test", 1)):
        for name in DATASETS["cifar10"].classes:
            (folders / split / name).mkdir(parents=True)
            for i in range(n):
                write_jpeg(folders / split / name / f"{i}.jpg", seed=i, size=(32, 32))
    commands = run_recorded("cifar10_hour.sh", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands:
        script = words[1]
        toy = [*TOY[script].split(), "--data-dir", str(folders)]
        module = importlib.import_module(script.removesuffix(".py"))
        if script != "evaluate.py":
            toy += ["--val-size", "10"]
        module.main(module.parse_args([*words[2:], *toy]))
    assert len(commands) == 10
    results = sorted(tmp_path.glob("out/cifar10-hour/*/results-best-autoattack-*.json"))
    names = [path.parent.name for path in results]
    assert names == ["at", "at_dra", "dm_at", "dm_at_dra"]


def test_a_seed_of_the_long_tail_at_toy_size(tmp_path, monkeypatch):
    """runs/digits_imbalance.sh, from its teacher to the rows of its tables."""
    commands = run_recorded("digits_imbalance.sh", tmp_path)
    assert commands[-1] == ["python", "-m", "runs.results", "--add", "out/evidence"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for words in commands[:-1]:
        args = parsed(words)
        run = getattr(args, "checkpoint", None) or args.out_dir
        if "/digits-long-tail/" in run and "/0" not in run:
            continue
        script = words[1]
        toy = TOY[script].split()
        if script == "train_diffusion.py":
            toy += ["--channels", "8", "8"]
        module = importlib.import_module(script.removesuffix(".py"))
        module.main(module.parse_args([*words[2:], *toy]))
    runs, _ = store.add_runs("out/evidence")
    experiment = results.LONG_TAIL
    names = [f"{experiment}/{cell}/0" for cell in ("at", "at_dra", "dm_at", "dm_at_dra")]
    assert sorted(runs) == names
    assert all(run["settings"]["imbalance"] == 10 and run["n"] == 6 for run in runs.values())
    table = results.long_tail_tables(store.by_cell(runs)[experiment])
    assert sum(line.startswith(("| AT", "| DM-AT")) for line in table) == 4


def test_the_table_of_self_conditioning(tmp_path):
    """Differences are paired by seed; a seed of one kind alone does not count."""
    values = {
        "plain": [(0.50, 0.90), (0.42, 0.94), (9, 9)],
        "conditioned": [(0.49, 0.91), (0.39, 0.93)],
    }
    for kind, of_seeds in values.items():
        for seed, (loss, accuracy) in enumerate(of_seeds):
            run, probe = (tmp_path / name / str(seed) for name in (kind, f"{kind}-features"))
            run.mkdir(parents=True)
            probe.mkdir(parents=True)
            lines = [{"val_loss": 9}, {"val_loss": loss}]
            (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
            result = {"blocks": ["mid_block"], "sigmas": [0.1], "accuracy": [[accuracy]]}
            (probe / "probe.json").write_text(json.dumps(result))
    # Student's t of two values is 12.706 times half of their distance.
    assert self_conditioning.table(str(tmp_path))[2:-1] == [
        "| EDM loss, held out | 2 | 0.4600 | 0.4400 | -0.0200 ± 0.1271 |",
        "| probe of mid_block, sigma 0.1, % | 2 | 92.0 | 92.0 | +0.0 ± 12.7 |",
    ]
    with pytest.raises(UserError, match="0 seeds of both kinds are finished"):
        self_conditioning.table(str(tmp_path / "plain"))
