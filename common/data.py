"""Data sets and batches; uint8 NHWC in memory or on disk, float32 NCHW in [0, 1] for the models.

Randomness is a function of (seed, use, step): every use (order of the data, crops, attack start, teacher noise, ...) has
a stream of its own, so that switching one part on or off leaves the others as they were, and resume is exact.
"""

import copy
import gzip
import hashlib
import http.client
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint
from common.cli import UserError


def seed_of(seed, use, step=0):
    """A seed for one use of randomness at one step, below 2^63. torch's CPU generator takes its lower 32 bits only."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{step}".encode()).digest()[:8], "big") >> 1


def stream(seed, use, step=0, device="cpu"):
    """A torch.Generator on `device` for one use of randomness at one step.

    Not for image ids: of a million streams on the CPU, over a hundred pairs share their 32 bits.
    """
    return torch.Generator(device).manual_seed(seed_of(seed, use, step))


def id_streams(seed, use, ids):
    """One numpy Generator per image id, each keyed by 128 bits: no two alike in any set that can be made."""
    digests = [hashlib.sha256(f"{seed}/{use}/{i}".encode()).digest() for i in ids]
    return [np.random.Generator(np.random.Philox(key=int.from_bytes(d[:16], "big"))) for d in digests]


def normal_of(generators, shape):
    """The next standard normal draw of each numpy generator: float32 (len(generators), *shape), on the CPU."""
    return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators]))


# ---------------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class Spec:
    """What is known of a data set before it is read."""

    name: str
    image_size: int
    channels: int
    num_classes: int
    mean: tuple  # per channel, of x in [0, 1]
    std: tuple
    eps: dict  # the usual attack radius per norm, of x in [0, 1]
    read: Callable  # (data_dir, train: bool) -> (images uint8 (N, H, W, C) or ImageFiles, labels int64 (N,))
    val_size: int = 1024  # first training images that every script holds out, unless told otherwise: the base recipe's
    wanted: str = ""  # what has to lie in --data-dir
    download: Callable | None = None  # (data_dir) -> None, fetches it
    crop_padding: int = 0  # training crops: zero-pad by this many pixels, crop back
    flip: bool = False  # training images are mirrored half of the time
    rotation: float = 0.0  # training images are rotated by up to this many degrees
    files: bool = False  # decoded and augmented image by image in worker processes, RandomResizedCrop instead of crop_padding


def _read_digits(data_dir, train):
    """scikit-learn's 1,797 handwritten digits (UCI), 8 x 8, 17 grey levels: 1,000 to train, 797 to test, stratified, fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    train_rows, test_rows = train_test_split(np.arange(len(labels)), train_size=1000, stratify=labels, random_state=0)
    rows = train_rows if train else test_rows
    return images[rows], labels[rows]


def _torchvision(name, data_dir, download=False, **split):
    """A data set of torchvision.datasets, which checks its files' MD5 before it reads them (CIFAR's are pickles)."""
    import torchvision

    return getattr(torchvision.datasets, name)(data_dir, download=download, **split)


def _read_cifar(name):
    def read(data_dir, train):
        found = _torchvision(name, data_dir, train=train)
        return found.data, np.array(found.targets, np.int64)

    return read


def _read_svhn(data_dir, train):
    found = _torchvision("SVHN", data_dir, split="train" if train else "test")
    return np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), found.labels.astype(np.int64)


def _read_fashion_mnist(data_dir, train):
    """idx files, gzipped or not, in data_dir itself (as Debian's package has them) or where torchvision downloads them."""
    stem = "train" if train else "t10k"
    images = _read_idx(data_dir, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(data_dir, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28) or (labels > 9).any():
        raise UserError(f"--data-dir {data_dir}: {stem} images {images.shape} and labels {labels.shape} are not those of Fashion-MNIST")
    return images[..., None], labels.astype(np.int64)


def _read_idx(data_dir, name, n_dims):
    """A uint8 array of `n_dims` dimensions from an idx file (magic 0, 0, 8, n_dims; big-endian sizes; bytes)."""
    folders = (data_dir, os.path.join(data_dir, "fashion-mnist"), os.path.join(data_dir, "FashionMNIST", "raw"))
    paths = [
        os.path.join(folder, name + end) for folder in folders for end in ("", ".gz") if os.path.exists(os.path.join(folder, name + end))
    ]
    if not paths:
        raise FileNotFoundError(name)
    try:
        with (gzip.open if paths[0].endswith(".gz") else open)(paths[0], "rb") as file:
            content = file.read(1 << 28)  # more than any such set has, less than a bomb
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{paths[0]}: truncated or broken ({error})") from None
    head = 4 + 4 * n_dims
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, head, 4))
    if content[:4] != bytes([0, 0, 8, n_dims]) or 0 in shape or len(content) != head + math.prod(shape):
        raise UserError(f"{paths[0]}: not a whole idx file of bytes in {n_dims} dimensions")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()  # writable, or torch would warn


def _tiny_files(data_dir, train):
    """(paths, labels) of tiny-imagenet-200, its 10,000 validation images being the test images, in by_hash order."""
    root = os.path.join(data_dir, "tiny-imagenet-200")
    wnids = sorted(entry.name for entry in os.scandir(os.path.join(root, "train")) if entry.is_dir())
    if len(wnids) != 200:
        raise UserError(f"--data-dir {data_dir}: tiny-imagenet-200/train has {len(wnids)} classes, expected 200")
    index = {wnid: label for label, wnid in enumerate(wnids)}
    if train:
        found = [(f"train/{w}/images/{name}", index[w]) for w in wnids for name in os.listdir(os.path.join(root, "train", w, "images"))]
    else:
        try:
            with open(os.path.join(root, "val", "val_annotations.txt")) as file:
                rows = [line.split("\t")[:2] for line in file]
            found = [(f"val/images/{name}", index[wnid]) for name, wnid in rows]
        except (ValueError, KeyError) as error:
            raise UserError(f"{root}/val/val_annotations.txt: not as published ({type(error).__name__}: {error})") from None
    found.sort(key=lambda pair: by_hash(pair[0]))
    if not found:
        raise UserError(f"--data-dir {data_dir}: no {'training' if train else 'validation'} images in tiny-imagenet-200")
    return [os.path.join(root, path) for path, _ in found], np.array([label for _, label in found], np.int64)


def _read_tiny_imagenet(data_dir, train):
    """Decoded once into an .npy beside the JPEGs, memory-mapped from then on: the ranks of a node share one copy."""
    paths, labels = _tiny_files(data_dir, train)
    decoded = os.path.join(data_dir, "tiny-imagenet-200", f"{'train' if train else 'val'}-decoded.npy")
    checkpoint.make_once(decoded, lambda: _decode(ImageFiles(paths, resize=None, size=64), decoded))
    checkpoint.open_npy(decoded, np.uint8, (len(paths), 64, 64, 3))
    return np.load(decoded, mmap_mode="c"), labels  # copy-on-write: torch takes no read-only array without a warning


def _decode(images, path):
    with checkpoint.atomic(path) as file:
        shape = (len(images), images.size, images.size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, len(images), 1000):
            file.write(images[start : start + 1000].tobytes())


def _download_tiny_imagenet(data_dir):
    from torchvision.datasets.utils import download_and_extract_archive

    address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    download_and_extract_archive(address, data_dir, md5="90528d7ca1a48142e341f4ef8d21d0de")


def _read_imagenet(data_dir, train):
    """ILSVRC-2012 as ImageFolder has it, train/<wnid>/ and val/<wnid>/, in by_hash order: any first n are a random sample."""
    from torchvision.datasets import ImageFolder

    root = os.path.join(data_dir, "train" if train else "val")
    try:
        folder = ImageFolder(root)
    except FileNotFoundError as error:  # no folder at all, or a class folder without images
        if os.path.isdir(root):
            raise UserError(f"--data-dir {data_dir}: {str(error).splitlines()[0][:160]}") from None
        raise
    if len(folder.classes) != 1000:
        raise UserError(f"--data-dir {data_dir}: {root} has {len(folder.classes)} class folders, expected 1000 (n01440764, ...)")
    samples = sorted(folder.samples, key=lambda pair: by_hash(os.path.relpath(pair[0], root)))
    return ImageFiles([path for path, _ in samples], resize=256, size=224), np.array([label for _, label in samples], np.int64)


def by_hash(path):
    """Sort key that mixes the classes of a folder in one fixed order, whatever the machine: first images can be held out."""
    return hashlib.sha256(path.encode()).digest()


class ImageFiles:
    """An array of images that stay in their files: images[rows] decodes them, uint8 (B, size, size, 3), in threads.

    resize: length of the shorter side before the centre crop of `size` pixels (the usual test view); None: as they are.
    """

    def __init__(self, paths, resize, size):
        from torchvision.transforms import v2

        # Bytes in one array, not a million Python strings, whose reference counts would copy their pages into every worker.
        self.names = np.array([os.fsencode(path) for path in paths], np.bytes_)
        self.resize, self.size = resize, size
        self.view = v2.Compose([v2.Resize(resize), v2.CenterCrop(size)]) if resize else lambda image: image

    def __len__(self):
        return len(self.names)

    def path(self, row):
        return os.fsdecode(self.names[row])

    @property
    def paths(self):
        return [os.fsdecode(name) for name in self.names]

    def part(self, rows):
        """The images of a slice or list of rows, still in their files."""
        return ImageFiles(self.names[rows], self.resize, self.size)

    def open(self, row):
        """One decoded PIL image in RGB, at its own size."""
        from PIL import Image

        try:
            with Image.open(self.path(row)) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow's many decoders raise nearly anything at a broken file
            raise UserError(f"{self.path(row)}: not a readable image ({error})") from None

    def __getitem__(self, rows):
        rows = range(len(self))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        images = np.empty((len(rows), self.size, self.size, 3), np.uint8)

        def decode(place):
            image = np.asarray(self.view(self.open(rows[place])))
            if image.shape != images.shape[1:]:
                raise UserError(f"{self.path(rows[place])}: {image.shape}, expected {images.shape[1:]}")
            images[place] = image

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
            list(pool.map(decode, range(len(rows))))
        return images


_CIFAR_STD, _EPS = (0.2471, 0.2435, 0.2616), {"linf": 8 / 255, "l2": 0.5}
# fmt: off
DATASETS = {spec.name: spec for spec in (
    Spec("digits", 8, 1, 10, (0.305,), (0.375,), {"linf": 0.15, "l2": 1.0}, _read_digits, val_size=200, crop_padding=1),
    Spec("fashion-mnist", 28, 1, 10, (0.286,), (0.353,), {"linf": 0.1, "l2": 1.5}, _read_fashion_mnist,
         wanted="train-images-idx3-ubyte.gz and its three sisters (Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist)",
         download=lambda data_dir: _torchvision("FashionMNIST", data_dir, download=True), crop_padding=2, flip=True),
    Spec("cifar10", 32, 3, 10, (0.4914, 0.4822, 0.4465), _CIFAR_STD, _EPS, _read_cifar("CIFAR10"),
         wanted="cifar-10-batches-py/ (from cifar-10-python.tar.gz)",
         download=lambda data_dir: _torchvision("CIFAR10", data_dir, download=True), crop_padding=4, flip=True),
    Spec("cifar100", 32, 3, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), _EPS, _read_cifar("CIFAR100"),
         wanted="cifar-100-python/ (from cifar-100-python.tar.gz)",
         download=lambda data_dir: _torchvision("CIFAR100", data_dir, download=True), crop_padding=4, flip=True, rotation=15.0),
    Spec("svhn", 32, 3, 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), _EPS, _read_svhn, wanted="train_32x32.mat and test_32x32.mat",
         download=lambda data_dir: [_torchvision("SVHN", data_dir, split=s, download=True) for s in ("train", "test")], crop_padding=4),
    Spec("tiny-imagenet", 64, 3, 200, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), _EPS, _read_tiny_imagenet,
         wanted="tiny-imagenet-200/ (from tiny-imagenet-200.zip)", download=_download_tiny_imagenet, crop_padding=4, flip=True),
    Spec("imagenet", 224, 3, 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), {"linf": 4 / 255, "l2": 3.0}, _read_imagenet,
         wanted="train/ and val/ with one folder of JPEGs per class (ILSVRC-2012)", flip=True, files=True),
)}
# fmt: on


def prepare(spec, data_dir, download):
    """Fetch the data set where asked to. For rank 0, before the others read."""
    if not download:
        return
    if spec.download is None:
        raise UserError(f"--download: {spec.name} cannot be fetched" + (f"; put {spec.wanted} into --data-dir" if spec.wanted else ""))
    try:
        spec.download(data_dir)
    except (OSError, RuntimeError, ValueError, AssertionError, http.client.HTTPException) as error:  # urllib's and torchvision's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--download: {spec.name} could not be fetched into {data_dir} ({reason})") from None


def load_train(spec, data_dir, val_size, n_train=None):
    """((images, labels) to train on, (images, labels) held out): uint8 (N, H, W, C), or ImageFiles, and int64 (N,).

    Held out are the first `val_size` images of the training set, as in the base recipe. They are never trained on, and
    nothing is ever chosen on the test images. n_train: only the next so many images are trained on, None: all.
    """
    images, labels = _read(spec, data_dir, True)
    if val_size >= len(labels):
        raise UserError(f"--val-size {val_size}: {spec.name} has only {len(labels)} training images")
    if n_train is not None and val_size + n_train > len(labels):
        raise UserError(f"--n-train {n_train}: {spec.name} has {len(labels) - val_size} training images besides the held-out ones")
    part = images.part if spec.files else images.__getitem__
    held_out, rest = slice(val_size), slice(val_size, None if n_train is None else val_size + n_train)
    return (part(rest), labels[rest]), (part(held_out), labels[held_out])


def load_test(spec, data_dir):
    """(images, labels) of the test set, as load_train gives them."""
    return _read(spec, data_dir, False)


def listed(images, labels, path):
    """(ImageFiles, labels) of the files that a text file names as <class folder>/<file>, one a line, in its order.

    Raises UserError where the list cannot be read, is empty or names a file that is not there.
    """
    rows = {"/".join(name.split(os.sep)[-2:]): row for row, name in enumerate(images.paths)}
    try:
        with open(path) as file:
            names = [line.strip() for line in file if line.strip()]
        chosen = [rows[name] for name in names]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--image-list {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except KeyError as error:
        raise UserError(f"--image-list {path}: {str(error)[:100]} is not among the images of --data-dir") from None
    if not chosen:
        raise UserError(f"--image-list {path}: empty")
    return images.part(chosen), labels[chosen]


def _read(spec, data_dir, train):
    try:
        return spec.read(data_dir, train)
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: torchvision's, also of a wrong MD5
        hint = " or add --download" if spec.download else ""
        raise UserError(f"--data-dir {data_dir}: {spec.name} is not there, or broken; put {spec.wanted} there{hint}") from None


# ------------------------------------------------------------------------------------------------------ batches


def to_x(images, device="cpu"):
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [0, 1], stored channels-last."""
    images = images if torch.is_tensor(images) else torch.from_numpy(np.ascontiguousarray(images))
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def augment(images, spec, generator, batch_size, mine):
    """Random crop after zero padding, mirror, rotation, each image by itself: gathers. uint8 (B, H, W, C) in and out.

    The draws are those of a global batch of `batch_size` images, of which `images` are the slice `mine`.
    """
    n, height, width, channels = images.shape
    device, p = images.device, spec.crop_padding
    corners = torch.randint(0, 2 * p + 1, (2, batch_size), generator=generator)[:, mine]
    mirrored = torch.randint(0, 2 if spec.flip else 1, (batch_size,), generator=generator).bool()[mine].to(device)
    rows, columns = (torch.arange(height) + corners[0][:, None]).to(device), corners[1][:, None].to(device)
    # Each row of pixels at each of its corners, a view, so that one index copies a row and not a pixel.
    windows = F.pad(images, (0, 0, p, p, p, p)).flatten(2).unfold(2, width * channels, channels)
    images = windows[torch.arange(n, device=device)[:, None], rows, columns].view(n, height, width, channels)
    images[mirrored] = images[mirrored].flip(2)
    if spec.rotation:
        angles = (2 * torch.rand(batch_size, generator=generator)[mine] - 1) * spec.rotation
        images = rotate(images, angles.to(device))
    return images


def rotate(images, angles):
    """uint8 (B, H, W, C) turned about their centres by `angles` (B,), degrees counter-clockwise; nearest pixel, zeros outside."""
    n, height, width, _ = images.shape
    cos, sin = (f(torch.deg2rad(angles)).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=images.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=images.device).view(1, 1, -1) - (width - 1) / 2
    rows = (x * sin + y * cos + (height - 1) / 2).round().long()
    columns = (x * cos - y * sin + (width - 1) / 2).round().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    number = torch.arange(n, device=images.device).view(-1, 1, 1)
    return images[number, rows.clamp(0, height - 1), columns.clamp(0, width - 1)] * inside[..., None]


def mix(x, y, num_classes, mixup, cutmix, seed):
    """MixUp or CutMix of a batch, either one at random where both alphas are above 0: (images, label probabilities (B, K)).

    torchvision's: one Beta(alpha, alpha) weight for the batch, each image's partner is its neighbour in this rank's part.
    """
    from torchvision.transforms import v2

    kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0]
    with torch.random.fork_rng(devices=[]):  # they draw from the global generator
        torch.default_generator.manual_seed(seed)
        return v2.RandomChoice(kinds)(x, y)


class Batches:
    """`batches(step)` is this rank's part (x, y) of the global training batch of that step: a pure function of (seed, step).

    The global batch holds floor(batch_size * synthetic_fraction) synthetic images, drawn uniformly with replacement, and
    real images in the order of one random permutation per pass. Ranks take every world_size-th image of it, so that the
    batches do not depend on the number of ranks and every rank sees both kinds.
    """

    def __init__(self, images, labels, synthetic, synthetic_fraction, batch_size, spec, seed, device, rank=0, world_size=1):
        self.images, self.labels = images, torch.from_numpy(labels)
        self.synthetic, self.batch_size, self.spec, self.seed, self.device = synthetic, batch_size, spec, seed, device
        self.n_synthetic = int(batch_size * synthetic_fraction + 1e-9) if synthetic else 0
        self.n_real = batch_size - self.n_synthetic
        self.mine = slice(rank, None, world_size)
        self.permutation = (None, None)  # (pass, its order): the last one used
        if not spec.files:
            self.images, self.labels = torch.from_numpy(images).to(device), self.labels.to(device)

    def real_rows(self, step):
        """Rows of the real images in the global batch of `step`, (n_real,)."""
        total, rows, position = len(self.labels), [], step * self.n_real
        end = position + self.n_real
        while position < end:
            data_pass, offset = divmod(position, total)
            if self.permutation[0] != data_pass:
                self.permutation = (data_pass, torch.randperm(total, generator=stream(self.seed, "order", data_pass)))
            rows.append(self.permutation[1][offset : offset + end - position])
            position += len(rows[-1])
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)

    def my_rows(self, step):
        """(rows of real images, indices of synthetic images) in this rank's part of the global batch, in their order."""
        is_real = (torch.arange(self.batch_size) < self.n_real)[self.mine]
        rows = self.real_rows(step)
        if self.n_synthetic:
            rows = torch.cat([rows, self.synthetic.draw(self.n_synthetic, stream(self.seed, "synthetic", step))])
        return rows[self.mine][is_real], rows[self.mine][~is_real]

    def __call__(self, step):
        real, drawn = self.my_rows(step)
        images, labels = self.images[real.to(self.device)], self.labels[real.to(self.device)]
        if len(drawn):
            more_images, more_labels = self.synthetic.gather(drawn.numpy())
            images = torch.cat([images, torch.from_numpy(more_images).to(self.device)])
            labels = torch.cat([labels, torch.from_numpy(more_labels).to(self.device)])
        images = augment(images, self.spec, stream(self.seed, "augment", step), self.batch_size, self.mine)
        return to_x(images, self.device), labels


class FileBatches(Batches):
    """Batches of images that lie in files, decoded and augmented by `workers` processes ahead of time.

    Augmentation: RandomResizedCrop, mirror, RandAugment (2 operations of magnitude 9) and erasing (probability 0.25), of
    torchvision. An image's randomness depends on (seed, step, place in the global batch) alone: neither the number of
    ranks nor that of workers changes a batch, and resume is exact. Steps are asked for in ascending order.
    """

    def __init__(self, *args, workers, **kwargs):
        super().__init__(*args, **kwargs)
        self.workers, self.expected, self.loader = workers, None, None

    def _keys(self, step):
        while True:
            real, drawn = self.my_rows(step)
            places = range(self.batch_size)[self.mine]
            rows = [(row, True) for row in real.tolist()] + [(row, False) for row in drawn.tolist()]
            yield [(step, place, *row) for place, row in zip(places, rows)]
            step += 1

    def __call__(self, step):
        if step != self.expected:  # the first call, of a fresh or a resumed run
            self.loader = None
            keys = copy.copy(self)._keys(step)  # of a copy: in a cycle with what holds it, a loader takes 5 s to end each worker
            crops = _Crops(self.images, self.labels, self.synthetic, self.spec, self.seed)
            how = dict(num_workers=self.workers, multiprocessing_context="fork" if self.workers else None)
            how |= dict(pin_memory=torch.device(self.device).type == "cuda", generator=torch.Generator())  # or it draws from the global one
            self.loader = iter(torch.utils.data.DataLoader(crops, batch_sampler=keys, **how))
        self.expected = step + 1
        try:
            images, labels = next(self.loader)
        except UserError as error:  # a worker's comes with its traceback before the message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
        return to_x(images, self.device), labels.to(self.device)


class _Crops(torch.utils.data.Dataset):
    """One augmented image (uint8 (H, W, C), label) per key (step, place, row, is_real), for DataLoader's workers."""

    def __init__(self, images, labels, synthetic, spec, seed):
        from torchvision.transforms import v2

        self.images, self.labels, self.synthetic, self.seed = images, labels, synthetic, seed
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(spec.image_size, antialias=True),
                v2.RandomHorizontalFlip(0.5 if spec.flip else 0.0),
                v2.RandAugment(num_ops=2, magnitude=9),
                v2.RandomErasing(0.25, value=[round(255 * m) for m in spec.mean]),
            ]
        )

    def __getitem__(self, key):
        step, place, row, is_real = key
        if is_real:
            image, label = self.images.open(row), self.labels[row]
        else:
            from PIL import Image

            images, labels = self.synthetic.gather(np.array([row]))
            image, label = Image.fromarray(images[0]), torch.tensor(labels[0])
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(seed_of(self.seed, "augment", f"{step}/{place}"))
            return self.transform(image).permute(1, 2, 0), label
