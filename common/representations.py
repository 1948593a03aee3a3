"""What features look like: rank, spread, similarity, frequencies of the gradient, sparse autoencoders, and their intervals.

Features are (N, D) arrays, in memory or mapped from a file. Image i is of group i % N_GROUPS: what a metric needs of the images is
added up by group, some rows at a time and in float64, so that memory does not grow with N, and any subset of the groups gives the
metric of its images.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats as distributions
from torch import nn

from common.stats import t_interval

N_GROUPS = 32


def group_rows(n, at_once=256):
    """(group, a slice of its rows) in turn, until all n rows were named once; a slice is of at most `at_once` rows."""
    for group in range(N_GROUPS):
        for start in range(group, n, N_GROUPS * at_once):
            yield group, slice(start, min(n, start + N_GROUPS * at_once), N_GROUPS)


def by_group(parts):
    """(G, 1 + K): by group, the number of images and the sums of their values. parts: (B, K) arrays of consecutive images."""
    total, first = 0, 0
    for values in parts:
        values = np.column_stack([np.ones(len(values)), values])
        sums = np.zeros((N_GROUPS, values.shape[1]))
        np.add.at(sums, (first + np.arange(len(values))) % N_GROUPS, values)
        total, first = total + sums, first + len(values)
    return total


def means(sums, groups):
    """(K,): mean values of the images of the groups, from by_group's sums."""
    total = sums[groups].sum(0)
    return total[1:] / total[0]


def half_samples(statistic, n_draws=100):
    """[estimate, low, high]: statistic(all groups), and its 95 % interval over the images; arrays for an array.

    statistic(groups) is the metric of the images of the groups, an index array. The spread of its values over random halves of
    the groups, drawn without replacement, is that of the estimate over draws of the images. (A bootstrap draws images twice; of
    ranks and similarities, which repeated images change, it is biased.) Student's t with N_GROUPS - 1 degrees of freedom.
    """
    rng = np.random.default_rng(0)
    halves = [statistic(rng.permutation(N_GROUPS)[: N_GROUPS // 2]) for _ in range(n_draws)]
    estimate = np.asarray(statistic(np.arange(N_GROUPS)), np.float64)
    half = distributions.t.ppf(0.975, N_GROUPS - 1) * np.std(halves, axis=0, ddof=1)
    return [value.tolist() for value in (estimate, estimate - half, estimate + half)]


def interval(rows, key):
    """[mean, low, high] of a metric over the seeds of one name; over the images where there is one; None where there is none."""
    found = [row[key] for row in rows if key in row]
    if len(found) < 2:
        return found[0] if found else None
    return t_interval([value[0] for value in found])


# ------------------------------------------------------------------------------------------------- rank and similarity


def moments(a, b=None):
    """(n (G,), sums (G, D), products (G, D, E)) of features a (N, D) with b (N, E), or with themselves."""
    b = a if b is None else b
    n, sums, products = np.zeros(N_GROUPS), np.zeros((N_GROUPS, a.shape[1])), np.zeros((N_GROUPS, a.shape[1], b.shape[1]))
    for group, rows in group_rows(len(a)):
        x = np.asarray(a[rows], np.float64)
        n[group] += len(x)
        sums[group] += x.sum(0)
        products[group] += x.T @ (x if b is a else np.asarray(b[rows], np.float64))
    return n, sums, products


def _centred(products, sums_a, sums_b, n):
    return products - np.outer(sums_a, sums_b) / n


def singular_values(of, groups):
    """Singular values, descending, of the centred features whose moments are `of`; a feature more than images has none."""
    n, sums, products = (part[groups].sum(0) for part in of)
    eigenvalues = np.linalg.eigvalsh(_centred(products, sums, sums, n))[::-1]
    return np.sqrt(eigenvalues.clip(0))[: min(int(n), len(eigenvalues))]


def rank_me(values):
    """exp of the entropy of p_k = s_k / sum(s) + 1e-7, s the singular values (RankMe, arXiv 2210.02885)."""
    p = values / values.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(values):
    """sum(s^2) / max(s)^2."""
    return float((values**2).sum() / values[0] ** 2)


def cka(of_a, of_b, between, groups):
    """Linear CKA (Kornblith et al., arXiv 1905.00414) of two networks' features of the same images, from their moments.

    |A^T B|^2 / (|A^T A| |B^T B|) of centred features; 1 for features that differ by a rotation and a scale.
    """
    n, sums_a, products_a = (part[groups].sum(0) for part in of_a)
    _, sums_b, products_b = (part[groups].sum(0) for part in of_b)
    cross = np.linalg.norm(_centred(between[2][groups].sum(0), sums_a, sums_b, n)) ** 2
    own = [np.linalg.norm(_centred(p, s, s, n)) for p, s in ((products_a, sums_a), (products_b, sums_b))]
    return float(cross / (own[0] * own[1]))


# ---------------------------------------------------------------------------------------------- alignment and uniformity


def unit(features):
    """Rows of length 1, float64; a row of zeros stays one."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def squared_distances(a, b):
    """(N,): squared distances of the rows of a and b on the unit sphere; their mean is the alignment of Wang & Isola
    (arXiv 2005.10242, alpha 2), 0 if all pairs coincide."""
    return np.square(unit(a) - unit(b)).sum(1)


def kernel_sums(features):
    """(n (G,), (G, G)): sum of exp(-2 |z_i - z_j|^2) over pairs of different rows of two groups, on the unit sphere."""
    n, sums = np.zeros(N_GROUPS), np.zeros((N_GROUPS, N_GROUPS))
    for group_a, rows_a in group_rows(len(features)):
        a = unit(features[rows_a])
        n[group_a] += len(a)
        for group_b, rows_b in group_rows(len(features)):
            b = unit(features[rows_b])
            exponents = a @ b.T
            exponents *= 4
            exponents -= 2 * np.square(a).sum(1)[:, None]
            exponents -= 2 * np.square(b).sum(1)
            sums[group_a, group_b] += np.exp(exponents, out=exponents).sum()
    return n, sums - np.diag(n)  # a row with itself: exp(0)


def uniformity(sums, groups):
    """log of the mean of exp(-2 |z_i - z_j|^2) over pairs (as above, t = 2); 0 if all rows coincide, lower is more uniform."""
    n = sums[0][groups].sum()
    return float(np.log(sums[1][np.ix_(groups, groups)].sum() / (n * (n - 1))))


# -------------------------------------------------------------------------------------------------------- frequencies


def rings(size):
    """(H, W) ring number of each frequency of an H = W = size image: its distance from 0 in cycles per image, rounded."""
    cycles = np.abs(np.fft.fftfreq(size)) * size
    return np.round(np.hypot(*np.meshgrid(cycles, cycles))).astype(int)


def spectrum(gradients):
    """(B, rings) of gradients (B, C, H, W): magnitude of their 2-D Fourier transform, averaged over channels and each ring."""
    ring = torch.from_numpy(rings(gradients.shape[-1])).flatten().to(gradients.device)
    magnitude = torch.fft.fft2(gradients.double()).abs().mean(1).flatten(1)
    sums = torch.zeros(len(magnitude), int(ring.max()) + 1, dtype=torch.float64, device=gradients.device).index_add_(1, ring, magnitude)
    return sums / torch.bincount(ring)


def high_share(curve, size):
    """Share of a radial curve that lies above half of the highest frequency, a quarter of a cycle per pixel."""
    return float(curve[np.arange(len(curve)) > size / 4].sum() / curve.sum())


# ------------------------------------------------------------------------------------------------ classification dimension


def dimension_counts(features, labels, weight, bias, basis, mean):
    """(G, D + 1): images classified correctly by the head from the first k principal components alone, k = 0 to D.

    basis: (D, D), columns the components in their order. What is left out of a feature is replaced by the mean.
    """
    heads = basis.T @ weight.T  # (D, K)
    counts = np.zeros((N_GROUPS, len(basis) + 1))
    for group, rows in group_rows(len(features)):
        parts, y = (np.asarray(features[rows], np.float64) - mean) @ basis, labels[rows]
        logits = np.tile(bias + weight @ mean, (len(y), 1))
        counts[group, 0] += (logits.argmax(1) == y).sum()
        for k in range(len(basis)):
            logits += parts[:, k : k + 1] * heads[k]
            counts[group, k + 1] += (logits.argmax(1) == y).sum()
    return counts


def principal_components(features):
    """(basis (D, D), mean (D,)): columns the eigenvectors of the features' covariance, by descending variance."""
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean
    return np.linalg.eigh(centred.T @ centred)[1][:, ::-1], mean


def classification_dimension(counts, groups):
    """The smallest number of components with 99 % of the correct answers that all of them give."""
    correct = counts[groups].sum(0)
    return int(np.argmax(correct >= 0.99 * correct[-1]))


# --------------------------------------------------------------------------------------------------- linear probe, autoencoder


def fit_linear(features, labels, n_classes, device="cpu", chunk=65_536):
    """(weight (K, D), bias (K,)) float32 of a logistic regression on standardised features; the standardisation is folded in.

    The minimum of sum of cross-entropies + |weight|^2 / 2, what scikit-learn's LogisticRegression(C=1) finds, by L-BFGS in float64 on all
    rows, read in chunks of a memory map.
    """
    n, dim = features.shape
    starts = range(0, n, chunk)
    mean = sum(np.asarray(features[s : s + chunk], np.float64).sum(0) for s in starts) / n
    scale = np.sqrt(sum(np.square(np.asarray(features[s : s + chunk], np.float64) - mean).sum(0) for s in starts) / n)
    scale[scale == 0] = 1
    mean, scale = torch.from_numpy(mean).to(device), torch.from_numpy(scale).to(device)
    weight = torch.zeros(n_classes, dim, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-4, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        total = weight.square().sum() / 2
        total.backward()
        for s in starts:
            x = (torch.from_numpy(np.asarray(features[s : s + chunk], np.float64)).to(device) - mean) / scale
            y = torch.from_numpy(np.asarray(labels[s : s + chunk])).to(device)
            part = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum")
            part.backward()
            total = total + part
        return total.detach()

    optimizer.step(closure)
    with torch.no_grad():
        weight = weight / scale
        return weight.float(), (bias - weight @ mean).float()


class TopK(nn.Module):
    """x^ = b + W_dec^T relu(top_k(W_enc (x - b) + c)): a sparse autoencoder (Gao et al., arXiv 2406.04093); rows of W_dec have length 1."""

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
        """Activations before the choice of the k largest and the ReLU, (B, n_latents)."""
        return self.encoder(x - self.bias)

    def forward(self, x):
        return top(self.latents(x), self.k).relu() @ self.decoder + self.bias


def top(latents, k):
    """The k largest of each row; zero elsewhere."""
    values, places = latents.topk(k, dim=1)
    return torch.zeros_like(latents).scatter(1, places, values)


def train_sae(x, n_latents, k, n_steps, seed, *, batch_size=256, lr=1e-3, dead_after=200):
    """A TopK trained on features x (N, D), centred and of mean square 1: MSE, plus 1/32 of the error of the residual by dead latents.

    A latent is dead that fired for no feature in the last dead_after steps; the D / 2 largest of those try to explain what is left (its
    error is over the residual's variance). Adam; decoder rows are brought back to length 1 after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = TopK(x.shape[1], n_latents, k).to(x.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    silent = torch.zeros(n_latents, dtype=torch.int64, device=x.device)
    for _ in range(n_steps):
        rows = x[torch.randint(len(x), (batch_size,), generator=generator).to(x.device)]
        latents = sae.latents(rows)
        kept = top(latents, k).relu()
        residual = rows - kept @ sae.decoder - sae.bias
        loss = residual.square().mean()
        silent = torch.where((kept > 0).any(0), 0, silent + 1)
        dead = silent > dead_after
        if dead.any():
            k_dead = min(int(dead.sum()), max(1, x.shape[1] // 2))
            explained = top(latents.masked_fill(~dead, -torch.inf), k_dead) @ sae.decoder  # no ReLU: its gradient is what they lack
            left = residual.detach()
            loss = loss + (left - explained).square().mean() / left.square().mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return sae.eval()
