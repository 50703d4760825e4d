"""Cosine classifier, and the network of teacher and student: a backbone with this classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.adapters import input_and_feature
from models.networks.autocast import full_precision, without_autocast
from models.networks.backbones import Backbone, build_backbone
from models.networks.memory import FeatureMemory


class CosineClassifier(nn.Module):
    """Cosine of a feature with each class weight: cos(·,·) of Eq. 6, before the division by tau_s.

    weight: [C,D], no bias; initialised by uniform(-1, 1) with rows rescaled to length 1, and normalised at every
    forward.
    """

    def __init__(self, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(classes, feature_dim).uniform_(-1, 1), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → cosines [B,C] in [-1, 1]; computed in float32 also under autocast."""
        with without_autocast(features):
            return F.linear(F.normalize(full_precision(features), dim=1), F.normalize(self.weight, dim=1))


class ImageClassifier(nn.Module):
    """Backbone and cosine classifier. `tau_s` is part of the model, so that a checkpoint defines the scale of its logits.

    backbone: its name, with image_size as for build_backbone, or the backbone itself. memory: computes logits from the
    feature before an adapter; they are added to the logits of the cosine classifier. cosine: False for a network without
    a cosine classifier, whose logits are those of the memory.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        classes: int,
        tau_s: float,
        image_size: int | None = None,
        memory: FeatureMemory | None = None,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, image_size) if isinstance(backbone, str) else backbone
        self.feature_dim: int = self.backbone.feature_dim
        self.classes = classes
        self.tau_s = tau_s
        self.memory, self.cosine = memory, cosine
        if cosine:
            self.classifier = CosineClassifier(self.feature_dim, classes)

    @property
    def logit_scale(self) -> float:
        """Largest change of a logit when each cosine changes by at most 1."""
        memory = self.memory.weight / self.memory.tau if self.memory is not None else 0.0
        return (1 / self.tau_s if self.cosine else 0.0) + memory

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] → (features [B,D], logits [B,C] = cosine / tau_s, without any prior)."""
        outputs = full_precision(self.backbone(images))
        if self.memory is None:
            return outputs, self.classifier(outputs) / self.tau_s
        before, features = input_and_feature(outputs, self.feature_dim)
        recalled: Tensor = self.memory(before)
        return features, self.classifier(features) / self.tau_s + recalled if self.cosine else recalled
