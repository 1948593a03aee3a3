"""Evaluation: verdicts are pyautoattack's, the threat model is the command line's. Alone: python -m pytest tests/test_evaluate.py"""

import json

import numpy as np
import pytest
import torch
from conftest import DIGITS
from pyautoattack import AutoAttack
from torch import nn

import evaluate
import train_at
from common import attacks, checkpoint, cli, data, models


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A short but real training: robust enough that every attack has something left to do."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    train_at.main(
        train_at.parse_args(["--epochs", "12", "--eval-every", "12", "--eval-n-steps", "1", "--n-steps", "2", "--out-dir", str(path)])
    )
    return str(path / "best.pt")


def run(best, tmp_path, *argv):
    out = tmp_path / "result.json"
    evaluate.main(evaluate.parse_args(["--checkpoint", best, "--out", str(out), *argv]))
    return json.loads(out.read_text()), np.load(tmp_path / "result.npz")


@pytest.mark.parametrize("norm,eps,attack", [("linf", 0.1, "autoattack"), ("l2", 0.5, "apgd")])
def test_verdicts_are_those_of_pyautoattack_called_directly(norm, eps, attack, best, tmp_path):
    n, chunk, seed = (16, 10, 3) if attack == "autoattack" else (24, 12, 3)  # two chunks, the last one smaller
    argv = ["--attack", attack, "--norm", norm, "--eps", str(eps), "--n-images", str(n), "--batch-size", str(chunk), "--seed", str(seed)]
    result, per_image = run(best, tmp_path, *argv)
    model, _ = models.load_classifier(best, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    x, y = data.to_x(images[:n]), torch.from_numpy(labels[:n])
    robust = []
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        adversary = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=seed, version="standard", device="cpu")
        adversary.attacks_to_run = evaluate.ATTACKS[attack][1]
        x_adv, _ = adversary.run_standard_evaluation(x[part], y[part], batch_size=chunk)
        robust.append(model(x_adv).argmax(1) == y[part])
    robust = torch.cat(robust).numpy()
    assert np.array_equal(per_image["robust"], robust)
    assert result["robust_correct"] == robust.sum() and 0 < robust.sum() < per_image["clean_correct"].sum()
    assert result["attacks"] == evaluate.ATTACKS[attack][1] and result["version"].startswith("pyautoattack 0.")


def test_result_says_what_it_is(best, tmp_path):
    result, per_image = run(best, tmp_path, "--attack", "pgd", "--n-images", "100", "--eps", "8/255", "--n-steps", "5", "--n-restarts", "2")
    assert (result["norm"], result["eps"], result["n"], result["split"]) == ("linf", 8 / 255, 100, "test")
    assert result["checkpoint_sha256"] == checkpoint.sha256(best)
    assert result["clean"] == per_image["clean_correct"].mean() and result["robust"] == per_image["robust"].mean()
    assert result["clean_interval"][0] < result["clean"] < result["clean_interval"][1]
    images, labels = data.load_test(DIGITS, None)
    assert np.array_equal(per_image["label"], labels[:100]) and np.array_equal(per_image["index"], np.arange(100))
    model, _ = models.load_classifier(best, DIGITS, "cpu")
    correct = model(data.to_x(images[:100])).argmax(1).numpy() == labels[:100]
    assert np.array_equal(per_image["clean_correct"], correct)
    assert np.array_equal(per_image["fooled_by"] == -1, ~correct)
    assert np.array_equal(per_image["fooled_by"] == 1, per_image["robust"])


def test_every_flag_of_pgd_counts(best, tmp_path):
    """More steps, more restarts and the other loss change the verdicts in the direction they must; verdicts are attacks.pgd's."""

    def robust(name, *argv):
        (tmp_path / name).mkdir()
        argv = ["--attack", "pgd", "--n-images", "200", "--n-steps", "1", "--n-restarts", "1", "--step-size", "0.03", *argv]
        return run(best, tmp_path / name, *argv)[1]["robust"]

    base = robust("base")
    assert robust("steps", "--n-steps", "20").sum() < base.sum()
    restarts = robust("restarts", "--n-restarts", "8")
    assert restarts.sum() < base.sum() and not (restarts & ~base).any()  # the first restart is the single one's
    assert (robust("loss", "--loss", "ce", "--n-steps", "4") != robust("margin", "--n-steps", "4")).any()
    assert (robust("seed", "--seed", "1") != base).any()
    model, _ = models.load_classifier(best, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    x, y = data.to_x(images[:200]), torch.from_numpy(labels[:200])
    start = attacks.random_start(x.shape, "linf", 0.15, data.stream(0, "evaluate-pgd", 0))
    x_adv = attacks.pgd(model, x, y, [start], norm="linf", eps=0.15, step_size=0.03, n_steps=1, loss="margin")
    direct = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert np.array_equal(base, direct.numpy())


def test_radius_counts_and_falls_to_zero(best, tmp_path):
    robust = []
    for i, eps in enumerate((0.01, 0.1, 0.5)):
        (tmp_path / str(i)).mkdir()
        robust.append(run(best, tmp_path / str(i), "--attack", "pgd", "--n-images", "100", "--eps", str(eps))[0]["robust"])
    assert robust[0] > robust[1] > robust[2] == 0


def test_finished_result_is_printed_again_and_another_is_refused(best, tmp_path, capsys):
    argv = ["--attack", "clean", "--n-images", "50"]
    first, _ = run(best, tmp_path, *argv)
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    printed = capsys.readouterr().out
    assert run(best, tmp_path, *argv)[0] == first and capsys.readouterr().out == printed
    with pytest.raises(cli.UserError, match="holds another result.*n is 50, not 51"):
        run(best, tmp_path, "--attack", "clean", "--n-images", "51")
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp


def test_wilson_interval():
    """Closed form: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    k, n, z = 640, 797, 1.959963984540054
    p = k / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    expected = [(p + z * z / (2 * n) + s * half) / (1 + z * z / n) for s in (-1, 1)]
    assert evaluate.interval(k, n) == pytest.approx(expected)


class Masked(nn.Module):
    """Logits rounded to whole numbers: no gradient anywhere."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).round() + 0 * x.sum()


def test_gradient_masking_is_warned_of(best, tmp_path, monkeypatch, capsys):
    real = models.load_classifier
    monkeypatch.setattr(models, "load_classifier", lambda *args: (Masked(real(*args)[0]), real(*args)[1]))
    result, _ = run(best, tmp_path, "--attack", "pgd", "--n-images", "40")
    assert result["zero_gradients"] == 40 and any("gradient masking" in w for w in result["warnings"])
    assert "WARNING: 40 of 40 images have a zero gradient" in capsys.readouterr().out


def test_probabilities_instead_of_logits_are_warned_of(best, tmp_path, monkeypatch):
    real = models.load_classifier
    monkeypatch.setattr(models, "load_classifier", lambda *args: (nn.Sequential(real(*args)[0], nn.Softmax(1)), real(*args)[1]))
    result, _ = run(best, tmp_path, "--attack", "apgd", "--n-images", "10")
    assert any("probability distribution" in w for w in result["warnings"])


def test_an_attack_outside_the_threat_model_is_an_error(best, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "run_pgd", lambda model, x, y, chunk, args: x + 2 * args.eps)
    with pytest.raises(RuntimeError, match="left the threat model"):
        run(best, tmp_path, "--attack", "pgd", "--n-images", "10")
