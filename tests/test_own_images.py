"""A stranger's images: the whole 2 x 2 on a folder, on two ranks and one, killed once; --check.

Alone: python -m pytest -n 0 tests/test_own_images.py
"""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal_states, python
from PIL import Image

from common import files

CLASSES = ("circle", "cross", "stripes")
FOLDER = ["--dataset", "folder", "--image-size", "16"]
SMALL = "--model wrn-10-1 --epochs 6 --eval-every 2 --batch-size 32 --n-steps 2 --eval-n-steps 2"
SMALL = [*SMALL.split(), "--warmup-fraction", "0.2"]


def draw(kind, rng, size=20):
    """A figure in a colour of its own on a dark ground: uint8 (H, W, 3)."""
    y, x = np.mgrid[:size, :size] - rng.uniform(0.4, 0.6, (2, 1, 1)) * size
    shapes = {
        "circle": x**2 + y**2 < (size / 3) ** 2,
        "cross": (abs(x) < size / 8) | (abs(y) < size / 8),
        "stripes": x.astype(int) % 6 < 3,
    }
    pixels = 40 * rng.random((size, size, 3)) + shapes[kind][..., None] * rng.uniform(80, 210, 3)
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 training and 30 test images of three classes, as PNG, JPEG and WebP."""
    root = tmp_path_factory.mktemp("own") / "images"
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 10)):
        for kind in CLASSES:
            place = root / split / kind
            place.mkdir(parents=True)
            for i in range(n):
                ending = ("png", "jpg", "webp")[i % 3]
                Image.fromarray(draw(kind, rng)).save(place / f"{i}.{ending}")
    return root


def script(name, folder, *flags, **options):
    return python(name, *FOLDER, "--data-dir", folder, *flags, **options)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A folder of the diffusion model and the synthetic set of the stranger's images."""
    out = tmp_path_factory.mktemp("made")
    flags = "--train-steps 30 --channels 8 16 --batch-size 32 --eval-every 15 --out-dir"
    script("train_diffusion.py", folder, *flags.split(), out / "diffusion", ranks=2)
    flags = "--n-images 60 --shard-size 20 --n-steps 3 --batch-size 20"
    where = ["--diffusion", out / "diffusion", "--out-dir", out / "synthetic"]
    done = script("generate_synthetic.py", folder, *flags.split(), *where)
    assert "60 images" in done.stdout
    return out


def kill_in_training(command, out):
    """Start a command, and kill it when its first checkpoint is written."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    end = time.time() + 120
    while not os.path.exists(out / "last.pt") and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert os.path.exists(out / "last.pt")
    return torch.load(out / "last.pt", weights_only=True)["step"]


def test_two_by_two_on_a_folder(folder, made, tmp_path):
    """All four cells; one of them on two ranks, one killed and resumed, from a moved folder."""
    synthetic = ["--synthetic", made / "synthetic"]
    teacher = ["--teacher", made / "diffusion"]
    script("train_at.py", folder, *SMALL, "--out-dir", tmp_path / "at", ranks=2)
    script("train_at_aux.py", folder, *SMALL, *teacher, "--out-dir", tmp_path / "at_dra")
    both = ["train_at_aux.py", *FOLDER, *SMALL, *synthetic, *teacher]
    straight = [*both, "--data-dir", folder, "--out-dir", tmp_path / "dm_at_dra"]
    python(*straight)
    script("train_at.py", folder, *SMALL, *synthetic, "--out-dir", tmp_path / "dm_at")

    killed = tmp_path / "killed"
    step = kill_in_training([*both, "--data-dir", folder, "--out-dir", killed], killed)
    moved = shutil.copytree(folder, tmp_path / "moved")
    python(*both, "--data-dir", moved, "--out-dir", killed)
    last = [
        torch.load(path / "last.pt", weights_only=True) for path in (tmp_path / "dm_at_dra", killed)
    ]
    assert step < last[0]["step"] == last[1]["step"]
    assert_equal_states(*last)

    for name in ("at", "at_dra", "dm_at", "dm_at_dra"):
        best = torch.load(tmp_path / name / "best.pt", weights_only=True)
        assert best["classes"] == list(CLASSES) and best["image_size"] == 16
        assert 0.05 < min(best["mean"]) < max(best["mean"]) < 0.7
        flags = [
            "--attack",
            "apgd",
            "--sanity-images",
            "0",
            "--checkpoint",
            tmp_path / name / "best.pt",
        ]
        ranks = 2 if name == "at" else 1
        done = script("evaluate.py", folder, *flags, ranks=ranks)
        (path,) = (tmp_path / name).glob("results-best-apgd-linf-*.json")
        result = json.loads(path.read_text())
        assert result["n"] == 30 and result["dataset"] == "folder"
        assert [row["class"] for row in result["by_class"]] == list(CLASSES)
        assert sum(row["n"] for row in result["by_class"]) == 30
        worst = min(result["by_class"], key=lambda row: row["robust"])
        assert f"worst class: {worst['class']}" in done.stdout


def test_features_and_analysis_of_a_folder(folder, made, tmp_path):
    flags = [
        "--diffusion",
        made / "diffusion",
        "--sigmas",
        "0.1",
        "--probe",
        "--probe-split",
        "test",
    ]
    done = script("extract_features.py", folder, *flags, "--out-dir", tmp_path / "features")
    assert "accuracy on 30 test images" in done.stdout
    script("train_at.py", folder, *SMALL, "--out-dir", tmp_path / "at")
    small = "--n-attacked 16 --sae-steps 5 --sae-latents 16 --sae-k 2 --sae-seeds 1".split()
    models = ["--model", f"at={tmp_path / 'at' / 'best.pt'}", "--teacher", made / "diffusion"]
    script("analyze.py", folder, *models, *small, "--out-dir", tmp_path / "analysis")
    result = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert result["settings"]["classes"] == list(CLASSES)


@pytest.mark.parametrize("change", ["renamed", "one more", "another size"])
def test_what_was_made_for_other_classes_is_refused(change, folder, made, tmp_path):
    """Names tell, also where their number is the same: labels would mean other things."""
    other = shutil.copytree(folder, tmp_path / "other")
    size = []
    if change == "renamed":
        for split in ("train", "test"):
            shutil.move(other / split / "circle", other / split / "zebra")
    elif change == "one more":
        for split in ("train", "test"):
            shutil.copytree(other / split / "circle", other / split / "ant")
    else:
        size = ["--image-size", "24"]
    script("train_at.py", folder, *SMALL, "--epochs", "1", "--out-dir", tmp_path / "at")
    fitting = {"renamed": "other classes", "one more": "classes", "another size": ""}[change]
    commands = [
        ["train_at.py", *SMALL, "--synthetic", made / "synthetic"],
        ["generate_synthetic.py", "--diffusion", made / "diffusion"],
        ["evaluate.py", "--checkpoint", tmp_path / "at" / "best.pt"],
    ]
    if change != "another size":  # a teacher's images are resized
        flags = ["--teacher", made / "diffusion", "--teacher-label", "true"]
        commands.append(["train_at_aux.py", *SMALL, *flags])
    for name, *flags in commands:
        where = (
            ["--out", tmp_path / "x.json"]
            if name == "evaluate.py"
            else ["--out-dir", tmp_path / "x"]
        )
        done = script(name, other, *flags, *size, *where, expect=2)
        assert done.stderr.count("\n") == 1 and fitting in done.stderr, done.stderr


def test_images_above_64_pixels_are_decoded_by_workers(folder, tmp_path):
    flags = "--image-size 72 --epochs 1 --batch-size 16 --n-steps 1 --eval-n-steps 1 --workers 2"
    command = ["train_at.py", "--dataset", "folder", "--data-dir", folder, "--model", "wrn-10-1"]
    python(*command, *flags.split(), "--out-dir", tmp_path / "at", ranks=2)
    where = ["--data-dir", folder, "--checkpoint", tmp_path / "at" / "best.pt"]
    flags = "--dataset folder --image-size 72 --attack pgd --n-steps 2 --n-restarts 1"
    python("evaluate.py", *flags.split(), "--sanity-images", "0", *where)
    settings = json.loads((tmp_path / "at" / "args.json").read_text())
    assert settings["image_size"] == 72 and settings["val_size"] == 12


# ------------------------------------------------------------------------------------------ --check


def listed(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_check_tells_sizes_and_time_and_writes_nothing(folder, made, tmp_path):
    scripts = {
        "train_at.py": [*SMALL, "--synthetic", made / "synthetic"],
        "train_at_aux.py": [*SMALL, "--teacher", made / "diffusion"],
        "train_diffusion.py": ["--train-steps", "500", "--channels", "8", "16"],
    }
    for name, flags in scripts.items():
        done = script(name, folder, *flags, "--check", "--out-dir", tmp_path / "run")
        told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[-6:-1])
        synthetic = 60 if name == "train_at.py" else 0
        assert told["data"] == f"108 images to train, 12 held out, {synthetic} synthetic"
        assert told["classes"] == "3: circle, cross, stripes"
        assert told["steps"].startswith("500, " if name == "train_diffusion.py" else "24, ")
        assert "GiB of this process" in told["memory"] and told["time"].startswith("about ")
        assert done.stdout.endswith("nothing is wrong, and nothing was written\n")
        assert listed(tmp_path) == []


def test_check_of_two_ranks_and_of_a_run_that_goes_on(folder, tmp_path):
    command = [*SMALL, "--out-dir", tmp_path / "run"]
    script("train_at.py", folder, *command, "--check", ranks=2)
    assert listed(tmp_path) == []
    script("train_at.py", folder, *command)
    before = {path: os.stat(path).st_mtime_ns for path in listed(tmp_path)}
    done = script("train_at.py", folder, *command, "--check")
    assert "finished, nothing to do" in done.stdout
    done = script("train_at.py", folder, *command, "--check", "--lr", "0.3", expect=2)
    assert "holds another run (lr is 0.2 there, 0.3 here)" in done.stderr
    assert {path: os.stat(path).st_mtime_ns for path in listed(tmp_path)} == before


@pytest.mark.parametrize("image_size", ["16", "72"])
def test_check_names_broken_images(image_size, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    names = ["train/circle/0.png", "train/cross/4.jpg"]
    for name in names:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    where = ["--dataset", "folder", "--image-size", image_size, "--data-dir", root]
    out = ["--out-dir", tmp_path / "run"]
    done = python(
        "train_at.py",
        *where,
        *SMALL,
        "--workers" if image_size == "72" else "--seed",
        "0",
        *out,
        "--check",
        expect=2,
    )
    assert all(name in done.stderr for name in names) and done.stderr.count("\n") == 1, done.stderr
    (root / "test/stripes/1.jpg").write_bytes(b"hello")
    flags = ["--model", "wrn-10-1", "--mean", "0.3", "--std", "0.2"]
    torch.save({}, tmp_path / "x.pt")
    network = train_weights(tmp_path, image_size)
    done = python("evaluate.py", *where, *flags, "--checkpoint", network, "--check", expect=2)
    assert "test/stripes/1.jpg" in done.stderr and done.stderr.count("\n") == 1


def train_weights(folder, image_size):
    """A file of weights of a wrn-10-1 with three classes."""
    import dataclasses

    from common import models
    from published.datasets import DATASETS

    spec = dataclasses.replace(DATASETS["cifar10"], num_classes=3, image_size=int(image_size))
    path = folder / "weights.pt"
    files.save(models.build("wrn-10-1", spec).state_dict(), path)
    return path


def test_check_of_an_evaluation(folder, tmp_path):
    flags = ["--model", "wrn-10-1", "--mean", "0.3", "--std", "0.2", "--attack", "autoattack"]
    network = train_weights(tmp_path, 16)
    before = listed(tmp_path)
    done = script("evaluate.py", folder, *flags, "--checkpoint", network, "--check", ranks=2)
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert told["data"] == "30 test images in 1 chunks"
    assert told["classes"] == "3: circle, cross, stripes"
    assert "if no image falls" in told["time"] and listed(tmp_path) == before
    done = script("evaluate.py", folder, *flags[:2], "--checkpoint", network, expect=2)
    assert "--mean, --std: required" in done.stderr
