"""Copy a network of train_diffusion.py with its weights in bf16, half the bytes.

    python -m runs.keep_teacher out/diffusion-cifar10 docs/cifar10-teacher

Every script opens the copy like the original. Prints the hash of its weights.
"""

import os

import torch

from common import cli, files


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("source", type=cli.path, help="directory of train_diffusion.py")
    parser.add_argument("target", type=cli.path, help="directory of the copy")
    return parser.parse_args(argv)


def main(args):
    name = "diffusion_pytorch_model.safetensors"
    weights = files.read_safetensors(os.path.join(args.source, name))
    config = files.read_text(os.path.join(args.source, "config.json"))
    halved = {key: tensor.to(torch.bfloat16) for key, tensor in weights.items()}
    os.makedirs(args.target, exist_ok=True)
    path = os.path.join(args.target, name)
    files.write_safetensors(halved, path, {"format": "pt"})
    files.write_text(config, os.path.join(args.target, "config.json"))
    print(f"{path}: {os.path.getsize(path):,} bytes, sha256 {files.sha256(path)}")


if __name__ == "__main__":
    cli.run_script(main, parse_args())
