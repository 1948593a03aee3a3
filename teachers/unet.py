"""A diffusers UNet2DModel: one of train_diffusion.py, or a DDPM with its scheduler.

Opens what train_diffusion.py writes, and DDPMs such as google/ddpm-cifar10-32 (network and
scheduler in one folder, or in unet/ and scheduler/). Other families have files of their own here.
"""

import re

import torch

from common.diffusion import Diffusion, edm_denoise


class EDMUNet(Diffusion):
    """A class-conditional UNet2DModel under EDM's preconditioning, of train_diffusion.py.

    Its label num_classes is the null label that it was trained with.
    """

    def __init__(self, net):
        config = net.config
        self.patch = config.get("patch", 1)
        super().__init__(
            net=net,
            image_size=config.sample_size * self.patch,
            channels=config.in_channels // self.patch**2,
            num_classes=config.num_class_embeds - 1,
            label_dropout=config.label_dropout,
            blocks=unet_blocks(net),
        )
        self.val_size = int(config.get("val_size", 0))
        self.classes = config.get("classes") or ()
        decoder = [name for name in self.blocks if name.startswith("up_blocks")]
        self.default_block = decoder[0]
        self.default_sigma = 0.1

    def _denoise(self, noisy, sigma, labels):
        sigma_data = self.net.config.sigma_data
        return edm_denoise(self.net, noisy, sigma, labels, sigma_data, self.patch)


class Stepwise(Diffusion):
    """A network trained on the steps of a DDPM, such as a DiT, told noise levels as sigma.

    x_t = noisy / sqrt(1 + sigma^2). t is the step whose noise level is nearest to sigma.
    levels: sigma_t of all steps, increasing, (T,) float64.
    predicts: what its output is, as diffusers calls it: "epsilon", the noise; "sample", the clean
    image; "v_prediction", (noise - sigma * clean) / sqrt(1 + sigma^2).
    """

    def __init__(self, levels, predicts, **kwargs):
        super().__init__(**kwargs)
        self.levels = levels
        self.predicts = predicts
        self.sigma_range = (levels[0].item(), levels[-1].item())

    def to(self, device):
        super().to(device)
        self.levels = self.levels.to(device)

    def round_sigma(self, sigma):
        return self.levels[self._step(torch.tensor([sigma], device=self.device))].item()

    def _step(self, sigma):
        """t (B,) int64 of noise levels (B,)."""
        return (self.levels.log() - sigma.double().log()[:, None]).abs().argmin(1)

    def _scaled(self, noisy, sigma):
        """(x_t, t) of noisy images, t (B,) int64."""
        t = self._step(sigma)
        x_t = noisy / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        return x_t, t

    def _clean(self, noisy, sigma, output):
        """D of the network's output. Where it has twice the channels, the rest are variances."""
        output = output[:, : noisy.shape[1]].to(noisy.dtype)
        s = sigma.view(-1, 1, 1, 1)
        if self.predicts == "sample":
            return output
        if self.predicts == "v_prediction":
            return noisy / (1 + s**2) - s / (1 + s**2).sqrt() * output
        return noisy - s * output


class DDPM(Stepwise):
    """A UNet2DModel with the schedule of a DDPM."""

    def __init__(self, net, levels, predicts="epsilon"):
        config = net.config
        super().__init__(
            levels=levels,
            predicts=predicts,
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
        return self._clean(noisy, sigma, output)


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
    if net.mid_block is not None:
        names.append("mid_block")
    for i, block in enumerate(net.up_blocks):
        add(f"up_blocks.{i}", block)
    return names
