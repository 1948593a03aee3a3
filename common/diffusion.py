"""Frozen diffusion models with one noise scale sigma: denoise, sample, and the features inside.

Noise model (EDM, Karras et al., arXiv 2206.00364): noisy = clean + sigma * n, n ~ N(0, I), with clean images in [-1, 1] or,
for a DiT, their scaled VAE latents. Everything outside works with x in [0, 1]; only noisy images, which have no range, are
passed in the network's own scale. Three kinds are adapted:

  diffusers UNet2DModel   of train_diffusion.py (EDM preconditioning), or of a DDPM with its scheduler
  diffusers DiTPipeline   transformer on VAE latents, such as facebook/DiT-XL-2-256
  NVlabs EDM              a .pkl file, or the directory that `python -m common.edm convert` makes of it (common/edm.py)
"""

import os
import re

import torch
import torch.nn.functional as F

from common import checkpoint, edm
from common.cli import UserError


def load_diffusion(name, device):
    """The diffusion model of a directory, an NVlabs .pkl file, or a hub repository written hub:OWNER/NAME.

    Raises UserError where it is missing, broken, or holds another kind of network.
    """
    path = _from_hub(name) if name.startswith("hub:") else name
    if path.endswith(".pkl"):
        model, files = EDMNetwork(edm.load(path)[0]), [path]
    else:
        for index in ("model_index.json", "config.json"):
            if os.path.exists(os.path.join(path, index)):
                kind = checkpoint.read_json(os.path.join(path, index))
                break
        else:
            hub = f"; a model of the hub is written hub:{name}" if re.fullmatch(r"[\w-]+/[\w.-]+", name) else ""
            raise UserError(f"{path}/config.json: no such file; train_diffusion.py makes such a directory{hub}")
        try:
            model = _open(path, kind)
            with torch.no_grad():  # a config.json may name a network that can be built and not run
                model.denoise(torch.zeros(1, *model.noise_shape), 1.0, torch.zeros(1, dtype=torch.long))
        except UserError:
            raise
        except Exception as error:  # diffusers raises its own, huggingface_hub's, safetensors' and torch's errors here
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: not a readable diffusion model ({reason[:200]})") from None
        found = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names]
        files = sorted(file for file in found if file.endswith((".safetensors", ".bin")) or file.endswith("config.json"))
    for module in model.modules:
        module.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    model.device = torch.device(device)
    model.sha256 = [checkpoint.sha256(file) for file in files]
    return model


def _from_hub(name):
    """The local folder of a hub repository, fetched where it is not there yet: settings and weights only."""
    import huggingface_hub

    try:
        how = dict(repo_id=name.removeprefix("hub:"), allow_patterns=["*.json", "*.safetensors"])
        path = huggingface_hub.snapshot_download(**how)
        folders = [files for _, _, files in os.walk(path) if "config.json" in files]
        if not all(any(file.endswith(".safetensors") for file in files) for files in folders):
            path = huggingface_hub.snapshot_download(**how | {"allow_patterns": ["*.json", "*.safetensors", "*.bin"]})  # read weights-only
        return path
    except Exception as error:  # the hub's, the network's and the file system's errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: could not be fetched ({reason[:200]})") from None


def _open(path, kind):
    """The model on the CPU of a directory whose model_index.json or config.json is `kind`."""
    import diffusers

    # The three EDM entries in config.json are ours; diffusers would warn of them at every load.
    diffusers.logging.set_verbosity_error()
    class_name = kind.get("_class_name")
    if kind.get("kind") == "nvlabs-edm":
        return EDMNetwork(edm.load(path)[0])
    if class_name == "DiTPipeline":
        transformer = _pretrained(diffusers.DiTTransformer2DModel, os.path.join(path, "transformer"))
        vae = _pretrained(diffusers.AutoencoderKL, os.path.join(path, "vae"))
        return DiT(transformer, vae, _noise_levels(os.path.join(path, "scheduler")))
    folder = os.path.join(path, "unet") if os.path.isdir(os.path.join(path, "unet")) else path
    config = checkpoint.read_json(os.path.join(folder, "config.json"))
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(
            f"{path}: a {config.get('_class_name') or class_name}, expected a UNet2DModel, a DiTPipeline or an NVlabs EDM network"
        )
    for scheduler in (path, os.path.join(path, "scheduler")):
        if os.path.exists(os.path.join(scheduler, "scheduler_config.json")):
            return DDPM(_pretrained(diffusers.UNet2DModel, folder), _noise_levels(scheduler))
    for key, type_, low in (("sigma_data", float, 1e-6), ("label_dropout", float | int, 0), ("num_class_embeds", int, 2)):
        if not isinstance(config.get(key), type_) or not low <= config[key]:
            raise UserError(
                f"{path}/config.json: '{key}' is {config.get(key)}, not that of a class-conditional network of train_diffusion.py, "
                "and there is no scheduler_config.json of a DDPM"
            )
    return EDMUNet(_pretrained(diffusers.UNet2DModel, folder))


def _pretrained(kind, folder):
    """A diffusers network with all of its weights: from_pretrained fills what is missing with random numbers."""
    checkpoint.read_json(os.path.join(folder, "config.json"))  # or diffusers would look for it on the hub
    how = dict(local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True)
    net, info = kind.from_pretrained(folder, **how)
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[keys]:
            raise UserError(f"{folder}: weights do not fit config.json ({keys.replace('_', ' ')}: {sorted(map(str, info[keys]))[0]})")
    return net


def _noise_levels(folder):
    """sigma_t = sqrt((1 - abar_t) / abar_t) of a DDPM's scheduler_config.json, float64 (T,)."""
    import diffusers

    config = checkpoint.read_json(os.path.join(folder, "scheduler_config.json"))
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{folder}/scheduler_config.json: prediction_type {config['prediction_type']}, only epsilon is known here")
    abar = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double()
    return ((1 - abar) / abar).sqrt()


class _Reached(Exception):
    """Raised by a hook to leave the network at the last block asked for."""


class Diffusion:
    """What the kinds share; each has its `_denoise`, its blocks and, where it works in latents, `encode` and `decode`.

    noise_shape: (C, H, W) of what is denoised. num_classes: 0 for an unconditional network; as a label, num_classes means
    "none". label_dropout: how often it was trained without a label. default_block, default_sigma: those that DRA takes
    (DDAE's choice for U-Nets, arXiv 2303.09769). val_size: first training images that it is known not to have seen.
    has_null_label: whether "none" can be said to it.
    """

    val_size, has_null_label = 0, True
    sigma_range = (0.0, float("inf"))  # noise levels that it was trained on, as far as it is known

    def __init__(self, net, image_size, channels, num_classes, label_dropout, blocks):
        self.net, self.modules, self.device = net, [net], torch.device("cpu")
        self.hooked = net  # the module that the names of the blocks belong to
        self.image_size, self.channels, self.noise_shape = image_size, channels, (channels, image_size, image_size)
        self.num_classes, self.label_dropout, self.blocks = num_classes, label_dropout, blocks

    def denoise(self, noisy, sigma, y=None):
        """The denoised image or latent D(noisy; sigma, y), like noisy; images lie in [-1, 1] but for the network's error.

        noisy: clean + sigma * n. sigma: number or (B,). y: (B,) int64 labels or None.
        """
        sigma = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device).expand(len(noisy))
        labels = torch.full((len(noisy),), self.num_classes, device=noisy.device) if y is None else y
        return self._denoise(noisy, sigma, labels)

    def encode(self, x):
        """What is noised of images x in [0, 1] of this network's size."""
        return 2 * x - 1

    def decode(self, clean):
        """Images in [-1, 1] of what was denoised."""
        return clean

    def features(self, x, sigma, y, blocks, noise):
        """Outputs of `blocks` (names in self.blocks) for the noised image, averaged over space or tokens: a list of (B, channels).

        x: clean images in [0, 1], resized where the network's are of another size. noise: standard normal (B, *noise_shape).
        The network is left at the last block asked for.
        """
        outputs, handles = {}, []

        def keep(name):
            def hook(module, inputs, output):
                output = output if output.dtype == torch.float64 else output.float()  # averages of bf16 are taken in float32
                outputs[name] = output.mean((2, 3)) if output.dim() == 4 else output.mean(1)
                if len(outputs) == len(set(blocks)):
                    raise _Reached

            return hook

        self.check_blocks(blocks)
        if x.shape[-1] != self.image_size:
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        try:
            for name in set(blocks):
                handles.append(self.hooked.get_submodule(name).register_forward_hook(keep(name)))
            self.denoise(self.encode(x) + sigma * noise, sigma, y)
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

    def check_sigmas(self, sigmas):
        """Raises UserError where a noise level lies outside of those that the network knows."""
        low, high = self.sigma_range
        for sigma in sigmas:
            if not low * 0.999 <= sigma <= high * 1.001:
                raise UserError(f"noise level {sigma:g}: the network knows {low:.4g} to {high:.4g}")

    def check_teaches(self, path, spec, with_labels):
        """Raises UserError where the network cannot see the images, or the labels if it is given any, of the data set `spec`."""
        if self.channels != spec.channels:
            raise UserError(f"{path}: images of {self.channels} channels, --dataset {spec.name} has {spec.channels}")
        if not with_labels and self.num_classes and not self.has_null_label:
            raise UserError(f"{path}: a class-conditional network without a null label (train_at_aux.py: --teacher-label true)")
        if with_labels and self.num_classes != spec.num_classes:
            found = f"{self.num_classes} classes, --dataset {spec.name} has {spec.num_classes}"
            raise UserError(f"{path}: {found} (train_at_aux.py: --teacher-label none)")

    def check_generates(self, path, spec):
        """Raises UserError where the network's images or classes are not those of the data set `spec` (common.data.Spec)."""
        # A set of larger images will do where training crops and resizes them.
        size = spec.image_size if not (spec.files and self.image_size >= 64) else self.image_size
        mine, wanted = (self.image_size, self.channels, self.num_classes), (size, spec.channels, spec.num_classes)
        if mine != wanted:
            raise UserError(f"{path}: (pixels, channels, classes) = {mine}, --dataset {spec.name} has {wanted}")


class EDMUNet(Diffusion):
    """A class-conditional UNet2DModel that train_diffusion.py trained; label num_classes was its null label."""

    def __init__(self, net):
        config = net.config
        super().__init__(net, config.sample_size, config.in_channels, config.num_class_embeds - 1, config.label_dropout, unet_blocks(net))
        self.val_size = int(config.get("val_size", 0))
        self.default_block, self.default_sigma = next(name for name in self.blocks if name.startswith("up_blocks")), 0.1

    def _denoise(self, noisy, sigma, labels):
        return edm_denoise(self.net, noisy, sigma, labels, self.net.config.sigma_data)


class _NoisePredictor(Diffusion):
    """A DDPM in the noise scale sigma: x_t = noisy / sqrt(1 + sigma^2) at the t of the nearest noise level, D = noisy - sigma * eps."""

    def _scaled(self, noisy, sigma):
        """(x_t, t (B,)) of noisy images."""
        levels = self.levels.to(noisy.device)
        t = (levels.log() - sigma.double().log()[:, None]).abs().argmin(1)
        return noisy / (1 + sigma**2).sqrt().view(-1, 1, 1, 1), t


class DDPM(_NoisePredictor):
    """A diffusers UNet2DModel that predicts noise, such as google/ddpm-cifar10-32; levels: sigma_t, (T,)."""

    def __init__(self, net, levels):
        config = net.config
        super().__init__(net, config.sample_size, config.in_channels, config.num_class_embeds or 0, 0.0, unet_blocks(net))
        decoder = [name for name in self.blocks if re.fullmatch(r"up_blocks\.\d+\.resnets\.\d+", name)]
        self.sigma_range = (levels[0].item(), levels[-1].item())
        self.levels, self.default_block = levels, decoder[min(5, len(decoder) - 1)]  # the 6th from the bottleneck
        self.default_sigma = levels[11 * len(levels) // 1000].item()  # t = 11 of 1000
        self.has_null_label = self.num_classes == 0

    def _denoise(self, noisy, sigma, labels):
        x_t, t = self._scaled(noisy, sigma)
        labels = labels if self.num_classes else None
        eps = self.net(x_t.to(self.net.dtype), t, class_labels=labels, return_dict=False)[0]
        return noisy - sigma.view(-1, 1, 1, 1) * eps.to(noisy.dtype)


class DiT(_NoisePredictor):
    """A diffusers DiT pipeline: a transformer on scaled VAE latents, whose label num_classes is the null label."""

    def __init__(self, net, vae, levels):
        config, shrunk = net.config, 2 ** (len(vae.config.block_out_channels) - 1)
        blocks = [f"transformer_blocks.{i}" for i in range(len(net.transformer_blocks))]
        # DiT drops labels at a rate of 0.1; diffusers keeps it in the embedding, not in the config.
        super().__init__(net, config.sample_size * shrunk, vae.config.in_channels, config.num_embeds_ada_norm, 0.1, blocks)
        self.vae, self.modules, self.levels = vae, [net, vae], levels
        self.sigma_range = (levels[0].item(), levels[-1].item())
        self.noise_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.default_block = blocks[len(blocks) // 2 - 1]  # block 13 of DiT-XL's 28
        self.default_sigma = levels[100 * len(levels) // 1000].item()  # t = 100 of 1000

    def encode(self, x):
        # A few images at a time: at 256 x 256 pixels the VAE's activations are what fills a GPU.
        latents = [self.vae.encode(2 * part - 1).latent_dist.mode() for part in x.split(32)]
        return torch.cat(latents) * self.vae.config.scaling_factor

    def decode(self, clean):
        return torch.cat([self.vae.decode(part).sample for part in (clean / self.vae.config.scaling_factor).split(32)])

    def _denoise(self, noisy, sigma, labels):
        x_t, t = self._scaled(noisy, sigma)
        eps = self.net(x_t.to(self.net.dtype), t, class_labels=labels, return_dict=False)[0][:, : noisy.shape[1]]  # without its variances
        return noisy - sigma.view(-1, 1, 1, 1) * eps.to(noisy.dtype)


class EDMNetwork(Diffusion):
    """An NVlabs EDM network (common.edm.Precond), preconditioned already; without a label it gets zeros."""

    def __init__(self, net):
        super().__init__(net, net.img_resolution, net.img_channels, net.label_dim, net.label_dropout, net.blocks)
        decoder = [name for name in self.blocks if name.startswith("dec.16x16_block")] or [n for n in self.blocks if n.startswith("dec.")]
        self.hooked = net.model
        if net.kind == "VEPrecond":
            self.sigma_range = (net.args["sigma_min"], net.args["sigma_max"])
        self.default_block, self.default_sigma = decoder[min(1, len(decoder) - 1)], 0.06  # the 4th of 18 levels, from below

    def _denoise(self, noisy, sigma, labels):
        one_hot = None
        if self.num_classes:
            one_hot = F.one_hot(labels, self.num_classes + 1)[:, :-1].to(noisy.dtype)
        return self.net(noisy, sigma, one_hot)


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
