"""Classifiers, from images in [0, 1] to logits; normalisation is inside.

How a classifier is trained stands in train_at.py, how its weights are read in published/weights.py.
"""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import UserError

# ------------------------------------------------------------------------------------- the networks

SMALL = ("preact-18", "resnet-18", "vit-s-2", "vit-b-2")  # and wrn-<depth>-<width>
VITS = {"vit-s-2": (384, 6), "vit-b-2": (768, 12)}  # hidden size, heads; 12 layers, patch 2
TORCHVISION = ("resnet50", "convnext_tiny", "convnext_base", "vit_b_16", "swin_t", "swin_b")
PATCH_SIZES = {"vit-s-2": 2, "vit-b-2": 2, "vit_b_16": 16}


class _Classifier(nn.Module):
    """What all classifiers share. A subclass defines two things:

    logits: the last layer, a Linear. _features(x): what that layer reads, (B, num_features), of
    normalised images (B, C, H, W). In bf16 it should be averaged over space in float32.
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def num_features(self):
        return self.logits.in_features

    def forward(self, x, with_features=False):
        """Logits (B, K) of images (B, C, H, W) in [0, 1].

        with_features: return (logits, pooled penultimate features (B, num_features)).
        """
        features = self._features((x - self.mean) / self.std)
        # The last layer is never in bf16.
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            features = features.to(self.logits.weight.dtype)
            logits = self.logits(features)
        return (logits, features) if with_features else logits


class _Conv3x3(nn.Conv2d):
    """3 x 3 convolution without bias that keeps the image size, or halves it at stride 2.

    Stride 2 is padded right and bottom only, as TensorFlow's SAME does.
    """

    def __init__(self, in_channels, out_channels, stride=1):
        padding = 1 if stride == 1 else 0
        super().__init__(in_channels, out_channels, 3, stride, padding, bias=False)

    def forward(self, x):
        if self.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class _Block(nn.Module):
    """Pre-activation residual block of WideResNet.

    Where the channels change, the shortcut is a 1 x 1 convolution of the activated input.
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = _Conv3x3(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = _Conv3x3(out_channels, out_channels)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        h = F.silu(self.batchnorm_0(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        h = F.silu(self.batchnorm_1(self.conv_0(h)))
        return skip + self.conv_1(h)


def _group(n_blocks, in_channels, out_channels, stride):
    """A stage of WideResNet, named as in RobustBench; the stride is that of its first block."""
    blocks = [_Block(in_channels, out_channels, stride)]
    while len(blocks) < n_blocks:
        blocks.append(_Block(out_channels, out_channels, 1))
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks)))


class WideResNet(_Classifier):
    """Pre-activation Wide ResNet with SiLU, in the layout (names, paddings) of RobustBench's.

    Zagoruyko & Komodakis, arXiv 1605.07146; Gowal et al., arXiv 2010.03593; RobustBench's class is
    DMWideResNet. The pooling is global, so that any image size works; at 32 pixels it is
    RobustBench's 8 x 8 pooling. depth: 6 n + 4.
    """

    def __init__(self, depth, width, num_classes, mean, std):
        super().__init__(mean, std)
        n_blocks = (depth - 4) // 6
        self.init_conv = _Conv3x3(len(mean), 16)
        self.layer = nn.Sequential(
            _group(n_blocks, 16, 16 * width, stride=1),
            _group(n_blocks, 16 * width, 32 * width, stride=2),
            _group(n_blocks, 32 * width, 64 * width, stride=2),
        )
        self.batchnorm = nn.BatchNorm2d(64 * width)
        self.logits = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(self.logits.bias)

    def _features(self, x):
        h = self.layer(self.init_conv(x))
        return F.silu(self.batchnorm(h)).mean((2, 3), dtype=self.logits.weight.dtype)


class _PreActBlock(nn.Module):
    """Pre-activation residual block of PreActResNet18.

    Where the stride is 2, the shortcut is a 3 x 3 convolution of the raw input.
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_2d_1 = _Conv3x3(in_channels, out_channels, stride)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_2d_2 = _Conv3x3(out_channels, out_channels)
        self.shortcut = None
        if stride != 1:
            self.shortcut = _Conv3x3(in_channels, out_channels, stride)

    def forward(self, x):
        skip = x if self.shortcut is None else self.shortcut(x)
        h = self.conv_2d_1(F.silu(self.batchnorm_0(x)))
        h = self.conv_2d_2(F.silu(self.batchnorm_1(h)))
        return skip + h


class PreActResNet18(_Classifier):
    """Pre-activation ResNet-18 with SiLU, in the layout (names, paddings) of RobustBench's.

    He et al., arXiv 1603.05027; Rebuffi et al., arXiv 2103.01946; RobustBench's class is
    DMPreActResNet. Global pooling, as in WideResNet; PyTorch's own initialisation, as in the code
    of DM-AT.
    """

    def __init__(self, num_classes, mean, std):
        super().__init__(mean, std)
        self.conv_2d = _Conv3x3(len(mean), 64)
        self.layer_0 = nn.Sequential(_PreActBlock(64, 64, 1), _PreActBlock(64, 64, 1))
        self.layer_1 = nn.Sequential(_PreActBlock(64, 128, 2), _PreActBlock(128, 128, 1))
        self.layer_2 = nn.Sequential(_PreActBlock(128, 256, 2), _PreActBlock(256, 256, 1))
        self.layer_3 = nn.Sequential(_PreActBlock(256, 512, 2), _PreActBlock(512, 512, 1))
        self.batchnorm = nn.BatchNorm2d(512)
        self.logits = nn.Linear(512, num_classes)

    def _features(self, x):
        h = self.layer_1(self.layer_0(self.conv_2d(x)))
        h = self.layer_3(self.layer_2(h))
        return F.silu(self.batchnorm(h)).mean((2, 3), dtype=self.logits.weight.dtype)


def _to_float32(module, inputs):
    """A hook before a module: its input in float32 at least, whatever autocast made of it."""
    (x,) = inputs
    return (x.to(torch.promote_types(x.dtype, torch.float32)),)


class TorchvisionClassifier(_Classifier):
    """A torchvision network. Its last Linear becomes `logits`, and an Identity takes its place.

    published: the name under which torchvision publishes weights for the network, or None.
    """

    def __init__(self, network, mean, std, published=None):
        super().__init__(mean, std)
        self.published = published
        linears = [name for name, child in network.named_modules() if isinstance(child, nn.Linear)]
        self.head = linears[-1]
        self.network = network
        self.logits = network.get_submodule(self.head)
        parent, _, child = self.head.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
        if hasattr(network, "avgpool"):  # the average over space
            network.avgpool.register_forward_pre_hook(_to_float32)
        # torchvision's ViT starts with zeros here: all images have equal logits, and the gradient
        # that an attack follows is zero.
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)
        for module in network.modules():
            # No random depth: its draws would belong to no stream (resume would not be exact), and
            # the attack would follow another network than the loss.
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0

    def _features(self, x):
        return self.network(x)


# --------------------------------------------------------------------------------- networks by name


def wrn_size(name):
    """(depth, width) of `wrn-<depth>-<width>`. Raises UserError for any other name."""
    match = re.fullmatch(r"wrn-(1?\d\d)-([1-9]|[12]\d|3[0-2])", name)  # up to 199 deep, 32 wide
    if match is None or (int(match[1]) - 4) % 6:
        wide = "wrn-<depth>-<width> with depth 10, 16, 22, 28, ... such as wrn-28-10"
        others = f"{', '.join(SMALL)} or, for RGB images of at least 64 pixels,"
        raise UserError(f"model '{name}': expected {wide}, {others} {', '.join(TORCHVISION)}")
    return int(match[1]), int(match[2])


def check_model(name, spec):
    """Check that `build` knows the name and that the network fits the images of a data set.

    spec: the data set, a common.data.Spec. Raises UserError.
    """
    images = f"{spec.name} has {spec.channels} x {spec.image_size} x {spec.image_size}"
    patch = PATCH_SIZES.get(name, 1)
    if name not in SMALL + TORCHVISION:
        wrn_size(name)
    if name in TORCHVISION and (spec.image_size < 64 or spec.channels != 3):
        raise UserError(f"model '{name}': made for RGB images of at least 64 pixels, {images}")
    if spec.image_size % patch:
        mismatch = f"its patches of {patch} pixels do not divide the images"
        raise UserError(f"model '{name}': {mismatch}, {images}")


def build(name, spec):
    """An initialised classifier for the data set `spec`, in the channels-last layout.

    It has its name as an attribute.
    Raises UserError as check_model does.
    """
    check_model(name, spec)
    if name == "preact-18":
        model = PreActResNet18(spec.num_classes, spec.mean, spec.std)
    elif name == "resnet-18":
        # For small images, as public CIFAR code has it: a 3 x 3 convolution first, no pooling.
        network = torchvision.models.resnet18(num_classes=spec.num_classes)
        network.conv1 = _Conv3x3(spec.channels, 64)
        network.maxpool = nn.Identity()
        model = TorchvisionClassifier(network, spec.mean, spec.std)
    elif name in VITS:
        model = TorchvisionClassifier(_small_vit(name, spec), spec.mean, spec.std)
    elif name in TORCHVISION:
        options = {"num_classes": spec.num_classes}
        if name in PATCH_SIZES:
            options["image_size"] = spec.image_size
        network = torchvision.models.get_model(name, **options)
        model = TorchvisionClassifier(network, spec.mean, spec.std, published=name)
    else:
        depth, width = wrn_size(name)
        model = WideResNet(depth, width, spec.num_classes, spec.mean, spec.std)
    model.name = name
    return model.to(memory_format=torch.channels_last)


def _small_vit(name, spec):
    """torchvision's vision transformer with patches of 2 pixels, for images of any channels."""
    hidden, heads = VITS[name]
    network = torchvision.models.VisionTransformer(
        image_size=spec.image_size,
        patch_size=2,
        num_layers=12,
        num_heads=heads,
        hidden_dim=hidden,
        mlp_dim=4 * hidden,
        num_classes=spec.num_classes,
    )
    if spec.channels != 3:  # torchvision's is for RGB; the new layer is initialised as its own is
        network.conv_proj = nn.Conv2d(spec.channels, hidden, 2, 2)
        nn.init.trunc_normal_(network.conv_proj.weight, std=(1 / (4 * spec.channels)) ** 0.5)
        nn.init.zeros_(network.conv_proj.bias)
    return network


def parameter_groups(modules, weight_decay, biases):
    """Two parameter groups for an optimiser: with weight decay, and without.

    BatchNorm's parameters are never decayed; other parameters of one dimension are if `biases`.
    """
    decayed, spared = [], []
    children = [child for module in modules for child in module.modules()]
    for child in children:
        is_batchnorm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        for parameter in child.parameters(recurse=False):
            is_bias = parameter.ndim <= 1
            if is_batchnorm or (is_bias and not biases):
                spared.append(parameter)
            else:
                decayed.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


def describe(name, spec):
    """What best.pt and last.pt say of a classifier, for published.weights to build it again."""
    return {
        "model_name": name,
        "dataset": spec.name,
        "num_classes": spec.num_classes,
        "classes": list(spec.classes),
        "image_size": spec.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
