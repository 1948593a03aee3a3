"""Metrics of features against slow float64 formulae and known answers.

Alone: python -m pytest tests/analysis/test_metrics.py
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import metrics
from analysis.metrics import ALL_GROUPS, N_GROUPS
from common import data


def gaussian(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def values_of(features, groups=ALL_GROUPS):
    return metrics.singular_values(metrics.moments(features), groups)


# ---------------------------------------------------------------------------------- intervals


def test_halves_of_the_groups_cover_the_mean():
    """95 % nominal, over 300 samples of 640 numbers; and the estimate is the mean of all."""
    n_inside = 0
    for trial in range(300):
        x = np.random.default_rng(trial).exponential(size=640)
        value, low, high = metrics.mean_interval(x)
        assert value == pytest.approx(x.mean())
        n_inside += low <= 1 <= high
    assert 0.91 <= n_inside / 300 <= 0.985


def test_ratios_are_of_sums():
    a, b = gaussian(200, 2).T ** 2
    b[::3] = 0
    ratio, low, high = metrics.ratio_interval(a, b)
    assert ratio == pytest.approx(a.sum() / b.sum())
    assert low < ratio < high
    assert metrics.ratio_interval(0 * a, 0 * b) == [0, 0, 0]


def test_interval_over_seeds_is_students():
    rows = [{"a": [value, 0, 0]} for value in (1.0, 2.0, 4.0)]
    mean, low, high = metrics.interval(rows, "a")
    half = 4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-5)
    assert metrics.interval(rows[:1], "a") == [1.0, 0, 0]
    assert metrics.interval(rows, "b") is None


# --------------------------------------------------------------------------------------- rank


@pytest.mark.parametrize("groups", [ALL_GROUPS, np.array([3, 8, 30])])
def test_singular_values_of_any_groups_are_those_of_the_centred_matrix(groups):
    features = (gaussian(200, 12) @ gaussian(12, 12, 1) + 5).astype(np.float32)
    rows = np.concatenate([features[group::N_GROUPS] for group in groups]).astype(np.float64)
    expected = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[: len(rows)]
    np.testing.assert_allclose(values_of(features, groups), expected, rtol=1e-6, atol=1e-5)


def test_ranks_of_known_spectra():
    equal = np.ones(20)
    assert metrics.rank_me(equal) == pytest.approx(20, rel=1e-4)
    assert metrics.stable_rank(equal) == 20

    subspace = ortho_group.rvs(30, random_state=0)[:5]
    planted = values_of(gaussian(20_000, 5) @ subspace)
    assert metrics.rank_me(planted) == pytest.approx(5, rel=2e-3)
    assert metrics.stable_rank(planted) == pytest.approx(5, rel=0.05)

    isotropic = values_of(gaussian(20_000, 30))
    assert metrics.rank_me(isotropic) == pytest.approx(30, rel=2e-3)

    by_hand = math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert metrics.rank_me(np.array([2.0, 1.0])) == pytest.approx(by_hand, rel=1e-5)
    assert metrics.stable_rank(np.array([2.0, 1.0])) == 1.25


# -------------------------------------------------------------- alignment, uniformity, CKA


def test_alignment_against_a_slow_sum():
    a, b = gaussian(70, 6), gaussian(70, 6, 1)
    expected = []
    for x, y in zip(a, b):
        difference = x / np.linalg.norm(x) - y / np.linalg.norm(y)
        expected.append((difference**2).sum())
    np.testing.assert_allclose(metrics.squared_distances(a, b), expected)
    assert metrics.squared_distances(a, 3 * a).max() < 1e-12


@pytest.mark.parametrize("groups", [ALL_GROUPS, np.array([0, 5, 9])])
@pytest.mark.parametrize("n_dead", [0, 20])
def test_uniformity_against_a_slow_sum(groups, n_dead):
    """A feature vector of zeros stays zero."""
    features = gaussian(70, 6)
    features[:n_dead] = 0
    z = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows = np.concatenate([z[group::N_GROUPS] for group in groups])
    pairs = []
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            if i != j:
                pairs.append(math.exp(-2 * ((x - y) ** 2).sum()))
    uniformity = metrics.uniformity(metrics.kernel_sums(features), groups)
    assert uniformity == pytest.approx(math.log(np.mean(pairs)))


def test_uniformity_of_the_circle():
    """Points spread evenly on it: log of the mean of exp(4 (cos t - 1)), which is e^-4 I_0(4)."""
    angle = np.linspace(0, 2 * np.pi, 4001)[:-1]
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    expected = math.log(math.exp(-4) * np.i0(4.0))
    uniformity = metrics.uniformity(metrics.kernel_sums(circle), ALL_GROUPS)
    assert uniformity == pytest.approx(expected, abs=2e-3)
    one_point = metrics.kernel_sums(np.ones((64, 3)))
    assert metrics.uniformity(one_point, ALL_GROUPS) == pytest.approx(0)


def similarity(a, b):
    moments = metrics.moments(a), metrics.moments(b), metrics.moments(a, b)
    return metrics.cka(*moments, ALL_GROUPS)


def test_cka_is_the_formula_and_ignores_rotation_and_scale():
    a = gaussian(90, 8) + 3
    b = np.tanh(gaussian(90, 8)) @ gaussian(8, 5, 2)
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    gram_a, gram_b = centred_a @ centred_a.T, centred_b @ centred_b.T
    by_kernels = (gram_a * gram_b).sum() / math.sqrt((gram_a**2).sum() * (gram_b**2).sum())
    assert similarity(a, b) == pytest.approx(by_kernels)
    rotation = ortho_group.rvs(8, random_state=0)
    assert similarity(a, 7 * a @ rotation + 2) == pytest.approx(1)
    assert similarity(a @ rotation, b) == pytest.approx(similarity(a, b))
    assert similarity(a, a @ np.diag(10.0 ** np.arange(8))) < 0.9  # but not any linear map
    assert similarity(gaussian(20_000, 4), gaussian(20_000, 4, 1)) < 1e-3


# -------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("cycles", [(0, 0), (3, 0), (2, 2), (4, 0), (0, 7)])
def test_spectrum_of_a_sinusoid_is_its_ring(cycles):
    size = 16
    j, i = np.meshgrid(np.arange(size), np.arange(size))
    wave = np.cos(2 * np.pi * (cycles[0] * i + cycles[1] * j) / size)
    image = torch.from_numpy(np.stack([wave, 2 * wave]))[None].float()
    curve = metrics.spectrum(image)[0].numpy()
    ring = round(math.hypot(*cycles))
    assert curve.argmax() == ring
    assert curve[ring] / curve.sum() > 0.999
    assert metrics.high_share(curve, size) == pytest.approx(float(ring > 4), abs=1e-3)


def test_spectrum_against_a_slow_transform():
    x = gaussian(2 * 3 * 8 * 8, 1).reshape(2, 3, 8, 8)
    spectra = metrics.spectrum(torch.from_numpy(x)).numpy()
    for image, curve in zip(x, spectra):
        sums, counts = np.zeros(len(curve)), np.zeros(len(curve))
        for u in range(8):
            for v in range(8):
                wave = np.exp(-2j * np.pi * (u * np.arange(8)[:, None] + v * np.arange(8)) / 8)
                ring = round(math.hypot(min(u, 8 - u), min(v, 8 - v)))
                sums[ring] += np.mean([abs((channel * wave).sum()) for channel in image])
                counts[ring] += 1
        np.testing.assert_allclose(curve, sums / counts, rtol=1e-10)


def test_spectrum_of_white_noise_is_flat():
    white = torch.from_numpy(gaussian(500 * 64, 1).reshape(500, 1, 8, 8))
    curve = metrics.spectrum(white).mean(0)
    assert curve[1:5].max() / curve[1:5].min() < 1.1


# ----------------------------------------------------------------------------------- dimension


def test_classification_dimension_of_a_planted_subspace():
    """The class is decided in 3 directions, the 4th to 6th by variance: it takes 6 components."""
    rng = np.random.default_rng(0)
    code = rng.standard_normal((4000, 3))
    largest = np.abs(code).argmax(1)
    labels = 2 * largest + (code[np.arange(4000), largest] > 0)
    basis = ortho_group.rvs(10, random_state=0)
    scales = np.array([9, 8, 7, 3, 2.5, 2, 0.1, 0.1, 0.1, 0.1])
    before, after = rng.standard_normal((4000, 3)), rng.standard_normal((4000, 4))
    features = (np.concatenate([before, code, after], 1) * scales) @ basis + 1
    heads = np.zeros((6, 10))
    for k in range(6):
        direction = 3 + k // 2
        heads[k, direction] = (1 if k % 2 else -1) / scales[direction]
    weight = heads @ basis
    bias = -weight @ np.ones(10)

    components, mean = metrics.principal_components(features)
    counts = metrics.dimension_counts(features, labels, weight, bias, components, mean)
    assert counts.shape == (N_GROUPS, 11)
    assert metrics.classification_dimension(counts, ALL_GROUPS) == 6
    for k in (0, 5, 10):  # by projecting the features
        kept = components[:, :k] @ components[:, :k].T
        predicted = (((features - mean) @ kept + mean) @ weight.T + bias).argmax(1)
        assert counts[:, k].sum() == (predicted == labels).sum()
    assert counts[:, 10].sum() > 3950
    assert counts[:, 3].sum() < 2000


# -------------------------------------------------------------------------------- linear probe


def scaled_digits():
    """Pixels of the test images as float32 features of unlike scales, some of them constant."""
    images, labels = data.load_test(DIGITS, None)
    scales = np.linspace(0.1, 10, 64, dtype=np.float32)
    return images.reshape(len(images), -1) * scales, labels


def test_linear_probe_has_the_standardisation_folded_in():
    features, labels = scaled_digits()
    weight, bias = metrics.fit_linear(features[:300], labels[:300], 10)
    probs = F.softmax(torch.from_numpy(features) @ weight.T + bias, 1).numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-8))
    pipeline.fit(features[:300].astype(np.float64), labels[:300])
    np.testing.assert_allclose(probs, pipeline.predict_proba(features), atol=2e-3)


def test_linear_probe_is_the_minimum():
    """The gradient of sum of cross-entropies + |weight|^2 / 2 on standardised features is 0."""
    features, labels = scaled_digits()
    features, labels = features[:300].astype(np.float64), labels[:300]
    weight, bias = metrics.fit_linear(features, labels, 10)
    scaler = StandardScaler().fit(features)
    weight = weight.double() * torch.from_numpy(scaler.scale_)
    mean = torch.from_numpy(scaler.mean_ / scaler.scale_)
    bias = (bias.double() + weight @ mean).requires_grad_(True)
    weight.requires_grad_(True)
    logits = torch.from_numpy(scaler.transform(features)) @ weight.T + bias
    loss = F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    (loss + weight.square().sum() / 2).backward()
    assert weight.grad.abs().max() < 1e-3
    assert bias.grad.abs().max() < 1e-3


@pytest.mark.parametrize("classes", [(0, 1), (2, 5, 7)])
def test_linear_probe_never_predicts_a_class_without_examples(classes):
    features, labels = scaled_digits()
    known = np.isin(labels, classes)
    features, labels = features[known], labels[known]
    weight, bias = metrics.fit_linear(features, labels, 10)
    logits = torch.from_numpy(features) @ weight.T + bias
    assert logits.isfinite().all()
    assert (logits.argmax(1).numpy() == labels).mean() > 0.99
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-8))
    pipeline.fit(features.astype(np.float64), labels)
    probs = F.softmax(logits, 1)[:, list(classes)].numpy()
    np.testing.assert_allclose(probs, pipeline.predict_proba(features), atol=2e-3)


# ------------------------------------------------------------------------- sparse autoencoder


def planted_dictionary(n=4000):
    """Features that are sums of 2 of 24 directions in 16 dimensions, centred, of mean square 1."""
    rng = np.random.default_rng(0)
    atoms = F.normalize(torch.from_numpy(rng.standard_normal((24, 16))), dim=1).float()
    active = torch.from_numpy(np.stack([rng.permutation(24)[:2] for _ in range(n)]))
    strengths = torch.from_numpy(rng.uniform(0.5, 1.5, (n, 2))).float()
    x = torch.zeros(n, 24).scatter(1, active, strengths) @ atoms
    x = x - x.mean(0)
    return x / x.square().mean().sqrt(), atoms


@torch.no_grad()
def mean_error(sae, x):
    return (sae(x) - x).square().mean()


def test_autoencoder_finds_a_planted_dictionary():
    x, atoms = planted_dictionary()
    sae = metrics.train_sae(x, 48, 3, 3000, 0)
    similarities = (F.normalize(sae.decoder, dim=1) @ atoms.T).amax(0)
    assert (similarities > 0.9).float().mean() > 0.8, similarities
    error = mean_error(sae, x)
    assert error < 0.15
    assert (sae.decoder.norm(dim=1) - 1).abs().max() < 1e-5
    assert ((metrics.top(sae.latents(x), 3) != 0).sum(1) == 3).all()
    shuffled = x.clone()  # the same marginals without the structure
    for j in range(16):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(j))
        shuffled[:, j] = x[order, j]
    without_structure = metrics.train_sae(shuffled, 48, 3, 1000, 0)
    assert mean_error(without_structure, shuffled) > 1.5 * error


def test_autoencoder_repeats_and_depends_on_its_seed():
    x, _ = planted_dictionary(500)
    first, again, other = (metrics.train_sae(x, 32, 3, 60, seed).decoder for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dead_latents_learn_the_residual():
    """They explain more of it with the auxiliary loss than without, where they stay as drawn."""
    x, _ = planted_dictionary(1000)

    def unexplained(dead_after):
        sae = metrics.train_sae(x, 512, 3, 600, 0, dead_after=dead_after)
        with torch.no_grad():
            latents = sae.latents(x)
            dead = ~(metrics.top(latents, 3) > 0).any(0)
            assert dead.sum() >= 8
            residual = x - sae(x)
            explained = metrics.top(latents.masked_fill(~dead, -torch.inf), 8) @ sae.decoder
            return (residual - explained).square().mean() / residual.square().mean()

    assert unexplained(20) < 0.5 * unexplained(10**9)


def test_the_embedding_has_the_clean_images_first():
    """In the principal components of the clean ones alone."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(40, 6))
    adversarial = clean + 2
    found = metrics.embedding(clean, adversarial, seed=0)
    pca = PCA(2, random_state=0).fit(metrics.unit(clean))
    expected = np.concatenate([pca.transform(metrics.unit(f)) for f in (clean, adversarial)])
    np.testing.assert_allclose(found["pca"], expected, atol=1e-4)
    assert np.shape(found["tsne"]) == (80, 2)
