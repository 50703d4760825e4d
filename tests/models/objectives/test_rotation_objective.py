"""Pretraining by rotations: the images and labels of a step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.rotation import ANGLES, RotationObjective
from tests.support.small_objectives import images_seen_by, views


def test_each_image_is_shown_in_four_rotations_with_their_number_as_label():
    torch.manual_seed(0)
    objective = RotationObjective(ImageClassifier("resnet20", ANGLES, 1.0)).eval()
    batch, seen = views(1), images_seen_by(objective.model)
    loss = objective(batch, torch.zeros(6).long(), torch.arange(6))["loss"]
    turned = np.concatenate([np.rot90(batch[0].numpy(), turns, (2, 3)) for turns in range(4)])
    assert np.array_equal(seen[0].numpy(), turned)
    expected = F.cross_entropy(
        objective.model(torch.from_numpy(turned.copy()))[1], torch.arange(4).repeat_interleave(6)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
