"""A diffusers DiT pipeline: a transformer on the latents of a VAE.

Opens facebook/DiT-XL-2-256 and its kind (transformer/, vae/, scheduler/). Other families have files
of their own here.
"""

import torch

from teachers.unet import Stepwise

AT_ONCE = 32  # images in one VAE call: at 256 x 256 pixels its activations are what fills a GPU


class DiT(Stepwise):
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
        self.vae = vae
        self.modules = [net, vae]
        self.noise_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.default_block = self.blocks[n_blocks // 2 - 1]  # transformer_blocks.13 of DiT-XL's 28
        self.default_sigma = levels[100 * len(levels) // 1000].item()  # t = 100 of 1000

    def encode(self, x):
        latents = []
        for part in x.split(AT_ONCE):
            images = (2 * part - 1).to(self.vae.dtype)
            latents.append(self.vae.encode(images).latent_dist.mode().to(x.dtype))
        return torch.cat(latents) * self.vae.config.scaling_factor

    def decode(self, clean):
        latents = (clean / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = [self.vae.decode(part).sample for part in latents.split(AT_ONCE)]
        return torch.cat(images).to(clean.dtype)

    def _denoise(self, noisy, sigma, labels):
        x_t, t = self._scaled(noisy, sigma)
        output = self.net(x_t.to(self.net.dtype), t, class_labels=labels, return_dict=False)[0]
        return self._clean(noisy, sigma, output)
