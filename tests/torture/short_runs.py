"""Short runs of the five scripts in forked processes, and what they leave: shared by the tests of
kills and of full disks.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import assert_equal_states, read_log

from common import files

SCRIPTS = ["train_diffusion", "train_at_aux", "generate_synthetic", "extract_features", "evaluate"]
TINY = "--epochs 3 --epoch-images 32 --batch-size 16".split()
TINY += "--n-steps 1 --eval-n-steps 1 --eval-every 1".split()
TIMES = {
    "out_dir",
    "seconds",
    "seconds_by_attack",
    "environment",
    "command",
    "checkpoint",
}  # of what may differ between two runs


@contextlib.contextmanager
def zygote():
    """A function that runs a script in a fork of one process that has done the imports: (script,
    argv, ...) -> its reply.
    """
    process = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "zygote.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(script, argv, die_at=None, largest=None):
        job = {"script": script, "argv": list(map(str, argv)), "die_at": die_at, "largest": largest}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


def command(script, folder, diffusion_dir, classifier):
    """Flags of a run of about a second in `folder`."""
    if script == "evaluate":  # it writes beside the checkpoint
        folder.mkdir(exist_ok=True)
        if not (folder / "best.pt").exists():
            (folder / "best.pt").write_bytes(classifier.read_bytes())
        return [
            *"--attack apgd --n-images 12 --batch-size 4 --sanity-images 4 --checkpoint".split(),
            folder / "best.pt",
        ]
    flags = {
        "train_diffusion": "--train-steps 9 --eval-every 3 --channels 8 16 --batch-size 16".split(),
        "train_at_aux": [*TINY, "--teacher", diffusion_dir],
        "generate_synthetic": [
            "--diffusion",
            diffusion_dir,
            *"--n-images 40 --shard-size 8 --n-steps 2 --batch-size 8".split(),
        ],
        "extract_features": [
            "--diffusion",
            diffusion_dir,
            *"--blocks mid_block --sigmas 0.1 1 --batch-size 50".split(),
        ],
    }
    return [*flags[script], "--out-dir", folder]


def kept(folder):
    """What a run left, by file: states, arrays, logs and JSON without what is time; other files as
    bytes.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if (
            path.is_dir()
            or path.suffix in (".writing", ".lock")
            or name.startswith("events.")
            or name == "env.json"
        ):
            continue
        if path.suffix == ".pt":
            found[name] = files.load(path, {})
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tolist() for key in arrays}
        elif path.suffix == ".json":
            found[name] = {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key not in TIMES
            }
        elif path.suffix == ".jsonl":
            found[name] = read_log(folder)
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(folder, expected, case):
    """`folder` holds what `kept` found elsewhere."""
    try:
        found = kept(folder)
        assert found.keys() == expected.keys()
        assert_equal_states(found, expected)
    except AssertionError as error:
        raise AssertionError(str(case)) from error
