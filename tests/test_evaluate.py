"""evaluate.py: its verdicts are pyautoattack's, its threat model is the command line's.

Alone: python -m pytest tests/test_evaluate.py
"""

import importlib.util
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS
from data_helper import trust_cifar, write_cifar
from evaluation_helper import evaluate_with, first_images, shorten, train_short
from pyautoattack import AutoAttack
from torch import nn

import evaluate
import train_at
from common import UserError, attacks, data, files, models
from evaluation import autoattack, requests, restarts, sanity, verdicts
from published.datasets import DATASETS
from published.weights import load_classifier

CIFAR = DATASETS["cifar10"]


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return train_short(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture
def wrap_classifier(monkeypatch):
    """wrap_classifier(f): evaluate.py gets f(model) for every checkpoint that it loads."""
    load = load_classifier

    def wrap(make):
        def load_wrapped(*args):
            model, state = load(*args)
            return make(model), state

        monkeypatch.setattr(evaluate, "load_classifier", load_wrapped)

    return wrap


# --------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "norm,eps,attack,n,batch_size",
    [("linf", 0.1, "autoattack", 16, 10), ("l2", 0.5, "apgd", 24, 12), ("l1", 2.0, "apgd", 24, 12)],
)
def test_verdicts_are_those_of_pyautoattack(
    norm, eps, attack, n, batch_size, best, tmp_path, monkeypatch
):
    """Called directly on each chunk, of which there are two; of both the attacks are short."""
    shorten(20, monkeypatch.setattr)
    threat = f"--norm {norm} --eps {eps} --seed 3 --n-images {n} --batch-size {batch_size}"
    result, per_image = evaluate_with(best, tmp_path, f"--attack {attack} {threat}")
    model, x, y = first_images(best, n)
    names = requests.ATTACKS[attack][1]
    robust = []
    for rows in torch.arange(n).split(batch_size):
        package = AutoAttack(model, norm=autoattack.NORMS[norm], eps=eps, seed=3, device="cpu")
        package.attacks_to_run = names
        x_adv, _ = package.run_standard_evaluation(x[rows], y[rows], batch_size=batch_size)
        robust.append(model(x_adv).argmax(1) == y[rows])
    robust = torch.cat(robust).numpy()
    assert np.array_equal(per_image["robust"], robust)
    assert result["robust_correct"] == robust.sum()
    assert 0 < robust.sum() < per_image["clean_correct"].sum()
    assert result["attacks"] == names
    assert result["version"].startswith("pyautoattack 0.")


def test_result_says_what_it_is(best, tmp_path, capsys):
    flags = "--attack pgd --n-images 100 --eps 8/255 --n-steps 5 --n-restarts 2"
    result, per_image = evaluate_with(best, tmp_path, flags)
    assert result["norm"] == "linf"
    assert result["eps"] == 8 / 255
    assert result["n"] == 100
    assert result["split"] == "test"
    assert result["checkpoint_sha256"] == files.sha256(best)
    assert result["clean"] == per_image["clean_correct"].mean()
    assert result["robust"] == per_image["robust"].mean()
    assert result["clean_interval"][0] < result["clean"] < result["clean_interval"][1]
    model, x, y = first_images(best, 100)
    correct = (model(x).argmax(1) == y).numpy()
    assert np.array_equal(per_image["label"], y)
    assert np.array_equal(per_image["index"], np.arange(100))
    assert np.array_equal(per_image["clean_correct"], correct)
    assert np.array_equal(per_image["fooled_by"] == -1, ~correct)
    assert np.array_equal(per_image["fooled_by"] == 1, per_image["robust"])
    assert result["robust"] < result["clean"]
    printed = capsys.readouterr().out
    for name, key in (("clean", "clean"), ("PGD, linf 8/255", "robust")):
        low, high = result[f"{key}_interval"]
        accuracy = f"{result[key]:.2%}   95 % interval {low:.2%} to {high:.2%}   n = 100"
        assert re.search(rf"^{name} .* {re.escape(accuracy)}", printed, re.M), printed


def test_every_flag_of_pgd_counts(best, tmp_path):
    """Verdicts are those of common.attacks.pgd, and change with a flag in the right direction."""

    def robust(name, flags=""):
        one_step = "--attack pgd --n-images 200 --n-steps 1 --n-restarts 1 --step-size 0.03"
        return evaluate_with(best, tmp_path / name, f"{one_step} {flags}")[1]["robust"]

    base = robust("base")
    assert robust("steps", "--n-steps 20").sum() < base.sum()
    eight = robust("restarts", "--n-restarts 8")
    assert eight.sum() < base.sum()
    assert not (eight & ~base).any()  # the first of eight restarts is the single one
    ce = robust("loss", "--loss ce --n-steps 4")
    assert (ce != robust("margin", "--n-steps 4")).any()
    assert (robust("seed", "--seed 1") != base).any()

    model, x, y = first_images(best, 200)
    start = attacks.random_start(x.shape, "linf", 0.15, data.stream(0, "evaluate-pgd", 0))
    settings = dict(norm="linf", eps=0.15, step_size=0.03, n_steps=1, loss="margin")
    x_adv = attacks.pgd(model, x, y, start, **settings)
    direct = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert np.array_equal(base, direct.numpy())


def test_transfer_is_an_attack_of_its_own(best, tmp_path):
    """From the model itself it is PGD, and another source fools fewer."""
    flags = "--attack transfer --n-images 60 --transfer-from"
    own, per_image = evaluate_with(best, tmp_path / "own", f"{flags} {best}")
    model, x, y = first_images(best, 60)
    x_adv = sanity.transferred(model, x, y, "linf", 0.15)
    direct = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert np.array_equal(per_image["robust"], direct.numpy())
    assert own["transfer_sha256"] == files.sha256(best)
    training = f"--epochs 4 --n-steps 1 --seed 1 --out-dir {tmp_path}/training"
    train_at.main(train_at.parse_args(training.split()))
    other, _ = evaluate_with(best, tmp_path / "other", f"{flags} {tmp_path}/training/best.pt")
    assert own["robust"] < other["robust"]


@pytest.mark.parametrize("norm,eps", [("linf", 8 / 255), ("l2", 0.5), ("l1", 12.0)])
def test_rgb_images_are_attacked(norm, eps, tmp_path, monkeypatch):
    """Three channels, channels last as they are read, through APGD, Square and every check."""
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    write_cifar(CIFAR, tmp_path)
    trust_cifar(CIFAR, tmp_path, monkeypatch)
    model = models.build("wrn-10-1", CIFAR).eval()
    content = models.describe("wrn-10-1", CIFAR)
    content |= {"norm": "linf", "eps": 8 / 255, "weights": model.state_dict()}
    files.save(content, tmp_path / "best.pt")
    images, _ = data.load_test(CIFAR, str(tmp_path))
    with torch.no_grad():
        labels = model(data.to_x(images)).argmax(1).numpy()
    monkeypatch.setattr(data, "load_test", lambda *args: (images, labels))
    attack = autoattack.attack
    square = SquareAttack.attack_single_run

    def tiny_attack(name, *args, eps, **settings):
        return attack(name, *args, eps=eps / 1000, **settings)

    def short_square(self, x, y):
        self.n_queries = 30
        return square(self, x, y)

    monkeypatch.setattr(autoattack, "attack", tiny_attack)
    monkeypatch.setattr(SquareAttack, "attack_single_run", short_square)
    monkeypatch.setattr(FABAttack_PT, "perturb", lambda self, x, y: x)
    flags = f"--dataset cifar10 --data-dir {tmp_path} --attack autoattack --norm {norm} --eps {eps}"
    flags += " --n-images 2 --sanity-images 2"
    result, _ = evaluate_with(str(tmp_path / "best.pt"), tmp_path, flags)
    assert result["clean"] == result["robust"] == 1
    assert len(result["sanity"]) >= 8


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_logits_that_are_nan_under_attack_are_refused(attack, best, tmp_path, wrap_classifier):
    """NaN on all but the clean images, of which those of class 0 would count as robust."""
    _, known_images, _ = first_images(best, 50)

    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            known = (x[:, None] == known_images[None]).flatten(2).all(2).any(1)
            return torch.where(known[:, None], self.model(x), torch.nan)

    wrap_classifier(Broken)
    with pytest.raises(UserError, match="logits are not finite"):
        evaluate_with(best, tmp_path, f"--attack {attack} --n-images 4")


def test_an_attack_outside_the_threat_model_is_an_error(best, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *args, eps, **settings: x + 2 * eps)
    with pytest.raises(RuntimeError, match="left the threat model"):
        evaluate_with(best, tmp_path, "--attack pgd --n-images 10 --n-restarts 1")


# --------------------------------------------------------------------------- sanity checks


class Masked(nn.Module):
    """Logits rounded to whole numbers: no gradient anywhere."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).round() + 0 * x.sum()


def test_gradient_masking_is_warned_of(best, tmp_path, wrap_classifier, capsys):
    wrap_classifier(Masked)
    result, _ = evaluate_with(best, tmp_path, "--attack pgd --n-images 40")
    assert result["zero_gradients"] == 40
    printed = capsys.readouterr().out
    assert "WARNING: check failed: hardly any image has a zero gradient (40 of 40)" in printed
    assert re.search(r"PGD, linf 0.15 .* WARNING: see above", printed)


def test_warnings_of_the_package_are_counted_by_chunk(
    best, tmp_path, wrap_classifier, capfd, monkeypatch
):
    shorten(5, monkeypatch.setattr)
    wrap_classifier(Masked)
    result, _ = evaluate_with(best, tmp_path, "--attack apgd --n-images 4 --batch-size 2")
    assert "pyautoattack: points of zero gradient (in 2 of 2 chunks)" in result["warnings"]
    assert capfd.readouterr().err == ""


def test_a_warning_of_the_first_attack_is_kept(best, tmp_path, monkeypatch):
    def attack(name, model, x, y, **settings):
        if name == "apgd-ce":
            logging.getLogger("auto-attack").warning("3 points with zero gradient!")
        return x

    monkeypatch.setattr(autoattack, "attack", attack)
    result, _ = evaluate_with(best, tmp_path, "--attack apgd --n-images 4")
    assert result["warnings"] == ["pyautoattack: points of zero gradient (in 1 of 1 chunks)"]


def test_probabilities_instead_of_logits_are_warned_of(best, tmp_path, wrap_classifier):
    wrap_classifier(lambda model: nn.Sequential(model, nn.Softmax(1)))
    flags = "--attack pgd --n-images 10 --n-steps 1 --sanity-images 10"
    result, _ = evaluate_with(best, tmp_path, flags)
    assert any("logits, not probabilities" in warning for warning in result["warnings"])


def test_sanity_is_printed_and_stored(best, tmp_path, capsys):
    """All checks pass; a second model adds the check of transfer."""
    flags = f"--attack apgd --n-images 40 --sanity-images 30 --transfer-from {best}"
    result, per_image = evaluate_with(best, tmp_path, flags)
    printed = capsys.readouterr().out
    assert len(result["sanity"]) == 8
    assert result["sanity_images"] == 30
    for line in result["sanity"]:
        assert line["ok"]
        assert f"ok     {line['check']}" in printed
        assert line["found"] in printed
    assert "sanity checks on the first 30 images" in printed
    assert result["warnings"] == []
    transfer = [line["found"] for line in result["sanity"] if "transfer" in line["check"]]
    assert transfer == [f"0 of {per_image['robust'][:30].sum()} that count as robust"]


def test_clean_results_have_their_checks(best, tmp_path, capsys):
    """Without an attack, what concerns the logits is checked, and nothing else."""
    flags = "--attack clean --n-images 10 --sanity-images 10"
    result, _ = evaluate_with(best, tmp_path, flags)
    assert [line["ok"] for line in result["sanity"]] == [True] * 3
    assert result["warnings"] == []
    assert result["robust"] is None
    assert "sanity checks on the first 10 images" in capsys.readouterr().out


def test_an_attack_weaker_than_transfer_is_warned_of(best, tmp_path, monkeypatch):
    """A white-box attack that does nothing, beside adversarial images of the very model."""
    monkeypatch.setattr(autoattack, "attack", lambda name, model, x, y, **settings: x)
    flags = f"--attack apgd --n-images 40 --sanity-images 40 --transfer-from {best}"
    result, _ = evaluate_with(best, tmp_path, flags)
    assert any("transfer fools no more" in warning for warning in result["warnings"])


def test_verdicts_that_a_longer_attack_overturns_are_warned_of(best, tmp_path):
    """One tiny step of PGD: nearly all images count as robust, and the check knows the others."""
    flags = "--attack pgd --n-steps 1 --n-restarts 1 --step-size 0.001 --eps 0.2"
    result, _ = evaluate_with(best, tmp_path, f"{flags} --n-images 40 --sanity-images 40")
    (warning,) = [text for text in result["warnings"] if "APGD-CE of 300 steps" in text]
    counts = rf"(\d+) of {result['robust_correct']} that count as robust"
    pattern = rf"\({counts}; (.*)% robust without them\)"
    n_more, without = re.search(pattern, warning).groups()
    expected = 100 * (result["robust_correct"] - int(n_more)) / 40
    assert float(without) == pytest.approx(expected, abs=0.006)


def test_square_that_fools_many_is_warned_of(best, tmp_path, monkeypatch):
    """Gradients that fool nobody and a black box that does: the sign of masked gradients."""

    def attack(name, model, x, y, **settings):
        return 1 - x if name == "square" else x

    monkeypatch.setattr(autoattack, "attack", attack)
    monkeypatch.setattr(restarts, "in_threat_model", lambda x_adv, *args: x_adv)
    result, per_image = evaluate_with(best, tmp_path, "--attack autoattack --n-images 20")
    assert (per_image["fooled_by"] == 3).any()
    assert any("Square fools" in warning for warning in result["warnings"])


# ------------------------------------------------------------------------ randomised models


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.5 * torch.randn_like(x))


def test_rand_expects_a_randomised_model(best, tmp_path, monkeypatch, wrap_classifier):
    """It warns of another one, and seeds the noise of this one."""

    def brighter(name, model, x, y, **settings):
        return (x + 0.2).clamp(0, 1)

    monkeypatch.setattr(autoattack, "attack", brighter)
    monkeypatch.setattr(restarts, "in_threat_model", lambda x_adv, *args: x_adv)
    flags = "--attack rand --n-images 40 --eps 0.05 --sanity-images 4"
    result, _ = evaluate_with(best, tmp_path / "plain", flags)
    assert any(sanity.RANDOM in warning for warning in result["warnings"])
    wrap_classifier(Noisy)
    result, first = evaluate_with(best, tmp_path / "noisy", flags)
    assert not any(sanity.RANDOM in warning for warning in result["warnings"])
    assert 0 < result["robust"] < result["clean"] < 1
    _, second = evaluate_with(best, tmp_path / "again", flags)
    assert np.array_equal(second["fooled_by"], first["fooled_by"])


def test_each_attack_is_of_its_version(best, tmp_path, monkeypatch):
    """That of rand averages gradients, and lets no image leave because of one lucky draw."""
    seen = []

    def noted(name, model, x, y, **settings):
        seen.append(settings["version"])
        return x

    monkeypatch.setattr(autoattack, "attack", noted)
    evaluate_with(best, tmp_path / "rand", "--attack rand --n-images 4")
    evaluate_with(best, tmp_path / "apgd", "--attack apgd --n-images 4")
    assert seen == ["rand"] * 2 + ["standard"] * 2


@pytest.fixture
def cut_at_fourth_call(monkeypatch):
    """autoattack.attack that ends with an error at its fourth call; a list of the attacks run."""
    attack = autoattack.attack
    calls = []

    def failing(name, *args, **settings):
        calls.append(name)
        if len(calls) == 4:
            raise ZeroDivisionError
        return attack(name, *args, **settings)

    monkeypatch.setattr(autoattack, "attack", failing)
    return calls


def test_a_randomised_model_is_resumed(
    best, tmp_path, wrap_classifier, cut_at_fourth_call, monkeypatch
):
    """Cut between the two attacks of a chunk, it has the verdicts of a run without interruption."""
    shorten(20, monkeypatch.setattr)
    wrap_classifier(Noisy)
    flags = "--attack rand --n-images 12 --batch-size 6 --eps 0.02"
    with pytest.raises(ZeroDivisionError):
        evaluate_with(best, tmp_path / "cut", flags)
    _, cut = evaluate_with(best, tmp_path / "cut", flags)
    assert cut_at_fourth_call == ["apgd-ce", "apgd-dlr"] * 2 + ["apgd-dlr"]
    _, straight = evaluate_with(best, tmp_path / "straight", flags)
    assert np.array_equal(cut["fooled_by"], straight["fooled_by"])
    assert len(set(cut["fooled_by"].tolist())) > 2


# ----------------------------------------------------------------------- results and parts


def test_finished_result_is_printed_again_and_another_is_refused(best, tmp_path, capsys):
    flags = "--attack clean --n-images 50"
    first, _ = evaluate_with(best, tmp_path, flags)
    written = (tmp_path / "result.json").stat().st_mtime_ns
    printed = capsys.readouterr().out
    assert evaluate_with(best, tmp_path, flags)[0] == first
    assert capsys.readouterr().out == printed
    with pytest.raises(UserError, match="holds another result.*n is 50, not 51"):
        evaluate_with(best, tmp_path, "--attack clean --n-images 51")
    assert (tmp_path / "result.json").stat().st_mtime_ns == written


def test_several_radii_have_results_of_their_own_and_a_curve(best, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(Path(best).read_bytes())
    flags = "--attack pgd --n-steps 5 --n-images 40 --sanity-images 0 --eps 0.02 0.1 0.5 0.1"
    evaluate.main(evaluate.parse_args(["--checkpoint", str(path), *flags.split()]))
    robust = []
    for eps in ("0.02", "0.1", "0.5"):
        result = json.loads((tmp_path / f"results-best-pgd-linf-{eps}-n40.json").read_text())
        robust.append(result["robust"])
    assert robust[0] > robust[1] > robust[2] == 0
    assert (tmp_path / "results-best-pgd-linf-curve-0.02-0.1-0.5-n40.png").read_bytes()[
        :4
    ] == b"\x89PNG"


def test_names_of_results():
    """What tables tell apart is in the name of the file."""

    def path(flags, eps=0.031372549):
        return requests.result_path(evaluate.parse_args(flags.split()), eps)

    assert path("--checkpoint a/best.pt --attack pgd") == "a/results-best-pgd-linf-0.03137.json"
    flags = "--checkpoint a/x.safetensors --norm l2 --eps 1 --n-images 5 --seed 3"
    assert path(flags, "curve") == "a/results-x-apgd-l2-curve-1-n5-seed3.json"
    flags = "--dataset imagenet --image-list x --checkpoint best.pt"
    assert path(flags, 0.5) == "results-best-apgd-linf-0.5-listed.json"
    flags = "--model diffusion-classifier --teacher x --keep-classes 3 --fresh-noise --attack rand"
    expected = "out/diffusion-classifier-digits/results-8-draws-rand-linf-0.5-keep3-fresh.json"
    assert path(flags, 0.5) == expected


def test_parts_of_another_evaluation_are_refused(best, tmp_path, cut_at_fourth_call, monkeypatch):
    """An interrupted evaluation goes on under the same flags; no finished attack runs again."""
    shorten(20, monkeypatch.setattr)
    flags = "--attack apgd --n-images 80 --batch-size 40"
    with pytest.raises(ZeroDivisionError):
        evaluate_with(best, tmp_path / "cut", flags)
    with pytest.raises(UserError, match="holds another run .*eps is 0.15 there, 0.1 here"):
        evaluate_with(best, tmp_path / "cut", f"{flags} --eps 0.1")
    evaluate_with(best, tmp_path / "cut", flags)
    assert cut_at_fourth_call == ["apgd-ce", "apgd-t", "apgd-ce", "apgd-t", "apgd-t"]
    assert not (tmp_path / "cut" / "result.parts").exists()
    evaluate_with(best, tmp_path / "straight", flags)
    cut = (tmp_path / "cut" / "result.npz").read_bytes()
    assert cut == (tmp_path / "straight" / "result.npz").read_bytes()


def test_what_lies_beside_a_result(best, tmp_path):
    """Parts that a kill left beside a finished result go. Verdicts without their result stay."""
    flags = "--attack clean --n-images 20"
    evaluate_with(best, tmp_path, flags)
    folder = tmp_path / "result.parts"
    folder.mkdir()
    (folder / "request.json").write_text("{}")
    evaluate_with(best, tmp_path, flags)
    assert not folder.exists()
    (tmp_path / "result.json").unlink()
    with pytest.raises(UserError, match="would replace .*result.npz"):
        evaluate_with(best, tmp_path, flags)


@pytest.mark.parametrize(
    "name,content",
    [
        ("outputs", {}),
        ("outputs", {"lines": [{"check": "a", "ok": 1, "found": "b"}]}),
        ("steps", {"fooled": [True]}),
    ],
)
def test_damaged_checks_are_refused(name, content, best, tmp_path, monkeypatch):
    flags = "--attack pgd --n-images 10 --sanity-images 10 --n-steps 1"
    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "merge", None)
        with pytest.raises(TypeError):
            evaluate_with(best, tmp_path, flags)
    files.write_json(content, tmp_path / "result.parts" / f"sanity-{name}.json")
    with pytest.raises(UserError, match=f"sanity-{name}.json: damaged"):
        evaluate_with(best, tmp_path, flags)


# ---------------------------------------------------------------------- weights of others


def test_normalisation_of_own_files_is_not_changed(best, tmp_path):
    with pytest.raises(UserError, match="--mean, --std: .* is of this project"):
        evaluate_with(best, tmp_path, "--model wrn-10-1 --mean 0 --attack clean")


@pytest.mark.parametrize(
    "stored,flags,fits",
    [(0.5, "", False), (0.5, "--mean 0.5", True), (DIGITS.mean[0], "", True)],
)
def test_a_mean_in_the_file_must_be_the_one_in_force(stored, flags, fits, tmp_path):
    weights = models.build("wrn-10-1", DIGITS).state_dict()
    torch.save(weights | {"mean": torch.full((1, 1, 1), stored)}, tmp_path / "theirs.pt")
    flags = f"--checkpoint {tmp_path}/theirs.pt --model wrn-10-1 --attack clean {flags}"
    args = evaluate.parse_args(flags.split())
    if fits:
        model, _, trained = evaluate.load_model(args, DIGITS, "cpu")
        assert model.model.mean.item() == pytest.approx(stored)
        assert trained is None
    else:
        with pytest.raises(UserError, match=r"normalises by a mean of \[0.5\], expected"):
            evaluate.load_model(args, DIGITS, "cpu")


def test_the_resnet_of_autoattacks_example(tmp_path, monkeypatch):
    """Weights in pyautoattack's package have the logits of the class that lies beside them."""
    package = Path(importlib.util.find_spec("pyautoattack").submodule_search_locations[0])
    weights = package / "examples" / "model_test.pt"
    spec = importlib.util.spec_from_file_location("resnet", package / "examples" / "resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.ResNet18().eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))

    write_cifar(CIFAR, tmp_path)
    trust_cifar(CIFAR, tmp_path, monkeypatch)
    flags = f"--dataset cifar10 --data-dir {tmp_path} --model resnet-18 --attack clean"
    plain = f"{flags} --mean 0 --std 1"
    args = evaluate.parse_args(["--checkpoint", str(weights), *plain.split()])
    model, _, _ = evaluate.load_model(args, CIFAR, "cpu")
    images, labels = data.load_test(CIFAR, str(tmp_path))
    x = data.to_x(images)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), theirs.to(memory_format=torch.channels_last)(x))
        n_correct = int((theirs(x).argmax(1).numpy() == labels).sum())
    result, _ = evaluate_with(str(weights), tmp_path / "result", plain)
    assert result["clean_correct"] == n_correct
    assert (result["mean"], result["std"]) == ([0.0], [1.0])  # another number, another result
    args = evaluate.parse_args(["--checkpoint", str(weights), *flags.split()])
    normalised, _, _ = evaluate.load_model(args, CIFAR, "cpu")
    assert not torch.allclose(normalised(x), model(x), atol=0.1)


def test_a_compiled_model_is_evaluated(best, tmp_path, monkeypatch):
    """It is what torch.compile returns that is attacked."""
    n_passes = []

    def compile_watched(model, dynamic=False):
        if not isinstance(model, nn.Module):  # the look for a compiler
            return model
        assert dynamic
        return lambda x: n_passes.append(len(x)) or model(x)

    monkeypatch.setattr(torch, "compile", compile_watched)
    flags = "--attack pgd --n-images 10 --n-steps 3 --n-restarts 1 --compile"
    result, _ = evaluate_with(best, tmp_path, flags)
    assert result["compile"] is True and len(n_passes) >= 4


def test_pgd_on_a_randomised_model_averages_passes(best, tmp_path, wrap_classifier):
    counts = []

    class Counted(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            counts.append(torch.is_grad_enabled())
            return self.model(x)

    wrap_classifier(Counted)
    flags = "--attack pgd --n-images 10 --n-steps 4 --n-restarts 1 --eot"
    n_passes = {}
    for eot in (1, 3):
        counts.clear()
        evaluate_with(best, tmp_path / str(eot), f"{flags} {eot}")
        n_passes[eot] = sum(counts)
    assert n_passes[3] - n_passes[1] == 4 * 2


def test_the_precision_is_part_of_a_result(best, tmp_path):
    """Convolutions are computed in it, and a result of one precision is not another's."""
    types = set()

    def watch(self, inputs, output):
        types.add(output.dtype)

    flags = "--attack pgd --n-images 10 --n-steps 1 --precision"
    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        result, _ = evaluate_with(best, tmp_path, f"{flags} bf16")
    finally:
        handle.remove()
    assert result["precision"] == "bf16" and torch.bfloat16 in types
    with pytest.raises(UserError, match="precision is bf16, not fp32"):
        evaluate_with(best, tmp_path, f"{flags} fp32")
