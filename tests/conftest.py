"""Shared fixtures: one thread, a diffusion model of three steps and a synthetic set of 64 images, made once per session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# On the CPU also where there is a GPU: golden losses and two processes want it. CUDA_VISIBLE_DEVICES=0 make test runs the rest there.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate_synthetic  # noqa: E402
import train_diffusion  # noqa: E402
from common import data  # noqa: E402

torch.set_num_threads(1)
DIGITS = data.DATASETS["digits"]


@pytest.fixture(scope="session")
def diffusion_dir(tmp_path_factory):
    """A directory of train_diffusion.py after three steps: untrained for all purposes, but of the real format."""
    path = tmp_path_factory.mktemp("made") / "diffusion"
    train_diffusion.main(train_diffusion.parse_args(["--train-steps", "3", "--channels", "8", "16", "--out-dir", str(path)]))
    return str(path)


@pytest.fixture(scope="session")
def synthetic_dir(tmp_path_factory, diffusion_dir):
    """Three shards, 64 images."""
    path = tmp_path_factory.mktemp("made") / "synthetic"
    argv = [
        "--diffusion",
        diffusion_dir,
        "--n-images",
        "64",
        "--shard-size",
        "24",
        "--n-steps",
        "3",
        "--batch-size",
        "16",
        "--out-dir",
        str(path),
    ]
    generate_synthetic.main(generate_synthetic.parse_args(argv))
    return str(path)


def python(*command, expect=0, ranks=1, env=None, **kwargs):
    """Run `python command` (under torchrun with several ranks) in the project's root; returns the finished process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher = [sys.executable] + (torchrun if ranks > 1 else [])
    done = subprocess.run(
        launcher + [str(c) for c in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )
    assert done.returncode == expect, f"{command}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def read_log(run_dir, drop=("images_per_s", "seconds")):
    """The run's log lines, without what is time."""
    lines = (Path(run_dir) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def assert_equal_states(a, b, ignore=("seconds",)):
    """Two checkpoints hold the same entries, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ignore:
                assert_equal_states(a[key], b[key], ignore)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_equal_states(left, right, ignore)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b
