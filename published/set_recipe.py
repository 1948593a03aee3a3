"""The settings of a synthetic set, its manifest.json, and how a shard made again by them differs.

Images are made in generate_synthetic.py. What a set's card says is in published/set_card.py.
"""

import os
from argparse import ArgumentTypeError

import numpy as np
import torch

from common import UserError, cli, files, run
from published import cards

SAMPLER = {  # flags that manifest.json has under "sampler", and their types
    "n_steps": cli.count,
    "sigma_min": cli.positive,
    "sigma_max": cli.positive,
    "rho": cli.positive,
    "guidance_scale": cli.non_negative,
    "batch_size": cli.count,
}


def manifest_of(args, spec, model, sigma_limits, guide=None):
    """All that the shards' bytes depend on. Selecting images adds an entry "selection".

    args: flags of generate_synthetic.py. spec: the data set. model, guide: diffusion models.
    sigma_limits: the lowest and the highest noise level, as they are used.
    """
    sampler = {name: getattr(args, name) for name in SAMPLER}
    sampler["sigma_min"], sampler["sigma_max"] = sigma_limits
    manifest = {
        "format": 2,
        "dataset": spec.name,
        "n": args.n_images,
        "ids": [0, args.n_images],
        "label": "id % num_classes",
        "num_classes": spec.num_classes,
        "image_shape": [model.image_size, model.image_size, model.channels],
        "shard_size": args.shard_size,
        "seed": args.seed,
        "precision": args.precision,
        "network_sha256": model.sha256,
        "held_out": model.val_size,
        "sampler": sampler,
    }
    if guide is not None:
        manifest["guide_sha256"] = guide.sha256
        manifest["held_out"] = min(model.val_size, guide.val_size)
    if args.relabel:
        manifest["label"] = "of a classifier"
        manifest["labels_of_sha256"] = files.sha256(args.classifier)
        if args.weights:
            manifest["labels_of_weights"] = args.weights
    return manifest | {"classes": spec.classes} if spec.classes else manifest


def use_manifest(args, manifest):
    """Give the flags the values that a manifest records.

    Raises UserError where one is missing or damaged.
    """
    path = os.path.join(args.out_dir, "manifest.json")
    sampler = manifest.get("sampler")
    recorded = {"seed": manifest.get("seed")}
    if isinstance(sampler, dict):
        recorded |= sampler
    for name, kind in {"seed": cli.seed, **SAMPLER}.items():
        try:
            setattr(args, name, kind(str(recorded.get(name))))
        except ArgumentTypeError as error:
            raise UserError(f"{path}: damaged, {name}: {error}") from error
    if args.sigma_min >= args.sigma_max or args.rho < 0.1:
        raise UserError(f"{path}: damaged, its noise levels are none")
    args.precision = manifest.get("precision")
    if args.precision not in ("fp32", "tf32", "bf16"):
        expected = "expected fp32, tf32 or bf16"
        raise UserError(f"{path}: its precision is {args.precision}, {expected}")
    args.n_images = manifest["n"]
    args.shard_size = manifest["shard_size"]


class Differences:
    """Counts of what differs between images and labels made again and those in the files.

    gaps: int64 (256,), numbers of pixel values by their distance. other: int64 (2,), numbers of
    images and of labels that differ.
    """

    def __init__(self):
        self.gaps = torch.zeros(256, dtype=torch.long)
        self.other = torch.zeros(2, dtype=torch.long)

    def add(self, images, labels, made_images, made_labels):
        """Count a batch. images, made_images: uint8 (B, H, W, C). The others: int64 (B,)."""
        gap = np.abs(made_images.astype(np.int16) - images)
        self.gaps += torch.from_numpy(np.bincount(gap.flatten(), minlength=256))
        self.other[0] += int(gap.reshape(len(gap), -1).any(1).sum())
        self.other[1] += int((made_labels != labels).sum())

    def sum_over_ranks(self):
        run.sum_over_ranks(self.gaps)
        run.sum_over_ranks(self.other)

    def print(self, n):
        """Print what n images and labels differ by."""
        n_images, n_labels = self.other.tolist()
        gaps = self.gaps.tolist()
        if n_images:
            n_values = sum(gaps[1:])
            mean = sum(gap * count for gap, count in enumerate(gaps)) / n_values
            largest = max(gap for gap, count in enumerate(gaps) if count)
            where = f"{n_images:,} of {n:,}, in {n_values:,} of {sum(gaps):,} values"
            amount = f"by {mean:.2f} of 255 on average, by {largest} at most"
            print(f"images  DIFFERENT: {where}, {amount}")
        else:
            print(f"images  equal to the bit: {n:,}, {sum(gaps):,} values")
        print(f"labels  DIFFERENT: {n_labels:,} of {n:,}" if n_labels else f"labels  equal: {n:,}")


def print_places(directory):
    """Print where device, versions or threads are not those that a set's env.json records."""
    there = cards.read_environment(directory)
    here = run.environment()
    if not there:
        print("note: env.json is missing: on what the set was made is not known")
    for key in ("device", "torch", "diffusers", "numpy", "threads"):
        if there and here[key] != there.get(key):
            print(f"note: {key} is {here[key]} here, and was {there.get(key)} in the first place")
