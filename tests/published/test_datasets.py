"""Data sets from files of their published formats, broken ones, and downloads from a local server;
rotation, MixUp and CutMix; the worker processes of ImageNet.

Alone: python -m pytest -n 0 tests/published/test_datasets.py
"""

import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from data_helper import (
    CIFARS,
    Hostile,
    in_children,
    md5,
    noise,
    refused,
    trust_cifar,
    write_cifar,
    write_jpeg,
)
from PIL import Image
from torchvision.transforms import functional, v2

from common import UserError, cli, data, files
from published import datasets, image_files, image_folders
from published.datasets import DATASETS

CIFAR10 = DATASETS["cifar10"]
CIFAR100 = DATASETS["cifar100"]
SVHN = DATASETS["svhn"]
FASHION = DATASETS["fashion-mnist"]
TINY = DATASETS["tiny-imagenet"]
IMAGENET = DATASETS["imagenet"]
REAL_FASHION = Path("/usr/share/datasets/fashion-mnist")

both_cifars = pytest.mark.parametrize("spec", [CIFAR10, CIFAR100], ids=lambda spec: spec.name)


def load_train_refused(spec, data_dir, *words):
    refused(lambda: data.load_train(spec, str(data_dir), 1), *words)


def load_test_refused(spec, data_dir, *words):
    refused(lambda: data.load_test(spec, str(data_dir)), *words)


# -------------------------------------------------------------------------------------------- CIFAR


def assert_is_cifar(spec, data_dir, made):
    """What is read is what was made: planes of red, green and blue, row by row."""
    *train_names, test_name = made
    train = data.load_train(spec, data_dir, 0)[0]
    test = data.load_test(spec, data_dir)
    for (images, labels), names in ((train, train_names), (test, [test_name])):
        planes = np.concatenate([made[name][0] for name in names])
        expected = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert np.array_equal(images, expected) and images.dtype == np.uint8
        assert labels.tolist() == [label for name in names for label in made[name][1]]
        assert labels.dtype == np.int64
    (rest, rest_labels), (held_out, held_out_labels) = data.load_train(spec, data_dir, 7)
    images, labels = train
    assert np.array_equal(held_out, images[:7]) and np.array_equal(rest, images[7:])
    assert np.array_equal(held_out_labels, labels[:7]) and np.array_equal(rest_labels, labels[7:])


@both_cifars
def test_cifar(spec, tmp_path, monkeypatch):
    made = write_cifar(spec, tmp_path)
    layout = CIFARS[spec.name]
    content = (tmp_path / layout.folder / layout.train[0]).read_bytes()
    # The files are as Python 2 wrote them.
    assert b"U\x04data" in content and b"cnumpy.core.multiarray\n_reconstruct" in content
    trust_cifar(spec, tmp_path, monkeypatch)
    assert_is_cifar(spec, str(tmp_path), made)
    train, _ = data.load_train(spec, str(tmp_path), 4)
    x, _ = data.Batches(spec, train, batch_size=8, seed=0, device="cpu")(0)
    assert x.shape == (8, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)


@both_cifars
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar_that_is_not_the_published_one_runs_nothing(spec, protocol, tmp_path):
    """The files are pickles: neither with nor without their MD5 sums is anything run."""
    write_cifar(spec, tmp_path)
    layout = CIFARS[spec.name]
    path = tmp_path / layout.folder / layout.train[0]
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "marker"), protocol))
    pickle.loads(path.read_bytes())
    os.rmdir(tmp_path / "marker")  # it was made: the file is hostile indeed
    load_train_refused(spec, tmp_path, f"{path}: another checksum (MD5)", "--ignore-checksum")
    trusting = partial(spec.read, any_checksum=True)
    refused(lambda: trusting(str(tmp_path), True), f"{path}: ", "refused, asks for posix.mkdir")
    assert not (tmp_path / "marker").exists()


@both_cifars
def test_an_altered_cifar_is_read_where_the_user_says_so(spec, tmp_path, monkeypatch):
    made = write_cifar(spec, tmp_path)
    load_test_refused(spec, tmp_path, "checksum")
    assert_is_cifar(with_any_checksum(spec), str(tmp_path), made)
    layout = CIFARS[spec.name]
    path = tmp_path / layout.folder / layout.test  # saved again, by NumPy and Python of today
    planes, labels = made[layout.test]
    content = {"data": planes, layout.label_key.decode(): labels}
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        assert_is_cifar(with_any_checksum(spec), str(tmp_path), made)
    changes = {
        "a label too large": {layout.label_key.decode(): [100, *labels[1:]]},
        "a label too few": {layout.label_key.decode(): labels[1:]},
        "no labels": {layout.label_key.decode(): None},
        "floats": {"data": planes.astype(np.float32)},
        "fewer pixels": {"data": planes[:, 1:]},
        "no images": {"data": "none"},
    }
    for change in changes.values():
        path.write_bytes(pickle.dumps(content | change))
        load_test_refused(with_any_checksum(spec), tmp_path, f"{path}: ")
    for size in (0, 1, 100, path.stat().st_size - 1):
        os.truncate(path, size)
        load_test_refused(with_any_checksum(spec), tmp_path, f"{path}: ", "CIFAR")


def with_any_checksum(spec):
    return dataclasses.replace(spec, read=partial(spec.read, any_checksum=True))


def test_cifar_that_is_not_there(tmp_path):
    words = "cifar10 is not there, or broken; put cifar-10-batches-py/"
    for folder in (tmp_path, tmp_path / "none"):
        load_test_refused(CIFAR10, folder, f"--data-dir {folder}: {words}", "add --download")
    write_cifar(CIFAR10, tmp_path)
    load_test_refused(CIFAR10, tmp_path / "cifar-10-batches-py", words)  # one level too deep


# --------------------------------------------------------------------------------------------- SVHN


def write_svhn(data_dir, n=30):
    """Returns {split: (images (32, 32, 3, n), digits (n,))}."""
    made = {}
    for seed, split in enumerate(("train", "test")):
        images = noise(32, 32, 3, n, seed=seed)
        digits = np.random.default_rng(seed).integers(1, 11, (n, 1)).astype(np.uint8)
        digits[:10, 0] = range(1, 11)
        scipy.io.savemat(Path(data_dir, f"{split}_32x32.mat"), {"X": images, "y": digits})
        made[split] = images, digits[:, 0]
    return made


def trust_svhn(data_dir, monkeypatch, address="http://localhost/"):
    split_list = {}
    for split in ("train", "test"):
        name = f"{split}_32x32.mat"
        split_list[split] = [address + name, name, md5(Path(data_dir, name))]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)


def assert_is_svhn(data_dir, made):
    """Images come last dimension first; the label 10 of the file is the digit 0."""
    read = {
        "train": data.load_train(SVHN, data_dir, 0)[0],
        "test": data.load_test(SVHN, data_dir),
    }
    for split, (images, labels) in read.items():
        stored, digits = made[split]
        assert np.array_equal(images, stored.transpose(3, 0, 1, 2)) and images.dtype == np.uint8
        assert labels.tolist() == [int(digit) % 10 for digit in digits]
        assert labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
        assert labels.dtype == np.int64


def test_svhn(tmp_path, monkeypatch):
    made = write_svhn(tmp_path)
    trust_svhn(tmp_path, monkeypatch)
    assert_is_svhn(str(tmp_path), made)
    _, (held_out, _) = data.load_train(SVHN, str(tmp_path), 3)
    assert np.array_equal(held_out, made["train"][0].transpose(3, 0, 1, 2)[:3])
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-50])
    load_train_refused(SVHN, tmp_path, f"{path}: another checksum (MD5)", "--ignore-checksum")
    load_train_refused(with_any_checksum(SVHN), tmp_path, f"{path}: ")
    data.load_test(SVHN, str(tmp_path))
    wrong = {"X": made["train"][0][..., 1:], "y": made["train"][1]}
    scipy.io.savemat(path, wrong)
    load_train_refused(with_any_checksum(SVHN), tmp_path, "are not those of SVHN")
    path.unlink()
    wanted = "svhn is not there, or broken; put train_32x32.mat and test_32x32.mat there"
    load_train_refused(SVHN, tmp_path, wanted)


# ------------------------------------------------------------------------------------ Fashion-MNIST


def idx(array):
    """An idx file: 0, 0, 8 (bytes), number of dimensions, sizes, content."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_fashion(folder, zipped=True, n_train=40, n_test=15):
    """Returns {"train" or "t10k": (images (n, 28, 28), labels (n,))}."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (stem, n) in enumerate((("train", n_train), ("t10k", n_test))):
        images = noise(n, 28, 28, seed=seed)
        labels = np.random.default_rng(seed).integers(0, 10, n).astype(np.uint8)
        contents = {
            f"{stem}-images-idx3-ubyte": idx(images),
            f"{stem}-labels-idx1-ubyte": idx(labels),
        }
        for name, content in contents.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
        made[stem] = images, labels
    return made


def assert_is_fashion(data_dir, made):
    (train, train_labels), (held_out, held_out_labels) = data.load_train(FASHION, data_dir, 9)
    test, test_labels = data.load_test(FASHION, data_dir)
    assert train.dtype == np.uint8 and train_labels.dtype == np.int64 and train.flags.writeable
    assert len(held_out) == 9
    images, labels = made["train"]
    assert np.array_equal(np.concatenate([held_out, train])[..., 0], images)
    assert np.array_equal(np.concatenate([held_out_labels, train_labels]), labels)
    images, labels = made["t10k"]
    assert np.array_equal(test[..., 0], images) and np.array_equal(test_labels, labels)


@pytest.mark.parametrize("folder", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(folder, zipped, tmp_path):
    made = write_fashion(tmp_path / folder, zipped)
    assert_is_fashion(str(tmp_path), made)


def test_fashion_mnist_prefers_the_folder_named_and_the_file_that_is_unzipped(tmp_path):
    write_fashion(tmp_path / "FashionMNIST" / "raw", zipped=False, n_train=5, n_test=5)
    write_fashion(tmp_path, zipped=True, n_train=6, n_test=6)
    assert len(data.load_test(FASHION, str(tmp_path))[0]) == 6
    made = write_fashion(tmp_path, zipped=False)
    assert_is_fashion(str(tmp_path), made)


@pytest.mark.skipif(
    not REAL_FASHION.exists(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist():
    (images, labels), _ = data.load_train(FASHION, str(REAL_FASHION), 0)
    test_images, test_labels = data.load_test(FASHION, str(REAL_FASHION))
    assert images.shape == (60_000, 28, 28, 1) and test_images.shape == (10_000, 28, 28, 1)
    assert labels[:5].tolist() == [9, 0, 0, 3, 0] and test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert np.bincount(labels).tolist() == [6000] * 10
    assert np.bincount(test_labels).tolist() == [1000] * 10
    levels = np.arange(256) / 255
    shares = np.bincount(images.ravel(), minlength=256) / images.size
    mean = (shares * levels).sum()
    std = (shares * (levels - mean) ** 2).sum() ** 0.5
    assert abs(mean - FASHION.mean[0]) < 1e-3 and abs(std - FASHION.std[0]) < 1e-3


def in_gzip(change):
    """A change of what is in a gzip file."""
    return lambda content: gzip.compress(change(gzip.decompress(content)))


def flip(place):
    def flip_byte(content):
        content = bytearray(content)
        content[place] ^= 255
        return bytes(content)

    return flip_byte


def replace_head(head):
    """Write other bytes over the first ones."""
    return in_gzip(lambda content: head + content[len(head) :])


def huge_sizes(content):
    """Sizes whose product is 2^64, and no content."""
    return content[:4] + b"\x80\0\0\0" * 2 + b"\0\0\0\4"


IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"
NO_IDX = "truncated, broken, or not an idx file of bytes in"
BROKEN_IDX = {
    "truncated": (IMAGES, lambda content: content[:-100], NO_IDX),
    "truncated in its trailer": (IMAGES, lambda content: content[:-4], NO_IDX),
    "flipped": (IMAGES, flip(-5), "CRC check failed"),
    "flipped inside": (LABELS, flip(12), NO_IDX),
    "no gzip": (IMAGES, lambda content: b"hello", "Not a gzipped file"),
    "empty": (IMAGES, lambda content: b"", NO_IDX),
    "wrong magic": (IMAGES, replace_head(b"\1"), NO_IDX),
    "integers": (IMAGES, replace_head(b"\0\0\x0c"), NO_IDX),
    "one dimension too few": (IMAGES, replace_head(b"\0\0\x08\2"), NO_IDX),
    "labels as images": (LABELS, replace_head(b"\0\0\x08\3"), NO_IDX),
    "cut in its head": (IMAGES, in_gzip(lambda content: content[:10]), NO_IDX),
    "cut in its content": (IMAGES, in_gzip(lambda content: content[:-1]), NO_IDX),
    "a byte too many": (LABELS, in_gzip(lambda content: content + b"\0"), f"{NO_IDX} 1"),
    "sizes whose product wraps around": (IMAGES, in_gzip(huge_sizes), NO_IDX),
    "nothing in it": (
        IMAGES,
        in_gzip(lambda content: content[:4] + bytes(4) + content[8:16]),
        NO_IDX,
    ),
    "one label less": (
        LABELS,
        in_gzip(lambda content: content[:7] + b"\x27" + content[8:-1]),
        "images (40, 28, 28) and labels (39,)",
    ),
    "label 11": (
        LABELS,
        in_gzip(lambda content: content[:-1] + b"\x0b"),
        "are not those of Fashion-MNIST",
    ),
    "14 x 56 pixels": (
        IMAGES,
        in_gzip(lambda content: content[:8] + b"\0\0\0\x0e\0\0\0\x38" + content[16:]),
        "(40, 14, 56)",
    ),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_broken_fashion_mnist(case, tmp_path):
    name, change, words = BROKEN_IDX[case]
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    load_train_refused(FASHION, tmp_path, str(tmp_path), words)
    assert len(data.load_test(FASHION, str(tmp_path))[1]) == 15  # the other files are well


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A file of 10 MB of zeros is given up after 1 MB, where that is the limit."""
    write_fashion(tmp_path)
    (tmp_path / IMAGES).write_bytes(gzip.compress(idx(noise(1, 28, 28)) + bytes(10 << 20)))
    monkeypatch.setattr(datasets, "MAX_IDX_BYTES", 1 << 20)
    sizes = []
    read = gzip.GzipFile.read

    def spy(file, size=-1):
        content = read(file, size)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(gzip.GzipFile, "read", spy)
    load_train_refused(FASHION, tmp_path, IMAGES, NO_IDX)
    assert sizes == [1 << 20]


def test_fashion_mnist_without_a_file(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / LABELS).unlink()
    words = ["fashion-mnist is not there", "train-images-idx3-ubyte.gz", "--download"]
    load_train_refused(FASHION, tmp_path, *words)


# ------------------------------------------------------------------------------------ Tiny ImageNet

WNIDS = [f"n{7 * number:08d}" for number in range(200)]


@pytest.fixture(scope="module")
def tiny_made(tmp_path_factory):
    """Three training images and one validation image per class; every tenth class is grey."""
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    rows = []
    for number, wnid in enumerate(WNIDS):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            mode = "L" if number % 10 == 0 else "RGB"
            write_jpeg(images / f"{wnid}_{i}.JPEG", 3 * number + i, mode=mode)
        write_jpeg(root / "val" / "images" / f"val_{number}.JPEG", 1000 + number)
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))
    return root


@pytest.fixture
def tiny(tiny_made, tmp_path):
    """A folder of its own, without a decoded copy."""
    return shutil.copytree(tiny_made, tmp_path / "data" / "tiny-imagenet-200")


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB")).tobytes()


def load_tiny(root):
    """The training images and labels, and the two of them that are held out."""
    return data.load_train(TINY, str(root.parent), 50)


def test_tiny_imagenet(tiny):
    """Every image is read under its label, held-out ones first."""
    (train, train_labels), (held_out, held_out_labels) = load_tiny(tiny)
    images = np.concatenate([held_out, train])
    labels = np.concatenate([held_out_labels, train_labels])
    assert images.shape == (600, 64, 64, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    label_of = {}
    for label, wnid in enumerate(WNIDS):
        for path in (tiny / "train" / wnid / "images").iterdir():
            label_of[pixels_of(path)] = label
    assert len(label_of) == 600
    assert [label_of[image.tobytes()] for image in images] == labels.tolist()
    grey = images[labels % 10 == 0]
    assert np.array_equal(grey[..., 0], grey[..., 2])

    test, test_labels = data.load_test(TINY, str(tiny.parent))
    assert test.shape == (200, 64, 64, 3)
    label_of = {pixels_of(tiny / f"val/images/val_{n}.JPEG"): n for n in range(200)}
    assert [label_of[image.tobytes()] for image in test] == test_labels.tolist()
    assert sorted(test_labels) == list(range(200))


def decoded_in(cache):
    return sorted(cache.glob("images-*.npy"))


def test_tiny_imagenet_is_decoded_once_and_mapped_from_then_on(tiny, tmp_path, cache, monkeypatch):
    before = sorted(tiny.rglob("*"))
    (train, labels), _ = load_tiny(tiny)
    assert isinstance(train, np.memmap) and train.filename == str(decoded_in(cache)[0])
    data.load_test(TINY, str(tiny.parent))
    decoded = decoded_in(cache)
    assert len(decoded) == 2 and sorted(tiny.rglob("*")) == before  # nothing is written there
    times = [path.stat().st_mtime_ns for path in decoded]
    monkeypatch.setattr(image_files.ImageFiles, "__getitem__", None)  # nothing is decoded again
    (again, labels_again), _ = load_tiny(tiny)
    assert np.array_equal(again, train) and np.array_equal(labels_again, labels)
    data.load_test(TINY, str(tiny.parent))
    assert [path.stat().st_mtime_ns for path in decoded] == times
    again[0] = 0  # written to memory only
    assert np.array_equal(load_tiny(tiny)[0][0], train)

    monkeypatch.undo()
    moved = shutil.move(tiny, tmp_path / "elsewhere" / "deeper" / "tiny-imagenet-200")
    (there, labels_there), _ = load_tiny(moved)
    assert np.array_equal(there, train) and np.array_equal(labels_there, labels)


def test_the_first_images_of_tiny_imagenet_are_of_all_classes_in_one_order(tiny_made):
    """Any first n may be held out; the order depends on no folder listing and no root."""
    _, labels = TINY.read(str(tiny_made.parent), True)
    assert len(set(labels[:100].tolist())) > 60
    names = [f"train/{w}/images/{w}_{i}.JPEG" for w in reversed(WNIDS) for i in range(3)]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert labels.tolist() == [WNIDS.index(name.split("/")[1]) for name in expected]


def test_the_ranks_of_a_node_decode_tiny_imagenet_once(tiny, tmp_path, cache, monkeypatch):
    decode = image_folders._write_decoded
    log = tmp_path / "log"

    def slow_and_logged(*args):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.3)
        decode(*args)

    monkeypatch.setattr(image_folders, "_write_decoded", slow_and_logged)
    codes = in_children(4, lambda: data.load_test(TINY, str(tiny.parent))[0][:].sum())
    assert codes == [0, 0, 0, 0]
    assert log.read_text() == "x"


def damage_tiny(root, damage):
    annotations = root / "val" / "val_annotations.txt"
    image = root / "val" / "images" / "val_3.JPEG"
    if damage == "199 classes":
        shutil.rmtree(root / "train" / WNIDS[5])
    elif damage == "a class without images":
        shutil.rmtree(root / "train" / WNIDS[5] / "images")
    elif damage == "no annotations":
        annotations.unlink()
    elif damage == "another annotation":
        annotations.write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    elif damage == "half an annotation":
        annotations.write_text("val_0.JPEG\n")
    elif damage == "empty annotations":
        annotations.write_text("")
    elif damage == "no image":
        image.unlink()
    elif damage == "another size":
        write_jpeg(image, 0, (64, 63))
    elif damage == "unreadable":
        image.write_bytes(b"\xff\xd8\xff hello")
    elif damage == "truncated":
        image.write_bytes(image.read_bytes()[:-200])
    else:
        shutil.rmtree(root)


NO_TINY = "tiny-imagenet is not there, or broken; put tiny-imagenet-200/"
DAMAGED_TINY = {
    "199 classes": ["train: 199 class folders, expected 200"],
    "a class without images": [WNIDS[5], "a class folder without images"],
    "no annotations": [NO_TINY, "--download"],
    "another annotation": ["val_annotations.txt: ", "not the published annotations", "n99999999"],
    "half an annotation": ["val_annotations.txt: ", "not the published annotations"],
    "empty annotations": ["val_annotations.txt: empty"],
    "no image": ["val_3.JPEG: no such file, expected an image"],
    "another size": ["val_3.JPEG: 64 x 63 pixels, expected 64 x 64"],
    "unreadable": ["val_3.JPEG: ", "cannot identify image file"],
    "truncated": ["val_3.JPEG: ", "truncated"],
    "nothing": [NO_TINY, "--download"],
}


@pytest.mark.parametrize("damage", DAMAGED_TINY)
def test_broken_tiny_imagenet(damage, tiny, cache):
    damage_tiny(tiny, damage)
    load = load_train_refused if damage == "a class without images" else load_test_refused
    load(TINY, tiny.parent, *DAMAGED_TINY[damage])
    assert not decoded_in(cache), "half a copy was left"


@pytest.mark.parametrize("size", [0, 50, 128, 200 * 64 * 64 * 3])
def test_a_truncated_decoded_copy(size, tiny, cache):
    data.load_test(TINY, str(tiny.parent))
    (path,) = decoded_in(cache)
    os.truncate(path, size)
    load_test_refused(TINY, tiny.parent, f"{path}: truncated, broken, or not an .npy array")


def test_images_that_have_changed_are_decoded_anew(tiny, cache):
    images, labels = data.load_test(TINY, str(tiny.parent))
    row = labels.tolist().index(3)
    path = tiny / "val" / "images" / "val_3.JPEG"
    time_before = path.stat().st_mtime_ns
    write_jpeg(path, 5000)
    os.utime(path, ns=(time_before, time_before + 1))
    changed, _ = data.load_test(TINY, str(tiny.parent))
    assert changed[row].tobytes() == pixels_of(path) != images[row].tobytes()
    others = np.arange(200) != row
    assert np.array_equal(changed[others], images[others])


def test_all_broken_images_are_named_at_once(tiny, cache):
    """Not one at each start."""
    names = [f"val_{number}.JPEG" for number in (3, 50, 51, 120, 199)]
    for name in names:
        (tiny / "val" / "images" / name).write_bytes(b"hello")
    with pytest.raises(UserError) as info:
        data.load_test(TINY, str(tiny.parent))
    message = str(info.value)
    assert sum(f"{name}: cannot identify" in message for name in names) == 3
    assert message.endswith("; and 2 more") and "\n" not in message


def test_a_cache_in_a_read_only_place(tiny, cache, monkeypatch, capsys):
    """One line and status 2, except where the copy was decoded before, which is all that is needed.

    Simulated, as root may write anywhere.
    """
    data.load_train(TINY, str(tiny.parent), 1)
    next(cache.glob("*.lock")).unlink()

    def read_only(path, mode="r", **kwargs):
        if mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return open(path, mode, **kwargs)

    monkeypatch.setattr(data, "open", read_only, raising=False)
    monkeypatch.setattr(files, "open", read_only, raising=False)
    assert len(data.load_train(TINY, str(tiny.parent), 1)[0][0]) == 599
    monkeypatch.setattr("sys.argv", ["train_at.py"])
    with pytest.raises(SystemExit) as info:
        cli.run_script(lambda args: data.load_test(TINY, str(tiny.parent)), None)
    printed = capsys.readouterr().err
    assert info.value.code == 2 and printed.count("\n") == 1
    assert "Read-only file system; XDG_CACHE_HOME names another place" in printed


# ----------------------------------------------------------------------------------------- ImageNet

FOLDERS = files.read_text(datasets.IMAGENET_CLASSES).split()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """1,000 class folders with one image each; every hundredth has two to train, CMYK and grey."""
    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for number, wnid in enumerate(FOLDERS):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            size = (30 + number % 37, 30 + number % 53)
            if split == "train" and number % 100 == 0:
                write_jpeg(folder / f"{wnid}_a.JPEG", number, size, "CMYK")
                write_jpeg(folder / f"{wnid}_b.JPEG", number, size, "L")
            else:
                write_jpeg(folder / f"{wnid}_a.JPEG", number, size, "RGB")
    return root


def linked(imagenet, root, split="train", leave_out=()):
    """A folder of ImageNet whose class folders are links, without some of them."""
    (root / split).mkdir(parents=True)
    for wnid in FOLDERS:
        if wnid not in leave_out:
            (root / split / wnid).symlink_to(imagenet / split / wnid)
    return root


def usual_view(path):
    """torchvision's usual test view of one file."""
    image = functional.resize(Image.open(path).convert("RGB"), 256)
    return np.asarray(functional.center_crop(image, 224))


def test_imagenet(imagenet):
    (train, train_labels), (held_out, held_out_labels) = data.load_train(
        IMAGENET, str(imagenet), 64
    )
    test, test_labels = data.load_test(IMAGENET, str(imagenet))
    assert (len(train), len(held_out), len(test)) == (946, 64, 1000)
    assert train_labels.dtype == held_out_labels.dtype == test_labels.dtype == np.int64
    assert len(set(held_out_labels.tolist())) > 55  # the order by hash has mixed the classes
    counts = np.bincount(np.concatenate([train_labels, held_out_labels]))
    assert counts.tolist() == [2 if number % 100 == 0 else 1 for number in range(1000)]
    parts = ((train, train_labels), (held_out, held_out_labels), (test, test_labels))
    for images, labels in parts:
        folders = [Path(path).parent.name for path in images.paths]
        assert [FOLDERS[label] for label in labels] == folders
    names = [f"{w}/{path.name}" for w in FOLDERS for path in (imagenet / "train" / w).iterdir()]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    paths = held_out.paths + train.paths
    assert [os.path.relpath(path, imagenet / "train") for path in paths] == expected


def test_image_files_are_an_array_of_test_views(imagenet, tmp_path):
    images, _ = data.load_train(IMAGENET, str(imagenet), 64)[0]
    views = np.stack([usual_view(path) for path in images.paths[:12]])
    assert views.shape == (12, 224, 224, 3)
    assert np.array_equal(images[:12], views)
    assert np.array_equal(images[3:9:2], views[3:9:2])
    assert np.array_equal(images[[5, 1, 5]], views[[5, 1, 5]])
    assert np.array_equal(images[np.array([7])], views[7:8])
    assert np.array_equal(images.part(slice(2, 8))[1:3], views[3:5])
    assert np.array_equal(images.part([9, 4])[:], views[[9, 4]])
    assert images[:0].shape == (0, 224, 224, 3) and len(images.part(slice(2, 8))) == 6
    for mode in ("CMYK", "L"):
        paths = [path for path in images.paths if Image.open(path).mode == mode]
        assert len(paths) >= 5
        views = [usual_view(path) for path in paths[:2]]
        assert np.array_equal(image_files.ImageFiles(paths, 256, 224)[:2], views)
    path = tmp_path / "x.JPEG"
    for size in ((500, 375), (375, 500), (300, 100), (16, 16)):  # shrunk, turned, flat, enlarged
        write_jpeg(path, 3, size)
        assert np.array_equal(
            image_files.ImageFiles([str(path)], 256, 224)[[0]][0], usual_view(path)
        )


@pytest.mark.parametrize("damage", ["truncated", "text", "nothing"])
def test_a_broken_jpeg_is_named(damage, imagenet, tmp_path):
    root = linked(imagenet, tmp_path, leave_out=[FOLDERS[7]])
    path = root / "train" / FOLDERS[7] / "bad.JPEG"
    path.parent.mkdir()
    write_jpeg(path, 0)
    whole = path.read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "text": b"hello", "nothing": b""}
    path.write_bytes(contents[damage])
    (images, labels), _ = data.load_train(IMAGENET, str(root), 1)
    row = labels.tolist().index(7)
    words = "truncated" if damage == "truncated" else "cannot identify image file"
    refused(lambda: images[row - 2 : row + 2], f"{FOLDERS[7]}/bad.JPEG: ", words)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's
def test_broken_jpegs_end_in_one_line_whatever_pillow_raises(tmp_path):
    """Flipped bytes, in the formats that may hide behind a .JPEG: an image or a UserError."""
    rng = np.random.default_rng(0)
    n_images = 0
    n_errors = 0
    path = tmp_path / "x.JPEG"
    for form in ("JPEG", "PNG", "GIF", "TIFF", "PPM", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(noise(20, 20, 3)).save(file, form)
        for number in range(80):
            content = bytearray(file.getvalue())
            end = min(len(content), 200) if number % 2 else len(content)
            for place in rng.integers(0, end, 2):
                content[place] = rng.integers(256)
            path.write_bytes(content)
            try:
                assert image_files.ImageFiles([str(path)], None, 20).open(0).mode == "RGB"
                n_images += 1
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                n_errors += 1
    assert min(n_images, n_errors) > 50


def test_imagenet_that_is_not_there(imagenet, tmp_path):
    remedy = "put train/ and val/ with one folder of JPEGs per class (ILSVRC-2012) there"
    missing = f"imagenet is not there, or broken; {remedy}"
    load_train_refused(IMAGENET, tmp_path / "none", f"--data-dir {tmp_path / 'none'}", missing)
    root = linked(imagenet, tmp_path / "no-val")
    load_test_refused(IMAGENET, root, missing)
    (root / "val").mkdir()
    write_jpeg(root / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    load_test_refused(IMAGENET, root, "no-val/val: no class folders")
    root = linked(imagenet, tmp_path / "few", leave_out=[FOLDERS[3]])
    load_train_refused(IMAGENET, root, f"{root}/train: lacks {FOLDERS[3]}; expected 1000 class")
    (root / "train" / FOLDERS[3]).mkdir()
    load_train_refused(IMAGENET, root, f"{FOLDERS[3]}: a class folder without images")
    words = ["--val-size 1010", "1010 training images"]
    refused(lambda: data.load_train(IMAGENET, str(imagenet), 1010), *words)


# ----------------------------------------------------------------- the worker processes of ImageNet

SMALL_CROPS = dataclasses.replace(IMAGENET, image_size=32)  # quick


class MadeSet:
    """Twelve synthetic images of 256 pixels, with what Batches calls of a SyntheticSet."""

    images = noise(12, 256, 256, 3, seed=9)
    labels = np.arange(12) * 80

    def draw(self, n, generator):
        return torch.randint(len(self.images), (n,), generator=generator)

    def gather(self, rows):
        return self.images[rows], self.labels[rows]


@pytest.fixture
def file_batches(imagenet):
    (files_of_train, labels), _ = data.load_train(IMAGENET, str(imagenet), 64)

    def make(workers, rank=0, world_size=1, with_synthetic=True, images=files_of_train):
        return image_files.FileBatches(
            SMALL_CROPS,
            (images, labels),
            batch_size=6,
            seed=4,
            device="cpu",
            rank=rank,
            world_size=world_size,
            synthetic=MadeSet() if with_synthetic else None,
            synthetic_fraction=0.5,
            workers=workers,
        )

    return make


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def test_worker_batches_depend_on_neither_workers_ranks_nor_restarts(file_batches):
    state = torch.get_rng_state()
    alone = file_batches(0)
    whole = [alone(step) for step in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    x, y = whole[0]
    assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert 0 <= x.min() < x.max() <= 1
    assert len({x.flatten().numpy().tobytes() for batch in whole for x in batch[0]}) == 24
    for workers in (1, 2):
        batches = file_batches(workers)
        for step in range(4):
            assert_same(batches(step), whole[step])
        assert torch.equal(torch.get_rng_state(), state)
    for workers in (0, 1):
        first = file_batches(workers, rank=0, world_size=2)
        second = file_batches(workers, rank=1, world_size=2)
        for step in range(2):
            for parts, together in zip(zip(first(step), second(step)), whole[step]):
                assert torch.equal(torch.stack(parts, 1).flatten(0, 1), together)
    for workers in (0, 2):
        resumed = file_batches(workers)
        assert_same(resumed(2), whole[2])
        assert_same(resumed(3), whole[3])
    real = file_batches(0, with_synthetic=False)
    real_by_worker = file_batches(1, with_synthetic=False)
    assert_same(real(0), real_by_worker(0))


class PlainCrops(image_files._Crops):
    """Images resized, and nothing else."""

    def __init__(self, *args):
        super().__init__(*args)
        self.transform = v2.Compose([v2.PILToTensor(), v2.Resize((32, 32))])


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_batches_hold_the_images_of_their_rows(workers, file_batches, monkeypatch):
    """Without augmentation: the real images of the permutation, then those drawn of the others."""
    monkeypatch.setattr(image_files, "_Crops", PlainCrops)
    batches = file_batches(workers)
    known_rows = []
    for step in range(3):
        x, y = batches(step)
        rows, drawn = file_batches(0).my_rows(step)
        assert len(rows) == len(drawn) == 3
        images, labels = batches.synthetic.gather(drawn.numpy())
        opened = [batches.images.open(row) for row in rows.tolist()]
        opened += [Image.fromarray(image) for image in images]
        for crop, image in zip(x, opened, strict=True):
            resized = v2.functional.resize(v2.functional.pil_to_tensor(image), [32, 32])
            assert torch.equal((crop * 255).round().to(torch.uint8), resized)
        assert y.tolist() == batches.labels[rows].tolist() + labels.tolist()
        known_rows += rows.tolist()
    assert len(set(known_rows)) == 9  # none twice in a pass


def test_augmentation_of_files_is_a_function_of_its_key(file_batches):
    """Crop, mirror, RandAugment and erasing differ from step to step and from place to place."""
    batches = file_batches(0)
    parts = (batches.images, batches.labels, batches.synthetic, SMALL_CROPS)
    crops = image_files._Crops(*parts, 4)
    keys = [(step, place, 5, True) for step in range(3) for place in range(3)]
    views = [crops[key] for key in keys]
    assert len({view.numpy().tobytes() for view, _ in views}) == 9
    assert {label.item() for _, label in views} == {batches.labels[5].item()}
    for key, (view, _) in zip(reversed(keys), reversed(views)):
        assert torch.equal(crops[key][0], view)
    other_seed = image_files._Crops(*parts, 5)
    assert not torch.equal(other_seed[keys[0]][0], views[0][0])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_unreadable_image_in_a_worker_is_one_line(workers, file_batches, tmp_path):
    path = tmp_path / "bad.JPEG"
    write_jpeg(path, 0)
    path.write_bytes(path.read_bytes()[:300])
    broken = image_files.ImageFiles([str(path)] * 946, 256, 224)
    batches = file_batches(workers, images=broken, with_synthetic=False)
    with pytest.raises(UserError) as info:
        batches(0)
    message = str(info.value)  # with nothing of the worker's traceback
    assert message.startswith(f"{path}: ") and "\n" not in message
    if workers:
        # The traceback holds the loader; left to a garbage collection, each worker takes 5 s.
        batches.loader._shutdown_workers()


def test_workers_use_no_shared_memory(file_batches, monkeypatch):
    """/dev/shm is 64 MB in a container of docker's."""

    def full(*args, **kwargs):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    expected = file_batches(0)(3)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    for one, other in zip(file_batches(2)(3), expected):
        assert torch.equal(one, other)


def test_a_worker_that_dies_is_one_line(file_batches):
    batches = file_batches(1)
    batches(0)
    (worker,) = batches.loader._workers
    os.kill(worker.pid, signal.SIGKILL)

    def all_that_was_made_before():
        for step in range(1, 10):
            batches(step)

    words = ["--workers 1: a worker process died, mostly for want of memory; 0 does without them"]
    refused(all_that_was_made_before, *words)


def test_workers_end_with_their_batches(file_batches):
    """As soon as nothing holds the batches: the garbage collector would take 5 s for each."""
    batches = file_batches(2)
    batches(0)
    first = batches.loader._workers
    batches(7)  # a jump: others take over
    second = batches.loader._workers
    gc.disable()
    try:
        assert [worker.exitcode for worker in first + second] == [0, 0, None, None]
        del batches
        assert [worker.exitcode for worker in second] == [0, 0]
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, its address on a local web server, and the paths that were asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path.endswith("nonsense"):
                self.wfile.write(b"nonsense\r\n")
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # torchvision hangs up once it knows where an address leads to

    web = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{web.server_address[1]}/", asked
    web.shutdown()
    web.server_close()


def download_refused(spec, data_dir, *words):
    refused(
        lambda: datasets.prepare_dataset(spec, str(data_dir), True),
        f"--download: {spec.name}",
        *words,
    )


@both_cifars
def test_cifar_is_downloaded_checked_and_read(spec, server, tmp_path, monkeypatch):
    served, address, asked = server
    layout = CIFARS[spec.name]
    filename = layout.dataset.filename
    made = write_cifar(spec, tmp_path / "made")
    trust_cifar(spec, tmp_path / "made", monkeypatch)
    with tarfile.open(served / filename, "w:gz") as archive:
        archive.add(tmp_path / "made" / layout.folder, layout.folder)
    monkeypatch.setattr(layout.dataset, "url", address + filename)
    datasets.prepare_dataset(spec, str(tmp_path / "data"), False)
    assert not (tmp_path / "data").exists() and asked == []

    download_refused(spec, tmp_path / "wrong", str(tmp_path / "wrong"), "corrupted")
    # An archive with another MD5 is not even unpacked.
    assert not (tmp_path / "wrong" / layout.folder).exists()
    monkeypatch.setattr(layout.dataset, "tgz_md5", md5(served / filename))
    datasets.prepare_dataset(spec, str(tmp_path / "data"), True)
    assert_is_cifar(spec, str(tmp_path / "data"), made)
    n_asked = len(asked)
    datasets.prepare_dataset(spec, str(tmp_path / "data"), True)  # it is there
    assert len(asked) == n_asked > 0


def test_svhn_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, address, _ = server
    made = write_svhn(served)
    trust_svhn(served, monkeypatch, address)
    datasets.prepare_dataset(SVHN, str(tmp_path / "data"), True)
    assert_is_svhn(str(tmp_path / "data"), made)
    (served / "test_32x32.mat").write_bytes(b"other")
    download_refused(SVHN, tmp_path / "wrong", "corrupted")


def test_fashion_mnist_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, address, _ = server
    made = write_fashion(served)
    dataset = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(dataset, "mirrors", [address])
    download_refused(FASHION, tmp_path / "wrong", "corrupted")
    resources = [(name, md5(served / name)) for name, _ in dataset.resources]
    monkeypatch.setattr(dataset, "resources", resources)
    datasets.prepare_dataset(FASHION, str(tmp_path / "data"), True)
    assert_is_fashion(str(tmp_path / "data"), made)
    for size in (0, 2, 4, 300):  # unpacking was interrupted
        os.truncate(tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte", size)
        download_refused(FASHION, tmp_path / "data")


def test_tiny_imagenet_is_downloaded_checked_and_read(server, tiny_made, tmp_path, monkeypatch):
    """torchvision's own function fetches and unpacks, from where it is led."""
    served, address, _ = server
    with zipfile.ZipFile(served / "tiny-imagenet-200.zip", "w") as archive:
        for path in tiny_made.rglob("*"):
            archive.write(path, path.relative_to(tiny_made.parent))
    utils = torchvision.datasets.utils
    fetch = utils.download_and_extract_archive
    calls = []
    sums = ["0" * 32, md5(served / "tiny-imagenet-200.zip")]  # a wrong one, then the right one

    def redirected(url, root, md5):
        true_md5 = sums[len(calls)]
        calls.append((url, md5))
        fetch(address + os.path.basename(url), root, md5=true_md5)

    monkeypatch.setattr(utils, "download_and_extract_archive", redirected)
    download_refused(TINY, tmp_path / "data", "corrupted")
    datasets.prepare_dataset(TINY, str(tmp_path / "data"), True)
    published = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert calls == [(published, "90528d7ca1a48142e341f4ef8d21d0de")] * 2
    assert len(data.load_train(TINY, str(tmp_path / "data"), 100)[0][0]) == 500


BAD_URLS = {
    "no server": "http://127.0.0.1:9/x.tar.gz",
    "no file": "{}missing.tar.gz",
    "no HTTP": "{}nonsense",
}


@pytest.mark.parametrize("case", BAD_URLS)
def test_a_server_that_does_not_serve(case, server, tmp_path, monkeypatch):
    _, address, _ = server
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", BAD_URLS[case].format(address))
    download_refused(CIFAR10, tmp_path, f"could not be fetched into {tmp_path}")


def test_what_cannot_be_downloaded(tmp_path):
    words = ["--download: imagenet cannot be fetched; put train/ and val/", "--data-dir"]
    download_refused(IMAGENET, tmp_path, *words)
    download_refused(DATASETS["digits"], tmp_path)

    def silent(data_dir):
        raise TimeoutError

    spec = dataclasses.replace(CIFAR10, download=silent)
    download_refused(spec, tmp_path, "(TimeoutError)")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- rotation


def torchvision_rotated(images, angles):
    turned = []
    for image, angle in zip(images, angles.tolist()):
        turned.append(functional.rotate(image.permute(2, 0, 1), angle).permute(1, 2, 0))
    return torch.stack(turned)


def test_rotation_is_torchvisions():
    """Nearest pixel, about the centre, counter-clockwise, zeros outside.

    A place in the middle between pixels may be rounded either way.
    """
    images = torch.from_numpy(noise(60, 32, 32, 3)) | 1  # no pixel is 0, which is what lies outside
    for largest in (15, 180):
        angles = torch.linspace(-largest, largest, 60)
        expected = torchvision_rotated(images, angles)
        same = (data.rotate(images, angles) == expected).all(-1).float()
        assert same.mean() > 0.995 and same.flatten(1).mean(1).min() > 0.95
    assert (expected == 0).float().mean() > 0.05  # some lie outside


def test_rotation_has_the_right_sign_and_zero_changes_nothing():
    image = torch.zeros(1, 9, 9, 1, dtype=torch.uint8)
    image[0, 4, 7] = 200  # right of the centre
    turned = data.rotate(image, torch.tensor([90.0]))
    assert turned[0, 1, 4] == 200 and turned.sum() == 200  # above it: counter-clockwise
    assert torch.equal(turned[0, :, :, 0], torch.rot90(image[0, :, :, 0]))
    for size in (8, 9):  # with and without a pixel in the middle
        images = torch.from_numpy(noise(5, size, size, 3))
        quarter = torch.rot90(images, 1, (1, 2))
        assert torch.equal(data.rotate(images, torch.zeros(5)), images)
        assert torch.equal(data.rotate(images, torch.full((5,), 90.0)), quarter)
        assert torch.equal(data.rotate(images, torch.full((5,), 180.0)), images.flip(1, 2))


def test_augmentation_with_rotation_is_crop_mirror_and_turn_of_each_image():
    """CIFAR-100's, drawn once more and done image by image by torchvision."""
    images = torch.from_numpy(noise(80, 32, 32, 3))
    augmented = data.augment(images, CIFAR100, torch.Generator().manual_seed(7), 80, slice(None))
    generator = torch.Generator().manual_seed(7)
    corners = torch.randint(0, 9, (2, 80), generator=generator)
    mirrored = torch.randint(0, 2, (80,), generator=generator).bool()
    angles = (2 * torch.rand(80, generator=generator) - 1) * 15
    crops = []
    for image, top, left, mirror in zip(images, *corners.tolist(), mirrored):
        padded = functional.pad(image.permute(2, 0, 1), 4)
        crop = functional.crop(padded, top, left, 32, 32)
        crops.append((functional.hflip(crop) if mirror else crop).permute(1, 2, 0))
    expected = torchvision_rotated(torch.stack(crops), angles)
    assert (augmented == expected).all(-1).float().mean() > 0.995
    assert angles.min() < -12 and angles.max() > 12 and 20 < mirrored.sum() < 60


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100, FASHION], ids=lambda spec: spec.name)
def test_a_rank_draws_its_part_of_the_whole_batchs_augmentation(spec, world_size):
    images = torch.from_numpy(noise(24, spec.image_size, spec.image_size, spec.channels))
    whole = data.augment(images, spec, torch.Generator().manual_seed(1), 24, slice(None))
    assert not torch.equal(whole, images)
    for rank in range(world_size):
        mine = slice(rank, None, world_size)
        generator = torch.Generator().manual_seed(1)
        assert torch.equal(data.augment(images[mine], spec, generator, 24, mine), whole[mine])


# ------------------------------------------------------------------------------------ MixUp, CutMix


def mix_eight(seed, mixup, cutmix):
    """(x, y, mixed x, mixed y); image i is i + 1 in every pixel, and its label is 3 i mod 10."""
    x = torch.arange(1.0, 9).view(8, 1, 1, 1).expand(8, 3, 16, 20).contiguous()
    y = torch.arange(8) * 3 % 10
    return x, y, *data.mix(x, y, 10, mixup, cutmix, seed)


def weight_of(y, probabilities):
    """The weight of each image's own label; the rest lies on its partner's."""
    own = probabilities.gather(1, y[:, None])[:, 0]
    partner = probabilities.gather(1, y.roll(1)[:, None])[:, 0]
    assert torch.allclose(own + partner, torch.ones(len(y)))
    assert torch.allclose(probabilities.sum(1), torch.ones(len(y)))
    assert probabilities.min() >= 0 and own.std() < 1e-6  # one weight for the batch
    return own[0].item()


def test_mixup_is_its_definition():
    weights = []
    for seed in range(200):
        x, y, mixed, probabilities = mix_eight(seed, 0.2, 0.0)
        weight = weight_of(y, probabilities)
        assert torch.allclose(mixed, weight * x + (1 - weight) * x.roll(1, 0), atol=1e-5)
        weights.append(weight)
    # Beta(0.2, 0.2) has mean 1/2 and standard deviation 0.42.
    assert abs(np.mean(weights) - 0.5) < 4 * 0.42 / 200**0.5
    assert abs(np.std(weights) - 0.42) < 0.06


def test_cutmix_is_its_definition():
    """One rectangle is pasted, the same for all images; the label's weight is its share."""
    weights = []
    for seed in range(200):
        x, y, mixed, probabilities = mix_eight(seed, 0.0, 1.0)
        weight = weight_of(y, probabilities)
        pasted = mixed == x.roll(1, 0)
        assert (pasted | (mixed == x)).all() and (pasted == pasted[:1, :1]).all()
        pasted = pasted[0, 0]
        rows = pasted.any(1)
        columns = pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None])
        for line in (rows, columns):  # without a gap
            assert line.int().diff().abs().sum() <= 2 and line.nonzero().diff(dim=0).eq(1).all()
        assert abs(pasted.float().mean().item() - (1 - weight)) < 1e-6
        weights.append(weight)
    assert min(weights) < 0.3 and max(weights) > 0.9


def test_either_one_is_drawn_where_both_are_on():
    n_mixup = 0
    for seed in range(300):
        x, y, mixed, probabilities = mix_eight(seed, 0.8, 1.0)
        weight_of(y, probabilities)
        is_cutmix = ((mixed == x) | (mixed == x.roll(1, 0))).all()
        n_mixup += not is_cutmix
    assert abs(n_mixup / 300 - 0.5) < 4 * 0.5 / 300**0.5


def test_mixing_is_a_function_of_its_seed_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    seed = data.seed_of(0, "mix", 3)
    first = mix_eight(seed, 0.8, 1.0)
    assert_same(first, mix_eight(seed, 0.8, 1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[3], mix_eight(5, 0.8, 1.0)[3])


def test_labels_of_neighbours_of_one_class_stay_whole():
    x = torch.rand(6, 3, 8, 8)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        _, probabilities = data.mix(x, torch.full((6,), 4), 10, mixup, cutmix, 1)
        assert torch.allclose(probabilities, torch.eye(10)[4].expand(6, 10))


def test_augmentation_of_every_data_set():
    """(padding of the crops, mirroring, degrees of rotation), as docs/recipes.md has them."""
    expected = {
        "cifar10": (4, True, 0),
        "cifar100": (4, True, 15),
        "svhn": (0, False, 0),
        "tiny-imagenet": (4, True, 0),
        "imagenet": (0, True, 0),  # crops of another kind, in image_files.py
        "fashion-mnist": (2, True, 0),
        "digits": (1, False, 0),
    }
    found = {}
    for name, spec in DATASETS.items():
        found[name] = (spec.crop_padding, spec.flip, spec.rotation)
    found.pop("folder", None)
    assert found == expected


def test_augmentation_of_files_is_the_documented_one(file_batches):
    batches = file_batches(0)
    parts = (batches.images, batches.labels, batches.synthetic, SMALL_CROPS)
    mean = [round(255 * value) for value in SMALL_CROPS.mean]
    documented = v2.Compose(
        [
            v2.RandomResizedCrop(SMALL_CROPS.image_size),
            v2.RandomHorizontalFlip(0.5 if SMALL_CROPS.flip else 0.0),
            v2.RandAugment(2, 9),
            v2.PILToTensor(),
            v2.RandomErasing(0.25, value=mean),
        ]
    )
    crops = image_files._Crops(*parts, 4)
    for row in range(8):  # erasing comes to two of them
        view, _ = crops[0, 0, row, True]
        with torch.random.fork_rng():
            torch.manual_seed(data.seed_of(4, "augment", "0/0"))
            expected = documented(batches.images.open(row))
        assert torch.equal(torch.as_tensor(view), expected.permute(1, 2, 0))
