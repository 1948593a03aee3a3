"""The frozen diffusion model as all scripts see it, and EDM's preconditioning.

The published networks, how their files are opened, and the sampler stand in teachers/.

Noise model (EDM, Karras et al., arXiv 2206.00364): noisy = clean + sigma * noise, with standard
normal noise. Clean images lie in [-1, 1]; for a DiT, "clean" are scaled latents of its VAE.
Everything outside works with x in [0, 1]. Only noisy images, which have no range, are passed in the
network's own scale.
"""

import torch
import torch.nn.functional as F

from common import UserError

# --------------------------------------------------------------------------- the diffusion model


class _Reached(Exception):
    """Raised by a hook to leave the network at the last block that is needed."""


class Diffusion:
    """What all families share. A family adds `_denoise`, and `encode` and `decode` for latents.

    net: the network. modules: all modules of the model (a DiT's VAE too). blocks: names of its
    blocks, in the order in which they run.
    image_size, channels: of the images. noise_shape: (C, H, W) of what is denoised.
    num_classes: 0 for an unconditional network. As a label, num_classes means "none".
    label_dropout: how often it was trained without a label.
    default_block, default_sigma: those that DRA takes. DDAE's (arXiv 2303.09769) for EDM, DDPM
    and DiT; for the others our choice.
    """

    name = "the diffusion network"  # in messages; teachers.load_diffusion has the path there
    precision = "fp32"  # of its networks
    classes = ()  # names of its classes in the order of their labels, where they are known
    val_size = 0  # first training images of its data set that it is known not to have seen
    has_null_label = True  # whether it can be told that there is no label
    sigma_range = (0.0, float("inf"))  # noise levels that it was trained on, where they are known

    def __init__(self, net, image_size, channels, num_classes, label_dropout, blocks):
        self.net = net
        self.modules = [net]
        self.hooked = net  # the module that the names of the blocks belong to
        self.device = torch.device("cpu")
        self.image_size = image_size
        self.channels = channels
        self.noise_shape = (channels, image_size, image_size)
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.blocks = blocks

    def to(self, device):
        """Move all that the model computes with to a device."""
        self.device = device
        for module in self.modules:
            module.to(device)

    def denoise(self, noisy, sigma, y=None):
        """The denoised images or latents D(noisy; sigma, y), like noisy.

        noisy: clean + sigma * noise. sigma: number or (B,). y: (B,) int64 labels, None for none.
        Denoised images lie in [-1, 1] but for the network's error.
        """
        sigma = per_image(sigma, noisy)
        if y is None:
            y = torch.full((len(noisy),), self.num_classes, device=noisy.device)
        return self._denoise(noisy, sigma, y)

    def round_sigma(self, sigma):
        """The noise level, a number, nearest to `sigma` that the network can be told.

        That is sigma itself, but for networks that were trained on a ladder of levels.
        """
        return sigma

    def encode(self, x):
        """Clean images, or latents, of images x in [0, 1] that have the network's size."""
        return 2 * x - 1

    def decode(self, clean):
        """Images in [-1, 1] of clean images or latents."""
        return clean

    def features(self, x, sigma, y, blocks, noise):
        """Outputs of some blocks, averaged over space or tokens: a list of (B, channels).

        x: clean images (B, C, H, W) in [0, 1]; another size than the network's is resized.
        sigma, y: as in denoise. blocks: names out of self.blocks. noise: standard normal
        (B, *noise_shape). The network is left at the last of the blocks.
        """
        outputs = {}

        def keep(name):
            def hook(module, inputs, output):
                if output.dtype != torch.float64:
                    output = output.float()  # averages of bf16 are taken in float32
                outputs[name] = self.pooled(output)
                if len(outputs) == len(set(blocks)):
                    raise _Reached

            return hook

        handles = []
        try:
            for name in set(blocks):
                module = self.hooked.get_submodule(name)
                handles.append(module.register_forward_hook(keep(name)))
            clean = self.encode(self.resize(x))
            self.denoise(clean + sigma * noise, sigma, y)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [outputs[name] for name in blocks]

    def compile(self):
        """Compile what `features` runs, the blocks and a VAE's encoder, module by module.

        A module's own forward is compiled, without what calls its hooks, so that these stay eager.
        """
        parts = [self.hooked.get_submodule(name) for name in self.blocks]
        parts += [vae.encoder for vae in self.modules[1:]]
        # Blocks of one class share their code, and the number of graphs of one code is limited.
        limit = torch._dynamo.config.cache_size_limit
        torch._dynamo.config.cache_size_limit = max(limit, 2 * len(parts))
        for part in parts:
            part.forward = torch.compile(part.forward, dynamic=False)

    def pooled(self, output):
        """The average (B, channels) of a block's output over space or tokens."""
        return output.mean((2, 3) if output.dim() == 4 else 1)

    def resize(self, x):
        """Images of the network's size; x itself where it has that size."""
        if x.shape[-1] == self.image_size:
            return x
        size = (self.image_size, self.image_size)
        return F.interpolate(x, size=size, mode="bilinear", antialias=True)

    def check_places(self, name, blocks, sigmas):
        """Raises UserError where the network has not such blocks, or knows no such noise levels.

        name: of the network, for messages.
        """
        for block in blocks:
            if block not in self.blocks:
                known = ", ".join(self.blocks)
                raise UserError(f"{name}: no block '{block}'; its blocks are {known}")
        low, high = self.sigma_range
        for sigma in sigmas:
            if not low * 0.999 <= sigma <= high * 1.001:
                raise UserError(f"{name}: noise level {sigma:g}, it knows {low:.4g} to {high:.4g}")

    def check_teaches(self, name, spec, with_labels):
        """Raises UserError where the network cannot look at images of the data set `spec`.

        name: of the network, for messages. with_labels: whether it is told the labels.
        """
        if self.channels != spec.channels:
            expected = f"{spec.name} has {spec.channels}"
            raise UserError(f"{name}: images of {self.channels} channels, {expected}")
        if not with_labels and self.num_classes and not self.has_null_label:
            raise UserError(f"{name}: a class-conditional network without a null label")
        if with_labels and self.num_classes != spec.num_classes:
            expected = f"{spec.name} has {spec.num_classes}"
            raise UserError(f"{name}: a network of {self.num_classes} classes, {expected}")
        if with_labels:
            spec.check_classes(name, self.classes)

    def warn_of_null_label(self, name):
        """Print a warning where the network is told classes and never was told none in training."""
        if self.num_classes and not self.label_dropout:
            print(f"warning: {name} was trained without label dropout: no null label is known")


def per_image(sigma, noisy):
    """A noise level, a number or (B,), as (B,) in the type of noisy images and on their device."""
    if torch.is_tensor(sigma):
        return sigma.to(noisy).expand(len(noisy))
    return torch.full((len(noisy),), sigma, dtype=noisy.dtype, device=noisy.device)


# --------------------------------------------------------------------------- EDM's preconditioning


def edm_denoise(net, noisy, sigma, labels, sigma_data, patch=1):
    """D = c_skip * noisy + c_out * F(c_in * noisy; c_noise): EDM's preconditioning, table 1.

    net: UNet2DModel with class embedding. noisy: (B, C, H, W). sigma: number or (B,).
    labels: (B,) int64, num_classes meaning "none". sigma_data: standard deviation of the data.
    patch: the network sees squares of patch x patch pixels as channels of one place.
    """
    sigma = per_image(sigma, noisy)
    s = sigma.view(-1, 1, 1, 1)
    root = (s**2 + sigma_data**2).sqrt()
    c_skip = (sigma_data / root) ** 2
    c_out = s * sigma_data / root
    scaled = F.pixel_unshuffle((noisy / root).to(next(net.parameters()).dtype), patch)
    output = net(scaled, sigma.log() / 4, class_labels=labels, return_dict=False)[0]
    output = F.pixel_shuffle(output, patch).to(noisy.dtype)
    return noisy * c_skip + output * c_out
