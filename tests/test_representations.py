"""Metrics of features against slow float64 formulae and known answers. Alone: python -m pytest tests/test_representations.py"""

import json
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, python
from scipy.stats import ortho_group

import analyze
import train_at
from common import checkpoint, cli, data, models, representations
from common.representations import N_GROUPS
from runs import claims

ALL = np.arange(N_GROUPS)


def gaussian(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def values_of(features, groups=ALL):
    return representations.singular_values(representations.moments(features), groups)


# ------------------------------------------------------------------------------------------------------------- intervals


def test_halves_of_the_groups_cover_the_mean():
    """95 % nominal, over 300 samples of 640 numbers; and the estimate is the mean of all."""
    inside, n_trials = 0, 300
    for trial in range(n_trials):
        x = np.random.default_rng(trial).exponential(size=640)
        sums = representations.by_group([x])
        value, low, high = representations.half_samples(lambda groups, sums=sums: representations.means(sums, groups)[0])
        assert value == pytest.approx(x.mean())
        inside += low <= 1 <= high
    assert 0.91 <= inside / n_trials <= 0.985


def test_interval_over_seeds_is_students():
    rows = [{"a": [value, 0, 0]} for value in (1.0, 2.0, 4.0)]
    mean, low, high = representations.interval(rows, "a")
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-5)
    assert representations.interval(rows[:1], "a") == [1.0, 0, 0] and representations.interval(rows, "b") is None


# ------------------------------------------------------------------------------------------------------------------ rank


def test_singular_values_of_any_groups_are_those_of_the_centred_matrix():
    features = (gaussian(200, 12) @ gaussian(12, 12, 1) + 5).astype(np.float32)
    for groups in (ALL, np.array([3, 8, 30])):
        rows = np.concatenate([features[g::N_GROUPS] for g in groups]).astype(np.float64)
        expected = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        np.testing.assert_allclose(values_of(features, groups), expected[: min(len(rows), 12)], rtol=1e-6, atol=1e-5)


def test_ranks_of_known_spectra():
    """Equal values: the dimension. A subspace of 5 dimensions: 5. An isotropic Gaussian: nearly its dimension. s = (2, 1): by hand."""
    assert representations.rank_me(np.ones(20)) == pytest.approx(20, rel=1e-4) and representations.stable_rank(np.ones(20)) == 20
    q = ortho_group.rvs(30, random_state=0)[:5]
    planted = values_of(gaussian(20_000, 5) @ q)
    assert representations.rank_me(planted) == pytest.approx(5, rel=2e-3) and representations.stable_rank(planted) == pytest.approx(
        5, rel=0.05
    )
    assert representations.rank_me(values_of(gaussian(20_000, 30))) == pytest.approx(30, rel=2e-3)
    by_hand = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert representations.rank_me(np.array([2.0, 1.0])) == pytest.approx(by_hand, rel=1e-5)
    assert representations.stable_rank(np.array([2.0, 1.0])) == 1.25


# -------------------------------------------------------------------------------------------------- alignment, uniformity, CKA


def test_alignment_and_uniformity_against_slow_sums():
    a, b = gaussian(70, 6), gaussian(70, 6, 1)
    unit_a, unit_b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    np.testing.assert_allclose(representations.squared_distances(a, b), [((x - y) ** 2).sum() for x, y in zip(unit_a, unit_b)])
    assert representations.squared_distances(a, 3 * a).max() < 1e-12
    for groups in (ALL, np.array([0, 5, 9])):
        rows = np.concatenate([unit_a[g::N_GROUPS] for g in groups])
        assert representations.uniformity(representations.kernel_sums(a), groups) == pytest.approx(slow_uniformity(rows))
    a[:20] = unit_a[:20] = 0  # a dead feature vector stays zero
    assert representations.uniformity(representations.kernel_sums(a), ALL) == pytest.approx(slow_uniformity(unit_a))


def slow_uniformity(rows):
    pairs = [math.exp(-2 * ((x - y) ** 2).sum()) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
    return math.log(np.mean(pairs))


def test_uniformity_of_the_circle():
    """Points spread evenly on it: log of the mean of exp(4 (cos t - 1)), which is e^-4 I_0(4); coinciding points: 0."""
    angle = np.linspace(0, 2 * np.pi, 4001)[:-1]
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    expected = math.log(math.exp(-4) * np.i0(4.0))
    assert representations.uniformity(representations.kernel_sums(circle), ALL) == pytest.approx(expected, abs=2e-3)
    assert representations.uniformity(representations.kernel_sums(np.ones((64, 3))), ALL) == pytest.approx(0)


def similarity(a, b, groups=ALL):
    return representations.cka(representations.moments(a), representations.moments(b), representations.moments(a, b), groups)


def test_cka_is_the_formula_and_ignores_rotation_and_scale():
    a, b = gaussian(90, 8) + 3, np.tanh(gaussian(90, 8)) @ gaussian(8, 5, 2)
    gram_a, gram_b = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (a, b))  # Hilbert-Schmidt form, from the kernels
    assert similarity(a, b) == pytest.approx((gram_a * gram_b).sum() / math.sqrt((gram_a**2).sum() * (gram_b**2).sum()))
    rotation = ortho_group.rvs(8, random_state=0)
    assert similarity(a, 7 * a @ rotation + 2) == pytest.approx(1)
    assert similarity(a @ rotation, b) == pytest.approx(similarity(a, b))
    assert similarity(a, a @ np.diag(10.0 ** np.arange(8))) < 0.9  # but not any linear map
    assert similarity(gaussian(20_000, 4), gaussian(20_000, 4, 1)) < 1e-3


# ----------------------------------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("cycles", [(0, 0), (3, 0), (2, 2), (4, 0), (0, 7)])
def test_spectrum_of_a_sinusoid_is_its_ring(cycles):
    size = 16
    j, i = np.meshgrid(np.arange(size), np.arange(size))
    wave = np.cos(2 * np.pi * (cycles[0] * i + cycles[1] * j) / size)
    curve = representations.spectrum(torch.from_numpy(np.stack([wave, 2 * wave]))[None].float())[0].numpy()
    ring = round(math.hypot(*cycles))
    assert curve.argmax() == ring and curve[ring] / curve.sum() > 0.999
    assert representations.high_share(curve, size) == pytest.approx(float(ring > 4), abs=1e-3)


def test_spectrum_against_a_slow_transform():
    x = gaussian(2 * 3 * 8 * 8, 1).reshape(2, 3, 8, 8)
    found = representations.spectrum(torch.from_numpy(x)).numpy()
    for image, curve in zip(x, found):
        sums, counts = np.zeros(len(curve)), np.zeros(len(curve))
        for u in range(8):
            for v in range(8):
                wave = np.exp(-2j * np.pi * (u * np.arange(8)[:, None] + v * np.arange(8)) / 8)
                ring = round(math.hypot(min(u, 8 - u), min(v, 8 - v)))
                sums[ring] += np.mean([abs((channel * wave).sum()) for channel in image])
                counts[ring] += 1
        np.testing.assert_allclose(curve, sums / counts, rtol=1e-10)
    white = representations.spectrum(torch.from_numpy(gaussian(500 * 64, 1).reshape(500, 1, 8, 8))).mean(0)
    assert white[1:5].max() / white[1:5].min() < 1.1  # white noise: flat


# -------------------------------------------------------------------------------------------- dimension, probe, autoencoder


def test_classification_dimension_of_a_planted_subspace():
    """The class is decided in 3 directions, which are the 4th to 6th by variance: 6 components are needed."""
    rng = np.random.default_rng(0)
    code = rng.standard_normal((4000, 3))
    labels = np.abs(code).argmax(1) * 2 + (code[np.arange(4000), np.abs(code).argmax(1)] > 0)
    basis = ortho_group.rvs(10, random_state=0)
    scales = np.array([9, 8, 7, 3, 2.5, 2, 0.1, 0.1, 0.1, 0.1])
    coordinates = np.concatenate([rng.standard_normal((4000, 3)), code, rng.standard_normal((4000, 4))], 1) * scales
    features = coordinates @ basis + 1
    heads = np.zeros((6, 10))
    for k in range(6):
        heads[k, 3 + k // 2] = (1 if k % 2 else -1) / scales[3 + k // 2]
    weight = heads @ basis
    bias = -weight @ np.ones(10)
    found, mean = representations.principal_components(features)
    counts = representations.dimension_counts(features, labels, weight, bias, found, mean)
    assert counts.shape == (N_GROUPS, 11) and representations.classification_dimension(counts, ALL) == 6
    for k in (0, 5, 10):  # by projecting the features
        kept = found[:, :k] @ found[:, :k].T
        predicted = (((features - mean) @ kept + mean) @ weight.T + bias).argmax(1)
        assert counts[:, k].sum() == (predicted == labels).sum()
    assert counts[:, 10].sum() > 3950 and counts[:, 3].sum() < 2000


@pytest.mark.parametrize("chunk", [64, 1000])
def test_linear_probe_is_scikit_learns(chunk):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, labels = data.load_test(DIGITS, None)
    features = images[:300].reshape(300, -1).astype(np.float32) * np.linspace(0.1, 10, 64, dtype=np.float32)  # a constant pixel among them
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-8)).fit(features, labels[:300])
    weight, bias = representations.fit_linear(features, labels[:300], 10, chunk=chunk)
    x = torch.from_numpy(images.reshape(len(images), -1) * np.linspace(0.1, 10, 64, dtype=np.float32)).double()
    ours = F.linear(x, weight.double(), bias.double()).numpy()
    np.testing.assert_allclose(F.softmax(torch.from_numpy(ours), 1).numpy(), theirs.predict_proba(x.numpy()), atol=2e-3)
    assert (ours.argmax(1) == theirs.predict(x.numpy())).mean() > 0.998


def planted_dictionary(n=4000):
    """Features that are sums of 2 of 24 directions in 16 dimensions, centred and of mean square 1."""
    rng = np.random.default_rng(0)
    atoms = F.normalize(torch.from_numpy(rng.standard_normal((24, 16))), dim=1).float()
    code = torch.zeros(n, 24).scatter(
        1, torch.from_numpy(np.stack([rng.permutation(24)[:2] for _ in range(n)])), torch.from_numpy(rng.uniform(0.5, 1.5, (n, 2))).float()
    )
    x = code @ atoms
    x = x - x.mean(0)
    return x / x.square().mean().sqrt(), atoms


def test_autoencoder_finds_a_planted_dictionary():
    x, atoms = planted_dictionary()
    sae = representations.train_sae(x, 48, 3, 3000, 0)
    found = (F.normalize(sae.decoder, dim=1) @ atoms.T).amax(0)
    assert (found > 0.9).float().mean() > 0.8, found
    with torch.no_grad():
        error = (sae(x) - x).square().mean()
        assert error < 0.15 and (sae.decoder.norm(dim=1) - 1).abs().max() < 1e-5
        assert ((representations.top(sae.latents(x), 3) != 0).sum(1) == 3).all()
    shuffled = x[:, torch.arange(16)].clone()
    for j in range(16):  # the same marginals without the structure
        shuffled[:, j] = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(j)), j]
    plain = representations.train_sae(shuffled, 48, 3, 1000, 0)
    with torch.no_grad():
        assert (plain(shuffled) - shuffled).square().mean() > 1.5 * error


def test_autoencoder_repeats_and_depends_on_its_seed():
    x, _ = planted_dictionary(500)
    runs = [representations.train_sae(x, 32, 3, 60, seed).decoder.detach() for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_dead_latents_learn_what_is_left():
    """Of the residual, dead latents explain more with the auxiliary loss than without: there they stay as they were drawn."""
    x, _ = planted_dictionary(1000)

    def left(**settings):
        sae = representations.train_sae(x, 512, 3, 600, 0, **settings)
        with torch.no_grad():
            latents = sae.latents(x)
            dead = ~(representations.top(latents, 3) > 0).any(0)
            residual = x - sae(x)
            explained = representations.top(latents.masked_fill(~dead, -torch.inf), 8) @ sae.decoder
            return dead.sum(), ((residual - explained).square().mean() / residual.square().mean()).item()

    (n_with, with_it), (n_without, without) = left(dead_after=20), left(dead_after=10**9)
    assert min(n_with, n_without) >= 8 and with_it < 0.5 * without, (with_it, without)


# -------------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    paths = []
    for seed in (0, 1):
        path = tmp_path_factory.mktemp("analyzed") / "run"
        argv = ["--epochs", "6", "--eval-every", "6", "--eval-n-steps", "1", "--n-steps", "1", "--seed", str(seed), "--out-dir", str(path)]
        train_at.main(train_at.parse_args(argv))
        paths.append(str(path / "best.pt"))
    return paths


SMALL = ["--n-images", "128", "--n-attacked", "64", "--sae-steps", "20", "--sae-seeds", "2", "--sae-latents", "32"]


def test_analyze_writes_tables_and_pictures_and_goes_on(trained, diffusion_dir, tmp_path, monkeypatch, capsys):
    argv = ["--model", f"at={trained[0]}", "--model", f"at={trained[1]}", "--model", f"one={trained[1]}", "--teacher", diffusion_dir]
    argv += ["--n-noise", "2", *SMALL, "--out-dir", str(tmp_path)]
    analyze.main(analyze.parse_args(argv))
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert [len(rows) for rows in result["models"].values()] == [2, 1, 1] and np.shape(result["cka"]["matrix"]) == (4, 4)
    assert result["cka"]["matrix"][1][2] == pytest.approx(1)  # the same checkpoint under two names
    half = np.array(result["cka"]["half_interval"])
    assert (half == half.T).all() and half[1, 2] == pytest.approx(0, abs=1e-6) and 0 < half[0, 3] < 0.5
    row, teacher = result["models"]["at"][0], result["models"]["teacher"][0]
    assert "alignment_draws" in teacher and "alignment_draws" not in row and teacher["sigma"] > 0
    assert 0 < teacher["alignment_draws"][0] < 1 and teacher["clean"][0] > 0.5
    assert len(set(row["sae_by_seed"])) == 2 and row["robust_third"][0] > row["robust"][0]
    for key in analyze.METRICS.keys() - {"alignment_draws"}:
        for found in (row, teacher):
            value, low, high = found[key]
            assert low <= value <= high and math.isfinite(high - low), key
    table = (tmp_path / "analysis.md").read_text()
    assert (
        table in capsys.readouterr().out and table.count("\n") == 5 + len(analyze.METRICS) and table.startswith("| | at | one | teacher |")
    )
    for name in ("rank", "spread", "frequencies", "sparseness", "dimension", "margin", "distance", "similarity", "embedding", "analysis"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG", name
    monkeypatch.setattr(analyze, "measure", None)
    analyze.main(analyze.parse_args(argv))  # nothing is computed again
    fewer = ["--model", f"x={trained[0]}", *SMALL, "--out-dir", str(tmp_path)]
    analyze.main(analyze.parse_args(fewer))
    assert json.loads((tmp_path / "analysis.json").read_text())["models"]["x"][0]["rank_me"] == row["rank_me"]


def test_memory_does_not_grow_with_the_images(trained, tmp_path):
    """Peak of what NumPy and Python allocate, with 16 times as many test images: their features alone would be 2 MB more."""
    args = analyze.parse_args(["--model", f"a={trained[0]}", *SMALL])
    model = models.load_classifier(trained[0], DIGITS, "cpu")[0]
    (images, labels), _ = data.load_train(DIGITS, None, 200)
    peaks = []
    for copies in (1, 16):
        many = np.tile(images[:512], (copies, 1, 1, 1)), np.tile(labels[:512], copies)
        tracemalloc.start()
        analyze.measure("a", model, ((images, np.arange(800), labels), many), args, "cpu", str(tmp_path / f"{copies}.npy"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6, peaks


def test_two_processes_analyze_as_one(trained, tmp_path):
    argv = ["--model", f"a={trained[0]}", "--model", f"a={trained[1]}", "--model", f"b={trained[0]}", *SMALL]  # a model twice
    python("analyze.py", *argv, "--out-dir", tmp_path / "2", ranks=2)
    args = analyze.parse_args([*argv, "--out-dir", str(tmp_path / "1")])
    analyze.main(args)
    one, two = (json.loads((tmp_path / ranks / "analysis.json").read_text()) for ranks in "12")
    assert one["models"] == two["models"] and one["cka"] == two["cka"] and len(one["models"]["a"]) == 2

    part = sorted((tmp_path / "1" / "parts").glob("*.json"))[0]
    whole = part.read_text()
    part.write_text(whole.replace('"sae":', '"other":'))
    with pytest.raises(cli.UserError, match=rf"{part.name}: lacks sae; delete it"):
        analyze.main(args)
    part.write_text(whole)
    part.with_suffix(".npy").write_bytes(b"cut")
    with pytest.raises(cli.UserError, match=rf"{part.stem}.npy: truncated"):
        analyze.main(args)
    with pytest.raises(cli.UserError, match="none.pt: No such file or directory, expected a file"):
        analyze.main(analyze.parse_args(["--model", f"a={tmp_path}/none.pt", "--out-dir", str(tmp_path / "3")]))


def test_what_is_measured_of_a_classifier(trained, tmp_path):
    """Accuracy from all components is the classifier's; margin and gradient are those of the definition; adversarial features move."""
    args = analyze.parse_args(["--model", f"a={trained[0]}", *SMALL])
    model = models.load_classifier(trained[0], DIGITS, "cpu")[0]
    train, _ = data.load_train(DIGITS, None, 200)
    images, labels = (part[:128] for part in data.load_test(DIGITS, None))
    path = str(tmp_path / "features.npy")
    found = analyze.measure("a", model, ((train[0], np.arange(800), train[1]), (images, labels)), args, "cpu", path)
    x, y = data.to_x(images), torch.from_numpy(labels)
    logits, expected = model(x, with_features=True)
    np.testing.assert_allclose(np.load(path), expected.numpy(), rtol=1e-4, atol=1e-5)
    accuracy = (logits.argmax(1) == y).float().mean().item()
    assert found["dimension_curve"][-1] == pytest.approx(accuracy) and found["clean"][0] == pytest.approx(accuracy)
    margins, lengths = [], []
    for image, label in zip(x.double(), y.tolist()):
        image = image[None].requires_grad_(True)
        z = model.double()(image)[0]
        margin = z[label] - max(z[k] for k in range(10) if k != label)
        margins.append(margin.item())
        lengths.append(torch.autograd.grad(margin, image)[0].abs().sum().item())
    model.float()
    assert found["margin"][0] == pytest.approx(np.mean(margins), rel=1e-4)
    assert found["gradient"][0] == pytest.approx(np.mean(lengths), rel=1e-4)
    assert found["distance"][0] == pytest.approx(np.mean(np.array(margins) / lengths), rel=1e-3)
    fit = model(data.to_x(train[0]), with_features=True)[1].double().numpy()
    mean, basis = fit.mean(0), np.linalg.svd(fit - fit.mean(0))[2]
    features, weight, bias = (t.double().detach().numpy() for t in (expected, model.logits.weight, model.logits.bias))
    for k in (0, 4, 9, 64):
        kept = (features - mean) @ basis[:k].T @ basis[:k] + mean
        assert found["dimension_curve"][k] == pytest.approx(((kept @ weight.T + bias).argmax(1) == labels).mean(), abs=0.01)
    scale = np.sqrt(np.square(fit - mean).mean())
    fit, features = (torch.from_numpy((part - mean) / scale).float() for part in (fit, features))
    for seed, error in enumerate(found["sae_by_seed"]):
        sae = representations.train_sae(fit, 32, 8, 20, seed)
        left = (sae(features) - features).square().sum() / (features - features.mean(0)).square().sum()
        assert error == pytest.approx(left.item(), rel=0.01)
    assert found["alignment"][0] > 0 and sum(found["saliency"]) == pytest.approx(1)


def test_what_is_wrong_without_an_attack_is_not_robust(monkeypatch):
    """A dark image that the attack brightens is classified right then, and still not robust."""

    class Bright(torch.nn.Module):
        def forward(self, x, with_features=False):
            features = torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)
            return (features, features) if with_features else features

    monkeypatch.setattr(analyze.attacks, "pgd", lambda model, x, y, starts, **settings: 1 - x)
    images, labels = np.stack([np.full((8, 8, 1), value, np.uint8) for value in (0, 255)]), np.array([1, 1])
    args = analyze.parse_args(["--model", "a=x"])
    _, _, correct, robust = analyze.attacked(Bright(), images, labels, 0.1, args, "cpu")
    assert correct.tolist() == [False, True] and robust.tolist() == [False, False]


@pytest.mark.parametrize("key", ["block.0.conv_1.weight", "logits.weight"])
def test_models_that_tell_no_images_apart_are_refused(key, trained, tmp_path):
    """All features alike, or no gradient: one line with the name, not a crash of a library or a NaN."""
    state = checkpoint.load(trained[0], {})
    for name, value in state["weights"].items():
        if key == "logits.weight" and name == key or key != "logits.weight" and name.startswith(("layer", "batchnorm")):
            value.zero_()
    checkpoint.save(state, tmp_path / "dead.pt")
    message = "the same for all images" if key != "logits.weight" else "gradient is zero on all images"
    with pytest.raises(cli.UserError, match=rf"a \(.*dead.pt\): .*{message}"):
        analyze.main(analyze.parse_args(["--model", f"a={tmp_path}/dead.pt", *SMALL, "--out-dir", str(tmp_path / "out")]))


def test_models_that_are_not_of_one_kind(trained, tmp_path):
    for argv, match in (
        (["--model", f"a={trained[0]}", "--model", f"a={trained[0]}/../best.pt"], "the same model as another one of that name"),
        (["--model", f"a={trained[0]}", "--sae-k", "64", "--sae-latents", "80"], "--sae-k 64: expected less than the 64 features"),
        (["--model", f"a={trained[0]}", "--val-size", "950"], "leaves 50 training images, the fits need at least 64"),
        (["--model", f"a={trained[0]}", "--model", f"a={tmp_path}/run/best.pt"], "--model a: models of 64 and 128 features"),
    ):
        if "128" in match:
            short = ["--model", "wrn-10-2", "--epochs", "1", "--loss", "standard", "--eval-n-steps", "1"]
            train_at.main(train_at.parse_args([*short, "--out-dir", str(tmp_path / "run")]))
        small = SMALL[:6] if "--sae-k" in argv else SMALL
        if "/../" in argv[-1]:
            argv[-1] = f"a={os.path.dirname(trained[0])}/./best.pt"
        with pytest.raises(cli.UserError, match=match):
            analyze.main(analyze.parse_args([*argv, *small, "--out-dir", str(tmp_path / "out")]))


def test_claims_are_judged_by_paired_differences(tmp_path, capsys):
    """Made numbers: lower in every seed, higher in every seed, and neither; the teacher against the spread of the seeds."""

    def settings(name, seed):
        made = {"seed": seed, "loss": "standard" if name == "standard" else "trades", "synthetic": ["x"] if "dm" in name else None}
        return made | {"script": "train_at_aux.py" if "dra" in name else "train_at.py"}

    def row(dim=64, **values):
        base = dict.fromkeys(("rank_me", "robust", "robust_third", "high_frequencies", "sae", "dimension"), 1.0) | values
        return {"dim": dim, "n": 100} | {key: [value, 0, 0] for key, value in base.items()}

    made = {name: [row(rank_me=30 + seed, robust=0.0, sae=0.5 + seed) for seed in range(3)] for name in claims.KINDS[:-1]}
    made["dm_at"] = [row(rank_me=29 + seed + 0.1 * (seed == 1), sae=0.5 + seed) for seed in range(3)]
    made["at_dra"] = [row(sae=0.9 + seed + 0.01 * seed) for seed in range(3)]
    made |= {"teacher": [row(dim=32, rank_me=20.0, robust=0.4, robust_third=1.5) | {"robust_third": [1.5, 0.9, 2.1]}]}
    for name, rows in made.items():
        for seed, of in enumerate(rows):
            of["path"] = str(tmp_path / f"{name}-{seed}" / "best.pt")
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "args.json").write_text(json.dumps(settings(name, seed)))
    names = [name for name, rows in made.items() for _ in rows]
    result = {"models": made, "cka": {"names": names, "matrix": np.eye(len(names)).tolist()}}
    (tmp_path / "analysis.json").write_text(json.dumps(result))
    claims.main(claims.parse_args(["--analysis", str(tmp_path)]))
    lines = {line.split("|")[2].strip(): line for line in (tmp_path / "claims.md").read_text().splitlines() if line.count("|") == 7}
    assert lines["rank_me: dm_at - at"].endswith("| yes |") and "-0.967" in lines["rank_me: dm_at - at"]
    assert lines["sae: at_dra - at"].endswith("| no |") and lines["dimension: at_dra - at"].endswith("| not resolved |")
    assert lines["rank_share: teacher - standard"].endswith("| yes |") and "0.625" in lines["rank_share: teacher - standard"]
    assert lines["rank_me: teacher - standard"].endswith("| no |")
    assert lines["robust: teacher - standard"].endswith("| yes |")  # the intervals over images are of no width
    assert lines["robust_third: teacher - standard"].endswith("| not resolved |")  # 0.5 +- 0.6
    assert lines["rank_me: dm_at - at_dra"].endswith("| yes |") and lines["dimension: dm_at - at_dra"].endswith("| not resolved |")
    assert "3 seeds, 100 test images" in capsys.readouterr().out
    for wrong, match in (
        (settings("at", 5), r"seeds of standard are \[0, 1, 2\], those of at \[0, 5, 2\]"),
        (settings("dm_at", 1), "at-1/args.json: is of a run of the kind dm_at, given as at"),
    ):
        (tmp_path / "at-1" / "args.json").write_text(json.dumps(wrong))
        with pytest.raises(cli.UserError, match=match):
            claims.main(claims.parse_args(["--analysis", str(tmp_path)]))
    (tmp_path / "at-1" / "args.json").write_text(json.dumps(settings("at", 1)))
    result["models"]["at"].pop()
    (tmp_path / "analysis.json").write_text(json.dumps(result))
    with pytest.raises(cli.UserError, match="as many models each"):
        claims.main(claims.parse_args(["--analysis", str(tmp_path)]))


@pytest.mark.parametrize(
    "argv,match",
    [
        ([], "--model: give at least one"),
        (["--model", "x"], "NAME=CHECKPOINT"),
        (["--model", "teacher=x"], "NAME=CHECKPOINT"),
        (["--model", "a=x", "--model", "a=x"], "the same model twice"),
        (["--model", "a=x", "--sigma", "1"], "--sigma: does nothing here"),
        (["--model", "a=x", "--sae-k", "300"], "300 of 256 latents"),
        (["--model", "a=x", "--eps", "8"], "--eps: 8, expected at most 1"),
    ],
)
def test_flags_of_analyze(argv, match, capsys):
    with pytest.raises(SystemExit) as error:
        analyze.parse_args(argv)
    assert error.value.code == 2 and match in capsys.readouterr().err


def test_too_few_images_for_intervals(trained, tmp_path):
    argv = ["--model", f"a={trained[0]}", "--n-images", "63", "--out-dir", str(tmp_path)]
    with pytest.raises(cli.UserError, match="at least 64 images, there are 63"):
        analyze.main(analyze.parse_args(argv))
