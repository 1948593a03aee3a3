"""What a result concludes from verdicts and checks, and what a finished file must agree with.

Alone: python -m pytest tests/evaluation/test_verdicts.py
"""

import numpy as np
import pytest

import evaluate
from common import UserError, files
from common.stats import wilson
from evaluation import requests, verdicts

ATTACKS = ["apgd-ce", "apgd-t"]


def outcomes(fooled_by, attacks=ATTACKS, earlier=None, checks=None, n_zero=0, n_checked=100):
    """{check: outcome} of a result with these verdicts."""
    fooled_by = np.array(fooled_by)
    request = {"n": len(fooled_by), "sanity_images": n_checked, "attacks": attacks}
    if earlier:
        request["earlier_attacks"] = earlier
    found = verdicts._outcomes(checks or {}, request, fooled_by, n_zero, randomised=False)
    return {line["check"]: line for line in found}


@pytest.mark.parametrize("n, n_more, ok", [(30, 1, True), (30, 2, False), (2000, 4, True),
                                           (2000, 5, False)])  # fmt: skip
def test_the_adaptive_check_fails_where_it_fools_more_than_another_start(n, n_more, ok):
    """Image 0 is wrong, image 1 fell before; the next n_more fall to the third attack."""
    fooled_by = np.full(n, 3)
    fooled_by[:2] = [-1, 1]
    fooled_by[2 : 2 + n_more] = 2
    line = outcomes(fooled_by, [*ATTACKS, "unit-ce"], ATTACKS)[
        "the adaptive check fools hardly any more"
    ]
    assert line["ok"] == ok
    before, now = (n - 2) / n, (n - 2 - n_more) / n
    assert line["found"] == f"{n_more} of {n}; {before:.2%} robust before, {now:.2%} now"


OVERTURNED = {  # check: (its line, how many of 100 robust images it may fool)
    "square": ("Square fools hardly any that gradients did not", 1),
    "steps": ("APGD-CE of 300 steps fools hardly any more", 1),
    "transfer": ("transfer fools no more", 0),
}


@pytest.mark.parametrize("n_more", [0, 1, 2])
@pytest.mark.parametrize("check", OVERTURNED)
def test_verdicts_that_a_check_overturns(check, n_more):
    """Only images that count as robust are told, and what is left without them."""
    name, allowed = OVERTURNED[check]
    fooled_by = np.full(200, 3)
    fooled_by[10] = 0
    fooled = np.zeros(100, bool)
    fooled[10 : 11 + n_more] = True
    checks = {check: {"fooled": fooled.tolist()}}
    line = outcomes(fooled_by, [*ATTACKS, "unit-ce"], ATTACKS, checks)[name]
    assert line["ok"] == (n_more <= allowed)
    left = f"; {(199 - n_more) / 200:.2%} robust without them" if n_more else ""
    assert line["found"] == f"{n_more} of 99 that count as robust{left}"


@pytest.mark.parametrize("n_square, ok", [(1, True), (2, False)])
def test_square_among_the_attacks(n_square, ok):
    """It counts once: the adaptive check that goes on from AutoAttack does not ask again."""
    names = [*ATTACKS, "fab-t", "square"]
    fooled_by = [3] * n_square + [4] * 20
    check = "Square fools hardly any that gradients did not"
    assert outcomes(fooled_by, names)[check]["ok"] == ok
    further = [3] * n_square + [5] * 20
    assert check not in outcomes(further, [*names, "unit-ce"], names)


def test_zero_gradients():
    check = "hardly any image has a zero gradient"
    assert outcomes([2] * 100, n_zero=1)[check]["ok"]
    assert not outcomes([2] * 100, n_zero=2)[check]["ok"]


@pytest.mark.parametrize(
    "attack, names",
    [("apgd-adaptive", ["gradients", "square"]), ("autoattack-adaptive", ["gradients"])],
)
def test_checks_of_the_adaptive_check(attack, names):
    class args:
        sanity_images = 5

    args.attack = attack
    assert requests.check_names(args) == names
    args.sanity_images = 0
    assert requests.check_names(args) == []


FLAGS_OF_PGD = ("--n-steps 7", "--n-restarts 2", "--loss ce", "--step-size 0.01", "--eot 3")


@pytest.mark.parametrize("flag", FLAGS_OF_PGD)
def test_what_pgd_depends_on_is_part_of_its_request(flag):
    """These are not in the result's name: another one's number would be printed."""

    def request(*flags):
        args = evaluate.parse_args(["--checkpoint", "a.pt", "--attack", "pgd", *flags])
        return requests.request_at(0.1, args, {}, 5, "digest")

    assert request() == request() != request(*flag.split())


# ----------------------------------------------------------------------------- finished results


@pytest.fixture
def finished(tmp_path):
    """The path of a finished result of ten images, 8 of them right and 5 robust."""
    fooled_by = np.array([-1, -1, 0, 1, 0, 2, 2, 2, 2, 2])
    (tmp_path / "r.parts").mkdir()
    result = {key: "x" for key in verdicts.FINISHED}
    result |= {"attacks": ATTACKS, "n": 10, "clean": 0.8, "clean_interval": wilson(8, 10)}
    result |= {"clean_correct": 8, "robust": 0.5, "robust_interval": wilson(5, 10)}
    result |= {"robust_correct": 5, "batch_size": 5, "eps": 0.1, "seed": 0, "norm": "l2"}
    result |= {"environment": {"torch": "2", "device": "CPU", "command": ["evaluate.py"]}}
    result |= {"by_class": [{"class": "0", "n": 10, "clean": 0.8, "robust": 0.5}], "seconds": 1.0}
    result |= {"sanity_images": 0, "settings": {}, "sanity": [], "warnings": []}
    arrays = {"index": np.arange(10), "label": np.arange(10), "clean_correct": fooled_by >= 0}
    arrays |= {"robust": fooled_by == 2, "fooled_by": fooled_by, "attacks": np.array(ATTACKS)}
    verdicts.write_result(str(tmp_path / "r.json"), result, arrays)
    return tmp_path / "r.json"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"robust": 0.9}, "r.json: its robust accuracy is not that of its verdicts"),
        ({"robust_interval": [0.8, 1.0]}, "r.json: its robust accuracy is not that of its"),
        ({"clean": 0.9}, "r.json: its clean accuracy is not that of its verdicts"),
        ({"norm": "l7"}, "r.json: its entry 'norm' is damaged"),
        ({"attack": "autoattack"}, "r.json: its entry 'attacks' is damaged"),
        ({"environment": {}}, "r.json: its entry 'environment' is damaged"),
        ({"by_class": [{"class": "0", "n": 10, "clean": 0.8}]}, "r.json: its entry 'by_class' is"),
        ({"seconds": "long"}, "r.json: its entry 'seconds' is missing or damaged"),
        ({"robust_correct": 6, "robust": 0.6}, "r.npz: of another result, (images, right, robust"),
        ({"attacks": ["apgd-ce", "square"]}, "r.npz: of another result, with other attacks"),
    ],
)
def test_a_result_must_fit_its_verdicts(change, words, finished):
    """A number in the text that is not that of the verdicts is not printed, nor published."""
    request = {"n": 10}
    assert verdicts.read_finished(str(finished), request)["robust"] == 0.5
    files.write_json(files.read_json(finished) | change, finished)
    with pytest.raises(UserError) as info:
        verdicts.read_finished(str(finished), request)
    assert words in str(info.value) and "\n" not in str(info.value)


def test_parts_stay_until_the_result_is_written(tmp_path, monkeypatch):
    (tmp_path / "r.parts").mkdir()

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(verdicts.files, "write_json", full)
    with pytest.raises(OSError):
        verdicts.write_result(str(tmp_path / "r.json"), {}, {"index": np.arange(3)})
    assert (tmp_path / "r.parts").exists()


def test_verdicts_of_another_n_are_one_line(finished):
    path = finished.with_suffix(".npz")
    arrays = dict(np.load(path))
    names = ("index", "label", "clean_correct", "robust", "fooled_by")
    np.savez(path, **arrays | {name: arrays[name][:6] for name in names})
    with pytest.raises(UserError, match="r.npz: of another result"):
        verdicts.read_finished(str(finished), {})
    np.savez(path, **arrays | {"robust": np.ones(10, bool)})
    with pytest.raises(UserError, match="r.npz: its arrays are not those"):
        verdicts.read_finished(str(finished), {})
