"""AutoAttack (Croce & Hein, arXiv 2003.01690): the authors' package pyautoattack, its attacks unchanged, with its constants.

What cannot change a verdict is not computed, and nothing of their code is repeated here: their objects are steered from outside.

  APGD    an image that is clearly fooled leaves the run: it is no longer passed through the model (but to fill a small batch),
          and keeps its fooling point. Theirs goes on to the last step with it and returns the last fooling point.
  Square  a proposal that equals the point it starts from (in linf, a patch whose pixels all lie at that bound already) has
          the loss of that point: it is not passed through the model.
  FAB     calls backward(): on a model whose parameters are frozen it computes no weight gradients. The caller freezes.

All arithmetic of theirs is per image, so the rest of a batch goes its way as if the others were there; but a kernel may
round differently in another batch. A batch is never cut below MIN_ROWS images, for there kernels differ.
"""

import logging

import torch
from torch import nn

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
MIN_ROWS = 16  # on CPUs, gradients of WRNs were bit-equal in batches of 16 and of 200, and were not in batches of 3


def attack(name, model, x, y, *, norm, eps, seed, version="standard"):
    """Adversarial images (B, C, H, W) of one attack on one batch, as pyautoattack's own driver runs it on a batch.

    name: apgd-ce, apgd-t, fab-t or square of version "standard"; apgd-ce or apgd-dlr of version "rand" (20 passes a step,
    for randomised models; nothing is left out there). x: in [0, 1], images that the model classifies correctly. eps: radius
    in [0, 1] units. The model returns logits, is in eval mode, and its parameters are frozen.
    """
    from pyautoattack import AutoAttack

    x = x.contiguous()  # theirs reshapes by view(): images in channels-last order of more than one channel end in an error
    theirs = AutoAttack(model, norm=NORMS[norm], eps=eps, seed=seed, version=version, device=x.device)
    if name == "fab-t":
        theirs.fab.targeted, theirs.fab.n_restarts = True, 1
        return theirs.fab.perturb(x, y)
    if name == "square":
        skip_unchanged(theirs.square)
        return theirs.square.perturb(x, y)
    apgd = theirs.apgd_targeted if name == "apgd-t" else theirs.apgd
    if name != "apgd-t":
        apgd.loss = name.removeprefix("apgd-")
    if version == "standard":
        leave_when_fooled(apgd)
    return apgd.perturb(x, y)


def apgd_ce(model, x, y, *, norm, eps, seed, n_steps):
    """Adversarial images of their APGD-CE with one start and another number of steps than the standard's 100."""
    from pyautoattack.autopgd_base import APGDAttack

    x = x.contiguous()
    apgd = APGDAttack(model, n_iter=n_steps, norm=NORMS[norm], n_restarts=1, eps=eps, seed=seed, loss="ce", device=x.device)
    leave_when_fooled(apgd)
    return apgd.perturb(x, y)


def leave_when_fooled(apgd):
    """Make an APGDAttack pass an image through its model until it is fooled, and not after."""
    run = apgd.attack_single_run

    def attack_single_run(x, y, x_init=None):
        model = apgd.model
        if apgd.eps == apgd.eps_orig:  # l1's first two runs, in larger balls, only look for a start: nobody is fooled there
            apgd.model = _Leaving(model, y)
        try:
            return run(x, y, x_init)
        finally:
            apgd.model = model

    apgd.attack_single_run = attack_single_run


class _Leaving:
    """Logits of the images that are still here; one-hot at the label, without a gradient, for those that left.

    To APGD, who left is correctly classified: it keeps the fooling point that it has. Rows that only fill a batch have their
    logits: where those are wrong, APGD takes that point, a fooling one too.
    """

    def __init__(self, model, y):
        self.model, self.y, self.here = model, y, torch.ones_like(y, dtype=torch.bool)

    def __call__(self, x):
        if self.here.all():
            logits = self.model(x)
        elif self.here.any():
            rows = padded(self.here)
            kept = self.model(x[rows])
            logits = self.gone(kept.shape[1], kept).index_copy(0, rows, kept)
        else:
            logits = self.gone(self.n_classes, x) + 0 * x.flatten(1).sum(1, keepdim=True)
        self.n_classes = logits.shape[1]
        self.here = self.here & ~_clearly_fooled(logits.detach(), self.y)
        return logits

    def gone(self, n_classes, like):
        return nn.functional.one_hot(self.y, n_classes).to(like)


def _clearly_fooled(logits, y):
    """(B,) bool: misclassified by more than the rounding of another batch, device or compiler could undo; others stay in."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, y[:, None])[:, 0] > 1e-3 * logits.norm(dim=1)


def skip_unchanged(square):
    """Make a SquareAttack pass only those proposals through its model that differ from the point they start from."""
    run, evaluate = square.attack_single_run, square.margin_and_loss
    best = {}  # point, margin and loss of the images that were not fooled at the last query

    def attack_single_run(x, y):
        best.clear()
        return run(x, y)

    def margin_and_loss(x, y):
        if not best:
            margin, loss = evaluate(x, y)
            best.update(x=x, margin=margin, loss=loss)
            return margin, loss
        left = best["margin"] > 0  # the images that theirs goes on with, and calls this with
        start, margin, loss = (best[key][left] for key in ("x", "margin", "loss"))
        new_margin, new_loss = margin.clone(), loss.clone()
        changed = (x != start).flatten(1).any(1)
        if changed.any():
            rows = padded(changed)
            new_margin[rows], new_loss[rows] = evaluate(x[rows], y[rows])
        better = (new_loss < loss) | (new_margin <= 0)
        point = torch.where(better.view(-1, 1, 1, 1), x, start)
        best.update(x=point, margin=torch.where(better, new_margin, margin), loss=torch.where(new_loss < loss, new_loss, loss))
        return new_margin, new_loss

    square.attack_single_run, square.margin_and_loss = attack_single_run, margin_and_loss


def padded(wanted):
    """Row numbers, ascending, of the wanted rows and, up to MIN_ROWS of them, of some others."""
    rows = torch.nonzero(wanted).squeeze(1)
    if len(rows) < MIN_ROWS:
        others = torch.nonzero(~wanted).squeeze(1)[: MIN_ROWS - len(rows)]
        rows = torch.cat([rows, others]).sort().values
    return rows


class Warnings(logging.Handler):
    """Collects what pyautoattack warns of; drain() gives and forgets."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        logger = logging.getLogger("auto-attack")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record):
        self.messages.append(record.getMessage().removesuffix(" See flags_doc.md for details."))

    def drain(self):
        messages, self.messages = sorted(set(self.messages)), []
        return messages
