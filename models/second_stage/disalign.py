"""DisAlign: alignment of a trained classifier's logits by a gate (Zhang et al., CVPR 2021, Eq. 4 to 7)."""

from __future__ import annotations

import torch
from torch import Tensor

RHO = 1.2  # exponent of the class weights; the paper's value for ImageNet-LT
GAIN, GATE = 1.0, 0.1  # where gain and gate weight start, as in the authors' code


def gated_logits(
    logits: Tensor, features: Tensor, gate_weight: Tensor, gate_bias: Tensor, gain: Tensor, offset: Tensor
) -> Tensor:
    """(1 + s·gain)·logits + s·offset with the gate s = sigmoid(features·gate_weight + gate_bias): [B,C].

    logits: [B,C]; features: [B,D]; gate_weight: [D]; gate_bias: [] or [1]; gain, offset: [C]. Form of the authors' code.
    The paper's form, s·(a·logits + b) + (1-s)·logits, is the same with gain = a - 1 and offset = b.
    """
    gate = torch.sigmoid(features @ gate_weight + gate_bias)[:, None]
    return (1 + gate * gain) * logits + gate * offset


def class_weights(log_prior: Tensor, rho: float = RHO) -> Tensor:
    """Weights of the classes in the cross-entropy, proportional to prior^-rho with the sum C (Eq. 7): [C]."""
    return (-rho * log_prior).softmax(0) * len(log_prior)


def weighted_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with class weights, divided by the sum of the weights of the batch: a scalar.

    logits: [B,C]; target: [B] int64; weights: [C]. Least at log p(class|image) - rho·log prior with `class_weights`: the
    logits have the adjustment rho.
    """
    return torch.nn.functional.cross_entropy(logits, target, weights)
