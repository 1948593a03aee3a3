"""One run, one directory: args.json, env.json, log.jsonl, TensorBoard events, a progress bar. Other ranks get a null object."""

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


def claim_directory(out_dir, identity, name="args.json"):
    """Make `out_dir` that of `identity` (a dict), or find that it is: the JSON file `name` there must hold the same entries.

    Raises UserError where the directory holds something else; nothing is ever deleted. Call it on rank 0 alone.
    """
    path = os.path.join(out_dir, name)
    identity = json.loads(json.dumps(identity))
    if os.path.exists(path):
        found = checkpoint.read_json(path)
        for key in sorted(identity.keys() | found.keys()):
            if identity.get(key) != found.get(key):
                raise UserError(
                    f"--out-dir {out_dir}: holds another run ({key} is {found.get(key)} there, {identity.get(key)} here); "
                    "choose another directory"
                )
    elif os.path.isdir(out_dir) and {f for f in os.listdir(out_dir) if not f.endswith(".writing")} - {"env.json"}:
        raise UserError(f"--out-dir {out_dir}: not empty and without {name}; choose another directory")
    else:
        checkpoint.write_json(environment(), os.path.join(out_dir, "env.json"))
        checkpoint.write_json(identity, path)


def identity_of(script, args):
    """What makes a training run that run: its script and arguments, but for where it is kept."""
    return {"script": script} | {k: v for k, v in sorted(vars(args).items()) if k != "out_dir"}


def environment():
    """Versions, device and commit that a number depends on."""
    import numpy

    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(__file__))
        commit = git.stdout.strip() if git.returncode == 0 else None
    except OSError:  # no git on this machine
        commit = None
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "command": sys.argv,
    }


def progress(iterable=None, rank=0, **kwargs):
    """tqdm with rate and time left; silent on other ranks and where stderr is no terminal."""
    return tqdm(iterable, disable=True if rank else None, dynamic_ncols=True, **kwargs)


def save_images(x, path, columns, scale=4):
    """A grid of images x in [0, 1], (N, C, H, W), row by row, each pixel enlarged to scale x scale, as a PNG."""
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
            with open(path) as file:
                whole = [line for line in file if line.endswith("\n")]  # a kill may have cut the last one
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= start_step]
            except (ValueError, KeyError, TypeError):
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
