"""The parts of a diffusers directory: networks with their weights, and the schedule of a DDPM.

diffusers builds the networks. The files are read here: exactly those that are hashed, and what is
wrong with one is said in the words of its owner.
"""

import hashlib
import inspect
import os
import re
import types
import typing
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from common import UserError, files
from teachers import pickles

WEIGHTS = "diffusion_pytorch_model"
FORMATS = ("safetensors", "bin")  # the first is preferred
MAX_STEPS = 100_000  # of a DDPM; published ones have 1,000
MAX_SIZE = 1024  # pixels or latents along a side; no published network has more
MAX_LAYERS = 1000  # of a network, or of one of its blocks
MAX_ATTENDED = 128**2  # places that attend to each other; published networks have up to 64 x 64

# The names of attention's weights in files of before 2023, and today's.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Directory:
    """A directory of a diffusion model, which knows the files that were read of it.

    part: a folder in it, "" for itself.
    """

    def __init__(self, path):
        self.path = path
        self._read = set()

    def file(self, part, name):
        """The path of a file that is going to be read."""
        self._read.add((part, name))
        return os.path.join(self.path, part, name)

    def has(self, part, name):
        return os.path.exists(os.path.join(self.path, part, name))

    def settings(self, part, name="config.json"):
        """The entries of a JSON file."""
        return files.read_json(self.file(part, name))

    def sha256(self):
        """Hex digest of the names and the content of all files that were read."""
        digest = hashlib.sha256()
        for part, name in sorted(self._read):
            digest.update(f"{part}/{name} {files.sha256(self.file(part, name))}\n".encode())
        return digest.hexdigest()

    def network(self, kind, part):
        """A diffusers network of the class `kind` with all its weights, in float32."""
        config = self.settings(part)
        path = self.file(part, "config.json")
        _check_class(config, kind, path)
        if "sample_size" in config or kind.__name__ != "AutoencoderKL":  # which is of any size
            config["sample_size"] = _side(config, path)
        with describing(path, "a network that cannot be built", kind, config):
            with torch.device("meta"):  # no memory before the weights are known to fit
                wanted = kind.from_config(config).state_dict()
        weights = self._weights(part)
        weights = {_new_name(name, wanted): tensor for name, tensor in weights.items()}
        check_fit(weights, wanted, os.path.join(self.path, part))
        with describing(path, "a network that cannot be built", kind, config):
            with _Unfilled():
                net = kind.from_config(config)
            net.load_state_dict(weights)
        return net

    def _weights(self, part):
        """The tensors of a part by name."""
        folder = os.path.join(self.path, part)
        name = _weights_file(folder)
        names = [name]
        if name.endswith(".json"):
            names = _indexed(self.settings(part, name), os.path.join(folder, name))
        tensors = {}
        for name in names:
            tensors |= _read_tensors(self.file(part, name))
        return tensors

    def schedule(self, part):
        """(sigma_t of all steps, what the network predicts) of a DDPM's scheduler_config.json.

        sigma_t = sqrt((1 - abar_t) / abar_t), float64 (T,).
        """
        import diffusers

        config = self.settings(part, "scheduler_config.json")
        path = self.file(part, "scheduler_config.json")
        name = config.get("_class_name", "DDPMScheduler")
        kind = getattr(diffusers, name, None) if isinstance(name, str) else None
        known = inspect.signature(kind).parameters if inspect.isclass(kind) else ()
        # Others have no betas, and DDPM's would be a guess.
        if "beta_schedule" not in known or "trained_betas" not in known:
            raise UserError(f"{path}: a {named(name)}, expected a DDPM's scheduler, with betas")
        # Schedulers of diffusers before 0.5 say it in another way.
        older = "epsilon" if config.get("predict_epsilon", True) else "sample"
        predicts = config.get("prediction_type", older)
        if predicts not in ("epsilon", "sample", "v_prediction") or config.get("use_flow_sigmas"):
            expected = "expected epsilon, sample or v_prediction, of a DDPM's schedule"
            raise UserError(f"{path}: its prediction_type is {shown(predicts)}, {expected}")
        n_steps = config.get("num_train_timesteps", 1000)
        if not isinstance(n_steps, int) or not 1 <= n_steps <= MAX_STEPS:
            expected = f"expected 1 to {MAX_STEPS}"
            raise UserError(f"{path}: num_train_timesteps is {shown(n_steps)}, {expected}")
        with describing(path, "a schedule that cannot be", diffusers.DDPMScheduler, config):
            abar = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double()
            levels = ((1 - abar) / abar).sqrt()
            good = levels.dim() == 1 and levels.isfinite().all() and (levels.diff() > 0).all()
        if not good:
            raise UserError(f"{path}: its noise levels are not finite and increasing")
        return levels, predicts


class _Unfilled(TorchFunctionMode):
    """Leaves new weights as they lie in memory: drawing them takes longer than reading a file."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        initial = getattr(function, "__module__", None) == "torch.nn.init"
        if initial or function in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class BoundedAttention(TorchFunctionMode):
    """Raises ValueError at attention over more than MAX_ATTENDED places, which would not end."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        n = args[0].shape[-2] if function is F.scaled_dot_product_attention else 0
        if n > MAX_ATTENDED:
            raise ValueError(f"attention over {n:,} places, expected at most {MAX_ATTENDED:,}")
        return function(*args, **(kwargs or {}))


@contextmanager
def describing(path, what, kind, config):
    """Turn whatever a library raises over the entries of a config.json into one UserError.

    what: of what it describes, such as "a network that cannot be built". kind: the class whose
    arguments the entries are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = f"{path}: describes {what}"
        odd = [name for name, hint in _hints(kind) if not _fits(config.get(name), hint)]
        if odd:
            message += f" ('{odd[0]}' is {shown(config[odd[0]])})"
        elif isinstance(error, ValueError) and files.is_for_users(error):
            message += f" ({files.first_line(error)})"
        elif files.is_full_memory(error):
            message += " (memory is not enough)"
        raise UserError(message) from error


def _hints(kind):
    """(name, type) of the arguments of a class."""
    return typing.get_type_hints(kind.__init__).items()


def _fits(value, hint):
    """Whether an entry can be of a type. null is for none given."""
    arguments = typing.get_args(hint)
    if value is None:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if typing.get_origin(hint) in (tuple, list):
        each = arguments[0] if arguments else object
        return isinstance(value, list) and all(_fits(v, each) for v in value)
    if hint in (int, float):
        kinds = (int, float) if hint is float else int
        return isinstance(value, kinds) and not isinstance(value, bool) and value >= 0
    return isinstance(value, hint) if isinstance(hint, type) else True


def shown(value):
    """An entry for a message: short and in one line."""
    return ascii(value)[:80] if isinstance(value, list) else pickles.show(value)


def named(name):
    """A name out of a file, for a message."""
    return shown(name).strip("'")


# ------------------------------------------------------------------------------------- settings


def _side(config, path):
    """The sample_size of a network: the side of a square. A pair of equal sides is one."""
    size = config.get("sample_size")
    pair = isinstance(size, list) and len(size) == 2 and size[0] == size[1]
    side = size[0] if pair else size
    if type(side) is not int or not 1 <= side <= MAX_SIZE:
        expected = f"expected the side of square images, 1 to {MAX_SIZE}"
        raise UserError(f"{path}: sample_size is {shown(size)}, {expected}")
    return side


def _check_class(config, kind, path):
    """Raises UserError where a network is of another class, or building it would not end."""
    name = config.get("_class_name", kind.__name__)
    if name not in (kind.__name__, "Transformer2DModel"):  # so the first DiTs are called
        raise UserError(f"{path}: a {named(name)}, expected a {kind.__name__}")
    for name in ("num_layers", "layers_per_block"):
        value = config.get(name)
        if isinstance(value, int) and value > MAX_LAYERS:
            raise UserError(f"{path}: {name} is {value}, expected at most {MAX_LAYERS}")


# -------------------------------------------------------------------------------------- weights


def variant(name):
    """ "fp16" of diffusion_pytorch_model.fp16.safetensors, "" of plain weights, None of others.

    A file that an index names is one of the others.
    """
    first, *words = name.split(".")
    kind = [word for word in words if word in FORMATS]
    if first != WEIGHTS or len(kind) != 1 or re.search(r"-\d+-of-\d+", name):
        return None
    if words[-1] != kind[0] and not ("index" in words and words[-1] == "json"):
        return None
    return ".".join(word for word in words if word not in (*kind, "index", "json"))


def _weights_file(folder):
    """The name of the weights that are read of a folder, or of their index.

    Plain ones before a variant, fp16 before another; of a variant, an index and safetensors first.
    """
    with files.reading(folder, "a directory with weights"):
        names = sorted(os.listdir(folder))
    variants = {name: variant(name) for name in names}
    found = sorted(set(variants.values()) - {None})
    if not found:
        parts = [name for name in names if name.startswith(WEIGHTS) and "-of-" in name]
        reason = f"{parts[0]} without an index" if parts else f"no {WEIGHTS}.safetensors or .bin"
        raise UserError(f"{folder}: no weights that can be read ({reason})")
    best = [v for v in ("", "fp16", found[0]) if v in found][0]
    if len(found) > 1 and best not in ("", "fp16"):
        listed = ", ".join(name for name in names if variants[name] is not None)[:200]
        expected = f"expected {WEIGHTS}.safetensors or one of them alone"
        raise UserError(f"{folder}: several variants of weights ({listed}), {expected}")

    def order(name):
        return FORMATS[0] not in name, not name.endswith(".json")

    return min([name for name in names if variants[name] == best], key=order)


def _indexed(index, path):
    """The names of the files that an index of weights lists."""
    listed = index.get("weight_map")
    names = set()
    if isinstance(listed, dict):
        names = {v if isinstance(v, str) else "" for v in listed.values()}
    plain = all(os.path.basename(v) == v and v.endswith(FORMATS) for v in names)
    if not names or not plain:
        raise UserError(f"{path}: not an index of weights, whose weight_map names files beside it")
    return sorted(names)


def _read_tensors(path):
    """The tensors of a file of weights by name, read as data."""
    if path.endswith(FORMATS[0]):
        return files.read_safetensors(path)
    return read_checkpoint(path)


def read_checkpoint(path, entry=None):
    """The tensors by name of a file of torch.save, read as data; those under `entry` if it has it.

    Raises UserError where there are none.
    """
    state = files.load(path, {}, expected="a file of weights of torch.save")
    if isinstance(state, dict) and entry in state:
        state = state[entry]
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected tensors by name, found none")
    for name, tensor in state.items():
        if not torch.is_tensor(tensor) or not isinstance(name, str):
            raise UserError(f"{path}: its entry {named(name)} is no tensor")
    if sum(tensor.numel() for tensor in state.values()) > os.path.getsize(path):
        raise UserError(f"{path}: refused, its tensors have more numbers than the file has bytes")
    return state


def _new_name(name, wanted):
    """Today's name of a weight of attention that has its old one. wanted: the network's names."""
    match = re.fullmatch(r"(.+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    if match is None or name in wanted:
        return name
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}"


def check_fit(weights, wanted, path):
    """Raises UserError where weights are not those that are wanted. Both: tensors by name.

    path: of the weights.
    """
    differences = [f"missing keys: {name}" for name in sorted(wanted.keys() - weights.keys())]
    for name in sorted(weights.keys() - wanted.keys()):
        differences.append(f"unexpected keys: {named(name)}")
    for name in sorted(wanted.keys() & weights.keys()):
        found, expected = ("x".join(map(str, d[name].shape)) for d in (weights, wanted))
        if found != expected:
            differences.append(f"{name} is {found or 'a number'}, expected {expected}")
        elif not weights[name].is_floating_point() or weights[name].layout != torch.strided:
            differences.append(f"{name} is not of floating-point numbers")
    if differences:
        raise UserError(f"{path}: weights do not fit the settings ({differences[0]})")


def filled(build, weights, path):
    """The network build() with weights, tensors by name, all of them and no others, as float32.

    Raises UserError where a tensor of the file `path` does not fit, and whatever build raises.
    """
    with torch.device("meta"):  # no memory before the tensors are known to fit
        net = build()
    check_fit(weights, net.state_dict(), path)
    copies = {}
    for name, tensor in weights.items():
        # A copy of each: two names may share a storage, which safetensors does not write.
        copies[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not copies[name].isfinite().all():
            raise UserError(f"{path}: tensor {name} is not finite")
    net.load_state_dict(copies, assign=True)
    return net


# ----------------------------------------------------------------------- converted directories


def write_converted(contents, out_dir, source):
    """Write the files of a converted network. config.json, which marks their end, is the last.

    contents: {name: tensors of a .safetensors file, or entries of a .json file}. source: the path
    of what is converted. Raises UserError where the directory holds anything else than this.
    """
    config_path = os.path.join(out_dir, "config.json")
    files.make_directory(out_dir)
    # A file that a killed conversion had begun ends in .writing, and is no obstacle.
    names = [name for name in sorted(os.listdir(out_dir)) if not name.endswith(".writing")]
    if "vae/config.json" not in contents:  # the VAE of such a network may have been there first
        names = [name for name in names if name != "vae"]
    same = "config.json" in names and files.read_json(config_path) == contents["config.json"]
    if names and not same:
        other = f"not a conversion of {source}, or an unfinished one"
        raise UserError(f"{out_dir}: holds {names[0]}, {other}; delete it, or give a new directory")
    for name, content in contents.items():
        path = os.path.join(out_dir, name)
        files.make_directory(os.path.dirname(path))
        write = files.write_json if name.endswith(".json") else files.write_safetensors
        write(content, path)


def one_hot(labels, num_classes, dtype):
    """Labels (B,) as (B, num_classes). The label num_classes, which is none, gives zeros."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(dtype)
