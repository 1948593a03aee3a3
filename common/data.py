"""Data sets, synthetic sets and batches; uint8 NHWC in memory, float32 NCHW in [0, 1] for the models.

Randomness is a function of (seed, use, step): every use (order of the data, crops, attack start, teacher noise, ...) has
a stream of its own, so that switching one part on or off leaves the others as they were, and resume is exact.
"""

import hashlib
import os
from collections.abc import Callable
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
    crop_padding: int  # training crops: zero-pad by this many pixels, crop back
    flip: bool  # training images are mirrored half of the time
    eps: dict  # the usual attack radius per norm, of x in [0, 1]
    read: Callable  # (data_dir, train: bool) -> (images uint8 (N, H, W, C), labels int64 (N,))


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


DATASETS = {
    "digits": Spec("digits", 8, 1, 10, (0.305,), (0.375,), crop_padding=1, flip=False, eps={"linf": 0.15, "l2": 1.0}, read=_read_digits),
}


def load(spec, data_dir, split, val_size=0):
    """(images uint8 (N, H, W, C), labels int64 (N,)) of split "train", "val" or "test".

    "val" is the first `val_size` images of the training set and "train" the others, as in the base recipe. The
    validation images are never trained on, and nothing is ever chosen on the test images.
    """
    images, labels = spec.read(data_dir, split != "test")
    if split == "test":
        return images, labels
    if val_size >= len(labels):
        raise UserError(f"--val-size {val_size}: {spec.name} has only {len(labels)} training images")
    return (images[:val_size], labels[:val_size]) if split == "val" else (images[val_size:], labels[val_size:])


class SyntheticSet:
    """A directory written by generate_synthetic.py: memory-mapped shards, never concatenated, and the rows selected from them."""

    def __init__(self, directory, spec):
        """Open and check every shard; raises UserError where one is missing, broken, or does not fit the data set."""
        self.manifest = checkpoint.read_json(os.path.join(directory, "manifest.json"))
        if self.manifest.get("format") != 2:
            raise UserError(f"{directory}/manifest.json: format {self.manifest.get('format')}, expected 2; generate the set again")
        for key, low in (("n", 1), ("shard_size", 1), ("held_out", 0)):
            value = self.manifest.get(key)
            if not isinstance(value, int) or value < low:
                raise UserError(f"{directory}/manifest.json: '{key}' is {value}, expected a whole number of at least {low}")
        shape = [spec.image_size, spec.image_size, spec.channels]
        found = tuple(self.manifest.get(key) for key in ("dataset", "image_shape", "num_classes"))
        if found != (spec.name, shape, spec.num_classes):
            raise UserError(
                f"--synthetic {directory}: images of {found[0]}, {found[1]}, {found[2]} classes; expected "
                f"{spec.name}, {shape}, {spec.num_classes} classes"
            )
        n, self.shard_size = self.manifest["n"], self.manifest["shard_size"]
        self.held_out = self.manifest["held_out"]  # first training images that its diffusion model has not seen
        self.images, self.labels = [], []
        for shard in range(-(-n // self.shard_size)):
            size = min(self.shard_size, n - shard * self.shard_size)
            images_path, labels_path = shard_paths(directory, shard)
            self.images.append(checkpoint.open_npy(images_path, np.uint8, (size, *shape)))
            self.labels.append(checkpoint.open_npy(labels_path, np.int64, (size,)))
            if self.labels[-1].min() < 0 or self.labels[-1].max() >= spec.num_classes:
                raise UserError(f"{labels_path}: labels outside 0..{spec.num_classes - 1}")
        self.rows, hashed = None, [os.path.join(directory, "manifest.json")]  # None: all of them, without an array that says so
        if "selection" in self.manifest:
            hashed.append(os.path.join(directory, "selection.npy"))
            self.rows = checkpoint.open_npy(hashed[-1], np.int64, (None,))
            if len(self.rows) == 0 or self.rows.min() < 0 or self.rows.max() >= n:
                raise UserError(f"{hashed[-1]}: empty, or rows outside 0..{n - 1}")
        self.sha256 = [checkpoint.sha256(path) for path in hashed]  # what a run's identity records of the set

    def __len__(self):
        return self.manifest["n"] if self.rows is None else len(self.rows)

    def gather(self, indices):
        """Images uint8 (B, H, W, C) and labels int64 (B,) of the given indices, each shard read in ascending order."""
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        images = np.empty((len(rows), *self.images[0].shape[1:]), np.uint8)
        labels = np.empty(len(rows), np.int64)
        order = np.argsort(rows, kind="stable")
        shards, starts = np.unique(rows[order] // self.shard_size, return_index=True)
        for shard, places in zip(shards, np.split(order, starts[1:])):
            offsets = rows[places] - shard * self.shard_size
            images[places], labels[places] = self.images[shard][offsets], self.labels[shard][offsets]
        return images, labels


def shard_paths(directory, shard):
    """(images, labels) file of one shard of a synthetic set."""
    return tuple(os.path.join(directory, f"shard-{shard:05d}-{kind}.npy") for kind in ("images", "labels"))


# ------------------------------------------------------------------------------------------------------ batches


def to_x(images, device="cpu"):
    """uint8 (B, H, W, C) to float32 (B, C, H, W) in [0, 1], stored channels-last."""
    images = images if torch.is_tensor(images) else torch.from_numpy(np.ascontiguousarray(images))
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def augment(images, padding, flip, generator):
    """Random crop after zero padding, then random mirror, each image by itself: one gather. uint8 (B, H, W, C) in and out."""
    n, height, width, _ = images.shape
    corners = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    mirrored = torch.randint(0, 2 if flip else 1, (n,), generator=generator).bool()
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns) + corners[1][:, None]
    rows = torch.arange(height) + corners[0][:, None]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    device = images.device
    return padded[torch.arange(n, device=device)[:, None, None], rows.to(device)[:, :, None], columns.to(device)[:, None, :]]


class Batches:
    """`batches(step)` is this rank's part (x, y) of the global training batch of that step: a pure function of (seed, step).

    The global batch holds floor(batch_size * synthetic_fraction) synthetic images, drawn uniformly with replacement, and
    real images in the order of one random permutation per pass. Ranks take every world_size-th image of it, so that the
    batches do not depend on the number of ranks and every rank sees both kinds.
    """

    def __init__(self, images, labels, synthetic, synthetic_fraction, batch_size, spec, seed, device, rank=0, world_size=1):
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        self.synthetic, self.spec, self.seed, self.device = synthetic, spec, seed, device
        self.n_synthetic = int(batch_size * synthetic_fraction + 1e-9) if synthetic else 0
        self.n_real = batch_size - self.n_synthetic
        self.mine = slice(rank, None, world_size)
        self.permutation = (None, None)  # (pass, its order): the last one used

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

    def __call__(self, step):
        real = self.real_rows(step).to(self.device)
        images, labels = self.images[real], self.labels[real]
        if self.n_synthetic:
            drawn = torch.randint(len(self.synthetic), (self.n_synthetic,), generator=stream(self.seed, "synthetic", step))
            more_images, more_labels = self.synthetic.gather(drawn.numpy())
            images = torch.cat([images, torch.from_numpy(more_images).to(self.device)])
            labels = torch.cat([labels, torch.from_numpy(more_labels).to(self.device)])
        images = augment(images, self.spec.crop_padding, self.spec.flip, stream(self.seed, "augment", step))
        return to_x(images[self.mine], self.device), labels[self.mine]
