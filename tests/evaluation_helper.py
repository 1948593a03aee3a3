"""A short training to attack, and evaluate.py called on it, for tests of evaluation."""

import json

import numpy as np
import torch
from conftest import DIGITS

import evaluate
import train_at
from common import data
from published.weights import load_classifier


def train_short(out_dir):
    """best.pt of a short but real training: robust enough that every attack has work left."""
    flags = "--epochs 12 --eval-every 12 --eval-n-steps 1 --n-steps 2"
    train_at.main(train_at.parse_args([*flags.split(), "--out-dir", str(out_dir)]))
    return str(out_dir / "best.pt")


def evaluate_with(checkpoint, folder, flags):
    """(result, arrays per image) of evaluate.py with these flags, a text; files go to `folder`."""
    folder.mkdir(exist_ok=True)
    argv = ["--checkpoint", checkpoint, "--out", str(folder / "result.json"), *flags.split()]
    if "--sanity-images" not in argv:
        argv += ["--sanity-images", "0"]
    evaluate.main(evaluate.parse_args(argv))
    result = json.loads((folder / "result.json").read_text())
    return result, np.load(folder / "result.npz")


def first_images(checkpoint, n):
    """(model, x, y) of a digits checkpoint and the first n test images."""
    model, _ = load_classifier(checkpoint, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    return model, data.to_x(images[:n]), torch.from_numpy(labels[:n])
