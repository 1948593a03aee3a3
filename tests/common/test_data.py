"""Digits, splits, random streams, digests, augmentation and batches in memory.

Alone: python -m pytest tests/common/test_data.py
"""

import dataclasses
import hashlib
import importlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from data_helper import write_jpeg

from common import UserError, data
from published import image_files
from published.datasets import open_dataset
from published.synthetic import open_synthetic


def make_batches(batch_size=32, synthetic=None, fraction=0.5, rank=0, world_size=1, spec=DIGITS):
    train, _ = data.load_train(DIGITS, None, 200)
    return data.Batches(
        spec,
        train,
        batch_size=batch_size,
        seed=3,
        device="cpu",
        rank=rank,
        world_size=world_size,
        synthetic=synthetic,
        synthetic_fraction=fraction,
    )


# ------------------------------------------------------------------------------------------- splits


def test_digits_are_the_fixed_split():
    """The very images: a scikit-learn that split otherwise would change every number of ours."""
    train, _ = data.load_train(DIGITS, None, 0)
    test = data.load_test(DIGITS, None)
    content = b"".join(array.tobytes() for array in (*train, *test))
    expected = "33ab7689fa8ddc04f6ed4538b5ff066fe47665809652fb9851212b3bcadbdc5c"
    assert hashlib.sha256(content).hexdigest() == expected
    assert train[0].shape == (1000, 8, 8, 1) and test[0].shape == (797, 8, 8, 1)
    for _, labels in (train, test):  # stratified
        assert abs(np.bincount(labels) / len(labels) - 0.1).max() < 0.005
    x = train[0] / 255
    assert abs(x.mean() - DIGITS.mean[0]) < 1e-3 and abs(x.std() - DIGITS.std[0]) < 1e-3


def test_validation_is_the_head_of_train_and_disjoint():
    (whole, _), _ = data.load_train(DIGITS, None, 0)
    (train, _), (val, _) = data.load_train(DIGITS, None, 200)
    assert np.array_equal(np.concatenate([val, train]), whole)
    (part, labels), _ = data.load_train(DIGITS, None, 200, 300)
    assert np.array_equal(part, train[:300]) and len(labels) == 300
    with pytest.raises(UserError, match="--val-size 1000: digits has only 1000 training images"):
        data.load_train(DIGITS, None, 1000)
    with pytest.raises(UserError, match="--n-train 801: digits has 800 training images besides"):
        data.load_train(DIGITS, None, 200, 801)


SCRIPTS = ["train_diffusion", "generate_synthetic", "extract_features", "train_at", "train_at_aux"]


def test_long_tail_against_a_loop():
    """One image after the other is kept while its class has room; class 0 has the most."""
    labels = np.random.default_rng(0).integers(0, 5, 300)
    n_max = min(np.sum(labels == label) for label in range(5))
    for ratio in (1, 7.5, n_max, 1e6):
        room = [n_max * ratio ** (-label / 4) for label in range(5)]
        kept = []
        seen = [0] * 5
        for row, label in enumerate(labels):
            seen[label] += 1
            if seen[label] == 1 or seen[label] <= room[label] * (1 + 1e-12):
                kept.append(row)
        assert data.long_tail(labels, 5, ratio).tolist() == kept
        counts = np.bincount(labels[kept])
        assert counts[0] == n_max and counts[4] == max(1, int(n_max / ratio))
    with pytest.raises(UserError, match="--imbalance 2: the 300 training images lack a class"):
        data.long_tail(labels, 6, 2)
    # 512 / 32^(4/5) is 32, and 31.999999999999993 in floating point.
    labels = np.repeat(np.arange(6), 512)
    counts = np.bincount(labels[data.long_tail(labels, 6, 32)])
    assert counts.tolist() == [512, 256, 128, 64, 32, 16]


def test_the_tail_is_cut_from_what_is_trained_on_alone():
    """After --n-train; the held-out images stay as they are, and the digest is another one."""
    plain = data.load_train(DIGITS, None, 200, 500)
    (images, labels), held_out = data.load_train(DIGITS, None, 200, 500, 20)
    rows = data.long_tail(plain[0][1], 10, 20)
    assert np.array_equal(images, plain[0][0][rows])
    assert np.array_equal(labels, plain[0][1][rows])
    for array, whole in zip(held_out, plain[1]):
        assert np.array_equal(array, whole)
    assert data.sha256((images, labels), held_out) != data.sha256(*plain)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("ratio", ["0.5", "0", "-3", "nan", "inf", "many"])
def test_an_imbalance_below_1_is_refused(name, ratio, capsys):
    script = importlib.import_module(name)
    with pytest.raises(SystemExit) as info:
        script.parse_args(["--imbalance", ratio])
    printed = capsys.readouterr().err.strip().splitlines()
    assert info.value.code == 2 and len(printed) == 1
    assert "argument --imbalance: expected a" in printed[0]


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet"])
def test_every_script_holds_out_the_same_images(dataset):
    """Else a diffusion model would have been trained on images that choose the classifier."""
    expected = 200 if dataset == "digits" else 1024
    for name in SCRIPTS:
        script = importlib.import_module(name)
        args = script.parse_args(["--dataset", dataset])
        open_dataset(args)
        assert args.val_size == expected


# ------------------------------------------------------------------------------------------ digests


def test_digest_covers_every_pixel_and_label_of_arrays():
    train, val = data.load_train(DIGITS, None, 200)
    digest = data.sha256(train, val)
    assert digest == data.sha256(*data.load_train(DIGITS, None, 200))
    assert digest != data.sha256(val, train)
    images, labels = (array.copy() for array in train)
    images[-1, -1, -1] ^= 1
    assert data.sha256((images, train[1]), val) != digest
    labels[-1] ^= 1
    assert data.sha256((train[0], labels), val) != digest
    assert data.sha256((train[0].reshape(-1, 4, 16, 1), train[1]), val) != digest


def test_digest_of_image_files_moves_with_them(tmp_path):
    """Names from the class folder on, content and labels; where the folder lies does not matter."""
    labels = np.arange(2500) % 7  # more files than one thread takes at once
    names = [f"c{label}/{number}.JPEG" for number, label in enumerate(labels)]

    def digest_in(root, labels=labels):
        images = image_files.ImageFiles([os.path.join(root, name) for name in names], 256, 224)
        return data.sha256((images.part(slice(100, None)), labels[100:]), (images, labels))

    for name in names:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"x" * len(name))
    digest = digest_in(str(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert digest_in(str(tmp_path / "elsewhere" / "b")) == digest
    os.symlink(tmp_path / "elsewhere" / "b", tmp_path / "link")
    assert digest_in(str(tmp_path / "link")) == digest

    changed = labels.copy()
    changed[-1] += 1
    assert digest_in(str(tmp_path / "link"), changed) != digest
    path = tmp_path / "link" / names[-1]
    path.write_bytes(b"y" * len(names[-1]))  # another image of the same size
    assert digest_in(str(tmp_path / "link")) != digest
    write_jpeg(path, 0)
    assert digest_in(str(tmp_path / "link")) != digest
    (tmp_path / "link" / names[2000]).unlink()
    with pytest.raises(UserError, match="2000.JPEG: no such file"):
        digest_in(str(tmp_path / "link"))


# --------------------------------------------------------------------------------------- randomness


def test_streams_are_independent_functions_of_seed_use_and_step():
    def first(*key):
        return torch.rand(4, generator=data.stream(*key))

    assert torch.equal(first(0, "attack", 5), first(0, "attack", 5))
    keys = [(0, "attack", 5), (0, "attack", 6), (1, "attack", 5), (0, "augment", 5)]
    assert len({tuple(first(*key).tolist()) for key in keys}) == 4


def test_image_ids_have_streams_of_their_own():
    """Ids 521948 and 903268 share torch's 32 bits of seed; with 128 bits none collide."""
    shape = (1, 8, 8)
    noise = data.normal_of(data.id_streams(0, "generate", [0, 521948, 903268, 1]), shape)
    assert noise.shape == (4, 1, 8, 8) and noise.dtype == torch.float32
    assert len({tuple(image.flatten().tolist()) for image in noise}) == 4
    alone = data.normal_of(data.id_streams(0, "generate", [903268]), shape)
    assert torch.equal(noise[2:3], alone)
    many = data.normal_of(data.id_streams(0, "generate", range(2000)), shape).flatten()
    assert abs(many.mean()) < 5 / len(many) ** 0.5
    assert abs(many.std() - 1) < 5 / (2 * len(many)) ** 0.5
    one = data.id_streams(0, "generate", [7])
    assert not torch.equal(data.normal_of(one, (2,)), data.normal_of(one, (2,)))  # a stream goes on


# ------------------------------------------------------------------------------------- augmentation


def test_to_x_is_nchw_in_0_1_and_channels_last():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    x = data.to_x(images)
    assert x.shape == (5, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(x[1, 2].numpy(), images[1, :, :, 2] / 255)


def test_augmentation_equals_cropping_and_mirroring_image_by_image():
    images = torch.randint(0, 256, (50, 6, 6, 2), dtype=torch.uint8)
    spec = dataclasses.replace(DIGITS, crop_padding=2, flip=True)
    fast = data.augment(images, spec, torch.Generator().manual_seed(7), 50, slice(None))
    generator = torch.Generator().manual_seed(7)
    corners = torch.randint(0, 5, (2, 50), generator=generator)
    mirrored = torch.randint(0, 2, (50,), generator=generator).bool()
    for i in range(50):
        top, left = corners[:, i]
        padded = F.pad(images[i].permute(2, 0, 1), (2, 2, 2, 2))
        slow = padded[:, top : top + 6, left : left + 6]
        if mirrored[i]:
            slow = slow.flip(2)
        assert torch.equal(fast[i], slow.permute(1, 2, 0))
    assert mirrored.any() and not mirrored.all() and len(corners.unique()) == 5
    still = dataclasses.replace(DIGITS, crop_padding=0)
    assert torch.equal(data.augment(images, still, torch.Generator(), 50, slice(None)), images)


# ------------------------------------------------------------------------------------------ batches


def test_real_images_come_once_per_pass():
    batches = make_batches(batch_size=96)
    drawn = torch.cat([batches.real_rows(step) for step in range(25)])
    for data_pass in range(3):  # 2,400 draws of 800 images
        rows = drawn[data_pass * 800 : (data_pass + 1) * 800]
        assert sorted(rows.tolist()) == list(range(800))
    assert not torch.equal(drawn[:800], drawn[800:1600])


def test_a_batch_is_a_function_of_the_step():
    forward = make_batches()
    jumping = make_batches()
    in_order = [forward(step) for step in range(60)]
    for step in (59, 3, 24, 25, 0):
        x, y = jumping(step)
        assert torch.equal(x, in_order[step][0])
        assert torch.equal(y, in_order[step][1])


def test_a_thread_makes_the_next_batch():
    """As for a GPU: the same batches in any order of steps, and a fault is raised at its step."""
    expected = make_batches()
    batches = make_batches()
    batches.thread = ThreadPoolExecutor(1)
    for step in (0, 1, 2, 30, 31, 3):
        for found, wanted in zip(batches(step), expected(step)):
            assert torch.equal(found, wanted)
        assert list(batches.next) == [step + 1]
    assert batches.waited > 0

    def broken(step):
        raise UserError("truncated")

    batches._make = broken
    batches(4)  # was made before
    with pytest.raises(UserError, match="truncated"):
        batches(5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_batch_of_one_process(world_size, synthetic_dir):
    synthetic = open_synthetic([synthetic_dir], DIGITS)
    whole = make_batches(synthetic=synthetic)(5)
    parts = []
    for rank in range(world_size):
        parts.append(make_batches(synthetic=synthetic, rank=rank, world_size=world_size)(5))
    for tensor, pieces in zip(whole, zip(*parts)):
        assert torch.equal(torch.stack(pieces, 1).flatten(0, 1), tensor)


@pytest.mark.parametrize("fraction,expected", [(0.7, 358), (0.0, 0), (1.0, 512), (0.875, 448)])
def test_count_of_synthetic_images(fraction, expected, synthetic_dir):
    """512 = 154 + 358 at 0.7, as in DM-AT's code."""
    synthetic = open_synthetic([synthetic_dir], DIGITS)
    still = dataclasses.replace(DIGITS, crop_padding=0)
    batches = make_batches(512, synthetic, fraction, spec=still)
    x, y = batches(0)
    assert batches.n_synthetic == expected and len(x) == 512
    known = {image.tobytes() for image in synthetic.gather(np.arange(64))[0]}
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sum(image.tobytes() in known for image in images) == expected


def test_without_a_synthetic_set_batches_are_real():
    assert make_batches(fraction=0.7).n_synthetic == 0


def test_gather_across_shards(synthetic_dir):
    synthetic = open_synthetic([synthetic_dir], DIGITS)
    shards = synthetic.sources[0].images
    assert len(synthetic) == 64 and len(shards) == 3
    order = np.random.default_rng(0).permutation(64).repeat(2)
    images, labels = synthetic.gather(order)
    every = np.concatenate([np.array(shard) for shard in shards])
    assert np.array_equal(images, every[order])
    assert np.array_equal(labels, order % 10)  # the label of image id is id % num_classes
    assert all(isinstance(shard, np.memmap) for shard in shards)
