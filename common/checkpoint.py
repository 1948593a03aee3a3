"""Files that survive: written beside, fsynced, renamed. Files of others are data: tensors and numbers, never code."""

import fcntl
import hashlib
import json
import math
import os
import pickle
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import torch

from common.cli import UserError


@contextmanager
def atomic(path):
    """Yield a binary file that becomes `path` when the block ends well; a killed or failed write leaves `path` as it was."""
    folder, temporary = os.path.dirname(os.path.abspath(path)), f"{path}.writing"
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path  # a write on a full disk does not say of which file
        raise
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def save(state, path):
    """Write a dict of tensors, numbers and strings (nested dicts and lists allowed)."""
    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # on a full disk, torch's own clean-up hides the OSError behind a RuntimeError
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(path, entries, device="cpu"):
    """Read a dict written by save that has at least `entries`, a dict of name: type.

    Raises UserError where the file is missing, broken, or would run code, or an entry is missing or of another type.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing; what is compressed could be of any size
                if sum(info.file_size for info in archive.infolist()) > os.path.getsize(path):
                    raise UserError(f"{path}: refused, its entries are compressed or overlap")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, expected a checkpoint file such as best.pt") from None
    except pickle.UnpicklingError as error:
        # PyTorch's message explains itself at length; its first sentence names the forbidden thing.
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
        raise UserError(f"{path}: refused, not a plain checkpoint of tensors. {reason[:200]}".strip()) from None
    except (UserError, OSError):
        raise
    except Exception as error:  # at a damaged file, torch's reader raises nearly anything
        raise UserError(f"{path}: truncated or not a checkpoint ({_first_line(error)})") from None
    for name, kind in entries.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path}: not a checkpoint of this project, its entry '{name}' is missing or no {kind.__name__}")
    return state


def load_state(thing, state, path):
    """Load a module's or an optimiser's state dict strictly; the first difference becomes one clear line."""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise UserError(f"{path}: state does not fit the {type(thing).__name__}: {lines[min(1, len(lines) - 1)]}"[:300]) from None


def write_json(value, path):
    """Write indented JSON atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """Read a JSON object as a dict; raises UserError where the file is missing, broken or holds something else."""
    try:
        with open(path) as file:
            value = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_npy(array, path):
    """Write one array atomically."""
    with atomic(path) as file:
        np.save(file, array, allow_pickle=False)


def open_npy(path, dtype, shape=None):
    """Memory-map an array read-only; its dtype, and its shape where given (None entries match anything), must be as expected."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except Exception as error:  # NumPy lets through what Python's tokenizer, parser and mmap raise over a broken header
        raise UserError(f"{path}: truncated or not an .npy array ({_first_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an .npz archive, expected an .npy array")
    fits = shape is None or (array.ndim == len(shape) and all(s in (None, a) for s, a in zip(shape, array.shape)))
    if array.dtype != np.dtype(dtype) or not fits:
        wanted = "" if shape is None else " " + str(tuple("any" if s is None else s for s in shape)).replace("'", "")
        raise UserError(f"{path}: found {array.dtype} {array.shape}, expected {np.dtype(dtype)}{wanted}")
    return array


def map_zeros(path, dtype, shape):
    """Map an .npy array to be written, of zeros where it is missing; one that is there must be of this kind.

    Its space is taken first: on a full disk, a write to a map is SIGBUS.
    """
    if not os.path.exists(path):
        with atomic(path) as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(size := file.tell() + np.dtype(dtype).itemsize * math.prod(shape))
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    open_npy(path, dtype, shape)
    return np.lib.format.open_memmap(path, "r+")


def make_once(path, make):
    """Call make() where `path` is missing. One of the processes that want it at the same time makes it, the others wait."""
    if not os.path.exists(path):
        with open(f"{path}.lock", "w") as lock:
            with suppress(OSError):  # file systems that cannot lock are used without
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.exists(path):
                make()


def sha256(path):
    """Hex digest of a file; raises UserError where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror}, expected a file") from None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
