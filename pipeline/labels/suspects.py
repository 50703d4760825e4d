"""Images whose label disagrees with the features: the class likelihood of Eq. 3 over all other images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.networks.memory import choose_rows, leave_one_out
from models.networks.memory_fit import MemoryFit, fit_leave_one_out
from models.prior import GROUPS, shot_group
from pipeline.labels.features import LabelledImages

ROWS = 50_000  # largest number of images that each image is compared with


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
    """All images with a class more likely than their label, the least likely label first; and the fitted tau and weight.

    Ranks are within the class of the label, and no class is left out. rows: see `label_probabilities`.
    """
    probabilities, fit = label_probabilities(images, rows)
    label_p = probabilities.gather(1, images.labels[:, None])[:, 0].numpy()
    best_p, best = (value.numpy() for value in probabilities.max(1))
    groups = [shot_group(count) for count in images.counts]
    ranks, suspects = np.zeros(len(groups), int), []
    labels = images.labels.numpy()
    for index in np.argsort(label_p, kind="stable"):
        label = int(labels[index])
        if best[index] != label:
            ranks[label] += 1
            suspects.append(
                Suspect(
                    int(index), label, int(best[index]), float(label_p[index]), float(best_p[index]), int(ranks[label]),
                    groups[label],
                )
            )  # fmt: skip
    return suspects, fit


def label_probabilities(images: LabelledImages, rows: int = ROWS) -> tuple[Tensor, MemoryFit]:
    """Probability of each class for each image without the image itself, for equally frequent classes: float64 [N,C].

    The label of a class's only image has no other image to compare with: its log-likelihood is set to the median of the
    labels that have, so that it is a suspect if another class is more like it than images usually are to their own class.
    rows: largest number of images that each is compared with, but at least the number of classes.
    """
    classes = len(images.classes)
    chosen = choose_rows(images.labels, classes, max(rows, classes))
    compared = images.features, images.labels, images.origin
    fit = fit_leave_one_out(*compared, chosen, classes)
    likelihood = leave_one_out(*compared, torch.arange(len(images.labels)), chosen, classes, (fit.tau,))[0]
    own = likelihood.gather(1, images.labels[:, None])[:, 0]
    alone = own.isinf()
    if alone.any():
        typical = own[~alone].median() if (~alone).any() else torch.tensor(0.0)
        likelihood[alone, images.labels[alone]] = typical
    return torch.softmax(fit.weight * likelihood.double(), dim=1), fit


def by_group(suspects: list[Suspect]) -> dict[str, list[Suspect]]:
    """Suspects of each shot group, in their order; few first, as these labels count most."""
    return {group: [each for each in suspects if each.group == group] for group in reversed(GROUPS)}
