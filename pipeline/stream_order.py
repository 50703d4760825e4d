"""The order in which an epoch goes through a split: random, reproducible, and kind to what is read in groups."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.sources import Groups


def shuffled(count: int, groups: Groups | None, window: int, generator: torch.Generator) -> Tensor:
    """A permutation of 0..count-1, int64, from a CPU generator.

    Without groups every order is as likely as any other. With groups (a table's row groups) these come in random order,
    one after another into windows of about `window` bytes, and within a window every order is as likely: so each group is
    read once, while its window lasts, and a batch is drawn from all of it. A split within one window is as without groups.
    """
    places = torch.randperm(count, generator=generator)
    if groups is None or groups.sizes.sum() <= window:
        return places
    windows = torch.from_numpy(windows_of(groups, window, generator))
    return places[torch.sort(windows[places], stable=True).indices]


def windows_of(groups: Groups, window: int, generator: torch.Generator) -> np.ndarray:
    """The window of each image, int64 [N], numbered from 0: the groups in random order, cut every `window` bytes."""
    order = torch.randperm(len(groups.sizes), generator=generator).numpy()
    used = np.bincount(groups.number, minlength=len(groups.sizes)) > 0  # the split may leave out a whole group
    sizes = np.where(used, groups.sizes, 0)[order]
    window_of_group = np.empty(len(order), dtype=np.int64)
    window_of_group[order] = (np.cumsum(sizes) - sizes) // window
    return window_of_group[groups.number]


def class_share(labels: np.ndarray, windows: np.ndarray) -> float:
    """Classes that a window holds, of those that as many images drawn from all of the split would; 1 where it is well mixed.

    Far below 1, a batch holds few classes: the images of a table lie sorted by class.
    """
    count, classes = windows.max() + 1, int(labels.max()) + 1
    found = len(np.unique(windows * classes + labels)) / count
    sizes = np.bincount(labels, minlength=classes)
    return float(found / (1 - (1 - 1 / count) ** sizes).sum())
