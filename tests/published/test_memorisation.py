"""The search for copies of training images among generated ones.

Alone: python -m pytest tests/published/test_memorisation.py
"""

import numpy as np
import pytest

from common import files
from published import memorisation


def test_nearest_distances_are_those_of_a_slow_search():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1100, 3, 3, 2), dtype=np.uint8)
    train = rng.integers(0, 256, (7, 3, 3, 2), dtype=np.uint8)
    train[2] = images[5]
    nearest = memorisation.nearest_distances(images, train, "cpu")
    assert nearest.shape == (1100,) and nearest[5] < 2e-3
    for image, distance in zip(images[:50], nearest):
        differences = (image / 255.0 - train / 255.0).reshape(7, -1)
        slow = np.linalg.norm(differences, axis=1).min()
        assert distance.item() == pytest.approx(slow, abs=2e-3)


def test_what_is_found_is_written_and_said(tmp_path, capsys):
    """One generated image is a training image, but for one value; no test image is near any."""
    train = np.zeros((3, 2, 2, 1), np.uint8)
    train[1:] = 255
    images = np.full((4, 2, 2, 1), 51, np.uint8)
    images[2] = 255
    images[2, 0, 0, 0] = 250
    test = np.full((2, 2, 2, 1), 102, np.uint8)
    memorisation.check(str(tmp_path), images, train, test, "cpu")
    found = files.read_json(tmp_path / "memorisation.json")
    mean = (3 * 0.4 + 5 / 255) / 4
    assert abs(found.pop("mean_generated") - mean) < 1e-3  # cdist's rounding
    assert abs(found.pop("mean_test") - 0.8) < 1e-3
    assert found == {"n_generated": 4, "n_train": 3, "n_test": 2, "near": 0.1, "n_near": 1}
    assert "generated below 0.1: 1\n" in capsys.readouterr().out
    words = memorisation.in_words(str(tmp_path))
    assert "the first 4 images to the nearest of 3 training images is 0.305;" in words
    assert "that of 2 test images is 0.800. Nearer than 0.1: 1 images." in words
