"""Baseline classifiers of stored features: weighted kNN and scikit-learn's LogisticRegression.

Each returns balanced logits for validation and test features; a target prior can be added to them. Its one hyperparameter is
chosen on validation, by the mean of per-class accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.metrics import mean_of, per_class_accuracy

NEIGHBOURS = (5, 10, 20, 50, 100)
INVERSE_PENALTIES = (0.0001, 0.001, 0.01, 0.1)  # C of LogisticRegression, on standardised features
ITERATIONS = 200
TAU = 0.07  # temperature of a neighbour's vote
BATCH = 512

Logits = tuple[np.ndarray, np.ndarray]  # logits of validation and test


def knn(train: Tensor, labels: Tensor, validation: Tensor, targets: Tensor, test: Tensor, classes: int) -> Logits:
    """Classify by the k nearest neighbours (cosine). The weight of a vote is exp(cosine / TAU) / images of its class.

    train [N,D], labels [N], validation [V,D], targets [V], test [T,D] → logits [V,C] and [T,C], log of the votes.
    """
    stored = F.normalize(train.float(), dim=1)
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)

    def logits(features: Tensor, neighbours: int) -> np.ndarray:
        parts = []
        for part in F.normalize(features.float(), dim=1).split(BATCH):
            cosines, rows = (part @ stored.T).topk(min(neighbours, len(stored)), dim=1)
            votes = torch.zeros(len(part), classes).scatter_add_(1, labels[rows], (cosines / TAU).exp())
            parts.append((votes / counts).clamp(min=1e-12).log())
        return torch.cat(parts).numpy()

    return _best((lambda k=k: lambda features: logits(features, k)) for k in NEIGHBOURS)(validation, targets, test)


def logistic_regression(
    train: Tensor, labels: Tensor, validation: Tensor, targets: Tensor, test: Tensor, classes: int
) -> Logits:
    """Fit LogisticRegression(class_weight="balanced") with L-BFGS on standardised features. Arguments and result: see `knn`."""
    mean, deviation = train.float().mean(0), train.float().std(0) + 1e-6

    def scaled(features: Tensor) -> np.ndarray:
        return ((features.float() - mean) / deviation).numpy()

    def fitted(inverse_penalty: float) -> Callable[[Tensor], np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        model: Any = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=ITERATIONS)
        model.fit(scaled(train), labels.numpy())
        return lambda features: model.decision_function(scaled(features)).reshape(len(features), -1)

    assert classes > 2, "decision_function has one column for two classes"
    return _best((lambda c=c: fitted(c)) for c in INVERSE_PENALTIES)(validation, targets, test)


def _best(
    fits: Iterable[Callable[[], Callable[[Tensor], np.ndarray]]],
) -> Callable[[Tensor, Tensor, Tensor], Logits]:
    """Choose the fit with the best mean of per-class accuracies on validation; returns its logits."""

    def choose(validation: Tensor, targets: Tensor, test: Tensor) -> Logits:
        scored = []
        for fit in fits:
            predict = fit()
            logits = predict(validation)
            by_class = per_class_accuracy(logits.argmax(1), targets.numpy(), logits.shape[1])
            scored.append((mean_of(by_class) or 0.0, predict, logits))
        _, predict, logits = max(scored, key=lambda entry: entry[0])
        return logits, predict(test)

    return choose
