"""The whole path by its commands, tiny, in processes of their own.

Alone: python -m pytest tests/test_end_to_end.py
"""

import json

import numpy as np
from conftest import DIGITS, python, read_log

from common import data, files
from published.synthetic import open_synthetic
from published.weights import load_classifier


def test_from_digits_to_a_table(tmp_path):
    diffusion, synthetic, runs = tmp_path / "diffusion", tmp_path / "synthetic", tmp_path / "runs"
    train_diffusion(diffusion)
    generate(diffusion, synthetic, tmp_path)
    probe(diffusion, tmp_path / "features")
    train_and_attack(diffusion, synthetic, runs)
    report(runs, synthetic)
    select(diffusion, synthetic, runs / "at" / "best.pt")


def train_diffusion(out_dir):
    flags = "--train-steps 60 --eval-every 30 --channels 16 32".split()
    python("train_diffusion.py", *flags, "--out-dir", out_dir, real=True)
    log = read_log(out_dir)
    assert log[-1]["val_loss"] < log[0]["val_loss"]
    assert (out_dir / "samples.png").stat().st_size > 1000


def generation(diffusion, out_dir):
    flags = "--n-images 300 --shard-size 100 --n-steps 6".split()
    return ["generate_synthetic.py", "--diffusion", diffusion, *flags, "--out-dir", out_dir]


def generate(diffusion, out_dir, tmp_path):
    """A second call makes nothing; a missing shard is made again, and that one alone."""
    command = generation(diffusion, out_dir)
    printed = python(*command).stdout
    assert "300 images; classes of the first 300: " + " ".join(["30"] * 10) in printed
    assert "nearest training image" in printed
    times = {path.name: path.stat().st_mtime_ns for path in out_dir.glob("shard*")}
    assert python(*command).stdout == printed
    moved = tmp_path / "moved.npy"
    (out_dir / "shard-00001-images.npy").rename(moved)
    python(*command)
    assert (out_dir / "shard-00001-images.npy").read_bytes() == moved.read_bytes()
    made = {
        path.name for path in out_dir.glob("shard*") if path.stat().st_mtime_ns != times[path.name]
    }
    assert made == {"shard-00001-images.npy", "shard-00001-labels.npy"}


def probe(diffusion, out_dir):
    flags = ["--diffusion", diffusion, "--sigmas", "0.1", "--probe", "--out-dir", out_dir]
    printed = python("extract_features.py", *flags).stdout
    accuracies = [float(line.split()[1].rstrip("%")) for line in printed.splitlines()[2:9]]
    assert len(accuracies) == 7 and max(accuracies) > 60


def train_and_attack(diffusion, synthetic, runs):
    recipe = "--epochs 8 --eval-every 4 --n-steps 2 --eval-n-steps 2".split()
    attack = "--attack pgd --n-restarts 1 --n-steps 5 --sanity-images 5".split()
    dm = ["--synthetic", synthetic]
    dra = ["--teacher", diffusion, "--block", "mid_block"]
    for cell, script, flags in (
        ("at", "train_at.py", []),
        ("at_dra", "train_at_aux.py", dra),
        ("dm_at", "train_at.py", dm),
        ("dm_at_dra", "train_at_aux.py", dm + dra),
    ):
        python(script, *recipe, *flags, "--out-dir", runs / cell)
        python("evaluate.py", "--checkpoint", runs / cell / "best.pt", *attack)


def report(runs, synthetic):
    flags = ["--runs", runs, "--synthetic", synthetic]
    printed = python(
        "-m", "runs.report", *flags, "--result", "results-best-pgd-linf-0.15.json"
    ).stdout
    rows = json.loads((runs / "table.json").read_text())
    assert [row["name"] for row in rows] == ["AT", "AT+DRA", "DM-AT", "DM-AT+DRA"]
    for row in rows:
        assert row["name"] in printed
        assert {"attack", "eps", "seconds", "versions"} <= row.keys()
        assert row["n"] == 797 and row["clean"] > 0.5 and row["robust"] < row["clean"]
    assert (runs / "report.png").stat().st_size > 20_000


def select(diffusion, synthetic, classifier):
    """Selection by confidence keeps the images that the classifier itself is surest of."""
    command = [*generation(diffusion, synthetic), "--classifier", classifier, "--keep-fraction"]
    printed = python(*command, "0.2").stdout
    assert "60 images; classes of the first 60: " + " ".join(["6"] * 10) in printed
    python(*command, "0.2")  # nothing is left to do
    python(*command, "0.5", expect=2)
    selected = open_synthetic([str(synthetic)], DIGITS).sources[0].rows
    manifest_path = synthetic / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    selection = manifest.pop("selection")
    assert selection == {"keep_fraction": 0.2, "classifier_sha256": files.sha256(classifier)}

    manifest_path.write_text(json.dumps(manifest))  # all images again
    model, _ = load_classifier(str(classifier), DIGITS, "cpu")
    images, labels = open_synthetic([str(synthetic)], DIGITS).gather(np.arange(300))
    confidence = model(data.to_x(images)).softmax(1).numpy()[np.arange(300), labels]
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        kept = np.intersect1d(rows, selected)
        left_out = np.setdiff1d(rows, selected)
        assert confidence[kept].min() >= confidence[left_out].max()
