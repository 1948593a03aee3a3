"""The networks of NVlabs' EDM2 (Karras et al., arXiv 2312.02696), on pixels or on latents of a VAE.

Their files are opened as those of EDM: teachers/edm.py reads and converts them. It opens the
networks at nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions (edm2-img64-s-..., and
edm2-img512-xxl-..., whose images are latents), and those that others trained with NVlabs' code.

A network on latents is converted, and stabilityai/sd-vae-ft-mse put beside it, into OUT_DIR/vae:

    python -m teachers.edm convert NETWORK.pkl OUT_DIR
    hf download stabilityai/sd-vae-ft-mse --local-dir OUT_DIR/vae

Licence: this code is our own, written from the paper and from facts of the file format (names and
shapes of the parameters). NVlabs' code and weights are CC BY-NC-SA 4.0: nothing of the code was
copied, and whoever fetches the weights is bound by that licence.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.diffusion import Diffusion
from teachers import parts
from teachers.dit import decode_latents, encode_latents

# ---------------------------------------------------------------- layers that keep magnitudes

HEAD = 64  # channels of one head of attention
RESIDUAL = 0.3  # weight of a block's residual path, and of its attention


def _at_least_float32(x):
    """The type that norms and codes of x are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def _normalize(x, dims):
    """x over its root mean square along some dimensions, which is 1 then."""
    n_entries = math.prod([x.shape[dim] for dim in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_at_least_float32(x))
    root_mean_square = norm * n_entries**-0.5
    return x / (1e-4 + root_mean_square).to(x.dtype)


def _mp_silu(x):
    return F.silu(x) / 0.596


def _mp_sum(a, b, t):
    """The weighted sum (1 - t) a + t b of variance 1 where theirs is."""
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def _mp_cat(a, b):
    """Channels of a, then of b, scaled so that both count the same in what follows."""
    n_a = a.shape[1]
    n_b = b.shape[1]
    half = ((n_a + n_b) / 2) ** 0.5
    return torch.cat([a * (half / n_a**0.5), b * (half / n_b**0.5)], 1)


class MPConv(nn.Module):
    """A convolution, or with kernel 0 a linear layer, whose weights are normalised where used."""

    def __init__(self, cin, cout, kernel=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel, kernel] if kernel else [])))

    def forward(self, x):
        weight = self.weight.to(_at_least_float32(self.weight))
        fan_in = weight[0].numel()
        weight = _normalize(weight, tuple(range(1, weight.dim()))) * fan_in**-0.5
        weight = weight.to(x.dtype)
        if weight.dim() == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """The code (B, n) of numbers (B,): cosines of random frequencies and phases."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(n))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(n))

    def forward(self, x):
        angles = x.to(_at_least_float32(x))[:, None] * self.freqs + self.phases
        return 2**0.5 * angles.cos()


# ------------------------------------------------------------------------------------- the networks


class Block(nn.Module):
    """Residual block: x (B, cin, H, W), emb (B, E) -> (B, cout, H', W').

    mode: "down" halves the image, "up" doubles it, None keeps its size. decoder: the encoder's
    blocks normalise their input, and change its channels before the residual path leaves it.
    Attention has a head for every 64 channels, so none below 64. Raises ValueError where the heads
    do not divide the channels.
    """

    def __init__(self, cin, cout, emb_channels, decoder, mode=None, attention=False):
        super().__init__()
        self.decoder = decoder
        self.mode = mode
        self.heads = cout // HEAD if attention else 0
        if self.heads and cout % self.heads:
            raise ValueError(f"{cout} channels cannot be divided among {self.heads} heads")
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = MPConv(emb_channels, cout)
        self.conv_res0 = MPConv(cin if decoder else cout, cout, 3)
        self.conv_res1 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else nn.Identity()
        if self.heads:
            self.attn_qkv = MPConv(cout, 3 * cout, 1)
            self.attn_proj = MPConv(cout, cout, 1)

    def forward(self, x, emb):
        if self.mode == "down":
            x = F.avg_pool2d(x, 2)
        elif self.mode == "up":
            x = F.interpolate(x, scale_factor=2)
        if not self.decoder:
            x = _normalize(self.conv_skip(x), (1,))
        h = self.conv_res0(_mp_silu(x))
        scale = 1 + self.emb_gain * self.emb_linear(emb)  # (B, cout)
        h = self.conv_res1(_mp_silu(h * scale[:, :, None, None].to(h.dtype)))
        if self.decoder:
            x = self.conv_skip(x)
        x = _mp_sum(x, h, RESIDUAL)
        if self.heads:
            x = _mp_sum(x, self._attention(x), RESIDUAL)
        return x.clamp(-256, 256)  # which float16 and bfloat16 can count

    def _attention(self, x):
        """Self-attention over the pixels of x (B, C, H, W), by the cosine of queries and keys."""
        qkv = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)
        q, k, v = _normalize(qkv, (2,)).unbind(3)  # each (B, heads, C / heads, H * W)
        attended = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return self.attn_proj(attended.reshape(x.shape))


class UNet(nn.Module):
    """x (B, img_channels, R, R), noise_labels (B,) = c_noise, class_labels (B, label_dim).

    Returns F, like x. Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        img_resolution,
        img_channels,
        label_dim,  # number of classes
        model_channels=192,
        channel_mult=(1, 2, 3, 4),  # channels of each level, in units of model_channels
        num_blocks=3,  # of each level
        attn_resolutions=(16, 8),
    ):
        super().__init__()
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(f"{img_resolution} pixels, {levels} levels cannot be halved")
        resolutions = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels = max(widths)
        self.num_blocks = num_blocks
        self.label_dim = label_dim
        self.sizes = [f"{resolution}x{resolution}" for resolution in resolutions]
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

        # Encoder. c: channels of x. skips: channels of what the decoder gets.
        c = widths[0]
        skips = [c]
        self.enc = nn.ModuleDict()
        self.enc[f"{self.sizes[0]}_conv"] = MPConv(img_channels + 1, c, 3)
        for level, size in enumerate(self.sizes):
            attention = resolutions[level] in attn_resolutions
            if level > 0:
                self.enc[f"{size}_down"] = Block(c, c, emb_channels, False, "down")
                skips.append(c)
            for i in range(num_blocks):
                width = widths[level]
                block = Block(c, width, emb_channels, False, attention=attention)
                self.enc[f"{size}_block{i}"] = block
                c = width
                skips.append(c)

        # Decoder, from the lowest level up.
        self.dec = nn.ModuleDict()
        for level in reversed(range(levels)):
            size = self.sizes[level]
            attention = resolutions[level] in attn_resolutions
            if level == levels - 1:
                self.dec[f"{size}_in0"] = Block(c, c, emb_channels, True, attention=True)
                self.dec[f"{size}_in1"] = Block(c, c, emb_channels, True)
            else:
                self.dec[f"{size}_up"] = Block(c, c, emb_channels, True, "up")
            for i in range(num_blocks + 1):
                cin = c + skips.pop()
                c = widths[level]
                block = Block(cin, c, emb_channels, True, attention=attention)
                self.dec[f"{size}_block{i}"] = block
        self.out_conv = MPConv(c, img_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x, noise_labels, class_labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            labels = self.emb_label(class_labels.to(emb.dtype) * self.label_dim**0.5)
            emb = _mp_sum(emb, labels, 0.5)
        emb = _mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = _mp_cat(x, skips.pop())
            x = layer(x, emb)
        return self.out_conv(x) * self.out_gain


ENCODERS = ("StandardRGBEncoder", "StabilityVAEEncoder")  # of pixels and of latents


class Precond(nn.Module):
    """EDM's preconditioning around `unet`: D(noisy; sigma, labels), as edm.Precond.

    encoder: one of ENCODERS, which says what its images are. args: those of NVlabs' constructor by
    name; use_fp16 and dropout are about training and change nothing here.
    """

    def __init__(self, encoder, args):
        super().__init__()
        self.title = "EDM2"
        self.on_latents = encoder == ENCODERS[1]
        self.img_resolution = args["img_resolution"]
        self.img_channels = args["img_channels"]
        self.label_dim = args["label_dim"]
        self.sigma_data = args["sigma_data"]
        if self.on_latents and self.img_channels != len(RAW_MEAN):
            raise ValueError(f"{self.img_channels} channels of latents, expected {len(RAW_MEAN)}")
        others = ("use_fp16", "sigma_data", "logvar_channels", "dropout")
        self.unet = UNet(**{name: args[name] for name in args if name not in others})
        # What NVlabs' training weighs its loss with; here for its weights alone.
        self.logvar_fourier = MPFourier(args["logvar_channels"])
        self.logvar_linear = MPConv(args["logvar_channels"], 1)
        # The blocks in the order in which they run; each is the submodule "unet." + name.
        self.blocks = [f"enc.{key}" for key in self.unet.enc]
        self.blocks += [f"dec.{key}" for key in self.unet.dec]

    def forward(self, noisy, sigma, class_labels=None):
        dtype = self.unet.out_conv.weight.dtype
        noisy = noisy.to(torch.promote_types(noisy.dtype, dtype))
        if class_labels is None:
            class_labels = noisy.new_zeros(len(noisy), self.label_dim)
        sigma = sigma.to(noisy)
        s = sigma.view(-1, 1, 1, 1)
        root = (s**2 + self.sigma_data**2).sqrt()
        output = self.unet((noisy / root).to(dtype), sigma.log() / 4, class_labels)
        c_skip = (self.sigma_data / root) ** 2
        c_out = s * self.sigma_data / root
        return noisy * c_skip + output.to(noisy.dtype) * c_out


# ------------------------------------------------------------------------- as all scripts see it

VAE = "stabilityai/sd-vae-ft-mse"
# Of the VAE's latents, by channel. Those that the network sees have mean 0 and deviation 0.5.
RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)


class EDM2(Diffusion):
    """A Precond as all scripts see a diffusion model. Without a label it gets zeros.

    The published class-conditional networks were trained without label dropout: what they make of
    zeros is not known. Beside them stand unconditional ones, -uncond.
    vae: the AutoencoderKL of a network on latents. It takes and gives pixels in [0, 1], where
    Stability's own range is [-1, 1]: EDM2's latents were made so.
    default_block and default_sigma are our choice, by analogy with edm.py's; nobody has measured
    them. Latents have half the deviation of DiT's, so half of DiT's noise level.
    """

    def __init__(self, net, vae=None):
        factor = 1
        if vae is not None:
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(
            net=net,
            image_size=net.img_resolution * factor,
            channels=net.img_channels if vae is None else vae.config.in_channels,
            num_classes=net.label_dim,
            label_dropout=0.0,
            blocks=net.blocks,
        )
        self.hooked = net.unet
        self.vae = vae
        # Latents become those that the network sees: (latents - mean) * scale.
        self.latent_mean = torch.tensor(RAW_MEAN)[:, None, None]
        self.latent_scale = 0.5 / torch.tensor(RAW_STD)[:, None, None]
        if vae is not None:
            self.modules = [net, vae]
            self.noise_shape = (net.img_channels, net.img_resolution, net.img_resolution)
        decoder = [name for name in self.blocks if name.startswith("dec.16x16_block")]
        if not decoder:
            decoder = [name for name in self.blocks if name.startswith("dec.")]
        self.default_block = decoder[1]
        self.default_sigma = 0.06 if vae is None else 0.17

    def to(self, device):
        super().to(device)
        self.latent_mean = self.latent_mean.to(device)
        self.latent_scale = self.latent_scale.to(device)

    def encode(self, x):
        if self.vae is None:
            return super().encode(x)
        return (encode_latents(self.vae, x) - self.latent_mean) * self.latent_scale

    def decode(self, clean):
        if self.vae is None:
            return clean
        latents = clean / self.latent_scale + self.latent_mean
        return 2 * decode_latents(self.vae, latents) - 1

    def _denoise(self, noisy, sigma, labels):
        return self.net(noisy, sigma, parts.one_hot(labels, self.num_classes, noisy.dtype))
