"""Fit tau and weight of the memory on validation images, by the lowest balanced cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.memory import BATCH, MemoryRows, leave_one_out, log_mixture

TAUS = tuple(float(tau) for tau in np.geomspace(0.03, 0.2, 8))
LARGEST_SCALE = 100.0  # of weight / tau, the limit of CLIP; reached when the memory classifies every image correctly
LEAST_WEIGHT = 0.1  # for a memory alone: with weight 0, all its logits would be 0
MINIMUM_IMAGES = 30  # with one image in each of two classes, one mistake gave weight 0, no mistake the largest weight
BISECTIONS = 40
VALUES = 2**22  # largest number of log-likelihoods for one tau; images above it are not used
LEAST_LOG = -1e4  # for a class without rows, whose log-likelihood is -inf
DEFAULT_TAU = 0.07  # with too few validation images: the temperature of the GML loss in the paper


@dataclass(frozen=True)
class MemoryFit:
    """Fitted tau and weight of a memory. loss: their cross-entropy; None for defaults. images: validation images."""

    tau: float
    weight: float
    loss: float | None
    images: int


def fit_memory(
    stored: MemoryRows, features: Tensor, labels: Tensor, logits: Tensor, least_weight: float = 0.0
) -> MemoryFit:
    """Find tau and weight with the lowest cross-entropy of logits + weight * log p(x|c), for the balanced target prior.

    features: encoder features [N,D]. labels: [N] int64. logits: balanced logits [N,C] to which the memory is added; zeros
    for the memory alone. An image of a class with n images has the weight 1/n in the loss. tau is one of TAUS. For each
    tau the cross-entropy is convex in the weight, which lies between least_weight and LARGEST_SCALE * tau. The result is
    least_weight if the memory lowers the cross-entropy for no tau. With fewer than MINIMUM_IMAGES images: DEFAULT_TAU and 1.
    """
    if len(labels) < MINIMUM_IMAGES:
        return MemoryFit(DEFAULT_TAU, 1.0, None, len(labels))
    most = max(MINIMUM_IMAGES, VALUES // logits.shape[1])
    used = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:most]
    features, labels, logits = features[used], labels[used], logits[used].double()
    share = class_shares(labels, logits.shape[1])
    mixtures = _mixtures(stored, features, logits.shape[1])
    return _best_fit(logits, mixtures, labels, share, least_weight)


def _best_fit(logits: Tensor, mixtures: Tensor, labels: Tensor, share: Tensor, least_weight: float) -> MemoryFit:
    fits = []
    for tau, mixture in zip(TAUS, mixtures, strict=True):
        bounds = least_weight, LARGEST_SCALE * tau
        weight = best_weight(logits, mixture.double(), labels, share, bounds)
        losses = F.cross_entropy(logits + weight * mixture, labels, reduction="none")
        fits.append(MemoryFit(tau, weight, float((share * losses).sum()), len(labels)))
    return min(fits, key=lambda fit: fit.loss or 0.0)


def fit_leave_one_out(features: Tensor, labels: Tensor, origin: Tensor, rows: Tensor, classes: int) -> MemoryFit:
    """Find tau and weight of a memory alone, without validation images: each image is left out.

    Arguments as in `leave_one_out`. As `fit_memory`, with images whose class has another row; with fewer than
    MINIMUM_IMAGES of them the defaults.
    """
    used = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    used = used[: max(MINIMUM_IMAGES, VALUES // classes)]
    mixtures = leave_one_out(features, labels, origin, used, rows, classes, TAUS)
    known = mixtures[0].gather(1, labels[used][:, None])[:, 0].isfinite()
    used, mixtures = used[known], mixtures[:, known].clamp(min=LEAST_LOG)
    if len(used) < MINIMUM_IMAGES:
        return MemoryFit(DEFAULT_TAU, 1.0, None, len(used))
    share, zeros = class_shares(labels[used], classes), torch.zeros(len(used), classes, dtype=torch.float64)
    return _best_fit(zeros, mixtures, labels[used], share, LEAST_WEIGHT)


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Weight of each image in a mean over the classes that have one, 1 / (n_c · number of such classes): float64 [N]."""
    counts = torch.bincount(labels, minlength=classes)
    return 1 / (counts[labels] * (counts > 0).sum()).double()


def _mixtures(stored: MemoryRows, features: Tensor, classes: int) -> Tensor:
    """Compute the log-likelihoods [T,N,C] for each value of TAUS."""
    rows = stored.rows.float()
    batches = []
    for part in features.split(BATCH):
        cosines = F.linear(F.normalize(part.float(), dim=1), rows)
        batches.append(
            torch.stack([log_mixture(cosines, stored.log_share, stored.row_class, classes, tau) for tau in TAUS])
        )
    return torch.cat(batches, 1)


def best_weight(logits: Tensor, mixture: Tensor, labels: Tensor, share: Tensor, bounds: tuple[float, float]) -> float:
    """Find the weight within bounds with the least cross-entropy of logits + weight * mixture, by bisection.

    logits, mixture: [N,C]; labels: [N] int64; share: [N], weight of each image. The cross-entropy is convex in the weight,
    so the bisection finds where its derivative is 0.
    """
    own = mixture.gather(1, labels[:, None])[:, 0]

    def slope(weight: float) -> float:
        expected = ((logits + weight * mixture).softmax(1) * mixture).sum(1)
        return float((share * (expected - own)).sum())

    low, high = bounds
    if slope(low) >= 0:
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low
