"""Ranks that die, hang or are told to end, as torchrun sees them: no other rank waits for ever,
each says one line.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_equal_states, python, read_log

from common import files

LONG = "--epochs 400 --epoch-images 32 --batch-size 16".split()
LONG += "--n-steps 1 --eval-n-steps 1 --eval-every 400".split()
SHORT = [*LONG, "--epochs", "40", "--eval-every", "20"]


def under_torchrun(*argv, **environment):
    launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    return subprocess.Popen(
        [*launcher, *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(process, out, seconds=120):
    """Process ids of the two ranks, once the training log is open."""
    for _ in range(10 * seconds):
        if (out / "log.jsonl").exists():
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    time.sleep(1)  # some steps
    return [int(pid) for pid in children]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent, words",
    [(signal.SIGKILL, "another process is gone"), (signal.SIGSTOP, "did not answer within")],
)
def test_a_rank_that_dies_or_hangs_ends_all(sent, words, tmp_path):
    process = under_torchrun(
        "train_at.py", *LONG, "--out-dir", tmp_path / "run", RANK_TIMEOUT_MINUTES="0.1"
    )
    try:
        victim = ranks_of(process, tmp_path / "run")[1]
        begun = time.time()
        os.kill(victim, sent)
        output = process.communicate(timeout=90)[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode != 0 and time.time() - begun < 60
    ours = [line for line in output.splitlines() if "train_at.py: error: " in line]
    assert len(ours) == 1 and words in ours[0], output


@pytest.mark.slow
def test_sigterm_under_torchrun_leaves_a_checkpoint_of_all_ranks(tmp_path):
    """Ranks agree on the step; afterwards two processes go on to the weights of a run without a
    break.
    """
    python("train_at.py", *SHORT, "--out-dir", tmp_path / "straight", ranks=2)
    process = under_torchrun("train_at.py", *SHORT, "--out-dir", tmp_path / "cut")
    try:
        ranks = ranks_of(process, tmp_path / "cut")
        os.kill(ranks[1], signal.SIGTERM)  # one rank alone has the notice
        output = process.communicate(timeout=90)[0]
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 0, output
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 80", output)[1])
    assert files.load(tmp_path / "cut" / "last.pt", {})["step"] == step
    python("train_at.py", *SHORT, "--out-dir", tmp_path / "cut", ranks=2)
    states = [files.load(tmp_path / name / "last.pt", {}) for name in ("straight", "cut")]
    assert_equal_states(*states)
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [40, 80]
