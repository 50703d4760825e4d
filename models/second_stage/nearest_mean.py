"""Nearest class mean (NCM) on centred features of length 1: variant `cl2n` of Kang et al., ICLR 2020, section 4.1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # images that are converted to float64 at once


def nearest_mean(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centre [D], weight [C,D] and bias [C] with weight·u + bias = -|u - m_c|^2 for a unit vector u.

    features: [N,V,D], V views of each image; labels: [N] int64, of every class at least one. u is a feature minus the
    centre, the mean of all training features, divided by its length. m_c is the mean of u over the images of class c; it
    is not rescaled to length 1, so that this differs from a cosine. float64.
    """
    rows = features.shape[0] * features.shape[1]
    centre = torch.stack([part.double().sum((0, 1)) for part in features.split(CHUNK)]).sum(0) / rows
    sums = torch.zeros(classes, features.shape[2], dtype=torch.float64)
    for part, own in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        sums.index_add_(0, own, F.normalize(part.double() - centre, dim=2).sum(1))
    means = sums / (torch.bincount(labels, minlength=classes) * features.shape[1])[:, None]
    return centre, 2 * means, -means.square().sum(1) - 1
