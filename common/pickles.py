"""Pickles read as data: nothing of a file ever runs, whoever has written it.

A pickle can run any program. `Unpickler` follows its opcodes with data alone on the stack, and its
subclasses say what stands for the classes and functions that a file names. `read_checkpoint` is the
one for what torch.save wrote: PyTorch's own reader refuses a file for the settings beside its
weights (an argparse.Namespace, a NumPy number, ...), and knows pickles of protocol 2 and 3 alone.
"""

import math
import os
import pickletools
import re
import sys
import zipfile

import torch

from common import UserError


class Forbidden(Exception):
    """A pickle asks for something that is not on the list; its text is the name."""


class Global:
    """What a pickle gets for a class or function on the list: its name, which nothing can call."""

    def __init__(self, name):
        self.name = name


class Object:
    """An object of the file as data: the name of its class, and its attributes."""

    def __init__(self, name, state=None):
        self.name = name
        self.state = state


# Opcodes that put something on the stack: their argument, a constant, or a new container.
_ARGUMENT = (
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
).split()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}


class Unpickler:
    """The value that a pickle describes: plain containers, and what a subclass makes of the rest.

    It defines find(module, name), a Global for a class or function that the file names, or
    Forbidden; call(thing, args), what stands for a call of a Global with a tuple; and
    build(target, state), which gives an object its state.

    pickletools decodes the opcodes and runs nothing. Known here are those that torch.save and
    pickle write from protocol 2 on, as the pickle module documents them.
    """

    def persistent(self, value):
        """What stands for an object that is kept outside of the pickle."""
        raise ValueError("pickle opcode BINPERSID, which such a file does without")

    def add_items(self, target, items):
        """Put keys and values, which take turns in `items`, into a dict."""
        keys = items[::2]
        # Names and numbers alone: to hash a tuple of tuples of tuples would overflow the stack.
        plain = all(type(key) in (str, int) for key in keys)
        if type(target) is not dict or len(items) % 2 or not plain:
            raise ValueError("an entry of what is no dict of names")
        target.update(zip(keys, items[1::2]))

    def append(self, target, items):
        """Put items at the end of a list."""
        if type(target) is not list:
            raise ValueError("an entry of what is no list")
        target.extend(items)

    def load(self, file):
        """Read one pickle, from the file's position to the pickle's end."""
        stack = []
        marks = []  # lengths of the stack
        memo = {}

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
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                if argument not in memo:
                    raise ValueError("a pickle that asks for what it does not hold")
                stack.append(memo[argument])
            elif name in ("APPEND", "APPENDS"):
                items = pop(1) if name == "APPEND" else pop_to_mark()
                self.append(stack[-1], items)
            elif name in ("SETITEM", "SETITEMS"):
                items = pop(2) if name == "SETITEM" else pop_to_mark()
                self.add_items(stack[-1], items)
            elif name == "ADDITEMS":  # to a set, whose items are of no use to anyone
                pop_to_mark()
            elif name == "FROZENSET":
                pop_to_mark()
                stack.append(frozenset())
            elif name == "GLOBAL":
                stack.append(self.find(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self.find(*pop(2)))
            elif name in ("REDUCE", "NEWOBJ"):
                thing, args = pop(2)
                if type(thing) is not Global or type(args) is not tuple:
                    raise ValueError("a call of what cannot be called")
                stack.append(self.call(thing, args))
            elif name == "BINPERSID":
                stack.append(self.persistent(*pop(1)))
            elif name == "BUILD":
                (state,) = pop(1)
                self.build(stack[-1], state)
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"pickle opcode {name}, which such a file does without")
        raise ValueError("a pickle without an end")


def full_name(module, name):
    """module.name. Raises where one of them is no text, or where the name has dots of its own."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("a global whose name is no text")
    if not name.isidentifier():  # a dotted name would reach through another one
        raise Forbidden(f"{module}.{name}")
    return f"{module}.{name}"


def view(flat, offset, size, stride):
    """A tensor of these sizes in a flat one. Raises where it would be larger."""
    # A stride of 0 would make a storage of one number fill any memory.
    if not all(type(n) is int for n in size) or math.prod(size) > flat.numel():
        raise ValueError(f"a tensor larger than its storage of {flat.numel()}")
    return flat.as_strided(size, stride, offset)  # which checks the bounds


# ---------------------------------------------------------------------- what torch.save writes

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


def _tensor(flat, offset, size, stride, *others):
    return view(flat, offset, size, stride)


def _parameter(data, *others):
    return data


_FUNCTIONS = {  # what a file may call, and what is called in its place
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

# Classes of pure data, and what makes them again. Nothing of what they hold is kept.
_INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|_?pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|datetime\.\w+|zoneinfo\.ZoneInfo|collections\.deque|typing\.\w+"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)|_codecs\.encode"
    r"|builtins\.(object|int|long|float|complex|bool|str|unicode|bytes|bytearray|list|tuple|dict"
    r"|set|frozenset|slice|range|xrange)|copyreg\._reconstructor|random\.Random"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+|complex\d+|str_|bytes_|dtypes\.\w+)"
    r"|numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.random\.\w+\.\w+"
    r"|torch\.(Size|device|dtype|Generator|u?int\d+|b?float\d+\w*|bool|complex\d+|strided)"
    r"|torch\.serialization\._get_layout|torch\.torch_version\.TorchVersion"
    r"|packaging\.version\.Version|time\.struct_time"
)
_DICTS = re.compile(r"collections\.(OrderedDict|defaultdict|Counter)")
# Settings of packages and scripts, such as easydict.EasyDict, yacs.config.CfgNode, __main__.Config.
_SETTINGS = re.compile(
    r"omegaconf\.[\w.]+|yacs\.config\.\w+|ml_collections\.[\w.]+|easydict\.\w+|addict\.[\w.]+"
    r"|box\.[\w.]+|munch\.\w+|attridict\.\w+"
    r"|[\w.]*\.\w*(Dict|Namespace|CfgNode|Config|Configs|Settings|Options|Args|Arguments|[Pp]arams)"
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names in protocol 2
_CODE = {"torch", "torchvision", "torchaudio", "numpy", "scipy", "pip", *sys.stdlib_module_names}


class _Checkpoint(Unpickler):
    """The pickle of a checkpoint; storage(key, dtype, n) is the flat tensor of a storage."""

    def __init__(self, storage):
        self.storage = storage

    def find(self, module, name):
        module = _PYTHON_2.get(module, module)
        full = full_name(module, name)
        is_storage = module in ("torch", "torch.cuda") and name in _DTYPES
        known = full in _FUNCTIONS or is_storage
        known = known or _INERT.fullmatch(full) or _DICTS.fullmatch(full)
        if not known and (module.split(".")[0] in _CODE or not _SETTINGS.fullmatch(full)):
            raise Forbidden(full)
        return Global(full)

    def call(self, thing, args):
        if thing.name in _FUNCTIONS:
            return _FUNCTIONS[thing.name](*args)
        # Those that are dicts may hold the weights.
        is_dict = _DICTS.fullmatch(thing.name) or thing.name.endswith(("Dict", "CfgNode"))
        return {} if is_dict else Object(thing.name)

    def build(self, target, state):
        if type(target) not in (dict, Object):
            raise ValueError("a state for what has none")

    def persistent(self, value):
        kind, storage_class, key, _, n, *views = value
        if kind != "storage" or type(storage_class) is not Global or any(views):
            raise ValueError("an object outside of the pickle that is no storage")
        dtype = _DTYPES.get(storage_class.name.rpartition(".")[2])
        if dtype is None or type(key) is not str or type(n) is not int or n < 0:
            raise ValueError("a storage without a name, a type or a size")
        return self.storage(key, dtype, n)

    def add_items(self, target, items):
        if type(target) is Object:
            return
        pairs = zip(items[::2], items[1::2])
        kept = [item for pair in pairs if type(pair[0]) in (str, int) for item in pair]
        super().add_items(target, kept)

    def append(self, target, items):
        if type(target) is not Object:
            super().append(target, items)


def read_checkpoint(path):
    """What torch.save wrote, in its present format or in the old one: tensors, numbers, strings.

    Objects of known data classes stand there as an Object, without their content.
    Raises UserError where the file asks for anything else, and any Exception where it is broken.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_old(path)
    except Forbidden as error:
        name = ascii(str(error))[1:-1][:100]
        module, _, last = name.rpartition(".")
        if last[:1].isupper() and module.split(".")[0] not in sys.stdlib_module_names:
            reason = f"holds a pickled {name}, not its weights alone; save model.state_dict()"
        else:
            reason = f"asks for {name}, and only tensors and plain data are read"
        raise UserError(f"{path}: refused, {reason}") from error


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("tensors in another order of bytes")
        storages = {}

        def storage(key, dtype, n):
            if key not in storages:
                storages[key] = _flat(archive.read(f"{root}data/{key}"), dtype, n)
            if storages[key].dtype != dtype:
                raise ValueError("a storage of two types")
            return storages[key]

        with archive.open(pickled) as file:
            return _Checkpoint(storage).load(file)


def _read_old(path):
    """The old format: five pickles, then the storages one after the other."""
    room = os.path.getsize(path)
    storages = {}

    def storage(key, dtype, n):
        nonlocal room
        if key not in storages:
            room -= n * dtype.itemsize
            if room < 0:
                raise ValueError("more tensor data than the file has bytes")
            storages[key] = torch.zeros(n, dtype=dtype)
        if storages[key].dtype != dtype:
            raise ValueError("a storage of two types")
        return storages[key]

    reader = _Checkpoint(storage)
    with open(path, "rb") as file:
        magic, version, _, value, keys = [reader.load(file) for _ in range(5)]
        if (magic, version) != (0x1950A86A20F9469CFC6C, 1001):
            raise ValueError("no file of torch.save")
        for key in keys:
            if key not in storages:
                raise ValueError("a storage that belongs to no tensor")
            flat = storages[key]
            n = int.from_bytes(file.read(8), "little")
            if n != flat.numel():
                raise ValueError("a storage of two sizes")
            flat.copy_(_flat(file.read(n * flat.itemsize), flat.dtype, n))
    return value


def _flat(content, dtype, n):
    """The flat tensor of n numbers that the bytes `content` are."""
    if len(content) != n * dtype.itemsize:
        raise ValueError("a storage of another size than its bytes")
    if n == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)
