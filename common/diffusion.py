"""Frozen diffusion models with one noise scale sigma: denoise, sample, and the features inside.

Noise model (EDM, Karras et al., arXiv 2206.00364): noisy = clean + sigma * n, n ~ N(0, I), with clean images in [-1, 1].
Everything outside works with x in [0, 1]; only noisy images, which have no range, are passed in the network's own scale.
"""

import os

import torch

from common import checkpoint
from common.cli import UserError


def load_diffusion(path, device):
    """The diffusion model of a directory that train_diffusion.py wrote (a diffusers UNet2DModel with EDM preconditioning).

    Raises UserError where the directory is missing, broken, or holds another kind of network.
    """
    if not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path}/config.json: no such file; train_diffusion.py makes such a directory")
    config = checkpoint.read_json(os.path.join(path, "config.json"))
    for key, kind, low in (("sigma_data", float, 1e-6), ("label_dropout", float | int, 0), ("num_class_embeds", int, 2)):
        if not isinstance(config.get(key), kind) or not low <= config[key]:
            raise UserError(
                f"{path}/config.json: '{key}' is {config.get(key)}, not that of a class-conditional network of train_diffusion.py"
            )
    import diffusers

    # The three EDM entries in config.json are ours; diffusers would warn of them at every load.
    diffusers.logging.set_verbosity_error()
    try:
        how = dict(local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True)
        net, info = diffusers.UNet2DModel.from_pretrained(path, **how)
        model = Diffusion(net.eval().requires_grad_(False))
        with torch.no_grad():  # a config.json may name a network that can be built and not run
            model.denoise(torch.zeros(1, model.channels, model.image_size, model.image_size), 1.0)
    except Exception as error:  # diffusers raises its own, huggingface_hub's, safetensors' and torch's errors here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable diffusers UNet2DModel ({reason[:200]})") from None
    # diffusers fills what is missing with random weights and drops what it does not know.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"{path}: weights do not fit config.json ({kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]})")
    model = Diffusion(net.to(device, memory_format=torch.channels_last))
    files = sorted(name for name in os.listdir(path) if name == "config.json" or name.endswith(".safetensors"))
    model.sha256 = [checkpoint.sha256(os.path.join(path, name)) for name in files]
    return model


class _Reached(Exception):
    """Raised by a hook to leave the network at the last block asked for."""


class Diffusion:
    """A class-conditional UNet2DModel under EDM preconditioning. A label of None is the null label it was trained with."""

    def __init__(self, net):
        self.net = net
        self.sigma_data, self.label_dropout = net.config.sigma_data, net.config.label_dropout
        self.val_size = int(net.config.get("val_size", 0))  # first training images that it has not seen
        self.image_size, self.channels = net.config.sample_size, net.config.in_channels
        self.num_classes = net.config.num_class_embeds - 1
        self.blocks = unet_blocks(net)
        self.device = net.device

    def denoise(self, noisy, sigma, y=None):
        """The denoised image D(noisy; sigma, y), (B, C, H, W), in [-1, 1] but for the network's error.

        noisy: clean + sigma * n. sigma: number or (B,). y: (B,) int64 labels or None.
        """
        return edm_denoise(self.net, noisy, sigma, self._labels(y, len(noisy)), self.sigma_data)

    def features(self, x, sigma, y, blocks, noise):
        """Outputs of `blocks` (names in self.blocks) for the noised image, average-pooled over space: a list of (B, channels).

        x: clean images in [0, 1]. noise: standard normal, like x. The network is left at the last block asked for.
        """
        outputs, handles = {}, []

        def keep(name):
            def hook(module, inputs, output):
                outputs[name] = output.mean((2, 3))
                if len(outputs) == len(set(blocks)):
                    raise _Reached

            return hook

        self.check_blocks(blocks)
        try:
            for name in set(blocks):
                handles.append(self.net.get_submodule(name).register_forward_hook(keep(name)))
            self.denoise((2 * x - 1) + sigma * noise, sigma, y)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [outputs[name] for name in blocks]

    def check_blocks(self, blocks):
        """Raises UserError where a name is not one of self.blocks."""
        for name in blocks:
            if name not in self.blocks:
                raise UserError(f"--block {name}: the network has {', '.join(self.blocks)}")

    def check_fits(self, path, spec):
        """Raises UserError where the network's images or classes are not those of the data set `spec` (common.data.Spec)."""
        mine, wanted = (self.image_size, self.channels, self.num_classes), (spec.image_size, spec.channels, spec.num_classes)
        if mine != wanted:
            raise UserError(f"{path}: (pixels, channels, classes) = {mine}, --dataset {spec.name} has {wanted}")

    def _labels(self, y, n):
        return torch.full((n,), self.num_classes, device=self.device) if y is None else y


def edm_denoise(net, noisy, sigma, labels, sigma_data):
    """c_skip * noisy + c_out * F(c_in * noisy; c_noise): the preconditioning of EDM, table 1.

    net: UNet2DModel with class embedding. sigma: number or (B,). labels: (B,) int64, num_classes meaning "none".
    """
    sigma = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device).expand(len(noisy))
    s = sigma.view(-1, 1, 1, 1)
    root = (s**2 + sigma_data**2).sqrt()
    output = net((noisy / root).to(net.dtype), (sigma.log() / 4).to(net.dtype), class_labels=labels, return_dict=False)[0]
    return noisy * (sigma_data / root) ** 2 + output.to(noisy.dtype) * (s * sigma_data / root)


def unet_blocks(net):
    """Names of a UNet2DModel's residual and attention blocks, in the order in which forward runs them."""
    names = []

    def add(prefix, block):
        resnets, attentions = len(block.resnets), len(getattr(block, "attentions", None) or ())
        for i in range(resnets):
            names.append(f"{prefix}.resnets.{i}")
            names.extend([f"{prefix}.attentions.{i}"] if i < attentions else [])

    for i, block in enumerate(net.down_blocks):
        add(f"down_blocks.{i}", block)
    names.append("mid_block")
    for i, block in enumerate(net.up_blocks):
        add(f"up_blocks.{i}", block)
    return names


def sigma_steps(n_steps, sigma_min, sigma_max, rho):
    """EDM's noise levels, equation 5: n_steps values from sigma_max to sigma_min, then 0. float64 (n_steps + 1,)."""
    ramp = torch.linspace(0, 1, n_steps, dtype=torch.float64) if n_steps > 1 else torch.zeros(1, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun(denoise, noise, sigmas, churn=0.0, churn_range=(0.0, float("inf")), churn_noise=1.0, fresh_noise=None):
    """EDM's sampler, algorithm 2: images in [-1, 1] (but for the network's error), in the dtype of `noise`.

    denoise: (noisy, sigma as a number) -> denoised. noise: standard normal (B, C, H, W). sigmas: of sigma_steps.
    churn: S_churn, 0 is deterministic; above 0, `fresh_noise()` gives standard normal noise like `noise` at each churned
    step. churn_range: [S_tmin, S_tmax]. churn_noise: S_noise. One network call at the last step, two at each other.
    """
    sigmas, n_steps = sigmas.tolist(), len(sigmas) - 1
    x = noise * sigmas[0]
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        if churn > 0 and churn_range[0] <= sigma <= churn_range[1]:
            raised = sigma * (1 + min(churn / n_steps, 2**0.5 - 1))
            x = x + (raised**2 - sigma**2) ** 0.5 * churn_noise * fresh_noise()
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (next_sigma - sigma) * slope
        if next_sigma > 0:
            slope = (slope + (euler - denoise(euler, next_sigma)) / next_sigma) / 2
            euler = x + (next_sigma - sigma) * slope
        x = euler
    return x
