"""Checks that an evaluation by attacks can be believed: signs of gradient masking, of a wrong set-up, of too weak an attack.

After Carlini et al. (arXiv 1902.06705) and Athalye et al. (arXiv 1802.00420). Each check passes or fails; what fails does not
prove that a robust accuracy is overstated, and what passes does not prove that it is not. They run on a few images.

The functions of CHECKS take (model, x, y, norm, eps, seed), with images x (B, C, H, W) in [0, 1] and labels y (B,), and return
lists of {"check": what was asked, "ok": bool, "found": one line}. What fooled_by_* find is held against the verdicts reported.
"""

import torch
import torch.nn.functional as F

from common import attacks, autoattack

LONG_STEPS = 300  # of the check whether more steps would fool more
CURVE_STEPS = 20
TOLERANCE = 0.02  # of robust accuracy, in the checks that compare two
DETERMINISTIC, RANDOM = "the same image has the same logits twice", "the model is randomised, as its attack expects"


def line(check, ok, found):
    """One check's outcome."""
    return {"check": check, "ok": bool(ok), "found": found}


def outputs(model, x, y, norm, eps, seed):
    """Logits, not probabilities; inputs in [0, 1]; logits the same twice, and the same alone and in a batch."""
    with torch.no_grad():
        logits, again, alone = model(x), model(x), torch.cat([model(x[i : i + 1]) for i in range(min(4, len(x)))])
    total = logits.double().sum(1)
    probabilities = logits.min() >= 0 and logits.max() <= 1 and (total - 1).abs().max() < 1e-4
    random = _gap(logits, again)
    batch = _gap(logits[: len(alone)], alone) if random < 1e-4 else 0.0
    return [
        line("outputs are logits, not probabilities", not probabilities, f"{logits.min():.3g} to {logits.max():.3g}"),
        line("inputs lie in [0, 1]", x.min() >= 0 and x.max() <= 1, f"{x.min():.3g} to {x.max():.3g}"),
        line(DETERMINISTIC, random < 1e-4, f"largest relative difference {random:.1e}"),
        line("logits do not depend on the batch", batch < 1e-4, f"largest relative difference {batch:.1e}"),
    ]


def _gap(a, b):
    """Largest distance of two rows of logits, relative to the rows' spread."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)  # an offset of all classes changes nothing
    return float(((a - b).norm(dim=1) / (a.norm(dim=1) + 1e-10)).max())


def zero_gradients(model, x, y):
    """How many images have a loss (cross-entropy) without any gradient, as a tensor."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return (~(gradient.flatten(1).abs().amax(1) > 0)).sum()  # NaN is none either


def eps_curve(model, x, y, norm, eps, seed):
    """Robust accuracy under APGD-CE falls to 0 along five radii, up to the one at which every image can be turned into flat grey."""
    n_pixels = x[0].numel()
    grey = {"linf": 0.5, "l2": 0.5 * n_pixels**0.5, "l1": 0.5 * n_pixels}[norm]
    radii = [eps * (grey / eps) ** (i / 4) for i in range(5)] if grey > eps else [eps]
    robust = [_robust(model, x, y, norm, radius, seed, CURVE_STEPS).float().mean().item() for radius in radii]
    falls = all(b <= a + TOLERANCE for a, b in zip(robust, robust[1:]))
    found = ", ".join(f"{100 * share:.3g} % at {radius:.3g}" for radius, share in zip(radii, robust))
    return [line("robust accuracy falls to 0 as eps grows", falls and robust[-1] <= 0.01, found)]


def fooled_by_more_steps(model, x, y, norm, eps, seed):
    """(B,) bool: misclassified, or fooled by APGD-CE with three times its steps."""
    return ~_robust(model, x, y, norm, eps, seed, LONG_STEPS)


def loss_surface(model, x, y, norm, eps, seed):
    """The gradient points uphill: a step of eps / 10 along it raises the loss more than one in a random direction.

    It is short, for a linear model of the loss need not hold across a large ball.
    """
    x_grad = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_grad), y, reduction="sum"), x_grad)
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    losses = []
    for direction in (gradient, random):
        if norm == "linf":
            step = direction.sign()
        else:
            length = direction.flatten(1).norm(p=2 if norm == "l2" else 1, dim=1)
            step = direction / (length + 1e-12).view(-1, 1, 1, 1)
        with torch.no_grad():
            losses.append(F.cross_entropy(model((x + 0.1 * eps * step).clamp(0, 1)), y, reduction="none"))
    share = (losses[0] > losses[1]).float().mean().item()
    found = f"{share:.0%} of the images; mean loss {losses[0].mean():.3g} against {losses[1].mean():.3g}"
    return [line("the gradient's direction beats a random one", share >= 0.75, found)]


def _robust(model, x, y, norm, eps, seed, n_steps):
    """(B,) bool: classified correctly as they are and after APGD-CE."""
    with torch.no_grad():
        robust = model(x).argmax(1) == y
    if robust.any():
        adversarial = autoattack.apgd_ce(model, x[robust], y[robust], norm=norm, eps=eps, seed=seed, n_steps=n_steps)
        with torch.no_grad():
            robust[robust.clone()] = model(adversarial).argmax(1) == y[robust]
    return robust


def fooled_by_transfer(model, source, x, y, norm, eps, seed):
    """(B,) bool: `model` misclassifies the adversarial images of `source`."""
    x_adv = transferred(source, x, y, norm, eps, seed)
    with torch.no_grad():
        return model(x_adv).argmax(1) != y


def transferred(source, x, y, norm, eps, seed):
    """Adversarial images of another model, `source`, to try on this one: PGD-40 on the margin, the last point, fooling or not.

    The margin has no bound, so that the attack goes on after source is fooled: such images transfer better.
    """
    start = torch.zeros_like(x)
    return attacks.pgd(source, x, y, [start], norm=norm, eps=eps, step_size=eps / 10, n_steps=40, loss="margin")


CHECKS = {"outputs": outputs, "curve": eps_curve, "surface": loss_surface}
