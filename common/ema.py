"""Exponential moving average of a model's weights."""

import copy

import torch


class EMA:
    """`ema.model` follows a model: parameters averaged, buffers (BatchNorm statistics) copied, never aliased."""

    def __init__(self, model):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, decay):
        """average <- decay * average + (1 - decay) * model; decay 0 is a plain copy."""
        for mine, theirs in zip(self.model.parameters(), model.parameters()):
            mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)
