"""The page of a report: its table, its choice of images, its picture.

Whole reports are in tests/test_whole_report.py. Alone:
python -m pytest tests/evaluation/test_report.py
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import DIGITS

from common.stats import wilson
from evaluation import report

# Six images of three classes; fooled_by of one earlier attack and one later one.
LABELS = np.array([0, 0, 1, 1, 2, 2])
LINF = np.array([2, 2, 1, 0, 2, -1])
LARGER = np.array([2, 0, 0, 0, 0, -1])
L2 = np.array([0, 2, 2, 2, 1, -1])


def made(norm, eps, fooled_by):
    """A result that goes on from another one, and its arrays."""
    result = {"norm": norm, "eps": eps, "earlier_attacks": ["a"], "attacks": ["a", "b"]}
    arrays = {
        "clean_correct": fooled_by >= 0,
        "robust": fooled_by == 2,
        "fooled_by": fooled_by,
    }
    return result, arrays


def rows(classes=(), tail=None):
    pairs = [made("linf", 0.1, LINF), made("linf", 0.15, LARGER), made("l2", 1.0, L2)]
    checked, arrays = zip(*pairs)
    return report.table(checked, arrays, LABELS, classes, tail)


def test_the_table():
    """The last row is the images that withstand the first radius of each norm."""
    found = rows()
    names = ["no attack", "linf 0.1", "linf 0.15", "l2 1", "worst of 2 norms"]
    assert [row["name"] for row in found] == names
    assert [6 * row["accuracy"] for row in found] == pytest.approx([5, 3, 1, 3, 1])
    assert [6 * row["plain"] for row in found] == pytest.approx([5, 4, 1, 4, 3])
    assert [row["newly_fooled"] for row in found] == [0, 1, 0, 1, 2]
    assert [row["interval"] for row in found] == [wilson(n, 6) for n in (5, 3, 1, 3, 1)]
    assert [row["worst_class"] for row in found] == ["2", "1", "1", "2", "1"]
    assert [row["worst_class_accuracy"] for row in found] == [0.5, 0, 0, 0, 0]
    assert all(row["n"] == 6 and row["worst_class_n"] == 2 for row in found)


def test_head_and_tail():
    found = rows(tail=LABELS == 2)
    assert found[1]["head"] == 0.5 and found[1]["tail"] == 0.5
    assert found[3]["head"] == 0.75 and found[3]["tail"] == 0
    lines = report.table_lines(found)
    assert lines[0].endswith("| head classes, % | tail classes, % |")
    assert lines[3].endswith("| 50.0 | 50.0 |")


def test_the_table_in_markdown():
    """A name of a class can neither end its cell nor its line."""
    lines = report.table_lines(rows(classes=("a", "b|c\n", "d")))
    assert len(lines) == 7
    worst = "0.0 (b\\|c\\n, n = 2)"
    assert lines[3] == f"| linf 0.1 | 6 | **50.0** | 18.8 to 81.2 | 66.7 | {worst} |"


def test_the_choice_of_images():
    """One of each class, correct without an attack; those that some attack fools come first."""
    labels = np.array([3, 3, 5, 5, 7, 8, 9, 9])
    clean = np.array([0, 1, 1, 1, 1, 1, 1, 1], bool)
    robust = np.ones((2, 8), bool)
    robust[0, 3] = robust[1, 6] = robust[:, 0] = False
    assert report.choose(labels, clean, robust) == [3, 6, 1, 4]
    assert report.choose(labels, ~clean, robust) == [0]
    assert report.choose(labels, np.zeros(8, bool), robust) == []


def test_a_model_that_is_never_right_has_no_examples(tmp_path):
    pairs = [made("linf", 0.1, np.full(6, -1))]
    checked, arrays = zip(*pairs)
    found = report.attacked_examples(None, None, LABELS, DIGITS, checked, arrays, "cpu")
    assert found is None
    report.draw(rows(), found, DIGITS, None, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


class Linear(torch.nn.Module):
    """Logits (z, -z, 0) with z the sum of x - 1/2: in linf, whatever is known."""

    def forward(self, x):
        z = (x - 0.5).flatten(1).sum(1)
        return torch.stack([z, -z, 0 * z - 9], 1)


def test_images_are_attacked_again():
    """Those within reach are fooled, inside the ball, and the others have a higher loss."""
    model = Linear()
    x = torch.full((3, 1, 4, 4), 0.5) + torch.tensor([0.02, -0.04, 0.2]).view(3, 1, 1, 1)
    y = model(x).argmax(1)
    result = {"norm": "linf", "eps": 0.05, "seed": 0, "layers": {"straight": [], "leaky": []}}
    fooled = torch.tensor([True, True, False])
    x_adv = report.attack_again(model, x, y, fooled, result, 3)
    assert (model(x_adv).argmax(1) != y).equal(fooled)
    assert 0.049 < (x_adv - x).abs().amax() <= 0.05 + 1e-6
    assert model(x_adv)[2, 0] < model(x)[2, 0] - 0.7


def test_the_targeted_attack_stands_in_where_it_alone_fools(monkeypatch):
    """Of image 0, known to fall, APGD-CE finds nothing; of image 1 nothing is known to."""
    model = Linear()
    x = torch.full((2, 1, 4, 4), 0.52)
    y = model(x).argmax(1)
    result = {"norm": "linf", "eps": 0.05, "seed": 0, "layers": {"straight": [], "leaky": []}}
    monkeypatch.setattr(report.autoattack, "highest_loss", lambda model, x, y, **more: x.clone())
    x_adv = report.attack_again(model, x, y, torch.tensor([True, False]), result, 3)
    assert (model(x_adv).argmax(1) != y).tolist() == [True, False]
    assert torch.equal(x_adv[1], x[1])


@pytest.mark.parametrize("channels,n", [(1, 2), (3, 4)])
def test_the_picture(channels, n, tmp_path):
    """Grey and coloured images."""
    x = torch.rand(n, channels, 8, 8)
    y = torch.arange(n)
    attacked = {"norm": "linf", "eps": 0.1, "x_adv": x, "predicted": (y + 1) % 10}
    examples = {"x": x, "y": y, "predicted": y, "attacked": [attacked, attacked | {"norm": "l2"}]}
    spec = dataclasses.replace(DIGITS, classes=("a class with a long name \n", *"bcdefghij"))
    report.draw(rows(), examples, spec, ("linf", 0.1), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "recorded, words",
    [
        ({"commit": "abc", "dirty": True}, "commit abc, files differed from it."),
        ({"commit": "abc"}, "commit abc. "),  # as results had it before
        ({}, "commit not recorded. "),
    ],
)
def test_the_caption_names_the_commit(recorded, words):
    environment = {"torch": "2", "device": "cpu"} | recorded
    result = dict.fromkeys(("attack_name", "precision", "seed", "version"), "x")
    result |= {"environment": environment, "checkpoint_sha256": "1", "data_sha256": "2"}
    assert words in "\n".join(report.caption(result, None))


def test_warnings_name_their_threat_once():
    plain = [{"warnings": ["a"]}, {"warnings": ["b"]}]
    checked = [{"warnings": ["a", "c"]}, {"warnings": []}]
    lines = report.collect_warnings(["linf 1", "l2 2"], plain, checked)
    assert lines == ["linf 1: a", "linf 1: c", "l2 2: b"]
