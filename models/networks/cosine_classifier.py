"""Cosine classifier, linear head of a second stage, and the network of teacher and student: a backbone with one of them."""

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
    forward. scale: largest change of an output when each cosine changes by at most 1.

    parts: number E of parts of the feature, each of length 1 and of width D/E (Backbone.parts). The output is then the
    mean of the E cosines of each part with its part of the weight. That is again one cosine, of feature and `matrix`.
    """

    scale = 1.0

    def __init__(self, feature_dim: int, classes: int, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        drawn = torch.empty(classes, feature_dim).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(drawn.unflatten(1, (parts, -1)), dim=2).flatten(1))

    def matrix(self) -> Tensor:
        """Class matrix [C,D] with rows of length 1: the outputs are the cosines of features with these rows."""
        if self.parts == 1:
            return F.normalize(self.weight, dim=1)
        return self.part_matrices().transpose(0, 1).flatten(1) / self.parts**0.5

    def part_matrices(self) -> Tensor:
        """Class matrices of the parts, [E,C,D/E], with rows of length 1."""
        return F.normalize(self.weight.unflatten(1, (self.parts, -1)), dim=2).transpose(0, 1)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → cosines [B,C] in [-1, 1]; computed in float32 also under autocast."""
        with without_autocast(features):
            return F.linear(F.normalize(full_precision(features), dim=1), self.matrix())

    def part_cosines(self, features: Tensor) -> Tensor:
        """Cosines of each part on its own: features [B,E,D/E] of any length → [B,E,C]; float32 also under autocast."""
        with without_autocast(features):
            unit = F.normalize(full_precision(features), dim=2)
            return (unit.transpose(0, 1) @ self.part_matrices().transpose(1, 2)).transpose(0, 1)


class LinearHead(nn.Module):
    """Logits of features [B,D]: W·u + b of the unit feature u [B,C].

    weight: [C,D]; bias: [C]. centred: the buffer `centre` [D] is subtracted before the feature is scaled to length 1 (nearest
    class mean). gated: the logits are aligned by `gated_logits` (DisAlign) with gate_weight [D], gate_bias [1], gain [C] and
    offset [C]. All values are 0 until they are set or loaded.
    """

    centre: Tensor | None
    gate_weight: nn.Parameter | None

    def __init__(self, feature_dim: int, classes: int, *, centred: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, feature_dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("centre", torch.zeros(feature_dim) if centred else None)
        self.register_parameter("gate_weight", nn.Parameter(torch.zeros(feature_dim)) if gated else None)
        if gated:
            self.gate_bias = nn.Parameter(torch.zeros(1))
            self.gain = nn.Parameter(torch.zeros(classes))
            self.offset = nn.Parameter(torch.zeros(classes))

    @property
    def scale(self) -> float:
        """Largest change of a logit when the cosine of a feature with each row of `weight` changes by at most 1."""
        largest = self.weight.detach().norm(dim=1).max()
        if self.gate_weight is not None:
            largest = largest * (1 + self.gain.detach()).abs().max().clamp(min=1)
        return float(largest)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → logits [B,C]; computed in float32 also under autocast."""
        with without_autocast(features):
            outputs = full_precision(features)
            unit = F.normalize(outputs if self.centre is None else outputs - self.centre, dim=1)
            logits = F.linear(unit, self.weight, self.bias)
            if self.gate_weight is None:
                return logits
            return gated_logits(logits, unit, self.gate_weight, self.gate_bias, self.gain, self.offset)


def linear_head(weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> LinearHead:
    """Head in eval mode with these values, float32 on the CPU."""
    head = LinearHead(weight.shape[1], weight.shape[0], centred=centre is not None)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        if centre is not None and head.centre is not None:
            head.centre.copy_(centre)
    return head.eval().requires_grad_(False)


def gated_logits(
    logits: Tensor, features: Tensor, gate_weight: Tensor, gate_bias: Tensor, gain: Tensor, offset: Tensor
) -> Tensor:
    """(1 + s·gain)·logits + s·offset with the gate s = sigmoid(features·gate_weight + gate_bias): [B,C].

    logits: [B,C]; features: [B,D]; gate_weight: [D]; gate_bias: [] or [1]; gain, offset: [C]. Form of the authors' code.
    The paper's form, s·(a·logits + b) + (1-s)·logits, is the same with gain = a - 1 and offset = b.
    """
    gate = torch.sigmoid(features @ gate_weight + gate_bias)[:, None]
    return (1 + gate * gain) * logits + gate * offset


class ImageClassifier(nn.Module):
    """Backbone and cosine classifier. `tau_s` is part of the model, so that a checkpoint defines the scale of its logits.

    backbone: its name, with image_size as for build_backbone, or the backbone itself. memory: computes logits from the
    feature before an adapter; they are added to the logits of the cosine classifier. cosine: False for a network without
    a cosine classifier, whose logits are those of the memory. A second stage replaces `classifier` by a LinearHead, with
    tau_s 1.
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
        self.classifier: CosineClassifier | LinearHead
        if cosine:
            self.classifier = CosineClassifier(self.feature_dim, classes, self.backbone.parts)

    @property
    def logit_scale(self) -> float:
        """Largest change of a logit when each cosine changes by at most 1."""
        memory = self.memory.weight / self.memory.tau if self.memory is not None else 0.0
        return (self.classifier.scale / self.tau_s if self.cosine else 0.0) + memory

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] → (features [B,D], logits [B,C] = cosine / tau_s, without any prior)."""
        outputs = full_precision(self.backbone(images))
        if self.memory is None:
            return outputs, self.classifier(outputs) / self.tau_s
        before, features = input_and_feature(outputs, self.feature_dim)
        recalled: Tensor = self.memory(before)
        return features, self.classifier(features) / self.tau_s + recalled if self.cosine else recalled
