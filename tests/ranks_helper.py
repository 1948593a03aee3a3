"""Run a training script's main under torchrun with one thing changed: `ranks_helper.py SCRIPT
{groupnorm,digest} ARGS`.
"""

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import attacks, models, run  # noqa: E402


def without_batch_statistics(model):
    """Replace every BatchNorm2d by a GroupNorm of four groups."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return model


def main():
    name, change = sys.argv[1:3]
    sys.argv = [name, *sys.argv[3:]]
    torch.set_num_threads(1)
    script = importlib.import_module(name.removesuffix(".py"))
    kept = []
    build = models.build
    if "STOP_AFTER" in os.environ:  # stands for a process that dies in an attack
        pgd, calls = attacks.pgd, []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == int(os.environ["STOP_AFTER"]):
                raise ZeroDivisionError
            return pgd(*args, **kwargs)

        attacks.pgd = dying
    if change == "groupnorm":
        models.build = lambda *args: without_batch_statistics(build(*args))
    else:
        track = run.Run.track
        end_processes = script.end_processes

        def keep(self, **parts):
            kept.extend((name, part) for name, part in parts.items() if name != "optimizer")
            track(self, **parts)

        def digest_and_end():
            tensors = {
                f"{k}.{key}": t for k, module in kept for key, t in module.state_dict().items()
            }
            digests = {
                key: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
                for key, t in tensors.items()
            }
            Path(os.environ["DIGESTS"], f"digest-{os.environ['RANK']}.json").write_text(
                json.dumps(digests)
            )
            end_processes()

        run.Run.track = keep
        script.end_processes = digest_and_end
    script.main(script.parse_args())


if __name__ == "__main__":
    main()
