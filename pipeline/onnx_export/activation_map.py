"""Exact class-activation maps of a trained network, and the condition under which it has them, for export and report."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.decisions import LEAST_LENGTH, activation_maps
from models.networks.backbones import NoFeatureMapError
from models.networks.cosine_classifier import ImageClassifier, LinearHead

TOLERANCE = 1e-4  # largest difference of a value of the unit feature from the mean of the map


def class_rows(model: ImageClassifier) -> tuple[NDArray[Any], bool] | None:
    """Matrix float32 [C,D] of which the logits are the product with the feature, without a bias; whether with the unit feature.

    None for a student with another classifier.
    """
    if model.memory is not None or not model.cosine:
        return None
    if isinstance(head := model.classifier, LinearHead):
        plain = head.centre is None and head.gate_weight is None
        return (head.weight.detach().cpu().numpy().astype(np.float32), True) if plain else None
    folded = model.folded()
    if folded is None or folded.parts > 1:
        return None
    return folded.matrix.cpu().numpy().astype(np.float32), folded.parts == 1


def is_mean(unit: NDArray[Any], cells: NDArray[Any]) -> bool:
    """Whether features of length 1 [n,D] have the direction of the mean over the positions of their map [n,D,h,w].

    A map of zeros has the feature 0.
    """
    mean = cells.mean(axis=(2, 3), dtype=np.float64)
    lengths = np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), LEAST_LENGTH)
    return bool(np.abs(mean / lengths - unit).max() <= TOLERANCE)


@torch.inference_mode()
def maps_of_classes(
    model: ImageClassifier, images: Tensor, chosen: NDArray[np.integer[Any]]
) -> NDArray[np.float32] | None:
    """Class-activation map of class chosen[i] for the normalised image i of [n,3,H,W], float32 [n,h,w].

    model: in eval mode, on the device of the images.

    None for a network without an exact map, as in a release: its classifier is not one matrix (class_rows), or its feature is
    not the mean of a map.
    """
    found = class_rows(model)
    if found is None or images.ndim != 4:  # stored features have no positions
        return None
    try:
        outputs, maps = model.backbone.with_map(images)
    except NoFeatureMapError:
        return None
    cells = maps.float().cpu().numpy()
    if not is_mean(F.normalize(outputs.float(), dim=1).cpu().numpy(), cells):
        return None
    return activation_maps(found[0], cells, chosen, found[1])
