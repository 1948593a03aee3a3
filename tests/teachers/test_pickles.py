"""NVlabs' pickles are read without running anything in them, and hostile ones refused.

Alone: python -m pytest tests/teachers/test_pickles.py
"""

import copyreg
import io
import os
import pickle
import random
import warnings

import pytest
import torch
from edm_helper import EDM_CONFIGS, SONG, edm_config, random_edm

from common import UserError
from teachers import edm


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refused(path, *words):
    with pytest.raises(UserError) as info:
        edm.read_pickle(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------- opcodes


def text(string):
    return pickle.SHORT_BINUNICODE + bytes([len(string)]) + string.encode()


def named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


MODULE_DICT = named("torch.nn.modules.container", "ModuleDict") + b")\x81"  # an instance
RECONSTRUCT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
STORAGE = named("torch.storage", "_load_from_bytes")
TENSOR = named("torch._utils", "_rebuild_tensor_v2")
LINEAR = named("torch.nn", "Linear")
SCALAR = named("numpy._core.multiarray", "scalar")
ENTRIES = b"".join(  # of a module's state, without the value of the last
    [
        text("_init_args") + b")",
        text("_init_kwargs") + b"}",
        text("_parameters") + b"}",
        text("_buffers") + b"}",
        text("_modules"),
    ]
)
DEEP = b")" + pickle.TUPLE1 * 200_000
OF_A_FUNCTION = RECONSTRUCT + b"}(" + text("type") + text("function") + b"u\x85R"
DEFAULTS_OF_A_FUNCTION = TENSOR + b"N}" + text("__defaults__") + b")s\x86b"
FORWARD_OF_A_CLASS = named("torch.nn", "Module") + b"}" + text("forward") + text("x") + b"sb"
IN_ITSELF = MODULE_DICT + pickle.MEMOIZE + b"}(" + ENTRIES + b"}" + text("a") + b"h\x00sub"
HUGE = b"\xff" * 7 + b"\x00"

GLOBALS = [  # (module, name) that are asked for
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "set"),
    ("torch.serialization", "load"),
    ("torch", "hub.load"),
    ("torch.nnx", "Module"),
    ("collections", "defaultdict"),
    ("torch.nn", "functional.os.system"),
    ("torch.nn", "Module.__init__.__globals__"),
    ("torch_utils", "persistence._reconstruct_persistent_obj"),
    ("copyreg", "_reconstructor"),
    ("_codecs", "encode"),
]
STREAMS = {  # name: (opcodes after the protocol and before the stop, words of the refusal)
    "global": (b"cos\nsystem\n", "asks for os.system;"),
    "terminal codes": (named("os\x1b[2J\n", "system"), "asks for os\\x1b[2J\\n.system;"),
    "a global without a name": (b"NN\x93", "no text"),
    "call of a torch.nn class": (LINEAR + b"K\x01K\x01\x86R", "cannot be called"),
    "call of an object": (MODULE_DICT + b")R", "cannot be called"),
    "call of a text": (text("print") + b")R", "cannot be called"),
    "call without a tuple": (RECONSTRUCT + b"]R", "cannot be called"),
    "wrong arguments": (RECONSTRUCT + b")R", "not a readable"),
    "meta is a number": (RECONSTRUCT + b"K\x01\x85R", "not a readable"),
    "meta of no class": (OF_A_FUNCTION, "not a readable"),
    "new object of a function": (STORAGE + b")\x81", "not a readable"),
    "new object of a text": (text("x") + b")\x81", "cannot be called"),
    "new object with arguments": (LINEAR + b"K\x01\x85\x81", "cannot be called"),
    "build on a function": (DEFAULTS_OF_A_FUNCTION, "a state for"),
    "build on a class": (FORWARD_OF_A_CLASS, "a state for"),
    "build on a dict": (named("collections", "OrderedDict") + b")R}b", "a state for"),
    "build twice": (MODULE_DICT + b"}b}b", "a state for"),
    "build on a number": (b"K\x01}b", "a state for"),
    "entry of a list": (b"]K\x00K\x01s", "an entry of"),
    "entry of a tuple": (b"}" + DEEP + b"K\x01s", "an entry of"),
    "entries of tuples": (b"}(" + DEEP + b"K\x01u", "an entry of"),
    "odd entries": (b"}(" + text("x") + b"u", "an entry of"),
    "append to a dict": (b"}Na", "no list"),
    "deep in a dict": (b"}" + text("ema") + DEEP + b"s", "'ema'"),
    "extension 1": (b"\x82\x01", "EXT1"),
    "extension 2": (b"\x83\x01\x00", "EXT2"),
    "extension 4": (b"\x84\x01\x00\x00\x00", "EXT4"),
    "persistent id": (b"Pid\n", "PERSID"),
    "binary persistent id": (text("id") + b"Q", "BINPERSID"),
    "instance": (b"(" + text("x") + b"ios\nsystem\n", "INST"),
    "object": (b"(" + named("collections", "OrderedDict") + b"o", "OBJ"),
    "new object, extended": (LINEAR + b")}\x92", "NEWOBJ_EX"),
    "a far place in the memo": (b"Nr\xff\xff\xff\x7f", "'ema'"),
    "buffer": (b"\x97", "NEXT_BUFFER"),
    "unknown opcode": (b"\xff", "not a readable"),
    "no text": (b"\x8c\x01\xff", "invalid start byte"),
    "huge bytes": (b"\x8e" + HUGE, "not a readable"),
    "huge frame": (b"\x95" + HUGE, "not a readable"),
    "empty stack": (b"R", "stack is empty"),
    "missing memo": (b"h\x07", "not a readable"),
    "number": (b"K\x01", "'ema'"),
    "no ema": (b"}", "'ema'"),
    "numpy object": (named("numpy", "dtype") + text("O8") + b"\x85R", "numpy dtype 'O8'"),
    "numpy number of no bytes": (SCALAR + b"N" + b"C\x00\x86R", "not a readable"),
    "module in itself": (b"}" + text("ema") + IN_ITSELF + b"s", "'a.' is no module"),
    "tensor of no storage": (TENSOR + b"NK\x00))t", "not a readable"),
    "tensor whose size is a tuple": (TENSOR + b"(NK\x00NK\x01\x85J\xff\xff\xff\x7f\x86)tR", ""),
}


@pytest.mark.parametrize("module, name", GLOBALS)
def test_globals_are_refused_by_name(module, name, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + named(module, name) + b".")
    refused(path, f"asks for {module}.{name};")


@pytest.mark.parametrize("name", STREAMS)
def test_hostile_streams(name, tmp_path):
    opcodes, words = STREAMS[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + opcodes + b".")
    refused(path, words)


# --------------------------------------------------------------------------- whole files with traps


def storage_of(thing):
    """A call that NVlabs' files hold, on what torch.save wrote in its old format."""
    file = io.BytesIO()
    torch.save(thing, file, _use_new_zipfile_serialization=False)
    return Calls(torch.storage._load_from_bytes, file.getvalue())


def zipped(thing):
    """The same in torch.save's present format."""
    file = io.BytesIO()
    torch.save(thing, file)
    return Calls(torch.storage._load_from_bytes, file.getvalue())


def hide(bomb, place, content):
    """The content of a file with a bomb at some place."""
    ema = content["ema"]
    if place == "top":
        return bomb
    if place == "entry":
        content["loss_fn"] = bomb
    elif place == "attribute":
        ema.secret = bomb
    elif place == "argument":
        ema._init_kwargs["dropout"] = bomb
    else:
        conv = ema._modules["model"]._modules["enc"]._modules["8x8_conv"]
        conv._parameters["weight"] = bomb
    return content


def test_nothing_hostile_runs(nvlabs):
    """Calls in every part of a file that is otherwise NVlabs', each of which pickle would run."""
    net = random_edm("vp", torch.float32)
    touch = Calls(os.system, f"touch {nvlabs.marker}")
    python_touch = Calls(eval, f"open({str(nvlabs.marker)!r}, 'w')")
    pickle.loads(pickle.dumps(touch))
    assert nvlabs.marker.exists()  # so the bomb is live
    nvlabs.marker.unlink()

    bombs = [
        (touch, "posix.system"),
        (python_touch, "eval"),
        (storage_of(touch), "posix.system"),
        (storage_of({"a": python_touch}), "eval"),
        (zipped([touch]), "in a zip archive"),
        (zipped(torch.zeros(4)), "in a zip archive"),
        (Calls(torch.load, str(nvlabs.marker)), "torch.serialization.load"),
        (Calls(torch.storage._load_from_bytes, pickle.dumps(touch)), "not a readable"),
        (Calls(exec, "1"), "builtins.exec"),
    ]
    for bomb, word in bombs:
        for place in ("top", "entry", "attribute", "argument", "state"):
            content = hide(bomb, place, nvlabs.content(net, EDM_CONFIGS["vp"]))
            nvlabs.path.write_bytes(pickle.dumps(content, 2))
            refused(nvlabs.path)
            nvlabs.path.write_bytes(pickle.dumps(content, 5))
            refused(nvlabs.path, word)
    copyreg.add_extension("posix", "system", 77)
    try:
        nvlabs.path.write_bytes(pickle.dumps(touch))
        refused(nvlabs.path, "EXT1")
    finally:
        copyreg.remove_extension("posix", "system", 77)
    assert not nvlabs.marker.exists()


def test_old_protocols_are_refused_by_name(tmp_path):
    path = tmp_path / "x.pkl"
    for protocol in range(6):
        path.write_bytes(pickle.dumps(Calls(os.system, "true"), protocol))
        refused(path, "asks for posix.system; only the tensors and arguments of an NVlabs network")


def test_data_that_are_asked_for_again_cannot_fill_the_memory(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # torch's own, of this kind of storage
        _, (data,) = torch.zeros(1000).storage().__reduce__()
    memoized = pickle.BINBYTES + len(data).to_bytes(4, "little") + data + pickle.MEMOIZE
    once = STORAGE + pickle.MEMOIZE + memoized + b"\x85R"
    again = b"h\x00h\x01\x85R"
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + once + again * 9 + b".")
    refused(path, "more tensor data than the file has bytes")


def test_one_tensor_in_many_places_cannot_fill_the_memory(nvlabs):
    config = edm_config("EDMPrecond", **SONG | {"model_channels": 32, "num_blocks": 16})
    net = edm.build(config)
    of_shape = {}
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = of_shape.setdefault(p.shape, p)
    nvlabs.path.write_bytes(pickle.dumps(nvlabs.content(net, config)))
    refused(nvlabs.path, "more numbers than the file has bytes")


def test_deep_modules(nvlabs):
    """Ten thousand modules in one another: no stack overflows."""
    names = [text(name) for name in ("type", "class", "class_name", "EDMPrecond", "state")]
    start = RECONSTRUCT + b"}(" + b"".join(names) + b"}(" + ENTRIES + b"}" + text("a")
    deep = start * 10_000 + b"N" + b"suu\x85R" * 10_000
    nvlabs.path.write_bytes(b"\x80\x04}" + text("ema") + deep + b"s.")
    refused(nvlabs.path, "not a readable")


def test_damaged_files(nvlabs):
    """Cut anywhere, or with any byte changed: a UserError or a valid network, nothing else."""
    tiny = edm_config(
        "EDMPrecond",
        model_type="SongUNet",
        model_channels=4,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        channel_mult_emb=1,
    )
    good = pickle.dumps(nvlabs.content(edm.build(tiny), tiny))
    nvlabs.path.write_bytes(good)
    edm.read_pickle(nvlabs.path)

    rng = random.Random(0)
    for end in [*range(40), *(rng.randrange(len(good)) for _ in range(60)), len(good) - 1]:
        nvlabs.path.write_bytes(good[:end])
        refused(nvlabs.path)
    n_read = 0
    for _ in range(220):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] = rng.randrange(256)
        nvlabs.path.write_bytes(bad)
        try:
            config, network = edm.read_pickle(nvlabs.path)
        except UserError as error:
            assert str(error).startswith(f"{nvlabs.path}: ") and "\n" not in str(error)
        else:
            edm.build(config).load_state_dict(network.state_dict())
            n_read += 1
    assert 20 < n_read < 200
    assert not nvlabs.marker.exists()
