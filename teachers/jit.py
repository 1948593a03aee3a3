"""JiT (Li & He, arXiv 2511.13720): a plain transformer on pixels, which predicts the clean image.

    python -m teachers.jit convert checkpoint-last.pth OUT_DIR

writes OUT_DIR/model.safetensors and OUT_DIR/config.json, which load_diffusion opens.

The .pth file is that of github.com/LTH14/JiT (MIT licence): its first average of the weights,
`model_ema1`, which its own evaluation takes, or a state dict alone. It is read weights-only, as
data. Two settings are not in its tensors. Before which block the class tokens come follows from the
depth. The noise's scale is 1, and 2 at 512 pixels, as that repository's README has it; for a
network trained otherwise, edit noise_scale in config.json.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, cli, files
from teachers import parts
from teachers.flow import (
    Attention,
    Block,
    FinalLayer,
    Flow,
    LabelEmbedding,
    TimeEmbedding,
    check_sizes,
    image_of,
    n_blocks,
    settings,
)

CONTEXT_START = {12: 4, 24: 8, 32: 10}  # of each depth: B, L and H
SETTINGS = [
    *"size channels patch width depth heads num_classes".split(),
    *"bottleneck context context_start".split(),
]


class RotaryAttention(Attention):
    """Attention whose queries and keys are normed and turned by angles of their places."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.q_norm = nn.RMSNorm(width // heads, 1e-6)
        self.k_norm = nn.RMSNorm(width // heads, 1e-6)

    def _prepared(self, q, k, angles):
        return turned(self.q_norm(q), angles), turned(self.k_norm(k), angles)


def turned(x, angles):
    """x (B, heads, N, d) with its pairs of neighbouring channels turned by angles (N, d / 2)."""
    pairs = x.to(angles.dtype).unflatten(3, (-1, 2))
    first, second = pairs.unbind(4)
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], 4)
    return pairs.flatten(3).to(x.dtype)


def angles_of(side, channels, like):
    """Angles (side * side, channels / 2) of the places in a square, row by row.

    The first half is the row's, the second the column's: place * 10000^(-i / n), i < n = channels /
    4. like: a tensor of their type and device.
    """
    n = channels // 4
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    place = torch.arange(side, dtype=like.dtype, device=like.device)
    angles = place[:, None] * 10000 ** (-i / n)
    rows = angles[:, None].expand(side, side, n)
    columns = angles[None].expand(side, side, n)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class SwiGLU(nn.Module):
    """(B, N, width) -> (B, N, width)."""

    def __init__(self, width):
        super().__init__()
        hidden = int(4 * width * 2 / 3)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, 2)
        return self.w3(F.silu(gate) * value)


class PatchEmbedding(nn.Module):
    """Tokens (B, N, width) of the patches of x (B, C, R, R), through a bottleneck."""

    def __init__(self, channels, bottleneck, width, patch):
        super().__init__()
        self.proj1 = nn.Conv2d(channels, bottleneck, patch, patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, 1)

    def forward(self, x):
        return self.proj2(self.proj1(x)).flatten(2).mT


class JiTNet(nn.Module):
    """x_t (B, channels, size, size), t, labels -> clean images in [-1, 1], like x_t.

    t: (B,) in [0, 1]. labels: (B,) int64, num_classes for none. context: the number of class
    tokens, which come before those of the image from block context_start on.
    Raises ValueError where sizes do not fit.
    """

    def __init__(
        self,
        size,
        channels,
        patch,
        width,
        depth,
        heads,
        num_classes,
        bottleneck,
        context,
        context_start,
    ):
        super().__init__()
        check_sizes(size, patch, width, heads, 4)
        self.size = size
        self.channels = channels
        self.patch = patch
        self.num_classes = num_classes
        self.context = context
        self.context_start = context_start
        self.head_channels = width // heads

        def norm():
            return nn.RMSNorm(width, 1e-6)

        self.x_embedder = PatchEmbedding(channels, bottleneck, width, patch)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        self.in_context_posemb = nn.Parameter(torch.zeros(1, context, width))
        self.blocks = nn.ModuleList(
            Block(width, norm, RotaryAttention(width, heads), SwiGLU(width)) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, norm, patch**2 * channels)

    def forward(self, x, t, labels):
        angles = angles_of(self.size // self.patch, self.head_channels, like=t)
        label = self.y_embedder(labels)
        c = self.t_embedder(t) + label
        x = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            if i == self.context_start:
                x = torch.cat([label[:, None] + self.in_context_posemb, x], 1)
                angles = F.pad(angles, (0, 0, self.context, 0))  # class tokens are not turned
            x = block(x, c, angles)
        return image_of(self.final_layer(x[:, -self.pos_embed.shape[1] :], c), self.patch)


class JiT(Flow):
    """A JiTNet as all scripts see a diffusion model. Class tokens are no part of its features."""

    default_t = 0.5  # in training 16 % of t lay above it and 1 % above 0.75 (sigmoid N(-0.8, 0.8))

    def __init__(self, net, noise_scale):
        super().__init__(net, net.size, net.channels, noise_scale)

    def pooled(self, output):
        return output[:, -self.net.pos_embed.shape[1] :].mean(1)

    def _clean(self, x_t, rest, output):
        return output


# ------------------------------------------------------------------------- files and directories


def read_checkpoint(path):
    """(network with its float32 tensors, settings) of a published .pth file. Raises UserError."""
    tensors = parts.read_checkpoint(path, "model_ema1")
    tensors = {name.removeprefix("net."): tensor for name, tensor in tensors.items()}
    with files.reading(path, "a checkpoint of JiT"):
        bottleneck, channels, patch, _ = tensors["x_embedder.proj1.weight"].shape
        width = len(tensors["x_embedder.proj2.weight"])
        depth = n_blocks(tensors)
        if depth not in CONTEXT_START:
            raise ValueError(f"{depth} blocks, expected 12, 24 or 32")
        config = {
            "size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
            "channels": channels,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": width // len(tensors["blocks.0.attn.q_norm.weight"]),
            "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
            "bottleneck": bottleneck,
            "context": tensors["in_context_posemb"].shape[1],
            "context_start": CONTEXT_START[depth],
        }
    config["noise_scale"] = 2.0 if config["size"] == 512 else 1.0
    return build(config, tensors, path, path).net, config


def build(config, tensors, config_path, path):
    """A JiT of settings and tensors, of the files config_path and path. Raises UserError."""
    init = settings(config, SETTINGS, config_path)
    noise_scale = config.get("noise_scale")
    if type(noise_scale) not in (int, float) or not 0.01 <= noise_scale <= 100:
        expected = "expected a number from 0.01 to 100"
        raise UserError(f"{config_path}: noise_scale is {parts.shown(noise_scale)}, {expected}")
    with files.reading(config_path, "the settings of a JiT"):
        return JiT(parts.filled(lambda: JiTNet(**init), tensors, path), float(noise_scale))


def convert(checkpoint, out_dir):
    """Write a published file as a directory that load_diffusion opens.

    Raises UserError where the directory holds anything else than this conversion.
    """
    net, config = read_checkpoint(checkpoint)
    config = {"kind": "jit"} | config
    config["checkpoint_sha256"] = files.sha256(checkpoint)
    contents = {"model.safetensors": net.state_dict(), "config.json": config}
    parts.write_converted(contents, out_dir, checkpoint)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["convert"], help="what to do")
    parser.add_argument("checkpoint", metavar="CHECKPOINT.pth", help="published weights")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write")
    return parser.parse_args(argv)


def main(args):
    convert(args.checkpoint, args.out_dir)
    config = files.read_json(os.path.join(args.out_dir, "config.json"))
    facts = ", ".join(f"{name} {config[name]}" for name in SETTINGS)
    print(f"{args.out_dir}: a JiT ({facts})")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
