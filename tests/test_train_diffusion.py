"""train_diffusion.py: its loss against the paper's formula, and its randomness.

Alone: python -m pytest tests/test_train_diffusion.py
"""

import dataclasses
import math

import torch

import train_diffusion
from published.datasets import DATASETS


def test_loss_is_edms():
    """The weighted loss is the squared error between F and its target (paper, equation 8)."""
    args = train_diffusion.parse_args(["--channels", "8", "16"])
    spec = dataclasses.replace(DATASETS["digits"], num_classes=3)
    torch.manual_seed(0)
    net = train_diffusion.build_network(spec, args).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3])
    normal = torch.tensor([-1.0, 0.2, 2.5], dtype=torch.float64)
    sd = 0.5
    with torch.no_grad():
        losses = train_diffusion.edm_loss(net, x, labels, normal, noise, args)
        for i in range(3):
            sigma = math.exp(-1.2 + 1.2 * normal[i].item())
            root = math.sqrt(sigma**2 + sd**2)
            c_skip = sd**2 / root**2
            c_out = sigma * sd / root
            c_noise = torch.tensor(math.log(sigma) / 4, dtype=torch.float64)
            noisy = x[i : i + 1] + sigma * noise[i : i + 1]
            output = net(noisy / root, c_noise, class_labels=labels[i : i + 1]).sample
            target = (x[i : i + 1] - c_skip * noisy) / c_out
            expected = (output - target).pow(2).mean().item()
            assert math.isclose(losses[i].item(), expected, rel_tol=1e-9)


def test_labels_are_dropped_at_the_rate_asked_for():
    args = train_diffusion.parse_args(["--label-dropout", "0.3"])
    y = torch.arange(5000) % 10
    labels, normal, noise = train_diffusion.draw(7, y, (5000, 1, 2, 2), 10, args)
    dropped = labels == 10
    assert abs(dropped.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(labels[~dropped], y[~dropped])
    assert abs(normal.mean()) < 0.06 and abs(noise.std() - 1) < 0.02
