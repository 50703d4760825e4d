"""Heads of a fully convolutional network (FCN): 3x3 convolutions, dropout, and a classifier of every cell.

The decode head and the auxiliary head are those of mmsegmentation's `fcn_r50-d8`; with a backbone of 2048 and 1024
channels they have its widths.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.networks.autocast import full_precision
from models.networks.cosine_classifier import CosineClassifier

Classifier = Literal["cosine", "linear"]
DROPOUT = 0.1
MINIMUM_WIDTH = 64
LINEAR_DEVIATION = 0.01  # of the initial weights of a linear classifier, as in mmsegmentation


def head_width(channels: int) -> int:
    """Channels of a head on maps of `channels` channels: a quarter, at least 64."""
    return max(channels // 4, MINIMUM_WIDTH)


class FcnHead(nn.Module):
    """Head of an FCN on maps of one stage.

    Decode head: two 3x3 convolutions, concatenation with the input, one 3x3 convolution. Auxiliary head: one 3x3
    convolution. Every convolution has no bias and is followed by batch norm and ReLU. classifier: `cosine` divides the
    cosine of a cell's feature and a class weight by tau_s; `linear` is a 1x1 convolution with bias, without tau_s.
    """

    def __init__(self, channels: int, classes: int, tau_s: float, classifier: Classifier, auxiliary: bool) -> None:
        super().__init__()
        self.width = head_width(channels)
        self.tau_s = tau_s if classifier == "cosine" else 1.0
        self.convolutions = nn.Sequential(_convolution(channels, self.width))
        self.combine: nn.Module | None = None
        if not auxiliary:
            self.convolutions.append(_convolution(self.width, self.width))
            self.combine = _convolution(channels + self.width, self.width)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier: CosineClassifier | nn.Linear
        if classifier == "cosine":
            self.classifier = CosineClassifier(self.width, classes)
        else:
            self.classifier = nn.Linear(self.width, classes)
            nn.init.normal_(self.classifier.weight, std=LINEAR_DEVIATION)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """maps [B,channels,h,w] → (features [B,width,h,w] before dropout, logits [B,C,h,w] without any prior)."""
        features = self.convolutions(maps)
        if self.combine is not None:
            features = self.combine(torch.cat([maps, features], dim=1))
        features = full_precision(features)
        return features, self.classify(self.dropout(features))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of every cell: features [B,width,h,w] → [B,C,h,w]."""
        batch, _, height, width = features.shape
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        logits: Tensor = self.classifier(rows) / self.tau_s
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _convolution(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
