"""Files: atomic writing, hashes, and reading the files of others as data, never as code.

What a file means to a model, a data set or a run stands in the module of that thing.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import warnings
import zipfile
from contextlib import contextmanager, suppress
from errno import EINVAL
from pickle import UnpicklingError
from zipfile import BadZipFile

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from common import UserError, pickles

# ------------------------------------------------------------------------------------- writing


@contextmanager
def atomic(path):
    """Yield a binary file that becomes `path` when the block ends well.

    A write that fails or is killed leaves `path` as it was. The file's mode follows the umask.
    Raises UserError where `path` is a directory, or where its folder does not exist. A folder that
    is gone in mid-run is not made again.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = f"{path}.writing"
    if not os.path.isdir(folder):
        raise UserError(f"{path}: there is no directory {folder}")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory, expected a file or nothing")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a write to a full disk does not say of which file
        raise
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def write_json(value, path):
    """Write a value as indented JSON."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_text(text, path):
    """Write a text in UTF-8."""
    with atomic(path) as file:
        file.write(text.encode())


def write_between(path, name, text):
    """Put text between the two lines of a Markdown file that mark where `name` writes.

    text: ends with a newline, as what follows it must begin on a line of its own.
    Raises UserError where the file lacks the two lines.
    """
    begin = f"<!-- {name} writes from here -->\n"
    end = f"<!-- {name} ends here -->\n"
    before, _, rest = read_text(path).partition(begin)
    _, marked, after = rest.partition(end)
    if not marked:
        raise UserError(f"{path}: lacks the lines {begin.strip()} and {end.strip()}")
    write_text(f"{before}{begin}{text}{end}{after}", path)


def make_directory(path, name=None):
    """Make a directory, and those above it. Raises UserError, with `name` for the path."""
    name = name or path
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{name}: is a file, expected a directory")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from error


def write_npy(array, path):
    """Write one array."""
    array = np.ascontiguousarray(array)
    with atomic(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # numpy's own writing hides that a disk is full


def write_safetensors(tensors, path, metadata=None):
    """Write a dict of tensors; metadata: a dict of strings that goes into the file's header."""
    with atomic(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def save(state, path):
    """Write a dict of tensors, numbers and strings (nested dicts and lists allowed)."""
    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # On a full disk, torch's own clean-up hides the OSError behind a RuntimeError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


# --------------------------------------------------------------------------------------- cache


def cached(name):
    """The path of a file in the cache: XDG_CACHE_HOME's or ~/.cache's folder `dra`, which is made.

    It may be deleted at any time. Raises UserError where there can be no such directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.path.join(os.path.expanduser(home), "dra")
    with _cache_errors(folder):
        os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, name)


def make_once(path, make):
    """Call make() where `path`, of `cached`, is missing; of several processes one does it.

    The others wait. Raises UserError where it cannot be written.
    """
    if os.path.exists(path):
        return
    with _cache_errors(path), open(f"{path}.lock", "w") as lock:
        with suppress(OSError):  # a file system that cannot lock is used without
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            make()


@contextmanager
def _cache_errors(path):
    try:
        yield
    except OSError as error:
        message = f"{path}: {error.strerror}; XDG_CACHE_HOME names another place for decoded images"
        raise UserError(f"{message} and unpacked sets") from error


# ------------------------------------------------------------------------------------- reading


@contextmanager
def reading(path, expected):
    """Turn whatever a library raises over a missing or broken file into one UserError.

    expected: what the file should be, such as "a JSON object". The cause stays chained, for whoever
    debugs. Libraries raise nearly anything over damaged bytes, so every Exception is taken for
    one: keep the block down to the library's call.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, expected {expected}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a directory, expected {expected}") from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        if error.errno == EINVAL:  # of a file that is shorter than its own header says
            reason = f"truncated, broken, or not {expected}"
        raise UserError(f"{path}: {reason}") from error
    except Exception as error:
        message = f"truncated, broken, or not {expected}"
        if is_for_users(error):
            message += f" ({first_line(error)})"
        message = _download_error(path) or message
        if is_full_memory(error):
            message += "; or memory is not enough"
        raise UserError(f"{path}: {message}") from error


def _download_error(path):
    """What a download has left in place of a file, in words; None where it looks like a file."""
    try:
        with open(path, "rb") as file:
            start = file.read(200).lstrip().lower()
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs; git lfs pull fetches the file itself"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, so the download failed; fetch the file itself"
    return None


def is_full_memory(error):
    """Whether memory was not enough: of the machine, of the GPU, or for what a broken file asks."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def is_for_users(error):
    """Whether the message of a library's error helps the user who gave the file.

    A reader that stumbles over shapes or types speaks of its own variables.
    """
    kinds = (ValueError, KeyError, EOFError, BadZipFile, SafetensorError, UnpicklingError)
    words = "reshape|broadcast|to unpack|buffer is|operands|literal|not convert|tensors"
    words += "|allow_pickle|TensorIn|at position"
    internal = re.search(words, str(error))
    return isinstance(error, kinds) and not internal


def first_line(error):
    """The first line of an exception's message, cut to 160 characters; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def read_json(path):
    """Read a JSON object as a dict. Raises UserError where there is none."""
    with reading(path, "a JSON object"), open(path, encoding="utf-8-sig") as file:
        value = json.load(file)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(path, expected="a text file"):
    """Read a text file, with or without a byte-order mark. Raises UserError where there is none."""
    with reading(path, expected), open(path, encoding="utf-8-sig") as file:
        return file.read()


def load(path, entries, device="cpu", expected="a checkpoint file such as best.pt"):
    """Read a dict of tensors, numbers and strings that torch.save wrote.

    entries: dict of name: type, what it must hold at least. expected: for messages. Settings of
    other kinds beside them, such as an argparse.Namespace or a NumPy number, are read without their
    content.
    Raises UserError where the file is missing or broken, would run code, or lacks an entry.
    """
    with reading(path, expected), warnings.catch_warnings(action="ignore"):  # of old formats
        _refuse_compression(path)
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except UnpicklingError:  # PyTorch refuses it for something beside the tensors, mostly
            state = pickles.read_checkpoint(path)
    for name, kind in entries.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            message = f"its entry '{name}' is missing or no {kind.__name__}"
            raise UserError(f"{path}: not a checkpoint of this project, {message}")
    return state


def _refuse_compression(path):
    """torch.save compresses nothing. A compressed entry could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                expected = "not weights; save model.state_dict()"
                raise UserError(f"{path}: refused, holds a TorchScript program, {expected}")
        if unpacked > os.path.getsize(path):
            raise UserError(f"{path}: refused, its entries are compressed or overlap")


def read_safetensors(path, device="cpu"):
    """Read a dict of tensors. Raises UserError where there is none."""
    with reading(path, "a safetensors file"):
        return safetensors.torch.load_file(path, str(device))


def read_safetensors_metadata(path):
    """The dict of strings in a safetensors file's header."""
    with reading(path, "a safetensors file"), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_state(thing, state, path):
    """Load a module's or an optimiser's state dict, of the file `path`, strictly.

    Raises UserError with the first difference.
    """
    try:
        thing.load_state_dict(state)
        for parameter, entries in getattr(thing, "state", {}).items():  # of an optimiser
            for entry in entries.values():
                if torch.is_tensor(entry) and entry.dim() and entry.shape != parameter.shape:
                    raise ValueError(f"a state of {tuple(entry.shape)} for a parameter")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The first line of PyTorch's message is a title, the second names the first difference.
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)]
        message = f"{path}: state does not fit the {type(thing).__name__}: {reason}"
        raise UserError(message[:300]) from error


def open_npy(path, dtype, shape=None):
    """Memory-map an array read-only.

    Raises UserError where it is missing, broken, or of another dtype or shape. shape: None for
    any; a None in it stands for any length of that dimension.
    """
    with reading(path, "an .npy array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an .npz archive, expected an .npy array")
    fits = array.dtype == np.dtype(dtype)
    wanted = ""
    if shape is not None:
        lengths = zip(shape, array.shape)
        fits &= array.ndim == len(shape) and all(s in (None, a) for s, a in lengths)
        wanted = " (" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
    if not fits:
        actual = f"found {array.dtype} {array.shape}"
        raise UserError(f"{path}: {actual}, expected {np.dtype(dtype)}{wanted}")
    return array


def sha256(path):
    """Hex digest of a file's content; of a folder or hub:OWNER/NAME its file of weights.

    Raises UserError where there is no file.
    """
    path = local_weights(path)
    with reading(path, "a file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------- the hub


def from_hub(name, patterns):
    """The local folder of a hub repository, hub:OWNER/NAME, fetched where it is not there yet.

    patterns: of the files to fetch. Raises UserError where it cannot be fetched.
    """
    import huggingface_hub

    repository = name.removeprefix("hub:")
    try:
        return huggingface_hub.snapshot_download(repo_id=repository, allow_patterns=patterns)
    except Exception as error:  # the hub's, the network's and the file system's errors
        raise UserError(f"{name}: could not be fetched ({first_line(error)})") from error


def local_weights(path):
    """The path of a file of weights.

    Of a folder its model.safetensors; of hub:OWNER/NAME that, or the only .safetensors file there.
    Raises UserError where there is none, where the hub has several or cannot be reached, or where
    the file is damaged (check_sum).
    """
    if str(path).startswith("hub:"):
        return _hub_weights(path)
    if not os.path.isdir(path):
        return path
    weights = os.path.join(path, "model.safetensors")
    if not os.path.exists(weights):
        expected = "expected a file of weights, or a folder that has one under that name"
        raise UserError(f"{path}: is a directory without model.safetensors; {expected}")
    check_sum(weights)
    return weights


@functools.cache  # so that what is read and what is hashed is one file, whatever changes there
def _hub_weights(name):
    folder = from_hub(name, ["*.json", "*.safetensors"])
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.join(parent, file) for file in names if file.endswith(".safetensors")]
    main = os.path.join(folder, "model.safetensors")
    if main not in found and len(found) != 1:
        names = ", ".join(sorted(os.path.relpath(file, folder) for file in found)) or "none"
        expected = "expected model.safetensors, or one file alone"
        raise UserError(f"{name}: its .safetensors files are {names[:200]}; {expected}")
    weights = main if main in found else found[0]
    check_sum(weights)
    return weights


def check_sum(path):
    """Check a file against its SHA-256 in the config.json beside it, if that has one.

    So the folders are checked that published/model_card.py writes. Raises UserError where the file
    is another one.
    """
    sums = config_beside(path).get("sha256", {})
    if not isinstance(sums, dict):
        folder = os.path.dirname(path)
        raise UserError(
            f"{folder}/config.json: its entry 'sha256' is damaged, expected sums by name"
        )
    expected = sums.get(os.path.basename(path))
    if expected is None:
        return
    found = sha256(path)
    if found != expected:
        told = f"its SHA-256 is {found[:12]}..., config.json beside it has {str(expected)[:12]}..."
        raise UserError(f"{path}: damaged, or of another folder: {told}")


def config_beside(path):
    """What the config.json in the folder of a file holds; {} where there is none."""
    config = os.path.join(os.path.dirname(path), "config.json")
    return read_json(config) if os.path.exists(config) else {}
