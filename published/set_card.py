"""The card and the checksums with which a synthetic set's directory can be published.

`hf upload --repo-type dataset` puts the directory on the Hugging Face hub. What the card says is
taken from the set's own files; what they do not hold is called not recorded.
"""

import os

import numpy as np

from common import files, run
from published import cards, memorisation
from published.synthetic_set import shard_paths

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def export(directory, source):
    """Write README.md and SHA256SUMS into a set's directory, and shorten the paths in its env.json.

    source: the set, of synthetic_set.open_shards. SHA256SUMS is of the kind that `sha256sum -c`
    reads, and covers manifest, shards and selection.
    Raises UserError, before anything is written, where the files are there with other content.
    """
    environment = cards.read_environment(directory)
    names = ["manifest.json"]
    for shard in range(len(source.images)):
        names += [os.path.basename(path) for path in shard_paths(directory, shard)]
    if source.rows is not None:
        names.append("selection.npy")
    sums = ""
    for name in run.progress(names, desc="hash", unit="file"):
        sums += f"{files.sha256(os.path.join(directory, name))}  {name}\n"
    contents = {
        "SHA256SUMS": sums.encode(),
        "README.md": card(source, environment, memorisation.in_words(directory)),
    }
    cards.write_folder(directory, contents)
    if environment:
        files.write_json(environment, os.path.join(directory, "env.json"))
    else:
        print("note: env.json is missing: the card has no command, commit or versions")
    size = sum(os.path.getsize(os.path.join(directory, name)) for name in names)
    print(f"{directory}: README.md, SHA256SUMS; {len(names)} files of the set, {size / 1e6:.1f} MB")
    print(
        "fill in README.md: the licence of the images, the name of the network, where the code is"
    )
    print(f"hf upload --repo-type dataset OWNER/NAME {directory}")


def card(source, environment, copies):
    """The bytes of README.md."""
    from huggingface_hub import DatasetCardData

    manifest = source.manifest
    n = len(source)
    data = DatasetCardData(
        task_categories=["image-classification"],
        tags=["synthetic", "diffusion"],
        size_categories=[SIZES[min(max(len(str(n)) - 3, 0), len(SIZES) - 1)]],
        viewer=False,  # it would take manifest.json for the data
    )
    settings = {"precision": manifest.get("precision"), "seed": manifest.get("seed")}
    if isinstance(manifest.get("sampler"), dict):
        settings |= manifest["sampler"]
    command = cards.command_of(environment, "generate_synthetic.py")
    parts = [
        f"# {n:,} generated images for {manifest['dataset']}",
        cards.table(["", ""], _facts(source)),
        "## Copies of training images",
        copies,
        "## Use",
        cards.code(_commands(source)),
        "SET is a local copy of this repository, NETWORK the diffusion model. The last command "
        "makes a shard again and compares it bit for bit: an image's noise is a function of the "
        "seed and of its number alone.",
        "## How it was made",
        "By Heun's sampler of EDM, with the scripts of *Adversarial training with diffusion images "
        "and diffusion representations*. In commands, paths are cut down to their last part.",
        cards.code(command),
        cards.origin_of(environment),
        cards.table(["setting", "value"], list(settings.items())),
    ]
    return cards.card(data, parts)


def _facts(source):
    """Rows of what the set is and what made it."""
    manifest = source.manifest
    shape = " x ".join(map(str, manifest["image_shape"]))
    n_shards = len(source.images)
    held_out = manifest["held_out"]
    seen = "the network may have seen all training images"
    if held_out:
        seen = f"the network has not seen the first {held_out:,} training images"
    rows = [
        ["images", f"{len(source):,}, {shape}, uint8"],
        ["labels", _balance(source)],
        ["files", f"{n_shards} shards of up to {manifest['shard_size']:,} images, .npy"],
        ["network", f"SHA-256 {cards.digest(manifest.get('network_sha256'))}"],
    ]
    if "guide_sha256" in manifest:
        rows.append(["guide", f"SHA-256 {cards.digest(manifest['guide_sha256'])}"])
    rows.append(["held out", seen])
    selection = manifest.get("selection")
    if isinstance(selection, dict):
        share = f"{selection.get('keep_fraction')} of each class, {len(source):,} of "
        share += f"{source.n_rows:,} images, listed in selection.npy"
        digest = cards.digest(selection.get("classifier_sha256"))
        rows.append(["selected", f"{share}; by the confidence of the classifier SHA-256 {digest}"])
    else:
        rows.append(["selected", "no: all images that were generated"])
    return rows


def _balance(source):
    """How many images the classes have, and whose labels they are."""
    labels = np.concatenate(source.labels)
    if source.rows is not None:
        labels = labels[source.rows]
    counts = np.bincount(labels, minlength=source.manifest["num_classes"])
    per_class = f"{counts.min():,} to {counts.max():,} images each"
    if counts.min() == counts.max():
        per_class = f"{counts.min():,} images each"
    balance = f"{len(counts)} classes, {per_class}"
    if "labels_of_sha256" in source.manifest:
        digest = cards.digest(source.manifest["labels_of_sha256"])
        balance += f"; predicted by the classifier SHA-256 {digest}, the network was told none"
    return balance


def _commands(source):
    """How the set is fetched, checked, trained on, and one of its shards made again."""
    data = f"--dataset {source.manifest['dataset']}"
    if source.manifest["dataset"] == "folder":
        data += f" --data-dir DIR --image-size {source.manifest['image_shape'][0]}"
    networks = "--diffusion NETWORK"
    if "guide_sha256" in source.manifest:
        networks += " --guide GUIDE"
    if "labels_of_sha256" in source.manifest:
        networks += f" {data} --classifier CLASSIFIER"
    lines = [
        "hf download --repo-type dataset OWNER/NAME --local-dir SET",
        "(cd SET && sha256sum -c SHA256SUMS)",
        f"python train_at.py {data} --synthetic SET",
        f"python generate_synthetic.py --out-dir SET {networks} --verify 0",
    ]
    return "\n".join(lines)
