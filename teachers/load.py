"""Opening the diffusion models that teachers/ knows, from a directory, a file or the hub.

What a family's network computes stands in that family's file, how the parts of a diffusers
directory are read in parts.py, and what is said of a path that holds no model in advice.py.
"""

import os
import re

import numpy as np
import torch

from common import UserError, files
from teachers import advice, edm, jit, parts, sit
from teachers.dit import DiT
from teachers.edm2 import EDM2, VAE
from teachers.unet import DDPM, EDMUNet

KINDS = "expected a UNet2DModel, a DiTPipeline, a network of NVlabs' EDM or EDM2, a SiT or a JiT"


def load_diffusion(name, device, precision="fp32"):
    """The diffusion model (common.diffusion.Diffusion), frozen, on `device`.

    precision: with "bf16" its networks are in bfloat16, with others in float32. What it takes and
    gives is float32 in any case.
    name: a directory, an NVlabs .pkl file, or a hub repository written hub:OWNER/NAME.
    It has two attributes more: name, and sha256, a hex digest of the content of all files read.
    Raises UserError where it is missing, broken, or holds another kind of network.
    """
    if name.startswith("hub:"):
        path = _from_hub(name)
        try:
            model = _open_directory(path)
        except UserError as error:
            raise UserError(str(error).replace(path, name)) from error
    else:
        path = os.path.expanduser(name).rstrip("/") or name
        if path.lower().endswith(".pkl") and not os.path.isdir(path):
            model = _open_nvlabs(path)
            _check_runs(model, path)
            model.sha256 = files.sha256(path)
        else:
            model = _open_directory(path)
    freeze(model, device, precision)
    model.name = name
    return model


def load_guide(name, model, precision):
    """The diffusion model `name`, to guide `model`: load_diffusion, on the device of that.

    Raises UserError where it does not denoise what `model` denoises, or is of other classes.
    """
    guide = load_diffusion(name, model.device, precision)
    own = (guide.image_size, *guide.noise_shape, guide.num_classes)
    expected = (model.image_size, *model.noise_shape, model.num_classes)
    if own[:-1] != expected[:-1] or guide.num_classes not in (0, model.num_classes):
        message = f"(pixels, shape of the noise, classes) = {own}, {model.name} has {expected}"
        raise UserError(f"{name}: {message}")
    # Two kinds of latents may have one shape. They are told apart by the images they give.
    n_channels = model.noise_shape[0]
    clean = torch.linspace(-1, 1, 4 * n_channels, device=model.device).view(1, n_channels, 2, 2)
    with torch.no_grad():
        same = torch.allclose(guide.decode(clean), model.decode(clean), atol=0.02)
    if not same:
        message = f"its latents are not those of {model.name}: they give other images"
        raise UserError(f"{name}: {message}")
    # Where both know a ladder of noise levels alone, a level of one must be a level of the other.
    for sigma in np.geomspace(0.002, 80, 100).tolist():
        level = guide.round_sigma(model.round_sigma(sigma))
        if model.round_sigma(level) != level:
            message = f"its noise levels are not those of {model.name} (near {sigma:.4g})"
            raise UserError(f"{name}: {message}")
    return guide


def freeze(model, device, precision="fp32"):
    """Make a diffusion model ready for use, in place. The arguments are those of load_diffusion.

    Buffers, such as frequencies and noise levels, are never cast to bfloat16.
    """
    for module in model.modules:
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if precision == "bf16":
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
    model.to(torch.device(device))
    model.precision = precision


def _from_hub(name):
    """The local folder of a hub repository, fetched where it is not there yet.

    Settings and weights only; old .bin weights, which are read weights-only, only where a folder
    has no others.
    """
    repository = name.removeprefix("hub:")
    if not re.fullmatch(advice.REPOSITORY, repository):
        raise UserError(f"{name}: expected hub:OWNER/NAME, such as hub:google/ddpm-cifar10-32")
    patterns = ["*.json", "*.safetensors"]
    path = files.from_hub(name, patterns)
    for _, _, names in os.walk(path):
        has_weights = any(file.endswith(".safetensors") for file in names)
        if "config.json" in names and not has_weights:
            return files.from_hub(name, [*patterns, "*.bin"])
    return path


def _open_directory(path):
    """The model of a directory, on the CPU, with its sha256."""
    import diffusers

    # train_diffusion.py adds entries to config.json; diffusers would warn of them at every load.
    diffusers.logging.set_verbosity_error()
    directory = parts.Directory(path)
    pipeline = {}
    if directory.has("", "model_index.json"):
        pipeline = directory.settings("", "model_index.json")
        if pipeline.get("_class_name") == "DiTPipeline":
            return _finished(_open_dit(directory), directory, "transformer")
    part = "unet" if directory.has("unet", "config.json") else ""
    if not directory.has(part, "config.json"):
        if not pipeline:
            raise UserError(advice.message(path))
        if "unet" in pipeline:
            raise UserError(
                f"{path}/unet/config.json: no such file, though model_index.json has it"
            )
    config = directory.settings(part) if directory.has(part, "config.json") else {}
    if part == "" and config.get("kind") == "nvlabs-edm":
        directory.file("", "model.safetensors")
        return _finished(_open_nvlabs(path, directory), directory, part)
    if part == "" and config.get("kind") in ("sit", "jit"):
        return _finished(_open_flow(directory, config), directory, part)
    _check_class(config, pipeline, path, part)
    return _finished(_open_unet(directory, part, config), directory, part)


def _check_class(config, pipeline, path, part):
    """Raises UserError where a network is no UNet2DModel of images alone."""
    others = pipeline.keys() - {"unet", "scheduler"}
    others = sorted(n for n in others if n[:1] != "_" and isinstance(pipeline[n], list))
    found = config.get("_class_name") or pipeline.get("_class_name")
    where = os.path.join(path, part, "config.json")
    if others:
        found = pipeline.get("_class_name")
        where = os.path.join(path, "model_index.json")
    if others or found not in ("UNet2DModel", "SelfConditionedUNet"):
        what = "no diffusers network" if found is None else f"a {parts.named(found)}"
        what += f" with {parts.named(others[0])}" if others else ""
        raise UserError(f"{where}: {what}, {KINDS}{advice.whole(path)}")


def _open_nvlabs(path, directory=None):
    """The model of an NVlabs file, or of its conversion in a directory, where a VAE can be."""
    net = edm.load(path)[0]
    if isinstance(net, edm.Precond):
        return edm.EDMNetwork(net)
    if not net.on_latents:
        return EDM2(net)
    if directory is None:
        how = f"convert it (python -m teachers.edm convert), and put {VAE} beside it, into vae/"
        raise UserError(f"{path}: a network on latents, which needs a VAE; {how}")
    if not directory.has("vae", "config.json"):
        raise UserError(
            f"{path}/vae/config.json: no such file, expected the VAE {VAE} in {path}/vae"
        )
    return _on_latents(directory, net.img_channels, lambda vae: EDM2(net, vae))


def _open_dit(directory):
    import diffusers

    net = directory.network(diffusers.DiTTransformer2DModel, "transformer")
    levels, predicts = directory.schedule("scheduler")
    path = directory.file("transformer", "config.json")
    channels = net.config.in_channels
    _check_channels(net.out_channels, (channels, 2 * channels), path)
    return _on_latents(directory, channels, lambda vae: DiT(net, vae, levels, predicts))


def _open_flow(directory, config):
    """A converted SiT or JiT."""
    config_path = directory.file("", "config.json")
    path = directory.file("", "model.safetensors")
    family = sit if config["kind"] == "sit" else jit
    opened = family.build(config, files.read_safetensors(path), config_path, path)
    if family is jit:
        return opened
    return _on_latents(directory, opened.channels, lambda vae: sit.SiT(opened, vae))


def _on_latents(directory, channels, make):
    """The model make(vae) of a directory with a vae/ whose latents have some channels."""
    import diffusers

    vae = directory.network(diffusers.AutoencoderKL, "vae")
    path = directory.file("vae", "config.json")
    _check_channels(vae.config.latent_channels, (channels,), path, "latent_channels")
    _check_channels(vae.config.out_channels, (vae.config.in_channels,), path)
    factor = vae.config.scaling_factor
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        expected = "expected a number above 0"
        raise UserError(f"{path}: scaling_factor is {parts.shown(factor)}, {expected}")
    with parts.describing(path, "a VAE that cannot be run", type(vae), vae.config):
        model = make(vae)
        size = 2 * model.image_size // model.noise_shape[1]
        image = torch.zeros(1, model.channels, size, size)
        with torch.no_grad():
            again = model.decode(model.encode(image))
    if again.shape != image.shape:
        raise UserError(f"{path}: a VAE that does not give back images of their size")
    return model


def _open_unet(directory, part, config):
    """The model of a UNet2DModel in a part of a directory, with a scheduler or EDM's entries."""
    import diffusers

    from teachers.self_conditioned import SelfConditionedUNet

    path = directory.file(part, "config.json")
    places = [place for place in ("", "scheduler") if directory.has(place, "scheduler_config.json")]
    if not places:
        _check_edm_config(config, path, directory.path)
    embedding = config.get("class_embed_type")
    if embedding == "identity" or (embedding and not config.get("num_class_embeds")):
        expected = "expected null, with num_class_embeds for classes"
        raise UserError(f"{path}: class_embed_type is {parts.shown(embedding)}, {expected}")
    kind = diffusers.UNet2DModel
    if config.get("_class_name") == "SelfConditionedUNet":
        kind = SelfConditionedUNet
    net = directory.network(kind, part)
    channels = net.config.in_channels
    _check_channels(net.config.out_channels, (channels, 2 * channels)[: 1 + len(places)], path)
    with parts.describing(path, "a network that cannot be run", type(net), net.config):
        if places:
            return DDPM(net, *directory.schedule(places[0]))
        return EDMUNet(net)


def _check_channels(found, expected, path, name="out_channels"):
    """Raises UserError where a network gives other channels than it takes. Variances may follow."""
    if found not in expected:
        expected = " or ".join(map(str, expected))
        raise UserError(f"{path}: {name} is {found}, expected {expected}")


def _check_edm_config(config, path, folder):
    """Raises UserError where a config.json lacks what train_diffusion.py adds to diffusers'.

    folder: where a scheduler was looked for.
    """
    if "sigma_data" not in config:
        looked = f"no scheduler_config.json in {folder} or its scheduler/, and no sigma_data"
        if os.path.exists(os.path.join(folder, "optimizer.bin")):
            looked += "; a checkpoint of a training has none, the finished pipeline has"
        raise UserError(f"{path}: of unknown noise levels: {looked}{advice.whole(folder)}")
    for key, kind, least, most in (
        ("sigma_data", float | int, 1e-6, 1e6),
        ("label_dropout", float | int, 0, 1),
        ("num_class_embeds", int, 1, 1e6),
        ("val_size", int, 0, 1e12),
        ("patch", int, 1, 64),
    ):
        value = config.get(key, {"val_size": 0, "patch": 1}.get(key))
        if not isinstance(value, kind) or not least <= value <= most:
            expected = "expected that of train_diffusion.py, or a DDPM's scheduler_config.json"
            raise UserError(f"{path}: '{key}' is {parts.shown(value)}, {expected}")


def _finished(model, directory, part):
    """A model that has been run once, with its sha256."""
    _check_runs(model, directory.file(part, "config.json"))
    model.sha256 = directory.sha256()
    return model


def _check_runs(model, path):
    """Raises UserError where settings, of the file `path`, name a network that cannot be run."""
    highest = model.sigma_range[1]  # the last of a DDPM's steps
    noisy = torch.zeros(1, *model.noise_shape)
    config = dict(getattr(model.net, "config", {}))
    with parts.describing(path, "a network that cannot be run", type(model.net), config):
        with torch.no_grad(), parts.BoundedAttention():
            sigma = highest if highest < float("inf") else 1.0
            denoised = model.denoise(noisy, sigma, torch.zeros(1, dtype=torch.long))
    if denoised.shape != noisy.shape:
        found, expected = (" x ".join(map(str, t.shape[1:])) for t in (denoised, noisy))
        raise UserError(f"{path}: describes a network that makes {found} of {expected}")
