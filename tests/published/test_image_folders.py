"""Images in class folders: anyone's own, CIFAR's, Tiny ImageNet's; what is left behind there.

Alone: python -m pytest -n 0 tests/published/test_image_folders.py
"""

import dataclasses
import os
import shutil
import unicodedata
from argparse import Namespace
from zlib import crc32

import numpy as np
import pytest
import torch
from data_helper import noise, refused, write_jpeg
from PIL import Image

from common import data
from published import image_folders
from published.datasets import DATASETS, open_dataset
from published.image_files import ImageFiles

CIFAR10 = DATASETS["cifar10"]
TINY = DATASETS["tiny-imagenet"]
CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def own_cache(cache):
    return cache


def args_of(data_dir, image_size=16, **flags):
    """The data flags of a script."""
    flags = {"download": False, "ignore_checksum": False, "val_size": None} | flags
    place = {"dataset": "folder", "data_dir": str(data_dir), "image_size": image_size}
    return Namespace(**place, **flags)


def write_image(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_folder(root, n=20, splits=("train", "test"), classes=CLASSES, size=16):
    """PNGs of noise. Returns {(split, class): [pixels, ...]}."""
    made = {}
    for split in splits:
        for name in classes:
            made[split, name] = []
            for i in range(n):
                pixels = noise(size, size, 3, seed=crc32(f"{split}{name}{i}".encode()))
                write_image(root / split / name / f"{i}.png", pixels)
                made[split, name].append(pixels)
    return made


def open_refused(data_dir, *words, **flags):
    def call():
        spec = open_dataset(args_of(data_dir, **flags))
        data.load_train(spec, str(data_dir), 1)
        data.load_test(spec, str(data_dir))

    refused(call, *words)


# ------------------------------------------------------------------------------------ own images


def test_a_folder_is_read_under_its_own_classes(tmp_path):
    made = write_folder(tmp_path)
    args = args_of(tmp_path)
    spec = open_dataset(args)
    assert (spec.classes, spec.num_classes, spec.channels) == (CLASSES, 3, 3)
    assert args.val_size == spec.val_size == 6  # a tenth
    (images, labels), (held_out, held_out_labels) = data.load_train(spec, args.data_dir, 6)
    test, test_labels = data.load_test(spec, args.data_dir)
    assert len(images) == 54 and len(test) == 60
    parts = {
        "train": (np.concatenate([held_out, images]), np.concatenate([held_out_labels, labels])),
        "test": (test, test_labels),
    }
    for split, (read, read_labels) in parts.items():
        name_of = {p.tobytes(): name for (s, name), ps in made.items() if s == split for p in ps}
        assert [name_of[image.tobytes()] for image in read] == [CLASSES[y] for y in read_labels]
        assert read.dtype == np.uint8 and read_labels.dtype == np.int64
    assert len(set(held_out_labels.tolist())) > 1  # the classes are mixed


def test_mean_and_deviation_are_those_of_the_training_images(tmp_path):
    write_folder(tmp_path)
    for image_size, kind in ((16, np.ndarray), (80, image_folders.ImageFiles)):
        spec = open_dataset(args_of(tmp_path, image_size))
        train, _ = data.load_train(spec, str(tmp_path), 6)
        assert isinstance(train[0], kind) and spec.mean is None
        spec = data.measured(spec, train)
        pixels = np.asarray(train[0][:], np.float64) / 255
        assert np.allclose(spec.mean, pixels.mean((0, 1, 2)), atol=1e-4)
        assert np.allclose(spec.std, pixels.std((0, 1, 2)), atol=1e-4)
        assert data.measured(spec, None) is spec
    assert data.measured(CIFAR10, None) is CIFAR10


def test_a_long_tail_of_a_folder(tmp_path):
    """The same images in memory and in files; the first class has eight times the last one's."""
    write_folder(tmp_path)
    parts = []
    for image_size in (16, 80):
        spec = open_dataset(args_of(tmp_path, image_size))
        whole, _ = data.load_train(spec, str(tmp_path), 6)
        (images, labels), held_out = data.load_train(spec, str(tmp_path), 6, imbalance=8)
        rows = data.long_tail(whole[1], 3, 8)
        assert np.array_equal(images[:], whole[0][rows]) and len(held_out[1]) == 6
        assert data.sha256((images, labels)) != data.sha256(whole)
        parts.append(labels)
    assert np.array_equal(*parts)
    counts = np.bincount(labels)
    assert counts[0] == np.bincount(whole[1]).min() and counts[2] == counts[0] // 8


def test_images_of_one_colour_are_refused(tmp_path):
    for name in CLASSES:
        for i in range(40):
            write_image(tmp_path / "train" / name / f"{i}.png", np.full((16, 16, 3), 9, np.uint8))
    spec = open_dataset(args_of(tmp_path))
    train, _ = data.load_train(spec, str(tmp_path), 1)
    refused(lambda: data.measured(spec, train), "folder: all training images have one colour")


def test_without_a_test_split_a_tenth_is_held_out_by_hash(tmp_path):
    write_folder(tmp_path, n=200, splits=["train"])
    spec = open_dataset(args_of(tmp_path))

    def names_of(train):
        return {
            os.path.relpath(path, tmp_path)
            for path in image_folders._split_of_folder(str(tmp_path), train)[0]
        }

    test, train = names_of(False), names_of(True)
    assert len(test) + len(train) == 600 and not test & train
    assert 40 < len(test) < 80  # 60 expected, standard deviation 7
    assert len(data.load_test(spec, str(tmp_path))[1]) == len(test)
    write_image(tmp_path / "train" / "owl" / "new.png", noise(16, 16, 3))
    shutil.copytree(tmp_path / "train", tmp_path / "moved" / "train")
    moved = image_folders._split_of_folder(str(tmp_path / "moved"), False)[0]
    now = {os.path.relpath(path, tmp_path / "moved") for path in moved}
    assert test <= now and len(now - test) <= 1  # each image stays on its side


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_split_may_have_another_name(name, tmp_path):
    write_folder(tmp_path, n=4, splits=["train", name])
    spec = open_dataset(args_of(tmp_path))
    assert len(data.load_test(spec, str(tmp_path))[1]) == 12
    assert len(data.load_train(spec, str(tmp_path), 1)[0][1]) == 11
    write_folder(tmp_path, n=2, splits=["test"])  # which goes first
    assert len(data.load_test(spec, str(tmp_path))[1]) == 6


def test_a_test_split_alone_will_do_to_evaluate(tmp_path):
    write_folder(tmp_path, n=4, splits=["test"])
    spec = open_dataset(args_of(tmp_path))
    assert spec.classes == CLASSES and len(data.load_test(spec, str(tmp_path))[1]) == 12
    refused(lambda: data.load_train(spec, str(tmp_path), 1), "folder is not there, or broken")


def test_images_of_every_shape_and_format(tmp_path):
    """Shorter side to --image-size, the middle kept; grey, palette and transparent ones are RGB."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 90, 3), np.uint8)
    folder = tmp_path / "train" / "a"
    write_image(folder / "wide.png", pixels)
    write_image(folder / "tall.webp", pixels.transpose(1, 0, 2), lossless=True)
    write_image(folder / "upper.JPG", pixels)
    write_image(folder / "deeper" / "still" / "grey.jpeg", pixels[..., 0])
    write_image(folder / "alpha.png", np.dstack([pixels, pixels[..., :1]]))
    Image.fromarray(pixels).convert("P").save(folder / "palette.png")
    write_image(tmp_path / "train" / "b" / "small.bmp", pixels[:5, :5])
    paths, labels = image_folders._split_of_folder(str(tmp_path), True)
    tests, test_labels = image_folders._split_of_folder(str(tmp_path), False)
    assert len(paths) + len(tests) == 7 and labels.sum() + test_labels.sum() == 1
    images = image_folders.ImageFiles([str(folder / "wide.png")], 20, 20)
    whole = Image.fromarray(pixels).resize((45, 20), Image.BILINEAR)
    expected = np.asarray(whole)[:, 12:32].astype(int)
    assert np.abs(images[:][0] - expected).max() <= 1
    for path in paths + tests:
        assert image_folders.ImageFiles([path], 20, 20)[:].shape == (1, 20, 20, 3)


def test_sixteen_bits_are_not_cut_to_white(tmp_path):
    write_folder(tmp_path, n=3)
    path = tmp_path / "test" / "dog" / "deep.png"
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path)
    open_refused(tmp_path, f"{path}: pixels of mode I;16, expected 8 bits a channel")


LEFT_BEHIND = [
    ".DS_Store",
    "Thumbs.db",
    "cat/.DS_Store",
    "cat/._1.png",
    "cat/Thumbs.db",
    "cat/readme.txt",
    "cat/.ipynb_checkpoints/1-checkpoint.png",
    "cat/@eaDir/1.png",
    ".ipynb_checkpoints/1.png",
    "__MACOSX/._1.png",
    "@eaDir/1.png",
    ".cat/1.png",
    "notes.txt",
]


def test_too_few_images_to_hold_some_out(tmp_path):
    """Of these names none has a hash among the lowest tenth."""
    write_folder(tmp_path, n=2, splits=["train"])
    open_refused(
        tmp_path, f"{tmp_path}/train: too few images (6) to hold some out for tests; put some"
    )


@pytest.mark.parametrize("name", LEFT_BEHIND)
@pytest.mark.parametrize("image_size", [16, 80])
def test_what_file_managers_leave_behind_is_no_image_and_no_class(
    name, image_size, tmp_path, capsys
):
    write_folder(tmp_path, n=3)
    before = image_folders._split_of_folder(str(tmp_path), True)
    for split in ("train", "test"):
        path = tmp_path / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"Mac OS X")
    capsys.readouterr()
    spec = open_dataset(args_of(tmp_path, image_size))
    assert spec.classes == CLASSES
    # What somebody may have taken for an image is told, what a program has left is not.
    assert ("files in train/ are left out" in capsys.readouterr().out) == (name == "cat/readme.txt")
    after = image_folders._split_of_folder(str(tmp_path), True)
    assert after[0] == before[0] and np.array_equal(after[1], before[1])
    images, _ = data.load_test(spec, str(tmp_path))
    assert images[:].shape == (9, image_size, image_size, 3)


def test_train_and_test_must_agree_in_their_classes(tmp_path):
    write_folder(tmp_path, n=3)
    shutil.move(tmp_path / "test" / "dog", tmp_path / "test" / "Dog")
    words = ["/test: lacks dog and has Dog besides; expected 3 class folders: cat, dog, owl"]
    open_refused(tmp_path, *words)
    shutil.rmtree(tmp_path / "test" / "Dog")
    open_refused(tmp_path, "/test: lacks dog; expected 3")
    write_folder(tmp_path, n=3)
    write_folder(tmp_path, n=3, splits=["test"], classes=["ant"])
    open_refused(tmp_path, "/test: has ant besides; expected 3")
    shutil.rmtree(tmp_path / "test" / "ant")
    shutil.rmtree(tmp_path / "train" / "cat")
    (tmp_path / "train" / "cat").mkdir()
    open_refused(tmp_path, "/train/cat: a class folder without images (.jpg, ")


def test_folders_that_are_no_data_set(tmp_path):
    open_refused(tmp_path / "none", "folder is not there, or broken; put train/ and test/ with one")
    (tmp_path / "train").mkdir()
    open_refused(tmp_path, f"{tmp_path}/train: no class folders")
    write_folder(tmp_path, n=3, classes=["only"])
    open_refused(tmp_path, "/train: one class folder, only; expected at least two")


@pytest.mark.parametrize("name", ["Test", "TESTING", "Val"])
def test_the_name_of_the_test_split_in_any_case(name, tmp_path):
    write_folder(tmp_path, n=4, splits=["train", name])
    assert len(data.load_test(open_dataset(args_of(tmp_path)), str(tmp_path))[1]) == 12


def test_a_split_of_unknown_name_is_not_left_out_unnoticed(tmp_path, capsys):
    write_folder(tmp_path, n=20, splits=["train", "holdout"])
    open_refused(tmp_path, "holdout: has class folders of train/; name it test/")
    shutil.rmtree(tmp_path / "holdout")
    (tmp_path / "train" / "cat" / "x.heic").write_bytes(b"heic")
    (tmp_path / "pictures").mkdir()  # of something else
    open_dataset(args_of(tmp_path))
    printed = capsys.readouterr().out
    assert "no test/; 10% of train/ (" in printed and "is held out for tests" in printed
    assert "1 files in train/ are left out, no images: .heic" in printed


def test_unlabelled_test_images_beside_a_val_split(tmp_path):
    """The layout of Kaggle."""
    write_folder(tmp_path, n=4, splits=["train", "val"])
    write_image(tmp_path / "test" / "1.png", noise(16, 16, 3))
    assert len(data.load_test(open_dataset(args_of(tmp_path)), str(tmp_path))[1]) == 12


def test_splits_whose_files_look_alike_are_told_apart(tmp_path):
    """The same names, sizes and times in train/ and test/, as in archives made reproducible."""
    for split, colour in (("train", 50), ("test", 200)):
        for name in CLASSES:
            for i in range(3):
                path = tmp_path / split / name / f"{i}.bmp"
                write_image(path, np.full((16, 16, 3), colour + i, np.uint8))
                os.utime(path, (10**9, 10**9))
    spec = open_dataset(args_of(tmp_path))
    train, _ = spec.read(str(tmp_path), True)
    test, _ = spec.read(str(tmp_path), False)
    assert train.max() < 60 and test.min() >= 200
    path = tmp_path / "test" / "cat" / "0.bmp"
    write_image(path, np.full((16, 16, 3), 250, np.uint8))
    os.utime(path, (10**9, 10**9))
    assert spec.read(str(tmp_path), False)[0].max() == 250


def test_a_link_in_a_circle_counts_no_image_twice(tmp_path):
    write_folder(tmp_path, n=3)
    (tmp_path / "train" / "cat" / "up").symlink_to("..")
    (tmp_path / "train" / "dog" / "again").symlink_to(".")
    paths, labels = image_folders._split_of_folder(str(tmp_path), True)
    assert np.bincount(labels)[1] == 3


def test_two_folders_of_one_name_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        write_folder(tmp_path, n=2, splits=["train"], classes=[unicodedata.normalize(form, "zoé")])
    open_refused(tmp_path, "/train: two class folders of one name")


def test_a_name_is_one_class_in_both_forms_of_unicode(tmp_path):
    """macOS writes decomposed letters; the order of the labels is that of the composed ones."""
    names = ("zoé", "école", "ünder")
    for split, form in (("train", "NFC"), ("test", "NFD")):
        written = [unicodedata.normalize(form, name) for name in names]
        write_folder(tmp_path, n=3, splits=[split], classes=written)
    spec = open_dataset(args_of(tmp_path))
    assert spec.classes == tuple(sorted(names))
    _, labels = data.load_test(spec, str(tmp_path))
    assert np.bincount(labels).tolist() == [3, 3, 3]


def test_a_changed_image_of_the_same_size_changes_the_identity(tmp_path):
    """Of images that stay in files too: their bytes count, and not only their names."""
    write_folder(tmp_path, n=4)
    for image_size in (16, 80):
        spec = open_dataset(args_of(tmp_path, image_size))
        before = data.sha256(data.load_test(spec, str(tmp_path)))
        path = tmp_path / "test" / "owl" / "2.png"
        content = bytearray(path.read_bytes())
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0, 0] ^= 1
        for level in range(10):  # until the file has the same size again
            Image.fromarray(pixels).save(path, compress_level=level)
            if path.stat().st_size == len(content):
                break
        if path.stat().st_size != len(content):
            content[-20] ^= 1  # in a chunk's checksum, which Pillow does not compare there
            path.write_bytes(content)
        after = data.sha256(data.load_test(spec, str(tmp_path)))
        assert after != before


def test_an_empty_channel_is_no_reason_to_refuse(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "train").rglob("*.png"):
        pixels = np.asarray(Image.open(path)) * np.array([1, 1, 0], np.uint8)
        Image.fromarray(pixels).save(path)
    spec = open_dataset(args_of(tmp_path))
    spec = data.measured(spec, data.load_train(spec, str(tmp_path), 1)[0])
    assert spec.mean[2] == 0 and spec.std[2] == pytest.approx(max(spec.std) / 10, rel=1e-2)


@pytest.mark.parametrize("classes", [5, {"a": 1}, [["a"], "b"], ["cat", "dog"], "cat"])
def test_damaged_names_of_classes(classes):
    spec = dataclasses.replace(CIFAR10, classes=CLASSES)
    refused(lambda: spec.check_classes("x", classes), "x: ")


def test_names_of_classes_are_held_against_those_of_what_others_made():
    spec = dataclasses.replace(CIFAR10, classes=CLASSES)
    for classes in (CLASSES, list(CLASSES), (), None):
        spec.check_classes("x", classes)
    dataclasses.replace(spec, classes=()).check_classes("x", ["a"])
    words = ["x: made for other classes, class 1 is 'fox', 'dog' in cifar10"]
    refused(lambda: spec.check_classes("x", ["cat", "fox", "owl"]), *words)
    refused(lambda: spec.check_classes("x", ["cat", "dog"]), "x: made for other classes")


# ------------------------------------------------------------------------------ CIFAR in folders


def write_cifar_folders(root, n=3, classes=CIFAR10.classes, test="test"):
    return write_folder(root, n, ("train", test), classes, size=32)


@pytest.mark.parametrize("below", ["", "CIFAR-10-images-master"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_cifar_in_class_folders(below, test, tmp_path):
    made = write_cifar_folders(tmp_path / below, test=test)
    (images, labels), _ = data.load_train(CIFAR10, str(tmp_path), 1)
    assert len(images) == 29 and isinstance(images, np.memmap)
    images, labels = data.load_test(CIFAR10, str(tmp_path))
    name_of = {p.tobytes(): name for (s, name), ps in made.items() if s == test for p in ps}
    assert [name_of[image.tobytes()] for image in images] == [CIFAR10.classes[y] for y in labels]
    batch, _ = data.Batches(CIFAR10, (images, labels), batch_size=8, seed=0, device="cpu")(0)
    assert batch.shape == (8, 3, 32, 32) and batch.dtype == torch.float32


def test_cifar_folders_of_other_names_or_sizes(tmp_path):
    write_cifar_folders(tmp_path)
    shutil.move(tmp_path / "test" / "automobile", tmp_path / "test" / "car")
    words = "test: lacks automobile and has car besides; expected 10 class folders: airplane"
    refused(lambda: data.load_test(CIFAR10, str(tmp_path)), words)
    shutil.move(tmp_path / "test" / "car", tmp_path / "test" / "automobile")
    write_image(tmp_path / "test" / "cat" / "large.png", noise(33, 32, 3))
    words = "large.png: 32 x 33 pixels, expected 32 x 32"
    refused(lambda: data.load_test(CIFAR10, str(tmp_path)), words)
    shutil.rmtree(tmp_path / "test")
    words = "cifar10 is not there, or broken; put cifar-10-batches-py/"
    refused(lambda: data.load_test(CIFAR10, str(tmp_path)), words)
    refused(lambda: data.load_test(DATASETS["cifar100"], str(tmp_path)), "cifar100 is not there")
    for name in ("copy", "other"):
        shutil.copytree(tmp_path / "train", tmp_path / name / "train")
    assert len(data.load_train(CIFAR10, str(tmp_path), 1)[0][1]) == 29  # its own go first
    shutil.rmtree(tmp_path / "train")
    words = f"class folders in {tmp_path}/copy and {tmp_path}/other; name one"
    refused(lambda: data.load_train(CIFAR10, str(tmp_path), 1), words)


def test_the_classes_of_cifar_are_those_of_its_archives():
    assert [len(DATASETS[name].classes) for name in ("cifar10", "cifar100")] == [10, 100]
    for name in ("cifar10", "cifar100"):
        classes = DATASETS[name].classes
        assert list(classes) == sorted(set(classes))


# ------------------------------------------------------------------- the layouts of Tiny ImageNet

WNIDS = [f"n{7 * number:08d}" for number in range(200)]


@pytest.fixture(scope="module")
def tiny_made(tmp_path_factory):
    """One image per class and split, as published."""
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    lines = []
    for number, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        write_jpeg(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", number)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        write_jpeg(root / "val" / "images" / f"val_{number}.JPEG", 1000 + number)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def tiny(tiny_made, tmp_path):
    return shutil.copytree(tiny_made, tmp_path / "data" / "tiny-imagenet-200")


def pixels_by_label(images, labels):
    return {label: image.tobytes() for image, label in zip(images, labels.tolist())}


@pytest.mark.parametrize("layout", ["class/images", "class", "class, annotations kept"])
def test_the_validation_images_may_lie_in_class_folders(layout, tiny):
    expected = pixels_by_label(*data.load_test(TINY, str(tiny.parent)))
    for number, wnid in enumerate(WNIDS):
        folder = tiny / "val" / wnid / ("images" if layout == "class/images" else "")
        folder.mkdir(parents=True)
        shutil.move(tiny / "val" / "images" / f"val_{number}.JPEG", folder)
    (tiny / "val" / "images").rmdir()
    if layout != "class, annotations kept":
        (tiny / "val" / "val_annotations.txt").unlink()
    assert pixels_by_label(*data.load_test(TINY, str(tiny.parent))) == expected
    assert len(expected) == 200
    shutil.move(tiny / "val" / WNIDS[3], tiny / "val" / "n99999999")
    words = f"val: lacks {WNIDS[3]} and has n99999999 besides"
    refused(lambda: data.load_test(TINY, str(tiny.parent)), words)


def test_the_training_images_may_lie_in_class_folders_without_another(tiny):
    expected = pixels_by_label(*data.load_train(TINY, str(tiny.parent), 1)[0])
    for wnid in WNIDS:
        shutil.move(tiny / "train" / wnid / "images" / f"{wnid}_0.JPEG", tiny / "train" / wnid)
        (tiny / "train" / wnid / "images").rmdir()
    found = pixels_by_label(*data.load_train(TINY, str(tiny.parent), 1)[0])
    both = expected.keys() & found.keys()  # another one may be held out
    assert len(both) >= 198 and all(found[label] == expected[label] for label in both)


def test_data_dir_may_be_the_folder_itself(tiny):
    above = pixels_by_label(*data.load_test(TINY, str(tiny.parent)))
    assert pixels_by_label(*data.load_test(TINY, str(tiny))) == above


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_annotations_of_every_editor(bom, end, tiny):
    expected = pixels_by_label(*data.load_test(TINY, str(tiny.parent)))
    path = tiny / "val" / "val_annotations.txt"
    lines = path.read_text().splitlines()
    path.write_bytes((bom + end.join(lines)).encode())
    assert pixels_by_label(*data.load_test(TINY, str(tiny.parent))) == expected


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_tiny_imagenet_as_npz_files(save, tmp_path):
    made = {}
    for seed, split in enumerate(("train", "val")):
        images = noise(30, 64, 64, 3, seed=seed)
        labels = np.arange(30) * 6
        save(tmp_path / f"{split}.npz", image=images, label=labels)
        made[split] = images, labels
    for split, read in (
        ("train", data.load_train(TINY, str(tmp_path), 0)[0]),
        ("val", data.load_test(TINY, str(tmp_path))),
    ):
        expected = pixels_by_label(*made[split])
        assert pixels_by_label(*read) == expected and len(expected) == 30
        assert not (np.diff(read[1]) > 0).all()  # mixed: the first ones are held out
    (tmp_path / "val.npz").unlink()
    words = "tiny-imagenet is not there, or broken; put tiny-imagenet-200/"
    refused(lambda: data.load_test(TINY, str(tmp_path)), words, "train.npz and val.npz")
    save(tmp_path / "val.npz", image=noise(3, 32, 32, 3), label=np.arange(3))
    refused(lambda: data.load_test(TINY, str(tmp_path)), "val.npz: images of", "[32, 32, 3]")


def test_images_of_another_size_are_other_data(tmp_path):
    """The hash of a data set in files knows how they are decoded."""
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    hashes = set()
    for size in (80, 96):
        images = ImageFiles([str(tmp_path / "a.png")], resize=size, size=size)
        hashes.add(images.sha256())
    hashes.add(ImageFiles([str(tmp_path / "a.png")], resize=100, size=96).sha256())
    assert len(hashes) == 3
