"""NVlabs' pickles of networks, read as data: nothing of a file runs, whoever has written it.

A pickle can run any program. Here its tensors, arguments and names of classes are collected, and a
file that asks for anything else is refused by name. What they mean stands in the file of a family.
"""

import io
import math
import os
import pickle
import pickletools
import re
import warnings

import numpy as np
import torch

from common import UserError, files


class _Forbidden(Exception):
    """A pickle asks for something that is not on the list; its text is the name."""


class _Global:
    """What a pickle gets for a class or function on the list: its name, which nothing can call."""

    def __init__(self, name):
        self.name = name


class Object:
    """An object of the file as data: the name of its class, and its attributes."""

    def __init__(self, name, state=None):
        self.name = name
        self.state = state


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
            raise _Forbidden(name[1]) from error
        raise
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError("tensor data that are no storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


def _tensor(flat, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A view of a flat tensor."""
    # A stride of 0 would make a storage of one number fill any memory.
    if not all(type(n) is int for n in size) or math.prod(size) > flat.numel():
        raise ValueError(f"a tensor larger than its storage of {flat.numel()}")
    return flat.as_strided(size, stride, offset)  # which checks the bounds


def _parameter(data, requires_grad=True, hooks=None):
    return data


def _dtype(code, align=False, copy=True):
    if type(code) is not str or not re.fullmatch("[fiu][1248]|b1", code):
        raise ValueError(f"numpy dtype {show(code)}")
    return Object(code)  # the order of its bytes follows as a state, and is always "<"


def _scalar(dtype, data):
    return np.frombuffer(data, np.dtype("<" + dtype.name)).item()


_FUNCTIONS = {  # what a pickle may call, and what is called in its place
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _dtype,
}
_DICTS = ("collections.OrderedDict", "dnnlib.util.EasyDict")


def _global(module, name):
    """A name on the list. Classes of torch.nn are containers, here mere objects with a state."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("a global whose name is no text")
    full = f"{module}.{name}"
    listed = full in _FUNCTIONS or full in _DICTS or full.startswith("torch.nn.")
    if not listed or not name.isidentifier():  # a dotted name would reach through another one
        raise _Forbidden(full)
    return _Global(full)


def _call(thing, args):
    """What stands for a call of a function on the list, or for an instance of a class on it."""
    if type(thing) is not _Global or type(args) is not tuple:
        raise ValueError("a call of what cannot be called")
    if thing.name in _FUNCTIONS:
        return _FUNCTIONS[thing.name](*args)
    if args:
        raise ValueError(f"{thing.name} cannot be called with arguments")
    return {} if thing.name in _DICTS else Object(thing.name)


def _set_state(target, state):
    if type(target) is not Object or target.state is not None:
        raise ValueError("a state for what has none")
    target.state = state


def _add_items(target, items):
    """Put keys and values, which take turns in `items`, into a dict."""
    keys = items[::2]
    # Names and numbers alone: to hash a tuple of tuples of tuples would overflow the stack.
    plain = all(type(key) in (str, int) for key in keys)
    if type(target) is not dict or len(items) % 2 or not plain:
        raise ValueError("an entry of what is no dict of names")
    target.update(zip(keys, items[1::2]))


def _append(target, items):
    if type(target) is not list:
        raise ValueError("an entry of what is no list")
    target.extend(items)


# Opcodes that put something on the stack: their argument, a constant, or a new container.
_ARGUMENT = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE "
    "SHORT_BINBYTES BINBYTES BINBYTES8"
).split()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}


def _unpickle(file, size):
    """The value that a pickle of `size` bytes describes: plain containers, tensors and Objects.

    pickletools decodes the opcodes and runs nothing. Known here are those that such a file is made
    of, as the pickle module documents them, but for calls, which go through _call. On the stack are
    data alone.
    """
    stack = []
    marks = []  # lengths of the stack
    memo = []

    def pop(n):
        if n > len(stack):
            raise ValueError("the pickle's stack is empty")
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return items

    def pop_to_mark():
        return pop(len(stack) - marks.pop())

    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else pop_to_mark()
            _append(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else pop_to_mark()
            _add_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_global(*pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            thing, args = pop(2)
            stack.append(_call(thing, args))
            if _FUNCTIONS.get(thing.name) is _storage:
                size -= len(args[0])
                if size < 0:  # a small file could ask for the same data again and again
                    raise ValueError("more tensor data than the file has bytes")
        elif name == "BUILD":
            (state,) = pop(1)
            _set_state(stack[-1], state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"pickle opcode {name}, which such a file does without")
    raise ValueError("a pickle without an end")


def read(path):
    """The value of an NVlabs pickle, of plain containers, tensors and Objects.

    Raises UserError where the file is missing or broken, or asks for anything that could run.
    """
    with files.reading(path, "a readable NVlabs network"), open(path, "rb") as file:
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's own, of TypedStorage
                return _unpickle(file, os.path.getsize(path))
        except _Forbidden as error:
            name = ascii(str(error))[1:-1][:100]
            allowed = "only the tensors and arguments of an NVlabs network are read"
            raise UserError(f"{path}: refused, asks for {name}; {allowed}") from error
