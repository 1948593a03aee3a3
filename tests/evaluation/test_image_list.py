"""A list of image files. Alone: python -m pytest tests/evaluation/test_image_list.py"""

import numpy as np
import pytest

from common import UserError
from evaluation.image_list import select_listed
from published.image_files import ImageFiles

LABELS = np.array([0, 0, 1])


@pytest.fixture
def images():
    paths = ["/data/val/n01/a.JPEG", "/data/val/n01/b.JPEG", "/data/val/n02/a.JPEG"]
    return ImageFiles(paths, resize=None, size=8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_images_come_in_the_order_of_the_list(encoding, newline, images, tmp_path):
    content = newline.join(["n02/a.JPEG", "", " n01/a.JPEG", ""])
    (tmp_path / "list.txt").write_bytes(content.encode(encoding))
    chosen, labels = select_listed(images, LABELS, tmp_path / "list.txt")
    assert [chosen.path(row) for row in range(2)] == [images.path(2), images.path(0)]
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "content,match",
    [
        (b"", "empty"),
        (b"n03/a.JPEG", "'n03/a.JPEG' is not among the images"),
        (b"n02/a.JPEG\nn01/a.JPEG\nn02/a.JPEG", "'n02/a.JPEG' is there twice"),
        (b"\xff\xfe", "not a list of image files"),
        (None, "no such file, expected a list of image files"),
    ],
)
def test_other_lists_are_refused(content, match, images, tmp_path):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"list.txt: .*{match}"):
        select_listed(images, LABELS, tmp_path / "list.txt")
