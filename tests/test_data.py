"""Data, splits, synthetic shards and the sampler. Alone: python -m pytest tests/test_data.py"""

import dataclasses
import hashlib
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS

from common import cli, data
from common.synthetic import SyntheticSet


def batches(batch_size=32, synthetic=None, fraction=0.5, seed=3, rank=0, world_size=1, spec=DIGITS):
    images, labels = data.load_train(DIGITS, None, 200)[0]
    return data.Batches(images, labels, synthetic, fraction, batch_size, spec, seed, "cpu", rank, world_size)


def test_digits_are_the_fixed_split():
    """The very images: a new scikit-learn that split otherwise would change every number in the README."""
    train, test = data.load_train(DIGITS, None, 0)[0], data.load_test(DIGITS, None)
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (*train, *test))).hexdigest()
    assert digest == "33ab7689fa8ddc04f6ed4538b5ff066fe47665809652fb9851212b3bcadbdc5c"
    assert train[0].shape == (1000, 8, 8, 1) and test[0].shape == (797, 8, 8, 1)
    assert all(abs(np.bincount(y) / len(y) - 0.1).max() < 0.005 for _, y in (train, test))  # stratified
    x = train[0] / 255
    assert abs(x.mean() - DIGITS.mean[0]) < 1e-3 and abs(x.std() - DIGITS.std[0]) < 1e-3


def test_validation_is_the_head_of_train_and_disjoint():
    (whole, _), _ = data.load_train(DIGITS, None, 0)
    (train, _), (val, _) = data.load_train(DIGITS, None, 200)
    assert np.array_equal(np.concatenate([val, train]), whole)
    with pytest.raises(cli.UserError, match="--val-size"):
        data.load_train(DIGITS, None, 1000)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet"])
def test_every_script_holds_out_the_same_images(dataset):
    """Or a diffusion model trained with the defaults would have seen the images that choose the classifier."""
    names = ("train_diffusion", "generate_synthetic", "extract_features", "train_at", "train_at_aux")
    sizes = {importlib.import_module(name).parse_args(["--dataset", dataset]).val_size for name in names}
    assert sizes == {200 if dataset == "digits" else 1024}


def test_streams_are_independent_functions_of_seed_use_and_step():
    def first(*key):
        return torch.rand(4, generator=data.stream(*key))

    assert torch.equal(first(0, "attack", 5), first(0, "attack", 5))
    others = [first(0, "attack", 5), first(0, "attack", 6), first(1, "attack", 5), first(0, "augment", 5)]
    assert len({tuple(o.tolist()) for o in others}) == 4


def test_image_ids_have_streams_of_their_own():
    """ids 521948 and 903268 shared torch's 32 bits of seed, and with them every pixel of their noise; 128 bits do not collide."""
    ids = [0, 521948, 903268, 1]
    noise = data.normal_of(data.id_streams(0, "generate", ids), (1, 8, 8))
    assert noise.shape == (4, 1, 8, 8) and noise.dtype == torch.float32
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 4
    assert torch.equal(noise[2:3], data.normal_of(data.id_streams(0, "generate", [903268]), (1, 8, 8)))
    many = data.normal_of(data.id_streams(0, "generate", range(2000)), (1, 8, 8)).flatten()
    assert abs(many.mean()) < 5 / len(many) ** 0.5 and abs(many.std() - 1) < 5 / (2 * len(many)) ** 0.5
    one = data.id_streams(0, "generate", [7])
    assert not torch.equal(data.normal_of(one, (2,)), data.normal_of(one, (2,)))  # a stream goes on


def test_to_x_is_nchw_in_0_1_and_channels_last():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    x = data.to_x(images)
    assert x.shape == (5, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(x[1, 2].numpy(), images[1, :, :, 2] / 255)


def test_augmentation_equals_cropping_and_mirroring_image_by_image():
    images = torch.randint(0, 256, (50, 6, 6, 2), dtype=torch.uint8)
    fast = data.augment(images, dataclasses.replace(DIGITS, crop_padding=2, flip=True), torch.Generator().manual_seed(7), 50, slice(None))
    generator = torch.Generator().manual_seed(7)
    corners = torch.randint(0, 5, (2, 50), generator=generator)
    mirrored = torch.randint(0, 2, (50,), generator=generator).bool()
    for i in range(50):
        top, left = corners[:, i]
        crop = F.pad(images[i].permute(2, 0, 1), (2, 2, 2, 2))[:, top : top + 6, left : left + 6]
        slow = (crop.flip(2) if mirrored[i] else crop).permute(1, 2, 0)
        assert torch.equal(fast[i], slow)
    assert mirrored.any() and not mirrored.all() and len(corners.unique()) == 5
    same = data.augment(images, dataclasses.replace(DIGITS, crop_padding=0), torch.Generator(), 50, slice(None))
    assert torch.equal(same, images)


def test_real_images_come_once_per_pass():
    sampler = batches(batch_size=96)
    drawn = torch.cat([sampler.real_rows(step) for step in range(25)])  # 2,400 draws of 800 images: three passes
    for data_pass in range(3):
        assert sorted(drawn[data_pass * 800 : (data_pass + 1) * 800].tolist()) == list(range(800))
    assert not torch.equal(drawn[:800], drawn[800:1600])


def test_sampler_is_a_function_of_the_step():
    forward, jumping = batches(), batches()
    xs = [forward(step) for step in range(60)]
    for step in (59, 3, 24, 25, 0):
        for a, b in zip(xs[step], jumping(step)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_batch_of_one_process(world_size, synthetic_dir):
    synthetic = SyntheticSet([synthetic_dir], DIGITS)
    whole = batches(synthetic=synthetic)(5)
    parts = [batches(synthetic=synthetic, rank=r, world_size=world_size)(5) for r in range(world_size)]
    for tensor, pieces in zip(whole, zip(*parts)):
        assert torch.equal(torch.stack(pieces, 1).flatten(0, 1), tensor)


@pytest.mark.parametrize("fraction,expected", [(0.7, 358), (0.0, 0), (1.0, 512), (0.875, 448)])
def test_count_of_synthetic_images(fraction, expected, synthetic_dir):
    """512 = 154 + 358 at 0.7, as in the base code."""
    synthetic = SyntheticSet([synthetic_dir], DIGITS)
    sampler = batches(512, synthetic, fraction, spec=dataclasses.replace(DIGITS, crop_padding=0))
    x, y = sampler(0)
    assert sampler.n_synthetic == expected and len(x) == 512
    known = {image.tobytes() for image in synthetic.gather(np.arange(64))[0]}
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sum(image.tobytes() in known for image in images) == expected


def test_without_a_synthetic_set_batches_are_real():
    assert batches(fraction=0.7).n_synthetic == 0


def test_gather_across_shards(synthetic_dir):
    synthetic = SyntheticSet([synthetic_dir], DIGITS)
    assert len(synthetic) == 64 and len(synthetic.sources[0].images) == 3
    order = np.random.default_rng(0).permutation(64).repeat(2)
    images, labels = synthetic.gather(order)
    every = np.concatenate([np.array(shard) for shard in synthetic.sources[0].images])
    assert np.array_equal(images, every[order])
    assert np.array_equal(labels, order % 10)  # the label of image id is id % num_classes
    assert all(isinstance(shard, np.memmap) for shard in synthetic.sources[0].images)
