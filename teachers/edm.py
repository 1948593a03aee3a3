"""The networks of NVlabs' EDM (Karras et al., arXiv 2206.00364), and how NVlabs' files are opened.

    python -m teachers.edm convert NETWORK.pkl OUT_DIR

writes OUT_DIR/model.safetensors (float32) and OUT_DIR/config.json (the constructor's arguments).
load() opens such a directory, or the pickle itself. How a pickle is read without running it stands
in teachers/pickles.py. Files of EDM2 are opened here as well; its networks stand in edm2.py.

Opens the networks at nvlabs-fi-cdn.nvidia.com/edm/pretrained (edm-cifar10-32x32-uncond-vp.pkl,
edm-imagenet-64x64-cond-adm.pkl, ..., and baseline/), and those that others trained with NVlabs'
code, such as DM-AT's. Networks: DDPM++, NCSN++ and ADM. Preconditioning: EDM, VP, VE and iDDPM.

Licence: this code is our own, written from the paper and from facts of the file format (names and
shapes of the parameters). NVlabs' code and weights are CC BY-NC-SA 4.0: nothing of the code was
copied, and whoever fetches the weights is bound by that licence.
"""

import inspect
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from common import cli, files
from common.diffusion import Diffusion
from teachers import edm2, parts, pickles

# ------------------------------------------------------------------------------------- the networks


class _ResamplingConv(nn.Conv2d):
    """A convolution that also halves or doubles the image, by a separable filter.

    mode "down" or "up": the filter comes before the kernel. mode "fused": halves, and the filter
    comes after the kernel, on an image that the kernel has not cropped.
    kernel: its width; 0 for the filter alone. taps: the filter along one side, as [1, 3, 3, 1].
    """

    def __init__(self, cin, cout, kernel, mode, taps):
        super().__init__(cin, cout, kernel or 1)
        self.mode = mode
        self.kernel = kernel
        self.filter_padding = (len(taps) - 1) // 2
        line = torch.tensor(taps, dtype=torch.float32)
        square = line.outer(line) / line.sum() ** 2
        self.register_buffer("resample_filter", square[None, None])
        if kernel == 0:
            self.weight = None
            self.bias = None

    def forward(self, x):
        padding = self.kernel // 2
        if self.mode == "fused":
            x = F.conv2d(x, self.weight, padding=padding + self.filter_padding)
            x = self._resample(x, padding=0)
        else:
            x = self._resample(x, padding=self.filter_padding)
            if self.kernel:
                x = F.conv2d(x, self.weight, padding=padding)
        if self.kernel:
            x = x + self.bias[:, None, None]
        return x

    def _resample(self, x, padding):
        channels = x.shape[1]
        weight = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.mode == "up":
            return F.conv_transpose2d(x, 4 * weight, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, weight, stride=2, padding=padding, groups=channels)


def _norm(channels, eps=1e-5):
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def _conv3(cin, cout):
    return nn.Conv2d(cin, cout, 3, padding=1)


class UNetBlock(nn.Module):
    """Residual block: x (B, cin, H, W), emb (B, E) -> (B, cout, H', W').

    mode: "down" halves the image, "up" doubles it, None keeps its size.
    adm=False (SongUNet): the embedding is added; attention has one head.
    adm=True (DhariwalUNet): the embedding gives scale and shift; attention has a head for every 64
    channels, so none below 64; a skip that only resamples has no kernel.
    Raises ValueError where the heads do not divide the channels.
    """

    def __init__(self, cin, cout, emb_channels, adm, taps, mode=None, attention=False):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.adm = adm
        self.scale = 1 if adm else 0.5**0.5
        self.heads = 0
        if attention:
            self.heads = cout // 64 if adm else 1
        if self.heads and cout % self.heads:
            raise ValueError(f"{cout} channels cannot be divided among {self.heads} heads")

        self.norm0 = _norm(cin, eps)
        if mode:
            self.conv0 = _ResamplingConv(cin, cout, 3, mode, taps)
        else:
            self.conv0 = _conv3(cin, cout)
        self.affine = nn.Linear(emb_channels, 2 * cout if adm else cout)
        self.norm1 = _norm(cout, eps)
        self.conv1 = _conv3(cout, cout)
        if mode:
            kernel = 0 if adm and cin == cout else 1
            self.skip = _ResamplingConv(cin, cout, kernel, mode, taps)
        elif cin != cout:
            self.skip = nn.Conv2d(cin, cout, 1)
        else:
            self.skip = nn.Identity()
        if self.heads:
            self.norm2 = _norm(cout, eps)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = shift.chunk(2, 1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + shift)
        h = self.conv1(F.silu(h))
        x = (h + self.skip(x)) * self.scale
        if self.heads:
            x = (self._attention(x) + x) * self.scale
        return x

    def _attention(self, x):
        """Self-attention over the pixels of x (B, C, H, W)."""
        qkv = self.qkv(self.norm2(x))
        qkv = qkv.unflatten(1, (self.heads, -1, 3)).flatten(4)  # (B, heads, C / heads, 3, H * W)
        q, k, v = qkv.unbind(3)
        attended = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return self.proj(attended.reshape(x.shape))


class UNet(nn.Module):
    """EDM's two networks, SongUNet (adm=False) and DhariwalUNet (adm=True).

    SongUNet is DDPM++ with the defaults, and NCSN++ with encoder_type "residual", embedding_type
    "fourier", resample_filter [1, 3, 3, 1] and channel_mult_noise 2. DhariwalUNet is ADM (Dhariwal
    & Nichol, arXiv 2105.05233) as EDM uses it: the same scheme with other blocks, another
    embedding, another output, and the defaults _ADM_DEFAULTS.

    x (B, in_channels, R, R), noise_labels (B,) = c_noise, class_labels (B, label_dim) or None
    -> (B, out_channels, R, R). Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        adm,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,  # number of classes
        augment_dim=0,  # width of the augmentation label, which NVlabs' training alone gives
        model_channels=128,
        channel_mult=(1, 2, 2, 2),  # channels of each level, in units of model_channels
        channel_mult_emb=4,  # channels of the embedding, in the same units
        num_blocks=4,  # of each level
        attn_resolutions=(16,),
        dropout=0.10,  # of the training
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,  # channels of the noise level's code, in units of model_channels
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        super().__init__()
        taps = list(resample_filter)
        levels = len(channel_mult)
        noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        if img_resolution % 2 ** (levels - 1) or noise_channels % 2 or len(taps) % 2:
            sizes = f"{img_resolution} pixels, {levels} levels, {noise_channels} noise channels"
            raise ValueError(f"{sizes}, filter {taps} cannot be halved")
        self.adm = adm
        self.num_blocks = num_blocks
        self.label_dim = label_dim
        self.label_dropout = label_dropout
        self.noise_channels = noise_channels
        resolutions = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        self.sizes = [f"{resolution}x{resolution}" for resolution in resolutions]

        # Embedding of noise level and label.
        self.map_noise = None
        if embedding_type == "fourier":
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", 16 * torch.randn(noise_channels // 2))
        self.map_label = None
        if label_dim:
            label_channels = emb_channels if adm else noise_channels
            self.map_label = nn.Linear(label_dim, label_channels, bias=not adm)
        self.map_augment = None  # here for its weights alone
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False)
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        def block(cin, cout, **kwargs):
            return UNetBlock(cin, cout, emb_channels, adm, taps, **kwargs)

        # Encoder. c: channels of x. side: channels of the side image of NCSN++. skips: channels of
        # what the decoder gets.
        c = widths[0] if adm else model_channels
        side = in_channels
        skips = [c]
        self.enc = nn.ModuleDict()
        self.enc[f"{self.sizes[0]}_conv"] = _conv3(in_channels, c)
        for level, size in enumerate(self.sizes):
            attention = resolutions[level] in attn_resolutions
            if level > 0:
                self.enc[f"{size}_down"] = block(c, c, mode="down")
                skips.append(c)
            if level > 0 and encoder_type == "skip":
                self.enc[f"{size}_aux_down"] = _ResamplingConv(side, side, 0, "down", taps)
                self.enc[f"{size}_aux_skip"] = nn.Conv2d(side, c, 1)
            if level > 0 and encoder_type == "residual":
                self.enc[f"{size}_aux_residual"] = _ResamplingConv(side, c, 3, "fused", taps)
                side = c
            for i in range(num_blocks):
                self.enc[f"{size}_block{i}"] = block(c, widths[level], attention=attention)
                c = widths[level]
                skips.append(c)

        # Decoder, from the lowest level up.
        self.dec = nn.ModuleDict()
        for level in reversed(range(levels)):
            size = self.sizes[level]
            attention = resolutions[level] in attn_resolutions
            lowest = level == levels - 1
            if lowest:
                self.dec[f"{size}_in0"] = block(c, c, attention=True)
                self.dec[f"{size}_in1"] = block(c, c)
            else:
                self.dec[f"{size}_up"] = block(c, c, mode="up")
            for i in range(num_blocks + 1):
                attends = attention and (adm or i == num_blocks)
                cin = c + skips.pop()
                self.dec[f"{size}_block{i}"] = block(cin, widths[level], attention=attends)
                c = widths[level]
            if decoder_type == "skip" and not lowest:
                up = _ResamplingConv(out_channels, out_channels, 0, "up", taps)
                self.dec[f"{size}_aux_up"] = up
            if not adm and (decoder_type == "skip" or level == 0):
                self.dec[f"{size}_aux_norm"] = _norm(c, 1e-6)
                self.dec[f"{size}_aux_conv"] = _conv3(c, out_channels)
        if adm:
            self.out_norm = _norm(c)
            self.out_conv = _conv3(c, out_channels)

    def forward(self, x, noise_labels, class_labels=None):
        emb = self._embed(noise_labels, class_labels)

        enc = self.enc
        side = x
        skips = []
        for size in self.sizes:
            if f"{size}_conv" in enc:
                x = enc[f"{size}_conv"](x)
            else:
                x = enc[f"{size}_down"](x, emb)
            if f"{size}_aux_skip" in enc:
                side = enc[f"{size}_aux_down"](side)
                x = x + enc[f"{size}_aux_skip"](side)
            if f"{size}_aux_residual" in enc:
                side = (x + enc[f"{size}_aux_residual"](side)) / 2**0.5
                x = side
            skips.append(x)
            for i in range(self.num_blocks):
                x = enc[f"{size}_block{i}"](x, emb)
                skips.append(x)

        dec = self.dec
        image = None
        for size in reversed(self.sizes):
            if f"{size}_up" in dec:
                x = dec[f"{size}_up"](x, emb)
            else:
                x = dec[f"{size}_in0"](x, emb)
                x = dec[f"{size}_in1"](x, emb)
            for i in range(self.num_blocks + 1):
                x = torch.cat([x, skips.pop()], 1)
                x = dec[f"{size}_block{i}"](x, emb)
            if f"{size}_aux_conv" in dec:
                part = dec[f"{size}_aux_conv"](F.silu(dec[f"{size}_aux_norm"](x)))
                image = part if image is None else part + dec[f"{size}_aux_up"](image)
        if self.adm:
            return self.out_conv(F.silu(self.out_norm(x)))
        return image

    def _embed(self, noise_labels, class_labels):
        """The embedding (B, E) of noise level (B,) and label (B, label_dim)."""
        dtype = self.map_layer0.weight.dtype
        n = self.noise_channels // 2
        i = torch.arange(n, dtype=noise_labels.dtype, device=noise_labels.device)
        frequencies = (1 / 10000) ** (i / (n if self.adm else n - 1))
        if self.map_noise is not None:
            frequencies = 2 * math.pi * self.map_noise.freqs
        angles = noise_labels.outer(frequencies)
        if self.adm:
            emb = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None:
                emb = emb + self.map_label(class_labels)
            return F.silu(emb)
        emb = torch.cat([angles.sin(), angles.cos()], 1).to(dtype)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * self.label_dim**0.5)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))


# ---------------------------------------------------------------------------------- preconditioning


class Precond(nn.Module):
    """D(noisy; sigma, labels) = c_skip noisy + c_out F(c_in noisy; c_noise, labels).

    kind: a name of PRECONDS, the row of EDM's table 1. model: F. args: the constructor's arguments.

    noisy (B, C, H, W): clean images in [-1, 1] + sigma * noise. sigma (B,). class_labels
    (B, label_dim): one-hot; None is no label, all zeros. Returns (B, C, H, W). Only F computes in
    the parameters' dtype where that is bfloat16.
    """

    def __init__(self, kind, model, args):
        super().__init__()
        self.kind = kind
        self.model = model
        self.args = args
        self.title = f"{kind} around {args['model_type']}"
        self.img_resolution = args["img_resolution"]
        self.img_channels = args["img_channels"]
        self.label_dim = args["label_dim"]
        self.label_dropout = model.label_dropout
        # The blocks in the order in which they run; each is the submodule "model." + name.
        names = [f"enc.{key}" for key in model.enc] + [f"dec.{key}" for key in model.dec]
        self.blocks = [name for name in names if "aux" not in name]
        if kind == "iDDPMPrecond":
            self.register_buffer("u", iddpm_levels(args["M"], args["C_1"], args["C_2"]))

    def forward(self, noisy, sigma, class_labels=None):
        dtype = self.model.map_layer0.weight.dtype
        noisy = noisy.to(torch.promote_types(noisy.dtype, dtype))
        if class_labels is None:
            class_labels = noisy.new_zeros(len(noisy), self.label_dim)
        c_skip, c_out, c_in, c_noise = self._coefficients(sigma.to(noisy))
        scaled = (c_in.view(-1, 1, 1, 1) * noisy).to(dtype)
        output = self.model(scaled, c_noise, class_labels.to(dtype)).to(noisy.dtype)
        output = output[:, : self.img_channels]  # iDDPM's network also gives variances
        return c_skip.view(-1, 1, 1, 1) * noisy + c_out.view(-1, 1, 1, 1) * output

    def _coefficients(self, sigma):
        """c_skip, c_out, c_in and c_noise, each (B,), of noise levels (B,)."""
        args = self.args
        one = torch.ones_like(sigma)
        if self.kind == "EDMPrecond":
            sigma_data = args["sigma_data"]
            root = (sigma**2 + sigma_data**2).sqrt()
            return (sigma_data / root) ** 2, sigma * sigma_data / root, 1 / root, sigma.log() / 4
        if self.kind == "VEPrecond":
            return one, sigma, one, (sigma / 2).log()
        if self.kind == "VPPrecond":
            # The time t of sigma: the inverse of sigma_at.
            beta_min = args["beta_min"]
            root = (beta_min**2 + 2 * args["beta_d"] * (1 + sigma**2).log()).sqrt()
            t = (root - beta_min) / args["beta_d"]
            c_noise = (args["M"] - 1) * t
        else:
            c_noise = (args["M"] - 1 - self.nearest(sigma)).to(sigma)
        return one, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def sigma_at(self, t):
        """VP's noise level at a time t: sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
        beta_d, beta_min = self.args["beta_d"], self.args["beta_min"]
        return math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t))

    def nearest(self, sigma):
        """iDDPM's indices (B,) of the levels u that are nearest to noise levels (B,)."""
        return (self.u - sigma[:, None]).abs().argmin(1)


def iddpm_levels(M, C_1, C_2):
    """iDDPM's noise levels u_0 > ... > u_M = 0 (EDM, table 1): float32 (M + 1,)."""
    alpha_bar = [math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2 for j in range(M + 1)]
    u = [0.0]
    for j in range(M, 0, -1):
        ratio = max(alpha_bar[j - 1] / alpha_bar[j], C_1)
        u.append(math.sqrt((u[-1] ** 2 + 1) / ratio - 1))
    return torch.tensor(u[::-1])


class EDMNetwork(Diffusion):
    """A Precond as all scripts see a diffusion model. Without a label it gets zeros."""

    def __init__(self, net):
        super().__init__(
            net=net,
            image_size=net.img_resolution,
            channels=net.img_channels,
            num_classes=net.label_dim,
            label_dropout=net.label_dropout,
            blocks=net.blocks,
        )
        self.hooked = net.model
        if net.kind == "VEPrecond":
            self.sigma_range = (net.args["sigma_min"], net.args["sigma_max"])
        if net.kind == "VPPrecond":
            self.sigma_range = (net.sigma_at(net.args["epsilon_t"]), net.sigma_at(1))
        if net.kind == "iDDPMPrecond":
            self.sigma_range = (net.u[-2].item(), net.u[0].item())
        decoder = [name for name in self.blocks if name.startswith("dec.16x16_block")]
        if not decoder:
            decoder = [name for name in self.blocks if name.startswith("dec.")]
        self.default_block = decoder[min(1, len(decoder) - 1)]
        self.default_sigma = 0.06  # the 4th of 18 sampling levels, from below

    def round_sigma(self, sigma):
        if self.net.kind != "iDDPMPrecond":
            return sigma
        return self.net.u[self.net.nearest(self.net.u.new_tensor([sigma]))].item()

    def _denoise(self, noisy, sigma, labels):
        return self.net(noisy, sigma, parts.one_hot(labels, self.num_classes, noisy.dtype))


# ---------------------------------------------------------------------- a network by its settings

_COMMON = {"img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False}
PRECONDS = {  # the constructors' arguments in their order, with their defaults
    "EDMPrecond": _COMMON
    | {"sigma_min": 0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "VPPrecond": _COMMON
    | {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "VEPrecond": _COMMON | {"sigma_min": 0.02, "sigma_max": 100, "model_type": "SongUNet"},
    "iDDPMPrecond": _COMMON | {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
    "Precond": _COMMON | {"use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128},  # of EDM2
}
_SONG_ARGS = inspect.signature(UNet).parameters.keys() - {"adm", "in_channels", "out_channels"}
_SONG_ALONE = set(
    "embedding_type channel_mult_noise encoder_type decoder_type resample_filter".split()
)
_EDM2_ARGS = {"model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout"}
_ADM_DEFAULTS = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
}

# What the arguments can be. Those that stand nowhere here are whole numbers from 1.
_CHOICES = {
    "model_type": ("SongUNet", "DhariwalUNet"),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
    "use_fp16": (True, False),
}
_LISTS = ("channel_mult", "attn_resolutions", "resample_filter")
_FRACTIONAL = (
    "sigma_min sigma_max sigma_data beta_d beta_min epsilon_t C_1 C_2 dropout label_dropout"
).split()
_DIVISORS = ("sigma_data", "beta_d")
_FROM_ZERO = ("label_dim", "augment_dim")
# Far above any published network; without limits a small file could ask for endless work.
_MOST = {"num_blocks": 64, "M": 10**4, "img_resolution": parts.MAX_SIZE}


def _check(name, value):
    """Raises ValueError where `value` cannot be the constructor's argument `name`."""
    most = _MOST.get(name, 10**6)
    if name in _CHOICES:
        choices = _CHOICES[name]
        good = type(value) is type(choices[0]) and value in choices
        expected = " or ".join(map(str, choices))
    elif name in _LISTS:
        good = type(value) is list and len(value) <= 16
        good = good and all(type(v) is int and 1 <= v <= most for v in value)
        good = good and (len(value) > 0 or name == "attn_resolutions")
        expected = "a list of at most 16 whole numbers from 1"
    elif name in _FRACTIONAL:
        good = type(value) in (int, float) and 0 <= value <= most
        good = good and (value > 0 or name not in _DIVISORS)
        above = "a number above 0, at most" if name in _DIVISORS else "a number from 0 to"
        expected = f"{above} {most}"
    else:
        least = 0 if name in _FROM_ZERO else 1
        good = type(value) is int and least <= value <= most
        expected = f"a whole number from {least} to {most}"
    if not good:
        raise ValueError(f"argument {name} is {pickles.show(value)}, expected {expected}")


def build(config):
    """A Precond with random weights.

    config: {"kind": "nvlabs-edm", "precond": a name of PRECONDS, "init": its arguments by name};
    for EDM2's Precond also "encoder", one of edm2.ENCODERS.
    Raises ValueError where an entry is missing, unknown or cannot be.
    """
    kind = config.get("precond")
    init = config.get("init")
    known = config.get("kind") == "nvlabs-edm" and type(kind) is str and kind in PRECONDS
    if not known or type(init) is not dict:
        expected = f"expected {', '.join(PRECONDS)} and its arguments"
        raise ValueError(f"the network is {pickles.show(kind)}, {expected}")
    args = PRECONDS[kind] | init
    where = kind
    names = _EDM2_ARGS
    if kind != "Precond":
        _check("model_type", args["model_type"])
        where = f"{kind} around a {args['model_type']}"
        adm = args["model_type"] == "DhariwalUNet"
        names = _SONG_ARGS - _SONG_ALONE if adm else _SONG_ARGS
    for name in ("img_resolution", "img_channels", *init):
        if name not in names and name not in PRECONDS[kind]:
            raise ValueError(f"unknown argument {pickles.show(name)} of {where}")
        _check(name, args[name])
    encoder = config.get("encoder")
    if kind == "Precond" and encoder not in edm2.ENCODERS:
        expected = f"expected {' or '.join(edm2.ENCODERS)}"
        raise ValueError(f"its encoder is {pickles.show(encoder)}, {expected}")
    try:
        if kind == "Precond":
            return edm2.Precond(encoder, args)
        in_channels = args["img_channels"]
        out_channels = 2 * in_channels if kind == "iDDPMPrecond" else in_channels
        defaults = _ADM_DEFAULTS if adm else {}
        unet_args = defaults | {name: args[name] for name in args if name in names}
        model = UNet(adm=adm, in_channels=in_channels, out_channels=out_channels, **unet_args)
        return Precond(kind, model, args)
    except (RuntimeError, ArithmeticError) as error:
        # Sizes that torch cannot count, or a group of no channels.
        reason = files.first_line(error)
        raise ValueError(f"its arguments describe no network ({reason})") from error


# ---------------------------------------------------------------------------- pickles, directories


def _config(content):
    """The config, as build takes it, of the network in a pickle's content."""
    network = content.get("ema") if type(content) is dict else None
    if not isinstance(network, pickles.Object) or type(network.state) is not dict:
        raise ValueError("it has no entry 'ema' with a network")
    names = list(PRECONDS.get(network.name, ()))
    args = network.state.get("_init_args")
    kwargs = network.state.get("_init_kwargs")
    if type(args) not in (tuple, list) or type(kwargs) is not dict:
        raise ValueError("its network's constructor arguments are missing")
    if len(args) > len(names) > 0:
        raise ValueError("its network's constructor arguments are too many")
    init = {}
    for name, value in (dict(zip(names, args)) | kwargs).items():
        init[name] = list(value) if type(value) is tuple else value
    if init.get("sigma_max") == math.inf:  # which JSON cannot say; nothing here reads it
        del init["sigma_max"]
    config = {"kind": "nvlabs-edm", "precond": network.name, "init": init}
    if network.name == "Precond":
        config["encoder"] = _encoder(content.get("encoder"))
    return config


def _encoder(encoder):
    """The class of what makes a network's images of pixels. Files without one are of pixels."""
    if encoder is None:
        return edm2.ENCODERS[0]
    if not isinstance(encoder, pickles.Object) or type(encoder.state) is not dict:
        raise ValueError(f"its encoder is {pickles.show(encoder)}, expected an object")
    if encoder.state.get("_init_args") or encoder.state.get("_init_kwargs"):
        raise ValueError("its encoder has arguments of its own, which no published file has")
    return encoder.name


def _tensors(module, prefix, seen):
    """Yield (dotted name, tensor) of all parameters and buffers of a module in a pickle.

    A module that occurs twice, so in itself, is refused. seen: the ids of those that occurred.
    """
    if not isinstance(module, pickles.Object) or id(module) in seen:
        raise ValueError(f"{pickles.show(prefix)} is no module, or one that has occurred before")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state[kind].items():
            if value is None:
                continue
            full_name = prefix + name
            if not torch.is_tensor(value):
                shown = f"{pickles.show(full_name)} is {pickles.show(value)}"
                raise ValueError(f"{shown}, expected a tensor")
            yield full_name, value
    for name, value in module.state["_modules"].items():
        if value is not None:
            yield from _tensors(value, f"{prefix}{name}.", seen)


def read_pickle(path):
    """(config, network with its float32 tensors) of a .pkl of EDM or EDM2. build takes the config.

    Raises UserError where the file is missing, broken, holds no such network, or asks for anything
    that could run.
    """
    content = pickles.read(path)
    with files.reading(path, "a readable NVlabs EDM network"):
        config = _config(content)
        tensors = dict(_tensors(content["ema"], "", set()))
        if sum(tensor.numel() for tensor in tensors.values()) > os.path.getsize(path):
            raise ValueError("more numbers than the file has bytes")
        return config, parts.filled(lambda: build(config), tensors, path)


def load(path):
    """(network in eval mode, without gradients; config) of a .pkl file or a converted directory.

    Raises UserError for every defect, as read_pickle does.
    """
    if str(path).lower().endswith(".pkl") and not os.path.isdir(path):
        config, net = read_pickle(path)
    else:
        config_path = os.path.join(path, "config.json")
        weights_path = os.path.join(path, "model.safetensors")
        config = files.read_json(config_path)
        tensors = files.read_safetensors(weights_path)
        with files.reading(config_path, "the settings of an NVlabs EDM network"):
            net = parts.filled(lambda: build(config), tensors, weights_path)
    return net.eval().requires_grad_(False), config


def convert(pickle_path, out_dir):
    """Write a pickle as a directory that load opens. config.json, which marks its end, is last.

    Raises UserError where the directory holds anything else than this conversion.
    """
    config, net = read_pickle(pickle_path)
    config["pickle_sha256"] = files.sha256(pickle_path)
    contents = {"model.safetensors": net.state_dict(), "config.json": config}
    parts.write_converted(contents, out_dir, pickle_path)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["convert"], help="what to do")
    parser.add_argument("network", metavar="NETWORK.pkl", help="pickle of NVlabs' EDM or EDM2")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write")
    return parser.parse_args(argv)


def main(args):
    convert(args.network, args.out_dir)
    net, _ = load(args.out_dir)
    images = f"{net.img_resolution} x {net.img_resolution}, {net.img_channels} channels"
    n_parameters = sum(p.numel() for p in net.parameters())
    blocks = f"blocks {net.blocks[0]} to {net.blocks[-1]}"
    classes = f"{net.label_dim} classes"
    network = f"{net.title}, {images}, {classes}"
    print(f"{args.out_dir}: {network}, {n_parameters:,} parameters, {blocks}")
    vae = os.path.join(args.out_dir, "vae")
    if isinstance(net, edm2.Precond) and net.on_latents and not os.path.exists(vae):
        print(f"its images are latents; put the VAE {edm2.VAE} into {vae}")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
