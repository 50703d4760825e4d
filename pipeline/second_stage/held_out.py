"""What a second stage chooses on validation images: tau, and the scale of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.networks.cosine_classifier import LinearHead, linear_head
from models.networks.memory_fit import LARGEST_SCALE, MINIMUM_IMAGES, best_weight, class_shares
from models.second_stage.tau_norm import TAUS, tau_normalised
from pipeline.evaluation.metrics import mean_of, per_class_accuracy

LEAST_SCALE = 0.01  # of the largest


@dataclass(frozen=True)
class HeldOut:
    """Validation images under the student: features float32 [N,D], labels int64 [N]."""

    features: Tensor
    labels: Tensor

    @torch.no_grad()
    def balanced_accuracy(self, head: LinearHead, shift: np.ndarray | None = None) -> float | None:
        """Mean accuracy of the classes with images; None without images. shift: [C], added to the logits."""
        logits = head(self.features).numpy()
        predicted = (logits if shift is None else logits + shift).argmax(1)
        return mean_of(per_class_accuracy(predicted, self.labels.numpy(), logits.shape[1]))

    def choose_tau(self, linear: LinearHead) -> float:
        """The first of TAUS with the largest balanced accuracy."""
        accuracies = [self.balanced_accuracy(normalised_head(linear, tau)) or 0.0 for tau in TAUS]
        return TAUS[int(np.argmax(accuracies))]

    @torch.no_grad()
    def fit_scale(self, head: LinearHead) -> float:
        """The factor of the logits with the least cross-entropy for the balanced target prior; 1 with few images.

        The largest factor gives the longest row of the weight the length LARGEST_SCALE.
        """
        if len(self.labels) < MINIMUM_IMAGES:
            return 1.0
        logits = head(self.features).double()
        largest = LARGEST_SCALE / head.scale
        share = class_shares(self.labels, logits.shape[1])
        return best_weight(torch.zeros_like(logits), logits, self.labels, share, (LEAST_SCALE * largest, largest))


def normalised_head(linear: LinearHead, tau: float) -> LinearHead:
    """Head with tau-normalised rows and no bias, times a factor that does not change their mean length much."""
    weight = linear.weight.detach()
    rows = tau_normalised(weight, tau) * weight.norm(dim=1).mean() ** tau
    return linear_head(rows, torch.zeros(len(weight)))
