"""One run, one directory: args.json, env.json, log.jsonl, TensorBoard events, a progress bar. Other ranks get a null object."""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys

import torch
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from common import checkpoint
from common.cli import UserError

_locks = {}  # real path of a run directory: its file descriptor, locked until this process ends


def claim_directory(out_dir, identity, name="args.json", later=(), flag="--out-dir"):
    """Make `out_dir` that of `identity` (a dict), or find that it is: the JSON file `name` there must hold the same entries.

    later: entries that the run itself may add to the file. flag: the one that errors name. Raises UserError where the
    directory holds something else or another process works there; nothing is ever deleted. Call it on rank 0 alone.
    """
    path = os.path.join(out_dir, name)
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise UserError(f"{flag} {out_dir}: is a file, expected a directory")
    os.makedirs(out_dir, exist_ok=True)
    _lock(out_dir, flag)
    identity = json.loads(json.dumps(identity))
    if os.path.exists(path):
        found = checkpoint.read_json(path)
        for key in sorted((identity.keys() | found.keys()) - set(later)):
            if identity.get(key) != found.get(key):
                raise UserError(
                    f"{flag} {out_dir}: holds another run ({key} is {found.get(key)} there, {identity.get(key)} here); "
                    "choose another directory"
                )
    elif {f for f in os.listdir(out_dir) if not f.endswith(".writing")} - {"env.json"}:
        raise UserError(f"{flag} {out_dir}: not empty and without {name}; choose another directory")
    else:
        checkpoint.write_json(environment(), os.path.join(out_dir, "env.json"))
        checkpoint.write_json(identity, path)


def _lock(out_dir, flag="--out-dir"):
    """Keep other processes out; a kill gives the directory free. File systems that cannot lock are used without."""
    key = os.path.realpath(out_dir)
    if key in _locks:
        return
    handle = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{flag} {out_dir}: another process is at work there") from None
    except OSError:
        pass
    _locks[key] = handle


def identity_of(script, args, **inputs):
    """What makes a training run that run: its script, the arguments that its weights depend on, and the hashes of its inputs."""
    other = ("out_dir", "download", "workers")
    return {"script": script} | {k: v for k, v in sorted(vars(args).items()) if k not in other} | inputs


def environment():
    """Versions, device and commit that a number depends on."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(__file__))
        commit = git.stdout.strip() if git.returncode == 0 else None
    except OSError:  # no git on this machine
        commit = None
    packages = ("torchvision", "diffusers", "numpy", "scipy", "scikit-learn")
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "command": sys.argv,
    }


def _cpu():
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def progress(iterable=None, rank=0, **kwargs):
    """tqdm with rate and time left; silent on other ranks and where stderr is no terminal."""
    return tqdm(iterable, disable=True if rank else None, dynamic_ncols=True, **kwargs)


def save_images(x, path, columns):
    """A grid of images x in [0, 1], (N, C, H, W), row by row, as a PNG; pixels of small images are enlarged to 4 x 4."""
    scale = 4 if x.shape[-1] <= 32 else 1
    grid = make_grid(x.clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), path)


class RunLog:
    """Metrics of a run to log.jsonl and TensorBoard, one line per call of `write`.

    On resume from the checkpoint of `start_step`, lines of later steps (work that was lost) are cut off, so that the log of an interrupted
    run reads as if it had not been interrupted.
    """

    def __init__(self, out_dir, start_step):
        from torch.utils.tensorboard import SummaryWriter

        path = os.path.join(out_dir, "log.jsonl")
        if os.path.exists(path):
            try:
                with open(path) as file:
                    whole = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one
                kept = [line for line in whole if json.loads(line)["step"] <= start_step]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}: a line is not a JSON object with a step; mend or move the file") from None
            with checkpoint.atomic(path) as file:
                file.write("".join(kept).encode())
        self.file = open(path, "a", buffering=1)
        self.board = SummaryWriter(out_dir, purge_step=start_step + 1)

    def write(self, step, **metrics):
        """One JSON line {"step": step, ...} and one TensorBoard scalar per metric."""
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.file.close()
        self.board.close()


class NullLog:
    """RunLog for the other ranks."""

    def write(self, step, **metrics):
        pass

    def close(self):
        pass
