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


@pytest.mark.parametrize("loss", ["trades", "pgd", "standard"])
@pytest.mark.parametrize("n_steps", [1, 4])
def test_passes_are_those_of_a_training_step(loss, n_steps):
    attack = [] if loss == "standard" else ["--n-steps", str(n_steps)]
    args = train_at.parse_args(["--loss", loss, *attack])
    model = Counted()
    twin = attacks.make_twin(model, "batch", "fp32")
    x = torch.rand(6, 1, 8, 8)
    Counted.passes = 0
    value, *_ = train_at.adversarial_loss(model, twin, x, torch.arange(6), 0 * x, args)
    value.backward()
    assert Counted.passes == speedrun.passes_per_image(vars(args))


def row(n_robust, **changed):
    """A run of 100 test images: ten are wrong without an attack, n_robust withstand both."""
    return {
        "script": "train_at.py",
        "settings": SETTINGS | changed,
        "held_out": [[5, 0.9, 0.7], [10, 0.9, 0.8]],
        "train_seconds": 30.0,
        "verdicts": "3" * n_robust + "2" * (90 - n_robust) + "0" * 10,
        "environment": {"device": "cpu", "torch": "2"},
    }


def test_a_target_is_reached_by_a_test_over_ten_seeds():
    robust = [82, 84, 83, 85, 82, 83, 84, 84, 83, 83]
    recipes = {
        "base": [row(n) for n in robust],
        "fast": [row(n, n_steps=2, batch_size=64) for n in robust],
        "few": [row(n, n_steps=1, loss="pgd") for n in robust[:9]],
    }
    base, fast, few = speedrun.table(recipes, 82.0).splitlines()[2:5]
    p = t.sf((83.3 - 82) / (torch.tensor(robust).double().std().item() / 10**0.5), 9)
    assert p < 0.01
    accuracy = f"30 | 90.0 | 83.30 ± 0.95 (10) | {p:.2g}"
    assert base == f"| base: the defaults | 0.02 M | 100% | {accuracy}, **reached** |"
    assert fast.startswith("| fast: `--batch-size 64 --n-steps 2` | 0.01 M | 29% | ")
    assert fast.endswith(f"{accuracy}, **reached** |")
    assert few.startswith("| few: `--loss pgd --n-steps 1` | 0.01 M | 29% | ")
    assert few.endswith("not reached |")  # for want of a seed
    assert speedrun.table(recipes, 83.0).count("**reached**") == 0


def test_runs_are_read_by_recipe(tmp_path, monkeypatch):
    for name in ("base/0", "base/1", "base/10", "fast/0", "fast/1"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "args.json").touch()
    rows = {name: row(80, n_steps=2 if "fast" in name else 5) for name in ("base", "fast")}
    monkeypatch.setattr(store, "read_run", lambda folder: rows[folder.split("/")[-2]])
    read = speedrun.read_recipes(str(tmp_path / "digits"), "digits")
    assert {name: len(rows) for name, rows in read.items()} == {"base": 3, "fast": 2}
    (tmp_path / "digits" / "fast" / "1" / "args.json").unlink()
    with pytest.raises(UserError, match="base/0: expected a run of train_at.py on cifar10"):
        speedrun.read_recipes(str(tmp_path / "digits"), "cifar10")
    with pytest.raises(UserError, match="fast: one seed, expected at least two"):
        speedrun.read_recipes(str(tmp_path / "digits"), "digits")

    rows["fast"] = {key: value for key, value in rows["fast"].items() if key != "verdicts"}
    with pytest.raises(UserError, match="fast/0: not trained to its end, or not attacked"):
        speedrun.read_recipes(str(tmp_path / "digits"), "digits")
    monkeypatch.setattr(store, "read_run", lambda folder: row(80, lr=float(folder[-1])))
    with pytest.raises(UserError, match="base/1: differs from the seed before it in lr"):
        speedrun.read_recipes(str(tmp_path / "digits"), "digits")
    with pytest.raises(UserError, match="no runs base/<seed> there"):
        speedrun.read_recipes(str(tmp_path), "digits")


def test_tables_stand_in_the_document(tmp_path, monkeypatch):
    """A table of each data set that was run; of another, what stands there stays."""
    monkeypatch.setitem(speedrun.TARGETS, "other", 20.0)
    marked = ["".join(speedrun.markers(name)) for name in speedrun.TARGETS]
    page = (ROOT / speedrun.PAGE).read_text()
    assert all(page.count(line) == 1 for line in marked[0].splitlines())
    (tmp_path / "page.md").write_text("".join(marked))
    monkeypatch.setattr(speedrun, "PAGE", str(tmp_path / "page.md"))
    monkeypatch.setattr(speedrun, "read_recipes", lambda path, name: {"base": [row(80), row(81)]})
    (tmp_path / "out" / "digits").mkdir(parents=True)
    speedrun.main(speedrun.parse_args([str(tmp_path / "out")]))
    page = (tmp_path / "page.md").read_text()
    assert page.count("80.50 ± 0.71 (2)") == 1
    assert page.endswith(marked[1])
    with pytest.raises(UserError, match="no runs of digits or other there"):
        speedrun.main(speedrun.parse_args([str(tmp_path)]))
