"""Other backward passes: the forward pass stays the model's, the derivatives are those promised.

Alone: python -m pytest tests/evaluation/test_adaptive.py
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from torch import nn
from unusual_helper import MeanSparse, Quantised

from common import models
from evaluation import adaptive, autoattack


class Net(nn.Module):
    """Two products with `between` in between, a function or a module."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.between = between
        self.second = nn.Linear(5, 3)
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def gradient(model, x):
    x = x.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    return found


def chain(net, slope):
    """Gradient of the first logit where `between` has the given slopes (N, 5)."""
    return (net.second.weight[0] * slope) @ net.first.weight


def inputs():
    torch.manual_seed(1)
    return 3 * torch.randn(20, 6, dtype=torch.float64)


class InPlace(nn.Module):
    """Changes its input, too."""

    def forward(self, h):
        return h.clamp_(-1, 1).sign_()


class Inner(nn.Module):
    """Unknown code around a known layer."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, h):
        return (self.act(h) > 1).to(h)


class ByHand(nn.Module):
    """A straight-through gradient of its own."""

    def forward(self, h):
        return h + (h.round() - h).detach()


def floored(h):
    h = 1 * h
    h.floor_()
    return h


STRAIGHT = {
    "round": torch.round,
    "floor_": lambda h: (1 * h).floor_(),
    "method": lambda h: h.sign(),
    "where": lambda h: torch.where(h.abs() < 1, torch.zeros_like(h), h),
    "masked_fill": lambda h: h.masked_fill(h.abs() < 1, 0.5),
    "hardshrink": nn.Hardshrink(1.0),
    "module": MeanSparse(0.0, 1.0),
    "quantised": Quantised(),
    "in place": InPlace(),
    "no graph at all": Inner(),
    "detach": lambda h: h.detach() + 0 * h.round(),
    "half detached": lambda h: (h - h.detach()) * 0.0 + h.detach(),
    "by hand, in a module": ByHand(),
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "fix": torch.fix,
    "sgn": torch.sgn,
    "softshrink": nn.Softshrink(1.0),
    "cast": lambda h: h.int().to(h),
    "float": lambda h: h.int().float().to(h),
    "double": lambda h: h.int().double(),
    "type": lambda h: h.int().type(torch.float64),
    "cast and divided": lambda h: ((8 * h).int() / 8).to(h),
    "cast, with arithmetic of whole numbers": lambda h: 0.5 * ((8 * h).long() // 4).type_as(h) / 4,
    "pixels": lambda h: (8 * h + 128).to(torch.uint8).to(h) / 8,
    "part of a sum": lambda h: 2 * h - h.int(),
    "negative": lambda h: 2 * h + (1 - h.int()),
    "negative, and a tensor of whole numbers": lambda h: 2 * h - (h.int() - torch.tensor(3)),
    "division that rounds": lambda h: torch.div(h, 0.5, rounding_mode="floor"),
    "//": lambda h: h // 1,
    "heaviside": lambda h: torch.heaviside(h, torch.zeros_like(h)),
    "keyword": lambda h: torch.round(input=h),
    "where by keywords": lambda h: torch.where(condition=h > 0, input=h, other=0 * h.round()),
    "special": torch.special.round,
    "data": lambda h: h.data,
    "less its remainder": lambda h: h - h % 1,
    "less its remainder in whole numbers": lambda h: ((8 * h).int() - (8 * h).int() % 4).to(h) / 8,
    "in place, and what it returns is dropped": floored,
    "arithmetic by keyword": lambda h: torch.mul(input=h.int(), other=torch.ones_like(h)),
    "subtraction by keyword": lambda h: torch.sub(2 * h, other=h.int()),
    "less its fraction": lambda h: h - torch.frac(h),
    "less what fmod leaves": lambda h: h - torch.fmod(h, 0.5),
}


# What is cast and has no derivative, or is changed in place, stays as it is.
UNTOUCHED = {
    "indices": lambda h: torch.arange(100.0)[h.long() + 50].to(h) * h,
    "embedding": lambda h: h * F.embedding(h.long() + 50, torch.ones(100, 1)).squeeze(-1).to(h),
    "truth values": lambda h: h * (h > 0),
    "in place": lambda h: (2 * h).add_(h.int()),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_not_a_cast_of_values_is_left_alone(name):
    net = Net(UNTOUCHED[name])
    x = inputs()
    surrogate = adaptive.Surrogate(net, "straight")
    torch.testing.assert_close(gradient(surrogate, x), gradient(net, x))
    assert torch.equal(surrogate(x.requires_grad_(True)), net(x))
    assert not adaptive.layers_of(net, x)["straight"]


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_has_the_identity_as_derivative(name):
    net = Net(STRAIGHT[name])
    x = inputs()
    surrogate = adaptive.Surrogate(net, "straight", 4.0)
    torch.testing.assert_close(gradient(surrogate, x), chain(net, torch.ones(20, 5)) / 4)
    assert torch.equal(surrogate(x.requires_grad_(True)), net(x) / 4)
    assert adaptive.layers_of(net, x)["straight"]


# The functions, and their derivatives.
LEAKY = {
    "relu": (F.relu, lambda h: (h > 0).double()),
    "in place": (nn.ReLU(inplace=True), lambda h: (h > 0).double()),
    "hardtanh": (nn.Hardtanh(), lambda h: (h.abs() < 1).double()),
    "relu6": (nn.ReLU6(), lambda h: ((h > 0) & (h < 6)).double()),
    "clamp": (lambda h: h.clamp(-1, 2), lambda h: ((h > -1) & (h < 2)).double()),
    "expit": (torch.special.expit, lambda h: h.sigmoid() * (1 - h.sigmoid())),
    "sigmoid": (torch.sigmoid, lambda h: h.sigmoid() * (1 - h.sigmoid())),
    "clamp_min": (lambda h: h.clamp_min(0), lambda h: (h > 0).double()),
    "clamp_max": (lambda h: h.clamp_max(0), lambda h: (h < 0).double()),
    "clip": (lambda h: h.clip(-1, 2), lambda h: ((h > -1) & (h < 2)).double()),
    "threshold": (nn.Threshold(0.5, 0.0), lambda h: (h > 0.5).double()),
    "minimum": (lambda h: torch.minimum(h, torch.zeros_like(h)), lambda h: (h < 0).double()),
    "hardsigmoid": (nn.Hardsigmoid(), lambda h: (h.abs() < 3).double() / 6),
    "hardswish": (
        nn.Hardswish(),
        lambda h: torch.where(h.abs() < 3, h / 3 + 0.5, (h > 0).double()),
    ),
    "maximum": (lambda h: torch.maximum(h, torch.zeros_like(h)), lambda h: (h > 0).double()),
    "tanh": (nn.Tanh(), lambda h: 1 - h.tanh() ** 2),
}


@pytest.mark.parametrize("name", LEAKY)
def test_leaky_adds_a_slope(name):
    function, derivative = LEAKY[name]
    net = Net(function)
    x = inputs()
    own = derivative(net.first(x))
    assert (own < 0.01).any()
    surrogate = adaptive.Surrogate(net, "leaky")
    torch.testing.assert_close(gradient(surrogate, x), chain(net, own + 0.1))
    assert torch.equal(surrogate(x.clone().requires_grad_(True)), net(x))
    straight = adaptive.Surrogate(net, "straight")
    torch.testing.assert_close(gradient(straight, x), chain(net, own))
    assert adaptive.layers_of(net, x)["straight"] == []
    assert len(adaptive.layers_of(net, x)["leaky"]) == 1


class Half(nn.Module):
    def forward(self):
        return torch.tensor(0.5)


class ByKeyword(Net):
    """Calls one unusual module by keyword, and another one without an argument."""

    def __init__(self):
        super().__init__(Inner())
        self.offset = Half()

    def forward(self, x):
        return self.second(self.between(h=self.first(x)) + self.offset())


def test_modules_called_by_keyword_or_without_an_argument():
    net = ByKeyword()
    x = inputs()
    found = gradient(adaptive.Surrogate(net, "straight"), x)
    torch.testing.assert_close(found, chain(net, torch.ones(20, 5)))
    assert adaptive.layers_of(net, x)["straight"] == ["between (Inner)"]


def test_the_model_is_as_before():
    net = Net(Quantised())
    x = inputs()
    gradient(adaptive.Surrogate(net, "leaky"), x)
    assert "forward" not in vars(net.between)
    assert (gradient(net, x) == 0).all()

    def broken(h):
        raise ZeroDivisionError

    net.second.forward = broken
    with pytest.raises(ZeroDivisionError):
        adaptive.Surrogate(net, "straight")(x)
    assert "forward" not in vars(net.between)


def test_what_a_module_does_to_its_input_is_seen_by_the_caller():
    net = Net(InPlace())
    net.forward = lambda x: net.second(add_to(net.first(x)))

    def add_to(h):
        return net.between(h) + h  # h as the module left it

    x = inputs()
    surrogate = adaptive.Surrogate(net, "straight")
    assert torch.equal(surrogate(x.clone().requires_grad_(True)), net(x))


def test_a_forward_of_the_users_own_is_put_back():
    net = Net(Quantised())
    own = net.between.forward
    net.between.forward = lambda h: 2 * own(h)
    x = inputs()
    expected = net(x)
    surrogate = adaptive.Surrogate(net, "straight")
    assert torch.equal(surrogate(x.clone().requires_grad_(True)), expected)
    assert torch.equal(net(x), expected)


class Outer(nn.Module):
    """Unknown code around unknown code."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, h):
        return self.inner(h)


class Halves(nn.Module):
    """The derivative is unknown, and the shape another one."""

    def forward(self, h):
        return h[:, :3].round()


class WithProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, h):
        return self.linear(h)


def test_which_modules_are_unusual():
    net = nn.Sequential(nn.Linear(6, 5), nn.Sequential(Outer(), WithProduct()), nn.BatchNorm1d(5))
    assert list(adaptive.unusual_modules(net)) == ["1.0"]
    layers = adaptive.layers_of(net.eval(), torch.randn(4, 6))
    assert layers == {"straight": ["1.0 (Outer)"], "leaky": ["relu"]}
    assert adaptive.attack_names(layers) == [
        "unit-ce",
        "straight-ce",
        "straight-t",
        "leaky-ce",
        "leaky-t",
    ]
    # The module is left as it is, and the rounding in it has its derivative.
    net = nn.Sequential(nn.Linear(6, 5), Halves(), nn.Linear(3, 2))
    assert adaptive.layers_of(net, torch.randn(4, 6))["straight"] == ["round"]


@pytest.mark.parametrize(
    "name,size,leaky",
    [
        ("wrn-10-1", 8, []),
        ("preact-18", 8, []),
        ("resnet-18", 8, ["relu"]),
        ("vit-s-2", 8, []),
        ("convnext_tiny", 64, []),
        ("swin_t", 64, []),
    ],
)
def test_this_projects_networks_have_no_unusual_layer(name, size, leaky):
    spec = dataclasses.replace(
        DIGITS, image_size=size, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    model = models.build(name, spec).eval().requires_grad_(False)
    layers = adaptive.layers_of(model, torch.rand(2, 3, size, size))
    assert layers == {"straight": [], "leaky": leaky}


class Linear(nn.Module):
    """Logits scale * (x, -x) . w for images of one channel and 4 x 4 pixels."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.randn(16)
        self.scale = scale

    def forward(self, x):
        z = self.scale * (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([z, -z], 1)


def test_large_logits_do_not_blind_the_unit_pass():
    """In linf an image withstands where |w . (x - 1/2)| > eps |w|_1, away from the edges."""
    model = Linear(1e4)
    torch.manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(40, 1, 4, 4)
    y = model(x).argmax(1)
    reach = 0.05 * model.weight.abs().sum()
    robust = ((x.flatten(1) - 0.5) @ model.weight).abs() > reach
    assert 0 < robust.sum() < 40
    threat = dict(norm="linf", eps=0.05, seed=0, n_classes=2)
    plain = autoattack.attack("apgd-ce", model, x, y, **threat)
    assert (model(plain).argmax(1) == y).sum() > robust.sum()
    x_adv = adaptive.attack("unit-ce", model, x, y, **threat)
    assert torch.equal(model(x_adv).argmax(1) == y, robust)


def test_the_mean_margin():
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 6.0, 5.0]])
    assert adaptive.mean_margin(lambda x: logits, None, torch.tensor([0, 1])) == 1.5
    assert adaptive.mean_margin(lambda x: 0 * logits, None, torch.tensor([0, 1])) > 0
