"""NVlabs' pickles of networks, read as data: nothing of a file runs, whoever has written it.

A pickle can run any program. Here its tensors, arguments and names of classes are collected, and a
file that asks for anything else is refused by name. What they mean stands in the file of a family,
how opcodes are followed in common/pickles.py.
"""

import io
import os
import pickle
import re
import warnings

import numpy as np
import torch

from common import UserError, files
from common.pickles import Forbidden, Global, Object, Unpickler, full_name, view


def show(value):
    """A value out of a file for a message: short, one line, and no deep structure."""
    if isinstance(value, str | int | float | None):
        return ascii(value)[:80]
    return f"a {type(value).__name__}"


def _persistent(meta):
    """An object of NVlabs' classes. meta["module_src"], a whole program, stays unread."""
    if meta["type"] != "class" or type(meta["class_name"]) is not str:
        raise ValueError("a persistent object without class_name")
    return Object(meta["class_name"], meta["state"])


def _storage(data):
    """The flat tensor of what torch.save(storage) wrote."""
    if data.startswith(b"PK"):
        raise ValueError("tensor data in a zip archive, which could unpack to any size")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([^\s`'\"]+)", str(error))
        if name is not None:
            raise Forbidden(name[1]) from error
        raise
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("tensor data that are no storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


def _tensor(flat, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    return view(flat, offset, size, stride)


def _parameter(data, requires_grad=True, hooks=None):
    return data


def _dtype(code, align=False, copy=True):
    if type(code) is not str or not re.fullmatch("[fiu][1248]|b1", code):
        raise ValueError(f"numpy dtype {show(code)}")
    return Object(code)  # the order of its bytes follows as a state, and is always "<"


def _scalar(dtype, data):
    return np.frombuffer(data, np.dtype("<" + dtype.name)).item()


def _array(*args):
    return Object("numpy.ndarray")  # of EDM2's encoder, whose numbers nobody needs


_FUNCTIONS = {  # what a pickle may call, and what is called in its place
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.numeric._frombuffer": _array,
    "numpy._core.numeric._frombuffer": _array,
}
_CLASSES = ("numpy.ndarray",)
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")


class _Network(Unpickler):
    """A pickle of `size` bytes. Calls go through `_FUNCTIONS`."""

    def __init__(self, size):
        self.room = size

    def find(self, module, name):
        """A name on the list. Its classes, and torch.nn's, are here objects with a state."""
        full = full_name(module, name)
        known = full in (*_FUNCTIONS, *_CLASSES, *_DICTS) or full.startswith("torch.nn.")
        if not known:
            raise Forbidden(full)
        return Global(full)

    def call(self, thing, args):
        if thing.name in _FUNCTIONS:
            value = _FUNCTIONS[thing.name](*args)
            if _FUNCTIONS[thing.name] is _storage:
                self.room -= len(args[0])
                if self.room < 0:  # a small file could ask for the same data again and again
                    raise ValueError("more tensor data than the file has bytes")
            return value
        if args:
            raise ValueError(f"{thing.name} cannot be called with arguments")
        return {} if thing.name in _DICTS else Object(thing.name)

    def build(self, target, state):
        if type(target) is not Object or target.state is not None:
            raise ValueError("a state for what has none")
        target.state = state


def read(path):
    """The value of an NVlabs pickle, of plain containers, tensors and Objects.

    Raises UserError where the file is missing or broken, or asks for anything that could run.
    """
    with files.reading(path, "a readable NVlabs network"), open(path, "rb") as file:
        if file.read(2) == b"PK":
            converted = "SiT's and JiT's are converted by teachers.sit and teachers.jit"
            raise UserError(f"{path}: a zip file of weights, expected NVlabs' .pkl; {converted}")
        file.seek(0)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's own, of TypedStorage
                return _Network(os.path.getsize(path)).load(file)
        except Forbidden as error:
            name = ascii(str(error))[1:-1][:100]
            allowed = "only the tensors and arguments of an NVlabs network are read"
            raise UserError(f"{path}: refused, asks for {name}; {allowed}") from error
