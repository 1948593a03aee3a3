"""Classifiers made of a diffusion model, against slow formulae. Alone: python -m pytest tests/test_generative.py"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import DIGITS

import evaluate
import extract_features
from common import checkpoint, cli, data, diffusion, generative, sanity


@pytest.fixture
def network(diffusion_dir):
    return diffusion.load_diffusion(diffusion_dir, "cpu")


def digits(n):
    images, labels = data.load_test(DIGITS, None)
    return data.to_x(images[:n]), torch.from_numpy(labels[:n])


def slow_logits(model, x):
    """One image, class and draw at a time, in float64."""
    levels = [math.exp(math.log(0.1) + i / (len(model.noise) - 1) * math.log(30)) for i in range(len(model.noise))]
    logits = torch.zeros(len(x), 10, dtype=torch.float64)
    for j, image in enumerate(x):
        clean = (2 * image - 1)[None]
        for c in range(10):
            errors = []
            for place, noise in enumerate(model.noise):
                level = model.levels[place]
                assert min(abs(level - known) for known in levels) < 1e-5
                denoised = model.diffusion.denoise(clean + level * noise[None], level, torch.tensor([c]))
                errors.append(((denoised - clean).double() ** 2).mean() / level**2)
            logits[j, c] = -math.log(30) * torch.stack(errors).mean()
    return logits


@pytest.mark.parametrize("n_noise", [5, 8])
def test_logits_are_the_weighted_denoising_errors(network, n_noise):
    model = generative.DiffusionClassifier(network, n_noise, False, 0).eval()
    x, _ = digits(3)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), slow_logits(model, x), rtol=1e-4, atol=1e-3)
    assert sorted(model.levels) == pytest.approx([0.1 * 30 ** (i / (n_noise - 1)) for i in range(n_noise)], rel=1e-5)


def test_gradients_go_all_the_way(network):
    """Recomputed gradients are those of the plain sum, and the directional derivative is that of finite differences."""
    model = generative.DiffusionClassifier(network, 4, False, 0).eval().requires_grad_(False)
    x, y = digits(4)
    x = x.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    original, generative.recompute = generative.recompute, lambda call, *args, use_reentrant: call(*args)
    try:
        (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y, reduction="sum"), x)
    finally:
        generative.recompute = original
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        up, down = (torch.nn.functional.cross_entropy(model(x + s * 1e-2 * direction), y, reduction="sum").double() for s in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 2e-2).item(), rel=2e-2)


def test_calls_are_split_over_classes(network, monkeypatch):
    model = generative.DiffusionClassifier(network, 2, False, 0).eval()
    x, _ = digits(6)
    with torch.no_grad():
        whole = model(x)
        monkeypatch.setattr(generative, "MAX_CALL", 20)  # three classes of six images a call
        sizes, denoise = [], network.denoise
        monkeypatch.setattr(network, "denoise", lambda noisy, *args: (sizes.append(len(noisy)), denoise(noisy, *args))[1])
        torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-4)
    assert sizes == [18, 18, 18, 6] * 2


def test_pruning_keeps_the_best_and_their_logits(network):
    """The two best classes after the first quarter go on and end with their full logits; the others end below, in order."""
    full = generative.DiffusionClassifier(network, 8, False, 0).eval()
    pruned = generative.DiffusionClassifier(network, 8, False, 0, keep_classes=2).eval()
    first = generative.DiffusionClassifier(network, 8, False, 0).eval()
    first.levels = first.levels[: first.n_first]
    x, _ = digits(5)
    calls = []
    denoise = network.denoise
    with torch.no_grad():
        logits, early = full(x), first(x)
        network.denoise = lambda noisy, *args: (calls.append(len(noisy)), denoise(noisy, *args))[1]
        found = pruned(x)
    assert calls == [50, 50] + [10] * 6 and first.n_first == 2
    kept = early.topk(2).indices
    torch.testing.assert_close(found.gather(1, kept), logits.gather(1, kept), rtol=1e-4, atol=1e-3)
    for row, names in zip(found, kept):
        others = [c for c in range(10) if c not in names.tolist()]
        assert row[others].max() < row[names].min()
    assert torch.equal(torch.stack([row.argsort(descending=True)[2:] for row in found]), early.argsort(1, descending=True)[:, 2:])


def test_fixed_noise_is_a_function_and_fresh_noise_is_not(network):
    x, _ = digits(3)
    with torch.no_grad():
        fixed = generative.DiffusionClassifier(network, 2, False, 0).eval()
        assert torch.equal(fixed(x), fixed(x)) and torch.allclose(fixed(x)[:1], fixed(x[:1]), atol=1e-3)
        assert not torch.allclose(fixed(x), generative.DiffusionClassifier(network, 2, False, 1).eval()(x), atol=1e-3)
        fresh = generative.DiffusionClassifier(network, 2, True, 0).eval()
        assert not torch.allclose(fresh(x), fresh(x), atol=1e-3)


def test_a_diffusion_classifier_is_evaluated_like_any_other(diffusion_dir, tmp_path):
    argv = ["--model", "diffusion-classifier", "--teacher", diffusion_dir, "--n-noise", "2", "--n-images", "8", "--batch-size", "8"]
    argv += ["--attack", "pgd", "--n-steps", "2", "--n-restarts", "1", "--sanity-images", "4", "--eps", "0.01"]
    monkey = {"fixed": [], "fresh": ["--fresh-noise", "--eot", "2"]}
    for name, more in monkey.items():
        evaluate.main(evaluate.parse_args([*argv, *more, "--out", str(tmp_path / f"{name}.json")]))
    fixed, fresh = (json.loads((tmp_path / f"{name}.json").read_text()) for name in monkey)
    checks = [{line["check"]: line["ok"] for line in result["sanity"]} for result in (fixed, fresh)]
    assert checks[0][sanity.DETERMINISTIC] and checks[1][sanity.RANDOM]
    assert "APGD-CE of 300 steps fools hardly any more" in checks[0].keys() - checks[1].keys()
    assert fixed["teacher_sha256"] and fixed["n_noise"] == 2 and fixed["checkpoint_sha256"] is None


def test_head_is_the_probe_end_to_end(diffusion_dir, network, tmp_path):
    """The head's logits are those of the probe on averaged features, and its gradient, recomputed, reaches the image."""
    argv = ["--diffusion", diffusion_dir, "--blocks", "mid_block", "--sigmas", "0.1", "--out-dir", str(tmp_path / "features")]
    extract_features.main(extract_features.parse_args([*argv, "--save-head", str(tmp_path / "head.pt")]))
    head = checkpoint.load(tmp_path / "head.pt", generative.HEAD)
    val, labels = (np.load(tmp_path / "features" / f"val-{name}.npy") for name in ("mid_block-sigma0.1", "labels"))
    predicted = (torch.from_numpy(val[:, 0]) @ head["weight"].T + head["bias"]).argmax(1).numpy()
    assert head["val_accuracy"] == (predicted == labels).mean() > 0.3
    model = generative.DiffusionHead(network, 3, False, 0, "mid_block", 0.1, head["weight"], head["bias"]).eval()
    x, _ = digits(4)
    x.requires_grad_(True)
    expected = torch.stack([network.features(x, 0.1, None, ["mid_block"], n[None])[0] for n in model.noise]).mean(0)
    torch.testing.assert_close(model(x), expected @ head["weight"].T + head["bias"])
    (gradient,) = torch.autograd.grad((model(x) ** 2).sum(), x)
    (plain,) = torch.autograd.grad(((expected @ head["weight"].T + head["bias"]) ** 2).sum(), x)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    argv = ["--model", "diffusion-head", "--teacher", diffusion_dir, "--checkpoint", str(tmp_path / "head.pt"), "--n-noise", "2"]
    evaluate.main(evaluate.parse_args([*argv, "--attack", "clean", "--out", str(tmp_path / "r.json")]))
    assert json.loads((tmp_path / "r.json").read_text())["clean"] > 0.3


def test_probes_are_attacked_end_to_end(diffusion_dir, tmp_path, capsys):
    """Under attack no probe is better than without; a tiny radius changes nothing, a large one leaves none; one table per map."""
    argv = ["--diffusion", diffusion_dir, "--blocks", "mid_block", "up_blocks.0.resnets.0", "--sigmas", "0.1", "--n-draws", "2", "--probe"]
    argv += ["--n-attacked", "200", "--out-dir", str(tmp_path / "features")]
    found = {}
    for eps in ("1e-6", "0.4"):
        extract_features.main(extract_features.parse_args([*argv, "--eps", eps]))
        found[eps] = json.loads((tmp_path / "features" / "probe.json").read_text())
    clean = np.array(found["0.4"]["accuracy"])
    assert clean.shape == (2, 1) and np.abs(np.array(found["1e-6"]["attacked"]) - clean).max() < 0.01  # the very draws
    assert np.max(found["0.4"]["attacked"]) < 0.02 < clean.min()
    assert "under attack, linf 0.4, first 200 images" in capsys.readouterr().out
    assert (tmp_path / "features" / "probe.png").read_bytes()[:4] == b"\x89PNG"


def test_heads_of_other_networks_are_refused(diffusion_dir, network, tmp_path):
    head = {"dataset": "digits", "network_sha256": network.sha256, "block": "mid_block", "sigma": 0.1, "val_accuracy": 0.5}
    head |= {"weight": torch.zeros(10, 16), "bias": torch.zeros(10)}
    path = str(tmp_path / "head.pt")
    argv = ["--model", "diffusion-head", "--teacher", diffusion_dir, "--checkpoint", path, "--attack", "clean"]
    for change, match in (
        ({"network_sha256": ["x"]}, "on another diffusion network"),
        ({"dataset": "cifar10"}, "a head for cifar10"),
        ({"block": "nowhere"}, "nowhere"),
        ({"weight": 3}, "'weight' is missing or no Tensor"),
        ({"weight": torch.zeros(10, 5)}, "does not fit"),
        ({"bias": torch.full((10,), torch.nan)}, "not finite"),
    ):
        checkpoint.save(head | change, path)
        with pytest.raises(cli.UserError, match=match):
            evaluate.main(evaluate.parse_args(argv))
