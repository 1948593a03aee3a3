"""analysis/verdict.py: what it concludes from which images are right.

Alone: python -m pytest tests/analysis/test_verdict.py
"""

import numpy as np
import pytest
import torch

from analysis import verdict
from common import UserError, data, models, stats
from published.datasets import DATASETS
from teachers.load import load_diffusion

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
    assert judged["right_and_pupil_wrong"] == [100 / N, *stats.wilson(100, N)]
    assert judged["right_where_pupil_errs"] == [100 / 240, *stats.wilson(100, 240)]
    faultless = verdict.judge(probes(a=200), probes(a=100), right(N))
    assert faultless["right_where_pupil_errs"] == [0, 0, 1]


def test_shuffled_weights_are_the_same_numbers_elsewhere(diffusion_dir):
    model, shuffled = (load_diffusion(diffusion_dir, "cpu") for _ in range(2))
    verdict.shuffle_weights(shuffled.net, seed=0)
    for before, after in zip(model.net.parameters(), shuffled.net.parameters()):
        assert torch.equal(before.flatten().sort()[0], after.flatten().sort()[0])
    weight, changed = model.net.conv_in.weight, shuffled.net.conv_in.weight
    assert not torch.equal(weight, changed)


def test_no_image_chooses_the_place_that_it_is_judged_at():
    """Probes that guess: the best of 40 on all images looks better than chance."""
    rng = np.random.default_rng(0)
    guessing = {(f"block {i}", 0.1): {"correct": rng.random(N) < 0.5} for i in range(40)}
    best = guessing[verdict.best_place(guessing)]["correct"]
    assert best.mean() > 0.55
    assert abs(verdict.correct_at_best(guessing).mean() - 0.5) < 0.03

    is_even = np.arange(N) % 2 == 0
    halves = {("even", 0.1): {"correct": is_even}, ("odd", 0.1): {"correct": ~is_even}}
    assert not verdict.correct_at_best(halves).any()
    assert np.array_equal(halves["even", 0.1]["correct"], is_even)  # left as it was


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
        (240, 100, 240, "cannot tell", "could be chance"),
        (240, 100, None, "cannot tell", "--pupil"),
        (240, 240, 160, "no gain expected", "shuffled weights 60.0 %; it has learned nothing"),
        (240, 300, None, "no gain expected", "shuffled weights 75.0 %; it has learned nothing"),
        (240, 240, 320, "no gain expected", "knows less than its pupil"),
    ],
)
def test_answer(network, control, pupil, answer, words):
    pupil = None if pupil is None else right(pupil)
    judged = verdict.judge(probes(a=network), probes(a=control), pupil, cka=[0.5, 0.4, 0.6])
    assert judged["answer"] == answer
    sentence = verdict.sentence(judged)
    assert sentence.startswith(verdict.ANSWERS[answer])
    assert "of 400 held-out images the teacher's best probe classifies 60.0 %" in sentence
    assert words in sentence


def test_few_images_do_not_tell_that_nothing_was_learned():
    """An equal share of 400 images and of 100: only the first bounds what was learned."""
    teacher, control = right(240), right(240, first=20)
    for n, answer in ((N, "no gain expected"), (100, "cannot tell")):
        chosen = np.linspace(0, N - 1, n).astype(int)
        networks = [{("mid", 0.1): {"correct": correct[chosen]}} for correct in (teacher, control)]
        judged = verdict.judge(*networks)
        assert judged["answer"] == answer
    assert "more held-out images" in verdict.sentence(judged)


def test_features_and_predictions_of_a_pupil_are_its_own():
    """Batch by batch, the last one short."""
    spec = DATASETS["digits"]
    pupil = models.build("wrn-10-1", spec).eval()
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), np.uint8)
    device = torch.device("cpu")
    predicted, features = verdict.look_at(pupil, images, 3, "fp32", device)
    with torch.no_grad():
        logits, expected = pupil(data.to_x(images), with_features=True)
    assert predicted.tolist() == logits.argmax(1).tolist()
    assert features == pytest.approx(expected.numpy(), abs=1e-5)
    torch.nn.init.constant_(pupil.logits.bias, torch.nan)
    with pytest.raises(UserError, match="--pupil: .* not finite"):
        verdict.look_at(pupil, images, 3, "fp32", device)


@pytest.mark.parametrize(
    ("n_correct", "shape"),
    [
        ((200, 260, 150), "peak"),
        ((260, 200, 150), "falls"),
        ((150, 200, 260), "rises"),
        ((200, 201, 150), "unclear"),  # one image of 400 is chance
        ((201, 200, 150), "unclear"),
        ((200, 261, 260), "unclear"),  # no fall at the other end
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
    network["mid", 0.1]["attacked"] = np.arange(80) < 10
    judged = verdict.judge(network, control, right(120), cka=[0.5, 0.4, 0.6])
    about = {"teacher": "out/t", "pupil": None, "eps": 0.03, "sigmas": [0.1, 1.0]}
    verdict.write(judged, network, control, about, str(tmp_path))
    page = (tmp_path / "verdict.md").read_text()
    assert capsys.readouterr().out == page
    for words in (
        "**It may help: of 400 held-out images the teacher's best probe classifies 65.0 %",
        "| the teacher's probe under attack, linf 0.03, first 80 images | 12.5 (6.9 to 21.5) |",
        "| linear CKA of their features, 0 to 1 | 0.50 (0.40 to 0.60) |",
        "it peaks at a middle level",
        "- teacher: out/t\n- eps: 0.03\n- sigmas: 0.1, 1.0\n",
    ):
        assert words in page
    assert (tmp_path / "verdict.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "verdict.json").exists()
