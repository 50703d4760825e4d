"""Segmentation network: a dilated backbone, the decode head on its last stage, the auxiliary head on the stage before."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.segmentation.dilated import DilatedBackbone, dilated_backbone
from models.segmentation.fcn import Classifier, FcnHead


class SegmentationOutputs(NamedTuple):
    """Outputs for images [B,3,H,W], with h = ceil(H / stride) and w = ceil(W / stride) cells.

    logits: [B,C,h,w] without any prior. features: [B,D,h,w], input of the dropout before the classifier. auxiliary:
    [B,C,h,w], logits of the auxiliary head in training; None in evaluation, where that head is not run.
    """

    logits: Tensor
    features: Tensor
    auxiliary: Tensor | None


class SegmentationModel(nn.Module):
    """FCN (Long et al. 2015) with a cosine classifier in both heads (Sec. 4.7).

    backbone: its name, as for `dilated_backbone`, or the backbone itself. tau_s: temperature of the cosines, part of the
    model so that a checkpoint defines the scale of its logits. classifier: see FcnHead. feature_dim: D. stride: pixels
    per cell.
    """

    def __init__(
        self, backbone: str | DilatedBackbone, classes: int, tau_s: float = 0.05, classifier: Classifier = "cosine"
    ) -> None:
        super().__init__()
        self.backbone = dilated_backbone(backbone) if isinstance(backbone, str) else backbone
        self.classes, self.stride = classes, self.backbone.stride
        before, last = self.backbone.widths
        self.decode_head = FcnHead(last, classes, tau_s, classifier, auxiliary=False)
        self.auxiliary_head = FcnHead(before, classes, tau_s, classifier, auxiliary=True)
        self.tau_s, self.feature_dim = self.decode_head.tau_s, self.decode_head.width

    def forward(self, images: Tensor) -> SegmentationOutputs:
        """Normalised images [B,3,H,W] → SegmentationOutputs."""
        before, last = self.backbone.maps(images)
        features, logits = self.decode_head(last)
        auxiliary = self.auxiliary_head(before)[1] if self.training else None
        return SegmentationOutputs(logits, features, auxiliary)


def upsample(logits: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation of logits [B,C,h,w] to [B,C,height,width], align_corners False.

    Its weights sum to 1, so that a prior added to the logits before it has the same effect as after it.
    """
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
