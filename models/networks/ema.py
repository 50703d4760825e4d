"""Exponential moving average (EMA) of a network's weights, which varies less than the weights of the last step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

WARM_UP = 10  # updates; without warm-up a decay of .999 keeps the initial weights for thousands of steps


class WeightAverage(nn.Module):
    """EMA of weights: average ← d · average + (1 - d) · weights, d = min(decay, (1 + n) / (10 + n)) at the n-th update.

    Batch-norm statistics are averaged like weights; counters are copied. The average is on the network's device with
    static shapes and no copy to the host, so that an update can be part of a captured step. (torch's AveragedModel
    reads its counter on the host at every update.)
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; expected a number between 0 and 1")
        self.decay = decay
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), device=next(model.parameters()).device))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's current weights."""
        share = torch.clamp((WARM_UP - 1) / (WARM_UP + self.updates), min=1 - self.decay)
        self.updates += 1
        averaged, current = [], []
        for average, value in zip(self._tensors(self.average), self._tensors(model), strict=True):
            if average.is_floating_point():
                averaged.append(average)
                current.append(value)
            else:
                average.copy_(value)
        steps = torch._foreach_sub(current, averaged)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(averaged, steps)

    @staticmethod
    def _tensors(model: nn.Module) -> list[Tensor]:
        return [*model.parameters(), *model.buffers()]
