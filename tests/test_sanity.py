"""Each sanity check passes on a sound model and fails on one made to deserve it. Alone: python -m pytest tests/test_sanity.py"""

import pytest
import torch
from torch import nn

from common import sanity

ALL = ("linf", 0.1, 0)


class Linear(nn.Module):
    """A linear map of 4 x 4 images: everything about it is known."""

    def __init__(self, n_classes=10):
        super().__init__()
        self.layer = nn.Linear(16, n_classes)
        nn.init.zeros_(self.layer.bias)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(n_classes, 16, generator=torch.Generator().manual_seed(0)))
        self.requires_grad_(False)

    def forward(self, x):
        return self.layer(x.flatten(1))


def images(model, n=40):
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1)


def outcome(check, model, x, y, norm="linf", eps=0.02):
    return {line["check"]: line["ok"] for line in check(model, x, y, norm, eps, 0)}


@pytest.mark.parametrize("norm,eps", [("linf", 0.02), ("l2", 0.1), ("l1", 0.3)])
def test_a_sound_model_passes_all(norm, eps):
    model = Linear().eval()
    x, y = images(model)
    for check in sanity.CHECKS.values():
        lines = outcome(check, model, x, y, norm, eps)
        assert all(lines.values()), lines


def test_probabilities(capsys):
    model = Linear().eval()
    x, y = images(model)
    lines = outcome(sanity.outputs, nn.Sequential(model, nn.Softmax(1)), x, y)
    assert not lines.pop("outputs are logits, not probabilities") and all(lines.values())
    assert outcome(sanity.outputs, nn.Sequential(model, nn.LogSoftmax(1)), x, y)["outputs are logits, not probabilities"]


def test_inputs_outside_the_unit_cube():
    model = Linear().eval()
    x, y = images(model)
    assert not outcome(sanity.outputs, model, 2 * x - 1, y)["inputs lie in [0, 1]"]


def test_a_randomised_model():
    model = Linear().eval()
    x, y = images(model)
    torch.manual_seed(0)
    assert not outcome(sanity.outputs, lambda x: model(x) + 0.1 * torch.randn(len(x), 10), x, y)[sanity.DETERMINISTIC]


def test_a_model_left_in_train_mode():
    """Batch statistics: an image's logits depend on its neighbours."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, 10)).eval()
    model[1].train()
    x, y = images(Linear())

    def call(x):
        return model(torch.cat([x, x]))[: len(x)] if len(x) == 1 else model(x)

    lines = outcome(sanity.outputs, call, x, y)
    assert lines[sanity.DETERMINISTIC] and not lines["logits do not depend on the batch"]


def test_no_gradient():
    """Rounded logits: no gradient anywhere, APGD cannot move, and the radius that makes everything grey fools nobody."""
    model = Linear().eval()
    x, y = images(model)

    def masked(x):
        return (4 * model(x)).round() + 0 * x.sum()

    y = masked(x).argmax(1)
    assert sanity.zero_gradients(lambda x: model(x) * torch.nan, x, y) == len(x)
    assert sanity.zero_gradients(masked, x, y) == len(x) and sanity.zero_gradients(model, x, y) == 0
    assert not outcome(sanity.eps_curve, masked, x, y)["robust accuracy falls to 0 as eps grows"]
    assert not outcome(sanity.loss_surface, masked, x, y)["the gradient's direction beats a random one"]


def test_a_gradient_that_points_nowhere():
    """Gradients of another network: a step along them is as good as a random one."""
    model, other = Linear().eval(), Linear().eval()
    with torch.no_grad():
        other.layer.weight.copy_(torch.randn(10, 16, generator=torch.Generator().manual_seed(5)))
    x, y = images(model)

    def deceiving(x):
        return model(x).detach() + other(x) - other(x).detach()

    assert not outcome(sanity.loss_surface, deceiving, x, y)["the gradient's direction beats a random one"]


def test_more_steps_and_transfer_tell_image_by_image():
    """What evaluate.py holds against its verdicts: the images fooled by a long APGD-CE, and by another model's images."""
    model, other = Linear().eval(), Linear().eval()
    x, y = images(model)
    few = ~sanity._robust(model, x, y, "linf", 0.05, 0, 1)
    many = sanity.fooled_by_more_steps(model, x, y, "linf", 0.05, 0)
    assert 0 < few.sum() <= many.sum() < len(x) and sanity.LONG_STEPS == 3 * 100
    assert sanity.fooled_by_more_steps(model, x, 9 - y, "linf", 0.05, 0)[y != 9 - y].all()
    own = sanity.fooled_by_transfer(model, model, x, y, "linf", 0.05, 0)
    with torch.no_grad():
        other.layer.weight.copy_(torch.randn(10, 16, generator=torch.Generator().manual_seed(5)))
    assert sanity.fooled_by_transfer(model, other, x, y, "linf", 0.05, 0).sum() < own.sum()


def test_robust_agrees_with_the_closed_form():
    """Two classes, a linear model: it withstands linf eps where the margin exceeds eps |w_0 - w_1|_1 (away from the cube's walls)."""
    model = Linear(2).eval()
    x = 0.5 + 0.2 * (torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(2)) - 0.5)
    logits, weight = model(x), model.layer.weight
    y, withstood = logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).abs().sum()
    eps = withstood.sort().values[29:31].mean().item()
    exact = withstood > eps
    assert exact.sum() == 30 and eps < 0.3
    assert torch.equal(sanity._robust(model, x, y, "linf", eps, 0, 20), exact)
    assert not sanity._robust(model, x, 1 - y, "linf", eps, 0, 20).any()


def test_transferred_images_fool_their_source():
    model = Linear().eval()
    x, y = images(model)
    x_adv = sanity.transferred(model, x, y, "linf", 0.2, 0)
    assert (model(x_adv).argmax(1) != y).float().mean() > 0.9
    assert (x_adv - x).abs().max() <= 0.2 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
