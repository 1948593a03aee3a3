"""The data sets: what is known of each, and how its files are read.

Images in class folders stand in published/image_folders.py; batches, crops and held-out images in
common/data.py.
"""

import dataclasses
import gzip
import http.client
import os
import pickle
from functools import partial

import numpy as np
import scipy.io
import torchvision
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST

from common import UserError, data, files, run
from common.data import Spec
from published import image_folders
from published.image_files import FileBatches, ImageFiles
from published.image_folders import (
    by_hash,
    check_classes,
    class_folders,
    decode_once,
    labelled_images,
    read_folder,
)
from published.synthetic import read_npz

# ------------------------------------------------------------------------------------------ readers
# Each reader takes (data_dir, train) and returns (images, labels). It raises FileNotFoundError
# where the data set is not there, and UserError where it is broken or another one.


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


def _check_md5(path, md5, any_checksum):
    """Raises FileNotFoundError where there is no file, UserError where it is not the published one.

    any_checksum: whether another file will do.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    if any_checksum or torchvision.datasets.utils.check_md5(path, md5):
        return
    message = "another checksum (MD5) than the published file's, it is altered or broken"
    raise UserError(f"{path}: {message}; --ignore-checksum reads it all the same")


class _Arrays(pickle.Unpickler):
    """Unpickles NumPy's arrays, lists and texts. What else a pickle asks for is refused."""

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full == "numpy.core.multiarray._reconstruct":
            return np.zeros(0).__reduce__()[0]
        if full == "numpy.core.numeric._frombuffer":
            return lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype).reshape(shape)
        if full == "_codecs.encode":
            return lambda text, encoding: text.encode("latin1")
        if full in ("numpy.ndarray", "numpy.dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused, asks for {module}.{name}")


def _read_cifar(dataset, classes, data_dir, train, any_checksum=False):
    """The published archive, unpacked, or its images in class folders below train/ and test/."""
    folder = os.path.join(data_dir, dataset.base_folder)
    if not os.path.isdir(folder) or not os.listdir(folder):
        return _read_cifar_folders(data_dir, train, classes)
    parts = []
    labels = []
    for name, md5 in dataset.train_list if train else dataset.test_list:
        path = os.path.join(folder, name)
        _check_md5(path, md5, any_checksum)
        with files.reading(path, "a batch of CIFAR's images"), open(path, "rb") as file:
            batch = _Arrays(file, encoding="latin1").load()
            parts.append(np.asarray(batch["data"]).reshape(-1, 3, 32, 32))
            labels += batch["labels" if len(classes) == 10 else "fine_labels"]
        fits = parts[-1].dtype == np.uint8 and sum(map(len, parts)) == len(labels)
        if not fits or not all(type(y) is int and 0 <= y < len(classes) for y in labels):
            raise UserError(f"{path}: its images or labels are not those of {dataset.__name__}")
    images = np.concatenate(parts).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _read_cifar_folders(data_dir, train, classes):
    """Images of 32 x 32 pixels in train/<class>/ and test/<class>/, of data_dir or a folder in it.

    Raises FileNotFoundError where there are none.
    """
    roots = [data_dir]
    if not _has_classes(data_dir, classes):
        roots = [root for root in _folders_of(data_dir).values() if _has_classes(root, classes)]
    if not roots:
        raise FileNotFoundError(data_dir)
    if len(roots) > 1:
        raise UserError(f"--data-dir {data_dir}: class folders in {' and '.join(roots)}; name one")
    root = image_folders.split_root(roots[0], train)
    folders = class_folders(root)
    check_classes(root, folders, classes)
    paths, labels = labelled_images(root, folders)
    return decode_once(ImageFiles(paths, resize=None, size=32)), labels


def _folders_of(root):
    """class_folders of root; {} where it has none."""
    try:
        return class_folders(root)
    except UserError:
        return {}


def _has_classes(root, classes):
    """Whether train/ in a folder has a class folder of one of these names."""
    return any(os.path.isdir(os.path.join(root, "train", name)) for name in classes)


def _read_svhn(data_dir, train, any_checksum=False):
    _, name, md5 = SVHN.split_list["train" if train else "test"]
    path = os.path.join(data_dir, name)
    _check_md5(path, md5, any_checksum)
    with files.reading(path, "a MATLAB file of SVHN's images"):
        content = scipy.io.loadmat(path)
        images, digits = content["X"], content["y"].astype(np.int64).flatten()
    fits = images.dtype == np.uint8 and images.shape == (32, 32, 3, len(digits))
    if not fits or digits.min() < 1 or digits.max() > 10:
        raise UserError(f"{path}: its images or digits are not those of SVHN")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), digits % 10  # 10 is the digit 0


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
    """Tiny ImageNet: the published folders, val/ also in class folders, or DM-AT's .npz files.

    The test set has no labels; the 10,000 validation images serve.
    """
    root = os.path.join(data_dir, "tiny-imagenet-200")
    root = root if os.path.isdir(root) else data_dir
    arrays = [os.path.join(root, name) for name in ("train.npz", "val.npz")]
    if any(map(os.path.exists, arrays)):
        if not all(map(os.path.exists, arrays)):  # another layout may number the classes otherwise
            raise FileNotFoundError(arrays)
        images, labels = read_npz(arrays[not train], DATASETS["tiny-imagenet"])
        # They may be sorted by class, and the first ones are held out.
        order = np.random.default_rng(0).permutation(len(labels))
        return images[order], labels[order]
    train_root = os.path.join(root, "train")
    folders = class_folders(train_root)
    if len(folders) != 200:
        raise UserError(f"{train_root}: {len(folders)} class folders, expected 200")
    listed = os.path.join(root, "wnids.txt")
    if os.path.exists(listed):
        check_classes(train_root, folders, sorted(files.read_text(listed).split()))
    elif os.path.isdir(os.path.join(root, "val")):
        _tiny_imagenet_val(root, list(folders))  # which has the same classes, or says so
    if train:
        paths, labels = labelled_images(root, folders)
    else:
        paths, labels = _tiny_imagenet_val(root, list(folders))
    return decode_once(ImageFiles(paths, resize=None, size=64)), labels


def _tiny_imagenet_val(root, classes):
    """(paths, labels) of val/, by its annotations or in class folders. classes: those of train/."""
    val = os.path.join(root, "val")
    annotations = os.path.join(val, "val_annotations.txt")
    flat = os.path.join(val, "images")
    for place in (val, flat):
        wnids = {}
        if os.path.isdir(place) and any(os.scandir(place)):
            wnids = {name: path for name, path in _folders_of(place).items() if name != "images"}
        if wnids:
            check_classes(place, wnids, classes)
            return labelled_images(root, wnids)
    if not os.path.exists(annotations):
        raise FileNotFoundError(annotations)
    paths = []
    labels = []
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    for line in files.read_text(annotations, "the published annotations").splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            found = f"a line of the class '{wnid[:40]}', which train/ does not have"
            raise UserError(f"{annotations}: not the published annotations, {found}")
        paths.append(os.path.join(flat, name))
        labels.append(label_of[wnid])
    if not paths:
        raise UserError(f"{annotations}: empty, expected the published annotations")
    return by_hash(paths, labels, root)


def _download_tiny_imagenet(data_dir):
    torchvision.datasets.utils.download_and_extract_archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        data_dir,
        md5="90528d7ca1a48142e341f4ef8d21d0de",
    )


IMAGENET_CLASSES = os.path.join(os.path.dirname(__file__), "imagenet_classes.txt")  # WordNet's ids


def _read_imagenet(data_dir, train):
    """ILSVRC-2012 in class folders below train/ and val/; the validation images serve for tests."""
    root = os.path.join(data_dir, "train" if train else "val")
    folders = class_folders(root)
    check_classes(root, folders, files.read_text(IMAGENET_CLASSES).split())
    paths, labels = labelled_images(root, folders)
    return ImageFiles(paths, resize=256, size=224), labels


# --------------------------------------------------------------------------------------- data sets

# Radii of CIFAR-10 and of ImageNet in Croce & Hein, arXiv 2105.12508, on three norms at once.
_EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
_EPS_LARGE = {"linf": 4 / 255, "l2": 2.0, "l1": 255.0}  # of images of ImageNet's size

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

DATASETS = {
    "digits": Spec(
        name="digits",
        image_size=8,
        channels=1,
        num_classes=10,
        mean=(0.305,),
        std=(0.375,),
        eps={"linf": 0.15, "l2": 0.5, "l1": 1.5},
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
        eps={"linf": 0.1, "l2": 1.5, "l1": 15.0},
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
        classes=tuple(CIFAR10_CLASSES.split()),
        read=partial(_read_cifar, CIFAR10, CIFAR10_CLASSES.split()),
        download=partial(CIFAR10, download=True),
        wanted="cifar-10-batches-py/ (from cifar-10-python.tar.gz), or train/ and test/ with "
        "class folders,",
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
        classes=tuple(CIFAR100_CLASSES.split()),
        read=partial(_read_cifar, CIFAR100, CIFAR100_CLASSES.split()),
        download=partial(CIFAR100, download=True),
        wanted="cifar-100-python/ (from cifar-100-python.tar.gz), or train/ and test/ with "
        "class folders,",
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
        wanted="tiny-imagenet-200/ (from tiny-imagenet-200.zip), or train.npz and val.npz,",
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
        eps=_EPS_LARGE,
        read=_read_imagenet,
        wanted="train/ and val/ with one folder of JPEGs per class (ILSVRC-2012)",
        batches=FileBatches,
        flip=True,
    ),
    "folder": Spec(  # what depends on --image-size and on the folder: see open_dataset
        name="folder",
        image_size=0,
        channels=3,
        num_classes=0,
        mean=None,
        std=None,
        eps=_EPS,
        read=read_folder,
        wanted="train/ and test/ with one folder of images per class",
        flip=True,
    ),
}


def spec_of(args):
    """The Spec of --dataset as far as the command line tells.

    The number of classes of a folder is 0 until open_dataset.
    """
    spec = DATASETS[args.dataset]
    if spec.name != "folder":
        return spec
    in_files = args.image_size > image_folders.MAX_DECODED
    return dataclasses.replace(
        spec,
        image_size=args.image_size,
        eps=_EPS_LARGE if in_files else _EPS,
        read=partial(read_folder, image_size=args.image_size),
        batches=FileBatches if in_files else None,
        crop_padding=args.image_size // 8,
    )


def open_dataset(args):
    """The Spec of --dataset, which can be read from then on. All ranks call it.

    Rank 0 fetches the data set where --download says so, and finds out the classes of a folder.
    Gives --val-size the data set's default.
    """
    spec = spec_of(args)
    if args.ignore_checksum:
        spec = dataclasses.replace(spec, read=partial(spec.read, any_checksum=True))
    spec = run.once(_prepare, spec, args.data_dir, args.download)
    if "val_size" in args and args.val_size is None:
        args.val_size = spec.val_size
    return spec


def _prepare(spec, data_dir, download):
    prepare_dataset(spec, data_dir, download)
    if spec.name != "folder":
        return spec
    with data.there(spec, data_dir):
        classes, n_train = image_folders.describe_folder(data_dir)
    val_size = max(1, min(spec.val_size, n_train // 10))
    return dataclasses.replace(spec, classes=classes, num_classes=len(classes), val_size=val_size)


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
