"""What one optimiser step minimises in segmentation: L_cls of both heads, for the student also L_GML of sampled cells.

The interface is that of models/objectives/objective.py, with label maps in place of labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.objectives.objective import Objective
from models.segmentation.contrast import CellContrast
from models.segmentation.losses import Average, pixel_cross_entropy
from models.segmentation.network import SegmentationModel

CellEncoder = Literal["teacher", "self"]


@dataclass(frozen=True)
class SegmentationWeights:
    """Weights of the terms: gamma for L_cls of the decode head, beta for L_GML, auxiliary for L_cls of the auxiliary head.

    adjustment: strength of the prior in both L_cls (α; its strength in L_GML belongs to CellContrast). average: see
    `pixel_cross_entropy`.
    """

    gamma: float = 1.0
    beta: float = 0.0
    auxiliary: float = 0.4
    adjustment: float = 1.0
    average: Average = "valid"


class SegmentationObjective(Objective):
    """gamma·L_cls + auxiliary·L_cls(auxiliary head) + beta·L_GML on one view. The teacher has beta 0.

    contrast: required if beta is not 0. teacher: the frozen contrast encoder, a SegmentationModel trained by L_cls
    (contrast_encoder `teacher`); None stores the student's own features of the step, detached (`self`). Its batch norm
    uses running statistics. Teacher and student see the same view. With gradient accumulation, every micro-batch stores
    its cells and embeds the queue.
    """

    model: SegmentationModel  # type: ignore[assignment]
    log_prior: Tensor

    def __init__(
        self,
        model: SegmentationModel,
        log_prior: Tensor,
        weights: SegmentationWeights,
        contrast: CellContrast | None = None,
        teacher: SegmentationModel | None = None,
    ) -> None:
        super().__init__()
        if weights.beta and contrast is None:
            raise ValueError("contrast is None, but L_GML (beta > 0) needs it")
        self.model, self.weights = model, weights
        self.register_buffer("log_prior", log_prior)
        self.contrast = contrast if weights.beta else None
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None and weights.beta else None

    def train(self, mode: bool = True) -> SegmentationObjective:
        """Set training mode for all modules except the frozen teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,
        mixed: None = None,  # noqa: ARG002 - same signature as StudentObjective
        whole: None = None,  # noqa: ARG002 - same signature as StudentObjective
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B,H,W] (classes or 255), sample_ids [B] → {loss, classification, auxiliary, gml}.

        All are scalar tensors; a term of weight 0 has no entry.
        """
        weights, outputs = self.weights, self.model(views[0])
        parts = {"classification": self._classification(outputs.logits, target)}
        loss = weights.gamma * parts["classification"]
        if weights.auxiliary:
            parts["auxiliary"] = self._classification(outputs.auxiliary, target)
            loss = loss + weights.auxiliary * parts["auxiliary"]
        if self.contrast is not None:
            keys = outputs.features
            if self.teacher is not None:
                with torch.no_grad():
                    keys = self.teacher(views[0]).features
            parts["gml"] = self.contrast(outputs.features, keys, target, sample_ids, self.log_prior)
            loss = loss + weights.beta * parts["gml"]
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _classification(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = self.weights
        return pixel_cross_entropy(logits, target, self.log_prior, weights.adjustment, average=weights.average)

    def observations(self) -> dict[str, float]:
        """Further values for the record of an epoch: the share of the queues that holds features of training cells."""
        return {} if self.contrast is None else {"queue_fill": self.contrast.queues.fill().item()}

    def batch_modules(self) -> list[nn.Module]:
        """Modules whose input is this rank's share of the batch; their batch norm must be synchronised over the ranks."""
        return [self.model] if self.contrast is None else [self.model, self.contrast.query_head]
