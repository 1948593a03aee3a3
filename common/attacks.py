"""The attacks that training and evaluation share: PGD (Madry et al., arXiv 1706.06083) and APGD.

Several restarts, AutoAttack and the check of the threat model stand in evaluation/.
Images x are (B, C, H, W) in [0, 1]; eps and step_size are in the same units. A model maps images to
logits (B, K). Attacks take it as it stands, so it should be frozen and in eval mode; of a model in
training, its twin is attacked (make_twin).
"""

import copy
import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What autocast computes in bf16, by the type of the layer.
PRODUCTS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)

# -------------------------------------------------------------------------------------- the attacks


def pgd(model, x, y, start, *, norm, eps, step_size, n_steps, loss, reference=None, compiled=False):
    """Return the last iterate of PGD: images within eps of x and in [0, 1].

    y: (B,) labels; the loss "kl" does not use them.
    start: (B, C, H, W), the perturbation that the attack starts from.
    loss: the objective, see attack_losses.
    reference: logits (B, K) for the loss "kl". None: the model's own logits at x.
    compiled: run a step as one graph of torch.compile.
    """
    x = x.detach()
    if loss == "kl" and reference is None:
        with torch.no_grad():
            reference = model(x)
    step = _compiled(pgd_step) if compiled else pgd_step
    x_adv = project(x + start, x, norm, eps)
    for _ in range(n_steps):
        x_adv = step(model, x_adv, x, y, reference, norm, eps, step_size, loss)
    return x_adv


def pgd_step(model, x_adv, x, y, reference, norm, eps, step_size, loss):
    """One step of PGD: the next iterate. The arguments are those of pgd."""
    _, gradient = losses_and_gradient(model, x_adv, y, loss, reference)
    return project(ascend(x_adv, gradient, norm, step_size), x, norm, eps)


def apgd(model, x, y, *, norm, eps, n_steps, loss="ce", compiled=False):
    """Return each image's iterate of highest loss of Auto-PGD, started at x itself.

    Source: Croce & Hein, arXiv 2003.01690. The step size starts at 2 eps. At checkpoints it is
    halved for an image whose loss rose in 75 % of the steps or fewer; or, if it was not halved at
    the last checkpoint, whose best loss has not grown since then. That image goes back to its best
    iterate. Momentum is 0.75 from the second step on. With n_steps=2 this is the attack in the
    ImageNet training of Singh et al. (arXiv 2303.01870).
    The arguments are those of pgd; y may also be (B, K) label probabilities.
    """
    interval = max(int(0.22 * n_steps), 1)  # steps from one checkpoint to the next
    shortest_interval = max(int(0.06 * n_steps), 1)
    shrink = max(int(0.03 * n_steps), 1)
    x = x.detach()
    step_size = torch.full((len(x), 1, 1, 1), 2 * eps, dtype=x.dtype, device=x.device)
    # Since the last checkpoint: the number of steps, and per image of those that raised the loss.
    n_since = 0
    n_raised = torch.zeros(len(x), device=x.device)
    halved = torch.ones(len(x), dtype=torch.bool, device=x.device)  # at the last checkpoint

    gradient_of = _compiled(losses_and_gradient) if compiled else losses_and_gradient
    losses, gradient = gradient_of(model, x, y, loss)
    x_adv = previous = best = x
    best_gradient = gradient
    best_losses = checkpoint_losses = losses
    # As in the authors' code, the first step counts as raised where its loss is above 0.
    losses_before = torch.zeros_like(losses)

    for step in range(1, n_steps + 1):
        stepped = project(ascend(x_adv, gradient, norm, step_size), x, norm, eps)
        momentum = 0.75 if step > 1 else 1.0
        moved = x_adv + momentum * (stepped - x_adv) + (1 - momentum) * (x_adv - previous)
        previous = x_adv
        x_adv = project(moved, x, norm, eps)

        if step < n_steps:
            losses, gradient = gradient_of(model, x_adv, y, loss)
        else:
            with torch.no_grad():
                losses = attack_losses(model(x_adv), y, loss)
        better = losses > best_losses
        best = _choose(better, x_adv, best)
        best_gradient = _choose(better, gradient, best_gradient)
        best_losses = torch.where(better, losses, best_losses)
        n_raised = n_raised + (losses > losses_before)
        n_since += 1
        losses_before = losses

        if n_since == interval:
            no_progress = ~halved & (checkpoint_losses >= best_losses)
            halved = (n_raised <= 0.75 * n_since) | no_progress
            step_size = _choose(halved, step_size / 2, step_size)
            x_adv = _choose(halved, best, x_adv)
            gradient = _choose(halved, best_gradient, gradient)
            checkpoint_losses = best_losses
            n_raised = torch.zeros_like(n_raised)
            n_since = 0
            interval = max(interval - shrink, shortest_interval)
    return best


def random_start(shape, norm, eps, generator):
    """Draw perturbations (B, C, H, W) uniform in the eps-ball, on the generator's device."""
    device = generator.device
    if norm == "linf":
        return (2 * torch.rand(shape, generator=generator, device=device) - 1) * eps
    direction = torch.randn(shape, generator=generator, device=device)
    radius = torch.rand(shape[0], generator=generator, device=device).view(-1, 1, 1, 1)
    radius = radius ** (1 / direction[0].numel())
    return direction * (eps * radius / _l2_norm(direction))


# ------------------------------------------------------------------------------- parts of an attack


def attack_losses(logits, y, loss, reference=None):
    """Return what the attack maximises, (B,) per image, in float32 or float64.

    loss: "ce" is the cross-entropy with y, (B,) labels or (B, K) probabilities. "margin" is the
    largest other logit minus the logit of y. "kl" is KL(softmax(reference) || softmax(logits)).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if loss == "margin":
        others = logits.scatter(1, y[:, None], -torch.inf)
        return others.amax(1) - logits.gather(1, y[:, None])[:, 0]
    log_probs = F.log_softmax(logits, 1)
    reference_log_probs = F.log_softmax(reference.to(logits.dtype), 1)
    return F.kl_div(log_probs, reference_log_probs, reduction="none", log_target=True).sum(1)


def ascend(x_adv, gradient, norm, step_size):
    """Take one step of steepest ascent: along the gradient's sign (linf) or its direction (l2)."""
    if norm == "linf":
        return x_adv + step_size * gradient.sign()
    return x_adv + step_size * gradient / (_l2_norm(gradient) + 1e-12)


def project(x_adv, x, norm, eps):
    """Project onto the eps-ball around x, then onto [0, 1]. The second step stays in the ball."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    shrink = (eps / (_l2_norm(delta) + 1e-12)).clamp(max=1)
    return (x + delta * shrink).clamp(0, 1)


def losses_and_gradient(model, x_adv, y, loss, reference=None):
    """Return the losses (B,) at x_adv and their gradient with respect to it."""

    def total(images):
        losses = attack_losses(model(images), y, loss, reference)
        # A sum and no mean, so that an image's gradient does not depend on the size of its batch.
        return losses.sum(), losses

    if torch.compiler.is_compiling():  # torch.compile knows this form alone
        gradient, (_, losses) = torch.func.grad_and_value(total, has_aux=True)(x_adv)
        return losses, gradient
    x_adv = x_adv.detach().requires_grad_(True)
    loss_sum, losses = total(x_adv)
    (gradient,) = torch.autograd.grad(loss_sum, x_adv)
    return losses.detach(), gradient


@functools.cache
def _compiled(function):
    """The function as one graph, compiled at its first call for each shape."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _choose(mask, images, others):
    """Image by image, `images` where the mask (B,) is true and `others` elsewhere."""
    return torch.where(mask.view(-1, 1, 1, 1), images, others)


def _l2_norm(images):
    """The l2 norm of each image, (B, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


# ------------------------------------------------------------------- attacks on a model in training


def make_twin(model, bn, precision):
    """A frozen copy of a classifier, to be attacked in its place while the model is in training.

    It shares the weights, but has a mode of its own, so that the attack leaves the model's
    gradients and BatchNorm statistics alone.
    bn: how its BatchNorm behaves. "batch": by the statistics of the images that it sees, as in
    training, which leave no trace (DM-AT's recipe). "running": by the model's running ones.
    precision: with "bf16" the weights of its products are cast here, once, and not at every pass;
    update_twin casts them again. All else is shared with the model and follows it.
    """
    twin = copy.deepcopy(model)
    for module, original in zip(twin.modules(), model.modules()):
        for name, parameter in original.named_parameters(recurse=False):
            value = parameter.detach()
            if (
                precision == "bf16"
                and isinstance(original, PRODUCTS)
                and original is not model.logits
            ):
                value = value.to(torch.bfloat16)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in original.named_buffers(recurse=False):
            setattr(module, name, buffer)
        if isinstance(module, _BatchNorm):
            module.track_running_stats = bn == "running"
    return twin.train(bn == "batch")


@torch.no_grad()
def update_twin(twin, model):
    """Cast the model's weights again, after it was trained."""
    pairs = zip(twin.parameters(), model.parameters())
    pairs = [(mine, theirs) for mine, theirs in pairs if mine.dtype != theirs.dtype]
    if pairs:
        mine, theirs = zip(*pairs)
        torch._foreach_copy_(mine, theirs)


@contextmanager
def frozen_statistics(model):
    """Let BatchNorm in train mode use the batch's statistics without updating its running ones."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
