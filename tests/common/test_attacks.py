"""The attacks are right, not only bounded, and leave no trace on the model.

Alone: python -m pytest tests/common/test_attacks.py
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from torch import nn

from common import attacks, models

LINF_STEPS = dict(norm="linf", eps=0.1, step_size=0.05)


def tiny_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
    ).to(dtype)
    with torch.no_grad():  # running statistics that differ from any batch's
        for norm in (model[1], model[4]):
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.5, 2)
    return model


def random_batch(dtype=torch.float64):
    """Seven images with labels, and the generator that drew them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(7, 2, 6, 6, generator=generator, dtype=dtype)
    x[0, :, :3] = 0  # pixels on the border of [0, 1]
    x[1, :, :3] = 1
    y = torch.randint(0, 4, (7,), generator=generator)
    return x, y, generator


# ---------------------------------------------------------------------------------------------- PGD


def slow_pgd(model, x, y, start, norm, eps, step_size, n_steps, loss, reference):
    """PGD from its definition, one image at a time and in linf one pixel at a time.

    The model must be in eval mode, where it treats each image by itself.
    """
    results = []
    for i in range(len(x)):
        image = x[i : i + 1]
        x_adv = slow_project(image + start[i : i + 1], image, norm, eps)
        for _ in range(n_steps):
            x_adv = x_adv.clone().requires_grad_(True)
            value = slow_loss(model(x_adv)[0], y[i], loss, reference[i])
            (gradient,) = torch.autograd.grad(value, x_adv)
            if norm == "linf":
                direction = gradient.sign()
            else:
                direction = gradient / gradient.pow(2).sum().sqrt()
            x_adv = slow_project(x_adv.detach() + step_size * direction, image, norm, eps)
        results.append(x_adv)
    return torch.cat(results)


def slow_loss(logits, label, loss, reference):
    probs = logits.exp() / logits.exp().sum()
    if loss == "ce":
        return -probs[label].log()
    if loss == "margin":
        return max(logits[j] for j in range(len(logits)) if j != label) - logits[label]
    p = reference.exp() / reference.exp().sum()
    return sum(p[k] * (p[k] / probs[k]).log() for k in range(len(p)))


def slow_project(x_adv, x, norm, eps):
    delta = x_adv - x
    if norm == "linf":
        values = [min(max(d, -eps), eps) for d in delta.flatten().tolist()]
        delta = torch.tensor(values, dtype=x.dtype).view_as(x)
    else:
        length = delta.pow(2).sum().sqrt().item()
        if length > eps:
            delta = delta * (eps / length)
    pixels = [min(max(value, 0.0), 1.0) for value in (x + delta).flatten().tolist()]
    return torch.tensor(pixels, dtype=x.dtype).view_as(x)


@pytest.mark.parametrize("norm,eps,step_size", [("linf", 0.13, 0.05), ("l2", 0.9, 0.31)])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_equals_slow_reference(norm, eps, step_size, loss):
    model = tiny_model().eval()
    x, y, generator = random_batch()
    start = attacks.random_start(x.shape, norm, eps, generator).double()
    settings = dict(norm=norm, eps=eps, step_size=step_size, n_steps=4, loss=loss)
    fast = attacks.pgd(model, x, y, start, **settings)
    slow = slow_pgd(model, x, y, start, reference=model(x).detach(), **settings)
    assert torch.allclose(fast, slow, atol=1e-9)
    assert not torch.allclose(fast, x + start)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1 / 3, 7 / 255, 2.0])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_stays_in_ball_and_box(norm, eps, loss):
    model = tiny_model(torch.float32)
    x, y, generator = random_batch(torch.float32)
    start = attacks.random_start(x.shape, norm, eps, generator)
    settings = dict(norm=norm, eps=eps, step_size=0.7 * eps + 0.01, n_steps=3, loss=loss)
    x_adv = attacks.pgd(model, x, y, start, **settings)
    order = torch.inf if norm == "linf" else 2
    assert (x_adv - x).flatten(1).norm(p=order, dim=1).max() <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_one_step_from_zero_is_fgsm():
    model = tiny_model().eval()
    x, y, _ = random_batch()
    settings = dict(norm="linf", eps=0.1, step_size=0.1, n_steps=1, loss="ce")
    x_adv = attacks.pgd(model, x, y, torch.zeros_like(x), **settings)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert torch.equal(x_adv, (x + 0.1 * gradient.sign()).clamp(0, 1).detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_optimum_of_a_linear_model(norm):
    """Two classes, linear logits, w = w_other - w_y: the optimum is eps sign(w) or eps w / |w|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 2).double())
    x = torch.full((3, 2, 6, 6), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    weight = model[1].weight.detach()
    w = (weight[1 - y] - weight[y]).view_as(x)
    direction = w.sign() if norm == "linf" else w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    start = attacks.random_start(x.shape, norm, 0.2, torch.Generator().manual_seed(0)).double()
    settings = dict(norm=norm, eps=0.2, step_size=0.1, n_steps=60, loss="ce")
    x_adv = attacks.pgd(model, x, y, start, **settings)
    assert torch.allclose(x_adv - x, 0.2 * direction, atol=1e-6)


# ------------------------------------------------------------- attacks on a model in training


def classifier():
    """A WRN-10-1 in train mode, whose running statistics differ from any batch's."""
    torch.manual_seed(0)
    model = models.build("wrn-10-1", DIGITS).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def digit_batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(9, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (9,), generator=generator)


def flags_of(model):
    training = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    return training, trainable, model.batchnorm.track_running_stats


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_attack_on_the_twin_leaves_no_trace(bn, precision):
    model = classifier()
    model.logits.weight.grad = torch.ones_like(model.logits.weight)  # one gradient waiting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = flags_of(model)
    x, y = digit_batch()
    twin = attacks.make_twin(model, bn, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        by_pgd = attacks.pgd(twin, x, y, torch.zeros_like(x), **LINF_STEPS, n_steps=2, loss="ce")
        by_apgd = attacks.apgd(twin, x, y, norm="linf", eps=0.1, n_steps=3)
    assert not torch.equal(by_pgd, x) and not torch.equal(by_apgd, x)
    assert flags_of(model) == flags
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
    assert [parameter.grad is not None for parameter in model.parameters()].count(True) == 1
    assert torch.equal(model.logits.weight.grad, torch.ones_like(model.logits.weight))
    assert not any(parameter.requires_grad for parameter in twin.parameters())


@torch.no_grad()
def test_a_twin_uses_the_statistics_it_names():
    x, _ = digit_batch()
    by_batch = attacks.make_twin(classifier(), "batch", "fp32")(x)
    by_running = attacks.make_twin(classifier(), "running", "fp32")(x)
    assert torch.equal(by_batch, classifier().train()(x))
    assert torch.equal(by_running, classifier().eval()(x))
    assert not torch.allclose(by_batch, by_running)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_a_twin_follows_its_model(bn, precision):
    """After steps of training, which move weights and running statistics, its logits are those of
    the model under the same autocast, to the bit.
    """
    model = classifier()
    twin = attacks.make_twin(model, bn, precision)
    x, y = digit_batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        attacks.update_twin(twin, model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = twin(x)
        with attacks.frozen_statistics(model):
            expected = model.train(bn == "batch")(x)
    assert torch.equal(found, expected)
    in_bf16 = [name for name, p in twin.named_parameters() if p.dtype == torch.bfloat16]
    convolutions = [name for name, p in model.named_parameters() if p.ndim == 4]
    assert in_bf16 == (convolutions if precision == "bf16" else [])
    if precision == "fp32":  # shared and not copied
        assert twin.init_conv.weight.data_ptr() == model.init_conv.weight.data_ptr()


@pytest.mark.parametrize("norm,loss", [("linf", "kl"), ("linf", "ce"), ("l2", "margin")])
def test_a_step_is_one_graph_with_the_eager_images(norm, loss, monkeypatch):
    """torch.compile traces the step without a break (fullgraph), compiles it once, and the images
    are the eager ones, element by element. The tracer is the real one, its backend runs eagerly.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(attacks, "_compiled", functools.cache(compiled))
    twin = attacks.make_twin(classifier(), "batch", "fp32")
    x, y = digit_batch()
    start = attacks.random_start(x.shape, norm, 0.1, torch.Generator().manual_seed(0))
    settings = dict(norm=norm, eps=0.1, step_size=0.05, n_steps=4, loss=loss)
    eager = attacks.pgd(twin, x, y, start, **settings)
    found = attacks.pgd(twin, x, y, start, **settings, compiled=True)
    assert torch.equal(found, eager) if norm == "linf" else torch.allclose(found, eager, atol=1e-6)
    assert len(graphs) == 1
    if loss == "ce":
        settings = dict(norm=norm, eps=0.1, n_steps=5)
        by_apgd = attacks.apgd(twin, x, y, **settings, compiled=True)
        assert torch.equal(by_apgd, attacks.apgd(twin, x, y, **settings))
        assert len(graphs) == 2


# ------------------------------------------------------------------------------- parts of an attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_in_the_ball(norm):
    """The radius r of a uniform point of a d-dimensional ball has P(r < t eps) = t^d."""
    generator = torch.Generator().manual_seed(0)
    deltas = attacks.random_start((20_000, 3, 1, 1), norm, 0.7, generator).flatten(1)
    order = torch.inf if norm == "linf" else 2
    radius = deltas.norm(p=order, dim=1) / 0.7
    assert radius.max() <= 1 + 1e-6
    for t in (0.3, 0.6, 0.9):
        deviation = math.sqrt(t**3 * (1 - t**3) / 20_000)
        assert abs((radius < t).float().mean() - t**3) < 4 * deviation
    assert deltas.mean(0).abs().max() < 0.02  # centred


def test_half_precision_logits_are_raised():
    logits = torch.tensor([[30.0, 10.0]], dtype=torch.bfloat16)
    for loss in ("ce", "margin", "kl"):
        losses = attacks.attack_losses(logits, torch.tensor([0]), loss, logits)
        assert losses.dtype == torch.float32


# --------------------------------------------------------------------------------------------- APGD


@pytest.mark.parametrize("norm,eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 40])
def test_apgd_is_the_authors(norm, eps, n_steps):
    """pyautoattack's APGD-CE started at x returns the same images and losses."""
    from pyautoattack.autopgd_base import APGDAttack

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
    for layer in (model[1], model[3]):
        layer.weight.data *= 3  # curved enough for steps that fail and are halved
    x = torch.rand(40, 3, 4, 4)
    y = torch.arange(40) % 5
    x_adv = attacks.apgd(model, x, y, norm=norm, eps=eps, n_steps=n_steps)
    losses = attacks.attack_losses(model(x_adv), y, "ce")

    package_norm = {"linf": "Linf", "l2": "L2"}[norm]
    package = APGDAttack(model, n_iter=n_steps, norm=package_norm, eps=eps, device="cpu")
    package.init_hyperparam(x)
    expected, _, expected_losses, _ = package.attack_single_run(x, y, x_init=x)
    if (norm, n_steps) == ("l2", 40):
        # Rounding decides whether a loss that has converged rose once more.
        assert torch.allclose(losses, expected_losses, atol=1e-2)
    else:
        assert torch.allclose(x_adv, expected, atol=1e-5)
        assert torch.allclose(losses, expected_losses, atol=1e-5)
    assert (losses >= attacks.attack_losses(model(x), y, "ce")).all()


def test_apgd_takes_label_probabilities():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model.eval()
    x = torch.rand(6, 1, 8, 8)
    y = torch.arange(6) % 3
    one_hot = F.one_hot(y, 3).float()
    mixed = (one_hot + one_hot.roll(1, 0)) / 2
    settings = dict(norm="linf", eps=0.1, n_steps=3)
    from_labels = attacks.apgd(model, x, y, **settings)
    from_one_hot = attacks.apgd(model, x, one_hot, **settings)
    from_mixed = attacks.apgd(model, x, mixed, **settings)
    assert torch.allclose(from_labels, from_one_hot, atol=1e-6)
    assert (from_labels - x).abs().max() <= 0.1 + 1e-6
    assert not torch.equal(from_labels, x)
    assert not torch.allclose(from_labels, from_mixed)
