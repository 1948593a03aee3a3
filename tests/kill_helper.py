"""evaluate.py that kills itself (SIGKILL) in the middle of an attack.

KILL_IN=<attack>: which one, if any. KILL_AFTER=<passes>: after how many passes of the model within
it. The attacks are shorter than evaluate.py's.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation_helper import shorten  # noqa: E402

import evaluate  # noqa: E402
from evaluation import autoattack  # noqa: E402

torch.set_num_threads(1)
shorten(60)
real_attack = autoattack.attack


def dying_attack(name, model, *args, **kwargs):
    if name != os.environ.get("KILL_IN"):
        return real_attack(name, model, *args, **kwargs)
    n_passes = 0

    def dying_model(x):
        nonlocal n_passes
        n_passes += 1
        if n_passes > int(os.environ["KILL_AFTER"]):
            print(f"killed in {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return model(x)

    return real_attack(name, dying_model, *args, **kwargs)


autoattack.attack = dying_attack
evaluate.main(evaluate.parse_args(sys.argv[1:]))
