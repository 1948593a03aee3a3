"""Metrics of features: rank, spread, similarity, frequencies, dimension, and how sparse they are.

Features are (N, D) arrays in memory or mapped from a file, one row per image. For the intervals,
image i belongs to group i % N_GROUPS. A statistic is a function of an index array of groups: it
gives the metric of the images of these groups. What is measured of which model stands in
analyze.py, the pictures in analysis/pictures.py.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import StandardScaler
from torch import nn

from common.stats import t_interval

N_GROUPS = 32
ALL_GROUPS = np.arange(N_GROUPS)

# ----------------------------------------------------------------------------------- intervals


def half_samples(statistic, n_draws=100):
    """[estimate, low, high] of a statistic: its value for all groups, and its 95 % interval.

    The interval is over the images. The spread of the statistic over random halves of the groups,
    drawn without replacement, is that of the estimate over draws of the images. (A bootstrap draws
    images twice. It is biased for ranks and similarities, which repeated images change.) Student's
    t with N_GROUPS - 1 degrees of freedom. Each of the three is a list where the statistic is one.
    """
    rng = np.random.default_rng(0)
    halves = [statistic(rng.permutation(N_GROUPS)[: N_GROUPS // 2]) for _ in range(n_draws)]
    estimate = np.asarray(statistic(ALL_GROUPS), np.float64)
    half_width = t.ppf(0.975, N_GROUPS - 1) * np.std(halves, axis=0, ddof=1)
    low = estimate - half_width
    high = estimate + half_width
    return [estimate.tolist(), low.tolist(), high.tolist()]


def rows_of(groups, n):
    """Indices of those of n images that belong to the groups."""
    return np.flatnonzero(np.isin(np.arange(n) % N_GROUPS, groups))


def group_mean(values, groups):
    """Mean over the images of the groups; values (N, ...) has a row per image."""
    return values[rows_of(groups, len(values))].mean(0)


def mean_interval(values):
    """[mean, low, high] of one number per image, values (N,)."""
    return half_samples(lambda groups: group_mean(values, groups))


def ratio_interval(numerators, denominators):
    """[ratio, low, high] of two sums over the images, both (N,); 0 where the second sum is 0."""

    def ratio(groups):
        rows = rows_of(groups, len(numerators))
        return numerators[rows].sum() / max(denominators[rows].sum(), 1e-12)

    return half_samples(ratio)


def interval(rows, key):
    """[mean, low, high] of a metric of the models of one name, or None where no model has it.

    rows: a dict per model, whose entry `key` is [value, low, high]. Of several models, which
    differ by their seed, the interval is Student's over them; of one it is that over the images.
    """
    measured = [row[key] for row in rows if key in row]
    if not measured:
        return None
    if len(measured) == 1:
        return measured[0]
    return t_interval([value for value, _, _ in measured])


# ------------------------------------------------------------------------- rank and similarity


def moments(a, b=None):
    """(number of images (G,), sums of a (G, D), products a^T b (G, D, E)), each by group.

    a: features (N, D). b: features (N, E) of the same images, a itself if not given.
    """
    width = a.shape[1] if b is None else b.shape[1]
    n = np.zeros(N_GROUPS)
    sums = np.zeros((N_GROUPS, a.shape[1]))
    products = np.zeros((N_GROUPS, a.shape[1], width))
    for group in ALL_GROUPS:
        rows_a = np.asarray(a[group::N_GROUPS], np.float64)
        rows_b = rows_a if b is None else np.asarray(b[group::N_GROUPS], np.float64)
        n[group] = len(rows_a)
        sums[group] = rows_a.sum(0)
        products[group] = rows_a.T @ rows_b
    return n, sums, products


def _centred(products, sums_a, sums_b, n):
    """A^T B of centred features, from that of the features as they are."""
    return products - np.outer(sums_a, sums_b) / n


def singular_values(feature_moments, groups):
    """Singular values, in descending order, of the centred features of the groups.

    There are as many as features, or as images where those are fewer.
    """
    n, sums, products = (part[groups].sum(0) for part in feature_moments)
    eigenvalues = np.linalg.eigvalsh(_centred(products, sums, sums, n))[::-1]
    n_values = min(int(n), len(eigenvalues))
    return np.sqrt(eigenvalues.clip(0))[:n_values]


def rank_me(values):
    """exp of the entropy of p_k = s_k / sum(s) + 1e-7, s the singular values (arXiv 2210.02885).

    Here those of centred features; the paper does not centre.
    """
    p = values / values.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(values):
    """sum(s^2) / max(s)^2 of the singular values s, in descending order."""
    return float((values**2).sum() / values[0] ** 2)


def cka(moments_a, moments_b, moments_ab, groups):
    """Linear CKA of two networks' features A, B of the same images (arXiv 1905.00414).

    |A^T B|^2 / (|A^T A| |B^T B|) of centred features. It is 1 for features that differ by a
    rotation and a scale. The arguments are moments(A), moments(B) and moments(A, B).
    """
    n, sums_a, products_a = (part[groups].sum(0) for part in moments_a)
    _, sums_b, products_b = (part[groups].sum(0) for part in moments_b)
    products_ab = moments_ab[2][groups].sum(0)
    norm_ab = np.linalg.norm(_centred(products_ab, sums_a, sums_b, n))
    norm_a = np.linalg.norm(_centred(products_a, sums_a, sums_a, n))
    norm_b = np.linalg.norm(_centred(products_b, sums_b, sums_b, n))
    return float(norm_ab**2 / (norm_a * norm_b))


def cka_interval(a, b):
    """[CKA, low, high] of features a (N, D) and b (N, E) of the same images."""
    pair = moments(a), moments(b), moments(a, b)
    return half_samples(lambda groups: cka(*pair, groups), n_draws=50)


# -------------------------------------------------------------------- alignment and uniformity


def unit(features):
    """Features scaled to rows of length 1, float64. A row of zeros stays as it is."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def squared_distances(a, b):
    """Squared distances (N,) of the rows of a and b on the unit sphere.

    Their mean is the alignment of Wang and Isola (arXiv 2005.10242) with alpha 2: 0 where all
    pairs coincide.
    """
    return np.square(unit(a) - unit(b)).sum(1)


def kernel_sums(features):
    """(number of images (G,), sums (G, G)) for `uniformity`.

    sums[g, h] is the sum of exp(-2 |z_i - z_j|^2) over pairs of different images, i of group g
    and j of group h; z are the features on the unit sphere.
    """
    z = unit(features)
    n = np.zeros(N_GROUPS)
    sums = np.zeros((N_GROUPS, N_GROUPS))
    for g in ALL_GROUPS:
        n[g] = len(z[g::N_GROUPS])
        for h in ALL_GROUPS:
            squared = euclidean_distances(z[g::N_GROUPS], z[h::N_GROUPS], squared=True)
            sums[g, h] = np.exp(-2 * squared).sum()
    return n, sums - np.diag(n)  # an image with itself adds exp(0)


def uniformity(kernel, groups):
    """log of the mean of exp(-2 |z_i - z_j|^2) over pairs (Wang and Isola, with t = 2).

    kernel: of kernel_sums. 0 where all rows coincide; the lower, the more uniform.
    """
    n, sums = kernel
    n_images = n[groups].sum()
    n_pairs = n_images * (n_images - 1)
    return float(np.log(sums[np.ix_(groups, groups)].sum() / n_pairs))


# --------------------------------------------------------------------------------- frequencies


def rings(size):
    """Ring number (size, size) of each frequency of an image of size x size pixels.

    It is the frequency's distance from 0 in cycles per image, rounded.
    """
    cycles = np.abs(np.fft.fftfreq(size)) * size
    horizontal, vertical = np.meshgrid(cycles, cycles)
    return np.round(np.hypot(horizontal, vertical)).astype(int)


def spectrum(gradients):
    """Magnitude (B, rings) of the 2-D Fourier transform of gradients (B, C, H, W), H = W.

    It is averaged over channels and over the frequencies of each ring.
    """
    device = gradients.device
    ring = torch.from_numpy(rings(gradients.shape[-1])).flatten().to(device)
    n_rings = int(ring.max()) + 1
    magnitude = torch.fft.fft2(gradients.double()).abs().mean(1).flatten(1)
    sums = torch.zeros(len(magnitude), n_rings, dtype=torch.float64, device=device)
    sums.index_add_(1, ring, magnitude)
    return sums / torch.bincount(ring)


def high_share(curve, size):
    """Share of a curve (rings,) above a quarter of a cycle per pixel.

    That is half of the highest frequency along an axis. Each ring counts once, however many
    frequencies it holds. size: of the images, in pixels.
    """
    is_high = np.arange(len(curve)) > size / 4
    return float(curve[is_high].sum() / curve.sum())


# -------------------------------------------------------------------- classification dimension


def principal_components(features):
    """(basis (D, D), mean (D,)): its columns are the components, by descending variance."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    _, eigenvectors = np.linalg.eigh(centred.T @ centred)
    return eigenvectors[:, ::-1], mean


def dimension_counts(features, labels, weight, bias, basis, mean):
    """How many images (G, D + 1) the last layer gets right from k components alone, k = 0 to D.

    weight (K, D), bias (K,): of the last layer. basis, mean: of principal_components. The other
    components of a feature are replaced by their mean.
    """
    heads = basis.T @ weight.T  # (D, K)
    counts = np.zeros((N_GROUPS, len(basis) + 1))
    for group in ALL_GROUPS:
        y = labels[group::N_GROUPS]
        rows = np.asarray(features[group::N_GROUPS], np.float64)
        coordinates = (rows - mean) @ basis
        logits = np.tile(bias + weight @ mean, (len(y), 1))
        counts[group, 0] = (logits.argmax(1) == y).sum()
        for k in range(len(basis)):
            logits += coordinates[:, k : k + 1] * heads[k]
            counts[group, k + 1] = (logits.argmax(1) == y).sum()
    return counts


def classification_dimension(counts, groups):
    """The smallest number of components with 99 % of the correct answers that all of them give."""
    n_correct = counts[groups].sum(0)
    return int(np.argmax(n_correct >= 0.99 * n_correct[-1]))


# --------------------------------------------------------------- two dimensions, linear probe


def embedding(clean, adversarial, seed):
    """{"pca": (2 N, 2), "tsne": (2 N, 2)}: unit features in two dimensions, as nested lists.

    clean, adversarial: features (N, D); the clean ones come first. The principal components are
    those of the clean features.
    """
    features = unit(np.concatenate([clean, adversarial]))
    pca = PCA(2, random_state=seed).fit(features[: len(clean)])
    tsne = TSNE(2, perplexity=min(30, len(features) / 4), init="pca", random_state=seed)
    return {
        "pca": pca.transform(features).round(4).tolist(),
        "tsne": tsne.fit_transform(features).round(3).tolist(),
    }


def fit_linear(features, labels, n_classes):
    """(weight (K, D), bias (K,)): float32 tensors of a logistic regression on features (N, D).

    It is scikit-learn's, with C = 1, on standardised features; the standardisation is folded into
    weight and bias. labels (N,) in 0..K-1. A class without an example has weight 0 and a bias so
    low that it is never predicted.
    """
    scaler = StandardScaler()
    standardised = scaler.fit_transform(np.asarray(features, np.float64))
    fit = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(standardised, labels)
    coefficients = fit.coef_
    intercepts = fit.intercept_
    if len(fit.classes_) == 2:
        # scikit-learn gives one row, the difference of the two logits.
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight = np.zeros((n_classes, features.shape[1]))
    bias = np.full(n_classes, -1e4)
    weight[fit.classes_] = coefficients / scaler.scale_
    bias[fit.classes_] = intercepts - weight[fit.classes_] @ scaler.mean_
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


# -------------------------------------------------------------------------- sparse autoencoder


class TopK(nn.Module):
    """A sparse autoencoder of which k latents are active (Gao et al., arXiv 2406.04093).

    x^ = b + W_dec^T relu(top_k(W_enc (x - b) + c)); the rows of W_dec have length 1.
    """

    def __init__(self, dim, n_latents, k):
        super().__init__()
        self.k = k
        self.bias = nn.Parameter(torch.zeros(dim))
        self.decoder = nn.Parameter(F.normalize(torch.randn(n_latents, dim), dim=1))
        self.encoder = nn.Linear(dim, n_latents)
        with torch.no_grad():
            self.encoder.weight.copy_(self.decoder)
            self.encoder.bias.zero_()

    def latents(self, x):
        """Activations (B, n_latents) before the choice of the k largest and the ReLU."""
        return self.encoder(x - self.bias)

    def forward(self, x):
        active = top(self.latents(x), self.k).relu()
        return active @ self.decoder + self.bias


def top(latents, k):
    """The k largest of each row of latents (B, n_latents), and zero elsewhere."""
    values, places = latents.topk(k, dim=1)
    return torch.zeros_like(latents).scatter(1, places, values)


def train_sae(x, n_latents, k, n_steps, seed, *, batch_size=256, lr=1e-3, dead_after=200):
    """A TopK trained on features x (N, D), which are centred and of mean square 1.

    The loss is the mean squared error, plus 1/32 of an auxiliary one: the D / 2 largest of the
    dead latents, those that were active for no feature in the last dead_after steps, try to
    reconstruct the residual, and their error is divided by the residual's variance. Adam; the
    decoder's rows are brought back to length 1 after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = TopK(x.shape[1], n_latents, k).to(x.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    silent_steps = torch.zeros(n_latents, dtype=torch.int64, device=x.device)
    for _ in range(n_steps):
        picked = torch.randint(len(x), (batch_size,), generator=generator).to(x.device)
        batch = x[picked]
        latents = sae.latents(batch)
        active = top(latents, k).relu()
        residual = batch - active @ sae.decoder - sae.bias
        loss = residual.square().mean()
        silent_steps = torch.where((active > 0).any(0), 0, silent_steps + 1)
        dead = silent_steps > dead_after
        if dead.any():
            k_dead = min(int(dead.sum()), max(1, x.shape[1] // 2))
            # Without the ReLU: its gradient is what dead latents lack.
            active_dead = top(latents.masked_fill(~dead, -torch.inf), k_dead)
            target = residual.detach()
            error = (target - active_dead @ sae.decoder).square().mean()
            loss = loss + error / target.square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return sae.eval()
