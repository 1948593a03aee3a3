"""The page of a report: its table and its picture.

Whole reports are in tests/test_whole_report.py. Alone:
python -m pytest tests/evaluation/test_report.py
"""

import numpy as np
import pytest
from matplotlib.figure import Figure

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


def rows(classes=()):
    pairs = [made("linf", 8 / 255, LINF), made("linf", 0.15, LARGER), made("l2", 1.0, L2)]
    checked, arrays = zip(*pairs)
    return report.table(checked, arrays, LABELS, classes)


def test_the_table():
    """The last row is the images that withstand the first radius of each norm."""
    found = rows()
    names = ["no attack", "linf 8/255", "linf 0.15", "l2 1", "worst of 2 norms"]
    assert [row["name"] for row in found] == names
    assert [6 * row["accuracy"] for row in found] == pytest.approx([5, 3, 1, 3, 1])
    assert [6 * row["plain"] for row in found] == pytest.approx([5, 4, 1, 4, 3])
    assert [row["newly_fooled"] for row in found] == [0, 1, 0, 1, 2]
    assert [row["interval"] for row in found] == [wilson(n, 6) for n in (5, 3, 1, 3, 1)]
    assert [row["worst_class"] for row in found] == ["2", "1", "1", "2", "1"]
    assert [row["worst_class_accuracy"] for row in found] == [0.5, 0, 0, 0, 0]
    assert all(row["n"] == 6 and row["worst_class_n"] == 2 for row in found)


def test_the_table_in_markdown():
    """A name of a class can neither end its cell nor its line."""
    lines = report.table_lines(rows(classes=("a", "b|c\n", "d")))
    assert len(lines) == 7
    worst = "0.0 (b\\|c\\n, n = 2)"
    assert lines[3] == f"| linf 8/255 | 6 | **50.0** | 18.8 to 81.2 | 66.7 | {worst} |"


@pytest.mark.parametrize("trained", [("linf", 8 / 255), None])
def test_the_picture(trained, tmp_path):
    """A bar per row, what the adaptive check took on top of it, and the training's threat named."""
    report.draw(rows(), trained, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    axis = Figure().subplots()
    report.draw_bars(axis, rows(), trained)
    names = [label.get_text() for label in axis.get_xticklabels()]
    training = "\n(training)" if trained else ""
    threats = ["linf\n8/255" + training, "linf\n0.15", "l2\n1"]
    assert names == ["no\nattack", *threats, "worst\nof 2 norms"]
    hatched = [bar.get_height() for bar in axis.patches if bar.get_hatch()]
    plain = [bar.get_height() for bar in axis.patches if not bar.get_hatch()]
    assert plain == pytest.approx([500 / 6, 50, 100 / 6, 50, 100 / 6])
    assert hatched == pytest.approx([100 / 6, 100 / 6, 200 / 6])


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
