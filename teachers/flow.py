"""What SiT and JiT share: their path from noise to images, and parts of their transformers.

Both are DiT's transformer (Peebles & Xie, arXiv 2212.09748): tokens of patches, and blocks whose
norms are scaled and shifted by an embedding of time and label. Parameters have the names of the
published files, so that those load strictly.

Licence: this code is our own, written from the papers and from facts of the file formats (names and
shapes of the parameters).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from common.diffusion import Diffusion
from teachers import parts

TIME_CHANNELS = 256  # of the code of t
MOST = {"size": parts.MAX_SIZE, "depth": parts.MAX_LAYERS}  # of settings; others 100,000


class Flow(Diffusion):
    """A network that looks at x_t = t * clean + (1 - t) * noise_scale * noise, for t in [0, 1].

    In the scale of sigma, t = noise_scale / (noise_scale + sigma) and x_t = t * noisy.
    A family adds `_clean(x_t, rest, output)`: D of the network's output at x_t; rest: 1 - t,
    (B, 1, 1, 1). The label num_classes is the null label; 0.1 of the labels were dropped.
    The default block and noise level are choices of ours: the last block of the first half, as for
    DiT, and `default_t`.
    """

    default_t = 0.75  # about DiT's noise level

    def __init__(self, net, image_size, channels, noise_scale=1.0):
        super().__init__(
            net=net,
            image_size=image_size,
            channels=channels,
            num_classes=net.num_classes,
            label_dropout=0.1,
            blocks=[f"blocks.{i}" for i in range(len(net.blocks))],
        )
        self.noise_scale = noise_scale
        self.default_block = self.blocks[max(len(self.blocks) // 2 - 1, 0)]
        self.default_sigma = noise_scale * (1 / self.default_t - 1)

    def _denoise(self, noisy, sigma, labels):
        t = self.noise_scale / (self.noise_scale + sigma)
        rest = sigma / (self.noise_scale + sigma)  # 1 - t, without its rounding near t = 1
        x_t = t.view(-1, 1, 1, 1) * noisy
        output = self.net(x_t.to(self.net.pos_embed.dtype), t, labels).to(noisy.dtype)
        return self._clean(x_t, rest.view(-1, 1, 1, 1), output)


# ------------------------------------------------------------------------- parts of transformers


class TimeEmbedding(nn.Module):
    """Embeddings (B, width) of times t (B,) in [0, 1]: an MLP on cosines and sines."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, t):
        n = TIME_CHANNELS // 2
        i = torch.arange(n, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * i / n)
        code = torch.cat([angles.cos(), angles.sin()], 1)
        return self.mlp(code.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Embeddings (B, width) of labels (B,) int64; num_classes is the null label."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels):
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Self-attention over tokens (B, N, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, *place):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, width / heads)
        q, k = self._prepared(q, k, *place)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _prepared(self, q, k):
        """Queries and keys as they are compared."""
        return q, k


class Block(nn.Module):
    """x + gate * attn(modulated norm1 x), then the same with norm2 and mlp.

    x: tokens (B, N, width). c: embedding (B, width) of time and label, which gives shifts, scales
    and gates. place: what the attention is told of the tokens' places.
    """

    def __init__(self, width, norm, attn, mlp):
        super().__init__()
        self.norm1 = norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, *place):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, *place)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """The patches (B, N, n_outputs) of tokens (B, N, width). c: as in Block."""

    def __init__(self, width, norm, n_outputs):
        super().__init__()
        self.norm_final = norm()
        self.linear = nn.Linear(width, n_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def image_of(patches, patch):
    """Images (B, C, R, R) of patches (B, N, patch * patch * C), row by row."""
    side = math.isqrt(patches.shape[1])
    patches = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# -------------------------------------------------------------------------------------- settings


def n_blocks(tensors):
    """The number of blocks of a published file's tensors."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def settings(config, names, path):
    """The entries `names` of a config.json, whole numbers from 1. Raises UserError."""
    for name in names:
        value, most = config.get(name), MOST.get(name, 10**5)
        if type(value) is not int or not 1 <= value <= most:
            expected = f"expected a whole number from 1 to {most}"
            raise UserError(f"{path}: {name} is {parts.shown(value)}, {expected}")
    return {name: config[name] for name in names}


def check_sizes(size, patch, width, heads, multiple):
    """Raises ValueError where patches do not fill an image, or heads the width.

    multiple: of which number a head's width must be.
    """
    if size % patch or width % (heads * multiple):
        sizes = f"size {size}, patch {patch}, width {width}, heads {heads}"
        raise ValueError(f"{sizes}: cannot be divided")
