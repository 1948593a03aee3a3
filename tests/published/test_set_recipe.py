"""What --verify counts and prints of a shard that was made again.

Whole verifications are in tests/test_publishing.py. Alone:
python -m pytest tests/published/test_set_recipe.py
"""

import numpy as np

from published import set_recipe


def test_differences_are_counted_over_batches(capsys):
    """Distances of bytes, not their differences modulo 256."""
    images = np.zeros((5, 2, 2, 1), np.uint8)
    labels = np.arange(5)
    made = images.copy()
    made[1, 0, 0, 0] = 255
    made[1, 1, 1, 0] = 1
    made[4, 0, 1, 0] = 2
    made_labels = np.array([0, 1, 2, 3, 0])
    found = set_recipe.Differences()
    for rows in (slice(0, 3), slice(3, 5)):
        found.add(images[rows], labels[rows], made[rows], made_labels[rows])
    assert found.other.tolist() == [2, 1]
    assert {gap: n for gap, n in enumerate(found.gaps.tolist()) if n} == {0: 17, 1: 1, 2: 1, 255: 1}
    found.print(5)
    assert capsys.readouterr().out == (
        "images  DIFFERENT: 2 of 5, in 3 of 20 values, by 86.00 of 255 on average, by 255 at most\n"
        "labels  DIFFERENT: 1 of 5\n"
    )
    again = set_recipe.Differences()
    again.add(made, labels, images, labels)
    assert again.gaps.equal(found.gaps) and again.other.tolist() == [2, 0]


def test_the_same_images(capsys):
    images = np.full((3, 2, 2, 1), 7, np.uint8)
    found = set_recipe.Differences()
    found.add(images, np.arange(3), images.copy(), np.arange(3))
    assert not found.other.any()
    found.print(3)
    assert capsys.readouterr().out == "images  equal to the bit: 3, 12 values\nlabels  equal: 3\n"
