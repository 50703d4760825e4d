"""Why the nearest class mean is low on stored features: its variants, and the same means with the covariance of the classes.

    python -m benchmarks.nearest_mean [--params params.yaml]

In a project with stored features. Percent, mean of the class accuracies on the test split.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.metrics import mean_of, per_class_accuracy
from pipeline.features.stored import load_features
from pipeline.params import load_params

SHRINKAGES = (1.0, 0.5, 0.1, 0.01)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the features [N,D] of each class: [C,D]."""
    sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
    return sums / torch.bincount(labels, minlength=classes)[:, None]


def discriminant(train: Tensor, labels: Tensor, test: Tensor, classes: int, shrinkage: float) -> Tensor:
    """Scores [T,C] by the distance to the class means under their common covariance; shrinkage 1: the Euclidean distance."""
    means = class_means(train, labels, classes)
    residual = train - means[labels]
    covariance = residual.T @ residual / len(residual)
    isotropic = torch.eye(len(covariance), dtype=train.dtype) * covariance.trace() / len(covariance)
    rows = means @ torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * isotropic)
    return 2 * test @ rows.T - (rows * means).sum(1)


def variants(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> dict[str, Tensor]:
    """Scores [T,C] of each variant. train [N,D], labels [N], test [T,D]."""
    centre = train.mean(0)
    spaces = {
        "as they are": (train, test),
        "length 1": (F.normalize(train, dim=1), F.normalize(test, dim=1)),
        "centred, length 1 (ncm)": (F.normalize(train - centre, dim=1), F.normalize(test - centre, dim=1)),
    }
    scores = {}
    for name, (own, queries) in spaces.items():
        means = class_means(own, labels, classes)
        scores[f"{name}, distance"] = 2 * queries @ means.T - means.square().sum(1)
        scores[f"{name}, cosine"] = F.normalize(queries, dim=1) @ F.normalize(means, dim=1).T
    for shrinkage in SHRINKAGES:
        scores[f"{name}, covariance shrunk by {shrinkage:g}"] = discriminant(own, labels, queries, classes, shrinkage)
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nearest_mean", description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    params = load_params(parser.parse_args(arguments).params)
    train, test = load_features(params, "train"), load_features(params, "test")
    classes = int(train.labels.max()) + 1
    print("| features | accuracy |\n|---|--:|")
    for name, score in variants(train.images[:, 0].double(), train.labels, test.images[:, 0].double(), classes).items():
        accuracy = mean_of(per_class_accuracy(score.argmax(1).numpy(), test.labels.numpy(), classes))
        print(f"| {name} | {100 * (accuracy or 0):.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
