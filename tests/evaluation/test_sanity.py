"""Each sanity check passes on a sound model and fails on one made to deserve it.

Alone: python -m pytest tests/evaluation/test_sanity.py
"""

import pytest
import torch
from torch import nn

from evaluation import sanity

LOGITS = "outputs are logits, not probabilities"
BATCH = "logits do not depend on the batch"
CURVE = "robust accuracy falls to 0 as eps grows"
DIRECTION = "the gradient's direction beats a random one"


class Linear(nn.Module):
    """A linear map of 4 x 4 images: everything about it is known."""

    def __init__(self, n_classes=10, seed=0):
        super().__init__()
        self.layer = nn.Linear(16, n_classes)
        nn.init.zeros_(self.layer.bias)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(n_classes, 16, generator=generator))
        self.eval().requires_grad_(False)

    def forward(self, x):
        return self.layer(x.flatten(1))


def images(model, n=40):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1)


def passed(check, model, x, y, norm="linf", eps=0.02):
    """{what was asked: whether it passed}"""
    return {line["check"]: line["ok"] for line in check(model, x, y, norm, eps, 0)}


@pytest.mark.parametrize("norm,eps", [("linf", 0.02), ("l2", 0.1), ("l1", 0.3)])
def test_a_sound_model_passes_all(norm, eps):
    model = Linear()
    x, y = images(model)
    for check in sanity.CHECKS.values():
        lines = passed(check, model, x, y, norm, eps)
        assert all(lines.values()), lines


def test_probabilities():
    model = Linear()
    x, y = images(model)
    lines = passed(sanity.outputs, nn.Sequential(model, nn.Softmax(1)), x, y)
    assert not lines.pop(LOGITS)
    assert all(lines.values())
    assert passed(sanity.outputs, nn.Sequential(model, nn.LogSoftmax(1)), x, y)[LOGITS]


def test_a_randomised_model():
    model = Linear()
    x, y = images(model)
    torch.manual_seed(0)

    def noisy(x):
        return model(x) + 0.1 * torch.randn(len(x), 10)

    assert not passed(sanity.outputs, noisy, x, y)[sanity.DETERMINISTIC]


def test_a_model_left_in_train_mode():
    """Batch statistics: an image's logits depend on its neighbours."""
    norm = nn.BatchNorm1d(16, track_running_stats=False).train()
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(16, 10))
    x, y = images(Linear())

    def call(x):
        return model(torch.cat([x, x]))[: len(x)] if len(x) == 1 else model(x)

    lines = passed(sanity.outputs, call, x, y)
    assert lines[sanity.DETERMINISTIC]
    assert not lines[BATCH]


def test_no_gradient():
    """Rounded logits: APGD cannot move, and a radius that makes everything grey fools nobody."""
    model = Linear()
    x, _ = images(model)

    def masked(x):
        return (4 * model(x)).round() + 0 * x.sum()

    y = masked(x).argmax(1)
    assert sanity.zero_gradients(masked, x, y) == len(x)
    assert sanity.zero_gradients(model, x, y) == 0
    assert sanity.zero_gradients(lambda x: model(x) * torch.nan, x, y) == len(x)
    assert not passed(sanity.eps_curve, masked, x, y)[CURVE]
    assert not passed(sanity.loss_surface, masked, x, y)[DIRECTION]


def test_robust_accuracy_that_rises_with_the_radius(monkeypatch):
    shares = iter([0.5, 0.8, 0.2, 0.1, 0.0])

    def withstands(model, x, *others):
        return torch.arange(len(x)) < len(x) * next(shares)

    monkeypatch.setattr(sanity, "withstands_apgd", withstands)
    x, y = images(Linear())
    assert not passed(sanity.eps_curve, Linear(), x, y)[CURVE]


@pytest.mark.parametrize("norm,p", [("linf", torch.inf), ("l2", 2), ("l1", 1)])
def test_the_steps_of_the_loss_surface_have_a_tenth_of_the_radius(norm, p):
    model = Linear()
    x = torch.full((6, 1, 4, 4), 0.5)
    seen = []

    def watched(images):
        seen.append(images.detach())
        return model(images)

    sanity.loss_surface(watched, x, model(x).argmax(1), norm, 0.1, 0)
    for moved in seen[1:]:  # the first pass is that of the gradient
        lengths = (moved - x).flatten(1).norm(p=p, dim=1)
        torch.testing.assert_close(lengths, torch.full((6,), 0.01))


def test_a_gradient_that_points_nowhere():
    """Gradients of another network: a step along them is as good as a random one."""
    model = Linear()
    other = Linear(seed=5)
    x, y = images(model)

    def deceiving(x):
        return model(x).detach() + other(x) - other(x).detach()

    assert not passed(sanity.loss_surface, deceiving, x, y)[DIRECTION]


def test_a_gradient_that_vanishes():
    """Logits so large that their cross-entropy is 0 in float32: APGD-CE follows nothing."""
    model = Linear()
    x, y = images(model)
    large = nn.Sequential(model, Scale(1e4))
    small, unit = sanity.gradients(model, x, y, "linf", 0.05, 0)
    assert small["ok"] and unit["ok"]
    assert "mean margin of the logits" in small["found"]
    small, unit, _ = sanity.gradients(large, x, y, "linf", 0.05, 0)
    assert not small["ok"] and not unit["ok"]
    assert sanity.gradients(model, x, (y + 1) % 10, "linf", 0.05, 0) == []  # all are wrong


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


class Rounded(Linear):
    def forward(self, x):
        return super().forward(torch.round(8 * x) / 8)


def test_a_layer_without_a_gradient():
    """Going straight through it leaves half of the margin that its own gradient leaves."""
    model = Rounded()
    x, y = images(model)
    lines = passed(sanity.gradients, model, x, y, "linf", 0.1)
    assert not lines["straight: APGD-CE leaves no smaller margin"]
    assert not any("leaky" in name for name in lines)


def test_square_needs_no_gradient():
    """It fools as many images where the gradient is cut off, and none that withstand."""
    model = Linear()
    x, y = images(model, 20)
    threat = ("linf", 0.05, 0)
    withstands = sanity.withstands_apgd(model, x, y, *threat, n_steps=100)

    def masked(x):
        return model(x.detach()) + 0 * x.sum()

    assert sanity.withstands_apgd(masked, x, y, *threat, n_steps=20).sum() > withstands.sum()
    fooled = sanity.fooled_by_square(masked, None, x, y, *threat)
    assert torch.equal(fooled, sanity.fooled_by_square(model, None, x, y, *threat))
    assert (~withstands).sum() >= fooled.sum() >= 0.5 * (~withstands).sum() > 3
    assert not (fooled & withstands).any()
    wrong = 9 - y
    assert sanity.fooled_by_square(model, None, x, wrong, *threat)[y != wrong].all()


def test_more_steps_and_transfer_tell_image_by_image():
    """The images fooled by a long APGD-CE, and by another model's adversarial images."""
    model = Linear()
    x, y = images(model)
    threat = ("linf", 0.05, 0)
    few = ~sanity.withstands_apgd(model, x, y, *threat, n_steps=1)
    many = sanity.fooled_by_more_steps(model, None, x, y, *threat)
    assert 0 < few.sum() <= many.sum() < len(x)
    wrong = 9 - y
    assert sanity.fooled_by_more_steps(model, None, x, wrong, *threat)[y != wrong].all()
    own = sanity.fooled_by_transfer(model, model, x, y, *threat)
    others = sanity.fooled_by_transfer(model, Linear(seed=5), x, y, *threat)
    assert others.sum() < own.sum()


def test_the_long_attack_is_long(monkeypatch):
    seen = []

    def noted(model, x, y, **settings):
        seen.append(settings["n_steps"])
        return x

    monkeypatch.setattr(sanity.autoattack, "apgd_ce", noted)
    model = Linear()
    x, y = images(model)
    sanity.fooled_by_more_steps(model, None, x, y, "linf", 0.05, 0)
    assert seen == [300]


def test_apgd_agrees_with_the_closed_form():
    """Of two classes, a linear model withstands linf eps where its margin exceeds eps |w0 - w1|_1.

    That is so away from the walls of the cube.
    """
    model = Linear(n_classes=2)
    x = 0.5 + 0.2 * (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(2)) - 0.5)
    logits = model(x)
    y = logits.argmax(1)
    weight = model.layer.weight
    largest_eps = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    eps = largest_eps.sort().values[29:31].mean().item()
    exact = largest_eps > eps
    assert exact.sum() == 30
    assert eps < 0.3
    assert torch.equal(sanity.withstands_apgd(model, x, y, "linf", eps, 0, 20), exact)
    assert not sanity.withstands_apgd(model, x, 1 - y, "linf", eps, 0, 20).any()


def test_transferred_images_fool_their_source():
    model = Linear()
    x, y = images(model)
    x_adv = sanity.transferred(model, x, y, "linf", 0.2)
    assert (model(x_adv).argmax(1) != y).float().mean() > 0.9
    assert (x_adv - x).abs().max() <= 0.2 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
