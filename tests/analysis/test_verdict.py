"""analysis/verdict.py: what it concludes from which images are right.

Alone: python -m pytest tests/analysis/test_verdict.py
"""

import numpy as np
import pytest

from analysis import verdict
from common import stats

N = 400


def right(n_correct, first=0):
    """N images of which n_correct in a row are right, from the one numbered `first` on."""
    correct = np.zeros(N, bool)
    correct[first : first + n_correct] = True
    return correct


def probes(**n_correct):
    """A probe per block, at sigma 0.1; its first images are right."""
    return {(block, 0.1): {"correct": right(n)} for block, n in n_correct.items()}


def over_noise(*n_correct):
    """A probe of one block per noise level."""
    return {("mid", 0.01 * 10**i): {"correct": right(n)} for i, n in enumerate(n_correct)}


def test_numbers_are_those_of_the_best_place():
    judged = verdict.judge(probes(a=200, b=240), probes(a=100, b=90), right(160, first=100))
    assert (judged["block"], judged["control_block"]) == ("b", "a")
    assert judged["probe"] == [0.6, *stats.wilson(240, N)]
    assert judged["control"][0] == 0.25
    assert judged["above_control"][0] == pytest.approx(0.35)
    assert judged["lead"][0] == pytest.approx(0.2)
    # The pupil has images 100 to 259, the probe 0 to 239.
    assert judged["probe_alone"][0] == pytest.approx(100 / N)
    assert judged["pupil_alone"][0] == pytest.approx(20 / N)


def test_intervals_of_paired_differences_hold_the_pairing():
    """Two that err on the same images differ less by chance than two that do not."""
    low, high = verdict.difference(right(240), right(230))[1:]
    assert 0 < low < 10 / N < high
    low, _ = verdict.difference(right(240), right(230, first=160))[1:]
    assert low < 0


@pytest.mark.parametrize(
    ("network", "control", "pupil", "answer", "words"),
    [
        (240, 100, 160, "may help", "knows more than its pupil"),
        (240, 100, 320, "no gain expected", "knows less than its pupil"),
        (240, 100, 240, "cannot tell", "know equally much"),
        (240, 100, None, "cannot tell", "--pupil"),
        (240, 240, 160, "no gain expected", "shuffled weights 60.0 %"),
        (240, 300, None, "no gain expected", "shuffled weights 75.0 %"),
    ],
)
def test_answer(network, control, pupil, answer, words):
    pupil = None if pupil is None else right(pupil)
    judged = verdict.judge(probes(a=network), probes(a=control), pupil, cka=[0.5, 0.4, 0.6])
    assert judged["answer"] == answer
    sentence = verdict.sentence(judged)
    assert sentence.startswith(verdict.ANSWERS[answer])
    assert "60.0 % of the 400 held-out images" in sentence
    assert words in sentence


@pytest.mark.parametrize(
    ("n_correct", "shape"),
    [
        ((200, 260, 150), "peak"),
        ((260, 200, 150), "falls"),
        ((150, 200, 260), "rises"),
        ((200, 201, 150), "unclear"),  # one image of 400 is chance
        ((201, 200, 150), "unclear"),
        ((200, 260), "unclear"),
    ],
)
def test_shape_over_noise(n_correct, shape):
    results = over_noise(*n_correct)
    assert verdict.shape_over_noise(results, "mid") == shape
    descending = dict(reversed(results.items()))
    assert verdict.shape_over_noise(descending, "mid") == shape


def test_page_and_files(tmp_path, capsys):
    network, control = over_noise(200, 260, 150), over_noise(100, 90, 80)
    network["mid", 0.1]["attacked"] = 0.125
    judged = verdict.judge(network, control, right(120), cka=[0.5, 0.4, 0.6])
    verdict.write(judged, network, control, {"teacher": "out/t", "eps": 0.03}, str(tmp_path))
    page = (tmp_path / "verdict.md").read_text()
    assert capsys.readouterr().out == page
    for words in (
        "**It may help: its best probe has 65.0 %",
        "| the teacher's probe under attack, linf 0.03 | 12.5 |",
        "| linear CKA of their features, 0 to 1 | 0.50 (0.40 to 0.60) |",
        "it peaks at a middle level",
        "- teacher: out/t",
    ):
        assert words in page
    assert (tmp_path / "verdict.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "verdict.json").exists()
