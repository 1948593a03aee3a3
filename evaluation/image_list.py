"""An evaluation on listed images alone, such as the 5,000 of ImageNet that RobustBench takes.

Reading and decoding of image files is in published/image_files.py.
"""

import os

from common import UserError, files


def select_listed(images, labels, path):
    """The (ImageFiles, labels) of the images that a text file names, in its order.

    images: published.image_files.ImageFiles. labels: (N,). path: a file with one
    <class folder>/<file> a line. Raises UserError where the list cannot be read, is empty, or names
    an unknown image, or one twice.
    """
    rows = {}
    for row, image_path in enumerate(images.paths):
        folder, name = image_path.split(os.sep)[-2:]
        rows.setdefault(f"{folder}/{name}", []).append(row)
    lines = files.read_text(path, "a list of image files").splitlines()
    chosen = []
    seen = set()
    for name in [line.strip() for line in lines if line.strip()]:
        if name not in rows:
            raise UserError(f"{path}: {name[:100]!r} is not among the images of the data set")
        if len(rows[name]) > 1:
            raise UserError(f"{path}: {name[:100]!r} stands for {len(rows[name])} images")
        if name in seen:
            raise UserError(f"{path}: {name[:100]!r} is there twice")
        seen.add(name)
        chosen += rows[name]
    if not chosen:
        raise UserError(f"{path}: empty, expected a list of image files")
    return images.part(chosen), labels[chosen]
