"""Tiny diffusers pipelines with random weights, for tests of teachers/."""

import diffusers
import torch


def tiny_unet(**changes):
    """A class-conditional UNet2DModel of grey images that also gives variances."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 2,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "num_class_embeds": 3,
    }
    return diffusers.UNet2DModel(**settings | changes)


def tiny_ddpm(folder, net=None, **schedule):
    """unet/ and scheduler/ of a DDPM."""
    scheduler = diffusers.DDPMScheduler(**schedule)
    diffusers.DDPMPipeline(net or tiny_unet(), scheduler).save_pretrained(folder)


def tiny_dit(folder, **schedule):
    """transformer/, vae/ and scheduler/ of a DiT on latents of 4 x 4."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=5,
    )
    for parameter in net.parameters():  # diffusers starts the last layers with zeros
        torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        sample_size=8,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **schedule)
    diffusers.DiTPipeline(net, vae, scheduler).save_pretrained(folder)
