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

  - PyTorch's functions of STEPS, wherever in the model they are called, divisions that round, and
    casts to whole numbers;
  - modules whose code is not PyTorch's, which hold no convolution or other matrix product, and
    whose output has the shape of their input: nothing is known of their derivative.

Other layers that mislead the gradient are not found: a mask that a block multiplies with, values
assigned to a part of a tensor, a torch.no_grad() or an autograd.Function inside a block. Square,
which needs no gradient, may fool more there: a sanity check tries it.
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
STEPS |= {"floor_divide", "__floordiv__", "heaviside"}
STEPS |= {"hardshrink", "softshrink", "masked_fill", "where", "detach", "data"}

# What rounding takes away: x - x % 1 is floor(x). Its derivative becomes 0, that of floor 1. Where
# it is itself what the model goes on with, its own derivative is the better one: `unit` has that.
FRACTIONS = {"frac", "fmod", "remainder", "__mod__"}

# What makes floating-point numbers of whole ones. Not here: what takes them for indices.
ARITHMETIC = {"add", "sub", "mul", "div", "neg", "__rsub__", "__rdiv__"}
CONVERSIONS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}

# Activations that are flat, or nearly so, in a part of their range.
CLIPPED = {"relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "threshold", "clamp", "clip"}
CLIPPED |= {"clamp_min", "clamp_max", "maximum", "minimum", "sigmoid", "expit", "tanh"}


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
    own = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            label = f"{name} ({type(module).__name__})"
            module.forward = partial(_straight, module.forward, label, met)
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)  # the one of its class is in force again
            if own[name] is not None:
                module.forward = own[name]


def _straight(forward, label, met, *args, **kwargs):
    """forward(...) with the identity as its derivative by its first input, if the shapes fit."""
    tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
    inputs = [value for value in tensors if value.requires_grad]
    if not inputs:
        return forward(*args, **kwargs)
    x = inputs[0].clone()  # forward may change its input in place
    output = forward(*args, **kwargs)
    if not torch.is_tensor(output) or output.shape != x.shape:
        return output
    met.add(label)
    return _constant(output) + _zero(x)


class _OtherDerivatives(TorchFunctionMode):
    """Within it, functions of STEPS and casts to whole numbers have the identity as derivative.

    Those of FRACTIONS have the derivative 0. leaky: functions of CLIPPED have a slope of LEAK more.
    What was called is added to the two sets.
    """

    def __init__(self, leaky, met_unusual, met_clipped):
        super().__init__()
        self.leaky = leaky
        self.met_unusual = met_unusual
        self.met_clipped = met_clipped

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if any(hasattr(value, "cast_from") for value in (*args, *kwargs.values())):
            return self._of_whole_numbers(function, name, args, kwargs)

        if getattr(function, "__self__", None) is torch.Tensor.data:
            name = "data"
        if not name.startswith("__"):  # relu_ is relu in place, _threshold is F.threshold
            name = name.removeprefix("special_").strip("_")
        is_step = name in STEPS or kwargs.get("rounding_mode") is not None
        is_clipped = self.leaky and name in CLIPPED
        is_fraction = name in FRACTIONS
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        inputs = [value for value in tensors if value.requires_grad]
        if is_step or is_clipped or is_fraction:
            inputs = [value.clone() for value in inputs]
        output = function(*args, **kwargs)
        if not torch.is_tensor(output):
            return output
        inputs = [value for value in inputs if value.shape == output.shape]
        if inputs and _is_whole(output):
            output.cast_from = inputs[0]
            return output
        if inputs and is_step:
            self.met_unusual.add(name)
            changed = _constant(output) + sum(_zero(value) for value in inputs)
        elif inputs and is_fraction:
            self.met_unusual.add(name)
            changed = _constant(output) + 0 * _zero(inputs[0])
        elif inputs and is_clipped:
            self.met_clipped.add(name)
            return output + LEAK * sum(_zero(value) for value in inputs)
        else:
            return output
        in_place = any(output is value for value in args)  # the caller may drop what is returned
        return output.copy_(changed) if in_place else changed

    def _of_whole_numbers(self, function, name, args, kwargs):
        """The output of a function, some of whose arguments were cast to whole numbers.

        These are given the derivative of the cast, which is the identity, and the function's own
        follows. One of whole numbers has none: the identity again, but for ARITHMETIC.
        """
        output = function(*args, **kwargs)
        if not torch.is_tensor(output):
            return output
        if _is_whole(output):
            casts = [v for v in (*args, *kwargs.values()) if hasattr(v, "cast_from")]
            if name in ARITHMETIC:
                output.cast_from = _call(function, args, kwargs, _source)
            elif name not in FRACTIONS and output.shape == casts[0].shape:
                output.cast_from = casts[0].cast_from
        elif name in ARITHMETIC | CONVERSIONS and output.is_floating_point():
            self.met_unusual.add("cast")
            output = _call(function, args, kwargs, partial(_as_float, dtype=output.dtype))
        return output


def _is_whole(x):
    """Whether a tensor holds whole numbers; truth values are none."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _zero(x):
    """Zeros whose derivative with respect to x is the identity."""
    return x - _constant(x)


def _call(function, args, kwargs, change):
    """function(*args, **kwargs), each argument as `change` makes it."""
    return function(*map(change, args), **{key: change(value) for key, value in kwargs.items()})


def _source(value):
    """What was cast to these whole numbers. Anything else as it is."""
    return getattr(value, "cast_from", value)


def _as_float(value, dtype):
    """A cast's values as floating-point numbers with its derivative. Anything else as it is."""
    if not hasattr(value, "cast_from"):
        return value
    return value.to(dtype) + _zero(value.cast_from).to(dtype)


def _constant(x):
    """x without a derivative; not by detach(), which has one here."""
    with torch.no_grad():
        return x.clone()
