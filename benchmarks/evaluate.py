"""The time that AutoAttack standard takes here, against plain pyautoattack; verdicts compared.

    python -m benchmarks --only evaluation

Plain: the package's driver, one attack at a time with the driver's own checks, on the model as its
users have it: weights in NCHW, with parameters that require gradients. Ours:
evaluation/autoattack.py on the model as evaluate.py has it: channels last, with frozen parameters.
The images are channels last for both, and part of the plain model's passes are, too. Both take
turns on each chunk of images, with all threads, and get the images that no attack has fooled yet.
"""

import os
import time

import torch
from pyautoattack import AutoAttack

from benchmarks import measure
from common import UserError, data
from evaluation import autoattack
from published.datasets import DATASETS
from published.weights import load_classifier

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
QUICKSTART = "out/quickstart/at/best.pt"
CHUNK_SIZE = 200


def check_quickstart():
    """Raises UserError where there is no classifier to attack: before the hours, not after."""
    if not os.path.exists(QUICKSTART):
        raise UserError(f"{QUICKSTART}: no such file; make quickstart first")


def against_driver(norm, eps, target, rounds):
    """A row, with seconds by attack: all test images of digits, and the classifier of QUICKSTART.

    One round, whatever `rounds` says: it takes ten minutes.
    """
    spec = DATASETS["digits"]
    images, labels = data.load_test(spec, None)
    x = data.to_x(images)
    y = torch.from_numpy(labels)
    our_model = load_classifier(QUICKSTART, spec, "cpu")[0].requires_grad_(False)
    plain_model = load_classifier(QUICKSTART, spec, "cpu")[0].requires_grad_(True)
    ours = Side(autoattack.attack, our_model, x, y)
    plain = Side(attack_by_driver, plain_model.to(memory_format=torch.contiguous_format), x, y)
    for chunk, rows in enumerate(torch.arange(len(y)).split(CHUNK_SIZE)):
        order = [plain, ours] if chunk % 2 == 0 else [ours, plain]
        for name in ATTACKS:
            for side in order:
                side.run(name, rows, norm, eps)

    what = f"AutoAttack standard: digits, {norm} {eps:g}, {len(y)} images"
    totals = [[sum(side.seconds.values())] for side in (ours, plain)]
    row = measure.compare(what, "pyautoattack's driver", *totals, target)
    # Pairs: of the package's driver, and ours.
    row["seconds"] = {name: [plain.seconds[name], ours.seconds[name]] for name in ATTACKS}
    row["n_robust"] = [plain.robust.sum().item(), ours.robust.sum().item()]
    row["n_flipped"] = (plain.robust != ours.robust).sum().item()
    return row


class Side:
    """One of the two that are compared: its attack, its model, its verdicts and its seconds."""

    def __init__(self, attack, model, x, y):
        self.attack = attack
        self.model = model
        self.x = x
        self.y = y
        self.robust = predict(model, x) == y  # (N,) bool
        self.seconds = dict.fromkeys(ATTACKS, 0.0)

    def run(self, name, rows, norm, eps):
        """Attack those of the images `rows` that no attack has fooled yet."""
        rows = rows[self.robust[rows]]
        y = self.y[rows]
        start = time.perf_counter()
        x_adv = self.attack(name, self.model, self.x[rows], y, norm=norm, eps=eps, seed=0)
        self.robust[rows] = predict(self.model, x_adv) == y
        self.seconds[name] += time.perf_counter() - start


def attack_by_driver(name, model, x, y, *, norm, eps, seed):
    """Adversarial images of one attack, by the package's own driver."""
    norm = autoattack.NORMS[norm]
    driver = AutoAttack(model, norm=norm, eps=eps, seed=seed, version="standard", device="cpu")
    driver.attacks_to_run = [name]
    return driver.run_standard_evaluation(x, y, batch_size=len(x))[0]


@torch.no_grad()
def predict(model, x):
    """Predicted classes (B,)."""
    return model(x).argmax(1)
