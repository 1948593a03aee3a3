"""A diffusers DiT pipeline: a transformer on the latents of a VAE.

Opens facebook/DiT-XL-2-256 and its kind (transformer/, vae/, scheduler/). Other families have files
of their own here.
"""

import torch

from common.diffusion import Diffusion
from teachers.unet import Stepwise

# Pixels in one VAE call, and images: at 32 of 256 x 256 its activations are what fills a GPU.
PIXELS_AT_ONCE = 32 * 256**2
AT_ONCE = 32


def _at_once(pixels):
    """The number of images of so many pixels in one VAE call."""
    return max(1, min(AT_ONCE, PIXELS_AT_ONCE // pixels))


def encode_latents(vae, images):
    """The likeliest latents (B, c, h, w) of images (B, C, H, W) in the VAE's own range."""
    latents = []
    for part in images.split(_at_once(images[0, 0].numel())):
        latents.append(vae.encode(part.to(vae.dtype)).latent_dist.mode().to(images.dtype))
    return torch.cat(latents)


def decode_latents(vae, latents):
    """Images (B, C, H, W) in the VAE's own range of latents (B, c, h, w)."""
    pixels = latents[0, 0].numel() * 4 ** (len(vae.config.block_out_channels) - 1)
    parts = latents.to(vae.dtype).split(_at_once(pixels))
    return torch.cat([vae.decode(part).sample for part in parts]).to(latents.dtype)


class OnLatents(Diffusion):
    """A model on the scaled latents of a VAE, diffusers' AutoencoderKL."""

    def use_vae(self, vae, noise_shape):
        """noise_shape: (C, H, W) of its latents."""
        self.vae = vae
        self.modules = [self.net, vae]
        self.noise_shape = noise_shape

    def encode(self, x):
        return encode_latents(self.vae, 2 * x - 1) * self.vae.config.scaling_factor

    def decode(self, clean):
        return decode_latents(self.vae, clean / self.vae.config.scaling_factor)


class DiT(OnLatents, Stepwise):
    """A DiT on scaled VAE latents, whose label num_classes is the null label."""

    def __init__(self, net, vae, levels, predicts="epsilon"):
        config = net.config
        n_blocks = len(net.transformer_blocks)
        super().__init__(
            levels=levels,
            predicts=predicts,
            net=net,
            image_size=config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
            channels=vae.config.in_channels,
            num_classes=config.num_embeds_ada_norm,
            label_dropout=0.1,  # DiT's rate; diffusers' config does not have it
            blocks=[f"transformer_blocks.{i}" for i in range(n_blocks)],
        )
        self.use_vae(vae, (config.in_channels, config.sample_size, config.sample_size))
        self.default_block = self.blocks[n_blocks // 2 - 1]  # transformer_blocks.13 of DiT-XL's 28
        self.default_sigma = levels[100 * len(levels) // 1000].item()  # t = 100 of 1000

    def _denoise(self, noisy, sigma, labels):
        x_t, t = self._scaled(noisy, sigma)
        output = self.net(x_t.to(self.net.dtype), t, class_labels=labels, return_dict=False)[0]
        return self._clean(noisy, sigma, output)
