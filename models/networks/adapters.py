"""The trained part between the features of a frozen encoder and the classifier: a residual adapter, or the identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision
from models.networks.backbones import Backbone


class ResidualAdapter(nn.Module):
    """x + up(gelu(down(layer_norm(x)))), a bottleneck of `hidden` units. `up` starts at 0, so the output starts as x."""

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
    """A backbone that returns its input and its feature, concatenated: [B,D] → [B,2D]."""

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → [B,2D], the input and then the feature."""
        return torch.cat([full_precision(features), full_precision(super().forward(features))], 1)


def input_and_feature(outputs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Input and feature, [B,width] each, in the output of a BackboneWithInput; without an adapter, [B,width] is both."""
    return outputs[:, :width], outputs[:, -width:]


def with_encoder(encoder: Backbone, head: Backbone) -> Backbone:
    """Join an encoder and a head (see feature_backbone) into one backbone that takes images [B,3,H,W]."""
    return Backbone(nn.Sequential(encoder, head), head.feature_dim)


def feature_backbone(width: int, adapter: int, with_input: bool = False) -> Backbone:
    """Build the trained part between features [B,width] and the classifier. adapter: hidden units; 0 for no adapter.

    with_input: return the input and then the adapted feature, [B,2*width]; a memory needs the input.
    """
    if not adapter:
        return Backbone(nn.Identity(), width)
    return (BackboneWithInput if with_input else Backbone)(ResidualAdapter(width, adapter), width)
