"""AutoAttack with less work: pyautoattack's points, or its verdicts. Alone: python -m pytest tests/test_autoattack.py"""

import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, python
from pyautoattack import AutoAttack
from torch import nn

import train_at
from common import autoattack, data, models


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    path = tmp_path_factory.mktemp("attacked") / "run"
    argv = ["--epochs", "12", "--eval-every", "12", "--eval-n-steps", "1", "--n-steps", "2", "--out-dir", str(path)]
    train_at.main(train_at.parse_args(argv))
    return str(path / "best.pt")


class Counted(nn.Module):
    """Counts the images that are passed forward, with and without a gradient, and the batches."""

    def __init__(self, model):
        super().__init__()
        self.model, self.images, self.sizes = model, {True: 0, False: 0}, []

    def forward(self, x):
        self.images[x.requires_grad] += len(x)
        self.sizes.append(len(x))
        return self.model(x)


def correct_images(best, n):
    model, _ = models.load_classifier(best, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    x, y = data.to_x(images[:n]), torch.from_numpy(labels[:n])
    keep = model(x).argmax(1) == y
    return model, x[keep], y[keep]


def theirs(model, name, x, y, norm, eps, version="standard", change=None):
    adversary = AutoAttack(model, norm=autoattack.NORMS[norm], eps=eps, seed=0, version=version, device="cpu")
    adversary.attacks_to_run = [name]
    if change:
        change(adversary)
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]


@pytest.mark.parametrize("norm,eps", [("linf", 0.15), ("linf", 0.4), ("l2", 1.0), ("l1", 4.0)])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_apgd_leaves_fooled_images_and_changes_no_verdict(norm, eps, name, best):
    """Every image that theirs does not fool has their very point; the others are fooled by ours, too, with fewer passes."""
    model, x, y = correct_images(best, 60)
    counted, plain = Counted(model), Counted(model)
    ours = autoattack.attack(name, counted, x, y, norm=norm, eps=eps, seed=0)
    reference = theirs(plain, name, x, y, norm, eps)
    fooled = model(reference).argmax(1) != y
    assert torch.equal(model(ours).argmax(1) != y, fooled) and 3 <= fooled.sum()
    # The driver keeps the clean image of those that it did not fool.
    assert torch.equal(ours[~fooled], reference[~fooled])
    assert counted.images[True] < plain.images[True]
    if norm != "l1":
        assert (ours - x).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1).max() <= eps + 1e-5


def test_apgd_of_ours_has_their_points_to_the_last_step(best):
    """Not only verdicts: with a loss read off the best point, images that stay in are bit-equal to a run where all stay."""
    model, x, y = correct_images(best, 60)
    runs = []
    for patch in (autoattack.leave_when_fooled, lambda apgd: None):
        adversary = AutoAttack(model, norm="Linf", eps=0.15, seed=0, version="standard", device="cpu")
        adversary.apgd.loss, adversary.apgd.seed = "ce", 0
        patch(adversary.apgd)
        torch.manual_seed(0)
        adversary.apgd.init_hyperparam(x)
        runs.append(adversary.apgd.attack_single_run(x, y))
    (_, correct, loss, _), (_, correct_all, loss_all, _) = runs
    assert torch.equal(correct, correct_all) and 0 < correct.sum() < len(x)
    assert torch.equal(loss[correct], loss_all[correct_all])


@pytest.mark.parametrize("norm,eps", [("linf", 0.15), ("l2", 0.7)])
def test_square_skips_proposals_that_change_nothing(norm, eps, best):
    """The very points of theirs, after 400 queries, with fewer images passed in linf."""
    model, x, y = correct_images(best, 40)
    points, passed = [], []
    for skip in (True, False):
        counted = Counted(model)
        adversary = AutoAttack(counted, norm=autoattack.NORMS[norm], eps=eps, seed=0, version="standard", device="cpu")
        adversary.square.n_queries, adversary.square.seed = 400, 0
        if skip:
            autoattack.skip_unchanged(adversary.square)
        points.append(adversary.square.perturb(x, y))
        passed.append(counted.images[False])
    assert torch.equal(points[0], points[1])
    fooled = (model(points[0]).argmax(1) != y).sum()
    assert 0 < fooled < len(x)
    assert passed[0] < 0.9 * passed[1] if norm == "linf" else passed[0] <= passed[1]


def test_fab_computes_no_weight_gradients(best):
    model, x, y = correct_images(best, 20)
    fab = AutoAttack(model, norm="Linf", eps=0.15, seed=0, version="standard", device="cpu").fab
    fab.targeted, fab.n_iter, fab.n_target_classes, fab.seed = True, 3, 1, 0
    frozen = fab.perturb(x, y)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    assert torch.equal(fab.perturb(x, y), frozen)
    assert all(p.grad is not None for p in model.parameters())


def test_rand_is_theirs(best):
    """20 passes a step; nothing is left out, so that a randomised model draws what it would draw there."""
    model, x, y = correct_images(best, 12)
    counted, plain = Counted(model), Counted(model)
    ours = autoattack.attack("apgd-dlr", counted, x, y, norm="linf", eps=0.15, seed=0, version="rand")
    reference = theirs(plain, "apgd-dlr", x, y, "linf", 0.15, version="rand")
    fooled = model(reference).argmax(1) != y
    assert torch.equal(ours[fooled], reference[fooled]) and torch.equal(model(ours).argmax(1) != y, fooled)
    assert counted.images[True] == plain.images[True] == 20 * 101 * len(x)


def test_batches_are_never_small(best):
    """Below MIN_ROWS images kernels round differently: some that left come along."""
    for wanted in (0, 1, 5, 16, 20):
        mask = torch.zeros(40, dtype=torch.bool)
        mask[torch.randperm(40, generator=torch.Generator().manual_seed(wanted))[:wanted]] = True
        rows = autoattack.padded(mask)
        assert len(rows) == max(wanted, autoattack.MIN_ROWS) and mask[rows].sum() == wanted
        assert (rows[1:] > rows[:-1]).all()
    assert autoattack.padded(torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 2]
    model, x, y = correct_images(best, 60)
    counted = Counted(model)
    autoattack.attack("apgd-ce", counted, x, y, norm="linf", eps=0.3, seed=0)
    assert min(counted.sizes) >= autoattack.MIN_ROWS


def test_batch_size_does_not_change_gradients(best):
    """What MIN_ROWS stands on: the gradients of 16 images alone are those of the same images among 60, bit for bit."""
    model, x, y = correct_images(best, 60)

    def gradient(x, y):
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]

    assert torch.equal(gradient(x, y)[:16], gradient(x[:16], y[:16]))


def test_all_fooled_at_once(best):
    """Everybody leaves, the run ends as theirs does."""
    model, x, y = correct_images(best, 20)
    ours = autoattack.attack("apgd-ce", model, x, y, norm="linf", eps=1.0, seed=0)
    assert (model(ours).argmax(1) != y).all()


def test_killed_in_each_attack_and_resumed(best, tmp_path):
    """SIGKILL in the middle of each of the four attacks, on one and on two processes: the bytes of an uninterrupted run."""
    argv = ["--checkpoint", best, "--attack", "autoattack", "--n-images", "4", "--batch-size", "2", "--sanity-images", "0"]
    python("evaluate.py", *argv, "--out", tmp_path / "straight.json")
    out = tmp_path / "cut.json"
    for i, name in enumerate(autoattack_names()):
        ranks = 1 + i % 2
        env = {"KILL_IN": name, "KILL_AFTER": "50"}
        done = python("tests/kill_helper.py", *argv, "--out", out, ranks=ranks, env=env, expect=-signal.SIGKILL if ranks == 1 else 1)
        assert f"killed in {name}" in done.stdout
        parts = [json.loads(p.read_text()) for p in sorted((tmp_path / "cut.parts").glob("chunk-*.json"))]
        assert max((len(part["seconds"]) for part in parts), default=0) >= i  # what was finished is there
        assert not out.exists() and not os.path.exists(tmp_path / "cut.npz")
    python("evaluate.py", *argv, "--out", out, ranks=2)
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "straight.npz").read_bytes()
    assert not (tmp_path / "cut.parts").exists()
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cut", "straight")]
    differ = {key for key in results[0] if results[0][key] != results[1][key]}
    assert differ <= {"seconds", "seconds_by_attack", "environment"}
    assert 0 < results[0]["robust_correct"] and np.load(tmp_path / "cut.npz")["fooled_by"].max() == 4


def autoattack_names():
    import evaluate

    return evaluate.ATTACKS["autoattack"][1]
