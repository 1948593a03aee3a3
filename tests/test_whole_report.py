"""evaluate.py --report: ordinary results, the adaptive check, and the page that shows them.

Alone: python -m pytest tests/test_whole_report.py
"""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, python
from evaluation_helper import evaluate_with, shorten, train_short
from unusual_helper import MeanSparse, Quantised, Straight, network_with

import evaluate
from common import files, models
from evaluation import adaptive, report, requests
from published.datasets import DATASETS


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("reported") / "run")


@pytest.fixture
def short(monkeypatch):
    shorten(10, monkeypatch.setattr)


@pytest.fixture
def linf_alone(monkeypatch):
    """Reports with one threat, linf, where --eps names one radius."""
    spec = dataclasses.replace(DIGITS, eps={"linf": 0.15})
    monkeypatch.setitem(DATASETS, "digits", spec)


def report_on(best, folder, flags):
    """(page, rows of the table, {path: (result, arrays)}) of a report on a copy of a checkpoint."""
    folder.mkdir(exist_ok=True)
    if not (folder / "best.pt").exists():
        shutil.copy(best, folder)
    argv = ["--checkpoint", str(folder / "best.pt"), "--report", *flags.split()]
    evaluate.main(evaluate.parse_args(argv))
    (page,) = folder.glob("report-*.md")
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    return page.read_text(), rows, results_in(folder)


def results_in(folder):
    found = {}
    for path in sorted(folder.glob("results-*.json")):
        found[path.stem] = (json.loads(path.read_text()), np.load(path.with_suffix(".npz")))
    return found


def test_a_report_is_made_of_ordinary_results(best, tmp_path, short, monkeypatch, capsys):
    """One that is there is taken, all have verdicts per image, and none is computed twice."""
    flags = "--n-images 30 --sanity-images 5 --batch-size 16"
    shutil.copy(best, tmp_path)
    argv = ["--checkpoint", str(tmp_path / "best.pt"), *flags.split()]
    evaluate.main(evaluate.parse_args([*argv, "--norm", "l2"]))
    before = tmp_path / "results-best-apgd-l2-0.5-n30.json"
    written = before.stat().st_mtime_ns

    page, rows, results = report_on(best, tmp_path, flags)
    assert before.stat().st_mtime_ns == written
    threats = ["l1-1.5", "l2-0.5", "linf-0.15", "linf-0.225"]
    names = [
        f"results-best-{attack}-{threat}-n30"
        for attack in ("apgd", "apgd-adaptive")
        for threat in threats
    ]
    assert sorted(results) == sorted(names)
    in_all_norms = True
    for place, threat in ((1, "linf-0.15"), (2, "linf-0.225"), (3, "l2-0.5"), (4, "l1-1.5")):
        plain, plain_arrays = results[f"results-best-apgd-{threat}-n30"]
        checked, arrays = results[f"results-best-apgd-adaptive-{threat}-n30"]
        assert checked["attacks"] == ["apgd-ce", "apgd-t", "unit-ce"]
        assert rows[place]["plain"] == plain["robust"] == plain_arrays["robust"].mean()
        assert rows[place]["accuracy"] == checked["robust"] == arrays["robust"].mean()
        assert rows[place]["interval"] == checked["robust_interval"]
        assert checked["clean"] == plain["clean"]
        fooled = plain_arrays["fooled_by"] < 2
        assert np.array_equal(arrays["fooled_by"][fooled], plain_arrays["fooled_by"][fooled])
        assert f"**{100 * checked['robust']:.1f}**" in page
        if threat != "linf-0.225":
            in_all_norms = in_all_norms & arrays["robust"]
    assert 0 < in_all_norms.sum() < rows[1]["accuracy"] * 30
    assert rows[5]["accuracy"] == in_all_norms.mean()
    assert rows[1]["accuracy"] > rows[2]["accuracy"]
    headline = f"**{report._interval(rows[1])}** of 30 test images withstand"
    assert headline in page and f"**{report._interval(rows[5])}** do in every norm" in page
    plain = f"plain {100 * rows[1]['plain']:.1f} %"
    assert f"{plain}, with the adaptive check **{100 * rows[1]['accuracy']:.1f} %**" in page
    assert "no such layers were found" in page
    assert f"SHA-256 of the checkpoint: `{files.sha256(best)}`" in page
    assert f"commit {checked['environment']['commit'] or 'not recorded'}" in page
    assert any("Square fools" in line["check"] for line in checked["sanity"])

    capsys.readouterr()
    monkeypatch.setattr(evaluate, "attack_chunk", None)
    monkeypatch.setattr(evaluate.sanity, "run_check", None)
    assert report_on(best, tmp_path, flags)[:2] == (page, rows)
    assert f"{tmp_path}/report-best-n30.md" in capsys.readouterr().out


MASKING = {
    "rounds": Quantised(),
    # Pixels within 0.12 of black, which are 0 before the normalisation.
    "sparse": MeanSparse(-DIGITS.mean[0] / DIGITS.std[0], 0.12 / DIGITS.std[0]),
}


@pytest.mark.parametrize("name", MASKING)
def test_a_masked_gradient_is_seen_through(name, best, tmp_path, short, linf_alone, monkeypatch):
    """The plain attack overestimates. The check comes to the number of a hand-written gradient."""
    layer = MASKING[name]
    monkeypatch.setattr(models, "WideResNet", network_with(layer))
    flags = "--n-images 30 --sanity-images 0 --eps 0.15"
    page, rows, results = report_on(best, tmp_path / "report", flags)
    monkeypatch.setattr(models, "WideResNet", network_with(Straight(layer)))
    by_hand, _ = evaluate_with(best, tmp_path / "by_hand", f"--attack apgd {flags}")

    threat = rows[1]
    numbers = [threat["plain"], threat["accuracy"], by_hand["robust"]]
    print(name, [f"{number:.1%}" for number in numbers])  # of docs/evaluation.md
    assert by_hand["clean"] == rows[0]["accuracy"]  # the same model
    assert threat["plain"] > by_hand["robust"] + 0.15
    assert threat["accuracy"] == pytest.approx(by_hand["robust"], abs=0.07)
    assert threat["newly_fooled"] == round(30 * (threat["plain"] - threat["accuracy"]))
    assert "the sanity checks were left out" in page
    if name == "rounds":  # a warning of the plain attack
        assert "hardly any image has a zero gradient (30 of 30)" in page
    assert f"`unusual ({type(layer).__name__})`" in page
    found = f"the adaptive check fools hardly any more ({threat['newly_fooled']} of 30"
    assert f"**WARNING** linf 0.15: check failed: {found}" in page
    result, arrays = results["results-best-apgd-adaptive-linf-0.15-n30"]
    first_straight = result["attacks"].index("straight-ce")
    assert ((arrays["fooled_by"] >= first_straight) & ~arrays["robust"]).sum() > 3


def test_verdicts_are_the_models_own(best, tmp_path, short, linf_alone, monkeypatch):
    """A surrogate that is fooled where the model is not, fools nobody."""
    surrogate = adaptive.Surrogate

    class Inverted(surrogate):
        def forward(self, x):
            return -super().forward(x)

    flags = "--n-images 10 --sanity-images 0 --eps 0.001"
    monkeypatch.setattr(adaptive, "Surrogate", Inverted)
    _, rows, _ = report_on(best, tmp_path, flags)
    assert rows[1]["accuracy"] == rows[1]["plain"] > 0.5


def test_a_killed_report_goes_on(best, tmp_path, monkeypatch):
    """SIGKILL in the adaptive check, then two processes: verdicts and page of a whole run."""
    shorten(3, monkeypatch.setattr)
    flags = "--n-images 4 --batch-size 2 --sanity-images 0 --eps 0.05"
    page, _, straight = report_on(best, tmp_path / "straight", flags)
    (tmp_path / "cut").mkdir()
    shutil.copy(best, tmp_path / "cut")
    argv = ["tests/evaluation_helper.py", "--report", *flags.split(), "--checkpoint"]
    argv.append(tmp_path / "cut" / "best.pt")
    # Each of the two chunks had two attacks, and the first one has had its third.
    done = python(*argv, env={"KILL_AT": "6"}, expect=-signal.SIGKILL)
    assert "killed" in done.stdout
    parts = tmp_path / "cut" / "results-best-apgd-adaptive-linf-0.05-n4.parts"
    assert len(json.loads((parts / "chunk-00000.json").read_text())["seconds"]) == 3
    python(*argv, ranks=2)
    cut = results_in(tmp_path / "cut")
    assert cut.keys() == straight.keys() and len(cut) == 6
    for name in cut:
        for key in cut[name][1].files:
            assert np.array_equal(cut[name][1][key], straight[name][1][key]), (name, key)
    lines = (tmp_path / "cut" / "report-best-0.05-n4.md").read_text().splitlines()
    assert lines[:-1] == page.splitlines()[:-1]  # the last one has the command
    assert not list((tmp_path / "cut").glob("*.parts"))


def test_damaged_results_are_named(best, tmp_path, short, linf_alone):
    flags = "--n-images 4 --sanity-images 0 --eps 0.01"
    report_on(best, tmp_path, flags)
    path = tmp_path / "results-best-apgd-linf-0.01-n4.npz"
    path.write_bytes(b"")
    (tmp_path / "results-best-apgd-adaptive-linf-0.01-n4.json").unlink()
    (tmp_path / "results-best-apgd-adaptive-linf-0.01-n4.npz").unlink()
    with pytest.raises(files.UserError, match=f"{path}: .*a per-image file"):
        report_on(best, tmp_path, flags)


# -------------------------------------------------------------------------------- the threats


def threats(flags):
    return evaluate.threats(evaluate.parse_args([*flags.split(), "--checkpoint", "x.pt"]))


def test_the_threats_of_a_report():
    assert threats("--report --dataset cifar10") == [
        ("linf", 8 / 255),
        ("linf", 12 / 255),
        ("l2", 0.5),
        ("l1", 12.0),
    ]
    found = threats("--report --dataset imagenet --norm l2 --eps 2 3 4")
    assert found == [("l2", 2), ("l2", 3), ("l2", 4), ("linf", 4 / 255), ("l1", 255.0)]
    assert threats("--dataset cifar10") == [("linf", 8 / 255)]


def test_a_data_set_without_a_usual_radius_in_l1(monkeypatch, capsys):
    """Its report has two norms."""
    mine = dataclasses.replace(DIGITS, eps={"linf": 0.1, "l2": 1.0})
    monkeypatch.setitem(DATASETS, "digits", mine)
    assert threats("--report --eps 0.1") == [("linf", 0.1), ("l2", 1.0)]
    with pytest.raises(SystemExit):
        threats("--norm l1")
    assert "argument --eps: required, digits has no usual radius in l1" in capsys.readouterr().err


def test_the_names_of_reports():
    def path(flags):
        args = evaluate.parse_args([*flags.split(), "--checkpoint", "a/best.pt", "--report"])
        return requests.result_path(args, "report")

    assert path("") == "a/report-best.json"
    assert path("--eps 0.05") == "a/report-best-0.05.json"
    flags = "--attack autoattack --norm l2 --n-images 5 --seed 3"
    assert path(flags) == "a/report-best-autoattack-l2-n5-seed3.json"


def test_check_counts_all_attacks_of_a_report(best, monkeypatch, capsys):
    """The time of a report is that of its attacks, at each of its threats."""
    clock = iter(range(10**6))  # a second goes by between two looks at the clock
    monkeypatch.setattr(evaluate.time, "time", lambda: float(next(clock)))
    times = []
    monkeypatch.setattr(evaluate.run, "in_words", lambda seconds: times.append(seconds) or "")
    for flags in ("", "--report"):
        argv = ["--checkpoint", best, "--check", "--n-images", "10", *flags.split()]
        evaluate.main(evaluate.parse_args(argv))
    attack = 1 + 101 + 909
    # Logits; five radii of 20 steps; two steps on the surface; 300 steps of APGD.
    checks = 3 + 5 * (21 + 2) + 3 + 303
    after = 1 + 101 + 4 * 51 + 200  # one attack; APGD of 50 steps, four ways; Square, 200 queries
    assert times == [attack + checks, 4 * (attack + checks + after)]
    assert "nothing was written" in capsys.readouterr().out
    assert not list(Path(best).parent.glob("report*"))
