"""Opening the diffusion models that teachers/ knows, from a directory, a file or the hub.

What a family's network computes stands in that family's file.
"""

import fnmatch
import hashlib
import os
import re

import torch

from common import UserError, files
from teachers import edm
from teachers.dit import DiT
from teachers.unet import DDPM, EDMUNet

# The parts of a model's directory, and the files that are read of a part; besides these, those that
# an index of weights names.
PARTS = ("", "scheduler", "transformer", "unet", "vae")
PATTERNS = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "model.safetensors",  # of a converted NVlabs network
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.bin",
    "diffusion_pytorch_model*.json",  # the index of weights in several files
)
MAX_STEPS = 100_000  # of a DDPM; published ones have 1,000


def load_diffusion(name, device, precision="fp32"):
    """The diffusion model (common.diffusion.Diffusion), frozen, on `device`.

    precision: with "bf16" its networks are in bfloat16, with others in float32. What it takes and
    gives is float32 in any case.
    name: a directory, an NVlabs .pkl file, or a hub repository written hub:OWNER/NAME.
    It has two attributes more: name, and sha256, a hex digest of the content of all files read.
    Raises UserError where it is missing, broken, or holds another kind of network.
    """
    path = _from_hub(name) if name.startswith("hub:") else name
    if path.endswith(".pkl"):
        model = edm.EDMNetwork(edm.load(path)[0])
        model.sha256 = files.sha256(path)
    else:
        model = _open_directory(path)
        model.sha256 = _directory_sha256(path)
    freeze(model, device, precision)
    model.name = name
    return model


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
    patterns = ["*.json", "*.safetensors"]
    path = files.from_hub(name, patterns)
    for _, _, names in os.walk(path):
        has_weights = any(file.endswith(".safetensors") for file in names)
        if "config.json" in names and not has_weights:
            return files.from_hub(name, [*patterns, "*.bin"])
    return path


def _open_directory(path):
    """The model of a directory, on the CPU."""
    index = _read_index(path)
    with files.reading(path, "a readable diffusion model"):
        model = _build(path, index)
        # A config.json may name a network that can be built and not run.
        noisy = torch.zeros(1, *model.noise_shape)
        with torch.no_grad():
            model.denoise(noisy, 1.0, torch.zeros(1, dtype=torch.long))
    return model


def _read_index(path):
    """The settings that say which family a directory holds."""
    for name in ("model_index.json", "config.json"):
        index_path = os.path.join(path, name)
        if os.path.exists(index_path):
            return files.read_json(index_path)
    advice = "train_diffusion.py makes such a directory"
    if re.fullmatch(r"[\w-]+/[\w.-]+", path):
        advice += f"; a model of the hub is written hub:{path}"
    raise UserError(f"{path}/config.json: no such file; {advice}")


def _build(path, index):
    """The model of a directory whose model_index.json or config.json holds `index`."""
    import diffusers

    # The three EDM entries in config.json are ours; diffusers would warn of them at every load.
    diffusers.logging.set_verbosity_error()
    if index.get("kind") == "nvlabs-edm":
        return edm.EDMNetwork(edm.load(path)[0])
    if index.get("_class_name") == "DiTPipeline":
        transformer_path = os.path.join(path, "transformer")
        transformer = _pretrained(diffusers.DiTTransformer2DModel, transformer_path)
        vae = _pretrained(diffusers.AutoencoderKL, os.path.join(path, "vae"))
        return DiT(transformer, vae, _noise_levels(os.path.join(path, "scheduler")))

    folder = os.path.join(path, "unet")
    if not os.path.isdir(folder):
        folder = path
    config = files.read_json(os.path.join(folder, "config.json"))
    class_name = config.get("_class_name") or index.get("_class_name")
    if class_name != "UNet2DModel":
        expected = "expected a UNet2DModel, a DiTPipeline or an NVlabs EDM network"
        raise UserError(f"{path}: a {class_name}, {expected}")
    for scheduler in (path, os.path.join(path, "scheduler")):
        if os.path.exists(os.path.join(scheduler, "scheduler_config.json")):
            return DDPM(_pretrained(diffusers.UNet2DModel, folder), _noise_levels(scheduler))
    _check_edm_config(config, path)
    return EDMUNet(_pretrained(diffusers.UNet2DModel, folder))


def _check_edm_config(config, path):
    """Raises UserError where a config.json lacks what train_diffusion.py adds to diffusers'."""
    for key, kind, least in (
        ("sigma_data", float, 1e-6),
        ("label_dropout", float | int, 0),
        ("num_class_embeds", int, 2),
    ):
        value = config.get(key)
        if not isinstance(value, kind) or not value >= least:
            expected = "expected that of train_diffusion.py, or a DDPM's scheduler_config.json"
            raise UserError(f"{path}/config.json: '{key}' is {value}, {expected}")


def _pretrained(network, folder):
    """A diffusers network with all its weights.

    from_pretrained alone would fill what is missing with random numbers.
    """
    # Without this, diffusers would look for a missing config.json on the hub.
    files.read_json(os.path.join(folder, "config.json"))
    net, info = network.from_pretrained(
        folder,
        local_files_only=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[keys]:
            difference = f"{keys.replace('_', ' ')}: {min(map(str, info[keys]))}"
            raise UserError(f"{folder}: weights do not fit config.json ({difference})")
    return net


def _noise_levels(folder):
    """sigma_t = sqrt((1 - abar_t) / abar_t) of a DDPM's scheduler_config.json, float64 (T,)."""
    import diffusers

    path = os.path.join(folder, "scheduler_config.json")
    config = files.read_json(path)
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type != "epsilon":
        raise UserError(f"{path}: prediction_type {prediction_type}, only epsilon is known here")
    n_steps = config.get("num_train_timesteps", 1000)
    if not isinstance(n_steps, int) or not 1 <= n_steps <= MAX_STEPS:
        raise UserError(f"{path}: num_train_timesteps is {n_steps}, expected 1 to {MAX_STEPS}")
    with files.reading(path, "a DDPM's schedule"):
        abar = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt()
    if not levels.isfinite().all() or not (levels.diff() > 0).all():
        raise UserError(f"{path}: its noise levels are not finite and increasing")
    return levels


def _directory_sha256(path):
    """Hex digest of the names and the content of all files of a directory that are read."""
    digest = hashlib.sha256()
    for part in PARTS:
        folder = os.path.join(path, part)
        for name in _files_read(folder):
            file = os.path.join(folder, name)
            digest.update(f"{part}/{name} {files.sha256(file)}\n".encode())
    return digest.hexdigest()


def _files_read(folder):
    """Sorted names of the files that are read of a part, () where there is no such folder."""
    if not os.path.isdir(folder):
        return ()
    names = set()
    for name in os.listdir(folder):
        if any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS):
            names.add(name)
    for index in [name for name in names if name.endswith(".index.json")]:
        path = os.path.join(folder, index)
        with files.reading(path, "an index of weights"):
            names.update(files.read_json(path)["weight_map"].values())
    return sorted(names)
