"""Classifiers (cosine, linear, causal, head of a second stage), and the network of teacher and student: a backbone with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import mean_over_ranks
from models.networks.adapters import input_and_feature
from models.networks.autocast import full_precision, without_autocast
from models.networks.backbones import Backbone, build_backbone
from models.networks.memory import FeatureMemory

SMALLEST_LENGTH = 1e-12  # as in F.normalize: a shorter row is divided by it


class Folded(NamedTuple):
    """A classifier in eval mode as one matrix product: matrix·v + bias, with v the feature in `parts` parts of length 1.

    matrix: [C,D]; bias: [C] or None. parts: number of equal parts of the feature, each scaled to length 1; 0: the feature as
    it is.
    """

    matrix: Tensor
    bias: Tensor | None
    parts: int

    def logits(self, features: Tensor) -> Tensor:
        """features [B,D] → logits [B,C]."""
        return F.linear(unit_parts(features, self.parts), self.matrix, self.bias)


def unit_parts(features: Tensor, parts: int) -> Tensor:
    """Features [B,D] with each of `parts` equal parts scaled to length 1; unchanged for 0."""
    if parts <= 1:
        return F.normalize(features, dim=1) if parts else features
    return F.normalize(features.unflatten(1, (parts, -1)), dim=2).flatten(1)


class UnitRows(torch.autograd.Function):
    """F.normalize(matrix, dim=1) of a matrix [C,D] with the same values and the same gradient in half of the passes over it.

    Autograd's gradient of norm, clamp and division reads and writes the matrix ten times, which made training on stored
    features slower (docs/experiments-encoders.md, 2026-11-29).
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        """Matrix [C,D] → rows of length 1 [C,D]."""
        lengths = torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(SMALLEST_LENGTH)
        unit: Tensor = matrix / lengths
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Gradient of the matrix, in the operations and the order of autograd."""
        (gradient,), (unit, lengths) = gradients, ctx.saved_tensors
        change = (unit / lengths).mul_(gradient)
        of_length = change.sum(1, keepdim=True).neg_().masked_fill_(lengths <= SMALLEST_LENGTH, 0)
        result: Tensor = (gradient / lengths).add_(torch.mul(of_length, unit, out=change))
        return result


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
            # An export and a second derivative need PyTorch's own operations.
            return UnitRows.apply(self.weight) if self.training else F.normalize(self.weight, dim=1)
        return self.part_matrices().transpose(0, 1).flatten(1) / math.sqrt(self.parts)

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
            return torch.einsum("bed,ecd->bec", unit, self.part_matrices())

    def folded(self) -> Folded:
        """The matrix of unit rows."""
        return Folded(self.matrix().detach(), None, 1)


class LinearClassifier(nn.Linear):
    """Linear classifier with bias on features of any length, as most compared methods have; initialised as nn.Linear.

    A second stage and the check of float16 need the length of a feature: `length`, a running mean over training batches. Its
    own class, because LinearHead below takes features of length 1.
    """

    length: Tensor

    def __init__(self, feature_dim: int, classes: int) -> None:
        super().__init__(feature_dim, classes)
        self.register_buffer("length", torch.ones(()))

    @property
    def scale(self) -> float:
        """Largest change of a logit when each cosine changes by at most 1, for a feature of mean length."""
        return float(self.length * self.weight.detach().norm(dim=1).max())

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → logits [B,C]; computed in float32 also under autocast."""
        with without_autocast(features):
            outputs = full_precision(features)
            if self.training:
                self.length.lerp_(mean_over_ranks(outputs.detach().norm(dim=1).mean()).to(self.length), 0.01)
            return super().forward(outputs)

    def folded(self) -> Folded:
        """Weight and bias."""
        return Folded(self.weight.detach(), self.bias.detach(), 0)


class HeadError(ValueError):
    """A classifier does not fit the width of its feature."""


class CausalClassifier(nn.Module):
    """Causal classifier, TDE (Tang et al., NeurIPS 2020): in eval mode, the mean direction of the features is removed.

    weight: [C,D], initialised as nn.Linear, no bias. Weight and feature are cut into `heads` equal parts w_k and x_k. Logits
    in training: 16/heads · sum_k u_k·w_k / (|w_k| + 1/32), u_k = x_k / |x_k|. In eval mode u_k - alpha·(u_k·d_k)·d_k stands
    for u_k, d_k = e_k / |e_k|. Buffer mean_direction e [D]: e ← momentum·e + batch mean of x, of which only the direction is
    used; part of the checkpoint. Values of the authors' code for CIFAR. Raises HeadError unless heads divides D.
    """

    SCALE, OFFSET = 16.0, 1 / 32
    mean_direction: Tensor

    def __init__(
        self, feature_dim: int, classes: int, heads: int = 2, alpha: float = 1.5, momentum: float = 0.9
    ) -> None:
        super().__init__()
        if feature_dim % heads:
            raise HeadError(
                f"heads is {heads}, which does not divide the feature's {feature_dim} values; expected a divisor such as "
                f"{math.gcd(2 * heads, feature_dim)}"
            )
        self.heads, self.alpha, self.momentum = heads, alpha, momentum
        bound = feature_dim**-0.5
        self.weight = nn.Parameter(torch.empty(classes, feature_dim).uniform_(-bound, bound))
        self.register_buffer("mean_direction", torch.zeros(feature_dim))

    @property
    def scale(self) -> float:
        """Largest change of a logit when each cosine changes by at most 1."""
        return self.SCALE * (1 + self.alpha)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → logits [B,C]; computed in float32 also under autocast."""
        with without_autocast(features):
            outputs = full_precision(features)
            if not self.training:
                return self._folded().logits(outputs)
            mean = mean_over_ranks(outputs.detach().mean(0)).to(self.mean_direction)
            self.mean_direction.mul_(self.momentum).add_(mean)
            return F.linear(unit_parts(outputs, self.heads), self._rows())

    def _rows(self) -> Tensor:
        parts = self.weight.unflatten(1, (self.heads, -1))
        rows: Tensor = self.SCALE / self.heads * parts / (parts.norm(dim=2, keepdim=True) + self.OFFSET)
        return rows.flatten(1)

    def _folded(self) -> Folded:
        rows = self._rows().unflatten(1, (self.heads, -1))
        direction = F.normalize(self.mean_direction.unflatten(0, (self.heads, -1)), dim=1)
        along = (rows * direction).sum(2, keepdim=True)
        return Folded((rows - self.alpha * along * direction).flatten(1), None, self.heads)

    def folded(self) -> Folded:
        """The rows without their part along the mean direction, alpha times."""
        matrix, bias, parts = self._folded()
        return Folded(matrix.detach(), bias, parts)


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


Classifier = CosineClassifier | LinearClassifier | CausalClassifier


class ImageClassifier(nn.Module):
    """Backbone and classifier, by default the cosine classifier.

    `tau_s` is part of the model, so that a checkpoint defines the scale of its logits.

    backbone: its name, with image_size as for build_backbone, or the backbone itself. head: creates the classifier from
    feature width and number of classes; tau_s is 1 for all but the cosine classifier. memory: computes logits from the
    feature before an adapter; they are added to the logits of the classifier. cosine: False for a network without
    a trained classifier, whose logits are those of the memory. A second stage replaces `classifier` by a LinearHead, with
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
        head: Callable[..., Classifier] = CosineClassifier,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, image_size) if isinstance(backbone, str) else backbone
        self.feature_dim: int = self.backbone.feature_dim
        self.classes = classes
        self.tau_s = tau_s
        self.memory, self.cosine = memory, cosine
        self.classifier: Classifier | LinearHead
        if cosine:
            parts = {"parts": self.backbone.parts} if self.backbone.parts > 1 else {}
            self.classifier = head(self.feature_dim, classes, **parts)

    @property
    def logit_scale(self) -> float:
        """Largest change of a logit when each cosine changes by at most 1."""
        memory = self.memory.weight / self.memory.tau if self.memory is not None else 0.0
        return (self.classifier.scale / self.tau_s if self.cosine else 0.0) + memory

    def folded(self) -> Folded | None:
        """The trained classifier as one matrix product, divided by tau_s; None without one, and for a second stage's head."""
        if not self.cosine or isinstance(self.classifier, LinearHead):
            return None
        matrix, bias, parts = self.classifier.folded()
        return Folded(matrix / self.tau_s, None if bias is None else bias / self.tau_s, parts)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] → (features [B,D], logits [B,C] = cosine / tau_s, without any prior)."""
        outputs = full_precision(self.backbone(images))
        if self.memory is None:
            return outputs, self.classifier(outputs) / self.tau_s
        before, features = input_and_feature(outputs, self.feature_dim)
        recalled: Tensor = self.memory(before)
        return features, self.classifier(features) / self.tau_s + recalled if self.cosine else recalled
