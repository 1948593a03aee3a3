"""Classifiers made of a diffusion model, against slow formulae.

Alone: python -m pytest tests/teachers/test_classifier.py
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS

import evaluate
import extract_features
from analysis import metrics
from common import UserError, data, files
from evaluation import sanity
from published.datasets import DATASETS
from teachers import classifier
from teachers.load import load_diffusion


@pytest.fixture
def network(diffusion_dir):
    return load_diffusion(diffusion_dir, "cpu")


def digits(n):
    images, labels = data.load_test(DIGITS, None)
    return data.to_x(images[:n]), torch.from_numpy(labels[:n])


def make_classifier(network, n_noise, fresh=False, seed=0, keep_classes=None):
    model = classifier.DiffusionClassifier(network, n_noise, fresh, seed, keep_classes)
    return model.eval().requires_grad_(False)


def count_images(network, monkeypatch):
    """A list that grows by the number of images of every network call."""
    calls = []
    denoise = network.denoise

    def counted(noisy, *args):
        calls.append(len(noisy))
        return denoise(noisy, *args)

    monkeypatch.setattr(network, "denoise", counted)
    return calls


# ---------------------------------------------------------------------------- DiffusionClassifier


def slow_logits(model, x):
    """One image, class and draw at a time, in float64."""
    n = len(model.noise)
    known = [math.exp(math.log(0.1) + i / (n - 1) * math.log(30)) for i in range(n)]
    logits = torch.zeros(len(x), 10, dtype=torch.float64)
    for j, image in enumerate(x):
        clean = (2 * image - 1)[None]
        for c in range(10):
            errors = []
            for level, noise in zip(model.levels, model.noise):
                assert min(abs(level - sigma) for sigma in known) < 1e-5
                noisy = clean + level * noise[None]
                denoised = model.diffusion.denoise(noisy, level, torch.tensor([c]))
                errors.append(((denoised - clean).double() ** 2).mean() / level**2)
            logits[j, c] = -math.log(30) * torch.stack(errors).mean()
    return logits


@pytest.mark.parametrize("n_noise", [5, 8])
def test_logits_are_the_weighted_denoising_errors(network, n_noise):
    model = make_classifier(network, n_noise)
    x, _ = digits(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), slow_logits(model, x), rtol=1e-4, atol=1e-3)
    expected = [0.1 * 30 ** (i / (n_noise - 1)) for i in range(n_noise)]
    assert sorted(model.levels) == pytest.approx(expected, rel=1e-5)


def test_gradients_go_all_the_way(network, monkeypatch):
    """Recomputed gradients are those of the plain sum, and agree with finite differences."""
    model = make_classifier(network, 4)
    x, y = digits(4)
    x = x.clone().requires_grad_(True)

    def loss(x):
        return F.cross_entropy(model(x), y, reduction="sum")

    (gradient,) = torch.autograd.grad(loss(x), x)

    def not_recomputed(call, *args, use_reentrant):
        return call(*args)

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "recompute", not_recomputed)
        (plain,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        up = loss(x + 1e-2 * direction).double()
        down = loss(x - 1e-2 * direction).double()
    expected = ((up - down) / 2e-2).item()
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=2e-2)


def test_calls_are_split_over_classes(network, monkeypatch):
    model = make_classifier(network, 2)
    x, _ = digits(6)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(classifier, "MAX_CALL", 20)  # three classes of six images a call
        calls = count_images(network, monkeypatch)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert calls == [18, 18, 18, 6] * 2


def test_pruning_keeps_the_best_and_their_logits(network, monkeypatch):
    """The two best classes after the first quarter end with their full logits, the others below
    them and in order.
    """
    full = make_classifier(network, 8)
    pruned = make_classifier(network, 8, keep_classes=2)
    first = make_classifier(network, 8)
    first.levels = first.levels[: first.n_first]
    assert first.n_first == 2
    x, _ = digits(5)
    with torch.no_grad():
        expected = full(x)
        early = first(x)
        calls = count_images(network, monkeypatch)
        logits = pruned(x)
    assert calls == [50, 50] + [10] * 6
    kept = early.topk(2).indices
    torch.testing.assert_close(
        logits.gather(1, kept), expected.gather(1, kept), rtol=1e-4, atol=1e-3
    )
    for row, kept_of_row in zip(logits, kept):
        others = [c for c in range(10) if c not in kept_of_row.tolist()]
        assert row[others].max() < row[kept_of_row].min()
    order = logits.argsort(1, descending=True)
    assert torch.equal(order[:, 2:], early.argsort(1, descending=True)[:, 2:])


def test_fixed_noise_is_a_function_and_fresh_noise_is_not(network):
    x, _ = digits(3)
    with torch.no_grad():
        fixed = make_classifier(network, 2)
        assert torch.equal(fixed(x), fixed(x))
        assert torch.allclose(fixed(x)[:1], fixed(x[:1]), atol=1e-3)
        other_seed = make_classifier(network, 2, seed=1)
        assert not torch.allclose(fixed(x), other_seed(x), atol=1e-3)
        fresh = make_classifier(network, 2, fresh=True)
        assert not torch.allclose(fresh(x), fresh(x), atol=1e-3)


# ---------------------------------------------------------------------------------- DiffusionHead


def extract(argv, out):
    extract_features.main(extract_features.parse_args([*argv, "--out-dir", str(out)]))


def evaluate_to(path, argv):
    """The result of evaluate.py, a dict."""
    evaluate.main(evaluate.parse_args([*argv, "--out", str(path)]))
    return json.loads(path.read_text())


def test_head_is_the_probe_end_to_end(diffusion_dir, network, tmp_path):
    """Its logits are the probe's on averaged features, and its gradient reaches the image."""
    features_dir = tmp_path / "features"
    head_path = str(tmp_path / "head.pt")
    argv = ["--diffusion", diffusion_dir, "--blocks", "mid_block", "--sigmas", "0.1"]
    extract([*argv, "--save-head", head_path], features_dir)
    head = files.load(head_path, classifier.HEAD)
    weight, bias = head["weight"], head["bias"]
    val = torch.from_numpy(np.load(features_dir / "val-mid_block-sigma0.1.npy"))[:, 0]
    labels = np.load(features_dir / "val-labels.npy")
    predicted = (val @ weight.T + bias).argmax(1).numpy()
    assert head["val_accuracy"] == (predicted == labels).mean() > 0.3

    model = classifier.DiffusionHead(network, 3, False, 0, "mid_block", 0.1, weight, bias).eval()
    x, _ = digits(4)
    x.requires_grad_(True)
    features = [network.features(x, 0.1, None, ["mid_block"], n[None])[0] for n in model.noise]
    expected = torch.stack(features).mean(0) @ weight.T + bias
    torch.testing.assert_close(model(x), expected)
    (gradient,) = torch.autograd.grad((model(x) ** 2).sum(), x)
    (plain,) = torch.autograd.grad((expected**2).sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
    assert gradient.abs().amax((1, 2, 3)).min() > 0

    argv = ["--model", "diffusion-head", "--teacher", diffusion_dir, "--checkpoint", head_path]
    result = evaluate_to(tmp_path / "r.json", [*argv, "--n-noise", "2", "--attack", "clean"])
    assert result["clean"] > 0.3


def test_heads_of_other_networks_are_refused(network, tmp_path):
    path = str(tmp_path / "head.pt")
    head = {
        "dataset": "digits",
        "network_sha256": network.sha256,
        "precision": "fp32",
        "block": "mid_block",
        "sigma": 0.1,
        "val_accuracy": 0.5,
        "weight": torch.zeros(10, 16),
        "bias": torch.zeros(10),
    }

    def load():
        return classifier.load("diffusion-head", network, DIGITS, path, n_noise=2)

    files.save(head, path)
    x, _ = digits(2)
    assert torch.equal(load()(x), torch.zeros(2, 10))
    for change, match in (
        ({"network_sha256": "x"}, "on another diffusion network"),
        ({"precision": "bf16"}, "a head on features in bf16; the network is in fp32, see --precis"),
        ({"dataset": "cifar10"}, "a head for cifar10, expected one for digits"),
        ({"block": "nowhere"}, "no block 'nowhere'"),
        ({"weight": 3}, "'weight' is missing or no Tensor"),
        ({"weight": torch.zeros(10, 5)}, "not a head for this network"),
        ({"weight": torch.zeros(10)}, "not a head for this network"),
        ({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)}, "3 classes, digits has 10"),
        ({"bias": torch.full((10,), torch.nan)}, "not finite"),
    ):
        files.save(head | change, path)
        with pytest.raises(UserError, match=match):
            load()


def test_networks_for_other_data_are_refused(network):
    cifar10 = DATASETS["cifar10"]
    with pytest.raises(UserError, match=f"^{network.name}: images of 1 channels, cifar10 has 3"):
        classifier.load("diffusion-classifier", network, cifar10, n_noise=2)


# ----------------------------------------------------------------------------------- in the scripts


def test_a_diffusion_classifier_is_evaluated_like_any_other(diffusion_dir, tmp_path):
    argv = ["--model", "diffusion-classifier", "--teacher", diffusion_dir, "--n-noise", "2"]
    argv += ["--n-images", "8", "--batch-size", "8", "--sanity-images", "4", "--eps", "0.01"]
    argv += ["--attack", "pgd", "--n-steps", "2", "--n-restarts", "1"]
    fixed = evaluate_to(tmp_path / "fixed.json", argv)
    assert evaluate_to(tmp_path / "fixed.json", argv) == fixed  # finished: it is read again
    fresh = evaluate_to(tmp_path / "fresh.json", [*argv, "--fresh-noise", "--eot", "2"])
    assert fixed["teacher_sha256"] and fixed["n_noise"] == 2 and fixed["checkpoint_sha256"] is None
    fixed_checks = {line["check"]: line["ok"] for line in fixed["sanity"]}
    fresh_checks = {line["check"]: line["ok"] for line in fresh["sanity"]}
    assert fixed_checks[sanity.DETERMINISTIC]
    assert fresh_checks[sanity.RANDOM]
    only_fixed = fixed_checks.keys() - fresh_checks.keys()
    assert "APGD-CE of 300 steps fools hardly any more" in only_fixed


def test_probes_are_attacked_end_to_end(diffusion_dir, tmp_path, capsys):
    """Under attack no probe is better than without; a tiny radius changes nothing, a large one
    leaves none.
    """
    out = tmp_path / "features"
    argv = ["--diffusion", diffusion_dir, "--blocks", "mid_block", "up_blocks.0.resnets.0"]
    argv += ["--sigmas", "0.1", "--n-draws", "2", "--probe", "--n-attacked", "200"]
    extract([*argv, "--eps", "1e-6"], out)
    tiny = json.loads((out / "probe.json").read_text())
    extract([*argv, "--eps", "0.4"], out)
    large = json.loads((out / "probe.json").read_text())
    clean = np.array(large["accuracy"])
    assert clean.shape == (2, 1)
    assert np.abs(np.array(tiny["attacked"]) - clean).max() < 0.01  # under the very draws
    assert np.max(large["attacked"]) < 0.02
    # Of both draws of an image the probe has seen the image's label.
    labels = {split: np.load(out / f"{split}-labels.npy") for split in ("train", "val")}
    features = {s: np.load(out / f"{s}-mid_block-sigma0.1.npy") for s in labels}
    both = np.concatenate([features["train"][:, 0], features["train"][:, 1]])
    weight, bias = metrics.fit_linear(both, np.tile(labels["train"], 2), 10)
    predicted = (features["val"].mean(1) @ weight.numpy().T + bias.numpy()).argmax(1)
    assert clean[0, 0] == pytest.approx((predicted == labels["val"]).mean(), abs=0.02)
    assert clean.min() > 0.3
    assert "under attack, linf 0.4, first 200 images" in capsys.readouterr().out
    assert (out / "probe.png").read_bytes()[:4] == b"\x89PNG"
