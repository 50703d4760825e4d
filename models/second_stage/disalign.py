"""Weighted cross-entropy of DisAlign (Zhang et al., CVPR 2021); the gate is `gated_logits` of models.networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

RHO = 1.2  # exponent of the class weights; the paper's value for ImageNet-LT
GAIN, GATE = 1.0, 0.1  # where gain and gate weight start, as in the authors' code


def class_weights(log_prior: Tensor, rho: float = RHO) -> Tensor:
    """Weights of the classes in the cross-entropy, proportional to prior^-rho with the sum C (Eq. 7): [C]."""
    return (-rho * log_prior).softmax(0) * len(log_prior)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with class weights, divided by the sum of the weights of the batch: a scalar.

    logits: [B,C]; target: [B] int64; weights: [C]. Least at log p(class|image) - rho·log prior with `class_weights`: the
    logits have the adjustment rho.
    """
    return F.cross_entropy(logits, target, weights)
