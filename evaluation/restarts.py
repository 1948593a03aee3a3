"""PGD with random restarts, for randomised models too; checks of every logit and attacked image.

One run of PGD is in common/attacks.py; AutoAttack is in evaluation/autoattack.py.
"""

import torch
from torch import nn

from common import UserError, attacks, run


def pgd(model, x, y, starts, *, loss, **settings):
    """Adversarial images (B, C, H, W): per image, the last iterate of its most successful restart.

    That is a restart that fools the model, or if none does the one of highest loss. model: in eval
    mode, its parameters frozen. starts: one perturbation like x per restart. One start needs no
    choice, so it needs no further pass. loss: "ce" or "margin". settings: those of
    common.attacks.pgd.
    """
    if len(starts) == 1:
        return attacks.pgd(model, x, y, starts[0], loss=loss, **settings)
    chosen = x
    chosen_fools = torch.zeros_like(y, dtype=torch.bool)
    chosen_loss = torch.full_like(y, -torch.inf, dtype=x.dtype)
    for start in starts:
        x_adv = attacks.pgd(model, x, y, start, loss=loss, **settings)
        with torch.no_grad():
            logits = model(x_adv)
            losses = attacks.attack_losses(logits, y, loss)
        fools = logits.argmax(1) != y
        fools_first = fools & ~chosen_fools
        higher_loss = (fools == chosen_fools) & (losses > chosen_loss)
        better = fools_first | higher_loss
        chosen = torch.where(better.view(-1, 1, 1, 1), x_adv, chosen)
        chosen_loss = torch.where(better, losses, chosen_loss)
        chosen_fools = chosen_fools | fools
    return chosen


class MeanLogits(nn.Module):
    """Mean logits of n passes, which an attack on a randomised model follows.

    Expectation over transformation (Athalye et al., arXiv 1707.07397).
    """

    def __init__(self, model, n):
        super().__init__()
        self.model = model
        self.n = n

    def forward(self, x):
        return sum(self.model(x) for _ in range(self.n)) / self.n


class Finite(nn.Module):
    """The model, but UserError where a logit is not finite.

    argmax of NaN is class 0: such a model would look robust on the images of that class. Where a
    layer cuts the gradient off, as pixels made whole numbers do, there is one, of zero.
    """

    def __init__(self, model, name, precision):
        super().__init__()
        self.model = model
        self.name = name
        self.precision = precision

    def forward(self, x):
        with run.autocast(x.device, self.precision):
            logits = self.model(x).float()
        if not logits.isfinite().all():
            raise UserError(f"{self.name}: the model's logits are not finite")
        if torch.is_grad_enabled() and x.requires_grad and not logits.requires_grad:
            logits = logits + 0.0 * x.flatten(1).sum(1, keepdim=True)
        return logits


def in_threat_model(x_adv, x, name, norm, eps):
    """x_adv, if all its images are within eps of x and in [0, 1]; name: of the attack, for errors.

    An attack that breaks the rules would understate robustness: RuntimeError. In l1 the package's
    projection, a cumulative sum over all pixels in float32, leaves the ball by some per cent on
    large images. Those are pulled back towards x onto the ball, and judged there.
    """
    delta = x_adv - x
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    size = delta.flatten(1).norm(p=order, dim=1)
    if norm == "l1":
        outside = size > eps * (1 + 1e-5)
        shrink = torch.where(outside, eps / size, 1.0)
        pulled_back = x + delta * shrink.view(-1, 1, 1, 1)
        x_adv = torch.where(outside.view(-1, 1, 1, 1), pulled_back, x_adv)
        size = size * shrink
    in_ball = size.max() <= eps * (1 + 1e-5) + 1e-6
    in_cube = x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6
    if not (in_ball and in_cube):
        distance = f"{norm} {size.max():.6f} of {eps}"
        pixels = f"pixels {x_adv.min()} to {x_adv.max()}"
        raise RuntimeError(f"{name} left the threat model: {distance}, {pixels}")
    return x_adv
