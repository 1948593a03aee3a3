"""What a data set is, its training batches, and the random streams that every script draws from.

The published data sets and synthetic sets stand in published/.

Images are uint8 (N, H, W, C) in memory or on disk, and float32 (B, C, H, W) in [0, 1] for models.
Labels are int64. Randomness is a function of (seed, use, step). Each use (order of the data, crops,
start of the attack, noise of the teacher, ...) has a stream of its own. So switching one use on or
off leaves the others as they were, and a run that is resumed goes on as if never stopped.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from common import UserError

# --------------------------------------------------------------------------------------- randomness


def seed_of(seed, use, step=0):
    """Return a seed below 2^63 for one use of randomness at one step.

    torch's generator on the CPU takes only the lower 32 bits of it.
    """
    digest = hashlib.sha256(f"{seed}/{use}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed, use, step=0, device="cpu"):
    """Return a torch.Generator on `device` for one use of randomness at one step.

    For image ids, take id_streams: among a million generators of torch's on the CPU, over a hundred
    pairs would share their 32 bits and so their numbers.
    """
    return torch.Generator(device).manual_seed(seed_of(seed, use, step))


def id_streams(seed, use, ids):
    """Return one numpy Generator per image id, each with a key of 128 bits."""
    generators = []
    for image_id in ids:
        digest = hashlib.sha256(f"{seed}/{use}/{image_id}".encode()).digest()
        key = int.from_bytes(digest[:16], "big")
        generators.append(np.random.Generator(np.random.Philox(key=key)))
    return generators


def normal_of(generators, shape):
    """Draw standard normal noise of `shape` from each numpy generator: float32 (len, *shape)."""
    draws = [generator.standard_normal(shape, np.float32) for generator in generators]
    return torch.from_numpy(np.stack(draws))


# ---------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is known of a data set before it is read."""

    name: str
    image_size: int
    channels: int
    num_classes: int
    mean: tuple | None  # per channel, of x in [0, 1]; None until `measured`
    std: tuple | None
    eps: dict  # the usual attack radius per norm, for x in [0, 1]
    read: Callable  # (data_dir, train) -> (uint8 (N, H, W, C) or ImageFiles, int64 (N,))
    download: Callable | None = None  # (data_dir) -> None
    wanted: str = ""  # what has to lie in --data-dir
    classes: tuple = ()  # names of the classes in the order of their labels, where they are known
    val_size: int = 1024  # first training images held out by default, as in DM-AT's recipe
    batches: Callable | None = None  # FileBatches of published/image_files.py; None: Batches
    crop_padding: int = 0  # training images are padded by so many pixels and cropped back,
    flip: bool = False  # mirrored half of the time,
    rotation: float = 0.0  # and rotated by up to so many degrees

    @property
    def files(self):
        """Whether the images stay in files and are decoded in workers."""
        return self.batches is not None

    def check_classes(self, name, classes):
        """Raises UserError where what `name` is of has classes of other names than the data set.

        classes: their names in the order of their labels. Where a side has no names, any will do.
        """
        if classes is not None and not _are_names(classes):
            raise UserError(f"{name}: damaged, its classes are no list of names")
        if not classes or not self.classes or tuple(classes) == self.classes:
            return
        if len(classes) != len(self.classes):
            counts = f"{len(classes)}, {self.name} has {len(self.classes)}"
            raise UserError(f"{name}: made for other classes, {counts}")
        for label, (theirs, own) in enumerate(zip(classes, self.classes)):
            if theirs != own:
                difference = f"class {label} is '{theirs}', '{own}' in {self.name}"
                raise UserError(f"{name}: made for other classes, {difference}")


def _are_names(classes):
    is_list = isinstance(classes, list | tuple)
    return is_list and all(isinstance(name, str) for name in classes)


def load_train(spec, data_dir, val_size, n_train=None, imbalance=None):
    """Read the training set. Returns ((images, labels), (held-out images, held-out labels)).

    Images are uint8 (N, H, W, C) or ImageFiles, labels int64 (N,). Held out are the first val_size
    images, as in DM-AT's recipe: nothing is ever chosen on the test images.
    n_train: train on the next so many images only. None: on all others.
    imbalance: of those, on the rows of `long_tail` only. The held-out images stay as they are.
    """
    images, labels = _read(spec, data_dir, train=True)
    n_others = len(labels) - val_size
    if n_others <= 0:
        raise UserError(
            f"--val-size {val_size}: {spec.name} has only {len(labels)} training images"
        )
    if n_train is None:
        n_train = n_others
    if n_train > n_others:
        message = f"{spec.name} has {n_others} training images besides the held-out ones"
        raise UserError(f"--n-train {n_train}: {message}")
    held_out = slice(val_size)
    rest = slice(val_size, val_size + n_train)
    if imbalance is not None:
        rest = val_size + long_tail(labels[rest], spec.num_classes, imbalance)
    if spec.files:
        return (images.part(rest), labels[rest]), (images.part(held_out), labels[held_out])
    return (images[rest], labels[rest]), (images[held_out], labels[held_out])


def long_tail(labels, num_classes, ratio):
    """Rows (n,), ascending, of a part of the images with a long tail of classes.

    labels: (N,). Class c keeps its first n_first / ratio^(c / (num_classes - 1)) images, rounded
    down, and at least one: the exponential profile of Cui et al. (arXiv 1901.05555). n_first is the
    size of the smallest class, so that no class lacks images. ratio: at least 1; the first class
    has so many times as many images as the last.
    """
    n_first = np.bincount(labels, minlength=num_classes).min()
    if n_first == 0:
        raise UserError(f"--imbalance {ratio:g}: the {len(labels)} training images lack a class")
    kept = []
    for label in range(num_classes):
        n = n_first / ratio ** (label / (num_classes - 1))
        n = int(n + 1e-9)  # 32 may come out as 31.999999999999993
        kept.append(np.flatnonzero(labels == label)[: max(1, n)])
    return np.sort(np.concatenate(kept))


def load_test(spec, data_dir):
    """Read the test set: (images, labels) as in load_train."""
    return _read(spec, data_dir, train=False)


N_MEASURED = 10_000  # training images that mean and deviation are measured on; 1,000 of files


def measured(spec, train):
    """The Spec with the mean and deviation of training images, where it has none yet.

    train: (images, labels). Evenly spaced images are taken. Raises UserError where all are alike.
    """
    if spec.mean is not None:
        return spec
    images, _ = train
    n = min(len(images), N_MEASURED // 10 if spec.files else N_MEASURED)
    rows = np.arange(n) * (len(images) - 1) // max(n - 1, 1)
    sums = np.zeros((2, spec.channels))
    for part in np.array_split(rows, -(-n // 250)):
        pixels = np.asarray(images[part], np.float64).reshape(-1, spec.channels) / 255
        sums += [pixels.sum(0), (pixels**2).sum(0)]
    mean, square = sums / (n * spec.image_size**2)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if std.max() < 1e-3:
        raise UserError(
            f"{spec.name}: all training images have one colour, there is nothing to learn"
        )
    std = np.maximum(std, std.max() / 10)  # a channel may be empty
    return dataclasses.replace(
        spec, mean=tuple(mean.round(4).tolist()), std=tuple(std.round(4).tolist())
    )


def _read(spec, data_dir, train):
    with there(spec, data_dir):
        return spec.read(data_dir, train)


@contextmanager
def there(spec, data_dir):
    """Turn a missing file or folder into a UserError that says what has to lie in data_dir."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"put {spec.wanted} there"
        if spec.download:
            remedy += " or add --download"
        message = f"{spec.name} is not there, or broken; {remedy}"
        raise UserError(f"--data-dir {data_dir}: {message}") from error


def sha256(*parts):
    """Hex digest of the content of (images, labels) pairs: what a run records of its data.

    Of images in files, see published.image_files.ImageFiles.sha256 for what it covers.
    """
    digest = hashlib.sha256()
    for images, labels in parts:
        digest.update(np.ascontiguousarray(labels))
        if isinstance(images, np.ndarray):
            digest.update(repr(images.shape).encode())
            digest.update(np.ascontiguousarray(images))
        else:
            digest.update(images.sha256().encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- augmentation


def to_x(images, device=None):
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [0, 1], stored channels-last.

    device: None leaves a tensor where it is.
    """
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.ascontiguousarray(images))
    return images.to(device=device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def packed(images, labels, pin):
    """One buffer of bytes, labels int64 (B,) and behind them images uint8 (B, H, W, C).

    pin: in page-locked memory, from which a GPU copies while the host goes on.
    """
    labels = labels.view(torch.uint8)
    n = len(labels)
    buffer = torch.empty(n + images.numel(), dtype=torch.uint8, pin_memory=pin)
    buffer[:n] = labels
    buffer[n:] = images.flatten()
    return buffer


def unpacked(buffer, shape, device):
    """(x, y) on `device`, as to_x has them, of what `packed` made of images of this shape."""
    buffer = buffer.to(device, non_blocking=True)
    n = 8 * shape[0]  # bytes of the labels
    return to_x(buffer[n:].view(shape)), buffer[:n].view(torch.int64)


def augment(images, spec, generator, batch_size, mine):
    """Crop, mirror and rotate each image at random: uint8 (B, H, W, C) in and out.

    The random numbers are drawn for a global batch of batch_size images. `images` are its rows
    `mine`, a slice, so that a batch does not depend on the number of processes.
    """
    n, height, width, channels = images.shape
    padding = spec.crop_padding
    corners = torch.randint(0, 2 * padding + 1, (2, batch_size), generator=generator)
    top, left = corners[:, mine, None]
    mirrored = torch.randint(0, 2 if spec.flip else 1, (batch_size,), generator=generator)
    mirrored = mirrored[mine].bool()

    # A view of all windows of `width` pixels in a row. One index copies a row and not a pixel.
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    windows = padded.flatten(2).unfold(2, width * channels, channels)
    numbers = torch.arange(n)[:, None]
    rows = torch.arange(height) + top
    images = windows[numbers, rows, left].view(n, height, width, channels)

    images[mirrored] = images[mirrored].flip(2)
    if spec.rotation:
        angles = 2 * torch.rand(batch_size, generator=generator)[mine] - 1
        images = rotate(images, angles * spec.rotation)
    return images


def rotate(images, angles):
    """Rotate square images about their centres: uint8 (B, H, H, C) in and out.

    angles: (B,) degrees, counter-clockwise. A pixel takes the value of the nearest one at its place
    before, and 0 where that lies outside.
    """
    radians = torch.deg2rad(angles)
    cos = radians.cos()
    sin = radians.sin()
    zero = torch.zeros_like(cos)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    x = images.permute(0, 3, 1, 2).float()
    places = F.affine_grid(matrices, x.shape, align_corners=False)
    rotated = F.grid_sample(x, places, mode="nearest", align_corners=False)
    return rotated.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def mix(x, y, num_classes, mixup, cutmix, seed):
    """Mix each image with its neighbour by MixUp or CutMix, torchvision's.

    x: (B, C, H, W). y: (B,) labels. mixup, cutmix: alphas of the Beta(alpha, alpha) distribution of
    the weight, of which the batch has one; 0 switches a kind off; one is chosen at random where
    both are on. Returns (x, label probabilities (B, num_classes)).
    """
    kinds = []
    if mixup > 0:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seed)
        return v2.RandomChoice(kinds)(x, y)


# ------------------------------------------------------------------------------------------ batches


def batches_of(n, batch_size):
    """The numbers 0 to n - 1 in index arrays of at most batch_size."""
    return np.split(np.arange(n), range(batch_size, n, batch_size))


class Batches:
    """batches(step) is this rank's part (x, y) of the global training batch of that step.

    It is a pure function of (seed, step). The global batch has floor(batch_size *
    synthetic_fraction) synthetic images, drawn with replacement by SyntheticSet.draw. The others
    are real images, in the order of a new random permutation for each pass. A rank takes every
    world_size-th image, so that the batch does not depend on the number of ranks and each rank sees
    both kinds.

    For a GPU, a thread makes the batch of the next step while the present one is trained on. On a
    CPU it would take a core from the step.
    waited: seconds that calls have waited for their batch.
    """

    def __init__(
        self,
        spec,
        train,
        batch_size,
        seed,
        device,
        rank=0,
        world_size=1,
        synthetic=None,
        synthetic_fraction=0.0,
    ):
        images, labels = train
        self.spec = spec
        self.images = images if spec.files else torch.from_numpy(images)
        self.labels = torch.from_numpy(labels)
        self.synthetic = synthetic
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        # The small number repairs products such as 0.7 * 10, which is below 7 in floating point.
        self.n_synthetic = int(batch_size * synthetic_fraction + 1e-9) if synthetic else 0
        self.n_real = batch_size - self.n_synthetic
        self.mine = slice(rank, None, world_size)
        self.shape = (batch_size // world_size, spec.image_size, spec.image_size, spec.channels)
        self.data_pass = None  # the number of the last pass, and its order of the images
        self.order = None
        self.thread = None
        if self.device.type == "cuda":
            self.thread = ThreadPoolExecutor(1)
            # Or pinning would take memory of GPU 0.
            self.thread.submit(torch.cuda.set_device, self.device)
        self.next = {}  # {step: its batch, in the making}
        self.waited = 0.0

    def real_rows(self, step):
        """Return the rows of the real images in the global batch of a step, (n_real,)."""
        total = len(self.labels)
        position = step * self.n_real
        end = position + self.n_real
        rows = [torch.empty(0, dtype=torch.long)]
        while position < end:
            data_pass, offset = divmod(position, total)
            if self.data_pass != data_pass:
                generator = stream(self.seed, "order", data_pass)
                self.order = torch.randperm(total, generator=generator)
                self.data_pass = data_pass
            rows.append(self.order[offset : offset + end - position])
            position += len(rows[-1])
        return torch.cat(rows)

    def my_rows(self, step):
        """Return (rows of real images, indices of synthetic images) of this rank's part."""
        rows = self.real_rows(step)
        if self.n_synthetic:
            drawn = self.synthetic.draw(self.n_synthetic, stream(self.seed, "synthetic", step))
            rows = torch.cat([rows, drawn])
        is_real = torch.arange(self.batch_size) < self.n_real
        rows = rows[self.mine]
        is_real = is_real[self.mine]
        return rows[is_real], rows[~is_real]

    def __call__(self, step):
        begin = time.perf_counter()
        buffer = self._packed(step)
        self.waited += time.perf_counter() - begin
        return unpacked(buffer, self.shape, self.device)

    def _packed(self, step):
        """The batch of a step as `packed` has it; the next one is begun where there is a thread."""
        if self.thread is None:
            return self._make(step)
        batch = self.next.pop(step, None) or self.thread.submit(self._make, step)
        self.next = {step + 1: self.thread.submit(self._make, step + 1)}
        return batch.result()

    def _make(self, step):
        rows, drawn = self.my_rows(step)
        images = self.images[rows]
        labels = self.labels[rows]
        if len(drawn):
            synthetic_images, synthetic_labels = self.synthetic.gather(drawn.numpy())
            images = torch.cat([images, torch.from_numpy(synthetic_images)])
            labels = torch.cat([labels, torch.from_numpy(synthetic_labels)])
        generator = stream(self.seed, "augment", step)
        images = augment(images, self.spec, generator, self.batch_size, self.mine)
        return packed(images, labels, pin=self.device.type == "cuda")


def make_batches(spec, train, args, device, rank, world_size, synthetic=None):
    """The training batches of a run, of the class that its data set takes."""
    kind = spec.batches or Batches
    more = {"workers": args.workers} if spec.files else {}
    return kind(
        spec,
        train,
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
        rank=rank,
        world_size=world_size,
        synthetic=synthetic,
        synthetic_fraction=args.synthetic_fraction,
        **more,
    )
