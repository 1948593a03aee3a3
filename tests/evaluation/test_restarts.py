"""PGD with restarts against its definition, and the check of what an attack returns.

Alone: python -m pytest tests/evaluation/test_restarts.py
"""

import pytest
import torch
from torch import nn

from common import attacks
from evaluation import restarts

EPS = 0.05


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 3),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
    ]
    return nn.Sequential(*layers).double().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.rand(64, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def random_starts(x, n):
    generator = torch.Generator().manual_seed(2)
    return [attacks.random_start(x.shape, "linf", EPS, generator).double() for _ in range(n)]


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_best_restart_is_chosen_per_image(model, x, loss):
    """One that fools, before one of higher loss; of equal ones, the first."""
    y = model(x).argmax(1)
    settings = dict(norm="linf", eps=EPS, step_size=0.01, n_steps=1, loss=loss)
    starts = random_starts(x, 4)
    singles = [attacks.pgd(model, x, y, start, **settings) for start in starts]
    fools = torch.stack([model(x_adv).argmax(1) != y for x_adv in singles])
    losses = torch.stack([attacks.attack_losses(model(x_adv), y, loss) for x_adv in singles])
    together = restarts.pgd(model, x, y, starts, **settings)
    for i in range(len(x)):
        best = max(range(4), key=lambda k: (fools[k, i], losses[k, i]))
        assert torch.equal(together[i], singles[best][i])
    assert fools.any(0).sum() > fools.sum(1).max()  # the restarts do differ here
    assert not fools.any(0).all()


def test_one_restart_is_the_last_iterate_at_no_further_cost(model, x):
    y = model(x).argmax(1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    settings = dict(norm="linf", eps=EPS, step_size=0.01, n_steps=3, loss="margin")
    (start,) = random_starts(x, 1)
    x_adv = restarts.pgd(model, x, y, [start], **settings)
    assert len(calls) == 3
    assert torch.equal(x_adv, attacks.pgd(model, x, y, start, **settings))


def test_mean_logits(x):
    """The mean of n passes, whose gradient is the mean of their gradients."""
    factors = iter([1.0, 2.0, 6.0])

    class Noisy(nn.Module):
        def forward(self, x):
            return next(factors) * x.flatten(1)

    x = x.requires_grad_(True)
    logits = restarts.MeanLogits(Noisy(), 3)(x)
    assert torch.equal(logits, 3 * x.flatten(1))
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3))


@pytest.mark.parametrize("norm,order", [("linf", torch.inf), ("l2", 2)])
def test_points_in_the_ball_pass_and_others_are_an_error(norm, order, x):
    delta = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - x  # stays in the cube
    length = delta.flatten(1).norm(p=order, dim=1).view(-1, 1, 1, 1)
    on_the_ball = x + delta * (EPS / length)
    assert torch.equal(restarts.in_threat_model(on_the_ball, x, "pgd", norm, EPS), on_the_ball)
    outside = on_the_ball.clone()
    outside[5] = x[5] + delta[5] * (1.1 * EPS / length[5])
    with pytest.raises(RuntimeError, match=f"pgd left the threat model: {norm} 0.055"):
        restarts.in_threat_model(outside, x, "pgd", norm, EPS)
    with pytest.raises(RuntimeError, match="pixels"):
        restarts.in_threat_model(x + 1, x, "pgd", norm, 1000.0)
    with pytest.raises(RuntimeError, match="nan"):
        restarts.in_threat_model(x * torch.nan, x, "pgd", norm, EPS)


def test_l1_points_outside_the_ball_are_pulled_back_and_judged_there():
    """The package's projection overshoots on large images. Points inside stay, bit for bit."""
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    direction = other - x  # [0, 1] is convex: no step along it leaves the cube
    lengths = torch.tensor([11.0, 12.0, 13.0]).view(-1, 1, 1, 1)
    x_adv = x + direction * lengths / direction.flatten(1).norm(p=1, dim=1).view(-1, 1, 1, 1)
    inside = restarts.in_threat_model(x_adv, x, "apgd-ce", "l1", 12.0)
    sizes = (inside - x).flatten(1).norm(p=1, dim=1)
    assert sizes.tolist() == pytest.approx([11, 12, 12], rel=1e-5)
    assert torch.equal(inside[:2], x_adv[:2])
    assert not torch.equal(inside[2], x_adv[2])
    with pytest.raises(RuntimeError, match="pixels"):
        restarts.in_threat_model(x + 1, x, "apgd-ce", "l1", 1000.0)


def test_a_gradient_that_is_cut_off_is_zero():
    """As by pixels that are made whole numbers; elsewhere logits and gradient are the model's."""
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    logits = restarts.Finite(lambda x: (4 * x).int().float().flatten(1), "m", "fp32")(x)
    assert torch.equal(logits, (4 * x).int().float().flatten(1))
    assert (torch.autograd.grad(logits.sum(), x)[0] == 0).all()
    logits = restarts.Finite(lambda x: 4 * x.flatten(1), "m", "fp32")(x)
    assert (torch.autograd.grad(logits.sum(), x)[0] == 4).all()
