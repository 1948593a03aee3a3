"""SiT (Ma et al., arXiv 2401.08740): DiT's transformer on VAE latents, which predicts a velocity.

    python -m teachers.sit convert SiT-XL-2-256x256.pt VAE_DIR OUT_DIR

writes OUT_DIR/model.safetensors, config.json and vae/, which load_diffusion opens. VAE_DIR: a
diffusers AutoencoderKL; SiT's is stabilityai/sd-vae-ft-ema (latents x 0.18215).

The .pt file is that of github.com/willisma/SiT, whose weights are under the MIT licence: a state
dict, or one under `ema`. It is read weights-only, as data. Two settings are not in its tensors: the
number of heads, which follows from the width, and the path, which is the linear one, the default.

diffusers' DiTTransformer2DModel would not do: its frequencies of t are 10000^(-i/127), SiT's
10000^(-i/128), which changes outputs by 1e-4, and it holds the embeddings in every block.
"""

import math
import os

import torch
from torch import nn

from common import cli, files
from teachers import parts
from teachers.dit import OnLatents
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

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of each width: S, B, L and XL
SETTINGS = "size channels out_channels patch width depth heads num_classes".split()


class MLP(nn.Module):
    """(B, N, width) -> (B, N, width)."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbedding(nn.Module):
    """Tokens (B, N, width) of the patches of x (B, C, R, R)."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class SiTNet(nn.Module):
    """x_t (B, channels, size, size), t, labels -> (B, out_channels, size, size).

    t: (B,) in [0, 1]. labels: (B,) int64, num_classes for none. The first `channels` of the output
    are the velocity clean - noise. Those that may follow were to be variances; nothing uses them.
    Raises ValueError where sizes do not fit.
    """

    def __init__(self, size, channels, out_channels, patch, width, depth, heads, num_classes):
        super().__init__()
        check_sizes(size, patch, width, heads, 1)
        self.size = size
        self.channels = channels
        self.patch = patch
        self.num_classes = num_classes

        def norm():
            return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

        self.x_embedder = PatchEmbedding(channels, width, patch)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            Block(width, norm, Attention(width, heads), MLP(width)) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, norm, patch**2 * out_channels)

    def forward(self, x, t, labels):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(labels)
        for block in self.blocks:
            x = block(x, c)
        return image_of(self.final_layer(x, c), self.patch)


class SiT(OnLatents, Flow):
    """A SiTNet with its VAE, as all scripts see a diffusion model."""

    def __init__(self, net, vae):
        image_size = net.size * 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(net, image_size, vae.config.in_channels)
        self.use_vae(vae, (net.channels, net.size, net.size))

    def _clean(self, x_t, rest, output):
        return x_t + rest * output[:, : x_t.shape[1]]


# ------------------------------------------------------------------------- files and directories


def read_checkpoint(path):
    """(network with its float32 tensors, settings) of a published .pt file. Raises UserError."""
    tensors = parts.read_checkpoint(path, "ema")
    with files.reading(path, "a checkpoint of SiT"):
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        if width not in HEADS:
            raise ValueError(f"tokens of width {width}, expected 384, 768, 1024 or 1152")
        config = {
            "size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
            "channels": channels,
            "out_channels": len(tensors["final_layer.linear.weight"]) // patch**2,
            "patch": patch,
            "width": width,
            "depth": n_blocks(tensors),
            "heads": HEADS[width],
            "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
        }
    return build(config, tensors, path, path), config


def build(config, tensors, config_path, path):
    """A SiTNet of settings and tensors, of the files config_path and path. Raises UserError."""
    init = settings(config, SETTINGS, config_path)
    with files.reading(config_path, "the settings of a SiT"):
        return parts.filled(lambda: SiTNet(**init), tensors, path)


def convert(checkpoint, vae_dir, out_dir):
    """Write a published file and a VAE as a directory that load_diffusion opens.

    Raises UserError where the directory holds anything else than this conversion.
    """
    import diffusers

    net, config = read_checkpoint(checkpoint)
    directory = parts.Directory(vae_dir)
    vae = directory.network(diffusers.AutoencoderKL, "")
    config = {"kind": "sit"} | config
    config["checkpoint_sha256"] = files.sha256(checkpoint)
    config["vae_sha256"] = directory.sha256()
    contents = {
        "vae/diffusion_pytorch_model.safetensors": vae.state_dict(),
        "vae/config.json": directory.settings(""),
        "model.safetensors": net.state_dict(),
        "config.json": config,
    }
    parts.write_converted(contents, out_dir, checkpoint)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=["convert"], help="what to do")
    parser.add_argument("checkpoint", metavar="CHECKPOINT.pt", help="published weights")
    parser.add_argument("vae_dir", metavar="VAE_DIR", help="directory of an AutoencoderKL")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="directory to write")
    return parser.parse_args(argv)


def main(args):
    convert(args.checkpoint, args.vae_dir, args.out_dir)
    config = files.read_json(os.path.join(args.out_dir, "config.json"))
    facts = ", ".join(f"{name} {config[name]}" for name in SETTINGS)
    print(f"{args.out_dir}: a SiT ({facts})")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
