"""AutoAttack with less work gives pyautoattack's own points, or its verdicts.

Alone: python -m pytest tests/evaluation/test_autoattack.py
"""

import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import python
from evaluation_helper import first_images, shorten, train_short
from pyautoattack import AutoAttack
from torch import nn

from evaluation import autoattack, requests


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("attacked") / "run")


class Counted(nn.Module):
    """Counts the images that are passed, with and without a gradient, and the batches."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.n_with_gradient = 0
        self.n_without_gradient = 0
        self.sizes = []

    def forward(self, x):
        if x.requires_grad:
            self.n_with_gradient += len(x)
        else:
            self.n_without_gradient += len(x)
        self.sizes.append(len(x))
        return self.model(x)


def correct_images(best, n):
    """(model, x, y) of those of the first n test images that the model classifies correctly."""
    model, x, y = first_images(best, n)
    correct = model(x).argmax(1) == y
    return model, x[correct], y[correct]


def package(model, norm, eps, version="standard"):
    norm = autoattack.NORMS[norm]
    return AutoAttack(model, norm=norm, eps=eps, seed=0, version=version, device="cpu")


def run_package(model, name, x, y, norm, eps, version="standard"):
    """Adversarial images of the package's own driver, the clean ones where it fooled nobody."""
    adversary = package(model, norm, eps, version)
    adversary.attacks_to_run = [name]
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]


@pytest.mark.parametrize("norm,eps", [("linf", 0.15), ("linf", 0.4), ("l2", 1.0), ("l1", 4.0)])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_apgd_leaves_fooled_images_and_changes_no_verdict(norm, eps, name, best):
    """Images that the package does not fool have its very point, the others are fooled here too."""
    model, x, y = correct_images(best, 60)
    counted = Counted(model)
    plain = Counted(model)
    ours = autoattack.attack(name, counted, x, y, norm=norm, eps=eps, seed=0)
    theirs = run_package(plain, name, x, y, norm, eps)
    fooled = model(theirs).argmax(1) != y
    assert fooled.sum() >= 3
    assert torch.equal(model(ours).argmax(1) != y, fooled)
    assert torch.equal(ours[~fooled], theirs[~fooled])
    assert counted.n_with_gradient < plain.n_with_gradient
    if norm != "l1":
        order = torch.inf if norm == "linf" else 2
        assert (ours - x).flatten(1).norm(p=order, dim=1).max() <= eps + 1e-5


def test_apgd_of_ours_has_their_points_to_the_last_step(best):
    """Not only verdicts: images that are never fooled have the losses of a run where all stay."""
    model, x, y = correct_images(best, 60)
    runs = []
    for leaves in (True, False):
        apgd = package(model, "linf", 0.15).apgd
        apgd.loss = "ce"
        apgd.seed = 0
        if leaves:
            autoattack.leave_when_fooled(apgd)
        torch.manual_seed(0)
        apgd.init_hyperparam(x)
        _, correct, loss, _ = apgd.attack_single_run(x, y)
        runs.append((correct, loss))
    (correct, loss), (correct_of_all, loss_of_all) = runs
    assert torch.equal(correct, correct_of_all)
    assert 0 < correct.sum() < len(x)
    assert torch.equal(loss[correct], loss_of_all[correct])


@pytest.mark.parametrize("norm,eps,share", [("linf", 0.15, 0.9), ("l2", 0.7, 1)])
def test_square_skips_proposals_that_change_nothing(norm, eps, share, best):
    """The package's very points after 400 queries, with fewer images passed in linf."""
    model, x, y = correct_images(best, 40)
    points = []
    n_passed = []
    for skips in (True, False):
        counted = Counted(model)
        square = package(counted, norm, eps).square
        square.n_queries = 400
        square.seed = 0
        if skips:
            autoattack.skip_unchanged(square)
        points.append(square.perturb(x, y))
        n_passed.append(counted.n_without_gradient)
    assert torch.equal(points[0], points[1])
    assert 0 < (model(points[0]).argmax(1) != y).sum() < len(x)
    assert n_passed[0] <= share * n_passed[1]


def test_fab_computes_no_weight_gradients(best):
    model, x, y = correct_images(best, 20)
    fab = package(model, "linf", 0.15).fab
    fab.targeted = True
    fab.n_iter = 3
    fab.n_target_classes = 1
    fab.seed = 0
    frozen = fab.perturb(x, y)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    assert torch.equal(fab.perturb(x, y), frozen)
    assert all(p.grad is not None for p in model.parameters())


def test_rand_is_theirs(best, monkeypatch):
    """20 passes a step. Nothing is left out, so a randomised model draws what it would there."""
    shorten(20, monkeypatch.setattr)
    model, x, y = correct_images(best, 12)
    counted = Counted(model)
    plain = Counted(model)
    threat = dict(norm="linf", eps=0.15)
    ours = autoattack.attack("apgd-dlr", counted, x, y, **threat, seed=0, version="rand")
    theirs = run_package(plain, "apgd-dlr", x, y, **threat, version="rand")
    fooled = model(theirs).argmax(1) != y
    assert torch.equal(ours[fooled], theirs[fooled])
    assert torch.equal(model(ours).argmax(1) != y, fooled)
    assert counted.n_with_gradient == plain.n_with_gradient == 20 * 21 * len(x)


@pytest.mark.parametrize("norm,expected", [("linf", 9), ("l1", 5)])
def test_the_number_of_targets_is_the_packages(norm, expected, best, monkeypatch):
    targets = []
    monkeypatch.setattr(
        autoattack, "leave_when_fooled", lambda apgd: targets.append(apgd.n_target_classes)
    )
    shorten(1, monkeypatch.setattr)
    model, x, y = correct_images(best, 2)
    for n_classes in (10, 4):
        threat = dict(norm=norm, eps=0.01, seed=0, n_classes=n_classes)
        autoattack.attack("apgd-t", model, x, y, **threat)
    assert targets == [expected, 3]


def test_batches_are_never_small(best):
    """Below MIN_ROWS images kernels round differently: some that left come along."""
    for n_wanted in (0, 1, 5, 16, 20):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(n_wanted))
        wanted = torch.zeros(40, dtype=torch.bool)
        wanted[order[:n_wanted]] = True
        rows = autoattack.padded(wanted)
        assert len(rows) == max(n_wanted, autoattack.MIN_ROWS)
        assert wanted[rows].sum() == n_wanted
        assert (rows[1:] > rows[:-1]).all()
    assert autoattack.padded(torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 2]
    model, x, y = correct_images(best, 60)
    counted = Counted(model)
    autoattack.attack("apgd-ce", counted, x, y, norm="linf", eps=0.3, seed=0)
    assert min(counted.sizes) >= autoattack.MIN_ROWS


def test_batch_size_does_not_change_gradients(best):
    """What MIN_ROWS rests on: gradients of 16 images are, bit for bit, those among 60 images."""
    model, x, y = correct_images(best, 60)

    def gradient(x, y):
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]

    assert torch.equal(gradient(x, y)[:16], gradient(x[:16], y[:16]))


def test_all_fooled_at_once(best):
    """All images leave, and the run ends as the package's does."""
    model, x, y = correct_images(best, 20)
    ours = autoattack.attack("apgd-ce", model, x, y, norm="linf", eps=1.0, seed=0)
    assert (model(ours).argmax(1) != y).all()


def test_killed_in_each_attack_and_resumed(best, tmp_path):
    """SIGKILL in the middle of each attack, on one and two processes: the bytes of a whole run."""
    flags = "--attack autoattack --n-images 4 --batch-size 2 --sanity-images 0"
    argv = ["--checkpoint", best, *flags.split()]
    script = "tests/kill_helper.py"
    python(script, *argv, "--out", tmp_path / "straight.json")
    argv += ["--out", tmp_path / "cut.json"]
    for i, name in enumerate(requests.ATTACKS["autoattack"][1]):
        ranks = 1 + i % 2
        done = python(
            script,
            *argv,
            ranks=ranks,
            env={"KILL_IN": name, "KILL_AFTER": "50"},
            expect=-signal.SIGKILL if ranks == 1 else 1,
        )
        assert f"killed in {name}" in done.stdout
        chunks = sorted((tmp_path / "cut.parts").glob("chunk-*.json"))
        n_done = [len(json.loads(chunk.read_text())["seconds"]) for chunk in chunks]
        assert max(n_done) >= i  # the attacks that had ended are kept
        assert not (tmp_path / "cut.json").exists()
        assert not (tmp_path / "cut.npz").exists()
    python(script, *argv, ranks=2)
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "straight.npz").read_bytes()
    assert not (tmp_path / "cut.parts").exists()
    cut = json.loads((tmp_path / "cut.json").read_text())
    straight = json.loads((tmp_path / "straight.json").read_text())
    differing = {key for key in cut if cut[key] != straight[key]}
    assert differing <= {"seconds", "seconds_by_attack", "environment"}
    assert cut["robust_correct"] > 0
    assert np.load(tmp_path / "cut.npz")["fooled_by"].max() == 4


@pytest.mark.parametrize("n_classes", [2, 3, 4, 7])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "apgd-dlr", "fab-t"])
def test_few_classes_against_the_closed_form(name, n_classes):
    """A linear model is robust at x if its margin to each class exceeds eps times the dual norm."""
    torch.manual_seed(n_classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, n_classes)).requires_grad_(False)
    weight = model[1].weight
    bias = model[1].bias.copy_(-0.5 * weight.sum(1))  # all classes meet at the grey image
    x = 0.5 + 0.6 * (torch.rand(60, 3, 2, 2) - 0.5)
    y = model(x).argmax(1)
    eps = 0.03
    worst = torch.full((60,), float("inf"))
    for j in range(n_classes):
        difference = weight[y] - weight[j]
        margin = (difference * x.flatten(1)).sum(1) + bias[y] - bias[j]
        margin = margin - eps * difference.abs().sum(1)
        worst = torch.where(y == j, worst, torch.minimum(worst, margin))
    robust = worst > 0
    assert 0 < robust.sum() < 60

    version = "rand" if name == "apgd-dlr" else "standard"
    settings = dict(norm="linf", eps=eps, seed=0, n_classes=n_classes, version=version)
    x_adv = autoattack.attack(name, model, x, y, **settings)
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-6).all()
    found = model(x_adv).argmax(1) == y
    assert not (robust & ~found).any()  # nothing is fooled that cannot be
    if name == "apgd-t" or (n_classes == 2 and name != "fab-t"):
        assert torch.equal(found, robust)
    else:  # untargeted, not always towards the nearest class; or FAB, which stops close to it
        assert (found == robust).float().mean() > 0.8
