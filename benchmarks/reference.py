"""The base recipe (Wang et al. 2023, TRADES) as plain PyTorch code has it, to measure train_at.py against.

NCHW, float32, eager; images one by one through torchvision's transforms in DataLoader workers; a clean pass of its own for the
attack, with BatchNorm's running statistics kept still; averaging parameter by parameter. The network's layers are those of
common/models.py, so that the two differ in how they compute, not in what.
"""

import measure  # noqa: F401  it finds the project
import numpy as np
import torch
import torch.nn.functional as F
from torchvision import transforms

from common import models
from common.attacks import frozen_statistics


class Mixed(torch.utils.data.Dataset):
    """Real and synthetic uint8 images (N, H, W, C) behind one another."""

    def __init__(self, real, synthetic, spec):
        self.parts, self.n_real = (real, synthetic), len(real[0])
        steps = [transforms.ToPILImage()]
        steps += [transforms.RandomCrop(spec.image_size, padding=spec.crop_padding)] if spec.crop_padding else []
        steps += [transforms.RandomHorizontalFlip()] if spec.flip else []
        self.transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __getitem__(self, index):
        (images, labels), row = (self.parts[0], index) if index < self.n_real else (self.parts[1], index - self.n_real)
        return self.transform(images[row]), int(labels[row])


def loader(real, synthetic, spec, batch_size, fraction, workers):
    """Endless batches: a share `fraction` synthetic, drawn with replacement, the rest real, by random permutation."""
    n_real, n_synthetic = len(real[0]), len(synthetic[0])
    share = int(batch_size * fraction)

    def indices():
        rng = np.random.default_rng(0)
        order = np.empty(0, int)
        while True:
            while len(order) < batch_size - share:
                order = np.concatenate([order, rng.permutation(n_real)])
            rows, order = order[: batch_size - share], order[batch_size - share :]
            yield [*rows.tolist(), *(n_real + rng.integers(n_synthetic, size=share)).tolist()]

    return iter(torch.utils.data.DataLoader(Mixed(real, synthetic, spec), batch_sampler=indices(), num_workers=workers))


def train(batches, model_name, spec, n_steps, eps, step_size, beta=5.0, smoothing=0.1, clip_norm=None):
    """A function that does one training step, data included."""
    model = models.build(model_name, spec).to(memory_format=torch.contiguous_format).train()
    average = models.build(model_name, spec).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step():
        x, y = next(batches)
        with frozen_statistics(model):
            p_clean = F.softmax(model(x), 1).detach()
            x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
            for _ in range(n_steps):
                x_adv.requires_grad_(True)
                loss = F.kl_div(F.log_softmax(model(x_adv), 1), p_clean, reduction="sum")
                gradient = torch.autograd.grad(loss, x_adv)[0]
                x_adv = x_adv.detach() + step_size * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
        optimizer.zero_grad()
        logits, logits_adv = model(x), model(x_adv)
        loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
        loss = loss + beta * F.kl_div(F.log_softmax(logits_adv, 1), F.softmax(logits, 1), reduction="batchmean")
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.state_dict().values(), model.state_dict().values()):
                mine.copy_(0.995 * mine + 0.005 * theirs)

    return step
