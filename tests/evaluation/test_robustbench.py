"""The export loads in RobustBench's own classes, and refuses what no leaderboard would take.

Alone: python -m pytest tests/evaluation/test_robustbench.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from robustbench_helper import robustbench_class
from torch import nn

import evaluate
from common import UserError, files, models
from common.stats import wilson
from evaluation import robustbench
from evaluation.requests import ATTACKS
from published.datasets import DATASETS

CIFAR = DATASETS["cifar10"]


@pytest.fixture
def model():
    return models.build("wrn-16-1", CIFAR).eval()


@pytest.fixture
def run_dir(tmp_path, model):
    """A run on CIFAR-10, as if AutoAttack standard had been run on all 10,000 test images."""
    folder = tmp_path / "my_run"
    folder.mkdir()
    content = models.describe("wrn-16-1", CIFAR)
    content |= {"norm": "linf", "eps": 8 / 255, "weights": model.state_dict()}
    files.save(content, folder / "best.pt")
    write_settings(folder)
    write_result(folder)
    return folder


def write_settings(run_dir, **changes):
    files.write_json({"n_synthetic": 0} | changes, run_dir / "args.json")


def write_result(run_dir, n=10_000, robust=0.6731, **changes):
    """The result of an attack and its verdicts: the first images are robust, the last wrong."""
    attacks = ATTACKS[changes.get("attack", "autoattack")][1]
    fooled_by = np.full(n, -1)
    fooled_by[: round(0.9244 * n)] = 1
    fooled_by[: round(robust * n)] = len(attacks)
    n_robust = int((fooled_by == len(attacks)).sum())
    counts = {"clean": int((fooled_by >= 0).sum()), "robust": n_robust}
    result = {
        "norm": "linf",
        "eps": 8 / 255,
        "attack": "autoattack",
        "attack_name": "AutoAttack standard",
        "attacks": attacks,
        "n": n,
        "warnings": [],
        "sanity": [],
        "checkpoint_sha256": files.sha256(run_dir / "best.pt"),
        "data_sha256": "d",
        "dataset": "cifar10",
        "checkpoint": "best.pt",
        "environment": {"torch": "2", "device": "CPU", "command": ["evaluate.py"]},
        "seconds": 1.0,
        "settings": {},
        "precision": "tf32",
        "batch_size": 200,
        "seed": 0,
        "version": "pyautoattack",
        "sanity_images": 100,
        "image_list_sha256": None,
    }
    for name, count in counts.items():
        result |= {f"{name}_correct": count, name: count / n, f"{name}_interval": wilson(count, n)}
    stem = run_dir / "results-best-autoattack-linf-0.03137"
    files.write_json(result | changes, f"{stem}.json")
    np.savez(
        f"{stem}.npz",
        index=np.arange(n),
        label=np.zeros(n, np.int64),
        clean_correct=fooled_by >= 0,
        robust=fooled_by == len(attacks),
        fooled_by=fooled_by,
        attacks=attacks,
    )


def export(run_dir):
    """The entry that evaluate.py --export writes, and the path of the weights beside it."""
    flags = "--dataset cifar10 --attack autoattack --export robustbench --checkpoint"
    evaluate.main(evaluate.parse_args([*flags.split(), str(run_dir / "best.pt")]))
    stem = run_dir / "robustbench" / "cifar10" / "Linf" / "my_run"
    return json.loads(Path(f"{stem}.json").read_text()), f"{stem}.pt"


def test_weights_load_strictly_in_robustbench(run_dir, model):
    _, weights_path = export(run_dir)
    layers = dict(depth=16, width=1, activation_fn=nn.SiLU)
    theirs = robustbench_class("DMWideResNet")(**layers, mean=CIFAR.mean, std=CIFAR.std).eval()
    theirs.load_state_dict(torch.load(weights_path, weights_only=True), strict=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


def test_entry_of_a_training_on_real_images(run_dir, capsys):
    entry, _ = export(run_dir)
    assert entry["additional_data"] is False
    assert entry["number_forward_passes"] == 1
    assert entry["eps"] == "8/255"
    assert entry["architecture"] == "WideResNet-16-1"
    assert entry["clean_acc"] == "92.44"
    assert entry["autoattack_acc"] == "67.31"
    assert entry["footnote"] is None
    assert entry["unreliable"] is False
    assert "fill in: link, name, authors, venue\n" in capsys.readouterr().out


def test_entry_of_a_training_on_generated_images(run_dir, tmp_path):
    write_settings(run_dir, n_synthetic=3000)
    write_result(run_dir, warnings=["check failed"])
    entry, _ = export(run_dir)
    assert entry["footnote"] == "It uses additional 3k synthetic images in training."
    assert entry["unreliable"] is True
    assert entry["additional_data"] is False


def test_entry_of_a_training_from_other_weights(run_dir, capsys):
    write_settings(run_dir, init="other.pt", teacher="out/diffusion")
    entry, _ = export(run_dir)
    assert entry["additional_data"] is None
    printed = capsys.readouterr().out
    assert "fill in: link, name, authors, additional_data, venue" in printed
    assert "additional_data: true, if the diffusion" in printed


def test_amounts_are_written_as_on_the_leaderboard():
    assert robustbench.amount(20_000_000) == "20M"
    assert robustbench.amount(1_500_000) == "1.5M"
    assert robustbench.amount(358_000) == "358k"
    assert robustbench.amount(999) == "999"


@pytest.mark.parametrize(
    "change,match",
    [
        ({"n": 1000}, "on 1000 images, expected AutoAttack standard on 10000"),
        ({"attack": "apgd", "attack_name": "APGD-CE+T"}, "is APGD-CE.T on 10000"),
        ({"eps": 0.1}, "0.1 is on no leaderboard"),
        ({"checkpoint_sha256": "x"}, "of this very checkpoint"),
        ({"sanity_images": 1}, "lacks sanity checks, --sanity-images was 1"),
        ({"precision": "bf16"}, "in bf16, expected --precision fp32"),
        ({"clean": 1.0}, "its clean accuracy is not that of its verdicts"),
        ({"robust_correct": 9_900}, "of another result"),
        ({"eps": "x"}, "its entry 'eps' is missing or damaged"),
    ],
)
def test_claims_that_nobody_could_accept_are_refused(change, match, run_dir):
    write_result(run_dir, **change)
    with pytest.raises(UserError, match=match):
        export(run_dir)
    assert not (run_dir / "robustbench").exists()


def test_imagenet_is_on_robustbenchs_own_images(run_dir):
    """The first 5,000 files are of a hundred classes alone."""
    of_imagenet = dict(n=5000, eps=4 / 255, dataset="imagenet")
    path = str(run_dir / "results-best-autoattack-linf-0.03137.json")
    claim = (path, str(run_dir / "best.pt"), DATASETS["imagenet"])
    write_result(run_dir, **of_imagenet)
    with pytest.raises(UserError, match="lacks an --image-list, RobustBench's 5000 images"):
        robustbench.read_result(*claim)
    write_result(run_dir, **of_imagenet, image_list_sha256="a")
    assert robustbench.read_result(*claim)["n"] == 5000
