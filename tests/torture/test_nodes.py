"""Two nodes: two network namespaces, joined by a virtual cable, each with one process. Needs root
on Linux and `ip`.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_equal_states, python, read_log

SHORT = "--epochs 2 --epoch-images 64 --batch-size 16".split()
SHORT += "--n-steps 2 --eval-n-steps 2 --eval-every 1".split()


@pytest.fixture
def nodes():
    """Names of two namespaces; in each the interface `cable`, 10.78.0.1 in the first, 10.78.0.2 in
    the second.
    """
    names = [f"node{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True).returncode == 0

    try:
        if not shutil.which("ip") or not all(ip("netns", "add", name) for name in names):
            pytest.skip("no right to make network namespaces")
        assert ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "cable")
            assert ip("-n", name, "link", "set", "cable", "up") and ip(
                "-n", name, "link", "set", "lo", "up"
            )
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_one(nodes, diffusion_dir, synthetic_dir, tmp_path):
    """torchrun --nnodes 2 with a process on each ends as --nproc_per_node 2 on one, to the bit."""
    command = [
        "train_at_aux.py",
        *SHORT,
        "--teacher",
        diffusion_dir,
        "--synthetic",
        synthetic_dir,
        "--out-dir",
    ]
    python(*command, tmp_path / "one", ranks=2)
    launcher = [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc_per_node 1".split()]
    launcher += ["--master_addr", "10.78.0.1", "--master_port", "29511", "--node_rank"]
    running = [
        subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                name,
                *launcher,
                str(number),
                *map(str, command),
                str(tmp_path / "two"),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, name in enumerate(nodes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    one, two = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two")
    )
    assert_equal_states(one, two)
    assert read_log(tmp_path / "one") == read_log(tmp_path / "two")
