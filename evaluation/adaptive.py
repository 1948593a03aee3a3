"""APGD with another backward pass, for models whose own gradient misleads it.

APGD follows the model's gradient. That gradient is zero, or says little, where a layer rounds,
keeps the largest values alone, or replaces values by a constant. Such a model looks more robust
than it is (Athalye et al., arXiv 1802.00420; Tramer et al., arXiv 2002.08347). Here the forward
pass is the model's own, and the backward pass differs from it:

  unit      not at all. But the logits are divided by their mean margin: the gradient of the
            cross-entropy vanishes in float32 where logits are large.
  straight  Unusual layers have the identity as their derivative (BPDA of the first paper).
  leaky     Besides, clipped activations have a slope of LEAK more than they have.

Whether an image fools is not decided here: evaluate.py asks the model itself. Unusual are:

  - PyTorch's functions of STEPS, wherever in the model they are called;
  - modules whose code is not PyTorch's, which hold no convolution or other matrix product, and
    whose output has the shape of their input: nothing is known of their derivative.

Other layers that mislead the gradient, such as a mask that a block multiplies with or an
autograd.Function that a block calls, are not found; nor are casts to whole numbers. Square, which
needs no gradient, may fool more there: a sanity check tries it.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from common import attacks
from evaluation import autoattack

KINDS = ("unit", "straight", "leaky")
LEAK = 0.1

# Functions with a derivative of zero in places or everywhere, or with none at all.
STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"}
STEPS |= {"hardshrink", "softshrink", "masked_fill", "where", "detach"}

# Activations that are flat, or nearly so, in a part of their range.
CLIPPED = {"relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "threshold", "clamp", "clip"}
CLIPPED |= {"sigmoid", "tanh"}


def attack(name, model, x, y, **settings):
    """Adversarial images (B, C, H, W) of one attack of `attack_names`.

    Arguments as in autoattack.attack, of whose attacks this is one on a Surrogate of the model.
    """
    kind, loss = name.split("-")
    surrogate = Surrogate(model, kind, mean_margin(model, x, y))
    return autoattack.attack(f"apgd-{loss}", surrogate, x, y, **settings)


def attack_names(layers):
    """The attacks that can say something new of a model with these `layers_of` it.

    DLR, the loss of APGD-T, does not depend on the scale of logits.
    """
    names = ["unit-ce"]
    for kind in kinds(layers)[1:]:
        names += [f"{kind}-ce", f"{kind}-t"]
    return names


def kinds(layers):
    """The kinds of backward pass that differ on a model with these `layers_of` it."""
    return ["unit"] + [kind for kind in KINDS[1:] if layers[kind]]


def layers_of(model, x):
    """Names of the layers whose derivative another backward pass changes, two lists in a dict.

    straight: unusual layers. leaky: clipped activations. x: a few images (B, C, H, W).
    """
    surrogate = Surrogate(model, "leaky")
    surrogate(x.detach().clone().requires_grad_(True))
    return {
        "straight": sorted(surrogate.met_unusual),
        "leaky": sorted(surrogate.met_clipped),
    }


def mean_margin(model, x, y):
    """How far the logit of the label lies above the largest other one, a mean over images."""
    with torch.no_grad():
        margins = -attacks.attack_losses(model(x), y, "margin")
    return margins.mean().clamp(min=1e-6)


class Surrogate(nn.Module):
    """The logits of a model, divided by `scale`, with the backward pass of one of KINDS."""

    def __init__(self, model, kind, scale=1.0):
        super().__init__()
        self.model = model
        self.kind = kind
        self.scale = scale
        self.met_unusual = set()  # names of the layers that a pass went through
        self.met_clipped = set()

    def forward(self, x):
        if self.kind == "unit":
            return self.model(x) / self.scale
        functions = _OtherDerivatives(self.kind == "leaky", self.met_unusual, self.met_clipped)
        with _straightened(self.model, self.met_unusual), functions:
            return self.model(x) / self.scale


def unusual_modules(model):
    """{name: module} of the outermost modules that are not PyTorch's and hold no product of its."""
    found = {}
    for name, module in model.named_modules():
        code = type(module).forward.__module__
        is_torch = code.startswith(("torch.", "torchvision."))
        has_product = any(isinstance(child, attacks.PRODUCTS) for child in module.modules())
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if not is_torch and not has_product and not is_inside:
            found[name] = module
    return found


@contextmanager
def _straightened(model, met):
    """Give unusual modules the identity as their derivative. Adds those that ran to `met`."""
    modules = unusual_modules(model)
    try:
        for name, module in modules.items():
            label = f"{name} ({type(module).__name__})"
            module.forward = partial(_straight, module.forward, label, met)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)  # the one of its class is in force again


def _straight(forward, label, met, x, *args, **kwargs):
    """forward(x, ...) with the identity as its derivative, where the shapes allow it."""
    if not torch.is_tensor(x) or not x.requires_grad:
        return forward(x, *args, **kwargs)
    output = forward(x.clone(), *args, **kwargs)  # it may change its input in place
    if not torch.is_tensor(output) or output.shape != x.shape:
        return output
    met.add(label)
    return _constant(output) + _zero(x)


class _OtherDerivatives(TorchFunctionMode):
    """Within it, functions of STEPS have the identity as their derivative.

    leaky: functions of CLIPPED have a slope of LEAK more. What was called is added to the two sets.
    """

    def __init__(self, leaky, met_unusual, met_clipped):
        super().__init__()
        self.leaky = leaky
        self.met_unusual = met_unusual
        self.met_clipped = met_clipped

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").rstrip("_")  # relu_ is relu in place
        is_step = name in STEPS
        is_clipped = self.leaky and name in CLIPPED
        inputs = []
        if is_step or is_clipped:
            tensors = [value for value in args if torch.is_tensor(value)]
            inputs = [value.clone() for value in tensors if value.requires_grad]
        output = function(*args, **kwargs)
        if not inputs or not torch.is_tensor(output):
            return output
        inputs = [value for value in inputs if value.shape == output.shape]
        if not inputs:
            return output
        if is_step:
            self.met_unusual.add(name)
            return _constant(output) + sum(_zero(value) for value in inputs)
        self.met_clipped.add(name)
        return output + LEAK * sum(_zero(value) for value in inputs)


def _zero(x):
    """Zeros whose derivative with respect to x is the identity."""
    return x - _constant(x)


def _constant(x):
    """x without a derivative; not by detach(), which has one here."""
    with torch.no_grad():
        return x.clone()
