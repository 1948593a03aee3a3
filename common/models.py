"""Classifiers: images in [0, 1] to logits, normalisation inside."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint
from common.cli import UserError


class _Block(nn.Module):
    """Pre-activation residual block. Where channels change, the shortcut reads the activated input."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        # Stride 2 is padded right and bottom only, by hand, as TensorFlow's SAME does.
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels else None

    def forward(self, x):
        h = F.silu(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        h = F.pad(h, (0, 1, 0, 1)) if self.conv_0.padding == (0, 0) else h
        return skip + self.conv_1(F.silu(self.batchnorm_1(self.conv_0(h))))


class _Group(nn.Module):
    def __init__(self, n_blocks, in_channels, out_channels, stride):
        super().__init__()
        self.block = nn.Sequential(*(_Block(out_channels if i else in_channels, out_channels, 1 if i else stride) for i in range(n_blocks)))

    def forward(self, x):
        return self.block(x)


class WideResNet(nn.Module):
    """Pre-activation Wide ResNet with SiLU, in the layout (names, paddings) of RobustBench's DMWideResNet.

    Zagoruyko & Komodakis, arXiv 1605.07146; Gowal et al., arXiv 2010.03593. The pooling is global, so that any
    image size works; at 32 pixels it is RobustBench's 8 x 8 pooling. Input (B, C, H, W) in [0, 1]; output logits (B, K).
    """

    def __init__(self, depth, width, num_classes, mean, std):
        super().__init__()
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.num_features = channels[3]
        self.init_conv = nn.Conv2d(len(mean), channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(*(_Group((depth - 4) // 6, channels[i], channels[i + 1], stride=1 if i == 0 else 2) for i in range(3)))
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.logits = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x, with_features=False):
        """Logits (B, K); with_features=True: (logits, pooled penultimate features (B, num_features))."""
        h = self.layer(self.init_conv((x - self.mean) / self.std))
        features = F.silu(self.batchnorm(h)).mean((2, 3))
        return (self.logits(features), features) if with_features else self.logits(features)


def parse_model(name):
    """(depth, width) of `wrn-<depth>-<width>`; raises UserError for any other name."""
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if not match or (int(match[1]) - 4) % 6 or int(match[1]) < 10 or int(match[2]) < 1:
        raise UserError(f"--model {name}: expected wrn-<depth>-<width> with depth 10, 16, 22, 28, ... such as wrn-28-10")
    return int(match[1]), int(match[2])


def build(name, spec):
    """An initialised classifier for the data set `spec` (common.data.Spec), in the channels-last layout."""
    depth, width = parse_model(name)
    return WideResNet(depth, width, spec.num_classes, spec.mean, spec.std).to(memory_format=torch.channels_last)


def portable(model, name, spec):
    """A dict that load_classifier reads from a checkpoint: what the classifier is, and its weights (contiguous, no prefix)."""
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    return {"model_name": name, "dataset": spec.name, "num_classes": spec.num_classes, "weights": weights}


def load_classifier(path, spec, device):
    """The classifier of a best.pt that train_at.py or train_at_aux.py wrote, frozen, in eval mode; and its checkpoint.

    Raises UserError where the file is no such checkpoint, or belongs to another data set, class count or architecture.
    """
    entries = {"model_name": str, "dataset": str, "num_classes": int, "norm": str, "eps": float, "weights": dict}
    state = checkpoint.load(path, entries, device)
    if (state["dataset"], state["num_classes"]) != (spec.name, spec.num_classes):
        raise UserError(
            f"{path}: trained on {state['dataset']} ({state['num_classes']} classes), --dataset is {spec.name} ({spec.num_classes} classes)"
        )
    model = build(state["model_name"], spec)
    checkpoint.load_state(model, state["weights"], path)
    return model.to(device).eval().requires_grad_(False), state
