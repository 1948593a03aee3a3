"""The time and the memory that the mixed, augmented training batches of common/data.py take.

How rounds are taken in turns, and stored, stands in measure.py.

batch_time: against torchvision's transforms, image by image in DataLoader workers. memory: what a
process has for itself (mapped files not counted) after 50 batches of a synthetic set of 50 million
images, against one of 10 thousand. The set is of sparse files, which take no room on the disk: they
say of memory what full ones say, and nothing of a disk's speed. Images are of CIFAR-10's size.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch

from benchmarks import reference
from benchmarks.measure import ROOT, alternate, compare, timer
from common import data, files
from common.synthetic import shard_paths
from published.datasets import DATASETS
from published.synthetic import open_synthetic

SPEC = DATASETS["cifar10"]
BATCH_SIZE = 512
SYNTHETIC_FRACTION = 0.7
N_BATCHES = 50
SMALL, LARGE = 10_000, 50_000_000
SHARD_SIZE = 1_000_000


def batch_time(rounds):
    """A row: our batches against torchvision's."""
    real = random_images(50_000)
    synthetic = random_images(100_000)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "set.npz")
        np.savez(path, image=synthetic[0], label=synthetic[1])
        batches = our_batches(path, real)
        numbers = itertools.count()

        def plain():
            # The workers end with the loader. They would run ahead while ours is measured.
            loader = reference.loader(real, synthetic, SPEC, BATCH_SIZE, SYNTHETIC_FRACTION)
            for _ in range(5):
                next(loader)
            return timer(lambda: next(loader), N_BATCHES)()

        ours = timer(lambda: batches(next(numbers)), N_BATCHES)
        seconds = alternate({"ours": ours, "plain": plain}, rounds)
    what = f"a mixed, augmented batch of {BATCH_SIZE}, 32 x 32"
    against = f"torchvision, image by image, {os.cpu_count()} workers"
    return compare(what, against, seconds["ours"], seconds["plain"], target=20)


def memory(rounds):
    """A row: memory of a process that reads 50 million images; one round, it does not vary."""
    small = memory_with(SMALL)
    large = memory_with(LARGE)
    what = "memory of a process that reads 50 million images"
    return compare(what, "10 thousand images", [large], [small], 1.05, "the cost")


def memory_with(n):
    """Megabytes of a fresh process after N_BATCHES batches of a synthetic set of n images."""
    with tempfile.TemporaryDirectory() as folder:
        make_sparse_set(folder, n)
        command = [sys.executable, "-m", "benchmarks.loading", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def make_sparse_set(folder, n):
    """A directory as generate_synthetic.py leaves it, of n black images of class 0."""
    for shard, first in enumerate(range(0, n, SHARD_SIZE)):
        size = min(SHARD_SIZE, n - first)
        images_path, labels_path = shard_paths(folder, shard)
        np.lib.format.open_memmap(images_path, "w+", np.uint8, (size, 32, 32, 3)).flush()
        np.lib.format.open_memmap(labels_path, "w+", np.int64, (size,)).flush()
    manifest = {
        "format": 2,
        "dataset": "cifar10",
        "n": n,
        "num_classes": 10,
        "image_shape": [32, 32, 3],
        "shard_size": min(SHARD_SIZE, n),
        "held_out": 1024,
    }
    files.write_json(manifest, os.path.join(folder, "manifest.json"))


def random_images(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, n)
    return images, labels


def our_batches(path, real):
    """The batches of common/data.py, of the synthetic set at `path` and real (images, labels)."""
    return data.Batches(
        SPEC,
        real,
        batch_size=BATCH_SIZE,
        seed=0,
        device=torch.device("cpu"),
        synthetic=open_synthetic([path], SPEC),
        synthetic_fraction=SYNTHETIC_FRACTION,
    )


def print_memory(path):
    """Read batches of a set and print the megabytes that this process has for itself."""
    batches = our_batches(path, random_images(50_000))
    for step in range(N_BATCHES):
        batches(step)
    status = files.read_text("/proc/self/status")
    print(int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024)


if __name__ == "__main__":
    print_memory(sys.argv[1])
