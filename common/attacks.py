"""Projected gradient descent (Madry et al., arXiv 1706.06083), shared by training and evaluation.

Conventions: x in [0, 1], NCHW; `eps` and `step_size` in the same units; the model returns logits.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def attack_mode(model, bn):
    """Freeze a model for an attack and leave no trace of it.

    bn="batch":   train mode, batch statistics, running statistics neither read nor updated (the base recipe);
    bn="running": eval mode.
    Every module's `training`, every BatchNorm's `track_running_stats` and every parameter's `requires_grad` is
    restored, also after an exception. Parameters are frozen: an attack needs no weight gradients.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    training = [m.training for m in modules]
    trainable = [p.requires_grad for p in parameters]
    try:
        model.train(bn == "batch")
        for parameter in parameters:
            parameter.requires_grad_(False)
        with frozen_statistics(model) if bn == "batch" else nullcontext():
            yield
    finally:
        for module, flag in zip(modules, training):
            module.training = flag
        for parameter, flag in zip(parameters, trainable):
            parameter.requires_grad_(flag)


@contextmanager
def frozen_statistics(model):
    """In train mode, BatchNorm uses the batch's statistics as always, and neither reads nor updates its running ones."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, flag in zip(norms, tracking):
            norm.track_running_stats = flag


def random_start(shape, norm, eps, generator):
    """Perturbations (B, C, H, W) uniform in the linf or l2 ball of radius eps, on the generator's device."""
    device = generator.device
    if norm == "linf":
        return (2 * torch.rand(shape, generator=generator, device=device) - 1) * eps
    direction = torch.randn(shape, generator=generator, device=device)
    radius = torch.rand(shape[0], generator=generator, device=device) ** (1 / direction[0].numel())
    return direction * (eps * radius / _l2(direction)).view(-1, 1, 1, 1)


def pgd(model, x, y, starts, *, norm, eps, step_size, n_steps, loss, bn="running", reference=None, best=False):
    """Adversarial images within eps of x and in [0, 1]; the model is left as it was.

    x: (B, C, H, W). y: (B,) labels, ignored by loss="kl". starts: one (B, C, H, W) perturbation per restart.
    loss: "ce" cross-entropy; "margin" max_{j != y} z_j - z_y; "kl" KL(p_reference || p_adv), where `reference` are
    logits (B, K), taken at x in the same mode if not given.
    best=False and one start: the last iterate, at no further cost (training). Otherwise, per image, the
    iterate (best=True) or the restart's last iterate that fools the model, or failing that has the highest loss.
    """
    x = x.detach()
    with attack_mode(model, bn):
        if loss == "kl" and reference is None:
            with torch.no_grad():
                reference = model(x)
        select = best or len(starts) > 1
        chosen, chosen_fools, chosen_loss = x, torch.zeros_like(y, dtype=torch.bool), torch.full_like(y, -torch.inf, dtype=x.dtype)
        for start in starts:
            x_adv = project(x + start, x, norm, eps)
            for step in range(n_steps + select):
                last = step == n_steps
                x_adv.requires_grad_(not last)
                logits = model(x_adv)
                losses = attack_losses(logits, y, loss, reference)
                if last or (best and step > 0):
                    fools = logits.detach().argmax(1) != y
                    better = (fools & ~chosen_fools) | ((fools == chosen_fools) & (losses.detach() > chosen_loss))
                    chosen = torch.where(better.view(-1, 1, 1, 1), x_adv.detach(), chosen)
                    chosen_fools, chosen_loss = chosen_fools | fools, torch.where(better, losses.detach(), chosen_loss)
                if not last:
                    # A sum, so that an image's gradient does not depend on the size of its batch.
                    (gradient,) = torch.autograd.grad(losses.sum(), x_adv)
                    x_adv = project(ascend(x_adv.detach(), gradient, norm, step_size), x, norm, eps)
    return chosen if select else x_adv.detach()


def apgd(model, x, y, *, norm, eps, n_steps, loss="ce", bn="running"):
    """Adversarial images of Auto-PGD (Croce & Hein, arXiv 2003.01690) from x itself: the iterate of highest loss per image.

    The step starts at 2 eps and is halved, back at the best iterate, at checkpoints where too few steps (75 %) raised the
    loss; momentum 0.75 from the second step on. With n_steps=2 it is the attack of ImageNet training in Singh et al.
    (arXiv 2303.01870). Arguments as in `pgd`, of which it leaves the model as it was, too.
    """
    interval, shortest, shrink = (max(int(share * n_steps), 1) for share in (0.22, 0.06, 0.03))
    x = x.detach()
    x_adv = previous = best = x
    step_size = torch.full((len(x), 1, 1, 1), 2 * eps, dtype=x.dtype, device=x.device)
    n_raised, since = torch.zeros(len(x), device=x.device), 0  # since the last checkpoint
    halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with attack_mode(model, bn):
        for step in range(n_steps + 1):
            last = step == n_steps
            x_adv = x_adv.detach().requires_grad_(not last)
            losses = attack_losses(model(x_adv), y, loss)
            gradient = torch.zeros_like(x) if last else torch.autograd.grad(losses.sum(), x_adv)[0]
            x_adv, losses = x_adv.detach(), losses.detach()
            if step == 0:
                best_loss = best_at_checkpoint = before = losses
                best_gradient = gradient
            else:
                better = losses > best_loss
                best = torch.where(better.view(-1, 1, 1, 1), x_adv, best)
                best_gradient = torch.where(better.view(-1, 1, 1, 1), gradient, best_gradient)
                best_loss = torch.where(better, losses, best_loss)
                # The first step is not counted against the start, but against 0: so it is in the authors' code.
                n_raised, since, before = n_raised + (losses > (before if step > 1 else 0)), since + 1, losses
                if since == interval and not last:
                    stuck = (n_raised <= 0.75 * since) | (~halved & (best_at_checkpoint >= best_loss))
                    step_size = torch.where(stuck.view(-1, 1, 1, 1), step_size / 2, step_size)
                    x_adv = torch.where(stuck.view(-1, 1, 1, 1), best, x_adv)
                    gradient = torch.where(stuck.view(-1, 1, 1, 1), best_gradient, gradient)
                    halved, best_at_checkpoint = stuck, best_loss
                    n_raised, since, interval = torch.zeros_like(n_raised), 0, max(interval - shrink, shortest)
            if not last:
                stepped = project(ascend(x_adv, gradient, norm, step_size), x, norm, eps)
                momentum = 0.75 if step > 0 else 1.0
                stepped = project(x_adv + momentum * (stepped - x_adv) + (1 - momentum) * (x_adv - previous), x, norm, eps)
                previous, x_adv = x_adv, stepped
    return best


def attack_losses(logits, y, loss, reference=None):
    """The attacker's objective per image, (B,), in at least float32: half-precision logits are raised first.

    y: (B,) labels or, for "ce", (B, K) probabilities.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if loss == "margin":
        others = logits.scatter(1, y[:, None], -torch.inf)
        return others.amax(1) - logits.gather(1, y[:, None])[:, 0]
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(reference.to(logits.dtype), 1), reduction="none", log_target=True).sum(1)


def ascend(x_adv, gradient, norm, step_size):
    """One step of steepest ascent: the gradient's sign (linf) or its direction (l2) times step_size."""
    if norm == "linf":
        return x_adv + step_size * gradient.sign()
    return x_adv + step_size * gradient / (_l2(gradient) + 1e-12).view(-1, 1, 1, 1)


def project(x_adv, x, norm, eps):
    """Into the eps-ball around x, then into [0, 1] (which cannot leave the ball, since x is in [0, 1])."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    return (x + delta * (eps / (_l2(delta) + 1e-12)).clamp(max=1).view(-1, 1, 1, 1)).clamp(0, 1)


def in_threat_model(x_adv, x, name, norm, eps):
    """x_adv; an error where an attack left the ball or [0, 1], for it would understate robustness.

    In l1 the package's projection, a cumulative sum over all pixels in float32, overshoots by up to some per cent on large
    images: those are pulled back towards x onto the ball, and judged there.
    """
    delta = (x_adv - x).flatten(1)
    size = delta.norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)
    if norm == "l1":
        shrink = (eps / size).clamp(max=1).where(size > eps * (1 + 1e-5), 1.0)
        x_adv, size = torch.where((shrink < 1).view(-1, 1, 1, 1), x + (x_adv - x) * shrink.view(-1, 1, 1, 1), x_adv), size * shrink
    if not (size.max() <= eps * (1 + 1e-5) + 1e-6 and x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6):
        raise RuntimeError(f"{name} left the threat model: {norm} {size.max():.6f} of {eps}, pixels {x_adv.min()} to {x_adv.max()}")
    return x_adv


def _l2(batch):
    return batch.flatten(1).norm(dim=1)
