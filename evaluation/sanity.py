"""Checks that an evaluation by attacks can be believed, run on its first images.

The attacks that are checked stand in autoattack.py and restarts.py.

They look for masked gradients, a wrong set-up and too weak an attack, after Carlini et al. (arXiv
1902.06705) and Athalye et al. (arXiv 1802.00420). A check that fails does not prove that a robust
accuracy is overstated, and one that passes does not prove that it is not.

The functions of CHECKS take (model, x, y, norm, eps, seed), where x are images (B, C, H, W) in
[0, 1] and y labels (B,), and return lists of outcomes as `outcome` makes them. The functions of
COMPARED take (model, source, x, y, norm, eps, seed) and return which images are fooled, (B,) bool:
evaluation/verdicts.py compares these with the verdicts of the attack.
"""

import torch
import torch.nn.functional as F

from common import attacks
from evaluation import adaptive, autoattack

LONG_STEPS = 300  # of APGD-CE, three times AutoAttack's
CURVE_STEPS = 20
MARGIN_STEPS = 50
SQUARE_QUERIES = 200  # AutoAttack has 5000; these find most of what a masked gradient hides
TOLERANCE = 0.02  # robust accuracy may rise by so much from one radius to the next
SAME_LOGITS = 1e-4  # relative difference up to which logits count as the same
TINY = 1e-12  # what APGD in l2 adds to a gradient's length before it divides by it
LOWER = 0.05  # share of the mean margin; what lies lower by less counts as equal

DETERMINISTIC = "the same image has the same logits twice"
RANDOM = "the model is randomised, as its attack expects"

OUTCOME = {"check": str, "ok": bool, "found": str}  # entries of an outcome


def outcome(check, ok, found):
    """One check's outcome: what was asked, whether it passed, and a line on what was found."""
    return {"check": check, "ok": bool(ok), "found": found}


def run_check(name, model, source, x, y, norm, eps, seed):
    """Run one group of checks. Returns a dict that JSON can hold.

    {"lines": outcomes} of CHECKS, {"fooled": one truth value per image} of COMPARED.
    """
    torch.manual_seed(seed)
    if name in CHECKS:
        return {"lines": CHECKS[name](model, x, y, norm, eps, seed)}
    return {"fooled": COMPARED[name](model, source, x, y, norm, eps, seed).tolist()}


# ----------------------------------------------------------------- checks with an outcome each


def outputs(model, x, y, norm, eps, seed):
    """Logits and not probabilities; the same logits twice and in any batch."""
    with torch.no_grad():
        logits = model(x)
        again = model(x)
        one_by_one = torch.cat([model(image) for image in x[:4].split(1)])
    row_sums = logits.double().sum(1)
    in_unit_interval = logits.min() >= 0 and logits.max() <= 1
    probabilities = in_unit_interval and (row_sums - 1).abs().max() < 1e-4
    logits_range = f"{logits.min():.3g} to {logits.max():.3g}"
    repeat_gap = _gap(logits, again)
    batch_gap = 0.0  # of a randomised model nothing can be said
    if repeat_gap < SAME_LOGITS:
        batch_gap = _gap(logits[: len(one_by_one)], one_by_one)
    difference = "largest relative difference"
    return [
        outcome("outputs are logits, not probabilities", not probabilities, logits_range),
        outcome(DETERMINISTIC, repeat_gap < SAME_LOGITS, f"{difference} {repeat_gap:.1e}"),
        outcome(
            "logits do not depend on the batch",
            batch_gap < SAME_LOGITS,
            f"{difference} {batch_gap:.1e}",
        ),
    ]


def _gap(a, b):
    """Largest distance of two rows of logits, relative to the spread of the first."""
    # An offset of all classes changes nothing.
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    distance = (a - b).norm(dim=1)
    return float((distance / (a.norm(dim=1) + 1e-10)).max())


def eps_curve(model, x, y, norm, eps, seed):
    """Robust accuracy under APGD-CE falls to 0 along five radii.

    At the largest radius, every image can be turned into flat grey.
    """
    n_pixels = x[0].numel()
    grey = {"linf": 0.5, "l2": 0.5 * n_pixels**0.5, "l1": 0.5 * n_pixels}[norm]
    radii = [eps]
    if grey > eps:
        radii = [eps * (grey / eps) ** (i / 4) for i in range(5)]
    robust_accs = []
    for radius in radii:
        robust = withstands_apgd(model, x, y, norm, radius, seed, CURVE_STEPS)
        robust_accs.append(robust.float().mean().item())
    falls = all(b <= a + TOLERANCE for a, b in zip(robust_accs, robust_accs[1:]))
    points = [f"{100 * acc:.3g} % at {radius:.3g}" for radius, acc in zip(radii, robust_accs)]
    check = "robust accuracy falls to 0 as eps grows"
    return [outcome(check, falls and robust_accs[-1] <= 0.01, ", ".join(points))]


def loss_surface(model, x, y, norm, eps, seed):
    """A step of eps / 10 along the gradient raises the loss more than one in a random direction.

    The step is short, because a linear model of the loss need not hold across a large ball.
    """
    gradient = _gradient(model, x, y)
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
    losses = []
    for direction in (gradient, random):
        if norm == "linf":
            step = direction.sign()
        else:
            length = direction.flatten(1).norm(p=2 if norm == "l2" else 1, dim=1)
            step = direction / (length + 1e-12).view(-1, 1, 1, 1)
        with torch.no_grad():
            logits = model((x + 0.1 * eps * step).clamp(0, 1))
        losses.append(F.cross_entropy(logits, y, reduction="none"))
    along_gradient, along_random = losses
    share = (along_gradient > along_random).float().mean().item()
    means = f"mean loss {along_gradient.mean():.3g} against {along_random.mean():.3g}"
    check = "the gradient's direction beats a random one"
    return [outcome(check, share >= 0.75, f"{share:.0%} of the images; {means}")]


def gradients(model, x, y, norm, eps, seed):
    """The cross-entropy has a gradient, and no other backward pass brings logits closer together.

    Margins are those of the model itself, a mean over the images that it classifies correctly.
    """
    with torch.no_grad():
        correct = model(x).argmax(1) == y
    x = x[correct]
    y = y[correct]
    if not len(x):
        return []
    margin = adaptive.mean_margin(model, x, y)
    largest = _gradient(model, x, y).flatten(1).abs().amax(1)
    n_tiny = int((~(largest >= TINY)).sum())  # NaN counts, too
    found = f"{n_tiny} of {len(x)} below {TINY:g}; mean margin of the logits {margin:.3g}"
    outcomes = [outcome("hardly any gradient is nearly zero", n_tiny <= 0.01 * len(x), found)]

    def margin_after(attacked):
        """Of APGD-CE on `attacked`, the mean margin of the model's logits: 1 at the images x."""
        settings = dict(norm=norm, eps=eps, seed=seed, n_steps=MARGIN_STEPS)
        x_adv = autoattack.highest_loss(attacked, x, y, **settings)
        with torch.no_grad():
            losses = attacks.attack_losses(model(x_adv), y, "margin")
        return (-losses.mean() / margin).item()

    own = margin_after(model)
    for kind in adaptive.kinds(adaptive.layers_of(model, x[:2])):
        left = margin_after(adaptive.Surrogate(model, kind, margin))
        check = f"{kind}: APGD-CE leaves no smaller margin"
        found = f"{left:.3f} of the clean one, {own:.3f} by the model's own gradient"
        outcomes.append(outcome(check, left >= own - LOWER, found))
    return outcomes


def _gradient(model, x, y):
    """Gradient of the cross-entropy at the images x, (B, C, H, W)."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return gradient


CHECKS = {
    "outputs": outputs,
    "curve": eps_curve,
    "surface": loss_surface,
    "gradients": gradients,
}


# ------------------------------------------------------ checks compared with the attack's verdicts


def zero_gradients(model, x, y):
    """How many images have a cross-entropy without any gradient. NaN counts as none."""
    largest = _gradient(model, x, y).flatten(1).abs().amax(1)
    return int((~(largest > 0)).sum())


def fooled_by_more_steps(model, source, x, y, norm, eps, seed):
    """(B,) bool: misclassified without an attack, or fooled by APGD-CE with LONG_STEPS steps."""
    return ~withstands_apgd(model, x, y, norm, eps, seed, LONG_STEPS)


def withstands_apgd(model, x, y, norm, eps, seed, n_steps):
    """(B,) bool: classified correctly as it is, and after APGD-CE."""
    with torch.no_grad():
        robust = model(x).argmax(1) == y
    rows = torch.nonzero(robust).squeeze(1)
    if len(rows):
        x_adv = autoattack.apgd_ce(
            model, x[rows], y[rows], norm=norm, eps=eps, seed=seed, n_steps=n_steps
        )
        with torch.no_grad():
            robust[rows] = model(x_adv).argmax(1) == y[rows]
    return robust


def fooled_by_transfer(model, source, x, y, norm, eps, seed):
    """(B,) bool: `model` misclassifies the adversarial images of the model `source`."""
    x_adv = transferred(source, x, y, norm, eps)
    with torch.no_grad():
        return model(x_adv).argmax(1) != y


def transferred(source, x, y, norm, eps):
    """Adversarial images (B, C, H, W) of the model `source`, to be tried on another one.

    They are the last iterates of 40 steps of PGD on the margin, whether they fool or not. The
    margin has no bound, so the attack goes on after source is fooled: such images transfer better.
    """
    settings = dict(norm=norm, eps=eps, step_size=eps / 10, n_steps=40, loss="margin")
    return attacks.pgd(source, x, y, torch.zeros_like(x), **settings)


def fooled_by_square(model, source, x, y, norm, eps, seed):
    """(B,) bool: misclassified without an attack, or fooled by Square with SQUARE_QUERIES queries.

    It follows no gradient, so that none misleads it.
    """
    with torch.no_grad():
        fooled = model(x).argmax(1) != y
    rows = torch.nonzero(~fooled).squeeze(1)
    if len(rows):
        settings = dict(norm=norm, eps=eps, seed=seed, n_queries=SQUARE_QUERIES)
        x_adv = autoattack.square(model, x[rows], y[rows], **settings)
        with torch.no_grad():
            fooled[rows] = model(x_adv).argmax(1) != y[rows]
    return fooled


COMPARED = {
    "steps": fooled_by_more_steps,
    "square": fooled_by_square,
    "transfer": fooled_by_transfer,
}
