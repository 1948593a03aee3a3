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
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)
