"""Classifiers made of a frozen diffusion model: x in [0, 1] to logits, differentiable throughout.

  DiffusionClassifier   the class under which the network denoises best (arXiv 2303.16203)
  DiffusionHead         a linear layer on the features of one block (as in arXiv 2511.02793)

The diffusion models themselves stand beside this file, and how classifiers are attacked in
evaluation/. Both classifiers look at an image under several draws of noise. With fixed noise, one
set for all images and classes, the classifier is a function, and an attack on it can be complete.
With fresh noise at every pass it is randomised, and an attack must follow the expectation.
"""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from common import UserError, files

# Noise levels of DiffusionClassifier. On held-out digits, no narrower range that was tried has a
# higher accuracy.
SIGMA_RANGE = (0.1, 3.0)
MAX_CALL = 2000  # images in one network call

HEAD = {  # entries of a head's file, as extract_features.py writes it
    "dataset": str,
    "network_sha256": str,
    "precision": str,
    "block": str,
    "sigma": float,
    "val_accuracy": float,
    "weight": torch.Tensor,
    "bias": torch.Tensor,
}


def load(
    name, diffusion, spec, head_path=None, *, n_noise, fresh_noise=False, seed=0, keep_classes=None
):
    """The classifier "diffusion-classifier" or "diffusion-head" of a diffusion model, frozen.

    spec: the data set. head_path: the file of a head. n_noise: draws of noise per image.
    fresh_noise: draw them anew at every pass. keep_classes: see DiffusionClassifier.
    Raises UserError where the network has other classes or channels than the data set, or the file
    is no head of this very network.
    """
    if name == "diffusion-classifier":
        diffusion.check_teaches(diffusion.name, spec, with_labels=True)
        model = DiffusionClassifier(diffusion, n_noise, fresh_noise, seed, keep_classes)
    else:
        diffusion.check_teaches(diffusion.name, spec, with_labels=False)
        model = _load_head(head_path, diffusion, spec, n_noise, fresh_noise, seed)
    return model.eval().requires_grad_(False)


def _load_head(path, diffusion, spec, n_noise, fresh_noise, seed):
    """The DiffusionHead of a file that extract_features.py wrote."""
    head = files.load(path, HEAD)
    if head["dataset"] != spec.name:
        raise UserError(f"{path}: a head for {head['dataset']}, expected one for {spec.name}")
    spec.check_classes(path, head.get("classes"))
    if head["network_sha256"] != diffusion.sha256:
        raise UserError(f"{path}: a head on another diffusion network")
    if head["precision"] != diffusion.precision:
        expected = f"the network is in {diffusion.precision}, see --precision"
        raise UserError(f"{path}: a head on features in {head['precision']}; {expected}")
    diffusion.check_places(path, [head["block"]], [head["sigma"]])
    settings = {key: head[key] for key in ("block", "sigma", "weight", "bias")}
    x = torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=diffusion.device)
    with files.reading(path, "a head for this network"), torch.no_grad():
        model = DiffusionHead(diffusion, n_noise, fresh_noise, seed, **settings)
        model = model.to(diffusion.device)
        logits = model(x)
    if logits.shape != (1, spec.num_classes):
        raise UserError(f"{path}: {logits.shape[1]} classes, {spec.name} has {spec.num_classes}")
    if not logits.isfinite().all():
        raise UserError(f"{path}: its logits are not finite")
    return model


class _Generative(nn.Module):
    """What both share: the network and its draws of noise."""

    def __init__(self, diffusion, n_noise, fresh, seed):
        super().__init__()
        self.diffusion = diffusion
        self.networks = nn.ModuleList(diffusion.modules)
        self.fresh = fresh
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n_noise, *diffusion.noise_shape, generator=generator)
        self.register_buffer("noise", noise.to(diffusion.device), persistent=False)

    def draws(self, x):
        """Yield n_noise tensors of noise for the images x, one at a time.

        Fixed noise is (1, *noise_shape), the same for all images; fresh is (B, *noise_shape).
        """
        for noise in self.noise.split(1):
            if self.fresh:
                noise = torch.randn(len(x), *noise.shape[1:], device=noise.device)
            yield noise


class DiffusionClassifier(_Generative):
    """logits_c = -ln(s_n / s_1) * mean_i |x - D(x + s_i n_i; s_i, c)|^2 / s_i^2 / d.

    s_1 < ... < s_n: noise levels, evenly spaced in ln s within SIGMA_RANGE. n_i: a draw of noise
    for each. d: the number of values of x. All classes see the same levels and noise.

    Times d, this is log p(x | c) but for a constant, as the diffusion ELBO bounds it (Kingma et
    al., arXiv 2107.00630); with equal class frequencies they are the logits of Bayes' rule. The
    weight 1 / s^2 makes it the error of the predicted noise, as in arXiv 2303.16203. It is divided
    by d because the margins of whole images are so wide that the cross-entropy would have no
    gradient left in float32: such a classifier looks robust to attacks on the cross-entropy.

    keep_classes: after the first quarter of the levels, which is spread over the range, only this
    many best classes of an image go on (the paper's staged pruning, in two stages). The others
    end below them. None keeps all.
    """

    def __init__(self, diffusion, n_noise, fresh, seed, keep_classes=None):
        super().__init__(diffusion, n_noise, fresh, seed)
        lowest, highest = diffusion.sigma_range
        low, high = (min(max(sigma, lowest), highest) for sigma in SIGMA_RANGE)
        levels = torch.exp(torch.linspace(math.log(low), math.log(high), n_noise))
        if n_noise == 1:
            levels = torch.tensor([(low * high) ** 0.5])
        first = [i for i in range(n_noise) if i % 4 == 2 or n_noise < 4]
        order = first + [i for i in range(n_noise) if i not in first]
        self.levels = levels[order].tolist()
        self.n_first = len(first)
        self.scale = math.log(high / low)
        self.keep_classes = keep_classes

    def forward(self, x):
        """Logits (B, K) of images x (B, C, H, W) in [0, 1]."""
        clean = self.diffusion.encode(self.diffusion.resize(x))
        n_classes = self.diffusion.num_classes
        prune = self.keep_classes is not None and self.keep_classes < n_classes
        classes = torch.arange(n_classes, device=x.device).expand(len(x), n_classes)
        total = torch.zeros(len(x), n_classes, device=x.device)
        early = None
        for i, (level, noise) in enumerate(zip(self.levels, self.draws(x))):
            if i == self.n_first and prune:
                best = total.topk(self.keep_classes, largest=False).indices
                early = total / i  # of all classes
                classes = classes.gather(1, best)
                total = total.gather(1, best)
            total = total + self._errors(clean, noise, level, classes)
        logits = -self.scale * total / len(self.levels)
        if early is None:
            return logits
        # The pruned classes end below the others, in the order in which they stood.
        distance = self.scale * (early - early.amin(1, keepdim=True))
        below = logits.amin(1, keepdim=True) - 1 - distance
        return below.scatter(1, classes, logits)

    def _errors(self, clean, noise, level, classes):
        """|x - D|^2 / s^2 / d, (B, C), for the classes (B, C) of each image.

        With gradients, each network call is computed again in the backward pass: memory is that of
        one call, and of the encoder of latent models.
        """

        def error(clean, labels):
            n = labels.shape[1]
            noisy = (clean + level * noise).repeat_interleave(n, 0)
            denoised = self.diffusion.denoise(noisy, level, labels.flatten())
            difference = (denoised - clean.repeat_interleave(n, 0)).flatten(1)
            return (difference / level).square().mean(1).view(-1, n)

        errors = []
        for labels in classes.split(max(1, MAX_CALL // len(clean)), dim=1):
            if clean.requires_grad:
                errors.append(recompute(error, clean, labels, use_reentrant=False))
            else:
                errors.append(error(clean, labels))
        return torch.cat(errors, 1)


class DiffusionHead(_Generative):
    """Logits W g + b of the pooled features g of a block, averaged over the draws of noise.

    The network is given no label. block: its name. sigma: the level of the noise. weight:
    (K, channels) and bias: (K,), of a linear probe (extract_features.py).
    Like other classifiers it has its last layer in `logits`.
    """

    def __init__(self, diffusion, n_noise, fresh, seed, block, sigma, weight, bias):
        super().__init__(diffusion, n_noise, fresh, seed)
        self.block = block
        self.sigma = sigma
        self.logits = nn.Linear(weight.shape[1], len(weight))
        self.logits.load_state_dict({"weight": weight, "bias": bias})

    def features(self, x, noise):
        """Pooled features (B, channels) under one draw of noise."""
        return self.diffusion.features(x, self.sigma, None, [self.block], noise)[0]

    def forward(self, x, with_features=False):
        """Logits (B, K) of x in [0, 1]; with_features: (logits, what the last layer reads)."""
        draws = list(self.draws(x))
        features = []
        for noise in draws:
            if x.requires_grad and len(draws) > 1:  # memory is that of one draw
                features.append(recompute(self.features, x, noise, use_reentrant=False))
            else:
                features.append(self.features(x, noise))
        mean = torch.stack(features).mean(0)
        with torch.autocast(x.device.type, enabled=False):  # the last layer is never in bf16
            logits = self.logits(mean)
        return (logits, mean) if with_features else logits
