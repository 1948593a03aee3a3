"""Synthetic sets of any size: checking, drawing from them and reading them row by row.

The .npz files that others published are opened in published/synthetic.py. How images are generated
stands in generate_synthetic.py, how they are mixed with real ones in common/data.py.

A training process keeps no copy of a set and none of its pages: ten thousand and fifty million
images cost it the same memory, and the processes of a node share the system's one page cache.
"""

import hashlib
import json
import mmap
import os
import resource

import numpy as np
import torch

from common import UserError, files

N_HASHED = 100_000  # images of a source that its digest covers at most
MAX_MAPS = "/proc/sys/vm/max_map_count"  # Linux: how many maps a process may have

# --------------------------------------------------------------------------------------- one source


class Source:
    """One set: shards of `shard_size` images each, memory-mapped and never concatenated.

    images: list of uint8 (n, H, W, C). labels: list of integers (n,). rows: the numbers of the
    selected images, mapped int64 (k,), or None for all. held_out: how many first training images
    its diffusion model is known not to have seen. manifest: dict, None for an .npz file.
    """

    def __init__(self, images, labels, shard_size, rows=None, held_out=0, manifest=None):
        self.images = images
        self.labels = labels
        self.rows = rows
        self.held_out = held_out
        self.manifest = manifest
        self.n_rows = sum(len(array) for array in labels)
        self.image_rows = _Rows(images, shard_size)
        self.label_rows = _Rows(labels, shard_size)
        self.selected_rows = None if rows is None else _Rows([rows], len(rows))

    def __len__(self):
        return self.n_rows if self.rows is None else len(self.rows)

    def gather(self, indices):
        """Images uint8 (B, H, W, C) and labels int64 (B,) of the given indices (B,)."""
        rows = np.asarray(indices, np.int64)
        if self.selected_rows is not None:
            rows = self.selected_rows[rows]
        return self.image_rows[rows], self.label_rows[rows].astype(np.int64)

    def check(self, num_classes, name=None):
        """Raises UserError where a label or a selected row is out of range.

        name: of the file, where the arrays are mapped from a copy of it.
        """
        for array in self.labels:
            if not _within(array, num_classes):
                raise UserError(f"{name or array.filename}: labels outside 0..{num_classes - 1}")
        if self.rows is None:
            return
        ascending = len(self.rows) > 0 and (np.diff(self.rows) > 0).all()
        if not ascending or not _within(self.rows, self.n_rows):
            expected = f"expected ascending rows out of 0..{self.n_rows - 1}"
            raise UserError(f"{self.rows.filename}: {expected}, at least one")

    def sha256(self):
        """Hex digest of the content: manifest, selection, every label, and images.

        Of the images that gather gives it covers N_HASHED, evenly spaced, first and last included,
        or all where there are no more. The digest does not depend on where the set lies.
        """
        digest = hashlib.sha256()
        shape = self.images[0].shape[1:]
        digest.update(json.dumps([self.manifest, shape, self.n_rows], sort_keys=True).encode())
        arrays = self.labels if self.rows is None else [*self.labels, self.rows]
        for array in arrays:
            for part in _parts(array):
                digest.update(part.astype("<i8"))
        n_hashed = min(len(self), N_HASHED)
        indices = np.arange(n_hashed) * (len(self) - 1) // max(n_hashed - 1, 1)
        for start in range(0, n_hashed, 256):
            images, _ = self.gather(indices[start : start + 256])
            digest.update(images)
        return digest.hexdigest()


def _within(array, limit):
    """Whether all entries of a mapped array lie in 0..limit-1."""
    return all(part.min() >= 0 and part.max() < limit for part in _parts(array))


def _parts(array):
    """Yield a mapped array in parts of 2^20 entries, and give its pages back to the system."""
    for start in range(0, len(array), 1 << 20):
        yield array[start : start + (1 << 20)]
        array._mmap.madvise(mmap.MADV_DONTNEED)


class _Rows:
    """The rows of mapped arrays, `shard_size` of them in each array, read from their files.

    They are not read through the mapping: there a row of 3 kB may read 8 MB from disk and map 2 MB,
    and a file that was cut short ends the process.
    """

    def __init__(self, arrays, shard_size):
        self.arrays = arrays
        self.shard_size = shard_size
        self.offsets = [array.offset for array in arrays]
        self.files = [open(array.filename, "rb", buffering=0) for array in arrays]

    def __getitem__(self, rows):
        first = self.arrays[0]
        size = first[:1].nbytes
        order = np.argsort(rows, kind="stable")  # each shard from its beginning to its end
        shards, shard_rows = np.divmod(rows[order], self.shard_size)
        places = []
        for shard, row in zip(shards.tolist(), shard_rows.tolist()):
            places.append((self.files[shard], self.offsets[shard] + row * size))
        if size > 8 and hasattr(os, "posix_fadvise"):  # not for labels; not on macOS
            # All rows are asked for before the first is waited for.
            for file, start in places:
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        content = np.empty((len(rows), size), np.uint8)
        for target, (file, start) in zip(order, places):
            if os.preadv(file.fileno(), [content[target]], start) < size:
                raise UserError(f"{file.name}: truncated since it was opened")
        return content.view(first.dtype).reshape(len(rows), *first.shape[1:])


def check_fits(path, dataset, shape, num_classes, spec):
    """Raises UserError where a set does not fit the data set `spec` (common.data.Spec)."""
    wanted = [spec.image_size, spec.image_size, spec.channels]
    shape_fits = shape == wanted
    if spec.files and isinstance(shape, list):
        # Training crops and resizes these images, so that a set of another size will do: DiT's
        # images have 256 pixels, training takes 224.
        sizes_fit = all(isinstance(size, int) and size >= 32 for size in shape[:2])
        shape_fits = sizes_fit and shape[2:] == [spec.channels]
    if not shape_fits or (dataset, num_classes) != (spec.name, spec.num_classes):
        content = f"images of {dataset}, {shape}, {num_classes} classes"
        expected = f"{spec.name}, {wanted}, {spec.num_classes} classes"
        raise UserError(f"{path}: {content}; expected {expected}")


# ---------------------------------------------------------------- directories of generate_synthetic


def shard_paths(directory, shard):
    """(images, labels) file of one shard of a synthetic set."""
    stem = os.path.join(directory, f"shard-{shard:05d}")
    return f"{stem}-images.npy", f"{stem}-labels.npy"


def read_manifest(directory):
    """The manifest.json of a set. Raises UserError where it is missing, broken or too old."""
    path = os.path.join(directory, "manifest.json")
    manifest = files.read_json(path)
    if manifest.get("format") != 2:
        version = f"format {manifest.get('format')}, expected 2"
        raise UserError(f"{path}: {version}; generate the set again")
    for key, least in (("n", 1), ("shard_size", 1), ("held_out", 0)):
        value = manifest.get(key)
        if not isinstance(value, int) or value < least:
            expected = f"expected a whole number of at least {least}"
            raise UserError(f"{path}: '{key}' is {value}, {expected}")
    return manifest


def open_shards(directory, spec):
    """The Source of a directory that generate_synthetic.py wrote, every shard opened and checked.

    Raises UserError where a file is missing or broken, or does not fit the data set `spec`.
    """
    manifest = read_manifest(directory)
    shape = manifest.get("image_shape")
    check_fits(directory, manifest.get("dataset"), shape, manifest.get("num_classes"), spec)
    spec.check_classes(directory, manifest.get("classes"))

    n = manifest["n"]
    shard_size = manifest["shard_size"]
    n_shards = -(-n // shard_size)  # rounded up
    allow_shards(n_shards, directory)
    images, labels = [], []
    for shard in range(n_shards):
        size = min(shard_size, n - shard * shard_size)
        images_path, labels_path = shard_paths(directory, shard)
        images.append(files.open_npy(images_path, np.uint8, (size, *shape)))
        labels.append(files.open_npy(labels_path, np.int64, (size,)))
    rows = None
    if "selection" in manifest:
        rows = files.open_npy(os.path.join(directory, "selection.npy"), np.int64, (None,))
    source = Source(images, labels, shard_size, rows, manifest["held_out"], manifest)
    source.check(spec.num_classes)
    return source


def allow_shards(n, title):
    """Let this process open `n` more shards. Raises UserError where the system does not allow it.

    title: of the set, for messages.
    """
    remedy = "use larger shards"
    n_files = 4 * n  # images and labels, each mapped and open for _Rows
    n_open = len(os.listdir("/dev/fd")) + 512  # 512 for whatever else the process opens
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n_files + n_open:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (n_files + n_open, hard))
        except (ValueError, OverflowError, OSError) as error:
            limit = f"more than this system allows a process (ulimit -Hn: {hard})"
            raise UserError(f"{title}: needs {n_files} open files, {limit}; {remedy}") from error
    if os.path.exists(MAX_MAPS):  # Linux
        most = int(files.read_text(MAX_MAPS))
        n_maps = len(files.read_text("/proc/self/maps").splitlines())
        if n_maps + 2 * n + 1000 > most:  # 1000 for whatever else the process maps
            limit = f"more than this system allows a process (vm.max_map_count: {most})"
            raise UserError(f"{title}: needs {2 * n} maps of files, {limit}; {remedy}")


# ------------------------------------------------------------------------------------- several sets


class SyntheticSet:
    """The union of several sources as one range of indices.

    Without shares, images are drawn uniformly from the union; with them, a source's share of the
    drawn images is its share of their sum.
    """

    def __init__(self, sources, shares=None):
        self.sources = sources
        self.shares = None if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.starts = np.cumsum([0] + [len(source) for source in self.sources])
        self.held_out = min(source.held_out for source in self.sources)

    def __len__(self):
        return int(self.starts[-1])

    def sha256(self):
        """Hex digest of the shares and of every source's content, wherever it lies."""
        shares = None if self.shares is None else self.shares.tolist()
        digests = [source.sha256() for source in self.sources]
        return hashlib.sha256(json.dumps([shares, digests]).encode()).hexdigest()

    def draw(self, n, generator):
        """n indices, with replacement, int64 (n,)."""
        if self.shares is None:
            return torch.randint(len(self), (n,), generator=generator)
        numbers = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        sizes = torch.from_numpy(np.diff(self.starts))
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        offsets = (uniform * sizes[numbers]).long()
        return torch.from_numpy(self.starts)[numbers] + offsets

    def gather(self, indices):
        """Images uint8 (B, H, W, C) and labels int64 (B,) of the given indices (B,)."""
        if len(self.sources) == 1:
            return self.sources[0].gather(indices)
        indices = np.asarray(indices)
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        # Sources with images of different sizes are asked for one image at a time.
        shape = self.sources[numbers[0]].images[0].shape[1:]
        images = np.empty((len(indices), *shape), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            in_source = indices[places] - self.starts[number]
            images[places], labels[places] = self.sources[number].gather(in_source)
        return images, labels
