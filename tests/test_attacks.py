"""The attack is right, not only bounded, and leaves no trace. Alone: python -m pytest tests/test_attacks.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import attacks


def tiny_model(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        nn.Linear(5 * 16, 4),
    )
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():  # running statistics that differ from any batch's
        for norm in (model[1], model[4]):
            norm.running_mean.uniform_(-0.3, 0.3)
            norm.running_var.uniform_(0.5, 2)
    return model


def batch(n=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 6, 6, generator=generator, dtype=dtype)
    x[0, :, :3], x[1, :, :3] = 0, 1  # pixels on the border of [0, 1]
    return x, torch.randint(0, 4, (n,), generator=generator), generator


def slow_pgd(model, x, y, start, norm, eps, step_size, n_steps, loss, reference):
    """PGD image by image and, in linf, pixel by pixel, from the definition; the model must treat images one by one (eval mode)."""
    results = []
    for i in range(len(x)):
        image = x[i : i + 1]
        x_adv = slow_project(image + start[i : i + 1], image, norm, eps)
        for _ in range(n_steps):
            x_adv = x_adv.clone().requires_grad_(True)
            logits = model(x_adv)[0]
            probs, label = logits.exp() / logits.exp().sum(), y[i]
            if loss == "ce":
                value = -probs[label].log()
            elif loss == "margin":
                value = max(logits[j] for j in range(len(logits)) if j != label) - logits[label]
            else:
                p = reference[i].exp() / reference[i].exp().sum()
                value = sum(p[k] * (p[k] / probs[k]).log() for k in range(len(p)))
            (gradient,) = torch.autograd.grad(value, x_adv)
            move = gradient.sign() if norm == "linf" else gradient / gradient.pow(2).sum().sqrt()
            x_adv = slow_project(x_adv.detach() + step_size * move, image, norm, eps)
        results.append(x_adv)
    return torch.cat(results)


def slow_project(x_adv, x, norm, eps):
    delta = x_adv - x
    if norm == "linf":
        values = [min(max(d, -eps), eps) for d in delta.flatten().tolist()]
        delta = torch.tensor(values, dtype=x.dtype).view_as(x)
    else:
        length = delta.pow(2).sum().sqrt().item()
        delta = delta * (eps / length) if length > eps else delta
    return torch.tensor([min(max(v, 0.0), 1.0) for v in (x + delta).flatten().tolist()], dtype=x.dtype).view_as(x)


@pytest.mark.parametrize("norm,eps,step_size", [("linf", 0.13, 0.05), ("l2", 0.9, 0.31)])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_equals_slow_reference(norm, eps, step_size, loss):
    model, (x, y, generator) = tiny_model().eval(), batch()
    start = attacks.random_start(x.shape, norm, eps, generator).double()
    reference = model(x).detach()
    fast = attacks.pgd(model, x, y, [start], norm=norm, eps=eps, step_size=step_size, n_steps=4, loss=loss)
    slow = slow_pgd(model, x, y, start, norm, eps, step_size, 4, loss, reference)
    assert torch.allclose(fast, slow, atol=1e-9)
    assert not torch.allclose(fast, x + start)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1 / 3, 7 / 255, 2.0])
@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_stays_in_ball_and_box(norm, eps, loss):
    model, (x, y, generator) = tiny_model(torch.float32), batch(dtype=torch.float32)
    starts = [attacks.random_start(x.shape, norm, eps, generator) for _ in range(2)]
    x_adv = attacks.pgd(model, x, y, starts, norm=norm, eps=eps, step_size=0.7 * eps + 0.01, n_steps=3, loss=loss)
    delta = (x_adv - x).flatten(1)
    assert (delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()) <= eps + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_one_step_from_zero_is_fgsm():
    model, (x, y, _) = tiny_model().eval(), batch()
    x_adv = attacks.pgd(model, x, y, [torch.zeros_like(x)], norm="linf", eps=0.1, step_size=0.1, n_steps=1, loss="ce")
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert torch.equal(x_adv, (x + 0.1 * gradient.sign()).clamp(0, 1).detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_optimum_of_a_linear_model(norm):
    """Two classes, linear logits: the worst perturbation is eps * sign(w) or eps * w / |w|, w = w_other - w_y."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 2).double())
    x, y = torch.full((3, 2, 6, 6), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0])
    w = torch.stack([model[1].weight[1 - k] - model[1].weight[k] for k in y]).view_as(x).detach()
    best = 0.2 * (w.sign() if norm == "linf" else w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    start = attacks.random_start(x.shape, norm, 0.2, torch.Generator().manual_seed(0)).double()
    x_adv = attacks.pgd(model, x, y, [start], norm=norm, eps=0.2, step_size=0.1, n_steps=60, loss="ce")
    assert torch.allclose(x_adv - x, best, atol=1e-6)


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(bn, fails):
    model, (x, y, _) = tiny_model(), batch()
    model.train()
    model[4].eval()  # one layer in another mode than the rest,
    model[3].bias.requires_grad_(False)  # one parameter frozen,
    model[6].weight.grad = torch.ones_like(model[6].weight)  # one gradient waiting
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def flags():
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], model[1].track_running_stats

    before_flags = flags()
    y = torch.full_like(y, 99) if fails else y  # an error in the middle of the attack
    try:
        attacks.pgd(model, x, y, [torch.zeros_like(x)], norm="linf", eps=0.1, step_size=0.05, n_steps=2, loss="ce", bn=bn)
        assert not fails
    except (IndexError, RuntimeError):
        assert fails
    assert flags() == before_flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert torch.equal(model[6].weight.grad, torch.ones_like(model[6].weight))


def test_bn_modes_use_the_statistics_they_name():
    model, (x, _, _) = tiny_model(), batch()
    with torch.no_grad():
        expected = {"running": model.eval()(x), "batch": tiny_model().train()(x)}
        for bn in ("batch", "running"):
            with attacks.attack_mode(model, bn):
                assert torch.equal(model(x), expected[bn])
    assert not torch.allclose(expected["batch"], expected["running"])


def test_no_weight_gradients_are_computed():
    """Parameters are frozen during the attack, so the graph holds nothing but the path to the input."""
    model, (x, y, _) = tiny_model(), batch()
    seen = []
    model[6].register_forward_hook(lambda module, inputs, output: seen.append(any(p.requires_grad for p in model.parameters())))
    attacks.pgd(model, x, y, [torch.zeros_like(x)], norm="linf", eps=0.1, step_size=0.05, n_steps=3, loss="kl")
    assert seen == [False] * 4  # one clean pass for the reference, three steps


def test_restarts_and_best_iterate_never_weaken_the_attack():
    model, (x, _, generator) = tiny_model().eval(), batch(64)
    y = model(x).argmax(1)
    kwargs = dict(norm="linf", eps=0.05, step_size=0.01, n_steps=1, loss="margin")
    starts = [attacks.random_start(x.shape, "linf", 0.05, generator).double() for _ in range(4)]

    def fooled(x_adv):
        return model(x_adv).argmax(1) != y

    singles = torch.stack([fooled(attacks.pgd(model, x, y, [s], **kwargs)) for s in starts])
    together = fooled(attacks.pgd(model, x, y, starts, **kwargs))
    assert torch.equal(together, singles.any(0))
    assert singles.any(0).sum() > singles.sum(1).max()  # the restarts do differ here
    assert (fooled(attacks.pgd(model, x, y, starts[:1], **kwargs, best=True)) >= singles[0]).all()


def test_best_iterate_is_the_best_seen():
    """With far too large a step the loss goes up and down; best=True returns the best iterate, recomputed here one by one."""
    model, (x, y, _) = tiny_model().eval(), batch()
    kwargs = dict(norm="linf", eps=0.3, step_size=0.3, loss="ce")
    iterates = [attacks.pgd(model, x, y, [torch.zeros_like(x)], n_steps=n, **kwargs) for n in range(1, 6)]
    losses = torch.stack([attacks.attack_losses(model(z), y, "ce") for z in iterates])
    fools = torch.stack([model(z).argmax(1) != y for z in iterates])
    best = attacks.pgd(model, x, y, [torch.zeros_like(x)], n_steps=5, best=True, **kwargs)
    for i in range(len(x)):
        allowed = [k for k in range(5) if fools[k, i] == fools[:, i].any()]
        k = max(allowed, key=lambda k: losses[k, i])
        assert torch.equal(best[i], iterates[k][i])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_uniform_in_the_ball(norm):
    """The radius of a uniform point of a d-dimensional ball has P(r < t eps) = t^d, in either norm."""
    deltas = attacks.random_start((20_000, 1, 1, 3), norm, 0.7, torch.Generator().manual_seed(0)).flatten(1)
    radius = (deltas.abs().amax(1) if norm == "linf" else deltas.norm(dim=1)) / 0.7
    assert radius.max() <= 1 + 1e-6
    for t in (0.3, 0.6, 0.9):
        assert abs((radius < t).float().mean() - t**3) < 4 * math.sqrt(t**3 * (1 - t**3) / 20_000)
    assert deltas.mean(0).abs().max() < 0.02  # centred


def test_half_precision_logits_are_raised():
    logits = torch.tensor([[30.0, 10.0]], dtype=torch.bfloat16)
    for loss in ("ce", "margin", "kl"):
        assert attacks.attack_losses(logits, torch.tensor([0]), loss, logits).dtype == torch.float32


@pytest.mark.parametrize("norm,eps", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 40])
def test_apgd_is_the_authors(norm, eps, n_steps):
    """Iterate by iterate: pyautoattack's APGD-CE started at x returns the same images and losses."""
    from pyautoattack.autopgd_base import APGDAttack

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 5))
    for layer in (model[1], model[3]):
        layer.weight.data *= 3  # curved enough for steps that fail and are halved
    x, y = torch.rand(40, 3, 4, 4), torch.arange(40) % 5
    ours = attacks.apgd(model, x, y, norm=norm, eps=eps, n_steps=n_steps)
    theirs = APGDAttack(model, n_iter=n_steps, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, device="cpu")
    theirs.init_hyperparam(x)
    expected, _, loss, _ = theirs.attack_single_run(x, y, x_init=x)
    # At 40 steps in l2, rounding decides whether a loss that has converged rose once more.
    long = (norm, n_steps) == ("l2", 40)
    assert long or torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(attacks.attack_losses(model(ours), y, "ce"), loss, atol=1e-2 if long else 1e-5)
    assert (attacks.attack_losses(model(ours), y, "ce") >= attacks.attack_losses(model(x), y, "ce")).all()


def test_apgd_takes_label_probabilities_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, hard = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    one_hot = torch.nn.functional.one_hot(hard, 3).float()
    a = attacks.apgd(model, x, hard, norm="linf", eps=0.1, n_steps=3)
    b = attacks.apgd(model, x, one_hot, norm="linf", eps=0.1, n_steps=3)
    assert torch.allclose(a, b, atol=1e-6) and (a - x).abs().max() <= 0.1 + 1e-6 and not torch.equal(a, x)
    mixed = attacks.apgd(model, x, (one_hot + one_hot.roll(1, 0)) / 2, norm="linf", eps=0.1, n_steps=3)
    assert not torch.allclose(a, mixed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
