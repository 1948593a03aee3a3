"""Runs scripts in forked children, imports done once: one JSON line in per run, one out, {"status":
int, "said": dict, "seconds": float}.

{"script": name, "argv": [...], "die_at": null, seconds, or [where, number], "largest": null or
bytes}. SIGKILL comes after the seconds, or at that moment: half-way through the number-th write,
before the number-th fsync, before or after the number-th rename. "largest": no file may grow beyond
so many bytes. `said`: {where: how many there were}.
"""

import collections
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import diffusers  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

from common import cli, files  # noqa: E402

torch.set_num_threads(1)
SCRIPTS = ("train_diffusion", "train_at_aux", "generate_synthetic", "extract_features", "evaluate")
modules = {name: importlib.import_module(name) for name in SCRIPTS}


class Moments:
    """Counts the moments of this process and ends it at one of them."""

    def __init__(self, die_at):
        self.n, self.die_at = collections.Counter(), die_at
        fsync, replace = os.fsync, os.replace
        os.fsync = lambda handle: (self.pass_("before an fsync"), fsync(handle))[1]
        os.replace = lambda a, b: (
            self.pass_("before a rename"),
            replace(a, b),
            self.pass_("after a rename"),
        )[1]
        files.open = self.open

    def pass_(self, where):
        self.n[where] += 1
        if [where, self.n[where]] == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if mode == "wb":
            write = file.write
            file = Halved(file, write, self)
        return file


class Halved:
    """A binary file whose writes have a moment in their middle."""

    def __init__(self, file, write, moments):
        self.file, self.moments = file, moments

    def write(self, content):
        content = memoryview(content).cast("B")
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.moments.pass_("in a write")
        return half + self.file.write(content[half:])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def child(job, report):
    devnull = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(devnull, handle)
    die_at = job["die_at"]
    if job["largest"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest"], job["largest"]))
    if isinstance(die_at, float):
        threading.Thread(
            target=lambda: (time.sleep(die_at), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
        ).start()
    moments = Moments(die_at)
    sys.argv = [job["script"] + ".py", *job["argv"]]
    module = modules[job["script"]]
    status = 0
    try:
        cli.run_script(module.main, module.parse_args(job["argv"]))
    except SystemExit as end:
        status = end.code
    os.write(report, json.dumps(moments.n).encode())
    os._exit(status)


for line in sys.stdin:
    job = json.loads(line)
    receive, report = os.pipe()
    begun = time.time()
    pid = os.fork()
    if pid == 0:
        try:
            child(job, report)
        finally:
            os._exit(1)
    os.close(report)
    status = os.waitpid(pid, 0)[1]
    said = json.loads(os.read(receive, 1000) or "{}")
    os.close(receive)
    reply = {
        "status": os.waitstatus_to_exitcode(status),
        "said": said,
        "seconds": time.time() - begun,
    }
    print(json.dumps(reply), flush=True)
