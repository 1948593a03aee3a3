"""Data sets of made images in the published formats, for tests of common/data.py and of scripts."""

import hashlib
import io
import multiprocessing
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from common import UserError

# What PyTorch, diffusers and Python say of their own variables.
INTERNAL = re.compile(
    r"size of tensor|Expected|zeros\(|\(\)|keyword argument|positional|NoneType|object|list index"
    r"|out of range|must match|shape '|mat1|torch_dtype=|unpack|literal|iterable|subscriptable"
    r"|Traceback|torch\.|[a-z]Error|meta tensor|of type|of string|Tensor|instance|_[a-z]+ = "
    r"|\bself\b|attribute|allocate|not supported|operand|normalized_shape|unexpected argument"
)


def refused(call, *words):
    """call() ends with a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_jpeg(path, seed, size=(64, 64), mode="RGB"):
    """Write a JPEG of noise; size: (width, height)."""
    bands = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
    pixels = noise(size[1], size[0], *bands, seed=seed)
    Image.fromarray(pixels, mode=mode).save(path, "JPEG", quality=90)


class Hostile:
    """Unpickled, it makes the directory `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def in_children(count, function):
    """Run `function` in that many forked processes at the same time; returns their exit codes."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=function) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


# -------------------------------------------------------------------------------------------- CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings: CIFAR's files are of 2009."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, text):
        if len(text) < 256:
            self.write(b"U" + bytes([len(text)]) + text)
        else:
            self.write(b"T" + len(text).to_bytes(4, "little") + text)
        self.memoize(text)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    """Pickle as in 2009, with NumPy under its name of then."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class Cifar10Files:
    dataset = torchvision.datasets.CIFAR10
    folder = "cifar-10-batches-py"
    train = [f"data_batch_{i}" for i in range(1, 6)]
    test = "test_batch"
    meta = "batches.meta"
    label_key = b"labels"
    names_key = b"label_names"


class Cifar100Files:
    dataset = torchvision.datasets.CIFAR100
    folder = "cifar-100-python"
    train = ["train"]
    test = "test"
    meta = "meta"
    label_key = b"fine_labels"
    names_key = b"fine_label_names"


CIFARS = {"cifar10": Cifar10Files, "cifar100": Cifar100Files}


def write_cifar(spec, data_dir, per_file=12):
    """Write a CIFAR of noise. Returns {file name: (planes uint8 (N, 3072), list of labels)}."""
    layout = CIFARS[spec.name]
    folder = Path(data_dir, layout.folder)
    folder.mkdir(parents=True)
    made = {}
    for seed, name in enumerate([*layout.train, layout.test]):
        planes = noise(per_file, 3072, seed=seed)
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, spec.num_classes, per_file).tolist()
        content = {
            b"data": planes,
            b"filenames": [b"x.png"] * per_file,
            b"batch_label": name.encode(),
            b"coarse_labels": [0] * per_file,
            layout.label_key: labels,
        }
        (folder / name).write_bytes(python2_pickle(content))
        made[name] = planes, labels
    class_names = [b"c%d" % number for number in range(spec.num_classes)]
    (folder / layout.meta).write_bytes(python2_pickle({layout.names_key: class_names}))
    return made


def trust_cifar(spec, data_dir, monkeypatch):
    """Let torchvision take the files in data_dir for the published ones."""
    layout = CIFARS[spec.name]
    names = [*layout.train, layout.test, layout.meta]
    sums = {name: md5(Path(data_dir, layout.folder, name)) for name in names}
    train = [[name, sums[name]] for name in layout.train]
    monkeypatch.setattr(layout.dataset, "train_list", train)
    monkeypatch.setattr(layout.dataset, "test_list", [[layout.test, sums[layout.test]]])
    meta = layout.dataset.meta | {"md5": sums[layout.meta]}
    monkeypatch.setattr(layout.dataset, "meta", meta)
