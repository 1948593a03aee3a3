"""The ImageNet command as a whole: JPEGs, workers, two ranks, a DiT or EDM2 teacher, kill -9,
resume, evaluation.

On the CPU, with a made ImageFolder of 1,000 classes, a DiT of four blocks and a small EDM2.
Alone: python -m pytest tests/test_imagenet.py
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_equal_states, python, read_log
from edm2_helper import edm2_config, edm2_dir
from PIL import Image

from common import files
from published.datasets import IMAGENET_CLASSES


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """train/ and val/ with one JPEG in each of 1,000 class folders, of many sizes and colours."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for k, wnid in enumerate(files.read_text(IMAGENET_CLASSES).split()):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((260 + k % 90, 300 - k % 70)).save(folder / f"{k}.JPEG")
    return root


OPTIONS = "--model resnet50 --val-size 2 --n-train 4 --batch-size 4 --epochs 2 --eval-n-steps 1"


def train_command(imagenet_dir, teacher):
    """Two steps, with a checkpoint after each; --out-dir is to be added."""
    data = ["--dataset", "imagenet", "--data-dir", str(imagenet_dir), "--workers", "1"]
    return ["train_at_aux.py", *data, "--teacher", teacher, *OPTIONS.split()]


@pytest.fixture(scope="module")
def with_dit(imagenet_dir, dit_dir, tmp_path_factory):
    """The run directory of a training with a DiT."""
    out_dir = tmp_path_factory.mktemp("runs") / "dit"
    python(*train_command(imagenet_dir, dit_dir), "--out-dir", out_dir, ranks=2)
    return out_dir


def kill_all(word):
    """SIGKILL to every process with this word in its command line."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(word).encode() in process.read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)


def test_a_run_with_an_edm2_teacher_killed_and_resumed_is_the_straight_run(imagenet_dir, tmp_path):
    teacher = edm2_dir(tmp_path / "edm2", edm2_config(label_dim=1000))
    command = [*train_command(imagenet_dir, teacher), "--n-steps", "1"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    python(*command, "--out-dir", straight, ranks=2)

    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    job = subprocess.Popen(
        [sys.executable, *launcher, *command, "--out-dir", str(cut)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (cut / "last.pt").exists() and job.poll() is None:
        time.sleep(0.02)
    kill_all(cut)  # the launcher, its ranks and their workers at once
    job.wait()
    assert files.load(cut / "last.pt", {})["step"] == 1
    time.sleep(1)  # the ranks are the launcher's children, not ours to wait for

    python(*command, "--out-dir", cut, ranks=2)
    assert_equal_states(files.load(cut / "last.pt", {}), files.load(straight / "last.pt", {}))
    assert read_log(cut) == read_log(straight)
    assert [line["step"] for line in read_log(cut)] == [1, 2]
    arguments = json.loads((cut / "args.json").read_text())
    assert arguments["block"] == "dec.16x16_block1" and arguments["sigma"] == 0.06


def test_the_defaults_of_imagenet(with_dit):
    arguments = json.loads((with_dit / "args.json").read_text())
    assert arguments["attack"] == "apgd"
    assert arguments["block"] == "transformer_blocks.1"
    assert arguments["eps"] == 4 / 255
    assert arguments["teacher_every"] == 2


def test_evaluation(with_dit, imagenet_dir, tmp_path):
    argv = ["evaluate.py", "--dataset", "imagenet", "--data-dir", imagenet_dir]
    argv += ["--checkpoint", with_dit / "best.pt"]

    options = "--attack pgd --n-steps 1 --n-restarts 1 --n-images 4 --batch-size 2"
    python(*argv, *options.split(), ranks=2)
    result = json.loads((with_dit / "results-best-pgd-linf-0.01569-n4.json").read_text())
    assert result["n"] == 4 and result["dataset"] == "imagenet"
    per_image = np.load(with_dit / "results-best-pgd-linf-0.01569-n4.npz")
    assert result["robust_correct"] == per_image["robust"].sum()
    assert result["clean_correct"] == per_image["clean_correct"].sum()

    image_list = tmp_path / "list.txt"
    argv += ["--attack", "clean", "--image-list", image_list]
    wnids = files.read_text(IMAGENET_CLASSES).split()
    names = [f"{wnids[k]}/{k}.JPEG" for k in (7, 999, 0)]
    image_list.write_text("\n".join(names))
    python(*argv)
    per_image = np.load(with_dit / "results-best-clean-linf-0.01569-listed.npz")
    assert per_image["label"].tolist() == [7, 999, 0]

    image_list.write_text("n01440764/2.JPEG\n")
    (line,) = python(*argv, expect=2).stderr.splitlines()
    assert "'n01440764/2.JPEG' is not among the images" in line
