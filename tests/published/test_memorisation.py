"""The search for copies of training images among generated ones.

Alone: python -m pytest tests/published/test_memorisation.py
"""

import math

import numpy as np
import pytest

from common import files
from published import memorisation


def test_distances_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1100, 3, 3, 2), dtype=np.uint8)
    train = rng.integers(0, 256, (2007, 3, 3, 2), dtype=np.uint8)
    train[2] = images[5]
    nearest = memorisation.two_nearest(images, train, "cpu")
    assert nearest.shape == (1100, 2) and nearest[5, 0] == 0
    for image, distances in zip(images[:50], nearest):
        differences = (image / 255.0 - train / 255.0).reshape(len(train), -1)
        slow = np.sort(np.linalg.norm(differences, axis=1))[:2]
        assert distances.numpy() == pytest.approx(slow, abs=1e-9)


@pytest.mark.parametrize("off", [0, 1])
def test_copies_of_bright_images_of_any_size_are_found(off):
    """Whole copies, and copies of which every value is off by one of 255: at 64 x 64 pixels they
    lie 0.43 apart, and in float32 the difference of two such squares is all rounding.
    """
    rng = np.random.default_rng(0)
    train = rng.integers(235, 254, (20, 64, 64, 3), dtype=np.uint8)
    nearest = memorisation.two_nearest(train[:5] + np.uint8(off), train, "cpu")
    assert nearest[:, 0].numpy() == pytest.approx(off * math.sqrt(64 * 64 * 3) / 255)
    assert (3 * nearest[:, 0] <= nearest[:, 1]).all()


def test_what_is_found_is_written_and_said(tmp_path, capsys):
    """One generated image is a training image, but for one value; no test image is near any."""
    train = np.zeros((3, 2, 2, 1), np.uint8)
    train[1:] = 255
    train[2, 1] = 0
    images = np.full((4, 2, 2, 1), 51, np.uint8)
    images[2] = 255
    images[2, 0, 0, 0] = 250
    test = np.full((2, 2, 2, 1), 102, np.uint8)
    memorisation.check(str(tmp_path), images, train, test, "cpu")
    found = files.read_json(tmp_path / "memorisation.json")
    assert found.pop("mean_generated") == pytest.approx((3 * 0.4 + 5 / 255) / 4)
    assert found.pop("mean_test") == pytest.approx(0.8)
    assert found == {
        "n_generated": 4,
        "n_memorised_generated": 1,
        "n_memorised_test": 0,
        "n_test": 2,
        "n_train": 3,
    }
    said = "generated images 0.305, as of copies 1 of 4; test images 0.800, as of copies 0 of 2\n"
    assert said in capsys.readouterr().out
    words = memorisation.in_words(str(tmp_path))
    assert "the first 4 images to the nearest of 3 training images is 0.305;" in words
    assert "as copies are: 1 of the generated and 0 of the test images." in words
