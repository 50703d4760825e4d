"""Images whose label disagrees with the features: two classifiers, neither of which has seen the label of the image.

One is the class likelihood of Eq. 3 over all other images. The other is a linear classifier, trained with the loss of Eq. 6 on
four fifths of the images for the last one. The likelihood finds labels of any other class; the linear classifier separates
similar classes better. Their probabilities are multiplied and the root is taken (a mean of the log-probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.networks.memory import choose_rows, leave_one_out
from models.networks.memory_fit import MemoryFit, fit_leave_one_out
from models.prior import GROUPS, log_class_prior, shot_group
from models.second_stage.fitting import Fit, Recipe, TrainingFeatures
from models.second_stage.methods import train_linear
from pipeline.labels.features import LabelledImages

ROWS = 50_000  # largest number of images that each image is compared with
FOLDS = 5
# Of the linear classifier: at this rate its out-of-fold logits need no temperature, with 400 images as with 9,000.
RECIPE = Recipe(10, 512, 0.03, 5e-4)
# Weight of the most probable other class in a score. With 0, labels of similar classes are found less often, with 8 others
# hardly less often: plankton, two seeds that no table has.
OTHER = 8.0


@dataclass(frozen=True)
class Suspect:
    """An image whose label is less likely than another class.

    index: of the image. label, suggested: class numbers. probability, suggested_probability: of both, for equally frequent
    classes, without the image itself. rank: among the suspects of its class, from 1. group: shot group of the label.
    """

    index: int
    label: int
    suggested: int
    probability: float
    suggested_probability: float
    rank: int
    group: str


def find_suspects(images: LabelledImages, rows: int = ROWS) -> tuple[list[Suspect], MemoryFit]:
    """All images with a class more likely than their label, by `label_scores`, the least first; and the fit of the likelihood.

    Ranks are within the class of the label, and no class is left out. rows: see `label_probabilities`.
    """
    probabilities, fitted = label_probabilities(images, rows)
    label_p = probabilities.gather(1, images.labels[:, None])[:, 0].numpy()
    best_p, best = (value.numpy() for value in probabilities.max(1))
    groups = [shot_group(count) for count in images.counts]
    ranks, suspects = np.zeros(len(groups), int), []
    labels = images.labels.numpy()
    for index in np.argsort(label_scores(probabilities, images.labels).numpy(), kind="stable"):
        label = int(labels[index])
        if best[index] != label:
            ranks[label] += 1
            suspects.append(
                Suspect(
                    int(index), label, int(best[index]), float(label_p[index]), float(best_p[index]), int(ranks[label]),
                    groups[label],
                )
            )  # fmt: skip
    return suspects, fitted


def label_scores(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Score of each label, float64 [N], small for wrong ones: log p(label) - OTHER * largest p of another class.

    probabilities: [N,C], of `label_probabilities`. labels: [N].
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    other = probabilities.scatter(1, labels[:, None], 0.0).amax(1)
    return own.clamp(min=1e-300).log() - OTHER * other


def label_probabilities(images: LabelledImages, rows: int = ROWS) -> tuple[Tensor, MemoryFit]:
    """Probability of each class for each image without the image itself, for equally frequent classes: float64 [N,C].

    The label of a class's only image has no other image to compare with: its log-likelihood is set to the median of the
    labels that have, so that it is a suspect if another class is more like it than images usually are to their own class; the
    linear classifier, which has not seen the class, does not count for it. rows: largest number of images that each is
    compared with, but at least the number of classes.
    """
    classes = len(images.classes)
    chosen = choose_rows(images.labels, classes, max(rows, classes))
    compared = images.features, images.labels, images.origin
    fitted = fit_leave_one_out(*compared, chosen, classes)
    likelihood = leave_one_out(*compared, torch.arange(len(images.labels)), chosen, classes, (fitted.tau,))[0]
    own = likelihood.gather(1, images.labels[:, None])[:, 0]
    alone = own.isinf()
    if alone.any():
        typical = own[~alone].median() if (~alone).any() else torch.tensor(0.0)
        likelihood[alone, images.labels[alone]] = typical
    first = torch.log_softmax(fitted.weight * likelihood.double(), dim=1)
    second = torch.where(alone[:, None], first, torch.log_softmax(out_of_fold_logits(images), dim=1))
    return torch.softmax((first + second) / 2, dim=1), fitted


def out_of_fold_logits(images: LabelledImages, folds: int = FOLDS) -> Tensor:
    """Balanced logits of each image by a linear classifier that is trained without its fold, float64 [N,C].

    Images of one origin are in one fold, and the origins of a class are spread over the folds. Deterministic.
    """
    fold, classes = origin_folds(images, folds), len(images.classes)
    logits = torch.zeros(len(images.labels), classes, dtype=torch.float64)
    for number in range(folds):
        train, held = (fold != number).nonzero()[:, 0], (fold == number).nonzero()[:, 0]
        if not len(train) or not len(held):
            continue
        counts = torch.bincount(images.labels[train], minlength=classes)
        log_prior = torch.from_numpy(log_class_prior(counts.numpy(), smoothing=1.0))
        data = TrainingFeatures(images.features[train][:, None], images.labels[train], classes)
        head = train_linear(data, Fit(RECIPE, 0, torch.device("cpu")), log_prior)
        with torch.no_grad():
            logits[held] = head(images.features[held]).double()
    return logits


def origin_folds(images: LabelledImages, folds: int) -> Tensor:
    """Fold of each image, int64 [N]: all images of an origin in one, the origins of each class in turn."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    order = order[images.labels[order].argsort(stable=True)]
    _, of_origin = images.origin[order].unique(return_inverse=True)
    first = torch.full((int(of_origin.max()) + 1,), len(order)).scatter_reduce(
        0, of_origin, torch.arange(len(order)), "amin"
    )
    turn = first.argsort().argsort() % folds  # origins by the class and place of their first image
    fold = torch.empty_like(order)
    fold[order] = turn[of_origin]
    return fold


def by_group(suspects: list[Suspect]) -> dict[str, list[Suspect]]:
    """Suspects of each shot group, in their order; few first, as these labels count most."""
    return {group: [each for each in suspects if each.group == group] for group in reversed(GROUPS)}
