"""Trained parts on the features of a frozen encoder: a residual adapter, or nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision
from models.networks.backbones import Backbone


class ResidualAdapter(nn.Module):
    """x + up(gelu(down(layer_norm(x)))): a bottleneck of `hidden` units whose output starts at 0, so that it starts as x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,width] → [B,width]."""
        change: Tensor = self.up(F.gelu(self.down(self.norm(features))))
        return features + full_precision(change)


class BackboneWithInput(Backbone):
    """A backbone whose output has its input before the feature: [B,D] → [B,2D]."""

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → [B,2D], the input and then the feature."""
        return torch.cat([full_precision(features), full_precision(super().forward(features))], 1)


def input_and_feature(outputs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Input and feature, [B,width] each, in the output of a BackboneWithInput; without an adapter, [B,width] is both."""
    return outputs[:, :width], outputs[:, -width:]


def with_encoder(encoder: Backbone, head: Backbone) -> Backbone:
    """An encoder, and the trained part between its features and the classifier, as one backbone of images [B,3,H,W]."""
    return Backbone(nn.Sequential(encoder, head), head.feature_dim)


def feature_backbone(width: int, adapter: int, with_input: bool = False) -> Backbone:
    """The trained part between features [B,width] and the classifier. adapter: its hidden units; 0 for no adapter.

    with_input: for a memory, the output of an adapter is [B,2*width], its input before its feature.
    """
    if not adapter:
        return Backbone(nn.Identity(), width)
    return (BackboneWithInput if with_input else Backbone)(ResidualAdapter(width, adapter), width)
