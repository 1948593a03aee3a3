"""Opening synthetic sets: directories of generate_synthetic.py, and .npz files as DM-AT published.

How a set is read and drawn from stands in published/synthetic_set.py.
"""

import argparse
import hashlib
import math
import os
import zipfile
from dataclasses import dataclass

import numpy as np

from common import UserError, files
from common.cli import ratio
from published.synthetic_set import Source, SyntheticSet, check_fits, open_shards

# ------------------------------------------------------------------------- the published .npz files


@dataclass
class _Member:
    """An array inside an .npz file, from the archive's directory and the array's own header."""

    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple
    offset: int  # where its numbers begin in the file, if it is not compressed


def open_npz(path, spec):
    """The Source of an .npz file as DM-AT published them: `image` (N, H, W, C), `label` (N,).

    Arrays that are not compressed are mapped where they lie in the file; compressed ones are
    unpacked into the cache, once. Raises UserError where the file is missing, broken or does not
    fit.
    """
    name = path
    members = _read_members(path, spec)
    if any(member.info.compress_type != zipfile.ZIP_STORED for member in members):
        path = _unpack(path, members)
        members = _read_members(path, spec)
    arrays = []
    for member in members:
        with files.reading(path, "a whole .npz file"):
            arrays.append(np.memmap(path, member.dtype, "r", member.offset, member.shape))
    images, labels = arrays
    source = Source([images], [labels], shard_size=len(labels))
    source.check(spec.num_classes, name)
    return source


def _read_members(path, spec):
    """The _Members [image, label] of an .npz file. Raises UserError where they do not fit."""
    expected = "an .npz file"
    with files.reading(path, expected), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if "image.npy" not in names or "label.npy" not in names:
            raise UserError(f"{path}: has arrays {sorted(names)[:5]}, expected 'image' and 'label'")
        image = _read_member(path, file, archive, "image")
        label = _read_member(path, file, archive, "label")
    is_image = image.dtype == np.uint8 and len(image.shape) == 4 and image.shape[0] >= 1
    if not is_image or label.dtype.kind not in "iu" or label.shape != image.shape[:1]:
        arrays = f"image {image.dtype} {image.shape}, label {label.dtype} {label.shape}"
        raise UserError(f"{path}: {arrays}; expected uint8 (N, H, W, C) and integers (N,)")
    check_fits(path, spec.name, list(image.shape[1:]), spec.num_classes, spec)
    return [image, label]


def _read_member(path, file, archive, name):
    """The _Member of one array. file: the open file of the archive."""
    title = f"{path}, array '{name}'"
    info = archive.getinfo(f"{name}.npy")
    if info.flag_bits & 1:
        raise UserError(f"{title}: is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{title}: compressed by another method than NumPy's")
    with files.reading(title, "an .npy array"), archive.open(info) as stream:
        start = file.tell()  # zipfile has just read the record that stands before the array
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        else:
            header = np.lib.format.read_array_header_2_0(stream)
        header_size = stream.tell()
    shape, fortran_order, dtype = header
    if fortran_order or dtype.hasobject:
        raise UserError(f"{title}: Python objects or Fortran order, expected plain rows of numbers")
    if header_size + math.prod(shape) * dtype.itemsize != info.file_size:
        content = f"is not what lies in its {info.file_size} bytes"
        raise UserError(f"{title}: {dtype} {shape} {content}")
    return _Member(info, dtype, shape, start + header_size)


def _unpack(path, members):
    """The path of an .npz file in the cache that holds the same arrays without compression.

    Its name is made of the checksums and sizes that the archive has: no pass over the content.
    """
    sums = [(member.info.CRC, member.info.file_size) for member in members]
    digest = hashlib.sha256(repr(sums).encode()).hexdigest()[:32]
    target = files.cached(f"unpacked-{digest}.npz")
    files.make_once(target, lambda: _copy_members(path, members, target))
    return target


def read_npz(path, spec):
    """(images, labels) of an .npz file as open_npz takes it: mapped, and int64."""
    source = open_npz(path, spec)
    return source.images[0], source.labels[0].astype(np.int64)


def _copy_members(path, members, target):
    """Write the unpacked file `target`, a part at a time."""
    part_size = 16 << 20
    with (
        zipfile.ZipFile(path) as archive,
        files.atomic(target) as file,
        zipfile.ZipFile(file, "w") as copy,
    ):
        for member in members:
            name = member.info.filename
            with archive.open(name) as source, copy.open(name, "w", force_zip64=True) as written:
                for _ in range(0, member.info.file_size, part_size):
                    with files.reading(path, "an .npz file"):
                        part = source.read(part_size)
                    written.write(part)


# ------------------------------------------------------------------------------------- several sets


def parse_source(text):
    """(path, share or None) of `PATH` or `PATH=SHARE`."""
    path, equals, share = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, None
    try:
        return path, ratio(share)
    except argparse.ArgumentTypeError:  # the path itself has an equals sign
        return text, None


def open_synthetic(texts, spec):
    """The SyntheticSet of sources written PATH or PATH=SHARE, directories or .npz files.

    Raises UserError where a source is missing or broken, or sources do not fit each other or the
    data set `spec`.
    """
    parsed = [parse_source(text) for text in texts]
    shares = [share for _, share in parsed]
    if all(share is None for share in shares):
        shares = None
    elif None in shares:
        raise UserError(f"{' '.join(texts)}: give a share to all sources or to none")
    elif min(shares) < 0 or sum(shares) == 0:
        raise UserError(f"{' '.join(texts)}: expected shares of at least 0 and not all 0")
    sources = []
    for path, _ in parsed:
        open_source = open_npz if path.endswith(".npz") else open_shards
        sources.append(open_source(path, spec))
    shapes = {source.images[0].shape[1:] for source in sources}
    if len(shapes) > 1 and not spec.files:
        raise UserError(f"{' '.join(texts)}: images of different sizes")
    return SyntheticSet(sources, shares)
