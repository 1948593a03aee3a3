"""Classifiers made of a frozen diffusion model, to be evaluated like any other: x in [0, 1] to logits, gradients all the way.

  DiffusionClassifier   the class under which the network denoises best (Li et al., arXiv 2303.16203)
  DiffusionHead         a linear layer on the features of one block at one noise level (as in arXiv 2511.02793)

Both look at an image under `n_noise` draws of noise. They are fixed, one set for all images and classes, so that the classifier is
a function and an attack on it can be complete; or, with fresh=True, drawn anew at every pass: a randomised classifier, to be
attacked in expectation (evaluate.py --attack rand, or pgd with --eot).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import checkpoint
from common.cli import UserError

SIGMA_RANGE = (0.1, 3.0)  # of DiffusionClassifier: on digits, accuracy on held-out images is as good as in any narrower range tried
MAX_CALL = 2000  # images in one network call
HEAD = {  # entries of a head's file
    **{"dataset": str, "network_sha256": list, "block": str, "sigma": float, "val_accuracy": float},
    **{"weight": torch.Tensor, "bias": torch.Tensor},
}


def load(name, diffusion, spec, args):
    """The classifier `name` of evaluate.py's command line, on the data set `spec`; frozen, in eval mode.

    Raises UserError where the network has other classes or channels, or --checkpoint is no head of this very network.
    """
    flag = f"--teacher {args.teacher}"
    if name == "diffusion-classifier":
        diffusion.check_teaches(flag, spec, with_labels=True)
        model = DiffusionClassifier(diffusion, args.n_noise, args.fresh_noise, args.seed, args.keep_classes)
    else:
        diffusion.check_teaches(flag, spec, with_labels=False)
        head = checkpoint.load(args.checkpoint, HEAD)
        if (head["dataset"], head["network_sha256"]) != (spec.name, diffusion.sha256):
            raise UserError(f"{args.checkpoint}: a head for {head['dataset']} on another diffusion network than {flag}")
        diffusion.check_blocks([head["block"]])
        diffusion.check_sigmas([head["sigma"]])
        settings = (head[key] for key in ("block", "sigma", "weight", "bias"))
        try:
            model = DiffusionHead(diffusion, args.n_noise, args.fresh_noise, args.seed, *settings).to(diffusion.device)
            with torch.no_grad():
                fits = model(torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=diffusion.device))
        except (RuntimeError, IndexError):
            fits = torch.empty(0)
        if fits.shape != (1, spec.num_classes) or not fits.isfinite().all():
            raise UserError(f"{args.checkpoint}: weight {tuple(head['weight'].shape)} does not fit the block's features, or is not finite")
    return model.eval().requires_grad_(False)


class _Generative(nn.Module):
    def __init__(self, diffusion, n_noise, fresh, seed):
        super().__init__()
        self.diffusion, self.fresh = diffusion, fresh
        self.networks = nn.ModuleList(diffusion.modules)
        noise = torch.randn(n_noise, *diffusion.noise_shape, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("noise", noise.to(diffusion.device), persistent=False)

    def draws(self, x):
        """n_noise tensors of noise for the images x: (1, *noise_shape) where it is fixed, (B, *noise_shape) where it is fresh."""
        for fixed in self.noise.split(1):
            yield torch.randn(len(x), *fixed.shape[1:], device=fixed.device) if self.fresh else fixed


class DiffusionClassifier(_Generative):
    """logits_c = - ln(s_n / s_1) * mean_i |x - D(x + s_i n_i; s_i, c)|^2 / s_i^2 / d, over noise levels s_i even in ln s.

    Times d, the number of values of x, that is log p(x | c) but for a constant, as the diffusion ELBO bounds it (Kingma et al.,
    arXiv 2107.00630) within SIGMA_RANGE, and for equal class frequencies the logits of Bayes' rule. Per value, for the margins of
    whole images are so wide that the cross-entropy has no gradient left in float32: robust only to attacks that follow it.
    The weight 1 / s^2 makes it the error of the predicted noise, as in the paper; all classes see the same levels and noise.
    keep_classes=k: after a quarter of the levels, spread over the range, only the k best classes of an image go on (the
    paper's staged pruning, in two stages); the others end below them. Gradients recompute each network call instead of
    keeping what it leaves: memory is that of one, and of the encoder of latent models.
    """

    def __init__(self, diffusion, n_noise, fresh, seed, keep_classes=None):
        super().__init__(diffusion, n_noise, fresh, seed)
        low, high = (min(max(s, diffusion.sigma_range[0]), diffusion.sigma_range[1]) for s in SIGMA_RANGE)
        levels = torch.exp(torch.linspace(math.log(low), math.log(high), n_noise)) if n_noise > 1 else torch.tensor([(low * high) ** 0.5])
        first = [i for i in range(n_noise) if i % 4 == 2 or n_noise < 4]  # a quarter of them, from all of the range
        order = first + [i for i in range(n_noise) if i not in first]
        self.levels, self.n_first, self.scale = levels[order].tolist(), len(first), math.log(high / low)
        self.keep_classes = keep_classes

    def forward(self, x):
        """Logits (B, K) of images x (B, C, H, W) in [0, 1]."""
        clean = self.diffusion.encode(self._resized(x))
        n_classes = self.diffusion.num_classes
        classes = torch.arange(n_classes, device=x.device).expand(len(x), n_classes)
        total = torch.zeros(len(x), n_classes, device=x.device)
        pruned = None
        for i, (level, noise) in enumerate(zip(self.levels, self.draws(x))):
            if i == self.n_first and self.keep_classes and self.keep_classes < n_classes:
                best = total.topk(self.keep_classes, largest=False).indices
                classes, pruned, total = classes.gather(1, best), total / i, total.gather(1, best)
            total = total + self._errors(clean, noise, level, classes)
        logits = -self.scale * total / len(self.levels)
        if pruned is None:
            return logits
        # Below the survivors, in the order in which they stood.
        below = logits.amin(1, keepdim=True) - 1 - self.scale * (pruned - pruned.amin(1, keepdim=True))
        return below.scatter(1, classes, logits)

    def _errors(self, clean, noise, level, classes):
        """|x - D|^2 / s^2, (B, C), for the classes (B, C) of each image."""

        def error(clean, labels):
            n = labels.shape[1]
            noisy = (clean + level * noise).repeat_interleave(n, 0)
            denoised = self.diffusion.denoise(noisy, level, labels.flatten())
            return ((denoised - clean.repeat_interleave(n, 0)).flatten(1) / level).square().mean(1).view(-1, n)

        parts = classes.split(max(1, MAX_CALL // len(clean)), dim=1)
        if clean.requires_grad:
            return torch.cat([recompute(error, clean, part, use_reentrant=False) for part in parts], 1)
        return torch.cat([error(clean, part) for part in parts], 1)

    def _resized(self, x):
        size = self.diffusion.image_size
        return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


class DiffusionHead(_Generative):
    """Logits W g + b, averaged over the draws, of the pooled features g of a block under noise of level sigma; no label is given.

    `weight` (K, channels) and `bias` (K,) come from extract_features.py --save-head. Like a classifier it has its last layer in
    `logits`, and returns what that reads with with_features=True.
    """

    def __init__(self, diffusion, n_noise, fresh, seed, block, sigma, weight, bias):
        super().__init__(diffusion, n_noise, fresh, seed)
        self.block, self.sigma = block, sigma
        self.logits = nn.Linear(weight.shape[1], len(weight))
        self.logits.load_state_dict({"weight": weight, "bias": bias})

    def features(self, x, noise):
        """Pooled features (B, channels) under one draw of noise."""
        return self.diffusion.features(x, self.sigma, None, [self.block], noise)[0]

    def forward(self, x, with_features=False):
        draws = list(self.draws(x))
        if x.requires_grad and len(draws) > 1:  # memory is that of one draw
            features = [recompute(self.features, x, noise, use_reentrant=False) for noise in draws]
        else:
            features = [self.features(x, noise) for noise in draws]
        features = torch.stack(features).mean(0)
        return (self.logits(features), features) if with_features else self.logits(features)
