"""The whole path by its commands, tiny, in processes of their own. Alone: python -m pytest tests/test_end_to_end.py"""

import json

import numpy as np
from conftest import DIGITS, python, read_log

from common import checkpoint, data, models
from common.synthetic import SyntheticSet


def test_from_digits_to_a_table(tmp_path):
    diffusion, synthetic, runs = tmp_path / "diffusion", tmp_path / "synthetic", tmp_path / "runs"
    python("train_diffusion.py", "--train-steps", "60", "--eval-every", "30", "--channels", "16", "32", "--out-dir", diffusion)
    log = read_log(diffusion)
    assert log[-1]["val_loss"] < log[0]["val_loss"] and (diffusion / "samples.png").stat().st_size > 1000

    argv = ["--diffusion", diffusion, "--n-images", "300", "--shard-size", "100", "--n-steps", "6", "--out-dir", synthetic]
    first = python("generate_synthetic.py", *argv).stdout
    assert "300 images; classes of the first 300: " + " ".join(["30"] * 10) in first and "nearest training image" in first
    stamps = {p.name: p.stat().st_mtime_ns for p in synthetic.glob("shard*")}
    assert python("generate_synthetic.py", *argv).stdout == first
    (synthetic / "shard-00001-images.npy").rename(tmp_path / "moved.npy")
    python("generate_synthetic.py", *argv)  # makes the missing shard again, and that one alone
    assert (synthetic / "shard-00001-images.npy").read_bytes() == (tmp_path / "moved.npy").read_bytes()
    assert {p.name for p in synthetic.glob("shard*") if p.stat().st_mtime_ns != stamps[p.name]} == {
        "shard-00001-images.npy",
        "shard-00001-labels.npy",
    }

    probe = python("extract_features.py", "--diffusion", diffusion, "--sigmas", "0.1", "--probe", "--out-dir", tmp_path / "features").stdout
    rows = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in probe.splitlines()[2:9]}
    assert len(rows) == 7 and max(rows.values()) > 60

    short = ["--epochs", "8", "--eval-every", "4", "--n-steps", "2", "--eval-n-steps", "2"]
    more = {
        "at": ("train_at.py", []),
        "at_dra": ("train_at_aux.py", ["--teacher", diffusion, "--block", "mid_block"]),
        "dm_at": ("train_at.py", ["--synthetic", synthetic]),
        "dm_at_dra": ("train_at_aux.py", ["--synthetic", synthetic, "--teacher", diffusion, "--block", "mid_block"]),
    }
    for name, (script, argv) in more.items():
        python(script, *short, *argv, "--out-dir", runs / name)
        attack = ["--attack", "pgd", "--n-restarts", "1", "--n-steps", "5", "--sanity-images", "5"]
        python("evaluate.py", "--checkpoint", runs / name / "best.pt", *attack)
    table = python("-m", "runs.report", "--runs", runs, "--synthetic", synthetic, "--result", "results-best-pgd-linf-0.15.json").stdout
    rows = json.loads((runs / "table.json").read_text())
    assert [row["name"] for row in rows] == ["AT", "AT+DRA", "DM-AT", "DM-AT+DRA"] and all(row["name"] in table for row in rows)
    for row in rows:
        assert {"name", "clean", "robust", "n", "attack", "eps", "seconds", "versions"} <= row.keys()
        assert row["n"] == 797 and row["clean"] > 0.5 and row["robust"] < row["clean"]
    assert (runs / "report.png").stat().st_size > 20_000

    # Confidence selection by one of the classifiers, checked against the classifier itself.
    argv = ["--diffusion", diffusion, "--n-images", "300", "--shard-size", "100", "--n-steps", "6", "--out-dir", synthetic]
    chosen = ["--classifier", runs / "at" / "best.pt", "--keep-fraction", "0.2"]
    assert "60 images; classes of the first 60: " + " ".join(["6"] * 10) in python("generate_synthetic.py", *argv, *chosen).stdout
    python("generate_synthetic.py", *argv, *chosen)  # nothing left to do
    python("generate_synthetic.py", *argv, *chosen[:2], "--keep-fraction", "0.5", expect=2)
    selected = SyntheticSet([str(synthetic)], DIGITS)
    model, _ = models.load_classifier(str(runs / "at" / "best.pt"), DIGITS, "cpu")
    manifest = json.loads((synthetic / "manifest.json").read_text())
    assert manifest["selection"] == {"keep_fraction": 0.2, "classifier_sha256": checkpoint.sha256(runs / "at" / "best.pt")}
    del manifest["selection"]
    (synthetic / "manifest.json").write_text(json.dumps(manifest))
    images, labels = SyntheticSet([str(synthetic)], DIGITS).gather(np.arange(300))
    confidence = model(data.to_x(images)).softmax(1).numpy()[np.arange(300), labels]
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        kept = np.intersect1d(rows, selected.sources[0].rows)
        assert confidence[kept].min() >= np.delete(confidence[rows], np.searchsorted(rows, kept)).max()
