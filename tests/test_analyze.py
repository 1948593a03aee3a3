"""analyze.py: what it measures of a model, what it writes, and how it goes on.

Alone: python -m pytest tests/test_analyze.py
"""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import DIGITS, python

import analyze
import train_at
from analysis import metrics
from common import UserError, data, files
from published.weights import load_classifier

SMALL = "--n-images 128 --n-attacked 64 --sae-steps 20 --sae-seeds 2 --sae-latents 32".split()
PICTURES = (
    "rank spread frequencies sparseness dimension margin distance similarity embedding analysis"
)


def train(out_dir, *argv):
    """The best.pt of a short training run."""
    common = ["--eval-n-steps", "1", "--n-steps", "1", "--out-dir", str(out_dir)]
    train_at.main(train_at.parse_args([*argv, *common]))
    return str(out_dir / "best.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two classifiers of six epochs."""
    paths = []
    for seed in ("0", "1"):
        out_dir = tmp_path_factory.mktemp("analyzed") / "run"
        paths.append(train(out_dir, "--epochs", "6", "--eval-every", "6", "--seed", seed))
    return paths


def run(out_dir, *argv):
    analyze.main(analyze.parse_args([*argv, "--out-dir", str(out_dir)]))


def read(out_dir):
    return json.loads((out_dir / "analysis.json").read_text())


# ---------------------------------------------------------------------------- the whole script


def test_analyze_writes_tables_and_pictures_and_goes_on(
    trained, diffusion_dir, tmp_path, monkeypatch, capsys
):
    first, second = trained
    argv = ["--model", f"at={first}", "--model", f"at={second}", "--model", f"one={second}"]
    argv += ["--teacher", diffusion_dir, "--n-noise", "2", *SMALL]
    run(tmp_path, *argv)

    result = read(tmp_path)
    assert [len(rows) for rows in result["models"].values()] == [2, 1, 1]
    matrix = np.array(result["cka"]["matrix"])
    half = np.array(result["cka"]["half_interval"])
    assert matrix.shape == half.shape == (4, 4)
    assert (half == half.T).all()
    assert matrix[1, 2] == pytest.approx(1)  # the same checkpoint under two names
    assert half[1, 2] == pytest.approx(0, abs=1e-6)
    assert 0 < half[0, 3] < 0.5

    row = result["models"]["at"][0]
    teacher = result["models"]["teacher"][0]
    assert "alignment_draws" not in row
    assert 0 < teacher["alignment_draws"][0] < 1
    assert teacher["clean"][0] > 0.5
    assert teacher["sigma"] > 0
    assert len(set(row["sae_by_seed"])) == 2
    assert row["robust_third"][0] > row["robust"][0]
    for key in analyze.METRICS.keys() - {"alignment_draws"}:
        for measured in (row, teacher):
            value, low, high = measured[key]
            assert low <= value <= high, key
            assert math.isfinite(high - low), key

    table = (tmp_path / "analysis.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("| | at | one | teacher |")
    assert table.count("\n") == 5 + len(analyze.METRICS)
    for name in PICTURES.split():
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name

    monkeypatch.setattr(analyze, "measure", None)
    run(tmp_path, *argv)  # nothing is measured again
    run(tmp_path, "--model", f"x={first}", *SMALL)
    assert read(tmp_path)["models"]["x"][0]["rank_me"] == row["rank_me"]


def test_two_processes_analyze_as_one(trained, tmp_path):
    first, second = trained
    argv = ["--model", f"a={first}", "--model", f"a={second}", "--model", f"b={first}", *SMALL]
    python("analyze.py", *argv, "--out-dir", tmp_path / "2", ranks=2)
    run(tmp_path / "1", *argv)
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert one["models"] == two["models"]
    assert one["cka"] == two["cka"]
    assert len(one["models"]["a"]) == 2


def test_broken_parts_are_named(trained, tmp_path):
    argv = ["--model", f"a={trained[0]}", *SMALL]
    run(tmp_path, *argv)
    (part,) = [path for path in (tmp_path / "parts").glob("*.json") if len(path.stem) == 16]
    whole = part.read_text()
    part.write_text(whole.replace('"sae":', '"other":'))
    with pytest.raises(UserError, match=rf"{part.name}: lacks sae; delete it"):
        run(tmp_path, *argv)
    part.write_text(whole)
    part.with_suffix(".npy").write_bytes(b"cut")
    with pytest.raises(UserError, match=rf"{part.stem}.npy: truncated"):
        run(tmp_path, *argv)


# ------------------------------------------------------------------------------ what is measured


@pytest.fixture
def measured(trained):
    """(model, fit, test, row, features) of a classifier: what analyze.measure takes and gives."""
    args = analyze.parse_args(["--model", f"a={trained[0]}", *SMALL])
    model, _ = load_classifier(trained[0], DIGITS, "cpu")
    (images, labels), _ = data.load_train(DIGITS, None, 200)
    fit = images, np.arange(800), labels
    images, labels = data.load_test(DIGITS, None)
    test = images[:128], labels[:128]
    return model, fit, test, *analyze.measure("a", model, fit, test, args, "cpu")


def test_features_and_accuracy_are_the_classifiers(measured):
    model, _, (images, labels), row, features = measured
    logits, expected = model(data.to_x(images), with_features=True)
    np.testing.assert_allclose(features, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    accuracy = (logits.argmax(1).numpy() == labels).mean()
    assert row["clean"][0] == pytest.approx(accuracy)
    assert row["dimension_curve"][-1] == pytest.approx(accuracy)
    assert row["alignment"][0] > 0
    assert sum(row["saliency"]) == pytest.approx(1)


def test_margin_and_gradient_are_those_of_the_definition(measured):
    model, _, (images, labels), row, _ = measured
    model.double()
    margins, lengths = [], []
    for image, label in zip(data.to_x(images).double(), labels.tolist()):
        x = image[None].requires_grad_(True)
        z = model(x)[0]
        margin = z[label] - max(z[k] for k in range(10) if k != label)
        margins.append(margin.item())
        lengths.append(torch.autograd.grad(margin, x)[0].abs().sum().item())
    assert row["margin"][0] == pytest.approx(np.mean(margins), rel=1e-4)
    assert row["gradient"][0] == pytest.approx(np.mean(lengths), rel=1e-4)
    assert row["distance"][0] == pytest.approx(np.mean(np.divide(margins, lengths)), rel=1e-3)


def test_dimension_and_sparseness_are_of_components_of_the_training_images(measured):
    model, (fit_images, _, _), (_, labels), row, features = measured
    with torch.no_grad():
        _, fit = model(data.to_x(fit_images), with_features=True)
    fit = fit.double().numpy()
    mean = fit.mean(0)
    basis = np.linalg.svd(fit - mean)[2]
    weight, bias = (p.detach().double().numpy() for p in (model.logits.weight, model.logits.bias))
    for k in (0, 4, 9, 64):
        kept = (features - mean) @ basis[:k].T @ basis[:k] + mean
        accuracy = ((kept @ weight.T + bias).argmax(1) == labels).mean()
        assert row["dimension_curve"][k] == pytest.approx(accuracy, abs=0.01)

    scale = np.sqrt(np.square(fit - mean).mean())
    x_fit, x = (torch.from_numpy((part - mean) / scale).float() for part in (fit, features))
    variance = (x - x.mean(0)).square().sum()
    for seed, error in enumerate(row["sae_by_seed"]):
        sae = metrics.train_sae(x_fit, 32, 8, 20, seed)
        expected = (sae(x) - x).square().sum() / variance
        assert error == pytest.approx(expected.item(), rel=0.01)


def test_what_is_wrong_without_an_attack_is_not_robust(monkeypatch):
    """A dark image that the attack brightens is classified right then, and still not robust."""

    class Bright(torch.nn.Module):
        def forward(self, x, with_features=False):
            brightness = x.mean((1, 2, 3)) - 0.5
            features = torch.stack([-brightness, brightness], 1)
            return (features, features) if with_features else features

    monkeypatch.setattr(analyze.attacks, "pgd", lambda model, x, y, start, **settings: 1 - x)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    images[1] = 255
    args = analyze.parse_args(["--model", "a=x"])
    _, _, correct, robust = analyze.attack(Bright(), images, np.array([1, 1]), 0.1, args, "cpu")
    assert correct.tolist() == [False, True]
    assert robust.tolist() == [False, False]


# ------------------------------------------------------------------------------------ bad input


def test_models_with_equal_features_are_refused(trained, tmp_path):
    """One line with the name, not a crash of a library or a NaN."""
    check_dead_model(trained[0], tmp_path, ("layer", "batchnorm"), "the same for all images")


def test_models_without_a_gradient_are_refused(trained, tmp_path):
    check_dead_model(trained[0], tmp_path, "logits.weight", "gradient is zero on all images")


def check_dead_model(path, tmp_path, zeroed, message):
    state = files.load(path, {})
    for name, value in state["weights"].items():
        if name.startswith(zeroed):
            value.zero_()
    files.save(state, tmp_path / "dead.pt")
    with pytest.raises(UserError, match=rf"a \(.*dead.pt\): .*{message}"):
        run(tmp_path / "out", "--model", f"a={tmp_path}/dead.pt", *SMALL)


def test_the_same_model_twice_under_one_name(trained, tmp_path):
    again = os.path.join(os.path.dirname(trained[0]), ".", "best.pt")
    with pytest.raises(UserError, match="the same model as another one of that name"):
        run(tmp_path, "--model", f"a={trained[0]}", "--model", f"a={again}", *SMALL)


def test_one_name_for_two_kinds_of_network(trained, tmp_path):
    wide = train(tmp_path / "wide", *"--model wrn-10-2 --epochs 1".split())
    with pytest.raises(UserError, match="--model a: models of 64 and 128 features"):
        run(tmp_path / "out", "--model", f"a={trained[0]}", "--model", f"a={wide}", *SMALL)


@pytest.mark.parametrize(
    "argv, match",
    [
        ("--sae-k 64 --sae-latents 80", "--sae-k 64: expected less than the 64 features"),
        ("--val-size 950", "at least 64 training images, there are 50"),
        ("--n-images 63", "at least 64 test images, there are 63"),
    ],
)
def test_numbers_that_do_not_fit(argv, match, trained, tmp_path):
    with pytest.raises(UserError, match=match):
        run(tmp_path, "--model", f"a={trained[0]}", *SMALL, *argv.split())


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="none.pt: no such file"):
        run(tmp_path, "--model", f"a={tmp_path}/none.pt")


@pytest.mark.parametrize("block", ["mid", ""])
def test_blocks_that_the_teacher_has_not(block, diffusion_dir, tmp_path):
    with pytest.raises(UserError, match=f"--teacher {diffusion_dir}: .*'{block}'.*mid_block"):
        run(tmp_path, "--teacher", diffusion_dir, "--block", block)


@pytest.mark.parametrize(
    "argv, match",
    [
        ("", "--model: give at least one"),
        ("--model x", "NAME=CHECKPOINT"),
        ("--model teacher=x", "NAME=CHECKPOINT"),
        ("--model a=x --model a=x", "the same model twice"),
        ("--model a=x --sigma 1", "--sigma: does nothing here"),
        ("--model a=x --sae-k 300", "300 of 256 latents"),
        ("--model a=x --eps 8", "--eps: 8, expected at most 1"),
    ],
)
def test_flags(argv, match, capsys):
    with pytest.raises(SystemExit) as error:
        analyze.parse_args(argv.split())
    assert error.value.code == 2
    assert match in capsys.readouterr().err
