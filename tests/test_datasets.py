"""Every data set from files of its published format; downloads from a local server; augmentation, MixUp, ImageNet's workers.

Alone: python -m pytest -n 0 tests/test_datasets.py
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
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from test_synthetic import Hostile, in_children, write_shards
from torchvision.transforms import functional, v2

from common import cli, data, synthetic

CIFAR10, CIFAR100, SVHN, FASHION, TINY, IMAGENET = (
    data.DATASETS[name] for name in ("cifar10", "cifar100", "svhn", "fashion-mnist", "tiny-imagenet", "imagenet")
)
REAL_FASHION = Path("/usr/share/datasets/fashion-mnist")


def refused(call, *words):
    """call() ends with a UserError of one line that holds all the words."""
    with pytest.raises(cli.UserError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words:
        assert word in message, message


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ----------------------------------------------------------------------------------------------------------- CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, and NumPy under its name of then: CIFAR's files are of 2009."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, text):
        self.write(b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + len(text).to_bytes(4, "little") + text)
        self.memoize(text)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


CIFARS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train"], "test", "meta"),
}


def write_cifar(spec, data_dir, per_file=12):
    """{file name: (planes uint8 (N, 3072), labels)} of the files written."""
    _, folder, train, test, meta = CIFARS[spec.name]
    folder = Path(data_dir, folder)
    folder.mkdir(parents=True)
    made = {}
    for seed, name in enumerate((*train, test)):
        planes, labels = noise(per_file, 3072, seed=seed), np.random.default_rng(seed).integers(0, spec.num_classes, per_file).tolist()
        made[name] = planes, labels
        content = {b"data": planes, b"filenames": [b"x.png"] * per_file, b"batch_label": name.encode()}
        content |= {b"labels": labels} if spec.num_classes == 10 else {b"fine_labels": labels, b"coarse_labels": [0] * per_file}
        (folder / name).write_bytes(python2_pickle(content))
    key = b"label_names" if spec.num_classes == 10 else b"fine_label_names"
    (folder / meta).write_bytes(python2_pickle({key: [b"c%d" % c for c in range(spec.num_classes)]}))
    return made


def trust_cifar(spec, data_dir, monkeypatch):
    """Have torchvision take the files in data_dir for the published ones."""
    name, folder, train, test, meta = CIFARS[spec.name]
    cls = getattr(torchvision.datasets, name)
    sums = {n: md5(Path(data_dir, folder, n)) for n in (*train, test, meta)}
    monkeypatch.setattr(cls, "train_list", [[n, sums[n]] for n in train])
    monkeypatch.setattr(cls, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": sums[meta]})


def assert_is_cifar(spec, data_dir, made):
    """What is read is what was made: planes of red, green and blue, row by row; the first images held out."""
    *train, test = made
    for (images, labels), names in (
        (data.load_test(spec, data_dir), [test]),
        (data.load_train(spec, data_dir, 0)[0], train),
    ):
        planes = np.concatenate([made[name][0] for name in names])
        assert images.shape == (len(planes), 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        for c in range(3):
            for y in (0, 1, 31):
                assert np.array_equal(images[:, y, :, c], planes[:, 1024 * c + 32 * y : 1024 * c + 32 * y + 32])
        assert labels.tolist() == [label for name in names for label in made[name][1]]
    (rest, rest_labels), (held_out, held_out_labels) = data.load_train(spec, data_dir, 7)
    whole, labels = data.load_train(spec, data_dir, 0)[0]
    assert np.array_equal(held_out, whole[:7]) and np.array_equal(rest, whole[7:])
    assert np.array_equal(held_out_labels, labels[:7]) and np.array_equal(rest_labels, labels[7:])


@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100], ids=lambda spec: spec.name)
def test_cifar(spec, tmp_path, monkeypatch):
    made = write_cifar(spec, tmp_path)
    first = (tmp_path / CIFARS[spec.name][1] / CIFARS[spec.name][2][0]).read_bytes()
    assert b"U\x04data" in first and b"cnumpy.core.multiarray\n_reconstruct" in first  # as Python 2 wrote it
    trust_cifar(spec, tmp_path, monkeypatch)
    assert_is_cifar(spec, str(tmp_path), made)
    batches = data.Batches(*data.load_train(spec, str(tmp_path), 4)[0], None, 0, 8, spec, 0, "cpu")
    x, _ = batches(0)
    assert x.shape == (8, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100], ids=lambda spec: spec.name)
@pytest.mark.parametrize("which", [0, -1], ids=["images", "meta"])
def test_cifar_that_is_not_the_published_one_is_not_unpickled(spec, which, tmp_path, monkeypatch):
    """The files are pickles; torchvision's MD5 sums stand between them and this machine."""
    write_cifar(spec, tmp_path)
    _, folder, train, test, meta = CIFARS[spec.name]
    if which:  # all the others are as published
        trust_cifar(spec, tmp_path, monkeypatch)
    path = tmp_path / folder / (*train, test, meta)[which]
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "marker")))
    pickle.loads(path.read_bytes())
    os.rmdir(tmp_path / "marker")  # it was made: the file is hostile indeed
    words = f"--data-dir {tmp_path}: {spec.name} is not there, or broken; put {folder}/", ".tar.gz) there or add --download"
    refused(lambda: data.load_train(spec, str(tmp_path), 1), *words)
    refused(lambda: data.load_test(spec, str(tmp_path)), *words)
    assert not (tmp_path / "marker").exists()


# ------------------------------------------------------------------------------------------------------------ SVHN


def write_svhn(data_dir, n=30):
    made = {}
    for seed, split in enumerate(("train", "test")):
        images, digits = noise(32, 32, 3, n, seed=seed), np.random.default_rng(seed).integers(1, 11, (n, 1)).astype(np.uint8)
        digits[:10, 0] = range(1, 11)
        scipy.io.savemat(Path(data_dir, f"{split}_32x32.mat"), {"X": images, "y": digits})
        made[split] = images, digits[:, 0]
    return made


def trust_svhn(data_dir, monkeypatch, address="http://localhost/"):
    names = {split: f"{split}_32x32.mat" for split in ("train", "test")}
    sums = {split: [address + name, name, md5(Path(data_dir, name))] for split, name in names.items()}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", sums)


def assert_is_svhn(data_dir, made):
    """Images come last dimension first; the label 10 of the file is the digit 0."""
    for split, (images, labels) in (("train", data.load_train(SVHN, data_dir, 0)[0]), ("test", data.load_test(SVHN, data_dir))):
        stored, digits = made[split]
        assert images.shape == (30, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
        assert all(np.array_equal(images[i], stored[..., i]) for i in range(30))
        assert labels.tolist() == [int(digit) % 10 for digit in digits] and labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_svhn(tmp_path, monkeypatch):
    made = write_svhn(tmp_path)
    trust_svhn(tmp_path, monkeypatch)
    assert_is_svhn(str(tmp_path), made)
    (_, _), (held_out, _) = data.load_train(SVHN, str(tmp_path), 3)
    assert np.array_equal(held_out, made["train"][0].transpose(3, 0, 1, 2)[:3])
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-50])
    refused(lambda: data.load_train(SVHN, str(tmp_path), 1), "svhn is not there, or broken; put train_32x32.mat and test_32x32.mat there")
    data.load_test(SVHN, str(tmp_path))


# --------------------------------------------------------------------------------------------------- Fashion-MNIST


def idx(array):
    """An idx file: 0, 0, 8 (bytes), number of dimensions, sizes, content."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_fashion(folder, zipped=True, n_train=40, n_test=15):
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (stem, n) in enumerate((("train", n_train), ("t10k", n_test))):
        made[stem] = noise(n, 28, 28, seed=seed), np.random.default_rng(seed).integers(0, 10, n).astype(np.uint8)
        for array, name in zip(made[stem], (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")):
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return made


def assert_is_fashion(data_dir, made):
    (train, train_labels), (held_out, held_out_labels) = data.load_train(FASHION, data_dir, 9)
    test, test_labels = data.load_test(FASHION, data_dir)
    assert train.dtype == np.uint8 and train_labels.dtype == np.int64 and train.flags.writeable
    assert np.array_equal(np.concatenate([held_out, train])[..., 0], made["train"][0]) and len(held_out) == 9
    assert np.array_equal(np.concatenate([held_out_labels, train_labels]), made["train"][1])
    assert np.array_equal(test[..., 0], made["t10k"][0]) and np.array_equal(test_labels, made["t10k"][1])


@pytest.mark.parametrize("folder", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(folder, zipped, tmp_path):
    made = write_fashion(tmp_path / folder, zipped)
    assert_is_fashion(str(tmp_path), made)


def test_fashion_mnist_prefers_the_folder_named_and_the_file_that_is_unzipped(tmp_path):
    write_fashion(tmp_path / "FashionMNIST" / "raw", False, 5, 5)
    write_fashion(tmp_path, True, 6, 6)
    assert len(data.load_test(FASHION, str(tmp_path))[0]) == 6
    made = write_fashion(tmp_path, False)
    assert_is_fashion(str(tmp_path), made)


@pytest.mark.skipif(not REAL_FASHION.exists(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    (images, labels), _ = data.load_train(FASHION, str(REAL_FASHION), 0)
    test_images, test_labels = data.load_test(FASHION, str(REAL_FASHION))
    assert images.shape == (60_000, 28, 28, 1) and test_images.shape == (10_000, 28, 28, 1)
    assert labels[:5].tolist() == [9, 0, 0, 3, 0] and test_labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert np.bincount(labels).tolist() == [6000] * 10 and np.bincount(test_labels).tolist() == [1000] * 10
    values = np.bincount(images.ravel(), minlength=256)
    mean = (values * np.arange(256)).sum() / values.sum() / 255
    std = ((values * (np.arange(256) / 255 - mean) ** 2).sum() / values.sum()) ** 0.5
    assert abs(mean - FASHION.mean[0]) < 1e-3 and abs(std - FASHION.std[0]) < 1e-3


def gzipped(change):
    return lambda content: gzip.compress(change(gzip.decompress(content)))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
BROKEN_IDX = {
    "truncated": (IMAGES, lambda content: content[:-100], ["truncated or broken"]),
    "truncated in its trailer": (IMAGES, lambda content: content[:-4], ["truncated or broken"]),
    "flipped": (IMAGES, lambda content: content[:-6] + b"xx" + content[-4:], ["truncated or broken"]),
    "flipped inside": (LABELS, lambda content: content[:12] + bytes([content[12] ^ 255]) + content[13:], ["truncated or broken"]),
    "no gzip": (IMAGES, lambda content: b"hello", ["truncated or broken"]),
    "empty": (IMAGES, lambda content: b"", ["not a whole idx file"]),
    "wrong magic": (IMAGES, gzipped(lambda content: b"\1" + content[1:]), ["not a whole idx file of bytes in 3 dimensions"]),
    "integers": (IMAGES, gzipped(lambda content: b"\0\0\x0c" + content[3:]), ["not a whole idx file"]),
    "one dimension too few": (IMAGES, gzipped(lambda content: b"\0\0\x08\2" + content[4:]), ["not a whole idx file"]),
    "cut in its head": (IMAGES, gzipped(lambda content: content[:10]), ["not a whole idx file"]),
    "cut in its content": (IMAGES, gzipped(lambda content: content[:-1]), ["not a whole idx file"]),
    "a byte too many": (LABELS, gzipped(lambda content: content + b"\0"), ["not a whole idx file of bytes in 1 dimensions"]),
    "sizes whose product wraps around": (
        IMAGES,
        gzipped(lambda content: content[:4] + b"\x80\0\0\0" * 2 + b"\0\0\0\4"),
        ["not a whole idx file"],
    ),
    "nothing in it": (IMAGES, gzipped(lambda content: content[:4] + bytes(4) + content[8:16]), ["not a whole idx file"]),
    "one label less": (LABELS, gzipped(lambda content: content[:7] + b"\x27" + content[8:-1]), ["images (40, 28, 28)", "labels (39,)"]),
    "label 11": (LABELS, gzipped(lambda content: content[:-1] + b"\x0b"), ["are not those of Fashion-MNIST"]),
    "14 x 56 pixels": (IMAGES, gzipped(lambda content: content[:8] + bytes([0, 0, 0, 14, 0, 0, 0, 56]) + content[16:]), ["(40, 14, 56)"]),
}


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_broken_fashion_mnist(case, tmp_path):
    name, change, words = BROKEN_IDX[case]
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    refused(lambda: data.load_train(FASHION, str(tmp_path), 1), str(tmp_path), *words)
    assert len(data.load_test(FASHION, str(tmp_path))[1]) == 15  # the other files are well


def test_fashion_mnist_without_a_file(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / LABELS).unlink()
    refused(lambda: data.load_train(FASHION, str(tmp_path), 1), "fashion-mnist is not there", "train-images-idx3-ubyte.gz", "--download")


# --------------------------------------------------------------------------------------------------- Tiny ImageNet

WNIDS = [f"n{7 * number:08d}" for number in range(200)]


def write_jpeg(path, seed, size=(64, 64), mode="RGB"):
    bands = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
    Image.fromarray(noise(size[1], size[0], *bands, seed=seed), mode=mode).save(path, "JPEG", quality=90)


def write_tiny(data_dir, classes=200):
    """Three training images and one validation image for each class; every tenth is grey, as some of the real ones."""
    root = Path(data_dir, "tiny-imagenet-200")
    (root / "val" / "images").mkdir(parents=True)
    rows = []
    for number, wnid in enumerate(WNIDS[:classes]):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            write_jpeg(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 3 * number + i, mode="L" if number % 10 == 0 else "RGB")
        write_jpeg(root / "val" / "images" / f"val_{number}.JPEG", 1000 + number)
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))
    return root


@pytest.fixture(scope="module")
def tiny_made(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_made, tmp_path):
    """A folder of its own, without a decoded copy."""
    return shutil.copytree(tiny_made, tmp_path / "data" / "tiny-imagenet-200")


def test_tiny_imagenet(tiny, tmp_path, monkeypatch):
    """Every image under its label, held out ones first; decoded once, mapped from then on."""
    (train, train_labels), (held_out, held_out_labels) = data.load_train(TINY, str(tiny.parent), 50)
    test, test_labels = data.load_test(TINY, str(tiny.parent))
    images, labels = np.concatenate([held_out, train]), np.concatenate([held_out_labels, train_labels])
    assert images.shape == (600, 64, 64, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert isinstance(train, np.memmap) and train.filename == str(tiny / "train-decoded.npy") and test.shape == (200, 64, 64, 3)
    wanted = {}
    for label, wnid in enumerate(WNIDS):
        for path in (tiny / "train" / wnid / "images").iterdir():
            wanted[np.asarray(Image.open(path).convert("RGB")).tobytes()] = label
    assert len(wanted) == 600 and [wanted[image.tobytes()] for image in images] == labels.tolist()
    wanted = {np.asarray(Image.open(tiny / f"val/images/val_{n}.JPEG").convert("RGB")).tobytes(): n for n in range(200)}
    assert [wanted[image.tobytes()] for image in test] == test_labels.tolist() and sorted(test_labels) == list(range(200))
    assert all(np.array_equal(image[..., 0], image[..., 2]) for image in images[labels % 10 == 0])

    decoded = {name: (tiny / name).stat().st_mtime_ns for name in ("train-decoded.npy", "val-decoded.npy")}
    monkeypatch.setattr(data.ImageFiles, "__getitem__", None)  # nothing is decoded again
    (again, labels_again), _ = data.load_train(TINY, str(tiny.parent), 50)
    assert np.array_equal(again, train) and np.array_equal(labels_again, train_labels)
    data.load_test(TINY, str(tiny.parent))
    assert {name: (tiny / name).stat().st_mtime_ns for name in decoded} == decoded
    again[0] = 0  # written to memory only
    assert np.array_equal(data.load_train(TINY, str(tiny.parent), 50)[0][0], train)

    moved = shutil.move(tiny, tmp_path / "elsewhere" / "deeper" / "tiny-imagenet-200")
    (there, labels_there), _ = data.load_train(TINY, str(moved.parent), 50)
    assert np.array_equal(there, train) and np.array_equal(labels_there, train_labels)


def test_the_first_images_of_tiny_imagenet_are_of_all_classes_in_one_order(tiny_made, tmp_path):
    """Any first n may be held out; the order depends on no folder listing and no root."""
    labels = data._tiny_files(str(tiny_made.parent), True)[1]
    assert len(set(labels[:100].tolist())) > 60
    names = [f"train/{w}/images/{w}_{i}.JPEG" for w in reversed(WNIDS) for i in range(3)]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert labels.tolist() == [WNIDS.index(name.split("/")[1]) for name in expected]


def test_the_ranks_of_a_node_decode_tiny_imagenet_once(tiny, tmp_path, monkeypatch):
    decode, log = data._decode, tmp_path / "log"

    def slow_and_logged(*args):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.3)
        decode(*args)

    monkeypatch.setattr(data, "_decode", slow_and_logged)
    assert in_children(4, lambda: data.load_test(TINY, str(tiny.parent))[0][:].sum()) == [0, 0, 0, 0]
    assert log.read_text() == "x"


def damage_tiny(root, what):
    if what == "199 classes":
        shutil.rmtree(root / "train" / WNIDS[5])
    elif what == "no annotations":
        (root / "val" / "val_annotations.txt").unlink()
    elif what == "another annotation":
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    elif what == "half an annotation":
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\n")
    elif what == "empty annotations":
        (root / "val" / "val_annotations.txt").write_text("")
    elif what == "no image":
        (root / "val" / "images" / "val_3.JPEG").unlink()
    elif what == "another size":
        write_jpeg(root / "val" / "images" / "val_3.JPEG", 0, (64, 63))
    elif what == "unreadable":
        (root / "val" / "images" / "val_3.JPEG").write_bytes(b"\xff\xd8\xff hello")
    elif what == "truncated":
        path = root / "val" / "images" / "val_3.JPEG"
        path.write_bytes(path.read_bytes()[:-200])
    else:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    "what,words",
    [
        ("199 classes", ["has 199 classes, expected 200"]),
        ("no annotations", ["tiny-imagenet is not there, or broken; put tiny-imagenet-200/", "--download"]),
        ("another annotation", ["val_annotations.txt: not as published", "n99999999"]),
        ("half an annotation", ["val_annotations.txt: not as published"]),
        ("empty annotations", ["no validation images in tiny-imagenet-200"]),
        ("no image", ["val_3.JPEG: not a readable image", "No such file"]),
        ("another size", ["val_3.JPEG: (63, 64, 3), expected (64, 64, 3)"]),
        ("unreadable", ["val_3.JPEG: not a readable image"]),
        ("truncated", ["val_3.JPEG: not a readable image", "truncated"]),
        ("nothing", ["tiny-imagenet is not there, or broken; put tiny-imagenet-200/", "--download"]),
    ],
)
def test_broken_tiny_imagenet(what, words, tiny):
    damage_tiny(tiny, what)
    refused(lambda: data.load_test(TINY, str(tiny.parent)), *words)
    assert not list(tiny.parent.rglob("*-decoded.npy*") if what == "nothing" else tiny.glob("val-decoded.npy")), "half a copy was left"


@pytest.mark.parametrize("size", [0, 50, 128, 200 * 64 * 64 * 3])
def test_a_truncated_decoded_copy(size, tiny):
    data.load_test(TINY, str(tiny.parent))
    os.truncate(tiny / "val-decoded.npy", size)
    refused(lambda: data.load_test(TINY, str(tiny.parent)), "val-decoded.npy: truncated or not an .npy array")


def test_a_decoded_copy_of_other_images(tiny):
    data.load_test(TINY, str(tiny.parent))
    with open(tiny / "val" / "val_annotations.txt", "a") as file:
        file.write(f"val_0.JPEG\t{WNIDS[0]}\t0\t0\t1\t1\n")
    refused(
        lambda: data.load_test(TINY, str(tiny.parent)), "val-decoded.npy: found uint8 (200, 64, 64, 3), expected uint8 (201, 64, 64, 3)"
    )


def test_tiny_imagenet_in_a_read_only_place(tiny, monkeypatch, capsys):
    """Simulated, as root may write anywhere. One line and status 2; where the copy was decoded before, it is all that is needed."""
    data.load_train(TINY, str(tiny.parent), 1)
    (tiny / "train-decoded.npy.lock").unlink()

    def read_only(path, mode="r", **kwargs):
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system", path)
        return open(path, mode, **kwargs)

    monkeypatch.setattr(data, "open", read_only, raising=False)
    monkeypatch.setattr(data.checkpoint, "open", read_only, raising=False)
    assert len(data.load_train(TINY, str(tiny.parent), 1)[0][0]) == 599
    monkeypatch.setattr("sys.argv", ["train_at.py"])
    with pytest.raises(SystemExit) as info:
        cli.run(lambda args: data.load_test(TINY, str(tiny.parent)), None)
    printed = capsys.readouterr().err
    assert info.value.code == 2 and printed.count("\n") == 1 and "val-decoded.npy" in printed and "Read-only file system" in printed


# -------------------------------------------------------------------------------------------------------- ImageNet

FOLDERS = [f"n{number:08d}" for number in range(1000)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """1,000 class folders; training images: two in every hundredth, of which one is CMYK and one grey, and one in the others."""
    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for number, wnid in enumerate(FOLDERS):
            (root / split / wnid).mkdir(parents=True)
            width, height = 30 + number % 37, 30 + number % 53
            several = split == "train" and number % 100 == 0
            for name, mode in (("a", "CMYK"), ("b", "L")) if several else (("a", "RGB"),):
                write_jpeg(root / split / wnid / f"{wnid}_{name}.JPEG", number, (width, height), mode)
    return root


def linked(imagenet, tmp_path, split="train", leave_out=()):
    """A folder of ImageNet whose class folders are links, without some of them."""
    (tmp_path / split).mkdir(parents=True)
    for wnid in FOLDERS:
        if wnid not in leave_out:
            (tmp_path / split / wnid).symlink_to(imagenet / split / wnid)
    return tmp_path


def by_hand(path):
    """torchvision's usual test view of one file."""
    image = functional.resize(Image.open(path).convert("RGB"), 256)
    return np.asarray(functional.center_crop(image, 224))


def test_imagenet(imagenet):
    (train, train_labels), (held_out, held_out_labels) = data.load_train(IMAGENET, str(imagenet), 64)
    test, test_labels = data.load_test(IMAGENET, str(imagenet))
    assert (len(train), len(held_out), len(test)) == (946, 64, 1000)
    assert train_labels.dtype == held_out_labels.dtype == test_labels.dtype == np.int64
    assert len(set(held_out_labels.tolist())) > 55  # the order by hash has mixed the classes
    assert np.bincount(np.concatenate([train_labels, held_out_labels])).tolist() == [2 if c % 100 == 0 else 1 for c in range(1000)]
    for files, labels in ((train, train_labels), (held_out, held_out_labels), (test, test_labels)):
        assert [FOLDERS[label] for label in labels] == [Path(path).parent.name for path in files.paths]
    names = [f"{w}/{p.name}" for w in FOLDERS for p in (imagenet / "train" / w).iterdir()]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert [os.path.relpath(path, imagenet / "train") for path in held_out.paths + train.paths] == expected


def test_image_files_are_an_array_of_test_views(imagenet, tmp_path):
    files, _ = data.load_train(IMAGENET, str(imagenet), 64)[0]
    wanted = np.stack([by_hand(path) for path in files.paths[:12]])
    assert wanted.shape == (12, 224, 224, 3)
    assert np.array_equal(files[:12], wanted) and np.array_equal(files[3:9:2], wanted[3:9:2])
    assert np.array_equal(files[[5, 1, 5]], wanted[[5, 1, 5]]) and np.array_equal(files[np.array([7])], wanted[7:8])
    assert np.array_equal(files.part(slice(2, 8))[1:3], wanted[3:5]) and np.array_equal(files.part([9, 4])[:], wanted[[9, 4]])
    assert files[:0].shape == (0, 224, 224, 3) and len(files.part(slice(2, 8))) == 6
    for mode in ("CMYK", "L"):
        paths = [path for path in files.paths if Image.open(path).mode == mode]
        assert len(paths) >= 5 and np.array_equal(data.ImageFiles(paths, 256, 224)[:2], [by_hand(path) for path in paths[:2]])
    for size in ((500, 375), (375, 500), (300, 100), (16, 16)):  # shrunk, turned, flat, enlarged
        write_jpeg(tmp_path / "x.JPEG", 3, size)
        assert np.array_equal(data.ImageFiles([str(tmp_path / "x.JPEG")], 256, 224)[[0]][0], by_hand(tmp_path / "x.JPEG"))


@pytest.mark.parametrize("content", ["truncated", "text", "nothing"])
def test_a_broken_jpeg_is_named(content, imagenet, tmp_path):
    root = linked(imagenet, tmp_path, leave_out=FOLDERS[7:8])
    (root / "train" / FOLDERS[7]).mkdir()
    write_jpeg(root / "train" / FOLDERS[7] / "bad.JPEG", 0)
    whole = (root / "train" / FOLDERS[7] / "bad.JPEG").read_bytes()
    (root / "train" / FOLDERS[7] / "bad.JPEG").write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"hello", "nothing": b""}[content]
    )
    (files, labels), _ = data.load_train(IMAGENET, str(root), 1)
    row = labels.tolist().index(7)
    refused(lambda: files[row - 2 : row + 2], f"{FOLDERS[7]}/bad.JPEG: not a readable image")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow's
def test_broken_jpegs_end_in_one_line_whatever_pillow_raises(tmp_path):
    """Flipped bytes, in the formats that hide behind a name in .JPEG too: an image or a UserError, and nothing else."""
    rng, seen = np.random.default_rng(0), {"image": 0, "error": 0}
    path = tmp_path / "x.JPEG"
    for form in ("JPEG", "PNG", "GIF", "TIFF", "PPM", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(noise(20, 20, 3)).save(file, form)
        for number in range(80):
            content = bytearray(file.getvalue())
            for place in rng.integers(0, min(len(content), 200 if number % 2 else len(content)), 2):
                content[place] = rng.integers(256)
            path.write_bytes(content)
            try:
                assert data.ImageFiles([str(path)], None, 20).open(0).mode == "RGB"
                seen["image"] += 1
            except cli.UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                seen["error"] += 1
    assert min(seen.values()) > 50


def test_imagenet_that_is_not_there(imagenet, tmp_path):
    put = "imagenet is not there, or broken; put train/ and val/ with one folder of JPEGs per class (ILSVRC-2012) there"
    refused(lambda: data.load_train(IMAGENET, str(tmp_path / "none"), 1), f"--data-dir {tmp_path / 'none'}", put)
    root = linked(imagenet, tmp_path / "no-val")
    refused(lambda: data.load_test(IMAGENET, str(root)), put)
    (root / "val").mkdir()
    write_jpeg(root / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    refused(lambda: data.load_test(IMAGENET, str(root)), "--data-dir", "any class folder", "no-val/val")
    root = linked(imagenet, tmp_path / "few", leave_out=FOLDERS[3:4])
    refused(lambda: data.load_train(IMAGENET, str(root), 1), "999 class folders, expected 1000")
    (root / "train" / FOLDERS[3]).mkdir()
    refused(lambda: data.load_train(IMAGENET, str(root), 1), "--data-dir", f"no valid file for the classes {FOLDERS[3]}")
    refused(lambda: data.load_train(IMAGENET, str(imagenet), 1010), "--val-size 1010", "1010 training images")


# ----------------------------------------------------------------------------------------- ImageNet's worker batches

SMALL_CROPS = dataclasses.replace(IMAGENET, image_size=32)  # quick


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Synthetic images of 256 pixels, 12 in three shards."""
    path = tmp_path_factory.mktemp("shards") / "set"
    return write_shards(path, noise(12, 256, 256, 3, seed=9), np.arange(12) * 80, 5, IMAGENET)


@pytest.fixture
def file_batches(imagenet, shards):
    (files, labels), _ = data.load_train(IMAGENET, str(imagenet), 64)
    both = synthetic.SyntheticSet([shards], IMAGENET)

    def make(workers, rank=0, world_size=1, with_synthetic=True, files=files, batch_size=6):
        argv = (files, labels, both if with_synthetic else None, 0.5, batch_size, SMALL_CROPS, 4, "cpu", rank, world_size)
        return data.FileBatches(*argv, workers=workers)

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
    assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1 and y.dtype == torch.int64
    assert len({x.flatten().numpy().tobytes() for batch in whole for x in batch[0]}) == 24
    for workers in (1, 2):
        state = torch.get_rng_state()
        batches = file_batches(workers)
        for step in range(4):
            assert_same(batches(step), whole[step])
        assert torch.equal(torch.get_rng_state(), state)
    for workers in (0, 1):
        ranks = [file_batches(workers, rank, 2) for rank in range(2)]
        for step in range(2):
            for parts, together in zip(zip(*(rank(step) for rank in ranks)), whole[step]):
                assert torch.equal(torch.stack(parts, 1).flatten(0, 1), together)
    for workers in (0, 2):
        resumed = file_batches(workers)
        assert_same(resumed(2), whole[2])
        assert_same(resumed(3), whole[3])
    assert_same(file_batches(0, with_synthetic=False)(0), file_batches(1, with_synthetic=False)(0))


class PlainCrops(data._Crops):
    """Images resized, and nothing else."""

    def __init__(self, *args):
        super().__init__(*args)
        self.transform = v2.Compose([v2.PILToTensor(), v2.Resize((32, 32))])


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_batches_hold_the_images_of_their_rows(workers, file_batches, monkeypatch):
    """Without augmentation: the first half are the real images of the permutation, the others those drawn of the synthetic."""
    monkeypatch.setattr(data, "_Crops", PlainCrops)
    batches, seen = file_batches(workers), []
    for step in range(3):
        x, y = batches(step)
        rows, drawn = data.Batches.my_rows(file_batches(0), step)
        assert len(rows) == len(drawn) == 3
        images, labels = batches.synthetic.gather(drawn.numpy())
        opened = [batches.images.open(row) for row in rows.tolist()] + [Image.fromarray(image) for image in images]
        for found, image in zip(x, opened, strict=True):
            assert torch.equal((found * 255).round().to(torch.uint8), PlainCrops.resized(image))
        assert y.tolist() == batches.labels[rows].tolist() + labels.tolist()
        seen += rows.tolist()
    assert len(set(seen)) == 9  # none twice in a pass


PlainCrops.resized = staticmethod(lambda image: v2.functional.resize(v2.functional.pil_to_tensor(image), [32, 32]))


def test_augmentation_of_files_is_a_function_of_its_key(file_batches):
    """Crop, mirror, RandAugment and erasing of one image differ from step to step and from place to place."""
    batches = file_batches(0)
    crops = data._Crops(batches.images, batches.labels, batches.synthetic, SMALL_CROPS, 4)
    keys = [(step, place, 5, True) for step in range(3) for place in range(3)]
    views = [crops[key] for key in keys]
    assert len({view.numpy().tobytes() for view, _ in views}) == 9 and {label.item() for _, label in views} == {batches.labels[5].item()}
    for key, (view, _) in zip(reversed(keys), reversed(views)):
        assert torch.equal(crops[key][0], view)
    other = data._Crops(batches.images, batches.labels, batches.synthetic, SMALL_CROPS, 5)
    assert not torch.equal(other[keys[0]][0], views[0][0])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_unreadable_image_in_a_worker_is_one_line(workers, file_batches, tmp_path):
    path = tmp_path / "bad.JPEG"
    write_jpeg(path, 0)
    path.write_bytes(path.read_bytes()[:300])
    files = data.ImageFiles([str(path)] * 946, 256, 224)
    batches = file_batches(workers, files=files, with_synthetic=False)
    with pytest.raises(cli.UserError) as info:
        batches(0)
    message = str(info.value)
    assert message.startswith(f"{path}: not a readable image (") and "\n" not in message  # nothing of the worker's traceback
    if workers:
        batches.loader._shutdown_workers()  # the traceback holds it, and a garbage collection would take 5 s for each


def test_workers_end_with_their_batches(file_batches):
    """By themselves, as soon as nothing holds the batches; found by the garbage collector, they take 5 s each and are killed."""
    batches = file_batches(2)
    batches(0)
    first = batches.loader._workers
    batches(7)  # a jump: others take over
    workers = batches.loader._workers
    gc.disable()
    try:
        assert [worker.exitcode for worker in first + workers] == [0, 0, None, None]
        del batches
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, its address on a local web server, and the list of the paths that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
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

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    web.handle_error = lambda *args: None  # torchvision hangs up once it knows where an address leads to
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{web.server_address[1]}/", asked
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100], ids=lambda spec: spec.name)
def test_cifar_is_downloaded_checked_and_read(spec, server, tmp_path, monkeypatch):
    served, address, asked = server
    cls, folder = getattr(torchvision.datasets, CIFARS[spec.name][0]), CIFARS[spec.name][1]
    made = write_cifar(spec, tmp_path / "made")
    trust_cifar(spec, tmp_path / "made", monkeypatch)
    with tarfile.open(served / cls.filename, "w:gz") as archive:
        archive.add(tmp_path / "made" / folder, folder)
    monkeypatch.setattr(cls, "url", address + cls.filename)
    data.prepare(spec, str(tmp_path / "data"), False)
    assert not (tmp_path / "data").exists() and asked == []

    refused(lambda: data.prepare(spec, str(tmp_path / "wrong"), True), f"--download: {spec.name}", str(tmp_path / "wrong"), "corrupted")
    assert not (tmp_path / "wrong" / folder).exists()  # an archive with another MD5 is not even unpacked
    monkeypatch.setattr(cls, "tgz_md5", md5(served / cls.filename))
    data.prepare(spec, str(tmp_path / "data"), True)
    assert_is_cifar(spec, str(tmp_path / "data"), made)
    n_asked = len(asked)
    data.prepare(spec, str(tmp_path / "data"), True)  # it is there
    assert len(asked) == n_asked > 0


def test_svhn_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, address, _ = server
    made = write_svhn(served)
    trust_svhn(served, monkeypatch, address)
    data.prepare(SVHN, str(tmp_path / "data"), True)
    assert_is_svhn(str(tmp_path / "data"), made)
    (served / "test_32x32.mat").write_bytes(b"other")
    refused(lambda: data.prepare(SVHN, str(tmp_path / "wrong"), True), "--download: svhn", "corrupted")


def test_fashion_mnist_is_downloaded_checked_and_read(server, tmp_path, monkeypatch):
    served, address, _ = server
    made = write_fashion(served)
    cls = torchvision.datasets.FashionMNIST
    monkeypatch.setattr(cls, "mirrors", [address])
    refused(lambda: data.prepare(FASHION, str(tmp_path / "wrong"), True), "--download: fashion-mnist", "corrupted")
    monkeypatch.setattr(cls, "resources", [(name, md5(served / name)) for name, _ in cls.resources])
    data.prepare(FASHION, str(tmp_path / "data"), True)
    assert_is_fashion(str(tmp_path / "data"), made)
    for size in (0, 2, 4, 300):  # unpacking was interrupted
        os.truncate(tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte", size)
        refused(lambda: data.prepare(FASHION, str(tmp_path / "data"), True), "--download: fashion-mnist")


def test_tiny_imagenet_is_downloaded_checked_and_read(server, tiny_made, tmp_path, monkeypatch):
    """torchvision's own function fetches and unpacks, from where it is led."""
    served, address, _ = server
    with zipfile.ZipFile(served / "tiny-imagenet-200.zip", "w") as archive:
        for path in tiny_made.rglob("*"):
            archive.write(path, path.relative_to(tiny_made.parent))
    fetch, calls = torchvision.datasets.utils.download_and_extract_archive, []

    def redirected(url, root, md5):
        calls.append((url, md5))
        fetch(address + os.path.basename(url), root, md5=true_md5)

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", redirected)
    true_md5 = "0" * 32
    refused(lambda: data.prepare(TINY, str(tmp_path / "data"), True), "--download: tiny-imagenet", "corrupted")
    true_md5 = md5(served / "tiny-imagenet-200.zip")
    data.prepare(TINY, str(tmp_path / "data"), True)
    assert calls == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")] * 2
    assert len(data.load_train(TINY, str(tmp_path / "data"), 100)[0][0]) == 500


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.tar.gz", "{}missing.tar.gz", "{}nonsense"], ids=["no server", "no file", "no HTTP"])
def test_a_server_that_does_not_serve(url, server, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url.format(server[1]))
    refused(lambda: data.prepare(CIFAR10, str(tmp_path), True), "--download: cifar10 could not be fetched into", str(tmp_path))


def test_what_cannot_be_downloaded(tmp_path, monkeypatch):
    refused(
        lambda: data.prepare(IMAGENET, str(tmp_path), True), "--download: imagenet cannot be fetched; put train/ and val/", "--data-dir"
    )
    refused(lambda: data.prepare(data.DATASETS["digits"], str(tmp_path), True), "--download: digits")

    def silent(data_dir):
        raise TimeoutError

    spec = dataclasses.replace(CIFAR10, download=silent)
    refused(lambda: data.prepare(spec, str(tmp_path), True), "(TimeoutError)")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- augmentation


def test_rotation_is_torchvisions():
    """Nearest pixel, about the centre, counter-clockwise, zeros outside; ties may be rounded either way."""
    images = torch.from_numpy(noise(60, 32, 32, 3)) | 1  # no pixel is 0, which is what lies outside
    angles = torch.linspace(-180, 180, 60)
    found = data.rotate(images, angles)
    wanted = torch.stack([functional.rotate(image.permute(2, 0, 1), angle.item()).permute(1, 2, 0) for image, angle in zip(images, angles)])
    same = (found == wanted).all(-1)
    assert same.float().mean() > 0.995 and same.flatten(1).float().mean(1).min() > 0.95
    assert (wanted == 0).float().mean() > 0.05  # some lie outside
    small = data.rotate(images, torch.linspace(-15, 15, 60))
    wanted = [functional.rotate(image.permute(2, 0, 1), a.item()).permute(1, 2, 0) for image, a in zip(images, torch.linspace(-15, 15, 60))]
    assert (small == torch.stack(wanted)).all(-1).float().mean() > 0.995


def test_rotation_has_the_right_sign_and_zero_changes_nothing():
    image = torch.zeros(1, 9, 9, 1, dtype=torch.uint8)
    image[0, 4, 7] = 200  # right of the centre
    turned = data.rotate(image, torch.tensor([90.0]))
    assert turned[0, 1, 4] == 200 and turned.sum() == 200  # above it: counter-clockwise
    assert torch.equal(turned[0, :, :, 0], torch.rot90(image[0, :, :, 0]))
    for size in (8, 9):  # with and without a pixel in the middle
        images = torch.from_numpy(noise(5, size, size, 3))
        assert torch.equal(data.rotate(images, torch.zeros(5)), images)
        assert torch.equal(data.rotate(images, torch.full((5,), 90.0)), torch.rot90(images, 1, (1, 2)))
        assert torch.equal(data.rotate(images, torch.full((5,), 180.0)), images.flip(1, 2))


def test_augmentation_with_rotation_is_crop_mirror_and_turn_of_each_image():
    """CIFAR-100's, drawn once more and done image by image by torchvision."""
    images, generator = torch.from_numpy(noise(80, 32, 32, 3)), torch.Generator().manual_seed(7)
    found = data.augment(images, CIFAR100, torch.Generator().manual_seed(7), 80, slice(None))
    corners = torch.randint(0, 9, (2, 80), generator=generator)
    mirrored = torch.randint(0, 2, (80,), generator=generator).bool()
    angles = (2 * torch.rand(80, generator=generator) - 1) * 15
    wanted = []
    for image, top, left, mirror, angle in zip(images, *corners.tolist(), mirrored, angles):
        crop = functional.crop(functional.pad(image.permute(2, 0, 1), 4), top, left, 32, 32)
        wanted.append(functional.rotate(functional.hflip(crop) if mirror else crop, angle.item()).permute(1, 2, 0))
    assert (found == torch.stack(wanted)).all(-1).float().mean() > 0.995
    assert angles.min() < -12 and angles.max() > 12 and 20 < mirrored.sum() < 60


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("spec", [CIFAR10, CIFAR100, FASHION], ids=lambda spec: spec.name)
def test_a_rank_draws_its_part_of_the_whole_batchs_augmentation(spec, world_size):
    images = torch.from_numpy(noise(24, spec.image_size, spec.image_size, spec.channels))
    whole = data.augment(images, spec, torch.Generator().manual_seed(1), 24, slice(None))
    assert not torch.equal(whole, images)
    for rank in range(world_size):
        mine = slice(rank, None, world_size)
        assert torch.equal(data.augment(images[mine], spec, torch.Generator().manual_seed(1), 24, mine), whole[mine])


# --------------------------------------------------------------------------------------------------- MixUp, CutMix


def mixed(seed, mixup, cutmix, n=8, num_classes=10):
    """(x, y, mixed x, mixed y); image i is i + 1 in every pixel, and its label is 3 i."""
    x = torch.arange(1.0, n + 1).view(n, 1, 1, 1).expand(n, 3, 16, 20).contiguous()
    y = torch.arange(n) * 3 % num_classes
    return x, y, *data.mix(x, y, num_classes, mixup, cutmix, seed)


def weights_of(y, probabilities):
    """The weight of each image's own label; the rest lies on its partner's."""
    own, partner = (probabilities.gather(1, labels[:, None])[:, 0] for labels in (y, y.roll(1)))
    assert torch.allclose(own + partner, torch.ones(len(y))) and torch.allclose(probabilities.sum(1), torch.ones(len(y)))
    assert probabilities.min() >= 0 and own.std() < 1e-6  # one weight for the batch
    return own[0].item()


def test_mixup_is_its_definition():
    weights = []
    for seed in range(200):
        x, y, found, probabilities = mixed(seed, 0.2, 0.0)
        weights.append(weights_of(y, probabilities))
        assert torch.allclose(found, weights[-1] * x + (1 - weights[-1]) * x.roll(1, 0), atol=1e-5)
    assert abs(np.mean(weights) - 0.5) < 4 * 0.42 / 200**0.5  # of Beta(0.2, 0.2): mean 1/2, deviation 0.42
    assert abs(np.std(weights) - 0.42) < 0.06


def test_cutmix_is_its_definition():
    """The pasted part is one rectangle, the same for all images, and the label's weight is its share of the area."""
    weights = []
    for seed in range(200):
        x, y, found, probabilities = mixed(seed, 0.0, 1.0)
        weights.append(weights_of(y, probabilities))
        pasted = found == x.roll(1, 0)
        assert (pasted | (found == x)).all() and (pasted == pasted[:1, :1]).all()
        rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
        assert torch.equal(pasted[0, 0], rows[:, None] & columns[None])
        for line in (rows, columns):  # without a gap
            assert line.int().diff().abs().sum() <= 2 and line.nonzero().diff(dim=0).eq(1).all()
        assert abs(pasted[0, 0].float().mean().item() - (1 - weights[-1])) < 1e-6
    assert min(weights) < 0.3 and max(weights) > 0.9


def test_either_one_is_drawn_where_both_are_on():
    n_mixup = 0
    for seed in range(300):
        x, y, found, probabilities = mixed(seed, 0.8, 1.0)
        weights_of(y, probabilities)
        whole_pixels = ((found == x) | (found == x.roll(1, 0))).all()
        n_mixup += not whole_pixels
    assert abs(n_mixup / 300 - 0.5) < 4 * 0.5 / 300**0.5


def test_mixing_is_a_function_of_its_seed_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, again, other = (mixed(seed, 0.8, 1.0)[2:] for seed in (data.seed_of(0, "mix", 3), data.seed_of(0, "mix", 3), 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first, again)
    assert not torch.equal(first[1], other[1])


def test_labels_of_neighbours_of_one_class_stay_whole():
    x = torch.rand(6, 3, 8, 8)
    for kind in ((0.8, 0.0), (0.0, 1.0)):
        _, probabilities = data.mix(x, torch.full((6,), 4), 10, *kind, 1)
        assert torch.allclose(probabilities, torch.eye(10)[4].expand(6, 10))
