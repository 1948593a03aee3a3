"""A stranger's images: the whole 2 x 2 on a folder, on two ranks and one, killed once; --check.

Alone: python -m pytest -n 0 tests/test_own_images.py
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_equal_states, python
from PIL import Image

from common import UserError, files, models
from published.datasets import DATASETS

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
    """Run a script on the folder: in this process, or in others where there are options."""
    argv = [*FOLDER, "--data-dir", folder, *flags]
    if options:
        return python(f"{name}.py", *argv, **options)
    module = importlib.import_module(name)
    module.main(module.parse_args([str(word) for word in argv]))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A folder of the diffusion model and the synthetic set of the stranger's images."""
    out = tmp_path_factory.mktemp("made")
    flags = "--train-steps 30 --channels 8 16 --batch-size 32 --eval-every 15 --out-dir"
    script("train_diffusion", folder, *flags.split(), out / "diffusion", ranks=2)
    flags = "--n-images 60 --shard-size 20 --n-steps 3 --batch-size 20"
    where = ["--diffusion", out / "diffusion", "--out-dir", out / "synthetic"]
    script("generate_synthetic", folder, *flags.split(), *where)
    return out


@pytest.fixture(scope="module")
def at(folder, tmp_path_factory):
    """The run directory of AT, on two ranks."""
    out = tmp_path_factory.mktemp("runs") / "at"
    script("train_at", folder, *SMALL, "--out-dir", out, ranks=2)
    return out


def kill_in_training(command, out):
    """Start a command, and kill it when its first checkpoint is written."""
    # One thread, as in this process: with more of them sums are taken in another order.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env)
    end = time.time() + 120
    while not os.path.exists(out / "last.pt") and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert os.path.exists(out / "last.pt")
    return torch.load(out / "last.pt", weights_only=True)["step"]


def test_two_by_two_on_a_folder(folder, made, at, tmp_path, capsys):
    """All four cells, AT on two ranks; one killed, and resumed on a folder that was moved."""
    synthetic = ["--synthetic", made / "synthetic"]
    teacher = ["--teacher", made / "diffusion"]
    script("train_at_aux", folder, *SMALL, *teacher, "--out-dir", tmp_path / "at_dra")
    script("train_at", folder, *SMALL, *synthetic, "--out-dir", tmp_path / "dm_at")
    both = [*SMALL, *synthetic, *teacher, "--out-dir"]
    script("train_at_aux", folder, *both, tmp_path / "dm_at_dra")

    killed = tmp_path / "killed"
    command = ["train_at_aux.py", *FOLDER, "--data-dir", folder, *both, killed]
    step = kill_in_training(command, killed)
    moved = shutil.copytree(folder, tmp_path / "moved")
    script("train_at_aux", moved, *both, killed)
    runs = (tmp_path / "dm_at_dra", killed)
    last = [torch.load(path / "last.pt", weights_only=True) for path in runs]
    assert step < last[0]["step"] == last[1]["step"]
    assert_equal_states(*last)

    for out in (at, tmp_path / "at_dra", tmp_path / "dm_at", tmp_path / "dm_at_dra"):
        best = torch.load(out / "best.pt", weights_only=True)
        assert best["classes"] == list(CLASSES) and best["image_size"] == 16
        assert 0.05 < min(best["mean"]) < max(best["mean"]) < 0.7
        flags = ["--attack", "apgd", "--sanity-images", "0", "--checkpoint", out / "best.pt"]
        options = {"ranks": 2} if out == at else {}
        done = script("evaluate", folder, *flags, **options)
        printed = done.stdout if done else capsys.readouterr().out
        (path,) = out.glob("results-best-apgd-linf-*.json")
        result = json.loads(path.read_text())
        assert result["n"] == 30 and result["dataset"] == "folder"
        assert [row["class"] for row in result["by_class"]] == list(CLASSES)
        assert sum(row["n"] for row in result["by_class"]) == 30
        n_robust = sum(row["n"] * row["robust"] for row in result["by_class"])
        assert n_robust == pytest.approx(result["robust_correct"])
        worst = min(result["by_class"], key=lambda row: row["robust"])
        assert f"worst class: {worst['class']}, {worst['robust']:.2%} robust, n = 10" in printed


def test_features_and_analysis_of_a_folder(folder, made, at, tmp_path, capsys):
    flags = ["--diffusion", made / "diffusion", "--sigmas", "0.1", "--blocks", "mid_block"]
    flags += ["--probe", "--probe-split", "test", "--out-dir", tmp_path / "features"]
    script("extract_features", folder, *flags)
    assert "accuracy on 30 test images" in capsys.readouterr().out
    larger = shutil.copytree(folder, tmp_path / "larger")
    for kind in CLASSES:  # intervals want 64 images
        shutil.copytree(larger / "train" / kind, larger / "test" / kind / "more")
    small = "--n-attacked 64 --sae-steps 5 --sae-latents 16 --sae-k 2 --sae-seeds 1".split()
    models = ["--model", f"at={at / 'best.pt'}", "--teacher", made / "diffusion"]
    script("analyze", larger, *models, *small, "--out-dir", tmp_path / "analysis")
    result = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert result["settings"]["classes"] == list(CLASSES)


@pytest.mark.parametrize("change", ["renamed", "one more", "another size"])
def test_what_was_made_for_other_classes_is_refused(change, folder, made, at, tmp_path):
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
    words = {"renamed": "other classes", "one more": "classes", "another size": "16"}[change]
    commands = [
        ["train_at", *SMALL, "--synthetic", made / "synthetic", "--out-dir"],
        ["generate_synthetic", "--diffusion", made / "diffusion", "--out-dir"],
        ["evaluate", "--checkpoint", at / "best.pt", "--out"],
    ]
    if change != "another size":  # a teacher's images are resized
        flags = ["--teacher", made / "diffusion", "--teacher-label", "true", "--out-dir"]
        commands.append(["train_at_aux", *SMALL, *flags])
    for name, *flags in commands:
        with pytest.raises(UserError, match=words) as info:
            script(name, other, *size, *flags, tmp_path / "x.json")
        assert "\n" not in str(info.value) and not (tmp_path / "x.json").exists()


def test_a_result_is_of_its_images(folder, at, tmp_path, capsys):
    """Other test images under the same names are no reason to print the old figure again."""
    flags = ["--attack", "clean", "--sanity-images", "0", "--checkpoint", at / "best.pt"]
    flags += ["--out", tmp_path / "r.json"]
    script("evaluate", folder, *flags)
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copy(other / "test/cross/0.png", other / "test/circle/0.png")
    with pytest.raises(UserError, match="data_sha256"):
        script("evaluate", other, *flags)


def test_a_head_is_of_its_classes(folder, made, tmp_path):
    where = ["--blocks", "mid_block", "--sigmas", "0.1", "--save-head", tmp_path / "head.pt"]
    diffusion = [made / "diffusion"]
    flags = ["--diffusion", *diffusion, "--out-dir", tmp_path / "features"]
    script("extract_features", folder, *flags, *where)
    other = shutil.copytree(folder, tmp_path / "other")
    for split in ("train", "test"):
        shutil.move(other / split / "circle", other / split / "zebra")
    flags = ["--model", "diffusion-head", "--checkpoint", tmp_path / "head.pt", "--attack", "clean"]
    with pytest.raises(UserError, match="head.pt: made for other classes"):
        script("evaluate", other, "--teacher", *diffusion, *flags)


def test_weights_to_start_from_bring_their_normalisation(folder, at, tmp_path):
    """A classifier of one folder is trained on on another, whose mean differs."""
    other = shutil.copytree(folder, tmp_path / "other")
    for path in (other / "train").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    flags = [*SMALL, "--epochs", "1", "--init", at / "best.pt", "--out-dir", tmp_path / "tuned"]
    script("train_at", other, *flags)
    one, two = (torch.load(d / "best.pt", weights_only=True) for d in (at, tmp_path / "tuned"))
    assert one["mean"] == two["mean"] and one["std"] == two["std"]
    with pytest.raises(UserError, match="best.pt: is a wrn-10-1, expected a wrn-10-2, see --model"):
        script("train_at", other, *flags, "--model", "wrn-10-2")


def test_images_above_64_pixels_are_decoded_by_workers(folder, tmp_path):
    flags = "--image-size 72 --epochs 1 --batch-size 16 --n-steps 1 --eval-n-steps 1 --workers 2"
    command = [*flags.split(), "--model", "wrn-10-1", "--out-dir", tmp_path / "at"]
    script("train_at", folder, *command, ranks=2)
    flags = "--image-size 72 --attack pgd --n-steps 2 --n-restarts 1 --sanity-images 0"
    script("evaluate", folder, *flags.split(), "--checkpoint", tmp_path / "at" / "best.pt")
    settings = json.loads((tmp_path / "at" / "args.json").read_text())
    assert settings["image_size"] == 72 and settings["val_size"] == 12


# ------------------------------------------------------------------------------------------ --check


def listed(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def told_in(printed):
    """{first word of a line: the rest of it} of what --check printed."""
    lines = printed.splitlines()
    assert lines[-1] == "nothing is wrong, and nothing was written but the cache"
    return dict(line.split(maxsplit=1) for line in lines[-6:-1])


@pytest.mark.parametrize("name", ["train_at", "train_at_aux", "train_diffusion"])
def test_check_tells_sizes_and_time_and_writes_nothing(name, folder, made, tmp_path, capsys):
    flags = {
        "train_at": [*SMALL, "--synthetic", made / "synthetic"],
        "train_at_aux": [*SMALL, "--teacher", made / "diffusion"],
        "train_diffusion": ["--train-steps", "500", "--channels", "8", "16"],
    }
    script(name, folder, *flags[name], "--check", "--out-dir", tmp_path / "run")
    told = told_in(capsys.readouterr().out)
    synthetic = 60 if name == "train_at" else 0
    with_teacher = name == "train_at_aux"
    assert told["data"] == f"108 images to train, 12 to validate, 30 to test, {synthetic} synthetic"
    assert told["classes"] == "3: circle, cross, stripes"
    assert told["steps"].startswith("500, " if name == "train_diffusion" else "24, ")
    shares = re.findall(r", of which the teacher takes [1-9]\d?%", told["steps"])
    assert len(shares) == with_teacher
    assert "GiB of this process" in told["memory"] and told["time"].startswith("about ")
    assert listed(tmp_path) == []


def test_check_on_two_ranks(folder, tmp_path):
    flags = [*SMALL, "--out-dir", tmp_path / "run", "--check"]
    done = script("train_at", folder, *flags, ranks=2)
    assert told_in(done.stdout)["steps"].startswith("24, ")
    assert listed(tmp_path) == []


def test_check_of_a_run_that_is_there(folder, at, capsys):
    """It is compared and read, and stays as it is."""
    before = {path: os.stat(path).st_mtime_ns for path in listed(at)}
    script("train_at", folder, *SMALL, "--out-dir", at, "--check")
    assert "finished, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another run \(lr is 0.2 there, 0.3 here\)"):
        script("train_at", folder, *SMALL, "--lr", "0.3", "--out-dir", at, "--check")
    assert {path: os.stat(path).st_mtime_ns for path in listed(at)} == before


@pytest.mark.parametrize("n_steps", [1, 2])
def test_check_of_a_run_of_few_steps(n_steps, folder, tmp_path, capsys):
    """Fewer than it wants to time; the validation of each is no step."""
    flags = [*SMALL, "--epochs", str(n_steps), "--eval-every", "1", "--epoch-images", "32"]
    script("train_at", folder, *flags, "--check", "--out-dir", tmp_path / "run")
    assert told_in(capsys.readouterr().out)["steps"].startswith(f"{n_steps}, ")


def test_check_finds_a_directory_of_something_else(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="not empty and without args.json"):
        script("train_at", folder, *SMALL, "--check", "--out-dir", tmp_path)


def weights_file(folder, image_size):
    """A file of weights of a wrn-10-1 with three classes."""
    spec = dataclasses.replace(DATASETS["cifar10"], num_classes=3, image_size=image_size)
    path = folder / "weights.pt"
    files.save(models.build("wrn-10-1", spec).state_dict(), path)
    return path


@pytest.mark.parametrize("image_size", [16, 72])
def test_check_names_broken_images(image_size, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "images")
    names = ["train/circle/0.png", "train/cross/4.jpg"]
    for name in names:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])
    (root / "test/stripes/1.jpg").write_bytes(b"hello")
    size = ["--image-size", image_size, "--check"]
    with pytest.raises(UserError) as info:
        script("train_at", root, *size, *SMALL, "--out-dir", tmp_path / "run")
    message = str(info.value)
    assert all(name in message for name in names) and "\n" not in message
    for name in names:
        shutil.copy(folder / name, root / name)
    with pytest.raises(UserError, match="test/stripes/1.jpg: cannot identify image file"):
        script("train_at", root, *size, *SMALL, "--out-dir", tmp_path / "run")
    flags = ["--model", "wrn-10-1", "--mean", "0.3", "--std", "0.2"]
    network = weights_file(tmp_path, image_size)
    with pytest.raises(UserError, match="test/stripes/1.jpg: cannot identify image file"):
        script("evaluate", root, *size, *flags, "--checkpoint", network)


def test_check_of_an_evaluation(folder, tmp_path, capsys):
    flags = ["--model", "wrn-10-1", "--mean", "0.3", "--std", "0.2", "--attack", "autoattack"]
    network = ["--checkpoint", weights_file(tmp_path, 16)]
    before = listed(tmp_path)
    script("evaluate", folder, *flags, *network, "--check")
    told = told_in(capsys.readouterr().out)
    assert told["data"] == "30 test images in 1 chunks"
    assert told["classes"] == "3: circle, cross, stripes"
    assert "if no image falls" in told["time"] and listed(tmp_path) == before
    with pytest.raises(SystemExit):
        script("evaluate", folder, *flags[:2], *network)
    assert "--mean, --std: required" in capsys.readouterr().err
