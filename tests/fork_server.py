"""Runs scripts in forked processes, so that torch is imported once and not by each of them.

A line of JSON comes in: {"command": [script, ...], "ranks": n, "env": {...}, "folder": path}. The
output of all ranks goes to the files stdout and stderr of the folder. A line goes out: the exit
status, that of torchrun (1) where one of several ranks fails; the others are then told to end.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sklearn.datasets  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

for path in ROOT.glob("*.py"):
    importlib.import_module(path.stem)

TIMEOUT = 300  # seconds


def run_script(job, rank, port):
    """In a forked process: what `python script ...` does, or torchrun for one of its ranks."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, handle in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(os.path.join(job["folder"], name), os.O_WRONLY | os.O_APPEND), handle)
    os.environ.clear()
    os.environ.update(job["env"])
    if job["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(ROOT)
    sys.argv = job["command"]
    script = os.path.abspath(sys.argv[0])
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def wait_for(pids):
    """The statuses of the processes. A failure of one, and the end of the time, ends the others."""
    statuses = {}
    end = time.time() + TIMEOUT
    while len(statuses) < len(pids):
        time.sleep(0.005)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
        others = [other for other in pids if other not in statuses]
        if pid and statuses[pid]:
            end_all(others, signal.SIGTERM)
            end = min(end, time.time() + 30)
        if time.time() > end:
            end_all(others, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def end_all(pids, how):
    for pid in pids:
        os.kill(pid, how)


for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            run_script(job, rank, port)
            sys.exit()
    statuses = wait_for(pids)
    print(statuses[0] if job["ranks"] == 1 else int(any(statuses)), flush=True)
