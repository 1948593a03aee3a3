"""Whether generated images are copies of training images: memorisation.json of a synthetic set."""

import os

import torch

from common import files

NEAR = 0.1  # l2 distance to a training image, of x in [0, 1], below which an image is memorised


def nearest_distances(images, train, device):
    """The l2 distance of each image to the nearest image of `train`: (N,), for x in [0, 1].

    images, train: uint8 (N, H, W, C).
    """
    x = torch.from_numpy(images).flatten(1).to(device).float() / 255
    nearest = []
    for chunk in torch.from_numpy(train).flatten(1).split(1000):
        x_train = chunk.to(device).float() / 255
        nearest.append(torch.cdist(x, x_train).amin(1))
    return torch.stack(nearest).amin(0).cpu()


def check(directory, images, train, test, device):
    """Compare generated images of a set with its training images. Prints and writes what is found.

    images, train, test: uint8 (N, H, W, C).
    """
    generated = nearest_distances(images, train, device)
    held_out = nearest_distances(test, train, device)
    means = f"generated {generated.mean():.3f}, test images {held_out.mean():.3f}"
    n_near = int((generated < NEAR).sum())
    title = "nearest training image, mean l2 distance (memorised images lie near 0)"
    print(f"{title}: {means}; generated below {NEAR}: {n_near}")
    found = {
        "n_generated": len(images),
        "n_train": len(train),
        "n_test": len(test),
        "mean_generated": generated.mean().item(),
        "mean_test": held_out.mean().item(),
        "near": NEAR,
        "n_near": n_near,
    }
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
            f"{found['mean_test']:.3f}. Nearer than {found['near']}: {found['n_near']:,} images."
        )
