"""Sampling of training images by their class, with any power of the class sizes."""

from __future__ import annotations

import torch
from torch import Tensor


class ClassSampler:
    """Draw a class with a probability in proportion to n_c ** power, then one of its images uniformly.

    labels: [N] int64. power: 1 gives every image the same probability, 0 every class (balanced), -1 prefers rare classes
    (reversed). Classes without an image are left out.
    """

    def __init__(self, labels: Tensor, classes: int, power: float = 0.0) -> None:
        self._counts = torch.bincount(labels, minlength=classes)
        self._order = labels.argsort(stable=True)
        self._start = self._counts.cumsum(0) - self._counts
        self._filled = self._counts.nonzero().flatten()
        shares = self._counts[self._filled].double() ** power
        self.shares = shares / shares.sum()
        self._bounds = None if power == 0 else self.shares.cumsum(0)

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Indices of images, int64 [number]."""
        if self._bounds is None:
            positions = torch.randint(len(self._filled), (number,), generator=generator)
        else:
            drawn = torch.rand(number, generator=generator, dtype=torch.float64)
            positions = torch.searchsorted(self._bounds, drawn, right=True).clamp(max=len(self._filled) - 1)
        return self.draw_from(self._filled[positions], generator)

    def draw_from(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of images of the classes `chosen` int64 [B], one for each entry; all images of a class are equally likely."""
        share = torch.rand(len(chosen), generator=generator, dtype=torch.float64)
        return self._order[self._start[chosen] + (share * self._counts[chosen]).long()]
