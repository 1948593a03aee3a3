"""Evaluation: verdicts are pyautoattack's, the threat model is the command line's. Alone: python -m pytest tests/test_evaluate.py"""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS
from pyautoattack import AutoAttack
from test_datasets import trust_cifar, write_cifar
from test_models_and_ema import robustbench as robustbench_class
from torch import nn

import evaluate
import train_at
from common import attacks, autoattack, checkpoint, cli, data, models, results, robustbench, sanity


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
    argv = argv if "--sanity-images" in argv else ("--sanity-images", "0", *argv)
    evaluate.main(evaluate.parse_args(["--checkpoint", best, "--out", str(out), *argv]))
    return json.loads(out.read_text()), np.load(tmp_path / "result.npz")


@pytest.mark.parametrize("norm,eps,attack", [("linf", 0.1, "autoattack"), ("l2", 0.5, "apgd"), ("l1", 2.0, "apgd")])
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
        adversary = AutoAttack(model, norm=autoattack.NORMS[norm], eps=eps, seed=seed, version="standard", device="cpu")
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
    assert result["zero_gradients"] == 40
    printed = capsys.readouterr().out
    assert "WARNING: check failed: hardly any image has a zero gradient (40 of 40)" in printed
    assert re.search(r"PGD, linf 0.15 .* WARNING: see above", printed)


def test_warnings_of_the_package_are_counted_by_chunk(best, tmp_path, monkeypatch):
    real = models.load_classifier
    monkeypatch.setattr(models, "load_classifier", lambda *args: (Masked(real(*args)[0]), real(*args)[1]))
    result, _ = run(best, tmp_path, "--attack", "apgd", "--n-images", "4", "--batch-size", "2")
    assert "pyautoattack: points of zero gradient (in 2 of 2 chunks)" in result["warnings"]


def test_probabilities_instead_of_logits_are_warned_of(best, tmp_path, monkeypatch):
    real = models.load_classifier
    monkeypatch.setattr(models, "load_classifier", lambda *args: (nn.Sequential(real(*args)[0], nn.Softmax(1)), real(*args)[1]))
    result, _ = run(best, tmp_path, "--attack", "pgd", "--n-images", "10", "--n-steps", "1", "--sanity-images", "10")
    assert any("logits, not probabilities" in w for w in result["warnings"])


def test_an_attack_outside_the_threat_model_is_an_error(best, tmp_path, monkeypatch):
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *rest, eps, **settings: x + 2 * eps)
    with pytest.raises(RuntimeError, match="left the threat model"):
        run(best, tmp_path, "--attack", "pgd", "--n-images", "10")


def test_l1_points_outside_the_ball_are_pulled_back_and_judged_there():
    """The package's l1 projection overshoots on large images; points inside stay as they are, bit for bit."""
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    direction = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - x  # [0, 1] is convex: no step leaves it
    lengths = torch.tensor([11.0, 12.0, 13.0]).view(-1, 1, 1, 1)
    x_adv = x + direction * lengths / direction.flatten(1).norm(p=1, dim=1).view(-1, 1, 1, 1)
    inside = attacks.in_threat_model(x_adv, x, "apgd-ce", "l1", 12.0)
    assert (inside - x).flatten(1).norm(p=1, dim=1).tolist() == pytest.approx([11, 12, 12], rel=1e-5)
    assert torch.equal(inside[:2], x_adv[:2]) and not torch.equal(inside[2], x_adv[2])
    with pytest.raises(RuntimeError, match="pixels"):
        attacks.in_threat_model(x + 1, x, "apgd-ce", "l1", 1000.0)


def test_sanity_is_printed_and_stored(best, tmp_path, capsys):
    """All checks, of the same outcome on one process and in another order; a second model adds the check of transfer."""
    argv = ["--attack", "apgd", "--n-images", "40", "--sanity-images", "30", "--transfer-from", best]
    result, per_image = run(best, tmp_path, *argv)
    printed = capsys.readouterr().out
    assert len(result["sanity"]) == 9 and result["sanity_images"] == 30
    for line in result["sanity"]:
        assert line["ok"] and f"ok     {line['check']}" in printed and line["found"] in printed
    assert "sanity checks on the first 30 images" in printed and result["warnings"] == []
    transfer = next(line for line in result["sanity"] if "transfer" in line["check"])
    assert transfer["found"] == "0 of 30 that count as robust"


def test_an_attack_weaker_than_transfer_is_warned_of(best, tmp_path, monkeypatch):
    """A white-box attack that does nothing, beside adversarial images of the very model."""
    monkeypatch.setattr(autoattack, "attack", lambda name, model, x, y, **settings: x)
    argv = ["--attack", "apgd", "--n-images", "40", "--sanity-images", "40", "--transfer-from", best]
    result, _ = run(best, tmp_path, *argv)
    assert any("transfer fools no more" in warning for warning in result["warnings"])


def test_verdicts_that_a_longer_attack_overturns_are_warned_of(best, tmp_path):
    """One tiny step of PGD: nearly all images count as robust, and the check knows which of them are not."""
    argv = ["--attack", "pgd", "--n-steps", "1", "--n-restarts", "1", "--step-size", "0.001", "--eps", "0.2"]
    result, per_image = run(best, tmp_path, *argv, "--n-images", "40", "--sanity-images", "40")
    warning = next(warning for warning in result["warnings"] if "APGD-CE of 300 steps" in warning)
    found, n, without = re.search(r"\((\d+) of (\d+) that count as robust; (.*)% robust without them\)", warning).groups()
    assert n == "40" and float(without) == pytest.approx(100 * (result["robust_correct"] - int(found)) / 40, abs=0.006)


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_logits_that_are_nan_under_attack_are_refused(attack, best, tmp_path, monkeypatch):
    """NaN anywhere but on the clean images of class 0, whose argmax is 0, too."""
    real = models.load_classifier
    images, labels = data.load_test(DIGITS, None)
    clean = data.to_x(images)

    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            known = (x[:, None] == clean[None, :50]).flatten(2).all(2).any(1)
            return torch.where(known[:, None], self.model(x), torch.nan)

    monkeypatch.setattr(models, "load_classifier", lambda *args: (Broken(real(*args)[0]), real(*args)[1]))
    with pytest.raises(cli.UserError, match="logits are not finite"):
        run(best, tmp_path, "--attack", attack, "--n-images", "4")


def test_square_that_fools_many_is_warned_of(best, tmp_path, monkeypatch):
    """Gradients that fool nobody and a black box that does: the sign of masked gradients."""
    monkeypatch.setattr(autoattack, "attack", lambda name, model, x, y, **settings: 1 - x if name == "square" else x)
    monkeypatch.setattr(attacks, "in_threat_model", lambda x_adv, *args: x_adv)
    result, per_image = run(best, tmp_path, "--attack", "autoattack", "--n-images", "20")
    assert (per_image["fooled_by"] == 3).any() and any("Square fools" in warning for warning in result["warnings"])


def test_transfer_is_an_attack_of_its_own(best, tmp_path):
    """From the model itself it is PGD: no image that it fools withstands; and the source matters."""
    (tmp_path / "self").mkdir()
    own, own_images = run(best, tmp_path / "self", "--attack", "transfer", "--transfer-from", best, "--n-images", "60")
    model, _ = models.load_classifier(best, DIGITS, "cpu")
    images, labels = data.load_test(DIGITS, None)
    x, y = data.to_x(images[:60]), torch.from_numpy(labels[:60])
    x_adv = sanity.transferred(model, x, y, "linf", 0.15, 0)
    direct = (model(x).argmax(1) == y) & (model(x_adv).argmax(1) == y)
    assert np.array_equal(own_images["robust"], direct.numpy()) and own["transfer_sha256"] == checkpoint.sha256(best)
    other = train_at.main(train_at.parse_args(["--epochs", "4", "--n-steps", "1", "--seed", "1", "--out-dir", str(tmp_path / "other")]))
    assert other is None
    weaker, _ = run(best, tmp_path, "--attack", "transfer", "--transfer-from", str(tmp_path / "other" / "best.pt"), "--n-images", "60")
    assert own["robust"] < weaker["robust"] <= weaker["clean"]


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x + 0.5 * torch.randn_like(x))


def test_rand_expects_a_randomised_model(best, tmp_path, monkeypatch):
    real = models.load_classifier
    monkeypatch.setattr(autoattack, "attack", lambda name, model, x, y, **settings: (x + 0.2).clamp(0, 1))
    monkeypatch.setattr(attacks, "in_threat_model", lambda x_adv, *args: x_adv)
    argv = ["--attack", "rand", "--n-images", "40", "--eps", "0.05", "--sanity-images", "4"]
    (tmp_path / "noisy").mkdir()
    assert any(sanity.RANDOM in warning for warning in run(best, tmp_path, *argv)[0]["warnings"])
    monkeypatch.setattr(models, "load_classifier", lambda *args: (Noisy(real(*args)[0]), real(*args)[1]))
    result, first = run(best, tmp_path / "noisy", *argv)
    assert not any(sanity.RANDOM in warning for warning in result["warnings"]) and 0 < result["robust"] < result["clean"] < 1
    (tmp_path / "again").mkdir()
    assert np.array_equal(run(best, tmp_path / "again", *argv)[1]["fooled_by"], first["fooled_by"])  # its noise has a seed, too


def test_a_randomised_model_is_attacked_and_resumed(best, tmp_path, monkeypatch):
    """The real package, whose attack then draws noise of its own: cut between its two attacks, the verdicts of an uncut run."""
    real, attack = models.load_classifier, autoattack.attack
    monkeypatch.setattr(models, "load_classifier", lambda *args: (Noisy(real(*args)[0]), real(*args)[1]))
    argv = ["--attack", "rand", "--n-images", "12", "--batch-size", "6", "--eps", "0.02"]
    for name in ("straight", "cut"):
        (tmp_path / name).mkdir()
    _, straight = run(best, tmp_path / "straight", *argv)
    calls = []

    def failing(name, *args, **settings):
        calls.append(name)
        if len(calls) == 4:
            raise ZeroDivisionError
        return attack(name, *args, **settings)

    monkeypatch.setattr(autoattack, "attack", failing)
    with pytest.raises(ZeroDivisionError):
        run(best, tmp_path / "cut", *argv)
    _, cut = run(best, tmp_path / "cut", *argv)
    assert calls == ["apgd-ce", "apgd-dlr"] * 2 + ["apgd-dlr"]
    assert np.array_equal(cut["fooled_by"], straight["fooled_by"]) and len(set(cut["fooled_by"].tolist())) > 2


def test_clean_results_have_their_checks(best, tmp_path, monkeypatch, capsys):
    """No attack: what concerns the logits is checked, and nothing else."""
    result, _ = run(best, tmp_path, "--attack", "clean", "--n-images", "10", "--sanity-images", "10")
    assert len(result["sanity"]) == 4 and all(line["ok"] for line in result["sanity"]) and result["warnings"] == []
    assert "sanity checks on the first 10 images" in capsys.readouterr().out


def test_several_radii_have_results_of_their_own_and_a_curve(best, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(Path(best).read_bytes())
    argv = ["--checkpoint", str(path), "--attack", "pgd", "--n-steps", "5", "--n-images", "40", "--sanity-images", "0"]
    evaluate.main(evaluate.parse_args([*argv, "--eps", "0.02", "0.1", "0.3"]))
    found = [json.loads((tmp_path / f"results-best-pgd-linf-{eps}-n40.json").read_text()) for eps in ("0.02", "0.1", "0.3")]
    assert found[0]["robust"] > found[1]["robust"] > found[2]["robust"]
    assert (tmp_path / "results-best-pgd-linf-curve-n40.png").read_bytes()[:4] == b"\x89PNG"


def test_parts_of_another_evaluation_are_refused(best, tmp_path, monkeypatch):
    """An interrupted evaluation goes on under the same flags alone; a finished attack is not run again."""
    argv = ["--attack", "apgd", "--n-images", "80", "--batch-size", "40"]  # chunks that fooled images leave
    real, calls = autoattack.attack, []

    def failing(name, *args, **settings):
        calls.append(name)
        if len(calls) == 4:
            raise ZeroDivisionError
        return real(name, *args, **settings)

    monkeypatch.setattr(autoattack, "attack", failing)
    with pytest.raises(ZeroDivisionError):
        run(best, tmp_path, *argv)
    with pytest.raises(cli.UserError, match="holds another run .*eps is 0.15 there, 0.1 here"):
        run(best, tmp_path, *argv, "--eps", "0.1")
    result, per_image = run(best, tmp_path, *argv)
    assert calls == ["apgd-ce", "apgd-t", "apgd-ce", "apgd-t", "apgd-t"] and not (tmp_path / "result.parts").exists()
    (tmp_path / "straight").mkdir()
    monkeypatch.setattr(autoattack, "attack", real)
    run(best, tmp_path / "straight", *argv)
    assert (tmp_path / "straight" / "result.npz").read_bytes() == (tmp_path / "result.npz").read_bytes()


def test_what_lies_beside_a_result(best, tmp_path):
    """Parts that a kill left beside a finished result go; per-image verdicts without their result stay, and end the run."""
    argv = ["--attack", "clean", "--n-images", "20"]
    run(best, tmp_path, *argv)
    folder = tmp_path / "result.parts"
    folder.mkdir()
    (folder / "request.json").write_text("{}")
    run(best, tmp_path, *argv)
    assert not folder.exists()
    (tmp_path / "result.json").unlink()
    with pytest.raises(cli.UserError, match="would replace .*result.npz"):
        run(best, tmp_path, *argv)


@pytest.mark.parametrize(
    "name,content",
    [("outputs", {}), ("outputs", {"lines": [{"check": "a", "ok": 1, "found": "b"}]}), ("steps", {"fooled": [True]})],
)
def test_damaged_checks_are_refused(name, content, best, tmp_path, monkeypatch):
    argv = ["--attack", "pgd", "--n-images", "10", "--sanity-images", "10", "--n-steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(results, "merge", None)
        with pytest.raises(TypeError):
            run(best, tmp_path, *argv)
    (tmp_path / "result.parts" / f"sanity-{name}.json").write_text(json.dumps(content))
    with pytest.raises(cli.UserError, match=f"sanity-{name}.json: damaged"):
        run(best, tmp_path, *argv)


def test_normalisation_of_own_and_of_other_files(best, tmp_path, monkeypatch):
    """--mean and --std are of files of others; a mean that lies in such a file must be the one in force."""
    argv = ["--checkpoint", best, "--model", "wrn-10-1", "--mean", "0", "--attack", "clean", "--out", str(tmp_path / "r.json")]
    with pytest.raises(cli.UserError, match="--mean, --std: .* is of this project"):
        evaluate.main(evaluate.parse_args(argv))
    spec = data.DATASETS["digits"]
    weights = models.build("wrn-10-1", spec).state_dict()
    path = tmp_path / "theirs.pt"
    argv = ["--checkpoint", str(path), "--model", "wrn-10-1", "--attack", "clean", "--out", str(tmp_path / "r.json")]
    for value, flags, fits in ((0.5, [], False), (0.5, ["--mean", "0.5"], True), (spec.mean[0], [], True)):
        torch.save(weights | {"mean": torch.full((1, 1, 1), value)}, path)
        args = evaluate.parse_args([*argv, *flags])
        if fits:
            assert evaluate.load_model(args, spec, "cpu")[0].model.mean.item() == pytest.approx(value)
        else:
            with pytest.raises(cli.UserError, match=r"normalises by a mean of \[0.5\], expected"):
                evaluate.load_model(args, spec, "cpu")


def test_a_compiled_model_is_evaluated(best, tmp_path, monkeypatch):
    """--compile wraps the model; what the compiler makes of it is test_switches.py's."""
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model if dynamic else None)
    result, _ = run(best, tmp_path, "--attack", "pgd", "--n-images", "10", "--n-steps", "1", "--compile")
    assert result["compile"] is True


def test_the_resnet_of_autoattacks_example(tmp_path, monkeypatch):
    """The weights in pyautoattack's package, on files of CIFAR-10's format: the logits of the class that lies beside them."""
    folder = Path(importlib.util.find_spec("pyautoattack").submodule_search_locations[0]) / "examples"
    found = importlib.util.spec_from_file_location("resnet", folder / "resnet.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    theirs = module.ResNet18().eval()
    theirs.load_state_dict(torch.load(folder / "model_test.pt", weights_only=True, map_location="cpu"))
    cifar = data.DATASETS["cifar10"]
    write_cifar(cifar, tmp_path)
    trust_cifar(cifar, tmp_path, monkeypatch)
    argv = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--checkpoint", str(folder / "model_test.pt"), "--model", "resnet-18"]
    args = evaluate.parse_args([*argv, "--mean", "0", "--std", "1", "--attack", "clean", "--out", str(tmp_path / "r.json")])
    model, settings, trained = evaluate.load_model(args, cifar, "cpu")
    images, labels = data.load_test(cifar, str(tmp_path))
    x = data.to_x(images)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), theirs.to(memory_format=torch.channels_last)(x))
        correct = int((theirs(x).argmax(1).numpy() == labels).sum())
    evaluate.main(args)
    assert json.loads((tmp_path / "r.json").read_text())["clean_correct"] == correct
    normalised = evaluate.load_model(evaluate.parse_args(argv), cifar, "cpu")[0]
    assert not torch.allclose(normalised(x), model(x), atol=0.1)  # the data set's mean and deviation are another model


@pytest.fixture
def claimed(tmp_path):
    """A run of train_at.py on CIFAR-10, as if it had been evaluated by AutoAttack standard on all 10,000 test images."""
    cifar = data.DATASETS["cifar10"]
    run = tmp_path / "my_run"
    model = models.build("wrn-16-1", cifar)
    weights = models.portable(model, "wrn-16-1", cifar) | {"norm": "linf", "eps": 8 / 255}
    checkpoint.save(weights, run / "best.pt")
    checkpoint.write_json({"synthetic": None}, run / "args.json")
    path = evaluate.result_path(
        evaluate.parse_args(["--dataset", "cifar10", "--checkpoint", str(run / "best.pt"), "--attack", "autoattack"]), 8 / 255
    )
    result = {"norm": "linf", "eps": 8 / 255, "attack": "autoattack", "attack_name": "AutoAttack standard", "n": 10_000}
    result |= {"clean": 0.92438, "robust": 0.6731, "warnings": [], "checkpoint_sha256": checkpoint.sha256(run / "best.pt")}
    result |= {"sanity_images": 100, "image_list_sha256": None}
    checkpoint.write_json(result, path)
    return run, model, path, result


def test_export_loads_strictly_in_robustbench(claimed, tmp_path, capsys):
    run, model, path, result = claimed
    argv = ["--dataset", "cifar10", "--checkpoint", str(run / "best.pt"), "--attack", "autoattack", "--export", "robustbench"]
    evaluate.main(evaluate.parse_args(argv))
    stem = run / "robustbench" / "cifar10" / "Linf" / "my_run"
    cifar = data.DATASETS["cifar10"]
    theirs = robustbench_class("DMWideResNet")(depth=16, width=1, activation_fn=nn.SiLU, mean=cifar.mean, std=cifar.std).eval()
    theirs.load_state_dict(torch.load(f"{stem}.pt"), strict=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    claim = json.loads(Path(f"{stem}.json").read_text())
    assert claim | {"additional_data": False, "number_forward_passes": 1, "eps": "8/255", "architecture": "WideResNet-16-1"} == claim
    assert (claim["clean_acc"], claim["autoattack_acc"], claim["footnote"], claim["unreliable"]) == ("92.44", "67.31", None, False)
    np.savez(tmp_path / "s.npz", image=np.zeros((3000, 32, 32, 3), np.uint8), label=np.zeros(3000, np.int64))
    checkpoint.write_json({"synthetic": [str(tmp_path / "s.npz")]}, run / "args.json")
    checkpoint.write_json(result | {"warnings": ["check failed"]}, path)
    evaluate.main(evaluate.parse_args(argv))
    claim = json.loads(Path(f"{stem}.json").read_text())
    assert (
        claim["footnote"] == "It uses additional 3k synthetic images in training." and claim["unreliable"] and not claim["additional_data"]
    )
    checkpoint.write_json({"synthetic": None, "init": "other.pt", "teacher": "out/diffusion"}, run / "args.json")
    evaluate.main(evaluate.parse_args(argv))
    assert json.loads(Path(f"{stem}.json").read_text())["additional_data"] is None
    printed = capsys.readouterr().out
    assert "fill in: link, name, authors, additional_data, venue" in printed and "additional_data: true, if the diffusion" in printed
    assert robustbench.amount(20_000_000) == "20M" and robustbench.amount(1_500_000) == "1.5M"


@pytest.mark.parametrize(
    "change,match",
    [
        ({"n": 1000}, "on 1000 images, expected AutoAttack standard on 10000"),
        ({"attack": "apgd", "attack_name": "APGD-CE+T"}, "is APGD-CE.T on 10000"),
        ({"eps": 0.1}, "0.1 is on no leaderboard"),
        ({"checkpoint_sha256": "x"}, "of this very checkpoint"),
        ({"sanity_images": 0}, "lacks sanity checks"),
    ],
)
def test_claims_that_nobody_could_accept_are_refused(change, match, claimed):
    run, _, path, result = claimed
    checkpoint.write_json(result | change, path)
    with pytest.raises(cli.UserError, match=match):
        robustbench.export(str(run / "best.pt"), "cifar10", [path])
    assert not (run / "robustbench").exists()


@pytest.mark.parametrize("norm,eps", [("linf", 8 / 255), ("l2", 0.5), ("l1", 12.0)])
def test_rgb_images_are_attacked(norm, eps, tmp_path, monkeypatch):
    """Three channels, read as evaluate.py reads them (channels last), through APGD, Square and every check."""
    import pyautoattack.fab_pt
    import pyautoattack.square

    cifar = data.DATASETS["cifar10"]
    write_cifar(cifar, tmp_path)
    trust_cifar(cifar, tmp_path, monkeypatch)
    model = models.build("wrn-10-1", cifar)
    checkpoint.save(models.portable(model, "wrn-10-1", cifar) | {"norm": "linf", "eps": 8 / 255}, tmp_path / "best.pt")
    images, _ = data.load_test(cifar, str(tmp_path))
    with torch.no_grad():
        labels = model.eval()(data.to_x(images)).argmax(1).numpy()
    monkeypatch.setattr(data, "load_test", lambda *args: (images, labels))
    attack, single = autoattack.attack, pyautoattack.square.SquareAttack.attack_single_run

    def short(self, x, y):
        self.n_queries = 30
        return single(self, x, y)

    monkeypatch.setattr(pyautoattack.square.SquareAttack, "attack_single_run", short)
    monkeypatch.setattr(autoattack, "attack", lambda name, *args, **kw: attack(name, *args, **kw | {"eps": kw["eps"] * 1e-3}))
    argv = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--checkpoint", str(tmp_path / "best.pt"), "--attack", "autoattack"]
    argv += ["--norm", norm, "--eps", str(eps), "--n-images", "2", "--sanity-images", "2", "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(pyautoattack.fab_pt.FABAttack_PT, "perturb", lambda self, x, y: x)
    evaluate.main(evaluate.parse_args(argv))
    assert json.loads((tmp_path / "r.json").read_text())["clean"] == 1
