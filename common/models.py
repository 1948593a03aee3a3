"""Classifiers: images in [0, 1] to logits, normalisation inside. And their weights: from this project's files and from others'."""

import http.client
import pickle
import re

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common import checkpoint
from common.cli import UserError

_VITS = {"vit-s-2": (384, 6), "vit-b-2": (768, 12)}  # hidden size, heads; patch 2
_IMAGENET = ("resnet50", "convnext_tiny", "convnext_base", "vit_b_16", "swin_t", "swin_b")  # torchvision's names
_PATCH = {"vit-s-2": 2, "vit-b-2": 2, "vit_b_16": 16}
_ENTRIES = {"model_name": str, "dataset": str, "num_classes": int, "norm": str, "eps": float, "weights": dict}  # of our checkpoints
_KNOWN = (
    "wrn-<depth>-<width> with depth 10, 16, 22, 28, ... such as wrn-28-10, preact-18, resnet-18, "
    f"{', '.join(_VITS)} or, for RGB images of at least 64 pixels, {', '.join(_IMAGENET)}"
)


class _Classifier(nn.Module):
    """What all classifiers share: a subclass defines `logits`, a Linear, and `_features`, what that reads of a normalised image."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def num_features(self):
        return self.logits.in_features

    def forward(self, x, with_features=False):
        """Logits (B, K); with_features=True: (logits, pooled penultimate features (B, num_features))."""
        features = self._features((x - self.mean) / self.std)
        return (self.logits(features), features) if with_features else self.logits(features)


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


class WideResNet(_Classifier):
    """Pre-activation Wide ResNet with SiLU, in the layout (names, paddings) of RobustBench's DMWideResNet.

    Zagoruyko & Komodakis, arXiv 1605.07146; Gowal et al., arXiv 2010.03593. The pooling is global, so that any
    image size works; at 32 pixels it is RobustBench's 8 x 8 pooling. Input (B, C, H, W) in [0, 1]; output logits (B, K).
    """

    def __init__(self, depth, width, num_classes, mean, std):
        super().__init__(mean, std)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(len(mean), channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(*(_Group((depth - 4) // 6, channels[i], channels[i + 1], stride=1 if i == 0 else 2) for i in range(3)))
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.logits = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        nn.init.zeros_(self.logits.bias)

    def _features(self, x):
        return F.silu(self.batchnorm(self.layer(self.init_conv(x)))).mean((2, 3))


class _PreActBlock(nn.Module):
    """Pre-activation residual block. Where the stride is 2, the shortcut is a 3 x 3 convolution of the raw input."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        padding = 1 if stride == 1 else 0  # by hand for stride 2, as in _Block
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_2d_1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_2d_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False) if stride != 1 else None

    def forward(self, x):
        h, skip = F.silu(self.batchnorm_0(x)), x
        if self.shortcut is not None:
            h, skip = F.pad(h, (0, 1, 0, 1)), self.shortcut(F.pad(x, (0, 1, 0, 1)))
        return skip + self.conv_2d_2(F.silu(self.batchnorm_1(self.conv_2d_1(h))))


class PreActResNet18(_Classifier):
    """Pre-activation ResNet-18 with SiLU, in the layout (names, paddings) of RobustBench's DMPreActResNet.

    He et al., arXiv 1603.05027; Rebuffi et al., arXiv 2103.01946. Global pooling, as in WideResNet; PyTorch's own
    initialisation, as in DM-AT's code. Input (B, C, H, W) in [0, 1]; output logits (B, K).
    """

    def __init__(self, num_classes, mean, std):
        super().__init__(mean, std)
        self.conv_2d = nn.Conv2d(len(mean), 64, 3, padding=1, bias=False)
        self.layer_0 = nn.Sequential(_PreActBlock(64, 64, 1), _PreActBlock(64, 64, 1))
        self.layer_1 = nn.Sequential(_PreActBlock(64, 128, 2), _PreActBlock(128, 128, 1))
        self.layer_2 = nn.Sequential(_PreActBlock(128, 256, 2), _PreActBlock(256, 256, 1))
        self.layer_3 = nn.Sequential(_PreActBlock(256, 512, 2), _PreActBlock(512, 512, 1))
        self.batchnorm = nn.BatchNorm2d(512)
        self.logits = nn.Linear(512, num_classes)

    def _features(self, x):
        h = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
        return F.silu(self.batchnorm(h)).mean((2, 3))


class _BasicBlock(nn.Module):
    """Post-activation residual block; where the shape changes, the shortcut is a 1 x 1 convolution with BatchNorm."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        changes = stride != 1 or in_channels != out_channels
        shortcut = [nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)] if changes else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(_Classifier):
    """ResNet-18 for small images, with the names that public CIFAR code gives it: that of AutoAttack's example and many others'.

    He et al., arXiv 1512.03385. The last layer is `linear` in those files. Input (B, C, H, W) in [0, 1]; output logits (B, K).
    """

    def __init__(self, num_classes, mean, std):
        super().__init__(mean, std)
        self.conv1 = nn.Conv2d(len(mean), 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(_BasicBlock(256, 512, 2), _BasicBlock(512, 512, 1))
        self.logits = nn.Linear(512, num_classes)

    def _features(self, x):
        h = self.layer4(self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))))
        return h.mean((2, 3))


class TorchvisionClassifier(_Classifier):
    """A torchvision network; its last Linear becomes `logits`, and an Identity takes that one's place.

    `published`: the name under which torchvision publishes weights for the network, or None.
    """

    def __init__(self, network, mean, std, published=None):
        super().__init__(mean, std)
        self.published = published
        self.head = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        self.network, self.logits = network, network.get_submodule(self.head)
        parent, _, child = self.head.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
        # torchvision's ViT starts with zeros here: all images have equal logits, and the gradient that an attack follows is zero.
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)
        for module in network.modules():
            # No random depth: its draws would belong to no stream (resume would not be exact), and the attack would
            # follow another network than the loss.
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0

    def _features(self, x):
        return self.network(x)


def parse_model(name):
    """(depth, width) of `wrn-<depth>-<width>`; raises UserError for any other name."""
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    if not match or (int(match[1]) - 4) % 6 or not 10 <= int(match[1]) <= 1000 or not 1 <= int(match[2]) <= 100:
        raise UserError(f"--model {name}: expected {_KNOWN}")
    return int(match[1]), int(match[2])


def check_model(name, spec):
    """Raise UserError where build knows no such name, or the network does not fit the images of `spec` (common.data.Spec)."""
    if name not in ("preact-18", "resnet-18", *_VITS, *_IMAGENET):
        parse_model(name)
    found = f"{spec.name} has {spec.channels} x {spec.image_size} x {spec.image_size}"
    if name in _IMAGENET and (spec.image_size < 64 or spec.channels != 3):
        raise UserError(f"--model {name}: made for RGB images of at least 64 pixels, {found}")
    if spec.image_size % _PATCH.get(name, 1):
        raise UserError(f"--model {name}: its patches of {_PATCH[name]} pixels do not divide the images, {found}")


def build(name, spec):
    """An initialised classifier for the data set `spec` (common.data.Spec), in the channels-last layout; errors as check_model."""
    check_model(name, spec)
    if name in ("preact-18", "resnet-18"):
        model = {"preact-18": PreActResNet18, "resnet-18": ResNet18}[name](spec.num_classes, spec.mean, spec.std)
    elif name in _VITS:
        hidden, heads = _VITS[name]
        network = torchvision.models.VisionTransformer(spec.image_size, 2, 12, heads, hidden, 4 * hidden, num_classes=spec.num_classes)
        if spec.channels != 3:  # torchvision's is for RGB only; initialised as there
            network.conv_proj = nn.Conv2d(spec.channels, hidden, 2, 2)
            nn.init.trunc_normal_(network.conv_proj.weight, std=(1 / (4 * spec.channels)) ** 0.5)
            nn.init.zeros_(network.conv_proj.bias)
        model = TorchvisionClassifier(network, spec.mean, spec.std)
    elif name in _IMAGENET:
        size = {"image_size": spec.image_size} if name in _PATCH else {}
        network = torchvision.models.get_model(name, num_classes=spec.num_classes, **size)
        model = TorchvisionClassifier(network, spec.mean, spec.std, published=name)
    else:
        model = WideResNet(*parse_model(name), spec.num_classes, spec.mean, spec.std)
    return model.to(memory_format=torch.channels_last)


def parameter_groups(modules, weight_decay, biases):
    """Two groups for an optimiser: no weight decay on BatchNorm parameters and, unless `biases`, on any of one dimension."""
    norms = {p for m in modules for n in m.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm) for p in n.parameters()}
    every = [p for m in modules for p in m.parameters()]
    spared = [p for p in every if p in norms or (p.ndim <= 1 and not biases)]
    others = [p for p in every if p not in set(spared)]
    return [{"params": others, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def portable(model, name, spec):
    """A dict that load_classifier reads from a checkpoint: what the classifier is, and its weights (contiguous, no prefix)."""
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    return {"model_name": name, "dataset": spec.name, "num_classes": spec.num_classes, "weights": weights}


def load_weights(model, path):
    """Initialise a classifier of build, in place, from a file of this project or of others, or the word `torchvision`.

    A file: best.pt or last.pt (the averaged weights); a state dict, .safetensors or of torch.save, bare or under
    `state_dict` or `model_state_dict` (DM-AT), with the names of RobustBench or, for torchvision's networks, torchvision;
    prefixes of wrappers are dropped. `torchvision`: the published ImageNet weights, downloaded once.
    Returns True; False where the file's class count is another, so that `logits` alone keeps its initialisation.
    Raises UserError where the file is missing, broken, would run code, has any other difference, or holds NaN or inf.
    """
    weights = _weights_of(_published(model) if path == "torchvision" else _read(path), model, path)
    own = model.logits.state_dict(prefix="logits.")
    fits = weights.get("logits.weight", own["logits.weight"]).shape[:1] == own["logits.weight"].shape[:1]
    checkpoint.load_state(model, weights if fits else weights | own, path)
    return fits


def load_classifier(path, spec, device, name=None):
    """(classifier, its checkpoint) of a best.pt or last.pt that train_at.py or train_at_aux.py wrote; frozen, in eval mode.

    With `name` (--model), also of any file that load_weights reads, as that architecture; of such a file nothing is known
    of its training: the checkpoint's `norm` and `eps` are None.
    Raises UserError where the file is none of these, or belongs to another data set, class count or architecture.
    """
    content = _read(path, device)
    own = content if isinstance(content, dict) and "model_name" in content else {}
    if not own and name is None:
        raise UserError(f"{path}: not a checkpoint of this project, no entry 'model_name'; name the network of its weights with --model")
    for entry, kind in _ENTRIES.items():
        if own and not isinstance(own.get(entry), kind):
            raise UserError(f"{path}: not a checkpoint of this project, its entry '{entry}' is missing or no {kind.__name__}")
    state = {"model_name": name, "dataset": spec.name, "num_classes": spec.num_classes, "norm": None, "eps": None} | own
    if name not in (None, state["model_name"]):
        raise UserError(f"{path}: holds a {state['model_name']}, --model is {name}")
    if (state["dataset"], state["num_classes"]) != (spec.name, spec.num_classes):
        raise UserError(
            f"{path}: trained on {state['dataset']} ({state['num_classes']} classes), --dataset is {spec.name} ({spec.num_classes} classes)"
        )
    try:
        check_model(state["model_name"], spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model = build(state["model_name"], spec)
    checkpoint.load_state(model, _weights_of(content, model, path), path)
    return model.to(device).eval().requires_grad_(False), state


def _read(path, device="cpu"):
    """What a file holds: tensors, numbers and strings, never code."""
    if not str(path).endswith(".safetensors"):
        return checkpoint.load(path, {}, device)
    try:
        return safetensors.torch.load_file(path, str(device))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: missing, truncated or no safetensors file ({error})") from None


def _published(model):
    """The state dict that torchvision publishes for the network of a classifier."""
    name = getattr(model, "published", None)
    if name is None:
        raise UserError(f"--init torchvision: there are published weights for {', '.join(_IMAGENET)} only")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--init torchvision: cannot load {weights.url} ({reason}); fetch it elsewhere, give the file to --init") from None


def _weights_of(content, model, path):
    """The state dict inside what _read returned, under the names of `model`; finite, but not yet compared with the model's."""
    if isinstance(content, dict):
        entries = (content.get(entry) for entry in ("weights", "model_state_dict", "state_dict"))
        content = next((entry for entry in entries if isinstance(entry, dict)), content)
    if not isinstance(content, dict) or not all(isinstance(key, str) and torch.is_tensor(value) for key, value in content.items()):
        raise UserError(f"{path}: no state dict (names and tensors), neither bare nor under weights, model_state_dict or state_dict")
    # DM-AT: DataParallel around a Sequential; then DataParallel or DDP; then RobustBench's and others' wrappers.
    prefix = next((p for p in ("module.0.", "module.", "model.") if all(key.startswith(p) for key in content)), "")
    weights = {key.removeprefix(prefix): value for key, value in content.items()}
    for key in ("mean", "std"):  # RobustBench's classes keep them beside the weights
        theirs, own = weights.pop(key, None), getattr(model, key).flatten().cpu()
        if theirs is not None and (theirs.numel() != own.numel() or not torch.allclose(theirs.flatten().cpu().float(), own, atol=1e-3)):
            found = [round(value, 4) for value in theirs.flatten().tolist()[:3]]
            raise UserError(f"{path}: normalises by a {key} of {found}, expected {[round(value, 4) for value in own.tolist()]}")
    if isinstance(model, TorchvisionClassifier) and not any(key.startswith("network.") for key in weights):
        in_head = f"{model.head}."
        weights = {f"logits.{k.removeprefix(in_head)}" if k.startswith(in_head) else f"network.{k}": v for k, v in weights.items()}
    if isinstance(model, ResNet18):
        weights = {re.sub(r"^linear\.", "logits.", key): value for key, value in weights.items()}
    bad = next((key for key, value in weights.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: '{bad}' holds NaN or inf: the logits are not finite")
    return weights
