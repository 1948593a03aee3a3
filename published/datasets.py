"""The published data sets: what is known of each, and how its files are read.

Batches, crops and held-out images stand in common/data.py.
"""

import gzip
import hashlib
import http.client
import os
from functools import partial

import numpy as np
import torchvision
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST, ImageFolder

from common import UserError, files
from common.data import Spec
from published.image_files import FileBatches, ImageFiles

# ------------------------------------------------------------------------------------------ readers
# Each reader takes (data_dir, train) and returns (images, labels). It raises FileNotFoundError
# where the data set is not there, or is not the published one.


def _read_digits(data_dir, train):
    """scikit-learn's handwritten digits (UCI), 8 x 8 pixels in 17 levels of grey.

    A fixed stratified split: 1,000 to train, 797 to test.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    train_rows, test_rows = train_test_split(
        np.arange(len(labels)), train_size=1000, stratify=labels, random_state=0
    )
    rows = train_rows if train else test_rows
    return images[rows], labels[rows]


def _open_published(dataset, data_dir, **split):
    """Open a data set by torchvision, which compares MD5 sums first (CIFAR's files are pickles)."""
    try:
        return dataset(data_dir, **split)
    except RuntimeError as error:
        if "not found or corrupted" not in str(error):
            raise
        raise FileNotFoundError(str(error)) from error


def _read_cifar(dataset, data_dir, train):
    published = _open_published(dataset, data_dir, train=train)
    return published.data, np.array(published.targets, np.int64)


def _read_svhn(data_dir, train):
    published = _open_published(SVHN, data_dir, split="train" if train else "test")
    images = np.ascontiguousarray(published.data.transpose(0, 2, 3, 1))
    return images, published.labels.astype(np.int64)


def _download_svhn(data_dir):
    for split in ("train", "test"):
        SVHN(data_dir, split=split, download=True)


MAX_IDX_BYTES = 1 << 28  # more than Fashion-MNIST has, and less than a gzip bomb


def _read_fashion_mnist(data_dir, train):
    """idx files, gzipped or not, in data_dir itself or where torchvision downloads them to."""
    stem = "train" if train else "t10k"
    images = _read_idx(data_dir, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(data_dir, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
        arrays = f"{stem} images {images.shape} and labels {labels.shape}"
        raise UserError(f"--data-dir {data_dir}: {arrays} are not those of Fashion-MNIST")
    return images[..., None], labels.astype(np.int64)


def _read_idx(data_dir, name, n_dims):
    """Read an idx file of bytes, `name` or `name`.gz, as uint8 of n_dims dimensions.

    Its header is 0, 0, 8 and n_dims as bytes, then the length of each dimension in four bytes.
    """
    folders = [data_dir]
    folders.append(os.path.join(data_dir, "fashion-mnist"))
    folders.append(os.path.join(data_dir, "FashionMNIST", "raw"))
    candidates = [os.path.join(folder, name + end) for folder in folders for end in ("", ".gz")]
    path = next((path for path in candidates if os.path.exists(path)), None)
    if path is None:
        raise FileNotFoundError(name)
    open_file = gzip.open if path.endswith(".gz") else open
    with files.reading(path, f"an idx file of bytes in {n_dims} dimensions"):
        with open_file(path, "rb") as file:
            content = file.read(MAX_IDX_BYTES)
        if content[:4] != bytes([0, 0, 8, n_dims]):
            raise ValueError("its header is another one")
        shape = np.frombuffer(content, ">i4", n_dims, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)
        if not values.size:
            raise ValueError("it is empty")
    return values.copy()  # writable, or torch would warn


def _read_tiny_imagenet(data_dir, train):
    """Tiny ImageNet, decoded once into an .npy file beside the JPEGs and mapped from then on.

    So the processes of a node share one copy in memory.
    """
    root = os.path.join(data_dir, "tiny-imagenet-200")
    paths, labels = _tiny_imagenet_files(root, train)
    decoded = os.path.join(root, "train-decoded.npy" if train else "val-decoded.npy")
    images = ImageFiles(paths, resize=None, size=64)
    files.make_once(decoded, partial(_write_decoded, images, decoded))
    files.open_npy(decoded, np.uint8, (len(paths), 64, 64, 3))
    # Mapped copy-on-write, since torch warns of a read-only array.
    return np.load(decoded, mmap_mode="c"), labels


def _tiny_imagenet_files(root, train):
    """Return (paths, labels). The test set has no labels; the 10,000 validation images serve."""
    folder = _class_folders(os.path.join(root, "train"), 200)
    if train:
        return _by_hash(folder.samples, root)
    annotations = os.path.join(root, "val", "val_annotations.txt")
    samples = []
    with open(annotations) as file, files.reading(annotations, "the published annotations"):
        for line in file:
            name, wnid = line.split("\t")[:2]
            path = os.path.join(root, "val", "images", name)
            samples.append((path, folder.class_to_idx[wnid]))
    if not samples:
        raise UserError(f"{annotations}: empty, expected the published annotations")
    return _by_hash(samples, root)


def _write_decoded(images, path):
    """Decode ImageFiles into one .npy file, a thousand at a time."""
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(images), images.size, images.size, 3),
    }
    with files.atomic(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(images), 1000):
            file.write(images[start : start + 1000].tobytes())


def _download_tiny_imagenet(data_dir):
    torchvision.datasets.utils.download_and_extract_archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        data_dir,
        md5="90528d7ca1a48142e341f4ef8d21d0de",
    )


def _read_imagenet(data_dir, train):
    """ILSVRC-2012 in class folders below train/ and val/; the validation images serve for tests."""
    root = os.path.join(data_dir, "train" if train else "val")
    folder = _class_folders(root, 1000)
    paths, labels = _by_hash(folder.samples, root)
    return ImageFiles(paths, resize=256, size=224), labels


# ------------------------------------------------------------------------------------ image folders


def _by_hash(samples, root):
    """Sort (path, label) pairs by a hash of the path below root. Returns (paths, labels).

    That mixes the classes in one fixed order, whatever the machine, so that the first images can be
    held out.
    """

    def digest(sample):
        name = os.path.relpath(sample[0], root)
        return hashlib.sha256(os.fsencode(name)).digest()

    samples = sorted(samples, key=digest)
    labels = np.array([label for _, label in samples], np.int64)
    return [path for path, _ in samples], labels


def _class_folders(root, n_classes):
    """torchvision's ImageFolder of root, which holds one folder of images per class."""
    try:
        folder = ImageFolder(root)
    except FileNotFoundError as error:
        if not os.path.isdir(root):
            raise
        # There is no class folder, or one without images.
        raise UserError(f"{root}: {files.first_line(error)}") from error
    if len(folder.classes) != n_classes:
        raise UserError(f"{root}: {len(folder.classes)} class folders, expected {n_classes}")
    return folder


# --------------------------------------------------------------------------------------- data sets

_EPS = {"linf": 8 / 255, "l2": 0.5}

DATASETS = {
    "digits": Spec(
        name="digits",
        image_size=8,
        channels=1,
        num_classes=10,
        mean=(0.305,),
        std=(0.375,),
        eps={"linf": 0.15, "l2": 1.0},
        read=_read_digits,
        val_size=200,
        crop_padding=1,
    ),
    "fashion-mnist": Spec(
        name="fashion-mnist",
        image_size=28,
        channels=1,
        num_classes=10,
        mean=(0.286,),
        std=(0.353,),
        eps={"linf": 0.1, "l2": 1.5},
        read=_read_fashion_mnist,
        download=partial(FashionMNIST, download=True),
        wanted="train-images-idx3-ubyte.gz and its three sisters "
        "(Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist)",
        crop_padding=2,
        flip=True,
    ),
    "cifar10": Spec(
        name="cifar10",
        image_size=32,
        channels=3,
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        eps=_EPS,
        read=partial(_read_cifar, CIFAR10),
        download=partial(CIFAR10, download=True),
        wanted="cifar-10-batches-py/ (from cifar-10-python.tar.gz)",
        crop_padding=4,
        flip=True,
    ),
    "cifar100": Spec(
        name="cifar100",
        image_size=32,
        channels=3,
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        eps=_EPS,
        read=partial(_read_cifar, CIFAR100),
        download=partial(CIFAR100, download=True),
        wanted="cifar-100-python/ (from cifar-100-python.tar.gz)",
        crop_padding=4,
        flip=True,
        rotation=15.0,
    ),
    "svhn": Spec(
        name="svhn",
        image_size=32,
        channels=3,
        num_classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        eps=_EPS,
        read=_read_svhn,
        download=_download_svhn,
        wanted="train_32x32.mat and test_32x32.mat",
        crop_padding=4,
    ),
    "tiny-imagenet": Spec(
        name="tiny-imagenet",
        image_size=64,
        channels=3,
        num_classes=200,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        eps=_EPS,
        read=_read_tiny_imagenet,
        download=_download_tiny_imagenet,
        wanted="tiny-imagenet-200/ (from tiny-imagenet-200.zip)",
        crop_padding=4,
        flip=True,
    ),
    "imagenet": Spec(
        name="imagenet",
        image_size=224,
        channels=3,
        num_classes=1000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        eps={"linf": 4 / 255, "l2": 3.0},
        read=_read_imagenet,
        wanted="train/ and val/ with one folder of JPEGs per class (ILSVRC-2012)",
        files=True,
        batches=FileBatches,
        flip=True,
    ),
}


def prepare_dataset(spec, data_dir, download):
    """Fetch the data set if `download` is set. Rank 0 calls it before the others read."""
    if not download:
        return
    if spec.download is None:
        remedy = f"; put {spec.wanted} into --data-dir" if spec.wanted else ""
        raise UserError(f"--download: {spec.name} cannot be fetched{remedy}")
    try:
        spec.download(data_dir)
    except (OSError, RuntimeError, ValueError, AssertionError, http.client.HTTPException) as error:
        # What urllib raises, and torchvision over files that are not the published ones.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        message = f"{spec.name} could not be fetched into {data_dir} ({reason})"
        raise UserError(f"--download: {message}") from error
