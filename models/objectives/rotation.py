"""Objective of the pretraining of SSP (Yang and Xu, NeurIPS 2020): recognise by which angle an image is rotated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses.class_loss import Mixed
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.objective import Objective

ANGLES = 4  # by 0, 90, 180 and 270 degrees


class RotationObjective(Objective):
    """Cross-entropy of the rotation of each image by 0, 90, 180 and 270 degrees. Needs no labels; four images a step.

    model: a network with ANGLES classes.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        views: Tensor,
        target: Tensor,  # noqa: ARG002 - the labels are not used
        sample_ids: Tensor,  # noqa: ARG002 - the interface of Objective
        mixed: Mixed | None = None,  # noqa: ARG002 - the interface of Objective
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W] of square images → {loss, rotation}."""
        rotated = torch.cat([views[0].rot90(turns, (2, 3)) for turns in range(ANGLES)])
        turns = torch.arange(ANGLES, device=views.device).repeat_interleave(views.shape[1])
        loss = F.cross_entropy(self.model(rotated)[1], turns)
        return {"loss": loss, "rotation": loss.detach()}
