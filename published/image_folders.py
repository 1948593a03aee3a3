"""Images in class folders: the order of the labels, the order of the images, small ones decoded.

Which data sets lie in folders, and where, stands in published/datasets.py. How one file is decoded
stands in published/image_files.py.
"""

import hashlib
import os
import unicodedata
from functools import partial

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UserError, cli, files
from published.image_files import ImageFiles, check_images

ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")
TEST_FRACTION = 0.1  # of the images of a folder that has no test split

# What file managers and archives leave behind. Names that begin with a dot are left out too.
LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
LEFT_BEHIND += ("Thumbs.db", "desktop.ini")


def _is_hidden(name):
    return name.startswith(".") or name in LEFT_BEHIND


# ----------------------------------------------------------------------------------- class folders


def class_folders(root):
    """{class name: path} of the folders in `root`, sorted by name: a label is a place in it.

    Hidden folders are left out. Raises FileNotFoundError where there is no `root`, UserError where
    it has no class folder.
    """
    with os.scandir(root) as entries:
        found = [entry for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]
    if not found:
        raise UserError(f"{root}: no class folders, expected one folder of images per class")
    paths = {_composed(entry.name): entry.path for entry in found}
    if len(paths) < len(found):
        raise UserError(f"{root}: two class folders of one name, in different forms of Unicode")
    return dict(sorted(paths.items()))


def _composed(name):
    """A name in one form of Unicode: macOS writes letters in another form than Linux does."""
    return unicodedata.normalize("NFC", name)


def check_classes(root, folders, classes):
    """Raises UserError where the class folders of `root` are not named as `classes`, a list.

    One that is missing, or one too many, would give all classes behind it another label.
    """
    missing = [name for name in classes if name not in folders]
    unknown = sorted(folders.keys() - set(classes))
    if not missing and not unknown:
        return
    differences = []
    if missing:
        differences.append(f"lacks {_some(missing)}")
    if unknown:
        differences.append(f"has {_some(unknown)} besides")
    expected = f"{len(classes)} class folders: {_some(classes)}"
    raise UserError(f"{root}: {' and '.join(differences)}; expected {expected}")


def _some(names):
    """The first three of some names, and how many more there are."""
    shown = ", ".join(cli.printable(name[:40]) for name in list(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


# ------------------------------------------------------------------------------------------ images


def labelled_images(root, folders):
    """(paths, labels int64 (N,)) of the images in class folders, in the order of by_hash.

    folders: of class_folders. root: the paths count from there.
    """
    paths = []
    labels = []
    for label, folder in enumerate(folders.values()):
        found = _images_in(folder)
        if not found:
            endings = ", ".join(ENDINGS)
            raise UserError(f"{folder}: a class folder without images ({endings})")
        paths += found
        labels += [label] * len(found)
    return by_hash(paths, labels, root)


def _images_in(folder):
    """Paths of the images in a folder and in those below it, but for hidden ones."""
    return [path for path in _files_in(folder) if _is_image(path)]


def _files_in(folder):
    """Paths of all files in a folder and in those below it, but for hidden ones."""
    paths = []
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:  # a link in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        paths += [os.path.join(place, name) for name in names if not _is_hidden(name)]
    return paths


def _is_image(path):
    return path.lower().endswith(ENDINGS)


def by_hash(paths, labels, root):
    """Sort paths and labels by a hash of the path below root: (paths, labels int64 (N,)).

    That mixes the classes in one order on every machine, so that the first images can be held out.
    """
    order = sorted(range(len(paths)), key=lambda i: _digest(paths[i], root))
    return [paths[i] for i in order], np.array([labels[i] for i in order], np.int64)


def _digest(path, root):
    return hashlib.sha256(os.fsencode(_composed(os.path.relpath(path, root)))).digest()


def held_out_for_tests(paths, root):
    """How many of the paths, sorted by hash, are for tests where there is no test split.

    An image stays on its side when others are added or removed.
    """
    limit = int(TEST_FRACTION * 2**64)
    return sum(int.from_bytes(_digest(path, root)[:8], "big") < limit for path in paths)


# ------------------------------------------------------------------------------------ decoded once


def decode_once(images):
    """An ImageFiles as one array uint8 (N, H, W, 3), decoded into the cache and mapped from there.

    So the processes of a node share one copy in memory. Other paths, sizes or times of the files
    make another copy. (The time of a file's last change of any kind cannot be set back.)
    """
    identity = f"{images.resize} {images.size}\n".encode()
    identity += images.names_and_sizes(on_this_machine=True)
    path = files.cached(f"images-{hashlib.sha256(identity).hexdigest()[:32]}.npy")
    files.make_once(path, partial(_write_decoded, images, path))
    try:
        files.open_npy(path, np.uint8, (len(images), images.size, images.size, 3))
    except UserError as error:
        raise UserError(f"{error}; delete it, it is made again") from error
    # Mapped copy-on-write, since torch warns of a read-only array.
    return np.load(path, mmap_mode="c")


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
            rows = slice(start, start + 1000)
            try:
                file.write(images[rows].tobytes())
            except UserError:
                check_images([images])  # which names all that are broken
                raise


# --------------------------------------------------------------------------------- anyone's images

MAX_DECODED = 64  # pixels; larger images stay in their files
TEST_NAMES = ("test", "tests", "testing", "val", "valid", "validation")  # of the test split


def read_folder(data_dir, train, image_size):
    """The reader of `--dataset folder`: data_dir/train/<class>/... and data_dir/test/<class>/...

    Images are resized to image_size pixels on the shorter side and cropped to the middle. Without
    a test split, TEST_FRACTION of the training images are for tests.
    Raises UserError where the two splits differ in their classes.
    """
    paths, labels = _split_of_folder(data_dir, train)
    if image_size <= MAX_DECODED:
        return decode_once(ImageFiles(paths, resize=image_size, size=image_size)), labels
    # The usual view for tests, as ImageNet's: 256 pixels, of which 224 are kept.
    return ImageFiles(paths, resize=round(image_size * 256 / 224), size=image_size), labels


def describe_folder(data_dir):
    """(class names, number of training images) of a folder that read_folder reads.

    Says so where there is no test split.
    """
    train_root = os.path.join(data_dir, "train")
    test_root = _test_root(data_dir)
    if test_root and not os.path.isdir(train_root):
        return tuple(class_folders(test_root)), 0
    folders = class_folders(train_root)
    paths, _ = labelled_images(train_root, folders)
    n_train = len(paths)
    if test_root is None:
        n_tests = held_out_for_tests(paths, train_root)
        if not 0 < n_tests < n_train:
            few = f"too few images ({n_train}) to hold some out for tests"
            raise UserError(f"{train_root}: {few}; put some into {data_dir}/test/")
        n_train -= n_tests
        held_out = f"{TEST_FRACTION:.0%} of train/ ({n_tests:,} images) is held out for tests"
        print(f"note: {data_dir}: no test/; {held_out}, by hash of the path")
    _note_left_out(data_dir, folders)
    return tuple(folders), n_train


def _note_left_out(data_dir, folders):
    """Say how many files in class folders are no images that are read, such as HEIC."""
    others = []
    for folder in folders.values():
        others += [path for path in _files_in(folder) if not _is_image(path)]
    if others:
        kinds = _some(sorted({os.path.splitext(path)[1].lower() for path in others}))
        print(f"note: {data_dir}: {len(others)} files in train/ are left out, no images: {kinds}")


def _split_of_folder(data_dir, train):
    """(paths, labels) of one split."""
    train_root = os.path.join(data_dir, "train")
    test_root = _test_root(data_dir)
    if test_root and not train and not os.path.isdir(train_root):
        return labelled_images(test_root, class_folders(test_root))  # to evaluate, that is enough
    folders = class_folders(train_root)
    if len(folders) < 2:
        raise UserError(f"{train_root}: one class folder, {_some(folders)}; expected at least two")
    if test_root:
        test_folders = class_folders(test_root)
        check_classes(test_root, test_folders, list(folders))
        if not train:
            return labelled_images(test_root, test_folders)
    paths, labels = labelled_images(train_root, folders)
    if test_root:
        return paths, labels
    n_tests = held_out_for_tests(paths, train_root)
    part = slice(n_tests, None) if train else slice(n_tests)
    return paths[part], labels[part]


def split_root(data_dir, train):
    """The folder of a split. Raises FileNotFoundError where there is none."""
    root = os.path.join(data_dir, "train") if train else _test_root(data_dir)
    if root is None:
        raise FileNotFoundError(os.path.join(data_dir, TEST_NAMES[0]))
    return root


def _test_root(data_dir):
    """The folder of the test split, the first of TEST_NAMES that has class folders; None without.

    Raises UserError where another folder has those of train/: images would be left out unnoticed.
    """
    with os.scandir(data_dir) as entries:
        found = [entry for entry in entries if entry.is_dir() and not _is_hidden(entry.name)]
    splits = {}
    for entry in found:
        if any(inner.is_dir() and not _is_hidden(inner.name) for inner in os.scandir(entry.path)):
            splits[entry.name.lower()] = entry.path
    for name in TEST_NAMES:
        if name in splits:
            return splits[name]
    train = splits.pop("train", None)
    classes = class_folders(train) if train else {}
    for path in splits.values():
        if classes and any(os.path.isdir(os.path.join(path, name)) for name in classes):
            raise UserError(f"{path}: has class folders of train/; name it test/, or move it away")
    return None
