"""The ImageNet command as a whole: JPEGs, workers, two ranks, a DiT teacher, kill -9, resume, evaluation.

On the CPU, with a made ImageFolder of 1,000 classes and a DiT of four blocks. Alone: python -m pytest tests/test_imagenet.py
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
from PIL import Image
from test_teachers import dit_dir  # noqa: F401 - a fixture

from common import checkpoint


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """train/ and val/ with one JPEG in each of 1,000 class folders, all of other sizes and colours."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split in ("train", "val"):
        for k in range(1000):
            folder = root / split / f"n{k:08d}"
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((260 + k % 90, 300 - k % 70)).save(folder / f"{k}.JPEG")
    return root


def test_imagenet_on_two_ranks_killed_resumed_evaluated(imagenet_dir, dit_dir, tmp_path):  # noqa: F811
    argv = ["train_at_aux.py", "--dataset", "imagenet", "--data-dir", imagenet_dir, "--teacher", dit_dir, "--model", "resnet50"]
    argv += ["--val-size", "2", "--n-train", "12", "--batch-size", "4", "--epochs", "2", "--eval-n-steps", "1", "--workers", "1"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    python(*argv, "--out-dir", straight, ranks=2)

    # Three steps, a checkpoint, and SIGKILL to launcher and ranks at once.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*launcher, *map(str, argv), "--out-dir", str(cut)], cwd=ROOT, env=environment)
    while not (cut / "last.pt").exists() and job.poll() is None:
        time.sleep(0.02)
    for process in Path("/proc").glob("[0-9]*/cmdline"):  # the launcher first, then its ranks and their workers
        with contextlib.suppress(OSError):
            if str(cut).encode() in process.read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)
    job.wait()
    assert checkpoint.load(cut / "last.pt", {})["step"] == 3
    time.sleep(1)  # the ranks are the launcher's children, not ours to wait for
    python(*argv, "--out-dir", cut, ranks=2)
    assert_equal_states(checkpoint.load(cut / "last.pt", {}), checkpoint.load(straight / "last.pt", {}))
    assert read_log(cut) == read_log(straight) and [line["step"] for line in read_log(cut)] == [3, 6]
    arguments = json.loads((cut / "args.json").read_text())
    assert (arguments["attack"], arguments["block"], arguments["eps"]) == ("apgd", "transformer_blocks.1", 4 / 255)

    argv = ["--dataset", "imagenet", "--data-dir", imagenet_dir, "--checkpoint", cut / "best.pt", "--attack", "pgd", "--n-steps", "1"]
    python("evaluate.py", *argv, "--n-restarts", "1", "--n-images", "4", "--batch-size", "2", ranks=2)
    chosen = [f"n{k:08d}/{k}.JPEG" for k in (7, 999, 0)]
    (tmp_path / "list.txt").write_text("\n".join(chosen) + "\n")
    python("evaluate.py", *argv[:-4], "--attack", "clean", "--image-list", tmp_path / "list.txt")
    assert np.load(cut / "results-best-clean-linf-0.01569-listed.npz")["label"].tolist() == [7, 999, 0]
    (tmp_path / "list.txt").write_text("n00000001/2.JPEG\n")
    done = python("evaluate.py", *argv[:-4], "--attack", "clean", "--image-list", tmp_path / "list.txt", expect=2)
    assert "'n00000001/2.JPEG' is not among the images" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    result = json.loads((cut / "results-best-pgd-linf-0.01569-n4.json").read_text())
    assert result["n"] == 4 and result["dataset"] == "imagenet" and 0 <= result["robust"] <= result["clean"] <= 1
