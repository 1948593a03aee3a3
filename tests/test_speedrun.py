"""Robust accuracy per hour: passes are counted as they happen, and a target is reached by a test.

Alone: python -m pytest tests/test_speedrun.py
"""

import pytest
import torch
from conftest import ROOT
from scipy.stats import t
from torch import nn

import train_at
from common import UserError, attacks
from runs import speedrun, store

SETTINGS = {
    "dataset": "digits",
    "n_steps": 5,
    "loss": "trades",
    "batch_size": 128,
    "epochs": 2,
    "lr": 0.2,
}


class Counted(nn.Module):
    """A linear classifier that counts its passes, those of its copies among them."""

    passes = 0

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        Counted.passes += 1
        logits = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, grad):
        Counted.passes += 1


@pytest.mark.parametrize(
    "flags",
    ["--n-steps 1", "--n-steps 4", "--loss pgd --n-steps 1", "--loss pgd", "--loss standard"],
)
def test_passes_are_those_of_a_training_step(flags):
    args = train_at.parse_args(flags.split())
    model = Counted()
    twin = attacks.make_twin(model, "batch", "fp32")
    x = torch.rand(6, 1, 8, 8)
    Counted.passes = 0
    value, *_ = train_at.adversarial_loss(model, twin, x, torch.arange(6), 0 * x, args)
    value.backward()
    assert Counted.passes == speedrun.passes_per_image(vars(args))


def row(n_robust, seed=0, **changed):
    """A run of 100 test images: ten are wrong without an attack, n_robust withstand both."""
    return {
        "script": "train_at.py",
        "seed": seed,
        "norm": "linf",
        "eps": 0.15,
        "n": 100,
        "settings": SETTINGS | changed,
        "held_out": [[5, 0.9, 0.7], [10, 0.9, 0.8]],
        "train_seconds": 30.0,
        "warnings": [],
        "verdicts": "3" * n_robust + "2" * (90 - n_robust) + "0" * 10,
        "environment": {"device": "cpu", "torch": "2"},
    }


def test_a_target_is_reached_by_a_test_over_ten_seeds():
    robust = [82, 84, 83, 85, 82, 83, 84, 84, 83, 83]
    recipes = {
        "base": [row(n, seed) for seed, n in enumerate(robust)],
        "fast": [row(n, seed, n_steps=2, batch_size=64) for seed, n in enumerate(robust)],
        "few": [row(n, seed, n_steps=1, loss="pgd") for seed, n in enumerate(robust[:9])],
    }
    base, fast, few = speedrun.table(recipes, 82.0)[2:5]
    p = t.sf((83.3 - 82) / (torch.tensor(robust).double().std().item() / 10**0.5), 9)
    assert p < 0.01
    accuracy = f"30 | 90.0 | 83.30 ± 0.95 (10) | {p:.2g}"
    assert base == f"| base: the defaults | 0.02 M | 100% | {accuracy}, **reached** |"
    assert fast.startswith("| fast: `--batch-size 64 --n-steps 2` | 0.01 M | 29% | ")
    assert fast.endswith(f"{accuracy}, **reached** |")
    assert few.startswith("| few: `--loss pgd --n-steps 1` | 0.01 M | 29% | ")
    assert few.endswith("not reached |")  # for want of a seed
    assert "**reached**" not in str(speedrun.table(recipes, 83.0))
    p = t.sf((83.3 - 82.4) / (torch.tensor(robust).double().std().item() / 10**0.5), 9)
    assert 0.01 / 3 < p < 0.01  # one of three recipes would do so by chance too often
    assert "**reached**" not in str(speedrun.table(recipes, 82.4))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(rows {recipe: [row of each seed]}): what read_recipes makes of their directories."""
    monkeypatch.setitem(speedrun.N_IMAGES, "digits", 100)

    def read(rows, dataset="digits"):
        for name, of_seeds in rows.items():
            for seed in range(len(of_seeds)):
                (tmp_path / name / str(seed)).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / str(seed) / "args.json").touch()
        in_folder = {f"{name}/{i}": row for name in rows for i, row in enumerate(rows[name])}
        monkeypatch.setattr(
            store, "read_run", lambda folder: in_folder["/".join(folder.split("/")[-2:])]
        )
        return speedrun.read_recipes(str(tmp_path), dataset)

    return read


def rows_of(n_seeds, **changed):
    return [row(80, seed, **changed) for seed in range(n_seeds)]


def test_runs_are_read_by_recipe(read):
    rows = {"base": rows_of(3), "fast": rows_of(2, n_steps=2)}
    assert read(rows) == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"fast": rows_of(2)}, "no runs base/<seed> there"),
        ({"base": rows_of(11)}, "base/10: expected the seeds 0 to 9 and no others"),
        ({"base": [row(80) | {"warnings": ["a"]}]}, "base/0: its attack warned: a"),
        ({"base": rows_of(1)}, "base: one seed, expected at least two"),
        ({"base": [row(80), None]}, "base/1: not trained to its end, or not attacked"),
        ({"base": [row(80), row(80)]}, "base/1: a run with --seed 0"),
        ({"base": [row(80), row(80, 1, lr=0.1)]}, "base/1: differs from the seed before it in lr"),
        ({"base": [row(80) | {"script": "train_at_aux.py"}]}, "expected a run of train_at.py"),
        ({"base": [row(80) | {"eps": 0.1}]}, "attacked with linf 0.1 on 100, expected linf 0.15"),
        ({"base": [row(80) | {"n": 10}]}, "on 10, expected linf 0.15 on 100 images"),
        (
            {"base": rows_of(2), "fast": rows_of(2, model="wrn-16-4", n_steps=2)},
            "fast: differs from base in model, which a recipe may not change",
        ),
        (
            {"base": rows_of(2), "fast": rows_of(2, attack_bn="running")},
            "fast: differs from base in attack_bn",
        ),
    ],
)
def test_runs_that_do_not_belong_in_the_table(read, rows, message):
    with pytest.raises(UserError, match=message):
        read(rows)


def test_runs_of_another_data_set(read, monkeypatch):
    monkeypatch.setitem(speedrun.N_IMAGES, "cifar10", 100)
    with pytest.raises(UserError, match="base/0: expected a run of train_at.py on cifar10"):
        read({"base": rows_of(2)}, "cifar10")


def test_flags_can_be_typed():
    changed = row(80, momentum=[0.8, 0.95], step_size=4 / 255, lr=0.05, loss="pgd")
    written = speedrun.flags(row(80), changed)
    assert written == "--loss pgd --lr 0.05 --momentum 0.8 0.95 --step-size 4/255"
    train_at.parse_args(written.split())


def test_every_setting_that_a_recipe_may_change_is_one():
    assert speedrun.FREE <= vars(train_at.parse_args([])).keys()


def test_tables_stand_in_the_document(tmp_path, monkeypatch):
    """A table of each data set that was run; of another, what stands there stays."""
    monkeypatch.setitem(speedrun.TARGETS, "other", 20.0)
    marked = ["".join(speedrun.markers(name)) for name in speedrun.TARGETS]
    page = (ROOT / speedrun.PAGE).read_text()
    assert all(page.count(line) == 1 for line in marked[0].splitlines())
    (tmp_path / "page.md").write_text("".join(marked))
    monkeypatch.setattr(speedrun, "PAGE", str(tmp_path / "page.md"))
    monkeypatch.setattr(
        speedrun, "read_recipes", lambda path, name: {"base": [row(80), row(81, 1)]}
    )
    (tmp_path / "out" / "digits").mkdir(parents=True)
    speedrun.main(speedrun.parse_args([str(tmp_path / "out")]))
    page = (tmp_path / "page.md").read_text()
    assert page.count("80.50 ± 0.71 (2)") == 1
    assert page.endswith(marked[1])
    with pytest.raises(UserError, match="no runs of digits or other there"):
        speedrun.main(speedrun.parse_args([str(tmp_path)]))
