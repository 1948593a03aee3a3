"""AutoAttack (Croce & Hein, arXiv 2003.01690) by the authors' own package, pyautoattack.

The attacks and their constants are the package's. Nothing of its code is repeated here: its objects
are changed from outside, so that work which cannot change a verdict is left out. PGD of our own is
in common/attacks.py.

  APGD    An image that is clearly fooled leaves the run, and keeps its fooling point. The package
          goes on with it to the last step, and returns its last fooling point.
  Square  A proposal that equals the point it starts from has that point's loss, so it is not passed
          through the model. (In linf, all pixels of a patch may lie at that bound already.)
  FAB     It calls backward(). The caller freezes the model's parameters, so that no gradients of
          weights are computed.

The package treats every image by itself, so the other images of a batch are attacked as if those
that left were still there. But kernels may round differently in a small batch: none gets below
MIN_ROWS.
"""

import logging
from contextlib import contextmanager

import torch
import torch.nn.functional as F

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}

# On CPUs, gradients of WRNs were equal to the bit in batches of 16 and of 200, and not of 3.
MIN_ROWS = 16


def attack(name, model, x, y, *, norm, eps, seed, n_classes=10, version="standard"):
    """Adversarial images (B, C, H, W) of one attack, as AutoAttack runs it on one batch.

    name: "apgd-ce", "apgd-t", "fab-t" or "square" of version "standard"; "apgd-ce" or "apgd-dlr" of
    version "rand", which is for randomised models: 20 passes a step, and nothing is left out.
    model: returns logits; in eval mode, its parameters frozen. x: images in [0, 1] that the model
    classifies correctly. y: (B,) labels. eps: radius in units of x. n_classes: with less than ten,
    all other classes are targets; with less than four, DLR sees logits that are padded.
    """
    from pyautoattack import AutoAttack

    if n_classes < 4 and name in ("apgd-t", "apgd-dlr"):
        model = PaddedModel(model)

    x = x.contiguous()  # the package reshapes by view(), which channels-last images do not allow
    package = AutoAttack(
        model, norm=NORMS[norm], eps=eps, seed=seed, version=version, device=x.device
    )
    for targeted in (package.fab, package.apgd_targeted):  # the package's: 9, in l1 5 for APGD
        targeted.n_target_classes = min(targeted.n_target_classes, n_classes - 1)
    if name == "fab-t":
        package.fab.targeted = True
        package.fab.n_restarts = 1
        return package.fab.perturb(x, y)
    if name == "square":
        skip_unchanged(package.square)
        return package.square.perturb(x, y)
    if name == "apgd-t":
        apgd = package.apgd_targeted
    else:
        apgd = package.apgd
        apgd.loss = name.removeprefix("apgd-")
    if version == "standard":
        leave_when_fooled(apgd)
    return apgd.perturb(x, y)


def apgd_ce(model, x, y, *, norm, eps, seed, n_steps):
    """Adversarial images (B, C, H, W) of the package's APGD-CE with one random start.

    n_steps: 100 in the standard version. Other arguments as in `attack`.
    """
    from pyautoattack.autopgd_base import APGDAttack

    settings = dict(n_iter=n_steps, n_restarts=1, loss="ce", norm=NORMS[norm], eps=eps, seed=seed)
    apgd = APGDAttack(model, device=x.device, **settings)
    leave_when_fooled(apgd)
    return apgd.perturb(x.contiguous(), y)


def highest_loss(model, x, y, *, norm, eps, seed, n_steps):
    """Images (B, C, H, W) where the package's APGD-CE found the highest loss, fooled or not.

    Arguments as in `apgd_ce`.
    """
    from pyautoattack.autopgd_base import APGDAttack

    settings = dict(n_iter=n_steps, loss="ce", norm=NORMS[norm], eps=eps, seed=seed)
    apgd = APGDAttack(model, device=x.device, **settings)
    torch.manual_seed(seed)
    return apgd.perturb(x.contiguous(), y, best_loss=True).detach()


def square(model, x, y, *, norm, eps, seed, n_queries):
    """Adversarial images (B, C, H, W) of the package's Square, which asks for no gradient.

    The size of its squares follows n_queries, that of AutoAttack's does not. Other arguments as in
    `attack`.
    """
    from pyautoattack.square import SquareAttack

    settings = dict(n_queries=n_queries, norm=NORMS[norm], eps=eps, seed=seed)
    package = SquareAttack(model, device=x.device, **settings)
    skip_unchanged(package)
    return package.perturb(x.contiguous(), y)


# ---------------------------------------------------------------------------------------- APGD


class PaddedModel(torch.nn.Module):
    """A model of two or three classes with logits of four: DLR divides by z_1 - (z_3 + z_4) / 2.

    The new ones are constants just below the lowest logit, so that no prediction changes.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        lowest = logits.detach().amin(1, keepdim=True) - 1
        return torch.cat([logits, lowest.expand(-1, 4 - logits.shape[1])], 1)


def leave_when_fooled(apgd):
    """Make an APGDAttack pass an image through its model until it is fooled, and not after."""
    run = apgd.attack_single_run

    def attack_single_run(x, y, x_init=None):
        # In l1, two runs in larger balls look for a start first. Nobody is fooled in those.
        if apgd.eps != apgd.eps_orig:
            return run(x, y, x_init)
        model = apgd.model
        apgd.model = _ModelOfActiveImages(model, y)
        try:
            return run(x, y, x_init)
        finally:
            apgd.model = model

    apgd.attack_single_run = attack_single_run


class _ModelOfActiveImages:
    """Real logits for images that are not fooled yet, constant ones for images that left.

    The constant logits are one-hot at the label: APGD takes such an image for correctly classified,
    and keeps the fooling point that it has. Images that left but fill a small batch get their real
    logits; where those are wrong, APGD takes the present point, which fools the model as well.
    """

    def __init__(self, model, y):
        self.model = model
        self.y = y
        self.active = torch.ones_like(y, dtype=torch.bool)
        self.n_classes = None

    def __call__(self, x):
        if self.active.all():
            logits = self.model(x)
        elif self.active.any():
            rows = padded(self.active)
            computed = self.model(x[rows])
            constant = F.one_hot(self.y, self.n_classes).to(computed)
            logits = constant.index_copy(0, rows, computed)
        else:
            constant = F.one_hot(self.y, self.n_classes).to(x)
            # APGD still asks autograd for a gradient, so the logits must depend on x: with slope 0.
            logits = constant + 0.0 * x.flatten(1).sum(1, keepdim=True)
        self.n_classes = logits.shape[1]
        self.active = self.active & ~_clearly_fooled(logits.detach(), self.y)
        return logits


def _clearly_fooled(logits, y):
    """(B,) bool: misclassified by more than the rounding of another batch or device could undo."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    margin = others - logits.gather(1, y[:, None])[:, 0]
    return margin > 1e-3 * logits.norm(dim=1)


def padded(wanted):
    """Row numbers, ascending, of the rows where `wanted` (B,) is true.

    Some other rows are added where they are fewer than MIN_ROWS.
    """
    rows = torch.nonzero(wanted).squeeze(1)
    if len(rows) < MIN_ROWS:
        others = torch.nonzero(~wanted).squeeze(1)[: MIN_ROWS - len(rows)]
        rows = torch.cat([rows, others]).sort().values
    return rows


# -------------------------------------------------------------------------------------- Square


def skip_unchanged(square):
    """Make a SquareAttack pass only those proposals through its model that change an image."""
    run = square.attack_single_run
    compute = square.margin_and_loss

    def attack_single_run(x, y):
        square.margin_and_loss = _MarginOfChangedImages(compute)
        return run(x, y)

    square.attack_single_run = attack_single_run


class _MarginOfChangedImages:
    """SquareAttack.margin_and_loss, computed only where a proposal differs from its start.

    Follows the best point, margin and loss of every image that was not fooled at the last call.
    """

    def __init__(self, compute):
        self.compute = compute
        self.best_x = None

    def __call__(self, x, y):
        if self.best_x is None:
            self.best_x = x
            self.best_margin, self.best_loss = self.compute(x, y)
            return self.best_margin, self.best_loss

        # Square goes on with the images that are not fooled, and x holds their proposals.
        active = self.best_margin > 0
        start = self.best_x[active]
        start_margin = self.best_margin[active]
        start_loss = self.best_loss[active]
        margin = start_margin.clone()
        loss = start_loss.clone()
        changed = (x != start).flatten(1).any(1)
        if changed.any():
            rows = padded(changed)
            margin[rows], loss[rows] = self.compute(x[rows], y[rows])

        # Square's own rules of what it takes over.
        better = (loss < start_loss) | (margin <= 0)
        self.best_x = torch.where(better.view(-1, 1, 1, 1), x, start)
        self.best_margin = torch.where(better, margin, start_margin)
        self.best_loss = torch.where(loss < start_loss, loss, start_loss)
        return margin, loss


# ------------------------------------------------------------------------------------ warnings


@contextmanager
def collected_warnings():
    """Yield a set that the package's warnings go to as texts, instead of to the terminal."""
    texts = set()

    class Handler(logging.Handler):
        def emit(self, record):
            texts.add(record.getMessage().removesuffix(" See flags_doc.md for details."))

    logger = logging.getLogger("auto-attack")
    handler = Handler(logging.WARNING)
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
