"""MetaSAug on the features of a trained network (Li et al., CVPR 2021): implicit augmentation with learned class variances.

The variant of its code for ImageNet-LT and iNaturalist 2018: the classifier alone, and diagonal covariances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_sampler import ClassSampler
from models.losses.per_sample import class_balanced_weights
from models.second_stage.fitting import Head, TrainingFeatures, scaled

STRENGTH = 0.75  # of the augmentation at the last step; it grows linearly from 0
BETA = 0.9999  # of the class weights, 1 / effective number
VARIANCE_RATE = 0.1  # of the step on the variances


def augmented_logits(logits: Tensor, target: Tensor, weight: Tensor, variance: Tensor, strength: float) -> Tensor:
    """Logits z_c + strength/2 · sum_d S_yd (w_cd - w_yd)^2, an upper bound of augmentation with noise of variance S_y (ISDA).

    logits: [B,C]; target: [B] int64; weight: [C,D] of the classifier; variance: [C,D]. No [B,C,D] is formed.
    """
    own, spread = weight[target], variance[target]
    square = spread @ weight.square().T - 2 * (spread * own) @ weight.T + (spread * own.square()).sum(1, keepdim=True)
    return logits + 0.5 * strength * square


def class_variances(data: TrainingFeatures) -> Tensor:
    """Variances [C,D] of the training features of each class, all views together, at the length of `fit`; float32.

    The features are frozen, so these are exact, where the authors' code estimates them while it trains.
    """
    rows = torch.arange(len(data.labels))
    sums = torch.zeros(2, data.classes, data.features.shape[2], dtype=torch.float64)
    for view in range(data.features.shape[1]):
        for part in rows.split(4096):
            values = scaled(data.features[part, view]).double()
            sums[0].index_add_(0, data.labels[part], values)
            sums[1].index_add_(0, data.labels[part], values.square())
    count = torch.bincount(data.labels, minlength=data.classes).clamp_min(1)[:, None] * data.features.shape[1]
    mean = sums[0] / count
    return (sums[1] / count - mean.square()).clamp_min(0).float()


class MetaSAug:
    """Loss of a step of the classifier for `fitting.fit`, which steps the class variances on a class-balanced batch first.

    As in the authors' code, the step on the variances serves one batch and is not kept.
    """

    def __init__(self, head: Head, data: TrainingFeatures, rate: float, steps: int, seed: int) -> None:
        """head: the classifier. rate: learning rate of the virtual step. steps: of the whole fit."""
        device = head.weight.device
        self._head, self._data, self._rate, self._steps, self._step = head, data, rate, steps, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._sampler = ClassSampler(data.labels, data.classes)
        self._variance = class_variances(data).to(device)
        counts = torch.bincount(data.labels, minlength=data.classes)
        self._weights = torch.from_numpy(class_balanced_weights(counts.tolist(), BETA)).float().to(device)

    def __call__(self, features: Tensor, target: Tensor) -> Tensor:
        """Weighted cross-entropy of the augmented logits of a batch [B,D], [B]."""
        strength = STRENGTH * self._step / self._steps
        self._step += 1
        variance = self._variance.detach().requires_grad_()
        virtual = self._head.stepped(self._loss(features, target, variance, strength), self._rate)
        rows = self._sampler.draw(len(target), self._generator)
        balanced = self._data.batch(rows, target.device, self._generator)
        outer = F.cross_entropy(virtual(balanced), self._data.labels[rows].to(target.device))
        gradient = torch.autograd.grad(outer, variance)[0]
        stepped = (self._variance - VARIANCE_RATE * gradient).clamp_min(0)
        return self._loss(features, target, stepped, strength)

    def _loss(self, features: Tensor, target: Tensor, variance: Tensor, strength: float) -> Tensor:
        logits = augmented_logits(self._head(features), target, self._head.weight, variance, strength)
        return (self._weights[target] * F.cross_entropy(logits, target, reduction="none")).mean()
