"""Synthetic sets: the shards of generate_synthetic.py or the .npz files that DM-AT published, read row by row, never in RAM.

A training process keeps no copy of a set and none of its pages: ten thousand and fifty million images cost it the same
memory, and the ranks of a node share the system's one page cache.
"""

import argparse
import json
import math
import mmap
import os
import resource
import struct
import zipfile
import zlib

import numpy as np
import torch

from common import checkpoint
from common.cli import UserError, ratio


def shard_paths(directory, shard):
    """(images, labels) file of one shard of a synthetic set."""
    return tuple(os.path.join(directory, f"shard-{shard:05d}-{kind}.npy") for kind in ("images", "labels"))


class Source:
    """One set: memory-mapped shards of `shard_size` images each, never concatenated, and the rows selected from them.

    images, labels: lists of arrays, uint8 (n, H, W, C) and integers (n,). rows: int64 (k,), or None for all. held_out: how
    many first training images its diffusion model is known not to have seen. identity: what a run records of the set.
    """

    def __init__(self, images, labels, shard_size, rows, held_out, identity):
        self.images, self.labels, self.rows, self.held_out, self.identity = images, labels, rows, held_out, identity
        self.image_rows, self.label_rows = _Rows(images, shard_size), _Rows(labels, shard_size)
        self.selected_rows = None if rows is None else _Rows([rows], len(rows))

    def __len__(self):
        return sum(map(len, self.labels)) if self.rows is None else len(self.rows)

    def gather(self, indices):
        """Images uint8 (B, H, W, C) and labels int64 (B,) of the given indices; its cost is that of the batch, not of the set."""
        rows = np.asarray(indices, np.int64)
        rows = rows if self.rows is None else self.selected_rows[rows]
        return self.image_rows[rows], self.label_rows[rows].astype(np.int64)

    def check(self, labels_of, num_classes):
        """Raises UserError where a label or a selected row is out of range. labels_of: shard number -> name for the message."""
        for shard, labels in enumerate(self.labels):
            if not _within(labels, num_classes):
                raise UserError(f"{labels_of(shard)}: labels outside 0..{num_classes - 1}")
        n = sum(map(len, self.labels))
        if self.rows is not None and (len(self.rows) == 0 or not _within(self.rows, n)):
            raise UserError(f"{self.rows.filename}: empty, or rows outside 0..{n - 1}")


def _within(array, limit):
    """Whether all entries of a mapped array lie in 0..limit-1; its pages are given back as it goes."""
    for start in range(0, len(array), 1 << 20):
        part = array[start : start + (1 << 20)]
        if part.min() < 0 or part.max() >= limit:
            return False
        array._mmap.madvise(mmap.MADV_DONTNEED)
    return True


class _Rows:
    """The rows of mapped arrays of equal rows, `shard_size` of them in each array, read from their files.

    Not through the mapping: there, a row of 3 kB may read 8 MB from disk and map 2 MB, and a file cut short ends the process.
    """

    def __init__(self, arrays, shard_size):
        self.arrays, self.shard_size = arrays, shard_size
        self.files = [open(array.filename, "rb", buffering=0) for array in arrays]

    def __getitem__(self, rows):
        like, size = self.arrays[0], self.arrays[0][:1].nbytes
        order = np.argsort(rows, kind="stable")  # each shard from its beginning to its end
        places = zip(*(numbers.tolist() for numbers in np.divmod(rows[order], self.shard_size)))
        places = [(self.files[shard], self.arrays[shard].offset + row * size) for shard, row in places]
        if hasattr(os, "posix_fadvise"):  # not on macOS; all are asked for before the first is waited for
            for file, start in places:
                os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        found = np.empty((len(rows), size), np.uint8)
        for place, (file, start) in zip(order, places):
            if os.preadv(file.fileno(), [found[place]], start) < size:
                raise UserError(f"{file.name}: truncated since it was opened")
        return found.view(like.dtype).reshape(len(rows), *like.shape[1:])


def open_shards(directory, spec):
    """The Source of a directory that generate_synthetic.py wrote, every shard opened and checked.

    Raises UserError where a file is missing or broken, or does not fit the data set `spec` (common.data.Spec).
    """
    manifest_path = os.path.join(directory, "manifest.json")
    manifest = checkpoint.read_json(manifest_path)
    if manifest.get("format") != 2:
        raise UserError(f"{manifest_path}: format {manifest.get('format')}, expected 2; generate the set again")
    for key, low in (("n", 1), ("shard_size", 1), ("held_out", 0)):
        if not isinstance(manifest.get(key), int) or manifest[key] < low:
            raise UserError(f"{manifest_path}: '{key}' is {manifest.get(key)}, expected a whole number of at least {low}")
    shape = manifest.get("image_shape")
    _check_fits(directory, manifest.get("dataset"), shape, manifest.get("num_classes"), spec)
    n, shard_size, images, labels = manifest["n"], manifest["shard_size"], [], []
    allow_open_files(4 * -(-n // shard_size), directory)
    for shard in range(-(-n // shard_size)):
        size = min(shard_size, n - shard * shard_size)
        images_path, labels_path = shard_paths(directory, shard)
        images.append(checkpoint.open_npy(images_path, np.uint8, (size, *shape)))
        labels.append(checkpoint.open_npy(labels_path, np.int64, (size,)))
    rows, hashed = None, [manifest_path]  # None: all of them, without an array that says so
    if "selection" in manifest:
        hashed.append(os.path.join(directory, "selection.npy"))
        rows = checkpoint.open_npy(hashed[-1], np.int64, (None,))
    source = Source(images, labels, shard_size, rows, manifest["held_out"], [checkpoint.sha256(path) for path in hashed])
    source.manifest = manifest
    source.check(lambda shard: shard_paths(directory, shard)[1], spec.num_classes)
    return source


def allow_open_files(n, directory):
    """A shard stays open, mapped and to be read: raise this process's limit where `n` more files would pass it, if we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/dev/fd")) + n + 512  # 512 for whatever else the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            if hard != resource.RLIM_INFINITY and hard < wanted:
                raise ValueError
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # above the hard limit; or there is none, and it is above the kernel's own
            limit = "fewer" if hard == resource.RLIM_INFINITY else hard
            raise UserError(
                f"{directory}: needs {n} open files, this system allows a process {limit}; generate with a larger --shard-size"
            ) from None


def _check_fits(path, dataset, shape, num_classes, spec):
    wanted = [spec.image_size, spec.image_size, spec.channels]
    # Where images are cropped and resized in training, a set of another size will do (DiT's 256 pixels for 224).
    shape_fits = shape == wanted or (
        spec.files
        and isinstance(shape, list)
        and all(isinstance(size, int) and size >= 32 for size in shape[:2])
        and shape[2:] == [spec.channels]
    )
    if not shape_fits or (dataset, num_classes) != (spec.name, spec.num_classes):
        raise UserError(
            f"--synthetic {path}: images of {dataset}, {shape}, {num_classes} classes; expected "
            f"{spec.name}, {wanted}, {spec.num_classes} classes"
        )


# ---------------------------------------------------------------------------------------- the published .npz files


_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError)  # what zipfile raises then


def open_npz(path, spec):
    """The Source of an .npz file with the arrays `image` (N, H, W, C) uint8 and `label` (N,), as DM-AT published them.

    Uncompressed members are mapped where they lie in the file; compressed ones must have been unpacked by `prepare`.
    """
    members = _members(path)
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        source = open_shards(unpacked(path), spec)
        if source.manifest.get("npz") != _identity(members):
            raise UserError(f"{unpacked(path)}: was unpacked from another {os.path.basename(path)}; remove it")
        return source
    found = []  # (shape, dtype, where its numbers begin) of either array
    with open(path, "rb") as file:
        for name, info in members.items():
            file.seek(info.header_offset)
            start = file.read(30)
            if start[:4] != b"PK\x03\x04" or len(start) < 30:
                raise UserError(f"{path}: broken, array '{name}' is not where the archive's directory says")
            file.seek(sum(struct.unpack("<HH", start[26:])), os.SEEK_CUR)  # its name, and more
            shape, dtype = _read_header(file, path, info)
            found.append((shape, dtype, file.tell()))
    _check_arrays(path, *found[0][:2], *found[1][:2], spec)
    if any(start + math.prod(shape) * dtype.itemsize > os.path.getsize(path) for shape, dtype, start in found):
        raise UserError(f"{path}: truncated, it ends in the middle of an array")
    images, labels = (np.memmap(path, dtype, "r", start, shape) for shape, dtype, start in found)
    source = Source([images], [labels], len(labels), None, 0, _identity(members))
    source.check(lambda shard: path, spec.num_classes)
    return source


def unpacked(path):
    """Where `prepare` puts the shards of a compressed .npz file."""
    return f"{path}.unpacked"


def unpack(path, spec, shard_size=250_000):
    """Stream a compressed .npz file into shards beside it, once. The manifest comes last: without one, it starts over."""
    members, out_dir = _members(path), unpacked(path)
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        os.makedirs(out_dir, exist_ok=True)
        checkpoint.make_once(os.path.join(out_dir, "manifest.json"), lambda: _unpack(path, members, spec, shard_size, out_dir))


def _unpack(path, members, spec, shard_size, out_dir):
    try:
        with zipfile.ZipFile(path) as archive, archive.open(members["image"]) as images, archive.open(members["label"]) as labels:
            image_shape, image_type = _read_header(images, path, members["image"])
            label_shape, label_type = _read_header(labels, path, members["label"])
            _check_arrays(path, image_shape, image_type, label_shape, label_type, spec)
            for shard in range(-(-image_shape[0] // shard_size)):
                size = min(shard_size, image_shape[0] - shard * shard_size)
                images_path, labels_path = shard_paths(out_dir, shard)
                _copy(images, np.uint8, (size, *image_shape[1:]), image_type, images_path)
                _copy(labels, np.int64, (size,), label_type, labels_path)
    except _BROKEN_ZIP as error:
        raise UserError(f"{path}: truncated or broken ({error})") from None
    manifest = {"format": 2, "dataset": spec.name, "n": image_shape[0], "num_classes": spec.num_classes, "held_out": 0}
    manifest |= {"image_shape": list(image_shape[1:]), "shard_size": shard_size, "npz": _identity(members)}
    checkpoint.write_json(manifest, os.path.join(out_dir, "manifest.json"))


def _copy(stream, dtype, shape, found, path):
    """The next array of `shape` in the stream, of type `found`, into an .npy file of type `dtype`; 64 MiB at a time."""
    row = int(np.prod(shape[1:])) * found.itemsize
    step = max(1, (64 << 20) // row)
    with checkpoint.atomic(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], step):
            wanted = min(step, shape[0] - start) * row
            content = stream.read(wanted)
            if len(content) < wanted:
                raise EOFError("it ends in the middle of an array")
            file.write(np.frombuffer(content, found).astype(dtype).tobytes())


def _members(path):
    """{"image": ZipInfo, "label": ZipInfo} of an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {info.filename: info for info in archive.infolist()}
        if any(info.header_offset < 0 for info in found.values()):
            raise zipfile.BadZipFile("array before the beginning of the file")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, *_BROKEN_ZIP) as error:
        raise UserError(f"{path}: truncated or not an .npz file ({error})") from None
    if not {"image.npy", "label.npy"} <= found.keys():
        raise UserError(f"{path}: has arrays {sorted(found)[:5]}, expected 'image' and 'label'")
    members = {"image": found["image.npy"], "label": found["label.npy"]}
    for name, info in members.items():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise UserError(f"{path}: array '{name}' is encrypted or compressed by another method than NumPy's")
    return members


def _identity(members):
    """Checksum and size of each array, as the archive's directory has them: the content without a pass over it."""
    return json.loads(json.dumps({name: [info.CRC, info.file_size] for name, info in members.items()}))


def _read_header(file, path, info):
    """(shape, dtype) from the header of an .npy stream, the member `info` of `path`, which is left at its first number."""
    what, begin = f"{path}, array '{info.filename[:-4]}'", file.tell()
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # zipfile's and zlib's, and NumPy lets through what Python's tokenizer and parser raise
        raise UserError(f"{what}: not an .npy array ({' '.join(str(error).split())[:100] or type(error).__name__})") from None
    if fortran_order or dtype.hasobject:
        raise UserError(f"{what}: Python objects or Fortran order, expected plain rows of numbers")
    if file.tell() - begin + math.prod(shape) * dtype.itemsize != info.file_size:
        raise UserError(f"{what}: {dtype} {shape} is not what lies in its {info.file_size} bytes")
    return shape, dtype


def _check_arrays(path, image_shape, image_type, label_shape, label_type, spec):
    if (
        image_type != np.uint8
        or len(image_shape) != 4
        or label_type.kind not in "iu"
        or label_shape != image_shape[:1]
        or image_shape[0] < 1
    ):
        raise UserError(
            f"{path}: image {image_type} {image_shape}, label {label_type} {label_shape}; expected uint8 (N, H, W, C) and integers (N,)"
        )
    _check_fits(path, spec.name, list(image_shape[1:]), spec.num_classes, spec)


# --------------------------------------------------------------------------------------------------- several sets


def parse_source(text):
    """(path, share or None) of `PATH` or `PATH=SHARE`."""
    path, equals, share = text.rpartition("=")
    try:
        return (path, ratio(share)) if equals and not os.path.exists(text) else (text, None)
    except argparse.ArgumentTypeError:  # the path itself has an equals sign
        return text, None


def prepare(sources, spec):
    """Unpack what is compressed. For rank 0, before the others open the sets."""
    for text in sources:
        path, _ = parse_source(text)
        if path.endswith(".npz"):
            unpack(path, spec)


class SyntheticSet:
    """The union of several sources, written PATH or PATH=SHARE (directory or .npz file), as one range of indices.

    Without shares, images are drawn uniformly from the union; with them, a source's share of the drawn images is its share
    of their sum.
    """

    def __init__(self, sources, spec):
        parsed = [parse_source(text) for text in sources]
        shares = [share for _, share in parsed]
        if any(share is None for share in shares) and any(share is not None for share in shares):
            raise UserError(f"--synthetic {' '.join(sources)}: give a share to all sources or to none")
        if shares[0] is not None and (min(shares) < 0 or sum(shares) == 0):
            raise UserError(f"--synthetic {' '.join(sources)}: expected shares of at least 0 and not all 0")
        self.shares = None if shares[0] is None else torch.tensor(shares, dtype=torch.float64)
        self.sources = [(open_npz if path.endswith(".npz") else open_shards)(path, spec) for path, _ in parsed]
        self.starts = np.cumsum([0] + [len(source) for source in self.sources])
        if len({source.images[0].shape[1:] for source in self.sources}) > 1 and not spec.files:
            raise UserError(f"--synthetic {' '.join(sources)}: images of different sizes")
        self.held_out = min(source.held_out for source in self.sources)
        self.identity = [source.identity for source in self.sources]

    def __len__(self):
        return int(self.starts[-1])

    def draw(self, n, generator):
        """n indices, with replacement, int64 (n,)."""
        if self.shares is None:
            return torch.randint(len(self), (n,), generator=generator)
        which = torch.multinomial(self.shares, n, replacement=True, generator=generator)
        sizes = torch.from_numpy(np.diff(self.starts))
        offsets = (torch.rand(n, generator=generator, dtype=torch.float64) * sizes[which]).long()
        return torch.from_numpy(self.starts)[which] + offsets

    def gather(self, indices):
        """Images uint8 (B, H, W, C) and labels int64 (B,) of the given indices."""
        if len(self.sources) == 1:
            return self.sources[0].gather(indices)
        which = np.searchsorted(self.starts, indices, side="right") - 1
        shape = self.sources[which[0]].images[0].shape[1:]  # the same in all of them, or there is one index alone (image files)
        images, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int64)
        for number in np.unique(which):
            places = np.flatnonzero(which == number)
            images[places], labels[places] = self.sources[number].gather(np.asarray(indices)[places] - self.starts[number])
        return images, labels
