"""A short training to attack, and evaluate.py called on it, for tests of evaluation.

As a script, evaluate.py whose APGD takes a few steps alone: `evaluation_helper.py ARGS`. With
KILL_AT=<n> in its environment it kills itself (SIGKILL) at its n-th attack.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.fab_base import FABAttack
from pyautoattack.square import SquareAttack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import DIGITS

import evaluate
import train_at
from common import data
from evaluation import autoattack
from published.weights import load_classifier


def train_short(out_dir):
    """best.pt of a short but real training: robust enough that every attack has work left."""
    flags = "--epochs 12 --eval-every 12 --eval-n-steps 1 --n-steps 2"
    train_at.main(train_at.parse_args([*flags.split(), "--out-dir", str(out_dir)]))
    return str(out_dir / "best.pt")


def evaluate_with(checkpoint, folder, flags):
    """(result, arrays per image) of evaluate.py with these flags, a text; files go to `folder`."""
    folder.mkdir(exist_ok=True)
    argv = ["--checkpoint", checkpoint, "--out", str(folder / "result.json"), *flags.split()]
    if "--sanity-images" not in argv:
        argv += ["--sanity-images", "0"]
    evaluate.main(evaluate.parse_args(argv))
    result = json.loads((folder / "result.json").read_text())
    return result, np.load(folder / "result.npz")


def first_images(checkpoint, n):
    """(model, x, y) of a digits checkpoint and the first n test images."""
    model, _ = load_classifier(checkpoint, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    return model, data.to_x(images[:n]), torch.from_numpy(labels[:n])


def shorten(n_steps, set_attribute=setattr):
    """Let APGD and FAB take few steps, and Square ten queries for each of them.

    set_attribute: monkeypatch's, where they shall take all again.
    """
    lengths = [(APGDAttack, "n_iter", n_steps), (FABAttack, "n_iter", n_steps)]
    for attack, name, most in [*lengths, (SquareAttack, "n_queries", 10 * n_steps)]:

        def short_run(self, *args, run=attack.attack_single_run, name=name, most=most, **kwargs):
            setattr(self, name, min(getattr(self, name), most))
            return run(self, *args, **kwargs)

        set_attribute(attack, "attack_single_run", short_run)


def main():
    torch.set_num_threads(1)
    shorten(3)
    attack = autoattack.attack
    n_attacks = 0

    def counted(*args, **kwargs):
        nonlocal n_attacks
        n_attacks += 1
        if n_attacks == int(os.environ.get("KILL_AT", 0)):
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return attack(*args, **kwargs)

    autoattack.attack = counted
    evaluate.main(evaluate.parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
