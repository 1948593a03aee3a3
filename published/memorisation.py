"""Whether generated images are copies of training images: memorisation.json of a synthetic set.

An image counts as memorised where its nearest training image is at most a third as far as the
second nearest (Yoon et al. 2023; Gu et al., arXiv 2310.02664). The same count of test images is
printed beside it, which no network has seen: real images have near copies among themselves.
"""

import math
import os

import torch

from common import files


def two_nearest(images, train, device):
    """The l2 distances of each image to the two nearest of `train`: (N, 2), for x in [0, 1].

    images, train: uint8 (N, H, W, C). A second one that is not there is inf away. Distances are
    exact: the matrix product behind them is of whole numbers in float64.
    """
    x = torch.from_numpy(images).flatten(1).to(device).double()
    nearest = torch.full((len(x), 2), math.inf, dtype=x.dtype, device=x.device)
    for chunk in torch.from_numpy(train).flatten(1).split(1000):
        distances = torch.cdist(x, chunk.to(device).double())
        nearest = torch.cat([nearest, distances], 1).topk(2, largest=False).values
    return nearest.cpu() / 255


def check(directory, images, train, test, device):
    """Compare generated images of a set with its training images. Prints and writes what is found.

    images, train, test: uint8 (N, H, W, C).
    """
    found = {"n_train": len(train)}
    texts = []
    for name, some in (("generated", images), ("test", test)):
        first, second = two_nearest(some, train, device).T
        n_memorised = int((3 * first <= second).sum())
        found[f"n_{name}"] = len(some)
        found[f"mean_{name}"] = first.mean().item()
        found[f"n_memorised_{name}"] = n_memorised
        texts.append(f"{name} images {first.mean():.3f}, as of copies {n_memorised} of {len(some)}")
    print(f"nearest training image, mean l2 distance: {'; '.join(texts)}")
    files.write_json(found, os.path.join(directory, "memorisation.json"))


def in_words(directory):
    """What `check` found, as a text for the card of the set."""
    path = os.path.join(directory, "memorisation.json")
    if not os.path.exists(path):
        return "Whether images are copies of training images is not recorded."
    found = files.read_json(path)
    with files.reading(path, "what generate_synthetic.py found"):
        return (
            f"The mean l2 distance (of pixels in [0, 1]) of the first {found['n_generated']:,} "
            f"images to the nearest of {found['n_train']:,} training images is "
            f"{found['mean_generated']:.3f}; that of {found['n_test']:,} test images is "
            f"{found['mean_test']:.3f}. At most a third as far as the second nearest, as copies "
            f"are: {found['n_memorised_generated']:,} of the generated and "
            f"{found['n_memorised_test']:,} of the test images."
        )
