"""The networks of NVlabs' EDM (Karras et al., arXiv 2206.00364), DDPM++, NCSN++ and ADM, read from its pickles as data.

    python -m common.edm convert NETWORK.pkl OUT_DIR

writes OUT_DIR/model.safetensors (float32) and OUT_DIR/config.json (the constructor's arguments); load() reads them back.
A pickle can run any program. Nothing in it is run here: the network's tensors and arguments are collected, and a file that
asks for anything else is refused by name.

Licence: this code is our own, written from the paper and from facts of the file format (names and shapes of the parameters).
NVlabs' code and weights are CC BY-NC-SA 4.0: nothing of the code was copied, and whoever fetches the weights is bound by it.
"""

import inspect
import io
import math
import os
import pickle
import pickletools
import re
import warnings

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint, cli
from common.cli import UserError

# ------------------------------------------------------------------------------------------------------- the networks


class _ResamplingConv(nn.Conv2d):
    """A convolution that halves ("down", "fused") or doubles ("up") the image with a separable filter.

    The filter comes before the kernel; "fused" has it after, on an image that the kernel has not cropped. Kernel 0: the filter alone.
    """

    def __init__(self, cin, cout, kernel, mode, taps):
        super().__init__(cin, cout, kernel or 1)
        self.mode, self.kernel, self.pad = mode, kernel, (len(taps) - 1) // 2
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", (line.outer(line) / line.sum() ** 2)[None, None])
        if not kernel:
            self.weight = self.bias = None

    def forward(self, x):
        if self.mode == "fused":
            x = self._filter(F.conv2d(x, self.weight, padding=self.kernel // 2 + self.pad), 0)
        else:
            x = self._filter(x, self.pad)
            x = F.conv2d(x, self.weight, padding=self.kernel // 2) if self.kernel else x
        return x + self.bias[:, None, None] if self.kernel else x

    def _filter(self, x, pad):
        depthwise = self.resample_filter.expand(x.shape[1], 1, -1, -1)
        if self.mode == "up":
            return F.conv_transpose2d(x, 4 * depthwise, stride=2, padding=pad, groups=x.shape[1])
        return F.conv2d(x, depthwise, stride=2, padding=pad, groups=x.shape[1])


def _norm(channels, eps=1e-5):
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


class UNetBlock(nn.Module):
    """Residual block: x (B, cin, H, W), emb (B, E) -> (B, cout, H', W'); mode "down" halves the image, "up" doubles it.

    adm=False (SongUNet): emb is added, one attention head. adm=True (DhariwalUNet): emb gives scale and shift, 64 channels a
    head (no attention below 64), and a skip that only resamples has no kernel.
    """

    def __init__(self, cin, cout, emb_channels, dropout, adm, taps, mode=None, attention=False):
        super().__init__()
        self.adm, self.dropout, self.scale, eps = adm, dropout, 1 if adm else 0.5**0.5, 1e-5 if adm else 1e-6
        self.heads = (cout // 64 if adm else 1) if attention else 0
        self.norm0, self.norm1 = _norm(cin, eps), _norm(cout, eps)
        self.affine = nn.Linear(emb_channels, 2 * cout if adm else cout)
        self.conv1, self.skip = nn.Conv2d(cout, cout, 3, padding=1), None
        if mode:
            self.conv0 = _ResamplingConv(cin, cout, 3, mode, taps)
            self.skip = _ResamplingConv(cin, cout, 0 if adm and cin == cout else 1, mode, taps)
        else:
            self.conv0 = nn.Conv2d(cin, cout, 3, padding=1)
            self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else None
        if self.heads:
            if cout % self.heads:
                raise ValueError(f"{cout} channels cannot be shared out over {self.heads} attention heads")
            self.norm2, self.qkv, self.proj = _norm(cout, eps), nn.Conv2d(cout, 3 * cout, 1), nn.Conv2d(cout, cout, 1)

    def forward(self, x, emb):
        h, e = self.conv0(F.silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = e.chunk(2, 1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + e))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.scale
        if self.heads:  # the channels of qkv lie as (heads, channels of a head, 3)
            q, k, v = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4).unbind(3)
            attended = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.reshape(x.shape)
            x = (self.proj(attended) + x) * self.scale
        return x


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (encoder_type "residual", embedding_type "fourier", resample_filter [1, 3, 3, 1], channel_mult_noise 2).

    x (B, in_channels, R, R), noise_labels (B,) = c_noise, class_labels (B, label_dim) or None -> (B, out_channels, R, R).
    Raises ValueError where sizes do not fit. map_augment is there for its weights alone: outside NVlabs' training there is
    no augmentation label, and it has no bias.
    """

    adm = False

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128, channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10, label_dropout=0, embedding_type="positional",
        channel_mult_noise=1, encoder_type="standard", decoder_type="standard", resample_filter=(1, 1),
    ):  # fmt: skip
        super().__init__()
        adm, taps, levels, widths = self.adm, resample_filter, len(channel_mult), [model_channels * m for m in channel_mult]
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        if img_resolution % 2 ** (levels - 1) or noise % 2 or len(taps) % 2:
            raise ValueError(f"{img_resolution} pixels, {levels} levels, {noise} noise channels, filter {list(taps)} cannot be halved")
        self.num_blocks, self.label_dim, self.label_dropout, self.noise_channels = num_blocks, label_dim, label_dropout, noise
        self.sizes = [f"{img_resolution >> level}x{img_resolution >> level}" for level in range(levels)]
        self.map_noise = nn.Module() if embedding_type == "fourier" else None
        if self.map_noise:
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise // 2))
        self.map_label = nn.Linear(label_dim, emb if adm else noise, bias=not adm) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)

        def block(*channels, **kwargs):
            return UNetBlock(*channels, emb, dropout, adm, taps, **kwargs)

        c, side = widths[0] if adm else model_channels, in_channels
        self.enc, self.dec, skips = nn.ModuleDict(), nn.ModuleDict(), [c]
        self.enc[f"{self.sizes[0]}_conv"] = nn.Conv2d(in_channels, c, 3, padding=1)
        for level, (size, width) in enumerate(zip(self.sizes, widths)):
            if level:
                self.enc[f"{size}_down"] = block(c, c, mode="down")
                skips.append(c)
            if level and encoder_type == "skip":
                self.enc[f"{size}_aux_down"] = _ResamplingConv(side, side, 0, "down", taps)
                self.enc[f"{size}_aux_skip"] = nn.Conv2d(side, c, 1)
            if level and encoder_type == "residual":
                self.enc[f"{size}_aux_residual"], side = _ResamplingConv(side, c, 3, "fused", taps), c
            for i in range(num_blocks):
                self.enc[f"{size}_block{i}"], c = block(c, width, attention=img_resolution >> level in attn_resolutions), width
                skips.append(c)
        for level, (size, width) in reversed(list(enumerate(zip(self.sizes, widths)))):
            if level == levels - 1:
                self.dec[f"{size}_in0"], self.dec[f"{size}_in1"] = block(c, c, attention=True), block(c, c)
            else:
                self.dec[f"{size}_up"] = block(c, c, mode="up")
            for i in range(num_blocks + 1):
                attention = img_resolution >> level in attn_resolutions and (adm or i == num_blocks)
                self.dec[f"{size}_block{i}"], c = block(c + skips.pop(), width, attention=attention), width
            if decoder_type == "skip" and level < levels - 1:
                self.dec[f"{size}_aux_up"] = _ResamplingConv(out_channels, out_channels, 0, "up", taps)
            if decoder_type == "skip" or (level == 0 and not adm):
                self.dec[f"{size}_aux_norm"], self.dec[f"{size}_aux_conv"] = _norm(c, 1e-6), nn.Conv2d(c, out_channels, 3, padding=1)
        if adm:
            self.out_norm, self.out_conv = _norm(c), nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x, noise_labels, class_labels=None):
        if class_labels is not None and self.training and self.label_dropout:
            class_labels = class_labels * (torch.rand_like(class_labels[:, :1]) >= self.label_dropout)
        emb, enc, dec, side, skips, output = self._embed(noise_labels, class_labels), self.enc, self.dec, x, [], None
        for size in self.sizes:
            x = enc[f"{size}_down"](x, emb) if skips else enc[f"{size}_conv"](x)
            if f"{size}_aux_skip" in enc:
                side = enc[f"{size}_aux_down"](side)
                x = x + enc[f"{size}_aux_skip"](side)
            if f"{size}_aux_residual" in enc:
                x = side = (x + enc[f"{size}_aux_residual"](side)) / 2**0.5
            skips.append(x)
            for i in range(self.num_blocks):
                x = enc[f"{size}_block{i}"](x, emb)
                skips.append(x)
        for size in reversed(self.sizes):
            x = dec[f"{size}_up"](x, emb) if f"{size}_up" in dec else dec[f"{size}_in1"](dec[f"{size}_in0"](x, emb), emb)
            for i in range(self.num_blocks + 1):
                x = dec[f"{size}_block{i}"](torch.cat([x, skips.pop()], 1), emb)
            if f"{size}_aux_conv" in dec:
                image = dec[f"{size}_aux_conv"](F.silu(dec[f"{size}_aux_norm"](x)))
                output = image if output is None else image + dec[f"{size}_aux_up"](output)
        return self.out_conv(F.silu(self.out_norm(x))) if self.adm else output

    def _embed(self, x, labels):
        """The embedding (B, E) of noise level (B,) and label."""
        i = torch.arange(self.noise_channels // 2, dtype=x.dtype, device=x.device)
        frequencies = (1 / 10000) ** (i / (len(i) - (0 if self.adm else 1)))
        angles = x.outer(2 * math.pi * self.map_noise.freqs if self.map_noise else frequencies)
        if self.adm:
            emb = self.map_layer1(F.silu(self.map_layer0(torch.cat([angles.cos(), angles.sin()], 1))))
            return F.silu(emb if self.map_label is None else emb + self.map_label(labels))
        emb = torch.cat([angles.sin(), angles.cos()], 1)
        emb = emb if self.map_label is None else emb + self.map_label(labels * self.label_dim**0.5)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(SongUNet):
    """ADM (Dhariwal & Nichol, arXiv 2105.05233) as EDM uses it: SongUNet's scheme with other blocks, mapping and output."""

    adm = True

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192, channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.10, label_dropout=0,
    ):  # fmt: skip
        sizes = (img_resolution, in_channels, out_channels, label_dim, augment_dim, model_channels, channel_mult, channel_mult_emb)
        super().__init__(*sizes, num_blocks, attn_resolutions, dropout, label_dropout, decoder_type=None)


# ---------------------------------------------------------------------------------------------------- preconditioning

_COMMON = {"img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False}
_PRECONDS = {  # the constructors' arguments in their order, with their defaults
    "EDMPrecond": _COMMON | {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "VPPrecond": _COMMON | {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "VEPrecond": _COMMON | {"sigma_min": 0.02, "sigma_max": 100, "model_type": "SongUNet"},
    "iDDPMPrecond": _COMMON | {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
}
_NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class Precond(nn.Module):
    """D(noisy; sigma, labels) = c_skip noisy + c_out F(c_in noisy; c_noise, labels), with the coefficients of `kind`: table 1 of EDM.

    noisy (B, C, H, W): clean image in [-1, 1] + sigma * n. sigma (B,). class_labels (B, label_dim), one-hot, or None: zeros.
    Returns (B, C, H, W), all in the dtype of the parameters. `args`: the constructor's arguments by name.
    """

    def __init__(self, kind, model, args):
        super().__init__()
        self.kind, self.model, self.args, self.label_dropout = kind, model, args, model.label_dropout
        self.img_resolution, self.img_channels, self.label_dim = args["img_resolution"], args["img_channels"], args["label_dim"]
        # What the network runs, in its order; each is the submodule "model." + name.
        self.blocks = [f"{part}.{key}" for part in ("enc", "dec") for key in getattr(model, part) if "aux" not in key]
        if kind == "iDDPMPrecond":  # noise levels u_0 > ... > u_M = 0
            alpha_bar = [math.sin(math.pi / 2 * j / (args["M"] * (args["C_2"] + 1))) ** 2 for j in range(args["M"] + 1)]
            u = [0.0]
            for j in range(args["M"], 0, -1):
                u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], args["C_1"]) - 1))
            self.register_buffer("u", torch.tensor(u))

    def forward(self, noisy, sigma, class_labels=None):
        noisy = noisy.to(self.model.map_layer0.weight.dtype)
        labels = noisy.new_zeros(len(noisy), self.label_dim) if class_labels is None else class_labels.to(noisy)
        c_skip, c_out, c_in, c_noise = self._coefficients(sigma.to(noisy))
        c_skip, c_out, c_in = (c.view(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
        output = self.model(c_in * noisy, c_noise, labels)
        return c_skip * noisy + c_out * output[:, : self.img_channels]  # iDDPM's network also gives variances

    def _coefficients(self, sigma):
        a, one, root = self.args, torch.ones_like(sigma), (sigma**2 + 1).sqrt()
        if self.kind == "EDMPrecond":
            sd, root = a["sigma_data"], (sigma**2 + a["sigma_data"] ** 2).sqrt()
            return (sd / root) ** 2, sigma * sd / root, 1 / root, sigma.log() / 4
        if self.kind == "VEPrecond":
            return one, sigma, one, (sigma / 2).log()
        if self.kind == "VPPrecond":  # the time t whose sigma^2 is exp(beta_d t^2 / 2 + beta_min t) - 1
            t = ((a["beta_min"] ** 2 + 2 * a["beta_d"] * (1 + sigma**2).log()).sqrt() - a["beta_min"]) / a["beta_d"]
            return one, -sigma, 1 / root, (a["M"] - 1) * t
        return one, -sigma, 1 / root, (a["M"] - 1 - (self.u - sigma[:, None]).abs().argmin(1)).to(sigma)


# Limits far above any published network; without them a small file could ask for endless work.
_MOST = {"num_blocks": 64, "M": 10**4}
_REAL = ("sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2", "dropout", "label_dropout")
_WORDS = {
    **{"model_type": tuple(_NETWORKS), "embedding_type": ("positional", "fourier")},
    **{"encoder_type": ("standard", "skip", "residual"), "decoder_type": ("standard", "skip")},
}


def _check(name, value, default):
    """Raises ValueError where `value` cannot be the constructor's argument `name`."""
    if name in _WORDS:
        good, expected = type(value) is str and value in _WORDS[name], " or ".join(_WORDS[name])
    elif type(default) is bool:
        good, expected = type(value) is bool, "True or False"
    else:
        kinds, least, most = (int, float) if name in _REAL else (int,), int(default != 0 and name not in _REAL), _MOST.get(name, 10**6)
        values, expected = [value], f"a {'' if name in _REAL else 'whole '}number from {least} to {most}"
        if type(default) is tuple:
            values, expected = value, f"a list of at most 16 whole numbers from {least}"
        good = type(values) is list and len(values) <= 16 and all(type(v) in kinds and least <= v <= most for v in values)
        good = good and (values != [] or name == "attn_resolutions")
    if not good:
        raise ValueError(f"argument {name} is {_show(value)}, expected {expected}")


def _show(value):
    """A value out of a file for a message: short, one line, and no deep structure."""
    return ascii(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def build(config):
    """A Precond with random weights from {"kind": "nvlabs-edm", "precond": class name, "init": its arguments by name}.

    Raises ValueError where an entry is missing, unknown or cannot be.
    """
    kind, init = config.get("precond"), config.get("init")
    if config.get("kind") != "nvlabs-edm" or type(kind) is not str or kind not in _PRECONDS or type(init) is not dict:
        raise ValueError(f"the network is {_show(kind)}, expected {', '.join(_PRECONDS)} and its arguments")
    args = _PRECONDS[kind] | init
    _check("model_type", args["model_type"], None)
    network = _NETWORKS[args["model_type"]]
    inner = {name: p.default for name, p in inspect.signature(network).parameters.items() if name not in ("in_channels", "out_channels")}
    for name, value in args.items():
        if name not in _PRECONDS[kind] | inner:
            raise ValueError(f"unknown argument {_show(name)} of {kind} around a {args['model_type']}")
        if name in init or value is None:
            _check(name, value, (inner | _PRECONDS[kind])[name])
    channels = {"in_channels": args["img_channels"], "out_channels": args["img_channels"] * (2 if kind == "iDDPMPrecond" else 1)}
    try:
        return Precond(kind, network(**channels, **{name: args[name] for name in args if name in inner}), args)
    except (RuntimeError, ArithmeticError) as error:  # sizes that torch cannot count, a group of no channels
        raise ValueError(f"its arguments describe no network ({_line(error)})") from None


def _filled(config, state):
    """build(config) with the tensors of `state` in float32. Raises ValueError on the first that is missing, unknown or unfit."""
    with torch.device("meta"):  # no memory before the tensors are known to fit
        net = build(config)
    own = net.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            raise ValueError(f"tensor {_show(name)} is {'unexpected' if name in state else 'missing'}")
        if state[name].shape != own[name].shape or not state[name].is_floating_point():
            found = f"{state[name].dtype} {tuple(state[name].shape)}"
            raise ValueError(f"tensor {name} is {found}, expected floating-point {tuple(own[name].shape)} from the arguments")
    # A copy of each: two names may share a storage, which safetensors would not write.
    state = {name: value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format) for name, value in state.items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"tensor {name} is not finite")
    net.load_state_dict(state, assign=True)
    return net


# --------------------------------------------------------------------------------------------------------- the pickle


class _Asks(Exception):
    """A pickle asks for a global that is not on the list; args[0] is its name."""


class _Global(str):
    """What a pickle gets for a global on the list: its name. Only REDUCE and NEWOBJ look up what it stands for."""


class _Object:
    """An object of the file, as data: the name of its class and its attributes."""

    def __init__(self, name, state=None):
        self.name, self.state = name, state


def _persistent(meta):
    if meta["type"] != "class" or type(meta["class_name"]) is not str or type(meta["state"]) is not dict:
        raise ValueError("a persistent object without class_name or state")
    return _Object(meta["class_name"], meta["state"])  # meta["module_src"], a whole program, stays unread


def _storage(data):
    """A flat tensor of what torch.save(storage) wrote."""
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([^\s`'\"]+)", str(error))
        raise (_Asks(asked[1]) if asked else ValueError("tensor data that are no tensor's")) from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("tensor data that are no storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


def _tensor(flat, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    if flat.dim() != 1 or math.prod(size) > len(flat):  # a stride of 0 would make a storage of one number fill any memory
        raise ValueError(f"a tensor larger than its storage of {len(flat)}")
    return flat.as_strided(size, stride, offset)  # which checks the bounds


def _parameter(data, requires_grad=True, hooks=None):
    return data.detach()


def _dtype(code, align=False, copy=True):
    if type(code) is not str or not re.fullmatch("[fiu][1248]|b1", code):
        raise ValueError(f"numpy dtype {_show(code)}")
    return _Object(code)


def _scalar(dtype, data):
    order = dtype.state[1] if type(dtype.state) is tuple and dtype.state[1] in ("<", ">") else "="
    return np.frombuffer(data, np.dtype(order + dtype.name)).item()


def _dict():
    return {}


_CALLS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
}


class _Opcodes(dict):
    def __missing__(self, code):
        name = getattr(pickletools.code2op.get(chr(code)), "name", hex(code))
        raise pickle.UnpicklingError(f"pickle opcode {name}, which such a file does without")


class _Unpickler(pickle._Unpickler):
    """Reads the opcodes that such a file is made of, and no others; on its stack are data, never anything that can be called.

    In Python, not C: the C class's opcodes cannot be taken away, among them the extension registry, BUILD on anything, and
    LONG_BINPUT, which fills the memory that it is told to. A file has some ten thousand opcodes; its bulk is read in one piece each.
    """

    dispatch = _Opcodes(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]])
        for name in (
            "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE "
            "SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_SET EMPTY_DICT "
            "MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL"
        ).split()
    )

    def find_class(self, module, name):
        full = f"{module}.{name}"
        # torch.nn.* are containers, here mere objects with a state; a dotted name would reach through them.
        if name.isidentifier() and (full in _CALLS or f"{module}.".startswith("torch.nn.")):
            return _Global(full)
        raise _Asks(full)

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or function not in _CALLS or type(args) is not tuple:
            raise pickle.UnpicklingError("a call of what cannot be called")
        self.append(_CALLS[function](*args))

    def load_newobj(self):
        args, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not _Global or _CALLS.get(kind, _dict) is not _dict or type(args) is not tuple or args:
            raise pickle.UnpicklingError("an object of no known class")
        self.append({} if kind in _CALLS else _Object(kind))

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not _Object or target.state is not None:
            raise pickle.UnpicklingError("a state for what has none")
        target.state = state

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self):
        self._set(self.pop_mark())

    def _set(self, items):
        # Names and numbers alone: to hash a tuple of tuples of tuples would overflow the stack.
        if type(self.stack[-1]) is not dict or len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):
            raise pickle.UnpicklingError("an entry of no dict")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build}
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _config(network):
    """The config, as build takes it, of a network in a pickle."""
    if type(network) is not _Object or type(network.state) is not dict:
        raise ValueError("it has no entry 'ema' with a network")
    names, args, kwargs = list(_PRECONDS.get(network.name, ())), network.state.get("_init_args"), network.state.get("_init_kwargs")
    if type(args) not in (tuple, list) or type(kwargs) is not dict or len(args) > len(names) > 0:
        raise ValueError("its network's constructor arguments are missing or too many")
    init = {name: list(value) if type(value) is tuple else value for name, value in (dict(zip(names, args)) | kwargs).items()}
    if init.get("sigma_max") == math.inf:  # which JSON cannot say; nothing here reads it
        del init["sigma_max"]
    return {"kind": "nvlabs-edm", "precond": network.name, "init": init}


def _tensors(module, prefix, seen):
    """Yield (dotted name, tensor) of all parameters and buffers. A module that occurs twice, so in itself, is refused."""
    if type(module) is not _Object or id(module) in seen:
        raise ValueError(f"{_show(prefix)} is no module, or one that has occurred before")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in module.state[kind].items():
            if value is not None and kind == "_modules":
                yield from _tensors(value, f"{prefix}{name}.", seen)
            elif value is not None:
                if not torch.is_tensor(value):
                    raise ValueError(f"{_show(prefix + name)} is {_show(value)}, expected a tensor")
                yield prefix + name, value


def _line(error):
    """An exception in one short line; its own text only where that is a text, for it may be anything that the file holds."""
    text = error.args[-1] if error.args and isinstance(error.args[-1], str) else ""
    return ascii((text.strip().splitlines() or [type(error).__name__])[0][:200])[1:-1]


def read_pickle(path):
    """(config, network with its float32 tensors) of an NVlabs EDM .pkl; the config is one that build takes.

    Raises UserError where the file is missing, broken, holds no such network, or asks for anything that could run.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):  # torch's own, of TypedStorage
            content = _Unpickler(file).load()
        network = content.get("ema") if type(content) is dict else None
        config = _config(network)
        return config, _filled(config, dict(_tensors(network, "", set())))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or _line(error)}") from None
    except _Asks as error:
        asked = ascii(error.args[0])[1:-1][:100]
        raise UserError(f"{path}: refused, asks for {asked}; only the tensors and arguments of an NVlabs EDM network are read") from None
    except Exception as error:  # a broken or hostile file can raise whatever pickle, torch and numpy have
        raise UserError(f"{path}: not a readable NVlabs EDM network ({_line(error)})") from None


def load(path):
    """(network in eval mode, without gradients; config) of a .pkl file or a directory that `convert` wrote.

    Raises UserError for every defect, as read_pickle does.
    """
    if str(path).endswith(".pkl"):
        config, net = read_pickle(path)
    else:
        config, weights_path = checkpoint.read_json(os.path.join(path, "config.json")), os.path.join(path, "model.safetensors")
        try:
            net = _filled(config, safetensors.torch.load_file(weights_path))
        except (ValueError, OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{weights_path}: not the weights of config.json's network ({_line(error)})") from None
    return net.eval().requires_grad_(False), config


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["convert"], help="what to do")
    parser.add_argument("network", metavar="NETWORK.pkl", help="pickle of NVlabs' EDM")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write, for load()")
    return parser.parse_args(argv)


def main(args):
    config, net = read_pickle(args.network)
    config["pickle_sha256"] = checkpoint.sha256(args.network)
    config_path, weights_path = (os.path.join(args.out_dir, name) for name in ("config.json", "model.safetensors"))
    found = os.listdir(args.out_dir) if os.path.isdir(args.out_dir) else []
    found = [name for name in sorted(found) if not name.endswith(".writing")]  # what a killed conversion leaves
    if found and not ("config.json" in found and checkpoint.read_json(config_path) == config):
        raise UserError(f"{args.out_dir}: holds {found[0]}, not a conversion of {args.network}; give a new directory")
    with checkpoint.atomic(weights_path) as file:
        file.write(safetensors.torch.save(net.state_dict()))
    checkpoint.write_json(config, config_path)
    net, config = load(args.out_dir)
    count = sum(p.numel() for p in net.parameters())
    what = f"{net.kind} around {type(net.model).__name__}, {net.img_resolution} x {net.img_resolution}, {net.img_channels} channels"
    print(f"{args.out_dir}: {what}, {net.label_dim} classes, {count:,} parameters, blocks {net.blocks[0]} to {net.blocks[-1]}")


if __name__ == "__main__":
    cli.run(main, parse_args())
