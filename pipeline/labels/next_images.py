"""Unlabelled images to label next: those that promise most images of small classes, and differ from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.memory import FeatureMemory, build_memory, choose_rows
from models.networks.memory_fit import fit_leave_one_out
from models.prior import GROUPS, shot_group
from pipeline.labels.features import LabelledImages
from pipeline.labels.suspects import ROWS
from pipeline.shared.errors import ParamsError


@dataclass(frozen=True)
class Choice:
    """A chosen image. index: in the pool. gain: expected gain at its turn. hit: probability of a wanted class.

    classes: numbers of the most likely classes, with their probabilities.
    """

    index: int
    gain: float
    hit: float
    classes: list[tuple[int, float]]


def wanted_classes(wanted: str, images: LabelledImages) -> np.ndarray:
    """Classes of a shot group, of `all`, or one class by name: bool [C]. Raises ParamsError that names what is allowed."""
    if wanted == "all":
        return np.ones(len(images.classes), dtype=bool)
    if wanted in GROUPS:
        chosen = np.array([shot_group(count) == wanted for count in images.counts])
        if not chosen.any():
            raise ParamsError(f"--for is {wanted!r}, but no class has so many images; give another group or a class")
        return chosen
    if wanted not in images.classes:
        raise ParamsError(f"--for is {wanted!r}; expected {', '.join(GROUPS)}, all, or the name of a class")
    return np.array([name == wanted for name in images.classes])


def choose_images(
    images: LabelledImages, pool: Tensor, wanted: np.ndarray, budget: int, shown: int = 3
) -> list[Choice]:
    """Choose images of the pool to label, the most useful first. pool: features [M,D]. wanted: bool [C].

    p(c|x) is the class likelihood of Eq. 3 over the labelled images, for equally frequent classes, with tau and weight fitted
    with each labelled image left out. The gain of an image is (1 - s) * sum_c p(c|x) / (n_c + m_c) over the wanted classes:
    the increase of sum_c log n_c, with n_c labelled images and m_c expected images among those chosen before, times the
    difference from these: s is the largest cosine with one of them. Greedy, as for submodular functions.
    """
    probabilities = class_probabilities(images, pool)
    hits = probabilities[:, torch.from_numpy(wanted)]
    expected = torch.from_numpy(np.maximum(images.counts[wanted], 1)).float()
    unit, nearest = F.normalize(pool.float(), dim=1), torch.zeros(len(pool))
    choices: list[Choice] = []
    free = torch.ones(len(pool), dtype=torch.bool)
    for _ in range(min(budget, len(pool))):
        gains = (hits @ (1 / expected)) * (1 - nearest)
        index = int(gains.masked_fill(~free, -1).argmax())
        free[index] = False
        values, classes = probabilities[index].topk(min(shown, probabilities.shape[1]))
        named = list(zip(classes.tolist(), values.tolist(), strict=True))
        choices.append(Choice(index, float(gains[index]), float(hits[index].sum()), named))
        expected += hits[index]
        nearest = torch.maximum(nearest, (unit @ unit[index]).clamp(0, 1))
    return choices


def class_probabilities(images: LabelledImages, pool: Tensor) -> Tensor:
    """p(c|x) of the pool's images, float32 [M,C], for equally frequent classes. A class without images has 0."""
    classes = len(images.classes)
    rows = choose_rows(images.labels, classes, max(ROWS, classes))
    fit = fit_leave_one_out(images.features, images.labels, images.origin, rows, classes)
    memory = FeatureMemory(build_memory(images.features, images.labels, classes), classes, fit.tau, fit.weight)
    logits = torch.cat([memory(part) for part in pool.split(256)])
    return torch.softmax(logits.masked_fill(torch.from_numpy(images.counts == 0), -torch.inf), dim=1)
