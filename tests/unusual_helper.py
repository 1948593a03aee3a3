"""Layers that mask the gradient, put into a WideResNet as a user would: in common/models.py."""

import torch
from torch import nn

from common import models


class Quantised(nn.Module):
    """Rounds to multiples of 0.5: no gradient at all."""

    def forward(self, h):
        return torch.round(2 * h) / 2


class MeanSparse(nn.Module):
    """Replaces what lies near a value by it, as arXiv 2406.05927 does: no gradient there."""

    def __init__(self, value, threshold):
        super().__init__()
        self.value = value
        self.threshold = threshold

    def forward(self, h):
        near = (h - self.value).abs() < self.threshold
        return torch.where(near, torch.full_like(h, self.value), h)


class Straight(nn.Module):
    """A layer with a straight-through gradient, written by hand."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, h):
        return h + (self.layer(h) - h).detach()


def network_with(layer):
    """A WideResNet with a layer in front of its first convolution."""

    class Network(models.WideResNet):
        def __init__(self, *args):
            super().__init__(*args)
            self.unusual = layer

        def _features(self, x):
            return super()._features(self.unusual(x))

    return Network
