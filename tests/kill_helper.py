"""evaluate.py that kills itself (SIGKILL) after some passes inside one attack: KILL_IN=<attack> KILL_AFTER=<passes>."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from common import autoattack  # noqa: E402

torch.set_num_threads(1)
attack = autoattack.attack


def dying(name, model, *args, **kwargs):
    left = [int(os.environ["KILL_AFTER"])]

    def passed(x):
        left[0] -= 1
        if left[0] < 0:
            print(f"killed in {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return model(x)

    return attack(name, passed if name == os.environ["KILL_IN"] else model, *args, **kwargs)


autoattack.attack = dying
evaluate.main(evaluate.parse_args(sys.argv[1:]))
