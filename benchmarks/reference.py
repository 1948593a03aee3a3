"""The base recipe (Wang et al. 2023, TRADES) as plain PyTorch code has it, to measure against.

Our own step stands in train_at.py; nothing here is used outside of benchmarks.

NCHW, float32, eager; images one by one through torchvision's transforms in DataLoader workers; a
clean pass of its own for the attack, with BatchNorm's running statistics kept still; averaging
parameter by parameter. The network's layers are those of common/models.py, so that the two differ
in how they compute and not in what.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import models
from common.attacks import frozen_statistics


class Mixed(Dataset):
    """Real and, behind them, synthetic images; each set is (uint8 (N, H, W, C), labels (N,))."""

    def __init__(self, real, synthetic, spec):
        self.real = real
        self.synthetic = synthetic
        steps = [transforms.ToPILImage()]
        if spec.crop_padding:
            steps.append(transforms.RandomCrop(spec.image_size, padding=spec.crop_padding))
        if spec.flip:
            steps.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __getitem__(self, row):
        images, labels = self.real
        if row >= len(labels):
            row -= len(labels)
            images, labels = self.synthetic
        return self.transform(images[row]), int(labels[row])


def loader(real, synthetic, spec, batch_size, fraction):
    """Endless batches (x, y) from as many workers as there are cores; `fraction` is synthetic."""
    n_real = len(real[1])
    n_synthetic = len(synthetic[1])
    n_drawn = int(batch_size * fraction)

    def rows_of_batches():
        rng = np.random.default_rng(0)
        while True:
            drawn = n_real + rng.integers(n_synthetic, size=n_drawn)
            others = rng.integers(n_real, size=batch_size - n_drawn)
            yield [*others.tolist(), *drawn.tolist()]

    images = Mixed(real, synthetic, spec)
    workers = os.cpu_count()
    return iter(DataLoader(images, batch_sampler=rows_of_batches(), num_workers=workers))


def train_step(batches, spec, args):
    """A function that does one training step on the next batch. args: of train_at.py."""
    model = models.build(args.model, spec).to(memory_format=torch.contiguous_format).train()
    average = models.build(args.model, spec).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def attack(x):
        with frozen_statistics(model):
            p_clean = F.softmax(model(x), 1).detach()
            x_adv = (x + torch.empty_like(x).uniform_(-args.eps, args.eps)).clamp(0, 1)
            for _ in range(args.n_steps):
                x_adv.requires_grad_(True)
                loss = F.kl_div(F.log_softmax(model(x_adv), 1), p_clean, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, x_adv)
                x_adv = x_adv.detach() + args.step_size * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)
        return x_adv

    def step():
        x, y = next(batches)
        x_adv = attack(x)
        optimizer.zero_grad()
        logits = model(x)
        log_p_adv = F.log_softmax(model(x_adv), 1)
        loss_robust = F.kl_div(log_p_adv, F.softmax(logits, 1), reduction="batchmean")
        loss_clean = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
        (loss_clean + args.beta * loss_robust).backward()
        if args.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.state_dict().values(), model.state_dict().values()):
                kept.copy_(0.995 * kept + 0.005 * new)

    return step
