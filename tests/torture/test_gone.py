"""What a run reads or writes is gone in its middle, or cannot be written at all: one line, status
2.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from short_runs import SCRIPTS, TINY, command, zygote
from test_imagenet import imagenet_dir  # noqa: F401 - a fixture
from test_kills import classifier  # noqa: F401 - a fixture

from common import files

LONG = [*TINY, "--epochs", "2000"]


def until_a_checkpoint(argv, out, then):
    """Start a training script, and call `then` once last.pt is there: (status, standard error)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(1200):
            if (out / "last.pt").exists():
                break
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        then()
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_images_are_gone(workers, imagenet_dir, tmp_path):  # noqa: F811
    """Files that are read as they are needed. The checkpoint stays; with the images back, the run
    goes on.
    """
    images, out = shutil.copytree(imagenet_dir, tmp_path / "imagenet"), tmp_path / "run"
    argv = [
        *"train_at.py --dataset imagenet --data-dir".split(),
        images,
        *"--model resnet50 --val-size 2 --n-train 12".split(),
    ]
    argv += [
        *"--batch-size 4 --epochs 3 --n-steps 1 --eval-n-steps 1 --workers".split(),
        workers,
        "--out-dir",
        out,
    ]
    status, errors = until_a_checkpoint(argv, out, lambda: images.rename(tmp_path / "elsewhere"))
    (line,) = errors.splitlines()
    assert status == 2 and line.startswith(f"train_at.py: error: {images}"), errors
    assert files.load(out / "last.pt", {})["step"] in (3, 6)
    (tmp_path / "elsewhere").rename(images)
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and files.load(out / "last.pt", {})["step"] == 9, done.stderr


@pytest.mark.slow
def test_the_output_directory_is_gone(tmp_path):
    out = tmp_path / "run"
    status, errors = until_a_checkpoint(
        ["train_at.py", *LONG, "--out-dir", out], out, lambda: out.rename(tmp_path / "elsewhere")
    )
    ours = [
        line
        for line in errors.splitlines()
        if line.strip().startswith(f"train_at.py: error: {out}")
    ]
    assert status == 2 and len(ours) == 1, (
        errors
    )  # a thread of TensorBoard's may report the same in its own way
    assert files.load(tmp_path / "elsewhere" / "last.pt", {})["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_file_system_that_is_read_only(script, tmp_path, diffusion_dir, classifier):  # noqa: F811
    """And once it may be written again the same command does its work."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        argv = command(script, disk / "run", diffusion_dir, classifier)
        with zygote() as run:
            for flag, wanted in (("ro", 2), ("rw", 0)):
                subprocess.run(["mount", "-o", f"remount,{flag}", disk], check=True)
                assert run(script, argv)["status"] == wanted, flag
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_analysis_on_a_full_disk(tmp_path, classifier):  # noqa: F811
    """The features' file is mapped; its space is taken first, or the first write beyond the disk
    would be SIGBUS.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    try:
        argv = ["analyze.py", "--model", f"at={classifier}", "--out-dir", disk / "analysis"]
        done = subprocess.run(
            [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and "No space left on device" in done.stderr.splitlines()[-1], (
            done.stderr
        )
    finally:
        subprocess.run(["umount", disk], check=True)
