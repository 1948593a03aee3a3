"""The mixed, augmented batches of common/data.py against torchvision's transforms image by image in DataLoader workers; and their memory.

    python benchmarks/loading.py

CIFAR-10's size, batch 512, 70 % synthetic; random bytes. Memory: what a process has for itself, mapped files not counted, after 50
batches of a set of 10 thousand to 50 million images (sparse files: of memory they say the same as full ones; of a disk's speed, nothing).
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import reference
from measure import ROOT, alternate, compare, record  # first: it finds the project

from common import checkpoint, cli, data, synthetic
from common.synthetic import shard_paths

SIZES = [10_000, 100_000, 1_000_000, 10_000_000, 50_000_000]
SHARD = 1_000_000
BATCH, FRACTION, SPEC = 512, 0.7, data.DATASETS["cifar10"]


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--repeats", type=cli.count, default=5, help="measurements of each row")
    parser.add_argument("--read", metavar="SET", help="read 50 batches of this set, print the process's memory in MB, and end")
    return parser.parse_args(argv)


def real_images(n):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)


def sparse_set(folder, n):
    """A directory as generate_synthetic.py leaves it, of n black images that take no room on the disk."""
    for shard in range(-(-n // SHARD)):
        size = min(SHARD, n - shard * SHARD)
        for path, dtype, shape in zip(shard_paths(folder, shard), (np.uint8, np.int64), ((size, 32, 32, 3), (size,))):
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    manifest = {"format": 2, "dataset": "cifar10", "n": n, "num_classes": 10, "image_shape": [32, 32, 3], "shard_size": min(SHARD, n)}
    checkpoint.write_json(manifest | {"held_out": 1024}, os.path.join(folder, "manifest.json"))


def batches_of(path, real):
    return data.Batches(*real, synthetic.SyntheticSet([path], SPEC), FRACTION, BATCH, SPEC, 0, "cpu")


def memory_of(folder, n):
    sparse_set(folder, n)
    done = subprocess.run([sys.executable, __file__, "--read", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(args):
    if args.read:
        batches = batches_of(args.read, real_images(50_000))
        for step in range(50):
            batches(step)
        return print(int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
    real, made = real_images(50_000), real_images(100_000)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(os.path.join(folder, "set.npz"), image=made[0], label=made[1])
        batches, steps = batches_of(os.path.join(folder, "set.npz"), real), itertools.count()

        def plain():  # its workers end with it, or they would run ahead while the other is measured
            loader = reference.loader(real, made, SPEC, BATCH, FRACTION, os.cpu_count())
            for _ in range(5):
                next(loader)
            begun = time.perf_counter()
            for _ in range(50):
                next(loader)
            return time.perf_counter() - begun

        def ours():
            for _ in range(50):
                batches(next(steps))

        seconds = alternate({"ours": ours, "plain": plain}, args.repeats)
    lines = [compare("a mixed, augmented batch of 512, 32 x 32", f"torchvision per image, {os.cpu_count()} workers", *seconds.values(), 20)]
    memory = []
    for n in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            memory.append(memory_of(folder, n))
    lines.append(compare("memory of a process that reads 50 million images", "10 thousand", memory[-1:], memory[:1], 1.05, at_most=True))
    record("loading", lines, megabytes=dict(zip(map(str, SIZES), memory)))


if __name__ == "__main__":
    cli.run(main, parse_args())
