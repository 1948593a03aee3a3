"""A diffusers UNet2DModel: one of train_diffusion.py, or a DDPM with its scheduler.

Opens what train_diffusion.py writes, and DDPMs such as google/ddpm-cifar10-32 (network and
scheduler in one folder, or in unet/ and scheduler/). Other families have files of their own here.
"""

import re

from common.diffusion import Diffusion, edm_denoise


class EDMUNet(Diffusion):
    """A class-conditional UNet2DModel under EDM's preconditioning, of train_diffusion.py.

    Its label num_classes is the null label that it was trained with.
    """

    def __init__(self, net):
        config = net.config
        super().__init__(
            net=net,
            image_size=config.sample_size,
            channels=config.in_channels,
            num_classes=config.num_class_embeds - 1,
            label_dropout=config.label_dropout,
            blocks=unet_blocks(net),
        )
        self.val_size = int(config.get("val_size", 0))
        self.classes = tuple(config.get("classes", ()))
        decoder = [name for name in self.blocks if name.startswith("up_blocks")]
        self.default_block = decoder[0]
        self.default_sigma = 0.1

    def _denoise(self, noisy, sigma, labels):
        return edm_denoise(self.net, noisy, sigma, labels, self.net.config.sigma_data)


class NoisePredictor(Diffusion):
    """A DDPM, a network that predicts the noise of x_t, in the scale of sigma.

    x_t = noisy / sqrt(1 + sigma^2) and D = noisy - sigma * predicted noise. t is the step whose
    noise level is nearest to sigma. levels: sigma_t of all steps, increasing, (T,) float64.
    """

    def __init__(self, levels, **kwargs):
        super().__init__(**kwargs)
        self.levels = levels
        self.sigma_range = (levels[0].item(), levels[-1].item())

    def to(self, device):
        super().to(device)
        self.levels = self.levels.to(device)

    def _scaled(self, noisy, sigma):
        """(x_t, t) of noisy images, t (B,) int64."""
        t = (self.levels.log() - sigma.double().log()[:, None]).abs().argmin(1)
        x_t = noisy / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        return x_t, t


class DDPM(NoisePredictor):
    """A UNet2DModel that predicts noise. levels: sigma_t of its scheduler, (T,) float64."""

    def __init__(self, net, levels):
        config = net.config
        super().__init__(
            levels=levels,
            net=net,
            image_size=config.sample_size,
            channels=config.in_channels,
            num_classes=config.num_class_embeds or 0,
            label_dropout=0.0,
            blocks=unet_blocks(net),
        )
        self.has_null_label = self.num_classes == 0
        resnet = r"up_blocks\.\d+\.resnets\.\d+"
        decoder = [name for name in self.blocks if re.fullmatch(resnet, name)]
        self.default_block = decoder[min(5, len(decoder) - 1)]  # the 6th from the bottleneck
        self.default_sigma = levels[11 * len(levels) // 1000].item()  # t = 11 of 1000

    def _denoise(self, noisy, sigma, labels):
        x_t, t = self._scaled(noisy, sigma)
        labels = labels if self.num_classes else None
        output = self.net(x_t.to(self.net.dtype), t, class_labels=labels, return_dict=False)[0]
        return noisy - sigma.view(-1, 1, 1, 1) * output.to(noisy.dtype)


def unet_blocks(net):
    """Names of a UNet2DModel's residual and attention blocks, in the order in which they run."""
    names = []

    def add(prefix, block):
        n_attentions = len(getattr(block, "attentions", None) or ())
        for i in range(len(block.resnets)):
            names.append(f"{prefix}.resnets.{i}")
            if i < n_attentions:
                names.append(f"{prefix}.attentions.{i}")

    for i, block in enumerate(net.down_blocks):
        add(f"down_blocks.{i}", block)
    names.append("mid_block")
    for i, block in enumerate(net.up_blocks):
        add(f"up_blocks.{i}", block)
    return names
