"""Small networks of NVlabs' EDM2 with random weights, for tests of teachers/ and of generation."""

import diffusers
import numpy as np
import torch

from common import files
from teachers import edm

SMALL = {"model_channels": 32, "channel_mult": [1, 2, 4], "num_blocks": 1, "attn_resolutions": [8]}
PIXELS = "StandardRGBEncoder"
LATENTS = "StabilityVAEEncoder"


def edm2_config(encoder=PIXELS, **init):
    """A config as edm.build takes it, by default for images of 16 x 16 pixels and 3 classes."""
    init = {"img_resolution": 16, "img_channels": 3, "label_dim": 3} | SMALL | init
    return {"kind": "nvlabs-edm", "precond": "Precond", "init": init, "encoder": encoder}


EDM2_CONFIGS = {
    "pixels": edm2_config(sigma_data=0.6, dropout=0.1, use_fp16=True),
    "latents": edm2_config(LATENTS, img_resolution=8, img_channels=4, logvar_channels=16),
    "uncond": edm2_config(label_dim=0),
}


def random_edm2(config, dtype=torch.float64, seed=0):
    """A network whose gains, which start with 0, and norms of weights are random."""
    torch.manual_seed(seed)
    net = edm.build(config).to(dtype).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith("gain"):
            p.copy_(0.5 + torch.rand(()))
        else:
            p.mul_(0.5 + torch.rand(len(p), *[1] * (p.dim() - 1)))
    return net


def edm2_content(nvlabs, net, config):
    """The content of NVlabs' file of a network. nvlabs: the fixture."""
    content = nvlabs.content(net, config)
    numbers = {}
    if config["encoder"] == LATENTS:
        numbers = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32), "_vae": None}
    encoder = nvlabs.wrap(torch.nn.Module(), name=config["encoder"], **numbers)
    return content | {"encoder": encoder}


def edm2_dir(folder, config, vae_channels=4, seed=0):
    """A converted network; one on latents with a tiny VAE that makes 8 x 8 pixels of each."""
    folder.mkdir()
    net = random_edm2(config, torch.float32, seed)
    files.write_safetensors(net.state_dict(), str(folder / "model.safetensors"))
    files.write_json(config, str(folder / "config.json"))
    if config["encoder"] == LATENTS:
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=[8] * 4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            norm_num_groups=4,
            latent_channels=vae_channels,
        )
        vae.save_pretrained(folder / "vae")
    return str(folder)
